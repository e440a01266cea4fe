"""compressed-tensors: the layout, decoded here by its formula, holds what is packed."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing
import pytest
import tiny_models
import torch
from test_cli import run
from torch import Tensor, nn

from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, UsageError
from ternarize.files import container, metadata
from ternarize.files.checkpoint import open_files
from ternarize.plans.recipe import Recipe
from ternarize.publish.export import export

TO = "compressed-tensors"
Packed = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """A tiny model packed by a recipe, made once for each."""
    folder = tmp_path_factory.mktemp("compressed")
    made: dict[Any, Path] = {}

    def make(group_size: int, name: str = "llama", **more: Any) -> Path:
        recipe = Recipe("absmean", group_size, **more)
        if (name, recipe) not in made:
            source = folder / name
            if not source.exists():
                sizes = {"intermediate_size": 128} if name != "gpt2" else {"n_inner": 128}
                tiny_models.save(name, source, dtype=torch.float16, **sizes)
            made[name, recipe] = folder / f"packed{len(made)}"
            convert(source, made[name, recipe], recipe)
        return made[name, recipe]

    return make


def unpacked(words: Tensor, scales: Tensor, bits: int) -> Tensor:
    """w = (q - 2^(b - 1)) s: 32 / b numbers q in each word, the first in the lowest bits."""
    fields = words.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, bits)
    numbers = (fields & ((1 << bits) - 1)).flatten(-2) - (1 << (bits - 1))
    group = numbers.shape[-1] // scales.shape[-1]
    return numbers * scales.to(torch.float32).repeat_interleave(group, -1)


@pytest.mark.parametrize(("kind", "bits"), [("int2", 2), ("int4", 4)])
@pytest.mark.parametrize(("group_size", "expected"), [(32, 32), (64, 64), (-1, 64), (0, 64)])
def test_every_weight_is_as_packed(
    packed: Packed, tmp_path: Path, group_size: int, expected: int, kind: str, bits: int
) -> None:
    model = packed(group_size)
    assert export(model, tmp_path / "out", TO, kind=kind)["exact"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (bits, expected)
    stored, out = packing.read_checkpoint(model), packing.read_checkpoint(tmp_path / "out")
    ternary = 0
    for name, record in metadata.records_of(open_files(model, ["model.safetensors"])).items():
        if record.shape is None:
            assert torch.equal(out[name], stored[name])
            continue
        ternary += 1
        assert name not in out and out[name + "_shape"].tolist() == list(record.shape)
        assert out[name + "_packed"].dtype == torch.int32
        dense = container.dequantize(stored[name], stored[name + "_scale"], record)
        assert torch.equal(unpacked(out[name + "_packed"], out[name + "_scale"], bits), dense)
    assert ternary == 14


def test_experts_that_stand_by_themselves_are_held_and_routers_stay(
    packed: Packed, tmp_path: Path
) -> None:
    assert export(packed(32, "mixtral"), tmp_path / "out", TO)["exact"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    out = packing.read_checkpoint(tmp_path / "out")
    experts = [name for name in out if ".experts." in name and name.endswith("weight_packed")]
    assert len(experts) == 2 * 4 * 3
    ignored = config["quantization_config"]["ignore"]
    routers = [n.removesuffix(".weight") for n in out if n.endswith("gate.weight")]
    assert len(routers) == 2 and set(routers) <= set(ignored) and "lm_head" in ignored
    assert not any(f"{name}.weight_packed" in out for name in ignored)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", ["int2", "int4"])
def test_the_package_of_that_name_gives_the_weights_as_packed(
    packed: Packed, tmp_path: Path, kind: str, name: str
) -> None:
    """In an environment that has it, as that of vLLM."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    model = packed(32, name)
    export(model, tmp_path / "out", TO, kind=kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    package = compressors.BaseCompressor.get_value_from_registry(config["format"])
    stored, out = packing.read_checkpoint(model), packing.read_checkpoint(tmp_path / "out")
    records = metadata.records_of(open_files(model, ["model.safetensors"]))
    ternary = [name for name, record in records.items() if record.shape is not None]
    for each in ternary:
        parts = {f"weight_{leaf}": out[f"{each}_{leaf}"] for leaf in ("packed", "scale", "shape")}
        dense = container.dequantize(stored[each], stored[each + "_scale"], records[each])
        assert torch.equal(package.decompress(parts, scheme)["weight"].float(), dense)
    assert len(ternary) == (14 if name == "llama" else 2 * (4 + 4 * 3))


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"head": "int8"}, "packed embeddings or output heads in 1 tensors .lm_head"),
        ({"head": "ternary"}, "packed embeddings or output heads in 1 tensors .lm_head"),
        ({"embeddings": "int4"}, "packed embeddings or output heads in 1 tensors .*embed_tokens"),
        ({"planes": ("*q_proj*",)}, "2 planes in 2 tensors"),
        ({"activations": "int8"}, "activations in int8"),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(
    packed: Packed, tmp_path: Path, recipe: dict[str, Any], why: str
) -> None:
    model = packed(32, **recipe)
    with pytest.raises(CheckpointError, match=f"{why}.*cannot carry"):
        export(model, tmp_path / "out", TO)
    assert not (tmp_path / "out").exists()
    assert export(model, tmp_path / "out", TO, allow_requantize=True)["lost"]


@pytest.mark.parametrize(("name", "count"), [("gpt2", 8), ("gpt_oss", 4)])
def test_turned_matrices_and_experts_in_one_piece_are_refused(
    packed: Packed, tmp_path: Path, name: str, count: int
) -> None:
    why = f"stacks of experts or transposed matrices in {count} tensors"
    with pytest.raises(CheckpointError, match=why):
        export(packed(32, name), tmp_path / "out", TO)


def test_what_is_kept_is_named_as_on_disk_and_as_in_the_model(
    packed: Packed, tmp_path: Path
) -> None:
    export(packed(32, "gemma3", keep=("*vision*", "*down_proj*")), tmp_path / "out", TO)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    kept = [n for n in packing.read_checkpoint(tmp_path / "out") if "vision" in n and ".fc1.w" in n]
    assert kept and all(n.removesuffix(".weight") in ignored for n in kept)
    model = tiny_models.build("gemma3")
    linear = [n for n, m in model.named_modules() if "vision" in n and isinstance(m, nn.Linear)]
    assert linear and set(linear) <= set(ignored)


@pytest.mark.parametrize("keep", ["*q_proj*", "*up_proj*"])
def test_parts_of_what_vllm_joins_are_all_packed_or_none(
    packed: Packed, tmp_path: Path, keep: str
) -> None:
    with pytest.raises(CheckpointError, match="parts of what vLLM joins, of which others are kept"):
        export(packed(32, keep=(keep,)), tmp_path / "out", TO)
    whole = packed(32, keep=("*self_attn*",))
    assert export(whole, tmp_path / "out", TO)["exact"]


def test_scales_that_the_dtype_does_not_hold_are_refused(packed: Packed, tmp_path: Path) -> None:
    said = "scales that bfloat16 does not hold in 14 tensors.*--dtype that does, .* --scale-bits 8"
    with pytest.raises(CheckpointError, match=said):
        export(packed(32), tmp_path / "out", TO, dtype="bfloat16")
    narrow = packed(32, scale_bits=8)  # three bits of mantissa
    assert export(narrow, tmp_path / "out", TO, dtype="bfloat16")["lost"] == []


def test_types_of_another_target_are_refused(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int3'; expected int2 or int4"):
        export(packed(32), tmp_path / "out", TO, kind="int3")
    result = run("export", packed(32), tmp_path / "out", "--to", TO, "--type", "tq2_0")
    assert result.exit_code == 2 and "expected one of int2, int4 with --to" in result.stderr
