"""The bytes of a journal of steps: a header, and records that are only ever appended.

    TRNSTEPS, length, JSON, CRC     the header: the seed, and what the steps begin from
    length, zlib stream, CRC        the model of a start from the seed, if there is one (start.py)
    length, type, payload, CRC      records: steps, edits of them, digests, notes

formats/steps.md is the definition; here are its shipped reader and writer. A record is whole or it
is not there: one that was torn off at the end of the file is dropped, damage before is refused.
"""

import heapq
import json
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ternarize.errors import FormatError, damaged
from ternarize.files.json_files import readable, strict_json
from ternarize.steps.coding import BitReader, Bits, put_choice, set_width, take_choice
from ternarize.steps.generator import MOST_BITS, SCALES, TRITS
from ternarize.steps.start import (
    LONGEST_PART,
    MODEL,
    StartModel,
    TensorShapes,
    frame_end,
    model_bytes,
    parse_model,
    parse_tensors,
    summed,
    tensors_json,
)

MAGIC = b"TRNSTEPS"
SUFFIX = ".steps"
STEPS_VERSION = 1
KNOWN = frozenset({MODEL})  # features that this version can read
_MOST_SEARCHED = 1 << 28  # bytes of possible records behind one that is not whole
_BEGINNING = re.compile(rb"(?s)(?=...[\x00\x01][\x01-\x06])")  # length up to 2^25, type
_STEP, _DIGEST, _EDIT, _NOTE, _BLOCK, _FOREIGN = 1, 2, 3, 4, 5, 6
_FIELDS = struct.Struct("<IBBBHH")  # number, target, bits, amount, k, m
MOVED = {TRITS: "trits", SCALES: "scales"}
EDITS = ("mask", "negate", "restore")
LARGEST = (1 << 32) - 1  # number of a step
MOST_AMOUNT = 127  # by which a step moves an exponent
MOST_STEPS = 1 << 20  # of a journal


@dataclass(frozen=True, slots=True)
class Step:
    """One step: which of its perturbations are followed, and how.

    number   its place in the journal; they rise
    target   what it moves: TRITS or SCALES (generator.py)
    bits     of a cell: a perturbation has one non-zero in 2^bits values
    amount   by which values move: 1 of trits
    k        perturbations that there are
    chosen   numbers of those that are followed, rising, below k; at least one
    signs    for each of them: 1 along, -1 against
    seed, drawn   what the perturbations are drawn with: None, the journal's seed and the number
    """

    number: int
    target: int
    bits: int
    amount: int
    k: int
    chosen: tuple[int, ...]
    signs: tuple[int, ...]
    seed: int | None = None
    drawn: int | None = None


@dataclass(frozen=True)
class Edit:
    """From here on, steps from first to last are left out ("mask"), go the other way ("negate"),
    or are as they were ("restore"); of several edits of a step the latest counts."""

    operation: str
    first: int
    last: int


@dataclass(frozen=True)
class Mark:
    """The SHA-256, in hex, of what all steps below a number make of the start.

    As the edits in front of it have left them; those behind it count for nothing.
    """

    number: int
    sha256: str


@dataclass(frozen=True)
class Note:
    """Whatever is to be known of a run, as JSON; a replay does not look at it."""

    content: dict[str, Any]


JournalEntry = Step | Edit | Mark | Note


@dataclass(frozen=True)
class JournalHeader:
    """What a journal begins with.

    seed     of 64 bits
    zeros    of 2^31: share of zeros of a start from the seed; None for a packed checkpoint
    tensors  of a start from the seed, in order: (name, shape, group size)
    base     of a packed checkpoint: the SHA-256 that `base_digest` gives, in hex
    model    what the tensors of a start from the seed are a model with; None: tensors alone
    """

    seed: int
    zeros: int | None = None
    tensors: TensorShapes = ()
    base: str | None = None
    model: StartModel | None = None


@dataclass(frozen=True)
class Journal:
    """A journal as it was read.

    entries  in the order of the file
    size     bytes up to the end of the last whole record
    torn     bytes behind that, of a record that was not written to its end
    """

    path: str
    header: JournalHeader
    entries: tuple[JournalEntry, ...] = ()
    size: int = 0
    torn: int = field(default=0, compare=False)

    @cached_property
    def steps(self) -> list[Step]:
        """All steps as they were written, edits apart."""
        return [each for each in self.entries if isinstance(each, Step)]

    @cached_property
    def edits(self) -> list[Edit]:
        """All edits, the latest last."""
        return [each for each in self.entries if isinstance(each, Edit)]

    @property
    def next_number(self) -> int:
        """The number that a step appended next would have at the least."""
        steps = [each.number + 1 for each in self.entries if isinstance(each, Step)]
        marks = [each.number for each in self.entries if isinstance(each, Mark)]
        return max(steps[-1:] + marks[-1:], default=0)

    def effective(self, upto: int | None = None) -> list[Step]:
        """The steps below a number as edits have left them."""
        found = []
        for step, operation in zip(self.steps, self.edited, strict=True):
            if upto is not None and step.number >= upto:
                break
            if operation == "negate":
                step = replace(step, signs=tuple(-sign for sign in step.signs))
            if operation != "mask":
                found.append(step)
        return found

    @cached_property
    def edited(self) -> list[str]:
        """The edit that counts of each step: "mask", "negate", or "" for one as it was written."""
        # the latest of those that have begun is on top; each with each could take hours
        to_come = sorted(enumerate(self.edits), key=lambda each: each[1].first, reverse=True)
        begun: list[tuple[int, Edit]] = []
        found = []
        for step in self.steps:
            while to_come and to_come[-1][1].first <= step.number:
                at, edit = to_come.pop()
                heapq.heappush(begun, (-at, edit))
            while begun and begun[0][1].last < step.number:
                heapq.heappop(begun)
            operation = begun[0][1].operation if begun else "restore"
            found.append("" if operation == "restore" else operation)
        return found


def is_step_number(value: Any) -> bool:
    """Whether a value of a note can be the number of a step."""
    return type(value) is int and 0 <= value < LARGEST


# --- writing ---


def journal_header(header: JournalHeader) -> bytes:
    """The beginning of a file."""
    start: dict[str, Any] = {"kind": "packed", "sha256": header.base}
    if header.base is None:
        start = {"kind": "seed", "zeros": header.zeros}
    table: dict[str, Any] = {
        "format_version": STEPS_VERSION,
        "features": [] if header.model is None else [MODEL],
        "seed": f"{header.seed:016x}",
        "start": start,
    }
    if header.base is None and header.model is None:
        table["tensors"] = tensors_json(header.tensors)
    text = json.dumps(table, separators=(",", ":")).encode()
    behind = b"" if header.model is None else model_bytes(header.tensors, header.model)
    return summed(MAGIC + struct.pack("<I", len(text)) + text) + behind


def entry_bytes(entry: JournalEntry) -> bytes:
    """One record."""
    if isinstance(entry, Step):
        own = entry.seed is None
        number = entry.number if own else entry.drawn
        fields = _FIELDS.pack(
            number, entry.target, entry.bits, entry.amount, entry.k, len(entry.chosen)
        )
        bits = Bits()
        put_choice(bits, entry.k, entry.chosen, entry.signs)
        payload = fields + bits.bytes()
        if own:
            return _record(_STEP, payload)
        return _record(_FOREIGN, struct.pack("<IQ", entry.number, entry.seed) + payload)
    if isinstance(entry, Edit):
        operation = EDITS.index(entry.operation)
        return _record(_EDIT, struct.pack("<BII", operation, entry.first, entry.last))
    if isinstance(entry, Mark):
        return _record(_DIGEST, struct.pack("<I", entry.number) + bytes.fromhex(entry.sha256))
    text = json.dumps(entry.content, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return _record(_NOTE, text.encode())


def block_bytes(steps: Sequence[Step]) -> bytes:
    """One record with many steps of the journal's own, in fewer bytes."""
    bits = Bits()
    before = NO_STEP
    for step in steps:
        put_fields(bits, step, before)
        put_choice(bits, step.k, step.chosen, step.signs)
        before = step
    return _record(_BLOCK, struct.pack("<I", len(steps)) + bits.bytes())


def put_fields(bits: Bits, step: Step, before: Step) -> None:
    """What a block says of a step in front of its choice, given the step before."""
    bits.put_gamma(step.number - before.number)
    same = (step.target, step.amount, step.k) == (before.target, before.amount, before.k)
    bits.put(int(not same), 1)
    if not same:
        for value, width in ((step.target, 8), (step.amount, 8), (step.k, 16)):
            bits.put(value, width)
    up = step.bits - before.bits
    bits.put_gamma(2 * up if up > 0 else 1 - 2 * up)
    bits.put_gamma(len(step.chosen))


def bits_in_block(step: Step, before: Step) -> int:
    """What a step takes in a block, given the step before."""
    fields = Bits()
    put_fields(fields, step, before)
    return fields.count + set_width(step.k, len(step.chosen)) + len(step.chosen)


# what the first step of a block is compared with
NO_STEP = Step(-1, TRITS, 10, 1, 128, (), ())


def _record(kind: int, payload: bytes) -> bytes:
    assert len(payload) <= LONGEST_PART, "a reader would take it for a torn one"
    return summed(struct.pack("<IB", len(payload), kind) + payload)


# --- reading ---


def read_journal(path: str | Path) -> Journal:
    """Read a whole journal; raises FormatError where it breaks a rule of the format."""
    with readable(Path(path)):
        data = Path(path).read_bytes()
    return parse_journal(data, str(path))


def parse_journal(data: bytes, where: str = "journal") -> Journal:
    """A journal from its bytes; see `read_journal`."""
    header, at = _parse_header(data, where)
    entries: list[JournalEntry] = []
    number, count = -1, 0
    while at < len(data):
        end = _end_of(data, at)
        if end is None:
            if _record_behind(data, at):
                raise damaged(where, f"the record at byte {at} does not fit its checksum")
            break
        kind, payload = data[at + 4], data[at + 5 : end - 4]
        try:
            count += _steps_in(kind, payload)
            if count > MOST_STEPS:
                raise ValueError(f"{count} steps, of which there are {MOST_STEPS} at most")
            for entry in _parse_record(kind, payload, number):
                if isinstance(entry, Step):
                    if entry.number <= number:
                        raise ValueError(f"step {entry.number} comes after step {number}")
                    number = entry.number
                elif isinstance(entry, Mark):
                    number = entry.number - 1  # no step below it comes later
                entries.append(entry)
        except (ValueError, EOFError, struct.error, RecursionError) as error:
            what = str(error) or "cannot be read"
            raise damaged(where, f"the record at byte {at} breaks the format: {what}") from None
        at = end
    return Journal(where, header, tuple(entries), at, len(data) - at)


def _end_of(data: bytes, at: int) -> int | None:
    """Where a record ends; None if it is not whole or does not fit its checksum."""
    if at + 9 > len(data):
        return None
    (length,) = struct.unpack_from("<I", data, at)
    end = at + 9 + length
    if length > LONGEST_PART or end > len(data):
        return None
    (said,) = struct.unpack_from("<I", data, end - 4)
    return end if zlib.crc32(data[at : end - 4]) == said else None


def _record_behind(data: bytes, at: int) -> bool:
    """Whether a whole record begins somewhere behind a broken one.

    Also true where too much would have to be summed up to know it: no torn record looks like that.
    """
    searched = 0
    for found in _BEGINNING.finditer(data, at + 1):
        (length,) = struct.unpack_from("<I", data, found.start())
        if length > LONGEST_PART or found.start() + 9 + length > len(data):
            continue
        searched += 9 + length
        if searched > _MOST_SEARCHED or _end_of(data, found.start()) is not None:
            return True
    return False


def _parse_header(data: bytes, where: str) -> tuple[JournalHeader, int]:
    if data[:8] != MAGIC:
        raise FormatError(
            where,
            f"begins with {data[:8]!r}",
            f"{MAGIC!r}, as a journal of steps does",
            "Name one that `ternarize steps train` has written",
        )
    end = frame_end(data, 0, len(MAGIC), "header", where)
    try:
        table = strict_json(data[12:end].decode())
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"its header is not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise damaged(where, "its header is not an object")
    version, features = table.get("format_version"), table.get("features")
    if type(version) is not int or version != STEPS_VERSION:
        raise _newer(where, f"format version {version!r}", f"version {STEPS_VERSION}")
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise damaged(where, f"features is {features!r:.60}", "a list of names")
    if set(features) - KNOWN:
        unknown = ", ".join(sorted(set(features) - KNOWN))
        raise _newer(where, f"needs the feature {unknown}", f"{', '.join(sorted(KNOWN))}, or none")
    header = _header_of(where, table, with_model=MODEL in features)
    if MODEL not in features:
        return header, end + 4
    tensors, model, end = parse_model(data, end + 4, where)
    return replace(header, tensors=tensors, model=model), end


def _header_of(where: str, table: dict[str, Any], *, with_model: bool) -> JournalHeader:
    """What the JSON of a header says; `tensors` of one with a model stand behind it."""
    seed, start = table.get("seed"), table.get("start")
    if not (isinstance(seed, str) and re.fullmatch("[0-9a-f]{16}", seed)):
        raise damaged(where, f"its seed is {seed!r:.60}", "16 hex digits")
    if not isinstance(start, dict) or start.get("kind") not in ("seed", "packed"):
        raise damaged(where, f"its start is {start!r:.80}", "a seed or a packed checkpoint")
    if start["kind"] == "packed" and with_model:
        raise damaged(where, "has a model, and begins from a packed checkpoint", "a seed")
    if start["kind"] == "packed":
        digest = start.get("sha256")
        if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise damaged(where, f"the digest of its start is {digest!r:.80}", "64 hex digits")
        return JournalHeader(int(seed, 16), base=digest)
    zeros = start.get("zeros")
    if type(zeros) is not int or not 0 <= zeros <= 1 << 31:
        raise damaged(where, f"the zeros of its start are {zeros!r:.60}", "0 to 2^31")
    tensors = () if with_model else parse_tensors(table.get("tensors"), where)
    return JournalHeader(int(seed, 16), zeros, tensors)


def _newer(where: str, found: str, expected: str) -> FormatError:
    return FormatError(where, found, expected, "Install a newer ternarize")


def _steps_in(kind: int, payload: bytes) -> int:
    """How many steps a record says that it has."""
    return int.from_bytes(payload[:4], "little") if kind == _BLOCK else kind in (_STEP, _FOREIGN)


def _parse_record(kind: int, payload: bytes, number: int) -> Iterator[JournalEntry]:
    """The entries of a record; ValueError, EOFError or struct.error where it breaks a rule."""
    if kind == _STEP:
        yield _parse_step(payload)
    elif kind == _FOREIGN:
        place, seed = struct.unpack_from("<IQ", payload)
        step = _parse_step(payload[12:])
        yield replace(step, number=place, seed=seed, drawn=step.number)
    elif kind == _BLOCK:
        yield from _parse_block(payload)
    elif kind == _EDIT:
        operation, first, last = struct.unpack("<BII", payload)
        if operation >= len(EDITS) or first > last:
            raise ValueError(f"edit {operation} of {first} to {last}")
        yield Edit(EDITS[operation], first, last)
    elif kind == _DIGEST:
        if len(payload) != 36:
            raise ValueError(f"a digest of {len(payload)} bytes")
        place = int.from_bytes(payload[:4], "little")
        if place <= number:
            raise ValueError(f"a digest of the steps below {place} after step {number}")
        yield Mark(place, payload[4:].hex())
    elif kind == _NOTE:
        content = strict_json(payload.decode())
        if not isinstance(content, dict):
            raise ValueError("a note that is no object")
        yield Note(content)
    else:
        raise ValueError(f"type {kind}")


def _parse_step(payload: bytes) -> Step:
    number, target, cell, amount, k, m = _FIELDS.unpack_from(payload)
    reader = BitReader(payload[_FIELDS.size :])
    step = _with_choice(Step(number, target, cell, amount, k, (), ()), m, reader)
    _check_filling(reader)
    return step


def _parse_block(payload: bytes) -> Iterator[Step]:
    (count,) = struct.unpack_from("<I", payload)
    reader, step = BitReader(payload[4:]), NO_STEP
    for _ in range(count):
        number = step.number + reader.take_gamma()
        target, amount, k = step.target, step.amount, step.k
        if reader.take(1):
            target, amount, k = reader.take(8), reader.take(8), reader.take(16)
        up = reader.take_gamma()
        cell = step.bits + (up // 2 if up % 2 == 0 else -(up // 2))
        m = reader.take_gamma()
        step = _with_choice(Step(number, target, cell, amount, k, (), ()), m, reader)
        yield step
    _check_filling(reader)


def _with_choice(step: Step, m: int, reader: BitReader) -> Step:
    """A step with what follows its fields, all of them checked."""
    if step.number > LARGEST or step.target not in MOVED:
        raise ValueError(f"step {step.number} of target {step.target}")
    most = 1 if step.target == TRITS else MOST_AMOUNT
    if not (0 <= step.bits <= MOST_BITS and 1 <= step.amount <= most):
        raise ValueError(f"cells of {step.bits} bits, moves by {step.amount}")
    if not 1 <= m <= step.k < 1 << 16:
        raise ValueError(f"{m} of {step.k} perturbations")
    try:
        chosen, signs = take_choice(reader, step.k, m)
    except ValueError:
        raise ValueError(f"no set of {m} of {step.k} has that number") from None
    return replace(step, chosen=chosen, signs=signs)


def _check_filling(reader: BitReader) -> None:
    if reader.left >= 8 or reader.take(reader.left):
        raise ValueError("more than the step is there")
