"""Computing on ciphertexts equals computing on integers, and nothing computed is sent as it is."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import PartyError
from shardpar.fl.he import okamoto_uchiyama, paillier
from shardpar.fl.he.ciphertexts import Ciphertexts, CiphertextsMessage
from shardpar.fl.he.powers import _width, product_of_powers
from shardpar.fl.messages import decode, encode

SMALL = {"unsafe_small_key_for_tests": True}
KEYS = {
    "paillier": paillier.generate(512, **SMALL),
    "okamoto_uchiyama": okamoto_uchiyama.generate(768, **SMALL),
}
BOTH = pytest.mark.parametrize("secret", KEYS.values(), ids=KEYS)
NUMBERS = st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=6)


def opened(secret, ciphertexts):
    return secret.decrypt(ciphertexts, trusted=True)


@BOTH
@settings(max_examples=30, deadline=None)
@given(numbers=NUMBERS, data=st.data())
def test_they_compute_as_integers_do(secret, numbers, data):
    others = data.draw(st.lists(st.integers(-(2**60), 2**60), min_size=len(numbers)))
    others = (others + [0] * len(numbers))[: len(numbers)]
    held = secret.public.encrypt(numbers)
    theirs = secret.public.encrypt(others)
    pairs = list(zip(numbers, others, strict=True))
    assert opened(secret, held) == numbers
    assert opened(secret, secret.encrypt(numbers)) == numbers
    assert opened(secret, held + theirs) == [a + b for a, b in pairs]
    assert opened(secret, held + others) == [a + b for a, b in pairs]
    assert opened(secret, held - theirs) == [a - b for a, b in pairs]
    assert opened(secret, held - others) == [a - b for a, b in pairs]
    assert opened(secret, held.times(others)) == [a * b for a, b in pairs]
    assert opened(secret, held.dot(others)) == [sum(a * b for a, b in pairs)]
    assert opened(secret, held.concat(theirs)) == numbers + others
    assert opened(secret, held.rerandomised()) == numbers


@BOTH
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_matrices_multiply_as_numpys_do(secret, density):
    rng = np.random.default_rng(0)
    numbers = rng.integers(-(2**20), 2**20, 40)
    matrix = rng.integers(-(2**16), 2**16, (40, 7)) * (rng.random((40, 7)) < density)
    held = secret.public.encrypt(numbers)
    want = (numbers @ matrix).tolist()
    assert opened(secret, held.matmul(matrix)) == want
    assert opened(secret, held.matmul(scipy.sparse.coo_matrix(matrix))) == want
    assert opened(secret, held.matmul(matrix.tolist())) == want
    with pytest.raises(ValueError, match="39 rows for 40"):
        held.matmul(matrix[1:])


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.integers(-(2**40), 2**40), max_size=300),
    bits=st.sampled_from([1, 2, 8, 41]),
)
def test_products_of_powers_equal_pythons(exponents, bits):
    modulus = 2**61 - 1
    exponents = [e >> (41 - bits) for e in exponents]
    bases = list(range(2, 2 + len(exponents)))
    want = 1
    for base, exponent in zip(bases, exponents, strict=True):
        want = want * pow(base, exponent, modulus) % modulus
    assert product_of_powers(bases, exponents, modulus) == want


def test_every_way_to_multiply_powers_is_taken():
    assert _width(1, 16) == 0
    assert _width(100, 1) <= 1
    assert _width(100, 16) > 1
    assert _width(100_000, 16) > _width(100, 16)


@BOTH
@settings(max_examples=20, deadline=None)
@given(groups=st.lists(st.integers(-1, 4), min_size=1, max_size=20))
def test_group_sums_are_histograms(secret, groups):
    numbers = [3**i - 7 for i in range(len(groups))]
    sums = secret.public.encrypt(numbers).sums(groups, 5)
    want = [sum(n for n, g in zip(numbers, groups, strict=True) if g == k) for k in range(5)]
    assert opened(secret, sums) == want


@BOTH
def test_encrypting_twice_looks_different(secret):
    for encryptor in (secret, secret.public):
        assert len(set(encryptor.encrypt([5] * 20).values)) == 20


@BOTH
def test_what_was_computed_must_be_rerandomised_before_it_is_sent(secret):
    public = secret.public
    held = public.encrypt([1, 2, 3])
    received = Ciphertexts.from_message(public, held.to_message())
    computed = [
        held + np.zeros(3, int),
        held + held,
        held - held,
        held.times([1, 1, 1]),
        held.dot([1, 0, 0]),
        held.matmul(np.eye(3, dtype=int)),
        held.sums([0, 1, 2], 3),
        held.take([0, 0]),
        held.take([0, -3]),
        held.concat(held),
        public.zero(3),
        received,
        received.take([1]),
    ]
    for result in computed:
        with pytest.raises(ValueError, match="rerandomised"):
            result.to_message()
        sent = result.rerandomised()
        assert not set(sent.values) & set(result.values)
        assert not set(sent.values) & set(held.values)
        assert opened(secret, Ciphertexts.from_message(public, sent.to_message())) == opened(
            secret, result
        )
    held.take([2, 0]).to_message()


def test_without_randomness_anyone_reads_a_ciphertext():
    """Why `zero` and sums with plain numbers are not fresh: the attack works on them."""
    secret = KEYS["paillier"]
    n = secret.public.n
    unmasked = secret.public.zero(1) + np.array([1234])
    assert (unmasked.values[0] - 1) // n == 1234
    masked = unmasked.rerandomised().values[0]
    assert masked % n != 1


@BOTH
def test_numbers_and_sums_beyond_the_key_are_refused(secret):
    public = secret.public
    most = public.most
    assert opened(secret, public.encrypt([most, -most])) == [most, -most]
    for beyond in (most + 1, -most - 1):
        with pytest.raises(OverflowError, match="larger key"):
            public.encrypt([beyond])
    space = public.n if secret is KEYS["paillier"] else secret.p
    middle = public.encrypt([int(space // 12)]).times([6])
    for beyond in (middle, -middle):
        with pytest.raises(OverflowError, match="overflowed"):
            opened(secret, beyond)
    with pytest.raises(TypeError, match="FixedPoint"):
        public.encrypt([1.5])
    with pytest.raises(TypeError, match="FixedPoint"):
        public.encrypt(np.array([1.0]))


@BOTH
def test_ciphertexts_of_two_keys_do_not_mix(secret):
    other = next(key for key in KEYS.values() if key is not secret)
    held, theirs = secret.public.encrypt([1]), other.public.encrypt([1])
    with pytest.raises(ValueError, match="different keys"):
        held + theirs
    with pytest.raises(ValueError, match="another key"):
        opened(secret, theirs)
    with pytest.raises(PartyError, match="another key"):
        Ciphertexts.from_message(secret.public, theirs.to_message())


@BOTH
def test_malformed_ciphertexts_are_refused(secret):
    public = secret.public
    good = public.encrypt([1, 2]).to_message()
    width = public.width_bytes
    factor = secret.p if secret is KEYS["okamoto_uchiyama"] else secret.q

    def bad(number):
        return good.data[:width] + int(number).to_bytes(width, "little")

    for data in (bad(0), bad(public.modulus), bad(256**width - 1), bad(factor), good.data[:-1]):
        message = CiphertextsMessage(good.key, 2, width, data)
        with pytest.raises(PartyError, match="they sent"):
            Ciphertexts.from_message(public, message, party="they")
    with pytest.raises(PartyError, match="has 3"):
        Ciphertexts.from_message(public, good, count=3)
    for count, width_ in ((1, width), (-2, -width), (4, width // 2), (2**62, 0)):
        with pytest.raises(PartyError):
            Ciphertexts.from_message(public, CiphertextsMessage(good.key, count, width_, good.data))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300), flips=st.lists(st.integers(0, 2**16), max_size=3))
def test_any_bytes_are_ciphertexts_or_refused(data, flips):
    public = KEYS["paillier"].public
    wire = bytearray(encode(public.encrypt([1, 2]).to_message()))
    for flip in flips:
        wire[flip % len(wire)] ^= 1 << flip % 8
    for each in (data, bytes(wire)):
        try:
            message = decode(each, CiphertextsMessage)
            held = Ciphertexts.from_message(public, message)
        except PartyError:
            continue
        assert all(0 < value < public.modulus for value in held.values)
