"""Iterative ternary fitting: threshold and scale improved in turn until neither moves."""

from collections.abc import Callable

import torch
from torch import Tensor

from ternarize.trits.methods.grouped import above, ternarize_groups
from ternarize.trits.methods.twn import least_squares_scale, twn_rule
from ternarize.trits.scales import rounded_scales
from ternarize.trits.ternary import Ternary, spread_scales

MAX_ROUNDS = 100  # each round lowers the error; groups of 128 settle in about ten


def itf(weight: Tensor, group_size: int) -> Ternary:
    """Ternarize each group at the optimum of alternating threshold and scale, starting from `twn`.

        trit  = sign(w) where |w| > scale / 2, else 0    (nearest level for a fixed scale)
        scale = mean of |w| over the non-zero trits      (least squares for fixed trits)

    Neither step can raise sum (w - scale trit)^2, so the error is never above that of `twn`; it
    ends where the trits no longer change. On Gaussian weights in groups of 128 its error is within
    0.02 % of the global optimum (found by sorting the magnitudes).

    Arguments, result and errors as in `absmean`.

    The alternation is Lloyd's (https://doi.org/10.1109/TIT.1982.1056489) with levels -s, 0, +s; as
    ITF, with a mean, in PT2-LLM: https://arxiv.org/abs/2510.03267
    """
    return ternarize_groups("itf", _itf_rule, weight, group_size)


def with_scale_bits(bits: int) -> Callable[[Tensor, int], Ternary]:
    """`itf` for scales that are stored in 8 or 6 bits: its trits are the nearest to those.

        scale = that of `itf`, as it is stored
        trit  = sign(w) where |w| > scale / 2, else 0

    Of Gaussian weights that makes up for more than a third of the error that rounding adds. A scale
    that such bits cannot hold stays as it is. For 16 bits it is `itf`.
    """
    if bits == 16:
        return itf

    def method(weight: Tensor, group_size: int) -> Ternary:
        scales = rounded_scales(itf(weight, group_size).scales, bits)
        # half of a scale of 8 bits is a number of every dtype of weights
        half = (scales / 2).to(weight.dtype)
        border = spread_scales(half, weight.shape[-1], group_size)
        trits = (weight > border).to(torch.int8) - (weight < -border).to(torch.int8)
        return Ternary(trits, scales, group_size)

    return method


def _itf_rule(magnitude: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    scale, mask = twn_rule(magnitude, size)
    for _ in range(MAX_ROUNDS):
        better = above(magnitude, scale / 2)
        if bool((better == mask).all()):
            break
        # a group that has settled gives the same mask and the same scale again
        mask, scale = better, least_squares_scale(magnitude, better)
    return scale, mask
