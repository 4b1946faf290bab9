"""Draws curves as SVG that takes the colours of the page around it, by day and by night."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Matplotlib wants colours and CSS has names: each name travels as a colour that occurs
# nowhere else and is put back in the finished text.
_INKS = {"ink": "#010101", "muted": "#020202", "grid": "#030303"} | {
    f"series-{number}": f"#0{number}0404" for number in (1, 2, 3, 4)
}
_POINTS_PER_INCH = 72
_MOST_BUCKETS = 300

# Which of the page's four curve colours.
Series: TypeAlias = Literal[1, 2, 3, 4]

_FEW_POINTS = 40


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
      name: for the legend.
      points: (step, value) in order; a value that is not finite leaves a gap.
      series: which of the page's series colours it has.
      style: `faint` for raw values behind a smooth line, `dots` for few values that each count.
    """

    name: str
    points: Sequence[tuple[int, float]]
    series: Series = 1
    style: Literal["line", "faint", "dots"] = "line"


def smooth(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Averages each value with its neighbours on both sides, so that the curve does not lag.

    Args:
      points: (step, value) in order.

    Returns:
      The points with a finite value. The window is a twentieth of the curve; at its ends,
      where a mean would lag, a straight line is fitted. Short curves stay as they are.

    >>> noisy = [(step, float(step % 2)) for step in range(200)]
    >>> [(step, round(value, 1)) for step, value in smooth(noisy)[99:101]]
    [(99, 0.5), (100, 0.5)]
    """
    finite = [point for point in points if math.isfinite(point[1])]
    window = len(finite) // 20 | 1
    if window < 3:
        return tuple(finite)
    values = np.array([value for _, value in finite])
    half, places = window // 2, np.arange(window)
    first, last = (
        np.polyval(np.polyfit(places, part, 1), places)
        for part in (values[:window], values[-window:])
    )
    inner = np.convolve(values, np.full(window, 1 / window), "valid")
    means = np.concatenate([first[:half], inner, last[half + 1 :]])
    return tuple((step, float(mean)) for (step, _), mean in zip(finite, means, strict=True))


def thin(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Leaves out what no eye can see, but never a peak.

    Args:
      points: (step, value) in order, any number.

    Returns:
      Two points per bucket, its least and its greatest; short curves as they are.

    >>> curve = thin([(step, 9.0 if step == 777 else 1.0) for step in range(10_000)])
    >>> len(curve) <= 600, max(value for _, value in curve)
    (True, 9.0)
    """
    size = math.ceil(len(points) / _MOST_BUCKETS)
    if size <= 2:
        return tuple(points)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        bucket = [point for point in points[start : start + size] if math.isfinite(point[1])]
        if bucket:
            ends = {
                min(bucket, key=lambda point: point[1]),
                max(bucket, key=lambda point: point[1]),
            }
            kept += sorted(ends)
        else:
            kept.append((points[start][0], math.nan))
    return tuple(kept)


def chart(
    curves: Sequence[Curve],
    *,
    size_px: tuple[int, int],
    number: Callable[[float], str],
    from_zero: bool = False,
) -> str:
    """Draws curves over training steps.

    Args:
      curves: what to draw, the first at the back; ones without a finite value are left out.
      size_px: width and height at which text has the page's size.
      number: prints a value for the axis.
      from_zero: whether the axis begins at zero, as it should for amounts.

    Returns:
      An `<svg>` element without a single reference to anything outside; empty if there is
      nothing to draw.
    """
    visible = [curve for curve in curves if any(math.isfinite(value) for _, value in curve.points)]
    if not visible:
        return ""
    width, height = size_px
    figure = Figure(
        figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr]
    axes = figure.add_subplot()
    for curve in visible:
        _draw(axes, curve)
    _dress(axes, number, from_zero=from_zero)
    if len({curve.name for curve in visible if curve.name}) > 1:
        _legend(axes)
    buffer = io.StringIO()
    # Whether text stays text is a setting with no other way to reach it.
    # The salt keeps the names inside one drawing apart from those of the next on the page.
    salt = f"{size_px} {[curve.name for curve in visible]} {number(1.0)}"
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return _inline(buffer.getvalue())


def _draw(axes: Axes, curve: Curve) -> None:
    colour = _INKS[f"series-{curve.series}"]
    steps, values = zip(*thin(curve.points), strict=True)
    # A line through one point, or through points between gaps, would not be seen.
    marker = "o" if curve.style == "dots" or len(steps) < _FEW_POINTS else ""
    size = 5.0 if len(steps) < 3 else 2.6
    look: dict[str, Any] = {
        "line": {"linewidth": 1.6, "markersize": size},
        "faint": {"linewidth": 0.8, "alpha": 0.42, "markersize": 2.0},
        "dots": {"linewidth": 1.2, "markersize": 4.0},
    }[curve.style]
    axes.plot(steps, values, color=colour, marker=marker, label=curve.name or "_", **look)


def _dress(axes: Axes, number: Callable[[float], str], *, from_zero: bool) -> None:
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_INKS["muted"])
    axes.grid(axis="y", color=_INKS["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INKS["muted"], labelsize=10, length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_xlabel("step", color=_INKS["muted"], fontsize=10, loc="right", labelpad=1)
    axes.margins(x=0.02)
    first, last = axes.dataLim.intervalx
    if last - first < 2:
        axes.set_xlim(first - 1, last + 1)
    if from_zero:
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1e-9) * 1.05)


def _legend(axes: Axes) -> None:
    legend = axes.legend(
        loc="upper right", frameon=False, fontsize=10, handlelength=1.2, borderaxespad=0.1
    )
    for text in legend.get_texts():
        text.set_color(_INKS["ink"])


def _inline(document: str) -> str:
    svg = document[document.index("<svg") :]
    # Inside HTML the namespaces are known; without them the page holds no address at all.
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    # Groups are numbered anew in each drawing, so on one page their names would clash.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg \1aria-hidden="true"', svg, count=1)
    for name, colour in _INKS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r">\s+<", "><", svg)
