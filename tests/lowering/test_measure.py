"""Measuring: the clock's arithmetic, what a timed program really does, layers as functions."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardpar
from shardpar.capture.timing_programs import layer_programs
from shardpar.capture.trace import trace
from shardpar.errors import CaptureError
from shardpar.lowering.collectives import collectives, op_counts
from shardpar.lowering.measure import (
    QUICK,
    collective_step,
    everywhere,
    group_sizes,
    layer_seconds,
    looped,
    measure_hardware,
    more_passes,
    phase_count,
    seconds_of_one,
    split_over,
)
from shardpar.spec.profile import COLLECTIVES, Timed, collective_curve
from shardpar.spec.profile_text import hardware_from_text, hardware_to_text

TINY = replace(
    QUICK, matmul_sizes=(8, 16), memory_bytes=(1024, 4096), message_bytes=(1024, 4096),
    overlap_size=16, overlap_bytes=1024, passes=1, rounds=2, round_s=1e-4, limit_s=0.01,
)  # fmt: skip


# The clock.


class Machine:
    """Takes `start_s` to start and `each_s` for each repetition, on a clock of its own."""

    def __init__(self, start_s: float, each_s: float, slow: tuple[int, ...] = ()) -> None:
        self.now_s, self.calls, self.repeats = 0.0, 0, []
        self.start_s, self.each_s, self.slow = start_s, each_s, slow

    def clock_s(self) -> float:
        return self.now_s

    def run(self, repeats: int) -> None:
        self.calls += 1
        self.repeats.append(repeats)
        seconds = self.start_s + repeats * self.each_s
        self.now_s += seconds * (10 if self.calls in self.slow else 1)


@pytest.mark.parametrize("each_s", [1e-7, 1e-5, 1e-3, 3.0])
@pytest.mark.parametrize("start_s", [0.0, 2e-4, 0.02])
def test_one_repetition_is_told_from_the_start_of_a_program(start_s, each_s):
    machine = Machine(start_s, each_s)
    found = seconds_of_one(machine.run, QUICK, machine.clock_s)
    assert found.best_s == pytest.approx(each_s, rel=0.02)
    assert found.median_s == pytest.approx(each_s, rel=0.02)


def test_what_compiling_and_a_neighbour_take_is_not_counted():
    # The first runs of 1, 0 and 10 compile; one of the rounds is disturbed.
    machine = Machine(1e-4, 1e-3, slow=(1, 3, 7, 10))
    found = seconds_of_one(machine.run, replace(QUICK, rounds=5, limit_s=9), machine.clock_s)
    assert found.best_s == pytest.approx(1e-3, rel=0.01)
    assert found.median_s == pytest.approx(1e-3, rel=0.01)
    assert max(machine.repeats) == 10  # as many as a round lasts


def test_short_things_are_repeated_until_they_can_be_told_from_noise():
    # The single run is disturbed and looks long enough to need no repetition.
    machine = Machine(0.0, 1e-6, slow=(2,))
    seconds_of_one(machine.run, replace(QUICK, round_s=0.01), machine.clock_s)
    assert machine.repeats[-1] * 1e-6 >= 0.005 or machine.repeats[-1] == 4096


def test_slow_things_are_measured_twice_at_least_and_no_longer_than_needed():
    machine = Machine(0.0, 100.0)
    seconds_of_one(machine.run, QUICK, machine.clock_s)
    assert machine.repeats.count(1) == 3  # to compile, to see how long it is, and once more


def test_passes_keep_the_best_of_all():
    runs = [lambda _: None]
    (found,) = more_passes(runs, [Timed(1e-30, 1e-30)], replace(TINY, passes=3))
    assert found.best_s == 1e-30
    assert found.median_s > 1e-30
    assert more_passes([], [], TINY) == []


@pytest.mark.parametrize("count", [1, 2, 6, 8, 12])
def test_group_sizes_are_the_divisors(count):
    by_hand = tuple(n for n in range(2, count + 1) if count // n * n == count)
    assert group_sizes(count) == by_hand


# What is timed.


def by_numpy(kind: str, groups: np.ndarray) -> np.ndarray:
    """The collective on an array [groups, members, elements]."""
    size = groups.shape[1]
    if kind == "all-reduce":
        return np.repeat(groups.sum(1, keepdims=True), size, 1)
    if kind == "all-gather":
        return np.repeat(groups.reshape(groups.shape[0], 1, -1), size, 1)
    if kind == "reduce-scatter":
        return groups.sum(1).reshape(groups.shape[0], size, -1)
    if kind == "all-to-all":
        parts = groups.reshape(*groups.shape[:2], size, -1)
        return parts.swapaxes(1, 2).reshape(groups.shape)
    return np.roll(groups, 1, axis=1)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_does_what_it_is_called(kind, size):
    devices = jax.devices()[:8]
    split = split_over(devices, size)
    whole = np.arange(8 * 16, dtype=np.float32)
    x = jax.device_put(whole, split)
    program, results = looped(split, lambda x, _: (collective_step(kind, size)(x[0]),), (x,))
    _, (found,) = program(1, (x,), results, ())
    expected = by_numpy(kind, whole.reshape(8 // size, size, 16))
    np.testing.assert_array_equal(np.asarray(found), expected.reshape(-1))


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_the_compiled_loop_holds_the_collective_over_the_whole_array(kind):
    size, elements = 4, 256
    devices = jax.devices()[:8]
    split = split_over(devices, size)
    x = everywhere(split, np.ones(elements // size if kind == "all-gather" else elements, "f"))
    program, results = looped(split, lambda x, _: (collective_step(kind, size)(x[0]),), (x,))
    text = program.lower(3, (x,), results, ()).compile().as_text()
    assert op_counts(text)["while"] == 1
    (found,) = [c for c in collectives(text) if c.num_bytes > 4]
    assert found.kind == kind
    out = elements // size if kind == "reduce-scatter" else elements
    assert found.num_bytes == out * 4
    # A permutation has pairs, and an all-to-all may be written as one tuple of parts.
    assert found.group_size in ((0, size) if kind == "collective-permute" else (size,))


@pytest.mark.parametrize("compiled_in", [False, True])
def test_each_turn_of_a_loop_waits_for_the_turn_before(compiled_in):
    split = split_over(jax.devices()[:2], 1)
    x, z = (everywhere(split, np.full(4, value, np.float32)) for value in (1.0, 2.0))
    for turns in (0, 1, 2, 5):
        program, results = looped(
            split, lambda x, z: (x[0] + z[0],), (x,), (z,), compiled_in=compiled_in
        )
        (left,), (found,) = program(turns, (jnp.copy(x),), results, (z,))
        # One device by hand: the last result becomes the first input.
        part, out = np.ones(4), np.zeros(4)
        for _ in range(turns):
            out = part + 2
            part[0] = out[-1]
        np.testing.assert_array_equal(np.asarray(found), np.tile(out, 2))
        np.testing.assert_array_equal(np.asarray(left), np.tile(part, 2))


@pytest.mark.parametrize("compiled_in", [False, True])
def test_products_in_a_loop_are_not_done_once_for_all(compiled_in):
    split = split_over(jax.devices()[:1], 1)
    x, w = (everywhere(split, np.ones((16, 16), np.float32)) for _ in range(2))
    program, results = looped(
        split, lambda x, w: (x[0] @ w[0],), (x,), (w,), compiled_in=compiled_in
    )
    text = program.lower(3, (x,), results, (w,)).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert op_counts(text)["dot"] == 1
    assert " dot(" not in entry


def test_a_profile_has_each_curve_and_fits_them(tmp_path):
    said = []

    class Phase:
        def __init__(self, what):
            said.append(what)

        def __enter__(self):
            return None

        def __exit__(self, *error):
            return None

    profile = measure_hardware(
        jax.devices()[:4], cluster="four", memory_bytes=1e9, command="me", effort=TINY, phase=Phase
    )
    assert (profile.devices, profile.platform, profile.command) == (4, "cpu", "me")
    assert [(m.dtype, m.size) for m in profile.matmuls] == [
        ("float32", 8), ("float32", 16), ("bfloat16", 8), ("bfloat16", 16),
    ]  # fmt: skip
    assert {(m.op, m.num_bytes) for m in profile.memory} == {
        (op, n) for op in ("scale", "add") for n in (1024, 4096)
    }
    assert [(c.kind, c.group_size) for c in profile.collectives] == [
        (kind, size) for size in (2, 4) for kind in COLLECTIVES
    ]
    for curve in profile.collectives:
        assert [n for n, _ in curve.times] == [1024, 4096]
        assert curve == collective_curve(curve.kind, curve.group_size, curve.times)
    assert (profile.overlap.group_size, profile.overlap.num_bytes) == (4, 1024)
    assert len(said) == phase_count(4)
    assert hardware_from_text(hardware_to_text(profile)) == profile


def test_sizes_that_need_too_much_memory_are_left_out():
    profile = measure_hardware(
        jax.devices()[:2], cluster="small", memory_bytes=64e3, command="", effort=TINY
    )
    # 15% are 9.6 kB: three arrays of 4096 bytes are too many, three of 1024 are not.
    assert {m.num_bytes for m in profile.memory} == {1024}
    big = replace(TINY, matmul_sizes=(8, 16, 64), message_bytes=(1024, 2048, 4096, 8192))
    found = measure_hardware(
        jax.devices()[:2], cluster="small", memory_bytes=64e3, command="", effort=big
    )
    assert {m.size for m in found.matmuls if m.dtype == "float32"} == {8, 16}
    assert {n for c in found.collectives for n, _ in c.times} == {1024, 2048}


def test_messages_have_a_whole_number_of_elements_for_each_member():
    profile = measure_hardware(
        jax.devices()[:6], cluster="six", memory_bytes=1e9, command="", effort=TINY
    )
    for curve in profile.collectives:
        for wanted, (num_bytes, _) in zip((1024, 4096), curve.times, strict=True):
            assert num_bytes % (4 * curve.group_size) == 0
            assert wanted <= num_bytes < wanted + 4 * curve.group_size
            assert num_bytes == math.ceil(wanted / 4 / curve.group_size) * 4 * curve.group_size


# Layers.


@shardpar.layer
class Mix(nnx.Module):
    """A product and something that is not linear, with a table read by index."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), (7, 4)), out_sharding=("vocab", "embed")
        )
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))

    def __call__(self, tokens, x):
        return jnp.tanh((self.table[...][tokens] + x) @ self.weight[...])


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.start = nnx.Param(jnp.ones((4,)))
        self.mixes = nnx.List([Mix(rngs) for _ in range(3)])

    def __call__(self, tokens):
        x = jnp.broadcast_to(self.start[...], (*tokens.shape, 4))
        for mix in self.mixes:
            x = mix(tokens, x)
        return x


def captured(loss=lambda model, batch: jnp.mean(model(batch["tokens"]) ** 2)):
    return trace(loss, Net, {"tokens": jax.ShapeDtypeStruct((8, 6), jnp.int32)})


def test_there_is_one_program_for_each_class_for_any_batch_and_length():
    model = captured()
    for batch, length in ((8, 6), (3, 6), (2, 4)):
        programs = layer_programs(model, batch, length)
        assert [p.class_name for p in programs] == ["Mix", "outside"]
        (mix, _) = programs
        shapes = sorted(tuple(x.shape) for x in mix.shapes)
        assert shapes == sorted([(7, 4), (4, 4), (batch, length), (batch, length, 4)])
    assert layer_programs(model, 3)[0].shapes == layer_programs(model, 3, 6)[0].shapes


def test_a_layers_program_computes_the_layer_and_its_gradients():
    (mix, _) = layer_programs(captured(), 2, 4)
    arguments, (cotangent,) = mix.arguments(seed=1), mix.cotangents(seed=2)
    places = {x.shape: i for i, x in enumerate(arguments)}
    table, weight, tokens, x = (
        np.asarray(arguments[places[shape]], np.float64 if shape[0] != 2 or len(shape) > 2 else int)
        for shape in ((7, 4), (4, 4), (2, 4), (2, 4, 4))
    )
    before = table[tokens] + x
    after = np.tanh(before @ weight)
    (out,) = mix.forward(arguments)
    np.testing.assert_allclose(out, after, rtol=1e-5)
    (again,), gradients = mix.forward_backward(arguments, (cotangent,))
    np.testing.assert_allclose(again, after, rtol=1e-5)
    # The chain rule by hand.
    inner = np.asarray(cotangent, np.float64) * (1 - after**2)
    to_weight = np.einsum("bsi,bsj->ij", before, inner)
    to_x = inner @ weight.T
    to_table = np.zeros_like(table)
    np.add.at(to_table, tokens, to_x)
    found = {g.shape: g for g in gradients}
    assert len(gradients) == 3
    for expected in (to_weight, to_x, to_table):
        np.testing.assert_allclose(found[expected.shape], expected, rtol=1e-4, atol=1e-8)


def test_indices_exist_and_go_over_the_whole_vocabulary():
    (mix, _) = layer_programs(captured(), 64, 6)
    (tokens,) = [x for x in mix.arguments(seed=0) if jnp.issubdtype(x.dtype, jnp.integer)]
    assert set(np.unique(tokens)) == set(range(7))


def test_a_layer_with_a_random_key_and_flags_can_be_run():
    class Drops(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, mask):
            return jnp.where(mask, self.dropout(self.linear(x)), 0)

    layer = shardpar.layer(Drops)
    model = trace(
        lambda model, batch: jnp.sum(model(batch["x"], batch["mask"])),
        layer,
        {
            "x": jax.ShapeDtypeStruct((8, 4), jnp.float32),
            "mask": jax.ShapeDtypeStruct((8, 4), jnp.bool_),
        },
    )
    for program in layer_programs(model, 2):
        out = program.forward_backward(program.arguments(0), program.cotangents(1))
        jax.block_until_ready(out)


def test_layers_are_timed():
    (mix, _) = layer_programs(captured(), 2)
    forward, both = layer_seconds(mix, TINY)
    assert 0 < forward.best_s <= forward.median_s
    assert 0 < both.best_s <= both.median_s


def test_a_batch_that_cannot_be_traced_is_refused():
    def loss(model, batch):
        return jnp.sum(model(batch["tokens"]) * jnp.ones((6, 4)))

    with pytest.raises(CaptureError, match=r"cannot be traced for batch \{tokens: \(2, 5\)\}"):
        layer_programs(captured(loss), 2, 5)


def test_a_model_whose_layers_depend_on_the_batch_is_refused():
    def loss(model, batch):
        tokens = batch["tokens"]
        x = model(tokens)
        return jnp.sum(model.mixes[0](tokens, x) if len(tokens) > 4 else x)

    with pytest.raises(CaptureError, match="must not depend on the batch's shape"):
        layer_programs(captured(loss), 2)
