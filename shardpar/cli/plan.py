"""`shardpar plan`: the plan for a config, here or on machines that are elsewhere."""

from __future__ import annotations

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


def plan(
    config: ConfigAndOverrides = None,
    cluster: ClusterFile = None,
    devices: Devices = None,
    plan: PlanFile = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write the plan as YAML.")
    ] = None,
    json: Json = False,
) -> None:
    """Plan a config: per stage devices, layers, strategy, predicted milliseconds and GiB.

    Examples:

        shardpar plan configs/gpt.gin --devices 8

        shardpar plan configs/llama_7b.gin --cluster configs/clusters/h100x8.yaml --out plan.yaml

        shardpar train configs/gpt.gin --plan plan.yaml
    """
    loaded, _ = read_config(config, {"plan.file": plan, "plan.cluster": cluster})
    machines = read_cluster(loaded.plan.cluster) if loaded.plan.cluster else None
    later("planning").plan(loaded, machines, devices=devices, out=out, json=json)
