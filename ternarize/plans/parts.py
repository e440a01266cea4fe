"""Which tensors each of several processes converts, on one machine or on many.

Every process works that out by itself, from the plan alone: nothing is sent between them. They get
whole files, the largest first, each to the part that has least; as long as a part would get clearly
more than its share, more of the largest files are cut and given out tensor by tensor.
"""

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ternarize.plans.layout import Plan, Shard, TensorPlan

PartNumber = tuple[int, int]  # (i, n): the i-th of n, counted from 1

_UNEVEN = 1.1  # of its share: with more than that in a part, files are cut


def names_of_parts(plan: Plan, count: int, *, cut: bool) -> list[set[str]]:
    """The tensors of each of `count` parts, those that are tied left out; a part may have none.

    cut  whether a file may be cut: not one that each part would have to fetch whole
    """
    files = sorted(map(_stored, plan.shards), key=_bytes, reverse=True)
    most = _UNEVEN * sum(map(_bytes, files)) / count
    cuts = 0  # doubled, since there may be thousands of files
    while True:
        singles = [[tensor] for file in files[:cuts] for tensor in file]
        held, fullest = _spread([*singles, *files[cuts:]], count)
        if not cut or cuts >= len(files) or fullest <= most:
            return held
        cuts = max(1, 2 * cuts)


def _spread(pieces: Iterable[list[TensorPlan]], count: int) -> tuple[list[set[str]], int]:
    """Give out pieces, the largest first, each to the part that has least; and the most of one."""
    held: list[set[str]] = [set() for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    for piece in sorted(pieces, key=_bytes, reverse=True):
        load, index = loads[0]
        held[index].update(tensor.name for tensor in piece)
        heapq.heapreplace(loads, (load + _bytes(piece), index))
    return held, max(load for load, _ in loads)


def _stored(shard: Shard) -> list[TensorPlan]:
    return [tensor for tensor in shard.tensors if not tensor.tied_to]


def _bytes(piece: Sequence[TensorPlan]) -> int:
    """What has to be read for these tensors."""
    return sum(tensor.info.nbytes for tensor in piece)


def shards_of(plan: Plan, names: Collection[str]) -> list[Shard]:
    """The files of a part that has these tensors: those of the plan, with no other tensors in them.

    One that has all tensors of its file is that file, byte for byte.
    """
    return [
        replace(shard, tensors=tuple(t for t in shard.tensors if t.name in names))
        for shard in plan.shards
    ]


def part_table(plan: Plan, part: PartNumber, *, cut: bool) -> dict[str, Any]:
    """What a part reads and writes, as plain data: bytes in all, and of each file."""
    shards = shards_of(plan, names_of_parts(plan, part[1], cut=cut)[part[0] - 1])
    files = [
        {
            "file": file,
            "tensors": len(shard.tensors),
            "of": len(_stored(whole)),
            "source_bytes": _bytes(shard.tensors),
            "packed_bytes": shard.nbytes(),
        }
        for file, shard, whole in zip(plan.source.files, shards, plan.shards, strict=True)
        if shard.tensors
    ]
    return {
        "part": list(part),
        "source_bytes": sum(each["source_bytes"] for each in files),
        "packed_bytes": sum(each["packed_bytes"] for each in files),
        "files": files,
    }
