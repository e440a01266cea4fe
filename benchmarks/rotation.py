"""What the rotation of the input costs when a packed layer runs.

    python benchmarks/rotation.py [--block 256] [--repeats 21] [--json F]

Times `TernaryLinear` with and without a rotation, in turns, on one thread, and below it the
rotation alone in two forms: as it is computed, a product with H as a matrix (b multiplications for
each input), and as a butterfly (log2(b) rounds of sums and differences, each a pass over memory).
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import parser, write_figures
from torch import Tensor

from ternarize.files import container
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.trits.methods import absmean
from ternarize.trits.rotation import BLOCKS, rotate, signs

SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048))  # out_features, in_features
BATCHES = (1, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layers(rows: int, cols: int, block: int) -> tuple[TernaryLinear, TernaryLinear]:
    """Two layers with the same bytes, the second of them rotated."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    packed, scale = container.encode(absmean(weight, 128))
    made = []
    for rotation in ((0, 0), (block, 0)):
        layer = TernaryLinear(cols, rows, bias=False, group_size=128, rotation=rotation)
        layer.weight.data, layer.weight_scale.data = packed, scale
        made.append(layer)
    return made[0], made[1]


def butterfly(x: Tensor, sign: Tensor, block: int) -> Tensor:
    """R^T x by sums and differences of inputs whose places differ in one bit."""
    values, step = x * sign, 1
    while step < block:
        pairs = torch.unflatten(values, -1, (-1, 2, step))
        first, second = pairs.unbind(-2)
        values = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    return values / math.sqrt(block)


def runs(
    plain: TernaryLinear, rotated: TernaryLinear, x: Tensor, block: int
) -> dict[str, Callable[[], Tensor]]:
    """What is timed for one input."""
    sign = signs(x.shape[-1], 0).to(x.dtype)
    return {
        "plain": partial(plain, x),
        "rotated": partial(rotated, x),
        "matrix": partial(rotate, x, block, 0),
        "butterfly": partial(butterfly, x, sign, block),
    }


def milliseconds(timed: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Time each in turn; the first two rounds warm caches and are not counted."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(repeats + 2):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if number > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--block", type=int, default=256, choices=BLOCKS)
    arguments.add_argument("--repeats", type=int, default=21)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    block = options.block
    result: list[dict[str, Any]] = []
    print(f"block {block}, one thread, {options.repeats} rounds, medians in ms\n")
    print("| dtype | out x in | batch | plain | rotated | ratio | R^T x: matrix | butterfly |")
    print("|---|---|---|---|---|---|---|---|")
    for rows, cols in SHAPES:
        plain, rotated = layers(rows, cols, block)
        for (name, dtype), batch in ((d, b) for d in DTYPES.items() for b in BATCHES):
            x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
            with torch.inference_mode():
                times = milliseconds(runs(plain, rotated, x, block), options.repeats)
            pairs = zip(times["rotated"], times["plain"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            middle = {key: statistics.median(values) for key, values in times.items()}
            print(
                f"| {name} | {rows} x {cols} | {batch} | {middle['plain']:.2f} "
                f"| {middle['rotated']:.2f} | {ratio:.3f} | {middle['matrix']:.3f} "
                f"| {middle['butterfly']:.3f} |"
            )
            result.append({"dtype": name, "rows": rows, "cols": cols, "batch": batch, **times})
    write_figures(options.json, __file__, {"block": block, "ms": result})


if __name__ == "__main__":
    main()
