"""Hugging Face checkpoints on disk: headers first, then one piece of a tensor at a time.

Nothing here holds a model. `read_header` parses the head of a safetensors file strictly and reads
no data; `open_checkpoint` finds the files of a directory and lists their tensors; `Checkpoint.read`
fetches rows of one tensor. Data is read, not mapped: a file that shrinks under a mapping kills the
process, and mapped pages count as memory. (pytorch_model.bin, read through torch's weights_only
loading, is the exception: torch maps it.)
"""

import gc
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError, UsageError
from ternarize.fetch import INDEX as INDEX
from ternarize.fetch import PICKLE as PICKLE
from ternarize.fetch import SAFETENSORS as SAFETENSORS
from ternarize.fetch import Stream, fetch, split_id

# dtype names of safetensors
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_JSON = 100_000_000  # bytes of config.json, an index, a record
MAX_LAYERS = 4096  # more than any model has


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: `start` bytes behind the file's `data_start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The parsed head of a safetensors file; `entries` in the order of their data."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file, without reading its data.

    Every rule of formats/container.md about the file's frame is checked: a length that fits, a
    JSON object without repeated keys, known dtypes, sizes that agree with shapes, and data that
    covers the rest of the file without gap or overlap.

    Raises FormatError, or CheckpointError where it cannot be read, naming the file.
    """
    with _readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _broken(path, f"{size} bytes", "a safetensors file has at least 8")
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _broken(
                path,
                f"the header's length is {length} in a file of {size} bytes",
                f"expected 2 to {min(MAX_HEADER, size - 8)}",
            )
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
        table = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the header is not valid JSON ({error})", "") from None
    if not text.startswith("{") or not text.rstrip(" ").endswith("}"):
        raise _broken(path, "the header is not one JSON object", "expected { ... } and spaces")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "__metadata__ is not a table of strings", "")
    entries = {name: _entry(path, name, value) for name, value in table.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise _broken(
                path, f"{name} starts at byte {entry.start} of the data", f"expected {end}"
            )
        end += entry.nbytes
    if 8 + length + end != size:
        raise _broken(path, f"{size} bytes", f"the header promises {8 + length + end}")
    return Header(entries, metadata, 8 + length)


def strict_json(text: str) -> Any:
    """Parse JSON, refusing what parsers disagree on: repeated keys, NaN, half surrogate pairs.

    Raises ValueError or RecursionError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"repeated key {name!r}")
        return table

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    if "\\u" in text:  # only an escape can be half a surrogate pair: it is no UTF-8, a ValueError
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _entry(path: Path, name: str, value: Any) -> Entry:
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(path, f"{name} has dtype {dtype!r}", f"expected one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _broken(
            path,
            f"{name} has shape {shape} and data_offsets {offsets}",
            "expected non-negative integers",
        )
    size = DTYPES[dtype].itemsize
    for n in shape:
        size *= max(1, n)
        if size >= 2**63:  # at once: the product of a million numbers would take hours
            raise _broken(
                path, f"{name} has shape {str(shape):.80}", "expected a size below 2^63 bytes"
            )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _broken(
            path,
            f"{name} has {offsets[1] - offsets[0]} bytes",
            f"expected {nbytes} for {dtype} {shape}",
        )
    return Entry(dtype, tuple(shape), offsets[0], nbytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _broken(path: Path, what: str, expected: str) -> FormatError:
    expected = f"; {expected}" if expected else ""
    return FormatError(f"{path.name}: {what}{expected}. The file is damaged: fetch it again.")


def read_bytes(path: Path, start: int, nbytes: int, buffer: Tensor | None = None) -> Tensor:
    """`nbytes` bytes of a file from offset `start`, as uint8; FormatError if the file ends.

    buffer  memory to use, overwritten and part of the result: fresh pages cost as much as reading
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8) if buffer is None else buffer[:nbytes]
    with _readable(path), path.open("rb", buffering=0) as file:
        file.seek(start)
        done = _read_into(file, buffer.numpy().data)
    if done < nbytes:
        raise _broken(
            path, f"it ends at byte {start + done}", f"data was expected up to {start + nbytes}"
        )
    return buffer


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """CheckpointError, naming the file, where the system does not let it be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file, then try again."
        ) from error


def _read_into(file: FileIO, view: memoryview) -> int:
    """Fill `view` from the file's position; returns how much there was."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done


def stamp(path: Path) -> list[int]:
    """What tells whether a file has been changed or replaced; empty where there is none.

    The time of its last change of any kind is among it, which no program can set back.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        return []
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def byte_view(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order, uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, known by its header: `start` is absolute in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass
class Checkpoint:
    """A checkpoint's tensors in the order of its files and of their data.

    Without weights (a directory with a config.json alone, for a plan) `tensors` is empty.
    """

    directory: Path
    config: dict[str, Any] | None
    files: list[str]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)  # of each safetensors file
    stream: Stream | None = None  # what fetches its files when they are read
    _pickles: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    stamps: dict[str, list[int]] = field(default_factory=dict)  # of each file as it was opened
    notes: list[str] = field(default_factory=list)  # what there is to say about it, in words
    names_changed: bool = False  # whether the names of `tensors` are not those of the files

    def read(
        self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None
    ) -> Tensor:
        """Elements [start, stop) of a tensor, flattened in row-major order, on the CPU.

        buffer  bytes to read into (see `read_bytes`), if it is large enough
        """
        info = self.tensors[name]
        stop = info.numel if stop is None else stop
        if info.file in self._pickles:
            size = os.path.getsize(self.directory / info.file)
            _, before, *_ = self.stamps[info.file]
            if size < before:  # beyond the end of a mapping the process is killed
                raise _broken(
                    self.directory / info.file,
                    f"it has shrunk to {size} bytes",
                    f"expected {before}",
                )
            return self._pickles[info.file][name].reshape(-1)[start:stop]
        if self.stream is not None:
            self.stream.fetch(info.file)
        dtype = DTYPES[info.dtype]
        offset, nbytes = info.start + start * dtype.itemsize, (stop - start) * dtype.itemsize
        if buffer is not None and buffer.numel() < nbytes:
            buffer = None
        return read_bytes(self.directory / info.file, offset, nbytes, buffer).view(dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same, bit for bit; reads them up to where they are not."""
        a, b = self.tensors[name], self.tensors[other]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
            torch.equal(
                byte_view(self.read(name, at, min(at + _PIECE, a.numel))),
                byte_view(self.read(other, at, min(at + _PIECE, a.numel))),
            )
            for at in range(0, a.numel, _PIECE)
        )

    def renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """The same tensors under other names.

        names  name -> new name, of all tensors, and no two alike
        """
        tensors = {new: replace(self.tensors[old], name=new) for old, new in names.items()}
        pickles = {
            file: {names[old]: tensor for old, tensor in table.items()}
            for file, table in self._pickles.items()
        }
        return replace(self, tensors=tensors, _pickles=pickles, names_changed=True)


_PIECE = 1 << 21  # elements compared at a time


def open_checkpoint(
    directory: Path, *, need_weights: bool = True, strict: bool = True
) -> Checkpoint:
    """List the tensors of a checkpoint directory from its index and headers.

    strict  whether an index has to agree with the files, as that of a packed checkpoint has;
            transformers reads the files that it names whole, and `notes` say what disagrees

    Takes safetensors, single or sharded, and else pytorch_model.bin (weights_only: no pickled
    code is run). Raises CheckpointError when there is nothing to read, FormatError when a file
    or the index is broken.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; expected a Hugging Face checkpoint. "
            "Check the path or the Hub id."
        )
    config = read_config(directory)
    for main in (SAFETENSORS, PICKLE):
        if not need_weights and not any(directory.glob(f"*{Path(main).suffix}")):
            continue  # an index may be there without its shards
        if (directory / main).is_file():  # the whole model: an index beside it is not read
            return open_files(directory, [main], config)
        if (directory / (main + INDEX)).is_file():
            return _open_sharded(directory, config, main + INDEX, strict)
    if need_weights:
        raise _no_weights(directory)
    return Checkpoint(directory, config, [], {})


def _no_weights(directory: Path) -> CheckpointError:
    found = sorted(p.name for p in directory.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    below = sorted(
        config.parent
        for config in directory.glob("*/config.json")
        if any((config.parent / main).is_file() for main in _MAIN)
    )
    advice = "Save the model with save_pretrained."
    if below:
        others = f" (or {', '.join(each.name for each in below[1:4])})" if below[1:] else ""
        advice = f"{below[0].name}{others} in it has some: name {below[0]}."
    return CheckpointError(
        f"{directory}: no weights; expected {', '.join(_MAIN[:-1])} or {_MAIN[-1]}"
        + (f", found {', '.join(found[:5])}" if found else "")
        + f". {advice}"
    )


_MAIN = (SAFETENSORS, SAFETENSORS + INDEX, PICKLE, PICKLE + INDEX)


_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


# what configurations call the number of layers
_LAYERS = r"(\w+_)?n?layers?|(encoder_|decoder_)?depth|n_blocks"


def read_config(directory: Path) -> dict[str, Any] | None:
    """The config.json of a checkpoint, None without one; FormatError where it would do harm.

    transformers builds as many layers as it says, before it looks at a weight: a number that no
    model has would keep it busy for days. And it fetches and runs compiled code where an
    implementation is the name of a Hub repository, which is not asked about as other code is.
    """
    table = read_json(directory / "config.json")

    def walk(value: dict[str, Any]) -> None:
        for key, each in value.items():
            if key.endswith(("attn_implementation", "experts_implementation")):
                names = each.values() if isinstance(each, dict) else [each]
                if not all(name in (None, "") or re.fullmatch(r"\w+", str(name)) for name in names):
                    raise FormatError(
                        f"config.json: {key} is {each!r:.80}; expected one of transformers' own. "
                        "It names code of the Hub: do not trust this checkpoint."
                    )
            if isinstance(each, dict):
                walk(each)
            many = isinstance(each, int) and each > MAX_LAYERS
            if many and re.fullmatch(_LAYERS, key):
                raise FormatError(
                    f"config.json: {key} is {each}; expected at most {MAX_LAYERS}. Repair the file."
                )

    walk(table or {})
    return table


def read_json(path: Path, *, strict: bool = False) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file; FormatError if it is not an object.

    strict  False for config.json, which is read as transformers reads it: some have Infinity
    """
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON:
        raise FormatError(
            f"{path.name}: {path.stat().st_size} bytes; expected at most {MAX_JSON}. "
            "Repair the file."
        )
    try:
        with _readable(path):
            text = path.read_text("utf-8")
        table = strict_json(text) if strict else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name}: not valid JSON ({error}). Repair the file.") from None
    if not isinstance(table, dict):
        raise FormatError(
            f"{path.name}: holds a {type(table).__name__}; expected a JSON object. Repair the file."
        )
    return table


def _open_sharded(
    directory: Path, config: dict[str, Any] | None, index: str, strict: bool
) -> Checkpoint:
    weight_map = (read_json(directory / index, strict=True) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{index}: no weight_map; expected a table of tensor name: file. Fetch it again."
        )
    files = sorted(set(map(str, weight_map.values())))
    for file in files:
        if file not in weight_map.values() or re.search(r"[/\\:]", file) or file in ("", ".", ".."):
            raise FormatError(
                f"{index}: names the file {file!r}; expected a name in the same directory. "
                "Do not trust this checkpoint."
            )
        if not os.path.isfile(directory / file):  # unlike Path's, never raises on a strange name
            raise CheckpointError(f"{index}: {file!r} is missing beside it. Fetch it again.")
    checkpoint = open_files(directory, files, config)
    for disagreement in _disagreements(checkpoint, weight_map):
        if strict:
            raise FormatError(f"{index}: {disagreement}. Fetch the checkpoint again.")
        checkpoint.notes.append(f"{index} {disagreement}; the files themselves decide")
    return checkpoint


def _disagreements(checkpoint: Checkpoint, weight_map: Mapping[str, str]) -> Iterator[str]:
    """What an index says of its files that is not so, a line for each kind."""
    tensors = checkpoint.tensors
    absent = [name for name in weight_map if name not in tensors]
    moved = [n for n, file in weight_map.items() if n in tensors and tensors[n].file != file]
    unlisted = [name for name in tensors if name not in weight_map]
    if absent:
        where = weight_map[absent[0]]
        yield f"says that {absent[0]}{_more(absent)} is in {where}, but no file has it"
    if moved:
        where, found = weight_map[moved[0]], tensors[moved[0]].file
        yield f"says that {moved[0]}{_more(moved)} is in {where}, but it is in {found}"
    if unlisted:
        where = tensors[unlisted[0]].file
        yield f"does not list {unlisted[0]}{_more(unlisted)}, which {where} holds"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def open_files(
    directory: Path, files: list[str], config: dict[str, Any] | None = None
) -> Checkpoint:
    """List the tensors of the named files of a directory; FormatError if one is in two files."""
    checkpoint = Checkpoint(directory, config, files, {})
    with uncollected():
        for file in files:
            checkpoint.stamps[file] = stamp(directory / file)
            for info in _list_tensors(checkpoint, file):
                if info.name in checkpoint.tensors:
                    raise FormatError(
                        f"{file}: {info.name} is also in {checkpoint.tensors[info.name].file}; "
                        "expected each tensor once. Fetch the checkpoint again."
                    )
                checkpoint.tensors[info.name] = info
    return checkpoint


@contextmanager
def uncollected() -> Iterator[None]:
    """Make many objects without the collector, which would look at all of them again and again.

    It takes half of the time of a header with 100,000 tensors, and finds nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _list_tensors(checkpoint: Checkpoint, file: str) -> Iterator[TensorInfo]:
    path = checkpoint.directory / file
    if path.suffix == ".safetensors":
        header = read_header(path)
        checkpoint.metadata[file] = header.metadata
        for name, entry in header.entries.items():
            start = header.data_start + entry.start
            yield TensorInfo(name, entry.dtype, entry.shape, file, start)
        return
    for name, tensor in checkpoint._pickles.setdefault(file, _load_pickle(path)).items():
        yield TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), file)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, by weights_only loading; mapped where torch can."""
    try:
        try:
            table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files from before torch 1.6 cannot be mapped
                raise
            table = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with pages of advice
        first = re.sub(r"\s+", " ", str(error))[:160]
        raise FormatError(
            f"{path.name}: torch cannot load it as weights only ({type(error).__name__}: {first}). "
            "Convert the source to safetensors with software that you trust."
        ) from None
    if not isinstance(table, dict):
        raise FormatError(
            f"{path.name}: holds a {type(table).__name__}; expected a table of tensors. "
            "Save the model's state_dict alone."
        )
    for name, value in table.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not isinstance(name, str) or not dense or value.dtype not in DTYPE_NAMES:
            raise FormatError(
                f"{path.name}: {name!r} is no dense tensor of a known dtype; expected a table of "
                "tensors. Save the model's state_dict alone."
            )
    return {name: value.detach() for name, value in table.items()}


def locate(
    model: str | Path,
    revision: str | None = None,
    *,
    config_only: bool = False,
    subfolder: str = "",
    variant: str | None = None,
) -> Path:
    """The directory of a checkpoint: a path as it is, a Hub id (user/name[@revision]) fetched.

    subfolder, variant  as from_pretrained of transformers has them

    Only weights, JSON, tokenizer and code files are fetched, safetensors rather than pickles, and
    what arrives is compared with the Hub's digests.
    Raises CheckpointError when neither is there.
    """
    path = os.path.expanduser(model)  # these three, unlike Path's, never raise
    if os.path.isdir(path):
        if not os.path.isdir(os.path.join(path, subfolder)):
            raise CheckpointError(
                f"{model}: has no folder {subfolder!r}; expected one with a checkpoint. "
                "Check the name."
            )
        return Path(path, subfolder)
    if os.path.exists(path):
        raise CheckpointError(
            f"{model}: is a file; expected a checkpoint directory or a Hub id. "
            "Name the directory that holds it."
        )
    named = split_id(str(model))
    if named is None:
        raise CheckpointError(
            f"{model}: no such directory; expected a checkpoint directory or a Hub id "
            "(user/name). Check the path."
        )
    repo, at = named
    if revision and at:
        raise UsageError(f"{model}: names a revision, and so does revision={revision!r}. Name one.")
    return fetch(
        repo, revision or at, config_only=config_only, subfolder=subfolder, variant=variant
    )


INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def read_card(directory: Path) -> dict[str, Any]:
    """What the metadata of a checkpoint's model card (README.md) says that its offspring inherits.

    Empty where there is no card, or no metadata that can be read.
    """
    from huggingface_hub import metadata_load  # slow to import, and needed for conversions only

    path = directory / "README.md"
    if not path.is_file():
        return {}
    try:
        table = metadata_load(path)
    except Exception:  # whatever is wrong in a text for people: nothing is inherited, and that said
        return {}
    return inherit(table or {})


def inherit(table: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a card's metadata that go on to its offspring, if they can stand in any card.

    They are plain text of one line, or lists of it: YAML makes dates and more of what looks so,
    and other signs could be read as markup.
    """
    said = {key: table.get(key) for key in INHERITED}
    return {key: value for key, value in said.items() if _is_text(key, value)}


def _is_text(key: str, value: Any) -> bool:
    texts = value if isinstance(value, list) and value else [value]
    pattern = r"[\w.:/ -]+"
    if key == "license_link":  # an address, or a file of the repository
        pattern = r"https?://[\w.:/?=&%#~+-]+|[\w./-]+"
    return all(isinstance(text, str) and re.fullmatch(pattern, text) for text in texts)


def hub_commit(model: str | Path, source: Checkpoint) -> dict[str, str] | None:
    """Where on the Hub a checkpoint came from: {"id": user/name, "commit": ...}; None for a path.

    model  what it was opened by
    """
    if source.stream is not None:
        return {"id": source.stream.repo, "commit": source.stream.commit}
    named = split_id(str(model))
    if named is None or source.directory == Path(os.path.expanduser(model)):
        return None
    return {"id": named[0], "commit": source.directory.name}


def open_stream(model: str | Path, folder: Path) -> Checkpoint:
    """Open a checkpoint of the Hub whose weight files come when they are read; see `Stream`.

    Raises UsageError for a directory, whose files are nobody's to delete, else as `locate`.
    """
    named = split_id(str(model))
    if named is None or os.path.exists(os.path.expanduser(model)):
        raise UsageError(
            f"{model}: is on this disk; expected a Hub id (user/name[@revision]) to stream. "
            "Leave out --stream: local files are read where they are, and never deleted."
        )
    stream = Stream(*named, folder)
    checkpoint = open_checkpoint(folder, strict=False)
    checkpoint.stream = stream
    return checkpoint
