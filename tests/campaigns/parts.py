"""Conversions in parts that are killed: `python -m tests.campaigns.parts --count 50`.

    random    the parts side by side, one of them, or what puts them together, killed at random
    boundary  SIGKILL before each call of a part, and of putting together, that changes a file

After each all parts are run, of the same number or of another, and put together: the files are
those of a conversion in one piece, the source is as it was, and nothing is left lying about.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .kill import CODED
from .runs import (
    KILL,
    SOURCES,
    Faults,
    Run,
    convert,
    digests,
    fork,
    listed,
    make_source,
    preloaded,
    report,
    row_of,
    stamp,
    start,
    warm_up,
    workshop,
)

KINDS = ("random", "boundary")
FIRST, AGAIN = (1, 2, 3), (1, 2, 3, 7)  # numbers of parts, before the kill and after it
DONE = "exists already"  # who comes when all is put together


class Divided:
    """A source, and what it becomes in one piece."""

    def __init__(self, name: str, shop: Path, options: Sequence[str] = ()) -> None:
        self.name, self.source, self.place = name, shop / name, shop / f"{name}-parts"
        self.options = tuple(options)
        self.before, self.output = stamp(self.source), self.place / "out"
        self.log = shop / f"{name}.calls"
        self.place.mkdir()
        run = fork(self.convert())
        assert run.code == 0, run.said
        self.whole = digests(self.output)
        self.clear()
        self.seconds = {"part": self.part(1, 1).seconds, "finish": self.finish().seconds}
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()

    def convert(self, *words: str) -> Callable[[], int]:
        return convert(self.source, self.output, *words, *self.options)

    def part(self, index: int, count: int, *more: str, faults: Faults | None = None) -> Run:
        return fork(self.convert("--part", f"{index}/{count}", *more), faults=faults)

    def finish(self, *more: str, faults: Faults | None = None, after: float | None = None) -> Run:
        return fork(self.convert("--finish", *more), faults=faults, kill_after=after)

    def side_by_side(self, count: int, victim: int, after: float) -> bool:
        """Run all parts at once, and kill one; whether it was still at work."""
        with tempfile.TemporaryDirectory() as folder:
            pids = []
            for index in range(1, count + 1):
                work = self.convert("--part", f"{index}/{count}")
                pids.append(start(work, Path(folder) / str(index)))
            time.sleep(after)
            os.kill(pids[victim - 1], signal.SIGKILL)  # not reaped yet: it is this process
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            for index, code in enumerate(codes, 1):
                if code and index != victim:
                    raise AssertionError((Path(folder) / str(index)).read_text(errors="replace"))
        return codes[victim - 1] == -signal.SIGKILL

    def wrong(self, count: int) -> str:
        """What is not as it must be after all parts, of so many, and putting them together."""
        for index in range(1, count + 1):
            run = self.part(index, count)
            if run.code and not (DONE in run.said and digests(self.output) == self.whole):
                return f"part {index}/{count} ends with {run.code}: {run.line}"
        run = self.finish()
        if run.code and not (DONE in run.said and digests(self.output) == self.whole):
            return f"--finish ends with {run.code}: {run.line}"
        if digests(self.output) != self.whole:
            return "other files than those of one piece"
        if stamp(self.source) != self.before:
            return "the source has changed"
        # the lock of a process that died when all was done stays; no later conversion minds it
        left = {path.name for path in self.place.iterdir()} - {"out", "out.partial.lock"}
        return f"left over: {sorted(left)}" if left else ""


def random_kills(trial: Divided, count: int, chance: random.Random) -> dict[str, Any]:
    """Until `count` were killed: some end before their time comes, and count as tried only."""
    failures, hit, finals, others, tried = [], 0, 0, 0, 0
    while hit < count and tried < 4 * count:
        tried += 1
        first = chance.choice(FIRST)
        again = first if chance.random() < 0.5 else chance.choice(AGAIN)
        victim = chance.randint(1, first + 1)
        if victim <= first:
            killed = trial.side_by_side(
                first, victim, chance.uniform(0, trial.seconds["part"] * first)
            )
        else:
            for index in range(1, first + 1):
                assert trial.part(index, first).code == 0
            run = trial.finish(after=chance.uniform(0, trial.seconds["finish"]))
            killed = run.code == -signal.SIGKILL
            finals += killed
        hit += killed
        others += killed and again != first
        if wrong := trial.wrong(again):
            failures.append(f"{trial.name} kill {tried}, {victim} of {first}, {again}: {wrong}")
        trial.clear()
    return row_of(
        trial.name, "random", tried, failures, killed=hit, finishing=finals, other_n=others
    )


def boundary_kills(trial: Divided, every: int) -> dict[str, Any]:
    """Of a part that other parts have worked beside, and of putting together; with one thread."""
    failures, hit, tried = [], 0, 0

    def once(what: str, faults: Faults) -> Run:
        trial.part(1, 3, "--threads", "1")
        if what == "part":
            return trial.part(2, 2, "--threads", "1", faults=faults)
        trial.part(2, 2)
        trial.part(1, 2)
        return trial.finish("--threads", "1", faults=faults)

    for what in ("part", "finish"):
        run = once(what, Faults(trial.place, log=trial.log))
        assert run.code == 0, run.said
        calls = listed(trial.log)
        trial.clear()
        for at in range(1, len(calls) + 1, every):
            tried += 1
            run = once(what, Faults(trial.place, at, KILL))
            hit += run.code == -signal.SIGKILL
            killed = run.code == -signal.SIGKILL
            wrong = trial.wrong(AGAIN[tried % len(AGAIN)]) if killed else "was not killed"
            if wrong:
                call = f"{calls[at - 1][0]} {Path(calls[at - 1][1]).name}"
                failures.append(f"{trial.name} {what} killed before call {at}, {call}: {wrong}")
            trial.clear()
    return row_of(trial.name, "boundary", tried, failures, killed=hit)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="random kills for each source")
    parser.add_argument("--every", type=int, default=1, help="of the boundaries, each n-th")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--coded", action="store_true", help="all sources with --codec rans")
    parser.add_argument("--sources", nargs="*", choices=SOURCES, default=SOURCES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--where", type=Path, help="a fast disk, such as /dev/shm")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    preloaded("tests.campaigns.parts")
    rows: list[dict[str, Any]] = []
    with workshop(args.where) as shop:
        for name in args.sources:
            make_source(name, shop / name)
        warm_up(*(shop / name for name in args.sources))
        for name in args.sources:
            trial = Divided(name, shop, CODED if args.coded else ())
            chance = random.Random(f"{args.seed} {name}")
            if "random" in args.kinds:
                rows.append(random_kills(trial, args.count, chance))
                print(rows[-1], flush=True)
            if "boundary" in args.kinds:
                rows.append(boundary_kills(trial, args.every))
                print(rows[-1], flush=True)
    failures = [failure for row in rows for failure in row.pop("failures")]
    return report("parts", rows, failures, args.json, seed=args.seed, count=args.count)


if __name__ == "__main__":
    raise SystemExit(main())
