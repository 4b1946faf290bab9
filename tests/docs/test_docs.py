"""The documentation is run as a reader would run it, and compared with the code it is about."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import shardpar
from shardpar.cli.doctor import _RANGES
from shardpar.spec.text import PLAN_FORMAT, plan_from_text
from tests.docs.blocks import LANGUAGES, Command, Output, Reader, Script, Write, actions, blocks
from tests.docs.tables import ROOT, between, tables

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path for path in sorted(DOCS.rglob("*.md"))}
if README.is_file():
    PAGES["README.md"] = README

SLOW = {
    "README.md",
    "docs/tutorial.md",
    "docs/howto/your-own-model.md",
    "docs/howto/your-own-data.md",
    "docs/howto/resume.md",
    "docs/howto/clusters.md",
    "docs/howto/mixed-lengths.md",
    "docs/howto/embeddings.md",
    "docs/howto/federated.md",
    "docs/howto/graphs.md",
    "docs/howto/profile.md",
    "docs/howto/vertical.md",
    "docs/concepts/planning.md",
}
"""Pages that take more than about ten seconds."""

RAY = {"docs/howto/embeddings.md"}
"""Pages that start Ray, which one test does at a time."""


def runs(path: Path) -> bool:
    return any(isinstance(action, Command | Script) for action in actions(path.read_text()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name in SLOW)
            + [pytest.mark.xdist_group("ray")] * (name in RAY),
        )
        for name, path in PAGES.items()
        if runs(path)
    ],
)
def test_a_page_does_what_it_says(name, tmp_path):
    # The README shows its output without marking what differs from machine to machine.
    Reader(tmp_path, compare_output=name != "README.md").follow(PAGES[name].read_text())


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    path = PAGES[name]
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        if not found.exists() or (anchor and anchor not in anchors(found.read_text())):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_of_a_known_kind(name):
    for block in blocks(PAGES[name].read_text()):
        if name != "README.md":
            assert block.language in LANGUAGES, f"line {block.line}"
        if block.language == "yaml" and not block.marker.startswith("file: wrong"):
            document = yaml.safe_load(block.text)
            if isinstance(document, dict) and document.get("format") == PLAN_FORMAT:
                plan_from_text(block.text)


def test_every_page_is_reached_from_the_index():
    reached = re.findall(r"\]\(([^)#\s]+)", (DOCS / "index.md").read_text())
    pages = {path.resolve() for path in DOCS.rglob("*.md")} - {(DOCS / "index.md").resolve()}
    assert pages == {(DOCS / link).resolve() for link in reached if link.endswith(".md")} & pages


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, id=f"{path.stem}: {name}")
        for path, named in tables().items()
        for name in named
    ],
)
def test_a_table_says_what_the_code_says(path, name):
    text = tables()[path][name]
    hint = "bring it up to date: python -m tests.docs.tables"
    assert between(path.read_text(), name) == text, hint


def test_every_public_name_is_documented():
    reference = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    for name in shardpar.__all__:
        assert getattr(shardpar, name).__doc__, f"shardpar.{name} has no docstring"
        assert f"`shardpar.{name}`" in reference, f"shardpar.{name} is not in docs/reference"


def test_versions_are_those_of_the_package():
    page = (DOCS / "reference" / "versions.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [d for d in project["dependencies"] if re.match(r"(jax|flax)\b", d)]
    assert [f"`{d}`" in page for d in pinned] == [True, True]
    assert project["requires-python"].removeprefix(">=") in page
    for name, (low, high) in _RANGES.items():
        assert f"{name}>={low},<{high}" in pinned


def test_blocks_become_what_they_are_marked_to_be():
    page = (
        "<!-- file: a/b.yaml -->\n```yaml\nx: 1\n```\n"
        "```sh\nshardpar plan a.gin 'x=1 2'  # exits with 2\n"
        "cat > c.txt <<'EOF'\n# kept\n\nEOF\nshardpar train \\\n  --json\n```\n"
        "```text\nerror: …\n```\n<!-- example -->\n```text\nnot compared\n```\n"
        "```sh\npip install shardpar\n```\n```yaml\nfree: true\n```\n"
    )
    assert list(actions(page)) == [
        Write("a/b.yaml", "x: 1\n", 3),
        Command(("plan", "a.gin", "x=1 2"), 2, 6),
        Write("c.txt", "# kept\n\n", 7),
        Command(("train", "--json"), 0, 12),
        Output("error: …\n", 15),
    ]


def test_output_is_compared_but_for_its_numbers(tmp_path):
    page = (
        "```python\nprint('loss 2.5, 1 of 20')\nprint('┃ a │ 3.0 MiB │')\n```\n```text\n{}\n```\n"
    )
    Reader(tmp_path).follow(page.format("loss 9, 3 of 4\n┃ a │ 12 MiB"))
    Reader(tmp_path).follow(page.format("…\nloss 9, …"))
    for wrong in ("loss of 2", "┃ a │ 12 KiB", "┃ a │ 12 MiB\nloss 9, 3 of 4"):
        with pytest.raises(AssertionError, match=r"line (6|7)"):
            Reader(tmp_path).follow(page.format(wrong))


def without_blocks(page: str) -> str:
    return re.sub(r"^\s*```.*?^\s*```\s*$|`[^`\n]*`", "", page, flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The names that headings get as link targets."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
