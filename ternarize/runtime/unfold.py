"""The patches of images that the kernels of a convolution meet, as rows of a matrix.

A convolution is a product: of its patches (places, in * height * width) with the matrix whose rows
are its kernels, (out, in * height * width). A patch holds what a kernel meets in the order in which
the kernel lies, channel by channel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def padded(x: Tensor, module: nn.Conv2d) -> Tensor:
    """Images with what a convolution puts around them, (n, channels, height, width)."""
    sides: Any = module._reversed_padding_repeated_twice
    if not any(sides):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sides, mode)


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
