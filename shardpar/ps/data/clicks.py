"""Decides what the generated click log is: ids as uneven as real ones, and a known best AUC.

Each field draws an id in proportion to about 1/rank (Zipf's law), as bounded powers of two:
ranks 2^k … 2^(k+1)−1 are as likely for each k. The label's log-odds are a weight of each id
plus the inner product of each pair of ids' vectors: what a factorisation machine (S. Rendle,
ICDM 2010) can learn. All of it is integer arithmetic on hashes of the seed, the row and the
field, so that every machine gets the same data, in any order and any parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.hashing import hash_integers, mix

FIELDS = 39
ROWS = 2**20
CHUNK = 1 << 16

EVAL_FROM = 1 << 40
"""The first sample of an evaluation log: far behind any training log."""

_U = np.uint64
_PARTS = 1 << 13
_FACTORS = 2
_PAIR_LEVEL = 7
# Log-odds are integers in units of 2⁻¹⁶; factors are in units of 2⁻⁸, so that their products
# are in the same unit.
_UNIT = 2.0**-16


@dataclass(frozen=True)
class ClickLog:
    """A click log that is made, not read.

    Attributes:
      samples: how many.
      seed: of the model and of the ids; another seed is another world.
      first: number of the first sample; logs of one seed with other samples share the model.
      linear: standard deviation of the weights' sum.
      pairwise: standard deviation of the sum over pairs.
      bias: log-odds of a click where the weights say nothing.

    >>> log = ClickLog(samples=1000)
    >>> batch = log.batch(0, 4)
    >>> batch.ids.shape, batch.labels.tolist(), batch.ids[0, :3].tolist()
    ((4, 39), [0.0, 0.0, 1.0, 0.0], [647190, 37403, 852588])
    """

    samples: int
    seed: int = 0
    first: int = 0
    linear: float = 1.4
    pairwise: float = 2.0
    bias: float = -1.0

    def batch(self, start: int, stop: int) -> SparseBatch:
        """Samples start … stop−1."""
        return self.of_samples(np.arange(start, stop))

    def of_samples(self, places: np.ndarray) -> SparseBatch:
        """The samples of these numbers, from 0."""
        return self._drawn(places)[0]

    def probabilities(self, start: int, stop: int) -> np.ndarray:
        """What the labels of these samples are drawn from; float64."""
        return self._drawn(np.arange(start, stop))[1]

    def batches(self, size: int = CHUNK) -> Iterator[SparseBatch]:
        """All samples in their order; the last batch may be short."""
        for start in range(0, self.samples, size):
            yield self.batch(start, min(start + size, self.samples))

    @cached_property
    def paired_fields(self) -> np.ndarray:
        """Which fields take part in pairs: those with few ids, so that they can be learned."""
        return np.flatnonzero(self._levels <= _PAIR_LEVEL)

    def _drawn(self, places: np.ndarray) -> tuple[SparseBatch, np.ndarray]:
        parts = [
            self._draw(places[start : start + _PARTS]) for start in range(0, places.size, _PARTS)
        ] or [self._draw(places)]
        ids, labels, chances = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        fields = np.broadcast_to(np.arange(FIELDS, dtype=np.int32), ids.shape)
        ones = np.ones(ids.shape, np.float32)
        batch = SparseBatch(ids, ones, labels, np.ones(len(ids)), places, fields)
        return batch, chances

    def _draw(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed = mix(np.array([self.seed + 1], _U))[0]
        keys = mix((places + self.first).astype(_U) ^ seed)
        with np.errstate(over="ignore"):
            steps = np.arange(1, FIELDS + 1).astype(_U) * _U(0x9E3779B97F4A7C15)
            bits = mix(keys[:, None] + steps)
        # The upper half chooses the power of two, the lower half the rank within it.
        level = (bits >> _U(32)) * self._levels >> _U(32)
        ranks = (_U(1) << level) + (bits & ((_U(1) << level) - _U(1)))
        ids = hash_integers(ranks, np.arange(FIELDS), ROWS)
        score = self._weights[ids].sum(axis=1, dtype=np.int64)
        paired = ids[:, self.paired_fields]
        for factor, means in zip(self._factors, self._means, strict=True):
            chosen = factor[paired] - means
            total = chosen.sum(axis=1, dtype=np.int64)
            squares = np.einsum("rf,rf->r", chosen, chosen, dtype=np.int64)
            score += (total * total - squares) >> 1
        odds = self.bias + score * _UNIT
        chances = 1 / (1 + np.exp(-odds))
        draws = (mix(keys ^ _U(0xC11C)) >> _U(11)) * 2.0**-53
        return ids, (draws < chances).astype(np.float32), chances

    @cached_property
    def _levels(self) -> np.ndarray:
        """Log₂ of each field's vocabulary: from two letters to a hundred thousand."""
        return (np.arange(FIELDS) * 7 % 17 + 1).astype(_U)

    @cached_property
    def _weights(self) -> np.ndarray:
        scale = self.linear / np.sqrt(FIELDS) / _UNIT
        return _noise(self.seed, 0, scale).astype(np.int32)

    @cached_property
    def _means(self) -> list[np.ndarray]:
        """Of each factor over each paired field; without them, pairs have no linear part."""
        fields = self.paired_fields
        means = np.zeros((_FACTORS, fields.size), np.int32)
        for place, field in enumerate(fields):
            levels = int(self._levels[field])
            ids = hash_integers(np.arange(1, 1 << levels), field, ROWS)
            # Ranks of one level are equally likely, and so are the levels.
            levelled = np.frexp(np.arange(1, 1 << levels))[1].astype(np.int64) - 1
            shares = np.int64(1) << (_PAIR_LEVEL - levelled)
            for factor in range(_FACTORS):
                total = int((self._factors[factor][ids].astype(np.int64) * shares).sum())
                means[factor, place] = total // (levels << _PAIR_LEVEL)
        return list(means)

    @cached_property
    def _factors(self) -> np.ndarray:
        # The sum over pairs of FIELDS vectors has the variance pairs · factors · scale⁴.
        fields = self.paired_fields.size
        pairs = fields * (fields - 1) / 2
        scale = np.sqrt(self.pairwise / np.sqrt(pairs * _FACTORS)) * 2.0**8
        noise = [_noise(self.seed, 1 + factor, scale) for factor in range(_FACTORS)]
        return np.stack(noise).astype(np.int32)


def _noise(seed: int, stream: int, scale: float) -> np.ndarray:
    """For each id an integer, spread about 0 nearly as a normal one: Irwin and Hall's sum of 4."""
    salt = mix(np.array([seed + 1], _U))[0]
    bits = mix(mix(np.arange(ROWS).astype(_U) ^ salt) ^ _U(stream + 1))
    total = bits.astype("<u8").view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64) - 2 * 65535
    # A uniform number of 16 bits has the variance 65536² / 12.
    return np.rint(total * (scale / (65536 * np.sqrt(4 / 12))))
