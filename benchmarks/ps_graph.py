"""shardpar's graph algorithms beside scipy, igraph, networkit and networkx, in CPU-seconds.

One RMAT graph, all contestants in turn, several rounds; the ratio of each round's times is taken,
so a machine that slows down slows all. shardpar starts from the arrays of edges every time. Peers
are timed on a graph that they have built already; what building took is printed beside it.

    python benchmarks/ps_graph.py [--scale 17] [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkit
import numpy as np
from pyarrow import csv
from scipy import sparse
from scipy.sparse import csgraph

from shardpar.ps.graph.components import components
from shardpar.ps.graph.edges import read_edges
from shardpar.ps.graph.graph import Graph, from_arrays, incoming
from shardpar.ps.graph.kcore import core_numbers
from shardpar.ps.graph.label_propagation import label_propagation
from shardpar.ps.graph.libraries import igraph_of, networkit_of
from shardpar.ps.graph.louvain import louvain, modularity
from shardpar.ps.graph.pagerank import PageRankOptions, pagerank
from shardpar.ps.graph.triangles import triangles

DAMPING = 0.85


@dataclass(frozen=True)
class Contestant:
    """One way to compute something; `run` returns a figure to compare by, as text."""

    name: str
    run: Callable[[], Any]
    figure: Callable[[Any], str] = lambda _: ""


def rmat(scale: int, draws: int, seed: int = 0) -> Graph:
    """Simple and undirected, of Chakrabarti, Zhan and Faloutsos (2004) with .57, .19, .19, .05."""
    generator = np.random.default_rng(seed)
    source, target = np.zeros(draws, np.int64), np.zeros(draws, np.int64)
    for _ in range(scale):
        draw = generator.random(draws)
        down = draw >= 0.76
        source = 2 * source + down
        target = 2 * target + np.where(down, draw >= 0.95, draw >= 0.57)
    low, high = np.minimum(source, target), np.maximum(source, target)
    keys = np.unique(((low << scale) + high)[low != high])
    return from_arrays(keys >> scale, keys & ((1 << scale) - 1), num_nodes=1 << scale)


def power_iteration(matrix: Any, tol: float) -> np.ndarray:
    """PageRank as it is written with scipy.sparse, stopped by the same bound of the error."""
    nodes = matrix.shape[0]
    degree = np.asarray(matrix.sum(0)).ravel()
    share = np.divide(1, degree, out=np.zeros(nodes), where=degree > 0)
    dangling = np.flatnonzero(degree == 0)
    ranks = np.full(nodes, 1 / nodes)
    while True:
        restarts = DAMPING * ranks[dangling].sum() + 1 - DAMPING
        new = DAMPING * (matrix @ (ranks * share)) + restarts / nodes
        change = np.abs(new - ranks).sum()
        ranks = new
        if change * DAMPING / (1 - DAMPING) <= tol:
            return ranks


def networkit_ranks(graph: Any, tol: float) -> np.ndarray:
    sinks = networkit.centrality.SinkHandling.DistributeSinks
    found = networkit.centrality.PageRank(
        graph, DAMPING, tol * (1 - DAMPING) / DAMPING, distributeSinks=sinks
    )
    found.norm = networkit.centrality.Norm.L1_NORM
    return np.asarray(found.run().scores())


def contests(graph: Graph, tols: tuple[float, ...]) -> dict[str, list[Contestant]]:
    """What is compared; the first of each is shardpar."""
    built_s: dict[str, float] = {}

    def built(name: str, make: Callable[[], Any]) -> Any:
        began = time.process_time()
        made = make()
        built_s[name] = time.process_time() - began
        return made

    matrix = built("scipy", lambda: incoming(graph, directed=False))
    ig = built("igraph", lambda: igraph_of(graph))
    nk = built("networkit", lambda: networkit_of(graph))
    print("built in CPU-s:", ", ".join(f"{name} {s:.3f}" for name, s in built_s.items()))
    truth = power_iteration(matrix, 1e-15)

    def error(ranks: np.ndarray) -> str:
        return f"error {np.abs(ranks / ranks.sum() - truth).sum():.1e}"

    def quality(labels: Any) -> str:
        return f"modularity {modularity(graph, np.asarray(labels, np.int64)):.4f}"

    def run(algorithm: Any) -> Any:
        algorithm.run()
        return algorithm

    def count(found: Any) -> str:
        return f"{found} components"

    def closed(found: Any) -> str:
        return f"{found} triangles"

    made = {
        f"PageRank, tol {tol:.0e}": [
            Contestant(
                "shardpar",
                lambda tol=tol: pagerank(graph, PageRankOptions(directed=False, tol=tol)).ranks,
                error,
            ),
            Contestant("scipy", lambda tol=tol: power_iteration(matrix, tol), error),
            Contestant(
                "scipy with building",
                lambda tol=tol: power_iteration(incoming(graph, directed=False), tol),
                error,
            ),
            Contestant("networkit", lambda tol=tol: networkit_ranks(nk, tol), error),
            Contestant("igraph (own bound)", lambda: np.asarray(ig.pagerank()), error),
        ]
        for tol in tols
    }
    made["components"] = [
        Contestant("shardpar", lambda: components(graph), lambda c: count(len(c.sizes))),
        Contestant(
            "networkit, with labels",
            lambda: run(networkit.components.ConnectedComponents(nk)).getPartition().getVector(),
            lambda labels: count(len(set(labels))),
        ),
        Contestant(
            "networkit, without",
            lambda: run(networkit.components.ConnectedComponents(nk)),
            lambda c: count(c.numberOfComponents()),
        ),
        Contestant(
            "scipy", lambda: csgraph.connected_components(matrix, directed=False),
            lambda c: count(c[0]),
        ),
        Contestant("igraph", ig.connected_components, lambda c: count(len(c))),
    ]  # fmt: skip
    made["k-core"] = [
        Contestant("shardpar", lambda: core_numbers(graph), lambda c: f"highest {c.max()}"),
        Contestant(
            "networkit",
            lambda: run(networkit.centrality.CoreDecomposition(nk)).maxCoreNumber(),
            lambda c: f"highest {c}",
        ),
        Contestant("igraph", lambda: max(ig.coreness()), lambda c: f"highest {c}"),
    ]
    made["triangles"] = [
        Contestant("shardpar", lambda: triangles(graph).total, closed),
        Contestant(
            "networkit",
            lambda: run(networkit.centrality.LocalClusteringCoefficient(nk, True)),
        ),
        Contestant("igraph", lambda: ig.transitivity_local_undirected(mode="zero")),
        Contestant("scipy", lambda: scipy_triangles(graph), closed),
    ]
    made["label propagation"] = [
        Contestant("shardpar", lambda: label_propagation(graph).labels, quality),
        Contestant(
            "networkit",
            lambda: run(networkit.community.PLP(nk)).getPartition().getVector(),
            quality,
        ),
    ]
    made["Louvain"] = [
        Contestant("shardpar", lambda: louvain(graph, "networkit").labels, quality),
        Contestant(
            "networkit",
            lambda: run(networkit.community.PLM(nk)).getPartition().getVector(),
            quality,
        ),
    ]  # fmt: skip
    return made


def scipy_triangles(graph: Graph) -> int:
    degree = np.bincount(np.concatenate([graph.sources, graph.targets]), minlength=graph.num_nodes)
    rank = np.argsort(np.argsort(degree, kind="stable"))
    ends = np.sort([rank[graph.sources], rank[graph.targets]], axis=0)
    lower = sparse.csr_array((np.ones(graph.num_edges, np.int64), ends), (graph.num_nodes,) * 2)
    return int((lower @ lower).multiply(lower).sum())


def measure(contestants: list[Contestant], rounds: int) -> list[dict[str, Any]]:
    """CPU-seconds, the least and the median, and the median of each round's ratio to shardpar."""
    spent: dict[str, list[float]] = {c.name: [] for c in contestants}
    figures = {}
    for _ in range(rounds):
        for contestant in contestants:
            began = time.process_time()
            found = contestant.run()
            spent[contestant.name].append(time.process_time() - began)
            figures[contestant.name] = contestant.figure(found)
    first = spent[contestants[0].name]
    return [
        {
            "who": name,
            "least_cpu_s": min(times),
            "median_cpu_s": statistics.median(times),
            "shardpar_ratio": statistics.median(a / b for a, b in zip(first, times, strict=True)),
            "figure": figures[name],
        }
        for name, times in spent.items()
    ]


def reading(graph: Graph) -> dict[str, float]:
    """CPU-seconds to read the edges from text; only shardpar checks lines and counts nodes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edges.txt"
        np.savetxt(path, np.stack([graph.sources, graph.targets], 1), fmt="%d")
        found = {}
        for name, run in (
            ("shardpar", read_edges),
            ("pyarrow", arrow_csv),
            ("numpy.loadtxt", loadtxt),
        ):
            began = time.process_time()
            run(path)
            found[name] = time.process_time() - began
    return found


def arrow_csv(path: Path) -> Any:
    return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=" "))


def loadtxt(path: Path) -> np.ndarray:
    return np.loadtxt(path, np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=17, help="the graph has 2**scale nodes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of networkit")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    networkit.setNumberOfThreads(asked.threads)
    graph = rmat(asked.scale, 8 << asked.scale)
    print(f"{graph.num_nodes} nodes, {graph.num_edges} edges")
    results: dict[str, Any] = {}
    for what, contestants in contests(graph, (1e-6, 1e-9)).items():
        slow = what in ("triangles", "label propagation", "Louvain")
        results[what] = measure(contestants, max(1, asked.rounds // 3) if slow else asked.rounds)
        print(f"\n{what}")
        for row in results[what]:
            print(
                f"  {row['who']:<24} {row['median_cpu_s']:8.4f} CPU-s (least "
                f"{row['least_cpu_s']:.4f})  shardpar / it {row['shardpar_ratio']:6.3f}  "
                f"{row['figure']}"
            )
    results["reading"] = reading(graph)
    print("\nreading", ", ".join(f"{name} {s:.2f} CPU-s" for name, s in results["reading"].items()))
    if asked.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
