"""Fused experts compute what dense experts with the same weights compute."""

import copy
import io
import threading
from typing import Any

import pytest
import torch
from test_linear import GROUP_SIZES, random
from torch import Tensor, nn
from torch.nn import functional as F

from ternarize.errors import UsageError
from ternarize.files import container
from ternarize.runtime.forms import Layout
from ternarize.runtime.modules.experts import TernaryExperts, dense_experts, ternary_experts
from ternarize.runtime.modules.matrix import PackedMatrix
from ternarize.runtime.products import rounded_linear
from ternarize.trits import base3
from ternarize.trits.methods.absmean import absmean


class Looping(nn.Module):
    """Experts as most models write them: one at a time, and only those that are hit."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(random(4, 24, 40).to(dtype))
        self.down_proj = nn.Parameter(random(4, 40, 24, seed=1).to(dtype))

    def act(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in torch.unique(experts):
            hit = experts == expert
            inner = self.act(F.linear(x[hit], self.up_proj[expert]))
            y[hit] = F.linear(inner, self.down_proj[expert])
        return y


class Transposed(Looping):
    """Experts that store their matrices as (cols, rows), as GPT-OSS does."""

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in torch.unique(experts):
            hit = experts == expert
            y[hit] = self.act(x[hit] @ self.down_proj[expert]) @ self.up_proj[expert]
        return y


class AtOnce(Looping):
    """Experts that multiply by all matrices at once, as Llama 4 does."""

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        x = x.view(self.down_proj.shape[0], -1, x.shape[-1])
        return torch.bmm(torch.bmm(x, self.down_proj), self.up_proj).flatten(0, 1)


def packed_and_dense(
    cls: type[Looping],
    activations: str = "none",
    group_size: int = 32,
    rotation: tuple[int, int] = (0, 0),
) -> tuple[TernaryExperts, Looping]:
    """The same experts twice: with packed parameters, and dense with the dequantized ones."""
    transposed = cls is not Looping
    experts, dense = cls(), cls()
    stored: dict[str, tuple[Tensor, Tensor]] = {}
    parameters = {}
    for name, weight in dense.named_parameters():
        matrix = weight.data.mT.contiguous() if transposed else weight.data
        packed, scale = stored[name] = container.encode(absmean(matrix, group_size))
        layout = Layout(matrix.shape[-1], group_size, transposed, activations, rotation=rotation)
        parameters[name] = layout, scale.shape[-2], scale.dtype
        weight.data = PackedMatrix(packed, scale, layout, torch.float32).dense()
    ternary_experts(experts, parameters)
    for name, (packed, scale) in stored.items():
        getattr(experts, name).data, getattr(experts, f"{name}_scale").data = packed, scale
    assert isinstance(experts, TernaryExperts)
    return experts, dense


X, HIT = random(6, 40, seed=5), torch.tensor([0, 2, 2, 0, 2, 0])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("cls", [Looping, Transposed, AtOnce])
def test_experts_equal_dense_experts(cls: type[Looping], group_size: int) -> None:
    experts, dense = packed_and_dense(cls, group_size=group_size)
    x = X[:4] if cls is AtOnce else X
    y = experts(x, HIT[: len(x)])
    if cls is Transposed:  # x @ W and F.linear(x, W^T) may sum in another order
        assert torch.allclose(y, dense(x, HIT), atol=1e-5)
    else:
        assert torch.equal(y, dense(x, HIT[: len(x)]))


@pytest.mark.parametrize("cls", [Looping, Transposed, AtOnce])
def test_rotated_experts_equal_dense_experts(cls: type[Looping]) -> None:
    experts, dense = packed_and_dense(cls, rotation=(4, 5))
    plain, _ = packed_and_dense(cls)
    x = (X[:4] if cls is AtOnce else X).clone().requires_grad_()
    hit = HIT[: len(x)]
    y, expected = experts(x, hit), dense(x, hit)
    assert torch.allclose(y, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    assert not torch.allclose(y, plain(x, hit), rtol=0.1)
    (ours,), (theirs,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, expected))
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    dense_experts(experts, torch.float32)
    for name, parameter in dense.named_parameters():
        assert torch.equal(getattr(experts, name), parameter)


def test_only_experts_that_are_hit_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, _ = packed_and_dense(Looping)
    calls = []
    dequantize = base3.dequantize_base3

    def counted(packed: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(packed.shape)
        return dequantize(packed, *rest, **options)

    monkeypatch.setattr(base3, "dequantize_base3", counted)
    experts(X, HIT)
    assert [tuple(shape)[0] for shape in calls] == [24, 40, 24, 40]  # experts 0 and 2, one by one


def test_experts_stay_packed_while_they_run_in_many_threads() -> None:
    experts, dense = packed_and_dense(Looping)
    expected = dense(X, HIT)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(experts(X, HIT), expected):
                wrong.append("output")
            if experts.up_proj.dtype != torch.uint8:
                wrong.append("parameter")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_int8_activations_reach_the_experts() -> None:
    experts, dense = packed_and_dense(Looping, "int8")
    expected = torch.zeros_like(X)
    for expert in (0, 2):
        hit = expert == HIT
        inner = rounded_linear(X[hit], dense.up_proj[expert]).relu()
        expected[hit] = rounded_linear(inner, dense.down_proj[expert])
    assert torch.equal(experts(X, HIT), expected)
    assert not torch.equal(experts(X, HIT), dense(X, HIT))
    other, dense = packed_and_dense(Transposed, "int8")
    assert (other(X, HIT) - dense(X, HIT)).abs().max() > 0


def test_int8_activations_are_refused_where_products_cannot_be_seen() -> None:
    experts, _ = packed_and_dense(AtOnce, "int8")
    with pytest.raises(UsageError, match="multiplies by all experts at once"):
        experts(X[:4], HIT[:4])


def test_experts_are_dense_again_after_the_inverse() -> None:
    for cls in (Looping, Transposed):
        experts, dense = packed_and_dense(cls)
        dense_experts(experts, torch.float32)
        assert experts.__class__.__name__ == cls.__name__
        for name, parameter in dense.named_parameters():
            assert torch.equal(getattr(experts, name), parameter)
        assert experts.state_dict().keys() == dense.state_dict().keys()


def test_experts_can_be_copied_and_pickled() -> None:
    experts, _ = packed_and_dense(Looping)
    buffer = io.BytesIO()
    torch.save(experts, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(experts), torch.load(buffer, weights_only=False)):
        assert isinstance(other, Looping) and isinstance(other, TernaryExperts)
        assert torch.equal(other(X, HIT), experts(X, HIT))


def test_gradients_flow_through_experts() -> None:
    experts, dense = packed_and_dense(Looping)
    x = X.clone().requires_grad_()
    (ours,) = torch.autograd.grad(experts(x, HIT).square().sum(), x)
    (theirs,) = torch.autograd.grad(dense(x, HIT).square().sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-4)
