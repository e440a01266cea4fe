"""Documents to calibrate on: of a file, a directory, the Hub, or the text of the package.

Documents are taken in the order of SHA-256(seed, document): a shuffle that depends on the seed and
the text, not on the order of files or the number of documents. The first of them in that order are
kept while the rest streams by, so that a large file needs no more memory than what is drawn from
it. Equal documents count once.

Plain text is never put into a chat template; `messages` always are, since a chat model sees its
turns in no other form. Such a document begins as the template says, and a window that begins with
one has nothing twice.
"""

import hashlib
import heapq
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ternarize.errors import UsageError, first_line
from ternarize.measure.documents import DEFAULT, own_text, read_documents, reading, stream_documents
from ternarize.plans.recipe import Calibrate

SELF = "self"  # and DEFAULT: data sets of their own
# Characters kept of a text: enough documents to spread the samples over, and no more to tokenize.
MIN_POOL = 8 << 20
POOL_PER_TOKEN = 32


class Document(NamedTuple):
    """A text.

    begin    it begins as documents do; chat templates write their own beginning
    answers  of a chat: from which character to which the assistant's turns go; None: no chat
    """

    text: str
    begin: bool = True
    answers: tuple[tuple[int, int], ...] | None = None


class Texts(NamedTuple):
    """Documents in the order of their digests, and how the record calls them."""

    documents: list[Document]
    name: str
    files: list[str]
    notes: list[str]


class Opened(NamedTuple):
    """Documents as they stream by, how the record calls them, and what is read of them."""

    stream: Iterator[Document]
    name: str
    files: list[str]
    notes: list[str]


# (text, column, seed, tokenizer, pool) -> one pass over it
Open = Callable[[str, str | None, int, Any, int], Opened]


def read_texts(calibration: Calibrate, seq_len: int, tokenizer: Any, open_them: Open) -> Texts:
    """Documents of a file, a directory, a Hub dataset or the package's own text.

    open_them  `open_texts`, or what takes its place

    Raises UsageError when they cannot be read or there are none.
    """
    pool = max(MIN_POOL, POOL_PER_TOKEN * calibration.num_samples * seq_len)
    given = calibration.dataset
    opened = open_them(given, calibration.text_column, calibration.seed, tokenizer, pool)
    documents, empty = draw(opened.stream, calibration.seed, pool)
    if empty:
        opened.notes.append(f"{empty} records without text were left out")
    if not documents:
        raise UsageError(given, "has no text", "documents to calibrate on", "Check the file")
    return Texts(documents, opened.name, opened.files, opened.notes)


def open_texts(
    given: str, column: str | None, seed: int, tokenizer: Any, pool: int, largest: int | None = None
) -> Opened:
    """One pass over the documents of a file, a directory, a Hub dataset or the package's own text.

    column   of tables
    seed     of the order of the files of a Hub dataset
    pool     characters after which no further file of a Hub dataset is fetched
    largest  characters of a document of a .txt file, from which on it is cut; None: never

    Raises UsageError when they cannot be read.
    """
    path = Path(os.path.expanduser(given))
    files: list[str] = []
    notes: list[str] = []
    if given == DEFAULT:
        check_no_column(column, given)
        name = DEFAULT
        stream: Iterator[Document] = map(Document, read_documents(own_text()))
    elif os.path.isdir(path):
        name = path.resolve().name
        paths, others = _list_files(path)
        if not paths:
            kinds = ", ".join(READERS_OF_TEXT)
            raise UsageError(
                given, f"holds no {kinds} file", "some text", "Name a file, or another directory"
            )
        if others:
            notes.append(f"{others} files of other kinds than text were not read")
        stream = (each for one in paths for each in _read_file(one, column, tokenizer, largest))
        files = [one.relative_to(path).as_posix() for one in paths]
    elif os.path.exists(path):
        name = path.name
        stream = _read_file(path, column, tokenizer, largest)
    else:
        read = partial(_read_file, column=column, tokenizer=tokenizer, largest=largest)
        name, stream = _read_hub(given, seed, pool, files, read)
    return Opened(stream, name, files, notes)


def check_no_column(column: str | None, where: object) -> None:
    """Raise UsageError where a column is named of what has none."""
    if column is not None:
        found = f"{column!r}, and {where} has text without columns"
        raise UsageError("text column", found, "none", "Leave --text-column out")


def draw(stream: Iterable[Document], seed: int, pool: int) -> tuple[list[Document], int]:
    """The first documents in the order of SHA-256(seed, document), and how many were empty.

    As few as hold `pool` characters; equal documents once. One that was dropped cannot come back:
    those kept before it hold enough, and only come earlier in the order as the stream goes on.
    """
    kept: dict[int, Document] = {}
    last: list[int] = []  # heap of negated keys: the last in the order on top
    total = empty = 0
    for document in stream:
        if not document.text.strip():
            empty += 1
            continue
        head = f"{seed}\n{document.begin:d}\n"
        raw = hashlib.sha256((head + document.text).encode()).digest()
        key = int.from_bytes(raw, "big")
        if key in kept:
            continue
        kept[key] = document
        heapq.heappush(last, -key)
        total += len(document.text)
        while total - len(kept[-last[0]].text) >= pool:
            total -= len(kept.pop(-heapq.heappop(last)).text)
    return [kept[key] for key in sorted(kept)], empty


# --- files --------------------------------------------------------------------------------------


def _list_files(directory: Path) -> tuple[list[Path], int]:
    """Text files below a directory, sorted by name, and how many others there are."""
    paths: list[Path] = []
    others = 0
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = [Path(folder, name) for name in names if Path(name).suffix in READERS_OF_TEXT]
        paths += found
        others += len(names) - len(found)
    return sorted(paths, key=lambda path: path.relative_to(directory).as_posix()), others


def _read_file(
    path: Path, column: str | None, tokenizer: Any, largest: int | None
) -> Iterator[Document]:
    reader = READERS_OF_TEXT.get(path.suffix)
    if reader is None:
        raise UsageError(
            path,
            "is no kind of file that can be read",
            f"{', '.join(READERS_OF_TEXT)} or .safetensors",
            "Convert it, or give it the ending of what it is",
        )
    return reader(path, column, tokenizer, largest)


def _read_txt(
    path: Path, column: str | None, tokenizer: Any, largest: int | None
) -> Iterator[Document]:
    check_no_column(column, path)
    number = 0
    for text, begins in stream_documents(path, largest):
        number += begins
        if "\0" in text:  # valid UTF-8, but no text file has one
            found = f"document {number} has NUL characters"
            raise UsageError(path, found, "a text file", "Name another file")
        yield Document(text, begins)


_MARK = b"\xef\xbb\xbf"  # byte order mark


def _read_jsonl(
    path: Path, column: str | None, tokenizer: Any, _: int | None
) -> Iterator[Document]:
    with reading(path, "a file of text"), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_MARK)
            if line.strip():
                where = f"{path}: line {number}"
                yield _of_row(_parse(line, where), column, tokenizer, where)


def _read_json(path: Path, column: str | None, tokenizer: Any, _: int | None) -> Iterator[Document]:
    with reading(path, "a file of text"):
        raw = path.read_bytes().removeprefix(_MARK)
    rows = _parse(raw, path)
    if not isinstance(rows, list):
        raise UsageError(
            path,
            f"holds {_in_words(rows)}",
            "a list of strings, or of objects with `text` or `messages`",
            "One object per line is a .jsonl file: name it so",
        )
    for number, row in enumerate(rows, 1):
        where = f"{path}: entry {number}"
        alone = isinstance(row, str)
        yield _of_value(row, tokenizer, where) if alone else _of_row(row, column, tokenizer, where)


def _read_parquet(
    path: Path, column: str | None, tokenizer: Any, _: int | None
) -> Iterator[Document]:
    try:
        arrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise UsageError(
            path,
            "parquet files are read with pyarrow, which is not installed",
            "it",
            "Run pip install 'ternarize[data]'",
        ) from None
    number = 0
    with reading(path, "a file of text"), path.open("rb") as raw:
        try:
            file = parquet.ParquetFile(raw)
            chosen = _column(list(file.schema_arrow.names), column, path)
            for rows in file.iter_batches(batch_size=1024, columns=[chosen]):
                for value in rows.column(0).to_pylist():
                    number += 1
                    yield _of_value(value, tokenizer, f"{path}: row {number}, {chosen}")
        except (arrow.lib.ArrowException, OSError) as error:  # thrift's errors are OSErrors
            found = f"pyarrow cannot read it ({first_line(error)})"
            raise UsageError(path, found, "a parquet file", "Repair it, or name another") from None


# (path, column that was named, tokenizer, characters from which on a .txt is cut) -> documents
READERS_OF_TEXT: dict[str, Callable[[Path, str | None, Any, int | None], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _parse(raw: bytes, where: object) -> Any:
    with reading(where, "JSON in UTF-8"):
        text = raw.decode("utf-8")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = f"is not JSON ({first_line(error)})"
        raise UsageError(where, found, "a JSON value", "Repair it") from None


# --- documents of rows --------------------------------------------------------------------------


def _of_row(row: Any, column: str | None, tokenizer: Any, where: str) -> Document:
    """The document in a row of a table."""
    if not isinstance(row, dict):
        found, expected = f"is {_in_words(row)}", "an object with `text` or `messages`"
        raise UsageError(where, found, expected, "Repair it")
    chosen = _column(list(row), column, where)
    return _of_value(row[chosen], tokenizer, f"{where}, {chosen}")


def _column(names: list[str], column: str | None, where: object) -> str:
    """The column that holds the text: the one that was named, or `text` or `messages`."""
    there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if column is not None:
        if column not in names:
            found = f"has no column {column!r} but {there or 'none'}"
            raise UsageError(where, found, "the one that --text-column names", "Name another")
        return column
    usual = [name for name in ("text", "messages") if name in names]
    if len(usual) != 1:
        raise UsageError(
            where,
            f"has {' and '.join(usual) or there or 'no columns'}",
            "either `text` or `messages`",
            "Name the column with --text-column",
        )
    return usual[0]


def _of_value(value: Any, tokenizer: Any, where: str) -> Document:
    """A string as it is, a list of messages through the chat template, null as no text."""
    document = Document("" if value is None else value)
    if isinstance(value, list):
        text = _render(value, tokenizer, where)
        document = Document(text, False, _answers(value, text, tokenizer))
    elif value is not None and not isinstance(value, str):
        raise UsageError(
            where,
            f"is {_in_words(value)}",
            "a text, or a list of messages",
            "Name another column with --text-column, or repair the data",
        )
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is half a surrogate pair"
        raise UsageError(where, found, "Unicode text", "Repair the data") from None
    return document


def _render(messages: list[Any], tokenizer: Any, where: str) -> str:
    """Messages as the tokenizer's chat template writes them."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            found = f"a message is {str(message)[:60]!r}"
            raise UsageError(where, found, "objects with `role` and `content`", "Repair the data")
    if not messages:
        return ""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            where,
            "holds messages, and the tokenizer has no chat template",
            "one that puts them into the model's form",
            "Use plain text (--text-column), or the tokenizer of a chat model",
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise UsageError(
            where,
            f"the tokenizer's chat template refuses the messages ({first_line(error)})",
            "roles and contents that it knows",
            "Repair the data",
        ) from error
    return text


def _answers(messages: list[Any], text: str, tokenizer: Any) -> tuple[tuple[int, int], ...]:
    """Where the assistant's turns stand in a rendered chat.

    A turn is what its message adds behind the template's words for "your turn". None, where a
    template writes the beginning of a chat otherwise when more follows: then nothing is sure.
    """
    found = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = tokenizer.apply_chat_template(
                messages[:at], tokenize=False, add_generation_prompt=True
            )
            after = tokenizer.apply_chat_template(messages[: at + 1], tokenize=False)
        except Exception:  # a template that wants whole chats; it has rendered this one
            return ()
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            return ()
        found.append((len(before), len(after)))
    return tuple(found)


def _in_words(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


# --- the Hub ------------------------------------------------------------------------------------


def _read_hub(
    given: str, seed: int, pool: int, files: list[str], read: Callable[[Path], Iterator[Document]]
) -> tuple[str, Iterator[Document]]:
    """Name with revision, and documents of a Hub dataset; `files` receives what is read.

    read  a file's documents

    Files come in an order that the seed shuffles, and no more of them than hold `pool` characters:
    datasets can be larger than any disk.
    """
    import huggingface_hub  # slow to import, and needed for Hub ids only
    from huggingface_hub.errors import OfflineModeIsEnabled

    whole, _, revision = given.partition("@")
    match = re.fullmatch(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)((?:/[\w.-]+)*)/?", whole)
    if match is None or Path(whole).suffix in READERS_OF_TEXT:
        raise UsageError(
            given,
            "no such file",
            f"a file or directory of text, a Hub dataset id (user/name), {SELF} or {DEFAULT}",
            "Check the path",
        )
    repo, folder = match[1], match[2].strip("/")
    api = huggingface_hub.HfApi()
    with _asking(given):
        try:
            info = api.dataset_info(repo, revision=revision or None)
            commit, names = info.sha, [each.rfilename for each in info.siblings or []]
        except OfflineModeIsEnabled:  # what an earlier run has left in the cache
            root = huggingface_hub.snapshot_download(
                repo, repo_type="dataset", revision=revision or None, local_files_only=True
            )
            there = [path for path in Path(root).rglob("*") if path.is_file()]
            commit = Path(root).name
            names = [path.relative_to(root).as_posix() for path in there]
    chosen = _hub_files(names, folder, given)

    def order(name: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{name}".encode()).digest()

    def stream() -> Iterator[Document]:
        total = 0
        for name in sorted(chosen, key=order):
            if total >= pool:
                return
            with _asking(given):
                path = api.hf_hub_download(repo, name, repo_type="dataset", revision=commit)
            files.append(name)
            for document in read(Path(path)):
                total += len(document.text)
                yield document

    return f"{repo}{f'/{folder}' if folder else ''}@{commit}", stream()


@contextmanager
def _asking(given: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            given,
            f"no such file, and the Hub did not give it as a dataset ({type(error).__name__}: "
            f"{first_line(error)})",
            remedy="Check the name, the network and your token",
        ) from None


def _hub_files(names: list[str], folder: str, given: str) -> list[str]:
    """The files of a Hub dataset that hold its training text; raises UsageError when in doubt."""
    inside = [name for name in names if not folder or f"/{name}".startswith(f"/{folder}/")]
    for suffix in (".parquet", ".jsonl", ".txt", ".json"):  # .json is often about the data
        found = [name for name in inside if Path(name).suffix == suffix]
        if found:
            break
    else:
        raise UsageError(
            given,
            f"{len(inside)} files, none of them {', '.join(READERS_OF_TEXT)}",
            "text in one of these forms",
            "Download it and convert it",
        )
    # evaluation must not be calibrated on, so other splits are left alone where there is this one
    found = [name for name in found if "train" in name] or found
    folders = sorted({os.path.dirname(name) for name in found})
    if len(folders) > 1:
        listed = ", ".join(folders[:6]) + (", ..." if len(folders) > 6 else "")
        what = f"text in {len(folders)} folders ({listed})"
        raise UsageError(given, what, "one", "Name it: user/name/folder")
    return found
