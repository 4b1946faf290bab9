"""Decides what a file is read as; the front door of the readers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardpar.errors import DataError
from shardpar.ps.data.clicks import EVAL_FROM, ClickLog
from shardpar.ps.data.criteo import criteo
from shardpar.ps.data.csv_columns import csv_format
from shardpar.ps.data.delimited import Delimited
from shardpar.ps.data.demo import demo_data
from shardpar.ps.data.dummy import Dummy
from shardpar.ps.data.feature_lists import tokenized
from shardpar.ps.data.files import DataFile, find_files, head_lines, is_text
from shardpar.ps.data.libffm import Libffm
from shardpar.ps.data.libsvm import Libsvm
from shardpar.ps.data.memory import ClickSource, MemorySource
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.parquet import open_parquet
from shardpar.ps.data.rows import RowShape
from shardpar.ps.data.sniff import LINES, advice, looks_like
from shardpar.ps.data.source import Source, TextFormat, TextSource, same_header

MOST_SLOTS = 4096
"""More features than this in one line are taken for damage unless `slots` says otherwise."""

_LINES_AT_ONCE = 512
_TOKENS = {"libffm": 3, "libsvm": 2, "dummy": 1}


def open_data(
    options: SparseDataOptions, path: str | None = None, key: str = "data.path"
) -> Source:
    """Opens a data set, looks at its first lines, and reads nothing else unless it must count.

    Args:
      options: section `data` of a config.
      path: what to read in place of `options.path`.
      key: the config's name for it, for errors.

    Raises:
      DataError: the files are missing, not text, damaged, or in another format than stated.
    """
    if options.format in ("clicks", "sklearn"):
        raise DataError(f"data.format={options.format} reads no file; open it with `open_parts`")
    path = options.path if path is None else path
    if path is None:
        raise DataError(f"{key} is missing; write {key}=FILE")
    return _open(options, find_files(path, key), (), key)


def open_parts(options: SparseDataOptions) -> tuple[Source, Source | None]:
    """Training and evaluation data of the options, with the same slots.

    Raises:
      DataError: as for `open_data`.
    """
    if options.format in ("clicks", "sklearn"):
        return _made(options)
    if options.path is None:
        raise DataError("data.path is missing; write data.path=FILE, or data.format=clicks")
    train = find_files(options.path, "data.path")
    if options.eval_path is None:
        return _open(options, train, (), "data.path"), None
    test = find_files(options.eval_path, "data.eval_path")
    source = _open(options, train, test, "data.path")
    options = replace(options, slots=source.shape.slots or None)
    return source, _open(options, test, (), "data.eval_path")


def _made(options: SparseDataOptions) -> tuple[Source, Source | None]:
    if options.format == "sklearn":
        name = options.path or "breast_cancer"
        train, test = (MemorySource(part, name) for part in demo_data(name, options.seed))
        return train, test
    if options.path or options.eval_path:
        raise DataError(
            "data.format=clicks generates a click log and reads no file; leave out data.path and "
            "data.eval_path, or write the files' format"
        )
    log = ClickLog(options.samples, options.seed)
    if not options.eval_samples:
        return ClickSource(log), None
    test = replace(log, samples=options.eval_samples, first=EVAL_FROM)
    return ClickSource(log), ClickSource(test)


def _open(
    options: SparseDataOptions,
    files: tuple[DataFile, ...],
    more: tuple[DataFile, ...],
    key: str,
) -> Source:
    parquet = [file for file in files if file.head.startswith(b"PAR1")]
    if options.format == "parquet" or (options.format == "auto" and len(parquet) == len(files)):
        return open_parquet(files, options)
    if parquet:
        raise DataError(f"{parquet[0].path} is a Parquet file; write data.format=parquet")
    for file in files:
        if not is_text(file.head):
            raise DataError(f"{file.path} is not text but binary data; is {key} the right file?")
    firsts = [head_lines(file, LINES) for file in files]
    name = options.format
    if name == "auto":
        found = looks_like(firsts[0])
        if found is None:
            raise DataError(
                f"{files[0].path} looks like no format that is known; write data.format=libsvm, "
                "dummy, libffm, criteo, csv or parquet"
            )
        name = found
    if name == "csv":
        form: TextFormat = csv_format(firsts[0][0], options, files[0].path)
    elif name == "criteo":
        form = criteo(options.rows, options.integers, options.binary_labels)
    else:
        form = _feature_list(name, options, files + more)
    header = form.header if isinstance(form, Delimited) else None
    if header is not None:
        same_header(files, [lines[0] for lines in firsts])
    for file, lines in zip(files, firsts, strict=True):
        _try(file, lines[1:] if header is not None else lines, form)
    return TextSource(files, form, header)


def _feature_list(name: str, options: SparseDataOptions, files: tuple[DataFile, ...]) -> TextFormat:
    shape = RowShape(
        slots=options.slots or 0,
        rows=options.rows,
        hashed=options.hashed,
        binary_labels=options.binary_labels,
        field_count=options.field_count,
    )

    def form(slots: int) -> TextFormat:
        wide = replace(shape, slots=slots)
        if name == "libsvm":
            return Libsvm(wide, options.zero_based)
        return Libffm(wide) if name == "libffm" else Dummy(wide)

    if options.slots is not None:
        return form(options.slots)
    # A wrong format is to be told before the whole file is counted by its rules.
    for file in files:
        _try(file, head_lines(file, LINES), form(MOST_SLOTS))
    return form(max(1, widest(files, _TOKENS[name])))


def widest(files: tuple[DataFile, ...], tokens: int) -> int:
    """The most features that a line has, counted over all lines.

    Args:
      files: of a feature list format.
      tokens: that a feature is made of.

    Raises:
      DataError: a line has more than `MOST_SLOTS`.
    """
    source = TextSource(files, Dummy(RowShape(1)))
    most = 0
    for unit in range(len(source.units)):
        for piece in source.pieces(unit, 0):
            for start in range(0, len(piece), _LINES_AT_ONCE):
                _, cut = tokenized(piece.rows[start : start + _LINES_AT_ONCE])
                row = int(np.argmax(cut.counts))
                features = (int(cut.counts[row]) - 1) // tokens
                if features > MOST_SLOTS:
                    where = source.locate(int(piece.samples[start + row]))
                    raise DataError(
                        f"{where}: it has {features} features, and data.slots is not set; if that "
                        f"is right, write data.slots={features}"
                    )
                most = max(most, features)
    return most


def _try(file: DataFile, lines: list[bytes], form: TextFormat) -> None:
    """Parses the first lines, so that a wrong format is told as one."""
    if not lines:
        raise DataError(f"{file.path} has a header and no lines; give it at least one")
    bad = form.parse(lines).bad
    if len(bad) < len(lines):
        return
    number = file.head[: file.head.find(lines[0])].count(b"\n") + 1
    raise DataError(
        f"{file.path}:{number}: this line cannot be read as {form.name}, nor can any of the first "
        f"{len(lines)}: {bad[0][1]}{advice(form.name, lines)}"
    )
