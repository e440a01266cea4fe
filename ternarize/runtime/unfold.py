"""The patches of images that the kernels of a convolution meet, as rows of a matrix.

A convolution is a product: of its patches (places, in * height * width) with the matrix whose rows
are its kernels, (out, in * height * width). A patch holds what a kernel meets in the order in which
the kernel lies, channel by channel. The compiled core copies them (ternarize/csrc/unfold); what
they are is said by `patches_of`, in torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternarize.native import lib
from ternarize.runtime.kernels import CORE_DTYPES

Size = tuple[int, int]


def patches_of(x: Tensor, kernel: Size, stride: Size = (1, 1), dilation: Size = (1, 1)) -> Tensor:
    """The patches of images that are padded already.

    x       (n, channels, height, width) float
    kernel, stride, dilation   (height, width), as of nn.Conv2d

    Returns (n, places down, places across, channels * kernel height * kernel width), in x's dtype.
    """
    found = x
    for axis, size, step, reach in zip((2, 3), kernel, stride, dilation, strict=True):
        # windows of what a kernel reaches over; of these the places that it meets
        found = found.unfold(axis, reach * (size - 1) + 1, step)[..., ::reach]
    return found.permute(0, 2, 3, 1, 4, 5).flatten(3)


def patches_for(x: Tensor, module: nn.Conv2d) -> Tensor:
    """The patches that a convolution of torch's, or one of ours, meets in its input.

    x  (n, in_channels, height, width); what comes back is as of `patches_of`
    """
    sides: Any = module._reversed_padding_repeated_twice
    sizes = (as_pair(each) for each in (module.kernel_size, module.stride, module.dilation))
    kernel, stride, dilation = sizes
    if module.padding_mode == "zeros" and kernel != (1, 1) and _fits_core(x):
        return _by_core(x, kernel, stride, dilation, sides)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return patches_of(F.pad(x, sides, mode) if any(sides) else x, kernel, stride, dilation)


def _fits_core(x: Tensor) -> bool:
    return (
        lib is not None
        and x.device.type == "cpu"
        and x.dtype in CORE_DTYPES
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
    )


def _by_core(
    x: Tensor, kernel: Size, stride: Size, dilation: Size, sides: tuple[int, int, int, int]
) -> Tensor:
    """`patches_of` with zeros around the images: left, right, above, below."""
    assert lib is not None
    images = x.detach().permute(0, 2, 3, 1).contiguous()
    left, right, above, below = sides
    spans = (above + below, left + right)
    places = [
        (size + more - reach * (k - 1) - 1) // step + 1
        for size, more, k, step, reach in zip(
            x.shape[2:], spans, kernel, stride, dilation, strict=True
        )
    ]
    out = x.new_empty(len(x), *places, x.shape[1] * kernel[0] * kernel[1])
    # flat first: with one channel a contiguous tensor may have strides that no view as bytes takes
    memory = [each.view(-1).view(torch.uint8) for each in (images, out)]
    lib.unfold(
        memory[0],
        images.shape,
        kernel,
        stride,
        dilation,
        (above, below, left, right),
        x.element_size(),
        memory[1],
        torch.get_num_threads(),
    )
    return out


def as_pair(value: Any) -> Size:
    """A size of a convolution, given as one number or as two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def padded_as_told(x: Tensor, padding: Any, kernel: Size, dilation: Size) -> Tensor:
    """Images with zeros around them, as the argument `padding` of F.conv2d says."""
    if padding == "valid":
        return x
    if padding == "same":
        whole = [reach * (k - 1) for reach, k in zip(dilation, kernel, strict=True)]
        sides = [part for n in reversed(whole) for part in (n // 2, n - n // 2)]
        return F.pad(x, sides)
    down, across = as_pair(padding)
    return F.pad(x, (across, across, down, down)) if down or across else x


def as_images(rows: Tensor) -> Tensor:
    """What a product of patches gives, (n, down, across, out), as images (n, out, down, across).

    A view: they lie in memory with the channels last, as torch's own convolutions may have them.
    """
    return torch.movedim(rows, -1, 1)
