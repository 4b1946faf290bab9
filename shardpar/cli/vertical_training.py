"""Runs the verbs of `shardpar fl vertical`."""

from __future__ import annotations

import csv
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shardpar.cli.tables import console, print_json
from shardpar.errors import ConfigError, DataError, UserError
from shardpar.fl.channel import Channel
from shardpar.fl.net.grpc_channel import GrpcChannel
from shardpar.fl.net.keys import make_test_keys, read_keys
from shardpar.fl.net.limits import Limits
from shardpar.fl.psi import align
from shardpar.fl.psi_session import PsiSession
from shardpar.fl.vertical import linear_model, tree_model
from shardpar.fl.vertical.options import KeyOptions, LinearOptions, TreeOptions
from shardpar.fl.vertical.tables import Table, read_table
from shardpar.ps.metrics import auc

_DAY_S = 86_400.0
_POLL_S = 0.1
_GRACE_S = 10.0


@dataclass(frozen=True)
class End:
    """Where a party is, and where the other."""

    party: str
    peer: str
    listen: str | None
    keys: str
    job: str

    def open(self) -> GrpcChannel:
        """Connects.

        Raises:
          UserError: addresses or keys are wrong.
          PartyError: the other does not come.
        """
        peer, equals, address = self.peer.partition("=")
        if bool(equals) == bool(self.listen):
            raise UserError(
                "one party listens and the other names its address: give --listen HOST:PORT, or "
                f"--peer {peer}=HOST:PORT, and not both"
            )
        channel = GrpcChannel.open(
            self.party,
            sorted((self.party, peer)),
            job=self.job,
            keys=read_keys(Path(self.keys), self.party),
            dial={peer: address} if equals else None,
            listen=self.listen,
            # A peer that is there but computes for hours is no error; one that is gone is.
            limits=Limits(receive_s=_DAY_S),
        )
        channel.wait()
        return channel


def how(scheme: str, bits: int, processes: int | None) -> KeyOptions:
    """How keys are made.

    Raises:
      ConfigError: too small or large.
    """
    if not 2048 <= bits <= 8192:
        raise ConfigError(f"--key-bits {bits}: use 2048, or 3072 for data to be secret beyond 2030")
    return KeyOptions(scheme, bits, processes)  # type: ignore[arg-type]


def train(
    data: str,
    end: End,
    keys: KeyOptions,
    settings: Sequence[str],
    out: str,
    id_column: str,
    label: str | None,
    model: str,
    *,
    json: bool,
) -> None:
    """Aligns, trains, and writes this party's half."""
    table = read_table(Path(data), id_column=id_column, label_column=label)
    options = _options(model, settings)
    role: Any = "guest" if label else "host"
    began = time.monotonic()
    with end.open() as channel:
        table = _aligned(channel, table, end.job, json=json)
        if isinstance(options, TreeOptions):
            half: Any = tree_model.fit(
                channel, role, table.columns, table.labels, options, keys,
                names=table.names, row_ids=table.ids,
                on_tree=lambda progress: _tell(msgspec.to_builtins(progress), json=json),
            )  # fmt: skip
        else:
            half = linear_model.fit(
                channel, role, table.columns, table.labels, options, keys,
                names=table.names, row_ids=table.ids,
                on_epoch=lambda epoch: _tell(
                    {"epoch": epoch.number, "moved": epoch.moved}, json=json
                ),
            )  # fmt: skip
        half.save(Path(out))
        seconds = round(time.monotonic() - began, 1)
        _tell({"half": out, "seconds": seconds, "sent_bytes": channel.sent_bytes}, json=json)


def predict(
    data: str,
    half_path: str,
    end: End,
    keys: KeyOptions,
    out: str,
    id_column: str,
    label: str | None,
    *,
    json: bool,
) -> None:
    """Aligns and predicts; the guest writes what it gets, and says how good it is."""
    half = _half(Path(half_path))
    table = read_table(Path(data), id_column=id_column, label_column=label)
    table = table.of_columns(half.names, data)
    if label and half.role == "host":
        raise UserError("this half is the host's, who has no label: leave --label out")
    with end.open() as channel:
        table = _aligned(channel, table, end.job, json=json)
        module: Any = linear_model if isinstance(half, linear_model.LinearHalf) else tree_model
        told = module.predict(channel, half, table.columns, keys, row_ids=table.ids)
        if told is None:
            _tell({"rows": len(table.ids), "sent_bytes": channel.sent_bytes}, json=json)
            return
    with Path(out).open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([id_column, "prediction"])
        lines.writerows(zip(table.ids, map(repr, told.tolist()), strict=True))
    good = {} if table.labels is None else _goodness(table.labels, told, half.options)
    _tell({"rows": len(told), "predictions": out, **good}, json=json)


def rehearse(
    tables: tuple[str, str],
    test: tuple[str, str] | None,
    label: str,
    model: str,
    settings: Sequence[str],
    out: str,
    flags: Sequence[str],
    *,
    json: bool,
) -> int:
    """Trains and predicts with two processes; the exit code."""
    _options(model, settings)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    keys = directory / "keys"
    make_test_keys(keys, ["guest", "host"], force=True)
    halves = [str(directory / f"{party}.model") for party in ("guest", "host")]
    labels = ["--label", label]
    flags = [*flags, "--json"] if json else flags
    training = ["--model", model, *settings, *flags]
    code = _both(
        directory,
        ["train", tables[0], "--out", halves[0], *labels, *training],
        ["train", tables[1], "--out", halves[1], *training],
    )
    if code or test is None:
        return code
    predictions = str(directory / "predictions.csv")
    return _both(
        directory,
        ["predict", test[0], "--half", halves[0], "--out", predictions, *labels, *flags],
        ["predict", test[1], "--half", halves[1], *flags],
    )


def _both(directory: Path, guest: list[str], host: list[str]) -> int:
    """Runs a verb at both parties; the first exit code that is not 0."""
    address, keys = f"127.0.0.1:{_free_port()}", ["--keys", str(directory / "keys")]
    command = [sys.executable, "-m", "shardpar", "fl", "vertical"]
    ends = (
        [*guest, "--party", "guest", "--peer", "host", "--listen", address, *keys],
        [*host, "--party", "host", "--peer", f"guest={address}", *keys],
    )
    with (directory / "host.log").open("ab") as log:
        processes = [
            subprocess.Popen([*command, *ends[0]]),
            subprocess.Popen([*command, *ends[1]], stdout=log, stderr=log),
        ]
        first: list[int | None] = []
        try:
            while None in (first := [process.poll() for process in processes]) and not any(first):
                time.sleep(_POLL_S)
            # The other hears that its peer is gone, and says so.
            for process in processes:
                process.wait(timeout=_GRACE_S if any(first) else None)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            codes = [process.wait() for process in processes]
    failed = [name for name, code in zip(("guest", "host"), first, strict=True) if code]
    if failed:
        where = f"; see {directory / 'host.log'}" if "host" in failed else ""
        console(stderr=True).print(f"the {' and the '.join(failed)} failed{where}")
    return next((code for code in codes if code > 0), 1 if any(codes) else 0)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _options(model: str, settings: Sequence[str]) -> LinearOptions | TreeOptions:
    """The options of a model from KEY=VALUE.

    Raises:
      ConfigError: there is no such option, or not of this value.
    """
    kind: type[Any] = TreeOptions if model == "trees" else LinearOptions
    known = [field.name for field in fields(kind) if field.name != "kind"]
    given: dict[str, str] = {} if model == "trees" else {"kind": model}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"{setting!r} is no option of {model}: write KEY=VALUE with one of "
                              f"{', '.join(known)}")  # fmt: skip
        given[key] = value
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of {model}: {error}") from None


def _aligned(channel: Channel, table: Table, job: str, *, json: bool) -> Table:
    """The rows that both have, in an order by id.

    Raises:
      DataError: there are none.
    """
    (peer,) = (party for party in channel.parties if party != channel.party)
    session = PsiSession(job, channel.parties)
    common = table.take(align(channel, peer, table.ids, session)).sorted_by_id()
    _tell({"rows": len(table.ids), "common_rows": len(common.ids)}, json=json)
    if not common.ids:
        raise DataError(f"this party and {peer} have no id in common: are they written alike?")
    return common


def _half(path: Path) -> linear_model.LinearHalf | tree_model.TreesHalf:
    try:
        return tree_model.TreesHalf.load(path)
    except DataError:
        return linear_model.LinearHalf.load(path)


def _goodness(labels: np.ndarray, told: np.ndarray, options: Any) -> dict[str, float]:
    if getattr(options, "kind", "") == "linear" or getattr(options, "objective", "") == "squared":
        return {"rmse": float(np.sqrt(np.mean((labels - told) ** 2)))}
    return {"auc": auc(labels, told)}


def _tell(row: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(row)
        return
    words = (f"{key.replace('_', ' ')} {_shown(value)}" for key, value in row.items())
    console().print(", ".join(words), highlight=False)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
