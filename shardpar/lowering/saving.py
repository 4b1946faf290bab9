"""What a checkpoint holds of a state that several groups hold: one array of each leaf."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import jax

from shardpar.lowering.elsewhere import first_device
from shardpar.lowering.homes import Homes, Move
from shardpar.lowering.spread import spread
from shardpar.lowering.state import TrainState
from shardpar.spec.layout import Group, Layout


class Saving:
    """The way between a program's state and a checkpoint of it."""

    def __init__(
        self,
        homes: Homes,
        whole: TrainState,
        used_devices: Sequence[jax.Device],
        devices: Sequence[jax.Device],
    ) -> None:
        """Nothing is moved yet.

        Args:
          homes: which groups hold each array of the state.
          whole: shapes of the whole state.
          used_devices: those the program runs on.
          devices: of the cluster, in order.
        """
        self.homes, self.whole = homes, whole
        self.used_devices, self.devices = list(used_devices), tuple(devices)

    @property
    def shapes(self) -> TrainState:
        """What a checkpoint holds, and where it is restored to."""
        return self._saved_homes.first_shapes()  # type: ignore[no-any-return]

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it: one array per leaf."""
        if jax.process_count() == 1:
            return self.homes.first_copies(state)  # type: ignore[no-any-return]
        moved = self._saving(self.homes.unions(state), donate=False)
        return self._saved_homes.settled(moved)  # type: ignore[no-any-return]

    def from_saved(self, saved: TrainState) -> TrainState:
        """The state from what a checkpoint was restored to; the copies are made."""
        go = {path: home.layout for path, home in self.homes.leaves.items()}
        moved = Move(go, self.devices)(self._saved_homes.unions(saved))
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

    @cached_property
    def _saved_homes(self) -> Homes:
        """Where a checkpoint's arrays lie: the first copies, or over all processes' devices."""
        if jax.process_count() == 1:
            part = self.homes.first_shapes()
        else:
            part = jax.tree.map(lambda leaf: spread(leaf, self.used_devices), self.whole)
        return Homes(self.whole, [part], self.devices, single=True)

    @cached_property
    def _saving(self) -> Move:
        go = {path: home.layout for path, home in self._saved_homes.leaves.items()}
        return Move(go, self.devices)
