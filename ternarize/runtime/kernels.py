"""Products with packed weights, without a dense matrix: run-time layouts, and y = x W^T from them.

A run-time layout ("lanes") holds the trits of a matrix in the order in which a processor's vectors
multiply them, in one flat tensor of bytes that takes the place of the stored ones:

    lanes2   2 bits a weight, for every CPU
    lanes3   base 3, 1.6 bits a weight, for CPUs with AVX-512 VBMI

`to_lanes` makes it from stored bytes and `from_lanes` gives them back, so that memory need not hold
both. Scales lie beside it in the order of the same blocks of rows (`scale_lanes`, `lane_scales`).

There are products for AVX2, AVX-VNNI, AVX-512 with VNNI and VBMI, AMX, AArch64 with dot products
(NEON; exact under an emulator, never timed on a processor), and portable ones.

What `product_of_lanes` computes is defined by `product_of_trits`, in torch; the compiled core gives
the same bits on every CPU and with any number of threads. Inputs become integers (`quantize`),
whose sums over a group are exact; the float operations after them have one order.
ternarize/csrc has the layouts (pack/lanes.h) and the arithmetic (multiply/multiply.h) in full.

int8 and int4 weights are multiplied as they are stored (`product_of_int8`, `product_of_int4`), by
the same definition with them in place of the trits.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.files.headers import DTYPE_NAMES
from ternarize.native import lib
from ternarize.threads import THREADS
from ternarize.trits import base3
from ternarize.trits.int4 import unpack_int4
from ternarize.trits.scales import scale_values
from ternarize.trits.ternary import group_count, group_length, split_groups

LANES2, LANES3 = "lanes2", "lanes3"
LONGEST_SUM = 1 << 16  # columns of a group; the sums of longer ones could leave 32 bits
DIGITS_LIMIT = 127 * (65536 + 256 + 1)  # the largest number of three digits -128..127
_FIELDS = {LANES2: 4, LANES3: 5}  # rows that share a byte, each 16 behind the one before
_POWERS = {LANES2: (1, 4, 16, 64), LANES3: (1, 3, 9, 28, 84)}  # byte = sum of (trit + 1) * power
_PART = 1 << 22  # int4 weights in int8 at a time
CORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of inputs


def _openmp() -> int:
    """The address of the function that starts parallel regions in torch's OpenMP; 0 if unknown."""
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    if not library.exists():  # not Linux
        return 0
    start = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
    return ctypes.cast(start, ctypes.c_void_p).value or 0 if start is not None else 0


if lib is not None:
    lib.use_openmp(_openmp())


def best_form() -> str:
    """The layout that the CPU in use multiplies fastest out of memory."""
    return LANES3 if lib is not None and lib.has_lanes3() else LANES2


def lanes_shape(form: str, rows: int, cols: int, group_size: int) -> tuple[int, int, int]:
    """Bytes of a layout, blocks of rows, and rows in a block (the last block may be padded)."""
    block = 16 * _FIELDS[form]
    blocks = -(-rows // block)
    return 64 * blocks * _quads(cols, group_size), blocks, block


def _quads(cols: int, group_size: int) -> int:
    """Quads of a row: four columns of a group each, the last of a group with what is left."""
    length, groups = group_length(cols, group_size), group_count(cols, group_size)
    last = cols - (groups - 1) * length
    return (groups - 1) * -(-length // 4) + -(-last // 4) if groups else 0


def memory(size: int) -> Tensor:
    """(size,) uint8 on the CPU, in large pages where the system gives them: reading is faster."""
    out = torch.empty(size, dtype=torch.uint8, device="cpu")  # also while models are on meta
    if lib is not None:
        lib.ask_for_large_pages(out)
    return out


def give_back() -> None:
    """Return memory that was freed to the system, where the C library keeps it (glibc)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def to_lanes(
    packed: Tensor,
    cols: int,
    group_size: int,
    form: str,
    threads: int = THREADS,
    out: Tensor | None = None,
) -> Tensor:
    """The run-time layout of stored bytes.

    packed  (rows, packed_width) uint8, as in base3.unpack
    out     where it is to be, if not in memory of its own

    Returns (bytes,) uint8, of the size that `lanes_shape` says. Raises FormatError as base3.unpack
    does: every byte is checked. The compiled core raises ValueError for groups of more than
    LONGEST_SUM columns.
    """
    rows, quads = packed.shape[0], _quads(cols, group_size)
    size, blocks, block = lanes_shape(form, rows, cols, group_size)
    if lib is not None and packed.device.type == "cpu":
        out = memory(size) if out is None else out
        bad = lib.to_lanes(packed.contiguous(), form, cols, group_size, out, threads)
        if bad >= 0:
            raise base3._bad_byte(packed, bad)
        return out
    trits = _in_quads(base3.unpack(packed, cols, group_size), group_size)
    trits = torch.nn.functional.pad(trits, (0, 0, 0, blocks * block - rows))
    digits = trits.view(blocks, _FIELDS[form], 16, quads, 4).to(torch.int16) + 1
    powers = torch.tensor(_POWERS[form], dtype=torch.int16, device=packed.device)
    codes = (digits * powers.view(-1, 1, 1, 1)).sum(1)  # blocks, lane, quad, column
    return codes.permute(0, 2, 1, 3).to(torch.uint8).flatten().contiguous()


def from_lanes(
    lanes: Tensor, rows: int, cols: int, group_size: int, form: str, threads: int = THREADS
) -> Tensor:
    """The stored bytes of a run-time layout; the inverse of `to_lanes`.

    Returns (rows, packed_width) uint8. Raises FormatError on a byte that holds no digits.
    """
    if lib is not None and lanes.device.type == "cpu":
        width = base3.packed_width(cols, group_size)
        out = torch.empty((rows, width), dtype=torch.uint8)
        if lib.from_lanes(lanes.contiguous(), form, cols, group_size, out, threads) >= 0:
            raise _no_digits(form)
        return out
    return base3.pack(trits_of_lanes(lanes, rows, cols, group_size, form), group_size)


def trits_of_lanes(lanes: Tensor, rows: int, cols: int, group_size: int, form: str) -> Tensor:
    """The trits (rows, cols) int8 of a run-time layout, in torch; raises as `from_lanes` does."""
    (size, blocks, block), quads = (
        lanes_shape(form, rows, cols, group_size),
        _quads(cols, group_size),
    )
    if lanes.dtype != torch.uint8 or lanes.shape != (size,):
        raise FormatError(
            "lanes",
            f"{tuple(lanes.shape)} {lanes.dtype}",
            f"({size},) torch.uint8 for {rows} x {cols} weights in groups of {group_size}",
        )
    left = lanes.view(blocks, quads, 16, 4).to(torch.int16)
    found = []
    for power in reversed(_POWERS[form]):
        found.append(left // power)
        left = left % power
    digits = torch.stack(found[::-1], 1)
    if bool((digits > 2).any()):
        raise _no_digits(form)
    # blocks, field, quad, lane, column -> rows, padded columns
    trits = (digits - 1).permute(0, 1, 3, 2, 4).reshape(blocks * block, quads * 4)[:rows]
    length = group_length(cols, group_size)
    padded = split_groups(trits, -(-length // 4) * 4 if group_size > 0 else -1)
    return padded[..., :length].flatten(-2)[:, :cols].to(torch.int8).contiguous()


def _no_digits(form: str) -> FormatError:
    return FormatError(
        "lanes",
        f"a byte is not one of {form}",
        remedy="The memory was overwritten: load the model again",
    )


def _in_quads(values: Tensor, group_size: int) -> Tensor:
    """(..., cols) -> (..., 4 quads): each group padded with zeros to whole quads."""
    cols = values.shape[-1]
    groups = split_groups(values, group_size)
    groups = torch.nn.functional.pad(groups, (0, -groups.shape[-1] % 4))
    return groups.flatten(-2)[..., : 4 * _quads(cols, group_size)].contiguous()


def scale_lanes(scales: Tensor, rows: int, form: str) -> Tensor:
    """Scales in the order of a run-time layout: block, group, row of the block.

    scales  (scale_rows, groups) float, or uint8 as scales.scale_codes makes them; scale_rows
            divides rows

    Returns (blocks * groups * block,) float16 if the scales are that or codes (which it holds
    exactly), else float32. Rows beyond the last have the scale 0.
    """
    dtype = torch.float16 if scales.dtype in (torch.uint8, torch.float16) else torch.float32
    values = scale_values(scales).to(dtype)
    if scales.shape[0] != rows:
        values = values.repeat_interleave(rows // max(1, scales.shape[0]), dim=0)
    block, groups = 16 * _FIELDS[form], scales.shape[1]
    values = torch.nn.functional.pad(values, (0, 0, 0, -rows % block))
    return values.view(-1, block, groups).permute(0, 2, 1).reshape(-1).contiguous()


def lane_scales(scales: Tensor, rows: int, scale_rows: int, groups: int, form: str) -> Tensor:
    """The inverse of `scale_lanes`: (scale_rows, groups) of the same dtype."""
    block = 16 * _FIELDS[form]
    values = scales.view(-1, groups, block).permute(0, 2, 1).reshape(-1, groups)[:rows]
    return values[:: max(1, rows // max(1, scale_rows))].contiguous()


def product_of_lanes(
    x: Tensor,
    lanes: Tensor,
    scales: Tensor,
    rows: int,
    group_size: int,
    form: str,
    activations: str,
    threads: int = THREADS,
) -> Tensor:
    """y = x W^T from a run-time layout.

    x            (..., cols) float32, bfloat16 or float16
    lanes        of `to_lanes`; scales of `scale_lanes`
    activations  "int8" or "none", as in `quantize`

    Returns (..., rows) in x's dtype: what `product_of_trits` gives, bit for bit. The compiled core
    raises ValueError for groups of more than LONGEST_SUM columns.
    """
    return products_of_lanes(x, [(lanes, scales, rows)], group_size, form, activations, threads)[0]


def products_of_lanes(
    x: Tensor,
    matrices: Sequence[tuple[Tensor, Tensor, int]],
    group_size: int,
    form: str,
    activations: str,
    threads: int = THREADS,
) -> list[Tensor]:
    """`product_of_lanes` of several matrices, (lanes, scales, rows) of each, and the same inputs.

    The inputs are rounded once, and the threads share the rows of all. Raises as that does.
    """
    cols = x.shape[-1]
    flat = x.reshape(-1, cols)
    if lib is None or x.device.type != "cpu":
        groups = group_count(cols, group_size)
        found = []
        for lanes, scales, rows in matrices:
            trits = trits_of_lanes(lanes, rows, cols, group_size, form)
            plain = lane_scales(scales, rows, rows, groups, form)
            y = product_of_trits(flat, trits, plain, group_size, activations)
            found.append(y.view(*x.shape[:-1], rows))
        return found
    flat = flat.contiguous()
    outs = [torch.empty((*x.shape[:-1], rows), dtype=x.dtype) for _, _, rows in matrices]
    prepared_lanes(flat, matrices, outs, group_size, form, activations, threads)()
    return outs


def prepared_lanes(
    x: Tensor,
    matrices: Sequence[tuple[Tensor, Tensor, int]],
    outs: Sequence[Tensor],
    group_size: int,
    form: str,
    activations: str,
    threads: int,
) -> Callable[[], None]:
    """A call of the compiled core that sets outs, (..., rows) of x's dtype, to `products_of_lanes`.

    It knows the memory only: whoever calls it keeps the tensors. They are dense.
    """
    assert lib is not None
    cols = x.shape[-1]
    tokens, addresses = x.numel() // cols if cols else 0, []
    # what the core cannot see
    right = activations in ("int8", "none") and x.is_contiguous()
    for (lanes, scales, rows), out in zip(matrices, outs, strict=True):
        half = scales.dtype == torch.float16
        right = (
            right
            and (lanes.dtype == torch.uint8 and lanes.is_contiguous())
            and ((half or scales.dtype == torch.float32) and scales.is_contiguous())
            and (out.numel() == tokens * rows and out.dtype == x.dtype and out.is_contiguous())
        )
        at = lanes.data_ptr(), lanes.numel(), scales.data_ptr(), scales.numel()
        addresses.append((*at, half, out.data_ptr(), rows))
    if not right:
        raise ValueError(
            "product: expected dense x, out of its dtype, lanes in uint8, scales in float16 or "
            "float32, and activations int8 or none."
        )
    given = x.data_ptr(), DTYPE_NAMES[x.dtype], tokens, cols, addresses
    return partial(lib.products, *given, form, group_size, activations == "int8", threads)


def product_of_int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    group_size: int,
    activations: str,
    threads: int = THREADS,
) -> Tensor:
    """y = x W^T from int8 weights and their scales, as they are stored.

    x            (..., cols) float32, bfloat16 or float16
    weight       (rows, cols) int8; -128 is a number as any other
    scales       (scale_rows, groups) float32, bfloat16 or float16; scale_rows divides rows
    group_size   as in ternarize.trits.ternary
    activations  "int8" or "none", as in `quantize`

    Returns (..., rows) in x's dtype: what `product_of_trits` gives with these weights, bit for bit.
    The compiled core raises ValueError for groups of more than LONGEST_SUM columns.
    """
    rows, cols = weight.shape[0], x.shape[-1]
    flat = x.reshape(-1, cols)
    if lib is None or x.device.type != "cpu":
        y = product_of_trits(flat, weight, scales, group_size, activations)
        return y.view(*x.shape[:-1], rows)
    assert weight.dtype == torch.int8
    by_core = partial(lib.int8_product, threads=threads)
    return _stored_product(by_core, x, weight, scales, group_size, activations)


def product_of_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    group_size: int,
    activations: str,
    threads: int = THREADS,
) -> Tensor:
    """y = x W^T from int4 weights and their scales, as they are stored.

    packed  (rows, width) uint8, as of `pack_int4`; any byte is two numbers

    The other arguments, and the result, as of `product_of_int8` with the numbers in `packed`, bit
    for bit. They are taken out a few rows at a time.
    """
    rows, cols = packed.shape[0], x.shape[-1]
    flat = x.reshape(-1, cols)
    if lib is None or x.device.type != "cpu":
        by_row = scales.repeat_interleave(rows // max(1, scales.shape[0]), 0)
        step = max(1, _PART // cols)
        parts = [
            product_of_trits(flat, unpack_int4(some, cols, group_size), by, group_size, activations)
            for some, by in zip(torch.split(packed, step), torch.split(by_row, step), strict=True)
        ]
        return torch.cat(parts, -1).view(*x.shape[:-1], rows)
    assert packed.dtype == torch.uint8
    by_core = partial(lib.int4_product, threads=threads)
    return _stored_product(by_core, x, packed, scales, group_size, activations)


def _stored_product(
    by_core: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    group_size: int,
    activations: str,
) -> Tensor:
    """The product by a function of the core that takes int8 or int4 weights as they are stored."""
    rows, cols = weight.shape[0], x.shape[-1]
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    flat = x.reshape(-1, cols).contiguous()
    # what the core cannot see
    assert weight.is_contiguous() and scales.is_contiguous() and activations in ("int8", "none")
    given = flat.data_ptr(), DTYPE_NAMES[x.dtype], flat.shape[0], cols
    matrix = weight.data_ptr(), weight.numel(), scales.data_ptr(), scales.shape[0], scales.numel()
    form = DTYPE_NAMES[scales.dtype], group_size, activations == "int8"
    by_core(*given, *matrix, *form, out.data_ptr(), rows)
    return out


def product_of_trits(
    x: Tensor, trits: Tensor, scales: Tensor, group_size: int, activations: str
) -> Tensor:
    """The definition of `product_of_lanes`; with int8 weights as trits, of `product_of_int8`.

        s_p[group] = sum over the group's columns of trit * q_p            exact integers
        value      = float(s_0)   or   float(s_2) 65536 + (float(s_1) 256 + float(s_0))
        y          = (sum over the groups, in order, of value * scale) * factor

    in float32, each operation rounded, then rounded to x's dtype.

    x       (tokens, cols) float
    trits   (rows, cols) int8
    scales  (scale_rows, groups) float; scale_rows divides rows
    """
    rows, cols = trits.shape
    q, factor = quantize(x, activations)
    # float64 holds the sums exactly, whatever their order
    q_groups = split_groups(q.to(torch.float64), group_size)  # parts, tokens, groups, length
    groups = split_groups(trits.to(torch.float64), group_size)  # rows, groups, length
    wide = scales.to(torch.float32).repeat_interleave(rows // max(1, scales.shape[0]), dim=0)
    y = x.new_zeros((x.shape[0], rows), dtype=torch.float32)
    for g in range(group_count(cols, group_size)):
        s = (q_groups[..., g, :] @ groups[:, g].T).to(torch.float32)
        value = s[0] if len(s) == 1 else s[2] * 65536 + (s[1] * 256 + s[0])
        y = y + value * wide[:, g]
    return (y * factor).to(x.dtype)


def quantize(x: Tensor, activations: str) -> tuple[Tensor, Tensor]:
    """Inputs as integers with a factor for each token.

    "int8", for models trained so: 8 bits, as products.rounded_linear rounds (BitNet b1.58, sect. 2)

        q_0 = round(127 x / absmax)                     factor = absmax / 127

    "none": 24 bits with a fixed point, in three digits of 8 bits with a sign

        q_2 65536 + q_1 256 + q_0 = round(x 2^k)        factor = 2^-k

    with the largest k <= 126 that keeps |x 2^k| <= DIGITS_LIMIT. So each x is off by at most
    absmax / 2^22, half a unit in the last place of the largest x (or one unit): no more than a
    float32 sum that passes through values of the size of absmax. A bfloat16 or float16 x is exact
    unless it is 2^13 (2^10) times smaller than absmax.

    x  (tokens, cols) float; rounding is to nearest even; absmax is max |x| of the token

    Returns q (parts, tokens, cols) int8 and factor (tokens, 1) float32. Of a token where 127 absmax
    is not finite q is 0 and the factor NaN.
    """
    wide = x.to(torch.float32)
    absmax = wide.abs().amax(-1, keepdim=True)
    finite = (absmax * 127).isfinite()
    wide = torch.where(finite, wide, 0)
    if activations == "int8":
        q = (wide * 127 / torch.where(finite & (absmax != 0), absmax, 1)).round()
        factor = torch.where(finite, absmax / 127, torch.nan)
        return q.to(torch.int8).unsqueeze(0), factor
    exponent = torch.frexp(torch.where(finite, absmax, 1)).exponent - 1
    power = torch.ldexp(torch.ones_like(absmax), (22 - exponent).clamp(max=126))
    power = torch.where(absmax * power > DIGITS_LIMIT, power / 2, power)
    left = (wide * power).round().to(torch.int32)
    digits = []
    for _ in range(3):
        digits.append((left + 128) % 256 - 128)  # % of torch is not negative
        left = (left - digits[-1]) // 256
    return torch.stack(digits).to(torch.int8), torch.where(finite, 1 / power, torch.nan)
