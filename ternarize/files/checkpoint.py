"""The tensors of a checkpoint's files, read a piece at a time; nothing here holds a model.

`open_files` lists them by the headers, `Checkpoint.read` fetches a part of one. pytorch_model.bin
is read through torch's weights_only loading, which maps it.
"""

import gc
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.files.entropy import Coded
from ternarize.files.headers import (
    DTYPE_NAMES,
    DTYPES,
    broken_file,
    byte_view,
    read_bytes,
    read_header,
    stamp,
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, known by its header: `start` is absolute in `file`.

    coded, stored  of a tensor that is stored as a stream: how it is read, and bytes of the stream
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int = 0
    coded: Coded | None = None
    stored: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in its file."""
        return self.stored if self.coded else self.nbytes

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


class Stream(Protocol):
    """What has weight files on the disk only while they are needed: `HubStream` of the sources."""

    repo: str
    commit: str

    def stamps(self) -> list[list[Any]]:
        """What tells whether the source is still the same."""

    def room(self, names: Collection[str]) -> int:
        """Bytes that these files, one at a time, will yet take beside what is here."""

    def fetch(self, name: str) -> None:
        """Have a file on the disk."""

    def release(self, name: str) -> None:
        """Give the room of a file back."""


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
                path = self.directory / info.file
                raise broken_file(path, f"it has shrunk to {size} bytes", f"{before}")
            return self._pickles[info.file][name].reshape(-1)[start:stop]
        if self.stream is not None:
            self.stream.fetch(info.file)
        if info.coded is not None:
            width = info.shape[-1]
            first, last = start // width, -(-stop // width)
            place = self.directory / info.file, info.start, info.stored
            rows = info.coded.read(*place, first, last, threads=1).flatten()
            return rows[start - first * width : stop - first * width]
        dtype = DTYPES[info.dtype]
        offset, nbytes = info.start + start * dtype.itemsize, (stop - start) * dtype.itemsize
        if buffer is not None and buffer.numel() < nbytes:
            buffer = None
        return read_bytes(self.directory / info.file, offset, nbytes, buffer).view(dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(info.stored_bytes for info in self.tensors.values())

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same, bit for bit; reads them up to where they are not."""
        a, b = self.tensors[name], self.tensors[other]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
            torch.equal(
                byte_view(self.read(name, at, min(at + _COMPARED, a.numel))),
                byte_view(self.read(other, at, min(at + _COMPARED, a.numel))),
            )
            for at in range(0, a.numel, _COMPARED)
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


_COMPARED = 1 << 21  # elements compared at a time


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
                        file,
                        f"{info.name} is also in {checkpoint.tensors[info.name].file}",
                        "each tensor once",
                        "Fetch the checkpoint again",
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
            path.name,
            f"torch cannot load it as weights only ({type(error).__name__}: {first})",
            remedy="Convert the source to safetensors with software that you trust",
        ) from None
    if not isinstance(table, dict):
        raise _no_table(path, f"holds a {type(table).__name__}")
    for name, value in table.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not isinstance(name, str) or not dense or value.dtype not in DTYPE_NAMES:
            raise _no_table(path, f"{name!r} is no dense tensor of a known dtype")
    return {name: value.detach() for name, value in table.items()}


def _no_table(path: Path, found: str) -> FormatError:
    advice = "Save the model's state_dict alone"
    return FormatError(path.name, found, "a table of tensors", advice)
