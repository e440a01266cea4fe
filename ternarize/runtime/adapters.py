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
from torch.utils._pytree import tree_leaves, tree_map

from ternarize.errors import UsageError
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import Packed, packed_modules

_INSTEAD = (
    "Load the model with dequantize=True for that, or keep the adapter beside the packed model"
)


class DenseView(Tensor):
    """The weight of a packed layer as the float32 tensor (rows, cols) that it stands for.

    Its shape, dtype and device cost nothing. Every operation on it gets the dequantized weight, and
    those that would change it raise UsageError. So do those that would change a view of it (a row,
    the transpose), which is a DenseView that keeps its numbers in `seen`.
    """

    _is_param = True  # so that isinstance(weight, nn.Parameter), which PEFT asks
    module: TernaryLinear
    seen: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, module: TernaryLinear, seen: Tensor | None = None) -> "DenseView":
        if seen is None:
            seen_as = torch.empty(module.out_features, module.in_features, device="meta")
            device = module.held("weight").device
        else:
            seen_as, device = seen, seen.device
        view: DenseView = Tensor._make_wrapper_subclass(
            cls, seen_as.shape, seen_as.stride(), dtype=seen_as.dtype, device=device
        )
        view.module, view.seen, view._is_param = module, seen, seen is None
        return view

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _unchangeable(self.module)

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
        for target in tree_leaves(written):
            if isinstance(target, cls):
                raise _unchangeable(target.module)
        if func is torch.ops.aten.detach.default:
            return cls(args[0].module, args[0].seen)
        result = func(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if isinstance(args[0], cls) and any(a is not None and not a.is_write for a in aliases):
            return tree_map(lambda part: cls(args[0].module, part), result)  # its views
        return result


def _numbers(value: Any) -> Any:
    if not isinstance(value, DenseView):
        return value
    return value.module.dequantized(torch.float32) if value.seen is None else value.seen


def _unchangeable(module: TernaryLinear) -> UsageError:
    return UsageError(
        f"{type(module).__name__}({module.in_features}, {module.out_features})",
        "its weight is packed and cannot be changed, as merging an adapter, or an initialization "
        "from the weight, would",
        remedy=_INSTEAD,
    )


class AdaptedLinear(TernaryLinear):
    """A packed layer that an adapter wraps: `weight` shows it dense."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return DenseView(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what `self.weight = parameter` comes to. Packed ones may be put there (loading)."""
        if name == "weight" and (param is None or param.dtype != self.layouts[name].dtype):
            raise _unchangeable(self)
        super().register_parameter(name, param)


def _registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch whenever a module gets a child."""
    of_peft = any(cls.__module__.startswith("peft.") for cls in type(parent).__mro__)
    if of_peft and type(parent).__name__ == "OSFModel" and child is not None:
        _refuse_osf(child)
    if not isinstance(child, Packed):
        return
    if of_peft:
        _adapt(parent, name, child)
    elif type(child) is AdaptedLinear:
        child.__class__ = TernaryLinear  # type: ignore[assignment]


def _adapt(wrapper: nn.Module, name: str, layer: Packed) -> None:
    def refused(does: str, expected: str = "", remedy: str = _INSTEAD) -> UsageError:
        what = f"is packed, and {type(wrapper).__name__} of PEFT would {does}"
        return UsageError(type(layer).__name__, what, expected, remedy)

    if name == "original_module":
        raise refused("train a copy of it (modules_to_save)")
    if not isinstance(layer, TernaryLinear) or hasattr(wrapper, "parameter_name"):
        raise refused("change its parameters", "linear layers")
    if hasattr(layer.held("weight"), "to_local"):
        raise refused("need all of it; here it is cut into parts", remedy="Use one process")
    if type(layer) is TernaryLinear:
        layer.__class__ = AdaptedLinear


def _refuse_osf(model: nn.Module) -> None:
    """OSF looks at the weight before it wraps a layer, and passes over one that is in lanes."""
    if packed_modules(model):
        raise UsageError(
            "OSF",
            "the model has packed layers, which OSF of PEFT would leave out or cut at a wrong rank",
            "another method (LoRA)",
            _INSTEAD,
        )


def check_none(model: nn.Module) -> None:
    """Raise UsageError where an adapter wraps a layer of a model that is about to be saved."""
    adapted = [name for name, m in model.named_modules() if type(m) is AdaptedLinear]
    if adapted:
        raise UsageError(
            adapted[0],
            "an adapter wraps it, so that save_pretrained of the base model cannot name its weight",
            "layers without one",
            "Call save_pretrained of the PEFT model, or unload the adapter first",
        )


def watch() -> None:
    """See adapters come and go, from now on."""
    register_module_module_registration_hook(_registered)
