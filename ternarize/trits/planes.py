"""A weight as the sum of one or two ternary matrices (planes), and how far that is from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ternarize.native import lib
from ternarize.threads import THREADS
from ternarize.trits.base3 import pack, packed_width
from ternarize.trits.methods import METHODS
from ternarize.trits.methods.grouped import distance, fixed_sum, native_bits
from ternarize.trits.scales import scale_codes, scale_values, to_float
from ternarize.trits.ternary import NATIVE_DTYPES, Ternary, group_count, split_groups

Method = Callable[[Tensor, int], Ternary]


@dataclass(frozen=True)
class Fit:
    """The stored bytes of planes, their scales in float64, and how they fit a weight.

    sum (w - w')^2, sum w^2, and how many trits are other than zero.
    """

    packed: Tensor
    scales: Tensor
    squared_error: float
    energy: float
    nonzero: int


def fit_packed(weight: Tensor, group_size: int, name: str) -> Fit:
    """One plane by the method of that name: what `fit_planes` makes of it.

    weight  (rows, cols) float

    The compiled core does it in one pass over each group, on one thread: a conversion works on
    several tensors at once. Raises WeightError on NaN or infinity.
    """
    native = getattr(lib, f"{name}_packed", None)  # a method need not have a compiled twin
    usable = weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES and group_size != 0
    if native is not None and usable and weight.numel():
        rows, cols = weight.shape
        packed = torch.empty(rows, packed_width(cols, group_size), dtype=torch.uint8)
        scales = torch.empty(rows, group_count(cols, group_size), dtype=torch.float64)
        kind, bits = NATIVE_DTYPES[weight.dtype], native_bits(weight.detach())
        bad, *figures = native(bits, kind, group_size, packed, scales, 1)
        if bad < 0:
            return Fit(packed, scales, *figures)
    return fit_planes(weight, group_size, METHODS[name])  # which says what is not finite


def _packed(planes: Sequence[Ternary], *figures: Any) -> Fit:
    scales = join_planes([plane.scales.cpu() for plane in planes])
    return Fit(pack_planes(*planes, threads=1), scales, *figures)


def fit_planes(
    weight: Tensor,
    group_size: int,
    method: Method,
    count: int = 1,
    scale_dtype: torch.dtype = torch.float16,
    exact: Ternary | None = None,
    scale_bits: int = 8,
) -> Fit:
    """`count` planes, each by the method on what those before it leave of the weight.

    weight       (rows, cols) float
    scale_dtype  in which scales will be stored; uint8: codes, of `scale_bits`
    exact        the weight itself, if it is ternary: the first plane is then all of it
    """
    planes, rest = [_representable(exact or method(weight, group_size))], weight
    while len(planes) < count:
        left = None if exact else _remainder(rest, planes[-1], scale_dtype, scale_bits)
        rest = torch.zeros_like(weight) if left is None else left
        planes.append(_representable(method(rest, group_size)))
    error, energy, nonzero = distance(weight, planes[0])
    if count > 1:
        error, nonzero = distance(rest, planes[-1])[0], _nonzero(planes)
    return _packed(planes, error, energy, nonzero)


def _representable(ternary: Ternary) -> Ternary:
    """Zero the trits of groups whose scale is too small for float32, the widest stored dtype."""
    lost = (ternary.scales.to(torch.float32) == 0) & (ternary.scales != 0)
    if not bool(lost.any()):
        return ternary
    scales = ternary.scales.masked_fill(lost, 0)
    trits = Ternary(ternary.trits, scales, ternary.group_size).dequantize(torch.float64).sign()
    return Ternary(trits.to(torch.int8), scales, ternary.group_size)


def _remainder(weight: Tensor, plane: Ternary, dtype: torch.dtype, bits: int) -> Tensor:
    """weight - scale * trit in float32, with the scale as it will be stored."""
    coded = dtype == torch.uint8
    stored = scale_codes(plane.scales, bits) if coded else to_float(plane.scales, dtype)
    scales = scale_values(stored, torch.float64)
    # one that does not fit is found when all are stored, and everything is done again
    scales = torch.where(scales.isfinite(), scales, plane.scales)
    return weight.to(torch.float32) - replace(plane, scales=scales).dequantize()


def measured(weight: Tensor, planes: Sequence[Ternary]) -> Fit:
    """Planes that were made elsewhere, in which trits may have another sign than their weight."""
    dense = planes[0].dequantize(torch.float64)
    for plane in planes[1:]:
        dense = dense + plane.dequantize(torch.float64)
    return _packed(planes, *squared_error(weight, dense, planes[0].group_size), _nonzero(planes))


def squared_error(weight: Tensor, dense: Tensor, group_size: int) -> tuple[float, float]:
    """sum (w - w')^2 and sum w^2 in float64, in the same order on every machine.

    weight  (rows, cols), what it was
    dense   float64, what it became; its memory is used, so that a piece takes no more
    """
    missed = dense.sub_(weight)
    error = _sum(missed.mul_(missed), group_size)
    return error, _sum(weight.to(torch.float64).square(), group_size)


def _sum(squares: Tensor, group_size: int) -> float:
    return float(fixed_sum(fixed_sum(split_groups(squares, group_size).flatten(-2))))


def _nonzero(planes: Sequence[Ternary]) -> int:
    return sum(int(plane.trits.count_nonzero()) for plane in planes)


def pack_planes(*planes: Ternary, threads: int = THREADS) -> Tensor:
    """The stored bytes of the trits alone."""
    group_size = planes[0].group_size
    return join_planes([pack(plane.trits, group_size, threads) for plane in planes])


def join_planes(parts: Sequence[Tensor]) -> Tensor:
    """Rows of packed bytes or of scales, those of the planes one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def split_planes(stored: Tensor, planes: int) -> tuple[Tensor, ...]:
    """The inverse of `join_planes`."""
    return stored.chunk(planes, -1) if planes > 1 else (stored,)
