"""The compiled core, or None.

`lib` is the extension module `ternarize._native` where it was built, else None: the package works
without a compiler, on torch alone: the same bytes, and the same results up to rounding. Set the
environment variable TERNARIZE_NATIVE=0 before the import to go without it (the tests compare both).
"""

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]


def _with_capsules(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the core that is given tensors as DLPack's capsules: the same memory.

    nanobind would ask each tensor for its capsule, by a method that is written in Python, and go
    on as if nothing were wherever that raises: a signal that comes meanwhile would be lost.
    """

    def given(value: Any) -> Any:
        return to_dlpack(value) if isinstance(value, Tensor) else value

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return function(*map(given, args), **{name: given(options[name]) for name in options})

    return call


lib: ModuleType | None = None
if os.environ.get("TERNARIZE_NATIVE", "1") != "0":
    try:
        lib = importlib.import_module("ternarize._native")
    except ModuleNotFoundError:  # built without a compiler
        lib = None
    else:
        for _name, _function in list(vars(lib).items()):
            if "ndarray" in (getattr(_function, "__doc__", None) or ""):
                setattr(lib, _name, _with_capsules(_function))
