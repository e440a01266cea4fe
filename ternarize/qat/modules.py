"""Modules whose weights are latent: trained as they are, read as ternary ones, or in 8 or 4 bits.

A module keeps its class's ways, the names of its parameters and its hooks; its class becomes a
subclass of itself (`qat_class`), so that an optimizer, DDP, FSDP2, PEFT and a state dict see an
ordinary model. Learned scales are one more parameter beside each weight, `weight_log_scale`.

Of a head and an embedding in 8 or 4 bits the numbers may stay, and their scales alone be trained:
the parameter is then int8. int4 in a file has scales of either sign, and numbers -8..7; here scales
are positive, and the numbers of a group -8..7 or -7..8.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ternarize.errors import UsageError
from ternarize.files.headers import DTYPES
from ternarize.models.skeleton import is_convolution, is_linear
from ternarize.qat.rounding import (
    FLOOR,
    RANGES,
    Form,
    numbers_of,
    rounded_inputs,
    scales_of,
    stepped,
    stored_scales,
    ternarized,
    trits_of,
)
from ternarize.runtime.products import gather_bags
from ternarize.runtime.unfold import as_images, patches_for
from ternarize.trits.base3 import BASE3
from ternarize.trits.int4 import INT4
from ternarize.trits.rotation import unrotate
from ternarize.trits.ternary import largest_of_groups, scaled, split_groups

LOG_SCALE = "_log_scale"  # after the weight's name
SCHEDULED = ("blend", "sharpness", "threshold")


class Qat(nn.Module):
    """Mixed into the class of a module with latent weights.

    forms        parameter -> how it is read
    activations  "int8": inputs are rounded, too; "none"
    compute_dtype   that a rounded weight gets: the one that the parameter had before
    sharing      parameter -> all places that have it: (module, its name there)
    blend, sharpness, threshold   scalars of rounding.py, or None; see `Schedule`
    """

    forms: dict[str, Form]
    activations: str
    compute_dtype: torch.dtype
    sharing: dict[str, "list[tuple[Qat, str]]"]
    made_of: "tuple[type[Qat], type[nn.Module]]"
    blend: Tensor | None
    sharpness: Tensor | None
    threshold: Tensor | None

    def __reduce__(self) -> Any:  # the class is made at run time: pickle cannot find it by name
        return _empty, self.made_of, self.__getstate__()  # type: ignore[no-untyped-call]

    def latent(self, name: str) -> Tensor:
        """The trained weight, (..., rows, cols) float32; int8 where it is numbers that stay.

        Raises UsageError where it was cast: trits of other weights than those would be trained.
        """
        return self.forms[name].turn(self._whole(name))

    def _whole(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        if parameter.dtype not in (torch.float32, torch.int8):
            raise UsageError(
                f"{type(self).__name__}.{name}",
                f"is {str(parameter.dtype)[6:]}",
                "float32, of which the trits and scales are made",
                "Compute in 16 bits by autocast (bf16=True of Trainer) instead of casting the "
                "model; with FSDP2 by MixedPrecisionPolicy(param_dtype=None)",
            )
        if hasattr(parameter, "full_tensor"):  # cut by FSDP2, and looked at outside of a forward
            whole: Tensor = parameter.full_tensor()
            return whole
        return parameter

    def scales(self, name: str) -> Tensor:
        """Its scales as stored, (..., rows, groups) float32."""
        form = self.forms[name]
        if form.scale != "learned":
            return scales_of(self.latent(name), form)
        scales = self._whole(name + LOG_SCALE).exp()
        return stored_scales(scales, form.scale_dtype, form.scale_bits)

    def rounded(self, name: str) -> Tensor:
        """The weight as a forward uses it, in the parameter's shape."""
        form = self.forms[name]
        return form.turn(self.read(self.latent(name), self.scales(name), form))

    def rows(self, name: str, ids: Tensor, padding: int | None = None) -> Tensor:
        """Some rows of a matrix as a forward uses them: of those alone they are worked out.

        ids      of the rows, int64 of any shape; (..., cols) is returned
        padding  the one that gets no gradient
        """
        form = self.forms[name]
        latent = F.embedding(ids, self.latent(name), padding)
        if form.scale == "learned":  # its logarithms are looked up, the rest is theirs alone
            log_scale = self._whole(name + LOG_SCALE)
            few = log_scale.shape[-2] == 1
            some = log_scale if few else F.embedding(ids, log_scale, padding)
            stored = stored_scales(some.exp(), form.scale_dtype, form.scale_bits)
            return self.read(latent, stored, form)
        scales = self.scales(name)
        scales = F.embedding(ids, scales) if scales.shape[-2] > 1 else scales
        return self.read(latent, scales, form)

    def read(self, latent: Tensor, scales: Tensor, form: Form) -> Tensor:
        """Latent rows as a forward uses them: (..., rows, cols)."""
        if form.codec != BASE3:
            return stepped(latent, scales, form, self.compute_dtype)
        scalars = self.blend, self.sharpness if self.training else None, self.threshold
        if not form.block:
            return ternarized(latent, scales, form, *scalars, dtype=self.compute_dtype)
        # s t with scales of 8 bits is exact in bfloat16, whose products are added up in float32
        exact = form.scale_dtype == "U8" and scalars[:2] == (None, None)
        narrow = exact and self.compute_dtype == torch.bfloat16
        dtype = torch.bfloat16 if narrow else torch.float32
        with torch.autocast(latent.device.type, enabled=False):
            weight = ternarized(latent, scales, form, *scalars, dtype=dtype)
            return unrotate(weight, form.block, form.seed).to(self.compute_dtype)

    def trits_and_scales(self, name: str) -> tuple[Tensor, Tensor]:
        """What is to be stored: trits int8 (..., rows, cols) and scales (..., rows, groups)."""
        with torch.no_grad():
            form, latent, scales = self.forms[name], self.latent(name), self.scales(name)
            return trits_of(latent, scales, form.group_size, self.threshold), scales

    @torch.no_grad()
    def numbers_and_scales(self, name: str) -> tuple[Tensor, Tensor]:
        """The same of a matrix in 8 or 4 bits, as the file has them: zeros alone have scale 0."""
        form, scales = self.forms[name], self.scales(name)
        numbers = numbers_of(self.latent(name), scales, form)
        groups = split_groups(numbers, form.group_size)
        scales = scales * groups.ne(0).any(-1)
        if form.codec == INT4:
            side = torch.where((groups == 8).any(-1), -1, 1)
            scales, groups = scales * side, groups * side.to(torch.int8).unsqueeze(-1)
        numbers = groups.flatten(-2)[..., : numbers.shape[-1]].contiguous()
        return numbers, scales.to(DTYPES[form.scale_dtype])

    def set_numbers(self, name: str, numbers: Tensor, scales: Tensor) -> None:
        """Put numbers and scales as in a file in the place of a weight in 8 or 4 bits.

        A latent weight becomes what they stand for; numbers that stay, the numbers.
        """
        form, wide = self.forms[name], scales.to(torch.float32)
        weight = scaled(numbers, wide.sign().to(torch.int8), form.group_size)
        if self.latent(name).dtype != torch.int8:
            weight = scaled(weight, wide.abs(), form.group_size)
        self.put(name, form.turn(weight), wide.abs())

    def set_stored(self, name: str, stored: Tensor) -> None:
        """Put s t, in the parameter's orientation and the space of the file, in the weight's place.

        The latent weight becomes it, so that what is learnt of the margins is gone; the scales are
        its own from here on, whatever rule they came from.
        """
        form = self.forms[name]
        scales = largest_of_groups(form.turn(stored).abs(), form.group_size)
        for module, leaf in self.sharing[name]:  # scales of "absmean" would be another rule's
            module.forms[leaf] = replace(module.forms[leaf], scale="learned")
        self.put(name, stored, scales, learning=False)

    @torch.no_grad()
    def put(self, name: str, weight: Tensor, scales: Tensor, *, learning: bool = True) -> None:
        """Put a latent weight in, and its scales where they are parameters: in all that share it.

        weight    in the parameter's shape, in the space of the file; int8: numbers that stay
        scales    (..., rows, groups); where some are beyond the dtype that the file was to have, it
                  gets a wider one
        learning  whether new scales are trained
        """
        before, log_scale = self._parameters[name], self._parameters.get(name + LOG_SCALE)
        assert before is not None
        scales = scales.to(before.device, torch.float32)
        dtype = torch.int8 if weight.dtype == torch.int8 else torch.float32
        wide = weight.to(before.device, dtype)
        used = scales > 0  # a group of zeros alone gets a usual scale, by which it can leave them
        usual = scales.sum() / used.sum().clamp(min=1) if bool(used.any()) else scales.new_ones(())
        scales = torch.where(used, scales, usual).clamp(min=FLOOR)
        latent = before
        if before.dtype == dtype and (before.requires_grad or dtype == torch.int8):
            before.copy_(wide)
        else:
            wide = wide.clone(memory_format=torch.contiguous_format)
            latent = nn.Parameter(wide, requires_grad=dtype == torch.float32)
        if log_scale is None:
            log_scale = nn.Parameter(scales.log(), requires_grad=learning)
        else:
            log_scale.copy_(scales.log())
        low, high = float(scales.min()), float(scales.max())
        for module, leaf in self.sharing[name]:
            form = module.forms[leaf]
            wider = (form.scale_dtype, "F16", "F32")
            fitting = (n for n in wider if RANGES[n][0] <= low and high <= RANGES[n][1])
            module.forms[leaf] = replace(form, scale_dtype=next(fitting, "F32"))
            module._parameters[leaf] = latent
            if form.scale == "learned":
                module.register_parameter(leaf + LOG_SCALE, log_scale)

    def extra_repr(self) -> str:
        inherited = super().extra_repr()
        forms = ", ".join(
            f"{n}: {f.codec}, {f.scale} in groups of {f.group_size}" for n, f in self.forms.items()
        )
        return f"{inherited}, {forms}, activations={self.activations}"


class QatLinear(Qat):
    """A linear layer, of torch or transformers' Conv1D."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if self.activations == "int8":
            input = rounded_inputs(input)
        weight = self.rounded("weight")
        return F.linear(input, self.forms["weight"].turn(weight), self.bias)


class QatConv2d(Qat):
    """A two-dimensional convolution of torch, whose kernels are the rows of a matrix."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        plain: Any = self
        weight = self.rounded("weight")
        if self.activations == "none":
            found: Tensor = plain._conv_forward(input, weight, self.bias)
            return found
        # each patch is rounded by itself, as a packed convolution does it
        patches = patches_for(input if input.ndim == 4 else input[None], plain)
        rows = F.linear(rounded_inputs(patches), weight.flatten(1), self.bias)
        return as_images(rows) if input.ndim == 4 else as_images(rows)[0]


class QatEmbedding(Qat):
    """A token embedding: of the rows that are looked up alone the weight is worked out.

    embed_scale  by which Gemma's and others' multiply the rows
    """

    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding_idx
        weight = self.rows("weight", input, padding)
        scale = getattr(self, "embed_scale", None)
        if scale is None:
            return weight
        return weight * (scale.to(weight.dtype) if isinstance(scale, Tensor) else scale)


class QatEmbeddingBag(Qat):
    """Sums, means or largest of rows of an embedding: worked out of those rows alone."""

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        bag: Any = self
        return gather_bags(
            lambda ids: self.rows("weight", ids),
            input,
            offsets=offsets,
            mode=bag.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=bag.include_last_offset,
            padding_idx=bag.padding_idx,
        )


class QatOther(Qat):
    """A module whose own forward reads its weights, such as fused experts (experts, rows, cols)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.forms:  # found before the parameter, as attributes of the module itself
            self.__dict__[name] = self.rounded(name)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in self.forms:
                del self.__dict__[name]


@cache
def qat_class(mixin: Any, cls: Any) -> type[Qat]:
    """The class of a module with latent weights whose own class is `cls`."""
    body = {"__module__": cls.__module__, "made_of": (mixin, cls)}
    return type(f"Qat{cls.__name__}", (mixin, cls), body)


def _empty(mixin: Any, cls: Any) -> Qat:
    made: Any = qat_class(mixin, cls)
    empty: Qat = made.__new__(made)
    return empty


def mixin_of(module: nn.Module) -> type[Qat]:
    """The way in which a module can have latent weights."""
    cls: Any = type(module)
    if is_linear(cls) or cls is Conv1D:
        return QatLinear
    if is_convolution(module):
        return QatConv2d
    if getattr(module, "scale_grad_by_freq", False):
        return QatOther  # rows that are looked up by themselves do not show how often they are
    if cls.forward is nn.EmbeddingBag.forward:
        return QatEmbeddingBag
    plain = cls.forward is nn.Embedding.forward
    return QatEmbedding if plain or hasattr(module, "embed_scale") else QatOther


def make_latent(module: nn.Module, forms: Mapping[str, Form], activations: str) -> None:
    """Turn a module into one with latent weights, in place; `put` gives it their values."""
    latent: Any = module
    made_of: Any = mixin_of(module), type(module)
    latent.compute_dtype = next(p.dtype for n, p in module.named_parameters() if n in forms)
    latent.__class__ = qat_class(*made_of)
    latent.forms, latent.activations, latent.sharing = dict(forms), activations, {}
    for name in SCHEDULED:
        module.register_buffer(name, None, persistent=False)


@torch.no_grad()
def hold_dense(modules: Iterable[Qat]) -> None:
    """Let modules multiply by what their weights are rounded to now, once and for all."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for leaf in module.forms:
            latent = id(module._parameters[leaf])  # those that share it still hold it
            if latent not in made:
                made[latent] = nn.Parameter(module.rounded(leaf), requires_grad=False)
            module._parameters[leaf] = made[latent]
        module.__class__ = module.made_of[1]  # type: ignore[assignment]


def latent_modules(model: nn.Module) -> Iterator[tuple[str, Qat]]:
    """The modules of a model that have latent weights, by path."""
    for path, module in model.named_modules():
        if isinstance(module, Qat):
            yield path, module
