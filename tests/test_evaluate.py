"""Evaluation agrees with a restatement in plain Python; generation with transformers' own."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import ternarize
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, FormatError, TernarizeError, UsageError
from ternarize.measure.documents import cut, cut_windows, read_documents
from ternarize.measure.encoders import embed
from ternarize.measure.evaluate import evaluate
from ternarize.measure.language_models import summarize, window_columns
from ternarize.models.reads import frame, open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.runtime.generate import generate

WORDS = 160
Fast: Any = transformers.PreTrainedTokenizerFast
SEQ_LEN = 16


def word_tokenizer(*, bos: str | None = "<s>", size: int = WORDS, around: str = "$A") -> Any:
    """Ids 0, 1, 2 are <pad>, <s>, </s>; the word `w7` is id 7.

    around  what it puts around a text $A by itself: "<s> $A", "<s> $A </s>", ...
    """
    names = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, size))]
    words = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, "w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(name, names.index(name)) for name in around.split() if name != "$A"]
    words.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return Fast(tokenizer_object=words, bos_token=bos, eos_token="</s>", pad_token="<pad>")


def save(name: str, directory: Path, seed: int = 0, **options: Any) -> Path:
    """A tiny float32 model with the word tokenizer."""
    tiny_models.save(name, directory, torch.float32, seed)
    word_tokenizer(**options).save_pretrained(directory)
    return directory


def words(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (count,), generator=generator).tolist()
    return " ".join(f"w{index}" for index in ids)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents, 100 tokens with the <s> that each begins with: 6 windows of 16."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|doc|>\n".join([words(30), words(40, 1), words(27, 2)]))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "packed"
    convert(llama, output, Recipe(method="absmean", group_size=32))
    return output


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("bert", tmp_path_factory.mktemp("models") / "bert")


# --- the measures, restated ---------------------------------------------------------------------


def distributions(model: Any, ids: list[int]) -> list[list[float]]:
    """Next-token probabilities after each token of a window but the last, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().tolist()
    rows = []
    for row in logits[:-1]:
        largest = max(row)
        weights = [math.exp(value - largest) for value in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def cut_by_hand(text: str, seq_len: int, front: bool) -> list[list[int]]:
    """Windows of a text whose documents begin with <s>; with `front`, all of them do."""
    ids: list[int] = []
    for document in text.split("\n<|doc|>\n"):
        ids += [1] + [int(word[1:]) for word in document.split()]
    windows = []
    while len(ids) >= seq_len - (front and ids[0] != 1):
        window = [1] * (front and ids[0] != 1)
        window, ids = window + ids[: seq_len - len(window)], ids[seq_len - len(window) :]
        windows.append(window)
    return windows


def restated(
    ours: Any, theirs: Any, text: str, seq_len: int, front: bool = False
) -> dict[str, tuple[float, float]]:
    columns: dict[str, list[float]] = {"nll": [], "source": [], "kl": [], "top1": []}
    for window in cut_by_hand(text, seq_len, front):
        q_rows, p_rows = distributions(ours, window), distributions(theirs, window)
        targets, rows = window[1:], list(zip(p_rows, q_rows, strict=True))
        for name, values in {
            "nll": [-math.log(q[t]) for q, t in zip(q_rows, targets, strict=True)],
            "source": [-math.log(p[t]) for p, t in zip(p_rows, targets, strict=True)],
            "kl": [sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in rows],
            "top1": [float(p.index(max(p)) == q.index(max(q))) for p, q in rows],
        }.items():
            columns[name].append(sum(values) / len(values))
    result = {
        "kl_divergence": mean_and_error(columns["kl"]),
        "top1_agreement": mean_and_error(columns["top1"]),
    }
    ratio = [a - b for a, b in zip(columns["nll"], columns["source"], strict=True)]
    for name, logs in (
        ("perplexity", columns["nll"]),
        ("source_perplexity", columns["source"]),
        ("perplexity_ratio", ratio),
    ):
        mean, error = mean_and_error(logs)
        result[name] = math.exp(mean), math.exp(mean) * error
    return result


def assert_measures(result: dict[str, Any], expected: dict[str, tuple[float, float]]) -> None:
    for name, (value, error) in expected.items():
        assert result[name]["value"] == pytest.approx(value, rel=1e-4), name
        assert result[name]["standard_error"] == pytest.approx(error, rel=1e-3), name


def test_measures_of_two_models_are_those_computed_by_hand(
    llama: Path, other: Path, text: Path
) -> None:
    result = evaluate(other, source=llama, text=text, seq_len=SEQ_LEN)
    load = transformers.LlamaForCausalLM.from_pretrained
    assert_measures(result, restated(load(other), load(llama), text.read_text(), SEQ_LEN))
    assert (result["tokens"], result["windows"]) == (96, 6)
    assert result["kl_divergence"]["value"] > 0.01


def test_a_packed_model_is_measured_against_its_source(
    packed: Path, llama: Path, text: Path
) -> None:
    result = evaluate(packed, source=llama, text=text, seq_len=SEQ_LEN)
    ours = ternarize.load(packed)
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama)
    assert_measures(result, restated(ours, theirs, text.read_text(), SEQ_LEN))
    assert result["kl_divergence"]["value"] > 0
    assert result["dtype"] == "float32"
    json.dumps(result)


def test_windows_that_the_tokenizer_begins_are_measured_with_what_it_puts_there(
    other: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    for name, around in (("nothing", "$A"), ("first", "<s> $A"), ("both", "<s> $A </s>")):
        shutil.copytree(other, tmp_path / name)
        word_tokenizer(around=around).save_pretrained(tmp_path / name)
        result = evaluate(tmp_path / name, source=llama, text=text, seq_len=SEQ_LEN)
        load = transformers.LlamaForCausalLM.from_pretrained
        begun = name != "nothing"
        expected = restated(load(other), load(llama), text.read_text(), SEQ_LEN, begun)
        assert_measures(result, expected)
        assert result["windows_begin_with"] == ["<s>"] * begun
        assert (result["windows"], result["tokens"]) == (6, 96)


def test_a_model_is_equal_to_itself(packed: Path, text: Path) -> None:
    result = evaluate(packed, source=packed, text=text, seq_len=SEQ_LEN)
    assert result["kl_divergence"] == {"value": 0.0, "standard_error": 0.0}
    assert result["top1_agreement"] == {"value": 1.0, "standard_error": 0.0}
    assert result["perplexity_ratio"] == {"value": 1.0, "standard_error": 0.0}


def test_without_a_source_only_the_perplexity_is_measured(packed: Path, text: Path) -> None:
    alone = evaluate(packed, text=text, seq_len=SEQ_LEN)
    beside = evaluate(packed, source=packed, text=text, seq_len=SEQ_LEN)
    for key, value in beside["perplexity"].items():  # some torch sums the two in another order
        assert alone["perplexity"][key] == pytest.approx(value, rel=1e-12)
    assert "kl_divergence" not in alone and "source_perplexity" not in alone


def test_the_batch_size_does_not_matter(packed: Path, llama: Path, text: Path) -> None:
    one, four = (
        evaluate(packed, source=llama, text=text, seq_len=SEQ_LEN, batch_size=size)
        for size in (1, 4)
    )
    for name in ("perplexity", "kl_divergence", "top1_agreement"):
        assert one[name]["value"] == pytest.approx(four[name]["value"], rel=1e-5)


def test_progress_is_told_after_each_batch(packed: Path, text: Path) -> None:
    calls: list[tuple[int, int, str, str]] = []
    evaluate(
        packed, text=text, seq_len=SEQ_LEN, batch_size=4, progress=lambda *call: calls.append(call)
    )
    assert [call[:2] for call in calls] == [(4, 6), (6, 6)]
    assert re.fullmatch(r"perplexity \d+\.\d\d", calls[-1][2])


def test_int8_activations_are_those_of_the_packed_model(packed: Path, text: Path) -> None:
    result = evaluate(packed, source=packed, text=text, seq_len=SEQ_LEN, activations="int8")
    assert result["kl_divergence"]["value"] > 0


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3_moe", "mamba"])
def test_other_language_models_have_a_perplexity(name: str, tmp_path: Path, text: Path) -> None:
    result = evaluate(save(name, tmp_path / name), text=text, seq_len=SEQ_LEN)
    assert 100 < result["perplexity"]["value"] < 260  # random weights: about the vocabulary, 160


# --- known distributions ------------------------------------------------------------------------


def constant_model(*probabilities: float) -> Any:
    """A language model that always predicts the same distribution."""
    logits = torch.tensor(probabilities).log()

    def model(input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))

    model.device, model.dtype = torch.device("cpu"), torch.float32  # type: ignore[attr-defined]
    return model


def compared(models: list[Any], windows: torch.Tensor, first: int = 1) -> dict[str, Any]:
    return dict(summarize(window_columns(models, windows, first=first)))


def test_the_perplexity_of_a_uniform_prediction_is_the_vocabulary() -> None:
    windows = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]])
    measures = compared([constant_model(0.25, 0.25, 0.25, 0.25)], windows)
    assert measures["perplexity"]["value"] == pytest.approx(4)
    assert measures["perplexity"]["standard_error"] == pytest.approx(0, abs=1e-6)


def test_the_first_token_of_a_window_is_not_counted() -> None:
    windows = torch.tensor([[1, 0, 0], [0, 1, 0]])
    value = compared([constant_model(0.5, 0.25, 0.25)], windows)["perplexity"]["value"]
    assert value == pytest.approx(2 ** ((1 + 1 + 2 + 1) / 4))


def test_a_longer_beginning_of_a_window_is_not_counted_either() -> None:
    windows = torch.tensor([[1, 0, 0, 2], [1, 0, 1, 0]])
    model = constant_model(0.5, 0.25, 0.25)
    value = compared([model], windows, first=2)["perplexity"]["value"]
    assert value == pytest.approx(2 ** ((1 + 2 + 2 + 1) / 4))


def test_the_divergence_is_that_of_the_packed_model_from_the_source() -> None:
    source, ours = constant_model(0.5, 0.25, 0.25), constant_model(0.25, 0.25, 0.5)
    measures = compared([ours, source], torch.zeros(2, 3, dtype=torch.int64))
    assert measures["kl_divergence"]["value"] == pytest.approx(0.25 * math.log(2))
    assert measures["top1_agreement"]["value"] == 0
    assert measures["perplexity_ratio"]["value"] == pytest.approx(2)
    reverse = compared(
        [constant_model(0.5, 0.5), constant_model(0.9, 0.1)], torch.zeros(2, 3, dtype=torch.int64)
    )
    assert reverse["kl_divergence"]["value"] == pytest.approx(
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-5
    )


def test_words_that_the_source_excludes_add_nothing_to_the_divergence() -> None:
    source, ours = constant_model(0.5, 0.5, 0.0), constant_model(0.25, 0.25, 0.5)
    measures = compared([ours, source], torch.zeros(2, 3, dtype=torch.int64))
    assert measures["kl_divergence"]["value"] == pytest.approx(math.log(2))


def test_one_window_has_no_standard_error() -> None:
    measures = compared([constant_model(0.5, 0.5)], torch.zeros(1, 3, dtype=torch.int64))
    assert measures["perplexity"] == {"value": pytest.approx(2), "standard_error": None}


# --- text to windows ----------------------------------------------------------------------------


def test_documents_end_at_separator_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("<|doc|>\na\n\nb\n<|doc|>\n<|doc|>\nc <|doc|> d\n<|doc|> e\n<|doc|>\n\n")
    assert read_documents(path) == ["a\n\nb", "c <|doc|> d\n<|doc|> e"]


def test_each_document_begins_with_bos_and_the_rest_of_a_window_is_dropped() -> None:
    windows = cut_windows(["w5 w6", "w7", "w8 w9 w10"], word_tokenizer(), 4)
    assert windows.tolist() == [[1, 5, 6, 1], [7, 1, 8, 9]]


def test_documents_begin_with_eos_where_there_is_no_bos() -> None:
    assert cut_windows(["w5 w6"], word_tokenizer(bos=None), 3).tolist() == [[2, 5, 6]]


def test_every_window_begins_with_what_the_tokenizer_puts_in_front_and_with_nothing_twice() -> None:
    documents = ["w5 w6 w7 w8 w9", "w10 w11 w12 w13", "w14"]
    for around in ("<s> $A", "<s> $A </s>"):  # what it puts behind a text ends no window
        tokenizer = word_tokenizer(around=around)
        assert cut_windows(documents, tokenizer, 4).tolist() == [
            [1, 5, 6, 7],  # as the document begins
            [1, 8, 9, 1],  # in the midst of it, up to the next one
            [1, 10, 11, 12],
            [1, 13, 1, 14],
        ]
        assert cut_windows(documents, tokenizer, 6).tolist() == [
            [1, 5, 6, 7, 8, 9],
            [1, 10, 11, 12, 13, 1],
        ]


def test_a_beginning_of_several_tokens_is_put_whole() -> None:
    tokenizer = word_tokenizer(around="<s> <pad> $A")
    windows = cut_windows(["w5 w6 w7", "w8 w9 w10"], tokenizer, 4)
    # the second ends in the midst of the next document's own beginning
    assert windows.tolist() == [[1, 0, 5, 6], [1, 0, 7, 1], [1, 0, 8, 9]]
    with pytest.raises(UsageError, match="sequence length: 2; expected more than the 2 tokens"):
        cut_windows(["w5 w6 w7"], tokenizer, 2)


def test_a_beginning_that_is_not_bos_stands_in_its_place() -> None:
    tokenizer = word_tokenizer(around="w9 $A")
    assert cut_windows(["w5 w6", "w7"], tokenizer, 4).tolist() == [[9, 5, 6, 9]]


@given(
    lengths=st.lists(st.integers(1, 12), max_size=6),
    prefix=st.sampled_from([[], [1], [1, 2], [1, 1]]),
    seq_len=st.integers(3, 9),
)
def test_no_token_of_a_text_is_lost_or_used_twice(
    lengths: list[int], prefix: list[int], seq_len: int
) -> None:
    text = iter(range(10, 200))  # every token is another
    documents = [[next(text) for _ in range(length)] for length in lengths]
    own, begins = len(prefix), {document[0] for document in documents}
    windows = cut([token for each in documents for token in prefix + each], prefix, seq_len)
    assert all(len(window) == seq_len and window[:own] == prefix for window in windows)
    used = [token for window in windows for token in window if token >= 10]
    assert used == list(range(10, 10 + len(used)))
    assert sum(lengths) - len(used) < seq_len - own
    for window in windows:  # behind its beginning, those of documents alone
        for token, following in itertools.pairwise(window[own:]):
            assert token >= 10 or following < 10 or following in begins


@pytest.mark.parametrize(
    ("around", "before", "behind"),
    [("$A", [], []), ("<s> $A", [1], []), ("$A </s>", [], [2]), ("<s> w9 $A </s>", [1, 9], [2])],
)
def test_what_a_tokenizer_puts_around_a_text_is_told_from_what_it_gives(
    around: str, before: list[int], behind: list[int]
) -> None:
    assert frame(word_tokenizer(around=around)) == (before, behind)


def test_word_pieces_and_tokenizers_in_python_are_told_too() -> None:
    pieces = Tokenizer(models.WordPiece({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    pieces.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    assert frame(Fast(tokenizer_object=pieces)) == ([0], [1])
    assert frame(transformers.ByT5Tokenizer()) == ([], [1])
    canine: Any = transformers.CanineTokenizer
    assert frame(canine()) == ([0xE000], [0xE001])


def odd_tokenizer(bare: list[int], full: list[int], mask: list[int]) -> Any:
    """A tokenizer of one answer."""

    def call(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = full if add_special_tokens else bare
        return {"input_ids": ids, "special_tokens_mask": mask}

    return call


def test_a_text_that_is_cut_otherwise_behind_special_tokens_is_told_by_the_mask() -> None:
    assert frame(odd_tokenizer([7], [1, 5, 6, 2], [1, 0, 0, 1])) == ([1], [2])
    assert frame(odd_tokenizer([1], [1, 1], [1, 0])) == ([1], [])


@pytest.mark.parametrize(
    ("bare", "full", "mask"),
    [
        ([7], [1, 5, 6, 2], [0, 0, 0, 0]),
        ([7], [1, 5, 2, 6], [1, 0, 1, 0]),
        ([], [1, 2], [1, 1]),  # no token for any of the texts: before or behind?
        ([1], [1, 1], [0, 0]),
    ],
)
def test_what_cannot_be_told_is_refused(bare: list[int], full: list[int], mask: list[int]) -> None:
    with pytest.raises(CheckpointError, match="expected to see which of them it puts before"):
        frame(odd_tokenizer(bare, full, mask))


def test_max_tokens_takes_the_first_tokens() -> None:
    documents = ["w5 w6", "w7", "w8 w9 w10"]
    assert cut_windows(documents, word_tokenizer(), 2, 5).tolist() == [[1, 5], [6, 1]]
    with pytest.raises(UsageError, match="3 tokens are used; expected at least one window of 4"):
        cut_windows(documents, word_tokenizer(), 4, 3)


# --- encoders -----------------------------------------------------------------------------------


def test_embeddings_are_means_over_the_attention_mask_of_length_one(bert: Path) -> None:
    model = transformers.BertModel.from_pretrained(bert)
    lines = ["w5 w6 w7", "w8", words(40)]
    found = embed(model, open_tokenizer(bert), lines, seq_len=SEQ_LEN, batch_size=2)
    for row, line in zip(found, lines, strict=True):
        ids = [int(word[1:]) for word in line.split()][:SEQ_LEN]
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_an_encoder_is_compared_by_the_cosine_of_embeddings(bert: Path, tmp_path: Path) -> None:
    output, text = tmp_path / "packed", tmp_path / "lines.txt"
    lines = [words(5 + index, index) for index in range(7)]
    text.write_text("\n\n".join(lines[:4]) + "\n<|doc|>\n" + "\n".join(lines[4:]) + "\n")
    convert(bert, output, Recipe(method="twn", group_size=32))
    result = evaluate(output, source=bert, text=text, batch_size=3)

    tokenizer = open_tokenizer(bert)
    ours = embed(ternarize.load(output, dtype=torch.float32), tokenizer, lines)
    theirs = embed(transformers.BertModel.from_pretrained(bert), tokenizer, lines)
    cosines = [float(cosine) for cosine in (ours.double() * theirs.double()).sum(-1)]
    mean, error = mean_and_error(cosines)
    assert result["lines"] == 7
    assert result["cosine"]["value"] == pytest.approx(mean, abs=1e-5)
    assert result["cosine"]["standard_error"] == pytest.approx(error, rel=1e-2)
    assert result["cosine"]["minimum"] == pytest.approx(min(cosines), abs=1e-5)
    assert result["cosine"]["minimum_line"] == lines[cosines.index(min(cosines))]
    assert mean < 0.999


def test_an_encoder_is_equal_to_itself(bert: Path, text: Path) -> None:
    cosine = evaluate(bert, source=bert, text=text)["cosine"]
    assert (cosine["value"], cosine["standard_error"], cosine["minimum"]) == (1.0, 0.0, 1.0)


def test_a_longer_line_is_cut_to_what_the_encoder_takes(bert: Path, tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text(words(200))
    result = evaluate(bert, source=bert, text=text)
    assert (result["seq_len"], result["tokens"]) == (64, 64)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("t5", "encoder-decoder"),
        ("vit", "images or audio"),
        ("clip", "several modalities"),
        ("bert_classifier", "another head"),
    ],
)
def test_models_that_cannot_be_evaluated_are_refused(
    name: str, what: str, tmp_path: Path, text: Path
) -> None:
    tiny_models.CONFIGS[name]().save_pretrained(tmp_path)  # refused before weights are read
    with pytest.raises(CheckpointError, match=f"{what}.*causal language models and text encoders"):
        evaluate(tmp_path, text=text)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertLMHeadModel"])
def test_masked_language_models_are_refused(architecture: str, tmp_path: Path, text: Path) -> None:
    config = tiny_models.CONFIGS["bert"]()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{architecture}: is a"):
        evaluate(tmp_path, text=text)


def test_a_text_too_short_for_one_window_is_refused_with_numbers(
    llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("w5 w6 w7")
    with pytest.raises(UsageError, match="short.txt: 4 tokens .* one window of 16"):
        evaluate(llama, text=path, seq_len=SEQ_LEN)


def test_a_text_without_lines_is_refused(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(UsageError, match="no line to embed"):
        evaluate(bert, source=bert, text=path)


def test_a_text_that_cannot_be_read_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.txt: cannot be read"):
        evaluate(llama, text=tmp_path / "nowhere.txt")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 w5")
    with pytest.raises(UsageError, match="latin1.txt: byte 3 is not UTF-8"):
        evaluate(llama, text=tmp_path / "latin1.txt")


def test_another_vocabulary_is_refused(llama: Path, tmp_path: Path, text: Path) -> None:
    config = tiny_models.CONFIGS["llama"]()
    config.vocab_size = 170
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="vocabulary of 170 tokens.*160"):
        evaluate(llama, source=tmp_path, text=text)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "model", size=200)
    path = tmp_path / "text.txt"
    path.write_text("w199 " * 20)
    with pytest.raises(
        CheckpointError, match="tokens . to 199; expected 0 to 159, the model's vocabulary"
    ):
        evaluate(tmp_path / "model", text=path, seq_len=SEQ_LEN)


def test_an_encoder_needs_a_source_of_its_kind(bert: Path, llama: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="is an encoder .*--source"):
        evaluate(bert, text=text)
    with pytest.raises(UsageError, match="is a causal language model .* encoder"):
        evaluate(bert, source=llama, text=text)


def test_windows_longer_than_the_context_are_refused(llama: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="256; expected at most the model's 64 positions"):
        evaluate(llama, text=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "sequence length: 1"),
        ({"max_tokens": 0}, "max tokens: 0"),
        ({"batch_size": 0}, "batch size: 0"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
        ({"device": "abacus"}, "device: 'abacus'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    options: dict[str, Any], message: str, llama: Path, text: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(llama, text=text, **options)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _remove_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def _other_class(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (directory / "config.json").write_text(json.dumps(config))


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_weight(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _poison(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("config.json"), "no config.json"),
        (_remove("model.safetensors"), "cannot use it"),
        (_remove_tokenizer, "no tokenizer"),
        (_other_class, "NoSuchModel.*expected a model class of transformers"),
        (_truncate, "The file is damaged"),
        (_drop_weight, "1 weights are missing, first model.norm.weight"),
        (_poison, "the logits of window 0 are NaN in float32"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    damage: Callable[[Path], None], message: str, tmp_path: Path, text: Path
) -> None:
    directory = save("llama", tmp_path / "model")
    damage(directory)
    with pytest.raises(TernarizeError, match=message) as caught:
        evaluate(directory, text=text, seq_len=SEQ_LEN)
    assert isinstance(caught.value, (CheckpointError, FormatError))
    assert "\n" not in str(caught.value)


# --- generate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    return ternarize.load(packed, dtype=torch.float32)


def test_greedy_text_is_that_of_transformers_and_arrives_in_pieces(model: Any) -> None:
    tokenizer, pieces = word_tokenizer(), list[str]()
    result = generate(model, tokenizer, "w5 w6", max_new_tokens=12, stream=pieces.append)
    ids = tokenizer("w5 w6", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 2:]
    assert result.text.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
    assert result.text == "".join(pieces) and len(pieces) > 1
    assert (result.prompt_tokens, result.new_tokens) == (2, len(expected))
    assert result.tokens_per_second > 0


def test_sampling_repeats_with_a_seed_and_leaves_the_callers_random_state(model: Any) -> None:
    state = torch.get_rng_state()
    first, again, another = (
        generate(model, word_tokenizer(), "w5", temperature=2.0, seed=seed, max_new_tokens=20).text
        for seed in (1, 1, 2)
    )
    assert first == again != another
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_one_token_is_greedy(options: dict[str, Any], model: Any) -> None:
    greedy, sampled = (
        generate(model, word_tokenizer(), "w5", max_new_tokens=20, **each).text
        for each in ({}, {"temperature": 3.0, **options})
    )
    assert sampled == greedy


def test_sampling_is_from_all_tokens_unless_told_otherwise(model: Any) -> None:
    def drawn(top_k: int | None) -> set[str]:
        """First words at a temperature where all are about as likely."""
        options: dict[str, Any] = {"temperature": 100.0, "top_k": top_k, "max_new_tokens": 1}
        return {
            generate(model, word_tokenizer(), "w5", seed=seed, **options).text
            for seed in range(120)
        }

    assert len(drawn(None)) > 55  # transformers by itself takes 50
    assert len(drawn(4)) == 4


def speaking(tokenizer: Any, ids: list[int]) -> Any:
    """A model that answers any prompt with `ids`, through transformers' streamer interface."""

    def answer(batch: torch.Tensor, streamer: Any, **options: Any) -> None:
        streamer.put(batch)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    config = transformers.LlamaConfig(eos_token_id=None)
    generation: Any = transformers.GenerationConfig
    return SimpleNamespace(
        can_generate=lambda: True,
        config=config,
        device=torch.device("cpu"),
        generate=answer,
        generation_config=generation(),
    )


def byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return Fast(tokenizer_object=pieces)


def test_characters_of_several_tokens_are_streamed_whole() -> None:
    tokenizer, pieces = byte_tokenizer(), list[str]()
    ids = tokenizer("né 深😀!").input_ids
    assert len(ids) == 12
    text = generate(speaking(tokenizer, ids), tokenizer, "a", stream=pieces.append).text
    assert pieces == ["n", "é", " ", "深", "😀", "!"]
    assert text == "né 深😀!"


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a深").input_ids[:-1]
    assert generate(speaking(tokenizer, ids), tokenizer, "a").text == "a\ufffd"


def test_the_space_before_the_first_new_word_is_kept() -> None:
    vocabulary = {"▁one": 0, "▁two": 1, "▁three": 2, "s": 3}
    pieces = Tokenizer(models.WordLevel(vocabulary, "s"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    tokenizer = Fast(tokenizer_object=pieces)
    assert tokenizer.decode([1, 3]) == "twos"  # alone, it loses its space
    assert generate(speaking(tokenizer, [1, 3, 2]), tokenizer, "one").text == " twos three"


def test_special_tokens_are_not_shown() -> None:
    tokenizer = word_tokenizer()
    assert generate(speaking(tokenizer, [5, 2]), tokenizer, "w7").text.strip() == "w5"


def test_a_chat_prompt_goes_through_the_template(model: Any) -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(UsageError, match="no chat template"):
        generate(model, tokenizer, "w5", chat=True)
    tokenizer.chat_template = "w9 {{ messages[0]['content'] }} w10"
    chat = generate(model, tokenizer, "w5", chat=True, max_new_tokens=4)
    assert chat.prompt_tokens == 3
    assert chat.text == generate(model, tokenizer, "w9 w5 w10", max_new_tokens=4).text


def test_an_empty_prompt_begins_a_document(model: Any) -> None:
    result = generate(model, word_tokenizer(), "", max_new_tokens=4)
    assert result.prompt_tokens == 1
    assert result.text == generate(model, word_tokenizer(), "<s>", max_new_tokens=4).text


def test_the_context_limits_what_is_generated(model: Any) -> None:
    result = generate(model, word_tokenizer(), words(60), temperature=1.0, seed=3)
    assert result.new_tokens <= 4
    for prompt, new in ((60, 5), (64, None)):
        with pytest.raises(UsageError, match=f"prompt: {prompt} tokens.*context of 64"):
            generate(model, word_tokenizer(), words(prompt), max_new_tokens=new)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens: 0"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_k": 0}, "top-k: 0"),
        ({"top_p": 1.5}, "top-p: 1.5"),
    ],
)
def test_sampling_options_that_cannot_be_used_are_refused(
    options: dict[str, Any], message: str, model: Any
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(model, word_tokenizer(), "w5", **options)


def test_an_encoder_does_not_generate(bert: Path) -> None:
    encoder = transformers.BertModel.from_pretrained(bert)
    with pytest.raises(UsageError, match="BertModel: does not continue a text"):
        generate(encoder, word_tokenizer(), "w5")
