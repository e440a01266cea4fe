"""Ternarization without data: float weight -> Ternary.

To add a method: a module with one function of the same signature, a line in METHODS and in this
list, and what else CONTRIBUTING.md lists.

    grouped.py  what methods share: sums in a fixed order, the way in and out
    absmean.py  the mean magnitude as scale (BitNet b1.58)
    twn.py      a threshold, and the scale that fits best
    itf.py      both in turn, until neither moves; the same for scales of few bits
    shares.py   a share of zeros of one's own
    levels.py   weights that are ternary already
"""

from collections.abc import Callable

from torch import Tensor

from ternarize.trits.methods.absmean import absmean
from ternarize.trits.methods.itf import itf, with_scale_bits
from ternarize.trits.methods.levels import levels
from ternarize.trits.methods.shares import with_zeros
from ternarize.trits.methods.twn import twn
from ternarize.trits.ternary import Ternary

METHODS: dict[str, Callable[[Tensor, int], Ternary]] = {"absmean": absmean, "twn": twn, "itf": itf}

__all__ = ["METHODS", "absmean", "itf", "levels", "twn", "with_scale_bits", "with_zeros"]
