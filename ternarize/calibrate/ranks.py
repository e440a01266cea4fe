"""Several processes at one calibration: who has what of it.

Each has a share of the samples, and solves some of the matrices. Sums over the samples are taken
over CHUNKS of them, fixed ones, and these are added up in their order, so that the bytes of the
result do not depend on the number of processes.
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

from ternarize.ranks import World

_Key = TypeVar("_Key", bound=Hashable)

CHUNKS = 8  # of the samples; as many processes can run forwards side by side


def rank_of(world: World, kind: str, index: int) -> int:
    """Who has a batch of samples: kind as in lanes.py, index among those of its kind."""
    if kind == "train":
        return index % CHUNKS % world.size
    return world.size - 1 - index % world.size


def share_out(costs: Mapping[_Key, float], count: int) -> dict[_Key, int]:
    """Who of `count` does what: the largest first, each to who has least. In the order of costs."""
    loads, found = [0.0] * count, dict[_Key, int]()
    for key in sorted(costs, key=lambda each: -costs[each]):
        found[key] = loads.index(min(loads))
        loads[found[key]] += costs[key]
    return {key: found[key] for key in costs}
