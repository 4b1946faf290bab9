"""Whatever comes instead of a message: no crash, no hang, no more memory than its size allows.

`SHARDPAR_LONG=1` sends more than 100,000 of each kind.
"""

from __future__ import annotations

import os
import random
import time
import tracemalloc
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shardpar.errors import PartyError
from shardpar.fl.messages import Message, decode, encode
from shardpar.fl.net.envelopes import Envelope
from shardpar.fl.net.frames import Ack, Beat, Bye, Frame, Hello, Refusal
from tests.fl.wire import CONSUMERS, kinds, made, spoiled, used

LONG = "SHARDPAR_LONG" in os.environ
EXAMPLES = 5_000 if LONG else 25
MUTANTS = 20
MOST_S = 2.0
KINDS = kinds()


def most_bytes(size: int) -> int:
    """What reading `size` bytes may take: MessagePack says an empty struct in a byte or two."""
    return 64 * size + (1 << 14)


def read(kind: type[Message], data: bytes) -> PartyError | None:
    """Why the bytes are no message; anything but a message or a `PartyError` is a failure."""
    try:
        used(decode(data, kind, party="a"))
    except PartyError as error:
        return error
    return None


@dataclass
class Seen:
    """What became of mutants, and what the dearest of them cost."""

    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    memory: float = 0.0

    def reads(self, kind: type[Message], raw: bytes) -> None:
        """Reads a mutant."""
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        began = time.thread_time()
        error = read(kind, raw)
        self.slowest_s = max(self.slowest_s, time.thread_time() - began)
        taken = tracemalloc.get_traced_memory()[1] - before
        self.memory = max(self.memory, taken / most_bytes(len(raw)))
        if error is None:
            self.read += 1
            return
        self.refused += 1
        assert error.party in ("a", "a party")
        assert len(str(error)) < 1000
        assert str(error).isprintable()


def fuzz(kind: type[Message], examples: int, phases: Collection[Phase] = tuple(Phase)) -> Seen:
    """Reads mutants of messages of a kind; fails when one does harm."""
    seen = Seen()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(made(kind), st.integers(0, 2**32))
    def run(message: Any, seed: int) -> None:
        data = encode(message)
        assert decode(data, kind) == message
        draw = random.Random(seed)
        wire = [spoiled(data, draw) for _ in range(MUTANTS)]
        tracemalloc.start()
        try:
            for raw in wire:
                seen.reads(kind, raw)
        finally:
            tracemalloc.stop()
        assert seen.slowest_s < MOST_S
        assert seen.memory < 1
        if kind in CONSUMERS:
            CONSUMERS[kind]([data, *wire])

    run()
    return seen


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_is_read_or_refused_quickly_and_in_little_memory(kind):
    seen = fuzz(kind, EXAMPLES)
    print(f"{kind.__name__}: {seen}")
    assert seen.read + seen.refused >= MUTANTS
    assert seen.refused


def test_every_kind_of_message_of_the_package_is_covered():
    names = {kind.__name__ for kind in KINDS}
    assert {k.__name__ for k in (Frame, Envelope, Hello, Ack, Beat, Bye, Refusal)} <= names
    assert {"AdvertiseKeys", "MaskedInput", "Unmask", "ToClient"} <= names
    for kind in KINDS:
        made(kind)


def test_a_field_that_cannot_be_made_is_pointed_out():
    class Odd(Message):
        when: msgspec.Raw

    with pytest.raises(NotImplementedError, match=r"add .* to tests/fl/wire.py"):
        made(Odd)


def test_the_bounds_fail_on_a_reader_that_unpacks_what_it_is_told():
    class Greedy(Message):
        count: int

        def unpacked(self) -> bytes:
            return bytes(min(abs(self.count), 1 << 24))

    with pytest.raises(AssertionError):
        fuzz(Greedy, 200, (Phase.generate,))
