"""Whether a conversion gives the same bytes: `python -m tests.campaigns.determinism --repeat 20`.

    threads     1, 2, 7 and 64, with tensors that take a random time each, so in any order
    torch       the same without the compiled core, on 1 and 2 threads of torch
    variants    each instruction set of the compiled core that this CPU has
    order       a source whose index names the tensors in another order
    other       all that with other interpreters, which have another torch (--python)
    arm         ternarizing and packing by the core built for AArch64, under an emulator
    calibrated  the same machine, device and number of threads; and, as a figure, other numbers

For each, how many runs there were and how many different sets of files came out: one is wanted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .kill import CALIBRATED, CODED, EXAMPLE
from .runs import HERE, convert, digests, fork, make_source, preloaded, report, warm_up, workshop

INDEX = "model.safetensors.index.json"
THREADS = (1, 2, 7, 64)
RECIPES: dict[str, tuple[str, ...]] = {
    "absmean": (),
    "twn, rows": ("--method", "twn", "--group-size", "-1"),
    "itf, tensors": ("--method", "itf", "--group-size", "0"),
    "int4 ends": ("--method", "itf", "--head", "int4", "--embeddings", "int4"),
    "two planes, 8-bit scales, int8 head": (
        *("--method", "itf", "--scale-bits", "8"),
        *("--planes", "*.o_proj.weight", "--head", "int8"),
    ),
    "coded": (*CODED, "--scale-bits", "6"),
}


def all_of(folder: Path, only: str = "") -> str:
    """One digest of all files whose names end so."""
    found = {name: digest for name, digest in digests(folder).items() if name.endswith(only)}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def converted(
    source: Path, output: Path, options: Sequence[str], before: Callable[[], Any], only: str = ""
) -> str:
    """The digest of a conversion in a fork."""
    run = fork(convert(source, output, *options, before=before))
    assert run.code == 0, run.said
    found = all_of(output, only)
    shutil.rmtree(output)
    return found


def setting(seed: int, torch_threads: int = 1, cpu: str = "") -> Callable[[], None]:
    """What is done in a fork before: tensors take a random time, threads of torch are set."""

    def before() -> None:
        import torch

        import ternarize.convert.run as module
        from ternarize.convert.tensor import convert_tensor
        from ternarize.native import lib

        chance = random.Random(seed)

        def late(*args: Any) -> Any:
            time.sleep(chance.uniform(0, 0.004))
            return convert_tensor(*args)

        vars(module)["convert_tensor"] = late
        torch.set_num_threads(torch_threads)
        if cpu:
            assert lib is not None
            lib.use_cpu(cpu)

    return before


def quarter(repeat: int) -> int:
    """Of what is less likely to differ, fewer runs: at least one."""
    return -(-repeat // 4)


# what a run is called, its source, the threads of the conversion, and what is done before
Planned = tuple[str, Path, int, Callable[[], None]]


def planned(source: Path, repeat: int, seed: int) -> Iterator[Planned]:
    """The runs of this process: with the compiled core, or without (TERNARIZE_NATIVE=0)."""
    import torch

    from ternarize.native import lib

    if lib is None:
        kind = f"torch {torch.__version__} alone"
        for turn in range(quarter(repeat)):
            for threads in THREADS:
                yield kind, source, threads, setting(seed + turn, 1 + turn % 2)
        return
    core = f"core, torch {torch.__version__}"
    for turn in range(repeat):
        for threads in THREADS:
            yield f"{core}, threads", source, threads, setting(seed + turn)
    for turn in range(quarter(repeat)):
        for cpu in lib.cpus():
            yield f"{core}, {cpu}", source, 2, setting(seed + turn, 1, cpu)
    if (source / INDEX).exists():
        for turn in range(repeat):
            other = reordered(source, source.with_name("reordered"), seed + turn)
            yield f"{core}, order", other, 2, setting(seed + turn)
            shutil.rmtree(other)


def work(
    folder: Path, sources: Sequence[str], repeat: int, seed: int, recipes: int
) -> list[dict[str, Any]]:
    """Rows of what came of the runs of this process."""
    from ternarize.native import lib

    rows = []
    for name in sources:
        for recipe, options in list(RECIPES.items())[:recipes]:
            found: dict[str, list[str]] = {}
            # with one recipe as often as asked for, with the others a quarter
            count = repeat if not options else quarter(repeat)
            if lib is None and "--codec" in options:  # torch codes byte by byte
                count = 1
            for kind, source, threads, before in planned(folder / name, count, seed):
                more = ("--threads", str(threads), *options)
                got = converted(source, folder / f"out{os.getpid()}", more, before)
                found.setdefault(kind, []).append(got)
            for kind, digests_of in found.items():
                row = {"source": name, "recipe": recipe, "kind": kind, "runs": len(digests_of)}
                rows.append({**row, "digests": sorted(set(digests_of))})
    return rows


def reordered(source: Path, target: Path, seed: int) -> Path:
    """The source with its index in another order, made in another order of files."""
    index = json.loads((source / INDEX).read_text())
    names = list(index["weight_map"])
    random.Random(seed).shuffle(names)
    index["weight_map"] = {name: index["weight_map"][name] for name in names}
    target.mkdir()
    paths = [path for path in source.rglob("*") if path.is_file()]
    random.Random(seed).shuffle(paths)
    for path in paths:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copy2(path, place)
    (target / INDEX).write_text(json.dumps(index))
    return target


def elsewhere(
    folder: Path, args: argparse.Namespace, python: str, repeat: int, **env: str
) -> list[dict[str, Any]]:
    """The rows of another process."""
    out = folder / "rows.json"
    command = [python, "-m", "tests.campaigns.determinism", "--inside", str(folder)]
    command += ["--repeat", str(repeat), "--seed", str(args.seed), "--json", str(out)]
    command += ["--sources", *args.sources, "--recipes", str(args.recipes)]
    subprocess.run(command, env={**os.environ, **env}, check=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def calibrated(folder: Path, repeat: int) -> tuple[list[dict[str, Any]], int]:
    """A few samples, by the number of torch's threads; and how many different weights of all.

    The record has the number of threads in it, so that over both the weights alone are compared.
    """
    rows, weights = [], set()
    for threads in (1, 2):
        found = {
            converted(EXAMPLE, folder / "out", CALIBRATED, setting(turn, threads))
            for turn in range(repeat)
        }
        last = setting(repeat, threads)
        weights.add(converted(EXAMPLE, folder / "out", CALIBRATED, last, ".safetensors"))
        row = {"source": "example", "recipe": "gptq", "kind": f"calibrated, {threads} threads"}
        rows.append({**row, "runs": repeat, "digests": sorted(found)})
    return rows, len(weights)


def arm(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Random matrices, ternarized and packed by the package here and by the core on AArch64."""
    sys.path.insert(0, str(HERE.parent))
    import core_sources
    import test_arm
    import torch

    from ternarize.files.headers import DTYPE_NAMES
    from ternarize.trits.base3 import pack
    from ternarize.trits.methods import METHODS

    if test_arm.MISSING:
        print(f"arm: left out, without {', '.join(test_arm.MISSING)}")
        return []
    sources = core_sources.sources("aarch64")
    program = test_arm.build(folder / "arm", test_arm.CROSS, "packed_bits.cpp", ["-O3"], sources)
    random_bits = torch.Generator().manual_seed(seed)
    failures, runs = [], 0
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i in range(count):
        method = sorted(METHODS)[i % 3]
        dtype, group_size = dtypes[i // 3 % 3], (128, -1, 0, 7, 64)[i % 5]
        rows, cols = (int(n) for n in torch.randint(1, 400, (2,), generator=random_bits))
        weight = (0.05 * torch.randn(rows, cols, generator=random_bits)).to(dtype)
        made = METHODS[method](weight, group_size)
        want = pack(made.trits, group_size).numpy().tobytes() + made.scales.numpy().tobytes()
        numbers = (rows, cols, group_size, (1, 3)[i % 2])
        command = [*test_arm.emulator("cortex-a76"), program, method, DTYPE_NAMES[dtype]]
        got = subprocess.run(
            [*command, *map(str, numbers)],
            input=weight.view(torch.uint8).numpy().tobytes(),
            capture_output=True,
            check=True,
            env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
        ).stdout
        runs += 1
        variants, rest = divmod(len(got), len(want))
        if rest or variants < 2 or got != want * variants:
            failures.append(f"{method} {dtype} {numbers}")
    row = {"source": "random", "recipe": "all", "kind": "arm", "runs": runs}
    return [{**row, "digests": ["equal", *failures]}]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", "--count", type=int, default=20)
    parser.add_argument("--sources", nargs="+", default=["dense", "moe", "shards"])
    parser.add_argument("--python", nargs="*", default=[], help="interpreters with another torch")
    parser.add_argument("--recipes", type=int, default=len(RECIPES), help="the first so many")
    parser.add_argument("--calibrated", type=int, help="runs; default: a quarter of --repeat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--where", type=Path, help="a fast disk, such as /dev/shm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    preloaded("tests.campaigns.determinism")
    if args.inside:
        warm_up(*(args.inside / name for name in args.sources))
        args.json.write_text(
            json.dumps(work(args.inside, args.sources, args.repeat, args.seed, args.recipes))
        )
        return 0
    with workshop(args.where) as folder:
        for name in args.sources:
            make_source(name, folder / name)
        few, fitted = quarter(args.repeat), 0
        rows = []
        for python, repeat in [
            (sys.executable, args.repeat),
            *((each, few) for each in args.python),
        ]:
            rows += elsewhere(folder, args, python, repeat)
            rows += elsewhere(folder, args, python, repeat, TERNARIZE_NATIVE="0")
        rows += arm(folder, 12 * args.repeat, args.seed)
        times = few if args.calibrated is None else args.calibrated
        if times:
            warm_up(EXAMPLE)
            more, fitted = calibrated(folder, times)
            rows += more
    failures = []
    for name, recipe in dict.fromkeys((row["source"], row["recipe"]) for row in rows):
        same = [row for row in rows if (row["source"], row["recipe"]) == (name, recipe)]
        groups = [[row] for row in same] if recipe == "gptq" else [same]
        for group in groups:
            different = {digest for row in group for digest in row["digests"]}
            if len(different) > 1:
                kinds = ", ".join(row["kind"] for row in group)
                failures.append(f"{name}, {recipe}: {len(different)} results of {kinds}")
    for row in rows:
        row["results"] = len(row.pop("digests"))
    print(f"calibrated, over all numbers of threads: {fitted} results")
    about = {"seed": args.seed, "repeat": args.repeat, "calibrated_over_threads": fitted}
    return report("determinism", rows, failures, args.json, **about)


if __name__ == "__main__":
    raise SystemExit(main())
