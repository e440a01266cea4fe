"""int4, for heads and embeddings, of which small models mostly consist (formats/int4.md): two
weights in a byte, -8..7, with a scale per group that may be negative."""

import torch
from torch import Tensor

from ternarize.errors import WeightError, damaged
from ternarize.trits.scales import scale_values, store_scales, to_float
from ternarize.trits.ternary import group_count, group_length, scaled, split_groups

INT4 = "int4"  # name of the codec
INT4_GROUP_SIZE = 32  # 4.5 bits a weight; 64 saves a quarter of a bit for half as much error again
_STEPS = [6 + i / 4 for i in range(13)]  # in how many the largest weight of a group may be cut
_ZERO = 8  # the code of 0


def int4_width(cols: int, group_size: int) -> int:
    """Bytes of a packed row: each group is filled up to whole bytes."""
    length = group_length(cols, group_size)
    return cols // length * -(-length // 2) + -(-(cols % length) // 2)


def encode_int4(weight: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each group to the sixteen multiples -8..7 of its scale.

        scale = `int4_scales`, rounded once to `dtype`        q = clip(round(w / scale), -8, 7)

    weight      (..., rows, cols) float, finite, worked on in float32
    group_size  as in `Ternary`
    dtype       of the scales, float16 or float32, which must hold them (`int4_dtype`)

    Returns q int8 in the weight's shape (`pack_int4` packs it), rounded to nearest even, and scales
    (..., rows, groups), for group_size 0 (..., 1, 1). Where all q of a scale are 0, it is 0.
    """
    cols = weight.shape[-1]
    scales = to_float(int4_scales(weight, group_size), dtype)
    step = scales.to(torch.float32).unsqueeze(-1)
    groups = split_groups(weight.to(torch.float32), group_size)
    q = groups.div(torch.where(step == 0, torch.inf, step)).round_().clamp_(-8, 7)
    q = q.flatten(-2)[..., :cols].to(torch.int8).contiguous()
    used = split_groups(q, group_size).ne(0).any(-1)
    if group_size == 0:
        used = used.any(-2, keepdim=True)
    return q, torch.where(used, scales, 0)


def int4_scales(weight: Tensor, group_size: int) -> Tensor:
    """The scale of each group, float64; shapes as in `encode_int4`.

    scale = -m / d, with m the weight of the largest magnitude, so that it lies on the side of -8,
    and the d of 6, 6.25, ... 9 that makes the sum of squared errors least (the first of several).
    Above 8 the largest weight is cut off, for smaller steps between the others.

    The sums are of float32 numbers in a fixed order, so that every machine chooses the same.
    Raises WeightError where a weight is not finite.
    """
    if group_size == 0:
        *stack, rows, cols = weight.shape
        if not rows:
            return torch.zeros(*stack, 1, 1, dtype=torch.float64, device=weight.device)
        return int4_scales(weight.reshape(*stack, 1, rows * cols), -1)
    groups = split_groups(weight.to(torch.float32), group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    most = torch.where(high > -low, -high, -low)
    if not bool(most.isfinite().all()):
        raise WeightError(INT4, "has weights that are not finite", remedy="Repair the source")
    unit = groups / torch.where(most == 0, 1, most)  # -1..1, whatever the size of the weights
    least = torch.full_like(most, torch.inf)
    chosen = torch.ones_like(most)
    for steps in _STEPS:
        exact = unit * steps
        off = exact.round().clamp_(-8, 7).sub_(exact)
        error = _sum(off.mul_(off)) / (steps * steps)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, steps, chosen)
    return (most.to(torch.float64) / chosen).squeeze(-1)


def _sum(values: Tensor) -> Tensor:
    """(..., n) -> (..., 1): halves are added to halves."""
    size = 1 << max(0, values.shape[-1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, size - values.shape[-1]))
    while size > 1:
        size //= 2
        values = values[..., :size] + values[..., size:]
    return values


def int4_dtype(weight: Tensor, group_size: int) -> torch.dtype:
    """The dtype that holds the scales of a weight: float16, else float32; see `store_scales`.

    Raises WeightError as `int4_scales`.
    """
    return store_scales(int4_scales(weight, group_size).abs()).dtype


def pack_int4(q: Tensor, group_size: int) -> Tensor:
    """(..., cols) int8, -8..7 -> (..., width) uint8: codes q + 8, the first in the lower half."""
    cols = q.shape[-1]
    groups = split_groups(q, group_size)
    codes = torch.nn.functional.pad(groups, (0, groups.shape[-1] % 2)).add_(_ZERO)
    pairs = torch.unflatten(codes.view(torch.uint8), -1, (-1, 2))
    packed: Tensor = (pairs[..., 0] | pairs[..., 1] << 4).flatten(-2)
    return packed[..., : int4_width(cols, group_size)].contiguous()


def unpack_int4(packed: Tensor, cols: int, group_size: int) -> Tensor:
    """The inverse of `pack_int4`: (..., width) uint8 -> (..., cols) int8, whatever fills it up."""
    groups = _opened(packed, cols, group_size)[..., : group_length(cols, group_size)]
    return groups.flatten(-2)[..., :cols].contiguous()


def _opened(packed: Tensor, cols: int, group_size: int) -> Tensor:
    """The groups of packed rows, all of the same even length: (..., groups, length) int8."""
    groups, size = group_count(cols, group_size), -(-group_length(cols, group_size) // 2)
    padding = groups * size - packed.shape[-1]
    full = torch.nn.functional.pad(packed, (0, padding), value=_ZERO | _ZERO << 4)
    split = torch.unflatten(full, -1, (groups, size))
    return torch.stack([split & 15, split >> 4], -1).flatten(-2).view(torch.int8).sub_(_ZERO)


def dequantize_int4(
    packed: Tensor, scales: Tensor, cols: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Dense weight = scale * q, computed in float32 and rounded to `dtype`; 0 is +0.

    packed  (rows, width) uint8
    scales  (scale_rows, groups) float16 or float32; scale_rows as in `scaled`

    Returns (rows, cols).
    """
    q = unpack_int4(packed, cols, group_size)
    return scaled(q, scale_values(scales), group_size).add_(0.0).to(dtype)  # 0 of negative scales


def int4_used(packed: Tensor, cols: int, group_size: int) -> Tensor:
    """Check packed rows; returns (..., groups) bool: whether a group has a weight other than zero.

    Raises FormatError where what fills a group up is not the code of 0.
    """
    opened, length = _opened(packed, cols, group_size), group_length(cols, group_size)
    used = opened.ne(0)
    filling = torch.ones(opened.shape[-2:], dtype=torch.bool)
    filling[:, :length] = False
    filling[-1, cols - (len(filling) - 1) * length :] = True
    if bool(filling.any()):
        bad = used & filling.to(used.device)
        if bool(bad.any()):
            *row, group, at = bad.nonzero()[0].tolist()
            place = [*row, group * (opened.shape[-1] // 2) + at // 2]
            raise damaged(f"byte at {place}", "a group is filled up with other than 0", "code 8")
    return used.any(-1)
