"""Decides what a batch of sparse samples is: arrays of one shape, whatever the file was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

_DTYPES = {
    "ids": np.int64,
    "values": np.float32,
    "labels": np.float32,
    "weights": np.float32,
    "samples": np.int64,
    "fields": np.int32,
    "dense": np.float32,
    "queries": np.int64,
}


@dataclass(frozen=True, eq=False)
class SparseBatch:
    """Samples with at most `slots` features each; what is not there weighs nothing.

    The arrays are read-only. A slot without a feature has id 0 and value 0; a row without a
    sample (the rest of the last batch, or a line that could not be read) has weight 0.

    Attributes:
      ids: int64 [batch, slots], from 0 up.
      values: float32 [batch, slots].
      labels: float32 [batch].
      weights: float32 [batch]: 1 for a sample, 0 for none.
      samples: int64 [batch]: which sample it is, of all of the data; −1 for none.
      fields: int32 [batch, slots], or None where the format has no fields.
      dense: float32 [batch, columns], or None: features that are always there.
      queries: int64 [batch], or None: the `qid` of libsvm.

    >>> batch = SparseBatch(ids=np.array([[3, 5], [3, 0]]), values=np.array([[1.0, 0.5], [1, 0]]),
    ...                     labels=np.array([1.0, 0]), weights=np.ones(2), samples=np.arange(2))
    >>> batch.padded(3).weights.tolist(), len(batch), batch.slots
    ([1.0, 1.0, 0.0], 2, 2)
    """

    ids: np.ndarray
    values: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    samples: np.ndarray
    fields: np.ndarray | None = None
    dense: np.ndarray | None = None
    queries: np.ndarray | None = None

    def __post_init__(self) -> None:
        if np.ndim(self.ids) != 2:
            raise ValueError(f"ids must be [batch, slots], got shape {np.shape(self.ids)}")
        rows, slots = np.shape(self.ids)
        shapes = dict.fromkeys(_DTYPES, (rows,)) | dict.fromkeys(
            ("ids", "values", "fields"), (rows, slots)
        )
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array is None:
                continue
            array = np.asarray(array, dtype)
            wanted = (rows, array.shape[-1]) if name == "dense" and array.ndim else shapes[name]
            if array.shape != wanted:
                raise ValueError(f"{name} must be {list(wanted)} as ids say, got {array.shape}")
            if array.flags.writeable:
                array = array.view()
                array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def slots(self) -> int:
        """How many features a sample has at most."""
        return self.ids.shape[1]

    def take(self, which: np.ndarray | slice) -> SparseBatch:
        """Some of the rows."""
        return SparseBatch(**{name: array[which] for name, array in self._arrays().items()})

    def padded(self, rows: int) -> SparseBatch:
        """The same samples in a batch of so many rows.

        Raises:
          ValueError: there are more samples than that.
        """
        missing = rows - len(self)
        if missing < 0:
            raise ValueError(f"{len(self)} rows do not fit into {rows}")
        if missing == 0:
            return self
        arrays = {
            name: np.concatenate(
                (array, np.full((missing, *array.shape[1:]), -(name == "samples"), array.dtype))
            )
            for name, array in self._arrays().items()
        }
        return SparseBatch(**arrays)

    def without(self, rows: np.ndarray) -> SparseBatch:
        """The same batch, in which some rows (bool [batch]) hold no sample."""
        if not rows.any():
            return self
        kept = ~rows

        def blank(array: np.ndarray | None) -> np.ndarray | None:
            if array is None:
                return None
            return np.where(kept.reshape(-1, *([1] * (array.ndim - 1))), array, 0)

        arrays = {name: blank(array) for name, array in self._arrays().items()}
        return SparseBatch(**arrays | {"samples": self.samples})

    def of_samples(self, samples: np.ndarray) -> SparseBatch:
        """The same rows under these sample ids."""
        return replace(self, samples=samples)

    def _arrays(self) -> dict[str, np.ndarray]:
        every = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: array for name, array in every if array is not None}


def concatenate(batches: Sequence[SparseBatch]) -> SparseBatch:
    """Batches with the same slots and columns as one.

    Raises:
      ValueError: there is none, or they do not fit.
    """
    if not batches:
        raise ValueError("no batch was given")
    if len(batches) == 1:
        return batches[0]
    parts = [batch._arrays() for batch in batches]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError("batches with and without fields, dense or queries do not fit together")
    return SparseBatch(**{k: np.concatenate([part[k] for part in parts]) for k in parts[0]})
