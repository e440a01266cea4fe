"""`transformers.pipeline` on packed directories, with ternarize imported and without."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing
import pytest
import tiny_models
import torch
import transformers

import ternarize
from ternarize.publish.hub import _shim
from ternarize.runtime.packed import Packed

EXAMPLE = Path(__file__).parents[1] / "examples/tiny-llama"
PROMPT = "The function returns"


def assert_packed(model: Any) -> None:
    assert any(isinstance(module, Packed) for module in model.modules())


def test_text_generation(packed: Path) -> None:
    pipe: Any = transformers.pipeline("text-generation", model=str(packed), dtype="float32")
    assert_packed(pipe.model)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model: Any = ternarize.load(packed, dtype=torch.float32)
    written = model.generate(ids, max_new_tokens=12, do_sample=False)
    (result,) = pipe(PROMPT, max_new_tokens=12, do_sample=False)
    assert result["generated_text"] == pipe.tokenizer.decode(written[0], skip_special_tokens=True)
    # a model that is loaded already
    again: Any = transformers.pipeline("text-generation", model=model, tokenizer=pipe.tokenizer)
    assert again(PROMPT, max_new_tokens=12, do_sample=False) == [result]


def test_feature_extraction_takes_the_body_of_the_model(packed: Path) -> None:
    pipe: Any = transformers.pipeline("feature-extraction", model=str(packed), dtype="float32")
    assert_packed(pipe.model)
    features = pipe(PROMPT, return_tensors=True)
    whole: Any = ternarize.load(packed, dtype=torch.float32)
    with torch.no_grad():
        expected = whole.model(pipe.tokenizer(PROMPT, return_tensors="pt")["input_ids"])
    assert torch.equal(features, expected.last_hidden_state)


def test_text_classification_by_an_encoder(tmp_path: Path) -> None:
    """BERT with a vocabulary of its own."""
    tiny_models.save("bert_classifier", tmp_path / "source")
    packing.pack_checkpoint(tmp_path / "source", tmp_path / "packed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "packed")
    path = str(tmp_path / "packed")
    pipe: Any = transformers.pipeline("text-classification", model=path, dtype="float32")
    assert_packed(pipe.model)
    model: Any = ternarize.load(path, dtype=torch.float32)
    with torch.no_grad():
        chances = model(**tokenizer("a b c", return_tensors="pt")).logits[0].softmax(-1)
    scores = {each["label"]: each["score"] for each in pipe("a b c", top_k=None)}
    assert len(scores) == 3
    for n, chance in enumerate(chances.tolist()):
        assert scores[f"LABEL_{n}"] == pytest.approx(chance, rel=1e-5)


WITHOUT = """
import json, sys
from transformers import pipeline
assert "ternarize" not in sys.modules
results = []
for task, options in (("text-generation", {"max_new_tokens": 12, "do_sample": False}),
                      ("feature-extraction", {})):
    pipe = pipeline(task, model=sys.argv[1], trust_remote_code=True, dtype="float32")
    assert "TernaryLinear" in repr(pipe.model)
    results.append(pipe("The function returns", **options))
json.dump(results, open(sys.argv[2], "w"))
"""


def test_pipelines_of_a_program_that_does_not_import_ternarize(
    packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "shimmed")
    for name, data in _shim(packed).items():
        (tmp_path / "shimmed" / name).write_bytes(data)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | home
    words = [sys.executable, "-c", WITHOUT, str(tmp_path / "shimmed"), str(tmp_path / "out.json")]
    subprocess.run(words, check=True, env=environment)
    theirs = json.loads((tmp_path / "out.json").read_text())
    ours: list[Any] = []
    tasks: dict[Any, dict[str, Any]] = {
        "text-generation": {"max_new_tokens": 12, "do_sample": False},
        "feature-extraction": {},
    }
    for task, options in tasks.items():
        pipe: Callable[..., Any] = transformers.pipeline(task, model=str(packed), dtype="float32")
        ours.append(pipe(PROMPT, **options))
    assert ours == theirs
