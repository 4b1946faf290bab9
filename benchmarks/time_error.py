"""Predicted against measured step time of the device at hand, over batch, recompute, micro-batches.

    python -m benchmarks.time_error                        # profiles this machine first
    python -m benchmarks.time_error --cluster here.yaml    # takes a profile that was written before

On one device the choices are recompute and micro-batches. The cost model gets the rates that
`shardpar profile hardware` measures, nothing else. On CPUs the figure is reported, not a target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import gpt
from shardpar.capture.trace import trace
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.program import Program
from shardpar.planner.cost import plan_cost
from shardpar.planner.setting import Workload
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.text import cluster_from_text

LENGTH = 128


def measured_s(program: Program, batch: dict[str, np.ndarray], steps: int) -> float:
    state = program.init(0)
    state, _ = program.step(state, batch)
    jax.block_until_ready(state)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = program.step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cluster", type=Path, help="A measured cluster file; None measures one.")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    path = args.cluster
    if path is None:
        path = Path(tempfile.mkdtemp()) / "here.yaml"
        command = [sys.executable, "-m", "shardpar", "profile", "hardware", "--quick"]
        subprocess.run([*command, "--out", str(path)], check=True, capture_output=True)
    cluster = cluster_from_text(path.read_text(), str(path))
    dtype = "bfloat16" if jax.default_backend() != "cpu" else "float32"
    errors = []
    for layers, width in ((4, 256), (6, 384)):
        options = gpt.GPTOptions(
            vocab_size=256, layers=layers, width=width, heads=8, max_length=LENGTH
        )
        for batch in (8, 16):
            tokens = jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32)
            captured = trace(
                gpt.loss, lambda rngs, o=options: gpt.build(o, rngs),
                {"inputs": tokens, "targets": tokens}, compute_dtype=dtype,
            )  # fmt: skip
            data = np.random.default_rng(0).integers(0, 256, (batch, LENGTH), dtype=np.int32)
            for recompute in ("none", "selective", "full"):
                for microbatches in (1, 2):
                    strategy = LayerStrategy("embed..outside", recompute=recompute)
                    stage = Stage((0,), Mesh(), (strategy,))
                    plan = Plan(
                        cluster.name, batch, (Pipeline(batch, batch // microbatches, (stage,)),)
                    )
                    work = Workload(batch, dtype)
                    predicted = plan_cost(plan, captured.graph, cluster, work).step_s
                    program = Program(
                        captured, plan, optax.adamw(1e-3), ProgramOptions(compute_dtype=dtype)
                    )
                    actual = measured_s(program, {"inputs": data, "targets": data}, args.steps)
                    errors.append(predicted / actual - 1)
                    print(
                        f"gpt {layers}x{width}, batch {batch}, recompute {recompute}, "
                        f"{microbatches} micro-batches: predicted {predicted * 1e3:.1f} ms, "
                        f"measured {actual * 1e3:.1f}, {errors[-1]:+.1%}",
                        flush=True,
                    )
    sizes = sorted(map(abs, errors))
    print(json.dumps({
        "backend": jax.default_backend(),
        "plans": len(errors),
        "median": round(statistics.median(sizes), 4),
        "p90": round(sizes[int(0.9 * (len(sizes) - 1))], 4),
        "worst": round(sizes[-1], 4),
        "lowest": round(min(errors), 4),
        "median_signed": round(statistics.median(errors), 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
