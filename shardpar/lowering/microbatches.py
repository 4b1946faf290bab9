"""What every program has of a batch: the traced loss of one micro-batch, and its arrays' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from shardpar.capture.cut import CutProgram, cut
from shardpar.capture.trace import Captured
from shardpar.errors import CaptureError, PlanError
from shardpar.lowering.elsewhere import placed
from shardpar.lowering.options import ProgramOptions
from shardpar.spec.plan import Pipeline

SCAN_FROM = 8
"""With layers="auto", chains of so many equal layers become a loop."""


def traced(
    captured: Captured, pipeline: Pipeline, options: ProgramOptions, *, training: bool
) -> CutProgram:
    """The loss of one micro-batch of a pipeline, cut at its layers."""
    microbatch = {
        name: jax.ShapeDtypeStruct((pipeline.microbatch, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in captured.batch.items()
    }
    return cut(
        captured.model,
        captured.loss,
        microbatch,
        compute_dtype=options.compute_dtype,
        training=training,
    )


def shortest_loop(options: ProgramOptions) -> int:
    """Chains of at least so many equal layers become a loop.

    >>> [shortest_loop(ProgramOptions(layers=layers)) for layers in ("scan", "auto")]
    [2, 8]
    """
    return {"scan": 2, "auto": SCAN_FROM, "unroll": 1 << 30}[options.layers]


def require_batch(batch: Mapping[str, Any], shapes: Mapping[str, Any], sequences: int) -> None:
    """Refuses a batch that is not what a program was made for.

    Args:
      batch: arrays whose dim 0 counts sequences.
      shapes: of the captured batch; only dim 0 may differ.
      sequences: how many there must be.

    Raises:
      CaptureError: an array is missing.
      PlanError: an array has another shape.
    """
    for name, spec in shapes.items():
        if name not in batch:
            raise CaptureError(f'the batch has no "{name}"; it has {", ".join(batch)}')
        want = (sequences, *spec.shape[1:])
        if tuple(batch[name].shape) != want:
            raise PlanError(
                f'batch["{name}"] has shape {tuple(batch[name].shape)}; this program was made for '
                f"{want}"
            )


def placed_batch(
    batch: Mapping[str, Any],
    shapes: Mapping[str, Any],
    sequences: int,
    cut_in: int | None,
    sharding: NamedSharding,
) -> dict[str, jax.Array]:
    """A batch on devices, for programs that take all of its micro-batches at once.

    Args:
      batch: arrays whose dim 0 counts sequences; others than the program's are left out.
      shapes: of the captured batch.
      sequences: how many there must be.
      cut_in: micro-batches that it is cut into, a dim of their own; None does not cut.
      sharding: of each array, that dim included.

    Raises:
      CaptureError: an array is missing.
      PlanError: an array's first dim is not what the plan expects.
    """
    require_batch(batch, shapes, sequences)
    cut_up = {name: batch[name] for name in shapes}
    if cut_in is not None:
        dims = (cut_in, sequences // cut_in)
        cut_up = {name: x.reshape(*dims, *x.shape[1:]) for name, x in cut_up.items()}
    arrays = placed(list(cut_up.values()), [sharding] * len(cut_up))
    return dict(zip(cut_up, arrays, strict=True))
