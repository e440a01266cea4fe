"""Ternarization of one matrix against calibration statistics.

With inputs x of the ternarized stream and targets y (moments.py), a matrix W' = scale x trit is
sought that minimises

    E(W') = sum |y - W' x|^2 = tr(W' H W'^T) - 2 tr(W' Y^T) + sum |y|^2,
    H = sum x x^T,  Y = sum y x^T.

1. Continuous optimum.  W* = (Y + lambda W)(H + lambda I)^-1, the minimum of E pulled towards the
   original weights W by lambda. Then E(W') - E(W*) = tr((W' - W*) H (W' - W*)^T) up to lambda, so
   from here on W* is what is approximated, in the metric of M = H + damping I. Rows no longer
   depend on each other. W* M needs no product: it is Y + lambda (W - W*) + damping W*.

2. Scales, static.  Each group of W* gets the scale of the alternating optimum (`itf`), before any
   column is rounded. Groups are of neighbouring columns as stored, so the order of step 3 is free
   and no permutation is stored.

3. Error compensation.  With M = L L^T, L lower triangular, the error is |(W* - W') L|^2, and column
   j of that product holds the errors e_k = w*_k - w'_k of the columns k >= j alone. So columns are
   rounded one by one from the last to the first, those with the largest H_jj being last, each to
   the level nearest to

       w*_j + sum over k > j of e_k L_kj / L_jj.

   This is GPTQ (with L^-1 there), which passes each error on to the columns still to come, in the
   form of LDLQ, which needs one triangular factor of M and no inverse.

4. Joint scales.  With trits t fixed, the error is quadratic in all the scales of a row together:
   A s = b,  A_gh = t_g^T M_gh t_h,  b_g = t_g^T (W* M)_g,  one small system per row.

5. Coordinate descent.  With scales fixed, each trit in turn takes its best value given all others,
   the level nearest to w'_j + ((w* - w') M)_j / M_jj, in the order of step 3. Steps 4 and 5
   alternate. Neither can raise the error in M, but for the rounding and clamping of scales, which
   comes before the trits settle on them.

With a share of zeros that is asked for, steps 3 and 5 round within a dead zone (dead_zone.py).

lambda, the damping of step 3 and the round that is kept are those with the least E on held-out
tokens, on a sample of the rows, so statistics of few tokens are trusted less. If the matrix has a
bias b that is kept, all moments are taken about the means, and b becomes mean y - W' mean x, the
best one.

Steps 3 and 5 are one function, `sweep`; M and L take turns in the memory of H (`Metric`). Rows are
done a chunk at a time.

Sources: step 3 is GPTQ, https://arxiv.org/abs/2210.17323 (eq. 2-3, algorithm 1), with static groups
and the column order of its reference implementation, as LDLQ, https://arxiv.org/abs/2307.13304.
Step 1 is the exact form of asymmetric calibration: Qronos, https://arxiv.org/abs/2505.11695, and
GPTAQ, https://arxiv.org/abs/2504.02692; here the target also holds the residual stream's error.
Step 5 with a fitted codebook is LNQ of GuidedQuant, https://arxiv.org/abs/2505.07004. Step 4 is
ordinary least squares.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ternarize.calibrate.dead_zone import DeadZone, mean_weight, nearest
from ternarize.calibrate.metric import AT_A_TIME, Metric, chunks
from ternarize.calibrate.moments import Inputs, Moments
from ternarize.calibrate.sweep import sweep
from ternarize.trits.ternary import (
    Ternary,
    group_count,
    group_length,
    group_sums,
    split_groups,
    spread_scales,
)

PULLS = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)  # lambda, times mean H_jj
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of step 3, times mean H_jj
RIDGE = 0.01  # damping of steps 4 and 5, times mean H_jj
SCALE_RIDGE = 1e-3  # added to the diagonal of A, times mean A_gg
ROUNDS = 4
SWEEPS = 2  # of coordinate descent in each round
SYSTEMS = 1 << 22  # elements of A in memory at a time
PROBE_ROWS = 256  # rows on which lambda and the rounds are chosen
MIN_TOKENS = 32  # a matrix that sees fewer is ternarized without statistics
Rounding = Callable[[Tensor], Tensor]  # scales -> scales as they are stored, float64
Judge = Callable[[Tensor], float]  # a matrix (rows, cols) float32 -> its held-out error


@dataclass(frozen=True)
class Solution:
    """A ternarized matrix.

    planes   trits and scales as they will be stored; the matrix is their sum
    bias     (rows,) float32, or None
    error    sum |y - W' x|^2 / sum |y|^2 on held-out tokens (about the mean, if there is a bias),
             of the rows that `probe_rows` gives
    plain    the same for `nearest` without statistics
    calibrated  False: too few tokens for statistics
    tokens   that the matrix saw
    """

    planes: tuple[Ternary, ...]
    bias: Tensor | None
    error: float
    plain: float
    calibrated: bool = True
    tokens: int = 0


def probe_rows(rows: int) -> Tensor:
    """The rows of a matrix (n,) int64 of which held-out targets are needed."""
    count = min(PROBE_ROWS, rows)
    return torch.arange(count) * rows // max(1, count)


def solve(
    weight: Tensor,
    train: Moments,
    held: Moments,
    group_size: int,
    rounding: Rounding,
    *,
    planes: int = 1,
    bias: bool = False,
    zeros: float | None = None,
    scale_bits: int = 16,
) -> Solution:
    """Ternarize a matrix so that its products are what they should be (module docstring).

    weight      (rows, cols) float32
    train       moments of calibration tokens; without a target, the matrix's own product is it.
                Its Hessian is worked on in place, and sorted afterwards (`Inputs.sort`).
    held        moments of other tokens, to choose by; its targets are of `probe_rows` only
    group_size  as in ternarize.trits.ternary
    rounding    how scales are stored
    planes      ternary matrices whose sum it becomes: each in turn is solved for what the others
                leave
    bias        whether the matrix has a bias to be fitted
    zeros       the least share of zeros among its trits, 0 to below 1; None: what comes of it
    scale_bits  of stored scales
    """
    rows = probe_rows(len(weight)).to(weight.device)
    target, total = train.target, train.total
    if target is None:
        target, total = train.inputs.product(weight), weight.double() @ train.inputs.total
    judge = _judge_of(weight[rows], held, bias)
    plain = partial(_plain, weight, group_size, rounding, planes, zeros, scale_bits)
    plain_error = judge(_sum_of_planes(_rows_of(plain(), rows)))
    found, error = None, plain_error
    calibrated = train.inputs.tokens >= MIN_TOKENS and held.inputs.tokens > 0
    if calibrated:
        assert train.inputs is not held.inputs  # it is worked on
        with Metric(train.inputs, centred=bias) as metric:
            calibrated = 0 < metric.unit < math.inf
            if calibrated:
                if bias:
                    target = target - _mean_part(total, train.inputs)
                problem = _state(weight, target, metric, group_size, rounding, rows, judge)
                tried, tried_error = _search(problem, planes, zeros, rows, judge)
                if tried_error < plain_error:
                    found, error = tried, tried_error
    if found is None:
        found = plain()
    fitted = None
    if bias and train.inputs.tokens >= MIN_TOKENS:
        missed = total - _sum_of_planes(found).double() @ train.inputs.total
        fitted = (missed / train.inputs.tokens).float()
    return Solution(found, fitted, error, plain_error, calibrated, train.inputs.tokens)


@dataclass(frozen=True)
class _Problem:
    """Some rows of a matrix, and what is wanted of them.

    weight, target, wanted  (rows, cols) float32: W, Y and, with lambda = `pull`, W*
    rest    (rows, cols) float32: what other planes give already
    zone    by which its trits have their share of zeros
    """

    weight: Tensor
    target: Tensor
    wanted: Tensor
    pull: float
    metric: Metric
    group_size: int
    rounding: Rounding
    rest: Tensor | None = None
    zone: DeadZone = field(default_factory=lambda: DeadZone(0))

    def part(self, rows: Tensor) -> "_Problem":
        """The same for some of the rows."""
        rest = None if self.rest is None else self.rest[rows]
        weight, target, wanted = self.weight[rows], self.target[rows], self.wanted[rows]
        return replace(self, weight=weight, target=target, wanted=wanted, rest=rest)

    def aim(self, rows: slice) -> Tensor:
        """(W* - rest) (H + damping I) of some rows, (n, cols); not while the metric holds L."""
        # W* (H + lambda I) = Y + lambda W
        aim = torch.add(self.target[rows], self.weight[rows], alpha=self.pull)
        aim.add_(self.wanted[rows], alpha=self.metric.ridge - self.pull)
        if self.rest is not None:
            aim -= self.metric.times(self.rest[rows])
        return aim

    def error(self, ternary: Ternary, rows: Tensor | None, judge: Judge) -> float:
        """The held-out error of some of the rows."""
        rest = self.rest
        if rows is not None:
            (ternary,) = _rows_of([ternary], rows)
            rest = None if rest is None else rest[rows]
        dense = ternary.dequantize(torch.float32)
        return judge(dense if rest is None else dense + rest)


def _state(
    weight: Tensor,
    target: Tensor,
    metric: Metric,
    group_size: int,
    rounding: Rounding,
    rows: Tensor,
    judge: Judge,
) -> _Problem:
    """Step 1, with the lambda whose W* has the least held-out error on `rows`, or W* = W."""

    def error(pull: float) -> float:
        if not metric.factorize(pull):
            return math.inf
        return judge(_continuous(weight[rows], target[rows], metric))

    pull, least = _least(PULLS, error)
    if least < judge(weight[rows]):
        metric.factorize(pull)
        wanted, pull = _continuous(weight, target, metric), metric.ridge
    else:
        metric.restore(0.0)
        wanted, target, pull = weight, metric.times(weight), 0.0
    return _Problem(weight, target, wanted, pull, metric, group_size, rounding)


def _continuous(weight: Tensor, target: Tensor, metric: Metric) -> Tensor:
    """Step 1: W*, (rows, cols), with the lambda of the metric's L."""
    wanted = torch.empty_like(weight)
    for rows in chunks(weight):
        aim = torch.add(target[rows], weight[rows], alpha=metric.ridge)
        wanted[rows] = metric.divide(metric.sorted(aim)).index_select(0, metric.back).T
    return wanted


def _search(
    problem: _Problem, planes: int, zeros: float | None, rows: Tensor, judge: Judge
) -> tuple[tuple[Ternary, ...] | None, float]:
    """The planes with the least held-out error on `rows`, and it."""
    found: list[Ternary] = []
    best: tuple[tuple[Ternary, ...] | None, float] = None, math.inf
    for turn in range(planes if planes == 1 else 2 * planes):  # twice: the first saw not all
        at = turn % planes
        others = found[:at] + found[at + 1 :]
        rest = _sum_of_planes(others) if others else None
        problem = replace(problem, rest=rest, zone=DeadZone(zeros or 0))
        damping = _choose_damping(problem.part(rows), judge)
        tried = ((problem.error(c, rows, judge), c) for c in _rounds(problem, damping))
        error, latest = min(tried, key=lambda pair: pair[0], default=(math.inf, None))
        if latest is None:  # no damping makes the Hessian one
            break
        found[at : at + 1] = [latest]
        if len(found) == planes and error < best[1]:
            best = tuple(found), error
    return best


def _choose_damping(part: _Problem, judge: Judge) -> float:
    """The damping of step 3 with the least held-out error after it."""

    def error(damping: float) -> float:
        if not part.metric.factorize(damping):
            return math.inf
        return part.error(_compensate(part), None, judge)

    return _least(DAMPINGS, error)[0]


def _least(values: Sequence[float], error: Callable[[float], float]) -> tuple[float, float]:
    """The value with the least error, and it; it falls, and then rises. Not finite: the last."""
    best, least = values[-1], math.inf
    for value in values:
        found = error(value)
        if found < least:
            best, least = value, found
        elif least < math.inf:
            break
    return best, least


def _rounds(problem: _Problem, damping: float) -> Iterator[Ternary]:
    """Steps 2 to 5: ternary matrices, the last usually the best."""
    if not problem.metric.factorize(damping):
        return
    found = _compensate(problem)
    yield found
    problem.metric.restore(RIDGE)
    for _ in range(ROUNDS):
        scales = problem.rounding(_joint_scales(problem, found.trits))
        yield _with_used_scales(found.trits, scales, problem.group_size)
        found = _descend(problem, found.trits, scales)
        yield found


def _compensate(problem: _Problem) -> Ternary:
    """Steps 2 and 3."""
    metric, diagonal = problem.metric, problem.metric.matrix.diagonal()
    if problem.rest is not None:
        problem = replace(problem, wanted=problem.wanted - problem.rest, rest=None)
    start = nearest(problem.wanted, problem.group_size, problem.zone.share or None)
    start = _with_stored_scales(start, problem.rounding)

    def begin(part: _Problem, _: Ternary, rows: slice, __: Tensor) -> tuple[Tensor, Tensor]:
        columns = metric.sorted(part.wanted[rows])
        return columns * diagonal[:, None], columns

    return _swept(problem, start, diagonal.square(), begin)


def _joint_scales(problem: _Problem, trits: Tensor) -> Tensor:
    """Step 4: scales (rows or 1, groups) float64, not negative."""
    metric, size, cols = problem.metric, problem.group_size, trits.shape[1]
    length, count = group_length(cols, size), group_count(cols, size)
    found = torch.empty(len(trits), count, dtype=torch.float64, device=trits.device)
    above = below = 0.0
    for rows in chunks(trits, max(1, min(SYSTEMS // count**2, AT_A_TIME // cols))):
        some = trits[rows].float()
        b = group_sums(problem.aim(rows).mul_(some), size).double()
        a = torch.empty(len(some), count, count, dtype=torch.float64, device=trits.device)
        for g in range(count):
            span = slice(g * length, min((g + 1) * length, cols))
            lines = metric.matrix.index_select(0, metric.back[span])
            panel = lines.index_select(1, metric.back[span.start :])
            products = (some[:, span] @ panel).mul_(some[:, span.start :])
            a[:, g, g:] = a[:, g:, g] = group_sums(products, size)
        if size == 0:
            above, below = above + float(b.sum()), below + float(a.sum())
            continue
        diagonal = a.diagonal(dim1=1, dim2=2)
        diagonal += SCALE_RIDGE * diagonal.mean(-1, keepdim=True) + 1e-30
        found[rows] = torch.linalg.solve(a, b[..., None])[..., 0]
    if size == 0:
        found = found.new_full((1, 1), above / max(below, 1e-30))
    return found.clamp(min=0)


def _descend(problem: _Problem, trits: Tensor, scales: Tensor) -> Ternary:
    """Step 5."""
    metric = problem.metric
    weights = metric.matrix.diagonal()

    def begin(part: _Problem, some: Ternary, rows: slice, level: Tensor) -> tuple[Tensor, Tensor]:
        columns = metric.sorted(some.trits[rows].float()).mul_(level)
        aim = metric.sorted(part.aim(rows))
        aim.addmm_(metric.matrix, columns, alpha=-1)
        return aim.addcmul_(columns, weights[:, None]), columns

    return _swept(problem, Ternary(trits, scales, problem.group_size), weights, begin, SWEEPS)


def _swept(
    problem: _Problem,
    start: Ternary,
    weights: Tensor,
    begin: Callable[..., tuple[Tensor, Tensor]],
    sweeps: int = 1,
) -> Ternary:
    """Trits for the scales of `start`, with the share of zeros by the D of DeadZone, `weights`."""
    metric = problem.metric

    def swept(part: _Problem, some: Ternary) -> Tensor:
        trits = torch.empty_like(some.trits)
        for rows in chunks(trits):
            level = _levels(metric, some.scales, rows, problem.group_size)
            aim, columns = begin(part, some, rows, level)
            zone = problem.zone.width(weights, level)
            found = sweep(metric.matrix, aim, columns, level, sweeps, zone)
            trits[rows] = found.to(torch.int8).index_select(0, metric.back).T
        return trits

    few = probe_rows(len(start.trits)).to(start.trits.device)
    whole = part = partial(swept, problem, start)
    if len(few) < len(start.trits):
        part = partial(swept, problem.part(few), *_rows_of([start], few))
    trits = problem.zone.meet(part, whole, mean_weight(weights, start.scales))
    return _with_used_scales(trits, start.scales, problem.group_size)


def _judge_of(weight: Tensor, held: Moments, bias: bool) -> Judge:
    """The error of some rows on held-out tokens, of the matrix (rows, cols) float32 that is asked.

    weight  these rows of the original
    """
    inputs, target, total, energy = held.inputs, held.target, held.total, held.energy
    if target is None:
        target, total = inputs.product(weight), weight.double() @ inputs.total
        energy = inputs.energy(weight)
    n = max(1, inputs.tokens)
    if bias:
        target = target - _mean_part(total, inputs)
        energy -= float(total.square().sum()) / n
    wanted, scale = target, max(energy, 1e-30)

    def judge(matrix: Tensor) -> float:
        value = inputs.energy(matrix) - 2 * float((matrix * wanted).sum(dtype=torch.float64))
        if bias:
            value -= float((matrix.double() @ inputs.total).square().sum()) / n
        return max(0.0, value + energy) / scale

    return judge


def _mean_part(total: Tensor, inputs: Inputs) -> Tensor:
    """sum y mean x^T, (rows, cols) float32."""
    return (total / max(1, inputs.tokens)).float()[:, None] * inputs.total.float()


def _plain(
    weight: Tensor,
    group_size: int,
    rounding: Rounding,
    planes: int,
    zeros: float | None,
    scale_bits: int,
) -> tuple[Ternary, ...]:
    """The matrix without statistics."""
    found: list[Ternary] = []
    while len(found) < planes:
        rest = weight - _sum_of_planes(found) if found else weight
        found.append(_with_stored_scales(nearest(rest, group_size, zeros, scale_bits), rounding))
    return tuple(found)


def _sum_of_planes(planes: Sequence[Ternary]) -> Tensor:
    """The matrix (rows, cols) float32 that planes stand for."""
    total = planes[0].dequantize(torch.float32)
    for plane in planes[1:]:
        total += plane.dequantize(torch.float32)
    return total


def _rows_of(planes: Sequence[Ternary], rows: Tensor) -> list[Ternary]:
    """Some rows of planes."""
    return [
        Ternary(p.trits[rows], p.scales if p.group_size == 0 else p.scales[rows], p.group_size)
        for p in planes
    ]


def _levels(metric: Metric, scales: Tensor, rows: slice, group_size: int) -> Tensor:
    """The scale of each weight of some rows, (cols, n) float32, sorted."""
    if group_size == 0:
        scales = scales.expand(rows.stop, 1)
    groups = metric.order // group_length(len(metric.order), group_size)
    return scales[rows].float().T.contiguous().index_select(0, groups)


def _with_used_scales(trits: Tensor, scales: Tensor, group_size: int) -> Ternary:
    """Without the scales of groups that have no trits."""
    groups = trits.reshape(1, 1, -1) if group_size == 0 else split_groups(trits, group_size)
    return Ternary(trits, scales * (groups.abs().amax(-1) > 0), group_size)


def _with_stored_scales(ternary: Ternary, rounding: Rounding) -> Ternary:
    """With scales as they are stored, and without trits whose scale is rounded to 0."""
    scales, trits = rounding(ternary.scales), ternary.trits
    alive = scales > 0
    if not bool(alive.all()):
        trits = trits * spread_scales(alive, trits.shape[1], ternary.group_size)
    return _with_used_scales(trits, scales, ternary.group_size)
