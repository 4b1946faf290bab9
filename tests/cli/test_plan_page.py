"""The page of a plan: its figures against the plan's price, alone in a file, and in a browser."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from shardpar.cli.plan_page import Compiled, plan_page
from shardpar.cli.plan_page_drawings import MOST_EVENTS, priced_stages
from shardpar.cli.plan_page_layers import MOST_COLUMNS, strategy_map
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.planner.strategies import describe
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Objective, Pipeline, Plan, Stage
from shardpar.spec.select import strategies
from tests.cli.plan_pages import Page, Planned, long_pipeline, percent, planned
from tests.planner.cases import cluster_of, gpt

EVIL = (
    "</title></svg></script><script>alert(1)</script><img src=x onerror=y> {{ 7 * 7 }} & 'q' \"q\""
)
COMPILED = Compiled(
    "8 x unit", 2.0 * 2**20, 3.0 * 2**20, 4.0 * 2**20,
    (("all-reduce", 4, 12, 7 * 2**20), ("all-gather", 2, 3, 2**10)),
)  # fmt: skip


@pytest.fixture(scope="module")
def two() -> Planned:
    """Two pipelines that cut the model at different places, and use four strategies."""
    mesh = Mesh.factored(4)

    def stage(first: int, *entries: LayerStrategy) -> Stage:
        return Stage(tuple(range(first, first + 4)), mesh, entries)

    halves = (
        stage(0, LayerStrategy("embed..blocks[1]", tensor=("b",))),
        stage(
            4, LayerStrategy("blocks[2]", tensor=("a",)),
            LayerStrategy("blocks[3]..outside", fsdp=("b",), recompute="full"),
        ),
    )  # fmt: skip
    thirds = (
        stage(8, LayerStrategy("embed..blocks[0]", tensor=("b",))),
        stage(12, LayerStrategy("blocks[1]..blocks[2]", tensor=("b",))),
        stage(16, LayerStrategy("blocks[3]..outside", fsdp=("a",), tensor=("b",))),
    )
    pipelines = (Pipeline(24, 4, halves), Pipeline(16, 4, thirds))
    plan = Plan("unit", 40, pipelines, Objective(0.02, 0.015, 1.25))
    return planned(plan, gpt(), 3e7)


def test_the_headline_figures_are_the_plans(two):
    page = Page(two.page())
    assert page.tiles == {
        "Predicted step": two.cost.step_s,
        "Certified gap": two.plan.objective.gap,
        "Lower bound": 0.015,
        "Search": 1.25,
        "Bubble": two.timeline.bubble,
        "Global batch": 40,
        "Peak memory": two.cost.peak_bytes,
    }
    for text in ("25.0%", "15.00 ms", "1.25 s", "20 devices, 2 pipelines"):
        assert text in page.text


def test_a_plan_by_hand_has_no_certificate(two):
    page = Page(two._replace(plan=replace(two.plan, objective=None)).page())
    assert "Certified gap" not in page.tiles
    assert page.text.count("the plan was written by hand") == 3


def test_each_event_is_a_bar_where_it_happens(two):
    page = Page(two.page())
    drawn = page.lanes()
    places = [(p, s) for p, pl in enumerate(two.plan.pipelines) for s in range(len(pl.stages))]
    assert len(drawn) == len(places)
    for place, bars in zip(places, drawn, strict=True):
        events = [e for e in two.timeline.events if (e.pipeline, e.stage) == place]
        assert [bar.get("class") for bar in bars] == [f"bar {event.kind}" for event in events]
        for bar, event in zip(bars, events, strict=True):
            left, width = percent(bar.get("x")), percent(bar.get("width"))
            scale = 100 / two.timeline.step_s
            assert left == pytest.approx(event.start_s * scale, abs=1e-4)
            assert width == pytest.approx((event.end_s - event.start_s) * scale, abs=1e-4)
            title = bar.find("title").text
            assert title.startswith(event.kind)
            assert f"stage {place[0]}.{place[1]}:" in title
            assert event.microbatch < 0 or f"micro-batch {event.microbatch}," in title
    assert "events are merged" not in page.text


def test_the_axis_has_round_times(two):
    groups = [g for g in Page(two.page()).plot().iter("g") if "tick" in (g.get("class") or "")]
    assert 4 <= sum(g.get("class") == "tick z1" for g in groups) <= 10
    lefts = [percent(g.find("line").get("x1")) for g in groups]
    assert len(set(lefts)) == len(lefts)
    assert max(lefts) <= 100
    for left, group in zip(lefts, groups, strict=True):
        text = group.findtext("text")
        if text and text != "0":
            value, unit = text.split(" ")
            seconds = float(value) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit]
            assert left / 100 * two.timeline.step_s == pytest.approx(seconds, abs=1e-6)


def test_too_many_events_are_merged_and_the_page_says_so():
    many = long_pipeline(microbatches=256)
    page = Page(many.page())
    drawn = page.lanes()
    events = len(many.timeline.events)
    assert events > MOST_EVENTS >= sum(map(len, drawn)) > MOST_EVENTS * 0.9
    merged = 0
    for bars in drawn:
        (middle,) = [i for i, bar in enumerate(bars) if bar.get("class") == "bar merged"]
        assert 100 < middle < len(bars) - 100
        merged += int(
            re.search(r"([\d,]+) events merged", bars[middle].find("title").text)[1].replace(
                ",", ""
            )
        )
        edges = [(percent(b.get("x")), percent(b.get("width"))) for b in bars]
        for (left, width), (following, _) in itertools.pairwise(edges):
            assert left + width <= following + 2e-4
    assert merged + sum(map(len, drawn)) - len(drawn) == events
    assert f"{merged:,} of the {events:,} events are merged" in page.text


def test_memory_bars_and_figures_are_the_stages(two):
    page = Page(two.page())
    rows = page.rows("memory")
    meters = [svg for svg in page.drawings if (svg.get("aria-label") or "").startswith("stage ")]
    assert len(rows) == len(meters) == len(two.cost.stages) == 5
    over = 0
    for cells, svg, stage, limit in zip(rows, meters, two.cost.stages, two.limits, strict=True):
        numbers = [cell["value"] for cell in cells if "value" in cell]
        sizes = [stage.state_bytes, stage.saved_bytes, stage.scratch_bytes]
        assert numbers == [*sizes, stage.peak_bytes, limit]
        shown = [float(cell["text"]) for cell in cells if "value" in cell]
        assert shown == pytest.approx([n / 2**30 for n in numbers], rel=0.005, abs=5e-5)
        per_byte = percent(svg.find("line").get("x1")) / limit
        bars = svg.findall("rect")[1:]
        assert [bar.get("class") for bar in bars] == ["state", "saved", "scratch"]
        at = 0.0
        for bar, size in zip(bars, sizes, strict=True):
            assert percent(bar.get("x")) == pytest.approx(at * per_byte, abs=1e-3)
            assert percent(bar.get("width")) == pytest.approx(size * per_byte, abs=1e-3)
            at += size
        is_over = stage.peak_bytes > limit
        assert ("over by" in cells[-1]["text"]) == is_over
        over += is_over
    assert 0 < over < 5


def test_each_layer_of_each_pipeline_has_its_strategy(two):
    text = two.page()
    page = Page(text)
    legend = dict(
        re.findall(r'<dt><span class="swatch"[^>]*>(\w+)</span></dt><dd>(.*?) <small>', text)
    )
    header, *rest = page.tables["map"]
    names = [cell["text"] for cell in header[1:]]
    assert names == [layer.name for layer in two.graph.layers]
    rows = [row for row in rest if row[0]["text"].startswith("pipeline")]
    colours: dict[str, set[str]] = {}
    for pipeline, row in zip(two.plan.pipelines, rows, strict=True):
        letters = dict(zip(names, (cell["text"] for cell in row[1:]), strict=True))
        for stage in pipeline.stages:
            for name, strategy in strategies(stage, two.graph).items():
                assert legend[letters.pop(name)].startswith(describe(strategy, stage.mesh))
        assert letters == {}
        for cell in row[1:]:
            colours.setdefault(cell["text"], set()).add(cell["style"])
    assert all(len(styles) == 1 for styles in colours.values())
    assert len(set.union(*colours.values())) == len(colours) == len(legend) == 4
    # Equal degrees over different axes are different strategies, and told apart.
    assert {t for t in legend.values() if t.startswith("dp2 tp2")} == {
        "dp2 tp2 (tp over a)", "dp2 tp2 (tp over b)",
    }  # fmt: skip
    spans = [[int(c["colspan"]) for c in row[1:]] for row in rest if row[0]["text"] == "stage"]
    assert spans == [[3, 4], [2, 2, 3]]


def test_many_layers_share_columns_but_none_is_left_out():
    many = long_pipeline(microbatches=8, blocks=120)
    mapped = strategy_map(priced_stages(many.plan, many.cost), many.graph)
    assert [n for column in mapped.columns for n in column.layers] == [
        layer.name for layer in many.graph.layers
    ]
    assert len(mapped.columns) == 11 < MOST_COLUMNS
    page = Page(many.page())
    assert "The 123 layers have 11 columns" in page.text
    assert page.tables["map"][0][2]["text"] == "blocks[0:14] ×14"


def test_every_distinct_layer_price_has_a_row(two):
    page = Page(two.page())
    classes = {layer.name: layer.class_name for layer in two.graph.layers}
    wanted: Counter[tuple] = Counter()
    strategies_of: set[tuple] = set()
    for priced in priced_stages(two.plan, two.cost):
        chosen = strategies(priced.stage, two.graph)
        for name, c in priced.cost.layers:
            figures = (
                c.forward_s, c.backward_s, c.tensor_s, c.gather_s, c.sync_s, c.update_s, c.cross_s,
                c.parameter_bytes, c.gradient_bytes, c.optimizer_bytes, c.saved_bytes,
                c.scratch_bytes,
            )  # fmt: skip
            wanted[classes[name], figures] += 1
            strategies_of.add((classes[name], figures, replace(chosen[name], layers="")))
    found: Counter[tuple] = Counter()
    rows = list(zip(page.rows("seconds"), page.rows("sizes"), strict=True))
    for times, sizes in rows:
        assert [c["text"] for c in times[:3]] == [c["text"] for c in sizes[:3]]
        seconds = [c["value"] for c in times if "value" in c]
        shown = [float(c["text"].replace("<", "")) for c in times if "value" in c]
        assert shown == pytest.approx([s * 1e3 for s in seconds], rel=0.005, abs=1e-4)
        assert seconds.pop(5) == pytest.approx(sum(seconds[:5]))
        figures = (*seconds, *(c["value"] for c in sizes if "value" in c))
        found[times[1]["text"], figures] += int(times[3]["text"])
    assert found == wanted
    assert len(rows) == len(strategies_of) > len(wanted)


def test_layers_add_up_to_their_stage(two):
    rows = Page(two.page()).rows("sums")
    hidden_somewhere = False
    for row, stage, pipeline in zip(rows, two.cost.stages, [0, 0, 1, 1, 1], strict=True):
        *terms, all_s, update_s, cross_s, busy_s = [c["value"] for c in row if "value" in c]
        assert all_s == pytest.approx(sum(terms))
        count = two.plan.pipelines[pipeline].num_microbatches
        assert f"× {count}" in [cell["text"] for cell in row]
        assert busy_s == stage.step_s == pytest.approx(all_s * count + update_s + cross_s)
        hidden_somewhere |= terms[5] < 0
    assert hidden_somewhere


def test_what_was_not_compiled_is_said_to_be_unverified(two):
    page = Page(two.page())
    assert "Not verified" in page.text
    assert "--verify" in page.text
    assert "collectives" not in page.tables


def test_what_was_compiled_stands_beside_the_prediction(two):
    page = Page(two.page(COMPILED))
    assert "Not verified" not in page.text
    predicted, compiled = page.rows("compared")
    assert [c["value"] for c in predicted if "value" in c] == [4 * 2**20]
    assert [c["value"] for c in compiled if "value" in c] == [2 * 2**20, 3 * 2**20, 5 * 2**20]
    assert "20.0% below what the compiler allots" in page.text
    assert [[c["text"] for c in row] for row in page.rows("collectives")] == [
        ["all-reduce", "4", "12", "7.00 MiB"], ["all-gather", "2", "3", "1.00 KiB"],
    ]  # fmt: skip
    alone = Page(two.page(replace(COMPILED, collectives=())))
    assert "everything is on one device" in alone.text


def evil() -> tuple[Planned, Compiled]:
    layers = list(gpt().layers)
    layers[1] = replace(layers[1], name=EVIL, class_name=EVIL)
    classes = (*gpt().classes, replace(gpt().class_of(gpt().layers[1]), name=EVIL))
    graph = replace(gpt(), model=EVIL, layers=tuple(layers), classes=classes)
    entries = (LayerStrategy(EVIL), LayerStrategy("embed"), LayerStrategy("blocks[1]..outside"))
    plan = Plan(EVIL, 8, (Pipeline(8, 2, (Stage((0,), Mesh.factored(1), entries),)),))
    return planned(plan, graph), Compiled(EVIL, 1, 1, 1, ((EVIL, 1, 1, 1),))


def assert_alone(page: Page) -> None:
    """Nothing on the page is run, or fetched from elsewhere."""
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "img", "a"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "action", "data", "background", "href"}
            assert "://" not in value or EVIL in value


def test_every_name_is_escaped():
    case, compiled = evil()
    text = case.page(compiled)
    page = Page(text)
    assert_alone(page)
    assert "<script" not in text
    assert "<img" not in text
    # The heading, the map, both tables of layers with their classes, and the compiler's words.
    assert page.text.count("{{ 7 * 7 }}") >= 8
    assert sum(EVIL in value for _, a in page.tags for value in a.values()) >= 2


def test_the_page_refers_to_nothing_outside_itself(two):
    text = two.page(COMPILED)
    assert_alone(Page(text))
    for reference in ("http:", "https:", "src=", "@import", "//", "@font-face", "data:"):
        assert reference not in text
    assert set(re.findall(r"url\((.*?)\)", text)) <= {"#hatch"}


def test_what_it_shows_is_told_to_those_who_cannot_see_it(two):
    page = Page(two.page(COMPILED))
    assert {"lang": "en"} in [attributes for tag, attributes in page.tags if tag == "html"]
    for svg in page.drawings:
        assert (
            svg.get("aria-hidden")
            or svg.get("aria-label")
            or svg.find("rect").get("class") == "height"
        )
    for name, table in page.tables.items():
        head = [cell for row in table for cell in row if cell["tag"] == "th"]
        assert {cell["scope"] for cell in head} >= {"row", "col"}, name
    headings = {a["id"] for tag, a in page.tags if tag == "h2"}
    assert headings == {a["aria-labelledby"] for tag, a in page.tags if tag == "section"}
    assert "prefers-color-scheme: dark" in two.page()


def test_limits_are_one_per_stage(two):
    with pytest.raises(ValueError, match="shorter"):
        two._replace(limits=two.limits[:-1]).page()


def test_what_the_search_finds_has_a_page():
    graph, cluster = gpt(), cluster_of(8, 2, 1.2e8)
    found = search(graph, cluster, Workload(64))
    timeline = simulate(found.plan, found.cost)
    limits = (found.limit_bytes,) * len(found.cost.stages)
    page = Page(plan_page(found.plan, graph, found.cost, timeline, limits))
    assert page.tiles["Predicted step"] == found.cost.step_s
    assert sum(map(len, page.lanes())) == len(timeline.events)


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROME_PATH") or next(filter(None, map(shutil.which, names)), None)


def load(text: str, folder: Path) -> tuple[str, str]:
    """A page's DOM and what the browser's console says, loaded from a file."""
    path = folder / "plan.html"
    path.write_text(text, encoding="utf-8")
    chrome = browser()
    assert chrome is not None
    done = subprocess.run(
        [
            chrome, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


needs_browser = pytest.mark.skipif(
    browser() is None, reason="no Chromium or Chrome; install one or set CHROME_PATH"
)


@needs_browser
def test_a_browser_shows_every_event_of_a_big_plan(tmp_path):
    big = long_pipeline(microbatches=64)
    dom, console = load(big.page(COMPILED), tmp_path)
    assert console == ""
    assert len(big.timeline.events) == 8 * (2 * 64 + 1)
    assert dom.count('<rect class="bar ') == len(big.timeline.events)


@needs_browser
def test_a_browser_runs_nothing_on_a_page_with_hostile_names(tmp_path):
    case, compiled = evil()
    dom, console = load(case.page(compiled), tmp_path)
    assert console == ""
    assert "<script" not in dom
    assert "<img" not in dom


@needs_browser
def test_a_browser_would_complain_about_a_script(tmp_path, two):
    text = two.page().replace("</main>", "<script>document.title = 'run'</script></main>")
    dom, console = load(text, tmp_path)
    assert "Content Security Policy" in console
    assert "<title>run" not in dom
