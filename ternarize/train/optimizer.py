"""The optimizers of a training, and what they keep for each weight.

adamw      two moments of the gradient in float32: 8 bytes. https://arxiv.org/abs/1711.05101
adafactor  the second moment of rows and of columns, no first: next to nothing.
           https://arxiv.org/abs/1804.04235
"""

from typing import Any

import torch
from transformers.optimization import Adafactor

BETAS = (0.9, 0.95)


def make_optimizer(groups: list[dict[str, Any]], name: str) -> torch.optim.Optimizer:
    """An optimizer for groups of parameters with rates of their own (`qat.parameter_groups`)."""
    if name == "adafactor":  # rates as they are given, not as it would choose them
        made: Any = Adafactor  # without annotations
        found: torch.optim.Optimizer = made(groups, scale_parameter=False, relative_step=False)
        return found
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)
