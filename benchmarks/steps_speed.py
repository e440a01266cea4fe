"""How fast a journal of steps is replayed: non-zeros a second, and one row beside the whole.

    python benchmarks/steps_speed.py [--rows N] [--cols N] [--bits N ...] [--repeats N]
        [--json OUT.json]

A matrix of trits of 4,096 x 4,096, and 100 steps of 128 perturbations of which 16 are followed, for
each number of bits of a cell: all of it by the compiled core with one and two threads, the first
two steps by torch, and one row by itself. Medians; what is prepared once for a journal (its arrays)
is not counted.
"""

import random
import statistics
import sys
import time
from typing import Any
from unittest import mock

import torch
from common import parser, write_figures
from torch import Tensor

from ternarize.steps import replay
from ternarize.steps.generator import TRITS
from ternarize.steps.journal import Step
from ternarize.steps.replay import Moves

SEED, COUNT, K, FOLLOWED = 0x0123456789ABCDEF, 100, 128, 16
BY_TORCH = 2  # steps


def steps_of(bits: int, count: int) -> list[Step]:
    rng = random.Random(bits)
    made = []
    for number in range(count):
        chosen = tuple(sorted(rng.sample(range(K), FOLLOWED)))
        signs = tuple(rng.choice((1, -1)) for _ in chosen)
        made.append(Step(number, TRITS, bits, 1, K, chosen, signs))
    return made


def seconds_of(moves: Moves, values: Tensor, first: int, threads: int, repeats: int) -> float:
    """The median of some replays of a range."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        moves.apply(values, first, threads)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def row_of(bits: int, start: Tensor, cols: int, repeats: int) -> dict[str, Any]:
    """Measure journals of one density, and print it."""
    moves = Moves(steps_of(bits, COUNT), TRITS, SEED)
    nonzeros = COUNT * FOLLOWED * -(-len(start) >> bits)
    seconds = [seconds_of(moves, start.clone(), 0, threads, repeats) for threads in (1, 2)]
    at = 7 * cols
    single = seconds_of(moves, start[at : at + cols].clone(), at, 1, 20 * repeats)
    with mock.patch.object(replay, "lib", None):
        few = Moves(steps_of(bits, BY_TORCH), TRITS, SEED)
        seconds.append(seconds_of(few, start.clone(), 0, 1, 1) * COUNT / BY_TORCH)
    speeds = [nonzeros / each / 1e6 for each in seconds]
    print(
        f"| {1 << bits:,} | {nonzeros:,} | {speeds[0]:.0f} | {speeds[1]:.0f} | {speeds[2]:.1f} | "
        f"1 / {seconds[0] / single:,.0f} |",
        flush=True,
    )
    return {"bits": bits, "nonzeros": nonzeros, "speeds": speeds, "row_seconds": single}


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=4096)
    arguments.add_argument("--cols", type=int, default=4096)
    arguments.add_argument("--bits", type=int, nargs="+", default=[6, 8, 10, 12])
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    size = (options.rows * options.cols,)
    start = torch.randint(-1, 2, size, dtype=torch.int8, generator=generator)
    print("| one in | non-zeros | 1 thread, M/s | 2 threads, M/s | torch, M/s | a row of all |")
    print("|---|---|---|---|---|---|")
    rows = [row_of(bits, start, options.cols, options.repeats) for bits in options.bits]
    write_figures(options.json, __file__, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
