"""Bits against quality: shares of zeros and bits of scales, stored by frequencies.

    python benchmarks/zeros.py MODEL TEXT [--dataset OTHER] [--shares 0 0.5 0.6 ...]
        [--targets 1.6 1.4 ...] [--scale-bits 16 8 6] [--group-size N] [--num-samples N]
        [--cal-len N] [--seq-len N] [--max-tokens N] [--plot OUT.png] [--earlier RUN.json ...]
        [--json OUT.json]

MODEL is converted with --codec rans, for each number of bits of a scale: without data (`itf`), as
it is (share 0) and with each share of zeros; with --dataset calibrated on that (`gptq`), likewise,
and with each --target-bpw. Each is measured by `ternarize eval` on TEXT. Bits are those of the
files: trits, scales, tables and chunks. The plot has the rows of earlier runs, too, of the same
MODEL and TEXT.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import hide_bars, parser, write_figures

from ternarize.convert.run import convert
from ternarize.measure.evaluate import evaluate
from ternarize.measure.report import figure_for, inspect
from ternarize.plans.recipe import GPTQ, Calibrate, Recipe
from ternarize.publish.recode import recode

MEASURES = {"kl_divergence": ".4f", "perplexity": ",.2f", "top1_agreement": ".4f"}
OF_ENCODERS = {"cosine": ".4f"}


def row_of(model: Path, series: str, recipe: Recipe, protocol: Any) -> dict[str, Any]:
    """What a recipe gives: bits, zeros and measures; seconds of the conversion."""
    with tempfile.TemporaryDirectory() as folder:
        coded, plain = Path(folder) / "coded", Path(folder) / "plain"
        began = time.perf_counter()
        convert(model, coded, recipe)
        seconds = time.perf_counter() - began
        recode(coded, plain, "base3")
        base3, rans = (inspect(each)["totals"] for each in (plain, coded))
        found = evaluate(coded, source=model, **protocol)
    return {
        "series": series,
        "scale_bits": recipe.scale_bits,
        "asked": recipe.zeros or (recipe.calibrate and recipe.calibrate.target_bpw) or 0,
        "zeros": rans["sparsity"],
        "base3": base3["ternary_bpw"],
        "rans": rans["ternary_bpw"],
        "seconds": seconds,
        **found,
    }


def recipes(options: Any) -> list[tuple[str, Recipe]]:
    """(series, recipe) of every row."""
    found: list[tuple[str, Recipe]] = []
    size, samples, length = options.group_size, options.num_samples, options.cal_len
    for bits in options.scale_bits:
        how: dict[str, Any] = {"scale_bits": bits, "codec": "rans"}
        for share in options.shares:
            found.append(("itf", Recipe("itf", size, zeros=share or None, **how)))
        for share in options.shares if options.dataset else ():
            calibrate = Calibrate(str(options.dataset), samples, length)
            recipe = Recipe(GPTQ, size, zeros=share or None, calibrate=calibrate, **how)
            found.append(("gptq", recipe))
        for target in options.targets if options.dataset else ():
            calibrate = Calibrate(str(options.dataset), samples, length, target_bpw=target)
            found.append(("gptq, target", Recipe(GPTQ, size, calibrate=calibrate, **how)))
    return found


def draw(rows: list[dict[str, Any]], measure: str, path: Path) -> None:
    with figure_for(path, (8, 5)) as figure:
        axes = figure.subplots()
        several = len({row["scale_bits"] for row in rows}) > 1
        names = [row["series"] + several * f", scales {row['scale_bits']}" for row in rows]
        for name in dict.fromkeys(names):
            own = [row for row, each in zip(rows, names, strict=True) if each == name]
            own.sort(key=lambda row: row["rans"])
            bits, values = [row["rans"] for row in own], [row[measure]["value"] for row in own]
            axes.plot(bits, values, "o-", label=name)
            for row in own:
                axes.annotate(f"{row['zeros']:.0%}", (row["rans"], row[measure]["value"]))
        if measure == "kl_divergence":
            axes.set_yscale("log")
        axes.set(xlabel="bits a ternary weight, as stored", ylabel=measure.replace("_", " "))
        axes.legend()


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--dataset", type=Path)
    arguments.add_argument("--shares", type=float, nargs="*", default=[0, 0.5, 0.6, 0.7, 0.8, 0.9])
    arguments.add_argument("--targets", type=float, nargs="*", default=[])
    arguments.add_argument("--scale-bits", type=int, nargs="+", default=[16])
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--num-samples", type=int, default=256)
    arguments.add_argument("--cal-len", type=int)
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--max-tokens", type=int, default=8192)
    arguments.add_argument("--plot", type=Path)
    arguments.add_argument("--earlier", type=Path, nargs="*", default=[])
    options = arguments.parse_args(argv)
    hide_bars()
    protocol: Any = {"text": options.text, "seq_len": options.seq_len}
    protocol["max_tokens"] = options.max_tokens
    rows: list[dict[str, Any]] = []
    for series, recipe in recipes(options):
        rows.append(row_of(options.model, series, recipe, protocol))
        row = rows[-1]
        measures = {n: f for n, f in (MEASURES | OF_ENCODERS).items() if n in row}
        if len(rows) == 1:
            heads = "asked for", "zeros", "scales", "bits, base 3", "bits, rans", *measures, "s"
            print(f"| | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
        cells = [
            f"{row[name]['value']:{form}} ± {row[name]['standard_error']:{form}}"
            for name, form in measures.items()
        ]
        print(
            f"| {series} | {row['asked'] or '-'} | {row['zeros']:.1%} | {row['scale_bits']} | "
            f"{row['base3']:.3f} | {row['rans']:.3f} | {' | '.join(cells)} | "
            f"{row['seconds']:.0f} |",
            flush=True,
        )
    if options.plot:
        earlier = [row for path in options.earlier for row in json.loads(path.read_text())["rows"]]
        measure = "kl_divergence" if "kl_divergence" in rows[0] else "cosine"
        draw([*rows, *earlier], measure, options.plot)
    write_figures(options.json, __file__, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
