"""Random legal plans of several stages and pipelines over eight devices, for the property tests."""

from __future__ import annotations

import random

from shardpar.errors import PlanError
from shardpar.spec.check import check
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage

DEVICES = 8


def random_plan(rng: random.Random, graph: LayerGraph, batch: int, devices: int = DEVICES) -> Plan:
    """A plan that `check` accepts and that has more than one stage or pipeline."""
    while True:
        try:
            plan = _attempt(rng, graph, batch, devices)
            check(plan, graph)
        except PlanError:
            continue
        if len(plan.pipelines) > 1 or len(plan.pipelines[0].stages) > 1:
            return plan


def _attempt(rng: random.Random, graph: LayerGraph, batch: int, devices: int) -> Plan:
    order = list(range(devices))
    if rng.random() < 0.3:
        rng.shuffle(order)
    count = rng.choice((1, 1, 2, 2, 3))
    cuts = sorted(rng.sample(range(1, devices), count - 1))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, devices], strict=True)]
    shares = _shares(rng, batch, count)
    pipelines = [
        _pipeline(rng, graph, part, share) for part, share in zip(parts, shares, strict=True)
    ]
    return Plan("random", batch, tuple(pipelines))


def _shares(rng: random.Random, batch: int, count: int) -> list[int]:
    cuts = sorted(rng.sample(range(1, batch), count - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, batch], strict=True)]


def _pipeline(rng: random.Random, graph: LayerGraph, devices: list[int], share: int) -> Pipeline:
    names = [layer.name for layer in graph.layers]
    microbatch = rng.choice([m for m in (1, 2, 4, 8) if share % m == 0])
    groups = rng.randint(1, min(4, len(devices), len(names) - 1))
    cuts = sorted(rng.sample(range(1, len(devices)), groups - 1))
    held = [devices[a:b] for a, b in zip([0, *cuts], [*cuts, len(devices)], strict=True)]
    if rng.random() < 0.4:
        held = [part[: rng.choice((1, 2, 4))] for part in held]
    chunks = 2 if groups > 1 and rng.random() < 0.25 and 2 * groups <= len(names) else 1
    schedule = "interleaved" if chunks > 1 else rng.choice(("1f1b", "gpipe"))
    where = sorted(rng.sample(range(1, len(names)), groups * chunks - 1))
    runs = [names[a:b] for a, b in zip([0, *where], [*where, len(names)], strict=True)]
    stages = []
    for number, run in enumerate(runs):
        on = held[number % groups]
        mesh = Mesh.factored(len(on))
        stages.append(Stage(tuple(on), mesh, _strategies(rng, run, mesh)))
    return Pipeline(share, microbatch, tuple(stages), schedule)


def _strategies(rng: random.Random, names: list[str], mesh: Mesh) -> tuple[LayerStrategy, ...]:
    one = _strategy(rng, names[0], mesh)
    chosen = []
    for name in names:
        if rng.random() < 0.3:
            one = _strategy(rng, name, mesh)
        chosen.append(
            LayerStrategy(
                name, one.tensor, one.fsdp, one.zero1, one.sequence_parallel, one.recompute
            )
        )
    return tuple(chosen)


def _strategy(rng: random.Random, name: str, mesh: Mesh) -> LayerStrategy:
    axes = list(mesh.names)
    split = rng.randint(0, len(axes))
    tensor = tuple(axes[len(axes) - split :])
    fsdp, zero1 = [], []
    for axis in axes[: len(axes) - split]:
        kind = rng.choice(("data", "fsdp", "zero1"))
        if kind != "data":
            (fsdp if kind == "fsdp" else zero1).append(axis)
    return LayerStrategy(
        name, tensor, tuple(fsdp), tuple(zero1), bool(tensor) and rng.random() < 0.5,
        rng.choice(("none", "none", "selective", "full")),
    )  # fmt: skip
