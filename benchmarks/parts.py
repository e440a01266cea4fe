"""A conversion in parts side by side against one process, with one thread each.

    python benchmarks/parts.py WORK_DIRECTORY [--repeats 3] [--layers 16] [--method itf] [--json F]

WORK_DIRECTORY needs about 3 GB free. In each round one process converts a synthetic LLaMA-shaped
BF16 checkpoint alone; then each of --counts of processes does its part of it side by side, and one
puts them together; every process has one thread. The source is one file, or (--files N) several.
Seconds are those of `convert()` in processes that have imported torch and transformers, and begin
together; processor time is the most that one of them took, which machines of their own would wait
for. Figures are medians, ratios are taken round by round, and the bytes are compared.
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

from ternarize.files.sums import SUMS

CHILD = """
import json, sys, time
import torch, transformers
from ternarize.convert.run import convert
from ternarize.plans.recipe import Recipe
torch.set_num_threads(1)
source, output, method, more = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
start = time.process_time()
convert(source, output, Recipe(method), threads=1, **json.loads(more))
print(time.process_time() - start)
"""


def times_of(
    work: list[dict[str, Any]], source: Path, output: Path, method: str
) -> dict[str, float]:
    """From the common start of some processes to the end of the last; processor time, the most."""
    processes = []
    for more in work:
        words = [str(source), str(output), method, json.dumps(more)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", CHILD, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    seconds = time.perf_counter() - start
    assert not any(process.returncode for process in processes)
    return {"seconds": seconds, "processor": max(map(float, said))}


def one_round(source: Path, work: Path, method: str, counts: list[int]) -> dict[str, Any]:
    """Times of one process alone, and of each number of parts: side by side, and to finish."""
    alone = work / "alone"
    for left in (*work.glob("alone*"), *work.glob("parts*")):  # of a run that was broken off
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    row: dict[str, Any] = {"alone": times_of([{}], source, alone, method)}
    for count in counts:
        output = work / "parts"
        parts = [{"part": [index, count]} for index in range(1, count + 1)]
        side = times_of(parts, source, output, method)
        finish = times_of([{"finish": True}], source, output, method)
        assert (output / SUMS).read_bytes() == (alone / SUMS).read_bytes()
        row[str(count)] = {"parts": side, "finish": finish}
        shutil.rmtree(output)
    shutil.rmtree(alone)
    return row


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--files", type=int, default=1)
    arguments.add_argument("--method", default="itf")
    arguments.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.work / f"source-{options.layers}-{options.files}"
    if not source.exists():
        write_llama(source, options.layers, -(-options.layers // options.files))
    size = sum(path.stat().st_size for path in source.iterdir())
    method, rounds = options.method, []
    for number in range(options.repeats + 1):  # the first warms the page cache
        row = one_round(source, options.work, method, options.counts)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if number:
            rounds.append(row)
    files = len(list(source.glob("*.safetensors")))
    print(f"{size / 1e9:.2f} GB of BF16 in {files} files, {method}, one thread a process\n")
    for kind in ("seconds", "processor"):
        print(f"| {kind} | parts | --finish | together | times as fast as one process |")
        print("|---|---|---|---|---|")
        alone = statistics.median(row["alone"][kind] for row in rounds)
        print(f"| one process, no parts | | | {alone:.2f} | 1 |")
        for count in map(str, options.counts):
            side, finish = (
                statistics.median(row[count][each][kind] for row in rounds)
                for each in ("parts", "finish")
            )
            whole = [row[count]["parts"][kind] + row[count]["finish"][kind] for row in rounds]
            pairs = zip(rounds, whole, strict=True)
            ratio = statistics.median(row["alone"][kind] / both for row, both in pairs)
            middle = statistics.median(whole)
            print(f"| {count} parts | {side:.2f} | {finish:.2f} | {middle:.2f} | {ratio:.2f} |")
        print()
    write_figures(options.json, __file__, {"source_bytes": size, "files": files, "rounds": rounds})


if __name__ == "__main__":
    main()
