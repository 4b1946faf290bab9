"""The tables of the reference that are made from the code, so that they cannot go stale.

A page holds a table between `<!-- begin NAME -->` and `<!-- end NAME -->`. After a change
of the code, `python -m tests.docs.tables` writes all of them anew.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import shardpar
from shardpar.config.bundled import bundled_models
from shardpar.config.model_source import read_model_options
from shardpar.config.schema import (
    FederatedConfig,
    NodesConfig,
    SparseConfig,
    field_hints,
    section_classes,
)
from shardpar.config.values import allowed, show
from shardpar.fl.vertical.options import LinearOptions, TreeOptions

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def tables() -> dict[Path, dict[str, str]]:
    """Every generated table, by page and name."""
    return {
        REFERENCE / "config.md": {
            f"section {name}": _section(cls) for name, cls in section_classes().items()
        },
        REFERENCE / "models.md": {
            f"options {name}": _model(path)
            for name, path in bundled_models().items()
            if read_model_options(path).trains == "plan"
        },
        REFERENCE / "tables.md": {
            f"options {name}": _model(path)
            for name, path in bundled_models().items()
            if read_model_options(path).trains in ("tables", "nodes")
        }
        | {
            f"tables {name}": _section(cls)
            for name, cls in section_classes(SparseConfig).items()
            if name != "checkpoint"
        }
        | {f"nodes {name}": _section(cls) for name, cls in section_classes(NodesConfig).items()},
        REFERENCE / "federated.md": {
            f"federation {name}": _section(cls)
            for name, cls in section_classes(FederatedConfig).items()
            if name != "checkpoint"
        },
        ROOT / "docs/howto/vertical.md": {
            "regression options": _section(LinearOptions),
            "tree options": _section(TreeOptions),
        },
        REFERENCE / "cli.md": {
            f"options {name}": _command(command) for name, command in _commands().items()
        },
        REFERENCE / "api.md": {"public names": _public_names()},
        REFERENCE / "errors.md": {"error tree": _error_tree()},
    }


def between(page: str, name: str) -> str:
    """What a page holds between the markers of a table.

    Raises:
      AssertionError: the page has no such markers.
    """
    found = re.search(rf"<!-- begin {name} -->\n(.*?)<!-- end {name} -->\n", page, re.DOTALL)
    assert found, f"there is no <!-- begin {name} --> … <!-- end {name} -->"
    return found[1]


def attribute_docs(cls: type) -> dict[str, str]:
    """The entries of a class docstring's Attributes, by name; one entry may be about several."""
    text = (cls.__doc__ or "").partition("Attributes:\n")[2]
    entries: dict[str, str] = {}
    for names, words in re.findall(
        r"^ {6}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE
    ):
        for name in names.split(", "):
            entries[name] = " ".join(words.split())
    return entries


def _section(cls: type) -> str:
    hints, words = field_hints(cls), attribute_docs(cls)
    return _table(
        ("key", "value", "default", "meaning"),
        (
            (f"`{f.name}`", allowed(hints[f.name]), f"`{show(f.default)}`", words[f.name])
            for f in dataclasses.fields(cls)
        ),
    )


def _model(path: Path) -> str:
    options = read_model_options(path)
    return _table(
        ("key", "value", "default"),
        (
            (f"`{name}`", allowed(hint), f"`{show(options.defaults[name])}`")
            for name, hint in options.hints.items()
        ),
    )


def _commands() -> dict[str, Any]:
    from typer.main import get_command

    from shardpar.cli.main import app

    def below(group: Any, words: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, command in group.commands.items():
            is_group = getattr(command, "commands", None)
            found |= below(command, f"{words}{name} ") if is_group else {f"{words}{name}": command}
        return found

    return below(get_command(app))


def _command(command: Any) -> str:
    rows = []
    for parameter in command.params:
        is_option = parameter.opts[0].startswith("-")
        name = ", ".join(parameter.opts) if is_option else parameter.metavar
        if is_option and parameter.metavar:
            name += f" {parameter.metavar}"
        default = getattr(parameter.default, "value", parameter.default)
        rows.append(
            (
                f"`{name}`",
                "" if default in (None, False) else f"`{show(default)}`",
                parameter.help or "",
            )
        )
    return _table(("argument", "default", "meaning"), rows)


def _public_names() -> str:
    return _table(
        ("name", "what it is", "lives in"),
        (
            (
                f"`shardpar.{name}`",
                getattr(shardpar, name).__doc__.strip().splitlines()[0],
                f"`{getattr(shardpar, name).__module__}`",
            )
            for name in shardpar.__all__
        ),
    )


def _error_tree() -> str:
    import inspect

    import shardpar.errors

    doc = inspect.cleandoc(shardpar.errors.__doc__ or "")
    tree = [line.strip("\n") for line in doc.splitlines() if re.match(r"\s+\S", line)]
    return "\n".join(["<!-- example -->", "```text", *(row[4:] for row in tree), "```", ""])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    head = tuple(head)
    return "".join([line(head), line("---" for _ in head), *(line(row) for row in rows)])


def write() -> None:
    """Brings every page up to date."""
    for path, named in tables().items():
        page = path.read_text()
        for name, text in named.items():
            begin, end = (f"<!-- {word} {name} -->\n" for word in ("begin", "end"))
            page = page.replace(f"{begin}{between(page, name)}{end}", f"{begin}{text}{end}")
        path.write_text(page)


if __name__ == "__main__":
    write()
