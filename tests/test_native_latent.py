"""Latent weights in the compiled core: the numbers of their definition, and of the torch twin."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_native import CPUS, DTYPES, GROUP_SIZES, every_cpu, every_kind, native
from torch import Tensor

from ternarize import native as core
from ternarize.qat.rounding import EDGE, Form, ternarized

SHAPES = [(1, 1), (3, 5), (7, 130), (5, 256), (2, 1000)]
every_group_size = pytest.mark.parametrize("group_size", [size for size in GROUP_SIZES if size])


@pytest.fixture(autouse=True)
def restore_cpu() -> Iterator[None]:
    yield
    native.use_cpu(CPUS[-1])


def weights(rows: int, cols: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latent weights, some on a threshold or an edge; scales; and the scale of each weight."""
    generator = torch.Generator().manual_seed(rows * cols + group_size)
    length = cols if group_size < 0 else group_size
    scales = torch.rand(rows, -(-cols // length), generator=generator) + 0.25
    wide = scales.repeat_interleave(length, 1)[:, :cols]
    latent = torch.randn(rows, cols, generator=generator)
    special = torch.tensor([0.0, -0.0, 0.5, -0.5, EDGE, -EDGE])
    chosen = torch.randint(12, (rows, cols), generator=generator)
    latent = torch.where(chosen < 6, special[chosen.clamp(max=5)] * wide, latent)
    return latent, scales, wide


@every_cpu
@every_kind
@every_group_size
def test_a_latent_weight_is_read_as_defined(cpu: str, kind: Any, group_size: int) -> None:
    native.use_cpu(cpu)
    for rows, cols in SHAPES:
        latent, scales, wide = weights(rows, cols, group_size)
        out = torch.empty(rows, cols, dtype=DTYPES[kind])
        native.read_latent(latent, scales, group_size, out, kind, 3)
        expected = torch.where(latent.abs() > wide / 2, latent.sign() * wide, 0)
        assert torch.equal(out, expected.to(DTYPES[kind]))
        assert torch.equal(out.signbit(), latent.signbit())


@every_cpu
@every_kind
@every_group_size
def test_gradients_of_latent_weights_are_as_defined(cpu: str, kind: Any, group_size: int) -> None:
    native.use_cpu(cpu)
    for rows, cols in SHAPES:
        latent, scales, wide = weights(rows, cols, group_size)
        given = torch.randn(rows, cols).to(DTYPES[kind])
        outs = torch.empty(rows, cols), torch.empty(scales.shape)
        native.latent_gradients(latent, scales, group_size, given, kind, EDGE, *outs, 3)
        inside = torch.where((latent / wide).abs() < EDGE, given.float(), 0)
        assert torch.equal(outs[0], inside)
        trits = torch.where(latent.abs() > wide / 2, latent.sign(), 0).double()
        each = trits * given.double() - (latent / wide).double() * inside.double()
        length = cols if group_size < 0 else group_size
        sums = torch.stack([part.sum(1) for part in torch.split(each, length, 1)], 1)
        torch.testing.assert_close(outs[1].double(), sums, rtol=1e-5, atol=1e-5)


def test_every_cpu_and_number_of_threads_gives_the_same_bits() -> None:
    latent, scales, _ = weights(2500, 1000, 64)
    given = torch.randn(2500, 1000).to(torch.bfloat16)
    found = []
    for cpu in CPUS:
        native.use_cpu(cpu)
        for threads in (1, 5):
            outs = torch.empty(2500, 1000), torch.empty(scales.shape)
            native.latent_gradients(latent, scales, 64, given, "BF16", EDGE, *outs, threads)
            found.append(torch.cat([each.flatten() for each in outs]))
    assert all(torch.equal(found[0], each) for each in found[1:])


@pytest.mark.parametrize("estimator", ["clipped", "ste"])
@every_kind
def test_the_torch_twin_gives_the_same(
    kind: str, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for lib in (core.lib, None):
        monkeypatch.setattr(core, "lib", lib)
        latent, scales, _ = weights(6, 300, 64)
        latent, scales = latent.view(2, 3, 300), scales.view(2, 3, -1)  # a stack, as of experts
        leaves = [each.clone().requires_grad_() for each in (latent, scales)]
        form = Form(64, estimator=estimator)
        value = ternarized(leaves[0], leaves[1], form, dtype=DTYPES[kind])
        generator = torch.Generator().manual_seed(0)
        given = torch.randn(latent.shape, generator=generator).to(DTYPES[kind])
        value.backward(given)  # type: ignore[no-untyped-call]
        grads = [each.grad for each in leaves if each.grad is not None]
        found.append((value.detach(), *grads))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5)


def test_wrong_shapes_and_one_scale_for_all_are_refused() -> None:
    latent, out = torch.zeros(4, 10), torch.zeros(4, 10)
    with pytest.raises(ValueError, match=r"scales: shape is \[4, 3\]; expected \[4, 2\]"):
        native.read_latent(latent, torch.ones(4, 3), 5, out, "F32", 1)
    with pytest.raises(ValueError, match="group_size is 0"):
        native.read_latent(latent, torch.ones(1, 1), 0, out, "F32", 1)
    with pytest.raises(ValueError, match="out: dtype"):
        native.read_latent(latent, torch.ones(4, 2), 5, out, "BF16", 1)
    sums = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"to_scales: shape is \[4, 3\]"):
        native.latent_gradients(latent, torch.ones(4, 2), 5, out, "F32", EDGE, out, sums, 1)
