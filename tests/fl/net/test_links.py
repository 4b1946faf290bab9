"""Whatever is lost on the way, and however often, messages come once, in order, within bounds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import PartyError
from shardpar.fl.messages import Message
from shardpar.fl.net import envelopes
from shardpar.fl.net.envelopes import Envelope, envelopes_of
from shardpar.fl.net.frames import Ack, Hello, Refusal
from shardpar.fl.net.links import OVERHEAD_BYTES, Link, Outbound, cost_bytes

PART, MOST = 16, 100
WINDOW = 3 * (MOST + OVERHEAD_BYTES)
ME, OTHER = bytes(16), bytes([1]) * 16


@pytest.fixture(autouse=True, scope="module")
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envelopes, "PART_BYTES", PART)
        yield


def link(party: str, peer: str, incarnation: bytes, **changes) -> Link:
    given = {
        "job": "j",
        "party": party,
        "peer": peer,
        "parties": ("a", "b"),
        "incarnation": incarnation,
        "max_message_bytes": MOST,
        "window_bytes": WINDOW,
    }
    return Link(**given | changes)


@dataclass
class End:
    """A link with what a party does to it, and frames on their way to the other end."""

    link: Link
    wire: deque[Message] = field(default_factory=deque)
    sent: list[bytes] = field(default_factory=list)
    inbox: deque[bytes] = field(default_factory=deque)
    came: list[bytes] = field(default_factory=list)

    def put(self, size: int) -> None:
        data = len(self.sent).to_bytes(4, "big") + bytes(size)
        self.sent.append(data)
        self.link.outbound.put(f"t{size % 3}", data)

    def speak(self) -> None:
        """Puts all that may be sent onto the wire."""
        ack = self.link.ack()
        if ack is not None:
            self.wire.append(ack)
        while (kept := self.link.outbound.next()) is not None:
            self.wire.extend(
                envelopes_of(
                    kept.data, job="j", sender=self.link.party, receiver=self.link.peer,
                    topic=kept.topic, sequence=kept.sequence,
                )
            )  # fmt: skip

    def hear(self, frame: Message) -> None:
        if isinstance(frame, Ack):
            self.link.outbound.acknowledged(frame.received, frame.taken)
            return
        assert isinstance(frame, Envelope)
        whole = self.link.inbound.add(frame)
        if whole is not None:
            self.inbox.append(bytes(whole[1]))
        assert sum(cost_bytes(len(data)) for data in self.inbox) <= WINDOW

    def take(self) -> None:
        if self.inbox:
            data = self.inbox.popleft()
            self.came.append(data)
            self.link.inbound.take(len(data))


def pair() -> dict[str, End]:
    return {"a": End(link("a", "b", ME)), "b": End(link("b", "a", OTHER))}


def connect(ends: dict[str, End]) -> None:
    """As in a connection: one greets, the other answers after it has met the first."""
    for end in ends.values():
        end.wire.clear()
    first = ends["a"].link.hello()
    assert ends["b"].link.meet(first) is None
    assert ends["a"].link.meet(ends["b"].link.hello()) is None


SIDES = st.sampled_from("ab")
STEPS = st.one_of(
    st.tuples(st.just("put"), SIDES, st.integers(0, MOST - 4)),
    st.tuples(st.just("speak"), SIDES, st.just(0)),
    st.tuples(st.just("carry"), SIDES, st.integers(1, 12)),
    st.tuples(st.just("take"), SIDES, st.integers(1, 3)),
    st.tuples(st.just("reconnect"), SIDES, st.just(0)),
    st.tuples(st.just("half a greeting"), SIDES, st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_all_comes_once_and_in_order_whatever_is_lost(steps):
    ends = pair()
    other = {"a": ends["b"], "b": ends["a"]}
    connect(ends)
    for what, side, count in steps:
        end = ends[side]
        match what:
            case "put":
                end.put(count)
            case "speak":
                end.speak()
            case "carry":
                for _ in range(min(count, len(end.wire))):
                    other[side].hear(end.wire.popleft())
            case "take":
                for _ in range(count):
                    end.take()
            case "reconnect":
                connect(ends)
            case "half a greeting":
                # Only one end learns of the new connection before it breaks.
                assert ends["b"].link.meet(ends["a"].link.hello()) is None
                connect(ends)
        for name, at in ends.items():
            assert at.came + list(at.inbox) == other[name].sent[: len(at.came) + len(at.inbox)]
    connect(ends)
    for _ in range(10_000):
        for side, end in ends.items():
            end.speak()
            while end.wire:
                other[side].hear(end.wire.popleft())
            end.take()
        if all(not end.link.outbound.kept for end in ends.values()):
            break
    for side, end in ends.items():
        while end.inbox:
            end.take()
        assert end.came == other[side].sent
        assert end.link.outbound.kept_bytes == 0


def test_a_window_stops_a_sender_and_a_sender_that_ignores_it():
    ends = pair()
    connect(ends)
    for _ in range(5):
        ends["a"].put(MOST - 4)
    ends["a"].speak()
    carried = [f for f in ends["a"].wire if isinstance(f, Envelope)]
    assert {envelope.sequence for envelope in carried} == {1, 2, 3}
    for envelope in carried:
        ends["b"].hear(envelope)
    (more, *_) = envelopes_of(b"x", job="j", sender="a", receiver="b", topic="t", sequence=4)
    with pytest.raises(PartyError, match="though only 0 may wait"):
        ends["b"].hear(more)
    ends["b"].take()
    ends["b"].hear(more)


@pytest.mark.parametrize(
    ("received", "taken"), [(3, 0), (2, 2 * OVERHEAD_BYTES + 3), (0, 0), (1, 0)]
)
def test_acknowledgements_that_cannot_be_are_refused(received, taken):
    out = Outbound("b")
    for data in (b"1", b"2", b"3"):
        out.put("t", data)
    out.resume(received=0, taken=0, window=cost_bytes(1) * 2)
    assert out.next().sequence == 1
    assert out.next().sequence == 2
    assert out.next() is None
    out.acknowledged(1, cost_bytes(1))
    with pytest.raises(PartyError):
        out.acknowledged(received, taken)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 1"),
        ({"job": "other"}, "job 'j', not in 'other'"),
        ({"sender": "c"}, "speaks with a"),
        ({"receiver": "c"}, "from 'a' to 'c'"),
        ({"parties": bytes(32)}, "other parties"),
        ({"received": 1}, "counts messages of nobody"),
        ({"taken": 1}, "counts messages of nobody"),
    ],
)
def test_a_greeting_that_is_wrong_is_refused_for_good(changes, words):
    hello = msgspec.structs.replace(link("a", "b", ME).hello(), **changes)
    refusal = link("b", "a", OTHER).meet(hello)
    assert refusal is not None
    assert refusal.lasting
    assert words in refusal.reason


def test_counts_beyond_what_was_sent_are_refused_on_connecting():
    ends = pair()
    connect(ends)
    lie = msgspec.structs.replace(ends["a"].link.hello(), received=5)
    with pytest.raises(PartyError, match="acknowledges message 5"):
        ends["b"].link.meet(lie)


def spoken() -> dict[str, End]:
    """A pair that has exchanged a message, with another under way."""
    ends = pair()
    connect(ends)
    ends["a"].put(3)
    ends["a"].speak()
    while ends["a"].wire:
        ends["b"].hear(ends["a"].wire.popleft())
    ends["b"].put(4)
    return ends


def test_a_peer_that_started_anew_waits_until_it_is_accepted():
    ends = spoken()
    anew = link("a", "b", bytes([2]) * 16)
    for _ in range(2):
        refusal = ends["b"].link.meet(anew.hello())
        assert isinstance(refusal, Refusal)
        assert not refusal.lasting
        assert "started anew" in refusal.reason
        assert ends["b"].link.restarted
    ends["b"].link.accept()
    assert ends["b"].link.meet(anew.hello()) is None
    assert anew.meet(ends["b"].link.hello()) is None
    assert ends["b"].link.outbound.next() is None, "what was for its predecessor is dropped"
    ends["a"] = End(anew)
    ends["b"].sent.clear()
    ends["a"].put(7)
    ends["a"].speak()
    while ends["a"].wire:
        ends["b"].hear(ends["a"].wire.popleft())
    assert list(ends["b"].inbox)[-1] == ends["a"].sent[0]


def test_who_was_dialled_and_started_anew_does_not_take_over_its_predecessors_counts():
    ends = spoken()
    anew = link("b", "a", bytes([2]) * 16)
    refusal = anew.meet(ends["a"].link.hello())
    assert isinstance(refusal, Refusal)
    assert not refusal.lasting
    assert ends["a"].link.meet(anew.hello()) is not None
    assert ends["a"].link.restarted
    ends["a"].link.accept()
    assert anew.meet(ends["a"].link.hello()) is None
    assert ends["a"].link.meet(anew.hello()) is None


def test_a_peer_that_started_anew_before_anything_was_said_needs_no_leave():
    ends = pair()
    connect(ends)
    ends["b"].put(5)
    anew = link("a", "b", bytes([2]) * 16)
    assert ends["b"].link.meet(anew.hello()) is None
    assert anew.meet(ends["b"].link.hello()) is None
    assert ends["b"].link.outbound.next().data == ends["b"].sent[0]


def test_a_greeting_is_no_secret_but_says_where_one_stands():
    ends = spoken()
    assert ends["b"].link.hello() == Hello(
        1, "j", "b", "a", ends["a"].link.hello().parties, OTHER, ME, 1, 0, WINDOW
    )
