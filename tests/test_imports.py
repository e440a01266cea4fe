"""Ternary models of others: what comes in is what their own runtime multiplies with.

The oracles are transformers' own classes and functions for the layouts that it has, and numpy for
MLX's. Sources are made here, in the exact layouts that are published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_evaluate import word_tokenizer
from torch import Tensor, nn
from transformers.integrations import bitnet as theirs

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, TernarizeError
from ternarize.measure.evaluate import evaluate
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe
from ternarize.publish.export import export
from ternarize.publish.export.common import open_verified
from ternarize.sources.imports.bitnet import inverse

TOKENS = torch.arange(48).view(3, 16)
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _without_a_compiler() -> Iterator[None]:
    """transformers compiles its bitnet functions; here they run as they stand."""
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield
    torch._dynamo.config.disable = before


def make(
    at: Path,
    kind: str,
    quantization: dict[str, Any] | None,
    change: Callable[[Tensors, str], None],
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Path:
    """A tiny model whose linear weights in the blocks `change` has put into a foreign layout."""
    torch.manual_seed(0)
    text = {**tiny_models.TEXT, "architectures": [f"{kind}ForCausalLM"], **more}
    config = getattr(transformers, f"{kind}Config")(**text)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(at)
    tensors = load_file(at / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            change(tensors, name)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        at / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit(at, **(quantization or {}))
    return at


def edit(at: Path, **keys: Any) -> None:
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**config, **keys}))


def tensors_of(at: Path) -> Tensors:
    return load_file(at / "model.safetensors")


def change_tensors(at: Path, change: Callable[[Tensors], None]) -> None:
    tensors = tensors_of(at)
    change(tensors)
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})


def weights(packed: Path) -> Tensors:
    """The packed weights of a conversion, float32."""
    opened = open_verified(packed)
    return {name: opened.dense(name) for name, record in opened.records.items() if record.shape}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(TOKENS).logits.float()
    return found


def check_same(packed: Path, source: Path, dtype: torch.dtype) -> None:
    """The packed model gives what its source gives in transformers, layer by layer and in all.

    An activation on the boundary of two int8 codes may fall to either side, which all later layers
    then show; hence the layers one by one, each on the same input.
    """
    ours, other = ternarize.load(packed, dtype=dtype), stock(source, dtype)
    close = 1e-5 if dtype == torch.float32 else 0.02
    with torch.inference_mode():
        for name, module in other.named_modules():
            if hasattr(module, "in_features"):
                inputs = torch.randn(4, module.in_features, dtype=dtype)
                expected = module(inputs).float()
                missed = (ours.get_submodule(name)(inputs).float() - expected).abs().max()
                assert missed <= close * expected.abs().max(), name
    expected, found = logits(other), logits(ours)
    far = float((found - expected).norm() / expected.norm())
    assert far < (0.01 if dtype == torch.float32 else 0.03), far


def stock(source: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map="cpu"
    ).eval()  # type: ignore[no-untyped-call]


# --- bitnet -----------------------------------------------------------------------------------


def _absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Trits and the inverse scale, as those who pack such models compute them."""
    scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)
    return (weight * scale).round().clamp_(-1, 1), scale.view(1)


def bitlinear(tensors: Tensors, name: str) -> None:
    trits, scale = _absmean(tensors[f"{name}.weight"])
    tensors[f"{name}.weight"] = theirs.pack_weights(trits)
    tensors[f"{name}.weight_scale"] = scale


def autobitlinear(tensors: Tensors, name: str) -> None:
    bitlinear(tensors, name)
    tensors[f"{name}.weight_scale"] = 1 / tensors[f"{name}.weight_scale"]


def unpacked(tensors: Tensors, name: str) -> None:
    trits, scale = _absmean(tensors[f"{name}.weight"])
    tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = trits, 1 / scale


def master(tensors: Tensors, name: str) -> None:
    pass


def _bitnet(linear_class: str, mode: str, **more: Any) -> dict[str, Any]:
    how = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode}
    return {"quantization_config": {**how, **more}}


# Falcon-E, and Llama3-8B-1.58, as published: bitlinear is what no word on it means
FALCON = {
    "is_bitnet_config": True,
    "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
}
BITNETS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "online": ("BitNet", _bitnet("autobitlinear", "online"), master),
    "packed": ("BitNet", _bitnet("autobitlinear", "offline"), autobitlinear),
    "unpacked": ("BitNet", _bitnet("autobitlinear", "offline"), unpacked),
    "biased": ("Llama", _bitnet("autobitlinear", "offline"), autobitlinear),
    "inverse": ("BitNet", _bitnet("bitlinear", "offline"), bitlinear),
    "falcon": ("Llama", FALCON, bitlinear),
}


def _used(tensors: Tensors, name: str, form: str) -> Tensor:
    """What transformers multiplies with, by its own functions; float64 where it divides later."""
    weight = tensors[name]
    if form == "online":
        used: Tensor = theirs.WeightQuant.apply(weight)  # type: ignore[no-untyped-call]
        return used.float()
    scale = tensors[name + "_scale"]
    if form != "unpacked":
        weight = theirs.unpack_weights(weight, dtype=torch.float32)
    if form in ("inverse", "falcon"):
        return (weight.double() / scale.double()).float()
    return weight.float() * scale.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", BITNETS)
def test_bitnet_is_what_transformers_multiplies_with(
    form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    kind, quantization, change = BITNETS[form]
    more = {"attention_bias" if kind == "Llama" else "tie_word_embeddings": True}
    source = make(tmp_path / "source", kind, quantization, change, dtype, **more)
    record = convert(source, tmp_path / "out")
    tensors, found = tensors_of(source), weights(tmp_path / "out")
    assert len(found) == 14
    for name, weight in found.items():
        used = _used(tensors, name, form)
        if dtype == torch.float32 and form == "online":  # the mean may differ in its last bit
            torch.testing.assert_close(weight, used, rtol=2e-7, atol=0)
        else:
            assert torch.equal(weight, used), name
        assert record["tensors"][name]["group_size"] == 0
        assert record["tensors"][name]["method"] == "lossless"
    assert record["source"]["imported"]["format"].startswith("bitnet")
    assert record["source"]["bytes"] == sum(t.nbytes for t in tensors.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "ternarize"
    assert config["quantization_config"]["activations"] == "int8"
    assert verify(tmp_path / "out", source)["compared"]["converted_again"] > 14
    check_same(tmp_path / "out", source, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absmean_of_tensors_is_the_rule_of_the_online_layers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """For master weights of which no config.json speaks."""
    source = make(tmp_path / "source", "Llama", None, master, dtype)
    convert(source, tmp_path / "out", Recipe("absmean", 0, activations="int8"))
    tensors, found = tensors_of(source), weights(tmp_path / "out")
    assert len(found) == 14
    rounding = 2**-11 + torch.finfo(dtype).eps / 2  # of our scale, and of their weights
    for name, weight in found.items():
        used = _used(tensors, name, "online")
        assert torch.equal(weight.sign(), used.sign()), name
        torch.testing.assert_close(weight, used, rtol=1.01 * rounding, atol=0)


@pytest.mark.parametrize("form", ["packed", "inverse", "unpacked"])
def test_rows_that_4_does_not_divide(form: str, tmp_path: Path) -> None:
    """transformers packs them, and cannot load them packed; the layout is clear all the same."""
    kind, quantization, change = BITNETS[form]
    source = make(tmp_path / "source", kind, quantization, change, intermediate_size=70)
    convert(source, tmp_path / "out")
    found = weights(tmp_path / "out")
    for name, weight in found.items():
        rows = weight.shape[0]
        assert torch.equal(weight, _used(tensors_of(source), name, form)[:rows])


SHORT = [
    (stored, dtype)
    for stored in (0.02, 1.0, 61.25, 3e-5, 1e6, 2.0**-20)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    if torch.tensor(stored).to(dtype).isfinite()  # a million is no float16
]


@pytest.mark.parametrize(("stored", "dtype"), SHORT)
def test_a_short_scale_comes_back_from_its_inverse(stored: float, dtype: torch.dtype) -> None:
    scale = torch.tensor([stored]).to(dtype).float()
    back = inverse(1 / scale)
    if dtype != torch.float32:
        assert torch.equal(back, scale)
    torch.testing.assert_close(back, scale, rtol=1.2e-7, atol=0)


def test_groups_and_activations_that_are_asked_for(tmp_path: Path) -> None:
    source = make(tmp_path / "source", *BITNETS["packed"])
    for number, group_size in enumerate((64, -1)):
        out = tmp_path / str(number)
        recipe = Recipe(group_size=group_size, activations="none", scale_bits=8 if number else 16)
        record = convert(source, out, recipe)
        rows = [row for row in record["tensors"].values() if row["becomes"] == "ternary"]
        assert {row["group_size"] for row in rows} == {group_size}
        assert {row["method"] for row in rows} == {"lossless"}
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (config["group_size"], config["activations"]) == (group_size, "none")
        for name, weight in weights(out).items():
            assert torch.equal(weight, _used(tensors_of(source), name, "packed"))
        verify(out, source)


def test_layers_that_are_dense_at_the_source_stay_dense(tmp_path: Path) -> None:
    quantization = _bitnet("bitlinear", "offline", modules_to_not_convert=["lm_head", "k_proj"])

    def change(tensors: Tensors, name: str) -> None:
        if not name.endswith("k_proj"):
            bitlinear(tensors, name)

    source = make(tmp_path / "source", "Llama", quantization, change)
    record = convert(source, tmp_path / "out")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert record["tensors"][name]["becomes"] == "kept"
    assert "not ternary at the source" in record["tensors"][name]["reason"]
    assert torch.equal(tensors_of(tmp_path / "out")[name], tensors_of(source)[name])
    check_same(tmp_path / "out", source, torch.float32)  # nothing rounds what goes into k_proj
    record = convert(source, tmp_path / "more", Recipe(include=("*.0.self_attn.k_proj.weight",)))
    assert record["tensors"][name]["becomes"] == "ternary"


# --- two bits ---------------------------------------------------------------------------------


def _mlx_parts(trits: Tensor, scales: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """MLX's words, scales and biases of codes that begin at `first` for -1, made with numpy."""
    codes = (trits.float().numpy().astype("int64") + 1 + first).reshape(trits.shape[0], -1, 16)
    words = sum(codes[..., at] << (2 * at) for at in range(16))
    return torch.from_numpy(words).to(torch.uint32), scales, -(1 + first) * scales


def affine(group: int, first: int = 0, biases: str = "biases") -> Callable[[Tensors, str], None]:
    def change(tensors: Tensors, name: str) -> None:
        weight = tensors.pop(f"{name}.weight")
        rows, cols = weight.shape
        groups = weight.view(rows, -1, group)
        scales = groups.abs().float().mean(-1).to(weight.dtype)
        trits = (groups / scales.unsqueeze(-1)).nan_to_num().round().clamp(-1, 1)
        trits = trits.view(rows, cols)  # the row of a padding token is 0, with a scale of 0
        parts = _mlx_parts(trits, scales, first)
        tensors[f"{name}.weight"], tensors[f"{name}.scales"], tensors[f"{name}.{biases}"] = parts

    return change


def int2(tensors: Tensors, name: str) -> None:
    weight = tensors[f"{name}.weight"].float()
    scale = weight.abs().mean(1, keepdim=True)
    codes = (weight / scale).round().clamp(-1, 1).to(torch.uint8) + 2
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % 4)).view(codes.shape[0], -1, 4)
    packed = sum(codes[..., at] << (2 * at) for at in range(4))
    assert isinstance(packed, Tensor)
    tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = packed, scale
    for which in ("input", "output"):
        tensors[f"{name}.{which}_activation_scale"] = torch.zeros(())


GEMMA = {"quantization_config": {"quant_method": "gemma", "num_bits": 2}}
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def _metal(group: int) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "metal", "bits": 2, "group_size": group}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["gemma", "metal", "metal upper codes"])
def test_two_bits_are_what_transformers_multiplies_with(
    form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if form == "gemma":
        source = make(tmp_path / "source", "Llama", GEMMA, int2, dtype, intermediate_size=134)
    else:
        change = affine(64, "upper" in form, "qbiases")
        source = make(tmp_path / "source", "Llama", _metal(64), change, dtype, **WIDE)
    record = convert(source, tmp_path / "out")
    own = -1 if form == "gemma" else 64
    assert {r["group_size"] for r in record["tensors"].values() if "group_size" in r} == {own}
    verify(tmp_path / "out", source)
    model = stock(source, dtype)
    for name, weight in weights(tmp_path / "out").items():
        module = model.get_submodule(name.removesuffix(".weight"))
        used = module._dequantize_weights() if form == "gemma" else module.weight
        if "upper" in form and dtype == torch.float32:  # there 3 s - 2 s is rounded
            torch.testing.assert_close(weight, used, rtol=3e-7, atol=0)
        else:
            assert torch.equal(weight, used.float()), name
    check_same(tmp_path / "out", source, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64])
def test_mlx_is_its_formula(group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    quantization = {"group_size": group, "bits": 2, "mode": "affine"}
    both = {"quantization": quantization, "quantization_config": quantization}
    source = make(tmp_path / "source", "Qwen3", both, affine(group), dtype, **WIDE)
    convert(source, tmp_path / "out")
    tensors = tensors_of(source)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, weight in weights(tmp_path / "out").items():
        base = name.removesuffix(".weight")
        words = tensors[name].to(torch.int64)
        q = torch.stack([words >> (2 * at) & 3 for at in range(16)], -1).view(*weight.shape)
        s, b = (
            tensors[f"{base}.{part}"].double().repeat_interleave(group, 1)
            for part in ("scales", "biases")
        )
        assert torch.equal(weight, (q * s + b).float()), name
    verify(tmp_path / "out", source)


def test_mlx_with_some_tensors_in_more_bits(tmp_path: Path) -> None:
    """A matrix in 4 bits is no ternary one: refused by name, or kept as what it means."""
    path = "model.layers.0.mlp.down_proj"
    quantization = {"group_size": 64, "bits": 2, path: {"group_size": 32, "bits": 4}}
    source = make(tmp_path / "source", "Llama", {"quantization": quantization}, affine(64), **WIDE)

    def four_bits(tensors: Tensors) -> None:
        codes = torch.randint(0, 16, (128, 32, 8))
        words = sum(codes[..., at] << (4 * at) for at in range(8))
        assert isinstance(words, Tensor)
        tensors[f"{path}.weight"] = words.to(torch.uint32)
        tensors[f"{path}.scales"] = torch.rand(128, 8)
        tensors[f"{path}.biases"] = -torch.rand(128, 8)

    change_tensors(source, four_bits)
    with pytest.raises(CheckpointError, match=f"{path}.weight: has other values.*--keep"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    convert(source, tmp_path / "out", Recipe(keep=(f"{path}.weight",)))
    kept, stored = tensors_of(tmp_path / "out")[f"{path}.weight"], tensors_of(source)
    scale, bias = stored[f"{path}.scales"][5, 3], stored[f"{path}.biases"][5, 3]
    q = int(stored[f"{path}.weight"][5, 12].to(torch.int64)) >> 8 & 15  # column 12 * 8 + 2, group 3
    assert kept[5, 98] == (q * scale.double() + bias.double()).float()


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_and_an_embedding_in_2_bits_stay_so(tied: bool, tmp_path: Path) -> None:
    """mlx-lm packs them as well: in floating point they would take most of a small model."""
    how = {"quantization": {"group_size": 64, "bits": 2}}
    options: dict[str, Any] = {"tie_word_embeddings": tied, **WIDE}
    source = make(tmp_path / "source", "Llama", how, affine(64), torch.float16, **options)
    ends = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]

    def pack(tensors: Tensors) -> None:
        for name in ends:
            affine(64)(tensors, name)

    change_tensors(source, pack)
    record = convert(source, tmp_path / "out")
    for name in ends:
        assert record["tensors"][f"{name}.weight"]["becomes"] == "ternary"
        assert record["tensors"][f"{name}.weight"]["method"] == "lossless"
    assert record["recipe"]["head"] == "ternary" and record["recipe"]["embeddings"] == "ternary"
    verify(tmp_path / "out", source)
    convert(source, tmp_path / "kept", Recipe(embeddings="keep", head="keep"))
    # the same model, whatever form the ends have
    found = logits(ternarize.load(tmp_path / "out", dtype=torch.float32))
    expected = logits(ternarize.load(tmp_path / "kept", dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# --- ternary in floating point -----------------------------------------------------------------


def _shards(along: int, count: int) -> Callable[[Tensors, str], None]:
    def change(tensors: Tensors, name: str) -> None:
        parts = tensors[f"{name}.weight"].chunk(count, along)
        tensors[f"{name}.weight"] = torch.cat(
            [(p / p.abs().mean()).round().clamp(-1, 1) * p.abs().mean().half() for p in parts],
            along,
        )

    return change


def trilm(tensors: Tensors, name: str) -> None:
    """A scale for each device's part: of the rows, or of the columns where inputs are split."""
    inputs_split = name.endswith(("o_proj", "down_proj"))
    _shards(1 if inputs_split else 0, 2 if "layers.0" in name else 3)(tensors, name)


def test_a_scale_for_each_shard_takes_the_fewest_bits(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48}
    source = make(tmp_path / "source", "Llama", None, trilm, torch.float16, **sizes)
    work = make_plan(source)
    assert work.to_dict()["recipe"]["group_size"] is None
    record = convert(source, tmp_path / "out")
    stored = tensors_of(source)
    for name, weight in weights(tmp_path / "out").items():
        assert torch.equal(weight, stored[name].float()), name
        row, shards = record["tensors"][name], 2 if "layers.0" in name else 3
        inputs_split = "o_proj" in name or "down_proj" in name
        assert row["group_size"] == (weight.shape[1] // shards if inputs_split else -1)
        assert (row["method"], row["relative_error"]) == ("lossless", 0.0)
    assert {t.name: t.group_size for t in work.tensors if t.ternary} == {
        name: record["tensors"][name]["group_size"] for name in weights(tmp_path / "out")
    }
    assert work.packed_bytes() == (tmp_path / "out" / "model.safetensors").stat().st_size
    verify(tmp_path / "out", source)
    check_same(tmp_path / "out", source, torch.float32)


def test_groups_that_cut_across_shards_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48}
    source = make(tmp_path / "source", "Llama", None, trilm, torch.float16, **sizes)
    with pytest.raises(CheckpointError, match="ternary in floating point.*for 48 weights"):
        make_plan(source, Recipe(group_size=48))
    for group_size in (-1, 0):  # 128 would not do either, where rows have a scale for each part
        with pytest.raises(CheckpointError, match="Leave out --group-size"):
            make_plan(source, Recipe(group_size=group_size))
    record = convert(source, tmp_path / "out", Recipe(group_size=32))
    assert {r.get("method") for r in record["tensors"].values()} == {"lossless", None}


def test_ordinary_weights_keep_the_usual_groups(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "Llama", None, master)
    record = convert(source, tmp_path / "out")
    assert record["recipe"]["group_size"] == 128
    assert record["recipe"]["activations"] == "none"
    assert {r["group_size"] for r in record["tensors"].values() if "group_size" in r} == {128}


# --- measured against its source ------------------------------------------------------------


@pytest.mark.parametrize("form", ["online", "inverse", "mlx"])
def test_an_import_measures_as_its_source(form: str, tmp_path: Path) -> None:
    mlx = {"quantization": {"bits": 2, "group_size": 64}}
    forms = {**BITNETS, "mlx": ("Llama", mlx, affine(64))}
    source = make(tmp_path / "source", *forms[form], torch.bfloat16, **WIDE)
    word_tokenizer().save_pretrained(source)
    convert(source, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{at * at % 40}" for at in range(400)))
    found = evaluate(tmp_path / "out", source=source, text=text, seq_len=16)
    assert found["kl_divergence"]["value"] < 1e-4
    assert found["top1_agreement"]["value"] > 0.95
    rounding = evaluate(tmp_path / "out", source=source, text=text, seq_len=16, activations="none")
    # a source that rounds its activations is told from one that does not
    assert (rounding["kl_divergence"]["value"] > 1e-6) == (form != "mlx")


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["floats", "mlx", "gguf"])
def test_one_scale_for_the_tensor_is_found(form: str, tmp_path: Path) -> None:
    """In formats that have finer groups as well; a matrix of zeros says nothing, and keeps them."""
    zeros = "model.layers.1.mlp.up_proj"

    def change(tensors: Tensors, name: str) -> None:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = ((weight < 0).to(weight) - 0.5) * (name != zeros)
        if form == "mlx":
            affine(64)(tensors, name)

    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    how = {"quantization": {"group_size": 64, "bits": 2}} if form == "mlx" else None
    source = make(tmp_path / "source", "Llama", how, change, torch.float16, **sizes)
    if form == "gguf":
        convert(source, tmp_path / "packed", Recipe(group_size=256))
        source = tmp_path / "m.gguf"
        export(tmp_path / "packed", source, "gguf", kind="tq2_0", tokenizer=False)
    record = convert(source, tmp_path / "out")
    groups = {n: r["group_size"] for n, r in record["tensors"].items() if "group_size" in r}
    usual = {"floats": 128, "mlx": 64, "gguf": 256}[form]
    assert groups.pop(f"{zeros}.weight") == usual
    assert len(groups) == 13 and set(groups.values()) == {0}
    verify(tmp_path / "out", source)


def test_what_an_earlier_version_rounded_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not look for finer groups than it was asked for."""
    source = make(tmp_path / "source", "Llama", None, finer_groups, **WIDE)
    with pytest.raises(CheckpointError, match="Leave out --group-size"):
        convert(source, tmp_path / "out", Recipe(group_size=128))
    with monkeypatch.context() as patch:
        patch.setattr("ternarize.plans.plan.check_lossless", lambda *_: None)
        convert(source, tmp_path / "out", Recipe(group_size=128))
    verify(tmp_path / "out", source)


def finer_groups(tensors: Tensors, name: str) -> None:
    """Floats that are ternary in groups of 64."""
    weight = tensors[f"{name}.weight"]
    sizes = torch.rand(weight.numel() // 64, 1) + 1
    tensors[f"{name}.weight"] = (weight.sign().view(-1, 64) * sizes).view_as(weight)


# --- there and back ---------------------------------------------------------------------------

EXPORTS = {
    "bitnet": Recipe(group_size=0, activations="int8"),
    "gemma-int2": Recipe(group_size=-1),
    "mlx": Recipe(group_size=64),
    "dense": Recipe(group_size=64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", EXPORTS)
def test_what_is_exported_comes_back(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "Llama", None, master, dtype, **WIDE)
    record = convert(source, tmp_path / "first", EXPORTS[to])
    options: dict[str, Any] = {"dtype": "float32"} if to in ("mlx", "dense") else {}
    export(tmp_path / "first", tmp_path / "there", to, **options)
    back = convert(tmp_path / "there", tmp_path / "back")
    before, after = (tensors_of(tmp_path / name) for name in ("first", "back"))
    assert before.keys() == after.keys()
    for name in weights(tmp_path / "first"):
        for part in (name, name + "_scale"):
            assert (
                torch.equal(before[part], after[part]) and before[part].dtype == after[part].dtype
            )
        assert back["tensors"][name]["group_size"] == record["tensors"][name]["group_size"]
    assert back["recipe"]["activations"] == record["recipe"]["activations"]
    verify(tmp_path / "back", tmp_path / "there")


# --- what is refused ----------------------------------------------------------------------------

NAME = "model.layers.1.mlp.up_proj"


def _set(name: str, value: Tensor | None) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        def put(tensors: Tensors) -> None:
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value

        change_tensors(at, put)

    return change


def _config(**keys: Any) -> Callable[[Path], None]:
    return lambda at: edit(at, **keys)


NO_LISTS: tuple[Any, ...] = (5, [5], ["("], "lm_head")
NO_TABLES: tuple[Any, ...] = (["x"], {"(": {}}, {".*": 3})
REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "class": ("packed", _config(**_bitnet("other", "offline")), "linear_class 'other'"),
    "mode": ("packed", _config(**_bitnet("bitlinear", "online")), "quantization_mode 'online'"),
    "code of its own": (
        "packed",
        _config(quantization_config=None, weight_bits=1, input_bits=8),
        "weights in 1 and inputs in 8 bits by code of its own",
    ),
    "norms": (
        "packed",
        _config(**_bitnet("autobitlinear", "offline", use_rms_norm=True)),
        "use_rms_norm.*cannot be carried",
    ),
    "no scale": ("packed", _set(f"{NAME}.weight_scale", None), "weight_scale is not there"),
    "scales of rows": (
        "packed",
        _set(f"{NAME}.weight_scale", torch.ones(136)),
        r"weight_scale is F32 \[136\]; expected .* \[1\]",
    ),
    "scale of NaN": (
        "packed",
        _set(f"{NAME}.weight_scale", torch.tensor([float("nan")])),
        "weight_scale is nan; expected a finite number",
    ),
    "scale of 0": (
        "inverse",
        _set(f"{NAME}.weight_scale", torch.zeros(1)),
        "weight_scale is 0.0; expected a finite number other than 0",
    ),
    "floats": (
        "inverse",
        _set(f"{NAME}.weight", torch.zeros(136, 64)),
        r"up_proj.weight is F32 \[136, 64\]; expected U8 \[34, 64\]",
    ),
    "a scale too many": (
        "packed",
        _set("model.norm.weight_scale", torch.ones(1)),
        "model.norm.weight_scale belongs to no layer",
    ),
    "head": (
        "packed",
        _config(**_bitnet("autobitlinear", "offline", modules_to_not_convert=[])),
        "lm_head.weight.*expected",
    ),
    "class of the model": ("packed", _config(architectures=["OddForCausalLM"]), "OddForCausalLM"),
    "code 3": ("packed", _set(f"{NAME}.weight", torch.full((34, 64), 0b11100100).byte()), "one s"),
    "unpacked": (
        "unpacked",
        _set(f"{NAME}.weight", torch.arange(136 * 64.0).view(136, 64)),
        "has other values .* than -s, 0 and s with one s for the tensor",
    ),
    "int2 code 0": ("gemma", _set(f"{NAME}.weight", torch.full((136, 16), 0b11100100).byte()), "s"),
    "int2 activations": (
        "gemma",
        _set(f"{NAME}.input_activation_scale", torch.tensor(0.5)),
        "input_activation_scale is 0.5: activations are rounded",
    ),
    "int4": (
        "gemma",
        _config(quantization_config={"quant_method": "gemma", "num_bits": 4}),
        "in 4 bits; expected 2",
    ),
    "int2 embeddings": (
        "gemma",
        _config(
            quantization_config={
                "quant_method": "gemma",
                "num_bits": 2,
                "quantize_embeddings": True,
            }
        ),
        "quantize_embeddings",
    ),
    **{
        f"{form} patterns {value}": (
            form,
            _config(
                quantization_config={
                    "quant_method": "bitnet" if form == "inverse" else form,
                    "num_bits": 2,
                    "modules_to_not_convert": value,
                }
            ),
            "modules_to_not_convert of config.json is .*; expected a list",
        )
        for form in ("inverse", "gemma")
        for value in NO_LISTS
    },
    **{
        f"int2 configs {value}": (
            "gemma",
            _config(
                quantization_config={
                    "quant_method": "gemma",
                    "num_bits": 2,
                    "module_quant_configs": value,
                }
            ),
            "module_quant_configs of config.json is .*; expected",
        )
        for value in NO_TABLES
    },
    "mlx mode": (
        "mlx",
        _config(quantization={"mode": "mxfp4", "bits": 4, "group_size": 32}),
        "expected MLX's, in mode affine",
    ),
    "mlx bits": ("mlx", _config(quantization={"bits": 4, "group_size": 64}), "expected 2"),
    "mlx group": ("mlx", _config(quantization={"bits": 2, "group_size": 32}), "expected U32"),
    "mlx biases": ("mlx", _set(f"{NAME}.biases", None), "biases is not there"),
    "mlx bias": ("mlx", _set(f"{NAME}.biases", torch.zeros(256, 2)), "has other values"),
    "mlx scales": ("mlx", _config(quantization=[2]), "expected MLX's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_come_in_exactly_is_refused(case: str, tmp_path: Path) -> None:
    form, change, match = REFUSED[case]
    mlx = {"quantization": {"bits": 2, "group_size": 64}}
    forms = {**BITNETS, "gemma": ("Llama", GEMMA, int2), "mlx": ("Llama", mlx, affine(64))}
    source = make(tmp_path / "source", *forms[form], **(WIDE if form == "mlx" else {}))
    change(source)
    with pytest.raises(TernarizeError, match=match) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("recipe", [Recipe(group_size=0), Recipe(group_size=-1)])
def test_groups_that_lose_something_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    how = {"quantization": {"bits": 2, "group_size": 64}}
    source = make(tmp_path / "source", "Llama", how, affine(64), **WIDE)
    with pytest.raises(CheckpointError, match="Leave out --group-size"):
        make_plan(source, recipe)
    record = convert(source, tmp_path / "out", Recipe(group_size=32))
    assert {r.get("method") for r in record["tensors"].values()} == {"lossless", None}
