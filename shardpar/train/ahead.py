"""Computes what coming steps need while the step before runs, in order and one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], steps: int = 2
) -> Iterator[Result]:
    """The results of a function, computed in a background thread before they are asked for.

    Results are those of `map`, in the same order. An error of `items` or of the function comes
    where its result would have, and ends the iterator. Made for what leaves the interpreter
    free meanwhile, as the dispatcher's solver does (`planner.dispatch`).

    Args:
      function: called in the thread, for one item after another.
      items: read in the thread too; may be endless.
      steps: how many results are computed before they are asked for, 1 or more.

    >>> list(ahead(abs, [-3, 2, -1]))
    [3, 2, 1]
    """
    if steps < 1:
        raise ValueError(f"steps ({steps}) must be 1 or more")
    return _results(function, iter(items), steps)


def _results(
    function: Callable[[Item], Result], items: Iterator[Item], steps: int
) -> Iterator[Result]:
    def one() -> tuple[Result] | None:
        for item in items:
            return (function(item),)
        return None

    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting: deque[Future[tuple[Result] | None]] = deque()
        while True:
            waiting.extend(pool.submit(one) for _ in range(steps + 1 - len(waiting)))
            found = waiting.popleft().result()
            if found is None:
                return
            yield found[0]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
