"""What a user may ask of differential privacy; kept apart so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Positive = Annotated[float, Meta(gt=0.0)]


@dataclass(frozen=True)
class PrivacyOptions:
    """Section `privacy` of a config: whose presence is hidden, from whom, and how well.

    Attributes:
      kind: "none". "central": users, from all but the aggregator, which adds the noise.
        "distributed": users, from the aggregator too; clients add the noise under secure
        aggregation. "local": users, from everyone; each client adds all of the noise. "example":
        single records of a client, from everyone; each client trains by DP-SGD.
      epsilon: of the whole job.
      delta: of the whole job; well below one over the number of users, or records.
      clip: the L2 norm an update may have, or with "example" a record's gradient.
      noise_multiplier: of each round, or step; null for the least that the budget allows.
      sampling_rate: with which each user is drawn into a round, or each record into a step,
        independently of all others. 1 where rounds take everyone or a fixed number: a fixed
        number is no Poisson sample and hides no one.
      adaptive_quantile: the share of updates that the clip is to leave alone, which it then follows
        (central and distributed); null keeps the clip.
      ledger: the file that holds what is spent.
    """

    kind: Literal["none", "central", "distributed", "local", "example"] = "none"
    epsilon: Positive = 8.0
    delta: Annotated[float, Meta(gt=0.0, lt=1.0)] = 1e-5
    clip: Positive = 1.0
    noise_multiplier: Positive | None = None
    sampling_rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    adaptive_quantile: Annotated[float, Meta(gt=0.0, lt=1.0)] | None = None
    ledger: str = "privacy.ledger"
