"""Runs the verbs of `shardpar fl`: what needs the extra `fl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardpar.cli.tables import console
from shardpar.fl.net.keys import make_test_keys


def keys(directory: str, parties: Sequence[str], addresses: Sequence[str], *, force: bool) -> None:
    """Writes a test PKI, and says that it is one."""
    make_test_keys(Path(directory), parties, addresses=addresses, force=force)
    console(stderr=True).print(
        f"a TEST authority and keys of {', '.join(parties)} are in {directory}; in production each "
        "party makes its own key, and only its certificate request leaves it",
        highlight=False,
    )
