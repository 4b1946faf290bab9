"""How a step is made of a batch: of one length as it is, of mixed lengths by buckets.

The loop asks for batches, steps and what there is to say of them, and knows no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from shardpar.errors import RunError
from shardpar.lowering.lower import AnyProgram
from shardpar.lowering.state import TrainState
from shardpar.lowering.switch import Programs
from shardpar.train.buckets import Bucket, BucketedStep, buckets_of
from shardpar.train.data import Batch

Metrics = dict[str, jax.Array]


class Feed(Protocol):
    """Batches in order, and where the iterator stands."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    @property
    def position(self) -> dict[str, Any]:
        """Where it stands: after the batches that `next` has returned."""

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on after a position."""

    def close(self) -> None:
        """Ends its threads."""


class Stepping(Protocol):
    """Steps under one plan that owns the state."""

    def feed(self, batches: Feed) -> Feed:
        """The batches, with whatever a step needs of them computed ahead."""

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """As `Program.step`."""

    def compile(self) -> None:
        """Compiles all programs of a step."""

    def tokens(self, batch: Batch) -> Mapping[str, float]:
        """Tokens of a batch: `tokens` in all, and other figures of it for the metrics."""

    def waiting_for(self) -> str:
        """What of the step under way has not ended, in words."""


Start = Callable[[AnyProgram, Collection[int]], Stepping]
"""From the program of the plan in force, and devices that are lost, to steps under it."""


class OneLength:
    """Steps over batches whose rows all have the length that the program was made for."""

    def __init__(self, program: AnyProgram, lost: Collection[int] = ()) -> None:
        """Takes the program as it is."""
        self.program = program

    def feed(self, batches: Feed) -> Feed:
        """The batches as they are."""
        return batches

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """As `Program.step`."""
        return self.program.step(state, batch)

    def compile(self) -> None:
        """As `Program.compile`."""
        self.program.compile()

    def tokens(self, batch: Batch) -> Mapping[str, float]:
        """Places for tokens, padding included."""
        return {"tokens": batch["inputs"].size}

    def waiting_for(self) -> str:
        """As `Program.waiting_for`."""
        return self.program.waiting_for()


class InBuckets:
    """Steps over documents of mixed lengths, each bucket of lengths under its own plan."""

    def __init__(
        self,
        programs: Programs,
        buckets: Sequence[Bucket],
        program: AnyProgram,
        lost: Collection[int] = (),
    ) -> None:
        """Lowers the plans of all buckets.

        Args:
          programs: of the model.
          buckets: of different lengths.
          program: of the plan that owns the state.
          lost: devices that compute no more.

        Raises:
          PlanError: a bucket's plan does not fit the model or the devices.
          RunError: a bucket's plan uses a lost device.
        """
        self.bucketed = BucketedStep(programs, program.plan, buckets)
        for length, bucket in self.bucketed.buckets.items():
            gone = sorted(set(lost) & set(bucket.plan.devices))
            if gone:
                raise RunError(
                    f"the plan of the bucket of {length} tokens computes on device {gone[0]}, "
                    "which is lost; resume the run with the devices that are left"
                )
        self.workers = [
            programs.program(bucket.plan, bucket.captured)
            for bucket in self.bucketed.buckets.values()
        ]

    def feed(self, batches: Feed) -> Feed:
        """The batches as they are."""
        return batches

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """As `Program.step`."""
        return self.bucketed(state, list(batch["sequences"]))

    def compile(self) -> None:
        """Compiles what gathers gradients in each bucket, and what updates."""
        for worker in self.workers:
            worker.compile_gather()
        self.bucketed.owner.compile_apply()

    def tokens(self, batch: Batch) -> Mapping[str, float]:
        """Tokens that are predicted: in all, and of each bucket."""
        lengths = np.array([len(ids) - 1 for ids in batch["sequences"]])
        found = buckets_of(lengths, [*self.bucketed.buckets])
        each = {
            f"bucket_{length}_tokens": int(lengths[list(found.get(length, ()))].sum())
            for length in self.bucketed.buckets
        }
        return {"tokens": int(lengths.sum()), **each}

    def waiting_for(self) -> str:
        """What each plan waits for."""
        programs = dict.fromkeys([*self.workers, self.bucketed.owner])
        words = dict.fromkeys(program.waiting_for() for program in programs)
        return ", ".join(filter(None, words))
