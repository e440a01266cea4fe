"""Two-dimensional convolutions with a packed weight, multiplied as linear layers are.

Of many places and few kernels patches cost more than their product: they are several times as large
as the images, and each is rounded. There the weight, which is far smaller than they are, is
dequantized for the length of one convolution of torch's, in the dtype of the input: never in
float16 where that does not hold its scales.
"""

import torch
from torch import Tensor, nn

from ternarize.runtime.forms import Layout, dense_weight
from ternarize.runtime.kernels import CORE_DTYPES
from ternarize.runtime.packed import Packed, empty_parameters
from ternarize.runtime.products import product
from ternarize.runtime.unfold import as_images, as_pair, patches_for
from ternarize.trits.base3 import BASE3

_PATCHES = 1 << 21  # numbers of patches that are in memory at a time, if an image has no more
# A weight costs as much to dequantize as so many numbers of patches, and a call as the second (both
# of benchmarks/images.py layers)
_WEIGHT, _CALL = 4, 1 << 17


class TernaryConv2d(Packed, nn.Conv2d):
    """A two-dimensional convolution with a packed weight, whose rows are its kernels.

    weight        (out_channels, width) uint8, as `Layout.width` counts; or in lanes
    weight_scale  (scale_rows, planes * groups) float, or uint8 codes; or in lanes
    bias          (out_channels,) or None

    Every output sees all inputs (groups 1). With activations "int8" each patch is rounded to 8 bits
    by itself, as a token of a linear layer is.

    Made empty, of a dense one that says its sizes, to be filled from a file: see `ternarize.load`.
    """

    def __init__(
        self,
        dense: nn.Conv2d,
        layout: Layout,
        scale_rows: int,
        scale_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Conv2d's, which would draw a dense weight
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))
        self.transposed = False
        self.layouts = {"weight": layout}
        self.weight, self.weight_scale = empty_parameters(
            (dense.out_channels,), layout, scale_rows, scale_dtype, device
        )
        bias = dense.bias
        if bias is not None:
            bias = nn.Parameter(torch.empty(bias.shape, device=device, dtype=bias.dtype))
        self.register_parameter("bias", bias)
        self.train(dense.training)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out_channels, in_channels, height, width)."""
        layout = self.layouts["weight"]
        dense = dense_weight(self.held("weight"), self.weight_scale, layout, dtype)
        return dense.reshape(len(dense), *layout.kernel)

    def forward(self, input: Tensor) -> Tensor:
        """(n, in_channels, height, width) float -> (n, out_channels, ...); or without n."""
        if input.ndim == 3:
            return self(input[None])[0]  # type: ignore[no-any-return]
        if self._rather_dense(input):
            bias = None if self.bias is None else self.bias.to(input.dtype)
            images = input.contiguous(memory_format=torch.channels_last)
            y: Tensor = self._conv_forward(images, self.dequantized(input.dtype), bias)
            return y
        found = [
            product(
                patches_for(images, self),
                self.held("weight"),
                self.weight_scale,
                self.bias,
                self.layouts["weight"],
            )
            for images in torch.split(input, self._at_once(input))
        ]
        return as_images(found[0] if len(found) == 1 else torch.cat(found))

    def _at_once(self, input: Tensor) -> int:
        """Images whose patches are in memory at a time: of many, or large ones, not all."""
        if torch.is_grad_enabled() and input.requires_grad:
            return max(1, len(input))
        return max(1, _PATCHES // max(1, self._patches(input)))

    def _patches(self, input: Tensor) -> int:
        """Numbers of the patches of one image, about."""
        down, across = as_pair(self.stride)
        places = (input.shape[-2] // down + 1) * (input.shape[-1] // across + 1)
        return places * self.layouts["weight"].cols

    def _rather_dense(self, input: Tensor) -> bool:
        """Whether a dense weight costs less than patches; never where these are to be rounded."""
        layout = self.layouts["weight"]
        served = input.device.type == "cpu" and input.dtype in CORE_DTYPES
        learns = torch.is_grad_enabled() and input.requires_grad
        if not served or learns or layout.activations != "none" or torch.compiler.is_compiling():
            return False
        if input.dtype == torch.float16 and not self._fits_float16():
            return False
        weights = self.out_channels * layout.cols
        return len(input) * self._patches(input) > _WEIGHT * weights + _CALL

    def _fits_float16(self) -> bool:
        """Whether each weight is a number of float16 as it is: none becomes 0 or infinite there."""
        layout, stored = self.layouts["weight"], self.weight_scale.dtype
        if layout.lanes is not None:
            stored = layout.lanes.scale_dtype
        return (
            layout.codec == BASE3 and layout.planes == 1 and stored in (torch.float16, torch.uint8)
        )

    def extra_repr(self) -> str:
        layout = self.layouts["weight"]
        inherited = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, group_size={layout.group_size}, activations={layout.activations}"


def dense_convolution(module: TernaryConv2d, dtype: torch.dtype) -> nn.Conv2d:
    """The convolution that the architecture has in the place of a packed one."""
    with torch.device("meta"):
        dense = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            as_pair(module.kernel_size),
            as_pair(module.stride),
            module.padding if isinstance(module.padding, str) else as_pair(module.padding),
            as_pair(module.dilation),
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
        )
    dense.weight = nn.Parameter(module.dequantized(dtype))
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    return dense.train(module.training)
