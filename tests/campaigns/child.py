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

    def ask(self, *asked: Any) -> tuple[Any, str]:
        """The answer and "", or None and how the process ended without one."""
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=self.work, args=(other, self.given))
            self.process.start()
            other.close()
        try:
            if not self.process.is_alive():
                raise EOFError  # after its last answer
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

    def close(self) -> str:
        """Let the process end; "", or how it ended instead."""
        if self.process is None:
            return ""
        with contextlib.suppress(ConnectionError):
            self.pipe.send(None)
        self.process.join()
        code = self.process.exitcode
        return f"process ended with {code} after its last answer" if code else ""


def limit_memory(more: int) -> None:
    """Bytes of address space that this process may take beyond what it has, on Linux."""
    status = Path("/proc/self/statm")
    if status.exists():
        limit = int(status.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
