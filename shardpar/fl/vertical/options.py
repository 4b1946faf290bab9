"""What a user may ask of vertical training; both parties must say the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from shardpar.errors import ConfigError

Positive = Annotated[float, Meta(gt=0.0)]
Count = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class KeyOptions:
    """How each party's keys are made.

    Attributes:
      scheme: "paillier"; or "okamoto_uchiyama", about three times faster, whose key is lost to a
        party that sends a single ciphertext of its own making: only between parties that would
        never cheat.
      bits: of the modulus: 2048, or 3072 for what must stay secret beyond 2030.
      processes: that encrypt and multiply; null for one per core.
      unsafe_small_keys_for_tests: allows smaller ones, which hide nothing.
    """

    scheme: Literal["paillier", "okamoto_uchiyama"] = "paillier"
    bits: int = 2048
    processes: Count | None = None
    unsafe_small_keys_for_tests: bool = False


@dataclass(frozen=True)
class LinearOptions:
    """Logistic or linear regression.

    Attributes:
      kind: of regression; on the command line `--model` says it.
      epochs: at most so many passes over the rows.
      batch: rows of a step; the last of an epoch has the rest.
      learning_rate: of gradients averaged over a step's rows.
      momentum: the share of the last change that is added to the next.
      l2: half its product with the weights' squared norm is added to the loss; not for the
        intercept.
      intercept: whether the guest has a weight for no column.
      tolerance: training ends when the weights move less, in L2, over an epoch; the norm is told to
        both parties. 0 tells nothing and trains all epochs.
      sigmoid: "linear", 1/2 + z/4 (as FATE has it); "cubic", 1/2 + 0.197 z - 0.004 z³ (Chen et al.,
        KDD'21), closer for |z| up to 5, at about twice the cost for few columns; it grows wrong
        beyond 7, so learn it slowly.
      seed: of the order of rows, which is no secret.
      feature_bits: fraction bits of scaled columns, which are cut to ±8.
      weight_bits: fraction bits of weights, errors and gradients.
      mask_bits: a mask is so many bits longer than what it hides, so that two values cannot be
        told apart behind it but with an advantage of 2^-mask_bits.
    """

    kind: Literal["logistic", "linear"] = "logistic"
    epochs: Count = 20
    batch: Count = 1024
    learning_rate: Positive = 0.3
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    l2: Annotated[float, Meta(ge=0.0)] = 0.001
    intercept: bool = True
    tolerance: Annotated[float, Meta(ge=0.0)] = 0.001
    sigmoid: Literal["linear", "cubic"] = "linear"
    seed: int = 0
    feature_bits: Annotated[int, Meta(ge=4, le=12)] = 12
    weight_bits: Annotated[int, Meta(ge=16, le=32)] = 32
    mask_bits: Annotated[int, Meta(ge=40, le=128)] = 64

    def __post_init__(self) -> None:
        """Checks what a config file's types cannot, for those who build this in Python."""
        if not 4 <= self.feature_bits <= 12 or not 16 <= self.weight_bits <= 32:
            raise ConfigError(
                f"feature_bits {self.feature_bits} must be 4 to 12 and weight_bits "
                f"{self.weight_bits} 16 to 32: products of more would not fit modulo 2^128"
            )
        if self.mask_bits < 40:
            raise ConfigError(f"mask_bits {self.mask_bits} must be 40 or more, or masks show")
        if self.kind == "linear" and self.sigmoid != "linear":
            raise ConfigError("linear regression has no sigmoid: leave it out")


@dataclass(frozen=True)
class TreeOptions:
    """Gradient-boosted trees.

    Attributes:
      objective: "logistic" for labels 0 and 1, or "squared" for numbers.
      trees: how many.
      max_depth: splits between a root and a leaf, at most.
      learning_rate: with which leaves are multiplied.
      l2: added to the sum of a leaf's second derivatives (lambda).
      min_gain: a split's gain must be above it (gamma).
      min_child_weight: least sum of second derivatives on each side of a split.
      min_samples: least rows on each side.
      max_bins: into which each party sorts a column's numbers, missing ones aside.
      gradient_bits: fraction bits of first and second derivatives.
      optimistic: the guest splits by its own columns before it knows whether the host has a better
        split, and takes it back where it has. It hides waiting, and shows the host the rows of
        splits that are then taken back.
      batch: derivatives that are encrypted and sent at a time.
    """

    objective: Literal["logistic", "squared"] = "logistic"
    trees: Count = 20
    max_depth: Annotated[int, Meta(ge=1, le=30)] = 4
    learning_rate: Positive = 0.3
    l2: Annotated[float, Meta(ge=0.0)] = 1.0
    min_gain: Annotated[float, Meta(ge=0.0)] = 0.0
    min_child_weight: Annotated[float, Meta(ge=0.0)] = 0.001
    min_samples: Count = 1
    max_bins: Annotated[int, Meta(ge=2, le=255)] = 32
    gradient_bits: Annotated[int, Meta(ge=8, le=30)] = 20
    optimistic: bool = True
    batch: Count = 1024

    def __post_init__(self) -> None:
        """Checks what a config file's types cannot, for those who build this in Python."""
        if not 2 <= self.max_bins <= 255 or not 8 <= self.gradient_bits <= 30:
            raise ConfigError(
                f"max_bins {self.max_bins} must be 2 to 255 and gradient_bits "
                f"{self.gradient_bits} 8 to 30"
            )
        if self.trees < 1 or not 1 <= self.max_depth <= 30 or self.min_samples < 1:
            raise ConfigError(
                f"trees {self.trees}, max_depth {self.max_depth} and min_samples "
                f"{self.min_samples} must be 1 or more, max_depth at most 30"
            )
