"""Runs a resolved reshard on real arrays, in one process or several.

What happens inside a group is a jitted reshard: XLA picks the collective. Groups that add
up do so slice by slice, in rounds in which every device takes part once at most. All
other slices are packed into one message per sender and receiver and put straight onto the
receiver; between processes the messages go in rounds too, each one permutation. No array
is ever gathered on one device or on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shardpar.errors import SpecError
from shardpar.lowering.actions import (
    AcrossGroups,
    Action,
    Buffers,
    Exchange,
    InGroups,
    Where,
    xla_can,
)
from shardpar.lowering.union import UnionArray, from_buffers, union_array
from shardpar.spec.cluster import Cluster
from shardpar.spec.layout import Layout
from shardpar.spec.reshard import Reshard, Stride, Tensor, fuse


def transfer(
    tree: Any,
    layouts: Any,
    *,
    cluster: Cluster | None = None,
    devices: Sequence[jax.Device] | None = None,
    donate: bool = False,
) -> Any:
    """Reshards all arrays of a pytree, fused: one message per sender and receiver.

    Args:
      tree: a pytree of `UnionArray`, or of sharded `jax.Array`.
      layouts: a Layout for each, in a pytree of the same structure, or one for all.
      cluster: whose links decide who sends; None weighs all devices alike.
      devices: all devices of the cluster; None takes `jax.devices()`.
      donate: the arrays are not needed any more: pieces that stay are handed on, and the
        memory of the others is given back. Without, the result shares no memory with them.

    Raises:
      SpecError: a layout does not fit its array, or names a device that is not there.

    Example:
      >>> from shardpar.lowering.union import place
      >>> from shardpar.spec.layout_text import layout_from_text
      >>> here = layout_from_text("[0]")
      >>> moved = transfer({"w": place(np.arange(4), here)}, here)
      >>> moved["w"].arrays[0].tolist()
      [0, 1, 2, 3]
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, UnionArray))
    arrays = [_as_union(leaf, devices) for leaf in leaves]
    wanted = _wanted(layouts, structure, len(arrays))
    tensors = [
        Tensor(a.layout, to, a.shape, np.dtype(a.dtype).itemsize)
        for a, to in zip(arrays, wanted, strict=True)
    ]
    program = Transfer(fuse(tensors, cluster), [a.dtype for a in arrays], devices)
    return structure.unflatten(program(arrays, donate=donate))


def _as_union(leaf: Any, devices: Sequence[jax.Device] | None) -> UnionArray:
    if isinstance(leaf, UnionArray):
        return leaf
    if isinstance(leaf, jax.Array):
        return union_array(leaf, devices)
    raise SpecError(
        f"a leaf to transfer is a {type(leaf).__name__}; give arrays on devices, as `place` makes"
    )


def _wanted(layouts: Any, structure: Any, count: int) -> list[Layout]:
    if isinstance(layouts, Layout):
        return [layouts] * count
    try:
        wanted = structure.flatten_up_to(layouts)
    except ValueError as error:
        raise SpecError(
            f"the layouts are not a tree like the arrays': {str(error).splitlines()[0]}"
        ) from None
    for layout in wanted:
        if not isinstance(layout, Layout):
            raise SpecError(
                f"a layout to transfer to is a {type(layout).__name__}; give a Layout, which "
                "`layout_from_text` makes"
            )
    return wanted


class Transfer:
    """A resolved reshard, ready to run on arrays; programs are compiled when first needed.

    Attributes:
      resolved: what it does.
      dtypes: of the arrays.
    """

    def __init__(
        self, resolved: Reshard, dtypes: Sequence[Any], devices: Sequence[jax.Device] | None = None
    ) -> None:
        """Checks that the devices are there.

        Args:
          resolved: from `spec.reshard`.
          dtypes: one for each of its tensors.
          devices: all devices of the cluster; None takes `jax.devices()`.

        Raises:
          SpecError: a layout names a device that is not there.
        """
        self.resolved, self.dtypes = resolved, [np.dtype(d) for d in dtypes]
        self.devices = tuple(jax.devices() if devices is None else devices)
        if [d.itemsize for d in self.dtypes] != [t.itemsize for t in resolved.tensors]:
            raise SpecError(
                f"the dtypes {[str(d) for d in self.dtypes]} are not those of the reshard, whose "
                f"elements have {[t.itemsize for t in resolved.tensors]} bytes"
            )
        self._phases: list[list[Action]] | None = None
        for tensor in resolved.tensors:
            missing = [
                d for d in (*tensor.src.devices, *tensor.dst.devices) if d >= len(self.devices)
            ]
            if missing:
                raise SpecError(
                    f"{tensor.src} to {tensor.dst}: device {missing[0]} is not among the "
                    f"{len(self.devices)} devices that are there, counted from 0"
                )

    def __call__(
        self, arrays: Sequence[UnionArray], *, donate: bool = False
    ) -> tuple[UnionArray, ...]:
        """Runs it.

        Args:
          arrays: in the layouts it starts from.
          donate: give the arrays' memory back; they must not be used again.

        Raises:
          SpecError: an array is not in the layout this was made for.
        """
        if len(arrays) != len(self.resolved.tensors):
            raise SpecError(
                f"there are {len(arrays)} arrays; this transfer is for {len(self.dtypes)}"
            )
        for array, tensor, dtype in zip(arrays, self.resolved.tensors, self.dtypes, strict=True):
            if array.dtype != dtype:
                raise SpecError(f"an array is {array.dtype}; this transfer is for {dtype}")
            if array.layout != tensor.src or tuple(array.shape) != tensor.shape:
                raise SpecError(
                    f"an array of shape {array.shape} is in layout {array.layout}; this transfer "
                    f"starts from {tensor.src} and shape {tensor.shape}"
                )
        if self._phases is None:
            self._phases = self._prepared()
        # A tied array comes more than once and is one array all the same.
        held = {id(array): array.buffers(self.devices) for array in arrays}
        buffers = [dict(held[id(array)]) for array in arrays]
        for phase in self._phases:
            for action in phase:
                action.run(buffers)
        if not donate:
            self._copy_what_stays(held.values(), buffers)
        made = tuple(
            from_buffers(buffers[i], tensor.dst, tensor.shape, self.dtypes[i], self.devices)
            for i, tensor in enumerate(self.resolved.tensors)
        )
        if donate:
            _give_back({id(array): array for array in arrays}, held, buffers)
        return made

    def _copy_what_stays(
        self, sources: Iterable[Mapping[int, jax.Array]], buffers: Buffers
    ) -> None:
        """Gives the result memory of its own: whoever donates one must not lose the other."""
        shared = {id(piece) for of_array in sources for piece in of_array.values()}
        stays = [(i, d) for i, of in enumerate(buffers) for d, b in of.items() if id(b) in shared]
        copies = jax.device_put(
            [buffers[i][d] for i, d in stays],
            [self.devices[d] for _, d in stays],
            may_alias=False,
        )
        for (i, device), copy in zip(stays, copies, strict=True):
            buffers[i] = {**buffers[i], device: copy}

    def _prepared(self) -> list[list[Action]]:
        phases = []
        for phase in range(max(map(len, self.resolved.strides), default=0)):
            running = {
                i: strides[phase]
                for i, strides in enumerate(self.resolved.strides)
                if phase < len(strides)
            }
            phases.append(list(self._actions(running)))
        return phases

    def _actions(self, running: dict[int, Stride]) -> Iterator[Action]:
        alone = {i: s.step for i, s in running.items() if not s.by_slices and xla_can(s.step)}
        summed = {i: s.step for i, s in running.items() if s.step.adds == "groups"}
        sent = {i: s for i, s in running.items() if i not in alone and i not in summed}
        where = Where(self.resolved.tensors, self.dtypes, self.devices)
        if alone:
            yield InGroups(where, alone)
        if summed:
            yield AcrossGroups(where, summed)
        if sent:
            yield Exchange(where, sent)


def _give_back(
    arrays: Mapping[int, UnionArray], held: Mapping[int, Mapping[int, jax.Array]], after: Buffers
) -> None:
    """Deletes the pieces of the source that the result does not use."""
    used = {id(piece) for of_array in after for piece in of_array.values()}
    for number, union in arrays.items():
        free = [piece for piece in held[number].values() if id(piece) not in used]
        if len(free) == len(held[number]):
            for array in union.arrays:
                array.delete()
        for piece in free:
            piece.delete()
