"""Tensors that a file holds as streams of `trits/rans.py`, and what they are once they are read.

A ternary tensor is stored so, and its scales with it or not; formats/rans.md is the definition.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ternarize.files.headers import DTYPES, read_bytes
from ternarize.threads import THREADS
from ternarize.trits.rans import classes_of_items, classes_of_trits, decode_rows, least_bytes


@dataclass(frozen=True)
class Coded:
    """What a stream holds.

    dtype, shape  of the tensor; its rows are those of the stream
    trits         of packed rows: columns, group size, planes; None of scales
    """

    dtype: str
    shape: tuple[int, ...]
    trits: tuple[int, int, int] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] * DTYPES[self.dtype].itemsize

    @property
    def least(self) -> int:
        """Bytes that a stream for it has at least."""
        return least_bytes(math.prod(self.shape[:-1]), self.row_bytes)

    def classes(self) -> Tensor:
        """The classes of the bytes of a row."""
        if self.trits is not None:
            return classes_of_trits(*self.trits)
        return classes_of_items(self.shape[-1], DTYPES[self.dtype].itemsize)

    def read(
        self,
        path: Path,
        start: int,
        nbytes: int,
        first: int = 0,
        stop: int | None = None,
        threads: int = THREADS,
    ) -> Tensor:
        """Rows [first, stop) of the tensor, counted through a stack: (rows, cols) of its dtype.

        start, nbytes  of the stream in the file

        Raises FormatError where it is damaged.
        """
        shape = math.prod(self.shape[:-1]), self.row_bytes
        rows = decode_rows(
            lambda at, size: read_bytes(path, start + at, size),
            nbytes,
            shape,
            self.classes(),
            first,
            stop,
            threads,
        )
        return rows.view(DTYPES[self.dtype])
