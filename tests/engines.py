"""Runs part of a test on the compiled core, or on torch alone, in one process.

    with engine("torch"):
        ...

Both must give the same bytes and the same numbers, so tests take the engine as a parameter.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ternarize.native import lib

ENGINES = ("native", "torch")

# the modules that look for the compiled core, each under its own name `lib`
_MODULES = [
    importlib.import_module(f"ternarize.{name}")
    for name in (
        "trits.base3",
        "trits.methods.grouped",
        "trits.methods.levels",
        "trits.planes",
        "files.stored",
    )
]


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Use one engine inside; skips the test if it is the compiled core and that was not built."""
    if name == "native" and lib is None:
        pytest.skip("without the compiled core")
    before = [vars(module)["lib"] for module in _MODULES]
    for module in _MODULES:
        vars(module)["lib"] = lib if name == "native" else None
    try:
        yield
    finally:
        for module, old in zip(_MODULES, before, strict=True):
            vars(module)["lib"] = old
