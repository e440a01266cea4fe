"""What a block's weights are multiplied by, and what is added to their products.

`Trace` watches one forward of a block. It recognises a product with a weight by the weight's
memory, so it needs no list of module types: linear layers, GPT-2's transposed ones, convolutions
(of the patches that their kernels meet), and experts that are slices of a stack all end in a
product of torch. Weights that are multiplied by the same input form a sequential group ([q k v],
[gate up]); groups follow each other as they are run.

It also follows a product into the sums that it enters, usually the residual stream: in

    hidden = hidden + o_proj(x)        or        LayerNorm(dense(x) + hidden)

what matters is the sum, and when the other term carries the errors of all that was ternarized
before, this product can make up for them. With x, r the input and the other terms in the
ternarized stream and y', r' the product and terms in the float stream, the target of a weight is

    y = y' + r' - r        and its statistics are        H = sum x x^T,  Y = sum y x^T
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ternarize.runtime.unfold import as_pair, padded_as_told, patches_of


@dataclass
class Product:
    """One product with a weight: scale * (y = W x + bias) + terms is what the model goes on with.

    x (..., cols), y (..., rows), terms like y
    """

    name: str
    expert: int
    x: Tensor
    y: Tensor
    bias: Tensor | None = None
    source: tuple[int, ...] = ()  # tells inputs apart: weights of one group have the same
    terms: Tensor | None = None
    scale: float = 1.0
    sums: int = 0  # how many sums the forward had made when the last of its terms was added
    open: bool = True  # its sum has not been used for anything else yet


class _Enough(BaseException):
    """All that was asked for has been seen; not an Exception, which a model's code might catch."""


_LINEAR = {F.linear}
_MATMUL = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.__matmul__,
}
_ADDMM = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}
_CONVOLVE = {F.conv2d, torch.conv2d}
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


# in the order in which they are given by position
_OPERANDS = ("input", "mat1", "batch1", "mat2", "batch2", "other", "weight", "tensor2", "bias")
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_MUL = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_SAME = {
    F.dropout,
    torch.dropout,
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.contiguous,
    Tensor.to,
    Tensor.float,
    Tensor.type_as,
}


class Trace(TorchFunctionMode):
    """Records the products of a forward with the given weights.

    weights  name -> parameter, as it is in the block while it runs
    stop     called after each product or sum; when it returns True the forward is ended
    """

    def __init__(
        self, weights: Mapping[str, Tensor], stop: Callable[["Trace"], bool] | None = None
    ) -> None:
        super().__init__()
        self._names = {w.untyped_storage().data_ptr(): name for name, w in weights.items()}
        self._weights = weights
        self._stop = stop
        self.products: list[Product] = []
        self.sums = 0
        self._marked: dict[int, tuple[Tensor, list[Product]]] = {}
        self._held: list[Tensor] = []  # whose addresses are not given to other inputs

    def run(self, forward: Callable[[], Any]) -> Any:
        """Run a forward under the trace; returns its result, None if it was ended early."""
        try:
            with self:
                return forward()
        except _Enough:
            return None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ADD and len(args) >= 2 and not kwargs:
            return self._add(func, args)
        if args and _writes(func, kwargs):
            self._keep(args[0])
        result = func(*args, **kwargs)
        if func in _LINEAR or func in _MATMUL or func in _ADDMM:
            self._close(args)
            self._multiply(func, args, kwargs, result)
        elif func in _CONVOLVE:
            self._close(args)
            self._convolve(dict(zip(_CONVOLUTION, args, strict=False)) | kwargs, result)
        elif (func in _SAME or func in _MUL) and args and isinstance(result, Tensor):
            self._follow(func, args, result)
        elif isinstance(result, Tensor):
            self._close((*args, *kwargs.values()))
        return result

    def _multiply(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        operands = [*args, *(kwargs[name] for name in _OPERANDS if name in kwargs)]
        bias = operands.pop(0) if func in _ADDMM else None
        x, weight = operands[:2]
        if func in _LINEAR and len(operands) > 2:
            bias = operands[2]
        name = self._names.get(weight.untyped_storage().data_ptr())
        if name is None:
            return
        whole = self._weights[name]
        size = whole.shape[-1] * whole.shape[-2]
        source = (x.data_ptr(), x._version, x.shape[-1], x.numel())
        if weight.numel() == whole.numel() and whole.ndim == 3:  # all experts at once
            for expert in range(len(whole)):
                self.products.append(Product(name, expert, x[expert], result[expert]))
        elif weight.numel() == size:
            expert = weight.storage_offset() // size
            self.products.append(Product(name, expert, x, result, bias, source=source))
            if whole.ndim == 2:
                self._marked[id(result)] = (result, [self.products[-1]])
        self._check()

    def _convolve(self, given: Mapping[str, Any], result: Tensor) -> None:
        """A convolution is the product of its patches; with its bias no sum is followed."""
        name = self._names.get(given["weight"].untyped_storage().data_ptr())
        if name is None:
            return
        images, kernel = given["input"], as_pair(given["weight"].shape[2:])
        stride, dilation = (as_pair(given.get(each, 1)) for each in ("stride", "dilation"))
        around = padded_as_told(images, given.get("padding", 0), kernel, dilation)
        x = patches_of(around, kernel, stride, dilation)
        # patches are copies: without their images another input might get this address
        self._held.append(images)
        # the same images in other patches are other inputs; what is padded, and where, follows from
        # both sizes: only "same" pads by an odd number, and always behind
        place = images.data_ptr(), images._version, *images.shape, *images.stride()
        source = (*place, *around.shape[-2:], *kernel, *stride, *dilation)
        y = torch.movedim(result, 1, -1)
        self.products.append(Product(name, 0, x, y, given.get("bias"), source))
        self._check()

    def _keep(self, changed: Any) -> None:
        """What products were is kept from a change in place."""
        if not isinstance(changed, Tensor):
            return
        memory, copies = changed.untyped_storage().data_ptr(), dict[int, Tensor]()
        for product in self.products:
            for part in ("x", "y", "terms"):
                value = getattr(product, part)
                if value is not None and value.untyped_storage().data_ptr() == memory:
                    self._held.append(value)
                    setattr(product, part, copies.setdefault(id(value), value.clone()))

    def _close(self, values: Any) -> None:
        """A sum that is used for something else is complete."""
        for value in values:
            for product in self._marks(value):
                product.open = False

    def _follow(self, func: Any, args: Any, result: Tensor) -> None:
        """A view, a cast or a multiple of a product is still that product."""
        marks = self._marks(args[0])
        factor = 1.0
        if func in _MUL:
            other = args[1]
            if not marks and isinstance(other, Tensor):
                marks, other = self._marks(other), args[0]
            if isinstance(other, Tensor) and other.ndim:
                self._close(args)
                return
            factor = float(other)
        same = marks and result.numel() == args[0].numel() if isinstance(args[0], Tensor) else True
        if not marks or not same or factor == 0:
            return
        for product in marks:
            product.scale *= factor
            if product.terms is not None:
                product.terms = product.terms * factor
        self._marked[id(result)] = (result, marks)

    def _add(self, func: Any, args: Any) -> Any:
        a, b = args[0], args[1]
        ours, theirs = self._marks(a), self._marks(b)
        if func in _IN_PLACE:
            self._keep(a)
        if not (ours or theirs) or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return func(*args)
        if a.shape != b.shape:
            result = func(*args)
            if ours and isinstance(result, Tensor) and result.shape == a.shape and b.ndim <= 1:
                self._marked[id(result)] = (result, ours)  # a bias, the same in both streams
            else:
                self._close(args)
            return result
        a_terms = a.clone() if func in _IN_PLACE and theirs else a
        result = func(*args)
        for products, other in ((ours, b), (theirs, a_terms)):
            for product in products:
                if product.open:
                    other = other.reshape(product.y.shape)
                    product.terms = other if product.terms is None else product.terms + other
                    product.sums = self.sums + 1
        self._marked[id(result)] = (result, [p for p in ours + theirs if p.open])
        self.sums += 1
        self._check()
        return result

    def _marks(self, value: Any) -> list[Product]:
        return self._marked.get(id(value), (None, []))[1] if isinstance(value, Tensor) else []

    def _check(self) -> None:
        if self._stop is not None and self._stop(self):
            raise _Enough


def _writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes its first argument."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") or name == "__setitem__"
    return name.endswith("_") or bool(kwargs.get("inplace"))


@dataclass(frozen=True)
class Group:
    """Weights that are ternarized together: the same input, or a stack of experts.

    products  how many products with them a forward makes; 0: depends on the data
    sums      how many sums have been made when their last terms have been added
    alike     a number for each weight: those with the same have the same inputs throughout
    """

    names: tuple[str, ...]
    products: int
    sums: int
    alike: tuple[int, ...] = ()

    def lead(self, name: str, among: Container[str]) -> str:
        """The first weight, among some, that has the same inputs as this one."""
        if self.stack:
            return name
        number = dict(zip(self.names, self.alike, strict=True))
        return next(n for n in self.names if n in among and number[n] == number[name])

    @property
    def stack(self) -> bool:
        """Whether these are experts: which tokens reach them depends on the stream."""
        return self.products == 0

    def seen(self, trace: Trace) -> bool:
        """Whether a forward has gone far enough for this group."""
        made = sum(p.name in self.names for p in trace.products)
        return self.products > 0 and made >= self.products and trace.sums >= self.sums


def sequential_groups(trace: Trace, weights: Mapping[str, Tensor]) -> list[Group]:
    """The groups of a whole forward, in the order in which they are run."""
    members: list[list[str]] = []
    inputs: dict[tuple[int, ...], int] = {}
    place: dict[str, int] = {}
    # experts that are modules of their own see some of the tokens, in rows without a batch
    full = max((p.x.numel() // p.x.shape[-1] for p in trace.products), default=0)
    routed = {p.name for p in trace.products if p.x.ndim == 2 and len(p.x) < full}
    for product in trace.products:
        if product.name in place:
            continue
        stack = weights[product.name].ndim == 3 or product.name in routed
        key = product.source
        at = None if stack else inputs.get(key)
        if at is None:
            at = len(members)
            members.append([])
            if not stack:
                inputs[key] = at
        members[at].append(product.name)
        place[product.name] = at
    groups = []
    for names in members:
        own = [p for p in trace.products if p.name in names]
        stack = any(weights[n].ndim == 3 or n in routed for n in names)
        last = max((p.sums for p in own), default=0)
        sources = [[p.source for p in own if p.name == name] for name in names]
        alike = tuple(map(sources.index, sources))
        groups.append(Group(tuple(names), 0 if stack else len(own), last, alike))
    return groups
