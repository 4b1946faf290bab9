"""From a loss and a model to a Program in one call: capture, plan, lower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import optax

from shardpar.capture.model import Init, Loss
from shardpar.capture.trace import Captured, trace
from shardpar.errors import PlanError
from shardpar.lowering.devices import local_cluster
from shardpar.lowering.lower import AnyProgram, lower
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.separable import is_elementwise
from shardpar.planner.options import SearchOptions
from shardpar.planner.search import SearchResult, search
from shardpar.planner.setting import Workload
from shardpar.spec.check import check
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Plan
from shardpar.spec.text import plan_from_text


def compile(
    loss: Loss,
    init: Init,
    optimizer: optax.GradientTransformation,
    *,
    batch: Mapping[str, Any],
    cluster: Cluster | None = None,
    plan: Plan | str | Path | None = None,
    program: ProgramOptions = ProgramOptions(),
    options: SearchOptions = SearchOptions(),
    devices: Sequence[jax.Device] | None = None,
    causal: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> AnyProgram:
    """Captures a model, plans it, and lowers the plan.

    Args:
      loss: `loss(model, batch)` returns a scalar mean, or (sum, weight).
      init: `init(rngs)` makes the Flax nnx model.
      optimizer: any optax transformation; it sees parameters as a flat dict by path.
      batch: arrays or ShapeDtypeStructs of one global batch, dim 0 counting sequences.
      cluster: the machines to plan for; None takes the devices at hand.
      plan: a Plan or a plan file to use instead of searching.
      program: dtype, loops, clipping.
      options: pins for the search.
      devices: the cluster's devices in order; None takes `jax.devices()`.
      causal: attention is masked above the diagonal (only the MFU depends on it).
      notify: told what is being worked on.

    Returns:
      A Program: `init`, `step`, `evaluate`.

    Raises:
      CaptureError: the model cannot be captured.
      PlanError: the plan does not fit the model or the devices.
      InfeasibleError: nothing fits in memory.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import shardpar
      >>> program = shardpar.compile(
      ...     lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2),
      ...     lambda rngs: nnx.Linear(2, 1, rngs=rngs),
      ...     optax.sgd(0.1),
      ...     batch={"x": jnp.ones((8, 2)), "y": jnp.zeros((8, 1))},
      ...     devices=jax.devices()[:1],
      ... )
      >>> state = program.init(seed=0)
      >>> for _ in range(20):
      ...     state, metrics = program.step(state, {"x": jnp.ones((8, 2)), "y": jnp.ones((8, 1))})
      >>> bool(metrics["loss"] < 1e-3)
      True
    """
    captured = trace(
        loss, init, batch, compute_dtype=program.compute_dtype, causal=causal, notify=notify
    )
    if isinstance(plan, str | Path):
        plan = read_plan(plan)
    if plan is None:
        here = local_cluster(devices) if cluster is None else cluster
        work = workload(captured, optimizer, program, captured.graph.batch)
        plan = planned(captured.graph, here, work, options).plan
    return lower(captured, plan, optimizer, program, devices)


def workload(
    captured: Captured,
    optimizer: optax.GradientTransformation,
    program: ProgramOptions,
    global_batch: int,
) -> Workload:
    """What the planner must know besides the model: how big the optimizer's state is, and such."""
    state = jax.eval_shape(optimizer.init, captured.model.params)
    slots = sum(leaf.size for leaf in jax.tree.leaves(state)) / captured.graph.num_parameters
    return Workload(
        global_batch=global_batch,
        compute_dtype=program.compute_dtype,
        optimizer_slots=round(slots, 3),
        loops=program.layers != "unroll",
        elementwise=is_elementwise(optimizer, captured.model.params),
    )


def planned(
    graph: LayerGraph, cluster: Cluster, work: Workload, options: SearchOptions
) -> SearchResult:
    """Searches, and writes into the plan how long that took."""
    start = perf_counter()
    result = search(graph, cluster, work, options)
    assert result.plan.objective is not None
    objective = replace(result.plan.objective, search_s=round(perf_counter() - start, 4))
    return replace(result, plan=replace(result.plan, objective=objective))


def read_plan(path: str | Path, graph: LayerGraph | None = None) -> Plan:
    """Reads a plan file, and checks it against a model if one is given.

    Raises:
      PlanError: the file is missing, malformed, or does not fit the model.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PlanError(f"plan file {path}: {reason}") from None
    plan = plan_from_text(text, str(path))
    if graph is not None:
        try:
            check(plan, graph)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None
    return plan
