"""Trains one party's rounds on its own data, and keeps what it keeps across kills.

What a round would make of the party's own state is on disk beside the old one before anything is
sent, and takes its place once the round is known to be committed with this party in it. A round
that is repeated from the same model has the same update, so that noise that the party added itself
is paid for once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from shardpar.errors import RunError
from shardpar.fl.examples import Examples, order_of
from shardpar.fl.job import Job
from shardpar.fl.ledger import Ledger
from shardpar.fl.messages import Tensor
from shardpar.fl.privacy import local_noise
from shardpar.fl.private_rounds import budget_of
from shardpar.fl.rounds import client_update
from shardpar.fl.stored import read_record, tensors_of, tree_of, write_record
from shardpar.fl.streams import Randomness, joined
from shardpar.run.lock import RunLock

Tree = Any
At = tuple[int, int]


class Kept(msgspec.Struct, frozen=True):
    """What a party keeps between rounds, on disk.

    Attributes:
      run: of the aggregator that it has taken part in; "" before the first, and in a ring.
      of: the (round, attempt) that it is the outcome of; None before the first.
      kept: what the algorithm's client keeps.
      before: the same before that round, in case that others have committed another one.
    """

    run: str
    of: At | None
    kept: dict[str, Tensor]
    before: tuple[At | None, dict[str, Tensor]] | None = None


class Prepared(msgspec.Struct, frozen=True):
    """What a round will have made of it if it is committed, on disk.

    Attributes:
      run: as in `Kept`.
      of: the (round, attempt).
      model: SHA-256 of what was broadcast.
      kept: what the algorithm's client keeps afterwards.
      sums: its update; own noise is in it.
    """

    run: str
    of: At
    model: bytes
    kept: dict[str, Tensor]
    sums: dict[str, Tensor]


class BudgetSpentError(Exception):
    """The party's ledger allows no further round."""


def model_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Of arrays by name, 32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(joined(name, tensor.dtype, f"{tensor.shape}", tensor.data))
    return digest.digest()


@dataclass
class Trainer:
    """One party's training; a context manager that holds its folder.

    Attributes:
      job: what it is about.
      party: whose.
      rows: its examples, by field, each [examples, ...].
      folder: where it keeps its state and its ledger.
    """

    job: Job
    party: str
    rows: Mapping[str, np.ndarray]
    folder: Path

    def __enter__(self) -> Self:
        """Takes the folder.

        Raises:
          RunError: another process has it.
          CheckpointError: what is in it is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(RunLock(self.folder / ".lock"))
            self.ledger = self._open_ledger(stack)
            first = self.job.algorithm.client_init(self.job.first_params)
            fresh = Kept("", None, tensors_of(first))
            self._prepared = read_record(self.folder / "prepared", Prepared)
            self._take(read_record(self.folder / "kept", Kept) or fresh)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets the folder go."""
        self._stack.close()

    def require_run(self, run: str) -> None:
        """Binds this folder to a run of the aggregator.

        Raises:
          RunError: it is of another.
        """
        known = self._record.run or run
        if known != run:
            raise RunError(
                f"{self.folder} is of another run of job {self.job.net.job!r} than the "
                "aggregator's; give this party another run directory, or the aggregator the one "
                "that it had"
            )
        if not self._record.run:
            self._store(Kept(run, None, self._record.kept))

    def settle(self, committed: At | None) -> None:
        """Comes to what this party keeps after the last round that was committed with it.

        Args:
          committed: that round and its attempt; None if there was none.

        Raises:
          RunError: the folder does not hold it.
        """
        record, prepared = self._record, self._prepared
        if record.of == committed:
            return
        # Every attempt at a round begins with the same model, and so has the same outcome here.
        if committed is not None and prepared is not None and prepared.of[0] == committed[0]:
            before = (record.of, record.kept)
            self._store(Kept(prepared.run, committed, prepared.kept, before))
        elif record.before is not None and record.before[0] == committed:
            self._store(Kept(record.run, committed, record.before[1]))
        elif jax.tree.leaves(self._kept):
            raise RunError(
                f"{self.folder} does not hold what {self.party} kept after round "
                f"{committed[0] + 1 if committed else 0}, which the others have committed; start "
                "this party with the run directory that it had"
            )

    def update(self, run: str, of: At, model: Mapping[str, Tensor], broadcast: Tree) -> Tree:
        """The update of a round, once what this party will keep is on disk.

        Args:
          run: of the aggregator, or "".
          of: the (round, attempt).
          model: what was broadcast, as it came.
          broadcast: the same as the algorithm reads it.

        Raises:
          BudgetSpentError: this party's own privacy budget forbids it.
        """
        digest, prepared = model_digest(model), self._prepared
        known = prepared is not None and (prepared.run, prepared.of[0], prepared.model)
        if prepared is not None and known == (run, of[0], digest):
            prepared = msgspec.structs.replace(prepared, of=of)
        else:
            sums, kept = self._trained(broadcast, of[0])
            prepared = Prepared(run, of, digest, tensors_of(kept), tensors_of(sums))
        write_record(self.folder / "prepared", prepared)
        self._prepared = prepared
        return tree_of(prepared.sums, self.job.update_shapes, party=self.party)

    def _trained(self, broadcast: Tree, round_: int) -> tuple[Tree, Tree]:
        job, work, ledger = self.job, self.job.work, self.ledger
        release = job.release() if job.pays_at_parties else None
        if ledger is not None and release is not None and not ledger.allows(release):
            raise BudgetSpentError(
                f"the privacy budget of {self.party} allows no round {round_ + 1}: "
                f"ε {ledger.spent():.4g} of {ledger.budget.epsilon:g} is spent"
            )
        count = len(next(iter(self.rows.values())))
        order = order_of(
            count, batch=work.batch, epochs=work.epochs, seed=work.seed, round_=round_,
            client=job.parties.index(self.party),
        )  # fmt: skip
        examples = Examples(dict(self.rows), order)
        sums, kept = client_update(job.task, job.algorithm, broadcast, self._kept, examples)
        if job.privacy.kind == "local":
            sums = self._noisy(sums)
        if ledger is not None and release is not None:
            ledger.append(release, f"round {round_}")
        return sums, kept

    def _noisy(self, sums: Tree) -> Tree:
        multiplier = self.job.algorithm.mechanism.noise_multiplier  # type: ignore[attr-defined]
        clip = self.job.privacy.clip
        update, _ = local_noise(sums["update"], clip, multiplier, Randomness())
        # Whether it was within the clip, its weight and its loss would need noise of their own.
        public = {"within": 0.0, "weight": 1.0, "loss": 0.0}
        return jax.tree.map(np.float32, {"update": update, **public})

    def _store(self, record: Kept) -> None:
        write_record(self.folder / "kept", record)
        self._take(record)

    def _take(self, record: Kept) -> None:
        like = jax.eval_shape(self.job.algorithm.client_init, self.job.first_params)
        where = f"{self.folder / 'kept'}, which is of another job"
        self._record = record
        self._kept = jax.tree.map(jnp.asarray, tree_of(record.kept, like, party=where))

    def _open_ledger(self, stack: ExitStack) -> Ledger | None:
        job = self.job
        if not (job.pays_at_parties or (job.is_ring and job.noise is not None)):
            return None
        path = self.folder / job.privacy.ledger
        return stack.enter_context(Ledger(path, budget_of(job.privacy)))
