"""Runs `shardpar fl run`: all parties of a federation as processes of this machine."""

from __future__ import annotations

import json as json_format
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from shardpar.cli.signals import Signals, asked_by_signal
from shardpar.cli.tables import console, print_json
from shardpar.config.schema import FederatedConfig
from shardpar.errors import ConfigError, RunError, UserError
from shardpar.fl.net.keys import make_test_keys
from shardpar.fl.options import NetOptions
from shardpar.run.directory import RunDirectory
from shardpar.run.durable import write_atomically
from shardpar.run.local_processes import free_port, send
from shardpar.run.progress import Figures, Progress

Processes = dict[str, subprocess.Popen[bytes]]

_GRACE_S = 10.0
_LOOK_S = 0.1
_TAIL_LINES = 15
_DEFAULT_PARTIES = 3


@dataclass(frozen=True)
class Member:
    """One process of the federation.

    Attributes:
      name: of the party, or of the aggregator.
      command: its arguments after `shardpar fl`.
      folder: where it keeps its state.
    """

    name: str
    command: tuple[str, ...]
    folder: Path


def run(
    config: FederatedConfig,
    name: str,
    arguments: Sequence[str],
    count: int | None,
    *,
    json: bool,
    dry_run: bool,
) -> int:
    """Starts all, shows the rounds, and ends all.

    Returns:
      The exit code: the aggregator's, or in a ring that of the first party that failed.

    Raises:
      ConfigError: the number of parties contradicts the config.
      RunError: a process failed; says which, with the end of its log.
    """
    net = net_of(config.net, count)
    if dry_run:
        _show(net, config, json=json)
        return 0
    given = config.train.run_dir
    folder = Path(given) if given else RunDirectory.fresh(name, datetime.now()).path
    folder = folder.absolute()
    keys = folder / "keys"
    if not keys.is_dir():
        make_test_keys(keys, _everyone(net))
    members = members_of(net, config, arguments, folder, _free_addresses(net))
    screen = console(stderr=True)
    screen.print(
        f"{len(members)} processes with keys for tests; run directory: {folder}", highlight=False
    )
    with (
        asked_by_signal() as signals,
        _started(members, folder) as running,
        Progress(quiet=json) as progress,
    ):
        head = members[0].name
        rows = _Rows(folder / head / "metrics.jsonl", config.federated.rounds, progress, json=json)
        code = _watch(running, members, rows, progress, signals)
    return code


def net_of(net: NetOptions, count: int | None) -> NetOptions:
    """The section `net` with as many parties as are asked for.

    Raises:
      ConfigError: the config names another number of them.

    >>> net_of(NetOptions(), 2).parties
    ('a', 'b')
    """
    if net.parties:
        if count not in (None, len(net.parties)):
            raise ConfigError(
                f"-n {count}, but net.parties names {len(net.parties)}; leave one of the two out"
            )
        return net
    numbers = range(count or _DEFAULT_PARTIES)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = tuple(letters[n] if n < len(letters) else f"party-{n + 1}" for n in numbers)
    return replace(net, parties=names)


def members_of(
    net: NetOptions,
    config: FederatedConfig,
    arguments: Sequence[str],
    folder: Path,
    addresses: Mapping[str, str],
) -> tuple[Member, ...]:
    """The processes, whose first reports the rounds."""
    overrides = {
        "net.parties": json_format.dumps(list(net.parties)),
        "net.certificates": str(folder / "keys"),
        "net.addresses": json_format.dumps([f"{n}={a}" for n, a in addresses.items()]),
    }
    if config.data.format == "digits":
        overrides["data.clients"] = str(len(net.parties))
    shared = [*arguments, *(f"{key}={value}" for key, value in overrides.items())]

    def member(name: str, verb: str, *flags: str) -> Member:
        own = folder / name
        return Member(name, (verb, *shared, *flags, "--run-dir", str(own)), own)

    joining = [member(party, "join", "--party", party) for party in net.parties]
    if net.topology == "ring":
        return tuple(joining)
    return (member(net.aggregator, "serve"), *joining)


def _everyone(net: NetOptions) -> tuple[str, ...]:
    return net.parties if net.topology == "ring" else (net.aggregator, *net.parties)


def _free_addresses(net: NetOptions) -> dict[str, str]:
    listening = net.parties if net.topology == "ring" else (net.aggregator,)
    return {name: f"127.0.0.1:{free_port()}" for name in listening}


def _show(net: NetOptions, config: FederatedConfig, *, json: bool) -> None:
    ring = net.topology == "ring"
    rows = [
        {
            "process": name,
            "verb": "serve" if name == net.aggregator and not ring else "join",
            "machine": "localhost",
            "dials": _dials(net, name),
        }
        for name in _everyone(net)
    ]
    if json:
        print_json({"rounds": config.federated.rounds, "processes": rows})
        return
    table = Table("process", "verb", "machine", "dials")
    for row in rows:
        table.add_row(*row.values())
    console().print(table)


def _dials(net: NetOptions, name: str) -> str:
    if net.topology == "ring":
        return ", ".join(net.parties[: net.parties.index(name)])
    return "" if name == net.aggregator else net.aggregator


class _Rows:
    """Shows rows of the log as they are written."""

    def __init__(self, path: Path, rounds: int, progress: Progress, *, json: bool) -> None:
        self._path, self._rounds, self._progress, self._json = path, rounds, progress, json
        self._read_bytes = 0

    def show(self) -> None:
        """Shows those that are new."""
        if not self._path.is_file():
            return
        size = self._path.stat().st_size
        if size < self._read_bytes:
            # A process that was started again has taken back a row.
            self._read_bytes = 0
        with open(self._path, "rb") as file:
            file.seek(self._read_bytes)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.decode().splitlines():
            row = json_format.loads(line)
            if self._json:
                print(line, flush=True)  # noqa: T201
            else:
                self._progress.update(_figures(row, self._rounds))
                self._progress.say(_words(row))


def _figures(row: Mapping[str, Any], rounds: int) -> Figures:
    return Figures(row["step"], rounds, row.get("loss"), step_s=row.get("round_s"))


def _words(row: Mapping[str, Any]) -> str:
    """A row for people.

    >>> _words({"step": 3, "accuracy": 0.9312, "epsilon": 1.5, "dropped": "c"})
    'round 3: accuracy 0.931 · ε 1.50 · without c'
    """
    words = []
    if row.get("accuracy") is not None:
        words.append(f"accuracy {row['accuracy']:.3f}")
    if row.get("loss") is not None:
        words.append(f"loss {row['loss']:.3f}")
    if row.get("sent_bytes") is not None:
        words.append(f"{row['sent_bytes'] / 1024:,.0f} KiB sent")
    if row.get("epsilon") is not None:
        words.append(f"ε {row['epsilon']:.2f}")
    if row.get("dropped"):
        words.append(f"without {row['dropped']}")
    return f"round {row['step']}: " + " · ".join(words)


@contextmanager
def _started(
    members: Sequence[Member], folder: Path
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The processes, ended with the block however it ends; their numbers are in `pids.json`."""
    running: Processes = {}
    try:
        for member in members:
            with open(folder / f"{member.name}.log", "ab") as log:
                running[member.name] = subprocess.Popen(
                    [sys.executable, "-m", "shardpar", "fl", *member.command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
        pids = {name: process.pid for name, process in running.items()}
        write_atomically(folder / "pids.json", (json_format.dumps(pids) + "\n").encode())
        yield running
    finally:
        processes = list(running.values())
        send(processes, signal.SIGTERM)
        until = time.monotonic() + _GRACE_S
        while any(p.poll() is None for p in processes) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def _watch(
    running: Processes,
    members: Sequence[Member],
    rows: _Rows,
    progress: Progress,
    signals: Signals,
) -> int:
    """Shows what happens until it is over.

    Raises:
      RunError: the aggregator failed, or all parties did.
      KeyboardInterrupt: a signal asked to end. Not from the signal itself: raised in the middle
        of anything, as in a finalizer, it may be lost.
    """
    head, *_ = members
    gone: dict[str, int] = {}
    while True:
        if signals.should_stop():
            raise KeyboardInterrupt
        rows.show()
        for name, process in running.items():
            code = process.poll()
            if code is not None and name not in gone:
                gone[name] = code
                if code:
                    progress.say(f"{name} ended with {_ending(code)}; {_last(head, name)}")
        serving = head.command[0] == "serve"
        over = head.name in gone if serving else len(gone) == len(running)
        refused = next((name for name, code in gone.items() if code == 2), None)
        if refused is not None:
            raise _failure(head.folder.parent, refused, gone[refused])
        if over:
            rows.show()
            break
        ended = {name: code for name, code in gone.items() if not serving or name != head.name}
        if len(ended) == len(running) - serving and all(ended.values()):
            # Nobody is left to train with; without this the aggregator would wait for long.
            failed = next(iter(ended))
            raise _failure(head.folder.parent, failed, gone[failed])
        time.sleep(_LOOK_S)
    code = gone[head.name] if serving else next((c for c in gone.values() if c > 0), 0)
    if code:
        failed = head.name if serving else next(n for n, c in gone.items() if c > 0)
        raise _failure(head.folder.parent, failed, code)
    until = time.monotonic() + _GRACE_S
    while any(p.poll() is None for p in running.values()) and time.monotonic() < until:
        if signals.should_stop():
            break
        time.sleep(_LOOK_S)
    progress.say(f"done; the model is {head.folder / 'model.npz'}")
    return 0


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last(head: Member, name: str) -> str:
    lines = _log(head.folder.parent, name)
    return lines[-1] if lines else "it has said nothing"


def _log(folder: Path, name: str) -> list[str]:
    text = (folder / f"{name}.log").read_text(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _failure(folder: Path, name: str, code: int) -> RunError | UserError:
    """What a process that failed has said, as this command's own error."""
    lines = _log(folder, name)
    errors = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    shown = lines[errors[-1] :] if errors else lines[-_TAIL_LINES:]
    words = "\n".join(shown).removeprefix("error: ")
    text = f"{name} ended with {_ending(code)}: {words}\n  its log: {folder / f'{name}.log'}"
    return UserError(text) if code == UserError.exit_code else RunError(text)
