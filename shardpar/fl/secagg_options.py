"""What a user may ask of secure aggregation; kept apart so that reading a config is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from shardpar.errors import ConfigError

Positive = Annotated[float, Meta(gt=0.0)]


@dataclass(frozen=True)
class SecAggOptions:
    """Section `secagg` of a config: whether and how the aggregator is kept from single updates.

    Attributes:
      enabled: masks hide every update; otherwise the aggregator sees each of them.
      threshold: the share of a round's clients that must stay to its end, more than half of them;
        with fewer the round is given up. Fewer than this share of clients, even together
        with the aggregator, learn nothing of the others but their sum.
      neighbours: how many clients each one agrees on masks with; null for all others, which is
        right up to about a hundred clients. Cost per client grows with it. With neighbours, half
        of one client's neighbours, together with the aggregator, could reveal it.
      clip: the largest magnitude of one coordinate of an update, for each unit of weight; what is
        larger is cut.
      most_weight: the largest weight a client may have, for example its number of examples.
      most_loss: the largest loss for each unit of weight.
      bits: of one number in a masked vector; null for as many as the number of clients leaves.
      rounding: to the nearest, which the simulation can repeat; or at random, which keeps means.
      deadline_s: how long the aggregator waits for clients in each of the five phases.
    """

    enabled: bool = False
    threshold: Annotated[float, Meta(gt=0.5, le=1.0)] = 2 / 3
    neighbours: Annotated[int, Meta(ge=2)] | None = None
    clip: Positive = 4.0
    most_weight: Positive = 10_000.0
    most_loss: Positive = 100.0
    bits: Annotated[int, Meta(ge=8, le=31)] | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    deadline_s: Positive = 60.0

    def __post_init__(self) -> None:
        """Checks what a config file's types cannot, for those who build this in Python."""
        if not 0.5 < self.threshold <= 1:
            raise ConfigError(
                f"secagg threshold {self.threshold} must be more than 0.5 and at most 1: with half "
                "of the clients the aggregator could have two different sets unmasked"
            )
        if self.neighbours is not None and self.neighbours < 2:
            raise ConfigError(f"secagg neighbours {self.neighbours} must be 2 or more, or null")

    def stay_to_the_end(self, clients: int) -> int:
        """How many of a round's clients must, in clients.

        >>> SecAggOptions(threshold=0.75).stay_to_the_end(4)
        3
        """
        # 2 / 3 of 6 is 4, not 5 by a rounding error.
        return max(clients // 2 + 1, math.ceil(self.threshold * clients - 1e-9))
