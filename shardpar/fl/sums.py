"""Sums over parties, one after the other, each by secure aggregation: what statistics are made of.

Revealed to the aggregator and to every party: each total, and what it is called. To nobody: what a
single party added, as long as two parties or more keep theirs to themselves (`secagg` names the
papers). With two parties each can subtract its own: a total over few parties says much about each.
A party that vanishes ends the job: half of a fit is worth nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shardpar.errors import PartyError, RunError, SpecError
from shardpar.fl.channel import Channel
from shardpar.fl.fixed import FixedPoint
from shardpar.fl.secagg import run_client, run_server
from shardpar.fl.secagg_session import Identity, Roster, Session
from shardpar.fl.sums_messages import (
    MOST_WORDS,
    Finished,
    FromSums,
    Refused,
    ToSums,
    Total,
    Wanted,
)

_HALF = 1 << 31


class Sums(Protocol):
    """Adds up what the parties have; all of them call it in the same order.

    Attributes:
      parties: how many add.
    """

    @property
    def parties(self) -> int:
        """How many add."""
        ...

    def add(self, label: str, words: np.ndarray) -> np.ndarray:
        """The sum modulo 2^32 over all parties, the same at all of them.

        Args:
          label: what it is, the same at all parties.
          words: this party's, uint32 [words].
        """
        ...


@dataclass(frozen=True)
class Alone:
    """One party, whose sums are its own numbers: what a federation is compared with.

    >>> Alone().add("counts", np.uint32([1, 2])).tolist()
    [1, 2]
    """

    parties: int = 1

    def add(self, label: str, words: np.ndarray) -> np.ndarray:
        """The same words."""
        return words.copy()


@dataclass
class SecureSums:
    """A party's end; the aggregator runs `serve_sums` meanwhile.

    Attributes:
      channel: to the aggregator.
      aggregator: who adds up masked vectors.
      identity: this party's long-term key.
      roster: the long-term keys of all parties that add.
      job: names the federation; never used for two series of sums.
      timeout_s: how long to wait for each answer; None for the channel's patience.
    """

    channel: Channel
    aggregator: str
    identity: Identity
    roster: Roster
    job: str
    timeout_s: float | None = None
    _done: int = field(default=0, init=False)

    @property
    def parties(self) -> int:
        """How many add."""
        return len(self.roster)

    def add(self, label: str, words: np.ndarray) -> np.ndarray:
        """The sum modulo 2^32 over all parties.

        Raises:
          SpecError: no vector, or one that is too long.
          PartyError: the aggregator gave up, or another party wants another sum.
        """
        words = np.ascontiguousarray(words, np.uint32)
        if words.ndim != 1 or not 0 < words.size <= MOST_WORDS:
            raise SpecError(f"a sum of shape {words.shape}; it has 1 to {MOST_WORDS} words")
        wanted = Wanted(self._done, label, words.size)
        self._done += 1
        self.channel.send(self.aggregator, _asked(self.job), ToSums(wanted))
        if self._heard(Wanted) != wanted:
            raise PartyError(f"{self.aggregator} begins another sum", party=self.aggregator)
        session = _session(self.job, wanted, self.roster)
        survivors = run_client(
            self.channel,
            self.aggregator,
            self.identity,
            session,
            self.roster,
            words,
            self.timeout_s,
        )
        total = self._heard(Total)
        if (
            survivors != session.cohort
            or total.index != wanted.index
            or len(total.words) != 4 * words.size
        ):
            raise PartyError(
                f"{self.aggregator} sent a sum over others than all parties, or of another length",
                party=self.aggregator,
            )
        return np.frombuffer(total.words, "<u4").copy()

    def finish(self) -> None:
        """Tells the aggregator that there are no more."""
        self.channel.send(self.aggregator, _asked(self.job), ToSums(Finished()))

    def _heard(self, kind: type) -> Wanted | Total:
        topic, aggregator = _answered(self.job), self.aggregator
        body = self.channel.receive(aggregator, topic, FromSums, self.timeout_s).body
        if isinstance(body, Refused):
            raise PartyError(f"{aggregator} gave up: {body.reason}", party=aggregator)
        if not isinstance(body, kind):
            raise PartyError(f"{aggregator} sent {type(body).__name__} too early", party=aggregator)
        return body


def serve_sums(channel: Channel, job: str, roster: Roster, deadline_s: float) -> int:
    """Adds up as the aggregator until all parties have finished; returns how many sums there were.

    Args:
      channel: to all parties.
      job: names the federation.
      roster: the long-term keys of all parties that add.
      deadline_s: how long each phase of a sum lasts at most. Between sums there is no other limit
        than the channel's patience.

    Raises:
      RunError: a party vanished or wants another sum than the rest; all have been told.
    """
    parties, done = sorted(roster), 0
    try:
        while True:
            asked = {p: channel.receive(p, _asked(job), ToSums).body for p in parties}
            wanted = asked[parties[0]]
            if any(body != wanted for body in asked.values()):
                named = ", ".join(f"{party} {_name(body)}" for party, body in asked.items())
                raise RunError(
                    f"the parties of {job} want different sums: {named[:2048]}; run the same "
                    "analysis with the same options everywhere"
                )
            if isinstance(wanted, Finished):
                return done
            for party in parties:
                channel.send(party, _answered(job), FromSums(wanted))
            session = _session(job, wanted, roster)
            aggregate = run_server(channel, session, roster, deadline_s)
            total = FromSums(Total(wanted.index, aggregate.total.astype("<u4").tobytes()))
            for party in parties:
                channel.send(party, _answered(job), total)
            done += 1
    except RunError as error:
        for party in parties:
            _tell(channel, party, job, FromSums(Refused(str(error)[:4096])))
        raise


def total_counts(sums: Sums, label: str, counts: np.ndarray) -> np.ndarray:
    """Totals of whole numbers that are not negative, exact: int64 of the same shape.

    Raises:
      SpecError: one is negative, or so large that a total could leave 31 bits.

    >>> total_counts(Alone(), "rows", np.array([[3, 0]])).tolist()
    [[3, 0]]
    """
    counts = np.asarray(counts)
    most = (_HALF - 1) // sums.parties
    if counts.size and not (counts.min() >= 0 and counts.max() <= most):
        raise SpecError(f"counts for {label!r} are not all between 0 and {most}")
    total = sums.add(label, counts.ravel().astype(np.uint32))
    return total.astype(np.int64).reshape(counts.shape)


def total_values(sums: Sums, label: str, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Totals of numbers, float64 of the same shape; `error_of` says how exact.

    Args:
      sums: over all parties.
      label: what they are.
      values: this party's, finite.
      bounds: of the magnitude of each total, and of what any one party has; the same at all
        parties, broadcast to the shape of the values.

    Raises:
      SpecError: a number is beyond its bound, and would be lost in the sum.

    >>> total_values(Alone(), "income", np.array([2.5]), np.array([1e6])).tolist()
    [2.5]
    """
    values = np.asarray(values, np.float64)
    bounds = np.broadcast_to(np.asarray(bounds, np.float64), values.shape)
    if not (np.abs(values) <= bounds).all():
        raise SpecError(f"numbers for {label!r} are beyond their bounds; state wider ranges")
    codecs = {bound: _codec(bound) for bound in set(bounds.ravel().tolist())}
    words = np.empty(values.shape, np.uint32)
    for bound, codec in codecs.items():
        words[bounds == bound] = codec.encode(values[bounds == bound])
    total = sums.add(label, words.ravel()).reshape(values.shape)
    found = np.empty(values.shape)
    for bound, codec in codecs.items():
        found[bounds == bound] = codec.decode(total[bounds == bound])
    return found


def total_magnitudes(sums: Sums, label: str, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Totals of numbers that are not negative, to a relative error of parties * 2^-29.

    A first sum finds out how large they are, a second one of the same numbers is as fine as that
    allows.

    Raises:
      SpecError: a number is negative or beyond its bound.
    """
    values = np.asarray(values, np.float64)
    if not (values >= 0).all():
        raise SpecError(f"numbers for {label!r} are negative")
    coarse = total_values(sums, f"{label}, roughly", values, bounds)
    near = np.maximum(coarse, 0) + error_of(bounds, sums.parties)
    return np.maximum(total_values(sums, label, values, near), 0)


def error_of(bounds: np.ndarray, parties: int) -> np.ndarray:
    """How far `total_values` may be off: half a step for each party, at most parties * 2^-29 bound.

    >>> bool(error_of(np.array([1.0]), parties=3)[0] <= 3 * 2.0 ** -29)
    True
    """
    bounds = np.asarray(bounds, np.float64)
    steps = [1 / _codec(bound).scale for bound in bounds.ravel().tolist()]
    return parties * np.reshape(steps, bounds.shape) / 2


def _codec(bound: float) -> FixedPoint:
    # The bound is of the total, not of each addend: among honest parties it is the one addend.
    return FixedPoint.of(bound if bound > 0 else 1.0, addends=1)


def _session(job: str, wanted: Wanted, roster: Roster) -> Session:
    cohort = tuple(sorted(roster))
    return Session(f"{job}/sums", wanted.index, cohort, wanted.words, len(cohort))


def _name(body: Wanted | Finished) -> str:
    if isinstance(body, Finished):
        return "none"
    return f"{body.label!r} of {body.words} words, number {body.index}"


def _tell(channel: Channel, party: str, job: str, message: FromSums) -> None:
    try:
        channel.send(party, _answered(job), message)
    except PartyError:
        return


def _asked(job: str) -> str:
    return f"sums/{job}/asked"


def _answered(job: str) -> str:
    return f"sums/{job}/answered"
