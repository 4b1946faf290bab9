"""Word2Vec: skip-gram with negative sampling over streams of tokens.

Mikolov et al., "Distributed representations of words and phrases and their compositionality",
2013. Negatives are shared by the centres of a block, each as if it were drawn by all of them,
so that a step is a few matrix products (Ji et al., "Parallelizing Word2Vec in shared and
distributed memory", 2016). The sum of their weights is that of separate draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.embeddings import NodeEmbeddings, Progress, quiet
from shardpar.ps.algorithms.keeping import NOTHING, Keeper
from shardpar.ps.algorithms.lookup_program import (
    Batch,
    Formula,
    Lookup,
    LookupProgram,
    Rows,
    trained,
)
from shardpar.ps.algorithms.skipgram_blocks import BlockShape, batches, sentences_of
from shardpar.ps.initializers import Uniform, Zeros
from shardpar.ps.optimizers import RowOptimizer, RowWiseAdaGrad
from shardpar.ps.placement import Placement
from shardpar.ps.table import Table

_CENTRES_AT_ONCE = 512
"""With their contexts, about what a processor's second cache holds."""


@dataclass(frozen=True)
class Word2VecOptions:
    """Skip-gram with negative sampling.

    Attributes:
      dim: of the vectors.
      window: contexts on either side, at most; each centre sees a random part of it.
      negatives: of each pair.
      passes: over the sentences.
      optimizer: of both tables. Gradients of a step are summed, not averaged.
      last_rate: the learning rate falls in a line to this share of itself.
      subsample: words more frequent than this share are left out at random; 0 keeps all.
      power: negatives are drawn by frequency to this power.
      batch_tokens: centres of a step; None takes about the vocabulary, 256 to 4096, since a
        word's gradients of one step are all taken where the step began.
      block: centres that share negatives.
      shared: negatives that a block shares; None takes as many as a pair has, and more up to
        where the block's columns are a multiple of 16, which processors multiply best.
    """

    dim: int = 128
    window: int = 5
    negatives: int = 5
    passes: int = 1
    optimizer: RowOptimizer = field(default_factory=lambda: RowWiseAdaGrad(0.05))
    last_rate: float = 0.004
    subsample: float = 0.0
    power: float = 0.75
    batch_tokens: int | None = None
    block: int = 32
    shared: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "window", "negatives", "passes", "block", "shared", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of Word2Vec is at least 1, not {value}")
        if self.subsample < 0 or not 0 <= self.last_rate <= 1:
            raise ConfigError(
                "subsample of Word2Vec is not negative and last_rate is 0 to 1, not "
                f"{self.subsample} and {self.last_rate}"
            )

    def shape(self, vocabulary: int, devices: int) -> BlockShape:
        """How a step is cut into blocks."""
        tokens = self.batch_tokens or min(max(vocabulary, 256), 4096)
        blocks = max(1, round(tokens / (self.block * devices))) * devices
        contexts = self.block + 2 * self.window
        shared = self.shared or -(-(contexts + self.negatives) // 16) * 16 - contexts
        return BlockShape(blocks, self.block, self.window, shared)


def skip_gram(window: int, negatives: int) -> Formula:
    """The gradients of -log sigmoid(score) of pairs and -log sigmoid(-score) of negatives.

    Args:
      window: as the batch was made with.
      negatives: how many draws the shared negatives of a pair stand for.

    Returns:
      A formula of the rows of "centres" [b, t, d] and of "others" [b, m, d]. Its loss is that
      of an eighth of the blocks: a good estimate, of which only the mean is reported.
    """

    def formula(rows: Rows, batch: Batch) -> tuple[Rows, jax.Array, jax.Array]:
        centre, other = rows
        scores = jnp.einsum("btd,bmd->btm", centre, other)
        size, columns = scores.shape[1:]
        contexts = size + 2 * window
        column = jnp.arange(columns)[None, :]
        offset = column - window - jnp.arange(size)[:, None]
        left, right = batch["left"][..., None], batch["right"][..., None]
        pair = (offset >= -left) & (offset <= right) & (offset != 0) & (column < contexts)
        drawn = ((left + right) * (negatives / (columns - contexts))).astype(scores.dtype)
        drawn = jnp.where(column < contexts, 0, drawn)
        # One pass over all columns is faster than two and their concatenation.
        chance = jax.nn.sigmoid(scores)
        slope = jnp.where(pair, chance - 1, chance * drawn)
        gradients = (
            jnp.einsum("btm,bmd->btd", slope, other),
            jnp.einsum("btm,btd->bmd", slope, centre),
        )
        some = slice(0, max(1, scores.shape[0] // 8))
        signed = jnp.where(pair[some], -scores[some], scores[some])
        weight = jnp.where(pair[some], 1, drawn[some])
        pairs = (left[some] + right[some]).sum().astype(scores.dtype)
        return gradients, (weight * jax.nn.softplus(signed)).sum(), pairs

    return formula


def fit(
    options: Word2VecOptions,
    vocabulary: int,
    sentences: Iterable[Any],
    *,
    counts: np.ndarray | None = None,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    placement: Placement | None = None,
    progress: Progress = quiet,
    keeper: Keeper = NOTHING,
) -> NodeEmbeddings:
    """Learns a vector for each token.

    Args:
      options: of the algorithm.
      vocabulary: tokens are 0 to vocabulary - 1.
      sentences: each item is int[n], a sentence, or int[m, n], m of them with -1 after the end
        of each. It is iterated over once for each pass, and once before to count.
      counts: int[vocabulary], how often each token occurs; None counts.
      seed: of everything random.
      devices: None takes all.
      placement: of the tables; None deals their rows over all devices.
      progress: called now and then.
      keeper: saves now and then, and knows where to go on.

    Raises:
      DataError: a token is outside the vocabulary, or there are no pairs.

    >>> import jax
    >>> text = [[0, 1, 0, 1, 0, 1], [2, 3, 2, 3, 2, 3]] * 20
    >>> options = Word2VecOptions(dim=4, window=1)
    >>> fit(options, 4, text, devices=jax.devices()[:1]).vectors.shape
    (4, 4)
    """
    if counts is None:
        counts = _counted(sentences, vocabulary)
    tokens = int(counts.sum())
    if not tokens:
        raise DataError("the sentences have no tokens; give some with at least two each")
    frequency = counts / tokens
    noise = np.cumsum(frequency**options.power)
    noise /= noise[-1]
    kept = None
    if options.subsample:
        ratio = options.subsample / np.maximum(frequency, 1e-30)
        kept = np.minimum(np.sqrt(ratio) + ratio, 1)
        tokens = int((counts * kept).sum())
    devices = tuple(jax.devices() if devices is None else devices)
    shape = options.shape(vocabulary, len(devices))
    steps = max(1, tokens * options.passes // (shape.blocks * shape.centres))
    tables = tuple(
        Table(vocabulary, options.dim, options.optimizer, begin)
        for begin in (Uniform(0.5 / options.dim), Zeros())
    )
    program = LookupProgram(
        tables,
        (Lookup(0, "centres"), Lookup(1, "others")),
        skip_gram(options.window, options.negatives),
        devices=devices,
        placement=placement,
        rate=optax.linear_schedule(1.0, options.last_rate, steps),
        rows_at_once=max(1, _CENTRES_AT_ONCE // options.block),
    )
    random = np.random.default_rng((seed, 1))

    def passes() -> Iterator[Iterator[dict[str, np.ndarray]]]:
        for _ in range(options.passes):
            yield batches(sentences_of(sentences, vocabulary), shape, noise, kept, random)

    states, losses = trained(
        program, seed, passes(), steps, progress, keeper, batch_size=shape.blocks * shape.centres
    )
    if not any(np.isfinite(losses)):
        raise DataError("no token has another beside it; give sentences of at least two tokens")
    return NodeEmbeddings(program.tables[0].whole(states[0])[0], losses)


def _counted(sentences: Iterable[Any], vocabulary: int) -> np.ndarray:
    counts = np.zeros(vocabulary, np.int64)
    for flat, _ in sentences_of(sentences, vocabulary):
        counts += np.bincount(flat, minlength=vocabulary)
    return counts
