"""Conversions that are killed, and power cuts: `python -m tests.campaigns.kill --count 200`.

    random     SIGKILL after a time drawn uniformly from the duration of a whole run
    boundary   SIGKILL before each call that changes a file, and in the middle of each write
    power      the disk as a power cut may leave it: any part of what no fsync has brought there
    signal     SIGINT and SIGTERM at random times
    early      the same to processes that begin with imports (a tenth of the count)
    calibrated all these in small, with --dataset, and with --codec rans

After each: the final directory is absent or verifies, the same command completes it, all files are
those of a run that was left alone, the source is as it was, and nothing is left lying about.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs import (
    KILL,
    SOURCES,
    TEAR,
    Faults,
    Run,
    command,
    convert,
    digests,
    fork,
    listed,
    make_source,
    preloaded,
    report,
    row_of,
    stamp,
    warm_up,
    workshop,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"  # it has a tokenizer
KINDS = ("random", "boundary", "power", "signal", "early")
CALIBRATED = ("--dataset", "default", "--num-samples", "4", "--seq-len", "32")
CODED = ("--codec", "rans", "--method", "itf")


class Trial:
    """A source, the result of a run that was left alone, and what is checked against both."""

    def __init__(self, name: str, shop: Path, options: Sequence[str] = ()) -> None:
        self.name, self.options = name, tuple(options)
        self.source = shop / name
        self.before = stamp(self.source)
        self.place = shop / f"{name}{''.join(options[:1])}-out"
        self.place.mkdir()
        self.output = self.place / "out"
        self.log = shop / f"{name}{''.join(options[:1])}.calls"
        self.whole: dict[str, str] = {}
        times = []
        for _ in range(3):
            run = self.run()
            assert run.code == 0, run.said
            times.append(run.seconds)
            found = digests(self.output)
            assert self.whole in ({}, found), f"{name}: two runs gave different files"
            self.whole = found
            self.clear()
        self.seconds = sorted(times)[1]

    def run(self, faults: Faults | None = None, after: float | None = None, number: int = 9) -> Run:
        work = convert(self.source, self.output, *self.options)
        return fork(work, faults=faults, kill_after=after, number=number)

    def clear(self) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()

    def faults(self, at: int = 0, action: int = 0, **more: Any) -> Faults:
        return Faults(self.place, at, action, **more)

    def wrong(self) -> str:
        """What is not as it must be after a run was stopped, and one that went through."""
        complete = False
        if self.output.exists():
            run = fork(command("verify", str(self.output), "--source", str(self.source)))
            if run.code:
                return f"the final directory does not verify: {run.line}"
            complete = digests(self.output) == self.whole
        run = self.run()
        if run.code and not (complete and "exists already" in run.said):
            return f"the same command ends with {run.code}: {run.line}"
        if digests(self.output) != self.whole:
            found = digests(self.output)
            names = {n for n in {*found, *self.whole} if found.get(n) != self.whole.get(n)}
            return f"other files than those of a whole run: {sorted(names)}"
        if stamp(self.source) != self.before:
            return "the source has changed"
        left = {path.name for path in self.place.iterdir()} - {"out"}
        # of a process that died when all was done; no later conversion of this name minds it
        if left - ({"out.partial.lock"} if complete else set()):
            return f"left over: {sorted(left)}"
        return ""


def random_kills(trial: Trial, count: int, chance: random.Random) -> dict[str, Any]:
    """Until `count` were killed: some end before their time comes, and count as tried only."""
    failures, hit, finals, i = [], 0, 0, 0
    while hit < count and i < 4 * count:
        i += 1
        run = trial.run(after=chance.uniform(0, trial.seconds))
        hit += run.code == -signal.SIGKILL
        finals += trial.output.exists()
        wrong = trial.wrong()
        if wrong or run.code not in (0, -signal.SIGKILL):
            failures.append(f"{trial.name} random kill {i}: {wrong or run.said}")
        trial.clear()
    return _row(trial, "random", i, failures, killed=hit, final_there=finals)


def boundary_kills(trial: Trial, every: int = 1) -> dict[str, Any]:
    """With one thread, so that each run makes the same calls in the same order."""
    one = Trial.__new__(Trial)
    one.__dict__ = {**trial.__dict__, "options": (*trial.options, "--threads", "1")}
    calls = _calls(one)
    writes = [i for i, call in enumerate(calls, 1) if call[0] == "write" and int(call[4]) > 1]
    points = [(i, KILL) for i in range(1, len(calls) + 1)] + [(i, TEAR) for i in writes]
    failures, hit, finals, tried = [], 0, 0, points[::every]
    for at, action in tried:
        run = one.run(one.faults(at, action))
        hit += run.code == -signal.SIGKILL
        finals += one.output.exists()
        wrong = one.wrong() if run.code == -signal.SIGKILL else "was not killed"
        if wrong:
            call = calls[at - 1]
            when = "in" if action == TEAR else "before"
            failures.append(
                f"{one.name} kill {when} call {at}, {call[0]} {Path(call[1]).name}: {wrong}"
            )
        one.clear()
    return _row(one, "boundary", len(tried), failures, killed=hit, final_there=finals)


def _calls(trial: Trial, contents: bool = False) -> list[list[str]]:
    run = trial.run(trial.faults(log=trial.log, contents=contents))
    assert run.code == 0, run.said
    calls = listed(trial.log)
    trial.clear()
    return calls


def signals(trial: Trial, count: int, chance: random.Random) -> dict[str, Any]:
    """Until each of both has interrupted half of `count`; exit code 130 or 143, whenever it was."""
    failures, hits, i = [], {signal.SIGINT: 0, signal.SIGTERM: 0}, 0
    while min(hits.values()) < -(-count // 2) and i < 8 * count:
        i += 1
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        run = trial.run(after=chance.uniform(0, trial.seconds), number=number)
        wrong = ""
        unbegun = run.code == -number and not run.said and not any(trial.place.iterdir())
        if run.code == 128 + number:
            hits[number] += 1
            begun = trial.output.with_name("out.partial").exists()
            if begun and run.line != "interrupted; the same command goes on from here":
                wrong = f"says {run.said!r}"
            if any(path.name.endswith(".lock") for path in trial.place.iterdir()):
                wrong = "the lock is left"
        elif run.code != 0 and not unbegun:
            wrong = f"ends with {run.code}: {run.said}"
        wrong = wrong or trial.wrong()
        if wrong:
            failures.append(f"{trial.name} {number.name} {i}: {wrong}")
        trial.clear()
    few = [n.name for n, hit in hits.items() if hit < -(-count // 2)]
    if few:
        failures.append(f"{trial.name}: too few of {i} were interrupted by {few}")
    return _row(trial, "signal", i, failures, killed=sum(hits.values()))


def early_signals(trial: Trial, count: int, chance: random.Random) -> dict[str, Any]:
    """To processes that import all anew, at any time: some while they import."""
    command = [sys.executable, "-m", "ternarize", "convert", str(trial.source), str(trial.output)]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    options = [*trial.options, "--quiet"]
    failures, hits, duration = [], 0, 0.0
    for i in range(count + 1):  # the first is left alone
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        with tempfile.TemporaryFile("w+") as said:
            began = time.monotonic()
            process = subprocess.Popen(
                [*command, *options], env=environment, stdout=subprocess.DEVNULL, stderr=said
            )
            if i:
                time.sleep(chance.uniform(0, duration))
                process.send_signal(number)
            code = process.wait()
            duration = duration or time.monotonic() - began
            said.seek(0)
            text = said.read().strip()
        # before its first line runs and after its last, the program cannot help it
        unbegun = "in main" not in text and not any(trial.place.iterdir())
        over = code == -number and not text and trial.output.exists()
        hits += code == 128 + number
        in_order = code == 0 or (code == 128 + number and text.startswith("interrupted"))
        wrong = trial.wrong() if in_order or unbegun or over else f"ends with {code}: {text[-300:]}"
        if wrong:
            failures.append(f"{trial.name} early {number.name} {i}: {wrong}")
        trial.clear()
    return _row(trial, "early", count, failures, killed=hits)


# --- power cuts


def power_cuts(trial: Trial, count: int, chance: random.Random) -> dict[str, Any]:
    """Runs the command on what a disk may hold after a power cut, built from the list of calls."""
    calls = _calls(trial, contents=True)
    failures = [f"{trial.name} order: {wrong}" for wrong in order(calls, trial.output)]
    finals = 0
    last = [i for i, call in enumerate(calls) if call[0] == "rename"][-1]
    for i in range(count):
        # every other one at the end, where the final name appears
        cut = chance.randrange(last - 4, len(calls) + 1) if i % 2 else chance.randrange(len(calls))
        disk = Disk(trial.place)
        for call in calls[:cut]:
            disk.do(call)
        disk.cut(chance, trial.place)
        finals += trial.output.exists()
        wrong = trial.wrong()
        if wrong:
            failures.append(f"{trial.name} power cut {i} after call {cut}: {wrong}")
        trial.clear()
    return _row(trial, "power", count, failures, final_there=finals)


def order(calls: Sequence[Sequence[str]], output: Path) -> list[str]:
    """What is not on the disk when the final name appears, or when the program ends."""
    disk = Disk(output.parent)
    for call in calls:
        if call[0] == "rename" and call[2] == str(output):
            loose = disk.loose(Path(call[1]))
            if loose:
                return [f"not synced before the rename: {loose}"]
        disk.do(call)
    loose = disk.loose(output)
    return [f"not synced at the end: {loose}"] if loose else []


class Node:
    """A file or folder: what a program sees, what is on the disk, and the changes in between."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.names: dict[str, Node] = {}
        self.kept_names: dict[str, Node] = {}
        self.data = b""
        self.kept_data = b""
        self.changes: list[
            Any
        ] = []  # of names: (name, node or None)s at once; of data: (at, bytes)


class Disk:
    """Files whose changes reach the disk by fsync alone: those of a folder's names in their order,

    as journals of file systems keep it, and a file's pages in any.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Node(True)

    def find(self, path: Path) -> Node:
        node = self.top
        for part in path.relative_to(self.root).parts:
            node = node.names[part]
        return node

    def do(self, call: Sequence[str]) -> None:
        what, path, other, a, b = call[0], Path(call[1]), call[2], int(call[3]), int(call[4])
        if path == self.root and what == "mkdir":
            return  # is there
        if what in ("create", "mkdir"):
            folder = self.find(path.parent)
            if path.name not in folder.names:
                self._name(folder, [(path.name, Node(what == "mkdir"))])
        elif what in ("unlink", "rmdir"):
            folder = self.find(path.parent)
            if path.name in folder.names:
                self._name(folder, [(path.name, None)])
        elif what == "rename":
            node, target = self.find(path), Path(other)
            if path.parent == target.parent:
                self._name(self.find(path.parent), [(path.name, None), (target.name, node)])
            else:  # harder than journals of file systems are, in which both are one change
                self._name(self.find(target.parent), [(target.name, node)])
                self._name(self.find(path.parent), [(path.name, None)])
        elif what == "fsync":
            node = self.find(path)
            node.kept_names, node.kept_data, node.changes = dict(node.names), node.data, []
        elif what == "write":
            self._data(self.find(path), a, bytes.fromhex(call[5] if len(call) > 5 else ""))
        elif what == "allocate":
            node = self.find(path)
            self._size(node, max(len(node.data), a + b))
        elif what in ("truncate", "cut"):
            self._size(self.find(path), a)
        else:
            raise AssertionError(what)

    def _name(self, folder: Node, changes: list[tuple[str, Node | None]]) -> None:
        _rename(folder.names, changes)
        folder.changes.append(changes)

    def _data(self, node: Node, at: int, data: bytes) -> None:
        node.data = _written(node.data, at, data)
        node.changes.append((at, data))

    def _size(self, node: Node, size: int) -> None:
        node.data = node.data[:size].ljust(size, b"\0")
        node.changes.append((size, None))

    def loose(self, path: Path) -> list[str]:
        """What below a path is not on the disk as the program sees it."""
        found, todo = [], [(path.name, self.find(path))]
        while todo:
            name, node = todo.pop()
            if node.changes and not name.endswith(".journal.jsonl"):
                found.append(name)
            todo += [(f"{name}/{each}", child) for each, child in node.names.items()]
        return sorted(found)

    def cut(self, chance: random.Random, place: Path) -> None:
        """Write into `place` what the disk holds now."""
        self._cut(self.top, chance, place)

    def _cut(self, folder: Node, chance: random.Random, place: Path) -> None:
        names = dict(folder.kept_names)
        for changes in folder.changes[: chance.randint(0, len(folder.changes))]:
            _rename(names, changes)
        for name, node in names.items():
            if node.folder:
                (place / name).mkdir()
                self._cut(node, chance, place / name)
                continue
            data = node.kept_data
            for at, written in node.changes:
                if chance.random() < 0.5:
                    data = (
                        data[:at].ljust(at, b"\0")
                        if written is None
                        else _written(data, at, written)
                    )
            (place / name).write_bytes(data)


def _rename(names: dict[str, Node], changes: list[tuple[str, Node | None]]) -> None:
    for name, node in changes:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _written(old: bytes, at: int, data: bytes) -> bytes:
    return old[:at].ljust(at, b"\0") + data + old[at + len(data) :]


# --- the campaign


def _row(trial: Trial, kind: str, count: int, failures: list[str], **more: int) -> dict[str, Any]:
    told = {"--dataset": "calibrated", "--codec": "coded"}
    options = " ".join(name for option, name in told.items() if option in trial.options)
    return row_of(f"{trial.name} {options}".strip(), kind, count, failures, **more)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="random kills for each source")
    parser.add_argument("--every", type=int, default=1, help="of the boundaries, each n-th")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--calibrated", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--coded", action="store_true", help="all sources with --codec rans")
    parser.add_argument("--sources", nargs="*", choices=SOURCES, default=SOURCES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--where", type=Path, help="a fast disk, such as /dev/shm")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    preloaded("tests.campaigns.kill")
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print({k: v for k, v in row.items() if k != "failures"}, *row["failures"][:3], flush=True)

    with workshop(args.where) as shop:
        for name in args.sources:
            make_source(name, shop / name)
        warm_up(EXAMPLE, *(shop / name for name in args.sources))
        few = -(-args.count // 4)
        trials = [Trial(name, shop, CODED if args.coded else ()) for name in args.sources]
        if args.calibrated:
            shutil.copytree(EXAMPLE, shop / "example")
            trials += [Trial("example", shop, options) for options in (CALIBRATED, CODED)]
        for trial in trials:
            chance = random.Random(f"{args.seed} {trial.name}")
            slow = trial.name == "example"
            if "random" in args.kinds:
                add(random_kills(trial, few if slow else args.count, chance))
            if "boundary" in args.kinds:
                add(boundary_kills(trial, (5 if slow else 1) * args.every))
            if "power" in args.kinds:
                add(power_cuts(trial, few, chance))
            if "signal" in args.kinds:
                add(signals(trial, few, chance))
            if "early" in args.kinds:
                add(early_signals(trial, -(-args.count // 10), chance))
    failures = [failure for row in rows for failure in row.pop("failures")]
    return report("kill", rows, failures, args.json, seed=args.seed, count=args.count)


if __name__ == "__main__":
    raise SystemExit(main())
