"""What parties say to each other: typed messages, checked as they are read. Nothing is unpickled.

A message is a msgspec Struct in MessagePack. What arrives is only what its type allows, within the
sizes that the reader states; everything else is a `PartyError`, never another exception.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar, get_args

import msgspec
import numpy as np

from shardpar.errors import PartyError

DType = Literal["float32", "float64", "int32", "int64", "uint8", "uint32", "uint64", "bool"]
_DTYPES = frozenset(get_args(DType))
_MOST_DIMS = 8
_MOST_ELEMENTS = 1 << 48


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of every message; its class name travels with it."""


M = TypeVar("M", bound=Message)


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array in a message: little-endian, C order.

    >>> array_of(tensor_of(np.arange(3, dtype=np.uint32))).tolist()
    [0, 1, 2]
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes


def tensor_of(array: np.ndarray) -> Tensor:
    """An array as it is sent.

    Raises:
      TypeError: an array of this dtype is not sent; convert it.
    """
    dtype = array.dtype.name
    if dtype not in _DTYPES:
        raise TypeError(f"arrays of {dtype} are not sent; use one of {', '.join(sorted(_DTYPES))}")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return Tensor(dtype, tuple(array.shape), np.ascontiguousarray(little).tobytes())  # type: ignore[arg-type]


def array_of(tensor: Tensor, *, party: str = "a party") -> np.ndarray:
    """The array in a message, read-only.

    Raises:
      PartyError: its shape does not fit its bytes.
    """
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    shape = tensor.shape
    # An empty array may still have other dims that no array can have.
    sizes = math.prod(max(size, 1) for size in shape)
    if len(shape) > _MOST_DIMS or min(shape, default=0) < 0 or sizes > _MOST_ELEMENTS:
        raise PartyError(f"{party} sent an array of shape {shape}", party=party)
    if math.prod(shape) * dtype.itemsize != len(tensor.data):
        raise PartyError(
            f"{party} sent {len(tensor.data)} bytes for an array of {tensor.dtype} {shape}",
            party=party,
        )
    if tensor.dtype == "bool" and any(byte > 1 for byte in set(tensor.data)):
        raise PartyError(f"{party} sent a truth value that is neither 0 nor 1", party=party)
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def printable(text: str, most: int = 500) -> str:
    r"""Words of another party as they may stand in a log: short, and without control characters.

    >>> printable("all is well" + chr(10) + "root logged in")
    'all is well?root logged in'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes | bytearray, kind: type[M], *, party: str = "a party") -> M:
    """The message of this kind in some bytes.

    Raises:
      PartyError: the bytes hold something else.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PartyError(
            f"{party} sent something that is not a {kind.__name__}: {printable(str(error))}",
            party=party,
        ) from None
