"""What signals ask of a run: to save and stop, or for another plan."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Signals:
    """What signals have asked for, and whom SIGUSR1 asks for another plan."""

    asked: list[int] = field(default_factory=list)
    on_replan: Callable[[], None] = lambda: None

    def should_stop(self) -> bool:
        """Whether to save and stop."""
        return bool(self.asked)


@contextmanager
def asked_by_signal() -> Iterator[Signals]:
    """SIGTERM and the first Ctrl-C ask the loop to save and stop; a second Ctrl-C interrupts."""
    signals = Signals()

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGUSR1:
            signals.on_replan()
            return
        if signals.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
