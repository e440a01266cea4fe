"""The solver: what calibrated ternarization of one matrix promises."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize.calibrate import gptq
from ternarize.calibrate import metric as metrics
from ternarize.calibrate.gptq import solve
from ternarize.calibrate.metric import PANEL, Metric
from ternarize.calibrate.moments import Inputs, Moments
from ternarize.calibrate.sweep import sweep
from ternarize.trits.methods import itf, with_zeros
from ternarize.trits.rotation import block_size, rotate, signs, unrotate
from ternarize.trits.scales import store_scales
from ternarize.trits.ternary import Ternary


def half(scales: Tensor) -> Tensor:
    return store_scales(scales).double()


def moments(x: Tensor, y: Tensor | None, *, keep: bool = False) -> Moments:
    inputs = Inputs.empty(x.shape[1], keep=keep)
    found = Moments.empty(inputs, 1 if y is None else y.shape[1], target=y is not None)
    inputs.add(x)
    if y is not None:
        found.add(x, y)
    return found


def problem(rows: int, cols: int, tokens: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and correlated inputs of it with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    inputs = torch.randn(tokens, cols, generator=generator) @ mix
    inputs[:, : cols // 8] *= 4
    return torch.randn(rows, cols, generator=generator) * 0.05, inputs


def relative_error(matrix: Tensor, weight: Tensor, x: Tensor) -> float:
    wanted = x @ weight.T
    return float((x @ matrix.float().T - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("group_size", [32, 48, -1, 0])
def test_products_on_new_tokens_are_nearer_than_without_calibration(group_size: int) -> None:
    weight, x = problem(24, 96, 3000)
    train, held, new = x[:1500], x[1500:2000], x[2000:]
    solution = solve(
        weight, moments(train, train @ weight.T), moments(held, held @ weight.T), group_size, half
    )
    (ternary,) = solution.planes
    plain = itf(weight, group_size)
    ours = relative_error(ternary.dequantize(), weight, new)
    assert ours < 0.6 * relative_error(plain.dequantize(), weight, new)
    assert ours == pytest.approx(solution.error, rel=0.2)
    assert ternary.scales.shape == plain.scales.shape
    assert set(ternary.trits.flatten().tolist()) <= {-1, 0, 1}


def test_scales_are_those_that_will_be_stored() -> None:
    weight, x = problem(8, 64)
    y = x @ weight.T
    (ternary,) = solve(weight, moments(x, y), moments(x, y), 16, half).planes
    assert torch.equal(half(ternary.scales), ternary.scales)
    used = torch.unflatten(ternary.trits, 1, (-1, 16)).any(-1)
    assert torch.equal(used, ternary.scales > 0)


def test_the_targets_are_met_not_the_weight_where_the_two_streams_differ() -> None:
    weight, x = problem(16, 64, 4000)
    drifted = x * 0.8  # the packed stream has shrunk: the best matrix is larger by a quarter
    solution = solve(
        weight,
        moments(drifted[:3000], x[:3000] @ weight.T),
        moments(drifted[3000:], x[3000:] @ weight.T),
        32,
        half,
    )
    dense = solution.planes[0].dequantize()
    growth = float((dense * weight).sum() / weight.square().sum())
    undrifted = solve(
        weight,
        moments(x[:3000], x[:3000] @ weight.T),
        moments(x[3000:], x[3000:] @ weight.T),
        32,
        half,
    )
    before = undrifted.planes[0].dequantize()
    assert growth / float((before * weight).sum() / weight.square().sum()) > 1.15


def test_a_bias_takes_up_the_mean_of_what_is_missed() -> None:
    weight, x = problem(8, 64)
    x = x + 1.0
    offset = torch.arange(8.0)
    y = x @ weight.T + offset
    train, held = moments(x, y), moments(x, y, keep=True)
    solution = solve(weight, train, held, 32, half, bias=True)
    assert solution.bias is not None
    product = x.double() @ solution.planes[0].dequantize(torch.float64).T + solution.bias
    assert torch.allclose(product.mean(0), y.double().mean(0), atol=1e-4)


def test_two_planes_leave_a_fraction_of_the_error() -> None:
    weight, x = problem(16, 64, 4000)
    train, held = moments(x[:3000], x[:3000] @ weight.T), moments(x[3000:], x[3000:] @ weight.T)
    one = solve(weight, train, held, 32, half)
    two = solve(weight, train, held, 32, half, planes=2)
    assert len(two.planes) == 2
    assert two.error < 0.25 * one.error
    assert two.plain < one.plain


def test_a_matrix_that_sees_too_few_tokens_is_ternarized_without_them_and_says_so() -> None:
    weight, x = problem(8, 64)
    few = moments(x[: gptq.MIN_TOKENS - 1], None)
    solution = solve(weight, few, moments(x, None), 32, half)
    assert not solution.calibrated
    expected = itf(weight, 32)
    assert torch.equal(solution.planes[0].trits, expected.trits)


def test_without_a_target_the_matrix_is_to_give_what_it_gave() -> None:
    weight, x = problem(8, 64)
    own = solve(weight, moments(x[:1500], None), moments(x[1500:], None), 32, half)
    y = x @ weight.T
    same = solve(weight, moments(x[:1500], y[:1500]), moments(x[1500:], y[1500:]), 32, half)
    assert own.error == pytest.approx(same.error, rel=0.1)


def test_dead_inputs_do_no_harm() -> None:
    weight, x = problem(8, 64)
    x[:, 5:20] = 0
    y = x @ weight.T
    solution = solve(weight, moments(x, y), moments(x, y), 32, half)
    assert solution.error < solution.plain
    x, y = torch.zeros_like(x), torch.zeros_like(y)
    assert not solve(weight, moments(x, y), moments(x, y), 32, half).calibrated


def stated(weight: Tensor, x: Tensor, group_size: int, damping: float) -> gptq._Problem:
    """A problem whose W* is the weight, with L of the damping in its metric."""
    inputs = moments(x, None).inputs
    target = inputs.product(weight)
    metric = Metric(inputs, centred=False)
    assert metric.factorize(damping)
    return gptq._Problem(weight, target, weight, 0.0, metric, group_size, half)


PENALTIES = [0.0, 3.0]  # of a trit that is not zero


@pytest.mark.parametrize("penalty", PENALTIES)
def test_compensation_by_halves_is_the_textbook_loop(penalty: float) -> None:
    weight, x = problem(6, 150)
    problem_ = stated(weight, x, 40, 0.05)
    problem_.zone.penalty = penalty
    scales = half(itf(weight, 40).scales).float()
    # GPTQ as it is published: with the upper Cholesky factor of the inverse
    hessian = x.double().T @ x.double()
    hessian += 0.05 * hessian.diagonal().mean() * torch.eye(150)
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    rest, trits = weight[:, order].clone(), torch.zeros_like(weight)
    level = scales.repeat_interleave(40, 1)[:, :150][:, order]
    for j in range(150):
        # the error of this column, with all later ones at their best, is (error)^2
        to_be_0 = (rest[:, j] / inverse[j, j]).square()
        to_be_1 = ((rest[:, j].abs() - level[:, j]) / inverse[j, j]).square() + penalty
        trits[:, j] = rest[:, j].sign() * (to_be_1 < to_be_0)
        error = (rest[:, j] - trits[:, j] * level[:, j]) / inverse[j, j]
        rest[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
    expected = torch.empty_like(trits)
    expected[:, order] = trits
    found = gptq._compensate(problem_).trits
    assert float((found == expected).float().mean()) > 0.99  # roundings at the thresholds aside
    zeros = float((found == 0).float().mean())
    assert (0.3 < zeros < 0.5) if penalty == 0 else (0.5 < zeros < 1)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_sweeps_of_descent_are_the_textbook_loop(penalty: float) -> None:
    weight, x = problem(6, 150)
    problem_ = stated(weight, x, 40, 0.0)
    problem_.zone.penalty = penalty
    problem_.metric.restore(0.02)
    start = itf(weight, 40)
    scales = half(start.scales)
    metric = x.double().T @ x.double()
    metric += 0.02 * metric.diagonal().mean() * torch.eye(150)
    level = scales.repeat_interleave(40, 1)[:, :150]
    trits = start.trits.double()
    for j in metric.diagonal().argsort(descending=True).tolist() * gptq.SWEEPS:
        missed = (weight - trits * level) @ metric[:, j]
        value = trits[:, j] * level[:, j] + missed / metric[j, j]
        to_be_0 = metric[j, j] * value.square()
        to_be_1 = metric[j, j] * (value.abs() - level[:, j]).square() + penalty
        trits[:, j] = value.sign() * (to_be_1 < to_be_0)
    found = gptq._descend(problem_, start.trits, scales).trits
    assert float((found == trits).float().mean()) > 0.99


def test_a_sweep_leaves_nothing_in_memory() -> None:
    level = torch.ones(40, 3)
    aim, columns = torch.randn(40, 3), torch.randn(40, 3)
    left = weakref.ref(columns)
    gc.disable()
    try:
        sweep(torch.eye(40), aim, columns, level, 2)
        del columns
        assert left() is None
    finally:
        gc.enable()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([16, 40, -1, 0]), st.sampled_from(PENALTIES))
def test_neither_scales_nor_trits_are_changed_for_the_worse(
    seed: int, size: int, penalty: float
) -> None:
    weight, x = problem(5, 80, 400, seed)
    problem_ = stated(weight, x, size, 0.01)
    problem_.zone.penalty = penalty
    problem_.metric.restore(0.01)
    metric = x.T @ x
    metric += 0.01 * metric.diagonal().mean() * torch.eye(80)

    def error(trits: Tensor, scales: Tensor) -> float:
        missed = weight - Ternary(trits, scales, size).dequantize()
        return float(((missed @ metric) * missed).sum()) + penalty * int(trits.count_nonzero())

    start = itf(weight, size)
    better = gptq._joint_scales(problem_, start.trits)
    moved = gptq._descend(problem_, start.trits, better)
    first, second = error(start.trits, start.scales), error(start.trits, better)
    assert second <= first * 1.01  # the ridge on the scales may cost a little
    assert error(moved.trits, moved.scales) <= second * (1 + 1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_a_metric_holds_its_factor_and_gives_the_hessian_back(centred: bool) -> None:
    _, x = problem(1, 2 * PANEL + 70, 900)  # three panels, the last one short
    x = x + 0.5
    inputs = moments(x, None).inputs
    plain = inputs.hessian
    assert plain is not None
    order = plain.diagonal().argsort(stable=True)
    expected = plain[order][:, order].clone()
    wanted = expected.double()
    if centred:
        mean = x.double().mean(0)[order]
        wanted = wanted - len(x) * mean[:, None] * mean
    wanted += 0.1 * wanted.diagonal().mean() * torch.eye(len(wanted))
    with Metric(inputs, centred=centred) as metric:
        for ridge in (1.0, 0.1):
            assert metric.factorize(ridge)
        lower = metric.matrix.tril().double()
        assert torch.allclose(lower @ lower.T, wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
        aim = torch.randn(len(wanted), 3)
        divided = wanted @ metric.divide(aim).double()
        assert torch.allclose(divided, aim.double(), atol=1e-2)
        metric.restore(0.1)
        assert torch.allclose(metric.matrix, wanted.float(), rtol=1e-4, atol=1e-2)
    assert inputs.order is not None
    assert inputs.order.equal(order)
    assert inputs.hessian is plain  # in place
    left = plain.clone()
    with Metric(inputs, centred=centred):  # of another matrix with the same inputs
        assert plain.equal(left)
    with Metric(inputs, centred=False):
        assert torch.allclose(plain, expected, rtol=1e-5, atol=1e-3)


def test_a_hessian_is_symmetric_to_the_last_bit_once_it_is_sorted() -> None:
    """So the first matrix that is solved with it sees the same bits as the next."""
    _, x = problem(1, 200, 900)
    inputs = moments(x, None).inputs
    assert inputs.hessian is not None
    inputs.hessian += 1e-3 * torch.randn(200, 200)
    upper = inputs.hessian.triu().clone()
    order = inputs.sort()
    assert inputs.hessian.equal(inputs.hessian.T)
    assert inputs.hessian.diagonal().equal(upper.diagonal()[order])


def test_matrices_that_share_inputs_are_solved_as_if_they_did_not() -> None:
    weight, x = problem(12, 96, 3000)
    train, held = Inputs.empty(96), Inputs.empty(96, keep=True)
    train.add(x[:2500])
    held.add(x[2500:])
    for part, bias in ((weight[:5], True), (weight[5:], False)):
        y = x @ part.T + 1.0
        both = []
        for own, some, target in ((train, x[:2500], y[:2500]), (held, x[2500:], y[2500:])):
            both.append(Moments.empty(own, len(part), target=True))
            both[-1].add(some, target)
        shared = solve(part, both[0], both[1], 32, half, bias=bias)
        alone = solve(
            part, moments(x[:2500], y[:2500]), moments(x[2500:], y[2500:]), 32, half, bias=bias
        )
        assert shared.error == pytest.approx(alone.error, rel=1e-3)
        same = shared.planes[0].trits == alone.planes[0].trits
        assert float(same.float().mean()) > 0.99


def zeros_of(ternary: Ternary) -> float:
    return int((ternary.trits == 0).sum()) / ternary.trits.numel()


@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_a_share_of_zeros_costs_less_where_the_errors_are_made_up_for(
    group_size: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = problem(40, 96, 3000)
    monkeypatch.setattr(gptq, "PROBE_ROWS", 16)  # the penalty is found on a part of the rows
    train, held, new = x[:1500], x[1500:2000], x[2000:]
    rows = gptq.probe_rows(40)
    solution = solve(
        weight,
        moments(train, train @ weight.T),
        moments(held, held @ weight[rows].T),
        group_size,
        half,
        zeros=share,
    )
    (ternary,) = solution.planes
    assert share <= zeros_of(ternary) < share + 0.03
    plain = with_zeros(share)(weight, group_size)
    ours = relative_error(ternary.dequantize(), weight, new)
    assert ours < 0.75 * relative_error(plain.dequantize(), weight, new)
    assert 0 < solution.error < 0.75 * solution.plain


def test_a_share_that_is_there_by_itself_changes_nothing() -> None:
    weight, x = problem(24, 96, 3000)
    found = []
    for share in (None, 0.0, 0.2):
        train, held = (moments(part, part @ weight.T) for part in (x[:1500], x[1500:]))
        found.append(solve(weight, train, held, 32, half, zeros=share))
    for other in found[1:]:
        assert torch.equal(found[0].planes[0].trits, other.planes[0].trits)
        assert torch.equal(found[0].planes[0].scales, other.planes[0].scales)


def test_the_share_is_that_of_each_plane_and_of_what_saw_too_little() -> None:
    weight, x = problem(16, 64, 4000)
    train, held = moments(x[:3000], x[:3000] @ weight.T), moments(x[3000:], x[3000:] @ weight.T)
    both = solve(weight, train, held, 32, half, planes=2, zeros=0.7)
    assert all(0.7 <= zeros_of(plane) < 0.75 for plane in both.planes)
    few = moments(x[: gptq.MIN_TOKENS - 1], None)
    (alone,) = solve(weight, few, moments(x, None), 32, half, zeros=0.7).planes
    assert 0.7 <= zeros_of(alone) < 0.73
    assert torch.equal(alone.trits, with_zeros(23 / 32)(weight, 32).trits)
    (enough,) = solve(weight, few, moments(x, None), 32, half, zeros=0.2).planes
    assert torch.equal(enough.trits, itf(weight, 32).trits)


@pytest.mark.parametrize(("group_size", "planes"), [(16, 1), (0, 1), (32, 2)])
def test_rows_in_chunks_are_the_same_rows(
    group_size: int, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = problem(20, 64)
    monkeypatch.setattr(gptq, "PROBE_ROWS", 7)
    found = []
    for chunk in (1 << 22, 3 * 64):
        for module in (gptq, metrics):
            monkeypatch.setattr(module, "AT_A_TIME", chunk)
        y = x @ weight.T
        train, held = moments(x[:1500], y[:1500]), moments(x[1500:], y[1500:, gptq.probe_rows(20)])
        found.append(solve(weight, train, held, group_size, half, planes=planes))
    assert found[1].error == pytest.approx(found[0].error, rel=1e-2)
    for one, other in zip(found[0].planes, found[1].planes, strict=True):
        assert float((one.trits == other.trits).float().mean()) > 0.98


def test_few_tokens_are_kept_and_many_are_summed() -> None:
    weight, x = problem(3, 40, 100)
    kept, summed = Inputs.empty(40, keep=True), Inputs.empty(40)
    for some in (x[:10], x[10:30]):
        kept.add(some)
        summed.add(some)
    assert kept.hessian is None
    for last in (False, True):
        assert kept.energy(weight) == pytest.approx(summed.energy(weight), rel=1e-4)
        assert torch.allclose(kept.product(weight), summed.product(weight), rtol=1e-3, atol=1e-3)
        if not last:
            kept.add(x[30:])
            summed.add(x[30:])
    assert kept.hessian is not None
    assert not kept.kept
    assert kept.tokens == summed.tokens == 100


def test_rotation_keeps_products_and_comes_back() -> None:
    x, weight = torch.randn(7, 192), torch.randn(5, 192)
    assert block_size(192) == 64
    assert block_size(768) == 256
    assert block_size(1024, 1024) == 1024
    assert block_size(33) == 0
    turned = rotate(x, 64, 3)
    assert torch.allclose(turned @ rotate(weight, 64, 3).T, x @ weight.T, atol=1e-4)
    assert torch.allclose(unrotate(turned, 64, 3), x, atol=1e-5)
    assert not torch.equal(rotate(x, 64, 3), rotate(x, 64, 4))


def test_the_signs_of_a_seed_are_those_of_the_format() -> None:
    # SplitMix64 of seed 0 begins with e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f
    assert signs(3, 0).tolist() == [-1.0, 1.0, 1.0]


def test_rotation_spreads_large_inputs_and_so_helps() -> None:
    weight, x = problem(32, 64, 4000)
    x[:, 3] *= 60
    train, held = moments(x[:3000], x[:3000] @ weight.T), moments(x[3000:], x[3000:] @ weight.T)
    straight = solve(weight, train, held, 64, half)
    train, held = (moments(rotate(some, 64, 0), some @ weight.T) for some in (x[:3000], x[3000:]))
    turned = solve(rotate(weight, 64, 0), train, held, 64, half)
    assert turned.plain < straight.plain


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-4, 1e-3])
def test_inputs_that_hardly_vary_about_their_mean_do_no_harm(spread: float) -> None:
    # of a matrix with a bias, whose Hessian about the mean is then the rounding of one about zero
    weight, x = problem(24, 64, 700)
    x = 1 + spread * x
    parts = (x[:600], x[600:])
    moved = [moments(part, part @ weight.T + 1) for part in parts]
    solution = solve(weight, moved[0], moved[1], 32, half, bias=True)
    assert solution.bias is not None
    (ternary,) = solution.planes
    ours = parts[1] @ ternary.dequantize(torch.float32).T + solution.bias
    wanted = parts[1] @ weight.T + 1
    assert float((ours - wanted).square().mean() / wanted.square().mean()) < 1e-3 + spread
