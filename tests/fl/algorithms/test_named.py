"""Every algorithm that a config can name, with every knob of it in its place."""

from __future__ import annotations

from typing import get_args

import pytest

from shardpar.fl.algorithms.coordinatewise import Coordinatewise
from shardpar.fl.algorithms.ditto import Ditto
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.fedavgm import FedAvgM
from shardpar.fl.algorithms.fedbuff import FedBuff
from shardpar.fl.algorithms.fednova import FedNova
from shardpar.fl.algorithms.fedopt import FedOpt
from shardpar.fl.algorithms.fedprox import FedProx
from shardpar.fl.algorithms.krum import Krum
from shardpar.fl.algorithms.named import algorithm_of
from shardpar.fl.algorithms.scaffold import Scaffold
from shardpar.fl.options import SEES_EACH, AlgorithmName, FederatedOptions

OF = {"learning_rate": 0.2, "server_learning_rate": 0.7}
GIVEN = {
    **OF, "momentum": 0.5, "server_momentum": 0.8, "mu": 0.4, "b1": 0.6, "b2": 0.95, "tau": 0.01,
    "trim": 0.3, "byzantine": 2, "chosen": 4, "buffer": 6, "staleness_exponent": 0.9,
}  # fmt: skip
STEPS = {**OF, "momentum": 0.5}
ADAPTIVE = {**STEPS, "b1": 0.6, "b2": 0.95, "tau": 0.01}
WANTED = {
    "fedavg": FedAvg(**STEPS),
    "fedprox": FedProx(mu=0.4, **STEPS),
    "fedavgm": FedAvgM(beta=0.8, **STEPS),
    "fedadam": FedOpt(rule="adam", **ADAPTIVE),
    "fedyogi": FedOpt(rule="yogi", **ADAPTIVE),
    "fedadagrad": FedOpt(rule="adagrad", **ADAPTIVE),
    "scaffold": Scaffold(population=9, **OF),
    "fednova": FedNova(**STEPS),
    "ditto": Ditto(mu=0.4, **STEPS),
    "fedbuff": FedBuff(buffer=6, exponent=0.9, **STEPS),
    "median": Coordinatewise(keep="median", trim=0.3, **STEPS),
    "trimmed_mean": Coordinatewise(keep="trimmed", trim=0.3, **STEPS),
    "krum": Krum(byzantine=2, chosen=4, **STEPS),
}


@pytest.mark.parametrize("name", get_args(AlgorithmName))
def test_an_algorithm_gets_the_knobs_it_has(name):
    found = algorithm_of(FederatedOptions(algorithm=name, **GIVEN), population=9)
    assert found == WANTED[name]
    assert (found.aggregate == "each") == (name in SEES_EACH)


@pytest.mark.parametrize("name", get_args(AlgorithmName))
def test_left_out_knobs_are_the_algorithm_s_own(name):
    kind = type(WANTED[name])
    own = {"population": 9} if name == "scaffold" else {}
    for field in ("rule", "keep"):
        if hasattr(WANTED[name], field):
            own[field] = getattr(WANTED[name], field)
    assert algorithm_of(FederatedOptions(algorithm=name), population=9) == kind(**own)
