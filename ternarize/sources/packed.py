"""Packed checkpoints opened: their records, and the record of the conversion."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ternarize.errors import FormatError, UsageError
from ternarize.files import metadata
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.json_files import read_json
from ternarize.files.metadata import Record
from ternarize.files.names import RECORD
from ternarize.sources.checkpoint import locate, open_checkpoint


def open_packed(model: str | Path) -> tuple[Checkpoint, dict[str, Record]]:
    """Open a packed checkpoint and read its records, checking headers but no data.

    Raises CheckpointError where there is none, FormatError where it breaks a rule of the format.
    """
    packed = open_checkpoint(locate(model))
    config = (packed.config or {}).get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != metadata.KEY:
        raise FormatError(
            model,
            f"config.json does not say quant_method {metadata.KEY}",
            "a packed checkpoint",
            "Pack the model with `ternarize convert`",
        )
    metadata.check_version("config.json", config.get("format_version"), [])
    for file in packed.files:
        if not file.endswith(".safetensors"):
            raise FormatError(
                file, "a packed checkpoint is in safetensors", remedy="Fetch it again"
            )
    records = metadata.records_of(packed)
    metadata.check_format(packed)
    return packed, records


def check_uncoded(packed: Checkpoint, records: dict[str, Record]) -> None:
    """Raise UsageError where tensors are stored as streams: what is done with files as they lie."""
    coded = next((name for name, record in records.items() if record.coded), None)
    if coded is not None:
        raise UsageError(
            packed.directory,
            f"is coded ({coded})",
            "tensors in base3",
            f"Run `ternarize recode {packed.directory} OUTPUT --codec base3` and name that",
        )


def check_record(packed: Checkpoint, records: dict[str, Record]) -> dict[str, Any] | None:
    """The content of ternarize.json, None without one.

    Raises FormatError where it does not speak of the tensors there are, or has another form.
    """
    record = read_json(packed.directory / RECORD)
    if record is None:
        return None
    metadata.check_version(RECORD, record.get("format_version"), [])
    rows = record.get("tensors")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise FormatError(RECORD, "has no table of tensors", remedy="Fetch it again, or remove it")
    said = {name: row.get("becomes") for name, row in rows.items() if row.get("becomes") != "tied"}
    found = {name: record.kind for name, record in records.items()}
    for name in sorted(said.keys() | found.keys()):
        if said.get(name) != found.get(name):
            raise FormatError(
                RECORD,
                f"{name} is {said.get(name, 'missing')} there and {found.get(name, 'missing')} in "
                "the files",
                remedy="Fetch the checkpoint again",
            )
    metadata.check_listed(RECORD, rows, records, packed)
    for part, good, expected in (
        ("calibration", _is_calibration, "data, quality, forms and blocks"),
        ("training", _is_training, "texts, steps, tokens, held_out and quality"),
    ):
        if not good(record.get(part)):
            raise FormatError(
                RECORD,
                f"its {part} cannot be read",
                f"{expected}, as a conversion writes them",
                "Fetch it again, or remove it",
            )
    return record


def refuse_folded(start: str | Path, record: Mapping[str, Any] | None) -> None:
    """Raise UsageError for a start whose record says that a rotation is folded into its weights.

    The float weights that a training goes on from are those of the source, which are others then.
    """
    recipe = (record or {}).get("recipe")
    if isinstance(recipe, Mapping) and recipe.get("fold"):
        raise UsageError(
            start,
            "was converted with --fold, so that its weights are others than the source's, rotated",
            "a start whose weights stand for those of the source",
            "Start from a conversion without --fold",
        )


def _is_training(value: Any) -> bool:
    """Whether the entry has the form that a training gives it (train/run.py), or none."""
    return value is None or _has_members(
        value,
        texts=lambda texts: isinstance(texts, list) and all(isinstance(t, str) for t in texts),
        steps=_is_number,
        tokens=_is_number,
        minutes=_is_number,
        held_out=lambda looks: isinstance(looks, list) and all(map(_is_pair, looks)),
        kept_step=_is_number,
        quality=_all_of(_is_figure),
    )


def _is_calibration(value: Any) -> bool:
    """Whether the entry has the form that convert gives it (calibrate/pipeline.py), or none."""
    return value is None or _has_members(
        value,
        data=lambda data: isinstance(data, dict) and isinstance(data.get("notes", []), list),
        quality=_all_of(_is_figure),
        forms=_all_of(_is_number),
        uncalibrated=_is_number,
        blocks=lambda blocks: isinstance(blocks, list) and all(map(_is_block, blocks)),
    )


def _has_members(value: Any, **good: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(is_good(value.get(key)) for key, is_good in good.items())


def _all_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(good, value.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_figure(value: Any) -> bool:
    numbers = _all_of(lambda each: each is None or _is_number(each))
    return numbers(value) and {"value", "standard_error"} <= value.keys()


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_block(value: Any) -> bool:
    return _has_members(
        value,
        block=lambda name: isinstance(name, str),
        before=_is_number,
        after=_is_number,
        matrices=_all_of(_is_pair),
        uncalibrated=_all_of(_is_number),
    )
