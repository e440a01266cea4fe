"""Heads and embeddings that are rounded when their rows are used: what learns is what is stored."""

from pathlib import Path
from typing import Any

import packing
import pytest
import torch
from test_train_run import (  # noqa: F401
    Killed,
    Seen,
    _few_looks,
    assert_learnt,
    assert_measured,
    assert_same,
    killed_at,
    llama,
    recipe_of,
    saving,
    seen,
    source_of,
    text_of,
)
from torch import Tensor, nn

from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import UsageError
from ternarize.files.container import ROUNDED
from ternarize.qat import modules
from ternarize.qat.prepare import begin, begin_numbers, insert
from ternarize.qat.rounding import Form, stepped
from ternarize.train import losses, sources
from ternarize.trits.ternary import scaled, spread_scales

ROWS, COLS, GROUP = 30, 40, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tied(codec: str, *, latent: bool, group_size: int = GROUP) -> tuple[Any, Tensor, Tensor]:
    """A model whose head and embedding share a rounded weight; its numbers and scales."""
    model: Any = nn.Module()
    model.embed, model.head = nn.Embedding(ROWS, COLS), nn.Linear(COLS, ROWS, bias=False)
    model.head.weight = model.embed.weight
    weight = random(ROWS, COLS) * 0.05
    weight[3, :GROUP] = 0  # a group of zeros alone
    model.embed.weight.data = weight
    model.embed.weight.requires_grad_(False)
    names = ["embed.weight", "head.weight"]
    if codec == "base3":
        insert(model, dict.fromkeys(names, Form(group_size)))
        begin(model, names[0], weight)
        return model, *model.embed.trits_and_scales("weight")
    insert(model, dict.fromkeys(names, Form(group_size, codec=codec)))
    numbers, scales = ROUNDED[codec][1](weight, group_size, torch.float16)
    begin_numbers(model, names[0], numbers, scales, weight if latent else None)
    return model, numbers, scales


CODECS = pytest.mark.parametrize("codec", ["int8", "int4"])
LATENT = pytest.mark.parametrize("latent", [False, True], ids=["numbers", "latent"])


@CODECS
@LATENT
@pytest.mark.parametrize("group_size", [GROUP, -1])
def test_what_is_begun_with_is_used_and_stored_to_the_bit(
    codec: str, latent: bool, group_size: int
) -> None:
    model, numbers, scales = tied(codec, latent=latent, group_size=group_size)
    assert bool((scales < 0).any()) == (codec == "int4")
    wanted = scaled(numbers, scales.float(), group_size)
    for module in (model.embed, model.head):
        assert torch.equal(module.rounded("weight"), wanted)
        q, found = module.numbers_and_scales("weight")
        assert q.dtype == torch.int8 and int(q.min()) >= (-8 if codec == "int4" else -127)
        assert int(q.max()) <= (7 if codec == "int4" else 127)
        assert found.dtype == torch.float16 and torch.equal(found.abs(), scales.abs())
        assert torch.equal(scaled(q, found.float(), group_size), wanted)
    assert model.embed.weight is model.head.weight
    assert model.embed.weight.requires_grad == latent
    other, _, _ = tied(codec, latent=latent, group_size=group_size)
    other.head.set_numbers("weight", -numbers.clamp(min=-7), scales)
    assert torch.equal(
        other.embed.rounded("weight"), scaled(-numbers.clamp(min=-7), scales.float(), group_size)
    )


@pytest.mark.parametrize("codec", ["int8", "int4", "base3"])
@LATENT
def test_rows_that_are_looked_up_are_those_of_the_whole(codec: str, latent: bool) -> None:
    model, _, _ = tied(codec, latent=latent)
    ids = torch.tensor([[3, 29, 3], [0, 7, 11]])
    given = random(2, 3, COLS, seed=2)
    gradients = []
    for rows in (model.embed(ids), model.head.rounded("weight")[ids]):
        model.zero_grad()
        rows.backward(given)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.equal(model.embed(ids), model.head.rounded("weight")[ids])
    assert len(gradients[0]) == (2 if latent or codec == "base3" else 1)
    for one, other in zip(*gradients, strict=True):
        assert one is not None and torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    touched = gradients[0][-1].abs().sum(-1) > 0
    assert set(touched.nonzero().flatten().tolist()) <= {0, 3, 7, 11, 29}


@CODECS
def test_gradients_are_those_of_a_learned_step(codec: str) -> None:
    form = Form(GROUP, codec=codec)
    latent, given = random(5, COLS), random(5, COLS, seed=1)
    most = torch.stack([part.abs().amax(1) for part in torch.split(latent, GROUP, 1)], 1)
    scales = most / (100 if codec == "int8" else 6.2)  # of int4 some are cut on the shorter side
    wide = spread_scales(scales, COLS, GROUP)
    leaves = latent.clone().requires_grad_(), scales.clone().requires_grad_()
    value = stepped(*leaves, form)
    torch.autograd.backward(value, given)
    sides = torch.stack(
        [(p.amax(1) > -p.amin(1)).float() for p in torch.split(latent, GROUP, 1)], 1
    )
    up = spread_scales(sides, COLS, GROUP)
    low, high = (-127, 127) if codec == "int8" else (-8 + up, 7 + up)
    ratio = latent / wide
    numbers = torch.minimum(torch.maximum(ratio, torch.as_tensor(low)), torch.as_tensor(high))
    inside = (numbers == ratio).float()
    numbers = numbers.round()
    assert torch.equal(value.detach(), numbers * wide)
    assert torch.allclose(leaves[0].grad, inside * given)  # type: ignore[arg-type]
    by_weight = given * (numbers - ratio * inside)
    slopes = torch.stack([part.sum(1) for part in torch.split(by_weight, GROUP, 1)], 1)
    assert torch.allclose(leaves[1].grad, slopes, atol=1e-3)  # type: ignore[arg-type]
    # numbers that stay: the slope is the number
    stays = scales.clone().requires_grad_()
    torch.autograd.backward(stepped(numbers.to(torch.int8), stays, form), given)
    slopes = torch.stack([part.sum(1) for part in torch.split(given * numbers, GROUP, 1)], 1)
    assert torch.allclose(stays.grad, slopes, rtol=1e-4)  # type: ignore[arg-type]


# --- trainings -----------------------------------------------------------------------------------


def test_a_step_rounds_the_rows_that_it_uses_alone(
    llama: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name, size in (
        (losses, "ALL_WORDS", 50),
        (sources, "ALL_WORDS", 50),
        (losses, "OTHERS", 20),
        (losses, "MULTIPLE", 1),
        (sources, "COMMON", 16),
    ):
        monkeypatch.setattr(module, name, size)
    counted: list[tuple[int, bool]] = []

    def count(latent: Tensor, *rest: Any) -> Tensor:
        counted.append((latent.numel() // latent.shape[-1], torch.is_grad_enabled()))
        return stepped(latent, *rest)

    monkeypatch.setattr(modules, "stepped", count)
    source, text = llama
    convert(source, tmp_path / "packed", recipe_of(text, head="int4", embeddings="int8", steps=3))
    rows = [each for each, learning in counted if learning]
    assert len(rows) >= 6 and max(rows) < 160, "of 160 words"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama_tied", {"head": "int4"}),
        ("llama_tied", {"head": "int8", "all_weights": True}),
        ("llama_tied", {"embeddings": "ternary"}),
        ("llama", {"head": "int4", "embeddings": "int8", "all_weights": True}),
        ("llama", {"head": "ternary", "embeddings": "int4"}),
        ("gemma3_text", {"head": "int4"}),
        ("bert", {"embeddings": "int4"}),
        ("t5", {"embeddings": "int4"}),
    ],
    ids=str,
)
def test_ends_are_learnt_and_saved_as_they_were_measured(
    name: str,
    options: dict[str, Any],
    tmp_path: Path,
    seen: Seen,  # noqa: F811
) -> None:
    source = source_of(name, tmp_path / "source", torch.bfloat16)
    text = text_of(tmp_path / "text.txt")
    record = convert(source, tmp_path / "packed", recipe_of(text, steps=24, **options))
    assert_learnt(record)
    assert_measured(tmp_path / "packed", seen)
    rounded = [row for row in record["tensors"].values() if row["becomes"] in ("int8", "int4")]
    assert all(row["fitted"] for row in rounded)
    plain = convert(source, tmp_path / "plain", recipe_of(text, steps=1, lr=0.0, **options))
    for row in rounded:
        at = next(name for name, each in record["tensors"].items() if each is row)
        assert row["sha256"] != plain["tensors"][at]["sha256"], "nothing was learnt"
    verify(tmp_path / "packed", None)
    verify(tmp_path / "packed", source)


@pytest.mark.slow
@pytest.mark.usefixtures("saving")
def test_trained_ends_go_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = source_of("llama_tied", tmp_path / "source"), text_of(tmp_path / "text.txt")
    for options in ({"head": "int4"}, {"head": "int4", "all_weights": True}):
        recipe = recipe_of(text, **options)
        whole, broken = (tmp_path / f"{each}{len(options)}" for each in ("whole", "broken"))
        convert(source, whole, recipe)
        with monkeypatch.context() as patch:
            clip = torch.nn.utils.clip_grad_norm_
            patch.setattr(torch.nn.utils, "clip_grad_norm_", killed_at(5, clip))
            with pytest.raises(Killed):
                convert(source, broken, recipe)
        convert(source, broken, recipe)
        assert_same(broken, whole)


@pytest.mark.slow
def test_a_training_can_begin_where_the_head_is_dense(
    llama: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source, text = llama
    first, second, third = (tmp_path / each for each in ("first", "second", "third"))
    convert(source, first, recipe_of(text))
    ends = {"head": "int4", "embeddings": "int8"}
    found = convert(source, second, recipe_of(text, start=str(first), **ends))
    rows = [found["tensors"][n] for n in ("lm_head.weight", "model.embed_tokens.weight")]
    assert [row["becomes"] for row in rows] == ["int4", "int8"]
    # what its scales have learnt is where the next one begins
    record = convert(source, third, recipe_of(text, start=str(second), steps=1, lr=0.0, **ends))
    before = found["training"]
    kept = dict(map(tuple, before["held_out"]))[before["kept_step"]]
    assert record["training"]["held_out"][0][1] == pytest.approx(kept, rel=1e-4)
    for start, options in ((second, {}), (second, {"head": "int8", "embeddings": "int8"})):
        with pytest.raises(UsageError, match=r"lm_head.weight is int4 there; expected (kept|int8)"):
            convert(source, tmp_path / "other", recipe_of(text, start=str(start), **options))
    with pytest.raises(UsageError, match=r"lm_head.weight is kept there; expected ternary"):
        convert(source, tmp_path / "other", recipe_of(text, start=str(first), head="ternary"))


@pytest.mark.slow
def test_what_an_earlier_training_moved_is_where_the_next_begins(
    llama: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source, text = llama
    first, second = tmp_path / "first", tmp_path / "second"
    convert(source, first, recipe_of(text, all_weights=True))
    convert(source, second, recipe_of(text, start=str(first), steps=1, lr=0.0))
    before, after = (packing.read_checkpoint(each) for each in (first, second))
    name = "model.embed_tokens.weight"
    assert not torch.equal(before[name], packing.read_checkpoint(source)[name])
    assert torch.equal(after[name], before[name])
    ends = {"head": "int4", "embeddings": "int4"}
    with pytest.raises(UsageError, match=r"weight is kept, as it was trained, there"):
        convert(source, tmp_path / "other", recipe_of(text, start=str(first), **ends))
