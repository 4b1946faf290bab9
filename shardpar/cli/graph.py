"""`shardpar graph`: algorithms over an edge list; each verb reads one file and writes one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from shardpar.cli.arguments import Devices, Json
from shardpar.cli.later import later

graph = typer.Typer(
    help="PageRank, components, k-core, communities, triangles and common neighbours.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


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
    later("graphs").pagerank(job, tol, damping, restart or [], directed)
