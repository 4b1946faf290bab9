"""What a config file says before anyone judges it: bindings, each with the place that wrote it.

gin and YAML files both become a `Document`; only `load` knows which keys exist.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardpar.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Place:
    """Where a line of configuration stands.

    Attributes:
      file: the path as one would open it from here, or `COMMAND_LINE`.
      line: counted from one; None where lines mean nothing.

    >>> str(Place("run.gin", 3)), str(Place(COMMAND_LINE))
    ('run.gin:3', 'command line')
    """

    file: str
    line: int | None = None

    @property
    def is_gin(self) -> bool:
        """Whether values are written the Python way here: None, True, False."""
        return self.file.endswith(".gin")

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Binding:
    """`section.key = value`; a value that stands outside every section has section ""."""

    section: str
    key: str
    value: Any
    place: Place

    @property
    def name(self) -> str:
        """The key as overrides and messages write it."""
        return f"{self.section}.{self.key}" if self.section else self.key


@dataclass(frozen=True)
class Include:
    """`include 'path'`, with the path as it was written."""

    path: str
    place: Place


@dataclass(frozen=True)
class MacroUse:
    """`%name` inside a value, until `resolve_macros` replaces it."""

    name: str


@dataclass(frozen=True)
class Document:
    """One parsed file.

    Attributes:
      bindings: in the order of the file; no name twice.
      includes: in the order of the file.
      macros: gin's `NAME = value`, as bindings outside every section; no name twice.
      problems: what is wrong with the file, one line each.
    """

    bindings: tuple[Binding, ...] = ()
    includes: tuple[Include, ...] = ()
    macros: tuple[Binding, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass
class DocumentBuilder:
    """Collects what a parser meets, and notices names that are bound twice."""

    _bindings: dict[str, Binding] = field(default_factory=dict)
    _macros: dict[str, Binding] = field(default_factory=dict)
    _includes: list[Include] = field(default_factory=list)
    _problems: list[str] = field(default_factory=list)

    @property
    def has_bindings(self) -> bool:
        """Whether a binding has been added."""
        return bool(self._bindings)

    def bind(self, binding: Binding) -> None:
        """Adds a binding; a second one of the same name becomes a problem."""
        self._add(self._bindings, binding)

    def define(self, macro: Binding) -> None:
        """Adds a macro; a second one of the same name becomes a problem."""
        self._add(self._macros, macro)

    def include(self, include: Include) -> None:
        """Adds an include."""
        self._includes.append(include)

    def object_to(self, place: Place, text: str) -> None:
        """Adds a problem."""
        self._problems.append(f"{place}: {text}")

    def build(self) -> Document:
        """The document so far."""
        return Document(
            tuple(self._bindings.values()),
            tuple(self._includes),
            tuple(self._macros.values()),
            tuple(self._problems),
        )

    def _add(self, table: dict[str, Binding], binding: Binding) -> None:
        first = table.setdefault(binding.name, binding)
        if first is not binding:
            self.object_to(
                binding.place,
                f"{binding.name} is set a second time (first in line {first.place.line}); "
                "keep one of the two",
            )


def config_error(problems: Iterable[str]) -> ConfigError:
    r"""One error for all problems of a config.

    Args:
      problems: one text each; characters that would break the line are escaped.

    Returns:
      The error to raise: the problems one per line, none twice.

    >>> print(config_error(["a.gin:1: first", "a.gin:2: 'x" + chr(10) + "'", "a.gin:1: first"]))
    a.gin:1: first
    a.gin:2: 'x\n'
    """
    return ConfigError("\n".join(dict.fromkeys(map(_one_line, problems))))


def _one_line(text: str) -> str:
    text = cut(text, 1000)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cut(text: str, length: int = 60) -> str:
    """A text that fits into a message.

    >>> cut("x" * 100, 8)
    'xxxxx...'
    """
    return text if len(text) <= length else f"{text[: length - 3]}..."


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a value that is no container, dict keys included.

    >>> list(leaves([1, {"a": (2,)}]))
    [1, 'a', 2]
    """
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves([*value.keys(), *value.values()])
    else:
        yield value


def resolve_macros(
    bindings: Iterable[Binding], macros: Mapping[str, Binding]
) -> tuple[list[Binding], list[str]]:
    """Replaces every `%name` by the value of the macro.

    Macros are looked up after all files are read, so a file may change a macro of a file
    that it includes.

    Args:
      bindings: what to resolve.
      macros: by name.

    Returns:
      The bindings that could be resolved, and the problems of the others.

    >>> here = Place("a.gin", 1)
    >>> width = Binding("", "WIDTH", 64, here)
    >>> resolve_macros([Binding("model", "width", MacroUse("WIDTH"), here)], {"WIDTH": width})[0]
    [Binding(section='model', key='width', value=64, place=Place(file='a.gin', line=1))]
    """
    resolved, problems = [], []
    for binding in bindings:
        try:
            value = _resolve(binding.value, macros, ())
        except (ValueError, TypeError) as error:  # TypeError: a list as a dict key
            problems.append(f"{binding.place}: {binding.name}: {error}")
        else:
            resolved.append(Binding(binding.section, binding.key, value, binding.place))
    return resolved, problems


def _resolve(value: Any, macros: Mapping[str, Binding], trail: tuple[str, ...]) -> Any:
    if isinstance(value, MacroUse):
        if value.name in trail:
            circle = " -> ".join(f"%{name}" for name in (*trail, value.name))
            raise ValueError(f"macro {circle} uses itself; give one of them a value")
        if value.name not in macros:
            near = difflib.get_close_matches(value.name, macros, n=1)
            hint = f"; did you mean %{near[0]}?" if near else f"; define it: {value.name} = ..."
            raise ValueError(f"there is no macro %{value.name}{hint}")
        return _resolve(macros[value.name].value, macros, (*trail, value.name))
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item, macros, trail) for item in value)
    if isinstance(value, dict):
        return {
            _resolve(key, macros, trail): _resolve(item, macros, trail)
            for key, item in value.items()
        }
    return value
