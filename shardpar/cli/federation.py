"""From a config to the parts of a deployed federation: its job, its links, its keys, its data."""

from __future__ import annotations

import hashlib
import json as json_format
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import FederatedConfig
from shardpar.errors import ConfigError, DataError, RunError, UserError
from shardpar.fl.evaluation import Evaluation
from shardpar.fl.job import Job, job_of
from shardpar.fl.net.addresses import dialled
from shardpar.fl.net.grpc_channel import GrpcChannel
from shardpar.fl.net.keys import read_keys
from shardpar.fl.net.limits import Limits
from shardpar.fl.options import FederatedDataOptions, NetOptions
from shardpar.fl.population import Population, population
from shardpar.fl.task import Task
from shardpar.run.durable import write_atomically

_OWN_KEYS = {
    "data": ("path", "eval_path"),
    "net": (
        "addresses", "certificates", "join_s", "wait_s", "patience_s", "retry_s", "most_retry_s",
    ),
    "privacy": ("ledger",),
}  # fmt: skip
"""Keys that each party may write as it likes; all others of these sections must agree."""
_SHARED = ("data", "federated", "privacy", "secagg", "net")


def shared_terms(config: FederatedConfig) -> dict[str, str]:
    """What all parties must have alike, as text by key.

    >>> terms = shared_terms(FederatedConfig())
    >>> terms["federated.rounds"], "net.addresses" in terms
    ('20', False)
    """
    terms = {f"model.{key}": _text(value) for key, value in config.model.options}
    path = Path(find_model(config.model.source))
    # Files may lie elsewhere in each organisation; what counts is what they hold.
    terms["model file"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for section in _SHARED:
        options = getattr(config, section)
        for key in fields(options):
            if key.name not in _OWN_KEYS.get(section, ()):
                terms[f"{section}.{key.name}"] = _text(getattr(options, key.name))
    return terms


def federation_of(config: FederatedConfig) -> tuple[Job, Any]:
    """(the job, the model's module) of a config.

    Raises:
      ConfigError: the config names nobody, or asks for what cannot be.
    """
    if not config.net.parties:
        raise ConfigError(
            "net.parties is empty; name who takes part, such as net.parties=['a', 'b', 'c']"
        )
    module = load_model_source(find_model(config.model.source))
    options = build_options(module, config.model)
    task = Task.of(lambda rngs: module.build(options, rngs), module.loss)
    records = _records(config)
    terms = {**shared_terms(config), "records of a client": _text(records)}
    job = job_of(
        task,
        config.federated,
        config.privacy,
        config.secagg,
        config.net,
        terms,
        records=records,
    )
    return job, module


def channel_of(config: FederatedConfig, party: str, patience_s: float) -> GrpcChannel:
    """A party's links to those that it has to do with.

    Args:
      config: of the federation.
      party: who this is.
      patience_s: how long another may be unreachable.

    Raises:
      UserError: keys or addresses are missing or wrong.
    """
    net = config.net
    ring = net.topology == "ring"
    everyone = net.parties if ring else (net.aggregator, *net.parties)
    addresses = dict(net.address_of())
    dial = dialled(party, everyone, addresses, aggregator=None if ring else net.aggregator)
    listens = party in addresses if ring else party == net.aggregator
    if party == net.aggregator and not ring and party not in addresses:
        raise UserError(
            f"net.addresses has no address of {party}, where it is to listen; write "
            f"net.addresses=['{party}=0.0.0.0:7400']"
        )
    return GrpcChannel.open(
        party,
        everyone,
        job=net.job,
        keys=read_keys(Path(net.certificates), party),
        dial=dial,
        listen=addresses[party] if listens else None,
        limits=limits_of(net, patience_s),
    )


def limits_of(net: NetOptions, patience_s: float) -> Limits:
    """How patient a channel is.

    >>> limits_of(NetOptions(), 30.0).patience_s
    30.0
    """
    return Limits(
        patience_s=patience_s,
        join_s=max(net.join_s, net.wait_s),
        receive_s=net.round_s,
        first_retry_s=net.retry_s,
        longest_retry_s=net.most_retry_s,
        max_message_bytes=net.max_message_bytes,
        window_bytes=2 * net.max_message_bytes + (1 << 20),
    )


def directory_of(config: FederatedConfig, name: str) -> Path:
    """Where a process of a federation keeps its state: the same place at every start."""
    given = config.train.run_dir
    return Path(given) if given else Path("runs") / config.net.job / name


def begin_directory(config: FederatedConfig, folder: Path) -> None:
    """Makes a run directory with the config in it.

    Raises:
      RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(config).encode())
        write_atomically(folder / "config.gin", to_gin(config).encode())
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error.strerror}; choose another --run-dir"
        ) from None


def rows_of(config: FederatedConfig, party: str) -> dict[str, np.ndarray]:
    """A party's own examples, by field.

    Raises:
      DataError: there are none, or the folder is of other parties.
    """
    number = config.net.parties.index(party)
    data = _population(config.data).data
    if data.clients == len(config.net.parties):
        return data.of_client(number)
    if data.clients == 1:
        # An organisation's own folder has nobody else in it.
        return data.of_client(0)
    raise DataError(
        f"{config.data.path} holds {data.clients} clients; a party's folder holds one, its own, or "
        f"all {len(config.net.parties)} in the order of net.parties"
    )


def evaluator(
    config: FederatedConfig, job: Job, module: Any
) -> Callable[[Any, int], dict[str, float]]:
    """What measures the server's model on held-out examples after a round; nothing without any."""
    held = _population(config.data).held
    if held is None:
        return lambda *_: {}
    evaluation = Evaluation(job.task, held, getattr(module, "predict", None))

    def evaluate(state: Any, round_: int) -> dict[str, float]:
        last = round_ == job.federated.rounds
        every = config.train.eval_every
        if not last and (every == 0 or round_ % every):
            return {}
        return evaluation(state["params"])

    return evaluate


def write_model(folder: Path, params: Mapping[str, Any]) -> Path:
    """Writes a model as `model.npz`, an array by the name of each parameter."""
    path = folder / "model.npz"
    with open(path, "wb") as file:
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in params.items()}
        np.savez(file, **arrays)
    return path


def _records(config: FederatedConfig) -> int | None:
    if config.privacy.kind != "example":
        return None
    if config.data.format == "digits":
        return round(float(_population(config.data).data.counts.mean()))
    # No party sees how many others have; a step draws a batch, on average.
    return max(1, round(config.federated.batch / config.privacy.sampling_rate))


@lru_cache(maxsize=1)
def _population(options: FederatedDataOptions) -> Population:
    return population(options)


def _text(value: Any) -> str:
    return json_format.dumps(msgspec.to_builtins(value))
