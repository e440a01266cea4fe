"""A journal that is written on, record by record, by one process at a time."""

import os
from contextlib import ExitStack
from pathlib import Path

from ternarize.errors import OutputError
from ternarize.files.outputs import cannot_make, locked, name_beside, write_at, write_whole
from ternarize.steps.journal import (
    MOST_STEPS,
    JournalEntry,
    JournalHeader,
    Mark,
    Step,
    entry_bytes,
    journal_header,
    read_journal,
)
from ternarize.threads import signals_held

_REMEDY = "Name another file"


class Appender:
    """A journal that is written on: each record at once and whole.

    path     of the file; one that is there goes on behind its last whole record
    journal  what is in it when it is opened

    Raises OutputError where it is the journal of another start, or another process writes it.
    """

    def __init__(self, path: str | Path, header: JournalHeader) -> None:
        self._path = path = Path(path)
        self._lock = ExitStack()
        self._lock.enter_context(
            locked(name_beside(path, ".lock"), path, "another process is writing it", _REMEDY)
        )
        try:
            if not path.exists():
                self._begin(header)
            self.journal = read_journal(path)
            if self.journal.header != header:
                raise OutputError(
                    path,
                    "is the journal of another seed or start",
                    "one of the same, to go on with",
                    "Name another file",
                )
            self._file = path.open("r+b", buffering=0)
            self._size = self.journal.size
            self._steps = len(self.journal.steps)
            self._file.truncate(self._size)
        except BaseException:
            self._lock.close()
            raise

    def _begin(self, header: JournalHeader) -> None:
        try:
            write_whole(self._path, journal_header(header), f".{os.getpid()}")
        except OSError as error:
            raise cannot_make(self._path, error, _REMEDY) from None

    def append(self, *entries: JournalEntry) -> None:
        """Add records at once; a digest is on the disk, with all before it, when this returns."""
        data = b"".join(map(entry_bytes, entries))
        steps = self._steps + sum(isinstance(entry, Step) for entry in entries)
        if steps > MOST_STEPS:
            raise OutputError(
                self._path, f"has {MOST_STEPS} steps", "fewer", "Fork it, or begin another"
            )
        with signals_held():
            try:
                write_at(self._file, self._size, memoryview(data))
            except OSError:
                self._file.truncate(self._size)  # half a record would be damage behind the next
                raise
            self._size, self._steps = self._size + len(data), steps
        if any(isinstance(entry, Mark) for entry in entries):
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
            self._lock.close()
