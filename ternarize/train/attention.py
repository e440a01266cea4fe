"""Attention of narrow heads in float32, on a processor whose other products are in 16 bits.

What torch has for 16 bits on CPUs takes two to four times as long in its backward as float32 where
heads have 32 numbers; with 64 both are alike, with more 16 bits are faster (figures:
benchmarks/results/training.md).
"""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

NARROW_HEAD = 32  # the widest heads that are faster in float32
SDPA, NAME = "sdpa", "ternarize_wide_sdpa"  # of torch's attention, and of this one


def widen_attention(model: nn.Module) -> None:
    """Let a model of transformers attend in float32 where its heads are narrow, in place.

    Attention that finds its function by transformers' registry alone; any other stays as it is.
    """
    transformers.AttentionInterface.register(NAME, _attend)
    told: dict[int, Any] = {}  # one for all layers: compiled, they are alike
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        attends = hasattr(module, "scaling") and hasattr(module, "is_causal")
        if not attends or getattr(config, "_attn_implementation", None) != SDPA:
            continue
        if id(config) not in told and not config.sub_configs:  # which would be told as well
            # masks are made by the model's own, as for torch's attention
            told[id(config)] = copy.copy(config)
            told[id(config)]._attn_implementation = NAME
        module.config = told.get(id(config), config)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' "sdpa" has it, of (batch, heads, length, n)."""
    registry: Any = transformers.AttentionInterface  # without annotations
    plain = registry()[SDPA]
    if query.shape[-1] > NARROW_HEAD:
        found: tuple[Tensor, Tensor | None]
        found = plain(module, query, key, value, attention_mask, **options)
        return found
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    # where positions were turned in float32, queries and keys still are: autocast narrows them
    with torch.autocast(query.device.type, enabled=False):
        wide = (each.float() for each in (query, key, value))
        output, weights = plain(module, *wide, attention_mask, **options)
    return output.to(value.dtype), weights
