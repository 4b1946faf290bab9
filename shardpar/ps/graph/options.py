"""What a user may ask of vectors of nodes; kept apart so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from shardpar.run.options import CheckpointOptions

Positive = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]


@dataclass(frozen=True)
class NodeDataOptions:
    """Section `data` of a config that learns vectors of nodes.

    Attributes:
      format: "planted" generates a graph whose nodes lie in groups, with most edges inside them;
        "networkx" is a graph that networkx carries, whose name is `path`; "edges" is a file of
        lines `source target` or `source target weight`, plain or gzip.
      path: the file; or karate_club, les_miserables, florentine_families or davis_southern_women.
      ids: edges: what nodes are; "auto" looks at the first lines.
      weighted: edges: whether the third column is the weight; null looks at the first lines.
      bad_share: edges: share of lines that may be no edges. They are left out and reported.
      nodes: planted: how many.
      groups: planted: of as many nodes each.
      degree: planted: edges of a node, on average.
      across: planted: share of edges that end anywhere.
      seed: of the generated graph, and of which edges are held out.
    """

    format: Literal["planted", "networkx", "edges"] = "planted"
    path: str | None = None
    ids: Literal["auto", "int", "string"] = "auto"
    weighted: bool | None = None
    bad_share: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    nodes: Annotated[int, Meta(ge=4, le=2**31 - 1)] = 2000
    groups: Positive = 20
    degree: Positive = 16
    across: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.05
    seed: Seed = 0


@dataclass(frozen=True)
class NodeCheckpointOptions(CheckpointOptions):
    """Section `checkpoint` of a config that learns vectors of nodes, whose steps take milliseconds.

    Attributes:
      every_steps: save after each so many steps; 0 goes by time alone.
      every_s: also save when so many seconds have passed; 0 never does.
      keep: how many of the newest checkpoints to keep.
      keep_every_steps: checkpoints of steps divisible by this are never deleted; 0 keeps none.
    """

    every_steps: Annotated[int, Meta(ge=0)] = 0
    every_s: Annotated[float, Meta(ge=0.0)] = 300.0


@dataclass(frozen=True)
class NodeTrainOptions:
    """Section `train` of a config that learns vectors of nodes.

    Attributes:
      held_share: of the edges, held out to see whether vectors tell them from pairs that are no
        edges; 0 learns from all of them, and measures nothing.
      score: of a pair: the "dot" product of its vectors, or "hadamard", a logistic regression over
        the product of their coordinates.
      seed: of walks and vectors.
      run_dir: where the run lives; null makes a new directory under runs/.
    """

    held_share: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.2
    score: Literal["dot", "hadamard"] = "dot"
    seed: Seed = 0
    run_dir: str | None = None
