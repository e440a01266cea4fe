"""What the campaigns share: sources to convert, and runs of the program that can be made to fail.

A run is a fork of this process, which has imported everything already, so that hundreds take
minutes. `faults.c` is loaded before libc in it, and makes the n-th call that changes a file kill
the process, or fail. Linux, with a C compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHANGE, OPEN, READ = 1, 2, 4  # as in faults.c
NOTHING, KILL, TEAR, FAIL, FAIL_ON = range(5)
SOURCES = ("dense", "tied", "moe", "shards")
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 520,
    "vocab_size": 512,
    "num_hidden_layers": 4,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Faults:
    """What happens to the calls of a run below `folder`; see faults.c."""

    folder: Path
    at: int = 0
    action: int = NOTHING
    error: int = 0
    classes: int = CHANGE
    room: int = -1
    log: Path | None = None
    contents: bool = False


@dataclass(frozen=True)
class Run:
    """How a run ended: exit code, or minus the signal; what it said; seconds; its peak memory."""

    code: int
    said: str
    seconds: float
    peak: int = 0

    @property
    def line(self) -> str:
        """The message, where it is one."""
        return self.said.strip()


def preloaded(module: str) -> None:
    """Begin again as `python -m module` with faults.c loaded and torch on one thread."""
    if os.environ.get("TERNARIZE_FAULTS"):
        return
    library = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    build = ["cc", "-O1", "-shared", "-fPIC", str(HERE / "faults.c"), "-o", str(library)]
    subprocess.run([*build, "-ldl", "-pthread"], check=True)
    env = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TERNARIZE_FAULTS": str(library),
        "OMP_NUM_THREADS": "1",  # a team of threads does not survive a fork
        "HF_HUB_OFFLINE": "1",
    }
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], env)


def warm_up(*sources: Path) -> None:
    """Import here what every run would import, as far as no thread is begun by it."""
    import ternarize.convert.verify  # noqa: F401
    from ternarize.sources.origin import read_card

    for source in sources:
        with redirect_stdout(io.StringIO()), suppress(SystemExit):
            command("convert", str(source), "nowhere", "--dry-run")()
        read_card(source)


def make_source(name: str, folder: Path) -> Path:
    """One of `SOURCES`, with small files beside the weights; made in a process of its own."""
    code, said = in_child(lambda: _make_source(name, folder))
    assert code == 0, said
    return folder


def _make_source(name: str, folder: Path) -> int:
    sys.path.insert(0, str(HERE.parent))
    import tiny_models
    from safetensors.torch import load_file, save_file

    sizes: dict[str, Any] = {**_SIZES, "num_hidden_layers": 2} if name == "moe" else _SIZES
    kind = {"tied": "llama_tied", "moe": "mixtral"}.get(name, "llama")
    tiny_models.save(kind, folder, **sizes)
    if name == "shards":
        whole = folder / "model.safetensors"
        tensors = load_file(whole)
        names = sorted(tensors)
        shard_of = {t: f"model-{i % 20 + 1:05d}-of-00020.safetensors" for i, t in enumerate(names)}
        for shard in sorted(set(shard_of.values())):
            held = {t: tensors[t] for t in names if shard_of[t] == shard}
            save_file(held, folder / shard, {"format": "pt"})
        index = {"metadata": {}, "weight_map": shard_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        whole.unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A source\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad": "x" * 20_000}))
    (folder / "more").mkdir()
    (folder / "more" / "notes.json").write_text("{}")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
    return 0


def in_child(
    work: Callable[[], int],
    *,
    faults: Faults | None = None,
    said: Path | None = None,
    kill_after: float | None = None,
    number: int = signal.SIGKILL,
) -> tuple[int, str]:
    """Do something in a fork: returns its exit code (or minus its signal), and what it printed."""
    run = fork(work, faults=faults, said=said, kill_after=kill_after, number=number)
    return run.code, run.said


def start(work: Callable[[], int], said: Path, faults: Faults | None = None) -> int:
    """Begin something in a fork; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70  # EX_SOFTWARE: an exception came through
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program itself says otherwise
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)
        if faults is not None:
            _arm(faults)
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork(
    work: Callable[[], int],
    *,
    faults: Faults | None = None,
    said: Path | None = None,
    kill_after: float | None = None,
    number: int = signal.SIGKILL,
) -> Run:
    """Do something in a fork, and send it a signal after so many seconds if it still runs."""
    with tempfile.TemporaryDirectory() as folder:
        said = said or Path(folder) / "said"
        began = time.perf_counter()
        pid = start(work, said, faults)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, number)  # not reaped yet: it is this process, be it dead
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - began
        # kilobytes; the child's own, which begins with what it shares with this process
        peak = usage.ru_maxrss * 1024
        text = said.read_text(errors="replace") if said.exists() else ""
    return Run(os.waitstatus_to_exitcode(status), text, seconds, peak)


def _arm(faults: Faults) -> None:
    library = ctypes.CDLL(os.environ["TERNARIZE_FAULTS"])
    log = -1
    if faults.log is not None:
        log = os.open(faults.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    library.faults_arm.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_longlong),
    ]
    library.faults_arm(
        os.fsencode(faults.folder.resolve()),
        log,
        int(faults.contents),
        faults.classes,
        faults.at,
        faults.action,
        faults.error,
        faults.room,
    )


def convert(
    source: Path, output: Path, *options: str, before: Callable[[], Any] | None = None
) -> Callable[[], int]:
    """The command `ternarize convert`, to be done in a fork; `before` is done there first."""
    return command("convert", str(source), str(output), "--quiet", *options, before=before)


def command(*arguments: str, before: Callable[[], Any] | None = None) -> Callable[[], int]:
    def work() -> int:
        from ternarize.__main__ import main

        if before is not None:
            before()
        sys.argv = ["ternarize", *arguments]
        os.environ["COLUMNS"] = "1000"
        main()
        return 0

    return work


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stamp(folder: Path) -> list[Any]:
    """Everything of a folder that a conversion must not change: names, modes, times, contents."""
    stats = [(str(path), path.stat()) for path in sorted(folder.rglob("*"))]
    return [
        [(name, stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        digests(folder),
    ]


def listed(log: Path) -> list[list[str]]:
    """The calls of a run: [name, path, other path, a, b], and what was written, in hex."""
    calls: list[list[str]] = []
    for line in log.read_text().splitlines():
        if "\t" in line:
            calls.append(line.split("\t"))
        else:
            calls[-1].append(line)
    return calls


@contextmanager
def workshop(where: Path | None = None) -> Iterator[Path]:
    """A folder for a campaign, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def limit(kind: int, value: int) -> None:
    """Set a limit of this process (resource.RLIMIT_...)."""
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table in plain text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[str(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def row_of(source: str, kind: str, tried: int, failures: list[str], **more: int) -> dict[str, Any]:
    """What a campaign says of its tries of one kind on one source."""
    passed = tried - len(failures)
    return {
        "source": source,
        "kind": kind,
        "tried": tried,
        "passed": passed,
        **more,
        "failures": failures,
    }


def report(
    what: str,
    rows: Sequence[dict[str, Any]],
    failures: Sequence[str],
    out: Path | None,
    **more: Any,
) -> int:
    """Print the table and what failed, write both as JSON; returns the exit code."""
    print(table(rows))
    for failure in failures[:50]:
        print(f"FAILED {failure}")
    print(f"{what}: {len(failures)} failures")
    if out is not None:
        found = {"campaign": what, **more, "rows": list(rows), "failures": list(failures)}
        out.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if failures else 0
