"""`shardpar fl`: parties that may not share data train together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shardpar.cli.arguments import Json, read_any_config
from shardpar.cli.later import later
from shardpar.cli.vertical import vertical
from shardpar.config.schema import FederatedConfig
from shardpar.errors import UserError

fl = typer.Typer(
    help="""Federated learning between organisations that may not share data.

In this order:

1. `shardpar train CONFIG` simulates the federation in one program, to choose algorithm and rounds.

2. `shardpar fl run CONFIG -n 3` starts all parties as processes of this machine: the same protocol
as between organisations, with keys for tests.

3. Each organisation makes its keys (`shardpar fl keys` shows which files; in production only
certificate requests leave it) and writes who takes part into the shared config, section `net`.

4. `shardpar fl serve CONFIG` runs at the aggregator, `shardpar fl join CONFIG --party NAME` at each
party. Whoever is killed starts the same command again and goes on.

Parties check that their configs agree before anything is trained.""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
fl.add_typer(vertical, name="vertical")

Config = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG [SECTION.KEY=VALUE]...",
        help="A config with keys `federated.*`, then overrides such as `federated.rounds=5`.",
        show_default=False,
    ),
]
RunDir = Annotated[
    str | None,
    typer.Option(
        "--run-dir", metavar="DIR", help="Where it keeps its state; goes on if there is some."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show who would run where; start and write nothing.")
]


@fl.callback()
def _verbs() -> None:
    """Federated learning between organisations."""


def _heavy(module: str) -> Any:
    """The heavy half of a verb.

    Raises:
      UserError: the extra is not installed.
    """
    try:
        return later(module)
    except ModuleNotFoundError as error:
        extra = {"grpc", "cryptography", "dp_accounting"}
        if error.name is None or error.name.split(".")[0] not in extra:
            raise
        raise UserError(f"{error.name} is not installed; run: pip install 'shardpar[fl]'") from None


def _read(arguments: list[str], run_dir: str | None) -> tuple[FederatedConfig, str]:
    """The config of a federation.

    Raises:
      UserError: it is of something else.
    """
    if "=" in arguments[0]:
        raise UserError(f"name a config before {arguments[0]}, such as configs/fedavg_secure.gin")
    config, name = read_any_config(arguments, {"train.run_dir": run_dir})
    if not isinstance(config, FederatedConfig):
        raise UserError(
            f"{arguments[0]} is not the config of a federation: it has no key federated.*; "
            "see configs/fedavg_secure.gin"
        )
    return config, name


@fl.command()
def run(
    config: Config,
    parties: Annotated[
        int | None,
        typer.Option(
            "-n", "--parties", min=1, max=64, help="How many parties; net.parties by default, or 3."
        ),
    ] = None,
    run_dir: RunDir = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Run a whole federation as processes on this machine, with keys for tests.

    The run directory has one directory per process, its log in `NAME.log`, and `pids.json`. With
    --json a line per round is printed: round, accuracy, loss, sent_bytes, epsilon, dropped.

    Examples:

        shardpar fl run configs/fedavg_secure.gin -n 4

        shardpar fl run configs/fedavg.gin -n 3 federated.rounds=5 secagg.enabled=true --json
    """
    loaded, name = _read(config, run_dir)
    code = _heavy("federation_run").run(loaded, name, config, parties, json=json, dry_run=dry_run)
    raise typer.Exit(code)


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
    _heavy("federating").keys(directory, party, address or [], force=force)


@fl.command()
def serve(
    config: Config, run_dir: RunDir = None, json: Json = False, dry_run: DryRun = False
) -> None:
    """Be the aggregator: wait for the parties and run the rounds.

    Started again after it was killed, it goes on where it was.

    Examples:

        shardpar fl serve federation.gin --run-dir runs/stroke
    """
    loaded, _ = _read(config, run_dir)
    _heavy("serving").serve(loaded, json=json, dry_run=dry_run)


@fl.command()
def join(
    config: Config,
    party: Annotated[
        str, typer.Option("--party", metavar="NAME", help="Who this is: one of net.parties.")
    ],
    run_dir: RunDir = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Be a party: train on this party's own data when asked, until the rounds are over.

    Started again after it was killed, it takes part from the next round on. With net.topology=ring
    there is no aggregator: parties sum among themselves, and each prints its rounds with --json.

    Examples:

        shardpar fl join federation.gin --party hospital-a --run-dir runs/stroke
    """
    loaded, _ = _read(config, run_dir)
    _heavy("joining").join(loaded, party, json=json, dry_run=dry_run)
