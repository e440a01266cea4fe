"""Exports: what other engines read is what is packed, and what they cannot hold is refused.

The oracles are others' code: the package `gguf` for blocks and files, and transformers in a process
in which ternarize cannot be imported, for its own layouts and, through its reader of GGUF, for the
names, the order of rows, the metadata and the vocabulary of GGUF files.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import packing
import pytest
import tiny_models
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, OutputError, TernarizeError, UsageError
from ternarize.files import container, llama_cpp, metadata
from ternarize.files.metadata import Record
from ternarize.plans.recipe import Recipe
from ternarize.publish.export import directory as to_directory
from ternarize.publish.export import export, vocabulary
from ternarize.publish.export import gguf as to_gguf
from ternarize.publish.export.common import common_scales, open_verified
from ternarize.trits import ggml
from ternarize.trits.ternary import Ternary

WORDS = "def function(value: int) -> None:\n    return the value of 123 numbers, it's 42%.\n" * 20
EXAMPLE_TEXT = Path(__file__).resolve().parent.parent / "examples" / "eval.txt"
SPECIAL = "<|begin|>"
# sizes that blocks of 256 divide, with fewer heads for keys than for queries
WIDE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _config(kind: str, **more: Any) -> Any:
    made = getattr(transformers, f"{kind}Config")(
        **{**WIDE, "architectures": [f"{kind.removesuffix('Text')}ForCausalLM"], **more}
    )
    return made


def qwen35(dim: int, **more: Any) -> Any:
    """Three layers with linear attention, whose heads have `dim` features, and one without."""
    return _config(
        "Qwen3_5Text",
        **{
            "num_hidden_layers": 4,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": dim,
            "linear_value_head_dim": dim,
            **more,
        },
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("Llama"),
    "llama_tied": lambda: _config("Llama", tie_word_embeddings=True),
    "mistral": lambda: _config("Mistral", head_dim=32),
    "qwen2": lambda: _config("Qwen2"),
    "qwen3_moe": lambda: _config(
        "Qwen3Moe",
        head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    # 128, and 768 above: what the reader takes, whatever the file says
    "qwen3": lambda: _config("Qwen3", head_dim=128),
    # a layer that sees all, and others with a window shorter than the text; 256: what it takes
    "gemma3": lambda: _config(
        "Gemma3Text",
        head_dim=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=6,
        sliding_window=8,
        pad_token_id=0,
    ),
    "phi3": lambda: _config("Phi3", pad_token_id=0),
    # heads of values in another order than llama.cpp's; of 256, so that blocks stay whole
    "qwen35": lambda: qwen35(256),
    # 1024 positions and four times the width: what the reader takes
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=320,
        n_embd=256,
        n_layer=2,
        n_head=8,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    ),
}


def train_tokenizer(
    directory: Path, *, split: Any = None, begin: bool = False, **options: Any
) -> Any:
    """A byte-level BPE tokenizer of at most 320 tokens, saved in `directory`."""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    tokenizer.pre_tokenizer = split or pre.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[SPECIAL],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{SPECIAL} $A", special_tokens=[(SPECIAL, 0)]
        )
    make: Any = transformers.PreTrainedTokenizerFast  # has no annotations
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SPECIAL)
    wrapped = make(tokenizer_object=tokenizer, **ends)
    wrapped.chat_template = "{{ messages[0].content }}"
    wrapped.save_pretrained(directory)
    return wrapped


def make_source(directory: Path, config: Any, seed: int = 0) -> Path:
    """A random model as a checkpoint in float32, with a tokenizer."""
    model = getattr(transformers, (config.architectures or [""])[0])(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.05 * noise if parameter.ndim > 1 else 1 + 0.05 * noise)
    model.save_pretrained(directory)
    train_tokenizer(directory, begin=True)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return make_source(folder / "source", CONFIGS["llama"]())


@pytest.fixture(scope="module")
def packed(source: Path, folder: Path) -> Callable[..., Path]:
    """The llama packed by a recipe, made once for each."""
    made: dict[Recipe, Path] = {}

    def make(group_size: int, activations: str = "none", **more: Any) -> Path:
        recipe = Recipe("absmean", group_size, activations=activations, **more)
        if recipe not in made:
            made[recipe] = folder / f"packed{len(made)}"
            convert(source, made[recipe], recipe)
        return made[recipe]

    return make


# --- without ternarize ---------------------------------------------------------------------------

STOCK = """
import json, sys
sys.modules["ternarize"] = None  # an import of it fails
import torch, transformers
transformers.utils.logging.disable_progress_bar()
for job in json.load(sys.stdin):
    more = {"gguf_file": job["gguf"]} if job.get("gguf") else {}
    dtype = getattr(torch, job.get("dtype", "float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(job["path"], dtype=dtype, **more)
    with torch.no_grad():
        torch.save(model(torch.tensor(job["ids"])).logits, job["out"])
    if "text" in job:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["path"], **more)
        json.dump(tokenizer(job["text"])["input_ids"], open(job["out"] + ".json", "w"))
"""
GEMMA = importlib.util.find_spec("transformers.integrations.gemma_quant") is not None
IDS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(3))


def stock_logits(jobs: list[dict[str, Any]], tmp_path: Path) -> list[Tensor]:
    """Logits of exported models, in one process that cannot import ternarize."""
    for number, job in enumerate(jobs):
        job |= {"out": str(tmp_path / f"logits{number}"), "path": str(job["path"])}
        job.setdefault("ids", IDS.tolist())
    done = subprocess.run(
        [sys.executable, "-c", STOCK],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # BitLinear asks torch.compile, which would ask for a C++ compiler
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(job["out"]) for job in jobs]


def our_logits(path: Path, **options: Any) -> Tensor:
    model = ternarize.load(path, **{"dtype": "float32", **options})
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def assert_near(found: Tensor, expected: Tensor, digits: float = 2e-5) -> None:
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= digits * scale


# --- blocks of ggml ------------------------------------------------------------------------------


def random_ternary(rows: int, blocks_: int, block: int, seed: int) -> Ternary:
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (rows, blocks_ * block), generator=generator, dtype=torch.int8)
    trits[0, :block] = 0  # a block of zeros
    scales = torch.rand(rows, blocks_, generator=generator).to(torch.float16).to(torch.float64)
    scales[0, 0] = 0
    return Ternary(trits, scales, block)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_those_of_gguf(kind: str, seed: int) -> None:
    ternary = random_ternary(7, 3, 256, seed)
    number = gguf.GGMLQuantizationType[kind.upper()]
    dense = ternary.dequantize()
    found = ggml.encode_blocks(ternary, kind).numpy()
    assert np.array_equal(found, gguf.quantize(dense.numpy(), number))
    assert np.array_equal(gguf.dequantize(found, number), dense.numpy())
    assert ggml.TYPES[kind].id == number
    assert (256, ggml.TYPES[kind].nbytes) == gguf.GGML_QUANT_SIZES[number]
    assert ggml.TYPES[kind].file_type == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_a_block_of_q2_0() -> None:
    """Golden bytes, worked out by hand: d, then four codes a byte from the low bits."""
    trits = torch.zeros(1, 64, dtype=torch.int8)
    trits[0, :8] = torch.tensor([1, 0, -1, -1, 1, 1, 1, 1])
    ternary = Ternary(trits, torch.tensor([[0.5]], dtype=torch.float64), 64)
    # 0.5 is 3800 in float16; codes 2 1 0 0 -> 2 + 1 * 4 = 06, 2 2 2 2 -> AA, 1 1 1 1 -> 55
    assert ggml.encode_blocks(ternary, "q2_0").numpy().tobytes().hex() == "003806aa" + 14 * "55"


@pytest.mark.parametrize("kind", ["q2_k", "q4_0"])
@pytest.mark.parametrize("seed", range(3))
def test_types_for_more_than_trits_hold_them_exactly(kind: str, seed: int) -> None:
    block = ggml.TYPES[kind].block
    ternary = random_ternary(7, 3, block, seed)
    number = gguf.GGMLQuantizationType[kind.upper()]
    found = ggml.encode_blocks(ternary, kind).numpy()
    assert np.array_equal(gguf.dequantize(found, number), ternary.dequantize().numpy())
    assert ggml.TYPES[kind].id == number
    assert (block, ggml.TYPES[kind].nbytes) == gguf.GGML_QUANT_SIZES[number]
    assert ggml.TYPES[kind].file_type == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_blocks_of_q8_0_are_those_of_gguf() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (5, 96), generator=generator, dtype=torch.int8)
    scales = torch.rand(5, 3, generator=generator).to(torch.float16).to(torch.float64)
    found = ggml.encode_q8_0(values, scales).numpy()
    expected = Ternary(values, scales, 32).dequantize()
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(gguf.dequantize(found, kind), expected.numpy())


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([-1, 0, 32, 48, 64, 96, 128, 192, 256, 384]),
    st.sampled_from([32, 64, 128, 384]),
    st.integers(1, 2),
    st.randoms(use_true_random=False),
)
def test_a_common_scale_is_exact_or_refused(
    group_size: int, block: int, choices: int, random: Any
) -> None:
    """It is there exactly when each block's non-zero weights have one magnitude."""
    rows, cols = 3, 384
    count = 1 if group_size <= 0 else -(-cols // group_size)
    generator = torch.Generator().manual_seed(random.randrange(2**30))
    trits = torch.randint(-1, 2, (rows, cols), generator=generator, dtype=torch.int8)
    trits *= torch.rand(rows, cols // 32, generator=generator).gt(0.5).repeat_interleave(32, -1)
    size = (1, 1) if group_size == 0 else (rows, count)
    scales = torch.randint(1, choices + 1, size, generator=generator).to(torch.float64) / 4
    ternary = Ternary(trits, scales, group_size)
    dense = ternary.dequantize().view(rows, cols // block, block)
    magnitudes = dense.abs()
    least = torch.where(magnitudes > 0, magnitudes, torch.inf).amin(-1)
    one = (magnitudes.amax(-1) == 0) | (magnitudes.amax(-1) == least)
    found = common_scales(ternary, block)
    assert (found is not None) == bool(one.all())
    if found is not None:
        assert torch.equal(Ternary(trits, found, block).dequantize().view_as(dense), dense)


# --- GGUF files ----------------------------------------------------------------------------------


def test_gguf_of_every_architecture_loads_elsewhere_with_our_logits(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = []
    ours, texts = [], []
    for name, config in CONFIGS.items():
        if name == "qwen35":  # of which its reader takes no ternary blocks
            continue
        source = make_source(tmp_path / name, config(), seed=len(name))
        convert(source, tmp_path / f"{name}-packed", Recipe("absmean", 256))
        kind = "tq1_0" if name == "llama_tied" else "tq2_0"
        file = f"{name}.gguf"
        report = export(tmp_path / f"{name}-packed", tmp_path / file, "gguf", kind=kind)
        # norms that multiply by 1 + w are stored so, rounded to float32
        shifted = all(row["relative_error"] < 1e-14 for row in report["errors"])
        assert (shifted if name == "gemma3" else report["exact"]) and not report["lost"], report
        text = "return the value, it's 1234 — ünïcode   \n\n  end"
        jobs.append({"path": tmp_path, "gguf": file, "text": text})
        texts.append(transformers.AutoTokenizer.from_pretrained(source)(text)["input_ids"])
        ours.append(our_logits(tmp_path / f"{name}-packed"))
    for job, found, expected, ids in zip(
        jobs, stock_logits(jobs, tmp_path), ours, texts, strict=True
    ):
        assert_near(found, expected)
        assert json.loads(Path(job["out"] + ".json").read_text()) == ids


def test_biases_are_reordered_as_their_rows(tmp_path: Path) -> None:
    """transformers' reader of GGUF knows no biases in this architecture; llama.cpp does."""
    config = _config("Llama", attention_bias=True, mlp_bias=True)
    source = make_source(tmp_path / "source", config)
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    _, tensors = read_gguf(tmp_path / "m.gguf")
    before = packing.read_checkpoint(source)
    for kind, heads in (("q", 8), ("k", 4), ("v", None)):
        bias = before[f"model.layers.1.self_attn.{kind}_proj.bias"].numpy()
        # even features of a head are the first half of transformers', odd ones the second
        expected = bias.copy()
        if heads is not None:
            halves = bias.reshape(heads, 2, 16)
            expected.reshape(heads, 32)[:, 0::2] = halves[:, 0]
            expected.reshape(heads, 32)[:, 1::2] = halves[:, 1]
        assert np.array_equal(tensors[f"blk.1.attn_{kind}.bias"].data, expected)
    assert "blk.0.ffn_down.bias" in tensors


@pytest.mark.parametrize(
    "config",
    [
        lambda: _config("Llama", attention_bias=True, mlp_bias=True),
        lambda: _config("Llama", rope_parameters=LLAMA3),
        lambda: _config("Qwen3", head_dim=64),
        lambda: _config("Mixtral", num_local_experts=4, head_dim=32),
        lambda: _config(
            "Qwen3Moe",
            head_dim=64,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=256,
            norm_topk_prob=True,
        ),
    ],
)
def test_llama_cpp_itself(tmp_path: Path, config: Any) -> None:
    """Logits of llama.cpp, which rounds activations to 8 bits, are near ours; tokens are equal."""
    llama_cpp = pytest.importorskip("llama_cpp")
    source = make_source(tmp_path / "source", config())
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf", kept_type="f32")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, logits_all=True, verbose=False)
    model.eval(IDS[0].tolist())
    found = torch.from_numpy(np.array(model.scores[: IDS.shape[1]]))
    model.close()
    expected = our_logits(tmp_path / "packed")[0]
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    # a router near a tie may choose another expert for a token
    assert float(cosine.median()) > 0.999 and float(cosine.min()) > 0.95


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_experts_become_one_tensor_in_their_order(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", _config("Mixtral", num_local_experts=4, head_dim=32))
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    assert fields["llama.expert_count"] == 4 and fields["llama.expert_used_count"] == 2
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    stack = tensors["blk.1.ffn_down_exps.weight"]
    assert stack.shape.tolist() == [512, 256, 4]  # the fastest first
    found = gguf.dequantize(stack.data, stack.tensor_type).reshape(4, 256, 512)
    stored = packing.read_checkpoint(tmp_path / "packed")
    for name, record in metadata.records_of(container_of(tmp_path / "packed")).items():
        if name.startswith("model.layers.1.block_sparse_moe.experts.") and ".w2." in name:
            dense = container.dequantize(stored[name], stored[name + "_scale"], record)
            assert np.array_equal(found[int(name.split(".")[5])], dense.numpy())


@pytest.mark.parametrize("tied", [True, False])
def test_names_without_the_models_prefix_are_exported_as_those_with_it(
    tmp_path: Path, tied: bool
) -> None:
    source = make_source(tmp_path / "source", _config("Llama", tie_word_embeddings=tied))
    exported = []
    for prefix in (True, False):
        if not prefix:
            tensors = load_file(source / "model.safetensors")
            bare = {name.removeprefix("model."): each for name, each in tensors.items()}
            assert bare.keys() != tensors.keys()
            save_file(bare, source / "model.safetensors", {"format": "pt"})
        convert(source, tmp_path / f"packed{prefix}", Recipe("absmean", 256))
        export(tmp_path / f"packed{prefix}", tmp_path / f"{prefix}.gguf", "gguf")
        _, written = read_gguf(tmp_path / f"{prefix}.gguf")
        exported.append({name: each.data.tobytes() for name, each in written.items()})
    assert exported[0] == exported[1]


def test_experts_of_two_types_are_no_stack(packed: Callable[..., Path]) -> None:
    model = open_verified(packed(256))
    config = _config("Mixtral", num_local_experts=2)

    def item(kind: int) -> to_gguf.GgufItem:
        return to_gguf.GgufItem("x", kind, (1, 256), 66, lambda: torch.zeros(66, dtype=torch.uint8))

    whole = to_gguf._stack(model, config, "x", {1: item(35), 0: item(35)})
    assert whole.shape == (2, 1, 256) and whole.read().numel() == whole.nbytes == 132
    for experts in ({0: item(35), 1: item(1)}, {0: item(35)}, {0: item(35), 2: item(35)}):
        with pytest.raises(CheckpointError, match="experts of 2, in . types"):
            to_gguf._stack(model, config, "x", experts)


@pytest.mark.parametrize("group_size", [-1, 0, 512, 256])
def test_rows_tensors_and_larger_groups_are_exact(
    packed: Callable[..., Path], tmp_path: Path, group_size: int
) -> None:
    report = export(packed(group_size), tmp_path / "m.gguf", "gguf")
    assert report["exact"] and report["bytes"] == (tmp_path / "m.gguf").stat().st_size
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.TQ2_0
    expected = packing.read_checkpoint(packed(group_size))
    name = "model.layers.1.mlp.down_proj.weight"
    record = metadata.records_of(container_of(packed(group_size)))[name]
    dense = container.dequantize(expected[name], expected[name + "_scale"], record)
    found = gguf.dequantize(down.data, down.tensor_type)
    assert np.array_equal(found.reshape(dense.shape), dense.numpy())
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_TQ2_0
    assert fields["llama.block_count"] == 2 and fields["llama.context_length"] == 128
    assert fields["llama.attention.head_count_kv"] == 4
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert len(fields["tokenizer.ggml.tokens"]) == 320


def container_of(directory: Path) -> Any:
    from ternarize.sources.checkpoint import open_checkpoint

    return open_checkpoint(directory)


@pytest.mark.parametrize(("group_size", "kind"), [(256, "q2_k"), (128, "q4_0"), (32, "q4_0")])
def test_a_modelfile_has_weights_that_ollama_reads(
    group_size: int, kind: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    report = export(packed(group_size), tmp_path / "m.gguf", "gguf", modelfile=True)
    assert report["type"] == kind and report["exact"]
    assert not any("does not read" in note for note in report["notes"])


def test_another_type_beside_a_modelfile_is_said(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    report = export(packed(256), tmp_path / "m.gguf", "gguf", kind="tq2_0", modelfile=True)
    assert "Ollama does not read TQ2_0: use q2_k or q4_0" in report["notes"]
    for kind in ("q2_k", "tq2_0"):
        with pytest.raises(CheckpointError, match="Use --type q4_0, or convert"):
            export(packed(128), tmp_path / "n.gguf", "gguf", kind=kind, modelfile=True)


def test_groups_of_64_and_128_fit_q2_0(packed: Callable[..., Path], tmp_path: Path) -> None:
    for group_size in (64, 128):
        path = tmp_path / f"{group_size}.gguf"
        assert export(packed(group_size), path, "gguf", kind="q2_0")["exact"]
        assert path.stat().st_size > 0


def test_what_blocks_cannot_hold_is_refused_before_anything_is_written(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"groups of 128, .* in 14 tensors .*--type q2_0"):
        export(packed(128), tmp_path / "m.gguf", "gguf", kind="tq2_0")
    assert not any(tmp_path.iterdir())


def test_what_a_loss_costs_is_measured(packed: Callable[..., Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "tq2_0", "allow_requantize": True}
    report = export(packed(128), tmp_path / "m.gguf", "gguf", **options)
    assert not report["exact"] and len(report["errors"]) == 7
    _, tensors = read_gguf(tmp_path / "m.gguf")
    stored = packing.read_checkpoint(packed(128))
    records = metadata.records_of(container_of(packed(128)))
    (row,) = [r for r in report["errors"] if "down_proj" in r["tensors"]]
    ratios, squared, energy = [], 0.0, 0.0
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        dense = container.dequantize(stored[name], stored[name + "_scale"], records[name]).double()
        tensor = tensors[f"blk.{layer}.ffn_down.weight"]
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).double()
        error = float((found.view_as(dense) - dense).square().sum())
        ratios.append(error / float(dense.square().sum()))
        squared, energy = squared + error, energy + float(dense.square().sum())
    assert row["count"] == 2 and 0 < row["relative_error"] < 0.1
    assert row["relative_error"] == pytest.approx(squared / energy, rel=1e-6)
    assert row["worst_relative_error"] == pytest.approx(max(ratios), rel=1e-6)


def rewrite(
    packed: Path, directory: Path, change: Callable[[dict[str, Tensor], dict[str, Record]], None]
) -> Path:
    """A copy of a packed checkpoint with other tensors and records, and digests that match."""
    tensors = packing.read_checkpoint(packed)
    records = metadata.records_of(container_of(packed))
    change(tensors, records)
    for name, record in records.items():
        parts = [tensors[name]] + ([tensors[name + "_scale"]] if record.shape else [])
        records[name] = replace(record, sha256=container.digest(*parts))
    directory.mkdir()
    for file in packed.iterdir():
        if file.name != "ternarize.json":
            (directory / file.name).write_bytes(file.read_bytes())
    said = metadata.dump_metadata(records)
    save_file(tensors, directory / "model.safetensors", metadata=said)
    return directory


def turn(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
    for name, record in records.items():
        if record.shape is not None:
            records[name] = replace(record, rotation=(64, 3))


def double(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
    for name, record in records.items():
        if record.shape is not None:
            records[name] = replace(record, planes=2)
            for each in (name, name + "_scale"):
                tensors[each] = torch.cat([tensors[each], tensors[each].flip(0)], -1)


def widen(tensors: dict[str, Tensor], records: dict[str, Record]) -> None:
    for name, record in records.items():
        if record.shape is not None:
            wide = tensors[name + "_scale"].to(torch.float32)
            tensors[name + "_scale"] = torch.where(wide > 0, wide + 1e-6, wide)


@pytest.mark.parametrize(
    ("change", "why", "to"),
    [
        (turn, "rotated inputs", "gguf"),
        (double, "2 planes", "gguf"),
        (widen, "scales that float16 does not hold", "gguf"),
        (turn, "rotated inputs", "gemma-int2"),
        (double, "2 planes", "gemma-int2"),
        (turn, "rotated inputs", "mlx"),
        (widen, "scales that float16 does not hold", "mlx"),
        (turn, "rotated inputs", "bitnet"),
    ],
)
def test_each_loss_is_named_and_the_nearest_is_measured(
    packed: Callable[..., Path], tmp_path: Path, change: Any, why: str, to: str
) -> None:
    changed = rewrite(packed(-1), tmp_path / "changed", change)
    options: dict[str, Any] = {"dtype": "float16"} if to == "mlx" else {}
    with pytest.raises(CheckpointError, match=f"{why} in 14 tensors.*--allow-requantize"):
        export(changed, tmp_path / "out", to, **options)
    report = export(changed, tmp_path / "out", to, allow_requantize=True, **options)
    assert why in report["lost"] and not report["exact"] and len(report["errors"]) >= 7
    bound = 1e-5 if change is widen else 0.6  # a rounded scale keeps the trits
    assert all(0 < row["relative_error"] < bound for row in report["errors"])


@pytest.mark.parametrize(("codec", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_ends_of_8_and_4_bits_are_exact(
    codec: str, kind: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    model = packed(256, head=codec, embeddings=codec)
    assert export(model, tmp_path / "m.gguf", "gguf")["exact"]
    _, tensors = read_gguf(tmp_path / "m.gguf")
    stored = packing.read_checkpoint(model)
    records = metadata.records_of(container_of(model))
    ends = (("token_embd", "model.embed_tokens"), ("output", "lm_head"))
    for new, name in ((f"{a}.weight", f"{b}.weight") for a, b in ends):
        assert tensors[new].tensor_type == gguf.GGMLQuantizationType[kind]
        dense = container.dequantize(stored[name], stored[name + "_scale"], records[name])
        found = gguf.dequantize(tensors[new].data, tensors[new].tensor_type)
        assert np.array_equal(found, dense.numpy())


@pytest.mark.parametrize("kept", ["f16", "bf16", "f32", "q8_0"])
def test_kept_matrices_in_another_type(
    packed: Callable[..., Path], tmp_path: Path, kept: str
) -> None:
    report = export(packed(256), tmp_path / "m.gguf", "gguf", kept_type=kept)
    _, tensors = read_gguf(tmp_path / "m.gguf")
    head = tensors["output.weight"]
    assert head.tensor_type == gguf.GGMLQuantizationType[kept.upper()]
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    dense = packing.read_checkpoint(packed(256))["lm_head.weight"].numpy()
    found = gguf.dequantize(head.data, head.tensor_type)
    error = float(((found - dense) ** 2).sum() / (dense**2).sum())
    rows = {row["tensors"]: row["relative_error"] for row in report["errors"]}
    assert report["exact"] == (kept == "f32")
    assert rows.get("lm_head.weight", 0) == pytest.approx(error, rel=1e-4)


def test_llama3_rope_factors_are_those_of_transformers(tmp_path: Path) -> None:
    config = _config("Llama", rope_parameters=LLAMA3)
    model = transformers.LlamaForCausalLM(config)
    default = transformers.LlamaForCausalLM(
        _config("Llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    )
    expected = default.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    found = llama_cpp.rope_factors(config.rope_parameters, 32)
    assert found is not None and expected.unique().numel() > 2
    assert_near(found, expected, 1e-5)
    source = make_source(tmp_path / "source", config)
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    _, tensors = read_gguf(tmp_path / "m.gguf")
    assert_near(torch.from_numpy(tensors["rope_freqs.weight"].data.copy()), expected, 1e-5)


def test_linear_rope_and_a_window(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    config = _config("Mistral", rope_parameters=rope, sliding_window=64)
    source = make_source(tmp_path / "source", config)
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    fields, _ = read_gguf(tmp_path / "m.gguf")
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 4.0
    assert fields["llama.context_length"] == 64  # inside the window nothing is missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPTNeoXForCausalLM"]},
            "architecture GPTNeoXForCausalLM; expected one of Ll",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"norm_topk_prob": False}, "norm_topk_prob False"),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "model_type": "gemma3_text",
                "head_dim": 32,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types .*, query_pre_attn_scalar 256; expected",
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias True"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'yarn'",
        ),
    ],
)
def test_unknown_architectures_are_refused(
    packed: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    changed = rewrite(packed(256), tmp_path / "changed", lambda tensors, records: None)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        export(changed, tmp_path / "m.gguf", "gguf")


def test_heads_that_blocks_would_cut_are_refused_or_told(tmp_path: Path) -> None:
    """llama.cpp has them in another order: blocks of 256 columns would be of several heads."""
    sizes = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    source = make_source(tmp_path / "source", qwen35(64, **sizes))
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    with pytest.raises(CheckpointError, match=r"heads of 64 columns in another order .* 3 tensors"):
        export(tmp_path / "packed", tmp_path / "m.gguf", "gguf", kind="tq2_0")
    report = export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    assert report["type"] == "q2_0" and not report["lost"]
    options: dict[str, Any] = {"kind": "tq2_0", "allow_requantize": True}
    report = export(tmp_path / "packed", tmp_path / "other.gguf", "gguf", **options)
    _, tensors = read_gguf(tmp_path / "other.gguf")
    stored = tensors["blk.1.ssm_out.weight"]
    found = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    name = "model.layers.1.linear_attn.out_proj.weight"
    # of four heads of keys the first of values, then the second of all
    heads = open_verified(tmp_path / "packed").dense(name).view(256, 4, 2, 64)
    expected = heads.transpose(1, 2).reshape(256, 512)
    error = float((found - expected).square().sum() / expected.square().sum())
    (row,) = (row for row in report["errors"] if "out_proj" in row["tensors"])
    assert 0 < error <= row["worst_relative_error"] * 1.001 < 0.5


def test_of_qwen35_a_file_has_what_is_multiplied(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", CONFIGS["qwen35"]())
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    said = {key: fields[f"qwen35.ssm.{key}"] for key in ("inner_size", "time_step_rank")}
    assert said == {"inner_size": 1024, "time_step_rank": 4}
    assert fields["qwen35.rope.dimension_sections"] == [11, 11, 10, 0]
    assert fields["qwen35.rope.dimension_count"] == 16
    before = packing.read_checkpoint(source)
    prefix, tiled = "model.layers.2.linear_attn", [0, 2, 1, 3]
    decay = -before[f"{prefix}.A_log"].exp()[tiled]
    assert np.array_equal(tensors["blk.2.ssm_a"].data, decay.numpy())
    assert np.array_equal(
        tensors["blk.2.ssm_dt.bias"].data, before[f"{prefix}.dt_bias"][tiled].numpy()
    )
    # its norm multiplies by w, all others by 1 + w
    norm = before[f"{prefix}.norm.weight"]
    assert np.array_equal(tensors["blk.2.ssm_norm.weight"].data, norm.numpy())
    norm = before["model.layers.2.input_layernorm.weight"] + 1
    assert np.array_equal(tensors["blk.2.attn_norm.weight"].data, norm.numpy())


def _composite(name: str) -> Any:
    text = CONFIGS[name]()
    ends: dict[str, Any] = {"text_config": text, "tie_word_embeddings": text.tie_word_embeddings}
    if name == "gemma3":
        ends |= {"vision_config": tiny_models.VISION, "mm_tokens_per_image": 4}
        return transformers.Gemma3Config(**ends, architectures=["Gemma3ForConditionalGeneration"])
    sizes = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    sizes |= {"out_hidden_size": 256, "num_position_embeddings": 16, "patch_size": 4}
    ends |= {"vision_config": sizes, "architectures": ["Qwen3_5ForConditionalGeneration"]}
    return transformers.Qwen3_5Config(**ends)


@pytest.mark.parametrize("name", ["gemma3", "qwen35"])
def test_of_a_model_that_sees_images_the_text_model_is_written(tmp_path: Path, name: str) -> None:
    """As if it had been alone."""
    whole = make_source(tmp_path / "whole", _composite(name))
    text = make_source(tmp_path / "text", CONFIGS[name]())
    state = {}
    for old, tensor in packing.read_checkpoint(whole).items():
        new = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", old)
        if not re.search("vis|modal", old):
            state[new.replace("model.lm_head", "lm_head")] = tensor.contiguous()
    assert state.keys() == packing.read_checkpoint(text).keys()
    save_file(state, text / "model.safetensors", metadata={"format": "pt"})
    written = []
    for source in (whole, text):
        packed, file = tmp_path / f"{source.name}-packed", tmp_path / f"{source.name}.gguf"
        convert(source, packed, Recipe("absmean", 256))
        report = export(packed, file, "gguf")
        seen = any("what sees images is left out" in note for note in report["notes"])
        assert seen is (source is whole)
        written.append(read_gguf(file))
    (keys, tensors), (expected_keys, expected) = written
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[each].data, expected[each].data) for each in expected)
    for key, value in expected_keys.items():
        # transformers may have another tokenizer for the class
        if not key.startswith(("general.", "GGUF.", "tokenizer.")):
            assert keys[key] == value, key


def test_of_gpt2_kept_matrices_are_turned_and_other_scales_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", CONFIGS["gpt2"]())
    convert(source, tmp_path / "packed", Recipe("absmean", 256, keep=("*c_fc.weight",)))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    _, tensors = read_gguf(tmp_path / "m.gguf")
    before = packing.read_checkpoint(source)["transformer.h.1.mlp.c_fc.weight"]
    assert np.array_equal(tensors["blk.1.ffn_up.weight"].data, before.t().numpy())
    changed = rewrite(tmp_path / "packed", tmp_path / "changed", lambda tensors, records: None)
    config = json.loads((changed / "config.json").read_text())
    config["scale_attn_by_inverse_layer_idx"] = True
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx True"):
        export(changed, tmp_path / "other.gguf", "gguf")


# --- vocabularies --------------------------------------------------------------------------------


class Recorder:
    """Stands for a GGUFWriter: keeps what is added, by the name of the method."""

    def __init__(self) -> None:
        self.calls: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        return lambda value: self.calls.__setitem__(name, value)


def _steps(*steps: Any) -> Any:
    return tokenizers.pre_tokenizers.Sequence(list(steps))


def _regex(pattern: str) -> Any:
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


_BYTES = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# as the files of these models have them
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


@pytest.mark.parametrize(
    ("name", "split", "options"),
    [
        ("gpt-2", None, {}),
        ("llama-bpe", _steps(_regex(LLAMA3_SPLIT), _BYTES), {"ignore_merges": True}),
        ("qwen2", _steps(_regex(QWEN2_SPLIT), _BYTES), {}),
        ("qwen35", _steps(_regex(PRETOKENIZE_REGEX), _BYTES), {}),
        (
            "smollm",
            _steps(
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ),
            {},
        ),
    ],
)
def test_splits_are_known_by_their_definition(
    tmp_path: Path, name: str, split: Any, options: dict[str, Any]
) -> None:
    tokenizer = train_tokenizer(tmp_path, split=split, **options)
    recorder = Recorder()
    vocabulary.write(recorder, tmp_path, 330)
    calls = recorder.calls
    assert calls["add_tokenizer_pre"] == name
    assert calls["add_token_list"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(
        list(range(len(tokenizer)))
    )
    assert calls["add_token_types"][0] == gguf.TokenType.CONTROL
    assert calls["add_token_types"][1] == gguf.TokenType.NORMAL
    assert calls["add_token_types"][-1] == gguf.TokenType.UNUSED
    assert calls["add_bos_token_id"] == calls["add_eos_token_id"] == 0
    assert calls["add_add_bos_token"] is False


def test_a_text_without_an_end_is_told(tmp_path: Path) -> None:
    """llama.cpp takes token 11 for the end where a file names none."""
    tokenizer = train_tokenizer(tmp_path, split=None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    recorder = Recorder()
    (note,) = vocabulary.write(recorder, tmp_path, 330)
    assert "add_eos_token_id" not in recorder.calls
    word = tokenizer.convert_ids_to_tokens(11)
    assert note.endswith(f"cannot say: llama.cpp takes {word!r} for it, its token 11")


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        (_steps(_regex(r"\d+"), _BYTES), {}, "splits text by .*Regex.*--no-tokenizer"),
        (_steps(_regex(LLAMA3_SPLIT), _BYTES), {}, "splits text by"),  # without ignore_merges
        (tokenizers.pre_tokenizers.Whitespace(), {"unk_token": SPECIAL}, "splits text by"),
        (None, {"byte_fallback": True}, "prepares text by .*ByteLevel"),
    ],
)
def test_unknown_splits_are_refused(
    tmp_path: Path, split: Any, options: dict[str, Any], message: str
) -> None:
    train_tokenizer(tmp_path, split=split, **options)
    with pytest.raises(CheckpointError, match=message):
        vocabulary.write(Recorder(), tmp_path, 330)


def sentencepiece_like(directory: Path, normalizer: Any = None, spoil: str = "") -> Any:
    """BPE over characters with spaces as U+2581, single bytes, and every merge that is possible."""
    space = llama_cpp.SPACE
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(space)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator([WORDS + EXAMPLE_TEXT.read_text()], trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [word for word, _ in learned]
    vocab = {word: at for at, word in enumerate([*words, *pieces])}
    merges = [
        (word[:cut], word[cut:])
        for word in pieces
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    assert len(merges) > len([word for word in pieces if len(word) > 1])  # some in several ways
    if spoil == "missing":
        merges.remove(next(m for m in merges if merges.count(m) == 1 and len("".join(m)) > 3))
    if spoil == "apart":
        made = ["".join(merge) for merge in merges]
        merges.append(merges.pop(next(n for n, w in enumerate(made) if made.count(w) > 1)))
    if spoil == "byte":
        vocab["<0x0>"] = vocab.pop("<0x00>")
    model = tokenizers.models.BPE(
        vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    part = tokenizers.normalizers
    tokenizer.normalizer = normalizer or part.Sequence(
        [part.Prepend(space), part.Replace(" ", space)]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(space, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    make: Any = transformers.PreTrainedTokenizerFast
    wrapped = make(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(directory)
    return wrapped


TEXTS = ["return the value of 42", " two  spaces,\n\na — ünïcode", "functionvalue: numbers, it's"]

ODD_TEXTS = [
    TEXTS[0],
    "two  spaces,\n\na — ünïcode\t\u00a0\u3000 end ",
    "functionvalue: 你好 🙂 e\u0301\r\n",
    "\nof the value",
    "",
]


def test_sentencepiece_vocabularies(tmp_path: Path) -> None:
    """Merging by the scores that are written gives the tokens of the original."""
    tokenizer = sentencepiece_like(tmp_path)
    recorder = Recorder()
    vocabulary.write(recorder, tmp_path, 600)
    calls = recorder.calls
    assert calls["add_tokenizer_model"] == "llama" and calls["add_add_space_prefix"] is True
    kinds = gguf.TokenType
    assert calls["add_token_types"][:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE]
    scores = dict(zip(calls["add_token_list"], calls["add_token_scores"], strict=True))

    def merge(text: str) -> list[str]:
        """As llama.cpp does: of all neighbours that make a token, those of the highest score."""
        parts = list(llama_cpp.SPACE + text.replace(" ", llama_cpp.SPACE))
        while True:
            pairs = [
                (-scores[a + b], at)
                for at, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                if a + b in scores
            ]
            if not pairs:
                break
            _, at = min(pairs)
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return [
            token
            for part in parts
            for token in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
        ]

    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert merge(text) == tokenizer.convert_ids_to_tokens(ids)
    assert any(len(token) > 4 for text in TEXTS for token in merge(text))


def test_sentencepiece_vocabularies_in_llama_cpp(source: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    config = CONFIGS["llama"]()
    config.vocab_size, config.bos_token_id, config.eos_token_id = 600, 1, 2
    make_source(tmp_path / "source", config)
    tokenizer = sentencepiece_like(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"]
    model.close()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing", "does not merge"),
        ("apart", "merges .* at two places"),
        ("byte", "has no token <0x00>"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(
    tmp_path: Path, spoil: str, message: str
) -> None:
    sentencepiece_like(tmp_path, spoil=spoil)
    with pytest.raises(CheckpointError, match=message):
        vocabulary.write(Recorder(), tmp_path, 600)


def test_other_preparations_of_text_are_refused(tmp_path: Path) -> None:
    sentencepiece_like(tmp_path, normalizer=tokenizers.normalizers.Lowercase())
    with pytest.raises(CheckpointError, match="prepares text by .*Lowercase"):
        vocabulary.write(Recorder(), tmp_path, 600)


@pytest.mark.parametrize("switch", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_spaces_or_want_a_word_are_refused(
    tmp_path: Path, switch: str
) -> None:
    tokenizer = sentencepiece_like(tmp_path)
    switches: Any = {switch: True}
    tokenizer.add_tokens([tokenizers.AddedToken("<x>", **switches)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"has '<x>' with {switch}"):
        vocabulary.write(Recorder(), tmp_path, 600)


def use_metaspace(directory: Path, scheme: Any) -> Any:
    """Change sentencepiece_like's tokenizer into what transformers makes of LlamaTokenizer."""
    tokenizer = sentencepiece_like(directory)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        llama_cpp.SPACE, prepend_scheme=scheme, split=False
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


@pytest.mark.parametrize(
    ("scheme", "note"),
    [("always", "begins with a space"), ("first", "behind a special token"), ("never", None)],
)
def test_a_metaspace_that_adds_a_space(
    source: Path, tmp_path: Path, scheme: str, note: str | None
) -> None:
    """Its tokens are llama.cpp's but for the texts that the note is about."""
    llama_cpp = pytest.importorskip("llama_cpp")
    config = CONFIGS["llama"]()
    config.vocab_size, config.bos_token_id, config.eos_token_id = 600, 1, 2
    make_source(tmp_path / "source", config)
    tokenizer = use_metaspace(tmp_path / "source", scheme)
    convert(tmp_path / "source", tmp_path / "packed", Recipe("absmean", 256))
    report = export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    assert report["notes"] == vocabulary._DIFFERENT[scheme]
    assert note is None or note in report["notes"][0]
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)

    def theirs(text: str) -> list[int]:
        found: list[int] = model.tokenize(text.encode(), add_bos=True, special=True)
        return found

    for text in [*ODD_TEXTS, "a value</s>", "</s>"]:
        assert theirs(text) == tokenizer(text)["input_ids"], text
    # and where they differ, by that space alone
    behind, spaced = theirs("a</s>of the value"), theirs(" of the value")
    if scheme == "never":
        assert spaced == tokenizer(" of the value")["input_ids"]
    else:
        assert spaced == tokenizer("  of the value")["input_ids"]
        expected = "a</s> of the value" if scheme == "first" else "a</s>of the value"
        assert behind == tokenizer(expected)["input_ids"]
    model.close()


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspaces_are_known_by_their_scheme(tmp_path: Path, scheme: str) -> None:
    tokenizer = use_metaspace(tmp_path, scheme)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    prefix, notes = vocabulary._space_prefix(tmp_path, definition)
    assert prefix is (scheme != "never") and bool(notes) is prefix
    definition["pre_tokenizer"]["split"] = True
    with pytest.raises(CheckpointError, match="prepares text by .*Metaspace"):
        vocabulary._space_prefix(tmp_path, definition)


def test_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=rf"a token {len(tokenizer) - 1}; .* at most 9,"):
        vocabulary.write(Recorder(), tmp_path, 10)


def test_a_split_at_spaces_that_are_gone_is_none(tmp_path: Path) -> None:
    """Gemma's tokenizer: all spaces are U+2581 before text would be split at them."""
    tokenizer = sentencepiece_like(
        tmp_path, normalizer=tokenizers.normalizers.Replace(" ", llama_cpp.SPACE)
    )
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        " ", "merged_with_previous"
    )
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    assert vocabulary._space_prefix(tmp_path, definition) == (False, [])
    definition["pre_tokenizer"]["behavior"] = "Isolated"
    with pytest.raises(CheckpointError, match="prepares text by .*Isolated"):
        vocabulary._space_prefix(tmp_path, definition)


def test_without_a_tokenizer(packed: Callable[..., Path], tmp_path: Path) -> None:
    changed = rewrite(packed(256), tmp_path / "changed", lambda tensors, records: None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (changed / name).unlink()
    with pytest.raises(CheckpointError, match="no tokenizer; .*--no-tokenizer"):
        export(changed, tmp_path / "m.gguf", "gguf")
    export(changed, tmp_path / "m.gguf", "gguf", tokenizer=False)
    fields, _ = read_gguf(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.model"] == "none"
    assert "tokenizer.ggml.tokens" not in fields


# --- directories ---------------------------------------------------------------------------------


def test_stock_transformers_has_our_logits(packed: Callable[..., Path], tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = []
    ours, digits = [], []

    def add(to: str, model: Path, bound: float, run: str = "float32", **options: Any) -> None:
        path = tmp_path / f"{to}-{len(jobs)}"
        export(model, path, to, **options)
        jobs.append({"path": path, "dtype": run})
        ours.append(our_logits(model, dtype=run))
        digits.append(bound)

    for group_size in (128, 64, -1, 0):
        add("dense", packed(group_size), 2e-5)
    add("dense", packed(128), 2e-2, "bfloat16", dtype="bfloat16")
    add("dense", packed(128), 4e-3, "float16", dtype="float16")
    for codec in ("int8", "int4"):
        add("dense", packed(128, head=codec, embeddings=codec), 2e-5, dtype="float32")
    if GEMMA:
        add("gemma-int2", packed(-1), 2e-5)
        add("gemma-int2", packed(0), 2e-5)
        add("gemma-int2", packed(0), 2e-2, "bfloat16")
    add("bitnet", packed(0, "int8"), 2e-5)
    add("bitnet", packed(0, "int8"), 3e-2, "bfloat16")
    for job, found, expected, bound in zip(
        jobs, stock_logits(jobs, tmp_path), ours, digits, strict=True
    ):
        assert found.dtype == expected.dtype, job
        assert_near(found.float(), expected.float(), bound)
    layers = {type(m).__name__ for m in ternarize.load(packed(0)).modules()}
    assert "TernaryLinear" in layers  # what was compared with was packed


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3", "bert"])
def test_dense_is_the_source_with_other_weights(tmp_path: Path, name: str) -> None:
    """Names, shapes and kept tensors are the source's, transposed and fused ones included."""
    tiny_models.save(name, tmp_path / "source", dtype=torch.float32)
    convert(tmp_path / "source", tmp_path / "packed", Recipe("absmean", 32))
    export(tmp_path / "packed", tmp_path / "dense", "dense")
    before = packing.read_checkpoint(tmp_path / "source")
    after = packing.read_checkpoint(tmp_path / "dense")
    packing.dense_twin(tmp_path / "packed", tmp_path / "source", tmp_path / "twin")
    twin = packing.read_checkpoint(tmp_path / "twin")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert all(torch.equal(after[name], twin[name]) for name in twin)
    assert any(not torch.equal(after[name], before[name]) for name in twin)


@pytest.mark.skipif(not GEMMA, reason="transformers before 5.11 has no such layers")
def test_experts_stay_dense_where_allowed(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path / "source", dtype=torch.float32)
    jobs: list[dict[str, Any]] = []
    for to, activations in (("gemma-int2", "none"), ("bitnet", "int8")):
        packed, out = tmp_path / f"{to}-packed", tmp_path / to
        convert(tmp_path / "source", packed, Recipe("absmean", 0, activations=activations))
        with pytest.raises(
            CheckpointError, match="ternary weights outside linear layers in 24 tensors"
        ):
            export(packed, out, to)
        report = export(packed, out, to, allow_requantize=True)
        assert "ternary weights outside linear layers" in report["lost"]
        jobs.append({"path": out})
    found, _ = stock_logits(jobs, tmp_path)
    # bitnet rounds activations of attention, and not of dense experts
    assert_near(found, our_logits(tmp_path / "gemma-int2-packed", activations="none"))


def unpack_mlx(weight: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """w = q * scale + bias with 16 q of two bits in a 32-bit word, the first in the low bits."""
    words = weight.numpy().astype(np.uint32)
    codes = np.stack([(words >> (2 * n)) & 3 for n in range(16)], -1).reshape(len(words), -1)
    group = codes.shape[1] // scales.shape[1]
    s, b = (np.repeat(t.double().numpy(), group, 1) for t in (scales, biases))
    return torch.from_numpy(codes * s + b)


@pytest.mark.parametrize(
    ("group_size", "expected"), [(128, 128), (64, 64), (32, 32), (-1, 128), (0, 128), (256, 128)]
)
def test_mlx_holds_every_weight(
    packed: Callable[..., Path], tmp_path: Path, group_size: int, expected: int
) -> None:
    model = packed(group_size)
    report = export(model, tmp_path / "mlx", "mlx", dtype="float32")
    assert report["exact"]
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"] == {"group_size": expected, "bits": 2, "mode": "affine"}
    stored, out = packing.read_checkpoint(model), packing.read_checkpoint(tmp_path / "mlx")
    checked = 0
    for name, record in metadata.records_of(container_of(model)).items():
        if record.shape is None:
            assert torch.equal(out[name], stored[name])
            continue
        dense = container.dequantize(stored[name], stored[name + "_scale"], record)
        base = name.removesuffix("weight")
        assert out[name].dtype == torch.uint32
        found = unpack_mlx(out[name], out[base + "scales"], out[base + "biases"])
        assert torch.equal(found, dense.double())
        checked += 1
    assert checked == 14


@pytest.mark.parametrize("to", ["dense", "gemma-int2", "mlx"])
def test_activations_in_int8_are_not_dropped_in_silence(
    packed: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    model = packed(-1, "int8")
    with pytest.raises(CheckpointError, match="activations in int8; .*cannot carry"):
        export(model, tmp_path / "out", to)
    options: dict[str, Any] = {} if to == "gemma-int2" else {"dtype": "float32"}
    report = export(model, tmp_path / "out", to, allow_requantize=True, **options)
    assert report["lost"] == ["activations in int8"] and not report["errors"]


def test_bitnet_wants_activations_in_int8(packed: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="activations in floating point, which bitnet rounds"):
        export(packed(0), tmp_path / "out", "bitnet")


def test_shards_and_their_index(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(packed(128), tmp_path / "one", "dense")
    monkeypatch.setattr(to_directory, "SHARD", 400_000)
    export(packed(128), tmp_path / "many", "dense")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    one, many = (packing.read_checkpoint(tmp_path / n) for n in ("one", "many"))
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert model(IDS).logits.shape[-1] == 320


def test_small_files_come_along_and_records_do_not(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    model = rewrite(packed(128), tmp_path / "changed", lambda tensors, records: None)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_ternarize.Shim"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_ternarize.py").write_text("import ternarize\n")
    export(model, tmp_path / "out", "dense")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and names.isdisjoint(
        {"ternarize.json", "configuration_ternarize.py"}
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.keys().isdisjoint({"quantization_config", "auto_map"})


def test_a_dtype_that_no_engine_wants(packed: Callable[..., Path], tmp_path: Path) -> None:
    for to in ("dense", "mlx"):
        with pytest.raises(UsageError, match="'float64'; expected float32, float16 or bfloat16"):
            export(packed(128), tmp_path / "out", to, dtype="float64")
    assert not any(tmp_path.iterdir())


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "dense"])
def test_an_output_appears_whole_or_not_at_all(
    packed: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    def stop(done: int, total: int, name: str, stage: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(packed(256), tmp_path / "out", to, progress=stop)
    assert not any(tmp_path.iterdir())
    export(packed(256), tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="exists already"):
        export(packed(256), tmp_path / "out", to)
    with pytest.raises(OutputError, match="inside the model"):
        export(packed(256), packed(256) / "out", to)

    def come_first(done: int, total: int, name: str, stage: str) -> None:
        (tmp_path / "late").touch()

    with pytest.raises(OutputError, match="exists already"):
        export(packed(256), tmp_path / "late", to, progress=come_first)
    assert (tmp_path / "late").stat().st_size == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "out"]


@pytest.mark.parametrize("to", ["gguf", "dense"])
def test_an_output_is_on_the_disk_before_it_has_its_name(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    sync, rename, synced = os.fsync, Path.rename, set[int]()

    def syncing(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        sync(handle)

    def renaming(path: Path, target: Path) -> Path:
        assert {each.stat().st_ino for each in (path, *path.rglob("*"))} <= synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    export(packed(256), tmp_path / "out", to)
    assert tmp_path.stat().st_ino in synced, "and then the name itself"


def test_damage_is_found_first(packed: Callable[..., Path], tmp_path: Path) -> None:
    changed = rewrite(packed(256), tmp_path / "changed", lambda tensors, records: None)
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    with pytest.raises(TernarizeError, match="SHA-256|damaged"):
        export(changed, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_without_gguf(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'ternarize\[gguf\]'"):
        export(packed(256), tmp_path / "m.gguf", "gguf")


def test_the_command(packed: Callable[..., Path], tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> Any:
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    done = run(packed(256), tmp_path / "a.gguf", "--to", "gguf", "--type", "tq1_0", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["type"] == "tq1_0"
    tq2 = ["--to", "gguf", "--type", "tq2_0"]
    done = run(packed(128), tmp_path / "b.gguf", *tq2, "--allow-requantize")
    assert "not exact" in done.stdout and "relative error" in done.stdout
    done = run(packed(128), tmp_path / "q2.gguf", "--to", "gguf")  # the type that holds it
    assert "every weight as packed" in done.stdout
    done = run(packed(128), tmp_path / "c.gguf", *tq2)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    done = run(packed(128), tmp_path / "c", "--to", "dense", "--type", "tq1_0")
    assert done.exit_code == 2 and "--type: is for --to gguf" in done.stderr
    done = run(packed(128), tmp_path / "c", "--to", "dense", "--dtype", "bfloat16", "-q")
    assert done.exit_code == 0, done.stderr
    assert {t.dtype for t in packing.read_checkpoint(tmp_path / "c").values()} == {torch.bfloat16}
