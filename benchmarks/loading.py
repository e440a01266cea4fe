"""Loading a packed checkpoint from the page cache, digests checked and not.

    python benchmarks/loading.py WORK_DIRECTORY [--layers 64] [--repeats 5] [--json F]

Makes a synthetic BF16 checkpoint of `--layers` layers (64: 7.9 GB, deleted afterwards), packs it,
and times ternarize.load on it in one process, with imports done and the file read once before.
"""

import shutil
import statistics
import time
from pathlib import Path

import torch
from common import parser, write_figures
from synthetic import write_llama

from ternarize.convert.run import convert
from ternarize.runtime.load import load


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--layers", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    packed = options.work / f"packed-{options.layers}"
    if not packed.exists():
        source = options.work / f"source-{options.layers}"
        if not source.exists():
            write_llama(source, options.layers)
        convert(source, packed)
        shutil.rmtree(source)
    size = sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(options.repeats + 1):  # the first imports the model's code
        for verify in (True, False):
            start = time.perf_counter()
            model = load(packed, dtype=torch.bfloat16, verify=verify)
            if number:
                seconds[verify].append(time.perf_counter() - start)
            del model
    print(f"packed: {size / 1e9:.2f} GB, {options.repeats} rounds, medians, two threads\n")
    print("| digests | seconds | GB of packed bytes per second |")
    print("|---|---|---|")
    for verify, what in ((True, "checked"), (False, "not checked")):
        median = statistics.median(seconds[verify])
        print(f"| {what} | {median:.2f} | {size / median / 1e9:.2f} |")
    result = {"bytes": size, "checked": seconds[True], "unchecked": seconds[False]}
    write_figures(options.json, __file__, result)


if __name__ == "__main__":
    main()
