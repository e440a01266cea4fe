"""GGUF files come in without loss.

The oracles: the packed models that our own exports are made of (their weights, logits and tokens),
the package `gguf` for blocks and files, and the layouts of I2_S written down once more, as loops.
"""

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import packing
import pytest
import test_export as exporting
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, FormatError, TernarizeError, UsageError
from ternarize.files.gguf import read_gguf
from ternarize.files.llama_cpp import GEMMA3
from ternarize.measure.measured import look
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.publish.export import export
from ternarize.publish.export.common import PackedCheckpoint, open_verified
from ternarize.sources.imports import open_source
from ternarize.sources.imports.common import Imported
from ternarize.trits import ggml

CONFIGS: dict[str, Callable[[], Any]] = {
    **exporting.CONFIGS,
    "llama_biased": lambda: exporting._config("Llama", attention_bias=True, mlp_bias=True),
    "llama3": lambda: exporting._config("Llama", rope_parameters=exporting.LLAMA3),
    "llama_linear": lambda: exporting._config(
        "Llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    # of two heads of values for each of keys, and of one
    "qwen35_narrow": lambda: exporting.qwen35(64),
    "qwen35_equal": lambda: exporting.qwen35(64, linear_num_key_heads=4),
    "qwen3_narrow": lambda: exporting._config("Qwen3", head_dim=64),
    "mixtral": lambda: exporting._config("Mixtral", num_local_experts=4, head_dim=32),
    "qwen3_moe_narrow": lambda: exporting._config(
        "Qwen3Moe",
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
    ),
}


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_blocks_are_read_as_gguf_reads_them(kind: str) -> None:
    """Whatever their bytes are, also those that no encoder writes."""
    data = np.random.default_rng(0).integers(0, 256, (300, ggml.TYPES[kind].nbytes), dtype=np.uint8)
    data[:, -2:] = np.random.default_rng(1).normal(size=(300, 1)).astype(np.float16).view(np.uint8)
    digits, d = ggml.decode_blocks(torch.from_numpy(data), kind)
    found = (digits.to(torch.float32) - 1) * d.float()[:, None]
    number = gguf.GGMLQuantizationType[kind.upper()]
    assert np.array_equal(found.numpy(), gguf.dequantize(data, number))


@pytest.mark.parametrize("kind", [name for name, block in ggml.TYPES.items() if block.ternary])
def test_blocks_come_back(kind: str) -> None:
    block = ggml.TYPES[kind].block
    ternary = exporting.random_ternary(5, 3, block, 0)
    digits, d = ggml.decode_blocks(
        ggml.encode_blocks(ternary, kind).reshape(-1, ggml.TYPES[kind].nbytes), kind
    )
    assert torch.equal(digits.to(torch.int8).view(5, -1) - 1, ternary.trits)
    assert torch.equal(d.view(5, 3).double(), ternary.scales)


def encode_i2_s(trits: Tensor, scale: float, layout: str) -> bytes:
    """As bitnet.cpp packs a matrix: weight by weight."""
    rows, cols = trits.shape
    digits = (trits + 1).tolist()
    out = bytearray(rows * cols // 4)
    for r in range(rows):
        for c in range(cols):
            if layout == "rows":
                at, place = r // 4 * cols + c, r % 4
            else:
                block = {"x86": 128, "arm": 64}[layout]
                inside = c % block
                at = (r * cols + c) // block * (block // 4) + inside % (block // 4)
                place = inside // (block // 4)
            out[at] |= digits[r][c] << 6 - 2 * place
    return bytes(out) + struct.pack("<f", scale) + bytes(28)


@pytest.mark.parametrize("layout", list(ggml.I2_S))
def test_i2_s_of_every_layout(layout: str) -> None:
    trits = exporting.random_ternary(8, 3, 128, 0).trits
    data = torch.frombuffer(bytearray(encode_i2_s(trits, 1, layout)), dtype=torch.uint8)
    found = ggml.decode_i2_s(data[:-32], layout, 384)
    assert torch.equal(found.to(torch.int8) - 1, trits)
    others = [n for n in ggml.I2_S if n != layout]
    assert not any(torch.equal(ggml.decode_i2_s(data[:-32], other, 384), found) for other in others)


# --- there and back ------------------------------------------------------------------------------


def dense(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a packed checkpoint, decoded, in float64."""
    packed: PackedCheckpoint = open_verified(directory)
    return {
        name: (packed.dense(name) if record.shape else packed.kept(name)).to(torch.float64)
        for name, record in packed.records.items()
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "tq2_0") for name in CONFIGS if name != "qwen35_narrow"),
        ("llama", "tq1_0"),
        ("qwen3_moe", "q2_0"),
        ("qwen35_narrow", "q2_0"),  # the heads of which blocks of 256 would cut
    ],
)
def test_an_export_comes_back(tmp_path: Path, name: str, kind: str) -> None:
    """Weights, logits, tokens and what else a model computes by."""
    source = exporting.make_source(tmp_path / "source", CONFIGS[name]())
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf", kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "back")
    before, after = dense(tmp_path / "packed"), dense(tmp_path / "back")
    assert before.keys() == after.keys()
    for each in before:
        # of norms that multiply by 1 + w a file has that, in float32, and of A its exponential
        shifted = name.startswith(("gemma3", "qwen35")) and each.endswith("norm.weight")
        rounded = 2**-23 if shifted else 2**-21 if each.endswith(".A_log") else 0.0
        assert float((before[each] - after[each]).abs().max()) <= rounded, each
    logits = exporting.our_logits(tmp_path / "back")
    # groups of 64 are added in another order
    if kind == "q2_0" or name.startswith("qwen35"):
        exporting.assert_near(logits, exporting.our_logits(tmp_path / "packed"))
    else:
        assert torch.equal(logits, exporting.our_logits(tmp_path / "packed"))
    record = json.loads((tmp_path / "back/ternarize.json").read_text())
    ternary = [row for row in record["tensors"].values() if row.get("method")]
    assert ternary and {row["method"] for row in ternary} == {"lossless"}
    assert record["recipe"]["activations"] == "none"
    assert verify(tmp_path / "back", source=tmp_path / "m.gguf")["source_compared"]
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "packed")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in [*exporting.TEXTS, *exporting.ODD_TEXTS, f"a{exporting.SPECIAL} b"]:
        ids = ours(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == ours.decode(ids)
    assert theirs.chat_template == ours.chat_template


def in_floats(source: Path, target: Path) -> Path:
    """A GGUF file with every weight in float32, as it is: for engines that round activations, or
    take no ternary blocks."""
    keys, stored = read_gguf(source)
    tensors = {}
    for tensor in stored:
        data = tensor.read(0, tensor.shape[0] if len(tensor.shape) > 1 else 1)
        if tensor.ternary:
            blocks = data.view(-1, ggml.TYPES[tensor.ternary].nbytes)
            digits, d = ggml.decode_blocks(blocks, tensor.ternary)
            data = (digits.to(torch.float32) - 1) * d[:, None]
        tensors[tensor.name] = (0, tensor.shape, data.numpy().tobytes())
    return write_gguf(target, keys, tensors)


def test_transformers_reads_qwen35_as_we_do(tmp_path: Path) -> None:
    jobs, expected = list[dict[str, Any]](), []
    for name in ("qwen35", "qwen35_narrow", "qwen35_equal"):
        source = exporting.make_source(tmp_path / name, CONFIGS[name]())
        packed = tmp_path / f"{name}-packed"
        convert(source, packed, Recipe("absmean", 256))
        export(packed, tmp_path / f"{name}.gguf", "gguf", kept_type="f32")
        in_floats(tmp_path / f"{name}.gguf", tmp_path / f"{name}-plain.gguf")
        jobs.append({"path": tmp_path, "gguf": f"{name}-plain.gguf"})
        expected.append(exporting.our_logits(packed))
    for found, ours in zip(exporting.stock_logits(jobs, tmp_path), expected, strict=True):
        exporting.assert_near(found, ours)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "ssm.time_step_rank",
            2**30,
            "1073741824 heads of 64 values for 2 of keys; expected 4 hea",
        ),
        ("ssm.group_count", 3, "4 heads of 64 values for 3 of keys"),
        ("ssm.inner_size", 128, "256 features in its tensors; expected 128, as its ssm.inner_size"),
        ("full_attention_interval", 2, "another order of its layers"),
        ("attention.recurrent_layers", np.zeros(4, np.int32), "another order of its layers"),
        ("rope.dimension_sections", np.array([24, 4, 4, 0], np.int32), "that take no turns"),
        ("rope.dimension_sections", np.array([2**30, 1, 1, 0], np.int32), "that take no turns"),
        ("rope.dimension_sections", 7, "dimension_sections '7'; expected a list of whole numbers"),
        (
            "rope.dimension_sections",
            np.full(4, np.nan, np.float32),
            "expected a list of whole numbers",
        ),
        ("nextn_predict_layers", 1, "nextn_predict_layers 1; expected no such key"),
        ("attention.key_length", 0, "heads of no features"),
        ("attention.causal", False, "attention.causal false; expected true"),
        *(
            ("rope.dimension_count", turned, f"dimension_count {turned} of heads of .* an even n")
            for turned in (0, 15, 1192)
        ),
    ],
)
def test_other_files_of_qwen35_are_refused(
    qwen35: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    keys, stored = read_gguf(qwen35)
    tensors = {}
    for each in stored:
        data = each.read(0, each.shape[0] if len(each.shape) > 1 else 1)
        tensors[each.name] = (each.type, each.shape, data.numpy().tobytes())
    path = write_gguf(tmp_path / "m.gguf", keys | {f"qwen35.{key}": value}, tensors)
    with pytest.raises(TernarizeError, match=said):
        open_source(path)


@pytest.fixture(scope="module")
def qwen35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("qwen35")
    source = exporting.make_source(top / "source", CONFIGS["qwen35_narrow"]())
    convert(source, top / "packed", Recipe("absmean", 256))
    export(top / "packed", top / "m.gguf", "gguf")
    return top / "m.gguf"


@pytest.mark.parametrize("name", ["gemma3", "phi3", "gpt2", "qwen35", "qwen35_narrow"])
def test_llama_cpp_computes_what_we_do(tmp_path: Path, name: str) -> None:
    """Up to the order of sums, where it rounds no activations."""
    llama_cpp = pytest.importorskip("llama_cpp")
    source = exporting.make_source(tmp_path / "source", CONFIGS[name]())
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf", kept_type="f32")
    path = in_floats(tmp_path / "m.gguf", tmp_path / "plain.gguf")
    floats = {"type_k": 0, "type_v": 0}
    model = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, **floats)
    model.eval(exporting.IDS[0].tolist())
    found = torch.from_numpy(np.array(model.scores[: exporting.IDS.shape[1]]))
    model.close()
    expected = exporting.our_logits(tmp_path / "packed")[0]
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert float(cosine.min()) > 1 - 1e-5


def test_a_file_without_ternary_weights_is_an_ordinary_model(tmp_path: Path) -> None:
    """Its weights are ternarized as those of the checkpoint that the file says."""
    source = exporting.make_source(tmp_path / "source", CONFIGS["gemma3"]())
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf")
    keys, stored = read_gguf(tmp_path / "m.gguf")
    tensors = {}
    for name, weight in packing.read_checkpoint(source).items():
        weight = weight + 1 if name.endswith("norm.weight") else weight
        theirs = GEMMA3.to_llama_cpp(name)
        assert theirs is not None
        tensors[theirs] = (0, tuple(weight.shape), weight.numpy().tobytes())
    assert tensors.keys() == {tensor.name for tensor in stored}
    write_gguf(tmp_path / "plain.gguf", keys, tensors)
    for model, output in ((source, "a"), (tmp_path / "plain.gguf", "b")):
        convert(model, tmp_path / output, Recipe("itf", 64))
    assert verify(tmp_path / "b", source=tmp_path / "plain.gguf")["source_compared"]
    logits = exporting.our_logits(tmp_path / "a")
    assert torch.equal(exporting.our_logits(tmp_path / "b"), logits)
    record = json.loads((tmp_path / "b/ternarize.json").read_text())
    assert "itf" in {row.get("method") for row in record["tensors"].values()}
    with pytest.raises(UsageError, match="GGUF, no ternary weights; .*Leave out --dataset"):
        make_plan(tmp_path / "plain.gguf", Recipe("gptq", 64, calibrate=Calibrate("x.txt")))


def test_gemma_computes_in_float32_where_its_file_has_float16(tmp_path: Path) -> None:
    """Gemma 3's activations go beyond float16, in which transformers would compute."""
    source = exporting.make_source(tmp_path / "source", CONFIGS["gemma3"]())
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf", kept_type="f16", allow_requantize=True)
    found = open_source(tmp_path / "m.gguf")
    assert found.tensors["model.embed_tokens.weight"].dtype == "F16"
    assert found.config is not None and found.config["dtype"] == "float32"


# --- files made here -----------------------------------------------------------------------------

BITNET = transformers.BitNetConfig(
    vocab_size=320,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    hidden_act="relu2",
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    architectures=["BitNetForCausalLM"],
)


def write_gguf(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]],
    alignment: int = 32,
) -> Path:
    """A GGUF file, written byte by byte: keys of numbers, strings, arrays and lists of strings."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(what: Any) -> bytes:
        if isinstance(what, bool):
            return struct.pack("<IB", 7, what)
        if isinstance(what, int):
            return struct.pack("<II", 4, what)
        if isinstance(what, float):
            return struct.pack("<If", 6, what)
        if isinstance(what, str):
            return struct.pack("<I", 8) + string(what)
        if isinstance(what, np.ndarray):
            kind = {"int32": 5, "float32": 6}[what.dtype.name]
            return struct.pack("<IIQ", 9, kind, len(what)) + what.tobytes()
        return struct.pack("<IIQ", 9, 8, len(what)) + b"".join(map(string, what))

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(string(key) + value(what) for key, what in keys.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += content
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


def bitnet(layout: str = "x86") -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Keys and tensors of a file of bitnet.cpp, and the weights that it says."""
    keys, tensors, weights = _bitnet(layout)
    return dict(keys), dict(tensors), weights


@functools.cache
def _bitnet(layout: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    keys: dict[str, Any] = {"general.architecture": "bitnet-b1.58"}
    keys |= {
        f"bitnet-b1.58.{key}": value
        for key, value in {
            "vocab_size": 320,
            "context_length": 128,
            "embedding_length": 256,
            "block_count": 2,
            "feed_forward_length": 512,
            "rope.dimension_count": 64,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 500000.0,
        }.items()
    }
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}

    def add(name: str, new: str, *shape: int) -> None:
        if len(shape) == 1 or name == "token_embd":
            weight = 1 + torch.randn(shape, generator=generator) / 8
            kind = 0 if len(shape) == 1 else 1
            weight = weight.to(torch.float16 if kind else torch.float32)
            content = weight.numpy().tobytes()
        else:
            trits = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
            scale = float(torch.tensor(0.7 + len(tensors) / 1000))
            weight, kind = trits * torch.tensor(scale), ggml.I2_S_TYPE
            content = encode_i2_s(trits, scale, layout)
        tensors[f"{name}.weight"], weights[f"model.{new}.weight"] = (kind, shape, content), weight

    add("token_embd", "embed_tokens", 320, 256)
    add("output_norm", "norm", 256)
    for at in range(2):
        for name, new, *shape in (
            ("attn_norm", "input_layernorm", 256),
            ("attn_sub_norm", "self_attn.attn_sub_norm", 256),
            ("attn_q", "self_attn.q_proj", 256, 256),
            ("attn_k", "self_attn.k_proj", 128, 256),
            ("attn_v", "self_attn.v_proj", 128, 256),
            ("attn_output", "self_attn.o_proj", 256, 256),
            ("ffn_norm", "post_attention_layernorm", 256),
            ("ffn_sub_norm", "mlp.ffn_sub_norm", 512),
            ("ffn_gate", "mlp.gate_proj", 512, 256),
            ("ffn_up", "mlp.up_proj", 512, 256),
            ("ffn_down", "mlp.down_proj", 256, 512),
        ):
            add(f"blk.{at}.{name}", f"layers.{at}.{new}", *shape)
    return keys, tensors, weights


@pytest.mark.parametrize("layout", list(ggml.I2_S))
def test_bitnet_of_every_layout(tmp_path: Path, layout: str) -> None:
    keys, tensors, weights = bitnet(layout)
    path = write_gguf(tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(UsageError, match="m.gguf@x86"):
        open_source(path)
    convert(f"{path}@{layout}", tmp_path / "packed")
    found = dense(tmp_path / "packed")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].double()) for name in weights)
    verify(tmp_path / "packed", source=f"{path}@{layout}")
    record = json.loads((tmp_path / "packed/ternarize.json").read_text())
    assert record["recipe"]["activations"] == "int8"
    assert layout in record["source"]["imported"]["format"] and "hub" not in record["source"]
    rows = [row for row in record["tensors"].values() if row.get("method")]
    assert {row["method"] for row in rows} == {"lossless"} and len(rows) == 14
    # as transformers computes, with activations in floating point
    reference = transformers.BitNetForCausalLM(BITNET)
    reference.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = reference(exporting.IDS).logits
    found_logits = exporting.our_logits(tmp_path / "packed", activations="none")
    exporting.assert_near(found_logits, expected)


def test_what_lies_around_a_file_is_not_looked_at(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternarize.plans.copied.small_files", None)
    work = make_plan(f"{small}@x86")
    assert work.copied == work.left_out == []
    directory, config, source = look(f"{small}@x86")  # it is no Hub id
    assert directory == small.parent and config and source is not None


def test_i2_s_that_cannot_be(tmp_path: Path) -> None:
    keys, tensors, _ = bitnet()
    kind, shape, content = tensors["blk.0.attn_v.weight"]
    tensors["blk.0.attn_v.weight"] = kind, shape, b"\xff" + content[1:]
    path = write_gguf(tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(CheckpointError, match="attn_v.weight has weights of two scales"):
        convert(f"{path}@x86", tmp_path / "packed")
    tensors["blk.0.attn_v.weight"] = 36, (128, 96), bytes(128 * 24 + 32)
    write_gguf(path, keys, tensors)
    with pytest.raises(CheckpointError, match=r"\[128, 96\]; expected columns that 128"):
        open_source(f"{path}@x86")
    stored = bitnet()[1].items()
    plain = {name: (0, shape, bytes(4 * int(np.prod(shape)))) for name, (_, shape, _) in stored}
    write_gguf(path, keys, plain)
    found = open_source(path)
    assert isinstance(found, Imported) and not found.group_sizes


def test_a_set_of_files_and_a_directory(tmp_path: Path) -> None:
    keys, tensors, weights = bitnet()
    names = list(tensors)
    for number, part in enumerate((names[:7], names[7:9], names[9:])):
        more = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        path = tmp_path / f"in/m-{number + 1:05d}-of-00003.gguf"
        path.parent.mkdir(exist_ok=True)
        write_gguf(path, more | (keys if number == 0 else {}), {n: tensors[n] for n in part})
    exporting.train_tokenizer(tmp_path / "in")
    (tmp_path / "in/README.md").write_text("---\nlicense: mit\n---\n")
    convert(f"{tmp_path / 'in'}@x86", tmp_path / "packed")
    found = dense(tmp_path / "packed")
    assert all(torch.equal(found[name], weights[name].double()) for name in weights)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == 3
    same = (tmp_path / "packed/tokenizer.json", tmp_path / "in/tokenizer.json")
    assert same[0].read_bytes() == same[1].read_bytes()
    record = json.loads((tmp_path / "packed/ternarize.json").read_text())
    assert record["source"]["card"] == {"license": "mit"}
    (tmp_path / "in/m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="m-00002-of-00003.gguf is missing"):
        open_source(f"{tmp_path / 'in/m-00001-of-00003.gguf'}@x86")
    (tmp_path / "in/other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 2 GGUF models, m, other.gguf; expected one"):
        open_source(tmp_path / "in")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of bitnet.cpp."""
    keys, tensors, _ = bitnet()
    return write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", keys, tensors)


def changed(target: Path, keys: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A file of bitnet.cpp with other keys and tensors (None: without)."""
    old_keys, old_tensors, _ = bitnet()
    new_keys = {k: v for k, v in {**old_keys, **keys}.items() if v is not None}
    new = {k: v for k, v in {**old_tensors, **tensors}.items() if v is not None}
    return write_gguf(target, new_keys, new)


B = "bitnet-b1.58."


T = "tokenizer.ggml."
BPE = {T + "model": "gpt2", T + "pre": "gpt-2", T + "tokens": ["a", "b", "ab"], T + "merges": []}
PIECES = {
    T + "model": "llama",
    T + "tokens": ["<s>", "a", "b"],
    T + "scores": np.zeros(3, np.float32),
}


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({T + "model": np.zeros(2, np.int32)}, {}, "kind of its vocabulary is no string"),
        *(
            (PIECES | {T + "unknown_token_id": value}, {}, "unknown token .*; expected one of 3")
            for value in ("a", 0.5, 3, np.zeros(2, np.int32))
        ),
        *(
            (PIECES | {T + "tokens": [first, "a", "b"], T + "bos_token_id": 0}, {}, said)
            for first, said in (("a:b", "makes no tokenizer"), ("$A", r"puts '\$A' around"))
        ),
        (PIECES | {T + "add_space_prefix": "yes"}, {}, "prefix is 'yes'; expected true or false"),
        (BPE | {T + "add_bos_token": 1}, {}, "add_bos_token is '1'; expected true or false"),
        (BPE | {T + "token_type": np.full(3, np.nan, np.float32)}, {}, "no type for each token"),
        *(
            (BPE | {T + "merges": [merge]}, {}, f"the merge '{merge}' has parts")
            for merge in ("b a", "x b", "a x")
        ),
        ({"general.architecture": "mamba"}, {}, "architecture 'mamba'; expected one of llama, "),
        ({"general.architecture": None}, {}, "architecture 'None'"),
        ({B + "attention.scale": 0.5}, {}, "attention.scale 0.5; expected no such key"),
        ({B + "block_count": 2**31 - 1}, {}, "2147483647 blocks"),
        ({B + "block_count": 3}, {}, r"layers.2.\S+ is missing; expected \["),
        ({B + "attention.head_count": 2**20}, {}, "1048576 heads of no features"),
        ({B + "embedding_length": "x"}, {}, "embedding_length 'x'"),
        ({B + "embedding_length": None}, {}, "no embedding_length"),
        ({B + "attention.head_count_kv": 1}, {}, r"k_proj.weight is \[128, 256\]; expected"),
        ({B + "rope.dimension_count": 32}, {}, "rope.dimension_count 32"),
        ({B + "rope.scaling.type": "longrope"}, {}, "scaling of positions 'longrope'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}, {}, "has no tokens"),
        ({}, {"blk.0.attn_q.scale": (0, (1,), bytes(4))}, "attn_q.scale is not known"),
        ({}, {"blk.0.attn_q_norm.weight": (0, (1,), bytes(4))}, "is not known"),
        ({}, {"output_norm.weight": None}, "model.norm.weight is missing"),
        ({}, {"x": (24, (4,), bytes(4))}, "x is not known"),
        ({}, {"output.weight": (41, (320, 256), bytes(320 * 36))}, "Q1_0, which the package gguf"),
        ({}, {"output.weight": (99, (320, 256), b"")}, "has type 99"),
        ({}, {"output.weight": (0, (320, 2**50), b"")}, r"output.weight has shape \[320, 1125"),
        ({}, {"output.weight": (12, (320, 100), b"")}, "columns that are a multiple of 256"),
        ({"general.alignment": 3}, {}, "alignment 3"),
        ({"split.count": 3}, {}, "m.gguf: is one of 3 files"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, keys: Any, tensors: Any, message: str
) -> None:
    path = changed(tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(TernarizeError, match=message) as caught:
        open_source(f"{path}@x86")
    assert "\n" not in str(caught.value)


def test_damage_ends_in_one_line(small: Path, tmp_path: Path) -> None:
    """Every truncation of the head and of the data, and random bytes anywhere in the head."""
    data = small.read_bytes()
    _, tensors = read_gguf(small)
    head = min(tensor.start for tensor in tensors)
    path = tmp_path / "m.gguf"
    for size in [*range(0, head, 37), head, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            read_gguf(path)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(data[:head])
        for at in generator.integers(0, head, 3):
            broken[at] = generator.integers(0, 256)
        path.write_bytes(bytes(broken) + data[head:])
        try:
            read_gguf(path)
        except FormatError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    "tail",
    [
        struct.pack("<QQ", 2**63, 0),  # tensors
        struct.pack("<QQ", 0, 2**63),  # keys
        struct.pack("<QQQ", 0, 1, 2**63),  # the length of a key
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 0, 2**63),  # an array of bytes
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 2**40),  # of strings
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1),  # of arrays
        struct.pack("<QQQ1sI", 0, 1, 1, b"k", 77),
        struct.pack("<QQQ1sI", 0, 1, 1, b"\xff", 4),
        struct.pack("<QQQ1sIIQ1sII", 0, 2, 1, b"k", 4, 1, 1, b"k", 4, 1),  # twice
        struct.pack("<QQQ1sI", 1, 0, 1, b"t", 2**32 - 1),  # dimensions
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 2**60, 0, 0),
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 1, 0, 2**63),
    ],
)
def test_hostile_counts_are_bounded(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + tail + bytes(64))
    with pytest.raises(FormatError, match="^m.gguf: "):
        read_gguf(path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q6_K", "Q4_K", "BF16"])
def test_dense_tensors_are_decoded_by_gguf(tmp_path: Path, kind: str) -> None:
    """An embedding and a linear weight of other types stay dense, and are told."""
    number = gguf.GGMLQuantizationType[kind]
    weights, nbytes = gguf.GGML_QUANT_SIZES[number]
    generator = np.random.default_rng(0)
    made = {}
    for name, shape in (("token_embd", (320, 256)), ("blk.1.ffn_down", (256, 512))):
        content = generator.normal(size=shape).astype(np.float32)
        if kind.endswith("_K"):  # `gguf` has no encoder: any bytes, with small scales
            raw = generator.integers(0, 256, (shape[0], shape[1] // weights, nbytes))
            raw = raw.astype(np.uint8)
            raw[..., slice(-2, None) if kind == "Q6_K" else slice(0, 2)] = [0, 20]
            raw[..., slice(2, 4) if kind == "Q4_K" else slice(0, 0)] = 20
            made[name] = raw.reshape(shape[0], -1)
        else:
            made[name] = gguf.quantize(content, number)
    tensors = {
        f"{name}.weight": (int(number), (len(raw), raw.nbytes // len(raw) * weights // nbytes), raw)
        for name, raw in made.items()
    }
    stored = {name: (n, shape, raw.tobytes()) for name, (n, shape, raw) in tensors.items()}
    path = changed(tmp_path / "m.gguf", {}, stored)
    work = make_plan(f"{path}@x86")
    assert any(f"2 tensors in {kind}" in note for note in work.notes) is (kind != "BF16")
    convert(f"{path}@x86", tmp_path / "packed")
    found = dense(tmp_path / "packed")
    for old, new in (("token_embd", "embed_tokens"), ("blk.1.ffn_down", "layers.1.mlp.down_proj")):
        expected = gguf.dequantize(made[old], number)
        assert np.array_equal(found[f"model.{new}.weight"].float().numpy(), expected)
    record = json.loads((tmp_path / "packed/ternarize.json").read_text())
    assert isinstance(work.source, Imported)
    assert record["source"]["imported"].get("notes", []) == work.source.notes
    assert "method" not in record["tensors"]["model.layers.1.mlp.down_proj.weight"]


# --- vocabularies --------------------------------------------------------------------------------


def packed_with(directory: Path, tokenizer: Callable[[Path], Any], size: int) -> Path:
    """An exported model with another tokenizer."""
    config = CONFIGS["llama"]()
    config.vocab_size = size
    exporting.make_source(directory / "source", config)
    tokenizer(directory / "source")
    convert(directory / "source", directory / "packed", Recipe("absmean", 256))
    export(directory / "packed", directory / "m.gguf", "gguf")
    return directory / "m.gguf"


def metaspace_never(directory: Path) -> Any:
    return exporting.use_metaspace(directory, "never")


def llama3_split(directory: Path) -> Any:
    split = exporting._steps(exporting._regex(exporting.LLAMA3_SPLIT), exporting._BYTES)
    return exporting.train_tokenizer(directory, split=split, begin=True, ignore_merges=True)


VOCABULARIES: list[tuple[Callable[[Path], Any], int]] = [
    (exporting.sentencepiece_like, 600),
    (metaspace_never, 600),
    (llama3_split, 330),
]
MORE_TEXTS = [*exporting.TEXTS, *exporting.ODD_TEXTS, "  of the", "1234567 12", "\u2581of the"]


@pytest.mark.parametrize(("tokenizer", "size"), VOCABULARIES)
def test_tokens_of_other_vocabularies(tmp_path: Path, tokenizer: Any, size: int) -> None:
    path = packed_with(tmp_path, tokenizer, size)
    convert(path, tmp_path / "back")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "packed")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in [*MORE_TEXTS, "a</s> b"]:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [*VOCABULARIES, (lambda directory: exporting.use_metaspace(directory, "first"), 600)],
)
def test_tokens_are_those_of_llama_cpp(tmp_path: Path, tokenizer: Any, size: int) -> None:
    """Also where LLaMA's tokenizer in transformers puts one space less."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = packed_with(tmp_path, tokenizer, size)
    source = open_source(path)
    assert isinstance(source, Imported)
    for name, content in source.made.items():
        (tmp_path / name).write_bytes(content)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = llama_cpp.Llama(str(path), n_ctx=64, verbose=False)
    for text in [*MORE_TEXTS, f"a{ours.eos_token}", f"a{ours.eos_token}of the"]:
        found = model.tokenize(text.encode(), add_bos=True, special=True)
        assert ours(text)["input_ids"] == found, text
    model.close()


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({T + "model": "gpt2", T + "tokens": ["a"]}, "split 'default', which is not known"),
        (BPE | {T + "tokens": ["a", "b", "a"]}, "has a token twice"),
        (PIECES | {T + "tokens": ["<s>", "a", "b" * 2_000_000]}, "of more than 512 characters"),
    ],
)
def test_a_vocabulary_that_is_not_known_is_left_out_with_a_note(
    keys: Any, note: str, tmp_path: Path
) -> None:
    path = changed(tmp_path / "m.gguf", keys, {})
    source = open_source(f"{path}@x86")
    assert isinstance(source, Imported) and not source.made
    assert any(note in each for each in source.notes)


# --- the command ---------------------------------------------------------------------------------


def test_the_command(small: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["convert", f"{small}@x86", str(tmp_path / "out"), "-q"])
    assert done.exit_code == 0 and "relative error 0.0000" in done.stdout
    done = run(app, ["convert", str(small), str(tmp_path / "more")])
    assert done.exit_code == 2 and "m.gguf@arm" in done.stderr
    assert not (tmp_path / "more").exists()
    model = ternarize.load(tmp_path / "out", dtype="float32")
    assert model.config.hidden_act == "relu2"
