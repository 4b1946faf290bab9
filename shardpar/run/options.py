"""What a user may ask of a run directory; kept apart so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta


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
