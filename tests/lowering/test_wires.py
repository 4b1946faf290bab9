"""What stages send one another: pieces copied where they are whole, cut and sent where not."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardpar.lowering.wires import Wire, pieces_are_there, rehomed

SHAPE = (8, 4)


def sharding(devices, *spec, sizes=None):
    sizes = sizes or (len(devices),)
    names = tuple("ab"[: len(sizes)])
    mesh = Mesh(
        np.array(jax.devices())[list(devices)].reshape(sizes),
        names,
        axis_types=(AxisType.Auto,) * len(names),
    )
    return NamedSharding(mesh, PartitionSpec(*spec))


def wire(come, go):
    shapes = [jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=s) for s in (come, go)]
    return Wire(shapes[:1], shapes[1:], jax.devices())


WAYS = {
    "one device to one": (sharding([0]), sharding([1]), True),
    "halves to the same halves": (sharding([0, 1], "a"), sharding([2, 3], "a"), True),
    "copies to one of them": (sharding([0, 1]), sharding([4]), True),
    "one to copies": (sharding([0]), sharding([1, 2, 3]), True),
    "to devices that have it": (sharding([0, 1]), sharding([1, 0]), True),
    "quarters in another order": (
        sharding([0, 1, 2, 3], "a", "b", sizes=(2, 2)),
        sharding([4, 5, 6, 7], "b", "a", sizes=(2, 2)),
        True,
    ),
    "halves to the whole": (sharding([0, 1], "a"), sharding([2]), False),
    "the whole to halves": (sharding([0]), sharding([1, 2], "a"), False),
    "rows to columns": (sharding([0, 1], "a"), sharding([2, 3], None, "a"), False),
    "halves to quarters": (sharding([0, 1], "a"), sharding([4, 5, 6, 7], "a"), False),
    "rows to columns in place": (sharding([0, 1], "a"), sharding([0, 1], None, "a"), False),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_array_arrives_as_it_was_and_never_over_the_host(way, monkeypatch):
    come, go, copied = WAYS[way]
    value = np.arange(32, dtype=np.float32).reshape(SHAPE)
    array = jax.device_put(value, come)
    assert pieces_are_there(come, go, SHAPE) == copied
    puts = []
    put = jax.device_put

    def watched(*args, **kwargs):
        puts.append(args)
        return put(*args, **kwargs)

    def forbidden(_):
        raise AssertionError("an array was gathered on the host")

    monkeypatch.setattr(jax, "device_put", watched)
    monkeypatch.setattr(type(array), "_value", property(forbidden))
    (moved,) = wire(come, go)([array])
    monkeypatch.undo()
    assert moved.sharding == go
    assert np.array_equal(moved, value)
    assert np.array_equal(array, value)
    if copied:
        assert [targets for _, targets in puts] == [[go]]


def test_arrays_of_any_dtype_travel_together():
    come, go = sharding([0, 1], "a"), sharding([2, 3], None, "a")
    values = [
        np.arange(32).reshape(SHAPE).astype(dtype) for dtype in ("float32", "int32", "bfloat16")
    ]
    arrays = [jax.device_put(value, come) for value in values]
    there = [jax.ShapeDtypeStruct(SHAPE, x.dtype, sharding=go) for x in arrays]
    here = [jax.ShapeDtypeStruct(SHAPE, x.dtype, sharding=come) for x in arrays]
    for moved, value in zip(Wire(here, there, jax.devices())(arrays), values, strict=True):
        assert moved.dtype == value.dtype
        assert np.array_equal(np.asarray(moved), value)


def test_one_array_that_must_be_cut_takes_the_others_along():
    whole, half = sharding([0]), sharding([2, 3], "a")
    shapes = [jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=whole)] * 2
    there = [jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=s) for s in (half, sharding([2, 3]))]
    value = np.arange(32, dtype=np.float32).reshape(SHAPE)
    arrays = [jax.device_put(value, whole), jax.device_put(-value, whole)]
    moved = Wire(shapes, there, jax.devices())(arrays)
    assert [x.sharding for x in moved] == [s.sharding for s in there]
    assert np.array_equal(moved[0], value)
    assert np.array_equal(moved[1], -value)


def test_a_wire_that_is_used_again_compiles_nothing():
    compiled = []

    def note(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    come, go = sharding([0, 1], "a"), sharding([2, 3], None, "a")
    array = jax.device_put(np.arange(32, dtype=np.float32).reshape(SHAPE), come)
    one = wire(come, go)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        one([array])
        jax.block_until_ready(one([array]))
        before = len(compiled)
        one([array])
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(compiled) == before


def test_an_array_under_an_equal_sharding_of_another_mesh_is_not_copied():
    array = jax.device_put(np.arange(32.0).reshape(SHAPE), sharding([0, 1], "a"))
    other = sharding([0, 1], "a", None)
    moved = rehomed(array, other)
    assert moved.sharding == other
    pieces = [
        {s.device: s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
        for x in (array, moved)
    ]
    assert pieces[0] == pieces[1]
    assert rehomed(array, array.sharding) is array
