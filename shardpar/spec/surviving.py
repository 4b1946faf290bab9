"""Which pieces of an array outlive their devices, and who sends them where they are wanted.

A reshard whose lost devices send nothing: every slice comes from a living copy, whichever
group holds it, and arrays of which some slice has none are named (HSPMD, arXiv 2504.20490).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shardpar.errors import SpecError
from shardpar.spec.chain import Step
from shardpar.spec.cluster import Cluster
from shardpar.spec.exchange import Cell, Demand, Move, demands, moves_of
from shardpar.spec.reshard import Communication, Reshard, Stride, Tensor
from shardpar.spec.routing import route


@dataclass(frozen=True)
class Survivors:
    """What can be had without some devices.

    Attributes:
      whole: numbers of the tensors that can be put together from living copies.
      reshard: of these.
      missing: for each of the others, its number and the cells that nobody has any more.
    """

    whole: tuple[int, ...]
    reshard: Reshard
    missing: tuple[tuple[int, tuple[Cell, ...]], ...]


def survivors(
    tensors: Sequence[Tensor], lost: Collection[int], cluster: Cluster | None = None
) -> Survivors:
    """Resolves the change of layouts of several arrays without the devices that are lost.

    Args:
      tensors: arrays without addends, and where they shall be.
      lost: devices whose memory is gone.
      cluster: the machines; None weighs all devices alike.

    Raises:
      SpecError: an array is a sum of addends, or shall be on a lost device.

    >>> from shardpar.spec.layout_text import layout_from_text
    >>> here = layout_from_text("[0,1]{split0:2} + [2,3]{split0:2} across dup")
    >>> tensor = Tensor(here, layout_from_text("[2,1]{split0:2}"), (4,), 4)
    >>> found = survivors([tensor], {0, 3})
    >>> found.whole, found.missing, found.reshard.total_bytes
    ((0,), (), 0)
    >>> survivors([Tensor(here, layout_from_text("[2]"), (4,), 4)], {1, 3}).missing
    ((0, (((2, 4),),)),)
    """
    gone = frozenset(lost)
    wanted: dict[Tensor, tuple[Demand, ...]] = {}
    missing: dict[Tensor, tuple[Cell, ...]] = {}
    for tensor in dict.fromkeys(tensors):
        found = _demands(tensor, gone)
        nobody = tuple(demand.cell for demand in found if not demand.owners)
        if nobody:
            missing[tensor] = nobody
        else:
            wanted[tensor] = found
    whole = tuple(i for i, tensor in enumerate(tensors) if tensor in wanted)
    counts = Counter(tensors[i] for i in whole)
    routing = route(
        [demand for found in wanted.values() for demand in found],
        [d.size * t.itemsize * counts[t] for t, found in wanted.items() for d in found],
        cluster,
    )
    shares = iter(routing.shares)
    strides: dict[Tensor, tuple[Stride, ...]] = {}
    for tensor, found in wanted.items():
        moves = tuple(move for demand in found for move in moves_of(demand, next(shares)))
        step = Step(tensor.src, tensor.dst)
        named = _named(moves, tensor.itemsize)
        strides[tensor] = (Stride(step, moves, named, by_slices=True),)
    listed = tuple(tensors[i] for i in whole)
    reshard = Reshard(listed, tuple(strides[t] for t in listed), routing.busiest_s, routing.bound_s)
    return Survivors(
        whole, reshard, tuple((i, missing[t]) for i, t in enumerate(tensors) if t in missing)
    )


def _demands(tensor: Tensor, gone: frozenset[int]) -> tuple[Demand, ...]:
    if tensor.src.across == "partial" or any(group.terms > 1 for group in tensor.src.groups):
        raise SpecError(f"{tensor.src} is a sum of addends, of which none is a copy of another")
    there = sorted(gone.intersection(tensor.dst.devices))
    if there:
        raise SpecError(
            f"{tensor.dst} is on device {there[0]}, which is lost; choose another layout"
        )
    step = Step(tensor.src, tensor.dst)
    have = [h for h in itertools.chain(*step.have(tensor.shape)) if h.device not in gone]
    want = itertools.chain(*step.want(tensor.shape))
    return demands(have, want)


def _named(moves: Sequence[Move], itemsize: int) -> tuple[Communication, ...]:
    if not moves:
        return ()
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for move in moves:
        sent[move.sender] += move.size * itemsize
        received[move.receiver] += move.size * itemsize
    pairs = tuple(dict.fromkeys((m.sender, m.receiver) for m in moves))
    amounts = tuple(sorted(sent.items())), tuple(sorted(received.items()))
    return (Communication("batched send-receive", "top", pairs, *amounts),)
