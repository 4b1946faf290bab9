"""LLaMA: rotary positions, RMSNorm, SwiGLU, grouped-query attention (Touvron et al., 2023).

Plain Flax: logical axis names on the parameters, nothing about devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from msgspec import Meta

import shardpar

# Attention sees only earlier tokens: MFU counts half its FLOPs.
CAUSAL = True


@dataclass(frozen=True)
class LlamaOptions:
    """Size of a LLaMA. `kv_heads` below `heads` is grouped-query attention."""

    vocab_size: Annotated[int, Meta(ge=2)] = 32000
    layers: Annotated[int, Meta(ge=1)] = 32
    width: Annotated[int, Meta(ge=1)] = 4096
    heads: Annotated[int, Meta(ge=1)] = 32
    kv_heads: Annotated[int, Meta(ge=1)] = 32
    mlp_width: Annotated[int, Meta(ge=1)] = 11008
    max_length: Annotated[int, Meta(ge=1)] = 4096
    rope_base: Annotated[float, Meta(gt=0.0)] = 10000.0
    norm_eps: Annotated[float, Meta(gt=0.0)] = 1e-5
    tied: bool = False
    attention: Literal["xla", "cudnn"] = "xla"

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 2 * heads ({2 * self.heads})"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )


def _param(rngs, shape, names, std=0.02):
    init = nnx.initializers.normal(std)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=names)


def project(x, weight):
    """Contracts the last dim of x with the first of weight, as one matrix product.

    XLA:CPU writes transposed copies of three-dimensional operands for the
    gradient; of matrices it does not.
    """
    rows = x.reshape(-1, x.shape[-1]) @ weight.reshape(weight.shape[0], -1)
    return rows.reshape(*x.shape[:-1], *weight.shape[1:])


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last dim, in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones((width,)), out_sharding=("embed",))
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale


def same_segment(segment_ids):
    """Which tokens of a packed row [batch, length] may see each other: bool [batch, 1, q, k]."""
    if segment_ids is None:
        return None
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def rotate(x, base, positions=None):
    """Rotary position embedding of x [batch, length, heads, head_dim] (Su et al., 2021).

    `positions` [batch, length] are those of packed rows; None counts from the row's start.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if positions is None:
        positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@shardpar.layer
class Embed(nnx.Module):
    """Token embeddings."""

    def __init__(self, options: LlamaOptions, rngs: nnx.Rngs):
        self.table = _param(rngs, (options.vocab_size, options.width), ("vocab", "embed"))

    def __call__(self, tokens):
        return jnp.take(self.table[...], tokens, axis=0)


@shardpar.layer
class Block(nnx.Module):
    """Pre-norm grouped-query attention and SwiGLU."""

    def __init__(self, options: LlamaOptions, rngs: nnx.Rngs):
        width, head_dim = options.width, options.width // options.heads
        out_std = 0.02 / (2 * options.layers) ** 0.5
        self.norm1 = RMSNorm(width, options.norm_eps)
        self.query = _param(rngs, (width, options.heads, head_dim), ("embed", "heads", "head_dim"))
        self.key_value = _param(
            rngs, (2, width, options.kv_heads, head_dim), (None, "embed", "kv_heads", "head_dim")
        )
        self.out = _param(
            rngs, (options.heads, head_dim, width), ("heads", "head_dim", "embed"), out_std
        )
        self.norm2 = RMSNorm(width, options.norm_eps)
        self.gate_up = _param(rngs, (2, width, options.mlp_width), (None, "embed", "mlp"))
        self.down = _param(rngs, (options.mlp_width, width), ("mlp", "embed"), out_std)
        self.rope_base, self.attention = options.rope_base, options.attention

    def __call__(self, x, segment_ids=None, positions=None):
        y = self.norm1(x)
        q = project(y, self.query[...])
        k, v = (project(y, self.key_value[i]) for i in range(2))
        y = jax.nn.dot_product_attention(
            rotate(q, self.rope_base, positions),
            rotate(k, self.rope_base, positions),
            v,
            mask=same_segment(segment_ids),
            is_causal=True,
            implementation=self.attention,
        )
        x = x + project(jax.lax.collapse(y, 2), jax.lax.collapse(self.out[...], 0, 2))
        y = self.norm2(x)
        y = jax.nn.silu(project(y, self.gate_up[0])) * project(y, self.gate_up[1])
        return x + project(y, self.down[...])


@shardpar.layer
class Head(nnx.Module):
    """The last norm and the logits; a tied head is given the embedding's table."""

    def __init__(self, options: LlamaOptions, rngs: nnx.Rngs):
        self.norm = RMSNorm(options.width, options.norm_eps)
        if not options.tied:
            self.table = _param(rngs, (options.vocab_size, options.width), ("vocab", "embed"))

    def __call__(self, x, table=None):
        table = self.table[...] if table is None else table
        return project(self.norm(x), table.T)


class Llama(nnx.Module):
    """tokens int32[batch, length] -> logits [batch, length, vocab].

    Rows packed with several sequences have `segment_ids`, the sequence each token is of, and
    `positions` in it, both int32[batch, length]; a token sees only its own sequence.
    """

    def __init__(self, options: LlamaOptions, rngs: nnx.Rngs):
        self.tied = options.tied
        self.embed = Embed(options, rngs)
        self.blocks = nnx.List([Block(options, rngs) for _ in range(options.layers)])
        self.head = Head(options, rngs)

    def __call__(self, tokens, segment_ids=None, positions=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, segment_ids, positions)
        return self.head(x, self.embed.table[...]) if self.tied else self.head(x)


def build(options: LlamaOptions, rngs: nnx.Rngs) -> Llama:
    return Llama(options, rngs)


def loss(model: Llama, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
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
