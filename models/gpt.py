"""GPT-2: a decoder-only transformer with learned positions (Radford et al., 2019).

Plain Flax: logical axis names on the parameters, nothing about devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from msgspec import Meta

import shardpar

# Attention sees only earlier tokens: MFU counts half its FLOPs.
CAUSAL = True


@dataclass(frozen=True)
class GPTOptions:
    """Size of a GPT. `width` is the model dim; `mlp_ratio * width` the hidden one."""

    vocab_size: Annotated[int, Meta(ge=2)] = 256
    layers: Annotated[int, Meta(ge=1)] = 4
    width: Annotated[int, Meta(ge=1)] = 256
    heads: Annotated[int, Meta(ge=1)] = 4
    max_length: Annotated[int, Meta(ge=1)] = 1024
    mlp_ratio: Annotated[int, Meta(ge=1)] = 4
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")


def _param(rngs, shape, names, std):
    init = nnx.initializers.normal(std) if std else nnx.initializers.zeros_init()
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=names)


def project(x, weight):
    """Contracts the last dim of x with the first of weight, as one matrix product.

    XLA:CPU writes transposed copies of three-dimensional operands for the
    gradient; of matrices it does not (a GPT step is a fifth faster).
    """
    rows = x.reshape(-1, x.shape[-1]) @ weight.reshape(weight.shape[0], -1)
    return rows.reshape(*x.shape[:-1], *weight.shape[1:])


def same_segment(segment_ids):
    """Which tokens of a packed row [batch, length] may see each other: bool [batch, 1, q, k]."""
    if segment_ids is None:
        return None
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


class LayerNorm(nnx.Module):
    """Normalises the last dim in float32, whatever dtype the activations have."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((width,)), out_sharding=("embed",))
        self.bias = _param(rngs, (width,), ("embed",), 0)

    def __call__(self, x):
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        centred = y - mean
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-5)
        return y.astype(x.dtype) * self.scale + self.bias


@shardpar.layer
class Embed(nnx.Module):
    """Token and position embeddings."""

    def __init__(self, options: GPTOptions, rngs: nnx.Rngs):
        self.table = _param(rngs, (options.vocab_size, options.width), ("vocab", "embed"), 0.02)
        self.position = _param(
            rngs, (options.max_length, options.width), ("position", "embed"), 0.01
        )

    def __call__(self, tokens, positions=None):
        x = jnp.take(self.table[...], tokens, axis=0)
        if positions is None:
            return x + self.position[: tokens.shape[1]]
        return x + jnp.take(self.position[...], positions, axis=0)


@shardpar.layer
class Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, options: GPTOptions, rngs: nnx.Rngs):
        width, heads = options.width, options.heads
        hidden, std = options.mlp_ratio * width, 0.02
        # GPT-2 scales the projections back into the residual stream by 1/sqrt(2 layers).
        out_std = std / (2 * options.layers) ** 0.5
        self.norm1 = LayerNorm(width, rngs)
        self.qkv = _param(
            rngs, (3, width, heads, width // heads), (None, "embed", "heads", "head_dim"), std
        )
        self.qkv_bias = _param(rngs, (3, heads, width // heads), (None, "heads", "head_dim"), 0)
        self.out = _param(
            rngs, (heads, width // heads, width), ("heads", "head_dim", "embed"), out_std
        )
        self.out_bias = _param(rngs, (width,), ("embed",), 0)
        self.norm2 = LayerNorm(width, rngs)
        self.up = _param(rngs, (width, hidden), ("embed", "mlp"), std)
        self.up_bias = _param(rngs, (hidden,), ("mlp",), 0)
        self.down = _param(rngs, (hidden, width), ("mlp", "embed"), out_std)
        self.down_bias = _param(rngs, (width,), ("embed",), 0)
        self.dropout = nnx.Dropout(options.dropout, rngs=rngs) if options.dropout else None

    def __call__(self, x, segment_ids=None):
        y = self.norm1(x)
        q, k, v = (project(y, self.qkv[i]) + self.qkv_bias[i] for i in range(3))
        y = jax.nn.dot_product_attention(q, k, v, mask=same_segment(segment_ids), is_causal=True)
        y = project(jax.lax.collapse(y, 2), jax.lax.collapse(self.out[...], 0, 2)) + self.out_bias
        x = x + self._drop(y)
        y = jax.nn.gelu(project(self.norm2(x), self.up[...]) + self.up_bias)
        return x + self._drop(project(y, self.down[...]) + self.down_bias)

    def _drop(self, y):
        return y if self.dropout is None else self.dropout(y)


@shardpar.layer
class Head(nnx.Module):
    """The last norm and the logits; a tied head is given the embedding's table."""

    def __init__(self, options: GPTOptions, rngs: nnx.Rngs):
        self.norm = LayerNorm(options.width, rngs)
        if not options.tied:
            self.table = _param(rngs, (options.vocab_size, options.width), ("vocab", "embed"), 0.02)

    def __call__(self, x, table=None):
        table = self.table[...] if table is None else table
        return project(self.norm(x), table.T)


class GPT(nnx.Module):
    """tokens int32[batch, length] -> logits [batch, length, vocab].

    Rows packed with several sequences have `segment_ids`, the sequence each token is of, and
    `positions` in it, both int32[batch, length]; a token sees only its own sequence.
    """

    def __init__(self, options: GPTOptions, rngs: nnx.Rngs):
        self.tied = options.tied
        self.embed = Embed(options, rngs)
        self.blocks = nnx.List([Block(options, rngs) for _ in range(options.layers)])
        self.head = Head(options, rngs)

    def __call__(self, tokens, segment_ids=None, positions=None):
        x = self.embed(tokens, positions)
        for block in self.blocks:
            x = block(x, segment_ids)
        return self.head(x, self.embed.table[...]) if self.tied else self.head(x)


def build(options: GPTOptions, rngs: nnx.Rngs) -> GPT:
    return GPT(options, rngs)


def loss(model: GPT, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Sum of the next-token losses in nats, and how many tokens it is over.

    `segment_ids` and `positions` in the batch are those of packed rows; with `weights`, float of
    the targets' shape, tokens count by their weight.
    """
    logits = model(batch["inputs"], batch.get("segment_ids"), batch.get("positions"))
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_z = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    if "weights" not in batch:
        return jnp.sum(log_z - picked), jnp.float32(log_z.size)
    weights = batch["weights"].astype(jnp.float32)
    return jnp.sum(weights * (log_z - picked)), jnp.sum(weights)
