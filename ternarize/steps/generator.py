"""Random numbers with an address: Philox 4x32-10, and the sparse perturbations made of it.

Every word follows from a seed and where it stands, so that a row of a tensor can be drawn without
the rest. A perturbation has one non-zero in each cell of 2^bits values of one flat index:

    word       = philox(counter = (cell >> 2, perturbation, step, purpose << 24 | cell >> 34))
                 [cell & 3]
    position   = cell 2^bits + (word & (2^bits - 1));    sign = -1 if bit 31 of the word, else 1

Source of the generator: Salmon, Moraes, Dror, Shaw 2011, https://doi.org/10.1145/2063384.2063405.
formats/steps.md, 4, is the definition of what is made of it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

START, TRITS, SCALES = 0, 1, 2  # purposes: the start, and what a step moves
MOST_BITS = 30  # of a cell
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_PIECE = 1 << 20  # words drawn at a time


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words for each counter.

    counter  four of int64, 0 to 2^32 - 1, that can be broadcast
    key      two numbers below 2^32

    Returns four tensors int64 of the common shape.
    """
    device = next((each.device for each in counter if isinstance(each, Tensor)), None)
    parts = [torch.as_tensor(each, dtype=torch.int64, device=device) for each in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*parts)  # type: ignore[no-untyped-call]
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _product(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product, without leaving 63 bits."""
    low, high = (a & 0xFFFF) * factor, (a >> 16) * factor
    carried = (low >> 16) + high
    return carried >> 16, (carried & 0xFFFF) << 16 | low & 0xFFFF


def key_of(seed: int) -> tuple[int, int]:
    """The key of a seed of 64 bits."""
    return seed & _WORD, seed >> 32


def start_trits(seed: int, zeros: int, first: int, count: int) -> Tensor:
    """Trits of a random start: (count,) int8, those from `first` on in the flat index.

    zeros  of 2^31: how many of the values of 31 bits become 0
    """
    made = torch.empty(count, dtype=torch.int8)
    for at in range(0, count, _PIECE):
        stop = min(count, at + _PIECE)
        words = _words(seed, 0, [0], START, first + at, first + stop, "cpu")[0]
        signs = 1 - 2 * (words >> 31)
        made[at:stop] = torch.where((words & 0x7FFFFFFF) < zeros, 0, signs)
    return made


def perturbations(
    seed: int,
    step: int,
    which: Sequence[int] | Tensor,
    purpose: int,
    bits: int,
    first: int,
    stop: int,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The non-zeros of some perturbations of a step within a range of the flat index.

    which        numbers of the perturbations
    first, stop  of the range

    Yields, for some cells at a time, positions (perturbations, cells) int64, counted from `first`,
    and signs of the same shape, int64; a position outside of the range is 0 with the sign 0.
    """
    if stop <= first or not len(which):
        return
    cells, end = first >> bits, ((stop - 1) >> bits) + 1
    several = max(4, _PIECE // len(which))
    for at in range(cells, end, several):
        last = min(end, at + several)
        words = _words(seed, step, which, purpose, at, last, device)
        cell = torch.arange(at, last, device=device)
        positions = (cell << bits) + (words & ((1 << bits) - 1)) - first
        signs = 1 - 2 * (words >> 31)
        inside = (positions >= 0) & (positions < stop - first)
        yield positions.where(inside, 0), signs.where(inside, 0)


def _words(
    seed: int,
    step: int,
    which: Sequence[int] | Tensor,
    purpose: int,
    first: int,
    stop: int,
    device: str | torch.device,
) -> Tensor:
    """The words of cells: (perturbations, stop - first) int64."""
    quads = torch.arange(first >> 2, ((stop - 1) >> 2) + 1, device=device)
    numbers = torch.as_tensor(which, dtype=torch.int64, device=device)[:, None]
    upper = (purpose << 24) + (quads >> 32)
    four = torch.stack(philox((quads & _WORD, numbers, step, upper), key_of(seed)), -1)
    skipped = first - 4 * (first >> 2)
    return four.flatten(1)[:, skipped : skipped + stop - first]
