"""Ternarization of one matrix against calibration statistics.

With inputs x of the ternarized stream and targets y (statistics.py), a matrix W' = scale x trit is
sought that minimises

    E(W') = sum |y - W' x|^2 = tr(W' H W'^T) - 2 tr(W' Y^T) + sum |y|^2,
    H = sum x x^T,  Y = sum y x^T.

1. Continuous optimum.  W* = W + (Y - W H)(H + lambda I)^-1, the minimum of E pulled towards the
   original weights W by lambda. Then E(W') - E(W*) = tr((W' - W*) H (W' - W*)^T) up to lambda, so
   from here on W* is what is approximated, in the metric of H. Rows no longer depend on each other.

2. Scales, static.  Each group of W* gets the scale of the alternating optimum (`itf`), before any
   column is rounded. Groups are of neighbouring columns as stored, so the order of step 3 is free
   and no permutation is stored.

3. Error compensation.  With H + damping I = R R^T, R upper triangular, the error is
   |(W* - W') R|^2, and column j of that product holds the errors e_k = w*_k - w'_k of the columns
   k <= j alone. So
   columns are rounded one by one, those with the largest H_jj first, each to the level nearest to

       w*_j + sum over k < j of e_k R_kj / R_jj.

   This is GPTQ (with U = R^-1 there), which passes each error on to the columns still to come, in
   the form of LDLQ, which needs one triangular factor of H and no inverse.

4. Joint scales.  With trits t fixed, E is quadratic in all the scales of a row together:
   A s = b,  A_gh = t_g^T H_gh t_h,  b_g = t_g^T (H w*)_g,  one small system per row.

5. Coordinate descent.  With scales fixed, each trit in turn takes its best value given all others,
   the level nearest to w'_j + ((w* - w') H)_j / H_jj. Steps 4 and 5 alternate. Neither can raise
   the (damped) error, and scales are rounded as they are stored before the trits settle on them.

lambda, the damping and the round that is kept are those with the least E on held-out tokens, so
statistics of few tokens are trusted less. If the matrix has a bias b that is kept, all moments are
taken about the means, and b becomes mean y - W' mean x, the best one.

Everything in steps 3 and 5 is done for all rows at once, in blocks of columns: inside a block by
rank-one updates, between blocks by matrix products, O(rows cols^2) in all.

Sources: step 3 is GPTQ, https://arxiv.org/abs/2210.17323 (eq. 2-3, algorithm 1), with static groups
and the column order of its reference implementation, as LDLQ, https://arxiv.org/abs/2307.13304.
Step 1 is the exact form of asymmetric calibration: Qronos, https://arxiv.org/abs/2505.11695, and
GPTAQ, https://arxiv.org/abs/2504.02692; here the target also holds the residual stream's error.
Step 5 with a fitted codebook is LNQ of GuidedQuant, https://arxiv.org/abs/2505.07004. Step 4 is
ordinary least squares.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ternarize.calibrate.statistics import Moments
from ternarize.methods import itf
from ternarize.tensor import Ternary, group_count, group_length

PULLS = (0.01, 0.03, 0.1, 0.3, 1.0)  # lambda, times mean H_jj
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of step 3, times mean H_jj
RIDGE = 0.01  # added to the diagonal in steps 4 and 5, times mean H_jj
SCALE_RIDGE = 1e-3  # added to the diagonal of A, times mean A_gg
ROUNDS = 4
SWEEPS = 2  # of coordinate descent in each round
BLOCK = 64  # columns
SYSTEMS = 1 << 22  # elements of A in memory at a time
PROBE_ROWS = 64  # rows on which the damping is chosen
MIN_TOKENS = 32  # a matrix that sees fewer is ternarized without statistics

Rounding = Callable[[Tensor], Tensor]  # scales -> scales as they are stored, float64


@dataclass(frozen=True)
class Solution:
    """A ternarized matrix.

    planes   trits and scales as they will be stored; the matrix is their sum
    bias     (rows,) float32, or None
    error    E / sum |y|^2 on held-out tokens (about the mean, if there is a bias)
    plain    the same for `itf` without statistics
    calibrated  False: too few tokens for statistics
    """

    planes: tuple[Ternary, ...]
    bias: Tensor | None
    error: float
    plain: float
    calibrated: bool = True


def solve(
    weight: Tensor,
    train: Moments,
    held: Moments,
    group_size: int,
    rounding: Rounding,
    *,
    planes: int = 1,
    bias: bool = False,
) -> Solution:
    """Ternarize a matrix so that its products are what they should be (module docstring).

    weight      (rows, cols) float32
    train       moments of calibration tokens; without a target, the matrix's own product is it
    held        moments of other tokens, to choose by
    group_size  as in ternarize.tensor
    rounding    how scales are stored
    planes      ternary matrices whose sum it becomes: each in turn is solved for what the others
                leave
    bias        whether the matrix has a bias to be fitted
    """
    train, held = _mean(train, weight, bias), _mean(held, weight, bias)
    hessian = train.hessian
    unit = float(hessian.diagonal().mean())
    plain = _plain(weight, group_size, rounding, planes)
    plain_error = _error(_sum(plain), held)
    if train.tokens < MIN_TOKENS or held.tokens < 1 or unit <= 0:
        return _solution(plain, plain_error, plain_error, train, bias, calibrated=False)
    wanted = _continuous(weight, train, held, unit)
    metric = hessian / unit
    order = metric.diagonal().argsort(descending=True, stable=True)
    best, best_error = plain, plain_error
    found: list[Ternary] = []
    for turn in range(planes if planes == 1 else 2 * planes):  # twice: the first saw not all
        at = turn % planes
        others = found[:at] + found[at + 1 :]
        rest = wanted - _sum(others) if others else wanted
        for candidate in _candidates(rest, metric, order, held, others, group_size, rounding):
            error = _error(_sum([*others, candidate]), held)
            if error < best_error and len(others) == planes - 1:
                best, best_error = (*others[:at], candidate, *others[at:]), error
            latest = candidate
        found[at : at + 1] = [latest]
    return _solution(best, best_error, plain_error, train, bias)


def _candidates(
    wanted: Tensor,
    metric: Tensor,
    order: Tensor,
    held: Moments,
    others: Sequence[Ternary],
    group_size: int,
    rounding: Rounding,
) -> Iterator[Ternary]:
    """Steps 2 to 5: ternary matrices near `wanted` in the metric, the last usually the nearest."""
    ridged = metric + RIDGE * torch.eye(len(metric), device=metric.device)
    scales = _rounded(itf(wanted, group_size), rounding).scales.float()
    factor = _choose_factor(wanted, metric, scales, order, held, others, group_size)
    trits = _compensate(wanted, factor, scales, order, group_size)
    del factor
    yield _clean(trits, scales, group_size)
    for _ in range(ROUNDS):
        scales = rounding(_joint_scales(trits, wanted, ridged, group_size)).float()
        yield _clean(trits, scales, group_size)
        trits = _descend(trits, scales, wanted, ridged, order, group_size)
        yield _clean(trits, scales, group_size)


def _plain(weight: Tensor, group_size: int, rounding: Rounding, planes: int) -> tuple[Ternary, ...]:
    """The matrix without statistics."""
    found = [_rounded(itf(weight, group_size), rounding)]
    while len(found) < planes:
        found.append(_rounded(itf(weight - _sum(found), group_size), rounding))
    return tuple(found)


def _sum(planes: Sequence[Ternary]) -> Tensor:
    """The matrix (rows, cols) float32 that planes stand for."""
    total = planes[0].dequantize(torch.float32)
    for plane in planes[1:]:
        total = total + plane.dequantize(torch.float32)
    return total


def _mean(moments: Moments, weight: Tensor, bias: bool) -> Moments:
    """Moments per token, about the means if there is a bias; with a target in any case."""
    n = max(1, moments.tokens)
    hessian, energy = moments.hessian / n, moments.energy / n
    x, y = moments.x_sum / n, moments.y_sum / n
    target = moments.target
    if target is None:
        target = weight @ hessian
        y, energy = weight.double() @ x, float((target * weight).double().sum())
    else:
        target = target / n
    if bias:
        hessian = hessian - (x[:, None] * x).float()
        target = target - (y[:, None] * x).float()
        energy -= float(y.square().sum())
    return replace(moments, hessian=hessian, target=target, x_sum=x, y_sum=y, energy=energy)


def _error(matrix: Tensor, held: Moments) -> float:
    """E(W') / sum |y|^2 for (rows, cols) float32."""
    assert held.target is not None
    value = ((matrix @ held.hessian - 2 * held.target) * matrix).sum(dtype=torch.float64)
    return max(0.0, float(value) + held.energy) / max(held.energy, 1e-30)


def _continuous(weight: Tensor, train: Moments, held: Moments, unit: float) -> Tensor:
    """Step 1: W*, with the lambda that is best on held-out tokens, or the weight itself."""
    assert train.target is not None
    missing = train.target - weight @ train.hessian
    best, best_error = weight, _error(weight, held)
    for pull in PULLS:
        factor = _cholesky(train.hessian, pull * unit)
        if factor is None:
            continue
        candidate = weight + torch.cholesky_solve(missing.T, factor).T
        error = _error(candidate, held)
        if error < best_error:
            best, best_error = candidate, error
    return best


def _cholesky(matrix: Tensor, ridge: float) -> Tensor | None:
    """The lower Cholesky factor of matrix + ridge I in its dtype; None where rounding forbids."""
    damped = matrix.clone()
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else factor


def _factor(metric: Tensor, damping: float, order: Tensor) -> Tensor | None:
    """R_kj / R_jj of step 3 with columns in `order`: (cols, cols) upper triangular."""
    backwards = order.flip(0)
    lower = _cholesky(metric[backwards][:, backwards], damping)
    if lower is None:
        return None
    upper = lower.flip(0, 1)
    return upper / upper.diagonal()


def _choose_factor(
    wanted: Tensor,
    metric: Tensor,
    scales: Tensor,
    order: Tensor,
    held: Moments,
    others: Sequence[Ternary],
    group_size: int,
) -> Tensor:
    """The factor of step 3 with the damping of least held-out error on some of the rows."""
    rows = torch.linspace(0, len(wanted) - 1, min(PROBE_ROWS, len(wanted)), device=wanted.device)
    rows = rows.long()
    probe, probe_scales = wanted[rows], scales if len(scales) == 1 else scales[rows]
    assert held.target is not None
    part = replace(held, target=held.target[rows])
    base = _sum(others)[rows] if others else torch.zeros_like(probe)
    best: tuple[float, Tensor] | None = None
    for damping in DAMPINGS:
        factor = _factor(metric, damping, order)
        if factor is None:
            continue
        trits = _compensate(probe, factor, probe_scales, order, group_size)
        error = _error(base + trits * _spread(probe_scales, trits, group_size), part)
        if best is None or error < best[0]:
            best = error, factor
    # a metric with which none of them works has no use: columns are then rounded by themselves
    return best[1] if best is not None else torch.eye(len(metric), device=metric.device)


def _compensate(
    wanted: Tensor, factor: Tensor, scales: Tensor, order: Tensor, group_size: int
) -> Tensor:
    """Step 3: trits (rows, cols) float32."""
    cols = wanted.shape[1]
    # columns of the matrix as rows here, so that each lies together in memory
    level = _spread(scales, wanted, group_size).T[order].contiguous()
    aim = wanted.T[order].contiguous()
    pull = torch.zeros_like(aim)  # sum of e_k R_kj / R_jj
    trits = torch.zeros_like(aim)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        errors = torch.empty_like(aim[start:stop])
        for j in range(start, stop):
            trits[j] = _nearest(aim[j] + pull[j], level[j])
            error = torch.sub(aim[j], trits[j] * level[j], out=errors[j - start])
            pull[j + 1 : stop].addr_(factor[j, j + 1 : stop], error)
        pull[stop:].addmm_(factor[start:stop, stop:].T, errors)
    return _in_place(trits, order)


def _in_place(columns: Tensor, order: Tensor) -> Tensor:
    """Columns in `order`, one a row -> the matrix (rows, cols)."""
    result = torch.empty_like(columns)
    result[order] = columns
    return result.T.contiguous()


def _joint_scales(trits: Tensor, wanted: Tensor, metric: Tensor, group_size: int) -> Tensor:
    """Step 4: scales (rows or 1, groups) float64, not negative."""
    rows, cols = trits.shape
    length, count = group_length(cols, group_size), group_count(cols, group_size)
    right = trits * (wanted @ metric)
    if group_size == 0:
        left = (trits @ metric * trits).double().sum()
        return (right.double().sum() / left.clamp(min=1e-30)).clamp(min=0).reshape(1, 1)
    b = _group_sums(right, length, count).double()
    found = torch.empty_like(b)
    step = max(1, SYSTEMS // count**2)
    for first in range(0, rows, step):
        some = trits[first : first + step]
        a = torch.empty(len(some), count, count, dtype=torch.float64, device=trits.device)
        for g in range(count):
            span = slice(g * length, min((g + 1) * length, cols))
            a[:, g] = _group_sums(some[:, span] @ metric[span] * some, length, count).double()
        diagonal = a.diagonal(dim1=1, dim2=2)
        diagonal += SCALE_RIDGE * diagonal.mean(-1, keepdim=True) + 1e-30
        found[first : first + step] = torch.linalg.solve(a, b[first : first + step, :, None])[
            ..., 0
        ]
    return found.clamp(min=0)


def _group_sums(values: Tensor, length: int, count: int) -> Tensor:
    """Sums of the groups of (rows, cols): (rows, count)."""
    short = length * count - values.shape[1]
    padded = torch.nn.functional.pad(values, (0, short))
    return torch.unflatten(padded, 1, (count, length)).sum(-1)


def _descend(
    trits: Tensor, scales: Tensor, wanted: Tensor, metric: Tensor, order: Tensor, group_size: int
) -> Tensor:
    """Step 5: trits after SWEEPS passes over the columns, (rows, cols) float32."""
    cols = wanted.shape[1]
    metric = metric[order][:, order]
    level = _spread(scales, wanted, group_size).T[order].contiguous()
    columns = trits.T[order].contiguous()
    # (w* - w') H of each column
    pull = metric @ (wanted.T[order] - columns * level)
    for _ in range(SWEEPS):
        before = columns.clone()
        for start in range(0, cols, BLOCK):
            stop = min(start + BLOCK, cols)
            moves = torch.empty_like(level[start:stop])
            for j in range(start, stop):
                value = columns[j] * level[j]
                columns[j] = _nearest(value + pull[j] / metric[j, j], level[j])
                move = torch.sub(columns[j] * level[j], value, out=moves[j - start])
                pull[start:stop].addr_(metric[start:stop, j], move, alpha=-1)
            pull[:start].addmm_(metric[:start, start:stop], moves, alpha=-1)
            pull[stop:].addmm_(metric[stop:, start:stop], moves, alpha=-1)
        if torch.equal(before, columns):
            break
    return _in_place(columns, order)


def _nearest(value: Tensor, level: Tensor) -> Tensor:
    """The trit whose level is nearest; 0 where the scale is 0."""
    return value.sign() * (value.abs() > level / 2) * (level > 0)


def _spread(scales: Tensor, like: Tensor, group_size: int) -> Tensor:
    """The scale of each weight: (rows or 1, groups) -> (rows or 1, cols) expanded to `like`."""
    cols = like.shape[1]
    length = group_length(cols, group_size)
    return scales.repeat_interleave(length, 1)[:, :cols].expand(like.shape)


def _clean(trits: Tensor, scales: Tensor, group_size: int) -> Ternary:
    """No scale without trits, no trits without scale."""
    trits = trits * (_spread(scales, trits, group_size) > 0)
    used = trits.abs()
    if group_size == 0:
        any_used = used.amax().reshape(1, 1) > 0
    else:
        cols = trits.shape[1]
        length, count = group_length(cols, group_size), group_count(cols, group_size)
        any_used = _group_sums(used, length, count) > 0
    return Ternary(trits.to(torch.int8), scales.double() * any_used, group_size)


def _rounded(ternary: Ternary, rounding: Rounding) -> Ternary:
    scales = rounding(ternary.scales)
    return _clean(ternary.trits.float(), scales.float(), ternary.group_size)


def _solution(
    planes: tuple[Ternary, ...],
    error: float,
    plain: float,
    train: Moments,
    bias: bool,
    *,
    calibrated: bool = True,
) -> Solution:
    fitted = None
    if bias and train.tokens >= MIN_TOKENS:
        fitted = (train.y_sum - _sum(planes).double() @ train.x_sum).float()
    return Solution(planes, fitted, error, plain, calibrated)
