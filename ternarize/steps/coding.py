"""Which perturbations a step takes, in as few bits as tell them: integers alone.

Of k perturbations m are taken. The set of them is a number below the binomial coefficient (k m),
its place among all such sets (the combinatorial number system),

    c_1 < ... < c_m   ->   sum over i of binom(c_i, i),

written in as many bits as the largest one needs; then come m signs. Source: Cover 1973, Enumerative
source encoding, https://doi.org/10.1109/TIT.1973.1054929. Small numbers are written as Elias has
them (gamma: 1975, https://doi.org/10.1109/TIT.1975.1055349).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

MOST_ZEROS = 32  # before a number in Elias' code: the largest difference of two steps has 33 bits


class Bits:
    """Bits that are written one behind the other, the highest first."""

    def __init__(self) -> None:
        self._whole, self._open, self._pending = bytearray(), 0, 0

    @property
    def count(self) -> int:
        """Bits that were written."""
        return 8 * len(self._whole) + self._open

    def put(self, value: int, width: int) -> None:
        self._pending, count = self._pending << width | value, self._open + width
        whole, self._open = divmod(count, 8)
        self._whole += (self._pending >> self._open).to_bytes(whole, "big")
        self._pending &= (1 << self._open) - 1

    def put_gamma(self, value: int) -> None:
        """A number from 1 on: as many zeros as it has bits but one, then it."""
        self.put(value, 2 * value.bit_length() - 1)

    def bytes(self) -> bytes:
        """Filled up with zeros to whole bytes."""
        last = bytes([self._pending << (8 - self._open)]) if self._open else b""
        return bytes(self._whole) + last


class BitReader:
    """The bits of some bytes, read from the front; EOFError where there are no more."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bits that were not read yet."""
        return 8 * len(self._data) - self._at

    def take(self, width: int) -> int:
        if width > self.left:
            raise EOFError
        first, self._at = self._at // 8, self._at + width
        value = int.from_bytes(self._data[first : -(-self._at // 8)], "big")
        return value >> -self._at % 8 & ((1 << width) - 1)

    def take_gamma(self) -> int:
        """A number that `put_gamma` has written; ValueError for one of too many bits."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > MOST_ZEROS:
                raise ValueError("a number of more than 33 bits")
        return 1 << zeros | self.take(zeros)


def set_width(k: int, m: int) -> int:
    """Bits of the number of a set of m out of k."""
    return (math.comb(k, m) - 1).bit_length()


def put_choice(bits: Bits, k: int, chosen: Sequence[int], signs: Sequence[int]) -> None:
    """Write which of k perturbations are taken (rising), and how: 1 along, -1 against."""
    m = len(chosen)
    few = _are_few(k, m)
    number = sum(map(math.comb, chosen, range(1, m + 1))) if few else _counted(chosen, k)
    bits.put(number, set_width(k, m))
    for sign in signs:
        bits.put(int(sign < 0), 1)


def take_choice(bits: BitReader, k: int, m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read what `put_choice` has written; ValueError for a number that no set has."""
    number = bits.take(set_width(k, m))
    if number >= math.comb(k, m):
        raise ValueError
    chosen = (_searched if _are_few(k, m) else _walked)(number, k, m)
    signs = tuple(1 - 2 * bits.take(1) for _ in range(m))
    return tuple(reversed(chosen)), signs


def _are_few(k: int, m: int) -> bool:
    """Whether it is sooner to compute each coefficient than to walk through all perturbations."""
    return m * m <= k


def _counted(chosen: Sequence[int], k: int) -> int:
    """The number of a set, each coefficient made of the one before it."""
    number, c, i = 0, k - 1, len(chosen)
    binomial = math.comb(c, i)
    while i:
        taken = c == chosen[i - 1]
        number += binomial * taken
        binomial, i = _below(binomial, c, i, taken)
        c -= 1
    return number


def _walked(number: int, k: int, m: int) -> list[int]:
    """The set of a number, from its last perturbation down."""
    chosen, c, i = list[int](), k - 1, m
    binomial = math.comb(c, i)
    while i:
        taken = binomial <= number
        if taken:
            chosen.append(c)
            number -= binomial
        binomial, i = _below(binomial, c, i, taken)
        c -= 1
    return chosen


def _searched(number: int, k: int, m: int) -> list[int]:
    """As `_walked`: sooner for few of very many, so that a made-up file takes little time."""
    chosen = list[int]()
    for i in range(m, 0, -1):
        k = bisect_right(range(k), number, key=partial(_binomial, i)) - 1
        chosen.append(k)
        number -= math.comb(k, i)
    return chosen


def _binomial(i: int, c: int) -> int:
    return math.comb(c, i)


def _below(binomial: int, c: int, i: int, taken: bool) -> tuple[int, int]:
    """From binom(c, i) to binom(c - 1, i - 1) or binom(c - 1, i), and the lower index."""
    if taken:
        return (binomial * i // c if c else 0), i - 1
    return binomial * (c - i) // c, i
