"""One party's end of a vertical protocol: its keys, the other's public key, and what they agreed.

Before anything else both say how many rows and columns they have, a digest of the row ids and the
options; each refuses to go on unless they fit. So each party learns the other's number of columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import msgspec

from shardpar.errors import PartyError, SpecError
from shardpar.fl.channel import Channel
from shardpar.fl.he import okamoto_uchiyama, paillier
from shardpar.fl.he.ciphertexts import Ciphertexts, CiphertextsMessage, PublicKey
from shardpar.fl.he.pool import Pool, SecretKey
from shardpar.fl.messages import M, Message, decode, encode
from shardpar.fl.vertical.options import KeyOptions

Role = Literal["guest", "host"]
_SCHEMES: dict[str, ModuleType] = {
    "paillier": paillier,
    "okamoto_uchiyama": okamoto_uchiyama,
}


class Hello(Message):
    """What a party is and wants.

    Attributes:
      role: guest or host.
      rows: how many it has.
      rows_digest: of the ids in their order; empty where there are none.
      columns: how many weights or features it has.
      terms: the options, as JSON.
      key: its public key, encoded.
    """

    role: Role
    rows: int
    rows_digest: bytes
    columns: int
    terms: str
    key: bytes


@dataclass(frozen=True)
class Link:
    """A party's end, after both have said hello.

    Attributes:
      channel: what carries messages.
      peer: the other party.
      role: this one's.
      topic: under which all of its messages go.
      secret: this party's key.
      key: the other's.
      pool: what encrypts and multiplies.
      rows: of both.
      peer_columns: of the other.
    """

    channel: Channel
    peer: str
    role: Role
    topic: str
    secret: SecretKey
    key: PublicKey
    pool: Pool
    rows: int
    peer_columns: int

    @property
    def is_guest(self) -> bool:
        """Whether this party has the labels."""
        return self.role == "guest"

    def send(self, topic: str, message: Message) -> None:
        """Sends a message to the other party."""
        self.channel.send(self.peer, f"{self.topic}/{topic}", message)

    def receive(self, topic: str, kind: type[M]) -> M:
        """The other party's next message of a topic."""
        return self.channel.receive(self.peer, f"{self.topic}/{topic}", kind)

    def receive_if_there(self, topic: str, kind: type[M]) -> M | None:
        """The other party's next message of a topic; None where none has come yet.

        A channel that is broken says so when it is next waited on.
        """
        try:
            return self.channel.receive(self.peer, f"{self.topic}/{topic}", kind, timeout_s=0.0)
        except PartyError:
            return None

    def send_encrypted(self, topic: str, numbers: Sequence[int]) -> None:
        """Sends numbers under this party's own key."""
        self.send(topic, self.pool.encrypt(self.secret, numbers).to_message())

    def receive_ciphertexts(self, topic: str, key: PublicKey, count: int) -> Ciphertexts:
        """So many ciphertexts from the other party, under this key.

        Raises:
          PartyError: they are others.
        """
        message = self.receive(topic, CiphertextsMessage)
        return Ciphertexts.from_message(key, message, count=count, party=self.peer)

    def decrypt(self, ciphertexts: Ciphertexts) -> list[int]:
        """The numbers in what the other party computed.

        With Okamoto-Uchiyama keys this trusts it to have followed the protocol, as the options say.
        """
        return self.pool.decrypt(self.secret, ciphertexts, trusted=True)


def greet(
    channel: Channel,
    role: Role,
    options: Any,
    keys: KeyOptions,
    *,
    topic: str,
    rows: int,
    columns: int,
    row_ids: Sequence[str] | None = None,
    pool: Pool | None = None,
    secret: SecretKey | None = None,
) -> Link:
    """Makes a key and says hello.

    Args:
      channel: to exactly one other party.
      role: this party's.
      options: what both must have alike: a dataclass.
      keys: how keys are made; all but `processes` must be alike.
      topic: of the conversation; a new one for each.
      rows: of this party.
      columns: of this party.
      row_ids: whose rows they are; compared by digest.
      pool: what encrypts; None for one made from `keys`.
      secret: a key that is there already, of an earlier link between the same two; None makes one.

    Raises:
      PartyError: the other has other rows, options or the same role.
      SpecError: there are not two parties.
    """
    if len(channel.parties) != 2:
        raise SpecError(f"vertical training is between two parties, not {channel.parties}")
    (peer,) = (party for party in channel.parties if party != channel.party)
    scheme = _SCHEMES[keys.scheme]
    small = keys.unsafe_small_keys_for_tests
    if secret is None:
        secret = scheme.generate(keys.bits, unsafe_small_key_for_tests=small)
    terms = msgspec.json.encode([options, keys.scheme, keys.bits]).decode()
    hello = Hello(role, rows, _digest(row_ids), columns, terms, encode(secret.public.to_message()))
    channel.send(peer, f"{topic}/hello", hello)
    theirs = channel.receive(peer, f"{topic}/hello", Hello)
    flaw = _flaw(hello, theirs)
    if flaw is not None:
        raise PartyError(f"{peer} {flaw}", party=peer)
    message = decode(theirs.key, scheme.PublicKeyMessage, party=peer)
    key = scheme.PublicKey.from_message(message, party=peer, unsafe_small_key_for_tests=small)
    if key == secret.public:
        raise PartyError(f"{peer} sent this party's own key back", party=peer)
    pool = pool or Pool(keys.processes)
    return Link(channel, peer, role, topic, secret, key, pool, rows, theirs.columns)


def _digest(row_ids: Sequence[str] | None) -> bytes:
    if row_ids is None:
        return b""
    digest = hashlib.sha256()
    for each in row_ids:
        raw = each.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.digest()


def _flaw(ours: Hello, theirs: Hello) -> str | None:
    if theirs.role == ours.role:
        return f"is {ours.role} too: one party is the guest, who has the labels, the other the host"
    if theirs.rows != ours.rows:
        return f"has {theirs.rows} rows and this party {ours.rows}: align them first"
    if theirs.rows_digest != ours.rows_digest:
        return "has other rows, or in another order: align them first"
    if theirs.terms != ours.terms:
        return f"has other options: {theirs.terms[:2000]}, and this party {ours.terms}"
    if not 0 <= theirs.columns <= 1 << 20:
        return f"says that it has {theirs.columns} columns"
    return None
