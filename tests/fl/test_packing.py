"""Trees in masked vectors."""

import jax
import numpy as np
import pytest

from shardpar.errors import SpecError
from shardpar.fl.packing import Packing
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.streams import Randomness

OPTIONS = SecAggOptions(clip=2.0, most_weight=50.0, most_loss=10.0)


def update(seed: int):
    random = np.random.default_rng(seed)
    weight = np.float32(random.integers(1, 50))
    return {
        "delta": {
            "a": (weight * random.normal(0, 0.1, (4, 3))).astype(np.float32),
            "b": np.float32(weight * random.normal(0, 0.1, 5)),
        },
        "weight": weight,
        "loss": np.float32(weight * random.random()),
    }


def test_sums_of_trees_survive_masks_and_come_out_within_a_step():
    updates = [update(seed) for seed in range(7)]
    packing = Packing.of(updates[0], clients=10, options=OPTIONS)
    total = sum((packing.encode(u) for u in updates), np.zeros(packing.words, np.uint32))
    got = packing.decode(total)
    exact = jax.tree.map(lambda *leaves: np.sum(np.float64(leaves), axis=0), *updates)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=7 * 2.0**-20), got, exact)
    assert got["weight"] == exact["weight"]


def test_a_compiled_simulation_comes_to_the_same_sums():
    updates = [update(seed) for seed in range(5)]
    packing = Packing.of(updates[0], clients=5, options=OPTIONS)
    masked = packing.decode(sum(packing.encode(u) for u in updates))
    rounded = [jax.jit(packing.rounded)(u) for u in updates]
    simulated = packing.read(jax.tree.map(lambda *leaves: sum(leaves), *rounded))
    jax.tree.map(np.testing.assert_array_equal, masked, simulated)


def test_random_rounding_is_near():
    one = update(0)
    packing = Packing.of(one, clients=2, options=OPTIONS)
    step = 1 / packing.parts[0].codec.scale
    got = packing.decode(packing.encode(one, Randomness()))
    assert 0 < np.abs(got["delta"]["a"] - one["delta"]["a"]).max() <= step


def test_what_was_not_agreed_on_is_refused():
    one = update(0)
    packing = Packing.of(one, clients=2, options=OPTIONS)
    with pytest.raises(SpecError, match="most_weight to more than 50"):
        packing.encode({**one, "weight": np.float32(51)})
    with pytest.raises(SpecError, match="was agreed on"):
        packing.encode({**one, "loss": np.zeros(2, np.float32)})
    with pytest.raises(SpecError, match="was agreed on"):
        packing.encode({**one, "extra": np.float32(0)})
