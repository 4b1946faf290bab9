"""What all parties of one secure aggregation agree on before it starts, and who signs for whom.

Every key, signature and ciphertext of a round is bound to the digest of its session, so parties
that disagree about anything, and messages of another round, are found out at the first message.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from shardpar.errors import PartyError, RunError, SpecError
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.streams import joined


@dataclass(frozen=True)
class Session:
    """One attempt at one round of one job.

    Attributes:
      job: names the federation; no two jobs of the same parties share a name.
      round_: of the job. A round is never run twice: a repetition is another attempt.
      cohort: the clients asked to take part, sorted.
      words: of each client's vector.
      threshold: how many of the cohort must stay to the end.
      neighbours: see `SecAggOptions`.
      attempt: counts up when a round is begun again.
    """

    job: str
    round_: int
    cohort: tuple[str, ...]
    words: int
    threshold: int
    neighbours: int | None = None
    attempt: int = 0

    def __post_init__(self) -> None:
        """Checks what would make a sum reveal a single update."""
        if list(self.cohort) != sorted(set(self.cohort)):
            raise SpecError(f"the cohort {self.cohort} must be sorted and without repetitions")
        clients = len(self.cohort)
        if clients < 2:
            raise SpecError(f"{clients} clients: the sum would be a client's own update; take 2+")
        if not clients // 2 + 1 <= self.threshold <= clients or self.threshold < 2:
            raise SpecError(
                f"threshold {self.threshold} of {clients} clients; use {clients // 2 + 1} to "
                f"{clients}: with half of them two different sums could be unmasked"
            )
        if self.words < 1:
            raise SpecError(f"vectors of {self.words} words")

    @classmethod
    def of(
        cls,
        job: str,
        round_: int,
        cohort: tuple[str, ...],
        words: int,
        options: SecAggOptions,
        attempt: int = 0,
    ) -> Session:
        """A session by a user's options.

        >>> Session.of("job", 3, ("a", "b", "c", "d"), 10, SecAggOptions()).threshold
        3
        """
        clients = len(cohort)
        threshold = options.stay_to_the_end(clients)
        return cls(
            job, round_, tuple(sorted(cohort)), words, threshold, options.neighbours, attempt
        )

    @cached_property
    def digest(self) -> bytes:
        """Of all of it, 32 bytes."""
        degree = "all" if self.neighbours is None else self.neighbours
        fields = (self.job, self.round_, self.attempt, self.words, self.threshold, degree)
        return hashlib.sha256(joined("shardpar.fl.secagg 1", *fields, *self.cohort)).digest()

    @property
    def label(self) -> str:
        """What a round is called in topics and errors.

        >>> Session("job", 3, ("a", "b"), 1, 2).label
        'job/3.0'
        """
        return f"{self.job}/{self.round_}.{self.attempt}"

    def point(self, party: str) -> int:
        """Where the party's shares are evaluated."""
        return self.cohort.index(party) + 1

    def shares_needed(self, holders: int) -> int:
        """How many of so many holders' shares restore a secret.

        Of everyone, the threshold; of a few neighbours just over half, so that a round survives
        when chance takes more of one client's neighbours than of the cohort.
        """
        if self.neighbours is not None:
            return holders // 2 + 1
        share = self.threshold / len(self.cohort)
        return max(holders // 2 + 1, math.ceil(share * holders - 1e-9))


Roster = Mapping[str, Ed25519PublicKey]


@dataclass
class Identity:
    """A party's long-term key, and the rounds it has begun.

    Attributes:
      party: whose.
      key: signs its messages; the others know the public half from the roster.
    """

    party: str
    key: Ed25519PrivateKey
    _begun: set[bytes] = field(default_factory=set)

    def begin(self, session: Session) -> None:
        """Notes that a session has begun.

        Raises:
          RunError: it has before; its masks would be asked for twice.
        """
        name = joined(session.job, session.round_, session.attempt)
        if name in self._begun:
            raise RunError(
                f"{self.party} has begun {session.label} before; to repeat a round, raise its "
                "attempt"
            )
        self._begun.add(name)

    def sign(self, session: Session, purpose: str, *parts: bytes | str) -> bytes:
        """A signature, 64 bytes, bound to the session and the purpose."""
        return self.key.sign(_signed(session, purpose, self.party, parts))


def check_signature(
    roster: Roster,
    party: str,
    signature: bytes,
    session: Session,
    purpose: str,
    *parts: bytes | str,
) -> None:
    """Checks what `Identity.sign` made.

    Raises:
      PartyError: the party is not in the roster, or did not sign this.
    """
    key = roster.get(party)
    if key is None:
        raise PartyError(f"{party} is not in the roster of long-term keys", party=party)
    try:
        key.verify(signature, _signed(session, purpose, party, parts))
    except InvalidSignature:
        raise PartyError(
            f"{party} has not signed this {purpose} for {session.label}: it was changed on its "
            "way, is of another round, or the parties disagree about the session",
            party=party,
        ) from None


def _signed(session: Session, purpose: str, party: str, parts: tuple[bytes | str, ...]) -> bytes:
    return joined("shardpar.fl.secagg signature", purpose, session.digest, party, *parts)
