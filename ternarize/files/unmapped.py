"""Packed checkpoints for transformers' loading, read instead of mapped.

transformers opens a file with `safetensors.safe_open`, which maps it, and the model's parameters
are then that mapping. A file that shrinks afterwards kills the process by a signal, and one that is
changed in place changes weights that have been verified. `install` puts `open_file` in its place:
for packed files tensors are read into memory of their own, for any other file nothing changes.
"""

import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError
from ternarize.files.headers import DTYPES, Header, read_bytes, read_header
from ternarize.files.metadata import KEY, coded_tensors

# what a tensor is, whole, if it is at hand: each is asked once
Given = Mapping[str, Callable[[], Tensor]]

_given = threading.local()  # `files` and `end`, of the thread that loads


def install() -> None:
    """Let transformers open files with `open_file` from now on."""
    from transformers import modeling_utils

    vars(modeling_utils)["safe_open"] = open_file


def give(files: Mapping[Path, Given], end: Callable[[], Callable[[], None] | None]) -> None:
    """Have the next opening of each file, in this thread, take these tensors as they are given.

    end  a reference to what ends the reading of them, weak: here nothing is kept

    Of a file that is not among them nothing is given.
    """
    _given.files, _given.end = dict(files), end


def drop() -> None:
    """Forget what was given in this thread, and end the reading of it."""
    end = getattr(_given, "end", lambda: None)()
    _given.files, _given.end = {}, lambda: None
    if end is not None:
        end()


def open_file(filename: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """`safetensors.safe_open`, which does not map a packed file."""
    try:
        header = read_header(Path(filename))
    except (FormatError, CheckpointError, OSError):  # the library says it in its own words
        header = None
    if header is None or KEY not in header.metadata:
        return safetensors.safe_open(filename, *args, **kwargs)
    given: Given = getattr(_given, "files", {}).pop(Path(filename), {})
    return _File(Path(filename), header, given)


class _File:
    """What transformers uses of an open safetensors file. It is opened again for each tensor."""

    def __init__(self, path: Path, header: Header, given: Given) -> None:
        self.path, self.header, self.given = path, header, dict(given)
        self.coded = coded_tensors(path.name, header)

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

    def get_slice(self, name: str) -> "_Slice":
        entry, coded = self.header.entries[name], self.coded.get(name)
        start = self.header.data_start + entry.start
        if name in self.given:
            is_ = entry if coded is None else coded
            return _Slice(is_.dtype, is_.shape, None, self.given.pop(name))
        if coded is not None:
            rows = math.prod(coded.shape[1:-1])  # of the stream for one of the first dimension
            return _Slice(
                coded.dtype,
                coded.shape,
                # transformers reads several tensors at once, each in a thread of its own
                lambda first, stop: coded.read(
                    self.path, start, entry.nbytes, first * rows, stop * rows, threads=1
                ),
            )
        nbytes = entry.nbytes // max(1, entry.shape[0] if entry.shape else 1)

        def read(first: int, stop: int) -> Tensor:
            place = start + first * nbytes, (stop - first) * nbytes
            return read_bytes(self.path, *place).view(DTYPES[entry.dtype])

        return _Slice(entry.dtype, entry.shape, read)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]


class _Slice:
    """A tensor that is read when it is indexed.

    read   (first, stop) of the first dimension -> these values, flat; of a scalar (0, 1)
    whole  in the place of `read`: all of it, which is at hand
    """

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        read: Callable[[int, int], Tensor] | None,
        whole: Callable[[], Tensor] | None = None,
    ) -> None:
        self.dtype, self.shape, self.read, self.whole = dtype, shape, read, whole

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The whole tensor for `...`, else what the slices leave of it; on the CPU.

        Of a slice of the first dimension these values alone are read.
        """
        if self.whole is not None:
            part = (data := self.whole())[index]
            return part if part.numel() == data.numel() else part.clone()
        assert self.read is not None
        shape, parts = self.shape, index if isinstance(index, tuple) else (index,)
        rows = range(shape[0] if shape else 1)
        if shape and parts and isinstance(parts[0], slice) and parts[0].step in (None, 1):
            rows = rows[parts[0]]
            shape, parts = (len(rows), *shape[1:]), (slice(None), *parts[1:])
        data = self.read(rows.start, rows.start + len(rows)).reshape(shape)
        part = data[parts]
        # a part of a larger buffer would keep all of it
        return part if part.numel() == data.numel() else part.clone()
