"""Loading a packed checkpoint from the page cache, digests checked and not.

    python benchmarks/loading.py WORK_DIRECTORY [--layers 64] [--hidden 2048] [--repeats 5]
        [--codec rans] [--beside PYTHON] [--json F]

Makes a synthetic BF16 checkpoint of `--layers` layers of that width (64 of 2048: 7.9 GB, deleted
afterwards), packs it, and times ternarize.load on it in one process, with imports done and the
files read once before. With `--codec rans` the packed checkpoint is recoded, and both are loaded in
turn; bytes are those of base 3 for either, so that they stand for the same weights. `--beside`
names the interpreter of another environment, as that of an older checkout, which loads the same
files in the same rounds.
"""

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from common import parser, write_figures
from synthetic import HIDDEN, write_llama

from ternarize.convert.run import convert
from ternarize.publish.recode import recode

CHILD = """
import sys, time
import torch
from ternarize.runtime.load import load
for line in sys.stdin:
    verify, path = line.rstrip().split(" ", 1)
    start = time.perf_counter()
    model = load(path, dtype=torch.bfloat16, verify=verify == "True")
    print("seconds", time.perf_counter() - start, flush=True)
    del model
"""


class Loader:
    """A process that loads what it is told to."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, folder: Path, *, verify: bool) -> float:
        """How long a load takes."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{verify} {folder}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"{folder}: the process that loads it has ended")

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--layers", type=int, default=64)
    arguments.add_argument("--hidden", type=int, default=HIDDEN)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--codec", choices=("base3", "rans"), default="base3")
    arguments.add_argument("--beside", help="an interpreter of another environment")
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
    loaders = {"": Loader(sys.executable)}
    if options.beside:
        loaders[", beside"] = Loader(options.beside)
    ways = [
        (codec, verify, whose) for codec in folders for verify in (True, False) for whose in loaders
    ]
    seconds: dict[tuple[str, bool, str], list[float]] = {way: [] for way in ways}
    for number in range(options.repeats + 1):  # the first imports the model's code
        for codec, verify, whose in ways:
            taken = loaders[whose].seconds(folders[codec], verify=verify)
            if number:
                seconds[codec, verify, whose].append(taken)
    for loader in loaders.values():
        loader.end()
    print(f"packed: {size / 1e9:.2f} GB, {options.repeats} rounds, medians, two threads\n")
    print("| codec | digests | seconds | GB of packed bytes per second |")
    print("|---|---|---|---|")
    for (codec, verify, whose), each in seconds.items():
        median, what = statistics.median(each), "checked" if verify else "not checked"
        print(f"| {codec}{whose} | {what} | {median:.2f} | {size / median / 1e9:.2f} |")
    table = {f"{codec}{whose}, {verify}": each for (codec, verify, whose), each in seconds.items()}
    write_figures(options.json, __file__, {"bytes": size, "seconds": table})


if __name__ == "__main__":
    main()
