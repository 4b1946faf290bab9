"""Reads edge lists, plain or gzipped, a chunk at a time, and gives each node an index.

Names are sorted, so the same edges give the same graph in whatever order the lines are.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import compute

from shardpar.errors import DataError
from shardpar.ps.graph.edge_lines import (
    BadLine,
    Dialect,
    Ids,
    Parsed,
    dialect_of,
    parse,
    without_comments,
)
from shardpar.ps.graph.graph import MAX_NODES, Graph

_GZIP = b"\x1f\x8b"
_OTHERS = {b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"PAR1": "Parquet"}
_PIECE_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 1 << 20
_BAD_LINES_KEPT = 5


@dataclass(frozen=True)
class Spelling:
    """How a user writes what messages advise.

    Attributes:
      as_text: to read nodes as text.
      unweighted: to leave weights out.
      bad_share: to allow bad lines, with the share to follow.
    """

    as_text: str = "--ids string"
    unweighted: str = "--unweighted"
    bad_share: str = "--bad-share "


@dataclass(frozen=True)
class EdgeOptions:
    """How an edge list is read.

    Attributes:
      ids: "int" for nodes that are 64-bit integers, "string" for names; None decides by the
        first lines.
      weighted: the third column is the edge's weight; None decides by the first lines.
      bad_share: more lines than this share of all may not be bad, 0 to 1.
      chunk_bytes: how much is parsed at a time.
      spelling: of advice.
    """

    ids: Ids | None = None
    weighted: bool | None = None
    bad_share: float = 0.0
    chunk_bytes: int = 1 << 24
    spelling: Spelling = Spelling()


@dataclass(frozen=True)
class EdgeList:
    """A graph as it was read.

    Attributes:
      graph: its edges in file order.
      dialect: how the file is written.
      num_bad: lines that are no edges and were left out.
      bad: the first few of them.
    """

    graph: Graph
    dialect: Dialect
    num_bad: int
    bad: tuple[BadLine, ...]


def read_edges(
    path: str | Path,
    options: EdgeOptions | None = None,
    notify: Callable[[int, int], None] = lambda _done, _all: None,
) -> EdgeList:
    """Reads a file of lines `source target` or `source target weight`.

    Fields are separated by tabs, commas or spaces; empty lines, and lines that begin with # or %,
    are left out; a first line that names the columns too.

    Args:
      path: plain text or gzip, whatever its name.
      options: how to read it.
      notify: called with the bytes read so far and those of the file.

    Raises:
      DataError: with file and line: the file cannot be read, is cut off, has no edges, or more
        bad lines than `bad_share`.
    """
    options = options or EdgeOptions()
    parts: list[Parsed] = []
    bad: list[BadLine] = []
    num_bad, line = 0, 1
    dialect: Dialect | None = None
    for data in _chunks(Path(path), options.chunk_bytes, notify):
        text = without_comments(data)
        if dialect is None:
            dialect = _dialect(path, text, line, options)
        if dialect is not None:
            if dialect.header_line >= line:
                rows = text.split(b"\n", dialect.header_line - line + 1)
                rows[dialect.header_line - line] = b""
                text = b"\n".join(rows)
            found = parse(text, line, dialect)
            num_bad += len(found.bad)
            bad += found.bad[: _BAD_LINES_KEPT - len(bad)]
            if found.bad and options.bad_share == 0:
                raise DataError(_too_bad(path, bad, num_bad, None, options))
            parts.append(_encoded(found, dialect))
        line += data.count(b"\n")
    num_edges = sum(len(part.sources) for part in parts)
    if dialect is None or num_edges + num_bad == 0:
        raise DataError(f"{path}: it has no edges; write one `source target` a line")
    if num_bad > options.bad_share * (num_edges + num_bad):
        raise DataError(_too_bad(path, bad, num_bad, num_edges + num_bad, options))
    if num_edges == 0:
        raise DataError(f"{path}: none of its {num_bad} lines is an edge; {_said(path, bad[0])}")
    return EdgeList(_graph(path, parts, dialect), dialect, num_bad, tuple(bad))


def _dialect(path: Any, text: bytes, line: int, options: EdgeOptions) -> Dialect | None:
    head = text[:_HEAD_BYTES]
    if len(text) > len(head):
        head = head[: head.rfind(b"\n") + 1] or text
    dialect = dialect_of(head, ids=options.ids, weighted=options.weighted)
    if dialect is None and len(head) < len(text):
        dialect = dialect_of(text, ids=options.ids, weighted=options.weighted)
    if dialect is None:
        return None
    if dialect.columns < (3 if dialect.weighted else 2):
        wanted = "source, target and weight" if dialect.weighted else "source and target"
        raise DataError(
            f"{path}: its first lines have {dialect.columns} "
            f"field{'' if dialect.columns == 1 else 's'}; write {wanted}, separated by tabs, "
            "commas or spaces"
        )
    header = dialect.header_line + line - 1 if dialect.header_line else 0
    return replace(dialect, header_line=header)


def _said(path: Any, bad: BadLine) -> str:
    return f"{path}:{bad.line}: {bad.reason}: {bad.text!r}"


def _too_bad(
    path: Any, bad: list[BadLine], num_bad: int, num_lines: int | None, options: EdgeOptions
) -> str:
    hint, written = "", options.spelling
    if "64 bits" in bad[0].reason or "not an integer" in bad[0].reason:
        hint = f"read nodes as text with {written.as_text}, or "
    if "weight" in bad[0].reason:
        hint = f"leave weights out with {written.unweighted}, or "
    if num_lines is None:
        return (
            f"{_said(path, bad[0])}\n  mend it, {hint}leave bad lines out with "
            f"{written.bad_share}0.01"
        )
    shown = "".join(f"\n  {_said(path, line)}" for line in bad)
    return (
        f"{path}: {num_bad} of {num_lines} lines are no edges, "
        f"and {written.bad_share}{options.bad_share:g} allows "
        f"{int(options.bad_share * num_lines)}; mend them, {hint}allow more:{shown}"
    )


def _chunks(path: Path, chunk_bytes: int, notify: Callable[[int, int], None]) -> Iterator[bytes]:
    """Whole lines of about so many bytes; the last one ends with a newline too."""
    try:
        with open(path, "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            start = raw.read(6)
            raw.seek(0)
            for magic, name in _OTHERS.items():
                if start.startswith(magic):
                    raise DataError(f"{path}: this is {name}; give text, or text in gzip")
            source: Any = gzip.GzipFile(fileobj=raw) if start.startswith(_GZIP) else raw
            is_first = True
            for data in _whole_lines(path, source, chunk_bytes):
                # pyarrow drops one more mark by itself, so all go here.
                while is_first and data.startswith(b"\xef\xbb\xbf"):
                    data = data.removeprefix(b"\xef\xbb\xbf")
                is_first = False
                yield data
                notify(min(raw.tell(), size), size)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _whole_lines(path: Path, source: Any, chunk_bytes: int) -> Iterator[bytes]:
    kept: list[bytes] = []
    held = line = 0
    # The first lines decide how the file is read, whatever the chunks are.
    limit = max(chunk_bytes, _HEAD_BYTES)
    while True:
        try:
            piece = source.read1(min(_PIECE_BYTES, chunk_bytes))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            reached = 1 + line + sum(piece.count(b"\n") for piece in kept)
            said = (
                "the file is cut off: its gzip stream has no end mark"
                if isinstance(error, EOFError)
                else f"its gzip stream is damaged ({error})"
            )
            raise DataError(
                f"{path}: {said}; it could be read up to line {reached}; fetch it again"
            ) from None
        if not piece:
            break
        kept.append(piece)
        held += len(piece)
        if held < limit:
            continue
        data = b"".join(kept)
        end = data.rfind(b"\n") + 1
        line += data.count(b"\n", 0, end)
        kept, held = [data[end:]], len(data) - end
        if held > _LONGEST_LINE_BYTES:
            raise DataError(
                f"{path}:{line + 1}: a line of more than {_LONGEST_LINE_BYTES} bytes; "
                "an edge list has an edge a line"
            )
        if end:
            limit = chunk_bytes
            yield data[:end]
    rest = b"".join(kept)
    if rest:
        yield rest if rest.endswith(b"\n") else rest + b"\n"


def _encoded(found: Parsed, dialect: Dialect) -> Parsed:
    """Text becomes numbers into a dictionary at once: names are long and come again."""
    if dialect.ids == "int":
        return replace(found, bad=())
    both = arrow.concat_arrays([found.sources, found.targets]).dictionary_encode()
    half = len(found.sources)
    return Parsed(both[:half], both[half:], found.weights)


def _graph(path: Any, parts: list[Parsed], dialect: Dialect) -> Graph:
    if dialect.ids == "int":
        ends = np.concatenate([p.sources for p in parts] + [p.targets for p in parts])
        names, indices = _ranked(ends)
    else:
        ends = arrow.chunked_array([p.sources for p in parts] + [p.targets for p in parts])
        ends = ends.unify_dictionaries()
        names = ends.chunk(0).dictionary
        order = compute.sort_indices(names).to_numpy()
        rank = np.empty(len(names), np.int32)
        rank[order] = np.arange(len(names), dtype=np.int32)
        indices = rank[np.concatenate([c.indices.to_numpy() for c in ends.chunks])]
        names = names.take(arrow.array(order)).to_numpy(zero_copy_only=False)
    if len(names) > MAX_NODES:
        raise DataError(f"{path}: it has {len(names)} nodes; at most {MAX_NODES} are possible")
    half = len(indices) // 2
    weights = np.concatenate([p.weights for p in parts]) if dialect.weighted else None
    return Graph(len(names), indices[:half], indices[half:], weights, names)


def _ranked(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers, sorted, and where each is among them, int32."""
    low, high = int(ids.min()), int(ids.max())
    if high - low < 4 * len(ids) + 1024:
        # The numbers are dense: a table of those that are there is faster than any hash.
        offset = ids - low
        present = np.zeros(high - low + 1, bool)
        present[offset] = True
        rank = np.cumsum(present, dtype=np.int32) - np.int32(1)
        return np.flatnonzero(present) + low, rank[offset]
    encoded = arrow.array(ids).dictionary_encode()
    distinct = encoded.dictionary.to_numpy()
    order = np.argsort(distinct, kind="stable")
    rank = np.empty(len(distinct), np.int32)
    rank[order] = np.arange(len(distinct), dtype=np.int32)
    return distinct[order], rank[encoded.indices.to_numpy()]
