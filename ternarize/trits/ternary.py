"""A ternary matrix in memory: trits, their scales, and how weights are grouped.

A group is a run of weights along the input dimension (`cols`) that share one scale:

    group_size = N > 0   N consecutive weights of a row (the last group of a row may be shorter)
    group_size = -1      one group per row
    group_size = 0       one scale for the whole matrix (BitNet b1.58's own rule)

A matrix is (rows, cols) = (out_features, in_features); fused experts are (experts, rows, cols),
a stack of matrices with the same grouping.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ternarize.errors import UsageError, first_line

# what the native code calls dtypes of weights
NATIVE_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def group_length(cols: int, group_size: int) -> int:
    """Weights of a full group of a row with `cols` columns (at least 1, so that it can divide)."""
    return max(1, cols if group_size <= 0 else min(group_size, cols))


def group_count(cols: int, group_size: int) -> int:
    """Groups of a row with `cols` columns."""
    return -(-cols // group_length(cols, group_size))


def check_group_size(group_size: int) -> int:
    """Return `group_size`; raises UsageError unless it is -1, 0 or positive."""
    if not -1 <= group_size < 2**63:
        raise UsageError(
            "group size",
            f"{group_size}",
            "a positive number of weights, -1 (one group per row) or 0 (one scale per tensor)",
            "Use --group-size 128 if in doubt",
        )
    return group_size


def check_device(name: str | None) -> str:
    """A device that is there, "cpu" for None; raises UsageError."""
    name = "cpu" if name is None else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "device",
            f"{name!r} cannot be used here ({first_line(error)})",
            "one such as cpu or cuda",
        ) from None
    return name


def split_groups(values: Tensor, group_size: int) -> Tensor:
    """View (..., cols) as (..., groups, length), the last group padded with zeros."""
    cols = values.shape[-1]
    length = group_length(cols, group_size)
    missing = group_count(cols, group_size) * length - cols
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return torch.unflatten(values, -1, (group_count(cols, group_size), length))


def group_sums(values: Tensor, group_size: int) -> Tensor:
    """Sums of the groups of (..., cols): (..., groups)."""
    return split_groups(values, group_size).sum(-1)


def largest_of_groups(magnitude: Tensor, group_size: int) -> Tensor:
    """The largest of each group of (..., rows, cols): (..., rows, groups), or (..., 1, 1)."""
    groups = split_groups(magnitude, group_size)
    largest = groups.amax(-1) if magnitude.numel() else groups.new_zeros(groups.shape[:-1])
    if group_size == 0:
        largest = torch.nn.functional.pad(largest, (0, 0, 0, 1)).amax(-2, keepdim=True)
    return largest


def spread_scales(scales: Tensor, cols: int, group_size: int) -> Tensor:
    """The scale of each weight: (..., rows or 1, groups) -> (..., rows or 1, cols)."""
    return scales.repeat_interleave(group_length(cols, group_size), -1)[..., :cols]


def scaled(values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Each value times the scale of its group, in the dtype of the scales.

    values  (..., rows, cols)
    scales  (..., scale_rows, groups) float; scale_rows divides rows, and each serves
            rows / scale_rows consecutive rows (1: one scale per tensor; rows: the usual case; in
            between: matrices with a scale each that a model fuses into one)
    """
    rows, cols = values.shape[-2:]
    if scales.shape[-2] not in (1, rows):
        scales = scales.repeat_interleave(rows // max(1, scales.shape[-2]), -2)
    groups = split_groups(values, group_size).to(scales.dtype)
    return (groups * scales.unsqueeze(-1)).flatten(-2)[..., :cols]


@dataclass(frozen=True)
class Ternary:
    """weight = scale * trit.

    trits       (rows, cols) or (experts, rows, cols) int8, values -1, 0, +1
    scales      (..., rows, groups) float64, for group_size 0 (..., 1, 1); finite, >= 0, and 0
                exactly when all trits of the group are 0. float64, because a scale is rounded
                only once, to the dtype in which it is stored.
    group_size  see the module's docstring
    """

    trits: Tensor
    scales: Tensor
    group_size: int

    @property
    def sparsity(self) -> float:
        """Share of zero trits."""
        return 1.0 - float(self.trits.count_nonzero()) / max(1, self.trits.numel())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * trit as a dense matrix of `dtype`, computed in float64.

        float32 is rounded to once; a 16-bit dtype as torch does it, through float32, which makes no
        difference for scales as they are stored.
        """
        return scaled(self.trits, self.scales.to(torch.float64), self.group_size).to(dtype)
