"""What goes to the terminal: results on stdout, and on stderr errors, advice and a bar."""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from ternarize.errors import REMEDY, TernarizeError, UsageError, is_no_memory, printable
from ternarize.progress import Progress
from ternarize.threads import signals_held

err = Console(stderr=True)
LINE_EVERY = 60.0  # seconds between lines of progress where there is no terminal


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: as Ctrl-C, so that locks are released and what is done is kept."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


def interrupted(stop: KeyboardInterrupt, words: str) -> typer.Exit:
    """Say what is interrupted; the exit that ends the command, with the code of its signal."""
    with suppress(OSError):  # where nobody looks any more
        err.print(f"interrupted{words}", soft_wrap=True)
    return typer.Exit(128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT))


def failed(error: Exception, as_json: bool = False, **besides: Any) -> typer.Exit:
    """Tell an error on stderr, in one line, and with `as_json` on stdout, in its parts.

    besides  what the object on stdout has beside them

    Returns the exit that ends the command. An error that no user can cause is raised again.
    """
    told = _in_our_words(error)
    if told is None:
        raise error
    err.print(f"[bold red]error:[/] {shown(told)}", soft_wrap=True, highlight=False)
    if as_json:
        parts = {name: getattr(told, name) for name in ("where", "found", "expected", "remedy")}
        parts = {"class": type(error).__name__, **parts, "message": str(told)}
        print_json({**besides, "error": parts})
    return typer.Exit(2 if isinstance(told, UsageError) else 1)


def _in_our_words(error: Exception) -> TernarizeError | None:
    """An error that a user can cause, one of the system too; None of any other."""
    if isinstance(error, TernarizeError):
        return error
    if isinstance(error, OSError):
        found = str(error.strerror if error.filename else error)
        remedy = f"{REMEDY.get(error.errno or 0, 'Look after it')}, then try again"
        return TernarizeError(error.filename or "system", found, remedy=remedy)
    if isinstance(error, UnicodeEncodeError):
        text = f"{error.object[:80]!r}"
        if "surrogates" in error.reason:
            return UsageError(text, "is not UTF-8", "text", "Check the terminal")
        found = f"cannot be shown in {error.encoding}"
        return TernarizeError(text, found, "a terminal that can", "Set PYTHONIOENCODING=utf-8")
    if is_no_memory(error):
        found = f"not enough is left ({printable(str(error))[:200]})"
        return TernarizeError("memory", found, remedy="Ask for less at once, or make room")
    return None


def shown(text: object) -> str:
    """What a file or a user has written, to be printed among our own words."""
    return escape(printable(str(text)))


def advise(text: str) -> None:
    """A hint, as it is."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def stdout() -> Console:
    """Where results go; in a pipe tables are as wide as they need to be, so nothing is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def print_json(value: Any) -> None:
    """One JSON object on stdout; numbers that JSON cannot hold (infinity) become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(each) for key, each in item.items()}
        if isinstance(item, list):
            return [finite(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(finite(value), allow_nan=False))


def in_bytes(size: float) -> str:
    """A size in words: 512 B, 1.50 kB, 2.08 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def in_figures(value: float) -> str:
    """A number that may be of any size: 38.46, 67,000,000, 1.3e+40, inf."""
    if value < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value < 1e15 else f"{value:.3g}"


def _in_lines() -> Progress:
    """What tells in a log how far long work is: nothing of what is done within a minute."""
    told = time.monotonic()

    def update(done: int, total: int, text: str, stage: str) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= LINE_EVERY:
            told = now
            share = f"{100 * done / total:.0f} %" if total else "0 %"
            print(printable(f"{stage} {share} {text}"), file=sys.stderr, flush=True)

    return update


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr with the time left; where stderr is no terminal, a line now and then.

    Where the stage or the total changes, or less is done than before, the bar and its clock start
    afresh.
    """
    if quiet or not err.is_terminal:
        yield None if quiet else _in_lines()
        return
    from rich import progress as bars

    bar = bars.Progress(
        bars.TextColumn("{task.fields[stage]}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
        console=err,
        transient=True,
        speed_estimate_period=300,  # the groups of a block go at speeds of their own
    )
    with signals_held():
        bar.start()
    try:
        task = bar.add_task("", total=None, stage="reading")
        latest: tuple[str, int, int] = ("", 0, 0)

        def update(done: int, total: int, text: str, stage: str) -> None:
            nonlocal latest
            with signals_held():  # the bar draws itself in a thread
                if latest[:2] != (stage, total) or done < latest[2]:
                    bar.reset(
                        task, total=total, completed=done, description=shown(text), stage=stage
                    )
                else:
                    bar.update(task, completed=done, description=shown(text))
            latest = stage, total, done

        yield update
    finally:
        with signals_held(), suppress(OSError):  # of a terminal that is closed
            bar.stop()
