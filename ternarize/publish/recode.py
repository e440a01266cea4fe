"""The tensors of a packed checkpoint in another coding: the same digests, other bytes."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ternarize.convert.verify import verify
from ternarize.errors import UsageError
from ternarize.files import container, metadata
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import DTYPES, Entry, byte_view, file_head, read_bytes
from ternarize.files.json_files import read_json, strict_json
from ternarize.files.metadata import KEY, RANS, SCALE_SUFFIX, Record
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.files.sums import SUMS, renew_sums
from ternarize.progress import Progress
from ternarize.publish.export.common import PackedCheckpoint, fresh_output
from ternarize.sources.packed import open_packed
from ternarize.threads import THREADS
from ternarize.trits.base3 import BASE3
from ternarize.trits.rans import encode_rows

_CODECS = (RANS, BASE3)


@dataclass(frozen=True)
class _Part:
    """A tensor as it is to be stored; `start` of a stream in the file of those."""

    dtype: str
    shape: tuple[int, ...]
    start: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


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
    packed = PackedCheckpoint(*open_packed(model))
    checkpoint, records, top = packed.checkpoint, packed.records, packed.directory
    sizes, done = dict[str, int](), itertools.count(1)

    def told(name: str) -> None:
        if progress is not None:
            progress(next(done), len(records), name, "coding")

    with fresh_output(packed, output, folder=True) as partial:
        shutil.copytree(
            top,
            partial,
            ignore=lambda at, names: [*checkpoint.files, SUMS] if Path(at) == top else [],
            dirs_exist_ok=True,
        )
        for file in checkpoint.files:
            own = {n: r for n, r in records.items() if checkpoint.tensors[n].file == file}
            sizes |= _recode_file(checkpoint, file, own, codec, partial, threads, told)
        _renew(records, sizes, partial)
        if (top / SUMS).is_file():
            renew_sums(partial)
        made, after = open_packed(partial)
        container.check_data(made, after, threads=threads)
    ternary = [name for name, record in records.items() if record.kind == "ternary"]
    weights = sum(_numel(records[name]) for name in ternary)
    return {
        "output": str(output),
        "codec": codec,
        "bytes_before": sum((top / file).stat().st_size for file in checkpoint.files),
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


def _recode_file(
    checkpoint: Checkpoint,
    file: str,
    records: Mapping[str, Record],
    codec: str,
    folder: Path,
    threads: int,
    told: Callable[[str], None],
) -> dict[str, int]:
    """Write one file; returns the bytes of its tensors.

    Streams lie beside it until the sizes of all are known.
    """
    own, parts = dict[str, Record](), dict[str, _Part]()
    scratch = folder / f"{file}.streams"
    with scratch.open("wb") as streams:
        for name, record in records.items():
            own[name], found = _coded(checkpoint, name, record, codec, streams, threads)
            parts |= found
            told(name)
    for name, info in checkpoint.tensors.items():  # scales of other files' tensors among them
        if info.file == file and name not in parts:
            parts[name] = _Part(info.dtype, info.shape)
    _write(checkpoint, file, folder / file, own, parts, scratch)
    scratch.unlink()
    return {name: part.nbytes for name, part in parts.items()}


def _coded(
    checkpoint: Checkpoint, name: str, record: Record, codec: str, streams: IO[bytes], threads: int
) -> tuple[Record, dict[str, _Part]]:
    """What of a tensor is to be stored as streams, which are written to `streams`."""
    record, parts = record.uncoded(), dict[str, _Part]()
    if codec != RANS or record.kind != "ternary" or not record.can_be_coded:
        return record, parts
    scales = checkpoint.tensors[name + SCALE_SUFFIX]
    beside = scales.file == checkpoint.tensors[name].file  # else they stay as they are
    for each, dtype in ((name, ""), *([(scales.name, scales.dtype)] if beside else [])):
        coded = replace(record, coded=True, coded_scales=dtype)
        stream = coded.streams(name)[each]
        rows = byte_view(checkpoint.read(each)).view(-1, stream.row_bytes)
        data = encode_rows(rows, stream.classes(), threads)
        if len(data) >= rows.numel():
            break  # of scales alone there are no streams
        parts[each] = _Part("U8", (len(data),), streams.tell())
        streams.write(data.numpy().data)
        record = coded
    return record, parts


def _write(
    checkpoint: Checkpoint,
    file: str,
    path: Path,
    records: Mapping[str, Record],
    parts: Mapping[str, _Part],
    streams: Path,
) -> None:
    """One file, the widest types first, so that all are aligned."""
    entries, at = dict[str, Entry](), 0
    for name in sorted(parts, key=lambda each: -DTYPES[parts[each].dtype].itemsize):
        part = parts[name]
        entries[name] = Entry(part.dtype, part.shape, at, part.nbytes)
        at += part.nbytes
    recorded = strict_json(checkpoint.metadata[file][KEY]).get("recorded") is True
    table = checkpoint.metadata[file] | metadata.dump_metadata(records, recorded=recorded)
    with path.open("wb") as out:
        out.write(file_head(entries, table))
        for name in entries:
            start = parts[name].start
            if start is None:
                data = byte_view(checkpoint.read(name))
            else:
                data = read_bytes(streams, start, parts[name].nbytes)
            out.write(data.numpy().data)


def _renew(records: Mapping[str, Record], sizes: Mapping[str, int], output: Path) -> None:
    """Bring what says sizes of tensors up to date."""
    record, index = (read_json(output / name) for name in (RECORD, SAFETENSORS + INDEX))
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
