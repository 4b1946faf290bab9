"""Decides which tokens are in which batch, exactly, across restarts.

The order of the samples is a function of the data and the seed alone: not of the batch
size, the devices, the hosts, or of how often the run was interrupted. So the number of
samples consumed is all that a position has to say; the rest of it proves that it is used
on the data it came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import grain
import numpy as np

from shardpar.errors import DataError
from shardpar.train.corpus import Corpus, read_corpus
from shardpar.train.options import DataOptions
from shardpar.train.packing import PackedDocuments
from shardpar.train.tokenizer import (
    Tokenizer,
    digest,
    encode_corpus,
    encode_documents,
    make_tokenizer,
)

Batch = dict[str, np.ndarray]
"""`inputs` and `targets`, int32 [batch, tokens]; `sample`, int64 [batch], the samples' ids; what
`packing.fill` gives besides, if documents are packed."""

_POSITION_FORMAT = "shardpar-position/1"
_BATCHES_AHEAD = 4


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """A text's tokens as samples that can be read in any order.

    Sample i predicts tokens i·T+1 to i·T+T, each from those before it in the sample, so
    each token is predicted once; what is left at the end, fewer than T tokens, is unused.

    Attributes:
      tokens: the ids, of any unsigned dtype.
      sequence_length: T.
      tokenizer: digest of what made the ids; part of the identity of the data.

    >>> windows = TokenWindows(np.arange(8, dtype=np.uint8), sequence_length=3)
    >>> len(windows), windows[1]["inputs"].tolist(), windows[1]["targets"].tolist()
    (2, [3, 4, 5], [4, 5, 6])
    """

    tokens: np.ndarray
    sequence_length: int
    tokenizer: str = ""

    def __len__(self) -> int:
        return max(0, self.tokens.size - 1) // self.sequence_length

    def __getitem__(self, sample: int) -> Batch:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {key: array[0] for key, array in self.gather(np.array([sample])).items()}

    def gather(self, samples: np.ndarray) -> Batch:
        """The samples of these ids as one batch."""
        samples = np.asarray(samples, np.int64)
        first = samples[:, None] * self.sequence_length
        tokens = self.tokens[first + np.arange(self.sequence_length + 1)]
        return {
            "inputs": tokens[:, :-1].astype(np.int32),
            "targets": tokens[:, 1:].astype(np.int32),
            "sample": samples,
        }

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What two runs must share to see the same samples under the same ids."""
        ids = hashlib.blake2b(self.tokens.dtype.str.encode(), digest_size=8)
        ids.update(np.ascontiguousarray(self.tokens).data)
        return {
            "sequence_length": self.sequence_length,
            "tokenizer": self.tokenizer,
            "samples": len(self),
            "tokens": ids.hexdigest(),
        }


Samples = TokenWindows | PackedDocuments
"""A text as samples that can be read in any order, one row of a batch each."""


@dataclass(frozen=True, eq=False)
class TextData:
    """What `load_text` gives.

    Attributes:
      name: of the corpus, for logs.
      files: it was read from.
      tokenizer: to keep with the run, for resuming and for generation.
      train, evaluation: samples of the two parts of the text, which share no byte.
    """

    name: str
    files: tuple[str, ...]
    tokenizer: Tokenizer
    train: Samples
    evaluation: Samples


def load_text(options: DataOptions, tokenizer: Tokenizer | None = None) -> TextData:
    r"""Reads the text, cuts off its evaluation part and turns both into samples.

    Args:
      options: section `data` of a config.
      tokenizer: of the run that is resumed; None makes one, from the training part alone.

    Raises:
      DataError: text or tokenizer cannot be had.

    >>> data = load_text(DataOptions())
    >>> data.tokenizer.decode(data.train[0]["inputs"][:24])
    'The "assert" statement\n*'
    """
    corpus = read_corpus(options)
    train, evaluation = corpus.split(options.eval_fraction)
    if tokenizer is None:
        tokenizer = make_tokenizer(options, train)
    elif tokenizer.name != options.tokenizer:
        raise DataError(
            f"data.tokenizer={options.tokenizer}, but the run began with {tokenizer.name}; "
            f"write data.tokenizer={tokenizer.name}, or begin a new run"
        )
    parts = [_samples(part, options, tokenizer) for part in (train, evaluation)]
    return TextData(corpus.name, corpus.files, tokenizer, *parts)


def _samples(corpus: Corpus, options: DataOptions, tokenizer: Tokenizer) -> Samples:
    name = digest(tokenizer)
    if not options.packing:
        return TokenWindows(encode_corpus(tokenizer, corpus), options.sequence_length, name)
    ids, ends = encode_documents(tokenizer, corpus)
    return PackedDocuments(ids, ends, options.sequence_length, name)


class Batches:
    """An endless iterator over batches that can say where it is and go on from there.

    Each epoch has every sample once, in an order of its own; batches run across the border
    of two epochs, so none is short. Batches are prepared ahead in one background thread,
    but `position` counts only those that `next` has returned. Made by `train_batches`.

    >>> windows = TokenWindows(np.arange(101, dtype=np.uint8), sequence_length=10)
    >>> with train_batches(windows, global_batch=4, seed=0) as batches:
    ...     _ = next(batches)
    ...     position = batches.position
    ...     second = next(batches)
    >>> with train_batches(windows, global_batch=2, seed=0) as batches:
    ...     batches.restore(position)
    ...     bool((next(batches)["sample"] == second["sample"][:2]).all())
    True
    """

    def __init__(self, windows: Samples, global_batch: int, seed: int) -> None:
        self._windows = windows
        self._global_batch = global_batch
        self._seed = seed
        # Grain takes 32 bits and seeds epoch e with seed + e: spreading keeps the second
        # epoch of seed 0 from being the first of seed 1.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(windows)).shuffle(seed=spread).repeat()
        self._closed = False
        self._start_at(0)

    def _start_at(self, samples: int) -> None:
        self._consumed = samples
        # Grain computes the length of an endless dataset in floating point unless the
        # remainder, which never comes, is dropped.
        batches = self._order[samples:].batch(self._global_batch, drop_remainder=True)
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
        self._iterator = iter(batches.map(self._windows.gather).to_iter_dataset(reading))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("next() of batches that were closed")
        batch = next(self._iterator)
        self._consumed += self._global_batch
        return batch

    @property
    def position(self) -> dict[str, Any]:
        """Where the iterator stands, a few short JSON values.

        `samples` have been returned, over all epochs; `next` is the id of the one that
        follows, which tells when another version of grain shuffles differently.
        """
        return {
            "format": _POSITION_FORMAT,
            "samples": self._consumed,
            "next": self._sample_at(self._consumed),
            "seed": self._seed,
            "global_batch": self._global_batch,
            "data": dict(self._windows.identity),
        }

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on after the samples of `position`, which may be of another batch size.

        Args:
          position: what `position` was, of an iterator over the same data with the same seed.

        Raises:
          DataError: it is of other data, another order, or not a position at all; the
            iterator stays where it is.
        """
        samples = self._checked(position)
        if self._closed:
            raise ValueError("restore() of batches that were closed")
        self._iterator.close()
        self._start_at(samples)

    def _checked(self, position: Mapping[str, Any]) -> int:
        if not isinstance(position, Mapping) or position.get("format") != _POSITION_FORMAT:
            raise DataError(
                f"data position: {_POSITION_FORMAT!r} was expected, got {position!r:.80}; "
                "use the shardpar version that saved it"
            )
        samples, data = position.get("samples"), position.get("data")
        # 2**60 samples are more than any run reads, and well inside what grain can index.
        if type(samples) is not int or not 0 <= samples < 2**60 or not isinstance(data, Mapping):
            raise DataError(
                f"data position: it is damaged (samples={samples!r}, data={data!r:.80}); "
                "resume from an earlier checkpoint"
            )
        for key, now in self._windows.identity.items():
            if data.get(key) != now:
                raise DataError(_other_data(key, data.get(key), now))
        if position.get("seed") != self._seed:
            raise DataError(
                f"data position: the run began with train.seed={position.get('seed')} and "
                f"train.seed is {self._seed} now, another order of the data; "
                f"write train.seed={position.get('seed')}, or begin a new run"
            )
        following = self._sample_at(samples)
        if position.get("next") != following:
            raise DataError(
                f"data position: after {samples} samples, sample {position.get('next')} was to "
                f"follow, but grain {grain.__version__} gives {following}; install the version "
                "of grain that the run began with"
            )
        return samples

    def _sample_at(self, index: int) -> int:
        sample = self._order[index]
        assert sample is not None, "a shuffled range has no holes"
        return int(sample)

    def close(self) -> None:
        """Ends the background thread; may be called twice."""
        self._closed = True
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def train_batches(windows: Samples, global_batch: int, seed: int) -> Batches:
    """Shuffled batches without end, from the first sample of the first epoch.

    Args:
      windows: the training samples.
      global_batch: samples per batch, over all devices.
      seed: of the order of the samples; any integer from 0 up.

    Raises:
      DataError: there are fewer samples than one batch has.
    """
    _check_enough(windows, global_batch, "training")
    return Batches(windows, global_batch, seed)


def eval_batches(windows: Samples, batch: int, count: int) -> tuple[Batch, ...]:
    """Batches to evaluate on, the same each time, spread evenly over the text.

    Args:
      windows: the evaluation samples.
      batch: samples per batch.
      count: how many batches; fewer are given where the text has fewer.

    Raises:
      DataError: there are fewer samples than one batch has.

    >>> windows = TokenWindows(np.arange(101, dtype=np.uint8), sequence_length=10)
    >>> [batch["sample"].tolist() for batch in eval_batches(windows, batch=2, count=2)]
    [[0, 2], [5, 7]]
    """
    _check_enough(windows, batch, "evaluation")
    count = min(count, len(windows) // batch)
    samples = np.arange(count * batch) * len(windows) // (count * batch)
    return tuple(windows.gather(ids) for ids in samples.reshape(count, batch))


def _check_enough(windows: Samples, batch: int, part: str) -> None:
    if 1 <= batch <= len(windows):
        return
    if batch < 1:
        raise DataError(f"a batch of {batch} samples was asked for; write 1 or more")
    remedy = "give more text" if part == "training" else "raise data.eval_fraction"
    raise DataError(
        f"the {part} text has {windows.tokens.size} tokens, which make {len(windows)} samples "
        f"of {windows.sequence_length}, fewer than one batch of {batch}; "
        f"lower train.global_batch or data.sequence_length, or {remedy}"
    )


def _other_data(key: str, then: Any, now: Any) -> str:
    if key == "sequence_length":
        what = (
            f"the run began with data.sequence_length={then} and it is {now} now; "
            f"write data.sequence_length={then}"
        )
    elif key == "packing":
        what = (
            f"data.packing was {'on' if then else 'off'} when the run began, in the manner {then}, "
            f"and is in the manner {now} now; use the data.packing and the shardpar version that "
            "it began with"
        )
    elif key == "tokenizer":
        what = (
            f"the tokenizer is not the one the run began with (digest {then} then, {now} now); "
            "use the tokenizer.json of the run"
        )
    else:
        what = (
            f"the text is not the one the run began with ({key}: {then} then, {now} now); "
            "restore data.path, data.field, data.eval_fraction and the files they name"
        )
    return f"data position: {what}, or begin a new run"


def require_vocabulary(model_vocab: int | None, data: TextData) -> None:
    """Refuses a model that has no row for some token of the data.

    Raises:
      DataError: naming both sizes.
    """
    if model_vocab is not None and data.tokenizer.vocab_size > model_vocab:
        raise DataError(
            f"model.vocab_size is {model_vocab}, but the {data.tokenizer.name} tokenizer has "
            f"{data.tokenizer.vocab_size} tokens; use model.vocab_size={data.tokenizer.vocab_size}"
        )
