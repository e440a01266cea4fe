"""What is written beside the weights: the record of the conversion, config.json, the index."""

import json
import math
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ternarize.calibrate.texts import SELF
from ternarize.convert.journal import State
from ternarize.convert.tensor import Result
from ternarize.files import metadata
from ternarize.files.metadata import FORMAT_VERSION
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.measure.documents import DEFAULT
from ternarize.models.configuration import pruned
from ternarize.plans.copied import BESIDE
from ternarize.plans.layout import Plan, TensorPlan, recorded_group_size
from ternarize.plans.recipe import GPTQ, WITHOUT_DATA, Recipe
from ternarize.sources.fetch import split_id
from ternarize.sources.imports.common import Imported
from ternarize.sources.origin import hub_commit, read_card
from ternarize.version import __version__


def write_small_files(plan: Plan, state: State, folder: Path) -> dict[str, Any]:
    """Write all but the weights into `folder`; returns the record."""
    source = plan.source
    for name in plan.copied:
        target = folder / name.removeprefix(BESIDE)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == f"{BESIDE}modules.json":
            _write_modules(source.directory / name, target)
        else:
            shutil.copyfile(source.directory / name, target)
    for name, content in _made(plan).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    record = make_record(plan, state)
    # config.json also where the source has none: it is what says that the weights are packed
    tables = {"config.json": _packed_config(plan, state), RECORD: record}
    if len(state.shards) > 1:
        tables[SAFETENSORS + INDEX] = _index(plan, state)
    for name, table in tables.items():
        text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, "utf-8")
    return record


def _made(plan: Plan) -> dict[str, bytes]:
    """The small files that an import makes, by name, where the source has none of its own.

    A tokenizer is taken as a whole or not at all, and so is what modules.json names.
    """
    if not isinstance(plan.source, Imported):
        return {}
    there, made = {name.removeprefix(BESIDE) for name in plan.copied}, plan.source.made
    modules = {name for name in made if name == "modules.json" or "/" in name}
    left = set(there)
    if there & {"tokenizer.json", "tokenizer.model"}:
        left |= made.keys() - modules
    if "modules.json" in there:
        left |= modules
    return {name: content for name, content in made.items() if name not in left}


def _write_modules(source: Path, target: Path) -> None:
    """Write the modules of sentence-transformers with the first, the transformer, at the top."""
    first, *others = json.loads(source.read_text("utf-8"))
    text = json.dumps([{**first, "path": ""}, *others], indent=2, ensure_ascii=False) + "\n"
    target.write_text(text, "utf-8")


def _index(plan: Plan, state: State) -> dict[str, Any]:
    weight_map = {name: shard.file for shard in state.shards for name in sorted(shard.layout())}
    coverage = plan.coverage()
    return {
        "metadata": {
            "total_parameters": coverage["ternary"] + coverage["kept"],
            "total_size": sum(map(state.stored_bytes, state.tensors)),
        },
        "weight_map": weight_map,
    }


def _packed_config(plan: Plan, state: State) -> dict[str, Any]:
    """The configuration of the source, and how its weights are packed."""
    config: dict[str, Any] = pruned(plan.source.config or {}, _is_path)
    recipe = plan.recipe
    if recipe.dtype:
        config["dtype" if "torch_dtype" not in config else "torch_dtype"] = recipe.dtype
    config["quantization_config"] = {
        "quant_method": metadata.KEY,
        "format_version": FORMAT_VERSION,
        "method": recipe.method,
        "group_size": recorded_group_size(plan, state.tensors),
        "activations": recipe.activations,
        **({"missing": plan.missing} if plan.missing else {}),
    }
    return config


def _is_path(key: str, value: Any) -> bool:
    """Whether it is the folder that the source was once loaded from."""
    return key == "_name_or_path" and not _is_hub_id(value)


def _is_hub_id(value: Any) -> bool:
    return isinstance(value, str) and split_id(value) is not None and not os.path.exists(value)


def make_record(plan: Plan, state: State) -> dict[str, Any]:
    """The record of a conversion: what was done to what, tensor by tensor, and what came out."""
    source = plan.source
    alone = isinstance(source, Imported) and source.alone
    hub = None if alone else hub_commit(plan.model, source)
    card = {} if alone else read_card(plan.folder)
    calibration, calibrated = plan.recipe.calibrate, state.calibrated
    uncalibrated: Collection[str] = ()
    # what calibration has not seen may have been trained since
    if calibrated and calibration and not (calibration.reconstruct or plan.recipe.training):
        blocks = calibrated.record["blocks"]
        uncalibrated = {name for block in blocks for name in block["uncalibrated"]}
    group_size = recorded_group_size(plan, state.tensors)
    return {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "ternarize", "version": __version__},
        "source": {
            "files": {file: (source.directory / file).stat().st_size for file in source.files},
            "parameters": sum(i.numel for i in source.tensors.values()),
            "bytes": source.stored_bytes,
            **({"imported": source.about()} if isinstance(source, Imported) else {}),
            **({"hub": hub} if hub else {}),
            **({"card": card} if card else {}),
            **({"missing": plan.missing} if plan.missing else {}),
        },
        "recipe": _recorded(replace(plan.recipe, group_size=group_size)),
        "coverage": plan.coverage(),
        **({"calibration": calibrated.record} if calibrated and calibrated.record else {}),
        **({"training": calibrated.training} if calibrated and calibrated.training else {}),
        "tensors": {
            t.name: _tensor_record(
                t, state.results.get(t.name), plan.recipe, uncalibrated, state.stored_bytes(t)
            )
            for t in state.tensors
        },
    }


def _recorded(recipe: Recipe) -> dict[str, Any]:
    """A recipe for the public record: of what is on this disk, the last part of its path."""
    if recipe.calibrate is not None:
        dataset = _last_part(recipe.calibrate.dataset)
        recipe = replace(recipe, calibrate=replace(recipe.calibrate, dataset=dataset))
    if recipe.train is not None:
        texts = tuple(_last_part(each) for each in recipe.train.texts)
        teacher, start = (
            each and _last_part(each) for each in (recipe.train.teacher, recipe.train.start)
        )
        train = replace(recipe.train, texts=texts, teacher=teacher, start=start)
        recipe = replace(recipe, train=train)
    return asdict(recipe)


def _last_part(given: str) -> str:
    """The last part of a path that there is; of FILE=WEIGHT, with the weight."""
    if given in (DEFAULT, SELF):
        return given
    for name, weight in ((given, ""), (given.rpartition("=")[0], f"={given.rpartition('=')[2]}")):
        path = Path(os.path.expanduser(name))
        if name and path.exists():
            return (path.resolve() if path.is_dir() else path).name + weight
    return given


def _tensor_record(
    tensor: TensorPlan,
    result: Result | None,
    recipe: Recipe,
    uncalibrated: Collection[str],
    stored_bytes: int,
) -> dict[str, Any]:
    """What became of a tensor; without a result it is tied to another."""
    row: dict[str, Any] = {
        "becomes": tensor.becomes,
        "reason": f"tied to {tensor.tied_to}" if result is None else tensor.choice.reason,
        "source_dtype": tensor.info.dtype,
        "source_shape": list(tensor.info.shape),
    }
    if result is None:
        return row
    if result.calibrated and not tensor.packed:
        row["reason"] += ", fitted by calibration"
        row["fitted"] = True
    row["stored_bytes"] = stored_bytes
    row["sha256"] = result.sha256
    if not tensor.packed:
        return row
    size = max(1, tensor.info.numel)
    row["method"] = tensor.choice.codec
    if result.calibrated and not tensor.ternary:
        row["fitted"] = True
    if tensor.ternary:
        row["method"] = recipe.method
        if result.lossless:
            row["method"] = "lossless"
        elif recipe.method == GPTQ and (not result.calibrated or tensor.name in uncalibrated):
            row["method"] = WITHOUT_DATA
    row["group_size"] = result.group_size
    if tensor.planes > 1:
        row["planes"] = tensor.planes
    if tensor.kernel:
        row["kernel"] = True
    if tensor.choice.table:
        row["table"] = True
    if tensor.rotation[0]:
        row["rotation"] = tensor.rotation[0]
    row["bpw"] = round(row["stored_bytes"] * 8 / size, 4)
    if tensor.ternary:
        row["sparsity"] = round(1 - result.nonzero / (size * tensor.planes), 6)
    row["relative_error"] = relative_error(result)
    return row


def relative_error(result: Result) -> float | None:
    """sum (w - w')^2 / sum w^2 of a packed tensor, to six digits.

    None where the squares leave the range of float32.
    """
    if not (math.isfinite(result.squared_error) and math.isfinite(result.energy)):
        return None
    if result.energy == 0:
        return None if result.nonzero else 0.0
    return round(result.squared_error / result.energy, 6)
