"""How many elements must cross in a change of layout, whatever the method."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

from shardpar.spec.chain import Shape, Step, check_pair, labels_of
from shardpar.spec.exchange import Cell, cells, grid
from shardpar.spec.layout import Layout


def lower_bound_elements(src: Layout, dst: Layout, shape: Shape) -> int:
    """Elements that must cross whatever the method.

    A device that lacks a value must receive it. A sum of k addends that lie apart takes k - 1
    messages until some device has it, and one more to each further device that wants it.
    Where the destination is itself a sum, its addends may be anything that adds up, and
    nothing is claimed: the bound is 0.
    """
    check_pair(src, dst, shape)
    if dst.terms > 1:
        return 0
    have = [h for group in Step(src, src).have(shape) for h in group]
    want = [p for pieces in dst.pieces(shape) for p in pieces]
    cuts = grid([*(h.spans for h in have), *(p.spans for p in want)])
    owners: dict[Cell, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for holding in have:
        for cell in cells(holding.spans, cuts):
            owners[cell][holding.label].add(holding.device)
    receivers: dict[Cell, set[int]] = defaultdict(set)
    for piece in want:
        for cell in cells(piece.spans, cuts):
            receivers[cell].add(piece.device)
    families = _families(src)
    return sum(
        math.prod(stop - start for start, stop in cell)
        * min(
            _messages([owners[cell][label] for label in family], wanted)
            for family in families
            if all(owners[cell][label] for label in family)
        )
        for cell, wanted in receivers.items()
    )


def _families(layout: Layout) -> list[tuple[int, ...]]:
    """The sets of addends whose sum is the array."""
    labels = [tuple(sorted(set(of_group))) for of_group in labels_of(layout)]
    if layout.across == "partial":
        return [tuple(sorted(set(itertools.chain(*labels))))]
    return sorted(set(labels))


def _messages(owners: list[set[int]], wanted: set[int]) -> int:
    if len(owners) == 1:
        return len(wanted - owners[0])
    holders = set().union(*owners)
    return len(owners) + len(wanted) - (2 if holders & wanted else 1)
