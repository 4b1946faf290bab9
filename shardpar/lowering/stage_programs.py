"""The forward and backward programs of one stage of a pipeline, for one micro-batch.

A forward returns what the backward needs that is not there anyway: not the weights, nor what
is made of weights alone, which a vjp handed from one jit to another would copy for every
micro-batch. A backward adds to the gradients that its stage has gathered so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from shardpar.capture._compat import as_function, is_literal, levels, only
from shardpar.capture.segments import Again, Segments
from shardpar.lowering.elsewhere import in_order
from shardpar.lowering.ready import Ready
from shardpar.lowering.runs import Run, Step, steps
from shardpar.lowering.shardings import batch_sharding, constrain, replicated
from shardpar.lowering.stages import StageLayouts, border_shardings, reader, run_steps
from shardpar.lowering.state import gradient_sharding

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """A parameter as a stage computes with it, or the stack of one over equal layers.

    Attributes:
      key: its name among the stage's weights.
      names: the parameters, in the order of the stack.
      place: the loop and the input it is for; None for a parameter that is not stacked.
    """

    key: str
    names: tuple[str, ...]
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class Saved:
    """Where a backward finds a value of its forward.

    `source` is "kept", the n-th array that the forward returned for it; "batch", "received" or
    "sent", the n-th array of those; "made", the n-th of what is made again of weights; or
    "constant".
    """

    source: str
    number: int


@dataclass(frozen=True)
class Forwarded:
    """What a forward leaves for its backward, and what it sends on.

    Attributes:
      sent: for later stages.
      saved: all arrays that its backward reads besides the weights.
    """

    sent: tuple[jax.Array, ...]
    saved: tuple[jax.Array, ...]


class StagePrograms:
    """One stage, compiled for micro-batches of one size.

    Attributes:
      segment: the stage's part of the model.
      layouts: where its parameters and activations lie.
      weights: what it computes with.
      received, sent: shapes and shardings of the arrays that come and go.
    """

    def __init__(
        self, cut: Segments, number: int, layouts: StageLayouts, min_run: int, dtype: str
    ) -> None:
        """Orders the stage's equations; nothing is traced yet.

        Args:
          cut: the program in segments.
          number: the stage's.
          layouts: of the stage.
          min_run: chains of at least so many equal layers become one loop.
          dtype: of float weights inside the model.
        """
        self.cut, self.segment, self.layouts = cut, cut.stages[number], layouts
        self.dtype = jnp.dtype(dtype)
        self.order = self._order(min_run)
        self.weights = self._weights()
        reads, makes = border_shardings(cut.program, layouts)
        self.whole = replicated(layouts.mesh)
        self.received = [self._shape(v, reads.get(v)) for _, v in self.segment.received]
        self.sent = [self._shape(v, makes.get(v)) for v in self.segment.sent]
        self._flows_back = [jnp.issubdtype(s.dtype, jnp.floating) for s in self.received]
        self._flows_on = [jnp.issubdtype(s.dtype, jnp.floating) for s in self.sent]

    def _shape(self, v: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding or self.whole)

    def _order(self, min_run: int) -> list[Step | Again]:
        """Equations of other stages come as soon as what they read is there.

        Most read only the batch and counters and come first; a counter of keys may come from
        one of this stage's own layers.
        """
        eqns = self.cut.program.closed.jaxpr.eqns
        mine = steps(self.cut.program, self.layouts.strategies, min_run, self.segment.positions)
        made: dict[Any, int] = {}
        for n, step in enumerate(mine, 1):
            at = [step] if isinstance(step, int) else [call.position for call in step.calls]
            made.update((v, n) for position in at for v in eqns[position].outvars)
        after: list[list[Step | Again]] = [[] for _ in range(len(mine) + 1)]
        for again in self.segment.again:
            n = max((made.get(v, 0) for v in again.inputs), default=0)
            made.update(dict.fromkeys(again.outputs, n))
            after[n].append(again)
        out = after[0]
        for step, then in zip(mine, after[1:], strict=True):
            out += [step, *then]
        return out

    def _weights(self) -> tuple[Weight, ...]:
        source = dict(
            zip(self.cut.program.closed.jaxpr.invars, self.cut.program.inputs, strict=True)
        )
        eqns = self.cut.program.closed.jaxpr.eqns
        stacked: list[Weight] = []
        single: set[str] = set()

        def note(variables: Sequence[Any]) -> None:
            for v in variables:
                if not is_literal(v) and source.get(v, ("", ""))[0] == "params":
                    single.add(source[v][1])

        for step in self.order:
            if isinstance(step, Again):
                note(step.inputs)
            elif isinstance(step, int):
                note(eqns[step].invars)
            else:
                loop = len(step.calls) > 1
                for i in range(len(step.calls[0].parameters)):
                    names = tuple(call.parameters[i] for call in step.calls)
                    if loop and i in step.stacked and None not in names:
                        stacked.append(_stack(step, i, names))
                    else:
                        note([eqns[call.position].invars[i] for call in step.calls])
        note(self.cut.program.closed.jaxpr.outvars)
        return (*(Weight(name, (name,)) for name in sorted(single)), *stacked)

    def prepare(self, params: Mapping[str, Any]) -> Arrays:
        """The weights of parameters: cast, and stacked where a loop reads them."""

        def cast(name: str) -> Any:
            value = params[name]
            return value.astype(self.dtype) if _is_float(value) else value

        return {
            w.key: cast(w.names[0])
            if w.place is None
            else constrain(
                jnp.stack([cast(name) for name in w.names]), self.layouts.stored(w.names[0], 1)
            )
            for w in self.weights
        }

    def gradients(self, gathered: Mapping[str, Any]) -> Arrays:
        """The gradients of parameters from those of the weights: stacks are cut up again."""
        out: Arrays = {}
        for weight in self.weights:
            for n, name in enumerate(weight.names):
                one = gathered[weight.key] if weight.place is None else gathered[weight.key][n]
                one = constrain(one, gradient_sharding(name, self.layouts))
                out[name] = out[name] + one if name in out else one
        return out

    def gradient_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the stage's backwards add to: float32, one for each weight."""
        return {
            w.key: jax.ShapeDtypeStruct(
                shape.shape,
                jnp.float32,
                sharding=gradient_sharding(w.names[0], self.layouts, int(w.place is not None)),
            )
            for w, shape in zip(self.weights, self.weight_shapes.values(), strict=True)
        }

    @cached_property
    def weight_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of what `prepare` makes."""
        out = {}
        params = {
            name: v.aval
            for v, (kind, name) in zip(
                self.cut.program.closed.jaxpr.invars, self.cut.program.inputs, strict=True
            )
            if kind == "params"
        }
        for w in self.weights:
            aval, stack = params[w.names[0]], int(w.place is not None)
            out[w.key] = jax.ShapeDtypeStruct(
                (len(w.names),) * stack + aval.shape,
                aval.dtype,
                sharding=self.layouts.stored(w.names[0], stack),
            )
        return out

    @cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of the batch that the stage reads."""
        first = next(iter(self.layouts.strategies.values()))
        sharding = batch_sharding(self.layouts.mesh, first.batch_axes(self.layouts.stage.mesh))
        return {
            name: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding)
            for v, (kind, name) in zip(
                self.cut.program.closed.jaxpr.invars, self.cut.program.inputs, strict=True
            )
            if kind == "batch" and name in self.segment.batch
        }

    def rest_shapes(self, names: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of some of the model's other variables, whole on every device."""
        return {
            name: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=self.whole)
            for v, (kind, name) in zip(
                self.cut.program.closed.jaxpr.invars, self.cut.program.inputs, strict=True
            )
            if kind == "rest" and name in names
        }

    def compute(
        self,
        weights: Mapping[str, Any],
        rest: Mapping[str, Any],
        batch: Mapping[str, Any],
        received: Sequence[Any],
    ) -> tuple[list[Any], Any, Any, Arrays]:
        """The stage's maths: (what it sends, loss sum, weight, its own variables afterwards)."""
        program, segment = self.cut.program, self.segment
        jaxpr = program.closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.closed.consts, strict=True))
        given = {"params": weights, "rest": rest, "batch": batch}
        env.update(
            (v, given[kind][name])
            for v, (kind, name) in zip(jaxpr.invars, program.inputs, strict=True)
            if name in given[kind]
        )
        env.update((v, x) for (_, v), x in zip(segment.received, received, strict=True))
        stacks = {w.place: weights[w.key] for w in self.weights if w.place is not None}
        run_steps(self.order, program, self.layouts, env, stacks)
        read = reader(env)
        total = read(jaxpr.outvars[0]) if segment.gives_total else jnp.float32(0)
        weight = read(jaxpr.outvars[1]) if segment.gives_weight else jnp.float32(0)
        after = dict(zip(program.outputs, jaxpr.outvars[2:], strict=True))
        return (
            [read(v) for v in segment.sent],
            total,
            weight,
            {name: read(after[name]) for name in segment.local},
        )

    def _counted(self, counters: Mapping[str, Any], k: Any) -> Mapping[str, Any]:
        """The counters of random keys after k micro-batches."""
        if not self.segment.counters:
            return {}
        return jax.lax.fori_loop(0, k, lambda _, c: self.cut.advance(c), dict(counters))

    @cached_property
    def _forward_shapes(self) -> Any:
        return (
            self.weight_shapes,
            self.rest_shapes(self.cut.counters),
            self.rest_shapes(self.segment.local),
            jax.ShapeDtypeStruct((), jnp.int32),
            self.batch,
            self.received,
            jax.ShapeDtypeStruct((2,), jnp.float32, sharding=self.whole),
        )

    @cached_property
    def _traced(self) -> _Traced:
        """The forward with its vjp as one flat program, and what of it has to be kept."""
        tree: list[Any] = []

        def forward(weights: Any, counters: Any, local: Any, k: Any, batch: Any, received: Any,
                    stats: Any) -> Any:  # fmt: skip
            floats = [x for x, f in zip(received, self._flows_back, strict=True) if f]
            rest = {**self._counted(counters, k), **local}

            def stage(weights: Any, floats: Any) -> Any:
                given = iter(floats)
                inputs = [
                    next(given) if f else x for x, f in zip(received, self._flows_back, strict=True)
                ]
                sent, total, weight, after = self.compute(weights, rest, batch, inputs)
                on = [x for x, f in zip(sent, self._flows_on, strict=True) if f]
                return (on, total), (sent, weight, after)

            (_, total), pullback, (sent, weight, after) = jax.vjp(
                stage, weights, floats, has_aux=True
            )
            leaves, structure = jax.tree.flatten(pullback)
            tree.append(structure)
            return (sent, stats + jnp.stack([total, weight]), after), leaves

        args = self._forward_shapes
        closed, (out, leaves) = jax.make_jaxpr(forward, return_shape=True)(*args)
        return _trace_of(closed, args, out, len(leaves), tree[-1])

    @cached_property
    def forward(self) -> Ready:
        """(weights, counters, local, k, batch, received, stats) to (sent, stats, local, kept)."""
        traced = self._traced
        function = traced.forward

        def forward(*args: Any) -> Any:
            flat = function(*jax.tree.leaves(args))
            out, kept = flat[: traced.num_outputs], flat[traced.num_outputs :]
            sent, stats, local = traced.outputs.unflatten(out)
            return sent, stats, local, kept

        shardings = (
            [s.sharding for s in self.sent],
            self.whole,
            dict.fromkeys(self.segment.local, self.whole),
            None,
        )
        jitted = jax.jit(forward, out_shardings=shardings, donate_argnums=6)
        return Ready(jitted, *self._forward_shapes)

    @cached_property
    def backward(self) -> Ready:
        """(weights, saved, gradients of what was sent, gathered) to (gathered, of received)."""
        traced = self._traced
        made = None if traced.made is None else as_function(traced.made)
        gathered_in = {key: s.sharding for key, s in self.gradient_shapes().items()}

        def backward(weights: Any, saved: Any, cotangents: Any, gathered: Any) -> Any:
            flat_weights = jax.tree.leaves(weights)
            again = [] if made is None else made(*(flat_weights[i] for i in traced.made_reads))
            leaves = []
            for leaf in traced.leaves:
                if leaf.source == "weights":
                    leaves.append(flat_weights[leaf.number])
                elif leaf.source == "made":
                    leaves.append(again[leaf.number])
                elif leaf.source == "constant":
                    leaves.append(traced.constants[leaf.number])
                else:
                    leaves.append(saved[traced.saved.index(leaf)])
            pullback = jax.tree.unflatten(traced.pullback, leaves)
            of_weights, of_received = pullback((cotangents, jnp.float32(1)))
            return {
                key: constrain(sum_ + of_weights[key].astype(sum_.dtype), gathered_in[key])
                for key, sum_ in gathered.items()
            }, of_received

        back = [s.sharding for s, f in zip(self.received, self._flows_back, strict=True) if f]
        jitted = jax.jit(backward, out_shardings=(gathered_in, back), donate_argnums=3)
        cotangents = [self.sent[i] for i in self.takes_back()]
        shapes = (self.weight_shapes, self._saved_shapes, cotangents, self.gradient_shapes())
        return Ready(jitted, *shapes)

    @cached_property
    def _saved_shapes(self) -> list[jax.ShapeDtypeStruct]:
        *_, kept = self.forward.compiled.output_shardings
        closed = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
            for a, sharding in zip(self._traced.kept, kept, strict=True)
        ]
        return self.saved_of(self.batch, self.received, self.sent, closed)

    def saved_of(
        self,
        batch: Mapping[str, Any],
        received: Sequence[Any],
        sent: Sequence[Any],
        kept: Sequence[Any],
    ) -> list[Any]:
        """What the backward has to be given of a forward's arrays."""
        # Flattened as `forward` got them.
        groups = {"batch": jax.tree.leaves(batch), "received": received, "sent": sent, "kept": kept}
        return [groups[leaf.source][leaf.number] for leaf in self._traced.saved]

    @cached_property
    def evaluate(self) -> Callable[..., Any]:
        """(weights, rest, batch, received) to (sent, [loss sum, weight])."""

        def evaluate(weights: Any, rest: Any, batch: Any, received: Any) -> Any:
            sent, total, weight, _ = self.compute(weights, rest, batch, received)
            return sent, jnp.stack([jnp.float32(total), jnp.float32(weight)])

        shardings = [s.sharding for s in self.sent], self.whole
        return in_order(jax.jit(evaluate, out_shardings=shardings))

    def gives_back(self) -> list[int]:
        """Which of the received arrays have a gradient."""
        return [i for i, f in enumerate(self._flows_back) if f]

    def takes_back(self) -> list[int]:
        """Which of the sent arrays have a gradient."""
        return [i for i, f in enumerate(self._flows_on) if f]


@dataclass(frozen=True, eq=False)
class _Traced:
    """A forward with its vjp, as flat programs.

    Attributes:
      forward: returns the outputs, then what is kept.
      outputs, num_outputs: the tree of (sent, stats, local), and its leaves.
      pullback: the tree of the vjp, whose leaves are `leaves`.
      saved: of these, what comes from the forward of the same micro-batch.
      made, made_reads: computes from weights what no forward keeps, and the weights it reads.
      constants: values of leaves that are constants.
      kept: shape and dtype of what the forward keeps.
    """

    forward: Any
    outputs: Any
    num_outputs: int
    pullback: Any
    leaves: tuple[Saved, ...]
    saved: tuple[Saved, ...]
    made: Any
    made_reads: tuple[int, ...]
    constants: tuple[Any, ...]
    kept: tuple[Any, ...]


def _trace_of(closed: Any, args: Any, out: Any, num_leaves: int, pullback: Any) -> _Traced:
    jaxpr = closed.jaxpr
    sizes = [len(jax.tree.leaves(part)) for part in args]
    kinds = ("weights", "counters", "local", "k", "batch", "received", "stats")
    inputs: dict[Any, Saved] = {}
    flat = iter(jaxpr.invars)
    for kind, size in zip(kinds, sizes, strict=True):
        for n in range(size):
            inputs[next(flat)] = Saved(kind, n)
    level = levels(closed, [0 if inputs[v].source == "weights" else 1 for v in jaxpr.invars])
    num_outputs = len(jaxpr.outvars) - num_leaves
    num_sent = len(out[0])
    sent = {v: n for n, v in enumerate(jaxpr.outvars[:num_sent]) if not is_literal(v)}
    kept: dict[Any, int] = {}
    made: dict[Any, int] = {}
    constants: list[Any] = []
    leaves = []
    positions: dict[Any, int] = {}
    for place, v in enumerate(jaxpr.outvars[num_outputs:], num_outputs):
        if is_literal(v):
            leaves.append(Saved("constant", len(constants)))
            constants.append(v.val)
            continue
        positions[v] = place
        if v in inputs and inputs[v].source in ("weights", "batch", "received"):
            leaves.append(inputs[v])
        elif v in sent:
            leaves.append(Saved("sent", sent[v]))
        elif level[v] == 0 and v not in inputs:
            leaves.append(Saved("made", made.setdefault(v, len(made))))
        else:
            leaves.append(Saved("kept", kept.setdefault(v, len(kept))))
    forward, reads = only(closed, [*range(num_outputs), *(positions[v] for v in kept)])
    again, again_reads = only(closed, [positions[v] for v in made]) if made else (None, ())
    saved = tuple(
        dict.fromkeys(s for s in leaves if s.source in ("batch", "received", "sent", "kept"))
    )
    return _Traced(
        _with_all_inputs(forward, reads, len(jaxpr.invars)),
        jax.tree.structure(out), num_outputs, pullback, tuple(leaves), saved,
        again, again_reads, tuple(constants), tuple(v.aval for v in kept),
    )  # fmt: skip


def _with_all_inputs(closed: Any, reads: tuple[int, ...], count: int) -> Callable[..., list[Any]]:
    function = as_function(closed)
    assert not reads or reads[-1] < count
    return lambda *args: function(*(args[i] for i in reads))


def _stack(run: Run, number: int, names: tuple[str | None, ...]) -> Weight:
    place = (run.calls[0].position, number)
    known = tuple(name for name in names if name is not None)
    return Weight(f"{known[0]}..{known[-1]}#{place[0]}.{number}", known, place)


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))
