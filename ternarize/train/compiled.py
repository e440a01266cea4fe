"""Blocks compiled by torch: what norms, roundings and activations do to memory, in fewer passes.

Where 16-bit products are fast, most of a step is what stands between them: each such operation
reads and writes tensors of the size of activations or weights. `torch.compile` makes one loop of
several: Ansel et al. 2024, https://doi.org/10.1145/3620665.3640366. Blocks are compiled and not the
whole model: those of one kind share what was compiled for the first of them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ternarize.errors import UsageError, first_line
from ternarize.train.recompute import without_cache

KINDS = 64  # of blocks, shapes and modes (trained, looked at) that are compiled apart


def compile_blocks(models: Sequence[Any], paths: Sequence[str], device: str) -> None:
    """Compile the repeated blocks of models, in place: equal results within rounding.

    paths  of the blocks

    Raises UsageError for a model without any, and where nothing can be compiled for the device.
    """
    if not paths:
        raise UsageError(
            "--compile",
            f"{type(models[0]).__name__} has no repeated blocks",
            "a list of them (nn.ModuleList), which are compiled",
            "Leave it out",
        )
    _try(device)
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(KINDS, limits.recompile_limit)
    for model in models:
        without_cache(model)  # each layer would have one of its own, and so its own graph
        for path in paths:
            model.get_submodule(path).compile()


def _try(device: str) -> None:
    """Compile and run something small; a compiler that is missing ends the command here."""

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    try:
        torch.compile(doubled, fullgraph=True)(torch.ones(64, device=device))
    except Exception as error:  # whatever a compiler, its driver or its cache on disk raises
        raise UsageError(
            "--compile",
            f"torch cannot compile for {device}: {first_line(error)}",
            "a C++ compiler on a CPU, Triton on a GPU",
            "Install it, or leave --compile out",
        ) from error
