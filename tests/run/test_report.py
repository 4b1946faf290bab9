"""The report as a browser meets it: one page, no address to fetch, nothing of the user's run."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.signal import savgol_filter

from shardpar.run.charts import Curve, chart, smooth, thin
from shardpar.run.directory import RunDirectory
from shardpar.run.environment import describe_environment
from shardpar.run.metrics import MetricsLog
from shardpar.run.report import headlines, render_report, write_report

EVIL = (
    "</pre></script><script>alert(1)</script><img src=x onerror=y> {{ 7 * 7 }} & \u2028 'q' \"q\""
)


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def assert_alone(self) -> None:
        """Nothing on the page is fetched from elsewhere or run."""
        assert self.open == []
        for tag, attributes in self.tags:
            assert tag not in {"script", "link", "iframe", "object", "embed", "base", "img"}
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert name not in {"src", "srcset", "action", "data", "background"}
                assert "://" not in (value or "")
                if name == "href":
                    assert (value or "").startswith("#")
                for address in re.findall(r"url\(([^)]*)\)", value or ""):
                    assert address.startswith("#")


def training_rows(count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        loss = 2.0 + 3.0 / step
        row = {"step": step, "loss": loss, "tokens_per_s": 1e3 + step, "peak_bytes": 2.0**30}
        rows.append(row | {"mfu": 0.4})
        if step % 10 == 0:
            rows.append({"step": step, "eval_loss": loss + 0.1, "eval_accuracy": 0.5})
    return rows


def render(rows: list[dict[str, Any]], **texts: Any) -> Page:
    defaults: dict[str, Any] = {"title": "gpt", "path": "runs/gpt/1", "status": "finished"}
    defaults |= {"facts": {}, "environment": {}, "sample": "", "plan": "", "config": ""}
    return Page(render_report(rows, **defaults | texts))


@pytest.mark.parametrize("count", [0, 1, 2, 9, 300])
def test_any_number_of_rows_makes_a_page_that_stands_alone(count: int) -> None:
    page = render(training_rows(count))
    page.assert_alone()
    drawings = [tag for tag, _ in page.tags if tag == "svg"]
    assert len(drawings) == (0 if count == 0 else 2 * (3 if count < 10 else 4))
    assert ("Nothing was measured yet" in page.text) == (count == 0)


def test_text_of_the_run_is_shown_and_never_interpreted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.plan.write_text(EVIL + "plan")
    run.config_yaml.write_text(EVIL + "config")
    with MetricsLog(run.metrics) as log:
        log.write(1, {"loss": 2.0, EVIL: EVIL})
    write_report(
        run,
        title=EVIL + "title",
        status=EVIL + "status",
        facts={EVIL + "fact": EVIL},
        environment={EVIL + "variable": EVIL},
        sample=EVIL + "sample",
    )
    page = Page(run.report.read_text())
    page.assert_alone()
    for name in ("title", "status", "fact", "variable", "sample", "plan", "config"):
        assert EVIL + name in page.text
    policy = [attributes for _, attributes in page.tags if "http-equiv" in attributes]
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_losses_that_are_not_finite_are_counted_and_leave_a_gap() -> None:
    rows = training_rows(30)
    lost: dict[str, Any] = {"loss": None, "nonfinite": ["loss"]}
    page = render([row | lost if row["step"] in {7, 8} and "loss" in row else row for row in rows])
    page.assert_alone()
    assert "2 steps without a finite loss, first step 7" in page.text
    nothing_finite = render([{"step": step} | lost for step in range(5)])
    nothing_finite.assert_alone()
    assert "n/a" in nothing_finite.text
    assert "NaN" not in nothing_finite.text


def test_the_headlines_are_what_the_rows_say() -> None:
    found = {headline.name: headline for headline in headlines(training_rows(20))}
    assert found["Steps"].value == "20"
    assert found["Loss"].value == f"{sum(2 + 3 / step for step in range(16, 21)) / 5:.3f}"
    assert found["Eval loss"].value == "2.250"
    assert found["Eval loss"].note == "lowest, at step 20"
    assert found["Tokens per second"].value == "1,010"
    assert found["MFU"].value == "40.0%"
    assert found["Memory"].value == "1.00 GiB"
    unknown = {headline.name: headline for headline in headlines([{"step": 1, "mfu": None}])}
    assert unknown["MFU"].value == "n/a"


def test_a_run_that_did_not_finish_is_marked() -> None:
    for status, kind in (("finished", "good"), ("stopped by SIGTERM at step 7", "bad")):
        page = render([], status=status)
        assert ("span", {"class": f"status {kind}"}) in page.tags
        assert status in page.text


def test_the_environment_names_devices_and_versions() -> None:
    named = describe_environment(jax.devices())
    assert named["Devices"].startswith("8 × ")
    assert f"jax {jax.__version__}" in named["Packages"]


def test_a_curve_is_drawn_where_its_values_are() -> None:
    svg = chart([Curve("up", [(0, 0.0), (100, 10.0)])], size_px=(400, 200), number="{:g}".format)
    path = re.search(r'<path d="M ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)\s*"[^>]*series-1', svg)
    assert path is not None
    left, low, right, high = map(float, path.groups())
    assert 0 < left < right < 400
    assert 0 < high < low < 200
    assert 'viewBox="0 0 400 200"' in svg
    assert "#0" not in svg.replace("url(#", "")


def test_long_curves_are_thinned_but_keep_their_peaks() -> None:
    points = [(step, math.sin(step / 500)) for step in range(50_000)]
    points[777] = (777, 9.0)
    points[31_234] = (31_234, -9.0)
    kept = thin(points)
    assert len(kept) <= 600
    assert {(777, 9.0), (31_234, -9.0)} <= set(kept) <= set(points)
    assert list(kept) == sorted(kept)


@pytest.mark.parametrize("count", [60, 61, 400, 999])
def test_a_smoothed_curve_is_that_of_savitzky_and_golay(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    expected = savgol_filter(values, count // 20 | 1, polyorder=1, mode="interp")
    found = [value for _, value in smooth(list(enumerate(values)))]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_smoothed_curve_neither_lags_nor_bends_at_its_ends() -> None:
    line = [(step, 5.0 - 0.01 * step) for step in range(400)]
    assert smooth(line) == tuple((step, pytest.approx(value)) for step, value in line)
    assert smooth([]) == ()
    assert smooth([(1, math.nan), (2, 3.0)]) == ((2, 3.0),)
