"""Patches: what differs between two packed checkpoints of one layout, and the second one again.

A model that has been trained further differs from its base in a part of its trits, in scales and in
some kept tensors. `diff_packed` writes that part to a file, `apply_patch` makes of the base and the
file the very files of the second checkpoint: the heads of its weight files and its small files
travel whole, unless the base has them. formats/patch.md is the definition.

Tensors are read a piece at a time, and no more of them at once than there are threads.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import IO, Any

import numpy as np

from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, DigestError, FormatError, OutputError, damaged
from ternarize.files import container
from ternarize.files.checkpoint import TensorInfo
from ternarize.files.headers import DTYPES, read_bytes
from ternarize.files.json_files import readable
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.files.names import CARD
from ternarize.files.outputs import fresh_output, reserve, write_at
from ternarize.files.patch import (
    BY_TENSOR,
    IN_BASE,
    LARGEST_FILE,
    WHOLE,
    Encoded,
    Patch,
    PatchedFile,
    PatchPart,
    encode_part,
    is_portable,
    open_part,
    open_patch,
    write_patch,
)
from ternarize.files.sections import (
    NEW_BYTES,
    OF_HALVES,
    OF_TRITS,
    OF_WORDS,
    Bytes,
    apply_changes,
    blocks_of,
    tell_changes,
)
from ternarize.files.sums import SUMS, listed, sha256
from ternarize.progress import Progress
from ternarize.publish.export.common import PackedCheckpoint
from ternarize.sources.packed import check_uncoded, open_packed
from ternarize.threads import THREADS, in_threads
from ternarize.trits.base3 import BASE3
from ternarize.trits.int4 import INT4

_PIECE = 1 << 21  # bytes of a tensor at a time
_SMALL = 4096  # bytes of a file that travels anyway: another writer of the base has it otherwise
_OPEN = 64  # parts that are packed, and not yet in their place, at most


def diff_packed(
    a: str | Path,
    b: str | Path,
    patch: str | Path,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what makes `b` of `a` to a file.

    a, b   packed directories or Hub ids with the same tensors in the same layout; both are verified
    patch  the file to make; it must not exist

    Returns {"patch", "bytes": of the file, "result_bytes": of all files of b, "tensors": how many
    differ, "unchanged": how many do not, "files": small files that travel, "weights": those of the
    packed tensors, "bits_per_weight": of the whole patch, for each of these}.

    Raises CheckpointError, naming the tensor, where the layouts differ; FormatError for what
    `verify` refuses; OutputError where the file cannot be put.
    """
    patch = Path(patch).expanduser()
    old, new = _opened(a), _opened(b)
    container.check_data(old.checkpoint, old.records, threads=threads)
    verify(b, threads=threads)
    _check_layouts(old, new)
    if old.directory.resolve() in patch.resolve().parents:
        raise OutputError(patch, f"is inside {a}", "another place", "Name another")
    changes = [n for n, r in new.records.items() if r.sha256 != old.records[n].sha256]
    with fresh_output(new.directory, patch, folder=False) as partial:
        files = _describe_files(old, new, threads)
        base = {name: old.records[name].sha256 for name in changes}
        folder = partial.parent
        with tempfile.TemporaryFile(dir=folder) as packed, partial.open("wb") as out:
            small = encode_part("", "", lambda: _small_bytes(new.directory, files), folder)
            small.move_to(packed)
            parts = _encode_tensors(old, new, changes, packed, folder, threads, progress)
            write_patch(out, base, files, [small.part, *parts], packed)
    shapes = [record.shape for record in new.records.values() if record.shape is not None]
    weights = sum(map(math.prod, shapes))
    size = patch.stat().st_size
    return {
        "patch": str(patch),
        "bytes": size,
        "result_bytes": sum(file.size for file in files),
        "tensors": len(changes),
        "unchanged": len(new.records) - len(changes),
        "files": sum(file.source == WHOLE for file in files),
        "weights": weights,
        "bits_per_weight": 8 * size / max(1, weights),
    }


def apply_patch(
    base: str | Path,
    patch: str | Path,
    output: str | Path,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the checkpoint that a patch was made of, byte for byte, and verify it.

    base    packed directory or Hub id whose tensors are those of the patch's base, in any shards
    output  directory to make

    Returns what `verify` does of the output, and {"output", "changed": how many tensors}.

    Raises CheckpointError, naming what it is, for another base; FormatError (DigestError) for a
    patch or a base that is damaged; OutputError where the output cannot be put.
    """
    output = Path(output).expanduser()
    told = open_patch(Path(patch).expanduser())
    old = _opened(base)
    with fresh_output(old.directory, output, folder=True) as partial:
        _write_small(told, old, partial)
        with _of_the_patch(told):
            new = _opened(partial)
        _check_base(told, old, new)

        def one(name: str) -> str:
            _write_tensor(told, old, new, name)
            return name

        tensors = new.checkpoint.tensors
        in_threads(one, tensors, threads, _counted(new, tensors, progress, "patching"))
        _check_files(told, old, partial, threads)
        with _of_the_patch(told):
            result = verify(partial, threads=threads)
    return {"output": str(output), "changed": len(told.base), **result}


def _opened(model: str | Path) -> PackedCheckpoint:
    packed, records = open_packed(model)
    check_uncoded(packed, records)
    return PackedCheckpoint(packed, records)


@contextmanager
def _of_the_patch(patch: Patch) -> Iterator[None]:
    """Inside, what is wrong with the result is the patch's fault, and is told so."""
    try:
        yield
    except (CheckpointError, FormatError) as error:
        raise error.within(patch.path.name) from None


def _counted(
    packed: PackedCheckpoint, names: Iterable[str], progress: Progress | None, stage: str
) -> Callable[[str], None]:
    """A function that is called with each tensor that is done, and tells how many bytes are."""
    sizes = {name: packed.checkpoint.tensors[name].nbytes for name in names}
    total, done = sum(sizes.values()), 0

    def count(name: str) -> None:
        nonlocal done
        done += sizes[name]
        if progress:
            progress(done, total, name, stage)

    return count


def _record_name(name: str, records: dict[str, Record]) -> str:
    """The tensor whose record speaks of a stored one: of scales their matrix."""
    return name if name in records else name.removesuffix(SCALE_SUFFIX)


def _coding(name: str, records: dict[str, Record]) -> str:
    """How changes of a stored tensor are told, where there is a number for each."""
    record = records.get(name)
    if record is None or record.shape is None:
        return OF_WORDS
    return {BASE3: OF_TRITS, INT4: OF_HALVES}.get(record.codec, OF_WORDS)


# Making a patch


def _check_layouts(old: PackedCheckpoint, new: PackedCheckpoint) -> None:
    """Raise CheckpointError for the first tensor that is another in one than in the other."""
    remedy = (
        f"Convert both by one recipe: that of {old.directory} with --recipe "
        f"{old.directory / 'ternarize.json'}"
    )
    for name in [*new.records, *old.records]:
        words = []
        for packed in (old, new):
            record = packed.records.get(name)
            words.append("not there" if record is None else _layout(packed, name, record))
        if words[0] != words[1]:
            found = f"is {words[0]} in {old.directory} and {words[1]} in {new.directory}"
            raise CheckpointError(name, found, "the same layout in both", remedy)


def _layout(packed: PackedCheckpoint, name: str, record: Record) -> str:
    """What two tensors must have in common, in words; the type of scales is none of it."""
    dtype, shape = packed.info(name)
    if record.shape is None:
        return f"kept as {dtype} {list(shape)}"
    more = f", {record.planes} planes" * (record.planes > 1)
    more += ", transposed" * record.transposed
    more += f", in kernels of {list(record.kernel)}" * (record.kernel != ())
    block, seed = record.rotation
    more += f", rotated in blocks of {block} by seed {seed}" * (block > 0)
    return f"{record.codec} {list(shape)} with group size {record.group_size}{more}"


def _describe_files(
    old: PackedCheckpoint, new: PackedCheckpoint, threads: int
) -> list[PatchedFile]:
    """All files of the result but those whose names begin with a dot."""
    directory, weights = new.directory, new.checkpoint.files
    there = [name for name in (SUMS, CARD) if (directory / name).is_file()]
    names = sorted([*listed(directory), *there])
    digests = in_threads(lambda name: sha256(directory / name), names, threads)
    files = []
    for name, digest in zip(names, digests, strict=True):
        size = (directory / name).stat().st_size
        file = PatchedFile(name, size, digest, WHOLE)
        if not is_portable(name):
            found = "has a name that other systems do not take"
            raise CheckpointError(f"{directory}: {name}", found, remedy="Rename the file")
        if name in weights:
            starts = [t.start for t in new.checkpoint.tensors.values() if t.file == name]
            first = min(starts, default=size)
            file = replace(file, source=BY_TENSOR, head=first)
        elif size > _SMALL and name != CARD and _is_file(old.directory / name, size, digest):
            file = replace(file, source=IN_BASE)  # cards are edited: another base may have another
        elif size > LARGEST_FILE:
            raise CheckpointError(
                f"{directory}: {name}",
                f"is no weight file of the model, and has {size} bytes",
                f"at most {LARGEST_FILE} of a file that travels",
                "Move it away",
            )
        files.append(file)
    return files


def _is_file(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and sha256(path) == digest


def _small_bytes(directory: Path, files: list[PatchedFile]) -> Iterator[bytes]:
    """What travels whole of each file, in their order."""
    for file in files:
        if file.source != IN_BASE:
            size = file.head if file.source == BY_TENSOR else file.size
            yield read_bytes(directory / file.name, 0, size).numpy().tobytes()


def _encode_tensors(
    old: PackedCheckpoint,
    new: PackedCheckpoint,
    changes: list[str],
    packed: IO[bytes],
    folder: Path,
    threads: int,
    progress: Progress | None,
) -> list[PatchPart]:
    """The parts of all stored tensors that differ; their bytes are appended to `packed`."""
    differ = set(changes)
    names = [n for n in new.checkpoint.tensors if _record_name(n, new.records) in differ]
    count = _counted(new, names, progress, "comparing")
    parts: list[PatchPart] = []

    def one(name: str) -> tuple[str, Encoded | None]:
        return name, _encode_tensor(old, new, name, folder)

    def done(result: tuple[str, Encoded | None]) -> None:
        name, encoded = result
        if encoded is not None:
            encoded.move_to(packed)
            parts.append(encoded.part)
        count(name)

    for at in range(0, len(names), _OPEN):
        in_threads(one, names[at : at + _OPEN], threads, done)
    return parts


def _encode_tensor(
    old: PackedCheckpoint, new: PackedCheckpoint, name: str, folder: Path
) -> Encoded | None:
    """What changes in a stored tensor, by the smaller of two codings; None where nothing does."""
    info, before = new.checkpoint.tensors[name], old.checkpoint.tensors[name]
    width = DTYPES[info.dtype].itemsize

    def told(coding: str) -> Callable[[], Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            for offset, size in blocks_of(info.nbytes, _PIECE):
                b = _read(new, info, offset, size)
                a = b if coding == NEW_BYTES else _read(old, before, offset, size)
                yield tell_changes(a, b, coding, width)

        return pieces

    coding = _coding(name, new.records)
    if (before.dtype, before.shape) != (info.dtype, info.shape):
        coding = NEW_BYTES  # scales of another type
    elif _same(old, new, before, info):
        return None
    encoded = encode_part(name, coding, told(coding), folder, 1 if coding == OF_TRITS else width)
    if coding == OF_TRITS and encoded.part.size >= info.nbytes:
        encoded.file.close()
        return encode_part(name, NEW_BYTES, told(NEW_BYTES), folder, 1)
    return encoded


def _same(
    old: PackedCheckpoint, new: PackedCheckpoint, before: TensorInfo, info: TensorInfo
) -> bool:
    return all(
        np.array_equal(_read(old, before, at, size), _read(new, info, at, size))
        for at, size in blocks_of(info.nbytes, _PIECE)
    )


def _read(packed: PackedCheckpoint, info: TensorInfo | None, offset: int, size: int) -> Bytes:
    assert info is not None
    data: Bytes = read_bytes(packed.directory / info.file, info.start + offset, size).numpy()
    return data


# Applying one


def _write_small(patch: Patch, old: PackedCheckpoint, folder: Path) -> None:
    """Write the files of the result, but for their tensors: weight files get their heads and sizes.

    Raises CheckpointError where the base lacks one that it should have.
    """
    with open_part(patch.path, patch.small, "its small files") as take:
        for file in patch.files:
            target = folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.source == IN_BASE:
                _copy_from_base(patch, old, file, target)
            elif file.source == WHOLE:
                target.write_bytes(take(file.size))
            else:
                head = take(file.head)
                _check_size(patch.path, file, head)
                reserve(target, file.size)
                with target.open("r+b") as out:
                    out.write(head)


def _check_size(patch: Path, file: PatchedFile, head: bytes) -> None:
    """Raise FormatError where a weight file is not of the size that its head says."""
    try:
        table = json.loads(head[8:])
        ends = [each["data_offsets"][1] for name, each in table.items() if name != "__metadata__"]
        whole = len(head) + max(map(index, ends), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise damaged(patch.name, f"the head of {file.name} cannot be read") from None
    if whole != file.size:
        raise damaged(patch.name, f"{file.name} has {file.size} bytes", f"{whole}, by its head")


def _copy_from_base(patch: Patch, old: PackedCheckpoint, file: PatchedFile, target: Path) -> None:
    source = old.directory / file.name
    if not _is_file(source, file.size, file.sha256):
        found = "is another file" if source.is_file() else "is missing"
        raise CheckpointError(
            f"{old.directory}: {file.name}",
            found,
            f"that of the base of {patch.path.name}, SHA-256 {file.sha256[:12]}...",
            "Apply the patch to the checkpoint that it was made for",
        )
    with readable(source), source.open("rb") as data, target.open("wb") as out:
        while chunk := data.read(_PIECE):
            out.write(chunk)


def _check_base(patch: Patch, old: PackedCheckpoint, new: PackedCheckpoint) -> None:
    """Raise where the base is not the one that the patch was made for, or the parts do not fit."""
    where, tensors = patch.path.name, new.checkpoint.tensors
    said = {file.name for file in patch.files if file.source == BY_TENSOR}
    if said != set(new.checkpoint.files):
        raise damaged(where, "its weight files are not those of its model")
    for file in patch.files:
        starts = [info.start for info in tensors.values() if info.file == file.name]
        if file.source == BY_TENSOR and file.head != (first := min(starts, default=file.size)):
            raise damaged(where, f"the head of {file.name} has {file.head} bytes", f"{first}")
    for name in [*patch.base, *(_record_name(part, new.records) for part in patch.parts)]:
        if name not in new.records or name not in patch.base:
            raise damaged(where, f"{name} is in one of its tables alone")
    for name in patch.parts:
        if name not in tensors:
            raise damaged(where, f"{name} is no tensor of its model")
    for name, record in new.records.items():
        expected, found = patch.base.get(name, record.sha256), old.records.get(name)
        if found is None or found.sha256 != expected:
            digest = "is missing" if found is None else f"has SHA-256 {found.sha256[:12]}..."
            raise CheckpointError(
                f"{old.directory}: {name}",
                digest,
                f"{expected[:12]}..., that of the base of {where}",
                "Apply the patch to the checkpoint that it was made for",
            )
    for name, info in tensors.items():
        part, before = patch.parts.get(name), old.checkpoint.tensors.get(name)
        same = before and (before.dtype, before.shape) == (info.dtype, info.shape)
        if not same and (part is None or part.coding != NEW_BYTES):
            raise damaged(where, f"{name} is {info.dtype} {list(info.shape)}", "as in the base")
        if part is not None and part.coding not in (NEW_BYTES, _coding(name, new.records)):
            raise damaged(where, f"{name} is told in {part.coding}", _coding(name, new.records))
        if part is not None and part.coding != OF_TRITS and part.length != info.nbytes:
            raise damaged(where, f"{name} has {part.length} bytes", f"{info.nbytes}")


def _write_tensor(patch: Patch, old: PackedCheckpoint, new: PackedCheckpoint, name: str) -> None:
    """Write the data of a stored tensor: the base's, changed where the patch says so."""
    info, before = new.checkpoint.tensors[name], old.checkpoint.tensors.get(name)
    part, width = patch.parts.get(name), DTYPES[info.dtype].itemsize
    with (new.directory / info.file).open("r+b", buffering=0) as out:

        def write(make: Callable[[int, int], Bytes]) -> None:
            for offset, size in blocks_of(info.nbytes, _PIECE):
                write_at(out, info.start + offset, make(offset, size).data)

        if part is None:
            write(lambda offset, size: _read(old, before, offset, size))
            return
        coding = part.coding
        try:
            with open_part(patch.path, part, name) as take:
                if coding == NEW_BYTES:
                    write(lambda offset, size: np.frombuffer(take(size), np.uint8))
                else:
                    write(
                        lambda offset, size: apply_changes(
                            _read(old, before, offset, size), coding, width, take
                        )
                    )
        except FormatError as error:
            if error.where.startswith(patch.path.name):
                raise
            raise error.within(f"{patch.path.name}: {name}") from None


def _check_files(patch: Patch, old: PackedCheckpoint, folder: Path, threads: int) -> None:
    """Raise DigestError where a file is not what it was when the patch was made."""
    digests = in_threads(lambda file: sha256(folder / file.name), patch.files, threads)
    for file, digest in zip(patch.files, digests, strict=True):
        if digest != file.sha256:
            container.check_data(old.checkpoint, old.records, threads=threads)
            raise DigestError(
                f"{patch.path.name}: {file.name}",
                f"comes out with SHA-256 {digest[:12]}...",
                f"{file.sha256[:12]}...",
                "Fetch the patch again",
            )
