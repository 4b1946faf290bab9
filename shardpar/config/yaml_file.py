"""Reads YAML into the same bindings as gin, with lines, and decides what a scalar means.

Scalars follow YAML 1.2 with Python's number syntax: `3e-4` is a number and `no`, `on` and
`1:30` are text. PyYAML alone follows YAML 1.1, where it is the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from shardpar.config.bindings import (
    Binding,
    Document,
    DocumentBuilder,
    Include,
    Place,
    config_error,
)

_NULL, _BOOL, _INT, _FLOAT, _STR = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")
)

_DIGITS = "[0-9]+(?:_[0-9]+)*"
_SCALARS = (
    (_NULL, "~|null|Null|NULL|", "~nN"),
    (_BOOL, "true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, "[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        rf"[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?"
        rf"|[-+]?{_DIGITS}[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class Loader(yaml.SafeLoader):
    """PyYAML's loader with the scalars above."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


class Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which quotes text that `Loader` would take for something else."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Text with its line breaks escaped: PyYAML's other styles lose some of them."""
        return self.represent_scalar(_STR, text, style=None if text.isprintable() else '"')


Dumper.add_representer(str, Dumper.represent_text)
for _tag, _pattern, _first in _SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            _tag, re.compile(rf"(?:{_pattern})\Z"), [*_first, *([""] if _tag == _NULL else [])]
        )


def parse_yaml(text: str, file: str) -> Document:
    r"""Parses a YAML config without judging its keys.

    Args:
      text: what the file holds.
      file: what to call it in places and messages.

    Returns:
      Its bindings and includes. A key that is bound twice, and a value outside every section,
      are among its bindings or its `problems`.

    Raises:
      ConfigError: the text is not YAML, or not a mapping.

    >>> document = parse_yaml("optimizer:\n  learning_rate: 3e-4", "run.yaml")
    >>> [(b.name, b.value, str(b.place)) for b in document.bindings]
    [('optimizer.learning_rate', 0.0003, 'run.yaml:2')]
    """
    root = _compose(text, file)
    document = DocumentBuilder()
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == _NULL):
        return document.build()
    if not isinstance(root, yaml.MappingNode):
        raise config_error(
            [
                f"{_place(root, file)}: a config is made of sections: write `train:` and below it, "
                "indented, `steps: 100`"
            ]
        )
    reader = _NodeReader()
    sections: dict[str, Place] = {}
    for key, node, place in _items(root, file, document):
        first = sections.setdefault(key, place)
        if first is not place:
            document.object_to(
                place, f"{key} appears a second time (first in line {first.line}); join the two"
            )
        elif key == "include":
            _add_includes(document, node, place, reader)
        elif isinstance(node, yaml.MappingNode) and "." not in key:
            for inner, value, inner_place in _items(node, file, document):
                _bind(document, key, inner, value, inner_place, reader)
        elif not (isinstance(node, yaml.ScalarNode) and node.tag == _NULL and "." not in key):
            section, _, inner = key.rpartition(".")
            _bind(document, section, inner, node, place, reader)
    return document.build()


def parse_value(text: str) -> Any:
    """Reads one value as it stands in an override.

    Args:
      text: a YAML scalar, or a list such as `[1, 2]`.

    Returns:
      The plain value.

    Raises:
      ValueError: the text is no value; the message says why.

    >>> parse_value("3e-4"), parse_value("null"), parse_value("[1, no]")
    (0.0003, None, [1, 'no'])
    """
    try:
        node = yaml.compose(text, Loader=Loader)
    except Exception as error:
        raise ValueError(f"{text!r} is not a value: {_reason(error)}") from None
    return None if node is None else _NodeReader().read(node)


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=Loader)
    except Exception as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = Place(file, mark.line + 1 if mark else None)
        raise config_error([f"{place}: not YAML: {_reason(error)}"]) from None


def _reason(error: Exception) -> str:
    # Beside its own errors PyYAML lets those of `chr` and `int` through for bad escapes.
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError):
        return ", ".join(filter(None, (error.context, error.problem)))
    return str(error).partition("\n")[0]


def _place(node: yaml.Node, file: str) -> Place:
    return Place(file, node.start_mark.line + 1)


def _items(
    node: yaml.MappingNode, file: str, document: DocumentBuilder
) -> Iterator[tuple[str, yaml.Node, Place]]:
    for key, value in node.value:
        place = _place(key, file)
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            document.object_to(place, "a key must be a plain name such as `steps`")
        elif key.value == "<<":
            document.object_to(place, "`<<` is not supported; write `include: other.yaml` instead")
        else:
            yield key.value, value, place


def _bind(
    document: DocumentBuilder,
    section: str,
    key: str,
    node: yaml.Node,
    place: Place,
    reader: _NodeReader,
) -> None:
    try:
        document.bind(Binding(section, key, reader.read(node), place))
    except ValueError as error:
        document.object_to(place, f"{Binding(section, key, None, place).name}: {error}")


def _add_includes(
    document: DocumentBuilder, node: yaml.Node, place: Place, reader: _NodeReader
) -> None:
    try:
        value = reader.read(node)
    except ValueError:
        value = None
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if isinstance(path, str):
            document.include(Include(path, place))
        else:
            document.object_to(place, "include must be a path or a list of paths")


class _NodeReader:
    """Turns nodes into plain values.

    An anchor may repeat a scalar but not a container: a few lines of repeated containers
    could stand for more values than there is memory.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def read(self, node: yaml.Node) -> Any:
        """The value of a node; raises ValueError with the reason if it has none."""
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if id(node) in self._seen:
            raise ValueError("an alias may stand for a single value, not for a list or mapping")
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item) for item in node.value]
        values = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("a key inside a value must be plain text")
            values[key.value] = self.read(item)
        return values


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value.replace("_", "")
    try:
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "str":
                return node.value
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text, 16) if text.startswith("0x") else int(text)
            case "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
            case tag:
                raise ValueError(f"the tag !{tag.lstrip('!')} has no meaning here; delete it")
    except KeyError:
        raise ValueError(f"{node.value!r} is neither true nor false") from None
