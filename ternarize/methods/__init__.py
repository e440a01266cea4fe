"""Ternarization without data: float weight -> Ternary.

To add a method: a module with one function of the same signature, a line in METHODS, a test, and a
row in README.md.
"""

from collections.abc import Callable

from torch import Tensor

from ternarize.methods.absmean import absmean
from ternarize.methods.itf import itf
from ternarize.methods.levels import levels
from ternarize.methods.twn import twn
from ternarize.tensor import Ternary

METHODS: dict[str, Callable[[Tensor, int], Ternary]] = {"absmean": absmean, "twn": twn, "itf": itf}

__all__ = ["METHODS", "absmean", "itf", "levels", "twn"]
