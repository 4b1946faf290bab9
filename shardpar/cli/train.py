"""`shardpar train`: from a config to a trained model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shardpar.cli.arguments import ConfigAndOverrides, Devices, Json, PlanFile, read_any_config
from shardpar.cli.later import later
from shardpar.cli.stored import stored_without_plan
from shardpar.config.schema import FederatedConfig, NodesConfig, RunConfig, SparseConfig
from shardpar.errors import UserError
from shardpar.run.rendezvous import find
from shardpar.run.supervised import STANDBY, wait_for_turn


def train(
    config: ConfigAndOverrides = None,
    devices: Devices = None,
    plan: PlanFile = None,
    run_dir: Annotated[
        str | None,
        typer.Option("--run-dir", metavar="DIR", help="Where the run lives; resumed if it exists."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="DIR", help="Go on with a run, with its own config."),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--coordinator",
            metavar="HOST:PORT",
            help="With several processes, where process 0 listens; launchers say it by themselves.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="How many processes train together.")
    ] = None,
    process: Annotated[
        int | None, typer.Option("--process", min=0, help="Which of them this one is, from 0.")
    ] = None,
    supervise: Annotated[
        bool,
        typer.Option(
            "--supervise", help="Start the trainer again, on what is left, when it dies or hangs."
        ),
    ] = False,
    nodes: Annotated[
        int,
        typer.Option("--nodes", min=1, help="With --supervise: how many nodes train together."),
    ] = 1,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="NAME", help="This node's name; the host's by default."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST",
            help="Where other nodes reach this one; its host name by default.",
        ),
    ] = None,
    json: Json = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the plan; write nothing.")
    ] = False,
) -> None:
    """Train a model; without arguments, the demo.

    Examples:

        shardpar train

        shardpar train configs/gpt.gin train.steps=50 optimizer.learning_rate=3e-4

        shardpar train configs/gpt.gin --devices 8 plan.fsdp=4 plan.tensor=2

        shardpar train --resume runs/gpt

        shardpar train configs/gpt.gin --run-dir runs/gpt --supervise

        shardpar train configs/deepfm.gin data.path=train.ffm data.eval_path=test.ffm

        shardpar train configs/deepfm.gin ps.servers=2 ps.workers=4 "ps.consistency='ssp(4)'"

        shardpar train configs/node2vec.gin data.path=edges.txt data.format=edges

        shardpar train configs/fedavg.gin federated.algorithm=scaffold

        shardpar train configs/gpt.gin --coordinator node1:1234 --processes 2 --process 0
    """
    ahead = None
    if STANDBY in os.environ:
        later("training")
        if os.environ[STANDBY] == "programs" and resume is not None:
            ahead = later("preparing").stand_by(resume, config, devices=devices, plan=plan)
        if not wait_for_turn(os.environ, sys.stdin):
            raise typer.Exit
    if supervise:
        _refuse_with_supervise(coordinator, processes, process, dry_run)
    elif nodes > 1 or node is not None or address is not None:
        raise UserError("--nodes, --node and --address belong to --supervise; add it")
    where = None if supervise else find(os.environ, coordinator, processes, process)
    if resume is not None:
        if run_dir is not None or any(text.startswith("train.run_dir=") for text in config or ()):
            raise UserError(
                f"--resume {resume} and another run directory name two places; a run goes on "
                "where it is: drop the other, or copy the directory first"
            )
        if config and "=" not in config[0]:
            raise UserError(
                f"--resume {resume} goes on with the config of that run; drop {config[0]}, or "
                f"write: shardpar train {config[0]} --run-dir {resume}"
            )
        kept = stored_without_plan(resume, config or ())
        if kept is not None:
            trainer = _without_plan(kept, supervise, where is not None, plan, devices)
            trainer.train(kept, Path(resume).name, devices, json=json, dry_run=dry_run)
            return
        if supervise:
            stored, name = later("supervising").stored_config(resume, config or ())
            code = later("supervising").supervise(
                config or (), stored, name, resume=resume, flags=_flags(devices, plan, json),
                nodes=nodes, node=node, address=address,
            )  # fmt: skip
            raise typer.Exit(code)
        later("training").resume(
            resume, config, devices=devices, where=where, plan=plan, json=json, dry_run=dry_run,
            ahead=ahead,
        )  # fmt: skip
        return
    loaded, name = read_any_config(config, {"plan.file": plan, "train.run_dir": run_dir})
    if not isinstance(loaded, RunConfig):
        trainer = _without_plan(loaded, supervise, where is not None, plan, devices)
        trainer.train(loaded, name, devices, json=json, dry_run=dry_run)
        return
    if supervise:
        code = later("supervising").supervise(
            config or (), loaded, name, resume=None, flags=_flags(devices, plan, json),
            nodes=nodes, node=node, address=address,
        )  # fmt: skip
        raise typer.Exit(code)
    later("training").train(loaded, name, devices=devices, where=where, json=json, dry_run=dry_run)


def _without_plan(
    config: SparseConfig | NodesConfig | FederatedConfig,
    supervise: bool,
    several: bool,
    plan: str | None,
    devices: int | None,
) -> Any:
    """What trains models that have no plan.

    Raises:
      UserError: a flag is for models with a plan.
    """
    federated = isinstance(config, FederatedConfig)
    nodes = isinstance(config, NodesConfig)
    what = "a federation" if federated else "a model with tables"
    what = "a model of a graph's nodes" if nodes else what
    if supervise:
        raise UserError(f"--supervise is for models with a plan; run {what} without it")
    if several:
        raise UserError(
            f"{what} trains in one process, on all of its devices; start it without a launcher"
            + (", or deploy it with `shardpar fl`" if federated else "")
        )
    if plan is not None:
        has_tables = isinstance(config, SparseConfig)
        instead = "write table.placement=rows or columns" if has_tables else "drop --plan"
        raise UserError(f"{what} has no plan; {instead}")
    if isinstance(config, SparseConfig) and config.ps.servers:
        if devices is not None:
            raise UserError(
                "with ps.servers each worker is a process with its own devices; drop --devices, "
                "and write ps.workers"
            )
        return later("cluster_training")
    if nodes:
        return later("node_training")
    return later("federated_training" if federated else "sparse_training")


def _flags(devices: int | None, plan: str | None, json: bool) -> list[str]:
    """The flags that a supervisor gives to every trainer."""
    flags = [] if devices is None else ["--devices", str(devices)]
    flags += [] if plan is None else ["--plan", plan]
    return flags + (["--json"] if json else [])


def _refuse_with_supervise(
    coordinator: str | None, processes: int | None, process: int | None, dry_run: bool
) -> None:
    if (coordinator, processes, process) != (None, None, None):
        raise UserError(
            "a supervisor tells its trainers where they meet; drop --coordinator, --processes and "
            "--process, and start one supervisor on each node with --nodes N"
        )
    if dry_run:
        raise UserError("--dry-run starts nothing, so there is nothing to supervise; drop one")
