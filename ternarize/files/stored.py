"""Stored tensors read by the compiled core: each byte once, and no Python while that goes on.

The core's threads read a tensor a piece at a time, hash it, check its codes and scales, and put it
where it is wanted while the piece is near. It does so where the processor has instructions for
SHA-256 and the system can read files at a place of their own; container.py and checkpoint.py do the
same with hashlib and torch anywhere, and say what is wrong with a tensor that fails here.
"""

import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import DTYPES
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.native import lib
from ternarize.threads import THREADS, TICK, let_through
from ternarize.trits.base3 import BASE3

_WAITING, _DONE, _NO_MEMORY, _FAILED = 0, 1, 6, 8  # of `Read` in csrc/files/files.h
_MOST = 1 << 50  # bytes of a tensor that the core reads
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
    if lib is None or not lib.can_read_stored():
        return False
    if not 0 < checkpoint.tensors[name].nbytes <= _MOST:
        return False
    if record.shape is None or record.codec != BASE3:
        return record.shape is None
    scale = checkpoint.tensors[name + SCALE_SUFFIX].dtype
    if scale not in _SCALE_KINDS or (record.coded and record.planes > 1):
        return False
    # one scale for a whole matrix: of one alone
    return record.group_size != 0 or (len(record.shape) == 2 and record.planes == 1)


def as_kept(checkpoint: Checkpoint, name: str, record: Record) -> ToRead:
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

    To be used in a `with`, which begins it; at its end nothing is read any more, whatever has not
    been read by then. The same goes for `start` and `end`, and for a reading that is dropped in
    between or that the end of the process finds at work.
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
        self._failed: list[BaseException] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless there is nothing to do."""
        if not self.wanted:
            return
        table = np.array([self._row(each) for each in self.wanted], np.int64)
        for at, each in enumerate(self.wanted):  # to be given away
            memory = {(at, "out"): each.out, (at, "scales"): each.scales}
            self._memory |= {key: tensor for key, tensor in memory.items() if tensor is not None}
        self.wanted = [replace(each, out=None, scales=None) for each in self.wanted]
        paths = [os.fsencode(self.checkpoint.directory / file) for file in self._files]
        given = (paths, table, self.checked, self._states, self._digests, self._stop, self._threads)
        # the thread knows nothing of this object, which so can be dropped; it keeps the memory
        self._thread = threading.Thread(
            target=_run, args=(given, self._failed, self._memory), daemon=True
        )
        weakref.finalize(self, _end, self._stop, self._thread)  # at the end of the process, too
        self._thread.start()

    def _row(self, wanted: ToRead) -> list[int]:
        """A row of the table that the core takes: the columns of `Column` in csrc/bindings.cpp."""
        info, record, out = self.checkpoint.tensors[wanted.name], wanted.record, wanted.out
        where = [self._place(info.file), info.start, info.stored_bytes]
        if record.shape is None:
            return [*where, 0, 0, 0, 0, 0, *_memory(out), 0, 0, 0, 0, 0, 0, 0]
        scale = self.checkpoint.tensors[wanted.name + SCALE_SUFFIX]
        cols, group_size = record.shape[-1], record.group_size
        rows = info.numel // info.shape[-1] * record.planes  # those of planes follow each other
        matrix = [_FORMS[wanted.form], rows, cols, group_size, info.coded is not None]
        beside = [self._place(scale.file), scale.start, scale.stored_bytes]
        beside += [_SCALE_KINDS[scale.dtype], scale.coded is not None]
        return [*where, *matrix, *_memory(out), *beside, *_memory(wanted.scales)]

    def _place(self, file: str) -> int:
        return self._files.setdefault(file, len(self._files))

    def is_good(self, at: int) -> bool:
        """Wait for a tensor; whether it could be read and is what its record says.

        Raises MemoryError where there was none for it, and what has ended the core, if anything.
        """
        thread = self._thread
        while self._states[at] == _WAITING and thread is not None and thread.is_alive():
            let_through()
            time.sleep(_TICK)
        if self._states[at] == _WAITING and self._failed:
            raise self._failed[0]
        if self._states[at] == _NO_MEMORY:
            raise MemoryError(self.wanted[at].name)
        if self._states[at] == _FAILED:
            raise RuntimeError(f"{self.wanted[at].name}: the core has failed to read it")
        digest = self._digests[at].tobytes().hex()
        good = not self.checked or digest == self.wanted[at].record.sha256
        return bool(self._states[at] == _DONE) and good

    def take(self, at: int, which: str = "out") -> Tensor:
        """Wait for a tensor and give away its memory, "out" or "scales", once."""
        self.is_good(at)
        return self._memory.pop((at, which))

    def stop(self) -> None:
        """Leave out what has not been read, and do not wait for the core to notice."""
        self._stop[0] = 1

    def end(self) -> None:
        """Leave out what has not been read; the core is at rest when this returns."""
        if self._thread is not None:
            _end(self._stop, self._thread)

    def __enter__(self) -> "Reading":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def _run(given: tuple[Any, ...], failed: list[BaseException], memory: object) -> None:
    """What the thread does; `memory` is that of the tensors, which lives as long as it does."""
    assert lib is not None
    try:
        lib.read_stored(*given)
    except BaseException as error:  # for who waits
        failed.append(error)


def _end(stop: Any, thread: threading.Thread) -> None:
    """Have a thread of `_run` end, and wait for that, with an open ear for signals."""
    stop[0] = 1
    while thread.is_alive() and thread is not threading.current_thread():
        thread.join(TICK)
        let_through()


def _memory(tensor: Tensor | None) -> list[int]:
    """The address and the bytes of memory; of none 0."""
    if tensor is None:
        return [0, 0]
    assert tensor.is_contiguous()
    return [tensor.data_ptr(), tensor.nbytes]
