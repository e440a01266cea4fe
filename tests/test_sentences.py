"""The layout of sentence-transformers, in and out: modules.json, and a folder for each module."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tokenizers
import torch
import transformers

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.measure.encoders import embed
from ternarize.plans.recipe import Recipe

Fast: Any = transformers.PreTrainedTokenizerFast
RECIPE = Recipe("itf", 32)
WORDS = ["[PAD]", "[UNK]", "a", "cat", "dog", "sat", "ran", "home"]
TEXTS = ["a cat sat", "a dog ran home", "home"]
MODULES = ("Transformer", "Pooling", "Normalize")


def sentence_folder(top: Path, place: str) -> Path:
    """A tiny encoder as sentence-transformers saves it; with the transformer in place."""
    inside = top / place
    tiny_models.save("bert", inside, torch.float32)
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]")
    tokenizer: Any = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = Fast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    wrapped.save_pretrained(inside)
    (inside / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    (top / "config_sentence_transformers.json").write_text('{"prompts": {}}')
    (top / "README.md").write_text("---\nlicense: mit\n---\n")
    (top / "1_Pooling").mkdir()
    width = json.loads((inside / "config.json").read_text())["hidden_size"]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (top / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    paths = (place, "1_Pooling", "2_Normalize")
    table = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, MODULES, strict=True))
    ]
    (top / "modules.json").write_text(json.dumps(table))
    return top


@pytest.fixture(scope="module", params=["", "0_Transformer"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_folder(tmp_path_factory.mktemp("source") / "model", request.param)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "packed"
    convert(source, output, RECIPE)
    return output


def test_the_transformer_comes_to_the_top_and_modules_stay_behind_it(
    source: Path, packed: Path
) -> None:
    found = {p.relative_to(packed).as_posix() for p in packed.rglob("*") if p.is_file()}
    beside = {"modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"}
    own = {"config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"}
    assert beside | own <= found and not [name for name in found if "0_Transformer" in name]
    modules = json.loads((packed / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    before = json.loads((source / "modules.json").read_text())
    assert [{**module, "path": ""} for module in modules] == [{**m, "path": ""} for m in before]
    same = "1_Pooling/config.json"
    assert (packed / same).read_bytes() == (source / same).read_bytes()
    assert json.loads((packed / "ternarize.json").read_text())["source"]["card"]["license"] == "mit"


def test_it_is_verified_against_the_folder_and_loaded(source: Path, packed: Path) -> None:
    assert verify(packed, source)["compared"]["converted_again"] > 0
    assert ternarize.load(packed).config.model_type == "bert"


def test_a_transformer_that_is_named_itself_comes_alone(tmp_path: Path) -> None:
    source = sentence_folder(tmp_path / "model", "0_Transformer")
    convert(source / "0_Transformer", tmp_path / "packed", RECIPE)
    assert not (tmp_path / "packed" / "modules.json").exists()


def test_nothing_is_written_into_the_folder(tmp_path: Path) -> None:
    source = sentence_folder(tmp_path / "model", "0_Transformer")
    with pytest.raises(ternarize.OutputError, match="is the source"):
        convert(source, source / "packed", RECIPE)


@torch.no_grad()
def test_sentence_transformers_opens_and_saves_it(packed: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    model = package.SentenceTransformer(str(packed), device="cpu")
    found = model.encode(TEXTS, convert_to_tensor=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed)
    expected = embed(ternarize.load(packed), tokenizer, TEXTS)
    torch.testing.assert_close(found, expected)
    model.save_pretrained(str(tmp_path / "saved"))
    again = package.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), found)
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size < 1.1 * (packed / "model.safetensors").stat().st_size
