"""Fuzzes readers and compiled core: `python -m tests.campaigns.fuzz --count 100000`.

Python targets (tests/fuzz/targets.py) run under atheris where it is installed (pip install -e
'.[fuzz]'), else with the same mutations and no coverage to guide them. Those of the compiled core
(tests/fuzz/*.cpp: libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer) need clang, and are left
out, with the reason, without it. The count is split among the targets that are run; for each is
told how many executions it had and at what rate, what they reached, the slowest, the most memory,
and what was found. Exits with 1 if something was.

    --target NAME   one of them (again for more)
    --work FOLDER   keeps corpora, findings and what was built; a later run goes on from there
    --json FILE     the report, as JSON
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
PATHS = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "formats")]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

from fuzz import native  # noqa: E402

PYTHON = ("header", "json", "file", "directory", "record", "gguf", "steps")
ARTIFACTS = ("crash-*", "timeout-*", "oom-*", "leak-*")


def without_clang() -> str | None:
    """Why the compiled core cannot be fuzzed here, None if it can."""
    clang = native.compiler()
    if clang is None:
        return "there is no clang++"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text(
            '#include <cstddef>\n#include <cstdint>\nextern "C" int LLVMFuzzerTestOneInput('
            "const uint8_t*, size_t) { return 0; }\n"
        )
        link = [clang, f"-fsanitize=fuzzer,{native.SANITIZERS}", str(source)]
        done = subprocess.run([*link, "-o", str(source.with_suffix(""))], capture_output=True)
    return None if done.returncode == 0 else f"{clang} has no libFuzzer (compiler-rt)"


def run(command: list[str], work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a fuzzer in its folder; returns its row of the report."""
    corpus = work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    before = {path.name for pattern in ARTIFACTS for path in work.glob(pattern)}
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, **environment}
    )
    seconds = time.perf_counter() - start
    (work / "log").write_text(done.stderr + done.stdout)
    stats = dict(re.findall(r"stat::(\w+):\s+([\d.]+)", done.stderr))
    reached = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    found = {path.name for pattern in ARTIFACTS for path in work.glob(pattern)} - before
    row: dict[str, Any] = {
        "executions": int(stats.get("number_of_executed_units", 0)),
        "per_second": 0,
        "edges": int(reached[-1][0]) if reached else None,
        "features": int(reached[-1][1]) if reached else None,
        "slowest_s": float(stats["slowest_unit_time_sec"]) if stats else None,
        "peak_mb": int(stats["peak_rss_mb"]) if stats else None,
        "findings": [str(work / name) for name in sorted(found)],
    }
    row["per_second"] = round(row["executions"] / seconds, 1)
    if done.returncode != 0 and not found:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    if found:
        row["error"] = [line for line in done.stderr.splitlines() if line.strip()][-12:]
    return row


def fuzz_python(name: str, count: int, seed: int, work: Path, plain: bool) -> dict[str, Any]:
    """Fuzz one Python target."""
    environment = {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, "-m", "fuzz.worker", name, "--corpus", str(work / "corpus")]
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="ternarize-fuzz-", dir=shared) as place:
        worker += ["--place", place]
        fuzz = [*worker, "--count", str(count), "--seed", str(seed)]
        row = run([*fuzz, "--plain"] if plain else fuzz, work, environment)
        if not row["findings"]:
            lines = subprocess.run(
                [*worker, "--lines"], capture_output=True, text=True, env=os.environ | environment
            )
            row["lines"] = json.loads(lines.stdout)
    return row


def fuzz_native(program: Path, count: int, seed: int, work: Path) -> dict[str, Any]:
    """Fuzz one target of the compiled core."""
    options = [f"-runs={count}", f"-seed={seed}", "-max_len=256", "-timeout=60", "-entropic=0"]
    options += ["-print_final_stats=1", f"-artifact_prefix={work}/"]
    environment = {
        "ASAN_OPTIONS": "malloc_context_size=2:quarantine_size_mb=4",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return run([str(program), str(work / "corpus"), *options], work, environment)


def campaign(
    count: int, names: Sequence[str] = (), *, work: Path, seed: int = 1, plain: bool = False
) -> dict[str, Any]:
    """Run `count` executions, split among the targets (none named: all); returns the report."""
    reason = without_clang()
    chosen = list(names or (*PYTHON, *native.TARGETS))
    left_out = {name: reason for name in chosen if name in native.TARGETS and reason}
    chosen = [name for name in chosen if name not in left_out]
    in_core = tuple(name for name in chosen if name in native.TARGETS)
    programs = native.build(work / "build", in_core) if in_core else {}
    rows = {}
    for at, name in enumerate(chosen):
        part = count * (at + 1) // len(chosen) - count * at // len(chosen)
        if name in programs:
            rows[name] = fuzz_native(programs[name], part, seed, work / name)
        else:
            rows[name] = fuzz_python(name, part, seed, work / name, plain)
    return {
        "executions": sum(row["executions"] for row in rows.values()),
        "guided": importlib.util.find_spec("atheris") is not None and not plain,
        "left_out": left_out,
        "targets": rows,
        "findings": sum(len(row["findings"]) for row in rows.values()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--target", action="append", choices=[*PYTHON, *native.TARGETS], default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        report = campaign(
            options.count, options.target, work=work, seed=options.seed, plain=options.plain
        )
    for name, row in report["targets"].items():
        lines = {k: f"{a}/{b}" for k, (a, b) in row.get("lines", {}).items()}
        print(
            f"{name}: {row['executions']} executions, {row['per_second']} a second, "
            f"{row['edges']} edges, {row['features']} features, lines {lines or '-'}, slowest "
            f"{row['slowest_s']} s, {row['peak_mb']} MB, {len(row['findings'])} findings"
        )
        for line in row.get("error", ()):
            print(f"    {line}")
    for name, reason in report["left_out"].items():
        print(f"{name}: left out: {reason}")
    print(f"{report['executions']} executions, {report['findings']} findings")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
