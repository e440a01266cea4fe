"""Journals of steps on a language model: divergence from its source for bytes.

    python benchmarks/steps_lm.py MODEL TEXT EVAL [--bytes N ...] [--steps N] [--batch N] [--rate R]
        [--train-len N] [--seq-len N] [--max-tokens N] [--group-size N] [--start PACKED]
        [--trits N] [--straight N] [--plot OUT.png] [--json OUT.json]

MODEL is converted without data (`itf`) in groups of 128, or START is a packed checkpoint of it.
Scales are trained by gradients on TEXT, and written as steps for each number of bytes; from the
last of these on, --trits attempts of votes on trits follow. Each journal is made compact, replayed
on its base, and measured by `ternarize eval` on EVAL, which nothing has used. The row
"straight-through" is `ternarize train` from the same start, for as many steps of as many tokens.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import hide_bars, parser, write_figures

from ternarize.convert.run import convert
from ternarize.measure.evaluate import evaluate
from ternarize.measure.report import figure_for
from ternarize.plans.recipe import Recipe, Train
from ternarize.steps.checkpoint import replay
from ternarize.steps.journal import read_journal
from ternarize.steps.operations import compact
from ternarize.train.journals import code_journal, train_journal
from ternarize.train.votes import Votes, first_attempt

MEASURES = {"kl_divergence": ".4f", "perplexity": ",.2f", "top1_agreement": ".4f"}


def show(row: dict[str, Any]) -> None:
    cells = [f"{row[key]['value']:{form}}" for key, form in MEASURES.items()]
    of = f"{row['steps']:,} | {row['bytes']:,}" if row["bytes"] else "|"
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
    arguments.add_argument("--trits", type=int, default=0)
    arguments.add_argument("--straight", type=int, default=0)
    arguments.add_argument("--plot", type=Path)
    options = arguments.parse_args(argv)
    hide_bars()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = options.start or folder / "base"
        if options.start is None:
            convert(options.model, base, Recipe("itf", options.group_size))

        def measured(packed: Path) -> dict[str, Any]:
            protocol: Any = {"seq_len": options.seq_len, "max_tokens": options.max_tokens}
            return evaluate(packed, source=options.model, text=options.eval, **protocol)

        def told(name: str, journal: Path | None, packed: Path, began: float) -> None:
            seconds, size, steps = time.process_time() - began, 0, 0
            if journal is not None:
                small = journal.with_suffix(".small")
                made = compact(journal, small)
                size, steps = made.size, len(made.steps)
                packed = folder / f"{journal.stem}-replayed"
                replay(small, base, packed)
            row = {"name": name, "bytes": size, "steps": steps, "seconds": seconds}
            rows.append(row | measured(packed))
            show(rows[-1])

        print("| journal | steps | bytes | divergence | perplexity | top-1 | CPU s |")
        print("|---|---|---|---|---|---|---|")
        told("none: the start", None, base, time.process_time())
        training = Train(
            texts=(str(options.text),),
            teacher=str(options.model),
            steps=options.steps,
            batch=options.batch,
            train_len=options.train_len,
            lr=options.rate,
        )
        for size in options.bytes:
            began, journal = time.process_time(), folder / f"scales{size}.steps"
            code_journal(base, journal, training, size)
            told("scales by gradient", journal, base, began)
        if options.trits:
            began = time.process_time()
            votes = Votes("trits", 1024, (10, 12, 14), (0.5, 0.2, 0.05), thrift=0.5)
            attempts = first_attempt(read_journal(journal)) + options.trits
            train_journal(base, journal, replace(training, steps=attempts, lr=None), votes)
            journal.with_suffix(".small").unlink()
            named = journal.rename(folder / "trits.steps")
            told("then trits by votes", named, base, began)
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
            told("straight-through", None, output, began)
    if options.plot:
        draw(rows, options.plot)
    write_figures(options.json, __file__, {"rows": rows})
    return 0


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
