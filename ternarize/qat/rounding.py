"""A latent weight V read as a ternary one, with gradients.

    forward    W' = s t,      t = clip(round(V / s), -1, 1)
    backward   d W'/d V = 1,  d W'/d s = t - (V / s where |V / s| < 1.5, else 0)

The gradient goes straight through the rounding; that of the scale is the one of a learned step
size. s is what will be stored: it is rounded to the dtype of the file, with the gradient of what
was not. What else there is:

    clipped     d W'/d V = 0 where |V / s| >= 1.5: what is beyond the last level stays there
    tanh        t = (tanh(k (r - 1/2)) + tanh(k (r + 1/2))) / 2 with r = V / s, and its derivative;
                k grows during training, and in the end t is rounded
    blend b     W = (1 - b) V + b W', from a dense model (b = 0) to a ternary one (b = 1)
    threshold   t = sign(r) where |r| > threshold, else 0, for a share of zeros of one's own

Sources: straight-through, https://arxiv.org/abs/1308.3432; learned step sizes, LSQ,
https://arxiv.org/abs/1902.08153, eq. 3; absmean scales, BitNet b1.58,
https://arxiv.org/abs/2402.17764, eq. 1-3; least-squares scales, ternary weight networks,
https://arxiv.org/abs/1605.04711, eq. 4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ternarize.trits.rotation import unrotate
from ternarize.trits.ternary import split_groups

SCALES = ("learned", "absmean", "least-squares")
ESTIMATORS = ("ste", "clipped", "tanh")
EDGE = 1.5  # |V / s| from which V is beyond the last level
FLOOR = 1e-30  # of a scale that is divided by
FITS = 3  # rounds of the least-squares scale, which settles after few
_F16, _U8 = (2.0**-14, 65504.0), (2.0**-14, 61440.0)  # the ranges of stored scales


@dataclass(frozen=True)
class Form:
    """How a weight parameter is stored in the file, and how it is read while it is trained.

    transposed  the parameter is (..., cols, rows)
    block, seed of the rotation; block 0: none. The latent weight is what is stored: rotated
    scale       where the scale comes from: SCALES
    estimator   of the gradient: ESTIMATORS
    scale_dtype of the file: "F16", "F32" or "U8" (8 bits)
    """

    group_size: int
    transposed: bool = False
    block: int = 0
    seed: int = 0
    scale: str = "learned"
    estimator: str = "clipped"
    scale_dtype: str = "F16"

    def turn(self, parameter: Tensor) -> Tensor:
        """Between the parameter's orientation and (..., rows, cols)."""
        return parameter.transpose(-1, -2) if self.transposed else parameter

    def parameter(self, stored: Tensor) -> Tensor:
        """The parameter that the model multiplies by, from what is stored (both as it lies)."""
        if not self.block:
            return stored
        return self.turn(unrotate(self.turn(stored), self.block, self.seed)).contiguous()


def stored_scales(scales: Tensor, dtype: str) -> Tensor:
    """Scales as a file of this dtype gives them back: float32, any shape, with straight gradients.

    Those beyond its range are moved to its end; trits/scales.py has the rounding.
    """
    low, high = {"F16": _F16, "U8": _U8, "F32": (FLOOR, torch.finfo(torch.float32).max)}[dtype]
    exact = scales.detach().clamp(low, high)
    if dtype == "F16":
        exact = exact.to(torch.float16).to(torch.float32)
    elif dtype == "U8":  # three bits of the mantissa, at the middle the even one
        bits = exact.view(torch.int32)
        bits = bits + ((bits >> 20) & 1) + 0x7FFFF
        exact = (bits & ~0xFFFFF).view(torch.float32)
    return scales + (exact - scales).detach()


def scales_of(latent: Tensor, form: Form) -> Tensor:
    """The scales of "absmean" and "least-squares": (..., rows, cols) -> (..., rows, groups).

    (..., 1, 1) where group_size is 0. float32, without gradient, as stored.
    """
    magnitude = split_groups(latent.detach().to(torch.float32).abs(), form.group_size)
    cols = latent.shape[-1]
    if form.group_size == 0:
        magnitude = magnitude.flatten(-3).unsqueeze(-2).unsqueeze(-2)
        counts = magnitude.shape[-1]
    else:
        length = magnitude.shape[-1]
        sizes = torch.full(magnitude.shape[-2:-1], length, device=latent.device)
        sizes[-1] = cols - length * (len(sizes) - 1)
        counts = sizes  # type: ignore[assignment]
    scales = magnitude.sum(-1) / counts
    if form.scale == "least-squares":
        for _ in range(FITS):
            used = magnitude > scales.unsqueeze(-1) / 2
            scales = (magnitude * used).sum(-1) / used.sum(-1).clamp(min=1)
    return stored_scales(scales, form.scale_dtype)


def trits_of(latent: Tensor, scales: Tensor, group_size: int, threshold: Tensor | None) -> Tensor:
    """The trits that a forward uses, (..., rows, cols) int8."""
    ratio = _ratio(latent, scales, group_size)
    return _hard(ratio, threshold).flatten(-2)[..., : latent.shape[-1]].to(torch.int8)


def ternarized(
    latent: Tensor,
    scales: Tensor,
    form: Form,
    blend: Tensor | None = None,
    sharpness: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """W' of a latent weight, with the gradients of the module's docstring.

    latent     (..., rows, cols) float32
    scales     (..., rows, groups) float32, as stored; (..., 1, 1) for group_size 0
    blend, sharpness, threshold   scalars of the module's docstring; None: 1, infinite, 1/2

    Returns (..., rows, cols) float32, in the space of the file (rotated, if it is).
    """
    result: Tensor = _Ternarized.apply(
        latent, scales, blend, sharpness, threshold, form.group_size, form.estimator == "clipped"
    )
    return result


def rounded_inputs(x: Tensor) -> Tensor:
    """Inputs rounded to 8 bits per token, as a model with int8 activations has them.

        q = round(x 127 / max|x|),    x' = q max|x| / 127,    gradient straight through

    x  (..., cols) float; the same shape and dtype are returned. https://arxiv.org/abs/2402.17764
    """
    wide = x.detach().to(torch.float32)
    absmax = wide.abs().amax(-1, keepdim=True)
    q = (wide * 127 / torch.where(absmax == 0, 1, absmax)).round()
    return x + (q * (absmax / 127) - wide).to(x.dtype)


def _ratio(latent: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """V / s: (..., rows, groups, length)."""
    return split_groups(latent, group_size) / scales.clamp(min=FLOOR).unsqueeze(-1)


def _hard(ratio: Tensor, threshold: Tensor | None) -> Tensor:
    if threshold is None:
        return ratio.round().clamp(-1, 1)
    return ratio.sign() * (ratio.abs() > threshold)


class _Ternarized(torch.autograd.Function):
    """`ternarized`; keeps nothing but its inputs, and works the rest out again."""

    @staticmethod
    def forward(
        latent: Tensor,
        scales: Tensor,
        blend: Tensor | None,
        sharpness: Tensor | None,
        threshold: Tensor | None,
        group_size: int,
        clipped: bool,
    ) -> Tensor:
        ratio = _ratio(latent, scales, group_size)
        trits = _hard(ratio, threshold) if sharpness is None else _soft(ratio, sharpness)[0]
        value = (trits * scales.unsqueeze(-1)).flatten(-2)[..., : latent.shape[-1]]
        return value if blend is None else torch.lerp(latent, value, blend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.group_size, ctx.clipped = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        latent, scales, blend, sharpness, threshold = ctx.saved_tensors
        given = grads[0]
        ratio = _ratio(latent, scales, ctx.group_size)
        above = split_groups(given, ctx.group_size)
        inside = ratio.abs() < EDGE
        if sharpness is None:
            of_scale = _hard(ratio, threshold) - ratio * inside
            of_latent = above * inside if ctx.clipped else above
        else:
            trits, slope = _soft(ratio, sharpness)
            of_scale, of_latent = trits - ratio * slope, above * slope
        own = of_latent.flatten(-2)[..., : latent.shape[-1]]
        if blend is not None:
            own = torch.lerp(given, own, blend)
        to_scales = None
        if ctx.needs_input_grad[1]:
            to_scales = (above * of_scale).sum(-1)
            if to_scales.shape != scales.shape:  # one scale for the whole matrix
                to_scales = to_scales.sum((-1, -2), keepdim=True)
            if blend is not None:
                to_scales = to_scales * blend
        return own, to_scales, None, None, None, None, None


def _soft(ratio: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """Soft trits and their derivative by the ratio."""
    low, high = (torch.tanh(sharpness * (ratio + at)) for at in (-0.5, 0.5))
    return (low + high) / 2, sharpness * (2 - low * low - high * high) / 2
