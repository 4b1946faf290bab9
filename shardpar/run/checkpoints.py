"""Keeps the state of a run: saves it in the background, and restores the newest step that is whole.

A step is built in `<step>.saving/`, its manifest is written last, and then the directory
takes its name. What a crash leaves half done therefore never has the name of a step.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from types import TracebackType

from shardpar.errors import CheckpointError, RunError
from shardpar.run.arrays import ArrayStore, as_arrays, snapshot
from shardpar.run.leaves import Tree, named_leaves, record, require_equal
from shardpar.run.lock import RunLock
from shardpar.run.manifest import (
    MANIFEST_NAME,
    ArrayRecord,
    Fault,
    ManifestError,
    check,
    read_manifest,
    seal,
)
from shardpar.run.messages import faults_of, listing, none_whole, passed_over, save_failed
from shardpar.run.options import CheckpointOptions
from shardpar.run.peers import ALONE, Peers
from shardpar.run.retention import expired
from shardpar.run.steps import StepDirectories

LOCK_NAME = ".lock"
_ARRAYS = "arrays"
_PATIENCE_S = 6 * 3600
"""How long a process waits for the first one to read or write a whole checkpoint."""


@dataclass(frozen=True)
class Restored:
    """A state as it was saved.

    Attributes:
      step: how many training steps it has seen.
      state: arrays in the containers and shardings of the target.
      files: the text files that were saved with it.
      damaged: (step, file) for everything wrong in the newer steps that were passed over.
    """

    step: int
    state: Tree
    files: Mapping[str, str]
    damaged: tuple[tuple[int, str], ...]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class Checkpoints:
    """The checkpoints of one run directory; at most one writer at a time, any number of readers.

    A writer may be several processes: then all of them make the same calls, each writes its
    own pieces of the arrays, and the first does the rest. All must see one directory.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> state = {"w": jnp.arange(3.0)}
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(10, state, {"data.json": "{}"})
    ...     checkpoints.wait()
    ...     restored = checkpoints.restore(None, state)
    >>> restored.step, restored.state["w"].tolist(), dict(restored.files)
    (10, [0.0, 1.0, 2.0], {'data.json': '{}'})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        options: CheckpointOptions | None = None,
        *,
        notify: Callable[[str], None] = _warn,
        read_only: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        """Opens the directory; a writer also locks it and clears what a crash left half done.

        Args:
          directory: where the step directories are, usually `<run>/checkpoints`.
          options: which steps to keep.
          notify: takes one line for people when something was damaged or moved.
          read_only: leave the directory as it is and take no lock, so that one can read
            beside a trainer that writes.
          peers: the processes that write together.

        Raises:
          RunError: another trainer writes here.
        """
        self._directory = Path(directory).absolute()
        self._steps = StepDirectories(self._directory)
        self._options = options or CheckpointOptions()
        self._notify = notify
        self._peers = peers
        self._lock: RunLock | None = None
        self._closed = read_only
        if not read_only:
            peers.decide("checkpoint directory", self._open)
        self._store = ArrayStore()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._newest_saved: int | None = None
        self._passed: dict[int, tuple[Fault, ...]] = {}

    def _open(self) -> None:
        self._lock = RunLock(self._directory / LOCK_NAME)
        self._steps.clear_leftovers()
        for step in self._steps.incomplete():
            self._notify(
                f"checkpoint {self._steps.path(step)} has no {MANIFEST_NAME}, so it was never "
                f"finished: moved to {self._steps.set_aside(step, 'incomplete')}"
            )

    def save(self, step: int, state: Tree, files: Mapping[str, str] | None = None) -> None:
        """Takes a snapshot of the state and starts to write it.

        Returns once the state's buffers may be donated. A save that is still being written is
        waited for first. Saving the step that was saved last does nothing.

        Args:
          step: how many training steps the state has seen.
          state: dicts, registered dataclasses and NamedTuples of arrays.
          files: small texts to keep with it, by file name.

        Raises:
          CheckpointError: the disk is full, the step is stored already, or the save before
            this one failed (this one is not started then; the steps before it are safe).
        """
        if self._closed:
            raise CheckpointError(
                f"{self._directory} is closed or open for reading only: step {step} was not saved"
            )
        self.wait()
        if step == self._newest_saved:
            return
        texts = dict(files or {})
        _require_plain_names(texts)
        leaves = as_arrays(named_leaves(state)[0])
        records = {name: record(leaf) for name, leaf in leaves.items()}
        self._peers.decide("new checkpoint", lambda: self._begin_draft(step))
        bits, is_free = snapshot(leaves)
        write = partial(self._store.begin_write, self._steps.draft(step) / _ARRAYS, bits)
        if is_free and self._peers.count == 1:
            # Training need not even wait until writing has begun.
            self._pending = self._thread.submit(self._commit, step, records, texts, write)
        else:
            try:
                write()
            except (OSError, ValueError, RuntimeError) as error:
                if self._peers.is_first:
                    self._steps.clear_leftovers()
                raise self._save_error(step, error) from error
            self._pending = self._thread.submit(self._commit, step, records, texts)
        self._newest_saved = step

    def _begin_draft(self, step: int) -> None:
        if step in self._steps.committed():
            raise CheckpointError(
                f"{self._directory} already holds step {step}; to train again from an older step, "
                "call discard_after(that step) first"
            )
        self._steps.clear_leftovers()
        self._require_room(step)
        try:
            self._steps.draft(step).mkdir(parents=True)
        except OSError as error:
            self._steps.clear_leftovers()
            raise self._save_error(step, error) from error

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: it failed. Raised once; the steps before it are safe.
        """
        if self._pending is None:
            return
        try:
            self._pending.result()
        except RunError:
            self._pending = None
            self._newest_saved = None
            raise
        self._pending = None

    def say(self, message: str) -> None:
        """Tells what whoever opened this should know about its steps."""
        self._notify(message)

    def steps(self) -> tuple[int, ...]:
        """The steps that are stored, oldest first; one still being written is not among them."""
        return tuple(self._peers.decide("stored steps", self._steps.committed))

    def require_none_lost(self) -> None:
        """Refuses to begin anew where steps were stored and none is whole any more.

        Raises:
          CheckpointError: no step is stored, but some were moved aside.
        """
        self._peers.decide("lost checkpoints", self._require_none_lost)

    def _require_none_lost(self) -> None:
        if not self._steps.committed() and self._steps.aside():
            raise CheckpointError(
                f"{self._directory}: {self._held()}; mend one of these and give it back its name, "
                "or delete them to begin again from step 0"
            )

    def verify(self, step: int) -> tuple[Fault, ...]:
        """Compares every byte of a step with its manifest.

        Args:
          step: one of `steps()`.

        Returns:
          The files that are damaged, missing or extra; empty when all is well.
        """
        return check(self._steps.path(step))

    def restore(self, step: int | None, target: Tree, *, partial: bool = False) -> Restored:
        """Reads a state into the shardings of the target, on any number of devices.

        Without a step, damaged ones are passed over, named through `notify`, and renamed to
        `<step>.damaged` once a good one has been read.

        Args:
          step: which one, or None for the newest that is whole.
          target: the state wanted, of `jax.ShapeDtypeStruct` with sharding (or of arrays).
          partial: whether the target may leave out arrays that are stored.

        Returns:
          The state, bit for bit as saved, and the files saved with it.

        Raises:
          CheckpointError: no such step, none that is whole, or one of another model.
        """
        self.wait()
        chosen, pairs = self._peers.decide(
            "checkpoint to restore", lambda: self._choose(step), _PATIENCE_S
        )
        state, files = self._read(chosen, target, partial)
        if self._peers.is_first:
            self._report(self._passed, chosen)
        self._newest_saved = chosen
        return Restored(chosen, state, files, tuple((at, file) for at, file in pairs))

    def _choose(self, step: int | None) -> tuple[int, list[tuple[int, str]]]:
        """The newest step that is whole, and what was wrong with those after it."""
        if step is not None and not self._steps.is_committed(step):
            raise CheckpointError(f"{self._directory} holds no step {step}: {self._held()}")
        passed = self._passed = {}
        for candidate in (step,) if step is not None else reversed(self._steps.committed()):
            faults = tuple(fault for fault in self.verify(candidate) if fault.kind != "extra")
            if not faults:
                return candidate, [(at, f.file) for at, of in passed.items() for f in of]
            # A trainer beside this reader may have deleted the step meanwhile.
            if self._steps.is_committed(candidate):
                passed[candidate] = faults
        if step in passed:
            raise CheckpointError(
                f"{self._directory} is damaged at {faults_of(step, passed[step])}; "
                f"{self._held()}: ask for another, or for none to get the newest that is whole"
            )
        raise CheckpointError(none_whole(self._directory, passed, self._held()))

    def discard_after(self, step: int) -> None:
        """Moves all newer steps aside, so that training can go another way from this one.

        Args:
          step: the newest step to keep.

        Raises:
          CheckpointError: the last save failed.
        """
        self.wait()
        self._peers.decide("checkpoints to discard", lambda: self._discard_after(step))
        if self._newest_saved is not None and self._newest_saved > step:
            self._newest_saved = None

    def _discard_after(self, step: int) -> None:
        for later in self._steps.committed():
            if later > step:
                moved = self._steps.set_aside(later, "abandoned")
                self._notify(
                    f"checkpoint {later} is newer than step {step}, from which training goes on: "
                    f"moved to {moved}"
                )

    def close(self) -> None:
        """Waits for the last save and gives the lock back; doing so twice is harmless.

        Raises:
          CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._closed = True
            self._thread.shutdown()
            self._store.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            # The error that ended the run is the one to see, not this one in its stead.
            if error is None:
                raise
            self._notify(str(failure))

    def _commit(
        self,
        step: int,
        records: Mapping[str, ArrayRecord],
        texts: dict[str, str],
        write: Callable[[], None] = lambda: None,
    ) -> None:
        problem: Exception | None = None
        try:
            write()
            self._store.finish_write()
        except Exception as error:
            problem = error
        said = self._peers.gather("pieces", problem and str(problem), _PATIENCE_S)
        others = [f"process {n}: {text}" for n, text in enumerate(said) if text]
        if problem is None and others:
            problem = OSError(others[0])
        self._peers.decide(
            "commit", lambda: self._publish(step, records, texts, problem), _PATIENCE_S
        )

    def _publish(
        self,
        step: int,
        records: Mapping[str, ArrayRecord],
        texts: dict[str, str],
        problem: Exception | None,
    ) -> None:
        draft = self._steps.draft(step)
        try:
            if problem is not None:
                raise problem
            for name, text in texts.items():
                (draft / name).write_bytes(text.encode())
            seal(draft, step, records)
            self._steps.publish(step)
        except Exception as error:
            # The half-written files would only keep a full disk full.
            shutil.rmtree(draft, ignore_errors=True)
            raise self._save_error(step, error) from error
        for old in expired(self._steps.committed(), self._options):
            try:
                self._steps.delete(old)
            except OSError as error:
                raise CheckpointError(
                    f"step {step} is saved, but the old {self._steps.path(old)} cannot be "
                    f"deleted: {error}; delete it, or raise checkpoint.keep"
                ) from error

    def _read(self, step: int, target: Tree, partial: bool) -> tuple[Tree, dict[str, str]]:
        path = self._steps.path(step)
        wanted, structure = named_leaves(target)
        manifest = read_manifest(path)
        require_equal(
            manifest.arrays,
            {name: record(leaf) for name, leaf in wanted.items()},
            where=f"checkpoint {path}",
            partial=partial,
        )
        arrays = self._store.read(path / _ARRAYS, wanted, partial=partial)
        texts = [name for name in manifest.files if "/" not in name]
        files = {name: (path / name).read_bytes().decode() for name in texts}
        return structure.unflatten([arrays[name] for name in wanted]), files

    def _report(self, passed: Mapping[int, tuple[Fault, ...]], used: int) -> None:
        for step, faults in passed.items():
            moved = self._steps.set_aside(step, "damaged") if self._lock else None
            self._notify(passed_over(step, faults, moved, used))

    def _require_room(self, step: int) -> None:
        # The step before is the best estimate there is. Asking first spares a full disk the
        # attempt, and its user the noise that an interrupted write makes.
        stored = self._steps.committed()
        try:
            needed = read_manifest(self._steps.path(stored[-1])).stored_bytes if stored else 0
        except (OSError, ManifestError, CheckpointError):
            return
        disk = shutil.disk_usage(self._directory)
        if disk.total and disk.free < needed:
            error = OSError(f"it needs about {_mb(needed)} and the disk has {_mb(disk.free)} left")
            raise self._save_error(step, error)

    def _save_error(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(save_failed(self._directory, step, error, self._held()))

    def _held(self) -> str:
        return listing(self._steps.committed(), self._steps.aside())


def _require_plain_names(files: Iterable[str]) -> None:
    for name in files:
        if PurePath(name).name != name or name in {_ARRAYS, MANIFEST_NAME, "", ".", ".."}:
            raise CheckpointError(
                f"{name!r} cannot be the name of a file in a checkpoint; use a plain name "
                f"other than {_ARRAYS!r} and {MANIFEST_NAME!r}"
            )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
