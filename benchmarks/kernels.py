"""How fast packed trits are multiplied on a CPU, beside the machine's limits and llama.cpp.

    python benchmarks/kernels.py [--threads 1 2] [--rounds 15] [--cpu avx2] [--json F]
    pip install llama-cpp-python        # for the peers, in this environment or another:
    python benchmarks/kernels.py --llama .../site-packages/llama_cpp/lib

Five tables, each of one run: what is compared runs in turns, so that a noisy machine disturbs all
alike. Medians and best; ratios are medians of the ratios within a round.

    vector     matrix times vector out of memory, 261120 x 2048. `read` is a loop that only reads:
               the bandwidth that there is.
    layers     the products of a model's layers for one token: 16 times the seven matrices of a
               LLaMA of about 1 B parameters (hidden 2048, 8 KV heads, FFN 8192), each with its own
               bytes
    batch      8192 x 2048 times 2 to 16 tokens
    matrix     8192 x 2048 times 128 and 512 tokens. `peak` is a loop of the dot-product instruction
               (vpdpbusd, or vpmaddubsw and additions) and nothing else; the variant "amx" has
               another unit for large batches, so it can be above that.
    head       int8 weights as they are stored, 32000 x 2048 with a scale for each row, and int4
               with one for 32 columns (output heads of `--head int8` and `int4`), times 1 and 128
               tokens in bfloat16, beside torch's product with bfloat16 weights, which are twice the
               bytes of int8, and `read` of the int8 weights. All
               come out of memory: there are several copies, in turn. The environment variable
               ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 forbids torch the use of AMX.

Ours take float32 inputs and round them to 8 bits in the measured time; "float" are products with
float activations. Peers are ggml_vec_dot_tq*_q8_K of libggml-cpu over all rows, by a loop in C that
this script compiles, in blocks of 16 rows and 16 tokens as ggml does it, rows split over threads;
their inputs are rounded before. Their scales are of groups of 256.
"""

import argparse
import ctypes
import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.native import lib
from ternarize.runtime import kernels
from ternarize.runtime.kernels import LANES2, LANES3
from ternarize.trits import base3
from ternarize.trits.ternary import group_count

COLS = 2048
UNIT = 5120  # rows that a tall matrix repeats: whole blocks of either layout
LAYERS = 16
SHAPES = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
SHAPES += [(8192, 2048), (8192, 2048), (2048, 8192)]
PEERS = {"TQ2_0": 66, "TQ1_0": 54}  # bytes of 256 weights
Q8_K = 292  # bytes of 256 inputs
TABLES = ("vector", "layers", "batch", "matrix", "head")
Runs = dict[str, Callable[[], object]]

# The order of ggml_compute_forward_mul_mat: blocks of 16 rows and 16 inputs.
PEER_LOOP = """
#include <stddef.h>
typedef void (*dot)(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by,
                    int nrc);
void rows(dot d, int n, const char *w, size_t w_row, const char *x, size_t x_row, float *y,
          size_t y_row, size_t first, size_t last, size_t tokens) {
  for (size_t t16 = 0; t16 < tokens; t16 += 16)
    for (size_t r16 = first; r16 < last; r16 += 16)
      for (size_t t = t16; t < t16 + 16 && t < tokens; ++t)
        for (size_t r = r16; r < r16 + 16 && r < last; ++r)
          d(n, y + t * y_row + r, 0, w + r * w_row, 0, x + t * x_row, 0, 1);
}
"""


# ------------------------------------------------------------------------------------------------
# What is multiplied


@dataclass(frozen=True)
class Matrix:
    """A matrix in one of our layouts, of random trits."""

    rows: int
    cols: int
    group_size: int
    form: str
    lanes: Tensor
    scales: Tensor

    @property
    def bytes(self) -> int:
        return self.lanes.nbytes + self.scales.nbytes

    def times(self, x: Tensor, activations: str, threads: int) -> Tensor:
        return kernels.product_of_lanes(
            x, self.lanes, self.scales, self.rows, self.group_size, self.form, activations, threads
        )


def matrix(rows: int, cols: int, group_size: int, form: str) -> Matrix:
    unit = UNIT if rows % UNIT == 0 else rows
    trits = torch.randint(-1, 2, (unit, cols), dtype=torch.int8)
    scales = torch.rand(unit, group_count(cols, group_size)).half()
    lanes = kernels.to_lanes(base3.pack(trits, group_size), cols, group_size, form)
    in_order = kernels.scale_lanes(scales, unit, form)
    times = rows // unit
    return Matrix(rows, cols, group_size, form, lanes.repeat(times), in_order.repeat(times))


class Peer:
    """llama.cpp's kernel for one of its formats."""

    def __init__(self, library: Path, name: str, loop: Any) -> None:
        ctypes.CDLL(str(library / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.ggml = ctypes.CDLL(str(library / "libggml-cpu.so"))
        self.name, self.loop = name, loop
        self.dot = getattr(self.ggml, f"ggml_vec_dot_{name.lower()}_q8_K")

    def matrix(self, rows: int, cols: int) -> Tensor:
        """Random trits in the peer's format: (rows, bytes of a row)."""
        unit = min(rows, 256)
        width = cols // 256 * PEERS[self.name]
        out = torch.empty((unit, width), dtype=torch.uint8)
        quantize = getattr(self.ggml, f"quantize_row_{self.name.lower()}")
        weights = torch.randint(-1, 2, (unit, cols)).float()
        for row in range(unit):
            quantize(pointer(weights[row]), pointer(out[row]), ctypes.c_int64(cols))
        return out.repeat(rows // unit, 1)

    def inputs(self, x: Tensor) -> Tensor:
        tokens, cols = x.shape
        out = torch.empty((tokens, cols // 256 * Q8_K), dtype=torch.uint8)
        for token in range(tokens):
            self.ggml.quantize_row_q8_K(
                pointer(x[token]), pointer(out[token]), ctypes.c_int64(cols)
            )
        return out

    def times(self, w: Tensor, x: Tensor, y: Tensor, pool: ThreadPoolExecutor, parts: int) -> None:
        """y (tokens, rows) of w and x in the peer's formats, rows in `parts`."""
        rows, tokens, cols = len(w), len(x), x.shape[1] // Q8_K * 256

        def part(i: int) -> None:
            first, last = rows * i // parts, rows * (i + 1) // parts
            self.loop(
                self.dot,
                cols,
                pointer(w),
                ctypes.c_size_t(w.shape[1]),
                pointer(x),
                ctypes.c_size_t(x.shape[1]),
                pointer(y),
                ctypes.c_size_t(rows),
                ctypes.c_size_t(first),
                ctypes.c_size_t(last),
                ctypes.c_size_t(tokens),
            )

        list(pool.map(part, range(parts)))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def peers(library: Path | None, folder: Path) -> list[Peer]:
    if library is None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            print("llama-cpp-python is not installed: no peers\n")
            return []
        library = Path(found.origin).parent / "lib"
    source = folder / "rows.c"
    source.write_text(PEER_LOOP)
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(folder / "rows.so")], check=True
    )
    loop = ctypes.CDLL(str(folder / "rows.so")).rows
    return [Peer(library, name, loop) for name in PEERS]


# ------------------------------------------------------------------------------------------------
# How it is timed


def timed(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in an order that changes from round to round; the first is to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """How many times faster `name` is than `other`, in the median of the rounds."""
    pairs = zip(seconds[name], seconds[other], strict=True)
    return statistics.median(b / a for a, b in pairs)


def table(
    title: str,
    seconds: dict[str, list[float]],
    work: float,
    unit: str,
    moved: dict[str, int],
    others: Sequence[str],
) -> list[dict[str, Any]]:
    """Print a table and return its rows.

    work    of each run, in 1e9 units; moved: bytes that it reads
    others  what the columns of ratios compare with, where it was run
    """
    others = [name for name in others if name in seconds]
    print(f"{title}\n")
    heads = [f"{unit} median", "best", "GB/s", *(f"x {name}" for name in others)]
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    rows = []
    for name, values in seconds.items():
        median, best = work / statistics.median(values), work / min(values)
        rate = moved[name] / statistics.median(values) / 1e9 if name in moved else None
        ratios = {other: ratio(seconds, name, other) for other in others}
        cells = [f"{median:.1f}", f"{best:.1f}", "" if rate is None else f"{rate:.1f}"]
        print(f"| {name} | {' | '.join([*cells, *(f'{r:.2f}' for r in ratios.values())])} |")
        row = {"name": name, "median": median, "best": best, "GB/s": rate, "ratios": ratios}
        rows.append(row | {"seconds": values})
    print()
    return rows


# ------------------------------------------------------------------------------------------------
# The tables


def forms() -> list[str]:
    assert lib is not None
    return [LANES3, LANES2] if lib.has_lanes3() else [LANES2]


def label(form: str, group_size: int, activations: str = "int8") -> str:
    groups = "rows" if group_size < 0 else f"groups of {group_size}"
    return f"{form}, {groups}" + ("" if activations == "int8" else ", float")


def vector_table(
    found: list[Peer], threads: int, rounds: int, rows: int = UNIT * 51
) -> list[dict[str, Any]]:
    assert lib is not None
    x = torch.randn(1, COLS)
    runs: Runs = {}
    moved: dict[str, int] = {}
    largest = matrix(rows, COLS, -1, forms()[0])
    runs["read"] = partial(lib.read_all, largest.lanes, threads)
    moved["read"] = largest.lanes.nbytes
    for form in forms():
        for group_size in (-1, 128):
            for activations in ("int8", "none"):
                m = matrix(rows, COLS, group_size, form)
                name = label(form, group_size, activations)
                runs[name] = partial(m.times, x, activations, threads)
                moved[name] = m.bytes
    with ThreadPoolExecutor(threads) as pool:
        for peer in found:
            w, y = peer.matrix(rows, COLS), torch.empty(1, rows)
            runs[peer.name] = partial(peer.times, w, peer.inputs(x), y, pool, threads)
            moved[peer.name] = w.nbytes
        seconds = timed(runs, rounds)
    title = f"vector: {rows} x {COLS}, {threads} threads"
    found_rows = table(title, seconds, rows * COLS / 1e9, "GMAC/s", moved, list(PEERS))
    for row in found_rows:
        rates = zip(seconds["read"], seconds[row["name"]], strict=True)
        scale = moved.get(row["name"], 0) / moved["read"]
        row["share of bandwidth"] = statistics.median(read / own * scale for read, own in rates)
        print(f"{row['name']}: {row['share of bandwidth']:.2f} of the bandwidth")
    print()
    return found_rows


def layers_table(found: list[Peer], threads: int, rounds: int) -> list[dict[str, Any]]:
    inputs = {cols: torch.randn(1, cols) for _, cols in SHAPES}
    runs: Runs = {}
    moved: dict[str, int] = {}

    def ours(layers: list[Matrix]) -> None:
        for m in layers:
            m.times(inputs[m.cols], "int8", threads)

    for form in forms():
        for group_size in (-1, 128):
            layers = [matrix(r, c, group_size, form) for _ in range(LAYERS) for r, c in SHAPES]
            runs[label(form, group_size)] = partial(ours, layers)
            moved[label(form, group_size)] = sum(m.bytes for m in layers)
    with ThreadPoolExecutor(threads) as pool:
        for peer in found:
            x = {cols: peer.inputs(one) for cols, one in inputs.items()}
            weights = [
                (peer.matrix(r, c), torch.empty(1, r), c) for _ in range(LAYERS) for r, c in SHAPES
            ]

            def theirs(peer: Peer, weights: Any, x: dict[int, Tensor]) -> None:
                for w, y, cols in weights:
                    peer.times(w, x[cols], y, pool, threads)

            runs[peer.name] = partial(theirs, peer, weights, x)
            moved[peer.name] = sum(w.nbytes for w, _, _ in weights)
        seconds = timed(runs, rounds)
    work = LAYERS * sum(rows * cols for rows, cols in SHAPES) / 1e9
    title = f"layers: {work:.2f} G weights, {threads} threads"
    return table(title, seconds, work, "GMAC/s", moved, list(PEERS))


def matrix_table(
    found: list[Peer], threads: int, rounds: int, tokens: int, rows: int = 8192
) -> list[dict[str, Any]]:
    assert lib is not None
    x = torch.randn(tokens, COLS)
    work = rows * COLS * tokens / 1e9
    runs: Runs = {}
    one = lib.dot_peak(1, threads)
    if one:  # as many multiplications as the product has: a short run would meet less noise
        runs["peak"] = partial(lib.dot_peak, round(work * 1e9 / one), threads)
    for form in forms():
        for group_size in (-1, 128):
            for activations in ("int8", "none"):
                m = matrix(rows, COLS, group_size, form)
                runs[label(form, group_size, activations)] = partial(
                    m.times, x, activations, threads
                )
    dense = torch.randn(rows, COLS).to(torch.bfloat16)
    runs["torch, bfloat16"] = partial(torch.nn.functional.linear, x.to(torch.bfloat16), dense)
    with ThreadPoolExecutor(threads) as pool:
        for peer in found:
            w, y = peer.matrix(rows, COLS), torch.empty(tokens, rows)
            runs[peer.name] = partial(peer.times, w, peer.inputs(x), y, pool, threads)
        seconds = timed(runs, rounds)
    title = f"{tokens} tokens: {rows} x {COLS}, {threads} threads"
    return table(title, seconds, work, "GMAC/s", {}, ["peak", *PEERS, "torch, bfloat16"])


def head_table(threads: int, rounds: int, tokens: int, rows: int = 32000) -> list[dict[str, Any]]:
    assert lib is not None
    read: Callable[[Tensor, int], int] = lib.read_all
    x = torch.randn(tokens, COLS).to(torch.bfloat16)
    scales, by_group = torch.rand(rows, 1).half(), torch.rand(rows, COLS // 32).half()
    ours = [torch.randint(-127, 128, (rows, COLS), dtype=torch.int8) for _ in range(4)]
    dense = [torch.randn(rows, COLS).to(torch.bfloat16) for _ in range(2)]
    weights, theirs = itertools.cycle(ours), itertools.cycle(dense)

    def product(activations: str) -> Tensor:
        return kernels.product_of_int8(x, next(weights), scales, -1, activations, threads)

    def product_of_halves(activations: str) -> Tensor:
        halves = next(weights).view(torch.uint8).view(2 * rows, -1)[:rows]
        return kernels.product_of_int4(x, halves, by_group, 32, activations, threads)

    runs: Runs = {
        "read": lambda: read(next(weights).view(-1).view(torch.uint8), threads),
        "int8, float": partial(product, "none"),
        "int8, 8-bit inputs": partial(product, "int8"),
        "int4, float": partial(product_of_halves, "none"),
        "int4, 8-bit inputs": partial(product_of_halves, "int8"),
        "torch, bfloat16": lambda: torch.nn.functional.linear(x, next(theirs)),
    }
    moved = dict.fromkeys(runs, ours[0].nbytes) | {"torch, bfloat16": dense[0].nbytes}
    moved |= {name: ours[0].nbytes // 2 + by_group.nbytes for name in runs if "int4" in name}
    seconds = timed(runs, rounds)
    title = f"head: {tokens} tokens, {rows} x {COLS}, {threads} threads"
    work = rows * COLS * tokens / 1e9
    return table(title, seconds, work, "GMAC/s", moved, ["read", "torch, bfloat16"])


def main() -> None:
    assert lib is not None, "ternarize was installed without its compiled core"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu", choices=lib.product_cpus(), default=lib.cpu())
    parser.add_argument("--llama", type=Path, help="the folder of llama_cpp's libraries")
    parser.add_argument("--only", nargs="+", choices=TABLES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lib.use_cpu(options.cpu)
    wanted = options.only or TABLES
    result: dict[str, Any] = {"cpu": options.cpu, "rounds": options.rounds}
    print(f"instruction set {options.cpu}, {options.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        found = peers(options.llama, Path(folder))
        for threads in options.threads:
            torch.set_num_threads(threads)
            tables = {}
            if "vector" in wanted:
                tables["vector"] = vector_table(found, threads, options.rounds)
            if "layers" in wanted:
                tables["layers"] = layers_table(found, threads, options.rounds)
            for tokens in (2, 4, 8, 16) if "batch" in wanted else ():
                tables[f"{tokens} tokens"] = matrix_table(found, threads, options.rounds, tokens)
            for tokens in (128, 512) if "matrix" in wanted else ():
                tables[f"{tokens} tokens"] = matrix_table(found, threads, options.rounds, tokens)
            for tokens in (1, 128) if "head" in wanted else ():
                tables[f"head, {tokens} tokens"] = head_table(threads, options.rounds, tokens)
            result[f"{threads} threads"] = tables
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
