"""A simulated training round by round, from the options that a deployment of it has too.

All that is drawn comes from `federated.seed`: the model, the cohort of round r
(`cohort.sample_cohort`) and the order in which client c reads its examples in it
(`examples.order_of`). So a deployment in which client c does the same has, where no noise is drawn,
the same state after every round: bit for bit on CPUs, if the simulation adds up on one device one
client after the other, or by secure aggregation's integers on any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from shardpar.fl.algorithms.fedbuff import FedBuff
from shardpar.fl.clients import ClientData
from shardpar.fl.cohort import ahead, sample_cohort, sample_each
from shardpar.fl.event_clock import ServerStep, server_steps, training_times
from shardpar.fl.kept import KeptStates
from shardpar.fl.options import FederatedOptions
from shardpar.fl.rounds import message_shapes
from shardpar.fl.simulate import Placed, Simulation

Tree = Any


@dataclass(frozen=True, eq=False)
class Position:
    """A run after some rounds.

    Attributes:
      round_: how many rounds are done.
      state: of the server.
      kept: what clients keep; shared between positions of a run, and of the latest of them.
      sent: models that clients of an asynchronous run are still training with, by version.
    """

    round_: int
    state: Tree
    kept: KeptStates
    sent: Mapping[int, Tree] = field(default_factory=dict)

    @property
    def params(self) -> Tree:
        """The global model."""
        return self.state["params"]


@dataclass(frozen=True)
class RoundFigures:
    """What is known of a round.

    Attributes:
      clients: that took part.
      loss: mean over their examples as they were seen; None where it stays with the clients.
      sent_bytes: of models and updates on their way between server and clients, as float32.
      more: figures of some algorithms only.
    """

    clients: int
    loss: float | None
    sent_bytes: int
    more: Mapping[str, float] = field(default_factory=dict)


class Rounds(Protocol):
    """A training that can begin anywhere and go on."""

    def begin(self) -> Position:
        """Before the first round."""
        ...

    def after(self, position: Position) -> Iterator[tuple[Position, RoundFigures]]:
        """The rounds from there to the last."""
        ...


@dataclass(frozen=True, eq=False)
class CohortRounds:
    """Rounds that wait for all of their clients.

    Attributes:
      sim: with algorithm and local work.
      data: of all clients.
      cohort: the clients of a round, ascending.
      rounds: how many.
      seed: of the model.
      client_bytes: that a client is sent and sends in a round.
      tells_loss: whether clients send their loss; private ones do not.
    """

    sim: Simulation
    data: ClientData
    cohort: Callable[[int], np.ndarray]
    rounds: int
    seed: int
    client_bytes: int
    tells_loss: bool

    def begin(self) -> Position:
        """The model of the seed."""
        params = self.sim.task.init(self.seed)
        return Position(0, self.sim.init(params), self.sim.kept(params))

    def after(self, position: Position) -> Iterator[tuple[Position, RoundFigures]]:
        """One position for each round; the next cohort is read while one trains."""
        before: Placed | None = None

        def made(round_: int) -> Placed:
            nonlocal before
            before = self.sim.pack(self.data, self.cohort(round_), round_, before)
            return before

        state, kept = position.state, position.kept
        numbers = range(position.round_, self.rounds)
        for round_, placed in zip(numbers, ahead(made, numbers), strict=True):
            state, sums = self.sim.round(state, kept, placed)
            figures = _figures(self, placed.cohort.count, sums)
            yield Position(round_ + 1, state, kept), figures


@dataclass(frozen=True, eq=False)
class BufferedRounds:
    """Steps of a server that waits for a few updates only, by an event clock.

    Attributes:
      sim: of FedBuff.
      data: of all clients.
      clock: makes the server's steps, from the first.
      rounds: how many steps.
      seed: of the model.
      client_bytes: that a client is sent and sends for an update.
      tells_loss: whether clients send their loss.
    """

    sim: Simulation
    data: ClientData
    clock: Callable[[], Iterator[ServerStep]]
    rounds: int
    seed: int
    client_bytes: int
    tells_loss: bool = True

    def begin(self) -> Position:
        """The model of the seed, which all clients begin with."""
        params = self.sim.task.init(self.seed)
        state = self.sim.init(params)
        sent = {0: self.sim.algorithm.broadcast(state)}
        return Position(0, state, self.sim.kept(params), sent)

    def after(self, position: Position) -> Iterator[tuple[Position, RoundFigures]]:
        """One position for each step."""
        state, sent = position.state, dict(position.sent)
        steps = iter(self.clock())
        for _ in range(position.round_):
            next(steps)
        remaining = (next(steps) for _ in range(self.rounds - position.round_))

        before: Placed | None = None

        def made(_: int) -> tuple[ServerStep, Placed]:
            nonlocal before
            step = next(remaining)
            clients = [arrival.client for arrival in step.arrivals]
            launches = [arrival.launch for arrival in step.arrivals]
            before = self.sim.pack(self.data, clients, launches, before)
            return step, before

        for step, placed in ahead(made, range(position.round_, self.rounds)):
            state, sums = self._step(state, sent, step, placed)
            now = step.number + 1
            sent[now] = self.sim.algorithm.broadcast(state)
            sent = {version: sent[version] for version in sorted({*step.training, now})}
            figures = _figures(
                self,
                placed.cohort.count,
                sums,
                staleness=float(np.mean([arrival.staleness for arrival in step.arrivals])),
                clock_s=step.arrivals[-1].at_s,
            )
            yield Position(now, state, position.kept, sent), figures

    def _step(
        self, state: Tree, sent: Mapping[int, Tree], step: ServerStep, placed: Placed
    ) -> tuple[Tree, dict[str, jax.Array]]:
        used = sorted({arrival.version for arrival in step.arrivals})
        # As many as there could be, so that one compiled program does for all steps.
        padded = [*used, *used[:1] * (len(step.arrivals) - len(used))]
        stacked = jax.tree.map(lambda *x: np.stack(jax.device_get(x)), *(sent[v] for v in padded))
        places = placed.cohort.places
        there = places >= 0
        versions = np.zeros(len(places), np.int32)
        staleness = np.zeros(len(places), np.float32)
        versions[there] = [used.index(step.arrivals[p].version) for p in places[there]]
        staleness[there] = [step.arrivals[p].staleness for p in places[there]]
        return self.sim.stale_round(state, stacked, versions, staleness, placed)


def rounds_of(
    sim: Simulation,
    data: ClientData,
    options: FederatedOptions,
    *,
    sampling_rate: float = 1.0,
    tells_loss: bool = True,
) -> Rounds:
    """The training that a config describes.

    Args:
      sim: with the config's algorithm.
      data: of all clients.
      options: section `federated`.
      sampling_rate: below 1, each client is drawn into a round by itself.
      tells_loss: whether clients send their loss.
    """
    seed = options.seed
    client_bytes = bytes_of_client(sim, sim.task.init(seed), data)
    if isinstance(sim.algorithm, FedBuff):

        def clock() -> Iterator[ServerStep]:
            times_s = training_times(
                data.clients,
                median_s=options.training_s,
                spread=options.training_spread,
                seed=seed,
            )
            return server_steps(
                times_s, concurrency=options.concurrency, buffer=options.buffer, seed=seed
            )

        return BufferedRounds(sim, data, clock, options.rounds, seed, client_bytes)

    def cohort(round_: int) -> np.ndarray:
        if sampling_rate < 1:
            return sample_each(data.clients, sampling_rate, seed=seed, round_=round_)
        return sample_cohort(data.clients, options.cohort, seed=seed, round_=round_)

    return CohortRounds(sim, data, cohort, options.rounds, seed, client_bytes, tells_loss)


def state_after(rounds: Rounds, count: int, position: Position | None = None) -> Tree:
    """The server's state after so many rounds in all, on the host, for comparisons."""
    reached = position or rounds.begin()
    for later, _ in rounds.after(reached):
        reached = later
        if reached.round_ >= count:
            break
    return jax.device_get(reached.state)


def bytes_of_client(sim: Simulation, params: Tree, data: ClientData) -> int:
    """What a client is sent and sends in a round, in their own dtypes and without envelopes."""
    algorithm = sim.algorithm
    sent = message_shapes(sim.task, algorithm, params, data.fields)
    broadcast = jax.eval_shape(lambda p: algorithm.broadcast(algorithm.server_init(p)), params)
    leaves = jax.tree.leaves((sent, broadcast))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _figures(
    run: CohortRounds | BufferedRounds, count: int, sums: Mapping[str, jax.Array], **more: float
) -> RoundFigures:
    loss, weight = float(sums["loss"]), float(sums["weight"])
    told = run.tells_loss and weight > 0
    return RoundFigures(count, loss / weight if told else None, count * run.client_bytes, more)
