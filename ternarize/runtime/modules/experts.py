"""Experts that a model fuses into one parameter (experts, rows, cols), packed.

They have no module of their own: the class of the module that holds them stays what it is, and
`self.gate_up_proj[expert]` is a matrix of its own (`PackedMatrix`), multiplied by the kernels on
the CPU, elsewhere dequantized when it meets an input. So only experts that are hit cost anything.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.runtime.forms import Layout
from ternarize.runtime.modules.matrix import Mixed, mixed_class
from ternarize.runtime.packed import empty_parameters


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
        return forward(self.stand_in(dtype), *args, **kwargs)

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
        shape = dense.shape[0], math.prod(dense.shape[1:]) // layout.cols
        packed, scale = empty_parameters(shape, layout, scale_rows, scale_dtype, dense.device)
        setattr(module, name, packed)
        setattr(module, f"{name}_scale", scale)
    experts: Any = module
    dense_class: type = type(module)
    experts.__class__ = mixed_class(TernaryExperts, dense_class)
    experts.layouts = {name: layout for name, (layout, _, _) in parameters.items()}


def dense_experts(module: TernaryExperts, dtype: torch.dtype) -> None:
    """The inverse of `ternary_experts`: dense parameters of `dtype`, in place."""
    for name in module.layouts:
        dense = module.matrix(name, dtype).dense()
        delattr(module, f"{name}_scale")
        setattr(module, name, nn.Parameter(dense))
    del module.layouts
    module.__class__ = module.dense_class  # type: ignore[assignment]
