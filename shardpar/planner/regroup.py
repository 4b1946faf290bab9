"""Groups of devices for machines of which some are slow or missing, and the best plans on them.

All devices of a group wait for the slowest, so devices of one speed stand together: each host's
devices are cut into groups of powers of two by speed, groups are dealt to pipelines, and each
pipeline's layers, strategies and share of the batch are then solved exactly (the groups are
those of Malleus, arXiv 2410.13333; which of them is best is found by trying all).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from shardpar.errors import PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.pipeline import (
    Found,
    Groups,
    Problem,
    Shape,
    best_pipeline,
    lower_bound,
)
from shardpar.planner.profile import rates
from shardpar.planner.rebalance import rebalanced
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.planner.table import MOST_STAGES
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Pipeline, Plan

WITHIN = 0.1
"""Pipelines slower than the best plan by this share, for a share of the batch by capacity, are
left out: exact shares, or the simulator, would not make up for more."""

Grouping = tuple[Groups, ...]
"""Per pipeline, the devices of its stages."""


def is_even(cluster: Cluster) -> bool:
    """Whether all hosts have equally many devices of one speed: then any search finds its way."""
    hosts = Counter(map(cluster.host_of, range(cluster.num_devices)))
    kinds = {cluster.kind_of(d).name for d in range(cluster.num_devices)}
    return len(set(hosts.values())) == 1 and len(kinds) == 1


def groupings(
    cluster: Cluster, options: SearchOptions = SearchOptions(), dtype: str = "bfloat16"
) -> Iterator[Grouping]:
    """All ways to group that are tried, none twice.

    Args:
      cluster: the machines.
      options: pins of stages and pipelines.
      dtype: compute dtype, by which kinds of devices differ in strength.

    >>> from shardpar.spec.cluster import DeviceKind, Hosts, Link
    >>> kind = DeviceKind("x", (("float32", 1e12),), memory_bytes=16e9, memory_bandwidth=1e11)
    >>> cluster = Cluster("two", (kind,), (Hosts("x", 4, 2),), Link(1e11), Link(1e10))
    >>> next(groupings(cluster.only(range(7))))
    (((4, 5), (6,), (0, 1, 2, 3)),)
    """
    seen: set[Grouping] = set()
    most = 1 << (cluster.num_devices.bit_length() - 1)
    for size in (most >> i for i in range(most.bit_length())):
        groups = list(_groups(cluster, size))
        for count in (1 << i for i in range(len(groups).bit_length())):
            chains = _dealt(cluster, groups, count, dtype)
            stages = {len(chain) for chain in chains}
            pinned = options.stages is not None and stages != {options.stages}
            several = {1: count > 1, 2: count < 2}.get(options.pipelines or 0, False)
            if pinned or several or max(stages) > MOST_STAGES:
                continue
            for order in (_strong_ends, _weak_first):
                grouping = tuple(map(order, chains))
                if grouping not in seen:
                    seen.add(grouping)
                    yield grouping


def _groups(cluster: Cluster, size: int) -> Iterator[tuple[int, ...]]:
    """Devices in groups of at most `size`; a group leaves its host only if it is of whole ones."""
    run: list[int] = []
    for _, members in itertools.groupby(range(cluster.num_devices), cluster.host_of):
        devices = list(members)
        names = {cluster.kind_of(d).name for d in devices}
        whole = len(devices) < size and size % len(devices) == 0 and len(names) == 1
        fits = run and len(run) % len(devices) == 0 and names == {cluster.kind_of(run[0]).name}
        if run and not (whole and fits):
            yield from _pieces(run, size)
            run = []
        if whole:
            run += devices
            if len(run) == size:
                yield tuple(run)
                run = []
            continue
        by_kind: dict[str, list[int]] = {}
        for device in devices:
            by_kind.setdefault(cluster.kind_of(device).name, []).append(device)
        for own in by_kind.values():
            yield from _pieces(own, size)
    yield from _pieces(run, size)


def _pieces(devices: list[int], size: int) -> Iterator[tuple[int, ...]]:
    """Consecutive powers of two, each as large as can be."""
    start = 0
    while start < len(devices):
        piece = min(size, 1 << ((len(devices) - start).bit_length() - 1))
        yield tuple(devices[start : start + piece])
        start += piece


def _capacity(cluster: Cluster, devices: tuple[int, ...], dtype: str) -> float:
    return len(devices) * rates(cluster, devices, dtype).flops


def _dealt(cluster: Cluster, groups: list[tuple[int, ...]], count: int, dtype: str) -> Grouping:
    """Groups dealt to pipelines of about equal capacity, the strongest of each first."""
    ordered = sorted(groups, key=lambda g: (-_capacity(cluster, g, dtype), g))
    chains: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
    load = [0.0] * count
    for devices in ordered:
        at = min(range(count), key=lambda i: (load[i], i))
        chains[at].append(devices)
        load[at] += _capacity(cluster, devices, dtype)
    return tuple(map(tuple, chains))


def _strong_ends(chain: Groups) -> Groups:
    """The strongest group last, where the head and the loss are; the others by strength."""
    return (*chain[1:], chain[0])


def _weak_first(chain: Groups) -> Groups:
    """The weakest group first, where the embedding costs little."""
    return chain[::-1]


def regrouped(
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions = SearchOptions(),
) -> tuple[float, Plan] | None:
    """(simulated step, plan) of the best plan over all groupings; None if none fits.

    Args:
      graph: the model.
      cluster: the machines with their speeds; a grouping uses them all.
      workload: batch, dtype and optimizer.
      options: pins, and how many of the best plans are played event by event.
    """
    problem = Problem(graph, cluster, workload, options, options.zero or "none")
    known: dict[object, Found | None] = {}
    plans: dict[Plan, float] = {}
    for grouping in groupings(cluster, options, workload.compute_dtype):
        if problem.zero == "pipelines" and len(grouping) == 1:
            continue
        cutoff = (1 + WITHIN) * min(plans.values(), default=math.inf)
        plan = _planned(problem, grouping, known, cutoff)
        if plan is not None:
            plans[plan] = plan_cost(plan, graph, cluster, workload).step_s
    best = sorted(plans, key=plans.__getitem__)[: options.rescore]
    played = [
        (simulate(plan, plan_cost(plan, graph, cluster, workload)).step_s, number)
        for number, plan in enumerate(best)
    ]
    if not played:
        return None
    step_s, number = min(played)
    return step_s, best[number]


def on_groups(
    grouping: Grouping,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions = SearchOptions(),
) -> Plan | None:
    """The best plan by the formula on given groups: strategies, layers, shares; None if none fits.

    Args:
      grouping: per pipeline, the devices of its stages.
      graph: the model.
      cluster: the machines with their speeds.
      workload: batch, dtype and optimizer.
      options: pins.
    """
    return _planned(Problem(graph, cluster, workload, options), grouping, {}, math.inf)


def _planned(
    problem: Problem, grouping: Grouping, known: dict[object, Found | None], cutoff: float
) -> Plan | None:
    """The best plan of a grouping: pipelines for shares by capacity, then exact shares."""
    cluster, batch = problem.cluster, problem.workload.global_batch
    dtype = problem.workload.compute_dtype
    capacity = [math.fsum(_capacity(cluster, g, dtype) for g in chain) for chain in grouping]
    pipelines: list[Pipeline] = []
    for chain, mine in zip(grouping, capacity, strict=True):
        share = batch * mine / math.fsum(capacity)
        found = _best_pipeline(problem, chain, share, len(grouping), known, cutoff)
        if found is not None:
            pipelines.append(found.pipeline)
    if not pipelines or (problem.zero == "pipelines" and len(pipelines) == 1):
        return None
    total = sum(p.sequences for p in pipelines)
    draft = Plan(cluster.name, total, tuple(pipelines), zero=problem.zero)
    try:
        return rebalanced(draft, problem.graph, cluster, problem.workload, problem.options)
    except PlanError:
        return None


def _best_pipeline(
    problem: Problem,
    chain: Groups,
    share: float,
    pipelines: int,
    known: dict[object, Found | None],
    cutoff: float,
) -> Found | None:
    """The fastest pipeline on a chain for about this share, over all sizes of micro-batches."""
    batch = problem.workload.global_batch
    bounded = []
    for microbatch in (1 << i for i in range(batch.bit_length())):
        sequences = max(1, round(share / microbatch)) * microbatch
        if sequences > batch:
            continue
        shape = Shape(chain, sequences, microbatch, pipelines)
        if problem.runs(shape):
            # Per sequence, as shares are rounded differently.
            bound = lower_bound(problem, shape, cutoff * sequences / share)
            bounded.append((bound / sequences, shape))
    best: Found | None = None
    least = math.inf
    for bound, shape in sorted(bounded, key=lambda entry: entry[0]):
        if bound >= min(least, cutoff / share):
            break
        key = _alike(problem, chain), shape.sequences, shape.microbatch, min(pipelines, 2)
        if key not in known:
            # Cutoffs only fall: what does not come below this one never need be looked at.
            known[key] = best_pipeline(problem, shape, cutoff * shape.sequences / share)
        found = known[key]
        if found is not None and found.step_s / shape.sequences < least:
            best, least = found, found.step_s / shape.sequences
    if best is None:
        return None
    # It may have been found for a chain like this one.
    stages = tuple(
        replace(stage, devices=devices)
        for stage, devices in zip(best.pipeline.stages, chain, strict=True)
    )
    return replace(best, pipeline=replace(best.pipeline, stages=stages))


def _alike(problem: Problem, chain: Groups) -> tuple[tuple[int, int], ...]:
    """Equal for chains that cost the same: equal groups, and the same of them on one host."""
    hosts: dict[int, int] = {}
    return tuple(
        (problem.alike(devices), hosts.setdefault(problem.cluster.host_of(devices[0]), len(hosts)))
        for devices in chain
    )
