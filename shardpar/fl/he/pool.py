"""Encryption, decryption and products of ciphertexts on all cores, results in order.

Processes are spawned, never forked: a fork of a process that runs JAX may hang. So a script that
makes a `Pool` needs `if __name__ == "__main__":` around what it does.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from gmpy2 import mpz

from shardpar.errors import RunError
from shardpar.fl.he.ciphertexts import Ciphertexts, PublicKey, columns_of
from shardpar.fl.he.powers import product_of_powers

BATCH = 64
_AHEAD = 2

Job = TypeVar("Job")
Done = TypeVar("Done")


class Encryptor(Protocol):
    """A public key, or a secret key, which encrypts faster."""

    def encrypt(self, numbers: list[int]) -> Ciphertexts:
        """Encrypts integers."""
        ...


class SecretKey(Encryptor, Protocol):
    """A secret key of any scheme here."""

    @property
    def public(self) -> Any:
        """Its public half."""
        ...

    def decrypt(self, ciphertexts: Ciphertexts, *, trusted: bool = False) -> list[int]:
        """The numbers in ciphertexts."""
        ...


class Pool:
    """Worker processes, started by the first call that has enough to do.

    Args:
      processes: how many; None for one per core that this process may use. With 1 everything is
        done in this process.

    >>> from shardpar.fl.he import paillier
    >>> secret = paillier.generate(512, unsafe_small_key_for_tests=True)
    >>> with Pool(1) as pool:
    ...     pool.decrypt(secret, pool.encrypt(secret.public, range(3)))
    [0, 1, 2]
    """

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; work that nobody waits for is dropped."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def encrypt(self, key: Encryptor, numbers: Iterable[int]) -> Ciphertexts:
        """As `key.encrypt`."""
        public = public_of(key)
        parts = list(self.encrypt_in_batches(key, numbers, BATCH))
        return Ciphertexts(public, [], fresh=True).concat(*parts)

    def encrypt_in_batches(
        self, key: Encryptor, numbers: Iterable[int], batch: int
    ) -> Iterator[Ciphertexts]:
        """Ciphertexts of so many numbers at a time, as they are done: to send while more are made.

        Numbers are drawn from the iterable a few batches ahead, not all at once.
        """
        public = public_of(key)
        jobs = ((key, part) for part in batches(numbers, batch))
        for values in self.mapped(_encrypt, jobs):
            yield Ciphertexts(public, unjoined(values, public.width_bytes), fresh=True)

    def rerandomised(self, ciphertexts: Ciphertexts) -> Ciphertexts:
        """As `ciphertexts.rerandomised()`."""
        key = ciphertexts.key
        parts = self.mapped(_rerandomise, _parts(key, ciphertexts))
        return Ciphertexts(key, _whole(key, parts), fresh=True)

    def decrypt(
        self, secret: SecretKey, ciphertexts: Ciphertexts, *, trusted: bool = False
    ) -> list[int]:
        """As `secret.decrypt`, with its errors."""
        if ciphertexts.key != secret.public:
            raise ValueError("these ciphertexts are under another key")
        jobs = ((secret, data, trusted) for _, data in _parts(secret.public, ciphertexts))
        return [number for part in self.mapped(_decrypt, jobs) for number in part]

    def matmul(self, ciphertexts: Ciphertexts, matrix: Any) -> Ciphertexts:
        """As `ciphertexts.matmul`."""
        key = ciphertexts.key
        columns = columns_of(matrix, len(ciphertexts))
        if self.processes == 1:
            return ciphertexts.matmul(matrix)
        data = joined(ciphertexts.values, key.width_bytes)
        size = max(1, -(-len(columns) // (4 * self.processes)))
        jobs = ((key, data, part) for part in batches(columns, size))
        return Ciphertexts(key, _whole(key, self.mapped(_matmul, jobs)))

    def mapped(self, work: Callable[[Job], Done], jobs: Iterable[Job]) -> Iterator[Done]:
        """work(job) of each job, in order, a few jobs ahead of who takes the results.

        Args:
          work: a function of a module.
          jobs: what can be pickled.

        Raises:
          RunError: the processes ended.
        """
        if self.processes == 1:
            yield from map(work, jobs)
            return
        waiting: deque[Future[Done]] = deque()
        rest = iter(jobs)
        try:
            for job in islice(rest, _AHEAD * self.processes):
                waiting.append(self._submit(work, job))
            while waiting:
                done = waiting.popleft().result()
                for job in islice(rest, 1):
                    waiting.append(self._submit(work, job))
                yield done
        except BrokenProcessPool:
            self.close()
            raise RunError(
                "the worker processes ended: a script that makes a Pool needs "
                'if __name__ == "__main__": around what it does; or use Pool(1)'
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, work: Callable[[Job], Done], job: Job) -> Future[Done]:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.processes, mp_context=context)
        return self._executor.submit(work, job)


Item = TypeVar("Item")


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items, the last of the rest.

    >>> list(batches(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def joined(values: list[mpz], width_bytes: int) -> bytes:
    """Numbers as bytes, each of the same width."""
    return b"".join(value.to_bytes(width_bytes, "little") for value in values)


def unjoined(data: bytes, width_bytes: int) -> list[mpz]:
    """The numbers in some bytes."""
    starts = range(0, len(data), width_bytes)
    return [mpz.from_bytes(data[i : i + width_bytes], "little") for i in starts]


def public_of(key: Any) -> PublicKey:
    """The public key of a key."""
    return key if isinstance(key, PublicKey) else key.public


def _parts(key: PublicKey, ciphertexts: Ciphertexts) -> Iterator[tuple[PublicKey, bytes]]:
    for part in batches(ciphertexts.values, BATCH):
        yield key, joined(part, key.width_bytes)


def _whole(key: PublicKey, parts: Iterable[bytes]) -> list[mpz]:
    return [value for part in parts for value in unjoined(part, key.width_bytes)]


@lru_cache(maxsize=8)
def _kept(key: Any) -> Any:
    """The first key equal to this one, which has its tables by now."""
    return key


def _encrypt(job: tuple[Any, list[int]]) -> bytes:
    key = _kept(job[0])
    return joined(key.encrypt(job[1]).values, public_of(key).width_bytes)


def _rerandomise(job: tuple[PublicKey, bytes]) -> bytes:
    key = _kept(job[0])
    width = key.width_bytes
    return joined(Ciphertexts(key, unjoined(job[1], width)).rerandomised().values, width)


def _decrypt(job: tuple[Any, bytes, bool]) -> list[int]:
    secret, data, trusted = _kept(job[0]), job[1], job[2]
    public = secret.public
    values = unjoined(data, public.width_bytes)
    return secret.decrypt(Ciphertexts(public, values), trusted=trusted)


def _matmul(job: tuple[PublicKey, bytes, list[tuple[list[int], list[int]]]]) -> bytes:
    key, data, columns = job
    values = unjoined(data, key.width_bytes)
    products = [
        product_of_powers([values[row] for row in rows], numbers, key.modulus)
        for rows, numbers in columns
    ]
    return joined(products, key.width_bytes)
