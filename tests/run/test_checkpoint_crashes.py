"""A trainer that dies, or a disk that fills up, leaves a directory from which to go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from shardpar.errors import CheckpointError, RunError
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.lock import RunLock
from shardpar.run.options import CheckpointOptions
from tests.run.run_states import bits, child_environment, make_state, run_child, target_of

TRAINER = """
import sys, jax
from tests.run.run_states import make_state, target_of
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.options import CheckpointOptions

jax.config.update("jax_num_cpu_devices", 8)
checkpoints = Checkpoints(sys.argv[1], CheckpointOptions(keep=2))
step = 0
if checkpoints.steps():
    step = checkpoints.restore(None, target_of(make_state(0))).step
print("from", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, make_state(step), {"data.json": str(step)})
    print("saved", step, flush=True)
"""


def test_a_trainer_killed_at_any_moment_goes_on_from_its_last_whole_step(tmp_path: Path) -> None:
    moments = random.Random(7)
    target = target_of(make_state(0))
    reached = 0
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", TRAINER, str(tmp_path)],
            env=child_environment(),
            stdout=subprocess.PIPE,
            text=True,
        ) as trainer:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == f"from {reached}\n"
            started = trainer.stdout.readline().split()
            assert started == ["saved", str(reached + 1)]
            heard = moments.randrange(4)
            for _ in range(heard):
                trainer.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.1))
            trainer.send_signal(signal.SIGKILL)
            begun = [int(line.split()[1]) for line in trainer.stdout.read().splitlines()]
        newest_begun = max(begun, default=reached + 1 + heard)

        said: list[str] = []
        with Checkpoints(tmp_path, CheckpointOptions(keep=2), notify=said.append) as checkpoints:
            steps = checkpoints.steps()
            assert said == []
            assert all(checkpoints.verify(step) == () for step in steps)
            # A save begins once the one before it is committed, and may commit unheard.
            assert not steps or steps[-1] in {newest_begun - 1, newest_begun, newest_begun + 1}
            for step in steps:
                restored = checkpoints.restore(step, target)
                assert bits(restored.state) == bits(make_state(step))
                assert restored.files == {"data.json": str(step)}
        assert max(steps, default=0) >= reached
        reached = max(steps, default=0)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {".lock", *map(str, steps)}
    assert reached > 0


class Killed(BaseException):
    """Stops the thread where it stands, the way kill -9 does: no handler runs its course."""


FILE_OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "open")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Lets a given number of file operations of the committing thread pass, then none."""
    left = {"operations": -1}

    def guarded(name: str) -> None:
        real = getattr(os, name)

        def operation(*arguments: object, **options: object) -> object:
            if threading.current_thread().name.startswith("checkpoint") and left["operations"] >= 0:
                if left["operations"] == 0:
                    raise Killed
                left["operations"] -= 1
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, operation)

    for name in FILE_OPERATIONS:
        guarded(name)
    yield left
    monkeypatch.undo()


def test_a_commit_cut_short_between_any_two_file_operations_loses_no_committed_step(
    tmp_path: Path, interrupted: dict[str, int]
) -> None:
    options = CheckpointOptions(keep=2)
    before = tmp_path / "before"
    state = {step: {"w": jnp.full(4, float(step))} for step in range(1, 5)}
    with Checkpoints(before, options) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state[step], {"data.json": str(step)})
    outcomes = []
    for operations in range(1000):
        directory = Path(shutil.copytree(before, tmp_path / "now"))
        victim = Checkpoints(directory, options)
        interrupted["operations"] = operations
        victim.save(3, state[3], {"data.json": "3"})
        try:
            victim.wait()
            survived = True
        except Killed:
            survived = False
        interrupted["operations"] = -1
        assert victim._lock is not None
        victim._lock.release()

        said: list[str] = []
        with Checkpoints(directory, options, notify=said.append) as checkpoints:
            steps = checkpoints.steps()
            restored = checkpoints.restore(None, target_of(state[1]))
            assert restored.step == steps[-1]
            assert bits(restored.state) == bits(state[restored.step])
            assert restored.files == {"data.json": str(restored.step)}
            assert all(checkpoints.verify(step) == () for step in steps)
            checkpoints.save(4, state[4])
            checkpoints.wait()
            assert checkpoints.steps()[-1] == 4
        assert said == []
        assert {path.name for path in directory.iterdir()} == {".lock", "4", str(restored.step)} | {
            str(step) for step in checkpoints.steps()
        }
        shutil.rmtree(directory)
        outcomes.append(steps)
        if survived:
            break
    # Nothing yet, then committed beside two older ones, then the oldest deleted.
    assert [steps for n, steps in enumerate(outcomes) if steps not in outcomes[:n]] == [
        (1, 2),
        (1, 2, 3),
        (2, 3),
    ]
    assert len(outcomes) > 20


def test_the_lock_of_a_killed_trainer_is_free_again(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from shardpar.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
    lock = tmp_path / "checkpoints" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"written by process {holder.pid} on "):
            RunLock(lock)
        holder.send_signal(signal.SIGKILL)
    RunLock(lock).release()


def test_a_write_that_fails_keeps_the_steps_before_it_and_is_told_in_one_line(
    tmp_path: Path,
) -> None:
    script = """
import resource, signal, sys
import jax, jax.numpy as jnp
from shardpar.errors import CheckpointError
from shardpar.run.checkpoints import Checkpoints

# Files beyond this size cannot be written, as on a disk without room for them.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
small, large = {"w": jnp.ones(4)}, {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, small)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    checkpoints.save(2, large)
    try:
        checkpoints.save(3, small)
    except CheckpointError as error:
        print(error)
    print(checkpoints.steps())
    checkpoints.save(3, small)
    checkpoints.wait()
    print(checkpoints.steps())
"""
    child = run_child(script, str(tmp_path))
    assert child.returncode == 0, child.stderr
    error, after, later = child.stdout.splitlines()
    assert error.startswith(f"step 2 could not be saved in {tmp_path}: ")
    assert error.endswith(
        "step 1 is stored. Make room or move the run to another disk, then resume"
    )
    assert (after, later) == ("(1,)", "(1, 3)")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "1", "3"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3500k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# Orbax closes its event loop while writes are still failing; Python reports that as unraisable.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_and_nothing_stored_is_lost(small_disk: Path) -> None:
    def noise(seed: int) -> dict[str, jax.Array]:
        return {"w": jax.random.normal(jax.random.key(seed), (512, 512))}

    with Checkpoints(small_disk / "run") as checkpoints:
        large = {f"w{n}": jax.random.normal(jax.random.key(n), (1024, 1024)) for n in range(3)}
        checkpoints.save(1, large)
        with pytest.raises(CheckpointError, match="the disk is full"):
            checkpoints.wait()
        for step in (2, 3, 4):
            checkpoints.save(step, noise(step))
        # Three steps of a megabyte fit; a fourth is refused before it is begun.
        with pytest.raises(CheckpointError, match=r"it needs about 1\.1 MB and the disk has 0"):
            checkpoints.save(5, noise(5))
        assert checkpoints.steps() == (2, 3, 4)
        for step in (2, 3, 4):
            restored = checkpoints.restore(step, target_of(noise(0)))
            assert bits(restored.state) == bits(noise(step))
