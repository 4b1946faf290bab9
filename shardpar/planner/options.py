"""What a user may ask of the planner; kept apart so that reading a config is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from msgspec import Meta

from shardpar.errors import SpecError

Degree = Annotated[int, Meta(ge=1)]


PINS = (
    "data", "fsdp", "tensor", "zero1", "sequence_parallel", "recompute", "context", "attention",
    "microbatch", "stages", "pipelines", "zero", "fix",
)  # fmt: skip
"""Keys of `SearchOptions` that take a choice from the planner."""


@dataclass(frozen=True)
class SearchOptions:
    """Section `plan` of a config.

    Attributes:
      file: a plan to use as it is, instead of searching.
      cluster: a cluster file to plan for; None plans for the devices at hand.
      memory_fraction: share of a device's memory the plan may fill.
      data, fsdp, tensor: pin a degree for all layers; None lets each layer have its own.
        `data` counts all copies of the parameters at rest, those of zero1 included.
      zero1: pin the degree to which the optimizer state alone is split.
      sequence_parallel: pin Megatron sequence parallelism on or off.
      recompute: pin the recompute choice.
      context: pin the degree to which each sequence is split; None splits sequences where a
        micro-batch has too few for the devices.
      attention: pin how queries meet the keys of other devices then: gather or heads.
      microbatch: sequences per data shard that go through the model at once;
        None lets the planner choose.
      stages: pin the number of pipeline stages; None lets the planner choose.
      schedule: of several stages: 1f1b, programs of stages; single_jit, equal stages in one
        program; fastest, single_jit where it is predicted to take less time than what is found
        otherwise. The certified gap speaks of 1f1b alone.
      pipelines: over unequal devices, 1 for a single pipeline, 2 for two or more; None
        lets the planner choose.
      zero: over unequal devices, whether pipelines keep the optimizer state once between them:
        pipelines or none; None lets the planner choose.
      fix: pin some layers by hand, the rest is completed:
        "blocks[0:4] tensor=2 recompute=full; head fsdp=1".
      epsilon: how far from the best a plan may be, as a share of its step; the gap
        in the plan says how far it can be at most.
      rescore: how many of the best plans by the formula are played event by event; the one
        whose simulated step is the shortest is taken. With 1 the formula decides alone.
      interleave: whether those are tried with two stages on each group of devices, too; not
        where `stages` or `fix` pins what is on a group.
    """

    file: str | None = None
    cluster: str | None = None
    memory_fraction: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.9
    data: Degree | None = None
    fsdp: Degree | None = None
    tensor: Degree | None = None
    zero1: Degree | None = None
    sequence_parallel: bool | None = None
    recompute: Literal["none", "selective", "full"] | None = None
    context: Degree | None = None
    attention: Literal["gather", "heads"] | None = None
    microbatch: Degree | None = None
    stages: Degree | None = None
    schedule: Literal["1f1b", "single_jit", "fastest"] = "1f1b"
    pipelines: Annotated[int, Meta(ge=1, le=2)] | None = None
    zero: Literal["none", "pipelines"] | None = None
    fix: str | None = None
    epsilon: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    rescore: Degree = 8
    interleave: bool = True

    def without_pins(self) -> SearchOptions:
        """The same search, free to choose again: for other devices than the pins were for.

        >>> free = SearchOptions(tensor=2, file="plan.yaml", epsilon=0.1).without_pins()
        >>> free == SearchOptions(epsilon=0.1)
        True
        """
        schedule = "fastest" if self.schedule == "single_jit" else self.schedule
        free: dict[str, Any] = dict.fromkeys(PINS)
        return replace(self, file=None, schedule=schedule, **free)


@dataclass(frozen=True)
class StragglerOptions:
    """When a device counts as slow.

    Attributes:
      every_s: seconds between two probes of all devices while training; 0 never probes. Virtual
        devices, which share cores, are not probed.
      factor: how many times longer than predicted a device takes, to be called slow; also by how
        much its speed must change to be reported anew.
      recovered: below this factor, which counts as `factor` at most, a slow device is called
        well again; between the two it stays what it is called, so that it does not change back
        and forth.
      for_s: seconds for which all readings must say the same.
      relative: whether times are compared with the other devices' as well: a prediction that is
        wrong for all by the same factor then makes none of them slow.
    """

    every_s: Annotated[float, Meta(ge=0.0)] = 60.0
    factor: Annotated[float, Meta(gt=1.0)] = 1.3
    recovered: Annotated[float, Meta(ge=1.0)] = 1.1
    for_s: Annotated[float, Meta(ge=0.0)] = 30.0
    relative: bool = True

    def __post_init__(self) -> None:
        if not (1 < self.factor < math.inf and 1 <= self.recovered < math.inf):
            raise SpecError(
                f"stragglers: factor is {self.factor} and recovered {self.recovered}; write "
                "numbers above 1"
            )
        if not 0 <= self.for_s < math.inf:
            raise SpecError(f"stragglers: for_s is {self.for_s}; write seconds, 0 or more")


@dataclass(frozen=True)
class ReplanOptions:
    """What a change of plan costs besides moving the state, and for how long it must pay off.

    Attributes:
      horizon_steps: steps that the machines are expected to stay as they are.
      compile_s: seconds to compile and start another plan's programs.
      restore_bandwidth: bytes per second at which a checkpoint is read, all devices together.
    """

    horizon_steps: Annotated[int, Meta(ge=1)] = 1000
    compile_s: Annotated[float, Meta(ge=0.0)] = 30.0
    restore_bandwidth: Annotated[float, Meta(gt=0.0)] = 1e9

    def __post_init__(self) -> None:
        if self.horizon_steps < 1:
            raise SpecError(f"replan: horizon_steps is {self.horizon_steps}; write 1 or more")
        if not 0 <= self.compile_s < math.inf:
            raise SpecError(f"replan: compile_s is {self.compile_s}; write seconds, 0 or more")
        if not 0 < self.restore_bandwidth < math.inf:
            raise SpecError(
                f"replan: restore_bandwidth is {self.restore_bandwidth}; write bytes per second, "
                "more than 0"
            )
