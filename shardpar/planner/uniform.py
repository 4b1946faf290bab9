"""The best plan with one strategy for all layers: what per-layer choice is measured against."""

from __future__ import annotations

from dataclasses import replace

from shardpar.planner.pipeline import Found, Problem, Shape, shapes
from shardpar.planner.space import Space
from shardpar.spec.graph import OUTSIDE
from shardpar.spec.plan import LayerStrategy, Pipeline, Stage
from shardpar.spec.select import every_layer


def best_uniform(problem: Problem) -> Found | None:
    """The fastest one-stage plan with one strategy for all layers; None if none fits."""
    best: Found | None = None
    for shape in shapes(problem.cluster, problem.workload, problem.options):
        if len(shape.groups) > 1:
            continue
        priced = problem.priced(shape.groups[0], shape)
        if priced is not None:
            # A choice that is not worth a look for one layer may be the one that all can take.
            space = priced.of_step(shape.num_microbatches, shape.pipelines, every=True)
            found = _of_shape(problem, shape, space)
            if found is not None and (best is None or found.step_s < best.step_s):
                best = found
    return best


def _of_shape(problem: Problem, shape: Shape, space: Space) -> Found | None:
    limit = problem.limit(shape.groups[0])
    best: tuple[float, float, LayerStrategy] | None = None
    for strategy in space.strategies[0]:
        priced = priced_alike(space, strategy)
        if priced is not None and priced[1] <= limit and (best is None or priced[0] < best[0]):
            best = (*priced, strategy)
    if best is None:
        return None
    seconds, peak, strategy = best
    entry = replace(strategy, layers=every_layer(problem.graph))
    stage = Stage(shape.groups[0], space.setting.mesh, (entry,), peak)
    step_s = seconds * shape.num_microbatches
    return Found(Pipeline(shape.sequences, shape.microbatch, (stage,)), step_s, step_s)


def priced_alike(space: Space, strategy: LayerStrategy) -> tuple[float, float] | None:
    """(seconds of a micro-batch, bytes) of one strategy for all; None if it is not legal."""
    seconds = state = scratch = 0.0
    for part, run, known in zip(space.parts, space.runs, space.strategies, strict=True):
        # What lies outside all layers is never recomputed, whatever the plan says.
        own = replace(strategy, recompute="none") if part.cls.name == OUTSIDE else strategy
        if own not in known:
            return None
        choice = run.choices[known.index(own)]
        seconds += run.count * choice.seconds
        state += run.count * (choice.state_bytes + choice.saved_bytes)
        scratch = max(scratch, choice.scratch_bytes)
    return seconds, state + scratch
