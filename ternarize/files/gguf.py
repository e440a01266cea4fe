"""The format GGUF, read without trusting it: the head of a file, and where its tensors lie.

A file: "GGUF", version u32, tensors u64, keys u64; keys: name, type u32, value; tensors: name,
dimensions u32, their sizes u64 (fastest first), type u32, offset u64; then, aligned, the data.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError
from ternarize.files.headers import DTYPES, MAX_HEADER, broken_file, read_bytes
from ternarize.files.llama_cpp import import_gguf
from ternarize.trits import ggml

_FLOATS = {number: DTYPES[name] for name, number in ggml.FLOATS.items()}
_TERNARY = {block.id: kind for kind, block in ggml.TYPES.items() if block.ternary}
_TERNARY[ggml.I2_S_TYPE] = "i2_s"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # of a model in several files


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: ggml's type, (..., rows, cols), and where its bytes are.

    block  weights and bytes of a block of its type
    """

    name: str
    type: int
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int
    block: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of floating-point numbers; None where they are in blocks."""
        return _FLOATS.get(self.type)

    @property
    def ternary(self) -> str | None:
        """The name of a type that is ternary alone, of ggml.TYPES or "i2_s"; else None."""
        return _TERNARY.get(self.type)

    def read(self, first: int, last: int) -> Tensor:
        """The bytes of rows [first, last), where rows are whole blocks."""
        weights, nbytes = self.block
        row = self.shape[-1] // weights * nbytes
        return read_bytes(self.path, self.start + first * row, (last - first) * row)


_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


class _Head:
    """The head of a file, read from its start; FormatError where it would go beyond its bounds."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def broken(self, what: str, expected: str) -> FormatError:
        return broken_file(self.path, what, expected)

    def bytes(self, count: int) -> bytes:
        left = min(self.size, MAX_HEADER) - self.at
        if count > left:
            raise self.broken(f"{count} bytes promised at {self.at}", f"at most {left}")
        data = self.file.read(count)
        if len(data) < count:
            raise self.broken(f"it ends at byte {self.at + len(data)}", f"{count} bytes more")
        self.at += count
        return data

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        return int(value)

    def count(self, least: int) -> int:
        """How many things of at least so many bytes follow."""
        found = self.number("Q")
        if found > (self.size - self.at) // least:
            raise self.broken(f"{found} things promised at {self.at}", "as many as fit the file")
        return found

    def string(self) -> str:
        raw = self.bytes(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"a string before byte {self.at} is not UTF-8", "UTF-8") from None

    def value(self, kind: int) -> Any:
        """A scalar or string; arrays are lists of strings or arrays of numpy."""
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.bytes(dtype.itemsize), dtype)[0].item()
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.broken(f"a value of type {kind} at {self.at}", "a type of GGUF")
        inner = self.number("I")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.bytes(self.count(dtype.itemsize) * dtype.itemsize), dtype)
        if inner != _STRING:
            raise self.broken(f"an array of type {inner} at {self.at}", "one of scalars or strings")
        return [self.string() for _ in range(self.count(8))]


def read_gguf(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """The keys and the tensors of one file, without reading data.

    Every length, count and offset is compared with what the file has before anything is made of it.
    Raises FormatError, or UsageError where the package `gguf` is not installed.
    """
    sizes = {int(kind): size for kind, size in import_gguf().GGML_QUANT_SIZES.items()}
    sizes |= {block.id: (block.block, block.nbytes) for block in ggml.TYPES.values()}
    sizes[ggml.I2_S_TYPE] = (4, 1)  # and a tail
    with path.open("rb") as file:
        head = _Head(path, file)
        if head.size < 24 or head.bytes(4) != b"GGUF":
            raise head.broken("it does not begin with GGUF", "a GGUF file")
        version = head.number("I")
        if version not in (2, 3):
            raise head.broken(f"version {version}", "2 or 3, in little-endian")
        tensor_count, key_count = head.count(24), head.count(13)
        keys: dict[str, Any] = {}
        for _ in range(key_count):
            key = head.string()
            if key in keys:
                raise head.broken(f"the key {key!r} is there twice", "each once")
            keys[key] = head.value(head.number("I"))
        listed = [_next_tensor(head, sizes) for _ in range(tensor_count)]
    return keys, _placed(head, listed, keys.get("general.alignment", 32))


def _next_tensor(head: _Head, sizes: Mapping[int, tuple[int, int]]) -> GgufTensor:
    """The next of a file's list of tensors, `start` relative to the data."""
    name = head.string()
    count = head.number("I")
    if not 1 <= count <= 4:
        raise head.broken(f"{name:.80} has {count} dimensions", "one to four")
    shape = tuple(head.number("Q") for _ in range(count))[::-1]
    kind, start = head.number("I"), head.number("Q")
    if kind not in sizes:
        raise head.broken(f"{name:.80} has type {kind}", "a type that `gguf` knows")
    weights, nbytes = sizes[kind]
    numel = math.prod(shape)
    if not 0 < numel < 2**56 or shape[-1] % weights:
        raise head.broken(
            f"{name:.80} has shape {list(shape)}", f"columns that are a multiple of {weights}"
        )
    tail = ggml.I2_S_TAIL if kind == ggml.I2_S_TYPE else 0
    size = numel // weights * nbytes + tail
    return GgufTensor(name, kind, shape, head.path, start, size, sizes[kind])


def _placed(head: _Head, listed: list[GgufTensor], alignment: Any) -> list[GgufTensor]:
    """The tensors in the order of their data, `start` relative to the file; no two overlap."""
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
        raise head.broken(f"alignment {alignment!r:.40}", "a power of two")
    base = -(-head.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for tensor in sorted(listed, key=lambda each: each.start):
        if tensor.start % alignment or tensor.start < end:
            raise head.broken(
                f"{tensor.name} starts at byte {tensor.start} of the data",
                f"a multiple of {alignment} from {end} on",
            )
        end = tensor.start + tensor.nbytes
        if base + end > head.size:
            raise head.broken(
                f"{tensor.name} ends at byte {base + end} of {head.size}", "data up to there"
            )
        if tensor.name in tensors:
            raise head.broken(f"{tensor.name} is there twice", "each tensor once")
        tensors[tensor.name] = replace(tensor, start=base + tensor.start)
    return list(tensors.values())


def read_gguf_files(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """The keys and tensors of a file, or of all the files of a set that it belongs to.

    Raises as `read_gguf`, and CheckpointError where a file of the set is missing.
    """
    keys, tensors = read_gguf(path)
    total = keys.get("split.count", 1)
    if type(total) is int and total in (0, 1):  # it can be anything, an array too
        return keys, tensors
    match = PART.fullmatch(path.name)
    if match is None or type(total) is not int or int(match[3]) != total:
        raise FormatError(
            path.name,
            f"is one of {total!r:.20} files",
            "a name that ends in -00001-of-0000N.gguf",
            "Give the files their names again, or merge them",
        )
    tensors, first = [], keys
    for number in range(total):
        part = path.with_name(f"{match[1]}-{number + 1:05d}-of-{total:05d}.gguf")
        if not part.is_file():
            raise CheckpointError(
                path.name, f"{part.name} is missing beside it", remedy="Fetch it too"
            )
        keys, found = read_gguf(part)
        place = keys.get("split.no"), keys.get("split.count")
        if not all(type(each) is int for each in place) or place != (number, total):
            said = f"says it is file {place[0]!r:.20} of {place[1]!r:.20}"
            raise broken_file(part, said, f"{number} of {total}")
        first = keys if number == 0 else first
        tensors += found
    listed = first.get("split.tensors.count", len(tensors))
    if type(listed) is not int or listed != len(tensors):
        raise broken_file(path, f"{len(tensors)} tensors in {total} files", f"{listed!r:.20}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise broken_file(path, "a tensor is in two of its files", "each once")
    return first, tensors
