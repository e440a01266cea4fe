"""A share of zeros within the compensation of errors: what a trit other than 0 has to gain.

With E as in gptq.py and n the trits that are not zero, E + penalty n is what its steps 3 and 5 make
small. To round u, in units of its scale s, changes E by D s^2 (u - t)^2 (D is L_jj^2 in step 3,
M_jj in step 5), so the best trit is

    t = 0  where |u| <= 1/2 + penalty / (2 D s^2),    else sign(u)

whose dead zone is the wider the less a column matters and the smaller a scale is. The penalty is
the Lagrange multiplier of the share, and one for all of a matrix: the least with which the share is
met, searched for on some of the rows and mended on all of them.

Sources: uniform quantizers with a dead zone as the best ones at low rates, Sullivan 1996,
https://doi.org/10.1109/18.532878; a multiplier in the place of a constraint, Everett 1963,
https://doi.org/10.1287/opre.11.3.399.
"""

from collections.abc import Callable

from torch import Tensor

from ternarize.trits.methods import itf, with_scale_bits, with_zeros
from ternarize.trits.ternary import Ternary, group_length

FIRST_PENALTY = 0.1  # at which the search begins, in units of the mean D s^2
SLACK = 0.003  # of the share: so much more is near enough
SLOPE = 0.1  # by which the share grows, about, where the penalty is doubled
MEND = 1.01  # by which the penalty grows at least where the other rows have fewer zeros
NEAR_PENALTIES = 1.002  # penalties between which nothing is looked for
MOST = 64  # steps of each kind

Trits = Callable[[], Tensor]  # trits as the penalty of now gives them


class DeadZone:
    """The least share of zeros of a matrix, and the penalty by which it is met.

    share    0 to below 1; 0: what rounding gives
    penalty  as it is now, in units of E
    """

    def __init__(self, share: float) -> None:
        self.share, self.penalty = share, 0.0

    def width(self, weights: Tensor, level: Tensor) -> Tensor | None:
        """penalty / (2 D s^2), (cols, rows); None: there is no dead zone.

        weights  D, (cols,)
        level    s, (cols, rows); where it is 0, all trits are
        """
        if not self.penalty:
            return None
        return self.penalty / (2 * weights[:, None] * level.square()).clamp(min=1e-30)

    def meet(self, some: Trits, whole: Trits, unit: float) -> Tensor:
        """Trits with the least penalty at which the share of them are zeros.

        some   those of a few rows, on which it is searched for
        whole  those of all, which are returned; the same where these are few
        unit   mean D s^2
        """
        if not self.share:
            return whole()
        found = self._search(some, unit)
        if whole is not some:
            found = whole()
        for _ in range(MOST):
            missing = self.share - _zeros(found)
            if missing <= 0:
                break
            grown = max(MEND, 2 ** (missing / SLOPE)) * self.penalty
            self.penalty = grown or FIRST_PENALTY * unit
            found = whole()
        return found

    def _search(self, some: Trits, unit: float) -> Tensor:
        """Set the penalty to the least, about, that meets the share of some rows; returns them.

        It is 0 where that does; else between two penalties, of which one does, the next is where a
        line through their shares, over the logarithm of the penalty, meets the share.
        """
        least = FIRST_PENALTY * unit
        if not unit > 0:  # nothing is there to be weighed
            self.penalty = 0.0
            return some()
        if not self.penalty:
            found = some()
            if _zeros(found) >= self.share:
                return found
        wanted = self.share + SLACK / 2
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        penalty = self.penalty or least
        for _ in range(MOST):
            self.penalty = penalty if penalty > 1e-3 * least else 0.0
            found = some()
            zeros = _zeros(found)
            if self.share <= zeros and (zeros <= self.share + SLACK or not self.penalty):
                break
            if zeros < self.share:
                low = penalty, zeros
            else:
                high = penalty, zeros
            if low is None or high is None:
                penalty *= min(4.0, max(0.25, 2 ** ((wanted - zeros) / SLOPE)))
                continue
            if high[0] < NEAR_PENALTIES * low[0]:
                self.penalty = high[0]
                found = some()
                break
            part = min(0.9, max(0.1, (wanted - low[1]) / (high[1] - low[1])))
            penalty = low[0] * (high[0] / low[0]) ** part
        return found


def _zeros(trits: Tensor) -> float:
    return 1 - int(trits.count_nonzero()) / max(1, trits.numel())


def nearest(
    weight: Tensor, group_size: int, zeros: float | None = None, scale_bits: int = 16
) -> Ternary:
    """A matrix ternarized without data: by `itf`, or where that has fewer zeros, with this share.

    Arguments and result are those of the methods; each group has one zero more where the share is
    not to be had. Without a share it is, to the last bit, what a conversion without data gives.
    """
    # beside a share the zeros of `itf` are only counted
    found = (itf if zeros is not None else with_scale_bits(scale_bits))(weight, group_size)
    if zeros is None or int((found.trits == 0).sum()) >= zeros * found.trits.numel():
        return found
    length = weight.numel() if group_size == 0 else group_length(weight.shape[-1], group_size)
    return with_zeros(zeros + 0.5 / length)(weight, group_size)


def mean_weight(weights: Tensor, scales: Tensor) -> float:
    """The mean of D s^2: of D (cols,) and scales of any shape, those that are 0 left out."""
    used = scales[scales > 0].float()
    return float(weights.double().mean() * used.square().mean()) if used.numel() else 0.0
