"""What a patch says of a tensor: its changes as bytes, small ones where little has changed.

Four codings, by what the tensor is:

    trits    base3: which digits have changed, as gaps between them in Golomb-Rice codes, and how
    halves   int4: (new - old) mod 16 of every half byte, small for small changes of either sign
    words    scales, int8, kept tensors: likewise of the integers of a number's bytes
    bytes    the new bytes

The changes of trits are nearly independent of each other, and so of their entropy already; what
LZMA finds in the others is taken. formats/patch.md is the definition.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternarize.errors import FormatError, damaged
from ternarize.trits.base3 import DIGITS, LARGEST_CODE, POWERS

OF_TRITS, OF_HALVES, OF_WORDS, NEW_BYTES = "trits", "halves", "words", "bytes"
CODINGS = (OF_TRITS, OF_HALVES, OF_WORDS, NEW_BYTES)
BLOCK = 1 << 18  # bytes of base3 whose changes are told together

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
Take = Callable[[int], bytes]  # the next so many bytes of a section, or FormatError

_HEAD = struct.Struct("<IBI")  # of a set: members, bits of a remainder, bits of all quotients
_DIGITS_OF = np.array(
    [[code // power % 3 for power in POWERS] for code in range(256)], dtype=np.uint8
)


def tell_changes(old: Bytes, new: Bytes, coding: str, width: int) -> bytes:
    """What `apply_changes` needs to make `new` of `old`, of the same length.

    width  bytes of a number (coding words)
    """
    if coding == OF_TRITS:
        return _trit_changes(old, new)
    if coding == NEW_BYTES:
        return new.tobytes()
    if coding == OF_HALVES:
        return _in_halves(lambda a, b: _zigzag(b - a & 15, 4) & 15, old, new).tobytes()
    a, b = (each.view(f"<u{width}") for each in (old, new))
    return _zigzag(b - a, 8 * width).tobytes()


def apply_changes(old: Bytes, coding: str, width: int, take: Take) -> Bytes:
    """The bytes that a section makes of a piece of `old`; it begins where a block does.

    Raises FormatError for what no writer writes.
    """
    if coding == OF_TRITS:
        return _changed_trits(old, take)
    told = np.frombuffer(take(len(old)), np.uint8)
    if coding == NEW_BYTES:
        return told
    if coding == OF_HALVES:
        return _in_halves(lambda a, z: a + _unzigzag(z) & 15, old, told)
    a, z = (each.view(f"<u{width}") for each in (old, told))
    new: Bytes = (a + _unzigzag(z)).view(np.uint8)
    return new


def _zigzag(number: NDArray[Any], bits: int) -> NDArray[Any]:
    """0, 1, 2, 3, ... for 0, -1, 1, -2, ... of two's complement, in the same unsigned type."""
    return number << 1 ^ 0 - (number >> (bits - 1))


def _unzigzag(number: NDArray[Any]) -> NDArray[Any]:
    return number >> 1 ^ 0 - (number & 1)


def _in_halves(
    function: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]], a: Bytes, b: Bytes
) -> Bytes:
    """A function of 4-bit numbers, for both halves of bytes."""
    both: NDArray[Any] = function(a & 15, b & 15) | function(a >> 4, b >> 4) << 4
    return both.astype(np.uint8)


def _trit_changes(old: Bytes, new: Bytes) -> bytes:
    """Blocks one behind the other; see formats/patch.md."""
    told = []
    for at in range(0, len(old), BLOCK):
        a, b = old[at : at + BLOCK], new[at : at + BLOCK]
        places = np.flatnonzero(a != b)
        before, after = _DIGITS_OF[a[places]], _DIGITS_OF[b[places]]
        moved = before != after
        digits = (DIGITS * places[:, None] + np.arange(DIGITS))[moved]
        was, now = before[moved], after[moved]
        from_zero = was == 1
        crossing = np.flatnonzero(now[~from_zero] != 1)
        told.append(_put_set(digits, DIGITS * len(a)))
        told.append(np.packbits(now[from_zero] == 2, bitorder="little").tobytes())
        told.append(_put_set(crossing, int((~from_zero).sum())))
    return b"".join(told)


def _changed_trits(old: Bytes, take: Take) -> Bytes:
    if bool((old > LARGEST_CODE).any()):
        raise damaged("base", "a byte of trits is above 242", "codes of base3")
    blocks = [_changed_block(old[at : at + BLOCK], take) for at in range(0, len(old), BLOCK)]
    return np.concatenate(blocks) if blocks else old


def _changed_block(old: Bytes, take: Take) -> Bytes:
    digits = _take_set(take, DIGITS * len(old))
    places, power = digits // DIGITS, np.array(POWERS)[digits % DIGITS]
    was = old[places] // power % 3
    from_zero = was == 1
    now = np.ones(len(digits), np.int64)
    now[from_zero] = 2 * _take_bits(take, int(from_zero.sum()))
    others = np.flatnonzero(~from_zero)
    crossing = others[_take_set(take, len(others))]
    now[crossing] = 2 - was[crossing]
    new = old.astype(np.int64)
    np.add.at(new, places, (now - was) * power)
    return new.astype(np.uint8)


def _put_set(members: Numbers, count: int) -> bytes:
    """Ascending numbers below `count`, as Golomb-Rice codes of the gaps between them."""
    if not len(members):
        return _HEAD.pack(0, 0, 0)
    gaps = np.diff(members, prepend=-1) - 1
    k, size = 0, int(gaps.sum())  # of the quotients; what k does to it has one lowest point
    while (next_size := int((gaps >> (k + 1)).sum())) + len(gaps) < size:
        k, size = k + 1, next_size
    ends = np.cumsum((gaps >> k) + 1) - 1
    quotients = np.zeros(int(ends[-1]) + 1, np.uint8)
    quotients[ends] = 1
    remainders = (gaps[:, None] >> np.arange(k) & 1).astype(np.uint8)
    head = _HEAD.pack(len(gaps), k, len(quotients))
    parts = (np.packbits(each, bitorder="little") for each in (quotients, remainders.ravel()))
    return head + b"".join(part.tobytes() for part in parts)


def _take_set(take: Take, count: int) -> Numbers:
    """The inverse of `_put_set`; sizes are checked before memory is taken for them."""
    size, k, length = _HEAD.unpack(take(_HEAD.size))
    few = size <= count and (k == 0 or (k < 32 and size << k <= 2 * count))
    if not few or (length > 0) != (size > 0) or length > size + (count >> k):
        raise _bad_set(f"{size} of {count} numbers in {length} bits and {k} for each")
    quotients = _take_bits(take, length)
    ends = np.flatnonzero(quotients)
    if len(ends) != size or (size and ends[-1] != length - 1):
        raise _bad_set(f"{len(ends)} of {size} quotients")
    bits = _take_bits(take, size * k).reshape(size, k)
    gaps = np.diff(ends, prepend=-1) - 1 << k
    for place in range(k):
        gaps |= bits[:, place].astype(np.int64) << place
    members = np.cumsum(gaps + 1) - 1
    if size and members[-1] >= count:
        raise _bad_set(f"number {members[-1]} of {count}")
    return members


def _take_bits(take: Take, count: int) -> Bytes:
    """So many bits, least significant first, each in a byte; those that fill up are 0."""
    bits = np.unpackbits(np.frombuffer(take(-(-count // 8)), np.uint8), bitorder="little")
    if bool(bits[count:].any()):
        raise _bad_set("bits that belong to nothing are set")
    return bits[:count]


def _bad_set(found: str) -> FormatError:
    return damaged("changes of trits", found, "a set as its head says")


def blocks_of(nbytes: int, piece: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor's bytes into (offset, size), at ends of blocks and of numbers."""
    step = max(1, piece // BLOCK) * BLOCK
    return ((at, min(step, nbytes - at)) for at in range(0, nbytes, step))
