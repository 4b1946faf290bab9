"""A space priced once for every step, and what of it is worth a look.

What is done once a step is spread over its micro-batches, so a choice's seconds are a line in
their inverse; the gradients' sum with other pipelines comes on top. A choice that another one
with the same layout at the border beats in everything, whatever the step, is never needed:
most are dropped before any search begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardpar.planner.layers import Choice
from shardpar.planner.prices import LayerCost
from shardpar.planner.space import Space
from shardpar.spec.plan import LayerStrategy


@dataclass(frozen=True, eq=False)
class Priced:
    """Every legal choice of a space, and its price in any step.

    Attributes:
      space: with all strategies, and runs without choices.
      figures: per part, [6, choices]: seconds of a micro-batch, once a step, and once more where
        several pipelines sum their gradients; bytes of state, saved and scratch. Arrays, as
        there are hundreds of thousands of choices in a large problem.
      borders: per part, the layout of each choice.
      useful: per part, the choices that no other one beats in everything.
    """

    space: Space
    figures: tuple[np.ndarray, ...]
    borders: tuple[np.ndarray, ...]
    useful: tuple[np.ndarray, ...]

    @classmethod
    def of(
        cls, space: Space, costs: Mapping[tuple[str, LayerStrategy], LayerCost | None]
    ) -> Priced:
        """From a space for several pipelines and the costs that it was made of."""
        overlap = space.setting.speed.overlap
        figures = []
        for part, strategies in zip(space.parts, space.strategies, strict=True):
            known = [c for s in strategies if (c := costs[part.cls.name, s]) is not None]
            rows = [
                (
                    c.microbatch_s(overlap), c.update_s, c.cross_s,
                    c.state_bytes, c.saved_bytes, c.scratch_bytes,
                )
                for c in known
            ]  # fmt: skip
            figures.append(np.array(rows).T)
        borders = [np.array([c.border for c in run.choices]) for run in space.runs]
        runs = tuple(replace(run, choices=()) for run in space.runs)
        return cls(
            replace(space, runs=runs),
            tuple(figures),
            tuple(borders),
            tuple(_useful(*pair) for pair in zip(figures, borders, strict=True)),
        )

    def least_s(self, microbatches: int, pipelines: int) -> np.ndarray:
        """[parts] seconds of a micro-batch through each part, memory and layouts left out."""
        return np.array(
            [
                run.count * float(_seconds(figures, microbatches, pipelines).min())
                for run, figures in zip(self.space.runs, self.figures, strict=True)
            ]
        )

    def of_step(self, microbatches: int, pipelines: int, every: bool = False) -> Space:
        """The space in a step of so many micro-batches: its useful choices, or every one."""
        strategies, runs = [], []
        for part, run in enumerate(self.space.runs):
            kept = np.arange(len(self.borders[part])) if every else self.useful[part]
            figures = self.figures[part][:, kept]
            seconds = _seconds(figures, microbatches, pipelines)
            columns = (row.tolist() for row in (seconds, *figures[3:], self.borders[part][kept]))
            strategies.append(tuple(self.space.strategies[part][i] for i in kept.tolist()))
            runs.append(
                replace(run, choices=tuple(itertools.starmap(Choice, zip(*columns, strict=True))))
            )
        setting = replace(self.space.setting, num_microbatches=microbatches, pipelines=pipelines)
        return replace(self.space, setting=setting, strategies=tuple(strategies), runs=tuple(runs))


def _seconds(figures: np.ndarray, microbatches: int, pipelines: int) -> np.ndarray:
    """Seconds of each choice, in the order of LayerCost.seconds, so that bits agree."""
    each, update, cross = figures[:3]
    seconds: np.ndarray = each + (update + cross if pipelines > 1 else update) / microbatches
    return seconds


def _useful(figures: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """The choices that no other one of their border beats in everything; the first of equals."""
    kept: list[int] = []
    for border in np.unique(borders):
        members = np.flatnonzero(borders == border)
        # no_worse[a, b]: b is as good as a or better in every figure.
        no_worse = np.ones((len(members), len(members)), bool)
        for row in figures[:, members]:
            no_worse &= row[None, :] <= row[:, None]
        earlier = np.tri(len(members), k=-1, dtype=bool)
        beaten = (no_worse & (~no_worse.T | earlier)).any(axis=1)
        kept += members[~beaten].tolist()
    return np.array(sorted(kept))
