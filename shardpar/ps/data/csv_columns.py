"""Decides which columns of a CSV or Parquet file are the label, numbers and categories."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence

from shardpar.errors import DataError
from shardpar.ps.data.delimited import Columns, Delimited
from shardpar.ps.data.options import SparseDataOptions

_NAMES_SHOWN = 50


def csv_format(first_line: bytes, options: SparseDataOptions, file: str) -> Delimited:
    """The format of a CSV file.

    Args:
      first_line: of the file: its header, or with `header=False` its first row.
      options: which columns are what.
      file: to name in errors.

    Raises:
      DataError: a column is not in the file, or none is said to be a feature.
    """
    delimiter = options.delimiter.encode()
    if len(delimiter) != 1 or options.delimiter in '"\r\n.':
        raise DataError(
            f"data.delimiter={options.delimiter!r} cannot stand between columns; "
            "write a character such as ',' or ';', or a tab"
        )
    cells = header_cells(first_line, options.delimiter)
    names = tuple(cells) if options.header else tuple(str(place) for place in range(len(cells)))
    columns = choose_columns(names, options, file)
    return Delimited(
        "csv",
        columns,
        columns.shape(options.rows, options.binary_labels),
        delimiter,
        first_line if options.header else None,
    )


def header_cells(line: bytes, delimiter: str) -> list[str]:
    """The cells of a header line; an unreadable byte becomes U+FFFD."""
    text = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").decode(errors="replace")
    try:
        return next(csv.reader([text], delimiter=delimiter), [""])
    except csv.Error:
        return text.split(delimiter)


def choose_columns(names: Sequence[str], options: SparseDataOptions, file: str) -> Columns:
    """Finds the columns that the options name.

    Raises:
      DataError: as for `csv_format`.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{file}: column {twice[0]!r} is there more than once; rename one of them")
    wanted = [options.label, *options.categorical, *options.numeric]
    for name in wanted:
        if name not in names:
            raise DataError(_unknown(name, names, options, file))
    repeated = sorted({name for name in wanted if wanted.count(name) > 1})
    if repeated:
        raise DataError(
            f"{file}: column {repeated[0]!r} is named twice in data.label, data.categorical and "
            "data.numeric; name it once"
        )
    if not options.categorical and not options.numeric:
        raise DataError(
            f"{file}: no column is said to be a feature; write data.categorical=[…] or "
            f"data.numeric=[…]. The file has {_listed(names)}"
        )
    place = {name: index for index, name in enumerate(names)}
    return Columns(
        tuple(names),
        place[options.label],
        tuple(place[name] for name in options.numeric),
        tuple(place[name] for name in options.categorical),
        missing=options.missing,
    )


def _unknown(name: str, names: Sequence[str], options: SparseDataOptions, file: str) -> str:
    key = "label" if name == options.label else "categorical"
    if name in options.numeric:
        key = "numeric"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{file}: there is no column {name!r} (data.{key}){hint} the file has {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    cut = ", ".join(name[:_NAMES_SHOWN] for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return cut + (f" and {more} more" if more > 0 else "")
