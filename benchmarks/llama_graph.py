"""The layer graph of a LLaMA for the planner's benchmarks: traced, never run."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models import llama
from shardpar.capture.trace import trace
from shardpar.spec.graph import LayerGraph


def llama_graph(
    batch: int, length: int, layers: int, width: int, heads: int, mlp_width: int
) -> LayerGraph:
    """A model with as many key heads as heads and a vocabulary of 32,000, in bfloat16."""
    options = llama.LlamaOptions(
        vocab_size=32000, layers=layers, width=width, heads=heads, kv_heads=heads,
        mlp_width=mlp_width, max_length=length,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return trace(
        llama.loss,
        lambda rngs: llama.build(options, rngs),
        {"inputs": tokens, "targets": tokens},
        compute_dtype="bfloat16",
    ).graph
