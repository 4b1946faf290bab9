"""Lines of an edge list become edges: whole chunks at once where they are clean.

A chunk that pyarrow refuses is halved until the lines at fault stand alone; those are read one by
one, and each gets its reason.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as arrow
from pyarrow import compute, csv

Ids = Literal["int", "string"]

_LEAF_BYTES = 4096
_SHOWN = 60
_INT = re.compile(rb"-?[0-9]{1,40}")
_WEIGHT = re.compile(rb"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_COMMENT = re.compile(rb"^[ \t]*[#%][^\n]*", re.MULTILINE)
_HEADERS = {
    "source", "target", "src", "dst", "dest", "from", "to", "fromnodeid", "tonodeid", "node1",
    "node2", "u", "v", "source_id", "target_id", "from_id", "to_id", "head", "tail", "start", "end",
}  # fmt: skip
_PEEKED_LINES = 200


@dataclass(frozen=True)
class Dialect:
    r"""How the lines of one file are written.

    Attributes:
      separator: b" " for any run of spaces and tabs, b"\t" or b",".
      columns: how many fields each line has, as most of the first ones do.
      weighted: the third is the edge's weight.
      ids: whether nodes are integers of 64 bits, or text.
      header_line: the line that names the columns, from 1; 0 if there is none.
    """

    separator: bytes
    columns: int
    weighted: bool
    ids: Ids
    header_line: int = 0


@dataclass(frozen=True)
class BadLine:
    """A line that is no edge: its number from 1, why, and how it begins."""

    line: int
    reason: str
    text: str


@dataclass(frozen=True)
class Parsed:
    """The edges of some lines.

    Attributes:
      sources, targets: int64[edges] or a pyarrow string array: names of nodes.
      weights: float64[edges], or None.
      bad: the lines that are no edges.
    """

    sources: Any
    targets: Any
    weights: np.ndarray | None
    bad: tuple[BadLine, ...] = ()


def without_comments(data: bytes) -> bytes:
    r"""The same lines; those that begin with # or % are blank.

    >>> without_comments(b"# by hand\n1 2\n")
    b'\n1 2\n'
    """
    return _COMMENT.sub(b"", data) if b"#" in data or b"%" in data else data


def dialect_of(
    head: bytes, *, ids: Ids | None = None, weighted: bool | None = None
) -> Dialect | None:
    r"""How a file is written, by its first lines; None if they hold no data.

    Args:
      head: whole lines, without comments.
      ids: None decides by what most lines have.
      weighted: None decides by whether most lines have a third field that is a number.

    >>> dialect_of(b"a,b,0.5\n")
    Dialect(separator=b',', columns=3, weighted=True, ids='string', header_line=0)
    """
    numbered = [(i, line.strip()) for i, line in enumerate(head.split(b"\n"), 1)]
    lines = [(i, line) for i, line in numbered if line][:_PEEKED_LINES]
    if not lines:
        return None
    separator = b" "
    for candidate in (b",", b"\t"):
        if sum(candidate in line for _, line in lines) * 2 > len(lines):
            separator = candidate
    # Where nodes are integers, any run of tabs and spaces separates as well as one tab.
    rows = [_fields(line, b" " if separator == b"\t" else separator) for _, line in lines]
    whole = [len(row) > 1 and all(_INT.fullmatch(f) for f in row[:2]) for row in rows]
    integers = sum(whole) * 2 > len(rows) or (len(rows) == 2 and whole[1])
    kind: Ids = ids or ("int" if integers else "string")
    if separator == b"\t":
        separator = b" " if kind == "int" else separator
        rows = [_fields(line, separator) for _, line in lines]
    words = [f.decode("utf-8", "replace").strip('"').lower() for f in rows[0][:2]]
    columns = Counter(map(len, rows)).most_common(1)[0][0]
    is_header = len(rows[0]) == columns and (
        all(w in _HEADERS for w in words)
        or (kind == "int" and len(rows) > 1 and whole[1] and not any(map(_INT.fullmatch, rows[0])))
    )
    body = rows[1:] if is_header and len(rows) > 1 else rows
    numbers = sum(len(row) > 2 and _weight(row[2]) is not None for row in body)
    return Dialect(
        separator,
        columns,
        columns > 2 and numbers * 2 > len(body) if weighted is None else weighted,
        kind,
        lines[0][0] if is_header else 0,
    )


def parse(data: bytes, first_line: int, dialect: Dialect) -> Parsed:
    """The edges of whole lines.

    Args:
      data: ends with a newline; comments are blank already.
      first_line: the number of its first line.
      dialect: how they are written.
    """
    text = _tidy(data, dialect)
    found = list(_halves(text, first_line, dialect))
    return _joined(found, dialect) if len(found) != 1 else found[0]


def _tidy(data: bytes, dialect: Dialect) -> bytes:
    """The same lines with one separator between fields and none around them."""
    data = data.replace(b"\r\n", b"\n")
    if dialect.separator == b" ":
        data = data.replace(b"\t", b" ")
        if b"  " in data:
            data = re.sub(rb" {2,}", b" ", data)
    elif b" " in data or (b"\t" in data and dialect.separator != b"\t"):
        blank = rb"[ \t]*" if dialect.separator == b"," else b" *"
        data = re.sub(blank + dialect.separator + blank, dialect.separator, data)
    if b" \n" in data or b"\n " in data or data.startswith(b" "):
        data = re.sub(rb"^ +| +$", b"", data, flags=re.MULTILINE)
    return data


def _halves(text: bytes, first_line: int, dialect: Dialect) -> Iterable[Parsed]:
    if not text.strip(b"\n"):
        return
    fast = _whole(text, dialect)
    if fast is not None:
        yield fast
        return
    middle = text.find(b"\n", len(text) // 2) + 1
    if len(text) <= _LEAF_BYTES or middle in (0, len(text)):
        yield _by_line(text, first_line, dialect)
        return
    yield from _halves(text[:middle], first_line, dialect)
    yield from _halves(text[middle:], first_line + text.count(b"\n", 0, middle), dialect)


def _whole(text: bytes, dialect: Dialect) -> Parsed | None:
    """All lines at once, or None if any of them might be bad."""
    if dialect.ids == "int":
        letters = b"0123456789-\n" + dialect.separator
        if dialect.columns == 2 and text.translate(None, letters):
            return None
        if dialect.columns > 2 and dialect.weighted and text.translate(None, letters + b".eE+"):
            return None
        if b"x" in text or b"X" in text:  # pyarrow would read hexadecimal numbers
            return None
    if b"\r" in text or b"\0" in text:
        return None
    names = [f"f{i}" for i in range(dialect.columns)]
    kind = arrow.int64() if dialect.ids == "int" else arrow.string()
    used = names[: 3 if dialect.weighted else 2]
    types = dict(zip(used, (kind, kind, arrow.float64()), strict=False))
    try:
        table = csv.read_csv(
            arrow.BufferReader(text),
            csv.ReadOptions(column_names=names),
            csv.ParseOptions(delimiter=dialect.separator.decode(), quote_char=False),
            csv.ConvertOptions(
                column_types=types, include_columns=used, null_values=[], strings_can_be_null=False
            ),
        )
    except (arrow.ArrowInvalid, arrow.ArrowKeyError):
        return None
    columns = [table.column(name).combine_chunks() for name in used]
    weights = columns[2].to_numpy() if dialect.weighted else None
    if weights is not None and not (np.isfinite(weights) & (weights >= 0)).all():
        return None
    if dialect.ids == "int":
        return Parsed(columns[0].to_numpy(), columns[1].to_numpy(), weights)
    if any(compute.min(compute.binary_length(c)).as_py() == 0 for c in columns[:2]):
        return None
    return Parsed(columns[0], columns[1], weights)


def _by_line(text: bytes, first_line: int, dialect: Dialect) -> Parsed:
    edges: list[tuple[Any, Any, float]] = []
    bad: list[BadLine] = []
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), first_line):
        if not line:
            continue
        edge = _edge(line, dialect)
        if isinstance(edge, str):
            shown = line.decode("utf-8", "backslashreplace")
            shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
            bad.append(BadLine(number, edge, shown))
        else:
            edges.append(edge)
    return Parsed(
        _names([e[0] for e in edges], dialect),
        _names([e[1] for e in edges], dialect),
        np.array([e[2] for e in edges], np.float64) if dialect.weighted else None,
        tuple(bad),
    )


def _edge(line: bytes, dialect: Dialect) -> tuple[Any, Any, float] | str:
    """An edge, or why the line is none."""
    fields = line.split(dialect.separator)
    if len(fields) != dialect.columns:
        count = f"{len(fields)} field{'' if len(fields) == 1 else 's'}"
        return f"it has {count}, and other lines have {dialect.columns}"
    if b"\r" in line or b"\0" in line:
        return "it has a control character"
    ends: list[Any] = []
    for field in fields[:2]:
        if dialect.ids == "string":
            try:
                ends.append(field.decode())
            except UnicodeDecodeError:
                return "a node's name is not UTF-8"
            if not field:
                return "a node has no name"
        elif not _INT.fullmatch(field):
            return "a node is not an integer, as those of other lines are"
        else:
            ends.append(int(field))
            if not -(2**63) <= ends[-1] < 2**63:
                return "a node's number does not fit in 64 bits"
    if not dialect.weighted:
        return ends[0], ends[1], 1.0
    weight = _weight(fields[2]) if len(fields) > 2 else None
    if weight is None:
        return "its weight is not a number"
    if not math.isfinite(weight):
        return "its weight is not finite"
    return (ends[0], ends[1], weight) if weight >= 0 else "its weight is negative"


def _weight(field: bytes) -> float | None:
    if _WEIGHT.fullmatch(field):
        return float(field)
    if field.lower() in (b"nan", b"inf", b"-inf", b"+inf", b"infinity"):
        return math.nan
    return None


def _fields(line: bytes, separator: bytes) -> list[bytes]:
    return line.split() if separator == b" " else [f.strip() for f in line.split(separator)]


def _names(values: list[Any], dialect: Dialect) -> Any:
    if dialect.ids == "int":
        return np.array(values, np.int64)
    return arrow.array(values, arrow.string())


def _joined(parts: list[Parsed], dialect: Dialect) -> Parsed:
    if dialect.ids == "int":
        ends = [
            np.concatenate([np.empty(0, np.int64), *(getattr(p, end) for p in parts)])
            for end in ("sources", "targets")
        ]
    else:
        ends = [
            arrow.concat_arrays(
                [arrow.array([], arrow.string()), *(getattr(p, end) for p in parts)]
            )
            for end in ("sources", "targets")
        ]
    weights = [p.weights for p in parts if p.weights is not None]
    return Parsed(
        ends[0],
        ends[1],
        np.concatenate([np.empty(0), *weights]) if dialect.weighted else None,
        tuple(line for p in parts for line in p.bad),
    )
