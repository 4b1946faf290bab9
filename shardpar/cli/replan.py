"""`shardpar replan`: what to do about slow or lost devices of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from shardpar.cli.arguments import Devices, Json
from shardpar.cli.later import later
from shardpar.errors import UserError


def replan(
    run: Annotated[str, typer.Argument(metavar="DIR", help="The run's directory.")],
    slow: Annotated[
        list[str] | None,
        typer.Option(
            "--slow", metavar="DEVICE=SHARE", help="A device and the share of its rate it reaches."
        ),
    ] = None,
    lost: Annotated[
        str | None,
        typer.Option("--lost", metavar="D,D,...", help="Devices that are no longer there."),
    ] = None,
    devices: Devices = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the decision only; ask nothing of the run.")
    ] = False,
    json: Json = False,
) -> None:
    """Decide how a run goes on when devices are slow or lost, and ask it to.

    Run it where the run's devices are, or give their number with --devices. The trainer takes
    the request after its next step.

    Examples:

        shardpar replan runs/gpt --devices 8 --slow 3=0.4 --dry-run

        shardpar replan runs/gpt --devices 8 --lost 4,5
    """
    later("replanning").replan_run(
        run, _speeds(slow or []), _numbers(lost), devices=devices, dry_run=dry_run, json=json
    )


def _speeds(given: list[str]) -> dict[int, float]:
    out = {}
    for text in given:
        device, _, share = text.partition("=")
        try:
            out[int(device)] = float(share)
        except ValueError:
            raise UserError(f"--slow {text}: write DEVICE=SHARE, such as --slow 3=0.4") from None
    return out


def _numbers(given: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in (given or "").split(",") if part.strip())
    except ValueError:
        raise UserError(f"--lost {given}: write device numbers, such as --lost 4,5") from None
