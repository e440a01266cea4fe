"""What models write in an evaluation, and several texts: what is measured, and what is refused."""

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_evaluate import save, word_tokenizer, words
from typer.testing import CliRunner, Result

from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, UsageError
from ternarize.measure.evaluate import evaluate
from ternarize.measure.prompts import Prompt, cut_prompts, read_prompts
from ternarize.measure.writing import (
    Writing,
    Written,
    choose_prompts,
    distinct_ngrams,
    ends_in_loop,
    is_right,
    measures_of_written,
    room_to_write,
    write_after,
)
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.runtime.generate import generate

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-llama"
TEXT = ROOT / "examples" / "eval.txt"
TEMPLATE = "{% for each in messages %}w9 {{ each['content'] }} w10 {% endfor %}w11"


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)


def file(path: Path, *rows: Any) -> Path:
    """JSON lines; what is a text already goes in as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


# --- loops, repetitions, answers ----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 6, 42])
def test_the_same_tokens_three_times_or_for_sixteen_tokens_are_a_loop(n: int) -> None:
    unit, begin = list(range(100, 100 + n)), [1, 2, 3]
    span = max(16, 3 * n)
    looped = begin + (unit * span)[:span]
    assert ends_in_loop(looped)
    assert not ends_in_loop(begin + (unit * span)[: span - 1])
    assert not ends_in_loop([*looped, 7])  # it has left the loop


def test_the_last_turn_of_a_loop_may_be_cut_off() -> None:
    unit = list(range(10))
    assert ends_in_loop([99, *unit * 3, *unit[:4]])


@given(st.lists(st.integers(0, 3), max_size=60))
def test_a_loop_is_what_its_definition_says(ids: list[int]) -> None:
    def periodic(n: int) -> bool:
        span = max(16, 3 * n)
        tail = ids[-span:]
        return len(tail) == span and all(tail[at] == tail[at - n] for at in range(n, span))

    assert ends_in_loop(ids) == any(periodic(n) for n in range(1, 61))


def test_distinct_4grams_are_those_that_differ() -> None:
    assert distinct_ngrams([1, 2, 3, 4, 5]) == 1.0
    assert distinct_ngrams([1, 2, 3, 1, 2, 3, 1, 2]) == 3 / 5


@pytest.mark.parametrize(
    ("text", "answer", "chat", "right"),
    [
        (" Paris. It is", "Paris", False, True),
        ("\n PARIS", "paris", False, True),
        (" I think Paris", "Paris", False, False),  # a text goes on with the answer itself
        (" I think Paris.", "Paris", True, True),  # a turn of a chat is a sentence around it
        (" Parisian", "Paris", False, False),
        (" 12.5", "12", False, False),
        (" 12.", "12", False, True),
        ("It is 112", "12", True, False),
        ("It is 3.12", "12", True, False),
        ("It is 12,", "12", True, True),
        ("New\n  York", "New York", False, True),
        (" (b) then", "(b)", False, True),
        ("", "Paris", True, False),
    ],
)
def test_an_answer_is_right_as_whole_words(text: str, answer: str, chat: bool, right: bool) -> None:
    assert is_right(text, Prompt([1], "", "", ("no", answer), chat)) == right


def written(*texts: str, stopped: bool = True) -> list[Written]:
    return [Written([ord(char) for char in text], text, stopped) for text in texts]


def test_the_measures_of_texts_are_those_computed_by_hand() -> None:
    texts = ["a" * 20, "abcd", "ab"]
    given = written(*texts)
    given[1] = given[1]._replace(stopped=False)
    prompts = [Prompt([1], "", "", answers) for answers in (("A" * 20,), ("b",), ())]
    found = measures_of_written(given, prompts, 20)
    assert found["loops"]["value"] == pytest.approx(1 / 3)
    assert found["loops"]["standard_error"] == pytest.approx(math.sqrt(1 / 3 / 3))
    assert found["stopped"]["value"] == pytest.approx(2 / 3)
    assert found["distinct_4grams"]["value"] == pytest.approx((1 / 17 + 1) / 2)
    assert found["right_answers"]["value"] == 0.5
    raw = "\n".join(texts).encode()
    assert found["zlib_ratio"]["value"] == len(zlib.compress(raw, 9)) / len(raw)


def test_what_cannot_be_measured_is_left_out() -> None:
    found = measures_of_written(written("", ""), [Prompt([1], "", "")] * 2, 15)
    assert set(found) == {"stopped"}


# --- prompts ------------------------------------------------------------------------------------


def test_prompts_are_the_first_tokens_of_documents_from_all_of_a_text() -> None:
    documents = [f"w{n} w{n} w{n} w{n}" for n in range(10, 20)]
    documents[5] = "w3"  # too short: the next one of its stretch is taken
    found = cut_prompts(documents, word_tokenizer(), 2, 3, where="t")
    assert [each.ids for each in found] == [[1, 10, 10, 10], [1, 16, 16, 16]]
    assert found[0] == Prompt([1, 10, 10, 10], "w10 w10 w10", "t")


def test_a_document_goes_on_after_its_prompt() -> None:
    assert len(cut_prompts(["w5 w6 w7 w8"], word_tokenizer(), 1, 3)) == 1
    with pytest.raises(UsageError, match="t: none of 1 documents .* more than 4 tokens"):
        cut_prompts(["w5 w6 w7 w8"], word_tokenizer(), 1, 4, where="t")


def test_paragraphs_take_the_place_of_documents_that_are_too_few() -> None:
    text = "w5 w6 w7\n\nw8 w9 w10\n \nw3\n\nw11 w12 w13"
    found = cut_prompts([text], word_tokenizer(), 4, 2)
    assert [each.ids for each in found] == [[1, 5, 6], [1, 8, 9], [1, 11, 12]]


def test_each_text_has_its_share_of_the_prompts() -> None:
    texts = [("a", ["w5 w6"] * 9), ("b", ["w7 w8"] * 9)]
    found = choose_prompts(Writing(number=5, prompt_tokens=1), texts, word_tokenizer())
    assert [each.where for each in found] == ["a", "a", "b", "b", "b"]


def test_prompts_of_a_file_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfw5 w6\r\n\n  \nw7\n")
    for around, begin in (("$A", []), ("<s> $A </s>", [1])):
        found = read_prompts(path, word_tokenizer(around=around))
        assert [each.ids for each in found] == [[*begin, 5, 6], [*begin, 7]]
    assert [each.where for each in found] == [f"{path}: line 1", f"{path}: line 4"]
    assert len(read_prompts(path, word_tokenizer(), 1)) == 1


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    path = file(tmp_path / "chat.jsonl", {"messages": turns, "answer": ["w8", "w9"]})
    (found,) = read_prompts(path, tokenizer)
    assert found.ids == [9, 5, 10, 9, 6, 10, 9, 7, 10, 11]
    assert (found.text, found.answers, found.chat) == ("w7", ("w8", "w9"), True)


USER = {"role": "user", "content": "w5"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("p.json", [], "p.json: is no kind of file .*.jsonl"),
        ("p.txt", " ", "p.txt: has no prompt"),
        ("p.jsonl", "", "p.jsonl: has no prompt"),
        ("p.jsonl", "{", "line 2: is not JSON"),
        ("p.jsonl", "w5 w6", "line 2: is not JSON"),
        ("p.jsonl", [1], "line 2: has .1.; expected an object with either `prompt` or `messages`"),
        ("p.jsonl", {}, "line 2: has nothing; expected an object"),
        ("p.jsonl", {"text": "w5", "id": 1}, "line 2: has text, id; expected an object"),
        ("p.jsonl", {"prompt": "w5", "messages": [USER]}, "line 2: has prompt and messages"),
        ("p.jsonl", {"prompt": 3}, "line 2, prompt: is '3'; expected a text"),
        ("p.jsonl", {"prompt": " "}, "line 2, prompt: is ' '"),
        ("p.jsonl", {"prompt": "w5", "answer": 42}, "line 2, answer: is '42'; expected a text"),
        ("p.jsonl", {"prompt": "w5", "answer": ["w6", ""]}, "line 2, answer: is ''"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 2: has half a surrogate pair"),
        ("p.jsonl", {"messages": [USER]}, "no chat template.*Give `prompt` in place"),
        ("p.jsonl", {"messages": []}, "line 2: a message is 'None'"),
        ("p.jsonl", {"messages": "w5"}, "line 2: a message is 'w5'"),
        ("p.jsonl", {"messages": [USER, {**USER, "role": "assistant"}]}, "assistant's turn"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_with_their_line(
    tmp_path: Path, name: str, row: Any, message: str
) -> None:
    rows = [row] if name != "p.jsonl" or not row else ['{"prompt": "w3"}', row]
    if row == {}:
        rows = ['{"prompt": "w3"}', "{}"]
    path = file(tmp_path / name, *rows)
    with pytest.raises(UsageError, match=message) as caught:
        read_prompts(path, word_tokenizer())
    assert "\n" not in str(caught.value)


def test_a_template_that_fails_is_told_with_the_line(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    path = file(tmp_path / "p.jsonl", {"messages": [USER]})
    with pytest.raises(UsageError, match="p.jsonl: line 1: the tokenizer's chat template fails"):
        read_prompts(path, tokenizer)


def test_what_is_written_has_to_fit_the_context() -> None:
    prompts = [Prompt([1] * 10, "", "a"), Prompt([1] * 60, "", "b")]
    assert room_to_write(prompts, None, 64) == 4
    assert room_to_write(prompts, None, 1 << 30) == 128
    with pytest.raises(UsageError, match="b: has a prompt of 60 tokens, and 5 are to be written"):
        room_to_write(prompts, 5, 64)
    with pytest.raises(UsageError, match="b: has a prompt of 60 tokens"):
        room_to_write(prompts, None, 60)


# --- writing ------------------------------------------------------------------------------------

PROMPTS = [
    "Return the first line of the",
    "A queue keeps its items",
    "The call waits until another",
]


def test_a_model_writes_what_it_writes_alone(model: Any, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, *PROMPTS]))
    prompts = read_prompts(path, tokenizer)
    calls: list[tuple[int, int, str, str]] = []
    for size in (1, 4):
        found = write_after(model, prompts, tokenizer, 20, size, lambda *call: calls.append(call))
        assert calls[-1] == (6, 6, "", "writing")
        for prompt, each in zip(prompts, found, strict=True):
            alone = generate(model, tokenizer, prompt.text, max_new_tokens=20)
            assert each.text == alone.text
            assert len(each.ids) + each.stopped == alone.new_tokens


def test_the_penalties_that_a_model_asks_for_are_left_out(model: Any) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    prompts = cut_prompts([TEXT.read_text()], tokenizer, 4, 16)
    plain = write_after(model, prompts, tokenizer, 40, 16)
    settings, own = model.generation_config, model.generation_config.to_dict()
    try:
        settings.update(repetition_penalty=5.0, no_repeat_ngram_size=2, min_new_tokens=30)
        settings.update(do_sample=True, temperature=3.0)
        assert write_after(model, prompts, tokenizer, 40, 16) == plain
    finally:
        settings.update(**own)


def test_a_text_ends_at_the_end_token_of_the_model_or_else_of_the_tokenizer(model: Any) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    prompts = cut_prompts([TEXT.read_text()], tokenizer, 9, 8)
    found = write_after(model, prompts, tokenizer, 60, 16)
    assert any(each.stopped for each in found)
    assert all(tokenizer.eos_token_id not in each.ids for each in found)
    assert all(len(each.ids) == 60 for each in found if not each.stopped)
    own = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = None
        assert write_after(model, prompts, tokenizer, 60, 16) == found
        first = found[0].ids[0]
        model.generation_config.eos_token_id = [first, own]
        assert write_after(model, prompts[:1], tokenizer, 60, 16) == [Written([], "", stopped=True)]
    finally:
        model.generation_config.eos_token_id = own


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3_moe", "mamba"])
def test_language_models_of_other_kinds_write_too(name: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n<|doc|>\n".join(words(20, seed) for seed in range(6)))
    writing = Writing(number=6, prompt_tokens=8, max_new_tokens=20)
    directory = save(name, tmp_path / name)
    found = evaluate(directory, text=path, seq_len=16, writing=writing)["writing"]
    assert found["prompts"] == len(found["texts"]) == 6
    assert set(found["packed"]) >= {"loops", "stopped", "distinct_4grams"}


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    directory = save("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = file(tmp_path / "p.jsonl", {"prompt": "w5 w6"})
    with pytest.raises(CheckpointError, match="the logits of text 0 of a batch are NaN"):
        evaluate(directory, writing=Writing(path, max_new_tokens=4))


# --- evaluations --------------------------------------------------------------------------------


def test_both_models_write_after_the_same_prompts(packed: Path) -> None:
    writing = Writing(number=6, prompt_tokens=12, max_new_tokens=32)
    both = evaluate(packed, source=EXAMPLE, text=TEXT, seq_len=64, writing=writing)
    assert both["perplexity"]["value"] > 1
    found = both["writing"]
    assert (found["prompts"], found["max_new_tokens"]) == (6, 32)
    for name, directory in (("packed", packed), ("source", EXAMPLE)):
        alone = evaluate(directory, text=TEXT, seq_len=64, writing=writing)["writing"]
        assert alone["packed"] == found[name]
        assert [row["packed"] for row in alone["texts"]] == [row[name] for row in found["texts"]]
        looped = sum(row[name]["loops"] for row in found["texts"]) / 6
        assert found[name]["loops"]["value"] == pytest.approx(looped)
    assert found["packed"] != found["source"]
    json.dumps(both)


def test_prompts_alone_are_measured_without_a_text(packed: Path, tmp_path: Path) -> None:
    rows = [{"prompt": PROMPTS[0], "answer": "file"}, {"prompt": PROMPTS[1]}]
    path = file(tmp_path / "p.jsonl", *rows)
    found = evaluate(packed, source=EXAMPLE, writing=Writing(path, max_new_tokens=20))
    assert found["text"] is None and "perplexity" not in found and "tokens" not in found
    right = [row["source"].get("right") for row in found["writing"]["texts"]]
    assert right == [found["writing"]["texts"][0]["source"]["text"].strip()[:4] == "file", None]
    assert found["writing"]["source"]["right_answers"]["value"] == float(right[0] or 0)


def test_of_several_texts_each_has_the_figures_that_it_has_alone(
    packed: Path, tmp_path: Path
) -> None:
    paragraphs = TEXT.read_text().split("\n\n")
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("\n\n".join(paragraphs[:3]))
    two.write_text("\n\n".join(paragraphs[3:]))
    options: dict[str, Any] = {"source": EXAMPLE, "seq_len": 32, "max_tokens": 256}
    both = evaluate(packed, text=[one, two], **options)
    assert both["text"] == [str(one), str(two)]
    windows, logs = 0, 0.0
    for path, entry in zip((one, two), both["texts"], strict=True):
        alone = evaluate(packed, text=path, **options)
        assert "texts" not in alone and alone["text"] == str(path) == entry["text"]
        for name in ("tokens", "windows", "windows_begin_with", "seq_len"):
            assert entry[name] == alone[name]
        for name in ("perplexity", "source_perplexity", "kl_divergence", "top1_agreement"):
            assert entry[name]["value"] == pytest.approx(alone[name]["value"], rel=1e-5)
        windows += alone["windows"]
        logs += alone["windows"] * math.log(alone["perplexity"]["value"])
    assert both["windows"] == windows
    assert both["perplexity"]["value"] == pytest.approx(math.exp(logs / windows), rel=1e-5)


def test_of_an_encoder_several_texts_have_their_own_cosines(tmp_path: Path) -> None:
    bert = save("bert", tmp_path / "bert")
    convert(bert, tmp_path / "packed", Recipe("twn", 32))
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for at, path in enumerate(paths):
        path.write_text("\n".join(words(6, 10 * at + n) for n in range(4)))
    both = evaluate(tmp_path / "packed", source=bert, text=paths)
    assert (both["lines"], [each["lines"] for each in both["texts"]]) == (8, [4, 4])
    minima = []
    for path, entry in zip(paths, both["texts"], strict=True):
        assert entry["cosine"]["minimum_line"] in path.read_text().split("\n")
        minima.append(entry["cosine"]["minimum"])
    assert both["cosine"]["minimum"] == min(minima)
    values = [entry["cosine"]["value"] for entry in both["texts"]]
    assert both["cosine"]["value"] == pytest.approx(sum(values) / 2)


def test_an_encoder_writes_nothing(tmp_path: Path) -> None:
    tiny_models.CONFIGS["bert"]().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is an encoder, which writes nothing; expected a causal"):
        evaluate(tmp_path, source=tmp_path, text=TEXT, writing=Writing())


@pytest.mark.parametrize(
    ("writing", "message"),
    [
        (Writing(number=0), "num-prompts: 0"),
        (Writing(prompt_tokens=0), "prompt-tokens: 0"),
        (Writing(max_new_tokens=0), "max-new-tokens: 0"),
        (Writing(prompt_tokens=5000), "more than 5000 tokens"),
        (Writing(max_new_tokens=300), "model's context of 256 together"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(
    writing: Writing, message: str, packed: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(packed, text=TEXT, seq_len=64, writing=writing)


def test_a_prompt_of_tokens_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    directory = save("llama", tmp_path / "model", size=200)
    path = file(tmp_path / "p.jsonl", {"prompt": "w5"}, {"prompt": "w199"})
    with pytest.raises(CheckpointError, match="p.jsonl: line 2: has tokens 199 to 199"):
        evaluate(directory, writing=Writing(path))


# --- the command --------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


SHORT = ("--text", TEXT, "--seq-len", 64)


def test_each_text_has_a_line_below_the_figures_of_all(packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "eval.txt"
    shutil.copyfile(TEXT, other)
    third = tmp_path / "third.txt"
    shutil.copyfile(TEXT, third)
    words = [*SHORT, "--text", other, "--text", third, "--max-tokens", 128]
    result = run(packed, *words)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[2] == "text tokens perplexity"
    names = [line.split(" 128 ")[0] for line in lines[3:6]]
    assert names == [str(TEXT), str(other), "third.txt"]
    assert lines[1].split()[:2] == ["perplexity", lines[3].split()[2]]  # the same text thrice
    assert lines[6].startswith("6 windows that begin with <|endoftext|>, 384 tokens")


def test_what_both_write_is_shown_in_figures_and_three_examples(
    packed: Path, tmp_path: Path
) -> None:
    short = ("--num-prompts", 5, "--prompt-tokens", 10, "--max-new-tokens", 16)
    words = [packed, "--source", EXAMPLE, *SHORT, "--generate", *short]
    result = run(*words)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    begin = lines.index("of what is written packed source")
    labels = ("loops", "zlib ratio", "stopped", "distinct 4grams")
    for label, line in zip(labels, lines[begin + 1 :], strict=False):
        assert line.startswith(f"{label} ")
    assert lines[begin + 5] == "5 texts, at most 16 tokens each, greedy"
    found = json.loads(run(*words, "--json").stdout)["writing"]
    told = [found["texts"][at] for at in (0, 1, 3)]  # from all of them
    expected = [f'"{" ".join(each["prompt"].split())}" goes on' for each in told]
    assert [line for line in lines if line.endswith("goes on")] == expected
    assert len([line for line in lines if line.startswith("source: ")]) == 3
    assert "goes on" not in run(*words, "--examples", 0).stdout
    assert run(*words, "--examples", 9).stdout.count("goes on") == 5


def test_a_model_worse_than_a_bound_fails_after_all_is_printed(packed: Path) -> None:
    words = [packed, *SHORT, "--generate", "--num-prompts", 3, "--max-new-tokens", 16]
    assert run(*words, "--min-quality", "loops=1").exit_code == 0
    bounds = ["--min-quality", "perplexity=1e9", "--min-quality", "stopped=1.5"]
    result = run(*words, *bounds)
    assert result.exit_code == 1 and "distinct 4grams" in result.stdout
    assert "error: stopped: " in result.stderr
    assert "in this evaluation; expected at least 1.5. The figures are above" in result.stderr
    result = run(*words, *bounds, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["error"]["class"] == "QualityError"
    assert found["perplexity"]["value"] > 1 and found["writing"]["prompts"] == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--generate"], 2, "neither of --text and --tasks"),
        (["--generate", "--tasks", "piqa"], 2, "both of --generate and --tasks"),
        (["--prompts", "p.jsonl", "--tasks", "piqa"], 2, "both of --prompts and --tasks"),
        ([*SHORT, "--num-prompts", 3], 2, "--num-prompts: is for --generate"),
        ([*SHORT, "--examples", 3], 2, "--examples: is for --generate"),
        (["--prompts", "p.txt", "--seq-len", 9], 2, "--seq-len: is for --text"),
        (["--prompts", "p.txt", "--prompt-tokens", 9], 2, "--prompt-tokens: is for prompts cut"),
        (["--prompts", "no/such.jsonl"], 2, "no/such.jsonl: cannot be read"),
        (["--prompts", "no/such.csv"], 2, "no/such.csv: is no kind of file"),
        ([*SHORT, "--text", "no/such.txt"], 2, "no/such.txt: cannot be read"),
        ([*SHORT, "--min-quality", "loops=0.1"], 2, "not asked for. Add --generate"),
        ([*SHORT, "--min-quality", "kl=0.1"], 2, "kl=0.1; expected a number for one of perplex"),
        ([*SHORT, "--min-quality", "cosine=0.1"], 1, "'cosine' is not measured of this model"),
    ],
)
def test_mistakes_get_one_clear_line(
    words: list[Any], code: int, message: str, packed: Path
) -> None:
    result = run(packed, *words)
    assert result.exit_code == code and message in result.stderr, result.output
    assert result.stderr.count("\n") == 1


def test_a_model_without_a_tokenizer_is_refused_in_one_line(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        if "tokenizer" not in path.name:
            shutil.copyfile(path, tmp_path / path.name)
    result = run(tmp_path, "--text", TEXT, "--generate")
    assert result.exit_code == 1 and "no tokenizer" in result.stderr
    assert result.stderr.count("\n") == 1
