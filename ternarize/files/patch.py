"""The file of a patch: what differs between two packed checkpoints, part by part.

    magic | sizes and SHA-256 of the header | header: JSON | small files and heads | a part a tensor

The header names the files of the result, the tensors that differ, and the digests that these have
in the base. Each part is stored by LZMA2 where that is smaller, has a digest of its own, and can be
read without the others. Sizes are checked before memory is taken, and a part gives no more bytes
than the header says. formats/patch.md is the definition.
"""

import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from ternarize.errors import DigestError, FormatError, damaged
from ternarize.files.headers import MAX_HEADER
from ternarize.files.json_files import MAX_JSON, readable, strict_json
from ternarize.files.metadata import FORMAT_VERSION, check_version
from ternarize.files.sections import CODINGS

PATCH_MAGIC = b"\x89TRIT\r\n\x1a"
IN_BASE, WHOLE, BY_TENSOR = ("base", "patch", "tensors")  # where the bytes of a file come from
LARGEST_FILE = MAX_JSON  # bytes of a small file that travels
_HEAD = struct.Struct("<8sQQ32s")
_DICTIONARY = 1 << 22  # bytes: a reader needs no more
_TAKEN = 1 << 16  # bytes read at a time
_PLAIN_NAME = re.compile(r"[^/\\:\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class PatchPart:
    """Bytes of a patch: `size` of them as they are stored, from `start` of the file, give `length`.

    name    the tensor; "" of the small files and heads
    coding  of files/sections.py; "" of those
    """

    name: str
    coding: str
    length: int
    size: int
    sha256: str
    start: int = 0


@dataclass(frozen=True)
class PatchedFile:
    """A file of the result.

    source  IN_BASE: the base's file of this name; WHOLE: all of it is in the patch; BY_TENSOR: its
            head is, of `head` bytes, and behind it lie tensors
    """

    name: str
    size: int
    sha256: str
    source: str
    head: int = 0


@dataclass(frozen=True)
class Patch:
    """What the header of a patch says.

    base   name of each tensor that differs -> the digest of its record in the base
    files  in the order in which those that are here lie in `small`
    parts  name of each stored tensor (matrix, scales) that differs -> its changes
    """

    path: Path
    base: dict[str, str]
    files: list[PatchedFile]
    small: PatchPart
    parts: dict[str, PatchPart]


def is_portable(name: str) -> bool:
    """Whether a file of a patch may have this name: a path that stays in a folder, on any system.

    Names that begin with a dot are none of a checkpoint's.
    """
    steps = name.split("/")
    return all(_PLAIN_NAME.fullmatch(step) and not step.startswith(".") for step in steps)


# Writing


@dataclass(frozen=True)
class Encoded:
    """A part that has been packed, in a file without a name, from its beginning."""

    part: PatchPart
    file: IO[bytes]

    def move_to(self, out: IO[bytes]) -> None:
        """Append the packed bytes to another file, and close their own."""
        with self.file:
            shutil.copyfileobj(self.file, out, _TAKEN)


def encode_part(
    name: str, coding: str, pieces: Callable[[], Iterator[bytes]], folder: Path, width: int = 0
) -> Encoded:
    """Pack a part.

    pieces  its content from the beginning, each time that it is called
    folder  where there is room for it
    width   bytes of its numbers; 0: texts
    """
    for pack in (lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[_filter(width)]), None):
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller closes it
        length = 0
        for piece in pieces():
            length += len(piece)
            file.write(pack.compress(piece) if pack else piece)
        if pack:
            file.write(pack.flush())
        size = file.tell()
        if pack is None or size < length:
            break
        file.close()
    file.seek(0)
    sha = hashlib.sha256()
    while chunk := file.read(_TAKEN):
        sha.update(chunk)
    file.seek(0)
    return Encoded(PatchPart(name, coding, length, size, sha.hexdigest()), file)


def _filter(width: int) -> dict[str, Any]:
    """How to pack; a reader needs to know the size of the dictionary alone."""
    if width == 0:
        return {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": _DICTIONARY}
    bits = width.bit_length() - 1  # numbers hardly repeat: it is their bytes that are uneven
    return {
        "id": lzma.FILTER_LZMA2,
        "dict_size": 1 << 16,
        "lc": 0,
        "lp": bits,
        "pb": bits,
        "mf": lzma.MF_HC3,
        "mode": lzma.MODE_NORMAL,
        "nice_len": 16,
        "depth": 1,
    }


def write_patch(
    out: IO[bytes],
    base: Mapping[str, str],
    files: Sequence[PatchedFile],
    parts: Sequence[PatchPart],
    packed: IO[bytes],
) -> None:
    """Write a patch.

    parts   that of the small files first
    packed  their bytes, in this order
    """
    small, *others = parts
    header = {
        "format_version": FORMAT_VERSION,
        "features": [],
        "base": dict(base),
        "files": [
            {key: value for key, value in asdict(file).items() if key != "head" or value}
            for file in files
        ],
        "small": _members(small),
        "parts": [_members(part, "name", "coding") for part in others],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    stored = lzma.compress(text, lzma.FORMAT_RAW, filters=[_filter(0)])
    stored = stored if len(stored) < len(text) else text
    out.write(_HEAD.pack(PATCH_MAGIC, len(text), len(stored), hashlib.sha256(stored).digest()))
    out.write(stored)
    packed.seek(0)
    shutil.copyfileobj(packed, out, _TAKEN)


def _members(part: PatchPart, *more: str) -> dict[str, Any]:
    return {key: getattr(part, key) for key in (*more, "length", "size", "sha256")}


# Reading


def open_patch(path: Path) -> Patch:
    """Read and check the header of a patch.

    Raises CheckpointError where it cannot be read, FormatError where it breaks a rule.
    """
    with readable(path), path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD.size)
        if not head.startswith(PATCH_MAGIC) or len(head) < _HEAD.size:
            remedy = "Make one with `ternarize diff`, or fetch it again"
            raise FormatError(
                path.name, "is no patch", "the bytes that a patch begins with", remedy
            )
        _, length, size, sha256 = _HEAD.unpack(head)
        if not 2 <= length <= MAX_HEADER or not 0 < size <= min(length, total - _HEAD.size):
            found = f"a header of {length} bytes in {size}, in a file of {total}"
            raise damaged(path.name, found, f"at most {MAX_HEADER} that are there")
    header = PatchPart("", "", length, size, sha256.hex(), _HEAD.size)
    with open_part(path, header, "its header") as take:
        raw = take(length)
    try:
        table = strict_json(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path.name, f"its header is not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise damaged(path.name, "its header is not an object")
    check_version(path.name, table.get("format_version"), table.get("features"), frozenset())
    return _parse(path, table, _HEAD.size + size, total)


def _parse(path: Path, table: dict[str, Any], start: int, total: int) -> Patch:
    """The header, each of whose members is checked by itself and against the others."""
    base, files = table.get("base"), table.get("files")
    if not isinstance(base, dict) or not all(map(_is_digest, base.values())):
        raise damaged(path.name, "its table of the base is none", "names and digests")
    if not isinstance(files, list):
        raise damaged(path.name, "its files are no list")
    found = [_parse_file(path, each) for each in files]
    names = {file.name for file in found}
    folders = {
        "/".join(name.split("/")[:n]) for name in names for n in range(1, name.count("/") + 1)
    }
    if len(names) < len(found) or names & folders:
        raise damaged(path.name, "two of its files have one name")
    small = _parse_part(path, table.get("small"), start, named=False)
    here = sum(f.head if f.source == BY_TENSOR else f.size for f in found if f.source != IN_BASE)
    if small.length != here:
        raise damaged(path.name, f"small files of {small.length} bytes", f"{here}")
    parts: dict[str, PatchPart] = {}
    start += small.size
    for each in table["parts"] if isinstance(table.get("parts"), list) else [None]:
        part = _parse_part(path, each, start, named=True)
        if part.name in parts:
            raise damaged(path.name, f"two parts are of {part.name}")
        parts[part.name] = part
        start += part.size
    if start != total:
        raise damaged(path.name, f"{total} bytes", f"the {start} that its header promises")
    return Patch(path, base, found, small, parts)


def _parse_file(path: Path, value: Any) -> PatchedFile:
    value = value if isinstance(value, dict) else {}
    name, size, sha256, source, head = map(value.get, ("name", "size", "sha256", "source", "head"))
    good = isinstance(name, str) and _is_size(size) and _is_digest(sha256)
    if (
        not good
        or source not in (IN_BASE, WHOLE, BY_TENSOR)
        or (source == BY_TENSOR) != ("head" in value)
    ):
        raise damaged(
            path.name, f"one of its files is {value!r:.200}", "name, size, digest, source"
        )
    if not is_portable(name):
        remedy = "Do not trust this patch"
        raise FormatError(path.name, f"names the file {name!r:.80}", "one below a folder", remedy)
    if source == WHOLE and size > LARGEST_FILE:
        raise damaged(path.name, f"{name} has {size} bytes", f"at most {LARGEST_FILE}")
    if source == BY_TENSOR and not (_is_size(head) and 10 <= head <= min(size, MAX_HEADER + 8)):
        raise damaged(path.name, f"the head of {name} has {head!r:.80} bytes of {size}")
    return PatchedFile(name, size, sha256, source, head or 0)


def _parse_part(path: Path, value: Any, start: int, *, named: bool) -> PatchPart:
    value = value if isinstance(value, dict) else {}
    length, size, sha256 = map(value.get, ("length", "size", "sha256"))
    name, coding = (value.get("name"), value.get("coding")) if named else ("", "")
    good = _is_size(length) and _is_size(size) and length < 2**63 and size <= length
    good = good and (size > 0) == (length > 0) and _is_digest(sha256)
    if not good or not isinstance(name, str) or (named and coding not in CODINGS):
        raise damaged(path.name, f"one of its parts is {value!r:.200}", "sizes and a digest")
    return PatchPart(name, coding or "", length, size, sha256, start)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


@contextmanager
def open_part(path: Path, part: PatchPart, words: str) -> Iterator[Callable[[int], bytes]]:
    """The content of a part: a function that gives its next so many bytes.

    words  what it is, for messages

    All of it has to be taken. Raises DigestError where the stored bytes are not those that were
    written, before any is used; FormatError where they give more or fewer than the part says.
    """
    where = f"{path.name}: {words}"
    with readable(path), path.open("rb") as file:
        sha = hashlib.sha256()
        for chunk in _stored(file, part):
            sha.update(chunk)
        if sha.hexdigest() != part.sha256:
            raise DigestError(
                where,
                f"its bytes have changed, SHA-256 {sha.hexdigest()[:12]}...",
                f"{part.sha256[:12]}...",
                "Fetch the patch again",
            )
        content = _content(_stored(file, part), part, where)
        rest, taken = b"", 0

        def take(count: int) -> bytes:
            nonlocal rest, taken
            if count > part.length - taken:
                raise damaged(where, "its content ends early", f"{count} more bytes")
            found = [rest]
            have = len(rest)
            while have < count:
                piece = next(content, b"")
                if not piece:
                    raise damaged(where, "the file ends within it")
                found.append(piece)
                have += len(piece)
            joined = b"".join(found)
            taken += count
            rest = joined[count:]
            return joined[:count]

        yield take
        if taken < part.length:
            raise damaged(where, f"{part.length - taken} bytes of its content mean nothing")
        for _ in content:  # nothing, but it looks at the end
            pass


def _stored(file: BufferedReader, part: PatchPart) -> Iterator[bytes]:
    """The stored bytes of a part, piece by piece; fewer where the file ends."""
    file.seek(part.start)
    left = part.size
    while left and (chunk := file.read(min(left, _TAKEN))):
        left -= len(chunk)
        yield chunk


def _content(stored: Iterable[bytes], part: PatchPart, where: str) -> Iterator[bytes]:
    """The content, in pieces of at most _TAKEN; FormatError unless it is as long as it says."""
    if part.size == part.length:
        yield from stored
        return
    unpack = lzma.LZMADecompressor(
        lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": _DICTIONARY}]
    )
    given = 0
    try:
        for chunk in stored:
            data = chunk
            while not unpack.eof:
                piece = unpack.decompress(data, min(_TAKEN, part.length - given + 1))
                given += len(piece)
                if given > part.length:
                    raise damaged(where, f"gives more than the {part.length} bytes that it says")
                data = b""
                if piece:
                    yield piece
                elif not unpack.eof:
                    break
            else:
                if data or unpack.unused_data:
                    raise damaged(where, "goes on behind its end")
    except lzma.LZMAError as error:
        raise damaged(where, f"cannot be unpacked ({error})") from None
    if given < part.length or not unpack.eof:
        raise damaged(where, f"gives {given} bytes and no end", f"{part.length}")
