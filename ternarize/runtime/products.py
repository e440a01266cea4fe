"""Products with packed weights: y = x W^T, by what serves the weight, the input and the device.

    W = scale * trit, a sum of two such, or scale * integer (int8, int4)

The kernels (kernels.py) multiply lanes, int8 and int4 weights without W, on the CPU, and others
(tiles.py) ternary weights on a GPU. What they do not serve (other devices, parts of a tensor,
ternary parameters that modules share, float64 inputs) goes the dense way: W, of int4 a part of it,
is dequantized for the length of one product and never kept.

With activations "int8" the input of each product is rounded to 8 bits per token (`rounded_linear`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ternarize.errors import UsageError
from ternarize.runtime import kernels
from ternarize.runtime.forms import (
    Lanes,
    Layout,
    dense_matrix,
    dense_weight,
    is_stored_for_core,
    parts_of,
)
from ternarize.runtime.kernels import CORE_DTYPES
from ternarize.runtime.tiles import TILES, compiled_product_of_tiles, product_of_tiles
from ternarize.trits.int4 import INT4
from ternarize.trits.int8 import INT8
from ternarize.trits.rotation import rotate


def product(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    """y = x W^T + b with a packed W.

    x       (..., cols) float; y has its dtype (under autocast that of F.linear)
    packed  (rows, width) uint8, or int8 where that is the codec; or lanes (bytes,) uint8
    scale   (scale_rows, planes * groups) float, or uint8 codes; scale_rows divides rows. Of lanes:
            kernels.scale_lanes, of one plane behind the other
    bias    (rows,) or None

    Where x needs a gradient, the backward pass dequantizes W again instead of keeping it. Rounded
    activations are differentiated as if they were not rounded (the straight-through estimator).
    """
    if layout.rotation[0]:
        x = _turned(x, layout)
    if torch.is_grad_enabled() and x.requires_grad:
        apply: Any = _Product.apply
        y: Tensor = apply(x, packed, scale, bias, layout)
        return y
    return _product(x, packed, scale, bias, layout)


def _turned(x: Any, layout: Layout) -> Tensor:
    """R^T x. What is to be rounded to 8 bits is not rounded to 16 by autocast first."""
    if hasattr(x, "to_local"):  # a DTensor: whole inputs in each process (`check_part`)
        part = _turned(x.to_local(), layout)
        whole: Tensor = x.from_local(part, x.device_mesh, x.placements)
        return whole
    if layout.activations == "none":
        return rotate(x, *layout.rotation)
    with torch.autocast(x.device.type, enabled=False):
        return rotate(x, *layout.rotation)


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    lanes = layout.lanes
    if lanes is not None and lanes.form == TILES and x.dtype in CORE_DTYPES:
        return _by_tiles(x, packed, scale, bias, layout, lanes)
    if x.dtype in CORE_DTYPES and x.device.type == "cpu":
        if layout.lanes is not None:
            return _by_lanes(x, packed, scale, bias, layout, layout.lanes)
        if is_stored_for_core(packed, scale, layout):
            return _by_stored(x, packed, scale, bias, layout)
    if layout.activations == "none" and layout.codec != INT4:
        return F.linear(x, dense_matrix(packed, scale, layout, x.dtype), bias)
    rounded = layout.activations != "none"
    multiply, dtype = (rounded_linear, torch.float32) if rounded else (F.linear, x.dtype)
    found = [
        multiply(x, dense_matrix(*part, layout, dtype)) for part in parts_of(packed, scale, layout)
    ]
    y = found[0] if len(found) == 1 else torch.cat(found, -1)
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    """`product` with a backward pass that does not hold the dense weight from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.layout = layout
        return _product(x, packed, scale, bias, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:
        packed, scale = ctx.saved_tensors
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        total, row = None, 0
        for part in parts_of(packed, scale, ctx.layout):
            dense = dense_matrix(*part, ctx.layout, grad.dtype)
            mine = grad[..., row : row + len(dense)] @ dense
            total, row = mine if total is None else total + mine, row + len(dense)
        assert total is not None
        return total, None, None, grad_bias, None


def rounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with each token of x rounded to 8 bits: the way without the compiled core.

        q = round(x * 127 / absmax)        y = (q W^T) * (absmax / 127)

    x       (..., cols) float, worked on in float32; absmax is max |x| over cols, and rounding is to
            the nearest even, so that q is an integer in [-127, 127] with no zero point
    weight  (rows, cols) float32

    Returns (..., rows) in x's dtype; a token of zeros gives zeros.
    BitNet b1.58, https://arxiv.org/abs/2402.17764, section 2.
    """
    wide = x.to(torch.float32)
    absmax = wide.abs().amax(-1, keepdim=True)
    q = (wide * 127 / torch.where(absmax == 0, 1, absmax)).round()
    with torch.autocast(x.device.type, enabled=False):  # it would round the scales in W to 16 bits
        y = F.linear(q, weight)
    return (y * (absmax / 127)).to(x.dtype)


def gather(
    ids: Tensor, packed: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Rows of a packed matrix, dequantized: what `F.embedding(ids, W)` gives.

    ids            any shape, int
    packed, scale  as in `product`, in the stored form; scale_rows is 1 or rows
    dtype          of the result

    Returns (*ids.shape, cols). Nothing else of W is dequantized.
    """
    flat = ids.reshape(-1)
    rows = F.embedding(flat, packed)
    scales = scale if scale.shape[0] == 1 else F.embedding(flat, scale)
    return dense_weight(rows, scales, layout, dtype).view(*ids.shape, layout.cols)


def gather_bags(look_up: Callable[[Tensor], Tensor], ids: Tensor, **options: Any) -> Tensor:
    """What `F.embedding_bag(ids, W, **options)` gives, of the rows alone that are looked up.

    look_up  (n,) ids -> (n, cols), those rows of W
    ids      as of F.embedding_bag, (n,) or (bags, n)
    options  the others that it has, without max_norm; sparse and scale_grad_by_freq say nothing
    """
    count, padding = ids.numel(), options.get("padding_idx")
    rows = look_up(ids.reshape(-1))
    own = torch.arange(count, device=ids.device, dtype=ids.dtype).view(ids.shape)
    if padding is not None:  # one more row, which no bag counts
        own = torch.where(ids == padding, count, own)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
        options["padding_idx"] = count
    options |= {"sparse": False, "scale_grad_by_freq": False}
    return F.embedding_bag(own, rows, **options)


# --- by the compiled core ------------------------------------------------------------------------


def _by_lanes(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout, lanes: Lanes
) -> Tensor:
    """`product` by the kernels, the planes and the bias summed in float32 and rounded once."""
    if x.shape[-1] != layout.cols:
        raise UsageError("input", f"{x.shape[-1]} columns; the layer has {layout.cols}")
    x = _autocast(x, layout)
    rounded = layout.activations == "int8"
    wide = x if bias is None and layout.planes == 1 else x.to(torch.float32)
    multiply: Any = _compiled_multiply if torch.compiler.is_compiling() else _multiply
    y: Tensor | None = None
    for plane, scales in zip(packed.chunk(layout.planes), scale.chunk(layout.planes), strict=True):
        part = multiply(wide, plane, scales, lanes.rows, layout.group_size, lanes.form, rounded)
        y = part if y is None else y + part
    assert y is not None
    return (y if bias is None else y + bias).to(x.dtype)


def _by_stored(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    """`_by_lanes` with int8 or int4 weights in their stored form."""
    x = _autocast(x, layout)
    wide = x if bias is None else x.to(torch.float32)
    plain, compiled = _STORED[layout.codec]
    multiply: Any = compiled if torch.compiler.is_compiling() else plain
    y: Tensor = multiply(wide, packed, scale, layout.group_size, layout.activations == "int8")
    return (y if bias is None else y + bias).to(x.dtype)


def _by_tiles(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout, lanes: Lanes
) -> Tensor:
    """`_by_lanes` on a GPU."""
    if x.shape[-1] != layout.cols:
        raise UsageError("input", f"{x.shape[-1]} columns; the layer has {layout.cols}")
    if x.device != packed.device:  # a kernel would read the memory of another GPU
        raise UsageError("input", f"on {x.device}; the layer is on {packed.device}")
    x = _autocast(x, layout)
    wide = bias is not None or layout.planes > 1
    multiply = compiled_product_of_tiles if torch.compiler.is_compiling() else product_of_tiles
    shape = lanes.rows, lanes.scale_rows, layout.group_size, layout.activations == "int8", wide
    y: Tensor | None = None
    for plane, scales in zip(packed.chunk(layout.planes), scale.chunk(layout.planes), strict=True):
        part = multiply(x, plane, scales, *shape)
        y = part if y is None else y + part
    assert y is not None
    return (y if bias is None else y + bias).to(x.dtype)


def _autocast(x: Tensor, layout: Layout) -> Tensor:
    """x as F.linear would take it; what is to be rounded to 8 bits stays as it is."""
    device = x.device.type
    if layout.activations == "none" and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _multiply(
    x: Tensor, packed: Tensor, scale: Tensor, rows: int, group_size: int, form: str, rounded: bool
) -> Tensor:
    activations = "int8" if rounded else "none"
    threads = torch.get_num_threads()
    x = x.detach()  # the core takes no tensors that need gradients
    return kernels.product_of_lanes(x, packed, scale, rows, group_size, form, activations, threads)


# A compiler cannot look into the core. Only it takes this way: an operator of torch costs more
# around each call than a small product itself.
_compiled_multiply = torch.library.custom_op(
    "ternarize::product", _multiply, mutates_args=(), device_types="cpu"
)


@_compiled_multiply.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, rows: int, group_size: int, form: str, rounded: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _of_numbers(name: str, product: Callable[..., Tensor]) -> tuple[Any, Any]:
    """The same two ways of a product from numbers in 8 or 4 bits."""

    def multiply(
        x: Tensor, packed: Tensor, scale: Tensor, group_size: int, rounded: bool
    ) -> Tensor:
        activations = "int8" if rounded else "none"
        threads = torch.get_num_threads()
        return product(x.detach(), packed, scale, group_size, activations, threads)

    compiled = torch.library.custom_op(name, multiply, mutates_args=(), device_types="cpu")

    @compiled.register_fake
    def _(x: Tensor, packed: Tensor, scale: Tensor, group_size: int, rounded: bool) -> Tensor:
        return x.new_empty((*x.shape[:-1], packed.shape[0]))

    return multiply, compiled


_STORED = {
    INT8: _of_numbers("ternarize::int8_product", kernels.product_of_int8),
    INT4: _of_numbers("ternarize::int4_product", kernels.product_of_int4),
}
