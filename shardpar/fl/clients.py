"""What a population of clients holds: rows in client order, in memory or in a folder on disk.

A folder has one `.npy` per field with the rows of all clients after each other, and `offsets.npy`
that says where each client's begin. Files are mapped, not read: a hundred thousand clients cost no
more memory than the few of a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from shardpar.errors import DataError

_OFFSETS = "offsets"


@dataclass(frozen=True, eq=False)
class ClientData:
    """The examples of all clients.

    Attributes:
      fields: by name, each [rows, ...]; client c has the rows from offsets[c] to offsets[c + 1].
      offsets: int64 [clients + 1], ascending from 0.

    >>> data = ClientData.of({"x": np.arange(5)}, [[4, 0], [], [1, 2, 3]])
    >>> data.clients, data.counts.tolist(), data.of_client(0)["x"].tolist()
    (3, [2, 0, 3], [4, 0])
    """

    fields: Mapping[str, np.ndarray]
    offsets: np.ndarray

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], parts: Sequence[Any]) -> ClientData:
        """Arrays in memory, dealt to clients.

        Args:
          arrays: by name, all with the same first dim.
          parts: for each client the rows it holds, as from `partition`.
        """
        order = np.concatenate([np.asarray(part, np.int64) for part in parts])
        offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int64)
        return cls({name: np.asarray(array)[order] for name, array in arrays.items()}, offsets)

    @classmethod
    def open(cls, folder: Path) -> ClientData:
        """Maps a folder that `write_clients` made, or another program in the same form.

        Raises:
          DataError: a file is missing or damaged, or the offsets do not fit the rows.
        """
        if not (folder / f"{_OFFSETS}.npy").is_file():
            raise DataError(
                f"{folder} is no folder of clients: it has no {_OFFSETS}.npy, which is written "
                "last; make one with shardpar.fl.clients.write_clients"
            )
        fields = {path.stem: _mapped(path) for path in sorted(folder.glob("*.npy"))}
        offsets = np.array(fields.pop(_OFFSETS))
        _check(folder, fields, offsets)
        return cls(fields, offsets.astype(np.int64))

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """How many examples each client has, int64 [clients]."""
        return np.diff(self.offsets)

    def of_client(self, client: int) -> dict[str, np.ndarray]:
        """One client's rows, copied."""
        return self.rows_of([client])

    def rows_of(self, clients: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of some clients after each other, copied; nothing else is read."""
        spans = [slice(self.offsets[c], self.offsets[c + 1]) for c in clients]
        total = sum(int(span.stop - span.start) for span in spans)
        found = {}
        for name, array in self.fields.items():
            rows = np.empty((total, *array.shape[1:]), array.dtype)
            at = 0
            for span in spans:
                end = at + int(span.stop - span.start)
                rows[at:end] = array[span]
                at = end
            found[name] = rows
        return found


def write_clients(folder: Path, clients: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes a folder of clients, one client at a time.

    Args:
      folder: to be made; must not hold clients yet.
      clients: for each its fields, [examples, ...] each; the same names, dtypes and row shapes for
        all of them.

    Raises:
      DataError: the folder holds clients already, there is none to write, or one is unlike the
        first.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "clients"
    >>> write_clients(folder, ({"x": np.full((n, 2), n, np.float32)} for n in (3, 0, 1)))
    >>> ClientData.open(folder).of_client(2)["x"].tolist()
    [[1.0, 1.0]]
    """
    if (folder / f"{_OFFSETS}.npy").exists():
        raise DataError(f"{folder} holds clients already; choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    offsets = [0]
    with ExitStack() as stack:
        columns: dict[str, _Column] = {}
        for number, client in enumerate(clients):
            arrays = {name: np.asarray(array) for name, array in client.items()}
            if number == 0:
                for name, array in arrays.items():
                    file = stack.enter_context(open(folder / f"{name}.npy", "wb"))
                    columns[name] = _Column(file, array.dtype, array.shape[1:])
            _require_alike(number, arrays, columns)
            for name, array in arrays.items():
                columns[name].append(array)
            offsets.append(offsets[-1] + len(next(iter(arrays.values()))))
        if not columns:
            raise DataError(f"there is no client to write to {folder}, or the first has no field")
        for column in columns.values():
            column.finish(offsets[-1])
    np.save(folder / f"{_OFFSETS}.npy", np.array(offsets, np.int64))


class _Column:
    """A `.npy` file that grows; how many rows it has is written at its end."""

    def __init__(self, file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.file, self.dtype, self.shape = file, dtype, shape
        self._header(0)
        self._begins = file.tell()

    def append(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows).tobytes())

    def finish(self, rows: int) -> None:
        self.file.seek(0)
        self._header(rows)
        # numpy leaves room in a header for the number of rows to grow.
        assert self.file.tell() == self._begins

    def _header(self, rows: int) -> None:
        described = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (rows, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self.file, described)


def _require_alike(
    number: int, arrays: Mapping[str, np.ndarray], columns: Mapping[str, _Column]
) -> None:
    lengths = {len(array) for array in arrays.values()}
    if arrays.keys() != columns.keys() or len(lengths) != 1:
        raise DataError(
            f"client {number} has the fields {', '.join(sorted(arrays))} of lengths "
            f"{sorted(lengths)}; all must have {', '.join(sorted(columns))}, equally long"
        )
    for name, array in arrays.items():
        column = columns[name]
        if array.dtype != column.dtype or array.shape[1:] != column.shape:
            raise DataError(
                f"client {number}: {name} is {array.dtype} {array.shape[1:]} per row; the first "
                f"client's is {column.dtype} {column.shape}"
            )


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; write the folder again with "
            "shardpar.fl.clients.write_clients"
        ) from None


def _check(folder: Path, fields: Mapping[str, np.ndarray], offsets: np.ndarray) -> None:
    if not fields:
        raise DataError(f"{folder} has offsets but no field; each is a file NAME.npy beside them")
    plain = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) >= 2
    if not plain or offsets[0] != 0 or np.any(np.diff(offsets.astype(np.int64)) < 0):
        raise DataError(
            f"{folder / _OFFSETS}.npy must be integers [clients + 1] that ascend from 0, got "
            f"{offsets.dtype} {offsets.shape}"
        )
    for name, array in fields.items():
        if array.ndim == 0 or len(array) != offsets[-1]:
            raise DataError(
                f"{folder / name}.npy has shape {array.shape}, and by its offsets the folder has "
                f"{offsets[-1]} rows"
            )
