"""What a tensor is, and so what becomes of it by default.

The verdict needs names, shapes and config.json, never a weight. It comes from a skeleton: the
model's own class in transformers, built on the meta device, where 700 billion parameters take a
second and no memory. A name on disk is led to its parameter by the renamings that transformers
applies when it loads the checkpoint, so the verdict is about the module that will run, not about
what its name looks like, and a model released tomorrow needs no entry in a table.

Ternary by default: the weights of linear layers and of experts inside the repeated blocks (below an
`nn.ModuleList` of modules that have children), and those of two-dimensional convolutions there if
they are most of the model's weights. Kept by default, with the reason:

    embedding, norm, bias, buffer
    convolution                        where they are not most of the weights, and always those of
                                       one or three dimensions, in groups, transposed, or whose
                                       weight other code reads
    router                             small, and one wrong choice costs a whole expert
    output head                        the last layer; its error reaches the logits undamped
    outside the repeated blocks        poolers, classifiers, projections: few weights, much harm
    encoder of another modality        vision and audio towers of a model that has a text model
    weight read directly by <Class>    code that takes `self.x.weight` would find packed bytes there
    kept in float32 by <Class>         transformers would cast the packed bytes
    tied to <name>                     both names must stay one float parameter
    part of nn.MultiheadAttention      torch reads its weights directly
    stored through <operation>         a conversion at load that rows of packed bytes cannot follow
    not a linear layer, empty, ignored by <Class>, not part of the architecture

Options may change what is a matter of judgement (heads, routers, other modalities, outside the
blocks), not what cannot run. A large weight that nothing explains is an error: left out in silence,
it would make a model look converted that is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ternarize.errors import some
from ternarize.models.configuration import text_config
from ternarize.models.places import Place, bars_rows, turns_if_needed
from ternarize.models.skeleton import END_NAMES, Skeleton, is_convolution, is_linear
from ternarize.models.source_code import reads_transposed

LARGE = 2**20  # elements; an unexplained weight of this size stops the conversion
LINEAR = "linear in a repeated block"
EXPERTS = "experts in a repeated block"
CONVOLUTION = "convolution in a repeated block"


@dataclass(frozen=True)
class Verdict:
    """What becomes of one tensor by default.

    possible  --include may make it ternary
    table     --embeddings speaks of it; said of a module's tables alone (plans/judge_module.py)
    error     the parts of an error after `where`; stops the conversion unless --keep speaks of it

    The others as of a `Choice`.
    """

    ternary: bool
    reason: str
    possible: bool = False
    transposed: bool = False
    parameters: tuple[str, ...] = ()
    error: tuple[str, ...] = ()
    bound: bool = False
    table: bool = False
    convolution: bool = False


@dataclass(frozen=True)
class End:
    """The output head or the token embedding, as the model itself calls them; equal if tied.

    tensors  on disk, with those that are tied to it
    barred   why it cannot be packed; "" if it can
    remedy   what to do then
    """

    tensors: frozenset[str]
    barred: str
    remedy: str = "Leave the option out"


def judge_by_skeleton(
    shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton, shared: bool
) -> dict[str, Verdict]:
    """The verdict on each tensor of a checkpoint; `shared` as in `select`."""
    judged: dict[str, Verdict] = {}  # of parameters: many tensors can share one
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


def _judge(parameter: str, skeleton: Skeleton, shared: bool) -> Verdict:
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
    return Verdict(False, tied)


def _judge_alone(parameter: str, skeleton: Skeleton) -> Verdict:
    """The verdict on a parameter as if no other module had it."""
    if parameter in skeleton.buffers:
        return Verdict(False, "buffer", bound=True)
    path, _, leaf = parameter.rpartition(".")
    module, weight = skeleton.modules[path], skeleton.parameters[parameter]
    cls: type = type(module)
    transposed: bool | None = isinstance(module, Conv1D)
    linear = leaf == "weight" and (transposed or is_linear(cls))
    kernels = leaf == "weight" and is_convolution(module) and path not in skeleton.raw
    experts = weight.ndim == 3 and "expert" in f"{path}.{cls.__name__}".lower()
    if reason := _why_never(parameter, linear or experts or kernels, skeleton):
        return Verdict(False, reason)
    # What follows can run as ternary; the reasons against it are judgement.
    against = _first(
        (kernels and not skeleton.convolutional, "convolution"),
        (path in skeleton.heads, "output head"),
        (path in skeleton.foreign, "encoder of another modality"),
        (path not in skeleton.inside, "outside the repeated blocks"),
        (linear and _is_router(path, weight, skeleton), "router"),
    )
    if experts:
        transposed = _experts_transposed(module, leaf, skeleton)
    if transposed is None and not against:
        unknown = (
            f"{cls.__name__} does not show whether it is [experts, out, in] or [experts, in, out]"
        )
        error = (unknown, "one of them", "Use --keep to leave it in floating point")
        return Verdict(False, "unknown orientation", error=error)
    if transposed is None:
        return Verdict(False, against)
    reason = EXPERTS if experts else CONVOLUTION if kernels else LINEAR
    return Verdict(not against, against or reason, True, transposed, convolution=kernels)


def _why_never(parameter: str, multiplied: bool, skeleton: Skeleton) -> str:
    """Why a parameter cannot run as ternary; "" if it can.

    multiplied  it is the weight of a linear layer, or of experts
    """
    path, _, leaf = parameter.rpartition(".")
    module, parent = skeleton.modules[path], skeleton.modules[path.rpartition(".")[0]]
    kind = type(module).__name__.lower()
    attention = isinstance(module, nn.MultiheadAttention) or isinstance(
        parent, nn.MultiheadAttention
    )
    router = re.search(r"router|topk|gate$", f"{path.lower()} {kind}")
    return _first(
        (isinstance(module, nn.Embedding), "embedding"),
        ("norm" in kind, "norm"),
        (leaf.endswith("bias"), "bias"),
        (not multiplied and isinstance(module, nn.modules.conv._ConvNd), "convolution"),
        (attention, "part of nn.MultiheadAttention"),
        (not multiplied and path in skeleton.heads, "output head"),
        (not multiplied and router, "router"),
        (not multiplied and ("embed" in kind or "embed" in leaf.lower()), "embedding"),
        (not multiplied, "not a linear layer"),
        (path in skeleton.raw, f"weight read directly by {skeleton.raw.get(path)}"),
        (
            skeleton.float32 and skeleton.float32.search(parameter),
            f"kept in float32 by {skeleton.name}",
        ),
    )


def _first(*reasons: tuple[object, str]) -> str:
    """The first reason that holds, or ""."""
    return next((reason for holds, reason in reasons if holds), "")


def _is_router(path: str, weight: Tensor, skeleton: Skeleton) -> bool:
    """A linear layer that is named as a gate and has an output per expert, or one in all."""
    if not re.search(r"(^|\.|_)(router|gate)(\.|$)", path):
        return False
    return weight.shape[0] in skeleton.expert_counts | {1}


def _experts_transposed(module: nn.Module, leaf: str, skeleton: Skeleton) -> bool | None:
    """Whether a parameter of experts is [experts, in, out]; None if nothing tells.

    The module's own word first (`is_transposed`), then how its code multiplies, then the sizes.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    cls: type = type(module)
    multiplied = reads_transposed(cls, leaf)
    if multiplied is not None:
        return multiplied
    hidden = getattr(text_config(skeleton.model.config), "hidden_size", None)
    rows, cols = getattr(module, leaf).shape[-2:]
    if (rows == hidden) == (cols == hidden):
        return None
    to_hidden = re.search(r"down|output|w2|wo|fc2", leaf) is not None
    return bool((rows == hidden) != to_hidden)


def _as_stored(
    shape: tuple[int, ...], place: Place, verdict: Verdict, skeleton: Skeleton
) -> Verdict:
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
    found = _other_shape(shape, wanted, skeleton)
    error = (found, "", "Repair config.json, or use --keep")
    return replace(barred, error=error) if verdict.ternary else barred


def _other_shape(shape: tuple[int, ...], wanted: tuple[int, ...], skeleton: Skeleton) -> str:
    return f"its shape is {list(shape)}; {skeleton.name} with this config.json has {list(wanted)}"


def _barred(verdict: Verdict, reason: str) -> Verdict:
    """The verdict once it turns out that the tensor cannot be ternary."""
    reason = reason if verdict.ternary else f"{verdict.reason}, {reason}"
    return replace(verdict, ternary=False, possible=False, reason=reason)


def _merges(place: Place) -> bool:
    """Whether the tensor is a part of its parameter, or several parameters are parts of it."""
    kinds = ("MergeModulelist", "Concatenate", "Chunk", "Split")
    return any(type(operation).__name__ in kinds for operation in place.operations)


def _unexpected(name: str, renamed: str, shape: tuple[int, ...], skeleton: Skeleton) -> Verdict:
    """The verdict on a tensor that has no place in the skeleton."""
    if reason := skeleton.passes_over(name, renamed):
        return Verdict(False, reason)
    if len(shape) < 2 or math.prod(shape) < LARGE:
        return Verdict(False, "not part of the architecture")
    absent = skeleton.absent
    wants = f", which lacks {some(absent)}" if absent else ""
    error = (
        f"a weight of shape {list(shape)} that is not part of {skeleton.name}{wants}",
        "a place for every large weight",
        "Repair config.json (architectures) or the names, or use --keep to copy it as it is",
    )
    return Verdict(False, "not part of the architecture", error=error)


def judge_ends(shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton | str) -> dict[str, End]:
    """What "head" and "embeddings" mean in a checkpoint, and whether they can be packed.

    skeleton  of it, or in words why there is none
    """
    if isinstance(skeleton, str):
        unknown = End(frozenset(), f"{skeleton}, so nothing shows which tensor that is")
        return dict.fromkeys(END_NAMES, unknown)
    ends = {}
    for end, what in END_NAMES.items():
        family = skeleton.end_family(end)
        places = skeleton.places.items()
        stored = {n: shapes[n] for n, at in places if not family.isdisjoint(at.parameters)}
        ends[end] = End(frozenset(stored), *_end_barred(what, family, stored, skeleton))
    return ends


def _end_barred(
    what: str, family: set[str], shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton
) -> tuple[str, ...]:
    """Why the tensors of one end, of these shapes on disk, cannot be packed, and what to do."""
    if not family:
        return (f"{skeleton.name} has no {what} that can be packed",)
    why = skeleton.unpackable(family)
    if any(skeleton.places[name].converter is not None for name in shapes):
        why = "stored in another form than the model's"
    if why or not shapes:
        return (f"{min(family)} cannot be packed ({why or 'the checkpoint does not have it'})",)
    for name, shape in shapes.items():
        wanted = tuple(skeleton.parameters[skeleton.places[name].parameters[0]].shape)
        if shape != wanted:
            return f"{name}: {_other_shape(shape, wanted, skeleton)}", "Repair config.json"
    return ("",)
