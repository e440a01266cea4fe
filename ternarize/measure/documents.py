"""A text as documents, and documents as windows of tokens.

A text is split into documents at lines `<|doc|>`; each begins with what the tokenizer itself puts
in front of a text (its prefix: Gemma's `<bos>`; where it puts nothing, with the bos token, or eos
where there is none); all are joined and cut into windows of `seq_len` tokens without overlap, and
what is left over at the end is not used. Every window begins with the prefix: one that begins in
the midst of a document has it in front of the next seq_len - len(prefix) tokens, one that begins
with a document has its own. A model that parks its attention on the first token is not itself
without it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UsageError, first_line
from ternarize.models.reads import beginning, check_room, frame

SEPARATOR = "<|doc|>"
DEFAULT = "default"  # the text that comes with the package, in place of a file


def own_text() -> Path:
    """The text that comes with the package, to calibrate on and to measure with."""
    return Path(__file__).with_name("default.txt")


@contextmanager
def reading(where: object, expected: str) -> Iterator[None]:
    """UsageError for a file that cannot be read, or for bytes that are not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is not UTF-8"
        raise UsageError(where, found, expected, "Convert it to UTF-8") from None
    except OSError as error:
        found = f"cannot be read ({error.strerror or first_line(error)})"
        raise UsageError(where, found, expected, "Check the path") from None


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file: what stands between lines `<|doc|>`, without empty ones.

    The line break before a separator belongs to it. Raises UsageError when the file cannot be read
    as UTF-8.
    """
    return [text for text, _ in stream_documents(path)]


def stream_documents(path: str | Path, largest: int | None = None) -> Iterator[tuple[str, bool]]:
    """The same, one by one, and whether a document begins with the text.

    largest  characters, from which on a document is cut, at a blank line if one comes in time: no
             more than some times as much of a file is in memory. None: documents stay whole
    """
    lines: list[str] = []
    size, begins, in_line = 0, True, False
    with reading(path, "a text file"), Path(path).expanduser().open(encoding="utf-8") as file:
        for line in _lines(file, largest):
            ends = not in_line and line.removesuffix("\n") == SEPARATOR
            in_line = not line.endswith("\n")
            if not ends:
                lines.append(line)
                size += len(line)
                if largest is None or size < (largest if line == "\n" else 2 * largest):
                    continue
            text = "".join(lines)
            text = text.removesuffix("\n") if ends else text
            at = text.rfind(" ") + 1 if in_line else 0  # of a long line, behind a whole word
            text, rest = (text[:at], text[at:]) if at else (text, "")
            if text.strip():
                yield text, begins
            begins = ends or (begins and not text.strip())
            lines, size = [rest], len(rest)
    if (text := "".join(lines)).strip():
        yield text, begins


def _lines(file: Any, longest: int | None) -> Iterator[str]:
    """The lines of a text file, long ones in parts; errors of decoding have the file's byte."""
    try:
        most = -1 if longest is None else max(longest, len(SEPARATOR) + 1)
        while line := file.readline(most):
            yield line
    except UnicodeDecodeError as error:
        error.start += file.buffer.tell() - len(error.object)
        raise


def cut_windows(
    documents: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    max_tokens: int | None = None,
    *,
    where: str = "text",
) -> Tensor:
    """Tokenize documents and cut them into (windows, seq_len) token ids, int64.

    max_tokens  of the joined documents that are used; what is put in front of windows is not among
                them

    Raises UsageError when there are too few tokens for one window.
    """
    begin, prefix = beginning(tokenizer), frame(tokenizer).prefix
    ids: list[int] = []
    for document in documents:
        ids += begin
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    ids = ids[:max_tokens]
    windows = cut(ids, prefix, seq_len)
    if not windows:
        raise UsageError(
            where,
            f"{len(ids)} tokens are used",
            f"at least one window of {seq_len}",
            "Give a longer text or more tokens, or use shorter windows (--seq-len)",
        )
    return torch.tensor(windows, dtype=torch.int64)


def cut(ids: Sequence[int], prefix: Sequence[int], seq_len: int) -> list[list[int]]:
    """Cut joined documents into windows of seq_len tokens, each of which begins with `prefix`.

    Every token is in one window, in order, but for what is left over at the end. Where the next
    token belongs to a prefix that stands in the text, the window begins with that one alone.

    Example: cut([1, 5, 6, 7, 1, 8, 9], [1], 3) -> [[1, 5, 6], [1, 7, 1], [1, 8, 9]]

    Raises UsageError when a window has no room for more than the prefix.
    """
    check_room(seq_len, prefix)
    own, at = len(prefix), 0
    windows: list[list[int]] = []
    while True:
        for before in range(own):  # tokens of a standing prefix that the last window has
            start = at - before
            if start >= 0 and list(ids[start : start + own]) == list(prefix):
                at = start + own
                break
        if len(ids) - at < seq_len - own:
            return windows
        windows.append([*prefix, *ids[at : at + seq_len - own]])
        at += seq_len - own
