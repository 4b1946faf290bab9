"""Lowered programs against the same model trained by plain flax and optax on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardpar.errors import CaptureError, PlanError
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.program import Program
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.lowering.tiny import BATCH, LENGTH, batches, captured, gpt, plan_of, uniform

STEPS = 20
RATE = 3e-3


def plain_flax_losses(steps=STEPS, clip=1.0, **options):
    """The oracle: no shardpar, no sharding, no jit of ours."""
    sizes = {"vocab_size": 64, "layers": 2, "width": 64, "heads": 8, "max_length": LENGTH}
    with nnx.use_eager_sharding(False):
        model = gpt.build(gpt.GPTOptions(**{**sizes, **options}), nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(RATE))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, rest, batch):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            total, weight = gpt.loss(model, batch)
            return total / weight, nnx.split(model, nnx.Param, ...)[2]

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, rest, value

    losses = []
    for batch in batches(steps):
        params, state, rest, value = step(params, state, rest, batch)
        losses.append(float(value))
    return losses


@pytest.fixture(scope="module")
def expected():
    return plain_flax_losses()


def losses_of(plan, steps=STEPS, seen=None, source=None, **options):
    program = Program(source or captured(), plan, optax.adamw(RATE), ProgramOptions(**options))
    state, losses = program.init(0), []
    for batch in batches(steps):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    if seen is not None:
        seen.append((program, state))
    return losses


PLANS = {
    "one device": (uniform(1), {}),
    "one device, scanned": (uniform(1), {"layers": "scan"}),
    "one device, accumulated": (uniform(1, microbatch=2), {}),
    "dp8": (uniform(), {}),
    "fsdp8": (uniform(fsdp=("a", "b", "c")), {}),
    "fsdp8, scanned": (uniform(fsdp=("a", "b", "c")), {"layers": "scan"}),
    "tp8": (uniform(tensor=("a", "b", "c")), {}),
    "tp8 sp": (uniform(tensor=("a", "b", "c"), sequence_parallel=True), {}),
    "zero1": (uniform(zero1=("a", "b", "c")), {}),
    "dp2 fsdp2 tp2 sp, full recompute, scanned": (
        uniform(fsdp=("b",), tensor=("c",), sequence_parallel=True, recompute="full"),
        {"layers": "scan"},
    ),
    "fsdp4 tp2, selective recompute, accumulated": (
        uniform(microbatch=4, fsdp=("a", "b"), tensor=("c",), recompute="selective"),
        {},
    ),
    "layers differ": (
        plan_of(
            LayerStrategy("embed", tensor=("b", "c")),
            LayerStrategy("blocks[0]", tensor=("c",), fsdp=("a",), recompute="full"),
            LayerStrategy("blocks[1]", fsdp=("a", "b", "c")),
            LayerStrategy("head..outside", tensor=("c",)),
        ),
        {"layers": "scan"},
    ),
}
PLANS["devices 4, layers differ"] = (
    plan_of(
        LayerStrategy("embed..blocks[0]", fsdp=("a",), tensor=("b",)),
        LayerStrategy("blocks[1]..outside", zero1=("a", "b")),
        devices=4,
    ),
    {},
)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_trains_like_plain_flax(name, expected):
    plan, options = PLANS[name]
    np.testing.assert_allclose(losses_of(plan, **options), expected, rtol=2e-5)


@pytest.mark.slow
def test_layers_of_seven_strategies_train_like_plain_flax():
    """Every kind of split, each layer another: the planner may ask for any of them side by side."""
    plan = plan_of(
        LayerStrategy("embed", tensor=("c",), zero1=("a", "b")),
        LayerStrategy("blocks[0]", fsdp=("b", "c"), zero1=("a",)),
        LayerStrategy("blocks[1]", tensor=("b", "c"), sequence_parallel=True, recompute="full"),
        LayerStrategy("blocks[2]", tensor=("a", "b", "c")),
        LayerStrategy("blocks[3]", ("c",), ("b",), ("a",), recompute="selective"),
        LayerStrategy("head", zero1=("a", "b", "c")),
        LayerStrategy("outside", zero1=("a", "b", "c")),
    )
    steps = 10
    got = losses_of(plan, steps, source=captured(layers=4), layers="scan")
    np.testing.assert_allclose(got, plain_flax_losses(steps, layers=4), rtol=2e-5)


def test_loops_and_recompute_give_the_same_bits_for_the_loss_of_the_first_step():
    values = {
        losses_of(uniform(1, recompute=recompute), steps=1, layers=layers)[0]
        for recompute in ("none", "full")
        for layers in ("scan", "unroll")
    }
    assert max(values) - min(values) < 1e-6


def test_dropout_counters_advance_as_in_plain_flax():
    expected = plain_flax_losses(steps=6, dropout=0.2)
    for layers in ("unroll", "scan"):
        got = losses_of(uniform(1), steps=6, source=captured(dropout=0.2), layers=layers)
        np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_bfloat16_keeps_float32_master_weights_and_stays_close(expected):
    seen = []
    got = losses_of(uniform(1), source=captured("bfloat16"), seen=seen, compute_dtype="bfloat16")
    np.testing.assert_allclose(got, expected, rtol=2e-2)
    _, state = seen[0]
    assert {str(x.dtype) for x in state.params.values()} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.optimizer)} == {"float32", "int32"}


def test_unequal_weights_of_micro_batches_are_summed_before_dividing():
    def loss(model, batch):
        mask = batch["mask"]
        return jnp.sum(mask * (model(batch["x"])[:, 0] - batch["y"]) ** 2), jnp.sum(mask)

    from shardpar.capture.trace import trace

    random = np.random.default_rng(0)
    batch = {
        "x": random.normal(size=(8, 3)).astype(np.float32),
        "y": random.normal(size=8).astype(np.float32),
        "mask": np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32),
    }
    source = trace(loss, lambda rngs: nnx.Linear(3, 1, rngs=rngs), batch)
    layers = source.graph.layers[0].name
    results = []
    for microbatch in (8, 2):
        stage = Stage((0,), Mesh(), (LayerStrategy(layers),))
        plan = Plan("t", 8, (Pipeline(8, microbatch, (stage,)),))
        program = Program(source, plan, optax.sgd(0.1), ProgramOptions(gradient_clip=None))
        state, metrics = program.step(program.init(0), batch)
        results.append((float(metrics["loss"]), np.asarray(state.params["kernel"])))
    assert float(metrics["weight"]) == 5
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


def test_a_gradient_that_is_not_finite_leaves_every_bit_of_the_state_alone():
    from shardpar.capture.trace import trace

    def loss(model, batch):
        return jnp.mean(model(batch["x"]) ** 2)

    good = {"x": np.ones((4, 3), np.float32)}
    source = trace(loss, lambda rngs: nnx.Linear(3, 2, rngs=rngs), good)
    plan = Plan("t", 4, (Pipeline(4, 4, (Stage((0,), Mesh(), (LayerStrategy("outside"),)),)),))
    program = Program(source, plan, optax.adam(0.1))
    state, _ = program.step(program.init(0), good)
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    bad = {"x": np.full((4, 3), np.inf, np.float32)}
    state, metrics = program.step(state, bad)
    assert int(metrics["skipped"]) == 1
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(state)] == before
    state, metrics = program.step(state, good)
    assert int(metrics["skipped"]) == 0
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(state)] != before


def test_the_state_is_born_sharded_and_its_values_do_not_depend_on_the_plan():
    whole = Program(captured(), uniform(1), optax.adamw(RATE)).init(3)
    program = Program(captured(), uniform(fsdp=("a", "b"), tensor=("c",)), optax.adamw(RATE))
    state = program.init(3)
    for name, value in whole.params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(state.params[name]))
    up = state.params["blocks.0.up"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(64 // 4, 256 // 2)}
    assert up.sharding == program.state_shapes.params["blocks.0.up"].sharding


def test_no_device_ever_holds_the_whole_model_while_it_is_initialised():
    source = captured(width=256, layers=3)
    program = Program(source, uniform(fsdp=("a", "b", "c")), optax.adamw(RATE))
    memory = program.init_program.lower(jnp.uint32(0)).compile().memory_analysis()
    whole = 4 * source.graph.num_parameters
    per_device = memory.temp_size_in_bytes + memory.output_size_in_bytes
    # The state itself is 3 x whole / 8; random bits of one parameter come on top.
    assert per_device < whole
    assert memory.output_size_in_bytes < 3 * whole / 8 * 1.1


def test_evaluation_does_not_drop_out_and_matches_the_plain_model():
    source = captured(dropout=0.5)
    program = Program(source, uniform(2, fsdp=("a",)), optax.adamw(RATE))
    state = program.init(0)
    batch = batches(1)[0]
    total, weight = program.evaluate(state, batch)
    with nnx.use_eager_sharding(False):
        sizes = {"vocab_size": 64, "layers": 2, "width": 64, "heads": 8, "max_length": LENGTH}
        model = gpt.build(gpt.GPTOptions(**sizes, dropout=0.5), nnx.Rngs(0))
    model.eval()
    expected, count = gpt.loss(model, batch)
    np.testing.assert_allclose(float(total), float(expected), rtol=1e-5)
    assert float(weight) == float(count) == BATCH * LENGTH


def test_a_batch_of_another_shape_is_refused_before_anything_runs():
    program = Program(captured(), uniform(1), optax.adamw(RATE))
    state = program.init(0)
    with pytest.raises(PlanError, match=r'batch\["inputs"\] has shape \(4, 32\)'):
        program.step(state, {k: v[:4] for k, v in batches(1)[0].items()})
    with pytest.raises(CaptureError, match='no "targets"'):
        program.step(state, {"inputs": batches(1)[0]["inputs"]})


def test_a_plan_with_two_stages_is_refused_in_words():
    stages = (
        Stage((0,), Mesh(), (LayerStrategy("embed..blocks[0]"),)),
        Stage((1,), Mesh(), (LayerStrategy("blocks[1]..outside"),)),
    )
    plan = Plan("t", BATCH, (Pipeline(BATCH, BATCH, stages),))
    with pytest.raises(PlanError, match="makes programs of stages"):
        Program(captured(), plan, optax.adamw(RATE))


def test_a_plan_for_more_devices_than_there_are_says_how_to_try_it():
    with pytest.raises(PlanError, match="--devices 16"):
        Program(captured(), uniform(16, tensor=("d",)), optax.adamw(RATE))
