"""The compiled core, or None.

`lib` is the extension module `ternarize._native` where it was built, else None: the package works
without a compiler, on torch alone: the same bytes, and the same results up to rounding. Set the
environment variable TERNARIZE_NATIVE=0 before the import to go without it (the tests compare both).
"""

import importlib
import os
from types import ModuleType

lib: ModuleType | None = None
if os.environ.get("TERNARIZE_NATIVE", "1") != "0":
    try:
        lib = importlib.import_module("ternarize._native")
    except ModuleNotFoundError:  # built without a compiler
        lib = None
