"""Journals taken apart, changed and put together with checksums that fit (formats/steps.md)."""

import random
import struct
import zlib

import reference_steps as theirs

from ternarize.steps.journal import EDITS, Edit, Journal, JournalEntry, Mark, Step

from .structure import change_bytes, change_text

Records = list[tuple[int, bytes]]  # type, payload


def take_apart(data: bytes) -> tuple[bytes, bytes, Records] | None:
    """The header's JSON, that of the model, and the records that are whole by their lengths.

    b"" for a model that is not there; None without a header.
    """
    size = int.from_bytes(data[8:12], "little")
    if data[:8] != b"TRNSTEPS" or 16 + size > len(data):
        return None
    text, at, model, records = data[12 : 12 + size], 16 + size, b"", Records()
    if b'["model"]' in text:
        size = int.from_bytes(data[at : at + 4], "little")
        try:
            model = zlib.decompress(data[at + 4 : at + 4 + size])
        except zlib.error:
            return None
        at += 8 + size
    while at + 9 <= len(data):
        end = at + 5 + int.from_bytes(data[at : at + 4], "little")
        if end + 4 > len(data):
            break
        records.append((data[at + 4], data[at + 5 : end]))
        at = end + 4
    return text, model, records


def put_together(text: bytes, model: bytes, records: Records) -> bytes:
    """The inverse of `take_apart`."""
    made = _summed(b"TRNSTEPS" + struct.pack("<I", len(text)) + text)
    if model:
        stream = zlib.compress(model)
        made += _summed(struct.pack("<I", len(stream)) + stream)
    for kind, payload in records:
        made += _summed(struct.pack("<IB", len(payload), kind) + payload)
    return made


def _summed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def change(data: bytes, rng: random.Random) -> bytes:
    """One to three things changed: the header, a payload, the records' order; or any bytes."""
    parts = take_apart(data)
    if parts is None or rng.random() < 0.15:
        return change_bytes(data, rng)
    text, model, records = parts
    for _ in range(rng.randrange(1, 4)):
        what = rng.randrange(10)
        if what == 0 or not records:
            text = change_text(text, rng)
            continue
        if model and what < 5:
            model = change_text(model, rng)
            continue
        at = rng.randrange(len(records))
        kind, payload = records[at]
        if what == 1:
            records[at] = rng.randrange(8), payload
        elif what == 2:
            records.insert(rng.randrange(len(records) + 1), records[at])
        elif what == 3:
            del records[at]
        elif what == 4:
            records[at] = kind, payload + bytes(rng.randrange(4))
        elif what == 5:
            number = rng.choice([0, 1, 3, 2**31, 2**32 - 1])
            records[at] = kind, struct.pack("<I", number) + payload[4:]
        elif kind == 4:
            records[at] = kind, change_text(payload, rng)
        else:
            records[at] = kind, change_bytes(payload, rng)
    made = put_together(text, model, records)
    return made[: rng.randrange(len(made))] if rng.random() < 0.1 else made


def assert_same_journal(ours: Journal, other: theirs.Journal) -> None:
    """Both readers found the same."""
    assert (ours.size, ours.torn) == (other.size, other.torn)
    assert (ours.header.seed, ours.header.base) == (other.seed, other.base)
    assert ours.header.tensors == other.tensors and (ours.header.zeros or 0) == other.zeros
    assert (ours.header.model and vars(ours.header.model)) == (other.model and vars(other.model))
    assert len(ours.entries) == len(other.entries)
    for mine, entry in zip(ours.entries, other.entries, strict=True):
        assert as_theirs(mine, ours.header.seed) == entry
    effective = [as_theirs(step, ours.header.seed) for step in ours.effective()]
    assert effective == other.effective()


def as_theirs(entry: JournalEntry, seed: int) -> theirs.Entry:
    if isinstance(entry, Step):
        own = (seed, entry.number)
        if entry.seed is not None:
            assert entry.drawn is not None
            own = (entry.seed, entry.drawn)
        fields = (entry.number, entry.target, entry.bits, entry.amount, entry.k)
        return theirs.Step(*fields, entry.chosen, entry.signs, *own)
    if isinstance(entry, Edit):
        return theirs.Edit(EDITS.index(entry.operation), entry.first, entry.last)
    if isinstance(entry, Mark):
        return theirs.Digest(entry.number, entry.sha256)
    return theirs.Note(entry.content)
