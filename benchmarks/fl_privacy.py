"""What accounting says and costs, and how fast exact discrete noise is drawn.

The accounting row is the regression vector of DP-SGD: q = 256 / 60000, σ = 1.1, 60 epochs,
δ = 1e-5. Noise is counted in CPU seconds beside NumPy's floating Gaussians, which are neither
exact nor secret.

    python -m benchmarks.fl_privacy --samples 1048576 --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from shardpar.fl.ledger import Budget, Release, epsilon_of, noise_multiplier_for
from shardpar.fl.noise import MOST_SIGMA, discrete_gaussian
from shardpar.fl.streams import Randomness

STEPS, RATE, DELTA = 60 * 60_000 // 256, 256 / 60_000, 1e-5


def cpu_s(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| accounting | value | CPU s |\n|---|---|---|")
    release = Release(1.1, RATE, STEPS)
    for kind in ("rdp", "pld"):
        start = time.process_time()
        epsilon = epsilon_of([release], DELTA, kind)
        print(f"| ε by {kind} | {epsilon:.4f} | {time.process_time() - start:.2f} |")
    start = time.process_time()
    noise = noise_multiplier_for(Budget(2.0, DELTA), STEPS, lambda z: Release(z, RATE))
    print(f"| σ for ε = 2 by pld | {noise:.4f} | {time.process_time() - start:.2f} |")
    print(f"\n{options.samples} samples, median of {options.repeats}")
    print("| noise | millions per CPU second |\n|---|---|")
    random, generator = Randomness(), np.random.default_rng(0)
    kinds: dict[str, Callable[[], Any]] = {
        f"discrete Gaussian, σ = {sigma}": lambda s=sigma: discrete_gaussian(
            s, options.samples, random
        )
        for sigma in (1, 1000, MOST_SIGMA)
    }
    kinds["NumPy, floating, not secret"] = lambda: generator.normal(size=options.samples)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.repeats):
        for name, work in kinds.items():
            times[name].append(cpu_s(work))
    for name, taken in times.items():
        print(f"| {name} | {options.samples / statistics.median(taken) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
