"""Conversions that lack something: `python -m tests.campaigns.starve`.

    room        the disk is full after so many bytes, the last time one byte short
    disk        the same with a small file system of its own (where mounting is allowed)
    errors      a call fails with ENOSPC, EDQUOT, EIO, EROFS, EACCES or EMFILE, once or from then on
    permission  folders that cannot be written, a source that cannot be read
    files       too few open files allowed
    memory      0.8, 1.0 and 1.2 times the predicted memory and addresses; far too few
    races       two conversions of one output
    places      an output that is the source, is in it, or is there already
    changes     source files that change during a run, or before it is gone on with
    umask       022, 027, 077
    workers     one of the threads fails

After each: an exit code other than 0 and one line that says what and what to do, or success; the
final directory absent or complete; source and other outputs as they were; once there is room, the
same command completes it, byte for byte.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .kill import Trial
from .runs import (
    CHANGE,
    FAIL,
    FAIL_ON,
    KILL,
    OPEN,
    READ,
    Faults,
    Run,
    convert,
    digests,
    fork,
    in_child,
    limit,
    listed,
    make_source,
    preloaded,
    report,
    stamp,
    start,
    warm_up,
    workshop,
)

NOBODY = 65534
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EMFILE")
WAYS = (
    "again",
    "Name another",
    "Use ",
    "Make room",
    "Remove it",
    "remove it",
    "Wait for it",
    "Allow it",
)
Failures = list[str]


class Starved:
    """A trial with another output beside it, which must stay as it is."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.failures, self.tried, self.refused = trial, Failures(), 0, 0
        self.older = trial.place.parent / "older"
        if not self.older.exists():
            shutil.copytree(trial.source, self.older)
        self.kept = stamp(self.older)

    def check(self, what: str, run: Run, *, must_fail: bool = False, says: str = "") -> None:
        """What must hold after a run that lacked something, and after one that does not."""
        trial, self.tried = self.trial, self.tried + 1
        self.refused += run.code != 0
        wrong = said_wrong(run, says) if run.code else ""
        if not run.code and must_fail:
            wrong = "went through"
        if trial.output.exists():
            found = digests(trial.output)
            found.pop(".journal.jsonl", None)
            if found != trial.whole:
                wrong = wrong or "a final directory that is not complete"
        elif not run.code:
            wrong = "success without a result"
        wrong = wrong or trial.wrong()
        if stamp(self.older) != self.kept:
            wrong = "another output has changed"
        if wrong:
            self.failures.append(f"{trial.name} {what}: {wrong}")
        trial.clear()

    def row(self, kind: str, **more: Any) -> dict[str, Any]:
        failures, self.failures = self.failures, []
        row = {
            "source": self.trial.name,
            "kind": kind,
            "tried": self.tried,
            "passed": self.tried - len(failures),
            "refused": self.refused,
            **more,
            "failures": failures,
        }
        self.tried = self.refused = 0
        return row


def said_wrong(run: Run, says: str = "") -> str:
    """What is wrong with how a run failed: it has to say one line, with what is to be done."""
    if run.code not in (1, 2):
        return f"ends with {run.code}: {run.said[-300:]}"
    if len(run.line.splitlines()) != 1 or not run.line.startswith("error: "):
        return f"says {run.said[-300:]!r}"
    if not any(way in run.line for way in WAYS):
        return f"does not say what to do: {run.line}"
    return "" if says in run.line else f"does not say {says!r}: {run.line}"


def room(starved: Starved, count: int) -> dict[str, Any]:
    trial = starved.trial
    run = trial.run(trial.faults(log=trial.log))
    assert run.code == 0, run.said
    trial.clear()
    total = sum(int(call[4]) for call in listed(trial.log) if call[0] == "write")
    for size in [*(total * i // count for i in range(count - 1)), total - 1]:
        run = trial.run(trial.faults(room=size))
        starved.check(f"room for {size} of {total} bytes", run, must_fail=True, says="No space")
    run = trial.run(trial.faults(room=total))
    starved.check("room for all", run)
    if run.code:
        starved.failures.append(f"{trial.name} room for all: {run.line}")
    return starved.row("room")


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def may_mount(shop: Path) -> bool:
    (shop / "mount").mkdir()
    try:
        with mounted(shop / "mount", 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def disk(starved: Starved, count: int) -> dict[str, Any]:
    """A disk that is too small from the beginning, and one that fills up (it looked empty)."""
    trial = starved.trial
    need = sum(path.stat().st_size for path in trial.source.rglob("*"))  # more than the result
    for i in range(count):
        with mounted(trial.place, (need // 2) * (i + 1) // count // 4096 * 4096):
            early = i % 2 == 0
            faults = None if early else trial.faults(room=1 << 60)
            run = trial.run(faults)
            if early and run.code and "free; the result needs" not in run.said:
                starved.failures.append(f"{trial.name} disk {i}: found out late: {run.line}")
            if early and run.code and any(trial.place.iterdir()):
                starved.failures.append(f"{trial.name} disk {i}: work was begun")
            subprocess.run(
                ["mount", "-o", f"remount,size={4 * need}", str(trial.place)], check=True
            )
            _check_in_place(starved, f"disk {i}", run)
    return starved.row("disk")


def _check_in_place(starved: Starved, what: str, run: Run) -> None:
    """As `check`, of a place that cannot be removed."""
    trial, self_clear = starved.trial, starved.trial.clear

    def empty() -> None:
        for path in trial.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    trial.clear = empty  # type: ignore[method-assign]
    try:
        starved.check(what, run)
    finally:
        trial.clear = self_clear  # type: ignore[method-assign]


def errors(starved: Starved, count: int, chance: random.Random) -> list[dict[str, Any]]:
    trial, rows = starved.trial, []
    for name in ERRORS:
        number = getattr(errno, name)
        classes = OPEN if name == "EMFILE" else CHANGE
        run = trial.run(trial.faults(log=trial.log, classes=classes))
        assert run.code == 0, run.said
        trial.clear()
        calls = listed(trial.log)
        points = chance.sample(range(1, len(calls) + 1), min(count, len(calls)))
        for i, at in enumerate(sorted(points)):
            once = name == "EIO" or (name in ("EACCES", "EMFILE") and i % 2)
            action = FAIL if once else FAIL_ON
            run = trial.run(trial.faults(at, action, error=number, classes=classes))
            call = calls[at - 1]
            where = f"{name} at call {at}, {call[0]} {Path(call[1]).name}"
            starved.check(where, run)
        rows.append(starved.row(name))
    for _ in range(count):  # the source's disk
        at = chance.randrange(1, 60)
        faults = Faults(trial.source, at, FAIL, errno.EIO, READ)
        starved.check(f"EIO at read {at} of the source", trial.run(faults))
    rows.append(starved.row("EIO, source"))
    return rows


def permission(starved: Starved, mounts: bool) -> dict[str, Any]:
    trial = starved.trial
    drop = _drop if os.getuid() == 0 else None
    os.chmod(trial.place.parent, 0o755)

    def refused(what: str, says: str, output: Path = trial.output) -> None:
        run = fork(convert(trial.source, output, *trial.options, before=drop))
        starved.check(what, run, must_fail=True, says=says)

    trial.place.chmod(0o555)
    refused("a folder that cannot be written", "Permission denied")
    refused("a new folder in one", "Permission denied", trial.place / "a" / "out")
    shard = next(trial.source.glob("*.safetensors"))
    for unreadable, mode in ((shard, 0), (trial.source / "tokenizer_config.json", 0)):
        before = stamp(trial.source)
        old = unreadable.stat().st_mode & 0o777
        trial.place.chmod(0o777)
        unreadable.chmod(mode)
        run = fork(convert(trial.source, trial.output, *trial.options, before=drop))
        unreadable.chmod(old)
        assert stamp(trial.source) == before
        _own(trial.place)
        starved.check(f"{unreadable.name} cannot be read", run, must_fail=True, says="ermission")
    if mounts:
        with mounted(trial.place, 64 << 20):
            remount = ["mount", "-o", "remount,ro", str(trial.place)]
            subprocess.run(remount, check=True)
            run = trial.run()
            subprocess.run([*remount[:2], "remount,rw", str(trial.place)], check=True)
            if said_wrong(run, "Read-only"):
                starved.failures.append(f"read-only disk: {said_wrong(run, 'Read-only')}")
            _check_in_place(starved, "a read-only disk", run)
    return starved.row("permission")


def _drop() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _own(folder: Path) -> None:
    if os.getuid() == 0:
        for path in folder.rglob("*"):
            os.chown(path, 0, 0)


def files(starved: Starved, count: int) -> dict[str, Any]:
    trial = starved.trial
    for more in range(count):

        def before(more: int = more) -> None:
            limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1 + more)

        run = fork(convert(trial.source, trial.output, *trial.options, before=before))
        starved.check(f"{more} files more", run, must_fail=more == 0)
    return starved.row("files")


def memory(starved: Starved, count: int) -> dict[str, Any]:
    """`count` numbers of threads, each at three limits of memory and three of addresses.

    These limits are set when the conversion asks for them, since what a process has taken by then
    differs from machine to machine; two that no conversion can do with are there from the start.
    """
    from ternarize.convert import limits
    from ternarize.plans.plan import make_plan

    trial, worst, fewer = starved.trial, 0.0, 0
    work = make_plan(trial.source)

    def needed(kind: int, threads: int) -> int:
        extra = (threads + 2) * limits.ADDRESSES if kind == resource.RLIMIT_AS else 0
        return work.convert_memory(threads) + extra

    def allow(kind: int, allowed: int) -> None:
        column = {resource.RLIMIT_DATA: 5, resource.RLIMIT_AS: 0}[kind]
        pages = int(Path("/proc/self/statm").read_text().split()[column])
        limit(kind, (pages + 64) * resource.getpagesize() + allowed)  # 64: for the look itself

    def limited(kind: int, allowed: int) -> Callable[[], None]:
        look = limits.memory_left

        def left() -> tuple[float, float]:
            allow(kind, allowed)
            return look()

        return lambda: vars(limits).update(memory_left=left)

    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        early = partial(allow, kind, needed(kind, 1) // 8)
        run = fork(convert(trial.source, trial.output, *trial.options, before=early))
        starved.check(f"an eighth of {needed(kind, 1)} bytes from the start", run, must_fail=True)
    for threads in [1, 2, 4, 8][:count]:
        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
            for factor in (0.8, 1.0, 1.2):
                allowed = int(factor * needed(kind, threads))
                out = trial.place.parent / "memory"
                options = ("--threads", str(threads))
                work_to_do = convert(
                    trial.source, trial.output, *options, before=limited(kind, allowed)
                )
                run = fork(_measured(work_to_do, out))
                fits = allowed >= needed(kind, 1)
                fewer += fits and factor < 1
                what = f"{threads} threads at {factor} of {needed(kind, threads)} bytes"
                if fits and run.code:
                    starved.failures.append(f"{what}: refused: {run.line}")
                if not run.code:
                    taken = int(out.read_text()) / work.convert_memory(threads)
                    worst = max(worst, taken)
                    if taken > 1.1:
                        starved.failures.append(f"{what}: took {taken:.2f} of the prediction")
                says = "" if fits else "the conversion needs"
                starved.check(what, run, must_fail=not fits, says=says)
    return starved.row("memory", peak_of_predicted=round(worst, 2), fewer_threads=fewer)


def _measured(work: Callable[[], int], out: Path) -> Callable[[], int]:
    """`work`, and into `out` the bytes by which its memory grew at most."""

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    def run() -> int:
        before = resident("VmRSS")
        try:
            return work()
        finally:
            out.write_text(str(resident("VmHWM") - before))

    return run


def races(starved: Starved, count: int, chance: random.Random) -> dict[str, Any]:
    trial = starved.trial
    for i in range(count):
        said = [trial.place.parent / f"said{k}" for k in range(2)]
        work = convert(trial.source, trial.output, *trial.options)
        first = start(work, said[0])
        time.sleep(chance.choice([0.0, chance.uniform(0, 1.2 * trial.seconds)]))
        pids = [first, start(work, said[1])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        texts = [path.read_text() for path in said]
        wrong = "" if sorted(codes) == [0, 1] else f"{codes}: {texts}"
        if not wrong:
            loser = texts[codes.index(1)]
            if "another conversion is writing" not in loser and "exists already" not in loser:
                wrong = f"the loser says {loser!r}"
        if wrong:
            starved.failures.append(f"{trial.name} race {i}: {wrong}")
        starved.check(f"race {i}", Run(0, "", 0.0))
    return starved.row("races")


def places(starved: Starved) -> dict[str, Any]:
    trial = starved.trial
    inside = "is the source"
    (trial.place.parent / "link").symlink_to(trial.source)
    there = trial.place.parent / "there"
    there.mkdir()
    (there / "mine").write_text("precious")
    cases = [
        (trial.source, inside),
        (trial.source / "out", inside),
        (trial.source / "a" / "out", inside),
        (trial.place.parent / "link", inside),
        (trial.place.parent / "link" / "out", inside),
        (there, "exists already"),
        (there / "mine", "exists already"),
        (there / "mine" / "out", "cannot be made"),
    ]
    for output, says in cases:
        run = fork(convert(trial.source, output, *trial.options))
        starved.check(f"output {output.name}", run, must_fail=True, says=says)
    if digests(there) != digests(there) or [p.name for p in there.iterdir()] != ["mine"]:
        starved.failures.append("a folder of the user has changed")
    return starved.row("places")


def changes(starved: Starved, count: int, chance: random.Random) -> dict[str, Any]:
    """A shard gets other bytes, and later its own again, with its own time."""
    trial = starved.trial
    kept = trial.place.parent / "kept"
    calls = 100
    for i in range(count):
        shard = chance.choice(sorted(trial.source.glob("*.safetensors")))
        name = shard.name
        shutil.copy2(shard, kept)
        if i % 2:  # between a break and the resumed run
            at = chance.randrange(12, calls)  # the journal is there: the conversion has begun
            trial.run(trial.faults(at, KILL))
            _flip(shard, chance)
            run = trial.run()
        else:
            at = chance.randrange(1, 20)
            run = fork(_changing(trial, at, partial(_flip, shard, chance)))
        os.utime(shard)  # seen as another file, and then put back
        shutil.copy2(kept, shard)
        starved.check(f"change {i} of {name} at {at}", run, must_fail=True, says=name)
    return starved.row("changes")


def _flip(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size // 2, path.stat().st_size))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path)


def _changing(trial: Trial, at: int, change: Callable[[], None]) -> Callable[[], int]:
    """A run in which `change` is done just before the `at`-th tensor is converted."""

    def before() -> None:
        import ternarize.convert.run as module
        from ternarize.convert.tensor import convert_tensor

        count = [0]

        def counting(*args: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                change()
            return convert_tensor(*args)

        vars(module)["convert_tensor"] = counting

    return convert(trial.source, trial.output, *trial.options, before=before)


def umasks(starved: Starved) -> dict[str, Any]:
    trial = starved.trial
    for mask in (0o022, 0o027, 0o077):

        def before(mask: int = mask) -> None:
            os.umask(mask)

        run = fork(convert(trial.source, trial.output, *trial.options, before=before))
        for path in [trial.output, *trial.output.rglob("*")]:
            want = (0o777 if path.is_dir() else 0o666) & ~mask
            if path.stat().st_mode & 0o777 != want:
                got = oct(path.stat().st_mode & 0o777)
                starved.failures.append(f"umask {mask:o}: {path.name} has {got}")
        starved.check(f"umask {mask:o}", run)
    return starved.row("umask")


def workers(starved: Starved, count: int, chance: random.Random) -> dict[str, Any]:
    trial = starved.trial
    kinds: list[BaseException] = [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ]
    for i in range(count):
        error = kinds[i % len(kinds)]

        def fail(error: BaseException = error) -> None:
            raise error

        run = fork(_changing(trial, chance.randrange(1, 20), fail))
        starved.check(f"{type(error).__name__} in a thread", run, must_fail=True)
    return starved.row("workers")


def make_wide(folder: Path) -> Path:
    """A source of few large tensors, so that their pieces are most of the memory."""

    def make() -> int:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import tiny_models

        sizes: dict[str, Any] = {
            "hidden_size": 2048,
            "intermediate_size": 4104,
            "num_hidden_layers": 1,
        }
        tiny_models.save("llama", folder, **sizes, head_dim=512)
        return 0

    code, said = in_child(make)
    assert code == 0, said
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="sizes, places of errors, races")
    parser.add_argument("--kinds", nargs="*", help="some of those above; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--where", type=Path, help="a fast disk, such as /dev/shm")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    preloaded("tests.campaigns.starve")
    rows: list[dict[str, Any]] = []

    def add(*more: dict[str, Any]) -> None:
        for row in more:
            rows.append(row)
            print({k: v for k, v in row.items() if k != "failures"}, flush=True)
            print(*row["failures"][:5], sep="\n", flush=True)

    with workshop(args.where) as shop:
        for name in ("dense", "shards"):
            make_source(name, shop / name)
        warm_up(shop / "dense", shop / "shards")
        chance = random.Random(args.seed)
        mounts = may_mount(shop)
        if not mounts:
            print("disk, and a read-only one: left out, since mounting is not allowed here")
        trials: dict[str, Starved] = {}

        def on(name: str) -> Starved:
            if name == "wide":
                make_wide(shop / name)
            if name not in trials:
                trials[name] = Starved(Trial(name, shop))
            return trials[name]

        kinds: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "room": lambda: [room(on("dense"), args.count)],
            "disk": lambda: [disk(on("dense"), args.count)] if mounts else [],
            "errors": lambda: errors(on("dense"), args.count, chance),
            "permission": lambda: [permission(on("dense"), mounts)],
            "files": lambda: [files(on("dense"), args.count)],
            "races": lambda: [races(on("dense"), args.count, chance)],
            "places": lambda: [places(on("dense"))],
            "umask": lambda: [umasks(on("dense"))],
            "workers": lambda: [workers(on("dense"), args.count, chance)],
            "changes": lambda: [changes(on("shards"), args.count, chance)],
            "memory": lambda: [memory(on("wide"), min(4, args.count))],
        }
        for kind, rows_of in kinds.items():
            if not args.kinds or kind in args.kinds:
                add(*rows_of())
    failures = [failure for row in rows for failure in row.pop("failures")]
    more = {"seed": args.seed, "count": args.count, "mounts": mounts}
    return report("starve", rows, failures, args.json, **more)


if __name__ == "__main__":
    raise SystemExit(main())
