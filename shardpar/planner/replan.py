"""Whether to change the plan when devices are slow or lost, and to which one.

The running plan, the same groups with layers and micro-batches dealt anew, and the best plans
with and without the slow devices are played event by event; a change must save more seconds
over the steps to come than it takes to move the state and to compile (Malleus, arXiv 2410.13333;
HotSPa, SOSP'24).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from shardpar.errors import PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.moving import Moving, moving
from shardpar.planner.options import ReplanOptions, SearchOptions
from shardpar.planner.rebalance import rebalanced, with_peaks
from shardpar.planner.regroup import is_even, on_groups, regrouped
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.spec.check import check, ranges
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Pipeline, Plan

MOST_SPEEDS = 3
"""So many bounds are tried below which devices stand by."""

NOTHING = Moving(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Alternative:
    """One plan to go on with.

    Attributes:
      name: keep, rebalanced, same groups, searched, or "without" and what stands by.
      plan: on the cluster's own device numbers; None where there is none.
      step_s: simulated, with the speeds of now; inf without a plan.
      move: what changing to it moves.
      total_s: the steps to come, with moving and compiling.
      note: why there is no plan; empty if there is one.
    """

    name: str
    plan: Plan | None = None
    step_s: float = math.inf
    move: Moving = NOTHING
    total_s: float = math.inf
    note: str = ""


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
      plan: to go on with.
      name: which of the alternatives it is; "keep" changes nothing.
      why: in a sentence.
      alternatives: all that were looked at, the running plan first.
    """

    plan: Plan
    name: str
    why: str
    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        """The decision and its table, as people read it."""
        lines = [f"{self.name}: {self.why}", ""]
        lines.append(
            f"{'plan':<24} {'step, s':>9} {'moved, GB':>10} {'restored, GB':>13} {'move, s':>8}"
        )
        for a in self.alternatives:
            if a.plan is None:
                lines.append(f"{a.name:<24} {'-':>9}  {a.note}")
                continue
            lines.append(
                f"{a.name:<24} {a.step_s:>9.4g} {a.move.moved_bytes / 1e9:>10.4g} "
                f"{a.move.restored_bytes / 1e9:>13.4g} {a.move.move_s:>8.3g}"
            )
        return "\n".join(lines) + "\n"


def replan(
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    options: SearchOptions,
    plan: Plan,
    *,
    speeds: Mapping[int, float] = {},
    devices: Collection[int] | None = None,
    costs: ReplanOptions = ReplanOptions(),
) -> Decision:
    """Decides how to go on.

    Args:
      graph: the captured model.
      cluster: all machines that the plan was made for, the lost ones included.
      workload: batch, dtype and optimizer.
      options: of the searches.
      plan: what runs now.
      speeds: by device, the share of its kind's rates that it reaches; see `StragglerWatch`.
      devices: those that are still there; None is all.
      costs: what a change costs, and for how long it must pay off.

    Returns:
      The plan to go on with, why, and what else there was.

    Raises:
      InfeasibleError: no plan fits on the devices that are left.
      PlanError: the running plan is not one for this model, batch and cluster, or no plan is
        legal on the devices that are left.
      SpecError: a speed is not above 0 and at most 1, or there is no such device.
    """
    check(plan, graph, cluster)
    if plan.global_batch != workload.global_batch:
        raise PlanError(
            f"the running plan is for {plan.global_batch} sequences a step, but the workload has "
            f"{workload.global_batch}; give the workload that it was made for"
        )
    now = cluster.slowed(speeds)
    alive = frozenset(range(cluster.num_devices) if devices is None else devices)
    now.only(alive)  # Refuses devices that are not there.
    change = _Change(graph, now, workload, options, plan, alive, costs)
    alternatives = tuple(change.alternatives())
    best = min(alternatives, key=lambda a: a.total_s)
    if best.plan is None:
        # Nothing else can be planned; the search's own words say what is missing.
        search(graph, now.only(alive), workload, options)
        raise AssertionError("a search that failed has found a plan")
    return Decision(best.plan, best.name, _why(best, alternatives, costs), alternatives)


def _why(best: Alternative, alternatives: tuple[Alternative, ...], costs: ReplanOptions) -> str:
    running, *others = alternatives
    step_s = f"{best.step_s:.4g} s"
    if best is running:
        found = [a for a in others if a.plan is not None]
        if not found:
            return f"a step takes {step_s}, and there is no other plan"
        other = min(found, key=lambda a: a.total_s)
        saved_s = running.step_s - other.step_s
        if saved_s <= 0:
            return f"a step takes {step_s}, and no other plan is faster"
        cost_s = other.move.move_s + costs.compile_s
        return (
            f"a step takes {step_s}; the best other plan, {other.name}, would save {saved_s:.3g} s "
            f"a step, and {costs.horizon_steps:,} steps do not make up for the {cost_s:.3g} s that "
            "the change takes"
        )
    cost_s = best.move.move_s + costs.compile_s
    if running.plan is None:
        return f"the running plan cannot go on; a step takes {step_s}, the change {cost_s:.3g} s"
    steps = math.floor(cost_s / (running.step_s - best.step_s)) + 1
    return (
        f"a step takes {step_s} instead of {running.step_s:.4g} s; the change takes "
        f"{cost_s:.3g} s and pays off after {steps:,} of {costs.horizon_steps:,} steps"
    )


@dataclass(frozen=True)
class _Change:
    """The arguments of `replan`, the cluster with the speeds of now."""

    graph: LayerGraph
    cluster: Cluster
    workload: Workload
    options: SearchOptions
    plan: Plan
    alive: frozenset[int]
    costs: ReplanOptions

    def alternatives(self) -> Iterator[Alternative]:
        if self.alive.issuperset(self.plan.devices):
            step_s = self._step_s(self.plan)
            yield Alternative("keep", self.plan, step_s, total_s=step_s * self.costs.horizon_steps)
        else:
            lost = _listed(set(self.plan.devices) - self.alive)
            yield Alternative("keep", note=f"it needs {lost}")
        yield from self._on_its_groups()
        yield self._best_on("searched", self.alive)
        slow = {d: s for d in self.alive if (s := self.cluster.speed_of(d)) < 1}
        tried = {self.alive}
        for bound in sorted(set(slow.values()))[:MOST_SPEEDS]:
            idle = {d for d, speed in slow.items() if speed <= bound}
            hosts = {self.cluster.host_of(d) for d in idle}
            beside = {d for d in self.alive if self.cluster.host_of(d) in hosts}
            for name, out in (
                (_listed(idle), idle),
                (f"host{'s' if len(hosts) > 1 else ''} {', '.join(map(str, sorted(hosts)))}",
                 beside),
            ):  # fmt: skip
                kept = self.alive - out
                if kept and kept not in tried:
                    tried.add(kept)
                    yield self._best_on(f"without {name}", kept)

    def _on_its_groups(self) -> Iterator[Alternative]:
        """On the pipelines that have all their devices: as they are, and with free strategies."""
        whole = tuple(p for p in self.plan.pipelines if self.alive.issuperset(_devices(p)))
        if not whole:
            yield Alternative("rebalanced", note="no pipeline has all its devices")
            return
        draft = replace(self.plan, pipelines=whole, global_batch=sum(p.sequences for p in whole))
        try:
            found = rebalanced(draft, self.graph, self.cluster, self.workload, self.options)
        except PlanError as error:
            yield Alternative("rebalanced", note=_brief(error))
        else:
            yield self._priced("rebalanced", found)
        # With strategies as they are, memory may forbid what the speeds ask for.
        groups = tuple(tuple(stage.devices for stage in p.stages[: p.num_groups]) for p in whole)
        other = on_groups(groups, self.graph, self.cluster, self.workload, self.options)
        if other is None:
            yield Alternative("same groups", note="nothing fits")
        else:
            yield self._priced("same groups", other)

    def _best_on(self, name: str, kept: frozenset[int]) -> Alternative:
        """The best plan on some devices, by the search and, where they are uneven, by groups."""
        order, part = sorted(kept), self.cluster.only(kept)
        found: list[Plan] = []
        note = ""
        try:
            found.append(search(self.graph, part, self.workload, self.options).plan)
        except PlanError as error:
            note = _brief(error)
        if not is_even(part):
            other = regrouped(self.graph, part, self.workload, self.options)
            if other is not None:
                found.append(other[1])
        if not found:
            return Alternative(name, note=note)
        return min((self._priced(name, plan.on(order)) for plan in found), key=lambda a: a.total_s)

    def _priced(self, name: str, plan: Plan) -> Alternative:
        lost = frozenset(range(self.cluster.num_devices)) - self.alive
        move = moving(
            self.plan, plan, self.graph, self.cluster, self.workload, lost,
            self.costs.restore_bandwidth,
        )  # fmt: skip
        step_s = self._step_s(plan)
        total_s = step_s * self.costs.horizon_steps + move.move_s + self.costs.compile_s
        plan = with_peaks(plan, self.graph, self.cluster, self.workload)
        return Alternative(name, plan, step_s, move, total_s)

    def _step_s(self, plan: Plan) -> float:
        cost = plan_cost(plan, self.graph, self.cluster, self.workload)
        return simulate(plan, cost).step_s


def _devices(pipeline: Pipeline) -> Iterator[int]:
    return (device for stage in pipeline.stages for device in stage.devices)


def _listed(devices: Collection[int]) -> str:
    return f"device{'s' if len(devices) > 1 else ''} {ranges(tuple(sorted(devices)))}"


def _brief(error: PlanError) -> str:
    """An error's first clause: the table has one line for each plan."""
    return str(error).partition(";")[0].partition(": with")[0]
