"""Switches between plans of a 100M-parameter GPT while it would train: bytes, bits and seconds.

    python -m benchmarks.hot_switch              # bytes of all pairs, 20 plans walked twice
    python -m benchmarks.hot_switch --pairs 380  # every pair is walked: hours on two cores

Eight virtual CPU devices: bits and bytes are what they are; seconds only compare with each other.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardpar.capture.trace import trace
from shardpar.config.model_source import load_model_source
from shardpar.lowering.devices import use_virtual_devices
from shardpar.lowering.switch import Programs
from shardpar.run.checkpoints import Checkpoints
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.reshard import Tensor, fuse
from tests.lowering.random_plans import random_plan

ROOT = Path(__file__).parents[1]
BATCH, LENGTH = 8, 64
_MAPPED = "MALLOC_MMAP_THRESHOLD_"


def model(width: int, layers: int) -> Any:
    gpt = load_model_source(ROOT / "models" / "gpt.py")
    options = gpt.GPTOptions(
        vocab_size=16384, layers=layers, width=width, heads=12, max_length=LENGTH
    )
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return trace(
        gpt.loss, lambda rngs: gpt.build(options, rngs), {"inputs": tokens, "targets": tokens}
    )


def plans_of(captured: Any, count: int) -> list[Plan]:
    """Plans of one stage, and random unequal pipelines."""
    choices: list[dict[str, Any]] = [
        {}, {"fsdp": ("a", "b", "c")}, {"tensor": ("c",)}, {"fsdp": ("a",), "tensor": ("b", "c")},
        {"zero1": ("a", "b")}, {"fsdp": ("a", "b"), "tensor": ("c",), "recompute": "full"},
    ]  # fmt: skip
    plans = []
    for chosen in choices:
        stage = Stage(
            tuple(range(8)), Mesh.factored(8), (LayerStrategy("embed..outside", **chosen),)
        )
        plans.append(Plan("bench", BATCH, (Pipeline(BATCH, BATCH, (stage,)),)))
    rng = random.Random(3)
    while len(plans) < count:
        plan = random_plan(rng, captured.graph, BATCH)
        if len(plan.pipelines) <= 2 and plan not in plans:
            plans.append(plan)
    return plans[:count]


def moved(programs: Programs, old: Plan, new: Plan) -> tuple[int, int]:
    """(bytes, lower bound) of a switch of the whole state."""
    here, there = programs.program(old).homes.leaves, programs.program(new).homes.leaves
    tensors = []
    for path, home in here.items():
        leaf = home.shapes[0]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        tensors.append(
            Tensor(home.layout, there[path].layout, tuple(leaf.shape), leaf.dtype.itemsize)
        )
    resolved = fuse(tensors)
    return resolved.total_bytes, resolved.lower_bound_bytes


def digest(program: Any, state: Any) -> str:
    """Of every bit of the state."""
    found = hashlib.blake2b()
    for leaf in jax.tree.leaves(program.to_saved(state)):
        keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.update(np.asarray(jax.random.key_data(leaf) if keys else leaf).tobytes())
    return found.hexdigest()


def walk(pairs: int, count: int, rng: random.Random) -> list[int]:
    """Plan numbers whose neighbours are so many different pairs."""
    left = set(itertools.permutations(range(count), 2))
    at, path = 0, [0]
    while len(path) <= pairs and left:
        onward = [b for a, b in left if a == at]
        nxt = rng.choice(sorted(onward)) if onward else rng.choice(sorted({a for a, _ in left}))
        left.discard((at, nxt))
        at = nxt
        path.append(at)
    return path


def switched_s(programs: Programs, program: Any, state: Any, plan: Plan) -> tuple[Any, Any, float]:
    begun = time.perf_counter()
    found = programs.switch(program, state, plan)
    jax.block_until_ready(
        [u.arrays if hasattr(u, "arrays") else u
         for u in jax.tree.leaves(found.state, is_leaf=lambda x: hasattr(x, "arrays"))]
    )  # fmt: skip
    return found.program, found.state, time.perf_counter() - begun


def restart_s(program: Any, state: Any) -> tuple[float, float, float]:
    """Seconds to save a state, to start a process that has imported all, and to restore it."""
    folder = Path(tempfile.mkdtemp())
    try:
        begun = time.perf_counter()
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, program.to_saved(state))
            checkpoints.wait()
            saved = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import shardpar.cli.training"], check=True)
            started = time.perf_counter()
            back = checkpoints.restore(None, program.saved_shapes).state
            jax.block_until_ready(jax.tree.leaves(back))
        return saved - begun, started - saved, time.perf_counter() - started
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=20, help="pairs walked, each twice")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    given = parser.parse_args(arguments)
    if _MAPPED not in os.environ:
        # Otherwise malloc keeps freed pieces of other sizes, and the process grows with each plan.
        os.environ[_MAPPED] = "65536"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.hot_switch", *sys.argv[1:]])
    use_virtual_devices(8)
    captured = model(given.width, given.layers)
    programs = Programs(captured, optax.adamw(1e-3))
    plans = plans_of(captured, given.plans)
    print(f"{captured.graph.num_parameters:,} parameters, {len(plans)} plans", flush=True)

    amounts = [moved(programs, a, b) for a, b in itertools.permutations(plans, 2)]
    ratios = [bytes_ / bound for bytes_, bound in amounts if bound]
    print(
        f"{len(amounts)} pairs: {median(b for b, _ in amounts) / 1e9:.2f} GB moved in the median; "
        f"bytes / lower bound {median(ratios):.3f} in the median, {max(ratios):.3f} at most",
        flush=True,
    )

    path = walk(given.pairs, len(plans), random.Random(0))
    program = programs.program(plans[path[0]])
    state = program.init(0)
    before = digest(program, state)
    times: dict[str, list[float]] = {"first": [], "cached": []}
    for turn, seconds_of in times.items():
        if program.plan != plans[path[0]]:
            program, state, _ = switched_s(programs, program, state, plans[path[0]])
        for number in path[1:]:
            program, state, seconds = switched_s(programs, program, state, plans[number])
            seconds_of.append(seconds)
            assert digest(program, state) == before, f"{turn}: bits differ under plan {number}"
    print(f"{len(path) - 1} pairs walked twice: every bit of the state the same each time")
    for turn, seconds in times.items():
        print(f"  {turn}: {median(seconds):.2f} s in the median, {max(seconds):.2f} s at most")

    stepped = programs.program(plans[1])
    program, state, _ = switched_s(programs, program, state, plans[1])
    batch = {name: np.zeros((BATCH, LENGTH), np.int32) for name in ("inputs", "targets")}
    steps = []
    for _ in range(4):
        begun = time.perf_counter()
        state, metrics = stepped.step(state, batch)
        float(metrics["loss"])
        steps.append(time.perf_counter() - begun)
    save_s, start_s, load_s = restart_s(stepped, state)
    restart = save_s + start_s + load_s
    cached = median(times["cached"])
    print(
        f"a step (8 x {LENGTH} tokens): {median(steps[1:]):.2f} s; save {save_s:.1f} s + start "
        f"{start_s:.1f} s + restore {load_s:.1f} s = {restart:.1f} s; a cached switch is "
        f"{cached / median(steps[1:]):.2f} steps, {cached / restart:.1%} of a restart"
    )


if __name__ == "__main__":
    main()
