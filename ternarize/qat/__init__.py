"""Quantization-aware training: an ordinary model, trained to be a ternary one.

    import ternarize.qat as qat

    qat.prepare(model, group_size=128)  # in place
    Trainer(model, ..., callbacks=[qat.Schedule(model, warmup=0.1)]).train()
    qat.pack(model, "packed")           # the very trits and scales of the forward

The room knows what becomes ternary and how; the training is anybody's: transformers' Trainer, TRL,
accelerate, a loop.

    rounding.py  a latent weight read as a ternary one, and its gradients
    modules.py   modules whose weights are latent
    prepare.py   a model's layers made such modules
    schedule.py  what changes during training, and groups of parameters for an optimizer
"""

from typing import Any

from ternarize.qat.prepare import initialize, prepare
from ternarize.qat.schedule import Schedule, end_decay, parameter_groups

__all__ = ["Schedule", "end_decay", "initialize", "pack", "parameter_groups", "prepare"]


def __getattr__(name: str) -> Any:
    if name == "pack":  # from the room of conversions, which stands below this one
        from ternarize.convert.trained import pack_trained

        return pack_trained
    raise AttributeError(f"module 'ternarize.qat' has no attribute {name!r}")
