"""Conversion against a plain copy: time and memory on a synthetic LLaMA-shaped BF16 checkpoint.

    python benchmarks/conversion.py WORK_DIRECTORY [--repeats 5] [--layers 16] [--large]
        [--beside PYTHON] [--json F]

WORK_DIRECTORY needs about 5 GB free (13 GB with --large). In each round `cp -r SOURCE COPY; sync`
and `convert` run one after the other on the same source; figures are medians, and the ratio is
taken round by round. Two times are given for the conversion: of the call `convert()` in a process
that has imported torch and transformers, and of the whole command, interpreter start included.
Memory is the peak resident set of that process, above what it had with torch imported. `--beside`
names the interpreter of another environment, as that of an older checkout, which converts in the
same rounds.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import parser, write_figures
from synthetic import write_llama

CHILD = """
import json, resource, sys, time
import torch
def rss(key):
    text = open("/proc/self/status").read()
    return int(text.split(key + ":")[1].split()[0]) * 1024
base = rss("VmRSS")
from ternarize.convert.run import convert
from ternarize.plans.recipe import Recipe
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2], Recipe(sys.argv[3]), threads=2)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_above_torch": rss("VmHWM") - base,
    "base": base,
}))
"""


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds of `cp -r` and `sync`."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert_once(
    source: Path, target: Path, method: str, python: str = sys.executable
) -> dict[str, float]:
    """Run one conversion in a fresh process; seconds of the call and of the process, and memory."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    done = subprocess.run(
        [python, "-c", CHILD, str(source), str(target), method],
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, float] = json.loads(done.stdout)
    result["process_seconds"] = time.perf_counter() - start
    result["packed_bytes"] = sum(f.stat().st_size for f in target.iterdir())
    shutil.rmtree(target)
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--large", action="store_true", help="also four times the size, once")
    arguments.add_argument("--beside", help="an interpreter of another environment")
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source, target = options.work / f"source-{options.layers}", options.work / "target"
    shutil.rmtree(target, ignore_errors=True)
    if not source.exists():
        write_llama(source, options.layers)
    size = sum(f.stat().st_size for f in source.iterdir())
    methods = ("absmean", "twn", "itf")
    ways = {method: (method, sys.executable) for method in methods}
    if options.beside:
        ways |= {f"{method}, beside": (method, options.beside) for method in methods}
    rounds: list[dict[str, Any]] = []
    for number in range(options.repeats + 1):  # the first warms the page cache
        copy = copy_seconds(source, target)
        row: dict[str, Any] = {"copy": copy}
        for name, (method, python) in ways.items():
            row[name] = convert_once(source, target, method, python)
        if number:
            rounds.append(row)
    print(f"source: {size / 1e9:.2f} GB of BF16, {options.repeats} rounds, medians\n")
    print("| | seconds | of cp + sync | whole process, s | peak memory above torch, MB | GB/s |")
    print("|---|---|---|---|---|---|")
    copy = statistics.median(row["copy"] for row in rounds)
    print(f"| cp -r and sync | {copy:.2f} | 1 | | | {size / copy / 1e9:.2f} |")
    for method in ways:
        seconds = statistics.median(row[method]["seconds"] for row in rounds)
        ratio = statistics.median(row[method]["seconds"] / row["copy"] for row in rounds)
        process = statistics.median(row[method]["process_seconds"] for row in rounds)
        memory = max(row[method]["peak_above_torch"] for row in rounds)
        print(
            f"| convert, {method} | {seconds:.2f} | {ratio:.2f} | {process:.2f} | "
            f"{memory / 1e6:.0f} | {size / seconds / 1e9:.2f} |"
        )
    result: dict[str, Any] = {"source_bytes": size, "rounds": rounds}
    if options.large:
        large = options.work / f"source-{options.layers * 4}"
        if not large.exists():
            write_llama(large, options.layers * 4)
        result["large_bytes"] = sum(f.stat().st_size for f in large.iterdir())
        result["large"] = convert_once(large, target, "absmean")
        print(
            f"\n{result['large_bytes'] / 1e9:.2f} GB: {result['large']['seconds']:.1f} s, peak "
            f"memory above torch {result['large']['peak_above_torch'] / 1e6:.0f} MB"
        )
    write_figures(options.json, __file__, result)


if __name__ == "__main__":
    main()
