"""Decides whether two parties mean the same federation: every shared key has one value everywhere.

What is shared is text by key, such as `federated.rounds`; how it is compared is here alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from shardpar.errors import ConfigError
from shardpar.fl.streams import joined

Terms = Mapping[str, str]
_SHOWN = 5


def digest_of(terms: Terms) -> bytes:
    """Of all keys and values, 32 bytes; the order of keys does not matter.

    >>> digest_of({"a": "1", "b": "2"}) == digest_of({"b": "2", "a": "1"})
    True
    """
    parts = [part for key in sorted(terms) for part in (key, terms[key])]
    return hashlib.sha256(joined("shardpar.fl terms 1", *parts)).digest()


def require_agreement(mine: Terms, theirs: Terms, *, party: str) -> None:
    """Compares this party's terms with another's.

    Args:
      mine: of this party.
      theirs: of the other.
      party: the other.

    Raises:
      ConfigError: names each key that differs, with both values.

    >>> require_agreement({"a.b": "1"}, {"a.b": "2"}, party="the aggregator")
    Traceback (most recent call last):
    ...
    shardpar.errors.ConfigError: a.b is 1 here and 2 at the aggregator; all parties must ... alike
    """
    lines = []
    for key in sorted({*mine, *theirs}):
        here, there = mine.get(key), theirs.get(key)
        if here != there:
            lines.append(f"{key} is {_shown(here)} here and {_shown(there)} at {party}")
    if lines:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ConfigError("; ".join(lines[:_SHOWN]) + more + "; all parties must write it alike")


def _shown(value: str | None) -> str:
    return "not set" if value is None else value[:200]
