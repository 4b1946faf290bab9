"""From a user's options to private rounds of a simulation: the same sums, noise from a seed.

Each kind adds noise as wide as its deployment does, and writes down what that would release; but
whoever knows the seed can take the noise away, so a simulated model must not be given out as if it
hid anyone. Distributed and local noise is drawn for the sum at once, on no grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from shardpar.errors import ConfigError
from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.private_sgd import PrivateSGD
from shardpar.fl.algorithms.private_users import PrivateUsers
from shardpar.fl.ledger import Budget, Release, epsilon_of, noise_multiplier_for
from shardpar.fl.privacy import UserMechanism, release_of
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.private_rounds import (
    budget_of,
    distributed_noise,
    example_noise,
    user_mechanism,
)

_LEAST_NOISE = 0.05


@dataclass(frozen=True)
class SimulatedPrivacy:
    """What privacy makes of an algorithm.

    Attributes:
      algorithm: with its noise from a seed.
      release: of each round, to be written down before its result is used. Where each client keeps
        a ledger of its own, that of one who takes part in every round.
      budget: of all rounds.
    """

    algorithm: Algorithm
    release: Release
    budget: Budget


def simulated_privacy(
    options: PrivacyOptions,
    inner: Algorithm,
    *,
    rounds: int,
    dims: int,
    clients: float,
    records: int,
    epochs: int,
    threshold: int,
    seed: int,
) -> SimulatedPrivacy:
    """Puts a kind of privacy around an algorithm, with noise that so many rounds can afford.

    Args:
      options: of the job; not of kind "none".
      inner: what is trained without privacy.
      rounds: of the job.
      dims: of the model.
      clients: of a round; expected, where each is drawn by itself.
      records: a client has on average, for "example".
      epochs: of a client in a round, for "example".
      threshold: of secure aggregation, for "distributed".
      seed: of the noise.

    Raises:
      ConfigError: the kind and the algorithm do not fit, or no noise hides so many rounds.
      SpecError: too many clients or dims for the grid.

    >>> options = PrivacyOptions(kind="central", noise_multiplier=1.5)
    >>> found = simulated_privacy(
    ...     options, FedAvg(), rounds=3, dims=9, clients=10, records=5, epochs=1, threshold=7,
    ...     seed=0,
    ... )
    >>> found.release.noise_multiplier, found.budget.unit
    (1.5, 'user')
    """
    budget = budget_of(options)
    if options.kind == "example":
        return _example(options, inner, rounds, dims, records, epochs, seed)
    if options.kind == "central":
        mechanism = user_mechanism(options, clients=clients, rounds=rounds, dims=dims)
        release, spread = mechanism.release(dims, options.sampling_rate), 1.0
    elif options.kind == "distributed":
        noise = distributed_noise(
            options, rounds=rounds, dims=dims, most=round(clients), least=threshold
        )
        mechanism, release = noise.mechanism, noise.release()
        # All clients stay to the end here, and each adds what the threshold's need.
        spread = noise.sigma * math.sqrt(clients) / noise.steps
    elif options.kind == "local":
        mechanism, release = _local(options, rounds, dims, clients)
        spread = 2 * math.sqrt(clients)
    else:
        raise ConfigError(f"privacy.kind {options.kind!r} adds no noise")
    algorithm = PrivateUsers(inner, mechanism, options.clip, seed, spread)
    return _affordable(SimulatedPrivacy(algorithm, release, budget))


def _local(
    options: PrivacyOptions, rounds: int, dims: int, clients: float
) -> tuple[UserMechanism, Release]:
    multiplier = options.noise_multiplier or noise_multiplier_for(
        budget_of(options), rounds, lambda z: release_of(z, dims)
    )
    return UserMechanism(multiplier, clients), release_of(multiplier, dims)


def _example(
    options: PrivacyOptions,
    inner: Algorithm,
    rounds: int,
    dims: int,
    records: int,
    epochs: int,
    seed: int,
) -> SimulatedPrivacy:
    if not isinstance(inner, FedAvg):
        raise ConfigError(
            f"privacy.kind 'example' trains by DP-SGD, not by {type(inner).__name__}; write "
            "federated.algorithm=fedavg"
        )
    algorithm = PrivateSGD(
        records=max(1, records),
        learning_rate=inner.learning_rate,
        clip=options.clip,
        sampling_rate=options.sampling_rate,
        steps=epochs * math.ceil(1 / options.sampling_rate),
        server_learning_rate=inner.server_learning_rate,
        noise="simulated",
        seed=seed,
    )
    noise = example_noise(options, algorithm, rounds=rounds, dims=dims)
    algorithm = replace(algorithm, noise_multiplier=noise)
    return _affordable(SimulatedPrivacy(algorithm, algorithm.release(dims), budget_of(options)))


def _affordable(found: SimulatedPrivacy) -> SimulatedPrivacy:
    """Itself, if its budget allows a first round."""
    noise = found.release.noise_multiplier
    # Accounting for next to no noise would take all memory there is.
    costs = epsilon_of([found.release], found.budget.delta) if noise > _LEAST_NOISE else math.inf
    if costs > found.budget.epsilon:
        raise ConfigError(
            f"one round with privacy.noise_multiplier={noise:g} costs "
            f"epsilon {costs:.3g} of {found.budget.epsilon:g}; write privacy.noise_multiplier=null "
            "for as much noise as all rounds need, or a larger privacy.epsilon"
        )
    return found
