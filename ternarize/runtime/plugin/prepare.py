"""Before the fill: empty ternary modules where packed tensors go, and checks that they fit."""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ternarize.errors import FormatError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import DTYPES
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.models.places import Place, bars_rows, missing_parameters, turns_if_needed
from ternarize.models.skeleton import END_NAMES, is_convolution, is_linear, model_end
from ternarize.runtime.forms import Layout
from ternarize.runtime.modules.convolution import TernaryConv2d
from ternarize.runtime.modules.embedding import packed_embedding
from ternarize.runtime.modules.experts import ternary_experts
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import Packed
from ternarize.trits.base3 import BASE3

_INCOMPLETE = "The checkpoint is incomplete, or config.json belongs to another model"


@dataclass(frozen=True)
class Source:
    """A packed tensor of the checkpoint: its name, record, and the dtype of its scales."""

    name: str
    record: Record
    scale_dtype: torch.dtype
    file: str

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.record.shape is not None
        return self.record.shape

    def misfit(self, found: str, expected: str = "", remedy: str = "") -> FormatError:
        """The error that says what is wrong with the tensor."""
        return FormatError(f"{self.file}: {self.name}", found, expected, remedy)


@dataclass(frozen=True)
class Filling:
    """What fills a parameter of the model: packed tensors, and where (and how) they go."""

    parts: list[Source]
    place: Place


Described = tuple[Layout, int, torch.dtype]  # a packed parameter: and rows and dtype of its scales


def packed_sources(packed: Checkpoint, records: Mapping[str, Record]) -> dict[str, Source]:
    """The packed tensors of all files."""
    found = {}
    for name, record in records.items():
        if record.shape is not None:
            dtype = DTYPES[packed.tensors[name + SCALE_SUFFIX].dtype]
            found[name] = Source(name, record, dtype, packed.tensors[name].file)
    return found


def insert_modules(
    model: Any, sources: Mapping[str, Source], places: Mapping[str, Place], activations: str
) -> dict[str, bool]:
    """Put an empty ternary module wherever the checkpoint's packed tensors go.

    places  of all tensors of the checkpoint

    Returns for each packed parameter whether its source is transposed.
    """
    fillings = _fillings(model, sources, places)
    tied = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        if source in fillings:
            fillings[target] = fillings[source]
            tied[target + SCALE_SUFFIX] = source + SCALE_SUFFIX
    ends = _weights_of_ends(model)
    modules: dict[str, dict[str, Described]] = {}
    for target, filling in fillings.items():
        path, _, leaf = target.rpartition(".")
        rounded = activations if target not in ends else "none"
        modules.setdefault(path, {})[leaf] = _described(model, target, filling, rounded)
    with torch.device("meta"):
        for path, parameters in modules.items():
            _insert_module(model, path, parameters)
    return {target: filling.parts[0].record.transposed for target, filling in fillings.items()}


def _fillings(
    model: Any, sources: Mapping[str, Source], places: Mapping[str, Place]
) -> dict[str, Filling]:
    """What the packed tensors fill, by parameter; FormatError where only a part of it is packed."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Filling] = {}
    for name, source in sources.items():
        place = places[name]
        known = [target for target in place.targets if target in parameters]
        if not known and not _may_be_unexpected(model, place.targets[0]):
            raise source.misfit(
                f"is packed, but {type(model).__name__} has no parameter {place.targets[0]}",
                remedy="Load the checkpoint with the model class that it was made from, or install "
                "the version of transformers that wrote its config.json",
            )
        for target in known:
            found.setdefault(target, Filling([], place)).parts.append(source)
    for name, place in places.items():
        packed = next((found[t].parts[0] for t in place.targets if t in found), None)
        if packed is not None and name not in sources:
            raise FormatError(
                name,
                f"is not packed, but {packed.name} is, and {type(model).__name__} fuses the two",
                remedy="Pack both or neither",
            )
    return found


def _may_be_unexpected(model: Any, name: str) -> bool:
    """Whether the architecture says that it leaves a key unread."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _weights_of_ends(model: Any) -> set[str]:
    """Weights of the output head and the token embedding, whose inputs are not to be rounded."""
    ends = [end for end in (model_end(model, w) for w in END_NAMES) if end is not None]
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.weight" for path, m in modules if any(m is end for end in ends)}


def _described(model: Any, target: str, filling: Filling, activations: str) -> Described:
    """How a parameter is to be packed; FormatError where what fills it does not fit it."""
    path, _, leaf = target.rpartition(".")
    module, first = model.get_submodule(path), filling.parts[0]
    dense = tuple(getattr(module, leaf).shape)
    layout = _common_layout(filling.parts, activations)
    _check_conversion(filling, getattr(module, leaf).numel())
    if any(map(turns_if_needed, filling.place.operations)):
        layout = replace(layout, transposed=bool(getattr(module, "is_transposed", False)))
    kernel = dense[1:] if is_convolution(module) else ()
    logical = (*dense[:-2], dense[-1], dense[-2]) if layout.transposed else dense
    if kernel:
        logical = (dense[0], math.prod(kernel))
    whole = filling.place.converter is None  # else it may be a part, or the whole of two
    wrong = layout.cols != logical[-1] or (whole and first.shape != logical)
    if len(dense) == 2 and layout.transposed != isinstance(module, Conv1D):
        wrong = True
    wrong = wrong or layout.kernel != kernel
    matrix = _is_linear_module(module) or isinstance(module, nn.Embedding) or kernel
    if wrong or not (matrix or len(dense) == 3):
        found = first.record.dense_shape
        raise first.misfit(
            f"is {list(found)}{', transposed' if layout.transposed else ''}; {target} is "
            f"{list(dense)} in a {type(module).__name__}, which it does not fit",
            remedy="Check that config.json belongs to the weights",
        )
    scale_rows = _stacked(filling.place) if layout.group_size == 0 else logical[-2]
    dtype = functools.reduce(torch.promote_types, (part.scale_dtype for part in filling.parts))
    return layout, scale_rows, dtype


def _is_linear_module(module: nn.Module) -> bool:
    kind: type = type(module)
    return is_linear(kind) or isinstance(module, Conv1D)


def _common_layout(parts: Sequence[Source], activations: str) -> Layout:
    """The layout that tensors have in common which the model fuses into one."""
    layouts = [layout_of(part.record, activations) for part in parts]
    for part, layout in zip(parts, layouts, strict=True):
        eight_bits = [p.scale_dtype == torch.uint8 for p in (part, parts[0])]
        if layout != layouts[0] or eight_bits[0] != eight_bits[1]:
            mine, theirs = (
                f"codec {one.codec}, planes {one.planes}, rotation {one.rotation}, "
                f"group_size {one.group_size}, {one.cols} columns "
                f"and scales in {'8 bits' if eight else 'floating point'}"
                for one, eight in zip((layout, layouts[0]), eight_bits, strict=True)
            )
            raise part.misfit(
                f"{mine}, but {parts[0].name}, which the model fuses with it, has {theirs}",
                remedy="Convert both with the same group size, planes, rotation and scale bits",
            )
    return layouts[0]


def layout_of(record: Record, activations: str) -> Layout:
    """The layout that a file's record says; int8 and int4 weights take their inputs unrounded."""
    assert record.shape is not None
    rounded = activations if record.codec == BASE3 else "none"
    described = record.group_size, record.transposed, rounded, record.codec, record.planes
    return Layout(record.shape[-1], *described, record.rotation, record.kernel)


def _stacked(place: Place) -> int:
    """How many matrices a conversion puts on top of each other in one parameter."""
    names = [type(operation).__name__ for operation in place.operations]
    return len(place.converter.source_patterns) if "Concatenate" in names else 1


def _check_conversion(filling: Filling, weights: int) -> None:
    """Raise FormatError where transformers does more to tensors than to move whole rows.

    weights  of the parameter that they fill
    """
    first, converter = filling.parts[0], filling.place.converter
    if converter is None:
        return
    given = sum(math.prod(part.shape) for part in filling.parts)
    if len(converter.target_patterns) == 1 and given != weights:
        raise first.misfit(
            f"with what the model fuses with it, {len(filling.parts)} tensors of {given} weights; "
            f"the model has {weights}",
            remedy=_INCOMPLETE,
        )
    kinds = [type(operation).__name__ for operation in converter.operations]
    if bars_rows(converter.operations, len(first.shape), first.record.transposed):
        raise first.misfit(
            f"is packed, but the model's loading needs {', '.join(kinds)} on it, which packed rows "
            "do not allow",
            remedy="Convert the model with --keep for this tensor",
        )
    cut = set(kinds) - {"MergeModulelist", "Concatenate", "Transpose"}
    alike = all(part.shape == first.shape for part in filling.parts)
    if first.record.group_size == 0 and (cut or not alike):
        raise first.misfit(
            "has one scale for the whole tensor, but the model cuts it, or fuses it with a tensor "
            "of another size",
            remedy="Convert the model with --group-size -1",
        )


def _insert_module(model: Any, path: str, parameters: Mapping[str, Described]) -> None:
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        packed_embedding(module, *parameters["weight"])
    elif is_convolution(module):
        model.set_submodule(path, TernaryConv2d(module, *parameters["weight"]))
    elif _is_linear_module(module):
        layout, scale_rows, dtype = parameters["weight"]
        packed = TernaryLinear(
            layout.cols,
            module.weight.numel() // layout.cols,
            module.bias is not None,
            scale_rows=scale_rows,
            scale_dtype=dtype,
            dtype=module.weight.dtype,
            **layout.options,
        )
        model.set_submodule(path, packed.train(module.training))
    else:
        ternary_experts(module, parameters)


def check_beside(model: Any, missing: Iterable[str]) -> None:
    """Raise FormatError where a weight is missing beside packed ones in a module."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in missing:
        path, _, leaf = name.rpartition(".")
        if name not in parameters or leaf.endswith("bias"):
            continue
        if isinstance(model.get_submodule(path), Packed):
            raise FormatError(
                name,
                f"is missing, and other weights of the same {type(model).__name__} module are "
                "packed",
                "all or none",
                "Complete the checkpoint",
            )


def check_complete(model: Any, places: Mapping[str, Place], missing: Sequence[str]) -> None:
    """Raise FormatError where transformers would draw a parameter at random.

    A model of another class than the checkpoint's (one that adds a head, to be trained) is left to
    transformers, which reports the parameters that it makes up; so is what the source lacked.
    """
    architecture = type(model).__name__
    if architecture not in (model.config.architectures or [architecture]):
        return
    lacking = missing_parameters(model, places, model.all_tied_weights_keys)
    others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
    for name in lacking:
        if name not in missing:
            raise FormatError(
                name,
                f"{architecture} needs it, and the checkpoint does not have it{others}",
                remedy=_INCOMPLETE,
            )
