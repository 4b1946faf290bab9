"""Every message of `shardpar.fl`, how to make valid ones of each kind, and how to spoil them.

Kinds are found by importing the whole package and made from their type hints, so that a message
that someone adds is fuzzed without being named here. `CONSUMERS` says what more to do with some.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as types

import shardpar.fl
from shardpar.fl.messages import Message, Tensor, array_of
from shardpar.fl.net.connections import Connection
from shardpar.fl.net.frames import Frame
from shardpar.fl.net.links import Link, cost_bytes
from shardpar.fl.net.peers import Peer
from tests.fl.net.attacker import greeting
from tests.fl.net.parties import JOB, PARTIES, QUICK

LIKELY = ("", JOB, *PARTIES, "x" * 63)
_LIES = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
"""MessagePack's headers of arrays, maps, bytes, text and extensions with a length of 32 bits."""
_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, float("nan"),
    float("inf"), "", "x" * 300, "\0", b"", bytes(33), [], {}, [[]] * 20, {"type": "Frame"},
    msgspec.msgpack.Ext(5, b"abc"),
)  # fmt: skip


def modules() -> Iterator[str]:
    """Imports every module of the package; those whose extras are not installed are left out."""
    for found in pkgutil.walk_packages(shardpar.fl.__path__, "shardpar.fl."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("shardpar"):
                raise
        else:
            yield found.name


def kinds() -> list[type[Message]]:
    """Every kind of message that the package defines."""
    list(modules())
    found: set[type[Message]] = set()
    open_ = [Message]
    while open_:
        for kind in open_.pop().__subclasses__():
            open_.append(kind)
            # Structs that are made twice, as with slots, leave their first version behind.
            if getattr(inspect.getmodule(kind), kind.__name__, None) is kind:
                found.add(kind)
    ours = [kind for kind in found if kind.__module__.startswith("shardpar.fl")]
    return sorted(ours, key=lambda kind: (kind.__module__, kind.__name__))


def made(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Valid messages of a kind.

    Raises:
      NotImplementedError: a field has a type that is not known here.
    """
    return _of(types.type_info(kind))


def _of(info: types.Type) -> st.SearchStrategy[Any]:
    match info:
        case types.StructType(cls=cls) if cls is Tensor:
            return _TENSORS
        case types.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: _of(field.type) for field in fields})
        case types.DataclassType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: _of(field.type) for field in fields})
        case types.UnionType(types=members):
            return st.one_of([_of(member) for member in members])
        case types.LiteralType(values=values):
            return st.sampled_from(values)
        case types.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case types.NoneType():
            return st.none()
        case types.BoolType():
            return st.booleans()
        case types.IntType():
            least = _limit(info.ge, info.gt, 1, -(2**63))
            most = _limit(info.le, info.lt, -1, 2**63 - 1)
            likely = [n for n in (0, 1, 2, 3) if least <= n <= most] or [least]
            return st.one_of(st.sampled_from(likely), st.integers(least, most))
        case types.FloatType():
            return st.floats(
                min_value=info.ge if info.ge is not None else info.gt,
                max_value=info.le if info.le is not None else info.lt,
                exclude_min=info.gt is not None,
                exclude_max=info.lt is not None,
                allow_nan=False,
            )
        case types.StrType():
            least, most = info.min_length or 0, info.max_length
            if info.pattern is not None:
                return st.from_regex(info.pattern, fullmatch=True)
            text = st.text(min_size=least, max_size=min(most or 20, least + 20))
            likely = [s for s in LIKELY if least <= len(s) <= (most or 63)]
            return st.one_of(st.sampled_from(likely), text) if likely else text
        case types.BytesType() | types.ByteArrayType() | types.MemoryViewType():
            least = info.min_length or 0
            most = info.max_length if info.max_length is not None else least + 64
            return st.binary(min_size=least, max_size=min(most, least + 64))
        case types.VarTupleType():
            return _several(info).map(tuple)
        case types.ListType():
            return _several(info)
        case types.SetType():
            return _several(info).map(set)
        case types.FrozenSetType():
            return _several(info).map(frozenset)
        case types.TupleType(item_types=members):
            return st.tuples(*[_of(member) for member in members])
        case types.DictType():
            return st.dictionaries(
                _of(info.key_type), _of(info.value_type), min_size=info.min_length or 0, max_size=4
            )
        case types.Metadata(type=inner):
            return _of(inner)
    raise NotImplementedError(f"add {info!r} to tests/fl/wire.py, so that it is fuzzed")


def _limit(closed: int | None, open_: int | None, step: int, default: int) -> int:
    if closed is not None:
        return int(closed)
    return int(open_) + step if open_ is not None else default


def _several(info: Any) -> st.SearchStrategy[list[Any]]:
    least = info.min_length or 0
    most = min(info.max_length if info.max_length is not None else least + 4, least + 4)
    return st.lists(_of(info.item_type), min_size=least, max_size=most)


_TENSORS = st.one_of(
    st.builds(
        lambda shape, dtype: Tensor(dtype, shape, bytes(shape[0] * {"u": 1, "f": 4}[dtype[0]])),
        st.tuples(st.integers(0, 9)),
        st.sampled_from(["uint8", "float32"]),
    ),
    st.builds(
        Tensor,
        st.sampled_from(["float32", "float64", "int64", "uint32", "bool"]),
        st.lists(st.integers(-3, 2**62), max_size=9).map(tuple),
        st.binary(max_size=64),
    ),
)


def spoiled(data: bytes, draw: random.Random) -> bytes:
    """Bytes of a message changed in a few places: bits, lengths that lie, values of other types."""
    if draw.random() < 0.3:
        tree = _replaced(msgspec.msgpack.decode(data), draw)
        return msgspec.msgpack.encode(tree)
    raw = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(raw)) if raw else 0
        match draw.randrange(6):
            case 0:
                raw[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del raw[at : at + draw.randint(1, 40)]
            case 2:
                raw[at:at] = draw.randbytes(draw.randint(1, 9))
            case 3:
                raw[at:at] = raw[at : at + 64]
            case 4:
                length = draw.choice((2**32 - 1, 2**31, 2**20, len(raw)))
                raw[at : at + draw.randrange(2)] = draw.choice(_LIES) + struct.pack(">I", length)
            case 5:
                raw[at:at] = draw.choice((b"\x91", b"\x81\xa0")) * draw.choice((3, 2000))
    return bytes(raw)


def _replaced(tree: Any, draw: random.Random) -> Any:
    """A tree with one node replaced."""
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(list(tree))
        return tree | {key: _replaced(tree[key], draw)}
    if isinstance(tree, list) and tree and draw.random() < 0.7:
        at = draw.randrange(len(tree))
        return [*tree[:at], _replaced(tree[at], draw), *tree[at + 1 :]]
    return draw.choice(_ODD)


def used(message: Message) -> None:
    """Does with a message what any reader may: arrays are made, methods without arguments called.

    Raises:
      PartyError: it does not hold what it says.
    """
    for inner in _structs(message):
        if isinstance(inner, Tensor):
            array_of(inner)
        for name, method in vars(type(inner)).items():
            plain = inspect.isfunction(method) and not name.startswith("_")
            if plain and len(inspect.signature(method).parameters) == 1:
                getattr(inner, name)()


def _structs(value: Any) -> Iterator[Any]:
    if isinstance(value, msgspec.Struct):
        yield value
        for name in value.__struct_fields__:
            yield from _structs(getattr(value, name))
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from _structs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _structs(item)


def _linked(frames: list[bytes]) -> None:
    """A peer takes frames over as many connections as it needs; it never fails, nor takes much."""
    link = Link(
        job=JOB, party="agg", peer="a", parties=PARTIES, incarnation=bytes(16),
        max_message_bytes=1 << 16, window_bytes=1 << 17,
    )  # fmt: skip
    peer = Peer(link, QUICK, where="", dials=False)
    for _ in range(3):
        peer.put("down", b"something to acknowledge", 0)
    connection = None
    for raw in frames:
        if connection is None or connection.ended or connection.farewell:
            peer._broken = None
            connection = Connection(cancel=lambda: None)
            sending = peer.frames(connection)
            if peer.welcome(connection, greeting("a")) is not None:
                return
            for _ in range(3):
                next(sending)
        if not peer.take(connection, raw):
            peer.lose(connection, "")
        held = sum(cost_bytes(len(data)) for box in peer._inbox.values() for data in box)
        assert held <= 1 << 17


CONSUMERS: dict[type[Message], Callable[[list[bytes]], None]] = {Frame: _linked}
"""What is done with the bytes of some kinds beyond reading them; each fails by an exception."""
