"""Decides which sequences of a step are padded to which length, and runs each under its own plan.

Short sequences fit under plans that split little; long ones need plans that split much. A step
computes each bucket's gradients under the bucket's plan and updates once (HotSPa, SOSP 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from shardpar.capture.trace import Captured
from shardpar.errors import DataError, PlanError
from shardpar.lowering.lower import AnyProgram
from shardpar.lowering.state import Gathered, TrainState
from shardpar.lowering.switch import Programs
from shardpar.spec.plan import Plan
from shardpar.train.packing import empty_rows, fill

Numbers = tuple[int, ...]


def buckets_of(lengths: Sequence[int], bounds: Sequence[int]) -> dict[int, Numbers]:
    """Puts every sequence into the bucket of the least bound it fits under.

    Args:
      lengths: tokens that each sequence takes of a row, 1 or more.
      bounds: the buckets' lengths, ascending.

    Returns:
      The numbers of the sequences by bound, ascending; empty buckets are left out.

    Raises:
      DataError: a sequence is longer than the last bound, or the bounds do not ascend.

    >>> buckets_of([30, 5, 9, 8, 31], bounds=(8, 16, 32))
    {8: (1, 3), 16: (2,), 32: (0, 4)}
    """
    edges = np.asarray(bounds, np.int64)
    if not edges.size or edges[0] < 1 or (np.diff(edges) <= 0).any():
        raise DataError(f"bucket bounds {list(bounds)} must ascend from 1 or more; sort them")
    given = np.asarray(lengths, np.int64)
    wrong = np.flatnonzero((given < 1) | (given > edges[-1]))
    if wrong.size:
        raise DataError(
            f"sequence {wrong[0]} takes {given[wrong[0]]} tokens, and buckets hold 1 to "
            f"{edges[-1]}; cut the sequence, or add a bound of {int(given.max())}"
        )
    places = np.searchsorted(edges, given)
    return {
        int(edges[bucket]): tuple(np.flatnonzero(places == bucket).tolist())
        for bucket in np.unique(places).tolist()
    }


def padded(
    sequences: Sequence[np.ndarray],
    row_tokens: int,
    rows: int | None = None,
    weights: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """One sequence a row, padded at its end: a batch for a loss that reads `weights`.

    Args:
      sequences: the ids of each; of n, n - 1 places are taken.
      row_tokens: of a row.
      rows: of the batch, at least as many as sequences; the others are padding alone.
      weights: as in `packing.fill`.

    Returns:
      `inputs`, `targets`, `weights`, as from `packing.fill`.

    >>> padded([np.array([5, 6, 7])], row_tokens=3, rows=2)["targets"].tolist()
    [[6, 7, 0], [0, 0, 0]]
    """
    filled = fill(sequences, tuple((i,) for i in range(len(sequences))), row_tokens, weights)
    missing = (len(sequences) if rows is None else rows) - len(sequences)
    if missing < 0:
        raise DataError(f"{len(sequences)} sequences were given for {rows} rows; give more rows")
    more = empty_rows(missing, row_tokens)
    return {
        name: np.concatenate([filled[name], more[name]])
        for name in ("inputs", "targets", "weights")
    }


@dataclass(frozen=True, eq=False)
class Bucket:
    """How sequences of up to some length are computed.

    Attributes:
      captured: the model for batches of `inputs`, `targets` and `weights` of that length.
      plan: what computes; a bucket of more sequences than its global batch takes several turns.
    """

    captured: Captured
    plan: Plan

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return int(self.captured.batch["inputs"].shape[1])


class BucketedStep:
    """Steps over sequences of mixed lengths, each bucket under its own plan, one update.

    The state stays where its owner wants it: parameters are lent to the other plans and only
    gradients come back.

    Attributes:
      programs: of the model; what was lowered once is kept there.
      owner: the program of the plan that owns the state.
      buckets: by length, ascending.
    """

    def __init__(self, programs: Programs, owner: Plan, buckets: Sequence[Bucket]) -> None:
        """Nothing is lowered yet but the owner.

        Args:
          programs: made for the captured model of any one length.
          owner: the plan that owns the state.
          buckets: of different lengths.

        Raises:
          PlanError: two buckets have one length, or a bucket's loss does not read `weights`,
            so that padding would count.
        """
        self.programs = programs
        self.buckets: Mapping[int, Bucket] = {b.length: b for b in sorted(buckets, key=_length)}
        if len(self.buckets) < len(buckets) or not buckets:
            raise PlanError(
                f"buckets of lengths {[b.length for b in buckets]} were given; "
                "give one or more, each of another length"
            )
        for length, bucket in self.buckets.items():
            if "weights" not in bucket.captured.batch or "weights" in bucket.captured.unread:
                raise PlanError(
                    f'the loss of the bucket of {length} tokens does not read batch["weights"], '
                    "so padding would count; capture it with weights in the batch"
                )
        self.owner: AnyProgram = programs.program(owner)

    def __call__(
        self,
        state: TrainState,
        sequences: Sequence[np.ndarray],
        weights: Sequence[np.ndarray] | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step; the state is donated. Returns what `Program.step` does.

        Args:
          state: under the owner.
          sequences: the ids of each, any number of them.
          weights: as in `packing.fill`.

        Raises:
          DataError: there are none, or one is too long for every bucket.
        """
        return self.owner.apply(state, self.gathered(state, sequences, weights))

    def gathered(
        self,
        state: TrainState,
        sequences: Sequence[np.ndarray],
        weights: Sequence[np.ndarray] | None = None,
    ) -> Gathered:
        """The step's gradients before the update, under the owner; the state stays as it is."""
        found: Gathered | None = None
        for length, numbers in buckets_of([len(x) - 1 for x in sequences], [*self.buckets]).items():
            bucket = self.buckets[length]
            size = bucket.plan.global_batch
            for first in range(0, len(numbers), size):
                turn = numbers[first : first + size]
                batch = padded(
                    [sequences[i] for i in turn],
                    length,
                    size,
                    None if weights is None else [weights[i] for i in turn],
                )
                found = self.programs.accumulate(
                    self.owner, state, bucket.plan, batch, found, bucket.captured
                )
        if found is None:
            raise DataError("a step of no sequences was asked for; give one or more")
        return found


def _length(bucket: Bucket) -> int:
    return bucket.length
