"""Private set intersection of three parties or more: each set walks past all of them.

Every party multiplies every set by its secret scalar and shuffles it before it goes on, as in a mix
net (Chaum 1981) over the scalars of `psi`; each set ends at the first party of the session, the
evaluator, who finds out which products are in all sets. Where those stand is told back along the
same way, each party undoing its own shuffle, up to the set's owner.

Revealed to each party: how many ids every party has, and how many are common. To a learner: which
of its own ids are common. To the evaluator also: how many ids each group of parties has in common,
but not which ones, not even of its own, as long as one party that shuffled keeps its order to
itself; parties that pool what they saw learn no more than it does, beside their common ids. The
other remarks in `psi` hold here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from shardpar.errors import PartyError, SpecError
from shardpar.fl.channel import Channel
from shardpar.fl.hash_to_curve import POINT_BYTES
from shardpar.fl.he.pool import Pool
from shardpar.fl.psi import IDS_FOR_PROCESSES, Progress
from shardpar.fl.psi_blinding import (
    Blinding,
    check_distinct,
    checked_points,
    rows_of,
    secret_order,
    tags_of,
)
from shardpar.fl.psi_messages import TAG_BYTES, WINDOW_IDS, BlindedIds, CommonIds, Opening
from shardpar.fl.psi_session import Id, PsiSession, ids_of


def align_all(
    channel: Channel,
    ids: Sequence[Id],
    session: PsiSession,
    *,
    pool: Pool | None = None,
    progress: Progress | None = None,
    timeout_s: float | None = None,
) -> np.ndarray | None:
    """The rows of ids that all parties have, in one order, the same at all of them.

    Args:
      channel: to all other parties.
      ids: of each of this party's rows.
      session: the same at all parties, three or more; the first evaluates.
      pool: of worker processes; None starts one for as long as this takes, if there is much to do.
      progress: called with how many multiplications are done, and of how many.
      timeout_s: how long to wait for each message, which may take as long as another party's work
        on one set; None for the channel's patience.

    Returns:
      int64 [common ids], or None at a party that is no learner of the session.

    Raises:
      DataError: ids of this party are empty, repeated, or too few or too many.
      PartyError: another was silent, disagrees about the session, or broke the protocol.
    """
    if len(session.parties) < 3 or channel.party not in session.parties:
        raise SpecError(
            f"{channel.party} in a session of {session.parties}; this is for three parties or "
            "more, of which it is one; two use shardpar.fl.psi"
        )
    mine = ids_of(ids)
    opening = session.opening(len(mine))
    others = [party for party in session.parties if party != channel.party]
    for party in others:
        channel.send(party, f"{session.label}/opening", opening)
    counts = {channel.party: len(mine)}
    for party in others:
        message = channel.receive(party, f"{session.label}/opening", Opening, timeout_s)
        counts[party] = session.opened(party, message)
    if pool is not None:
        return _Walker(channel, session, counts, pool, progress, timeout_s).walk(mine)
    few = sum(counts.values()) < IDS_FOR_PROCESSES
    with Pool(1 if few else None) as own:
        return _Walker(channel, session, counts, own, progress, timeout_s).walk(mine)


def path_of(parties: Sequence[str], owner: str) -> tuple[str, ...]:
    """Who has a party's set in hand, one after the other; the evaluator is the last.

    >>> path_of(("e", "a", "b", "c"), "b")
    ('b', 'c', 'a', 'e')
    >>> path_of(("e", "a", "b", "c"), "e")
    ('e', 'a', 'b', 'c', 'e')
    """
    evaluator, *others = parties
    if owner == evaluator:
        return (evaluator, *others, evaluator)
    at = others.index(owner)
    return (*others[at:], *others[:at], evaluator)


def places_of_common(tags: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where the values that all have stand in each party's sequence, in one order of the values.

    Args:
      tags: of each party, distinct.

    >>> tags = {"a": np.array([7, 5, 9]), "b": np.array([9, 7])}
    >>> {party: places.tolist() for party, places in places_of_common(tags).items()}
    {'a': [0, 2], 'b': [1, 0]}
    """
    common = reduce(lambda a, b: np.intersect1d(a, b, assume_unique=True), tags.values())
    found = {}
    for party, values in tags.items():
        order = np.argsort(values)
        found[party] = order[np.searchsorted(values[order], common)]
    return found


@dataclass
class _Walker:
    """One party: what it has in hand, and how it shuffled what it passed on."""

    channel: Channel
    session: PsiSession
    counts: Mapping[str, int]
    pool: Pool
    progress: Progress | None
    timeout_s: float | None
    orders: dict[str, np.ndarray] = field(default_factory=dict)
    done: int = 0

    def walk(self, mine: list[bytes]) -> np.ndarray | None:
        """All of it, for the party's ids as they are hashed."""
        me, parties = self.channel.party, self.session.parties
        blinding = Blinding(self.session.dst, self.pool)
        paths = {owner: path_of(parties, owner) for owner in parties}
        self.orders[me] = secret_order(len(mine))
        leaving: dict[str, Iterator[bytes]] = {
            me: self._counted(blinding.blinded(mine[row] for row in self.orders[me].tolist()))
        }
        arrived: dict[str, np.ndarray] = {}
        for step in range(1, len(parties) + 1):
            legs = {
                o: (path[step - 1], path[step]) for o, path in paths.items() if step < len(path)
            }
            sets = self._exchanged(legs, leaving, blinding)
            if me == parties[0]:
                arrived |= {o: rows_of(tags_of(points), TAG_BYTES) for o, points in sets.items()}
                continue
            for owner, points in sets.items():
                order = self.orders[owner] = secret_order(self.counts[owner])
                leaving[owner] = _windows(rows_of(points, POINT_BYTES)[order].tobytes())
        places: Mapping[str, np.ndarray] = {}
        if me == parties[0]:
            for owner, tags in arrived.items():
                check_distinct(tags, party=paths[owner][-2])
            places = places_of_common(arrived)
        told = {
            owner: self._told_back(owner, paths[owner], places.get(owner))
            for owner in parties
            if self.session.learns(owner)
        }
        return told.get(me)

    def _exchanged(
        self,
        legs: Mapping[str, tuple[str, ...]],
        leaving: Mapping[str, Iterator[bytes]],
        blinding: Blinding,
    ) -> dict[str, bytes]:
        """Sends the sets that leave in this step while those come that arrive, multiplied."""
        me, label = self.channel.party, self.session.label
        coming: dict[str, list[bytes]] = {o: [] for o, (_, to) in legs.items() if to == me}
        for at in range(0, max(self.counts.values()), WINDOW_IDS):
            for owner, (source, target) in legs.items():
                if source == me and at < self.counts[owner]:
                    message = BlindedIds(next(leaving[owner]))
                    self.channel.send(target, f"{label}/of {owner}", message)
            for owner, parts in coming.items():
                size, source = min(self.counts[owner] - at, WINDOW_IDS), legs[owner][0]
                if size <= 0:
                    continue
                topic = f"{label}/of {owner}"
                message = self.channel.receive(source, topic, BlindedIds, self.timeout_s)
                points = checked_points(message.points, size, party=source)
                if owner != me:
                    points = blinding.multiplied(points, party=source)
                    self._count(size)
                parts.append(points)
        sets = {owner: b"".join(parts) for owner, parts in coming.items()}
        for owner, points in sets.items():
            check_distinct(rows_of(points, POINT_BYTES), party=legs[owner][0])
        return sets

    def _told_back(
        self, owner: str, path: tuple[str, ...], places: np.ndarray | None
    ) -> np.ndarray | None:
        """Passes on where common ids stand; returns the rows if the set is this party's own."""
        me, topic = self.channel.party, f"{self.session.label}/common of {owner}"
        at = path.index(me) if me in path[:-1] else None
        rows: list[np.ndarray] = []
        start, count = 0, None if places is None else len(places)
        while count is None or start < max(count, 1):
            if places is not None:
                self._tell(path[-2], topic, len(places), places[start : start + WINDOW_IDS])
            if at is not None:
                source = path[at + 1]
                message = self.channel.receive(source, topic, CommonIds, self.timeout_s)
                count = message.count if count is None else count
                part = self._checked(message, owner, start, count, party=source)
                rows.append(self.orders[owner][part])
                if at > 0:
                    self._tell(path[at - 1], topic, count, rows[-1])
            start += WINDOW_IDS
        if at is None:
            return None
        found = np.concatenate(rows)
        check_distinct(found, party=path[at + 1])
        return found.astype(np.int64) if owner == me else None

    def _tell(self, to: str, topic: str, count: int, places: np.ndarray) -> None:
        self.channel.send(to, topic, CommonIds(count, places.astype("<u4").tobytes()))

    def _checked(
        self, message: CommonIds, owner: str, start: int, count: int, *, party: str
    ) -> np.ndarray:
        size = max(min(count - start, WINDOW_IDS), 0)
        places = np.frombuffer(message.places, "<u4") if len(message.places) % 4 == 0 else None
        if (
            message.count != count
            or count > min(self.counts.values())
            or places is None
            or len(places) != size
            or (places >= self.counts[owner]).any()
        ):
            raise PartyError(
                f"{party} told of {message.count} common ids in {len(message.places)} bytes, of "
                f"which {size} are due, among {self.counts[owner]} of {owner}",
                party=party,
            )
        return places

    def _counted(self, windows: Iterator[bytes]) -> Iterator[bytes]:
        for points in windows:
            self._count(len(points) // POINT_BYTES)
            yield points

    def _count(self, ids: int) -> None:
        self.done += ids
        if self.progress is not None:
            self.progress(self.done, sum(self.counts.values()))


def _windows(points: bytes) -> Iterator[bytes]:
    size = WINDOW_IDS * POINT_BYTES
    return (points[at : at + size] for at in range(0, len(points), size))
