"""TODO."""

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
from ternarize.models.skeleton import Skeleton, is_linear, passed_over
from ternarize.models.source_code import reads_transposed

LARGE = 2**20  # elements; an unexplained weight of this size stops the conversion
LINEAR = "linear in a repeated block"
EXPERTS = "experts in a repeated block"


@dataclass(frozen=True)
class Verdict:
    """A rule's word on one tensor, before --keep and --include."""

    ternary: bool
    reason: str
    possible: bool = False  # --include may make it ternary
    transposed: bool = False
    parameters: tuple[str, ...] = ()
    error: str = ""  # stops the conversion unless the tensor is kept by --keep
    bound: bool = False  # as of a Choice


def judge_by_skeleton(
    shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton, shared: bool
) -> dict[str, Verdict]:
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
    path, _, leaf = parameter.rpartition(".")
    module = skeleton.modules[path]
    cls: type = type(module)
    kind = cls.__name__
    dims = skeleton.parameters[parameter].ndim

    def kept(reason: str) -> Verdict:
        return Verdict(False, reason)

    if parameter in skeleton.buffers:
        return Verdict(False, "buffer", bound=True)
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
            return Verdict(False, "unknown orientation", error=unknown)
        transposed = orientation
    reason = against or (EXPERTS if experts else LINEAR)
    return Verdict(not against, reason, True, transposed)


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
    error = (
        f"its shape is {list(shape)}; {skeleton.name} with this config.json has {list(wanted)}. "
        f"Repair config.json, or use --keep."
    )
    return replace(barred, error=error) if verdict.ternary else barred


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
    if reason := passed_over(name, Place((), renamed), skeleton):
        return Verdict(False, reason)
    if len(shape) < 2 or math.prod(shape) < LARGE:
        return Verdict(False, "not part of the architecture")
    absent = skeleton.absent
    wants = f", which lacks {some(absent)}" if absent else ""
    error = (
        f"a weight of shape {list(shape)} that is not part of {skeleton.name}{wants}; every large "
        "weight must have a place. Repair config.json (architectures) or the names, or use --keep "
        "to copy it as it is."
    )
    return Verdict(False, "not part of the architecture", error=error)
