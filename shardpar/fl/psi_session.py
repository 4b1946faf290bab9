"""What the parties of a private set intersection agree on before it starts, and what an id is."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shardpar.errors import DataError, PartyError, SpecError
from shardpar.fl.psi_messages import Opening
from shardpar.fl.streams import joined

SUITE = "curve25519_XMD:SHA-512_ELL2_NU_"
Id = str | bytes


@dataclass(frozen=True)
class PsiSession:
    """One intersection of one job; equal at all parties.

    Attributes:
      job: names the federation.
      parties: everyone, in an order that all agree on.
      run: of the job; ids are hashed differently in each.
      learners: who learns which of its own ids are common; empty for all parties.
      least_ids: the fewest ids that a party may bring: a set of one asks about one person.
      most_ids: the most; a larger claim is refused before memory is spent on it.

    >>> PsiSession("job", ("a", "b")).label
    'psi/job/0'
    """

    job: str
    parties: tuple[str, ...]
    run: int = 0
    learners: tuple[str, ...] = ()
    least_ids: int = 0
    most_ids: int = 1 << 27

    def __post_init__(self) -> None:
        """Checks that the names make sense."""
        if len(self.parties) < 2 or len(set(self.parties)) != len(self.parties):
            raise SpecError(f"parties {self.parties}; an intersection has two or more, each once")
        if not set(self.learners) <= set(self.parties):
            raise SpecError(f"learners {self.learners} are not all among {self.parties}")
        if not 0 <= self.least_ids <= self.most_ids < 1 << 32:
            raise SpecError(
                f"least_ids {self.least_ids} and most_ids {self.most_ids} must be in this order, "
                "from 0 to below 2^32"
            )

    @cached_property
    def digest(self) -> bytes:
        """Of all of it, 32 bytes."""
        fields = (self.job, self.run, self.least_ids, self.most_ids, len(self.parties))
        names = (*self.parties, *(p for p in self.parties if self.learns(p)))
        return hashlib.sha256(joined("shardpar.fl.psi 1", SUITE, *fields, *names)).digest()

    @cached_property
    def dst(self) -> bytes:
        """The domain separation tag under which ids are hashed to the curve."""
        return b"SHARDPAR-PSI-V01-with-" + SUITE.encode() + b"-" + self.digest

    @property
    def label(self) -> str:
        """What topics begin with."""
        return f"psi/{self.job}/{self.run}"

    def learns(self, party: str) -> bool:
        """Whether the party learns which of its ids are common."""
        return not self.learners or party in self.learners

    def opening(self, count: int) -> Opening:
        """The first message of a party with so many ids.

        Raises:
          DataError: fewer or more than was agreed on.
        """
        if not self.least_ids <= count <= self.most_ids:
            raise DataError(
                f"{count} ids; {self.label} takes {self.least_ids} to {self.most_ids} of each party"
            )
        return Opening(self.digest, count)

    def opened(self, party: str, opening: Opening) -> int:
        """How many ids another party says it has.

        Raises:
          PartyError: it agrees on something else, or brings too few or too many.
        """
        if opening.session != self.digest:
            raise PartyError(
                f"{party} disagrees about {self.label}: job, run, parties (in order), learners, "
                "least_ids and most_ids must be the same everywhere",
                party=party,
            )
        if not self.least_ids <= opening.count <= self.most_ids:
            raise PartyError(
                f"{party} brings {opening.count} ids; {self.label} takes {self.least_ids} to "
                f"{self.most_ids}",
                party=party,
            )
        return opening.count


def id_bytes(value: Id) -> bytes:
    r"""An id as it is hashed: bytes as they are, text in Unicode's form NFC as UTF-8.

    Nothing else is evened out: case, spaces and leading zeros count.

    Raises:
      DataError: it is empty, or neither text nor bytes.

    >>> id_bytes("e\u0301") == id_bytes("\u00e9") == b"\xc3\xa9"
    True
    """
    if isinstance(value, str):
        text = value if value.isascii() else unicodedata.normalize("NFC", value)
        try:
            value = text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"is no text: {error.reason}; read the file as UTF-8") from None
    elif not isinstance(value, bytes):
        raise DataError(f"is {type(value).__name__}; convert it to str, the same way everywhere")
    if not value:
        raise DataError("is empty; leave out rows without an id")
    return bytes(value)


def ids_of(values: Sequence[Id]) -> list[bytes]:
    """Every row's id as it is hashed.

    Raises:
      DataError: one is none, or two are equal; rows are named, ids are not.
    """
    found: list[bytes] = []
    for row, value in enumerate(values):
        try:
            found.append(id_bytes(value))
        except DataError as error:
            raise DataError(f"the id of row {row} {error}") from None
    seen: set[bytes] = set()
    for row, one in enumerate(found):
        if one in seen:
            raise DataError(
                f"rows {found.index(one)} and {row} have the same id; ids must be unique to line "
                "rows up: keep one row of each"
            )
        seen.add(one)
    return found
