"""What came of a conversion is seen at once: the figures of `evaluate`, and never an error."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_evaluate import save, word_tokenizer
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert import check as checking
from ternarize.convert.check import check_conversion
from ternarize.convert.run import convert
from ternarize.measure.evaluate import Evaluation, evaluate, open_evaluation
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.runtime.generate import generate

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
FIGURES = ("perplexity", "source_perplexity", "kl_divergence", "top1_agreement")


def converted(source: Path, output: Path) -> Path:
    convert(source, output, Recipe("itf", 32))
    return output


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(EXAMPLE, tmp_path_factory.mktemp("check") / "a 'b'")


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A source of 64 positions, and what came of it."""
    source = save("llama", tmp_path / "small")
    return source, converted(source, tmp_path / "small packed")


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_figures_are_those_of_an_evaluation_on_the_text_that_comes_along(packed: Path) -> None:
    found = check_conversion(packed, EXAMPLE)
    assert found is not None and found["measured"]
    expected = evaluate(packed, source=EXAMPLE, text="default", max_tokens=2048)
    for name in (*FIGURES, "tokens", "windows", "seq_len", "windows_begin_with", "kind"):
        assert found[name] == expected[name], name
    assert (found["tokens"], found["windows_begin_with"]) == (2048, ["<|endoftext|>"])
    json.dumps(found)


def test_each_model_continues_the_same_words(packed: Path) -> None:
    found = check_conversion(packed, EXAMPLE)
    assert found is not None
    tokenizer = open_tokenizer(EXAMPLE)
    models: dict[str, Any] = {
        "packed": ternarize.load(packed, dtype=torch.float32),
        "source": transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32),
    }
    for name, model in models.items():
        expected = generate(model, tokenizer, checking.PROMPT, max_new_tokens=24).text
        assert found["writes"][name] == expected
    assert found["writes"]["source"] != found["writes"]["packed"]


def test_a_check_changes_nothing_of_what_was_converted(packed: Path) -> None:
    before = bytes_of(packed)
    first, again = check_conversion(packed, EXAMPLE), check_conversion(packed, EXAMPLE)
    assert first is not None and again is not None
    for found in (first, again):
        assert found.pop("seconds") > 0
    assert first == again
    assert bytes_of(packed) == before


def test_a_model_of_few_positions_is_measured_in_windows_that_it_takes(
    small: tuple[Path, Path],
) -> None:
    source, output = small
    found = check_conversion(output, source)
    assert found is not None and found["measured"], found
    assert (found["seq_len"], found["windows"]) == (64, 32)
    for directory in small:
        config = json.loads((directory / "config.json").read_text())
        config["max_position_embeddings"] = 8  # as many tokens as PROMPT has
        (directory / "config.json").write_text(json.dumps(config))
    found = check_conversion(output, source)
    assert found is not None and found["measured"], found
    assert found["seq_len"] == 8
    assert found["writes"] == {"prompt": checking.PROMPT, "source": "", "packed": ""}


def test_an_encoder_is_compared_by_its_embeddings(tmp_path: Path) -> None:
    source = save("bert", tmp_path / "source", around="<s> $A </s>")
    output = converted(source, tmp_path / "packed")
    found = check_conversion(output, source)
    assert found is not None and found["measured"], found
    expected = evaluate(output, source=source, text="default", max_tokens=2048)
    assert found["cosine"] == expected["cosine"]
    assert "writes" not in found and "windows_begin_with" not in found


@pytest.mark.parametrize("name", ["t5", "vit", "bert_classifier"])
def test_of_other_models_nothing_is_said(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    assert check_conversion(converted(source, tmp_path / "packed"), source) is None


def test_without_a_tokenizer_nothing_is_said(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert check_conversion(converted(source, tmp_path / "packed"), source) is None


# --- what is not measured -----------------------------------------------------------------------


def unmeasured(output: Path, source: Path, **options: Any) -> tuple[str, str | None]:
    found = check_conversion(output, source, **options)
    assert found is not None and set(found) == {"measured", "why", "command"}
    assert found["measured"] is False and found["why"].isprintable()
    return found["why"], found["command"]


def assert_command(command: str | None, packed: Path) -> None:
    """The command measures what the check would have."""
    assert command is not None
    program, *words = shlex.split(command)
    assert program == "ternarize" and str(packed) in words
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    said, found = json.loads(done.stdout), check_conversion(packed, EXAMPLE)
    assert found is not None
    assert all(said[name] == found[name] for name in FIGURES)


def test_for_what_does_not_fit_into_memory_there_is_the_command(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checking, "_memory_free", lambda: 1.2e6)
        why, command = unmeasured(packed, EXAMPLE)
    assert why.startswith("memory: both models need 0.") and why.endswith("and 0.0 GB are left")
    assert_command(command, packed)


def test_the_memory_that_is_left_is_that_of_the_machine_and_of_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0 < checking._memory_free() < float("inf")
    monkeypatch.setattr(checking, "memory_left", lambda: (5.0, 7.0))
    assert checking._memory_free() == 5


def test_more_memory_is_asked_for_than_the_weights_take(packed: Path) -> None:
    work = open_evaluation(packed, EXAMPLE, "default", 256, 2048)
    coverage = json.loads((packed / "ternarize.json").read_text())["coverage"]
    models = work.load("cpu", torch.float32)
    weights = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
    assert checking._memory(work, coverage) > sum(weights.values())


def test_for_what_takes_too_long_there_is_the_command(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # told before anything is loaded, by the products alone
        patch.setattr(checking, "_operations_per_second", lambda: 1e6)
        patch.setattr(Evaluation, "load", None)
        why, command = unmeasured(packed, EXAMPLE)
    # 1,836,288 weights, 2,048 tokens, 2 models, 2 operations
    assert why == "time: it would take about 250.7 minutes here"
    assert_command(command, packed)


def test_windows_that_take_too_long_are_broken_off(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(checking, "_operations_per_second", lambda: float("inf"))
    monkeypatch.setattr(checking, "SECONDS", 1e-9)
    monkeypatch.setattr(Evaluation, "batch_size", lambda _: 1)
    why, command = unmeasured(packed, EXAMPLE, progress=lambda *call: calls.append(call[0]))
    assert why.startswith("time: it would take about ") and command is not None
    assert calls == []


def test_products_are_timed() -> None:
    assert 1e7 < checking._operations_per_second() < 1e15


def test_a_source_that_was_streamed_is_not_fetched_again(packed: Path) -> None:
    why, command = unmeasured(packed, Path("user/source"), streamed=True)
    assert "streamed" in why
    assert command is not None and "--source user/source" in command


def test_a_vocabulary_smaller_than_the_tokenizers_is_told_in_one_line(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", size=200)
    words = word_tokenizer(size=200)
    words.backend_tokenizer.model.unk_token = "w199"
    words.save_pretrained(source)
    why, command = unmeasured(converted(source, tmp_path / "packed"), source)
    assert "default: has tokens 1 to 199; expected 0 to 159, the model's vocabulary" in why
    assert command is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory: not enough is left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory: not enough is left"),
    ],
    ids=str,
)
def test_memory_that_runs_out_is_told_in_one_line(
    error: Exception, said: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Evaluation, "measure", fail)
    why, command = unmeasured(packed, EXAMPLE)
    assert said in why and command is not None


def test_code_of_the_model_that_fails_is_told_in_one_line(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise ValueError("no such\nthing")

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    why, command = unmeasured(packed, EXAMPLE)
    assert "its forward, or its source's, fails (ValueError: no such);" in why
    assert command is None


def test_a_file_that_cannot_be_read_any_more_is_told_in_one_line(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "a\nb")

    monkeypatch.setattr(checking, "_too_large", gone)
    why, command = unmeasured(packed, EXAMPLE)
    assert "No such file or directory" in why and command is None


def test_our_own_mistakes_are_not_hidden(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("a slip")

    monkeypatch.setattr(checking, "_too_large", broken)
    with pytest.raises(AttributeError):
        check_conversion(packed, EXAMPLE)
