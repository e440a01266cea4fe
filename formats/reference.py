"""Independent decoder of packed ternary checkpoints, written to be read beside the specifications.

    python formats/reference.py FILE_OR_DIRECTORY...

prints one line per tensor (name, kind, logical shape, group size, sparsity, SHA-256 of the decoded
trits or integers as int8 in row-major order, or of the bytes of a kept tensor, and `ok`), and exits
with 1 if a file breaks a rule. Needs Python 3.10 and numpy, nothing of the package whose files it
checks.

The file is laid out as the documents are: the rotation, JSON, the safetensors header, the records,
the trits, the integers of int4, the scales, the directory. Each refusal starts with the name of the
rule it enforces; the same name is in the specification and on a file in vectors/invalid. Every
length that a file claims is compared with the bytes that are there before memory is taken for it.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 100_000_000
MAX_BYTES = 2**63 - 1  # a tensor's size fits a signed 64-bit integer
MAX_WEIGHTS = 2**60  # so does its size in float64
DTYPE_SIZES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 8),
}
PACKED_MEMBERS = {"shape", "group_size", "codec", "transposed", "planes", "rotation", "coding"}
PACKED_MEMBERS |= {"kernel"}
FEATURES = {"scale8", "planes", "int8", "int4", "rotation", "rans", "kernel"}
MAX_ROW = 2**16  # bytes of a row, or of the rows of a chunk, that is coded
BLOCKS = {4, 16, 64, 256, 1024}
TRITS_OF_BYTE = np.array(
    [[code // 3**i % 3 - 1 for i in range(5)] for code in range(243)], dtype=np.int8
)


class Invalid(Exception):
    """A file breaks a rule of the format; the first word is the rule's name."""


def require(holds: bool, rule: str, detail: str) -> None:
    """Raise Invalid(`rule detail`) unless the rule holds."""
    if not holds:
        raise Invalid(f"{rule} {detail}")


def refuse_any(broken: NDArray[np.bool_], rule: str, detail: str) -> None:
    """Raise Invalid with the place of the first true element."""
    if broken.any():
        raise Invalid(f"{rule} {detail}, first at {np.argwhere(broken)[0].tolist()}")


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors header; start and end count from the first byte of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Kept:
    """A tensor stored as it was: raw little-endian bytes, row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Ternary:
    """trits (..., rows, planes x cols) int8; scales (..., rows or 1, planes x groups), widened
    without rounding. Of two planes, a row of the second is behind that of the first.

    rotation is None, or block and seed. kernel is that of a convolution's weights, or ()."""

    trits: NDArray[np.int8]
    scales: NDArray[np.float32]
    scale_dtype: str
    group_size: int
    transposed: bool
    planes: int
    rotation: tuple[int, int] | None = None
    kernel: tuple[int, ...] = ()

    def dequantize(self) -> NDArray[np.float32]:
        """The weights (..., rows, cols) float32: those stored, of a rotated tensor turned back.

        The rotation is undone in float64 and the result rounded to float32. Of a convolution they
        are (rows, *kernel).
        """
        weights = self.stored()
        if self.rotation is not None:
            weights = unrotate(weights.astype(np.float64), *self.rotation).astype(np.float32)
        return weights.reshape(len(weights), *self.kernel) if self.kernel else weights

    def stored(self) -> NDArray[np.float32]:
        """scale * trit, (..., rows, cols) float32: exact, for a trit is -1, 0 or +1.

        Of two planes: the sum of both, rounded to the nearest float32, at the middle to even.
        """
        parts = [
            scaled(trits, scales, self.group_size)
            for trits, scales in zip(
                np.split(self.trits, self.planes, axis=-1),
                np.split(self.scales, self.planes, axis=-1),
                strict=True,
            )
        ]
        return parts[0] if self.planes == 1 else parts[0] + parts[1]


@dataclass(frozen=True)
class Integers:
    """weights (..., rows, cols) int8, of codec int8 or int4; scales (..., rows or 1, groups),
    widened."""

    codec: str
    weights: NDArray[np.int8]
    scales: NDArray[np.float32]
    scale_dtype: str
    group_size: int
    transposed: bool

    def dequantize(self) -> NDArray[np.float32]:
        """scale * weight, (..., rows, cols), rounded to float32 (exact where the scale is F16)."""
        return scaled(self.weights, self.scales, self.group_size)


def scaled(
    numbers: NDArray[np.int8], scales: NDArray[np.float32], group_size: int
) -> NDArray[np.float32]:
    """Multiply each number by the scale of its group, in float32; 0 is +0."""
    cols = numbers.shape[-1]
    if numbers.size == 0:
        return np.zeros(numbers.shape, np.float32)
    scale_of_col = np.repeat(scales, group_length(cols, group_size), axis=-1)
    return (scale_of_col[..., :cols] * numbers + 0).astype(np.float32)


# Rotation


def signs_of(cols: int, seed: int) -> NDArray[np.float64]:
    """sign(0) to sign(cols - 1): the uppermost bit of SplitMix64, in Python's integers."""
    signs = np.ones(cols)
    for col in range(cols):
        z = (seed + (col + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        if z >= 2**63:
            signs[col] = -1
    return signs


def unrotate(stored: NDArray[np.float64], block: int, seed: int) -> NDArray[np.float64]:
    """W = V R^T of (..., cols): the fast transform of each block, then the signs.

    In each round, two elements whose places differ in one bit become their sum and difference.
    """
    *lead, cols = stored.shape
    values, step = stored, 1
    while step < block:
        pairs = values.reshape(*lead, cols // (2 * step), 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values = np.stack([first + second, first - second], axis=-2).reshape(stored.shape)
        step *= 2
    return values / math.sqrt(block) * signs_of(cols, seed)


# JSON


def parse_object(data: bytes, rule: str, where: str) -> dict[str, Any]:
    """Read one JSON object in UTF-8, with no key twice, no NaN or Infinity, also by size, no half
    surrogate."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        require(len(found) == len(pairs), "duplicate-key", f"{where}: a key occurs twice")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def finite(number: str) -> float:
        require(math.isfinite(float(number)), rule, f"{where}: {number:.40} is no double")
        return float(number)

    try:
        text = data.decode("utf-8")
        hooks: Any = {"parse_constant": constant, "parse_float": finite}
        value = json.loads(text, object_pairs_hook=unique, **hooks)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on a half surrogate
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{rule} {where}: {error}") from None
    require(isinstance(value, dict), rule, f"{where}: not a JSON object")
    return dict(value)


def is_size(value: object) -> bool:
    """True for an integer >= 0; JSON's true and 1.0 are not integers."""
    return type(value) is int and value >= 0


# The safetensors header


def read_header(file: BinaryIO, file_size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors in the order of their data, and the `__metadata__` strings."""
    require(file_size >= 8, "header-too-short", f"{file_size} bytes; a file has at least 8")
    length = int.from_bytes(file.read(8), "little")
    limit = min(MAX_HEADER, file_size - 8)
    require(length <= limit, "header-length", f"{length} bytes; at most {limit} can be here")
    raw = file.read(length)
    framed = raw.startswith(b"{") and raw.rstrip(b" ").endswith(b"}")
    require(framed, "header-not-json", "header is not `{`, members, `}` and then spaces only")
    header = parse_object(raw, "header-not-json", "header")

    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    require(texts, "metadata-not-strings", "`__metadata__` is not an object of strings")

    first = 8 + length
    entries = {name: read_entry(name, fields, first) for name, fields in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    position = first
    for name, entry in ordered:
        at = f"{name}: data start at {entry.start - first}, expected {position - first}"
        require(entry.start >= position, "offsets-overlap", at)
        require(entry.start <= position, "offsets-hole", at)
        position = entry.end
    end = f"the data end at {position - first}, the file at {file_size - first}"
    require(position <= file_size, "data-truncated", end)
    require(position >= file_size, "trailing-bytes", end)
    return dict(ordered), metadata


def read_entry(name: str, fields: Any, first: int) -> Entry:
    """Check one member of the header; `first` is where the data section starts."""
    require(isinstance(fields, dict), "entry-bad", f"{name}: not an object")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        good = isinstance(value, list) and all(is_size(number) for number in value)
        require(good, "entry-bad", f"{name}: {key} is not a list of integers >= 0")
    require(len(offsets) == 2, "entry-bad", f"{name}: data_offsets has {len(offsets)} numbers")
    require(isinstance(dtype, str), "entry-bad", f"{name}: dtype is not a string")
    require(dtype in DTYPE_SIZES, "dtype-unknown", f"{name}: dtype {dtype}")
    size = DTYPE_SIZES[dtype]
    total = size
    for number in shape:  # one by one: the product of a million large numbers would take hours
        total *= max(number, 1)
        require(total <= MAX_BYTES, "product-wrap", f"{name}: its shape does not fit 63 bits")
    begin, end = offsets
    require(begin <= end, "offsets-reversed", f"{name}: from {begin} to {end}")
    expected = math.prod(shape) * size
    same = end - begin == expected
    require(same, "size-mismatch", f"{name}: {end - begin} bytes; {dtype} {shape} has {expected}")
    return Entry(dtype, tuple(shape), first + begin, first + end)


# The records


def read_records(metadata: dict[str, str]) -> tuple[dict[str, Any], set[str]]:
    """Return the records by tensor name, unchecked, and the features, after the version."""
    require("ternarize" in metadata, "metadata-missing", "no `ternarize` in `__metadata__`")
    text = metadata["ternarize"].encode("utf-8")
    document = parse_object(text, "metadata-not-json", "metadata")
    version = document.get("format_version")
    known = type(version) is int and version == 1
    require(known, "version-unknown", f"format_version is {version!r}; this reader knows 1")
    features = document.get("features")
    listed = isinstance(features, list) and all(isinstance(name, str) for name in features)
    require(listed, "metadata-incomplete", "`features` is not a list of strings")
    unknown = sorted(set(features or []) - FEATURES)
    require(not unknown, "feature-unknown", f"needs {unknown}; known are {sorted(FEATURES)}")
    if "sealed" in document or "sha256" in document:
        digest = document.get("sha256")
        body = metadata["ternarize"].removesuffix(f',"sha256":"{digest}"}}')
        same = hashlib.sha256(body.encode("utf-8")).hexdigest() == digest
        require(same, "metadata-digest-wrong", "metadata is not what its SHA-256 says")
    records = document.get("tensors")
    require(isinstance(records, dict), "metadata-incomplete", "`tensors` is not an object")
    return dict(document["tensors"]), set(features or [])


def is_packed(record: Any) -> bool:
    """True for the record of a packed tensor, good or not; any other is that of a kept one."""
    return isinstance(record, dict) and not PACKED_MEMBERS.isdisjoint(record)


def check_record(name: str, record: Any, features: set[str]) -> bool:
    """Check the record of a tensor that is there, with the features of its file; True if packed."""
    require(isinstance(record, dict), "record-bad", f"{name}: the record is not an object")
    digest = record.get("sha256")
    good = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
    require(good, "record-sha256-bad", f"{name}: sha256 is {digest!r}; 64 digits 0-9a-f expected")
    if not is_packed(record):
        return False
    codec = record.get("codec")
    known = codec == "base3" or (codec in ("int8", "int4") and codec in features)
    require(known, "record-unknown-codec", f"{name}: codec is {codec!r}, features {features}")
    shape = record.get("shape")
    good = isinstance(shape, list) and len(shape) in (2, 3) and all(is_size(n) for n in shape)
    good = good and shape[-1] >= 1 and math.prod(max(n, 1) for n in shape) <= MAX_WEIGHTS
    require(good, "record-shape-bad", f"{name}: shape is {shape!r}")
    group_size = record.get("group_size")
    good = type(group_size) is int and group_size >= -1
    require(good, "record-group-size-bad", f"{name}: group_size is {group_size!r}")
    transposed = record.get("transposed", True)  # written only when true
    require(transposed is True, "record-transposed-bad", f"{name}: transposed is {transposed!r}")
    if "planes" in record:
        planes = record["planes"]
        good = type(planes) is int and planes == 2 and "planes" in features and codec == "base3"
        require(good, "record-planes-bad", f"{name}: planes is {planes!r}, features {features}")
    if "rotation" in record:
        good = is_rotation(record["rotation"], shape[-1])
        good = good and "rotation" in features and codec == "base3"
        told = f"{record['rotation']!r}, codec {codec}, features {features}"
        require(good, "record-rotation-bad", f"{name}: rotation is {told}")
    if "kernel" in record:
        good = is_kernel(record["kernel"], shape) and "transposed" not in record
        good = good and "kernel" in features and codec == "base3"
        told = f"{record['kernel']!r}, shape {shape}, codec {codec}, features {features}"
        require(good, "record-kernel-bad", f"{name}: kernel is {told}")
    if "coding" in record:
        types = {"F16", "BF16", "F32"} | ({"U8"} if "scale8" in features else set())
        cols, planes = shape[-1], record.get("planes", 1)
        good = record["coding"] == "rans" and "rans" in features and codec == "base3"
        good = good and record.get("scale_dtype", "F16") in list(types)
        numbers = planes * -(-cols // group_length(cols, group_size))
        good = good and max(planes * packed_width(cols, group_size), 4 * numbers) <= MAX_ROW
        told = f"{record['coding']!r}, scales {record.get('scale_dtype')!r}, features {features}"
        require(good, "record-coding-bad", f"{name}: coding is {told}, or its rows are too long")
    return True


def is_kernel(value: object, shape: list[int]) -> bool:
    """True for two or three integers >= 1 whose product is the columns of a matrix."""
    if not isinstance(value, list) or len(value) not in (2, 3) or len(shape) != 2:
        return False
    return all(is_size(n) and n >= 1 for n in value) and math.prod(value) == shape[-1]


def is_rotation(value: object, cols: int) -> bool:
    """True for {"block": b, "seed": s} with a known block that divides cols and 32 bits of seed."""
    if not isinstance(value, dict):
        return False
    block, seed = value.get("block"), value.get("seed")
    if type(block) is not int or block not in BLOCKS or cols % block != 0:
        return False
    return type(seed) is int and 0 <= seed < 2**32


# Trits and scales


def group_length(cols: int, group_size: int) -> int:
    """Weights along cols that share a scale: all of them for group_size -1 and 0."""
    return cols if group_size <= 0 else min(group_size, cols)


def packed_width(cols: int, group_size: int) -> int:
    """Bytes of a row: each group takes ceil(its length / 5)."""
    length = group_length(cols, group_size)
    return cols // length * -(-length // 5) + -(-(cols % length) // 5)


def unpack(packed: NDArray[np.uint8], cols: int, group_size: int, name: str) -> NDArray[np.int8]:
    """(..., width) bytes -> (..., cols) trits."""
    refuse_any(packed > 242, "code-invalid", f"{name}: a byte is above 242")
    length = group_length(cols, group_size)
    groups = cols // length
    split = groups * -(-length // 5)
    rows = packed.shape[:-1]
    parts = []
    # all whole groups at once, then the shorter last one
    for codes, count, part in (
        (packed[..., :split], groups, length),
        (packed[..., split:], 1, cols % length),
    ):
        if part:
            digits = TRITS_OF_BYTE[codes].reshape(*rows, count, -1)
            padding = digits[..., part:] != 0
            refuse_any(padding, "padding-nonzero", f"{name}: padding is not zero trits")
            parts.append(digits[..., :part].reshape(*rows, count * part))
    return np.concatenate(parts, axis=-1)


def packed_width_int4(cols: int, group_size: int) -> int:
    """Bytes of a row: each group takes ceil(its length / 2)."""
    length = group_length(cols, group_size)
    return cols // length * -(-length // 2) + -(-(cols % length) // 2)


def unpack_int4(
    packed: NDArray[np.uint8], cols: int, group_size: int, name: str
) -> NDArray[np.int8]:
    """(..., width) bytes -> (..., cols) integers, group by group."""
    length = group_length(cols, group_size)
    parts, at = [], 0
    for start in range(0, cols, length):
        count = min(length, cols - start)
        bytes_ = packed[..., at : at + -(-count // 2)]
        at += bytes_.shape[-1]
        halves = np.stack([bytes_ % 16, bytes_ // 16], axis=-1).astype(np.int8) - 8
        integers = halves.reshape(*packed.shape[:-1], 2 * bytes_.shape[-1])
        filling = integers[..., count:] != 0
        refuse_any(filling, "filling-nonzero", f"{name}: the last byte of a group holds 8")
        parts.append(integers[..., :count])
    return np.concatenate(parts, axis=-1)


# Streams


def classes_of_trits(cols: int, group_size: int, planes: int) -> list[int]:
    """The class of each byte of a stored row: by how many trits it holds, the most first."""
    length = group_length(cols, group_size)
    held = []
    for start in range(0, cols, length):
        trits = min(length, cols - start)
        held += [min(5, trits - at) for at in range(0, trits, 5)]
    held *= planes
    order = sorted(set(held), reverse=True)
    return [order.index(count) for count in held]


def read_stream(data: bytes, rows: int, classes: list[int], name: str) -> bytes:
    """The bytes of a matrix with so many rows, whose columns are of these classes."""
    if not rows:
        require(not data, "stream-short", f"{name}: {len(data)} bytes of no rows")
        return b""
    width = len(classes)
    require(len(data) >= 4, "stream-short", f"{name}: {len(data)} bytes")
    height = int.from_bytes(data[:4], "little")
    told = f"{name}: chunks of {height} rows of {width} bytes"
    usual = MAX_ROW // width
    good = 1 <= height <= usual and (height < rows or height == usual)
    require(good, "stream-chunk-bad", told)
    at, tables = 4, []
    for _ in range(max(classes) + 1):
        mask = int.from_bytes(data[at : at + 32], "little")
        found = [byte for byte in range(256) if mask >> byte & 1]
        end = at + 32 + 2 * len(found)
        require(end <= len(data), "stream-short", f"{name}: it ends within its tables")
        often = np.frombuffer(data[at + 32 : end], "<u2").astype(np.int64)
        good = bool((often > 0).all()) and int(often.sum()) == 4096
        require(good, "stream-frequency-bad", f"{name}: frequencies add up to {int(often.sum())}")
        places = np.arange(4096) - np.repeat(np.cumsum(often) - often, often)
        held, widths = np.repeat(found, often), np.repeat(often, often)
        tables.append([*zip(held.tolist(), widths.tolist(), places.tolist(), strict=True)])
        at = end
    count = -(-rows // height)
    require(at + 4 * count <= len(data), "stream-short", f"{name}: no room for {count} sizes")
    sizes = np.frombuffer(data[at : at + 4 * count], "<u4").tolist()
    at += 4 * count
    told = f"{name}: chunks of {sum(sizes)} bytes, {len(data) - at} are left"
    require(sum(sizes) == len(data) - at, "stream-sizes-bad", told)
    decoded = bytearray()
    for index, size in enumerate(sizes):
        part = min(height, rows - index * height)
        decoded += read_chunk(data[at : at + size], part, classes, tables, f"{name}, chunk {index}")
        at += size
    return bytes(decoded)


def read_chunk(
    data: bytes, rows: int, classes: list[int], tables: list[list[tuple[int, int, int]]], name: str
) -> bytes:
    """The bytes of one chunk."""
    whole = len(data) >= 32 and len(data) % 2 == 0
    require(whole, "stream-damaged", f"{name}: {len(data)} bytes")
    states = np.frombuffer(data[:32], "<u4").tolist()
    words = iter(np.frombuffer(data[32:], "<u2").tolist())
    require(min(states) >= 2**16, "stream-damaged", f"{name}: a state is below 2^16")
    decoded, symbol = bytearray(rows * len(classes)), 0
    for which, table in enumerate(tables):
        columns = [col for col, of in enumerate(classes) if of == which]
        for row in range(rows):
            for col in columns:
                lane = symbol % 8
                byte, often, place = table[states[lane] % 4096]
                decoded[row * len(classes) + col] = byte
                states[lane] = often * (states[lane] // 4096) + place
                if states[lane] < 2**16:
                    word = next(words, None)
                    require(word is not None, "stream-damaged", f"{name}: a word is missing")
                    states[lane] = states[lane] * 2**16 + (word or 0)
                symbol += 1
    ended = next(words, None) is None and set(states) == {2**16}
    require(ended, "stream-damaged", f"{name}: it does not end where it begins")
    return bytes(decoded)


def uncoded(
    name: str, record: dict[str, Any], entry: Entry, data: bytes, scale: Entry, scales: bytes
) -> tuple[Entry, bytes, Entry, bytes]:
    """A packed tensor and its scales as they would be stored without a coding."""
    *lead, cols = record["shape"]
    group_size, planes = record["group_size"], record.get("planes", 1)
    good = entry.dtype == "U8" and len(entry.shape) == 1
    require(good, "stream-not-u8", f"{name}: {entry.dtype} {entry.shape}")
    classes = classes_of_trits(cols, group_size, planes)
    data = read_stream(data, math.prod(lead), classes, name)
    entry = replace(entry, shape=(*lead, len(classes)))
    dtype = record.get("scale_dtype")
    if dtype is None:
        return entry, data, scale, scales
    good = scale.dtype == "U8" and len(scale.shape) == 1
    require(good, "stream-not-u8", f"{name}_scale: {scale.dtype} {scale.shape}")
    groups = -(-cols // group_length(cols, group_size))
    shape = (*lead[:-1], 1 if group_size == 0 else lead[-1], planes * groups)
    classes = list(range(DTYPE_SIZES[dtype])) * shape[-1]
    scales = read_stream(scales, math.prod(shape[:-1]), classes, f"{name}_scale")
    return entry, data, replace(scale, dtype=dtype, shape=shape), scales


def float32(data: bytes, dtype: str, name: str) -> NDArray[np.float32]:
    """Widen stored scales; BF16 is the upper half of a float32, U8 is bits 7 to 14 of an F16."""
    if dtype == "U8":
        codes = np.frombuffer(data, np.uint8)
        no_number = (codes > 247) | ((codes > 0) & (codes < 8))
        refuse_any(no_number, "scale-code-invalid", f"{name}_scale: not 0 nor 8 to 247")
        return (codes.astype(np.uint16) << 7).view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def check_scales(
    scales: NDArray[np.float32],
    numbers: NDArray[np.int8],
    cols: int,
    group_size: int,
    name: str,
    *,
    signed: bool,
) -> None:
    """A scale is finite, and 0 exactly when every trit (integer) of its group is 0.

    It is never -0, and not negative but where it is signed.
    """
    used: NDArray[np.bool_] = np.zeros(scales.shape, dtype=np.bool_)  # so if there is no weight
    if numbers.size:
        length = group_length(cols, group_size)
        planes = range(0, numbers.shape[-1], cols)
        starts = [plane + at for plane in planes for at in range(0, cols, length)]
        used = np.logical_or.reduceat(numbers != 0, starts, axis=-1)
        if group_size == 0:
            used = np.logical_or.reduce(used, axis=-2, keepdims=True)
    for rule, broken in (
        ("scale-nan", np.isnan(scales)),
        ("scale-inf", np.isinf(scales)),
        ("scale-negative", (scales < 0) & (not signed)),
        ("scale-negative-zero", np.signbit(scales) & (scales == 0)),
        ("scale-zero-with-trits", used & (scales == 0)),
        ("scale-nonzero-without-trits", ~used & (scales != 0)),
    ):
        refuse_any(broken, rule, f"{name}_scale: a scale breaks the rule")


def decode_packed(
    name: str,
    record: dict[str, Any],
    features: set[str],
    packed: Entry,
    codes: bytes,
    scale: Entry,
    scales: bytes,
) -> Ternary | Integers:
    """Decode one packed tensor and its scale companion."""
    *matrix, rows, cols = record["shape"]
    group_size = record["group_size"]
    planes = record.get("planes", 1)
    codec = record["codec"]
    width = packed_width(cols, group_size)
    if codec != "base3":
        width = cols if codec == "int8" else packed_width_int4(cols, group_size)
    groups = -(-cols // group_length(cols, group_size))
    if codec == "int8":
        require(packed.dtype == "I8", "packed-not-i8", f"{name}: dtype is {packed.dtype}")
    else:
        require(packed.dtype == "U8", "packed-not-u8", f"{name}: dtype is {packed.dtype}")
    lead, stored = [*matrix, rows], planes * width
    same = list(packed.shape[:-1]) == lead
    require(same, "rows-mismatch", f"{name}: stored as {packed.shape}, expected {[*lead, stored]}")
    same = packed.shape[-1] == stored
    require(same, "packed-width-wrong", f"{name}: {packed.shape[-1]} bytes a row, not {stored}")
    types = {"F16", "BF16", "F32"} if codec == "base3" else {"F16", "F32"}
    if "scale8" in features and codec == "base3":
        types.add("U8")
    require(scale.dtype in types, "scale-dtype-wrong", f"{name}_scale: dtype is {scale.dtype}")
    expected = (*matrix, 1, planes) if group_size == 0 else (*matrix, rows, planes * groups)
    same = scale.shape == expected
    require(same, "scale-shape-wrong", f"{name}_scale: shape is {scale.shape}, not {expected}")

    numbers = np.zeros((*matrix, rows, planes * cols), np.int8)
    if codec == "int8":
        numbers = np.frombuffer(codes, np.int8).reshape(numbers.shape)
        refuse_any(numbers == -128, "weight-invalid", f"{name}: a weight is -128")
    elif numbers.size:
        table = np.frombuffer(codes, np.uint8).reshape(*lead, planes, width)
        decoder = unpack if codec == "base3" else unpack_int4
        numbers = decoder(table, cols, group_size, name).reshape(numbers.shape)
    values = float32(scales, scale.dtype, name).reshape(expected)
    check_scales(values, numbers, cols, group_size, name, signed=codec == "int4")
    digest = hashlib.sha256(codes + scales).hexdigest()
    require(digest == record["sha256"], "digest-mismatch", f"{name}: SHA-256 is {digest}")
    transposed = "transposed" in record
    if codec != "base3":
        return Integers(codec, numbers, values, scale.dtype, group_size, transposed)
    rotation = None
    if "rotation" in record:
        rotation = record["rotation"]["block"], record["rotation"]["seed"]
    kernel = tuple(record.get("kernel", ()))
    return Ternary(numbers, values, scale.dtype, group_size, transposed, planes, rotation, kernel)


# Files and directories


def read_head(path: Path) -> tuple[dict[str, Entry], dict[str, Any], set[str]]:
    """Return the tensors of a file in the order of their data, its records, and its features."""
    with path.open("rb") as file:
        entries, metadata = read_header(file, path.stat().st_size)
    return entries, *read_records(metadata)


def read_tensors(path: Path) -> Iterator[tuple[str, Ternary | Integers | Kept]]:
    """Decode a file alone or a directory as a whole, tensor by tensor, in the order of the data."""
    places: dict[str, tuple[Path, Entry]] = {}
    records: dict[str, Any] = {}  # of a tensor in the same file: these count
    others: dict[str, Any] = {}  # of tensors of other shards
    features: dict[Path, set[str]] = {}  # those of the file with a tensor's record count for it
    for file in files_of(path):
        entries, described, features[file] = read_head(file)
        places |= {name: (file, entry) for name, entry in entries.items()}
        for name, record in described.items():
            (records if name in entries else others)[name] = record

    packed = {
        name
        for name, record in records.items()
        if check_record(name, record, features[places[name][0]])
    }
    # Only a file that is read alone has records of tensors that are nowhere: see files_of.
    absent = {name for name in others.keys() - places.keys() if is_packed(others[name])}
    scales = {f"{name}_scale" for name in packed | absent}
    for name in packed:
        require(f"{name}_scale" in places, "scale-missing", f"{name}: no {name}_scale")
    for name in places:
        twice = name in scales and name in records
        require(not twice, "scale-with-record", f"{name}: a scale has no record")
        known = name in scales or name in records
        require(known, "tensor-without-record", f"{name}: no record in the metadata")

    def read(name: str) -> tuple[Entry, bytes]:
        file, entry = places[name]
        with file.open("rb") as stream:
            stream.seek(entry.start)
            return entry, stream.read(entry.end - entry.start)

    for name in places:
        if name in scales:
            continue
        entry, data = read(name)
        if name in packed:
            allowed, scale = features[places[name][0]], read(f"{name}_scale")
            stored = entry, data, *scale
            if "coding" in records[name]:
                beside = places[f"{name}_scale"][0] == places[name][0]
                good = beside or "scale_dtype" not in records[name]
                require(good, "stream-not-u8", f"{name}_scale: is in another file")
                stored = uncoded(name, records[name], *stored)
            yield name, decode_packed(name, records[name], allowed, *stored)
        else:
            digest = hashlib.sha256(data).hexdigest()
            same = digest == records[name]["sha256"]
            require(same, "digest-mismatch", f"{name}: SHA-256 is {digest}")
            yield name, Kept(entry.dtype, entry.shape, data)


def decode(path: str | Path) -> dict[str, Ternary | Integers | Kept]:
    """Decode and verify a file alone or a directory as a whole.  Raises Invalid, OSError."""
    return dict(read_tensors(Path(path)))


def files_of(path: Path) -> list[Path]:
    """A file itself, or the files of a directory, with index and records checked against them."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    weight_map: dict[str, Any] = {}
    files = [path / "model.safetensors"]
    if not files[0].exists():
        require(index.exists(), "no-model", f"{path}: no model.safetensors and no index")
        found = parse_object(index.read_bytes(), "index-bad", index.name).get("weight_map")
        mapped = isinstance(found, dict) and len(found) > 0
        require(mapped, "index-bad", f"{index.name}: `weight_map` is not an object with members")
        weight_map = dict(found or {})
        for name, file in weight_map.items():
            plain = isinstance(file, str) and re.fullmatch(r"[^/\\:\0]+", file) is not None
            plain = plain and file not in (".", "..")
            require(plain, "index-path-bad", f"{name}: {file!r} is not a plain file name")
            there = (path / file).is_file()
            require(there, "index-file-missing", f"{name}: there is no file {file}")
        files = [path / file for file in sorted(set(weight_map.values()))]

    recorded: dict[str, str] = {}
    present: set[str] = set()
    for part in files:
        entries, records, _ = read_head(part)
        recorded.update(dict.fromkeys(records, part.name))
        present |= entries.keys()
        listed = {name for name, file in weight_map.items() if file == part.name}
        wrong = sorted(listed ^ entries.keys()) if weight_map else []
        require(not wrong, "index-disagrees", f"{part.name}: with the index over {wrong[:3]}")
    for name, file in recorded.items():
        require(name in present, "record-without-tensor", f"{file}: {name} is in no file")
    return files


def describe(name: str, tensor: Ternary | Integers | Kept) -> str:
    """One line: name, kind, logical shape, group size, sparsity, SHA-256, ok."""
    if isinstance(tensor, Kept):
        digest = hashlib.sha256(tensor.data).hexdigest()
        return f"{name} kept {list(tensor.shape)} - - {digest} ok"
    if isinstance(tensor, Integers):
        numbers, kind, planes = tensor.weights, tensor.codec, 1
    else:
        numbers, kind, planes = tensor.trits, "+".join(["ternary"] * tensor.planes), tensor.planes
    sparsity = 1 - np.count_nonzero(numbers) / numbers.size if numbers.size else 0.0
    digest = hashlib.sha256(np.ascontiguousarray(numbers).data).hexdigest()
    shape = [*numbers.shape[:-1], numbers.shape[-1] // planes]
    return f"{name} {kind} {shape} {tensor.group_size} {sparsity:.4f} {digest} ok"


def main(arguments: list[str]) -> int:
    """Check every file and directory named; 0 if all are valid, 1 if not, 2 without arguments."""
    if not arguments:
        print("usage: python formats/reference.py FILE_OR_DIRECTORY...", file=sys.stderr)
        return 2
    failed = False
    for argument in arguments:
        try:
            for name, tensor in read_tensors(Path(argument)):
                # names come from the file: control characters must not reach the terminal
                print(describe(json.dumps(name)[1:-1], tensor))
        except (Invalid, OSError) as error:
            print(json.dumps(f"{argument}: {error}")[1:-1], file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
