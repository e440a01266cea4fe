"""Whether what a conversion is about to write will load, tried before a weight is read.

The loader itself is asked: the plug-in prepares an empty model as it does for a packed checkpoint,
and transformers' own loading puts empty tensors of the planned names, shapes and dtypes into it,
through every renaming and fusing. Which names fill which parameters is looked at for all of them;
of parameters that are made alike (those of all layers) one is filled.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ternarize.errors import CheckpointError, FormatError, SelectionError, first_line, some
from ternarize.files.headers import DTYPES
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.models.configuration import usable
from ternarize.models.places import Place, locate_tensors, missing_parameters, present, ties
from ternarize.models.skeleton import empty_model, strangers, why_no_skeleton
from ternarize.plans.layout import Plan
from ternarize.progress import without_bars
from ternarize.runtime.plugin.prepare import Source
from ternarize.runtime.plugin.quantizer import TernarizeConfig, TernarizeQuantizer

Stored = Mapping[str, tuple[str, tuple[int, ...]]]  # name of the output -> (dtype, shape)


def rehearse(plan: Plan, *, allow_missing: bool = False) -> Plan:
    """The plan, once it is known that its result will load; without a skeleton as it is.

    allow_missing  the source may lack parameters of the model: the plan then names them

    Raises CheckpointError where the source lacks some, SelectionError where a tensor would not be
    found, or does not fit; both name it.
    """
    config = plan.source.config
    if config is None or why_no_skeleton(config):
        return plan
    model = empty_model(config)
    stored = {name: (dtype, shape) for t in plan.tensors for name, dtype, shape in t.stored()}
    missing, defaults = _missing(model, [t.name for t in plan.tensors if not t.tied_to])
    if missing and not allow_missing:
        raise _incomplete(plan, type(model).__name__, missing)
    quantizer = TernarizeQuantizer(TernarizeConfig(missing=missing))
    try:
        places = quantizer.prepare(model, _sources(plan, stored), list(stored))
    except FormatError as error:
        raise SelectionError(
            plan.model,
            f"what would be written could not be loaded: {error.where}: {error.found}",
            error.expected,
            error.remedy,
        ) from None
    chosen = _one_of_each(model, places, stored)
    _check_fill(plan, model, quantizer, {name: stored[name] for name in chosen})
    notes, name = list(plan.notes), type(model).__name__
    if missing:
        notes.append(
            f"the source lacks {some(missing)}, which {name} needs: whoever loads the result "
            "makes them up"
        )
    if defaults:
        notes.append(f"the source lacks {some(defaults)}, of which {name} has values of its own")
    return replace(plan, missing=missing, notes=notes)


def _missing(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Parameters that these names leave out, and buffers, which the class itself fills."""
    places = locate_tensors(model, names)
    saved, there = model.state_dict(), present(places)
    buffers = [
        name
        for name, buffer in model.named_buffers()
        if name in saved and name not in there and buffer.is_floating_point()
    ]
    tied = ties(model.all_tied_weights_keys, places)
    return missing_parameters(model, places, tied), buffers


def _incomplete(plan: Plan, architecture: str, missing: list[str]) -> CheckpointError:
    strange = strangers(plan.source.tensors, plan.source.config)
    found = f", but has {some(strange)}, which it does not know" if strange else ""
    return CheckpointError(
        plan.model,
        f"lacks {some(missing)}, which {architecture} needs{found}",
        "every weight of the model",
        "Complete the checkpoint or repair config.json (architectures), or use --allow-missing, "
        "and whoever loads the result makes them up",
    )


def _sources(plan: Plan, stored: Stored) -> dict[str, Source]:
    """The packed tensors as the plug-in wants to know them."""
    return {
        t.name: Source(
            t.name, t.record("0" * 64), DTYPES[stored[t.name + SCALE_SUFFIX][0]], t.info.file
        )
        for t in plan.tensors
        if t.packed and not t.tied_to
    }


def _check_fill(
    plan: Plan, model: PreTrainedModel, quantizer: TernarizeQuantizer, stored: Stored
) -> None:
    """Raise SelectionError where the loader cannot fill a parameter with what will be stored."""
    tensors: dict[str, Tensor] = {
        name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        for name, (dtype, shape) in stored.items()
    }
    mapping: Any = get_model_conversion_mapping(model, None, quantizer)
    settings = LoadStateDictConfig(
        device_map={"": "meta"}, hf_quantizer=quantizer, weight_mapping=mapping
    )
    with without_bars(), usable(plan.source.directory):
        found, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
    name = type(model).__name__
    for target, shape, expected in sorted(found.mismatched_keys):
        raise SelectionError(
            plan.model,
            f"{target} would be {list(shape)}; {name} with this config.json has {list(expected)}",
            remedy="Repair config.json, or convert the checkpoint that belongs to it",
        )
    for target, error in sorted(found.conversion_errors.items()):
        raise SelectionError(
            plan.model,
            f"{target} of {name} cannot be made of what would be stored ({first_line(error)})",
            "tensors that its loading can join",
            "Leave them in floating point with --keep",
        )


def _one_of_each(model: PreTrainedModel, places: Mapping[str, Place], stored: Stored) -> list[str]:
    """Names that together fill one of all parameters that are made alike of tensors alike."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for name, place in places.items():
        if place.parameters:
            parts.setdefault(place.parameters, []).append(name)
    state = model.state_dict()
    alike: dict[tuple[Any, ...], list[str]] = {}
    for parameters, names in parts.items():
        steps = re.sub(r"(?<=\.)\d+(?=\.)", "0", parameters[0])  # of layers, stages, experts
        shapes = tuple(state[parameter].shape for parameter in parameters)
        alike.setdefault((steps, shapes, *sorted(stored[name] for name in names)), names)
    return [name for names in alike.values() for name in names]
