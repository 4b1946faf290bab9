"""What a user may ask of the lowered program; kept apart so that reading a config is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta


@dataclass(frozen=True)
class ProgramOptions:
    """Section `program` of a config.

    Attributes:
      compute_dtype: dtype of parameters and activations inside the model; master
        weights, gradients' accumulation and the optimizer stay float32.
      layers: "scan" runs equal consecutive layers in one loop (compiles fast),
        "unroll" writes each out (runs a little faster on few layers), "auto"
        scans runs of eight and more.
      gradient_clip: largest global norm of the gradient; None does not clip.
      skip_nonfinite: leave the state untouched when a gradient is not finite.
    """

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["auto", "scan", "unroll"] = "auto"
    gradient_clip: Annotated[float, Meta(gt=0.0)] | None = 1.0
    skip_nonfinite: bool = True
