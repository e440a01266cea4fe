"""A share of zeros of one's own: the smallest weights of each group, and the scale that fits."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ternarize.trits.methods.grouped import above, ternarize_groups
from ternarize.trits.methods.twn import least_squares_scale
from ternarize.trits.ternary import Ternary


def with_zeros(share: float) -> Callable[[Tensor, int], Ternary]:
    """The method that makes this share of each group zero, to within one weight.

        trit  = 0 for the round(share n) smallest |w| of the n weights of a group, else sign(w)
        scale = mean of |w| over the non-zero trits      (least squares for fixed trits)

    share  0 to below 1; one weight of a group is left at least. Of equal magnitudes at the border
           all are zero.

    Arguments, result and errors of the method are those of `absmean`. For fixed n these are the
    trits of the least squared error with so many zeros: (|w| - s)^2 - w^2 falls with |w|.
    """
    return lambda weight, group_size: ternarize_groups(
        "zeros", partial(_smallest_rule, share), weight, group_size
    )


def _smallest_rule(share: float, magnitude: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    flat = magnitude.flatten(1)
    length = flat.shape[1]
    if not flat.numel():
        return flat.new_zeros(len(flat)), magnitude > 0
    # the last group of a row may be shorter: what fills it up is zero, and comes first
    zeros = (size * share).round().to(torch.int64).minimum(size - 1) + length - size
    ordered = flat.sort(1).values
    border = ordered.gather(1, (zeros - 1).clamp(min=0)[:, None])[:, 0]
    mask = above(magnitude, torch.where(zeros > 0, border, -1.0))
    return least_squares_scale(magnitude, mask), mask
