"""What groups of devices sum once a step: gradients that several of them hold, and scalars.

Each sum is a reshard from addends to copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from shardpar.lowering.device_groups import GroupPrograms
from shardpar.lowering.homes import Home, Homes
from shardpar.lowering.ready import Ready
from shardpar.lowering.stage_programs import Arrays
from shardpar.lowering.transfer import Transfer
from shardpar.spec.reshard import Tensor, fuse


class GroupSums:
    """The sums of a plan's groups.

    Attributes:
      groups: of all pipelines.
      homes: which groups hold what of the gradients.
      names: of the parameters.
    """

    def __init__(
        self,
        groups: Sequence[GroupPrograms],
        homes: Homes,
        names: Sequence[str],
        devices: Sequence[jax.Device],
    ) -> None:
        """Nothing is compiled yet."""
        self.groups, self.homes, self.names = groups, homes, names
        self._devices = tuple(devices)

    @cached_property
    def shared(self) -> dict[str, Home]:
        """Parameters that several groups hold, with the home of their gradients."""
        homes = {name: self.homes.leaves[f".grads['{name}']"] for name in self.names}
        return {name: home for name, home in homes.items() if len(home.groups) > 1}

    @cached_property
    def squares(self) -> list[tuple[list[str], Ready | None]]:
        """By group, the parameters whose squares it counts, each once, and what adds them."""
        first = {name: self.homes.leaves[f".grads['{name}']"].groups[0] for name in self.names}
        out = []
        for n, group in enumerate(self.groups):
            mine = [name for name in group.names if first[name] == n]
            out.append((mine, group.squares(mine) if group.is_here else None))
        return out

    @cached_property
    def _summing(self) -> Transfer:
        tensors = [
            Tensor(home.across("partial"), home.layout, tuple(home.shapes[0].shape), 4)
            for home in self.shared.values()
        ]
        return Transfer(fuse(tensors), [np.dtype(np.float32)] * len(tensors), self._devices)

    def gradients(self, grads: list[Arrays]) -> None:
        """Replaces, by group, the addends of what several groups hold by their sum."""
        if not self.shared:
            return
        unions = [
            home.union([grads[n][name] for n in home.groups], "partial")
            for name, home in self.shared.items()
        ]
        for (name, home), union in zip(
            self.shared.items(), self._summing(unions, donate=True), strict=True
        ):
            for n, array in zip(home.groups, home.settled(union).arrays, strict=True):
                grads[n][name] = array

    @cached_property
    def _everywhere(self) -> Mapping[int, tuple[Home, Transfer]]:
        """What sums so many scalars over all groups and gives every group the sum."""
        out = {}
        for count in (2, 3):
            shapes = tuple(
                jax.ShapeDtypeStruct((count,), np.float32, sharding=g.whole) for g in self.groups
            )
            home = Home.of(tuple(range(len(self.groups))), shapes, self._devices)
            tensor = Tensor(home.across("partial"), home.layout, (count,), 4)
            out[count] = home, Transfer(fuse([tensor]), [np.dtype(np.float32)], self._devices)
        return out

    def scalars(self, sums: list[Any]) -> list[Any]:
        """Two or three scalars of each group, summed over all groups, on every group."""
        if len(self.groups) == 1:
            return sums
        home, transfer = self._everywhere[sums[0].size]
        (union,) = transfer([home.union(sums, "partial")], donate=True)
        return list(home.settled(union).arrays)
