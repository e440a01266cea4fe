"""The optimizer of a training."""

from typing import Any

import torch


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW for groups of parameters with rates of their own."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
