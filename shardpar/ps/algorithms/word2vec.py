"""Word2Vec: skip-gram with negative sampling over streams of tokens.

Mikolov et al., "Distributed representations of words and phrases and their compositionality",
2013. Negatives are shared by the centres of a block, each as if it were drawn by all of them,
so that a step is a few matrix products (Ji et al., "Parallelizing Word2Vec in shared and
distributed memory", 2016). The sum of their weights is that of separate draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.embeddings import NodeEmbeddings, Progress, quiet
from shardpar.ps.algorithms.skipgram_blocks import BlockShape, batches, sentences_of
from shardpar.ps.embed import Embed
from shardpar.ps.initializers import Uniform, Zeros
from shardpar.ps.optimizers import SGD, RowOptimizer
from shardpar.ps.program import SparseOptions, SparseProgram, SparseState

_STEPS_BETWEEN_REPORTS = 100


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
      batch_tokens: centres of a step; None takes about the vocabulary, 256 to 8192, since a
        word's gradients of one step are all taken where the step began.
      block: centres that share negatives.
    """

    dim: int = 128
    window: int = 5
    negatives: int = 5
    passes: int = 1
    optimizer: RowOptimizer = field(default_factory=lambda: SGD(0.025))
    last_rate: float = 0.004
    subsample: float = 0.0
    power: float = 0.75
    batch_tokens: int | None = None
    block: int = 64
    shared: int = 22

    def __post_init__(self) -> None:
        least = min(self.dim, self.window, self.negatives, self.passes, self.block, self.shared)
        if least < 1:
            raise ConfigError(
                "dim, window, negatives, passes, block and shared of Word2Vec are at least 1: "
                f"{self}"
            )
        if self.subsample < 0 or not 0 <= self.last_rate <= 1:
            raise ConfigError("subsample is not negative, and last_rate is 0 to 1: " + str(self))

    def shape(self, vocabulary: int, devices: int) -> BlockShape:
        """How a step is cut into blocks."""
        tokens = self.batch_tokens or min(max(vocabulary, 256), 8192)
        blocks = max(1, round(tokens / (self.block * devices))) * devices
        return BlockShape(blocks, self.block, self.window, self.shared)


class SkipGram(nnx.Module):
    """Two tables: of words as centres, and of words as contexts."""

    def __init__(self, vocabulary: int, dim: int, optimizer: RowOptimizer, rngs: nnx.Rngs) -> None:
        start = Uniform(0.5 / dim)
        self.centres = Embed(vocabulary, dim, rngs=rngs, optimizer=optimizer, init=start)
        self.others = Embed(vocabulary, dim, rngs=rngs, optimizer=optimizer, init=Zeros())


def loss(
    model: SkipGram,
    batch: dict[str, jax.Array],
    *,
    window: int,
    negatives: int,
    share: float,
) -> tuple[jax.Array, jax.Array]:
    """The sum of -log sigmoid(+-score) over pairs and negatives, and `share` as its weight.

    Args:
      model: the tables.
      batch: from `skipgram_blocks.batches`.
      window: as the batch was made with.
      negatives: how many draws the negatives of a pair stand for.
      share: of the batch that a device has: weights of all devices are then 1 together, and
        the gradient is the sum over the batch.
    """
    centre, other = model.centres(batch["centres"]), model.others(batch["others"])
    scores = jnp.einsum("btd,bmd->btm", centre, other)
    left, right = batch["left"][..., None], batch["right"][..., None]
    size = batch["centres"].shape[1]
    contexts = size + 2 * window
    offset = jnp.arange(contexts)[None, :] - window - jnp.arange(size)[:, None]
    pair = (offset >= -left) & (offset <= right) & (offset != 0)
    drawn = (left + right) * (negatives / (scores.shape[2] - contexts))
    total = jnp.where(pair, jax.nn.softplus(-scores[..., :contexts]), 0).sum()
    total += (drawn * jax.nn.softplus(scores[..., contexts:])).sum()
    return total, jnp.float32(share)


def fit(
    options: Word2VecOptions,
    vocabulary: int,
    sentences: Iterable[Any],
    *,
    counts: np.ndarray | None = None,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    sparse: SparseOptions = SparseOptions(),
    progress: Progress = quiet,
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
      sparse: where the tables lie.
      progress: called now and then.

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
    program = SparseProgram(
        partial(
            loss, window=options.window, negatives=options.negatives, share=1 / len(devices)
        ),
        lambda rngs: SkipGram(vocabulary, options.dim, options.optimizer, rngs),
        optax.identity(),
        batch=_shapes(shape),
        devices=devices,
        options=sparse,
        rate=optax.linear_schedule(1.0, options.last_rate, steps),
    )
    state = program.init(seed)
    random = np.random.default_rng((seed, 1))
    losses, done = [], 0
    for _ in range(options.passes):
        stream = batches(sentences_of(sentences, vocabulary), shape, noise, kept, random)
        state, mean, done = _pass(program, state, stream, done, tokens * options.passes, progress)
        losses.append(mean)
    placed, table = program.tables["centres"], state.tables["centres"]
    return NodeEmbeddings(placed.whole(table)[0], tuple(losses))


def _pass(
    program: SparseProgram,
    state: SparseState,
    stream: Iterable[dict[str, np.ndarray]],
    done: int,
    tokens: int,
    progress: Progress,
) -> tuple[SparseState, float, int]:
    """One pass; the mean loss of its pairs, and the tokens that are done then."""
    total, pairs, lately, lately_pairs = 0.0, 0, [], 0
    for step, batch in enumerate(stream):
        state, metrics = program.step(state, batch)
        lately.append(metrics["loss"])
        lately_pairs += int(batch["left"].sum() + batch["right"].sum())
        done += int((batch["centres"] >= 0).sum())
        if step % _STEPS_BETWEEN_REPORTS == _STEPS_BETWEEN_REPORTS - 1:
            recent = float(np.sum(jax.device_get(lately)))
            progress(done, tokens, recent / max(lately_pairs, 1))
            total, pairs, lately, lately_pairs = total + recent, pairs + lately_pairs, [], 0
    total, pairs = total + float(np.sum(jax.device_get(lately))), pairs + lately_pairs
    if not pairs:
        raise DataError("no token has another beside it; give sentences of at least two tokens")
    progress(done, tokens, total / pairs)
    return state, total / pairs, done


def _counted(sentences: Iterable[Any], vocabulary: int) -> np.ndarray:
    counts = np.zeros(vocabulary, np.int64)
    for flat, _ in sentences_of(sentences, vocabulary):
        counts += np.bincount(flat, minlength=vocabulary)
    return counts


def _shapes(shape: BlockShape) -> dict[str, jax.ShapeDtypeStruct]:
    sizes = {
        "centres": shape.centres,
        "others": shape.contexts + shape.shared,
        "left": shape.centres,
        "right": shape.centres,
    }
    return {
        name: jax.ShapeDtypeStruct((shape.blocks, size), jnp.int32) for name, size in sizes.items()
    }
