"""The plan of a conversion, made from headers, or from config.json alone."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError, SelectionError, UsageError
from ternarize.files import metadata
from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.files.names import MODULE, SAFETENSORS
from ternarize.models.skeleton import (
    END_NAMES,
    Equal,
    skeleton_of,
    skeleton_shapes,
    why_no_skeleton,
)
from ternarize.plans.choose import TIED_ENDS, select
from ternarize.plans.copied import files_beside, not_read, small_files
from ternarize.plans.engine import check_engine, check_held, group_for
from ternarize.plans.judge import Verdict, judge_ends
from ternarize.plans.layout import Plan, Shard, TensorPlan
from ternarize.plans.lossless import check_lossless, own_groups, refuse_ternary
from ternarize.plans.recipe import GROUP_SIZE, KEEP, KEPT_DTYPES, LARGEST_ROTATION, TERNARY, Recipe
from ternarize.plans.rules import Choice, check_fused, rules_of
from ternarize.sources.folded import Folded, folded
from ternarize.sources.imports import open_source
from ternarize.sources.imports.common import Imported
from ternarize.trits.int4 import INT4, INT4_GROUP_SIZE
from ternarize.trits.int8 import INT8_GROUP_SIZE
from ternarize.trits.rotation import block_size

_FLOATING = ("F64", "F32", "F16", "BF16")
_TERNARIZABLE = ("F32", "F16", "BF16")


def make_plan(
    model: str | Path,
    recipe: Recipe = Recipe(),  # noqa: B008
    *,
    config_only: bool = False,
    stream: Path | None = None,
    for_record: bool = False,
    verdicts: Mapping[str, Verdict] | None = None,
) -> Plan:
    """Lay out a conversion from headers, without reading weights (except to compare tied copies).

    model        directory, or Hub id user/name[@revision]
    config_only  a config.json without weights is enough: names and shapes come from the skeleton
    stream       folder to fetch weight files to, one by one, when they are read; see `HubStream`
    for_record   the conversion is on record, which says the groups: no weight is looked at for that
    verdicts     on the tensors, of a module that is at hand; see `select`

    Raises CheckpointError, FormatError, SelectionError, UsageError.
    """
    if recipe.fold and stream is not None:
        raise UsageError(
            "--stream",
            "with --fold, which needs the gains of norms, wherever they lie",
            "one of the two",
            "Leave out --stream",
        )
    source = open_source(model, config_only=config_only, stream=stream)
    _refuse_quantized(source)
    # weights can be looked at without a download, and have to be
    here = bool(source.tensors) and stream is None and not for_record
    notes = [] if source.tensors else [_imagine(source, model)]
    if recipe.fits:
        _check_calibrated(source, model)
    if recipe.engine is not None:
        check_engine(model, source.config, recipe)
    if recipe.fold:
        source = folded(source, recipe.calibrate.seed if recipe.calibrate else 0)
    shapes = {name: info.shape for name, info in source.tensors.items()}
    equal = cache(source.equal)
    recipe = _settled(recipe, source, shapes, equal)
    choices = select(
        shapes,
        source.config,
        rules_of(recipe),
        dense=_dense(source),
        equal=equal,
        shared=not recipe.fits,
        verdicts=verdicts,
    )
    if recipe.group_size is None and (recipe.fits or (recipe.engine and not _is_ternary(source))):
        group_size = group_for(choices, source.config) if recipe.engine else GROUP_SIZE
        recipe = replace(recipe, group_size=group_size)
    why = why_no_skeleton(source.config) if verdicts is None else None
    notes += [*source.notes, *_remarks(source, choices, why)]
    tensors = [_plan_tensor(source.tensors[each.name], each, recipe) for each in choices]
    if here and isinstance(source, Folded):
        refuse_ternary(source, tensors)
    if recipe.group_size is None:
        tensors = own_groups(source, tensors, tensors, read=here)
    elif here and not recipe.fits:
        check_lossless(source, tensors, recipe.group_size)
    check_fused(((t.choice, t.form) for t in tensors), "Name one --group-size")
    if recipe.engine is not None:
        check_held(tensors, source.config, recipe)
    alone = isinstance(source, Imported) and source.alone  # what lies around it can be anything
    copied, left_out = ([], []) if alone else small_files(source.directory, source.files)
    notes += not_read(source, left_out)
    if not alone and source.directory.resolve() != Path(os.path.expanduser(model)).resolve():
        beside = files_beside(source.directory, [*copied, *source.files])
        copied, left_out = copied + beside[0], left_out + beside[1]
    return Plan(source, str(model), recipe, _shards(source, tensors), copied, left_out, notes)


def _refuse_quantized(source: Checkpoint) -> None:
    config = (source.config or {}).get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
    found = f"is quantized already (quant_method {method} in config.json)"
    remedy = "Convert the checkpoint it was made from"
    if method == metadata.KEY:
        found = f"is a packed checkpoint already (quant_method {method})"
        remedy = "Use it as it is, or convert its source"
    raise CheckpointError(source.directory, found, "weights in floating point", remedy)


def _imagine(source: Checkpoint, model: str | Path) -> str:
    """Give a source without weights the tensors of its architecture; returns a note on it."""
    if source.config is None:
        found = "no weights and no config.json"
        raise CheckpointError(model, found, "a Hugging Face checkpoint", "Check the path")
    source.files = [SAFETENSORS]
    source.tensors = {
        name: TensorInfo(name, dtype, shape, SAFETENSORS)
        for name, (dtype, shape) in skeleton_shapes(source.config).items()
    }
    return "no weights here: names and shapes are those of the architecture"


def _check_calibrated(source: Checkpoint, model: str | Path) -> None:
    """Raise UsageError or CheckpointError where calibration has nothing to fit or to run."""
    if isinstance(source, Imported):
        ternary = source.group_sizes
        raise UsageError(
            model,
            f"is ternary already ({source.format})" if ternary else f"is {source.format}",
            "weights that calibration can fit, in a checkpoint that transformers loads",
            "Leave out --dataset and --method gptq",
        )
    if why := why_no_skeleton(source.config):
        raise CheckpointError(
            model,
            f"{why}, and calibration runs the model",
            "an architecture that transformers has",
            "Convert it without --dataset",
        )


def _settled(
    recipe: Recipe, source: Checkpoint, shapes: Mapping[str, tuple[int, ...]], equal: Equal
) -> Recipe:
    """The recipe, with the source's word on what it leaves open; group sizes stay open.

    A rotation at run time is none where the engine has none, or one is folded into the weights.
    """
    found: dict[str, Any] = {"head": recipe.head or KEEP, "embeddings": recipe.embeddings or KEEP}
    if recipe.activations is None:
        found["activations"] = source.activations if isinstance(source, Imported) else "none"
    if recipe.calibrate is not None and recipe.calibrate.rotation is None:
        largest = 0 if recipe.engine or recipe.fold else LARGEST_ROTATION
        found["calibrate"] = replace(recipe.calibrate, rotation=largest)
    unsaid = [end for end in END_NAMES if getattr(recipe, end) is None]
    if isinstance(source, Imported) and unsaid:
        ends = judge_ends(shapes, skeleton_of(shapes, source.config, equal))
        if ends["head"] == ends["embeddings"] and len(unsaid) == 1:
            unsaid = []  # one tensor, of which the other option speaks
        for end in unsaid:
            tensors = ends[end].tensors
            kept = any(fnmatchcase(name, glob) for name in tensors for glob in recipe.keep)
            if tensors and not kept and tensors <= source.ternary_ends:
                found[end] = TERNARY
    return replace(recipe, **found)


def _is_ternary(source: Checkpoint) -> bool:
    """Whether it is in a format of ternary weights."""
    return isinstance(source, Imported) and bool(source.group_sizes)


def _dense(source: Checkpoint) -> dict[str, str]:
    """Weights that a ternary source has in floating point -> why they stay so by default."""
    if not isinstance(source, Imported) or not source.group_sizes:
        return {}
    names = source.tensors.keys() - source.group_sizes.keys()
    return dict.fromkeys(names, f"not ternary at the source ({source.format})")


def _remarks(source: Checkpoint, choices: Iterable[Choice], why: str | None) -> list[str]:
    """What is to be said of a source and of how its tensors were chosen.

    why  names and shapes have decided, if they have
    """
    notes = []
    if isinstance(source, Imported) and source.group_sizes:
        notes.append(f"ternary already ({source.format}): packed without loss")
    if why:
        notes.append(
            f"no skeleton of the model ({why}): chosen by names and shapes, and not tried whether "
            "the result loads"
        )
    return notes + sorted({f"{c.name}: {c.reason}" for c in choices if TIED_ENDS in c.reason})


def _plan_tensor(info: TensorInfo, choice: Choice, recipe: Recipe) -> TensorPlan:
    tied_to = choice.copy_of or None
    shape = info.shape
    if choice.codec and choice.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    elif choice.codec and choice.convolution:
        shape = (shape[0], math.prod(shape[1:]))
    if choice.codec and info.dtype not in _TERNARIZABLE:
        raise CheckpointError(
            info.file,
            f"{info.name} is {info.dtype}; weights to pack are {', '.join(_TERNARIZABLE)}",
            remedy="Convert a checkpoint in floating point, or name it with --keep",
        )
    dtype = info.dtype
    if recipe.dtype and dtype in _FLOATING:
        dtype = KEPT_DTYPES[recipe.dtype]
    if not choice.ternary:
        size = INT4_GROUP_SIZE if choice.codec == INT4 else INT8_GROUP_SIZE
        return TensorPlan(info, choice, shape, size, dtype, tied_to=tied_to)
    return TensorPlan(
        info,
        choice,
        shape,
        GROUP_SIZE if recipe.group_size is None else recipe.group_size,
        dtype,
        "F16" if recipe.scale_bits == 16 else "U8",
        tied_to,
        choice.planes,
        scale_bits=min(8, recipe.scale_bits),
    )


def _shards(source: Checkpoint, tensors: Iterable[TensorPlan]) -> list[Shard]:
    """A file of the output for each of the source."""
    by_file: dict[str, list[TensorPlan]] = {file: [] for file in source.files}
    for tensor in tensors:
        by_file[tensor.info.file].append(tensor)
    count = len(by_file)
    return [
        Shard(
            SAFETENSORS if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors",
            tuple(inside),
        )
        for i, inside in enumerate(by_file.values(), 1)
    ]


def calibrated_plan(tensor: TensorPlan, recipe: Recipe) -> TensorPlan:
    """The plan of a tensor that calibration finds: its zeros, and the rotation of its inputs."""
    tensor = replace(tensor, zeros=recipe.zeros)
    if recipe.calibrate is None or tensor.kernel:
        return tensor  # trained from what `itf` gives; or met by an input as often as it has places
    assert recipe.calibrate.rotation is not None, "of a recipe that is settled"
    block = block_size(tensor.shape[-1], recipe.calibrate.rotation)
    return replace(tensor, rotation=(block, recipe.calibrate.seed if block else 0))


def refuse_empty(plan: Plan) -> None:
    """Raise SelectionError where nothing becomes ternary, with the reasons.

    Of a module, whose tables may be all that was asked for, where nothing is packed.
    """
    of_module = MODULE in (plan.source.config or {})
    if any(t.ternary or (of_module and t.packed) for t in plan.tensors):
        return
    if plan.recipe.keep:
        raise SelectionError(
            plan.model, "--keep leaves no tensor to ternarize", "some", "Keep less"
        )
    reasons = Counter(t.choice.reason for t in plan.tensors).most_common(5)
    said = ", ".join(f"{reason} ({count})" for reason, count in reasons)
    raise SelectionError(
        plan.model,
        f"none of its {len(plan.tensors)} tensors, first "
        f"{plan.tensors[0].name if plan.tensors else 'none'}, is a linear weight to ternarize: "
        f"{said}",
        "some",
        "List them all with --dry-run, or name some with --include",
    )
