"""Conversations: what is said before counts, is read once, and is forgotten when it must be."""

import builtins
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_cli import run
from test_evaluate import word_tokenizer
from typer.testing import CliRunner, Result

from ternarize.cli import chat as command
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.errors import UsageError
from ternarize.plans.recipe import Recipe
from ternarize.runtime import generate as generating
from ternarize.runtime.chat import Conversation, Message, opening
from ternarize.runtime.decode import Decoder
from ternarize.runtime.generate import generate

TEMPLATE = (
    "{% for each in messages %}{{ 'w11' if each.role == 'assistant' else 'w9' }} "
    "{{ each.content }} w10 {% endfor %}w11"
)
ROLES = "{% for each in messages %}{% if each.role == 'system' %}{{ raise_exception('no') }}"
TURNS = ["w5 w6", "w7", "w8 w12 w13"]


def tokenizer_of(template: str = TEMPLATE) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def model_of(name: str, positions: int = 256) -> Any:
    """A tiny model that never ends by itself; the first of these goes through `Decoder`."""
    sizes = {} if name == "mamba" else {"max_position_embeddings": positions}
    model: Any = tiny_models.build(name, torch.float32, 0, **sizes)
    model.generation_config.eos_token_id = None
    model.train(False)
    return model


def talk(conversation: Conversation, turns: list[str], **options: Any) -> list[str]:
    return [conversation.answer(turn, max_new_tokens=6, **options).text for turn in turns]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba"])
@pytest.mark.parametrize("system", ["", "w14 w15"])
def test_an_answer_is_that_to_all_that_was_said(name: str, system: str) -> None:
    model = model_of(name)
    tokenizer = tokenizer_of()
    start = opening(tokenizer, system)
    answers = talk(Conversation(model, tokenizer, start), TURNS)
    said = list[Message](start)
    for turn, answer in zip(TURNS, answers, strict=True):
        said.append({"role": "user", "content": turn})
        assert answer == generate(model, tokenizer, said, max_new_tokens=6).text
        said.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_what_was_read_is_not_read_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of(name), list[int]()
    forward = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[1] if "input_ids" in kwargs else args[0].shape[1])
        return forward(self, *args, **kwargs)

    conversation = Conversation(model, tokenizer_of(), [])
    talk(conversation, TURNS)
    monkeypatch.setattr(type(model), "forward", counted)
    talk(conversation, ["w5"])
    assert isinstance(conversation.memory.state, Decoder) == (name == "llama")
    assert sum(seen) < 15  # an answer of 6 tokens, and the message; before were more than 30


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_that_the_model_s_settings_ask_for_is_left_to_them(cache: str) -> None:
    model, tokenizer = model_of("gemma3_text"), tokenizer_of()
    expected = talk(Conversation(model, tokenizer, []), TURNS)
    model.generation_config.cache_implementation = cache
    conversation = Conversation(model, tokenizer, [])
    assert talk(conversation, TURNS) == expected and not conversation.memory.ids


def test_a_new_beginning_forgets_all() -> None:
    conversation = Conversation(model_of("llama"), tokenizer_of(), [])
    first = talk(conversation, TURNS)
    conversation.clear()
    assert not conversation.memory.ids
    assert talk(conversation, TURNS) == first


def test_a_text_that_becomes_another_is_read_anew() -> None:
    model, tokenizer = model_of("llama"), tokenizer_of()
    memory = generating.Memory()
    for prompt in ("w5 w6 w7 w8", "w5 w6 w9", "w5 w6 w9 w10 w11", "w5", "w7 w8"):
        found = generate(model, tokenizer, prompt, max_new_tokens=5, memory=memory).text
        assert found == generate(model, tokenizer, prompt, max_new_tokens=5).text


def test_the_oldest_messages_are_forgotten_when_the_context_is_full() -> None:
    tokenizer, model = tokenizer_of(), model_of("llama", positions=64)
    start = opening(tokenizer, "w14 w15")
    conversation = Conversation(model, tokenizer, start)
    answers = [conversation.answer(f"w{20 + n}", max_new_tokens=8).text for n in range(12)]
    assert conversation.forgotten > 0 and len(conversation.said) < 24
    assert conversation.said[-2:] == [
        {"role": "user", "content": "w31"},
        {"role": "assistant", "content": answers[-1]},
    ]
    kept = [*start, *conversation.said[:-1]]
    assert generate(model, tokenizer, kept, max_new_tokens=8).text == answers[-1]


def test_a_message_that_is_too_long_is_refused_and_not_said() -> None:
    conversation = Conversation(model_of("llama", positions=64), tokenizer_of(), [])
    (first,) = talk(conversation, ["w5"])
    with pytest.raises(UsageError, match="at most the model's context of 64"):
        conversation.answer("w5 " * 70, max_new_tokens=4)
    assert [message["content"] for message in conversation.said] == ["w5", first]


def test_what_was_broken_off_is_said() -> None:
    tokenizer, model = tokenizer_of(), model_of("llama")
    conversation = Conversation(model, tokenizer, [])

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("w5", max_new_tokens=6, stream=stop)
    half = conversation.said[-1]["content"]
    assert half and len(half.split()) == 1
    (answer,) = talk(conversation, ["w7"])
    said = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": half}]
    said.append({"role": "user", "content": "w7"})
    assert answer == generate(model, tokenizer, said, max_new_tokens=6).text


def test_a_model_without_a_template_is_sent_to_generate() -> None:
    with pytest.raises(UsageError, match="no chat template.*ternarize generate"):
        opening(word_tokenizer(), "")
    with pytest.raises(UsageError, match="template fails .*no.*ternarize generate"):
        opening(tokenizer_of(ROLES + "{% endif %}{% endfor %}"), "w5")


def test_a_template_that_leaves_out_what_is_said_is_refused() -> None:
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %} w9"
    assert opening(tokenizer_of(users), "") == []
    with pytest.raises(UsageError, match="leaves the system message out"):
        opening(tokenizer_of(users), "w5")
    with pytest.raises(UsageError, match="leaves messages out"):
        opening(tokenizer_of(parts), "")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    model_of("llama").save_pretrained(folder / "source")
    tokenizer_of().save_pretrained(folder / "source")
    convert(folder / "source", folder / "packed", Recipe("absmean", 32))
    return folder / "packed"


def chat(packed: Path, said: bytes, *options: str) -> Result:
    given = ["chat", str(packed), "--max-new-tokens", "4", *options]
    return CliRunner().invoke(app, given, input=said)


def test_each_line_of_a_pipe_is_answered(packed: Path) -> None:
    found = chat(packed, b"w5\n\n  w6 \n/new\nw5\n/exit\nw7\n")
    assert found.exit_code == 0, found.output
    first, second, third = found.stdout.splitlines()
    assert first == third and first and second and ">" not in found.stdout
    assert found.stderr.count("4 tokens, ") == 3


def test_as_json_an_answer_is_an_object_on_a_line(packed: Path) -> None:
    found = chat(packed, b"w5\nw6", "--json", "--system", "w14")
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["w5", "w6"]
    assert all(row["new_tokens"] == 4 and row["forgotten"] == 0 and row["text"] for row in rows)


def test_what_is_no_text_or_too_long_is_one_line(packed: Path) -> None:
    assert "input: is not UTF-8; expected text." in chat(packed, b"w5\n\xff\xfe\n").stderr
    conversation = Conversation(model_of("llama"), tokenizer_of(), [])
    with pytest.raises(UnicodeEncodeError):  # what the C locale makes of such bytes
        conversation.answer("\udcff", max_new_tokens=2)
    found = chat(packed, b"w5 " * 300 + b"\n")
    assert found.exit_code == 2 and found.stderr.count("\n") == 1


def test_on_a_terminal_ctrl_c_ends_an_answer_and_errors_end_nothing(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["w5", "w6 " * 300, "w7"])
    answer: Callable[..., Any] = Conversation.answer
    stops = iter([True, False, False])

    def typed(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    def broken(self: Conversation, text: str, **options: Any) -> Any:
        if next(stops):
            raise KeyboardInterrupt
        return answer(self, text, **options)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(Conversation, "answer", broken)
    command.chat_command(str(packed), max_new_tokens=4)
    printed = capsys.readouterr()
    assert "context of 256" in printed.err and printed.err.count("4 tokens, ") == 1


def test_help_says_how_it_ends() -> None:
    assert "/exit" in run("chat", "--help").stdout
