"""Who trains when, where the server never waits for all: clients that come back at their own pace.

The asynchronous setting of Nguyen et al., "Federated Learning with Buffered Asynchronous
Aggregation" (2022), arXiv 2106.06639, section 5: a fixed number of clients trains at any time, and
whenever one is done another begins with the newest model. Training itself takes no part in it, so
the clock can be wound forward at no cost, and a run that goes on needs nothing but its seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_OF_STARTS, _OF_TIMES = 5, 6


@dataclass(frozen=True)
class Arrival:
    """An update that comes back.

    Attributes:
      client: whose.
      launch: the number of its training, from 0 in the order in which clients began.
      version: of the model that it began with: how many steps the server had taken.
      staleness: how many it has taken since.
      at_s: when it came.
    """

    client: int
    launch: int
    version: int
    staleness: int
    at_s: float


@dataclass(frozen=True)
class ServerStep:
    """A full buffer.

    Attributes:
      number: of the step, from 0.
      arrivals: in the order in which they came.
      training: versions of the model that clients are still training with once it is taken.
    """

    number: int
    arrivals: tuple[Arrival, ...]
    training: frozenset[int]


def training_times(clients: int, *, median_s: float, spread: float, seed: int) -> np.ndarray:
    """How long each client takes for a round, float64 [clients] of seconds.

    Args:
      clients: how many.
      median_s: of all of them.
      spread: standard deviation of the logarithm; 0 makes all alike.
      seed: of the draw.

    >>> training_times(3, median_s=60.0, spread=0.0, seed=0).tolist()
    [60.0, 60.0, 60.0]
    """
    draw = np.random.default_rng([seed, _OF_TIMES])
    return median_s * np.exp(spread * draw.standard_normal(clients))


def server_steps(
    times_s: np.ndarray, *, concurrency: int, buffer: int, seed: int
) -> Iterator[ServerStep]:
    """The steps of the server, for ever.

    Args:
      times_s: float64 [clients], how long each takes for a round.
      concurrency: how many train at any time; all, if there are fewer.
      buffer: updates to a step.
      seed: of who begins next, uniformly among those that are idle.

    >>> steps = server_steps(np.array([1.0, 3.0]), concurrency=2, buffer=2, seed=0)
    >>> [[(a.client, a.version, a.staleness) for a in next(steps).arrivals] for _ in range(2)]
    [[(0, 0, 0), (0, 0, 0)], [(1, 0, 1), (0, 1, 0)]]
    """
    draw = np.random.default_rng([seed, _OF_STARTS])
    training: list[tuple[float, int, int, int]] = []
    idle = list(range(len(times_s)))
    launches = step = 0

    def begin(now_s: float) -> None:
        nonlocal launches
        at = int(draw.integers(len(idle)))
        idle[at], idle[-1] = idle[-1], idle[at]
        client = idle.pop()
        # Of those that end together the one that began first comes first.
        heapq.heappush(training, (now_s + float(times_s[client]), launches, client, step))
        launches += 1

    for _ in range(min(concurrency, len(times_s))):
        begin(0.0)
    waiting: list[Arrival] = []
    while True:
        now_s, launch, client, version = heapq.heappop(training)
        idle.append(client)
        waiting.append(Arrival(client, launch, version, step - version, now_s))
        full = len(waiting) == buffer
        step += full
        begin(now_s)
        if full:
            yield ServerStep(step - 1, tuple(waiting), frozenset(v for *_, v in training))
            waiting = []
