"""Export to transformers' own 2-bit BitLinear: one scale per tensor, activations in int8.

With t the trits and s their scales:

    <x>.weight U8 [rows / 4, cols]: byte r has rows r + {0, 1, 2, 3} rows / 4 in bits 0-1, 2-3, 4-5,
    6-7, as t + 1;  <x>.weight_scale [1] = 1 / s
"""

from functools import lru_cache

import torch
from torch import Tensor

from ternarize.publish.export.common import Losses, PackedCheckpoint, carry, carry_or_refit
from ternarize.publish.export.directory import (
    Contents,
    DirectoryItem,
    activations_of,
    directory_items,
    split_modules,
    target_dtype,
)
from ternarize.trits.ggml import two_bits
from ternarize.trits.ternary import Ternary


def bitnet_contents(packed: PackedCheckpoint, losses: Losses) -> Contents:
    """A checkpoint for transformers' `bitnet` quantization with linear_class "bitlinear".

    The layer sums integers in the model's dtype, which overflows float16: such a model is set to
    float32, any other keeps its dtype. Raises CheckpointError where a tensor has more than one
    scale, and where activations are not in int8, which bitnet makes them.
    """
    if activations_of(packed) != "int8":
        losses.general.append("activations in floating point, which bitnet rounds to int8")
    linear, untouched = split_modules(packed, losses)
    for name in linear:
        rows = packed.info(name)[1][0]
        losses.add(f"{rows} rows, no multiple of 4," if rows % 4 else "", name)
        losses.add(carry(packed, name, 0, torch.float32)[1], name)
    losses.stop_unless_allowed(
        packed, "Convert the source with --group-size 0 --activations int8 (and --rotation 0)."
    )

    # the entries of a tensor are made one after the other
    ternary = lru_cache(maxsize=1)(lambda name: carry_or_refit(packed, name, 0, torch.float32))

    def parts(name: str) -> list[DirectoryItem]:
        rows, cols = packed.info(name)[1]

        def weight() -> Tensor:
            codes = (ternary(name).trits + 1).to(torch.uint8)
            return two_bits(codes.view(4, rows // 4, cols), 0)

        def scale() -> Tensor:
            found = ternary(name)
            inverse = (1 / found.scales.clamp(min=2.0**-100)).to(torch.float32).view(1)
            scales = (1 / inverse.to(torch.float64)).view(1, 1)
            used = Ternary(found.trits, scales, 0).dequantize(torch.float64)
            losses.measure(name, packed.dense(name), used)
            return inverse

        return [
            DirectoryItem(name, "U8", (rows // 4, cols), weight),
            DirectoryItem(name + "_scale", "F32", (1,), scale),
        ]

    stay = [name for name in linear if packed.info(name)[1][0] % 4]
    linear = [name for name in linear if name not in stay]
    untouched += [name.removesuffix(".weight") for name in stay]
    dtype = target_dtype(packed, None)
    config = {
        "dtype": "float32" if dtype == torch.float16 else str(dtype)[6:],
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": untouched,
        },
    }
    return directory_items(packed, linear, parts, losses), config
