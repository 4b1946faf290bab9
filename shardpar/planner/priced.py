"""A space priced once for every step, and what of it is worth a look.

What is done once a step is spread over its micro-batches, so a choice's seconds are a line in
their inverse; the gradients' sum with other pipelines comes on top. A choice that another one
with the same layout at the border beats in everything, whatever the step, is never needed:
most are dropped before any search begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardpar.planner.cost import LayerCost
from shardpar.planner.layers import Choice
from shardpar.planner.space import Space
from shardpar.spec.plan import LayerStrategy


@dataclass(frozen=True, eq=False)
class Priced:
    """Every legal choice of a space, and its price in any step.

    Attributes:
      space: with all choices, as priced for one step.
      microbatch_s, update_s, cross_s: per part, of each choice: of one micro-batch; once a step;
        and once more where several pipelines sum their gradients.
      useful: per part, the choices that no other one beats in everything.
    """

    space: Space
    microbatch_s: tuple[np.ndarray, ...]
    update_s: tuple[np.ndarray, ...]
    cross_s: tuple[np.ndarray, ...]
    useful: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, space: Space, costs: Mapping[tuple[str, LayerStrategy], LayerCost | None]
    ) -> Priced:
        """From a space for several pipelines and the costs that it was made of."""
        overlap = space.setting.speed.overlap
        each_s, update_s, cross_s = [], [], []
        for part, strategies in zip(space.parts, space.strategies, strict=True):
            known = [c for s in strategies if (c := costs[part.cls.name, s]) is not None]
            each_s.append(np.array([cost.microbatch_s(overlap) for cost in known]))
            update_s.append(np.array([cost.update_s for cost in known]))
            cross_s.append(np.array([cost.cross_s for cost in known]))
        useful = [
            _useful(run.choices, *seconds)
            for run, *seconds in zip(space.runs, each_s, update_s, cross_s, strict=True)
        ]
        return cls(space, tuple(each_s), tuple(update_s), tuple(cross_s), tuple(useful))

    def least_s(self, microbatches: int, pipelines: int) -> np.ndarray:
        """[parts] seconds of a micro-batch through each part, memory and layouts left out."""
        return np.array(
            [
                run.count * float(seconds.min())
                for run, seconds in zip(
                    self.space.runs, self._seconds(microbatches, pipelines), strict=True
                )
            ]
        )

    def of_step(self, microbatches: int, pipelines: int, every: bool = False) -> Space:
        """The space in a step of so many micro-batches: its useful choices, or every one."""
        kept = [
            range(len(run.choices)) if every else useful
            for run, useful in zip(self.space.runs, self.useful, strict=True)
        ]
        setting = replace(self.space.setting, num_microbatches=microbatches, pipelines=pipelines)
        return replace(
            self.space,
            setting=setting,
            strategies=tuple(
                tuple(strategies[i] for i in indices)
                for strategies, indices in zip(self.space.strategies, kept, strict=True)
            ),
            runs=tuple(
                replace(
                    run,
                    choices=tuple(
                        replace(run.choices[i], seconds=float(seconds[i])) for i in indices
                    ),
                )
                for run, indices, seconds in zip(
                    self.space.runs, kept, self._seconds(microbatches, pipelines), strict=True
                )
            ),
        )

    def _seconds(self, microbatches: int, pipelines: int) -> list[np.ndarray]:
        """Per part, seconds of each choice; in the order of LayerCost.seconds, bit for bit."""
        return [
            each + ((update + cross) if pipelines > 1 else update) / microbatches
            for each, update, cross in zip(
                self.microbatch_s, self.update_s, self.cross_s, strict=True
            )
        ]


def _useful(choices: tuple[Choice, ...], *seconds: np.ndarray) -> tuple[int, ...]:
    """The choices that no other one of their border beats in everything; the first of equals."""
    figures = np.array(
        [
            *seconds,
            *(
                [getattr(c, name) for c in choices]
                for name in ("state_bytes", "saved_bytes", "scratch_bytes")
            ),
        ]
    )
    borders = np.array([c.border for c in choices])
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
    return tuple(sorted(kept))
