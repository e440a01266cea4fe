"""Where the tensors of a checkpoint go in a model of transformers, as its loader leads them.

A name on disk is renamed, perhaps fused with others or cut, and may fill several parameters that
are tied. A class of transformers says which of its parameters are tied, always the same; a
checkpoint may store one of them, whichever it is, or several: equal ones are shared, and what has
values of its own is not tied (FLAN-T5 and Granite store such output heads).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk goes in the model.

    parameters  names in `model.state_dict()`: several where a tensor is split, none if unknown
    renamed     the name that transformers looks for
    converter   transformers' `WeightConverter` on the way, or None
    """

    parameters: tuple[str, ...]
    renamed: str
    converter: Any = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The parameters, or the name that transformers looks for where there is none."""
        return self.parameters or (self.renamed,)

    @property
    def operations(self) -> tuple[Any, ...]:
        """What the converter does to the tensor (`ConversionOps`)."""
        return () if self.converter is None else tuple(self.converter.operations)


def locate_tensors(
    model: PreTrainedModel, names: Iterable[str], quantizer: Any = None
) -> dict[str, Place]:
    """Lead every tensor name on disk to the parameters of `model` that it fills.

    quantizer  the `HfQuantizer` that takes part in loading, if one does

    The renamings of transformers for this model, applied as its loader does: in its order (some
    depend on what came before), and with the base model's prefix added or taken away.
    """
    parameters = model.state_dict()
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix

    places = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, pattern = rename_source_key(name, [], [], prefix, parameters)
        if renamed not in parameters:
            places[name] = Place((), renamed)
        elif pattern is None:
            places[name] = Place((renamed,), renamed)
        else:
            first, *others = by_pattern[pattern].target_patterns
            found = [renamed, *(renamed.replace(first, other, 1) for other in others)]
            targets = tuple(dict.fromkeys(t for t in found if t in parameters))
            places[name] = Place(targets, renamed, by_pattern[pattern])
    return places


def filled_alone(places: Mapping[str, Place]) -> dict[str, str]:
    """Parameter that one tensor on disk fills as it is -> the name of that."""
    return {
        place.parameters[0]: name
        for name, place in places.items()
        if place.converter is None and len(place.parameters) == 1
    }


class ScaleRenaming(WeightRenaming):
    """Leads scales where their weights go, where the patterns of other renamings do not.

    names  what the other renamings make of the scales' names on disk -> what they should make
    """

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(next(iter(names)), next(iter(names.values())))
        self.names = dict(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return self.names[source_key], source_key

    def reverse_transform(self) -> "ScaleRenaming":
        """For saving: transformers asks it before the other renamings, likewise turned round."""
        return ScaleRenaming({target: name for name, target in self.names.items()})


class UnlessPacked(ConversionOps):
    """An operation of transformers that leaves what is packed as it is.

    The rows of what is packed are those of the model, however its source is stored; in memory it
    may have another shape than on disk, from which transformers would conclude that it is turned.
    """

    def __init__(self, operation: Any) -> None:
        self.operation = operation

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> Any:
        path, _, leaf = kwargs["full_layer_name"].rpartition(".")
        layouts = getattr(kwargs["model"].get_submodule(path), "layouts", {})
        patterns = {"source_patterns": source_patterns, "target_patterns": target_patterns}
        if leaf not in layouts and leaf.removesuffix("_scale") not in layouts:
            return self.operation.convert(input_dict, **patterns, **kwargs)
        (value,) = input_dict.values()
        target = self.operation.get_target_pattern(input_dict, **patterns)
        return {target: value[0] if isinstance(value, list) else value}

    @property
    def reverse_op(self) -> "UnlessPacked":
        return UnlessPacked(self.operation.reverse_op)


def with_dense_turned(converter: Any) -> Any:
    """A converter of transformers that leaves packed tensors as they are where it turns others."""
    if not any(map(turns_if_needed, converter.operations)):
        return converter
    operations = [UnlessPacked(op) if turns_if_needed(op) else op for op in converter.operations]
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    if hasattr(converter, "copy"):
        return converter.copy(sources, targets, operations=operations)
    copied = WeightConverter(sources, targets, operations=operations)  # transformers < 5.21
    copied.scope_prefix = converter.scope_prefix
    copied.base_model_prefix = converter.base_model_prefix
    return copied


def scales_led_astray(
    model: PreTrainedModel, weights: Iterable[str], suffix: str
) -> dict[str, str]:
    """The `names` of a `ScaleRenaming` for a model.

    weights  packed, on disk
    suffix   of the names of their scales

    A pattern of a renaming ends where a name ends: a file's `input_linear.weight` becomes the
    parameter `experts.gate_up_proj`, and `input_linear.weight_scale` stays what it is. Others are
    meant for scales of another kind.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    astray = {}
    for name in weights:
        weight, _ = rename_source_key(name, renamings, [])
        scale, _ = rename_source_key(name + suffix, renamings, [])
        if scale != weight + suffix:
            astray[scale] = weight + suffix
    return astray


def present(places: Mapping[str, Place]) -> set[str]:
    """The parameters that these tensors fill."""
    return {parameter for place in places.values() for parameter in place.parameters}


def ties(
    tied: Mapping[str, str],
    places: Mapping[str, Place],
    equal: Callable[[str, str], bool] | None = None,
) -> dict[str, str]:
    """The ties that hold in a checkpoint: parameter -> the stored one whose tensor it has.

    tied    what the class says: parameter -> the one it is tied to
    places  of all tensors of the checkpoint
    equal   whether two tensors on disk have the same values; None: what is stored apart is apart
    """
    alone = filled_alone(places)

    def same(a: str, b: str) -> bool:
        return equal is not None and a in alone and b in alone and equal(alone[a], alone[b])

    return resolve_ties(tied, present(places), same)


def resolve_ties(
    tied: Mapping[str, str], stored: Collection[str], equal: Callable[[str, str], bool]
) -> dict[str, str]:
    """The ties that hold: parameter -> the stored parameter whose tensor it has.

    tied     what the class says, in its order: parameter -> the one it is tied to
    stored   parameters that the checkpoint stores
    equal    whether two of them have the same values

    Goes through the pairs as transformers' `tie_weights` does at loading. Of pairs of which nothing
    is stored the class's word is kept.
    """
    holds = {name: name for name in stored}  # parameter -> the stored one whose tensor it has
    unknown: dict[str, str] = {}
    pairs = list(tied.items())
    for at, (target, source) in enumerate(pairs):
        if target in holds and source in holds:
            if equal(holds[target], holds[source]):
                holds[target] = holds[source]
        elif target in holds:
            holds[source] = holds[target]
        elif source in holds:
            holds[target] = holds[source]
        else:
            later = (other for other, its in pairs[at + 1 :] if its == source and other in holds)
            found = next(later, None)
            if found is None:
                unknown[target] = source
            else:
                holds[target] = holds[found]
    shared = {name: other for name, other in holds.items() if name != other}
    return shared | unknown


def missing_parameters(
    model: PreTrainedModel, places: Mapping[str, Place], tied: Mapping[str, str]
) -> list[str]:
    """Parameters that a loader would draw at random, in the order of the model.

    places  of all tensors of the checkpoint
    tied    as `ties` gives it
    """
    there = present(places)
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        name
        for name, _ in model.named_parameters()
        if name not in there
        and tied.get(name) not in there
        and not any(re.search(pattern, name) for pattern in ignored)
    ]


# Operations of transformers that move whole rows, so that rows of packed bytes can follow them.
_ROW_OPERATIONS = {"Chunk", "Concatenate", "Interleave", "PermuteForRope", "Split"}


def turns_if_needed(operation: Any) -> bool:
    """Whether an operation transposes a tensor that is not yet as the model has it.

    A packed tensor always is as the model has it: its rows are the rows that are multiplied.
    """
    return type(operation).__name__ == "Transpose" and bool(getattr(operation, "check_dims", False))


def bars_rows(operations: Iterable[Any], dims: int, transposed: bool) -> str:
    """The first operation that does not just move whole rows, so that packed rows bar it, or "".

    dims        of the tensor in the file
    transposed  whether its source has columns where the packed tensor has rows
    """
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            dims += 1
        elif turns_if_needed(operation):
            continue
        elif kind not in _ROW_OPERATIONS or transposed or dims < 2:
            return kind
        elif getattr(operation, "dim", 0) % dims == dims - 1:
            return f"{kind} of columns"
    return ""
