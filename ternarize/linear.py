"""Packed layers: modules that hold packed weights and compute as if the weights were dense.

    y = x W^T + b        W = scale * trit, a sum of two such, or scale * int8

W is dequantized for the length of one product and never kept: a model needs the memory of its
packed bytes and of one dense matrix at a time. This is the plain form that works on every device;
a kernel that multiplies without W has to agree with it, and takes its place in `product`.

`TernaryLinear` is an `nn.Linear`, because that is what other software (PEFT) looks for. Experts
that a model fuses into one parameter (experts, rows, cols) have no module of their own: their class
stays what it is, and while its forward runs, `self.gate_up_proj[expert]` is a matrix that is
dequantized when it meets an input. So only experts that are hit cost anything. Token embeddings
keep their class in the same way (some multiply their output): of them only the rows that are looked
up are dequantized.

With activations "int8" the input of each product is rounded to 8 bits per token, as models trained
as BitNet b1.58 expect (https://arxiv.org/abs/2402.17764, section 2):

    q = round(127 x / absmax(x))        y = (q W^T) absmax(x) / 127 + b
"""

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ternarize import codecs
from ternarize.codecs import BASE3, INT8
from ternarize.errors import UsageError
from ternarize.rotation import rotate, unrotate
from ternarize.tensor import group_count, group_length

ACTIVATIONS = ("none", "int8")


@dataclass(frozen=True)
class Layout:
    """How a packed parameter is to be read: what its bytes alone do not say.

    cols         weights in a row
    group_size   as in ternarize.tensor
    transposed   the model's own weight is (cols, rows)
    activations  "none", or "int8" to round the input of each product
    codec        "base3" or "int8"
    planes       ternary matrices whose sum is the weight
    rotation     (block, seed): the matrix stands for W R, and meets R^T x; block 0: none
    """

    cols: int
    group_size: int
    transposed: bool = False
    activations: str = "none"
    codec: str = BASE3
    planes: int = 1
    rotation: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise UsageError(
                f"activations: {self.activations!r}; expected one of {', '.join(ACTIVATIONS)}."
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
        return self.planes * codecs.packed_width(cols, self.group_size)


def product(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    """y = x W^T + b with a packed W.

    x       (..., cols) float; y has its dtype (under autocast that of F.linear)
    packed  (rows, width) uint8, or int8 where that is the codec
    scale   (scale_rows, planes * groups) float, or uint8 codes; scale_rows divides rows
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
    if layout.activations == "none":
        return F.linear(x, _dense(packed, scale, layout, x.dtype), bias)
    y = int8_product(x, _dense(packed, scale, layout, torch.float32))
    return y if bias is None else y + bias


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with each token of x rounded to 8 bits: the twin that kernels are tested against.

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
    if layout.codec == INT8:
        return codecs.dequantize_int8(packed, scale, layout.group_size, dtype)
    cols, planes = _cols(scale, layout), layout.planes
    return codecs.dequantize(packed, scale, cols, layout.group_size, dtype, planes=planes)


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
    fits = layout.group_size > 0 and part.shape[-1] == layout.width(cols)
    # a cut through the columns of two planes parts the planes, not their columns; a rotation needs
    # inputs that other processes have
    if cols != layout.cols and (layout.planes > 1 or layout.rotation[0]):
        what = "planes 2" if layout.planes > 1 else f"rotation {layout.rotation[0]}"
        raise UsageError(
            f"{name}: {layout.cols} columns with {what} cannot be cut for "
            f"{packed.device_mesh.size()} processes; tensor parallelism needs one plane, not "
            "rotated. Use one process, or convert without it."
        )
    if not fits or scales.shape[-2] != part.shape[-2]:
        raise UsageError(
            f"{name}: {layout.cols} columns with group_size {layout.group_size} cannot be cut for "
            f"{packed.device_mesh.size()} processes; tensor parallelism needs whole groups in "
            "each. Use fewer processes, or convert with a smaller group size."
        )


class Packed(nn.Module):
    """What packed modules have in common: `layouts`, by the name of the packed parameter.

    The scales of `name` are the parameter `<name>_scale`. Both are parameters rather than buffers,
    because tensor parallel plans and disk offload look at parameters only.
    """

    # A packed weight that is on meta (offloaded to disk) must not be drawn at random
    _is_hf_initialized = True

    @property
    @abstractmethod
    def layouts(self) -> dict[str, Layout]:
        """Name of each packed parameter -> how it is packed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Move, but never cast the scales: model.to(bfloat16) would change every weight."""
        before = {f"{name}_scale": getattr(self, f"{name}_scale").data for name in self.layouts}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in before.items():
            after = getattr(self, name)
            if after.dtype != scale.dtype:
                after.data = scale.to(after.device)
        return self


class Scale(nn.Parameter):
    """The scales of a packed weight, which a model must not take for a weight in its dtype.

    `model.dtype` is that of the first floating-point parameter, which could be the scales of a
    packed embedding, and `model.to(dtype)` casts all of those.
    """

    def is_floating_point(self) -> bool:
        return False


class TernaryLinear(Packed, nn.Linear):
    """A linear layer with a packed weight: ternary, or the sum of two ternary ones, or int8.

    weight        (out_features, width) uint8 (int8), as `Layout.width` counts
    weight_scale  (scale_rows, planes * groups) float, or uint8 codes
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
        if scale_rows is None:
            scale_rows = 1 if group_size == 0 else out_features
        shape = (out_features,)
        self.weight, self.weight_scale = _empty(
            shape, self.layouts["weight"], scale_rows, scale_dtype, device
        )
        empty = torch.empty(shape, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)

    @property
    def layouts(self) -> dict[str, Layout]:
        layout = Layout(
            self.in_features,
            self.group_size,
            self.transposed,
            self.activations,
            self.codec,
            self.planes,
            self.rotation,
        )
        return {"weight": layout}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out_features, in_features)."""
        return _weight(self.weight, self.weight_scale, self.layouts["weight"], dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) float -> (..., out_features), as `product`."""
        return product(input, self.weight, self.weight_scale, self.bias, self.layouts["weight"])

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


# --- modules of the model's own classes --------------------------------------------------------


class Mixed(Packed):
    """Packed parameters of a module whose class is the model's own, with this one mixed in.

    dense_class      the model's class
    mixin            the class that is mixed in
    ternary_layouts  of the module: its `layouts`
    """

    class_prefix: str  # of the name of the mixed class
    dense_class: type[nn.Module]
    mixin: "type[Mixed]"
    ternary_layouts: dict[str, Layout]

    @property
    def layouts(self) -> dict[str, Layout]:
        return self.ternary_layouts

    def __reduce__(self) -> Any:  # the class is made at run time: pickle cannot find it by name
        return _empty_mixed, (self.mixin, self.dense_class), self.__dict__


@functools.cache
def _mixed_class(mixin: type[Mixed], dense: type) -> Any:
    """The class of all modules that were of class `dense`, with `mixin` mixed in."""
    body = {"dense_class": dense, "mixin": mixin}
    return type(f"{mixin.class_prefix}{dense.__name__}", (mixin, dense), body)


def _empty_mixed(mixin: type, dense: type) -> Any:
    cls = _mixed_class(mixin, dense)
    return cls.__new__(cls)


# --- fused experts ---------------------------------------------------------------------------


@dataclass
class PackedMatrix:
    """A packed parameter that its model's code may use as if it were the dense tensor.

    packed  (experts, rows, width), or (rows, width) after indexing with an expert
    scale   (experts, scale_rows, groups) or (scale_rows, groups)
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
    def shape(self) -> torch.Size:
        *stack, rows, _ = self.packed.shape
        cols = self.layout.cols
        return torch.Size([*stack, cols, rows] if self.layout.transposed else [*stack, rows, cols])

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dense(self) -> Tensor:
        """The dense tensor, with the shape that the model's code expects."""
        if self.packed.ndim == 3:
            return torch.stack([self[expert].dense() for expert in range(len(self.packed))])
        dense = _weight(self.packed, self.scale, self.layout, self.dtype)
        return dense.T.contiguous() if self.layout.transposed else dense

    def _exposed(self) -> Tensor:
        if self.layout.activations != "none":
            raise UsageError(
                f"activations: {self.layout.activations!r}, but this model multiplies by all "
                "experts at once, where inputs cannot be rounded. Load it with activations='none'."
            )
        return self.dense()

    def __getitem__(self, index: Any) -> Any:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        if one and self.packed.ndim == 3:
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
            if func in right and matrix.packed.ndim == 2:
                return product(x, matrix.packed, matrix.scale, bias, matrix.layout)
            if func is F.embedding and matrix.packed.ndim == 2:
                options = kwargs or {}
                if len(args) > 3 or options.get("max_norm") is not None:
                    raise UsageError(
                        "max_norm: changes the rows that are looked up, but the embedding is "
                        "packed; expected none. Convert with --embeddings keep."
                    )
                return gather(x, matrix.packed, matrix.scale, matrix.layout, matrix.dtype)
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
    experts.ternary_layouts = {name: layout for name, (layout, _, _) in parameters.items()}


def dense_experts(module: TernaryExperts, dtype: torch.dtype) -> None:
    """The inverse of `ternary_experts`: dense parameters of `dtype`, in place."""
    for name, layout in module.layouts.items():
        scale = getattr(module, f"{name}_scale")
        dense = PackedMatrix(getattr(module, name), scale, layout, dtype).dense()
        delattr(module, f"{name}_scale")
        setattr(module, name, nn.Parameter(dense))
    del module.ternary_layouts
    module.__class__ = module.dense_class  # type: ignore[assignment]


# --- token embeddings ------------------------------------------------------------------------


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
    embedding.ternary_layouts = {"weight": layout}


def dense_embedding(module: PackedEmbedding, dtype: torch.dtype) -> None:
    """The inverse of `packed_embedding`: a dense weight of `dtype`, in place."""
    layout = module.layouts["weight"]
    dense = _weight(module.weight, module.weight_scale, layout, dtype)
    del module.weight_scale, module.weight_like, module.ternary_layouts
    module.weight = nn.Parameter(dense)
    module.__class__ = module.dense_class  # type: ignore[assignment]
