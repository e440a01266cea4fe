"""Packed layers: modules that hold packed weights and compute as if the weights were dense.

    y = x W^T + b        W = scale * trit, a sum of two such, or scale * int8

A packed parameter is held in one of two forms, never in both:

    stored  the bytes of the file: (rows, width) with scales (scale_rows, groups). W is dequantized
            for the length of one product and never kept. Works on every device. On the CPU the
            compiled core multiplies int8 weights as they are, without W.
    lanes   the run-time layout of ternarize.kernels, a flat tensor, with scales in the same order.
            The compiled core multiplies it without W, on the CPU.

`use_lanes` turns the first into the second, a module at a time, once a model is loaded, and
`Layout.lanes` says which it is. Only this file knows: whatever leaves a module (state_dict, a
pickle, another device) is in the stored form, and so is a state_dict that is loaded. What the
kernels do not serve (parts of a tensor, ternary parameters that modules share, float64 inputs) goes
the dense way.

`TernaryLinear` is an `nn.Linear`, because that is what other software (PEFT) looks for. Experts
that a model fuses into one parameter (experts, rows, cols) have no module of their own: their class
stays what it is, and while its forward runs, `self.gate_up_proj[expert]` is a matrix of its own
(`PackedMatrix`): multiplied by the kernels on the CPU, elsewhere dequantized when it meets an
input. So only experts that are hit cost anything. Token embeddings keep their class in the same way
(some multiply their output): of them only the rows that are looked up are dequantized.

With activations "int8" the input of each product is rounded to 8 bits per token, as models trained
as BitNet b1.58 expect (https://arxiv.org/abs/2402.17764, section 2):

    q = round(127 x / absmax(x))        y = (q W^T) absmax(x) / 127 + b
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ternarize.errors import FormatError, UsageError
from ternarize.native import lib
from ternarize.plans.recipe import ACTIVATIONS
from ternarize.runtime import kernels
from ternarize.trits import base3, int8
from ternarize.trits.base3 import BASE3
from ternarize.trits.int8 import INT8
from ternarize.trits.rotation import rotate, unrotate
from ternarize.trits.scales import scale_codes
from ternarize.trits.ternary import group_count, group_length


@dataclass(frozen=True)
class Lanes:
    """A run-time layout, and what it does not say about the stored form.

    form         "lanes2" or "lanes3"
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
    codec        "base3" or "int8"
    planes       ternary matrices whose sum is the weight
    rotation     (block, seed): the matrix stands for W R, and meets R^T x; block 0: none
    lanes        None where the parameter is held in its stored form
    """

    cols: int
    group_size: int
    transposed: bool = False
    activations: str = "none"
    codec: str = BASE3
    planes: int = 1
    rotation: tuple[int, int] = (0, 0)
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

    def width(self, cols: int | None = None) -> int:
        """Elements of a packed row; `cols` for a part of it."""
        cols = self.cols if cols is None else cols
        if self.codec == INT8:
            return cols
        return self.planes * base3.packed_width(cols, self.group_size)


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
        x = _rotated(x, layout)
    if torch.is_grad_enabled() and x.requires_grad:
        apply: Any = _Product.apply
        y: Tensor = apply(x, packed, scale, bias, layout)
        return y
    return _product(x, packed, scale, bias, layout)


def prepared_products(
    modules: Sequence[nn.Module], x: Tensor, outs: Sequence[Tensor]
) -> Callable[[], None] | None:
    """A call that sets outs to the outputs of layers that share the input x, without gradients.

    x     (..., in_features) float
    outs  (..., out_features) of x's dtype, of each layer

    None if they are no packed layers in lanes of one kind, which share the rounding of their input
    and the threads. The call knows the memory only: the caller keeps it.
    """
    shared = {_sharing(module) for module in modules}
    if len(shared) > 1 or None in shared or x.dtype not in _KERNEL_DTYPES:
        return None
    layout: Layout = cast(TernaryLinear, modules[0]).layouts["weight"]
    assert layout.lanes is not None
    matrices: Any = [(m.weight, m.weight_scale, m.out_features) for m in modules]
    how = layout.group_size, layout.lanes.form, layout.activations, torch.get_num_threads()
    return kernels.prepared_products(x, matrices, outs, *how)


def _sharing(module: nn.Module) -> tuple[Any, ...] | None:
    """What layers must have in common for `prepared_products`; None of one that it cannot take."""
    if isinstance(module, TernaryLinear) and module.planes == 1 and module.bias is None:
        layout = module.layouts["weight"]
        if layout.lanes is not None and not layout.rotation[0]:
            return layout.lanes.form, layout.cols, layout.group_size, layout.activations
    return None


def _rotated(x: Any, layout: Layout) -> Tensor:
    """R^T x. What is to be rounded to 8 bits is not rounded to 16 by autocast first."""
    if hasattr(x, "to_local"):  # a DTensor: whole inputs in each process (`check_part`)
        part = _rotated(x.to_local(), layout)
        whole: Tensor = x.from_local(part, x.device_mesh, x.placements)
        return whole
    if layout.activations == "none":
        return rotate(x, *layout.rotation)
    with torch.autocast(x.device.type, enabled=False):
        return rotate(x, *layout.rotation)


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    if x.dtype in _KERNEL_DTYPES and x.device.type == "cpu":
        if layout.lanes is not None:
            return _lanes_product(x, packed, scale, bias, layout, layout.lanes)
        if _is_int8_for_kernels(packed, scale, layout):
            return _int8_kernel_product(x, packed, scale, bias, layout)
    if layout.activations == "none":
        return F.linear(x, _dense(packed, scale, layout, x.dtype), bias)
    y = rounded_linear(x, _dense(packed, scale, layout, torch.float32))
    return y if bias is None else y + bias


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _lanes_product(
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


def _int8_kernel_product(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    """`_lanes_product` with int8 weights in their stored form."""
    x = _autocast(x, layout)
    wide = x if bias is None else x.to(torch.float32)
    multiply: Any = _compiled_multiply_int8 if torch.compiler.is_compiling() else _multiply_int8
    y: Tensor = multiply(wide, packed, scale, layout.group_size, layout.activations == "int8")
    return (y if bias is None else y + bias).to(x.dtype)


def _is_int8_for_kernels(packed: Any, scale: Any, layout: Layout) -> bool:
    """Whether the compiled core can multiply these int8 weights as they are stored."""
    return (
        lib is not None
        and layout.codec == INT8
        and not hasattr(packed, "to_local")
        and packed.device.type == scale.device.type == "cpu"
        and packed.is_contiguous()
        and scale.is_contiguous()
        and group_length(layout.cols, layout.group_size) <= kernels.LONGEST_GROUP
    )


def _autocast(x: Tensor, layout: Layout) -> Tensor:
    """x as F.linear would take it; what is to be rounded to 8 bits stays as it is."""
    if layout.activations == "none" and torch.is_autocast_enabled("cpu"):
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def _multiply(
    x: Tensor, packed: Tensor, scale: Tensor, rows: int, group_size: int, form: str, rounded: bool
) -> Tensor:
    activations = "int8" if rounded else "none"
    threads = torch.get_num_threads()
    x = x.detach()  # the core takes no tensors that need gradients
    return kernels.product(x, packed, scale, rows, group_size, form, activations, threads)


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


def _multiply_int8(
    x: Tensor, packed: Tensor, scale: Tensor, group_size: int, rounded: bool
) -> Tensor:
    activations = "int8" if rounded else "none"
    threads = torch.get_num_threads()
    return kernels.int8_product(x.detach(), packed, scale, group_size, activations, threads)


_compiled_multiply_int8 = torch.library.custom_op(
    "ternarize::int8_product", _multiply_int8, mutates_args=(), device_types="cpu"
)


@_compiled_multiply_int8.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, group_size: int, rounded: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def rounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with each token of x rounded to 8 bits: the way without the compiled core.

        q = round(x * 127 / absmax)        y = (q W^T) * (absmax / 127)

    x       (..., cols) float, worked on in float32; absmax is max |x| over cols, and rounding is to
            the nearest even, so that q is an integer in [-127, 127] with no zero point
    weight  (rows, cols) float32

    Returns (..., rows) in x's dtype; a token of zeros gives zeros.  BitNet b1.58, section 2.
    """
    wide = x.to(torch.float32)
    absmax = wide.abs().amax(-1, keepdim=True)
    q = (wide * 127 / torch.where(absmax == 0, 1, absmax)).round()
    with torch.autocast(x.device.type, enabled=False):  # it would round the scales in W to 16 bits
        y = F.linear(q, weight)
    return (y * (absmax / 127)).to(x.dtype)


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
        return grad @ _dense(packed, scale, ctx.layout, grad.dtype), None, None, grad_bias, None


def _dense(packed: Any, scale: Any, layout: Layout, dtype: torch.dtype) -> Tensor:
    if hasattr(packed, "to_local"):  # a DTensor, under tensor parallelism: each process its part
        part = _dense(packed.to_local(), scale.to_local(), layout, dtype)
        whole: Tensor = packed.from_local(part, packed.device_mesh, packed.placements)
        return whole
    packed, scale = _stored(packed, scale, layout)
    if layout.codec == INT8:
        return int8.dequantize_int8(packed, scale, layout.group_size, dtype)
    cols, planes = _cols(scale, layout), layout.planes
    return base3.dequantize(packed, scale, cols, layout.group_size, dtype, planes=planes)


def _stored(packed: Tensor, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
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
    for part in packed.chunk(layout.planes):
        planes.append(kernels.from_lanes(part, lanes.rows, cols, group_size, lanes.form))
    for part in scale.chunk(layout.planes):
        plain = kernels.lane_scales(part, lanes.rows, lanes.scale_rows, groups, lanes.form)
        if lanes.scale_dtype == torch.uint8:
            plain = scale_codes(plain)
        scales.append(plain.to(lanes.scale_dtype))
    return torch.cat(planes, 1), torch.cat(scales, 1)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def _in_lanes(
    packed: Tensor, scale: Tensor, layout: Layout, memory: Tensor
) -> tuple[Tensor, Tensor, Layout]:
    """The lanes of a stored parameter, its scales, and the layout that says so.

    packed, scale  as in `_stored`
    memory         (`_lanes_size`,) uint8, where the lanes are to be
    """
    *stack, rows, _ = packed.shape
    form, cols, group_size = kernels.best_form(), layout.cols, layout.group_size
    planes, parts = (
        [plane for matrix in t.flatten(0, -3) for plane in matrix.chunk(layout.planes, -1)]
        for t in (packed.unsqueeze(0), scale.unsqueeze(0))
    )
    for plane, out in zip(planes, memory.chunk(len(planes)), strict=True):
        kernels.to_lanes(plane.contiguous(), cols, group_size, form, out=out)
    scales = torch.cat([kernels.scale_lanes(part, rows, form) for part in parts])
    how = replace(layout, lanes=Lanes(form, rows, scale.shape[-2], scale.dtype))
    return memory.view(*stack, -1), scales.view(*stack, -1), how


def _lanes_size(packed: Tensor, layout: Layout) -> int:
    """Bytes of a stored parameter's lanes."""
    *stack, rows, _ = packed.shape
    size, _, _ = kernels.lanes_shape(kernels.best_form(), rows, layout.cols, layout.group_size)
    return math.prod(stack) * layout.planes * size


def _fits_lanes(packed: Any, scale: Any, layout: Layout) -> bool:
    """Whether the compiled core can multiply a stored parameter."""
    return (
        lib is not None
        and layout.lanes is None
        and layout.codec == BASE3
        and not hasattr(packed, "to_local")
        and packed.device.type == scale.device.type == "cpu"
        and packed.numel() > 0
        and group_length(layout.cols, layout.group_size) <= kernels.LONGEST_GROUP
    )


def _weight(packed: Any, scale: Any, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The dense weight: `_dense`, turned back where the matrix is stored rotated."""
    if not layout.rotation[0]:
        return _dense(packed, scale, layout, dtype)
    return unrotate(_dense(packed, scale, layout, torch.float32), *layout.rotation).to(dtype)


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
    if cols != layout.cols and what is not None:
        raise UsageError(
            name,
            f"{layout.cols} columns with {what} cannot be cut for {packed.device_mesh.size()} "
            "processes; tensor parallelism needs one plane, not rotated, and activations that "
            "are not rounded",
            remedy="Use one process",
        )
    if not fits or scales.shape[-2] != part.shape[-2]:
        raise UsageError(
            name,
            f"{layout.cols} columns with group_size {layout.group_size} cannot be cut for "
            f"{packed.device_mesh.size()} processes; tensor parallelism needs whole groups in each",
            remedy="Use fewer processes, or convert with a smaller group size",
        )


class Packed(nn.Module):
    """What packed modules have in common: `layouts`, by the name of the packed parameter, and that
    what leaves them is in the stored form.

    The scales of `name` are the parameter `<name>_scale`. Both are parameters rather than buffers,
    because tensor parallel plans and disk offload look at parameters only.
    """

    # A packed weight that is on meta (offloaded to disk) must not be drawn at random
    _is_hf_initialized = True

    layouts: dict[str, Layout]

    def held(self, name: str) -> nn.Parameter:
        """A parameter as it is, also where an attribute shows others something else (adapters)."""
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def lanes_size(self) -> int:
        """Bytes of what `use_lanes` would turn into lanes."""
        return sum(size for _, size in self._for_lanes())

    def use_lanes(self, memory: Tensor | None = None) -> None:
        """Hold in lanes what can be; `use_stored` is the inverse.

        memory  (`lanes_size`,) uint8 for them; None: memory of its own

        Raises FormatError when a byte is no code. Not for a parameter that another module has too:
        this one would not share it any longer. The function of the same name knows.
        """
        memory = kernels.memory(self.lanes_size()) if memory is None else memory
        for name, size in self._for_lanes():
            packed, scale = self.held(name).data, self.held(f"{name}_scale").data
            self._hold(name, *_in_lanes(packed, scale, self.layouts[name], memory[:size]))
            memory = memory[size:]

    def _for_lanes(self) -> list[tuple[str, int]]:
        """Names of parameters that can be held in lanes but are not, and the bytes of those."""
        found = []
        for name, layout in self.layouts.items():
            packed = self.held(name)
            if _fits_lanes(packed, self.held(f"{name}_scale"), layout):
                found.append((name, _lanes_size(packed, layout)))
        return found

    def use_stored(self) -> bool:
        """Hold everything in its stored form; returns whether some of it was not."""
        held = {name: layout for name, layout in self.layouts.items() if layout.lanes is not None}
        for name, layout in held.items():
            stored = _stored(self.held(name).data, self.held(f"{name}_scale").data, layout)
            self._hold(name, *stored, replace(layout, lanes=None))
        return bool(held)

    def _hold(self, name: str, packed: Tensor, scale: Tensor, layout: Layout) -> None:
        # new parameters: the old ones may belong to a state_dict that was loaded with assign
        for leaf, tensor in ((name, packed), (f"{name}_scale", scale)):
            parameter = type(self.held(leaf))
            setattr(self, leaf, parameter(tensor, requires_grad=False))
        self.layouts = {**self.layouts, name: layout}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Move, but never cast the scales: model.to(bfloat16) would change every weight."""
        if fn(torch.empty(0, dtype=torch.uint8)).device.type != "cpu":
            self.use_stored()
        before = {f"{name}_scale": self.held(f"{name}_scale").data for name in self.layouts}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in before.items():
            after = self.held(name)
            if after.dtype != scale.dtype:
                after.data = scale.to(after.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._stored_parameters().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        leaves = [leaf for name in self.layouts for leaf in (name, f"{name}_scale")]
        given = [leaf for leaf in leaves if prefix + leaf in state_dict]
        had_lanes = False
        if len(given) == len(leaves):
            had_lanes = self._forget_lanes()
        elif given:
            had_lanes = self.use_stored()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if had_lanes:
            self.use_lanes()

    def _forget_lanes(self) -> bool:
        """As `use_stored`, with nothing in it: for what is about to be overwritten."""
        held = {name: layout for name, layout in self.layouts.items() if layout.lanes is not None}
        for name, layout in held.items():
            assert layout.lanes is not None
            lanes, stack = layout.lanes, tuple(self.held(name).shape[:-1])
            how = replace(layout, lanes=None)
            parts = _empty((*stack, lanes.rows), how, lanes.scale_rows, lanes.scale_dtype)
            self._hold(name, parts[0].data, parts[1].data, how)
        return bool(held)

    def _stored_parameters(self) -> dict[str, Tensor]:
        """By name, the stored form of what is held in lanes."""
        found: dict[str, Tensor] = {}
        for name, layout in self.layouts.items():
            if layout.lanes is not None:
                leaves = name, f"{name}_scale"
                packed, scale = (self.held(leaf).data for leaf in leaves)
                found |= dict(zip(leaves, _stored(packed, scale, layout), strict=True))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the stored form, and whether it was in lanes."""
        stored = self._stored_parameters()
        if not stored:
            return self.__dict__
        parameters = self._parameters | {
            name: type(self.held(name))(tensor, requires_grad=False)
            for name, tensor in stored.items()
        }
        layouts = {name: replace(layout, lanes=None) for name, layout in self.layouts.items()}
        changed = {"_parameters": parameters, "layouts": layouts, "_had_lanes": True}
        return self.__dict__ | changed

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        had_lanes = state.pop("_had_lanes", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if had_lanes:
            self.use_lanes()


def use_lanes(model: nn.Module) -> None:
    """Hold the packed layers of a loaded model in lanes, where kernels can multiply them.

    A module at a time, so that memory holds one matrix twice at most. A parameter that several
    modules have, and the rows of an embedding, which are looked up, stay in the stored form.

    Raises FormatError when a byte is no code, which is possible in a file that was not verified.
    """
    owners: dict[int, int] = {}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, Packed)}
    for module in modules.values():
        for leaf in module.layouts:
            key = id(module.held(leaf))
            owners[key] = owners.get(key, 0) + 1
    fit = {
        name: module
        for name, module in modules.items()
        if all(owners[id(module.held(leaf))] == 1 for leaf in module.layouts)
        and not isinstance(module, PackedEmbedding)
    }
    # in one piece, which large pages can hold: a single matrix is often smaller than a page
    memory = kernels.memory(sum(module.lanes_size() for module in fit.values()))
    for name, module in fit.items():
        size = module.lanes_size()
        try:
            module.use_lanes(memory[:size])
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
        memory = memory[size:]
    kernels.give_back()


class Scale(nn.Parameter):
    """The scales of a packed weight, which a model must not take for a weight in its dtype.

    `model.dtype` is that of the first floating-point parameter, which could be the scales of a
    packed embedding, and `model.to(dtype)` casts all of those.
    """

    def is_floating_point(self) -> bool:
        return False


class TernaryLinear(Packed, nn.Linear):
    """A linear layer with a packed weight: ternary, or the sum of two ternary ones, or int8.

    weight        (out_features, width) uint8 (int8), as `Layout.width` counts; or in lanes
    weight_scale  (scale_rows, planes * groups) float, or uint8 codes; or in lanes
    bias          (out_features,) or None
    transposed    whether the model's own weight is (in_features, out_features), as GPT-2's Conv1D
    activations   "none" or "int8"
    codec         "base3" or "int8"
    planes        ternary matrices whose sum is the weight
    rotation      (block, seed) of the input; block 0: none

    Made empty, to be filled from a file: see `ternarize.load`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        scale_rows: int | None = None,
        scale_dtype: torch.dtype = torch.float16,
        transposed: bool = False,
        activations: str = "none",
        codec: str = BASE3,
        planes: int = 1,
        rotation: tuple[int, int] = (0, 0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.transposed, self.activations = group_size, transposed, activations
        self.codec, self.planes, self.rotation = codec, planes, rotation
        layout = Layout(in_features, group_size, transposed, activations, codec, planes, rotation)
        self.layouts = {"weight": layout}
        if scale_rows is None:
            scale_rows = 1 if group_size == 0 else out_features
        shape = (out_features,)
        self.weight, self.weight_scale = _empty(
            shape, self.layouts["weight"], scale_rows, scale_dtype, device
        )
        empty = torch.empty(shape, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out_features, in_features)."""
        return _weight(self.held("weight"), self.weight_scale, self.layouts["weight"], dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) float -> (..., out_features), as `product`."""
        return product(
            input, self.held("weight"), self.weight_scale, self.bias, self.layouts["weight"]
        )

    def extra_repr(self) -> str:
        codec = "" if self.codec == BASE3 else f", codec={self.codec}"
        planes = "" if self.planes == 1 else f", planes={self.planes}"
        planes += "" if not self.rotation[0] else f", rotation={self.rotation}"
        return (
            f"{super().extra_repr()}, group_size={self.group_size}, activations={self.activations}"
            f"{codec}{planes}"
        )


def _empty(
    rows: tuple[int, ...],
    layout: Layout,
    scale_rows: int,
    scale_dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters for a packed tensor of shape (*rows, cols) and for its scales."""
    groups = layout.planes * group_count(layout.cols, layout.group_size)
    packed = torch.empty(*rows, layout.width(), dtype=layout.dtype, device=device)
    scale = torch.empty(*rows[:-1], scale_rows, groups, dtype=scale_dtype, device=device)
    return nn.Parameter(packed, requires_grad=False), nn.Parameter(scale, requires_grad=False)


class Mixed(Packed):
    """Packed parameters of a module whose class is the model's own, with this one mixed in.

    dense_class  the model's class
    mixin        the class that is mixed in
    """

    class_prefix: str  # of the name of the mixed class
    dense_class: type[nn.Module]
    mixin: "type[Mixed]"

    def __reduce__(self) -> Any:  # the class is made at run time: pickle cannot find it by name
        return _empty_mixed, (self.mixin, self.dense_class), self.__getstate__()


@functools.cache
def _mixed_class(mixin: type[Mixed], dense: type) -> Any:
    """The class of all modules that were of class `dense`, with `mixin` mixed in."""
    body = {"dense_class": dense, "mixin": mixin}
    return type(f"{mixin.class_prefix}{dense.__name__}", (mixin, dense), body)


def _empty_mixed(mixin: type, dense: type) -> Any:
    cls = _mixed_class(mixin, dense)
    return cls.__new__(cls)


@dataclass
class PackedMatrix:
    """A packed parameter that its model's code may use as if it were the dense tensor.

    packed  (experts, rows, width), or (rows, width) after indexing with an expert; of lanes
            (experts, bytes), or (bytes,)
    scale   (experts, scale_rows, groups) or (scale_rows, groups); of lanes as `packed`
    dtype   of the dense tensor that it stands for

    `F.linear(x, m[expert])` and `x @ m[expert]` run `product`, `F.embedding(ids, m)` runs `gather`;
    any other use is served with the dense tensor: right for every model, if slow where all experts
    are used at once. Rounded activations need to see the product, and are refused where it is out
    of sight.
    """

    packed: Tensor
    scale: Tensor
    layout: Layout
    dtype: torch.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """(experts,), or () after indexing with an expert."""
        return tuple(self.packed.shape[: -2 if self.layout.lanes is None else -1])

    @property
    def shape(self) -> torch.Size:
        lanes, stack, cols = self.layout.lanes, self.stack, self.layout.cols
        rows = self.packed.shape[-2] if lanes is None else lanes.rows
        return torch.Size([*stack, cols, rows] if self.layout.transposed else [*stack, rows, cols])

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dense(self) -> Tensor:
        """The dense tensor, with the shape that the model's code expects."""
        if self.stack:
            return torch.stack([self[expert].dense() for expert in range(len(self.packed))])
        dense = _weight(self.packed, self.scale, self.layout, self.dtype)
        return dense.T.contiguous() if self.layout.transposed else dense

    def _exposed(self) -> Tensor:
        if self.layout.activations != "none":
            raise UsageError(
                "activations",
                f"{self.layout.activations!r}, but this model multiplies by all experts at once, "
                "where inputs cannot be rounded",
                remedy="Load it with activations='none'",
            )
        return self.dense()

    def __getitem__(self, index: Any) -> Any:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        if one and self.stack:
            packed, scale = self.packed[index], self.scale[index]
            return PackedMatrix(packed, scale, self.layout, self.dtype)
        return self._exposed()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols (copy, pickle, numpy) that a dense copy cannot serve
            raise AttributeError(name)
        return getattr(self._exposed(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x, matrix = args[0], args[1]
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            right = _LINEAR if not matrix.layout.transposed else _MATMUL
            if func in right and not matrix.stack:
                return product(x, matrix.packed, matrix.scale, bias, matrix.layout)
            if func is F.embedding and not matrix.stack:
                options = kwargs or {}
                if len(args) > 3 or options.get("max_norm") is not None:
                    raise UsageError(
                        "max_norm",
                        "changes the rows that are looked up, but the embedding is packed",
                        "none",
                        "Convert with --embeddings keep",
                    )
                stored = _stored(matrix.packed, matrix.scale, matrix.layout)
                return gather(x, *stored, replace(matrix.layout, lanes=None), matrix.dtype)
        return func(*_densified(args), **_densified(kwargs or {}))


_LINEAR = {F.linear}
_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


def _densified(value: Any) -> Any:
    if isinstance(value, PackedMatrix):
        return value._exposed()
    if isinstance(value, (list, tuple)):
        return type(value)(_densified(item) for item in value)
    if isinstance(value, dict):
        return {key: _densified(item) for key, item in value.items()}
    return value


class _Dense:
    """An experts module as its own forward sees it: packed parameters look dense.

    A stand-in for `self`, made for one call, so that the module itself never changes while it runs
    (threads may share it) and so that everyone else who asks for its parameters gets them packed.
    """

    def __init__(self, module: "TernaryExperts", dtype: torch.dtype) -> None:
        self.__dict__.update(_module=module, _dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        module: TernaryExperts = self.__dict__["_module"]
        layout = module.layouts.get(name)
        if layout is not None:
            packed, scale = getattr(module, name), getattr(module, f"{name}_scale")
            return PackedMatrix(packed, scale, layout, self.__dict__["_dtype"])
        method = inspect.getattr_static(type(module), name, None)
        if inspect.isfunction(method):  # a helper of the model's class must see dense weights too
            return functools.partial(method, self)
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)


class TernaryExperts(Mixed):
    """Fused experts with packed parameters; mixed into the model's own class.

    The model's forward runs as it was written: one expert after the other, whatever
    `experts_implementation` says, because the others want the dense weights of all experts.
    """

    class_prefix = "Ternary"

    # Which experts are hit depends on the data: a compiler would recompile for each of them
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        floats = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        dtype = next((a.dtype for a in floats if a.is_floating_point()), torch.get_default_dtype())
        dense: Any = self.dense_class
        forward = dense.forward
        if hasattr(dense, "_apply_gate"):  # set by the decorator that offers other implementations
            forward = getattr(forward, "__wrapped__", forward)
        return forward(_Dense(self, dtype), *args, **kwargs)

    def extra_repr(self) -> str:
        names = ", ".join(f"{n}: {x.group_size}" for n, x in self.layouts.items())
        return f"group_size of {names}"


def ternary_experts(
    module: nn.Module, parameters: Mapping[str, tuple[Layout, int, torch.dtype]]
) -> None:
    """Turn a module with fused experts into one with packed parameters, in place, still empty.

    parameters  name of a (experts, rows, cols) parameter, or (experts, cols, rows) if transposed:
                (its layout, its scale rows, the dtype of its scales)
    """
    for name, (layout, scale_rows, scale_dtype) in parameters.items():
        dense = getattr(module, name)
        rows = math.prod(dense.shape[1:]) // layout.cols
        packed, scale = _empty(
            (dense.shape[0], rows), layout, scale_rows, scale_dtype, dense.device
        )
        setattr(module, name, packed)
        setattr(module, f"{name}_scale", scale)
    experts: Any = module
    dense_class: type = type(module)
    experts.__class__ = _mixed_class(TernaryExperts, dense_class)
    experts.layouts = {name: layout for name, (layout, _, _) in parameters.items()}


def dense_experts(module: TernaryExperts, dtype: torch.dtype) -> None:
    """The inverse of `ternary_experts`: dense parameters of `dtype`, in place."""
    for name, layout in module.layouts.items():
        scale = getattr(module, f"{name}_scale")
        dense = PackedMatrix(getattr(module, name), scale, layout, dtype).dense()
        delattr(module, f"{name}_scale")
        setattr(module, name, nn.Parameter(dense))
    del module.layouts
    module.__class__ = module.dense_class  # type: ignore[assignment]


def gather(
    ids: Tensor, packed: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Rows of a packed matrix, dequantized: what `F.embedding(ids, W)` gives.

    ids            any shape, int
    packed, scale  as in `product`; scale_rows is 1 or rows
    dtype          of the result

    Returns (*ids.shape, cols). Nothing else of W is dequantized.
    """
    flat = ids.reshape(-1)
    rows = F.embedding(flat, packed)
    scales = scale if scale.shape[0] == 1 else F.embedding(flat, scale)
    return _weight(rows, scales, layout, dtype).view(*ids.shape, layout.cols)


class PackedEmbedding(Mixed):
    """A token embedding with a packed weight; mixed into the model's own class.

    The class's forward runs as it was written (Gemma's multiplies the rows by a constant), on a
    stand-in for `self` whose weight is a `PackedMatrix`.

    weight         (num_embeddings, width), weight_scale (scale_rows, groups), as in TernaryLinear
    weight_like    empty, of the dtype that the rows have; it follows model.to(dtype)
    """

    # Its class may have buffers of its own to set; the packed weight says itself that it is set
    _is_hf_initialized = False

    class_prefix = "Packed"
    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_like: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layout, dtype = self.layouts["weight"], self.weight_like.dtype
        dense: Any = self.dense_class
        if dense.forward is nn.Embedding.forward and self.__dict__.get("max_norm") is None:
            (ids,) = (*args, *kwargs.values())
            return gather(ids, self.weight, self.weight_scale, layout, dtype)
        stand_in = object.__new__(dense)
        others = {k: v for k, v in self._parameters.items() if not k.startswith("weight")}
        matrix = PackedMatrix(self.weight, self.weight_scale, layout, dtype)
        stand_in.__dict__.update(self.__dict__, _parameters=others, weight=matrix)
        return dense.forward(stand_in, *args, **kwargs)

    def extra_repr(self) -> str:
        layout = self.layouts["weight"]
        dense: Any = self.dense_class
        return f"{dense.extra_repr(self)}, codec={layout.codec}, group_size={layout.group_size}"


def packed_embedding(
    module: nn.Embedding, layout: Layout, scale_rows: int, scale_dtype: torch.dtype
) -> None:
    """Turn an embedding into one with a packed weight, in place, still empty."""
    dense = module.weight
    stored = _empty((module.num_embeddings,), layout, scale_rows, scale_dtype, dense.device)
    embedding: Any = module
    embedding.weight, embedding.weight_scale = stored
    for parameter in stored:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    # on the CPU even of a model on meta: there is nothing to load, and nothing to move
    like = torch.empty(0, dtype=dense.dtype, device="cpu")
    module.register_buffer("weight_like", like, persistent=False)
    dense_class: type = type(module)
    embedding.__class__ = _mixed_class(PackedEmbedding, dense_class)
    embedding.layouts = {"weight": layout}


def dense_embedding(module: PackedEmbedding, dtype: torch.dtype) -> None:
    """The inverse of `packed_embedding`: a dense weight of `dtype`, in place."""
    layout = module.layouts["weight"]
    dense = _weight(module.weight, module.weight_scale, layout, dtype)
    del module.weight_scale, module.weight_like, module.layouts
    module.weight = nn.Parameter(dense)
    module.__class__ = module.dense_class  # type: ignore[assignment]
