"""An ordinary model made one that is trained to be ternary, in place.

Which weights that are is what a conversion would say of the model's checkpoint. A weight starts as
the model has it, with the scales that `itf` gives, or from the trits of a packed checkpoint: then
the latent weight is the float one, moved into the interval that rounds to its trit, near the edge
where that trit was another's compensation, so that a small gradient can undo it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.errors import SelectionError, UsageError
from ternarize.models.skeleton import skeleton_shapes
from ternarize.plans.choose import select
from ternarize.plans.recipe import ACTIVATIONS, GROUP_SIZE, Recipe
from ternarize.plans.rules import Choice, rules_of
from ternarize.qat.modules import LOG_SCALE, Qat, QatEmbedding, latent_modules, make_latent
from ternarize.qat.rounding import ESTIMATORS, FLOOR, SCALES, Form
from ternarize.runtime.load import load
from ternarize.sources.packed import open_packed
from ternarize.trits.methods import itf
from ternarize.trits.rotation import rotate
from ternarize.trits.ternary import largest_of_groups, spread_scales

MARGIN = 0.3  # a latent weight starts at most this far from s t, in units of s


def prepare(
    model: nn.Module,
    *,
    group_size: int = GROUP_SIZE,
    scale: str = "learned",
    estimator: str = "clipped",
    activations: str = "none",
    scale_bits: int = 16,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    head: str | None = None,
    embeddings: str | None = None,
    start: str | Path | None = None,
) -> nn.Module:
    """Make the linear layers that `convert` would take trainable as ternary ones, in place.

    model        of transformers, dense and in floating point; or any module, whose linear layers in
                 repeated blocks are known by their names
    group_size   weights per scale; -1: one group per row; 0: one scale per tensor
    scale        "learned", "absmean" (BitNet b1.58) or "least-squares"
    estimator    of the gradient: "ste", "clipped", or "tanh", which a `Schedule` sharpens
    activations  "int8": inputs of these layers are rounded to 8 bits per token, too; or "none"
    scale_bits   of a stored scale, to which it is rounded in every forward: 16 or 8
    keep, include, head, embeddings   as of `convert`; the ends "keep" or "ternary"
    start        packed checkpoint of this model: its trits, scales, groups and rotation

    Latent weights are float32 parameters under their old names; learned scales are parameters
    `<weight>_log_scale`. Returns the model. Raises UsageError, SelectionError as `convert` does.
    """
    for what, value, allowed in (
        ("scale", scale, SCALES),
        ("estimator", estimator, ESTIMATORS),
        ("activations", activations, ACTIVATIONS),
        ("head", head or "keep", ("keep", "ternary")),
        ("embeddings", embeddings or "keep", ("keep", "ternary")),
    ):
        if value not in allowed:
            raise UsageError(what, f"{value!r}", f"one of {', '.join(allowed)}")
    if next(latent_modules(model), None) is not None:
        raise UsageError("model", "is prepared already", "a dense model", "Prepare it once")
    recipe = Recipe(
        "itf",
        group_size,
        keep=tuple(keep),
        include=tuple(include),
        scale_bits=scale_bits,
        head=head,
        embeddings=embeddings,
    )
    chosen = _chosen(model, recipe)
    model.ternarize_recipe = recipe  # type: ignore[assignment]  # by which `pack` chooses again
    form = Form(group_size, scale=scale, estimator=estimator, scale_dtype=_dtype_of(scale_bits))
    if start is not None:
        return _from_packed(model, chosen, start, form, activations)
    forms = {name: _with(form, transposed=each.transposed) for name, each in chosen.items()}
    insert(model, forms, activations)
    for name in forms:
        begin(model, name, model.get_parameter(name))
    return model


def insert(model: nn.Module, forms: Mapping[str, Form], activations: str = "none") -> None:
    """Make the modules of these parameters ones with latent weights; they get no scales yet."""
    ends = [getattr(model, f"get_{which}put_embeddings", lambda: None)() for which in ("in", "out")]
    modules: dict[str, dict[str, Form]] = {}
    for name, form in forms.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = form
    for path, own in modules.items():
        module = model.get_submodule(path)
        make_latent(module, own, "none" if module in ends else activations)


def begin(
    model: nn.Module,
    name: str,
    weight: Tensor,
    scales: Tensor | None = None,
    stored: Tensor | None = None,
) -> None:
    """Put a latent weight and its learned scales in.

    name    of the parameter, whose module is a latent one
    weight  dense, in the parameter's shape
    scales  (..., rows, groups) to begin with, None: those of `itf`
    stored  s t in the parameter's orientation, in the space of the file, whose scales are taken
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    assert isinstance(module, Qat)
    if leaf + LOG_SCALE in module._parameters:
        return  # it shares a weight that has begun
    form = module.forms[leaf]
    wide = form.turn(weight.detach().to(torch.float32))
    if form.block:
        wide = rotate(wide, form.block, form.seed)
    if scales is None:
        scales = itf(wide, form.group_size).scales
    if stored is not None:
        usual = scales
        ternary = form.turn(stored.to(torch.float32))
        scales = largest_of_groups(ternary.abs(), form.group_size)
        scales = torch.where(scales > 0, scales, usual.to(scales))  # of a group of zeros alone
        level = spread_scales(scales, wide.shape[-1], form.group_size).clamp(min=FLOOR)
        wide = level * (ternary.sign() + (wide / level - ternary.sign()).clamp(-MARGIN, MARGIN))
    before = module._parameters[leaf]
    assert before is not None
    latent = nn.Parameter(form.turn(wide).contiguous())
    logs = nn.Parameter(scales.to(torch.float32).clamp(min=FLOOR).log().to(wide.device))
    for _, other in latent_modules(model):  # all that share the weight
        for own, value in list(other._parameters.items()):
            if value is before:
                other._parameters[own] = latent
                if form.scale == "learned":
                    other.register_parameter(own + LOG_SCALE, logs)


def _chosen(model: nn.Module, recipe: Recipe) -> dict[str, Choice]:
    """What a conversion would make ternary: parameter of the model -> the choice."""
    if isinstance(model, PreTrainedModel):
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        config.pop("quantization_config", None)
        shapes = {name: shape for name, (_, shape) in skeleton_shapes(config).items()}
        choices = select(shapes, config, rules_of(recipe))
    else:
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        choices = select(shapes, None, rules_of(recipe))
    own = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Choice] = {}
    for choice in choices:
        if choice.ternary:
            for parameter in choice.parameters or (choice.name,):
                found[parameter] = choice
                found |= {n: choice for n, p in own.items() if p is own[parameter]}
    if not found:
        raise SelectionError(
            type(model).__name__,
            "has no linear layer to train as ternary",
            "some",
            "Name weights with include, or keep less",
        )
    return found


def _from_packed(
    model: nn.Module, chosen: Mapping[str, Choice], start: str | Path, form: Form, activations: str
) -> nn.Module:
    """`prepare` from the trits of a packed checkpoint."""
    packed, records = open_packed(start)
    forms: dict[str, Form] = {}
    for name, choice in chosen.items():
        record = records.get(choice.name)
        if record is None or record.shape is None or record.planes != 1:
            found = "is no ternary matrix in one plane there" if record else "is not there"
            raise UsageError(
                start,
                f"{choice.name} {found}",
                "a packed checkpoint of this model",
                "Start from its own conversion, or keep what it keeps",
            )
        scale = packed.tensors[choice.name + "_scale"].dtype
        forms[name] = _with(
            form,
            group_size=record.group_size,
            transposed=choice.transposed,
            block=record.rotation[0],
            seed=record.rotation[1],
            scale_dtype=scale if scale in ("F32", "U8") else "F16",
        )
    dense = load(start, dequantize=True, dtype=torch.float32)
    insert(model, forms, activations)
    own = dict(dense.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, each in forms.items():
            value = each.turn(own[name].detach())
            if each.block:
                value = _snapped(rotate(value, each.block, each.seed), each.group_size)
            begin(model, name, model.get_parameter(name), stored=each.turn(value))
        for name, parameter in model.named_parameters():  # biases and norms that were fitted
            if name in own and name not in forms:
                parameter.copy_(own[name])
    return model


def _snapped(value: Tensor, group_size: int) -> Tensor:
    """A ternary matrix that was rotated forth and back: what is near 0 is 0, the rest +-s."""
    scales = largest_of_groups(value.abs(), group_size)
    level = spread_scales(scales, value.shape[-1], group_size)
    return level * (value / level.clamp(min=FLOOR)).round()


def _with(form: Form, **changes: Any) -> Form:
    return Form(**{**form.__dict__, **changes})


def _dtype_of(scale_bits: int) -> str:
    return "U8" if scale_bits == 8 else "F16"


def initialize(model: nn.Module, init: str, *, zeros: float = 0.5, seed: int = 0) -> None:
    """Draw the latent weights of a prepared model anew, to train it from nothing.

    init   "uniform": -1, 0 and 1 equally often; "zeros": a share `zeros` of 0; "variance": normal
           weights, whose trits are what comes of them
    zeros  0 to 1, not 1

    Each matrix gets products of the variance of its inputs: sum W'^2 = 1 for each row on average
    (LeCun's initialization). Raises UsageError.
    """
    shares = {"uniform": 1 / 3, "zeros": zeros, "variance": 0.0}
    if init not in shares or not 0 <= shares[init] < 1:
        found = f"{init!r} with zeros {zeros}"
        raise UsageError("init", found, f"one of {', '.join(shares)}, and zeros from 0 to below 1")
    share, drawn = shares[init], set[int]()
    generator = torch.Generator().manual_seed(seed)
    for path, module in latent_modules(model):
        for leaf, form in module.forms.items():
            parameter = module._parameters[leaf]
            assert parameter is not None
            if id(parameter) in drawn or isinstance(module, QatEmbedding):
                continue
            drawn.add(id(parameter))
            shape = form.turn(parameter).shape
            if init == "variance":
                wide = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
                scales = itf(wide, form.group_size).scales
            else:
                level = 1 / math.sqrt((1 - share) * shape[-1])
                draw = torch.rand(shape, generator=generator)
                sign = torch.rand(shape, generator=generator).round() * 2 - 1
                # |V / s| below 1/2 for the share of zeros, between 1/2 and 3/2 for the others
                inner = draw / max(share, FLOOR) / 2
                outer = 0.5 + (draw - share) / (1 - share)
                wide = level * sign * torch.where(draw < share, inner, outer)
                scales = itf(wide, form.group_size).scales.fill_(level)
            begin(model, f"{path}.{leaf}", form.turn(wide).to(parameter.device), scales)
