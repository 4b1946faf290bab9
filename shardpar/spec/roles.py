"""What an axis does to an array, and how a rule about one axis becomes one about whole layouts.

A rule maps the roles that one axis has in the inputs to the role that it has in the result.
It is applied to every axis of every group, and to the top tier as if it were an axis too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shardpar.errors import SpecError
from shardpar.spec.axes import common_axes
from shardpar.spec.layout import (
    Across,
    Entry,
    Group,
    Layout,
    Partial,
    Replicate,
    Split,
    SplitAcross,
)


@dataclass(frozen=True)
class Along:
    """An axis that splits a dim."""

    dim: int


@dataclass(frozen=True)
class Copies:
    """An axis that keeps copies."""


@dataclass(frozen=True)
class Addends:
    """An axis that holds addends."""


Role = Along | Copies | Addends


class ClashError(Exception):
    """An axis whose roles in the inputs do not fit.

    Attributes:
      why: in words.
      mend: (which input, the role that would fit) pairs.
    """

    def __init__(self, why: str, *mend: tuple[int, Role]) -> None:
        super().__init__(why)
        self.why, self.mend = why, mend


Rule = Callable[[tuple[Role, ...]], Role]


def lift(name: str, inputs: list[Layout], rule: Rule) -> Layout:
    """Applies a rule to each axis of each group and to the top tier."""
    devices = [[group.devices for group in layout.groups] for layout in inputs]
    if any(of_input != devices[0] for of_input in devices):
        raise SpecError(
            f"{name}: the inputs lie on different groups: {_listed(inputs)}; "
            f"reshard them to the same groups first"
        )
    groups = []
    for number in range(len(inputs[0].groups)):
        axes = _common([layout.groups[number].entries for layout in inputs])
        if axes is None:
            raise SpecError(
                f"{name}: the groups' meshes have no common refinement: {_listed(inputs)}; "
                f"reshard one input to the mesh of the other first"
            )
        entries = []
        for position, axis in enumerate(axes):
            try:
                role = rule(tuple(map(_role, axis)))
            except ClashError as clash:
                mended = [
                    (i, _with_entry(inputs[i], number, axes, i, position, to))
                    for i, to in clash.mend
                ]
                raise error_of(name, inputs, clash.why, mended) from None
            entries.append(_entry(role, axis[0].parts))
        groups.append(Group(inputs[0].groups[number].devices, _merged(entries)))
    try:
        across = _across(name, inputs, rule)
    except ClashError as clash:
        mended = [(i, _with_across(inputs, i, to)) for i, to in clash.mend]
        raise error_of(name, inputs, clash.why, mended) from None
    return Layout(tuple(groups), across)


def _common(lists: list[tuple[Entry, ...]]) -> list[tuple[Entry, ...]] | None:
    """All inputs' axes cut to one mesh."""
    sizes: list[int] | None = [e.parts for e in lists[0]]
    for entries in lists[1:]:
        sizes = _refined(sizes, [e.parts for e in entries])
    if sizes is None:
        return None
    columns = []
    for entries in lists:
        pairs = common_axes(entries, [Replicate(n) for n in sizes])
        if pairs is None:
            return None
        columns.append([entry for entry, _ in pairs])
    return list(zip(*columns, strict=True)) if columns and columns[0] else []


def _refined(a: list[int] | None, b: list[int]) -> list[int] | None:
    if a is None:
        return None
    pairs = common_axes([Replicate(n) for n in a], [Replicate(n) for n in b])
    return None if pairs is None else [entry.parts for entry, _ in pairs]


def _role(entry: Entry) -> Role:
    if isinstance(entry, Split):
        return Along(entry.dim)
    return Copies() if isinstance(entry, Replicate) else Addends()


def _entry(role: Role, parts: int) -> Entry:
    if isinstance(role, Along):
        return Split(role.dim, parts)
    return Replicate(parts) if isinstance(role, Copies) else Partial(parts)


def _merged(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Neighbouring axes that do the same become one."""
    out: list[Entry] = []
    for entry in entries:
        if out and replace(out[-1], parts=entry.parts) == entry:
            out[-1] = replace(entry, parts=out[-1].parts * entry.parts)
        else:
            out.append(entry)
    return tuple(out)


def _across(name: str, inputs: list[Layout], rule: Rule) -> Across:
    if len(inputs[0].groups) == 1:
        return "dup"
    tops = [layout.across for layout in inputs]
    role = rule(tuple(map(_top_role, tops)))
    splits = [top for top in tops if isinstance(top, SplitAcross)]
    if any(s.blocks != splits[0].blocks for s in splits):
        raise SpecError(
            f"{name}: the inputs are split across groups with different extents: "
            f"{_listed(inputs)}; reshard one to the extents of the other first"
        )
    if isinstance(role, Along):
        return SplitAcross(role.dim, splits[0].blocks)
    return "dup" if isinstance(role, Copies) else "partial"


def _top_role(top: Across) -> Role:
    if isinstance(top, SplitAcross):
        return Along(top.dim)
    return Copies() if top == "dup" else Addends()


def _with_entry(
    layout: Layout,
    number: int,
    axes: Sequence[tuple[Entry, ...]],
    column: int,
    position: int,
    role: Role,
) -> str:
    entries = [axis[column] for axis in axes]
    entries[position] = _entry(role, entries[position].parts)
    group = Group(layout.groups[number].devices, _merged(entries))
    return str(layout.with_group(number, group))


def _with_across(inputs: list[Layout], i: int, role: Role) -> str:
    # The blocks to take over are those of the input that this one shall fit.
    splits = [
        x.across for j, x in enumerate(inputs) if j != i and isinstance(x.across, SplitAcross)
    ]
    if isinstance(role, Along) and splits:
        across: Across = SplitAcross(role.dim, splits[0].blocks)
    else:
        across = "partial" if isinstance(role, Addends) else "dup"
    return str(replace(inputs[i], across=across))


def error_of(
    name: str, inputs: Sequence[Layout], why: str, mended: Sequence[tuple[int, str]]
) -> SpecError:
    """The refusal of an operation: its inputs, why, and what each should be resharded to."""
    advice = " and ".join(f"input {i} to {text}" for i, text in mended)
    return SpecError(
        f"{name} of {_listed(inputs)}: {why}"
        + (f"; reshard {advice} first" if advice else "; reshard the input first")
    )


def _listed(inputs: Sequence[Layout]) -> str:
    return " and ".join(str(layout) for layout in inputs)
