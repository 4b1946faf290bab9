"""Decides which text a run learns from, and where its training part ends.

A corpus is the documents' UTF-8 bytes back to back plus where each one ends, so a few
hundred megabytes of text cost that many bytes of memory and no more.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shardpar.errors import DataError
from shardpar.train.options import DataOptions

_READ_BYTES = 1 << 24
_PIECE_BYTES = 1 << 16

# A byte-level BPE splits words here anyway, so cutting a long text before this blank
# changes no token.
_WHOLE_WORDS = re.compile(r".*\S(?=[ \n]\S)", re.DOTALL)

_FOREIGN_FILES = {
    b"\x1f\x8b": "it is gzip-compressed; unpack it first",
    b"PK\x03\x04": "it is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "it is zstd-compressed; unpack it first",
    b"PAR1": "it is a Parquet file; write data.source=parquet",
    b"\xff\xfe": "it looks like UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "it looks like UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents in a fixed order.

    Attributes:
      name: what to call it in logs: "pydoc", or the path as the user wrote it.
      files: the files it was read from, sorted; none for "pydoc".
      utf8: uint8, read-only: the text of all documents back to back.
      ends: int64: where each document ends in `utf8`; strictly increasing.

    >>> corpus = Corpus.of(["no man", "is an island"])
    >>> list(corpus.documents()), corpus.text
    (['no man', 'is an island'], 'no manis an island')
    """

    name: str
    files: tuple[str, ...]
    utf8: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, documents: list[str], name: str = "text") -> Corpus:
        """A corpus of texts already in memory; empty ones are left out."""
        gathered = _Gathered()
        for document in documents:
            gathered.add(document.encode())
        return gathered.corpus(name, ())

    @property
    def text(self) -> str:
        """Everything as one string, for corpora small enough to print."""
        return self.utf8.tobytes().decode()

    def documents(self) -> Iterator[str]:
        """Each document's text, in order."""
        for begin, end in pairwise([0, *self.ends.tolist()]):
            yield self.utf8[begin:end].tobytes().decode()

    def pieces(self, limit: int = _PIECE_BYTES) -> Iterator[tuple[str, bool]]:
        """The documents in pieces short enough to tokenize one by one.

        Args:
          limit: the most bytes in a piece, at least 4.

        Yields:
          A piece of text, and whether it is the last of its document. A document is cut
          between two words where it has words, and never inside a character.

        >>> list(Corpus.of(["no man is", "an island"]).pieces(limit=8))
        [('no man', False), (' is', True), ('an', False), (' island', True)]
        """
        for begin, end in pairwise([0, *self.ends.tolist()]):
            while end - begin > limit:
                cut = _character_start(self.utf8, begin + limit)
                piece = self.utf8[begin:cut].tobytes().decode()
                if words := _WHOLE_WORDS.match(piece):
                    piece = words[0]
                yield piece, False
                begin += len(piece.encode())
            yield self.utf8[begin:end].tobytes().decode(), True

    def split(self, eval_fraction: float) -> tuple[Corpus, Corpus]:
        """Cuts off the end for evaluation; the two parts share no byte.

        Args:
          eval_fraction: share of the bytes that the second part gets, up to one character;
            the document the cut falls into goes partly to each.

        Returns:
          The training part and the evaluation part, views of the same memory.

        >>> train, evaluation = Corpus.of(["abcdef", "gh", "ij"]).split(0.3)
        >>> list(train.documents()), list(evaluation.documents())
        (['abcdef', 'g'], ['h', 'ij'])
        """
        size = self.utf8.size
        cut = _character_start(self.utf8, min(size, round(size * (1.0 - eval_fraction))))
        ends = self.ends
        head = ends[ends < cut]
        if cut:
            head = np.append(head, cut)
        return (
            Corpus(self.name, self.files, self.utf8[:cut], head),
            Corpus(self.name, self.files, self.utf8[cut:], ends[ends > cut] - cut),
        )


def read_corpus(options: DataOptions) -> Corpus:
    r"""Reads the text that `options` name; the same files give the same corpus.

    Rows whose text is the empty string hold nothing to learn and are passed over, as is a
    byte order mark; everything else is kept as it stands, line ends included.

    Args:
      options: section `data` of a config.

    Returns:
      For "pydoc" one document per help topic, for text files one per file, for JSONL and
      Parquet one per row; files in the order of their names.

    Raises:
      DataError: nothing to read, or a file or row that does not hold UTF-8 text.

    >>> read_corpus(DataOptions()).text[:24]
    'The "assert" statement\n*'
    """
    if options.source == "pydoc":
        if options.path is not None:
            raise DataError(
                f"data.path is {options.path!r}, but data.source=pydoc reads no file; "
                "write data.source=text, jsonl or parquet"
            )
        return _pydoc()
    if not options.path:
        raise DataError(
            f"data.source={options.source} reads files, but data.path is not set; "
            "write data.path=FILE or a pattern such as data.path='texts/*.txt'"
        )
    gathered = _Gathered()
    files = _matching_files(options.path, options.source)
    for path in files:
        before = gathered.size
        match options.source:
            case "text":
                gathered.add(_text_file(path))
            case "jsonl":
                for document in _jsonl_documents(path, options.field):
                    gathered.add(document)
            case "parquet":
                for document in _parquet_documents(path, options.field):
                    gathered.add(document)
        if gathered.size == before:
            raise DataError(f"{path}: it holds no text; remove the file, or correct data.path")
    return gathered.corpus(options.path, tuple(map(str, files)))


class _Gathered:
    """Documents being collected into one buffer."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends: list[int] = []

    @property
    def size(self) -> int:
        return len(self._buffer)

    def add(self, document: bytes) -> None:
        if document:
            self._buffer += document
            self._ends.append(len(self._buffer))

    def corpus(self, name: str, files: tuple[str, ...]) -> Corpus:
        utf8 = np.frombuffer(self._buffer, np.uint8)
        utf8.flags.writeable = False
        return Corpus(name, files, utf8, np.array(self._ends, np.int64))


def _character_start(utf8: np.ndarray, index: int) -> int:
    """The start of the character that byte `index` belongs to.

    >>> _character_start(np.frombuffer("aé".encode(), np.uint8), 2)
    1
    """
    first = max(0, index - 3)
    while first < index < utf8.size and utf8[index] & 0xC0 == 0x80:
        index -= 1
    return index


def _pydoc() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without the module pydoc_data.topics, the default text; "
            "write data.source=text data.path=FILE"
        ) from error
    return Corpus.of([topics[topic] for topic in sorted(topics)], name="pydoc")


def _matching_files(pattern: str, source: Literal["text", "jsonl", "parquet"]) -> list[Path]:
    written = Path(os.path.expanduser(pattern))
    try:
        if written.is_dir():
            raise DataError(
                f"data.path={pattern!r} is a directory; "
                f"write data.path='{written / ('*.' + source.replace('text', 'txt'))}'"
            )
        # A file may be called "a[1].txt", so the name as it stands goes first.
        matches = (
            [written] if written.exists() else map(Path, glob.glob(str(written), recursive=True))
        )
        files = sorted(path for path in matches if path.is_file())
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.path={pattern[:200]!r} is no path that can be looked up "
            f"({type(error).__name__}); write the path of a file"
        ) from error
    if not files:
        raise DataError(
            f"data.path={pattern[:200]!r} matches no regular file, seen from {Path.cwd()}; "
            "write the path of a file, or quote a pattern such as 'texts/**/*.txt'"
        )
    return files


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: it cannot be read ({error.strerror or _first_line(error)}); "
        "check the file and its permissions, or correct data.path"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _text_file(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    view = np.frombuffer(data, np.uint8)
    begin = 0
    while begin < view.size:
        end = _character_start(view, begin + _READ_BYTES)
        try:
            view[begin:end].tobytes().decode()
        except UnicodeDecodeError as error:
            at = begin + error.start
            raise _not_utf8(path, data[:4], data.count(b"\n", 0, at) + 1, data[at]) from error
        begin = end
    return data.removeprefix(b"\xef\xbb\xbf")


def _not_utf8(path: Path, magic: bytes, line: int, got: int) -> DataError:
    for signature, advice in _FOREIGN_FILES.items():
        if magic.startswith(signature):
            return DataError(f"{path}: it is not UTF-8 text: {advice}")
    return DataError(
        f"{path}, line {line}: it is not UTF-8 text (byte 0x{got:02x}); "
        "convert the file, for instance with `iconv -f LATIN1 -t UTF-8`"
    )


def _jsonl_documents(path: Path, field: str) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            magic = b""
            for number, line in enumerate(lines, 1):
                if number == 1:
                    magic = line[:4]
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, magic, number, line[error.start]) from error
                if text.strip():
                    yield _field_of_line(text, field, f"{path}, line {number}")
    except OSError as error:
        raise _unreadable(path, error) from error


def _field_of_line(line: str, field: str, where: str) -> bytes:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: it is not JSON (column {error.colno}: {error.msg}); "
            "JSONL has one whole JSON object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its JSON cannot be parsed ({error}); leave it out") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: an object such as {{{json.dumps(field)}: ...}} was expected, "
            f"got {_kind(row)}"
        )
    if field not in row:
        raise DataError(
            f"{where}: there is no field {field!r}; {_advice('data.field', field, list(row))}"
        )
    return _encoded(row[field], field, where)


def _encoded(value: Any, field: str, where: str) -> bytes:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {field!r} holds {_kind(value)}, text was expected; "
            "leave such rows out, or choose another data.field"
        )
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} holds half a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which is no text; correct the row"
        ) from error


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _advice(key: str, got: str, known: list[str]) -> str:
    if not known:
        return "it has none"
    near = difflib.get_close_matches(got, known, n=1)
    if near:
        return f"did you mean {key}={near[0]}?"
    return f"it has {_listed(known)}; write {key}=NAME"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _parquet_documents(path: Path, field: str) -> Iterator[bytes]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            "data.source=parquet needs pyarrow, which is not installed; "
            "run: pip install 'shardpar[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise DataError(
                    f"{path}: there is no column {field!r}; "
                    f"{_advice('data.field', field, schema.names)}"
                )
            if schema.names.count(field) > 1:
                raise DataError(
                    f"{path}: {schema.names.count(field)} columns are called {field!r}; "
                    "rename one, or choose another data.field"
                )
            kind = schema.field(field).type
            values = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if values not in (arrow.string(), arrow.large_string(), arrow.string_view()):
                raise DataError(
                    f"{path}: column {field!r} holds {kind}, text was expected; "
                    f"the columns are {_listed(schema.names)}; write data.field=NAME"
                )
            row = 0
            for batch in file.iter_batches(batch_size=4096, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    where = f"{path}, row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise DataError(
                            f"{where}: column {field!r} is not UTF-8 text "
                            f"(byte 0x{error.object[error.start]:02x}); correct the row"
                        ) from error
                    yield _encoded(text, field, where)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (arrow.ArrowException, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: it is not a readable Parquet file ({_first_line(error)}); "
            "write the file again, or correct data.source"
        ) from error
