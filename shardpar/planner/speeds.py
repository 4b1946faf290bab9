"""How fast each pipeline of a plan takes tokens, by the planner's prices: what dispatching goes by.

Attention over a packed row computes all pairs of the row, whichever of its sequences they are
of, so a sequence costs as many seconds as it takes tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardpar.errors import PlanError
from shardpar.planner.cost import plan_cost
from shardpar.planner.dispatch import PipelineSpeed
from shardpar.planner.setting import Workload
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Plan


def pipeline_speeds(
    plan: Plan,
    graphs: Sequence[LayerGraph],
    row_tokens: Sequence[int],
    cluster: Cluster,
    workload: Workload,
) -> tuple[PipelineSpeed, ...]:
    """The speed of each pipeline.

    Args:
      plan: checked.
      graphs: of the model at the length of each pipeline's rows.
      row_tokens: of a row of each pipeline, the most tokens of a sequence it takes.
      cluster: the machines.
      workload: dtype and optimizer.

    Raises:
      PlanError: there is not one length for each pipeline.
    """
    if len(row_tokens) != len(plan.pipelines):
        raise PlanError(
            f"dispatch.row_tokens has {len(row_tokens)} lengths and the plan "
            f"{len(plan.pipelines)} pipelines; write one for each pipeline, or none for rows of "
            "data.sequence_length in all"
        )
    out, first = [], 0
    prices = {graph: plan_cost(plan, graph, cluster, workload) for graph in set(graphs)}
    for pipeline, graph, tokens in zip(plan.pipelines, graphs, row_tokens, strict=True):
        stages = prices[graph].stages[first : first + len(pipeline.stages)]
        first += len(pipeline.stages)
        groups = pipeline.num_groups
        # Without the update, which is done once whatever the pipeline gets.
        micro_s = [
            math.fsum(s.forward_s + s.backward_s + s.sent_s for s in stages[g::groups])
            for g in range(groups)
        ]
        once_s = [math.fsum(s.update_s + s.cross_s for s in stages[g::groups])
                  for g in range(groups)]  # fmt: skip
        slowest = max(micro_s)
        out.append(
            PipelineSpeed(
                tokens,
                slowest / (pipeline.microbatch * tokens),
                fixed_s=math.fsum(micro_s) - slowest + max(once_s),
            )
        )
    return tuple(out)
