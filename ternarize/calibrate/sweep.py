"""Rounding columns one by one, each making up for the errors of those before it.

The columns are halved, one half is rounded, its errors are passed on to the other half by one
matrix product, and that is rounded; so it is with each half, down to a few columns. So all but
these is products of matrices, O(rows cols^2) in all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ternarize.calibrate.metric import PANEL

LEAF = 16  # columns that are rounded one by one


def sweep(
    matrix: Tensor,
    aim: Tensor,
    columns: Tensor,
    level: Tensor,
    sweeps: int = 1,
    zone: Tensor | None = None,
) -> Tensor:
    """Round columns one by one, from the last to the first, each making up for the errors so far.

    matrix   (cols, cols), of which the lower triangle T counts
    aim      (cols, rows): T_jj times what column j is to be rounded to, with the others as they
             are in `columns`; overwritten
    columns  (cols, rows): values from which errors are counted, e_j = columns_j - t_j level_j;
             overwritten
    level    (cols, rows): scales
    sweeps   how often; more than once where T is that of a symmetric matrix
    zone     (cols, rows), in units of the scales: how far beyond 1/2 trits are 0; None: not at all

    Returns trits (cols, rows) float32.
    """
    inverse = torch.where(level > 0, 1 / (level * matrix.diagonal()[:, None]), 0)
    trit = torch.empty_like(aim[0])
    errors = columns  # in the same memory: a column's error takes its place

    with torch.inference_mode():  # saves the overhead of recording what could be differentiated
        parts = (aim, inverse, level, errors)
        zones = [None] * len(aim) if zone is None else zone.unbind(0)
        lines = list(zip(*(part.unbind(0) for part in parts), zones, strict=True))
        for turn in range(sweeps):
            if turn:
                trits = _nearest(aim, inverse, zone)
                _up(matrix, aim, errors, 0, len(matrix))
                torch.mul(trits, level, out=columns)
            _down(matrix, lines, aim, errors, trit, 0, len(matrix))
    return _nearest(aim, inverse, zone)


# Not functions within `sweep`: those that call themselves would keep its memory until collected
def _down(
    matrix: Tensor,
    lines: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]],
    aim: Tensor,
    errors: Tensor,
    trit: Tensor,
    first: int,
    stop: int,
) -> None:
    """Round the columns from the last to the first. Arguments as in `sweep`; trit: scratch."""
    if stop - first > LEAF:
        middle = (first + stop) // 2
        low, high = slice(first, middle), slice(middle, stop)
        _down(matrix, lines, aim, errors, trit, middle, stop)
        aim[low].addmm_(matrix[high, low].T, errors[high])
        _down(matrix, lines, aim, errors, trit, first, middle)
        return
    # what is not an error yet meets zeros
    weights = matrix[first:stop, first:stop].tril(-1).T.contiguous().unbind(0)
    known = errors[first:stop].T
    own = lines[first:stop][::-1]
    for (goal, over, scale, error, zone), w in zip(own, weights[::-1], strict=True):
        goal.addmv_(known, w)
        torch.mul(goal, over, out=trit)
        if zone is not None:
            trit.sub_(torch.clamp(trit, -zone, zone))
        error.addcmul_(F.hardtanh_(trit).round_(), scale, value=-1)


def _up(matrix: Tensor, aim: Tensor, errors: Tensor, first: int, stop: int) -> None:
    """Tell the later columns the errors of the earlier ones."""
    if stop - first > PANEL:
        middle = (first + stop) // 2
        low, high = slice(first, middle), slice(middle, stop)
        aim[high].addmm_(matrix[high, low], errors[low])
        _up(matrix, aim, errors, first, middle)
        _up(matrix, aim, errors, middle, stop)
        return
    span = slice(first, stop)
    aim[span].addmm_(matrix[span, span].tril(-1), errors[span])


def _nearest(aim: Tensor, inverse: Tensor, zone: Tensor | None) -> Tensor:
    """Trits: a tie between two is 0."""
    ratio = aim * inverse
    if zone is not None:
        ratio.sub_(torch.clamp(ratio, -zone, zone))
    return F.hardtanh_(ratio).round_()
