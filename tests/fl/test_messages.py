"""Whatever bytes arrive become what was asked for, or a PartyError, and nothing else."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shardpar.errors import PartyError
from shardpar.fl.channel import local_channels
from shardpar.fl.messages import Message, Tensor, array_of, decode, encode, tensor_of

DTYPES = ["float32", "float64", "int32", "int64", "uint8", "uint32", "uint64", "bool"]


class Update(Message):
    """A message with everything in it."""

    party: str
    weight: float
    tensors: dict[str, Tensor]


class Other(Message):
    """Another message of the same shape."""

    party: str
    weight: float
    tensors: dict[str, Tensor]


VALID = encode(Update("a", 2.0, {"w": tensor_of(np.arange(6, dtype=np.float32).reshape(2, 3))}))


@given(st.sampled_from(DTYPES).flatmap(lambda d: arrays.arrays(d, arrays.array_shapes(min_side=0))))
def test_arrays_come_back_bit_for_bit(array):
    sent = encode(Update("a", 1.0, {"w": tensor_of(array)}))
    found = array_of(decode(sent, Update).tensors["w"])
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, len(VALID)), st.integers(0, 8))
def test_mutated_bytes_are_a_message_or_refused(noise, at, dropped):
    for data in (noise, VALID[:at], VALID[:at] + noise + VALID[at + dropped :]):
        with contextlib.suppress(PartyError):
            message = decode(data, Update, party="b")
            for tensor in message.tensors.values():
                array_of(tensor, party="b")


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("float32", (2, 3), b"\0" * 23),
        Tensor("float32", (0, 1 << 62), b""),
        Tensor("uint8", (0, *[1 << 40] * 7), b""),
        Tensor("float32", (2**62, 2**62), b""),
        Tensor("uint8", (-1,), b""),
        Tensor("uint8", (-1, -1), b"\0"),
        Tensor("uint8", (1,) * 9, b"\0"),
        Tensor("bool", (1,), b"\2"),
    ],
)
def test_arrays_that_lie_about_themselves_are_refused(tensor):
    with pytest.raises(PartyError):
        array_of(tensor)


@pytest.mark.parametrize("dtype", ["object", "complex64", "float16", "U3"])
def test_only_plain_numbers_are_sent(dtype):
    with pytest.raises(TypeError, match="use one of"):
        tensor_of(np.zeros(1, dtype))


def test_another_kind_or_an_unknown_field_is_refused():
    with pytest.raises(PartyError, match="not a Other"):
        decode(VALID, Other)
    extended = msgspec.msgpack.decode(VALID) | {"more": 1}
    with pytest.raises(PartyError):
        decode(msgspec.msgpack.encode(extended), Update)


def test_channels_keep_order_tell_topics_apart_and_name_who_is_silent():
    ends = local_channels(["a", "b", "c"])
    for weight in (1.0, 2.0):
        ends["a"].send("b", "x", Update("a", weight, {}))
    ends["a"].send("b", "y", Update("a", 3.0, {}))
    ends["c"].send("b", "x", Update("c", 4.0, {}))
    weights = [
        ends["b"].receive(sender, topic, Update).weight
        for sender, topic in (("a", "y"), ("c", "x"), ("a", "x"), ("a", "x"))
    ]
    assert weights == [3.0, 4.0, 1.0, 2.0]
    with pytest.raises(PartyError, match="'x'") as silent:
        ends["b"].receive("a", "x", Update, timeout_s=0.01)
    assert silent.value.party == "a"
    with pytest.raises(PartyError, match="no party 'd'"):
        ends["a"].send("d", "x", Update("a", 1.0, {}))
    assert ends["c"].sent_bytes == len(encode(Update("c", 4.0, {})))
