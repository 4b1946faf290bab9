"""Many clients in one program: parties are parts of a mesh, and a round is one reshard.

Clients lie along the mesh axis "clients". Each device goes through its own in chunks and adds up
what they send, which leaves a Partial sum on every device; a psum makes it Replicate, and the
server's function, the same as in deployment, divides by the weights that are in the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh

from shardpar.errors import RunError
from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.algorithms.fedbuff import FedBuff
from shardpar.fl.clients import ClientData
from shardpar.fl.cohort import Cohort, LocalWork, pack
from shardpar.fl.examples import Examples
from shardpar.fl.kept import KeptStates
from shardpar.fl.rounds import server_update
from shardpar.fl.task import Task
from shardpar.lowering.shardings import batch_sharding, over_axis, replicated

Tree = Any

AXIS = "clients"
_ACCELERATOR_CHUNK = 16


class Rounding(Protocol):
    """How secure aggregation rounds what clients send; `packing.Packing` does."""

    def rounded(self, tree: Tree) -> Tree:
        """A client's message as int32."""
        ...

    def read(self, integers: Tree) -> Tree:
        """The tree of sums that a sum of those, with wrap-around, stands for."""
        ...


@dataclass(frozen=True, eq=False)
class Simulation:
    """A task and an algorithm on the devices that are here.

    Attributes:
      task: the model and its loss.
      algorithm: whose rounds these are.
      work: what a client does in a round.
      devices: along which clients are split.
      chunk: clients that a device trains at a time. One by one is fastest on CPUs, whose cores one
        client fills; accelerators need many at once.
      rounding: of messages before they are added up, as under secure aggregation; None adds floats.

    Build one with `simulation`.
    """

    task: Task
    algorithm: Algorithm
    work: LocalWork
    devices: tuple[jax.Device, ...]
    chunk: int
    rounding: Rounding | None = None

    @cached_property
    def mesh(self) -> Mesh:
        """All devices in one row."""
        return Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    def init(self, params: Tree) -> Tree:
        """The server's state before the first round, on every device."""
        state = jax.jit(self.algorithm.server_init)(params)
        return jax.device_put(state, replicated(self.mesh))

    def kept(self, params: Tree) -> KeptStates:
        """What clients keep, of none as yet."""
        return KeptStates(jax.jit(self.algorithm.client_init)(params))

    def pack(
        self,
        data: ClientData,
        clients: Sequence[int] | np.ndarray,
        round_: int | Sequence[int],
        before: Placed | None = None,
    ) -> Placed:
        """A round's clients with their examples, on the devices; may run in another thread.

        What an earlier round of the same data has placed is taken over where it can be.
        """
        cohort = pack(
            data, clients, self.work, round_=round_, devices=len(self.devices),
            multiple=self.chunk, before=before and before.cohort,
        )  # fmt: skip
        split = batch_sharding(self.mesh, (AXIS,))
        if before is not None and cohort.arrays is before.cohort.arrays:
            arrays = before.arrays
        else:
            arrays = {name: jax.device_put(x, split) for name, x in cohort.arrays.items()}
        return Placed(cohort, arrays, jax.device_put(cohort.order, split))

    def round(
        self, state: Tree, kept: KeptStates, placed: Placed
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """One round: (the server's state, sums of `loss` and `weight` over the clients).

        `kept` takes what the clients keep.

        Raises:
          RunError: under secure aggregation, an update is not finite.
        """
        clients = placed.cohort.clients
        before = self._split(kept.gather(clients))
        broadcast = self.algorithm.broadcast(state)
        total, after = self._clients(broadcast, placed.arrays, placed.order, before)
        kept.scatter(clients, after)
        if self.rounding is not None:
            total = self._read(total)
        state = server_update(self.algorithm, state, total, np.int32(placed.cohort.count))
        return state, {name: jnp.sum(total[name]) for name in ("loss", "weight")}

    def stale_round(
        self, state: Tree, sent: Tree, versions: np.ndarray, staleness: np.ndarray, placed: Placed
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """One round of an asynchronous algorithm, whose clients began at different models.

        Args:
          state: of the server.
          sent: what was broadcast, of several versions, stacked on a first dim.
          versions: int32 [places], which of them each client began with.
          staleness: float32 [places], how many steps the server has taken since.
          placed: the clients, in the order of `versions`.
        """
        extra = self._split((versions.astype(np.int32), staleness.astype(np.float32)))
        total, _ = self._stale_clients(sent, placed.arrays, placed.order, extra)
        state = server_update(self.algorithm, state, total, np.int32(placed.cohort.count))
        return state, {name: jnp.sum(total[name]) for name in ("loss", "weight")}

    def _read(self, total: Tree) -> Tree:
        assert self.rounding is not None
        found = jax.device_get(total)
        if found["broken"]:
            raise RunError(
                f"{found['broken']} clients sent updates that are not finite, of which secure "
                "aggregation makes nothing; lower federated.learning_rate"
            )
        return self.rounding.read(found["integers"])

    def _split(self, tree: Tree) -> Tree:
        return jax.device_put(tree, batch_sharding(self.mesh, (AXIS,)))

    @cached_property
    def _clients(self) -> Any:
        """(broadcast, arrays, order, kept) -> (total, kept)."""

        def client(broadcast: Tree, examples: Examples, kept: Tree) -> tuple[Tree, Tree]:
            return self.algorithm.client(self.task, broadcast, kept, examples)

        return self._mapped(client)

    @cached_property
    def _stale_clients(self) -> Any:
        algorithm = self.algorithm
        assert isinstance(algorithm, FedBuff)

        def client(sent: Tree, examples: Examples, extra: Tree) -> tuple[Tree, Tree]:
            version, staleness = extra
            broadcast = jax.tree.map(lambda x: x[version], sent)
            update, _ = algorithm.client(self.task, broadcast, (), examples)
            return algorithm.discounted(update, staleness), ()

        return self._mapped(client)

    def _as_added(self, update: Tree, order: jax.Array) -> Tree:
        if self.rounding is None:
            return _as_sent(update, order)
        broken = jnp.stack([jnp.any(~jnp.isfinite(x)) for x in jax.tree.leaves(update)]).any()
        return {"integers": self.rounding.rounded(update), "broken": broken.astype(jnp.int32)}

    def _mapped(self, client: Any) -> Any:
        chunk = self.chunk
        alone = self.algorithm.aggregate == "sum"

        def one(broadcast: Tree, arrays: Tree, order: jax.Array, own: Tree) -> tuple[Tree, Tree]:
            return client(broadcast, Examples(arrays, order), own)

        def some(broadcast: Tree, arrays: Tree, order: jax.Array, own: Tree) -> tuple[Tree, Tree]:
            if chunk == 1:
                return one(broadcast, arrays, order, own)
            return jax.vmap(one, in_axes=(None, None, 0, 0))(broadcast, arrays, order, own)

        def added(broadcast: Tree, arrays: Tree, order: jax.Array, own: Tree) -> Tree:
            return self._as_added(one(broadcast, arrays, order, own)[0], order)

        def local(broadcast: Tree, arrays: Tree, order: jax.Array, own: Tree) -> tuple[Tree, Tree]:
            if chunk > 1:
                order, own = jax.tree.map(
                    lambda x: x.reshape(-1, chunk, *x.shape[1:]), (order, own)
                )
            first = jax.tree.map(lambda x: x[(0,) * (1 + (chunk > 1))], (order, own))
            shapes = jax.eval_shape(added, broadcast, arrays, *first)

            def body(total: Tree, xs: Any) -> tuple[Tree, Tree]:
                update, after = some(broadcast, arrays, *xs)
                if not alone:
                    return total, (update, after)
                if chunk > 1:
                    update = jax.vmap(self._as_added)(update, xs[0])
                    update = jax.tree.map(lambda x: jnp.sum(x, axis=0), update)
                else:
                    update = self._as_added(update, xs[0])
                return jax.tree.map(jnp.add, total, update), after

            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            total, out = lax.scan(body, zeros if alone else (), (order, own))
            if chunk > 1:
                out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
            if alone:
                return lax.psum(total, AXIS), out
            return out

        whole, split = over_axis(AXIS, False), over_axis(AXIS, True)
        return jax.jit(
            jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(whole, split, split, split),
                out_specs=(whole if alone else split, split),
                check_vma=False,
            )
        )


@dataclass(frozen=True, eq=False)
class Placed:
    """A cohort whose arrays and order are on the devices."""

    cohort: Cohort
    arrays: dict[str, jax.Array]
    order: jax.Array


def simulation(
    task: Task,
    algorithm: Algorithm,
    work: LocalWork | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    chunk: int | None = None,
    rounding: Rounding | None = None,
) -> Simulation:
    """A simulation on some devices, all that are here by default.

    Args:
      task: from `Task.of`.
      algorithm: one of `fl.algorithms`.
      work: batch, epochs and seed of the clients.
      devices: to split clients over.
      chunk: clients at a time on one device; None chooses by its kind.
      rounding: of secure aggregation, if the simulation is to come to the same sums.

    Raises:
      ValueError: the chunk is less than 1, or the algorithm looks at what rounding would add up.
    """
    found = tuple(devices or jax.devices())
    if chunk is None:
        chunk = 1 if found[0].platform == "cpu" else _ACCELERATOR_CHUNK
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    if rounding is not None and algorithm.aggregate != "sum":
        raise ValueError(f"{type(algorithm).__name__} sees every update; it cannot have their sum")
    return Simulation(task, algorithm, work or LocalWork(), found, chunk, rounding)


def _as_sent(update: Tree, order: jax.Array) -> Tree:
    """A client's message, rounded as one that is really sent is.

    XLA would fuse the message's last product with the sum that follows into one operation that
    rounds once, barrier or not. It cannot see through integers and a zero that it does not know.
    """
    zero = (jnp.ravel(order)[0] < -1).astype(jnp.uint32)

    def rounded(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.float32:
            return x
        bits = lax.bitcast_convert_type(x, jnp.uint32) ^ zero
        return lax.bitcast_convert_type(bits, jnp.float32)

    return jax.tree.map(rounded, update)
