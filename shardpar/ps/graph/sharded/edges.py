"""How edges lie on devices: a graph's arrays split over a mesh of one axis."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from shardpar.lowering.shardings import axes_sharding, replicated
from shardpar.ps.graph.graph import Graph, incoming
from shardpar.spec.mesh import GroupLayout, Mesh

AXIS = "edges"


@dataclass(frozen=True)
class Split:
    """Some devices in a row.

    Attributes:
      devices: how many.
      rows: first dim split over them.
      whole: a copy on each.
    """

    devices: int
    rows: NamedSharding
    whole: NamedSharding

    def run(self, body: Callable[..., Any], split: Any, whole: Any) -> Any:
        """Runs a body on every device: its piece of `split`, all of `whole`; results are whole.

        Args:
          body: takes both; uses collectives over AXIS; every device returns the same.
          split: arrays whose first dim the devices divide.
          whole: arrays that every device has.
        """
        mapped = jax.shard_map(
            body,
            mesh=self.rows.mesh,
            in_specs=(self.rows.spec, self.whole.spec),
            out_specs=self.whole.spec,
            check_vma=False,
        )
        return jax.jit(mapped)(jax.device_put(split, self.rows), jax.device_put(whole, self.whole))


def split_over(devices: Sequence[jax.Device] | None = None) -> Split:
    """Devices to split edges over; None takes all that jax sees."""
    found = list(jax.devices() if devices is None else devices)
    mesh = Mesh(((AXIS, len(found)),))
    rows = axes_sharding(GroupLayout(mesh, ((AXIS,),)), found)
    return Split(len(found), rows, replicated(rows.mesh))


def padded(values: np.ndarray, multiple: int, fill: int | float) -> np.ndarray:
    """The values, and `fill` until their number is a multiple, at least one.

    >>> padded(np.array([1, 2, 3]), 2, 0).tolist()
    [1, 2, 3, 0]
    """
    length = max(1, -(-len(values) // multiple)) * multiple
    result = np.full((length, *values.shape[1:]), fill, values.dtype)
    result[: len(values)] = values
    return result


@dataclass(frozen=True)
class Rows:
    """Edges sorted by target; all edges into a node are on one device.

    Attributes:
      sources: int32[devices x longest], padded with 0.
      targets: the same, padded with the number of nodes.
      weights: float64, the same, padded with 0; None if all are 1.
    """

    sources: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None


def rows_of(graph: Graph, devices: int, *, directed: bool) -> Rows:
    """Deals the rows of the matrix of edges out to devices, about as many edges to each."""
    matrix = incoming(graph, directed=directed)
    ends = matrix.indptr.astype(np.int64)
    targets = np.repeat(np.arange(graph.num_nodes, dtype=np.int32), np.diff(ends))
    cuts = ends[np.searchsorted(ends, np.arange(devices + 1) * len(targets) // devices)]
    longest = max(1, int(np.diff(cuts).max()))

    def dealt(values: np.ndarray, fill: int) -> np.ndarray:
        parts = [values[a:b] for a, b in itertools.pairwise(cuts)]
        whole = np.full((devices, longest), fill, values.dtype)
        for row, part in zip(whole, parts, strict=True):
            row[: len(part)] = part
        return whole.reshape(-1)

    return Rows(
        dealt(matrix.indices.astype(np.int32), 0),
        dealt(targets, graph.num_nodes),
        None if graph.weights is None else dealt(matrix.data, 0),
    )
