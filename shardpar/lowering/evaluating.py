"""The loss of one micro-batch through a pipeline's stages, in Flax's eval mode, nothing kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import numpy as np

from shardpar.capture.segments import Segments
from shardpar.lowering.device_groups import GroupPrograms
from shardpar.lowering.elsewhere import absent, in_order, placed
from shardpar.lowering.microbatches import shortest_loop
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.routes import routes_of
from shardpar.lowering.stage_programs import StagePrograms
from shardpar.lowering.state import TrainState
from shardpar.lowering.together import Together


class Evaluation:
    """The first pipeline of a plan, as it evaluates."""

    def __init__(
        self,
        cut: Segments,
        of_stage: Mapping[int, GroupPrograms],
        together: Together,
        options: ProgramOptions,
        devices: tuple[jax.Device, ...],
    ) -> None:
        """Nothing is compiled yet.

        Args:
          cut: the model in eval mode, for a micro-batch, in stages.
          of_stage: the group of each stage.
          together: sums of all groups.
          options: dtype, loops.
          devices: of the cluster, in order.
        """
        self._of_stage, self._together = of_stage, together
        self._stages = {
            s: StagePrograms(
                cut, s, group.stages[s].layouts, shortest_loop(options), options.compute_dtype
            )
            for s, group in of_stage.items()
        }
        self._devices = devices

    @cached_property
    def _routes(self) -> Any:
        return routes_of({(0, s): stage for s, stage in self._stages.items()}, self._devices)

    @cached_property
    def _weights(self) -> dict[int, Any]:
        return {s: in_order(jax.jit(stage.prepare)) for s, stage in self._stages.items()}

    def __call__(
        self, parts: list[TrainState], batch: Mapping[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        """(loss sum, weight) of one micro-batch, from each group's part of the state."""
        groups = list(self._together.groups)
        arrived: dict[int, dict[int, jax.Array]] = {s: {} for s in self._stages}
        sums = [absent(g.gathered_shapes.sums) if not g.is_here else None for g in groups]
        for s, stage in self._stages.items():
            group = self._of_stage[s]
            n = groups.index(group)
            if group.is_here:
                names = list(stage.batch)
                targets = [stage.batch[name].sharding for name in names]
                given = dict(zip(names, placed([batch[x] for x in names], targets), strict=True))
                received = [arrived[s][i] for i in range(len(stage.received))]
                weights = self._weights[s](parts[n].params)
                sent, found = stage.evaluate(weights, parts[n].rest, given, received)
                sums[n] = found if sums[n] is None else sums[n] + found
            else:
                sent = absent(stage.sent)
            for route in self._routes[0, s]:
                moved = route.wire([sent[j] for j in route.takes])
                arrived[route.to].update(zip(route.puts, moved, strict=True))
        zeros = [
            placed([np.zeros(2, np.float32)], [g.whole])[0] if x is None else x
            for g, x in zip(groups, sums, strict=True)
        ]
        mine = next(n for n, group in enumerate(groups) if group.is_here)
        total = self._together.spread_sums(zeros)[mine]
        return total[0], total[1]
