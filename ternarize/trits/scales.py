"""Scales in fewer bits: the upper part of a float16 (formats/container.md, 4.6).

That halves what scales cost where groups are small.
"""

import numpy as np
import torch
from torch import Tensor


def scale_codes(scales: Tensor) -> Tensor:
    """Scales rounded to 8 bits: the float16 numbers 1.mmm * 2^e, e = -14..15, and 0.

        code = bits of the float16 >> 7    (0, or 8..247: five bits of exponent, three of mantissa)

    scales  any shape, float, finite, >= 0; worked on in float64

    Returns uint8 of the same shape: the nearest in value, at the middle the even code; above 0 no
    less than 8 and no more than 247. Inverse: `scale_values`. formats/container.md, 4.6.
    """
    mantissa, exponent = torch.frexp(scales.to(torch.float64))  # 0.5 <= mantissa < 1
    step = (mantissa * 16).round()  # 8..16; torch rounds halves to even
    code = (exponent.to(torch.float64) + 14) * 8 + step - 8
    return torch.where(scales > 0, code.clamp(8, 247), 0).to(torch.uint8)


def scale_values(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored scales as numbers: float scales widened, and 8-bit codes looked up, both exact.

    scales  float, or uint8 codes (`scale_codes`)
    dtype   float32 or float64
    """
    if scales.dtype == torch.uint8:
        scales = (scales.to(torch.int16) << 7).view(torch.float16)
    return scales.to(dtype)


def to_float(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 -> `dtype`, rounded once to nearest even; torch goes to float16 through float32."""
    if dtype != torch.float16 or scales.dtype != torch.float64:
        return scales.to(dtype)
    with np.errstate(over="ignore"):  # the caller looks for infinities where there can be some
        half = torch.from_numpy(scales.cpu().numpy().astype(np.float16))
    return half.to(scales.device)
