"""The compiled core on AArch64: built by a cross compiler and run under an emulator of such CPUs.

Results are the same bits there. How fast they come this cannot say, and nobody has measured it.
What it needs is in Debian's packages g++, g++-aarch64-linux-gnu and qemu-user.
"""

import os
import shutil
import subprocess
from pathlib import Path

import core_sources
import pytest

HERE = Path(__file__).parent
HOST, CROSS, QEMU = "g++", "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (HOST, CROSS, QEMU) if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"without {', '.join(MISSING)}"),
]


def build(
    folder: Path, compiler: str, main: str, flags: list[str], own: dict[str, list[str]]
) -> str:
    """A program of tests/`main` and the sources that are the keys of `own`; returns its path."""
    folder.mkdir()
    command = [compiler, "-Wall", "-Wextra", "-Werror", *flags]
    objects = core_sources.compile_all(folder, command, own | {str(HERE / main): []})
    program = str(folder / "program")
    subprocess.run([*command, *core_sources.FLAGS, *objects, "-o", program], check=True)
    return program


def output(*command: str) -> list[str]:
    # the search for leaks needs a debugger's rights, which an emulated process does not get
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout.split()


def emulator(cpu: str) -> list[str]:
    libc = subprocess.run(
        [CROSS, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
    )
    root = Path(libc.stdout.strip()).resolve().parents[1]
    return [QEMU, "-cpu", cpu, "-L", str(root)]


def test_the_same_bits_as_on_this_machine(tmp_path: Path) -> None:
    portable, neon = core_sources.sources("any"), core_sources.sources("aarch64")
    here = build(tmp_path / "here", HOST, "same_bits.cpp", ["-O1"], portable)
    there = build(tmp_path / "there", CROSS, "same_bits.cpp", ["-O3"], neon)
    _, want = output(here)
    assert output(*emulator("cortex-a76"), there) == ["portable", "neon", want]
    # a CPU without dot products
    assert output(*emulator("cortex-a57"), there) == ["portable", want]


def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # as in test_kernels.py, the functions for weights are not what this is about
    own = core_sources.sources("aarch64") | {"cpus/portable.cpp": ["-fno-sanitize=all"]}
    program = build(tmp_path / "there", CROSS, "sanitized_kernels.cpp", flags, own)
    assert output(*emulator("cortex-a76"), program) == ["portable", "neon"]
