"""How a resolved reshard looks: as JSON, as tables on a terminal, as a picture."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from shardpar.cli.tables import byte_text, console, print_json
from shardpar.errors import UserError
from shardpar.spec.chain import meeting
from shardpar.spec.cluster import Cluster
from shardpar.spec.exchange import Cell
from shardpar.spec.layout import Layout
from shardpar.spec.reshard import Communication, Reshard, Stride, reshard

_MOST_LINES = 24


def show(
    src: Layout,
    dst: Layout,
    shape: tuple[int, ...],
    dtype: str,
    itemsize: int,
    cluster: Cluster | None,
    *,
    out: str | None,
    json: bool,
) -> None:
    """`shardpar reshard`."""
    resolved = reshard(src, dst, shape, itemsize, cluster)
    if out is not None:
        draw(resolved, out)
    if json:
        print_json(_as_json(resolved, cluster))
        return
    screen = console()
    size = " x ".join(map(str, shape))
    screen.print(Text(f"{src}\n  to {dst}, {dtype} {size}", style="bold"))
    screen.print(_communications(resolved))
    for line in _who_sends_what(resolved):
        screen.print(line, highlight=False)
    screen.print(_summary(resolved, cluster))
    if out is not None:
        console(stderr=True).print(f"drawn in {out}", highlight=False)


def _as_json(resolved: Reshard, cluster: Cluster | None) -> dict[str, Any]:
    unit = "s" if cluster else "bytes"
    return {
        "communications": [
            {
                "kind": c.kind,
                "tier": c.tier,
                "groups": [list(group) for group in c.groups],
                "bytes": c.num_bytes,
                "sent": {str(device): n for device, n in c.sent},
                "received": {str(device): n for device, n in c.received},
            }
            for c in resolved.communications
        ],
        "bytes_sent": {str(device): n for device, n in resolved.bytes_sent.items()},
        "bytes_received": {str(device): n for device, n in resolved.bytes_received.items()},
        "total_bytes": resolved.total_bytes,
        "lower_bound_bytes": resolved.lower_bound_bytes,
        f"busiest_link_{unit}": resolved.busiest_s,
        f"busiest_link_bound_{unit}": resolved.busiest_bound_s,
    }


def _communications(resolved: Reshard) -> Table:
    table = Table()
    for name, justify in (
        ("step", "right"), ("communication", "left"), ("tier", "left"), ("devices", "left"),
        ("bytes", "right"), ("most sent", "right"), ("most received", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    numbered = [
        (str(number), c)
        for number, stride in enumerate(resolved.strides[0], 1)
        for c in stride.communications
    ] or [("", c) for c in resolved.communications]
    for number, c in numbered:
        table.add_row(
            number, c.kind, c.tier, _groups(c), byte_text(c.num_bytes), _most(c.sent),
            _most(c.received),
        )  # fmt: skip
    return table


def _groups(c: Communication) -> str:
    shown = [
        (f"{g[0]}→{g[1]}" if _is_pair(c, g) else "{" + ",".join(map(str, g)) + "}")
        for g in c.groups[:12]
    ]
    rest = len(c.groups) - len(shown)
    return " ".join(shown) + (f" and {rest} more" if rest else "")


def _is_pair(c: Communication, group: tuple[int, ...]) -> bool:
    return c.kind in ("send-recv", "batched send-receive") and len(group) == 2


def _most(amounts: tuple[tuple[int, int], ...]) -> str:
    if not amounts:
        return "-"
    device, amount = max(amounts, key=lambda pair: (pair[1], -pair[0]))
    return f"{byte_text(amount)} (device {device})"


def _who_sends_what(resolved: Reshard) -> list[str]:
    lines = []
    itemsize, shape = resolved.tensors[0].itemsize, resolved.tensors[0].shape
    for number, stride in enumerate(resolved.strides[0], 1):
        for members, slices in _collectives(stride, shape).items():
            listed = ", ".join(map(slice_text, slices[:4])) + (" …" if len(slices) > 4 else "")
            lines.append(f"step {number}:  {{{','.join(map(str, members))}}} add up {listed}")
        by_pair: dict[tuple[int, int], list[Cell]] = defaultdict(list)
        for move in stride.moves:
            by_pair[move.sender, move.receiver].append(move.cell)
        for (sender, receiver), cells in sorted(by_pair.items()):
            amount = sum(math.prod(b - a for a, b in cell) for cell in cells) * itemsize
            boxes = merged(cells)
            listed = ", ".join(map(slice_text, boxes[:4])) + (" …" if len(boxes) > 4 else "")
            lines.append(f"step {number}:  {sender} → {receiver}  {listed}  {byte_text(amount)}")
    if len(lines) > _MOST_LINES:
        rest = len(lines) - _MOST_LINES
        lines = [*lines[:_MOST_LINES], f"… and {rest} more; --json has the bytes of each device"]
    return lines


def _collectives(stride: Stride, shape: tuple[int, ...]) -> dict[tuple[int, ...], list[Cell]]:
    """The slices that devices add up together, by devices."""
    found: dict[tuple[int, ...], list[Cell]] = defaultdict(list)
    step = stride.step
    if step.adds == "groups":
        for cell, groups in meeting(step, shape):
            for devices in groups:
                found[devices].append(cell)
    elif step.adds == "terms":
        pieces = {p.device: p for of_group in step.before.pieces(shape) for p in of_group}
        for c in stride.communications:
            for devices in c.groups:
                found[devices] += itertools.product(*pieces[devices[0]].spans)
    return found


def slice_text(cell: Cell) -> str:
    """A box of the array as one writes a slice.

    >>> slice_text(((0, 4), (2, 8)))
    '[0:4, 2:8]'
    """
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in cell) + "]"


def merged(cells: list[Cell]) -> list[Cell]:
    """The same slices as fewer boxes, where some lie side by side.

    >>> merged([((0, 4), (0, 2)), ((0, 4), (2, 8)), ((4, 8), (0, 8))])
    [((0, 8), (0, 8))]
    """
    boxes = sorted(cells)
    for dim in reversed(range(len(boxes[0]) if boxes else 0)):
        out: list[Cell] = []
        for box in sorted(boxes, key=lambda b: (*b[:dim], *b[dim + 1 :], b[dim])):
            last = out[-1] if out else None
            beside = (
                last is not None
                and last[dim][1] == box[dim][0]
                and (*last[:dim], *last[dim + 1 :]) == (*box[:dim], *box[dim + 1 :])
            )
            if last is not None and beside:
                out[-1] = (*last[:dim], (last[dim][0], box[dim][1]), *last[dim + 1 :])
            else:
                out.append(box)
        boxes = out
    return sorted(boxes)


def _summary(resolved: Reshard, cluster: Cluster | None) -> Lines:
    total, bound = resolved.total_bytes, resolved.lower_bound_bytes
    ratio = f" ({total / bound:.2f}x)" if bound else ""
    lines = [f"{byte_text(total)} cross; the lower bound is {byte_text(bound)}{ratio}"]
    if resolved.busiest_s:
        if cluster:
            busy, least = f"{resolved.busiest_s:.3g} s", f"{resolved.busiest_bound_s:.3g} s"
        else:
            busy, least = byte_text(resolved.busiest_s), byte_text(resolved.busiest_bound_s)
        lines.append(f"the busiest link sends for {busy}; its lower bound is {least}")
    return Lines(*(Text(line) for line in lines))


def draw(resolved: Reshard, path: str) -> None:
    """Draws the reshard of one array.

    Raises:
      UserError: the file's name has another ending, or it cannot be written.
    """
    kinds = (".png", ".svg", ".pdf")
    if Path(path).suffix.lower() not in kinds:
        raise UserError(f"--out is {path}; give a file that ends with {', '.join(kinds)}")
    from shardpar.cli.reshard_picture import save

    try:
        save(resolved, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
