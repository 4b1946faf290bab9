"""Which clients take part in a round, and their examples packed into arrays of few sizes.

Sizes are rounded up so that cohorts of different sizes run in the same compiled program; what is
added is masked, and changes no result. The rows of a device's clients lie after each other in one
array, and each client's order names its own, so clients of different sizes waste no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from shardpar.errors import DataError
from shardpar.fl.clients import ClientData
from shardpar.fl.examples import order_of

_SIZES_PER_DOUBLING = 8
_OF_COHORTS = 1 << 63

T = TypeVar("T")


@dataclass(frozen=True)
class LocalWork:
    """How a client goes through its examples in a round.

    Attributes:
      batch: examples per step.
      epochs: passes over the examples.
      seed: of their order.
    """

    batch: int = 20
    epochs: int = 1
    seed: int = 0


class Sizes(NamedTuple):
    """What one device's part of a cohort is padded to.

    Attributes:
      slots: places for clients.
      rows: of the arrays.
      steps: of the longest order.
    """

    slots: int = 1
    rows: int = 1
    steps: int = 1


@dataclass(frozen=True, eq=False)
class Cohort:
    """The clients of one round on `devices` devices, each with `slots` places for clients.

    Attributes:
      clients: int64 [devices * slots]; -1 is a place without a client.
      places: int64 [devices * slots]; which of the clients that were asked for each is, or -1.
      arrays: each [devices * rows, ...].
      order: int32 [devices * slots, steps, batch]: rows of the device's part of `arrays`.
      sizes: of each device's part.
    """

    clients: np.ndarray
    places: np.ndarray
    arrays: dict[str, np.ndarray]
    order: np.ndarray
    sizes: Sizes

    @property
    def count(self) -> int:
        """How many clients there are."""
        return int((self.clients >= 0).sum())


def sample_cohort(population: int, size: int | None, *, seed: int, round_: int) -> np.ndarray:
    """Clients drawn uniformly without replacement, int64, ascending.

    Args:
      population: clients in all.
      size: how many to draw; None or more than there are takes all.
      seed: of the run.
      round_: from 0.

    >>> sample_cohort(5, None, seed=0, round_=0).tolist()
    [0, 1, 2, 3, 4]
    >>> len(set(sample_cohort(1000, 10, seed=0, round_=3).tolist()))
    10
    """
    if size is None or size >= population:
        return np.arange(population)
    # Not a list of integers: beyond 2^63 NumPy would make floats of it, which forget the round.
    key = np.array([seed, _OF_COHORTS | round_], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key))
    return np.sort(draw.choice(population, size, replace=False))


def sample_each(population: int, rate: float, *, seed: int, round_: int) -> np.ndarray:
    """Clients each of which is drawn by itself with a probability, int64, ascending.

    >>> sample_each(4, 1.0, seed=0, round_=0).tolist()
    [0, 1, 2, 3]
    """
    key = np.array([seed, _OF_COHORTS | round_], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key))
    return np.flatnonzero(draw.random(population) < rate)


def bucketed(size: int) -> int:
    """The size rounded up to one of eight per doubling, so by an eighth at most.

    >>> [bucketed(n) for n in (0, 1, 9, 17, 100, 1001)]
    [0, 1, 9, 18, 104, 1024]
    """
    unit = max(1, (1 << max(size.bit_length() - 1, 0)) // _SIZES_PER_DOUBLING)
    return -(-size // unit) * unit


def pack(
    data: ClientData,
    clients: Sequence[int] | np.ndarray,
    work: LocalWork,
    *,
    round_: int | Sequence[int],
    devices: int = 1,
    multiple: int = 1,
    before: Cohort | None = None,
) -> Cohort:
    """Reads the clients' rows and lays them out.

    Args:
      data: of all clients.
      clients: of this round, in the order in which they are added up.
      work: batch and epochs.
      round_: from 0; decides the order of examples. One for each client if they differ.
      devices: among which clients are dealt, those with most steps first, to and fro. One device
        keeps them in their order.
      multiple: the places of a device are a multiple of it.
      before: of an earlier round of the same data. Its sizes are not gone below, so that its
        program does for this one too, and its arrays are taken if the clients are the same.

    Raises:
      DataError: a client is not in the data.
    """
    chosen = np.asarray(clients, np.int64)
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < data.clients:
        raise DataError(
            f"a round asks for client {int(chosen.max())}, and the data are of {data.clients} "
            "clients, counted from 0"
        )
    least = Sizes() if before is None else before.sizes
    rounds = np.broadcast_to(np.asarray(round_, np.int64), chosen.shape)
    dealt = _dealt(data.counts[chosen], devices, ordered=multiple == 1)
    slots = -(-bucketed(max(least.slots, *map(len, dealt))) // multiple) * multiple
    counts = [data.counts[chosen[part]] for part in dealt]
    rows = bucketed(max(least.rows, *(int(part.sum()) for part in counts)))
    most = max((int(part.max(initial=0)) for part in counts), default=0)
    steps = bucketed(max(least.steps, work.epochs * -(-most // work.batch)))
    order = np.full((devices, slots, steps, work.batch), -1, np.int32)
    ids, places = np.full((2, devices, slots), -1, np.int64)
    sizes = Sizes(slots, rows, steps)
    for d, part in enumerate(dealt):
        places[d, : len(part)] = part
        ids[d, : len(part)] = chosen[part]
        begin = 0
        for slot, (place, count) in enumerate(zip(part, counts[d], strict=True)):
            own = order_of(
                int(count), batch=work.batch, epochs=work.epochs, seed=work.seed,
                round_=int(rounds[place]), client=int(chosen[place]),
            )  # fmt: skip
            order[d, slot, : len(own)] = np.where(own < 0, -1, own + begin)
            begin += int(count)
    if (
        before is not None
        and before.sizes[:2] == sizes[:2]
        and np.array_equal(before.clients, ids.reshape(-1))
    ):
        arrays = before.arrays
    else:
        arrays = _rows(data, [chosen[part] for part in dealt], rows)
    return Cohort(
        ids.reshape(-1), places.reshape(-1), arrays, order.reshape(-1, steps, work.batch), sizes
    )


def _rows(data: ClientData, parts: Sequence[np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The rows of each device's clients, [devices * rows, ...]."""
    arrays = {
        name: np.zeros((len(parts), rows, *array.shape[1:]), array.dtype)
        for name, array in data.fields.items()
    }
    for d, part in enumerate(parts):
        for name, array in data.rows_of(part).items():
            arrays[name][d, : len(array)] = array
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}


def _dealt(counts: np.ndarray, devices: int, *, ordered: bool) -> list[np.ndarray]:
    """For each device which of the clients it gets."""
    if devices == 1 and ordered:
        return [np.arange(len(counts))]
    # Clients with about as many steps stand beside each other, and run in one chunk.
    longest = np.argsort(-counts, kind="stable")
    lap = np.concatenate([np.arange(devices), np.arange(devices)[::-1]])
    whose = np.resize(lap, len(longest))
    return [longest[whose == d] for d in range(devices)]


def ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """What `make` gives for each number, the next being made in a thread while one is used.

    >>> list(ahead(lambda n: n * n, range(4)))
    [0, 1, 4, 9]
    """
    waiting = iter(numbers)
    with ThreadPoolExecutor(1, thread_name_prefix="cohorts") as thread:
        first = next(waiting, None)
        coming = None if first is None else thread.submit(make, first)
        while coming is not None:
            made = coming.result()
            following = next(waiting, None)
            coming = None if following is None else thread.submit(make, following)
            yield made
