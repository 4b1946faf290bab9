"""Decides how many unreadable lines are too many, and what is said about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from shardpar.errors import DataError

# A share of a few lines says nothing, so it is taken of at least so many.
LEAST_LINES = 10_000
_KEPT = 5


@dataclass(eq=False)
class BadLines:
    """Counts lines that could not be read; made once per pass over the data.

    Attributes:
      share: of all lines that may be bad.
      seen: lines read so far.
      count: of these, the bad ones.
      first: place and reason of the first few.

    >>> bad = BadLines(share=0.1)
    >>> bad.add(100, [(3, "the label is missing")], lambda row: f"a.svm:{row + 1}")
    >>> bad.report()
    '1 of 100 lines was left out: a.svm:4: the label is missing'
    """

    share: float
    seen: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, seen: int, bad: list[tuple[int, str]], locate: Callable[[int], str]) -> None:
        """Counts lines.

        Args:
          seen: how many were read.
          bad: of these, which sample and why.
          locate: gives file and line of a sample; called for the first few only.

        Raises:
          DataError: there are more bad lines now than the share allows.
        """
        self.seen += seen
        self.count += len(bad)
        for sample, reason in bad[: _KEPT - len(self.first)]:
            self.first.append(f"{locate(sample)}: {reason}")
        self._check(LEAST_LINES)

    def end(self) -> None:
        """Says that all lines were seen.

        Raises:
          DataError: the share is exceeded, however few lines there are.
        """
        self._check(1)

    def _check(self, least: int) -> None:
        if not self.count or self.count <= self.share * max(self.seen, least):
            return
        if not self.share:
            raise DataError(
                f"{self.first[0]} (repair the line, or write data.bad_share=0.01 to leave out up "
                "to 1% of the lines)"
            )
        enough = math.ceil(1e4 * self.count / max(self.seen, least)) / 1e4
        raise DataError(
            f"{self.count} of {self.seen} lines cannot be read, and data.bad_share={self.share:g} "
            f"allows fewer; repair them, or write data.bad_share={enough:g}; the first are:\n  "
            + "\n  ".join(self.first)
        )

    def report(self) -> str:
        """One sentence for a log; empty if no line was bad."""
        if not self.count:
            return ""
        verb = "was" if self.count == 1 else "were"
        more = "; …" if self.count > len(self.first) else ""
        return f"{self.count} of {self.seen} lines {verb} left out: {'; '.join(self.first)}{more}"
