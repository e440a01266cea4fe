"""Journals that are a whole language model, from a seed: loss on other text for bytes.

    python benchmarks/steps_seed.py CONFIG TEXT EVAL [--seed N] [--trits BYTES ...] [--rates R ...]
        [--steps N] [--scales BYTES] [--scale-steps N] [--votes ATTEMPTS] [--batch N]
        [--train-len N] [--threads N] [--json OUT.json]

CONFIG is a folder with a config.json and a tokenizer. From the seed trits are trained by gradients
of TEXT for each number of bytes (--rates: one for each; 0: none), then scales, for some more bytes.
"Votes" are steps on trits from the seed. Each journal is made compact and replayed, and what comes
out is measured by `ternarize eval` on EVAL, which nothing has used: the mean cross entropy of a
token. Beside it: that of a guess among all words, and of the words' frequencies in TEXT (one added
to each). "CPU s" is the training and its writing.
"""

import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser, write_figures

from ternarize.measure.evaluate import evaluate
from ternarize.measure.report import inspect
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import GROUP_SIZE, Train
from ternarize.steps.appender import Appender
from ternarize.steps.checkpoint import replay
from ternarize.steps.operations import compact
from ternarize.steps.start import values_in
from ternarize.train.drawn import drawn_header
from ternarize.train.journals import train_by_gradient, train_by_votes
from ternarize.train.votes import DENSITIES, Votes


def by_frequency(config: Path, text: Path, other: Path, words: int) -> float:
    """The cross entropy of the tokens of a text by the frequencies of another one."""
    tokenizer = open_tokenizer(config)
    counts = []
    for path in (text, other):
        ids = tokenizer(path.read_text("utf-8"), add_special_tokens=False, verbose=False)
        counts.append(torch.bincount(torch.tensor(ids["input_ids"]), minlength=words).double())
    share = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-(counts[1] * share.log()).sum() / counts[1].sum())


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("config", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("eval", type=Path)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--trits", type=int, nargs="*", default=[0, 20_000, 40_000, 80_000])
    arguments.add_argument("--rates", type=float, nargs="*", default=[0.03, 0.03, 0.06, 0.1])
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("--scales", type=int, default=2500)
    arguments.add_argument("--scale-steps", type=int, default=60)
    arguments.add_argument("--votes", type=int, default=0)
    arguments.add_argument("--batch", type=int, default=2048)
    arguments.add_argument("--train-len", type=int, default=128)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args(argv)
    hide_bars()
    torch.set_num_threads(options.threads)
    start = drawn_header(options.config, options.seed, GROUP_SIZE)
    assert start.model is not None
    words: int = start.model.config["vocab_size"]
    rows: list[dict[str, Any]] = []
    given: Any = {"texts": (str(options.text),), "objective": "text", "seed": options.seed}
    given |= {"batch": options.batch, "train_len": options.train_len}
    how: Any = {"seed": options.seed, "start": start}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def told(name: str, journal: Path, seconds: float) -> None:
            small, packed = journal.with_suffix(".small"), folder / f"{journal.stem}-replayed"
            made = compact(journal, small)
            replay(small, options.config, packed)
            found = evaluate(packed, text=options.eval, seq_len=options.train_len)
            weights = inspect(packed)["totals"]["file_bytes"]
            row = {"name": name, "steps": len(made.steps), "bytes": made.size, "seconds": seconds}
            rows.append(row | {"loss": math.log(found["perplexity"]["value"]), "packed": weights})
            print(
                f"| {name} | {row['steps']:,} | {made.size:,} | {weights:,} | "
                f"{rows[-1]['loss']:.3f} | {seconds:,.0f} |",
                flush=True,
            )

        frequencies = by_frequency(options.config, options.text, options.eval, words)
        weights = values_in(start.tensors)
        print(
            f"{weights:,} weights; a guess: {math.log(words):.3f}; frequencies: {frequencies:.3f}"
        )
        print("\n| journal | steps | bytes | packed model | loss on EVAL | CPU s |")
        print("|---|---|---|---|---|---|")
        seed = folder / "seed.steps"
        with Appender(seed, start):
            pass
        told("none: the seed", seed, 0.0)
        if options.votes:
            began, journal = time.process_time(), folder / "votes.steps"
            training = Train(**given, steps=options.votes)
            votes = Votes("trits", 1024, DENSITIES["trits"])
            train_by_votes(options.config, journal, training, votes, **how)
            told("votes on trits", journal, time.process_time() - began)
        for size, rate in zip(options.trits, options.rates, strict=True):
            journal, training = folder / f"{size}.steps", Train(**given, steps=options.steps)
            more = {**how, "target": "trits", "rate": rate}
            if size:
                began = time.process_time()
                train_by_gradient(options.config, journal, training, size, **more)
                told(f"trits by gradient, rate {rate:g}", journal, time.process_time() - began)
            began, both = time.process_time(), folder / f"{size}-scales.steps"
            shutil.copyfile(journal if size else seed, both)
            room, training = size + options.scales, Train(**given, steps=options.scale_steps)
            train_by_gradient(options.config, both, training, room, rate=3.0, **how)
            name = "then scales" if size else "scales alone"
            told(f"{name} by gradient", both, time.process_time() - began)
    write_figures(options.json, __file__, {"rows": rows, "frequencies": frequencies})
    return 0


if __name__ == "__main__":
    sys.exit(main())
