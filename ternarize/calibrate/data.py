"""The samples on which a model is calibrated, from a file, the Hub, or the model itself.

What calibration sees decides what survives it, so three things are kept apart from the start. The
samples are split by document into `batches` (they make the statistics), `heldout` (they choose
between results: damping, when to stop) and `report` (they give the figures that are printed, and
choose nothing), about 8 : 1 : 1. A document is in one set only, and equal documents count once. A
text of too few documents for that is cut at blank lines into sections, which is said in the notes.

Documents are taken in the order of SHA-256(seed, document): a shuffle that depends on the seed and
the text, not on the order of files or the number of documents. The first of them in that order are
kept while the rest streams by, so that a large file needs no more memory than what is drawn from
it. Samples are then spread evenly over the documents of a set, one at a random place in each of
`num_samples` equal stretches. Random numbers come from Python's Mersenne Twister, which all
platforms share. So the same file, seed and tokenizer give the same samples in any process.

A sample is what the model was made for, told by the arguments of its `forward`:

    causal language model   a window of seq_len tokens, cut out of joined documents as in
                            ternarize.evaluate: documents and windows begin with what the tokenizer
                            itself puts in front of a text
    encoder                 a text of 8 to seq_len tokens between the tokenizer's special tokens:
                            whole sentences, as many as fit a length drawn log-uniformly, because
                            encoders meet single sentences as often as paragraphs. Padding has
                            attention_mask 0
    encoder-decoder         a window for the encoder between the tokenizer's special tokens, and
                            the tokens that follow it for the decoder, behind those that the
                            tokenizer puts in front, shifted right behind decoder_start_token_id
    any other               rows of tensors from a .safetensors file, named as forward names them

Plain text is never put into a chat template; `messages` always are, since a chat model sees its
turns in no other form. Such a document begins as the template says, and a window that begins with
one has nothing twice.

A model that writes its own text ("self") is calibrated on the distribution that it will produce
when it is used, and needs no data: Data-Free QAT in LLM-QAT, section 2.1,
https://arxiv.org/abs/2305.17888. Half of these samples begin with what the tokenizer puts in front
of a text alone (with bos, where that is nothing), half with a random token behind it, without which
an instruction model opens all texts alike.
"""

import hashlib
import heapq
import importlib
import inspect
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError, first_line
from ternarize.files.headers import byte_view
from ternarize.measure.evaluate import (
    CAUSAL,
    DEFAULT,
    ENCODER,
    beginning,
    check_room,
    check_seq_len,
    cut,
    encode_line,
    frame,
    longest_text,
    max_positions,
    names_of,
    own_text,
    read_documents,
    vocabulary_size,
)
from ternarize.plans.recipe import Calibrate
from ternarize.runtime.decode import CACHES

SELF = "self"  # and DEFAULT: data sets of their own
ENCODER_DECODER = "encoder-decoder"  # and CAUSAL, ENCODER: kinds of models
TENSORS = "model of other inputs than text"
READERS = (".txt", ".jsonl", ".json", ".parquet")
MAX_SEQ_LEN = 512  # when none is asked for
LEAST = 4  # samples, below which statistics mean nothing
SHORTEST_TEXT = 8  # tokens of an encoder's sample
# Characters kept of a text: enough documents to spread the samples over, and no more to tokenize.
MIN_POOL = 8 << 20
POOL_PER_TOKEN = 32

# generate(prompt (n, p) int64, length, generator) -> (n, length) int64, the prompt included
Generate = Callable[[Tensor, int, torch.Generator], Tensor]
Sample = dict[str, Tensor]  # arguments of forward, without the batch dimension


@dataclass(frozen=True)
class Samples:
    """Three sets of batches, each batch the keyword arguments of one call of `forward`.

    batches      samples that calibrate
    heldout      samples of other documents, a tenth as many, to choose by
    report       samples of again other documents, for the final figures
    first        position of a window, from 0, whose token is the first that counts as predicted
    tokens       token ids in `batches`, padding not counted; 0 where the model reads no tokens
    digest       SHA-256 over the samples of all three sets, hex; not over their batching
    description  plain data for ternarize.json
    """

    batches: list[dict[str, Tensor]]
    heldout: list[dict[str, Tensor]]
    report: list[dict[str, Tensor]]
    first: int
    tokens: int
    digest: str
    description: dict[str, Any]


class _Document(NamedTuple):
    text: str
    begin: bool = True  # as documents do; chat templates write their own, sections begin nothing


class _Text(NamedTuple):
    """Documents in the order of their digests, and how the record calls them."""

    documents: list[_Document]
    name: str
    files: list[str]
    notes: list[str]


def read(
    how: Calibrate,
    *,
    config: Any,
    model_class: Any,
    tokenizer: Any | None,
    generate: Generate | None,
    batch_size: int,
) -> Samples:
    """Read, choose, cut and batch the samples to calibrate on.

    how          dataset, num_samples, seq_len, seed and text_column count here
    config       of the model, a PretrainedConfig
    model_class  whose `forward` will be called
    tokenizer    of the model; None where it has none
    generate     samples from the source model at temperature 1, for "self":
                 (prompt (n, p) int64, length, generator) -> (n, length) int64, prompt included
    batch_size   samples of a batch

    Returns Samples, on CPU. With too little text for `num_samples` they are fewer, which
    description["notes"] says.

    Raises UsageError when the data cannot be read, do not fit the model, or make fewer than 4
    samples beside one held out and one reported on; CheckpointError when the tokenizer is missing
    or is not the model's.
    """
    assert batch_size > 0
    kind = kind_of(model_class, config)
    rng = random.Random(f"ternarize {how.seed}")
    seq_len: int | None = None
    notes: list[str] = []
    extra: dict[str, Any] = {}
    prefix: list[int] = []
    if Path(how.dataset).suffix == ".safetensors":
        _no_column(how)
        sets = _read_tensors(Path(how.dataset), how, model_class)
        name, padding = Path(how.dataset).name, None
    elif kind == TENSORS:
        raise UsageError(
            how.dataset,
            f"{model_class.__name__} does not read text alone",
            f"a .safetensors file with tensors named as its forward names them ({', '.join(_arguments(model_class)[:4])}, "
            "...), a sample per row",
            "Make one",
        )
    elif how.dataset == SELF:
        _no_column(how)
        seq_len = _length(how, kind, config, tokenizer)
        prefix = _own_beginning(config, tokenizer)
        sets = _write(how, seq_len, kind, config, model_class, tokenizer, generate, batch_size)
        name, padding = SELF, None
    else:
        if tokenizer is None:
            raise CheckpointError(
                how.dataset,
                f"{model_class.__name__} has no tokenizer, without which text cannot be read",
                "tokenizer.json or the like",
                "Copy it from the source of the model",
            )
        seq_len = _length(how, kind, config, tokenizer)
        text = _read_text(how, seq_len, tokenizer)
        cut, finish = _cutter(how, kind, seq_len, config, tokenizer, rng)
        sets, more = _divide(how, text.documents, seq_len, cut, finish, rng)
        name, notes = text.name, text.notes + more
        extra = {"files": text.files} if text.files else {}
        extra["documents"] = len(text.documents)
        padding = (tokenizer.pad_token_id or 0) if kind == ENCODER else None
        prefix = frame(tokenizer).prefix
    if len(sets[0]) < how.num_samples:
        notes.append(_fewer(how, sets))
    _check_ids(sets, config, how.dataset)
    batches, heldout, report = (_batch(each, batch_size, padding, rng) for each in sets)
    tokens = sum(
        tensor.numel() for sample in sets[0] for name, tensor in sample.items() if _is_ids(name)
    )
    digest = _digest(sets)
    description: dict[str, Any] = {
        "dataset": name,
        **extra,
        "samples": len(sets[0]),
        "heldout_samples": len(sets[1]),
        "report_samples": len(sets[2]),
        "tokens": tokens,
        "seq_len": seq_len,
        "windows_begin_with": prefix if tokenizer is None else names_of(prefix, tokenizer),
        "seed": how.seed,
        "text_column": how.text_column,
        "digest": digest,
        "notes": notes,
    }
    first = max(1, len(prefix)) if kind == CAUSAL else 1
    return Samples(batches, heldout, report, first, tokens, digest, description)


def _fewer(how: Calibrate, sets: Sequence[Sequence[Sample]]) -> str:
    """How many samples there are of each set, where they are fewer than was asked for."""
    made, chosen, reported = map(len, sets)
    return (
        f"{how.num_samples} samples were asked for; the data make {made} to calibrate on, {chosen} "
        f"to choose by and {reported} to report on"
    )


# --- what a model reads -------------------------------------------------------------------------


def kind_of(model_class: Any, config: Any) -> str:
    """CAUSAL, ENCODER, ENCODER_DECODER or TENSORS: what a sample for this model looks like.

    Unlike what ternarize.evaluate measures, any head will do: only the way in counts.
    """
    takes = _arguments(model_class)
    if "input_ids" not in takes:
        return TENSORS
    if "decoder_input_ids" in takes:
        return ENCODER_DECODER
    cached = {*CACHES, "use_cache"} & set(takes)
    looks_back = getattr(config.get_text_config(), "is_decoder", True) is not False
    # GPT-NeoX says is_decoder=False and is a decoder: that a model generates tells more
    if model_class.can_generate() or (cached and looks_back):
        return CAUSAL
    # CLIP and its kin compare two inputs and run on nothing less than both
    return TENSORS if hasattr(model_class, "get_text_features") else ENCODER


def _arguments(model_class: Any) -> list[str]:
    return [name for name in inspect.signature(model_class.forward).parameters if name != "self"]


def _length(how: Calibrate, kind: str, config: Any, tokenizer: Any | None) -> int:
    """Tokens of a sample; raises UsageError when more are asked for than the model can take."""
    limit = max_positions(config)
    if kind != CAUSAL and tokenizer is not None:
        limit = longest_text(config, tokenizer)
    if how.seq_len is None:
        return min(MAX_SEQ_LEN, limit)
    check_seq_len(how.seq_len, limit)
    return how.seq_len


def _is_ids(name: str) -> bool:
    return name in ("input_ids", "decoder_input_ids")


def _check_ids(sets: Sequence[Sequence[Sample]], config: Any, where: str) -> None:
    size = vocabulary_size(config)
    rows = (row for samples in sets for sample in samples for row in sample.items())
    ids = [tensor for name, tensor in rows if _is_ids(name) and tensor.numel()]
    if size is None or not ids:
        return
    low, high = min(int(row.min()) for row in ids), max(int(row.max()) for row in ids)
    if low < 0 or high >= size:
        raise CheckpointError(
            where,
            f"has tokens {low} to {high}",
            f"0 to {size - 1}, the model's vocabulary",
            "Use the tokenizer that belongs to the model",
        )


# --- text ---------------------------------------------------------------------------------------


def _read_text(how: Calibrate, seq_len: int, tokenizer: Any) -> _Text:
    """Documents of a file, a directory, a Hub dataset or the package's own text."""
    pool = max(MIN_POOL, POOL_PER_TOKEN * how.num_samples * seq_len)
    path = Path(os.path.expanduser(how.dataset))
    files: list[str] = []
    notes: list[str] = []
    if how.dataset == DEFAULT:
        _no_column(how)
        name = DEFAULT
        stream: Iterable[_Document] = map(_Document, read_documents(own_text()))
    elif os.path.isdir(path):
        name = path.resolve().name
        paths, others = _list_files(path)
        if not paths:
            raise UsageError(
                how.dataset,
                f"holds no {', '.join(READERS)} file",
                "some text",
                "Name a file, or another directory",
            )
        if others:
            notes.append(f"{others} files of other kinds than text were not read")
        stream = (each for one in paths for each in _read_file(one, how, tokenizer))
        files = [one.relative_to(path).as_posix() for one in paths]
    elif os.path.exists(path):
        name = path.name
        stream = _read_file(path, how, tokenizer)
    else:
        name, stream = _read_hub(how, tokenizer, pool, files)
    documents, empty = _draw(stream, how.seed, pool)
    if empty:
        notes.append(f"{empty} records without text were left out")
    if not documents:
        raise UsageError(how.dataset, "has no text", "documents to calibrate on", "Check the file")
    return _Text(documents, name, files, notes)


def _draw(stream: Iterable[_Document], seed: int, pool: int) -> tuple[list[_Document], int]:
    """The first documents in the order of SHA-256(seed, document), and how many were empty.

    As few as hold `pool` characters; equal documents once. One that was dropped cannot come back:
    those kept before it hold enough, and only come earlier in the order as the stream goes on.
    """
    kept: dict[int, _Document] = {}
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


def _list_files(directory: Path) -> tuple[list[Path], int]:
    """Text files below a directory, sorted by name, and how many others there are."""
    paths: list[Path] = []
    others = 0
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix in READERS:
                paths.append(Path(folder, name))
            else:
                others += 1
    return sorted(paths, key=lambda path: path.relative_to(directory).as_posix()), others


def _read_file(path: Path, how: Calibrate, tokenizer: Any) -> Iterator[_Document]:
    suffix = path.suffix
    if suffix == ".txt":
        _no_column(how)
        for number, text in enumerate(read_documents(path), 1):
            if "\0" in text:  # valid UTF-8, but no text file has one
                raise UsageError(
                    path,
                    f"document {number} has NUL characters",
                    "a text file",
                    "Name another file",
                )
            yield _Document(text)
    elif suffix == ".jsonl":
        yield from _read_jsonl(path, how.text_column, tokenizer)
    elif suffix == ".json":
        yield from _read_json(path, how.text_column, tokenizer)
    elif suffix == ".parquet":
        yield from _read_parquet(path, how.text_column, tokenizer)
    else:
        raise UsageError(
            path,
            "is no kind of file that can be read",
            f"{', '.join(READERS)} or .safetensors",
            "Convert it, or give it the ending of what it is",
        )


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            path,
            f"cannot be read ({error.strerror or first_line(error)})",
            "a file of text",
            "Check the path",
        ) from None


def _read_jsonl(path: Path, column: str | None, tokenizer: Any) -> Iterator[_Document]:
    with _opening(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
            if line.strip():
                where = f"{path}: line {number}"
                yield _record(_parse(line, where), column, tokenizer, where)


def _read_json(path: Path, column: str | None, tokenizer: Any) -> Iterator[_Document]:
    with _opening(path):
        raw = path.read_bytes()
    rows = _parse(raw.removeprefix(b"\xef\xbb\xbf"), str(path))
    if not isinstance(rows, list):
        raise UsageError(
            path,
            f"holds {_name(rows)}",
            "a list of strings, or of objects with `text` or `messages`",
            "One object per line is a .jsonl file: name it so",
        )
    for number, row in enumerate(rows, 1):
        where = f"{path}: entry {number}"
        yield (
            _entry(row, tokenizer, where)
            if isinstance(row, str)
            else _record(row, column, tokenizer, where)
        )


def _read_parquet(path: Path, column: str | None, tokenizer: Any) -> Iterator[_Document]:
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
    with _opening(path), path.open("rb") as raw:
        try:
            file = parquet.ParquetFile(raw)
            names = list(file.schema_arrow.names)
            chosen = _column(names, column, str(path))
            for rows in file.iter_batches(batch_size=1024, columns=[chosen]):
                for value in rows.column(0).to_pylist():
                    number += 1
                    yield _entry(value, tokenizer, f"{path}: row {number}, {chosen}")
        except (arrow.lib.ArrowException, OSError) as error:  # thrift's errors are OSErrors
            raise UsageError(
                path,
                f"pyarrow cannot read it ({first_line(error)})",
                "a parquet file",
                "Repair it, or name another",
            ) from None


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(
            where, f"byte {error.start} is not UTF-8", "JSON in UTF-8", "Convert it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            where, f"is not JSON ({first_line(error)})", "a JSON value", "Repair it"
        ) from None


def _record(row: Any, column: str | None, tokenizer: Any, where: str) -> _Document:
    if not isinstance(row, dict):
        raise UsageError(
            where, f"is {_name(row)}", "an object with `text` or `messages`", "Repair it"
        )
    chosen = _column(list(row), column, where)
    return _entry(row[chosen], tokenizer, f"{where}, {chosen}")


def _column(names: list[str], column: str | None, where: str) -> str:
    """The column that holds the text: the one that was named, or `text` or `messages`."""
    there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if column is not None:
        if column not in names:
            raise UsageError(
                where,
                f"has no column {column!r} but {there or 'none'}",
                "the one that --text-column names",
                "Name another",
            )
        return column
    found = [name for name in ("text", "messages") if name in names]
    if len(found) != 1:
        raise UsageError(
            where,
            f"has {' and '.join(found) or there or 'no columns'}",
            "either `text` or `messages`",
            "Name the column with --text-column",
        )
    return found[0]


def _entry(value: Any, tokenizer: Any, where: str) -> _Document:
    """A string as it is, a list of messages through the chat template, null as no text."""
    document = _Document("" if value is None else value)
    if isinstance(value, list):
        document = _Document(_render(value, tokenizer, where), begin=False)
    elif value is not None and not isinstance(value, str):
        raise UsageError(
            where,
            f"is {_name(value)}",
            "a text, or a list of messages",
            "Name another column with --text-column, or repair the data",
        )
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            where,
            f"character {error.start} is half a surrogate pair",
            "Unicode text",
            "Repair the data",
        ) from None
    return document


def _render(messages: list[Any], tokenizer: Any, where: str) -> str:
    """Messages as the tokenizer's chat template writes them."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(
                where,
                f"a message is {str(message)[:60]!r}",
                "objects with `role` and `content`",
                "Repair the data",
            )
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


def _name(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _no_column(how: Calibrate) -> None:
    if how.text_column is not None:
        raise UsageError(
            "text column",
            f"{how.text_column!r}, and {how.dataset} has text without columns",
            "none",
            "Leave --text-column out",
        )


# --- the Hub ------------------------------------------------------------------------------------


def _read_hub(
    how: Calibrate, tokenizer: Any, pool: int, files: list[str]
) -> tuple[str, Iterator[_Document]]:
    """Name with revision, and documents of a Hub dataset; `files` receives what is read.

    Files come in an order that the seed shuffles, and no more of them than hold `pool` characters:
    datasets can be larger than any disk.
    """
    import huggingface_hub  # slow to import, and needed for Hub ids only
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    given = how.dataset
    whole, _, revision = given.partition("@")
    match = re.fullmatch(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)((?:/[\w.-]+)*)/?", whole)
    if match is None or Path(whole).suffix in READERS:
        raise UsageError(
            given,
            "no such file",
            f"a file or directory of text, a Hub dataset id (user/name), {SELF} or {DEFAULT}",
            "Check the path",
        )
    repo, folder = match[1], match[2].strip("/")

    @contextmanager
    def asking() -> Iterator[None]:
        try:
            yield
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UsageError(
                given,
                f"no such file, and the Hub did not give it as a dataset ({type(error).__name__}: "
                f"{first_line(error)})",
                remedy="Check the name, the network and your token",
            ) from None

    api = huggingface_hub.HfApi()
    with asking():
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
        return hashlib.sha256(f"{how.seed}\n{name}".encode()).digest()

    def stream() -> Iterator[_Document]:
        total = 0
        for name in sorted(chosen, key=order):
            if total >= pool:
                return
            with asking():
                path = api.hf_hub_download(repo, name, repo_type="dataset", revision=commit)
            files.append(name)
            for document in _read_file(Path(path), how, tokenizer):
                total += len(document.text)
                yield document

    return f"{repo}{f'/{folder}' if folder else ''}@{commit}", stream()


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
            f"{len(inside)} files, none of them {', '.join(READERS)}",
            "text in one of these forms",
            "Download it and convert it",
        )
    # evaluation must not be calibrated on, so other splits are left alone where there is this one
    found = [name for name in found if "train" in name] or found
    folders = sorted({os.path.dirname(name) for name in found})
    if len(folders) > 1:
        raise UsageError(
            given,
            f"text in {len(folders)} folders ({', '.join(folders[:6])}{', ...' if len(folders) > 6 else ''})",
            "one",
            "Name it: user/name/folder",
        )
    return found


# --- three sets ---------------------------------------------------------------------------------

Cut = Callable[[Sequence[_Document]], Sequence[Any]]
Finish = Callable[[Any], Sample]
SHARES = (0.8, 0.1, 0.1)
SCARCE = (0.5, 0.25, 0.25)  # where a tenth of the text makes no sample
MIN_SECTION = 400  # characters


def _wanted(num_samples: int) -> tuple[int, int, int]:
    other = max(1, round(num_samples / 10))
    return num_samples, other, other


def _divide(
    how: Calibrate,
    documents: Sequence[_Document],
    seq_len: int,
    cut: Cut,
    finish: Finish,
    rng: random.Random,
) -> tuple[list[list[Sample]], list[str]]:
    """Samples of three sets of documents, and notes; by sections where documents are too few."""
    wanted = _wanted(how.num_samples)
    least = (min(LEAST, how.num_samples), 1, 1)
    counts = [0, 0, 0]
    cut_up = ["too few documents to keep the sets apart: cut into sections"]
    for parts, notes, shares in (
        (documents, [], SHARES),
        (documents, [], SCARCE),
        (_sections(documents), cut_up, SHARES),
        (_sections(documents), cut_up, SCARCE),
    ):
        pools = [cut(part) for part in _split(parts, shares)]
        counts = [len(pool) for pool in pools]
        enough = all(have >= need for have, need in zip(counts, least, strict=True))
        # few documents of unequal length can leave most of the text to the small sets
        if enough and (notes or counts[0] >= min(wanted[0], sum(counts) / 2)):
            sets = [
                [finish(pool[at]) for at in _spread(len(pool), number, rng)]
                for pool, number in zip(pools, wanted, strict=True)
            ]
            return sets, notes
    raise UsageError(
        how.dataset,
        f"makes {counts[0]} samples of {seq_len} tokens, {counts[1]} held out and {counts[2]} to "
        "report on",
        f"at least {least[0]}, 1 and 1",
        "Give a longer text, or use shorter samples (--seq-len)",
    )


def _split(documents: Sequence[_Document], shares: Sequence[float]) -> list[list[_Document]]:
    """Each document to the set that has the least of its share, by characters."""
    sets: list[list[_Document]] = [[], [], []]
    sizes = [0, 0, 0]
    for document in documents:
        at = min(range(3), key=lambda index: sizes[index] / shares[index])
        sets[at].append(document)
        sizes[at] += len(document.text)
    return sets


def _sections(documents: Sequence[_Document]) -> list[_Document]:
    """Documents cut into pieces of about a fortieth of them all, and of a paragraph at least."""
    size = max(MIN_SECTION, sum(len(document.text) for document in documents) // 40)
    return [
        _Document(piece, document.begin and not index)
        for document in documents
        for index, piece in enumerate(_pieces(document.text, size))
    ]


def _pieces(text: str, size: int) -> list[str]:
    """A text cut into pieces of at most `size` characters, at blank lines, lines or words."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > size:
        for mark in ("\n\n", "\n", " ", ""):
            end = text.rfind(mark, start + size // 2, start + size) + len(mark)
            if end > start + size // 2 or not mark:
                break
        end = min(max(end, start + 1), start + size)
        pieces.append(text[start:end])
        start = end
    return [piece for piece in [*pieces, text[start:]] if piece.strip()]


def _spread(total: int, count: int, rng: random.Random) -> list[int]:
    """`count` of `total` places in random order, one in each of `count` equal stretches."""
    count = min(count, total)
    edges = [index * total // count for index in range(count + 1)]
    places = [rng.randrange(*pair) for pair in zip(edges, edges[1:], strict=False)]
    rng.shuffle(places)
    return places


def _portion(count: int, how: Calibrate, what: str) -> tuple[int, int, int]:
    """Sizes of three sets of `count` samples that have no documents."""
    sizes = _wanted(how.num_samples)
    if count < sum(sizes):
        other = max(1, count // 10)
        sizes = count - 2 * other, other, other
    if sizes[0] < min(LEAST, how.num_samples):
        raise UsageError(
            how.dataset,
            f"{count} {what}",
            f"at least {min(LEAST, how.num_samples) + 2}, of which one is held out and one "
            "reported on",
            "Give more",
        )
    return sizes


# --- from text to samples -----------------------------------------------------------------------


def _cutter(
    how: Calibrate, kind: str, seq_len: int, config: Any, tokenizer: Any, rng: random.Random
) -> tuple[Cut, Finish]:
    """How documents are cut for a kind of model, and how a piece becomes a sample."""
    if kind == CAUSAL:

        def window(ids: list[int]) -> Sample:
            return {"input_ids": torch.tensor(ids)}

        return lambda documents: _windows(documents, tokenizer, seq_len), window
    prefix, suffix = frame(tokenizer)
    body = seq_len - len(prefix) - len(suffix)
    if body < 1:
        raise UsageError(
            "sequence length",
            f"{seq_len}",
            f"more than the tokenizer's {len(prefix) + len(suffix)} special tokens",
            "Use a larger number (--seq-len)",
        )
    if kind == ENCODER:

        def sentence(text: str) -> Sample:
            return {"input_ids": torch.tensor(encode_line(text, tokenizer, seq_len))}

        return lambda documents: _texts(documents, tokenizer, body, rng), sentence
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise CheckpointError(
            how.dataset,
            "the model's config.json has no decoder_start_token_id",
            "the token that its decoder begins with",
            "Add it, or give .safetensors samples",
        )

    inside = len(prefix) + body  # of the encoder's window, before what stands behind

    def pair(ids: list[int]) -> Sample:
        target = prefix + ids[inside:]
        return {
            "input_ids": torch.tensor(ids[:inside] + suffix),
            "decoder_input_ids": torch.tensor([start, *target[:-1]]),
        }

    both = inside + seq_len - len(prefix)
    return lambda documents: _windows(documents, tokenizer, both), pair


def _windows(documents: Sequence[_Document], tokenizer: Any, seq_len: int) -> list[list[int]]:
    """Windows of joined documents without overlap, as ternarize.evaluate cuts them."""
    begin = beginning(tokenizer)
    texts = [document.text for document in documents]
    if not texts:
        return []
    ids: list[int] = []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for document, row in zip(documents, encoded, strict=True):
        ids += begin if document.begin else []
        ids += row
    return cut(ids, frame(tokenizer).prefix, seq_len)


# ends of sentences; a line break inside a sentence is followed by a small letter
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n\s*\n|\n(?=\s*[^a-z\s])")


def _texts(
    documents: Sequence[_Document], tokenizer: Any, body: int, rng: random.Random
) -> list[str]:
    """Documents cut into texts of whole sentences, of log-uniform lengths up to `body` tokens.

    Lengths are in characters, by the mean that a token has here: every text is tokenized when it
    has been chosen, and cut to length then.
    """
    beginnings = [document.text[:2000] for document in documents[:256]]
    tokens = sum(
        len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in beginnings
    )
    per_token = sum(map(len, beginnings)) / max(1, tokens)
    shortest = min(SHORTEST_TEXT, body)
    texts: list[str] = []
    for document in documents:
        at, start, sentences = 0, 0, []
        for match in _SENTENCE_END.finditer(document.text):
            sentences.append(document.text[start : match.end()])
            start = match.end()
        sentences.append(document.text[start:])
        longest = max(1, int(body * per_token))
        sentences = [piece for sentence in sentences for piece in _pieces(sentence, longest)]
        while at < len(sentences):
            target = shortest * (body / shortest) ** rng.random() * per_token
            joined = sentences[at]
            at += 1
            while at < len(sentences) and len(joined) + len(sentences[at]) <= target:
                joined += sentences[at]
                at += 1
            texts.append(joined.strip())
    return [text for text in texts if text]


# --- the model's own text -----------------------------------------------------------------------


def _write(
    how: Calibrate,
    seq_len: int,
    kind: str,
    config: Any,
    model_class: Any,
    tokenizer: Any | None,
    generate: Generate | None,
    batch_size: int,
) -> list[list[Sample]]:
    """Samples that the source model writes itself, each a document of its own."""
    if kind != CAUSAL or not model_class.can_generate() or generate is None:
        raise UsageError(
            SELF,
            f"{model_class.__name__} ({kind}) writes no text of its own",
            "a causal language model with its output head",
            f"Name a text (--dataset), or use {DEFAULT}",
        )
    head = _own_beginning(config, tokenizer)
    check_room(seq_len, head)
    size = vocabulary_size(config) or 0
    special = set(head)
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        size = min(size, len(tokenizer)) if size else len(tokenizer)
    ordinary = [index for index in range(size) if index not in special]
    if not ordinary:
        raise CheckpointError(
            SELF,
            f"the model's vocabulary has {size} tokens, none of them ordinary",
            "words to begin with",
            "Name a text (--dataset)",
        )
    rng = random.Random(f"ternarize self {how.seed}")
    generator = torch.Generator().manual_seed(how.seed)
    rows: dict[tuple[int, ...], None] = {}  # equal ones once, so that the sets are apart
    total = sum(_wanted(how.num_samples))
    for index, start in enumerate(range(0, total, batch_size)):
        count = min(batch_size, total - start)
        draw = index % 2 == 0 or not head
        prompt = [head + ([rng.choice(ordinary)] if draw else []) for _ in range(count)]
        ids = generate(torch.tensor(prompt), seq_len, generator).cpu()
        assert ids.shape == (count, seq_len) and ids.dtype == torch.int64, (ids.shape, ids.dtype)
        rows |= dict.fromkeys(map(tuple, ids.tolist()))
    written = list(rows)
    rng.shuffle(written)
    samples = iter([{"input_ids": torch.tensor(row)} for row in written])
    sizes = _portion(len(written), how, "different texts were written by the model")
    return [[next(samples) for _ in range(size)] for size in sizes]


def _own_beginning(config: Any, tokenizer: Any | None) -> list[int]:
    """What the model's own texts begin with: as windows do, or else bos, if there is one."""
    prefix = [] if tokenizer is None else frame(tokenizer).prefix
    known = tokenizer, config.get_text_config()
    bos = [getattr(each, "bos_token_id", None) for each in known]
    return prefix or [token for token in bos if token is not None][:1]


# --- tensors ------------------------------------------------------------------------------------


def _read_tensors(path: Path, how: Calibrate, model_class: Any) -> list[list[Sample]]:
    """Rows of the tensors of a safetensors file, drawn in the order of SHA-256(seed, row)."""
    path = path.expanduser()
    takes = _arguments(model_class)
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(slices[name].get_shape()) for name in names}
            count = _check_tensors(path, shapes, takes, model_class.__name__)
            places: dict[bytes, int] = {}
            for index in range(count):
                sha = hashlib.sha256(f"{how.seed}\n".encode())
                for name, row in _row(slices, index).items():
                    if row.is_floating_point() and not row.isfinite().all():
                        raise UsageError(
                            path,
                            f"row {index} of {name} has NaN or infinite numbers, or such as "
                            "float32 does not hold",
                            "finite ones",
                            "Repair the data",
                        )
                    sha.update(byte_view(row[None]).numpy().tobytes())
                places.setdefault(sha.digest(), index)
            order = [places[key] for key in sorted(places)]
            sizes = _portion(len(order), how, "different rows")
            chosen = iter(order)
            return [[_row(slices, next(chosen)) for _ in range(size)] for size in sizes]
    except (SafetensorError, OSError) as error:
        raise UsageError(
            path,
            f"cannot be read as safetensors ({first_line(error)})",
            f"tensors named as {model_class.__name__}.forward names them",
            "Check the file",
        ) from None


def _row(slices: dict[str, Any], index: int) -> Sample:
    """A row of each tensor; floating-point ones in float32, in which models are calibrated."""
    rows = {name: part[index : index + 1][0] for name, part in slices.items()}
    return {n: row.float() if row.is_floating_point() else row for n, row in rows.items()}


def _check_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], takes: list[str], model: str
) -> int:
    """The number of rows, the same in all tensors, which forward takes."""
    unknown = [name for name in shapes if name not in takes]
    if unknown or not shapes:
        raise UsageError(
            path,
            f"{f'tensor {unknown[0]!r}' if unknown else 'no tensors'}",
            f"arguments of {model}.forward ({', '.join(takes[:6])}, ...)",
            "Name the tensors so",
        )
    rows = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    if len(set(rows.values())) > 1:
        few, many = min(rows, key=rows.__getitem__), max(rows, key=rows.__getitem__)
        raise UsageError(
            path,
            f"{rows[few]} rows in {few} and {rows[many]} in {many}",
            "the same number, a row per sample",
            "Repair the data",
        )
    decoder = ("decoder_input_ids", "decoder_inputs_embeds")
    if decoder[0] in takes and not any(name in shapes for name in decoder):
        raise UsageError(
            path,
            f"has {', '.join(shapes)}",
            f"decoder_input_ids too, which {model} needs for its decoder",
            "Add what it should write, behind its start token",
        )
    return next(iter(rows.values()))


# --- batches ------------------------------------------------------------------------------------


def _batch(
    samples: Sequence[Sample], batch_size: int, padding: int | None, rng: random.Random
) -> list[dict[str, Tensor]]:
    """Samples in batches: as they are, or sorted by length and padded, with an attention mask."""
    if padding is not None:  # alike lengths together; then batches in random order
        samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    parts = [samples[at : at + batch_size] for at in range(0, len(samples), batch_size)]
    if padding is None:
        return [{name: torch.stack([s[name] for s in part]) for name in part[0]} for part in parts]
    rng.shuffle(parts)
    batches: list[dict[str, Tensor]] = []
    for part in parts:
        rows = [sample["input_ids"] for sample in part]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=padding)
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _digest(sets: Sequence[Sequence[Sample]]) -> str:
    sha = hashlib.sha256()
    for samples in sets:
        sha.update(f"{len(samples)} samples\n".encode())
        for sample in samples:
            for name, tensor in sorted(sample.items()):
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(byte_view(tensor).numpy().tobytes())
    return sha.hexdigest()
