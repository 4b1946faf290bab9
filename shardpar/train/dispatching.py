"""Steps over documents of mixed lengths, shared out to a plan's pipelines so that all end together.

Who gets what is decided for each step by `planner.dispatch`, while the steps before it run
(Hydraulis, arXiv 2412.07894); every pipeline packs its documents into rows of its own length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardpar.errors import PlanError
from shardpar.lowering.lower import AnyProgram
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.state import TrainState
from shardpar.planner.dispatch import Dispatch, PipelineSpeed, dispatch
from shardpar.spec.plan import Pipeline
from shardpar.train.ahead import ahead
from shardpar.train.data import Batch
from shardpar.train.packing import empty_rows, fill
from shardpar.train.stepping import Feed, Metrics


def shares_of(
    sequences: Sequence[np.ndarray],
    found: Dispatch,
    pipelines: Sequence[Pipeline],
    speeds: Sequence[PipelineSpeed],
) -> list[dict[str, np.ndarray]]:
    """The packed rows of each pipeline, filled up to whole micro-batches with rows of weight 0.

    Args:
      sequences: the ids of each.
      found: who gets which, and how each packs them.
      pipelines: of the plan.
      speeds: of each, with the tokens of its rows.
    """
    shares = []
    for rows, pipeline, speed in zip(found.microbatches, pipelines, speeds, strict=True):
        turn = pipeline.microbatch
        if pipeline.schedule == "interleaved":
            turn *= pipeline.num_groups
        filled = fill(list(sequences), rows, speed.token_cap)
        more = empty_rows(-len(rows) % turn, speed.token_cap)
        shares.append({name: np.concatenate([filled[name], more[name]]) for name in filled})
    return shares


class Dispatched:
    """Steps in which each pipeline gets the documents that it can take in the step's time."""

    def __init__(
        self,
        program: AnyProgram,
        speeds: Sequence[PipelineSpeed],
        gap: float = 0.01,
        lost: Collection[int] = (),
    ) -> None:
        """Nothing is dispatched yet.

        Args:
          program: of a plan of several stages or pipelines.
          speeds: of its pipelines.
          gap: how far from the best an assignment may be, as in `planner.dispatch`.
          lost: devices that compute no more; no plan in force uses them.

        Raises:
          PlanError: the plan is one program that takes batches of one size.
        """
        if not isinstance(program, PipelinedProgram):
            raise PlanError(
                "data.dispatch shares the documents of a step out to pipelines, and the plan is "
                "one stage that takes them all; plan several pipelines or stages, or write "
                "data.packing=true instead"
            )
        self.program, self.speeds, self.gap = program, tuple(speeds), gap

    def feed(self, batches: Feed) -> Feed:
        """The batches with their assignments, which are computed ahead."""
        return _Assigned(batches, self)

    def assigned(self, batch: Batch) -> dict[str, Any]:
        """A batch with `dispatch`, who gets what, and `shares`, the rows of each pipeline."""
        sequences = list(batch["sequences"])
        found = dispatch([len(ids) - 1 for ids in sequences], self.speeds, self.gap)
        shares = shares_of(sequences, found, self.program.plan.pipelines, self.speeds)
        return {**batch, "dispatch": found, "shares": shares}

    def step(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        """As `Program.step`, of a batch from `feed`."""
        return self.program.step_shares(state, batch["shares"])

    def compile(self) -> None:
        """As `Program.compile`: a program takes micro-batches, however many there are."""
        self.program.compile()

    def tokens(self, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """Tokens that are predicted: in all and by each pipeline; what dispatching left undone."""
        lengths = np.array([len(ids) - 1 for ids in batch["sequences"]])
        found: Dispatch = batch["dispatch"]
        out: dict[str, float] = {"tokens": int(lengths.sum()), "dispatch_gap": round(found.gap, 6)}
        for number, (mine, share) in enumerate(zip(found.sequences, batch["shares"], strict=True)):
            pipeline = self.program.plan.pipelines[number]
            rows = len(share["inputs"])
            out[f"pipeline_{number}_tokens"] = int(lengths[list(mine)].sum())
            out[f"pipeline_{number}_microbatches"] = rows // pipeline.microbatch
        return out

    def waiting_for(self) -> str:
        """As `Program.waiting_for`."""
        return self.program.waiting_for()


class _Assigned:
    """Batches whose assignments a thread computes ahead; stands where `next` has got to."""

    def __init__(self, batches: Feed, stepping: Dispatched) -> None:
        self._batches, self._stepping = batches, stepping
        self._start()

    def _start(self) -> None:
        self._position = self._batches.position
        self._results = ahead(self._one, self._items())

    def _items(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        for batch in self._batches:
            yield batch, self._batches.position

    def _one(self, item: tuple[Batch, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        batch, position = item
        return self._stepping.assigned(batch), position

    def __iter__(self) -> _Assigned:
        return self

    def __next__(self) -> dict[str, Any]:
        batch, self._position = next(self._results)
        return batch

    @property
    def position(self) -> dict[str, Any]:
        return self._position

    def restore(self, position: Mapping[str, Any]) -> None:
        self.close()
        self._batches.restore(position)
        self._start()

    def close(self) -> None:
        self._results.close()  # type: ignore[attr-defined]
