"""What a model is to the planner: layers in order, their parameters, activations and costs.

Equal layers share one `LayerClass`, so a model of eighty equal blocks is priced as one block.
Costs are for `LayerGraph.batch` sequences, forward and backward over the whole batch on
one device; they scale with the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from shardpar.errors import SpecError

OUTSIDE = "outside"
"""Name of the layer that stands for what the model computes outside marked layers."""

DTYPE_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


def _require_known(dtype: str, what: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise SpecError(
            f"{what} has dtype {dtype}, whose bytes are unknown; write one of "
            f"{', '.join(DTYPE_BYTES)}"
        )


@dataclass(frozen=True)
class Parameter:
    """One parameter of a layer class.

    Attributes:
      name: its path inside the layer, "norm1.scale".
      shape, dtype: of the stored master copy.
      dims: a logical name per dim, the way Flax annotates them, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise SpecError(
                f"parameter {self.name}: {len(self.dims)} logical names {self.dims} "
                f"for shape {self.shape}; give one name or None per dim"
            )
        _require_known(self.dtype, f"parameter {self.name}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole stored parameter."""
        return self.size * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Activation:
    """An array that enters or leaves a layer.

    `batch_dim` and `sequence_dim` are the dims that grow with the batch and with
    the sequence length, found by tracing twice; None where there is none.
    """

    shape: tuple[int, ...]
    dtype: str
    batch_dim: int | None = None
    sequence_dim: int | None = None

    def __post_init__(self) -> None:
        _require_known(self.dtype, f"an activation of shape {self.shape}")

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Product:
    """A matrix product of two activations, as attention's two are.

    Attributes:
      keys: the operand along whose sequence every query looks: the keys, or the values;
        None where no sequence takes part, which leaves the rest without meaning.
      query_dim: the other operand's dim along the queries.
      key_dim: the dim of `keys` along its sequence.
      batch, heads: which of the product's batch dims these are; heads None if there are none.
      scores: whether the result has a place for each query and key, as the first product has;
        otherwise it adds up over the keys.
      num_heads: of the dim of heads; keys and queries in groups count the groups.
      moved_bytes: what changes from sequence to heads if devices split the heads here.
      key_bytes: of the operand `keys`.
    """

    keys: Literal["left", "right"] | None = None
    query_dim: int = 0
    key_dim: int = 0
    batch: int = 0
    heads: int | None = None
    scores: bool = False
    num_heads: int = 1
    moved_bytes: float = 0.0
    key_bytes: float = 0.0


@dataclass(frozen=True)
class LayerClass:
    """What equal layers have in common.

    Attributes:
      name: the decorated class, numbered when one class has several shapes: "Block", "Block#2".
      parameters: its own parameters.
      tied: parameters it reads but another layer owns.
      inputs, outputs: activations across its border.
      forward_flops, backward_flops: from XLA's cost analysis of the compiled layer.
      forward_bytes, backward_bytes: bytes XLA says it reads and writes.
      saved_bytes: what the forward keeps for the backward, parameters and inputs left
        out, per recompute choice: none, selective, and maybe gathered, which is none
        where gathered weights must not be kept.
      temp_bytes: scratch of the compiled forward and backward together, one layer at a time.
      matmul_flops: the forward's matrix products alone, counted from their shapes.
      attention_flops: those of them between two activations, as attention's are.
      whole_bytes: of saved_bytes, what tensor parallelism does not split, by the same keys.
      scratch_bytes: scratch of the backward in a chain of such layers, by recompute choice
        (none, selective, full), as the target's compiler allots it; empty where unknown.
      fixed_bytes: of scratch_bytes or temp_bytes, what does not grow with the batch, by the
        same keys.
      views_bytes: views of its weights, which the forward keeps for the backward where
        recompute is none and nothing is gathered; they do not grow with the batch either.
      products: of two activations, in the order they are computed; None where they are not
        known, so that the sequence cannot be split inside.
    """

    name: str
    parameters: tuple[Parameter, ...]
    tied: tuple[Parameter, ...]
    inputs: tuple[Activation, ...]
    outputs: tuple[Activation, ...]
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    saved_bytes: tuple[tuple[str, float], ...]
    temp_bytes: float
    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    whole_bytes: tuple[tuple[str, float], ...] = ()
    scratch_bytes: tuple[tuple[str, float], ...] = ()
    products: tuple[Product, ...] | None = None
    fixed_bytes: tuple[tuple[str, float], ...] = ()
    views_bytes: float = 0.0

    def __post_init__(self) -> None:
        known = [recompute for recompute, _ in self.saved_bytes]
        if sorted(set(known) - {"gathered"}) != ["none", "selective"]:
            raise SpecError(
                f"layer class {self.name}: saved_bytes has {', '.join(known) or 'nothing'}; "
                "write the bytes for none and for selective"
            )

    @property
    def num_parameters(self) -> int:
        """Elements of its own parameters."""
        return sum(parameter.size for parameter in self.parameters)

    @property
    def input_bytes(self) -> int:
        """Bytes of the activations that enter: what full recompute keeps."""
        return sum(a.num_bytes for a in self.inputs if a.batch_dim is not None)

    def saved(self, recompute: str, gathers: bool = False) -> float:
        """Bytes kept for the backward, its input included, under a recompute choice.

        Args:
          recompute: none, selective or full.
          gathers: weights or sequences are gathered inside and not kept so.
        """
        return self.input_bytes + self._of(self.saved_bytes, recompute, gathers)

    def whole(self, recompute: str, gathers: bool = False) -> float:
        """Of `saved`, the input left out, what tensor parallelism does not split."""
        return self._of(self.whole_bytes, recompute, gathers)

    def scratch(self, recompute: str) -> float:
        """Bytes alive only while the layer's backward runs."""
        return dict(self.scratch_bytes).get(recompute, self.temp_bytes)

    def fixed(self, recompute: str) -> float:
        """Of `scratch`, what does not grow with the batch: it follows the weights."""
        return dict(self.fixed_bytes).get(recompute, 0.0)

    def _of(self, table: tuple[tuple[str, float], ...], recompute: str, gathers: bool) -> float:
        known = dict(table)
        if recompute == "none" and gathers and "gathered" in known:
            return known["gathered"]
        return 0.0 if recompute == "full" else known.get(recompute, 0.0)


@dataclass(frozen=True)
class Layer:
    """One call of a layer: its name in plans, the path of its parameters, its class.

    `tied` maps the class's tied parameters to the full names of the ones it reads.
    """

    name: str
    path: str
    class_name: str
    tied: tuple[tuple[str, str], ...] = ()

    def parameter_name(self, parameter: Parameter) -> str:
        """Full name of one of the layer's own parameters: "blocks.3.norm1.scale"."""
        return f"{self.path}.{parameter.name}" if self.path else parameter.name


@dataclass(frozen=True)
class LayerGraph:
    """A captured model.

    Attributes:
      model: a name for people.
      batch: sequences the costs are for.
      tokens: elements of the largest integer input, per batch: what "tokens/s" counts.
      compute_dtype: dtype the costs were taken in.
      classes, layers: as above; layers in the order the program runs them.
      causal: whether attention is masked above the diagonal, which halves the FLOPs MFU counts.
    """

    model: str
    batch: int
    tokens: int
    compute_dtype: str
    classes: tuple[LayerClass, ...]
    layers: tuple[Layer, ...]
    causal: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise SpecError(
                f"graph of {self.model}: batch is {self.batch} and tokens {self.tokens}; "
                "both must be at least 1"
            )
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise SpecError(
                f"two layers have one name: {sorted(n for n in names if names.count(n) > 1)}"
            )
        for layer in self.layers:
            if layer.class_name not in self._by_name:
                raise SpecError(f'layer {layer.name}: there is no layer class "{layer.class_name}"')

    @cached_property
    def _by_name(self) -> dict[str, LayerClass]:
        return {c.name: c for c in self.classes}

    def class_of(self, layer: Layer) -> LayerClass:
        """The class of a layer."""
        return self._by_name[layer.class_name]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters; a tied one counts once."""
        return sum(self.class_of(layer).num_parameters for layer in self.layers)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of one token, forward and backward: what MFU counts.

        Matrix products only, recompute left out; of a causal model's attention,
        half is left out, as it is masked.
        """
        total = 0.0
        for layer in self.layers:
            cls = self.class_of(layer)
            total += cls.matmul_flops - (cls.attention_flops / 2 if self.causal else 0.0)
        return 3 * total / self.tokens

    @property
    def parameters(self) -> tuple[tuple[str, Layer, Parameter], ...]:
        """(full name, owning layer, parameter) of every parameter, in layer order."""
        return tuple(
            (layer.parameter_name(p), layer, p)
            for layer in self.layers
            for p in self.class_of(layer).parameters
        )
