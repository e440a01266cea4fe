"""`ternarize eval`."""

from pathlib import Path
from typing import Annotated, Any

from ternarize.cli.options import (
    AsJson,
    Debug,
    Device,
    PackedArgument,
    Quiet,
    RunActivations,
    RunDtype,
    RunHead,
)
from ternarize.cli.show import is_measure, show_measures, windows_in_words
from ternarize.cli.terminal import print_json, progress_bar, shown, stdout
from ternarize.errors import UsageError


def evaluate_command(
    model: PackedArgument,
    *,
    text: Annotated[
        str | None,
        "UTF-8 text, documents apart by lines <|doc|>, encoders: one a line; default: the "
        "text that comes with ternarize.",
    ] = None,
    source: Annotated[str | None, "The checkpoint it was made from, to compare with."] = None,
    seq_len: Annotated[int | None, "Tokens of a window; default: 256."] = None,
    max_tokens: Annotated[int | None, "Read no more than these."] = None,
    tasks: Annotated[
        str | None,
        "Run these tasks of the lm-evaluation-harness, e.g. arc_easy,piqa, in place of a "
        "text; needs ternarize\\[lm-eval].",
    ] = None,
    include_path: Annotated[Path | None, "Directory with tasks of your own (.yaml)."] = None,
    limit: Annotated[int | None, "Examples of each task."] = None,
    batch_size: Annotated[int | None, "Windows or examples at a time."] = None,
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
    for_text: dict[str, Any] = {
        "source": source,
        "seq_len": seq_len,
        "max_tokens": max_tokens,
        "head": head,
    }
    for_tasks: dict[str, Any] = {"include_path": include_path, "limit": limit}
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "activations": activations,
    }
    _check_kind(text, tasks, for_tasks if tasks is None else for_text)
    if tasks is not None:
        _evaluate_tasks(model, tasks, as_json, **for_tasks, **shared)
        return
    assert text is not None
    from ternarize.measure.evaluate import evaluate

    options = {name: value for name, value in for_text.items() if value is not None}
    with progress_bar(quiet) as update:
        result = evaluate(model, text=text, progress=update, **options, **shared)
    if as_json:
        print_json(result)
        return
    show_measures({name: each for name, each in result.items() if is_measure(each)})
    stdout().print(
        f"{shown(windows_in_words(result))}, {result['tokens']:,} tokens, {result['dtype']} on "
        f"{result['device']}"
    )


def _check_kind(text: str | None, tasks: str | None, others: dict[str, Any]) -> None:
    """Raise UsageError unless one is asked for, without the options of the other."""
    if (text is None) == (tasks is None):
        raise UsageError(
            "eval",
            f"{'neither' if text is None else 'both'} of --text and --tasks",
            "one",
            "Name a text, or tasks",
        )
    for name, value in others.items():
        if value is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}",
                f"is for {'--tasks' if tasks is None else '--text'}, which is not asked for",
                remedy="Leave it out",
            )


def _evaluate_tasks(model: str, tasks: str, as_json: bool, **options: Any) -> None:
    from ternarize.measure.tasks import evaluate_tasks

    names = [task.strip() for task in tasks.split(",") if task.strip()]
    found = evaluate_tasks(model, names, **options)
    if as_json:
        print_json(found)
        return
    rows = {
        f"{task} {metric}": measure
        for task, metrics in found["tasks"].items()
        for metric, measure in metrics.items()
    }
    show_measures(rows, spaced=False)
    stdout().print(f"lm_eval {found['harness']}, {found['dtype']} on {found['device']}")
