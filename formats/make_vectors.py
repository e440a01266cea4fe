"""Write the conformance vectors of the formats: the only way in which they change.

    python formats/make_vectors.py [--output FOLDER] [--force]

The encoder below is the plainest possible reading of the documents: lists, `divmod` and `struct`,
one weight at a time. It shares no code with reference.py or with the package, so that
the three can be compared. Trits come from hand-made lists or from a fixed congruential sequence,
scales are exact in the type that stores them, and nothing depends on the machine.

A vector is a promise to everyone who has stored a file. The script therefore replaces one by other
bytes only with --force, and never removes one: it names those that it does not make and stops.

    vectors/base3.json                     rows of trits and their packed bytes
    vectors/scale8.json                    the codes of 8-bit scales and their numbers
    vectors/valid/CASE.safetensors         with CASE.json: what a decoder must find in it
    vectors/valid-directories/CASE/        with CASE.json
    vectors/invalid/RULE[-VARIANT].safetensors    breaks this one rule and no other
    vectors/invalid-directories/RULE[-VARIANT]/
    vectors/steps/                         journals of steps: see make_steps_vectors.py
    vectors/patches/                       patches: see make_patch_vectors.py
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import make_patch_vectors
import make_steps_vectors
from make_streams import classes_of_row, stream

Row = list[int]
Files = dict[str, bytes]

HERE = Path(__file__).resolve().parent
SIGNS = {"+": 1, "0": 0, "-": -1}
INDEX = "model.safetensors.index.json"
SHOWN_TRITS = 64  # a matrix up to this size is written out in its .json, a larger one is hashed


# Trits


def trits_of(text: str) -> Row:
    """Read trits written as + 0 -, spaces ignored."""
    return [SIGNS[sign] for sign in text if sign != " "]


def sequence(count: int, seed: int) -> Row:
    """Return `count` trits of a 64-bit linear congruential generator, high bits used."""
    state, found = seed, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append((state >> 33) % 3 - 1)
    return found


def matrix(rows: int, cols: int, seed: int) -> list[Row]:
    """Return rows of trits from `sequence`."""
    flat = sequence(rows * cols, seed)
    return [flat[row * cols : (row + 1) * cols] for row in range(rows)]


def groups_of(row: Row, group_size: int) -> list[Row]:
    """Cut a row at multiples of the group size; -1 and 0 leave it whole."""
    length = len(row) if group_size <= 0 else group_size
    return [row[start : start + length] for start in range(0, len(row), length)]


# Bytes


def pack_group(group: Row) -> bytes:
    """Five digits a byte, digit = trit + 1, first least significant, padded with zero trits."""
    padded = group + [0] * (-len(group) % 5)
    packed = bytearray()
    for start in range(0, len(padded), 5):
        packed.append(sum((padded[start + i] + 1) * 3**i for i in range(5)))
    return bytes(packed)


def pack_row(row: Row, group_size: int) -> bytes:
    """Pack the groups of a row one after the other, each to whole bytes."""
    return b"".join(pack_group(group) for group in groups_of(row, group_size))


def pack_halves(row: Row, group_size: int) -> bytes:
    """Pack integers of -8 to 7, two to a byte, the groups of a row one after the other."""
    packed = bytearray()
    for group in groups_of(row, group_size):
        filled = group + [0] * (len(group) % 2)
        for first, second in zip(filled[::2], filled[1::2], strict=True):
            packed.append(first + 8 + 16 * (second + 8))
    return bytes(packed)


def store_float(value: float, dtype: str) -> bytes:
    """Store a number that the type holds exactly (NaN apart)."""
    if dtype == "U8":  # the upper 8 of the 15 bits of a float16 that is not negative
        bits = struct.unpack("<H", struct.pack("<e", value))[0]
        assert bits % 128 == 0, f"{value} is not exact in 8 bits"
        return bytes([bits >> 7])
    if dtype == "F16":
        data = struct.pack("<e", value)
        back = struct.unpack("<e", data)[0]
    else:
        data = struct.pack("<f", value)
        back = struct.unpack("<f", data)[0]
        if dtype == "BF16":
            assert data[:2] == b"\0\0", f"{value} is not exact in BF16"
            data = data[2:]
    assert back == value or math.isnan(value), f"{value} is not exact in {dtype}"
    return data


def float_bits(value: float) -> str:
    """Return the float32 bit pattern in hexadecimal, sign bit first: 1.0 = 3f800000."""
    return struct.pack(">f", value).hex()


def sha256(*parts: bytes) -> str:
    """Return the digest of the parts laid end to end, 64 hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def compact(value: Any) -> str:
    """Return JSON without spaces, keys in the order in which they were put."""
    return json.dumps(value, separators=(",", ":"))


# Rotation


def signs_of(cols: int, seed: int) -> Row:
    """Return the signs of SplitMix64, whose state is kept from one column to the next."""
    state, signs = seed, []
    for _ in range(cols):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        signs.append(-1 if z ^ (z >> 31) >= 2**63 else 1)
    return signs


def unrotated(row: list[float], block: int, seed: int) -> list[float]:
    """Return a row times R^T: sums of integers, each divided and rounded to a float once."""
    unit = 2**149  # every float32 is a whole number of 1 / unit
    whole = [int(Fraction(value) * unit) for value in row]
    signs, found = signs_of(len(row), seed), []
    hadamard = [[1 - 2 * (bin(i & j).count("1") % 2) for j in range(block)] for i in range(block)]
    for col, sign in enumerate(signs):
        first = col - col % block
        terms = zip(hadamard[col % block], whole[first : first + block], strict=True)
        total = sum(entry * value for entry, value in terms)
        found.append(float(Fraction(sign * total, unit * math.isqrt(block))))
    return found


# Tensors and files


# the matrix of the worked example of rans.md
WORKED = [[-1, 1, 0, 0, 0, 1, 0, -1, 1, 0, 0, 0], [0] * 6 + [1, 1, 1, 0, 0, -1]]


@dataclass
class Stored:
    """One entry of the safetensors file: a tensor with a record, or a scale (record None)."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes
    record: dict[str, Any] | None = None


@dataclass
class Case:
    """The tensors of a file in the order of their data, and what a decoder finds in them."""

    stored: list[Stored] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=dict)
    features: set[str] = field(default_factory=set)

    def add(self, *others: "Case") -> "Case":
        """Append the tensors of the others."""
        for other in others:
            self.stored += other.stored
            self.expected |= other.expected
            self.features |= other.features
        return self


def some_scale(index: int) -> float:
    """Return a positive number that F16, BF16 and F32 all hold: n/64 for n up to 127."""
    return (index * 29 % 127 + 1) / 64


def scales_for(planes: list[list[list[Row]]], group_size: int) -> list[int]:
    """Say which groups have a scale: 1 or 0 (all is zero), in the order in which scales lie.

    planes  one or two lists of experts, each a list of rows
    """
    flags = []
    for experts in zip(*planes, strict=True):
        if group_size == 0:
            flags += [int(any(any(row) for row in rows)) for rows in experts]
            continue
        for row_of_planes in zip(*experts, strict=True):
            flags += [int(any(g)) for row in row_of_planes for g in groups_of(row, group_size)]
    return flags


def packed_case(
    name: str,
    planes: list[Any],
    group_size: int,
    codec: str,
    *,
    cols: int | None = None,
    dtype: str = "F16",
    scales: list[float] | None = None,
    transposed: bool = False,
    rotation: tuple[int, int] | None = None,
    kernel: list[int] | None = None,
    change_packed: Callable[[bytearray], None] | None = None,
) -> Case:
    """Make a packed tensor and its scale companion.

    planes         one matrix, or two of trits: rows, or experts of rows; `cols` where there is no
                   row to count
    rotation       block and seed, if the planes are those of a rotated matrix
    kernel         sizes of the kernels that are the rows, if they are some
    scales         as they lie; by default `some_scale` where a group is not all zero, else 0
    change_packed  spoils the packed bytes in place before the digest is taken
    """
    fused = bool(planes[0]) and bool(planes[0][0]) and isinstance(planes[0][0][0], list)
    stacks: list[Any] = [plane if fused else [plane] for plane in planes]
    width = len(stacks[0][0][0]) if cols is None else cols
    # the rows of all experts, each as the rows of its planes
    rows = [
        list(row) for experts in zip(*stacks, strict=True) for row in zip(*experts, strict=True)
    ]
    length = width if group_size <= 0 else min(group_size, width)
    row_bytes = width
    if codec != "int8":
        to_byte = 5 if codec == "base3" else 2
        row_bytes = sum(-(-min(length, width - at) // to_byte) for at in range(0, width, length))
    groups = len(range(0, width, length))
    count = len(planes)
    lead = [len(stacks[0]), len(stacks[0][0])] if fused else [len(rows)]
    if group_size == 0:
        scale_shape = [len(stacks[0]), 1, count] if fused else [1, count]
    else:
        scale_shape = [*lead, count * groups]

    if scales is None:
        flags = scales_for(stacks, group_size)
        scales = [some_scale(index) if flag else 0.0 for index, flag in enumerate(flags)]
    packed = bytearray()
    for row in rows:
        for part in row:
            if codec == "base3":
                packed += pack_row(part, group_size)
            elif codec == "int4":
                packed += pack_halves(part, group_size)
            else:
                packed += bytes(number % 256 for number in part)
    assert len(packed) == len(rows) * row_bytes * count
    assert len(scales) == math.prod(scale_shape)
    if change_packed:
        change_packed(packed)
    scale_bytes = b"".join(store_float(value, dtype) for value in scales)

    shape = [*lead, width]
    record: dict[str, Any] = {"shape": shape, "group_size": group_size, "codec": codec}
    if count > 1:
        record["planes"] = count
    if rotation:
        record["rotation"] = {"block": rotation[0], "seed": rotation[1]}
    if transposed:
        record["transposed"] = True
    if kernel:
        record["kernel"] = kernel
    record["sha256"] = sha256(bytes(packed), scale_bytes)

    weights, turned = bytearray(), []
    for number, row in enumerate(rows):
        at = len(weights)
        for col in range(width):
            total = 0.0
            for plane, part in enumerate(row):
                if group_size == 0:
                    scale = scales[number // lead[-1] * count + plane]
                else:
                    scale = scales[(number * count + plane) * groups + col // length]
                # rounds to float32: at most one product or sum here is not exact
                total += part[col] * scale if part[col] else 0.0
            weights += struct.pack("<f", total)
        if rotation:
            turned += unrotated(list(struct.unpack(f"<{width}f", weights[at:])), *rotation)
    numbers = bytes(n % 256 for row in rows for part in row for n in part)
    found: dict[str, Any] = {
        "kind": "ternary" if codec == "base3" else codec,
        "shape": shape,
        "group_size": group_size,
        "transposed": transposed,
    }
    if kernel:
        found["kernel"] = kernel
    if codec == "base3":
        if count > 1:
            found["planes"] = count
        if rotation:
            found["rotation"] = record["rotation"]
        if count * math.prod(shape) <= SHOWN_TRITS:
            found["trits"] = planes[0] if count == 1 else beside(*planes)
        found["trits_sha256"] = sha256(numbers)
    else:
        found["weights"] = planes[0]
    found |= {
        "scale_dtype": dtype,
        "scale_shape": scale_shape,
        "scales": [float_bits(value) for value in scales],
    }
    if rotation:
        found["rotated_sha256"] = sha256(bytes(weights))
        found["dequantized"] = [float_bits(value) for value in turned]
    else:
        found["dequantized_sha256"] = sha256(bytes(weights))
    tensors = [
        Stored(name, "I8" if codec == "int8" else "U8", [*lead, row_bytes * count], bytes(packed)),
        Stored(f"{name}_scale", dtype, scale_shape, scale_bytes),
    ]
    tensors[0].record = record
    features = {"scale8": dtype == "U8", "planes": count > 1, "rotation": rotation is not None}
    features |= {each: codec == each for each in ("int8", "int4")}
    features["kernel"] = kernel is not None
    return Case(tensors, {name: found}, {feature for feature, used in features.items() if used})


def coded(
    case: Case,
    height: int | None = None,
    *,
    scales: bool = True,
    change: Callable[[bytearray], None] | None = None,
) -> Case:
    """Store a ternary tensor as streams, or its trits alone.

    height  rows of a chunk of the trits
    change  spoils the stream of the trits in place
    """
    packed, scale = case.stored
    assert packed.record is not None
    shape, group_size = packed.record["shape"], packed.record["group_size"]
    classes = classes_of_row(shape[-1], group_size, packed.record.get("planes", 1))
    streams = [bytearray(stream(rows_of(packed), classes, height))]
    packed.record = {**packed.record, "coding": "rans"}
    case.features.add("rans")
    if scales:
        packed.record["scale_dtype"] = scale.dtype
        size = len(scale.data) // max(1, math.prod(scale.shape))
        items = list(range(size)) * scale.shape[-1]
        streams.append(bytearray(stream(rows_of(scale), items)))
    if change:
        change(streams[0])
    for each, data in zip(case.stored, streams, strict=False):
        each.dtype, each.shape, each.data = "U8", [len(data)], bytes(data)
    return case


def rows_of(stored: Stored) -> list[bytes]:
    """The rows of a tensor, as bytes."""
    count = math.prod(stored.shape[:-1])
    width = len(stored.data) // max(1, count)
    return [stored.data[at * width : (at + 1) * width] for at in range(count)]


def beside(first: list[Any], second: list[Any]) -> list[Any]:
    """Put the rows of two matrices, or of two stacks of them, one behind the other."""
    if first and isinstance(first[0], list):
        return [beside(a, b) for a, b in zip(first, second, strict=True)]
    return first + second


def ternary(name: str, trits: list[Row] | list[list[Row]], group_size: int, **options: Any) -> Case:
    """Make a ternary tensor; options as of `packed_case`."""
    return packed_case(name, [trits], group_size, "base3", **options)


def two_planes(name: str, first: list[Any], second: list[Any], size: int, **options: Any) -> Case:
    """Make a tensor that is the sum of two ternary ones; options as of `packed_case`."""
    return packed_case(name, [first, second], size, "base3", **options)


def int8(name: str, weights: list[Any], group_size: int, **options: Any) -> Case:
    """Make a tensor of codec int8; options as of `packed_case`."""
    return packed_case(name, [weights], group_size, "int8", **options)


def int4(name: str, weights: list[Any], group_size: int, **options: Any) -> Case:
    """Make a tensor of codec int4; options as of `packed_case`."""
    return packed_case(name, [weights], group_size, "int4", **options)


def halves_matrix(rows: int, cols: int, seed: int) -> list[Row]:
    """Return rows of int4 weights, -8 to 7, of the same generator as `sequence`."""
    return [[number % 16 - 8 for number in row] for row in bytes_matrix(rows, cols, seed)]


def bytes_matrix(rows: int, cols: int, seed: int) -> list[Row]:
    """Return rows of int8 weights, -127 to 127, of the same generator as `sequence`."""
    state, found = seed, []
    for _ in range(rows * cols):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append((state >> 33) % 255 - 127)
    return [found[row * cols : (row + 1) * cols] for row in range(rows)]


def kept(name: str, dtype: str, shape: list[int], data: bytes) -> Case:
    """Make a tensor that is stored as it was."""
    record = {"sha256": sha256(data)}
    found = {"kind": "kept", "dtype": dtype, "shape": shape, "data": data.hex()}
    return Case([Stored(name, dtype, shape, data, record)], {name: found})


class Draft:
    """The parts of a file before they are put together, so that a rule can be broken in one."""

    def __init__(self, case: Case) -> None:
        self.entries: dict[str, Any] = {}
        self.records: dict[str, Any] = {}
        self.data = bytearray()
        for tensor in case.stored:
            begin = len(self.data)
            self.data += tensor.data
            self.entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [begin, len(self.data)],
            }
            if tensor.record is not None:
                self.records[tensor.name] = copy.deepcopy(tensor.record)
        self.document: dict[str, Any] = {
            "format_version": 1,
            "features": sorted(case.features),
            "tensors": self.records,
        }

    def header(self) -> str:
        """The JSON header, metadata first, then the tensors."""
        metadata = {"format": "pt", "ternarize": compact(self.document)}
        return compact({"__metadata__": metadata, **self.entries})

    def file(self, header: str | bytes | None = None) -> bytes:
        """The file, with another header if one is given."""
        text = self.header() if header is None else header
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return struct.pack("<Q", len(raw)) + raw + bytes(self.data)


# Valid


def codec_vectors() -> bytes:
    """Rows of trits beside their packed bytes, for the codec alone."""
    every_code = [trit for digits in itertools.product((-1, 0, 1), repeat=5) for trit in digits]
    cases = [
        ("the worked example", 6, [trits_of("+0-++0")]),
        ("one trit each, padded", 1, [trits_of("-0+0-+")]),
        ("one short group: tails of 1 to 4 trits", -1, [[-1]]),
        ("", -1, [[1, -1]]),
        ("", -1, [[0, 1, -1]]),
        ("", -1, [[-1, 0, 1, 1]]),
        ("whole bytes, no padding", 5, [trits_of("+++++-----00000"), trits_of("0-+0-+0-+0-+0-+")]),
        ("groups of 7 with a last group of 3", 7, matrix(2, 17, 1)),
        ("group longer than the row", 128, matrix(2, 9, 2)),
        ("one group per row", -1, matrix(3, 11, 3)),
        ("one scale per tensor packs as one group per row", 0, matrix(3, 11, 3)),
        ("groups of 128 with a last group of 44", 128, matrix(1, 300, 4)),
        ("groups of 64, 13 bytes each", 64, matrix(2, 128, 5)),
        ("every byte value", -1, [every_code]),
    ]
    lines = []
    for note, group_size, rows in cases:
        packed = [pack_row(row, group_size).hex() for row in rows]
        entry = {"cols": len(rows[0]), "group_size": group_size, "trits": rows, "packed": packed}
        lines.append(compact({"note": note, **entry} if note else entry))
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode("utf-8")


def scale_vectors() -> bytes:
    """Every code of an 8-bit scale beside the bits of its number in float32."""
    lines = [compact({"code": 0, "value": float_bits(0.0)})]
    for code in range(8, 248):
        value = (1 + code % 8 / 8) * 2.0 ** (code // 8 - 15)
        assert store_float(value, "U8") == bytes([code])
        lines.append(compact({"code": code, "value": float_bits(value)}))
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode("utf-8")


def kept_tensors() -> Case:
    """Tensors in the usual types, a scalar, an empty one, names that only look like scales."""
    half = b"".join(store_float(value, "F16") for value in (1.0, -2.5, 65504.0))
    brain = b"".join(store_float(value, "BF16") for value in (1.0, -2.5, 2.0**100))
    single = struct.pack("<3f", 1.0, -0.0, 3.1415927410125732)
    return Case().add(
        kept("norm.weight", "F32", [3], single),
        kept("embed.weight", "F16", [1, 3], half),
        kept("head.weight", "BF16", [3, 1], brain),
        kept("steps", "I64", [], struct.pack("<q", -7)),
        kept("empty", "F32", [0, 4], b""),
        kept("logit_scale", "F32", [], struct.pack("<f", 2.65625)),
        kept("bits.weight", "U8", [2], b"\xff\x00"),
        kept("bits.weight_scale", "F16", [1], store_float(-1.0, "F16")),
    )


def base() -> Case:
    """Two rows of two groups, the last group without trits, and a kept tensor: spoiled below."""
    return Case().add(
        ternary("w.weight", [trits_of("+0-++0 -0+0-+"), trits_of("0+--0+ 000000")], 6),
        kept("norm.weight", "F32", [2], struct.pack("<2f", 1.0, 0.5)),
    )


def valid_cases() -> dict[str, Case]:
    """Every file that a decoder must accept, in the usual layout."""
    three = [matrix(3, 7, seed) for seed in (20, 21, 22)]
    cases = {
        "worked-example": ternary("w.weight", [trits_of("+0-++0")], -1, scales=[0.5]),
        "groups-128-tail": ternary("w.weight", matrix(2, 300, 10), 128),
        "group-size-5": ternary("w.weight", matrix(3, 15, 11), 5),
        "group-size-7-tail": ternary("w.weight", matrix(3, 17, 12), 7),
        "group-size-1": ternary("w.weight", matrix(2, 6, 13), 1),
        "group-size-above-cols": ternary("w.weight", matrix(2, 9, 14), 128),
        "row": ternary("w.weight", matrix(3, 11, 15), -1),
        "tensor": ternary("w.weight", matrix(3, 11, 16), 0),
        "experts-group": ternary("experts.gate_up_proj", three, 5),
        "experts-row": ternary("experts.gate_up_proj", three, -1),
        "experts-tensor": ternary("experts.gate_up_proj", [*three[:2], [[0] * 7] * 3], 0),
        "transposed": ternary("c_attn.weight", matrix(4, 6, 23), 6, transposed=True),
        "scales-f16": ternary(
            "w.weight", [trits_of("+-0")] * 4, -1, scales=[2.0**-24, 2.0**-14, 1.0, 65504.0]
        ),
        "scales-bf16": ternary(
            "w.weight",
            [trits_of("+-0")] * 4,
            -1,
            dtype="BF16",
            scales=[2.0**-133, 2.0**-100, 1.0078125, 255 * 2.0**120],
        ),
        "scales-f32": ternary(
            "w.weight",
            [trits_of("+-0")] * 4,
            -1,
            dtype="F32",
            scales=[2.0**-149, 1 + 2.0**-23, 65536.0, (2 - 2.0**-23) * 2.0**127],
        ),
        "all-zero-group": ternary("w.weight", [trits_of("00000 +0000 00000")] * 2, 5),
        "all-zero-tensor": ternary("w.weight", [[0] * 6] * 2, 0),
        "zero-rows": Case().add(
            ternary("group.weight", [], 4, cols=6), ternary("tensor.weight", [], 0, cols=6)
        ),
        "odd-offsets": Case().add(
            # the scale of a matrix with an odd number of bytes starts at an odd offset
            ternary("w.weight", matrix(3, 4, 24), -1),
            kept("norm.weight", "F32", [1], struct.pack("<f", 1.0)),
            ternary("v.weight", matrix(1, 14, 25), 5, dtype="F32"),
        ),
        "scales-u8": ternary(
            "w.weight",
            [trits_of("+-0")] * 4 + [[0] * 3],
            -1,
            dtype="U8",
            scales=[2.0**-14, 1.125, 1.875 * 2.0**-3, 61440.0, 0.0],
        ),
        "scales-u8-tensor": ternary("w.weight", matrix(3, 7, 50), 0, dtype="U8", scales=[0.625]),
        "scales-u8-experts": ternary(
            "experts.gate_up_proj", three, -1, dtype="U8", scales=[0.5, 1.0, 1.5] * 3
        ),
        "planes-group": two_planes("w.weight", matrix(2, 12, 51), matrix(2, 12, 52), 5),
        "planes-large": two_planes("w.weight", matrix(3, 300, 53), matrix(3, 300, 54), 128),
        "planes-row": two_planes("w.weight", matrix(3, 7, 55), matrix(3, 7, 56), -1),
        "planes-tensor": two_planes("w.weight", matrix(3, 7, 57), matrix(3, 7, 58), 0),
        "planes-experts": two_planes("up_proj", three, [matrix(3, 7, n) for n in (60, 61, 62)], 5),
        "planes-experts-tensor": two_planes("up_proj", three, [[[0] * 7] * 3, *three[1:]], 0),
        "planes-transposed": two_planes(
            "c_attn.weight", matrix(4, 6, 63), matrix(4, 6, 64), 6, transposed=True
        ),
        "planes-zero-plane": two_planes("w.weight", matrix(2, 6, 65), [[0] * 6] * 2, 3),
        "planes-scales-u8": two_planes(
            "w.weight",
            [trits_of("+0-++0")] * 2,
            [trits_of("0--0+-")] * 2,
            -1,
            dtype="U8",
            scales=[1.0, 0.375, 1.5, 0.5],
        ),
        "planes-cancel": two_planes(
            "w.weight", [trits_of("+-+0")], [trits_of("-++0")], -1, scales=[0.5, 0.5]
        ),
        "planes-rounded": two_planes(
            # the sums lie at the middle of two float32, and just above and below one
            "w.weight",
            [trits_of("++-+")] * 4,
            [trits_of("+-++")] * 4,
            -1,
            dtype="F32",
            scales=[
                *(1.0, 2.0**-24),
                *(1 + 2.0**-23, 2.0**-24),
                *(1.0, 2.0**-24 + 2.0**-47),
                *(2.0**127, 2.0**-149),
            ],
        ),
        "int8-group": int8("w.weight", bytes_matrix(2, 12, 70), 5),
        "int8-row": int8("w.weight", [[-127, -1, 0, 1, 127], [0] * 5, [5, 4, 3, 2, 1]], -1),
        "int8-tensor": int8("w.weight", bytes_matrix(2, 5, 71), 0),
        "int8-experts": int8("up_proj", [bytes_matrix(2, 5, 72), bytes_matrix(2, 5, 73)], 3),
        "int8-transposed": int8("w.weight", bytes_matrix(3, 4, 74), 4, transposed=True),
        "int8-zero-rows": int8("w.weight", [], 4, cols=6),
        "int8-scales-f32": int8(
            # the products have up to 31 binary digits: they are rounded to 24
            "w.weight",
            bytes_matrix(3, 6, 75),
            -1,
            dtype="F32",
            scales=[1 + 2.0**-23, 2.0**-149, (2 - 2.0**-23) * 2.0**100],
        ),
        "all-features": base().add(
            ternary("a.weight", [trits_of("+0-")], -1, dtype="U8", scales=[1.0]),
            two_planes("b.weight", [trits_of("+0-")], [trits_of("0+-")], -1),
            int8("c.weight", [[1, -2, 3]], -1),
        ),
        "rotation-4": ternary("w.weight", matrix(2, 8, 80), 3, rotation=(4, 0)),
        "rotation-16": ternary("w.weight", matrix(3, 16, 81), 5, rotation=(16, 1)),
        "rotation-16-two-blocks": ternary("w.weight", matrix(2, 32, 82), 12, rotation=(16, 2)),
        "rotation-64": ternary("w.weight", matrix(2, 64, 83), -1, rotation=(64, 2**32 - 1)),
        "rotation-256-two-blocks": ternary("w.weight", matrix(1, 512, 84), 128, rotation=(256, 0)),
        "rotation-1024": ternary("w.weight", matrix(1, 1024, 85), 0, rotation=(1024, 5)),
        "rotation-zero-block": ternary(
            "w.weight", [[0] * 4 + row for row in matrix(2, 4, 86)], 4, rotation=(4, 6)
        ),
        "rotation-zero-rows": ternary("w.weight", [], 4, cols=16, rotation=(16, 0)),
        "rotation-experts": ternary(
            "experts.up_proj", [matrix(2, 8, seed) for seed in (87, 88, 89)], 8, rotation=(4, 7)
        ),
        "rotation-experts-tensor": ternary(
            "experts.up_proj", [matrix(2, 8, 90), [[0] * 8] * 2], 0, rotation=(4, 7)
        ),
        "rotation-transposed": ternary(
            "c_attn.weight", matrix(4, 16, 91), 8, transposed=True, rotation=(16, 8)
        ),
        "rotation-scales-u8": ternary(
            "w.weight", matrix(2, 16, 92), -1, dtype="U8", scales=[0.5, 0.875], rotation=(16, 9)
        ),
        "rotation-scales-f32": ternary(
            # sums of up to 256 numbers of 24 digits: not exact in float32, and here it shows
            "w.weight",
            matrix(2, 256, 93),
            16,
            dtype="F32",
            scales=[(1 + (n * 2654435761 % 2**23) / 2**23) / 2 ** (n % 5) for n in range(1, 33)],
            rotation=(256, 10),
        ),
        "rotation-planes": two_planes(
            "w.weight", matrix(2, 32, 94), matrix(2, 32, 95), 16, rotation=(16, 11)
        ),
        "rotation-planes-rounded": two_planes(
            # the sum of the planes is rounded to float32 before it is turned back
            "w.weight",
            [trits_of("++-+")] * 2,
            [trits_of("+-++")] * 2,
            -1,
            dtype="F32",
            scales=[1.0, 2.0**-24, 1 + 2.0**-23, 2.0**-24],
            rotation=(4, 12),
        ),
        "rotation-planes-experts-u8": two_planes(
            "up_proj",
            [matrix(2, 16, 96), matrix(2, 16, 97)],
            [matrix(2, 16, 98), matrix(2, 16, 99)],
            -1,
            dtype="U8",
            scales=[1.0, 0.375, 1.5, 0.5] * 2,
            rotation=(4, 13),
        ),
        "rotation-of-some": base().add(
            # the same matrix rotated by one seed, by another, and not; and of the other codec
            ternary("a.weight", matrix(1, 16, 100), -1, rotation=(16, 0)),
            ternary("b.weight", matrix(1, 16, 100), -1, rotation=(16, 1)),
            ternary("c.weight", matrix(1, 16, 100), -1),
            int8("d.weight", bytes_matrix(1, 16, 101), -1),
        ),
        "int4-group": int4("w.weight", halves_matrix(2, 12, 110), 4),
        "int4-odd-groups": int4("w.weight", halves_matrix(3, 17, 111), 5),
        "int4-every-code": int4("w.weight", [list(range(-8, 8)), list(range(7, -9, -1))], -1),
        "int4-row": int4("w.weight", [[-8, -1, 0, 1, 7], [0] * 5, [5, 4, 3, 2, 1]], -1),
        "int4-tensor": int4("w.weight", halves_matrix(2, 5, 112), 0),
        "int4-experts": int4("up_proj", [halves_matrix(2, 5, 113), halves_matrix(2, 5, 114)], 3),
        "int4-experts-tensor": int4("up_proj", [halves_matrix(2, 5, 115), [[0] * 5] * 2], 0),
        "int4-transposed": int4("w.weight", halves_matrix(3, 4, 116), 4, transposed=True),
        "int4-zero-rows": int4("w.weight", [], 3, cols=7),
        "rans-groups": coded(ternary("w.weight", matrix(9, 40, 200), 8)),
        "rans-chunks": coded(ternary("w.weight", matrix(9, 40, 201), 8), 2),
        "rans-short-last-group": coded(ternary("w.weight", matrix(5, 19, 202), 6)),
        "rans-rows": coded(ternary("w.weight", matrix(4, 33, 203), -1), 1),
        "rans-tensor": coded(ternary("w.weight", matrix(4, 13, 204), 0)),
        "rans-scales-apart": coded(ternary("w.weight", matrix(6, 24, 205), 8), scales=False),
        "rans-scales-f32": coded(ternary("w.weight", matrix(6, 24, 206), 8, dtype="F32")),
        "rans-scales-bf16": coded(ternary("w.weight", matrix(6, 24, 207), 8, dtype="BF16")),
        "rans-scales-u8": coded(
            ternary("w.weight", [[1, 0], [0, -1]], 1, dtype="U8", scales=[1.0, 0, 0, 0.5])
        ),
        "rans-experts": coded(ternary("up_proj", [matrix(3, 10, 208), matrix(3, 10, 209)], 5), 2),
        "rans-planes": coded(two_planes("w.weight", matrix(4, 12, 210), matrix(4, 12, 211), 6), 3),
        "rans-rotation": coded(ternary("w.weight", matrix(3, 8, 212), -1, rotation=(4, 1))),
        "rans-transposed": coded(ternary("w.weight", matrix(3, 8, 213), 4, transposed=True)),
        "rans-one-byte": coded(ternary("w.weight", [[0] * 15] * 70, 5)),
        "rans-zero-rows": coded(ternary("w.weight", [], 3, cols=7)),
        "rans-beside-others": base().add(coded(ternary("c.weight", matrix(2, 7, 214), 3))),
        "rans-worked-example": coded(ternary("w.weight", WORKED, 6), scales=False),
        "int4-worked-example": int4("w.weight", [[-7, 4, 0, -2, 1]], -1, scales=[-0.125]),
        "int4-negative-scales": int4(
            "w.weight", [[-8, 0, 7, 0, 0, 3]] * 2, 3, scales=[-1.0, 0.5, 2.0**-24, -65504.0]
        ),
        "int4-scales-f32": int4(
            # the products have up to 27 binary digits: they are rounded to 24
            "w.weight",
            halves_matrix(3, 6, 117),
            -1,
            dtype="F32",
            scales=[1 + 2.0**-23, -(2.0**-149), -(2 - 2.0**-23) * 2.0**100],
        ),
        "int4-beside-others": base().add(
            int8("c.weight", [[1, -2, 3]], -1), int4("d.weight", [[1, -2, 3]], -1)
        ),
        "kernel-3x3": ternary("conv.weight", matrix(3, 18, 300), 8, kernel=[2, 3, 3]),
        "kernel-1x1": ternary("conv.weight", matrix(2, 6, 301), -1, kernel=[6, 1, 1]),
        "kernel-of-one-dimension": ternary("conv.weight", matrix(2, 12, 302), 6, kernel=[4, 3]),
        "kernel-tensor": ternary("conv.weight", matrix(3, 12, 303), 0, kernel=[3, 2, 2]),
        "kernel-zero-rows": ternary("conv.weight", [], 3, cols=12, kernel=[3, 2, 2]),
        "kernel-scales-u8": ternary(
            "conv.weight", matrix(2, 8, 304), -1, dtype="U8", scales=[0.5, 0.875], kernel=[2, 2, 2]
        ),
        "kernel-planes": two_planes(
            "conv.weight", matrix(2, 8, 305), matrix(2, 8, 306), 4, kernel=[2, 2, 2]
        ),
        "kernel-rotation": ternary(
            "conv.weight", matrix(2, 16, 307), 8, kernel=[4, 2, 2], rotation=(16, 3)
        ),
        "kernel-beside-others": base().add(
            ternary("conv.weight", matrix(2, 8, 308), 8, kernel=[2, 2, 2])
        ),
        "rans-kernel": coded(ternary("conv.weight", matrix(9, 18, 309), 6, kernel=[2, 3, 3])),
        "kept": kept_tensors(),
        "no-tensors": Case(),
        "mixed": base(),
    }
    return cases


def expected_json(case: Case) -> bytes:
    """What a decoder must find: one member per line of the tensor."""
    lines = []
    for name, found in case.expected.items():
        members = ",\n".join(f"   {json.dumps(key)}: {compact(v)}" for key, v in found.items())
        lines.append(f"  {json.dumps(name)}: {{\n{members}\n  }}")
    body = ",\n".join(lines)
    return f'{{\n "tensors": {{\n{body}\n }}\n}}\n'.encode()


def valid_files() -> Files:
    """Every valid file with its .json."""
    cases = valid_cases()
    files = {name: Draft(case).file() for name, case in cases.items()}

    # wider types first and the header filled up, as general serializers do: all is aligned
    case = base().add(ternary("v.weight", matrix(2, 6, 30), 6))
    case.stored = [case.stored[at] for at in (2, 4, 1, 3, 0)]
    draft, cases["sorted-by-dtype"] = Draft(case), case
    header = draft.header()
    files["sorted-by-dtype"] = draft.file(header + " " * (-len(header) % 8))

    case = base()
    other = case.stored.pop(0)  # the packed tensor; its record and its scales stay
    del case.expected[other.name]
    draft, cases["scale-of-other-shard"] = Draft(case), case
    draft.records[other.name] = other.record
    files["scale-of-other-shard"] = draft.file()

    draft = Draft(base())
    draft.records["other.weight"] = {
        "shape": [8, 6],
        "group_size": 3,
        "codec": "base3",
        "sha256": "0" * 64,
    }
    draft.records["other.bias"] = {"sha256": "0" * 64}
    files["records-of-other-shards"] = draft.file()

    draft = Draft(base())
    files["header-padded"] = draft.file(draft.header() + " " * 7)

    draft = Draft(base())
    draft.entries = dict(reversed(draft.entries.items()))
    files["header-unordered"] = draft.file()

    draft = Draft(base())
    draft.document["features"] = ["int8", "planes", "scale8"]
    files["features-unused"] = draft.file()
    draft.document["features"] = ["rotation"]
    files["features-unused-rotation"] = draft.file()
    draft.document["features"] = ["int4"]
    files["features-unused-int4"] = draft.file()
    draft.document["features"] = ["kernel"]
    files["features-unused-kernel"] = draft.file()

    draft = Draft(ternary("w.weight", matrix(1, 4, 102), -1, rotation=(4, 0)))
    cases["unknown-members-rotation"] = Case(
        expected=ternary("w.weight", matrix(1, 4, 102), -1, rotation=(4, 0)).expected
    )
    draft.records["w.weight"]["rotation"]["note"] = "ignored"
    files["unknown-members-rotation"] = draft.file()

    draft = Draft(base())
    draft.document["sealed"] = True
    draft.document["sha256"] = sha256(compact(draft.document)[:-1].encode())
    files["metadata-digest"] = draft.file()

    draft = Draft(base())
    draft.entries["w.weight"]["note"] = "ignored"
    draft.records["w.weight"]["note"] = {"threshold": 0.5}
    draft.document["note"] = ["ignored"]
    files["unknown-members"] = draft.file()

    found: Files = {}
    for name, data in files.items():
        found[f"valid/{name}.safetensors"] = data
        found[f"valid/{name}.json"] = expected_json(cases.get(name, base()))
    return found


# Invalid


def invalid_structure() -> Files:
    """Files whose safetensors header or data section is broken."""
    files: Files = {}
    good = Draft(base())
    whole, header = good.file(), good.header()
    files["header-too-short-empty"] = b""
    files["header-too-short"] = whole[:7]
    files["header-length-past-end"] = struct.pack("<Q", len(whole) - 7) + whole[8:]
    files["header-length-above-limit"] = struct.pack("<Q", 100_000_001) + whole[8:]
    files["header-length-huge"] = struct.pack("<Q", 2**64 - 1) + whole[8:]
    files["header-not-json-empty"] = struct.pack("<Q", 0)
    files["header-not-json-syntax"] = good.file(header[:-1] + ",}")
    files["header-not-json-list"] = good.file("[]")
    files["header-not-json-utf8"] = good.file(header.encode().replace(b"norm.", b"norm\xff", 1))
    files["header-not-json-surrogate"] = good.file(header.replace(',"norm.', ',"\\ud800.', 1))
    files["header-not-json-nan"] = good.file(header[:-1] + ',"x":NaN}')
    files["header-not-json-start"] = good.file(" " + header)
    files["header-not-json-padding"] = good.file(header + "\n")

    entry = compact(good.entries["norm.weight"])
    again = f',"norm.weight":{entry}}}'
    files["duplicate-key-tensor"] = good.file(header[:-1] + again)
    files["duplicate-key-escaped"] = good.file(header[:-1] + again.replace("norm", "n\\u006frm"))
    files["duplicate-key-entry"] = good.file(header.replace('"dtype":', '"dtype":"U8","dtype":', 1))
    twice = '\\"format_version\\":1,'
    files["duplicate-key-metadata"] = good.file(header.replace(twice, twice * 2, 1))
    twice = '\\"group_size\\":6,'
    files["duplicate-key-record"] = good.file(header.replace(twice, twice * 2, 1))

    def entry_change(rule: str, key: str, value: Any, name: str = "norm.weight") -> None:
        draft = Draft(base())
        draft.entries[name][key] = value
        files[rule] = draft.file()

    begin, end = good.entries["norm.weight"]["data_offsets"]
    entry_change("entry-bad-shape-negative", "shape", [-1, -2])
    entry_change("entry-bad-shape-float", "shape", [2.0])
    entry_change("entry-bad-shape-bool", "shape", [2, True])
    entry_change("entry-bad-offsets-float", "data_offsets", [float(begin), float(end)])
    entry_change("entry-bad-offsets-three", "data_offsets", [begin, end, end])
    entry_change("entry-bad-dtype", "dtype", ["F32"])
    draft = Draft(base())
    del draft.entries["norm.weight"]["shape"]
    files["entry-bad-missing"] = draft.file()
    draft.entries["norm.weight"] = [2]
    files["entry-bad-list"] = draft.file()

    entry_change("dtype-unknown", "dtype", "Q4")
    entry_change("size-mismatch", "shape", [3])
    entry_change("size-mismatch-dtype", "dtype", "F16")
    wrapping = [4194305, 4194305, 211106198978564]  # 4 modulo 2^64: 4 bytes of U8
    draft = Draft(base().add(kept("x", "U8", [4], b"wrap")))
    draft.entries["x"]["shape"] = wrapping
    files["product-wrap"] = draft.file()
    draft = Draft(base().add(kept("x", "U8", [0], b"")))
    draft.entries["x"]["shape"] = [2**40, 2**40, 0]
    files["product-wrap-zero"] = draft.file()

    entry_change("offsets-reversed", "data_offsets", [end, begin])
    draft = Draft(base())
    draft.entries["norm.weight"]["data_offsets"] = [begin - 4, end - 4]
    del draft.data[-4:]
    files["offsets-overlap"] = draft.file()
    draft = Draft(base().add(kept("x", "U8", [8], bytes(8))))
    draft.entries["x"]["data_offsets"] = [begin, end]  # two names for the same bytes
    del draft.data[-8:]
    files["offsets-overlap-same"] = draft.file()

    for variant, at in (("start", 0), ("middle", begin)):
        draft = Draft(base())
        draft.data[at:at] = b"hole"
        for tensor in draft.entries.values():
            if tensor["data_offsets"][0] >= at:
                tensor["data_offsets"] = [offset + 4 for offset in tensor["data_offsets"]]
        files[f"offsets-hole-{variant}"] = draft.file()
    files["trailing-bytes"] = whole + b"\0"
    files["data-truncated"] = whole[:-1]
    files["data-truncated-all"] = whole[: -len(good.data)]
    return files


def invalid_records() -> Files:
    """Files whose metadata is broken."""
    files: Files = {}
    draft = Draft(base())
    files["metadata-missing"] = draft.file(compact(draft.entries))
    only = {"__metadata__": {"format": "pt"}, **draft.entries}
    files["metadata-missing-ternarize"] = draft.file(compact(only))
    files["metadata-not-strings"] = draft.file(
        compact({"__metadata__": {"format": "pt", "ternarize": draft.document}, **draft.entries})
    )
    files["metadata-not-strings-list"] = draft.file(compact({"__metadata__": [], **draft.entries}))
    for variant, text in (("", "{"), ("-list", "[]"), ("-nan", '{"format_version":NaN}')):
        metadata = {"format": "pt", "ternarize": text}
        header = compact({"__metadata__": metadata, **draft.entries})
        files[f"metadata-not-json{variant}"] = draft.file(header)

    def document_change(rule: str, key: str, value: Any) -> None:
        draft = Draft(base())
        draft.document[key] = value
        if value is None:
            del draft.document[key]
        files[rule] = draft.file()

    document_change("version-unknown-2", "format_version", 2)
    document_change("version-unknown-0", "format_version", 0)
    document_change("version-unknown-string", "format_version", "1")
    document_change("version-unknown-true", "format_version", True)
    document_change("version-unknown-float", "format_version", 1.0)
    document_change("version-unknown-missing", "format_version", None)
    document_change("feature-unknown", "features", ["a-feature-of-a-later-version"])
    text = compact(Draft(base()).document)[:-1]
    right = sha256(text.encode())
    for variant, sealed_text in (
        ("", f'{text},"sha256":"{"0" * 64}"}}'),
        ("-other", f'{text},"sha256":"{right}"}}'.replace('"group_size":6', '"group_size":5')),
        ("-number", f'{text},"sha256":1}}'),
        ("-upper-case", f'{text},"sha256":"{right.upper()}"}}'),
        ("-missing", f'{text},"sealed":true}}'),
        ("-not-last", f'{text},"sha256":"{right}","note":0}}'),
    ):
        metadata = {"format": "pt", "ternarize": sealed_text}
        header = compact({"__metadata__": metadata, **draft.entries})
        files[f"metadata-digest-wrong{variant}"] = draft.file(header)

    document_change("metadata-incomplete-features", "features", None)
    document_change("metadata-incomplete-features-string", "features", "")
    document_change("metadata-incomplete-tensors", "tensors", None)
    document_change("metadata-incomplete-tensors-list", "tensors", [])

    def record_change(rule: str, key: str, value: Any, name: str = "w.weight") -> None:
        draft = Draft(base())
        draft.records[name][key] = value
        if value is None:
            del draft.records[name][key]
        files[rule] = draft.file()

    draft = Draft(base())
    del draft.records["norm.weight"]
    files["tensor-without-record"] = draft.file()
    draft = Draft(base())
    del draft.records["w.weight"]
    del draft.entries["w.weight"]
    packed = 8  # bytes of w.weight, the first tensor
    del draft.data[:packed]
    for tensor in draft.entries.values():
        tensor["data_offsets"] = [offset - packed for offset in tensor["data_offsets"]]
    files["tensor-without-record-scale"] = draft.file()
    draft.records["w.weight"] = {"sha256": "0" * 64}  # a kept tensor of another shard
    files["tensor-without-record-kept"] = draft.file()
    draft = Draft(base())
    draft.records["norm.weight"] = draft.records["norm.weight"]["sha256"]
    files["record-bad"] = draft.file()

    record_change("record-unknown-codec", "codec", "base4")
    record_change("record-unknown-codec-missing", "codec", None)
    record_change("record-unknown-codec-kept", "group_size", 128, "norm.weight")
    record_change("record-shape-bad-missing", "shape", None)
    record_change("record-shape-bad-rank", "shape", [24])
    record_change("record-shape-bad-rank-4", "shape", [1, 1, 2, 12])
    record_change("record-shape-bad-negative", "shape", [-2, -12])
    record_change("record-shape-bad-float", "shape", [2.0, 12])
    record_change("record-shape-bad-bool", "shape", [True, 24])
    record_change("record-shape-bad-string", "shape", "212")
    for variant, cols in (("huge", 2**61), ("zero-cols", 0)):  # no rows, so no bytes either
        draft = Draft(ternary("w.weight", [], 5, cols=10))
        draft.records["w.weight"]["shape"] = [0, cols]
        draft.entries["w.weight"]["shape"] = [0, -(-cols // 5)]
        draft.entries["w.weight_scale"]["shape"] = [0, -(-cols // 5)]
        files[f"record-shape-bad-{variant}"] = draft.file()
    record_change("record-group-size-bad-missing", "group_size", None)
    record_change("record-group-size-bad-negative", "group_size", -2)
    record_change("record-group-size-bad-bool", "group_size", True)
    record_change("record-group-size-bad-float", "group_size", 6.0)
    record_change("record-group-size-bad-string", "group_size", "6")
    record_change("record-transposed-bad-number", "transposed", 1)
    record_change("record-transposed-bad-false", "transposed", False)
    record_change("record-sha256-bad-missing", "sha256", None)
    record_change("record-sha256-bad-kept", "sha256", None, "norm.weight")

    def planes_change(variant: str, value: Any, features: list[str]) -> None:
        draft = Draft(two_planes("w.weight", [trits_of("+0-")], [trits_of("0+-")], -1))
        draft.records["w.weight"]["planes"] = value
        draft.document["features"] = features
        files[f"record-planes-bad-{variant}"] = draft.file()

    planes_change("one", 1, ["planes"])
    planes_change("three", 3, ["planes"])
    planes_change("float", 2.0, ["planes"])
    planes_change("string", "2", ["planes"])
    planes_change("null", None, ["planes"])
    planes_change("unlisted", 2, ["int8", "scale8"])
    draft = Draft(int8("w.weight", [[1, -2, 3, 4]], -1))
    draft.document["features"] = ["int8", "planes"]
    draft.records["w.weight"]["planes"] = 2
    files["record-planes-bad-int8"] = draft.file()
    draft = Draft(int8("w.weight", [[1, -2, 3]], -1))
    draft.document["features"] = ["planes", "scale8"]
    files["record-unknown-codec-unlisted"] = draft.file()

    def rotation_change(variant: str, value: Any, cols: int = 16, **options: Any) -> None:
        draft = Draft(ternary("w.weight", matrix(1, cols, 110), -1, rotation=(4, 0)))
        draft.records["w.weight"]["rotation"] = value
        draft.document.update(options)
        files[f"record-rotation-bad-{variant}"] = draft.file()

    rotation_change("block", {"block": 8, "seed": 0})
    rotation_change("block-half", {"block": 2, "seed": 0})
    rotation_change("block-large", {"block": 4096, "seed": 0}, 4096)
    rotation_change("block-zero", {"block": 0, "seed": 0})
    rotation_change("block-float", {"block": 4.0, "seed": 0})
    rotation_change("block-string", {"block": "4", "seed": 0})
    rotation_change("block-missing", {"seed": 0})
    rotation_change("cols", {"block": 16, "seed": 0}, 24)
    rotation_change("cols-below", {"block": 64, "seed": 0}, 16)
    rotation_change("seed-negative", {"block": 4, "seed": -1})
    rotation_change("seed-large", {"block": 4, "seed": 2**32})
    rotation_change("seed-float", {"block": 4, "seed": 0.0})
    rotation_change("seed-bool", {"block": 4, "seed": False})
    rotation_change("seed-missing", {"block": 4})
    rotation_change("list", [4, 0])
    rotation_change("number", 4)
    rotation_change("null", None)
    rotation_change("unlisted", {"block": 4, "seed": 0}, features=["int8", "planes", "scale8"])
    draft = Draft(int8("w.weight", [[1, -2, 3, 4]], -1))
    draft.document["features"] = ["int8", "rotation"]
    draft.records["w.weight"]["rotation"] = {"block": 4, "seed": 0}
    files["record-rotation-bad-int8"] = draft.file()
    draft = Draft(ternary("w.weight", [matrix(8, 6, 111)], -1))  # 8 rows, but 6 columns
    draft.document["features"] = ["rotation"]
    draft.records["w.weight"]["rotation"] = {"block": 4, "seed": 0}
    files["record-rotation-bad-experts"] = draft.file()
    draft = Draft(base())
    draft.document["features"] = ["rotation"]
    draft.records["norm.weight"]["rotation"] = {"block": 4, "seed": 0}
    files["record-unknown-codec-rotation"] = draft.file()

    def kernel_change(variant: str, value: Any, **options: Any) -> None:
        draft = Draft(ternary("w.weight", matrix(1, 12, 310), -1, kernel=[3, 2, 2]))
        draft.records["w.weight"]["kernel"] = value
        draft.document.update(options)
        files[f"record-kernel-bad-{variant}"] = draft.file()

    kernel_change("product", [3, 2, 3])
    kernel_change("one-size", [12])
    kernel_change("four-sizes", [3, 2, 2, 1])
    kernel_change("empty", [])
    kernel_change("zero", [0, 2, 2])
    kernel_change("negative", [-3, -2, 2])
    kernel_change("float", [3.0, 2, 2])
    kernel_change("bool", [12, True, True])
    kernel_change("string", "3x2x2")
    kernel_change("number", 12)
    kernel_change("null", None)
    kernel_change("unlisted", [3, 2, 2], features=["int8", "planes", "scale8"])
    draft = Draft(ternary("w.weight", matrix(1, 12, 310), -1, transposed=True))
    draft.document["features"] = ["kernel"]
    draft.records["w.weight"]["kernel"] = [3, 2, 2]
    files["record-kernel-bad-transposed"] = draft.file()
    draft = Draft(int8("w.weight", [[1, -2, 3, 4]], -1))
    draft.document["features"] = ["int8", "kernel"]
    draft.records["w.weight"]["kernel"] = [1, 2, 2]
    files["record-kernel-bad-int8"] = draft.file()
    draft = Draft(ternary("w.weight", [matrix(8, 6, 111)], -1))
    draft.document["features"] = ["kernel"]
    draft.records["w.weight"]["kernel"] = [2, 3]
    files["record-kernel-bad-experts"] = draft.file()
    draft = Draft(base())
    draft.document["features"] = ["kernel"]
    draft.records["norm.weight"]["kernel"] = [2, 3]
    files["record-unknown-codec-kernel"] = draft.file()

    digest = Draft(base()).records["w.weight"]["sha256"]
    record_change("record-sha256-bad-short", "sha256", digest[:-1])
    record_change("record-sha256-bad-uppercase", "sha256", digest.upper())
    return files


def replaced(case: Case, name: str, **changes: Any) -> Case:
    """Change a stored tensor and take the digest of its matrix again."""
    for tensor in case.stored:
        if tensor.name == name:
            for key, value in changes.items():
                setattr(tensor, key, value)
    data = {tensor.name: tensor.data for tensor in case.stored}
    for tensor in case.stored:
        if tensor.record and f"{tensor.name}_scale" in data:
            tensor.record["sha256"] = sha256(tensor.data, data[f"{tensor.name}_scale"])
    return case


def invalid_tensors() -> Files:
    """Files whose packed or scale tensors are broken; the digests are those of the broken bytes."""
    files: Files = {}

    def change(rule: str, name: str, **changes: Any) -> None:
        files[rule] = Draft(replaced(base(), name, **changes)).file()

    change("packed-not-u8", "w.weight", dtype="I8")
    change("packed-width-wrong-wide", "w.weight", shape=[2, 5], data=bytes([121] * 10))
    change("packed-width-wrong-narrow", "w.weight", shape=[2, 3], data=bytes([121] * 6))
    change("rows-mismatch", "w.weight", shape=[3, 4], data=bytes([121] * 12))
    change("rows-mismatch-rank", "w.weight", shape=[8])
    change("rows-mismatch-experts", "w.weight", shape=[1, 2, 4])

    case = base()
    case.stored = [tensor for tensor in case.stored if tensor.name != "w.weight_scale"]
    files["scale-missing"] = Draft(case).file()
    case = base()
    scale = case.stored[1]
    scale.record = {"sha256": sha256(scale.data)}
    files["scale-with-record"] = Draft(case).file()

    change("scale-shape-wrong-flat", "w.weight_scale", shape=[4])
    change("scale-shape-wrong-swapped", "w.weight_scale", shape=[4, 1])
    ones = b"".join(store_float(1.0, "F16") for _ in range(6))
    change("scale-shape-wrong-groups", "w.weight_scale", shape=[2, 3], data=ones)
    case = ternary("w.weight", [trits_of("+0-")], 0)
    files["scale-shape-wrong-tensor"] = Draft(replaced(case, "w.weight_scale", shape=[1])).file()
    case = ternary("w.weight", [[trits_of("+0-")], [trits_of("-0-")]], 0)
    files["scale-shape-wrong-experts"] = Draft(
        replaced(case, "w.weight_scale", shape=[2, 1])
    ).file()

    floats = struct.pack("<4d", 1, 1, 1, 0)
    change("scale-dtype-wrong-f64", "w.weight_scale", dtype="F64", data=floats)
    change("scale-dtype-wrong-i16", "w.weight_scale", dtype="I16")
    change("scale-dtype-wrong-u8", "w.weight_scale", dtype="U8", data=bytes([1, 1, 1, 0]))

    row = [trits_of("+0-++0")]
    for dtype in ("F16", "BF16", "F32"):
        for rule, value in (("scale-nan", math.nan), ("scale-inf", math.inf)):
            draft = Draft(ternary("w.weight", row, -1, dtype=dtype, scales=[value]))
            files[f"{rule}-{dtype.lower()}"] = draft.file()
        draft = Draft(ternary("w.weight", row, -1, dtype=dtype, scales=[-1.0]))
        files[f"scale-negative-{dtype.lower()}"] = draft.file()
        draft = Draft(ternary("w.weight", [[0] * 6], -1, dtype=dtype, scales=[-0.0]))
        files[f"scale-negative-zero-{dtype.lower()}"] = draft.file()
    case = ternary("w.weight", row, -1, scales=[-math.inf])
    files["scale-inf-negative"] = Draft(case).file()

    rows = [trits_of("+0-++0 000000"), trits_of("000000 0000-0")]
    for rule, group_size, scales in (
        ("scale-zero-with-trits-first", 6, [0.0, 0.0, 0.0, 1.0]),
        ("scale-zero-with-trits-last", 6, [1.0, 0.0, 0.0, 0.0]),
        ("scale-zero-with-trits-row", -1, [1.0, 0.0]),
        ("scale-zero-with-trits-tensor", 0, [0.0]),
        ("scale-nonzero-without-trits", 6, [1.0, 0.0, 1.0, 1.0]),
    ):
        files[rule] = Draft(ternary("w.weight", rows, group_size, scales=scales)).file()
    case = ternary("w.weight", [[0] * 6] * 2, 0, scales=[1.0])
    files["scale-nonzero-without-trits-tensor"] = Draft(case).file()
    case = ternary("w.weight", [], 0, cols=6, scales=[1.0])
    files["scale-nonzero-without-trits-zero-rows"] = Draft(case).file()

    def spoil(at: int, value: int) -> Callable[[bytearray], None]:
        def change_packed(packed: bytearray) -> None:
            packed[at] = value

        return change_packed

    tens = matrix(2, 20, 31)  # groups of 10: whole bytes, so that only the code is wrong
    for variant, at, value in (
        ("first", 0, 243),
        ("middle", 5, 250),
        ("last", 7, 255),
        ("244", 3, 244),
    ):
        case = ternary("w.weight", tens, 10, change_packed=spoil(at, value))
        files[f"code-invalid-{variant}"] = Draft(case).file()

    # A group of 5 + n trits: the last digit of the byte of the tail is 2 where 1 is due; for n = 1
    # also the first padding digit, 0 where 1 is due, and a group that is not the last of its row.
    for tail in (1, 2, 3, 4):
        group = trits_of("+0-+-") + trits_of("-+0+")[:tail]
        code = pack_group(group)[1]
        case = ternary("w.weight", [group], -1, change_packed=spoil(1, code + 81))
        files[f"padding-nonzero-tail-{tail}"] = Draft(case).file()
    group = trits_of("+0-+- -")
    code = pack_group(group)[1]
    case = ternary("w.weight", [group], -1, change_packed=spoil(1, code - 3))
    files["padding-nonzero-low-digit"] = Draft(case).file()
    case = ternary("w.weight", [group + group], 6, change_packed=spoil(1, code + 81))
    files["padding-nonzero-inner-group"] = Draft(case).file()
    case = ternary("w.weight", [[0] * 6], -1, change_packed=spoil(1, 121 + 81))
    files["padding-nonzero-all-zero-group"] = Draft(case).file()

    rows = [trits_of("+0-"), trits_of("-0+")]
    zeros = [[0] * 3] * 2

    def put(rule: str, case: Case) -> None:
        files[rule] = Draft(case).file()

    for code in (1, 7, 248, 255):
        case = ternary("w.weight", rows, -1, dtype="U8", scales=[1.0, 1.0])
        put(f"scale-code-invalid-{code}", replaced(case, "w.weight_scale", data=bytes([120, code])))
    case = ternary("w.weight", rows, -1, dtype="U8", scales=[1.0, 0.0])
    put("scale-zero-with-trits-u8", case)
    case = ternary("w.weight", zeros, -1, dtype="U8", scales=[0.0, 1.0])
    put("scale-nonzero-without-trits-u8", case)

    one, two = trits_of("+0-+-+"), trits_of("-0+0+-")
    case = two_planes("w.weight", [one], [two], -1)
    half = case.stored[0].data[:2]
    put("packed-width-wrong-planes", replaced(case, "w.weight", shape=[1, 2], data=half))
    case = two_planes("w.weight", [one], [two], -1)
    data = store_float(1.0, "F16")
    put("scale-shape-wrong-planes", replaced(case, "w.weight_scale", shape=[1, 1], data=data))
    case = two_planes("w.weight", [one], [two], 0)
    put("scale-shape-wrong-planes-rows", replaced(case, "w.weight_scale", shape=[2, 1]))
    case = two_planes("w.weight", [one], [[0] * 6], -1, scales=[1.0, 1.0])
    put("scale-nonzero-without-trits-plane", case)
    case = two_planes("w.weight", [one], [two], 0, scales=[1.0, 0.0])
    put("scale-zero-with-trits-plane", case)
    five = trits_of("+0-+-")  # whole bytes, so that only the code is wrong
    case = two_planes("w.weight", [five], [five], -1, change_packed=spoil(1, 243))
    put("code-invalid-plane", case)
    code = pack_group(one)[1]
    case = two_planes("w.weight", [one], [two], -1, change_packed=spoil(1, code + 81))
    put("padding-nonzero-plane", case)

    bytes_ = [[1, -2, 127], [-127, 0, 5]]
    put("packed-not-i8", replaced(int8("w.weight", bytes_, -1), "w.weight", dtype="U8"))
    case = int8("w.weight", bytes_, -1)
    put("rows-mismatch-int8", replaced(case, "w.weight", shape=[6]))
    case = int8("w.weight", bytes_, -1)
    put("packed-width-wrong-int8", replaced(case, "w.weight", shape=[2, 2], data=b"\1\2\3\4"))
    put("weight-invalid-first", int8("w.weight", bytes_, -1, change_packed=spoil(0, 128)))
    put("weight-invalid-last", int8("w.weight", bytes_, -1, change_packed=spoil(5, 128)))
    put("scale-dtype-wrong-int8-bf16", int8("w.weight", bytes_, -1, dtype="BF16"))
    case = int8("w.weight", bytes_, -1, dtype="U8", scales=[1.0, 1.0])
    put("scale-dtype-wrong-int8-u8", case)
    put("scale-zero-with-trits-int8", int8("w.weight", bytes_, -1, scales=[0.0, 1.0]))
    put("scale-nonzero-without-trits-int8", int8("w.weight", zeros, 0, scales=[1.0]))
    put("scale-negative-int8", int8("w.weight", bytes_, 0, scales=[-1.0]))
    draft = Draft(int8("w.weight", bytes_, -1))
    draft.data[0] ^= 2
    files["digest-mismatch-int8"] = draft.file()

    files |= invalid_int4(spoil)
    files |= invalid_streams(spoil)

    # One bit: the bytes stay valid in every other respect.
    for variant, name, at in (
        ("packed", "w.weight", 0),
        ("scale", "w.weight_scale", 0),
        ("kept", "norm.weight", 0),
    ):
        draft = Draft(base())
        begin = draft.entries[name]["data_offsets"][0]
        draft.data[begin + at] ^= 1
        files[f"digest-mismatch-{variant}"] = draft.file()
    return files


def invalid_streams(spoil: Callable[[int, int], Callable[[bytearray], None]]) -> Files:
    """Files whose tensor is coded and breaks a rule."""
    files: Files = {}
    trits = matrix(3, 10, 220)  # of one class: all bytes hold five trits

    def case(**options: Any) -> Case:
        return coded(ternary("w.weight", trits, 5), 2, **options)

    def put(rule: str, change: Callable[[bytearray], None]) -> None:
        files[rule] = Draft(case(change=change)).file()

    def cut(left: int) -> Callable[[bytearray], None]:
        return lambda data: data.__delitem__(slice(left, None))

    def record(rule: str, **members: Any) -> None:
        draft = Draft(case())
        draft.records["w.weight"] |= members
        files[rule] = draft.file()

    record("record-coding-bad", coding="deflate")
    record("record-coding-bad-scales", scale_dtype="F64")
    draft = Draft(case())
    draft.document["features"] = []
    files["record-coding-bad-unlisted"] = draft.file()
    draft = Draft(int8("w.weight", [[1, 2, 3]], -1))
    draft.document["features"] = ["int8", "rans"]
    draft.records["w.weight"]["coding"] = "rans"
    files["record-coding-bad-int8"] = draft.file()
    record("record-coding-bad-long", shape=[1, 5 * 2**20 + 1], group_size=-1)

    tables = len(stream(rows_of(ternary("w.weight", trits, 5).stored[0]), [0, 0], 2))
    sizes = tables - sum(len(each) for each in parts_of(case()))
    files["stream-not-u8"] = Draft(replaced(case(), "w.weight", dtype="I8")).file()
    plain = case()
    shape = [1, plain.stored[0].shape[0]]
    files["stream-not-u8-shape"] = Draft(replaced(plain, "w.weight", shape=shape)).file()
    put("stream-short", cut(3))
    put("stream-short-table", cut(37))
    put("stream-short-sizes", cut(sizes - 3))
    empty = coded(ternary("w.weight", [], 5, cols=10))
    files["stream-short-rows"] = Draft(replaced(empty, "w.weight", shape=[1], data=b"\0")).file()
    put("stream-chunk-bad", lambda data: data.__setitem__(slice(0, 4), bytes(4)))
    put(
        "stream-chunk-bad-large",
        lambda data: data.__setitem__(slice(0, 4), (2**19 + 1).to_bytes(4, "little")),
    )
    files["stream-chunk-bad-other"] = Draft(coded(ternary("w.weight", trits, 5), 3)).file()
    put("stream-frequency-bad", spoil(36, 1))

    def no_frequency(data: bytearray) -> None:
        first, second = (int.from_bytes(data[at : at + 2], "little") for at in (36, 38))
        data[36:40] = bytes(2) + (first + second).to_bytes(2, "little")

    put("stream-frequency-bad-zero", no_frequency)
    put("stream-frequency-bad-none", lambda data: data.__setitem__(slice(4, 36), bytes(32)))
    put("stream-sizes-bad", spoil(sizes - 8, 0))
    put("stream-sizes-bad-long", lambda data: data.append(0))

    def moved(data: bytearray) -> None:
        first, second = (
            int.from_bytes(data[at : at + 4], "little") for at in (sizes - 8, sizes - 4)
        )
        lengths = (20).to_bytes(4, "little") + (first + second - 20).to_bytes(4, "little")
        data[sizes - 8 : sizes] = lengths

    def low(data: bytearray) -> None:
        data[sizes + 2 : sizes + 4] = bytes(2)

    def left(data: bytearray) -> None:
        last = int.from_bytes(data[sizes - 4 : sizes], "little") + 2
        data[sizes - 4 : sizes] = last.to_bytes(4, "little")
        data += b"\0\0"

    put("stream-damaged", lambda data: data.__setitem__(sizes, data[sizes] ^ 1))
    put("stream-damaged-size", moved)
    put("stream-damaged-low", low)
    put("stream-damaged-left", left)
    return files


def parts_of(case: Case) -> list[bytes]:
    """The chunks of a coded tensor with two rows in each of them, and three rows."""
    data = case.stored[0].data
    at = 4
    count = sum(bin(byte).count("1") for byte in data[at : at + 32])
    at += 32 + 2 * count
    first = int.from_bytes(data[at : at + 4], "little")
    return [data[at + 8 : at + 8 + first], data[at + 8 + first :]]


def invalid_int4(spoil: Callable[[int, int], Callable[[bytearray], None]]) -> Files:
    """Files whose tensor of codec int4 breaks a rule."""
    files: Files = {}
    halves = [[1, -2, 7], [-8, 0, 5]]  # rows of two bytes, the upper half of the second is filling
    zeros = [[0] * 3] * 2

    def put(rule: str, case: Case) -> None:
        files[rule] = Draft(case).file()

    def change(rule: str, group_size: int, **options: Any) -> None:
        put(rule, int4("w.weight", halves, group_size, **options))

    change("filling-nonzero-row", -1, change_packed=spoil(3, 0x9D))
    case = int4("w.weight", [[1, 2, 3, 4, 5, 6]], 3, change_packed=spoil(1, 0x0B))
    put("filling-nonzero-inner-group", case)
    case = int4("w.weight", [[1, 2, 3, 4, 5]], 4, change_packed=spoil(2, 0xFD))
    put("filling-nonzero-tail", case)
    put("filling-nonzero-zero-group", int4("w.weight", zeros, -1, change_packed=spoil(1, 0x78)))
    case = int4("w.weight", halves, -1)
    put("packed-not-u8-int4", replaced(case, "w.weight", dtype="I8"))
    case = int4("w.weight", halves, -1)
    put("rows-mismatch-int4", replaced(case, "w.weight", shape=[4]))
    case = int4("w.weight", halves, -1)
    put("packed-width-wrong-int4", replaced(case, "w.weight", shape=[2, 1], data=b"\x99\x99"))
    change("scale-dtype-wrong-int4-bf16", -1, dtype="BF16")
    change("scale-dtype-wrong-int4-u8", -1, dtype="U8", scales=[1.0, 1.0])
    change("scale-zero-with-trits-int4", -1, scales=[0.0, -1.0])
    put("scale-nonzero-without-trits-int4", int4("w.weight", zeros, 0, scales=[-1.0]))
    change("scale-negative-zero-int4", -1, scales=[-0.0, 1.0])
    put("scale-negative-zero-int4-unused", int4("w.weight", zeros, 0, scales=[-0.0]))
    change("scale-inf-int4", -1, scales=[1.0, -math.inf])
    change("scale-nan-int4", -1, scales=[1.0, math.nan])
    forms = {"planes": 2, "rotation": {"block": 4, "seed": 0}, "kernel": [2, 2]}
    for key, value in forms.items():
        case = int4("w.weight", [[1, 2, 3, 4]], -1)
        draft = Draft(case)
        draft.records["w.weight"][key] = value
        draft.document["features"] = sorted(["int4", key])
        files[f"record-{key}-bad-int4"] = draft.file()
    draft = Draft(int4("w.weight", halves, -1))
    draft.document["features"] = ["int8"]
    files["record-unknown-codec-int4-unlisted"] = draft.file()
    draft = Draft(int4("w.weight", halves, -1))
    draft.data[0] ^= 2
    files["digest-mismatch-int4"] = draft.file()
    return files


# Directories


def index_of(weight_map: dict[str, Any]) -> bytes:
    """An index file: which file holds which tensor."""
    document = {"metadata": {}, "weight_map": weight_map}
    return (json.dumps(document, indent=1) + "\n").encode("utf-8")


def shards_of(*cases: Case, own_records: bool = False) -> tuple[Files, dict[str, Any]]:
    """Return shards and weight_map; all records in each shard, or only those of its tensors."""
    drafts = [Draft(case) for case in cases]
    records = {name: record for draft in drafts for name, record in draft.records.items()}
    shards: Files = {}
    weight_map: dict[str, Any] = {}
    for number, draft in enumerate(drafts, 1):
        name = f"model-{number:05}-of-{len(drafts):05}.safetensors"
        if not own_records:
            draft.document["tensors"] = records
        shards[name] = draft.file()
        weight_map |= dict.fromkeys(draft.entries, name)
    return shards, weight_map


def two_parts() -> tuple[Case, Case]:
    """The tensors of two shards: w.weight, its scales, norm.weight; v.weight, its scales, bias."""
    second = Case().add(
        ternary("v.weight", matrix(2, 6, 40), 6), kept("bias", "F16", [1], b"\x00\x3c")
    )
    return base(), second


def directories() -> Files:
    """Checkpoint directories, valid and not."""
    files: Files = {}
    settings = {
        "quant_method": "ternarize",
        "format_version": 1,
        "group_size": 6,
        "method": "absmean",
        "activations": "none",
    }
    config = (json.dumps({"quantization_config": settings}, indent=1) + "\n").encode("utf-8")

    first, second = two_parts()
    shards, weight_map = shards_of(first, second)
    names = list(shards)

    def put(folder: str, content: Files) -> None:
        files.update({f"{folder}/{name}": data for name, data in content.items()})

    put(
        "valid-directories/single",
        {"config.json": config, "model.safetensors": Draft(first).file()},
    )
    files["valid-directories/single.json"] = expected_json(first)
    put("valid-directories/sharded", {"config.json": config, INDEX: index_of(weight_map)})
    put("valid-directories/sharded", shards)
    files["valid-directories/sharded.json"] = expected_json(Case().add(first, second))

    def put_invalid(rule: str, index: bytes, content: Files = shards) -> None:
        put(f"invalid-directories/{rule}", {INDEX: index, **content})

    put("invalid-directories/no-model", {"config.json": config})
    put_invalid("index-bad-syntax", index_of(weight_map)[:-3])
    put_invalid("index-bad-list", b"[]\n")
    put_invalid("index-bad-weight-map", index_of({}))
    text = compact({"weight_map": weight_map})[:-2]
    put_invalid("duplicate-key-index", f'{text},"bias":"{names[1]}"}}}}\n'.encode())
    for variant, target in (
        ("parent", f"../../valid-directories/sharded/{names[1]}"),
        ("backslash", f"..\\sharded\\{names[1]}"),
        ("absolute", f"/{names[1]}"),
        ("folder", f"./{names[1]}"),
        ("dots", ".."),
        ("number", 2),
    ):
        moved = {name: target if file == names[1] else file for name, file in weight_map.items()}
        put_invalid(f"index-path-bad-{variant}", index_of(moved), {names[0]: shards[names[0]]})
    only = {names[0]: shards[names[0]]}
    put_invalid("index-file-missing", index_of(weight_map), only)
    extra = {**weight_map, "absent.weight": names[1]}
    put_invalid("index-disagrees-absent", index_of(extra))
    less = {name: file for name, file in weight_map.items() if name != "bias"}
    put_invalid("index-disagrees-unlisted", index_of(less))
    swapped = {**weight_map, "bias": names[0]}
    put_invalid("index-disagrees-swapped", index_of(swapped))
    less = {name: file for name, file in weight_map.items() if file == names[0]}
    put_invalid("record-without-tensor-sharded", index_of(less), only)
    put("invalid-directories/record-without-tensor-single", {"model.safetensors": shards[names[0]]})
    return files


def parted_directories() -> Files:
    """Directories whose scales are in another shard than their packed tensor, valid and not."""
    files: Files = {}

    def put(folder: str, *cases: Case, own_records: bool = False) -> None:
        shards, weight_map = shards_of(*cases, own_records=own_records)
        content = {INDEX: index_of(weight_map), **shards}
        files.update({f"{folder}/{name}": data for name, data in content.items()})
        if folder.startswith("valid"):
            files[f"{folder}.json"] = expected_json(Case().add(*cases))

    first, second = two_parts()
    scales = first.stored.pop(1)  # of w.weight
    second.stored.insert(0, scales)
    put("valid-directories/scale-in-other-shard", first, second)
    put("valid-directories/scale-in-earlier-shard", second, first, own_records=True)
    eight = ternary("u.weight", [trits_of("+0-")], -1, dtype="U8", scales=[1.0])
    parted = Case([eight.stored[1]])  # its scales alone need no feature: the record's file has it
    eight.stored.pop(1)
    put("valid-directories/features-of-one-shard", eight, base().add(parted), own_records=True)
    scales.record = {"sha256": sha256(scales.data)}
    put("invalid-directories/scale-with-record-sharded", first, second)
    scales.record = None
    scales.data = bytes([scales.data[0] ^ 1]) + scales.data[1:]
    put("invalid-directories/digest-mismatch-sharded", first, second)
    second.stored.remove(scales)
    put("invalid-directories/scale-missing-sharded", first, second)

    first, second = two_parts()
    one = store_float(1.0, "F16")
    second.stored.append(Stored("norm.weight_scale", "F16", [1], one))  # norm.weight is kept
    put("invalid-directories/tensor-without-record-sharded", first, second)
    return files


def steps_vectors() -> Files:
    """The vectors of steps.md, and the packed file that some of its journals begin from.

    Its names are in another order by code points than in UTF-16.
    """
    zeros, large = trits_of("000"), 2.0**127
    matrices = [
        ternary("m.f16", [*matrix(2, 6, 1), zeros + trits_of("+-0")], 3),
        ternary("m.ends", [trits_of("+-+-")], 1, scales=[65504, 2.0**-14, 2.0**-20, 341 / 1024]),
        ternary("\uff5e.bf16", matrix(1, 7, 2), 4, dtype="BF16", scales=[1.5 * large, 2.0**-126]),
        ternary("\U0001d400.f32", matrix(2, 3, 3), -1, dtype="F32", scales=[1 + 2.0**-23, large]),
        ternary(
            "a.u8", matrix(3, 8, 4), 4, dtype="U8", scales=[1.0, 1.875, 2.0**-14, 61440, 3.5, 0.125]
        ),
        ternary("m.tensor", matrix(2, 5, 5), 0),
        ternary("m.zeros", [zeros, zeros], 0),
        ternary("m.stack", [matrix(2, 3, 6), [zeros, zeros], matrix(2, 3, 8)], 0),
        ternary("m.rotated", matrix(1, 4, 9), -1, rotation=(4, 1)),
    ]
    others = [
        two_planes("a.planes", matrix(1, 3, 10), matrix(1, 3, 11), -1),
        int8("a.int8", [[1, -2, 3]], -1),
        kept("norm", "F16", [1], store_float(1.0, "F16")),
    ]
    base = {}
    for case in matrices:
        (name, expected), *_ = case.expected.items()
        record = case.stored[0].record
        numbers = [struct.unpack(">f", bytes.fromhex(bits))[0] for bits in expected["scales"]]
        base[name] = {"record": record, "trits": expected["trits"], "scales": numbers}
        base[name]["dtype"] = expected["scale_dtype"]
    file = Draft(Case().add(others[0], *matrices[::-1], *others[1:])).file()
    return make_steps_vectors.build(base, file)


def patch_vectors() -> Files:
    """The vectors of patch.md: a checkpoint with every codec, and what their patches make of it."""

    def model(seed: int, **changed: Case) -> list[Case]:
        """Tensors of these seeds; those of `changed` (w_ and the codec) as they are there."""
        few = sequence(90, 1)
        few[seed % 90] = -few[seed % 90] or 1
        values = [(seed + 3 * n) % 8 / 4 + 1 for n in range(40)]
        cases = {
            "w_trits": ternary("w.trits", matrix(3, 12, seed), 5),
            "w_few": ternary("w.few", [few], -1),
            "w_planes": two_planes("w.planes", matrix(2, 6, seed + 1), matrix(2, 6, seed + 2), 4),
            "w_turned": ternary("w.turned", matrix(2, 8, seed + 3), 4, rotation=(4, 7)),
            "w_scale8": ternary("w.scale8", matrix(1, 7, seed + 4), 0, dtype="U8", scales=[0.5]),
            "w_stack": ternary("w.stack", [matrix(2, 4, seed + 5), matrix(2, 4, seed + 6)], 4),
            "w_int8": int8("w.int8", bytes_matrix(2, 5, seed), 3),
            "w_int4": int4("w.int4", halves_matrix(2, 5, seed), 4),
            "w_norm": kept("norm", "F16", [40], b"".join(store_float(v, "F16") for v in values)),
            "w_wide": kept("wide", "F32", [2], struct.pack("<2f", *values[:2])),
            "w_same": kept("same", "BF16", [2], b"\x80?\0@"),
        }
        return list({**cases, **changed}.values())

    settings = {"quant_method": "ternarize", "format_version": 1, "group_size": 5}
    settings |= {"method": "absmean", "activations": "none"}

    def directory(*shards: list[Case], **more: Any) -> Files:
        config = {"note": more.pop("note", ""), "quantization_config": settings}
        files = {"config.json": (json.dumps(config, indent=1) + "\n").encode()}
        files["tokenizer.json"] = b"{}\n"
        if len(shards) > 1:
            weights, weight_map = shards_of(*(Case().add(*cases) for cases in shards))
            files[INDEX] = index_of(weight_map)
        else:
            weights = {"model.safetensors": Draft(Case().add(*shards[0])).file()}
        return {**files, **weights, **{name: data.encode() for name, data in more.items()}}

    base = directory(model(1))
    one = model(1, w_few=model(2)[1])
    wide = ternary("w.trits", matrix(3, 12, 9), 5, dtype="F32")
    results = {
        "none": directory(model(1)),
        "few": directory(one),
        "all": directory(model(2), note="other"),
        "as-they-are": directory(model(1, w_trits=wide, w_int4=model(3)[7])),
        "shards": directory(one[4:], one[:4], **{"1_Pooling/config.json": "{}", "README.md": "a"}),
    }
    whole = {"as-they-are": ("w.trits", "w.trits_scale", "w.int4")}
    few = [[model(seed)[at] for at in (0, 6, 7, 8)] for seed in (1, 2)]
    small = [directory(few[0]), directory(few[1], note="other"), directory([wide, *few[0][1:]])]
    return make_patch_vectors.build(base, results, whole, small)


def build() -> Files:
    """Return every vector: path below vectors/ -> bytes."""
    invalid = invalid_structure() | invalid_records() | invalid_tensors()
    files = {"base3.json": codec_vectors(), "scale8.json": scale_vectors(), **valid_files()}
    files |= {f"invalid/{rule}.safetensors": data for rule, data in invalid.items()}
    files |= directories() | parted_directories()
    return files | steps_vectors() | patch_vectors()


def main(arguments: list[str] | None = None) -> int:
    """Write the vectors; 1 if one exists with other bytes, or a file is not one of them."""
    parser = argparse.ArgumentParser(description="Write the conformance vectors of the formats.")
    parser.add_argument("--output", type=Path, default=HERE / "vectors", help="folder to write to")
    parser.add_argument("--force", action="store_true", help="replace existing vectors")
    options = parser.parse_args(arguments)
    output: Path = options.output
    files = build()
    there = {p.relative_to(output).as_posix(): p for p in output.rglob("*") if p.is_file()}
    changed = [n for n, path in there.items() if n in files and path.read_bytes() != files[n]]
    stale = sorted(there.keys() - files.keys())
    for name in stale:
        print(f"{name}: not made by this script; remove it by hand", file=sys.stderr)
    for name in sorted(changed):
        print(f"{name}: exists with other bytes; --force replaces it", file=sys.stderr)
    if stale or (changed and not options.force):
        print("Nothing was written: files that people have stored rely on these.", file=sys.stderr)
        return 1
    for name, data in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
