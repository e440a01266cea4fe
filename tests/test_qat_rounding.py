"""A latent weight read as a ternary one: values, gradients, and scales as they are stored."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.qat.rounding import (
    Form,
    rounded_inputs,
    scales_of,
    stored_scales,
    ternarized,
    trits_of,
)
from ternarize.runtime.products import rounded_linear
from ternarize.trits.methods import absmean, itf
from ternarize.trits.scales import scale_values, store_scales
from ternarize.trits.ternary import scaled

GROUPS = [16, 7, 64, -1, 0]  # 7 and 16 do not divide 40 columns; 64 is more than a row has
SHAPE = (6, 40)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_scales(group_size: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    weight = numbers(*shape)
    return itf(weight, group_size).scales.to(torch.float32)


def spread(scales: Tensor, group_size: int) -> Tensor:
    """The scale of each weight, written out."""
    rows, cols = SHAPE
    length = cols if group_size <= 0 else group_size
    every = [
        [scales[0 if group_size == 0 else r, c // length] for c in range(cols)] for r in range(rows)
    ]
    return torch.stack([torch.stack(row) for row in every])


def gradients(
    form: Form, latent: Tensor, scales: Tensor, given: Tensor, **scalars: Any
) -> tuple[Tensor, Tensor, Tensor]:
    latent, scales = latent.clone().requires_grad_(), scales.clone().requires_grad_()
    value = ternarized(latent, scales, form, **scalars)
    torch.autograd.backward(value, given)
    assert latent.grad is not None and scales.grad is not None
    return value.detach(), latent.grad, scales.grad


def of_groups(each: Tensor, group_size: int) -> Tensor:
    """Sums of what belongs to one scale, written out."""
    if group_size == 0:
        return each.sum().reshape(1, 1)
    length = SHAPE[1] if group_size < 0 else group_size
    return torch.stack([part.sum(1) for part in torch.split(each, length, 1)], 1)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("estimator", ["ste", "clipped"])
@pytest.mark.parametrize("threshold", [None, 0.8])
@pytest.mark.parametrize("blend", [None, 0.3])
def test_hard_rounding_has_the_values_and_gradients_that_are_documented(
    group_size: int, estimator: str, threshold: float | None, blend: float | None
) -> None:
    latent, scales, given = numbers(*SHAPE), some_scales(group_size), numbers(*SHAPE, seed=1)
    level = spread(scales, group_size)
    trits = latent.sign() * (latent.abs() > (threshold or 0.5) * level)
    inside = (latent / level).abs() < 1.5
    part = 1.0 if blend is None else blend
    scalars = {"threshold": threshold, "blend": blend}
    value, to_latent, to_scales = gradients(
        Form(group_size, estimator=estimator),
        latent,
        scales,
        given,
        **{name: torch.tensor(value) for name, value in scalars.items() if value is not None},
    )
    torch.testing.assert_close(value, part * level * trits + (1 - part) * latent)
    through = given * inside if estimator == "clipped" else given
    torch.testing.assert_close(to_latent, part * through + (1 - part) * given)
    torch.testing.assert_close(
        to_scales, part * of_groups(given * (trits - latent / level * inside), group_size)
    )


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("scalars", [{}, {"blend": 0.4}, {"threshold": 0.7}])
def test_soft_rounding_has_the_gradients_of_its_values(
    group_size: int, scalars: dict[str, float]
) -> None:
    latent, scales = numbers(*SHAPE).double(), some_scales(group_size).double()
    tensors = {name: torch.tensor(value).double() for name, value in scalars.items()}

    def value(latent: Tensor, scales: Tensor) -> Tensor:
        sharpness = torch.tensor(3.0).double()
        form = Form(group_size, estimator="tanh")
        return ternarized(latent, scales, form, sharpness=sharpness, dtype=torch.float64, **tensors)

    inputs = (latent.requires_grad_(), scales.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs, fast_mode=False)


def test_soft_rounding_becomes_the_hard_one_as_it_gets_sharp() -> None:
    latent, scales, form = numbers(*SHAPE), some_scales(16), Form(16, estimator="tanh")
    hard = ternarized(latent, scales, form)
    soft = [
        float((ternarized(latent, scales, form, sharpness=torch.tensor(k)) - hard).abs().mean())
        for k in (1.0, 10.0, 60.0, 1e4)
    ]
    assert soft == sorted(soft, reverse=True) and soft[-1] < 1e-3


def test_experts_are_a_stack_of_matrices() -> None:
    latent = numbers(3, *SHAPE)
    for group_size in GROUPS:
        for scale in ("absmean", "least-squares"):
            form = Form(group_size, scale=scale)
            each = torch.stack([scales_of(one, form) for one in latent])
            assert torch.equal(scales_of(latent, form), each)
            values = [ternarized(w, s, form) for w, s in zip(latent, each, strict=True)]
            assert torch.equal(ternarized(latent, each, form), torch.stack(values))


@pytest.mark.parametrize("group_size", GROUPS)
def test_scales_of_the_rules_are_theirs(group_size: int) -> None:
    latent = numbers(*SHAPE)
    mean = scales_of(latent, Form(group_size, scale="absmean", scale_dtype="F32"))
    torch.testing.assert_close(mean.double(), absmean(latent, group_size).scales)
    fitted = scales_of(latent, Form(group_size, scale="least-squares", scale_dtype="F32"))

    def error(scales: Tensor) -> float:
        trits = trits_of(latent, scales, group_size, None)
        return float((scaled(trits, scales, group_size) - latent).square().sum())

    best = itf(latent, group_size).scales.float()
    assert error(fitted) < error(mean)
    assert error(fitted) < 1.02 * error(best)


@pytest.mark.parametrize("dtype", ["F16", "U8", "F32"])
def test_scales_are_rounded_as_a_file_stores_them(dtype: str) -> None:
    exponents = torch.linspace(-13.9, 15.8, 20_000, dtype=torch.float64)
    middles = 2.0**-3 * (1 + torch.arange(33) / 32)  # halfway between codes, and between halves
    halves = 1 + (torch.arange(64) + 0.5) * 2.0**-10
    scales = torch.cat([2**exponents, middles.double(), halves]).float()
    want = scales.double()
    if dtype == "F16":
        want = store_scales(scales.double()).double()
    elif dtype == "U8":
        codes = store_scales(scales.double(), bits=8)
        assert codes.dtype == torch.uint8
        want = scale_values(codes).double()
    found = stored_scales(scales, dtype)
    assert torch.equal(found.double(), want)
    assert torch.equal(stored_scales(found, dtype), found)


def test_scales_of_6_bits_are_rounded_as_they_are_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(4, 124, dtype=torch.uint8) * 2
    numbers = scale_values(codes)
    middles = (numbers[1:] + numbers[:-1]) / 2
    drawn = numbers * (1 + 0.2 * torch.rand(len(numbers), generator=generator))
    scales = torch.cat([numbers, middles, drawn.clamp(max=57344)])
    found = stored_scales(scales, "U8", 6)
    assert torch.equal(found, scale_values(store_scales(scales.double(), bits=6)))
    assert torch.equal(stored_scales(found, "U8", 6), found)
    assert stored_scales(torch.tensor([1e9, 61440.0]), "U8", 6).tolist() == [57344.0, 57344.0]


@pytest.mark.parametrize(
    "dtype, low, high", [("F16", 2.0**-14, 65504.0), ("U8", 2.0**-14, 61440.0)]
)
def test_scales_beyond_a_dtype_are_its_ends_and_learn_on(
    dtype: str, low: float, high: float
) -> None:
    scales = torch.tensor([1e-9, 1e9, torch.inf, 0.5], requires_grad=True)
    found = stored_scales(scales, dtype)
    assert found.tolist() == [low, high, high, 0.5]
    torch.autograd.backward(found, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert scales.grad is not None and scales.grad.tolist() == [1, 2, 3, 4]


def test_a_weight_comes_in_the_dtype_that_is_asked_for_and_keeps_gradients_wide() -> None:
    latent, scales = numbers(*SHAPE).requires_grad_(), some_scales(16)
    wide = ternarized(latent, scales, Form(16))
    narrow = ternarized(latent, scales, Form(16), dtype=torch.bfloat16)
    assert torch.equal(narrow, wide.to(torch.bfloat16))
    torch.autograd.backward(narrow.float().square().sum())
    assert latent.grad is not None and latent.grad.dtype == torch.float32


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_trits_are_those_of_the_forward(threshold: float | None) -> None:
    edge = None if threshold is None else torch.tensor(threshold)
    for group_size in GROUPS:
        latent, scales = numbers(*SHAPE), some_scales(group_size)
        latent[0] = 0.0
        latent[1] = spread(scales, group_size)[1] * (threshold or 0.5)  # the edge itself: 0
        trits = trits_of(latent, scales, group_size, edge)
        assert not trits[:2].any()
        value = ternarized(latent, scales, Form(group_size), threshold=edge)
        assert torch.equal(value, scaled(trits, scales, group_size))


def test_inputs_are_rounded_as_the_runtime_rounds_them() -> None:
    x, weight = numbers(5, 3, 40, seed=2), numbers(*SHAPE)
    x[0, 0] = 0
    x = x.requires_grad_()
    rounded = rounded_inputs(x)
    torch.testing.assert_close(rounded @ weight.T, rounded_linear(x.detach(), weight))
    absmax = x.detach().abs().amax(-1, keepdim=True)
    levels = rounded.detach() * 127 / absmax.clamp(min=1e-9)
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    torch.autograd.backward(rounded, torch.ones_like(x))
    assert x.grad is not None and bool((x.grad == 1).all())
