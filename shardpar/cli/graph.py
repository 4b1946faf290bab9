"""`shardpar graph`: algorithms over an edge list; each verb reads one file and writes one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from shardpar.cli.arguments import Devices, Json
from shardpar.cli.later import later
from shardpar.errors import UserError

graph = typer.Typer(
    help="PageRank, components, k-core, communities, triangles and common neighbours.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def _graphs() -> Any:
    """The heavy half of the verbs.

    Raises:
      UserError: what reads edges is not installed.
    """
    try:
        return later("graphs")
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise UserError(
            "edges are read by pyarrow, which is not installed; run: pip install 'shardpar[graph]'"
        ) from None


@dataclass(frozen=True)
class Job:
    """What every verb is told: the file to read, the file to write, and what does the work."""

    edges: str
    out: str
    ids: str
    weighted: bool | None
    bad_share: float
    backend: str
    devices: int | None
    json: bool


Edges = Annotated[
    str,
    typer.Argument(
        metavar="EDGES", help="Lines `source target` or `source target weight`; gzip is fine."
    ),
]
Out = Annotated[
    str,
    typer.Option("--out", metavar="FILE", help="Write the table: .parquet, .csv or .tsv."),
]
Ids = Annotated[
    Literal["auto", "int", "string"],
    typer.Option("--ids", help="What nodes are; auto looks at the first lines."),
]
Weighted = Annotated[
    bool | None,
    typer.Option(
        "--weighted/--unweighted",
        help="Whether the third column is the edge's weight; it is if it holds numbers.",
        show_default=False,
    ),
]
BadShare = Annotated[
    float,
    typer.Option(
        "--bad-share", min=0.0, max=1.0, help="Leave bad lines out, up to this share of all."
    ),
]
BackendOption = Annotated[
    Literal["auto", "scipy", "jax", "igraph", "networkit"],
    typer.Option("--backend", help="What does the work; auto goes by size and what is here."),
]


@graph.command()
def pagerank(
    edges: Edges,
    out: Out,
    tol: Annotated[
        float, typer.Option("--tol", help="The ranks' absolute errors may add up to this.")
    ] = 1e-9,
    damping: Annotated[
        float, typer.Option("--damping", help="Share of steps that follow an edge.")
    ] = 0.85,
    restart: Annotated[
        list[str] | None,
        typer.Option(
            "--restart", metavar="NODE", help="Restart at this node; may be given several times.",
            show_default=False,
        ),
    ] = None,
    directed: Annotated[
        bool, typer.Option("--directed/--undirected", help="Whether edges go one way only.")
    ] = True,
    ids: Ids = "auto",
    weighted: Weighted = None,
    bad_share: BadShare = 0.0,
    backend: BackendOption = "auto",
    devices: Devices = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Rank nodes by how often a random surfer is there. Columns: node, pagerank.

    With --restart it is personalised: the surfer restarts at those nodes only.

    Examples:

        shardpar graph pagerank edges.txt --out ranks.parquet

        shardpar graph pagerank edges.txt.gz --out ranks.csv --undirected --tol 1e-12

        shardpar graph pagerank links.csv --out near_ann.csv --restart ann
    """
    job = Job(edges, out, ids, weighted, bad_share, backend, devices, json)
    _graphs().pagerank(job, tol, damping, restart or [], directed)


@graph.command()
def components(
    edges: Edges,
    out: Out,
    strong: Annotated[
        bool, typer.Option("--strong", help="Edges lead one way only, and there must be one back.")
    ] = False,
    ids: Ids = "auto",
    weighted: Weighted = None,
    bad_share: BadShare = 0.0,
    backend: BackendOption = "auto",
    devices: Devices = None,
    json: Json = False,
) -> None:
    """Find which nodes hang together. Columns: node, component; 0 is the largest.

    Examples:

        shardpar graph components edges.txt --out components.parquet

        shardpar graph components links.tsv --out rings.csv --strong
    """
    job = Job(edges, out, ids, weighted, bad_share, backend, devices, json)
    _graphs().components(job, strong)


@graph.command()
def kcore(
    edges: Edges,
    out: Out,
    ids: Ids = "auto",
    weighted: Weighted = None,
    bad_share: BadShare = 0.0,
    backend: BackendOption = "auto",
    json: Json = False,
) -> None:
    """Find how deep in the core each node is. Columns: node, core.

    A node of core k is among nodes that each have k neighbours or more among them. Edges go both
    ways.

    Examples:

        shardpar graph kcore edges.txt --out cores.parquet
    """
    _graphs().kcore(Job(edges, out, ids, weighted, bad_share, backend, None, json))


@graph.command()
def communities(
    edges: Edges,
    out: Out,
    method: Annotated[
        Literal["louvain", "label-propagation"],
        typer.Option("--method", help="Louvain maximises modularity; labels are faster."),
    ] = "louvain",
    resolution: Annotated[
        float, typer.Option("--resolution", help="Louvain: above 1 for smaller communities.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of what is decided at random.")
    ] = 0,
    ids: Ids = "auto",
    weighted: Weighted = None,
    bad_share: BadShare = 0.0,
    backend: BackendOption = "auto",
    devices: Devices = None,
    json: Json = False,
) -> None:
    """Find groups with many edges inside. Columns: node, community; 0 is the largest.

    Edges go both ways. Louvain needs the extra `graph`.

    Examples:

        shardpar graph communities edges.txt --out communities.parquet

        shardpar graph communities edges.txt --out communities.csv --method label-propagation
    """
    job = Job(edges, out, ids, weighted, bad_share, backend, devices, json)
    _graphs().communities(job, method, resolution, seed)


@graph.command()
def triangles(
    edges: Edges,
    out: Out,
    ids: Ids = "auto",
    weighted: Weighted = None,
    bad_share: BadShare = 0.0,
    backend: BackendOption = "auto",
    json: Json = False,
) -> None:
    """Count triangles at each node. Columns: node, triangles, clustering.

    Clustering is the share of pairs of a node's neighbours that are neighbours of each other.
    Edges go both ways.

    Examples:

        shardpar graph triangles edges.txt --out triangles.parquet
    """
    _graphs().triangles(Job(edges, out, ids, weighted, bad_share, backend, None, json))


@graph.command()
def common_neighbours(
    edges: Edges,
    out: Out,
    pairs: Annotated[
        str | None,
        typer.Option(
            "--pairs", metavar="FILE", help="Pairs of nodes, written as edges are.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option("--top", min=1, help="Keep the pairs that share most.", show_default=False),
    ] = None,
    ids: Ids = "auto",
    weighted: Weighted = None,
    bad_share: BadShare = 0.0,
    json: Json = False,
) -> None:  # fmt: skip
    """Count the neighbours that two nodes share. Columns: source, target, common.

    The pairs are the edges, each once, or those of --pairs. Edges go both ways.

    Examples:

        shardpar graph common-neighbours edges.txt --out common.parquet --top 100

        shardpar graph common-neighbours edges.txt --out common.csv --pairs candidates.txt
    """
    job = Job(edges, out, ids, weighted, bad_share, "auto", None, json)
    _graphs().common_neighbours(job, pairs, top)
