"""Captures and plans a config, and prints what came of it: the heavy half of plan and explain."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import yaml

from shardpar.capture.trace import Captured, trace
from shardpar.cli.plan_page import Compiled as PageCompiled
from shardpar.cli.plan_page import plan_page
from shardpar.cli.tables import (
    both_collectives_table,
    collectives_table,
    console,
    graph_table,
    plan_table,
    print_json,
    programs_table,
    shardings_view,
)
from shardpar.cli.verifying import Attempt, verify_table
from shardpar.cli.verifying import verify as run_verify
from shardpar.cli.why import against_table, verdict, why_lines, why_tables
from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.schema import RunConfig
from shardpar.errors import ConfigError, UserError
from shardpar.lowering.allocator import keep_freed_memory
from shardpar.lowering.collectives import collectives
from shardpar.lowering.devices import (
    local_cluster,
    only_cpus,
    roomy_thread_pool,
    use_virtual_devices,
)
from shardpar.lowering.lower import AnyProgram
from shardpar.lowering.lower import lower as lower_plan
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.target import Target, prepare_environment, single, target_of
from shardpar.planner.cost import PlanCost, plan_cost
from shardpar.planner.search import SearchResult, memory_limit
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.planner.trace_export import perfetto_trace
from shardpar.planner.traffic import predicted_collectives
from shardpar.run.peers import Peers, meet
from shardpar.run.progress import Progress
from shardpar.run.rendezvous import Rendezvous
from shardpar.spec.check import check
from shardpar.spec.cluster import Cluster
from shardpar.spec.plan import Plan
from shardpar.spec.text import graph_to_text, plan_to_text
from shardpar.train import compile as compilation
from shardpar.train.optimizer import make_optimizer
from shardpar.train.packing import empty_rows


@dataclass(frozen=True)
class Planned:
    """A captured config with its plan and price."""

    captured: Captured
    plan: Plan
    cost: PlanCost
    cluster: Cluster
    work: Workload
    found: SearchResult | None
    limit_bytes: float
    fraction: float

    @property
    def limits_bytes(self) -> tuple[float, ...]:
        """Per stage, what its smallest device may hold of the plan."""
        share = self.fraction
        return tuple(
            share * min(self.cluster.kind_of(d).memory_bytes for d in stage.devices)
            for pipeline in self.plan.pipelines
            for stage in pipeline.stages
        )


def use_devices(devices: int | None, where: Rendezvous | None = None) -> Peers:
    """Chooses jax's backend before it starts, keeps freed memory, and turns the cache on.

    Args:
      devices: virtual CPU devices of this process; None takes those that are there.
      where: to meet the other processes.
    """
    if devices is not None or only_cpus():
        keep_freed_memory()
    if where is not None:
        roomy_thread_pool(devices or 1)
    if devices is not None:
        use_virtual_devices(devices)
    peers = meet(where)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "shardpar" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"jax finds no device: {reason}; unset JAX_PLATFORMS, or see `shardpar doctor`"
        ) from None
    return peers


def capture(
    config: RunConfig,
    notify: Callable[[str], None] = lambda _: None,
    device: Any = None,
    row_tokens: int | None = None,
) -> Captured:
    """Captures a config's model for its batch.

    Args:
      config: whose model, batch and kind of samples it is.
      notify: as in `capture.trace`.
      device: as there.
      row_tokens: of a row; None takes `data.sequence_length`.
    """
    module = load_model_source(find_model(config.model.source))
    options = build_options(module, config.model)
    arrays = empty_rows(config.train.global_batch, row_tokens or config.data.sequence_length)
    packed = config.data.packing or config.data.dispatch
    names = ("inputs", "targets", *(("weights",) if config.buckets.lengths else ()))
    arrays = arrays if packed else {name: arrays[name] for name in names}
    captured = trace(
        module.loss,
        lambda rngs: module.build(options, rngs),
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()},
        compute_dtype=config.program.compute_dtype,
        causal=bool(getattr(module, "CAUSAL", False)),
        notify=notify,
        device=device,
    )
    # Attention may do without positions, if only distances matter to it.
    unread = [name for name in captured.unread if name != "positions"]
    missing = " and ".join(f'batch["{name}"]' for name in unread)
    if packed and unread:
        key = "data.packing" if config.data.packing else "data.dispatch"
        raise ConfigError(
            f"{key} is true, but the loss of {config.model.source} does not read {missing}: "
            "it would take the documents of a row for one; let it read them as models/gpt.py "
            f"does, or write {key}=false"
        )
    if config.buckets.lengths and "weights" in unread:
        raise ConfigError(
            f"buckets.lengths is set, but the loss of {config.model.source} does not read "
            f"{missing}, so padding would count; let it read them as models/gpt.py does, or write "
            "buckets.lengths=[]"
        )
    return captured


def capture_aloud(config: RunConfig, device: Any = None) -> Captured:
    """Captures, with a progress line and the warnings."""
    with Progress() as progress, progress.phase("capturing the model"):
        captured = capture(config, device=device)
        for warning in captured.warnings:
            progress.say(f"note: {warning}")
    return captured


def make_plan(
    config: RunConfig,
    captured: Captured,
    cluster: Cluster | None,
    *,
    one_stage: bool = False,
    plan: Plan | None = None,
) -> Planned:
    """Reads the config's plan file, or searches.

    Args:
      config: its section `plan` pins choices or names a file.
      captured: the model.
      cluster: the machines; None takes the devices at hand.
      one_stage: the plan is to be compiled as one program, which has one stage.
      plan: one that was made elsewhere, to be priced here.
    """
    machines = cluster or local_cluster()
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    work = compilation.workload(captured, optimizer, config.program, config.train.global_batch)
    limit = memory_limit(machines, config.plan)
    if plan is None and config.plan.file is None:
        options = config.plan
        if one_stage and options.stages is None:
            options = replace(options, stages=1)
        found = compilation.planned(captured.graph, machines, work, options)
        return Planned(
            captured,
            found.plan,
            found.cost,
            machines,
            work,
            found,
            limit,
            config.plan.memory_fraction,
        )
    if plan is None:
        assert config.plan.file is not None
        plan = compilation.read_plan(config.plan.file, captured.graph)
    if plan.global_batch != config.train.global_batch:
        raise ConfigError(
            f"{config.plan.file}: global_batch is {plan.global_batch}, but train.global_batch is "
            f"{config.train.global_batch}; make them equal, or plan again"
        )
    check(plan, captured.graph, machines)
    cost = plan_cost(plan, captured.graph, machines, work)
    return Planned(captured, plan, cost, machines, work, None, limit, config.plan.memory_fraction)


def lower(config: RunConfig, planned: Planned) -> AnyProgram:
    """The program of a planned config."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return lower_plan(planned.captured, planned.plan, optimizer, config.program)


@dataclass(frozen=True)
class Show:
    """What `shardpar plan` shows besides the plan.

    Attributes:
      why: where each layer's milliseconds and bytes come from.
      against: a plan file to compare with.
      html, trace: files to write pictures and the simulated timeline to.
    """

    why: bool = False
    against: str | None = None
    html: str | None = None
    trace: str | None = None


def plan(
    config: RunConfig,
    cluster: Cluster | None,
    *,
    devices: int | None,
    out: str | None,
    json: bool,
    show: Show = Show(),
    verify: bool = False,
) -> None:
    """`shardpar plan`."""
    attempt: Attempt | None = None
    if verify and cluster is not None:
        target = target_of(cluster)
        prepare_environment()
        use_devices(devices)
        captured = capture_aloud(config, single(target))
        config, attempt = _verify(config, captured, cluster, target)
    else:
        use_devices(devices)
        captured = capture_aloud(config)
    planned = make_plan(config, captured, cluster, one_stage=verify)
    if out:
        write_text(Path(out), plan_to_text(planned.plan))
    timeline = simulate(planned.plan, planned.cost)
    if show.trace:
        write_text(Path(show.trace), perfetto_trace(planned.plan, timeline))
    if show.html:
        page = plan_page(
            planned.plan, captured.graph, planned.cost, timeline, planned.limits_bytes,
            None if attempt is None else _compiled_for_page(attempt),
        )  # fmt: skip
        write_text(Path(show.html), page)
    if json:
        print_json(_plan_json(planned, attempt))
        return
    show_plan(planned)
    screen = console()
    pair = (planned.plan, planned.cost)
    if show.why:
        for table in why_tables(planned.plan, captured.graph, planned.cost):
            screen.print(table)
        for line in why_lines(*pair):
            screen.print(line, highlight=False)
    if show.against:
        other = make_plan(
            replace(config, plan=replace(config.plan, file=show.against, fix=None)),
            captured, cluster,
        )  # fmt: skip
        theirs = (other.plan, other.cost)
        screen.print(against_table(pair, theirs, planned.limit_bytes))
        screen.print(verdict(pair, theirs, planned.limit_bytes), highlight=False)
    if attempt is not None:
        screen.print(verify_table(attempt, captured.graph))
        predicted = predicted_collectives(
            planned.plan, captured.graph, planned.cluster, planned.work
        )
        screen.print(both_collectives_table(predicted, attempt.compiled.collectives))
    for path in (out, show.html, show.trace):
        if path:
            console(stderr=True).print(f"written to {path}", highlight=False)


def _verify(
    config: RunConfig, captured: Captured, cluster: Cluster, target: Target
) -> tuple[RunConfig, Attempt]:
    def make(config: RunConfig) -> tuple[Plan, PlanCost]:
        planned = make_plan(config, captured, cluster, one_stage=True)
        return planned.plan, planned.cost

    with Progress() as progress, progress.phase(f"compiling for {target}"):
        config, attempts = run_verify(config, captured, cluster, target, make, progress.say)
    return config, attempts[-1]


def _compiled_for_page(attempt: Attempt) -> PageCompiled:
    compiled = attempt.compiled
    return PageCompiled(
        compiled.target, compiled.argument_bytes, compiled.temp_bytes, attempt.predicted_bytes,
        tuple((c.kind, c.group_size, c.count, c.num_bytes) for c in compiled.collectives),
    )  # fmt: skip


def explain(
    config: RunConfig,
    cluster: Cluster | None,
    stop_after: str,
    *,
    shardings: bool,
    devices: int | None,
    json: bool,
) -> None:
    """`shardpar explain` for everything after the config."""
    use_devices(devices)
    captured = capture_aloud(config)
    screen = console()
    if stop_after == "graph" and not shardings:
        if json:
            print_json(yaml.safe_load(graph_to_text(captured.graph)))
        else:
            screen.print(graph_table(captured.graph))
        return
    planned = make_plan(config, captured, cluster)
    if shardings:
        if json:
            raise UserError("--shardings draws pictures, for people; drop --json")
        screen.print(shardings_view(planned.plan, captured.graph))
        return
    if stop_after == "plan":
        if json:
            print_json(_plan_json(planned))
        else:
            show_plan(planned)
        return
    if cluster is not None and cluster.num_devices > len(jax.devices()):
        raise UserError(
            f"the program of {cluster.name} needs {cluster.num_devices} devices to compile for, "
            f"and there are {len(jax.devices())}; add --devices {cluster.num_devices}"
        )
    program = lower(config, planned)
    with Progress() as progress, progress.phase("compiling the step"):
        if isinstance(program, PipelinedProgram):
            parts = program.compiled_parts
        else:
            parts = {"step": program.compiled_step}
    if len(parts) > 1:
        _explain_parts(parts, planned, json=json)
        return
    (compiled,) = parts.values()
    found = collectives(compiled.as_text())
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if json:
        print_json(
            {
                "collectives": [vars(c) for c in found],
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
                "predicted_bytes": int(planned.cost.peak_bytes),
            }
        )
        return
    screen.print(
        collectives_table((c.kind, c.group_size, c.count, c.num_bytes) for c in found)
        if found
        else "no collectives: everything is on one device"
    )
    screen.print(
        f"memory per device: {total / 2**30:.3f} GiB by XLA "
        f"(state and batch {memory.argument_size_in_bytes / 2**30:.3f}, "
        f"scratch {memory.temp_size_in_bytes / 2**30:.3f}); "
        f"the plan predicted {planned.cost.peak_bytes / 2**30:.3f} GiB",
        highlight=False,
    )


def _explain_parts(parts: Mapping[str, Any], planned: Planned, *, json: bool) -> None:
    """The programs of a step that has several: of each stage, and of each update."""
    found = {name: collectives(compiled.as_text()) for name, compiled in parts.items()}
    memory = {name: compiled.memory_analysis() for name, compiled in parts.items()}
    if json:
        programs = [
            {
                "name": name,
                "collectives": [vars(c) for c in found[name]],
                "argument_bytes": memory[name].argument_size_in_bytes,
                "temp_bytes": memory[name].temp_size_in_bytes,
            }
            for name in parts
        ]
        print_json({"programs": programs, "predicted_bytes": int(planned.cost.peak_bytes)})
        return
    screen = console()
    for name, each in found.items():
        if each:
            rows = ((c.kind, c.group_size, c.count, c.num_bytes) for c in each)
            screen.print(collectives_table(rows, f"collectives in {name}, per device and run"))
    screen.print(programs_table((n, m.argument_size_in_bytes, m.temp_size_in_bytes)
                                for n, m in memory.items()))  # fmt: skip
    screen.print(
        "stages send each other activations and gradients outside of these programs; the plan "
        f"predicted {planned.cost.peak_bytes / 2**30:.3f} GiB for the fullest device",
        highlight=False,
    )


def show_plan(planned: Planned) -> None:
    """Prints the plan as a table, what came next, and what was rejected."""
    screen = console()
    screen.print(
        plan_table(planned.plan, planned.captured.graph, planned.cost, planned.limit_bytes)
    )
    found = planned.found
    if found is None:
        over = planned.cost.peak_bytes - planned.limit_bytes
        if over > 0:
            screen.print(
                f"! predicted to be {over / 2**30:.2f} GiB per device over the limit",
                style="yellow",
                highlight=False,
            )
        return
    objective = planned.plan.objective
    if objective is not None:
        certificate = (
            "no plan of the searched space is faster by the cost model"
            if objective.gap == 0
            else f"no plan of the searched space is more than {objective.gap:.2%} faster"
        )
        screen.print(
            f"{certificate}; found in {objective.search_s:.2f} s", style="dim", highlight=False
        )
    if found.runners_up:
        screen.print("next best:", style="dim")
        for other in found.runners_up[:5]:
            slower = other.step_s / found.cost.step_s - 1
            screen.print(
                f"  {other.description}: {other.step_s * 1e3:,.1f} ms ({slower:+.1%}), "
                f"{other.peak_bytes / 2**30:.2f} GiB",
                style="dim",
                highlight=False,
            )
    if found.too_big:
        screen.print(f"{found.too_big} shapes of {found.shapes} did not fit in memory", style="dim")
    for reason, count in found.rejected[:5]:
        screen.print(f"{count} rejected: {reason}", style="dim", highlight=False)


def _plan_json(planned: Planned, attempt: Attempt | None = None) -> dict[str, Any]:
    objective = planned.plan.objective
    out: dict[str, Any] = {
        "plan": plan_to_text(planned.plan),
        "step_s": planned.cost.step_s,
        "simulated_s": simulate(planned.plan, planned.cost).step_s,
        "peak_bytes": planned.cost.peak_bytes,
        "lower_bound_s": objective.lower_bound_s if objective else None,
        "gap": objective.gap if objective else None,
        "search_s": objective.search_s if objective else None,
    }
    if attempt is not None:
        compiled = attempt.compiled
        predicted = predicted_collectives(
            planned.plan, planned.captured.graph, planned.cluster, planned.work
        )
        out["compiled"] = {
            "target": compiled.target,
            "argument_bytes": compiled.argument_bytes,
            "temp_bytes": compiled.temp_bytes,
            "collectives": [vars(c) for c in compiled.collectives],
            "predicted_collectives": [
                dict(zip(("kind", "group_size", "count", "num_bytes"), c, strict=True))
                for c in predicted
            ],
        }
    return out


def write_text(path: Path, text: str) -> None:
    """Writes a small file, its folders included.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
