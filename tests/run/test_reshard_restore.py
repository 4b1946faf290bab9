"""A state saved on some devices is the same, bit for bit, on any other number of them."""

from __future__ import annotations

from pathlib import Path

import jax

from shardpar.run.checkpoints import Checkpoints
from tests.run.run_states import bits, make_state, run_child, split_over, target_of

MESHES = {"8 devices": (8,), "2 devices": (2,), "4x1": (4, 1), "2x2": (2, 2), "2x4": (2, 4)}


def test_a_state_travels_over_meshes_without_a_changed_bit(tmp_path: Path) -> None:
    devices = jax.devices()
    assert len(devices) == 8
    expected = bits(make_state(5))
    state = make_state(5)
    state = jax.device_put(state, jax.tree.map(split_over(devices, 4, 2), state))
    for step, (name, axes) in enumerate(MESHES.items(), 1):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(step, state)
            place = split_over(devices, *axes)
            target = target_of(make_state(0), place)
            state = checkpoints.restore(step, target).state
        assert bits(state) == expected, name
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name


def test_each_device_holds_only_its_own_slice(tmp_path: Path) -> None:
    state = {"w": make_state(1)["params"]["blocks/0/kernel"]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        target = target_of(state, split_over(jax.devices(), 8))
        restored = checkpoints.restore(1, target).state["w"]
    assert [shard.data.shape for shard in restored.addressable_shards] == [(2, 8)] * 8
    for shard in restored.addressable_shards:
        assert (shard.data == state["w"][shard.index]).all()


def test_another_process_with_fewer_devices_reads_the_same_bits(tmp_path: Path) -> None:
    script = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
from tests.run.run_states import bits, make_state, split_over, target_of
from shardpar.run.checkpoints import Checkpoints
assert len(jax.devices()) == 2
target = target_of(make_state(0), split_over(jax.devices(), 2))
with Checkpoints(sys.argv[1]) as checkpoints:
    restored = checkpoints.restore(None, target)
    assert bits(restored.state) == bits(make_state(restored.step))
    checkpoints.save(restored.step + 1, restored.state)
"""
    state = make_state(3)
    place = split_over(jax.devices(), 4, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jax.device_put(state, jax.tree.map(place, state)))
    child = run_child(script, str(tmp_path))
    assert child.returncode == 0, child.stderr
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(4, target_of(state, split_over(jax.devices(), 4)))
    assert bits(restored.state) == bits(state)


def test_orbax_prints_nothing_while_all_is_well(tmp_path: Path) -> None:
    script = """
import sys, jax
from tests.run.run_states import make_state, target_of
from shardpar.run.checkpoints import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.restore(None, target_of(make_state(1)))
"""
    child = run_child(script, str(tmp_path))
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
