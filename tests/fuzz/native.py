"""Builds the fuzzers of the compiled core: libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer.

    python -m tests.fuzz.native FOLDER

Needs clang with compiler-rt (Debian: clang, libclang-rt-dev). Nothing is written but FOLDER.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import core_sources  # noqa: E402

TARGETS = ("codec", "ternarize", "products", "decode", "rans", "stored")
SANITIZERS = "address,undefined"
# Of the core alone, as are the sanitizers: the plain loops that it is compared with are not what is
# tested. Comparisons are not traced: they take half of the time, and sizes have no magic numbers.
COVERAGE = ["-fsanitize-coverage=inline-8bit-counters,pc-table"]


def compiler() -> str | None:
    """The newest clang++ here, None without one."""
    names = ["clang++", *(f"clang++-{version}" for version in range(30, 10, -1))]
    return next((found for name in names if (found := shutil.which(name))), None)


def build(
    folder: Path, targets: tuple[str, ...] = TARGETS, *, variants: bool = True, jobs: int = 2
) -> dict[str, Path]:
    """Compile the fuzzers into `folder`; returns the program of each target.

    variants  for all instruction sets of this CPU; False: for none but the portable one, which
              takes a tenth of the time

    Raises FileNotFoundError without clang, CalledProcessError where it fails.
    """
    clang = compiler()
    if clang is None:
        raise FileNotFoundError("clang++: not found")
    folder.mkdir(parents=True, exist_ok=True)
    command = [clang, "-O2", "-g1"]
    sanitized = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
    machine = platform.machine().replace("AMD64", "x86_64").replace("arm64", "aarch64")
    sources = core_sources.sources(machine if variants else "any")
    core = core_sources.compile_all(folder, [*command, *sanitized, *COVERAGE], sources, jobs)
    mains: dict[str, list[str]] = {str(HERE / f"{name}.cpp"): [] for name in targets}
    harnesses = core_sources.compile_all(folder, command, mains, jobs)
    programs = {}
    for name, harness in zip(targets, harnesses, strict=True):
        programs[name] = folder / f"fuzz_{name}"
        link = [*command, *sanitized, "-pthread", "-fsanitize=fuzzer", harness, *core]
        subprocess.run([*link, "-o", str(programs[name])], check=True)
    return programs


if __name__ == "__main__":
    for program in build(Path(sys.argv[1])).values():
        print(program)
