"""A worker's side of the servers: what goes to which server, under which number.

Ids are split by their home and answers put together again. Each step is one push to every
server, empty ones too, so that all servers agree on what a worker has pushed; whoever sends
a push again sends the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from typing_extensions import override

from shardpar.ps.messages import (
    FreshRows,
    Position,
    Pulled,
    PullRequest,
    Push,
    RowsRequest,
    RowsUpdate,
)
from shardpar.ps.placement import Placement
from shardpar.ps.server import Server
from shardpar.ps.table import Table


class Servers(Protocol):
    """How servers are reached: in this process, or in others."""

    def pull(self, requests: Sequence[PullRequest]) -> list[Pulled]:
        """The answers to one request for each server, in order."""
        ...

    def push(self, pushes: Sequence[Push]) -> None:
        """Sends one push to each server; returns when all have acknowledged."""
        ...

    def positions(self, worker: int) -> list[Position]:
        """What each server has of a worker."""
        ...


@dataclass(frozen=True)
class LocalServers(Servers):
    """Servers in this process, for tests and for looking."""

    servers: tuple[Server, ...]

    @override
    def pull(self, requests: Sequence[PullRequest]) -> list[Pulled]:
        return [s.pull(request) for s, request in zip(self.servers, requests, strict=True)]

    @override
    def push(self, pushes: Sequence[Push]) -> None:
        for server, push in zip(self.servers, pushes, strict=True):
            server.push(push)

    @override
    def positions(self, worker: int) -> list[Position]:
        return [server.position(worker) for server in self.servers]


class Rows(Protocol):
    """Where a worker's step gets rows and leaves gradients: the servers, or a cache before them."""

    def pull(
        self, ids: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Rows float32[n, dim] of distinct ids by table, and the dense parameters."""
        ...

    def push(
        self,
        step: int,
        gradients: Mapping[str, tuple[np.ndarray, np.ndarray]],
        *,
        weight: float,
        loss: float,
        dense: Mapping[str, np.ndarray],
    ) -> None:
        """Takes a step's gradients, summed over its samples: (distinct ids, float32[n, dim])."""
        ...

    def flush(self) -> None:
        """Brings to the servers what has not been pushed."""
        ...


@dataclass
class Traffic:
    """Rows that went between a worker and its servers, each way, and rows a step asked for."""

    pulled: int = 0
    pushed: int = 0
    asked: int = 0

    @property
    def remote(self) -> int:
        """Both ways."""
        return self.pulled + self.pushed


class Client(Rows):
    """Rows straight from the servers.

    Attributes:
      worker: who this is.
      tables: by path.
      position: where this worker is; a worker that starts anew goes on there.
      traffic: counted since the start.
    """

    def __init__(
        self, worker: int, servers: Servers, tables: Mapping[str, Table], placement: Placement
    ) -> None:
        self.worker, self.tables, self.placement = worker, dict(tables), placement
        self._servers = servers
        # Where servers disagree, a push was cut short: those that have it will know it again.
        self.position = min(servers.positions(worker), key=lambda p: (p.pushes, p.steps))
        self._seen = [0] * placement.rows
        self.traffic = Traffic()

    def ask(
        self, requests: Mapping[str, RowsRequest], *, dense: bool = False
    ) -> tuple[dict[str, FreshRows], dict[str, np.ndarray]]:
        """Rows that are too old or unknown, of any ids; and the dense parameters."""
        homes = {name: self._homes(name, asked.ids) for name, asked in requests.items()}
        parts = [
            PullRequest(
                {name: _part(asked, homes[name] == server) for name, asked in requests.items()},
                dense,
            )
            for server in range(self.placement.rows)
        ]
        answers = self._servers.pull(parts)
        self._seen = [answer.seen for answer in answers]
        fresh = {}
        for name in requests:
            at = [
                np.flatnonzero(homes[name] == server)[answer.rows[name].positions]
                for server, answer in enumerate(answers)
            ]
            pieces = [answer.rows[name].pieces for answer in answers]
            fresh[name] = FreshRows(
                np.concatenate(at),
                tuple(np.concatenate(piece) for piece in zip(*pieces, strict=True)),
                np.concatenate([answer.rows[name].versions for answer in answers]),
            )
            self.traffic.pulled += fresh[name].positions.size
        parameters: dict[str, np.ndarray] = {}
        for answer in answers:
            parameters |= answer.dense
        return fresh, parameters

    def send(
        self,
        steps: int,
        updates: Mapping[str, RowsUpdate],
        *,
        weight: float,
        loss: float,
        dense: Mapping[str, np.ndarray],
    ) -> None:
        """Pushes updates; `steps` is how many the worker has finished with them."""
        homes = {name: self._homes(name, update.ids) for name, update in updates.items()}
        pushes = [
            Push(
                self.worker, self.position.pushes, steps - 1, weight, loss, self._seen[server],
                {name: _piece(u, homes[name] == server) for name, u in updates.items()},
                dense if server == 0 else {},
            )
            for server in range(self.placement.rows)
        ]  # fmt: skip
        self._servers.push(pushes)
        self.position = Position(self.position.pushes + 1, steps)
        self.traffic.pushed += sum(update.ids.size for update in updates.values())

    @override
    def pull(
        self, ids: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        fresh, dense = self.ask({n: RowsRequest(wanted) for n, wanted in ids.items()}, dense=True)
        rows = {}
        for name, found in fresh.items():
            self.traffic.asked += ids[name].size
            rows[name] = np.empty((ids[name].size, self.tables[name].dim), np.float32)
            rows[name][found.positions] = found.pieces[0]
        return rows, dense

    @override
    def push(
        self,
        step: int,
        gradients: Mapping[str, tuple[np.ndarray, np.ndarray]],
        *,
        weight: float,
        loss: float,
        dense: Mapping[str, np.ndarray],
    ) -> None:
        updates = {
            name: RowsUpdate(ids, (gradient,), np.ones(ids.size, np.int64))
            for name, (ids, gradient) in gradients.items()
        }
        self.send(step + 1, updates, weight=weight, loss=loss, dense=dense)

    @override
    def flush(self) -> None:
        """Nothing waits here."""

    def _homes(self, name: str, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.placement.home(ids, self.tables[name].rows)[0])


def _part(asked: RowsRequest, here: np.ndarray) -> RowsRequest:
    versions = None if asked.versions is None else asked.versions[here]
    return RowsRequest(asked.ids[here], versions, asked.bound, asked.slots)


def _piece(update: RowsUpdate, here: np.ndarray) -> RowsUpdate:
    values = tuple(value[here] for value in update.values)
    return RowsUpdate(update.ids[here], values, update.counts[here], update.kind)
