"""`shardpar explain`: every value between a config and a compiled program, to look at."""

from __future__ import annotations

from enum import StrEnum
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


class Phase(StrEnum):
    """How far to go."""

    config = "config"
    graph = "graph"
    plan = "plan"
    program = "program"


def explain(
    config: ConfigAndOverrides = None,
    stop_after: Annotated[
        Phase, typer.Option("--stop-after", help="Which value to print.")
    ] = Phase.plan,
    shardings: Annotated[
        bool, typer.Option("--shardings", help="Print every parameter's layout, with pictures.")
    ] = False,
    cluster: ClusterFile = None,
    devices: Devices = None,
    plan: PlanFile = None,
    json: Json = False,
) -> None:
    """Print what shardpar makes of a config: the resolved config, graph, plan or program.

    The program shows the collectives XLA inserted, counted, with their bytes.

    Examples:

        shardpar explain configs/llama_7b.gin --stop-after graph

        shardpar explain configs/gpt.gin --devices 8 --shardings

        shardpar explain configs/gpt.gin --devices 8 plan.fsdp=8 --stop-after program
    """
    loaded, _ = read_config(config, {"plan.file": plan, "plan.cluster": cluster})
    if stop_after is Phase.config and not shardings:
        from shardpar.cli.tables import print_config

        print_config(loaded, json=json)
        return
    machines = read_cluster(loaded.plan.cluster) if loaded.plan.cluster else None
    later("planning").explain(
        loaded, machines, str(stop_after), shardings=shardings, devices=devices, json=json
    )
