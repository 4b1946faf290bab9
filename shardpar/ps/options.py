"""What a user may ask of training tables; kept apart so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0.0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]


@dataclass(frozen=True)
class TableOptions:
    """Section `table` of a config: how the rows of tables learn, and where they are.

    Attributes:
      optimizer: the rule of the rows; each touches only rows that a step asks for.
      learning_rate: of the rule; FTRL calls it alpha.
      momentum: for momentum.
      nesterov: for momentum.
      initial: for adagrad and rowwise_adagrad: what the sums of squares begin with.
      b1: for adam.
      b2: for adam.
      eps: for adagrad, rowwise_adagrad and adam; null takes the rule's own.
      beta: for ftrl: the larger, the slower rows begin. The paper's 1 is for gradients of single
        samples; here they are of a batch's mean, about a thousandth of that.
      l1: for ftrl: weights with less evidence than this stay 0.
      l2: for ftrl.
      placement: rows dealt over all devices, columns cut over all of them, whole tables on
        every device, or what costs least.
      ids: "rows": ids are rows of the table. "mapped": any id of 64 bits gets a row when it is
        seen, and may lose it to another; see `evict`.
      admit_after: with mapped ids: sightings before an id gets a row.
      evict: with mapped ids: who gives way when rows run out, the least recently used, the
        least frequently used, or nobody.
      ttl_steps: with mapped ids: those not seen for so many steps may go; null keeps them.
      capacity: rows that one device asks of another in one round; null takes twice the mean.
      ragged: only rows that are asked for travel between devices, not equal parts; null does so
        on TPUs. CPUs cannot.
    """

    optimizer: Literal["adagrad", "rowwise_adagrad", "sgd", "momentum", "adam", "ftrl"] = "adagrad"
    learning_rate: Rate = 0.05
    momentum: Share = 0.9
    nesterov: bool = False
    initial: Annotated[float, Meta(ge=0.0)] = 0.0
    b1: Share = 0.9
    b2: Share = 0.999
    eps: Rate | None = None
    beta: Annotated[float, Meta(ge=0.0)] = 0.001
    l1: Annotated[float, Meta(ge=0.0)] = 0.0
    l2: Annotated[float, Meta(ge=0.0)] = 0.0
    placement: Literal["auto", "rows", "columns", "replicated"] = "auto"
    ids: Literal["rows", "mapped"] = "rows"
    admit_after: Positive = 1
    evict: Literal["lru", "lfu", "never"] = "lru"
    ttl_steps: Positive | None = None
    capacity: Positive | None = None
    ragged: bool | None = None


@dataclass(frozen=True)
class DenseOptions:
    """Section `optimizer` of a config that trains tables: the rule of all other parameters.

    Attributes:
      name: the optax rule.
      learning_rate: constant.
      momentum: for sgd.
      b1: for adam.
      b2: for adam.
    """

    name: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: Rate = 1e-3
    momentum: Share = 0.0
    b1: Share = 0.9
    b2: Share = 0.999


@dataclass(frozen=True)
class ServerOptions:
    """Section `ps` of a config: servers and workers in processes of their own, on Ray.

    Attributes:
      servers: processes that hold the rows; 0 trains in this one, on all of its devices.
      workers: processes that run the model, each on its share of every batch.
      consistency: 'bsp': all take each step together; 'ssp(N)': a worker may be N steps ahead
        of the slowest; 'asp': nobody waits.
      delay_scaled: divide an update by how many rounds old its rows were; for ssp and asp.
      deal: rows to servers in turns, or in ranges.
      cache_rows: of each table that a worker keeps; 0 for no cache.
      pull_bound: updates that a kept row may lack when a step reads it.
      push_bound: updates of a kept row that may wait before servers get them.
      evict: which kept row gives way, the least recently or the least frequently used.
      snapshot_every: updates between two snapshots of a server; each update is in its log.
      fsync: when a log is forced to the disk, which only matters where a whole machine fails.
      patience_s: how long a process may be away before training fails.
      restarts: how often each worker may be killed.
      address: of a Ray cluster that is running, "auto" for this machine's; null starts Ray here.
    """

    servers: Natural = 0
    workers: Positive = 2
    consistency: str = "bsp"
    delay_scaled: bool = False
    deal: Literal["turns", "ranges"] = "turns"
    cache_rows: Natural = 0
    pull_bound: Natural = 0
    push_bound: Natural = 0
    evict: Literal["lru", "lfu"] = "lru"
    snapshot_every: Positive = 10_000
    fsync: Literal["each", "second", "never"] = "never"
    patience_s: Rate = 120.0
    restarts: Natural = 10
    address: str | None = None


@dataclass(frozen=True)
class SparseTrainOptions:
    """Section `train` of a config that trains tables.

    Attributes:
      epochs: passes over the data.
      steps: to stop after, if that is earlier; null does all epochs.
      global_batch: samples per step over all devices.
      eval_every: evaluate after each so many steps; 0 only at the end.
      log_every: steps between two lines for people.
      full_every: each so many saves all rows are written; in between only those touched since.
      seed: of rows and parameters.
      run_dir: where the run lives; null makes a new directory under runs/.
    """

    epochs: Positive = 1
    steps: Positive | None = None
    global_batch: Positive = 4096
    eval_every: Natural = 0
    log_every: Positive = 20
    full_every: Positive = 1
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    run_dir: str | None = None
