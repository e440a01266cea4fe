"""Journals of steps on a language model: divergence from its source for bytes.

    python benchmarks/steps_lm.py MODEL TEXT EVAL [--bytes N ...] [--steps N] [--batch N] [--rate R]
        [--train-len N] [--seq-len N] [--max-tokens N] [--group-size N] [--start PACKED]
        [--trits N ...] [--trit-steps N] [--straight N] [--threads N] [--plot OUT.png]
        [--json OUT.json]

MODEL is converted without data (`itf`) in groups of 128, or START is a packed checkpoint of it.
Scales are trained by gradients on TEXT, and written as steps, of which the first are taken that fit
each number of bytes; behind all of them trits follow, for each number of bytes in all of --trits.
"Patch" is what `ternarize diff` takes for the same trits and scales, "CPU s" what the training and
its writing took. Each journal is made compact, replayed on its base, and measured by `ternarize
eval` on EVAL, which nothing has used. The row "straight-through" is `ternarize train` from the same
start, for as many steps of as many tokens.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser, write_figures

from ternarize.convert.run import convert
from ternarize.measure.evaluate import evaluate
from ternarize.measure.report import figure_for
from ternarize.plans.recipe import Recipe, Train
from ternarize.publish.patches import diff_packed
from ternarize.steps.checkpoint import replay
from ternarize.steps.journal import read_journal
from ternarize.steps.operations import bits_left, compact, fork
from ternarize.train.journals import train_by_gradient

MEASURES = {"kl_divergence": ".4f", "perplexity": ",.2f", "top1_agreement": ".4f"}


def show(row: dict[str, Any]) -> None:
    cells = [f"{row[key]['value']:{form}}" for key, form in MEASURES.items()]
    of = f"{row['steps']:,} | {row['bytes']:,} | {row['patch']:,}" if row["bytes"] else "| |"
    print(f"| {row['name']} | {of} | {' | '.join(cells)} | {row['seconds']:,.0f} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("eval", type=Path)
    arguments.add_argument("--bytes", type=int, nargs="+", default=[1000, 2500, 5000, 12000])
    arguments.add_argument("--steps", type=int, default=70)
    arguments.add_argument("--batch", type=int, default=1024)
    arguments.add_argument("--rate", type=float, default=1.0)
    arguments.add_argument("--train-len", type=int, default=64)
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--max-tokens", type=int, default=8192)
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--start", type=Path)
    arguments.add_argument("--trits", type=int, nargs="+", default=[])
    arguments.add_argument("--trit-steps", type=int, default=200)
    arguments.add_argument("--straight", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--plot", type=Path)
    options = arguments.parse_args(argv)
    hide_bars()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = options.start or folder / "base"
        if options.start is None:
            convert(options.model, base, Recipe("itf", options.group_size))

        def measured(packed: Path) -> dict[str, Any]:
            protocol: Any = {"seq_len": options.seq_len, "max_tokens": options.max_tokens}
            return evaluate(packed, source=options.model, text=options.eval, **protocol)

        def told(name: str, journal: Path | None, packed: Path, seconds: float) -> None:
            size = steps = patch = 0
            if journal is not None:
                small = journal.with_suffix(".small")
                made = compact(journal, small)
                size, steps = made.size, len(made.steps)
                packed = folder / f"{journal.stem}-replayed"
                replay(small, base, packed)
                patch = diff_packed(base, packed, small.with_suffix(".patch"))["bytes"]
            row = {"name": name, "bytes": size, "steps": steps, "patch": patch, "seconds": seconds}
            rows.append(row | measured(packed))
            show(rows[-1])

        print("| journal | steps | bytes | patch | divergence | perplexity | top-1 | CPU s |")
        print("|---|---|---|---|---|---|---|---|")
        told("none: the start", None, base, 0.0)
        training = Train(
            texts=(str(options.text),),
            teacher=str(options.model),
            steps=options.steps,
            batch=options.batch,
            train_len=options.train_len,
            lr=options.rate,
        )
        began, journal = time.process_time(), folder / "scales.steps"
        train_by_gradient(base, journal, training, max(options.bytes))
        took = time.process_time() - began
        for size in sorted(options.bytes):
            named = folder / f"scales{size}.steps"
            shorten(journal, named, size)
            told("scales by gradient", named, base, took)
        for size in options.trits:
            began, named = time.process_time(), folder / f"trits{size}.steps"
            shutil.copyfile(journal, named)
            training = replace(training, steps=options.trit_steps, lr=None)
            train_by_gradient(base, named, training, size, target="trits")
            told("then trits by gradient", named, base, time.process_time() - began)
        if options.straight:
            began, output = time.process_time(), folder / "straight"
            train = Train(
                texts=(str(options.text),),
                start=str(base),
                steps=options.straight,
                batch=options.batch,
                train_len=options.train_len,
            )
            convert(options.model, output, Recipe("itf", options.group_size, train=train))
            told("straight-through", None, output, time.process_time() - began)
    if options.plot:
        draw(rows, options.plot)
    write_figures(options.json, __file__, {"rows": rows})
    return 0


def shorten(journal: Path, new: Path, nbytes: int) -> None:
    """Begin another journal with as many first steps as so many bytes have."""
    found = read_journal(journal)
    count = len(found.steps)
    while bits_left(replace(found, entries=tuple(found.steps[:count])), nbytes) < 0:
        count -= 1
    fork(journal, new, found.steps[count].number if count < len(found.steps) else None)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Divergence over steps and over bytes."""
    told = [row for row in rows if row["bytes"]]
    values = [row["kl_divergence"]["value"] for row in told]
    with figure_for(path, (8, 8)) as figure:
        for axes, what in zip(figure.subplots(2, 1), ("steps", "bytes"), strict=True):
            axes.plot([row[what] for row in told], values, "o-")
            axes.axhline(rows[0]["kl_divergence"]["value"], linestyle=":", label="the start")
            axes.set(xlabel=f"{what} of the journal", ylabel="divergence, nats per token")
            axes.legend()


if __name__ == "__main__":
    sys.exit(main())
