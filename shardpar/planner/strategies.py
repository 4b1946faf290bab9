"""What the first planner may choose: one strategy for all layers, its degrees and micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardpar.planner.options import SearchOptions
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Recompute
from shardpar.spec.select import every_layer


@dataclass(frozen=True)
class Candidate:
    """One uniform choice: the strategy of every layer and the sequences per micro-batch."""

    strategy: LayerStrategy
    microbatch: int

    def describe(self, mesh: Mesh) -> str:
        """As people write it: "dp2 fsdp2 tp2 sp, recompute full, micro-batch 8"."""
        s = self.strategy
        plain = mesh.without((*s.tensor, *s.fsdp, *s.zero1))
        degrees = [
            f"{name}{mesh.size_of(axes)}"
            for name, axes in (
                ("dp", plain), ("zero", s.zero1), ("fsdp", s.fsdp), ("tp", s.tensor)
            )
            if axes
        ] or ["one device"]  # fmt: skip
        text = " ".join(degrees) + (" sp" if s.sequence_parallel else "")
        if s.recompute != "none":
            text += f", recompute {s.recompute}"
        return f"{text}, micro-batch {self.microbatch}"


def candidates(
    graph: LayerGraph, mesh: Mesh, global_batch: int, options: SearchOptions
) -> Iterator[Candidate]:
    """Every uniform choice that the user's pins allow.

    Tensor parallelism takes the innermost axes, where links are fastest; fsdp the
    next; plain data parallelism the outermost.

    Args:
      graph: the model; its layers give the selector and the sequence length.
      mesh: the stage's mesh.
      global_batch: sequences per step.
      options: pinned degrees are kept, the others enumerated.
    """
    selector = every_layer(graph)
    names = mesh.names
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    for tensor_from in range(len(names), -1, -1):
        tensor = names[tensor_from:]
        if not _allowed(options.tensor, mesh.size_of(tensor)):
            continue
        shards = mesh.size_of(names[:tensor_from])
        for fsdp_from in range(tensor_from, -1, -1):
            fsdp, data = names[fsdp_from:tensor_from], names[:fsdp_from]
            if not _allowed(options.fsdp, mesh.size_of(fsdp)):
                continue
            if not _allowed(options.data, mesh.size_of(data)):
                continue
            for parallel in (True, False) if tensor else (False,):
                if tensor and options.sequence_parallel not in (None, parallel):
                    continue
                for recompute in recomputes:
                    if options.recompute not in (None, recompute):
                        continue
                    strategy = LayerStrategy(selector, tensor, fsdp, (), parallel, recompute)
                    for microbatch in _microbatches(global_batch, shards, options):
                        yield Candidate(strategy, microbatch)


def _allowed(pinned: int | None, degree: int) -> bool:
    return pinned is None or pinned == degree


def _microbatches(global_batch: int, shards: int, options: SearchOptions) -> list[int]:
    """Micro-batches over all shards, largest first."""
    if options.microbatch is not None:
        size = options.microbatch * shards
        return [size] if global_batch % size == 0 else []
    return [
        size
        for size in range(global_batch, 0, -1)
        if global_batch % size == 0 and size % shards == 0
    ]
