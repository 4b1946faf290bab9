"""Damaged plan, cluster and profile files: each is read or refused, in no time and little memory.

    python -m benchmarks.text_fuzz --inputs 100000
    python -m benchmarks.text_fuzz --show plan 1234    # one of the texts

Half of the inputs are plans, half clusters; on top come a tenth as many profiles of each kind.
`tests/spec/text_fuzz.py` says how they are made and what must hold of each. Plans that read are
checked against the demo GPT, clusters of at most six devices are planned for, every tenth of them.
The address space may grow by 1 GiB, reading one may take a second of CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from typing import Any

from shardpar.errors import SpecError
from tests.spec.text_fuzz import (
    KINDS,
    built,
    case,
    cluster_is_planned_for,
    plan_is_checked,
    reads_or_refuses,
)

GIB = 2**30
MOST_S = 1.0
HANGS_AFTER_S = 30
PLANNED_DEVICES, PLANNED_EVERY = 6, 10


def text_of(name: str, seed: int, number: int) -> str:
    return case(name, random.Random(f"{seed} {name} {number}"))


def used(value: Any, number: int) -> str:
    """What became of a value that was read."""
    if type(value).__name__ == "Plan":
        return "runs" if plan_is_checked(value) else "refused by the rules"
    if type(value).__name__ == "Cluster" and value.num_devices <= PLANNED_DEVICES:
        if number % PLANNED_EVERY:
            return "small"
        return "planned for" if cluster_is_planned_for(value) else "nothing fits"
    return "no more"


def fuzz(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """Reads so many texts of a kind; counts what came of them."""
    counts: Counter[str] = Counter()
    failures = []
    slowest = (0.0, 0)
    for number in range(inputs):
        text = text_of(name, seed, number)
        signal.alarm(HANGS_AFTER_S)
        start = time.process_time()
        took = 0.0
        try:
            with contextlib.suppress(SpecError):
                KINDS[name].read(text, "file")
            took = time.process_time() - start
            value = reads_or_refuses(name, text)
            counts["refused" if value is None else "read"] += 1
            if value is not None:
                counts[used(value, number)] += 1
            assert took <= MOST_S, f"took {took:.2f} s"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error)[:200]} ({where.name}:{where.lineno})"
            print(f"{name} {number}: {reason}", file=sys.stderr, flush=True)
            failures.append(number)
        finally:
            signal.alarm(0)
        slowest = max(slowest, (took, number))
    return {
        "kind": name, "inputs": inputs, **dict(sorted(counts.items())),
        "slowest_s": round(slowest[0], 3), "slowest": slowest[1], "failures": failures,
    }  # fmt: skip


def hangs(*_: Any) -> None:
    raise TimeoutError(f"no end after {HANGS_AFTER_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", nargs=2, metavar=("KIND", "NUMBER"), help="Print one text.")
    args = parser.parse_args()
    if args.show:
        sys.stdout.write(text_of(args.show[0], args.seed, int(args.show[1])))
        return
    warnings.simplefilter("error", RuntimeWarning)  # NumPy's overflows in the planner
    signal.signal(signal.SIGALRM, hangs)
    for name in args.kinds:
        built(name)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GIB, now + GIB))
    share = {"plan": 0.5, "cluster": 0.5, "hardware": 0.1, "model": 0.1}
    failed = 0
    for name in args.kinds:
        start = time.process_time()
        found = fuzz(name, int(share[name] * args.inputs), args.seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        failed += len(found["failures"])
        cpu_s = round(time.process_time() - start, 1)
        print(json.dumps({**found, "cpu_s": cpu_s, "rss_gb": round(peak / 1e6, 2)}), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
