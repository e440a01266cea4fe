"""Perplexity, KL divergence and top-1 agreement of any causal language model after conversion.

    python benchmarks/quality_model.py MODEL TEXT [--only NAME ...] [--seq-len N] [--max-tokens N]
        [--json OUT.json]

MODEL is a checkpoint with its tokenizer, TEXT a file whose documents stand apart by lines
`<|doc|>`. The protocol is that of `ternarize eval`: the first 8,192 tokens, windows of 512 without
overlap that begin with what the tokenizer puts in front of a text, float32 arithmetic on the CPU.
The row "source, windows as they fall" is the source on the same text in windows that begin wherever
a document is cut, with nothing put in front. The row "gptq 128" is calibrated with `--dataset
default`; what it is measured on must not be among that text.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser, timed_convert, write_figures

from ternarize.measure.documents import cut, read_documents
from ternarize.measure.evaluate import evaluate, prepare
from ternarize.measure.language_models import compare_windows
from ternarize.models.reads import beginning
from ternarize.plans.recipe import Calibrate, Recipe

MEASURES = {"perplexity": ",.2f", "kl_divergence": ".4f", "top1_agreement": ".4f"}
RECIPES = {
    "itf 128": Recipe("itf", 128),
    "gptq 128": Recipe("gptq", 128, calibrate=Calibrate("default")),
}
SOURCE, AS_THEY_FALL = "source", "source, windows as they fall"


def as_they_fall(model: Path, text: Path, seq_len: int, max_tokens: int) -> dict[str, Any]:
    """The source's own measures in windows that have nothing put in front."""
    work = prepare(model, None, text, seq_len, max_tokens)
    ids: list[int] = []
    for document in read_documents(text):
        ids += beginning(work.tokenizer)
        ids += work.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(cut(ids[:max_tokens], [], seq_len))
    measures = compare_windows(work.load("cpu", torch.float32), windows, work.batch_size())
    return {"windows": len(windows), "tokens": windows.numel(), **measures}


def row_of(name: str, model: Path, text: Path, seq_len: int, max_tokens: int) -> dict[str, Any]:
    """The figures of one row."""
    if name == AS_THEY_FALL:
        return as_they_fall(model, text, seq_len, max_tokens)
    if name == SOURCE:
        return evaluate(model, text=text, seq_len=seq_len, max_tokens=max_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "packed"
        row = timed_convert(model, output, RECIPES[name])
        return row | evaluate(
            output, source=model, text=text, seq_len=seq_len, max_tokens=max_tokens
        )


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the measures with their standard errors."""
    lines = [
        "| | bpw | perplexity | KL, nats per token | top-1 agreement | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], f"{row['bpw']:.4g}" if "bpw" in row else ""]
        for name, style in MEASURES.items():
            found = row.get(name)
            value = "" if found is None else f"{found['value']:{style}}"
            error = None if found is None else found["standard_error"]
            cells.append(value + ("" if error is None else f" ± {error:{style}}"))
        cells.append(f"{row['seconds']:.0f}" if "seconds" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="checkpoint directory")
    arguments.add_argument("text", type=Path, help="text to measure on")
    names = [AS_THEY_FALL, SOURCE, *RECIPES]
    arguments.add_argument("--only", nargs="*", choices=names, default=names, help="rows")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    arguments.add_argument("--max-tokens", type=int, default=8192, help="of the text")
    args = arguments.parse_args()
    hide_bars()
    rows = []
    for name in args.only:
        print(f"{name} ...", file=sys.stderr)
        found = row_of(name, args.model, args.text, args.seq_len, args.max_tokens)
        private = ("model", "source", "text")
        rows.append({"name": name} | {k: v for k, v in found.items() if k not in private})
        print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(markdown(rows))
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
