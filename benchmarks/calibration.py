"""Cost of calibration: time of the solver by shape, where it goes, and peak memory of a conversion.

    python benchmarks/calibration.py WORK_DIR [--threads N] [--shapes ROWSxCOLS ...] [--json OUT]

WORK_DIR is an empty directory on a disk with 0.5 GB free. The solver runs on random, correlated
inputs, groups of 128. Seconds are processor time; "BLAS" is the share of it, by torch's profiler,
in products of matrices and in factorizations and triangular systems; products of a matrix with a
vector do not count.

Memory is measured in processes of their own, on a synthetic LLaMA-shaped checkpoint of one layer
(61 M weights, 243 MB in float32; its widest matrix has more elements squared in columns than the
layer has weights), calibrated on 16 and on 32 samples of 128 tokens: the peak resident set above
what the process had with torch and transformers imported. What twice the samples add is
activations, and is taken off once from the peak of 16 samples for "without activations".
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import parser, write_figures
from safetensors.torch import save_file
from synthetic import FFN, HIDDEN, KV, VOCAB, write_llama
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ternarize.calibrate.gptq import probe_rows, solve
from ternarize.calibrate.moments import Inputs, Moments
from ternarize.trits.scales import store_scales

SHAPES = ["256x256", "256x768", "512x512", "1024x1024", "2048x2048", "4096x4096"]
SHARED = 64  # directions in which inputs are correlated
# names of torch's operators that are BLAS-3 or LAPACK
BLAS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linalg_cholesky_ex", "linalg_solve_triangular",
        "_linalg_solve_ex", "linalg_lu_factor_ex"}  # fmt: skip
SAMPLES, TOKENS = 16, 128

MEASURE = """
import json, sys, torch, transformers
from ternarize.convert.run import convert
from ternarize.plans.recipe import Calibrate, Recipe
torch.set_num_threads({threads})
def rss(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024
source, target, inputs = sys.argv[1:4]
base = rss("VmRSS")
convert(source, target, Recipe("gptq", calibrate=Calibrate(inputs, {samples}, {tokens})))
print(json.dumps({{"peak": rss("VmHWM") - base}}))
"""


def statistics(rows: int, cols: int) -> tuple[Tensor, Moments, Moments]:
    """A random weight and moments of correlated inputs: to calibrate and held out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    mix = torch.randn(SHARED, cols, generator=generator)
    size = torch.logspace(0, -1, cols)
    found: list[Moments] = []
    for tokens in (2 * cols, 512):
        held = bool(found)
        wanted = weight[probe_rows(rows)] if held else weight
        moments = Moments.empty(Inputs.empty(cols, keep=held), len(wanted), target=True)
        for first in range(0, tokens, 1024):
            count = min(1024, tokens - first)
            x = torch.randn(count, cols, generator=generator)
            x += torch.randn(count, SHARED, generator=generator) @ mix * 0.2
            x *= size
            moments.inputs.add(x)
            moments.add(x, x @ wanted.T)
        found.append(moments)
    return weight, found[0], found[1]


def half(scales: Tensor) -> Tensor:
    return store_scales(scales).double()


def solver_row(rows: int, cols: int) -> dict[str, Any]:
    weight, train, held = statistics(rows, cols)
    began = time.process_time()
    error = solve(weight, train, held, 128, half).error
    seconds = time.process_time() - began
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        solve(weight, train, held, 128, half)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    blas = sum(value for key, value in times.items() if key.removeprefix("aten::") in BLAS)
    share = blas / max(1e-9, sum(times.values()))
    return {"rows": rows, "cols": cols, "seconds": seconds, "blas": share, "error": error}


def memory_row(work: Path, samples: int, threads: int) -> dict[str, Any]:
    source, inputs = work / "source", work / f"inputs-{samples}.safetensors"
    if not source.exists():
        write_llama(source, 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (2 * samples, TOKENS), generator=generator)
    save_file({"input_ids": ids}, inputs)
    layer = (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * HIDDEN * FFN) * 4
    script = MEASURE.format(samples=samples, tokens=TOKENS, threads=threads)
    paths = [str(path) for path in (source, work / f"packed-{samples}", inputs)]
    command = [sys.executable, "-c", script, *paths]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = json.loads(result.stdout.splitlines()[-1])["peak"]
    return {"samples": samples, "peak": peak, "block": layer, "of_block": peak / layer}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path, help="empty directory")
    arguments.add_argument("--threads", type=int, default=1, help="of torch")
    arguments.add_argument("--shapes", nargs="*", default=SHAPES, help="of matrices, as 256x768")
    arguments.add_argument("--no-memory", action="store_true", help="measure time only")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    print("| rows | cols | seconds | ns per rows x cols^2 | BLAS |\n|---|---|---|---|---|")
    solver = []
    for rows, cols in (map(int, shape.split("x")) for shape in args.shapes):
        row = solver_row(rows, cols)
        solver.append(row)
        per = row["seconds"] * 1e9 / (rows * cols**2)
        print(f"| {rows} | {cols} | {row['seconds']:.2f} | {per:.2f} | {row['blas']:.0%} |")
    memory: list[dict[str, Any]] = []
    if not args.no_memory:
        memory = [memory_row(args.work, n, args.threads) for n in (SAMPLES, 2 * SAMPLES)]
        few, many = memory
        without = 2 * few["peak"] - many["peak"]
        memory.append({**few, "samples": 0, "peak": without, "of_block": without / few["block"]})
        print("\n| samples | peak, MB | of one block in float32 |\n|---|---|---|")
        for row in memory:
            name = row["samples"] or "without activations"
            print(f"| {name} | {row['peak'] / 1e6:.0f} | {row['of_block']:.2f} |")
    figures = {"threads": args.threads, "solver": solver, "memory": memory}
    write_figures(args.json, __file__, figures)


if __name__ == "__main__":
    main()
