"""Reshards run on eight virtual devices, against NumPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpar.errors import SpecError
from shardpar.lowering.transfer import Transfer, transfer
from shardpar.lowering.union import place, union_array
from shardpar.spec.layout_text import layout_from_text
from shardpar.spec.reshard import Kind, Tensor, fuse
from tests.lowering.layouts import held_by, numpy_pieces, whole
from tests.lowering.random_pairs import put

L = layout_from_text


def random_pairs(first: int, count: int) -> Counter[str]:
    """Compares pairs in a process of its own, which compiles faster than this one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.lowering.random_pairs", str(first), str(count)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pairs"] == count
    return Counter(found["communications"])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(4 if "SHARDPAR_LONG" in os.environ else 2))
def test_random_pairs_equal_numpy_bit_for_bit(chunk):
    kinds = random_pairs(128 * chunk, 128 if "SHARDPAR_LONG" in os.environ else 64)
    assert len(kinds) >= 9, "too few kinds of communication were met"


@pytest.mark.manual
@pytest.mark.skipif("SHARDPAR_LONG" not in os.environ, reason="20 minutes; set SHARDPAR_LONG=1")
def test_five_thousand_random_pairs_equal_numpy_bit_for_bit():
    print(sum((random_pairs(10_000 + 625 * k, 625) for k in range(8)), Counter()))


EACH_KIND = {
    "identity": ("[0,1]{split0:2}", "[0,1]{split0:2}"),
    "local slice": ("[0,1]{dup:2}", "[0,1]{split0:2}"),
    "send-recv": ("[0,1]{split0:2}", "[2,3]{split0:2}"),
    "all-reduce": ("[0,1,2]{partial:3}", "[0,1,2]{dup:3}"),
    "reduce-scatter": ("[0,1]{partial:2}", "[0,1]{split1:2}"),
    "all-gather": ("[0,1,2,3]{split0:2, split1:2}", "[0,1,2,3]{dup:2, split1:2}"),
    "all-to-all": ("[0,1]{split0:2}", "[0,1]{split1:2}"),
    "split-all-reduce": (
        "[0,1]{split0:2} + [2,3,4]{split0:3} + [5] across partial",
        "[0,1]{split0:2} + [2,3,4]{split0:3} + [5] across dup",
    ),
    "split-reduce-scatter": (
        "[0,1]{split0:2} + [2]{} across partial",
        "[0,1]{split0:2} + [2]{} across split0(0:3,1:3,0:3,1:3)",
    ),
    "split-all-gather": (
        "[0,1]{split0:2} + [2]{} across split0(8,4)",
        "[0,1]{split0:2} + [2]{} across dup",
    ),
    "batched send-receive": ("[0,1]{split0:2}", "[2,3]{split1:2} + [4] across dup"),
}


@pytest.mark.parametrize("kind", Kind.__args__)
def test_each_kind_of_communication_equals_numpy(kind):
    src, dst = map(L, EACH_KIND[kind])
    devices, value = jax.devices(), np.arange(72, dtype=np.float32).reshape(12, 6)
    resolved = fuse([Tensor(src, dst, value.shape, 4)])
    assert [c.kind for c in resolved.communications] == [kind]
    (moved,) = Transfer(resolved, [value.dtype])([put(src, value, 0, devices)])
    held = held_by(moved, devices)
    assert np.array_equal(whole(dst, value.shape, held), value)
    if dst.terms == 1:
        expected = numpy_pieces(dst, value)
        assert all(np.array_equal(held[d], expected[d]) for d in expected)


def test_addends_that_move_to_another_axis_of_the_mesh_are_moved_not_added_up():
    src, dst = L("[0,1,2,3]{partial:2, split0:2}"), L("[0,1,2,3]{split0:2, partial:2}")
    value = np.arange(32, dtype=np.int32).reshape(8, 4)
    resolved = fuse([Tensor(src, dst, value.shape, 4)])
    (moved,) = Transfer(resolved, [value.dtype])([put(src, value, 3, jax.devices())])
    assert np.array_equal(whole(dst, value.shape, held_by(moved, jax.devices())), value)


@pytest.mark.parametrize("dtype", ["bfloat16", "bool", "int8", "complex64", "float16", "uint32"])
def test_bits_arrive_as_they_left(dtype):
    bits = np.random.default_rng(0).integers(0, 2, (8, 8), dtype=np.int8)
    value = np.asarray(jnp.asarray(bits).astype(dtype))
    moved = transfer(
        {"x": place(value, L("[0,1]{split0:2}"))}, L("[2,3]{split1:2} + [4] across dup")
    )
    for device, piece in numpy_pieces(moved["x"].layout, value).items():
        assert held_by(moved["x"], jax.devices())[device].tobytes() == piece.tobytes()


def test_nan_payloads_survive_a_move():
    value = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000], np.uint32).view(np.float32)
    moved = transfer(place(value, L("[0]")), L("[1,2]{split0:2}"))
    got = np.concatenate([np.asarray(a) for a in moved.buffers(jax.devices()).values()])
    assert got.view(np.uint32).tolist() == value.view(np.uint32).tolist()


def test_a_pytree_of_layouts_and_of_arrays_of_any_rank():
    tree = {"scalar": np.float32(3.0), "vector": np.arange(6), "matrix": np.eye(4)}
    src, dst = L("[0,1]{dup:2}"), L("[2] + [3] across dup")
    placed = jax.tree.map(lambda x: place(x, src), tree)
    moved = transfer(placed, dict.fromkeys(tree, dst))
    for name, value in tree.items():
        for piece in held_by(moved[name], jax.devices()).values():
            assert np.array_equal(piece, value)


def test_a_sharded_jax_array_is_a_union_of_one_group():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("y", "x"))
    value = np.arange(32.0).reshape(4, 8)
    union = union_array(jax.device_put(value, sharding))
    moved = transfer(union, L("[5]"))
    assert np.array_equal(moved.arrays[0], value)
    assert union.layout.groups[0].parts_of(1) == 4


def test_donated_arrays_are_gone_and_what_stayed_in_place_is_not():
    src, dst = L("[0,1]{split0:2}"), L("[2,3]{split0:2}")
    gone = place(np.arange(8), src)
    moved = transfer(gone, dst, donate=True)
    assert all(a.is_deleted() for a in gone.arrays)
    stays = transfer(moved, dst, donate=True)
    assert np.array_equal(stays.arrays[0], np.arange(8))
    grown = transfer(stays, L("[2,3]{split0:2} + [4] across dup"), donate=True)
    assert np.array_equal(grown.arrays[0], np.arange(8))


def test_tied_arrays_can_be_donated_together():
    tied = place(np.arange(8), L("[0,1]{split0:2}"))
    moved = transfer({"a": tied, "b": tied}, L("[2] + [3] across dup"), donate=True)
    for name in "ab":
        assert np.array_equal(moved[name].arrays[1], np.arange(8))


@pytest.mark.parametrize("dst", ["[0,1]{dup:2}", "[0,1,2]{dup:3}"])
def test_without_donation_the_result_outlives_its_source_and_the_other_way_round(dst):
    source = place(np.arange(8), L("[0,1]{dup:2}"))
    consume = jax.jit(lambda a: a + 1, donate_argnums=0)
    first, second = transfer(source, L(dst)), transfer(source, L(dst))
    consume(first.arrays[0])
    assert np.array_equal(source.arrays[0], np.arange(8))
    consume(source.arrays[0])
    assert np.array_equal(second.arrays[0], np.arange(8))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e4m3fn"])
def test_numbers_of_a_byte_and_less_move_packed_and_alone(dtype):
    value = np.asarray(jnp.arange(16, dtype=jnp.float32).reshape(4, 4) % 7).astype(jnp.dtype(dtype))
    tree = {"a": place(value, L("[0,1]{split0:2}")), "b": place(value, L("[0,1]{split0:2}"))}
    moved = transfer(tree, L("[2,3]{split1:2} + [4] across dup"))
    for union in moved.values():
        assert np.array_equal(np.asarray(union.arrays[1], np.float32), value.astype(np.float32))


def test_plain_jax_arrays_are_taken_as_they_are():
    moved = transfer(jnp.arange(6), L("[3,4]{split0:2}"))
    assert np.array_equal(moved.arrays[0], np.arange(6))


MISUSES = {
    "numpy leaf": (lambda: transfer(np.ones(3), L("[0]")), "a leaf to transfer is a ndarray"),
    "text": (lambda: transfer(jnp.ones(3), "[0]"), "a layout to transfer to is a str"),
    "other tree": (
        lambda: transfer({"a": jnp.ones(3)}, {"b": L("[0]")}),
        "the layouts are not a tree like the arrays'",
    ),
    "other dtype": (
        lambda: Transfer(fuse([Tensor(L("[0]"), L("[1]"), (3,), 4)]), [np.int32])(
            [union_array(jnp.ones(3))]
        ),
        "an array is float32; this transfer is for int32",
    ),
    "other width": (
        lambda: Transfer(fuse([Tensor(L("[0]"), L("[1]"), (3,), 2)]), [np.int32]),
        "the dtypes ['int32'] are not those of the reshard, whose elements have [2] bytes",
    ),
    "too few": (
        lambda: Transfer(fuse([Tensor(L("[0]"), L("[1]"), (3,), 4)]), [np.int32])([]),
        "there are 0 arrays; this transfer is for 1",
    ),
    "no array": (lambda: place([None], L("[0]")), "this cannot be placed on devices"),
    "other order of devices": (
        lambda: place(np.ones(3), L("[0]")).buffers(jax.devices()[1:]),
        "give the devices in the order in which it was placed",
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_a_spec_error_of_one_line(case):
    run, message = MISUSES[case]
    with pytest.raises(SpecError) as error:
        run()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_piece_is_bigger_than_a_layout_says(monkeypatch):
    """A sum across groups must not gather the array on any device."""
    src = L("[0,1,2,3]{split0:4} + [4,5]{split0:2} across partial")
    dst = L("[0,1,2,3]{split0:4} + [4,5]{split0:2} across dup")
    value = np.ones((64, 64), np.float32)
    placed = place(value, src)
    sizes = []
    original = jax.make_array_from_single_device_arrays

    def watched(shape, sharding, arrays, **kwargs):
        sizes.extend(a.size for a in arrays)
        return original(shape, sharding, arrays, **kwargs)

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", watched)
    moved = transfer(placed, dst)
    assert np.array_equal(whole(dst, value.shape, held_by(moved, jax.devices())), value)
    assert max(sizes) <= value.size // 2


def test_nothing_goes_through_the_host(monkeypatch):
    src, dst = L("[0,1,2,3]{split0:4}"), L("[4,5]{split1:2} + [6] across dup")
    placed = place(np.arange(64).reshape(8, 8), src)

    def forbidden(_):
        raise AssertionError("an array was gathered on the host")

    monkeypatch.setattr(type(placed.arrays[0]), "_value", property(forbidden))
    moved = transfer(placed, dst)
    monkeypatch.undo()
    assert np.array_equal(moved.arrays[1], np.arange(64).reshape(8, 8))


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ("[0]", "[99]", "device 99 is not among the 8 devices"),
        ("[0]", "[0,1,2]{split0:3}", "which do not divide its 8 indices"),
    ],
)
def test_a_transfer_that_cannot_be_is_a_spec_error(src, dst, message):
    with pytest.raises(SpecError, match=message):
        transfer(place(np.arange(8), L(src)), L(dst))


def test_a_transfer_made_for_another_layout_is_refused():
    program = Transfer(fuse([Tensor(L("[0]"), L("[1]"), (8,), 4)]), [np.float32])
    with pytest.raises(SpecError, match=r"is in layout \[2\]{}; this transfer starts from \[0\]{}"):
        program([place(np.arange(8, dtype=np.float32), L("[2]"))])
    with pytest.raises(SpecError, match="is on device 9, but there are 8 devices"):
        place(np.arange(8), L("[9]"))
