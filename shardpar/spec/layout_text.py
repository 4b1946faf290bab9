"""Layouts as one line of text that people type, and back.

layout  = group { "+" group } [ "across" across ]
group   = "[" device { "," device } "]" [ "{" [ entry { "," entry } ] "}" ]
entry   = "split" DIM ":" N | "dup" ":" N | "partial" ":" N
across  = "dup" | "partial" | "split" DIM "(" extent { "," extent } ")"
extent  = N | GROUP ":" N

Entries stand in mesh order, the last one varies fastest. Extents are in indices, one per
group in order; with `GROUP:` a group may have several. Blanks may stand between any two words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from shardpar.errors import SpecError
from shardpar.spec.layout import (
    Across,
    Block,
    Entry,
    Group,
    Layout,
    Partial,
    Replicate,
    Split,
    SplitAcross,
)

_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_]+)|(?P<number>[0-9]+)|(?P<sign>[\[\]{}(),:+]))")
_MOST_DIGITS = 9


def layout_from_text(text: str, where: str = "layout") -> Layout:
    """Reads a layout.

    Args:
      text: in the grammar above.
      where: what to call the text in errors.

    Raises:
      SpecError: with the column, what stands there, and what was expected instead.

    >>> layout = layout_from_text("[0,1]{split0:2} + [2]{} across split0(6,2)")
    >>> layout.groups[1].devices, str(layout)
    ((2,), '[0,1]{split0:2} + [2]{} across split0(6,2)')
    """
    reader = _Reader(text, where)
    try:
        return _layout(reader)
    except SpecError as error:
        # What the values themselves refuse does not say which text it was in.
        message = str(error)
        raise SpecError(message if message.startswith(where) else f"{where}: {message}") from None


@dataclass
class _Token:
    text: str
    column: int

    @property
    def is_number(self) -> bool:
        return self.text[:1].isdigit()


@dataclass
class _Reader:
    """The words of a text, one after the other."""

    text: str
    where: str
    tokens: list[_Token] = field(init=False)
    at: int = 0

    def __post_init__(self) -> None:
        self.tokens = []
        position = 0
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            if not match:
                rest = self.text[position:].lstrip()
                if not rest:
                    break
                raise self.error(_Token(rest[0], len(self.text) - len(rest)), "a layout")
            self.tokens.append(_Token(match[0].strip(), match.end() - len(match[0].strip())))
            position = match.end()
        self.tokens.append(_Token("", len(self.text)))

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def take(self) -> _Token:
        token = self.next
        self.at += 1
        return token

    def accept(self, text: str) -> bool:
        if self.next.text != text:
            return False
        self.at += 1
        return True

    def expect(self, text: str, after: str) -> None:
        if not self.accept(text):
            raise self.error(self.next, f'"{text}" after {after}')

    def number(self, what: str) -> int:
        token = self.next
        if not token.is_number:
            raise self.error(token, what)
        if len(token.text) > _MOST_DIGITS:
            raise self.error(token, f"{what} below a thousand million")
        self.at += 1
        return int(token.text)

    def error(self, token: _Token, expected: str) -> SpecError:
        got = f'"{token.text}"' if token.text else "the end"
        return SpecError(f"{self.where} column {token.column + 1}: expected {expected}, got {got}")


def _layout(reader: _Reader) -> Layout:
    groups = [_group(reader)]
    while reader.accept("+"):
        groups.append(_group(reader))
    across: Across = "dup"
    if reader.accept("across"):
        across = _across(reader)
    elif len(groups) > 1:
        raise reader.error(reader.next, '"+" or "across dup", "across partial", "across split…"')
    if reader.next.text:
        raise reader.error(reader.next, "nothing more")
    return Layout(tuple(groups), across)


def _group(reader: _Reader) -> Group:
    if not reader.accept("["):
        raise reader.error(reader.next, "a group such as [0,1]{split0:2}")
    devices = [reader.number("a device number")]
    while reader.accept(","):
        devices.append(reader.number("a device number"))
    reader.expect("]", "the devices")
    entries: list[Entry] = []
    if reader.accept("{") and not reader.accept("}"):
        entries.append(_entry(reader))
        while reader.accept(","):
            entries.append(_entry(reader))
        reader.expect("}", "the entries")
    return Group(tuple(devices), tuple(entries))


def _entry(reader: _Reader) -> Entry:
    token = reader.take()
    if token.text == "split":
        dim = reader.number('a dim after "split", such as split0:2')
        reader.expect(":", f'"split{dim}"')
        return Split(dim, reader.number("the number of parts"))
    if token.text in ("dup", "partial"):
        reader.expect(":", f'"{token.text}"')
        parts = reader.number("the number of parts")
        return Replicate(parts) if token.text == "dup" else Partial(parts)
    raise reader.error(token, "split0:2, dup:2 or partial:2")


def _across(reader: _Reader) -> Across:
    token = reader.take()
    if token.text == "dup":
        return "dup"
    if token.text == "partial":
        return "partial"
    if token.text != "split":
        raise reader.error(token, "dup, partial or split0(5,3)")
    dim = reader.number('a dim after "split", such as split0(5,3)')
    reader.expect("(", f'"split{dim}"')
    blocks = [_block(reader, 0)]
    while reader.accept(","):
        blocks.append(_block(reader, len(blocks)))
    reader.expect(")", "the extents")
    return SplitAcross(dim, tuple(blocks))


def _block(reader: _Reader, position: int) -> Block:
    first = reader.number("an extent, such as split0(5,3)")
    if reader.accept(":"):
        return Block(first, reader.number("the extent of the group"))
    return Block(position, first)
