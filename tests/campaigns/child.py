"""A process that does what may kill it, for the campaigns."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LATE = "did not end in time"


class Child:
    """Asks a fork of this process, which is made again when it has died.

    work      what the fork does: `work(pipe, given)` answers what it receives, and ends on None
    patience  seconds for one answer
    """

    def __init__(self, work: Callable[[Connection, Any], None], given: Any, patience: float):
        self.work, self.given, self.patience = work, given, patience
        self.process: Any = None
        self.pipe: Any = None
        self.late: list[str] = []  # how it ended when nothing was asked

    def ask(self, *asked: Any) -> tuple[Any, str]:
        """The answer and "", or None and how the process ended without one."""
        if self.process is not None and not self.process.is_alive():
            self.late.append(f"process ended with {self.process.exitcode} after an answer")
            self.process = None
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, other = context.Pipe()
            # a daemon: a failure of ours does not wait for it
            self.process = context.Process(target=self.work, args=(other, self.given), daemon=True)
            self.process.start()
            other.close()
        try:
            self.pipe.send(asked)
            if self.pipe.poll(self.patience):
                return self.pipe.recv(), ""
            self.process.kill()
            how = LATE
        except (EOFError, ConnectionError):
            self.process.join()
            how = f"process ended with {self.process.exitcode}"
        self.process.join()
        self.process = None
        return None, how

    def close(self) -> list[str]:
        """Let the process end; how it ended at times when nothing was asked."""
        if self.process is not None:
            with contextlib.suppress(ConnectionError):
                self.pipe.send(None)
            self.process.join()
            if self.process.exitcode:
                self.late.append(f"process ended with {self.process.exitcode} after an answer")
        return self.late


def limit_memory(more: int) -> None:
    """Bytes of address space that this process may take beyond what it has, on Linux."""
    status = Path("/proc/self/statm")
    if status.exists():
        limit = int(status.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
