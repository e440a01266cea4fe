"""The tensors of a packed checkpoint in another coding: the same digests, other bytes."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ternarize.errors import UsageError
from ternarize.files import container, metadata
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import DTYPES, Entry, byte_view, file_head, read_bytes
from ternarize.files.json_files import read_json, strict_json
from ternarize.files.metadata import KEY, RANS, SCALE_SUFFIX, Record
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.files.sums import SUMS, format_sums, listed, sha256
from ternarize.progress import Progress
from ternarize.publish.export.common import fresh_output, open_verified
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
    packed = open_verified(model)
    checkpoint, records, top = packed.checkpoint, packed.records, packed.directory
    weights, bits, done = 0, 0, 0
    with fresh_output(packed, output, folder=True) as partial:
        shutil.copytree(
            top,
            partial,
            ignore=lambda at, names: [*checkpoint.files, SUMS] if Path(at) == top else [],
            dirs_exist_ok=True,
        )
        sizes = dict[str, int]()
        for file in checkpoint.files:
            own, parts = dict[str, Record](), dict[str, _Part]()
            scratch = partial / f"{file}.streams"
            with scratch.open("wb") as streams:
                for name in (n for n in records if checkpoint.tensors[n].file == file):
                    own[name], found = _part_of(
                        checkpoint, name, records[name], codec, streams, threads
                    )
                    parts |= found
                    done += 1
                    if own[name].kind == "ternary":
                        weights += _numel(own[name])
                        bits += 8 * sum(part.nbytes for part in found.values())
                    if progress is not None:
                        progress(done, len(records), name, "coding")
            _write(checkpoint, file, partial / file, own, parts, scratch)
            sizes |= {name: part.nbytes for name, part in parts.items()}
            scratch.unlink()
        _renew(checkpoint, records, sizes, partial)
        made, after = open_packed(partial)
        container.check_data(made, after, threads=threads)
    return {
        "output": str(output),
        "codec": codec,
        "bytes_before": sum((top / file).stat().st_size for file in checkpoint.files),
        "bytes": sum((output / file).stat().st_size for file in checkpoint.files),
        "ternary_bpw": round(bits / weights, 4) if weights else None,
    }


def _numel(record: Record) -> int:
    assert record.shape is not None
    return math.prod(record.shape)


def _part_of(
    checkpoint: Checkpoint, name: str, record: Record, codec: str, streams: IO[bytes], threads: int
) -> tuple[Record, dict[str, _Part]]:
    """A tensor as it is to be stored, with its scales; what is coded is written to `streams`."""
    scales = name + SCALE_SUFFIX
    record = replace(record, coded=False, coded_scales="")
    parts = {}
    if codec == RANS and record.kind == "ternary" and record.can_be_coded:
        for each in (name, scales):
            asked = replace(record, coded=True)
            if each == scales:
                asked = replace(asked, coded_scales=checkpoint.tensors[scales].dtype)
            coded = asked.streams(name)[each]
            rows = byte_view(checkpoint.read(each)).view(-1, coded.row_bytes)
            data = encode_rows(rows, coded.classes(), threads)
            if len(data) >= rows.numel():
                break  # of scales alone there are no streams
            parts[each] = _Part("U8", (len(data),), streams.tell())
            streams.write(data.numpy().data)
            record = asked
    for each in [name] if record.shape is None else [name, scales]:
        if each not in parts:
            info = checkpoint.tensors[each]
            parts[each] = _Part(info.dtype, info.shape)
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


def _renew(
    checkpoint: Checkpoint, records: Mapping[str, Record], sizes: Mapping[str, int], output: Path
) -> None:
    """Bring what says sizes and digests of files up to date."""
    tables = {RECORD: read_json(output / RECORD), SAFETENSORS + INDEX: None}
    record = tables[RECORD]
    for name, row in (record or {}).get("tensors", {}).items():
        if name in records and "stored_bytes" in row:
            row["stored_bytes"] = sizes[name] + sizes.get(name + SCALE_SUFFIX, 0)
            if "bpw" in row:
                weights = max(1, _numel(records[name]))
                row["bpw"] = round(8 * row["stored_bytes"] / weights, 4)
    index = read_json(output / (SAFETENSORS + INDEX))
    if index is not None and isinstance(index.get("metadata"), dict):
        index["metadata"]["total_size"] = sum(sizes.values())
        tables[SAFETENSORS + INDEX] = index
    for file, table in tables.items():
        if table is not None:
            text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
            (output / file).write_text(text, "utf-8")
    if (checkpoint.directory / SUMS).is_file():
        digests = {name: sha256(output / name) for name in listed(output)}
        (output / SUMS).write_text(format_sums(digests), "utf-8")
