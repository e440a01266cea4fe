"""Training of ternary weights: the start is what it was given, the end is never worse."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ternarize.calibrate import reconstruct as reconstruction
from ternarize.calibrate.reconstruct import TernaryWeight, huber, parameters, reconstruct
from ternarize.qat.rounding import Form
from ternarize.trits.methods import itf, levels
from ternarize.trits.rotation import rotate
from ternarize.trits.scales import store_scales
from ternarize.trits.ternary import spread_scales

FORMS = [
    Form(32),
    Form(24),  # the last group of a row is short
    Form(-1),
    Form(0),
    Form(32, transposed=True),
    Form(32, block=16, seed=3),
    Form(-1, transposed=True, block=64, seed=3),
]


def half(scales: Tensor) -> Tensor:
    return store_scales(scales).double()


def start(form: Form, *shape: int) -> tuple[Tensor, Tensor]:
    """A weight parameter, and how it lies ternarized in the file, scales as they are stored."""
    weight = torch.randn(*(shape or (10, 64)), generator=torch.Generator().manual_seed(0)) * 0.05
    logical = rotate(weight, form.block, form.seed) if form.block else weight
    ternary = itf(logical, form.group_size)
    scales = half(ternary.scales)
    dense = type(ternary)(ternary.trits, scales, form.group_size).dequantize(torch.float32)
    return form.turn(weight).contiguous(), form.turn(dense).contiguous()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(10, 64), (3, 10, 64)], ids=str)
def test_training_starts_from_just_what_it_was_given(form: Form, shape: tuple[int, ...]) -> None:
    weight, stored = start(form, *shape)
    trainable = TernaryWeight(weight, stored, form)
    assert torch.equal(trainable.stored(), stored)
    assert form.parameter(stored).shape == weight.shape


def test_a_group_without_trits_stays_so_until_it_is_trained() -> None:
    weight, stored = start(Form(32))
    stored[2, 32:] = 0
    assert torch.equal(TernaryWeight(weight, stored, Form(32)).stored(), stored)


def test_a_rotated_weight_is_rotated_back_for_the_block() -> None:
    form = Form(32, block=16, seed=3)
    weight, _ = start(form)
    assert torch.allclose(form.parameter(rotate(weight, 16, 3)), weight, atol=1e-6)


def test_gradients_go_straight_through_the_rounding() -> None:
    weight, stored = start(Form(32))
    trainable = TernaryWeight(weight, stored, Form(32))
    sensitivity = torch.randn(10, 64)
    (trainable.stored() * sensitivity).sum().backward()  # type: ignore[no-untyped-call]
    ratio = trainable.latent.detach() / spread_scales(trainable.scales().detach(), 64, 32)
    inside = ratio.abs() < 1.5
    assert trainable.latent.grad is not None
    assert torch.allclose(trainable.latent.grad, sensitivity * inside, atol=1e-6)


def test_the_gradient_of_a_scale_is_that_of_a_learned_step() -> None:
    # d (s t) / d s = t - V / s inside the clip, t outside; d s / d u = s
    weight, stored = start(Form(32))
    trainable = TernaryWeight(weight, stored, Form(32))
    sensitivity = torch.randn(10, 64)
    (trainable.stored() * sensitivity).sum().backward()  # type: ignore[no-untyped-call]
    level = spread_scales(trainable.scales().detach(), 64, 32)
    ratio = trainable.latent.detach() / level
    trits = ratio.round().clamp(-1, 1)
    slope = torch.where(ratio.abs() < 1.5, trits - ratio, trits)
    wanted = torch.unflatten(sensitivity * slope * level, -1, (-1, 32)).sum(-1)
    assert trainable.log_scale.grad is not None
    assert torch.allclose(trainable.log_scale.grad, wanted, atol=1e-5)


def test_the_gradient_of_a_scale_with_fixed_trits_is_the_finite_difference() -> None:
    weight, stored = start(Form(-1))
    trainable = TernaryWeight(weight, stored, Form(-1, scale_dtype="F32"))
    sensitivity, trits = torch.randn(10, 64).double(), stored.sign().double()

    def value(u: float) -> float:
        return float((trainable.start[0].double() * math.exp(u) * trits[0] * sensitivity[0]).sum())

    with torch.no_grad():  # latents on their trits: the rounding error, and so its slope, is zero
        trainable.latent.copy_(stored)
    (trainable.stored() * sensitivity).sum().backward()  # type: ignore[no-untyped-call]
    assert trainable.log_scale.grad is not None
    # d stored / d u at V = s t is 0: what V / s loses the scale gains
    assert torch.allclose(trainable.log_scale.grad, torch.zeros(10, 1), atol=1e-5)
    with torch.no_grad():  # far outside the clip only the scale moves the product
        trainable.latent.copy_(10 * stored)
    trainable.log_scale.grad = None
    (trainable.stored() * sensitivity * trits.abs()).sum().backward()  # type: ignore[no-untyped-call]
    difference = (value(1e-4) - value(-1e-4)) / 2e-4
    grad: Any = trainable.log_scale.grad
    assert float(grad[0, 0]) == pytest.approx(difference, rel=1e-3)


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far in 100 steps as otherwise in some thousands."""
    monkeypatch.setattr(reconstruction, "RATE", 0.03)
    monkeypatch.setattr(reconstruction, "SCALE_RATE", 0.02)


def train(form: Form, steps: int, shape: tuple[int, ...] = (10, 64)) -> tuple[Tensor, float, float]:
    """Train one matrix with a bias towards its float product; returns (stored, before, after)."""
    weight, stored = start(form, *shape)
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(16, shape[-1], generator=generator)  # inputs from a smaller space
    inputs = [1 + torch.randn(40, 16, generator=generator) @ mix for _ in range(6)]

    def product(x: Tensor, w: Tensor) -> Tensor:
        return x @ form.turn(w).transpose(-1, -2)

    def run(sample: int, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = inputs[sample]
        return product(x, values["w"]) + values["b"], product(x, weight)

    weights = {"w": TernaryWeight(weight, stored, form)}
    vectors = {"b": torch.zeros(shape[-2])}
    loss = huber(run, parameters(weights, vectors), [4, 5])
    found, vectors, before, after = reconstruct(
        weights, vectors, loss, [0, 1, 2, 3], [4, 5], steps, 0
    )
    with torch.no_grad():
        now = [run(i, {"w": form.parameter(found["w"]), "b": vectors["b"]}) for i in (4, 5)]
        sigma = math.sqrt(
            sum(float((y - t).square().mean()) for y, t in _start(form, weight, stored, inputs)) / 2
        )
        losses = [float(F.huber_loss(y / sigma, t / sigma)) for y, t in now]
    assert sum(losses) / 2 == pytest.approx(after, rel=1e-4), "the best state is not what is kept"
    return found["w"], before, after


def _start(
    form: Form, weight: Tensor, stored: Tensor, inputs: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    q = form.turn(form.parameter(stored)).transpose(-1, -2)
    w = form.turn(weight).transpose(-1, -2)
    return [(x @ q, x @ w) for x in inputs[4:]]


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_helps_on_samples_it_has_not_seen_and_stays_ternary(form: Form) -> None:
    stored, before, after = train(form, 100)
    assert after < 0.97 * before
    ternary = levels(form.turn(stored).contiguous(), form.group_size)
    assert ternary is not None, "not a ternary matrix"
    assert set(ternary.trits.flatten().tolist()) <= {-1, 0, 1}
    assert torch.equal(half(ternary.scales), ternary.scales.double()), "not as scales are stored"


@pytest.mark.usefixtures("_fast")
def test_experts_are_trained_each_with_its_own_scales() -> None:
    stored, before, after = train(Form(32), 100, (3, 10, 64))
    assert after < 0.97 * before
    assert levels(stored, 32) is not None


def test_a_training_that_only_harms_gives_back_the_start() -> None:
    weight, stored = start(Form(32))
    x = torch.randn(20, 64)
    best = x @ stored.T  # the start is perfect on held-out samples, and wrong in training

    def loss(sample: int, values: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(x @ values["w"].T, best if sample else best + 100)

    found, _, before, after = reconstruct(
        {"w": TernaryWeight(weight, stored, Form(32))}, {}, loss, [0], [1], 60, 0
    )
    assert torch.equal(found["w"], stored)
    assert after == before


def test_the_same_seed_trains_the_same_weights() -> None:
    first, again = train(Form(32), 30)[0], train(Form(32), 30)[0]
    assert torch.equal(first, again)
