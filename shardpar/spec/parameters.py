"""How a strategy lays out a parameter, its gradient and its optimizer state.

The planner counts bytes with these layouts and lowering builds shardings from
them, so both speak of the same pieces.
"""

from __future__ import annotations

from shardpar.errors import PlanError
from shardpar.spec.graph import Activation, Parameter
from shardpar.spec.mesh import Axes, GroupLayout, Mesh
from shardpar.spec.plan import TENSOR_DIMS, LayerStrategy

FSDP_MIN_SIZE = 2**14
"""Smaller parameters stay whole under fsdp: gathering them costs more than they weigh."""


def parameter_layout(
    parameter: Parameter,
    strategy: LayerStrategy,
    mesh: Mesh,
    tensor_dims: tuple[str, ...] = TENSOR_DIMS,
) -> GroupLayout:
    """The layout of a parameter at rest.

    `tensor` axes split the first dim whose logical name is in `tensor_dims`;
    `fsdp` axes split the largest other dim they divide.

    Raises:
      PlanError: if the tensor axes do not divide that dim.

    >>> up = Parameter("up", (256, 1024), "float32", ("embed", "mlp"))
    >>> s = LayerStrategy("blocks", tensor=("b",), fsdp=("a",))
    >>> str(parameter_layout(up, s, Mesh.factored(4)))
    'dim0/a dim1/b'
    """
    layout = compute_layout(parameter, strategy, mesh, tensor_dims)
    if parameter.size < FSDP_MIN_SIZE:
        return layout
    return _split_largest(parameter, layout, strategy.fsdp)


def compute_layout(
    parameter: Parameter,
    strategy: LayerStrategy,
    mesh: Mesh,
    tensor_dims: tuple[str, ...] = TENSOR_DIMS,
) -> GroupLayout:
    """The layout of a parameter while its layer computes: fsdp axes gathered, tensor axes split."""
    dims: list[Axes] = [()] * len(parameter.shape)
    if strategy.tensor:
        for dim, name in enumerate(parameter.dims):
            if name in tensor_dims:
                _require_divisible(parameter, dim, strategy.tensor, mesh)
                dims[dim] = strategy.tensor
                break
    return GroupLayout(mesh, tuple(dims))


def optimizer_layout(
    parameter: Parameter,
    strategy: LayerStrategy,
    mesh: Mesh,
    tensor_dims: tuple[str, ...] = TENSOR_DIMS,
) -> GroupLayout:
    """The layout of optimizer state shaped like the parameter, and of the gradient it reads."""
    layout = parameter_layout(parameter, strategy, mesh, tensor_dims)
    if parameter.size < FSDP_MIN_SIZE:
        return layout
    return _split_largest(parameter, layout, strategy.zero1)


def activation_layout(
    activation: Activation, strategy: LayerStrategy, mesh: Mesh
) -> GroupLayout | None:
    """The layout of an activation at a layer's border; None leaves the choice to XLA."""
    if activation.batch_dim is None:
        return None
    dims: list[Axes] = [()] * len(activation.shape)
    along = strategy.context + (strategy.tensor if strategy.sequence_parallel else ())
    if activation.sequence_dim is not None:
        dims[activation.sequence_dim] = along
    # Where batch and sequence are one flattened dim, only what splits the data holds.
    if activation.sequence_dim == activation.batch_dim:
        dims[activation.batch_dim] = strategy.batch_axes(mesh) + strategy.context
    else:
        dims[activation.batch_dim] = strategy.batch_axes(mesh)
    return GroupLayout(mesh, tuple(dims))


def _split_largest(parameter: Parameter, layout: GroupLayout, axes: Axes) -> GroupLayout:
    """Adds axes to the largest dim they divide, preferring dims that nothing splits yet."""
    if not axes:
        return layout
    mesh, parts = layout.mesh, layout.mesh.size_of(axes)
    local = layout.shard_shape(parameter.shape)
    fits = [dim for dim, size in enumerate(local) if size % parts == 0 and size >= parts]
    if not fits:
        return layout
    best = max(fits, key=lambda dim: (not layout.dims[dim], local[dim], -dim))
    dims = list(layout.dims)
    dims[best] = (*dims[best], *axes)
    return GroupLayout(mesh, tuple(dims), layout.partial)


def _require_divisible(parameter: Parameter, dim: int, axes: Axes, mesh: Mesh) -> None:
    size, parts = parameter.shape[dim], mesh.size_of(axes)
    if size % parts == 0:
        return
    divisors = [d for d in range(1, min(size, parts) + 1) if size % d == 0]
    padded = -(-size // parts) * parts
    raise PlanError(
        f'{parameter.name} dim {dim} "{parameter.dims[dim]}" ({size}) is not divisible by tensor '
        f"axes {','.join(axes)} ({parts}); use a tensor degree of "
        f"{' or '.join(map(str, divisors[-2:]))}, or pad the dim to {padded}"
    )
