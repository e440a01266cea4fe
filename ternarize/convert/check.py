"""What came of a conversion without data, seen at once.

Nobody may learn later that a model has been lost: rounding the weights of an ordinary model without
data can leave a perplexity of many millions. So right after such a conversion the source and what
came of it are measured side by side, as `measure.evaluate` does it, on the first TOKENS tokens of
the text that comes with the package, and each continues the same words.

The windows are fixed, and no data was used that could be among them: the figures are those of
`ternarize eval OUTPUT --source SOURCE --text default --max-tokens 2048` on the same machine. They
are stored nowhere, so that the bytes of OUTPUT depend on source and recipe alone.

It is done where both models fit into the memory that is left, in float32, and where it takes about
a minute: what the products of so many parameters take at the speed of one that is timed here, and
then what the windows that are done have taken. For anything larger there is the command.
"""

import json
import os
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ternarize.convert.limits import memory_left
from ternarize.errors import TernarizeError, is_no_memory, printable
from ternarize.files.names import RECORD
from ternarize.measure.documents import DEFAULT
from ternarize.measure.evaluate import Evaluation, open_evaluation
from ternarize.measure.language_models import LOGITS
from ternarize.measure.measured import kinds_of
from ternarize.models.configuration import in_one_line, open_config
from ternarize.models.reads import CAUSAL, SPEECH, max_positions, vocabulary_size
from ternarize.progress import Progress
from ternarize.runtime.generate import generate

TOKENS, SEQ_LEN = 2048, 256
PROMPT, CONTINUATION = "The best way to learn a language is", 24
SECONDS = 60.0  # that the windows may take


class _TooSlow(TernarizeError):
    """The windows that are done say that all of them take longer than they may."""


def check_conversion(
    output: str | Path,
    source: str | Path,
    *,
    streamed: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Measure a packed checkpoint against its source on a little text, on the CPU.

    output    directory that `convert` has made
    source    what it was made from: directory or Hub id
    streamed  the source is no longer on this disk, and is not fetched again for this
    progress  as of `evaluate`

    Returns None of what is neither a causal language model nor a text encoder with a tokenizer,
    which cannot be measured so; else plain data, in which "measured" says whether it has been:

        True    what `evaluate` returns, "seconds" that all of it took, and of a language model
                "writes": {"prompt", "source", "packed"}, the words and how each model goes on
        False   "why" it has not, and the "command" that measures, None where nothing would

    What keeps it from being measured is no error: the conversion has succeeded.
    """
    if kinds_of(output)[0] in (None, SPEECH):
        return None
    began = time.perf_counter()
    seq_len = min(SEQ_LEN, max_positions(open_config(Path(output))))
    command: str | None = _command(output, source, seq_len)
    try:
        why = "its source was streamed, and is no longer on this disk" if streamed else None
        if why is None:
            evaluation = open_evaluation(output, source, DEFAULT, seq_len, TOKENS)
            why = _too_large(evaluation, Path(output))
        if why is None:
            found = _measure_both(evaluation, Path(output), progress)
            seconds = time.perf_counter() - began
            return {"measured": True, **found, "text": DEFAULT, "seconds": seconds}
    except _TooSlow as error:
        why = str(error)
    except (TernarizeError, OSError) as error:
        why, command = printable(str(error)), None
    except (MemoryError, RuntimeError) as error:
        if not is_no_memory(error):
            raise
        why = "memory: not enough is left for both models"
    return {"measured": False, "why": why, "command": command}


def _command(output: str | Path, source: str | Path, seq_len: int) -> str:
    """What is to be typed for the same measurement."""
    words = ["ternarize", "eval", str(output), "--source", str(source), "--text", DEFAULT]
    words += ["--max-tokens", str(TOKENS)]
    words += ["--seq-len", str(seq_len)] if seq_len != SEQ_LEN else []
    return shlex.join(words)


def _too_large(evaluation: Evaluation, output: Path) -> str | None:
    """Why a model is too large to be measured here and now; None if it is not."""
    coverage = json.loads((output / RECORD).read_text("utf-8"))["coverage"]
    parameters = coverage["total"] - coverage["tied"]
    need, left = _memory(evaluation, coverage), _memory_free()
    if need > left:
        return f"memory: both models need {need / 1e9:.1f} GB, and {left / 1e9:.1f} GB are left"
    # a product takes two operations for each weight and token; experts that sleep count as well
    operations = 2 * parameters * TOKENS * len(evaluation.checkpoints)
    seconds = operations / _operations_per_second()
    if seconds > SECONDS:
        return f"time: it would take about {_minutes(seconds)} here"
    return None


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f} minutes"


def _memory(evaluation: Evaluation, coverage: dict[str, int]) -> int:
    """Bytes that both models in float32 and the logits of one batch take."""
    dense = 4 * (coverage["total"] - coverage["tied"] + coverage["kept"])
    # in run-time layouts of 2 bits, scales; and as they are stored
    packed = coverage["ternary"] // 2 + coverage["int8"] + coverage.get("int4", 0)
    models = evaluation.checkpoints
    vocabulary = max(vocabulary_size(each.config) or 1 for each in models)
    logits = 4 * evaluation.batch_size() * evaluation.seq_len * vocabulary * len(models)
    return dense + packed + logits + 8 * 4 * max(LOGITS, vocabulary)


def _memory_free() -> float:
    """Bytes that limits and the machine leave to this process; 0 where the machine does not say."""
    free = 0
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])
    if not free:  # macOS: what it has, of which other programs have a part
        with suppress(AttributeError, OSError, ValueError):
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min(free, *memory_left())


def _operations_per_second() -> float:
    """Of float32 products of the windows' shape: the best of a few, of milliseconds each."""
    rows, size = SEQ_LEN, 1024
    x, weight = torch.ones(rows, size), torch.ones(size, size)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - began)
    return 2 * rows * size * size / max(min(times), 1e-9)


def _measure_both(
    evaluation: Evaluation, output: Path, progress: Progress | None
) -> dict[str, Any]:
    """Measures, and what both models write; raises _TooSlow."""

    def in_time(done: int, total: int, known: str, stage: str) -> None:
        whole = (time.perf_counter() - started) * total / done
        if whole > 1.5 * SECONDS:
            raise _TooSlow(f"time: it would take about {_minutes(whole)} here")
        if progress is not None:
            progress(done, total, known, stage)

    models = evaluation.load("cpu", torch.float32)
    with in_one_line(
        output,
        "its forward, or its source's, fails",
        "it to run",
        "Load both, and see what they need",
        OSError,
    ):
        started = time.perf_counter()
        measures = evaluation.measure(models, None, in_time)
        found = {
            "kind": evaluation.kind,
            **evaluation.read(),
            "dtype": "float32",
            "device": "cpu",
            **measures,
        }
        if evaluation.kind == CAUSAL:
            packed, source = (_continue(model, evaluation) for model in models)
            found["writes"] = {"prompt": PROMPT, "source": source, "packed": packed}
    return found


def _continue(model: Any, evaluation: Evaluation) -> str:
    """What a model writes behind PROMPT, always the likeliest token; "" where it has no room."""
    room = max_positions(model.config) - len(evaluation.tokenizer(PROMPT)["input_ids"])
    if room < 1:
        return ""
    return generate(
        model, evaluation.tokenizer, PROMPT, max_new_tokens=min(CONTINUATION, room)
    ).text
