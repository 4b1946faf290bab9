"""Configs of federations: chosen by their section, checked as a whole, saved and read again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from shardpar.config import load, to_gin, to_yaml
from shardpar.config.federated_rules import federated_rules
from shardpar.config.load import load_any
from shardpar.config.schema import FederatedConfig, RunConfig, field_hints, section_classes
from shardpar.errors import ConfigError
from shardpar.fl.clients import write_clients

FEDAVG = "configs/fedavg.gin"


def changed(**changes):
    """The default federation with keys such as data__clients changed."""
    config = FederatedConfig()
    for name, value in changes.items():
        section, key = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def test_a_key_of_federated_makes_a_planned_model_s_run_a_federation():
    assert isinstance(load_any(FEDAVG), FederatedConfig)
    assert isinstance(load_any(None), RunConfig)


def test_the_same_model_is_planned_without_one(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {source: mlp, hidden: [8]}\n")
    planned = load_any(str(tmp_path / "run.yaml"))
    assert isinstance(planned, RunConfig)
    federated = load_any(str(tmp_path / "run.yaml"), ["federated.algorithm=krum"])
    assert isinstance(federated, FederatedConfig)
    assert federated.model == planned.model


def test_tables_are_not_trained_by_a_federation():
    with pytest.raises(ConfigError, match="there is no section federated"):
        load_any("configs/fm.gin", ["federated.rounds=3"])


def test_a_federation_has_no_plan():
    with pytest.raises(ConfigError, match="is of a federation, which has no plan"):
        load(FEDAVG)


def test_reading_one_imports_neither_jax_nor_cryptography():
    code = (
        "import sys; from shardpar.config.load import load_any; "
        f"load_any({FEDAVG!r}, ['privacy.kind=central', 'secagg.enabled=true']); "
        "print([m for m in ('jax', 'flax', 'numpy', 'cryptography', 'grpc', 'dp_accounting')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("save", [to_gin, to_yaml])
def test_what_is_saved_loads_to_the_same_federation(tmp_path, save):
    changes = [
        "net.parties=[a, b]", "net.addresses=['aggregator=localhost:0']", "data.clients=2",
        "federated.cohort=null", "privacy.kind=central", "privacy.sampling_rate=0.5",
    ]  # fmt: skip
    config = load_any(FEDAVG, changes)
    path = tmp_path / f"saved.{save.__name__.removeprefix('to_')}"
    path.write_text(save(config))
    assert load_any(str(path)) == config
    assert config.net.parties == ("a", "b")
    assert config.net.address_of() == {"aggregator": "localhost:0"}


def test_a_folder_of_clients_is_found_beside_the_config(tmp_path):
    write_clients(tmp_path / "mine", [{"inputs": np.zeros((3, 64), np.float32)}])
    (tmp_path / "own.yaml").write_text(
        "model: {source: mlp}\nfederated: {rounds: 1}\n"
        "data: {format: clients, path: mine, eval_path: mine}\n"
    )
    config = load_any(str(tmp_path / "own.yaml"))
    assert config.data.path == config.data.eval_path == str(tmp_path / "mine")
    for wrong, message in (("nowhere", "there is no folder"), ("own.yaml", "is no folder")):
        with pytest.raises(ConfigError, match=message):
            load_any(str(tmp_path / "own.yaml"), [f"data.path={tmp_path / wrong}"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("federated.algoritm=krum", "did you mean federated.algorithm?"),
        ("federated.algorithm=krm", "did you mean 'krum'?"),
        ("federatd.rounds=3", "did you mean federated.rounds?"),
        ("privacy.kind=centrl", "did you mean 'central'?"),
        ("secagg.threshold=0.5", "must be a number > 0.5"),
        ("train.steps=3", "there is no key train.steps"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(given, message):
    with pytest.raises(ConfigError) as caught:
        load_any(FEDAVG, [given])
    assert message in str(caught.value)


def test_a_misspelt_section_alone_is_answered_too():
    with pytest.raises(ConfigError, match="did you mean section federated"):
        load_any(None, ["federatd.rounds=3"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__format": "clients", "data__path": "/clients", "federated__cohort": 1000},
        {"federated__algorithm": "krum", "federated__byzantine": 3, "data__clients": 9},
        {"federated__algorithm": "fedbuff"},
        {"secagg__enabled": True, "federated__algorithm": "scaffold"},
        {"privacy__kind": "central", "privacy__sampling_rate": 0.3},
        {"privacy__kind": "central", "federated__cohort": 5},
        {"privacy__kind": "example", "privacy__sampling_rate": 0.1, "federated__cohort": 5},
        {"privacy__kind": "distributed", "secagg__enabled": True},
        {"net__parties": ("a", "b"), "data__clients": 2, "net__addresses": ("aggregator=h:0",)},
        {"net__topology": "ring", "net__addresses": ("a=[::1]:80",)},
    ],
)
def test_what_can_be_meant_passes(changes):
    assert list(federated_rules(changed(**changes))) == []


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"data__format": "clients"}, "data.path"),
        ({"data__path": "/clients"}, "data.path"),
        ({"data__eval_path": "/clients"}, "data.eval_path"),
        ({"federated__cohort": 11}, "federated.cohort"),
        ({"federated__algorithm": "fedbuff", "federated__cohort": 3}, "federated.cohort"),
        ({"federated__algorithm": "krum", "federated__byzantine": 4}, "federated.byzantine"),
        ({"federated__algorithm": "median", "secagg__enabled": True}, "federated.algorithm"),
        ({"federated__algorithm": "fedbuff", "secagg__enabled": True}, "federated.algorithm"),
        ({"federated__algorithm": "fedprox", "privacy__kind": "example"}, "federated.algorithm"),
        ({"federated__algorithm": "krum", "privacy__kind": "local"}, "federated.algorithm"),
        ({"federated__algorithm": "scaffold", "privacy__kind": "central"}, "federated.algorithm"),
        ({"privacy__kind": "distributed"}, "secagg.enabled"),
        ({"privacy__kind": "local", "secagg__enabled": True}, "secagg.enabled"),
        ({"privacy__kind": "local", "privacy__sampling_rate": 0.5}, "privacy.sampling_rate"),
        (
            {"privacy__kind": "central", "privacy__sampling_rate": 0.5, "federated__cohort": 5},
            "federated.cohort",
        ),
        ({"net__parties": ("a", "a"), "data__clients": 2}, "net.parties"),
        ({"net__parties": ("aggregator",), "data__clients": 1}, "net.aggregator"),
        ({"net__parties": ("a", "b")}, "data.clients"),
        ({"net__addresses": ("aggregator",)}, "net.addresses"),
        ({"net__addresses": ("aggregator=host:70000",)}, "net.addresses"),
        (
            {"net__parties": ("a",), "data__clients": 1, "net__addresses": ("c=h:1",)},
            "net.addresses",
        ),
        ({"net__topology": "ring", "federated__algorithm": "median"}, "federated.algorithm"),
        ({"net__topology": "ring", "privacy__kind": "central"}, "privacy.kind"),
    ],
)
def test_what_cannot_be_meant_names_the_likeliest_culprit(changes, culprit):
    ((keys, text),) = federated_rules(changed(**changes))
    assert keys[0] == culprit
    assert any(word in text for word in ("; write ", "; leave ", "; give ", "; known are "))
    known = {
        f"{name}.{key}"
        for name, cls in section_classes(FederatedConfig).items()
        for key in field_hints(cls)
    }
    assert set(keys) <= known
