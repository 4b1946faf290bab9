"""Decides which format the first lines of a file look like."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

_NUMBER = rb"[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?"
_SHAPES = {
    "libffm": re.compile(_NUMBER + rb"(?:\s+[0-9]+:[0-9]+:" + _NUMBER + rb")+\s*"),
    "libsvm": re.compile(
        _NUMBER + rb"(?:\s+qid:[0-9]+)?(?:\s+[0-9]+:" + _NUMBER + rb")+\s*(?:#.*)?", re.DOTALL
    ),
    "criteo": re.compile(rb"[01](?:\t-?[0-9]*){13}(?:\t[^\t]*){26}"),
    "dummy": re.compile(_NUMBER + rb"(?:[ \t]+[0-9]+)+\s*"),
}
LINES = 20


def looks_like(lines: Sequence[bytes]) -> str | None:
    """Names the format that most of the lines have; None if that is unclear.

    >>> looks_like([b"1 3:1 7:0.5"]), looks_like([b"1 0:3:1"]), looks_like([b"a,b", b"1,2"])
    ('libsvm', 'libffm', 'csv')
    """
    lines = [line for line in lines[:LINES] if len(line) < 1 << 14]
    for name, pattern in _SHAPES.items():
        if sum(bool(pattern.fullmatch(line)) for line in lines) * 2 > len(lines):
            return name
    widths = [_cells(line) for line in lines]
    if widths and widths[0] > 1 and widths.count(widths[0]) * 2 > len(lines):
        return "csv"
    return None


def _cells(line: bytes) -> int:
    try:
        return len(next(csv.reader([line.decode("latin-1")])))
    except (csv.Error, StopIteration):
        return 0


def advice(stated: str, lines: Sequence[bytes]) -> str:
    """What to write instead of the stated format; nothing if that is unclear.

    >>> advice("libsvm", [b"1 0:3:1"])
    '; the file looks like libffm: write data.format=libffm'
    """
    name = looks_like(lines)
    if name is None or name == stated:
        return ""
    return f"; the file looks like {name}: write data.format={name}"
