"""What a conversion may take: memory and threads, and room on the disk, asked for at the start."""

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ternarize.convert.workplace import STREAMED
from ternarize.errors import OutputError
from ternarize.plans.layout import Plan, Shard

# of each thread, for its stack and its arena of malloc: they take addresses, hardly memory
ADDRESSES = 72 << 20
_CGROUP = Path("/sys/fs/cgroup")


def threads_that_fit(plan: Plan, threads: int) -> int:
    """How many threads the memory that is left to this process is enough for, up to `threads`.

    Raises OutputError if it is not enough for one.
    """
    memory, addresses = memory_left()
    for n in range(threads, 0, -1):
        need = plan.convert_memory(n)
        if need <= memory and need + (n + 2) * ADDRESSES <= addresses:
            return n
    need = plan.convert_memory(1)
    if need <= memory:  # then it is a limit of addresses
        memory, need = addresses, need + 3 * ADDRESSES
    found = (
        f"{memory / 1e9:.3f} GB are left to this process; the conversion needs {need / 1e9:.3f} GB"
    )
    remedy = "Allow it more (ulimit, or the container's limit)"
    raise OutputError("memory", found, remedy=remedy)


def memory_left() -> tuple[float, float]:
    """Bytes of memory, and of addresses, that limits leave to this process; inf: any number."""
    memory, addresses = [math.inf], math.inf
    try:
        import resource

        total, _, _, _, _, data, _ = map(int, Path("/proc/self/statm").read_text().split())
    except (ImportError, FileNotFoundError):  # Windows, macOS
        return math.inf, math.inf
    if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        addresses = most - total * resource.getpagesize()
    if (most := resource.getrlimit(resource.RLIMIT_DATA)[0]) != resource.RLIM_INFINITY:
        memory.append(most - data * resource.getpagesize())
    for limit, stat, name in (  # the container's own, version 2 and 1
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ):
        with suppress(OSError, ValueError, KeyError):  # none; "max"; a system that has no such file
            most = int((_CGROUP / limit).read_text())
            lines = (_CGROUP / stat).read_text().splitlines()
            memory.append(most - int(dict(line.split() for line in lines)[name]))
    return min(memory), addresses


STATE_BYTES = 12  # for each trained weight: itself, and two moments of its gradient


def check_disk(plan: Plan, partial: Path, shards: Sequence[Shard], *, coded: bool = False) -> None:
    """Raise OutputError where the disk has too little room for the result and the way to it.

    partial  where the result grows
    shards   what is written there: those of the plan, or those of a part
    coded    whether they are coded in the end, one after the other
    """
    parent = next(p for p in partial.resolve().parents if p.exists())
    have = shutil.disk_usage(parent).free
    if partial.is_dir():
        ours = [f for f in partial.rglob("*") if f.is_file() and STREAMED not in f.parts]
        have += sum(f.stat().st_size for f in ours)
    small = sum((plan.source.directory / f).stat().st_size for f in plan.copied)
    need = sum(shard.nbytes() for shard in shards if shard.tensors) + small + (1 << 20)
    if coded:  # streams, and the file made of them, beside what it replaces
        need += 2 * max(shard.nbytes() for shard in shards)
    if plan.source.stream is not None:
        read = zip(plan.source.files, shards, strict=True)
        need += plan.source.stream.room([file for file, shard in read if shard.tensors])
    calibration = plan.recipe.calibrate
    ternary = [t for t in plan.tensors if t.ternary]
    if calibration is not None:  # the blocks, as each stage leaves them, until all is complete
        stages = calibration.window if calibration.reconstruct else 1
        need += stages * sum(t.stored_bytes() for t in ternary)
    if plan.recipe.training is not None:  # its state, twice while it is written, and the best
        need += sum(2 * STATE_BYTES * t.info.numel + t.stored_bytes() for t in ternary)
    if have < need:
        found = f"{have / 1e9:.3f} GB free; the result needs {need / 1e9:.3f} GB"
        raise OutputError(parent, found, remedy="Make room")
