"""The programs of one round, the same for a client in a simulation and one in its own process.

In deployment a client calls `client_update` over its own examples and the server `added` over what
came, in client order, and `server_update`. `simulate` runs many clients in one program instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.examples import Examples
from shardpar.fl.task import Task

Tree = Any


@partial(jax.jit, static_argnums=(0, 1))
def client_update(
    task: Task, algorithm: Algorithm, broadcast: Tree, kept: Tree, examples: Examples
) -> tuple[Tree, Tree]:
    """One client's round: (what it sends, what it keeps); compiled once for each shape.

    Args:
      task: the model and its loss.
      algorithm: whose client this is.
      broadcast: what the server sent.
      kept: from its last round, or `algorithm.client_init` of the run's first parameters.
      examples: its own; see `examples.order_of`.
    """
    return algorithm.client(task, broadcast, kept, examples)


def message_shapes(
    task: Task, algorithm: Algorithm, params: Any, fields: Mapping[str, np.ndarray]
) -> Tree:
    """Shapes of what a client sends, which all parties know before it does; nothing is computed.

    Args:
      task: the model and its loss.
      algorithm: whose client this is.
      params: the global model, or its shapes.
      fields: of examples, [rows, ...] each; how many rows makes no difference.
    """
    arrays = {
        name: jax.ShapeDtypeStruct((1, *field.shape[1:]), field.dtype)
        for name, field in fields.items()
    }
    examples = Examples(arrays, jax.ShapeDtypeStruct((1, 1), np.int32))

    def client(params: Any, examples: Examples) -> Tree:
        state = algorithm.server_init(params)
        kept = algorithm.client_init(params)
        return algorithm.client(task, algorithm.broadcast(state), kept, examples)[0]

    return jax.eval_shape(client, params, examples)


@partial(jax.jit, static_argnums=0)
def server_update(algorithm: Algorithm, state: Tree, total: Tree, clients: Any) -> Tree:
    """The server's state after a round; see `Algorithm.server`."""
    return algorithm.server(state, total, clients)


@jax.jit
def added(total: Tree, sent: Tree) -> Tree:
    """The sum of two messages, leaf by leaf."""
    return jax.tree.map(jnp.add, total, sent)


def gathered(algorithm: Algorithm, sent: Iterable[Tree]) -> tuple[Tree, np.int32]:
    """What the server reads of the clients' messages, given in client order, and how many.

    Sums are float32, added one after the other; where the algorithm must see each, they are
    stacked.

    Raises:
      ValueError: there is no message.
    """
    messages = list(sent)
    if not messages:
        raise ValueError("no client sent anything; a round needs at least one")
    if algorithm.aggregate == "each":
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *messages)
        return stacked, np.int32(len(messages))
    total = messages[0]
    for message in messages[1:]:
        total = added(total, message)
    return total, np.int32(len(messages))
