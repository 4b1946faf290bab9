"""Where a layer runs and how often: all that prices depend on besides layer and strategy."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from shardpar.planner.profile import Rates, link_over, rates
from shardpar.spec.cluster import Cluster, Link
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Axes, Mesh
from shardpar.spec.plan import TENSOR_DIMS, Pipeline, Plan, Stage, Zero


@dataclass(frozen=True)
class Workload:
    """What the costs depend on besides the model and the machines.

    Attributes:
      global_batch: sequences per optimizer step.
      compute_dtype: float dtype inside the model.
      optimizer_slots: arrays of a parameter's size the optimizer keeps: 2 for Adam.
      loops: whether long chains of equal layers run as one loop, which keeps a
        stacked copy of their parameters in the compute dtype.
      elementwise: whether the optimizer updates each element from itself alone, so that a
        parameter may be updated slice by slice.
    """

    global_batch: int
    compute_dtype: str = "float32"
    optimizer_slots: float = 2.0
    loops: bool = True
    elementwise: bool = True


@dataclass(frozen=True)
class Setting:
    """Where a layer runs and how often: all that its price depends on besides class and strategy.

    Attributes:
      cluster, devices, mesh: the stage's machines.
      graph_batch: sequences the layer graph's figures are for.
      microbatch: sequences of one micro-batch over all data shards.
      num_microbatches: of one step.
      pipelines: how many pipelines hold a copy of the layer and sum its gradient.
      tensor_dims: logical dims that tensor parallelism splits.
      zero: "pipelines" where they keep the optimizer state once between them.
      workload: dtype and optimizer.
      known: what was computed of parameters here, by what it is of; settings that differ in
        micro-batches or pipelines alone may share it.
    """

    cluster: Cluster
    devices: tuple[int, ...]
    mesh: Mesh
    graph_batch: int
    microbatch: int
    num_microbatches: int
    workload: Workload
    pipelines: int = 1
    tensor_dims: tuple[str, ...] = TENSOR_DIMS
    zero: Zero = "none"
    known: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def speed(self) -> Rates:
        """Rates of the group."""
        return rates(self.cluster, self.devices, self.workload.compute_dtype)

    @functools.cached_property
    def _links(self) -> dict[Axes, Link]:
        return {}

    def link(self, axes: Axes) -> Link:
        """The slowest link a collective over these axes crosses."""
        if axes not in self._links:
            self._links[axes] = link_over(self.cluster, self.devices, self.mesh, axes)
        return self._links[axes]


def setting_of(
    plan: Plan,
    pipeline: Pipeline,
    stage: Stage,
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
) -> Setting:
    """The setting of a stage's layers."""
    return Setting(
        cluster, stage.devices, stage.mesh, graph.batch, pipeline.microbatch,
        pipeline.num_microbatches, workload, len(plan.pipelines), plan.tensor_dims, plan.zero,
    )  # fmt: skip
