"""The solver: what calibrated ternarization of one matrix promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize import container
from ternarize.calibrate import gptq
from ternarize.calibrate.gptq import solve
from ternarize.calibrate.statistics import Moments
from ternarize.methods import itf
from ternarize.rotation import block_size, rotate, signs, unrotate


def half(scales: Tensor) -> Tensor:
    return container.store_scales(scales).double()


def moments(x: Tensor, y: Tensor | None) -> Moments:
    found = Moments.empty(1 if y is None else y.shape[1], x.shape[1], target=y is not None)
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
        weight,
        moments(train, train @ weight.T),
        moments(held, held @ weight.T),
        group_size,
        half,
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
    statistics = moments(x, x @ weight.T)
    (ternary,) = solve(weight, statistics, statistics, 16, half).planes
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
    solution = solve(weight, moments(x, y), moments(x, y), 32, half, bias=True)
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
    statistics = moments(x, x @ weight.T)
    solution = solve(weight, statistics, statistics, 32, half)
    assert solution.error < solution.plain
    zero = moments(torch.zeros_like(x), torch.zeros(len(x), 8))
    assert not solve(weight, zero, zero, 32, half).calibrated


def test_compensation_in_blocks_is_the_textbook_loop() -> None:
    weight, x = problem(6, 150)
    metric = (x.T @ x / len(x)).float()
    metric /= metric.diagonal().mean()
    order = metric.diagonal().argsort(descending=True)
    factor = gptq._factor(metric, 0.05, order)
    assert factor is not None
    scales = itf(weight, 40).scales.float()
    # GPTQ as it is published: with the upper Cholesky factor of the inverse
    damped = metric[order][:, order].double() + 0.05 * torch.eye(150)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    rest, trits = weight[:, order].clone(), torch.zeros_like(weight)
    level = scales.repeat_interleave(40, 1)[:, :150][:, order]
    for j in range(150):
        trits[:, j] = rest[:, j].sign() * (rest[:, j].abs() > level[:, j] / 2)
        error = (rest[:, j] - trits[:, j] * level[:, j]) / inverse[j, j]
        rest[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
    expected = torch.empty_like(trits)
    expected[:, order] = trits
    found = gptq._compensate(weight, factor, scales, order, 40)
    assert float((found == expected).float().mean()) > 0.99  # roundings at the thresholds aside


def damped_error(trits: Tensor, scales: Tensor, weight: Tensor, metric: Tensor, size: int) -> float:
    missed = weight - trits * gptq._spread(scales, trits, size)
    return float(((missed @ metric) * missed).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([16, 40, -1, 0]))
def test_neither_scales_nor_trits_are_changed_for_the_worse(seed: int, size: int) -> None:
    weight, x = problem(5, 80, 400, seed)
    metric = x.T @ x / len(x) + 0.01 * torch.eye(80)
    start = itf(weight, size)
    trits, scales = start.trits.float(), start.scales.float()
    first = damped_error(trits, scales, weight, metric, size)
    better = gptq._joint_scales(trits, weight, metric, size).float()
    second = damped_error(trits, better, weight, metric, size)
    order = metric.diagonal().argsort(descending=True)
    moved = gptq._descend(trits, better, weight, metric, order, size)
    third = damped_error(moved, better, weight, metric, size)
    assert second <= first * 1.01  # the ridge on the scales may cost a little
    assert third <= second * (1 + 1e-4)


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
    turned = solve(rotate(weight, 64, 0), train.rotated(64, 0), held.rotated(64, 0), 64, half)
    assert turned.plain < straight.plain
