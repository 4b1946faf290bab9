"""How configs, graphs, plans, layouts and collectives look on a terminal."""

from __future__ import annotations

import itertools
import json as json_format
import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from shardpar.config.save import to_yaml
from shardpar.config.schema import RunConfig
from shardpar.lowering.collectives import Collective
from shardpar.planner.cost import PlanCost
from shardpar.planner.strategies import describe
from shardpar.spec.graph import LayerGraph, Parameter
from shardpar.spec.mesh import GroupLayout
from shardpar.spec.parameters import FSDP_MIN_SIZE, parameter_layout
from shardpar.spec.plan import LayerStrategy, Plan, Stage
from shardpar.spec.select import strategies, summarise

GIB = 2**30
LARGE_BYTES = 64 * 2**20
"""A parameter of this size or more that every device holds whole is flagged."""

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white", "bright_black")


def console(stderr: bool = False) -> Console:
    """A console that does not fold lines when its output goes to a file or a pipe."""
    # Names of runs, plans and layers may hold brackets: no text is markup.
    plain = Console(stderr=stderr, markup=False, emoji=False)
    if plain.is_terminal:
        return plain
    return Console(stderr=stderr, markup=False, emoji=False, width=140)


def print_json(value: Any) -> None:
    """Prints one JSON object on one line; NaN and infinities, which JSON has not, are null."""
    print(json_format.dumps(_finite(value)), flush=True)  # noqa: T201


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def print_config(config: RunConfig, *, json: bool) -> None:
    """Prints the resolved config as YAML, or as JSON."""
    if json:
        data = msgspec.to_builtins(config)
        data["model"] = {"source": config.model.source, **dict(config.model.options)}
        print_json(data)
    else:
        print(to_yaml(config))  # noqa: T201


def graph_table(graph: LayerGraph) -> Group:
    """Each layer class with its count, parameters, FLOPs and what it keeps for the backward."""
    table = Table(
        title=f"{graph.model}: {_count(graph.num_parameters)} parameters", title_justify="left"
    )
    for name, justify in (
        ("layers", "left"), ("class", "left"), ("count", "right"), ("params each", "right"),
        ("GFLOP/seq fwd", "right"), ("bwd", "right"), ("saved/seq", "right"),
        ("selective", "right"), ("full", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for cls in graph.classes:
        members = [layer.name for layer in graph.layers if layer.class_name == cls.name]
        tied = f" (ties {', '.join(p.name for p in cls.tied)})" if cls.tied else ""
        table.add_row(
            summarise(members),
            cls.name,
            str(len(members)),
            _count(cls.num_parameters) + tied,
            f"{cls.forward_flops / graph.batch / 1e9:,.2f}",
            f"{cls.backward_flops / graph.batch / 1e9:,.2f}",
            *(byte_text(cls.saved(r) / graph.batch) for r in ("none", "selective", "full")),
        )
    note = (
        f"costs of {graph.batch} sequences, {graph.tokens:,} tokens, in {graph.compute_dtype}; "
        f"model FLOPs {graph.flops_per_token / 1e9:,.3f} GFLOP/token"
        + (", causal attention halved" if graph.causal else "")
    )
    return Group(table, Text(note, style="dim"))


def plan_table(plan: Plan, graph: LayerGraph, cost: PlanCost | None, limit_bytes: float) -> Table:
    """Per stage and strategy: devices, layers, degrees, predicted milliseconds and GiB."""
    table = Table(
        title=f"plan for {plan.cluster}, global batch {plan.global_batch}", title_justify="left"
    )
    for name, justify in (
        ("stage", "left"), ("devices", "left"), ("layers", "left"), ("strategy", "left"),
        ("micro-batches", "right"), ("ms/step", "right"), ("GiB/device", "right"),
        ("limit", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    stage_costs = iter(cost.stages if cost else ())
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            priced = next(stage_costs, None)
            chosen = strategies(stage, graph)
            for i, strategy in enumerate(stage.layers):
                first = i == 0
                names = [n for n in chosen if chosen[n] == strategy]
                table.add_row(
                    f"{p}.{s}" if first else "",
                    _device_range(stage.devices) if first else "",
                    summarise([x.name for x in graph.layers if x.name in names]),
                    describe(strategy, stage.mesh),
                    f"{pipeline.num_microbatches} x {pipeline.microbatch}" if first else "",
                    f"{priced.step_s * 1e3:,.1f}" if first and priced else "",
                    f"{priced.peak_bytes / GIB:.2f}" if first and priced else "",
                    f"{limit_bytes / GIB:.2f}" if first and limit_bytes else "",
                )
    return table


def shardings_view(plan: Plan, graph: LayerGraph) -> Group:
    """Every parameter's layout as a table, a picture of each distinct one, and what to look at."""
    stages = [
        (f"parameter layouts of pipeline {p}, stage {s}", stage)
        for p, pipeline in enumerate(plan.pipelines)
        for s, stage in enumerate(pipeline.stages)
    ]
    if len(stages) == 1:
        return _stage_view("parameter layouts", stages[0][1], plan, graph)
    return Group(*(_stage_view(title, stage, plan, graph) for title, stage in stages))


def _stage_view(title: str, stage: Stage, plan: Plan, graph: LayerGraph) -> Group:
    chosen = strategies(stage, graph)
    table = Table(title=title, title_justify="left")
    for name in ("parameters", "shape", "logical dims", "layout", "per device", "copies"):
        table.add_column(name, overflow="fold")
    pictures: dict[tuple[str, tuple[int, ...]], Table] = {}
    flags: list[str] = []
    for group in _alike(graph, chosen):
        names, parameter, strategy = group
        layout = parameter_layout(parameter, strategy, stage.mesh, plan.tensor_dims)
        shard = layout.shard_shape(parameter.shape)
        table.add_row(
            _summary(names),
            _shape(parameter.shape),
            ", ".join(d or "-" for d in parameter.dims) or "scalar",
            str(layout),
            f"{_shape(shard)} = {byte_text(parameter.num_bytes / layout.shards)}",
            str(layout.replicas),
        )
        flags += _flags(names, parameter, strategy, layout)
        if layout.shards > 1 and parameter.shape:
            key = (str(layout), tuple(len(a) for a in layout.dims))
            if key not in pictures:
                pictures[key] = picture(layout, parameter, stage.devices)
    parts: list[Any] = [table, *pictures.values()]
    parts += [Text(f"! {flag}", style="yellow") for flag in flags]
    if not flags:
        parts.append(Text("no large replicated parameters, no indivisible dims", style="green"))
    return Group(*parts)


def picture(layout: GroupLayout, parameter: Parameter, devices: Sequence[int]) -> Table:
    """Which devices hold which block of an array, for any rank.

    Rows are the blocks along the first split dim, columns those along all other
    split dims; each cell lists the devices that hold the block.
    """
    holders: dict[tuple[int, ...], list[int]] = {}
    shard = layout.shard_shape(parameter.shape)
    for device, piece in zip(devices, layout.slices(parameter.shape), strict=True):
        block = tuple(s.start // n if n else 0 for s, n in zip(piece, shard, strict=True))
        holders.setdefault(block, []).append(device)
    split = [d for d, axes in enumerate(layout.dims) if axes]
    rows, columns = split[:1], split[1:]
    title = f"{layout}, e.g. {parameter.name} {_shape(parameter.shape)}"
    table = Table(title=title, title_justify="left", show_lines=True, min_width=len(title))
    table.add_column(f"dim{rows[0]}", style="dim")
    counts = {d: parameter.shape[d] // shard[d] for d in split}
    column_blocks = list(itertools.product(*(range(counts[d]) for d in columns)))
    for block in column_blocks:
        table.add_column(
            " ".join(f"dim{d}[{_span(b, shard[d])}]" for d, b in zip(columns, block, strict=True))
            or "whole",
            justify="center",
        )
    for r in range(counts[rows[0]]):
        cells = []
        for block in column_blocks:
            at = [0] * len(shard)
            at[rows[0]] = r
            for d, b in zip(columns, block, strict=True):
                at[d] = b
            owners = holders[tuple(at)]
            colour = _COLOURS[owners[0] % len(_COLOURS)]
            cells.append(Text(_device_range(tuple(owners)), style=colour))
        table.add_row(_span(r, shard[rows[0]]), *cells)
    return table


def both_collectives_table(
    predicted: Iterable[tuple[str, int, float, float]], compiled: Iterable[Collective]
) -> Table:
    """Collectives of a step by kind and group size: the cost model's and the compiler's."""
    table = Table(title="collectives of a step, per device", title_justify="left")
    table.add_column("kind")
    table.add_column("over", justify="right")
    for name in ("predicted", "GiB", "compiled", "GiB"):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, int], list[str]] = {}
    for kind, parts, count, size in predicted:
        rows[kind, parts] = [f"{count:,.0f}", f"{size / GIB:.3f}", "", ""]
    for c in compiled:
        row = rows.setdefault((c.kind, c.group_size), ["", "", "", ""])
        row[2:] = [f"{c.count:,}", f"{c.num_bytes / GIB:.3f}"]
    for (kind, parts), row in rows.items():
        table.add_row(kind, str(parts or "?"), *row)
    return table


def programs_table(rows: Iterable[tuple[str, int, int]]) -> Table:
    """(name, bytes of arguments, bytes of scratch) rows, per device."""
    table = Table(title="memory of each program by XLA, per device", title_justify="left")
    table.add_column("program")
    for name in ("arguments", "scratch"):
        table.add_column(name, justify="right")
    for name, argument_bytes, temp_bytes in rows:
        table.add_row(name, byte_text(argument_bytes), byte_text(temp_bytes))
    return table


def collectives_table(
    rows: Iterable[tuple[str, int, int, int]], title: str = "collectives in one step, per device"
) -> Table:
    """(kind, group size, runs per step, bytes per device) rows."""
    table = Table(title=title, title_justify="left")
    for name, justify in (
        ("kind", "left"),
        ("group", "right"),
        ("runs", "right"),
        ("bytes", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    total = 0
    for kind, size, count, num_bytes in rows:
        table.add_row(kind, str(size), str(count), byte_text(num_bytes))
        total += num_bytes
    table.add_section()
    table.add_row("total", "", "", byte_text(total))
    return table


def _alike(
    graph: LayerGraph, chosen: dict[str, LayerStrategy]
) -> list[tuple[list[str], Parameter, LayerStrategy]]:
    """Parameters of equal layers under one strategy, told once."""
    groups: dict[Any, tuple[list[str], Parameter, LayerStrategy]] = {}
    for name, layer, parameter in graph.parameters:
        strategy = chosen.get(layer.name)
        if strategy is None:
            # Of another stage.
            continue
        key = (layer.class_name, parameter.name, strategy)
        groups.setdefault(key, ([], parameter, strategy))[0].append(name)
    return list(groups.values())


def _summary(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    first, last = names[0].split("."), names[-1].split(".")
    return ".".join(
        a if a == b else f"[{a}:{int(b) + 1}]" for a, b in zip(first, last, strict=True)
    ).replace(".[", "[")


def _flags(
    names: list[str], parameter: Parameter, strategy: LayerStrategy, layout: GroupLayout
) -> list[str]:
    found = []
    mesh = layout.mesh
    if layout.shards == 1 and mesh.num_devices > 1 and parameter.num_bytes >= LARGE_BYTES:
        found.append(
            f"{_summary(names)} ({byte_text(parameter.num_bytes)} each) is whole on every device; "
            "fsdp or tensor axes would split it"
        )
    if strategy.fsdp and parameter.size >= FSDP_MIN_SIZE:
        used = set(itertools.chain.from_iterable(layout.dims))
        if not set(strategy.fsdp) <= used:
            parts = mesh.size_of(strategy.fsdp)
            found.append(
                f"{_summary(names)} {_shape(parameter.shape)}: no dim is divisible by fsdp "
                f"({parts}), so it stays whole over those axes"
            )
    return found


def _device_range(devices: tuple[int, ...]) -> str:
    if len(devices) > 2 and devices == tuple(range(devices[0], devices[-1] + 1)):
        return f"{devices[0]}-{devices[-1]}"
    return ",".join(map(str, devices))


def _span(block: int, size: int) -> str:
    return f"{block * size}:{(block + 1) * size}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def byte_text(number: float) -> str:
    """Bytes in the unit people read.

    >>> byte_text(3), byte_text(3 * 2**20)
    ('3 B', '3.00 MiB')
    """
    if number <= 0:
        return "0 B"
    power = min(4, int(math.log(number, 1024)))
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{number / 1024**power:.{0 if power == 0 else 2}f} {unit}"
