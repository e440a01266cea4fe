"""The program: its commands, and what all of them do about signals, errors and other libraries.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 usage,
130 interrupted, 143 terminated, 129 its terminal closed.
"""

import functools
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer

from ternarize.cli.bench import bench_command
from ternarize.cli.chat import chat_command
from ternarize.cli.convert import convert_command
from ternarize.cli.evaluate import evaluate_command
from ternarize.cli.export import export_command
from ternarize.cli.generate import generate_command
from ternarize.cli.inspect_command import inspect_command
from ternarize.cli.options import as_given, for_typer
from ternarize.cli.patches import apply_command, diff_command
from ternarize.cli.push import push_command
from ternarize.cli.recode import recode_command
from ternarize.cli.serve import serve_command
from ternarize.cli.steps import STEP_COMMANDS
from ternarize.cli.terminal import Terminated, err, failed, interrupted
from ternarize.cli.train import train_command
from ternarize.cli.verify import verify_command
from ternarize.threads import ENDING, is_ours, restore_signals
from ternarize.version import __version__

COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert_command,
    "train": train_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "eval": evaluate_command,
    "export": export_command,
    "generate": generate_command,
    "chat": chat_command,
    "serve": serve_command,
    "bench": bench_command,
    "push": push_command,
    "recode": recode_command,
    "diff": diff_command,
    "apply": apply_command,
}
RESUMABLE = ("convert", "train", "push", "steps train")
_LIKE: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(name="ternarize", **_LIKE)
steps = typer.Typer(name="steps", help="Keep the steps of a training instead of weights.", **_LIKE)


def _terminate(number: int, frame: object) -> None:
    raise Terminated(number)


def _once(handler: Callable[[int, object], None]) -> Callable[[int, object], None]:
    """A handler that acts on the first signal alone: a terminal that closes may send several."""
    came = False

    def act(number: int, frame: object) -> None:
        nonlocal came
        if not came:
            came = True
            handler(number, frame)

    return act


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, signals that end a program are exceptions, which put in order what has begun.

    torch is imported before: its C++ loses what is raised while it imports, or aborts on it.
    """
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    handlers: dict[int, Any] = dict.fromkeys(ENDING, _once(_terminate))
    handlers |= {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    before: dict[int, Any] = {}
    try:
        for number, handler in handlers.items():
            # only a main thread may; elsewhere the program that we are in decides
            if threading.current_thread() is threading.main_thread() and is_ours(number):
                before[number] = signal.getsignal(number)
                signal.signal(number, handler)
        yield
    finally:
        restore_signals(before)


@contextmanager
def _others_quiet() -> Iterator[None]:
    """Inside, other libraries leave the terminal to us: of what they say only errors come through.

    They warn with Python's warnings (whatever filters they set), with loggers, and in torch's C++,
    which reads what it may say when it is imported. transformers draws bars of its own, too; those
    of downloads stay.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.showwarning = lambda *args, **kwargs: None
        logging.disable(max(disabled, logging.WARNING))
        try:
            from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
            from transformers.utils import logging as theirs

            downloads = not are_progress_bars_disabled()
            theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
            if downloads:
                enable_progress_bars()
            yield
        finally:
            logging.disable(disabled)


def register(name: str, function: Callable[..., None]) -> None:
    """Make a function a command, whose errors become a line on stderr and an exit code."""

    @functools.wraps(function)
    def run(**options: Any) -> None:
        debug, as_json = options.get("debug"), options.get("as_json", False)
        if options.get("quiet") or not err.is_terminal:  # read when the client is imported
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            with nullcontext() if debug else _others_quiet(), _interruptible():
                function(**{option: as_given(value) for option, value in options.items()})
        except Exception as error:
            if debug:
                raise
            raise failed(error, as_json) from None
        except KeyboardInterrupt as stop:
            words = "; the same command goes on from here" if name in RESUMABLE else ""
            raise interrupted(stop, words) from None

    group, _, own = name.rpartition(" ")
    (steps if group else app).command(own)(for_typer(function, run))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def ternarize(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Convert Hugging Face models to ternary weights {-1, 0, +1} x scale, and run them."""


app.add_typer(steps)
for _name, _function in {**COMMANDS, **{f"steps {n}": f for n, f in STEP_COMMANDS.items()}}.items():
    register(_name, _function)

if __name__ == "__main__":
    app()
