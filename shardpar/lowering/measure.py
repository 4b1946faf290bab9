"""Times products, memory traffic, collectives and layers on the devices at hand.

What is short is repeated inside one program, so that the time to start a program is
not counted: a training step is one program, and pays it once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from shardpar.capture.timing_programs import LayerProgram
from shardpar.lowering.shardings import batch_sharding, partition_spec
from shardpar.spec.profile import (
    COLLECTIVES,
    CollectiveCurve,
    HardwareProfile,
    MatmulTime,
    MemoryTime,
    Overlap,
    Timed,
    collective_curve,
)

Phase = Callable[[str], AbstractContextManager[None]]
Arrays = tuple[Any, ...]
Step = Callable[[Arrays, Arrays], Arrays]

_MOST_REPEATS = 4096
_LEAST_ROUNDS = 2
_MEMORY_SHARE = 0.15
"""Share of a device's memory that the arrays of one measurement may take."""

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Effort:
    """What to measure, and for how long.

    Attributes:
      matmul_sizes: rows and columns of the square matrices.
      memory_bytes: sizes of arrays for the memory bandwidth; the largest must fit in no cache.
      message_bytes: sizes of arrays for the collectives.
      overlap_size, overlap_bytes: of the matrices and of the array that run together.
      passes: how often to come back to each thing, so that what else the machine does for a
        while does not slow all looks at one of them.
      rounds: measurements in one pass; the best of all and their median are kept.
      round_s: seconds one of them lasts, by repeating what is short.
      limit_s: seconds for the rounds of one pass; at least two are made.
      longest_s: sizes are left out that would take longer than this for a single run.
    """

    matmul_sizes: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    message_bytes: tuple[int, ...]
    overlap_size: int
    overlap_bytes: int
    passes: int
    rounds: int
    round_s: float
    limit_s: float
    longest_s: float


FULL = Effort(
    matmul_sizes=(128, 256, 512, 1024, 2048, 4096, 8192),
    memory_bytes=(MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
    message_bytes=tuple(KIB * 4**power for power in range(9)),
    overlap_size=1024,
    overlap_bytes=64 * MIB,
    passes=3,
    rounds=5,
    round_s=0.02,
    limit_s=0.2,
    longest_s=1.0,
)
QUICK = Effort(
    matmul_sizes=(128, 256, 512, 1024),
    memory_bytes=(4 * MIB, 64 * MIB),
    message_bytes=(KIB, 32 * KIB, MIB, 8 * MIB),
    overlap_size=256,
    overlap_bytes=MIB,
    passes=2,
    rounds=4,
    round_s=0.01,
    limit_s=0.05,
    longest_s=0.3,
)


def seconds_of_one(
    run: Callable[[int], object], effort: Effort, clock_s: Callable[[], float] = perf_counter
) -> Timed:
    """Seconds of one repetition of something that can be asked to repeat itself.

    The time of no repetition is subtracted: it is what starting costs.

    Args:
      run: does it so many times, and returns when that is done.
      effort: how long to look.
      clock_s: a clock that only goes forward.
    """

    def timed(repeats: int) -> float:
        began_s = clock_s()
        run(repeats)
        return clock_s() - began_s

    def warmed(repeats: int) -> float:
        # The first run compiles, where the number of turns is compiled in.
        run(repeats)
        return timed(repeats)

    once_s = warmed(1)
    run(0)
    start_s = min(timed(0) for _ in range(3))
    repeats = max(1, min(_MOST_REPEATS, math.ceil(effort.round_s / max(once_s - start_s, 1e-7))))
    began_s = clock_s()
    all_s = [warmed(repeats) if repeats > 1 else once_s]
    while all_s[0] - start_s < effort.round_s / 2 and repeats < _MOST_REPEATS:
        # The single run was slower than the rest: of so few, starting is too large a part.
        repeats = min(_MOST_REPEATS, repeats * 4)
        all_s = [warmed(repeats)]
    while len(all_s) < effort.rounds:
        if len(all_s) >= _LEAST_ROUNDS and clock_s() - began_s > effort.limit_s:
            break
        all_s.append(timed(repeats))
    # Never nothing: below a hundredth of it all, the difference is noise.
    found = [max(s - start_s, s / 100, 1e-9) / repeats for s in all_s]
    return Timed(_rounded(min(found)), _rounded(statistics.median(found)))


def more_passes(
    runs: Sequence[Callable[[int], object]], first: Sequence[Timed], effort: Effort
) -> list[Timed]:
    """Measures again, in turns, what was measured once, and puts the passes together.

    Args:
      runs: as for `seconds_of_one`.
      first: what it gave for each.
      effort: how often to come back.
    """
    passes = [list(first)]
    for _ in range(effort.passes - 1):
        passes.append([seconds_of_one(run, effort) for run in runs])
    return [
        Timed(min(t.best_s for t in times), _rounded(statistics.median(t.median_s for t in times)))
        for times in zip(*passes, strict=True)
    ]


def measure_hardware(
    devices: Sequence[jax.Device],
    *,
    cluster: str,
    memory_bytes: float,
    command: str,
    effort: Effort = FULL,
    phase: Phase = lambda _: nullcontext(),
) -> HardwareProfile:
    """Measures matmul rates, memory bandwidth, collectives, and what of them overlaps.

    All devices work at the same time, as in training: devices that share something,
    as virtual ones share cores, show what is left of it for each.

    Args:
      devices: of one kind.
      cluster: a name for them.
      memory_bytes: of one device; sizes that need too much of it are left out.
      command: what to note as the origin of the figures.
      effort: what to measure, and for how long.
      phase: told what is being measured; lasts as long as that.

    Example:
      >>> tiny = Effort((16,), (1024,), (1024, 4096), 16, 1024, 1, 2, 1e-4, 0.01, 1.0)
      >>> profile = measure_hardware(
      ...     jax.devices()[:1], cluster="one", memory_bytes=1e9, command="", effort=tiny)
      >>> profile.dtypes, profile.memory_bandwidth > 0, profile.overlap is None
      (('float32', 'bfloat16'), True, True)
    """
    room = memory_bytes * _MEMORY_SHARE
    matmuls: list[MatmulTime] = []
    for dtype in ("float32", "bfloat16"):
        with phase(f"matrix products in {dtype}"):
            matmuls += _matmuls(devices, dtype, effort, room)
    with phase("memory bandwidth"):
        memory = tuple(_memory(devices, effort, room))
    curves: list[CollectiveCurve] = []
    for size in group_sizes(len(devices)):
        for kind in COLLECTIVES:
            with phase(f"{kind} over {size} devices"):
                curves.append(_curve(devices, kind, size, effort, room))
    overlap = None
    if len(devices) > 1:
        with phase("matrix products and all-reduce together"):
            overlap = _overlap(devices, effort, room)
    return HardwareProfile(
        cluster,
        devices[0].device_kind,
        devices[0].platform,
        len(devices),
        command,
        jax.__version__,
        tuple(matmuls),
        memory,
        tuple(curves),
        overlap,
    )


def group_sizes(count: int) -> tuple[int, ...]:
    """Sizes of equal groups that so many devices can form, 2 and more.

    >>> group_sizes(12), group_sizes(1)
    ((2, 3, 4, 6, 12), ())
    """
    return tuple(size for size in range(2, count + 1) if count % size == 0)


def phase_count(count: int) -> int:
    """How many phases `measure_hardware` goes through on so many devices.

    >>> phase_count(1), phase_count(2)
    (3, 9)
    """
    return 3 + len(group_sizes(count)) * len(COLLECTIVES) + (count > 1)


def layer_seconds(program: LayerProgram, effort: Effort) -> tuple[Timed, Timed]:
    """Seconds of a layer's forward, and of its forward with its backward, on the first device.

    Runs are queued one behind the other, so that the next is started while one computes.
    """
    arguments = program.arguments(seed=0)
    cotangents = program.cotangents(seed=1)
    forward, both = jax.jit(program.forward), jax.jit(program.forward_backward)
    runs = (_queued(forward, arguments), _queued(both, arguments, cotangents))
    alone, whole = more_passes(runs, [seconds_of_one(run, effort) for run in runs], effort)
    return alone, whole


def _queued(function: Callable[..., Any], *arguments: Any) -> Callable[[int], None]:
    def run(repeats: int) -> None:
        out = None
        for _ in range(repeats):
            out = function(*arguments)
        jax.block_until_ready(out)

    return run


def _matmuls(
    devices: Sequence[jax.Device], dtype: str, effort: Effort, room: float
) -> Iterator[MatmulTime]:
    split = split_over(devices, 1)
    runs: list[Callable[[int], None]] = []
    times: list[Timed] = []
    for size in effort.matmul_sizes:
        slow = times and times[-1].best_s * 8 > effort.longest_s
        if slow or 3 * size**2 * jnp.dtype(dtype).itemsize > room:
            break
        runs.append(_products(split, dtype, size, 1))
        times.append(seconds_of_one(runs[-1], effort))
    for size, time in zip(effort.matmul_sizes, more_passes(runs, times, effort), strict=False):
        yield MatmulTime(dtype, size, time)


def _products(split: jax.NamedSharding, dtype: str, size: int, times: int) -> Callable[[int], None]:
    left, right = _factors(split, dtype, size)
    return _repeated(split, lambda x, w: (_chain(x[0], w[0], times),), (left,), (right,))


def _factors(split: jax.NamedSharding, dtype: str, size: int) -> tuple[jax.Array, jax.Array]:
    # Divided by the root of the size, products of products stay of order one.
    blocks = (_random((size, size), dtype, seed, size**-0.5) for seed in (0, 1))
    left, right = (everywhere(split, block) for block in blocks)
    return left, right


def _chain(x: Any, w: Any, times: int) -> Any:
    for _ in range(times):
        x = x @ w
    return x


def _memory(devices: Sequence[jax.Device], effort: Effort, room: float) -> Iterator[MemoryTime]:
    split = split_over(devices, 1)
    sizes = [n for n in effort.memory_bytes if 3 * n <= room] or [effort.memory_bytes[0]]
    for num_bytes in sizes:
        block = np.ones(num_bytes // 4, np.float32)
        runs = {
            "scale": _repeated(split, lambda x, _: (x[0] * 1.0001,), (everywhere(split, block),)),
            "add": _repeated(
                split,
                lambda x, z: (x[0] + z[0],),
                (everywhere(split, block),),
                (everywhere(split, block),),
            ),
        }
        first = [seconds_of_one(run, effort) for run in runs.values()]
        for op, time in zip(runs, more_passes(list(runs.values()), first, effort), strict=True):
            yield MemoryTime(op, num_bytes, time)


def _curve(
    devices: Sequence[jax.Device], kind: str, size: int, effort: Effort, room: float
) -> CollectiveCurve:
    split, step = split_over(devices, size), collective_step(kind, size)
    sizes: list[int] = []
    runs: list[Callable[[int], None]] = []
    times: list[Timed] = []
    for wanted in effort.message_bytes:
        big = 4 * wanted > room or (times and times[-1].best_s * 4 > effort.longest_s)
        if big and len(times) > 1:
            break
        # Elements of the array: a whole number for each member of the group.
        elements = size * math.ceil(wanted / 4 / size)
        block = np.ones(elements // size if kind == "all-gather" else elements, np.float32)
        runs.append(_repeated(split, lambda x, _: (step(x[0]),), (everywhere(split, block),)))
        times.append(seconds_of_one(runs[-1], effort))
        sizes.append(4 * elements)
    again = more_passes(runs, times, effort)
    return collective_curve(kind, size, list(zip(sizes, again, strict=True)))


def collective_step(kind: str, size: int) -> Callable[[Any], Any]:
    """The collective among the devices of a group, on one device's flat array."""
    if kind == "all-reduce":
        return lambda x: jax.lax.psum(x, "group")
    if kind == "all-gather":
        return lambda x: jax.lax.all_gather(x, "group", tiled=True)
    if kind == "reduce-scatter":
        return lambda x: jax.lax.psum_scatter(x, "group", tiled=True)
    if kind == "all-to-all":
        return lambda x: jax.lax.all_to_all(x, "group", 0, 0, tiled=True)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return lambda x: jax.lax.ppermute(x, "group", ring)


def _overlap(devices: Sequence[jax.Device], effort: Effort, room: float) -> Overlap:
    """Times an all-reduce, as many products as take about as long, and both in one program."""
    count, size = len(devices), effort.overlap_size
    split = split_over(devices, count)
    num_bytes = effort.overlap_bytes
    while 4 * num_bytes > room and num_bytes > KIB:
        num_bytes //= 4

    def message() -> jax.Array:
        return everywhere(split, np.ones(num_bytes // 4, np.float32))

    def reduced(x: Any) -> Any:
        # Divided, or the values would grow without end.
        return jax.lax.psum(x, "group") / count

    left, right = _factors(split, "float32", size)
    reducing = _repeated(split, lambda x, _: (reduced(x[0]),), (message(),))
    once_s = seconds_of_one(_products(split, "float32", size, 1), effort).best_s
    times = max(1, min(32, round(seconds_of_one(reducing, effort).best_s / once_s)))
    runs = (
        _products(split, "float32", size, times),
        reducing,
        _repeated(
            split,
            lambda x, w: (reduced(x[0]), _chain(x[1], w[0], times)),
            (message(), left),
            (right,),
        ),
    )
    found = more_passes(runs, [seconds_of_one(run, effort) for run in runs], effort)
    return Overlap(count, num_bytes, *(time.best_s for time in found))


def split_over(devices: Sequence[jax.Device], group: int) -> jax.NamedSharding:
    """Dim 0 in equal parts, one for each device; neighbours form the groups of axis "group"."""
    array = np.array(devices, dtype=object).reshape(-1, group)
    mesh = Mesh(array, ("groups", "group"), axis_types=(AxisType.Auto, AxisType.Auto))
    return batch_sharding(mesh, ("groups", "group"))


def everywhere(split: jax.NamedSharding, block: np.ndarray) -> jax.Array:
    """An array of which each device holds this block."""
    devices = list(split.mesh.devices.flat)
    shape = (len(devices) * block.shape[0], *block.shape[1:])
    return jax.make_array_from_single_device_arrays(
        shape, split, [jax.device_put(block, device, may_alias=False) for device in devices]
    )


def _random(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> np.ndarray:
    block = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)
    return block.astype(jnp.dtype(dtype))


def _repeated(
    split: jax.NamedSharding, step: Step, inputs: Arrays, fixed: Arrays = ()
) -> Callable[[int], None]:
    """Something that each device does to its part, so many times in one program."""
    # On a GPU the host asks after each turn whether there is another, unless it knows how many.
    on_gpu = next(iter(split.mesh.devices.flat)).platform == "gpu"
    program, outputs = looped(split, step, inputs, fixed, compiled_in=on_gpu)
    state = (inputs, outputs)

    def run(repeats: int) -> None:
        nonlocal state
        state = jax.block_until_ready(program(repeats, *state, fixed))

    return run


def looped(
    split: jax.NamedSharding,
    step: Step,
    inputs: Arrays,
    fixed: Arrays = (),
    *,
    compiled_in: bool = False,
) -> tuple[Any, Arrays]:
    """A program that does something over and over, as often as it is told when it runs.

    Each turn writes one element of its results into the next turn's inputs. So no
    turn can be left out, be done once for all, or begin before the one before it ends,
    and whole results are made, since they are carried along.

    Args:
      split: how the arrays are laid out: dim 0 over the devices.
      step: from a device's parts of `inputs` and `fixed` to as many results as inputs.
      inputs: given up to the program.
      fixed: the same in each turn.
      compiled_in: compile anew for each number of turns.

    Returns:
      The program, (turns, inputs, results, fixed) -> (inputs, results), and results to
      begin with.
    """
    mesh, part = split.mesh, split.spec

    def turns(repeats: Any, inputs: Arrays, outputs: Arrays, fixed: Arrays) -> Any:
        def turn(_: Any, carried: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
            inputs, _ = carried
            outputs = step(inputs, fixed)
            linked = tuple(
                x.at[(0,) * x.ndim].set(y[(-1,) * y.ndim])
                for x, y in zip(inputs, outputs, strict=True)
            )
            return linked, outputs

        return jax.lax.fori_loop(0, repeats, turn, (inputs, outputs))

    def mapped(function: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False)

    def program(repeats: Any, inputs: Arrays, outputs: Arrays, fixed: Arrays) -> Any:
        if compiled_in:
            return mapped(partial(turns, repeats), part, part, part)(inputs, outputs, fixed)
        return mapped(turns, partition_spec(()), part, part, part)(repeats, inputs, outputs, fixed)

    # The loop takes the buffers of its arguments and gives others back.
    jitted = jax.jit(program, static_argnums=(0,) if compiled_in else (), donate_argnums=(1, 2))
    shapes = jax.eval_shape(mapped(step, part, part), inputs, fixed)
    return jitted, tuple(jnp.zeros(y.shape, y.dtype, device=split) for y in shapes)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
