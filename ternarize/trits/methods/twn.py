"""Ternary weight networks: a threshold, and the scale that fits best."""

from torch import Tensor

from ternarize.trits.methods.grouped import above, group_sum, ternarize_groups
from ternarize.trits.ternary import Ternary

THRESHOLD = 0.7  # of mean |w|; the paper's approximation of the optimum, eq. 6


def twn(weight: Tensor, group_size: int) -> Ternary:
    """Ternarize each group by a threshold on its magnitudes, with the least-squares scale.

        threshold = 0.7 mean |w|     trit = sign(w) where |w| > threshold, else 0
        scale     = mean of |w| over the non-zero trits  (minimises sum (w - scale trit)^2)

    Arguments, result and errors as in `absmean`.

    Ternary weight networks, eq. 3-6: https://arxiv.org/abs/1605.04711
    """
    return ternarize_groups("twn", twn_rule, weight, group_size)


def twn_rule(magnitude: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The rule on magnitudes of groups; also the start of `itf`."""
    threshold = THRESHOLD * (group_sum(magnitude) / size.clamp(min=1))
    mask = above(magnitude, threshold)
    return least_squares_scale(magnitude, mask), mask


def least_squares_scale(magnitude: Tensor, mask: Tensor) -> Tensor:
    """argmin over s of sum (|w| - s mask)^2 = mean of |w| where mask; 0 where mask is empty."""
    count = mask.flatten(1).sum(-1)
    return group_sum(magnitude * mask) / count.clamp(min=1)
