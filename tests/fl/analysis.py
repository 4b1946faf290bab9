"""Analyses over several parties in threads, with secure aggregation in between, for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shardpar.fl.secagg_session import Identity
from shardpar.fl.sums import SecureSums, Sums, serve_sums
from tests.fl.intersections import in_threads

Part = TypeVar("Part")


def each(parts: Sequence[Part], work: Callable[[Sums, Part], Any]) -> dict[str, Any]:
    """What the function returns at each party, and the number of sums at the aggregator."""
    names = [f"party {at}" for at in range(len(parts))]
    identities = {name: Identity(name, Ed25519PrivateKey.generate()) for name in names}
    roster = {name: one.key.public_key() for name, one in identities.items()}

    def party(name: str, part: Part):
        def run(end):
            sums = SecureSums(end, "server", identities[name], roster, "job")
            found = work(sums, part)
            sums.finish()
            return found

        return run

    parties = {name: party(name, part) for name, part in zip(names, parts, strict=True)}
    return in_threads({"server": lambda end: serve_sums(end, "job", roster, 20.0), **parties})


def together(parts: Sequence[Part], work: Callable[[Sums, Part], Any]) -> Any:
    """What the function returns, the same at all parties."""
    outcomes = each(parts, work)
    failed = [o for o in outcomes.values() if isinstance(o, Exception)]
    if failed:
        raise failed[0]
    assert isinstance(outcomes.pop("server"), int)
    first, *others = outcomes.values()
    for other in others:
        np.testing.assert_equal(plain(other), plain(first))
    return first


def plain(value: Any) -> Any:
    """Dataclasses as dicts, to compare."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
