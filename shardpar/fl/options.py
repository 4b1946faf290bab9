"""What a user may ask of a federation; kept apart so that reading a config is quick.

The sections `privacy` and `secagg` are in `privacy_options` and `secagg_options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Decay = Annotated[float, Meta(ge=0.0, lt=1.0)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Seconds = Annotated[float, Meta(gt=0.0)]

AlgorithmName: TypeAlias = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "fednova",
    "ditto", "fedbuff", "median", "trimmed_mean", "krum",
]  # fmt: skip

SEES_EACH = frozenset({"median", "trimmed_mean", "krum"})
"""Algorithms whose server must see every single update; sums are not enough for them."""


@dataclass(frozen=True)
class FederatedOptions:
    """Section `federated` of a config: which algorithm, and what a round is.

    Attributes:
      algorithm: by its paper's name; a key below that it has no use for is passed over.
      rounds: how many; of fedbuff, steps of the server.
      cohort: clients of a round, drawn without replacement; null takes all. With privacy.kind
        "central" and a privacy.sampling_rate below 1 each client is drawn by itself instead.
      epochs: passes of a client over its examples in a round.
      batch: examples to a client's step.
      learning_rate: of the clients' steps.
      momentum: of the clients' steps, which begin without any in every round; not for scaffold.
      server_learning_rate: by how much of the mean difference the global model moves; null is 1,
        and 0.03 for fedadam, fedyogi and fedadagrad.
      server_momentum: for fedavgm.
      mu: pull towards the global model, for fedprox and ditto; null is 0.01 and 0.1.
      b1: decay of the server's first moment, for fedadam, fedyogi and fedadagrad.
      b2: decay of its second moment, for fedadam and fedyogi.
      tau: for fedadam, fedyogi and fedadagrad: added to the root of the second moment.
      trim: for trimmed_mean: the share of clients cut off at either end of each coordinate.
      byzantine: for krum: how many clients of a round may be wrong.
      chosen: for krum: how many updates are believed and averaged.
      buffer: for fedbuff: updates to a step of the server.
      staleness_exponent: for fedbuff: an update of a model that is s steps old counts
        (1 + s)^-exponent.
      concurrency: for fedbuff in a simulation: how many clients train at any time.
      training_s: for fedbuff in a simulation: median seconds that a client takes for its round.
      training_spread: for fedbuff in a simulation: times are lognormal, and this is the standard
        deviation of their logarithm; 0 makes all alike.
      chunk: clients that a device of a simulation trains at once; null is 1 on a CPU, else 16.
      seed: of the model, of cohorts, and of the order in which clients read their examples.
    """

    algorithm: AlgorithmName = "fedavg"
    rounds: Positive = 20
    cohort: Positive | None = None
    epochs: Positive = 1
    batch: Positive = 20
    learning_rate: Rate = 0.1
    momentum: Decay = 0.0
    server_learning_rate: Rate | None = None
    server_momentum: Decay = 0.9
    mu: NotNegative | None = None
    b1: Decay = 0.9
    b2: Decay = 0.99
    tau: Rate = 1e-3
    trim: Annotated[float, Meta(ge=0.0, lt=0.5)] = 0.1
    byzantine: Natural = 1
    chosen: Positive = 1
    buffer: Positive = 10
    staleness_exponent: NotNegative = 0.5
    concurrency: Positive = 20
    training_s: Seconds = 60.0
    training_spread: NotNegative = 0.5
    chunk: Positive | None = None
    seed: Seed = 0


@dataclass(frozen=True)
class FederatedDataOptions:
    """Section `data` of a config of a federation: whose examples are whose.

    Attributes:
      format: "digits" is scikit-learn's handwritten digits (extra `demo`), dealt to clients; fields
        `inputs` float32 [64] in 0 … 1 and `labels`. "clients" is a folder of your own; see
        `shardpar.fl.clients`.
      path: for "clients": the folder, with one `.npy` file per field and `offsets.npy`.
      eval_path: for "clients": a folder of the same form, to evaluate on; null evaluates nothing.
      clients: for "digits": among how many the examples are dealt.
      partition: for "digits": "iid" deals at random. "dirichlet" draws each label's shares from
        Dirichlet(alpha). "shards" sorts by label, cuts, and deals each client a few pieces.
      alpha: for "dirichlet": the smaller, the more unlike clients are.
      shards: for "shards": pieces to a client.
      held_share: for "digits": share of the examples that nobody trains on, to evaluate on.
      seed: of the deal.
    """

    format: Literal["digits", "clients"] = "digits"
    path: str | None = None
    eval_path: str | None = None
    clients: Positive = 10
    partition: Literal["iid", "dirichlet", "shards"] = "dirichlet"
    alpha: Rate = 0.5
    shards: Positive = 2
    held_share: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.2
    seed: Seed = 0


@dataclass(frozen=True)
class FederatedTrainOptions:
    """Section `train` of a config of a federation; section `checkpoint` counts rounds as steps.

    Attributes:
      eval_every: evaluate after each so many rounds; 0 only at the end.
      run_dir: where the run lives; null makes a new directory under runs/.
    """

    eval_every: Natural = 1
    run_dir: str | None = None


@dataclass(frozen=True)
class NetOptions:
    """Section `net` of a config: who the parties of a deployment are and how they meet.

    Attributes:
      topology: "coordinated": parties send to the aggregator. "ring": there is none; sums go round
        the parties.
      parties: names of the clients, in the order in which they are numbered and added up.
      aggregator: its name; a ring has none.
      addresses: 'NAME=HOST:PORT' for each that others dial: the aggregator, and in a ring all
        parties. Port 0 takes a free one, where one command starts all of them.
      certificates: the folder with what `shardpar fl keys` makes, or your own.
      job: names this federation; messages of another one are refused.
      lost: what becomes of a party that does not answer: "drop" goes on without it, down to the
        threshold; "wait" waits for it up to wait_s.
      join_s: how long the first parties wait for the others.
      round_s: how long a client may take for its part of a round.
      wait_s: for lost="wait".
      patience_s: how long a party that was there may be unreachable in a round before it is lost.
      retry_s: wait before the second attempt to reach a party; doubles each time.
      most_retry_s: the longest such wait.
      max_message_bytes: a longer message is refused.
    """

    topology: Literal["coordinated", "ring"] = "coordinated"
    parties: tuple[str, ...] = ()
    aggregator: str = "aggregator"
    addresses: tuple[str, ...] = ()
    certificates: str = "keys"
    job: str = "federation"
    lost: Literal["drop", "wait"] = "drop"
    join_s: Seconds = 120.0
    round_s: Seconds = 600.0
    wait_s: Seconds = 600.0
    patience_s: Seconds = 30.0
    retry_s: Seconds = 0.5
    most_retry_s: Seconds = 10.0
    max_message_bytes: Annotated[int, Meta(ge=1024)] = 1 << 30

    def address_of(self) -> Mapping[str, str]:
        """HOST:PORT by name.

        >>> NetOptions(addresses=("aggregator=10.0.0.1:7400",)).address_of()
        {'aggregator': '10.0.0.1:7400'}
        """
        split = (text.partition("=") for text in self.addresses)
        return {name: address for name, _, address in split}
