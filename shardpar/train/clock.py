"""What a step takes, by when results arrive."""

from __future__ import annotations

import time


class Clock:
    """Times steps by when their results arrive, leaving out evaluation, saving and the first.

    Attributes:
      step_s: of a step, a running mean; None before the second.
      tokens: of a step, the same mean.
      wait_s: of the last step, for its batch.
    """

    def __init__(self) -> None:
        self.step_s: float | None = None
        self.tokens = 0.0
        self.wait_s = 0.0
        self._last: float | None = None

    def waiting(self) -> Clock:
        """To be entered while waiting for a batch."""
        return self

    def __enter__(self) -> None:
        self._wait_start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.wait_s = time.perf_counter() - self._wait_start

    def tick(self, tokens: float) -> None:
        """The results of a step of so many tokens have arrived."""
        now = time.perf_counter()
        if self._last is not None:
            latest, old = now - self._last, self.step_s
            # A running mean over about ten steps: quick to follow, calm to read.
            self.step_s = latest if old is None else 0.9 * old + 0.1 * latest
            self.tokens = tokens if old is None else 0.9 * self.tokens + 0.1 * tokens
        self._last = now

    def restart(self) -> None:
        """Leaves out what was done since the last step."""
        self._last = None
