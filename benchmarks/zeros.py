"""Bits against quality: a share of zeros of one's own, stored by frequencies.

    python benchmarks/zeros.py MODEL TEXT [--shares 0.5 0.6 ...] [--group-size N] [--scale-bits N]
        [--seq-len N] [--max-tokens N] [--plot OUT.png] [--json OUT.json]

MODEL is converted without data (`itf`), as it is and with each share of zeros, recoded, and
measured by `ternarize eval` on TEXT. Bits are those of the files: trits, scales, tables and chunks.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import hide_bars, parser, write_figures

from ternarize.convert.run import convert
from ternarize.measure.evaluate import evaluate
from ternarize.measure.report import figure_for, inspect
from ternarize.plans.recipe import Recipe
from ternarize.publish.recode import recode

MEASURES = {"kl_divergence": ".4f", "perplexity": ",.2f", "top1_agreement": ".4f"}
OF_ENCODERS = {"cosine": ".4f"}


def row_of(model: Path, share: float | None, recipe: Recipe, protocol: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        packed, coded = Path(folder) / "packed", Path(folder) / "coded"
        convert(model, packed, recipe)
        recode(packed, coded)
        bits = [inspect(each)["totals"]["ternary_bpw"] for each in (packed, coded)]
        found = evaluate(coded, source=model, **protocol)
        totals = inspect(coded)["totals"]
    return {"share": share, "zeros": totals["sparsity"], "base3": bits[0], "rans": bits[1], **found}


def draw(rows: list[dict[str, Any]], measure: str, path: Path) -> None:
    with figure_for(path, (8, 5)) as figure:
        axes = figure.subplots()
        axes.plot([row["rans"] for row in rows], [row[measure]["value"] for row in rows], "o-")
        for row in rows:
            axes.annotate(f"{row['zeros']:.0%}", (row["rans"], row[measure]["value"]))
        axes.set(xlabel="bits a ternary weight, as stored", ylabel=measure.replace("_", " "))


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--scale-bits", type=int, default=16)
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--max-tokens", type=int, default=8192)
    arguments.add_argument("--plot", type=Path)
    options = arguments.parse_args(argv)
    hide_bars()
    protocol: Any = {"text": options.text, "seq_len": options.seq_len}
    protocol["max_tokens"] = options.max_tokens
    rows: list[dict[str, Any]] = []
    for share in (None, *options.shares):
        how = {"scale_bits": options.scale_bits, "zeros": share}
        rows.append(
            row_of(options.model, share, Recipe("itf", options.group_size, **how), protocol)
        )
        row = rows[-1]
        measures = {n: f for n, f in (MEASURES | OF_ENCODERS).items() if n in row}
        if len(rows) == 1:
            print(f"| zeros | bits, base 3 | bits, rans | {' | '.join(measures)} |")
            print("|---" * (3 + len(measures)) + "|")
        cells = [f"{row[name]['value']:{form}}" for name, form in measures.items()]
        print(
            f"| {row['zeros']:.1%} | {row['base3']:.3f} | {row['rans']:.3f} | "
            f"{' | '.join(cells)} |",
            flush=True,
        )
    if options.plot:
        draw(rows, "kl_divergence" if "kl_divergence" in rows[0] else "cosine", options.plot)
    write_figures(options.json, __file__, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
