"""`ternarize chat`."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from ternarize.cli.options import (
    AsJson,
    Debug,
    Device,
    PackedArgument,
    Quiet,
    RunActivations,
    RunDtype,
    RunHead,
    RunSteps,
    SamplingSeed,
    Temperature,
    TopK,
    TopP,
)
from ternarize.cli.terminal import Terminated, advise, failed, print_json
from ternarize.errors import TernarizeError, UsageError

if TYPE_CHECKING:  # imports transformers
    from ternarize.runtime.chat import Conversation
    from ternarize.runtime.generate import Generation

NEW, EXIT = "/new", "/exit"
ANSWER_TOKENS = 512


def chat_command(
    model: PackedArgument,
    *,
    system: Annotated[str, "What the model is told before all else."] = "",
    max_new_tokens: Annotated[int, "Most tokens of an answer."] = ANSWER_TOKENS,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: SamplingSeed = None,
    activations: RunActivations = None,
    head: RunHead = None,
    steps: RunSteps = None,
    device: Device = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with a packed model that was made for chat.

    Each line is a message; the model remembers those before. /new begins anew, /exit or the end of
    the input (Ctrl-D) ends. Ctrl-C ends an answer, or drops a line. In a pipe, each line of the
    input is answered; with --json, by an object on a line.

    Example: echo "What is a trit?" | ternarize chat packed
    """
    from ternarize.models.reads import open_tokenizer
    from ternarize.runtime.chat import Conversation, opening
    from ternarize.runtime.generate import check_sampling
    from ternarize.runtime.load import load
    from ternarize.sources.checkpoint import locate

    directory = locate(model)
    tokenizer = open_tokenizer(directory)
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    start = opening(tokenizer, system)
    loaded = load(
        directory, device=device, dtype=dtype, activations=activations, head=head, steps=steps
    )
    conversation = Conversation(loaded, tokenizer, start)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    for message in _messages():
        if message == NEW:
            conversation.clear()
            continue
        forgotten = conversation.forgotten
        answer = _answer(conversation, message, as_json, options)
        if answer is None:
            continue
        lost = conversation.forgotten - forgotten
        if as_json:
            speed = {"tokens_per_second": round(answer.tokens_per_second, 3)}
            print_json({"prompt": message, **asdict(answer), **speed, "forgotten": lost})
        elif not quiet:
            told = f"{answer.new_tokens} tokens, {answer.tokens_per_second:.1f} per second"
            advise(told + (f"; the context is full, {lost} messages forgotten" if lost else ""))


def _messages() -> Iterator[str]:
    """The lines of the input that say something, without those around them, until the end."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # not there on Windows, where the terminal edits lines itself
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if terminal and sys.stdout.isatty() else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except UnicodeDecodeError:
            raise UsageError("input", "is not UTF-8", "text") from None
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) or not terminal:
                raise
            print()  # the line is dropped
            continue
        if line == EXIT:
            return
        if line:
            yield line


def _answer(
    conversation: "Conversation", message: str, as_json: bool, options: dict[str, Any]
) -> "Generation | None":
    """The answer, printed as it comes; None where, on a terminal, it was broken off or failed."""

    def stream(piece: str) -> None:
        print(piece, end="", flush=True)

    try:
        answer = conversation.answer(message, stream=None if as_json else stream, **options)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated) or not sys.stdin.isatty():
            raise
        if not as_json:
            print()
        return None
    except (TernarizeError, UnicodeEncodeError) as error:
        if not sys.stdin.isatty():
            raise
        failed(error, as_json)
        return None
    if not as_json:
        print()
    return answer
