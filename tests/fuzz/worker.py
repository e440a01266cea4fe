"""Runs one Python target, in a process of its own.

    python -m fuzz.worker TARGET --count N --corpus FOLDER --place FOLDER [--seed N] [--plain]
    python -m fuzz.worker TARGET --corpus FOLDER --place FOLDER --lines

With atheris, inputs are chosen by the coverage that they reach, and FOLDER keeps those that reached
something new. Without it (or with --plain) the same mutations are applied to inputs drawn from the
seeds and from earlier results, with no coverage to guide them. The first finding ends the run with
an exception; its input is left in FOLDER/../crash-*. The last lines say what was done, in
libFuzzer's words. --lines fuzzes nothing: it runs what FOLDER holds, and prints how many lines of
the target's modules were reached, as JSON.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib
import importlib.util
import json
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
HANG = 120  # seconds on the clock; what counts as slow is in `targets`, in seconds of the processor


def load(atheris: ModuleType | None) -> ModuleType:
    """The module `targets`; with atheris the code that is fuzzed is instrumented."""
    sys.path.insert(0, str(HERE.parents[1] / "formats"))
    for heavy in ("torch", "gguf", "transformers", "rich.console", "typer", "huggingface_hub"):
        importlib.import_module(heavy)  # not instrumented
    guide: Any = contextlib.nullcontext()
    if atheris is not None:
        names = ["trits", "files", "sources", "steps"]
        names += ["convert.verify", "measure.report", "publish.card"]
        guide = atheris.instrument_imports(
            include=[f"ternarize.{n}" for n in names] + ["reference", "reference_steps"]
        )
    with guide:
        return importlib.import_module("fuzz.targets")


def fuzz_guided(atheris: Any, test: Callable[[bytes], None], mutate: Any, options: Any) -> None:
    """Let libFuzzer choose; does not return."""

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 20 == 0:
            return bytes(atheris.Mutate(data, max_size))
        return bytes(mutate(data, random.Random(seed))[:max_size])

    arguments = [
        sys.argv[0],
        str(options.corpus),
        f"-runs={options.count}",
        f"-seed={options.seed}",
    ]
    arguments += ["-max_len=65536", "-len_control=0", "-timeout=300", "-print_final_stats=1"]
    arguments += [
        f"-artifact_prefix={options.corpus.parent}/",
        "-rss_limit_mb=4096",
        "-verbosity=1",
    ]
    atheris.Setup(arguments, test, custom_mutator=mutator)
    atheris.Fuzz()


def fuzz_plainly(
    test: Callable[[bytes], None], mutate: Any, seeds: list[bytes], options: Any
) -> None:
    """Mutate inputs drawn from a pool, which grows by some of the results."""
    rng = random.Random(options.seed)
    pool, began = list(seeds), time.perf_counter()
    slowest = 0.0
    for at in range(options.count):
        data = pool[at] if at < len(seeds) else mutate(rng.choice(pool), rng)[:65536]
        start = time.perf_counter()
        try:
            test(data)
        except BaseException:
            name = f"crash-{hashlib.sha1(data).hexdigest()}"
            (options.corpus.parent / name).write_bytes(data)
            raise
        slowest = max(slowest, time.perf_counter() - start)
        if at >= len(seeds) and rng.random() < 0.02:
            if len(pool) < 2000:
                pool.append(data)
            else:
                pool[rng.randrange(len(seeds), 2000)] = data
    seconds = time.perf_counter() - began
    for name, value in (
        ("number_of_executed_units", options.count),
        ("average_exec_per_sec", int(options.count / seconds)),
        ("slowest_unit_time_sec", f"{slowest:.3f}"),
        ("peak_rss_mb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10),
    ):
        print(f"stat::{name}: {value}", file=sys.stderr)
    for at, data in enumerate(pool):
        (options.corpus / f"{at:04d}").write_bytes(data)


def lines_of(code: CodeType) -> set[int]:
    """The lines of a code object and of those in it."""
    found = {line for *_, line in code.co_lines() if line}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= lines_of(inner)
    return found


def count_lines(test: Callable[[bytes], None], corpus: Path, names: tuple[str, ...]) -> Any:
    """{module: [lines reached inside its functions, lines inside its functions]}."""
    modules = {str(importlib.import_module(f"ternarize.{name}").__file__): name for name in names}
    reached: dict[str, set[int]] = {file: set() for file in modules}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        lines = reached.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    for path in sorted(corpus.iterdir())[:2000]:
        test(path.read_bytes())
    sys.settrace(None)
    table = {}
    for file, name in modules.items():
        module = compile(Path(file).read_text("utf-8"), file, "exec")
        inside = lines_of(module) - {line for *_, line in module.co_lines() if line}
        table[name] = [len(reached[file] & inside), len(inside)]
    return table


def main() -> None:
    """Run the target that is named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--place", type=Path, required=True, help="what the caller removes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--lines", action="store_true")
    options = parser.parse_args()
    there = importlib.util.find_spec("atheris") is not None and not (options.plain or options.lines)
    atheris = importlib.import_module("atheris") if there else None
    targets = load(atheris)
    target = targets.TARGETS[options.target]
    folder, limits = targets.Folder(options.place), targets.Limits()
    options.corpus.mkdir(parents=True, exist_ok=True)

    busy: dict[str, Any] = {"since": None, "input": b""}

    def watch() -> None:
        """End the process when one input takes longer than any can."""
        while True:
            time.sleep(5)
            since, data = busy["since"], busy["input"]
            if since is not None and time.monotonic() - since > HANG:
                (options.corpus.parent / f"timeout-{hashlib.sha1(data).hexdigest()}").write_bytes(
                    data
                )
                faulthandler.dump_traceback()
                os._exit(70)

    def test(data: bytes) -> None:
        busy["input"], busy["since"] = bytes(data), time.monotonic()
        targets.run_one(target, bytes(data), folder, limits)
        busy["since"] = None

    threading.Thread(target=watch, daemon=True).start()
    if options.lines:
        print(json.dumps(count_lines(test, options.corpus, target.modules)))
        return
    seeds = target.seeds()
    if atheris is None:
        fuzz_plainly(test, target.mutate, seeds, options)
        return
    for data in seeds:
        (options.corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    fuzz_guided(atheris, test, target.mutate, options)


if __name__ == "__main__":
    main()
