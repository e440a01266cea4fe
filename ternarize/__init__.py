"""Ternary neural networks: convert a Hugging Face checkpoint, load it, run it.

    model = ternarize.load("directory or Hub id")

After `import ternarize`, transformers' own from_pretrained loads packed checkpoints too. The import
itself is light: torch and transformers are imported by what needs them.

Data goes one way: source -> tensor -> Ternary -> bytes -> packed checkpoint -> a model that runs.
The rooms stand in this order, and a module imports only from those above it:

    errors.py    what can go wrong
    native.py    the compiled core, or none
    threads.py   work in threads that a signal ends in order
    progress.py  how far long work is, for those who watch it
    ranks.py     several processes at one piece of work, and what they tell each other
    trits/       what a trit is: weights -> trits and scales, trits <-> bytes, rotation
    files/       what lies on a disk: containers, records, digests, whole writes
    models/      what transformers says of a model: its skeleton, where tensors go, what it reads
    sources/     where weights come from: folders, the Hub, ternary checkpoints of others
    plans/       the recipe, what becomes of each tensor and why, where each byte will lie
    steps/       journals of steps, which are kept instead of weights
    runtime/     packed weights that run: kernels, modules, loading, generating
    measure/     how good and how fast a model is, and what a packed checkpoint holds
    qat/         latent weights: an ordinary model, trained to be a ternary one
    calibrate/   data -> samples -> statistics, block by block -> better trits
    train/       texts without end -> a whole model trained, its best state kept
    convert/     a checkpoint into a packed one, and the proof that it is one
    publish/     to the Hub, and into files of other engines
    cli/         the command line

Each room's own docstring lists its modules. csrc/ is the compiled core (C++, optional).
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
from ternarize.runtime.load import install_hook, load
from ternarize.version import __version__

if TYPE_CHECKING:
    from ternarize import qat
    from ternarize.convert.module import pack_module
    from ternarize.publish.patches import apply_patch, diff_packed
    from ternarize.runtime.load_module import load_module
    from ternarize.runtime.modules.linear import TernaryLinear
    from ternarize.runtime.plugin.quantizer import TernarizeConfig
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
    "apply_patch",
    "diff_packed",
    "load",
    "load_module",
    "pack_module",
    "qat",
]

_LATER = {
    "TernaryLinear": "runtime.modules.linear",
    "TernarizeConfig": "runtime.plugin.quantizer",
    "Ternary": "trits.ternary",
    "apply_patch": "publish.patches",
    "diff_packed": "publish.patches",
    "load_module": "runtime.load_module",
    "pack_module": "convert.module",
}


def __getattr__(name: str) -> Any:
    if name == "qat":  # a room whose names are called by it
        return importlib.import_module("ternarize.qat")
    if name in _LATER:
        return getattr(importlib.import_module(f"ternarize.{_LATER[name]}"), name)
    raise AttributeError(f"module 'ternarize' has no attribute {name!r}")


install_hook()
