"""Private set intersection of two parties by Diffie-Hellman: which ids both have, and no others.

Each party hashes its ids to curve25519 and hides them behind a secret scalar of this run; the other
multiplies them by its own, and equal ids come out equal, whoever was first (Meadows 1986; Huberman,
Franklin and Hogg, EC'99). Ids can be anything that both write in the same way, such as mail
addresses: nobody without both scalars can try out which ones are there.

Revealed to each party: how many ids the other has. To a learner: which of its own ids are common,
and so their number. To the other party of a one-sided run: nothing else. Whoever takes part may
bring ids it does not have; an intersection answers for those too. Two runs of which one misses an
id show whether it was common: run it again only with sets that may be compared. Parties are
semi-honest; what no honest party sends is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from shardpar.errors import PartyError, SpecError
from shardpar.fl.channel import Channel
from shardpar.fl.he.pool import Pool
from shardpar.fl.psi_blinding import (
    Blinding,
    check_distinct,
    checked_points,
    rows_of,
    secret_order,
    tags_of,
)
from shardpar.fl.psi_messages import (
    TAG_BYTES,
    WINDOW_IDS,
    BlindedIds,
    Closing,
    Opening,
    TwiceBlindedIds,
)
from shardpar.fl.psi_session import Id, PsiSession, ids_of

Progress = Callable[[int, int], None]
IDS_FOR_PROCESSES = 20_000
"""Starting processes takes about as long as this many ids do."""


def align(
    channel: Channel,
    peer: str,
    ids: Sequence[Id],
    session: PsiSession,
    *,
    pool: Pool | None = None,
    progress: Progress | None = None,
    timeout_s: float | None = None,
) -> np.ndarray:
    """The rows of common ids in one order, the same at both parties.

    Row k of `data[align(...)]` is about the same id at both. The order is that of values behind
    both scalars: new in every run, and without meaning.

    Args:
      channel: to the other party.
      peer: the other party.
      ids: of each of this party's rows; see `psi_session.id_bytes` for when two are equal.
      session: the same at both, both of whom learn.
      pool: of worker processes; None starts one for as long as this takes, if there is much to do.
      progress: called with how many multiplications are done, and of how many.
      timeout_s: how long to wait for each message; None for the channel's patience.

    Returns:
      int64 [common ids].

    Raises:
      DataError: ids of this party are empty, repeated, or too few or too many.
      PartyError: the other was silent, disagrees about the session, or broke the protocol.

    >>> import threading
    >>> from shardpar.fl.channel import local_channels
    >>> ends, session = local_channels(["a", "b"]), PsiSession("demo", ("a", "b"))
    >>> rows = {}
    >>> def other():
    ...     rows["b"] = align(ends["b"], "a", ["eve", "ann", "joe"], session)
    >>> thread = threading.Thread(target=other)
    >>> thread.start()
    >>> rows["a"] = align(ends["a"], "b", ["ann", "bob", "eve", "jim"], session)
    >>> thread.join()
    >>> sorted(zip(rows["a"].tolist(), rows["b"].tolist()))
    [(0, 1), (2, 0)]
    """
    if not all(session.learns(party) for party in session.parties):
        raise SpecError("rows line up only where all parties learn; leave learners empty")
    rows = intersect(channel, peer, ids, session, pool=pool, progress=progress, timeout_s=timeout_s)
    assert rows is not None
    return rows


def intersect(
    channel: Channel,
    peer: str,
    ids: Sequence[Id],
    session: PsiSession,
    *,
    pool: Pool | None = None,
    progress: Progress | None = None,
    timeout_s: float | None = None,
) -> np.ndarray | None:
    """As `align`, also one-sided: None at a party that is no learner of the session."""
    me = channel.party
    if set(session.parties) != {me, peer}:
        raise SpecError(
            f"{me} and {peer} intersect in a session of {session.parties}; for more than two "
            "parties use shardpar.fl.psi_ring"
        )
    mine = ids_of(ids)
    channel.send(peer, f"{session.label}/opening", session.opening(len(mine)))
    opening = channel.receive(peer, f"{session.label}/opening", Opening, timeout_s)
    count = session.opened(peer, opening)
    if pool is not None:
        return _exchange(channel, peer, mine, count, session, pool, progress, timeout_s)
    with Pool(1 if len(mine) + count < IDS_FOR_PROCESSES else None) as own:
        return _exchange(channel, peer, mine, count, session, own, progress, timeout_s)


def _exchange(
    channel: Channel,
    peer: str,
    mine: list[bytes],
    count: int,
    session: PsiSession,
    pool: Pool,
    progress: Progress | None,
    timeout_s: float | None,
) -> np.ndarray | None:
    label, learn, teach = session.label, session.learns(channel.party), session.learns(peer)
    blinding = Blinding(session.dst, pool)
    order = secret_order(len(mine))
    blinded = blinding.blinded(mine[row] for row in order.tolist())
    received, answers, doubled = [], [], []
    done, all_ids = 0, len(mine) + count
    # Window by window, each side holds one message in flight, so that neither waits for room.
    for at in range(0, max(len(mine), count), WINDOW_IDS):
        own, other = (max(min(n - at, WINDOW_IDS), 0) for n in (len(mine), count))
        if own:
            channel.send(peer, f"{label}/blinded", BlindedIds(next(blinded)))
            done += own
        if other:
            message = channel.receive(peer, f"{label}/blinded", BlindedIds, timeout_s)
            points = checked_points(message.points, other, party=peer)
            tags = tags_of(blinding.multiplied(points, party=peer))
            received.append(tags_of(points))
            doubled.append(tags)
            if teach:
                channel.send(peer, f"{label}/twice", TwiceBlindedIds(tags))
            done += other
        if own and learn:
            answer = channel.receive(peer, f"{label}/twice", TwiceBlindedIds, timeout_s)
            answers.append(_checked_tags(answer.tags, own, party=peer))
        if progress is not None:
            progress(done, all_ids)
    check_distinct(rows_of(b"".join(received), TAG_BYTES), party=peer)
    theirs = rows_of(b"".join(doubled), TAG_BYTES)
    # Equal products of different points: one was moved by a point of low order.
    check_distinct(theirs, party=peer)
    if not learn:
        return None
    ours = rows_of(b"".join(answers), TAG_BYTES)
    check_distinct(ours, party=peer)
    common, places, _ = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    if teach:
        closing = Closing(hashlib.sha256(common.tobytes()).digest())
        channel.send(peer, f"{label}/closing", closing)
        if channel.receive(peer, f"{label}/closing", Closing, timeout_s) != closing:
            raise PartyError(f"{peer} comes to other common ids in {label}", party=peer)
    return order[places].astype(np.int64)


def _checked_tags(tags: bytes, count: int, *, party: str) -> bytes:
    if len(tags) != count * TAG_BYTES:
        raise PartyError(
            f"{party} answered with {len(tags)} bytes for {count} ids of {TAG_BYTES}", party=party
        )
    return tags
