"""What groups of devices do together once a step: gradients and scalars summed, slices gathered.

Where groups hold copies of a parameter its gradient is summed for all of them: a reshard from
addends to copies. Where they share its optimizer state out, the gradient goes from addends to
slices, each group updates its slice, and slices become copies again (ZeRO, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from shardpar.lowering.device_groups import GroupPrograms
from shardpar.lowering.elsewhere import absent
from shardpar.lowering.homes import Home, Homes
from shardpar.lowering.ready import Ready
from shardpar.lowering.shardings import group_of
from shardpar.lowering.stage_programs import Arrays
from shardpar.lowering.state import Gathered, TrainState, named_by
from shardpar.lowering.transfer import Transfer
from shardpar.spec.layout import SplitAcross
from shardpar.spec.reshard import Tensor, fuse
from shardpar.spec.zero import sliced


def share_out(
    groups: Sequence[GroupPrograms], devices: Sequence[jax.Device]
) -> dict[str, SplitAcross]:
    """Gives each group its slice of what several hold.

    Args:
      groups: their `regions` are set; nothing of them is compiled yet.
      devices: of the cluster, in order.

    Returns:
      By parameter, how it is cut; those that cannot be cut are left out.
    """
    found: dict[str, SplitAcross] = {}
    regions: list[dict[str, Any]] = [{} for _ in groups]
    for name, leaf in groups[0].captured.model.params.items():
        holders = [n for n, group in enumerate(groups) if name in group.names]
        layout = sliced(
            [group_of(groups[n].gradient_sharding(name), devices) for n in holders],
            tuple(leaf.shape),
        )
        if isinstance(layout.across, SplitAcross):
            found[name] = layout.across
            for place, n in enumerate(holders):
                regions[n][name] = layout.region(place, tuple(leaf.shape))
    for group, mine in zip(groups, regions, strict=True):
        group.regions = mine
    return found


def sliced_leaves(whole: TrainState, slices: Mapping[str, SplitAcross]) -> dict[str, SplitAcross]:
    """The leaves of a state's optimizer part that groups share out, by path."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole.optimizer):
        name = named_by(path, slices)
        if name and leaf.shape == whole.params[name].shape:
            out[f".optimizer{jax.tree_util.keystr(path)}"] = slices[name]
    return out


class Together:
    """The sums and gathers of a step over all groups.

    Attributes:
      groups: their programs.
      homes, gathered_homes: which groups hold what of the state, and of a step's gradients.
    """

    def __init__(
        self,
        groups: Sequence[GroupPrograms],
        homes: Homes,
        gathered_homes: Homes,
        devices: Sequence[jax.Device],
    ) -> None:
        """Nothing is compiled yet.

        Args:
          groups: their programs.
          homes: of the state.
          gathered_homes: of `Gathered`.
          devices: of the cluster, in order.
        """
        self.groups, self.devices = tuple(groups), tuple(devices)
        self.homes, self.gathered_homes = homes, gathered_homes
        params = groups[0].captured.model.params
        self._grads = {name: gathered_homes.leaves[f".grads['{name}']"] for name in params}
        self._params = {name: homes.leaves[f".params['{name}']"] for name in params}
        self._shared = {name: home for name, home in self._grads.items() if len(home.groups) > 1}
        self._cut = {name: home for name, home in self._shared.items() if home.is_sliced}

    @cached_property
    def _squares(self) -> list[tuple[list[str], Ready | None]]:
        """By group, the parameters whose squares it counts, and what adds them.

        Of copies the first counts; of slices each does.
        """
        out = []
        for n, group in enumerate(self.groups):
            mine = [x for x in group.names if x in self._cut or self._grads[x].groups[0] == n]
            out.append((mine, group.squares(mine) if group.is_here else None))
        return out

    def prepare(self) -> None:
        """Compiles what sums squares; transfers are compiled when first needed."""
        self._squares  # noqa: B018

    def sums(self, stats: Sequence[Any], grads: Sequence[Arrays]) -> list[Any]:
        """From each group's [loss, weight] and gradients to [loss, weight, squares] of all."""
        sums = [
            squares.call(of_group, {name: g[name] for name in names})
            if squares
            else absent(group.sums_shape)
            for group, (names, squares), of_group, g in zip(
                self.groups, self._squares, stats, grads, strict=True
            )
        ]
        return self.spread_sums(sums)

    @cached_property
    def _summing(self) -> Transfer:
        tensors = [
            Tensor(home.across("partial"), home.layout, home.shape, 4)
            for home in self._shared.values()
        ]
        return Transfer(fuse(tensors), [np.dtype(np.float32)] * len(tensors), self.devices)

    def sum_gradients(self, grads: list[Arrays]) -> None:
        """Sums what several groups hold the gradient of: for all of them, or a slice for each."""
        if not self._shared:
            return
        unions = [
            home.union([grads[n][name] for n in home.groups], "partial")
            for name, home in self._shared.items()
        ]
        moved = self._summing(unions, donate=True)
        for (name, home), union in zip(self._shared.items(), moved, strict=True):
            for n, array in zip(home.groups, home.settled(union).arrays, strict=True):
                grads[n][name] = array

    @cached_property
    def _cutting(self) -> Transfer:
        return self._between(lambda name: (self._params[name].layout, self._cut[name].layout))

    @cached_property
    def _gathering(self) -> Transfer:
        return self._between(lambda name: (self._cut[name].layout, self._params[name].layout))

    def _between(self, ends: Any) -> Transfer:
        dtypes = [np.dtype(self._params[name].shapes[0].dtype) for name in self._cut]
        tensors = [
            Tensor(*ends(name), home.shape, dtype.itemsize)
            for (name, home), dtype in zip(self._cut.items(), dtypes, strict=True)
        ]
        return Transfer(fuse(tensors), dtypes, self.devices)

    def cut(self, parts: Sequence[TrainState]) -> list[TrainState]:
        """The state as the groups update it: of a parameter shared out, a slice; no bytes cross.

        Args:
          parts: by group; what is cut of them must not be used again.
        """
        if not self._cut:
            return list(parts)
        unions = [
            self._params[name].union([parts[n].params[name] for n in home.groups])
            for name, home in self._cut.items()
        ]
        return self._replaced(parts, self._cutting(unions, donate=True), self._cut)

    def whole(self, parts: Sequence[TrainState]) -> list[TrainState]:
        """The updated state with whole parameters again; the slices must not be used again."""
        if not self._cut:
            return list(parts)
        unions = [
            home.union([parts[n].params[name] for n in home.groups])
            for name, home in self._cut.items()
        ]
        return self._replaced(parts, self._gathering(unions, donate=True), self._params)

    def _replaced(
        self, parts: Sequence[TrainState], moved: Sequence[Any], homes: Mapping[str, Home]
    ) -> list[TrainState]:
        params = [dict(part.params) for part in parts]
        for name, union in zip(self._cut, moved, strict=True):
            home = homes[name]
            for n, array in zip(home.groups, home.settled(union).arrays, strict=True):
                params[n][name] = array
        return [replace(part, params=new) for part, new in zip(parts, params, strict=True)]

    @cached_property
    def _everywhere(self) -> Mapping[int, tuple[Home, Transfer]]:
        """What sums so many scalars over all groups and gives every group the sum."""
        out = {}
        for count in (2, 3):
            shapes = tuple(
                jax.ShapeDtypeStruct((count,), np.float32, sharding=g.whole) for g in self.groups
            )
            home = Home.of(tuple(range(len(self.groups))), shapes, self.devices)
            tensor = Tensor(home.across("partial"), home.layout, (count,), 4)
            out[count] = home, Transfer(fuse([tensor]), [np.dtype(np.float32)], self.devices)
        return out

    def spread_sums(self, sums: Sequence[Any]) -> list[Any]:
        """Scalars summed over all groups, on every group."""
        if len(self.groups) == 1:
            return list(sums)
        home, transfer = self._everywhere[sums[0].size]
        (union,) = transfer([home.union(sums, "partial")], donate=True)
        return list(home.settled(union).arrays)


def gathered_over(
    groups: Sequence[GroupPrograms],
    slices: Mapping[str, SplitAcross],
    devices: Sequence[jax.Device],
) -> Homes:
    """Which groups hold what of the gradients of a step.

    Args:
      groups: their programs.
      slices: from `share_out`.
      devices: of the cluster, in order.
    """
    model = groups[0].captured.model
    whole = Gathered(
        {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in model.params.items()},
        jax.ShapeDtypeStruct((2,), np.float32),
        dict(model.rest),
    )
    cut = {f".grads['{name}']": across for name, across in slices.items()}
    return Homes(whole, [g.gathered_shapes for g in groups], devices, slices=cut)
