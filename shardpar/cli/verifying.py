"""`shardpar plan --verify`: plans until the target's own compiler agrees that the plan fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.table import Table

from shardpar.capture.trace import Captured
from shardpar.config.schema import RunConfig
from shardpar.errors import InfeasibleError
from shardpar.lowering.program import Program
from shardpar.lowering.target import Compiled, Target, compile_for
from shardpar.planner.cost import PlanCost
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Plan
from shardpar.train.optimizer import make_optimizer

GIB = 2**30
MOST_TRIES = 6


@dataclass(frozen=True)
class Attempt:
    """One plan and the compiler's word on it.

    Attributes:
      predicted_bytes: by the cost model, per device.
      compiled: by the compiler.
      capacity_bytes: of the device.
    """

    predicted_bytes: float
    compiled: Compiled
    capacity_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the compiled program fits on the device."""
        return self.compiled.fits and self.compiled.needed_bytes <= self.capacity_bytes


def verify(
    config: RunConfig,
    captured: Captured,
    cluster: Cluster,
    target: Target,
    make: Callable[[RunConfig], tuple[Plan, PlanCost]],
    say: Callable[[str], None],
) -> tuple[RunConfig, tuple[Attempt, ...]]:
    """Plans and compiles until a plan fits.

    A plan that does not fit is rejected, and the next search is given so much less
    memory that what it predicts, corrected by what was just learnt, does.

    Args:
      config: its section `plan` is the search's.
      captured: the model, its scratch priced by the target's compiler.
      cluster: the machines.
      target: the same machines, to the compiler.
      make: plans a config.
      say: told each outcome.

    Returns:
      The config whose plan fits, and all attempts, the last one fitting.

    Raises:
      InfeasibleError: nothing is left that fits.
    """
    capacity = min(
        kind.memory_bytes for kind in cluster.kinds if kind.name in {h.kind for h in cluster.hosts}
    )
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    attempts: list[Attempt] = []
    devices = target.devices()
    for _ in range(MOST_TRIES):
        plan, cost = make(config)
        program = Program(captured, plan, optimizer, config.program, devices)
        compiled = compile_for(target, program.lower_step())
        attempts.append(Attempt(cost.peak_bytes, compiled, capacity))
        if attempts[-1].fits or config.plan.file is not None:
            return config, tuple(attempts)
        needed = compiled.needed_bytes or 1.1 * capacity
        say(
            f"rejected: {target} says the plan needs {needed / GIB:.2f} GiB per device of "
            f"{capacity / GIB:.2f}; planning again with less"
        )
        # What the search may fill shrinks by as much as it was wrong, and a little.
        fraction = config.plan.memory_fraction * min(0.97, cost.peak_bytes / needed)
        config = replace(config, plan=replace(config.plan, memory_fraction=fraction))
    raise InfeasibleError(
        f"{target}: {MOST_TRIES} plans were compiled and none fits; the last needs "
        f"{attempts[-1].compiled.needed_bytes / GIB:.2f} GiB of {capacity / GIB:.2f}; pin "
        "plan.recompute=full or use more devices",
        missing_bytes=max(0, int(attempts[-1].compiled.needed_bytes - capacity)),
        suggestion="use more devices",
    )


def verify_table(attempt: Attempt, graph: LayerGraph) -> Table:
    """Predicted against compiled memory."""
    table = Table(
        title=f"{graph.model}, compiled for {attempt.compiled.target}", title_justify="left"
    )
    table.add_column("per device")
    for name in ("predicted", "compiled", "difference"):
        table.add_column(name, justify="right")
    compiled = attempt.compiled
    off = attempt.predicted_bytes / compiled.needed_bytes - 1 if compiled.needed_bytes else 0.0
    table.add_row(
        "memory, GiB",
        f"{attempt.predicted_bytes / GIB:.2f}",
        f"{compiled.needed_bytes / GIB:.2f}",
        f"{off:+.1%}",
    )
    table.add_row("  state and batch", "", f"{compiled.argument_bytes / GIB:.2f}", "")
    table.add_row("  all else", "", f"{compiled.temp_bytes / GIB:.2f}", "")
    table.add_row("device holds, GiB", "", f"{attempt.capacity_bytes / GIB:.2f}", "")
    return table
