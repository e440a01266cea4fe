"""Stored tensors read by the compiled core: each byte once, and no Python while that goes on.

The core's threads read a tensor a piece at a time, hash it, check its codes and scales, and put it
where it is wanted while the piece is near. It does so where the processor has instructions for
SHA-256 and the system can read files at a place of their own; container.py and checkpoint.py do the
same with hashlib and torch anywhere, and say what is wrong with a tensor that fails here.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import DTYPES
from ternarize.files.json_files import readable
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.native import lib
from ternarize.threads import THREADS, let_through
from ternarize.trits.base3 import BASE3

_WAITING, _DONE, _NO_MEMORY = 0, 1, 6  # of `Read` in csrc/files/files.h
_FORMS = {"": 1, "lanes2": 2, "lanes3": 3}  # of ternary tensors; others: 0
_SCALE_KINDS = {"F16": 0, "BF16": 1, "F32": 2, "U8": 3}
_TICK = 0.0005  # seconds from one look at what the core has done to the next


@dataclass(frozen=True)
class ToRead:
    """A tensor that is to be read.

    name    in the checkpoint
    record  what its file says of it
    out     memory for it, or uint8 for the lanes of a ternary matrix; None: nothing is kept
    form    "lanes2" or "lanes3": the lanes that `out` is to hold; "": bytes as base 3 has them
    scales  of a ternary one: memory for its scales, with lanes in their order, float16 or float32
    """

    name: str
    record: Record
    out: Tensor | None = None
    form: str = ""
    scales: Tensor | None = None


def core_reads(checkpoint: Checkpoint, name: str, record: Record) -> bool:
    """Whether the core can read a tensor, hash it and check it."""
    if lib is None or not lib.can_read_stored() or not checkpoint.tensors[name].numel:
        return False
    if record.shape is None or record.codec != BASE3:
        return record.shape is None
    scale = checkpoint.tensors[name + SCALE_SUFFIX].dtype
    if scale not in _SCALE_KINDS or (record.coded and record.planes > 1):
        return False
    # one scale for a whole matrix: of one alone
    return record.group_size != 0 or (len(record.shape) == 2 and record.planes == 1)


def as_stored(checkpoint: Checkpoint, name: str, record: Record) -> ToRead:
    """A tensor that is wanted as it is stored, and decoded, in memory of its own on the CPU."""
    if record.shape is None:
        return ToRead(name, record, _empty(checkpoint, name))
    return ToRead(
        name, record, _empty(checkpoint, name), scales=_empty(checkpoint, name + SCALE_SUFFIX)
    )


def _empty(checkpoint: Checkpoint, name: str) -> Tensor:
    info = checkpoint.tensors[name]
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="cpu")


class Reading:
    """Tensors that the core reads, in their order, while the caller does something else.

    checked  whether they are hashed, and scales checked; codes always are

    To be used in a `with`, which begins it; where that ends by an exception, what has not begun is
    left out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        wanted: Sequence[ToRead],
        *,
        checked: bool = True,
        threads: int = THREADS,
    ) -> None:
        self.checkpoint, self.wanted, self.checked = checkpoint, list(wanted), checked
        self._threads, self._memory = threads, dict[tuple[int, str], Tensor]()
        self._states = np.zeros(len(wanted), np.uint8)
        self._digests = np.zeros((len(wanted), 32), np.uint8)
        self._stop = np.zeros(1, np.uint8)
        self._files: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin, unless there is nothing to do; CheckpointError where a file cannot be opened."""
        if not self.wanted:
            return
        try:
            table = np.array([self._row(each) for each in self.wanted], np.int64)
        except BaseException:
            self._close()
            raise
        self._table = table
        for at, each in enumerate(self.wanted):  # to be given away
            memory = {(at, "out"): each.out, (at, "scales"): each.scales}
            self._memory |= {key: tensor for key, tensor in memory.items() if tensor is not None}
        self.wanted = [replace(each, out=None, scales=None) for each in self.wanted]
        self._thread.start()

    def _row(self, wanted: ToRead) -> list[int]:
        """A row of the table that the core takes: the columns of `Column` in csrc/bindings.cpp."""
        info, record, out = self.checkpoint.tensors[wanted.name], wanted.record, wanted.out
        where = [self._opened(info.file), info.start, info.stored_bytes]
        if record.shape is None:
            return [*where, 0, 0, 0, 0, 0, *_memory(out), 0, 0, 0, 0, 0, 0, 0]
        scale = self.checkpoint.tensors[wanted.name + SCALE_SUFFIX]
        cols, group_size = record.shape[-1], record.group_size
        rows = info.numel // info.shape[-1] * record.planes  # those of planes follow each other
        matrix = [_FORMS[wanted.form], rows, cols, group_size, info.coded is not None]
        beside = [self._opened(scale.file), scale.start, scale.stored_bytes]
        beside += [_SCALE_KINDS[scale.dtype], scale.coded is not None]
        return [*where, *matrix, *_memory(out), *beside, *_memory(wanted.scales)]

    def _opened(self, file: str) -> int:
        path = self.checkpoint.directory / file
        if file not in self._files:
            with readable(path):
                self._files[file] = os.open(path, os.O_RDONLY)
        return self._files[file]

    def _run(self) -> None:
        assert lib is not None
        try:
            lib.read_stored(
                self._table, self.checked, self._states, self._digests, self._stop, self._threads
            )
        finally:
            self._close()

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def is_good(self, at: int) -> bool:
        """Wait for a tensor; whether it could be read and is what its record says.

        Raises MemoryError where there was none for it.
        """
        while self._states[at] == _WAITING and self._thread.is_alive():
            let_through()
            time.sleep(_TICK)
        if self._states[at] == _NO_MEMORY:
            raise MemoryError(self.wanted[at].name)
        digest = self._digests[at].tobytes().hex()
        good = not self.checked or digest == self.wanted[at].record.sha256
        return bool(self._states[at] == _DONE) and good

    def take(self, at: int, which: str = "out") -> Tensor:
        """Wait for a tensor and give away its memory, "out" or "scales", once."""
        self.is_good(at)
        return self._memory.pop((at, which))

    def stop(self) -> None:
        """Leave out what has not begun."""
        self._stop[0] = 1

    def __enter__(self) -> "Reading":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _memory(tensor: Tensor | None) -> list[int]:
    """The address and the bytes of memory; of none 0."""
    if tensor is None:
        return [0, 0]
    assert tensor.is_contiguous()
    return [tensor.data_ptr(), tensor.nbytes]
