"""Which layers become one loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardpar
from shardpar.capture.cut import cut
from shardpar.capture.model import abstract_model
from shardpar.lowering.runs import Run, steps
from shardpar.spec.plan import LayerStrategy
from tests.lowering.tiny import captured


@shardpar.layer
class Mix(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, scale, skip=None):
        y = jnp.tanh(self.linear(x)) * scale
        return y if skip is None else y + skip


class Chain(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind = kind
        self.mixes = nnx.List([Mix(rngs) for _ in range(5)])

    def __call__(self, x):
        first = x
        for i, mix in enumerate(self.mixes):
            if self.kind == "plain":
                x = mix(x, 2.0)
            elif self.kind == "array":
                x = mix(x, jnp.float32(i))
            elif self.kind == "skip":
                x = mix(x, 2.0, first)
            elif self.kind == "between":
                x = mix(x, 2.0) + 1.0
            elif self.kind == "long skip":
                x = mix(x, 2.0, first if i == 3 else None)
        return x


def runs_of(kind, strategies=None, shortest=2):
    model = abstract_model(lambda rngs: Chain(kind, rngs))
    batch = {"x": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    program = cut(model, lambda m, b: jnp.sum(m(b["x"])), batch)
    chosen = strategies or {call.name: LayerStrategy("x") for call in program.calls}
    return [len(step.calls) for step in steps(program, chosen, shortest) if isinstance(step, Run)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", [5]),
        ("array", [5]),  # what differs per layer is stacked
        ("skip", [5]),  # what all layers share stays outside the loop
        ("between", [1, 1, 1, 1, 1]),  # something else happens between the layers
        ("long skip", [3, 1, 1]),  # another computation
    ],
)
def test_chains_of_equal_layers_become_runs(kind, expected):
    assert runs_of(kind) == expected


def test_a_run_stops_where_the_strategy_changes():
    names = [f"mixes[{i}]" for i in range(5)]
    plain, other = LayerStrategy("x"), LayerStrategy("x", recompute="full")
    chosen = dict(zip(names, [plain, plain, other, other, other], strict=True))
    assert runs_of("plain", chosen) == [2, 3]


def test_chains_shorter_than_asked_for_are_left_alone():
    assert runs_of("plain", shortest=6) == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["plain", "array", "skip", "between", "long skip"])
def test_a_rolled_up_program_computes_what_the_model_does(kind):
    import optax

    from shardpar.lowering.options import ProgramOptions
    from shardpar.lowering.program import Program
    from shardpar.spec.mesh import Mesh
    from shardpar.spec.plan import Pipeline, Plan, Stage

    batch = {"x": np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)}
    source = shardpar.trace(
        lambda m, b: jnp.mean(m(b["x"]) ** 2), lambda rngs: Chain(kind, rngs), batch
    )
    model = Chain(kind, nnx.Rngs(0))
    expected, grads = nnx.value_and_grad(lambda m: jnp.mean(m(batch["x"]) ** 2))(model)
    stage = Stage((0,), Mesh(), (LayerStrategy("mixes..outside"),))
    program = Program(
        source,
        Plan("t", 3, (Pipeline(3, 3, (stage,)),)),
        optax.sgd(1.0),
        ProgramOptions(layers="scan", gradient_clip=None),
    )
    before = program.init(0)
    kernels = {k: np.asarray(v) for k, v in before.params.items()}
    after, metrics = program.step(before, batch)
    np.testing.assert_allclose(float(metrics["loss"]), float(expected), rtol=1e-5)
    for i in range(5):
        name = f"mixes.{i}.linear.kernel"
        step = kernels[name] - np.asarray(after.params[name])
        np.testing.assert_allclose(step, grads["mixes"][i]["linear"]["kernel"][...], atol=1e-6)


def test_equal_blocks_with_random_keys_of_their_own_still_form_one_run():
    source = captured(dropout=0.1, layers=4)
    program = cut(source.model, source.loss, source.batch)
    chosen = {call.name: LayerStrategy("x") for call in program.calls}
    found = [s for s in steps(program, chosen, 2) if isinstance(s, Run) and len(s.calls) > 1]
    assert [len(run.calls) for run in found] == [4]
