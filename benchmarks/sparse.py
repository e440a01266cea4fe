"""Whether a product that skips zeros is faster than the run-time layouts, which do not.

    python benchmarks/sparse.py [--zeros 0.46 0.8 0.9 0.95 0.98] [--threads 1 2] [--rounds 11]
        [--json F]

A matrix of random trits, 65280 x 2048 in groups of 128, times one token, out of memory, in 8-bit
inputs. Beside the package's own layouts two that store no zeros, in C that this script compiles
(gcc or clang, with what the machine's processor has):

    offsets  of each group two counts, then the columns of its +1 and of its -1, a byte each
    bitmap   a bit for each weight that is not zero, and behind those of all rows a bit for the
             sign of each; the signs of 64 weights are spread by pdep, and 64 products are added up
             by vpdpbusd (AVX-512 with VNNI)

Scales are float32 in both, 16 bits in the count of bits. All runs are in turns; medians, and ratios
of the same round.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, write_figures
from kernels import COLS, Runs, forms, pointer, ratio, timed
from torch import Tensor

from ternarize.runtime import kernels
from ternarize.runtime.kernels import quantize
from ternarize.trits import base3

GROUP = 128
UNIT, TIMES = 1280, 51  # rows that are drawn, and how often they are repeated
CODE = r"""
#include <stdint.h>
#include <string.h>

/* rows first..last; start: where the bytes of a row begin */
void offsets(const uint8_t *bytes, const int64_t *start, const float *scales, const int32_t *x,
             float by, float *y, long groups, long first, long last) {
  for (long r = first; r < last; ++r) {
    const uint8_t *at = bytes + start[r];
    float sum = 0;
    for (long g = 0; g < groups; ++g) {
      const int32_t *own = x + 128 * g;
      int plus = at[0], minus = at[1], total = 0;
      at += 2;
      for (int i = 0; i < plus; ++i) total += own[at[i]];
      at += plus;
      for (int i = 0; i < minus; ++i) total -= own[at[i]];
      at += minus;
      sum += scales[r * groups + g] * (float)total;
    }
    y[r] = sum * by;
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__BMI2__)
#include <immintrin.h>
int has_bitmap(void) { return 1; }

void bitmap(const uint64_t *map, const uint8_t *signs, const int64_t *start, const float *scales,
            const int8_t *x, float by, float *y, long groups, long first, long last) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (long r = first; r < last; ++r) {
    const uint64_t *own = map + r * groups * 2;
    uint64_t bit = (uint64_t)start[r];
    __m512 sum = _mm512_setzero_ps();
    for (long g = 0; g < groups; ++g) {
      __m512i plus = _mm512_setzero_si512(), minus = plus;
      for (int half = 0; half < 2; ++half) {
        uint64_t some = own[2 * g + half], low, high;
        memcpy(&low, signs + (bit >> 3), 8);
        memcpy(&high, signs + (bit >> 3) + 8, 8);
        int shift = bit & 7;
        uint64_t bits = (low >> shift) | ((high << 1) << (63 - shift));
        uint64_t up = _pdep_u64(bits, some);
        bit += (uint64_t)__builtin_popcountll(some);
        __m512i in = _mm512_loadu_si512(x + 128 * g + 64 * half);
        plus = _mm512_dpbusd_epi32(plus, _mm512_maskz_mov_epi8(up, ones), in);
        minus = _mm512_dpbusd_epi32(minus, _mm512_maskz_mov_epi8(some & ~up, ones), in);
      }
      __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(plus, minus));
      sum = _mm512_fmadd_ps(total, _mm512_set1_ps(scales[r * groups + g]), sum);
    }
    y[r] = _mm512_reduce_add_ps(sum) * by;
  }
}
#else
int has_bitmap(void) { return 0; }
#endif
"""


def compiled(folder: Path) -> Any:
    """The two products, for the processor of this machine."""
    source, library = folder / "sparse.c", folder / "sparse.so"
    source.write_text(CODE)
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def in_offsets(trits: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of the rows, one behind the other, and where each begins."""
    parts, starts, size = [], [], 0
    for row in trits.view(len(trits), -1, GROUP).numpy():
        starts.append(size)
        for group in row:
            plus, minus = np.flatnonzero(group > 0), np.flatnonzero(group < 0)
            part = np.concatenate([[len(plus), len(minus)], plus, minus]).astype(np.uint8)
            parts.append(part)
            size += len(part)
    return torch.from_numpy(np.concatenate(parts)), torch.tensor(starts)


def in_bits(trits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bitmap (bytes), the signs (bytes), and at which bit the signs of each row begin."""
    some = trits.numpy() != 0
    signs = trits.numpy()[some] > 0
    counts = some.sum(1)
    starts = torch.from_numpy(np.concatenate([[0], counts.cumsum()[:-1]]))
    bitmap = np.packbits(some.reshape(-1), bitorder="little")
    return torch.from_numpy(bitmap), torch.from_numpy(np.packbits(signs, bitorder="little")), starts


def over_rows(
    pool: ThreadPoolExecutor, threads: int, rows: int, part: Callable[[int, int], None]
) -> None:
    bounds = [rows * i // threads for i in range(threads + 1)]
    list(pool.map(part, bounds[:-1], bounds[1:]))


def table(code: Any, zeros: float, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time all layouts with a share of zeros; each must give what the first gives."""
    rows, groups = UNIT * TIMES, COLS // GROUP
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (UNIT, COLS), generator=generator, dtype=torch.int8) * 2 - 1
    kept = torch.rand(UNIT, COLS, generator=generator) >= zeros
    trits = signs * kept
    halves = torch.rand(UNIT, groups, generator=generator).half()
    scales = halves.float().repeat(TIMES, 1)
    x = torch.randn(1, COLS, generator=generator)
    rounded, by = quantize(x, "int8")
    small, wide = rounded.to(torch.int8).flatten(), rounded.to(torch.int32).flatten()
    factor = ctypes.c_float(float(by.flatten()[0]))
    runs: Runs = {}
    bits: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    alive: list[Any] = []  # what C reads, by address

    for form in forms():
        packed = base3.pack(trits, GROUP)
        lanes = kernels.to_lanes(packed, COLS, GROUP, form).repeat(TIMES)
        ordered = kernels.scale_lanes(halves, UNIT, form).repeat(TIMES)
        runs[form] = partial(
            kernels.product_of_lanes, x, lanes, ordered, rows, GROUP, form, "int8", threads
        )
        bits[form] = 8 * (lanes.nbytes + ordered.nbytes) / (rows * COLS)

    pool = ThreadPoolExecutor(threads)

    def sparse(name: str, stored: list[Tensor], inputs: Tensor) -> None:
        outputs[name] = y = torch.empty(rows)
        held = [*stored, scales, inputs]
        alive.append(held)
        given = [*map(pointer, held), factor, pointer(y), ctypes.c_long(groups)]
        own = getattr(code, name)

        def part(first: int, last: int) -> None:
            own(*given, ctypes.c_long(first), ctypes.c_long(last))

        runs[name] = partial(over_rows, pool, threads, rows, part)
        size = sum(t.nbytes for t in stored if t.dtype == torch.uint8) + 2 * scales.numel()
        bits[name] = 8 * size / (rows * COLS)

    one, begin = in_offsets(trits)
    starts = torch.cat([begin + len(one) * i for i in range(TIMES)])
    sparse("offsets", [one.repeat(TIMES), starts], wide)
    if code.has_bitmap():
        map_, flags, begin = in_bits(trits)
        starts = torch.cat([begin + 8 * len(flags) * i for i in range(TIMES)])
        behind = torch.zeros(16, dtype=torch.uint8)  # read beyond the last sign, and not used
        sparse(
            "bitmap", [map_.repeat(TIMES), torch.cat([flags.repeat(TIMES), behind]), starts], small
        )

    seconds = timed(runs, rounds)
    found = runs[forms()[0]]()
    assert isinstance(found, Tensor)
    for name, y in outputs.items():
        torch.testing.assert_close(y, found.flatten(), rtol=1e-4, atol=1e-4, msg=name)
    pool.shutdown()

    first = forms()[0]
    print(f"{zeros:.0%} zeros, {threads} threads\n")
    print(f"| | bits | GMAC/s | x {first} |\n|---|---|---|---|")
    result = []
    for name, values in seconds.items():
        speed = rows * COLS / sorted(values)[len(values) // 2] / 1e9
        times = ratio(seconds, name, first)
        print(f"| {name} | {bits[name]:.3f} | {speed:.1f} | {times:.2f} |")
        result.append({"name": name, "bits": bits[name], "GMAC/s": speed, "ratio": times})
    print()
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--zeros", type=float, nargs="+", default=[0.46, 0.8, 0.9, 0.95, 0.98])
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--rounds", type=int, default=11)
    options = arguments.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        code = compiled(Path(folder))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for zeros in options.zeros:
                rows = table(code, zeros, threads, options.rounds)
                result[f"{zeros}, {threads} threads"] = rows
    write_figures(options.json, __file__, result)


if __name__ == "__main__":
    main()
