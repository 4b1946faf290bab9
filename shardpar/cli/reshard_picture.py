"""Draws a reshard: what each device has before and after each step, and what goes between them."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from shardpar.cli.reshard_views import merged, slice_text
from shardpar.cli.tables import byte_text
from shardpar.spec.chain import meeting
from shardpar.spec.exchange import Cell
from shardpar.spec.layout import Layout, Spans
from shardpar.spec.reshard import Reshard, Stride

_PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5566", "#009988",
    "#ee7733", "#332288", "#88ccee", "#999933",
)  # fmt: skip
_CARD = 1.0
_PITCH = 1.55
_BETWEEN = 4.2
_MOST_CARDS = 16


def picture(resolved: Reshard) -> Figure:
    """A figure of a reshard of one array.

    Up to 16 devices, each is a card that shows the array with its part filled in, hatched
    where it holds an addend; arrows are slices on their way. More devices are a map of the
    bytes from each sender to each receiver.
    """
    strides, shape = resolved.strides[0], resolved.tensors[0].shape
    layouts = [resolved.tensors[0].src, *(stride.step.after for stride in strides)]
    devices = sorted({d for layout in layouts for d in layout.devices})
    if len(devices) > _MOST_CARDS:
        return _map(resolved, devices)
    columns = len(layouts)
    figure = Figure(figsize=(1.2 + 2.6 * columns, 0.9 + 0.95 * len(devices)))
    axes = figure.add_subplot()
    axes.set_axis_off()
    rows = {device: -i * _PITCH for i, device in enumerate(devices)}
    for column, layout in enumerate(layouts):
        x = column * (_CARD + _BETWEEN)
        title = _folded(str(layout))
        axes.text(x + _CARD / 2, _CARD + 0.35, title, ha="center", va="bottom", fontsize=7)
        _cards(axes, layout, shape, x, rows)
    for column, stride in enumerate(strides):
        left = column * (_CARD + _BETWEEN) + _CARD
        names = dict.fromkeys(c.kind for c in stride.communications)
        middle = left + _BETWEEN / 2
        axes.text(
            middle, _CARD + 1.15, "\n".join(names), ha="center", va="bottom", fontsize=8,
            weight="bold",
        )  # fmt: skip
        _arrows(axes, stride, resolved, left, rows)
    if len(shape) > 2:
        note = "a card shows dim 0 downwards, dim 1 across, and later dims inside it"
        axes.text(0, min(rows.values()) - 0.15, note, fontsize=6, va="top", color="#555555")
    axes.set_xlim(-0.6, (columns - 1) * (_CARD + _BETWEEN) + _CARD + 0.3)
    axes.set_ylim(min(rows.values()) - 0.5, _CARD + 1.8)
    axes.set_aspect("equal")
    return figure


def save(resolved: Reshard, path: str) -> None:
    """Writes the picture; the same reshard gives the same file.

    Raises:
      OSError: it cannot be written.
    """
    dated = {"Date": None} if path.lower().endswith(".svg") else None
    with mpl.rc_context({"svg.hashsalt": "shardpar"}):
        picture(resolved).savefig(path, dpi=150, bbox_inches="tight", metadata=dated)


def _folded(text: str) -> str:
    return text.replace(" + ", "\n+ ").replace(" across ", "\nacross ")


def _colour(device: int) -> str:
    return _PALETTE[device % len(_PALETTE)]


def _cards(
    axes: Any, layout: Layout, shape: tuple[int, ...], x: float, rows: dict[int, float]
) -> None:
    for number, pieces in enumerate(layout.pieces(shape)):
        is_sum = layout.across == "partial" or layout.groups[number].terms > 1
        for piece in pieces:
            y = rows[piece.device]
            axes.add_patch(Rectangle((x, y), _CARD, _CARD, fill=False, lw=0.6, ec="#888888"))
            for low, high in piece.spans[0] if piece.spans else ((0, 1),):
                height = shape[0] if shape else 1
                for left, right in _second(piece.spans, shape):
                    axes.add_patch(
                        Rectangle(
                            (x + left * _CARD, y + _CARD * (1 - high / height)),
                            (right - left) * _CARD, _CARD * (high - low) / height,
                            fc=_colour(piece.device), ec="white", lw=0.4,
                            hatch="////" if is_sum else None, alpha=0.75,
                        )
                    )  # fmt: skip
            axes.text(
                x - 0.12, y + _CARD / 2, str(piece.device), ha="right", va="center", fontsize=9
            )


def _second(spans: tuple[Spans, ...], shape: tuple[int, ...]) -> list[tuple[float, float]]:
    """The part of a card's width that a piece fills: its second dim, and later ones inside it."""
    parts = [(0.0, 1.0)]
    for of_dim, size in zip(spans[1:], shape[1:], strict=True):
        parts = [
            (left + (right - left) * a / size, left + (right - left) * b / size)
            for left, right in parts
            for a, b in of_dim
        ]
    return parts


def _arrows(
    axes: Any, stride: Stride, resolved: Reshard, left: float, rows: dict[int, float]
) -> None:
    cells: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    amounts: dict[tuple[int, int], int] = defaultdict(int)
    for move in stride.moves:
        cells[move.sender, move.receiver].append(move.cell)
        amounts[move.sender, move.receiver] += move.size * resolved.tensors[0].itemsize
    most = max(amounts.values(), default=1)
    right = left + _BETWEEN
    for i, ((sender, receiver), amount) in enumerate(sorted(amounts.items())):
        y0, y1 = rows[sender] + _CARD / 2, rows[receiver] + _CARD / 2
        axes.add_patch(
            FancyArrowPatch(
                (left + 0.1, y0), (right - 0.35, y1), arrowstyle="-|>", mutation_scale=9,
                lw=0.6 + 1.8 * amount / most, color=_colour(sender), shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip
        boxes = merged(cells[sender, receiver])
        label = slice_text(boxes[0]) if len(boxes) == 1 else f"{len(boxes)} slices"
        along = 0.22 + 0.13 * (i % 4)
        x, y = left + along * (_BETWEEN - 0.35), y0 + along * (y1 - y0)
        axes.text(
            x, y, f"{label} {byte_text(amount)}",
            fontsize=5.5, color=_colour(sender), ha="center", va="center",
            bbox={"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.85},
        )  # fmt: skip
    for i, members in enumerate(_collectives(stride, resolved.tensors[0].shape)):
        x = left + _BETWEEN * (0.35 + 0.3 * (i % 3) / 2)
        y = sum(rows[d] for d in members) / len(members) + _CARD / 2
        for device in members:
            level = rows[device] + _CARD / 2
            axes.plot([left + 0.1, x], [level, y], color=_colour(device), lw=1.1)
            axes.plot([x, right - 0.35], [y, level], color=_colour(device), lw=1.1)
        axes.plot([x], [y], "o", ms=9, color="#222222")
        axes.text(x, y, "+", color="white", ha="center", va="center", fontsize=8)


def _collectives(stride: Stride, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    if stride.step.adds == "terms":
        return [group for c in stride.communications for group in c.groups]
    if stride.step.adds == "groups":
        return list(
            dict.fromkeys(
                devices for _, groups in meeting(stride.step, shape) for devices in groups
            )
        )
    return []


def _map(resolved: Reshard, devices: list[int]) -> Figure:
    place = {device: i for i, device in enumerate(devices)}
    grid = [[math.nan] * len(devices) for _ in devices]
    for (sender, receiver), amount in resolved.messages().items():
        grid[place[sender]][place[receiver]] = amount
    figure = Figure(figsize=(6.5, 5.5))
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="viridis", interpolation="nearest")
    axes.set_xlabel("receiver")
    axes.set_ylabel("sender")
    ticks = range(0, len(devices), max(1, len(devices) // 8))
    axes.set_xticks(list(ticks), [str(devices[i]) for i in ticks])
    axes.set_yticks(list(ticks), [str(devices[i]) for i in ticks])
    axes.set_title(f"{byte_text(resolved.total_bytes)} cross")
    figure.colorbar(image, label="bytes")
    return figure
