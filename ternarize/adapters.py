"""Adapters (PEFT) beside packed layers.

An adapter is a small trainable module that wraps a layer of the model, which stays as it is. PEFT
takes `TernaryLinear` for an `nn.Linear`, so its wrappers come by themselves. Most only run the
layer. Others look at `layer.weight`: some need the numbers (DoRA its norms, LoHa its shape), some
put new ones there (merging, PiSSA). What lies there is bytes, in which neither makes sense. So
while an adapter wraps a packed layer, its `weight` is a `DenseView`:

    read       the dequantized weight, made for each operation and not kept
    written    refused (UsageError)

The layer itself, and all who go through its parameters (state_dict, saving, moving), keep the
packed ones. PEFT has no registry for layers of others, but torch tells when a module gets a child:
that is when a layer starts to be wrapped, and when `unload` puts it back.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_map

from ternarize.errors import UsageError
from ternarize.linear import Packed, TernaryLinear

_INSTEAD = (
    "Load the model with dequantize=True for that, or keep the adapter beside the packed model."
)


class DenseView(Tensor):
    """The weight of a packed layer as the float32 tensor (rows, cols) that it stands for.

    Its shape, dtype and device cost nothing. Every operation on it gets the dequantized weight, and
    those that would change it raise UsageError.
    """

    _is_param = True  # so that isinstance(weight, nn.Parameter), which PEFT asks
    module: TernaryLinear
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, module: TernaryLinear) -> "DenseView":
        shape, device = (module.out_features, module.in_features), module.held("weight").device
        view: DenseView = Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=device
        )
        view.module = module
        return view

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _is_packed(self.module)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [
            kwargs.get(argument.name, args[place] if place < len(args) else None)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for target in written:
            if isinstance(target, cls):
                raise _is_packed(target.module)
        if func is torch.ops.aten.detach.default:
            return cls(args[0].module)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def _dense(value: Any) -> Any:
    return value.module.dequantized(torch.float32) if isinstance(value, DenseView) else value


def _is_packed(module: TernaryLinear) -> UsageError:
    return UsageError(
        f"{type(module).__name__}({module.in_features}, {module.out_features}): its weight is "
        "packed and cannot be changed, as merging an adapter, or an initialization from the "
        f"weight, would. {_INSTEAD}"
    )


class AdaptedLinear(TernaryLinear):
    """A packed layer that an adapter wraps: `weight` shows it dense."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return DenseView(self)


def _registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch whenever a module gets a child."""
    if not isinstance(child, Packed):
        return
    if any(cls.__module__.startswith("peft.") for cls in type(parent).__mro__):
        _adapt(parent, name, child)
    elif type(child) is AdaptedLinear:
        child.__class__ = TernaryLinear  # type: ignore[assignment]


def _adapt(wrapper: nn.Module, name: str, layer: Packed) -> None:
    what = f"{type(layer).__name__}: is packed, and {type(wrapper).__name__} of PEFT would"
    if name == "original_module":
        raise UsageError(f"{what} train a copy of it (modules_to_save). {_INSTEAD}")
    if not isinstance(layer, TernaryLinear) or hasattr(wrapper, "parameter_name"):
        raise UsageError(f"{what} change its parameters; expected linear layers. {_INSTEAD}")
    if hasattr(layer.held("weight"), "to_local"):
        raise UsageError(f"{what} need all of it; here it is cut into parts. Use one process.")
    if type(layer) is TernaryLinear:
        layer.__class__ = AdaptedLinear


def watch() -> None:
    """See adapters come and go, from now on."""
    register_module_module_registration_hook(_registered)
