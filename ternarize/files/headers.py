"""Safetensors files: their headers, read strictly, and bytes behind them.

Data is read, not mapped: a file that shrinks under a mapping kills the process, and mapped pages
count as memory.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.files.json_files import readable, strict_json

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
    with readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise broken_file(path, f"{size} bytes", "at least 8")
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise broken_file(
                path,
                f"the header's length is {length} in a file of {size} bytes",
                f"2 to {min(MAX_HEADER, size - 8)}",
            )
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
        table = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise broken_file(path, f"the header is not valid JSON ({error})") from None
    if not text.startswith("{") or not text.rstrip(" ").endswith("}"):
        raise broken_file(path, "the header is not one JSON object", "{ ... } and spaces")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken_file(path, "__metadata__ is not a table of strings")
    entries = {name: _parse_entry(path, name, value) for name, value in table.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise broken_file(path, f"{name} starts at byte {entry.start} of the data", f"{end}")
        end += entry.nbytes
    if 8 + length + end != size:
        raise broken_file(path, f"{size} bytes", f"the {8 + length + end} that the header promises")
    return Header(entries, metadata, 8 + length)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Where tensors (name, dtype, shape) lie in a file: the widest first, so that all are aligned.

    Those of one width stay in their order.
    """
    entries, start = dict[str, Entry](), 0
    for name, dtype, shape in sorted(tensors, key=lambda each: -DTYPES[each[1]].itemsize):
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = Entry(dtype, shape, start, nbytes)
        start += nbytes
    return entries


def header_json(entries: Mapping[str, Entry], said: Mapping[str, str]) -> bytes:
    """The JSON header of a safetensors file, without the 8 bytes of its length and without padding.

    entries  in the order of their data
    said     the metadata
    """
    table: dict[str, Any] = {"__metadata__": dict(said)}
    for name, entry in entries.items():
        offsets = [entry.start, entry.start + entry.nbytes]
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    return json.dumps(table, separators=(",", ":")).encode()


def file_head(entries: Mapping[str, Entry], said: Mapping[str, str]) -> bytes:
    """All of a safetensors file that comes before its data, which then is aligned."""
    raw = header_json(entries, said)
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _parse_entry(path: Path, name: str, value: Any) -> Entry:
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise broken_file(path, f"{name} has dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise broken_file(
            path, f"{name} has shape {shape} and data_offsets {offsets}", "non-negative integers"
        )
    size = DTYPES[dtype].itemsize
    for n in shape:
        size *= max(1, n)
        if size >= 2**63:  # at once: the product of a million numbers would take hours
            raise broken_file(path, f"{name} has shape {str(shape):.80}", "less than 2^63 bytes")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise broken_file(
            path, f"{name} has {offsets[1] - offsets[0]} bytes", f"{nbytes} for {dtype} {shape}"
        )
    return Entry(dtype, tuple(shape), offsets[0], nbytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def broken_file(path: Path, found: str, expected: str = "") -> FormatError:
    """The error for a file whose bytes break a rule of its format."""
    return FormatError(path.name, found, expected, "The file is damaged: fetch it again")


def read_bytes(path: Path, start: int, nbytes: int, buffer: Tensor | None = None) -> Tensor:
    """`nbytes` bytes of a file from offset `start`, as uint8; FormatError if the file ends.

    buffer  memory to use, overwritten and part of the result: fresh pages cost as much as reading
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8) if buffer is None else buffer[:nbytes]
    with readable(path), path.open("rb", buffering=0) as file:
        file.seek(start)
        done = _read_into(file, buffer.numpy().data)
    if done < nbytes:
        raise broken_file(path, f"it ends at byte {start + done}", f"data up to {start + nbytes}")
    return buffer


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
