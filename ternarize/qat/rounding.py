"""A latent weight V read as a ternary one, or one of 8 or 4 bits, with gradients.

    forward    W' = s t,      t = sign(V) where |V| > s / 2, else 0
    backward   d W'/d V = 1,  d W'/d s = t - (V / s where |V / s| < 1.5, else 0)

The gradient goes straight through the rounding; that of the scale is the one of a learned step
size. s is what will be stored: it is rounded to the dtype of the file, with the gradient of what
was not. The trits come of a comparison, without dividing, so that every device and compiler gives
the same. What else there is:

    clipped     d W'/d V = 0 where |V / s| >= 1.5: what is beyond the last level stays there
    tanh        t = (tanh(k (r - h)) + tanh(k (r + h))) / 2 with r = V / s, and its derivatives;
                k grows during training, and in the end t is rounded
    blend b     W = (1 - b) V + b W', from a dense model (b = 0) to a ternary one (b = 1)
    threshold h t = sign(V) where |V| > h s, for a share of zeros of one's own; else 1/2

In 8 or 4 bits (`stepped`) W' = s q with q = clip(round(V / s), low, high); d W'/d V = 1 and
d W'/d s = q - V / s, but 0 and q where V / s is beyond low or high. Where q are numbers that stay,
d W'/d s = q.

Sources: straight-through, https://arxiv.org/abs/1308.3432; learned step sizes, LSQ,
https://arxiv.org/abs/1902.08153, eq. 3; absmean scales, BitNet b1.58,
https://arxiv.org/abs/2402.17764, eq. 1-3; least-squares scales, ternary weight networks,
https://arxiv.org/abs/1605.04711, eq. 4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ternarize import native
from ternarize.trits.base3 import BASE3
from ternarize.trits.int8 import INT8
from ternarize.trits.rotation import unrotate
from ternarize.trits.ternary import split_groups

SCALE_RULES = ("learned", "absmean", "least-squares")
ESTIMATORS = ("ste", "clipped", "tanh")
EDGE = 1.5  # |V / s| from which V is beyond the last level
FLOOR = 1e-30  # the least scale: one is divided by it
FITS = 3  # rounds of the least-squares scale, which settles after few
SCALE6_HIGH = 57344.0  # the largest scale of 6 bits
CORE_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# the scales that a file of a dtype holds with all digits
RANGES = {
    "F16": (2.0**-14, 65504.0),
    "U8": (2.0**-14, 61440.0),
    "F32": (FLOOR, torch.finfo(torch.float32).max),
}


@dataclass(frozen=True)
class Form:
    """How a weight parameter is stored in the file, and how it is read while it is trained.

    transposed  the parameter is (..., cols, rows)
    block, seed of the rotation; block 0: none. The latent weight is what is stored: rotated
    scale       where the scale comes from: SCALE_RULES
    estimator   of the gradient: ESTIMATORS
    scale_dtype of the file: "F16", "F32" or "U8", of `scale_bits`: 8 or 6
    codec       "base3" (ternary); "int8" or "int4", whose scales are learned, without a rotation
    kernel      of a convolution, whose parameter is (rows, *kernel); () of others
    """

    group_size: int
    transposed: bool = False
    block: int = 0
    seed: int = 0
    scale: str = "learned"
    estimator: str = "clipped"
    scale_dtype: str = "F16"
    codec: str = BASE3
    kernel: tuple[int, ...] = ()
    scale_bits: int = 8

    def turn(self, parameter: Tensor) -> Tensor:
        """Between the parameter's orientation and (..., rows, cols)."""
        if self.kernel:
            flat = parameter.ndim == 2
            return torch.unflatten(parameter, 1, self.kernel) if flat else parameter.flatten(1)
        return parameter.transpose(-1, -2) if self.transposed else parameter

    def parameter(self, stored: Tensor) -> Tensor:
        """The parameter that the model multiplies by, from what is stored (both as it lies)."""
        if not self.block:
            return stored
        return self.turn(unrotate(self.turn(stored), self.block, self.seed)).contiguous()


def stored_scales(scales: Tensor, dtype: str, bits: int = 8) -> Tensor:
    """Scales as a file of this dtype gives them back: float32, any shape, with straight gradients.

    bits  of dtype "U8": 8 or 6

    Those beyond its range are moved to its end; trits/scales.py has the rounding.
    """
    low, high = RANGES[dtype]
    fewer = dtype == "U8" and bits == 6
    exact = scales.detach().clamp(low, SCALE6_HIGH if fewer else high)
    if dtype != "F32":  # of the mantissa 10, 3 or 2 bits stay, at the middle the even one
        # by whole numbers: compilers leave out that a number was narrower in between
        rest = 13 if dtype == "F16" else 21 if fewer else 20
        word = exact.view(torch.int32)
        word = word + ((word >> rest) & 1) + ((1 << (rest - 1)) - 1)
        exact = (word >> rest << rest).view(torch.float32)
    return _straight(scales, exact)


def scales_of(latent: Tensor, form: Form) -> Tensor:
    """The scales of "absmean" and "least-squares": (..., rows, cols) -> (..., rows, groups).

    (..., 1, 1) where group_size is 0. float32, without gradient, as stored.
    """
    magnitude = latent.detach().to(torch.float32).abs()
    if form.group_size == 0:
        groups = magnitude.flatten(-2)[..., None, None, :]
        counts = torch.tensor(float(groups.shape[-1]))
    else:
        groups = split_groups(magnitude, form.group_size)
        counts = torch.full(groups.shape[-2:-1], float(groups.shape[-1]))
        counts[-1] -= groups.shape[-2] * groups.shape[-1] - latent.shape[-1]
    scales = groups.sum(-1) / counts.to(latent.device)
    if form.scale == "least-squares":
        for _ in range(FITS):
            used = groups > scales.unsqueeze(-1) / 2
            scales = (groups * used).sum(-1) / used.sum(-1).clamp(min=1)
    return stored_scales(scales, form.scale_dtype, form.scale_bits)


def edge_of(ratios: Tensor, rank: int) -> float:
    """A threshold that `rank` of some |V / s|, flat, are below: between two, so that none is on it.

    0.0 for rank 0; of equal ones more may be.
    """
    if not rank:
        return 0.0
    below = float(ratios.kthvalue(rank).values)
    above = float(ratios.kthvalue(rank + 1).values) if rank < len(ratios) else 2 * below
    return (below + above) / 2


def trits_of(latent: Tensor, scales: Tensor, group_size: int, threshold: Tensor | None) -> Tensor:
    """The trits that a forward uses, (..., rows, cols) int8."""
    trits = _hard(split_groups(latent, group_size), scales.unsqueeze(-1), threshold)
    return trits.flatten(-2)[..., : latent.shape[-1]].to(torch.int8)


def ternarized(
    latent: Tensor,
    scales: Tensor,
    form: Form,
    blend: Tensor | None = None,
    sharpness: Tensor | None = None,
    threshold: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W' of a latent weight, with the gradients of the module's docstring.

    latent     (..., rows, cols) float32
    scales     (..., rows, groups) float32, as stored; (..., 1, 1) for group_size 0
    blend, sharpness, threshold   scalars of the module's docstring; None: 1, infinite, 1/2

    Returns (..., rows, cols) of `dtype`, in the space of the file (rotated, if it is).
    """
    clipped = form.estimator == "clipped"
    if blend is None and sharpness is None and threshold is None:
        plain: Tensor = _Plain.apply(latent, scales, form.group_size, clipped, dtype)  # type: ignore[no-untyped-call]
        return plain
    arguments = (latent, scales, blend, sharpness, threshold, form.group_size, clipped, dtype)
    result: Tensor = _Ternarized.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def stepped(
    latent: Tensor, scales: Tensor, form: Form, dtype: torch.dtype = torch.float32
) -> Tensor:
    """W' of a weight in 8 or 4 bits, with the gradients of the module's docstring.

    latent     (..., rows, cols) float32; or int8, the numbers themselves (`numbers_of`), which stay
    scales     (..., rows, groups) float32, positive, as stored but for their signs

    Returns (..., rows, cols) of `dtype`.
    """
    groups, level = split_groups(latent, form.group_size), scales.unsqueeze(-1)
    numbers = groups.to(level.dtype)
    if latent.dtype != torch.int8:
        inside = _clipped(groups, level, form.codec)
        numbers = _straight(inside, inside.detach().round())
    return (numbers * level).flatten(-2)[..., : latent.shape[-1]].to(dtype)


def numbers_of(latent: Tensor, scales: Tensor, form: Form) -> Tensor:
    """The numbers q that a forward of `stepped` uses, (..., rows, cols) int8."""
    if latent.dtype == torch.int8:
        return latent
    groups = split_groups(latent, form.group_size)
    inside = _clipped(groups, scales.unsqueeze(-1), form.codec)
    return inside.round_().flatten(-2)[..., : latent.shape[-1]].to(torch.int8)


def _clipped(groups: Tensor, level: Tensor, codec: str) -> Tensor:
    """V / s within the numbers of a codec: of int4 there is one more on the side of the largest."""
    if codec == INT8:
        return (groups / level).clamp(-127, 127)
    low, high = groups.detach().aminmax(dim=-1, keepdim=True)
    up = high > -low
    ratio: Tensor = (groups / level).clamp(torch.where(up, -7.0, -8.0), torch.where(up, 8.0, 7.0))
    return ratio


def rounded_inputs(x: Tensor) -> Tensor:
    """Inputs rounded to 8 bits per token, as a model with int8 activations has them.

        q = round(x 127 / max|x|),    x' = q max|x| / 127,    gradient straight through

    x  (..., cols) float; the same shape and dtype are returned. https://arxiv.org/abs/2402.17764
    """
    wide = x.detach().to(torch.float32)
    absmax = wide.abs().amax(-1, keepdim=True)
    q = (wide * 127).div_(torch.where(absmax == 0, 1, absmax)).round_()
    return _straight(x, q.mul_(absmax / 127).to(x.dtype))


def _straight(x: Tensor, value: Tensor) -> Tensor:
    """`value`, to the last bit, with the gradient of x."""
    result: Tensor = _Straight.apply(x, value)  # type: ignore[no-untyped-call]
    return result


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _hard(groups: Tensor, level: Tensor, threshold: Tensor | None) -> Tensor:
    """Trits as floats (a zero may have a sign) of groups (..., length) with scales (..., 1)."""
    edge = level * (0.5 if threshold is None else threshold)
    return groups.abs().gt_(edge).copysign_(groups)


def _scale_gradients(
    trits: Tensor, above: Tensor, ratio: Tensor, inner: Tensor, scales: Tensor
) -> Tensor:
    """Those by scales, in their shape, of groups (..., length); trits are used up."""
    found = trits.mul_(above).addcmul_(ratio, inner, value=-1).sum(-1)
    whole = found.shape != scales.shape  # one scale for the whole matrix
    return found.sum((-1, -2), keepdim=True) if whole else found


def _soft(ratio: Tensor, sharpness: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """Soft trits and their derivative by the ratio."""
    at = 0.5 if threshold is None else threshold
    low, high = torch.tanh(sharpness * (ratio - at)), torch.tanh(sharpness * (ratio + at))
    return (low + high) / 2, sharpness * (2 - low * low - high * high) / 2


# Operators of their own, in one pass over memory where the core is there. A compiler makes no
# vectors of their formulas on a CPU, since the index of a scale is a quotient of that of a weight.
@torch.library.custom_op("ternarize::read_latent", mutates_args=())
def _read_latent(latent: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """s t of latent weights by the plain rule, (..., rows, cols) of `dtype`."""
    if native.lib is None or not _fits_core(latent, scales, group_size, dtype):
        groups, level = split_groups(latent, group_size), scales.unsqueeze(-1)
        value = _hard(groups, level, None).mul_(level)
        return value.flatten(-2)[..., : latent.shape[-1]].to(dtype).contiguous()
    out = torch.empty_like(latent, dtype=dtype)
    rows, levels = latent.flatten(0, -2), scales.flatten(0, -2).contiguous()
    kind, threads = CORE_KINDS[dtype], torch.get_num_threads()
    native.lib.read_latent(rows, levels, group_size, out.flatten(0, -2), kind, threads)
    return out


@_read_latent.register_fake
def _(latent: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    return latent.new_empty(latent.shape, dtype=dtype)


@torch.library.custom_op("ternarize::latent_gradients", mutates_args=())
def _latent_gradients(
    given: Tensor, latent: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Of a gradient by s t: that by latent weights, clipped, and that by scales; both float32."""
    if native.lib is None or not _fits_core(latent, scales, group_size, given.dtype):
        groups, level = split_groups(latent, group_size), scales.unsqueeze(-1)
        above, ratio = split_groups(given, group_size), groups / level
        inner = ratio.abs().lt_(EDGE).mul_(above)
        to_scales = _scale_gradients(_hard(groups, level, None), above, ratio, inner, scales)
        return inner.flatten(-2)[..., : latent.shape[-1]].contiguous(), to_scales.contiguous()
    to_latent, to_scales = torch.empty_like(latent), torch.empty(scales.shape)
    rows, levels = latent.flatten(0, -2), scales.flatten(0, -2).contiguous()
    whole = given.contiguous().flatten(0, -2)
    outs = to_latent.flatten(0, -2), to_scales.flatten(0, -2)
    kind, threads = CORE_KINDS[given.dtype], torch.get_num_threads()
    native.lib.latent_gradients(rows, levels, group_size, whole, kind, EDGE, *outs, threads)
    return to_latent, to_scales


@_latent_gradients.register_fake
def _(given: Tensor, latent: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return latent.new_empty(latent.shape), scales.new_empty(scales.shape)


def _fits_core(latent: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> bool:
    """Whether the core has an operator for such weights."""
    usual = latent.dtype == scales.dtype == torch.float32 and dtype in CORE_KINDS
    of_groups = group_size != 0 and latent.shape[:-1] == scales.shape[:-1]
    return usual and of_groups and latent.device.type == "cpu" and latent.is_contiguous()


class _Plain(torch.autograd.Function):
    """`ternarized` by the plain rule: no blend, nothing soft, no threshold of its own."""

    @staticmethod
    def forward(
        latent: Tensor, scales: Tensor, group_size: int, clipped: bool, dtype: torch.dtype
    ) -> Tensor:
        found: Tensor = _read_latent(latent, scales, group_size, dtype)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.group_size, ctx.clipped = inputs[2:4]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        latent, scales = ctx.saved_tensors
        to_latent, to_scales = grads[0], None
        if ctx.clipped or ctx.needs_input_grad[1]:
            to_latent, to_scales = _latent_gradients(grads[0], latent, scales, ctx.group_size)
        if not ctx.clipped:
            to_latent = grads[0].to(latent.dtype)
        return to_latent, to_scales if ctx.needs_input_grad[1] else None, None, None, None


class _Ternarized(torch.autograd.Function):
    """`ternarized`; keeps nothing but its inputs, and works the rest out again.

    What is worked out is changed in place: new memory of a weight's size costs more than the sums.
    """

    @staticmethod
    def forward(
        latent: Tensor,
        scales: Tensor,
        blend: Tensor | None,
        sharpness: Tensor | None,
        threshold: Tensor | None,
        group_size: int,
        clipped: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        groups, level = split_groups(latent, group_size), scales.unsqueeze(-1)
        if sharpness is None:
            value = _hard(groups, level, threshold).mul_(level)
        else:
            value = _soft(groups / level, sharpness, threshold)[0].mul_(level)
        value = value.flatten(-2)[..., : latent.shape[-1]]
        return (value if blend is None else torch.lerp(latent, value, blend)).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.group_size, ctx.clipped = inputs[5:7]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        latent, scales, blend, sharpness, threshold = ctx.saved_tensors
        given = grads[0]
        groups, level = split_groups(latent, ctx.group_size), scales.unsqueeze(-1)
        above, ratio = split_groups(given, ctx.group_size), groups / level
        if sharpness is None:
            trits = _hard(groups, level, threshold)
            inner = ratio.abs().lt_(EDGE).mul_(above)
        else:
            trits, slope = _soft(ratio, sharpness, threshold)
            inner = slope.mul_(above)
        to_latent, to_scales = given, None
        if sharpness is not None or ctx.clipped:
            to_latent = inner.flatten(-2)[..., : latent.shape[-1]]
        if ctx.needs_input_grad[1]:
            to_scales = _scale_gradients(trits, above, ratio, inner, scales)
            if blend is not None:
                to_scales = to_scales * blend
        if blend is not None:
            to_latent = torch.lerp(given.to(to_latent.dtype), to_latent, blend)
        return to_latent.to(latent.dtype), to_scales, None, None, None, None, None, None
