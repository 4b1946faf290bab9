"""From a user's options to mechanisms, and the order in which a round and its ledger go.

Central: ask `Ledger.allows`; let clients train and clip; add up; `released_sum` adds the noise,
writes the release down and only then hands over the result. Distributed: `begin_distributed` writes
it down before clients start, for unmasking is what reveals their sum. Example and local: each
client keeps a ledger of its own, and appends before it sends.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from shardpar.errors import ConfigError
from shardpar.fl.algorithms.private_sgd import PrivateSGD
from shardpar.fl.ledger import Budget, Ledger, Release, noise_multiplier_for
from shardpar.fl.privacy import DistributedNoise, UserMechanism, release_of
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.streams import Randomness

Tree = Any


def budget_of(options: PrivacyOptions) -> Budget:
    """What a ledger is opened with.

    >>> budget_of(PrivacyOptions(kind="example")).unit
    'record'
    """
    unit = "record" if options.kind == "example" else "user"
    return Budget(options.epsilon, options.delta, unit)


def user_mechanism(
    options: PrivacyOptions, *, clients: float, rounds: int, dims: int
) -> UserMechanism:
    """The mechanism for central noise that so many rounds can afford.

    Args:
      options: of the job; a noise multiplier given there is taken as it is.
      clients: expected in a round.
      rounds: of the job.
      dims: of an update.

    Raises:
      ConfigError: another kind of privacy, or more rounds than any noise can hide.
    """
    _check_kind(options, "central")

    def mechanism(noise: float) -> UserMechanism:
        return UserMechanism(noise, clients, options.adaptive_quantile)

    if options.noise_multiplier is not None:
        return mechanism(options.noise_multiplier)
    return mechanism(
        noise_multiplier_for(
            budget_of(options),
            rounds,
            lambda z: release_of(z, dims + 1, sampling_rate=options.sampling_rate),
        )
    )


def distributed_noise(
    options: PrivacyOptions, *, rounds: int, dims: int, most: int, least: int
) -> DistributedNoise:
    """The clients' noise that so many rounds can afford.

    Args:
      options: of the job; `sampling_rate` must be 1, for the aggregator knows whom it asks.
      rounds: of the job.
      dims: of an update.
      most: clients of a round.
      least: the threshold of secure aggregation.

    Raises:
      ConfigError: another kind of privacy, a sampling rate, or too many rounds.
      SpecError: too many clients or dims for 32 bits.
    """
    _check_kind(options, "distributed")
    if options.sampling_rate != 1:
        raise ConfigError(
            f"privacy sampling_rate {options.sampling_rate:g} with kind distributed: the aggregator"
            " knows who takes part, so sampling hides nobody from it; use 1"
        )

    def noise(multiplier: float) -> DistributedNoise:
        # Sums are divided by everyone who was asked: a fixed number.
        mechanism = UserMechanism(multiplier, most, options.adaptive_quantile)
        return DistributedNoise(mechanism, dims, most, least)

    if options.noise_multiplier is not None:
        return noise(options.noise_multiplier)
    return noise(noise_multiplier_for(budget_of(options), rounds, lambda z: noise(z).release()))


def example_noise(
    options: PrivacyOptions, algorithm: PrivateSGD, *, rounds: int, dims: int
) -> float:
    """The noise multiplier of DP-SGD that so many rounds of the algorithm can afford."""
    _check_kind(options, "example")
    if options.noise_multiplier is not None:
        return options.noise_multiplier
    one = algorithm.release(dims)

    def release(noise: float) -> Release:
        return Release(noise, one.sampling_rate, one.count, one.extra_epsilon, one.extra_delta)

    return noise_multiplier_for(budget_of(options), rounds, release)


def released_sum(
    ledger: Ledger,
    mechanism: UserMechanism,
    total: Tree,
    *,
    clip: float,
    sampling_rate: float,
    random: Randomness,
    what: str,
) -> Tree:
    """The noisy sum of what `PrivateUsers` clients sent, written down before it is handed over.

    Args:
      ledger: of the job.
      mechanism: of the job.
      total: the exact sums: "update" and "within"; "weight" and "loss" are left as they are.
      clip: of the round, `state["privacy"]["clip"]`.
      sampling_rate: with which each user was drawn; 1 if they were not drawn independently.
      random: secure.
      what: names the round in the ledger.

    Raises:
      RunError: the budget does not allow it: stop training with the model as it is.
    """
    update, within = mechanism.central(total["update"], float(total["within"]), clip, random)
    ledger.append(mechanism.release(_dims(total["update"]), sampling_rate), what)
    return {**total, "update": update, "within": np.float32(within)}


def begin_distributed(ledger: Ledger, noise: DistributedNoise, what: str) -> None:
    """Writes a round under secure aggregation down, before its clients start.

    Raises:
      RunError: the budget does not allow it: stop training.
    """
    ledger.append(noise.release(), what)


def _dims(update: Tree) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(update))


def _check_kind(options: PrivacyOptions, kind: str) -> None:
    if options.kind != kind:
        raise ConfigError(f"privacy kind is {options.kind!r}; this is for {kind!r}")
