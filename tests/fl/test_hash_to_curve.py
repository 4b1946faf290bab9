"""Hashing to curve25519 against the vectors of RFC 9380 and a plain transcription of its map."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from gmpy2 import mpz
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.fl.hash_to_curve import (
    PRIME,
    elligator2,
    encode_to_curve,
    expand_message,
    field_element,
)

MESSAGES = (b"", b"abc", b"abcdef0123456789", b"q128_" + b"q" * 128, b"a512_" + b"a" * 512)
# Appendix J.4.2: u[0], Q.x, P.x.
SUITE = b"QUUX-V01-CS02-with-curve25519_XMD:SHA-512_ELL2_NU_"
VECTORS = (
    (
        "608d892b641f0328523802a6603427c26e55e6f27e71a91a478148d45b5093cd",
        "51125222da5e763d97f3c10fcc92ea6860b9ccbbd2eb1285728f566721c1e65b",
        "1bb913f0c9daefa0b3375378ffa534bda5526c97391952a7789eb976edfe4d08",
    ),
    (
        "46f5b22494bfeaa7f232cc8d054be68561af50230234d7d1d63d1d9abeca8da5",
        "7d56d1e08cb0ccb92baf069c18c49bb5a0dcd927eff8dcf75ca921ef7f3e6eeb",
        "7c22950b7d900fa866334262fcaea47a441a578df43b894b4625c9b450f9a026",
    ),
    (
        "235fe40c443766ce7e18111c33862d66c3b33267efa50d50f9e8e5d252a40aaa",
        "3fbe66b9c9883d79e8407150e7c2a1c8680bee496c62fabe4619a72b3cabe90f",
        "31ad08a8b0deeb2a4d8b0206ca25f567ab4e042746f792f4b7973f3ae2096c52",
    ),
    (
        "001e92a544463bda9bd04ddbe3d6eed248f82de32f522669efc5ddce95f46f5b",
        "227e0bb89de700385d19ec40e857db6e6a3e634b1c32962f370d26f84ff19683",
        "027877759d155b1997d0d84683a313eb78bdb493271d935b622900459d52ceaa",
    ),
    (
        "1a68a1af9f663592291af987203393f707305c7bac9c8d63d6a729bdc553dc19",
        "3bcd651ee54d5f7b6013898aab251ee8ecc0688166fce6e9548d38472f6bd196",
        "5fd892c0958d1a75f54c3182a18d286efab784e774d1e017ba2fb252998b5dc1",
    ),
)
# Appendix K.3, 32 bytes.
EXPANDER = b"QUUX-V01-CS02-with-expander-SHA512-256"
EXPANDED = (
    "6b9a7312411d92f921c6f68ca0b6380730a1a4d982c507211a90964c394179ba",
    "0da749f12fbe5483eb066a5f595055679b976e93abe9be6f0f6318bce7aca8dc",
    "087e45a86e2939ee8b91100af1583c4938e0f5fc6c9db4b107b83346bc967f58",
    "7336234ee9983902440f6bc35b348352013becd88938d2afec44311caf8356b3",
)


def on_curve(x: int) -> bool:
    """Whether x³ + A x² + x is a square."""
    p = int(PRIME)
    return pow(x * (x * x + 486662 * x + 1), (p - 1) // 2, p) in (0, 1)


def doubled(x: int) -> int:
    """The u-coordinate of twice a point (Montgomery 1987)."""
    p = int(PRIME)
    return (x * x - 1) ** 2 * pow(4 * x * (x * x + 486662 * x + 1), -1, p) % p


@pytest.mark.parametrize(("message", "expected"), list(zip(MESSAGES[:4], EXPANDED, strict=True)))
def test_expansion_has_the_values_of_the_rfc(message, expected):
    assert expand_message(message, EXPANDER, 32).hex() == expected


@pytest.mark.parametrize(("message", "vector"), list(zip(MESSAGES, VECTORS, strict=True)))
def test_the_suite_has_the_values_of_the_rfc(message, vector):
    element, mapped, cleared = (int(text, 16) for text in vector)
    assert field_element(message, SUITE) == element
    assert elligator2([mpz(element)]) == [mapped]
    assert encode_to_curve([message], SUITE) == [mapped.to_bytes(32, "little")]
    assert doubled(doubled(doubled(mapped))) == cleared


def test_x25519_of_a_point_stands_for_x25519_of_the_cleared_one():
    # That 8 comes before or after the scalar makes no difference, so it may be left out for all.
    secret = X25519PrivateKey.generate()
    for _, mapped, cleared in VECTORS:
        product, of_cleared = (
            int.from_bytes(
                secret.exchange(
                    X25519PublicKey.from_public_bytes(int(point, 16).to_bytes(32, "little"))
                ),
                "little",
            )
            for point in (mapped, cleared)
        )
        assert doubled(doubled(doubled(product))) == of_cleared


def mapped_by_the_text(u: int) -> int:
    """RFC 9380, section 6.7.1, step by step, with J = A, K = 1, Z = 2."""
    p, j, z = int(PRIME), 486662, 2
    x1 = -j * pow(1 + z * u * u, -1, p) % p
    return x1 if on_curve(x1) else (-x1 - j) % p


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, int(PRIME) - 1), max_size=5))
def test_many_at_once_are_as_one_by_one(elements):
    mapped = elligator2([mpz(u) for u in elements])
    assert mapped == [mapped_by_the_text(u) for u in elements]
    assert all(on_curve(int(x)) for x in mapped)


def test_tags_and_lengths_out_of_range_are_refused():
    for dst in (b"", b"x" * 256):
        with pytest.raises(ValueError, match="use 1 to 255"):
            expand_message(b"", dst, 32)
    with pytest.raises(ValueError, match="1 to 64"):
        expand_message(b"", b"x", 65)
