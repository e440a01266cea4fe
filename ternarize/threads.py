"""Work in threads that ends in order when a signal comes.

A handler of a signal that raises does so wherever the main thread is. If that is between taking a
lock of `concurrent.futures` and the code that will give it back, the lock stays taken: a worker
waits for it for ever, and at its end the main thread for the worker. So signals are held while
threads are waited for, and let through where no lock is taken.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# processors that this process may use: threads where nobody says how many
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TICK = 0.1  # seconds that a signal may have to wait
# what asks a program to end, where the system has it: Ctrl-C, kill, a terminal that is closed
ENDING = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__
)

_handlers: dict[int, Any] = {}  # of the signals that are held
_came: list[int] = []
_raised = False  # whether the handler of one of them has raised
_ending = False  # whether the threads know of it


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for when nothing has begun yet, or all is done: nothing is to be put in order."""
    with contextlib.suppress(OSError):  # where nobody listens
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def is_ours(number: int) -> bool:
    """Whether a signal does what it does by itself, or what we have set: not what others asked for.

    A shell starts programs in the background with SIGINT ignored, nohup with SIGHUP, and they mean
    it.
    """
    ours = (signal.SIG_DFL, signal.default_int_handler, end_at_once)
    return signal.getsignal(number) in ours


def restore_signals(handlers: Mapping[int, Any]) -> None:
    """Put handlers back: all of them, also where a signal raises in between."""
    for number, handler in handlers.items():
        rest = {other: each for other, each in handlers.items() if other != number}
        try:
            signal.signal(number, handler)
        finally:
            restore_signals(rest)
        return


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep signals that end a program back until the end, or until `let_through`.

    Only those that have a handler in Python, and in the main thread. It can be nested.
    """
    global _raised, _ending
    if threading.current_thread() is not threading.main_thread() or _handlers:
        yield
        return
    _raised = _ending = False
    _came.clear()
    try:
        for number in ENDING:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not _hold:
                _handlers[number] = handler
                signal.signal(number, _hold)
        yield
    finally:
        before = dict(_handlers)
        _handlers.clear()
        try:
            restore_signals(before)
        finally:
            _run(before)


def _hold(number: int, frame: FrameType | None) -> None:
    if _ending and number in _handlers:
        _handlers[number](number, frame)
    else:
        _came.append(number)


def _run(handlers: Mapping[int, Any]) -> None:
    """Run the handler of each signal that has come, once, however often it has."""
    came = list(dict.fromkeys(_came))
    _came.clear()
    for number in came:
        handlers[number](number, None)


def signals_came() -> bool:
    """Whether there are signals that are held."""
    return bool(_came)


def let_through() -> None:
    """Run the handlers of signals that have come and are held; they may raise."""
    global _raised
    if threading.current_thread() is threading.main_thread() and _came and _handlers:
        _raised = True
        _run(_handlers)
        _raised = False


def result_of(future: "Future[_Result]") -> _Result:
    """Wait for a result, with an open ear for signals."""
    let_through()
    while not future.done():
        wait([future], TICK)
        let_through()
    return future.result()


@contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for work that is waited for with `result_of`, or with `wait` and `let_through`.

    Signals are held in it. After an exception, what has not begun is left out. If a signal has
    raised it, those that come while the rest ends are no longer held: who asks twice does not want
    to wait.
    """
    global _ending
    with signals_held(), ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _ending = _ending or _raised
            raise


def in_threads(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    threads: int,
    done: Callable[[_Result], None] | None = None,
) -> list[_Result]:
    """[function(item) for item in items], in so many threads.

    done  called with each result, in their order

    The first exception is raised, and what has not begun by then is left out.
    """
    results = []
    with thread_pool(threads) as pool:
        for future in [pool.submit(function, item) for item in items]:
            results.append(result_of(future))
            if done:
                done(results[-1])
    return results
