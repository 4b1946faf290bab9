"""Pipelines whose stages are equal, so that one program can run all of them in lockstep.

Every stage has the same run of layers on the same mesh; layers before the first run and after
the last, embedding and head, are shared out over all stages. (GSPMD's pipelines are of this
kind: Xu et al., arXiv 2105.04663.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardpar.errors import PlanError
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.select import strategies, summarise

STAGE, PIPELINE = "stage", "pipeline"
"""Names of the axes over stages and over equal pipelines."""


@dataclass(frozen=True)
class EqualStages:
    """A pipeline's layers, divided.

    Attributes:
      lead: layers before the first run, such as the embedding.
      runs: the layers of each stage; those at the same place are alike.
      tail: layers after the last run, such as the head.
    """

    lead: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]
    tail: tuple[str, ...]


def equal_stages(pipeline: Pipeline, graph: LayerGraph) -> EqualStages:
    """Divides the layers of a single_jit pipeline into what all stages have and the ends.

    Args:
      pipeline: its stages hold all layers of the model, in order.
      graph: the model.

    Raises:
      PlanError: the stages are not equal: names what differs.
    """
    first = pipeline.stages[0]
    if len(pipeline.stages) == 1:
        raise PlanError(
            "schedule single_jit is for two or more equal stages and there is one, which is one "
            "program anyway; write schedule: 1f1b"
        )
    for number, stage in enumerate(pipeline.stages[1:], 1):
        if stage.mesh != first.mesh:
            raise _unequal(
                f"stage 0 has {_mesh(first)} and stage {number} has {_mesh(stage)}",
                "give all stages one mesh",
            )
    taken = [name for name in first.mesh.names if name in (STAGE, PIPELINE)]
    if taken:
        raise PlanError(
            f"schedule single_jit needs the axis name {taken[0]!r} for itself; call the mesh's "
            "axis something else"
        )
    kinds = [_kinds(stage, graph) for stage in pipeline.stages]
    length = _length(kinds)
    names = [tuple(name for name, _, _ in of_stage) for of_stage in kinds]
    runs = (
        names[0][len(names[0]) - length :],
        *names[1:-1],
        names[-1][:length],
    )
    ends = EqualStages(names[0][: len(names[0]) - length], runs, names[-1][length:])
    _require_alike(ends, {name: rest for of_stage in kinds for name, *rest in of_stage})
    return ends


Kind = tuple[str, str, LayerStrategy]
"""A layer's name, its class and its strategy."""


def _kinds(stage: Stage, graph: LayerGraph) -> list[Kind]:
    chosen = strategies(stage, graph)
    return [
        (layer.name, layer.class_name, replace(chosen[layer.name], layers=""))
        for layer in graph.layers
        if layer.name in chosen
    ]


def _length(kinds: list[list[Kind]]) -> int:
    """Layers of a stage's run: as many as a stage in the middle has, or as both ends can share."""
    if len(kinds) > 2:
        return len(kinds[1])
    first, last = ([kind[1] for kind in of_stage] for of_stage in kinds)
    fits = [n for n in range(1, min(map(len, kinds)) + 1) if first[-n:] == last[:n]]
    return max(fits, default=1)


def _require_alike(ends: EqualStages, kinds: dict[str, list]) -> None:  # type: ignore[type-arg]
    wanted = ends.runs[0]
    for number, run in enumerate(ends.runs[1:], 1):
        if len(run) != len(wanted):
            raise _unequal(
                f"stage 0 has {summarise(wanted)} and stage {number} has {summarise(run)}",
                "give each stage as many layers",
            )
        for one, other in zip(wanted, run, strict=True):
            if kinds[one][0] != kinds[other][0]:
                raise _unequal(
                    f"{one} of stage 0 is of class {kinds[one][0]} and {other}, in its place in "
                    f"stage {number}, is of class {kinds[other][0]}",
                    "cut the model so that all stages have the same layers",
                )
            if kinds[one][1] != kinds[other][1]:
                raise _unequal(
                    f"{one} of stage 0 and {other} of stage {number} have different strategies",
                    "give layers at the same place of every stage one strategy",
                )
    repeated = {kinds[name][0] for name in wanted}
    for stage, end in ((0, ends.lead), (len(ends.runs) - 1, ends.tail)):
        more = [name for name in end if kinds[name][0] in repeated]
        if more:
            raise _unequal(
                f"stage {stage} has {summarise(more)} besides the {len(wanted)} layers that each "
                "stage has",
                "give each stage as many layers",
            )
    if not ends.lead or not ends.tail:
        which, what = ("first", "embedding") if not ends.lead else ("last", "head")
        raise PlanError(
            f"schedule single_jit needs a layer of another class in the {which} stage, such as "
            f"an {what}, and there is none; write schedule: 1f1b"
        )


def _unequal(what: str, remedy: str) -> PlanError:
    return PlanError(
        f"schedule single_jit needs equal stages, but {what}; {remedy}, or write schedule: 1f1b"
    )


def _mesh(stage: Stage) -> str:
    axes = ", ".join(f"{name}: {size}" for name, size in stage.mesh.axes)
    return f"{len(stage.devices)} devices as {{{axes}}}"


def require_equal_pipelines(plan: Plan) -> None:
    """That the pipelines of a plan, if any is single_jit, differ in their devices alone.

    Raises:
      PlanError: naming what differs.
    """
    if all(pipeline.schedule != "single_jit" for pipeline in plan.pipelines):
        return
    first = _without_devices(plan.pipelines[0])
    for number, pipeline in enumerate(plan.pipelines[1:], 1):
        other = _without_devices(pipeline)
        for what in ("schedule", "sequences", "microbatch", "stages"):
            one, two = getattr(first, what), getattr(other, what)
            if one != two:
                shown = "stages" if what == "stages" else f"{what} {one} and {two}"
                raise PlanError(
                    f"schedule single_jit needs equal pipelines, but pipelines 0 and {number} "
                    f"have different {shown}; make them equal, or write schedule: 1f1b"
                )


def _without_devices(pipeline: Pipeline) -> Pipeline:
    stages = tuple(
        replace(stage, devices=tuple(range(len(stage.devices))), peak_bytes=None)
        for stage in pipeline.stages
    )
    return replace(pipeline, stages=stages)


def folded(plan: Plan) -> Pipeline:
    """A plan of equal pipelines as one pipeline with one more axis that splits the data.

    Args:
      plan: its pipelines differ in their devices alone.

    >>> stages = [Stage((d,), Mesh(), (LayerStrategy("all"),)) for d in range(4)]
    >>> pair = [Pipeline(4, 1, tuple(stages[i : i + 2]), "single_jit") for i in (0, 2)]
    >>> one = folded(Plan("here", 8, tuple(pair)))
    >>> one.sequences, one.microbatch, [s.devices for s in one.stages], one.stages[0].mesh.axes
    (8, 2, [(0, 2), (1, 3)], (('pipeline', 2),))
    """
    count, first = len(plan.pipelines), plan.pipelines[0]
    if count == 1:
        return first
    stages = tuple(
        replace(
            first.stages[s],
            devices=tuple(d for p in plan.pipelines for d in p.stages[s].devices),
            mesh=Mesh(((PIPELINE, count), *first.stages[s].mesh.axes)),
        )
        for s in range(len(first.stages))
    )
    return replace(
        first,
        sequences=first.sequences * count,
        microbatch=first.microbatch * count,
        stages=stages,
    )
