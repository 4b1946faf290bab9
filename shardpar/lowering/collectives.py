"""Reads the collectives XLA put into a compiled program: which, how many, how many bytes.

Bodies of loops are counted as often as XLA says they run. XLA:CPU writes a
reduce-scatter as an all-reduce of which only a slice is used; that is counted as
what it is on other backends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from shardpar.spec.graph import DTYPE_BYTES

KINDS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

_HLO_DTYPES = {
    "pred": "bool", "s8": "int8", "u8": "uint8", "s16": "int16", "u16": "uint16",
    "f16": "float16", "bf16": "bfloat16", "s32": "int32", "u32": "uint32", "f32": "float32",
    "s64": "int64", "u64": "uint64", "f64": "float64", "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2", "c64": "complex64", "c128": "complex128",
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+(?:, ?%?[\w.\-]+)*)"
)
_GROUP_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^ ]*\))? ?\{([^}]*)\}")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Collective:
    """One kind of collective over groups of one size.

    Attributes:
      kind: "all-reduce", "all-gather", …
      group_size: devices in each group; 0 where the text does not say.
      count: how often a step runs it.
      num_bytes: bytes of its results on one device, summed over the runs.
    """

    kind: str
    group_size: int
    count: int
    num_bytes: int


@dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    kind: str
    rest: str


_Computations = dict[str, list[_Op]]


def collectives(hlo: str) -> tuple[Collective, ...]:
    """Counts the collectives in the text of a compiled program.

    Args:
      hlo: `compiled.as_text()`.

    Returns:
      One entry per kind and group size, most bytes first.
    """
    computations = dict(_computations(hlo))
    entry = next((name for name, (is_entry, _) in computations.items() if is_entry), None)
    totals: dict[tuple[str, int], list[int]] = {}
    if entry is not None:
        _count(entry, 1, {name: ops for name, (_, ops) in computations.items()}, totals)
    found = [Collective(kind, size, n, b) for (kind, size), (n, b) in totals.items()]
    return tuple(sorted(found, key=lambda c: (-c.num_bytes, c.kind, c.group_size)))


def op_counts(hlo: str) -> dict[str, int]:
    r"""How many operations of each kind a compiled program's text holds, fused ones included.

    >>> text = "ENTRY main (x: f32[2]) -> f32[2] {\n  ROOT a = f32[2] add(x, x)\n}"
    >>> op_counts(text)
    {'add': 1}
    """
    counts: dict[str, int] = {}
    for _, (_, ops) in _computations(hlo):
        for op in ops:
            counts[op.kind] = counts.get(op.kind, 0) + 1
    return dict(sorted(counts.items()))


def _computations(hlo: str) -> Iterator[tuple[str, tuple[bool, list[_Op]]]]:
    name, is_entry, ops = "", False, []
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name, is_entry, ops = start[2], bool(start[1]), []
        elif line.startswith("}"):
            if name:
                yield name, (is_entry, ops)
            name = ""
        elif name and (op := _OP.match(line)):
            ops.append(_Op(op[1], op[2], op[3], op[4]))


def _count(
    name: str, times: int, computations: _Computations, totals: dict[tuple[str, int], list[int]]
) -> None:
    for op in computations.get(name, []):
        kind = op.kind.removesuffix("-start")
        if kind in KINDS:
            size = _group_size(op.rest)
            sizes = _element_bytes(op.shape, started=op.kind.endswith("-start"))
            moved: dict[str, int] = {}
            for element, num_bytes in enumerate(sizes):
                if kind == "all-reduce" and size and _only_sliced(op, element, name, computations):
                    moved["reduce-scatter"] = moved.get("reduce-scatter", 0) + num_bytes // size
                else:
                    moved[kind] = moved.get(kind, 0) + num_bytes
            for what, num_bytes in moved.items():
                entry = totals.setdefault((what, size), [0, 0])
                entry[0] += times
                entry[1] += times * num_bytes
            continue
        trips = _TRIPS.search(op.rest) if op.kind == "while" else None
        for child in _called(op):
            _count(child, times * (int(trips[1]) if trips else 1), computations, totals)


def _only_sliced(op: _Op, element: int, name: str, computations: _Computations) -> bool:
    """Whether all that is ever read of one result of a collective is a dynamic slice."""
    ops = computations[name]
    if not op.shape.startswith("("):
        return _sliced(op.name, ops, computations)
    picks = [
        other.name
        for other in ops
        if other.kind == "get-tuple-element"
        and op.name in _operands(other)
        and re.search(rf"index={element}\b", other.rest)
    ]
    return bool(picks) and all(_sliced(pick, ops, computations) for pick in picks)


def _sliced(value: str, ops: list[_Op], computations: _Computations) -> bool:
    readers = [op for op in ops if value in _operands(op)]
    return bool(readers) and all(_slices(op, value, ops, computations) for op in readers)


def _slices(op: _Op, value: str, ops: list[_Op], computations: _Computations) -> bool:
    operands = _operands(op)
    if op.kind == "dynamic-slice":
        return operands[0] == value and value not in operands[1:]
    if op.kind in ("bitcast", "copy", "reshape", "transpose", "convert"):
        return _sliced(op.name, ops, computations)
    if op.kind in ("fusion", "call"):
        inside = computations.get(next(iter(_called(op)), ""), [])
        names = [
            inner.name
            for position, operand in enumerate(operands)
            if operand == value
            for inner in inside
            if inner.kind == "parameter" and inner.rest.startswith(f"{position})")
        ]
        return bool(names) and all(_sliced(inner, inside, computations) for inner in names)
    return False


def _operands(op: _Op) -> list[str]:
    listed = _COMMENT.sub("", op.rest.split(")", 1)[0])
    return [part.split()[-1].lstrip("%") for part in listed.split(",") if part.strip()]


def _called(op: _Op) -> list[str]:
    return [name for found in _CALLED.findall(op.rest) for name in re.split(r", ?%?", found)]


def _element_bytes(shape: str, started: bool) -> list[int]:
    sizes = [
        math.prod(int(d) for d in dims.split(",") if d) * DTYPE_BYTES[_HLO_DTYPES[dtype]]
        for dtype, dims in _SHAPE.findall(shape)
        if dtype in _HLO_DTYPES
    ]
    if started and shape.startswith("(") and len(sizes) > 1:
        # An asynchronous start returns its operands beside its results.
        sizes = sizes[len(sizes) // 2 :]
    return sizes


def _group_size(rest: str) -> int:
    """Devices per group, from any of the three ways XLA writes them; 0 if it does not say."""
    listed = _GROUP_LIST.search(rest)
    if listed:
        return len(listed[1].split(",")) if listed[1] else 0
    iota = _GROUP_IOTA.search(rest)
    if iota:
        return int(iota[2])
    mesh = _GROUP_MESH.search(rest)
    if not mesh:
        return 0
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[name] for name, part in parts)
