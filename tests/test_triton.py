"""The kernels for GPUs, on a CPU: run by Triton's interpreter, and compiled for processors.

Triton comes with torch's builds for CUDA, and by itself it takes 600 MB, more than all else that
the tests need: where it is not installed, only the layout is tested. Each case is a process of its
own, because Triton reads TRITON_INTERPRET when it is imported. tests/test_cuda.py runs on a GPU.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.errors import FormatError, UsageError
from ternarize.runtime import products, tiles
from ternarize.runtime.forms import Lanes, Layout
from ternarize.runtime.tiles import TILES, from_tiles, tiles_size, to_tiles, words_of
from ternarize.trits import base3

ROOT = Path(__file__).parents[1]
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (600 MB)"
)


@pytest.mark.parametrize(("cols", "group_size"), [(256, 128), (640, 64), (70, 32), (33, -1)])
def test_tiles_hold_the_trits(cols: int, group_size: int) -> None:
    trits = torch.randint(-1, 2, (5, cols), dtype=torch.int8)
    packed = base3.pack(trits, group_size)
    tiles = to_tiles(packed, cols, group_size)
    assert tiles.shape == (tiles_size(5, cols),)
    words = words_of(tiles, 5)
    for row, col in [(0, 0), (4, cols - 1), (2, 32), (3, cols // 2)]:
        block, field, word = col // 256, col % 256 // 32, col % 32
        bits = int(words[block, row, word]) >> 2 * field & 3
        assert bits == int(trits[row, col]) & 3
    assert torch.equal(from_tiles(tiles, 5, cols, group_size), packed)


def test_overwritten_tiles_are_refused() -> None:
    tiles = to_tiles(base3.pack(torch.zeros(2, 64, dtype=torch.int8), 32), 64, 32)
    with pytest.raises(FormatError, match="for 3 x 64 weights"):
        from_tiles(tiles, 3, 64, 32)
    tiles[0] = 0b10
    with pytest.raises(FormatError, match="a field holds no trit"):
        from_tiles(tiles, 2, 64, 32)


def test_an_input_on_another_device_is_refused() -> None:
    held = Layout(64, 32, lanes=Lanes(TILES, 2, 2, torch.float16))
    there = torch.empty(tiles_size(2, 64), dtype=torch.uint8, device="meta")
    scale = torch.empty(4, dtype=torch.float16, device="meta")
    with pytest.raises(UsageError, match="on cpu; the layer is on meta"):
        products.product(torch.ones(1, 64), there, scale, None, held)


INTERPRETED = """
import torch
from ternarize.runtime.kernels import product_of_trits, quantize
from ternarize.runtime.tiles import to_tiles, words_of
from ternarize.runtime.triton_kernels import multiply_tiles, parts_of_block, round_tokens
from ternarize.trits import base3
from ternarize.trits.scales import scale_codes, scale_values
from ternarize.trits.ternary import group_count

torch.manual_seed(0)
CASES = [(rows, cols, group, tokens) for rows, cols, group in SHAPES for tokens in TOKENS]
for at, (rows, cols, group, tokens) in enumerate(CASES):
    groups = group_count(cols, group)
    scale_rows = 1 if group == 0 else rows // 2 if at % 4 == 3 and rows % 2 == 0 else rows
    trits = torch.randint(-1, 2, (rows, cols), dtype=torch.int8)
    scales = torch.rand(scale_rows, groups) + 0.1
    kinds = (scales.half(), scale_codes(scales), scales.bfloat16(), scales)
    stored = kinds[at % 4]
    wide = scale_values(stored)
    words = words_of(to_tiles(base3.pack(trits, group), cols, group), rows)
    by_group = stored.T.contiguous()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(tokens, cols).to(dtype)
        y = torch.full((tokens, rows), torch.nan)
        multiply_tiles(x, words, by_group, y, group, False)
        length = cols if group <= 0 else group
        dense = wide.double().repeat_interleave(length, 1)[:, :cols]
        dense = dense.repeat_interleave(rows // scale_rows, 0) * trits
        right = x.double() @ dense.T
        error = ((y - right).norm() / right.norm()).item()
        assert error < 1e-6, (rows, cols, group, tokens, dtype, error)
        if parts_of_block(cols, group, True) is not None:
            # the interpreter does not round to bfloat16
            y = torch.full((tokens, rows), torch.nan)
            multiply_tiles(x, words, by_group, y, group, True)
            right = product_of_trits(x, trits, wide, group, "int8")
            assert torch.equal(y.to(dtype), right), (rows, cols, group, tokens, dtype)

x = torch.randn(4, 100) * 10
x[1], x[2, 3], x[3, 5] = 0, torch.nan, 3e38
for dtype in (torch.float32, torch.bfloat16):
    q, factor = round_tokens(x.to(dtype))
    right, by = quantize(x.to(dtype), "int8")
    assert torch.equal(q, right[0])
    assert torch.equal(factor.nan_to_num(7), by.flatten().nan_to_num(7))
"""

SHAPES = [(19, 640, 128), (20, 96, 32), (18, 300, 256), (34, 352, 96), (17, 520, 512)]
SHAPES += [(16, 300, -1), (32, 512, 0)]

COMPILED = """
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ternarize.runtime import triton_kernels as kernels

POINTERS = {"factor": "*fp32", "words": "*i16", "scales": "*fp16", "y": "*bf16"}

def built(kernel, processor, x, dtype, parts, shape, **other):
    side, rows, tokens, warps, stages = shape
    fixed = {"PARTS": parts, "BLOCKS": side, "ROWS": rows, "TOKENS": tokens, "DTYPE": dtype}
    fixed |= {"CODES": False, "ASM": True, "per_scale": 1, **other}
    names = kernel.arg_names
    types = {name: {**POINTERS, "x": x}.get(name, "i32") for name in names}
    types |= {name: "constexpr" for name in names if name in fixed}
    values = {(names.index(name),): value for name, value in fixed.items() if name in names}
    aligned = [name for name in names if name in ("x", "words", "y", "rows", "cols")]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=hints)
    options = {"num_warps": warps, "num_stages": stages}
    return compile(source, target=GPUTarget("cuda", processor, 32), options=options).asm["ptx"]

narrow, wide = kernels._narrow, kernels._wide
for processor in (80, 90):
    ptx = built(narrow, processor, "*bf16", tl.bfloat16, 2, kernels.SHAPES[2])
    # words come 16 bytes at a time, and nothing is computed but shifts, masks and products
    assert ptx.count("cp.async.cg.shared.global") >= 2 and "mma.sync" in ptx
    assert not [op for op in ("cvt.rn.bf16.s", "cvt.rn.f32.s", "mul.lo.s16") if op in ptx]
    assert "s32.s8.s8" in built(narrow, processor, "*i8", tl.int8, 0, kernels.SHAPES[16])
    assert "s32.s8.s8" in built(wide, processor, "*i8", tl.int8, 2, kernels.IN_ORDER)
    ptx = built(wide, processor, "*fp16", tl.float16, 4, kernels.SMALL[0])
    assert ("wgmma" if processor == 90 else "mma.sync") in ptx
    assert "tf32" in built(wide, processor, "*fp32", tl.float32, 1, kernels.SMALL[1])
"""


def run(script: str, **environment: str) -> None:
    given = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **given, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@with_triton
def test_products_in_the_interpreter() -> None:
    run(f"SHAPES = {SHAPES}; TOKENS = [1, 18]\n{INTERPRETED}", TRITON_INTERPRET="1")


@with_triton
def test_kernels_compile_for_processors_that_are_not_here() -> None:
    run(COMPILED)


@pytest.mark.parametrize("what", ["right", "off", "broken"])
def test_kernels_that_are_not_right_on_a_gpu_are_told_of_and_left(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(x: Tensor, words: Tensor, scales: Tensor, *rest: Any) -> Any:
        if what == "broken":
            raise RuntimeError("no kernel image is available")
        rows, _, group_size, rounded, _ = rest
        trits = tiles.trits_of_tiles(words, rows, x.shape[1])
        wide = scales.view(-1, rows).T.repeat_interleave(group_size, 1).float()
        multiply = products.rounded_linear if rounded else torch.nn.functional.linear
        return multiply(x.float(), trits * wide) * (1.05 if what == "off" else 1)

    monkeypatch.setattr(tiles, "product_of_tiles", product)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    tiles.are_right.cache_clear()
    device = torch.device("cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [tiles.are_right(device, rounded) for rounded in (False, True, False)]
    tiles.are_right.cache_clear()
    assert found == [what == "right"] * 3
    words = {"right": [], "off": ["off by 5.0%"] * 2, "broken": ["no kernel image"] * 2}[what]
    assert len(said) == len(words)
    assert all(word in str(each.message) for word, each in zip(words, said, strict=True))
