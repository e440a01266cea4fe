"""The compiled core, without Python, for the tests that build it: its sources and their options.

As in CMakeLists.txt.
"""

import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parents[1] / "ternarize" / "csrc"
FLAGS = ["-std=c++17", "-pthread", "-ffp-contract=off", "-fno-trapping-math", f"-I{CSRC}"]
_AVX512 = "-mavx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni"
# The files of an instruction set have its name.
_OPTIONS = {
    "x86_64": {
        "avx2": "-mavx2",
        "avxvnni": "-mavx2 -mavxvnni",
        "avx512": f"{_AVX512} -mprefer-vector-width=512",
        "amx": f"{_AVX512} -mamx-tile -mamx-int8",
        "shani": "-msse4.1 -msha",
    },
    "aarch64": {"neon": "-march=armv8.2-a+dotprod"},
}
_DEFINITIONS = {
    "x86_64": "-DTERNARIZE_X86_VARIANTS -DTERNARIZE_AVXVNNI -DTERNARIZE_AMX",
    "aarch64": "-DTERNARIZE_NEON",
}


def sources(machine: str) -> dict[str, list[str]]:
    """The sources for a machine, by their paths in csrc, each with its own options.

    machine  "x86_64", "aarch64", or another, which has only the portable functions
    """
    own = _OPTIONS.get(machine, {})
    others = {cpu for options in _OPTIONS.values() for cpu in options} - {*own}
    files = [path for path in CSRC.rglob("*.cpp") if path.stem not in {"bindings", *others}]
    found = {str(path.relative_to(CSRC)): own.get(path.stem, "").split() for path in sorted(files)}
    return found | {"cpus/cpus.cpp": _DEFINITIONS.get(machine, "").split()}


def compile_all(
    folder: Path, command: list[str], options: Mapping[str, list[str]], jobs: int = 2
) -> list[str]:
    """Compile sources (paths in csrc, or anywhere) by `command`; returns the paths of the objects.

    Raises CalledProcessError where that fails.
    """

    def compile_one(source: str) -> str:
        out = str(folder / f"{source.replace('/', '_')}.o")
        subprocess.run(
            [*command, *FLAGS, *options[source], "-c", str(CSRC / source), "-o", out], check=True
        )
        return out

    with ThreadPoolExecutor(jobs) as compilers:
        return list(compilers.map(compile_one, options))
