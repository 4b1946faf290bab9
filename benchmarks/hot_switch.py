"""Switches between plans of a 100M-parameter GPT while it would train: bytes, bits and seconds.

    python -m benchmarks.hot_switch                # 20 plans, 40 pairs walked twice
    python -m benchmarks.hot_switch --width 96 --pairs 380 --copies 8   # every pair, a small model

Eight virtual CPU devices share one memory, so plans that hold many copies of the state are left
out: see `--copies`. Bits and bytes are what they are; seconds only compare with each other. With
`--memory returned` each piece is mapped by itself and goes back to the system, as accelerators'
memory never does: three times the seconds, and a third of the memory between switches. With
`--memory glibc` glibc is left as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import resource
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
import psutil

from shardpar.capture.trace import trace
from shardpar.config.model_source import load_model_source
from shardpar.lowering.allocator import keep_freed_memory
from shardpar.lowering.devices import use_virtual_devices
from shardpar.lowering.switch import Programs
from shardpar.lowering.union import take
from shardpar.run.checkpoints import Checkpoints
from shardpar.spec.layout import Piece
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


def copies(program: Any) -> float:
    """How many times all devices together hold the state."""
    held = one = 0
    for home in program.homes.leaves.values():
        size_bytes = home.shapes[0].dtype.itemsize
        one += size_bytes * math.prod(home.shapes[0].shape)
        for shape in home.shapes:
            on_each = math.prod(shape.sharding.shard_shape(shape.shape))
            held += size_bytes * on_each * len(shape.sharding.device_set)
    return held / one


def plans_of(programs: Programs, count: int, most_copies: float) -> list[Plan]:
    """Plans of one stage, and random unequal pipelines, with few enough copies of the state."""
    captured = programs.captured
    choices: list[dict[str, Any]] = [
        {}, {"fsdp": ("a", "b", "c")}, {"tensor": ("c",)}, {"fsdp": ("a",), "tensor": ("b", "c")},
        {"zero1": ("a", "b")}, {"fsdp": ("a", "b"), "tensor": ("c",), "recompute": "full"},
    ]  # fmt: skip
    plans: list[Plan] = []
    for chosen in choices:
        if len(plans) == count:
            break
        stage = Stage(
            tuple(range(8)), Mesh.factored(8), (LayerStrategy("embed..outside", **chosen),)
        )
        plan = Plan("bench", BATCH, (Pipeline(BATCH, BATCH, (stage,)),))
        plans += [plan] if copies(programs.program(plan)) <= most_copies else []
    rng = random.Random(3)
    while len(plans) < count:
        plan = random_plan(rng, captured.graph, BATCH)
        if len(plan.pipelines) > 2 or plan in plans:
            continue
        plans += [plan] if copies(programs.program(plan)) <= most_copies else []
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


def on_host(program: Any, state: Any) -> dict[str, np.ndarray]:
    """The bits of every leaf, whole, by path."""
    unions = program.homes.unions(state)
    return {path: _bits(union.arrays[0]) for path, union in unions.items()}


def differing(program: Any, state: Any, whole: dict[str, np.ndarray]) -> list[str]:
    """Leaves of which some piece on some device is not what it was in the first state."""
    found = []
    devices = {device: number for number, device in enumerate(program.devices)}
    for path, union in program.homes.unions(state).items():
        shape = union.shape
        for array, pieces in zip(union.arrays, union.layout.pieces(shape), strict=True):
            wanted = {piece.device: piece for piece in pieces}
            for shard in array.addressable_shards:
                part = _part(whole[path], wanted[devices[shard.device]])
                if not np.array_equal(_bits(shard.data), part):
                    found.append(path)
    return found


def _part(whole: np.ndarray, piece: Piece) -> np.ndarray:
    if all(len(spans) == 1 for spans in piece.spans):
        return whole[tuple(slice(*spans[0]) for spans in piece.spans)]
    return take(whole, piece)


def _bits(array: Any) -> np.ndarray:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    plain = np.asarray(jax.random.key_data(array) if is_key else array)
    return plain.view(f"u{plain.dtype.itemsize}")


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


def saved_s(program: Any, state: Any, folder: Path) -> float:
    """Seconds to save a state."""
    begun = time.perf_counter()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, program.to_saved(state))
        checkpoints.wait()
    return time.perf_counter() - begun


def restart_s(arguments: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Seconds of a new process that takes the state over: (all, of them programs, and restore)."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.hot_switch", *arguments, "--restore", str(folder)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    programs_s, restore_s = map(float, said.split()[-2:])
    return time.perf_counter() - begun, programs_s, restore_s


def restored(programs: Programs, plan: Plan, folder: Path) -> None:
    """What a process that was started anew does until it can train."""
    begun = time.perf_counter()
    program = programs.program(plan)
    program.compile()
    compiled = time.perf_counter()
    with Checkpoints(folder, read_only=True) as checkpoints:
        state = program.from_saved(checkpoints.restore(None, program.saved_shapes).state)
    jax.block_until_ready(jax.tree.leaves(state))
    print(compiled - begun, time.perf_counter() - compiled)


def walked(
    programs: Programs, plans: Sequence[Plan], path: Sequence[int], again: int
) -> tuple[Any, Any, list[float], list[float]]:
    """Follows the path, then its beginning once more, and compares every piece after each switch.

    Returns:
      The last program and state, and the seconds of all first switches and of those made again.
    """
    program = programs.program(plans[path[0]])
    state = program.init(0)
    whole = on_host(program, state)
    first: list[float] = []
    cached: list[float] = []
    for seconds_of, numbers in ((first, path), (cached, path[: again + 1])):
        program, state, _ = switched_s(programs, program, state, plans[numbers[0]])
        for count, number in enumerate(numbers[1:], 1):
            program, state, seconds = switched_s(programs, program, state, plans[number])
            seconds_of.append(seconds)
            wrong = differing(program, state, whole)
            assert not wrong, f"bits differ under plan {number}: {wrong[:3]}"
            if count % 5 == 0:
                held = psutil.Process().memory_info().rss / 1e9
                print(f"  {count}: {median(seconds_of):.2f} s each, {held:.1f} GB", flush=True)
    return program, state, first, cached


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=40, help="pairs walked")
    parser.add_argument("--again", type=int, default=40, help="of them, walked twice")
    parser.add_argument(
        "--copies", type=float, default=2.5, help="of the state, that a plan may hold at most"
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--memory", choices=("kept", "returned", "glibc"), default="kept")
    parser.add_argument("--restore", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.memory == "kept":
        keep_freed_memory()
    elif given.memory == "returned" and _MAPPED not in os.environ:
        # malloc reads these when the process begins.
        os.environ |= {_MAPPED: "65536", "MALLOC_ARENA_MAX": "2"}
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.hot_switch", *sys.argv[1:]])
    use_virtual_devices(8)
    jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "hot_switch"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    captured = model(given.width, given.layers)
    programs = Programs(captured, optax.adamw(1e-3))
    plans = plans_of(programs, given.plans, given.copies)
    if given.restore:
        restored(programs, plans[0], Path(given.restore))
        return
    print(f"{captured.graph.num_parameters:,} parameters, {len(plans)} plans", flush=True)

    amounts = [moved(programs, a, b) for a, b in itertools.permutations(plans, 2)]
    ratios = [bytes_ / bound for bytes_, bound in amounts if bound]
    print(
        f"{len(amounts)} pairs: {median(b for b, _ in amounts) / 1e9:.2f} GB moved in the median; "
        f"bytes / lower bound {median(ratios):.3f} in the median, {max(ratios):.3f} at most",
        flush=True,
    )

    path = walk(given.pairs, len(plans), random.Random(0))
    program, state, first, cached = walked(programs, plans, path, given.again)
    print(
        f"{len(set(itertools.pairwise(path)))} pairs walked, {len(cached)} of them twice: every "
        "piece of the state on every device the same bits each time"
    )
    for turn, seconds in {"first": first, "cached": cached}.items():
        print(f"  {turn}: {median(seconds):.2f} s in the median, {max(seconds):.2f} s at most")

    stepped = programs.program(plans[0])
    program, state, _ = switched_s(programs, program, state, plans[0])
    batch = {name: np.zeros((BATCH, LENGTH), np.int32) for name in ("inputs", "targets")}
    steps = []
    for _ in range(4):
        begun = time.perf_counter()
        state, metrics = stepped.step(state, batch)
        float(metrics["loss"])
        steps.append(time.perf_counter() - begun)
    step_s, cached_s = median(steps[1:]), median(cached)
    folder = Path(tempfile.mkdtemp())
    try:
        save_s = saved_s(stepped, state, folder)
        sizes = [
            f"--{name}={vars(given)[name]}" for name in ("copies", "width", "layers", "memory")
        ]
        start_s, programs_s, restore_s = restart_s(["--plans=1", *sizes], folder)
    finally:
        shutil.rmtree(folder)
    restart = save_s + start_s
    print(
        f"a step (8 x {LENGTH} tokens): {step_s:.2f} s; save {save_s:.1f} s + a new process "
        f"{start_s:.1f} s (its programs from the cache {programs_s:.1f} s, restore {restore_s:.1f} "
        f"s) = {restart:.1f} s; a cached switch is {cached_s / step_s:.2f} steps, "
        f"{cached_s / restart:.1%} of a restart, {cached_s / (save_s + restore_s):.1%} of save "
        "and restore alone"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"the process held {peak / 1e9:.1f} GB at most")


if __name__ == "__main__":
    main()
