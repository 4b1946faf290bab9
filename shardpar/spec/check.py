"""Every rule that crosses objects: a plan against its layer graph and its cluster."""

from __future__ import annotations

import difflib

from shardpar.errors import PlanError
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerClass, LayerGraph
from shardpar.spec.lockstep import equal_stages, require_equal_pipelines
from shardpar.spec.mesh import Mesh
from shardpar.spec.parameters import activation_layout, optimizer_layout
from shardpar.spec.plan import TENSOR_DIMS, LayerStrategy, Pipeline, Plan
from shardpar.spec.select import strategies, summarise


def check(plan: Plan, graph: LayerGraph, cluster: Cluster | None = None) -> None:
    """Verifies that a plan can run this model on these devices.

    Every layer has exactly one strategy in each pipeline, stages follow the
    model's order, every split divides the dim it splits, the devices exist.

    Args:
      plan: the plan.
      graph: the model it is for.
      cluster: the devices; None skips the rules about them.

    Raises:
      PlanError: naming the layer, the parameter or the devices, and what to write instead.
    """
    if cluster is not None:
        missing = [d for d in plan.devices if d >= cluster.num_devices or d < 0]
        if missing:
            raise PlanError(
                f"the plan uses devices {ranges(plan.devices)} but cluster "
                f'"{cluster.name}" has {cluster.num_devices} (0 to {cluster.num_devices - 1}); '
                "plan again for this cluster, or start with more devices"
            )
    _check_tensor_dims(plan, graph)
    require_equal_pipelines(plan)
    for number, pipeline in enumerate(plan.pipelines):
        try:
            _check_pipeline(pipeline, plan, graph)
        except PlanError as error:
            where = f"pipeline {number}: " if len(plan.pipelines) > 1 else ""
            raise PlanError(where + str(error)) from None


def _check_tensor_dims(plan: Plan, graph: LayerGraph) -> None:
    if plan.tensor_dims == TENSOR_DIMS:
        return
    known = sorted({name for _, _, p in graph.parameters for name in p.dims if name})
    for name in plan.tensor_dims:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise PlanError(
                f'tensor_dims has "{name}", which no parameter of {graph.model} has; '
                + (f'did you mean "{near[0]}"? ' if near else "")
                + f"its dims are {', '.join(known) or 'not named'}"
            )


def _check_pipeline(pipeline: Pipeline, plan: Plan, graph: LayerGraph) -> None:
    position = 0
    every = [strategies(stage, graph) for stage in pipeline.stages]
    anywhere = {name for chosen in every for name in chosen}
    for stage, chosen in zip(pipeline.stages, every, strict=True):
        expected = [layer.name for layer in graph.layers[position : position + len(chosen)]]
        if set(chosen) != set(expected):
            missing = [layer.name for layer in graph.layers if layer.name not in anywhere]
            if missing:
                raise _left_out(missing)
            stray = [n for n in chosen if n not in expected]
            raise PlanError(
                f"the stage on devices {ranges(stage.devices)} has layers "
                f"{summarise([x.name for x in graph.layers if x.name in chosen])}, but the next "
                f"{len(chosen)} layers of the model are {summarise(expected)}; "
                f"{summarise(stray)} {'is' if len(stray) == 1 else 'are'} out of place"
            )
        position += len(chosen)
        seen: set[tuple[str, LayerStrategy]] = set()
        for layer in graph.layers:
            if layer.name in chosen and (layer.class_name, chosen[layer.name]) not in seen:
                seen.add((layer.class_name, chosen[layer.name]))
                try:
                    check_layer(
                        graph.class_of(layer), chosen[layer.name], pipeline.microbatch, stage.mesh,
                        plan.tensor_dims,
                    )  # fmt: skip
                except PlanError as error:
                    raise PlanError(f"layer {layer.name}: {error}") from None
    rest = [layer.name for layer in graph.layers[position:]]
    if rest:
        raise _left_out(rest)
    if pipeline.schedule == "single_jit":
        equal_stages(pipeline, graph)


def _left_out(names: list[str]) -> PlanError:
    return PlanError(
        f"{summarise(names)} {'has' if len(names) == 1 else 'have'} no strategy; "
        "add an entry under layers"
    )


def check_layer(
    cls: LayerClass,
    strategy: LayerStrategy,
    microbatch: int,
    mesh: Mesh,
    tensor_dims: tuple[str, ...] = TENSOR_DIMS,
) -> None:
    """Verifies that layers of a class can run under a strategy on a mesh.

    Raises:
      PlanError: naming the parameter, the micro-batch or the sequence that cannot be split.
    """
    for parameter in (*cls.parameters, *cls.tied):
        optimizer_layout(parameter, strategy, mesh, tensor_dims)
    axes = strategy.batch_axes(mesh)
    shards = mesh.size_of(axes)
    if microbatch % shards:
        raise PlanError(
            f"micro-batches of {microbatch} sequences cannot be split over "
            f"{shards} data shards (axes {','.join(axes)}); "
            f"use a multiple of {shards}"
        )
    _check_context(cls, strategy, mesh)
    for activation in (*cls.inputs, *cls.outputs):
        layout = activation_layout(activation, strategy, mesh)
        dim = activation.sequence_dim
        if layout is None or dim in (None, activation.batch_dim):
            continue
        size, along = activation.shape[dim], layout.dims[dim]
        if size % mesh.size_of(along) == 0:
            continue
        what, mend = (
            ("context axes", "use fewer of them")
            if not strategy.sequence_parallel
            else ("tensor axes", "set sequence_parallel: false")
            if not strategy.context
            else ("context and tensor axes", "use fewer, or set sequence_parallel: false")
        )
        raise PlanError(
            f"sequence length {size} is not divisible by {what} {','.join(along)} "
            f"({mesh.size_of(along)}); {mend}"
        )


def _check_context(cls: LayerClass, strategy: LayerStrategy, mesh: Mesh) -> None:
    if not strategy.context:
        return
    axes, parts = ",".join(strategy.context), mesh.size_of(strategy.context)
    if cls.products is None:
        raise PlanError(
            f"layers of class {cls.name} cannot have their sequence split over {axes}: they "
            "multiply activations in a way, or with a kernel, that is not known; leave context out"
        )
    for activation in (*cls.inputs, *cls.outputs):
        if activation.batch_dim is not None and activation.sequence_dim is None:
            raise PlanError(
                f"an activation {list(activation.shape)} of layers of class {cls.name} has no "
                f"sequence that {axes} could split; leave context out"
            )
    if strategy.attention != "heads":
        return
    every = parts * mesh.size_of(strategy.tensor)
    for product in cls.products:
        if product.keys is not None and product.num_heads % every:
            raise PlanError(
                f"layers of class {cls.name} have {product.num_heads} heads, which context and "
                f"tensor axes ({every}) do not divide; write attention: gather, or fewer axes"
            )


def ranges(devices: tuple[int, ...]) -> str:
    """Device numbers, consecutive ones as a range.

    >>> ranges((0, 2, 4, 5))
    '0,2,4-5'
    """
    runs: list[list[int]] = []
    for device in devices:
        if runs and runs[-1][-1] == device - 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
