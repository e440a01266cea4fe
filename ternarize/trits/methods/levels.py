"""Weights that are ternary already: recognised, and represented without loss."""

import torch
from torch import Tensor

from ternarize.native import lib
from ternarize.trits.methods.grouped import run_native
from ternarize.trits.ternary import (
    NATIVE_DTYPES,
    Ternary,
    check_group_size,
    largest_of_groups,
    split_groups,
)


def levels(weight: Tensor, group_size: int) -> Ternary | None:
    """The exact ternary form of a weight that has one, else None.

        every group: all non-zero |w| are equal      trit = sign(w)      scale = that |w|

    weight      (rows, cols) or (experts, rows, cols), any float dtype
    group_size  as in `absmean`

    Models trained in ternary (BitNet b1.58, TriLM, ...) are stored like this. What is returned
    dequantizes to `weight` exactly (-0.0 counts as 0). An ordinary matrix is told from its first
    groups. NaN and infinity are not ternary: None.
    """
    check_group_size(group_size)
    weight = weight.detach()
    if lib is not None and weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES:
        result, answers = run_native(lib.levels, weight, group_size)
        return result if all(answer == 1 for answer in answers) else None
    magnitude = weight.abs().to(torch.float64)
    groups = split_groups(magnitude, group_size)
    scales = largest_of_groups(magnitude, group_size)
    equal = (groups == scales.unsqueeze(-1)) | (groups == 0)
    if not bool(equal.all()) or not bool(weight.isfinite().all()):
        return None
    return Ternary(weight.sign().to(torch.int8), scales, group_size)
