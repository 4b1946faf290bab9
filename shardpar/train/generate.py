"""Continues a text with a trained model, token by token, in one jitted loop.

The model is any `model(tokens) -> logits`; each token is predicted from the last
`window` ones by a whole forward pass, so nothing is asked of the model but causality.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.capture.model import AbstractModel
from shardpar.errors import UserError


def generate(
    model: AbstractModel,
    params: dict[str, Any],
    rest: dict[str, Any],
    prompt: np.ndarray,
    *,
    tokens: int,
    window: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Samples a continuation.

    Args:
      model: the captured model.
      params: its parameters by path, sharded in any way.
      rest: its other variables.
      prompt: int32[n] token ids, at least one.
      tokens: how many to add.
      window: most tokens the model sees at once, its training length.
      temperature: 0 always takes the likeliest token.
      top_k: sample among so many likeliest tokens; None among all.
      seed: the same seed gives the same text.

    Returns:
      int32[n + tokens], the prompt included.

    Raises:
      UserError: the prompt is empty, or the model does not return logits.
    """
    prompt = np.asarray(prompt, np.int32)
    if prompt.size == 0:
        raise UserError("the prompt is empty; give at least one token to continue from")
    context = prompt[-window:]
    buffer = np.zeros((1, window), np.int32)
    buffer[0, : context.size] = context
    _require_logits(model, params, rest, buffer)
    run = _sampler(model, tokens, float(temperature), top_k)
    added = run(params, rest, buffer, jnp.int32(context.size), jax.random.key(seed))
    return np.concatenate([prompt, np.asarray(added)])


def _require_logits(model: AbstractModel, params: Any, rest: Any, buffer: np.ndarray) -> None:
    def call(params: Any, rest: Any, tokens: Any) -> Any:
        module: Any = model.merge(params, rest)
        module.eval()
        return module(tokens)

    made = jax.eval_shape(call, params, rest, buffer)
    shape = getattr(made, "shape", None)
    if shape is None or len(shape) != 3:
        got = f"an array of shape {shape}" if shape is not None else f"a {type(made).__name__}"
        raise UserError(
            "text can be sampled from a model that returns logits [batch, length, vocabulary]; "
            f"this one returns {got}"
        )


def _sampler(model: AbstractModel, tokens: int, temperature: float, top_k: int | None) -> Any:
    @jax.jit
    def run(params: Any, rest: Any, buffer: Any, length: Any, key: Any) -> Any:
        module: Any = model.merge(params, rest)
        module.eval()

        def step(carry: Any, key: Any) -> Any:
            buffer, length = carry
            logits = module(buffer)[0, length - 1].astype(jnp.float32)
            token = _choose(logits, key, temperature, top_k)
            full = length == buffer.shape[1]
            buffer = jnp.where(full, jnp.roll(buffer, -1, axis=1), buffer)
            place = jnp.minimum(length, buffer.shape[1] - 1)
            return (buffer.at[0, place].set(token), place + 1), token

        _, added = jax.lax.scan(step, (buffer, length), jax.random.split(key, tokens))
        return added

    return run


def _choose(logits: jax.Array, key: jax.Array, temperature: float, top_k: int | None) -> jax.Array:
    if temperature == 0.0:
        return jnp.argmax(logits).astype(jnp.int32)
    if top_k is not None and top_k < logits.shape[0]:
        smallest = jax.lax.top_k(logits, top_k)[0][-1]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
