"""Packed checkpoints opened: their records, and the record of the conversion."""

from pathlib import Path
from typing import Any

from ternarize.errors import FormatError
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
    if not _is_calibration(record.get("calibration")):
        raise FormatError(
            RECORD,
            "its calibration cannot be read",
            "data, quality, forms and blocks, as a conversion writes them",
            "Fetch it again, or remove it",
        )
    return record


def _is_calibration(value: Any) -> bool:
    """Whether the entry has the form that convert gives it (see calibrate/pipeline.py), or none."""

    def number(item: Any) -> bool:
        return isinstance(item, (int, float)) and not isinstance(item, bool)

    def optional(item: Any) -> bool:
        return item is None or number(item)

    def table(item: Any, good: Any) -> bool:
        return isinstance(item, dict) and all(good(each) for each in item.values())

    def figure(item: Any) -> bool:
        return table(item, optional) and {"value", "standard_error"} <= item.keys()

    def pair(item: Any) -> bool:
        return isinstance(item, list) and len(item) == 2 and all(map(number, item))

    def block(item: Any) -> bool:
        return (
            isinstance(item, dict)
            and isinstance(item.get("block"), str)
            and number(item.get("before"))
            and number(item.get("after"))
            and table(item.get("matrices"), pair)
            and table(item.get("uncalibrated"), number)
        )

    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("data"), dict)
        and isinstance(value["data"].get("notes", []), list)
        and table(value.get("quality"), figure)
        and table(value.get("forms"), number)
        and number(value.get("uncalibrated"))
        and isinstance(value.get("blocks"), list)
        and all(map(block, value["blocks"]))
    )
