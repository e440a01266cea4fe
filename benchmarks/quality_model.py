"""Perplexity, KL divergence, top-1 agreement and own writing of a causal language model.

    python benchmarks/quality_model.py MODEL TEXT [--only NAME ...] [--packed DIR ...]
        [--seq-len N] [--max-tokens N] [--num-prompts N] [--max-new-tokens N] [--json OUT.json]

MODEL is a checkpoint with its tokenizer, TEXT a file whose documents stand apart by lines
`<|doc|>`. The protocol is that of `ternarize eval`: the first 8,192 tokens, windows of 512 without
overlap that begin with what the tokenizer puts in front of a text, float32 arithmetic on the CPU.
The row "source, windows as they fall" is the source on the same text in windows that begin wherever
a document is cut, with nothing put in front. The row "gptq 128" is calibrated with `--dataset
default`; what it is measured on must not be among that text. --packed adds rows of what has been
converted or trained before.

Each model then writes, greedily, after the first 32 tokens of documents of TEXT, as `ternarize
eval --generate` does (--num-prompts 0: nothing): loops, compressibility and the rest are columns,
and what all rows wrote after three of the prompts is printed below the table.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser, timed_convert, write_figures

from ternarize.measure.documents import cut, read_documents
from ternarize.measure.evaluate import evaluate, open_evaluation
from ternarize.measure.language_models import summarize, window_columns
from ternarize.measure.report import inspect
from ternarize.measure.writing import Writing
from ternarize.models.reads import beginning
from ternarize.plans.recipe import Calibrate, Recipe

MEASURES = {"perplexity": ",.2f", "kl_divergence": ".4f", "top1_agreement": ".4f"}
WRITTEN = {
    "loops": "loops",
    "zlib_ratio": "zlib ratio",
    "stopped": "stopped",
    "distinct_4grams": "distinct 4-grams",
}
EXAMPLES = 3  # printed
RECIPES = {
    "itf 128": Recipe("itf", 128),
    "gptq 128": Recipe("gptq", 128, calibrate=Calibrate("default")),
}
SOURCE, AS_THEY_FALL = "source", "source, windows as they fall"


def as_they_fall(model: Path, text: Path, seq_len: int, max_tokens: int) -> dict[str, Any]:
    """The source's own measures in windows that have nothing put in front."""
    work = open_evaluation(model, None, text, seq_len, max_tokens)
    ids: list[int] = []
    for document in read_documents(text):
        ids += beginning(work.tokenizer)
        ids += work.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(cut(ids[:max_tokens], [], seq_len))
    models = work.load("cpu", torch.float32)
    measures = summarize(window_columns(models, windows, work.batch_size()))
    return {"windows": len(windows), "tokens": windows.numel(), **measures}


def row_of(name: str, args: Namespace) -> dict[str, Any]:
    """The figures of one row."""
    if name == AS_THEY_FALL:
        return as_they_fall(args.model, args.text, args.seq_len, args.max_tokens)
    if name == SOURCE:
        return measured(args.model, None, args)
    if name not in RECIPES:
        bpw = inspect(name)["totals"]["ternary_bpw"]
        return {"bpw": bpw} | measured(Path(name), args.model, args)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "packed"
        row = timed_convert(args.model, output, RECIPES[name])
        return row | measured(output, args.model, args)


def measured(model: Path, source: Path | None, args: Namespace) -> dict[str, Any]:
    """What `ternarize eval` finds of a model, and what it writes alone."""
    found = evaluate(
        model, source=source, text=args.text, seq_len=args.seq_len, max_tokens=args.max_tokens
    )
    if args.num_prompts:
        writing = Writing(number=args.num_prompts, max_new_tokens=args.max_new_tokens)
        work = open_evaluation(model, None, args.text, args.seq_len, args.max_tokens, writing)
        found["writing"] = work.write(work.load("cpu", torch.float32), None, None)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the measures with their standard errors."""
    heads = ["perplexity", "KL, nats per token", "top-1 agreement", *WRITTEN.values(), "seconds"]
    lines = [f"| | bpw | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for row in rows:
        cells = [row["name"], f"{row['bpw']:.4g}" if "bpw" in row else ""]
        cells += [cell(row.get(name), style) for name, style in MEASURES.items()]
        own = row.get("writing", {}).get("packed", {})
        cells += [cell(own.get(name), ".3f") for name in WRITTEN]
        cells.append(f"{row['seconds']:.0f}" if "seconds" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(found: dict[str, Any] | None, style: str) -> str:
    """A figure with its standard error, as far as there is one."""
    if found is None:
        return ""
    value, error = found["value"], found["standard_error"]
    return f"{value:{style}}" + ("" if error is None else f" ± {error:{style}}")


def written(rows: list[dict[str, Any]]) -> str:
    """What all rows wrote after some of the prompts, which are the same for all."""
    rows = [row for row in rows if "writing" in row]
    texts = rows[0]["writing"]["texts"] if rows else []
    lines = []
    for at in (n * len(texts) // EXAMPLES for n in range(min(EXAMPLES, len(texts)))):
        lines.append(f"\n> {' '.join(texts[at]['prompt'].split())} ...\n")
        for row in rows:
            text = " ".join(row["writing"]["texts"][at]["packed"]["text"].split())
            lines.append(f"- {row['name']}: {text}")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="checkpoint directory")
    arguments.add_argument("text", type=Path, help="text to measure on")
    names = [AS_THEY_FALL, SOURCE, *RECIPES]
    arguments.add_argument("--only", nargs="*", choices=names, default=names, help="rows")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    arguments.add_argument("--max-tokens", type=int, default=8192, help="of the text")
    arguments.add_argument("--packed", nargs="*", default=[], help="packed directories: more rows")
    arguments.add_argument("--num-prompts", type=int, default=32, help="to write after")
    arguments.add_argument("--max-new-tokens", type=int, default=128, help="written after each")
    args = arguments.parse_args()
    hide_bars()
    rows = []
    for name in [*args.only, *args.packed]:
        print(f"{name} ...", file=sys.stderr)
        found = row_of(name, args)
        private = ("model", "source", "text")
        rows.append(
            {"name": Path(name).name if name in args.packed else name}
            | {k: v for k, v in found.items() if k not in private}
        )
        print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(markdown(rows))
    print(written(rows))
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
