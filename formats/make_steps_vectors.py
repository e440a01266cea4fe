"""The vectors of steps.md; make_vectors.py calls this, and writes them.

As there: the plainest possible reading of the document, in Python's integers, one value at a time,
that shares no code with reference_steps.py or the package.

    vectors/steps/generator.json       words, non-zeros of perturbations, trits of starts
    vectors/steps/choice.json          sets, signs and their bits
    vectors/steps/base.safetensors     the packed start of the journals that have one
    vectors/steps/valid/CASE.steps     with CASE.json: what a reader must find in it
    vectors/steps/invalid/RULE[-VARIANT].steps    breaks this one rule and no other
"""

import hashlib
import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Row = list[int]
WORD = 2**32
SEED = 0x0123456789ABCDEF
TRITS, SCALES = 1, 2


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def lines_of(rows: list[Any]) -> bytes:
    """A list in JSON, an element a line."""
    return b"[\n" + b",\n".join(compact(row) for row in rows) + b"\n]\n"


# The generator


def philox(c: Row, k: Row) -> Row:
    """Philox 4x32-10 in plain integers."""
    c0, c1, c2, c3 = c
    k0, k1 = k
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def word(seed: int, number: int, perturbation: int, purpose: int, cell: int) -> int:
    upper = purpose * 2**24 + cell // 2**34
    counter = [cell // 4 % WORD, perturbation, number, upper]
    return philox(counter, [seed % WORD, seed // WORD])[cell % 4]


def nonzeros(
    seed: int, number: int, perturbation: int, purpose: int, bits: int, first: int, stop: int
) -> list[Row]:
    """[position, sign] of a perturbation between two places."""
    found = []
    for cell in range(first // 2**bits, (stop - 1) // 2**bits + 1):
        value = word(seed, number, perturbation, purpose, cell)
        position = cell * 2**bits + value % 2**bits
        if first <= position < stop:
            found.append([position, -1 if value >= 2**31 else 1])
    return found


def start_trit(seed: int, zeros: int, at: int) -> int:
    value = word(seed, 0, 0, 0, at)
    return 0 if value % 2**31 < zeros else -1 if value >= 2**31 else 1


def generator_vectors() -> bytes:
    ones = WORD - 1
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    rows: list[Any] = []
    for counter, key in (([0] * 4, [0, 0]), ([ones] * 4, [ones, ones]), pi):
        three = {"counter": counter, "key": key, "words": philox(counter, key)}
        rows.append({name: [f"{n:08x}" for n in values] for name, values in three.items()})
    far = 2**34
    for number, perturbation, purpose, bits, first, stop in (
        (3, 7, TRITS, 10, 0, 6144),
        (3, 7, TRITS, 10, 5000, 5300),
        (3, 7, SCALES, 10, 0, 4096),
        (ones, 65534, TRITS, 0, 0, 9),
        (0, 0, TRITS, 0, far - 3, far + 3),
        (1, 2, SCALES, 5, 32 * far - 70, 32 * far + 70),
        (5, 1, TRITS, 30, 2**57, 2**57 + 2**32),
        (9, 9, TRITS, 0, 2**58 - 3, 2**58),
    ):
        found = nonzeros(SEED, number, perturbation, purpose, bits, first, stop)
        names = ("seed", "number", "perturbation", "purpose", "bits", "first", "stop")
        given = (f"{SEED:016x}", number, perturbation, purpose, bits, first, stop)
        rows.append(dict(zip(names, given, strict=True)) | {"nonzeros": found})
    for seed, zeros, first in ((SEED, 2**30, 0), (0, 0, 0), (2**64 - 1, 2**31, 3), (7, 9, far - 2)):
        trits = [start_trit(seed, zeros, at) for at in range(first, first + 20)]
        rows.append({"seed": f"{seed:016x}", "zeros": zeros, "first": first, "trits": trits})
    return lines_of(rows)


# The code of a choice


def bits_of(value: int, width: int) -> str:
    return f"{value:0{width}b}" if width else ""


def gamma(value: int) -> str:
    return "0" * (value.bit_length() - 1) + f"{value:b}"


def choice(k: int, chosen: Row, signs: Row) -> str:
    """The bits of a set and of its signs: the set's number is counted by binomials."""
    sets = math.comb(k, len(chosen))
    number = sum(math.comb(c, i + 1) for i, c in enumerate(chosen))
    return bits_of(number, (sets - 1).bit_length()) + "".join("01"[sign < 0] for sign in signs)


def filled(bits: str) -> bytes:
    """Bits as bytes, the first the highest, filled up with zeros."""
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def choice_vectors() -> bytes:
    rows = []
    for k, chosen, signs in (
        (1, [0], [-1]),
        (2, [0], [1]),
        (2, [1], [1]),
        (5, [1, 3], [1, -1]),
        (5, [0, 1, 2, 3, 4], [1, 1, -1, 1, -1]),
        *((4, list(pair), [1, 1]) for pair in itertools.combinations(range(4), 2)),
        (128, [3, 40, 41, 127], [-1, -1, 1, -1]),
        (1000, list(range(900, 1000, 7)), [1, -1, 1] * 5),
        (65535, [65534], [-1]),
        (65535, [0, 1, 65533], [1, 1, -1]),
    ):
        given = {"k": k, "chosen": chosen, "signs": signs}
        rows.append(given | {"bits": choice(k, chosen, signs)})
    return lines_of(rows)


# Journals


@dataclass
class Step:
    """A step; of a foreign one `seed` and `drawn` say what it is drawn with."""

    number: int
    chosen: Row
    signs: Row
    target: int = TRITS
    bits: int = 2
    amount: int = 1
    k: int = 8
    seed: int | None = None
    drawn: int = 0


def record(kind: int, payload: bytes) -> bytes:
    body = struct.pack("<IB", len(payload), kind) + payload
    return body + struct.pack("<I", zlib.crc32(body))


def step_payload(step: Step, number: int, **changed: Any) -> bytes:
    """The payload of type 1; `changed` fields spoil it."""
    names = ("number", "target", "bits", "amount", "k", "m")
    right = (number, step.target, step.bits, step.amount, step.k, len(step.chosen))
    fields = dict(zip(names, right, strict=True)) | changed
    return struct.pack("<IBBBHH", *fields.values()) + filled(
        choice(step.k, step.chosen, step.signs)
    )


def step_record(step: Step) -> bytes:
    if step.seed is None:
        return record(1, step_payload(step, step.number))
    head = struct.pack("<IQ", step.number, step.seed)
    return record(6, head + step_payload(step, step.drawn))


def block_bits(steps: list[Step]) -> str:
    bits = ""
    number, fields, cell = -1, (TRITS, 1, 128), 10
    for step in steps:
        bits += gamma(step.number - number)
        if (step.target, step.amount, step.k) == fields:
            bits += "0"
        else:
            fields = step.target, step.amount, step.k
            bits += "1" + bits_of(step.target, 8) + bits_of(step.amount, 8) + bits_of(step.k, 16)
        up = step.bits - cell
        bits += gamma(2 * up if up > 0 else 1 - 2 * up) + gamma(len(step.chosen))
        bits += choice(step.k, step.chosen, step.signs)
        number, cell = step.number, step.bits
    return bits


def block_record(steps: list[Step]) -> bytes:
    return record(5, struct.pack("<I", len(steps)) + filled(block_bits(steps)))


def edit_record(operation: int, first: int, last: int) -> bytes:
    return record(3, struct.pack("<BII", operation, first, last))


def note_record(text: bytes) -> bytes:
    return record(4, text)


def digest_record(number: int, digest: str) -> bytes:
    return record(2, struct.pack("<I", number) + bytes.fromhex(digest))


def header(table: dict[str, Any] | bytes) -> bytes:
    text = table if isinstance(table, bytes) else compact(table)
    head = b"TRNSTEPS" + struct.pack("<I", len(text)) + text
    return head + struct.pack("<I", zlib.crc32(head))


def model_of(given: list[tuple[str, Row, int]], exponents: Row, **changed: Any) -> dict[str, Any]:
    """The object of a model; `changed` members spoil it, those that are None go."""
    both = zip(given, exponents, strict=True)
    table = {
        "tensors": [
            {"name": n, "shape": s, "group_size": g, "exponent": e} for (n, s, g), e in both
        ],
        "constants": [
            {"name": "norm.weight", "shape": [8], "value": 1},
            {"name": "bias", "shape": [], "value": 0},
        ],
        "config": {"model_type": "x", "eps": 1e-06},
        "files": {"tokenizer.json": "0f" * 32, "a/b-1_.txt": "e3" * 32},
    }
    return {name: v for name, v in (table | changed).items() if v is not None}


def stored_stream(text: bytes) -> bytes:
    """A zlib stream of one stored block: the same bytes from any library."""
    assert len(text) < 2**16
    head = struct.pack("<BHH", 1, len(text), 2**16 - 1 - len(text))
    return b"\x78\x01" + head + text + struct.pack(">I", zlib.adler32(text))


def model_block(stream: bytes) -> bytes:
    head = struct.pack("<I", len(stream)) + stream
    return head + struct.pack("<I", zlib.crc32(head))


def model_header(
    model: dict[str, Any] | bytes, stream: Callable[[bytes], bytes] = stored_stream, **changed: Any
) -> bytes:
    """A header and a model, as a zlib stream; `changed` members spoil the header."""
    table = {"format_version": 1, "features": ["model"], "seed": f"{SEED:016x}"}
    table |= {"start": {"kind": "seed", "zeros": 2**30}} | changed
    text = model if isinstance(model, bytes) else compact(model)
    return header(table) + model_block(stream(text))


def table_of(tensors: list[tuple[str, Row, int]], zeros: int = 2**30) -> dict[str, Any]:
    return {
        "format_version": 1,
        "features": [],
        "seed": f"{SEED:016x}",
        "start": {"kind": "seed", "zeros": zeros},
        "tensors": [{"name": n, "shape": s, "group_size": g} for n, s, g in tensors],
    }


# The replay


@dataclass
class Values:
    """The flat values of all tensors, and of a packed start what its scales are.

    tensors  name, shape, group size
    scales   of a packed start: the type, and the numbers as they lie, by name
    """

    tensors: list[tuple[str, Row, int]]
    trits: Row
    scales: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    exponents: Row = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exponents = [0] * sum(len(self.groups(s, g)) for _, s, g in self.tensors)
        self.start = list(self.trits)

    @staticmethod
    def groups(shape: Row, size: int) -> list[Row]:
        """The places of each group within its tensor, in the order of the scales."""
        *stack, rows, cols = shape
        count = math.prod(shape)
        if size == 0:
            return [list(range(at, at + rows * cols)) for at in range(0, count, rows * cols)]
        length = cols if size < 0 else size
        found = []
        for row in range(0, count, cols):
            found += [
                list(range(row + at, row + min(at + length, cols))) for at in range(0, cols, length)
            ]
        return found

    def apply(self, step: Step) -> None:
        values, limit = (self.trits, 1) if step.target == TRITS else (self.exponents, 127)
        seed, number = (SEED, step.number) if step.seed is None else (step.seed, step.drawn)
        sums = [0] * len(values)
        for perturbation, way in zip(step.chosen, step.signs, strict=True):
            given = seed, number, perturbation, step.target, step.bits, 0, len(values)
            for position, sign in nonzeros(*given):
                sums[position] += way * sign
        for at, total in enumerate(sums):
            moved = values[at] + step.amount * ((total > 0) - (total < 0))
            values[at] = max(-limit, min(limit, moved))

    def parts(self) -> list[tuple[str, Row, int, Row, Row]]:
        """Name, shape, group size, trits and exponents of each tensor."""
        found, at, groups_at = [], 0, 0
        for name, shape, size in self.tensors:
            groups = self.groups(shape, size)
            count = math.prod(shape)
            trits = self.trits[at : at + count]
            if name in self.scales:
                for scale, places in zip(self.scales[name][1], groups, strict=True):
                    for place in places if scale == 0 else []:
                        trits[place] = self.start[at + place]
            moved = self.exponents[groups_at : groups_at + len(groups)]
            found.append((name, shape, size, trits, moved))
            at, groups_at = at + count, groups_at + len(groups)
        return found

    def digest(self) -> str:
        packed, exponents = b"", b""
        for _, shape, size, trits, moved in self.parts():
            packed += pack(trits, shape[-1], size)
            exponents += bytes(e % 256 for e in moved)
        return hashlib.sha256(packed + hashlib.sha256(exponents).digest()).hexdigest()


def pack(trits: Row, cols: int, size: int) -> bytes:
    """base3.md, group by group."""
    length = cols if size <= 0 else size
    found = bytearray()
    for row in range(0, len(trits), cols):
        for at in range(0, cols, length):
            group = trits[row + at : row + min(at + length, cols)]
            group = group + [0] * (-len(group) % 5)
            for five in range(0, len(group), 5):
                found.append(sum((group[five + i] + 1) * 3**i for i in range(5)))
    return bytes(found)


def power(exponent: int) -> Fraction:
    """2^(exponent / 32) as steps.md has it."""
    factor = Fraction(round(4096 * 2 ** (exponent % 32 / 32)), 4096)
    return factor * Fraction(2) ** (exponent // 32)


def new_scale(scale: float, exponent: int, dtype: str) -> bytes:
    """A stored scale that has moved, in exact fractions but for the roundings."""
    value = Fraction(scale)
    if exponent and scale:
        value *= power(exponent)
        value = nearest(value, 24, -149)  # float32
        low = Fraction(2) ** (-14 if dtype in ("F16", "U8") else -126)
        high = {"F16": Fraction(65504), "U8": Fraction(61440)}.get(
            dtype, (2 - Fraction(1, 128)) * Fraction(2) ** 127
        )
        value = max(low, min(high, value))
        digits, smallest = {"F16": (11, -24), "U8": (4, -17), "BF16": (8, -133), "F32": (24, -149)}[
            dtype
        ]
        value = nearest(value, digits, smallest)
    if dtype == "F16":
        return struct.pack("<e", value)
    if dtype == "U8":
        return bytes([struct.unpack("<H", struct.pack("<e", value))[0] >> 7])
    data = struct.pack("<f", value)
    return data if dtype == "F32" else data[2:]


def nearest(value: Fraction, digits: int, smallest: int) -> Fraction:
    """The nearest multiple of a power of two that leaves so many binary digits, ties to even."""
    last = smallest
    while value >= Fraction(2) ** (last + digits):
        last += 1
    unit = Fraction(2) ** last
    return round(value / unit) * unit  # Python rounds fractions to even


# What a reader must find


class Draft:
    """A journal that is put together, and what it says.

    start    the values that it begins with
    """

    def __init__(self, table: dict[str, Any] | bytes, values: Values) -> None:
        self.data = table if isinstance(table, bytes) else header(table)
        self.start = values
        self.steps: list[Step] = []
        self.edits: list[Row] = []
        self.digests: list[tuple[int, str]] = []
        self.notes = 0

    def step(self, *steps: Step, block: bool = False) -> "Draft":
        self.data += block_record(list(steps)) if block else b"".join(map(step_record, steps))
        self.steps += steps
        return self

    def edit(self, operation: int, first: int, last: int) -> "Draft":
        self.data += edit_record(operation, first, last)
        self.edits.append([operation, first, last])
        return self

    def digest(self, number: int) -> "Draft":
        self.digests.append((number, self.result().digest()))
        self.data += digest_record(*self.digests[-1])
        return self

    def note(self, content: Any) -> "Draft":
        self.data += note_record(compact(content))
        self.notes += 1
        return self

    def result(self) -> Values:
        """The values after the steps that the edits leave, as both stand now."""
        values = Values(self.start.tensors, list(self.start.trits), self.start.scales)
        for step in self.steps:
            latest = [o for o, first, last in self.edits if first <= step.number <= last][-1:]
            if latest == [0]:
                continue
            signs = [-sign for sign in step.signs] if latest == [1] else step.signs
            values.apply(Step(**{**vars(step), "signs": signs}))
        return values

    def expected(self, torn: int) -> bytes:
        steps = []
        for step in self.steps:
            said: dict[str, Any] = {"number": step.number, "target": step.target}
            said |= {"bits": step.bits, "amount": step.amount, "k": step.k}
            said |= {"chosen": step.chosen, "signs": step.signs}
            if step.seed is not None:
                said |= {"seed": f"{step.seed:016x}", "drawn": step.drawn}
            steps.append(said)
        table: dict[str, Any] = {"steps": steps, "edits": self.edits, "digests": self.digests}
        table |= {"notes": self.notes, "torn": torn, "tensors": []}
        result = self.result()
        for name, shape, size, trits, moved in result.parts():
            said = {"name": name, "shape": shape, "group_size": size}
            said |= {"trits": trits, "exponents": moved}
            if name in result.scales:
                dtype, scales = result.scales[name]
                scale_bytes = b""
                groups = Values.groups(shape, size)
                for scale, exponent, places in zip(scales, moved, groups, strict=True):
                    used = any(trits[place] for place in places)
                    scale_bytes += new_scale(scale if used else 0.0, exponent, dtype)
                said["scales"] = scale_bytes.hex()
                said["sha256"] = hashlib.sha256(
                    pack(trits, shape[-1], size) + scale_bytes
                ).hexdigest()
            table["tensors"].append(said)
        return compact(table) + b"\n"


SMALL: list[tuple[str, Row, int]] = [("w.weight", [2, 8], -1)]
SEVERAL: list[tuple[str, Row, int]] = [
    ("b.weight", [3, 7], 3),
    ("a.experts", [2, 2, 6], 0),
    ("naïve", [2, 5], 100),
]


def from_seed(tensors: list[tuple[str, Row, int]], zeros: int = 2**30, **more: Any) -> Draft:
    count = sum(math.prod(shape) for _, shape, _ in tensors)
    trits = [start_trit(SEED, zeros, at) for at in range(count)]
    return Draft(table_of(tensors, zeros) | more, Values(tensors, trits))


def worked_example() -> Draft:
    made = from_seed([("w.weight", [8, 16], -1)])
    made.step(Step(0, [1, 3], [1, -1], bits=4, k=5)).step(Step(2, [0], [1], bits=4, k=5))
    return made.digest(3).edit(0, 2, 2)


def everything() -> Draft:
    """Steps of every kind, on several tensors."""
    made = from_seed(SEVERAL).note({"loss": 1.5, "data": "é"})
    made.step(Step(0, [0, 2, 5], [1, 1, -1])).step(
        Step(3, [1, 6], [-1, -1], SCALES, 1, amount=100)
    ).digest(4)
    made.step(
        Step(4, [7], [1], bits=10, k=128),
        Step(6, [2, 3], [1, -1], bits=0, k=128),
        Step(7, [0, 1, 2], [1, 1, 1], SCALES, 0, amount=40, k=3),
        Step(300, [2], [1], SCALES, 0, amount=40, k=3),
        block=True,
    )
    made.step(Step(301, [4], [1], bits=0, seed=2**64 - 2, drawn=0)).note({})
    made.step(Step(302, [4], [1], SCALES, 1, amount=127, seed=SEED, drawn=4)).digest(500)
    made.edit(0, 0, 6).edit(1, 4, 7).edit(2, 0, 0).digest(500)
    return made.step(Step(500, [3], [-1], bits=3)).edit(0, 400, WORD - 1).digest(501)


def extremes() -> Draft:
    made = from_seed([("w", [1, 1], -1), ("v", [1, 3], 0)], zeros=0)
    made.step(Step(0, [65534], [1], bits=0, k=65535)).step(Step(1, [0], [-1], bits=30, k=1))
    made.step(Step(2, list(range(9)), [1, -1] * 4 + [1], SCALES, 0, 127, 9))
    made.step(Step(3, [0], [1], SCALES, 0, 127, 9), block=True)
    return made.step(Step(WORD - 1, [0], [1], bits=0, k=1))


def of_model(
    tensors: list[tuple[str, Row, int]],
    exponents: Row,
    stream: Callable[[bytes], bytes] = stored_stream,
    **changed: Any,
) -> Draft:
    """A journal of a model; its scales begin as those of a packed start with scales in F32."""
    count = sum(math.prod(shape) for _, shape, _ in tensors)
    trits = [start_trit(SEED, 2**30, at) for at in range(count)]
    begun = {}
    for (name, shape, size), exponent in zip(tensors, exponents, strict=True):
        begun[name] = ("F32", [float(power(exponent))] * len(Values.groups(shape, size)))
    data = model_header(model_of(tensors, exponents, **changed), stream)
    return Draft(data, Values(tensors, trits, begun))


def model() -> Draft:
    """Exponents of either sign, and steps of both targets."""
    made = of_model(SEVERAL, [-80, 0, 37]).digest(0).note({"loss": 7.5})
    made.step(Step(0, [0, 2, 5], [1, 1, -1]), Step(1, [1, 6], [-1, -1], SCALES, 1, amount=45))
    made.digest(2).step(Step(2, [0, 3], [1, -1], SCALES, 0, amount=31), Step(4, [1], [1]))
    return made.edit(1, 0, 0).digest(5)


def model_extremes() -> Draft:
    """Scales at both ends; no constants and files, an unknown member, a stream in pieces."""

    def in_pieces(text: bytes) -> bytes:
        at = len(text) // 2
        blocks = b""
        for last, piece in ((0, text[:at]), (1, text[at:])):
            blocks += struct.pack("<BHH", last, len(piece), 2**16 - 1 - len(piece)) + piece
        return b"\x78\xda" + blocks + struct.pack(">I", zlib.adler32(text))

    tensors: list[tuple[str, Row, int]] = [("w", [3, 4], 2), ("v", [1, 3], 0)]
    members: dict[str, Any] = {"constants": [], "files": {}, "tool": "x"}
    made = of_model(tensors, [1024, -1024], in_pieces, **members)
    made.step(Step(0, [0, 1], [1, 1], SCALES, 1, 127, 9)).step(Step(1, [3], [-1], SCALES, 0, 5, 9))
    return made.step(Step(2, list(range(9)), [-1] * 9, bits=0, k=9)).digest(3)


def valid_journals(base: dict[str, Any]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}

    def put(name: str, made: Draft, tail: bytes = b"") -> None:
        files[f"{name}.steps"] = made.data + tail
        files[f"{name}.json"] = made.expected(len(tail))

    put("worked-example", worked_example())
    put("everything", everything())
    put("extremes", extremes())
    put("no-records", from_seed(SMALL, 2**31))
    put("empty-block", from_seed(SMALL, 0).step(block=True).digest(0))
    put(
        "unknown-members", from_seed(SMALL, 9, tool="x", start={"kind": "seed", "zeros": 9, "z": 1})
    )
    table, values = packed_start(base)
    made = Draft(table, values).digest(0).step(Step(0, [0, 1, 2], [1, -1, 1], bits=1))
    made.step(Step(1, [0, 4], [1, 1], SCALES, 0, 21)).digest(2)
    put("packed", made.step(Step(2, [0], [-1], SCALES, 1, 127)).edit(1, 0, 0))
    put("model", model())
    put("model-extremes", model_extremes())

    def one() -> Draft:
        return from_seed(SMALL).step(Step(0, [1], [1]))

    whole = step_record(Step(1, [2], [1]))
    put("torn-one-byte", one(), whole[:1])
    put("torn-checksum", one(), whole[:-1])
    put("torn-changed", one(), whole[:-1] + bytes([whole[-1] ^ 1]))
    put("torn-length", one(), b"\xff\xff\xff\xff" + whole[4:])
    put("torn-zeros", one(), bytes(64))
    put("torn-unknown-behind", one(), whole[:-1] + record(7, b""))
    return files


def packed_start(base: dict[str, Any]) -> tuple[dict[str, Any], Values]:
    """The header's table and the values of the start that is base.safetensors.

    base  by the names of its moved tensors: record, trits, type and numbers of the scales
    """
    names = sorted(base)
    sha256 = hashlib.sha256()
    for name in names:
        sha256.update(name.encode() + b"\0" + base[name]["record"]["sha256"].encode())
    table = table_of([])
    table["start"] = {"kind": "packed", "sha256": sha256.hexdigest()}
    del table["tensors"]
    records = {name: base[name]["record"] for name in names}
    tensors = [(name, r["shape"], r["group_size"]) for name, r in records.items()]
    trits = [trit for name in names for trit in flat(base[name]["trits"])]
    scales = {name: (base[name]["dtype"], base[name]["scales"]) for name in names}
    return table, Values(tensors, trits, scales)


def flat(nested: Any) -> Row:
    return [n for part in nested for n in flat(part)] if isinstance(nested, list) else [nested]


# What a reader must refuse


def invalid_headers() -> dict[str, bytes]:
    table = table_of(SMALL)
    good = header(table)

    def but(**changed: Any) -> bytes:
        return header({name: v for name, v in (table | changed).items() if v is not None})

    def tensor(**changed: Any) -> bytes:
        members = {"name": "w", "shape": [2, 8], "group_size": -1} | changed
        return but(tensors=[{name: v for name, v in members.items() if v is not None}])

    files = {
        "magic-wrong": b"TRNSTEPT" + good[8:],
        "magic-wrong-empty": b"",
        "header-torn": good[:-1],
        "header-torn-length": good[:11],
        "header-torn-huge": good[:8] + struct.pack("<I", 2**24 + 1) + good[12:],
        "header-damaged": good[:-1] + bytes([good[-1] ^ 1]),
        "header-damaged-text": good.replace(b"w.weight", b"v.weight"),
        "header-not-json": header(compact(table)[:-1]),
        "header-not-json-list": header(b"[]"),
        "header-not-json-nan": header(compact(table)[:-1] + b',"x":NaN}'),
        "header-not-json-infinite": header(compact(table)[:-1] + b',"x":1e999}'),
        "header-not-json-utf8": header(b'{"\xff":1}'),
        "header-not-json-surrogate": header(compact(table)[:-1] + b',"x":"\\ud800"}'),
        "duplicate-key-header": header(compact(table)[:-1] + b',"seed":"%016x"}' % SEED),
        "version-unknown-2": but(format_version=2),
        "version-unknown-float": but(format_version=1.0),
        "version-unknown-missing": but(format_version=None),
        "version-unknown-true": but(format_version=True),
        "features-bad": but(features="x"),
        "features-bad-missing": but(features=None),
        "features-bad-number": but(features=[1]),
        "feature-unknown": but(features=["x"]),
        "seed-bad-short": but(seed="123456789abcdef"),
        "seed-bad-upper-case": but(seed=f"{SEED:016X}"),
        "seed-bad-number": but(seed=SEED % 2**31),
        "seed-bad-newline": but(seed=f"{SEED:016x}\n"),
        "start-bad": but(start={"kind": "other", "zeros": 0}),
        "start-bad-missing": but(start=None),
        "start-bad-string": but(start="seed"),
        "start-sha256-bad": but(start={"kind": "packed", "sha256": "0" * 63}),
        "start-sha256-bad-missing": but(start={"kind": "packed"}),
        "start-zeros-bad": but(start={"kind": "seed", "zeros": 2**31 + 1}),
        "start-zeros-bad-negative": but(start={"kind": "seed", "zeros": -1}),
        "start-zeros-bad-missing": but(start={"kind": "seed"}),
        "start-zeros-bad-true": but(start={"kind": "seed", "zeros": True}),
        "tensors-bad-missing": but(tensors=None),
        "tensors-bad-empty": but(tensors=[]),
        "tensors-bad-string": but(tensors=["w"]),
        "tensors-bad-name": tensor(name=1),
        "tensors-bad-shape-zero": tensor(shape=[0, 8]),
        "tensors-bad-shape-rank": tensor(shape=[8]),
        "tensors-bad-shape-rank-4": tensor(shape=[1, 1, 2, 8]),
        "tensors-bad-shape-float": tensor(shape=[2, 8.0]),
        "tensors-bad-shape-large": tensor(shape=[1, 2**31]),
        "tensors-bad-group-size": tensor(group_size=-2),
        "tensors-bad-group-size-true": tensor(group_size=True),
        "tensors-bad-group-size-missing": tensor(group_size=None),
        "tensor-twice": header(table_of(SMALL * 2)),
        "tensors-too-large": tensor(shape=[2**30, 2**28 + 1]),
    }
    return files


def invalid_models() -> dict[str, bytes]:
    names, ends = [("w", [2, 8], -1)], [0]
    least: dict[str, Any] = {"constants": [], "config": {}, "files": {}}
    text = compact(model_of(names, ends, **least))
    good = model_header(text)
    head = good.removesuffix(model_block(stored_stream(text)))

    def but(**changed: Any) -> bytes:
        return model_header(model_of(names, ends, **(least | changed)))

    def tensor(**changed: Any) -> bytes:
        members = {"name": "w", "shape": [2, 8], "group_size": -1, "exponent": 0} | changed
        return but(tensors=[{name: v for name, v in members.items() if v is not None}])

    def constant(**changed: Any) -> bytes:
        return but(constants=[{"name": "n", "shape": [8], "value": 1} | changed])

    def file(name: str, digest: Any = "0f" * 32) -> bytes:
        return but(files={name: digest})

    packed = {"kind": "packed", "sha256": "0" * 64}
    stream = stored_stream(text)
    return {
        "feature-unknown-beside-model": model_header(text, features=["model", "x"]),
        "start-bad-model": model_header(text, start=packed),
        "tensors-bad-model": but(tensors=[]),
        "tensor-twice-constant": constant(name="w"),
        "tensors-too-large-constants": constant(shape=[2**30, 2**28 + 1]),
        "model-torn": good[:-1],
        "model-torn-missing": head,
        "model-torn-huge": head + struct.pack("<I", 2**24 + 1) + good[len(head) + 4 :],
        "model-damaged": good[:-1] + bytes([good[-1] ^ 1]),
        "model-not-json": model_header(text[:-1]),
        "model-not-json-list": model_header(b"[]"),
        "model-not-json-nan": model_header(text[:-1] + b',"x":NaN}'),
        "model-not-json-infinite": model_header(text[:-1] + b',"x":1e999}'),
        "model-not-json-plain": head + model_block(text),
        "model-not-json-cut": head + model_block(stream[:-1]),
        "model-not-json-behind": head + model_block(stream + b"\0"),
        "duplicate-key-model": model_header(text[:-1] + b',"files":{}}'),
        "exponent-bad": tensor(exponent=-1025),
        "exponent-bad-float": tensor(exponent=1.0),
        "exponent-bad-missing": tensor(exponent=None),
        "constants-bad": but(constants={}),
        "constants-bad-missing": but(constants=None),
        "constants-bad-name": constant(name=1),
        "constants-bad-shape": constant(shape=[0]),
        "constants-bad-shape-rank": constant(shape=[1] * 5),
        "constants-bad-value": constant(value=2),
        "constants-bad-value-float": constant(value=1.0),
        "config-bad": but(config=[]),
        "config-bad-missing": but(config=None),
        "config-bad-code": but(config={"text_config": [{"auto_map": {}}]}),
        "files-bad": but(files=["x"]),
        "files-bad-missing": but(files=None),
        "files-bad-above": file("../tokenizer.json"),
        "files-bad-root": file("/tokenizer.json"),
        "files-bad-hidden": file("a/.b"),
        "files-bad-empty": file(""),
        "files-bad-config": file("config.json"),
        "files-bad-below": file("config.json/x"),
        "files-bad-case": file("Sha256Sums"),
        "files-bad-weights": file("model.safetensors"),
        "files-bad-digest": file("a", "0" * 63),
    }


def invalid_records() -> dict[str, bytes]:
    head = header(table_of(SMALL))
    step = Step(1, [1, 3], [1, -1], k=5)
    good = step_record(step)
    payload = step_payload(step, 1)
    beyond = bits_of(math.comb(5, 2), 4) + "00"  # one more than the last set has
    first = gamma(2) + "0" + gamma(1) + gamma(1)  # step 1 of a block, one chosen of 128
    chosen = bits_of(9, 7) + "0"

    def changed(**fields: int) -> bytes:
        return record(1, step_payload(step, 1, **fields))

    def moved(**fields: int) -> bytes:
        return record(1, step_payload(Step(1, [1, 3], [1, -1], SCALES, k=5), 1, **fields))

    def fields(target: int, amount: int, k: int) -> str:
        return gamma(2) + "1" + bits_of(target, 8) + bits_of(amount, 8) + bits_of(k, 16)

    def blocks(count: int, bits: str, more: bytes = b"") -> bytes:
        return record(5, struct.pack("<I", count) + filled(bits) + more)

    foreign = struct.pack("<IQ", 1, 5)
    spoiled = good[:-1] + bytes([good[-1] ^ 1])
    digest = "0" * 64
    after = step_record(Step(9, [0], [1]))
    records = {
        "record-damaged": spoiled + after,
        "record-damaged-length": b"\xff\xff" + good[2:] + after,
        "record-damaged-inside": good + spoiled + edit_record(0, 0, 0),
        "type-unknown-0": record(0, b""),
        "type-unknown-7": record(7, payload),
        "type-unknown-255": record(255, b""),
        "payload-short-step": record(1, payload[:10]),
        "payload-short-choice": record(1, payload[:11]),
        "payload-short-empty": record(1, b""),
        "payload-short-digest": record(2, bytes(35)),
        "payload-short-edit": record(3, bytes(8)),
        "payload-short-block": record(5, bytes(3)),
        "payload-short-block-bits": blocks(2, first + chosen),
        "payload-short-block-count": record(5, struct.pack("<I", 1000)),
        "steps-too-many": record(5, struct.pack("<I", 2**20 + 1)),
        "payload-short-foreign": record(6, foreign),
        "payload-short-foreign-head": record(6, foreign[:11]),
        "payload-long-step": record(1, payload + b"\0"),
        "payload-long-digest": record(2, bytes(37)),
        "payload-long-edit": record(3, bytes(10)),
        "payload-long-block": blocks(1, first + chosen, b"\0"),
        "payload-long-foreign": record(6, foreign + payload + b"\0"),
        "filling-nonzero": record(1, payload[:-1] + bytes([payload[-1] | 1])),
        "filling-nonzero-block": blocks(1, first + chosen + "01"),
        "target-unknown-0": changed(target=0),
        "target-unknown-3": changed(target=3),
        "target-unknown-block": blocks(1, fields(3, 1, 128) + gamma(1) + gamma(1) + chosen),
        "cell-bad": changed(bits=31),
        "cell-bad-block": blocks(1, gamma(2) + "0" + gamma(42) + gamma(1) + chosen),
        "cell-bad-block-negative": blocks(1, gamma(2) + "0" + gamma(23) + gamma(1) + chosen),
        "amount-bad-0": changed(amount=0),
        "amount-bad-2": changed(amount=2),
        "amount-bad-scales": moved(amount=128),
        "count-bad-0": record(1, step_payload(Step(1, [], [], k=5), 1)),
        "count-bad-above": changed(k=1),
        "count-bad-k": changed(k=0, m=0),
        "count-bad-block": blocks(1, gamma(2) + "0" + gamma(1) + gamma(129) + chosen),
        "choice-too-large": record(1, payload[:11] + filled(beyond)),
        "choice-too-large-block": blocks(1, fields(1, 1, 5) + gamma(1) + gamma(1) + "101" + "0"),
        "gamma-too-long": blocks(1, "0" * 33 + "1" * 60),
        "number-too-large": blocks(1, gamma(WORD + 1) + first[len(gamma(2)) :] + chosen),
        "number-not-rising": step_record(Step(2, [0], [1])) + good,
        "number-not-rising-same": good + good,
        "number-not-rising-foreign": good + step_record(Step(1, [0], [1], seed=1, drawn=7)),
        "number-not-rising-block": good + blocks(1, first + chosen),
        "number-not-rising-digest": digest_record(5, digest) + good,
        "digest-too-early": good + digest_record(1, digest),
        "digest-too-early-second": digest_record(5, digest) + digest_record(4, digest),
        "edit-unknown": edit_record(3, 0, 0),
        "edit-reversed": edit_record(0, 2, 1),
        "note-not-json": note_record(b"{"),
        "note-not-json-list": note_record(b"[1]"),
        "note-not-json-utf8": note_record(b'{"x":"\xff"}'),
        "note-not-json-nan": note_record(b'{"x":NaN}'),
        "duplicate-key-note": note_record(b'{"x":1,"x":1}'),
        "digest-mismatch": good + digest_record(2, digest),
    }
    return {name: head + data for name, data in records.items()}


def build(base: dict[str, Any], base_file: bytes) -> dict[str, bytes]:
    """Every vector of steps.md: path below vectors/ -> bytes.

    base, base_file  of `packed_start`, and the file that holds it and more
    """
    table, values = packed_start(base)
    wrong = header(table | {"start": {"kind": "packed", "sha256": "0" * 64}})
    mismatch = Draft(table, values).data + digest_record(0, "0" * 64)
    files = {"base-mismatch": wrong, "digest-mismatch-packed": mismatch}
    files |= invalid_headers() | invalid_models() | invalid_records()
    made = {f"invalid/{name}.steps": data for name, data in files.items()}
    made |= {f"valid/{name}": data for name, data in valid_journals(base).items()}
    made["generator.json"], made["choice.json"] = generator_vectors(), choice_vectors()
    made["base.safetensors"] = base_file
    return {f"steps/{name}": data for name, data in made.items()}
