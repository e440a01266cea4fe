"""What is shown after a conversion: what came of it, what to expect, what to do next."""

import shlex
import sys
from pathlib import Path
from typing import Any

from ternarize.cli.show import is_measure, windows_in_words
from ternarize.cli.terminal import advise, err, in_figures
from ternarize.errors import printable

FAR = 2.0  # times the source's perplexity


def show_check(found: dict[str, Any] | None) -> None:
    """The figures of `ternarize.check`, and what both models write, a line each."""
    if found is None or not found["measured"]:
        return
    lines = [
        f"on {found['tokens']:,} tokens of the text that comes with ternarize, "
        f"{windows_in_words(found)}, in {found['seconds']:.0f} s:"
    ]
    value = {name: each["value"] for name, each in found.items() if is_measure(each)}
    if "cosine" in value:
        least = found["cosine"]["minimum"]
        lines.append(
            f"cosine {value['cosine']:.4f} to the embeddings of the source, at least {least:.4f}"
        )
    else:
        source, packed, ratio, divergence = (
            in_figures(value[name])
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


def show_hints(
    model: str, output: Path, report: dict[str, Any], found: dict[str, Any] | None
) -> None:
    """What to expect of the result, and what to do next; `found`: what was checked, if it was."""
    error = report["totals"]["relative_error"]
    methods = {row["method"] for row in report["tensors"] if row["kind"] == "ternary"}
    own = f"ternarize eval {shlex.quote(str(output))} --source {shlex.quote(model)} --text FILE"
    if methods == {"lossless"}:
        err.print("The source was ternary already: packed without loss.")
    elif report["calibration"] is not None:
        advise(
            "\nThese figures are on text like that of the calibration. Measure on your own:\n  "
            + own
        )
    elif error is not None:
        _say_what_is_lost(error, own, found)
        absmean = report["recipe"]["method"] == "absmean"
        better = "--method itf gives a smaller error at the same size; " if absmean else ""
        advise(
            f"{better}--dataset default (or your own texts) calibrates, for clearly better answers."
        )


def _say_what_is_lost(error: float, own: str, found: dict[str, Any] | None) -> None:
    lost = (
        f"\nWeights rounded without data lose {error:.0%} of their energy here: an ordinary model "
        "(not trained in\nternary) answers clearly worse than its source. "
    )
    ratio = found["perplexity_ratio"]["value"] if found and "perplexity_ratio" in found else 1.0
    if found is None:
        advise(f"{lost}Measure how much:\n  {own}")
    elif not found["measured"]:
        advise(f"{lost}\nNot measured: {printable(found['why'])}")
        if found["command"] is not None:
            advise(f"Measure how much:\n  {found['command']}")
    elif ratio > FAR:
        advise(
            f"\nThis is far from its source: {in_figures(ratio)} times the perplexity. Do not use "
            "it before it has been calibrated."
        )
    else:
        advise(f"\nMeasure on your own text:\n  {own}")
