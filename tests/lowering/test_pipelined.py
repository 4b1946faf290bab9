"""Programs of several stages and pipelines against the same model on one device."""

from __future__ import annotations

import os
import random
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
from shardpar.lowering.program import Program
from shardpar.lowering.step_under_way import StepUnderWay
from shardpar.lowering.union import UnionArray
from shardpar.run.checkpoints import Checkpoints
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.schedule import held
from tests.capture.nets import WIDTH
from tests.capture.test_segments import Crowded, OneNorm, OneStream, TwoNormed
from tests.lowering.random_plans import random_plan
from tests.lowering.tiny import BATCH, LENGTH, batches, captured, uniform

STEPS = 4
LONG = pytest.mark.skipif("SHARDPAR_LONG" not in os.environ, reason="minutes; set SHARDPAR_LONG=1")
SIZES = {"layers": 3, "width": 32}


def stage(devices, layers, **choices):
    return Stage(tuple(devices), Mesh.factored(len(devices)), (LayerStrategy(layers, **choices),))


def plan_over(*pipelines):
    return Plan("test", sum(p.sequences for p in pipelines), pipelines)


def pair(microbatch=2, schedule="1f1b", **choices):
    """Two stages on devices 0 and 1."""
    stages = (
        stage([0], "embed..blocks[0]", **choices),
        stage([1], "blocks[1]..outside", **choices),
    )
    return plan_over(Pipeline(BATCH, microbatch, stages, schedule))


def chunks(microbatch=2):
    """Four stages on two groups of devices."""
    stages = (
        stage([0, 1], "embed..blocks[0]", tensor=("a",)),
        stage([2, 3], "blocks[1]", fsdp=("a",)),
        stage([0, 1], "blocks[2]", fsdp=("a",), recompute="full"),
        stage([2, 3], "head..outside", tensor=("a",)),
    )
    return plan_over(Pipeline(BATCH, microbatch, stages, "interleaved"))


def unequal():
    """TP4 by two stages beside single devices by three, with unequal shares and micro-batches."""
    wide = (
        stage([0, 1, 2, 3], "embed..blocks[0]", tensor=("a", "b"), sequence_parallel=True),
        stage([4], "blocks[1]..outside"),
    )
    thin = (
        stage([5], "embed"),
        stage([6], "blocks[0:2]", recompute="selective"),
        stage([7], "blocks[2]..outside"),
    )
    return plan_over(Pipeline(6, 2, wide), Pipeline(2, 1, thin))


PLANS = {
    "two stages": (pair(), {}),
    "two stages, gpipe, scanned": (pair(schedule="gpipe"), {"layers": "scan"}),
    "TP4 by two beside TP1 by three": (unequal(), {}),
    "interleaved": (chunks(), {}),
    "a stage on three devices": (
        plan_over(
            Pipeline(
                6, 3,
                (
                    stage([0, 1, 2], "embed..blocks[1]", fsdp=("a",)),
                    stage([3, 4], "blocks[2]..outside", tensor=("a",)),
                ),
            ),
            Pipeline(2, 2, (stage([6, 5], "embed..outside", zero1=("a",)),)),
        ),
        {},
    ),
}  # fmt: skip
_IN_FULL = ("two stages, gpipe, scanned", "a stage on three devices")
BRIEF = [pytest.param(name, marks=[LONG] if name in _IN_FULL else []) for name in PLANS]


def trained(program, steps=STEPS, source=None):
    """(state, losses and gradient norms) after some steps."""
    state, seen = program.init(0), []
    for batch in source or batches(steps):
        state, metrics = program.step(state, batch)
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state, np.array(seen)


@cache
def single(steps=STEPS, microbatch=BATCH, **options):
    source = captured(**{**SIZES, **options})
    return trained(Program(source, uniform(1, microbatch), optax.adamw(3e-3)), steps)


@cache
def program_of(name):
    plan, options = PLANS[name]
    return PipelinedProgram(captured(**SIZES), plan, optax.adamw(3e-3), ProgramOptions(**options))


@cache
def run_of(name):
    return trained(program_of(name))


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    yield
    for kept in (single, program_of, run_of):
        kept.cache_clear()
    jax.clear_caches()


def host(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_states_close(program, state, expected, rtol=2e-4, atol=2e-5):
    saved = jax.tree_util.tree_leaves_with_path(program.to_saved(state))
    for (path, one), other in zip(saved, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            host(one), host(other), rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", BRIEF)
def test_named_plans_train_like_one_device(name):
    _, seen = run_of(name)
    np.testing.assert_allclose(seen, single()[1], rtol=2e-5)


@pytest.mark.parametrize("name", BRIEF)
def test_the_state_after_some_steps_is_that_of_one_device_in_every_copy(name):
    program, (state, _) = program_of(name), run_of(name)
    # Adam divides by the root of the second moment: where it is tiny, noise grows.
    assert_states_close(program, state, single()[0], rtol=2e-3, atol=2e-4)
    for path, union in program.homes.unions(state).items():
        copies = {np.asarray(array).tobytes() for array in union.arrays}
        assert len(copies) == 1, path


def test_an_embedding_that_a_later_stage_reads_lies_in_both_or_in_one():
    for tied, groups in ((True, 2), (False, 1)):
        source = captured(tied=tied, **SIZES)
        program = PipelinedProgram(source, pair(), optax.adamw(3e-3))
        assert len(program.homes.leaves[".params['embed.table']"].groups) == groups
        _, seen = trained(program)
        np.testing.assert_allclose(seen, single(tied=tied)[1], rtol=2e-5)


def test_llama_trains_over_two_pipelines_like_one_device():
    llama = load_model_source(Path(__file__).parents[2] / "models" / "llama.py")
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    sizes = {"vocab_size": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2,
             "mlp_width": 64, "max_length": LENGTH}  # fmt: skip
    source = trace(
        llama.loss,
        lambda rngs: llama.build(llama.LlamaOptions(**sizes), rngs),
        {"inputs": tokens, "targets": tokens},
        causal=True,
    )
    plan = plan_over(
        Pipeline(
            6, 2,
            (
                stage([0, 1], "embed..blocks[0]", tensor=("a",)),
                stage([2, 3], "blocks[1]..outside", fsdp=("a",)),
            ),
        ),
        Pipeline(2, 1, (stage([4], "embed..outside"),)),
    )  # fmt: skip
    _, seen = trained(PipelinedProgram(source, plan, optax.adamw(3e-3)))
    _, expected = trained(Program(source, uniform(1), optax.adamw(3e-3)))
    np.testing.assert_allclose(seen, expected, rtol=2e-5)


def test_bfloat16_over_stages_stays_close_and_keeps_float32_master_weights():
    options = ProgramOptions(compute_dtype="bfloat16")
    program = PipelinedProgram(captured("bfloat16", **SIZES), unequal(), optax.adamw(3e-3), options)
    state, seen = trained(program)
    np.testing.assert_allclose(seen[:, 0], single()[1][:, 0], rtol=1e-2)
    assert {str(x.dtype) for union in state.params.values() for x in union.arrays} == {"float32"}
    for of_group in program.groups:
        for programs in of_group.stages.values():
            assert {str(s.dtype) for s in programs.sent} <= {"bfloat16"}


@pytest.mark.parametrize("layers", [pytest.param("unroll", marks=LONG), "scan"])
def test_dropout_over_stages_draws_the_keys_of_one_device(layers):
    source = captured(dropout=0.3, **SIZES)
    plan = plan_over(
        Pipeline(
            4, 2, (stage([0], "embed..blocks[0]"), stage([1], "blocks[1]..outside")),
        ),
        Pipeline(4, 2, (stage([2], "embed..blocks[1]"), stage([3], "blocks[2]..outside"))),
    )  # fmt: skip
    options = ProgramOptions(layers=layers)
    program = PipelinedProgram(source, plan, optax.adamw(3e-3), options)
    state, seen = trained(program)
    expected, wanted = trained(Program(source, uniform(1, 2), optax.adamw(3e-3), options))
    np.testing.assert_allclose(seen, wanted, rtol=2e-6)
    for name, value in expected.rest.items():
        assert np.array_equal(host(program.to_saved(state).rest[name]), host(value)), name


@shardpar.layer
class Scaled(nnx.Module):
    """A layer that is given a mask and a gain with every call."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask, gain):
        return x + jnp.where(mask, nnx.tanh(self.linear(x)) * gain, 0.0)


class Staggered(nnx.Module):
    """What each layer is given is made just before it, of the batch and of a parameter."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Scaled(rngs) for _ in range(4)])
        self.gains = nnx.Param(jnp.linspace(0.5, 1.0, 4))

    def __call__(self, x, keep):
        for i, block in enumerate(self.blocks):
            x = block(x, jnp.roll(keep, i, axis=1) > 0.0, 2 * self.gains[i])
        return x, jnp.float32(0)


def net_loss(model, batch):
    out, aux = model(batch["x"], batch["keep"])
    weight = jnp.sum(jnp.where(batch["keep"] > 0.0, 1.0, 0.5))
    return jnp.sum((out - batch["y"]) ** 2) + 0.1 * aux, weight


def net_batches(count):
    rng = np.random.default_rng(1)
    return [
        {name: rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for name in ("x", "keep", "y")}
        for _ in range(count)
    ]


def mean_square(model, batch):
    return jnp.mean(model(batch["x"]) ** 2)


NETS = {
    "skips, masks, gains between layers, an auxiliary loss": (Crowded, net_loss, 3),
    "what layers are given is made between them": (Staggered, net_loss, 4),
    "batch statistics in two stages": (TwoNormed, mean_square, 2),
    "one stream of keys through all layers": (OneStream, mean_square, 3),
}


@cache
def net(name):
    build, loss, count = NETS[name]
    return trace(loss, build, net_batches(1)[0]), count


def net_plan(count, microbatch=4, first=0, shares=(BATCH,), cut_at=None):
    """Pipelines of two stages, layers `blocks[0]` to `blocks[count - 1]` cut at one of them."""
    at = cut_at or count // 2
    pipelines = []
    for n, share in enumerate(shares):
        one, two = first + 2 * n, first + 2 * n + 1
        ends = (f"blocks[0:{at}]", f"blocks[{at}:{count}]..outside")
        stages = (stage([one], ends[0]), stage([two], ends[1]))
        pipelines.append(Pipeline(share, microbatch, stages))
    return plan_over(*pipelines)


def one_device(count, microbatch=BATCH):
    return plan_over(Pipeline(BATCH, microbatch, (stage([0], f"blocks[0:{count}]..outside"),)))


def net_programs(name, plan, rule=None, microbatch=4, **options):
    source, count = net(name)
    rule, options = rule or optax.adamw(1e-2), ProgramOptions(**options)
    return (
        lower(source, plan, rule, options),
        Program(source, one_device(count, microbatch), rule, options),
    )


@pytest.mark.parametrize("layers", [pytest.param("unroll", marks=LONG), "scan"])
@pytest.mark.parametrize("name", NETS)
def test_models_with_values_that_cross_stages_train_like_one_device(name, layers):
    _, count = net(name)
    program, oracle = net_programs(name, net_plan(count), layers=layers)
    state, seen = trained(program, source=net_batches(STEPS))
    expected, wanted = trained(oracle, source=net_batches(STEPS))
    np.testing.assert_allclose(seen, wanted, rtol=2e-5)
    assert_states_close(program, state, expected)


def test_two_pipelines_train_a_model_that_reads_parameters_between_layers():
    name = "what layers are given is made between them"
    program, oracle = net_programs(name, net_plan(4, 2, shares=(6, 2)), layers="scan", microbatch=2)
    assert len(program.homes.leaves[".params['gains']"].groups) == 4
    state, seen = trained(program, source=net_batches(STEPS))
    expected, wanted = trained(oracle, source=net_batches(STEPS))
    np.testing.assert_allclose(seen, wanted, rtol=2e-5)
    assert_states_close(program, state, expected)


def test_a_parameter_that_no_stage_reads_is_kept_and_decays_like_on_one_device():
    name = "skips, masks, gains between layers, an auxiliary loss"
    program, oracle = net_programs(name, net_plan(3), optax.adamw(1e-2, weight_decay=0.1))
    assert program.homes.leaves[".params['unused']"].groups == (0,)
    state, _ = trained(program, source=net_batches(2))
    expected, _ = trained(oracle, source=net_batches(2))
    unused = np.asarray(program.to_saved(state).params["unused"])
    assert unused[0] < 1
    np.testing.assert_array_equal(unused, np.asarray(expected.params["unused"]))


def test_batch_statistics_of_several_pipelines_are_refused_in_words():
    source, _ = net("batch statistics in two stages")
    with pytest.raises(PlanError, match=r"mean changes with the data.*use a plan of one pipeline"):
        PipelinedProgram(source, net_plan(2, shares=(4, 4)), optax.sgd(0.1))


def test_batch_statistics_that_two_stages_change_are_refused_in_words():
    source = trace(mean_square, OneNorm, net_batches(1)[0])
    with pytest.raises(PlanError, match="put these layers in one stage"):
        PipelinedProgram(source, net_plan(2), optax.sgd(0.1))


def test_an_optimizer_that_couples_parameters_is_refused_and_one_stage_takes_it():
    source, _ = net("what layers are given is made between them")
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    with pytest.raises(PlanError, match="use the program's gradient_clip"):
        PipelinedProgram(source, net_plan(4), rule)
    state, _ = trained(lower(source, one_device(4), rule), source=net_batches(1))
    assert int(state.step) == 1


def bits_of(state):
    return [
        host(array).tobytes()
        for union in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, UnionArray))
        for array in (union.arrays if isinstance(union, UnionArray) else (union,))
    ]


@pytest.mark.parametrize(
    "name",
    [
        "what layers are given is made between them",
        "batch statistics in two stages",
        "one stream of keys through all layers",
    ],
)
def test_a_gradient_that_is_not_finite_leaves_every_bit_of_the_state_alone(name):
    _, count = net(name)
    program, _ = net_programs(name, net_plan(count))
    good = net_batches(2)
    state, _ = program.step(program.init(0), good[0])
    before = bits_of(state)
    # One sequence of the last micro-batch: both stages hear of it.
    bad = {key: np.where(np.arange(BATCH)[:, None] == 7, np.inf, x) for key, x in good[1].items()}
    state, metrics = program.step(state, bad)
    assert int(metrics["skipped"]) == 1
    assert bits_of(state) == before
    state, metrics = program.step(state, good[1])
    assert int(metrics["skipped"]) == 0
    assert bits_of(state) != before


def compiled_during(run):
    """How many programs XLA compiles, or reads from its cache, while something runs."""
    seen = []

    def note(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.block_until_ready(run())
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return len(seen)


@pytest.mark.parametrize("name", ["TP4 by two beside TP1 by three", "interleaved"])
def test_after_two_steps_nothing_is_compiled(name):
    program = program_of(name)
    (first, second, third) = batches(3)
    state, _ = program.step(program.init(0), first)
    state, _ = program.step(state, second)
    assert compiled_during(lambda: program.step(state, third)) == 0


def test_evaluation_leaves_dropout_out_and_compiles_once():
    program, oracle = net_programs("one stream of keys through all layers", net_plan(3))
    batch = {key: x[:4] for key, x in net_batches(1)[0].items()}
    state = program.init(0)
    got = [float(x) for x in program.evaluate(state, batch)]
    expected = [float(x) for x in oracle.evaluate(oracle.init(0), batch)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert compiled_during(lambda: program.evaluate(state, batch)) == 0


def most_saved(program, monkeypatch):
    """By pipeline and stage, for how many micro-batches activations wait at once."""
    most: dict[tuple[int, int], int] = {}
    do = StepUnderWay.do

    def watched(step, task):
        do(step, task)
        for pipeline, number in {at[:2] for at in step.saved}:
            now = sum(at[:2] == (pipeline, number) for at in step.saved)
            most[pipeline, number] = max(now, most.get((pipeline, number), 0))
        watched.last = step

    monkeypatch.setattr(StepUnderWay, "do", watched)
    program.step(program.init(0), batches(1)[0])
    monkeypatch.undo()
    left = watched.last
    assert not any((left.saved, left.arrived, left.returned))
    return most


@pytest.mark.parametrize("name", BRIEF)
def test_no_more_micro_batches_wait_than_the_schedule_says(name, monkeypatch):
    program = program_of(name)
    for (pipeline, number), most in most_saved(program, monkeypatch).items():
        of = program.plan.pipelines[pipeline]
        group, chunk = number % of.num_groups, number // of.num_groups
        assert most == held(
            of.schedule, of.num_groups, group, of.num_microbatches, of.chunks, chunk
        ), (pipeline, number)


def test_gpipe_holds_all_micro_batches_and_1f1b_as_many_as_stages_follow(monkeypatch):
    assert most_saved(program_of("two stages"), monkeypatch) == {(0, 0): 2, (0, 1): 1}
    gpipe = program_of("two stages, gpipe, scanned")
    assert most_saved(gpipe, monkeypatch) == {(0, 0): 4, (0, 1): 4}


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_what_a_forward_keeps_has_no_copy_of_a_parameter(layers):
    sizes = {}
    for width in (64, 256):
        source = captured(layers=3, width=width)
        plan = pair(1, tensor=())
        options = ProgramOptions(layers=layers)
        program = PipelinedProgram(source, plan, optax.adamw(3e-3), options)
        kept = [a for g in program.groups for s in g.stages.values() for a in s._traced.kept]
        matrices = {tuple(sorted(leaf.shape)) for leaf in source.model.params.values()}
        of_activations = {(width,), (LENGTH, width)}
        assert not {tuple(sorted(a.shape)) for a in kept} & (matrices - of_activations)
        sizes[width] = sum(a.size * a.dtype.itemsize for a in kept)
    assert sizes[256] <= 4 * sizes[64]


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit_with_its_random_keys(tmp_path):
    program, _ = net_programs("one stream of keys through all layers", net_plan(3))
    state, _ = trained(program, source=net_batches(2))
    before = bits_of(state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, program.to_saved(state))
        checkpoints.wait()
        restored = checkpoints.restore(None, program.saved_shapes).state
    again = program.from_saved(restored)
    assert bits_of(again) == before
    batch = net_batches(3)[2]
    one, two = program.step(state, batch), program.step(again, batch)
    assert float(one[1]["loss"]) == float(two[1]["loss"])
    assert bits_of(one[0]) == bits_of(two[0])


def test_parameters_are_brought_together_whole():
    program, (state, _) = program_of("interleaved"), run_of("interleaved")
    params, _ = program.together(state)
    device = program.devices[program.plan.devices[0]]
    saved = program.to_saved(state)
    for name, value in params.items():
        assert value.devices() == {device}
        assert np.array_equal(value, saved.params[name])


def test_batches_gathered_one_by_one_give_the_update_of_one_step():
    name = "what layers are given is made between them"
    one, two = net_batches(2)
    both = {key: np.concatenate([one[key][:4], two[key][:4]]) for key in one}
    whole, _ = net_programs(name, net_plan(4))
    source, _ = net(name)
    ends = [Pipeline(4, 4, p.stages) for p in net_plan(4).pipelines]
    half = PipelinedProgram(source, plan_over(*ends), optax.adamw(1e-2))
    expected, wanted = whole.step(whole.init(0), both)
    state, gathered = half.init(0), None
    for batch in (one, two):
        gathered = half.accumulate(state, {key: x[:4] for key, x in batch.items()}, gathered)
    state, metrics = half.apply(state, gathered)
    for key in ("loss", "grad_norm", "weight"):
        np.testing.assert_allclose(float(metrics[key]), float(wanted[key]), rtol=1e-6)
    assert_states_close(half, state, whole.to_saved(expected), rtol=1e-5, atol=1e-6)


def assert_random_plan_trains(seed, steps=20):
    source = captured(**SIZES)
    plan = random_plan(random.Random(seed), source.graph, BATCH)
    _, seen = trained(PipelinedProgram(source, plan, optax.adamw(3e-3)), steps)
    np.testing.assert_allclose(seen, single(steps)[1], rtol=5e-5, err_msg=f"seed {seed}: {plan}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4 if "SHARDPAR_LONG" in os.environ else 2))
def test_random_plans_train_twenty_steps_like_one_device(seed):
    assert_random_plan_trains(seed)


@pytest.mark.manual
@LONG
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_more_random_plans_train_twenty_steps_like_one_device(seed):
    assert_random_plan_trains(seed)
    jax.clear_caches()


def test_an_optimizer_that_needs_all_parameters_at_once_is_refused_in_words():
    source = captured(**SIZES)
    labels = dict.fromkeys(source.model.params, "one")
    fixed = optax.multi_transform({"one": optax.sgd(0.1)}, labels)
    with pytest.raises(PlanError, match="let its masks and labels be functions of the parameters"):
        PipelinedProgram(source, pair(), fixed)
    whole = optax.multi_transform(
        {"one": optax.sgd(0.1)}, lambda params: dict.fromkeys(params, "one")
    )
    PipelinedProgram(source, pair(), whole)


def test_a_checkpoint_brings_every_copy_back_bit_for_bit(tmp_path):
    program = program_of("TP4 by two beside TP1 by three")
    state, _ = trained(program, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, program.to_saved(state), {})
        checkpoints.wait()
        restored = program.from_saved(checkpoints.restore(None, program.saved_shapes).state)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert one.sharding == other.sharding
        assert host(one).tobytes() == host(other).tobytes()


def test_evaluation_is_that_of_one_device():
    program = program_of("TP4 by two beside TP1 by three")
    one = Program(captured(**SIZES), uniform(1, 2), optax.adamw(3e-3))
    batch = {name: rows[:2] for name, rows in batches(1)[0].items()}
    got = program.evaluate(program.init(0), batch)
    np.testing.assert_allclose(got, one.evaluate(one.init(0), batch), rtol=1e-6)


def test_lower_chooses_one_jit_where_one_suffices():
    source = captured(**SIZES)
    assert isinstance(lower(source, uniform(1), optax.sgd(0.1)), Program)
    assert isinstance(lower(source, pair(), optax.sgd(0.1)), PipelinedProgram)
