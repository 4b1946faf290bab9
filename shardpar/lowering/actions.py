"""What a transfer does, one action after the other: each takes some arrays through one step.

An action is prepared once, with every index known, and run on buffers: jitted reshards
inside groups, rounds of sums across groups, or slices put straight onto their receivers.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
import numpy as np

from shardpar.lowering.elsewhere import in_order
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
from shardpar.spec.axes import common_axes
from shardpar.spec.chain import Step, meeting
from shardpar.spec.exchange import Have, Want
from shardpar.spec.layout import Entry, Group, Partial
from shardpar.spec.mesh import GroupLayout
from shardpar.spec.reshard import Stride, Tensor

Buffers = list[dict[int, jax.Array]]
"""The pieces on this process's devices: for each tensor, by device number."""

_WORTH_PACKING_BYTES = 2**16
"""Slices of so many bytes travel alone if they are all that a sender has or that a receiver wants:
packing, or unpacking, would copy them once more."""


@dataclass(frozen=True)
class Where:
    """What all actions of a transfer are about."""

    tensors: tuple[Tensor, ...]
    dtypes: Sequence[np.dtype[Any]]
    devices: tuple[jax.Device, ...]

    def is_here(self, device: int) -> bool:
        """Whether a device is of this process."""
        return bool(self.devices[device].process_index == jax.process_index())

    def had(self, steps: Mapping[int, Step]) -> dict[int, dict[int, Have]]:
        """What each device has before, by device and tensor."""
        have: dict[int, dict[int, Have]] = defaultdict(dict)
        for i, step in steps.items():
            for of_group in step.have(self.tensors[i].shape):
                for holding in of_group:
                    have[holding.device][i] = holding
        return have


class Action(Protocol):
    """One step of some arrays, prepared."""

    def run(self, buffers: Buffers) -> None:
        """Replaces the buffers of its tensors by those in the layout after."""


class InGroups:
    """Jitted reshards, all arrays of a group and mesh in one program."""

    def __init__(self, where: Where, steps: Mapping[int, Step]) -> None:
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
        """Reshards each group's arrays."""
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
        where: Where,
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
        making = []
        for device, part in self._parts:
            got = arrived.get(device, ())
            for i in part.kept:
                after[i][device] = buffers[i][device]
            for i, parcel in part.adopted:
                after[i][device] = got[parcel]
            if part.run is not None:
                inputs = [*(buffers[i][device] for i in part.own), *(got[n] for n in part.parcels)]
                making.append((device, part, part.run, inputs))
        # XLA runs programs of CPU devices where they are called, so devices need threads.
        with ThreadPoolExecutor(max(1, min(len(making), os.cpu_count() or 1))) as threads:
            made = threads.map(lambda of_device: of_device[2](of_device[3]), making)
            for (device, part, _, _), arrays in zip(making, made, strict=True):
                for i, array in zip(part.made, arrays, strict=True):
                    after[i][device] = array
        for i, of_tensor in after.items():
            buffers[i] = of_tensor


class AcrossGroups:
    """Collectives over the finest slices that groups share, in rounds."""

    def __init__(self, where: Where, steps: Mapping[int, Step]) -> None:
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
        """Adds up, round by round."""
        arrived: dict[int, list[jax.Array]] = defaultdict(list)
        for rows, length, dtype, packers in self._rounds:
            flat = {d: _packed(p, buffers, d)[0] for d, p in packers.items()}
            got = sum_round(rows, flat, length, dtype, self._where.devices)
            for device in packers:
                arrived[device].append(got[device])
        self._end.run(buffers, arrived)


Message = tuple[int, int, str]
"""(sender, receiver, dtype on the way)."""


class Exchange:
    """Slices straight from sender to receiver, one message per pair and element width."""

    def __init__(self, where: Where, strides: Mapping[int, Stride]) -> None:
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
        wants = {
            i: [w for group in step.want(where.tensors[i].shape) for w in group]
            for i, step in steps.items()
        }
        wanted = {(i, w.device): w for i, of_tensor in wants.items() for w in of_tensor}
        self._near = self._prepare_near(near, have, wanted, arriving)
        self._far = self._prepare_far(far, have, arriving)
        self._end = _Assembles(where, wants, have, arriving)

    def _prepare_near(
        self,
        messages: Sequence[tuple[Message, tuple[Slice, ...]]],
        have: Mapping[int, Mapping[int, Have]],
        wanted: Mapping[tuple[int, int], Want],
        arriving: dict[int, list[Parcel]],
    ) -> list[tuple[int, Packer, list[int]]]:
        parcels: dict[int, list[tuple[int, Parcel]]] = defaultdict(list)
        for (sender, receiver, dtype), slices in messages:
            if not self._where.is_here(sender):
                continue
            packed = []
            for s in slices:
                want = wanted[s.tensor, receiver]
                if len(slices) == 1 or self._goes_bare(s, have[sender], want):
                    parcels[sender].append((receiver, Parcel((s,), dtype, is_bare=True)))
                else:
                    packed.append(s)
            if packed:
                parcels[sender].append((receiver, Parcel(tuple(packed), dtype)))
        out = []
        for sender, to in sorted(parcels.items()):
            for receiver, parcel in to:
                arriving[receiver].append(parcel)
            receivers = [receiver for receiver, _ in to]
            out.append((sender, packer([p for _, p in to], have[sender]), receivers))
        return out

    def _goes_bare(self, part: Slice, have: Mapping[int, Have], want: Want) -> bool:
        size = math.prod(part.shape) * self._where.dtypes[part.tensor].itemsize
        if size < _WORTH_PACKING_BYTES:
            return False
        as_sent = is_whole(have[part.tensor].spans, part.cell)
        return as_sent or (len(want.labels) == 1 and is_whole(want.spans, part.cell))

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
        """Packs, sends and puts together."""
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


def xla_can(step: Step) -> bool:
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

    return in_order(jax.jit(run))


def _apart(members: Any, key: Any) -> list[list[Any]]:
    """Members in lists of those with the same key, in the order of their first."""
    out: dict[Any, list[Any]] = defaultdict(list)
    for member in members:
        out[key(member[0])].append(member)
    return list(out.values())
