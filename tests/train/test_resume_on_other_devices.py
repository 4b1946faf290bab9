"""A whole training state goes 8 -> 2 -> 4 devices through checkpoints, bit for bit."""

import jax
import numpy as np
import optax

from shardpar.lowering.program import Program
from shardpar.run.checkpoints import Checkpoints
from tests.lowering.tiny import batches, captured, uniform

SOURCE = {"width": 128, "dropout": 0.1}
PLANS = {
    "8 devices, fsdp4 tp2": uniform(8, fsdp=("a", "b"), tensor=("c",)),
    "2 devices, fsdp2": uniform(2, fsdp=("a",)),
    "4 devices, zero1 and tp": uniform(4, zero1=("a",), tensor=("b",)),
}


def bits(state):
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    out = {}
    for path, leaf in leaves:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        out[jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return out


def test_the_state_is_equal_bit_for_bit_after_each_reshard(tmp_path):
    source = captured(**SOURCE)
    programs = {name: Program(source, plan, optax.adamw(1e-3)) for name, plan in PLANS.items()}
    first, *others = programs
    state = programs[first].init(0)
    for batch in batches(3):
        state, _ = programs[first].step(state, batch)
    expected = bits(state)
    up = state.params["blocks.0.up"]
    assert len({str(shard.index) for shard in up.addressable_shards}) == 8
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, name in enumerate(others, start=1):
            checkpoints.save(step, state)
            state = checkpoints.restore(None, programs[name].state_shapes).state
            assert bits(state) == expected, name
            for leaf, shape in zip(
                jax.tree.leaves(state), jax.tree.leaves(programs[name].state_shapes), strict=True
            ):
                assert leaf.sharding == shape.sharding
    state, metrics = programs[others[-1]].step(state, batches(4)[3])
    assert np.isfinite(float(metrics["loss"]))
