"""The communications of a reshard: each with its kind, its devices and their bytes.

What a step of `spec.chain` is called on the wire is read off its two ends. Several
arrays can be resharded together: then all slices from one device to another are one
message, and the senders are chosen for all arrays at once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from shardpar.errors import SpecError
from shardpar.spec.axes import along, common_axes, reductions, ring_all_reduce
from shardpar.spec.bounds import lower_bound_elements
from shardpar.spec.chain import Shape, Step, chain, meeting
from shardpar.spec.cluster import Cluster
from shardpar.spec.exchange import Move, moves_of
from shardpar.spec.layout import Group, Layout, Replicate, Split, SplitAcross
from shardpar.spec.routing import route

Kind = Literal[
    "identity",
    "local slice",
    "send-recv",
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "split-all-reduce",
    "split-reduce-scatter",
    "split-all-gather",
    "batched send-receive",
]

Tier = Literal["bottom", "top"]


@dataclass(frozen=True)
class Communication:
    """What some devices do together in one step.

    Attributes:
      kind: as the field calls it.
      tier: "bottom" inside the groups of the layouts, "top" across them.
      groups: the devices that take part together; for sends, (sender, receiver) pairs.
      sent, received: (device, bytes) of those that send or receive any.
    """

    kind: Kind
    tier: Tier
    groups: tuple[tuple[int, ...], ...]
    sent: tuple[tuple[int, int], ...] = ()
    received: tuple[tuple[int, int], ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes that cross, over all devices."""
        return sum(amount for _, amount in self.sent)


@dataclass(frozen=True)
class Tensor:
    """An array to reshard."""

    src: Layout
    dst: Layout
    shape: Shape
    itemsize: int


@dataclass(frozen=True)
class Stride:
    """One step of one array, with the slices that its devices send.

    Attributes:
      step: the two layouts.
      moves: the slices that cross, each with its sender.
      communications: what that is called, and its bytes.
      by_slices: whether the slices are all there is, though a collective could do the step:
        some of its devices cannot take part.
    """

    step: Step
    moves: tuple[Move, ...]
    communications: tuple[Communication, ...]
    by_slices: bool = False


@dataclass(frozen=True)
class Reshard:
    """A resolved reshard of one array, or of several at once.

    Attributes:
      tensors: the arrays.
      strides: for each array its steps, in order.
      busiest_s: seconds the busiest link sends slices, the steps added up; bytes per device
        where there is no cluster. Reducing collectives are not in it: nobody chooses there.
      busiest_bound_s: the least that it could have been.
    """

    tensors: tuple[Tensor, ...]
    strides: tuple[tuple[Stride, ...], ...]
    busiest_s: float
    busiest_bound_s: float

    @property
    def communications(self) -> tuple[Communication, ...]:
        """All communications, in the order of the steps; one "identity" where there are none."""
        found = tuple(
            communication
            for strides in self.strides
            for stride in strides
            for communication in stride.communications
        )
        if found:
            return found
        groups = tuple(dict.fromkeys(g.devices for t in self.tensors for g in t.src.groups))
        return (Communication("identity", "bottom", groups),)

    @cached_property
    def bytes_sent(self) -> dict[int, int]:
        """Bytes each device sends."""
        return self._total("sent")

    @cached_property
    def bytes_received(self) -> dict[int, int]:
        """Bytes each device receives."""
        return self._total("received")

    def _total(self, way: str) -> dict[int, int]:
        devices = sorted({d for t in self.tensors for d in (*t.src.devices, *t.dst.devices)})
        total: Counter[int] = Counter()
        for communication in self.communications:
            total.update(dict(getattr(communication, way)))
        return {device: total[device] for device in devices}

    @property
    def total_bytes(self) -> int:
        """Bytes that cross, over all devices."""
        return sum(self.bytes_sent.values())

    @cached_property
    def lower_bound_bytes(self) -> int:
        """Bytes that must cross whatever the method; see `lower_bound_elements`."""
        return sum(
            count * t.itemsize * lower_bound_elements(t.src, t.dst, t.shape)
            for t, count in Counter(self.tensors).items()
        )

    def messages(self) -> dict[tuple[int, int], int]:
        """Bytes of the one message from each sender to each receiver, collectives left out."""
        total: Counter[tuple[int, int]] = Counter()
        for tensor, strides in zip(self.tensors, self.strides, strict=True):
            for stride in strides:
                for move in stride.moves:
                    total[move.sender, move.receiver] += move.size * tensor.itemsize
        return dict(sorted(total.items()))


def reshard(
    src: Layout, dst: Layout, shape: Sequence[int], itemsize: int, cluster: Cluster | None = None
) -> Reshard:
    """Resolves the change of one array from a layout to another.

    Args:
      src: where its pieces are.
      dst: where they shall be.
      shape: of the whole array.
      itemsize: bytes of an element.
      cluster: the machines; senders on the same host are preferred, and ports are weighed by
        their bandwidth. None counts bytes per device.

    Raises:
      SpecError: a layout does not fit the shape or the cluster.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> resolved = reshard(
    ...     layout_from_text("[0,1]{split0:2} + [2]{} across partial"),
    ...     layout_from_text("[0,1]{split0:2} + [2]{} across dup"), (8, 4), 4)
    >>> [(c.kind, c.groups, c.num_bytes) for c in resolved.communications]
    [('split-all-reduce', ((0, 2), (1, 2)), 256)]
    >>> resolved.total_bytes == resolved.lower_bound_bytes
    True
    """
    return fuse([Tensor(src, dst, tuple(shape), itemsize)], cluster)


def fuse(tensors: Iterable[Tensor], cluster: Cluster | None = None) -> Reshard:
    """Resolves the change of several arrays at once.

    Equal arrays in equal layouts are resolved once and share their senders.

    Raises:
      SpecError: a layout does not fit its shape or the cluster.
    """
    listed = tuple(tensors)
    counts = Counter(listed)
    for tensor in counts:
        _require_devices(tensor, cluster)
        if tensor.itemsize < 1:
            raise SpecError(
                f"itemsize is {tensor.itemsize}; write the bytes of an element, 1 or more"
            )
    chains = {tensor: chain(tensor.src, tensor.dst, tensor.shape) for tensor in counts}
    done: dict[Tensor, list[Stride]] = {tensor: [] for tensor in counts}
    busiest = bound = 0.0
    for phase in range(max(map(len, chains.values()), default=0)):
        running = [t for t in counts if phase < len(chains[t])]
        wanted = {
            t: chains[t][phase].demands(t.shape) for t in running if _is_sent(chains[t][phase])
        }
        routing = route(
            [d for of_tensor in wanted.values() for d in of_tensor],
            [d.size * t.itemsize * counts[t] for t, of_tensor in wanted.items() for d in of_tensor],
            cluster,
        )
        busiest, bound = busiest + routing.busiest_s, bound + routing.bound_s
        shares = iter(routing.shares)
        for t in running:
            step = chains[t][phase]
            moves = tuple(
                move for demand in wanted.get(t, ()) for move in moves_of(demand, next(shares))
            )
            done[t].append(Stride(step, moves, _name(step, moves, t.shape, t.itemsize)))
    return Reshard(listed, tuple(tuple(done[t]) for t in listed), busiest, bound)


def _is_sent(step: Step) -> bool:
    """Whether a step is slices from device to device, rather than a reducing collective."""
    return step.adds not in ("groups", "terms")


def _require_devices(tensor: Tensor, cluster: Cluster | None) -> None:
    if cluster is None:
        return
    for what, layout in (("source", tensor.src), ("destination", tensor.dst)):
        unknown = [d for d in layout.devices if d >= cluster.num_devices]
        if unknown:
            raise SpecError(
                f"the {what}, {layout}, is on device {unknown[0]}, but cluster "
                f'"{cluster.name}" has devices 0 to {cluster.num_devices - 1}'
            )


def _name(
    step: Step, moves: Sequence[Move], shape: Shape, itemsize: int
) -> tuple[Communication, ...]:
    if step.adds == "groups":
        return (_split_all_reduce(step, shape, itemsize),)
    if step.adds == "all":
        return (_adding_where_wanted(step, moves, shape, itemsize),)
    if step.is_in_groups:
        return _in_groups(step, moves, shape, itemsize)
    if not moves:
        everyone = tuple(group.devices for group in step.after.groups)
        return (Communication("local slice", "top", everyone),)
    pairs = tuple(dict.fromkeys((m.sender, m.receiver) for m in moves))
    before, after = step.before, step.after
    same_devices = [g.devices for g in before.groups] == [g.devices for g in after.groups]
    same_entries = [g.entries for g in before.groups] == [g.entries for g in after.groups]
    if same_entries and before.across == after.across and not same_devices:
        return (_sends("send-recv", "bottom", pairs, moves, itemsize),)
    gathers = isinstance(before.across, SplitAcross) and after.across == "dup"
    if same_devices and same_entries and gathers:
        groups = _shared(step, shape)
        return (_sends("split-all-gather", "top", groups, moves, itemsize),)
    tier: Tier = (
        "bottom"
        if before.across == after.across and len(before.groups) == len(after.groups)
        else "top"
    )
    return (_sends("batched send-receive", tier, pairs, moves, itemsize),)


def _in_groups(
    step: Step, moves: Sequence[Move], shape: Shape, itemsize: int
) -> tuple[Communication, ...]:
    out: list[Communication] = []
    pieces = step.before.pieces(shape)
    for number, (before, after) in enumerate(
        zip(step.before.groups, step.after.groups, strict=True)
    ):
        if before == after:
            continue
        if step.adds == "terms":
            size = math.prod(pieces[number][0].shape)
            out += _reducing(before, after, size, itemsize)
            continue
        inside = set(before.devices)
        mine = [m for m in moves if m.receiver in inside]
        if not mine:
            if not _only_renamed(before, after, step, number, shape):
                out.append(Communication("local slice", "bottom", (before.devices,)))
            continue
        out.append(_moving(before, after, mine, itemsize))
    return tuple(out)


def _only_renamed(before: Group, after: Group, step: Step, number: int, shape: Shape) -> bool:
    region = step.before.region(number, shape)
    return before.pieces(shape, region) == after.pieces(shape, region)


def _reducing(before: Group, after: Group, size: int, itemsize: int) -> list[Communication]:
    by_kind: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    taken: dict[str, Counter[int]] = defaultdict(Counter)
    for kind, devices, elements in reductions(before, after, size):
        by_kind[kind].append(devices)
        taken[kind].update(dict(zip(devices, elements, strict=True)))
    out = []
    for kind, groups in by_kind.items():
        named: Kind = "all-reduce" if kind == "all-reduce" else "reduce-scatter"
        received = tuple(sorted((device, n * itemsize) for device, n in taken[kind].items()))
        # In a ring each member sends on what its neighbour takes.
        passed = {d: taken[kind][g[(i + 1) % len(g)]] for g in groups for i, d in enumerate(g)}
        sent = tuple(sorted((device, n * itemsize) for device, n in passed.items()))
        out.append(Communication(named, "bottom", tuple(groups), sent, received))
    return out


def _moving(before: Group, after: Group, moves: Sequence[Move], itemsize: int) -> Communication:
    """A group's change that only moves slices: the collective that it is, if it is one."""
    pairs = common_axes(before.entries, after.entries)
    changed = [] if pairs is None else [i for i, (a, b) in enumerate(pairs) if a != b]
    crossing = [i for i in changed if pairs is not None and isinstance(pairs[i][0], Split)]
    if pairs is not None and crossing:
        groups = along(before.devices, [a.parts for a, _ in pairs], crossing)
        home = {device: k for k, group in enumerate(groups) for device in group}
        if all(home[m.sender] == home[m.receiver] for m in moves):
            turned = [pairs[i][1] for i in crossing]
            if all(isinstance(entry, Replicate) for entry in turned):
                return _sends("all-gather", "bottom", groups, moves, itemsize)
            if all(isinstance(entry, Split) for entry in turned):
                return _sends("all-to-all", "bottom", groups, moves, itemsize)
    sends = tuple(dict.fromkeys((m.sender, m.receiver) for m in moves))
    return _sends("batched send-receive", "bottom", sends, moves, itemsize)


def _sends(
    kind: Kind,
    tier: Tier,
    groups: Sequence[tuple[int, ...]],
    moves: Sequence[Move],
    itemsize: int,
) -> Communication:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for move in moves:
        sent[move.sender] += move.size * itemsize
        received[move.receiver] += move.size * itemsize
    return Communication(
        kind, tier, tuple(groups), tuple(sorted(sent.items())), tuple(sorted(received.items()))
    )


def _split_all_reduce(step: Step, shape: Shape, itemsize: int) -> Communication:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    groups = []
    for cell, collectives in meeting(step, shape):
        size = math.prod(stop - start for start, stop in cell)
        for devices in collectives:
            groups.append(devices)
            gives, takes = ring_all_reduce(size, len(devices))
            for device, give, take in zip(devices, gives, takes, strict=True):
                sent[device] += give * itemsize
                received[device] += take * itemsize
    return Communication(
        "split-all-reduce",
        "top",
        tuple(dict.fromkeys(groups)),
        tuple(sorted(sent.items())),
        tuple(sorted(received.items())),
    )


def _adding_where_wanted(
    step: Step, moves: Sequence[Move], shape: Shape, itemsize: int
) -> Communication:
    before, after = step.before, step.after
    same_groups = [g.devices for g in before.groups] == [g.devices for g in after.groups]
    if same_groups and all(group.terms == 1 for group in before.groups):
        groups = _shared(step, shape)
    else:
        meet: dict[int, set[int]] = defaultdict(set)
        for move in moves:
            meet[move.receiver] |= {move.sender, move.receiver}
        groups = tuple(dict.fromkeys(tuple(sorted(devices)) for devices in meet.values()))
    tier: Tier = "bottom" if len(before.groups) == len(after.groups) == 1 else "top"
    return _sends("split-reduce-scatter", tier, groups, moves, itemsize)


def _shared(step: Step, shape: Shape) -> tuple[tuple[int, ...], ...]:
    """The devices that share each finest slice of the groups, as one collective each."""
    whole = Step(Layout(step.before.groups, "dup"), Layout(step.before.groups, "dup"))
    return tuple(
        dict.fromkeys(devices for _, groups in meeting(whole, shape) for devices in groups)
    )
