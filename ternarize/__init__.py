"""Ternary neural networks: convert a Hugging Face checkpoint, load it, run it.

    model = ternarize.load("directory or Hub id")

After `import ternarize`, transformers' own from_pretrained loads packed checkpoints too. The import
itself is light: torch and transformers are imported by what needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ternarize.errors import (
    CheckpointError,
    DigestError,
    FormatError,
    OutputError,
    QualityError,
    SelectionError,
    TernarizeError,
    UsageError,
    WeightError,
)

# The function takes the place of the submodule of the same name: bound here, after the import that
# binds the submodule, it stays (an import of a submodule binds it only the first time).
from ternarize.runtime.load import install_hook, load
from ternarize.version import __version__

if TYPE_CHECKING:
    from ternarize.runtime.linear import TernaryLinear
    from ternarize.runtime.plugin import TernarizeConfig
    from ternarize.trits.ternary import Ternary

__all__ = [
    "CheckpointError",
    "DigestError",
    "FormatError",
    "OutputError",
    "QualityError",
    "SelectionError",
    "TernarizeConfig",
    "TernarizeError",
    "Ternary",
    "TernaryLinear",
    "UsageError",
    "WeightError",
    "__version__",
    "load",
]

_LATER = {
    "TernaryLinear": "runtime.linear",
    "TernarizeConfig": "runtime.plugin",
    "Ternary": "trits.ternary",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"ternarize.{_LATER[name]}"), name)
    raise AttributeError(f"module 'ternarize' has no attribute {name!r}")


install_hook()
