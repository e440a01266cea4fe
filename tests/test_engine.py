"""`convert --for llama.cpp`: what comes of it is exported with nothing left over, or refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, SelectionError, TernarizeError
from ternarize.files.checkpoint import TensorInfo
from ternarize.plans.engine import check_engine, check_held, group_for
from ternarize.plans.layout import TensorPlan
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import LLAMA_CPP, Calibrate, Recipe
from ternarize.plans.recipe_files import open_recipe
from ternarize.plans.rules import Choice
from ternarize.publish.export import export
from ternarize.trits.base3 import BASE3

SIZES: dict[str, Any] = {**tiny_models.TEXT, "num_key_value_heads": 4, "head_dim": 64}


def make_source(directory: Path, **sizes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **sizes}, architectures=["LlamaForCausalLM"])
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 divides all widths."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    return make_source(folder, hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 divides all widths, and 256 not all."""
    folder = tmp_path_factory.mktemp("narrow") / "source"
    return make_source(folder, hidden_size=128, intermediate_size=192)


def test_groups_are_those_of_the_widest_blocks_that_hold_all(
    wide: Path, narrow: Path, tmp_path: Path
) -> None:
    for source, group_size, kind in ((wide, 256, "TQ2_0"), (narrow, 64, "Q2_0")):
        packed = tmp_path / f"{kind}-packed"
        record = convert(source, packed, Recipe("itf", engine=LLAMA_CPP))
        assert record["recipe"]["group_size"] == group_size
        assert (record["recipe"]["engine"], record["recipe"]["fold"]) == (LLAMA_CPP, False)
        report = export(packed, tmp_path / f"{kind}.gguf", "gguf", tokenizer=False)
        assert report["exact"] and report["type"] == kind.lower()
        again = make_plan(source, open_recipe(str(packed / "ternarize.json")))
        assert again.recipe.group_size == group_size


def test_smaller_groups_may_be_asked_for(wide: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "packed", Recipe("itf", 64, engine=LLAMA_CPP, head="ternary"))
    report = export(tmp_path / "packed", tmp_path / "m.gguf", "gguf", tokenizer=False)
    assert report["exact"] and report["type"] == "q2_0"


def test_a_calibrated_model_leaves_nothing_for_run_time_folded_or_not(
    narrow: Path, tmp_path: Path
) -> None:
    ids = torch.randint(3, 140, (14, 24), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, tmp_path / "data.safetensors")
    data = Calibrate(str(tmp_path / "data.safetensors"), num_samples=10)
    for fold in (False, True):
        packed, file = tmp_path / f"packed{fold}", tmp_path / f"{fold}.gguf"
        recipe = Recipe("gptq", engine=LLAMA_CPP, fold=fold, calibrate=data)
        record = convert(narrow, packed, recipe)
        said = record["recipe"]
        assert (said["fold"], said["calibrate"]["rotation"], said["group_size"]) == (fold, 0, 64)
        assert not any("rotation" in row for row in record["tensors"].values())
        assert record["calibration"]["quality"]
        assert export(packed, file, "gguf", tokenizer=False)["exact"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--group-size", "32"], "--group-size: 32, and files of llama.cpp cannot hold"),
        (["--planes", "*q_proj*"], r"--planes: \*q_proj\*, and files of llama.cpp"),
        (["--dataset", "default", "--rotation", "64"], "--rotation: 64, and files of llama.cpp"),
        (
            ["--dataset", "default", "--target-bpw", "2"],
            "--target-bpw: 2.0, and files of llama.cpp",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_name(
    options: list[str], said: str, wide: Path, tmp_path: Path
) -> None:
    asked = ["convert", str(wide), str(tmp_path / "out"), "--for", "llama.cpp", *options]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2 and not any(tmp_path.iterdir())
    assert re.search(said, re.sub(r"\s+", " ", result.stderr))


def test_widths_and_architectures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    odd = make_source(tmp_path / "odd", hidden_size=72, intermediate_size=128)
    with pytest.raises(TernarizeError, match=r"72 columns, which blocks of llama.cpp do not"):
        convert(odd, tmp_path / "out", Recipe("itf", engine=LLAMA_CPP))
    kept = Recipe("itf", engine=LLAMA_CPP, keep=("*[qkv]_proj*", "*gate*", "*up*"))
    convert(odd, tmp_path / "kept", kept)
    tiny_models.save("bert_classifier", tmp_path / "bert")
    with pytest.raises(TernarizeError, match=r"of which no file of llama.cpp is written \(--for\)"):
        convert(tmp_path / "bert", tmp_path / "out", Recipe("itf", engine=LLAMA_CPP))


@pytest.mark.parametrize(
    ("kind", "said", "changed"),
    [
        (
            "Llama",
            "rope_type 'yarn'",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        ),
        ("Qwen3", "attention_bias True", {"attention_bias": True}),
        ("Qwen2", "use_sliding_window True", {"use_sliding_window": True}),
        ("Qwen3Moe", "norm_topk_prob False", {"norm_topk_prob": False}),
        ("Gemma3Text", "layer_types", {"layer_types": ["full_attention"] * 2}),
        ("GPT2", "scale_attn_weights False", {"scale_attn_weights": False}),
        ("Qwen3_5Text", "layer_types", {"layer_types": ["full_attention"] * 2}),
        ("Qwen3_5Text", "linear_value_head_dim 64", {"linear_value_head_dim": 64}),
        (
            "Qwen3_5Text",
            "mrope_section",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.25,
                    "mrope_section": [24, 4, 4],
                }
            },
        ),
    ],
)
def test_what_an_export_would_refuse_is_refused_before_the_work(
    kind: str, said: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    model = {"GPT2": "GPT2LMHeadModel"}.get(kind)
    names = [model or f"{kind.removesuffix('Text')}ForCausalLM"]
    for options in ({}, changed):
        config = getattr(transformers, f"{kind}Config")(num_hidden_layers=2, **options)
        check = partial(check_engine, tmp_path, {**config.to_dict(), "architectures": names})
        if options:
            with pytest.raises(TernarizeError, match=rf"{said}.*, which no file of llama.cpp says"):
                check(Recipe("itf", engine=LLAMA_CPP))
        elif kind != "Qwen3Moe":  # the default of its class is False
            check(Recipe("itf", engine=LLAMA_CPP))


@pytest.mark.parametrize(("keys", "group_size"), [(4, 256), (2, 64)])
def test_heads_in_another_order_stay_whole(tmp_path: Path, keys: int, group_size: int) -> None:
    """Blocks of 256 would cut heads of 128: the file is of smaller ones, and so are the groups."""
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    sizes |= {"linear_num_key_heads": keys, "linear_num_value_heads": 4}
    config = transformers.Qwen3_5TextConfig(**sizes, architectures=["Qwen3_5ForCausalLM"])
    transformers.Qwen3_5ForCausalLM(config).save_pretrained(tmp_path / "source")
    work = make_plan(tmp_path / "source", Recipe("itf", engine=LLAMA_CPP))
    assert work.recipe.group_size == group_size


def test_what_a_file_does_not_have_decides_no_blocks() -> None:
    """Nor do heads of which no block is a part pass."""
    config = transformers.Qwen3_5TextConfig(**SIZES, architectures=["Qwen3_5ForCausalLM"])
    wide = Choice("model.layers.0.mlp.up_proj.weight", (512, 256), BASE3, "")
    for name, size in (("mtp.fc.weight", 256), ("model.layers.0.mlp.down_proj.weight", 64)):
        both = [wide, replace(wide, name=name, shape=(512, 192))]
        table = config.to_dict() | {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
        assert group_for(both, table) == size, name
    for name in ("mtp.fc.weight", "model.layers.0.mlp.down_proj.weight"):
        info, choice = TensorInfo(name, "F32", (64, 72), "m"), replace(wide, name=name)
        check = partial(check_held, [TensorPlan(info, choice, (64, 72), 64, "F32")])
        if name == "mtp.fc.weight":
            check(config.to_dict(), Recipe("itf", engine=LLAMA_CPP))
        else:
            with pytest.raises(SelectionError, match="72 columns, which blocks of llama.cpp do"):
                check(config.to_dict(), Recipe("itf", engine=LLAMA_CPP))
    bad = config.to_dict() | {"linear_key_head_dim": 48, "linear_value_head_dim": 48}
    with pytest.raises(CheckpointError, match="heads of 48 values, which no block of llama.cpp"):
        check_engine("m", bad, Recipe("itf", engine=LLAMA_CPP))


def test_a_plan_says_what_was_chosen(wide: Path) -> None:
    asked = ["convert", str(wide), "out", "--for", "llama.cpp", "--dry-run", "--dataset", "default"]
    for fold in (False, True):
        options = [*asked, *(["--fold"] if fold else [])]
        recipe = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)["recipe"]
        assert (recipe["engine"], recipe["group_size"], recipe["fold"]) == (LLAMA_CPP, 256, fold)
        assert recipe["calibrate"]["rotation"] == 0
    shown = CliRunner().invoke(app, [*asked, "--recipe", "good", "--fold"]).stdout
    assert "--for llama.cpp --fold" in re.sub(r"\s+", " ", shown)
