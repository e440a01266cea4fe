"""The command line: parse, call one function, print.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 usage,
130 interrupted. Everything slow (torch, transformers) is imported by the command that needs it.
"""

import functools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ternarize.errors import TernarizeError, UsageError
from ternarize.version import __version__

app = typer.Typer(
    name="ternarize",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True)
Command = TypeVar("Command", bound=Callable[..., None])


class Method(str, Enum):
    absmean = "absmean"
    twn = "twn"
    itf = "itf"


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Activations(str, Enum):
    none = "none"
    int8 = "int8"


class End(str, Enum):
    keep = "keep"
    int8 = "int8"
    ternary = "ternary"


Model = Annotated[str, typer.Argument(help="Checkpoint directory, or Hub id user/name@revision.")]
Packed = Annotated[str, typer.Argument(help="Packed checkpoint: directory, or Hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no hints.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option(help="Where to run, e.g. cpu or cuda.")]
RunDtype = Annotated[Dtype | None, typer.Option(help="Dtype to compute in.")]
RunActivations = Annotated[
    Activations | None, typer.Option(help="Activations; default: as recorded in the checkpoint.")
]


def command(function: Command) -> Command:
    """Register a command whose errors become one line on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except TernarizeError as error:
            if kwargs.get("debug"):
                raise
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        except OSError as error:
            if kwargs.get("debug"):
                raise
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            err.print(f"[bold red]error:[/] {escape(what)}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print(
                "interrupted"
                + ("; the same command goes on from here" if function.__name__ == "convert" else "")
            )
            raise typer.Exit(130) from None

    app.command(name=function.__name__.rstrip("_"))(run)
    return function


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
    method: Annotated[Method, typer.Option(help="How weights become trits.")] = Method.absmean,
    group_size: Annotated[
        int,
        typer.Option(help="Weights per scale; -1: one group per row; 0: one scale per tensor."),
    ] = 128,
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
    head: Annotated[End, typer.Option(help="What becomes of the output head.")] = End.keep,
    embeddings: Annotated[
        End,
        typer.Option(help="What becomes of the token embedding; if tied to the head, of both."),
    ] = End.keep,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of kept weights; default: as in the source.")
    ] = None,
    activations: Annotated[
        Activations, typer.Option(help="Recorded for the loader: int8 per token, or none.")
    ] = Activations.none,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors worked on at once.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint into a packed ternary one.

    Linear weights in the repeated blocks of the model become ternary; the rest is kept, and
    --dry-run says why. Interrupted, the same command goes on; OUTPUT appears when all of it is
    verified.

    Example: ternarize convert examples/tiny-llama packed --method itf
    """
    from ternarize.codecs import THREADS
    from ternarize.convert import convert as run
    from ternarize.plan import Recipe, plan

    recipe = Recipe(
        method.value,
        group_size,
        tuple(keep or ()),
        tuple(include or ()),
        dtype.value if dtype else None,
        activations.value,
        scale_bits,
        tuple(planes or ()),
        head.value,
        embeddings.value,
    )
    if dry_run:
        _print_plan(plan(model, recipe, config_only=True), as_json)
        return
    with _progress("converting", quiet) as update:
        record = run(
            model, output, recipe, threads=threads or THREADS, device=device, progress=update
        )
    if as_json:
        _print_json({"output": str(output), **record})
        return
    from ternarize.report import inspect as describe

    report = describe(output)
    _print_totals(report)
    if not quiet:
        _hint(model, output, report)


@command
def inspect(
    model: Packed, as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Show what a packed checkpoint holds: shape, method, bits, sparsity, error of each tensor.

    Example: ternarize inspect packed
    """
    from ternarize.report import inspect as describe

    report = describe(model)
    if as_json:
        _print_json(report)
        return
    _print_tensors(report)
    _print_totals(report)


@command
def verify(
    model: Packed,
    source: Annotated[
        str | None, typer.Option(help="Convert this source again and compare every tensor.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every byte of a packed checkpoint; with --source, that it is what the source gives.

    Example: ternarize verify packed --source examples/tiny-llama
    """
    from ternarize.verify import verify as run

    with _progress("verifying", quiet) as update:
        result = run(model, source, progress=update)
    if as_json:
        _print_json({"model": model, **result})
        return
    same = f", all equal to what {source} gives" if source else ""
    int8 = f", {result['int8']} int8" if result["int8"] else ""
    print(
        f"ok: {result['ternary']} ternary{int8} and {result['kept']} kept tensors "
        f"in {result['files']} files, {_size(result['bytes'])}, digests match{same}"
    )


@command
def eval_(
    model: Packed,
    text: Annotated[
        Path,
        typer.Option(help="UTF-8 text; documents apart by lines <|doc|>; encoders: one a line."),
    ],
    source: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from, to compare with.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than these.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at a time.")] = None,
    activations: RunActivations = None,
    device: Device = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a packed model on a text: perplexity; with --source KL divergence and agreement.

    For encoders: cosine similarity of the embeddings with those of the source.

    Example: ternarize eval packed --source examples/tiny-llama --text examples/eval.txt
    """
    from ternarize.evaluate import evaluate

    _quiet_transformers()
    with _progress("evaluating", quiet) as update:
        result = evaluate(
            model,
            source=source,
            text=text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
            device=device,
            dtype=dtype.value if dtype else None,
            activations=activations.value if activations else None,
            progress=update,
        )
    if as_json:
        _print_json(result)
        return
    grid = Table("measure", "value", "standard error", box=None)
    for name, measure in result.items():
        if isinstance(measure, dict):
            error = measure["standard_error"]
            grid.add_row(
                name.replace("_", " "),
                f"{measure['value']:.4f}",
                "" if error is None else f"{error:.4f}",
            )
    out = _out()
    out.print(grid)
    number = f"{result['windows']} windows" if "windows" in result else f"{result['lines']} lines"
    out.print(f"{number}, {result['tokens']:,} tokens, {result['dtype']} on {result['device']}")


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
    device: Device = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a text with a packed language model, printed as it comes.

    Example: ternarize generate packed --prompt "The function returns" --max-new-tokens 40
    """
    from ternarize.checkpoint import locate
    from ternarize.evaluate import open_tokenizer
    from ternarize.generate import generate as run
    from ternarize.load import load

    _quiet_transformers()
    directory = locate(model)
    tokenizer = open_tokenizer(directory)
    loaded = load(
        directory,
        device=device,
        dtype=dtype.value if dtype else None,
        activations=activations.value if activations else None,
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


def _quiet_transformers() -> None:
    """Leave the terminal to us: no bars of transformers' own."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr with the time left, where stderr is a terminal."""
    if quiet:
        yield None
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(name))

        yield update


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
        grid.add_row(escape(name), str(number), shape, becomes, escape(reason), _size(stored))
    out = _out()
    out.print(grid)
    coverage = table["coverage"]
    int8 = f"{coverage['int8']:,} int8 + " if coverage["int8"] else ""
    out.print(
        f"\n{coverage['total']:,} parameters = {coverage['ternary']:,} ternary + "
        f"{int8}{coverage['kept']:,} kept + {coverage['tied']:,} tied copies"
    )
    ratio = table["source_bytes"] / max(1, table["packed_bytes"])
    out.print(
        f"{_size(table['source_bytes'])} -> {_size(table['packed_bytes'])} ({ratio:.2f} times "
        f"smaller); memory: about {_size(table['convert_memory_bytes'])} to convert, "
        f"{_size(table['load_memory_bytes'])} to load"
    )
    for name in table["left_out"]:
        out.print(f"left out: {escape(name)}")
    for note in table["notes"]:
        out.print(f"note: {escape(note)}")


def _print_tensors(report: dict[str, Any]) -> None:
    grid = Table("tensor", "shape", "method", "group", "bpw", "sparsity", "rel. error", box=None)
    for row in report["tensors"]:
        shape = " x ".join(str(n) for n in row["shape"])
        if row["kind"] == "kept":
            why = f"kept: {row['reason']}" if row["reason"] else "kept"
            bits = row["stored_bytes"] * 8 / max(1, row["parameters"])
            grid.add_row(escape(row["name"]), shape, escape(why), "", f"{bits:g}", "", "")
            continue
        error = row["relative_error"]
        grid.add_row(
            escape(row["name"]),
            shape,
            (row["method"] or "?") + (f", {row['planes']} planes" if row["planes"] > 1 else ""),
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


def _hint(model: str, output: Path, report: dict[str, Any]) -> None:
    """What to expect of a conversion without data, and what to do next."""
    recipe, error = report["recipe"], report["totals"]["relative_error"]
    methods = {row["method"] for row in report["tensors"] if row["kind"] == "ternary"}
    if methods == {"lossless"}:
        err.print("The source was ternary already: packed without loss.")
        return
    if error is None:
        return
    err.print(
        f"\nWeights rounded without data lose {error:.0%} of their energy here: an ordinary model "
        "(not trained in\nternary) answers clearly worse than its source. Measure how much:\n"
        f"  ternarize eval {shlex.quote(str(output))} --source {shlex.quote(model)} --text FILE",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if recipe["method"] == "absmean":
        err.print(
            "--method itf gives a smaller error at the same size.", highlight=False, soft_wrap=True
        )


def main() -> None:
    """Entry point of the `ternarize` command."""
    app()


if __name__ == "__main__":
    main()
