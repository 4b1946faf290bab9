"""Decides which of two parties dials the other, and what an address looks like: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardpar.errors import UserError


def require_address(address: str, *, of: str) -> str:
    """A "host:port" to dial or to listen at; port 0 is any free one.

    Raises:
      UserError: it is none.

    >>> require_address("10.0.0.3:7443", of="hospital-a")
    '10.0.0.3:7443'
    """
    host, colon, port = address.rpartition(":")
    whole = (host.startswith("[") and host.endswith("]")) or ":" not in host
    if not (colon and host and whole and port.isascii() and port.isdigit() and int(port) < 65536):
        raise UserError(
            f"the address of {of} is {address!r}; write host:port, such as 10.0.0.3:7443 or "
            "[fd00::3]:7443"
        )
    return address


def split_address(address: str) -> tuple[str, int]:
    """Host and port.

    >>> split_address("[::1]:80")
    ('::1', 80)
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def dialled(
    party: str,
    parties: Sequence[str],
    addresses: Mapping[str, str],
    *,
    aggregator: str | None = None,
) -> dict[str, str]:
    """Whom a party dials, and where; all others that have to do with it dial this party.

    With an aggregator everyone dials it, so that only it must be reachable. Without one, of any two
    parties the one that is later in their order dials the earlier.

    Args:
      party: whose links.
      parties: everyone, in the order that all agree on.
      addresses: where each party that is dialled can be reached.
      aggregator: the party that all others speak with; None when all speak with all.

    Raises:
      UserError: a party is not one of the parties, or an address is missing.

    >>> dialled("c", ["a", "b", "c"], {"a": "h:1", "b": "h:2", "c": "h:3"})
    {'a': 'h:1', 'b': 'h:2'}
    >>> dialled("c", ["a", "b", "c"], {"b": "h:2"}, aggregator="b")
    {'b': 'h:2'}
    """
    for name in [party, *([aggregator] if aggregator else [])]:
        if name not in parties:
            raise UserError(f"{name!r} is not one of the parties {', '.join(parties)}")
    if aggregator is not None:
        others = [] if party == aggregator else [aggregator]
    else:
        others = list(parties[: list(parties).index(party)])
    missing = [other for other in others if other not in addresses]
    if missing:
        raise UserError(f"{party} dials {', '.join(missing)}, whose address is not given")
    return {other: require_address(addresses[other], of=other) for other in others}
