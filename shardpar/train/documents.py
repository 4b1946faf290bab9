"""Documents as samples of their own lengths: what buckets and dispatching make a step of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardpar.train.packing import digest_of, fill, pieces


@dataclass(frozen=True, eq=False)
class Documents:
    """Each document is a sample, as long as it is; a longer one than allowed is several.

    Attributes:
      tokens: the ids of all documents back to back, of any unsigned dtype.
      ends: int64, where each document ends in `tokens`; documents have 2 tokens or more.
      sequence_length: the most tokens that a sample predicts.
      tokenizer: digest of what made the ids; part of the identity of the data.

    >>> documents = Documents(np.arange(9, dtype=np.uint8), np.array([3, 9]), 4)
    >>> [ids.tolist() for ids in documents.gather(np.array([2, 0]))["sequences"]]
    [[7, 8], [0, 1, 2]]
    """

    tokens: np.ndarray
    ends: np.ndarray
    sequence_length: int
    tokenizer: str = ""

    @cached_property
    def _pieces(self) -> np.ndarray:
        return pieces(self.ends, self.sequence_length)

    def __len__(self) -> int:
        return len(self._pieces)

    def gather(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """The samples of these ids: `sequences`, an array of the ids' arrays; `sample`.

        A sequence that predicts n tokens has n + 1.
        """
        samples = np.asarray(samples, np.int64)
        sequences = np.empty(len(samples), object)
        for at, (first, predicted) in enumerate(self._pieces[samples].tolist()):
            sequences[at] = self.tokens[first : first + predicted + 1]
        return {"sequences": sequences, "sample": samples}

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What two runs must share to see the same samples under the same ids."""
        return {
            "documents": "cut",
            "sequence_length": self.sequence_length,
            "tokenizer": self.tokenizer,
            "samples": len(self),
            "tokens": digest_of(self.tokens, self.ends),
        }


@dataclass(frozen=True, eq=False)
class PaddedDocuments:
    """Documents as rows of one length, a sample each, padded at their ends.

    >>> documents = Documents(np.arange(9, dtype=np.uint8), np.array([3, 9]), 4)
    >>> PaddedDocuments(documents).gather(np.array([0]))["weights"].tolist()
    [[1.0, 1.0, 0.0, 0.0]]
    """

    documents: Documents

    @property
    def tokens(self) -> np.ndarray:
        """As in `Documents`."""
        return self.documents.tokens

    @property
    def sequence_length(self) -> int:
        """As in `Documents`."""
        return self.documents.sequence_length

    @property
    def identity(self) -> dict[str, str | int]:
        """As in `Documents`."""
        return self.documents.identity

    def __len__(self) -> int:
        return len(self.documents)

    def gather(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """`inputs`, `targets` and `weights` of these ids, as from `packing.fill`; `sample`."""
        found = self.documents.gather(samples)
        alone = tuple((i,) for i in range(len(found["sample"])))
        rows = fill(list(found["sequences"]), alone, self.sequence_length)
        names = ("inputs", "targets", "weights")
        return {**{name: rows[name] for name in names}, "sample": found["sample"]}
