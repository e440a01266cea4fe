"""Packed parameters of modules whose class is the model's own.

Its class is mixed with `Mixed`, and while its forward runs as it was written, `self` is a stand-in
in whose place of the packed parameters are matrices (`PackedMatrix`) that its code may use as if
they were dense.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ternarize.errors import UsageError
from ternarize.runtime.forms import Layout, dense_weight, stored_form
from ternarize.runtime.packed import Packed
from ternarize.runtime.products import gather, gather_bags, product

_TIMES = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


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

    def matrix(self, name: str, dtype: torch.dtype) -> "PackedMatrix":
        """A packed parameter, to be used as if it were dense."""
        packed, scale = self.held(name), self.held(f"{name}_scale")
        return PackedMatrix(packed, scale, self.layouts[name], dtype)

    def stand_in(self, dtype: torch.dtype) -> Any:
        """This module as the forward of its dense class sees it: packed parameters look dense.

        It is made for one call, so that the module itself never changes while it runs (threads may
        share it) and everyone else who asks for its parameters gets them packed.
        """
        dense = object.__new__(self.dense_class)
        names = {leaf for name in self.layouts for leaf in (name, f"{name}_scale")}
        others = {name: p for name, p in self._parameters.items() if name not in names}
        matrices = {name: self.matrix(name, dtype) for name in self.layouts}
        dense.__dict__.update(self.__dict__, _parameters=others, **matrices)
        return dense


@functools.cache
def mixed_class(mixin: type[Mixed], dense: type) -> Any:
    """The class of all modules that were of class `dense`, with `mixin` mixed in."""
    body = {"dense_class": dense, "mixin": mixin}
    return type(f"{mixin.class_prefix}{dense.__name__}", (mixin, dense), body)


def _empty_mixed(mixin: type, dense: type) -> Any:
    cls = mixed_class(mixin, dense)
    return cls.__new__(cls)


@dataclass
class PackedMatrix:
    """A packed parameter that its model's code may use as if it were the dense tensor.

    packed  (experts, rows, width), or (rows, width) after indexing with an expert; of lanes
            (experts, bytes), or (bytes,)
    scale   (experts, scale_rows, groups) or (scale_rows, groups); of lanes as `packed`
    dtype   of the dense tensor that it stands for

    `F.linear(x, m[expert])` and `x @ m[expert]` run `product`, `F.embedding(ids, m)` runs `gather`,
    `F.embedding_bag(ids, m)` `gather_bags`; any other use is served with the dense tensor: right
    for every model, if slow where all experts are used at once. Rounded activations need to see
    the product, and are refused where it is out of sight.
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
        dense = dense_weight(self.packed, self.scale, self.layout, self.dtype)
        return dense.T.contiguous() if self.layout.transposed else dense

    def _rows(self, ids: Tensor) -> Tensor:
        stored = stored_form(self.packed, self.scale, self.layout)
        return gather(ids, *stored, replace(self.layout, lanes=None), self.dtype)

    def _bags(self, ids: Tensor, options: dict[str, Any]) -> Tensor:
        padding = options.get("padding_idx")
        if padding is not None and padding < 0:
            options = {**options, "padding_idx": padding + self.shape[0]}
        return gather_bags(self._rows, ids, **options)

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
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x, matrix = args[0], args[1]
            transposed = matrix.layout.transposed
            if not matrix.stack and (func in _TIMES if transposed else func is F.linear):
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return product(x, matrix.packed, matrix.scale, bias, matrix.layout)
            if func in (F.embedding, F.embedding_bag) and not matrix.stack:
                if len(args) > 3 or kwargs.get("max_norm") is not None:
                    raise UsageError(
                        "max_norm",
                        "changes the rows that are looked up, but the embedding is packed",
                        "none",
                        "Convert with --embeddings keep",
                    )
                return matrix._rows(x) if func is F.embedding else matrix._bags(x, kwargs)
        return func(*_densified(args), **_densified(kwargs))


def _densified(value: Any) -> Any:
    if isinstance(value, PackedMatrix):
        return value._exposed()
    if isinstance(value, (list, tuple)):
        return type(value)(_densified(item) for item in value)
    if isinstance(value, dict):
        return {key: _densified(item) for key, item in value.items()}
    return value
