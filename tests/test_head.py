"""An output head that becomes int8 when a model is loaded: what `convert --head int8` stores."""

from pathlib import Path
from typing import Any

import packing
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import FormatError, UsageError
from ternarize.measure import bench
from ternarize.measure.evaluate import evaluate
from ternarize.native import lib
from ternarize.plans.recipe import Recipe
from ternarize.runtime import products
from ternarize.runtime.forms import dense_matrix
from ternarize.runtime.modules.embedding import PackedEmbedding
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.plugin.int8_head import round_head
from ternarize.runtime.plugin.quantizer import TernarizeConfig
from ternarize.trits import int8
from ternarize.trits.int8 import dequantize_int8

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama"

native = pytest.mark.skipif(lib is None, reason="without the compiled core")


def both(name: str, folder: Path) -> tuple[Any, Any]:
    """A model whose head is rounded at load, and one that was converted so."""
    tiny_models.save(name, folder / "source")
    convert(folder / "source", folder / "kept", Recipe("itf", 32))
    convert(folder / "source", folder / "int8", Recipe("itf", 32, head="int8"))
    return ternarize.load(folder / "kept", head="int8"), ternarize.load(folder / "int8")


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "t5", "gemma3_text", "mixtral"])
def test_it_is_the_head_of_a_conversion(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_PIECE", 1000)  # in pieces, with a shorter one at the end
    ours, theirs = both(name, tmp_path)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for key in found:
        assert found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
    assert isinstance(ours.get_output_embeddings(), TernaryLinear)
    assert ours.dtype == theirs.dtype
    assert torch.equal(packing.output(ours), packing.output(theirs))
    # only a head that shares its tensor takes the embedding with it
    tied = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert tied == isinstance(ours.get_input_embeddings(), PackedEmbedding)
    assert tied == (name not in ("llama", "mixtral"))


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_it_is_saved_as_it_is_held(name: str, tmp_path: Path) -> None:
    ours, _ = both(name, tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    saved, stored = (packing.read_checkpoint(tmp_path / d) for d in ("saved", "int8"))
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in saved)
    assert packing.read_records(tmp_path / "saved") == packing.read_records(tmp_path / "int8")
    again: Any = ternarize.load(tmp_path / "saved")
    assert "head" not in again.config.quantization_config.to_dict()
    assert torch.equal(packing.output(again), packing.output(ours))


def test_a_head_that_is_packed_stays_as_it_is(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "packed", Recipe("itf", 32, head="ternary"))
    model: Any = ternarize.load(tmp_path / "packed", head="int8")
    assert model.lm_head.codec == "base3"


def test_dense_models_have_the_rounded_head(tmp_path: Path) -> None:
    ours, _ = both("llama", tmp_path)
    head = ours.lm_head
    dense: Any = ternarize.load(tmp_path / "kept", head="int8", dequantize=True)
    expected = dequantize_int8(head.weight, head.weight_scale, -1, torch.float32)
    assert type(dense.lm_head) is nn.Linear
    assert torch.equal(dense.lm_head.weight, expected.to(dense.dtype))


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    for name in ("bert", "llama"):
        tiny_models.save(name, tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}_packed", Recipe("itf", 32))
    with pytest.raises(UsageError, match="head int8: BertModel: there is none to be packed"):
        ternarize.load(tmp_path / "bert_packed", head="int8")
    with pytest.raises(UsageError, match="head: 'int4'; expected 'int8'"):
        ternarize.load(tmp_path / "llama_packed", head="int4")
    with pytest.raises(UsageError, match="head: 'ternary'; expected 'int8'"):
        TernarizeConfig(head="ternary")
    text = tmp_path / "text.txt"
    text.write_text("some text " * 100)
    with pytest.raises(UsageError, match="head: 'int8', but .* is not packed"):
        evaluate(EXAMPLE, text=text, seq_len=32, head="int8")


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    weight = torch.ones(5, 4)
    weight[3, 2] = number
    with pytest.raises(FormatError, match=r"lm_head.weight: has weights that are not finite"):
        round_head(Headed(weight), {"lm_head.weight"})


class Headed(nn.Module):
    """As much of a model as `round_head` asks for."""

    all_tied_weights_keys: dict[str, str]

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 5)
        self.lm_head.weight = nn.Parameter(weight)
        self.all_tied_weights_keys = {}


def test_small_scales_and_a_bias() -> None:
    """Scales that float16 does not hold as normal numbers are float32; the bias stays."""
    model: Any = Headed(torch.randn(5, 4) * 1e-5)
    bias = model.lm_head.bias
    round_head(model, {"lm_head.weight"})
    assert model.lm_head.weight_scale.dtype == torch.float32 and model.lm_head.bias is bias
    with pytest.raises(UsageError, match="lm_head.weight: is offloaded"):
        round_head(Headed(torch.empty(5, 4, device="meta")), {"lm_head.weight"})


@native
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_head_is_never_dense(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = both(name, tmp_path)
    expected = packing.output(ours)
    head = ours.get_output_embeddings().weight
    real = dense_matrix

    def without_the_head(packed: Any, *others: Any) -> Tensor:
        assert packed is not head
        return real(packed, *others)

    monkeypatch.setattr(products, "dense_matrix", without_the_head)
    assert torch.equal(packing.output(ours), expected)


@native
def test_bench_counts_the_head_in_bytes(tmp_path: Path) -> None:
    ours, _ = both("llama", tmp_path)
    kept = ternarize.load(tmp_path / "kept")
    before, after = (bench.bytes_per_step(m) for m in (kept, ours))
    head = ours.lm_head.weight
    assert before - after == head.numel() * (kept.dtype.itemsize - 1) - 2 * len(head)


def test_the_command_line(tmp_path: Path) -> None:
    packed = str(tmp_path / "packed")
    text = tmp_path / "text.txt"
    text.write_text("The function returns a list of the object. " * 40)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    run("convert", str(EXAMPLE), packed, "--method", "itf", "-q")
    verify(packed)
    options = ["eval", packed, "--text", str(text), "--seq-len", "64", "--json"]
    kept, rounded = run(*options), run(*options, "--head", "int8")
    assert kept != rounded
    assert run("generate", packed, "--head", "int8", "--max-new-tokens", "2", "-q")
    assert run(
        "bench", packed, "--head", "int8", "--prompt", "4", "--decode", "2", "--repeats", "1"
    )
