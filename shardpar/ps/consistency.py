"""Who may go on: bulk-synchronous, stale-synchronous and asynchronous training as one number.

A worker's clock is how many steps it has finished. It may start another while it is at most
`staleness` steps ahead of the slowest: 0 is lockstep, n is SSP (Ho et al., "More effective
distributed ML via a stale synchronous parallel parameter server", 2013), and no bound at all
is asynchronous. Everything here is a value; the clock that workers ask is in `ps.cluster`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardpar.errors import ConfigError, RunError

SLOW_SHARE = 0.7
"""A worker is slow whose time per sample is more than the mean's through this, as in Angel."""


@dataclass(frozen=True)
class Consistency:
    """How far apart workers may be.

    Attributes:
      staleness: steps that a worker may be ahead of the slowest; None for no bound.

    >>> BSP.text(), SSP(3).text(), ASP.text()
    ('bsp', 'ssp(3)', 'asp')
    """

    staleness: int | None = 0

    def __post_init__(self) -> None:
        if self.staleness is not None and self.staleness < 0:
            raise ConfigError(
                f"workers cannot be {self.staleness} steps ahead; write 0 for lockstep, a larger "
                "number for SSP, or None for no bound"
            )

    @property
    def lockstep(self) -> bool:
        """Whether the updates of a step are applied together, when the last one is there."""
        return self.staleness == 0

    def text(self) -> str:
        """For people, and for `consistency_from_text`."""
        if self.staleness is None:
            return "asp"
        return "bsp" if self.lockstep else f"ssp({self.staleness})"


BSP = Consistency(0)
ASP = Consistency(None)


def SSP(staleness: int) -> Consistency:  # noqa: N802
    """Stale synchronous: a worker may be `staleness` steps ahead of the slowest."""
    return Consistency(staleness)


def consistency_from_text(text: str) -> Consistency:
    """The inverse of `Consistency.text`.

    Raises:
      ConfigError: the text is none of bsp, ssp(N) and asp.

    >>> consistency_from_text("ssp(2)") == SSP(2)
    True
    """
    plain = text.strip().lower()
    if plain in ("bsp", "asp"):
        return BSP if plain == "bsp" else ASP
    number = plain.removeprefix("ssp(").removesuffix(")")
    if plain == f"ssp({number})" and number.isdigit():
        return SSP(int(number))
    raise ConfigError(f"consistency is 'bsp', 'ssp(N)' or 'asp', not {text!r}")


@dataclass(frozen=True)
class Clocks:
    """A vector clock: how many steps each worker has finished.

    >>> clocks = Clocks.zero(2).finished(0, 1)
    >>> clocks.may_start(0, BSP), clocks.may_start(0, SSP(1)), clocks.may_start(1, BSP)
    (False, True, True)
    """

    steps: tuple[int, ...]

    @classmethod
    def zero(cls, workers: int) -> Clocks:
        """Nobody has done anything.

        Raises:
          ConfigError: there is no worker.
        """
        if workers < 1:
            raise ConfigError(f"there is at least 1 worker, not {workers}")
        return cls((0,) * workers)

    @property
    def slowest(self) -> int:
        """The steps that all have finished."""
        return min(self.steps)

    def finished(self, worker: int, steps: int) -> Clocks:
        """After a worker said that it has finished so many steps in all.

        A worker that was restarted says again what it knows, which may be less than it had
        said before: a clock never goes back.
        """
        if not 0 <= worker < len(self.steps):
            raise RunError(f"there are workers 0 to {len(self.steps) - 1}, but no {worker}")
        kept = max(self.steps[worker], steps)
        return replace(self, steps=(*self.steps[:worker], kept, *self.steps[worker + 1 :]))

    def may_start(self, worker: int, bound: Consistency) -> bool:
        """Whether a worker may start its next step."""
        return may_start(self.steps[worker], self.slowest, bound)

    def spread(self) -> int:
        """How many steps the fastest is ahead of the slowest."""
        return max(self.steps) - self.slowest


def may_start(clock: int, slowest: int, bound: Consistency) -> bool:
    """Whether a worker that has finished `clock` steps may start one more.

    >>> may_start(5, 3, SSP(2)), may_start(6, 3, SSP(2)), may_start(99, 0, ASP)
    (True, False, True)
    """
    return bound.staleness is None or clock - slowest <= bound.staleness


def slow_workers(seconds_per_sample: Mapping[int, float]) -> tuple[int, ...]:
    """The workers whose time per sample is above the mean divided by SLOW_SHARE.

    >>> slow_workers({0: 1.0, 1: 1.1, 2: 4.0}), slow_workers({0: 1.0, 1: 1.3})
    ((2,), ())
    """
    if not seconds_per_sample:
        return ()
    mean_s = sum(seconds_per_sample.values()) / len(seconds_per_sample)
    return tuple(
        worker for worker, time_s in sorted(seconds_per_sample.items())
        if time_s > mean_s / SLOW_SHARE
    )  # fmt: skip


def delay_scale(delay: int) -> float:
    """What an update counts for that was computed from rows `delay` rounds old.

    The rule of Jiang, Cui, Zhang, Yu, "Heterogeneity-aware distributed parameter servers"
    (SIGMOD 2017): an update is divided by its staleness, counted from 1.

    >>> delay_scale(0), delay_scale(3)
    (1.0, 0.25)
    """
    return 1.0 / (1 + max(0, delay))
