"""Decides about a run's slow or lost devices: the heavy half of `shardpar replan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from shardpar.cli.arguments import read_cluster
from shardpar.cli.planning import capture_aloud, use_devices
from shardpar.cli.tables import console, print_json
from shardpar.config.load import load
from shardpar.errors import UserError
from shardpar.lowering.devices import local_cluster
from shardpar.planner.replan import Alternative, Decision, replan
from shardpar.run.directory import RunDirectory
from shardpar.run.durable import write_atomically
from shardpar.spec.text import plan_to_text
from shardpar.train import compile as compilation
from shardpar.train.optimizer import make_optimizer
from shardpar.train.requests import REQUEST


def replan_run(
    run: str,
    speeds: Mapping[int, float],
    lost: tuple[int, ...],
    *,
    devices: int | None,
    dry_run: bool,
    json: bool,
) -> None:
    """Prints the decision for a run, and leaves it a request."""
    use_devices(devices)
    directory = RunDirectory.existing(Path(run))
    config = load(str(directory.config_yaml))
    if not directory.plan.is_file():
        raise UserError(f"{directory.path} has no plan.yaml yet; wait until it has begun to train")
    plan = compilation.read_plan(directory.plan)
    here = config.plan.cluster
    machines = local_cluster() if here is None else read_cluster(here)
    if max(plan.devices) >= machines.num_devices:
        raise UserError(
            f"{directory.plan} uses device {max(plan.devices)}, and there are "
            f"{machines.num_devices} here; run this where the run's devices are, or give their "
            "number with --devices"
        )
    captured = capture_aloud(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    options = config.plan.without_pins() if lost else replace(config.plan, file=None)
    work = compilation.workload(captured, optimizer, config.program, config.train.global_batch)
    decision = replan(
        captured.graph, machines, work, options, plan, speeds=speeds,
        devices=set(range(machines.num_devices)) - set(lost), costs=config.replan,
    )  # fmt: skip
    if json:
        print_json(_as_json(decision))
    else:
        print(decision, end="")  # noqa: T201
    if dry_run:
        return
    request = {"lost": list(lost), "speeds": dict(speeds)}
    write_atomically(directory.path / REQUEST, yaml.safe_dump(request).encode())
    console(stderr=True).print(
        f"asked: {directory.path / REQUEST}; a trainer that runs takes it after its next step",
        highlight=False,
    )


def _as_json(decision: Decision) -> dict[str, Any]:
    return {
        "chosen": decision.name,
        "why": decision.why,
        "plan": plan_to_text(decision.plan),
        "alternatives": [_alternative(a) for a in decision.alternatives],
    }


def _alternative(a: Alternative) -> dict[str, Any]:
    if a.plan is None:
        return {"name": a.name, "note": a.note}
    return {
        "name": a.name,
        "step_s": a.step_s,
        "moved_bytes": a.move.moved_bytes,
        "restored_bytes": a.move.restored_bytes,
        "move_s": a.move.move_s,
    }
