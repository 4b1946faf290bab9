"""`shardpar plan`: the plan for a config, here or on machines that are elsewhere."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from shardpar.cli.arguments import (
    ClusterFile,
    ConfigAndOverrides,
    Devices,
    Json,
    PlanFile,
    read_cluster,
    read_config,
)
from shardpar.cli.later import later
from shardpar.errors import UserError


def plan(
    config: ConfigAndOverrides = None,
    cluster: ClusterFile = None,
    devices: Devices = None,
    plan: PlanFile = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write the plan as YAML.")
    ] = None,
    fix: Annotated[
        str | None,
        typer.Option(
            "--fix",
            metavar="TEXT",
            help='Pin layers by hand, e.g. "blocks[0:4] tensor=2 recompute=full; head fsdp=1".',
        ),
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="Show where each layer's milliseconds and GiB come from.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--explain-against",
            metavar="FILE",
            help="Say why the plan in this file is slower or does not fit.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compile the plan for the cluster's devices, present or not; what does not fit is "
            "rejected.",
        ),
    ] = False,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write pictures of the plan.")
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace", metavar="FILE", help="Write the simulated timeline for ui.perfetto.dev."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Plan a config: per stage devices, layers, strategy, predicted milliseconds and GiB.

    Examples:

        shardpar plan configs/gpt.gin --devices 8

        shardpar plan configs/llama_7b.gin --cluster configs/clusters/h100x8.yaml --out plan.yaml

        shardpar train configs/gpt.gin --plan plan.yaml

        shardpar plan configs/gpt.gin --devices 8 --why --html plan.html

        shardpar plan configs/llama_7b.gin --cluster configs/clusters/h100x8.yaml --verify
    """
    flags = {"plan.file": plan, "plan.cluster": cluster, "plan.fix": fix}
    loaded, _ = read_config(config, flags)
    machines = read_cluster(loaded.plan.cluster) if loaded.plan.cluster else None
    if verify and machines is None:
        raise UserError(
            "--verify compiles for the devices of a cluster file, and none is given; add --cluster "
            "FILE, or use `shardpar explain --stop-after program` for the devices at hand"
        )
    if verify:
        # The compilers must not look for devices; jax reads this when it is imported.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    later("planning").plan(
        loaded,
        machines,
        devices=devices,
        out=out,
        json=json,
        show=later("planning").Show(why, against, html, trace),
        verify=verify,
    )
