import math

import jax
import numpy as np
import optax
import pytest

from shardpar.errors import ConfigError
from shardpar.train.optimizer import make_optimizer, matrices, schedule
from shardpar.train.options import OptimizerOptions

STEPS = 12


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"block/kernel": (4, 3), "block/bias": (3,), "scale": (), "experts": (2, 3, 2)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def rate_oracle(options, step, steps):
    total, warmup, peak = options.decay_steps or steps, options.warmup_steps, options.learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / (total - warmup))
    left = 1 - done if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (options.final_fraction + (1 - options.final_fraction) * left)


def run(rule, steps=STEPS):
    params = tree(0)
    state = rule.init(params)
    update = jax.jit(rule.update)
    for step in range(steps):
        change, state = update(tree(step + 1), state, params)
        params = optax.apply_updates(params, change)
    return params


def oracle(step_of, options, steps=STEPS):
    """Plain NumPy in float64: `step_of(memory, gradient, step)` is the undecayed direction."""
    params = {name: value.astype(np.float64) for name, value in tree(0).items()}
    memory = {name: {} for name in params}
    for step in range(steps):
        gradients = tree(step + 1)
        for name, value in params.items():
            move = step_of(memory[name], gradients[name].astype(np.float64), step)
            decay = options.weight_decay if value.ndim >= 2 else 0.0
            params[name] = value - rate_oracle(options, step, steps) * (move + decay * value)
    return params


def assert_close(got, want, tolerance=1e-6):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=tolerance)


SCHEDULES = [
    {"schedule": shape, "warmup_steps": warmup, "decay_steps": decay}
    for shape in ("constant", "cosine", "linear")
    for warmup in (0, 1, 5)
    for decay in (None, 8, 40)
]


@pytest.mark.parametrize("choice", SCHEDULES)
def test_schedule_is_its_formula(choice):
    options = OptimizerOptions(learning_rate=3e-3, final_fraction=0.2, **choice)
    rate = schedule(options, STEPS)
    under_jit = jax.jit(rate)
    for step in range(60):
        want = rate_oracle(options, step, STEPS)
        assert float(rate(step)) == pytest.approx(want, rel=1e-6)
        assert float(under_jit(np.int32(step))) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("choice", SCHEDULES[::4])
def test_adamw_is_its_formula(choice):
    options = OptimizerOptions(learning_rate=1e-2, weight_decay=0.3, b1=0.8, b2=0.9, **choice)

    def adam(memory, gradient, step):
        memory["m"] = options.b1 * memory.get("m", 0) + (1 - options.b1) * gradient
        memory["v"] = options.b2 * memory.get("v", 0) + (1 - options.b2) * gradient**2
        m = memory["m"] / (1 - options.b1 ** (step + 1))
        v = memory["v"] / (1 - options.b2 ** (step + 1))
        return m / (np.sqrt(v) + options.eps)

    assert_close(run(make_optimizer(options, STEPS)), oracle(adam, options))


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_sgd_is_its_formula_with_decoupled_decay(momentum):
    options = OptimizerOptions(
        name="sgd", learning_rate=1e-2, weight_decay=0.3, momentum=momentum, warmup_steps=3
    )

    def sgd(memory, gradient, step):
        memory["m"] = momentum * memory.get("m", 0) + gradient
        return memory["m"]

    assert_close(run(make_optimizer(options, STEPS)), oracle(sgd, options))


def test_sgd_without_momentum_keeps_no_copy_of_the_parameters():
    options = OptimizerOptions(name="sgd", momentum=0.0)
    state = make_optimizer(options, STEPS).init(tree(0))
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) <= 2


def test_lion_is_its_formula():
    options = OptimizerOptions(name="lion", learning_rate=1e-2, weight_decay=0.3, b2=0.99)

    def lion(memory, gradient, step):
        m = memory.get("m", np.zeros_like(gradient))
        memory["m"] = options.b2 * m + (1 - options.b2) * gradient
        return np.sign(options.b1 * m + (1 - options.b1) * gradient)

    assert_close(run(make_optimizer(options, STEPS)), oracle(lion, options))


def test_adafactor_without_decay_is_that_of_optax():
    options = OptimizerOptions(name="adafactor", learning_rate=1e-2, weight_decay=0.0)
    plain = optax.adafactor(schedule(options, STEPS))
    assert_close(run(make_optimizer(options, STEPS)), run(plain))


def test_adafactor_decays_at_the_learning_rate():
    options = OptimizerOptions(
        name="adafactor", learning_rate=1e-2, weight_decay=0.3, schedule="constant"
    )
    params, gradients = tree(0), tree(1)

    def first_step(rule):
        return rule.update(gradients, rule.init(params), params)[0]

    with_decay = first_step(make_optimizer(options, STEPS))
    without = first_step(optax.adafactor(1e-2))
    want = {
        name: without[name] - (1e-2 * 0.3 * value if value.ndim >= 2 else 0.0)
        for name, value in params.items()
    }
    assert_close(with_decay, want)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_only_matrices_decay(name):
    options = OptimizerOptions(name=name, weight_decay=0.5, learning_rate=0.1)
    rule = make_optimizer(options, STEPS)
    params = tree(0)
    still = jax.tree.map(np.zeros_like, params)
    change, _ = rule.update(still, rule.init(params), params)
    for key, decays in matrices(params).items():
        expected = -0.1 * 0.5 * params[key] if decays else np.zeros_like(params[key])
        np.testing.assert_allclose(change[key], expected, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_the_state_can_be_shaped_without_memory(name):
    rule = make_optimizer(OptimizerOptions(name=name), STEPS)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((10**6, *x.shape), x.dtype), tree(0))
    assert jax.eval_shape(rule.init, shapes) is not None


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_a_warm_up_that_leaves_nothing_is_refused(shape):
    with pytest.raises(ConfigError, match=r"ends at step 10 \(optimizer\.decay_steps\).*lower"):
        schedule(OptimizerOptions(schedule=shape, warmup_steps=10, decay_steps=10), 10)
    with pytest.raises(ConfigError, match=r"\(optimizer\.decay_steps\)"):
        make_optimizer(OptimizerOptions(schedule=shape, warmup_steps=10, decay_steps=5), 100)
    schedule(OptimizerOptions(schedule="constant", warmup_steps=10), 5)
