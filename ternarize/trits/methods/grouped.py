"""What the methods share: sums that do not depend on the machine, and the way in and out.

A packed file must depend on the source and the recipe alone, so a sum must give the same bits on
every CPU, device, thread count and library version. `fixed_sum` therefore fixes the order of its
additions: blocks of 128, in each block halves are added to halves (64, 32, ... 1), then the same
over the block sums. Elementwise additions in float64 are the same everywhere (IEEE 754), and the
order suits both SIMD and torch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ternarize.errors import WeightError
from ternarize.native import lib
from ternarize.trits.ternary import (
    NATIVE_DTYPES,
    Ternary,
    check_group_size,
    group_count,
    group_length,
    split_groups,
)

_BLOCK = 128


# magnitudes (groups, length) float64, and per group the number of weights -> scales, mask
GroupRule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sum_blocks(values: Tensor) -> Tensor:
    """Sums of the blocks of 128 along the last dimension, in the dtype of `values`."""
    size = values.shape[-1]
    values = torch.nn.functional.pad(values, (0, -size % _BLOCK if size else _BLOCK))
    values = torch.unflatten(values, -1, (-1, _BLOCK))
    half = _BLOCK // 2
    while half:
        values = values[..., :half] + values[..., half : 2 * half]
        half //= 2
    return values.squeeze(-1)


def fixed_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension in float64, always in the same order (module docstring)."""
    values = sum_blocks(values.to(torch.float64))
    while values.shape[-1] > 1:
        values = sum_blocks(values)
    return values.squeeze(-1)


def group_sum(values: Tensor) -> Tensor:
    """Sum of each group: (..., length) -> (...), or (matrices, rows, cols) -> (matrices,).

    The two levels of a whole matrix are part of the definition: rows first, then the row sums.
    """
    return fixed_sum(fixed_sum(values)) if values.dim() == 3 else fixed_sum(values)


def above(magnitude: Tensor, threshold: Tensor) -> Tensor:
    """Which magnitudes are above the threshold (groups,) of their group."""
    return magnitude > threshold.reshape(-1, *[1] * (magnitude.dim() - 1))


def ternarize_groups(name: str, rule: GroupRule, weight: Tensor, group_size: int) -> Ternary:
    """Apply a method's rule to every group of `weight`: natively where it can be, else in torch.

    name    the method's function in the native module
    rule    its definition in torch: magnitudes of groups and their sizes -> scale, mask
    weight  (rows, cols) or (experts, rows, cols), float16, bfloat16, float32 or float64

    Raises WeightError on NaN or infinity, with the number of such weights and the first index.
    """
    check_group_size(group_size)
    weight = weight.detach()
    native = getattr(lib, name, None)  # a method need not have a compiled twin
    if native is not None and weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES:
        result, answers = run_native(native, weight, group_size)
        if any(answer >= 0 for answer in answers):
            raise _not_all_finite(weight)
        return result
    finite = weight.isfinite()
    if not bool(finite.all()):
        raise _not_all_finite(weight)
    magnitude = weight.abs().to(torch.float64)
    if group_size == 0:
        rows, cols = weight.shape[-2:]
        groups = magnitude.reshape(math.prod(weight.shape[:-2]), rows, cols)
        size = torch.full((groups.shape[0],), rows * cols, device=weight.device)
        scales, mask = rule(groups, size)
        mask = mask.reshape(weight.shape)
        scales = scales.reshape(*weight.shape[:-2], 1, 1)
    else:
        cols = weight.shape[-1]
        groups = split_groups(magnitude, group_size)
        scales, mask = rule(groups.flatten(0, -2), _sizes(weight, group_size))
        scales = scales.reshape(groups.shape[:-1])
        mask = mask.reshape(groups.shape).flatten(-2)[..., :cols]
    # sign() of -0.0 and of masked weights is 0 either way
    return Ternary((weight.sign() * mask).to(torch.int8), scales, group_size)


def _sizes(weight: Tensor, group_size: int) -> Tensor:
    """Number of weights of each group (the last one of a row may be shorter), flattened."""
    cols = weight.shape[-1]
    length, count = group_length(cols, group_size), group_count(cols, group_size)
    sizes = torch.full((count,), length, device=weight.device)
    if count:
        sizes[-1] = cols - (count - 1) * length
    return sizes.expand(*weight.shape[:-1], count).reshape(-1)


def run_native(
    function: Callable[..., int], weight: Tensor, group_size: int
) -> tuple[Ternary, list[int]]:
    """Call a native method on each matrix of `weight`; returns its answers beside the result."""
    rows, cols = weight.shape[-2:]
    grid = (1, 1) if group_size == 0 else (rows, group_count(cols, group_size))
    trits = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.zeros((*weight.shape[:-2], *grid), dtype=torch.float64)
    if weight.numel() == 0:
        return Ternary(trits, scales, group_size), []
    matrices = zip(
        native_bits(weight).view(-1, rows, cols),
        trits.view(-1, rows, cols),
        scales.view(-1, *grid),
        strict=True,
    )
    kind = NATIVE_DTYPES[weight.dtype]
    # one thread: a conversion works on several tensors at once
    answers = [function(w, kind, group_size, t, s, 1) for w, t, s in matrices]
    return Ternary(trits, scales, group_size), answers


def distance(weight: Tensor, ternary: Ternary) -> tuple[float, float, int]:
    """How far a ternary tensor is from the weights it was made of.

    Returns sum (w - scale trit)^2, sum w^2 (added in the same order on every machine: within each
    group, over the groups of a row, over the rows; in float32 within blocks of 128, since this is
    a figure for people), and the number of nonzero trits.
    """
    native = lib is not None and weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES
    if native and weight.dim() == 2:
        assert lib is not None
        measured: tuple[float, float, int] = lib.distance(
            native_bits(weight),
            NATIVE_DTYPES[weight.dtype],
            ternary.group_size,
            ternary.trits,
            ternary.scales,
            1,
        )
        return measured
    magnitude = split_groups(weight.abs().to(torch.float32), ternary.group_size)
    used = split_groups(ternary.trits != 0, ternary.group_size)
    missed = magnitude - used * ternary.scales.to(torch.float32).unsqueeze(-1)
    error, energy = (
        float(fixed_sum(fixed_sum(fixed_sum(sum_blocks(squares))).flatten()))
        for squares in (missed * missed, magnitude * magnitude)
    )
    return error, energy, int(ternary.trits.count_nonzero())


def native_bits(weight: Tensor) -> Tensor:
    """A dense weight as the native code takes it: float32, or the bits of 16-bit floats."""
    dense = weight.contiguous()
    return dense if dense.dtype == torch.float32 else dense.view(torch.uint16)


def _not_all_finite(weight: Tensor) -> WeightError:
    bad = ~weight.isfinite()
    first = bad.nonzero()[0].tolist()
    what = "NaN" if bool(weight[tuple(first)].isnan()) else "infinite"
    return WeightError(
        "weights",
        f"{int(bad.sum())} of {weight.numel()} are NaN or infinite, first ({what}) at {first}",
        "finite ones",
        "Repair the source",
    )
