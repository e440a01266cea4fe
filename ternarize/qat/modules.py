"""Modules whose weights are latent: trained as they are, read as ternary ones.

A module keeps its class's ways, the names of its parameters and its hooks; its class becomes a
subclass of itself (`qat_class`), so that an optimizer, DDP, FSDP2, PEFT and a state dict see an
ordinary model. Learned scales are one more parameter beside each weight, `weight_log_scale`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ternarize.qat.rounding import (
    FLOOR,
    Form,
    rounded_inputs,
    scales_of,
    stored_scales,
    ternarized,
    trits_of,
)
from ternarize.trits.ternary import largest_of_groups

LOG_SCALE = "_log_scale"  # after the weight's name
SCHEDULED = ("blend", "sharpness", "threshold")


class Qat(nn.Module):
    """Mixed into the class of a module with latent weights.

    forms        parameter -> how it is read
    activations  "int8": inputs are rounded, too; "none"
    dtype        that a rounded weight gets: the one that the parameter had before
    blend, sharpness, threshold   scalars of rounding.py, or None; see `Schedule`
    """

    forms: dict[str, Form]
    activations: str
    compute_dtype: torch.dtype
    blend: Tensor | None
    sharpness: Tensor | None
    threshold: Tensor | None

    def latent(self, name: str) -> Tensor:
        """The trained weight, (..., rows, cols) float32."""
        parameter = self._parameters[name]
        assert parameter is not None
        return self.forms[name].turn(parameter).to(torch.float32)

    def scales(self, name: str) -> Tensor:
        """Its scales as stored, (..., rows, groups) float32."""
        form = self.forms[name]
        if form.scale != "learned":
            return scales_of(self.latent(name), form)
        log_scale = self._parameters[name + LOG_SCALE]
        assert log_scale is not None
        return stored_scales(log_scale.to(torch.float32).exp(), form.scale_dtype)

    def rounded(self, name: str) -> Tensor:
        """The weight as a forward uses it, in the parameter's shape."""
        form, soft = self.forms[name], self.sharpness if self.training else None
        weight = ternarized(
            self.latent(name), self.scales(name), form, self.blend, soft, self.threshold
        )
        return form.parameter(form.turn(weight)).to(self.compute_dtype)

    def trits_and_scales(self, name: str) -> tuple[Tensor, Tensor]:
        """What is to be stored: trits int8 (..., rows, cols), scales; those of empty groups are 0."""
        with torch.no_grad():
            form, latent, scales = self.forms[name], self.latent(name), self.scales(name)
            return trits_of(latent, scales, form.group_size, self.threshold), scales

    def set_stored(self, name: str, stored: Tensor) -> None:
        """Put s t, in the parameter's orientation and the space of the file, in the weight's place.

        The latent weight becomes it, so that what is learnt of the margins is gone.
        """
        form, latent = self.forms[name], self._parameters[name]
        assert latent is not None
        scales = largest_of_groups(form.turn(stored).abs(), form.group_size)
        if form.scale != "learned":  # theirs would be another rule's
            self.forms[name] = replace(form, scale="learned")
        logs = scales.clamp(min=FLOOR).log().to(latent.device)
        self.register_parameter(name + LOG_SCALE, nn.Parameter(logs, requires_grad=False))
        latent.copy_(stored)

    def extra_repr(self) -> str:
        inherited = super().extra_repr()
        forms = ", ".join(
            f"{n}: {f.scale} in groups of {f.group_size}" for n, f in self.forms.items()
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


class QatEmbedding(Qat):
    """A token embedding: of the rows that are looked up alone the weight is worked out."""

    def forward(self, input: Tensor) -> Tensor:
        form, table, scales = (
            self.forms["weight"],
            self._parameters["weight"],
            self.scales("weight"),
        )
        assert table is not None
        rows = F.embedding(input, table, self.padding_idx).to(torch.float32)  # type: ignore[arg-type]
        if scales.shape[-2] > 1:
            scales = F.embedding(input, scales)
        weight = ternarized(
            rows,
            scales,
            form,
            self.blend,
            self.sharpness if self.training else None,
            self.threshold,
        )
        return weight.to(self.compute_dtype) * getattr(self, "embed_scale", 1)


class QatExperts(Qat):
    """A module with fused experts (experts, rows, cols), whose own forward reads them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.forms:  # found before the parameter, as attributes of the module itself
            self.__dict__[name] = self.rounded(name)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in self.forms:
                del self.__dict__[name]


@cache
def qat_class(mixin: type[Qat], cls: type[nn.Module]) -> type[Qat]:
    """The class of a module with latent weights whose own class is `cls`."""
    return type(f"Qat{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def make_latent(module: nn.Module, forms: dict[str, Form], activations: str) -> None:
    """Turn a module into one with latent weights, in place; its parameters become float32.

    forms  of the weights; learned scales are to be put in by `set_scales`
    """
    if isinstance(module, nn.Embedding):
        mixin: type[Qat] = QatEmbedding
    else:
        mixin = QatLinear if isinstance(module, (nn.Linear, Conv1D)) else QatExperts
    names = list(forms)
    dtypes = {parameter.dtype for n, parameter in module.named_parameters() if n in names}
    latent: Any = module
    latent.__class__ = qat_class(mixin, type(module))
    latent.forms, latent.activations, latent.compute_dtype = dict(forms), activations, dtypes.pop()
    for name in SCHEDULED:
        module.register_buffer(name, None, persistent=False)


def latent_modules(model: nn.Module) -> Iterator[tuple[str, Qat]]:
    """The modules of a model that have latent weights, by path."""
    for path, module in model.named_modules():
        if isinstance(module, Qat):
            yield path, module
