"""Which layers a text like "embed..blocks[14]" means.

selector  = part [".." part]        from the first to the last, both included
part      = name | name[i] | name[i:j]     j is not included, as in Python
"""

from __future__ import annotations

import difflib
import re

from shardpar.errors import PlanError
from shardpar.spec.graph import Layer, LayerGraph
from shardpar.spec.plan import LayerStrategy, Stage

_PART = re.compile(r"(?P<name>.+?)(\[(?P<start>\d{1,9})?(?P<colon>:)?(?P<stop>\d{1,9})?\])?")


def layer_name(path: str) -> str:
    """The name of a layer in plans, from the path of its parameters.

    >>> layer_name("blocks.3"), layer_name("encoder.blocks.0.attention"), layer_name("embed")
    ('blocks[3]', 'encoder.blocks[0].attention', 'embed')
    """
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path)


def every_layer(graph: LayerGraph) -> str:
    """The selector of all layers of a model."""
    first, last = graph.layers[0].name, graph.layers[-1].name
    return first if first == last else f"{first}..{last}"


def selector(names: list[str] | tuple[str, ...]) -> str:
    """The selector of some consecutive layers.

    >>> selector(["embed", "blocks[0]", "blocks[1]"]), selector(["blocks[0]", "blocks[1]"])
    ('embed..blocks[1]', 'blocks[0:2]')
    """
    short = summarise(names)
    return short if "," not in short else f"{names[0]}..{names[-1]}"


def select(selector: str, graph: LayerGraph) -> tuple[Layer, ...]:
    """The layers a selector names, in graph order.

    Raises:
      PlanError: if it names no layer, or its ends are the wrong way round.
    """
    first, dots, last = selector.partition("..")
    if not dots:
        return tuple(graph.layers[i] for i in _part(first.strip(), graph))
    start, stop = _part(first.strip(), graph)[0], _part(last.strip(), graph)[-1]
    if start > stop:
        raise PlanError(
            f'layers "{selector}": {graph.layers[start].name} comes after '
            f"{graph.layers[stop].name}; swap the ends"
        )
    return graph.layers[start : stop + 1]


def _part(part: str, graph: LayerGraph) -> list[int]:
    names = [layer.name for layer in graph.layers]
    if part in names:
        return [names.index(part)]
    match = _PART.fullmatch(part)
    stem = match["name"] if match else part
    members = {}
    for position, name in enumerate(names):
        found = re.fullmatch(re.escape(stem) + r"\[(\d+)\]", name)
        if found:
            members[int(found[1])] = position
    if match and members and (match["colon"] or "[" not in part):
        start = int(match["start"]) if match["start"] else min(members)
        stop = int(match["stop"]) if match["stop"] else max(members) + 1
        if start < stop and all(i in members for i in range(start, stop)):
            return [members[i] for i in range(start, stop)]
        raise PlanError(
            f'layers "{part}": the model has {stem}[{min(members)}:{max(members) + 1}]; '
            "write a range inside it"
        )
    near = difflib.get_close_matches(part, names, 1) or names[:1]
    raise PlanError(
        f'layers "{part}": the model has no such layer; its layers are {summarise(names)}'
        + (f'; did you mean "{near[0]}"?' if near else "")
    )


def summarise(names: list[str] | tuple[str, ...]) -> str:
    """Layer names as few selectors, in order.

    >>> summarise(["embed", "blocks[0]", "blocks[1]", "blocks[2]", "head"])
    'embed, blocks[0:3], head'
    """
    runs: list[tuple[str, int, int] | str] = []
    for name in names:
        match = re.fullmatch(r"(.+)\[(\d+)\]", name)
        if not match:
            runs.append(name)
            continue
        stem, index = match[1], int(match[2])
        last = runs[-1] if runs else None
        if isinstance(last, tuple) and last[0] == stem and last[2] == index:
            runs[-1] = (stem, last[1], index + 1)
        else:
            runs.append((stem, index, index + 1))
    return ", ".join(
        run
        if isinstance(run, str)
        else f"{run[0]}[{run[1]}]"
        if run[2] == run[1] + 1
        else f"{run[0]}[{run[1]}:{run[2]}]"
        for run in runs
    )


def strategies(stage: Stage, graph: LayerGraph) -> dict[str, LayerStrategy]:
    """The strategy of each of a stage's layers, by layer name.

    Raises:
      PlanError: if two entries claim one layer.
    """
    chosen: dict[str, LayerStrategy] = {}
    for strategy in stage.layers:
        for layer in select(strategy.layers, graph):
            if layer.name in chosen:
                raise PlanError(
                    f'layer {layer.name} is in both "{chosen[layer.name].layers}" and '
                    f'"{strategy.layers}"; each layer has one strategy'
                )
            chosen[layer.name] = strategy
    return chosen
