"""The command line: parse, call one function, print.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 usage,
130 interrupted, 143 terminated. Everything slow (torch, transformers) is imported by the command
that needs it.
"""

import functools
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ternarize.errors import REMEDY, TernarizeError, UsageError, is_no_memory, printable
from ternarize.progress import Progress
from ternarize.threads import is_ours, restore_signals, signals_held
from ternarize.version import __version__

app = typer.Typer(
    name="ternarize",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True)
Command = TypeVar("Command", bound=Callable[..., None])


class Method(StrEnum):
    absmean = "absmean"
    twn = "twn"
    itf = "itf"
    gptq = "gptq"


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Activations(StrEnum):
    none = "none"
    int8 = "int8"


class End(StrEnum):
    keep = "keep"
    int8 = "int8"
    ternary = "ternary"


class RunEnd(StrEnum):
    int8 = "int8"


class Target(StrEnum):
    gguf = "gguf"
    dense = "dense"
    bitnet = "bitnet"
    gemma_int2 = "gemma-int2"
    mlx = "mlx"


class GgufType(StrEnum):
    tq2_0 = "tq2_0"
    tq1_0 = "tq1_0"
    q2_0 = "q2_0"


class KeptType(StrEnum):
    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"
    q8_0 = "q8_0"


Model = Annotated[str, typer.Argument(help="Checkpoint directory, or Hub id user/name@revision.")]
Packed = Annotated[
    str, typer.Argument(help="Packed checkpoint: directory, or Hub id user/name@revision.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no hints.")]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show the traceback of an error, and what other libraries warn of."
    ),
]
Device = Annotated[str | None, typer.Option(help="Where to run, e.g. cpu or cuda.")]
RunDtype = Annotated[Dtype | None, typer.Option(help="Dtype to compute in.")]
RunActivations = Annotated[
    Activations | None, typer.Option(help="Activations; default: as recorded in the checkpoint.")
]
RunHead = Annotated[
    RunEnd | None,
    typer.Option(help="Round an output head that was kept; default: as in the checkpoint."),
]


class Terminated(KeyboardInterrupt):
    """SIGTERM came: as Ctrl-C, so that locks are released and what is done is kept."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are exceptions, which put in order what has begun.

    torch is imported before: its C++ loses what is raised while it imports, or aborts on it.
    """
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
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


def command(function: Command) -> Command:
    """Register a command whose errors become one line on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = kwargs.get("debug")
        if kwargs.get("quiet") or not err.is_terminal:  # read when the client is imported
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            with nullcontext() if debug else _others_quiet(), _interruptible():
                function(*args, **kwargs)
        except Exception as error:
            known = None if debug else _in_one_line(error)
            if known is None:
                raise
            what, code = known
            err.print(f"[bold red]error:[/] {shown(what)}", soft_wrap=True, highlight=False)
            raise typer.Exit(code) from None
        except KeyboardInterrupt as stop:
            resumable = function.__name__ in ("convert", "push")
            err.print("interrupted" + "; the same command goes on from here" * resumable)
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None

    app.command(name=function.__name__.rstrip("_"))(run)
    return function


def _in_one_line(error: Exception) -> tuple[str, int] | None:
    """What is printed of an error that a user can cause, and the exit code; None of any other."""
    if isinstance(error, TernarizeError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        what += f". {REMEDY.get(error.errno or 0, 'Look after it')}, then try again."
        return printable(what), 1
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"{error.object[:80]!r} is not UTF-8; expected text. Check the terminal.", 2
    if isinstance(error, UnicodeEncodeError):
        what = f"{error.object[:80]!r} cannot be shown in {error.encoding}; expected a terminal "
        return what + "that can. Set PYTHONIOENCODING=utf-8.", 1
    if is_no_memory(error):
        what = f"memory: not enough is left ({printable(str(error))[:200]})."
        return f"{what} Ask for less at once, or make room.", 1
    return None


def shown(text: object) -> str:
    """What a file or a user has written, to be printed among our own words."""
    return escape(printable(str(text)))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Convert Hugging Face models to ternary weights {-1, 0, +1} x scale, and run them."""


@command
def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Directory to make; must not exist.")],
    method: Annotated[
        Method | None,
        typer.Option(
            help="How weights become trits; gptq calibrates. Default: absmean, with --dataset gptq."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights per scale; -1: one group per row; 0: one scale per tensor. Default: 128; "
            "of weights that are ternary already their own."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Leave tensors that match this glob as they are.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Ternarize linear weights that match this glob, kept by default."),
    ] = None,
    scale_bits: Annotated[int, typer.Option(help="Bits of a scale: 16 or 8.")] = 16,
    planes: Annotated[
        list[str] | None,
        typer.Option(help="Make tensors that match this glob the sum of two ternary ones."),
    ] = None,
    head: Annotated[
        End | None,
        typer.Option(
            help="What becomes of the output head. Default: keep; ternary if the source has it in "
            "2 bits."
        ),
    ] = None,
    embeddings: Annotated[
        End | None,
        typer.Option(
            help="What becomes of the token embedding; if tied to the head, of both. Default: as "
            "of the head."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of kept weights; default: as in the source.")
    ] = None,
    activations: Annotated[
        Activations | None,
        typer.Option(
            help="Recorded for the loader: int8 per token, or none. Default: none; of imported "
            "models what they were trained with."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibrate on texts: a .txt, .jsonl, .json or .parquet file, a directory of them, "
            "or a Hub dataset; self: what the model writes; default: a text that comes with "
            "ternarize."
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Samples to calibrate on; default: 256.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a sample; default: what the model takes, at most 512."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the choice of samples, of rotation and training; default: 0."),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the texts; default: text or messages.")
    ] = None,
    rotation: Annotated[
        int | None,
        typer.Option(
            help="Largest block of the rotation of inputs, a power of 4; 0: none; default: 256."
        ),
    ] = None,
    reconstruct: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="Steps of training for each block; default: 0."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Blocks to train together, 1 to 4; default: 1.")
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Steps of training for the whole model, with all of it in memory; default: 0.",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Bits per ternary weight, spent where they matter most."),
    ] = None,
    min_quality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Fail unless samples put aside give at most this perplexity, perplexity_ratio or "
            "kl_divergence, or at least this top1_agreement or cosine.",
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Fetch a Hub model shard by shard, and delete each shard once it is packed.",
        ),
    ] = False,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Convert a source that lacks weights of its model; loading makes them up.",
        ),
    ] = False,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors worked on at once.")] = None,
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check", help="Do not measure what came of a conversion without data, nor run it."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint into a packed ternary one.

    Linear weights in the repeated blocks of the model become ternary; the rest is kept, and
    --dry-run says why. With --dataset they are fitted, block by block, to what the model does on
    those texts, and the result is measured on texts put aside. Interrupted, the same command goes
    on; OUTPUT appears when all of it is verified.

    Without data, a language model or text encoder that fits into memory beside its source is then
    measured against it on a little text, where that takes about a minute; of larger ones the
    command that does it is printed. The figures are printed alone (with --json as "check"), and
    not taken with --no-check or -q.

    Example: ternarize convert examples/tiny-llama packed --method itf

    Example: ternarize convert examples/tiny-llama fitted --dataset default --num-samples 8
    """
    options: dict[str, Any] = {
        "num_samples": num_samples,
        "seq_len": seq_len,
        "seed": seed,
        "text_column": text_column,
        "rotation": rotation,
        "reconstruct": reconstruct,
        "window": window,
        "distill": distill,
        "target_bpw": target_bpw,
    }
    given = {name: value for name, value in options.items() if value is not None}
    chosen = method or (Method.gptq if dataset is not None else Method.absmean)
    if chosen != Method.gptq:
        asked = [*(["dataset"] if dataset is not None else []), *given]
        _refuse_calibration([*asked, *(["min_quality"] if min_quality else [])], method)
    if (window or 1) > 1 and not reconstruct:
        raise UsageError(
            "--window",
            f"{window} blocks to train together, without training",
            "--reconstruct STEPS with it",
            "Add it, or leave out --window",
        )
    from ternarize.convert.run import check_bounds, checked
    from ternarize.convert.run import convert as run
    from ternarize.plans.plan import make_plan
    from ternarize.plans.recipe import Calibrate, Recipe
    from ternarize.threads import THREADS

    recipe = Recipe(
        chosen.value,
        group_size,
        tuple(keep or ()),
        tuple(include or ()),
        dtype.value if dtype else None,
        activations.value if activations else None,
        scale_bits,
        tuple(planes or ()),
        head.value if head else None,
        embeddings.value if embeddings else None,
        Calibrate("default" if dataset is None else dataset, **given)
        if chosen == Method.gptq
        else None,
    )
    bounds = _bounds(min_quality or [])
    check_bounds(recipe, bounds)
    if dry_run:
        work = make_plan(model, recipe, config_only=True)
        try:
            work = checked(work, allow_missing)
        except TernarizeError:  # of which the plan tells the reasons
            _print_plan(work, as_json)
            raise
        _print_plan(work, as_json)
        return
    if recipe.calibrate is not None:
        device = device or _fastest_device(quiet)
    with _progress(quiet) as update:
        record = run(
            model,
            output,
            recipe,
            threads=threads or THREADS,
            device=device,
            progress=update,
            min_quality=bounds,
            stream=stream,
            allow_missing=allow_missing,
        )
    wanted = not (quiet or no_check)
    if as_json:
        measured = {"check": _check(record, model, output, stream)} if wanted else {}
        _print_json({"output": str(output), **record, **measured})
        return
    from ternarize.measure.report import inspect as describe

    report = describe(output)
    _print_totals(report)
    _print_calibration(report)
    if not quiet:
        for note in record["notes"]:
            err.print(f"note: {printable(note)}", highlight=False, markup=False, soft_wrap=True)
        found = _check(record, model, output, stream) if wanted else None
        _print_check(found)
        _hint(model, output, report, found)


def _check(
    record: dict[str, Any], model: str, output: Path, streamed: bool
) -> dict[str, Any] | None:
    """What `ternarize.check` finds where weights were rounded without data; else None."""
    rows = record.get("tensors", {}).values()
    methods = {row["method"] for row in rows if row["becomes"] == "ternary"}
    if "calibration" in record or not methods - {"lossless"}:
        return None
    from ternarize.convert.check import check

    try:
        with _progress(quiet=False) as update:
            return check(output, model, streamed=streamed, progress=update)
    except KeyboardInterrupt as stop:  # of what is no part of the conversion
        err.print(f"interrupted while measuring; {shown(output)} is complete", soft_wrap=True)
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None


def _refuse_calibration(asked: list[str], method: Method | None) -> None:
    """Raise UsageError for options of calibration beside a method that has none."""
    if not asked:
        return
    option = "--" + asked[0].replace("_", "-")
    if method is None:
        raise UsageError(
            option,
            "is for calibration, which nothing asks for",
            "--dataset with it",
            "Add --dataset default or a text of your own",
        )
    raise UsageError(
        option,
        f"is for calibration, and --method {method.value} uses no data",
        "--method gptq with it",
        f"Change the method, or leave out {option}",
    )


def _bounds(asked: list[str]) -> dict[str, float]:
    """The values of --min-quality: ["kl_divergence=0.2"] -> {"kl_divergence": 0.2}."""
    bounds: dict[str, float] = {}
    for each in asked:
        name, _, text = each.partition("=")
        if name in bounds:
            raise UsageError(
                "--min-quality", f"{name} is given twice", "one bound for it", "Leave one out"
            )
        try:
            bounds[name] = float(text)
        except ValueError:
            raise UsageError(
                "--min-quality",
                f"{each!r}",
                "NAME=VALUE with a number",
                "Write for instance kl_divergence=0.2",
            ) from None
    return bounds


def _fastest_device(quiet: bool) -> str:
    """Where to calibrate when nothing is asked for: on a GPU if there is one."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if not quiet:
        name = torch.cuda.get_device_name()
        err.print(f"calibrating on cuda ({name}); --device cpu for the processor", highlight=False)
    return "cuda"


@command
def inspect(
    model: Packed,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the errors to this image (.png, .svg, .pdf); needs matplotlib."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a packed checkpoint holds: shape, method, bits, sparsity, error of each tensor.

    Of a calibrated one also the errors of its blocks before and after, and its quality.

    Example: ternarize inspect packed
    """
    from ternarize.measure import report as reports

    report = reports.inspect(model)
    if plot is not None:
        reports.plot(report, plot)
    if as_json:
        _print_json(report)
        return
    _print_tensors(report)
    _print_totals(report)
    _print_calibration(report)


@command
def verify(
    model: Packed,
    source: Annotated[
        str | None, typer.Option(help="Compare every tensor with what this source gives.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every byte of a packed checkpoint; with --source, that it is what the source gives.

    The source is converted again. Weights that were calibrated are compared by their error on
    record, since the data is not needed for that.

    Example: ternarize verify packed --source examples/tiny-llama
    """
    from ternarize.convert.verify import verify as run

    with _progress(quiet) as update:
        result = run(model, source, progress=update)
    if as_json:
        _print_json({"model": model, **result})
        return
    same = _comparison(source, result["compared"]) if source else ""
    int8 = f", {result['int8']} int8" if result["int8"] else ""
    listed = f", SHA256SUMS too ({result['listed']} files)" if result["listed"] is not None else ""
    print(
        f"ok: {result['ternary']} ternary{int8} and {result['kept']} kept tensors "
        f"in {result['files']} files, {_size(result['bytes'])}, digests match{listed}{same}"
    )


def _comparison(source: str, compared: dict[str, int]) -> str:
    """How tensors were compared with the source, in words."""
    if not compared["by_error"] and not compared["in_shape"]:
        return f", all equal to what {source} gives"
    words = (
        f"\nagainst {source}: {compared['converted_again']} equal to what it gives; "
        f"{compared['by_error']} calibrated, with the error on record"
    )
    if compared["in_shape"]:
        words += f"; {compared['in_shape']} fitted by calibration, of which only shapes compare"
    return words


@command
def eval_(
    model: Packed,
    text: Annotated[
        str | None,
        typer.Option(
            help="UTF-8 text, documents apart by lines <|doc|>, encoders: one a line; default: the "
            "text that comes with ternarize."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from, to compare with.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a window; default: 256.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than these.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Run these tasks of the lm-evaluation-harness, e.g. arc_easy,piqa, in place of a "
            "text; needs ternarize\\[lm-eval]."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory with tasks of your own (.yaml).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows or examples at a time.")] = None,
    activations: RunActivations = None,
    head: RunHead = None,
    device: Device = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a packed model on a text: perplexity; with --source KL divergence and agreement.

    For encoders: cosine similarity of the embeddings with those of the source. With --tasks: what
    the lm-evaluation-harness finds.

    Example: ternarize eval packed --source examples/tiny-llama --text examples/eval.txt
    """
    if (text is None) == (tasks is None):
        raise UsageError(
            "eval",
            f"{'neither' if text is None else 'both'} of --text and --tasks",
            "one",
            "Name a text, or tasks",
        )
    for_text = {"--source": source, "--seq-len": seq_len, "--max-tokens": max_tokens}
    for_tasks = {"--include-path": include_path, "--limit": limit}
    for option, value in (for_tasks if tasks is None else for_text).items():
        if value is not None:
            raise UsageError(
                option,
                f"is for {'--tasks' if tasks is None else '--text'}, which is not asked for",
                remedy="Leave it out",
            )
    from ternarize.measure.evaluate import evaluate, evaluate_tasks

    if tasks is not None:
        found = evaluate_tasks(
            model,
            [task.strip() for task in tasks.split(",") if task.strip()],
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            device=device,
            dtype=dtype.value if dtype else None,
            activations=activations.value if activations else None,
        )
        if as_json:
            _print_json(found)
            return
        rows = {
            f"{task} {metric}": measure
            for task, metrics in found["tasks"].items()
            for metric, measure in metrics.items()
        }
        _print_measures(rows, spaced=False)
        _out().print(f"lm_eval {found['harness']}, {found['dtype']} on {found['device']}")
        return
    assert text is not None
    with _progress(quiet) as update:
        result = evaluate(
            model,
            source=source,
            text=text,
            seq_len=256 if seq_len is None else seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
            device=device,
            dtype=dtype.value if dtype else None,
            activations=activations.value if activations else None,
            head=head.value if head else None,
            progress=update,
        )
    if as_json:
        _print_json(result)
        return
    _print_measures({name: each for name, each in result.items() if _is_measure(each)})
    out = _out()
    number = f"{result['windows']} windows" if "windows" in result else f"{result['lines']} lines"
    begin = " ".join(result.get("windows_begin_with", ()))
    number += f" that begin with {shown(begin)}" if begin else ""
    out.print(f"{number}, {result['tokens']:,} tokens, {result['dtype']} on {result['device']}")


@command
def export(
    model: Packed,
    output: Annotated[Path, typer.Argument(help="File (gguf) or directory to make.")],
    to: Annotated[Target, typer.Option(help="Engine or format to export for.")],
    type_: Annotated[
        GgufType | None,
        typer.Option(
            "--type",
            help="gguf: blocks of ternary weights: tq2_0 and tq1_0 of 256, q2_0 of 64; default: "
            "tq2_0.",
        ),
    ] = None,
    kept_type: Annotated[
        KeptType | None, typer.Option(help="gguf: type of kept matrices; default: as they are.")
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="gguf: no vocabulary, token numbers alone.")
    ] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="dense, mlx: dtype of floats; default: as in the model.")
    ] = None,
    allow_requantize: Annotated[
        bool,
        typer.Option(
            "--allow-requantize",
            help="Where the target cannot hold what is packed, take the nearest and measure it.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint for another engine.

    gguf is for llama.cpp; dense, bitnet and gemma-int2 load in transformers without ternarize; mlx
    is the affine layout of MLX. What the target cannot carry exactly is refused by name.

    Example: ternarize export packed model.gguf --to gguf --type q2_0
    """
    from ternarize.publish.export import export as run

    given: dict[str, tuple[tuple[Target, ...], Any]] = {
        "type": ((Target.gguf,), type_.value if type_ else None),
        "kept_type": ((Target.gguf,), kept_type.value if kept_type else None),
        "no_tokenizer": ((Target.gguf,), no_tokenizer or None),
        "dtype": ((Target.dense, Target.mlx), dtype.value if dtype else None),
    }
    options = {}
    for name, (targets, value) in given.items():
        if value is None:
            continue
        if to not in targets:
            option = "--" + name.replace("_", "-")
            known = " or ".join(target.value for target in targets)
            raise UsageError(
                option, f"is for --to {known}, and this is --to {to.value}; leave it out"
            )
        options[name] = value
    if options.pop("no_tokenizer", False):
        options["tokenizer"] = False
    if "type" in options:
        options["kind"] = options.pop("type")
    with _progress(quiet) as update:
        result = run(
            model, output, to.value, allow_requantize=allow_requantize, progress=update, **options
        )
    if as_json:
        _print_json({"model": model, **result})
        return
    _print_export(result)


def _print_export(result: dict[str, Any]) -> None:
    out = _out()
    exact = "every weight as packed" if result["exact"] else "not exact"
    out.print(
        f"{shown(result['output'])}: {result['tensors']} tensors, {_size(result['bytes'])}, "
        f"{exact}",
        soft_wrap=True,
    )
    for what in result["lost"]:
        out.print(f"lost: {shown(what)}", soft_wrap=True)
    for note in result.get("notes", ()):
        out.print(f"note: {shown(note)}", soft_wrap=True)
    if result["errors"]:
        grid = Table("tensors", "count", "relative error", "worst", box=None)
        for row in result["errors"]:
            worst = f"{row['worst_relative_error']:.3g} {row['worst']}"
            error = f"{row['relative_error']:.3g}"
            grid.add_row(shown(row["tensors"]), str(row["count"]), error, shown(worst))
        out.print(grid)


@command
def generate(
    model: Packed,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Stop after these; default: 128, or the room there is.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from probability p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template.")
    ] = False,
    activations: RunActivations = None,
    head: RunHead = None,
    device: Device = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a text with a packed language model, printed as it comes.

    Example: ternarize generate packed --prompt "The function returns" --max-new-tokens 40
    """
    from ternarize.measure.evaluate import open_tokenizer
    from ternarize.runtime.generate import generate as run
    from ternarize.runtime.load import load
    from ternarize.sources.checkpoint import locate

    directory = locate(model)
    tokenizer = open_tokenizer(directory)
    loaded = load(
        directory,
        device=device,
        dtype=dtype.value if dtype else None,
        activations=activations.value if activations else None,
        head=head.value if head else None,
    )

    def stream(piece: str) -> None:
        print(piece, end="", flush=True)

    if not as_json:
        stream(prompt)
    result = run(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=chat,
        stream=None if as_json else stream,
    )
    if as_json:
        numbers = {**asdict(result), "tokens_per_second": round(result.tokens_per_second, 3)}
        _print_json({"model": model, "prompt": prompt, **numbers})
        return
    print()
    if not quiet:
        err.print(
            f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} per second",
            highlight=False,
        )


@command
def bench(
    model: Packed,
    prompt: Annotated[int, typer.Option(help="Tokens to read at once.")] = 128,
    decode: Annotated[int, typer.Option(help="Tokens to write, one by one.")] = 32,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    repeats: Annotated[int, typer.Option(help="Times to measure; medians are shown.")] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Of the CPU; default: those of torch.")
    ] = None,
    activations: RunActivations = None,
    head: RunHead = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how fast a packed language model runs on this CPU.

    Also how many bytes of weights a token reads, and which share that is of what a plain loop reads
    from memory in the same time.

    Example: ternarize bench packed
    """
    import torch

    from ternarize.measure.bench import bench as run
    from ternarize.runtime.load import load

    if threads is not None:
        if not 1 <= threads <= 1024:  # with too many the OpenMP run-time ends the process
            raise UsageError("threads", f"{threads}", "1 to 1024")
        torch.set_num_threads(threads)
    loaded = load(
        model,
        dtype=dtype.value if dtype else None,
        activations=activations.value if activations else None,
        head=head.value if head else None,
    )
    result = run(loaded, prompt=prompt, decode=decode, batch=batch, repeats=repeats)
    if as_json:
        _print_json({"model": model, "dtype": str(loaded.dtype).removeprefix("torch."), **result})
        return
    table = Table(box=None)
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("prompt", f"{result['prompt_tokens_per_second']:.1f} tokens/s")
    table.add_row("decode", f"{result['decode_tokens_per_second']:.1f} tokens/s")
    table.add_row("weights", f"{result['bytes_per_step'] / 1e6:.1f} MB a step")
    table.add_row("weights read", f"{result['bytes_per_second'] / 1e9:.2f} GB/s")
    if result["bandwidth"] is not None:
        table.add_row("memory", f"{result['bandwidth'] / 1e9:.2f} GB/s")
        table.add_row("share of memory", f"{result['share_of_bandwidth']:.1%}")
    out = _out()
    out.print(table)
    out.print(
        f"{prompt} tokens read, {decode} written, medians of {repeats}, {result['threads']} "
        f"threads, {result['cpu'] or 'torch alone'}"
    )


@command
def push(
    model: Annotated[Path, typer.Argument(help="Packed checkpoint: directory.")],
    repo: Annotated[str, typer.Argument(help="Where to: user/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to; made where there is none.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the source, for the card; default: as on record."),
    ] = None,
    shim: Annotated[
        bool,
        typer.Option(
            "--shim",
            help="Add code by which transformers finds ternarize with trust_remote_code=True.",
        ),
    ] = False,
    token: Annotated[
        str | None, typer.Option(help="Of the Hub; default: HF_TOKEN, or who is logged in.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent; send nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish a packed checkpoint on the Hub with a model card, in one commit.

    It is verified first. What was uploaded before an interruption is not sent again. A README.md
    that somebody has edited, here or on the Hub, is left as it is.

    Example: ternarize push packed user/name --private --dry-run
    """
    from ternarize.publish.hub import push as run

    with _progress(quiet) as update:
        result = run(
            model,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
            base_model=base_model,
            shim=shim,
            dry_run=dry_run,
            progress=update,
        )
    if as_json:
        _print_json(result)
        return
    if dry_run:
        grid = Table("file", "size", box=None)
        for path, size in result["files"].items():
            grid.add_row(shown(path), _size(size))
        _out().print(grid)
        print(f"\n{len(result['files'])} files, {_size(sum(result['files'].values()))}, to {repo}")
        if result["card_text"] is not None:
            print(f"\nREADME.md:\n\n{result['card_text']}", end="")
    else:
        for path in result["removed"]:
            print(f"removed: {path}")
        print(result["pull_request"] or result["url"])
    if not quiet:
        said = {"own": "README.md is your own: sent as it is", "kept": _KEPT_CARD}
        if result["card"] in said:
            err.print(said[result["card"]], highlight=False, soft_wrap=True)


_KEPT_CARD = (
    "README.md on the Hub has been edited: left as it is, without the figures of these weights"
)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr with the time left, where stderr is a terminal.

    Where the stage or the total changes, or less is done than before, the bar and its clock start
    afresh.
    """
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (
        bars.TextColumn("{task.fields[stage]}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
    )
    bar = bars.Progress(
        *columns,
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
        with signals_held():
            bar.stop()


def _print_json(value: Any) -> None:
    """One JSON object on stdout; numbers that JSON cannot hold (infinity) become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(each) for key, each in item.items()}
        if isinstance(item, list):
            return [finite(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(finite(value), allow_nan=False))


def _out() -> Console:
    """Where results go; in a pipe tables are as wide as they need to be, so nothing is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def _print_plan(work: Any, as_json: bool) -> None:
    table = work.to_dict()
    if as_json:
        _print_json(table)
        return
    grid = Table("tensors", "count", "shape", "becomes", "why", "stored", box=None)
    rows: dict[tuple[str, ...], list[int]] = {}
    for tensor in table["tensors"]:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", tensor["name"])
        shape = " x ".join(str(n) for n in tensor["shape"])
        key = (name, shape, tensor["becomes"], tensor["reason"])
        count = rows.setdefault(key, [0, 0])
        count[0] += 1
        count[1] += tensor["stored_bytes"]
    for (name, shape, becomes, reason), (number, stored) in rows.items():
        grid.add_row(shown(name), str(number), shape, becomes, shown(reason), _size(stored))
    out = _out()
    out.print(grid)
    coverage = table["coverage"]
    int8 = f"{coverage['int8']:,} int8 + " if coverage["int8"] else ""
    out.print(
        f"\n{coverage['total']:,} parameters = {coverage['ternary']:,} ternary + "
        f"{int8}{coverage['kept']:,} kept + {coverage['tied']:,} tied copies"
    )
    ratio = table["source_bytes"] / max(1, table["packed_bytes"])
    calibrate = table["recipe"]["calibrate"]
    besides = " (calibration takes more)" if calibrate else ""
    out.print(
        f"{_size(table['source_bytes'])} -> {_size(table['packed_bytes'])} ({ratio:.2f} times "
        f"smaller); memory: about {_size(table['convert_memory_bytes'])} to convert{besides}, "
        f"{_size(table['load_memory_bytes'])} to load"
    )
    if calibrate:
        out.print(_calibration_plan(calibrate), soft_wrap=True)
    for name in table["left_out"]:
        out.print(f"left out: {shown(name)}")
    for note in table["notes"]:
        out.print(f"note: {shown(note)}")


def _calibration_plan(calibrate: dict[str, Any]) -> str:
    """What the plan of a calibrated conversion has to say beyond sizes."""
    length = f"of {calibrate['seq_len']} tokens"
    if calibrate["seq_len"] is None:
        length = "as long as the model takes, at most 512 tokens"
    parts = [
        f"calibrated on {shown(calibrate['dataset'])}: {calibrate['num_samples']} samples {length}",
        f"inputs rotated in blocks of up to {calibrate['rotation']}"
        if calibrate["rotation"]
        else "inputs not rotated",
    ]
    if calibrate["reconstruct"]:
        parts.append(
            f"{calibrate['reconstruct']} steps of training for each block, "
            f"{calibrate['window']} trained together"
        )
    if calibrate["distill"]:
        parts.append(f"{calibrate['distill']} steps of training for the whole model")
    if calibrate["target_bpw"] is not None:
        parts.append(
            f"group sizes and planes are decided when it is run, for {calibrate['target_bpw']:g} "
            "bits per ternary weight; the sizes above are those of equal groups"
        )
    return "; ".join(parts)


def _print_tensors(report: dict[str, Any]) -> None:
    grid = Table("tensor", "shape", "method", "group", "bpw", "sparsity", "rel. error", box=None)
    for row in report["tensors"]:
        shape = " x ".join(str(n) for n in row["shape"])
        if row["kind"] == "kept":
            why = f"kept: {row['reason']}" if row["reason"] else "kept"
            bits = row["stored_bytes"] * 8 / max(1, row["parameters"])
            grid.add_row(shown(row["name"]), shape, shown(why), "", f"{bits:g}", "", "")
            continue
        error = row["relative_error"]
        grid.add_row(
            shown(row["name"]),
            shape,
            shown(row["method"] or "?")
            + (f", {row['planes']} planes" if row["planes"] > 1 else "")
            + (f", rotated by {row['rotation']}" if row["rotation"] else ""),
            str(row["group_size"]),
            f"{row['bpw']:.3f}",
            f"{row['sparsity']:.3f}",
            "?" if error is None else f"{error:.4f}",
        )
    _out().print(grid)


def _print_totals(report: dict[str, Any]) -> None:
    t = report["totals"]
    parts = [
        f"{t['ternary_parameters']:,} of {t['parameters']:,} parameters ternary",
        f"{t['ternary_bpw']:.3f} bits per weight" if t["ternary_bpw"] else "",
        f"{t['sparsity']:.1%} zeros" if t["sparsity"] is not None else "",
        f"relative error {t['relative_error']:.4f}" if t["relative_error"] is not None else "",
    ]
    print(", ".join(part for part in parts if part))
    if t["source_bytes"]:
        print(
            f"{_size(t['source_bytes'])} -> {_size(t['file_bytes'])}, {t['ratio']:.2f} times "
            "smaller"
        )
    else:
        print(_size(t["file_bytes"]))


FAR = 2.0  # times the source's perplexity


def _print_check(found: dict[str, Any] | None) -> None:
    """The figures of `ternarize.check`, and what both models write, a line each."""
    if found is None or not found["measured"]:
        return
    begin = " ".join(found.get("windows_begin_with", ()))
    number = f"{found['windows']} windows" if "windows" in found else f"{found['lines']} lines"
    begin = f" that begin with {begin}" if begin else ""
    lines = [
        f"on {found['tokens']:,} tokens of the text that comes with ternarize, {number}{begin}, in "
        f"{found['seconds']:.0f} s:"
    ]
    value = {name: each["value"] for name, each in found.items() if _is_measure(each)}
    if "cosine" in value:
        least = found["cosine"]["minimum"]
        lines.append(
            f"cosine {value['cosine']:.4f} to the embeddings of the source, at least {least:.4f}"
        )
    else:
        source, packed, ratio, divergence = (
            _figure(value[name])
            for name in ("source_perplexity", "perplexity", "perplexity_ratio", "kl_divergence")
        )
        lines.append(
            f"perplexity {source} -> {packed} ({ratio} times), KL divergence {divergence} nats per "
            f"token, same likeliest token {value['top1_agreement']:.1%}"
        )
        writes = found["writes"]
        lines.append(f'"{writes["prompt"]}" goes on')
        lines += [f"  {name}: {writes[name].lstrip()}" for name in ("source", "packed")]
    # a model may write what this terminal has no letters for
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print()
    for line in lines:
        print(printable(line).encode(encoding, "backslashreplace").decode(encoding))


def _is_measure(value: Any) -> bool:
    return isinstance(value, dict) and "value" in value


def _figure(value: float) -> str:
    """A number that may be of any size: 38.46, 67,000,000, 1.3e+40, inf."""
    if value < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value < 1e15 else f"{value:.3g}"


SHOWN_BLOCKS = 8  # rows of a table that fits a terminal beside the rest


def _print_calibration(report: dict[str, Any]) -> None:
    """What a calibrated conversion measured, if the report is of one."""
    found = report["calibration"]
    if found is None:
        return
    out, data, blocks = _out(), found["data"], found["blocks"]
    begin = data.get("windows_begin_with")
    read = f"{data.get('samples')} samples"
    if isinstance(begin, list) and begin:
        read += f" that begin with {' '.join(map(str, begin))}"
    if data.get("tokens"):
        read += f", {data['tokens']} tokens"
    held, reported = data.get("heldout_samples"), data.get("report_samples")
    read = f"calibrated on {data.get('dataset')}: {read}; {held} more to choose by, {reported} to "
    out.print("\n" + shown(read + "report on"), highlight=False, soft_wrap=True)
    for note in data.get("notes") or ():
        out.print(f"note: {shown(note)}", soft_wrap=True)
    if len(found["forms"]) > 1:
        forms = ", ".join(f"{count} in {shown(form)}" for form, count in found["forms"].items())
        out.print(f"ternary tensors: {forms}", soft_wrap=True)
    few = {name: n for block in blocks for name, n in block["uncalibrated"].items()}
    if few:
        some = ", ".join(f"{shown(n)} ({tokens} tokens)" for n, tokens in list(few.items())[:3])
        out.print(
            f"{len(few)} matrices saw too few tokens and were ternarized without data: {some}"
            + (", ..." if len(few) > 3 else ""),
            soft_wrap=True,
        )
    else:
        out.print("no matrix was left uncalibrated: all saw enough tokens")
    grid = Table("relative error of outputs", "before", "after", box=None)
    for label, block in _chosen_blocks(blocks):
        grid.add_row(shown(label), f"{block['before']:.4f}", f"{block['after']:.4f}")
    out.print(grid)
    if found["quality"]:
        _print_measures(found["quality"])


def _chosen_blocks(blocks: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, block) of all blocks, or of the first, the worst and the last of many."""
    if len(blocks) <= SHOWN_BLOCKS:
        return [(block["block"], block) for block in blocks]
    worst = max(range(len(blocks)), key=lambda at: blocks[at]["after"])
    roles: dict[int, list[str]] = {}
    for role, at in (("first", 0), ("worst", worst), ("last", len(blocks) - 1)):
        roles.setdefault(at, []).append(role)
    return [
        (f"{blocks[at]['block']} ({' and '.join(words)} of {len(blocks)})", blocks[at])
        for at, words in sorted(roles.items())
    ]


def _print_measures(measures: dict[str, dict[str, Any]], spaced: bool = True) -> None:
    grid = Table("measure", "value", "standard error", box=None)
    for name, measure in measures.items():
        value, error = measure["value"], measure["standard_error"]
        grid.add_row(
            shown(name.replace("_", " ") if spaced else name),
            "?" if value is None else _in_table(value),
            "" if error is None else _in_table(error),
        )
    _out().print(grid)


def _in_table(value: float) -> str:
    return f"{value:.4f}" if value < 1e5 else _figure(value)


def _hint(
    model: str, output: Path, report: dict[str, Any], found: dict[str, Any] | None = None
) -> None:
    """What to expect of the result, and what to do next; `found` is what `_check` gives."""
    error = report["totals"]["relative_error"]
    absmean = report["recipe"]["method"] == "absmean"
    methods = {row["method"] for row in report["tensors"] if row["kind"] == "ternary"}
    if methods == {"lossless"}:
        err.print("The source was ternary already: packed without loss.")
        return
    own = f"ternarize eval {shlex.quote(str(output))} --source {shlex.quote(model)} --text FILE"
    if report["calibration"] is not None:
        _advise(
            "\nThese figures are on text like that of the calibration. Measure on your own:\n  "
            + own
        )
        return
    if error is None:
        return
    lost = (
        f"\nWeights rounded without data lose {error:.0%} of their energy here: an ordinary model "
        "(not trained in\nternary) answers clearly worse than its source. "
    )
    ratio = found["perplexity_ratio"]["value"] if found and "perplexity_ratio" in found else 1.0
    if found is None:
        _advise(f"{lost}Measure how much:\n  {own}")
    elif not found["measured"]:
        _advise(f"{lost}\nNot measured: {printable(found['why'])}")
        if found["command"] is not None:
            _advise(f"Measure how much:\n  {found['command']}")
    elif ratio > FAR:
        _advise(
            f"\nThis is far from its source: {_figure(ratio)} times the perplexity. Do not use it "
            "before it has been calibrated."
        )
    else:
        _advise(f"\nMeasure on your own text:\n  {own}")
    better = "--method itf gives a smaller error at the same size; " if absmean else ""
    _advise(
        f"{better}--dataset default (or your own texts) calibrates, for clearly better answers."
    )


def _advise(text: str) -> None:
    err.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    from ternarize.__main__ import main

    main()
