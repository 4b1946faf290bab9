"""The forward program of a stage: the cut program run again, with layouts, loops and recompute.

At each layer's border activations are constrained to the layer's layout; inside,
fsdp parameters and split sequences are gathered just before use and, in the backward,
gathered again rather than kept (ZeRO-3, arXiv 1910.02054; Megatron, 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from shardpar.capture._compat import as_function, is_literal, run_equation
from shardpar.capture.attention import with_products
from shardpar.capture.cut import CutProgram, LayerCall
from shardpar.capture.recompute import policy_of
from shardpar.lowering.context import gather, over_context
from shardpar.lowering.runs import Run, steps
from shardpar.lowering.shardings import constrain, named_sharding
from shardpar.spec.graph import Activation, LayerGraph, Parameter
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

    def stored(self, name: str) -> NamedSharding:
        """How a parameter lies at rest."""
        parameter, strategy = self.owners[name]
        return named_sharding(
            self.mesh, parameter_layout(parameter, strategy, self.stage.mesh, self.tensor_dims)
        )

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


def forward_program(program: CutProgram, layouts: StageLayouts, min_run: int) -> Forward:
    """The stage's forward as a function of (params, rest, batch) to (loss sum, weight, rest).

    Args:
      program: the cut loss, traced for one micro-batch.
      layouts: where everything lies.
      min_run: chains of at least so many equal layers become one loop.
    """
    jaxpr = program.closed.jaxpr
    order = steps(program, layouts.strategies, min_run)
    borders = _read_by_layers(program)

    def forward(params: Any, rest: Any, batch: Any) -> Any:
        given = {"params": params, "rest": rest, "batch": batch}
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.closed.consts, strict=True))
        env.update(
            (var, given[kind][name])
            for var, (kind, name) in zip(jaxpr.invars, program.inputs, strict=True)
        )

        def read(atom: Any) -> Any:
            return atom.val if is_literal(atom) else env[atom]

        for step in order:
            if isinstance(step, int):
                env.update(run_equation(program.closed, jaxpr.eqns[step], read))
            elif len(step.calls) == 1:
                call = step.calls[0]
                eqn = jaxpr.eqns[call.position]
                inputs = [read(v) for v in eqn.invars]
                layer = _layer(call, layouts, [id(v) in borders for v in eqn.outvars])
                env.update(zip(eqn.outvars, layer(*inputs), strict=True))
            else:
                env.update(_loop(step, program, layouts, read))
        total, weight, *changed = [read(v) for v in jaxpr.outvars]
        return total, weight, dict(zip(program.outputs, changed, strict=True))

    return forward


def _read_by_layers(program: CutProgram) -> set[int]:
    """Ids of the variables that layers read: what crosses a border from one to the next."""
    eqns = [program.closed.jaxpr.eqns[call.position] for call in program.calls]
    return {id(v) for eqn in eqns for v in eqn.invars if not is_literal(v)}


def _layer(
    call: LayerCall, layouts: StageLayouts, at_border: Sequence[bool], in_loop: bool = False
) -> Callable[..., Any]:
    """One layer as a function of its flat inputs, laid out and recomputed as its strategy says.

    Outputs that no other layer reads are left to XLA: to lay out a head's logits
    like the stream between layers would gather a split vocabulary for nothing.
    """
    strategy = layouts.strategies[call.name]
    cls = layouts.graph.class_of(
        next(layer for layer in layouts.graph.layers if layer.name == call.name)
    )
    function = as_function(call.jaxpr)
    if strategy.context:
        function = with_products(call.jaxpr, over_context(cls, strategy, layouts))
    arriving = _activations(call.jaxpr.jaxpr.invars, call.parameters, cls.inputs)
    leaving = _activations(
        call.jaxpr.jaxpr.outvars, (None,) * len(call.jaxpr.jaxpr.outvars), cls.outputs
    )

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
    run: Run, program: CutProgram, layouts: StageLayouts, read: Callable[[Any], Any]
) -> dict[Any, Any]:
    """Runs a chain of equal layers as one `lax.scan`; returns the values of their outputs."""
    eqns = [program.closed.jaxpr.eqns[call.position] for call in run.calls]
    first = run.calls[0]
    chained = dict(run.carry)
    stacked = [i for i in range(len(eqns[0].invars)) if i not in chained and i not in run.shared]
    layer = _layer(
        first, layouts, [o in chained.values() for o in range(len(eqns[0].outvars))], True
    )

    def stack(i: int) -> Any:
        values = jnp.stack([read(eqn.invars[i]) for eqn in eqns])
        name = first.parameters[i]
        if name is None:
            return values
        parameter, owner = layouts.owners[name]
        layout = parameter_layout(parameter, owner, layouts.stage.mesh, layouts.tensor_dims)
        return constrain(values, named_sharding(layouts.mesh, layout, stacked=1))

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
