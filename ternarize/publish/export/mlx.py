"""Export to MLX's affine quantization in 2 bits, groups of 32, 64 or 128.

With t the trits and s their scales:

    <x>.weight U32 [rows, cols / 16]: word c has columns 16 c + {0 .. 15} from the low bits, as
    q = t + 1;  <x>.scales [rows, cols / group] = s;  <x>.biases = -s;  weight = q * scale + bias
"""

from functools import lru_cache

import torch
from torch import Tensor

from ternarize.files.headers import DTYPE_NAMES
from ternarize.publish.export.common import Losses, PackedCheckpoint, carry_or_refit, largest_group
from ternarize.publish.export.directory import (
    Contents,
    DirectoryItem,
    advice,
    directory_items,
    refuse_activations,
    target_dtype,
    words_of_codes,
)

MLX_GROUPS = (128, 64, 32)


def mlx_contents(packed: PackedCheckpoint, losses: Losses, *, dtype: str | None = None) -> Contents:
    """A checkpoint for MLX (mlx-lm), in 2 bits with affine groups.

    dtype  of scales and of kept floating-point tensors, which MLX wants to be the same; None: the
           model's own

    The groups are the largest of 128, 64, 32 that hold every tensor exactly; larger ones are cut,
    each piece with the same scale. Raises CheckpointError for other groups, for scales that `dtype`
    cannot hold, and where activations in int8 are on record.
    """
    refuse_activations(packed, losses)
    target = target_dtype(packed, dtype)
    matrices = _matrices(packed, losses)
    group = largest_group(packed, matrices, MLX_GROUPS, target, losses)
    otherwise = "Convert the source with --group-size 128 --rotation 0."
    losses.stop_unless_allowed(packed, advice(losses, target, otherwise))

    # the entries of a tensor are made one after the other
    ternary = lru_cache(maxsize=1)(lambda name: carry_or_refit(packed, name, group, target))

    def parts(name: str) -> list[DirectoryItem]:
        rows, cols = packed.info(name)[1]
        kind = DTYPE_NAMES[target]
        base = name.removesuffix("weight")

        def weight() -> Tensor:
            return words_of_codes(ternary(name).trits + 1, 2).to(torch.uint32)

        def scales() -> Tensor:
            losses.measure(name, packed.dense(name), ternary(name).dequantize())
            return ternary(name).scales.to(target)

        return [
            DirectoryItem(name, "U32", (rows, cols // 16), weight),
            DirectoryItem(base + "scales", kind, (rows, cols // group), scales),
            DirectoryItem(
                base + "biases",
                kind,
                (rows, cols // group),
                lambda: -ternary(name).scales.to(target),
            ),
        ]

    quantization = {"group_size": group, "bits": 2, "mode": "affine"}
    config = {
        "dtype": str(target)[6:],
        "quantization": quantization,
        "quantization_config": quantization,
    }
    return directory_items(packed, matrices, parts, losses, target), config


def _matrices(packed: PackedCheckpoint, losses: Losses) -> list[str]:
    """The ternary tensors that MLX can hold; of the others it is noted why not."""
    matrices = []
    for name, record in packed.records.items():
        if record.kind != "ternary":
            continue
        assert record.shape is not None
        if record.kernel:
            losses.add("convolutions", name)
        elif len(record.shape) != 2 or record.transposed:
            losses.add("stacks of experts or transposed matrices", name)
        elif record.shape[-1] % min(MLX_GROUPS):
            losses.add("columns that are no multiple of 32", name)
        else:
            matrices.append(name)
    return matrices
