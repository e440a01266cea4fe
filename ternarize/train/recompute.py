"""Activations worked out again: of a block what goes into it is kept for the backward pass alone.

A forward keeps what its backward will need: of each matrix its inputs, and of a latent one the
rounded weight as well. With blocks that run twice, all of that is in memory for one block at a
time. Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost,
https://arxiv.org/abs/1604.06174.

Blocks are found by where they stand, and run twice by torch; transformers' own way asks for models
in training mode, in which they drop out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from ternarize.errors import UsageError


def recompute_blocks(model: Any, paths: Sequence[str]) -> None:
    """Let blocks of a model, in place, run again in the backward pass. Gradients stay the same
    within rounding (what a block uses in several places is added up in another order).

    model  a student, as it computes in the end
    paths  of its repeated blocks

    Raises UsageError for a model without any.
    """
    if not paths:
        raise UsageError(
            "--recompute",
            f"{type(model).__name__} has no repeated blocks",
            "a list of them (nn.ModuleList), which run twice one after the other",
            "Leave it out",
        )
    without_cache(model)  # which would grow each time a block runs
    for path in paths:
        block = model.get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def without_cache(model: Any) -> None:
    """Let a model keep no keys and values, in place: a training reads texts whole."""
    for module in model.modules():
        if hasattr(module, "config"):  # parts of a model may have one of their own
            module.config.use_cache = False
