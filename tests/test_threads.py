"""Threads end in order when a signal comes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch

from ternarize.native import lib
from ternarize.threads import in_threads, let_through, signals_held
from ternarize.trits.base3 import pack


@pytest.fixture
def seen() -> Iterator[list[int]]:
    """The signals whose handler has run."""
    found: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, before)


def test_a_signal_is_held_until_it_is_let_through(seen: list[int]) -> None:
    with signals_held():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not seen
        with signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
        assert not seen, "the outer one holds them still"
        let_through()
        assert seen == [signal.SIGTERM], "once, however often it came"
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(seen) == 2


def test_handlers_are_as_before_also_after_an_error(seen: list[int]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), signals_held():
        os.kill(os.getpid(), signal.SIGINT)
        let_through()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    let_through()


def test_who_asks_again_and_again_does_not_wait_and_leaves_nothing_behind() -> None:
    def often(n: int) -> None:
        time.sleep(0.3)

    for wait in (0.05, 0.2, 0.25):
        threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)).start()
    raised = 0
    for _ in range(3):  # the later ones come out of the wait, or after it
        try:
            in_threads(often, range(2), 1)
            time.sleep(0.2)
        except KeyboardInterrupt:
            raised += 1
    assert raised >= 1
    assert in_threads(str, range(3), 2) == ["0", "1", "2"]


def test_a_second_signal_at_once_leaves_no_work_running() -> None:
    leave = contextlib._GeneratorContextManager.__exit__.__code__
    running, sent = set[int](), list[int]()

    def work(n: int) -> None:
        running.add(n)
        time.sleep(0.1)
        running.remove(n)

    def second(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is leave and not sent:
            sent.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def first(_: None) -> None:
        signal.raise_signal(signal.SIGINT)
        sys.setprofile(second)

    try:
        in_threads(work, range(50), 2, first)
    except KeyboardInterrupt:
        sys.setprofile(None)
        assert sent
        assert not running
    else:
        pytest.fail("no signal came through")


def test_in_another_thread_nothing_is_held(seen: list[int]) -> None:
    def work() -> None:
        with signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            let_through()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIGTERM]


def test_results_come_in_order_and_the_first_error_ends_all() -> None:
    told: list[int] = []
    assert in_threads(lambda n: n * n, range(50), 4, told.append) == [n * n for n in range(50)]
    assert told == [n * n for n in range(50)]
    begun: list[int] = []

    def fail(n: int) -> None:
        begun.append(n)
        time.sleep(0.01)
        if n == 3:
            raise ValueError(n)

    with pytest.raises(ValueError, match="3"):
        in_threads(fail, range(1000), 2)
    assert len(begun) < 500, "what had not begun was done nevertheless"


def test_a_signal_ends_a_wait_for_threads() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_threads(lambda _: time.sleep(0.5), range(100), 2)
    assert time.monotonic() - started < 5


def test_no_module_waits_for_threads_in_its_own_way() -> None:
    """`with ThreadPoolExecutor` alone can hang after Ctrl-C; see ternarize/threads.py."""
    modules = (Path(__file__).parents[1] / "ternarize").rglob("*.py")
    found = [path.name for path in modules if "ThreadPoolExecutor(" in path.read_text("utf-8")]
    assert found == ["threads.py"], "thread_pool is for it"


CODE = """
import signal, sys, threading, time
from ternarize.threads import in_threads
signal.signal(signal.SIGINT, signal.default_int_handler)

def trace(frame, event, _):  # a signal while the main thread has just taken the lock of a result
    owner = frame.f_back.f_code.co_filename if frame.f_back else ""
    taken = event == "return" and owner.endswith("_base.py")
    if frame.f_code is threading.Condition.__enter__.__code__ and taken:
        sys.settrace(None)
        signal.raise_signal(signal.SIGINT)
    return trace

sys.settrace(trace)
try:
    in_threads(lambda n: time.sleep(0.05), range(20), 2)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_signal_while_a_lock_is_taken_does_not_leave_threads_waiting() -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n", done.stderr[-2000:]


@pytest.mark.skipif(lib is None, reason="without the compiled core")
def test_no_signal_is_lost_while_the_core_is_given_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """nanobind would clear what the method raises by which it asks tensors for their memory."""
    assert lib is not None
    asked: list[object] = []
    monkeypatch.setattr(torch.Tensor, "__dlpack__", lambda *given, **_: asked.append(given))
    pack(torch.ones(3, 20, dtype=torch.int8), -1)
    assert not asked
    taking = [each for each in vars(lib).values() if "ndarray" in (each.__doc__ or "")]
    assert len(taking) > 15 and all(hasattr(each, "__wrapped__") for each in taking)
