"""Scales as they are stored: in float16 where it holds them, or in 8 bits, its upper part
(formats/container.md, 4.6), which halves what scales cost where groups are small."""

import numpy as np
import torch
from torch import Tensor

from ternarize.errors import WeightError

_F16_NORMAL = (2.0**-14, 65504.0)  # below, float16 loses digits; above, it is infinite
_SCALE8 = (2.0**-14, 61440.0)  # the numbers of the codes 8 and 247


def scale_codes(scales: Tensor, bits: int = 8) -> Tensor:
    """Scales rounded to 8 bits: the float16 numbers 1.mmm * 2^e, e = -14..15, and 0.

        code = bits of the float16 >> 7    (0, or 8..247: five bits of exponent, three of mantissa)

    scales  any shape, float, finite, >= 0; worked on in float64
    bits    6: the even codes alone, of which 64 span 16 octaves; they take fewer bits where they
            are stored by their frequencies

    Returns uint8 of the same shape: the nearest in value, at the middle the even code; above 0 no
    less than 8 and no more than 247. Inverse: `scale_values`. formats/container.md, 4.6.
    """
    mantissa, exponent = torch.frexp(scales.to(torch.float64))  # 0.5 <= mantissa < 1
    unit = 2 if bits == 6 else 1
    step = (mantissa * (16 / unit)).round() * unit  # 8..16; torch rounds halves to even
    code = (exponent.to(torch.float64) + 14) * 8 + step - 8
    return torch.where(scales > 0, code.clamp(8, 248 - unit), 0).to(torch.uint8)


def rounded_scales(scales: Tensor, bits: int) -> Tensor:
    """What scales are once they are stored in 8 or 6 bits, float64; those beyond stay."""
    fit = (scales >= _SCALE8[0]) & (scales <= _SCALE8[1])
    return torch.where(fit, scale_values(scale_codes(scales, bits), torch.float64), scales)


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


def store_scales(scales: Tensor, *, exact: bool = False, bits: int = 16) -> Tensor:
    """Round float64 scales once, to nearest even, to the dtype in which they are stored.

    float16 if it holds all of them as normal numbers (or 0), else float32. With `exact`, the first
    of float16, bfloat16, float32 that holds every scale without rounding. With 8 or 6 `bits` uint8
    codes (`scale_codes`) if their numbers span all of the scales; with `exact`, if those of 8 bits
    are all of them.

    Raises WeightError on a scale beyond float32, which only weights in float64 can have.
    """
    single = scales.to(torch.float32)
    if bool(single.isinf().any()):
        raise WeightError(
            "scales",
            f"the largest is {float(scales.max()):.3g}",
            "at most 3.4e38, the largest float32",
            "Repair the source",
        )
    half = to_float(scales.cpu(), torch.float16)  # an infinite one is not chosen
    candidates = (half, scales.to(torch.bfloat16), single)
    if exact and bits < 16:
        codes = scale_codes(scales.cpu())
        if torch.equal(scale_values(codes, torch.float64), scales.cpu()):
            return codes
    if exact:
        return next(
            (c for c in candidates if torch.equal(c.to(torch.float64), scales.cpu())),
            candidates[-1],
        )
    positive = scales[scales > 0]
    if positive.numel() == 0:
        return half if bits == 16 else scale_codes(scales, bits)
    low, high = float(positive.min()), float(positive.max())
    if bits < 16 and _SCALE8[0] <= low and high <= _SCALE8[1]:
        return scale_codes(scales, bits)
    return half if _F16_NORMAL[0] <= low and high <= _F16_NORMAL[1] else single
