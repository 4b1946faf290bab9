"""`shardpar fl`: parties that may not share data train together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shardpar.cli.later import later
from shardpar.cli.vertical import vertical
from shardpar.errors import UserError

fl = typer.Typer(
    help="Federated learning between organisations.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
fl.add_typer(vertical, name="vertical")


@fl.callback()
def _verbs() -> None:
    """Federated learning between organisations."""


def _federating() -> Any:
    """The heavy half of the verbs.

    Raises:
      UserError: the extra is not installed.
    """
    try:
        return later("federating")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in {"grpc", "cryptography"}:
            raise
        raise UserError(f"{error.name} is not installed; run: pip install 'shardpar[fl]'") from None


@fl.command()
def keys(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where the keys go.")],
    party: Annotated[
        list[str], typer.Option("--party", metavar="NAME", help="A party; give one for each.")
    ],
    address: Annotated[
        list[str] | None,
        typer.Option("--address", metavar="HOST", help="A host or IP address beside localhost."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace keys that are there.")] = False,
) -> None:
    """Make a TEST authority, and a certificate and signing key for each party.

    Whoever runs this holds all private keys: in production each party makes its own.

    Examples:

        shardpar fl keys keys --party aggregator --party a --party b
    """
    _federating().keys(directory, party, address or [], force=force)
