"""How a state over several groups of devices becomes one array per leaf for a checkpoint, and back.

In one process a leaf is saved from its first copy, where it lies. Slices that groups have of a
leaf, and all leaves of several processes, are brought together over many devices first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import jax

from shardpar.lowering.elsewhere import first_device
from shardpar.lowering.homes import Homes, Move
from shardpar.lowering.spread import spread, spread_once
from shardpar.lowering.state import TrainState
from shardpar.spec.layout import Group, Layout


class Saving:
    """Between the state of a program and what its checkpoints hold."""

    def __init__(
        self,
        homes: Homes,
        whole: TrainState,
        used: Sequence[jax.Device],
        devices: Sequence[jax.Device],
    ) -> None:
        """Nothing moves yet.

        Args:
          homes: where the state lies.
          whole: shapes of the whole state.
          used: the devices it lies on.
          devices: of the cluster, in order.
        """
        self.homes, self.devices = homes, tuple(devices)
        self.whole, self.used_devices = whole, list(used)
        apart = jax.process_count() > 1
        places = [
            spread(leaf, used)
            if apart
            else spread_once(leaf, used)
            if home.is_sliced
            else home.shapes[0]
            for leaf, home in zip(jax.tree.leaves(whole), homes.leaves.values(), strict=True)
        ]
        part = jax.tree.structure(whole).unflatten(places)
        self.saved = Homes(whole, [part], devices, single=True)
        self._moves = {p: h for p, h in homes.leaves.items() if apart or h.is_sliced}

    @property
    def shapes(self) -> TrainState:
        """What a checkpoint holds, and where it is restored to."""
        return self.saved.first_shapes()  # type: ignore[no-any-return]

    @cached_property
    def _bring(self) -> Move:
        return Move({path: self.saved.leaves[path].layout for path in self._moves}, self.devices)

    def to_saved(self, state: TrainState) -> TrainState:
        """One array per leaf; the state is left as it is."""
        unions = self.homes.unions(state)
        if not self._moves:
            return self.homes.first_copies(state)  # type: ignore[no-any-return]
        moved = self._bring({path: unions[path] for path in self._moves}, donate=False)
        first = {
            path: self.saved.leaves[path].union([union.arrays[0]])
            for path, union in unions.items()
            if path not in moved
        }
        return self.saved.settled({**first, **moved})  # type: ignore[no-any-return]

    def from_saved(self, saved: TrainState) -> TrainState:
        """The state again, with a copy or a slice wherever one belongs."""
        go = {path: home.layout for path, home in self.homes.leaves.items()}
        moved = Move(go, self.devices)(self.saved.unions(saved))
        return self.homes.settled(moved)  # type: ignore[no-any-return]

    def together(self, state: TrainState) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Parameters and other variables, whole, on one device of the first process."""
        here = Layout((Group((self.devices.index(first_device(self.used_devices)),)),))
        unions = self.homes.unions(state)
        go = [path for path in unions if path.startswith((".params", ".rest"))]
        moved = Move(dict.fromkeys(go, here), self.devices)(
            {path: unions[path] for path in go}, donate=False
        )
        params, rest = (
            {name: moved[f".{kind}['{name}']"].arrays[0] for name in getattr(self.whole, kind)}
            for kind in ("params", "rest")
        )
        return params, rest
