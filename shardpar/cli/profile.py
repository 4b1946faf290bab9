"""`shardpar profile`: measures the devices at hand, or a model's layers on one of them."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from shardpar.cli.arguments import ConfigAndOverrides, Devices, Json, read_cluster, read_config
from shardpar.cli.later import later

profile = typer.Typer(
    help="Measure this machine, or a model's layers on it, for the planner.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Quick = Annotated[bool, typer.Option("--quick", help="Fewer sizes and shorter looks.")]


@profile.command()
def hardware(
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the cluster as YAML, and the curves beside it as FILE.profile.yaml.",
        ),
    ] = None,
    devices: Devices = None,
    quick: Quick = False,
    json: Json = False,
) -> None:
    """Measure matmul rates, memory bandwidth, collectives and overlap of the devices at hand.

    The cluster file has the measured rates in place of a datasheet's; plan with it. Virtual
    devices share the machine's cores, and are measured while all of them work.

    Examples:

        shardpar profile hardware --out here.yaml

        shardpar profile hardware --devices 4 --quick --out here.yaml

        shardpar plan configs/gpt.gin --cluster here.yaml
    """
    words = ["shardpar", "profile", "hardware"]
    words += ["--devices", str(devices)] if devices is not None else []
    words += ["--quick"] if quick else []
    later("profiling").profile_hardware(
        shlex.join(words), out=out, devices=devices, quick=quick, json=json
    )


@profile.command()
def model(
    config: ConfigAndOverrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="FILE", help="Predict with the rates of its first device."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write the profile as YAML.")
    ] = None,
    quick: Quick = False,
    json: Json = False,
) -> None:
    """Measure one layer of each class on one device, and compare with the planner's prediction.

    Forward, and forward with backward, at several batch sizes and sequence lengths.

    Examples:

        shardpar profile model configs/gpt.gin --out model.yaml

        shardpar profile hardware --out here.yaml

        shardpar profile model configs/gpt.gin --cluster here.yaml
    """
    loaded, _ = read_config(config, {})
    machines = read_cluster(cluster) if cluster else None
    words = ["shardpar", "profile", "model", *(config or ()), *(["--quick"] if quick else [])]
    later("profiling").profile_model(
        loaded, machines, shlex.join(words), out=out, quick=quick, json=json
    )
