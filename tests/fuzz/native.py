"""Builds the fuzzers of the compiled core: libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer.

    python -m tests.fuzz.native FOLDER

Needs clang with compiler-rt (Debian: clang, libclang-rt-dev). Nothing is written but FOLDER.
"""

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "ternarize" / "csrc"
TARGETS = ("codec", "ternarize", "products", "decode")
SANITIZERS = "address,undefined"
# Of the core alone, as are the sanitizers: the plain loops that it is compared with are not what is
# tested. Comparisons are not traced: they take half of the time, and sizes have no magic numbers.
COVERAGE = ["-fsanitize-coverage=inline-8bit-counters,pc-table"]
_AVX512 = "-mavx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi"
_PRODUCTS = {
    "avx2": "-mavx2",
    "avxvnni": "-mavx2 -mavxvnni",
    "avx512": f"{_AVX512} -mavx512vnni",
    "amx": f"{_AVX512} -mavx512vnni -mamx-tile -mamx-int8",
}


def compiler() -> str | None:
    """The newest clang++ here, None without one."""
    names = ["clang++", *(f"clang++-{version}" for version in range(30, 10, -1))]
    return next((found for name in names if (found := shutil.which(name))), None)


def _sources(variants: bool) -> dict[str, list[str]]:
    """The core's sources by name, with what CMakeLists.txt compiles each with."""
    names = ["core", "decode", "int8", "lanes", "pool", "portable"]
    names += ["products_portable", "int8_products_portable"]
    options: dict[str, str] = dict.fromkeys(names, "")
    if not variants:
        pass
    elif platform.machine() in ("x86_64", "AMD64"):
        options |= {"avx2": "-mavx2", "avx512": f"{_AVX512} -mprefer-vector-width=512"}
        for kind in ("", "int8_"):
            options |= {f"{kind}products_{cpu}": flags for cpu, flags in _PRODUCTS.items()}
        options["core"] = "-DTERNARIZE_X86_VARIANTS -DTERNARIZE_AVXVNNI -DTERNARIZE_AMX"
    elif platform.machine() in ("aarch64", "arm64"):
        options |= {"products_neon": "-march=armv8.2-a+dotprod", "core": "-DTERNARIZE_NEON"}
    return {name: flags.split() for name, flags in options.items()}


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
    flags = ["-std=c++17", "-O2", "-g1", "-ffp-contract=off", "-fno-trapping-math", "-pthread"]
    flags.append(f"-I{CSRC}")
    sanitized = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]

    def compile_one(source: Path, options: list[str], out: Path) -> Path:
        command = [clang, *flags, *options, "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        return out

    with ThreadPoolExecutor(jobs) as pool:
        core = [
            pool.submit(
                compile_one,
                CSRC / f"{name}.cpp",
                [*sanitized, *COVERAGE, *options],
                folder / f"{name}.o",
            )
            for name, options in _sources(variants).items()
        ]
        harness = {
            name: pool.submit(compile_one, HERE / f"{name}.cpp", [], folder / f"fuzz_{name}.o")
            for name in targets
        }
        objects = [str(part.result()) for part in core]
        mains = {name: str(part.result()) for name, part in harness.items()}
    programs = {}
    for name, main in mains.items():
        programs[name] = folder / f"fuzz_{name}"
        link = [
            clang,
            *flags,
            *sanitized,
            "-fsanitize=fuzzer",
            main,
            *objects,
            "-o",
            str(programs[name]),
        ]
        subprocess.run(link, check=True)
    return programs


if __name__ == "__main__":
    for program in build(Path(sys.argv[1])).values():
        print(program)
