"""The forward program of a stage: the cut program run again, with layouts, loops and recompute.

At each layer's border activations are constrained to the layer's layout; inside,
fsdp parameters and split sequences are gathered just before use and, in the backward,
gathered again rather than kept (ZeRO-3, arXiv 1910.02054; Megatron, 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from shardpar.capture._compat import as_function, is_literal, run_equation
from shardpar.capture.attention import with_products
from shardpar.capture.cut import CutProgram, LayerCall
from shardpar.capture.recompute import policy_of
from shardpar.capture.segments import Again
from shardpar.lowering.context import gather, over_context
from shardpar.lowering.runs import Run, Step, steps
from shardpar.lowering.shardings import constrain, named_sharding
from shardpar.spec.graph import Activation, LayerClass, LayerGraph, Parameter
from shardpar.spec.parameters import activation_layout, compute_layout, parameter_layout
from shardpar.spec.plan import LayerStrategy, Stage

Forward = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class StageLayouts:
    """What the stage's layers need to know about layouts.

    Attributes:
      graph, stage, mesh: the model, the stage, and its jax mesh.
      strategies: each layer's strategy, by layer name.
      owners: for each full parameter name, its Parameter and its owner's strategy.
      tensor_dims: logical dims that tensor axes may split.
    """

    graph: LayerGraph
    stage: Stage
    mesh: Mesh
    strategies: Mapping[str, LayerStrategy]
    owners: Mapping[str, tuple[Parameter, LayerStrategy]]
    tensor_dims: tuple[str, ...]

    def class_of(self, layer: str) -> LayerClass:
        """The class of a layer, by the layer's name."""
        return self.graph.class_of(next(x for x in self.graph.layers if x.name == layer))

    def stored(self, name: str, stacked: int = 0) -> NamedSharding:
        """How a parameter lies at rest, or a stack of parameters like it."""
        parameter, strategy = self.owners[name]
        layout = parameter_layout(parameter, strategy, self.stage.mesh, self.tensor_dims)
        return named_sharding(self.mesh, layout, stacked)

    def gathered(self, name: str, strategy: LayerStrategy) -> NamedSharding:
        """How a parameter lies while a layer with this strategy computes."""
        parameter, _ = self.owners[name]
        return named_sharding(
            self.mesh, compute_layout(parameter, strategy, self.stage.mesh, self.tensor_dims)
        )

    def activation(self, activation: Activation, strategy: LayerStrategy) -> NamedSharding | None:
        """How an activation lies at the border of a layer with this strategy."""
        layout = activation_layout(activation, strategy, self.stage.mesh)
        return None if layout is None else named_sharding(self.mesh, layout)

    def inside(self, activation: Activation, strategy: LayerStrategy) -> NamedSharding | None:
        """How an activation lies where the layer computes with it: its sequence whole."""
        return self.activation(activation, replace(strategy, sequence_parallel=False))


def owners_of(
    graph: LayerGraph, program: CutProgram, chosen: Iterable[Mapping[str, LayerStrategy]]
) -> dict[str, tuple[Parameter, LayerStrategy]]:
    """Each Parameter and its strategy in a group: its own layer's, else a reader's.

    Args:
      graph: the model.
      program: the cut loss.
      chosen: strategies by layer of each stage of the group.
    """
    by_layer = {layer: s for of_stage in chosen for layer, s in of_stage.items()}
    readers = {
        name: call.name
        for call in reversed(program.calls)
        if call.name in by_layer
        for name in call.parameters
        if name is not None
    }
    out = {}
    for name, layer, parameter in graph.parameters:
        strategy = by_layer.get(layer.name) or by_layer.get(readers.get(name, ""))
        # Read between layers only, far from where its own layer is: a copy on each device.
        out[name] = (parameter, strategy or LayerStrategy("outside"))
    return out


def forward_program(program: CutProgram, layouts: StageLayouts, min_run: int) -> Forward:
    """The stage's forward as a function of (params, rest, batch) to (loss sum, weight, rest).

    Args:
      program: the cut loss, traced for one micro-batch.
      layouts: where everything lies.
      min_run: chains of at least so many equal layers become one loop.
    """
    jaxpr = program.closed.jaxpr
    order = steps(program, layouts.strategies, min_run)

    def forward(params: Any, rest: Any, batch: Any) -> Any:
        given = {"params": params, "rest": rest, "batch": batch}
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.closed.consts, strict=True))
        env.update(
            (var, given[kind][name])
            for var, (kind, name) in zip(jaxpr.invars, program.inputs, strict=True)
        )

        run_steps(order, program, layouts, env)
        read = reader(env)
        total, weight, *changed = [read(v) for v in jaxpr.outvars]
        return total, weight, dict(zip(program.outputs, changed, strict=True))

    return forward


def reader(env: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """The value of a literal or a variable."""
    return lambda atom: atom.val if is_literal(atom) else env[atom]


def run_steps(
    order: Sequence[Step | Again],
    program: CutProgram,
    layouts: StageLayouts,
    env: dict[Any, Any],
    stacks: Mapping[tuple[int, int], Any] = {},
) -> None:
    """Runs equations and layers and puts what they make into `env`.

    Args:
      order: runs of layers, positions of other equations, and equations of other stages.
      program: the cut loss.
      layouts: where everything lies.
      env: values by variable.
      stacks: for loops, parameters that are stacked already: by the position of the loop's
        first layer and the number of its input.
    """
    jaxpr = program.closed.jaxpr
    borders = _read_by_layers(program)
    read = reader(env)
    for step in order:
        if isinstance(step, int):
            env.update(run_equation(program.closed, jaxpr.eqns[step], read))
        elif isinstance(step, Again):
            values = step.function(*map(read, step.inputs))
            env.update(zip(step.outputs, values, strict=True))
        elif len(step.calls) == 1:
            call = step.calls[0]
            eqn = jaxpr.eqns[call.position]
            inputs = [read(v) for v in eqn.invars]
            layer = _layer(call, layouts, [id(v) in borders for v in eqn.outvars])
            env.update(zip(eqn.outvars, layer(*inputs), strict=True))
        else:
            env.update(_loop(step, program, layouts, read, stacks))


def _read_by_layers(program: CutProgram) -> set[int]:
    """Ids of the variables that layers read: what crosses a border from one to the next."""
    eqns = [program.closed.jaxpr.eqns[call.position] for call in program.calls]
    return {id(v) for eqn in eqns for v in eqn.invars if not is_literal(v)}


def border_shardings(
    program: CutProgram, layouts: StageLayouts
) -> tuple[dict[Any, NamedSharding], dict[Any, NamedSharding]]:
    """How what a stage's layers read, and what they make, lies at their borders, by variable."""
    reads: dict[Any, NamedSharding] = {}
    makes: dict[Any, NamedSharding] = {}
    for call in program.calls:
        if call.name not in layouts.strategies:
            continue
        eqn, strategy = program.closed.jaxpr.eqns[call.position], layouts.strategies[call.name]
        for found, variables, known in (
            (reads, eqn.invars, _arriving(call, layouts)),
            (makes, eqn.outvars, _leaving(call, layouts)),
        ):
            for v, activation in zip(variables, known, strict=True):
                sharding = None if activation is None else layouts.activation(activation, strategy)
                if sharding is not None and not is_literal(v):
                    found.setdefault(v, sharding)
    return reads, makes


def _arriving(call: LayerCall, layouts: StageLayouts) -> list[Activation | None]:
    cls = layouts.class_of(call.name)
    return _activations(call.jaxpr.jaxpr.invars, call.parameters, cls.inputs)


def _leaving(call: LayerCall, layouts: StageLayouts) -> list[Activation | None]:
    outvars = call.jaxpr.jaxpr.outvars
    return _activations(outvars, (None,) * len(outvars), layouts.class_of(call.name).outputs)


def _layer(
    call: LayerCall, layouts: StageLayouts, at_border: Sequence[bool], in_loop: bool = False
) -> Callable[..., Any]:
    """One layer as a function of its flat inputs, laid out and recomputed as its strategy says.

    Outputs that no other layer reads are left to XLA: to lay out a head's logits
    like the stream between layers would gather a split vocabulary for nothing.
    """
    strategy = layouts.strategies[call.name]
    cls = layouts.class_of(call.name)
    function = as_function(call.jaxpr)
    if strategy.context:
        function = with_products(call.jaxpr, over_context(cls, strategy, layouts))
    arriving, leaving = _arriving(call, layouts), _leaving(call, layouts)

    def whole(x: Any, name: str | None, activation: Activation | None) -> Any:
        if name is not None:
            return gather(x, layouts.gathered(name, strategy), layouts.stored(name))
        border = None if activation is None else layouts.activation(activation, strategy)
        if activation is None or border is None:
            return x
        # Left to itself XLA may rather gather the weights and split the layer's
        # work over the sequence, which is another strategy than the plan's.
        return gather(x, layouts.inside(activation, strategy), border, barrier=True)

    def compute(*inputs: Any) -> list[Any]:
        outputs = function(*map(whole, inputs, call.parameters, arriving))
        return [
            constrain(y, layouts.inside(a, strategy)) if a is not None and border else y
            for y, a, border in zip(outputs, leaving, at_border, strict=True)
        ]

    policy = policy_of(strategy.recompute, strategy.gathers)
    if policy is not None:
        # A loop already keeps XLA from merging the second computation with the first.
        compute = jax.checkpoint(compute, policy=policy, prevent_cse=not in_loop)

    def run(*inputs: Any) -> list[Any]:
        placed = [
            x if a is None else constrain(x, layouts.activation(a, strategy))
            for x, a in zip(inputs, arriving, strict=True)
        ]
        return [
            constrain(y, layouts.activation(a, strategy)) if a is not None and border else y
            for y, a, border in zip(compute(*placed), leaving, at_border, strict=True)
        ]

    return run


def _activations(
    variables: Any, parameters: tuple[str | None, ...], known: tuple[Activation, ...]
) -> list[Activation | None]:
    """The activation behind each input or output; None for parameters and random keys."""
    rest = iter(known)
    return [
        None
        if name is not None or jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.extended)
        else next(rest, None)
        for v, name in zip(variables, parameters, strict=True)
    ]


def _loop(
    run: Run,
    program: CutProgram,
    layouts: StageLayouts,
    read: Callable[[Any], Any],
    stacks: Mapping[tuple[int, int], Any],
) -> dict[Any, Any]:
    """Runs a chain of equal layers as one `lax.scan`; returns the values of their outputs."""
    eqns = [program.closed.jaxpr.eqns[call.position] for call in run.calls]
    first = run.calls[0]
    chained = dict(run.carry)
    stacked = run.stacked
    layer = _layer(
        first, layouts, [o in chained.values() for o in range(len(eqns[0].outvars))], True
    )

    def stack(i: int) -> Any:
        if (first.position, i) in stacks:
            return stacks[first.position, i]
        values = jnp.stack([read(eqn.invars[i]) for eqn in eqns])
        name = first.parameters[i]
        return values if name is None else constrain(values, layouts.stored(name, stacked=1))

    xs = [stack(i) for i in stacked]
    shared = {i: read(eqns[0].invars[i]) for i in run.shared}
    init = [read(eqns[0].invars[i]) for i in chained]
    kept = _outputs_read_elsewhere(run, program)

    def body(carry: Any, x: Any) -> Any:
        inputs = dict(shared)
        inputs.update(zip(chained, carry, strict=True))
        inputs.update(zip(stacked, x, strict=True))
        outputs = layer(*[inputs[i] for i in range(len(inputs))])
        return [outputs[o] for o in chained.values()], [outputs[o] for o in kept]

    carry, ys = jax.lax.scan(body, init, xs)
    values: dict[Any, Any] = {}
    for o, y in zip(kept, ys, strict=True):
        values.update((eqn.outvars[o], y[k]) for k, eqn in enumerate(eqns))
    values.update((eqns[-1].outvars[o], c) for o, c in zip(chained.values(), carry, strict=True))
    return values


def _outputs_read_elsewhere(run: Run, program: CutProgram) -> list[int]:
    """Output positions of the run's calls that something other than the next call reads."""
    jaxpr = program.closed.jaxpr
    members = {call.position for call in run.calls}
    outside = {
        id(v)
        for position, eqn in enumerate(jaxpr.eqns)
        if position not in members
        for v in eqn.invars
        if not is_literal(v)
    } | {id(v) for v in jaxpr.outvars if not is_literal(v)}
    chained = set(dict(run.carry).values())
    eqns = [jaxpr.eqns[call.position] for call in run.calls]
    return [
        o
        for o in range(len(eqns[0].outvars))
        if any(id(eqn.outvars[o]) in outside for eqn in (eqns[:-1] if o in chained else eqns))
    ]
