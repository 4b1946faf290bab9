"""Who keeps which part of the optimizer state of what several groups of devices hold.

Groups that hold copies of one parameter can have its optimizer state once between them: the
gradient goes from addends to slices, each group updates its own slice, and the parameter goes
from slices back to copies (ZeRO, arXiv 1910.02054; between unequal groups: HSPMD, 2504.20490).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from shardpar.spec.exchange import grid
from shardpar.spec.graph import LayerGraph, Parameter
from shardpar.spec.layout import Block, Group, Layout, SplitAcross
from shardpar.spec.parameters import optimizer_layout, parameter_layout
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan
from shardpar.spec.select import strategies


def sliced(groups: Sequence[Group], shape: tuple[int, ...]) -> Layout:
    """The layout in which groups have an array once between them, where each had it whole.

    One dim is cut wherever some group cuts it, and every interval is given out in parts as
    equal as they can be, one for each group. So what a device keeps is part of what it had, in
    several blocks perhaps. The dim is the one whose largest share is smallest; of equals, the
    one in fewest blocks, and the first of those. Copies inside a group stay copies.

    Args:
      groups: disjoint; how each lays the whole array out.
      shape: of the array.

    Returns:
      Split across the groups; a copy in each where no dim can be cut, or with one group.

    >>> from shardpar.spec.layout import Split
    >>> half, whole = Group((0, 1), (Split(0, 2),)), Group((2,))
    >>> str(sliced([half, whole], (8, 3)))
    '[0,1]{split0:2} + [2]{} across split0(0:2,1:2,0:2,1:2)'
    >>> str(sliced([Group((0,)), Group((1,))], (5,)))
    '[0]{} + [1]{} across split0(3,2)'
    >>> str(sliced([half, whole], (2,)))
    '[0,1]{split0:2} + [2]{} across dup'
    """
    copies = Layout(tuple(groups))
    if len(copies.groups) == 1:
        return copies
    found = [a for dim in range(len(shape)) if (a := _across(copies, dim, shape)) is not None]
    if not found:
        return copies
    best: SplitAcross = min(found, key=lambda a: (_largest(a), len(a.blocks)))
    return Layout(copies.groups, best)


def _across(copies: Layout, dim: int, shape: tuple[int, ...]) -> SplitAcross | None:
    """A dim in parts for the groups; None if a group would have none, or unequal parts inside."""
    edges = grid([p.spans for pieces in copies.pieces(shape) for p in pieces])[dim]
    count = len(copies.groups)
    blocks: list[Block] = []
    taken: list[dict[int, int]] = [{} for _ in copies.groups]
    for start, stop in itertools.pairwise(edges):
        least, more = divmod(stop - start, count)
        if not least:
            return None
        for number, group in enumerate(copies.groups):
            extent = least + (number < more)
            blocks.append(Block(number, extent))
            part = start * group.parts_of(dim) // shape[dim]
            taken[number][part] = taken[number].get(part, 0) + extent
    if any(len(set(of_group.values())) > 1 for of_group in taken):
        return None
    return SplitAcross(dim, tuple(blocks))


def _largest(across: SplitAcross) -> float:
    groups = {block.group for block in across.blocks}
    return max(sum(b - a for a, b in across.spans_of(g)) for g in groups) / across.extent


@dataclass(frozen=True)
class Holding:
    """Where a parameter and its optimizer state lie under a plan.

    Attributes:
      parameter: what it is.
      at_rest: its layout.
      in_optimizer: of optimizer state shaped like it.
    """

    parameter: Parameter
    at_rest: Layout
    in_optimizer: Layout


def holdings(plan: Plan, graph: LayerGraph) -> dict[str, Holding]:
    """Where each parameter lies under a plan, by its full name.

    A group of devices holds the parameters of its own layers and of other layers that its
    layers read.

    Args:
      plan: as checked by `spec.check`.
      graph: the model.
    """
    readers: dict[str, list[str]] = {}
    for layer in graph.layers:
        for _, name in layer.tied:
            readers.setdefault(name, []).append(layer.name)
    groups: dict[str, list[tuple[Group, Group]]] = {}
    parameters: dict[str, Parameter] = {}
    for pipeline in plan.pipelines:
        for number in range(pipeline.num_groups):
            chosen = _strategies(pipeline, number, graph)
            stage = pipeline.stages[number]
            for name, layer, parameter in graph.parameters:
                here = next((n for n in (layer.name, *readers.get(name, ())) if n in chosen), None)
                if here is None:
                    continue
                parameters[name] = parameter
                groups.setdefault(name, []).append(
                    tuple(  # type: ignore[arg-type]
                        Group.of(
                            stage.devices,
                            layout_of(parameter, chosen[here], stage.mesh, plan.tensor_dims),
                        )
                        for layout_of in (parameter_layout, optimizer_layout)
                    )
                )
    out = {}
    for name, held in groups.items():
        at_rest, updated = zip(*held, strict=True)
        shape = parameters[name].shape
        shares = plan.zero == "pipelines"
        in_optimizer = sliced(updated, shape) if shares else Layout(updated)
        out[name] = Holding(parameters[name], Layout(at_rest), in_optimizer)
    return out


def _strategies(pipeline: Pipeline, number: int, graph: LayerGraph) -> dict[str, LayerStrategy]:
    """The strategies of all layers that one group of a pipeline's devices holds."""
    return {
        layer: strategy
        for stage in pipeline.stages[number :: pipeline.num_groups]
        for layer, strategy in strategies(stage, graph).items()
    }
