"""A conversion that succeeds loads: what would not is refused before the work, by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_cli import run
from test_imports import WIDE, affine, make
from torch import Tensor

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, FormatError, SelectionError, UsageError
from ternarize.measure.evaluate import evaluate
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.runtime.rehearsal import rehearse

Tensors = dict[str, Tensor]
RECIPE = Recipe("itf", 32)
MISSING = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A LLaMA with two layers."""
    tiny_models.save("llama", tmp_path / "source", torch.float32)
    return tmp_path / "source"


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of model.safetensors."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder: Path, name: str) -> None:
    """Take a tensor out of model.safetensors."""
    edit(folder, lambda tensors: {key: t for key, t in tensors.items() if key != name})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def dense_of(packed: Path) -> Tensors:
    """The state of a packed model with dense weights, float32."""
    return dict(ternarize.load(packed, dequantize=True, dtype="float32").state_dict())


def assert_near(packed: Path, source: Path) -> None:
    """All parameters of the packed model are those of the source, rounded as `itf` rounds."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = dense_of(packed)
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert float((state[name] - value).norm()) <= 0.6 * float(value.norm()), name


# --- experts behind a renaming -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("GraniteMoeForCausalLM", transformers.GraniteMoeConfig),
        ("GraniteMoeSharedForCausalLM", transformers.GraniteMoeSharedConfig),
        ("JetMoeForCausalLM", transformers.JetMoeConfig),
    ],
)
def test_scales_follow_their_weights_through_renamings(
    architecture: str, settings: Any, tmp_path: Path
) -> None:
    config = settings(
        **tiny_models.TEXT, num_local_experts=4, num_experts_per_tok=2, kv_channels=16
    )
    getattr(transformers, architecture)(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "packed", RECIPE)
    verify(tmp_path / "packed", tmp_path / "source")
    assert_near(tmp_path / "packed", tmp_path / "source")
    ternarize.load(tmp_path / "packed").save_pretrained(tmp_path / "again")
    verify(tmp_path / "again")
    before, after = dense_of(tmp_path / "packed"), dense_of(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- a source that lacks something ---------------------------------------------------------------


def test_a_source_that_lacks_a_weight_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    drop(source, MISSING)
    expected = f"lacks {MISSING}, which LlamaForCausalLM needs; .*--allow-missing"
    with pytest.raises(CheckpointError, match=expected):
        convert(source, tmp_path / "packed", RECIPE)
    assert not list(tmp_path.glob("packed*"))
    with pytest.raises(CheckpointError, match=expected):
        rehearse(make_plan(source, RECIPE, config_only=True))


def test_what_the_source_may_lack_is_said_and_made_up_by_the_loader(
    source: Path, tmp_path: Path
) -> None:
    drop(source, MISSING)
    record = convert(source, tmp_path / "packed", RECIPE, allow_missing=True)
    assert record["source"]["missing"] == [MISSING]
    assert any(MISSING in note for note in record["notes"])
    verify(tmp_path / "packed", source)
    model = ternarize.load(tmp_path / "packed")
    assert bool(model.get_parameter(MISSING).isfinite().all())
    model.save_pretrained(tmp_path / "again")  # and now it has it
    again = ternarize.load(tmp_path / "again")
    assert torch.equal(again.get_parameter(MISSING), model.get_parameter(MISSING))
    drop(tmp_path / "again", MISSING)
    with pytest.raises(FormatError):
        ternarize.load(tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("bert_classifier", "bert.encoder.layer.1.output.dense.bias"),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj_bias"),
    ],
)
def test_a_missing_bias_beside_a_packed_weight_is_zero(
    name: str, bias: str, tmp_path: Path
) -> None:
    tiny_models.save(name, tmp_path / "source", torch.float32)
    drop(tmp_path / "source", bias)
    convert(tmp_path / "source", tmp_path / "packed", RECIPE, allow_missing=True)
    waste = [
        torch.full((size,), torch.nan) for size in (64, 136, 272, 544, 1088) for _ in range(64)
    ]
    del waste  # memory that is given out again, with what was in it
    found = ternarize.load(tmp_path / "packed").get_parameter(bias)
    assert not found.detach().any()


def test_a_missing_weight_beside_packed_ones_is_refused(tmp_path: Path) -> None:
    tiny_models.save("gpt_oss", tmp_path / "source", torch.float32)
    drop(tmp_path / "source", "model.layers.1.mlp.experts.down_proj")
    with pytest.raises(SelectionError, match="down_proj: is missing, and other weights"):
        convert(tmp_path / "source", tmp_path / "packed", RECIPE, allow_missing=True)


def test_what_is_missing_cannot_be_calibrated(source: Path, tmp_path: Path) -> None:
    drop(source, MISSING)
    recipe = Recipe("gptq", 32, calibrate=Calibrate(num_samples=4))
    with pytest.raises(UsageError, match=f"--allow-missing: .*{MISSING}, and calibration"):
        convert(source, tmp_path / "packed", recipe, allow_missing=True)


@pytest.mark.parametrize(
    ("architecture", "name", "shape", "has"),
    [
        ("bert_classifier", "bert.encoder.layer.1.output.dense.bias", (136,), 64),
        ("whisper", "model.encoder.layers.1.fc2.bias", (136,), 64),
    ],
)
def test_a_shape_that_another_layer_has_is_refused_too(
    architecture: str, name: str, shape: tuple[int, ...], has: int, tmp_path: Path
) -> None:
    tiny_models.save(architecture, tmp_path / "source", torch.float32)
    edit(tmp_path / "source", lambda tensors: {**tensors, name: torch.zeros(shape)})
    with pytest.raises(SelectionError, match=f"{name} would be .*has \\[{has}\\]"):
        convert(tmp_path / "source", tmp_path / "packed", RECIPE)


def test_a_tensor_of_another_shape_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    edit(source, lambda tensors: {**tensors, "model.norm.weight": torch.ones(63)})
    with pytest.raises(SelectionError, match=r"model.norm.weight would be \[63\]; .* has \[64\]"):
        convert(source, tmp_path / "packed", RECIPE)


def test_experts_of_which_one_is_missing_are_refused_by_name(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path / "source", torch.float32)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    drop(tmp_path / "source", name)
    with pytest.raises(SelectionError, match="model.layers.1.*experts"):
        convert(tmp_path / "source", tmp_path / "packed", RECIPE)


# --- numbers that JSON does not have -------------------------------------------------------------


def test_an_infinite_number_in_the_configuration_is_read_as_transformers_writes_it(
    tmp_path: Path,
) -> None:
    config = transformers.Mamba2Config(
        vocab_size=160,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=16,
        num_heads=8,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    )
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "source")
    assert "__float__" in (tmp_path / "source" / "config.json").read_text()
    convert(tmp_path / "source", tmp_path / "packed", RECIPE)
    assert_near(tmp_path / "packed", tmp_path / "source")


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    ],
)
def test_what_training_puts_around_names_is_taken_off_and_said(
    wrap: Callable[[str], str], source: Path, tmp_path: Path
) -> None:
    plain = convert(source, tmp_path / "plain", RECIPE)
    edit(source, lambda tensors: {wrap(name): value for name, value in tensors.items()})
    record = convert(source, tmp_path / "packed", RECIPE)
    assert record["tensors"] == plain["tensors"]
    assert any("is taken off all names" in note for note in record["notes"])
    verify(tmp_path / "packed", source)
    ternarize.load(tmp_path / "packed")


@pytest.mark.parametrize("name", ["bert", "gpt2", "whisper", "vit", "mixtral", "t5"])
@pytest.mark.parametrize("prefix", ["module.", "0.auto_model."])
def test_prefixes_are_taken_off_any_model(name: str, prefix: str, tmp_path: Path) -> None:
    tiny_models.save(name, tmp_path / "source", torch.float32)
    plain = make_plan(tmp_path / "source", RECIPE)
    edit(tmp_path / "source", lambda tensors: {prefix + key: t for key, t in tensors.items()})
    found = rehearse(make_plan(tmp_path / "source", RECIPE))
    assert {t.name for t in found.tensors} == {t.name for t in plain.tensors}
    assert [note.split(",")[0] for note in found.notes][-1] == f"{prefix} is taken off all names"


def test_ternary_models_of_others_are_unwrapped_too(tmp_path: Path) -> None:
    quantization = {"group_size": 64, "bits": 2, "mode": "affine"}
    make(tmp_path / "source", "Qwen3", {"quantization": quantization}, affine(64), **WIDE)
    plain = convert(tmp_path / "source", tmp_path / "plain")
    edit(tmp_path / "source", lambda tensors: {f"module.{key}": t for key, t in tensors.items()})
    found = convert(tmp_path / "source", tmp_path / "packed")
    assert found["tensors"] == plain["tensors"]


def test_a_wrapped_source_can_be_compared_with(source: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        example = Path(__file__).parents[1] / "examples" / "tiny-llama" / name
        (source / name).write_bytes(example.read_bytes())
    tiny_models.save("llama", source, torch.float32, vocab_size=4096)
    edit(source, lambda tensors: {f"_orig_mod.{name}": t for name, t in tensors.items()})
    convert(source, tmp_path / "packed", RECIPE)
    (tmp_path / "text").write_text("a line of text " * 40)
    found = evaluate(
        tmp_path / "packed", source=source, text=tmp_path / "text", seq_len=16, max_tokens=64
    )
    assert 0 < found["kl_divergence"]["value"] < 1


def test_pickled_names_are_unwrapped_too(source: Path, tmp_path: Path) -> None:
    plain = convert(source, tmp_path / "plain", RECIPE)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({f"module.{name}": t for name, t in tensors.items()}, source / "pytorch_model.bin")
    record = convert(source, tmp_path / "packed", RECIPE)
    digests = {name: row["sha256"] for name, row in plain["tensors"].items()}
    assert {name: row["sha256"] for name, row in record["tensors"].items()} == digests


def test_names_of_another_model_are_shown_beside_those_expected(tmp_path: Path) -> None:
    tiny_models.save("gemma3", tmp_path / "source", torch.float32)
    tiny_models.save("gemma3_text", tmp_path / "text", torch.float32)
    (tmp_path / "text" / "config.json").write_bytes(
        (tmp_path / "source" / "config.json").read_bytes()
    )
    expected = "lacks model.*, which Gemma3ForConditionalGeneration needs, but has .*model.layers.0"
    with pytest.raises(CheckpointError, match=expected):
        convert(tmp_path / "text", tmp_path / "packed", RECIPE)


# --- indexes and files ---------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_models.save("llama", tmp_path / "sharded", torch.float32, max_shard_size="120KB")
    return tmp_path / "sharded"


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def last(weight_map: dict[str, str]) -> str:
    return sorted(weight_map.values())[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update({"mtp.fc.weight": last(m)}), "says that mtp.fc.weight is in"),
        (lambda m: m.pop("model.norm.weight"), "does not list model.norm.weight"),
        (
            lambda m: m.update({"model.norm.weight": sorted(m.values())[0]}),
            "says that model.norm.weight is in",
        ),
    ],
)
def test_what_an_index_says_wrongly_is_said_and_the_files_decide(
    change: Callable[[dict[str, str]], Any], said: str, sharded: Path, tmp_path: Path
) -> None:
    plain = convert(sharded, tmp_path / "plain", RECIPE)
    edit_index(sharded, change)
    record = convert(sharded, tmp_path / "packed", RECIPE)
    assert record["tensors"] == plain["tensors"]
    assert any(said in note for note in record["notes"])
    ternarize.load(tmp_path / "packed")


def test_a_shard_that_the_index_leaves_out_is_named(sharded: Path, tmp_path: Path) -> None:
    save_file({"extra.weight": torch.ones(4)}, sharded / "model-00009-of-00009.safetensors")
    record = convert(sharded, tmp_path / "packed", RECIPE)
    assert "left out: model-00009-of-00009.safetensors" in record["notes"]


def test_one_file_beside_shards_is_read_as_transformers_does_and_the_shards_are_named(
    sharded: Path, tmp_path: Path
) -> None:
    other = tiny_models.build("llama", torch.float32, seed=1)
    save_file(dict(other.state_dict()), sharded / "model.safetensors", metadata={"format": "pt"})
    read = transformers.AutoModelForCausalLM.from_pretrained(sharded)
    assert torch.equal(read.lm_head.weight, other.lm_head.weight)  # what is to be taken
    record = convert(sharded, tmp_path / "packed", RECIPE)
    assert torch.equal(dense_of(tmp_path / "packed")["lm_head.weight"], other.lm_head.weight)
    assert "left out: model-00001-of-" in record["notes"][-1]
    assert any("model.safetensors is read" in note for note in record["notes"])


def test_a_checkpoint_in_a_folder_is_pointed_at(source: Path, tmp_path: Path) -> None:
    (tmp_path / "sentences").mkdir()
    source.rename(tmp_path / "sentences" / "0_Transformer")
    with pytest.raises(CheckpointError, match="0_Transformer in it has some: name .*0_Transformer"):
        make_plan(tmp_path / "sentences", RECIPE)


def test_remains_of_training_stay_behind(source: Path, tmp_path: Path) -> None:
    remains = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"]
    remains += ["training_args.bin", "all_results.json", "checkpoint-10/trainer_state.json"]
    for name in remains:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    record = convert(source, tmp_path / "packed", RECIPE)
    assert not [name for name in remains if (tmp_path / "packed" / name).exists()]
    assert record["notes"] == [f"left out: {', '.join(sorted(remains))}"]


# --- modules beside the model --------------------------------------------------------------------


DENSE = ("2_Dense/model.safetensors", "2_Dense/model.safetensors.index.json")


def sentences(folder: Path, *paths: str) -> None:
    """The layout of sentence-transformers: the backbone at the top, modules in folders."""
    tiny_models.save("bert", folder, torch.float32)
    modules = [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(("", *paths))]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in paths:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text("{}")


def test_the_weights_of_modules_beside_come_along(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    sentences(folder, "1_Pooling", "2_Dense")
    save_file({"linear.weight": torch.ones(32, 64)}, folder / "2_Dense" / "model.safetensors")
    (folder / "2_Dense" / "model.safetensors.index.json").write_text("{}")
    torch.save({"weight": torch.ones(1, 64)}, folder / "sparse_linear.pt")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"another form of the same")
    record = convert(folder, tmp_path / "packed", RECIPE)
    for name in ("1_Pooling/config.json", "2_Dense/config.json", *DENSE):
        assert (tmp_path / "packed" / name).read_bytes() == (folder / name).read_bytes()
    assert record["notes"] == ["left out: onnx/model.onnx, sparse_linear.pt"]
    assert "2_Dense/model.safetensors" in (tmp_path / "packed" / "SHA256SUMS").read_text()
    verify(tmp_path / "packed", folder)


def test_modules_outside_the_folder_are_refused(tmp_path: Path) -> None:
    sentences(tmp_path / "source")
    for path in ("../elsewhere", "a/../../elsewhere", "/etc"):
        (tmp_path / "source" / "modules.json").write_text(json.dumps([{"path": path}]))
        with pytest.raises(FormatError, match=f"names the folder '{path}'"):
            make_plan(tmp_path / "source", RECIPE)


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "no JSON", '[{"path": "./1_Pooling/"}]'])
def test_a_modules_json_of_another_kind_is_a_file_like_others(text: str, tmp_path: Path) -> None:
    sentences(tmp_path / "source", "1_Pooling")
    (tmp_path / "source" / "modules.json").write_text(text)
    assert {"modules.json", "1_Pooling/config.json"} <= {
        *make_plan(tmp_path / "source", RECIPE).copied
    }


def test_a_module_in_a_linked_folder_comes_along(tmp_path: Path) -> None:
    sentences(tmp_path / "source", "2_Dense")
    (tmp_path / "source" / "2_Dense").rename(tmp_path / "elsewhere")
    (tmp_path / "source" / "2_Dense").symlink_to(tmp_path / "elsewhere")
    assert "2_Dense/config.json" in make_plan(tmp_path / "source", RECIPE).copied


def test_files_beside_the_model_do_not_change_the_result(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "before", RECIPE)
    (source / "secret customers.xlsx").write_text("names")
    torch.save({}, source / "pytorch_model.bin")
    record = convert(source, tmp_path / "after", RECIPE)
    assert "secret customers.xlsx" in record["notes"][-1]
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name


# --- folders and variants ------------------------------------------------------------------------


def test_a_subfolder_and_a_variant_are_loaded_as_transformers_does(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "all" / "packed", RECIPE)
    model = ternarize.load(tmp_path / "all", subfolder="packed")
    model.save_pretrained(tmp_path / "variant", variant="small")
    assert not (tmp_path / "variant" / "model.safetensors").exists()
    again = ternarize.load(tmp_path / "variant", variant="small")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    with pytest.raises(CheckpointError, match="has no folder 'absent'"):
        ternarize.load(tmp_path / "all", subfolder="absent")


# --- what the command says -----------------------------------------------------------------------


def test_nothing_ternary_is_explained_by_the_dry_run_that_shows_the_reasons(tmp_path: Path) -> None:
    tiny_models.save("clip", tmp_path / "source", torch.float32)
    edit_config(tmp_path / "source", architectures=["CLIPModel"])
    done = run(
        "convert", tmp_path / "source", tmp_path / "out", "--keep", "*", "--dry-run", "--json"
    )
    assert done.exit_code == 1
    assert {row["becomes"] for row in json.loads(done.stdout)["tensors"]} == {"kept"}
    assert "--keep leaves no tensor to ternarize" in done.stderr


def test_the_command_tells_what_it_left_out_and_what_is_missing(
    source: Path, tmp_path: Path
) -> None:
    drop(source, MISSING)
    torch.save({"weight": torch.ones(1, 64)}, source / "sparse_linear.pt")
    refused = run("convert", source, tmp_path / "out", "--dry-run")
    assert (refused.exit_code, MISSING in refused.stderr) == (1, True)
    done = run("convert", source, tmp_path / "out", "--allow-missing", "--no-check")
    assert done.exit_code == 0, done.stderr
    assert "note: left out: sparse_linear.pt" in done.stderr
    assert MISSING in done.stderr


# --- weights that blocks share -------------------------------------------------------------------


def test_what_blocks_share_is_packed_once_but_not_calibrated(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        layers_block_type=["hybrid", "mamba", "hybrid", "mamba"],
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=32,
        mamba_d_state=16,
        mamba_headdim=16,
        n_mamba_heads=8,
        num_mem_blocks=1,
        use_mem_rope=False,
    )
    config = transformers.Zamba2Config(**sizes)
    transformers.Zamba2ForCausalLM(config).save_pretrained(tmp_path / "source")
    record = convert(tmp_path / "source", tmp_path / "packed", RECIPE)
    name = "model.layers.0.shared_transformer.self_attn.q_proj.weight"
    assert record["tensors"][name]["becomes"] == "ternary"
    model = ternarize.load(tmp_path / "packed")
    first, second = (model.model.layers[at].shared_transformer.self_attn.q_proj for at in (0, 2))
    assert first.weight is second.weight
    assert first.weight_scale is second.weight_scale
    assert_near(tmp_path / "packed", tmp_path / "source")
    calibrated = make_plan(tmp_path / "source", Recipe("gptq", 32, calibrate=Calibrate()))
    reasons = {t.name: t.choice.reason for t in calibrated.tensors}
    assert reasons[name].startswith("tied to")
