"""Which tensors of a checkpoint become ternary, and why the others do not.

The decision needs names, shapes and config.json, never a weight. It comes from a skeleton: the
model's own class in transformers, built on the meta device, where 700 billion parameters take a
second and no memory. A name on disk is led to its parameter by the renamings that transformers
applies when it loads the checkpoint, so the decision is about the module that will run, not about
what its name looks like, and a model released tomorrow needs no entry in a table.

Ternary by default: the weights of linear layers and of experts inside the repeated blocks (below an
`nn.ModuleList` of modules that have children). Kept by default, with the reason in `Choice.reason`:

    embedding, norm, bias, convolution, buffer
    router                             small, and one wrong choice costs a whole expert
    output head                        the last layer; its error reaches the logits undamped
    outside the repeated blocks        poolers, classifiers, projections: few weights, much harm
    encoder of another modality        vision and audio towers of a model that has a text model
    weight read directly by <Class>    code that takes `self.x.weight` would find packed bytes there
    kept in float32 by <Class>         transformers would cast the packed bytes
    tied to <name>                     both names must stay one float parameter
    part of nn.MultiheadAttention      torch reads its weights directly
    stored through <operation>         a conversion at load that rows of packed bytes cannot follow
    not a linear layer, empty, ignored by <Class>, not part of the architecture, --keep <glob>

`--keep` and `--include` change what is a matter of judgement (heads, routers, other modalities,
outside the blocks), not what cannot run. `--head` and `--embeddings` say what becomes of the output
head and of the token embedding, as the model itself names them (`get_output_embeddings`,
`get_input_embeddings`); where the two are tied they are one tensor and become one thing. Embeddings
of positions and types stay kept. A large weight that no rule explains is an error: left out
in silence, it would make a model look converted that is not.

Without a skeleton (no config.json, an architecture that transformers does not have; code from the
checkpoint is never run) rules on names and shapes decide; `why_no_skeleton` says so for the plan.
"""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ternarize.codecs import BASE3, INT8
from ternarize.errors import SelectionError, UsageError, first_line, some
from ternarize.places import (
    Place,
    bars_rows,
    filled_alone,
    locate,
    missing_parameters,
    ties,
    turns_if_needed,
)

# whether two tensors on disk, of which the class says that they are tied, have the same values
Equal = Callable[[str, str], bool]

LARGE = 2**20  # elements; an unexplained weight of this size stops the conversion

LINEAR = "linear in a repeated block"
EXPERTS = "experts in a repeated block"
KEEP, TERNARY = "keep", "ternary"  # and INT8: what --head and --embeddings may be
BY_NAME = "linear by name and shape (no skeleton)"


@dataclass(frozen=True)
class Choice:
    """What happens to one tensor of the source.

    name        on disk
    shape       on disk
    codec       "base3": to be ternarized; "int8": to be rounded to 8 bits; "": kept as it is
    reason      one line, the same words for the same rule, so that a plan can count them
    transposed  of a linear weight: its last two dimensions on disk are [in, out] (Conv1D, some
                experts), not [out, in]
    parameters  of the model that it fills, none without a skeleton; tensors that share one must be
                packed in the same way
    copy_of     the tensor with the same values to which it is tied, which alone is stored; or ""
    bound       it is a buffer of the class, in which infinity is a value like others
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    reason: str
    transposed: bool
    parameters: tuple[str, ...] = ()
    copy_of: str = ""
    bound: bool = False

    @property
    def ternary(self) -> bool:
        return self.codec == BASE3


@dataclass(frozen=True)
class _Verdict:
    """A rule's word on one tensor, before --keep and --include."""

    ternary: bool
    reason: str
    possible: bool = False  # --include may make it ternary
    transposed: bool = False
    parameters: tuple[str, ...] = ()
    error: str = ""  # stops the conversion unless the tensor is kept by --keep
    bound: bool = False  # as of a Choice


# ------------------------------------------------------------------------------------ the interface


def all_equal(name: str, other: str) -> bool:
    """What holds where values cannot be looked at: the class's word."""
    return True


def select(
    shapes: Mapping[str, tuple[int, ...]],
    config: dict[str, Any] | None,
    *,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    head: str = KEEP,
    embeddings: str = KEEP,
    equal: Equal = all_equal,
    shared: bool = True,
) -> list[Choice]:
    """Decide for every tensor of a checkpoint whether it becomes ternary.

    shapes   tensor name on disk -> shape on disk
    config   content of config.json, None where there is none
    keep     globs (fnmatch, case-sensitive) on names: kept
    include  globs on names: ternary although kept by default, where that can run. What a glob
             matches and cannot be ternary stays kept, as long as the glob matches one that can
    head     "keep", "int8" or "ternary": what becomes of the output head
    embeddings  likewise the token embedding; tied to the head, it becomes what either asks for
    equal    whether two tensors on disk have the same values: those that the class ties, and that
             have not, are not tied
    shared   whether weights that blocks share may be ternary; calibration, which goes from block to
             block, has no place for them

    Returns one Choice per tensor, in the order of `shapes`.
    Raises SelectionError where no rule says what to do with a large weight or which way round it
    lies, where its shape is not the architecture's, where a glob matches nothing, or only what
    cannot be ternary, or splits tensors that are fused into one parameter, and where a head or an
    embedding is to be packed that is not there or cannot be; UsageError where the two are tied and
    asked to be different things.
    """
    kept_by = _matches("--keep", keep, shapes)
    included_by = _matches("--include", include, shapes)
    for name in shapes:
        if name in kept_by and name in included_by:
            raise SelectionError(
                f"{name}: both --keep {kept_by[name]!r} and --include {included_by[name]!r} match; "
                f"at most one may. Narrow one of them."
            )
    skeleton = _skeleton_of(shapes, config, equal)
    if isinstance(skeleton, str):
        verdicts, twice = _by_names(shapes), {}
    else:
        verdicts, twice = _by_skeleton(shapes, skeleton, shared), skeleton.copies()
    _check_include(include, included_by, verdicts)
    ends = _ends(shapes, skeleton, verdicts, head, embeddings)

    unexplained: list[str] = []
    choices = []
    for name, shape in shapes.items():
        verdict = verdicts[name]
        codec, reason = BASE3 if verdict.ternary else "", verdict.reason
        if name in ends:
            codec, reason = ends[name]
            for option, found in (("--keep", kept_by), ("--include", included_by)):
                if name in found:
                    raise SelectionError(
                        f"{name}: {option} {found[name]!r} matches, but {reason}; at most one may "
                        "say what becomes of it. Leave one of them out."
                    )
        elif name in kept_by:
            if codec or verdict.error:
                codec, reason = "", f"--keep {kept_by[name]}"
        elif name in included_by and not codec and verdict.possible:
            codec, reason = BASE3, f"--include {included_by[name]}"
        if verdict.error and name not in kept_by:
            unexplained.append(f"{name}: {verdict.error}")
        transposed, parameters = verdict.transposed, verdict.parameters
        copy_of, bound = twice.get(name, ""), verdict.bound
        choices.append(Choice(name, shape, codec, reason, transposed, parameters, copy_of, bound))
    if unexplained:
        more = f" ({len(unexplained) - 1} more such tensors.)" if len(unexplained) > 1 else ""
        raise SelectionError(unexplained[0] + more)
    check_fused_choices(choices)
    return choices


def why_no_skeleton(config: dict[str, Any] | None) -> str | None:
    """Why the rules on names and shapes decide for this config.json; None if the skeleton does."""
    skeleton = _skeleton(config)
    return skeleton if isinstance(skeleton, str) else None


def skeleton_shapes(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a checkpoint of this config.json has: name on disk -> (dtype, shape).

    dtype is a safetensors name ("BF16"): the config's own for floating point. Tied names, which are
    not stored, are left out. Raises SelectionError where there is no skeleton.
    """
    skeleton = _skeleton_or_error(config)
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
    return {name: (_DTYPES[t.dtype], tuple(t.shape)) for name, t in on_disk.items()}


def strangers(names: Iterable[str], config: dict[str, Any] | None) -> list[str]:
    """Those of these names on disk that the model of a config.json does not know.

    Empty without a skeleton. Buffers of old, and what the class says it ignores, are known.
    """
    skeleton = _skeleton_of(names, config, all_equal)
    if isinstance(skeleton, str):
        return []
    places = skeleton.places.items()
    return [name for name, at in places if not at.parameters and not _passed(name, at, skeleton)]


def lacking(names: Iterable[str], config: dict[str, Any] | None) -> list[str]:
    """Parameters of the model of a config.json that these names on disk leave out."""
    skeleton = _skeleton_of(names, config, all_equal)
    if isinstance(skeleton, str):
        return []
    return skeleton.absent


def end_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any] | None, equal: Equal = all_equal
) -> dict[str, set[str]]:
    """Option ("--head", "--embeddings") -> the tensors on disk that it is about.

    The same tensors for both where the two are tied; none without a skeleton. `equal` as in
    `select`.
    """
    skeleton = _skeleton_of(shapes, config, equal)
    if isinstance(skeleton, str):
        return {"--head": set(), "--embeddings": set()}
    places = skeleton.places
    families = {which: skeleton.family(skeleton.end(which)) for which in ("--head", "--embeddings")}
    return {
        which: {name for name, at in places.items() if not family.isdisjoint(at.parameters)}
        for which, family in families.items()
    }


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
    skeleton = _skeleton(config)
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
    if not (places := locate(model, names)):
        return {_disk_name(skeleton, name): shape for name, shape in layers.items()}
    stored = filled_alone(places)
    for name in layers:
        if name not in stored or name in skeleton.sharing:
            why = "is tied to another" if name in skeleton.sharing else "has no matrix of its own"
            raise SelectionError(
                f"{name}: is quantized by config.json, but {why}; expected a weight of its own. "
                "List it in modules_to_not_convert, or complete the checkpoint."
            )
    return {stored[name]: shape for name, shape in layers.items()}


# ----------------------------------------------------------------------------- --keep and --include


def _matches(option: str, patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Name -> the first pattern that matches it; every pattern must match something."""
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise SelectionError(
                f"{option} {pattern!r}: matches no tensor of the checkpoint; a glob on tensor "
                f"names (with .weight) is expected. {_closest(pattern, names)}"
            )
        for name in hits:
            found.setdefault(name, pattern)
    return found


def _closest(pattern: str, names: Iterable[str]) -> str:
    # One name of each shape of name: a large model has thousands that differ in numbers alone.
    distinct = {re.sub(r"\d+", "0", name): name for name in reversed(list(names))}
    matches = difflib.get_close_matches(re.sub(r"\d+", "0", pattern), distinct, n=3, cutoff=0.3)
    if not matches:
        return "The plan (--dry-run) lists the names."
    return "The closest are " + ", ".join(distinct[match] for match in matches) + "."


def _check_include(
    patterns: Sequence[str], included_by: Mapping[str, str], verdicts: Mapping[str, _Verdict]
) -> None:
    """A pattern that can change nothing because of what it matches is an error, with the reason."""
    for pattern in patterns:
        names = [name for name in included_by if fnmatchcase(name, pattern)]
        if any(verdicts[name].ternary or verdicts[name].possible for name in names):
            continue
        reason = verdicts[names[0]].error or verdicts[names[0]].reason
        raise SelectionError(
            f"{names[0]}: --include {pattern!r} asks for a ternary tensor, but it cannot be one: "
            f"{reason}. Leave it out."
        )


def check_fused_choices(choices: Iterable[Choice]) -> None:
    """Raise SelectionError unless tensors of one parameter are all ternary, or all kept."""
    by_parameter: dict[str, Choice] = {}
    for choice in choices:
        for parameter in choice.parameters:
            other = by_parameter.setdefault(parameter, choice)
            if other.codec != choice.codec:
                kept, ternary = (choice, other) if other.ternary else (other, choice)
                raise SelectionError(
                    f"{kept.name}: kept ({kept.reason}), but {ternary.name} is ternary "
                    f"({ternary.reason}), and both load into {parameter}, which is one or the "
                    f"other. Widen the glob to all of them."
                )


# ------------------------------------------------------------------------- --head and --embeddings


def _ends(
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: _Skeleton | str,
    verdicts: Mapping[str, _Verdict],
    head: str,
    embeddings: str,
) -> dict[str, tuple[str, str]]:
    """Tensors of the head and the token embedding that are to be packed -> (codec, reason)."""
    asked = {"--head": head, "--embeddings": embeddings}
    asked = {option: what for option, what in asked.items() if what != KEEP}
    if not asked:
        return {}
    if isinstance(skeleton, str):
        raise SelectionError(
            f"{next(iter(asked))}: {skeleton}, so nothing shows which tensor that is; expected a "
            "config.json of an architecture that transformers has. Leave the option out."
        )
    families: dict[str, set[str]] = {}
    for option in ("--head", "--embeddings"):
        families[option] = skeleton.family(skeleton.end(option))
        if option in asked and not families[option]:
            what = "output head" if option == "--head" else "token embedding"
            raise SelectionError(
                f"{option} {asked[option]}: {skeleton.name} has no {what} that can be packed; "
                "expected one. Leave the option out."
            )
    shared = families["--head"] == families["--embeddings"]
    if shared and len(set(asked.values())) > 1:
        raise UsageError(
            f"--head {head} --embeddings {embeddings}: {skeleton.name} ties the two, so that they "
            "are one tensor; expected the same for both. Name one of them."
        )
    found: dict[str, tuple[str, str]] = {}
    for option, what in asked.items():
        family = families[option]
        why = skeleton.unpackable(family)
        names = [name for name in shapes if not family.isdisjoint(verdicts[name].parameters)]
        if any(skeleton.places[name].converter is not None for name in names):
            why = "stored in another form than the model's"
        if why or not names:
            raise SelectionError(
                f"{option} {what}: {min(family)} cannot be packed "
                f"({why or 'the checkpoint does not have it'}); expected one that only looks up "
                "and multiplies. Leave the option out."
            )
        for name in names:
            tie = "; the output head and the token embedding are tied" if shared else ""
            found[name] = (BASE3 if what == TERNARY else INT8, f"{option} {what}{tie}")
            wanted = tuple(skeleton.parameters[verdicts[name].parameters[0]].shape)
            if shapes[name] != wanted:
                raise SelectionError(
                    f"{name}: its shape is {list(shapes[name])}; {skeleton.name} with this "
                    f"config.json has {list(wanted)}. Repair config.json."
                )
    return found


# ----------------------------------------------------------------------------------- the skeleton


class _Skeleton:
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

    def of(self, names: Iterable[str], equal: Equal) -> _Skeleton:
        """The same for a checkpoint with these tensors, which decide what is tied."""
        found = copy.copy(self)
        found.places = locate(self.model, names)
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
        head = model_end(self.model, "output")
        return {path for path, m in self.modules.items() if head is not None and m is head}

    def end(self, option: str) -> str:
        """The weight of the output head or of the token embedding; "" where there is none."""
        module = model_end(self.model, "output" if option == "--head" else "input")
        cls: type = type(module)
        expected = isinstance(module, nn.Embedding) or (option == "--head" and is_linear(cls))
        paths = [path for path, m in self.modules.items() if m is module and expected]
        return f"{paths[0]}.weight" if paths else ""

    def family(self, parameter: str) -> set[str]:
        """A parameter and all that are tied to it."""
        source = self.tied.get(parameter, parameter)
        tied = {target for target, other in self.tied.items() if other == source}
        return {source, *tied} if parameter else set()

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
        text, others = _modalities(self.model.config, self.model)
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
    def expert_counts(self) -> set[int]:
        """Every number in the configuration that counts experts."""
        configs = (self.model.config, _text_config(self.model.config))
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
            for pattern in _raw_reads(cls):
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

    @cached_property
    def ignored(self) -> re.Pattern[str] | None:
        """Names on disk that the architecture leaves unread, on its own word."""
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return re.compile("|".join(f"(?:{p})" for p in sorted(patterns))) if patterns else None


def model_end(model: Any, which: str) -> nn.Module | None:
    """The "output" head or "input" embedding on the model's own word; None if it has none."""
    try:
        end: nn.Module | None = getattr(model, f"get_{which}_embeddings")()
    except (NotImplementedError, AttributeError):  # how classes of transformers say so
        return None
    return end


def end_family(model: PreTrainedModel, option: str) -> tuple[set[str], str]:
    """The weight of an end of a model and all that are tied to it, and why they cannot be packed.

    model   dense, in memory or on meta
    option  "--head" or "--embeddings"

    Returns no names where there is no such end, and "" where they can be packed.
    """
    skeleton = _Skeleton(model)
    family = skeleton.family(skeleton.end(option))
    return family, skeleton.unpackable(family)


def _skeleton_or_error(config: dict[str, Any]) -> _Skeleton:
    skeleton = _skeleton(config)
    if isinstance(skeleton, str):
        raise SelectionError(
            f"config.json: {skeleton}; an architecture that transformers has is expected. Name it."
        )
    return skeleton


def _skeleton_of(
    names: Iterable[str], config: dict[str, Any] | None, equal: Equal
) -> _Skeleton | str:
    """The skeleton of a checkpoint with these tensors, or in words why there is none."""
    skeleton = _skeleton(config)
    return skeleton if isinstance(skeleton, str) else skeleton.of(names, equal)


def _skeleton(config: dict[str, Any] | None) -> _Skeleton | str:
    """The skeleton, or in words why there is none."""
    if config is None:
        return "there is no config.json"
    return _build(json.dumps(config, sort_keys=True))


def config_from(table: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that a config.json describes, as transformers reads that file.

    A number that JSON does not have stands there as {"__float__": "Infinity"}.
    Raises whatever the class of configuration makes of a wrong value.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            number = value.get("__float__") if len(value) == 1 else None
            if number in ("Infinity", "-Infinity", "NaN"):
                return float(number)
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    found: PretrainedConfig = CONFIG_MAPPING[table["model_type"]].from_dict(plain(dict(table)))
    return found


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


@lru_cache(maxsize=2)
def _build(config_json: str) -> _Skeleton | str:
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
            f"config.json: {architecture} of {release} cannot be built from it: "
            f"{type(error).__name__}: {first_line(error)}. Repair it, or use another transformers."
        ) from error
    return _Skeleton(model)


_HEAD_LIST = re.compile(r"(^|_)(heads?|embed\w*|classifiers?|predictors?)$")


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


_TEXT_CONFIGS = ("text_config", "text_encoder", "decoder", "generator")


def _modalities(config: PretrainedConfig, model: nn.Module) -> tuple[set[type], set[type]]:
    """Classes of configurations: of the text models, of the encoders of other modalities.

    The others are the sub-configurations beside the text one. A model without a text configuration
    (ViT, Whisper, a detector with a backbone) has one modality, its own.
    """
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    text = {type(parts[name]) for name in _TEXT_CONFIGS if parts.get(name) is not None}
    if type(found := _text_config(config)) is not type(config):
        text.add(type(found))
    others: set[type] = set()
    for name, part in parts.items() if text else ():
        if not isinstance(part, PretrainedConfig) or type(part) in text:
            continue
        deeper_text, deeper_others = _modalities(part, model)
        if deeper_text:
            text, others = text | deeper_text, others | deeper_others
        elif name.startswith("encoder") and _reads_text(part, model):
            text.add(type(part))
        else:
            others.add(type(part))
    return text, others - text - {type(config)}


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text model in a composite one, else the configuration's own kind."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several: none is the one
        return config


def _reads_text(config: PretrainedConfig, model: nn.Module) -> bool:
    """Whether the sub-model of this configuration takes token ids (a text encoder-decoder)."""
    return hasattr(config, "vocab_size") and any(
        isinstance(m, PreTrainedModel)
        and type(m.config) is type(config)
        and m.main_input_name == "input_ids"
        for m in model.modules()
    )


_SETUP = re.compile(r"__init__|reset_parameters|_?(init|resize|tie|set)_\w+")


@cache
def _raw_reads(cls: type) -> tuple[str, ...]:
    """Modules whose `.weight` the code of a class reads: expressions on paths below it.

    `self.wo.weight` is the path `wo`, `self.layers[i].out.weight` is `layers.<n>.out`; of another
    variable (`block.output.weight`) only the end of the path is known. A device may be read. And
    `next(self.mlp.parameters())` is all below `mlp`: its dtype would be that of bytes.
    Code that runs at construction does not count, nor does torch's own.
    """
    patterns: dict[str, None] = {}
    for method in _methods(cls):
        nodes = [n for n in ast.walk(method) if isinstance(n, ast.Attribute)]
        harmless = {id(n.value) for n in nodes if n.attr == "device"}
        for call in (n.value for n in nodes if n.attr != "device"):
            if isinstance(call, ast.Call) and _steps(call.func) == ["next"] and call.args:
                root, *steps = _steps(getattr(call.args[0], "func", call))
                if root == "self" and steps[1:] and steps[-1] == "parameters":
                    patterns[r"\.".join(steps[:-1]) + r"(?:\..+)?"] = None
        for node in nodes:
            if node.attr != "weight" or id(node) in harmless:
                continue
            root, *steps = _steps(node.value)
            if root == "self" and steps:
                patterns[r"\.".join(steps)] = None
            elif root != "self" and (steps or root):
                patterns[r"(?:.+\.)?" + r"\.".join(steps or [root])] = None
    return tuple(patterns)


def _steps(node: ast.expr) -> list[str]:
    """`self.layers[i].out` as ["self", "layers", "<any>", "out"]; [""] for another expression."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_steps(node.value), node.attr]
    if isinstance(node, ast.Subscript):
        return [*_steps(node.value), r"\w+"]
    return [""]


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """The methods that a model class runs, its ancestors' included, as they are written.

    Read from the file, not from the class, whose methods may be wrapped by decorators.
    """
    for ancestor in cls.__mro__:
        package = ancestor.__module__
        if package.startswith("transformers.") and not package.startswith("transformers.models."):
            continue
        if package.split(".")[0] in ("builtins", "torch", "typing"):
            continue
        definition = _classes(package).get(ancestor.__name__)
        for node in definition.body if definition is not None else ():
            if isinstance(node, ast.FunctionDef) and not _SETUP.fullmatch(node.name):
                yield node


@lru_cache(maxsize=8)
def _classes(package: str) -> dict[str, ast.ClassDef]:
    """The class definitions in the file of a module; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[package]))
    except (KeyError, OSError, TypeError):
        return {}
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _disk_name(skeleton: _Skeleton, parameter: str) -> str:
    if parameter not in skeleton.parameters:
        return parameter
    one = {parameter: skeleton.parameters[parameter]}
    try:
        name: str = next(iter(revert_weight_conversion(skeleton.model, one)))
        return name
    except (ValueError, RuntimeError):  # part of a fused tensor, which has no name of its own
        return parameter


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The floating-point dtype that config.json states, for the model or for its text model."""
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                found: torch.dtype = dtype
                return found
    return torch.float32


# --------------------------------------------------------------------------- rules with a skeleton


def _by_skeleton(
    shapes: Mapping[str, tuple[int, ...]], skeleton: _Skeleton, shared: bool
) -> dict[str, _Verdict]:
    judged: dict[str, _Verdict] = {}  # of parameters: many tensors can share one
    verdicts = {}
    for name, shape in shapes.items():
        place = skeleton.places[name]
        if not place.parameters:
            verdicts[name] = _unexpected(name, place.renamed, shape, skeleton)
            continue
        for parameter in place.parameters:
            if parameter not in judged:
                judged[parameter] = _judge(parameter, skeleton, shared)
        parts = [judged[parameter] for parameter in place.parameters]
        # Split into several parameters: as ternary as the least of them.
        verdict = min(parts, key=lambda part: (part.ternary, part.possible))
        verdict = replace(verdict, parameters=place.parameters)
        if (verdict.ternary or verdict.possible) and not verdict.error:
            verdict = _as_stored(shape, place, verdict, skeleton)
        verdicts[name] = verdict
    return verdicts


def _judge(parameter: str, skeleton: _Skeleton, shared: bool) -> _Verdict:
    """The verdict on a parameter of the skeleton, stored as it is.

    One that several modules have is ternary where it would be in each of them.
    """
    verdict = _judge_alone(parameter, skeleton)
    if parameter not in skeleton.sharing or not (verdict.ternary or verdict.possible):
        return verdict
    family = skeleton.family(parameter) - {parameter}
    if shared and verdict.ternary and all(_judge_alone(p, skeleton) == verdict for p in family):
        return verdict
    tied = "output head, tied" if verdict.reason == "output head" else f"tied to {min(family)}"
    return _Verdict(False, tied)


def _judge_alone(parameter: str, skeleton: _Skeleton) -> _Verdict:
    """The verdict on a parameter as if no other module had it."""
    path, _, leaf = parameter.rpartition(".")
    module = skeleton.modules[path]
    cls: type = type(module)
    kind = cls.__name__
    dims = skeleton.parameters[parameter].ndim

    def kept(reason: str) -> _Verdict:
        return _Verdict(False, reason)

    if parameter in skeleton.buffers:
        return _Verdict(False, "buffer", bound=True)
    if isinstance(module, nn.Embedding):
        return kept("embedding")
    if "norm" in kind.lower():
        return kept("norm")
    if leaf.endswith("bias"):
        return kept("bias")
    if isinstance(module, nn.modules.conv._ConvNd):
        return kept("convolution")
    parent = skeleton.modules[path.rpartition(".")[0]]
    if isinstance(module, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        return kept("part of nn.MultiheadAttention")

    linear = leaf == "weight" and (isinstance(module, Conv1D) or is_linear(cls))
    experts = dims == 3 and "expert" in f"{path}.{kind}".lower()
    if not linear and not experts:
        if path in skeleton.heads:
            return kept("output head")
        if re.search(r"router|topk|gate$", f"{path} {kind}".lower()):
            return kept("router")
        if "embed" in kind.lower() or "embed" in leaf.lower():
            return kept("embedding")
        return kept("not a linear layer")
    if path in skeleton.raw:
        return kept(f"weight read directly by {skeleton.raw[path]}")
    if skeleton.float32 is not None and skeleton.float32.search(parameter):
        return kept(f"kept in float32 by {skeleton.name}")

    # What follows can run as ternary; the reasons against it are judgement.
    against = ""
    if path in skeleton.heads:
        against = "output head"
    elif path in skeleton.foreign:
        against = "encoder of another modality"
    elif path not in skeleton.inside:
        against = "outside the repeated blocks"
    elif linear and _is_router(path, skeleton.parameters[parameter], skeleton):
        against = "router"
    transposed = isinstance(module, Conv1D)
    if experts:
        orientation = _experts_transposed(module, leaf, skeleton)
        if orientation is None and against:
            return kept(against)
        if orientation is None:
            unknown = (
                f"{kind} does not show whether it is [experts, out, in] or [experts, in, out]; one "
                f"must be known. Use --keep to leave it in floating point."
            )
            return _Verdict(False, "unknown orientation", error=unknown)
        transposed = orientation
    reason = against or (EXPERTS if experts else LINEAR)
    return _Verdict(not against, reason, True, transposed)


def _is_router(path: str, weight: Tensor, skeleton: _Skeleton) -> bool:
    """A linear layer that is named as a gate and has an output per expert, or one in all."""
    if not re.search(r"(^|\.|_)(router|gate)(\.|$)", path):
        return False
    return weight.shape[0] in skeleton.expert_counts | {1}


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


def _experts_transposed(module: nn.Module, leaf: str, skeleton: _Skeleton) -> bool | None:
    """Whether a parameter of experts is [experts, in, out]; None if nothing tells.

    The module's own word first (`is_transposed`), then how its code multiplies, then the sizes.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    cls: type = type(module)
    multiplied = _products(cls, leaf)
    if multiplied is not None:
        return multiplied
    hidden = getattr(_text_config(skeleton.model.config), "hidden_size", None)
    rows, cols = getattr(module, leaf).shape[-2:]
    if (rows == hidden) == (cols == hidden):
        return None
    to_hidden = re.search(r"down|output|w2|wo|fc2", leaf) is not None
    return bool((rows == hidden) != to_hidden)


@cache
def _products(cls: type, leaf: str) -> bool | None:
    """Whether the code of a class multiplies by `self.<leaf>` as [in, out]; None if unclear."""
    answers: set[bool] = set()
    for node in (node for method in _methods(cls) for node in ast.walk(method)):
        operands: list[tuple[ast.expr, bool]] = []  # and whether [in, out] is expected there
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            operands = [(node.right, True), (node.left, False)]
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            called = _steps(node.func)[-1]
            if called in ("bmm", "mm", "matmul"):
                operands = [(node.args[1], True), (node.args[0], False)]
            elif called == "linear":
                operands = [(node.args[1], False)]
        for operand, straight in operands:
            turned = False
            if isinstance(operand, ast.Call) and _steps(operand.func)[-1] in ("t", "transpose"):
                operand, turned = operand.func, True
            steps = _steps(operand)
            if steps[-1] in ("T", "mT", "t", "transpose"):
                steps, turned = steps[:-1], True
            if steps[:2] == ["self", leaf]:
                answers.add(straight != turned)
    return answers.pop() if len(answers) == 1 else None


def _as_stored(
    shape: tuple[int, ...], place: Place, verdict: _Verdict, skeleton: _Skeleton
) -> _Verdict:
    """The verdict on a tensor, given how it is stored: operations, orientation, shape."""
    expected = tuple(skeleton.parameters[place.parameters[0]].shape)
    for operation in place.operations:
        # Turned at load only if the shapes differ; the packed shape will be the module's.
        if turns_if_needed(operation) and shape != expected:
            verdict = replace(verdict, transposed=not verdict.transposed)
            expected = (*expected[:-2], expected[-1], expected[-2])
    operation = bars_rows(place.operations, len(shape), verdict.transposed)
    if operation:
        return _barred(verdict, f"stored through {operation}")
    if math.prod(shape) == 0:
        return _barred(verdict, "empty")
    wanted = (*shape[:-1], expected[-1]) if _merges(place) else expected
    if shape == wanted:
        return verdict
    barred = _barred(verdict, f"of another shape than {skeleton.name}'s")
    error = (
        f"its shape is {list(shape)}; {skeleton.name} with this config.json has {list(wanted)}. "
        f"Repair config.json, or use --keep."
    )
    return replace(barred, error=error) if verdict.ternary else barred


def _barred(verdict: _Verdict, reason: str) -> _Verdict:
    """The verdict once it turns out that the tensor cannot be ternary."""
    reason = reason if verdict.ternary else f"{verdict.reason}, {reason}"
    return replace(verdict, ternary=False, possible=False, reason=reason)


def _merges(place: Place) -> bool:
    """Whether the tensor is a part of its parameter, or several parameters are parts of it."""
    kinds = ("MergeModulelist", "Concatenate", "Chunk", "Split")
    return any(type(operation).__name__ in kinds for operation in place.operations)


# Buffers of old checkpoints that today's models compute: masks, positions, frequencies.
_OLD_BUFFER = re.compile(r"\.(bias|masked_bias|causal_mask|mask|inv_freq|position_ids|\w*_index)$")


def _unexpected(name: str, renamed: str, shape: tuple[int, ...], skeleton: _Skeleton) -> _Verdict:
    """The verdict on a tensor that has no place in the skeleton."""
    if reason := _passed(name, Place((), renamed), skeleton):
        return _Verdict(False, reason)
    if len(shape) < 2 or math.prod(shape) < LARGE:
        return _Verdict(False, "not part of the architecture")
    absent = skeleton.absent
    wants = f", which lacks {some(absent)}" if absent else ""
    error = (
        f"a weight of shape {list(shape)} that is not part of {skeleton.name}{wants}; every large "
        "weight must have a place. Repair config.json (architectures) or the names, or use --keep "
        "to copy it as it is."
    )
    return _Verdict(False, "not part of the architecture", error=error)


def _passed(name: str, place: Place, skeleton: _Skeleton) -> str:
    """Why a tensor without a place is known all the same; "" if it is not."""
    ignored = skeleton.ignored
    if ignored and (ignored.search(place.renamed) or ignored.search(name)):
        return f"ignored by {skeleton.name}"
    if place.renamed in skeleton.buffers or _OLD_BUFFER.search(f".{name}"):
        return "buffer"
    return ""


# ------------------------------------------------------------------------- rules without a skeleton

_KEPT_NAMES = (
    ("embedding", r"embed|(^|_)wte$|(^|_)wpe$|^tok_|position"),
    ("norm", r"norm|^ln(_|$)"),
    ("router", r"router|^gate$|_gate$|^wg$"),
    ("output head", r"(^|_)heads?(_|$)|^classifier|classifier$|^score$"),
    ("outside the repeated blocks", r"pooler"),
    ("convolution", r"conv"),
)
_OTHER_MODALITY = re.compile(r"(^|[._])(vision|visual|audio|image|speech|video)")
_EITHER_WAY = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def _by_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Verdict]:
    verdicts = {name: _judge_name(name, shape) for name, shape in shapes.items()}
    chosen = [name for name, verdict in verdicts.items() if verdict.ternary]
    if not all(_OTHER_MODALITY.search(name) for name in chosen):
        for name in filter(_OTHER_MODALITY.search, chosen):
            reason = "encoder of another modality"
            verdicts[name] = replace(verdicts[name], ternary=False, reason=reason)
    # GPT-2 stores these as [in, out], others with the same names as [out, in]. The length of the
    # bias is `out`, which tells it of one that is not square, and so of all.
    either = [name for name in verdicts if _EITHER_WAY.search(name) and verdicts[name].possible]
    votes = {vote for name in either for vote in _bias_votes(name, shapes)}
    for name in either:
        if len(votes) == 1:
            verdicts[name] = replace(verdicts[name], transposed=next(iter(votes)))
        else:
            error = (
                "without a skeleton nothing shows whether it is [out, in] or [in, out]; one must "
                "be known. Use --keep, or a config.json of an architecture that transformers has."
            )
            verdicts[name] = replace(verdicts[name], ternary=False, possible=False, error=error)
    return verdicts


def _bias_votes(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[bool]:
    rows, cols = shapes[name]
    bias = shapes.get(name.removesuffix("weight") + "bias")
    if rows != cols and bias in ((rows,), (cols,)):
        yield bias == (cols,)


def _judge_name(name: str, shape: tuple[int, ...]) -> _Verdict:
    """The verdict on a tensor of which only name and shape are known."""
    *path, leaf = name.split(".")
    if leaf.endswith("bias"):
        return _Verdict(False, "bias")
    for reason, pattern in _KEPT_NAMES:
        if any(re.search(pattern, part.lower()) for part in (*path, leaf)):
            possible = reason in ("router", "output head") and leaf == "weight" and len(shape) == 2
            return _Verdict(False, reason, possible=possible)
    if len(shape) < 2:
        return _Verdict(False, "not a matrix (no skeleton)")
    if math.prod(shape) == 0:
        return _Verdict(False, "empty")
    if len(shape) == 2 and leaf == "weight":
        if any(part.isdecimal() for part in path):
            return _Verdict(True, BY_NAME, possible=True)
        return _Verdict(False, "outside the repeated blocks", possible=True)
    reason = "not a linear layer by name and shape (no skeleton)"
    if math.prod(shape) < LARGE or _OLD_BUFFER.search(f".{name}"):
        return _Verdict(False, reason)
    error = (
        f"without a skeleton nothing shows what a weight of shape {list(shape)} is; a matrix named "
        f".weight is expected. Use --keep to copy it as it is."
    )
    return _Verdict(False, reason, error=error)
