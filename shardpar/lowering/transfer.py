"""Runs a resolved reshard on real arrays, in one process or several.

What happens inside a group is a jitted reshard: XLA picks the collective. Groups that add
up do so slice by slice, in rounds in which every device takes part once at most. All
other slices are packed into one message per sender and receiver and put straight onto the
receiver; between processes the messages go in rounds too, each one permutation. No array
is ever gathered on one device or on the host.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
import numpy as np

from shardpar.errors import SpecError
from shardpar.lowering.packing import (
    Packer,
    Parcel,
    Slice,
    assembly,
    is_whole,
    packer,
    wire_dtype,
)
from shardpar.lowering.rounds import exchange_round, rounds_of, sum_round
from shardpar.lowering.shardings import axes_sharding
from shardpar.lowering.union import UnionArray, from_buffers, union_array
from shardpar.spec.chain import Step, common_axes, meeting
from shardpar.spec.cluster import Cluster
from shardpar.spec.exchange import Have, Want
from shardpar.spec.layout import Entry, Group, Layout, Partial
from shardpar.spec.mesh import GroupLayout
from shardpar.spec.reshard import Reshard, Stride, Tensor, fuse

Buffers = list[dict[int, jax.Array]]
"""The pieces on this process's devices: for each tensor, by device number."""

_WORTH_PACKING_BYTES = 2**16
"""Pieces of so many bytes that go whole are sent from where they lie: packing would copy them."""


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
        self._phases: list[list[_Action]] | None = None
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

    def _prepared(self) -> list[list[_Action]]:
        phases = []
        for phase in range(max(map(len, self.resolved.strides), default=0)):
            running = {
                i: strides[phase]
                for i, strides in enumerate(self.resolved.strides)
                if phase < len(strides)
            }
            phases.append(list(self._actions(running)))
        return phases

    def _actions(self, running: dict[int, Stride]) -> Iterator[_Action]:
        alone = {i: s.step for i, s in running.items() if _xla_can(s.step)}
        summed = {i: s.step for i, s in running.items() if s.step.adds == "groups"}
        sent = {i: s for i, s in running.items() if i not in alone and i not in summed}
        where = _Where(self.resolved.tensors, self.dtypes, self.devices)
        if alone:
            yield _InGroups(where, alone)
        if summed:
            yield _AcrossGroups(where, summed)
        if sent:
            yield _Exchange(where, sent)


@dataclass(frozen=True)
class _Where:
    """What all actions of a transfer are about."""

    tensors: tuple[Tensor, ...]
    dtypes: Sequence[np.dtype[Any]]
    devices: tuple[jax.Device, ...]

    def is_here(self, device: int) -> bool:
        return bool(self.devices[device].process_index == jax.process_index())

    def had(self, steps: Mapping[int, Step]) -> dict[int, dict[int, Have]]:
        """What each device has before, by device and tensor."""
        have: dict[int, dict[int, Have]] = defaultdict(dict)
        for i, step in steps.items():
            for of_group in step.have(self.tensors[i].shape):
                for holding in of_group:
                    have[holding.device][i] = holding
        return have


class _Action(Protocol):
    def run(self, buffers: Buffers) -> None:
        """Replaces the buffers of its tensors by those in the layout after."""


class _InGroups:
    """Jitted reshards, all arrays of a group and mesh in one program."""

    def __init__(self, where: _Where, steps: Mapping[int, Step]) -> None:
        jobs: dict[Any, list[tuple[int, Any, Any, tuple[int, ...]]]] = defaultdict(list)
        self._where = where
        for i, step in steps.items():
            shape = where.tensors[i].shape
            for number, (before, after) in enumerate(
                zip(step.before.groups, step.after.groups, strict=True)
            ):
                here = [where.devices[d] for d in before.devices]
                pairs = common_axes(before.entries, after.entries)
                if before == after or not any(map(where.is_here, before.devices)):
                    continue
                assert pairs is not None
                source, target = (
                    axes_sharding(_axes(side, len(shape)), here, explicit=True)
                    for side in ([a for a, _ in pairs], [b for _, b in pairs])
                )
                region = tuple(
                    sum(b - a for a, b in spans) for spans in step.before.region(number, shape)
                )
                mesh = before.devices, tuple(a.parts for a, _ in pairs)
                jobs[mesh].append((i, source, target, region))
        self._jobs = [
            (members, tasks, _resharder(tuple(target for _, _, target, _ in tasks)))
            for (members, _), tasks in jobs.items()
        ]

    def run(self, buffers: Buffers) -> None:
        for members, tasks, program in self._jobs:
            inputs = [
                jax.make_array_from_single_device_arrays(
                    region,
                    source,
                    [buffers[i][d] for d in members if d in buffers[i]],
                    dtype=self._where.dtypes[i],
                )
                for i, source, _, region in tasks
            ]
            number = {self._where.devices[d]: d for d in members}
            for (i, *_), array in zip(tasks, program(inputs), strict=True):
                buffers[i] |= {number[s.device]: s.data for s in array.addressable_shards}


class _Assembles:
    """The second half of what moves slices: each device puts its pieces together."""

    def __init__(
        self,
        where: _Where,
        wants: Mapping[int, Sequence[Want]],
        have: Mapping[int, Mapping[int, Have]],
        arriving: Mapping[int, Sequence[Parcel]],
    ) -> None:
        by_device: dict[int, dict[int, Want]] = defaultdict(dict)
        for i, of_tensor in wants.items():
            for want in of_tensor:
                if where.is_here(want.device):
                    by_device[want.device][i] = want
        self._tensors = list(wants)
        self._parts = [
            (
                device,
                assembly(
                    of_device,
                    have.get(device, {}),
                    arriving.get(device, ()),
                    where.dtypes,
                    where.devices[device],
                ),
            )
            for device, of_device in sorted(by_device.items())
        ]

    def run(self, buffers: Buffers, arrived: Mapping[int, Sequence[jax.Array]]) -> None:
        after: dict[int, dict[int, jax.Array]] = {i: {} for i in self._tensors}
        for device, part in self._parts:
            got = arrived.get(device, ())
            for i in part.kept:
                after[i][device] = buffers[i][device]
            for i, parcel in part.adopted:
                after[i][device] = got[parcel]
            if part.run is not None:
                inputs = [*(buffers[i][device] for i in part.own), *(got[n] for n in part.parcels)]
                for i, array in zip(part.made, part.run(inputs), strict=True):
                    after[i][device] = array
        for i, of_tensor in after.items():
            buffers[i] = of_tensor


class _AcrossGroups:
    """Collectives over the finest slices that groups share, in rounds."""

    def __init__(self, where: _Where, steps: Mapping[int, Step]) -> None:
        self._where = where
        slices: dict[tuple[tuple[int, ...], str], list[Slice]] = defaultdict(list)
        for i, step in steps.items():
            for cell, collectives in meeting(step, where.tensors[i].shape):
                for devices in collectives:
                    slices[devices, str(where.dtypes[i])].append(Slice(i, _SUM, cell))
        have = where.had(steps)
        arriving: dict[int, list[Parcel]] = defaultdict(list)
        self._rounds: list[tuple[list[tuple[int, ...]], int, str, dict[int, Packer]]] = []
        members = [(key, key[0]) for key in slices]
        for same in _apart(members, lambda key: (len(key[0]), key[1])):
            for dealt in rounds_of(same):
                length = max(Parcel(tuple(slices[k]), k[1]).size for k in dealt)
                packers = {}
                for key in dealt:
                    parcel = Parcel(tuple(slices[key]), key[1], length)
                    for device in key[0]:
                        if where.is_here(device):
                            packers[device] = packer([parcel], have[device])
                            arriving[device].append(parcel)
                self._rounds.append(([k[0] for k in dealt], length, dealt[0][1], packers))
        wants = {
            i: [
                Want(p.device, (_SUM,), p.spans)
                for of_group in step.after.pieces(where.tensors[i].shape)
                for p in of_group
            ]
            for i, step in steps.items()
        }
        self._end = _Assembles(where, wants, have, arriving)

    def run(self, buffers: Buffers) -> None:
        arrived: dict[int, list[jax.Array]] = defaultdict(list)
        for rows, length, dtype, packers in self._rounds:
            flat = {d: _packed(p, buffers, d)[0] for d, p in packers.items()}
            got = sum_round(rows, flat, length, dtype, self._where.devices)
            for device in packers:
                arrived[device].append(got[device])
        self._end.run(buffers, arrived)


Message = tuple[int, int, str]
"""(sender, receiver, dtype on the way)."""


class _Exchange:
    """Slices straight from sender to receiver, one message per pair and element width."""

    def __init__(self, where: _Where, strides: Mapping[int, Stride]) -> None:
        self._where = where
        steps = {i: stride.step for i, stride in strides.items()}
        have = where.had(steps)
        messages: dict[Message, list[Slice]] = defaultdict(list)
        for i, stride in strides.items():
            for move in stride.moves:
                key = move.sender, move.receiver, wire_dtype(where.dtypes[i])
                messages[key].append(Slice(i, move.label, move.cell))
        arriving: dict[int, list[Parcel]] = defaultdict(list)
        near, far = [], []
        for key, slices in sorted(messages.items()):
            same = where.devices[key[0]].process_index == where.devices[key[1]].process_index
            (near if same else far).append((key, tuple(slices)))
        self._near = self._prepare_near(near, have, arriving)
        self._far = self._prepare_far(far, have, arriving)
        wants = {
            i: [w for group in step.want(where.tensors[i].shape) for w in group]
            for i, step in steps.items()
        }
        self._end = _Assembles(where, wants, have, arriving)

    def _prepare_near(
        self,
        messages: Sequence[tuple[Message, tuple[Slice, ...]]],
        have: Mapping[int, Mapping[int, Have]],
        arriving: dict[int, list[Parcel]],
    ) -> list[tuple[int, Packer, list[int]]]:
        parcels: dict[int, list[tuple[int, Parcel]]] = defaultdict(list)
        for (sender, receiver, dtype), slices in messages:
            if not self._where.is_here(sender):
                continue
            packed = [s for s in slices if not self._goes_bare(s, have[sender], len(slices))]
            bare = [s for s in slices if s not in packed]
            for s in bare:
                parcels[sender].append((receiver, Parcel((s,), dtype, is_bare=True)))
            if packed:
                parcels[sender].append((receiver, Parcel(tuple(packed), dtype)))
        out = []
        for sender, to in sorted(parcels.items()):
            for receiver, parcel in to:
                arriving[receiver].append(parcel)
            receivers = [receiver for receiver, _ in to]
            out.append((sender, packer([p for _, p in to], have[sender]), receivers))
        return out

    def _goes_bare(self, part: Slice, have: Mapping[int, Have], companions: int) -> bool:
        if companions == 1:
            return True
        size = math.prod(part.shape) * self._where.dtypes[part.tensor].itemsize
        return size >= _WORTH_PACKING_BYTES and is_whole(have[part.tensor].spans, part.cell)

    def _prepare_far(
        self,
        messages: Sequence[tuple[Message, tuple[Slice, ...]]],
        have: Mapping[int, Mapping[int, Have]],
        arriving: dict[int, list[Parcel]],
    ) -> list[tuple[list[tuple[int, int]], int, str, dict[int, Packer], list[int]]]:
        slices = dict(messages)
        out = []
        for same in _apart([(k, (k[0], k[1])) for k in slices], lambda key: key[2]):
            for dealt in rounds_of(same):
                length = max(Parcel(slices[k], k[2]).size for k in dealt)
                packers, receivers = {}, []
                for key in dealt:
                    parcel = Parcel(slices[key], key[2], length)
                    if self._where.is_here(key[0]):
                        packers[key[0]] = packer([parcel], have[key[0]])
                    if self._where.is_here(key[1]):
                        arriving[key[1]].append(parcel)
                        receivers.append(key[1])
                pairs = [(k[0], k[1]) for k in dealt]
                out.append((pairs, length, dealt[0][2], packers, receivers))
        return out

    def run(self, buffers: Buffers) -> None:
        arrived: dict[int, list[jax.Array]] = defaultdict(list)
        leaving: list[jax.Array] = []
        targets: list[int] = []
        for sender, pack, receivers in self._near:
            leaving += _packed(pack, buffers, sender)
            targets += receivers
        landed = jax.device_put(leaving, [self._where.devices[d] for d in targets])
        for device, array in zip(targets, landed, strict=True):
            arrived[device].append(array)
        for pairs, length, dtype, packers, receivers in self._far:
            flat = {d: _packed(p, buffers, d)[0] for d, p in packers.items()}
            got = exchange_round(pairs, flat, length, dtype, self._where.devices)
            for device in receivers:
                arrived[device].append(got[device])
        self._end.run(buffers, arrived)


def _packed(pack: Packer, buffers: Buffers, device: int) -> list[jax.Array]:
    return pack.run([buffers[i][device] for i in pack.tensors])


_SUM = -1
"""The label of what is the sum of all addends already."""


def _xla_can(step: Step) -> bool:
    """Whether every group changes alone on one mesh, which one jitted reshard does.

    XLA adds up along axes, but aborts where addends move from one axis to another.
    """
    if not step.is_in_groups:
        return False
    for before, after in zip(step.before.groups, step.after.groups, strict=True):
        pairs = common_axes(before.entries, after.entries)
        if pairs is None or any(
            isinstance(b, Partial) and not isinstance(a, Partial) for a, b in pairs
        ):
            return False
    return True


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
