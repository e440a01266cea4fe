"""Linear layers with a packed weight."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ternarize.runtime import kernels
from ternarize.runtime.forms import Layout, dense_weight
from ternarize.runtime.kernels import CORE_DTYPES
from ternarize.runtime.packed import Packed, empty_parameters
from ternarize.runtime.products import product
from ternarize.trits.base3 import BASE3


class TernaryLinear(Packed, nn.Linear):
    """A linear layer with a packed weight: ternary, or the sum of two ternary ones, int8 or int4.

    weight        (out_features, width) uint8 (int8), as `Layout.width` counts; or in lanes
    weight_scale  (scale_rows, planes * groups) float, or uint8 codes; or in lanes
    bias          (out_features,) or None
    transposed    whether the model's own weight is (in_features, out_features), as GPT-2's Conv1D
    activations   "none" or "int8"
    codec         "base3", "int8" or "int4"
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
        self.weight, self.weight_scale = empty_parameters(
            shape, layout, scale_rows, scale_dtype, device
        )
        empty = torch.empty(shape, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out_features, in_features)."""
        return dense_weight(self.held("weight"), self.weight_scale, self.layouts["weight"], dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) float -> (..., out_features), as `product`."""
        return product(
            input, self.held("weight"), self.weight_scale, self.bias, self.layouts["weight"]
        )

    def extra_repr(self) -> str:
        shown = {"group_size": self.group_size, "activations": self.activations}
        plain = {"codec": BASE3, "planes": 1, "rotation": (0, 0)}
        shown |= {key: getattr(self, key) for key in plain if getattr(self, key) != plain[key]}
        return ", ".join([super().extra_repr(), *(f"{k}={v}" for k, v in shown.items())])


def prepared_linears(
    modules: Sequence[nn.Module], x: Tensor, outs: Sequence[Tensor]
) -> Callable[[], None] | None:
    """A call that sets outs to the outputs of layers that share the input x, without gradients.

    x     (..., in_features) float
    outs  (..., out_features) of x's dtype, of each layer

    None if they are no packed layers in lanes of one kind, which share the rounding of their input
    and the threads. The call knows the memory only: the caller keeps it.
    """
    shared = {_sharing(module) for module in modules}
    if len(shared) > 1 or None in shared or x.dtype not in CORE_DTYPES:
        return None
    layout: Layout = cast(TernaryLinear, modules[0]).layouts["weight"]
    assert layout.lanes is not None
    matrices: Any = [(m.weight, m.weight_scale, m.out_features) for m in modules]
    shape = layout.group_size, layout.lanes.form, layout.activations
    return kernels.prepared_lanes(x, matrices, outs, *shape, torch.get_num_threads())


def _sharing(module: nn.Module) -> tuple[Any, ...] | None:
    """What layers must have in common for `prepared_linears`; None of one that it cannot take."""
    if isinstance(module, TernaryLinear) and module.planes == 1 and module.bias is None:
        layout = module.layouts["weight"]
        if layout.lanes is not None and not layout.rotation[0]:
            return layout.lanes.form, layout.cols, layout.group_size, layout.activations
    return None
