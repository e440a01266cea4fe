"""The tensors of a packed checkpoint in another coding: the same digests, other bytes."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ternarize.convert.verify import verify
from ternarize.errors import UsageError
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.json_files import read_json
from ternarize.files.metadata import RANS, SCALE_SUFFIX, Record
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.files.recoded import recode_file, rewritten
from ternarize.progress import Progress
from ternarize.sources.packed import open_packed
from ternarize.threads import THREADS
from ternarize.trits.base3 import BASE3

_CODECS = (RANS, BASE3)


def recode(
    model: str | Path,
    output: str | Path,
    codec: str = RANS,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed checkpoint with its ternary tensors in another coding, without the source.

    model   packed directory or Hub id; it is verified first
    output  directory to make
    codec   "rans": by their frequencies, where that takes fewer bytes; "base3": five in a byte

    Trits, scales and digests stay. The result is verified. Returns plain data: bytes before and
    after, bits a ternary weight. Raises UsageError for another codec, OutputError for an output
    that exists, FormatError where the checkpoint is damaged.
    """
    if codec not in _CODECS:
        raise UsageError("--codec", f"{codec!r}", f"one of {', '.join(_CODECS)}")
    output = Path(output).expanduser()
    verify(model, threads=threads)
    checkpoint, records = open_packed(model)
    sizes, done = dict[str, int](), itertools.count(1)

    def told(name: str) -> None:
        if progress is not None:
            progress(next(done), len(records), name, "coding")

    with rewritten(checkpoint, output) as partial:
        for file in checkpoint.files:
            own = {n: r for n, r in records.items() if checkpoint.tensors[n].file == file}
            sizes |= recode_file(checkpoint, file, own, codec, partial, threads, told)
        _renew(records, sizes, codec, partial)
        made, after = open_packed(partial)
        container.check_data(made, after, threads=threads)
    ternary = [name for name, record in records.items() if record.kind == "ternary"]
    weights = sum(_numel(records[name]) for name in ternary)
    return {
        "output": str(output),
        "codec": codec,
        "bytes_before": sum(
            (checkpoint.directory / file).stat().st_size for file in checkpoint.files
        ),
        "bytes": sum((output / file).stat().st_size for file in checkpoint.files),
        "bpw_before": _bits(checkpoint, ternary, weights),
        "ternary_bpw": _bits(made, ternary, weights),
    }


def _bits(checkpoint: Checkpoint, ternary: Iterable[str], weights: int) -> float | None:
    """Bits a ternary weight as they are stored."""
    names = [each for name in ternary for each in (name, name + SCALE_SUFFIX)]
    stored = sum(checkpoint.tensors[each].stored_bytes for each in names)
    return round(8 * stored / weights, 4) if weights else None


def _numel(record: Record) -> int:
    assert record.shape is not None
    return math.prod(record.shape)


def _same_in_either_codec(recipe: Any) -> bool:
    """Whether a conversion by a recipe on record gives the same trits in either codec."""
    if not isinstance(recipe, dict):
        return False
    calibrate = recipe.get("calibrate")
    spent = isinstance(calibrate, dict) and calibrate.get("target_bpw") is not None
    # a budget counts what is stored, and base 3 has no scales in 6 bits
    return not spent and recipe.get("scale_bits") != 6


def _renew(
    records: Mapping[str, Record], sizes: Mapping[str, int], codec: str, output: Path
) -> None:
    """Bring what says sizes of tensors up to date, and how a conversion would give them."""
    record, index = (read_json(output / name) for name in (RECORD, SAFETENSORS + INDEX))
    # what steps have moved was of base 3 when they did
    if record is not None and "steps" not in record and _same_in_either_codec(record.get("recipe")):
        record["recipe"]["codec"] = codec
    for name, row in (record or {}).get("tensors", {}).items():
        if name in records and "stored_bytes" in row:
            packed = records[name].shape is not None
            row["stored_bytes"] = sizes[name] + (sizes[name + SCALE_SUFFIX] if packed else 0)
            if packed:
                weights = max(1, _numel(records[name]))
                row["bpw"] = round(8 * row["stored_bytes"] / weights, 4)
    if index is not None and isinstance(index.get("metadata"), dict):
        index["metadata"]["total_size"] = sum(sizes.values())
    for name, table in ((RECORD, record), (SAFETENSORS + INDEX, index)):
        if table is not None:
            text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
            (output / name).write_text(text, "utf-8")
