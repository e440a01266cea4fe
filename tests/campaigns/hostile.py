"""Hostile files: `python -m tests.campaigns.hostile --count 10000 --seed 0 [--json OUT]`.

Every case is a checkpoint that is damaged or made to do harm. Each is given to `load`, `verify`,
`inspect`, `export` and formats/reference.py, or to `convert`, in a child process, so that a crash
is seen and counted. What is refused must be refused with an error of ternarize.errors (Invalid of
the reference) in one printable line that names a file or a tensor, leave nothing behind, and take
no more memory than twice the files and 256 MB (headers that are a flood of tensors: 1 GB); a sample
goes through the command line too. --count is the number of flipped bits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "formats"))

import reference
import transformers
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert.verify import verify
from ternarize.errors import LONGEST_MESSAGE, TernarizeError
from ternarize.measure.report import inspect
from ternarize.publish.export import export

from . import hostile_files, hostile_sources
from .child import Child, limit_memory
from .hostile_files import Case, Link

HANG = 300  # seconds for one execution, on a machine that others use, too
MEMORY = 6 << 30  # address space that a child may take beyond what it has
ABOVE = 256 << 20  # bytes that an execution may take beyond twice its files
FLOOD = 1 << 30  # and where hundreds of thousands of tensors have to be listed
SAMPLE = 50  # one of so many refusals is repeated on the command line


# --- what looks at a checkpoint ---------------------------------------------------------------


def run_export(folder: Path) -> None:
    output = folder.parent / "exported"
    try:
        export(folder, output, "dense")
    except TernarizeError:
        assert not output.exists(), "something is left under the name of the output"
        raise
    finally:
        assert not list(folder.parent.glob("*.partial")), "something unfinished is left"
        shutil.rmtree(output, ignore_errors=True)


def run_cli(folder: Path) -> None:
    """Both commands that print what files say; whatever they print can be printed."""
    for command in ("inspect", "verify"):
        result = CliRunner().invoke(app, [command, str(folder)])
        check_cli(result)
        printed = result.stdout.replace("\n", "")
        assert printed.isprintable(), f"{command} prints {printed!r:.200}"


def check_cli(result: Any) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if result.exit_code:
        lines = result.stderr.strip().split("\n")
        assert result.exit_code in (1, 2) and len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ") and lines[0].isprintable(), result.stderr


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "load": ternarize.load,
    "verify": verify,
    "inspect": inspect,
    "export": run_export,
    "cli": run_cli,
    "reference": reference.decode,
    **hostile_sources.ACTIONS,
}


@dataclass
class Found:
    """What came of one execution."""

    outcome: str  # refused, accepted, or what was wrong
    seconds: float  # of the processor
    memory: int  # bytes above what the process had before
    message: str


def execute(case: Case, action: str, folder: Path, sample: bool) -> Found:
    before, started = resident("VmRSS"), time.process_time()
    reset_peak()
    try:
        ACTIONS[action](folder)
        outcome, message = "accepted", ""
    except (TernarizeError, reference.Invalid) as error:
        outcome, message = "refused", str(error)
        if isinstance(error, TernarizeError):
            bad = not message.isprintable() or len(message) > LONGEST_MESSAGE + 10
            known = {*os.listdir(folder), *NAMES, str(folder)}
            if bad or (case.named and not any(name in message for name in known)):
                outcome = "badly said"
            if sample and action in ("verify", "inspect"):
                check_cli(CliRunner().invoke(app, [action, str(folder)]))
    except OSError as error:  # the reference and the command line say these in one line
        outcome = "refused" if error.strerror and action == "reference" else "crashed"
        message = f"{type(error).__name__}: {error}"
    except BaseException as error:
        outcome, message = "crashed", f"{type(error).__name__}: {error}"
    seconds, memory = time.process_time() - started, resident("VmHWM") - before
    if outcome == "refused" and action in case.accept:
        outcome = "wrongly refused"
    if outcome == "accepted" and action in case.refuse:
        outcome = "wrongly accepted"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    bound = FLOOD if "000 tensors" in case.group else 2 * size + ABOVE
    if memory > bound and outcome in ("refused", "accepted"):
        outcome, message = "too much memory", f"{memory >> 20} MB; {message}"
    return Found(outcome, seconds, max(0, memory), message)


def known_names() -> set[str]:
    """Files and tensors that the golden checkpoints and the sources have."""
    names = {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts", hostile_sources.NAME}
    for path in hostile_files.GOLDEN.rglob("*"):
        names.add(path.name)
        if path.suffix == ".safetensors":
            names |= hostile_files.split(path.read_bytes())[0].keys()
    return {name for name in names if "." in name or name == "SHA256SUMS"}  # no mere words


NAMES = known_names()


def resident(what: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(what)), 0)


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system: the peak is then that of the whole run
        pass


# --- a child that may die ---------------------------------------------------------------------


def work(pipe: Connection, cases: list[Case]) -> None:
    """Execute what the parent asks for: (number of the case, action, whether to sample)."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    limit_memory(MEMORY)
    last, made = -1, Path()
    with tempfile.TemporaryDirectory() as place:
        while (asked := pipe.recv()) is not None:
            number, action, sample = asked
            if number != last:
                shutil.rmtree(made, ignore_errors=True) if last >= 0 else None
                made, last = Path(place) / str(number) / "model", number
                write(made, cases[number])
            pipe.send(execute(cases[number], action, made, sample))


def write(folder: Path, case: Case) -> None:
    folder.mkdir(parents=True)
    for name, data in case.make().items():
        if isinstance(data, Link):
            (folder / name).symlink_to(data)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


# --- the table --------------------------------------------------------------------------------


@dataclass
class Row:
    executions: int = 0
    refused: int = 0
    accepted: int = 0
    wrong: int = 0  # accepted or refused wrongly
    badly_said: int = 0
    greedy: int = 0  # took more memory than twice the files and ABOVE
    crashes: int = 0
    slowest: float = 0.0
    memory: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, action: str, found: Found, label: str) -> None:
        self.executions += 1
        self.refused += found.outcome in ("refused", "badly said")
        self.accepted += found.outcome == "accepted"
        self.wrong += found.outcome.startswith("wrongly")
        self.badly_said += found.outcome == "badly said"
        self.greedy += found.outcome == "too much memory"
        self.crashes += found.outcome == "crashed"
        self.slowest = max(self.slowest, found.seconds)
        self.memory = max(self.memory, found.memory)
        if found.outcome not in ("refused", "accepted"):
            self.faults.append(f"{label} {action} {found.outcome}: {found.message}"[:300])


def run(cases: Iterable[Case], limit: float | None = None) -> dict[str, Row]:
    """Execute all cases, for at most `limit` seconds; a row for each group of them."""
    listed = list(cases)
    rows: dict[str, Row] = {}
    child, ends = Child(work, listed, HANG), time.monotonic() + (limit or float("inf"))
    refusals = 0
    for number, case in enumerate(listed):
        if time.monotonic() > ends:
            break
        for action in case.act:
            started = time.monotonic()
            answer, died = child.ask(number, action, refusals % SAMPLE == 0)
            found = answer or Found("crashed", time.monotonic() - started, 0, died)
            refusals += found.outcome == "refused"
            rows.setdefault(case.group, Row()).add(action, found, case.label)
            if found.outcome not in ("refused", "accepted"):
                print(f"{case.group}: {rows[case.group].faults[-1]}", file=sys.stderr, flush=True)
    for died in child.close():
        rows.setdefault("the end", Row()).add("", Found("crashed", 0, 0, died), "")
    return rows


def sample(cases: Sequence[Case], most: int) -> list[Case]:
    """Cases of every group, evenly spread; those with very many tensors take minutes."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if "000 tensors" not in case.group:
            groups.setdefault(case.group, []).append(case)
    return [each for group in groups.values() for each in group[:: -(-len(group) // most)]]


COLUMNS = ("executions", "refused", "accepted", "wrong", "badly_said", "greedy", "crashes")


def show(rows: dict[str, Row]) -> None:
    print(
        f"{'case':34}"
        + "".join(f"{c.replace('_', ' '):>11}" for c in COLUMNS)
        + "  slowest  memory"
    )
    total = Row()
    for row in rows.values():
        for key in COLUMNS:
            setattr(total, key, getattr(total, key) + getattr(row, key))
        total.slowest, total.memory = max(total.slowest, row.slowest), max(total.memory, row.memory)
    for name, row in {**rows, "all": total}.items():
        numbers = "".join(f"{getattr(row, key):>11,}" for key in COLUMNS)
        print(f"{name:34}{numbers} {row.slowest:6.2f} s {row.memory / 1e6:5.0f} MB")
    for name, row in rows.items():
        for fault in row.faults[:5]:
            print(f"{name}: {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Hostile files.")
    parser.add_argument("--count", type=int, default=10_000, help="bits to flip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table here, too")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    seeds = hostile_files.SEEDS
    parser.add_argument("--flipped", nargs="+", default=seeds, choices=seeds, help="files of flips")
    parser.add_argument("--sample", type=int, help="at most so many cases of a group, no slow ones")
    arguments = parser.parse_args()
    sources = hostile_sources.cases(arguments.seed, arguments.count)
    of_files = hostile_files.cases(arguments.seed, arguments.count, arguments.flipped)
    every = [*of_files, *sources]
    every = [case for case in every if arguments.only in case.group]
    rows = run(every if arguments.sample is None else sample(every, arguments.sample))
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({n: vars(row) for n, row in rows.items()}, indent=1))
    return any(row.faults for row in rows.values())


if __name__ == "__main__":
    sys.exit(main())
