"""Ternary tensors by their frequencies: bits, and how fast they are coded and decoded.

    python benchmarks/coding.py [--rows 4096] [--cols 4096] [--repeats 7] [--models PACKED ...]
        [--json F]

Trits drawn at random with a share of zeros, in groups of 128 (26 bytes, of which the last holds 3
trits), as the stream of formats/rans.md; beside it what zlib's Huffman coder makes of the same
bytes, and zstd's if its package is there. Decoding is to the bytes of base3, on one and two
threads, one after the other in each round; medians. Models are recoded and measured whole: bits a
ternary weight with scales, and the time of checking every byte of both, from the page cache.
"""

import importlib.util
import math
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser, write_figures
from torch import Tensor

from ternarize.files.container import check_data
from ternarize.publish.recode import recode
from ternarize.sources.packed import open_packed
from ternarize.trits.base3 import pack
from ternarize.trits.rans import classes_of_trits, decode_rows, encode_rows

SHARES = (0.33, 0.46, 0.5, 0.65, 0.8, 0.9, 0.95)
GROUP = 128


def drawn(rows: int, cols: int, zeros: float) -> Tensor:
    generator = torch.Generator().manual_seed(round(1000 * zeros))
    signs = 1 - 2 * torch.randint(0, 2, (rows, cols), generator=generator, dtype=torch.int8)
    return signs * (torch.rand(rows, cols, generator=generator) >= zeros)


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def of_trits(rows: int, cols: int, zeros: float, repeats: int) -> dict[str, Any]:
    """Bits a trit of each coder, and trits a second of ours."""
    packed, classes = pack(drawn(rows, cols, zeros), GROUP), classes_of_trits(cols, GROUP)
    stream, count = encode_rows(packed, classes), rows * cols

    def read(at: int, size: int) -> Tensor:
        return stream[at : at + size]

    def decode(threads: int) -> Tensor:
        shape = rows, packed.shape[1]
        return decode_rows(read, len(stream), shape, classes, threads=threads)

    assert torch.equal(decode(2), packed)
    taken: dict[str, list[float]] = {"encode": [], "1": [], "2": []}
    for _ in range(repeats):
        taken["encode"].append(seconds_of(lambda: encode_rows(packed, classes)))
        for threads in (1, 2):
            taken[str(threads)].append(seconds_of(partial(decode, threads)))
    raw = packed.numpy().tobytes()
    huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    bits = {"rans": len(stream), "zlib": len(huffman.compress(raw) + huffman.flush())}
    if importlib.util.find_spec("zstandard"):
        zstd = importlib.import_module("zstandard")
        bits["zstd"] = len(zstd.ZstdCompressor(level=3).compress(raw))
    entropy = -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)
    return {
        "zeros": zeros,
        "entropy": entropy,
        "bits": {name: 8 * size / count for name, size in bits.items()},
        "trits_per_second": {n: count / statistics.median(s) for n, s in taken.items()},
    }


def of_model(model: Path, repeats: int) -> dict[str, Any]:
    """Bits a ternary weight before and after, and how fast all is checked."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        coded = Path(folder) / "coded"
        began = time.perf_counter()
        told = recode(model, coded)
        taken = time.perf_counter() - began
        both = {"base3": open_packed(model), "rans": open_packed(coded)}
        checks: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(repeats):
            for name, opened in both.items():
                checks[name].append(seconds_of(partial(check_data, *opened)))
    packed = both["base3"][0].stored_bytes
    return {
        **told,
        "model": model.name,
        "seconds": taken,
        "checked_gb_per_second": {
            name: packed / statistics.median(each) / 1e9 for name, each in checks.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=4096)
    arguments.add_argument("--cols", type=int, default=4096)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--models", type=Path, nargs="*", default=[])
    options = arguments.parse_args(argv)
    hide_bars()
    print("| zeros | entropy | rans | zlib | zstd | encode | decode, 1 thread | 2 threads |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for zeros in SHARES:
        row = of_trits(options.rows, options.cols, zeros, options.repeats)
        bits = [
            f"{row['bits'][n]:.3f}" if n in row["bits"] else "" for n in ("rans", "zlib", "zstd")
        ]
        speeds = [f"{row['trits_per_second'][n] / 1e9:.2f}" for n in ("encode", "1", "2")]
        print(f"| {zeros:.0%} | {row['entropy']:.3f} | {' | '.join(bits + speeds)} |", flush=True)
        rows.append(row)
    models = []
    for model in options.models:
        models.append(of_model(model, options.repeats))
        print({k: v for k, v in models[-1].items() if k != "output"}, flush=True)
    write_figures(options.json, __file__, {"trits": rows, "models": models})
    return 0


if __name__ == "__main__":
    sys.exit(main())
