"""An Ollama Modelfile says what the template of chats says, or that it does not."""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from ternarize.errors import FormatError, OutputError
from ternarize.publish.export.modelfile import chat_form, write_modelfile

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma: a message of the system stands in front of the user's first, blanks are cut off
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + "
    "'\n\n' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role "
    "}}\n{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
# a template of its own for the first message, as Qwen2.5 writes one for the system
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
LAST_ALONE = (
    "{% for m in messages %}{% if loop.revindex <= 2 %}[{{ m.role[0] }}]{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def chatty(template: str | None, begin: bool = False) -> Any:
    """A tokenizer with a template of chats, which may put a token in front of a text."""
    words = ["<bos>", "<eos>", "<|im_end|>", "<end_of_turn>", "a"]
    model = tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="a")
    tokenizer = tokenizers.Tokenizer(model)
    if begin:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    make: Any = transformers.PreTrainedTokenizerFast
    wrapped = make(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|im_end|>", "<end_of_turn>"],
    )
    wrapped.chat_template = template
    return wrapped


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """The few actions of Go's text/template that are written here, as its documentation has them.

    What Ollama gives it: all that the system says as .System, and every message.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    state = {"$before": "", ".System": system}
    at, out = 0, ""

    def block(dot: dict[str, str] | None, live: bool) -> None:
        """Run up to the end or the else of the block; dot is the message."""
        nonlocal at, out
        while at < len(pieces):
            text, action = pieces[at], pieces[at + 1] if at + 1 < len(pieces) else None
            out += text if live else ""
            if action is None or action == "end" or action.startswith("else"):
                return
            at += 2
            if action == "range .Messages":
                start = at
                for message in messages:
                    at = start
                    block(message, live)
                at += 2
            elif action.startswith("if "):
                branch(action, dot, live)
            elif ":=" in action or " = " in action:
                if live:
                    state["$before"] = eval(action.split("= ", 1)[1])  # a literal of both
            elif live:
                out += dot["content"] if action == ".Content" and dot else state[action]

    def branch(action: str | None, dot: dict[str, str] | None, live: bool) -> None:
        nonlocal at
        taken = False
        while action is not None and action != "end":
            test = action.removeprefix("else ").removeprefix("if ")
            role = re.fullmatch(r'eq .Role "(\w+)"', test)
            holds = bool(system) if role is None else dot is not None and dot["role"] == role[1]
            block(dot, live and holds and not taken)
            taken |= holds
            action = pieces[at + 1]
            at += 2

    block(None, True)
    return out


TALKS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "1 < 2?\n\nyes")],
    [("system", "Sit."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "Done.")],
]


@pytest.mark.parametrize(
    ("template", "begin"), [(CHATML, False), (DEFAULT + CHATML, False), (GEMMA, True)]
)
def test_a_template_says_what_the_tokenizers_says(
    tmp_path: Path, template: str, begin: bool
) -> None:
    tokenizer = chatty(template, begin)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [1, 3], "temperature": 0.7, "top_p": 0.9, "bos_token_id": 0}'
    )
    assert write_modelfile(tmp_path, tmp_path / "my model.gguf") == []
    text = (tmp_path / "my model.Modelfile").read_text()
    match = re.fullmatch(r'FROM ./my model.gguf\nTEMPLATE """(.*)"""\n(.*)', text, re.DOTALL)
    assert match
    for talk in TALKS:
        messages = [{"role": role, "content": content} for role, content in talk]
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=talk[-1][0] == "user"
        )
        if talk[-1][0] == "assistant":  # the engine goes on with what is begun
            prompt = prompt[: prompt.rindex(talk[-1][1]) + len(talk[-1][1])]
        assert run_go(match[1], messages) == prompt.removeprefix("<bos>" if begin else "")
    stops = ["<eos>", "<end_of_turn>"] + ["<|im_end|>"] * (not begin)
    assert match[2].splitlines() == [
        *(f'PARAMETER stop "{word}"' for word in stops),
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
    ]
    with pytest.raises(OutputError, match="expected a new file"):
        write_modelfile(tmp_path, tmp_path / "my model.gguf")
    (tmp_path / "generation_config.json").write_text("{oops")
    with pytest.raises(FormatError, match="generation_config.json: not valid JSON"):
        write_modelfile(tmp_path, tmp_path / "another.gguf")


@pytest.mark.parametrize(
    ("template", "begin", "note"),
    [
        (None, False, "has no template"),
        ("{{ strftime_now('%d') }}" + CHATML, False, "writes the date"),
        (LAST_ALONE, False, "does more than to stand around messages"),
        (CHATML, True, "does more than to stand around messages"),  # the engine's <bos> is not its
        (CHATML.replace("<|im_end|>", "\u200b"), False, "characters that a Modelfile cannot say"),
        # ...{{{ .System }} is no action of Go's
        (CHATML.replace("\n", "{{ '{' }}"), False, "characters that a Modelfile cannot say"),
        (CHATML.replace("<|im_end|>", "{{ '{' }}{"), False, "cannot say"),
    ],
)
def test_a_template_that_cannot_be_said_is_left_out_with_a_note(
    tmp_path: Path, template: str | None, begin: bool, note: str
) -> None:
    tokenizer = chatty(template, begin)
    assert chat_form(tokenizer)[0] is None
    tokenizer.save_pretrained(tmp_path)
    (said,) = write_modelfile(tmp_path, tmp_path / "m.gguf")
    assert note in said
    text = (tmp_path / "m.Modelfile").read_text()
    comment = said.removeprefix("the Modelfile has ")
    assert f"# {comment}\n" in text and 'PARAMETER stop "<eos>"' in text


def test_a_template_without_a_message_of_the_system_says_so() -> None:
    form, notes = chat_form(chatty(NO_SYSTEM))
    assert form is not None and form.system is None
    assert ".System" not in form.template() and "no message of the system" in notes[0]
