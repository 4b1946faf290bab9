"""From the sections of a config to a simulation of the whole federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from shardpar.errors import ConfigError, UserError
from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.algorithms.named import algorithm_of
from shardpar.fl.clients import ClientData
from shardpar.fl.cohort import LocalWork
from shardpar.fl.options import FederatedOptions
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.rounds import message_shapes
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.simulate import Rounding, simulation
from shardpar.fl.simulated_rounds import Rounds, rounds_of
from shardpar.fl.task import Task

if TYPE_CHECKING:
    from shardpar.fl.simulated_privacy import SimulatedPrivacy


@dataclass(frozen=True, eq=False)
class SimulatedFederation:
    """All that a simulated training is.

    Attributes:
      task: the model and its loss.
      rounds: of the training.
      privacy: what each of them is to be written down as; None without.
    """

    task: Task
    rounds: Rounds
    privacy: SimulatedPrivacy | None


def simulated_federation(
    task: Task,
    data: ClientData,
    federated: FederatedOptions,
    privacy: PrivacyOptions | None = None,
    secagg: SecAggOptions | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> SimulatedFederation:
    """Puts a federation together as its config says.

    Args:
      task: the model and its loss.
      data: of all clients.
      federated: algorithm and rounds.
      privacy: None for none.
      secagg: None for none; enabled, sums have its rounding, bit for bit.
      devices: to split clients over; None takes all.

    Raises:
      ConfigError: what the options ask for does not fit the data or each other.
      UserError: the extra `fl` is needed and not installed.
    """
    privacy, secagg = privacy or PrivacyOptions(), secagg or SecAggOptions()
    work = LocalWork(federated.batch, federated.epochs, federated.seed)
    _check_population(federated, data)
    algorithm = algorithm_of(federated, population=data.clients)
    private = None
    if privacy.kind != "none":
        private = _private(task, data, federated, privacy, secagg, algorithm)
        algorithm = private.algorithm
    rounding = None
    # Distributed noise has integers of its own, which its noise drowns.
    if secagg.enabled and privacy.kind != "distributed":
        if private is None:
            _check_weights(data, work, secagg)
        rounding = _rounding(task, data, federated, privacy, secagg, algorithm)
    sim = simulation(
        task, algorithm, work, devices=devices, chunk=federated.chunk, rounding=rounding
    )
    rate = privacy.sampling_rate if privacy.kind == "central" else 1.0
    rounds = rounds_of(sim, data, federated, sampling_rate=rate, tells_loss=private is None)
    return SimulatedFederation(task, rounds, private)


def most_clients(options: FederatedOptions, privacy: PrivacyOptions, data: ClientData) -> int:
    """How many a round may have at most: what a sum under secure aggregation has room for."""
    if privacy.kind == "central" and privacy.sampling_rate < 1:
        return data.clients
    return min(options.cohort or data.clients, data.clients)


def _rounding(
    task: Task,
    data: ClientData,
    federated: FederatedOptions,
    privacy: PrivacyOptions,
    secagg: SecAggOptions,
    algorithm: Algorithm,
) -> Rounding:
    if secagg.rounding != "nearest":
        raise ConfigError(
            "secagg.rounding is 'stochastic', drawn from secure randomness, which a simulation "
            "cannot repeat; write secagg.rounding=nearest"
        )
    try:
        from shardpar.fl.packing import Packing
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    shapes = message_shapes(task, algorithm, task.init(federated.seed), data.fields)
    return Packing.of(shapes, clients=most_clients(federated, privacy, data), options=secagg)


def _private(
    task: Task,
    data: ClientData,
    federated: FederatedOptions,
    privacy: PrivacyOptions,
    secagg: SecAggOptions,
    inner: Algorithm,
) -> SimulatedPrivacy:
    try:
        from shardpar.fl.simulated_privacy import simulated_privacy
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    clients = float(most_clients(federated, privacy, data))
    if privacy.kind == "central":
        clients *= privacy.sampling_rate
    return simulated_privacy(
        privacy,
        inner,
        rounds=federated.rounds,
        dims=sum(leaf.size for leaf in jax.tree.leaves(task.init(federated.seed))),
        clients=clients,
        records=round(float(data.counts.mean())),
        epochs=federated.epochs,
        threshold=secagg.stay_to_the_end(round(clients)),
        seed=federated.seed,
    )


def _check_population(options: FederatedOptions, data: ClientData) -> None:
    if (options.cohort or 0) > data.clients:
        raise ConfigError(
            f"federated.cohort is {options.cohort}, and there are {data.clients} clients; write "
            f"federated.cohort={data.clients} or less"
        )
    if not data.counts.any():
        raise ConfigError("no client has an example; there is nothing to train on")


def _check_weights(data: ClientData, work: LocalWork, options: SecAggOptions) -> None:
    most = int(data.counts.max(initial=0)) * work.epochs
    if most > options.most_weight:
        raise ConfigError(
            f"a client's weight is {most}, its examples in {work.epochs} epochs, and "
            f"secagg.most_weight is {options.most_weight:g}; write secagg.most_weight={most}"
        )


def _missing(error: ModuleNotFoundError) -> UserError | ModuleNotFoundError:
    if error.name is None or error.name.split(".")[0] not in {"cryptography", "dp_accounting"}:
        return error
    return UserError(f"{error.name} is not installed; run: pip install 'shardpar[fl]'")
