"""What a user may ask of a run directory; kept apart so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

Preparation: TypeAlias = Literal["none", "imports", "programs"]
"""How far a process goes that stands by for a trainer that dies."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Section `checkpoint` of a config.

    Attributes:
      every_steps: save after each so many steps; 0 saves only at the end.
      every_s: also save when so many seconds have passed; 0 never does.
      keep: how many of the newest checkpoints to keep.
      keep_every_steps: checkpoints of steps divisible by this are never deleted; 0 keeps none.
    """

    every_steps: Annotated[int, Meta(ge=0)] = 100
    every_s: Annotated[float, Meta(ge=0.0)] = 0.0
    keep: Annotated[int, Meta(ge=1)] = 3
    keep_every_steps: Annotated[int, Meta(ge=0)] = 0


@dataclass(frozen=True)
class SuperviseOptions:
    """Section `supervise` of a config: how `shardpar train --supervise` keeps a run alive.

    Attributes:
      heartbeat_s: how often nodes and trainers give a sign of life.
      lost_after_s: a node or a trainer that is silent for so long is lost.
      start_s: how long a trainer may take from its start to its first sign of life.
      join_s: how long the first nodes wait for the others.
      backoff_s: wait before the second restart in a row without progress; doubles each time.
      most_backoff_s: the longest such wait.
      give_up_after: failures in a row without a new checkpoint after which the run ends.
      least_nodes: fewer nodes than this wait for more instead of training.
      standby: keep a second process ready, so that a trainer that dies is replaced sooner: with
        `imports` it has imported everything, with `programs` it has also made the programs, where
        one node trains on CPUs (elsewhere as `imports`). It takes some memory of the host, and no
        accelerator.
    """

    heartbeat_s: Annotated[float, Meta(gt=0.0)] = 2.0
    lost_after_s: Annotated[float, Meta(gt=0.0)] = 30.0
    start_s: Annotated[float, Meta(gt=0.0)] = 300.0
    join_s: Annotated[float, Meta(ge=0.0)] = 60.0
    backoff_s: Annotated[float, Meta(ge=0.0)] = 1.0
    most_backoff_s: Annotated[float, Meta(ge=0.0)] = 60.0
    give_up_after: Annotated[int, Meta(ge=1)] = 5
    least_nodes: Annotated[int, Meta(ge=1)] = 1
    standby: Preparation = "programs"
