"""What a supervisor does about trainers that fail, hang, refuse and end; trainers are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Begins as a trainer does: signs of life, and a note of each start with what it was told.
BEGIN = """
import os, signal, sys, time
from pathlib import Path
from shardpar.run.supervised import STOPPED, Supervised
folder = Path(sys.argv[1])
Supervised.find(os.environ).begin()
starts = folder / "starts"
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
with open(starts, "a") as file:
    file.write(" ".join([str(os.getpid()), *(os.environ.get(n, "-") for n in names)]) + "\\n")
count = len(starts.read_text().splitlines())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
"""


def supervise(folder, trainer, node="a", nodes=1, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.run.supervise", str(folder), node, str(nodes),
         BEGIN + trainer, *options],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process, timeout_s=60):
    try:
        said = process.communicate(timeout=timeout_s)[1]
    finally:
        process.kill()
    return process.returncode, said


def starts(folder):
    path = folder / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def events(folder, node="a"):
    log = folder / "supervisors" / f"{node}.events.jsonl"
    return [json.loads(line)["event"] for line in log.read_text().splitlines()]


def until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_trainer_that_dies_is_started_again_until_it_is_done(tmp_path):
    dies = "os.kill(os.getpid(), signal.SIGKILL) if count < 3 else None"
    code, said = ended(supervise(tmp_path, dies))
    assert code == 0, said
    assert len(starts(tmp_path)) == 3
    assert [row[2:] for row in starts(tmp_path)] == [["1", "0"]] * 3
    assert events(tmp_path).count("failed") == 2
    assert events(tmp_path)[-2:] == ["done", "supervisor ended"]


def test_a_trainer_that_always_fails_is_given_up(tmp_path):
    code, said = ended(supervise(tmp_path, "sys.exit(1)", "a", 1, "give_up_after=2"))
    assert code == 1
    assert "3 failures in a row without a new checkpoint" in said
    assert len(starts(tmp_path)) == 3


def test_wrong_input_is_not_tried_twice(tmp_path):
    code, _ = ended(supervise(tmp_path, "sys.exit(2)"))
    assert code == 2
    assert len(starts(tmp_path)) == 1


def test_a_trainer_that_hangs_is_killed_and_started_again(tmp_path):
    stops = "os.kill(os.getpid(), signal.SIGSTOP) if count == 1 else None"
    code, said = ended(supervise(tmp_path, "time.sleep(0.5)\n" + stops))
    assert code == 0, said
    assert "trainer hangs: no sign of life" in said
    first, second = (int(row[0]) for row in starts(tmp_path))
    assert first != second
    assert not is_alive(first)


def test_a_second_supervisor_of_a_run_is_refused(tmp_path):
    first = supervise(tmp_path, "time.sleep(60)")
    try:
        until(lambda: starts(tmp_path))
        for node, nodes in (("a", 1), ("b", 1), ("b", 2)):
            code, said = ended(supervise(tmp_path, "time.sleep(60)", node, nodes))
            assert code == 1
            assert "has a supervisor already" in said
        assert len(starts(tmp_path)) == 1
    finally:
        first.terminate()
        assert ended(first)[0] == 0


def test_sigterm_lets_the_trainer_save_and_ends_with_0(tmp_path):
    process = supervise(tmp_path, "time.sleep(60)")
    until(lambda: starts(tmp_path))
    time.sleep(0.5)
    process.terminate()
    code, said = ended(process)
    assert code == 0, said
    assert "trainer ended: stopped, exit code 86" in said


def test_a_trainer_does_not_outlive_its_supervisor(tmp_path):
    process = supervise(tmp_path, "time.sleep(60)")
    until(lambda: starts(tmp_path))
    pid = int(starts(tmp_path)[0][0])
    assert is_alive(pid)
    process.kill()
    until(lambda: not is_alive(pid))
    ended(process)
    # And another supervisor takes the run over, whatever the first has left behind.
    code, said = ended(supervise(tmp_path, ""))
    assert code == 0, said


def test_two_nodes_meet_and_one_goes_on_alone_and_both_end_together(tmp_path):
    trains = "\n".join(["while not (folder / 'finish').exists():", "    time.sleep(0.1)"])
    nodes = {name: supervise(tmp_path, trains, name, 2) for name in ("a", "b")}
    try:
        until(lambda: len(starts(tmp_path)) == 2)
        rows = starts(tmp_path)
        assert {row[2] for row in rows} == {"2"}
        assert {row[3] for row in rows} == {"0", "1"}
        assert len({row[1] for row in rows}) == 1
        nodes["b"].send_signal(signal.SIGKILL)
        until(lambda: len(starts(tmp_path)) == 3)
        assert starts(tmp_path)[-1][2:] == ["1", "0"]
        nodes["b"] = supervise(tmp_path, trains, "b", 2)
        until(lambda: len(starts(tmp_path)) == 5)
        rows = starts(tmp_path)[-2:]
        assert {row[3] for row in rows} == {"0", "1"}
        (tmp_path / "finish").touch()
        for process in nodes.values():
            code, said = ended(process)
            assert code == 0, said
    finally:
        for process in nodes.values():
            process.kill()


def test_signs_of_life_end_where_the_folder_is_gone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = supervise(folder, "time.sleep(60)")
    until(lambda: starts(folder))
    pid = int(starts(folder)[0][0])
    os.rename(folder, tmp_path / "elsewhere")
    process.kill()
    until(lambda: not is_alive(pid))
    ended(process)
