"""y = x W^T on a GPU, in Triton, from the layout of tiles.py: two kernels, and one that rounds.

    narrow   up to 16 tokens. Warps share a row's columns, and their sums are added in a fixed
             order at the end: one launch, which reads every byte of W once
    wide     any number of tokens; a program goes through the columns in their order

Both multiply in tensor cores, by -1, 0 and 1 (no scale is rounded), and add in float32, or in int32
where tokens are rounded to 8 bits. A field of a word is a trit's two bits, and the two top bits of
a number of any width are its sign and, of a float, the top of its exponent: shifted there and
masked they are 2, -2 or 0 (of int8: 64, -64 or 0), which is all the decoding there is.

This module needs Triton, which comes with torch's builds for CUDA; only tiles.py imports it. With
TRITON_INTERPRET=1 the kernels run on a CPU, one program after the other.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import functools
from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from triton.runtime import JITFunction  # type: ignore[import-not-found]

_FIELD = 32  # columns of a field
_BLOCK = 8 * _FIELD  # columns of a word of 16 bits, eight fields
# How programs share the work, by the most tokens that it is for: (blocks side by side, 0: `wide`;
# rows, tokens, warps, stages of loads)
SHAPES = {2: (8, 16, 2, 8, 2), 4: (8, 16, 4, 8, 2), 8: (8, 16, 8, 8, 2), 16: (8, 16, 16, 8, 2)}
SHAPES |= {32: (0, 64, 32, 4, 3), 64: (0, 64, 64, 4, 3), 256: (0, 64, 128, 4, 3)}
MANY = (0, 128, 128, 8, 3)
IN_ORDER = (0, 32, 16, 2, 4)  # few rounded tokens, several groups
_SMALL = (0, 64, 32, 4, 2), (0, 64, 16, 4, 2)  # where memory is short

# Numbers that a kernel is not compiled anew for
VARYING = ["tokens", "blocks", "groups", "group"]

# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _trits(words, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The trits in field J of int16 words, times 2; as int8 times 64."""
    if DTYPE == tl.int8:
        if ASM:  # four words at a time
            trits = tl.inline_asm_elementwise(
                f"prmt.b32 $0, $1, $2, {0x6420 if J < 4 else 0x7531}; "
                f"shl.b32 $0, $0, {6 - 2 * (J % 4)}; and.b32 $0, $0, 0xC0C0C0C0;",
                "=&r,r,r",
                [words],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            trits = (((words << (14 - 2 * J)) & -0x4000) >> 8).to(tl.int8)
    elif DTYPE == tl.float32:
        bits = (words.to(tl.int32) << (30 - 2 * J)) & -0x40000000
        trits = bits.to(tl.float32, bitcast=True)
    else:
        if ASM:  # two words at a time
            bits = tl.inline_asm_elementwise(
                f"shl.b32 $0, $1, {14 - 2 * J}; and.b32 $0, $0, 0xC000C000;",
                "=r,r",
                [words],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            bits = (words << (14 - 2 * J)) & -0x4000
        trits = bits.to(DTYPE, bitcast=True)
    return trits


@triton.jit
def _scales(at, mask, CODES: tl.constexpr):
    scale = tl.load(at, mask=mask, other=0)
    if CODES:  # scales.scale_values
        scale = (scale.to(tl.int16) << 7).to(tl.float16, bitcast=True)
    return scale.to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def _narrow(
    x, factor, words, scales, y, tokens, rows, cols, blocks, groups, group, scale_rows, per_scale,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DTYPE: tl.constexpr, CODES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """PARTS: of a block, each with a scale; 0: there is one scale for a row."""
    ROUNDED: tl.constexpr = DTYPE == tl.int8
    SUM: tl.constexpr = tl.int32 if ROUNDED else tl.float32
    FIELDS: tl.constexpr = 8 // max(1, PARTS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, k = tl.arange(0, TOKENS), tl.arange(0, 32)
    total = tl.zeros((BLOCKS, ROWS, TOKENS), SUM)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        there = (block < blocks)[:, None, None] & (row < rows)[None, :, None]
        at = (block[:, None, None] * rows + row[None, :, None]) * 32 + k[None, None, :]
        word = tl.load(words + at, mask=there, other=0)
        for part in tl.static_range(8 // FIELDS):
            sums = tl.zeros((BLOCKS, ROWS, TOKENS), SUM)
            for i in tl.static_range(FIELDS):
                col = block[:, None] * 256 + (part * FIELDS + i) * 32 + k[None, :]
                mask = (col < cols)[:, :, None] & (token < tokens)[None, None, :]
                tile = tl.load(
                    x + token[None, None, :] * cols + col[:, :, None], mask=mask, other=0
                )
                trits = _trits(word, part * FIELDS + i, DTYPE, ASM)
                sums = tl.dot(trits, tile.to(DTYPE), sums, input_precision="tf32x3", out_dtype=SUM)
            if PARTS == 0:
                total += sums
            else:
                g = (block * 256 + part * FIELDS * 32) // group
                mask = (g < groups)[:, None] & (row < rows)[None, :]
                at = g[:, None] * scale_rows + (row // per_scale)[None, :]
                total += sums * _scales(scales + at, mask, CODES)[:, :, None]
    out = tl.sum(total, 0)
    if ROUNDED:
        out = (out >> 6).to(tl.float32)
    else:
        out *= 0.5
    if PARTS == 0:
        out *= _scales(scales + row // per_scale, row < rows, CODES)[:, None]
    if ROUNDED:
        out *= tl.load(factor + token, mask=token < tokens, other=0)[None, :]
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(y + token[None, :] * rows + row[:, None], out, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _wide(
    x, factor, words, scales, y, tokens, rows, cols, blocks, groups, group, scale_rows, per_scale,
    PARTS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DTYPE: tl.constexpr, CODES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `_narrow`. Groups are added in their order, as kernels.product_of_trits adds them."""
    ROUNDED: tl.constexpr = DTYPE == tl.int8
    SUM: tl.constexpr = tl.int32 if ROUNDED else tl.float32
    FIELDS: tl.constexpr = 8 // max(1, PARTS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, k = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, 32)
    wide = token.to(tl.int64)[None, :]
    total = tl.zeros((ROWS, TOKENS), tl.float32 if PARTS > 0 else SUM)
    for block in range(blocks):
        at = (block * rows + row[:, None]) * 32 + k[None, :]
        word = tl.load(words + at, mask=(row < rows)[:, None], other=0)
        for part in tl.static_range(8 // FIELDS):
            sums = tl.zeros((ROWS, TOKENS), SUM) if PARTS > 0 else total
            for i in tl.static_range(FIELDS):
                col = block * 256 + (part * FIELDS + i) * 32 + k
                mask = (col < cols)[:, None] & (token < tokens)[None, :]
                tile = tl.load(x + wide * cols + col[:, None], mask=mask, other=0)
                trits = _trits(word, part * FIELDS + i, DTYPE, ASM)
                sums = tl.dot(trits, tile.to(DTYPE), sums, input_precision="tf32x3", out_dtype=SUM)
            if PARTS == 0:
                total = sums
            else:
                g = (block * 256 + part * FIELDS * 32) // group
                at = scales + g * scale_rows + row // per_scale
                scale = _scales(at, (row < rows) & (g < groups), CODES)
                if ROUNDED:
                    total += (sums >> 6).to(tl.float32) * scale[:, None]
                else:
                    total += sums * scale[:, None]
    if PARTS == 0:
        if ROUNDED:
            total = (total >> 6).to(tl.float32)
        total *= _scales(scales + row // per_scale, row < rows, CODES)[:, None]
    if ROUNDED:
        total *= tl.load(factor + token, mask=token < tokens, other=0)[None, :]
    else:
        total *= 0.5
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(y + wide * rows + row[:, None], total, mask=mask)


@triton.jit
def _round(x, q, factor, cols, COLS: tl.constexpr):
    """A token rounded to 8 bits, as kernels.quantize says it, by one program."""
    at = tl.program_id(0).to(tl.int64) * cols
    absmax = tl.zeros((COLS,), tl.float32)
    nan = tl.zeros((COLS,), tl.int32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        value = tl.load(x + at + col, mask=col < cols, other=0).to(tl.float32)
        nan |= (value != value).to(tl.int32)
        absmax = tl.maximum(absmax, tl.abs(value))
    most = tl.max(absmax, 0)
    finite = (most * 127 < float("inf")) & (tl.max(nan, 0) == 0)
    divisor = tl.where(finite & (most > 0), most, 1.0)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        value = tl.load(x + at + col, mask=col < cols, other=0).to(tl.float32)
        value = tl.where(finite, value, 0.0)
        # to the nearest even: beyond 2^23 floats are integers
        whole = (tl.div_rn(value * 127, divisor) + 12582912.0) - 12582912.0
        tl.store(q + at + col, whole.to(tl.int8), mask=col < cols)
    tl.store(factor + tl.program_id(0), tl.where(finite, tl.div_rn(most, 127.0), float("nan")))


# --- launches ------------------------------------------------------------------------------------


def parts_of_block(cols: int, group_size: int, rounded: bool) -> int | None:
    """Parts of a block with a scale each, 0 where a row has one scale; None: not served here.

    Sums of rounded tokens are exact for a group, so that they are to end where it ends.
    """
    if not 0 < group_size < cols:
        return 0
    if group_size % _FIELD:
        return None
    fields = group_size // _FIELD
    parts = next(parts for parts in (1, 2, 4, 8) if fields % (8 // parts) == 0)
    return None if rounded and fields * parts != 8 else parts


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """kernels.quantize(x, "int8"), the same bits: q (tokens, cols) int8, factor (tokens,) float32.

    x  (tokens, cols) float, contiguous
    """
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    factor = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _round[(len(x),)](x, q, factor, x.shape[1], COLS=2048, num_warps=8, enable_fp_fusion=False)
    return q, factor


def multiply_tiles(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    y: Tensor,
    group_size: int,
    rounded: bool,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Set y to x W^T.

    x        (tokens, cols) float32, bfloat16 or float16, contiguous
    words    (blocks, rows, 32) int16
    scales   (groups, scale_rows) float, or uint8 codes; scale_rows divides rows
    y        (tokens, rows) float
    rounded  whether each token is rounded to 8 bits
    shape    as in SHAPES, to try others; None: by the number of tokens

    A layout that `parts_of_block` does not serve is a mistake of the caller.
    """
    (tokens, cols), (blocks, rows, _), (groups, scale_rows) = x.shape, words.shape, scales.shape
    parts = parts_of_block(cols, group_size, rounded)
    assert parts is not None and blocks == -(-cols // _BLOCK)
    interpreted = not isinstance(_narrow, JITFunction)
    dtype: Any = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dtype = tl.int8 if rounded else dtype[x.dtype]
    if interpreted and dtype == tl.bfloat16:  # it multiplies the bits of bfloat16 as integers
        dtype = tl.float32
    factor = scales  # not looked at
    if rounded:
        x, factor = round_tokens(x)
    group = group_size if parts else cols
    given = (x, factor, words, scales, y, tokens, rows, cols, blocks, groups, group, scale_rows)
    rest = {"DTYPE": dtype, "CODES": scales.dtype == torch.uint8, "ASM": not interpreted}
    # sums of rounded tokens in several groups have one order, that of the columns
    alone = rounded and parts > 0
    side, first, second, warps, stages = shape or _shape(tokens, x.element_size(), alone, x.device)
    rest |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": not rounded}
    rest |= {"PARTS": parts, "ROWS": first, "TOKENS": second}
    if side and tokens <= second and not alone:
        grid = (triton.cdiv(rows, first),)
        _narrow[grid](*given, rows // scale_rows, BLOCKS=side, **rest)
        return
    _wide[triton.cdiv(rows, first), triton.cdiv(tokens, second)](*given, rows // scale_rows, **rest)


def _shape(tokens: int, size: int, alone: bool, device: torch.device) -> tuple[int, ...]:
    """The shape for a number of tokens whose inputs, of `size` bytes each, fit the memory."""
    if alone and tokens <= 16:
        return IN_ORDER
    best = next((shape for most, shape in SHAPES.items() if tokens <= most), MANY)
    if size == 4 and not best[0]:  # three products, whose registers would not suffice
        best = _SMALL[0]
    shapes = (shape for shape in (best, *_SMALL) if _bytes(shape, size) <= _memory(device))
    return next(shapes, _SMALL[-1])


def _bytes(shape: tuple[int, ...], size: int) -> int:
    """Of memory that a program's inputs take, and about those of its words."""
    side, rows, tokens, _, stages = shape
    buffers = stages - 1 if side else stages
    return buffers * max(1, side) * (_BLOCK * tokens * size + 2 * _FIELD * rows)


@functools.cache
def _memory(device: torch.device) -> int:
    """Bytes that programs may share on a device."""
    if device.type != "cuda":  # interpreted
        return 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
