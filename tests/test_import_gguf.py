"""GGUF files come in without loss.

The oracles: the packed models that our own exports are made of (their weights, logits and tokens),
the package `gguf` for blocks and files, and the layouts of I2_S written down once more, as loops.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
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
from ternarize.checkpoint import open_checkpoint
from ternarize.cli import app
from ternarize.convert import convert
from ternarize.errors import CheckpointError, FormatError, TernarizeError, UsageError
from ternarize.export import blocks, export
from ternarize.export.common import PackedCheckpoint, open_verified
from ternarize.imports import Imported, open_source
from ternarize.imports import gguf as from_gguf
from ternarize.imports.gguf import open_gguf, read_gguf
from ternarize.plan import Recipe, plan
from ternarize.verify import verify

CONFIGS: dict[str, Callable[[], Any]] = {
    **exporting.CONFIGS,
    "llama_biased": lambda: exporting._config("Llama", attention_bias=True, mlp_bias=True),
    "llama3": lambda: exporting._config("Llama", rope_parameters=exporting.LLAMA3),
    "llama_linear": lambda: exporting._config(
        "Llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
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
    data = np.random.default_rng(0).integers(
        0, 256, (300, blocks.TYPES[kind].nbytes), dtype=np.uint8
    )
    data[:, -2:] = np.random.default_rng(1).normal(size=(300, 1)).astype(np.float16).view(np.uint8)
    digits, d = blocks.decode(torch.from_numpy(data), kind)
    found = (digits.to(torch.float32) - 1) * d.float()[:, None]
    number = gguf.GGMLQuantizationType[kind.upper()]
    assert np.array_equal(found.numpy(), gguf.dequantize(data, number))


@pytest.mark.parametrize("kind", list(blocks.TYPES))
def test_blocks_come_back(kind: str) -> None:
    block = blocks.TYPES[kind].block
    ternary = exporting.random_ternary(5, 3, block, 0)
    digits, d = blocks.decode(
        blocks.encode(ternary, kind).reshape(-1, blocks.TYPES[kind].nbytes), kind
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


@pytest.mark.parametrize("layout", list(blocks.I2_S))
def test_i2_s_of_every_layout(layout: str) -> None:
    trits = exporting.random_ternary(8, 3, 128, 0).trits
    data = torch.frombuffer(bytearray(encode_i2_s(trits, 1, layout)), dtype=torch.uint8)
    found = blocks.decode_i2_s(data[:-32], layout, 384)
    assert torch.equal(found.to(torch.int8) - 1, trits)
    others = [n for n in blocks.I2_S if n != layout]
    assert not any(
        torch.equal(blocks.decode_i2_s(data[:-32], other, 384), found) for other in others
    )


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
    [*((name, "tq2_0") for name in CONFIGS), ("llama", "tq1_0"), ("qwen3_moe", "q2_0")],
)
def test_an_export_comes_back(tmp_path: Path, name: str, kind: str) -> None:
    """Weights, logits, tokens and what else a model computes by."""
    source = exporting.make_source(tmp_path / "source", CONFIGS[name]())
    convert(source, tmp_path / "packed", Recipe("absmean", 256))
    export(tmp_path / "packed", tmp_path / "m.gguf", "gguf", kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "back")
    before, after = dense(tmp_path / "packed"), dense(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    logits = exporting.our_logits(tmp_path / "back")
    if kind == "q2_0":  # groups of 64 are added in another order
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
