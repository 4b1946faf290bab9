"""What of a privacy budget is spent: a file of noisy releases that outlives restarts.

A release is written down, and on disk, before its result leaves; a crash between the two spends
budget for nothing, never the other way. ε is that of all releases together, composed by privacy
loss distributions (Koskela et al., AISTATS 2020; Doroshenko et al., PoPETs 2022) in dp-accounting.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import optimize

from shardpar.errors import CheckpointError, ConfigError, RunError, SpecError

Unit = Literal["record", "user"]


@dataclass(frozen=True)
class Release:
    """One or many releases of the Gaussian mechanism, each over a Poisson sample.

    Two data sets are neighbours if one has one record, or one user, more than the other.

    Attributes:
      noise_multiplier: standard deviation of the noise over the sensitivity.
      sampling_rate: with which each record or user is drawn, independently of all others; 1 if all
        take part. Batches of a fixed size are no such draws: account for them with 1.
      count: how many.
      extra_epsilon: added to ε for each, for example by `noise.grid_loss`.
      extra_delta: added to δ for each.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    count: int = 1
    extra_epsilon: float = 0.0
    extra_delta: float = 0.0

    def __post_init__(self) -> None:
        """Checks that it is one."""
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise SpecError(f"noise_multiplier {self.noise_multiplier} must be positive")
        if not 0 < self.sampling_rate <= 1 or self.count < 1:
            raise SpecError(f"rate {self.sampling_rate} must be in (0, 1], count {self.count} >= 1")
        if not (0 <= self.extra_epsilon < math.inf and 0 <= self.extra_delta < 1):
            raise SpecError(f"extra ε {self.extra_epsilon} and δ {self.extra_delta} must be >= 0")

    def event(self) -> dp_accounting.DpEvent:
        """One of them, as dp-accounting names it."""
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate == 1:
            return gaussian
        return dp_accounting.PoissonSampledDpEvent(self.sampling_rate, gaussian)


@dataclass(frozen=True)
class Budget:
    """How much may be lost in all.

    Attributes:
      epsilon: ε.
      delta: δ.
      unit: whose presence is hidden, a record's or a user's.
    """

    epsilon: float
    delta: float
    unit: Unit = "user"

    def __post_init__(self) -> None:
        """Checks that it is one."""
        if not (self.epsilon > 0 and 0 < self.delta < 1):
            raise ConfigError(f"budget ε {self.epsilon} must be positive and δ {self.delta} < 1")


def epsilon_of(
    releases: Iterable[Release], delta: float, accountant: Literal["pld", "rdp"] = "pld"
) -> float:
    """The ε of releases together, at a δ, if one unit is added or removed.

    Args:
      releases: in any order, made one after another with knowledge of the earlier ones.
      delta: δ.
      accountant: "pld" is tighter; "rdp" (Rényi) is quicker and an upper bound too.

    Raises:
      SpecError: the parts of δ that releases take aside are all of it.

    >>> one = Release(1.0)
    >>> epsilon_of([one], 1e-5) < epsilon_of([one, one], 1e-5)
    True
    """
    counts: Counter[tuple[float, float]] = Counter()
    extra_epsilon = extra_delta = 0.0
    for release in releases:
        counts[release.noise_multiplier, release.sampling_rate] += release.count
        extra_epsilon += release.count * release.extra_epsilon
        extra_delta += release.count * release.extra_delta
    if not counts:
        return 0.0
    if extra_delta >= delta:
        raise SpecError(f"releases take δ {extra_delta:g} aside; the budget's δ is {delta:g}")
    return _composed(tuple(sorted(counts.items())), delta - extra_delta, accountant) + extra_epsilon


@lru_cache(maxsize=256)
def _composed(
    counts: tuple[tuple[tuple[float, float], int], ...], delta: float, accountant: str
) -> float:
    kind = PLDAccountant if accountant == "pld" else RdpAccountant
    sum_ = kind(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for (noise_multiplier, rate), count in counts:
        sum_.compose(Release(noise_multiplier, rate).event(), count)
    return float(sum_.get_epsilon(delta))


def noise_multiplier_for(
    budget: Budget, count: int, release: Callable[[float], Release] = Release
) -> float:
    """The least noise multiplier, to a ten-thousandth, with which releases stay within a budget.

    Args:
      budget: of all of them.
      count: how many.
      release: what one with a noise multiplier is written down as.

    Raises:
      ConfigError: not even a noise multiplier of 10,000 is enough.

    >>> 3.7 < noise_multiplier_for(Budget(1.0, 1e-5), 1) < 3.8
    True
    """

    def excess(log_noise: float) -> float:
        """The logarithm of ε spent over the budget's."""
        try:
            one = release(math.exp(log_noise))
            spent = epsilon_of([replace(one, count=count * one.count)], budget.delta)
        except SpecError:
            spent = math.inf
        return math.log(min(max(spent, 1e-9), 1e9) / budget.epsilon)

    high = 0.0
    while excess(high) > 0:
        high += math.log(2)
        if high > math.log(10_000):
            raise ConfigError(
                f"{count} releases cannot stay within ε {budget.epsilon:g}; use fewer rounds, or a "
                "larger budget"
            )
    low = high - math.log(2)
    while excess(low) <= 0 and low > math.log(0.05):
        high, low = low, low - math.log(2)
    if excess(low) > 0:
        step = 3e-5
        high = optimize.brentq(excess, low, high, xtol=step)
        while excess(high) > 0:
            high += step
    return math.exp(high)


class Ledger:
    """A budget and what is spent of it, in a file of JSON lines with chained checksums.

    One process holds a ledger at a time. Use it as a context manager, or close it.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        """Opens the ledger at `path`, or begins it.

        Raises:
          CheckpointError: the file is damaged, or was begun for another budget.
          RunError: another process holds it.
        """
        self.path, self.budget = Path(path), budget
        fresh = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._hold()
            self._releases, self._last = self._read()
            if self._last is None:
                self._last = ""
                self._append({"budget": asdict(budget)})
            if fresh:
                _sync_folder(self.path.parent)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def releases(self) -> tuple[Release, ...]:
        """All of them so far."""
        return tuple(self._releases)

    def spent(self) -> float:
        """ε of all releases at the budget's δ."""
        return epsilon_of(self._releases, self.budget.delta)

    def remaining(self) -> float:
        """How much of ε is left: not what one more release costs, which `allows` says."""
        return max(0.0, self.budget.epsilon - self.spent())

    def allows(self, *releases: Release) -> bool:
        """Whether these may follow: ask before a round begins, and stop training if not."""
        try:
            after = epsilon_of([*self._releases, *releases], self.budget.delta)
        except SpecError:
            return False
        return after <= self.budget.epsilon

    def append(self, release: Release, what: str = "") -> float:
        """Writes a release down; only then may its result be used.

        Args:
          release: what is about to leave.
          what: names it, for example "round 3".

        Returns:
          ε spent, this release included.

        Raises:
          RunError: the budget does not allow it; nothing is written and nothing may leave.
        """
        if not self.allows(release):
            raise RunError(
                f"{what or 'a release'} would take ε past {self.budget.epsilon:g} at "
                f"δ {self.budget.delta:g} ({self.path}: {self.spent():.4g} spent); stop training"
            )
        self._append({"release": asdict(release), "what": what})
        self._releases.append(release)
        return self.spent()

    def close(self) -> None:
        """Lets others hold the ledger."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Ledger:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path} is held by another process; wait for it") from None

    def _append(self, entry: dict[str, object]) -> None:
        assert self._last is not None
        text = json.dumps(entry, sort_keys=True)
        digest = _chained(self._last, text)
        line = (json.dumps({"entry": text, "sha256": digest}) + "\n").encode()
        if os.write(self._file, line) != len(line):
            raise RunError(f"{self.path}: the disk took part of a line; make room and restart")
        os.fsync(self._file)
        self._last = digest

    def _read(self) -> tuple[list[Release], str | None]:
        data = self.path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            # A line without an end was being written when its process died: what it speaks of has
            # not left.
            os.ftruncate(self._file, len(data) - len(torn))
            os.fsync(self._file)
        releases: list[Release] = []
        last: str | None = None
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                fields = json.loads(line)
                text, digest = fields["entry"], fields["sha256"]
                if digest != _chained(last or "", text):
                    raise ValueError("its checksum is wrong")
                entry = json.loads(text)
                if number == 1:
                    self._check_budget(Budget(**entry["budget"]))
                else:
                    releases.append(Release(**entry["release"]))
            except (ValueError, KeyError, TypeError, SpecError, ConfigError) as error:
                raise CheckpointError(
                    f"{self.path}, line {number} is damaged ({error}); restore the file from a "
                    "copy: without it nobody knows what is spent"
                ) from error
            last = digest
        return releases, last

    def _check_budget(self, before: Budget) -> None:
        if before != self.budget:
            raise CheckpointError(
                f"{self.path} was begun with {before}, not {self.budget}; what has been released "
                "was promised under the former. Go on with it, or begin another on other data"
            )


def _chained(last: str, text: str) -> str:
    return hashlib.sha256(f"{last}\n{text}".encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
