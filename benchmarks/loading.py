"""Loading a packed checkpoint from the page cache, digests checked and not.

    python benchmarks/loading.py WORK_DIRECTORY [--layers 64] [--hidden 2048] [--repeats 5]
        [--codec rans] [--json F]

Makes a synthetic BF16 checkpoint of `--layers` layers of that width (64 of 2048: 7.9 GB, deleted
afterwards), packs it, and times ternarize.load on it in one process, with imports done and the
files read once before. With `--codec rans` the packed checkpoint is recoded, and both are loaded in
turn; bytes are those of base 3 for either, so that they stand for the same weights.
"""

import shutil
import statistics
import time
from pathlib import Path

import torch
from common import parser, write_figures
from synthetic import HIDDEN, write_llama

from ternarize.convert.run import convert
from ternarize.publish.recode import recode
from ternarize.runtime.load import load


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--layers", type=int, default=64)
    arguments.add_argument("--hidden", type=int, default=HIDDEN)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--codec", choices=("base3", "rans"), default="base3")
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    name = f"{options.layers}-{options.hidden}"
    packed = options.work / f"packed-{name}"
    if not packed.exists():
        source = options.work / f"source-{name}"
        if not source.exists():
            write_llama(source, options.layers, hidden=options.hidden)
        convert(source, packed)
        shutil.rmtree(source)
    folders = {"base3": packed}
    if options.codec == "rans":
        folders["rans"] = options.work / f"rans-{name}"
        if not folders["rans"].exists():
            recode(packed, folders["rans"])
    size = sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    ways = [(codec, verify) for codec in folders for verify in (True, False)]
    seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    for number in range(options.repeats + 1):  # the first imports the model's code
        for codec, verify in ways:
            start = time.perf_counter()
            model = load(folders[codec], dtype=torch.bfloat16, verify=verify)
            if number:
                seconds[codec, verify].append(time.perf_counter() - start)
            del model
    print(f"packed: {size / 1e9:.2f} GB, {options.repeats} rounds, medians, two threads\n")
    print("| codec | digests | seconds | GB of packed bytes per second |")
    print("|---|---|---|---|")
    for (codec, verify), each in seconds.items():
        median, what = statistics.median(each), "checked" if verify else "not checked"
        print(f"| {codec} | {what} | {median:.2f} | {size / median / 1e9:.2f} |")
    table = {f"{codec}, {verify}": each for (codec, verify), each in seconds.items()}
    write_figures(options.json, __file__, {"bytes": size, "seconds": table})


if __name__ == "__main__":
    main()
