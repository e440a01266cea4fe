"""How fast packed trits are multiplied on a GPU, beside torch's products with 16-bit weights.

    python benchmarks/gpu.py [--sweep] [--dtype bfloat16] [--group-size 128] [--json F]

For each shape and number of tokens the time of one product, with weights that come out of memory:
there are copies of them, at least 200 MB together (400 copies at most), multiplied in turn, in one
CUDA graph where there are several; the median of the replays. `tiles` and `int8` are ours with
float activations and with tokens rounded to 8 bits (in the measured time), `dense` is F.linear with
weights in --dtype, `by hand` our way without kernels: dequantize, then F.linear, for each product.
GB/s are the bytes of W and its scales, as they lie in memory, by the time. The error is the norm of
the difference from float64 by its norm, of --dtype outputs.

--sweep times other shapes of programs (triton_kernels.SHAPES) instead. Kernels are compiled at
their first call.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import triton  # type: ignore[import-not-found]
from common import parser, write_figures
from torch import Tensor
from torch.nn import functional as F

from ternarize.runtime.tiles import product_of_tiles, to_tiles, words_of
from ternarize.runtime.triton_kernels import IN_ORDER, MANY, SHAPES, multiply_tiles
from ternarize.trits import base3
from ternarize.trits.scales import scale_values

MATRICES = [(4096, 4096), (14336, 4096), (4096, 14336), (640, 2048), (2048, 640)]
TOKENS = [1, 4, 16, 64, 512, 4096]
ROTATED = 200_000_000  # bytes
MOST_COPIES = 400
REPLAYS = 20

# of --sweep: tokens -> shapes to try
TRIED: dict[int, list[tuple[int, ...]]] = {
    1: [(8, 16, 2, 8, 2), (8, 16, 2, 8, 3), (4, 16, 2, 4, 3), (8, 32, 2, 8, 2), (8, 16, 2, 4, 2)],
    16: [(8, 16, 16, 8, 2), (4, 16, 16, 4, 3), (4, 32, 16, 4, 2), (8, 32, 16, 8, 2)],
    64: [(0, 64, 64, 4, 3), (0, 64, 32, 4, 3), (0, 32, 64, 4, 3), (0, 128, 32, 4, 3)],
    4096: [(0, 128, 128, 8, 3), (0, 64, 128, 4, 3), (0, 128, 64, 4, 3), (0, 256, 64, 8, 2)],
}
TRIED[1] += [(16, 16, 2, 8, 2), (4, 32, 2, 8, 3), (4, 16, 2, 4, 4)]
TRIED[16] += [(4, 32, 16, 8, 3), (0, 64, 16, 4, 4)]
TRIED[64] += [(0, 64, 16, 4, 4)]
TRIED[4096] += [(0, 128, 128, 4, 2), (0, 128, 64, 4, 2)]
# of one token rounded to 8 bits
TRIED_IN_ORDER = [(0, 32, 16, 2, 4), (0, 16, 16, 1, 4), (0, 64, 16, 4, 4), (0, 32, 16, 1, 4)]


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call: the median over replays of a graph of all of them."""
    for call in (calls[0], calls[-1]):
        call()
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return _median(graph.replay, REPLAYS) / len(calls)


def _median(run: Callable[[], object], rounds: int) -> float:
    taken, event = list[float](), cast(Any, torch.cuda.Event)
    for _ in range(rounds):
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken)


class Weights:
    """A random packed matrix on the GPU, as often as it takes to come out of memory."""

    def __init__(self, rows: int, cols: int, group_size: int, dtype: torch.dtype) -> None:
        self.rows, self.cols, self.group_size, self.dtype = rows, cols, group_size, dtype
        trits = torch.randint(-1, 2, (rows, cols), dtype=torch.int8, device="cuda")
        self.scales = (torch.rand(rows, cols // group_size, device="cuda") + 0.1).half()
        self.stored = base3.pack(trits.cpu(), group_size).cuda()
        self.tiles = to_tiles(self.stored, cols, group_size)
        self.by_group = self.scales.T.contiguous().flatten()
        wide = scale_values(self.scales, torch.float64).repeat_interleave(group_size, 1)
        self.exact = wide * trits

    def copies(self, size: int, tokens: int) -> int:
        most = MOST_COPIES if tokens <= 64 else 8
        return min(most, -(-ROTATED // size))

    def right(self, x: Tensor) -> Tensor:
        return x.double() @ self.exact.T


def ours(
    weights: Weights, x: Tensor, rounded: bool, shape: tuple[int, ...] | None = None
) -> tuple[float, int, Tensor]:
    """(seconds, bytes, output) of the kernels."""
    rows, group_size, tiles = weights.rows, weights.group_size, weights.tiles
    held = tiles.numel() + 2 * weights.by_group.numel()
    many = [tiles.clone() for _ in range(weights.copies(held, len(x)))]
    y, by_group = x.new_empty(len(x), rows), weights.by_group.view(-1, rows)

    def call(each: Tensor) -> None:
        if shape is None:
            product_of_tiles(x, each, by_group, rows, rows, group_size, rounded, False)
        else:
            multiply_tiles(x, words_of(each, rows), by_group, y, group_size, rounded, shape)

    taken = seconds([partial(call, each) for each in many])
    if shape is None:
        y = product_of_tiles(x, tiles, by_group, rows, rows, group_size, rounded, False)
    return taken, held, y


def dense(weights: Weights, x: Tensor) -> tuple[float, int, Tensor]:
    matrix = weights.exact.to(weights.dtype)
    size = matrix.numel() * matrix.element_size()
    many = [matrix.clone() for _ in range(weights.copies(size, len(x)))]
    calls = [lambda each=each: F.linear(x, each) for each in many]
    return seconds(calls), size, calls[0]()


def by_hand(weights: Weights, x: Tensor) -> tuple[float, int, Tensor]:
    def run() -> Tensor:
        stored = weights.stored, weights.scales, weights.cols, weights.group_size
        return F.linear(x, base3.dequantize_base3(*stored, weights.dtype))

    y = run()
    return _median(run, 5), weights.stored.numel() + 2 * weights.scales.numel(), y


def table(weights: Weights) -> list[dict[str, Any]]:
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, weights.cols, device="cuda").to(weights.dtype)
        right, found = weights.right(x), {}
        found["tiles"] = ours(weights, x, False)
        found["int8"] = ours(weights, x, True)
        found["dense"] = dense(weights, x)
        if tokens in (1, TOKENS[-1]):
            found["by hand"] = by_hand(weights, x)
        row: dict[str, Any] = {"rows": weights.rows, "cols": weights.cols, "tokens": tokens}
        for name, (taken, size, y) in found.items():
            error = float((y.double() - right).norm() / right.norm())
            row[name] = {"us": taken * 1e6, "GB/s": size / taken / 1e9, "error": error}
        rows.append(row)
        show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    cells = [f"{row['rows']} x {row['cols']}", str(row["tokens"])]
    cells += [
        f"{row[n]['us']:.1f}" if n in row else "" for n in ("tiles", "int8", "dense", "by hand")
    ]
    times = row["dense"]["us"]
    cells += [f"{times / row['tiles']['us']:.2f}", f"{times / row['int8']['us']:.2f}"]
    cells += [f"{row['tiles']['GB/s']:.0f}", f"{row['dense']['GB/s']:.0f}"]
    cells += [f"{row[name]['error']:.1e}" for name in ("tiles", "int8", "dense")]
    print("| " + " | ".join(cells) + " |", flush=True)


def sweep(weights: Weights) -> list[dict[str, Any]]:
    cases = [(tokens, shape, False) for tokens, shapes in TRIED.items() for shape in shapes]
    return [tried(weights, *case) for case in [*cases, *((1, s, True) for s in TRIED_IN_ORDER)]]


def tried(weights: Weights, tokens: int, shape: tuple[int, ...], rounded: bool) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, weights.cols, device="cuda", generator=generator).to(weights.dtype)
    found: dict[str, Any] = {"rows": weights.rows, "tokens": tokens, "int8": rounded}
    found["shape"] = shape
    cells = [f"{weights.rows} x {weights.cols}", f"{tokens}{' int8' * rounded}", str(shape)]
    try:
        taken, size, y = ours(weights, x, rounded, shape)
        right = weights.right(x)
        error = float((y.double() - right).norm() / right.norm())
        found |= {"us": taken * 1e6, "GB/s": size / taken / 1e9, "error": error}
        cells += [f"{taken * 1e6:.1f}", f"{size / taken / 1e9:.0f}", f"{error:.1e}"]
    except triton.runtime.errors.OutOfResources as problem:  # shared memory: said, and others go on
        found["problem"] = str(problem)
        cells += [found["problem"], "", ""]
    print("| " + " | ".join(cells) + " |", flush=True)
    return found


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--sweep", action="store_true", help="try other shapes of programs")
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    options.add_argument("--group-size", type=int, default=128)
    given = options.parse_args()
    dtype, began = getattr(torch, given.dtype), time.perf_counter()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {given.dtype}, groups of {given.group_size}\n")
    heads = ["matrix", "tokens"]
    if given.sweep:
        heads += ["shape", "us", "GB/s", "error"]
    else:
        heads += ["tiles us", "int8 us", "dense us", "by hand us", "dense / tiles", "dense / int8"]
        heads += ["tiles GB/s", "dense GB/s", "error tiles", "int8", "dense"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    rows: list[dict[str, Any]] = []
    for shape in MATRICES[: 2 if given.sweep else None]:
        run = sweep if given.sweep else table
        rows += run(Weights(*shape, given.group_size, dtype))
    shapes = {"shapes": {str(most): shape for most, shape in SHAPES.items()}, "many": MANY}
    taken = time.perf_counter() - began
    print(f"\n{taken:.0f} s in all")
    figures = {"device": device, "dtype": given.dtype, "in_order": IN_ORDER, **shapes}
    write_figures(given.json, __file__, {**figures, "rows": rows, "seconds": taken})


if __name__ == "__main__":
    main()
