"""Turns what a run left behind into one page that needs no network: `report.html`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shardpar.errors import RunError
from shardpar.run.charts import Curve, Series, chart, smooth
from shardpar.run.directory import RunDirectory
from shardpar.run.durable import write_atomically
from shardpar.run.metrics import Row, read_metrics

_WIDE_PX = (1000, 300)
_HALF_PX = (480, 230)
_NARROW_PX = (340, 220)
_LAST_ROWS = 12
_MOST_EVAL_CURVES = 3
_EVAL_SERIES: tuple[Series, ...] = (2, 3, 4)
_FINISHED = "finished"


@dataclass(frozen=True)
class Headline:
    """One of the figures that people look for first."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """One chart in the two sizes that the page chooses from; empty if there is nothing to draw."""

    title: str
    label: str
    wide: Markup
    narrow: Markup


def write_report(
    run: RunDirectory,
    *,
    title: str,
    status: str = _FINISHED,
    facts: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    sample: str | None = None,
) -> None:
    """Writes the report of a run, over an earlier one.

    The metrics, the plan and the config are read from the run's directory; what is not there
    is left out. Rows are expected to hold `loss`, `tokens_per_s`, `peak_bytes` and `mfu`;
    keys that begin with `eval_` are drawn beside the loss.

    Args:
      run: where to read and write.
      title: the heading, usually the experiment's name.
      status: how the run ended; anything but `finished` is shown as a warning.
      facts: more to say about the run, such as its parameters and duration.
      environment: versions and devices, see `describe_environment`.
      sample: text that the model made.

    Raises:
      RunError: the metrics are malformed, or the page cannot be written.
    """
    page = render_report(
        read_metrics(run.metrics),
        title=title,
        path=str(run.path),
        status=status,
        facts=facts or {},
        environment=environment or {},
        sample=sample or "",
        plan=run.plan.read_text(errors="replace") if run.plan.is_file() else "",
        config=run.config_yaml.read_text(errors="replace") if run.config_yaml.is_file() else "",
    )
    try:
        write_atomically(run.report, page.encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{run.report} cannot be written: {error.strerror}; make room") from error


def render_report(
    rows: Sequence[Row],
    *,
    title: str,
    path: str,
    status: str,
    facts: Mapping[str, str],
    environment: Mapping[str, str],
    sample: str,
    plan: str,
    config: str,
) -> str:
    """Makes the page of a report; everything in it is escaped.

    Args:
      rows: what was measured, any number of rows.
      title: the heading.
      path: where the run is.
      status: how it ended.
      facts: more to say about the run.
      environment: versions and devices.
      sample: text that the model made.
      plan: the plan's text.
      config: the resolved config's text.

    Returns:
      HTML without a single reference to anything outside itself.
    """
    templates = Environment(
        loader=PackageLoader("shardpar.run", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    last = rows[-_LAST_ROWS:]
    columns = tuple(dict.fromkeys(key for row in last for key in row if key != "nonfinite"))
    return templates.get_template("report.html.j2").render(
        title=title,
        path=path,
        status=status,
        ended_well=status == _FINISHED,
        headlines=headlines(rows),
        drawings=_drawings(rows),
        facts=facts,
        environment=environment,
        sample=sample,
        plan=plan,
        config=config,
        columns=columns,
        rows=[[_cell(row, key) for key in columns] for row in last],
        row_count=len(rows),
        version=_own_version(),
    )


def headlines(rows: Sequence[Row]) -> tuple[Headline, ...]:
    """Picks the figures that people look for first.

    Args:
      rows: what was measured, in order.

    Returns:
      Those that were measured at all.

    >>> rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None, "nonfinite": ["loss"]}]
    >>> for headline in headlines(rows): print(headline.name, headline.value, headline.note)
    Steps 2
    Loss 3.000 1 step without a finite loss, first step 2
    """
    if not rows:
        return ()
    found = [Headline("Steps", f"{max(row['step'] for row in rows):,}")]
    losses = _values(rows, "loss")
    odd = [row["step"] for row in rows if "loss" in row.get("nonfinite", ())]
    if losses or odd:
        steps = "step" if len(odd) == 1 else "steps"
        note = f"{len(odd)} {steps} without a finite loss, first step {odd[0]}" if odd else ""
        recent = statistics.fmean(losses[-5:]) if losses else math.nan
        found.append(Headline("Loss", f"{recent:.3f}" if losses else "n/a", note or _last(losses)))
    for key in _eval_keys(rows)[:1]:
        points = [(value, step) for step, value in _points(rows, key) if math.isfinite(value)]
        if points:
            best, step = min(points)
            found.append(Headline(_title(key), f"{best:.3f}", f"lowest, at step {step:,}"))
    if speeds := _values(rows, "tokens_per_s"):
        found.append(Headline("Tokens per second", f"{statistics.median(speeds):,.0f}", "median"))
    if shares := _values(rows, "mfu"):
        found.append(Headline("MFU", f"{statistics.median(shares):.1%}", "median"))
    elif any("mfu" in row for row in rows):
        found.append(Headline("MFU", "n/a", "the device's peak is not known"))
    if peaks := _values(rows, "peak_bytes"):
        found.append(Headline("Memory", f"{max(peaks) / 2**30:.2f} GiB", "peak"))
    return tuple(found)


def _drawings(rows: Sequence[Row]) -> tuple[Drawing, ...]:
    evals = _eval_keys(rows)[:_MOST_EVAL_CURVES]
    losses = [key for key in evals if key.endswith("loss")]
    curves = _noisy("train", _points(rows, "loss"), 1)
    curves += [
        Curve(_title(key).lower(), _points(rows, key), series, "dots")
        for key, series in zip(losses, _EVAL_SERIES, strict=False)
    ]
    memory = [(step, value / 2**30) for step, value in _points(rows, "peak_bytes")]
    speed = _noisy("", _points(rows, "tokens_per_s"), 3)
    # A score has another scale than a loss, so each gets a chart of its own.
    scores = [
        _drawing(_title(key), [Curve("", _points(rows, key), 2, "dots")], wide_px=_HALF_PX)
        for key in evals
        if key not in losses
    ]
    return (
        _drawing("Loss", curves, wide_px=_WIDE_PX),
        *scores,
        _drawing("Tokens per second", speed, wide_px=_HALF_PX, number=_short, from_zero=True),
        _drawing(
            "Peak memory per device, GiB", [Curve("", memory, 4)], wide_px=_HALF_PX, from_zero=True
        ),
    )


def _noisy(name: str, points: Sequence[tuple[int, float]], series: Series) -> list[Curve]:
    return [Curve("", points, series, "faint"), Curve(name, smooth(points), series)]


def _drawing(
    title: str,
    curves: Sequence[Curve],
    *,
    wide_px: tuple[int, int],
    number: Callable[[float], str] = "{:g}".format,
    from_zero: bool = False,
) -> Drawing:
    wide, narrow = (
        Markup(chart(curves, size_px=size, number=number, from_zero=from_zero))
        for size in (wide_px, _NARROW_PX)
    )
    values = [value for _, value in curves[-1].points if math.isfinite(value)]
    label = f"{title} over training steps"
    if values:
        label += f", from {values[0]:.4g} to {values[-1]:.4g}"
    return Drawing(title, label, wide, narrow)


def _points(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    """A key's values where it was measured; NaN where it was not finite."""
    return [
        (row["step"], math.nan if row[key] is None else float(row[key]))
        for row in rows
        if key in row and (row[key] is None or isinstance(row[key], int | float))
    ]


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [value for _, value in _points(rows, key) if math.isfinite(value)]


def _eval_keys(rows: Sequence[Row]) -> list[str]:
    # The loss first: it shares its scale with the training loss.
    keys = {key for row in rows for key in row if key.startswith("eval_")}
    return sorted(keys, key=lambda key: (key != "eval_loss", key))


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _last(losses: Sequence[float]) -> str:
    return f"mean of the last {min(5, len(losses))}" if len(losses) > 1 else ""


def _cell(row: Row, key: str) -> str:
    if key not in row:
        return ""
    value = row[key]
    if value is None:
        return "not finite" if key in row.get("nonfinite", ()) else "n/a"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _short(value: float) -> str:
    """Prints a large number for an axis.

    >>> _short(0), _short(950), _short(12_000), _short(2.5e6)
    ('0', '950', '12k', '2.5M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _own_version() -> str:
    try:
        return version("shardpar")
    except PackageNotFoundError:
        return "(not installed)"
