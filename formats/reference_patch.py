"""Independent reader of patches, written to be read beside patch.md.

    python formats/reference_patch.py BASE PATCH [OUTPUT]

applies a patch to the directory of a packed checkpoint, and prints a line for each file of the
result (name, size, SHA-256, `ok`); with OUTPUT it writes them there. It exits with 1 if the patch
or the base breaks a rule. Needs Python 3.10, numpy and reference.py beside it, nothing of the
package whose files it reads.

The file is laid out as the document is: packing, the header, the base, the codings, the result.
Each refusal starts with the name of the rule it enforces. Files of the result are held in memory:
this is for reading, and for checking other programs, not for models of many gigabytes.
"""

import hashlib
import io
import json
import lzma
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reference
from numpy.typing import NDArray
from reference import Entry, Invalid, is_size, parse_object, require

MAGIC = b"\x89TRIT\r\n\x1a"
MAX_HEADER = 100_000_000
MAX_FILE = 100_000_000  # of one that is in the patch
MAX_HEAD = MAX_HEADER + 8
DICTIONARY = 2**22
BLOCK = 2**18
FEATURES: set[str] = set()
CODINGS = {"trits", "halves", "words", "bytes"}


@dataclass(frozen=True)
class Part:
    """`stored` bytes that give `length`; what they are, for messages."""

    what: str
    coding: str
    length: int
    sha256: str
    stored: bytes


@dataclass(frozen=True)
class Patch:
    """base: digests of changed tensors; files as in the header; parts by tensor."""

    base: dict[str, str]
    files: list[dict[str, Any]]
    small: Part
    parts: dict[str, Part]


def is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Packing


def content(part: Part) -> bytes:
    """The content of a part: as it is stored, or of LZMA2; never longer than it says."""
    same = sha256(part.stored) == part.sha256
    require(same, "part-digest", f"{part.what}: SHA-256 is not {part.sha256}")
    if len(part.stored) == part.length:
        return part.stored
    unpack = lzma.LZMADecompressor(
        lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": DICTIONARY}]
    )
    try:
        found = unpack.decompress(part.stored, part.length)
        more = b"" if unpack.eof else unpack.decompress(b"", 1)
    except (lzma.LZMAError, EOFError) as error:
        raise Invalid(f"part-stream {part.what}: {error}") from None
    right = len(found) == part.length and not more
    require(right, "part-length", f"{part.what}: not the {part.length} bytes that it says")
    whole = unpack.eof and not unpack.unused_data
    require(whole, "part-stream", f"{part.what}: does not end where its bytes do")
    return found


# The header


def read_patch(data: bytes) -> Patch:
    """Read and check all that the header says, against the size of the file too."""
    require(data.startswith(MAGIC), "patch-magic", "other first bytes")
    require(len(data) >= 56, "patch-too-short", f"{len(data)} bytes; a patch has more than 56")
    length, size = (int.from_bytes(data[at : at + 8], "little") for at in (8, 16))
    good = 2 <= length <= MAX_HEADER and 0 < size <= min(length, len(data) - 56)
    require(good, "patch-header-length", f"{length} bytes in {size}, of a file of {len(data)}")
    head = Part("the header", "", length, data[24:56].hex(), data[56 : 56 + size])
    raw = content(head)
    table = parse_object(raw, "patch-header-not-json", "header")
    version = table.get("format_version")
    known = type(version) is int and version == 1
    require(known, "patch-version", f"format_version is {version!r}; this reader knows 1")
    features = table.get("features")
    listed = isinstance(features, list) and all(isinstance(name, str) for name in features)
    require(listed, "patch-header-bad", "`features` is not a list of strings")
    unknown = sorted(set(features or []) - FEATURES)
    require(not unknown, "patch-feature", f"needs {unknown}")

    base, files, parts = (table.get(key) for key in ("base", "files", "parts"))
    good = isinstance(base, dict) and all(map(is_digest, base.values()))
    require(good, "patch-header-bad", "`base` is not an object of digests")
    good = isinstance(files, list) and isinstance(parts, list)
    require(good, "patch-header-bad", "`files` or `parts` is not a list")
    assert isinstance(base, dict) and isinstance(files, list) and isinstance(parts, list)
    for file in files:
        check_file(file)
    names = [file["name"] for file in files]
    folders = {
        "/".join(name.split("/")[:n]) for name in names for n in range(1, name.count("/") + 1)
    }
    alone = len(set(names)) == len(names) and folders.isdisjoint(names)
    require(alone, "file-name-twice", "two files have one name")

    position = 56 + size
    small, position = read_part(data, position, table.get("small"), "small files")
    here = sum(
        file["head"] if file["source"] == "tensors" else file["size"]
        for file in files
        if file["source"] != "base"
    )
    require(small.length == here, "part-size", f"small files: {small.length} bytes, not {here}")
    found: dict[str, Part] = {}
    for value in parts:
        name = value.get("name") if isinstance(value, dict) else None
        require(isinstance(name, str), "patch-header-bad", "a part has no name")
        require(
            value.get("coding") in CODINGS, "coding-unknown", f"{name}: {value.get('coding')!r}"
        )
        require(name not in found, "part-twice", f"{name}: two parts")
        found[str(name)], position = read_part(data, position, value, str(name))
    require(position >= len(data), "patch-trailing", f"{len(data) - position} bytes too many")
    return Patch(base, files, small, found)


def check_file(file: Any) -> None:
    """Check one element of `files`."""
    require(isinstance(file, dict), "patch-header-bad", "a file is not an object")
    name, size, source, head = (file.get(key) for key in ("name", "size", "source", "head"))
    good = isinstance(name, str) and is_size(size) and is_digest(file.get("sha256"))
    good = good and source in ("base", "patch", "tensors")
    require(good, "patch-header-bad", f"a file is {file!r:.100}")
    steps = name.split("/")
    good = all(re.fullmatch(r"[^/\\:\x00-\x1f\x7f]+", step) and step[0] != "." for step in steps)
    require(good, "file-name-bad", f"{name!r}")
    require(source != "patch" or size <= MAX_FILE, "file-size", f"{name}: {size} bytes")
    if source == "tensors":
        good = is_size(head) and 10 <= head <= min(size, MAX_HEAD)
        require(good, "file-size", f"{name}: a head of {head!r} bytes of {size}")
    else:
        require("head" not in file, "patch-header-bad", f"{name}: has a head")


def read_part(data: bytes, position: int, value: Any, what: str) -> tuple[Part, int]:
    """A part whose bytes begin at `position`, and where they end."""
    require(isinstance(value, dict), "patch-header-bad", f"{what}: not an object")
    length, size, digest = (value.get(key) for key in ("length", "size", "sha256"))
    good = is_size(length) and is_size(size) and is_digest(digest)
    require(good, "patch-header-bad", f"{what}: {value!r:.100}")
    good = size <= length < 2**63 and (size > 0) == (length > 0)
    require(good, "part-size", f"{what}: {length} bytes in {size}")
    end = position + size
    require(end <= len(data), "patch-truncated", f"{what}: ends at {end} of {len(data)}")
    return Part(what, value.get("coding", ""), length, digest, data[position:end]), end


# The checkpoints


@dataclass(frozen=True)
class Model:
    """Stored tensors with the file and place of each, and the checked records."""

    places: dict[str, tuple[str, Entry]]
    records: dict[str, Any]

    def record_of(self, name: str) -> str:
        """The tensor whose record speaks of a stored one."""
        return name if name in self.records else name.removesuffix("_scale")


def read_model(heads: dict[str, tuple[bytes, int]]) -> Model:
    """The tensors of the heads of weight files, {name: (head, size of the file)}."""
    places: dict[str, tuple[str, Entry]] = {}
    records: dict[str, Any] = {}
    for file, (head, size) in heads.items():
        entries, metadata = reference.read_header(io.BytesIO(head), size)
        described, features = reference.read_records(metadata)
        for name, entry in entries.items():
            require(name not in places, "tensor-twice", f"{name}: in two files")
            places[name] = file, entry
            if name in described:
                reference.check_record(name, described[name], features)
                records[name] = described[name]
    for name in places:
        packed = records.get(name.removesuffix("_scale"))
        known = name in records or reference.is_packed(packed)
        require(known, "tensor-without-record", f"{name}: no record")
    return Model(places, records)


def read_base(folder: Path) -> Model:
    """The model of a directory, by the heads of its files."""
    heads = {}
    for path in reference.files_of(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            heads[path.name] = file.read(8 + min(length, MAX_HEADER)), path.stat().st_size
    return read_model(heads)


# The codings


class Bits:
    """Bytes of a part that are taken from its beginning."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.at, self.what = data, 0, what

    def refuse(self, why: str) -> Invalid:
        return Invalid(f"changes-bad {self.what}: {why}")

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def bytes(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        if len(found) < size:
            raise self.refuse("ends early")
        self.at += size
        return found

    def bits(self, count: int) -> list[int]:
        """Bits, the least significant of a byte first; those that fill the last byte are 0."""
        data = self.bytes(-(-count // 8))
        found = [byte >> i & 1 for byte in data for i in range(8)]
        if any(found[count:]):
            raise self.refuse("a bit that belongs to nothing is set")
        return found[:count]

    def set(self, count: int) -> list[int]:
        """Ascending numbers below `count`, from the gaps between them."""
        members, k, length = self.number(4), self.number(1), self.number(4)
        fits = members <= count and (k == 0 or (k < 32 and members * 2**k <= 2 * count))
        fits = fits and (length > 0) == (members > 0) and length <= members + count // 2**k
        if not fits:
            raise self.refuse(f"a set of {members} of {count}, k {k}, {length} bits")
        quotients: list[int] = []
        zeros = 0
        for bit in self.bits(length):
            if bit:
                quotients.append(zeros)
            zeros = 0 if bit else zeros + 1
        if zeros or len(quotients) != members:
            raise self.refuse(f"{len(quotients)} quotients for {members} numbers")
        remainders = self.bits(members * k)
        found, last = [], -1
        for j, quotient in enumerate(quotients):
            rest = sum(bit << i for i, bit in enumerate(remainders[j * k : (j + 1) * k]))
            last += quotient * 2**k + rest + 1
            found.append(last)
        if last >= count:
            raise self.refuse(f"number {last} of {count}")
        return found


def change_trits(old: bytes, data: bytes, what: str) -> bytes:
    """New bytes of base3, a block at a time."""
    require(max(old, default=0) <= 242, "code-invalid", f"{what}: a byte of the base is above 242")
    source, new = Bits(data, what), bytearray(old)
    for begin in range(0, len(old), BLOCK):
        size = min(BLOCK, len(old) - begin)
        moved = source.set(5 * size)
        digits = [old[begin + n // 5] // 3 ** (n % 5) % 3 for n in moved]
        up = source.bits(digits.count(1))
        crossing = set(source.set(len(moved) - len(up)))
        zeros = others = 0
        for n, digit in zip(moved, digits, strict=True):
            if digit == 1:
                target, zeros = 2 * up[zeros], zeros + 1
            else:
                target, others = (2 - digit if others in crossing else 1), others + 1
            new[begin + n // 5] += (target - digit) * 3 ** (n % 5)
    if source.at < len(data):
        raise source.refuse(f"{len(data) - source.at} bytes too many")
    return bytes(new)


def change_halves(old: bytes, data: bytes) -> bytes:
    """New bytes of int4: (old + d) mod 16 of every half, d = 0, -1, 1, -2, ... for 0, 1, 2, 3."""
    a, z = (np.frombuffer(each, np.uint8).astype(np.int64) for each in (old, data))
    halves = []
    for shift in (0, 4):
        code = z >> shift & 15
        step = np.where(code % 2 == 1, -(code + 1) // 2, code // 2)
        halves.append(((a >> shift) + step) % 16)
    return (halves[0] + 16 * halves[1]).astype(np.uint8).tobytes()


def change_words(old: bytes, data: bytes, width: int) -> bytes:
    """New numbers of `width` bytes: (old + d) mod 2^(8 width), d as in `change_halves`."""
    a, z = (np.frombuffer(each, f"<u{width}") for each in (old, data))
    half = z >> 1  # of odd codes d = -1 - half, which is all bits turned
    step: NDArray[Any] = np.where(z & 1 == 1, ~half, half)
    return bytes((a + step).astype(f"<u{width}").tobytes())


# The result


def apply(folder: Path, data: bytes) -> dict[str, bytes]:
    """The files of the result.  Raises Invalid, OSError."""
    patch = read_patch(data)
    files: dict[str, bytes] = {}
    heads: dict[str, tuple[bytes, int]] = {}
    here, position = content(patch.small), 0
    for file in patch.files:
        name, size = file["name"], file["size"]
        if file["source"] == "base":
            path = folder / name
            same = path.is_file() and path.stat().st_size == size
            same = same and sha256(path.read_bytes()) == file["sha256"]
            require(same, "base-file", f"{name}: missing or another in the base")
            files[name] = path.read_bytes()
            continue
        end = position + (file["head"] if file["source"] == "tensors" else size)
        if file["source"] == "tensors":
            heads[name] = here[position:end], size
        else:
            files[name] = here[position:end]
        position = end
    old, new = read_base(folder), read_model(heads)
    check_base(patch, old, new)
    for name, (head, size) in heads.items():
        inside = [n for n, (file, _) in new.places.items() if file == name]
        first = new.places[inside[0]][1].start if inside else size
        require(
            first == len(head), "file-size", f"{name}: a head of {len(head)} bytes, not {first}"
        )
        files[name] = head + b"".join(change(folder, patch, old, new, n) for n in inside)
    for file in patch.files:
        same = sha256(files[file["name"]]) == file["sha256"]
        require(same, "result-digest", f"{file['name']}: comes out otherwise")
    return {file["name"]: files[file["name"]] for file in patch.files}


def check_base(patch: Patch, old: Model, new: Model) -> None:
    """The base is the one that the patch was made for, and the parts fit both."""
    for name in (*patch.base, *map(new.record_of, patch.parts)):
        known = name in new.records and name in patch.base
        require(known, "base-table", f"{name}: not in the result, or not in `base`")
    for name in patch.parts:
        require(name in new.places, "base-table", f"{name}: not in the result")
    for name, record in new.records.items():
        expected = patch.base.get(name, record["sha256"])
        found = old.records.get(name, {}).get("sha256")
        require(found == expected, "base-tensor", f"{name}: {found} in the base, not {expected}")
    for name, (_, entry) in new.places.items():
        part = patch.parts.get(name)
        if part is None or part.coding != "bytes":
            _, before = old.places.get(name, ("", None))
            same = before is not None and (before.dtype, before.shape) == (entry.dtype, entry.shape)
            require(same, "layout-differs", f"{name}: of another type or shape in the base")
        if part is not None:
            codec = new.records.get(name, {}).get("codec")
            own = {"base3": "trits", "int4": "halves"}.get(codec, "words")
            good = part.coding in ("bytes", own)
            require(good, "coding-wrong", f"{name}: {part.coding}, not {own}")
            good = part.coding == "trits" or part.length == entry.end - entry.start
            require(good, "part-size", f"{name}: {part.length} bytes")


def change(folder: Path, patch: Patch, old: Model, new: Model, name: str) -> bytes:
    """The data of a stored tensor of the result."""
    part, (_, entry) = patch.parts.get(name), new.places[name]
    if part is not None and part.coding == "bytes":
        return content(part)
    file, before = old.places[name]
    with (folder / file).open("rb") as stream:
        stream.seek(before.start)
        data = stream.read(before.end - before.start)
    if part is None:
        return data
    if part.coding == "trits":
        return change_trits(data, content(part), name)
    if part.coding == "halves":
        return change_halves(data, content(part))
    return change_words(data, content(part), reference.DTYPE_SIZES[entry.dtype])


def main(arguments: list[str]) -> int:
    """Apply a patch; 0 if all is well, 1 if not, 2 for other arguments."""
    if len(arguments) not in (2, 3):
        print("usage: python formats/reference_patch.py BASE PATCH [OUTPUT]", file=sys.stderr)
        return 2
    folder, path = Path(arguments[0]), Path(arguments[1])
    try:
        files = apply(folder, path.read_bytes())
        for name, data in files.items():
            if len(arguments) == 3:
                target = Path(arguments[2]) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            print(f"{json.dumps(name)[1:-1]} {len(data)} {sha256(data)} ok")
    except (Invalid, OSError) as error:
        print(json.dumps(f"{path}: {error}")[1:-1], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
