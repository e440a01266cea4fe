"""What a training costs and brings on a real model, from one start, at equal time.

    python benchmarks/training.py MODEL START TEXT EVAL [--minutes N] [--only NAME ...]
        [--seq-len N] [--max-tokens N] [--json OUT.json]

MODEL is a checkpoint with its tokenizer, START a packed one of it (`ternarize convert MODEL START
--dataset TEXT`), TEXT what is trained on, EVAL a text of other documents. Each row of VARIANTS is
trained for as many minutes (evaluations and loading left out) by `ternarize train`'s own function,
one after the other, and measured by `ternarize eval` (float32, windows that begin with what the
tokenizer puts in front of a text). The row "start" is START itself. Tokens a second are those of
the training alone; the peak is of the process, in bytes for each weight of the model, above what
was in use before.
"""

import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import hide_bars, parser, write_figures

from ternarize.convert.run import convert
from ternarize.measure.evaluate import evaluate
from ternarize.plans.recipe import Recipe, Train
from ternarize.sources.checkpoint import open_checkpoint

START = "start"
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "compiled": {"compile": True},
    "rate 0.003": {"lr": 0.003},
    "rate 0.012": {"lr": 0.012},
    "steps of 1,024 tokens": {"batch": 1024},
    "steps of 16,384 tokens": {"batch": 16384},
    "adafactor": {"optimizer": "adafactor"},
    "recomputed": {"recompute": True},
    "windows of 512": {"train_len": 512},
    "towards the text": {"objective": "text"},
}
MEASURES = {"perplexity": ",.2f", "kl_divergence": ".4f", "top1_agreement": ".4f"}


def row_of(
    name: str, model: Path, start: Path, text: Path, measured: Path, minutes: float, protocol: Any
) -> dict[str, Any]:
    """Train a variant and measure it; in a process of its own, whose peak of memory is its own."""
    hide_bars()
    if name == START:
        return {"name": name, **evaluate(start, source=model, text=measured, **protocol)}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "packed"
        training = Train(
            **{"texts": (str(text),), "start": str(start), "minutes": minutes, **VARIANTS[name]}
        )
        before = _peak()
        record = convert(model, output, Recipe("itf", train=training))
        found = record["training"]
        weights = record["source"]["parameters"]
        row = {
            "name": name,
            "tokens": found["tokens"],
            "tokens_per_second": found["tokens"] / (60 * found["minutes"]),
            "peak_bytes_per_weight": (_peak() - before) / weights,
        }
        return row | evaluate(output, source=model, text=measured, **protocol)


def _peak() -> int:
    """The most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of what it cost and of the measures with their standard errors."""
    lines = [
        "| | tokens | tokens/s | peak, bytes a weight | perplexity | KL | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"]]
        for name, style in (
            ("tokens", ",d"),
            ("tokens_per_second", ".0f"),
            ("peak_bytes_per_weight", ".1f"),
        ):
            cells.append(f"{row[name]:{style}}" if name in row else "")
        for name, style in MEASURES.items():
            found = row[name]
            cells.append(f"{found['value']:{style}} ± {found['standard_error']:{style}}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="checkpoint directory")
    arguments.add_argument("start", type=Path, help="packed checkpoint of it")
    arguments.add_argument("text", type=Path, help="text to train on")
    arguments.add_argument("eval", type=Path, help="text to measure on")
    arguments.add_argument("--minutes", type=float, default=10, help="of training, for each row")
    names = [START, *VARIANTS]
    arguments.add_argument("--only", nargs="*", choices=names, default=names, help="rows")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    arguments.add_argument("--max-tokens", type=int, default=8192, help="of the text to measure on")
    args = arguments.parse_args()
    open_checkpoint(args.model)
    rows = []
    protocol = {"seq_len": args.seq_len, "max_tokens": args.max_tokens}
    for name in args.only:
        print(f"{name} ...", file=sys.stderr)
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            given = (args.model, args.start, args.text, args.eval, args.minutes, protocol)
            found = alone.submit(row_of, name, *given).result()
        rows.append({k: v for k, v in found.items() if k not in ("model", "source", "text")})
        print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(markdown(rows))
    write_figures(args.json, __file__, {"minutes": args.minutes, "rows": rows})


if __name__ == "__main__":
    main()
