"""Perplexity, KL divergence and top-1 agreement of a small language model after conversion.

    python benchmarks/quality_lm.py DATA_DIR [--only NAME ...] [--samples 256] [--max-tokens 60000]
        [--json OUT.json]

DATA_DIR holds the checkpoint `lm` and the texts `text/calibration.txt` and `text/eval.txt`. The
protocol: the first 60,000 tokens of eval.txt (or --max-tokens), documents split at lines `<|doc|>`,
each beginning with the bos token, windows of 256 without overlap, positions 2..256 count, float32
arithmetic.
Calibrated rows see calibration.txt only. The rows "... to other kinds" calibrate on some kinds of
its documents and are measured on the documents of the other kinds in eval.txt.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import hide_bars, parser, timed_convert, write_figures

from ternarize.measure.evaluate import evaluate
from ternarize.plans.recipe import Calibrate, Recipe

MAX_TOKENS, SEQ_LEN = 60_000, 256
SAMPLES = 256  # windows to calibrate on
MEASURES = {"perplexity": ".2f", "kl_divergence": ".4f", "top1_agreement": ".4f"}
KINDS: dict[str, Callable[[str], bool]] = {
    "pep": lambda text: text.startswith("PEP:"),
    "eip": lambda text: bool(re.match(r"---\s+eip:", text)),
    "rfc": lambda text: bool(re.search("Feature Name|Start Date|RFC PR", text[:400])),
}


def recipes(text: Path, samples: int = SAMPLES) -> dict[str, Recipe]:
    """The rows of the table: name -> recipe; calibrated ones on `samples` windows of `text`."""

    def gptq(
        group_size: int = 128,
        scale_bits: int = 16,
        times: int = 1,
        fold: bool = False,
        **options: Any,
    ) -> Recipe:
        how = Calibrate(str(text), times * samples, SEQ_LEN, **options)
        return Recipe("gptq", group_size, scale_bits=scale_bits, fold=fold, calibrate=how)

    return {
        "absmean tensor": Recipe("absmean", 0),
        "absmean 128": Recipe("absmean", 128),
        "twn 128": Recipe("twn", 128),
        "itf 256": Recipe("itf", 256),
        "itf 128": Recipe("itf", 128),
        "itf 64": Recipe("itf", 64),
        "gptq row": gptq(-1),
        "gptq 256": gptq(256),
        "gptq 128": gptq(128),
        "gptq 64, 8-bit scales": gptq(64, 8),
        "gptq 128, not rotated": gptq(128, rotation=0),
        "gptq 256, not rotated": gptq(256, rotation=0),
        "gptq 256, folded": gptq(256, fold=True),
        "gptq 64, not rotated": gptq(64, rotation=0),
        "gptq 64, folded": gptq(64, fold=True),
        "gptq 64": gptq(64),
        "gptq budget 1.75": gptq(128, target_bpw=1.75),
        "gptq budget 2": gptq(128, target_bpw=2.0),
        "gptq 128, reconstruct": gptq(128, reconstruct=150),
        "gptq 128, distill": gptq(128, times=2, distill=1000),
    }


def split_kinds(path: Path, kinds: set[str], output: Path) -> Path:
    """Write the documents of these kinds ("other": of none of them) to a file of their own."""
    documents = re.split(r"(?m)^<\|doc\|>\s*$", path.read_text("utf-8"))
    chosen = []
    for document in filter(None, map(str.strip, documents)):
        kind = next((name for name, is_of in KINDS.items() if is_of(document)), "other")
        if kind in kinds:
            chosen.append(document)
    output.write_text("\n<|doc|>\n".join(chosen), "utf-8")
    return output


def measure(data: Path, recipe: Recipe, text: Path, max_tokens: int) -> dict[str, Any]:
    """Convert the language model with one recipe and compare it with its source on `text`."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "packed"
        row = timed_convert(data / "lm", output, recipe)
        result = evaluate(
            output, source=data / "lm", text=text, seq_len=SEQ_LEN, max_tokens=max_tokens
        )
    return row | {
        key: value for key, value in result.items() if key not in ("model", "source", "text")
    }


def rows_of(
    data: Path, only: list[str] | None, samples: int, max_tokens: int, scratch: Path
) -> list[dict[str, Any]]:
    calibration, held = data / "text" / "calibration.txt", data / "text" / "eval.txt"
    todo = [(name, recipe, held) for name, recipe in recipes(calibration, samples).items()]
    groups = {"pep": {"pep"}, "eip, speeches": {"eip", "other"}}
    for name, kinds in groups.items():
        seen = split_kinds(calibration, kinds, scratch / f"calibrate {name}.txt")
        others = {*KINDS, "other"} - kinds
        unseen = split_kinds(held, others, scratch / f"eval not {name}.txt")
        todo.append((f"itf 128 on all but {name}", Recipe("itf", 128), unseen))
        todo.append(
            (f"gptq 128 from {name} to other kinds", recipes(seen, samples)["gptq 128"], unseen)
        )
    rows = []
    for name, recipe, text in todo:
        if only is None or name in only:
            print(f"{name} ...", file=sys.stderr)
            rows.append({"name": name} | measure(data, recipe, text, max_tokens))
            print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the measures with their standard errors."""
    lines = [
        "| method, group | bpw | perplexity | the source's | KL, nats/token | top-1 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], f"{row['bpw']:.4g}"]
        for name, style in MEASURES.items():
            value, error = row[name]["value"], row[name]["standard_error"]
            cells.append(f"{value:{style}} ± {error:{style}}")
        cells.insert(3, f"{row['source_perplexity']['value']:.2f}")
        cells.append(f"{row['seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="directory with lm and text")
    arguments.add_argument("--only", nargs="*", help="names of rows")
    arguments.add_argument("--samples", type=int, default=SAMPLES, help="to calibrate on")
    arguments.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="to measure on")
    args = arguments.parse_args()
    hide_bars()
    with tempfile.TemporaryDirectory() as scratch:
        rows = rows_of(args.data, args.only, args.samples, args.max_tokens, Path(scratch))
    print(markdown(rows))
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
