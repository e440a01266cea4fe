"""Packed checkpoints for transformers' loading, read instead of mapped.

transformers opens a file with `safetensors.safe_open`, which maps it, and the model's parameters
are then that mapping. A file that shrinks afterwards kills the process by a signal, and one that is
changed in place changes weights that have been verified. `install` puts `open_file` in its place:
for packed files tensors are read into memory of their own, for any other file nothing changes.
"""

import math
import os
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError
from ternarize.files.coded import Coded
from ternarize.files.headers import DTYPES, Entry, Header, read_bytes, read_header
from ternarize.files.metadata import KEY, coded_tensors


def install() -> None:
    """Let transformers open files with `open_file` from now on."""
    from transformers import modeling_utils

    vars(modeling_utils)["safe_open"] = open_file


def open_file(filename: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """`safetensors.safe_open`, which does not map a packed file."""
    try:
        header = read_header(Path(filename))
    except (FormatError, CheckpointError, OSError):  # the library says it in its own words
        header = None
    if header is None or KEY not in header.metadata:
        return safetensors.safe_open(filename, *args, **kwargs)
    return _File(Path(filename), header)


class _File:
    """What transformers uses of an open safetensors file. It is opened again for each tensor."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.coded = coded_tensors(path.name, header.metadata)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def metadata(self) -> dict[str, str]:
        return self.header.metadata

    def keys(self) -> list[str]:
        return list(self.header.entries)

    def offset_keys(self) -> list[str]:
        return self.keys()  # they are in the order of their data

    def get_slice(self, name: str) -> "_Slice | _StreamSlice":
        entry, start = self.header.entries[name], self.header.data_start
        if name in self.coded:
            return _StreamSlice(self.path, self.coded[name], start + entry.start, entry.nbytes)
        return _Slice(self.path, entry, start)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]


class _Slice:
    """A tensor that is read when it is indexed."""

    def __init__(self, path: Path, entry: Entry, data_start: int) -> None:
        self.path, self.entry, self.start = path, entry, data_start + entry.start

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        return self.entry.dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The whole tensor for `...`, else what the slices leave of it; on the CPU.

        Of a slice of rows these rows alone are read.
        """
        shape, dtype = self.entry.shape, DTYPES[self.entry.dtype]
        parts = index if isinstance(index, tuple) else (index,)
        start, nbytes = self.start, self.entry.nbytes
        first = parts[0] if shape and shape[0] and parts else None
        if isinstance(first, slice) and first.step in (None, 1):
            rows = range(shape[0])[first]
            row = nbytes // shape[0]
            start, nbytes = start + rows.start * row, len(rows) * row
            shape, parts = (len(rows), *shape[1:]), (slice(None), *parts[1:])
        data = read_bytes(self.path, start, nbytes).view(dtype).reshape(shape)
        part = data[parts]
        # a part of a larger buffer would keep all of it
        return part if part.numel() == data.numel() else part.clone()


class _StreamSlice:
    """A tensor that is stored as a stream, and read when it is indexed."""

    def __init__(self, path: Path, coded: Coded, start: int, nbytes: int) -> None:
        self.path, self.coded, self.place = path, coded, (start, nbytes)

    def get_shape(self) -> list[int]:
        return list(self.coded.shape)

    def get_dtype(self) -> str:
        return self.coded.dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The whole tensor for `...`, else what the slices leave of it; on the CPU.

        Of a slice of rows, or of matrices of a stack, the chunks of these rows alone are read.
        """
        shape = self.coded.shape
        parts = index if isinstance(index, tuple) else (index,)
        first, stop, step = 0, math.prod(shape[:-1]), math.prod(shape[1:-1])
        slices = parts[0] if parts else None
        if isinstance(slices, slice) and slices.step in (None, 1):
            chosen = range(shape[0])[slices]
            first, stop = chosen.start * step, chosen.start * step + len(chosen) * step
            shape, parts = (len(chosen), *shape[1:]), (slice(None), *parts[1:])
        # transformers reads several tensors at once, each in a thread of its own
        rows = self.coded.read(self.path, *self.place, first, stop, threads=1)
        part = rows.reshape(shape)[parts]
        return part if part.numel() == rows.numel() else part.clone()
