"""Proof that a packed checkpoint is whole, and that it is what its source gives.

Without the source: every file's structure, codes, padding, scales and digests, and that the files
agree with each other. With the source: every tensor is converted again, by the recipe on record,
and its digest compared. Nothing is written.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ternarize import container
from ternarize.checkpoint import (
    Checkpoint,
    locate,
    open_checkpoint,
    read_json,
)
from ternarize.codecs import THREADS
from ternarize.container import SCALE_SUFFIX, Record
from ternarize.convert import Progress, Relayout, convert_tensor
from ternarize.errors import DigestError, FormatError
from ternarize.plan import RECORD, Calibrate, Recipe, TensorPlan, plan


def open_packed(model: str | Path) -> tuple[Checkpoint, dict[str, Record]]:
    """Open a packed checkpoint and read its records, checking headers but no data.

    Raises CheckpointError where there is none, FormatError where it breaks a rule of the format.
    """
    packed = open_checkpoint(locate(model))
    config = (packed.config or {}).get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != container.KEY:
        raise FormatError(
            f"{model}: config.json does not say quant_method {container.KEY}; expected a packed "
            "checkpoint. Pack the model with `ternarize convert`."
        )
    container.check_version("config.json", config.get("format_version"), [])
    for file in packed.files:
        if not file.endswith(".safetensors"):
            raise FormatError(f"{file}: a packed checkpoint is in safetensors. Fetch it again.")
    records = container.records_of(packed)
    return packed, records


def verify(
    model: str | Path,
    source: str | Path | None = None,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a packed checkpoint in full; with `source`, re-derive it and compare.

    model     packed directory or Hub id
    source    the checkpoint that it was made from; needs the record (ternarize.json)
    progress  called after each tensor

    Returns counts of what was checked. Raises FormatError or DigestError on the first fault,
    CheckpointError if the source cannot be read.
    """
    packed, records = open_packed(model)
    total = sum(info.nbytes for info in packed.tensors.values())
    done = 0

    def checked(name: str) -> None:
        nonlocal done
        done += packed.tensors[name].nbytes
        if progress:
            progress(done, total, name)

    container.check(packed, records, threads=threads, done=checked)
    check_record(packed, records)
    kinds = Counter(record.kind for record in records.values())
    result = {
        "files": len(packed.files),
        "bytes": total,
        "ternary": kinds["ternary"],
        "int8": kinds["int8"],
        "kept": kinds["kept"],
        "source_compared": source is not None,
    }
    if source is not None:
        _compare(packed, records, source, progress)
    return result


def check_record(packed: Checkpoint, records: dict[str, Record]) -> dict[str, Any] | None:
    """The content of ternarize.json, None without one; it must speak of the tensors there are."""
    record = read_json(packed.directory / RECORD)
    if record is None:
        return None
    container.check_version(RECORD, record.get("format_version"), [])
    rows = record.get("tensors")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise FormatError(f"{RECORD}: has no table of tensors. Fetch it again, or remove it.")
    said = {name: row.get("becomes") for name, row in rows.items() if row.get("becomes") != "tied"}
    found = {name: record.kind for name, record in records.items()}
    for name in sorted(said.keys() | found.keys()):
        if said.get(name) != found.get(name):
            raise FormatError(
                f"{RECORD}: {name} is {said.get(name, 'missing')} there and "
                f"{found.get(name, 'missing')} in the files. Fetch the checkpoint again."
            )
    return record


def _compare(
    packed: Checkpoint, records: dict[str, Record], source: str | Path, progress: Progress | None
) -> None:
    record = read_json(packed.directory / RECORD)
    if record is None:
        raise FormatError(
            f"{packed.directory}: has no {RECORD}; expected the record of its conversion, without "
            "which it cannot be repeated. Verify without --source."
        )
    try:
        options = dict(record["recipe"])
        globs = ("keep", "include", "planes")
        options |= {key: tuple(options[key]) for key in globs if key in options}
        if options.get("calibrate") is not None:
            options["calibrate"] = Calibrate(**options["calibrate"])
        recipe = Recipe(**options)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{RECORD}: its recipe cannot be used ({error}); expected the options of a conversion. "
            "Fetch it again."
        ) from None
    work = plan(source, recipe)
    expected = {t.name: t for t in work.tensors if not t.tied_to}
    if expected.keys() != records.keys():
        name = sorted(expected.keys() ^ records.keys())[0]
        where = "the source" if name in expected else "the packed checkpoint"
        raise FormatError(
            f"{packed.directory}: {name} is in {where} alone; expected the same tensors. "
            f"Check that {source} is the source."
        )
    total = sum(t.info.nbytes for t in work.tensors)
    done = 0
    for name, tensor in expected.items():
        if _derive(packed, records[name], work.source, tensor, recipe) != records[name]:
            raise DigestError(
                f"{packed.tensors[name].file}: {name}: is not what {source} gives by the recipe on "
                "record. Check that it is the source, and that both are unchanged."
            )
        done += tensor.info.nbytes
        if progress:
            progress(done, total, name)


def _derive(
    packed: Checkpoint, record: Record, source: Checkpoint, tensor: TensorPlan, recipe: Recipe
) -> Record | None:
    """The record of the source's tensor when it is converted in the layout on record."""
    if tensor.packed and record.shape is not None:
        scale = packed.tensors[tensor.name + SCALE_SUFFIX].dtype
        tensor = replace(tensor, group_size=record.group_size, scale_dtype=scale)
    try:
        return tensor.record(convert_tensor(source, tensor, recipe, _discard).sha256)
    except Relayout:
        return None


def _discard(name: str, offset: int, data: Tensor) -> None:
    """A sink: the digest is all that is wanted."""
