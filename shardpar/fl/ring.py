"""Adds up vectors around a ring of parties, none of which sees another's: no aggregator at all.

Every two members agree on a mask that one adds and the other subtracts (Bonawitz et al., CCS 2017,
with fresh keys that go around the ring, signed); then the masked vectors are summed by the ring
all-reduce of Patarasuk and Yuan (2009): reduce-scatter and all-gather over Z_2^32, each sending
2 (n - 1) / n of a vector.

Revealed to a member: who the members are, and the sum. What passes through its hands on the way is
a sum over some of the members, hidden by the masks between those and the rest; only when the rest
is itself does it read something, the sum without its own vector, which it knows from the result.
Several members who join learn the sum over the others, and no more; one honest member among n has
therefore no protection from n - 1 who join. There is no threshold and no recovery: masks cancel
only if all members stay to the end, and if one dies the attempt is given up, with new keys next
time. A member that breaks the protocol can make the sum wrong unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shardpar.errors import PartyError, SpecError
from shardpar.fl.channel import Channel
from shardpar.fl.ring_messages import RingKey, RingPart
from shardpar.fl.secagg_session import Identity, Roster, Session, check_signature
from shardpar.fl.streams import KeyStream, add_streams, derived_key, shared_secret

_KEY = "ring key"


def ring_sum(
    channel: Channel,
    identity: Identity,
    session: Session,
    roster: Roster,
    vector: np.ndarray,
    timeout_s: float,
) -> np.ndarray:
    """The sum of all members' vectors modulo 2^32; every member calls this and has it.

    Args:
      channel: to the neighbours in the ring at least.
      identity: this member's long-term key.
      session: the same at all members; its cohort in its order is the ring.
      roster: long-term public keys of the members, known from before.
      vector: uint32 [session.words].
      timeout_s: how long to wait for each message of the one before.

    Returns:
      uint32 [session.words].

    Raises:
      PartyError: a member fell silent, or sent what the protocol does not allow; nobody may use
        this session again.
      SpecError: the vector is not one that was agreed on.
      RunError: this party has begun this session before.
    """
    if vector.dtype != np.uint32 or vector.shape != (session.words,):
        raise SpecError(
            f"a vector of {vector.dtype} {vector.shape}; {session.label} adds up "
            f"uint32 ({session.words},)"
        )
    identity.begin(session)
    ring = _Ring(channel, session, timeout_s)
    private = X25519PrivateKey.generate()
    keys = ring.gather_keys(_signed_key(identity, session, private), roster)
    total = masked(vector, session, identity.party, private, keys)
    parts = np.array_split(total, len(session.cohort))
    for step in range(ring.size - 1):
        ring.send(f"reduce/{step}", (ring.at - step) % ring.size, parts)
        part = (ring.at - step - 1) % ring.size
        # Both wrap around, as integers modulo 2^32 do.
        parts[part] += ring.receive(f"reduce/{step}", part, parts)
    for step in range(ring.size - 1):
        ring.send(f"gather/{step}", (ring.at + 1 - step) % ring.size, parts)
        part = (ring.at - step) % ring.size
        parts[part][:] = ring.receive(f"gather/{step}", part, parts)
    return total


def masked(
    vector: np.ndarray,
    session: Session,
    party: str,
    private: X25519PrivateKey,
    keys: dict[str, bytes],
) -> np.ndarray:
    """A member's vector plus its masks with all others, which cancel in the sum over all.

    Args:
      vector: uint32 [words].
      session: of this attempt.
      party: whose vector.
      private: its key of this attempt alone.
      keys: for each member the public half of its own.
    """
    plus: list[KeyStream] = []
    minus: list[KeyStream] = []
    for other in session.cohort:
        if other == party:
            continue
        first, second = sorted((party, other))
        key = derived_key(
            shared_secret(private, keys[other], party=other),
            job=session.job,
            round_=f"{session.round_}.{session.attempt}",
            first=first,
            second=second,
            purpose="ring mask",
        )
        (plus if party == first else minus).append(KeyStream(key))
    total = vector.copy()
    add_streams(total, plus, minus)
    return total


def _signed_key(identity: Identity, session: Session, private: X25519PrivateKey) -> RingKey:
    public = private.public_key().public_bytes_raw()
    return RingKey(identity.party, public, identity.sign(session, _KEY, public))


@dataclass
class _Ring:
    """A member's place among its neighbours."""

    channel: Channel
    session: Session
    timeout_s: float

    @property
    def size(self) -> int:
        return len(self.session.cohort)

    @property
    def at(self) -> int:
        return self.session.cohort.index(self.channel.party)

    @property
    def before(self) -> str:
        return self.session.cohort[self.at - 1]

    @property
    def after(self) -> str:
        return self.session.cohort[(self.at + 1) % self.size]

    def gather_keys(self, own: RingKey, roster: Roster) -> dict[str, bytes]:
        """The public keys of all members, each checked by its signature."""
        known, passing = {own.party: own.mask_key}, own
        for step in range(self.size - 1):
            self.channel.send(self.after, self._topic(f"key/{step}"), passing)
            passing = self.channel.receive(
                self.before, self._topic(f"key/{step}"), RingKey, self.timeout_s
            )
            due = self.session.cohort[(self.at - step - 1) % self.size]
            if passing.party != due:
                raise self._refusal(f"passed on a key of {passing.party!r} where {due}'s is due")
            check_signature(roster, due, passing.signature, self.session, _KEY, passing.mask_key)
            known[due] = passing.mask_key
        return known

    def send(self, topic: str, part: int, parts: Sequence[np.ndarray]) -> None:
        words = parts[part].astype("<u4", copy=False).tobytes()
        self.channel.send(self.after, self._topic(topic), RingPart(part, words))

    def receive(self, topic: str, part: int, parts: Sequence[np.ndarray]) -> np.ndarray:
        message = self.channel.receive(self.before, self._topic(topic), RingPart, self.timeout_s)
        if message.part != part or len(message.words) != 4 * parts[part].size:
            raise self._refusal(
                f"sent {len(message.words)} bytes of part {message.part} where "
                f"{4 * parts[part].size} of part {part} are due"
            )
        return np.frombuffer(message.words, "<u4")

    def _topic(self, what: str) -> str:
        return f"ring/{self.session.label}/{what}"

    def _refusal(self, words: str) -> PartyError:
        return PartyError(f"{self.before} {words}", party=self.before)
