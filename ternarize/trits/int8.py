"""int8, for weights that three levels would harm too much (formats/int8.md): a byte a weight,
-127..127, with a scale per group."""

import torch
from torch import Tensor

from ternarize.errors import WeightError, damaged
from ternarize.trits.scales import scale_values, store_scales, to_float
from ternarize.trits.ternary import largest_of_groups, scaled, split_groups

INT8 = "int8"  # name of the codec
INT8_GROUP_SIZE = -1  # finer groups take more room, and gain nothing that perplexity shows
_PIECE = 1 << 22  # weights


def encode_int8(weight: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each group to 255 equal steps.

        scale = max |w| / 127, rounded once to `dtype`        q = clip(round(w / scale), -127, 127)

    weight      (..., rows, cols) float, finite
    group_size  as in `Ternary`
    dtype       of the scales, float16 or float32, which must hold them

    Returns q int8 in the weight's shape, computed in float64 and rounded to nearest even, and
    scales (..., rows, groups), for group_size 0 (..., 1, 1). Where a scale is 0 in `dtype`, q is 0.
    """
    cols = weight.shape[-1]
    groups = split_groups(weight.to(torch.float64), group_size)
    largest = to_float(int8_scales(weight, group_size), dtype)
    step = largest.to(torch.float64).unsqueeze(-1)
    q = (groups / torch.where(step == 0, torch.inf, step)).round().clamp(-127, 127)
    q = q.flatten(-2)[..., :cols].to(torch.int8)
    used = split_groups(q, group_size).ne(0).any(-1)
    if group_size == 0:
        used = used.any(-2, keepdim=True)
    return q.contiguous(), torch.where(used, largest, 0)


def rows_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in int8 with a scale for each row, as a conversion stores it: q and scales.

    A piece at a time, because it is worked out in float64. Raises WeightError as `int8_dtype`.
    """
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    pieces = [weight[first : first + rows] for first in range(0, len(weight), rows)]
    dtype = torch.float16
    for piece in pieces:
        dtype = torch.promote_types(dtype, int8_dtype(piece, INT8_GROUP_SIZE))
    parts = [encode_int8(piece, INT8_GROUP_SIZE, dtype) for piece in pieces]
    return torch.cat([q for q, _ in parts]), torch.cat([scales for _, scales in parts])


def int8_dtype(weight: Tensor, group_size: int) -> torch.dtype:
    """The dtype that holds the scales of a weight: float16, else float32; see `store_scales`.

    Raises WeightError where a weight is not finite.
    """
    scales = int8_scales(weight, group_size)
    if not bool(scales.isfinite().all()):
        raise WeightError("int8", "has weights that are not finite", remedy="Repair the source")
    return store_scales(scales).dtype


def int8_scales(weight: Tensor, group_size: int) -> Tensor:
    """max |w| / 127 of each group, float64; shapes as in `encode_int8`."""
    return largest_of_groups(weight.abs().to(torch.float64), group_size) / 127


def dequantize_int8(q: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Dense weight = scale * q, computed in float32 and rounded to `dtype`.

    q       (rows, cols) int8
    scales  (scale_rows, groups) float16 or float32; scale_rows as in `scaled`

    Returns (rows, cols).
    """
    return scaled(q, scale_values(scales), group_size).to(dtype)


def int8_used(q: Tensor, group_size: int) -> Tensor:
    """Check int8 weights; returns (..., groups) bool: whether a group has one other than zero.

    Raises FormatError on -128, which no encoder writes.
    """
    bad = q == -128
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise damaged(f"byte {at}", "-128 is no weight of codec int8", "-127..127")
    return split_groups(q, group_size).ne(0).any(-1)
