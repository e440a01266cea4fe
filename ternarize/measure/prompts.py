"""What a model is to write after: the first tokens of documents, or the prompts of a file.

A file of prompts is text (.txt), a prompt a line, or JSON lines (.jsonl), an object a line:

    {"prompt": "The capital of France is", "answer": "Paris"}
    {"messages": [{"role": "user", "content": "What is 6 times 7?"}], "answer": ["42", "forty-two"]}

`messages` go through the tokenizer's chat template, up to where the model's turn begins. `answer`
may be left out; of a list any one is right.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ternarize.errors import UsageError, first_line
from ternarize.measure.documents import reading
from ternarize.models.reads import beginning, frame
from ternarize.runtime.generate import encode_chat

EXPECTED = "an object with either `prompt` or `messages`"


class Prompt(NamedTuple):
    """What a model is to write after.

    ids      token ids, with what the tokenizer or its chat template puts in front
    text     without that; of a chat its last message
    where    the text it was cut from, or the line of the file
    answers  of which any is right; none where none is known
    chat     whether it is a chat, and the model's turn
    """

    ids: list[int]
    text: str
    where: str
    answers: tuple[str, ...] = ()
    chat: bool = False


def cut_prompts(
    documents: Sequence[str], tokenizer: Any, number: int, length: int, *, where: str = "text"
) -> list[Prompt]:
    """The first `length` tokens of documents that go on after them, at most `number`.

    The documents are divided into `number` stretches, and the first that is long enough is taken
    of each, so that prompts come from all of a text. Where there are fewer documents than that,
    paragraphs (parted by empty lines) take their place.

    Raises UsageError when none is long enough.
    """
    begin = beginning(tokenizer)
    pieces = list(documents)
    if len(pieces) < number:
        parts = (part.strip() for each in documents for part in re.split(r"\n\s*\n", each))
        pieces = [part for part in parts if part]
    prompts: list[Prompt] = []
    for at in range(number):
        for piece in pieces[at * len(pieces) // number : (at + 1) * len(pieces) // number]:
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > length:
                text = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
                prompts.append(Prompt(begin + ids[:length], text, where))
                break
    if not prompts:
        raise UsageError(
            where,
            f"none of {len(pieces)} documents or paragraphs is longer than a prompt",
            f"one of more than {length} tokens",
            "Use shorter prompts (--prompt-tokens), or give a longer text",
        )
    return prompts


def read_prompts(path: str | Path, tokenizer: Any, number: int | None = None) -> list[Prompt]:
    """The prompts of a file, or the first `number` of them.

    Raises UsageError when the file cannot be read, has none, or a line is none.
    """
    suffix = Path(path).suffix
    if suffix not in (".txt", ".jsonl"):
        raise UsageError(
            path,
            "is no kind of file that prompts are read from",
            ".txt (a prompt a line) or .jsonl (an object a line)",
            "Convert it, or give it the ending of what it is",
        )
    with reading(path, "a file of prompts"):
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    read = _of_json if suffix == ".jsonl" else _of_text
    found = [(at, line.rstrip("\r")) for at, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError(path, "has no prompt", "at least one line", "Check the file")
    return [read(line, tokenizer, f"{path}: line {at}") for at, line in found[:number]]


def _of_text(text: str, tokenizer: Any, where: str, answers: tuple[str, ...] = ()) -> Prompt:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(frame(tokenizer).prefix + ids, text, where, answers)


def _of_json(line: str, tokenizer: Any, where: str) -> Prompt:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        found = "has half a surrogate pair"
        raise UsageError(where, found, "Unicode text", "Repair it") from None
    except (ValueError, RecursionError) as error:
        found = f"is not JSON ({first_line(error)})"
        raise UsageError(where, found, EXPECTED, "Repair it") from None
    names = [name for name in ("prompt", "messages") if isinstance(row, dict) and name in row]
    if len(names) != 1:
        has = " and ".join(names) or ", ".join(list(row)[:8]) if isinstance(row, dict) else line
        raise UsageError(where, f"has {has[:60] or 'nothing'}", EXPECTED, "Repair it")
    answers = _answers(row.get("answer"), where)
    if names == ["messages"]:
        return _of_messages(row["messages"], tokenizer, where, answers)
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise UsageError(f"{where}, prompt", f"is {str(row['prompt'])[:60]!r}", "a text")
    return _of_text(row["prompt"], tokenizer, where, answers)


def _of_messages(messages: Any, tokenizer: Any, where: str, answers: tuple[str, ...]) -> Prompt:
    rows = messages if isinstance(messages, list) else [messages]
    for row in rows or [None]:
        if not isinstance(row, dict) or not isinstance(row.get("role"), str):
            found = f"a message is {str(row)[:60]!r}"
            raise UsageError(where, found, "objects with `role` and `content`", "Repair it")
    if rows[-1]["role"] == "assistant":
        raise UsageError(
            where,
            "ends with the assistant's turn",
            "the turn before it, after which the model is to write",
            "Put what it should say into `answer`",
        )
    ids = encode_chat(tokenizer, rows, where, "Give `prompt` in place of `messages`")
    return Prompt(ids, str(rows[-1].get("content", "")), where, answers, chat=True)


def _answers(value: Any, where: str) -> tuple[str, ...]:
    """The right answers of a line: none, one, or a list of them."""
    answers = [] if value is None else value if isinstance(value, list) else [value]
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            found, expected = f"is {str(answer)[:60]!r}", "a text, or a list of texts"
            raise UsageError(f"{where}, answer", found, expected, "Repair it")
    return tuple(answers)
