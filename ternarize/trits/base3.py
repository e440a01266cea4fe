"""The codec base3: trits <-> bytes, five trits a byte.

    digit = trit + 1,  byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4   (0..242),  first trit first

Each group of a row is padded with zero trits (digit 1) to whole bytes, so that a reader can cut
rows and groups without decoding. The layout is defined in formats/base3.md; here are its shipped
encoder and decoder, once in torch for any device and once (through `native.lib`) in C++ for CPU.
Both give the same bytes. 1.6 bits per weight where the group's length is a multiple of five.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ternarize.errors import FormatError, damaged
from ternarize.native import lib
from ternarize.threads import THREADS
from ternarize.trits.scales import scale_values
from ternarize.trits.ternary import NATIVE_DTYPES, group_count, group_length, scaled, split_groups

BASE3 = "base3"  # name of the codec
DIGITS = 5  # trits in a byte: 3**5 = 243 <= 256
POWERS = (1, 3, 9, 27, 81)
ZERO_BYTE = sum(POWERS)  # 121: five zero trits
LARGEST_CODE = 2 * ZERO_BYTE  # 242: five trits +1


# _TRITS[byte] = its five trits; codes above 242 decode as zeros here and are refused in `unpack`
_TRITS = torch.tensor(
    [[(b // p) % 3 - 1 if b <= LARGEST_CODE else 0 for p in POWERS] for b in range(256)],
    dtype=torch.int8,
)


def packed_width(cols: int, group_size: int) -> int:
    """Bytes of one packed row: the sum over its groups of ceil(length / 5)."""
    length, groups = group_length(cols, group_size), group_count(cols, group_size)
    last = cols - (groups - 1) * length if groups else 0
    return (groups - 1) * -(-length // DIGITS) + -(-last // DIGITS) if groups else 0


def pack(trits: Tensor, group_size: int, threads: int = THREADS) -> Tensor:
    """Pack trits into bytes.

    trits       (..., cols) int8, values -1, 0, +1
    group_size  as in `Ternary`
    threads     used by the native encoder; the bytes do not depend on it

    Returns (..., packed_width(cols, group_size)) uint8 on the same device.
    """
    cols, width = trits.shape[-1], packed_width(trits.shape[-1], group_size)
    if lib is not None and trits.device.type == "cpu":
        out = torch.empty((*trits.shape[:-1], width), dtype=torch.uint8)
        if out.numel():
            flat = trits.reshape(-1, cols).contiguous()
            bad = lib.pack(flat, group_size, out.view(-1, width), threads)
            assert bad < 0, f"element {bad} is no trit"
        return out
    groups = split_groups(trits, group_size)
    groups = torch.nn.functional.pad(groups, (0, -groups.shape[-1] % DIGITS))
    digits = torch.unflatten(groups, -1, (-1, DIGITS)).to(torch.int16) + 1
    powers = torch.tensor(POWERS, dtype=torch.int16, device=trits.device)
    # every group was padded as if it were full: cut the surplus bytes of the last one
    return (digits * powers).sum(-1).to(torch.uint8).flatten(-2)[..., :width].contiguous()


def unpack(packed: Tensor, cols: int, group_size: int, threads: int = THREADS) -> Tensor:
    """Unpack bytes into trits; the inverse of `pack`.

    packed  (..., packed_width(cols, group_size)) uint8

    Returns (..., cols) int8. Raises FormatError on a byte that is no code (243..255) and on
    padding other than zero trits: a tensor has exactly one byte form.
    """
    _check_width(packed, cols, group_size)
    if lib is not None and packed.device.type == "cpu":
        out = torch.empty((*packed.shape[:-1], cols), dtype=torch.int8)
        return _filled(lib.unpack, packed, cols, group_size, out, threads)
    trits, padding_is_zero = _decode(packed, cols, group_size)
    bad_bytes = (packed > LARGEST_CODE) | ~padding_is_zero
    if bool(bad_bytes.any()):
        raise _bad_byte(packed, int(bad_bytes.flatten().nonzero()[0]))
    return trits


def used_groups(packed: Tensor, cols: int, group_size: int, threads: int = THREADS) -> Tensor:
    """Check every byte as `unpack` does, without keeping the trits.

    Returns (..., groups) bool: whether a group has a trit other than zero.
    Raises FormatError as `unpack` does.
    """
    _check_width(packed, cols, group_size)
    if lib is not None and packed.device.type == "cpu":
        used = torch.zeros((*packed.shape[:-1], group_count(cols, group_size)), dtype=torch.uint8)
        return _filled(lib.check, packed, cols, group_size, used, threads).bool()
    return split_groups(unpack(packed, cols, group_size), group_size).ne(0).any(-1)


def _filled(
    native: Callable[..., int],
    packed: Tensor,
    cols: int,
    group_size: int,
    out: Tensor,
    threads: int,
) -> Tensor:
    """`out`, whose rows a native function fills; FormatError where it meets a bad byte."""
    if packed.numel():
        flat = packed.reshape(-1, packed.shape[-1]).contiguous()
        bad = native(flat, cols, group_size, out.view(-1, out.shape[-1]), threads)
        if bad >= 0:
            raise _bad_byte(flat, bad)
    return out


def dequantize_base3(
    packed: Tensor,
    scales: Tensor,
    cols: int,
    group_size: int,
    dtype: torch.dtype,
    threads: int = THREADS,
    *,
    planes: int = 1,
) -> Tensor:
    """Dense weight = scale * trit, computed in float32 and rounded once to `dtype`.

    packed  (rows, planes * packed_width) uint8, not checked (`used_groups` does that, once, at
            load)
    scales  (scale_rows, planes * groups) float, or uint8 as `scale_codes` makes them; scale_rows as
            in `scaled`
    dtype   float32, bfloat16 or float16
    planes  ternary matrices whose sum is the weight: added in float32, the first two, then the
            third, and so on, each sum rounded to nearest even

    Returns (rows, cols). The native and the torch path give the same bits.
    """
    rows = packed.shape[0]
    if planes > 1:
        scales = scales.repeat_interleave(rows // max(1, scales.shape[0]), dim=0)
        # a row's planes lie one behind the other: they are rows of a matrix that is as many times
        # as tall
        tall = (packed.reshape(rows * planes, -1), scales.reshape(rows * planes, -1))
        parts = dequantize_base3(*tall, cols, group_size, torch.float32, threads)
        parts = parts.view(rows, planes, cols)
        dense = parts[:, 0]
        for plane in range(1, planes):
            dense = dense + parts[:, plane]
        return dense.to(dtype)
    scales = scale_values(scales)
    native = lib is not None and packed.device.type == "cpu" and dtype in NATIVE_DTYPES
    if native and packed.numel() and not torch.compiler.is_compiling():
        assert lib is not None
        out = torch.empty((rows, cols), dtype=dtype)
        bits = out if dtype == torch.float32 else out.view(torch.uint16)
        lib.dequantize(
            packed.contiguous(),
            scales.contiguous(),
            cols,
            group_size,
            bits,
            NATIVE_DTYPES[dtype],
            threads,
        )
        return out
    trits, _ = _decode(packed, cols, group_size)
    return scaled(trits, scales, group_size).to(dtype)


def _decode(packed: Tensor, cols: int, group_size: int) -> tuple[Tensor, Tensor]:
    """All trits (..., cols), and per byte (..., width) whether its padding is zero trits."""
    length, groups = group_length(cols, group_size), group_count(cols, group_size)
    stride = -(-length // DIGITS)
    surplus = groups * stride - packed.shape[-1]
    full = torch.nn.functional.pad(packed, (0, surplus), value=ZERO_BYTE)
    trits = _TRITS.to(packed.device)[full.int()].flatten(-2)  # (..., groups * stride * 5)
    trits = torch.unflatten(trits, -1, (groups, stride * DIGITS))
    values = trits[..., :length].flatten(-2)
    padding = trits.flatten(-2).clone()
    column = torch.arange(groups * stride * DIGITS, device=packed.device)
    inside = column % (stride * DIGITS)
    weight = column // (stride * DIGITS) * length + inside
    padding[..., (inside < length) & (weight < cols)] = 0
    clean = torch.unflatten(padding, -1, (groups * stride, DIGITS)).eq(0).all(-1)
    return values[..., :cols].contiguous(), clean[..., : packed.shape[-1]]


def _check_width(packed: Tensor, cols: int, group_size: int) -> None:
    width = packed_width(cols, group_size)
    if packed.dtype != torch.uint8 or packed.shape[-1] != width:
        raise damaged(
            "packed rows",
            f"{packed.shape[-1]} elements of {packed.dtype}",
            f"{width} bytes for {cols} columns in groups of {group_size}",
        )


def _bad_byte(packed: Tensor, offset: int) -> FormatError:
    value = int(packed.flatten()[offset])
    if value > LARGEST_CODE:
        return damaged(f"byte {offset}", f"{value} is not a base-3 code", f"0..{LARGEST_CODE}")
    return damaged(f"byte {offset}", f"{value} has padding other than zero trits", "zeros alone")
