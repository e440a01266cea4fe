"""The weight quantizer of BitNet b1.58."""

from torch import Tensor

from ternarize.trits.methods.grouped import above, group_sum, ternarize_groups
from ternarize.trits.ternary import Ternary


def absmean(weight: Tensor, group_size: int) -> Ternary:
    """Ternarize each group with its mean magnitude as scale.

        scale = mean |w|        trit = clip(round(w / scale), -1, +1)

    weight      (rows, cols) or (experts, rows, cols), any float dtype
    group_size  weights per scale along cols; -1 one group per row; 0 one scale per matrix, which
                is the paper's own rule

    Returns trits int8 in the weight's shape and scales float64; an all-zero group has scale 0.
    round(w / scale) is computed without dividing, as |w| > scale / 2 (a tie rounds to even, 0).
    Raises WeightError on NaN or infinity.

    BitNet b1.58, eq. 1-3: https://arxiv.org/abs/2402.17764
    """
    return ternarize_groups("absmean", _absmean_rule, weight, group_size)


def _absmean_rule(magnitude: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    scale = group_sum(magnitude) / size.clamp(min=1)
    return scale, above(magnitude, scale / 2)
