"""Cost of calibration: time of the solver by shape, where it goes, and peak memory of a conversion.

    python benchmarks/calibration.py WORK_DIR [--json OUT.json]

WORK_DIR is an empty directory on a disk with 0.5 GB free. The solver runs on random statistics.
"BLAS" is the share of the solver's processor time in matrix products and factorizations (by torch's
profiler), the rest is the loop over columns. Memory is measured in a process of its own, on a
synthetic LLaMA-shaped checkpoint of one layer (61 M weights, 243 MB in float32), 16 samples of
128 tokens: the peak resident set above what the process had with torch and transformers
imported, whose activations take less than 20 MB.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from synthetic import FFN, HIDDEN, VOCAB, write_llama
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ternarize
from ternarize import container
from ternarize.calibrate.gptq import solve
from ternarize.calibrate.statistics import Moments

SHAPES = [(256, 256), (512, 512), (1024, 1024), (256, 1024), (1024, 256)]
BLAS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linalg_cholesky_ex",
        "aten::cholesky_solve", "aten::linalg_solve_ex", "aten::_linalg_solve_ex")  # fmt: skip
SAMPLES, TOKENS = 16, 128

MEASURE = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from ternarize.convert import convert
from ternarize.plan import Calibrate, Recipe
def rss(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024
source, target, inputs, rotation = sys.argv[1:5]
base = rss("VmRSS")
how = Calibrate(inputs, {samples}, {tokens}, rotation=int(rotation))
convert(source, target, Recipe("gptq", calibrate=how))
print(json.dumps({{"peak": rss("VmHWM") - base}}))
"""


def statistics(rows: int, cols: int) -> tuple[Tensor, Moments, Moments]:
    """A random weight and moments of correlated inputs: to calibrate and held out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    found = []
    for tokens in (4 * cols, cols):
        x = torch.randn(tokens, cols, generator=generator) @ mix
        moments = Moments.empty(rows, cols, target=True)
        moments.add(x, x @ weight.T)
        found.append(moments)
    return weight, found[0], found[1]


def half(scales: Tensor) -> Tensor:
    return container.store_scales(scales).double()


def solver_row(rows: int, cols: int) -> dict[str, Any]:
    weight, train, held = statistics(rows, cols)
    began = time.perf_counter()
    solve(weight, train, held, 128, half)
    seconds = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        solve(weight, train, held, 128, half)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    blas = sum(times.get(key, 0.0) for key in BLAS) / max(1e-9, sum(times.values()))
    return {"rows": rows, "cols": cols, "seconds": seconds, "blas": blas}


def memory_rows(work: Path) -> list[dict[str, Any]]:
    source = work / "source"
    write_llama(source, 1)
    inputs = work / "inputs.safetensors"
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    count = SAMPLES * 2
    save_file({"input_ids": torch.randint(0, VOCAB, (count, TOKENS), generator=generator)}, inputs)
    layer = (2 * HIDDEN * HIDDEN + 2 * 512 * HIDDEN + 3 * HIDDEN * FFN) * 4
    rows = []
    for rotation in (256,):
        script = MEASURE.format(samples=SAMPLES, tokens=TOKENS)
        target = work / f"packed-{rotation}"
        paths = [str(path) for path in (source, target, inputs)]
        command = [sys.executable, "-c", script, *paths, str(rotation)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        peak = json.loads(result.stdout.splitlines()[-1])["peak"]
        rows.append({"rotation": rotation, "peak": peak, "block": layer, "of_block": peak / layer})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="empty directory")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    print("| rows | cols | seconds | ns per rows x cols^2 | BLAS |\n|---|---|---|---|---|")
    solver = []
    for rows, cols in SHAPES:
        row = solver_row(rows, cols)
        solver.append(row)
        per = row["seconds"] * 1e9 / (rows * cols**2)
        print(f"| {rows} | {cols} | {row['seconds']:.2f} | {per:.2f} | {row['blas']:.0%} |")
    print("\n| rotation | peak, MB | of one block in float32 |\n|---|---|---|")
    memory = memory_rows(args.work)
    for row in memory:
        print(f"| {row['rotation']} | {row['peak'] / 1e6:.0f} | {row['of_block']:.2f} |")
    if args.json:
        versions = {"ternarize": ternarize.__version__, "torch": torch.__version__}
        table = {"benchmark": "calibration", "versions": versions, "solver": solver}
        args.json.write_text(json.dumps(table | {"memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
