"""An Ollama Modelfile beside a GGUF file: FROM, TEMPLATE, PARAMETER.

A template of chats is a program in Jinja's language, TEMPLATE one in Go's. None is translated: the
template is asked what it writes for a conversation, of which only five pieces of text can remain,

    first U between A again U between A ...     without a message of the system
    system S turn U between A again U ...       with one

(S, U, A: what the system, the user and the assistant say), and those are the TEMPLATE. It is
written if it gives, for every conversation of `_asked`, exactly what the template does, and is left
out, in one line that says why, where it does not: for templates that look at the date, or do more
than to stand around messages. Nothing in those conversations has blanks at its ends, which many
templates cut off.

https://docs.ollama.com/modelfile; its template.go and parser.go say what is run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ternarize.errors import OutputError
from ternarize.files.json_files import read_json
from ternarize.models.reads import open_tokenizer

# a key of generation_config.json -> the parameter
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_S, _U, _A, _V = "Speak plainly.", "What is 1 + 1?", "It is 2,\n\nI think.", "Why?"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatForm:
    """What a template writes around what is said; see above. system is None where it takes none."""

    first: str
    between: str
    again: str
    system: str | None
    turn: str

    def render(self, messages: Messages) -> str:
        """A conversation as TEMPLATE writes it, restated."""
        text, before = "", self.first
        for message in messages:
            if message["role"] == "system":
                text, before = f"{self.system}{message['content']}", self.turn
            elif message["role"] == "user":
                text += before + message["content"] + self.between
            else:
                text, before = text + message["content"], self.again
        return text

    def template(self) -> str:
        """The same in the language of Go's text/template, with the variables of Ollama."""
        first, again, turn = (
            json.dumps(each, ensure_ascii=False) for each in (self.first, self.again, self.turn)
        )
        parts = ["{{ $before := ", first, " }}"]
        if self.system is not None:
            parts += ["{{ if .System }}", self.system, "{{ .System }}{{ $before = ", turn]
            parts += [" }}{{ end }}"]
        parts += ['{{ range .Messages }}{{ if eq .Role "user" }}{{ $before }}{{ .Content }}']
        parts += [self.between, '{{ else if eq .Role "assistant" }}{{ .Content }}{{ $before = ']
        parts += [again, " }}{{ end }}{{ end }}"]
        return "".join(parts)


def modelfile_of(gguf_file: Path) -> Path:
    """Where the Modelfile of a GGUF file is put."""
    return gguf_file.with_suffix(".Modelfile")


def write_modelfile(directory: Path, gguf_file: Path) -> list[str]:
    """Write NAME.Modelfile beside NAME.gguf; for `ollama create NAME -f NAME.Modelfile`.

    directory  of the packed checkpoint: its tokenizer and generation_config.json are asked

    Returns notes: what of the template could not be said. Raises OutputError where the name is
    taken or cannot be written, FormatError for a generation_config.json that is none.
    """
    tokenizer = open_tokenizer(directory)
    form, notes = chat_form(tokenizer)
    lines = [f"FROM ./{gguf_file.name}"]
    if form is not None:
        lines.append(f'TEMPLATE """{form.template()}"""')
    else:
        lines.append(f"# no TEMPLATE: {notes[0]}")
        notes = [f"the Modelfile has no TEMPLATE: {notes[0]}"]
    settings = _settings(directory)
    lines += [f'PARAMETER stop "{word}"' for word in _stops(tokenizer, settings, form)]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(settings)]
    path = modelfile_of(gguf_file)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise OutputError(
            path,
            f"cannot be written ({error.strerror or error})",
            "a new file",
            "Move what has its name away; the GGUF file is complete",
        ) from None
    return notes


def chat_form(tokenizer: Any) -> tuple[ChatForm | None, list[str]]:
    """What a tokenizer's template of chats writes around messages; None where TEMPLATE cannot.

    Returns notes as well, in words: why there is none, or that it takes no message of the system.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None, ["the tokenizer has no template of chats"]
    if "strftime_now" in template:
        return None, ["the template of chats writes the date"]
    bos = tokenizer.bos_token
    # then the engine puts it in front, and the template must have done so, once
    engine = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def write(messages: Messages) -> str | None:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
            )
        except Exception:  # whatever a template raises: it has no such conversation
            return None
        if not engine:
            return str(text)
        return str(text)[len(bos) :] if str(text).startswith(bos) else None

    form = _pieces(write)
    notes = []
    if form is not None and form.system is None:
        notes = ["its template of chats takes no message of the system: SYSTEM is left out"]
    written = form is not None and all(
        text == form.render(messages) for messages, text in _asked(write, form)
    )
    if form is None or not written:
        return None, ["the template of chats does more than to stand around messages"]
    if not all(map(_plain, (form.first, form.between, form.again, form.system or "", form.turn))):
        return None, ["the template of chats has characters that a Modelfile cannot say"]
    return form, notes


def _said(*pairs: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in pairs]


def _pieces(write: Any) -> ChatForm | None:
    """The form that the shortest conversations have, if any."""
    user, reply, more = ("user", _U), ("assistant", _A), ("user", _V)
    once, thrice = write(_said(user)), write(_said(user, reply, more))
    if once is None or thrice is None or once.count(_U) != 1:
        return None
    first, between = once.split(_U)
    middle = thrice.removeprefix(first + _U + between + _A)
    if middle == thrice or not middle.endswith(_V + between):
        return None
    again = middle.removesuffix(_V + between)
    told = write(_said(("system", _S), user))
    if told is None or told.count(_S) != 1 or not told.endswith(_U + between):
        return ChatForm(first, between, again, None, "")
    system, turn = told.removesuffix(_U + between).split(_S)
    return ChatForm(first, between, again, system, turn)


def _asked(write: Any, form: ChatForm) -> list[tuple[Messages, str | None]]:
    """Conversations, and what the template writes for them."""
    words = ["Hello", "Hi! {{ x }}", "3 < 4 & <b>", "line\n\n- item\n", "ünïcode 你好", "a"]
    words = [word.strip() for word in words]
    found = []
    for count in (1, 3, 5):
        roles = [("user", "assistant")[at % 2] for at in range(count)]
        talk = _said(*zip(roles, words, strict=False))
        found.append(talk)
        if form.system is not None:
            found.append(_said(("system", "Be brief.\nAlways.")) + talk)
    return [(messages, write(messages)) for messages in found]


def _plain(text: str) -> bool:
    """Whether a Modelfile, and Go's templates, keep a text as it is."""
    printable = all(each.isprintable() or each in "\n\t" for each in text)
    # with a brace at the end, the ones that follow it would begin earlier
    return printable and not any(each in text for each in ("{{", '"""')) and text[-1:] != "{"


def _settings(directory: Path) -> dict[str, Any]:
    return read_json(directory / "generation_config.json") or {}


def _stops(tokenizer: Any, settings: dict[str, Any], form: ChatForm | None) -> list[str]:
    """Words that end an answer: ends of a text, and the token that the template writes there."""
    ends = settings.get("eos_token_id", [])
    numbers: Sequence[Any] = ends if isinstance(ends, list) else [ends]
    words = [tokenizer.eos_token]
    words += [tokenizer.convert_ids_to_tokens(each) for each in numbers if type(each) is int]
    if form is not None:
        special = tokenizer.all_special_tokens
        words += [word for word in special if form.again.lstrip().startswith(word)]
    return [word for word in dict.fromkeys(words) if word and _plain(word) and '"' not in word]


def _parameters(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """What generation_config.json says of how tokens are drawn; nothing that it does not say."""
    if settings.get("do_sample") is False:
        return [("temperature", 0)]
    named = [(ours, settings.get(theirs)) for theirs, ours in _PARAMETERS.items()]
    return [(name, value) for name, value in named if type(value) in (int, float)]
