"""An ordinary model made one that is trained to be ternary, in place.

Which weights that are is what a conversion would say of the model's checkpoint. A weight starts as
the model has it, with the scales that `itf` gives, or from the trits of a packed checkpoint: then
the latent weight is the float one, moved into the interval that rounds to its trit, near the edge
where that trit was another's compensation, so that a small gradient can undo it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.errors import SelectionError, UsageError
from ternarize.files.headers import DTYPE_NAMES
from ternarize.models.skeleton import model_end, skeleton_shapes
from ternarize.plans.choose import select
from ternarize.plans.judge import Verdict
from ternarize.plans.judge_module import TABLES, judge_module
from ternarize.plans.judge_names import judge_by_names
from ternarize.plans.recipe import ACTIVATIONS, GROUP_SIZE, KEEP, TERNARY, Recipe
from ternarize.plans.recipe_files import read_recipe
from ternarize.plans.rules import Choice, rules_of
from ternarize.qat.modules import (
    LOG_SCALE,
    Qat,
    QatEmbedding,
    QatOther,
    latent_modules,
    make_latent,
    mixin_of,
)
from ternarize.qat.rounding import ESTIMATORS, FLOOR, RANGES, SCALE_RULES, Form, scales_of, trits_of
from ternarize.runtime.forms import dense_matrix, dense_weight
from ternarize.runtime.load import load
from ternarize.runtime.packed import Packed
from ternarize.sources.packed import check_record, open_packed, refuse_folded
from ternarize.trits.base3 import BASE3
from ternarize.trits.methods import itf
from ternarize.trits.rotation import rotate
from ternarize.trits.ternary import largest_of_groups, scaled, spread_scales

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
    """Make the layers that `convert` would take trainable as ternary ones, in place.

    model        of transformers, dense and in floating point; or any module, whose linear layers in
                 repeated blocks are known by their names, and embeddings by their type
    group_size   weights per scale; -1: one group per row; 0: one scale per tensor
    scale        "learned", "absmean" (BitNet b1.58) or "least-squares"
    estimator    of the gradient: "ste", "clipped", or "tanh", which a `Schedule` sharpens
    activations  "int8": inputs of these layers are rounded to 8 bits per token, too; or "none"
    scale_bits   of a stored scale, to which it is rounded in every forward: 16 or 8; scales that
                 the dtype does not hold at the start get a wider one, as in a conversion
    keep, include, head, embeddings   as of `convert`; the ends "keep" or "ternary". Of any module
                 `embeddings` takes the tables that `pack_module` would take
    start        packed checkpoint of this model: its trits and learned scales, and what stands
                 beside them. What is ternary, groups, bits of scales and rotation are the
                 checkpoint's, whatever else is said here; not one of `convert --fold`

    Latent weights are float32 parameters under their old names; learned scales are parameters
    `<weight>_log_scale`. Returns the model. Raises UsageError, SelectionError as `convert` does.
    """
    for what, value, allowed in (
        ("scale", scale, SCALE_RULES if start is None else SCALE_RULES[:1]),
        ("estimator", estimator, ESTIMATORS),
        ("activations", activations, ACTIVATIONS),
        ("head", head or KEEP, (KEEP, TERNARY)),
        ("embeddings", embeddings or KEEP, (KEEP, TERNARY)),
    ):
        if value not in allowed:
            from_start = " for a start from a packed checkpoint" * (len(allowed) == 1)
            raise UsageError(what, f"{value!r}", f"one of {', '.join(allowed)}{from_start}")
    _check_dense(model)
    recipe = Recipe(
        "itf",
        group_size,
        keep=tuple(keep),
        include=tuple(include),
        scale_bits=scale_bits,
        head=head,
        embeddings=embeddings,
    )
    form = Form(group_size, scale=scale, estimator=estimator)
    if start is not None:
        recipe = _begin_packed(model, start, form, activations, recipe)
    else:
        form = replace(form, scale_dtype="U8" if scale_bits == 8 else "F16")
        chosen = _chosen(model, recipe)
        forms = {
            name: replace(
                form,
                transposed=choice.transposed,
                kernel=choice.shape[1:] if choice.convolution else (),
            )
            for name, choice in chosen.items()
        }
        insert(model, forms, activations)
        for name in chosen:
            begin(model, name, model.get_parameter(name))
    model.ternarize_recipe = recipe  # type: ignore[assignment]  # by which `pack` chooses again
    return model


def _check_dense(model: nn.Module) -> None:
    if next(latent_modules(model), None) is not None:
        raise UsageError("model", "is prepared already", "a dense model", "Prepare it once")
    packed = any(isinstance(module, Packed) for module in model.modules())
    if packed or hasattr(model, "peft_config"):
        raise UsageError(
            type(model).__name__,
            "has packed weights" if packed else "has adapters",
            "a dense model",
            "Load it with dequantize=True, or name the checkpoint as start"
            if packed
            else "Prepare it before get_peft_model",
        )


def insert(model: nn.Module, forms: Mapping[str, Form], activations: str = "none") -> None:
    """Make the modules of these parameters ones with latent weights; they get no scales yet."""
    own = dict(model.named_parameters(remove_duplicate=False))
    ends = [model_end(model, which) for which in ("head", "embeddings")]
    modules: dict[str, dict[str, Form]] = {}
    for name, form in forms.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = form
        if activations == "int8" and mixin_of(model.get_submodule(path)) is QatOther:
            raise UsageError(
                "activations",
                f"'int8', but {path} multiplies by {leaf} itself, where inputs cannot be rounded",
                "'none' for a model with fused experts",
                "Leave it out",
            )
    sharing: dict[int, list[tuple[Qat, str]]] = {}
    for path, inside in modules.items():
        module: Any = model.get_submodule(path)
        make_latent(module, inside, "none" if module in ends else activations)
        around: Any = model.get_submodule(path.rpartition(".")[0])
        if isinstance(around, nn.TransformerEncoderLayer):
            around.activation_relu_or_gelu = 0  # no fast path, which reads weights as they lie
        for leaf in inside:
            places = sharing.setdefault(id(own[f"{path}.{leaf}"]), [])
            places.append((module, leaf))
            module.sharing[leaf] = places
    _tie_scales(model, forms)


def _tie_scales(model: Any, forms: Mapping[str, Form]) -> None:
    """Tell transformers, which saves parameters and ties them anew, of tied weights' scales."""
    tied = {
        name + LOG_SCALE: other + LOG_SCALE
        for name, other in getattr(model, "all_tied_weights_keys", {}).items()
        if name in forms and other in forms and forms[name].scale == "learned"
    }
    if tied:
        model.all_tied_weights_keys.update(tied)
        model._tied_weights_keys = {**model._tied_weights_keys, **tied}


def begin(model: nn.Module, name: str, weight: Tensor, stored: Tensor | None = None) -> None:
    """Put a latent weight and its learned scales in.

    name    of the parameter, whose module is a latent one
    weight  dense, in the parameter's shape
    stored  s t in the parameter's orientation, in the space of the file, whose scales are taken;
            None: those of `itf`
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
    scales = itf(wide, form.group_size).scales
    if stored is not None:
        ternary = form.turn(stored.to(wide.device, torch.float32))
        own = largest_of_groups(ternary.abs(), form.group_size)
        scales = torch.where(own > 0, own, scales.to(own))  # usual ones for zeros alone
        level = spread_scales(scales, wide.shape[-1], form.group_size).clamp(min=FLOOR)
        wide = level * (ternary.sign() + (wide / level - ternary.sign()).clamp(-MARGIN, MARGIN))
    module.put(leaf, form.turn(wide), scales)


def begin_numbers(
    model: nn.Module, name: str, numbers: Tensor, scales: Tensor, weight: Tensor | None = None
) -> None:
    """Put the numbers of a weight in 8 or 4 bits in, and its scales, which are learned.

    name     of the parameter, whose module is a latent one
    numbers  int8 (rows, cols), and scales (rows, groups) of either sign, as in a file
    weight   dense, in the parameter's shape: becomes a latent one, moved to where it rounds to the
             numbers; None: the numbers stay
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    assert isinstance(module, Qat)
    form, size = module.forms[leaf], scales.to(torch.float32).abs()
    sided = scaled(numbers, scales.sign().to(torch.int8), form.group_size)
    if weight is not None:
        wide = form.turn(weight.detach().to(torch.float32))
        level = spread_scales(size, wide.shape[-1], form.group_size).clamp(min=FLOOR)
        sided = level * (sided + (wide / level - sided).clamp(-MARGIN, MARGIN))
    module.put(leaf, form.turn(sided), size)


def _chosen(model: nn.Module, recipe: Recipe) -> dict[str, Choice]:
    """What a conversion would make ternary: parameter of the model -> the choice that says so."""
    own = dict(model.named_parameters(remove_duplicate=False))
    config: dict[str, Any] | None = None
    verdicts: dict[str, Verdict] | None = None
    if isinstance(model, PreTrainedModel):
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        config.pop("quantization_config", None)
        shapes = {name: shape for name, (_, shape) in skeleton_shapes(config).items()}
    else:  # attention of torch reads its weights as they lie
        raw = [f"{p}." for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
        shapes = {n: tuple(p.shape) for n, p in own.items() if not n.startswith(tuple(raw))}
        verdicts = judge_by_names(shapes)
        by_type = {n: each for n, each in judge_module(model).items() if n in shapes}
        verdicts |= {n: each for n, each in by_type.items() if each.convolution}
        if recipe.embeddings == TERNARY or recipe.include:
            verdicts |= {n: each for n, each in by_type.items() if _is_table(model, n)}
    same: dict[int, list[str]] = {}
    for name, parameter in own.items():
        same.setdefault(id(parameter), []).append(name)
    found: dict[str, Choice] = {}
    for choice in select(shapes, config, rules_of(recipe), verdicts=verdicts):
        for filled in (choice.parameters or (choice.name,)) if choice.ternary else ():
            if not own[filled].is_floating_point():
                dtype = str(own[filled].dtype)[6:]
                raise UsageError(filled, f"is {dtype}", "floating point", "Load a dense model")
            found |= dict.fromkeys(same[id(own[filled])], choice)
    if not found:
        raise SelectionError(
            type(model).__name__,
            "has no linear layer to train as ternary",
            "some",
            "Name weights with include, or keep less",
        )
    return found


def _is_table(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(path), TABLES)


def _begin_packed(
    model: nn.Module, start: str | Path, form: Form, activations: str, recipe: Recipe
) -> Recipe:
    """`prepare` from the trits of a packed checkpoint; returns the recipe that chooses the same."""
    packed, records = open_packed(start)
    record = check_record(packed, records)
    refuse_folded(start, record)
    if record is not None:
        theirs = read_recipe(record)
        recipe = replace(recipe, keep=theirs.keep, include=theirs.include)
        recipe = replace(recipe, head=theirs.head, embeddings=theirs.embeddings)
    values, forms = _values_of(start)
    own = dict(model.named_parameters(remove_duplicate=False))
    unlike = (n for n, p in own.items() if n not in values or values[n].shape != p.shape)
    misfit = next(unlike, "")
    if misfit or not any(forms.values()):
        found = f"has no {misfit} of shape {list(own[misfit].shape)}" if misfit else "has no trits"
        remedy = "Start from its own conversion"
        raise UsageError(start, found, "a packed checkpoint of this model", remedy)
    ternary = {
        name: replace(each, scale=form.scale, estimator=form.estimator)
        for name, each in forms.items()
        if each is not None
    }
    insert(model, ternary, activations)
    for name, dense in own.items():
        if name in ternary:
            begin(model, name, model.get_parameter(name), stored=values[name])
        else:  # biases and norms that were fitted; a head in 8 bits, which will be again
            dense.data.copy_(values[name])
            dense.requires_grad_(dense.requires_grad and name not in forms)
    kept = model.state_dict()
    for name, buffer in model.named_buffers():  # running means of norms
        if name in kept and name in values:
            buffer.copy_(values[name])
    sizes = {each.group_size for each in ternary.values()}
    return replace(recipe, group_size=sizes.pop() if len(sizes) == 1 else None)


def _values_of(start: str | Path) -> tuple[dict[str, Tensor], dict[str, Form | None]]:
    """The parameters of a packed checkpoint as a model has them, and the forms of packed ones.

    Ternary ones are s t, in the space of the file; those in 8 or 4 bits are dense, without a form.
    """
    model = load(start)
    values = {n: p.data for n, p in model.named_parameters(remove_duplicate=False)}
    values |= dict(model.named_buffers(remove_duplicate=False))
    forms: dict[str, Form | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Packed):
            continue
        module.use_stored()
        for leaf, layout in module.layouts.items():
            name, (packed, scales) = f"{path}.{leaf}", module.pair(leaf)
            if layout.planes != 1:
                remedy = "Start from a conversion without --planes and --target-bpw"
                raise UsageError(start, f"has {name} in {layout.planes} planes", "one", remedy)
            ternary = layout.codec == BASE3
            read = dense_matrix if ternary else dense_weight
            stack = [packed, scales] if packed.ndim == 3 else [packed[None], scales[None]]
            parts = [read(p, s, layout, torch.float32) for p, s in zip(*stack, strict=True)]
            value = torch.stack(parts).reshape(
                *packed.shape[:-1], *(layout.kernel or (layout.cols,))
            )
            values[name] = value.transpose(-1, -2) if layout.transposed else value
            # matrices with a scale each that the model fuses: each row gets its own
            several = layout.group_size == 0 and scales.shape[-2] > 1
            dtype = DTYPE_NAMES[scales.dtype]
            forms[name] = (
                None
                if not ternary
                else Form(
                    -1 if several else layout.group_size,
                    layout.transposed,
                    *layout.rotation,
                    scale_dtype=dtype if dtype in RANGES else "F32",
                    kernel=layout.kernel,
                )
            )
    return values, forms


def initialize(model: nn.Module, init: str, *, zeros: float = 0.5, seed: int = 0) -> None:
    """Draw the latent weights of a prepared model anew, to train it from nothing.

    init   "uniform": -1, 0 and 1 equally often; "zeros": a share `zeros` of 0; "variance": normal
           weights, whose trits are what comes of them
    zeros  0 to 1, not 1

    Each matrix gets products of the variance of its inputs: sum W'^2 = 1 for a row on average
    (LeCun's initialization). Token embeddings stay as they are. Raises UsageError.
    """
    shares = {"uniform": 1 / 3, "zeros": zeros, "variance": 0.0}
    if init not in shares or not 0 <= shares[init] < 1:
        found = f"{init!r} with zeros {zeros}"
        raise UsageError("init", found, f"one of {', '.join(shares)}, and zeros from 0 to below 1")
    generator, drawn = torch.Generator().manual_seed(seed), set[int]()
    for _, module in latent_modules(model):
        for leaf, form in module.forms.items():
            places = module.sharing[leaf]
            embedding = any(isinstance(other, QatEmbedding) for other, _ in places)
            if id(places) in drawn or embedding:
                continue
            drawn.add(id(places))
            shape = module.latent(leaf).shape
            if init == "variance":
                wide = torch.randn(shape, generator=generator)
            else:
                wide = _drawn(shape, shares[init], form.scale, generator)
            form = replace(form, scale_dtype="F32")
            if form.scale != "learned":
                scales = scales_of(wide, form)
            elif init == "variance":
                scales = itf(wide, form.group_size).scales.to(torch.float32)
            else:  # the draw's own unit
                scales = torch.ones_like(largest_of_groups(wide, form.group_size))
            trits = trits_of(wide, scales, form.group_size, None)
            ternary = scaled(trits, scales, form.group_size)
            level = 1 / math.sqrt(float(ternary.square().sum(-1).mean()) or 1.0)
            module.put(leaf, form.turn(wide * level), scales * level)


def _drawn(shape: torch.Size, share: float, rule: str, generator: torch.Generator) -> Tensor:
    """Weights of which a share rounds to 0 by the scale that a rule gives them, about 1.

    Magnitudes are even from 0 to an edge, and around the mean of the others. The edge is 1/2 where
    the scale does not depend on them, else below half their mean, from which rules begin.
    """
    draw, sign = (torch.rand(shape, generator=generator) for _ in range(2))
    edge = 0.5 if rule == "learned" else min(0.5, (1 - share) / (2 - share / 2))
    mean = (1 - share * edge / 2) / (1 - share) if rule == "absmean" else 1.0
    inner = draw / max(share, FLOOR) * edge
    outer = mean * (0.5 + (draw - share) / (1 - share))
    return torch.where(sign < 0.5, -1.0, 1.0) * torch.where(draw < share, inner, outer)
