"""Packed files written again: in a directory beside the rest of a checkpoint, with other tensors.

With ternary tensors as streams, or as they were before, is what `ternarize recode` does with a
checkpoint, and a conversion with its own files.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from ternarize.errors import FormatError
from ternarize.files import metadata
from ternarize.files.checkpoint import Checkpoint, open_files
from ternarize.files.container import check_data
from ternarize.files.headers import DTYPES, Entry, byte_view, file_head, lay_out, read_bytes
from ternarize.files.json_files import strict_json
from ternarize.files.metadata import KEY, RANS, SCALE_SUFFIX, Record, records_of
from ternarize.files.outputs import fresh_output
from ternarize.files.sums import SUMS, renew_sums
from ternarize.trits.rans import encode_rows


@contextmanager
def rewritten(packed: Checkpoint, output: Path) -> Iterator[Path]:
    """A packed checkpoint's directory again: all that is in it but its weights, which come inside.

    What is wrong inside leaves nothing. SHA256SUMS is renewed where there was one. Raises
    OutputError as `fresh_output`.
    """
    top = packed.directory  # weights of the same name below are those of modules
    left = [*packed.files, SUMS]
    with fresh_output(top, output, folder=True) as partial:
        shutil.copytree(
            top,
            partial,
            ignore=lambda at, names: left if Path(at) == top else [],
            dirs_exist_ok=True,
        )
        yield partial
        if (top / SUMS).is_file():
            renew_sums(partial)


def head_again(
    checkpoint: Checkpoint, file: str, entries: Mapping[str, Entry], records: Mapping[str, Record]
) -> bytes:
    """The head of a packed file that is written again: what else its metadata says stays.

    entries  of all its tensors, in the order of their data
    records  of its tensors; which digests they have changes no length
    """
    recorded = strict_json(checkpoint.metadata[file][KEY]).get("recorded") is True
    said = checkpoint.metadata[file] | metadata.dump_metadata(records, recorded=recorded)
    return file_head(entries, said)


@dataclass(frozen=True)
class _Part:
    """A tensor as it is to be stored; `start` of a stream in the file of those."""

    dtype: str
    shape: tuple[int, ...]
    start: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def recode_file(
    checkpoint: Checkpoint,
    file: str,
    records: Mapping[str, Record],
    codec: str,
    folder: Path,
    threads: int,
    told: Callable[[str], None],
) -> dict[str, int]:
    """Write one packed file again, into a folder; returns the bytes of its tensors.

    records  of its tensors, from `records_of`
    codec    "rans": ternary ones as streams, where that takes fewer bytes, and their scales
             likewise; "base3": none
    told     called with the name of each tensor of the records that is coded

    Trits, scales and digests stay. Streams lie beside the file until the sizes of all are known.
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
    """One file."""
    entries = lay_out((name, part.dtype, part.shape) for name, part in parts.items())
    with path.open("wb") as out:
        out.write(head_again(checkpoint, file, entries, records))
        for name in entries:
            start = parts[name].start
            if start is None:
                data = byte_view(checkpoint.read(name))
            else:
                data = read_bytes(streams, start, parts[name].nbytes)
            out.write(data.numpy().data)


def digests_of_whole(path: Path) -> dict[str, str]:
    """SHA-256 of the tensors of a packed file, by name, every byte checked.

    {} of one that is not there or not whole.
    """
    if not path.is_file():
        return {}
    try:
        packed = open_files(path.parent, [path.name])
        records = records_of(packed, whole=False)
        check_data(packed, records)
    except FormatError:  # it is being written, or was damaged: it does not count
        return {}
    return {name: record.sha256 for name, record in records.items()}
