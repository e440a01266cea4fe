"""Models made ones with latent weights: which layers, how they begin, what changes with time."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import ternarize.qat as qat
from ternarize.errors import SelectionError, UsageError
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe
from ternarize.qat.modules import Qat, latent_modules
from ternarize.trits.methods import itf

IDS = torch.arange(3, 35).view(2, 16)
RULES = ["learned", "absmean", "least-squares"]


def build(name: str = "llama") -> Any:
    return tiny_models.build(name, torch.float32)


def latents(model: nn.Module) -> list[tuple[str, Qat, str]]:
    return [(f"{p}.{leaf}", m, leaf) for p, m in latent_modules(model) for leaf in m.forms]


def zeros(module: Qat, leaf: str = "weight") -> int:
    trits, _ = module.trits_and_scales(leaf)
    return trits.numel() - int(trits.count_nonzero())


class Plain(nn.Module):
    """A network of nobody's: blocks, and a head that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


# --- which, and how they begin ---


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mixtral", "qwen3_moe", "t5", "bert", "vit", "neox"]
)
def test_what_a_conversion_takes_is_prepared(name: str, tmp_path: Path) -> None:
    model = tiny_models.save(name, tmp_path, torch.float32)
    plan = make_plan(tmp_path, Recipe("itf", 128))
    expected = {p for t in plan.tensors if t.ternary for p in t.choice.parameters}
    qat.prepare(model)
    assert {path for path, _, _ in latents(model)} == expected


@pytest.mark.parametrize("group_size", [32, 7, -1, 0])
def test_learned_scales_begin_as_those_of_itf(group_size: int) -> None:
    weights = dict(build().named_parameters())
    model = qat.prepare(build(), group_size=group_size)
    for name, module, leaf in latents(model):
        assert torch.equal(module.latent(leaf), weights[name])
        best = itf(weights[name].detach(), group_size)
        trits, scales = module.trits_and_scales(leaf)
        torch.testing.assert_close(scales.double(), best.scales, rtol=2**-11, atol=0)
        assert float((trits != best.trits).float().mean()) < 1e-3


def test_any_module_is_prepared_by_names() -> None:
    model = Plain()
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    qat.prepare(model, group_size=8, activations="int8")
    assert [name for name, _, _ in latents(model)] == [f"blocks.{i}.0.weight" for i in range(3)]
    model(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    with pytest.raises(SelectionError, match="has no linear layer to train"):
        qat.prepare(Plain(), keep=["blocks.*"])


def test_layers_of_torch_that_read_weights_themselves_read_rounded_ones_or_are_left() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    qat.prepare(model, group_size=8)
    names = [name for name, _, _ in latents(model)]
    assert names == ["layers.0.linear1.weight", "layers.0.linear2.weight"]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    trained = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)


def test_options_that_cannot_be_are_told_and_leave_the_model_as_it_was() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scale": "best"}, "scale: 'best'; expected one of learned, absmean, least-squares"),
        ({"estimator": "soft"}, "estimator: 'soft'; expected one of ste"),
        ({"activations": "int4"}, "activations: 'int4'"),
        ({"head": "int8"}, "head: 'int8'; expected one of keep, ternary"),
        ({"group_size": -2}, "group size: -2"),
        ({"scale_bits": 4}, "scale bits: 4"),
        ({"activations": "int8"}, "'int8', but model.layers.0.mlp.experts multiplies by"),
    ]
    for options, match in cases:
        model = build("mixtral")
        with pytest.raises(UsageError, match=match):
            qat.prepare(model, **options)
        assert not latents(model)
    with pytest.raises(SelectionError, match="matches no tensor"):
        qat.prepare(build(), keep=["*.nothing.*"])
    with pytest.raises(UsageError, match="has no weights that are trained.*prepare"):
        qat.Schedule(build())


# --- from nothing ---


@pytest.mark.parametrize("scale", RULES)
@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("init, share", [("uniform", 1 / 3), ("zeros", 0.7), ("variance", None)])
def test_weights_are_drawn_with_the_shares_and_variance_that_are_documented(
    scale: str, group_size: int, init: str, share: float | None
) -> None:
    model = qat.prepare(build(), scale=scale, group_size=group_size)
    parameters = {id(p) for p in model.parameters()}
    before = {name: module.latent(leaf).clone() for name, module, leaf in latents(model)}
    qat.initialize(model, init, zeros=0.7, seed=1)
    assert {id(p) for p in model.parameters()} == parameters  # an optimizer still has them
    found = []
    for name, module, leaf in latents(model):
        assert not torch.equal(module.latent(leaf), before[name])
        weight = module.rounded(leaf).detach()
        assert float(weight.square().sum(1).mean()) == pytest.approx(1, rel=0.03)
        found.append(zeros(module) / weight.numel())
        assert abs(float(weight.sign().mean())) < 0.1
    mean = sum(found) / len(found)
    if share is not None:
        assert mean == pytest.approx(share, abs=0.02)
    else:
        assert 0.3 < mean < 0.6
    again = qat.prepare(build(), scale=scale, group_size=group_size)
    qat.initialize(again, init, zeros=0.7, seed=1)
    for (_, a, leaf), (_, b, _) in zip(latents(model), latents(again), strict=True):
        assert torch.equal(a.rounded(leaf), b.rounded(leaf))


def test_drawing_leaves_embeddings_and_refuses_what_it_does_not_know() -> None:
    model: Any = qat.prepare(build("llama_tied"), embeddings="ternary")
    before = model.get_input_embeddings().weight.detach().clone()
    qat.initialize(model, "uniform")
    assert torch.equal(model.get_input_embeddings().weight, before)
    for init, share in (("normal", 0.5), ("zeros", 1.0), ("zeros", -0.1)):
        with pytest.raises(UsageError, match="init: .* expected one of uniform, zeros, variance"):
            qat.initialize(model, init, zeros=share)


# --- what changes with time ---


def test_a_warm_up_goes_from_the_dense_model_to_the_ternary_one() -> None:
    dense, model = build(), qat.prepare(build(), group_size=32)
    ternary = model(input_ids=IDS).logits
    schedule, far = qat.Schedule(model, warmup=0.5), []
    for done in (0.0, 0.125, 0.25, 0.375, 0.5, 1.0):
        schedule.at(done)
        far.append(float((model(input_ids=IDS).logits - ternary).detach().abs().max()))
        blends = [float(m.blend) if m.blend is not None else 1.0 for _, m, _ in latents(model)]
        assert blends == [min(1.0, done / 0.5)] * len(blends)
        if done == 0:
            assert torch.equal(model(input_ids=IDS).logits, dense(input_ids=IDS).logits)
    assert far == sorted(far, reverse=True) and far[0] > 0 == far[-1] == far[-2]


def test_soft_rounding_sharpens_and_is_hard_in_the_end_and_in_eval_mode() -> None:
    model: Any = qat.prepare(build(), estimator="tanh").train()
    module, schedule = model.model.layers[0].mlp.up_proj, qat.Schedule(model)
    seen = []
    for done in (0.0, 0.45, 0.8999):
        schedule.at(done)
        seen.append(float(module.sharpness))
        assert module.rounded("weight").unique().numel() > 1000
    assert seen == pytest.approx([1, math.sqrt(60), 60], rel=1e-3)
    soft = module.rounded("weight")
    model.eval()
    hard = module.rounded("weight")
    assert not torch.equal(soft, hard)
    schedule.at(1)
    assert module.sharpness is None and torch.equal(module.train().rounded("weight"), hard)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_share_of_zeros_is_ramped_to_and_met_to_within_one_weight(
    name: str, share: float
) -> None:
    model = qat.prepare(build(name), group_size=7)
    natural = [zeros(m, leaf) / m.latent(leaf).numel() for _, m, leaf in latents(model)]
    schedule = qat.Schedule(model, zeros=share, ramp=0.5)
    for done, part in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0)):
        schedule.at(done)
        for start, (_, module, leaf) in zip(natural, latents(model), strict=True):
            expected = start + part * (share - start)
            assert zeros(module, leaf) / module.latent(leaf).numel() == pytest.approx(
                expected, abs=0.03
            )
    schedule.at(1)
    for _, module in latent_modules(model):
        numel = sum(module.latent(leaf).numel() for leaf in module.forms)
        assert abs(sum(zeros(module, leaf) for leaf in module.forms) - share * numel) <= 1


def test_a_least_share_leaves_the_zeros_of_rounding() -> None:
    model = qat.prepare(build(), group_size=7)
    natural = [zeros(module, leaf) for _, module, leaf in latents(model)]
    schedule = qat.Schedule(model, zeros=0.1, ramp=0.5, least=True)
    for done in (0.25, 0.75, 1.0):
        schedule.at(done)
        assert [zeros(module, leaf) for _, module, leaf in latents(model)] == natural
    assert min(natural) > 0


def test_a_schedule_refuses_what_is_no_share() -> None:
    model = qat.prepare(build())
    cases: list[dict[str, Any]] = [
        {"warmup": 1.5},
        {"zeros": 1.0},
        {"ramp": -0.1},
        {"sharpen": 2.0},
    ]
    for options in cases:
        with pytest.raises(UsageError, match=f"{next(iter(options))}: .*; expected a share"):
            qat.Schedule(model, **options)
