"""A pool of processes computes what one process does, in the same order, and reads lazily."""

import numpy as np
import pytest

from shardpar.fl.he import okamoto_uchiyama, paillier
from shardpar.fl.he.pool import Pool

SMALL = {"unsafe_small_key_for_tests": True}


@pytest.fixture(scope="module")
def processes():
    with Pool(2) as pool:
        yield pool


@pytest.mark.parametrize(
    ("scheme", "bits"), [(paillier, 512), (okamoto_uchiyama, 768)], ids=["paillier", "ou"]
)
def test_pools_compute_in_order(processes, scheme, bits):
    secret = scheme.generate(bits, **SMALL)
    numbers = [(-1) ** i * i for i in range(300)]
    matrix = np.random.default_rng(0).integers(-5, 6, (300, 9))
    want = (np.array(numbers) @ matrix).tolist()
    for pool in (processes, Pool(1)):
        for key in (secret, secret.public):
            held = pool.encrypt(key, numbers)
            assert held.fresh
            assert pool.decrypt(secret, held, trusted=True) == numbers
        again = pool.rerandomised(held)
        assert not set(again.values) & set(held.values)
        assert secret.decrypt(again, trusted=True) == numbers
        assert pool.decrypt(secret, pool.matmul(held, matrix), trusted=True) == want


def test_errors_of_workers_arrive(processes):
    secret = okamoto_uchiyama.generate(768, **SMALL)
    held = secret.public.encrypt([1])
    with pytest.raises(ValueError, match="trusted=True"):
        processes.decrypt(secret, held)
    with pytest.raises(OverflowError):
        processes.encrypt(secret.public, [secret.public.most + 1])


def test_batches_are_drawn_as_they_are_needed(processes):
    secret = paillier.generate(512, **SMALL)
    for pool, ahead in ((processes, 6), (Pool(1), 1)):
        drawn = []

        def numbers(drawn=drawn):
            for number in range(1000):
                drawn.append(number)
                yield number

        stream = pool.encrypt_in_batches(secret, numbers(), 10)
        first = next(stream)
        assert len(first) == 10
        assert 10 <= len(drawn) <= ahead * 10
        rest = [number for batch in stream for number in secret.decrypt(batch)]
        assert secret.decrypt(first) + rest == list(range(1000))
