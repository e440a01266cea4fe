"""Perplexity, KL divergence and top-1 agreement of a small language model after conversion.

    python benchmarks/quality_lm.py DATA_DIR [--json OUT.json]

DATA_DIR holds the checkpoint `lm` and the text `text/eval.txt`. The protocol: the first 60,000
tokens, documents split at lines `<|doc|>`, each beginning with the bos token, windows of 256
without overlap, positions 2..256 count, float32 arithmetic. Everything is deterministic but for
the rounding of sums, which depends on the machine.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import ternarize
from ternarize.convert import convert
from ternarize.evaluate import evaluate
from ternarize.plan import Recipe
from ternarize.report import inspect

VARIANTS = [("absmean", 0), ("absmean", 128), ("twn", 128), ("itf", 256), ("itf", 128), ("itf", 64)]
MAX_TOKENS, SEQ_LEN = 60_000, 256
MEASURES = {"perplexity": ".2f", "kl_divergence": ".4f", "top1_agreement": ".4f"}


def measure(data: Path, method: str, group_size: int) -> dict[str, Any]:
    """Convert the language model with one recipe and compare it with its source."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "packed"
        convert(data / "lm", output, Recipe(method=method, group_size=group_size))
        bpw = inspect(output)["totals"]["ternary_bpw"]
        result = evaluate(
            output,
            source=data / "lm",
            text=data / "text" / "eval.txt",
            seq_len=SEQ_LEN,
            max_tokens=MAX_TOKENS,
        )
    return {"method": method, "group_size": group_size, "bpw": bpw} | {
        key: value for key, value in result.items() if key not in ("model", "source", "text")
    }


def source_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The source, which every variant was compared with."""
    exact = {"value": 0.0, "standard_error": 0.0}
    return {
        "method": "source (FP16)",
        "group_size": "",
        "bpw": 16.0,
        "perplexity": rows[0]["source_perplexity"],
        "kl_divergence": exact,
        "top1_agreement": {"value": 1.0, "standard_error": 0.0},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the measures with their standard errors."""
    lines = [
        "| method | group size | bpw | perplexity | KL (nats/token) | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["method"], str(row["group_size"]), f"{row['bpw']:.4g}"]
        for name, style in MEASURES.items():
            value, error = row[name]["value"], row[name]["standard_error"]
            cells.append(f"{value:{style}} ± {error:{style}}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="directory with lm and text/eval.txt")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    logging: Any = transformers.utils.logging  # has no annotations
    logging.disable_progress_bar()
    rows = []
    for method, group_size in VARIANTS:
        print(f"{method}, group size {group_size} ...", file=sys.stderr)
        rows.append(measure(args.data, method, group_size))
    print(markdown([source_row(rows), *rows]))
    if args.json:
        versions = {
            "ternarize": ternarize.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        table = {"benchmark": "quality_lm", "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
