"""What a layer may do on a mesh: every strategy that the user's pins allow."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from shardpar.errors import PlanError
from shardpar.planner.options import SearchOptions
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Axes, Mesh
from shardpar.spec.plan import Attention, LayerStrategy, Recompute
from shardpar.spec.select import select

_DEGREES = ("data", "fsdp", "tensor", "zero1", "context")
_PINNED = (*_DEGREES, "recompute", "sequence_parallel", "attention")


@dataclass(frozen=True)
class Pins:
    """What must hold for a layer; None leaves a choice open. Fields as in SearchOptions."""

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    zero1: int | None = None
    sequence_parallel: bool | None = None
    recompute: Recompute | None = None
    microbatch: int | None = None
    context: int | None = None
    attention: Attention | None = None


def layer_strategies(
    mesh: Mesh,
    pins: Pins = Pins(),
    most_tensor: int | None = None,
    microbatch: int | None = None,
) -> Iterator[LayerStrategy]:
    """Every strategy of a layer that the pins allow, its `layers` left empty.

    Tensor parallelism takes the innermost axes, where links are fastest; fsdp the
    next; then the optimizer state's split; plain data parallelism the outermost.
    Tensor degrees above `most_tensor` are left out unless pinned.

    Sequences are split only where a micro-batch of `microbatch` sequences has too few
    for the data axes, and over no more axes than that takes, the innermost: to split the
    batch costs the same and sends less.

    >>> [describe(s, Mesh.factored(2)) for s in layer_strategies(Mesh.factored(2), Pins(tensor=1))]
    ... # doctest: +ELLIPSIS
    ['dp2', 'dp2, recompute selective', 'dp2, recompute full', 'zero1-2', ...]
    """
    names = mesh.names
    count = len(names)
    for tensor_from in range(count, -1, -1):
        tensor = names[tensor_from:]
        degree = mesh.size_of(tensor)
        if pins.tensor not in (None, degree):
            continue
        if pins.tensor is None and most_tensor is not None and degree > most_tensor:
            break
        ways = _ways_over_context(mesh, names[:tensor_from], pins, microbatch)
        for fsdp_from in range(tensor_from, -1, -1):
            fsdp, outer = names[fsdp_from:tensor_from], names[:fsdp_from]
            if pins.fsdp not in (None, mesh.size_of(fsdp)):
                continue
            if pins.data not in (None, mesh.size_of(outer)):
                continue
            for zero_from in range(fsdp_from, -1, -1):
                zero1 = names[zero_from:fsdp_from]
                if pins.zero1 not in (None, mesh.size_of(zero1)):
                    continue
                for parallel in (True, False) if tensor else (False,):
                    if tensor and pins.sequence_parallel not in (None, parallel):
                        continue
                    for recompute in get_args(Recompute):
                        if pins.recompute not in (None, recompute):
                            continue
                        for context, attention in ways:
                            yield LayerStrategy(
                                "", tensor, fsdp, zero1, parallel, recompute, context, attention
                            )


def _ways_over_context(
    mesh: Mesh, data: Axes, pins: Pins, microbatch: int | None
) -> list[tuple[Axes, Attention]]:
    """The axes that split sequences, and how queries meet all keys; one entry if none need to."""
    for start in range(len(data), -1, -1):
        context = data[start:]
        if pins.context is not None:
            if mesh.size_of(context) != pins.context:
                continue
        elif microbatch is not None and microbatch % mesh.size_of(data[:start]):
            continue
        if not context:
            return [((), "gather")]
        return [(context, way) for way in get_args(Attention) if pins.attention in (None, way)]
    return []


def pins_of(graph: LayerGraph, options: SearchOptions) -> dict[str, Pins]:
    """The pins of each layer: those for all, and `options.fix` on top.

    Raises:
      PlanError: `fix` cannot be read, names a layer or key that is not there, or a bad value.
    """
    common = Pins(
        options.data, options.fsdp, options.tensor, options.zero1, options.sequence_parallel,
        options.recompute, options.microbatch, options.context, options.attention,
    )  # fmt: skip
    pins = {layer.name: common for layer in graph.layers}
    for entry in (options.fix or "").split(";"):
        if not entry.strip():
            continue
        selector, *settings = entry.split()
        if not settings:
            raise PlanError(
                f'plan.fix: "{entry.strip()}" fixes nothing; write layers, then what holds for '
                'them: "blocks[0:4] tensor=2 recompute=full"'
            )
        fixed = dict(_setting(text, entry.strip()) for text in settings)
        try:
            layers = select(selector, graph)
        except PlanError as error:
            raise PlanError(f"plan.fix: {error}") from None
        for layer in layers:
            pins[layer.name] = replace(pins[layer.name], **fixed)  # type: ignore[arg-type]
    return pins


def _setting(text: str, entry: str) -> tuple[str, int | bool | str]:
    key, equals, value = text.partition("=")
    if not equals or key not in _PINNED:
        near = difflib.get_close_matches(key, _PINNED, 1)
        raise PlanError(
            f'plan.fix: "{entry}": {text} is not one of {", ".join(_PINNED)} with a value'
            + (f'; did you mean "{near[0]}"?' if near else "")
        )
    if key in _DEGREES and re.fullmatch(r"[1-9]\d{0,5}", value):
        return key, int(value)
    if key == "recompute" and value in get_args(Recompute):
        return key, value
    if key == "attention" and value in get_args(Attention):
        return key, value
    if key == "sequence_parallel" and value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    wanted = {
        "recompute": " or ".join(get_args(Recompute)),
        "attention": " or ".join(get_args(Attention)),
        "sequence_parallel": "true or false",
    }.get(key, "a degree, 1 or more")
    raise PlanError(f'plan.fix: "{entry}": {key} is "{value}"; write {wanted}')


def describe(strategy: LayerStrategy, mesh: Mesh) -> str:
    """As people write it: "dp2 zero1-2 fsdp2 tp2 sp, recompute full"."""
    plain = mesh.without((*strategy.tensor, *strategy.fsdp, *strategy.zero1, *strategy.context))
    degrees = [
        f"{name}{mesh.size_of(axes)}"
        for name, axes in (
            ("dp", plain), ("zero1-", strategy.zero1), ("fsdp", strategy.fsdp),
            ("tp", strategy.tensor),
        )
        if axes
    ] or ([] if strategy.context else ["one device"])  # fmt: skip
    if strategy.context:
        way = " by heads" if strategy.attention == "heads" else ""
        degrees.append(f"cp{mesh.size_of(strategy.context)}{way}")
    text = " ".join(degrees) + (" sp" if strategy.sequence_parallel else "")
    return text + (f", recompute {strategy.recompute}" if strategy.recompute != "none" else "")
