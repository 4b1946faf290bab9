"""Runs a resolved reshard on real arrays, in one process or several.

What happens inside a group is a jitted reshard: XLA picks the collective. Groups that add
up do so slice by slice, in rounds in which every device takes part once at most. All
other slices are packed into one message per sender and receiver and put straight onto the
receiver; between processes the messages go in rounds too, each one permutation. No array
is ever gathered on one device or on the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from shardpar.errors import SpecError
from shardpar.lowering.packing import Parcel, Slice, assemble, pack, wire_dtype
from shardpar.lowering.rounds import exchange_round, rounds_of, sum_round
from shardpar.lowering.shardings import axes_sharding
from shardpar.lowering.union import UnionArray, from_buffers
from shardpar.spec.cluster import Cluster
from shardpar.spec.communications import Reshard, Stride, Tensor, fuse
from shardpar.spec.exchange import Have, Want
from shardpar.spec.layout import Entry, Group, Layout
from shardpar.spec.mesh import GroupLayout
from shardpar.spec.reshard import Step, common_axes, meeting

Pieces = dict[int, dict[int, jax.Array]]
"""By device number and tensor."""


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
      tree: a pytree of `UnionArray`.
      layouts: a Layout for each, in a pytree of the same structure, or one for all.
      cluster: whose links decide who sends; None weighs all devices alike.
      devices: all devices of the cluster; None takes `jax.devices()`.
      donate: the arrays are not needed any more; their memory is given back.

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
    arrays, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, UnionArray))
    if isinstance(layouts, Layout):
        wanted = [layouts] * len(arrays)
    else:
        wanted = structure.flatten_up_to(layouts)
    tensors = [
        Tensor(a.layout, to, a.shape, np.dtype(a.dtype).itemsize)
        for a, to in zip(arrays, wanted, strict=True)
    ]
    program = Transfer(fuse(tensors, cluster), [a.dtype for a in arrays], devices)
    return structure.unflatten(program(arrays, donate=donate))


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
          resolved: from `spec.communications`.
          dtypes: one for each of its tensors.
          devices: all devices of the cluster; None takes `jax.devices()`.

        Raises:
          SpecError: a layout names a device that is not there.
        """
        self.resolved, self.dtypes = resolved, [np.dtype(d) for d in dtypes]
        self.devices = tuple(jax.devices() if devices is None else devices)
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
        for array, tensor in zip(arrays, self.resolved.tensors, strict=True):
            if array.layout != tensor.src or tuple(array.shape) != tensor.shape:
                raise SpecError(
                    f"an array of shape {array.shape} is in layout {array.layout}; this transfer "
                    f"starts from {tensor.src} and shape {tensor.shape}"
                )
        now = list(arrays)
        for phase in range(max(map(len, self.resolved.strides), default=0)):
            running = {
                i: strides[phase]
                for i, strides in enumerate(self.resolved.strides)
                if phase < len(strides)
            }
            self._run(now, running)
        for i, tensor in enumerate(self.resolved.tensors):
            if now[i].layout != tensor.dst:
                # Every device has its piece already; only what it is called changes.
                buffers = now[i].buffers(self.devices)
                now[i] = from_buffers(
                    buffers, tensor.dst, tensor.shape, self.dtypes[i], self.devices
                )
        if donate:
            _give_back(arrays, now)
        return tuple(now)

    def _run(self, now: list[UnionArray], running: dict[int, Stride]) -> None:
        alone = {i: s.step for i, s in running.items() if _xla_can(s.step)}
        summed = {
            i: s.step
            for i, s in running.items()
            if s.step.adds == "groups" and s.step.after.across == "dup"
        }
        sent = {i: s for i, s in running.items() if i not in alone and i not in summed}
        if alone:
            self._change_in_groups(now, alone)
        if summed:
            self._sum_across(now, summed)
        if sent:
            self._exchange(now, sent)

    def _change_in_groups(self, now: list[UnionArray], steps: dict[int, Step]) -> None:
        """Jitted reshards, all arrays of a group and mesh in one program."""
        jobs: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        for i, step in steps.items():
            for number, (before, after) in enumerate(
                zip(step.before.groups, step.after.groups, strict=True)
            ):
                if before != after:
                    pairs = common_axes(before.entries, after.entries)
                    assert pairs is not None
                    jobs[before.devices, tuple(a.parts for a, _ in pairs)].append((i, number))
        made: dict[tuple[int, int], dict[int, jax.Array]] = {}
        for (members, _), tasks in jobs.items():
            here = [self.devices[d] for d in members]
            if all(d.process_index != jax.process_index() for d in here):
                continue
            number_of = dict(zip(here, members, strict=True))
            inputs, targets = [], []
            for i, number in tasks:
                before, after = steps[i].before.groups[number], steps[i].after.groups[number]
                pairs = common_axes(before.entries, after.entries)
                assert pairs is not None
                array = now[i].arrays[number]
                source, target = (
                    axes_sharding(_axes(side, array.ndim), here, explicit=True)
                    for side in ([a for a, _ in pairs], [b for _, b in pairs])
                )
                local = [shard.data for shard in array.addressable_shards]
                inputs.append(
                    jax.make_array_from_single_device_arrays(
                        array.shape, source, local, dtype=array.dtype
                    )
                )
                targets.append(target)
            for task, array in zip(tasks, _resharder(tuple(targets))(inputs), strict=True):
                made[task] = {number_of[s.device]: s.data for s in array.addressable_shards}
        for i, step in steps.items():
            buffers = now[i].buffers(self.devices)
            for number in range(len(step.after.groups)):
                buffers |= made.get((i, number), {})
            now[i] = self._union(i, buffers, step.after)

    def _sum_across(self, now: list[UnionArray], steps: dict[int, Step]) -> None:
        """Collectives over the finest slices that groups share, in rounds."""
        slices: dict[tuple[tuple[int, ...], str], list[Slice]] = defaultdict(list)
        for i, step in steps.items():
            for cell, collectives in meeting(step, self.resolved.tensors[i].shape):
                for devices in collectives:
                    slices[devices, str(self.dtypes[i])].append(Slice(i, _SUM, cell))
        arrived: dict[int, list[tuple[Parcel, jax.Array]]] = defaultdict(list)
        have, pieces = self._had(now, steps)
        members = [(key, key[0]) for key in slices]
        for same in _apart(members, lambda key: (len(key[0]), key[1])):
            for dealt in rounds_of(same):
                length = max(Parcel(tuple(slices[k]), k[1]).size for k in dealt)
                parcels = {k: Parcel(tuple(slices[k]), k[1], length) for k in dealt}
                flat = {
                    d: pack([parcels[k]], have[d], pieces[d])[0]
                    for k in dealt
                    for d in k[0]
                    if d in pieces
                }
                got = sum_round([k[0] for k in dealt], flat, length, dealt[0][1], self.devices)
                for k in dealt:
                    for d in k[0]:
                        if d in got:
                            arrived[d].append((parcels[k], got[d]))
        wants = {
            i: [
                Want(p.device, (_SUM,), p.spans)
                for of_group in step.after.pieces(self.resolved.tensors[i].shape)
                for p in of_group
            ]
            for i, step in steps.items()
        }
        self._assemble(now, {i: s.after for i, s in steps.items()}, wants, have, pieces, arrived)

    def _exchange(self, now: list[UnionArray], strides: dict[int, Stride]) -> None:
        """Slices straight from sender to receiver, one message per pair and element width."""
        steps = {i: stride.step for i, stride in strides.items()}
        messages: dict[tuple[int, int, str], list[Slice]] = defaultdict(list)
        for i, stride in strides.items():
            for move in stride.moves:
                key = move.sender, move.receiver, wire_dtype(self.dtypes[i])
                messages[key].append(Slice(i, move.label, move.cell))
        have, pieces = self._had(now, steps)
        arrived = self._deliver({k: tuple(v) for k, v in sorted(messages.items())}, have, pieces)
        wants = {
            i: [w for group in step.want(self.resolved.tensors[i].shape) for w in group]
            for i, step in steps.items()
        }
        self._assemble(now, {i: s.after for i, s in steps.items()}, wants, have, pieces, arrived)

    def _deliver(
        self,
        messages: dict[tuple[int, int, str], tuple[Slice, ...]],
        have: dict[int, dict[int, Have]],
        pieces: Pieces,
    ) -> dict[int, list[tuple[Parcel, jax.Array]]]:
        arrived: dict[int, list[tuple[Parcel, jax.Array]]] = defaultdict(list)
        near = {k: v for k, v in messages.items() if self._same_process(k[0], k[1])}
        for sender in sorted({k[0] for k in near} & set(pieces)):
            keys = [k for k in near if k[0] == sender]
            parcels = [Parcel(near[k], k[2]) for k in keys]
            packed = pack(parcels, have[sender], pieces[sender])
            landed = jax.device_put(packed, [self.devices[k[1]] for k in keys])
            for key, parcel, array in zip(keys, parcels, landed, strict=True):
                arrived[key[1]].append((parcel, array))
        far = [(k, (k[0], k[1])) for k in messages if k not in near]
        for same in _apart(far, lambda key: key[2]):
            for dealt in rounds_of(same):
                length = max(Parcel(messages[k], k[2]).size for k in dealt)
                padded = {k: Parcel(messages[k], k[2], length) for k in dealt}
                flat = {
                    k[0]: pack([padded[k]], have[k[0]], pieces[k[0]])[0]
                    for k in dealt
                    if k[0] in pieces
                }
                got = exchange_round(
                    [(k[0], k[1]) for k in dealt], flat, length, dealt[0][2], self.devices
                )
                for k in dealt:
                    if k[1] in got:
                        arrived[k[1]].append((padded[k], got[k[1]]))
        return arrived

    def _assemble(
        self,
        now: list[UnionArray],
        after: dict[int, Layout],
        wants: dict[int, list[Want]],
        have: dict[int, dict[int, Have]],
        pieces: Pieces,
        arrived: dict[int, list[tuple[Parcel, jax.Array]]],
    ) -> None:
        by_device: dict[int, dict[int, Want]] = defaultdict(dict)
        for i, of_tensor in wants.items():
            for want in of_tensor:
                if self.devices[want.device].process_index == jax.process_index():
                    by_device[want.device][i] = want
        buffers: dict[int, dict[int, jax.Array]] = {i: {} for i in wants}
        for device, of_device in sorted(by_device.items()):
            made = assemble(
                of_device,
                have.get(device, {}),
                pieces.get(device, {}),
                arrived.get(device, ()),
                dict(enumerate(self.dtypes)),
                self.devices[device],
            )
            for i, array in made.items():
                buffers[i][device] = array
        for i, layout in after.items():
            now[i] = self._union(i, buffers[i], layout)

    def _had(
        self, now: list[UnionArray], steps: dict[int, Step]
    ) -> tuple[dict[int, dict[int, Have]], Pieces]:
        have: dict[int, dict[int, Have]] = defaultdict(dict)
        pieces: Pieces = defaultdict(dict)
        for i, step in steps.items():
            for of_group in step.have(self.resolved.tensors[i].shape):
                for holding in of_group:
                    have[holding.device][i] = holding
            for device, array in now[i].buffers(self.devices).items():
                pieces[device][i] = array
        return have, pieces

    def _union(self, i: int, buffers: dict[int, jax.Array], layout: Layout) -> UnionArray:
        shape = self.resolved.tensors[i].shape
        return from_buffers(buffers, layout, shape, self.dtypes[i], self.devices)

    def _same_process(self, a: int, b: int) -> bool:
        return bool(self.devices[a].process_index == self.devices[b].process_index)


_SUM = -1
"""The label of what is the sum of all addends already."""


def _xla_can(step: Step) -> bool:
    """Whether every group changes alone on one mesh, which one jitted reshard does."""
    return step.is_in_groups and all(
        common_axes(before.entries, after.entries) is not None
        for before, after in zip(step.before.groups, step.after.groups, strict=True)
    )


def _axes(entries: Sequence[Entry], rank: int) -> GroupLayout:
    return Group(tuple(range(_product(entries))), tuple(entries)).named(rank)


def _product(entries: Sequence[Entry]) -> int:
    return int(np.prod([entry.parts for entry in entries], dtype=int))


@lru_cache(maxsize=1024)
def _resharder(targets: tuple[Any, ...]) -> Any:
    def run(arrays: list[jax.Array]) -> list[jax.Array]:
        return [
            jax.sharding.reshard(array, target)
            for array, target in zip(arrays, targets, strict=True)
        ]

    return jax.jit(run)


def _apart(members: Any, key: Any) -> list[list[Any]]:
    """Members in lists of those with the same key, in the order of their first."""
    out: dict[Any, list[Any]] = defaultdict(list)
    for member in members:
        out[key(member[0])].append(member)
    return list(out.values())


def _give_back(arrays: Sequence[UnionArray], kept: Sequence[UnionArray]) -> None:
    """Deletes the buffers of `arrays` that no array of `kept` uses too."""
    used = {
        shard.data.unsafe_buffer_pointer()
        for union in kept
        for array in union.arrays
        for shard in array.addressable_shards
    }
    for union in arrays:
        for array in union.arrays:
            shards = array.addressable_shards
            if not any(shard.data.unsafe_buffer_pointer() in used for shard in shards):
                array.delete()
