"""From a user's options to an algorithm: the same one in a simulation and in a deployment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.algorithms.coordinatewise import Coordinatewise
from shardpar.fl.algorithms.ditto import Ditto
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.fedavgm import FedAvgM
from shardpar.fl.algorithms.fedbuff import FedBuff
from shardpar.fl.algorithms.fednova import FedNova
from shardpar.fl.algorithms.fedopt import FedOpt
from shardpar.fl.algorithms.fedprox import FedProx
from shardpar.fl.algorithms.krum import Krum
from shardpar.fl.algorithms.scaffold import Scaffold
from shardpar.fl.options import FederatedOptions


def algorithm_of(options: FederatedOptions, *, population: int) -> Algorithm:
    """The algorithm that a config names, without any privacy around it.

    Args:
      options: section `federated`.
      population: clients in all, taking part or not.

    >>> algorithm_of(FederatedOptions(algorithm="fedprox"), population=9)
    FedProx(mu=0.01, learning_rate=0.1, server_learning_rate=1.0, momentum=0.0)
    >>> algorithm_of(FederatedOptions(algorithm="fedyogi"), population=9).server_learning_rate
    0.03
    """
    return _MAKERS[options.algorithm](options, population)


def _server_rate(options: FederatedOptions, default: float = 1.0) -> float:
    return default if options.server_learning_rate is None else options.server_learning_rate


def _mu(options: FederatedOptions, default: float) -> float:
    return default if options.mu is None else options.mu


def _adaptive(options: FederatedOptions, _: int) -> Algorithm:
    return FedOpt(
        _RULES[options.algorithm],
        options.learning_rate,
        _server_rate(options, 0.03),
        options.momentum,
        options.b1,
        options.b2,
        options.tau,
    )


def _coordinatewise(options: FederatedOptions, _: int) -> Algorithm:
    return Coordinatewise(
        "median" if options.algorithm == "median" else "trimmed",
        options.trim,
        options.learning_rate,
        _server_rate(options),
        options.momentum,
    )


_RULES: Mapping[str, Literal["adam", "yogi", "adagrad"]] = {
    "fedadam": "adam",
    "fedyogi": "yogi",
    "fedadagrad": "adagrad",
}

_MAKERS: dict[str, Callable[[FederatedOptions, int], Algorithm]] = {
    "fedavg": lambda o, _: FedAvg(o.learning_rate, _server_rate(o), o.momentum),
    "fedprox": lambda o, _: FedProx(_mu(o, 0.01), o.learning_rate, _server_rate(o), o.momentum),
    "fedavgm": lambda o, _: FedAvgM(
        o.server_momentum, o.learning_rate, _server_rate(o), o.momentum
    ),
    "fedadam": _adaptive,
    "fedyogi": _adaptive,
    "fedadagrad": _adaptive,
    "scaffold": lambda o, n: Scaffold(n, o.learning_rate, _server_rate(o)),
    "fednova": lambda o, _: FedNova(o.learning_rate, _server_rate(o), o.momentum),
    "ditto": lambda o, _: Ditto(_mu(o, 0.1), o.learning_rate, _server_rate(o), o.momentum),
    "fedbuff": lambda o, _: FedBuff(
        o.buffer, o.learning_rate, _server_rate(o), o.momentum, o.staleness_exponent
    ),
    "median": _coordinatewise,
    "trimmed_mean": _coordinatewise,
    "krum": lambda o, _: Krum(o.byzantine, o.chosen, o.learning_rate, _server_rate(o), o.momentum),
}
