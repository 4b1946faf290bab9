"""Keys have the sizes and the form that the schemes' security needs, and bad ones are refused."""

import gmpy2
import pytest
from gmpy2 import mpz

from shardpar.errors import PartyError
from shardpar.fl.he import okamoto_uchiyama, paillier
from shardpar.fl.he.ciphertexts import Ciphertexts
from shardpar.fl.messages import decode, encode

SMALL = {"unsafe_small_key_for_tests": True}


@pytest.mark.parametrize("scheme", [paillier, okamoto_uchiyama])
@pytest.mark.parametrize("bits", [512, 1024, 2047, 2049, 100_000])
def test_broken_sizes_are_refused(scheme, bits):
    with pytest.raises(ValueError, match="use 2048"):
        scheme.generate(bits)


def test_paillier_keys_are_as_djn_need_them():
    secret = paillier.generate()
    public = secret.public
    assert public.n.bit_length() == 2048
    assert secret.p * secret.q == public.n
    for prime in (secret.p, secret.q):
        assert gmpy2.is_prime(prime)
        assert prime % 4 == 3
    # -h is a square modulo both primes.
    assert gmpy2.jacobi(-public.h, secret.p) == gmpy2.jacobi(-public.h, secret.q) == 1
    assert paillier.PublicKey.from_message(public.to_message()) == public
    numbers = [0, 1, -1, public.most, -public.most]
    assert secret.decrypt(secret.encrypt(numbers)) == numbers
    assert secret.decrypt(public.encrypt(numbers)) == numbers
    assert textbook_decrypt(secret, public.encrypt([123456789]).values[0]) == 123456789


def textbook_decrypt(secret, c):
    """Paillier's own decryption, with the Carmichael function and without remainders."""
    n = secret.public.n
    order = gmpy2.lcm(secret.p - 1, secret.q - 1)
    quotient = (gmpy2.powmod(c, order, n * n) - 1) // n
    return quotient * gmpy2.invert(order, n) % n


def test_okamoto_uchiyama_keys_are_as_published():
    secret = okamoto_uchiyama.generate()
    public = secret.public
    p, q = secret.p, public.n // secret.p**2
    assert public.n.bit_length() == 2048
    assert p * p * q == public.n
    assert gmpy2.is_prime(p)
    assert gmpy2.is_prime(q)
    assert gmpy2.is_prime(secret.t)
    assert (p - 1) % secret.t == 0
    assert secret.t.bit_length() == 256
    assert gmpy2.gcd(public.g - 1, public.n) == gmpy2.gcd(public.h - 1, public.n) == 1
    assert okamoto_uchiyama.PublicKey.from_message(public.to_message()) == public
    numbers = [0, 1, -1, public.most, -public.most]
    held = public.encrypt(numbers)
    assert secret.decrypt(held, trusted=True) == numbers
    # The original decryption, with p - 1.
    p2 = p * p

    def quotient(x):
        return (gmpy2.powmod(x, p - 1, p2) - 1) // p

    found = quotient(held.values[3]) * gmpy2.invert(quotient(public.g), p) % p
    assert found == public.most


def test_secret_keys_are_not_shown():
    for scheme, bits in ((paillier, 512), (okamoto_uchiyama, 768)):
        secret = scheme.generate(bits, **SMALL)
        assert str(int(secret.p)) not in repr(secret)


def test_a_chosen_ciphertext_takes_an_okamoto_uchiyama_key():
    """The attack that `trusted` is about: it works, so nothing decrypts unasked."""
    secret = okamoto_uchiyama.generate(768, **SMALL)
    public = secret.public
    for bits in range(public.most.bit_length() + 2, public.most.bit_length() + 40):
        number = 1 << bits
        chosen = Ciphertexts(public, [gmpy2.powmod(public.g, number, public.n)])
        with pytest.raises(ValueError, match="trusted=True"):
            secret.decrypt(chosen)
        try:
            [answer] = secret.decrypt(chosen, trusted=True)
        except OverflowError:
            continue
        if answer != number:
            assert gmpy2.gcd(number - answer, public.n) % secret.p == 0
            return
    raise AssertionError("no chosen ciphertext was answered")


def broken_moduli(bits):
    p = gmpy2.next_prime(mpz(1) << (bits // 2))
    return {
        "too small": (mpz(1) << 200) + 1,
        "too large": (mpz(1) << 9000) + 1,
        "even": p * (p - 1),
        "power": p * p,
        "prime": gmpy2.next_prime(mpz(1) << (bits - 1)),
        "small factor": 3 * gmpy2.next_prime(mpz(1) << (bits - 3)),
        "zero": mpz(0),
    }


@pytest.mark.parametrize("flaw", broken_moduli(512))
def test_unsound_moduli_are_refused(flaw):
    n = broken_moduli(512)[flaw]
    data = int(n).to_bytes(1200, "little")
    two = (2).to_bytes(4, "little")
    with pytest.raises(PartyError, match="unsound"):
        paillier.PublicKey.from_message(paillier.PublicKeyMessage(data, two), **SMALL)
    with pytest.raises(PartyError, match="unsound"):
        okamoto_uchiyama.PublicKey.from_message(
            okamoto_uchiyama.PublicKeyMessage(data, two, two), **SMALL
        )


def test_small_keys_and_unsound_bases_are_refused():
    public = paillier.generate(512, **SMALL).public
    sent = decode(encode(public.to_message()), paillier.PublicKeyMessage)
    with pytest.raises(PartyError, match="512 bits"):
        paillier.PublicKey.from_message(sent)
    assert paillier.PublicKey.from_message(sent, **SMALL) == public
    for h in (0, 1, public.n - 1, public.n, public.n + 5):
        message = paillier.PublicKeyMessage(sent.n, int(h).to_bytes(80, "little"))
        with pytest.raises(PartyError, match="base"):
            paillier.PublicKey.from_message(message, **SMALL)
    other = okamoto_uchiyama.generate(768, **SMALL).public
    sent = other.to_message()
    message = okamoto_uchiyama.PublicKeyMessage(sent.n, sent.g, sent.g)
    with pytest.raises(PartyError, match="h is not"):
        okamoto_uchiyama.PublicKey.from_message(message, **SMALL)
