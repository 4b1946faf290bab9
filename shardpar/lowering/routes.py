"""Which arrays each stage of a plan sends to which other stage, and their gradients back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from shardpar.lowering.stage_programs import StagePrograms
from shardpar.lowering.wires import Wire

At = tuple[int, int]
"""A pipeline's number and a stage's in it."""


@dataclass(frozen=True)
class Route:
    """From one stage to another: which arrays to take, and which of the other's they are."""

    to: int
    takes: tuple[int, ...]
    puts: tuple[int, ...]
    wire: Wire


Routes = dict[At, list[Route]]


def routes_of(stages: Mapping[At, StagePrograms], devices: Sequence[jax.Device]) -> Routes:
    """From each stage to those that read what it makes."""
    out: Routes = {at: [] for at in stages}
    for (number, s), stage in stages.items():
        for sender in sorted({t for t, _ in stage.segment.received}):
            sending = stages[number, sender]
            puts = [i for i, (t, _) in enumerate(stage.segment.received) if t == sender]
            takes = [sending.segment.sent.index(stage.segment.received[i][1]) for i in puts]
            wire = Wire(
                [sending.sent[j] for j in takes], [stage.received[i] for i in puts], devices
            )
            out[number, sender].append(Route(s, tuple(takes), tuple(puts), wire))
    return out


def backwards(
    routes: Routes, stages: Mapping[At, StagePrograms], devices: Sequence[jax.Device]
) -> Routes:
    """From each stage to those whose arrays it read: the gradients of what has some."""
    out: Routes = {at: [] for at in stages}
    for (number, sender), of_sender in routes.items():
        for route in of_sender:
            reader, maker = stages[number, route.to], stages[number, sender]
            flows = reader.gives_back()
            pairs = [(i, j) for i, j in zip(route.puts, route.takes, strict=True) if i in flows]
            if not pairs:
                continue
            wire = Wire(
                [reader.received[i] for i, _ in pairs], [maker.sent[j] for _, j in pairs], devices
            )
            takes = tuple(flows.index(i) for i, _ in pairs)
            out[number, route.to].append(Route(sender, takes, tuple(j for _, j in pairs), wire))
    return out
