"""What waits to take over from a trainer: when it starts, how far it goes, and what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardpar.run import priority, standby
from shardpar.run.standby import Standby, preparation

# Says how it was started, and what it is told; then lives on.
WAITS = """
import os, sys
print(os.environ["SHARDPAR_STANDBY"], flush=True)
print(sys.stdin.readline(), file=open(sys.argv[1], "w"), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(standby, "_AFTER_S", 0.0)


def minded(waits, platform, times=3):
    for _ in range(times):
        waits.mind(platform)
    return waits


def told(path):
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize("platform", ["gpu", "tpu", "METAL", ""])
def test_an_accelerator_is_the_trainers_alone(platform):
    assert preparation("programs", 1, platform) == "imports"


def test_nobody_goes_further_than_is_wanted():
    assert preparation("programs", 1, "cpu") == "programs"
    assert preparation("imports", 1, "cpu") == "imports"
    assert preparation("none", 4, "cpu") == "none"


def test_devices_of_several_nodes_are_not_touched_before_they_have_met():
    assert preparation("programs", 2, "cpu") == "imports"


def test_the_one_that_waits_is_told_what_it_needs(tmp_path, at_once):
    waits = Standby([sys.executable, "-c", WAITS, str(tmp_path / "told")], "programs", 1)
    try:
        minded(waits, "cpu")
        trainer = waits.take({"SHARDPAR_HEARTBEAT": "here"})
        assert trainer is not None
        assert json.loads(told(tmp_path / "told")) == {"SHARDPAR_HEARTBEAT": "here"}
        trainer.kill()
        trainer.wait()
        assert waits.take({}) is None
    finally:
        waits.close()


def test_none_starts_before_the_trainer_makes_steps(tmp_path, at_once):
    waits = minded(Standby(["false"], "programs", 1), None)
    assert waits.take({}) is None


def test_one_that_cannot_wait_is_started_once_and_not_taken(tmp_path, at_once):
    starts = tmp_path / "starts"
    command = [sys.executable, "-c", f"open({str(starts)!r}, 'a').write('x')"]
    waits = minded(Standby(command, "imports", 1), "gpu")
    deadline = time.monotonic() + 20
    while not starts.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    minded(waits, "gpu")
    assert waits.take({}) is None
    assert starts.read_text() == "x"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="priorities as Linux has them")
def test_a_lowered_priority_is_given_back_in_all_threads():
    threads = (
        "import sys, threading\n"
        "sys.stdin.readline()\n"
        "threading.Thread(target=sys.stdin.readline).start()\n"
        "print('there', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", threads],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip

    def niceness():
        tasks = os.listdir(f"/proc/{process.pid}/task")
        return [os.getpriority(os.PRIO_PROCESS, int(task)) for task in tasks]

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        priority.lower(process.pid)
        lowered = niceness()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        if lowered != [mine]:
            assert len(niceness()) == 2
            assert set(niceness()) == set(lowered)
            assert lowered[0] > mine
        priority.restore(process.pid)
        assert set(niceness()) == {mine}
    finally:
        process.kill()
        process.communicate()
