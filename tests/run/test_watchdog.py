"""A process that waits too long says who keeps it waiting, and ends."""

from __future__ import annotations

import json
import threading
import time

from shardpar.run.peers import ALONE, Peers
from shardpar.run.watchdog import STUCK, Watchdog
from tests.run.test_peers import Store


class Ended:
    def __init__(self):
        self.codes, self.event = [], threading.Event()

    def __call__(self, code):
        self.codes.append(code)
        self.event.set()


def watch(peers, after_s, **more):
    said, ended = [], Ended()
    dog = Watchdog(peers, after_s, lambda: "F3@0.1", said.append, ended, **more)
    return dog, said, ended


def test_a_stuck_step_is_reported_with_its_task_and_the_others():
    store = Store()
    word = {"beat": 1, "step": 11, "task": "B2@1.0", "on": "node2"}
    Peers(1, 3, store).tell("progress/1", json.dumps(word))
    dog, said, ended = watch(Peers(0, 3, store), 0.2)
    with dog:
        dog.saw(12)
        assert ended.event.wait(10)
    assert ended.codes == [STUCK]
    (report,) = said
    assert "process 0: step 13 waits for F3@0.1, which has not ended for 0 s" in report
    assert "process 1 on node2: step 12, waits for B2@1.0" in report
    assert "process 2 has not begun" in report


def test_steps_that_end_keep_it_quiet_and_so_does_what_takes_its_time():
    dog, said, ended = watch(Peers(0, 2, Store()), 0.4)
    with dog:
        for step in range(8):
            dog.saw(step)
            time.sleep(0.1)
        with dog.paused():
            time.sleep(1)
        dog.saw(9)
    assert not said
    assert not ended.codes


def test_the_first_step_after_compiling_may_take_longer():
    dog, _, ended = watch(Peers(0, 2, Store()), 0.2)
    with dog:
        with dog.paused():
            pass
        assert not ended.event.wait(1)
        assert ended.event.wait(10)


def test_one_process_is_watched_only_where_somebody_starts_it_again():
    dog, _, ended = watch(ALONE, 0.1)
    with dog:
        dog.saw(1)
        assert not ended.event.wait(0.5)
    dog, said, ended = watch(ALONE, 0.1, alone=True)
    with dog:
        dog.saw(1)
        assert ended.event.wait(10)
    assert "step 2 waits for F3@0.1" in said[0]
    assert "others" not in said[0]
