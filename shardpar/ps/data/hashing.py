"""Decides which id a feature gets, the same on every machine and in every version.

Integers go through the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable
Pseudorandom Number Generators, OOPSLA 2014); text is folded through it eight bytes at a
time. Trained tables depend on it, so it never changes: tests/ps/data pins values.
"""

from __future__ import annotations

import numpy as np

# The text's words are read from a buffer with at least this many bytes after its last one.
WORD_BYTES = 8

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = (np.uint64(s) for s in (30, 27, 31, 32))
_SALTS_KEPT = 4096
_TOP_BIT_OFF = np.uint64(2**63 - 1)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that leaves no pattern; a fresh uint64 array.

    >>> mix(np.array([0, 1], np.uint64)).tolist()
    [0, 6238072747940578789]
    """
    x = values ^ (values >> _S30)
    x *= _FIRST
    x ^= x >> _S27
    x *= _SECOND
    x ^= x >> _S31
    return x


def salts(fields: np.ndarray) -> np.ndarray:
    """One 64-bit salt for each field number, so that equal ids of two fields part.

    >>> salts(np.array([0, 1])).tolist()
    [16294208416658607535, 7960286522194355700]
    """
    with np.errstate(over="ignore"):
        return mix((fields.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))


_SALTS = salts(np.arange(_SALTS_KEPT))
_SALTS.setflags(write=False)


def _salts_of(fields: np.ndarray) -> np.ndarray:
    if fields.size and fields.max() < _SALTS_KEPT:
        return _SALTS[fields]
    return salts(fields)


def hash_integers(
    values: np.ndarray, fields: np.ndarray | None = None, rows: int | None = None
) -> np.ndarray:
    """Ids of non-negative integers.

    Args:
      values: int64 or uint64, any shape.
      fields: of the same shape, or one that broadcasts; None where there are no fields.
      rows: ids are 0 … rows−1; None keeps 63 bits.

    Returns:
      int64, of the shape of `values`.

    >>> hash_integers(np.array([7, 7]), np.array([0, 1]), rows=1000).tolist()
    [12, 96]
    """
    keys = values.astype(np.uint64)
    if fields is not None:
        keys ^= _salts_of(fields)
    return fold(mix(keys), rows)


def hash_tokens(
    words: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    fields: np.ndarray | None = None,
    rows: int | None = None,
) -> np.ndarray:
    """Ids of texts that lie in one buffer.

    Args:
      words: uint64, one for each byte of the buffer: the eight bytes from it, little-endian.
      starts: where each text begins.
      ends: where each ends; `WORD_BYTES` more bytes follow the last.
      fields: as for `hash_integers`.
      rows: as for `hash_integers`.

    Returns:
      int64, one id for each text.
    """
    lengths = ends - starts
    hashes = lengths.astype(np.uint64)
    if fields is not None:
        hashes ^= _salts_of(fields)
    hashes = mix(hashes)
    longest = int(lengths.max(initial=1))
    for offset in range(0, longest, WORD_BYTES):
        if offset == 0:
            # Texts of no byte take part here with a word of zero; their length tells them apart.
            hashes = mix(hashes ^ _word(words, starts, lengths))
        else:
            rest = np.flatnonzero(lengths > offset)
            word = _word(words, starts[rest] + offset, lengths[rest] - offset)
            hashes[rest] = mix(hashes[rest] ^ word)
    return fold(hashes, rows)


def _word(words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    word = words[starts]
    cut = lengths < WORD_BYTES
    if cut.any():
        keep = np.minimum(lengths, WORD_BYTES).astype(np.uint64) << np.uint64(3)
        # A shift by 64 bits is undefined, so whole words skip the mask.
        mask = np.where(cut, (np.uint64(1) << (keep & np.uint64(63))) - np.uint64(1), ~np.uint64(0))
        word &= mask
    return word


def hash_text(text: bytes, field: int | None = None, rows: int | None = None) -> int:
    """The id of one text, in plain Python: what `hash_tokens` does for many.

    >>> hash_text(b"05db9164", field=0, rows=2**20)
    854955
    """
    value = len(text)
    if field is not None:
        value ^= _mix((field + 1) * _GOLDEN % 2**64)
    value = _mix(value)
    for offset in range(0, max(1, len(text)), WORD_BYTES):
        value = _mix(value ^ int.from_bytes(text[offset : offset + WORD_BYTES], "little"))
    return value % 2**63 if rows is None else (value >> 32) * rows >> 32


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def fold(hashes: np.ndarray, rows: int | None) -> np.ndarray:
    """64-bit hashes onto 0 … rows−1, evenly: ⌊(h / 2³²) · rows / 2³²⌋; rows is 2³² at most."""
    if rows is None:
        return (hashes & _TOP_BIT_OFF).view(np.int64)
    return ((hashes >> _S32) * np.uint64(rows) >> _S32).view(np.int64)
