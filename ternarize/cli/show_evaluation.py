"""What is shown of an evaluation: figures, a line for each text, and what the models wrote."""

from pathlib import Path
from typing import Any

from rich.table import Table

from ternarize.cli.show import is_measure, show_lines, show_measures, windows_in_words
from ternarize.cli.terminal import in_figures, shown, stdout

SHOWN_CHARACTERS = 300  # of a text that a model wrote, and of the end of a prompt


def show_evaluation(result: dict[str, Any], examples: int) -> None:
    """The figures of `evaluate`, and at most so many examples of text."""
    measures = {name: each for name, each in result.items() if is_measure(each)}
    if measures:
        show_measures(measures)
        if "texts" in result:
            _show_texts(result["texts"], list(measures))
        stdout().print(
            f"{shown(windows_in_words(result))}, {result['tokens']:,} tokens, {result['dtype']} on "
            f"{result['device']}"
        )
    if "writing" in result:
        if measures:
            print()
        _show_writing(result["writing"], examples)


def show_speech(result: dict[str, Any], examples: int) -> None:
    """The figures of `evaluate_speech`, and at most so many recordings, spread over them."""
    show_measures({name: each for name, each in result.items() if is_measure(each)})
    stdout().print(
        f"{result['files']:,} recordings, {result['seconds'] / 60:.1f} minutes, "
        f"{result['words']:,} words, {result['normalizer']} normalizer, {result['dtype']} on "
        f"{result['device']}"
    )
    for note in result["notes"]:
        stdout().print(f"note: {note}")
    texts = result["texts"]
    number = min(examples, len(texts))
    lines = []
    for each in (texts[at * len(texts) // number] for at in range(number)):
        said = "" if each["said"] is None else f": {_beginning(each['said'])}"
        lines.append(f"{each['file']}{said}")
        lines += [
            f"  {name}: {_beginning(each[name])}" for name in ("source", "packed") if name in each
        ]
    if lines:
        show_lines(lines)


def _show_texts(texts: list[dict[str, Any]], measures: list[str]) -> None:
    """A row for each text, called by its file's name, or by its path where others have that too."""
    names = [Path(each["text"]).name for each in texts]
    heads = (name.replace("_", " ") for name in measures)
    grid = Table("text", "tokens", *heads, box=None)
    for name, each in zip(names, texts, strict=True):
        label = name if names.count(name) == 1 else each["text"]
        cells = (_with_error(each[measure]) for measure in measures)
        grid.add_row(shown(label), f"{each['tokens']:,}", *cells)
    stdout().print(grid)


def _show_writing(found: dict[str, Any], examples: int) -> None:
    """What was written: figures of each model side by side, and examples."""
    models = [name for name in ("packed", "source") if name in found]
    grid = Table("of what is written", *models, box=None)
    for measure in found["packed"] | found.get("source", {}):
        cells = (
            _with_error(found[name][measure]) if measure in found[name] else "" for name in models
        )
        grid.add_row(measure.replace("_", " "), *cells)
    stdout().print(grid)
    texts = found["texts"]
    stdout().print(f"{len(texts)} texts, at most {found['max_new_tokens']} tokens each, greedy")
    number = min(examples, len(texts))
    lines = []
    for each in (texts[at * len(texts) // number] for at in range(number)):
        prompt = each["prompt"]
        short = prompt if len(prompt) <= SHOWN_CHARACTERS else f"...{prompt[-SHOWN_CHARACTERS:]}"
        lines.append(f'"{short.strip()}" goes on')
        lines += [f"  {name}: {_beginning(each[name]['text'])}" for name in reversed(models)]
    if lines:
        show_lines(lines)


def _beginning(text: str) -> str:
    text = text.strip() or "(nothing)"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _with_error(measure: dict[str, Any]) -> str:
    """A value, with its standard error where it has one: 0.4062 ± 0.0882."""
    parts = [measure["value"], measure["standard_error"]]
    return " ± ".join(
        f"{part:.4f}" if part < 1e5 else in_figures(part) for part in parts if part is not None
    )
