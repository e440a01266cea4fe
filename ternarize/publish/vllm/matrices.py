"""What one process of an engine has of a model's packed matrices.

An engine fuses layers that share their input (q, k and v, say), and cuts layers between processes:
between rows, or between columns, where a cut must leave whole groups and, of rotated matrices,
whole blocks of the rotation. Rows of packed bytes are rows of the matrix, and each group has bytes
of its own, so that either cut is one between bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ternarize.errors import UsageError
from ternarize.runtime import kernels
from ternarize.runtime.forms import Layout, fits_lanes, lanes_form, lanes_size
from ternarize.runtime.products import product
from ternarize.trits.rotation import rotation_from


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, cols) in one process.

    packed  as in `products.product`; without a layout the dense weight itself
    scale   as there; None of a dense one
    layout  None of a dense one
    rows    of the matrix
    """

    packed: Tensor
    scale: Tensor | None
    layout: Layout | None
    rows: int


def layout_of_columns(where: str, layout: Layout, part: int, parts: int) -> Layout:
    """The layout of one of the parts into which the columns of a matrix are cut.

    where  the layer, for messages

    Raises UsageError where a part is no whole groups, or no whole blocks of the rotation, or where
    its inputs are rounded together with those of other parts.
    """
    if parts == 1:
        return layout
    cols, block = layout.cols, layout.rotation[0]
    cut = f"{cols} columns cannot be cut for {parts} processes of tensor parallelism"
    if layout.activations == "int8":
        raise UsageError(
            where, f"{cut}: activations in int8 are rounded by the largest of all", "1 process"
        )
    size, remainder = divmod(cols, parts)
    if remainder or layout.group_size <= 0 or size % layout.group_size:
        found = f"{cut} with group_size {layout.group_size}"
        raise UsageError(where, found, "whole groups in each", _allowed(cols, parts))
    if block and size % block:
        found = f"{cut} with a rotation in blocks of {block}"
        raise UsageError(where, found, "whole blocks in each", "Use fewer processes")
    rotation = rotation_from(layout.rotation, part * size)
    return replace(layout, cols=size, rotation=rotation)


def _allowed(cols: int, parts: int) -> str:
    """Which group sizes allow a cut, as a remedy."""
    size = cols // parts
    largest = size & -size if cols % parts == 0 else 0  # the largest power of two that divides it
    fewer = "Use fewer processes"
    return f"{fewer}, or convert with --group-size {min(largest, 128)}" if largest > 3 else fewer


def columns_of(tensor: Tensor, planes: int, part: int, parts: int) -> Tensor:
    """A part of the columns of packed rows, or of their scales: (rows, planes * n / parts).

    tensor  (rows, planes * n), plane behind plane
    """
    if parts == 1:
        return tensor
    return torch.unflatten(tensor, -1, (planes, parts, -1))[..., part, :].flatten(-2)


def joined(matrices: Sequence[Matrix]) -> list[Matrix]:
    """The same rows in fewer matrices: neighbours of one layout, in the stored form, put together.

    Those that differ (in group size, planes, rotation, codec or the type of scales) stay apart.
    """
    found: list[Matrix] = []
    for each in matrices:
        last = found[-1] if found else None
        if last is None or _kind(last) != _kind(each):
            found.append(each)
            continue
        scale = None
        if last.scale is not None and each.scale is not None:
            scale = torch.cat([_scale_rows(last), _scale_rows(each)])
        packed = torch.cat([last.packed, each.packed])
        found[-1] = Matrix(packed, scale, each.layout, last.rows + each.rows)
    return found


def _kind(matrix: Matrix) -> tuple[Any, ...]:
    scale = matrix.scale
    return matrix.layout, matrix.packed.dtype, None if scale is None else scale.dtype


def _scale_rows(matrix: Matrix) -> Tensor:
    """A row of scales for each row, also where one scale is that of the whole matrix."""
    assert matrix.scale is not None
    return matrix.scale.expand(matrix.rows, -1)


def for_products(matrix: Matrix) -> Matrix:
    """The same matrix in the form that is multiplied fastest: lanes, where the core takes them.

    Raises FormatError when a byte is no code.
    """
    layout, scale = matrix.layout, matrix.scale
    if layout is None or scale is None:
        return matrix
    packed, scale = matrix.packed.contiguous(), scale.contiguous()
    if fits_lanes(packed, scale, layout):
        memory = kernels.memory(lanes_size(packed, layout))
        packed, scale, layout = lanes_form(packed, scale, layout, memory)
    return Matrix(packed, scale, layout, matrix.rows)


def multiplied(x: Tensor, matrices: Sequence[Matrix], bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b of matrices that lie one below the other: (..., rows of all) in x's dtype.

    x     (..., cols) float
    bias  (rows of all,) or None
    """
    found, row = [], 0
    for each in matrices:
        mine = None if bias is None else bias[row : row + each.rows]
        found.append(_one(x, each, mine))
        row += each.rows
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _one(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    if matrix.layout is None or matrix.scale is None:
        return F.linear(x, matrix.packed.to(x.dtype), bias)
    return product(x, matrix.packed, matrix.scale, bias, matrix.layout)
