"""Independent reader of journals of steps, written to be read beside steps.md.

    python formats/reference_steps.py [--base CHECKPOINT] JOURNAL...

replays each journal, compares its digests, and prints one line per tensor (name, logical shape,
group size, sparsity, SHA-256 of the trits and of the exponents as int8, row-major, of a packed
start and of a model also that of its new record, and `ok`). A line before them says how many steps
there are and how many bytes were torn off. It exits with 1 if a journal breaks a rule. Needs Python
3.10, numpy and reference.py beside it, nothing of the package whose files it reads.

The file is laid out as the document is: the generator, the file, the model, the code of a choice,
the records, the start, the replay, the scales. Each refusal starts with the name of the rule it
enforces.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import reference
from numpy.typing import NDArray
from reference import Invalid, parse_object, require

MAGIC = b"TRNSTEPS"
LONGEST = 2**24  # of a header, of a payload
SEARCHED = 2**28  # bytes of possible records behind one that is not whole
FEATURES = {"model"}
START, TRITS, SCALES = 0, 1, 2  # purposes of words; a step has one of the last two as its target
LIMITS = {TRITS: 1, SCALES: 127}
MOST_AMOUNT = {TRITS: 1, SCALES: 127}
MOST_VALUES = 2**58  # of a start
MOST_EXPONENT = 1024  # of a model
MOST_STEPS = 2**20
MOST_HERE = 2**28  # values that this program replays
FACTORS = [
    *(4096, 4186, 4277, 4371, 4467, 4565, 4664, 4767, 4871, 4978, 5087, 5198, 5312, 5428),
    *(5547, 5668, 5793, 5919, 6049, 6182, 6317, 6455, 6597, 6741, 6889, 7039, 7194, 7351),
    *(7512, 7677, 7845, 8016),
]
Int8 = NDArray[np.int8]


@dataclass(frozen=True)
class Step:
    """A step: `chosen` of its `k` perturbations, each along (1) or against (-1) its direction.

    place         its number in the journal
    seed, number  what its perturbations are drawn with
    """

    place: int
    target: int
    bits: int
    amount: int
    k: int
    chosen: tuple[int, ...]
    signs: tuple[int, ...]
    seed: int
    number: int


@dataclass(frozen=True)
class Edit:
    """Operation 0 leaves steps out, 1 turns them, 2 takes them as they are; `last` is included."""

    operation: int
    first: int
    last: int


@dataclass(frozen=True)
class Digest:
    """What the steps below a number make of the start, as the edits before have left them."""

    number: int
    sha256: str


@dataclass(frozen=True)
class Note:
    """A JSON object that no replay looks at."""

    content: dict[str, Any]


Entry = Step | Edit | Digest | Note
Tensor = tuple[str, tuple[int, ...], int]  # name, logical shape, group size


Constant = tuple[str, tuple[int, ...], int]  # name, shape, 0 or 1


@dataclass(frozen=True)
class Model:
    """What the tensors of a start from the seed are a model with.

    exponents  where the scales of each tensor begin
    constants  tensors that no step moves
    config     what config.json holds
    files      of those beside the weights: name -> SHA-256
    """

    exponents: tuple[int, ...]
    constants: tuple[Constant, ...]
    config: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Journal:
    """A journal that keeps the rules of the file.

    zeros, tensors   of a start from the seed
    model            of one with the feature `model`; None otherwise
    base             of a packed start: its digest; None otherwise
    size, torn       bytes up to the end of the last whole record, and behind it
    """

    seed: int
    zeros: int
    tensors: tuple[Tensor, ...]
    model: Model | None
    base: str | None
    entries: tuple[Entry, ...]
    size: int
    torn: int

    def steps(self) -> list[Step]:
        """All steps, edits apart."""
        return [entry for entry in self.entries if isinstance(entry, Step)]

    def effective(self) -> list[Step]:
        """The steps that are left after the edits, with the signs that they have then."""
        found = []
        for step in self.steps():
            operation = 2
            for edit in self.entries:
                if isinstance(edit, Edit) and edit.first <= step.place <= edit.last:
                    operation = edit.operation
            if operation == 1:
                step = replace(step, signs=tuple(-sign for sign in step.signs))
            if operation != 0:
                found.append(step)
        return found


# The generator


def philox(counter: Sequence[NDArray[np.uint64]], seed: int) -> list[NDArray[np.uint64]]:
    """Philox 4x32-10: four words of 32 bits for each counter, all held in 64 bits."""
    word = np.uint64(2**32 - 1)
    half = np.uint64(32)
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0 = np.uint64((seed + turn * 0x9E3779B9) % 2**32)
        k1 = np.uint64(((seed >> 32) + turn * 0xBB67AE85) % 2**32)
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = p1 >> half ^ c1 ^ k0, p1 & word, p0 >> half ^ c3 ^ k1, p0 & word
    return [c0, c1, c2, c3]


def words(
    seed: int, number: int, perturbation: int, purpose: int, first: int, stop: int
) -> NDArray[np.int64]:
    """The words of the cells first to stop - 1."""
    cells = np.arange(first, stop, dtype=np.uint64)
    counter = [
        cells >> np.uint64(2) & np.uint64(2**32 - 1),
        np.full_like(cells, perturbation),
        np.full_like(cells, number),
        np.uint64(purpose * 2**24) + (cells >> np.uint64(34)),
    ]
    four = np.stack(philox(counter, seed))
    found: NDArray[np.int64] = four[cells & np.uint64(3), np.arange(len(cells))].astype(np.int64)
    return found


def nonzeros(
    step: Step, perturbation: int, first: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The positions of a perturbation in the range first to stop - 1, less first, and its signs."""
    size = 2**step.bits
    low, high = first // size, -(-stop // size)
    word = words(step.seed, step.number, perturbation, step.target, low, high)
    position = np.arange(low, high, dtype=np.int64) * size + word % size
    inside = (position >= first) & (position < stop)
    return position[inside] - first, np.where(word[inside] >> 31, -1, 1)


def start_trits(seed: int, zeros: int, first: int, stop: int) -> Int8:
    """The trits first to stop - 1 of a start from the seed."""
    word = words(seed, 0, 0, START, first, stop)
    signs = np.where(word >> 31, -1, 1)
    return np.where(word % 2**31 < zeros, 0, signs).astype(np.int8)


# The file


def read_journal(data: bytes) -> Journal:
    """Parse a journal.  Raises Invalid."""
    seed, zeros, tensors, base, at = read_header(data)
    model = None
    if not tensors and base is None:
        tensors, model, at = read_model(data, at)
    entries: list[Entry] = []
    steps = 0
    number = -1  # of the last step; no step up to it, and no digest up to it, can follow
    while at < len(data):
        end = end_of_record(data, at)
        if end is None:
            damaged = record_behind(data, at)
            require(not damaged, "record-damaged", f"at byte {at}, before another record")
            break
        kind, payload = data[at + 4], data[at + 5 : end - 4]
        steps += steps_in(kind, payload)
        require(steps <= MOST_STEPS, "steps-too-many", f"{steps}; 2^20 at most")
        for entry in read_record(kind, payload, seed):
            if isinstance(entry, Step):
                rises = entry.place > number
                require(rises, "number-not-rising", f"step {entry.place} after {number}")
                number = entry.place
            if isinstance(entry, Digest):
                late = entry.number > number
                require(late, "digest-too-early", f"below {entry.number} after {number}")
                number = entry.number - 1
            entries.append(entry)
        at = end
    return Journal(seed, zeros, tensors, model, base, tuple(entries), at, len(data) - at)


def end_of_record(data: bytes, at: int) -> int | None:
    """The end of the record that begins at a byte, None if it is not whole."""
    length = int.from_bytes(data[at : at + 4], "little")
    end = at + 9 + length
    if len(data) < at + 9 or length > LONGEST or end > len(data):
        return None
    said = int.from_bytes(data[end - 4 : end], "little")
    return end if zlib.crc32(data[at : end - 4]) == said else None


def record_behind(data: bytes, at: int) -> bool:
    """Whether a whole record of a known type begins behind `at`, or too much looks like one."""
    searched = 0
    for place in range(at + 1, len(data) - 8):
        if not 1 <= data[place + 4] <= 6:
            continue
        length = int.from_bytes(data[place : place + 4], "little")
        if length <= LONGEST and place + 9 + length <= len(data):
            searched += 9 + length
            if searched > SEARCHED or end_of_record(data, place) is not None:
                return True
    return False


def read_header(data: bytes) -> tuple[int, int, tuple[Tensor, ...], str | None, int]:
    """Return the seed, the zeros, the tensors, the digest of the base, and the header's end.

    There are neither tensors nor a base where a model stands behind it.
    """
    require(data[:8] == MAGIC, "magic-wrong", f"begins with {data[:8]!r}")
    length = int.from_bytes(data[8:12], "little")
    end = 12 + length
    there = len(data) >= 12 and length <= LONGEST and end + 4 <= len(data)
    require(there, "header-torn", f"a header of {length} bytes in a file of {len(data)}")
    same = zlib.crc32(data[:end]) == int.from_bytes(data[end : end + 4], "little")
    require(same, "header-damaged", "its checksum is another")
    table = parse_object(data[12:end], "header-not-json", "header")
    version = table.get("format_version")
    known = type(version) is int and version == 1
    require(known, "version-unknown", f"format_version is {version!r}; this reader knows 1")
    features = table.get("features")
    listed = isinstance(features, list) and all(isinstance(name, str) for name in features)
    require(listed, "features-bad", "`features` is not a list of strings")
    unknown = sorted(set(features or []) - FEATURES)
    require(not unknown, "feature-unknown", f"needs {unknown}")
    seed = table.get("seed")
    good = is_hex(seed, 16)
    require(good, "seed-bad", f"seed is {seed!r}; 16 digits 0-9a-f expected")
    start = table.get("start")
    good = isinstance(start, dict) and start.get("kind") in ("seed", "packed")
    require(good, "start-bad", f"start is {start!r}")
    found: dict[str, Any] = dict(start or {})
    with_model = "model" in (features or [])
    good = not with_model or found["kind"] == "seed"
    require(good, "start-bad", "a model begins from a seed")
    if found["kind"] == "packed":
        good = is_hex(found.get("sha256"), 64)
        require(good, "start-sha256-bad", f"sha256 is {found.get('sha256')!r}")
        return int(str(seed), 16), 0, (), str(found["sha256"]), end + 4
    zeros = found.get("zeros")
    good = type(zeros) is int and 0 <= zeros <= 2**31
    require(good, "start-zeros-bad", f"zeros is {zeros!r}")
    tensors = () if with_model else read_tensors(table)
    return int(str(seed), 16), int(found["zeros"]), tensors, None, end + 4


def is_hex(value: object, digits: int) -> bool:
    """True for a string of so many digits, letters in lower case."""
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def read_tensors(table: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a start from the seed."""
    tensors = table.get("tensors")
    require(isinstance(tensors, list) and bool(tensors), "tensors-bad", "no list of tensors")
    found: list[Tensor] = []
    for tensor in tensors or []:
        good = isinstance(tensor, dict) and isinstance(tensor.get("name"), str)
        require(good, "tensors-bad", f"{tensor!r} has no name")
        shape, size = tensor.get("shape"), tensor.get("group_size")
        require(is_shape(shape, 2, 3), "tensors-bad", f"{tensor['name']}: shape is {shape!r}")
        good = type(size) is int and -1 <= size < 2**31
        require(good, "tensors-bad", f"{tensor['name']}: group_size is {size!r}")
        found.append((tensor["name"], tuple(shape), size))
    names = [name for name, _, _ in found]
    require(len(set(names)) == len(names), "tensor-twice", f"in {names}")
    total = sum(math.prod(shape) for _, shape, _ in found)
    require(total <= MOST_VALUES, "tensors-too-large", f"{total} trits; 2^58 at most")
    return tuple(found)


def is_shape(value: object, least: int, most: int) -> bool:
    """True for a list of so many sizes."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        return False
    return all(type(n) is int and 1 <= n < 2**31 for n in value)


# The model


def read_model(data: bytes, at: int) -> tuple[tuple[Tensor, ...], Model, int]:
    """Return the tensors of a model, the rest of it, and where it ends."""
    length = int.from_bytes(data[at : at + 4], "little")
    end = at + 4 + length
    there = len(data) >= at + 4 and length <= LONGEST and end + 4 <= len(data)
    require(there, "model-torn", f"a model of {length} bytes in a file of {len(data)}")
    same = zlib.crc32(data[at:end]) == int.from_bytes(data[end : end + 4], "little")
    require(same, "model-damaged", "its checksum is another")
    table = parse_object(inflate(data[at + 4 : end]), "model-not-json", "model")
    tensors = read_tensors(table)
    exponents = tuple(tensor.get("exponent") for tensor in table["tensors"])
    good = all(type(e) is int and -MOST_EXPONENT <= e <= MOST_EXPONENT for e in exponents)
    require(good, "exponent-bad", f"exponents are {exponents}")
    constants = read_constants(table)
    names = [name for name, _, _ in (*tensors, *constants)]
    require(len(set(names)) == len(names), "tensor-twice", f"in {names}")
    config, files = table.get("config"), table.get("files")
    require(isinstance(config, dict), "config-bad", f"config is {config!r}")
    require(not names_code(config), "config-bad", "it names code")
    require(isinstance(files, dict), "files-bad", f"files is {files!r}")
    for name, digest in dict(files or {}).items():
        require(is_beside(name) and is_hex(digest, 64), "files-bad", f"{name!r}: {digest!r}")
    return tensors, Model(exponents, constants, dict(config or {}), dict(files or {})), end + 4


def inflate(stream: bytes) -> bytes:
    """What a zlib stream of at most 2^24 bytes holds."""
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(stream, LONGEST + 1)
    except zlib.error as error:
        raise Invalid(f"model-not-json {error}") from None
    whole = reader.eof and not reader.unused_data and len(text) <= LONGEST
    require(whole, "model-not-json", "not one whole zlib stream of at most 2^24 bytes")
    return text


def read_constants(table: dict[str, Any]) -> tuple[Constant, ...]:
    """The tensors that no step moves."""
    constants = table.get("constants")
    require(isinstance(constants, list), "constants-bad", "no list of constants")
    found: list[Constant] = []
    for constant in constants or []:
        good = isinstance(constant, dict) and isinstance(constant.get("name"), str)
        require(good, "constants-bad", f"{constant!r} has no name")
        shape, value = constant.get("shape"), constant.get("value")
        good = is_shape(shape, 0, 4) and type(value) is int and value in (0, 1)
        require(good, "constants-bad", f"{constant['name']}: {shape!r} of {value!r}")
        found.append((constant["name"], tuple(shape), value))
    total = sum(math.prod(shape) for _, shape, _ in found)
    require(total <= MOST_VALUES, "tensors-too-large", f"{total} elements; 2^58 at most")
    return tuple(found)


def is_beside(name: str) -> bool:
    """True for the name of a file that may belong beside the weights."""
    part = "[0-9A-Za-z_-][0-9A-Za-z_.-]*"
    good = len(name) <= 255 and re.fullmatch(f"{part}(/{part})*", name) is not None
    first = name.lower().split("/")[0]
    own = first in ("config.json", "ternarize.json", "sha256sums") or first.endswith(".safetensors")
    return good and not own


def names_code(value: object) -> bool:
    """True for a value with the member auto_map at any depth."""
    if isinstance(value, dict):
        return "auto_map" in value or any(map(names_code, value.values()))
    return isinstance(value, list) and any(map(names_code, value))


# The code of a choice


class Bits:
    """The bits of a payload, the highest of a byte first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, width: int) -> int:
        end = self.at + width
        require(end <= 8 * len(self.data), "payload-short", f"{len(self.data)} bytes of bits")
        piece = self.data[self.at // 8 : -(-end // 8)]
        self.at = end
        return (int.from_bytes(piece, "big") >> (-end % 8)) & ((1 << width) - 1)

    def take_gamma(self) -> int:
        """Elias' gamma code: zeros, then a number of one bit more."""
        zeros = 0
        while self.take(1) == 0:
            zeros += 1
            require(zeros <= 32, "gamma-too-long", "more than 32 zeros")
        return (1 << zeros) + self.take(zeros)

    def finish(self) -> None:
        """Less than a byte is left, and it is zeros."""
        left = 8 * len(self.data) - self.at
        require(left < 8, "payload-long", f"{left} bits are left")
        require(self.take(left) == 0, "filling-nonzero", "behind the last sign")


def read_choice(bits: Bits, k: int, m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which m of k are chosen, rising, and their signs."""
    sets = math.comb(k, m)
    number = bits.take((sets - 1).bit_length())
    require(number < sets, "choice-too-large", f"set {number} of {sets}")
    chosen: list[int] = []
    c, i = k, m
    while i:  # sets is binom(c, i)
        without = sets * (c - i) // c  # those of them that do not have c - 1
        c -= 1
        if without <= number:
            chosen.insert(0, c)
            number, sets, i = number - without, sets - without, i - 1
        else:
            sets = without
    return tuple(chosen), tuple(1 - 2 * bits.take(1) for _ in range(m))


# The records


def steps_in(kind: int, payload: bytes) -> int:
    """How many steps a record has, as far as it says."""
    return number_at(payload, 0, 4) if kind == 5 else int(kind in (1, 6))


def read_record(kind: int, payload: bytes, seed: int) -> Iterator[Entry]:
    """The entries of a record."""
    if kind == 1:
        yield read_step(payload, seed)
    elif kind == 2:
        check_length(payload, 36)
        yield Digest(number_at(payload, 0, 4), payload[4:].hex())
    elif kind == 3:
        check_length(payload, 9)
        edit = Edit(payload[0], number_at(payload, 1, 4), number_at(payload, 5, 4))
        require(edit.operation <= 2, "edit-unknown", f"operation {edit.operation}")
        require(edit.first <= edit.last, "edit-reversed", f"{edit.first} to {edit.last}")
        yield edit
    elif kind == 4:
        yield Note(parse_object(payload, "note-not-json", "note"))
    elif kind == 5:
        yield from read_block(payload, seed)
    elif kind == 6:
        require(len(payload) >= 12, "payload-short", f"{len(payload)} bytes of a foreign step")
        step = read_step(payload[12:], number_at(payload, 4, 8))
        yield replace(step, place=number_at(payload, 0, 4))
    else:
        raise Invalid(f"type-unknown {kind}")


def number_at(data: bytes, at: int, size: int) -> int:
    """An unsigned integer, the lowest byte first."""
    return int.from_bytes(data[at : at + size], "little")


def check_length(payload: bytes, size: int) -> None:
    require(len(payload) >= size, "payload-short", f"{len(payload)} bytes, not {size}")
    require(len(payload) <= size, "payload-long", f"{len(payload)} bytes, not {size}")


def read_step(payload: bytes, seed: int) -> Step:
    """A step; its place is its own number."""
    require(len(payload) >= 11, "payload-short", f"{len(payload)} bytes of a step")
    number, k, m = (number_at(payload, *where) for where in ((0, 4), (7, 2), (9, 2)))
    bits = Bits(payload[11:])
    step = make_step(number, payload[4], payload[5], payload[6], k, m, bits, seed)
    bits.finish()
    return step


def read_block(payload: bytes, seed: int) -> Iterator[Step]:
    """The steps of a block: each as what differs from the one before."""
    require(len(payload) >= 4, "payload-short", f"{len(payload)} bytes of a block")
    bits = Bits(payload[4:])
    number, target, cell, amount, k = -1, TRITS, 10, 1, 128
    for _ in range(number_at(payload, 0, 4)):
        number += bits.take_gamma()
        if bits.take(1):
            target, amount, k = bits.take(8), bits.take(8), bits.take(16)
        up = bits.take_gamma()
        cell += -(up // 2) if up % 2 else up // 2
        m = bits.take_gamma()
        yield make_step(number, target, cell, amount, k, m, bits, seed)
    bits.finish()


def make_step(
    number: int, target: int, cell: int, amount: int, k: int, m: int, bits: Bits, seed: int
) -> Step:
    """A step from its fields and the bits of its choice, checked."""
    require(number < 2**32, "number-too-large", f"step {number}")
    require(target in LIMITS, "target-unknown", f"step {number}: target {target}")
    require(0 <= cell <= 30, "cell-bad", f"step {number}: cells of 2^{cell}")
    most = MOST_AMOUNT[target]
    require(1 <= amount <= most, "amount-bad", f"step {number}: moves by {amount}")
    require(1 <= m <= k, "count-bad", f"step {number}: {m} of {k}")
    chosen, signs = read_choice(bits, k, m)
    return Step(number, target, cell, amount, k, chosen, signs, seed, number)


# The start


@dataclass(frozen=True)
class Base:
    """The tensors of a packed checkpoint that steps move, in their order, and their digest."""

    tensors: dict[str, reference.Ternary]
    sha256: str


def read_base(path: Path) -> Base:
    """Read a packed checkpoint, a file or a directory.  Raises Invalid."""
    decoded = reference.decode(path)
    records: dict[str, str] = {}
    for file in reference.files_of(path):
        entries, found, _ = reference.read_head(file)
        records |= {name: found[name]["sha256"] for name in entries if name in found}
    tensors, sha256 = {}, hashlib.sha256()
    for name in sorted(decoded):
        tensor = decoded[name]
        if isinstance(tensor, reference.Ternary) and tensor.planes == 1:
            tensors[name] = tensor
            sha256.update(name.encode("utf-8") + b"\0" + records[name].encode("ascii"))
    require(bool(tensors), "base-empty", "no ternary tensor of one plane")
    return Base(tensors, sha256.hexdigest())


def scales_shape(shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
    """The shape of the exponents: that of the scales in container.md, 4.4."""
    *stack, rows, cols = shape
    groups = -(-cols // reference.group_length(cols, group_size))
    return (*stack, 1, 1) if group_size == 0 else (*stack, rows, groups)


# The replay


def apply_steps(values: Int8, first: int, steps: Sequence[Step], target: int) -> None:
    """Apply the steps of a target to values that lie from `first` on in its flat index."""
    limit = LIMITS[target]
    for step in steps:
        if step.target != target or not len(values):
            continue
        sums = np.zeros(len(values), np.int64)
        for perturbation, way in zip(step.chosen, step.signs, strict=True):
            positions, signs = nonzeros(step, perturbation, first, first + len(values))
            sums[positions] += way * signs  # a perturbation has a position at most once
        moved = values + step.amount * np.sign(sums)
        values[:] = np.clip(moved, -limit, limit)


class State:
    """What steps have made of a start: all trits and all exponents, each in their flat index."""

    def __init__(self, journal: Journal, base: Base | None = None) -> None:
        self.base, self.model, self.tensors = base, journal.model, list(journal.tensors)
        if base is not None:
            self.tensors = [(n, t.trits.shape, t.group_size) for n, t in base.tensors.items()]
        require(
            (base and base.sha256) == journal.base,
            "base-mismatch",
            f"the journal begins from {journal.base}",
        )
        count = sum(math.prod(shape) for _, shape, _ in self.tensors)
        require(count <= MOST_HERE, "not-replayed", f"{count} trits are too many for this program")
        if base is None:
            self.trits = start_trits(journal.seed, journal.zeros, 0, count)
        else:
            self.trits = np.concatenate([t.trits.ravel() for t in base.tensors.values()])
        groups = sum(math.prod(scales_shape(shape, size)) for _, shape, size in self.tensors)
        self.start, self.exponents = self.trits.copy(), np.zeros(groups, np.int8)

    def apply(self, steps: Sequence[Step]) -> None:
        apply_steps(self.trits, 0, steps, TRITS)
        apply_steps(self.exponents, 0, steps, SCALES)

    def parts(self) -> Iterator[tuple[str, Int8, Int8, int]]:
        """Name, trits (..., rows, cols), exponents (..., rows or 1, groups), group size.

        The trits of groups whose scale is 0 at the start are those of the start.
        """
        at = groups_at = 0
        for name, shape, size in self.tensors:
            count, moved = math.prod(shape), scales_shape(shape, size)
            trits = self.trits[at : at + count].reshape(shape).copy()
            exponents = self.exponents[groups_at : groups_at + math.prod(moved)].reshape(moved)
            if self.base is not None and count:
                scales = self.base.tensors[name].scales
                fixed = np.repeat(scales == 0, reference.group_length(shape[-1], size), axis=-1)
                fixed = np.broadcast_to(fixed[..., : shape[-1]], shape)
                trits[fixed] = self.start[at : at + count].reshape(shape)[fixed]
            yield name, trits, exponents, size
            at, groups_at = at + count, groups_at + exponents.size

    def scales(self, name: str, exponents: Int8, trits: Int8) -> bytes | None:
        """The scales of a tensor with such values, as stored; None where the start has none."""
        if self.base is not None:
            return moved_scales(self.base.tensors[name], exponents, trits)
        if self.model is None:
            return None
        at, size = next((i, g) for i, (n, _, g) in enumerate(self.tensors) if n == name)
        return seed_scales(self.model.exponents[at], exponents, trits, size)

    def digest(self) -> str:
        """The digest of these values, as a record of type 2 holds it."""
        sha256, exponents = hashlib.sha256(), hashlib.sha256()
        for _, trits, moved, size in self.parts():
            sha256.update(pack(trits, size))
            exponents.update(moved.tobytes())
        sha256.update(exponents.digest())
        return sha256.hexdigest()


def pack(trits: Int8, group_size: int) -> bytes:
    """The bytes of base3.md."""
    *_, cols = trits.shape
    length = reference.group_length(cols, group_size)
    parts = []
    for at in range(0, cols, length):
        group = trits[..., at : at + length].reshape(-1, min(length, cols - at))
        digits = np.pad(group, ((0, 0), (0, -group.shape[1] % 5))).reshape(len(group), -1, 5) + 1
        parts.append((digits * [1, 3, 9, 27, 81]).sum(-1).astype(np.uint8))
    return np.concatenate(parts, axis=-1).tobytes()


def replay(journal: Journal, base: Base | None = None) -> State:
    """Compare all digests, then apply what the edits leave of the steps.  Raises Invalid."""
    state, done = State(journal, base), 0  # steps below are applied
    for place, entry in enumerate(journal.entries):
        if isinstance(entry, Edit):
            state, done = State(journal, base), 0
        if isinstance(entry, Digest):
            before = replace(journal, entries=journal.entries[:place])
            state.apply([step for step in before.effective() if step.place >= done])
            done, found = entry.number, state.digest()
            same = found == entry.sha256
            require(same, "digest-mismatch", f"steps below {entry.number} give {found}")
    result = State(journal, base)
    result.apply(journal.effective())
    return result


# The scales


def factors(exponents: NDArray[np.signedinteger[Any]]) -> NDArray[np.float32]:
    """2^(e / 32) as steps.md has it, exact in float32."""
    wide = exponents.astype(np.int64)
    table = np.array(FACTORS, np.float32) / np.float32(4096)
    found: NDArray[np.float32] = np.ldexp(table[wide % 32], wide // 32).astype(np.float32)
    return found


def seed_scales(exponent: int, exponents: Int8, trits: Int8, group_size: int) -> bytes:
    """The scales of a tensor that begins from the seed, after steps, in F32."""
    begun = factors(np.full(exponents.shape, exponent, np.int64))
    start = reference.Ternary(trits, begun, "F32", group_size, False, 1)
    return moved_scales(start, exponents, trits)


def moved_scales(tensor: reference.Ternary, exponents: Int8, trits: Int8) -> bytes:
    """The scales of a tensor after steps, as they are stored."""
    with np.errstate(over="ignore", under="ignore"):
        product = tensor.scales * factors(exponents)
    changed = (exponents != 0) & (tensor.scales != 0)
    low, high = (2.0**-126, float(np.uint32(0x7F7F0000).view(np.float32)))
    if tensor.scale_dtype in ("F16", "U8"):
        low, high = 2.0**-14, 65504.0 if tensor.scale_dtype == "F16" else 61440.0
    product = np.where(changed, np.clip(product, low, high), tensor.scales).astype(np.float32)
    used = used_groups(trits, tensor.group_size, exponents.shape)
    return stored(np.where(used, product, np.float32(0)), tensor.scale_dtype)


def used_groups(trits: Int8, group_size: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which groups have a trit that is not zero."""
    if not trits.size:
        return np.zeros(shape, np.bool_)
    length = reference.group_length(trits.shape[-1], group_size)
    starts = range(0, trits.shape[-1], length)
    used: NDArray[np.bool_] = np.logical_or.reduceat(trits != 0, starts, axis=-1)
    return np.logical_or.reduce(used, axis=-2, keepdims=True) if group_size == 0 else used


def stored(scales: NDArray[np.float32], dtype: str) -> bytes:
    """Scales in a type, rounded to nearest, at the middle to the even number or code."""
    if dtype == "F32":
        return scales.astype("<f4").tobytes()
    if dtype == "F16":
        return scales.astype("<f2").tobytes()
    if dtype == "BF16":
        bits = scales.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    codes = np.array([0, *range(8, 248)])
    values = (codes.astype(np.uint16) << 7).view(np.float16).astype(np.float64)
    above = np.searchsorted(values, scales.astype(np.float64)).clip(1, len(values) - 1)
    middle = (values[above - 1] + values[above]) / 2  # exact in float64
    up = (scales > middle) | ((scales == middle) & (codes[above] % 2 == 0))
    nearest = codes[np.where(up, above, above - 1)]
    return np.where(scales > 0, np.maximum(nearest, 8), 0).astype(np.uint8).tobytes()


# The program


def describe(state: State) -> Iterator[str]:
    """One line per tensor."""
    for name, trits, exponents, size in state.parts():
        sparsity = 1 - np.count_nonzero(trits) / trits.size if trits.size else 0.0
        digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in (trits, exponents)]
        scales = state.scales(name, exponents, trits)
        if scales is not None:
            digests.append(hashlib.sha256(pack(trits, size) + scales).hexdigest())
        shape = list(trits.shape)
        yield f"{json.dumps(name)[1:-1]} {shape} {size} {sparsity:.4f} {' '.join(digests)} ok"


def main(arguments: list[str]) -> int:
    """Replay every journal named; 0 if all are valid, 1 if not."""
    parser = argparse.ArgumentParser(description="Check and replay journals of steps.")
    parser.add_argument("--base", type=Path, help="packed checkpoint that they begin from")
    parser.add_argument("journal", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    failed = False
    for path in options.journal:
        try:
            base = read_base(options.base) if options.base else None
            journal = read_journal(path.read_bytes())
            state = replay(journal, base)
            steps = len(journal.steps())
            print(f"{steps} steps, {len(journal.effective())} in effect, {journal.torn} bytes torn")
            for line in describe(state):
                print(line)
        except (Invalid, OSError) as error:
            print(json.dumps(f"{path}: {error}")[1:-1], file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
