"""Packed checkpoints load as models of transformers, run like their dense twins, and save again.

The models are those of tiny_models.py, packed by packing.py: random weights, every architecture's
own way to name, fuse and transpose them.
"""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import packing
import pytest
import reference
import tiny_models
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import ternarize
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, DigestError, FormatError, UsageError
from ternarize.files import container, metadata
from ternarize.files.metadata import Record
from ternarize.plans.recipe import Recipe
from ternarize.runtime.modules.experts import TernaryExperts
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import Packed
from ternarize.runtime.plugin.quantizer import TernarizeConfig
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.trits.methods.absmean import absmean
from ternarize.trits.rotation import block_size

ALL = sorted(tiny_models.CONFIGS)
SOME = ["llama_tied", "mixtral", "gpt2", "gpt_oss", "vit", "t5"]  # each saves in its own way


Made = Callable[[str], Path]


@pytest.fixture
def packed(made: Made, tmp_path: Path) -> Path:
    """A packed checkpoint that a test may damage."""
    target = tmp_path / "packed"
    target.mkdir()
    for file in (made("llama") / "packed").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rewrite(
    directory: Path, change: Callable[[dict[str, Tensor], dict[str, Record]], object]
) -> None:
    """Write a checkpoint again, well formed, after `change` to its tensors and records."""
    checkpoint = open_checkpoint(directory)
    records = metadata.records_of(checkpoint)
    tensors = {k: v.clone() for k, v in packing.read_checkpoint(directory).items()}
    change(tensors, records)
    config = (directory / "config.json").read_bytes()
    packing.write(directory, tensors, records, directory)
    (directory / "config.json").write_bytes(config)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def same_tensors(a: Path, b: Path, but: str = "no name") -> bool:
    first, second = packing.read_checkpoint(a), packing.read_checkpoint(b)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
        if but not in name
    )


# --- the same numbers, in less memory -----------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_outputs_equal_those_of_the_dense_twin(made: Made, name: str) -> None:
    folder = made(name)
    model = ternarize.load(folder / "packed", dtype=torch.float32)
    dense = packing.load_dense(folder / "dense", dtype=torch.float32)
    packing.assert_like_dense(model, dense, exact=name != "gpt_oss")  # which computes x @ W
    assert not model.training


@pytest.mark.parametrize("name", ALL)
def test_memory_is_that_of_the_file(made: Made, name: str) -> None:
    """Every parameter has the bytes that the file has for it: no dense copy anywhere."""
    folder = made(name)
    model = packing.stored(ternarize.load(folder / "packed"))
    stored = open_checkpoint(folder / "packed").tensors
    expected = sum(info.nbytes for info in stored.values())
    held = {t.data_ptr(): t.numel() * t.element_size() for t in model.parameters()}
    held |= {t.data_ptr(): t.numel() * t.element_size() for _, t in buffers(model)}
    # DeepSeek's router bias is held as float32; transformers < 5.24 writes it as bfloat16
    biases = [n for n in model.state_dict() if n.endswith("e_score_correction_bias")]
    wider = sum(model.get_buffer(n).nbytes - stored[n].nbytes for n in biases)
    assert sum(held.values()) == expected + wider


def buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to the checkpoint."""
    saved = model.state_dict()
    return [(name, tensor) for name, tensor in model.named_buffers() if name in saved]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "whisper"])
def test_16_bit_models_equal_their_dense_twins(made: Made, name: str, dtype: torch.dtype) -> None:
    folder = made(name)
    model = ternarize.load(folder / "packed", dtype=dtype)
    dense = packing.load_dense(folder / "dense", dtype=dtype)
    ours, theirs = packing.output(model), packing.output(dense)
    assert ours.dtype == dtype
    exact = packing.output(packing.load_dense(folder / "dense", dtype=torch.float32))
    errors = [float((output.float() - exact).norm()) for output in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1]
    assert torch.equal(packing.output(packing.stored(model)), theirs)


@pytest.mark.parametrize("group_size", [-1, 0, 128])
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gpt2", "vit"])
def test_every_group_size_survives_fusing_and_saving(
    made: Made, tmp_path: Path, name: str, group_size: int
) -> None:
    source = made(name) / "source"
    packing.pack_checkpoint(source, tmp_path / "packed", group_size)
    packing.dense_twin(tmp_path / "packed", source, tmp_path / "dense")
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    dense = packing.load_dense(tmp_path / "dense", dtype=torch.float32)
    packing.assert_like_dense(model, dense)
    model = ternarize.load(tmp_path / "packed")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    # all of them are one scale a row, or fewer: 128 is longer than these rows
    if version < (5, 23) and name in ("mixtral", "deepseek_v3"):
        with pytest.raises(UsageError, match="Install transformers >= 5.23"):
            model.save_pretrained(tmp_path / "saved")
        return
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "packed", tmp_path / "saved", but="e_score_correction_bias")


def test_fused_scales_take_the_widest_dtype(made: Made, tmp_path: Path) -> None:
    source = made("mixtral") / "source"
    dtypes = {"w1.weight": torch.float32}
    packing.pack_checkpoint(source, tmp_path / "packed", scale_dtypes=dtypes)
    packing.dense_twin(tmp_path / "packed", source, tmp_path / "dense")
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    dense = packing.load_dense(tmp_path / "dense", dtype=torch.float32)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert experts.gate_up_proj_scale.dtype == torch.float32  # w1 is float32, w3 float16
    assert experts.down_proj_scale.dtype == torch.float16
    packing.assert_like_dense(model, dense)


@pytest.mark.parametrize("turned", [True, False])
def test_experts_that_the_hub_stores_the_other_way_round(tmp_path: Path, turned: bool) -> None:
    """Qwen3-VL's experts are (cols, rows) on the Hub and (rows, cols) in a model saved again."""
    source = tmp_path / "source"
    text = tiny_models.TEXT | {"moe_intermediate_size": 40, "num_experts": 4}
    vision = tiny_models.VISION | {"depth": 2, "num_heads": 4, "out_hidden_size": 64}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
        vision_config=vision | {"deepstack_visual_indexes": [0]},
        architectures=["Qwen3VLMoeForConditionalGeneration"],
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    model.save_pretrained(source)
    tensors = packing.read_checkpoint(source)
    if turned:
        tensors = {n: t.mT.contiguous() if "experts" in n else t for n, t in tensors.items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    packed = packing.pack_checkpoint(source, tmp_path / "packed")
    assert {packed[name] for name in packed if "experts" in name} == {turned}
    packing.dense_twin(tmp_path / "packed", source, tmp_path / "dense")
    ternary = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    dense = packing.load_dense(tmp_path / "dense", dtype=torch.float32)
    packing.assert_like_dense(ternary, dense)
    ternary.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "packed", tmp_path / "saved")
    assert packing.read_records(tmp_path / "saved") == packing.read_records(tmp_path / "packed")


# --- rotated matrices ----------------------------------------------------------------------------


def turn(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
    """Say of every packed matrix that it stands for W R, with the largest block of up to 64."""
    for name, record in records.items():
        if record.shape is not None:
            block = block_size(record.shape[-1], 64)
            records[name] = replace(record, rotation=(block, 11 if block else 0))


@pytest.fixture
def rotated(made: Made, tmp_path: Path) -> Callable[[str], Path]:
    """A folder with `packed`, rotated, and `dense`, its twin."""

    def make(name: str) -> Path:
        copied(made(name) / "packed", tmp_path / "packed")
        rewrite(tmp_path / "packed", turn)
        packing.dense_twin(tmp_path / "packed", made(name) / "source", tmp_path / "dense")
        return tmp_path

    return make


@pytest.mark.parametrize("name", [*SOME, "deepseek_v3", "qwen3_moe", "whisper"])
def test_rotated_matrices_go_the_whole_way(made: Made, rotated: Made, name: str) -> None:
    folder = rotated(name)
    records = packing.read_records(folder / "packed")
    blocks = {r["rotation"]["block"] for table in records for r in table.values() if "codec" in r}
    assert max(blocks) >= 16  # of 48, 64 and 136 columns
    assert reference.main([str(folder / "packed")]) == 0
    model: Any = ternarize.load(folder / "packed", dtype=torch.float32)
    dense = packing.load_dense(folder / "dense", dtype=torch.float32)
    ours = packing.output(model)
    packing.assert_near(ours, packing.output(dense), 2e-5)
    plain = packing.output(ternarize.load(made(name) / "packed", dtype=torch.float32))
    assert float((ours - plain).abs().max()) > 0.01 * float(plain.abs().max())
    ternarize.load(folder / "packed").save_pretrained(folder / "saved")
    router = "e_score_correction_bias"  # read as bfloat16 and held as float32
    assert same_tensors(folder / "packed", folder / "saved", but=router)
    for before, after in zip(records, packing.read_records(folder / "saved"), strict=True):
        assert {n: r for n, r in before.items() if router not in n} == {
            n: r for n, r in after.items() if router not in n
        }


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt2", "gpt_oss"])
def test_a_rotated_model_dequantizes_to_its_weights(rotated: Made, name: str) -> None:
    folder = rotated(name)
    model: Any = ternarize.load(folder / "packed", dtype=torch.float32, dequantize=True)
    assert not any(isinstance(module, Packed) for module in model.modules())
    dense = packing.load_dense(folder / "dense", dtype=torch.float32)
    weights = dict(dense.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    for parameter, weight in model.named_parameters():
        assert torch.allclose(weight, weights[parameter], rtol=0, atol=1e-7), parameter
    narrow: Any = ternarize.load(folder / "packed", dtype=torch.bfloat16, dequantize=True)
    for parameter, weight in narrow.named_parameters():  # rounded once, after it is turned back
        assert torch.equal(weight, model.get_parameter(parameter).bfloat16()), parameter


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_rotated_models_run_in_16_bits(rotated: Made, name: str) -> None:
    folder = rotated(name)
    exact = packing.output(packing.load_dense(folder / "dense", dtype=torch.float32))
    errors = []
    for model in (
        ternarize.load(folder / "packed", dtype=torch.bfloat16),
        packing.load_dense(folder / "dense", dtype=torch.bfloat16),
    ):
        output = packing.output(model)
        assert output.dtype == torch.bfloat16
        errors.append(float((output.float() - exact).norm()))
    assert errors[0] < 2 * errors[1]  # of the dense twin, in bfloat16 too


def test_a_rotated_model_compiles(rotated: Made) -> None:
    model = ternarize.load(rotated("llama") / "packed", dtype=torch.float32)
    expected = packing.output(model)
    model.compile(fullgraph=True, backend="eager")
    packing.assert_near(packing.output(model), expected)


def test_tensors_that_the_model_fuses_have_one_rotation(rotated: Made) -> None:
    packed = rotated("mixtral") / "packed"
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"

    def other(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
        records[name] = replace(records[name], rotation=(records[name].rotation[0], 12))

    rewrite(packed, other)
    with pytest.raises(FormatError, match=r"rotation \(64, 12\), .* fuses .*rotation \(64, 11\)"):
        ternarize.load(packed)


# --- everything else that transformers does -----------------------------------------------------


def test_from_pretrained_of_transformers_loads_it(made: Made) -> None:
    folder = made("llama")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert type(model) is transformers.LlamaForCausalLM
    assert isinstance(model.model.layers[0].mlp.up_proj, TernaryLinear)
    assert model.dtype == torch.bfloat16
    assert torch.equal(packing.output(model), packing.output(ternarize.load(folder / "packed")))


def test_generation_with_and_without_a_static_cache(made: Made) -> None:
    model: Any = ternarize.load(made("mixtral") / "packed")
    prompt = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 5, "do_sample": False}
    dynamic = model.generate(prompt, **options)
    static = model.generate(prompt, cache_implementation="static", **options)
    assert dynamic.shape == (1, 14) and torch.equal(dynamic, static)


@pytest.mark.parametrize("device", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(made: Made, device: Any) -> None:
    folder = made("mixtral")
    model = ternarize.load(folder / "packed", device=device)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(packing.output(model), packing.output(ternarize.load(folder / "packed")))


def test_a_model_offloaded_to_disk_runs_and_saves(made: Made, tmp_path: Path) -> None:
    folder = made("mixtral")
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    model: Any = ternarize.load(
        folder / "packed",
        device=dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    whole = packing.stored(ternarize.load(folder / "packed"))
    assert torch.equal(packing.output(packing.stored(model)), packing.output(whole))
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(folder / "packed", tmp_path / "saved")
    ternarize.load(tmp_path / "saved")
    with pytest.raises(UsageError, match="is offloaded"):
        model.dequantize()


@pytest.mark.parametrize(
    ("name", "memory", "head"),
    [
        ("llama", 20_000, None),  # nothing fits
        ("mixtral", 90_000, None),  # the token embedding does
        ("llama_tied", 60_000, None),  # and the head that is tied to it
        ("llama_tied", 60_000, "int8"),
    ],
)
def test_what_does_not_fit_in_memory_runs_from_the_disk(
    made: Made, tmp_path: Path, name: str, memory: int, head: str | None
) -> None:
    whole: Any = ternarize.load(made(name) / "packed", dtype=torch.float32, head=head)
    model: Any = ternarize.load(
        made(name) / "packed",
        dtype=torch.float32,
        head=head,
        device="auto",
        max_memory={"cpu": memory},
        offload_folder=tmp_path / "offload",
    )
    places = set(model.hf_device_map.values())
    assert places == ({"disk"} if memory == 20_000 else {"cpu", "disk"})
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    packing.assert_near(packing.output(model), packing.output(whole))


def test_a_head_on_the_disk_is_not_rounded(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "auto", "max_memory": {"cpu": 20_000}}
    with pytest.raises(UsageError, match="is offloaded; it has to be in memory to become int8"):
        ternarize.load(made("llama") / "packed", head="int8", offload_folder=tmp_path, **options)


def test_a_copied_model_is_the_same(made: Made) -> None:
    model = ternarize.load(made("mixtral") / "packed")
    assert torch.equal(packing.output(copy.deepcopy(model)), packing.output(model))


def test_a_compiled_model_is_the_same(made: Made) -> None:
    model = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    expected = packing.output(model)
    model.compile(fullgraph=True, backend="eager")
    assert torch.equal(packing.output(model), expected)


def test_only_what_is_not_packed_can_be_trained(made: Made) -> None:
    model: Any = ternarize.load(made("mixtral") / "packed")
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable
    for name, parameter in model.named_parameters():
        is_packed = parameter.dtype == torch.uint8 or name.endswith("_scale")
        assert parameter.requires_grad != is_packed, name


def turn_rows(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
    """`turn` what tensor parallelism cuts into rows."""
    rows = {name: r for name, r in records.items() if not re.search("o_proj|down_proj", name)}
    turn(tensors, rows)
    records |= rows


def test_models_cut_into_two_processes_run_and_save(tmp_path: Path) -> None:
    # 128 columns: two groups of 32 for each process
    sizes = tiny_models.TEXT | {"intermediate_size": 128, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    source = tmp_path / "source"
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    convert(source, tmp_path / "int8_head", Recipe("itf", 32, head="int8"))
    for name in ("plain", "rotated", "rotated_rows", "rows_of_one_group"):
        packing.pack_checkpoint(source, tmp_path / name, -1 if name == "rows_of_one_group" else 32)
    rewrite(tmp_path / "rotated", turn)
    rewrite(tmp_path / "rotated_rows", turn_rows)
    packing.pack_checkpoint(source, tmp_path / "int8", activations="int8")
    script = Path(__file__).with_name("parallel_run.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    root = str(script.parents[1])
    subprocess.run(
        [*torchrun, str(script), str(tmp_path)],
        check=True,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )
    for name in ("plain", "int8_head", "rotated_rows"):
        folders = tmp_path / f"{name}_saved", tmp_path / name
        saved, packed = (packing.read_checkpoint(folder) for folder in folders)
        assert saved.keys() == packed.keys()
        assert all(torch.equal(saved[key].to(packed[key].dtype), packed[key]) for key in packed)
        ternarize.load(folders[0])


def test_int8_activations_are_taken_from_the_config_and_from_the_caller(
    made: Made, tmp_path: Path
) -> None:
    folder = made("llama")
    edit_config(copied(folder / "packed", tmp_path / "int8"), set_activations)
    float_output = packing.output(ternarize.load(folder / "packed"))
    outputs = [
        packing.output(ternarize.load(tmp_path / "int8")),
        packing.output(ternarize.load(folder / "packed", activations="int8")),
    ]
    assert torch.equal(*outputs) and not torch.equal(outputs[0], float_output)
    back = ternarize.load(tmp_path / "int8", activations="none")
    assert torch.equal(packing.output(back), float_output)
    with pytest.raises(UsageError, match="activations: 'int3'"):
        ternarize.load(folder / "packed", activations="int3")


def set_activations(config: dict[str, Any]) -> None:
    config["quantization_config"]["activations"] = "int8"


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_switches_in_a_config_given_to_from_pretrained(packed: Path) -> None:
    cls = transformers.LlamaForCausalLM
    model = cls.from_pretrained(packed, quantization_config=TernarizeConfig(activations="int8"))
    assert model.model.layers[0].mlp.up_proj.activations == "int8"
    flip_a_byte(packed, "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(FormatError):
        cls.from_pretrained(packed)
    cls.from_pretrained(packed, quantization_config=TernarizeConfig(verify=False))


def test_ternarizing_on_the_fly_is_refused(made: Made) -> None:
    with pytest.raises(UsageError, match="Run `ternarize convert` first"):
        transformers.LlamaForCausalLM.from_pretrained(
            made("llama") / "source", quantization_config=TernarizeConfig()
        )


def test_a_new_head_may_be_put_on_a_packed_body(made: Made) -> None:
    cls: Any = transformers.BertForSequenceClassification
    model = cls.from_pretrained(made("bert") / "packed")
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense, TernaryLinear)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALL if n != "deepseek_v3"])
def test_saving_gives_back_the_same_tensors_and_records(
    made: Made, tmp_path: Path, name: str
) -> None:
    folder = made(name)
    ternarize.load(folder / "packed").save_pretrained(tmp_path / "saved")
    assert same_tensors(folder / "packed", tmp_path / "saved")
    assert packing.read_records(tmp_path / "saved") == packing.read_records(folder / "packed")
    configs = [
        json.loads((d / "config.json").read_text())["quantization_config"]
        for d in (folder / "packed", tmp_path / "saved")
    ]
    assert configs[0] == configs[1]
    again = ternarize.load(tmp_path / "saved")
    expected = packing.output(ternarize.load(folder / "packed"))
    assert torch.equal(packing.output(again), expected)


def test_every_shard_of_a_saved_model_has_the_records(made: Made, tmp_path: Path) -> None:
    folder = made("mixtral")
    model = ternarize.load(folder / "packed")
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    tables = packing.read_records(tmp_path / "saved")
    assert len(tables) > 2 and all(table == tables[0] for table in tables)
    assert same_tensors(folder / "packed", tmp_path / "saved")
    assert torch.equal(packing.output(ternarize.load(tmp_path / "saved")), packing.output(model))


def test_a_changed_tensor_is_saved_with_its_new_digest(made: Made, tmp_path: Path) -> None:
    model: Any = ternarize.load(made("llama") / "packed")
    with torch.no_grad():
        model.model.norm.weight += 1
        model.model.layers[0].mlp.up_proj.weight_scale *= 2
    model.save_pretrained(tmp_path / "saved")
    ternarize.load(tmp_path / "saved")
    (saved,) = packing.read_records(tmp_path / "saved")
    (before,) = packing.read_records(made("llama") / "packed")
    changed = {name for name in saved if saved[name] != before[name]}
    assert changed == {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}


# --- back to an ordinary model -------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_a_dequantized_model_is_an_ordinary_model(made: Made, tmp_path: Path, name: str) -> None:
    folder = made(name)
    expected = packing.output(packing.stored(ternarize.load(folder / "packed")))
    model: Any = ternarize.load(folder / "packed", dequantize=True)
    assert not any(isinstance(module, Packed) for module in model.modules())
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    source = packing.read_checkpoint(folder / "source")
    saved = packing.read_checkpoint(tmp_path / "saved")
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {
        n: (t.shape, t.dtype) for n, t in source.items()
    }
    again = packing.load_dense(tmp_path / "saved")
    assert torch.allclose(packing.output(again), expected, atol=1e-2)


def test_a_model_can_be_dequantized_after_loading(made: Made) -> None:
    model: Any = ternarize.load(made("mixtral") / "packed", dtype=torch.float32)
    near = packing.output(model)
    expected = packing.output(packing.stored(model))
    packing.assert_near(near, expected)
    assert any(isinstance(module, TernaryExperts) for module in model.modules())
    model.set_experts_implementation("eager")
    assert torch.equal(packing.output(model.dequantize()), expected)
    assert not any(isinstance(module, Packed) for module in model.modules())


# --- what is refused -----------------------------------------------------------------------------


def flip_a_byte(directory: Path, name: str) -> None:
    info = open_checkpoint(directory).tensors[name]
    with (directory / info.file).open("r+b") as file:
        file.seek(info.start + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
    ],
)
def test_a_flipped_bit_is_found_and_named(packed: Path, name: str) -> None:
    flip_a_byte(packed, name)
    with pytest.raises(FormatError, match=name.removesuffix("_scale")):
        ternarize.load(packed)
    ternarize.load(packed, verify=False)


def test_a_missing_weight_is_never_made_up(packed: Path) -> None:
    rewrite(packed, lambda t, r: (t.pop("model.norm.weight"), r.pop("model.norm.weight")))
    with pytest.raises(FormatError, match="model.norm.weight: LlamaForCausalLM needs it"):
        ternarize.load(packed)
    with pytest.raises(FormatError, match="model.norm.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(packed)


def test_a_missing_expert_is_never_made_up(made: Made, tmp_path: Path) -> None:
    folder = copied(made("mixtral") / "packed", tmp_path / "packed")
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"

    def drop(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
        for key in (name, f"{name}_scale"):
            del tensors[key]
        del records[name]

    rewrite(folder, drop)
    with pytest.raises(FormatError, match="7 tensors of 60928 weights; the model has 69632"):
        ternarize.load(folder)


def test_a_packed_weight_without_a_place_is_refused(packed: Path) -> None:
    def rename(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
        old, new = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.other.weight"
        for end in ("", "_scale"):
            tensors[new + end] = tensors.pop(old + end)
        records[new] = records.pop(old)

    rewrite(packed, rename)
    with pytest.raises(FormatError, match="mlp.other.weight: is packed, but LlamaForCausalLM has"):
        ternarize.load(packed)


def test_weights_of_another_shape_are_refused(packed: Path) -> None:
    edit_config(packed, lambda config: config.update(intermediate_size=128))
    with pytest.raises(FormatError, match=r"is \[64, 136\]; .* is \[64, 128\] in a Linear"):
        ternarize.load(packed)


def test_a_flag_that_disagrees_with_the_model_is_refused(packed: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"  # 64 x 64: the shape alone cannot tell
    rewrite(packed, lambda t, r: r.update({name: replace(r[name], transposed=True)}))
    with pytest.raises(FormatError, match="64], transposed; .* which it does not fit"):
        ternarize.load(packed)


def repack(tensors: dict[str, Tensor], records: dict[str, Record], name: str, size: int) -> None:
    """Give one packed tensor another group size."""
    ternary = container.decode(tensors[name], tensors[f"{name}_scale"], records[name])
    again = absmean(ternary.dequantize(), size)
    tensors[name], tensors[f"{name}_scale"] = container.encode(again)
    digest = container.digest(tensors[name], tensors[f"{name}_scale"])
    records[name] = replace(records[name], group_size=size, sha256=digest)


def test_fused_weights_must_agree_on_their_groups(made: Made, tmp_path: Path) -> None:
    folder = copied(made("mixtral") / "packed", tmp_path / "packed")
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    rewrite(folder, lambda t, r: repack(t, r, name, 64))
    with pytest.raises(FormatError, match="fuses with it, has .*the same group size"):
        ternarize.load(folder)


def test_layers_that_are_not_fused_may_differ_in_their_groups(packed: Path) -> None:
    rewrite(packed, lambda t, r: repack(t, r, "model.layers.0.mlp.up_proj.weight", -1))
    mlp: Any = ternarize.load(packed).get_submodule("model.layers.0.mlp")
    assert (mlp.up_proj.group_size, mlp.gate_proj.group_size) == (-1, 32)


def test_fused_weights_are_packed_together_or_not_at_all(made: Made, tmp_path: Path) -> None:
    folder = copied(made("mixtral") / "packed", tmp_path / "packed")
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"

    def unpack(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
        scale = tensors.pop(f"{name}_scale")
        tensors[name] = container.decode(tensors[name], scale, records[name]).dequantize()
        records[name] = Record(container.digest(tensors[name]))

    rewrite(folder, unpack)
    with pytest.raises(FormatError, match="experts.2.w3.weight: is not packed, but"):
        ternarize.load(folder)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_may_be_packed_under_either_name(
    made: Made, tmp_path: Path, name: str
) -> None:
    folder = copied(made("llama_tied") / "packed", tmp_path / "packed")

    def pack(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
        weight = tensors.pop("model.embed_tokens.weight")
        stored = container.encode(absmean(weight, 32))
        del records["model.embed_tokens.weight"]
        tensors[name], tensors[f"{name}_scale"] = stored
        records[name] = Record(container.digest(*stored), tuple(weight.shape), 32)

    rewrite(folder, pack)
    model: Any = ternarize.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    assert packing.output(model).isfinite().all()


def test_what_is_packed_twice_is_not_tied(made: Made, tmp_path: Path) -> None:
    folder = copied(made("llama_tied") / "packed", tmp_path / "packed")
    weights: dict[str, Tensor] = {}

    def pack(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
        weight = tensors["model.embed_tokens.weight"]
        for name, size in (("lm_head.weight", 32), ("model.embed_tokens.weight", 64)):
            ternary = absmean(weight, size)
            stored = container.encode(ternary)
            tensors[name], tensors[f"{name}_scale"] = stored
            records[name] = Record(container.digest(*stored), tuple(weight.shape), size)
            weights[name] = container.dequantize(*stored, records[name])

    rewrite(folder, pack)
    model = ternarize.load(folder, dequantize=True, dtype=torch.float32)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_formats_from_the_future_are_refused(packed: Path) -> None:
    edit_config(packed, lambda c: c["quantization_config"].update(format_version=2))
    with pytest.raises(FormatError, match="format version 2; .* Install a newer ternarize"):
        ternarize.load(packed)


def test_what_is_no_packed_checkpoint_is_refused(made: Made, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no quantization_config"):
        ternarize.load(made("llama") / "source")
    edit_config(packed, lambda c: c["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(FormatError, match="quant_method 'gptq'; expected quant_method 'ternarize'"):
        ternarize.load(packed)
    (packed / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        ternarize.load(packed)
    with pytest.raises(CheckpointError, match="no such directory"):
        ternarize.load(tmp_path / "absent" / "model")
    with pytest.raises(CheckpointError, match="is a file"):
        ternarize.load(packed / "model.safetensors")


def test_an_architecture_that_transformers_does_not_know_is_refused(packed: Path) -> None:
    edit_config(packed, lambda c: c.update(architectures=["NoSuchModel"]))
    with pytest.raises(CheckpointError, match="no model class for architectures"):
        ternarize.load(packed)
    edit_config(packed, lambda c: c.update(model_type="no_such_model"))
    with pytest.raises(CheckpointError, match="model type `no_such_model`.*install what it needs"):
        ternarize.load(packed)


def test_plain_weights_under_a_packed_config_are_refused(made: Made, packed: Path) -> None:
    source = made("llama") / "source" / "model.safetensors"
    (packed / "model.safetensors").write_bytes(source.read_bytes())
    with pytest.raises(FormatError, match="no 'ternarize' in its metadata"):
        ternarize.load(packed)


def test_a_damaged_digest_is_a_digest_error(packed: Path) -> None:
    flip_a_byte(packed, "lm_head.weight")
    with pytest.raises(
        DigestError, match="model.safetensors: lm_head.weight: its bytes have changed"
    ):
        ternarize.load(packed)


# --- importing -----------------------------------------------------------------------------------

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "ternarize" in AUTO_QUANTIZER_MAPPING and "ternarize" in AUTO_QUANTIZATION_CONFIG_MAPPING
import ternarize
assert all(getattr(ternarize, name) for name in ternarize.__all__)
assert callable(ternarize.load) and callable(ternarize.qat.prepare)
"""


ORDERS = (
    "import ternarize; import transformers",
    "from transformers import PreTrainedModel; import ternarize",  # tables are filled already
    "import ternarize.runtime.load, ternarize.runtime.plugin.quantizer",
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each order in a fork of what has torch alone")
def test_the_order_of_imports_does_not_matter() -> None:
    code = f"""
import os, torch
for order in {ORDERS!r}:
    child = os.fork()
    if child == 0:
        exec(order + {REGISTERED!r})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_importing_ternarize_imports_nothing_heavy() -> None:
    code = (
        "import sys, ternarize\n"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors', 'huggingface_hub'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
