"""Equal stages in one program against the same model on one device."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardpar
from shardpar.capture.trace import trace
from shardpar.config.model_source import load_model_source
from shardpar.errors import PlanError
from shardpar.lowering.lower import lower
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.single_jit import SingleJitProgram
from shardpar.lowering.switch import Programs
from shardpar.run.checkpoints import Checkpoints
from shardpar.spec.lockstep import folded
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from tests.capture.nets import WIDTH
from tests.lowering.tiny import BATCH, LENGTH, batches, captured, plan_of

STEPS = 3
RULE = optax.adamw(3e-3, weight_decay=0.1, mask=lambda p: {n: x.ndim > 1 for n, x in p.items()})


def stage(devices, layers, **choices):
    return Stage(tuple(devices), Mesh.factored(len(devices)), (LayerStrategy(layers, **choices),))


def equal(layers, stages, size=1, first=0, sequences=BATCH, microbatch=2, **choices):
    """A pipeline of equal stages over consecutive devices."""
    each = layers // stages
    ends = ["embed..blocks[{}]", *["blocks[{}:{}]"] * (stages - 2), "blocks[{}]..outside"]
    made = []
    for s in range(stages):
        run = range(s * each, (s + 1) * each)
        text = ends[s].format(*((run[-1],) if s == 0 else (run[0], run[-1] + 1)))
        devices = range(first + s * size, first + (s + 1) * size)
        made.append(stage(devices, text, **choices))
    return Pipeline(sequences, microbatch, tuple(made), "single_jit")


def plan_over(*pipelines):
    return Plan("test", sum(p.sequences for p in pipelines), pipelines)


@cache
def llama():
    source = load_model_source(Path(__file__).parents[2] / "models" / "llama.py")
    rows = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    sizes = {"vocab_size": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2,
             "mlp_width": 64, "max_length": LENGTH}  # fmt: skip
    return trace(
        source.loss,
        lambda rngs: source.build(source.LlamaOptions(**sizes), rngs),
        {"inputs": rows, "targets": rows, "segment_ids": rows, "positions": rows},
        causal=True,
    )


def packed(count):
    """Batches of rows packed with two sequences each, cut at different places."""
    cut = (np.arange(BATCH) * 3 + 4)[:, None]
    place = np.arange(LENGTH)[None]
    ids = (place >= cut).astype(np.int32)
    rows = {"segment_ids": ids, "positions": (place - ids * cut).astype(np.int32)}
    return [{**batch, **rows} for batch in batches(count)]


class Weighted(nnx.Module):
    """A linear map whose weights need no random program to be compiled."""

    def __init__(self, number):
        first = jnp.arange(WIDTH * WIDTH, dtype=jnp.float32).reshape(WIDTH, WIDTH)
        self.kernel = nnx.Param(jnp.sin(first + 1.7 * number))
        self.bias = nnx.Param(jnp.full(WIDTH, 0.1 * number))

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...]


@shardpar.layer
class Inlet(nnx.Module):
    def __init__(self):
        self.linear = Weighted(0)

    def __call__(self, x):
        return self.linear(x)


@shardpar.layer
class Inner(nnx.Module):
    """A residual layer with dropout that is given a mask, which is made of the batch."""

    def __init__(self, number, rngs):
        self.linear = Weighted(number)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x, mask):
        return x + jnp.where(mask, self.dropout(nnx.tanh(self.linear(x))), 0.0)


@shardpar.layer
class Outlet(nnx.Module):
    def __init__(self):
        self.linear = Weighted(9)

    def __call__(self, x, first):
        return self.linear(x) * first


class Net(nnx.Module):
    """A chain of eight, whose outlet reads what the inlet makes, too."""

    def __init__(self, rngs):
        self.inlet, self.outlet = Inlet(), Outlet()
        self.blocks = nnx.List([Inner(i + 1, rngs) for i in range(8)])

    def __call__(self, x, keep):
        first = x = self.inlet(x)
        for block in self.blocks:
            x = block(x, keep > 0.0)
        return self.outlet(x, first)


def net_loss(model, batch):
    out = model(batch["x"], batch["keep"])
    # Micro-batches weigh differently: a mean of means would be wrong.
    return jnp.sum(batch["w"] * (out - batch["y"]) ** 2), jnp.sum(batch["w"]) * WIDTH


def net_batches(count):
    rng = np.random.default_rng(1)
    made = [
        {name: rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for name in ("x", "keep", "y")}
        for _ in range(count)
    ]
    weights = np.linspace(0.1, 2.0, BATCH, dtype=np.float32)[:, None]
    return [{**batch, "w": weights} for batch in made]


@cache
def net():
    return trace(net_loss, Net, net_batches(1)[0])


def net_plan(*names, **choices):
    """Eight equal layers over stages that start with these, on one device each."""
    ends = [f"blocks[{i}:{j}]" for i, j in itertools.pairwise((0, *names, 8))]
    ends[0], ends[-1] = f"inlet..{ends[0]}", f"{ends[-1]}..outside"
    stages = [stage([s], layers, **choices) for s, layers in enumerate(ends)]
    return plan_over(Pipeline(BATCH, 1, tuple(stages), "single_jit"))


NET = "a chain with dropout, masks and a skip, four stages"
CASES = {
    "gpt, two stages of TP2": (
        captured, plan_over(equal(2, 2, 2, tensor=("a",), sequence_parallel=True)), "unroll",
        batches,
    ),
    "packed llama, two pipelines of two stages of FSDP2, recomputed": (
        llama,
        plan_over(
            equal(2, 2, 2, 0, 4, 2, fsdp=("a",), recompute="full"),
            equal(2, 2, 2, 4, 4, 2, fsdp=("a",), recompute="full"),
        ),
        "unroll",
        packed,
    ),
    NET: (net, net_plan(2, 4, 6), "scan", net_batches),
}  # fmt: skip


@cache
def case(name):
    """(programs, the plan's state and what was seen, one device's state and what was seen)."""
    source, plan, layers, make = CASES[name]
    programs = Programs(source(), RULE, ProgramOptions(layers=layers))
    one, program = (programs.program(p) for p in (alone(name), plan))
    begin = one.init(0)
    state = placed(program, jax.tree.map(jnp.copy, begin))
    return programs, trained(program, state, make(STEPS)), trained(one, begin, make(STEPS))


def program_of(name):
    return case(name)[0].program(CASES[name][1])


def alone(name):
    """One device, and the same micro-batches: their random keys are the same then."""
    source, plan, *_ = CASES[name]
    layers = source().graph.layers
    strategy = LayerStrategy(f"{layers[0].name}..{layers[-1].name}")
    return plan_of(strategy, devices=1, microbatch=folded(plan).microbatch)


def placed(program, whole):
    """A state of one device in the stages' places: a switch without its many small programs."""
    values = dict(jax.tree_util.tree_leaves_with_path(whole))
    values = {jax.tree_util.keystr(path): x for path, x in values.items()}
    stacked = program.homes.stacked
    parts = [
        jax.tree_util.tree_map_with_path(
            lambda path, shape: jax.device_put(values[jax.tree_util.keystr(path)], shape.sharding),
            part,
        )
        for part in stacked.parts
    ]
    return stacked.join(parts)


def trained(program, state, given):
    seen = []
    for batch in given:
        state, metrics = program.step(state, batch)
        seen.append([float(metrics[key]) for key in ("loss", "grad_norm", "weight", "skipped")])
    return state, np.array(seen)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    yield
    case.cache_clear()
    jax.clear_caches()


def host(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_close(tree, expected, rtol=2e-4, atol=2e-5):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, one), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            host(one), host(other), rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", CASES)
def test_equal_stages_train_like_one_device(name):
    program, (_, (state, seen), (expected, wanted)) = program_of(name), case(name)
    assert isinstance(program, SingleJitProgram)
    np.testing.assert_allclose(seen, wanted, rtol=5e-6)
    # Adam divides by the root of the second moment: where it is tiny, noise grows.
    assert_close(program.to_saved(state), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_device_of_a_copy_has_the_same_bits(name):
    program, (state, _) = program_of(name), case(name)[1]
    for path, union in program.homes.unions(state).items():
        copies = {host(array).tobytes() for array in union.arrays}
        assert len(copies) == 1, path


@pytest.mark.parametrize("name", CASES)
def test_each_stage_holds_its_own_layers_only(name):
    program = program_of(name)
    stages = len(program.pipeline.stages)
    held = {n: home.groups for n, home in program.homes.leaves.items() if n.startswith(".params")}
    for path, groups in held.items():
        layers = len(program.captured.graph.layers) - 3
        block = path.removeprefix(".params['blocks.").partition(".")[0]
        at = (int(block) * stages // layers,) if block.isdigit() else tuple(range(stages))
        assert groups == at, path


def test_a_fresh_state_is_that_of_one_device():
    programs, *_ = case(NET)
    program = program_of(NET)
    one = programs.program(alone(NET))
    assert_close(program.to_saved(program.init(3)), one.init(3), rtol=1e-6, atol=0)


def test_evaluation_is_that_of_one_device_and_leaves_dropout_out():
    programs, (state, _), (expected, _) = case(NET)
    one = programs.program(alone(NET))
    batch = {key: x[:1] for key, x in net_batches(1)[0].items()}
    got = [program_of(NET).evaluate(state, batch) for _ in range(2)]
    np.testing.assert_array_equal(*got)
    np.testing.assert_allclose(got[0], one.evaluate(expected, batch), rtol=1e-4)


def test_batches_gathered_one_by_one_give_the_update_of_one_step():
    programs, *_ = case(NET)
    program = program_of(NET)
    first = program.plan.pipelines[0]
    half = programs.program(plan_over(replace(first, sequences=BATCH // 2)))
    batch = net_batches(1)[0]
    expected, wanted = program.step(program.init(0), batch)
    state, gathered = half.init(0), None
    for rows in (slice(0, 4), slice(4, 8)):
        gathered = half.accumulate(state, {key: x[rows] for key, x in batch.items()}, gathered)
    state, metrics = half.apply(state, gathered)
    for key in ("loss", "grad_norm", "weight"):
        np.testing.assert_allclose(float(metrics[key]), float(wanted[key]), rtol=1e-6)
    assert_close(half.to_saved(state), program.to_saved(expected), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_leaves_every_bit_of_the_state_alone():
    program, (bad,) = program_of(NET), net_batches(1)
    state = program.init(1)
    before = [host(x).tobytes() for x in jax.tree.leaves(state)]
    # One sequence of the last micro-batch: every stage hears of it.
    bad = {key: np.where(np.arange(BATCH)[:, None] == 7, np.inf, x) for key, x in bad.items()}
    state, metrics = program.step(state, bad)
    assert int(metrics["skipped"]) == 1
    assert [host(x).tobytes() for x in jax.tree.leaves(state)] == before


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    program, (state, _) = program_of(NET), case(NET)[1]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, program.to_saved(state))
        checkpoints.wait()
        restored = checkpoints.restore(None, program.saved_shapes).state
    again = program.from_saved(restored)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert one.sharding == other.sharding
        assert host(one).tobytes() == host(other).tobytes()


def test_a_state_goes_to_programs_of_stages_and_comes_back():
    programs, *_ = case(NET)
    program = program_of(NET)
    first, *rest = net_batches(3)
    state, _ = program.step(program.init(0), first)
    expected = [host(x) for x in jax.tree.leaves(program.to_saved(state))]
    _, wanted = trained(program, jax.tree.map(jnp.copy, state), rest)
    other = replace(program.plan.pipelines[0], schedule="1f1b")
    switched = programs.switch(program, state, plan_over(other))
    assert isinstance(switched.program, PipelinedProgram)
    for one, other in zip(
        jax.tree.leaves(switched.program.to_saved(switched.state)), expected, strict=True
    ):
        assert np.array_equal(host(one), other)
    state, first_of_rest = trained(switched.program, switched.state, rest[:1])
    back = programs.switch(switched.program, state, program.plan)
    assert back.program is program
    _, last = trained(program, back.state, rest[1:])
    np.testing.assert_allclose(np.concatenate([first_of_rest, last]), wanted, rtol=5e-6)


def test_gradients_computed_by_equal_stages_for_another_plan_are_that_plans():
    programs, *_ = case(NET)
    owner = programs.program(alone(NET))
    state, batch = owner.init(0), net_batches(1)[0]
    wanted = owner.accumulate(state, batch)
    got = programs.accumulate(owner, state, CASES[NET][1], batch)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_parameters_are_brought_together_whole():
    program, (state, _) = program_of(NET), case(NET)[1]
    params, _ = program.together(state)
    saved = program.to_saved(state)
    assert sorted(params) == sorted(program.captured.model.params)
    for name, value in params.items():
        assert value.devices() == {program.devices[0]}
        assert np.array_equal(value, saved.params[name])


def refused(source, plan, rule=RULE):
    with pytest.raises(PlanError) as error:
        lower(source, plan, rule)
    return str(error.value)


class Between(Net):
    """Something is computed between layers."""

    def __call__(self, x, keep):
        x = self.inlet(x)
        for block in self.blocks:
            x = 0.9 * block(x, keep > 0.0)
        return self.outlet(x, x)


class Skipping(Net):
    """The last layers read what the first one of all makes."""

    def __call__(self, x, keep):
        first = x = self.inlet(x)
        for i, block in enumerate(self.blocks):
            x = block(x, keep > 0.0 if i < 4 else first > 0.0)
        return self.outlet(x, x)


class Masked(Net):
    """Layers are given masks of their own."""

    def __call__(self, x, keep):
        x = self.inlet(x)
        for i, block in enumerate(self.blocks):
            x = block(x, keep > 0.1 * i)
        return self.outlet(x, x)


@shardpar.layer
class Gained(nnx.Module):
    def __init__(self, number):
        self.linear = Weighted(number)

    def __call__(self, x, gain):
        return x + nnx.tanh(self.linear(x)) * gain


class Shared(Net):
    """All layers are given one parameter."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.blocks = nnx.List([Gained(i) for i in range(8)])
        self.gain = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x, keep):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x, self.gain[...])
        return self.outlet(x, x)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Between, "computes something between them (mul); put it inside a layer, or write"),
        (Skipping, "must read what the layer before them makes and nothing else that layers"),
        (Shared, "schedule single_jit needs equal stages"),
        (Masked, "are given different things besides their parameters"),
    ],
)
def test_models_whose_stages_do_not_compute_alike_are_refused_in_words(build, words):
    source = trace(net_loss, build, net_batches(1)[0])
    assert words in refused(source, net_plan(4))


def test_an_optimizer_that_knows_layers_by_name_is_refused_in_words():
    slow_start = optax.multi_transform(
        {"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)},
        lambda params: {n: "slow" if n.startswith("blocks.0") else "fast" for n in params},
    )
    assert refused(net(), net_plan(4), slow_start) == (
        'the optimizer treats parameters "blocks.0.linear.bias" and "blocks.4.linear.bias" '
        "differently, and schedule single_jit updates them in one program; write schedule: 1f1b"
    )


def test_an_optimizer_that_couples_parameters_is_refused_in_words():
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    assert "use the program's gradient_clip" in refused(net(), net_plan(4), rule)
