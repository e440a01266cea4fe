"""The forms in which a packed parameter is held: what its bytes alone do not say, and the way back.

    stored  the bytes of the file: (rows, width) with scales (scale_rows, groups). Works on every
            device. On the CPU the compiled core multiplies int8 and int4 weights so.
    lanes   the run-time layout of kernels.py, a flat tensor, with scales in the same order. The
            compiled core multiplies ternary weights so, on the CPU. On a GPU tiles.py's.

`Layout.lanes` says which it is. Either becomes a dense matrix where a product needs one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.native import lib
from ternarize.plans.recipe import ACTIVATIONS
from ternarize.runtime import kernels
from ternarize.runtime.tiles import TILES, fits_tiles, from_tiles, to_tiles, trits_of_tiles
from ternarize.trits import base3, int4, int8
from ternarize.trits.base3 import BASE3
from ternarize.trits.int4 import INT4
from ternarize.trits.int8 import INT8
from ternarize.trits.rotation import unrotate
from ternarize.trits.scales import scale_codes, scale_values
from ternarize.trits.ternary import group_count, group_length, scaled

_PART = 1 << 22  # weights that are dense at a time


@dataclass(frozen=True)
class Lanes:
    """A run-time layout, and what it does not say about the stored form.

    form         "lanes2" or "lanes3", or "tiles" on a GPU
    rows         of the matrix
    scale_rows   rows of its stored scales
    scale_dtype  of its stored scales
    """

    form: str
    rows: int
    scale_rows: int
    scale_dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """How a packed parameter is to be read: what its bytes alone do not say.

    cols         weights in a row
    group_size   as in ternarize.trits.ternary
    transposed   the model's own weight is (cols, rows)
    activations  "none", or "int8" to round the input of each product
    codec        "base3", "int8" or "int4"
    planes       ternary matrices whose sum is the weight
    rotation     (block, seed): the matrix stands for W R, and meets R^T x; block 0: none
    kernel       of a convolution, whose weight is (rows, *kernel); () of others
    lanes        None where the parameter is held in its stored form
    """

    cols: int
    group_size: int
    transposed: bool = False
    activations: str = "none"
    codec: str = BASE3
    planes: int = 1
    rotation: tuple[int, int] = (0, 0)
    kernel: tuple[int, ...] = ()
    lanes: Lanes | None = None

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise UsageError(
                "activations", f"{self.activations!r}", f"one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the packed parameter."""
        return torch.int8 if self.codec == INT8 else torch.uint8

    @property
    def options(self) -> dict[str, Any]:
        """What `TernaryLinear` is told of it by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:-2]}

    def width(self, cols: int | None = None) -> int:
        """Elements of a packed row; `cols` for a part of it."""
        cols = self.cols if cols is None else cols
        if self.codec == INT8:
            return cols
        if self.codec == INT4:
            return int4.int4_width(cols, self.group_size)
        return self.planes * base3.packed_width(cols, self.group_size)


def dense_weight(packed: Any, scale: Any, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The dense weight: `dense_matrix`, turned back where the matrix is stored rotated."""
    if not layout.rotation[0]:
        return dense_matrix(packed, scale, layout, dtype)
    wide = dense_matrix(packed, scale, layout, torch.float32)
    return unrotate(wide, *layout.rotation).to(dtype)


def dense_matrix(packed: Any, scale: Any, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The matrix (rows, cols) that a packed one stands for, as it is stored: perhaps rotated."""
    if hasattr(packed, "to_local"):  # a DTensor, under tensor parallelism: each process its part
        part = dense_matrix(packed.to_local(), scale.to_local(), layout, dtype)
        whole: Tensor = packed.from_local(part, packed.device_mesh, packed.placements)
        return whole
    if layout.lanes is not None and layout.lanes.form == TILES:
        return _dense_tiles(packed, scale, layout, layout.lanes).to(dtype)
    packed, scale = stored_form(packed, scale, layout)
    if layout.codec == INT8:
        return int8.dequantize_int8(packed, scale, layout.group_size, dtype)
    cols, planes = _cols(scale, layout), layout.planes
    if layout.codec == INT4:
        return int4.dequantize_int4(packed, scale, cols, layout.group_size, dtype)
    return base3.dequantize_base3(packed, scale, cols, layout.group_size, dtype, planes=planes)


def _dense_tiles(packed: Tensor, scale: Tensor, layout: Layout, lanes: Lanes) -> Tensor:
    """`dense_matrix` in float32, as base3.dequantize_base3 computes it."""
    groups = group_count(layout.cols, layout.group_size)
    dense: Tensor | None = None
    for part, by in zip(packed.chunk(layout.planes), scale.chunk(layout.planes), strict=True):
        trits = trits_of_tiles(part, lanes.rows, layout.cols)
        plain = scale_values(by.view(groups, lanes.scale_rows).T)
        plane = scaled(trits, plain, layout.group_size)
        dense = plane if dense is None else dense + plane
    assert dense is not None
    return dense


def parts_of(packed: Any, scale: Any, layout: Layout) -> Iterator[tuple[Any, Any]]:
    """A matrix cut between rows where a dense one is not to be made at once: of int4.

    The matrices that most of a small model consists of are stored so.
    """
    if layout.codec != INT4 or hasattr(packed, "to_local"):
        yield packed, scale
        return
    if scale.shape[0] != len(packed):
        scale = scale.repeat_interleave(len(packed) // max(1, scale.shape[0]), 0)
    rows = max(1, _PART // layout.cols)
    yield from zip(torch.split(packed, rows), torch.split(scale, rows), strict=True)


def stored_form(packed: Tensor, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The stored form of a parameter and its scales, whatever form they are in.

    packed, scale  of a matrix, or of several with a dimension more
    """
    if layout.lanes is None:
        return packed, scale
    with torch.autocast("cpu", enabled=False):  # it would cast scales that are put together
        return _from_lanes(packed, scale, layout, layout.lanes)


def _from_lanes(
    packed: Tensor, scale: Tensor, layout: Layout, lanes: Lanes
) -> tuple[Tensor, Tensor]:
    cols, group_size = layout.cols, layout.group_size
    if packed.ndim == 2:
        pairs = [_from_lanes(*pair, layout, lanes) for pair in zip(packed, scale, strict=True)]
        return torch.stack([p for p, _ in pairs]), torch.stack([s for _, s in pairs])
    groups = group_count(cols, group_size)
    planes, scales = [], []
    if lanes.form == TILES:
        planes = [from_tiles(p, lanes.rows, cols, group_size) for p in packed.chunk(layout.planes)]
        scales = [part.view(groups, lanes.scale_rows).T for part in scale.chunk(layout.planes)]
        return torch.cat(planes, 1), torch.cat(scales, 1).contiguous()
    for part in packed.chunk(layout.planes):
        planes.append(kernels.from_lanes(part, lanes.rows, cols, group_size, lanes.form))
    for part in scale.chunk(layout.planes):
        plain = kernels.lane_scales(part, lanes.rows, lanes.scale_rows, groups, lanes.form)
        if lanes.scale_dtype == torch.uint8:
            plain = scale_codes(plain)
        scales.append(plain.to(lanes.scale_dtype))
    return torch.cat(planes, 1), torch.cat(scales, 1)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def lanes_form(
    packed: Tensor, scale: Tensor, layout: Layout, memory: Tensor
) -> tuple[Tensor, Tensor, Layout]:
    """The lanes of a stored parameter, its scales, and the layout that says so.

    packed, scale  as in `stored_form`
    memory         (`lanes_size`,) uint8, where the lanes are to be; tiles have their own
    """
    *stack, rows, _ = packed.shape
    form, cols, group_size = kernels.best_form(), layout.cols, layout.group_size
    planes, parts = (
        [plane for matrix in t.flatten(0, -3) for plane in matrix.chunk(layout.planes, -1)]
        for t in (packed.unsqueeze(0), scale.unsqueeze(0))
    )
    if packed.device.type == "cuda":
        held = replace(layout, lanes=Lanes(TILES, rows, scale.shape[-2], scale.dtype))
        tiles = torch.cat([to_tiles(plane, cols, group_size) for plane in planes])
        by_group = torch.cat([part.T.flatten() for part in parts])
        return tiles.view(*stack, -1), by_group.view(*stack, -1), held
    for plane, out in zip(planes, memory.chunk(len(planes)), strict=True):
        kernels.to_lanes(plane.contiguous(), cols, group_size, form, out=out)
    scales = torch.cat([kernels.scale_lanes(part, rows, form) for part in parts])
    held = replace(layout, lanes=Lanes(form, rows, scale.shape[-2], scale.dtype))
    return memory.view(*stack, -1), scales.view(*stack, -1), held


def lanes_size(packed: Tensor, layout: Layout) -> int:
    """Bytes of a stored parameter's lanes in memory that is given to them."""
    *stack, rows, _ = packed.shape
    if packed.device.type == "cuda":
        return 0
    size, _, _ = kernels.lanes_shape(kernels.best_form(), rows, layout.cols, layout.group_size)
    return math.prod(stack) * layout.planes * size


def fits_lanes(packed: Any, scale: Any, layout: Layout) -> bool:
    """Whether there are kernels for a stored parameter once it is in lanes."""
    return (
        layout.codec == BASE3
        and layout.lanes is None
        and packed.numel() > 0
        and (_fits_core(packed, scale, layout) or _fits_gpu(packed, scale, layout))
    )


def in_lanes(layout: Layout) -> bool:
    """Whether a parameter of one plane with this layout is held in lanes on the CPU."""
    length = group_length(layout.cols, layout.group_size)
    one = layout.codec == BASE3 and layout.planes == 1 and layout.lanes is None
    return lib is not None and one and length <= kernels.LONGEST_SUM


def _fits_gpu(packed: Any, scale: Any, layout: Layout) -> bool:
    return (
        not hasattr(packed, "to_local")
        and packed.device == scale.device
        and fits_tiles(packed.device, layout.cols, layout.group_size, layout.activations)
    )


def is_stored_for_core(packed: Any, scale: Any, layout: Layout) -> bool:
    """Whether the compiled core can multiply these int8 or int4 weights as they are stored."""
    return (
        layout.codec != BASE3
        and _fits_core(packed, scale, layout)
        and packed.is_contiguous()
        and scale.is_contiguous()
    )


def _fits_core(packed: Any, scale: Any, layout: Layout) -> bool:
    return (
        lib is not None
        and not hasattr(packed, "to_local")
        and packed.device.type == scale.device.type == "cpu"
        and group_length(layout.cols, layout.group_size) <= kernels.LONGEST_SUM
    )


def _cols(scale: Tensor, layout: Layout) -> int:
    """Columns of a packed tensor, or of the part of it that whole groups make up."""
    groups: int = scale.shape[-1] // layout.planes
    return min(layout.cols, groups * group_length(layout.cols, layout.group_size))


def check_part(name: str, packed: Any, scale: Any, layout: Layout) -> None:
    """Refuse a tensor that tensor parallelism has cut where it cannot be cut (UsageError)."""
    if not hasattr(packed, "to_local"):
        return
    part, scales = packed.to_local(), scale.to_local()
    cols = _cols(scales, layout)
    fits = layout.group_size != 0 and part.shape[-1] == layout.width(cols)
    # a cut through the columns of two planes parts the planes, not their columns; a rotation and
    # the absmax of a token need inputs that other processes have
    against = {
        "planes 2": layout.planes > 1,
        f"rotation {layout.rotation[0]}": layout.rotation[0],
        "int8 activations": layout.activations == "int8",
    }
    what = next((what for what, found in against.items() if found), None)
    cannot = f"cannot be cut for {packed.device_mesh.size()} processes; tensor parallelism needs"
    if cols != layout.cols and what is not None:
        raise UsageError(
            name,
            f"{layout.cols} columns with {what} {cannot} one plane, not rotated, and activations "
            "that are not rounded",
            remedy="Use one process",
        )
    if not fits or scales.shape[-2] != part.shape[-2]:
        raise UsageError(
            name,
            f"{layout.cols} columns with group_size {layout.group_size} {cannot} whole groups in "
            "each",
            remedy="Use fewer processes, or convert with a smaller group size",
        )
