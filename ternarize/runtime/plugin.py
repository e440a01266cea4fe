"""The plug-in that lets transformers load and save packed checkpoints.

transformers builds the model without memory (on meta), asks the quantizer to prepare it, and fills
it from the checkpoint, renaming and fusing tensors on the way. So, before the fill:

    read the header of each file -> verify the bytes -> find the place of each packed tensor in the
    model -> put an empty ternary module there -> check that nothing will be missing

Which modules are ternary is what the files say, not a list in the config: a list can disagree with
the tensors, and transformers would then draw the weights at random with no more than a warning.

Fused tensors (experts that are stored one by one; query, key and value in one matrix) need nothing
special: packing goes along the rows, so whatever transformers does to rows it can do to packed rows
and to their scales. Tied tensors (an output head that is the token embedding) are one packed
parameter in several modules, tied by transformers as dense ones are, and so are their scales.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ternarize.errors import FormatError, UsageError, WeightError
from ternarize.files import container, unmapped
from ternarize.files.checkpoint import Checkpoint, open_files
from ternarize.files.container import KEY, SCALE_SUFFIX, Record
from ternarize.files.headers import DTYPES, stamp
from ternarize.files.json_files import read_json
from ternarize.runtime import adapters
from ternarize.runtime.adapters import AdaptedLinear
from ternarize.runtime.linear import (
    Layout,
    Packed,
    PackedEmbedding,
    Scale,
    TernaryExperts,
    TernaryLinear,
    check_part,
    dense_embedding,
    dense_experts,
    packed_embedding,
    ternary_experts,
    use_lanes,
)
from ternarize.trits.base3 import BASE3
from ternarize.trits.int8 import INT8, encode_int8, int8_scales

if TYPE_CHECKING:
    from ternarize.models.places import Place


class TernarizeConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint, and switches for loading it.

        from_pretrained(packed, quantization_config=TernarizeConfig(activations="int8"))

    activations  "none" or "int8"; None: as the checkpoint says
    verify       check codes, padding, scales and digests before loading (None: yes)
    dequantize   give back an ordinary model with dense weights (None: no)
    head         "int8": round an output head that the checkpoint keeps in floating point, and the
                 token embedding if the two are tied (None: as the checkpoint has it)
    missing      parameters that the source lacked: transformers makes them up, and says so

    What else config.json says (group_size, method, keys of a later version) is kept and saved again
    but not used: the files' headers decide.
    """

    def __init__(
        self,
        activations: str | None = None,
        verify: bool | None = None,
        dequantize: bool | None = None,
        head: str | None = None,
        missing: list[str] | None = None,
        format_version: int = container.FORMAT_VERSION,
        **others: Any,
    ) -> None:
        container.check_version("config.json", format_version, [])
        self.__dict__.update(others)
        self.quant_method = KEY  # type: ignore[assignment]
        self.format_version = format_version
        self.activations, self.verify, self.dequantize = activations, verify, dequantize
        if head not in (None, INT8):
            raise UsageError("head", f"{head!r}", f"{INT8!r}, or None to leave it as it is")
        names = [] if missing is None else missing
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(
                "config.json", f"missing is {missing!r:.80}", "a list of names", "Repair it"
            )
        self.head, self.missing = head, missing

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the user's config may change in the checkpoint's."""
        switches = ("activations", "verify", "dequantize", "head")
        return {key: getattr(self, key) for key in switches if getattr(self, key) is not None}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: not how this model was loaded."""
        table: dict[str, Any] = super().to_dict()
        for key in ("verify", "dequantize", "head", "missing"):  # saved, it lacks nothing
            table.pop(key, None)
        return {key: value for key, value in table.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """A packed tensor of the checkpoint: its name, record, and the dtype of its scales."""

    name: str
    record: Record
    scale_dtype: torch.dtype
    file: str


class TernarizeQuantizer(HfQuantizer):
    """Prepares a model of transformers for a packed checkpoint; see the module's docstring."""

    # The scales of a weight go through the same conversions (transformers >= 5.20; the patterns of
    # earlier ones match them by themselves)
    serialized_names = {"weight": ["weight", "weight" + SCALE_SUFFIX]}
    quantization_config: TernarizeConfig
    stamps: dict[Path, list[int]]  # of the files, before they were looked at
    source_transposed: dict[str, bool]
    to_round: set[str]  # parameters of the head that become int8 once they are loaded
    scale_names: dict[str, str]  # names of scales that transformers' renamings miss -> parameters

    def __init__(self, quantization_config: TernarizeConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise UsageError(
                "quantization_config",
                "the checkpoint is not packed, and from_pretrained does not ternarize",
                "a packed checkpoint",
                "Run `ternarize convert` first",
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from ternarize.files.names import RECORD

        unmapped.install()
        files = [Path(file) for file in checkpoint_files or []]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise FormatError(
                ", ".join(file.name for file in files) or "no files",
                "a packed checkpoint is stored in safetensors",
                remedy="Load it from its directory",
            )
        self.stamps = {file: stamp(file) for file in files}
        packed = open_files(files[0].parent, [file.name for file in files])
        records = container.records_of(packed)
        container.check_format(packed)
        said = read_json(packed.directory / RECORD) or {}
        container.check_listed(RECORD, said.get("tensors"), records, packed)
        if self.quantization_config.verify is not False:
            container.check(packed, records)
        self.prepare(model, _sources(packed, records), list(packed.tensors))

    def prepare(
        self, model: Any, sources: Mapping[str, Source], names: Sequence[str]
    ) -> "dict[str, Place]":
        """Put empty ternary modules into an empty model, ready to be filled.

        sources  the packed tensors, by name
        names    of all tensors that the files hold, scales included

        Returns where each of them then goes (`ternarize.models.places.locate`).
        Raises FormatError where the tensors do not fit the model, or do not fill it.
        """
        from ternarize.models.places import locate, scales_led_astray, ties

        places = locate(model, names)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        # what a file stores apart is apart: a conversion stores equal tensors once
        model.all_tied_weights_keys = ties(tied, places)
        activations = self.quantization_config.activations or "none"
        self.to_round = _head_to_round(model) if self.quantization_config.head else set()
        self.source_transposed = _insert_modules(model, sources, places, activations)
        self.to_round -= self.source_transposed.keys()  # packed in the checkpoint already
        self.scale_names = scales_led_astray(model, sources, SCALE_SUFFIX)
        _check_beside(model, self.quantization_config.missing or ())
        filled = locate(model, names, self)
        _check_complete(model, filled, self.quantization_config.missing or ())
        return filled

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for file, before in self.stamps.items():  # what was verified is what was loaded
            if stamp(file) != before:
                raise FormatError(
                    file.name, "changed while it was loaded", "a file at rest", "Load it again"
                )
        if self.to_round:
            _round_head(model, self.to_round)
            self.source_transposed |= dict.fromkeys(self.to_round, False)
        _zero_missing_biases(model, self.quantization_config.missing or ())
        for path, module in _packed_modules(model):
            for name, layout in module.layouts.items():
                packed, scale = getattr(module, name), getattr(module, name + SCALE_SUFFIX)
                check_part(f"{path}.{name}", packed, scale, layout)
                scale.requires_grad_(False)
                if type(scale) is nn.Parameter:
                    scale.__class__ = Scale
        if self.quantization_config.dequantize:
            self._dequantize(model)
            return model
        use_lanes(model)
        if any(isinstance(module, PackedEmbedding) for module in model.modules()):
            for module in model.modules():
                if hasattr(module, "resize_token_embeddings"):
                    module.resize_token_embeddings = functools.partial(_keep_size, module)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """For save_pretrained: the metadata of the files that it is about to write."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        adapted = [name for name, m in model.named_modules() if type(m) is AdaptedLinear]
        if adapted:
            raise UsageError(
                adapted[0],
                "an adapter wraps it, so that save_pretrained of the base model cannot name its "
                "weight",
                "layers without one",
                "Call save_pretrained of the PEFT model, or unload the adapter first",
            )
        return None, container.dump_metadata(_saved_records(model, self.source_transposed))

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Replace ternary modules by what the architecture has in their place."""
        if isinstance(dtype, str):  # save_pretrained leaves a name in config.dtype
            dtype = getattr(torch, dtype)
        assert not isinstance(dtype, str)
        for name, module in _packed_modules(model):
            if any(p.is_meta for p in module.parameters(recurse=False)):
                raise UsageError(
                    name,
                    "is offloaded; a dense copy needs it in memory",
                    remedy="Load the model without offloading to dequantize it",
                )
            if isinstance(module, TernaryExperts):
                dense_experts(module, dtype or model.dtype)
            elif isinstance(module, PackedEmbedding):
                dense_embedding(module, dtype or model.dtype)
            elif isinstance(module, TernaryLinear):
                _set_module(model, name, _dense_linear(module, dtype or model.dtype))
        tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = {
            target: source for target, source in tied.items() if not _is_scale(target, tied)
        }
        model.tie_weights(recompute_mapping=False)
        for module in model.modules():
            module.__dict__.pop("resize_token_embeddings", None)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Send scales through the conversions of tensors that are not called `weight`, too."""
        from transformers.core_model_loading import WeightConverter

        from ternarize.models.places import ScaleRenaming, with_dense_turned

        leaves = (getattr(c, "_original_source_patterns", [""])[0] for c in weight_conversions)
        names = {leaf.rpartition(".")[2] for leaf in leaves} | {"weight"}
        self.serialized_names = {n: [n, n + SCALE_SUFFIX] for n in names if n.isidentifier()}
        base: Any = super()
        # of two with one pattern, ours comes first; the other is for scales of another kind
        taken: set[tuple[str | None, str]] = set()
        conversions = []
        for each in base.update_weight_conversions(weight_conversions, model):
            here = each.source_patterns if isinstance(each, WeightConverter) else ()
            patterns = {(getattr(each, "scope_prefix", None), pattern) for pattern in here}
            if taken.isdisjoint(patterns):
                conversions.append(with_dense_turned(each) if patterns else each)
            taken |= patterns
        missed = getattr(self, "scale_names", None)
        return [*conversions, ScaleRenaming(missed)] if missed else conversions

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top; the packed weights stay as they are

    @property
    def is_compileable(self) -> bool:
        return True


def _packed_modules(model: nn.Module) -> list[tuple[str, Packed]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Packed)]


def _keep_size(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """What `resize_token_embeddings` does where the embedding is packed."""
    embedding = model.get_input_embeddings()
    multiple = kwargs.get("pad_to_multiple_of") or (args[0] if args else None)
    if multiple or new_num_tokens not in (None, embedding.num_embeddings):
        raise UsageError(
            type(model).__name__,
            f"its token embedding is packed and keeps its {embedding.num_embeddings} rows",
            "no resize_token_embeddings",
            "Load the model with dequantize=True, or convert it with --embeddings keep",
        )
    return embedding


def _is_scale(name: str, names: Iterable[str]) -> bool:
    """Whether a name is that of the scales of one of the names."""
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in names


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _sources(packed: Checkpoint, records: Mapping[str, Record]) -> dict[str, Source]:
    """The packed tensors of all files."""
    return {
        name: Source(
            name,
            record,
            DTYPES[packed.tensors[name + SCALE_SUFFIX].dtype],
            packed.tensors[name].file,
        )
        for name, record in records.items()
        if record.shape is not None
    }


def _insert_modules(
    model: Any, sources: Mapping[str, Source], places: Mapping[str, "Place"], activations: str
) -> dict[str, bool]:
    """Put an empty ternary module wherever the checkpoint's packed tensors go.

    places  of all tensors of the checkpoint

    Returns for each packed parameter whether its source is transposed.
    """
    from ternarize.models.places import turns_if_needed

    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets: dict[str, list[Source]] = {}
    converters: dict[str, Any] = {}
    for name, source in sources.items():
        place = places[name]
        known = [target for target in place.targets if target in parameters]
        if not known and not _may_be_unexpected(model, place.targets[0]):
            raise FormatError(
                f"{source.file}: {name}",
                f"is packed, but {type(model).__name__} has no parameter {place.targets[0]}",
                remedy="Load the checkpoint with the model class that it was made from, or install the "
                "version of transformers that wrote its config.json",
            )
        for target in known:
            targets.setdefault(target, []).append(source)
            converters[target] = place.converter
    for name, place in places.items():
        packed = next((targets[t][0] for t in place.targets if t in targets), None)
        if packed is not None and name not in sources:
            raise FormatError(
                name,
                f"is not packed, but {packed.name} is, and {type(model).__name__} fuses the two",
                remedy="Pack both or neither",
            )
    tied = model.all_tied_weights_keys
    ends = _ends(model)
    for target, source in list(tied.items()):
        if source in targets:
            targets[target], converters[target] = targets[source], converters[source]
            tied[target + SCALE_SUFFIX] = source + SCALE_SUFFIX
    modules: dict[str, dict[str, tuple[Layout, int, torch.dtype]]] = {}
    for target, parts in targets.items():
        rounded = activations if target not in ends else "none"
        layout = _common_layout(parts, rounded)
        _check_conversion(converters[target], parts, parameters[target])
        dtype = functools.reduce(torch.promote_types, (part.scale_dtype for part in parts))
        path, _, leaf = target.rpartition(".")
        if any(map(turns_if_needed, getattr(converters[target], "operations", ()))):
            turned = bool(getattr(model.get_submodule(path), "is_transposed", False))
            layout = replace(layout, transposed=turned)
        modules.setdefault(path, {})[leaf] = layout, _fused(converters[target]), dtype
    with torch.device("meta"):
        for path, packed_parameters in modules.items():
            _insert_module(model, path, packed_parameters, targets, converters)
    return {target: parts[0].record.transposed for target, parts in targets.items()}


def _insert_module(
    model: Any,
    path: str,
    parameters: dict[str, tuple[Layout, int, torch.dtype]],
    targets: Mapping[str, list[Source]],
    converters: Mapping[str, Any],
) -> None:
    from transformers.pytorch_utils import Conv1D

    from ternarize.models.skeleton import is_linear

    module = model.get_submodule(path)
    kind: type = type(module)
    linear = is_linear(kind) or isinstance(module, Conv1D)
    is_embedding = isinstance(module, nn.Embedding)
    for leaf, (layout, fused, dtype) in parameters.items():
        dense = tuple(getattr(module, leaf).shape)
        logical = (*dense[:-2], dense[-1], dense[-2]) if layout.transposed else dense
        stored = [part.record.shape for part in targets[f"{path}.{leaf}"]]
        whole = converters[f"{path}.{leaf}"] is None  # else it may be a part, or the whole of two
        wrong = layout.cols != logical[-1] or (whole and stored[0] != logical)
        if len(dense) == 2 and layout.transposed != isinstance(module, Conv1D):
            wrong = True
        if wrong or not (linear or is_embedding or len(dense) == 3):
            part = targets[f"{path}.{leaf}"][0]
            raise FormatError(
                f"{part.file}: {part.name}",
                f"is {list(part.record.shape or [])}{', transposed' if layout.transposed else ''}; "
                f"{path}.{leaf} is {list(dense)} in a {type(module).__name__}, which it does not "
                "fit",
                remedy="Check that config.json belongs to the weights",
            )
        parameters[leaf] = layout, fused if layout.group_size == 0 else logical[-2], dtype
    if is_embedding:
        packed_embedding(module, *parameters["weight"])
        return
    if not linear:
        ternary_experts(module, parameters)
        return
    layout, scale_rows, dtype = parameters["weight"]
    rows = math.prod(module.weight.shape) // layout.cols
    packed = TernaryLinear(
        layout.cols,
        rows,
        module.bias is not None,
        group_size=layout.group_size,
        scale_rows=scale_rows,
        scale_dtype=dtype,
        transposed=layout.transposed,
        activations=layout.activations,
        codec=layout.codec,
        planes=layout.planes,
        rotation=layout.rotation,
        dtype=module.weight.dtype,
    )
    _set_module(model, path, packed.train(module.training))


def _common_layout(parts: list[Source], activations: str) -> Layout:
    """The layout that tensors have in common which the model fuses into one."""
    layouts = [_layout(part.record, activations) for part in parts]
    for part, layout in zip(parts, layouts, strict=True):
        eight_bits = [p.scale_dtype == torch.uint8 for p in (part, parts[0])]
        if layout != layouts[0] or eight_bits[0] != eight_bits[1]:
            mine, theirs = (
                f"codec {one.codec}, planes {one.planes}, rotation {one.rotation}, "
                f"group_size {one.group_size}, {one.cols} columns "
                f"and scales in {'8 bits' if eight else 'floating point'}"
                for one, eight in zip((layout, layouts[0]), eight_bits, strict=True)
            )
            raise FormatError(
                f"{part.file}: {part.name}",
                f"{mine}, but {parts[0].name}, which the model fuses with it, has {theirs}",
                remedy="Convert both with the same group size, planes, rotation and scale bits",
            )
    return layouts[0]


def _layout(record: Record, activations: str) -> Layout:
    assert record.shape is not None
    return Layout(
        record.shape[-1],
        record.group_size,
        record.transposed,
        activations if record.codec == BASE3 else "none",
        record.codec,
        record.planes,
        record.rotation,
    )


def _ends(model: Any) -> set[str]:
    """Weights of the output head and the token embedding, whose inputs are not to be rounded."""
    from ternarize.models.skeleton import model_end

    ends = [end for end in (model_end(model, w) for w in ("output", "input")) if end is not None]
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.weight" for path, m in modules if any(m is end for end in ends)}


def is_rowwise(converter: Any, dims: int, transposed: bool) -> bool:
    """Whether a conversion of transformers only moves whole rows, so that rows can be packed.

    dims        of the tensor in the file
    transposed  whether its source has columns where the packed tensor has rows
    """
    from ternarize.models.places import bars_rows

    return not bars_rows(converter.operations, dims, transposed)


def _fused(converter: Any) -> int:
    """How many matrices a conversion puts on top of each other in one parameter."""
    names = [type(operation).__name__ for operation in getattr(converter, "operations", [])]
    return len(converter.source_patterns) if "Concatenate" in names else 1


def _check_conversion(converter: Any, parts: list[Source], parameter: Tensor) -> None:
    record, shape = parts[0].record, parts[0].record.shape
    if converter is None or shape is None:
        return
    weights = sum(math.prod(part.record.shape or ()) for part in parts)
    if len(converter.target_patterns) == 1 and weights != parameter.numel():
        raise FormatError(
            f"{parts[0].file}: {parts[0].name}",
            f"with what the model fuses with it, {len(parts)} tensors of {weights} weights; the "
            f"model has {parameter.numel()}",
            remedy="The checkpoint is incomplete, or config.json belongs to another model",
        )
    kinds = [type(operation).__name__ for operation in converter.operations]
    if not is_rowwise(converter, len(shape), record.transposed):
        raise FormatError(
            f"{parts[0].file}: {parts[0].name}",
            f"is packed, but the model's loading needs {', '.join(kinds)} on it, which packed "
            "rows do not allow",
            remedy="Convert the model with --keep for this tensor",
        )
    if record.group_size == 0:
        cut = set(kinds) - {"MergeModulelist", "Concatenate", "Transpose"}
        if cut or any(part.record.shape != shape for part in parts):
            raise FormatError(
                f"{parts[0].file}: {parts[0].name}",
                "has one scale for the whole tensor, but the model cuts it, or fuses it with a "
                "tensor of another size",
                remedy="Convert the model with --group-size -1",
            )


def _may_be_unexpected(model: Any, name: str) -> bool:
    """Whether the architecture says that it leaves a key unread."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _zero_missing_biases(model: Any, missing: Iterable[str]) -> None:
    """Zero biases that the source lacked in packed modules.

    transformers fills those of its own classes; to it ours are filled, and the memory is new.
    """
    modules = dict(_packed_modules(model))
    for name in missing:
        path, _, leaf = name.rpartition(".")
        value = getattr(modules.get(path), leaf, None)
        if value is not None and not value.is_meta:
            value.data.zero_()


def _check_beside(model: Any, missing: Iterable[str]) -> None:
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


def _check_complete(model: Any, places: "Mapping[str, Place]", missing: Sequence[str]) -> None:
    """Raise FormatError where transformers would draw a parameter at random.

    A model of another class than the checkpoint's (one that adds a head, to be trained) is left to
    transformers, which reports the parameters that it makes up; so is what the source lacked.
    """
    if type(model).__name__ not in (model.config.architectures or [type(model).__name__]):
        return
    from ternarize.models.places import missing_parameters

    lacking = missing_parameters(model, places, model.all_tied_weights_keys)
    for name in lacking:
        if name not in missing:
            raise FormatError(
                name,
                f"{type(model).__name__} needs it, and the checkpoint does not have it{f' (and {len(lacking) - 1} more)' if len(lacking) > 1 else ''}",
                remedy="The checkpoint is incomplete, or config.json belongs to another model",
            )


def _head_to_round(model: Any) -> set[str]:
    """The output head of a model that is still empty, and what is tied to it.

    Raises UsageError where `convert --head int8` could not pack it.
    """
    from ternarize.models.skeleton import end_family

    family, why = end_family(model, "--head")
    if not family or why:
        what = f"{min(family)} cannot be packed ({why})" if family else "there is none to be packed"
        raise UsageError(
            f"head int8: {type(model).__name__}",
            f"{what}",
            "an output head that only multiplies",
            "Leave head out",
        )
    return family


def _round_head(model: Any, family: set[str]) -> None:
    """Hold an output head, and what is tied to it, as `convert --head int8` would store it."""
    from ternarize.plans.layout import INT8_GROUP_SIZE

    first = min(family)
    weight = model.get_parameter(first)
    if weight.is_meta or hasattr(weight, "to_local"):
        where = "offloaded" if weight.is_meta else "spread over processes"
        raise UsageError(
            first,
            f"is {where}; it has to be in memory to become int8",
            remedy="Leave head out, or convert with --head int8",
        )
    try:
        q, scale = _to_int8(weight.detach())
    except WeightError as error:
        raise FormatError(f"{first}: {error}") from None
    layout = Layout(weight.shape[1], INT8_GROUP_SIZE, codec=INT8)
    shared = [nn.Parameter(tensor, requires_grad=False) for tensor in (q, scale)]
    tied = model.all_tied_weights_keys
    for name in sorted(family):
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        hook = _taken_hook(module)
        with torch.device("meta"):
            if isinstance(module, nn.Embedding):
                packed_embedding(module, layout, len(scale), scale.dtype)
            else:
                linear = TernaryLinear(
                    layout.cols,
                    len(q),
                    group_size=INT8_GROUP_SIZE,
                    scale_dtype=scale.dtype,
                    codec=INT8,
                )
                linear.bias = module.bias
                _set_module(model, path, linear.train(module.training))
                module = linear
        module.weight, module.weight_scale = shared
        for parameter in shared:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if hook is not None:
            from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

            add_hook_to_module(module, hook)
        if name in tied:
            tied[name + SCALE_SUFFIX] = tied[name] + SCALE_SUFFIX


def _taken_hook(module: nn.Module) -> Any:
    """The hook of accelerate on a module (of a model that is spread over devices), taken off.

    It holds the forward of the class that the module had when the hook was put there.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)  # else it stays there, bound to the class
    return hook


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and their scales as a conversion stores them; WeightError if some is not finite.

    A piece at a time, because they are worked out in float64.
    """
    from ternarize.plans.layout import INT8_GROUP_SIZE

    assert INT8_GROUP_SIZE == -1  # rows are alone, so that pieces of them can be
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    pieces = [weight[first : first + rows] for first in range(0, len(weight), rows)]
    dtype = torch.float16
    for piece in pieces:
        if not bool(piece.isfinite().all()):
            raise WeightError("has weights that are not finite. Repair the source.")
        exact = int8_scales(piece, INT8_GROUP_SIZE)
        dtype = torch.promote_types(dtype, container.store_scales(exact).dtype)
    parts = [encode_int8(piece, INT8_GROUP_SIZE, dtype) for piece in pieces]
    return torch.cat([q for q, _ in parts]), torch.cat([scale for _, scale in parts])


_PIECE = 1 << 22  # weights


def _saved_records(model: Any, transposed: Mapping[str, bool]) -> dict[str, Record]:
    """The record of each tensor that save_pretrained writes, under the name in the file."""
    from transformers import __version__ as transformers_version

    from ternarize.models.places import locate

    tensors = _saved_tensors(model)
    layouts = {
        f"{path}.{name}": layout
        for path, module in _packed_modules(model)
        for name, layout in module.layouts.items()
    }
    records = {}
    for name, place in locate(model, tensors).items():
        layout = layouts.get(place.targets[0])
        if layout is not None:
            packed, scale = tensors[name], tensors[name + SCALE_SUFFIX]
            if scale.ndim != packed.ndim:
                raise UsageError(
                    name,
                    f"transformers {transformers_version} drops a dimension of its scales as it "
                    "saves them",
                    f"{packed.ndim}",
                    "Install transformers >= 5.23, or copy the packed directory",
                )
            records[name] = Record(
                container.digest(packed, scale),
                (*packed.shape[:-1], layout.cols),
                layout.group_size,
                layout.codec,
                transposed[place.targets[0]],
                layout.planes,
                scale8=scale.dtype == torch.uint8,
                rotation=layout.rotation,
            )
    scales = {name + SCALE_SUFFIX for name in records}
    kept = tensors.keys() - records.keys() - scales
    records |= {name: Record(container.digest(tensors[name])) for name in sorted(kept)}
    return records


def _saved_tensors(model: Any) -> dict[str, Tensor]:
    """What save_pretrained writes, by name: it makes the same from the model right after this."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.integrations.accelerate import load_offloaded_parameter
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    state = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in state.items()
    }
    state = remove_tied_weights_from_state_dict(state, model)
    state = {
        name: load_offloaded_parameter(model, name) if tensor.is_meta else tensor
        for name, tensor in state.items()
    }
    tensors: dict[str, Tensor] = revert_weight_conversion(model, state)
    return tensors


def _dense_linear(module: TernaryLinear, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    weight = module.dequantized(dtype)
    with torch.device("meta"):
        dense: Any
        if module.transposed:
            conv1d: Any = Conv1D
            dense, weight = conv1d(module.out_features, module.in_features), weight.T.contiguous()
        else:
            bias = module.bias is not None
            dense = nn.Linear(module.in_features, module.out_features, bias)
    dense.weight = nn.Parameter(weight)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    result: nn.Module = dense.train(module.training)
    return result


adapters.watch()
if KEY not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(KEY)(TernarizeConfig)
    auto.register_quantizer(KEY)(TernarizeQuantizer)
    # else from_pretrained(..., quantization_config=TernarizeConfig(...)) ignores its switches
    _types: tuple[Any, ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*_types, TernarizeConfig)
