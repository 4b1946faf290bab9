"""The contract between an algorithm and whatever runs its rounds, simulation or deployment.

An algorithm is a frozen dataclass of pure functions. What a client sends is a pytree of *sums*:
already multiplied by the client's weight, with the weights beside them, so that any way to add up
(a scan, a psum, a masked sum that hides every addend) gives the same and the server divides once.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from shardpar.fl.examples import Examples
from shardpar.fl.task import Params, Task

Tree = Any


@runtime_checkable
class Algorithm(Protocol):
    """What a federated algorithm is.

    Attributes:
      aggregate: "sum": the server sees the sum of the updates only, which secure aggregation can
        give it. "each": it sees every one (median, Krum), stacked on a first dim.
    """

    aggregate: ClassVar[Literal["sum", "each"]]

    def server_init(self, params: Params) -> Tree:
        """The server's state before the first round; `state["params"]` is the global model."""
        ...

    def client_init(self, params: Params) -> Tree:
        """What a client keeps between its rounds before its first one; () if nothing."""
        ...

    def broadcast(self, state: Tree) -> Tree:
        """What every client of a round is sent."""
        ...

    def client(
        self, task: Task, broadcast: Tree, kept: Tree, examples: Examples
    ) -> tuple[Tree, Tree]:
        """One client's round: (what it sends, what it keeps).

        What it sends is a dict of sums over its data: `weight` (float32 scalar), `loss`, and
        whatever the algorithm adds up. A client without examples sends zeros.
        """
        ...

    def server(self, state: Tree, total: Tree, clients: Any) -> Tree:
        """The server's state after a round.

        Args:
          state: before.
          total: the sum of what the clients sent; or all of it, stacked, if `aggregate` is "each".
          clients: int32 scalar, how many clients are in `total`.
        """
        ...
