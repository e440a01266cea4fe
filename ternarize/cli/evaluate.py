"""`ternarize eval`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ternarize.cli.convert import read_bounds
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
from ternarize.cli.show import is_measure, show_measures
from ternarize.cli.show_evaluation import show_evaluation, show_speech
from ternarize.cli.terminal import failed, print_json, progress_bar, stdout
from ternarize.errors import QualityError, UsageError

EXAMPLES = 3


def evaluate_command(
    model: PackedArgument,
    *,
    text: Annotated[
        list[str] | None,
        "UTF-8 text, documents apart by lines <|doc|>, encoders: one a line; default: the "
        "text that comes with ternarize. Given several times, each has its own figures beside "
        "those of all.",
    ] = None,
    audio: Annotated[
        Path | None,
        "Folder of speech in place of a text: .wav, .flac, .ogg or .mp3 files, beside each what is "
        "said in it, a .txt of the same name; needs ternarize\\[audio].",
    ] = None,
    language: Annotated[
        str | None,
        "Language that is spoken; en: numbers and contractions are compared as one. Default: the "
        "model finds it out.",
    ] = None,
    source: Annotated[str | None, "The checkpoint it was made from, to compare with."] = None,
    seq_len: Annotated[int | None, "Tokens of a window; default: 256."] = None,
    max_tokens: Annotated[int | None, "Read no more than these of each text."] = None,
    generate: Annotated[
        bool,
        "Let the models write after prompts cut from the text, and measure loops, repetitions and "
        "ends.",
    ] = False,
    prompts: Annotated[
        Path | None,
        "Let them write after these instead: .txt, a prompt a line, or .jsonl with `prompt` or "
        "`messages` and, to count right ones, `answer`.",
    ] = None,
    num_prompts: Annotated[
        int | None, "Prompts to write after; default: 32 of a text, all of --prompts."
    ] = None,
    prompt_tokens: Annotated[int | None, "Tokens of a prompt from a text; default: 32."] = None,
    max_new_tokens: Annotated[
        int | None,
        "Write no more than these after each; default: 128 (of speech 224), or the room there is.",
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=0, help="Of what is written, to show; default: 3.")
    ] = None,
    tasks: Annotated[
        str | None,
        "Run these tasks of the lm-evaluation-harness, e.g. arc_easy,piqa, in place of a "
        "text; needs ternarize\\[lm-eval].",
    ] = None,
    include_path: Annotated[
        Path | None, "Directory with tasks of your own (.yaml), on data of your own."
    ] = None,
    limit: Annotated[int | None, "Examples of each task."] = None,
    batch_size: Annotated[int | None, "Windows, prompts, files or examples at a time."] = None,
    min_quality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Fail, after all is printed, unless the figure of this name is at most so much "
            "(perplexity, perplexity_ratio, kl_divergence, loops, word_error_rate, "
            "word_error_ratio, words_changed), or at least (others).",
        ),
    ] = None,
    activations: RunActivations = None,
    head: RunHead = None,
    device: Device = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a packed model on a text: perplexity; with --source KL divergence and agreement.

    For encoders: cosine similarity of the embeddings with those of the source. With --generate:
    what the model writes by itself, beside its source. With --audio: word error rates of speech
    recognition. With --tasks: what the lm-evaluation-harness finds.

    Example: ternarize eval packed --source examples/tiny-llama --text examples/eval.txt

    Example: ternarize eval packed --text default --max-tokens 4096 --generate --num-prompts 8
    """
    for_text: dict[str, Any] = {"seq_len": seq_len, "max_tokens": max_tokens}
    for_prompts = {"num_prompts": num_prompts, "prompt_tokens": prompt_tokens}
    for_writing = {"max_new_tokens": max_new_tokens, "examples": examples}
    for_models = {"source": source, "head": head, "min_quality": min_quality or None}
    for_tasks: dict[str, Any] = {"include_path": include_path, "limit": limit}
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "activations": activations,
    }
    writes = generate or prompts is not None
    _check_kind(bool(text), writes, prompts is not None, tasks is not None, audio is not None)
    _refuse(for_tasks if tasks is None else {}, "--tasks")
    _refuse({} if text else for_text, "--text")
    _refuse({} if audio else {"language": language}, "--audio")
    _refuse({} if writes else for_prompts, "--generate")
    _refuse({} if writes or audio else for_writing, "--generate")
    _refuse({"prompt_tokens": prompt_tokens} if prompts else {}, "prompts cut from a text")
    if tasks is not None:
        _refuse(for_models, "--text")
        _evaluate_tasks(model, tasks, as_json, **for_tasks, **shared)
        return
    if audio is not None:
        bounds = _bounds(min_quality or [], writes, speech=True)
        _evaluate_speech(
            model,
            audio,
            bounds,
            EXAMPLES if examples is None else examples,
            as_json,
            quiet,
            source=source,
            language=language,
            head=head,
            max_new_tokens=max_new_tokens,
            **shared,
        )
        return
    bounds = _bounds(min_quality or [], writes)
    from ternarize.measure.evaluate import evaluate
    from ternarize.measure.writing import Writing

    writing = Writing(prompts, num_prompts, prompt_tokens, max_new_tokens) if writes else None
    options = {name: value for name, value in for_text.items() if value is not None}
    with progress_bar(quiet) as update:
        result = evaluate(
            model,
            source=source,
            text=text or [],
            writing=writing,
            head=head,
            progress=update,
            **options,
            **shared,
        )
    _tell(result, bounds, show_evaluation, EXAMPLES if examples is None else examples, as_json)


def _tell(
    result: dict[str, Any],
    bounds: dict[str, float],
    show: Callable[[dict[str, Any], int], None],
    examples: int,
    as_json: bool,
) -> None:
    """Print a result, and fail where it is worse than its bounds."""
    worse = _worse(result, bounds)
    if as_json:
        if worse is not None:
            raise failed(worse, as_json, **result)
        print_json(result)
        return
    show(result, examples)
    if worse is not None:
        raise worse


def _evaluate_speech(
    model: str,
    audio: Path,
    bounds: dict[str, float],
    examples: int,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    from ternarize.measure.speech import evaluate_speech

    with progress_bar(quiet) as update:
        result = evaluate_speech(model, audio, progress=update, **options)
    _tell(result, bounds, show_speech, examples, as_json)


def _check_kind(text: bool, writes: bool, prompts: bool, tasks: bool, audio: bool) -> None:
    """Raise UsageError unless something is to be measured.

    That is tasks, or speech, or a text and what is written.
    """
    alone = "--tasks" if tasks else "--audio"
    if (tasks or audio) and (text or writes or tasks == audio):
        beside = "--text" if text else "--prompts" if prompts else "--generate"
        beside = beside if text or writes else "--audio"
        raise UsageError(
            "eval", f"both of {beside} and {alone}", "one", "Run the command once for each"
        )
    if not (text or prompts or tasks or audio):
        raise UsageError(
            "eval",
            "neither of --text and --tasks, nor --audio",
            "one",
            "Name a text, speech, tasks, or with --prompts what to write after",
        )


def _refuse(options: dict[str, Any], owner: str) -> None:
    """Raise UsageError for an option that is given without what it belongs to."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}",
                f"is for {owner}, which is not asked for",
                remedy="Leave it out",
            )


def _bounds(asked: list[str], writes: bool, speech: bool = False) -> dict[str, float]:
    """The bounds of --min-quality, on figures that can be measured."""
    from ternarize.measure.figures import FIGURES, SPEECH_FIGURES, WRITING_FIGURES

    bounds = read_bounds(asked)
    known = SPEECH_FIGURES if speech else FIGURES | (WRITING_FIGURES if writes else {})
    for name, bound in bounds.items():
        if name in WRITING_FIGURES and not writes and not speech:
            found = f"{name} is measured of what a model writes, which is not asked for"
            raise UsageError("--min-quality", found, remedy="Add --generate")
        if name not in known or not math.isfinite(bound):
            expected = f"a number for one of {', '.join(known)}"
            raise UsageError("--min-quality", f"{name}={bound}", expected)
    return bounds


def _worse(result: dict[str, Any], bounds: dict[str, float]) -> QualityError | None:
    """The error of a model that is worse than its bounds."""
    from ternarize.measure.figures import check_quality

    figures = {name: each for name, each in result.items() if is_measure(each)}
    figures |= result.get("writing", {}).get("packed", {})
    try:
        check_quality(figures, bounds, of="in this evaluation", remedy="The figures are above")
    except QualityError as error:
        return error
    return None


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
