"""The skeleton of a model: its own class of transformers, built on the meta device.

It says of every parameter in which module it stands, what it is tied to, and who else reads it, and
of a checkpoint where its tensors go, before a weight is read.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ternarize.errors import SelectionError, first_line
from ternarize.files.headers import DTYPE_NAMES
from ternarize.models.configuration import config_dtype, config_from, modalities, text_config
from ternarize.models.places import Place, filled_alone, locate_tensors, missing_parameters, ties
from ternarize.models.source_code import raw_reads

# the two ends of a model -> what a person calls them
END_NAMES = {"head": "output head", "embeddings": "token embedding"}

# whether two tensors on disk, of which the class says that they are tied, have the same values
Equal = Callable[[str, str], bool]

# Buffers of old checkpoints that today's models compute: masks, positions, frequencies.
OLD_BUFFER = re.compile(r"\.(bias|masked_bias|causal_mask|mask|inv_freq|position_ids|\w*_index)$")

_HEAD_LIST = re.compile(r"(^|_)(heads?|embed\w*|classifiers?|predictors?)$")


def all_equal(name: str, other: str) -> bool:
    """What holds where values cannot be looked at: the class's word."""
    return True


class Skeleton:
    """A model on the meta device and what the rules ask about it.

    places  of the tensors of a checkpoint, where the skeleton is one of it (`of`)
    tied    parameter -> the one whose tensor it has; of a checkpoint as it is stored there
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.places: dict[str, Place] = {}
        self.name = type(model).__name__
        self.parameters: dict[str, Tensor] = model.state_dict()
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self.inside = _inside_blocks(self.modules)

    def of(self, names: Iterable[str], equal: Equal) -> Skeleton:
        """The same for a checkpoint with these tensors, which decide what is tied."""
        found = copy.copy(self)
        found.places = locate_tensors(self.model, names)
        found.tied = ties(self.tied, found.places, equal)
        return found

    def copies(self) -> dict[str, str]:
        """Tensors on disk that are stored twice: the copy -> the one to store."""
        alone = filled_alone(self.places)
        return {alone[a]: alone[b] for a, b in self.tied.items() if a in alone and b in alone}

    @cached_property
    def absent(self) -> list[str]:
        """Parameters that the checkpoint leaves out."""
        return missing_parameters(self.model, self.places, self.tied)

    @cached_property
    def sharing(self) -> set[str]:
        """Parameters that have a tensor with others in common."""
        return {*self.tied, *self.tied.values()}

    @cached_property
    def heads(self) -> set[str]:
        """Paths of the output head."""
        head = model_end(self.model, "head")
        return {path for path, m in self.modules.items() if head is not None and m is head}

    def family(self, parameter: str) -> set[str]:
        """A parameter and all that are tied to it."""
        source = self.tied.get(parameter, parameter)
        return {source, *(target for target, other in self.tied.items() if other == source)}

    def end_family(self, which: str) -> set[str]:
        """The weight of the "head" or the "embeddings" and all that are tied to it, if there is."""
        module = model_end(self.model, which)
        cls: type = type(module)
        if not (isinstance(module, nn.Embedding) or (which == "head" and is_linear(cls))):
            return set()
        path = next((path for path, m in self.modules.items() if m is module), None)
        return set() if path is None else self.family(f"{path}.weight")

    def unpackable(self, family: Iterable[str]) -> str:
        """Why the parameters of a head or a token embedding cannot be packed; "" if they can."""
        for parameter in sorted(family):
            path, _, leaf = parameter.rpartition(".")
            module = self.modules[path]
            cls: type = type(module)
            if leaf != "weight" or not (isinstance(module, nn.Embedding) or is_linear(cls)):
                return f"tied to {parameter} of a {cls.__name__}"
            if path in self.raw:
                return f"weight read directly by {self.raw[path]}"
            if self.float32 is not None and self.float32.search(parameter):
                return f"kept in float32 by {self.name}"
        return ""

    @cached_property
    def foreign(self) -> set[str]:
        """Paths of the modules that belong to the encoder of another modality."""
        text, others = modalities(self.model.config, self.model)
        present = {type(getattr(module, "config", None)) for module in self.modules.values()}
        if not text & present:  # CLIP's image classifier, say, has the text part in its config only
            return set()
        found: set[str] = set()
        for path, module in self.modules.items():  # parents come before their children
            parent = path.rpartition(".")[0]
            if (path and parent in found) or type(getattr(module, "config", None)) in others:
                found.add(path)
        return found

    @cached_property
    def convolutional(self) -> bool:
        """Whether most weights are those of convolutions that can run as ternary."""
        kernels = sum(
            module.get_parameter("weight").numel()
            for path, module in self.modules.items()
            if is_convolution(module) and path in self.inside and path not in self.foreign
        )
        matrices = {id(p): p.numel() for p in self.model.parameters() if p.ndim > 1}
        return 2 * kernels > sum(matrices.values())

    @cached_property
    def expert_counts(self) -> set[int]:
        """Every number in the configuration that counts experts."""
        configs = (self.model.config, text_config(self.model.config))
        return {
            value
            for config in configs
            for key, value in config.to_dict().items()
            if "expert" in key and type(value) is int
        }

    @cached_property
    def raw(self) -> dict[str, str]:
        """Path of a module whose weight is read by other code -> the class that reads it."""
        found: dict[str, str] = {}
        for path, module in self.modules.items():
            prefix = re.escape(path + ".") if path else ""
            cls: type = type(module)
            for pattern in raw_reads(cls):
                expression = re.compile(prefix + pattern)
                for other in self.modules:
                    if expression.fullmatch(other):
                        found.setdefault(other, cls.__name__)
        return found

    @cached_property
    def float32(self) -> re.Pattern[str] | None:
        """Parameters that transformers loads in float32 whatever dtype is asked for."""
        names = {*(self.model._keep_in_fp32_modules or ())}
        names |= {*(self.model._keep_in_fp32_modules_strict or ())}
        return re.compile("|".join(name.replace("*", ".*") for name in names)) if names else None

    def passes_over(self, name: str, renamed: str) -> str:
        """Why a tensor without a place is known all the same; "" if it is not.

        name     on disk
        renamed  what transformers looks for, as of a `Place`
        """
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        if any(re.search(pattern, n) for pattern in ignored for n in (renamed, name)):
            return f"ignored by {self.name}"
        if renamed in self.buffers or OLD_BUFFER.search(f".{name}"):
            return "buffer"
        return ""


def _inside_blocks(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the modules in repeated blocks: below a list whose elements have children.

    A list of heads (`bbox_embed`, `lm_heads`) repeats outputs, not blocks.
    """
    inside: set[str] = set()
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        block = (
            isinstance(modules[parent], nn.ModuleList)
            and not _HEAD_LIST.search(parent.rpartition(".")[2])
            and next(module.children(), None) is not None
        )
        if path and (parent in inside or block):
            inside.add(path)
    return inside


@cache
def is_linear(cls: type) -> bool:
    """Whether a class computes x W^T + b with its weight and nothing else.

    nn.Linear, and subclasses that only write it differently (Falcon's): tried on small numbers, for
    its source does not tell. A router that is a subclass returns something else.
    """
    if cls is nn.Linear:
        return True
    if not issubclass(cls, nn.Linear):
        return False
    probe = cls.__new__(cls)
    with torch.device("cpu"):
        nn.Linear.__init__(probe, 4, 3, dtype=torch.float64)
        x = torch.arange(8, dtype=torch.float64).reshape(1, 2, 4) - 3
    try:
        with torch.no_grad():
            y = probe(x)
            return torch.allclose(y, nn.functional.linear(x, probe.weight, probe.bias))
    except Exception:  # it needs more than a weight and a bias, or returns no tensor
        return False


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a plain two-dimensional convolution, every output of all inputs.

    Not a subclass that does something else with its weight, or in its forward. With several groups
    (depthwise ones among them) an output sees a part of the inputs, which no row of a matrix does.
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    cls: Any = type(module)
    plain: Any = nn.Conv2d
    return cls.forward is plain.forward and cls._conv_forward is plain._conv_forward


def model_end(model: Any, which: str) -> nn.Module | None:
    """The "head" or the "embeddings" of a model on its own word; None if it has none."""
    getter = "get_output_embeddings" if which == "head" else "get_input_embeddings"
    try:
        end: nn.Module | None = getattr(model, getter)()
    except (NotImplementedError, AttributeError):  # how classes of transformers say so
        return None
    return end


def end_family(model: PreTrainedModel, which: str) -> tuple[set[str], str]:
    """The weight of an end of a model and all that are tied to it, and why they cannot be packed.

    model  dense, in memory or on meta
    which  "head" or "embeddings"

    Returns no names where there is no such end, and "" where they can be packed.
    """
    skeleton = Skeleton(model)
    family = skeleton.end_family(which)
    return family, skeleton.unpackable(family)


def empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the first of a config.json's architectures, on the meta device.

    It is the plain floating-point model, on the plainest attention. Raises whatever its classes
    make of a config that they cannot use.
    """
    others = ("quantization_config", "attn_implementation", "_attn_implementation")
    table = {key: value for key, value in config.items() if key not in others}
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = getattr(transformers, table["architectures"][0])(
            config_from(table)
        )
    return model


def skeleton_of(
    names: Iterable[str], config: dict[str, Any] | None, equal: Equal
) -> Skeleton | str:
    """The skeleton of a checkpoint with these tensors, or in words why there is none."""
    skeleton = skeleton_of_config(config)
    return skeleton if isinstance(skeleton, str) else skeleton.of(names, equal)


def skeleton_of_config(config: dict[str, Any] | None) -> Skeleton | str:
    """The skeleton, or in words why there is none."""
    if config is None:
        return "there is no config.json"
    return _build(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=2)
def _build(config_json: str) -> Skeleton | str:
    config: dict[str, Any] = json.loads(config_json)
    release = f"transformers {transformers.__version__}"
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return f"model_type {model_type!r} is unknown to {release}"
    architecture = next(iter(config.get("architectures") or []), None)
    if not isinstance(architecture, str):
        return "config.json names no architecture"
    try:
        model_class = getattr(transformers, architecture, None)
        if not (inspect.isclass(model_class) and issubclass(model_class, PreTrainedModel)):
            return f"{release} has no model class {architecture}"
        model = empty_model(config)
    except ImportError as error:
        return f"{architecture} needs a package that is not installed ({first_line(error)})"
    except Exception as error:  # whatever the class makes of a config that it cannot use
        raise SelectionError(
            "config.json",
            f"{architecture} of {release} cannot be built from it: {type(error).__name__}: "
            f"{first_line(error)}",
            remedy="Repair it, or use another transformers",
        ) from error
    return Skeleton(model)


def why_no_skeleton(config: dict[str, Any] | None) -> str | None:
    """Why the rules on names and shapes decide for this config.json; None if the skeleton does."""
    skeleton = skeleton_of_config(config)
    return skeleton if isinstance(skeleton, str) else None


def strangers(names: Iterable[str], config: dict[str, Any] | None) -> list[str]:
    """Those of these names on disk that the model of a config.json does not know.

    Empty without a skeleton. Buffers of old, and what the class says it ignores, are known.
    """
    skeleton = skeleton_of(names, config, all_equal)
    if isinstance(skeleton, str):
        return []
    return [
        name
        for name, at in skeleton.places.items()
        if not at.parameters and not skeleton.passes_over(name, at.renamed)
    ]


def lacking(names: Iterable[str], config: dict[str, Any] | None) -> list[str]:
    """Parameters of the model of a config.json that these names on disk leave out."""
    skeleton = skeleton_of(names, config, all_equal)
    return [] if isinstance(skeleton, str) else skeleton.absent


def skeleton_shapes(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a checkpoint of this config.json has: name on disk -> (dtype, shape).

    dtype is a safetensors name ("BF16"): the config's own for floating point. Tied names, which are
    not stored, are left out. Raises SelectionError where there is no skeleton.
    """
    skeleton = skeleton_of_config(config)
    if isinstance(skeleton, str):
        raise SelectionError(
            "config.json", skeleton, "an architecture that transformers has", "Name it"
        )
    unsaved = set(skeleton.model._keys_to_ignore_on_save or ()) | set(skeleton.tied)
    # a class may fix the dtype of a parameter, whatever that of the model is
    before = torch.get_default_dtype()
    torch.set_default_dtype(config_dtype(config))
    try:
        parameters = empty_model(config).state_dict()
    finally:
        torch.set_default_dtype(before)
    stored = {name: tensor for name, tensor in parameters.items() if name not in unsaved}
    on_disk = revert_weight_conversion(skeleton.model, stored)
    return {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in on_disk.items()}


def linear_layers(
    config: dict[str, Any], names: Iterable[str], listed: Sequence[str] | None
) -> dict[str, tuple[int, int]] | str:
    """The weights that a quantizer of transformers replaces: name on disk -> (rows, cols).

    names   of the tensors on disk; none: they are those that the architecture stores
    listed  the modules_to_not_convert of its configuration; None: what transformers then leaves out
            (output head, tied weights, the last module)

    In words why not, where there is no skeleton. Raises SelectionError where a layer that it means
    is not stored as one matrix.
    """
    skeleton = skeleton_of_config(config)
    if isinstance(skeleton, str):
        return skeleton
    model = skeleton.model
    left = get_keys_to_not_convert(model) if listed is None else list(listed)
    left += list(model._keep_in_fp32_modules or ())
    layers = {
        f"{path}.weight": (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(path, left)
    }
    if not (places := locate_tensors(model, names)):
        return {_disk_name(skeleton, name): shape for name, shape in layers.items()}
    stored = filled_alone(places)
    for name in layers:
        if name not in stored or name in skeleton.sharing:
            why = "is tied to another" if name in skeleton.sharing else "has no matrix of its own"
            raise SelectionError(
                name,
                f"is quantized by config.json, but {why}",
                "a weight of its own",
                "List it in modules_to_not_convert, or complete the checkpoint",
            )
    return {stored[name]: shape for name, shape in layers.items()}


def _disk_name(skeleton: Skeleton, parameter: str) -> str:
    if parameter not in skeleton.parameters:
        return parameter
    one = {parameter: skeleton.parameters[parameter]}
    try:
        name: str = next(iter(revert_weight_conversion(skeleton.model, one)))
        return name
    except (ValueError, RuntimeError):  # part of a fused tensor, which has no name of its own
        return parameter
