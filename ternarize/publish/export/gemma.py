"""Export to transformers' own QuantizedLinear (from 5.11 on): 2 bits, one scale per row.

With t the trits and s their scales:

    <x>.weight U8 [rows, ceil(cols / 4)]: byte c has columns 4 c + {0, 1, 2, 3} from the low bits,
    as t + 2;  <x>.weight_scale F32 [rows, 1] = s;
    <x>.input_activation_scale, <x>.output_activation_scale F32 [] = 0, which is off
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from ternarize.publish.export.common import Losses, PackedCheckpoint, carry, carry_or_refit
from ternarize.publish.export.directory import (
    Contents,
    DirectoryItem,
    directory_items,
    refuse_activations,
    split_modules,
)
from ternarize.trits.ggml import two_bits


def gemma_int2_contents(packed: PackedCheckpoint, losses: Losses) -> Contents:
    """A checkpoint for transformers' `gemma` quantization in 2 bits, of any architecture.

    Exact for rows or tensors that share a scale. Raises CheckpointError for smaller groups, and
    where activations in int8 are on record.
    """
    refuse_activations(packed, losses)
    linear, untouched = split_modules(packed, losses)
    for name in linear:
        losses.add(carry(packed, name, -1, torch.float32)[1], name)
    losses.stop_unless_allowed(
        packed, "Convert the source with --group-size -1 (and --rotation 0, --activations none)."
    )

    # the entries of a tensor are made one after the other
    ternary = lru_cache(maxsize=1)(lambda name: carry_or_refit(packed, name, -1, torch.float32))

    def parts(name: str) -> list[DirectoryItem]:
        rows, cols = packed.info(name)[1]

        def weight() -> Tensor:
            codes = nn.functional.pad((ternary(name).trits + 2).to(torch.uint8), (0, -cols % 4))
            return two_bits(codes.view(rows, -1, 4), -1)

        def scale() -> Tensor:
            losses.measure(name, packed.dense(name), ternary(name).dequantize())
            return ternary(name).scales.to(torch.float32)

        base = name.removesuffix("weight")
        return [
            DirectoryItem(name, "U8", (rows, -(-cols // 4)), weight),
            DirectoryItem(name + "_scale", "F32", (rows, 1), scale),
            DirectoryItem(base + "input_activation_scale", "F32", (), lambda: torch.zeros(())),
            DirectoryItem(base + "output_activation_scale", "F32", (), lambda: torch.zeros(())),
        ]

    config = {
        "quantization_config": {
            "quant_method": "gemma",
            "num_bits": 2,
            "quantize_embeddings": False,
            "modules_to_not_convert": untouched,
        }
    }
    return directory_items(packed, linear, parts, losses), config
