"""Reads an edge list, runs an algorithm on it and writes its table: the heavy half of `graph`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from shardpar.cli.graph import Job
from shardpar.cli.tables import console, print_json
from shardpar.errors import DataError, UserError
from shardpar.ps.graph.backends import (
    Algorithm,
    Backend,
    Devices,
    asked_backend,
    choose_backend,
    installed_backends,
    needs_devices,
)
from shardpar.ps.graph.columns import check_destination, write_columns
from shardpar.ps.graph.common_neighbours import common_neighbours as count_common
from shardpar.ps.graph.components import components as components_on_host
from shardpar.ps.graph.edges import EdgeList, EdgeOptions, read_edges
from shardpar.ps.graph.graph import Graph
from shardpar.ps.graph.kcore import core_numbers
from shardpar.ps.graph.label_propagation import LabelOptions, label_propagation
from shardpar.ps.graph.louvain import louvain
from shardpar.ps.graph.pagerank import PageRankOptions
from shardpar.ps.graph.pagerank import pagerank as pagerank_on_host
from shardpar.ps.graph.triangles import triangles as count_triangles
from shardpar.run.progress import Progress

_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Outcome:
    """What came of an algorithm.

    Attributes:
      columns: the table to write.
      figures: for the summary and for --json.
      first: the rows to show; None shows none.
      top: what `first` is about.
    """

    columns: Mapping[str, np.ndarray]
    figures: Mapping[str, Any]
    first: np.ndarray | None = None
    top: str = ""


def pagerank(job: Job, tol: float, damping: float, restart: list[str], directed: bool) -> None:
    """`shardpar graph pagerank`."""
    options = PageRankOptions(directed=directed, damping=damping, tol=tol)

    def compute(graph: Graph, backend: Backend) -> Outcome:
        home = None
        if restart:
            home = np.bincount(graph.indices_of(restart), minlength=graph.num_nodes)
        run = _sharded("pagerank").pagerank if backend.name == "jax" else pagerank_on_host
        found = run(graph, options, home)
        return Outcome(
            {"node": graph.names, "pagerank": found.ranks},
            {"iterations": found.iterations, "error_bound": found.error},
            _largest(found.ranks),
            "highest ranks",
        )

    _run("pagerank", job, compute)


def components(job: Job, strong: bool) -> None:
    """`shardpar graph components`."""
    if strong and (job.devices is not None or job.backend == "jax"):
        raise UserError("--strong runs on one host only; leave --devices and --backend jax out")

    def compute(graph: Graph, backend: Backend) -> Outcome:
        if backend.name == "jax":
            found = _sharded("components").components(graph)
        else:
            found = components_on_host(graph, strong=strong)
        return Outcome(
            {"node": graph.names, "component": found.labels},
            {"components": len(found.sizes), "largest": int(found.sizes[0])},
        )

    forced = Backend("scipy", "strong components run on one host") if strong else None
    _run("components", job, compute, forced)


def kcore(job: Job) -> None:
    """`shardpar graph kcore`."""

    def compute(graph: Graph, backend: Backend) -> Outcome:
        core = core_numbers(graph, backend.name)
        highest = int(core.max())
        figures = {"highest_core": highest, "nodes_in_it": int((core == highest).sum())}
        return Outcome({"node": graph.names, "core": core}, figures)

    _run("kcore", job, compute)


def communities(job: Job, method: str, resolution: float, seed: int) -> None:
    """`shardpar graph communities`."""

    def compute(graph: Graph, backend: Backend) -> Outcome:
        if method == "louvain":
            found = louvain(graph, backend.name, resolution=resolution, seed=seed)
        elif backend.name == "jax":
            run = _sharded("label_propagation").label_propagation
            found = run(graph, LabelOptions(seed=seed))
        else:
            found = label_propagation(graph, LabelOptions(seed=seed))
        return Outcome(
            {"node": graph.names, "community": found.labels},
            {
                "communities": len(found.sizes),
                "largest": int(found.sizes[0]),
                "modularity": found.modularity,
            },
        )

    if method == "louvain":
        _run("louvain", job, compute)
    elif resolution != 1.0:
        raise UserError("--resolution goes with --method louvain only")
    else:
        _run("label-propagation", job, compute)


def triangles(job: Job) -> None:
    """`shardpar graph triangles`."""

    def compute(graph: Graph, backend: Backend) -> Outcome:
        found = count_triangles(graph, backend.name)
        return Outcome(
            {"node": graph.names, "triangles": found.counts, "clustering": found.clustering},
            {
                "triangles": found.total,
                "mean_clustering": float(found.clustering.mean()),
                "transitivity": found.transitivity,
            },
            _largest(found.counts),
            "most triangles",
        )

    _run("triangles", job, compute)


def common_neighbours(job: Job, pairs: str | None, top: int | None) -> None:
    """`shardpar graph common-neighbours`."""

    def compute(graph: Graph, _: Backend) -> Outcome:
        found = count_common(graph, _pairs(pairs, graph) if pairs else None, top=top)
        return Outcome(
            {
                "source": graph.names[found.sources],
                "target": graph.names[found.targets],
                "common": found.common,
            },
            {"pairs": len(found.common)},
            _largest(found.common),
            "most common neighbours",
        )

    _run("common-neighbours", job, compute)


def _pairs(path: str, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of a file of pairs.

    Raises:
      DataError: naming the file, and the line or the node at fault.
    """
    options = EdgeOptions(ids="int" if graph.names.dtype.kind == "i" else "string", weighted=False)
    listed = read_edges(path, options).graph
    try:
        place = graph.indices_of(listed.names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return place[listed.sources], place[listed.targets]


def _run(
    algorithm: Algorithm,
    job: Job,
    compute: Callable[[Graph, Backend], Outcome],
    forced: Backend | None = None,
) -> None:
    place = check_destination(job.out)
    if Path(job.edges).exists() and place.exists() and place.samefile(job.edges):
        raise UserError(f"--out {job.out}: this is the edge list itself; write another name")
    installed = installed_backends()
    asked = forced
    if job.backend != "auto":
        asked = forced or asked_backend(algorithm, job.backend, installed)
    if job.devices is not None and asked is not None and asked.name != "jax":
        raise UserError(f"--devices goes with --backend jax, not with {asked.name}")
    with Progress() as progress:
        read, read_s = _timed(lambda: _read(job, progress))
        graph = read.graph
        for bad in read.bad:
            progress.say(f"left out {job.edges}:{bad.line}: {bad.reason}: {bad.text!r}")
        if read.num_bad > len(read.bad):
            progress.say(f"left out {read.num_bad} bad lines in all")
        backend = _backend(algorithm, job, graph, asked, installed)
        with progress.phase(f"{algorithm} ({backend.name})"):
            found, compute_s = _timed(lambda: compute(graph, backend))
        with progress.phase(f"writing {job.out}"):
            write_columns(place, found.columns)
    summary = {
        "algorithm": algorithm,
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "weighted": graph.weights is not None,
        "bad_lines": read.num_bad,
        "backend": backend.name,
        "reason": backend.reason,
        "read_s": round(read_s, 3),
        "compute_s": round(compute_s, 3),
        **found.figures,
        "out": job.out,
    }
    print_json(summary) if job.json else _show(summary, found)


def _read(job: Job, progress: Progress) -> EdgeList:
    options = EdgeOptions(
        ids=None if job.ids == "auto" else job.ids,  # type: ignore[arg-type]
        weighted=job.weighted,
        bad_share=job.bad_share,
    )
    with progress.phase(f"reading {job.edges}") as so_far:
        return read_edges(
            job.edges, options, lambda done, size: so_far(f"{done / max(size, 1):.0%}")
        )


def _backend(
    algorithm: Algorithm, job: Job, graph: Graph, asked: Backend | None, installed: Any
) -> Backend:
    on_devices = job.devices is not None or (asked is not None and asked.name == "jax")
    found = None
    if on_devices or (asked is None and needs_devices(algorithm, graph.num_edges)):
        # Only here is jax started: without it a small graph is done in no time.
        from shardpar.cli.planning import jax, use_devices

        use_devices(job.devices)
        found = Devices(jax.default_backend(), len(jax.devices()), asked=job.devices is not None)
    return asked or choose_backend(algorithm, graph.num_nodes, graph.num_edges, found, installed)


def _sharded(algorithm: str) -> Any:
    return importlib.import_module(f"shardpar.ps.graph.sharded.{algorithm}")


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began_s = time.perf_counter()
    return work(), time.perf_counter() - began_s


def _largest(values: np.ndarray) -> np.ndarray:
    """The rows of the largest values; of equal ones, the first."""
    return np.argsort(-values, kind="stable")[:_SHOWN_ROWS]


def _show(summary: Mapping[str, Any], found: Outcome) -> None:
    kind = "weighted edges" if summary["weighted"] else "edges"
    out = console()
    out.print(f"{summary['nodes']} nodes, {summary['edges']} {kind}")
    out.print(f"{summary['algorithm']} by {summary['backend']}: {summary['reason']}")
    for name, value in found.figures.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        out.print(f"{name.replace('_', ' ')}: {shown}")
    if found.first is not None and len(found.first):
        table = Table(title=found.top, title_justify="left")
        for name in found.columns:
            table.add_column(name, justify="left" if name == "node" else "right")
        for row in found.first:
            values = (column[row] for column in found.columns.values())
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
        out.print(table)
    out.print(f"written to {summary['out']}")
