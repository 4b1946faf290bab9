"""What processes tell each other, over a store that behaves as jax's coordination service does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from shardpar.errors import RunError, UserError
from shardpar.run.peers import ALONE, Peers


class Store:
    """Keys and values in memory; a key that was not set in time raises what jax raises."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key):
        with self.changed:
            if key not in self.values:
                raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            self.values.pop(key, None)

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]


def together(count, do):
    """What each of some processes gets, or the error that it raises."""
    store = Store()

    def one(index):
        try:
            return do(Peers(index, count, store))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count))), store


def test_all_do_what_the_first_has_decided():
    got, _ = together(
        3, lambda peers: [peers.decide("x", lambda n=n: [peers.index, n]) for n in "ab"]
    )
    assert got == [[[0, "a"], [0, "b"]]] * 3


def test_an_error_of_the_first_is_everybodys_and_keeps_its_kind():
    def fail(error):
        def choose():
            raise error

        return lambda peers: peers.decide("x", choose)

    got, _ = together(2, fail(UserError("write another")))
    assert [(type(e), str(e)) for e in got] == [(UserError, "write another")] * 2
    got, _ = together(2, fail(RunError("disk full")))
    assert [(type(e), str(e)) for e in got] == [(RunError, "disk full")] * 2
    got, _ = together(2, fail(KeyError("bug")))
    assert isinstance(got[0], KeyError)
    assert isinstance(got[1], RunError)


def test_all_hear_what_each_says_in_their_order():
    got, _ = together(3, lambda peers: peers.gather("x", peers.index * 10))
    assert got == [[0, 10, 20]] * 3


def test_a_process_with_another_plan_is_named_in_every_process():
    got, _ = together(3, lambda peers: peers.agree("plan", "b" if peers.index == 1 else "a"))
    for error in got:
        assert isinstance(error, RunError)
        assert "processes [1] have another plan than process 0 (b, not a)" in str(error)
    assert together(2, lambda peers: peers.agree("plan", "a"))[0] == [None, None]


def test_a_process_that_does_not_answer_is_named():
    peers = Peers(1, 2, Store())
    with pytest.raises(RunError, match=r"waited 0 s for process 0 to say its next step"):
        peers.decide("next step", lambda: 1, timeout_s=0.05)
    with pytest.raises(RunError, match=r"waited 0 s for process 0 to say its speeds"):
        peers.gather("speeds", 1, timeout_s=0.05)


def test_words_are_left_and_heard_and_replaced():
    first, second = (Peers(n, 2, store) for store in [Store()] for n in (0, 1))
    assert first.told("stop") is None
    second.tell("stop", "asked")
    second.tell("stop", "asked again")
    assert first.told("stop") == "asked again"


def test_decisions_of_long_ago_are_forgotten():
    def steps(peers):
        return [(peers.decide("step", lambda n=n: n), peers.gather("turn", n)) for n in range(300)]

    got, store = together(2, steps)
    assert got[0] == got[1] == [(n, [n, n]) for n in range(300)]
    assert len(store.values) < 250


def test_alone_everything_is_said_to_oneself():
    assert ALONE.decide("x", lambda: (1, 2)) == (1, 2)
    assert ALONE.gather("x", 5) == [5]
    ALONE.agree("x", "y")
    ALONE.tell("a", "b")
    assert ALONE.told("a") is None
