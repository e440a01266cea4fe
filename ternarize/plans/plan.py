"""The plan of a conversion: what becomes of each tensor, and where each byte of it will lie.

Made from headers (or from config.json alone) before any weight is read, so that a plan for a model
of any size takes seconds, the sizes it prints are exact, and the conversion can work on tensors in
any order with the same bytes as result.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from ternarize.errors import CheckpointError, SelectionError, UsageError
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.files.names import RECORD as RECORD
from ternarize.files.names import SAFETENSORS
from ternarize.models.skeleton import Equal, skeleton_shapes, why_no_skeleton
from ternarize.plans.choose import Choice, check_fused_choices, end_tensors, select
from ternarize.plans.copied import not_read, small_files
from ternarize.plans.layout import Plan, Shard, TensorPlan
from ternarize.plans.lossless import check_lossless, own_groups
from ternarize.plans.recipe import GROUP_SIZE, KEEP, KEPT_DTYPES, TERNARY, Recipe
from ternarize.sources.imports import open_source
from ternarize.sources.imports.common import Imported
from ternarize.trits.int8 import INT8_GROUP_SIZE
from ternarize.trits.rotation import block_size

_FLOATS = ("F64", "F32", "F16", "BF16")
_TERNARIZABLE = ("F32", "F16", "BF16")


def make_plan(
    model: str | Path,
    recipe: Recipe = Recipe(),  # noqa: B008
    *,
    config_only: bool = False,
    stream: Path | None = None,
    for_record: bool = False,
) -> Plan:
    """Lay out a conversion from headers, without reading weights (except to compare tied copies).

    model        directory, or Hub id user/name[@revision]
    config_only  a config.json without weights is enough: names and shapes come from the skeleton
    stream       folder to fetch weight files to, one by one, when they are read; see `HubStream`
    for_record   the conversion is on record, which says the groups: no weight is looked at for that

    Raises CheckpointError, FormatError, SelectionError.
    """
    source = open_source(model, config_only=config_only, stream=stream)
    directory = source.directory
    _refuse_quantized(source)
    notes = []
    # weights can be looked at without a download, and have to be
    here = bool(source.tensors) and stream is None and not for_record
    if not source.tensors:
        if source.config is None:
            raise CheckpointError(
                model,
                "no weights and no config.json",
                "a Hugging Face checkpoint",
                "Check the path",
            )
        source.files = [SAFETENSORS]
        source.tensors = {
            name: TensorInfo(name, dtype, shape, SAFETENSORS)
            for name, (dtype, shape) in skeleton_shapes(source.config).items()
        }
        notes.append("no weights here: names and shapes are those of the architecture")
    notes += source.notes
    shapes = {name: info.shape for name, info in source.tensors.items()}
    equal = cache(source.equal)
    ends = _ends(source, recipe, shapes, equal)
    recipe = replace(recipe, head=ends["head"], embeddings=ends["embeddings"])
    choices = select(
        shapes,
        source.config,
        keep=recipe.keep,
        include=recipe.include,
        head=ends["head"],
        embeddings=ends["embeddings"],
        equal=equal,
        shared=recipe.calibrate is None,
    )
    if isinstance(source, Imported):
        choices = _keep_dense(source, choices, recipe.include)
        notes.append(f"ternary already ({source.format}): packed without loss")
        if recipe.calibrate is not None:
            raise UsageError(
                model,
                f"is ternary already ({source.format})",
                "weights that calibration can fit",
                "Leave out --dataset and --method gptq",
            )
    if recipe.calibrate is not None and recipe.group_size is None:
        recipe = replace(recipe, group_size=GROUP_SIZE)
    if recipe.activations is None:
        trained = source.activations if isinstance(source, Imported) else "none"
        recipe = replace(recipe, activations=trained)
    _check_planes(recipe, choices)
    why = why_no_skeleton(source.config)
    if why and recipe.calibrate is not None:
        raise CheckpointError(
            f"{directory}: {why}; calibration runs the model, so an architecture that "
            "transformers has is expected. Convert it without --dataset."
        )
    if why:
        notes.append(
            f"no skeleton of the model ({why}): chosen by names and shapes, and not tried whether "
            "the result loads"
        )
    notes += sorted({f"{c.name}: {c.reason}" for c in choices if "are tied" in c.reason})
    by_file: dict[str, list[TensorPlan]] = {file: [] for file in source.files}
    for choice in choices:
        info = source.tensors[choice.name]
        by_file[info.file].append(_plan_tensor(info, choice, recipe))
    if recipe.group_size is None:
        everything = [t for tensors in by_file.values() for t in tensors]
        by_file = {
            file: own_groups(source, tensors, everything, read=here)
            for file, tensors in by_file.items()
        }
    elif here and recipe.calibrate is None:
        for tensors in by_file.values():
            check_lossless(source, tensors, recipe.group_size)
    check_fused([t for tensors in by_file.values() for t in tensors])
    count = len(by_file)
    shards = [
        Shard(
            SAFETENSORS if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors",
            tuple(tensors),
        )
        for i, tensors in enumerate(by_file.values(), 1)
    ]
    alone = isinstance(source, Imported) and source.alone  # what lies around it can be anything
    copied, left_out = ([], []) if alone else small_files(directory, source.files)
    notes += not_read(source, left_out)
    return Plan(source, str(model), recipe, shards, copied, left_out, notes)


def _plan_tensor(info: TensorInfo, choice: Choice, recipe: Recipe) -> TensorPlan:
    tied_to = choice.copy_of or None
    shape = info.shape
    if choice.codec and choice.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if choice.codec and info.dtype not in _TERNARIZABLE:
        raise CheckpointError(
            info.file,
            f"{info.name} is {info.dtype}; weights to pack are {', '.join(_TERNARIZABLE)}",
            remedy="Convert a checkpoint in floating point, or name it with --keep",
        )
    dtype = info.dtype
    if recipe.dtype and dtype in _FLOATS:
        dtype = KEPT_DTYPES[recipe.dtype]
    if not choice.ternary:
        return TensorPlan(info, choice, shape, INT8_GROUP_SIZE, dtype, tied_to=tied_to)
    return TensorPlan(
        info,
        choice,
        shape,
        GROUP_SIZE if recipe.group_size is None else recipe.group_size,
        dtype,
        "U8" if recipe.scale_bits == 8 else "F16",
        tied_to,
        2 if any(fnmatchcase(info.name, glob) for glob in recipe.planes) else 1,
    )


def _ends(
    source: Checkpoint, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], equal: Equal
) -> dict[str, str]:
    """What becomes of the "head" and the "embeddings", KEEP where nothing says it.

    TERNARY where an import has them in a ternary format, unless --keep speaks of them.
    """
    said = {"head": recipe.head, "embeddings": recipe.embeddings}
    found = {end: what or KEEP for end, what in said.items()}
    unsaid = [end for end, what in said.items() if what is None]
    if not isinstance(source, Imported) or not unsaid:
        return found
    names = end_tensors(shapes, source.config, equal)
    if names["--head"] == names["--embeddings"] and len(unsaid) == 1:
        return found  # one tensor, of which the other option speaks
    for end in unsaid:
        tensors = names[f"--{end}"]
        kept = any(fnmatchcase(name, glob) for name in tensors for glob in recipe.keep)
        if tensors and not kept and tensors <= source.ternary_ends:
            found[end] = TERNARY
    return found


def _keep_dense(source: Imported, choices: list[Choice], include: Iterable[str]) -> list[Choice]:
    """Linear weights that the source itself has in floating point stay so, unless asked for."""
    reason = f"not ternary at the source ({source.format})"
    kept = []
    for choice in choices:
        asked = choice.reason.startswith("--") or any(fnmatchcase(choice.name, g) for g in include)
        if choice.ternary and choice.name not in source.group_sizes and not asked:
            choice = replace(choice, codec="", reason=reason)
        kept.append(choice)
    check_fused_choices(kept)
    return kept


def calibrated_plan(tensor: TensorPlan, recipe: Recipe) -> TensorPlan:
    """The plan of a tensor that calibration finds: its inputs are rotated."""
    assert recipe.calibrate is not None
    block = block_size(tensor.shape[-1], recipe.calibrate.rotation)
    return replace(tensor, rotation=(block, recipe.calibrate.seed if block else 0))


def check_fused(tensors: Iterable[TensorPlan]) -> None:
    """Raise SelectionError where tensors load into one parameter but would be packed unlike."""
    by_parameter: dict[str, TensorPlan] = {}
    for tensor in tensors:
        for parameter in tensor.choice.parameters if tensor.ternary else ():
            other = by_parameter.setdefault(parameter, tensor)
            mine, theirs = (
                f"group size {t.group_size}, planes {t.planes}, rotation {t.rotation}"
                for t in (tensor, other)
            )
            if mine != theirs:
                raise SelectionError(
                    tensor.name,
                    f"{mine}, but {other.name} has {theirs}, and both load into {parameter}",
                    "the same",
                    "Widen --planes to all of them",
                )


def _check_planes(recipe: Recipe, choices: Iterable[Choice]) -> None:
    """A glob that gives no ternary tensor two planes is an error."""
    names = [choice.name for choice in choices if choice.ternary]
    for glob in recipe.planes:
        if not any(fnmatchcase(name, glob) for name in names):
            raise SelectionError(
                f"--planes {glob!r}: matches no tensor that becomes ternary; a glob on tensor "
                "names (with .weight) is expected. The plan (--dry-run) lists the names."
            )


def _refuse_quantized(source: Checkpoint) -> None:
    config = (source.config or {}).get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
    if method == container.KEY:
        raise CheckpointError(
            source.directory,
            f"is a packed checkpoint already (quant_method {method})",
            "one in floating point",
            "Use it as it is, or convert its source",
        )
    raise CheckpointError(
        source.directory,
        f"is quantized already (quant_method {method} in config.json)",
        "weights in floating point",
        "Convert the checkpoint it was made from",
    )


def refuse_empty(work: Plan) -> None:
    """Raise SelectionError where nothing becomes ternary, with the reasons."""
    if any(t.ternary for t in work.tensors):
        return
    if work.recipe.keep:
        raise SelectionError(
            work.model, "--keep leaves no tensor to ternarize", "some", "Keep less"
        )
    reasons = Counter(t.choice.reason for t in work.tensors).most_common(5)
    said = ", ".join(f"{reason} ({count})" for reason, count in reasons)
    raise SelectionError(
        work.model,
        f"none of its {len(work.tensors)} tensors, first "
        f"{work.tensors[0].name if work.tensors else 'none'}, is a linear weight to ternarize: "
        f"{said}",
        "some. --dry-run lists them all, and --include can name some",
    )
