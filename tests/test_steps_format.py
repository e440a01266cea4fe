"""Journals of steps: specification, vectors, reference reader and package agree with each other."""

import json
import math
import re
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import reference_steps as theirs
import torch
from fuzz.journals import as_theirs, assert_same_journal
from hypothesis import given, settings
from hypothesis import strategies as st

from ternarize.errors import DigestError, FormatError, TernarizeError, UsageError
from ternarize.native import lib
from ternarize.sources.packed import open_packed
from ternarize.steps import base as bases
from ternarize.steps.coding import (
    BitReader,
    Bits,
    _searched,
    _walked,
    put_choice,
    set_width,
    take_choice,
)
from ternarize.steps.generator import SCALES, START, TRITS, perturbations, philox, start_trits
from ternarize.steps.journal import (
    EDITS,
    LARGEST,
    Edit,
    Journal,
    JournalEntry,
    JournalHeader,
    Mark,
    Note,
    Step,
    block_bytes,
    entry_bytes,
    journal_header,
    parse_journal,
    read_journal,
)
from ternarize.steps.operations import check_digests
from ternarize.steps.replay import LIMITS, Moves, Values, _apply_one, start_of

FORMATS = Path(reference.__file__).resolve().parent
VECTORS = FORMATS / "vectors" / "steps"
VALID = sorted((VECTORS / "valid").glob("*.steps"))
INVALID = sorted((VECTORS / "invalid").glob("*.steps"))
GOLDEN = FORMATS / "golden"
GOLDEN_JOURNALS: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text("utf-8"))[
    "journals"
]
SPECIFICATION = (FORMATS / "steps.md").read_text("utf-8")
OF_REPLAY = {"base-mismatch", "base-empty", "digest-mismatch"}


def rules_of_specification() -> dict[str, str]:
    """Vector -> rule, from the tables of steps.md; a rule without a vector stands for itself."""
    found: dict[str, str] = {}
    for rule, vectors in re.findall(r"^\| `([a-z0-9-]+)` \| .* \| (.*) \|$", SPECIFICATION, re.M):
        for vector in re.findall(r"`([^`]+)`", vectors) or [f"({rule})"]:
            assert vector not in found, f"{vector} is named twice"
            found[vector] = rule
    return found


RULES = rules_of_specification()


@pytest.fixture(scope="module")
def packed_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors as a checkpoint that the package opens."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "model.safetensors").write_bytes((VECTORS / "base.safetensors").read_bytes())
    config = FORMATS / "vectors" / "valid-directories" / "single" / "config.json"
    (folder / "config.json").write_bytes(config.read_bytes())
    return folder


def base_of(journal: theirs.Journal, folder: Path) -> theirs.Base | None:
    return theirs.read_base(folder) if journal.base else None


def opened(journal: Journal, folder: Path | None) -> tuple[Any, dict[str, Any]]:
    return open_packed(folder) if journal.header.base and folder else (None, {})


def assert_same_values(state: Values, other: theirs.State) -> None:
    for part, (name, trits, exponents, size) in zip(state.parts, other.parts(), strict=True):
        assert (part.name, part.shape, part.group_size) == (name, trits.shape, size)
        assert np.array_equal(state.trits[name].numpy(), trits)
        assert np.array_equal(state.exponents[name].numpy(), exponents)
    assert state.digest() == other.digest()


# The specification, its vectors and its reader


def test_every_rule_has_its_vectors_and_every_vector_its_rule() -> None:
    named = {vector for vector in RULES if not vector.startswith("(")}
    assert named == {path.stem for path in INVALID}
    assert {vector for vector in RULES if vector.startswith("(")} == {"(base-empty)"}
    for vector in named:
        assert vector == RULES[vector] or vector.startswith(f"{RULES[vector]}-")


def test_every_rule_of_the_reference_is_in_the_specification() -> None:
    source = (FORMATS / "reference_steps.py").read_text("utf-8")
    quoted = set(re.findall(r'f?"([a-z0-9]+(?:-[a-z0-9]+)+)[" ]', source)) - {"utf-8"}
    # duplicate-key is found by reference.py; not-replayed is no rule of the format
    assert (quoted | {"duplicate-key"}) - {"not-replayed"} == set(RULES.values())


def test_the_vectors_are_small() -> None:
    assert sum(p.stat().st_size for p in VECTORS.rglob("*") if p.is_file()) < 60_000


def test_known_answers_of_the_specification() -> None:
    rows = re.findall(
        r"^\| `([0-9A-F ]{35})` \| `([0-9A-F ]{17})` \| `(.*)` \|$", SPECIFICATION, re.M
    )
    assert len(rows) == 3
    for row in rows:
        counter, key, words = ([int(word, 16) for word in each.split()] for each in row)
        found = philox(counter, (key[0], key[1]))
        assert [int(word) for word in found] == words
    table = re.findall(r"^    [ \d]\d  ((?:\d{4} ?){8})$", SPECIFICATION, re.M)
    factors = [int(number) for row in table for number in row.split()]
    assert factors == theirs.FACTORS == list(bases.FACTORS)
    for f, factor in enumerate(factors):  # the nearest integer to 4096 * 2^(f / 32), exactly
        assert (2 * factor - 1) ** 32 < 2 ** (32 * 13 + f) < (2 * factor + 1) ** 32


def test_the_worked_example_of_the_specification() -> None:
    data = (VECTORS / "valid" / "worked-example.steps").read_bytes()
    rows = re.findall(r"^\| (\d+) \| ((?:`[0-9A-F ]+` ?)+) \|", SPECIFICATION, re.M)
    rows = [(int(at), bytes.fromhex(shown.replace("`", ""))) for at, shown in rows]
    rows = rows[rows.index((8, bytes.fromhex("A6000000"))) :]
    assert len(rows) > 12
    for at, shown in rows:
        assert data[at : at + len(shown)] == shown
    journal = parse_journal(data)
    block = block_bytes(journal.steps).hex(" ").upper()
    assert block in SPECIFICATION.replace("`", "")
    bits = re.findall(r"^\| ((?:`[01]+` ?)+) \|", SPECIFICATION.partition("As a block")[2], re.M)
    text = "".join(bits).replace("`", "").replace(" ", "")
    assert int(text, 2).to_bytes(len(text) // 8, "big").hex(" ").upper() in block
    rows_shown = re.findall(r"^    (?:from|to)   ?([-+0 ]+)$", SPECIFICATION, re.M)
    signs = {"+": 1, "0": 0, "-": -1}
    before, after = ([signs[sign] for sign in row if sign != " "] for row in rows_shown)
    assert before == start_trits(journal.header.seed, 1 << 30, 0, 32).tolist()
    state = bases.opened_state(journal.header, None, {})
    state.apply(journal.effective())
    assert after == state.trits["w.weight"].flatten()[:32].tolist()


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_journal_is_refused_by_both(path: Path, packed_base: Path) -> None:
    data, rule = path.read_bytes(), RULES[path.stem]
    with pytest.raises(reference.Invalid) as refusal:
        journal = theirs.read_journal(data)
        theirs.replay(journal, base_of(journal, packed_base))
    assert str(refusal.value).split()[0] == rule
    if rule in OF_REPLAY:
        ours = parse_journal(data)
        with pytest.raises((DigestError, UsageError)):
            check_digests(ours, *opened(ours, packed_base))
    else:
        with pytest.raises(FormatError):
            parse_journal(data)


def test_a_base_without_ternary_tensors_is_refused() -> None:
    with pytest.raises(reference.Invalid, match="^base-empty"):
        theirs.read_base(FORMATS / "vectors" / "valid" / "kept.safetensors")
    with pytest.raises(UsageError, match="no ternary tensor"):
        bases.parts_of_base({})


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_journal_is_read_and_replayed_as_expected(path: Path, packed_base: Path) -> None:
    data, want = path.read_bytes(), json.loads(path.with_suffix(".json").read_text("utf-8"))
    ours, other = parse_journal(data), theirs.read_journal(data)
    assert_same_journal(ours, other)
    assert ours.torn == want["torn"]
    assert [[o.number, o.sha256] for o in ours.entries if isinstance(o, Mark)] == want["digests"]
    edits = [e for e in other.entries if isinstance(e, theirs.Edit)]
    assert [[e.operation, e.first, e.last] for e in edits] == want["edits"]
    assert sum(isinstance(entry, Note) for entry in ours.entries) == want["notes"]
    for step, said in zip(ours.steps, want["steps"], strict=True):
        seed = None if step.seed is None else f"{step.seed:016x}"
        assert said.pop("seed", None) == seed and said.pop("drawn", None) == step.drawn
        found = {name: getattr(step, name) for name in said}
        assert {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()} == said

    packed, records = opened(ours, packed_base)
    assert check_digests(ours, packed, records) == len(want["digests"])
    state = bases.opened_state(ours.header, packed, records)
    state.apply(ours.effective())
    expected = theirs.replay(other, base_of(other, packed_base))
    assert_same_values(state, expected)
    for part, said in zip(state.parts, want["tensors"], strict=True):
        assert [part.name, list(part.shape), part.group_size] == [
            said[member] for member in ("name", "shape", "group_size")
        ]
        trits, exponents = state.trits[part.name], state.exponents[part.name]
        assert trits.flatten().tolist() == said["trits"]
        assert exponents.flatten().tolist() == said["exponents"]
        scales = expected.scales(part.name, exponents.numpy(), trits.numpy())
        assert (scales is not None) == ("scales" in said)
        if scales is not None:
            assert scales.hex() == said["scales"]
            _, stored, _ = bases.read_start(ours.header, packed, records, part)
            bytes_, moved = bases.stored_after(trits, exponents, stored, part)
            assert moved.view(torch.uint8).numpy().tobytes().hex() == said["scales"]
            assert bytes_.numpy().tobytes() == theirs.pack(trits.numpy(), part.group_size)


@pytest.mark.parametrize("name", GOLDEN_JOURNALS)
def test_golden_journals_are_read_by_both(name: str) -> None:
    base, steps, effective, tensors = GOLDEN_JOURNALS[name]
    ours = read_journal(GOLDEN / name)
    other = theirs.read_journal((GOLDEN / name).read_bytes())
    assert_same_journal(ours, other)
    assert [len(ours.steps), len(ours.effective())] == [steps, effective]
    packed, records = open_packed(GOLDEN / base) if base else (None, {})
    assert check_digests(ours, packed, records) == 2
    state = bases.opened_state(ours.header, packed, records)
    state.apply(ours.effective())
    begun = theirs.read_base(GOLDEN / base) if base else None
    found = theirs.replay(other, begun)
    assert_same_values(state, found)
    lines = {
        line.split()[0]: line.split()[-4 if base or other.model else -3 : -1]
        for line in theirs.describe(found)
    }
    assert lines == {tensor: [d for d in said if d] for tensor, said in tensors.items()}


def test_the_reference_is_a_program(tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(FORMATS / "reference_steps.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--base", VECTORS / "base.safetensors", VECTORS / "valid" / "packed.steps")
    assert done.returncode == 0 and "3 steps, 3 in effect, 0 bytes torn\n" in done.stdout
    assert done.stdout.count(" ok\n") == 9
    done = run(VECTORS / "valid" / "packed.steps", VECTORS / "valid" / "no-records.steps")
    assert done.returncode == 1 and "base-mismatch" in done.stderr
    assert done.stdout.count(" ok\n") == 1


# The generator and the code of a choice


def generator_rows(member: str) -> list[dict[str, Any]]:
    rows = json.loads((VECTORS / "generator.json").read_text("utf-8"))
    return [row for row in rows if member in row]


def test_both_give_the_known_words() -> None:
    for row in generator_rows("words"):
        counter, (k0, k1), words = (
            [int(n, 16) for n in row[member]] for member in ("counter", "key", "words")
        )
        assert [int(word) for word in philox(counter, (k0, k1))] == words
        made = theirs.philox([np.array([n], np.uint64) for n in counter], k1 << 32 | k0)
        assert [int(word[0]) for word in made] == words


def test_both_give_the_known_nonzeros() -> None:
    for row in generator_rows("nonzeros"):
        seed = int(row["seed"], 16)
        number, p, purpose, bits = (row[n] for n in ("number", "perturbation", "purpose", "bits"))
        first, stop = row["first"], row["stop"]
        found = []
        for places, signs in perturbations(seed, number, [p], purpose, bits, first, stop):
            pairs = zip(places[0].tolist(), signs[0].tolist(), strict=True)
            found += [[first + place, sign] for place, sign in pairs if sign]
        assert found == row["nonzeros"]
        step = theirs.Step(number, purpose, bits, 1, p + 1, (p,), (1,), seed, number)
        places_of, signs_of = theirs.nonzeros(step, p, first, stop)
        assert np.stack([places_of + first, signs_of], -1).tolist() == row["nonzeros"]


def test_both_give_the_known_starts() -> None:
    for row in generator_rows("zeros"):
        seed, zeros, first, want = int(row["seed"], 16), row["zeros"], row["first"], row["trits"]
        assert start_trits(seed, zeros, first, len(want)).tolist() == want
        assert theirs.start_trits(seed, zeros, first, first + len(want)).tolist() == want
    assert START == theirs.START


def test_known_choices() -> None:
    for row in json.loads((VECTORS / "choice.json").read_text("utf-8")):
        k, chosen, signs, text = row["k"], row["chosen"], row["signs"], row["bits"]
        bits = Bits()
        put_choice(bits, k, chosen, signs)
        padded = text + "0" * (-len(text) % 8)
        data = int(padded, 2).to_bytes(len(padded) // 8, "big")
        assert bits.bytes() == data
        expected = tuple(chosen), tuple(signs)
        assert take_choice(BitReader(data), k, len(chosen)) == expected
        assert theirs.read_choice(theirs.Bits(data), k, len(chosen)) == expected


def test_all_small_sets_come_back_by_either_way() -> None:
    for k, m in ((1, 1), (7, 1), (7, 3), (9, 9), (40, 2)):
        for number in range(math.comb(k, m)):
            chosen = _walked(number, k, m)
            assert _searched(number, k, m) == chosen
            bits = Bits()
            put_choice(bits, k, chosen[::-1], [])
            assert BitReader(bits.bytes()).take(set_width(k, m)) == number


@st.composite
def choices(draw: st.DrawFn, most: int = 400) -> tuple[int, list[int], list[int]]:
    k = draw(st.one_of(st.integers(1, 20), st.integers(1, most)))
    chosen = sorted(draw(st.sets(st.integers(0, k - 1), min_size=1)))
    return k, chosen, [draw(st.sampled_from((1, -1))) for _ in chosen]


@given(choices(), st.integers(0, 9), st.integers(1, 2**33 - 1))
@settings(max_examples=20, deadline=None)
def test_a_choice_comes_back_wherever_it_stands(
    choice: tuple[int, list[int], list[int]], shift: int, number: int
) -> None:
    k, chosen, signs = choice
    bits = Bits()
    bits.put(1, shift + 1)
    put_choice(bits, k, chosen, signs)
    bits.put_gamma(number)
    data = bits.bytes()
    length = shift + 1 + set_width(k, len(chosen)) + len(chosen) + 2 * number.bit_length() - 1
    assert len(data) == -(-length // 8)
    expected = tuple(chosen), tuple(signs)
    ours, other = BitReader(data), theirs.Bits(data)
    assert ours.take(shift + 1) == other.take(shift + 1) == 1
    assert take_choice(ours, k, len(chosen)) == expected
    assert theirs.read_choice(other, k, len(chosen)) == expected
    assert ours.take_gamma() == other.take_gamma() == number
    with pytest.raises(EOFError):
        BitReader(data).take(8 * len(data) + 1)


# Journals at random

TENSORS = (("a", (2, 3, 7), 3), ("b", (5, 4), 0), ("c", (1, 1), -1), ("d", (2, 9), 100))


@st.composite
def steps_after(draw: st.DrawFn, number: int, *, foreign: bool = True) -> Step:
    target = draw(st.sampled_from((TRITS, SCALES)))
    k, chosen, signs = draw(choices(30))
    step = Step(
        min(LARGEST, number + draw(st.integers(1, 3))),
        target,
        draw(st.one_of(st.integers(0, 4), st.integers(0, 30))),
        draw(st.integers(1, 127)) if target == SCALES else 1,
        k,
        tuple(chosen),
        tuple(signs),
    )
    if foreign and draw(st.integers(0, 4)) == 0:
        step = replace(
            step, seed=draw(st.integers(0, 2**64 - 1)), drawn=draw(st.integers(0, LARGEST))
        )
    return step


@st.composite
def journals(draw: st.DrawFn, *, replayed: bool = False) -> tuple[bytes, list[int]]:
    """A file, and where its records end; with its right digests if it is to be replayed."""
    header = JournalHeader(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 1 << 31)), TENSORS)
    entries: list[JournalEntry] = []

    def digest() -> str:
        if not replayed:
            return "0" * 64
        state = bases.opened_state(header, None, {})
        state.apply(Journal("", header, tuple(entries)).effective())
        return state.digest()

    data, number = journal_header(header), -1
    ends = [len(data)]
    for kind in draw(st.lists(st.sampled_from("ssssbden"), max_size=7)):
        if kind in "sb":
            steps = []
            for _ in range(draw(st.integers(0, 4)) if kind == "b" else 1):
                steps.append(draw(steps_after(number, foreign=kind == "s")))
                number = steps[-1].number
            data += block_bytes(steps) if kind == "b" else entry_bytes(steps[0])
            entries += steps
        elif kind == "d":
            number += draw(st.integers(0, 2))
            data += entry_bytes(Mark(number + 1, digest()))
        elif kind == "e":
            first = draw(st.integers(0, 9))
            edit = Edit(draw(st.sampled_from(EDITS)), first, first + draw(st.integers(0, 9)))
            entries.append(edit)
            data += entry_bytes(edit)
        else:
            data += entry_bytes(
                Note({"loss": draw(st.floats(0, 9)), "é": [draw(st.text(max_size=3))]})
            )
        ends.append(len(data))
    return data, ends


@given(journals(replayed=True))
@settings(max_examples=12, deadline=None)
def test_both_read_and_replay_random_journals(made: tuple[bytes, list[int]]) -> None:
    ours, other = parse_journal(made[0]), theirs.read_journal(made[0])
    assert ours.torn == 0
    assert_same_journal(ours, other)
    check_digests(ours, None, {})
    state = bases.opened_state(ours.header, None, {})
    state.apply(ours.effective())
    assert_same_values(state, theirs.replay(other))
    for part in state.parts:  # rows by themselves
        rows = torch.Size(part.shape[:-1]).numel()
        cols, row = part.shape[-1], rows // 2
        values = start_of(part, ours.header, (row, rows)).flatten()
        Moves(ours.effective(), TRITS, ours.header.seed).apply(values, part.trits + row * cols)
        assert torch.equal(values, state.trits[part.name].flatten()[row * cols :])


@given(journals(), st.data())
@settings(max_examples=20, deadline=None)
def test_a_torn_file_loses_its_last_record_alone(
    made: tuple[bytes, list[int]], data: st.DataObject
) -> None:
    whole, ends = made
    entries = parse_journal(whole).entries
    cut = data.draw(st.integers(0, len(whole)))
    tail = bytes(data.draw(st.integers(0, 40)))  # as a file that had grown before it was written
    if cut < ends[0]:
        for read in (parse_journal, theirs.read_journal):
            with pytest.raises((FormatError, reference.Invalid)):
                read(whole[:cut])
        return
    ours = parse_journal(whole[:cut] + tail)
    size = max(end for end in ends if end <= cut)
    if not tail:
        assert ours.size == size
    assert ours.size >= size  # zeros that were lost may be those that came back
    assert ours.entries == entries[: len(ours.entries)]
    assert_same_journal(ours, theirs.read_journal(whole[:cut] + tail))


@given(journals(), st.data())
@settings(max_examples=20, deadline=None)
def test_a_changed_byte_is_refused_or_tears_off_the_last_record(
    made: tuple[bytes, list[int]], data: st.DataObject
) -> None:
    whole, ends = made
    at = data.draw(st.integers(0, len(whole) - 1))
    spoiled = bytearray(whole)
    spoiled[at] ^= data.draw(st.integers(1, 255))
    expected, refused = outcome_of_reference(bytes(spoiled))
    try:
        ours = parse_journal(bytes(spoiled))
    except FormatError:
        assert refused
        return
    assert expected is not None
    assert_same_journal(ours, expected)
    assert len(ends) > 1 and at >= ends[-2] and ours.size == ends[-2]
    before = parse_journal(whole).entries
    assert ours.entries == before[: len(ours.entries)]


def outcome_of_reference(data: bytes) -> tuple[theirs.Journal | None, bool]:
    try:
        return theirs.read_journal(data), False
    except reference.Invalid:
        return None, True


@given(journals(), st.data())
@settings(max_examples=20, deadline=None)
def test_both_agree_on_payloads_that_are_changed_under_a_new_checksum(
    made: tuple[bytes, list[int]], data: st.DataObject
) -> None:
    whole, ends = made
    if len(ends) == 1:
        return
    record = data.draw(st.integers(1, len(ends) - 1))
    body = bytearray(whole[ends[record - 1] : ends[record] - 4])
    if len(body) > 5:
        at = data.draw(st.integers(5, len(body) - 1))
        body[at] ^= 1 << data.draw(st.integers(0, 7))
    body[4] = data.draw(st.sampled_from([body[4]] * 6 + [0, 1, 2, 3, 4, 5, 6, 7]))
    if data.draw(st.integers(0, 3)) == 0:
        body += bytes(data.draw(st.integers(0, 2)))
        del body[len(body) - data.draw(st.integers(0, 2)) :]
        body[:4] = struct.pack("<I", max(0, len(body) - 5))
    changed = bytes(body) + struct.pack("<I", zlib.crc32(body))
    spoiled = whole[: ends[record - 1]] + changed + whole[ends[record] :]
    expected, refused = outcome_of_reference(spoiled)
    try:
        ours = parse_journal(spoiled)
    except FormatError:
        assert refused
        return
    assert expected is not None
    assert_same_journal(ours, expected)


def test_made_up_files_take_little_time_and_memory() -> None:
    head = journal_header(JournalHeader(1, 0, TENSORS))

    def record(kind: int, payload: bytes) -> bytes:
        body = struct.pack("<IB", len(payload), kind) + payload
        return body + struct.pack("<I", zlib.crc32(body))

    before = time.process_time()
    for tail in (
        b"\x01\x01\x01\x00" * (1 << 18),  # a record of 64 kB might begin at each byte
        record(5, struct.pack("<I", LARGEST) + bytes(1 << 20)),  # one number of a million zeros
        record(5, struct.pack("<I", LARGEST) + b"\x55" * 64),
    ):
        with pytest.raises(FormatError):
            parse_journal(head + tail)
    assert time.process_time() - before < 5
    assert parse_journal(head + bytes(1 << 20)).torn == 1 << 20


def test_what_a_writer_must_not_write_is_refused() -> None:
    with pytest.raises(ValueError):
        entry_bytes(Note({"loss": float("nan")}))


def test_the_next_number_is_above_all_steps_and_digests() -> None:
    step = Step(4, TRITS, 0, 1, 1, (0,), (1,))
    head = journal_header(JournalHeader(1, 0, TENSORS))
    assert parse_journal(head).next_number == 0
    data = head + entry_bytes(step)
    assert parse_journal(data).next_number == 5
    data += entry_bytes(Mark(9, "0" * 64))
    assert parse_journal(data).next_number == 9
    with pytest.raises(FormatError):
        parse_journal(data + entry_bytes(replace(step, number=8)))
    assert parse_journal(data + entry_bytes(replace(step, number=9))).next_number == 10


# The compiled core


@st.composite
def some_steps(draw: st.DrawFn) -> list[Step]:
    steps, number = [], -1
    for _ in range(draw(st.integers(1, 5))):
        steps.append(draw(steps_after(number)))
        number = steps[-1].number
    return steps


@pytest.mark.skipif(lib is None, reason="without the compiled core")
@given(
    some_steps(),
    st.sampled_from((TRITS, SCALES)),
    st.integers(0, 2**64 - 1),
    st.one_of(
        st.integers(0, 5000),
        st.integers(2**34 - 300, 2**34 + 300),
        st.integers(2**44 - 5000, 2**44 + 300),
        st.integers(0, 2**58 - 4000),
    ),
    st.integers(0, 700),
    st.data(),
)
@settings(max_examples=20, deadline=None)
def test_the_core_does_what_torch_does_on_any_range(
    steps: list[Step], target: int, seed: int, first: int, count: int, data: st.DataObject
) -> None:
    steps = [replace(step, target=target) for step in steps]
    if target == TRITS:
        steps = [replace(step, amount=1) for step in steps]
    limit = LIMITS[target]
    start = (torch.arange(count) * 37 % (2 * limit + 1) - limit).to(torch.int8)
    plain, native = start.clone(), start.clone()
    for step in steps:
        _apply_one(plain, first, seed, step)
    moves = Moves(steps, target, seed)
    moves.apply(native, first, threads=data.draw(st.integers(1, 3)))
    assert torch.equal(plain, native)
    low = data.draw(st.integers(0, count))
    high = data.draw(st.integers(low, count))
    part = start[low:high].clone()
    moves.apply(part, first + low, 1)
    assert torch.equal(part, plain[low:high])
    other = start.numpy().copy()
    theirs.apply_steps(other, first, [as_their_step(step, seed) for step in steps], target)
    assert np.array_equal(other, plain.numpy())


def as_their_step(step: Step, seed: int) -> theirs.Step:
    found = as_theirs(step, seed)
    assert isinstance(found, theirs.Step)
    return found


@pytest.mark.skipif(lib is None, reason="without the compiled core")
def test_the_core_does_what_torch_does_over_many_chunks() -> None:
    chosen = tuple(range(0, 120, 6))
    steps = [
        Step(n, TRITS, bits, 1, 128, chosen, tuple(1 if c % 4 else -1 for c in chosen))
        for n, bits in enumerate((0, 3, 10, 17))
    ]
    first, count = 2**36 - 70_001, 140_000
    plain, native = torch.zeros(2, count, dtype=torch.int8)
    for step in steps:
        _apply_one(plain, first, 77, step)
    Moves(steps, TRITS, 77).apply(native, first, 2)
    assert torch.equal(plain, native) and plain.abs().sum() > count // 2


# Scales


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "U8"])
def test_scales_move_as_the_specification_says(dtype: str) -> None:
    """Every exponent, on scales of all sizes: the package, the reference and exact fractions."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(8, 248, (40,), generator=generator, dtype=torch.uint8)
    stored = {
        "F16": lambda: (
            torch.cat([few.short() * 128 + 77, torch.tensor([1, 0x7BFF, 0x400])])
            .to(torch.int16)
            .view(torch.float16)
        ),
        "BF16": lambda: (
            torch.cat([few.short() * 128 + 77, torch.tensor([1, 0x7F7F, 0x80])])
            .to(torch.int16)
            .view(torch.bfloat16)
        ),
        "F32": lambda: (
            torch.cat([few.int() * 8_388_608 + 7_654_321, torch.tensor([1, 0x7F7FFFFF])])
            .to(torch.int32)
            .view(torch.float32)
        ),
        "U8": lambda: few,
    }[dtype]()
    stored = stored[(stored > 0) & torch.isfinite(stored.float())]
    exponents = torch.arange(-127, 128, dtype=torch.int8)
    many = stored[:, None].expand(-1, 255).contiguous()
    moved = bases.moved_scales(many, exponents.expand(len(stored), -1))
    raw = many.view(torch.uint8).numpy().tobytes()
    values = reference.float32(raw, dtype, "w").reshape(many.shape)
    tensor = reference.Ternary(np.ones((1, 1), np.int8), values, dtype, 1, False, 1)
    wide = exponents.expand(len(stored), -1).numpy()
    used = np.ones(many.shape, np.int8)
    assert theirs.moved_scales(tensor, wide, used) == moved.view(torch.uint8).numpy().tobytes()
    assert torch.equal(moved[:, 127], stored)
    if dtype == "F16":  # one rounding of an exact product
        for scale, row in zip(stored.tolist(), moved, strict=True):
            for exponent, found in zip(exponents.tolist(), row.tolist(), strict=True):
                q, f = divmod(exponent, 32)
                exact = Fraction(scale) * theirs.FACTORS[f] / 4096 * Fraction(2) ** q
                kept = float(min(max(exact, Fraction(2) ** -14), Fraction(65504)))
                assert exponent == 0 or found == float(np.float16(kept))


def test_an_error_of_a_journal_is_one_line() -> None:
    for path in INVALID:
        if RULES[path.stem] not in OF_REPLAY:
            with pytest.raises(TernarizeError) as refusal:
                parse_journal(path.read_bytes())
            assert str(refusal.value).isprintable()
