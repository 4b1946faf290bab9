"""Decides what number a piece of text is, for a whole block of lines at once.

Digits are read eight at a time as one 64-bit word (D. Lemire: Quickly parsing eight digits,
2018). A decimal of at most fifteen digits is a whole number divided by a power of ten, both
exact, so the quotient is the double that Python's `float` gives (W. Clinger, PLDI 1990). What
is written in any other way goes through Python's `float`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAD = b"\n" * 16
"""Stands before and after the lines, so that eight bytes can be read around any token."""

NEWLINE, SPACE, DOT, COLON = (ord(c) for c in "\n .:")

_MARGIN = len(PAD)
_TAB, _RETURN, _ZERO, _TEN = (np.uint8(n) for n in (9, 13, 48, 10))
_U = np.uint64
_ZEROS = _U(0x3030303030303030)
_CARRY = _U(0x7676767676767676)
_HIGH = _U(0x8080808080808080)
_STEPS = (
    (_U(0x0F0F0F0F0F0F0F0F), _U(2561), _U(8)),
    (_U(0x00FF00FF00FF00FF), _U(6553601), _U(16)),
    (_U(0x0000FFFF0000FFFF), _U(42949672960001), _U(32)),
)
_TENS = 10.0 ** np.arange(23)
_EXACT_DIGITS = 15
_LONGEST_NUMBER = 40
_NUMBER_BYTES = np.zeros(256, bool)
_NUMBER_BYTES[list(b"0123456789+-.eEnNaAiIfFtTyY\0")] = True


@dataclass(frozen=True, eq=False)
class Text:
    """Lines back to back, each ended by a newline, with room around them.

    Attributes:
      data: uint8, `PAD` included.
      words: uint64, one for each byte but the last seven: eight bytes from it, little-endian.
      count: how many lines there are.
    """

    data: np.ndarray
    words: np.ndarray
    count: int

    @staticmethod
    def of(lines: Sequence[bytes]) -> Text:
        """Copies lines, which hold no newline, into one buffer."""
        data = np.frombuffer(b"\n".join((PAD[:-1], *lines, PAD)), np.uint8)
        words = np.ndarray((data.size - 7,), "<u8", data, strides=(1,))
        return Text(data, words, len(lines))

    def slice(self, start: int, end: int) -> bytes:
        """Bytes start … end−1 of the buffer."""
        return self.data[start:end].tobytes()


@dataclass(frozen=True, eq=False)
class Tokens:
    """What stands between separators, in the order of the text.

    Attributes:
      starts, ends: int64: the bytes of each token; one may be empty.
      closers: uint8: the separator after each.
      dots: int64: where the token's only "." is; −1 if it has none, −2 if several.
      counts: int64, one for each line: how many tokens it has.
      strange: int64: lines with a control character that is no blank.
    """

    starts: np.ndarray
    ends: np.ndarray
    closers: np.ndarray
    dots: np.ndarray
    counts: np.ndarray
    strange: np.ndarray

    def take(self, which: np.ndarray | slice) -> Tokens:
        """Some of the tokens; the counts stay those of all."""
        arrays = (array[which] for array in (self.starts, self.ends, self.closers, self.dots))
        return Tokens(*arrays, self.counts, self.strange)


def blank_or(byte: int, data: np.ndarray) -> np.ndarray:
    """Marks the separators of libsvm and its kin: blanks, control characters, and one more."""
    return (data <= SPACE) | (data == byte)


def exactly(byte: int, data: np.ndarray) -> np.ndarray:
    """Marks the separators of a delimited file: one byte, and the line's end."""
    return (data == byte) | (data == NEWLINE)


def split(text: Text, separators: np.ndarray, *, merge: bool) -> Tokens:
    """Cuts the lines of `text` into tokens.

    Args:
      text: the lines.
      separators: bool, one for each byte of `text.data`; the newlines are among them.
      merge: whether blanks in a row are one separator, and those at a line's ends none.
    """
    data, first = text.data, _MARGIN - 1
    last = data.size - _MARGIN
    inner = data[first:last]
    dotted = inner == DOT
    marks = np.flatnonzero(separators[first:last] | dotted)
    kinds = inner[marks]
    marks += first
    if dotted.any():
        cuts = np.flatnonzero(kinds != DOT)
        inside = np.diff(cuts) - 1
        dots = np.where(inside == 1, marks[cuts[1:] - 1], np.where(inside == 0, -1, -2))
        marks, kinds = marks[cuts], kinds[cuts]
    else:
        dots = np.broadcast_to(np.int64(-1), marks.size - 1)
    starts, ends, closers = marks[:-1] + 1, marks[1:], kinds[1:]
    line_ends = np.flatnonzero(kinds == NEWLINE)
    # One comparison finds the control characters: below tab, or between return and space.
    controls = np.flatnonzero((kinds - _TAB > _RETURN - _TAB) & (kinds < SPACE))
    strange = np.searchsorted(line_ends, controls) - 1
    counts = np.diff(line_ends)
    if merge:
        blank = kinds <= SPACE
        kept = (ends > starts) | ~(blank[:-1] & blank[1:])
        if not kept.all():
            counts = np.diff(np.concatenate(([0], np.cumsum(kept)))[line_ends])
            starts, ends, closers, dots = starts[kept], ends[kept], closers[kept], dots[kept]
    return Tokens(starts, ends, closers, dots, counts, strange)


def parse_digits(text: Text, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers of one to eighteen digits without a sign.

    Returns:
      int64 values, and bool: whether the token is such a number. Where it is not, the value
      says nothing.
    """
    lengths = ends - starts
    longest = int(lengths.max(initial=0))
    if longest <= 2:
        return _two_digits(text, ends, lengths, longest)
    values, right = _eight_digits(text, ends, np.minimum(lengths, 8) if longest > 8 else lengths)
    if longest > 8:
        values = values.view(np.int64)
        for done, scale in ((8, 10**8), (16, 10**16)):
            more = np.flatnonzero(lengths > done)
            if not more.size:
                break
            high, fit = _eight_digits(text, ends[more] - done, np.minimum(lengths[more] - done, 8))
            with np.errstate(over="ignore"):
                values[more] += high.view(np.int64) * scale
            right[more] &= fit
        right &= lengths <= 18
    return values.view(np.int64), right


def _two_digits(
    text: Text, ends: np.ndarray, lengths: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    ones = text.data[ends - 1] - _ZERO
    right = (ones < 10) & (lengths > 0)
    if longest < 2:
        return ones.astype(np.int64), right
    tens = text.data[ends - 2] - _ZERO
    tens[lengths < 2] = 0
    right &= tens < 10
    return (tens * _TEN + ones).astype(np.int64), right


def _eight_digits(
    text: Text, ends: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    word = text.words[ends - 8]
    word ^= _ZEROS
    # What stands before the token is shifted out and comes back as leading zeros; an empty
    # token would need a shift by 64 bits, which is undefined.
    shift = ((8 - lengths) << 3).astype(_U)
    right = lengths > 0
    if not right.all():
        shift[~right] = 0
    word >>= shift
    word <<= shift
    right &= (((word + _CARRY) | word) & _HIGH) == 0
    for mask, factor, down in _STEPS:
        word &= mask
        word *= factor
        word >>= down
    return word, right


def parse_numbers(text: Text, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Numbers as Python's `float` reads them.

    Returns:
      float64 values, and bool: whether the token is a number. NaN and infinities are; "1_0"
      and texts of more than 40 bytes are not.
    """
    starts, ends, dots = tokens.starts, tokens.ends, tokens.dots
    if not starts.size:
        return np.empty(0), np.empty(0, bool)
    firsts = text.data[starts]
    negative = firsts == ord("-")
    signed = negative | (firsts == ord("+"))
    any_sign = bool(signed.any())
    if any_sign:
        # The token that is a sign alone becomes an empty one, which is no number.
        starts = starts + (signed & (ends > starts))
    whole = dots == -1
    if whole.all():
        digits, right = parse_digits(text, starts, ends)
        right &= ends - starts <= _EXACT_DIGITS
        values = digits.astype(np.float64)
    else:
        values, right = _decimals(text, starts, ends, dots)
    if any_sign:
        np.negative(values, out=values, where=negative)
    if not right.all():
        odd = np.flatnonzero(~right)
        values[odd], right[odd] = _any_numbers(text, tokens.starts[odd], tokens.ends[odd])
    return values, right


def _decimals(
    text: Text, starts: np.ndarray, ends: np.ndarray, dots: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    point = np.where(dots >= 0, dots, ends)
    whole, right = parse_digits(text, starts, point)
    right |= starts == point
    behind = np.minimum(point + 1, ends)
    fraction, fits = parse_digits(text, behind, ends)
    right &= fits | (behind == ends)
    length = ends - behind
    digits = (point - starts) + length
    right &= (digits > 0) & (digits <= _EXACT_DIGITS) & (dots != -2)
    # An empty part says nothing, so it must not be added.
    whole = np.where(starts == point, 0, whole)
    fraction = np.where(length == 0, 0, fraction)
    power = _TENS[np.minimum(length, _EXACT_DIGITS)]
    return (whole * power + fraction) / power, right


def _any_numbers(text: Text, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The way for exponents, long numbers, nan and inf: a few hundred ns each."""
    lengths = ends - starts
    width = int(min(lengths.max(initial=1), _LONGEST_NUMBER))
    places = np.arange(max(width, 1))
    letters = text.data[np.minimum(starts[:, None] + places, text.data.size - 1)]
    letters = np.where(places < lengths[:, None], letters, 0).astype(np.uint8)
    right = (lengths > 0) & (lengths <= _LONGEST_NUMBER) & _NUMBER_BYTES[letters].all(axis=1)
    values = np.zeros(starts.size)
    words = np.ascontiguousarray(letters).view(f"S{letters.shape[1]}")[:, 0]
    try:
        values[right] = words[right].astype(np.float64)
    except ValueError:
        for place in np.flatnonzero(right):
            try:
                values[place] = float(words[place])
            except ValueError:
                right[place] = False
    return values, right
