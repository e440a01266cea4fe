"""A rotation folded into the weights: the model computes the same, with nothing left for run time.

The oracle is transformers: the folded checkpoint, written as an ordinary one, is run by the class
of the source, and must give its logits.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import ternarize
from ternarize import qat
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import TernarizeError
from ternarize.files.checkpoint import Checkpoint
from ternarize.models.configuration import config_from
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe, Train
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.sources.folded import folded
from ternarize.train import run as train_run
from ternarize.trits.rotation import rotate, signs, turn

IDS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(3))


def _of(kind: str, **more: Any) -> Any:
    sizes = {**tiny_models.TEXT, **more, "architectures": [f"{kind.split('Text')[0]}ForCausalLM"]}
    if kind == "Phi3":
        del sizes["head_dim"]
    return getattr(transformers, f"{kind}Config")(**sizes)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _of("Llama"),
    "tied": lambda: _of("Llama", tie_word_embeddings=True),
    "biases": lambda: _of("Llama", attention_bias=True, mlp_bias=True),
    "odd widths": lambda: _of("Llama", hidden_size=72, head_dim=24),
    "mistral": lambda: _of("Mistral"),
    "qwen2": lambda: _of("Qwen2"),
    "qwen3": lambda: _of("Qwen3"),
    "phi3": lambda: _of("Phi3"),
    "mixtral": lambda: _of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: _of(
        "Qwen3Moe", moe_intermediate_size=40, num_experts=4, num_experts_per_tok=2
    ),
    "gemma3": lambda: _of("Gemma3Text", sliding_window=16, query_pre_attn_scalar=16),
}


def make_source(directory: Path, config: Any) -> Path:
    """A model whose gains and biases are far from 1 and 0."""
    model = getattr(transformers, config.architectures[0])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            base = 1.0 if "norm" in name else 0.0
            parameter.copy_(base + (0.1 if parameter.ndim > 1 else 0.4) * noise)
    model.save_pretrained(directory)
    return directory


def _named(directory: Path, name: str, value: Tensor) -> Path:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    top = tmp_path_factory.mktemp("sources")

    def make(name: str) -> Path:
        path = top / name
        return path if path.exists() else make_source(path, MODELS[name]())

    return make


def write(checkpoint: Checkpoint, directory: Path) -> Path:
    """A checkpoint behind a face of another, as an ordinary one in float32."""
    directory.mkdir()
    config_from(checkpoint.config or {}).save_pretrained(directory)
    state = {n: checkpoint.read(n).view(i.shape).clone() for n, i in checkpoint.tensors.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logits(directory: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


# --- the same model ---


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_computes_the_same(
    name: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(sources(name))
    found = folded(source, 5)
    expected = logits(sources(name))
    same = logits(write(found, tmp_path / "folded"))
    assert float((same - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
    # and not by doing nothing
    for tensor in ("self_attn.o_proj.weight", "self_attn.v_proj.weight"):
        if (each := f"model.layers.1.{tensor}") in source.tensors:
            assert not torch.allclose(found.read(each), source.read(each), atol=0.05)
    norm = "model.layers.1.input_layernorm.weight"
    assert bool((found.read(norm) == 1).all()) == (name != "gemma3")
    assert bool(found.notes) == (name in ("tied", "gemma3"))


def test_a_part_of_a_tensor_is_a_part_of_the_whole(sources: Callable[[str], Path]) -> None:
    found, pick = folded(open_checkpoint(sources("phi3")), 5), random.Random(0)
    for name, info in found.tensors.items():
        whole = found.read(name)
        for _ in range(4):
            start = pick.randrange(info.numel)
            stop = pick.randrange(start, info.numel) + 1
            assert torch.equal(found.read(name, start, stop), whole[start:stop]), name


def test_only_the_tied_head_is_new(sources: Callable[[str], Path]) -> None:
    source = open_checkpoint(sources("tied"))
    found = folded(source, 0)
    assert found.tensors.keys() - source.tensors.keys() == {"lm_head.weight"}
    assert found.config is not None and found.config["tie_word_embeddings"] is False
    assert source.config is not None and source.config["tie_word_embeddings"] is True
    assert found.stored_bytes == source.stored_bytes
    gain = source.read("model.norm.weight")
    embedding, head = (
        found.read(n).view(160, -1) for n in ("model.embed_tokens.weight", "lm_head.weight")
    )
    # both are rows of the same rotation: products with each other tell the gain alone
    rows = source.read("model.embed_tokens.weight").view(160, -1)
    assert torch.allclose(head @ embedding.mT, (rows * gain) @ rows.mT, atol=1e-4)


def test_a_head_that_is_stored_is_not_tied_whatever_the_config_says(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(sources("tied"), tmp_path / "source")
    _named(directory, "lm_head.weight", torch.randn(160, 64).to(torch.float16))
    source = open_checkpoint(directory)
    found = folded(source, 0)
    assert found.config is not None and found.config["tie_word_embeddings"] is False
    assert found.tensors == source.tensors and not found.notes
    expected = logits(directory)
    assert not torch.allclose(expected, logits(sources("tied")), atol=1)
    assert torch.allclose(logits(write(found, tmp_path / "folded")), expected, atol=1e-3)


def test_norms_on_what_is_written_leave_the_stream_as_it_is(sources: Callable[[str], Path]) -> None:
    source = open_checkpoint(sources("gemma3"))
    found = folded(source, 0)
    assert {name.split(".")[-2] for name in found.turns} == {"v_proj", "o_proj"}
    assert "post_attention_layernorm" in found.notes[-1]


def test_a_turn_is_the_rotation_of_the_format(sources: Callable[[str], Path]) -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(turn(x, signs(128, 7), 64), rotate(x, 64, 7))
    assert torch.allclose(turn(x, signs(128, 7), 32).square().sum(-1), x.square().sum(-1))


# --- converted ---


def test_a_conversion_folds_what_a_folded_checkpoint_would_be(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = sources("tied")
    other = write(folded(open_checkpoint(source), 0), tmp_path / "folded")
    record = convert(source, tmp_path / "packed", Recipe("itf", 32, fold=True, head="int8"))
    convert(other, tmp_path / "expected", Recipe("itf", 32, head="int8"))
    found, expected = (packing.read_checkpoint(tmp_path / n) for n in ("packed", "expected"))
    assert found.keys() == expected.keys() and "lm_head.weight_scale" in found
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert record["recipe"]["fold"] is True and any("two tensors" in n for n in record["notes"])
    compared = verify(tmp_path / "packed", source)["compared"]
    assert compared["converted_again"] == len(record["tensors"])
    ternarize.load(tmp_path / "packed")


def test_kept_weights_have_the_dtype_of_the_source(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "source", torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "packed", Recipe("itf", 32, fold=True))
    stored = packing.read_checkpoint(tmp_path / "packed")
    source = open_checkpoint(tmp_path / "source")
    embedding = "model.embed_tokens.weight"
    exact = folded(source, 0).read(embedding).view(stored[embedding].shape)
    assert torch.equal(stored[embedding], exact.to(torch.bfloat16))


def test_another_source_is_told(sources: Callable[[str], Path], tmp_path: Path) -> None:
    convert(sources("llama"), tmp_path / "packed", Recipe("itf", 32, fold=True))
    gain = "model.layers.1.post_attention_layernorm.weight"
    other = _named(make_source(tmp_path / "other", MODELS["llama"]()), gain, torch.ones(64))
    with pytest.raises(TernarizeError, match="layers.1.mlp.*is not what .* gives"):
        verify(tmp_path / "packed", other)


# --- refused ---


def test_what_is_not_known_to_commute_is_refused(tmp_path: Path) -> None:
    tiny_models.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(TernarizeError, match=r"GPT2LMHeadModel, of which .* \(--fold\)"):
        convert(tmp_path / "gpt2", tmp_path / "out", Recipe(fold=True))
    extra = make_source(tmp_path / "extra", MODELS["llama"]())
    _named(extra, "model.layers.0.self_attn.sinks.weight", torch.ones(4))
    with pytest.raises(TernarizeError, match="sinks.weight.*is no tensor of which it is known"):
        convert(extra, tmp_path / "out", Recipe(fold=True))
    assert not (tmp_path / "out").exists()


def test_a_gain_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", MODELS["llama"]())
    _named(source, "model.layers.1.input_layernorm.weight", torch.full((64,), torch.nan))
    with pytest.raises(TernarizeError, match="layers.1.input_layernorm.weight: .*NaN or inf"):
        convert(source, tmp_path / "out", Recipe(fold=True))
    assert not (tmp_path / "out").exists()


def test_ternary_weights_are_not_turned(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", MODELS["llama"]())
    name = "model.layers.1.mlp.up_proj.weight"
    _named(source, name, torch.randint(-1, 2, (136, 64)).float())
    with pytest.raises(TernarizeError, match="up_proj.weight: is ternary already"):
        convert(source, tmp_path / "out", Recipe(fold=True))


def test_what_reads_the_source_as_it_is_does_not_go_with_it(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(TernarizeError, match="fold: beside a training"):
        Recipe("itf", fold=True, train=Train(texts=("x",), steps=1))
    with pytest.raises(TernarizeError, match="fold: beside a training"):
        Recipe("gptq", fold=True, calibrate=Calibrate(distill=1))
    with pytest.raises(TernarizeError, match="--stream"):
        convert("user/model", tmp_path / "out", Recipe(fold=True), stream=True)


def test_a_training_does_not_start_from_a_folded_model(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(sources("llama"), tmp_path / "packed", Recipe("itf", 32, fold=True))
    train = Train(texts=("x",), steps=1, start=str(tmp_path / "packed"))
    plan = make_plan(sources("llama"), Recipe("itf", 32, train=train))
    with pytest.raises(TernarizeError, match="was converted with --fold"):
        train_run._of_packed(str(tmp_path / "packed"), plan.tensors)


def test_a_preparation_does_not_start_from_a_folded_model(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(sources("tied"), tmp_path / "packed", Recipe("itf", 32, fold=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(sources("tied"))
    with pytest.raises(TernarizeError, match="was converted with --fold"):
        qat.prepare(model, start=tmp_path / "packed")
