"""The only contract between the planner and lowering: which layers run where, and how.

Plan > Pipeline > Stage > LayerStrategy. A strategy names mesh axes: the axes of
`tensor` split the layer's heads, hidden dim or vocabulary; those of `fsdp` split
its parameters at rest; every axis that is not in `tensor` splits the data: those of
`context` each sequence, the others the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from shardpar.errors import PlanError
from shardpar.spec.mesh import Axes, Mesh

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "gpipe", "interleaved", "single_jit"]
Attention = Literal["gather", "heads"]
Zero = Literal["none", "pipelines"]

TENSOR_DIMS = ("vocab", "mlp", "heads", "kv_heads", "expert")
"""Logical names that tensor parallelism may split, unless a plan lists others."""


@dataclass(frozen=True)
class LayerStrategy:
    """How some layers run.

    Attributes:
      layers: which, as text: "embed", "blocks[3]", "blocks[0:20]", "embed..blocks[14]".
      tensor: axes of tensor parallelism.
      fsdp: axes that split parameters, gradients and optimizer state (ZeRO-3).
      zero1: axes that split the optimizer state only (ZeRO-1).
      sequence_parallel: between layers, activations are split over `tensor` along
        the sequence (Megatron-LM, arXiv 2205.05198).
      recompute: what the backward computes again: nothing; all but matmul
        results; the whole layer from its input.
      context: axes that split each sequence rather than the batch; they may be in fsdp and
        zero1 too, as the parameters are copies along them.
      attention: where `context` splits the sequence, how queries meet all keys: "gather",
        keys and values are gathered (LLaMA 3, arXiv 2407.21783); "heads", an all-to-all
        changes from split sequences to split heads and back (Ulysses, arXiv 2309.14509).
    """

    layers: str
    tensor: Axes = ()
    fsdp: Axes = ()
    zero1: Axes = ()
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    context: Axes = ()
    attention: Attention = "gather"

    def __post_init__(self) -> None:
        used = (*self.tensor, *self.fsdp, *self.zero1)
        if len(set(used)) != len(used):
            raise PlanError(
                f"layers {self.layers}: an axis is used twice in tensor {list(self.tensor)}, "
                f"fsdp {list(self.fsdp)}, zero1 {list(self.zero1)}; each axis may serve one of them"
            )
        if self.sequence_parallel and not self.tensor:
            raise PlanError(
                f"layers {self.layers}: sequence_parallel splits over the tensor axes, "
                "and there are none; drop it or give tensor axes"
            )
        if self.recompute not in get_args(Recompute):
            raise PlanError(
                f"layers {self.layers}: recompute is {self.recompute!r}; "
                "write none, selective or full"
            )

        both = [axis for axis in self.context if axis in self.tensor]
        if both or len(set(self.context)) != len(self.context):
            raise PlanError(
                f"layers {self.layers}: context {list(self.context)} must name different axes, "
                f"none of them in tensor {list(self.tensor)}"
            )
        if self.attention not in get_args(Attention):
            raise PlanError(
                f"layers {self.layers}: attention is {self.attention!r}; write gather or heads"
            )

    @property
    def gathers(self) -> bool:
        """Whether weights or sequences are gathered inside the layer and not kept so."""
        gathers_keys = bool(self.context) and self.attention == "gather"
        return bool(self.fsdp) or self.sequence_parallel or gathers_keys

    def data_axes(self, mesh: Mesh) -> Axes:
        """The axes that split batch and sequences: all that tensor parallelism does not take."""
        return mesh.without(self.tensor)

    def batch_axes(self, mesh: Mesh) -> Axes:
        """The axes that split the batch."""
        return mesh.without((*self.tensor, *self.context))


@dataclass(frozen=True)
class Stage:
    """Some consecutive layers on some devices.

    `peak_bytes` is the planner's prediction per device; None in a plan written by hand.
    """

    devices: tuple[int, ...]
    mesh: Mesh
    layers: tuple[LayerStrategy, ...]
    peak_bytes: float | None = None

    def __post_init__(self) -> None:
        if len(set(self.devices)) != len(self.devices):
            raise PlanError(f"a stage lists a device twice: {list(self.devices)}")
        if min(self.devices, default=0) < 0:
            raise PlanError(f"a stage lists device {min(self.devices)}; the first device is 0")
        if self.mesh.num_devices != len(self.devices):
            raise PlanError(
                f"a stage has {len(self.devices)} devices but its mesh {self.mesh} holds "
                f"{self.mesh.num_devices}; their numbers must agree"
            )
        if not self.layers:
            raise PlanError(f"the stage on devices {list(self.devices)} has no layers")
        for strategy in self.layers:
            self.mesh.size_of((*strategy.tensor, *strategy.fsdp, *strategy.zero1))
            self.mesh.size_of(strategy.context)


@dataclass(frozen=True)
class Pipeline:
    """Stages that pass micro-batches along, and the share of the global batch they take.

    Attributes:
      sequences: sequences of the global batch this pipeline trains on.
      microbatch: sequences in one micro-batch, over all the first stage's data shards.
      schedule: order of forwards and backwards; where it is interleaved, each group of devices
        holds several stages: stage s is on the devices of stage s - groups. With single_jit
        equal stages go in lockstep in one program (`spec.lockstep`).
      stages: in model order.
    """

    sequences: int
    microbatch: int
    stages: tuple[Stage, ...]
    schedule: Schedule = "1f1b"

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.microbatch < 1:
            raise PlanError(
                f"a pipeline has {self.sequences} sequences in micro-batches of "
                f"{self.microbatch}; both must be at least 1"
            )
        if self.sequences % self.microbatch:
            raise PlanError(
                f"a pipeline's {self.sequences} sequences cannot be cut into micro-batches "
                f"of {self.microbatch}; use a divisor of {self.sequences}"
            )
        if self.schedule not in get_args(Schedule):
            raise PlanError(
                f"schedule is {self.schedule!r}; write 1f1b, gpipe, interleaved or single_jit"
            )
        if not self.stages:
            raise PlanError("a pipeline has no stages")
        if self.schedule == "interleaved":
            self._check_interleaved()
        if self.schedule == "single_jit" and self.num_microbatches % len(self.stages):
            # First and last layers are shared out: each stage does them for its micro-batches.
            raise PlanError(
                f"a single_jit pipeline of {len(self.stages)} stages has {self.num_microbatches} "
                f"micro-batches; use a multiple of {len(self.stages)}"
            )

    def _check_interleaved(self) -> None:
        groups = self.num_groups
        cycle = [s.devices for s in self.stages[:groups]] * self.chunks
        if self.chunks < 2 or cycle != [s.devices for s in self.stages]:
            raise PlanError(
                f"an interleaved pipeline has {len(self.stages)} stages on {groups} groups of "
                f"devices; let stage s be on the devices of stage s - {groups}, at least twice "
                "around, or write schedule: 1f1b"
            )
        for number, stage in enumerate(self.stages[groups:]):
            if stage.mesh != self.stages[number % groups].mesh:
                raise PlanError(
                    f"the stages on devices {list(stage.devices)} have meshes "
                    f"{self.stages[number % groups].mesh} and {stage.mesh}; give them one mesh"
                )
        if self.num_microbatches % groups:
            raise PlanError(
                f"an interleaved pipeline on {groups} groups of devices has "
                f"{self.num_microbatches} micro-batches; use a multiple of {groups}"
            )

    @property
    def num_microbatches(self) -> int:
        """How many micro-batches one step has."""
        return self.sequences // self.microbatch

    @property
    def num_groups(self) -> int:
        """How many groups of devices the stages are on: as many as stages, if not interleaved."""
        if self.schedule != "interleaved":
            return len(self.stages)
        return len({stage.devices for stage in self.stages})

    @property
    def chunks(self) -> int:
        """How many stages each group holds."""
        return len(self.stages) // self.num_groups


@dataclass(frozen=True)
class Objective:
    """What the planner predicted: a step's seconds, a bound no plan beats, and the search's cost.

    `gap` is (step_s - lower_bound_s) / step_s.
    """

    step_s: float
    lower_bound_s: float
    search_s: float

    @property
    def gap(self) -> float:
        """How much better, at most, any other plan of the searched space could be."""
        return max(0.0, (self.step_s - self.lower_bound_s) / self.step_s) if self.step_s else 0.0


@dataclass(frozen=True)
class Plan:
    """A whole plan.

    Attributes:
      cluster: name of the cluster it was made for.
      global_batch: sequences per optimizer step, over all pipelines.
      pipelines: one or more.
      objective: the prediction; None in a plan written by hand.
      tensor_dims: logical dim names that tensor parallelism splits.
      zero: "pipelines", groups of devices that hold copies of a parameter keep its optimizer
        state once between them, a slice each; "none", each group keeps all of it.
    """

    cluster: str
    global_batch: int
    pipelines: tuple[Pipeline, ...]
    objective: Objective | None = None
    tensor_dims: tuple[str, ...] = TENSOR_DIMS
    zero: Zero = "none"

    def __post_init__(self) -> None:
        if not self.pipelines:
            raise PlanError("a plan has no pipelines; give it at least one")
        if self.zero not in get_args(Zero):
            raise PlanError(f"zero is {self.zero!r}; write none or pipelines")
        if self.zero == "pipelines" and len(self.pipelines) == 1:
            raise PlanError(
                "zero: pipelines shares the optimizer state out over pipelines, and there is "
                "one; leave it out, or write zero1 or fsdp in the layers' entries"
            )
        if self.zero == "pipelines" and any(p.schedule == "single_jit" for p in self.pipelines):
            raise PlanError(
                "zero: pipelines is for pipelines in programs of their own, and schedule "
                "single_jit makes one of them; write schedule: 1f1b, or leave zero out"
            )
        shares = [pipeline.sequences for pipeline in self.pipelines]
        if sum(shares) != self.global_batch:
            raise PlanError(
                f"the pipelines take {' + '.join(map(str, shares))} = {sum(shares)} "
                f"sequences, but global_batch is {self.global_batch}"
            )
        devices = self.devices
        if len(set(devices)) != len(devices):
            twice = sorted({d for d in devices if devices.count(d) > 1})
            raise PlanError(f"devices {twice} belong to more than one stage")

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices the plan uses, in stage order."""
        return tuple(d for p in self.pipelines for s in p.stages[: p.num_groups] for d in s.devices)

    @property
    def in_short(self) -> str:
        """How many devices each stage of each pipeline has, such as "2+2 | 1+1+1"."""
        return " | ".join("+".join(str(len(s.devices)) for s in p.stages) for p in self.pipelines)

    def on(self, devices: Sequence[int]) -> Plan:
        """The plan on other devices: what ran on device i runs on `devices[i]`.

        A plan for `cluster.only(kept)` is so turned into one for the cluster itself.

        Raises:
          PlanError: the plan uses a device beyond the last of these.

        >>> from shardpar.spec.mesh import Mesh
        >>> stage = Stage((0, 1), Mesh.factored(2), (LayerStrategy("all"),))
        >>> Plan("c", 1, (Pipeline(1, 1, (stage,)),)).on((4, 7)).devices
        (4, 7)
        """
        missing = [device for device in self.devices if device >= len(devices)]
        if missing:
            raise PlanError(
                f"the plan uses device {missing[0]}, but only {len(devices)} devices are given "
                "to put it on; name one for each that it uses"
            )
        return replace(
            self,
            pipelines=tuple(
                replace(
                    pipeline,
                    stages=tuple(
                        replace(stage, devices=tuple(devices[d] for d in stage.devices))
                        for stage in pipeline.stages
                    ),
                )
                for pipeline in self.pipelines
            ),
        )
