"""What is done with journals besides replaying them: checked, edited, joined, made smaller."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ternarize.errors import DigestError, UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.container import check_data
from ternarize.files.metadata import Record
from ternarize.files.outputs import check_free, write_whole
from ternarize.steps.appender import Appender
from ternarize.steps.base import check_base, opened_state
from ternarize.steps.journal import (
    EDITS,
    LARGEST,
    NO_STEP,
    Edit,
    Journal,
    JournalEntry,
    Mark,
    Note,
    Step,
    bits_in_block,
    block_bytes,
    entry_bytes,
    journal_header,
    parse_journal,
    read_journal,
)
from ternarize.steps.replay import Values

BLOCK_BYTES = 1 << 14  # of steps, from which on a block of a compact journal ends
# bytes of a compact journal around its steps: a digest, the frame of a block; and what each further
# block takes, of which there is at most one for BLOCK_BYTES
_AROUND, _OF_BLOCK = 58, 32


def edit(path: str | Path, *edits: Edit) -> list[list[int]]:
    """Append edits, all or none; returns the numbers of the steps that each concerns.

    Raises UsageError where there is no such step.
    """
    journal = read_journal(path)
    found, appended = list[list[int]](), list[Edit]()
    for each in edits:
        if each.operation not in EDITS:
            raise UsageError("edit", f"{each.operation!r}", f"one of {', '.join(EDITS)}")
        numbers = [s.number for s in journal.steps if each.first <= s.number <= each.last]
        if not numbers:
            steps = journal.steps
            there = f"steps from {steps[0].number} to {steps[-1].number}" if steps else "no steps"
            what = f"has no step from {each.first} to {each.last}, but {there}"
            raise UsageError(path, what, "some of them")
        found.append(numbers)
        # none of later steps, which an edit that goes beyond the last one would concern
        appended.append(Edit(each.operation, numbers[0], numbers[-1]))
    with Appender(path, journal.header) as appender:
        appender.append(*appended)
    return found


def fork(path: str | Path, new: str | Path, upto: int | None = None) -> Journal:
    """A new journal of the steps below a number, with the edits of them; notes stay behind.

    Both go on with numbers of their own, and draw the same perturbations for the same number.
    """
    journal = read_journal(path)
    kept = [below for e in journal.entries if (below := _below(e, upto)) is not None]
    return _write(new, journal, [entry_bytes(e) for e in kept])


def _below(entry: JournalEntry, upto: int | None) -> JournalEntry | None:
    """What an entry says of the steps below a number, if anything."""
    if isinstance(entry, Note):
        return None
    if upto is None:
        return entry
    if isinstance(entry, Mark):
        return entry if entry.number <= upto else None
    if isinstance(entry, Edit):
        return replace(entry, last=min(entry.last, upto - 1)) if entry.first < upto else None
    return entry if entry.number < upto else None


def compact(path: str | Path, new: str | Path) -> Journal:
    """The same steps and edits in fewer bytes: steps in blocks, the last digest, no notes."""
    journal = read_journal(path)
    return _write(new, journal, _compact_records(journal))


def compact_size(journal: Journal) -> int:
    """Bytes of a journal once it is compact."""
    return len(journal_header(journal.header)) + sum(map(len, _compact_records(journal)))


def _compact_records(journal: Journal) -> list[bytes]:
    records: list[bytes] = []
    block: list[Step] = []
    bits = 0
    for step in [*journal.steps, None]:
        if block and (step is None or step.seed is not None or bits >= 8 * BLOCK_BYTES):
            records.append(block_bytes(block))
            block, bits = [], 0
        if step is not None and step.seed is None:
            bits += bits_in_block(step, block[-1] if block else NO_STEP)
            block.append(step)
        elif step is not None:
            records.append(entry_bytes(step))
    marks = [each for each in journal.entries if isinstance(each, Mark)]
    last = next((m for m in marks[-1:] if m.number >= journal.next_number), None)
    behind = [each for each in journal.entries if isinstance(each, Edit) or each is last]
    return records + [entry_bytes(each) for each in behind]


def bits_left(journal: Journal, nbytes: int) -> int:
    """Bits that more steps can have in a journal that is to have so many bytes once compact."""
    own = [step for step in journal.steps if step.seed is None]
    others = [step for step in journal.steps if step.seed is not None]
    used = sum(bits_in_block(b, a) for a, b in itertools.pairwise([NO_STEP, *own]))
    runs = itertools.groupby([*journal.steps, NO_STEP], key=lambda step: step.seed is None)
    blocks = sum(1 for is_own, _ in runs if is_own) - 1  # beside the first
    around = len(journal_header(journal.header)) + _AROUND
    around += _OF_BLOCK * (nbytes // BLOCK_BYTES + blocks)
    around += sum(len(entry_bytes(each)) for each in journal.edits)
    around += sum(len(entry_bytes(each)) for each in others)
    return 8 * (nbytes - around) - used


def merge(path: str | Path, other: str | Path, new: str | Path) -> Journal:
    """The steps of the first, then those that the second has and the first has not.

    Both must begin alike. The steps of the second keep what they are drawn with; edits are applied
    for good, of the steps that both have those of the first. What comes out is a starting point,
    not a result. A digest of all steps of the first stays, if no edit came behind it.
    """
    first, second = read_journal(path), read_journal(other)
    check_same_start(first, second)
    common = common_steps(first, second)
    number = first.next_number
    entries: list[JournalEntry] = [*first.effective(), *_last_digest(first)]
    done = {step.number for step in first.steps[:common]}
    for step in second.effective():
        if step.number in done:
            continue
        if number > LARGEST:
            raise UsageError(path, f"has the step {LARGEST}, the last there can be", "fewer steps")
        own = (second.header.seed, step.number) if step.seed is None else (step.seed, step.drawn)
        entries.append(replace(step, number=number, seed=own[0], drawn=own[1]))
        number += 1
    return _write(new, first, [entry_bytes(each) for each in entries])


def _last_digest(journal: Journal) -> list[Mark]:
    """That of all steps as the edits leave them, if there is one."""
    for entry in reversed(journal.entries):
        if isinstance(entry, Mark):
            return [entry] if entry.number >= journal.next_number else []
        if isinstance(entry, Edit):
            break
    return []


def difference(path: str | Path, other: str | Path) -> dict[str, int]:
    """How many steps two journals have in "common" from their start, and each has besides."""
    first, second = read_journal(path), read_journal(other)
    check_same_start(first, second)
    common = common_steps(first, second)
    besides = {"first": len(first.steps) - common, "second": len(second.steps) - common}
    return {"common": common, **besides}


def common_steps(first: Journal, second: Journal) -> int:
    """How many steps from the start are the same, edits apart."""
    if first.header.seed != second.header.seed:
        return 0
    pairs = zip(first.steps, second.steps, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(first.steps), len(second.steps))
    )


def check_same_start(first: Journal, second: Journal) -> None:
    """Raise UsageError where two journals do not begin from the same values."""
    a, b = first.header, second.header
    same = a.base == b.base if a.base or b.base else a == b
    if not same:
        raise UsageError(
            second.path, f"begins otherwise than {first.path}", "the same start", "Name others"
        )


def check_digests(
    journal: Journal, packed: Checkpoint | None, records: Mapping[str, Record]
) -> int:
    """Replay a journal and compare its digests; returns how many there were.

    packed, records  of its base; None and {} for a start from the seed

    Raises DigestError for one that is another, and for a base that is damaged, UsageError where the
    base is another.
    """
    check_base(journal.path, journal.header, None if packed is None else records)
    if packed is not None:
        check_data(packed, records)
    marks, at = 0, 0
    state: Values | None = None
    for place, entry in enumerate(journal.entries):
        if isinstance(entry, Edit):  # of what was before, too
            state, at = None, 0
        if not isinstance(entry, Mark):
            continue
        so_far = replace(journal, entries=journal.entries[:place])
        steps = [step for step in so_far.effective(entry.number) if step.number >= at]
        if state is None:
            state = opened_state(journal.header, packed, records)
        state.apply(steps)
        at, marks = entry.number, marks + 1
        found = state.digest()
        if found != entry.sha256:
            raise DigestError(
                journal.path,
                f"the steps below {entry.number} give the digest {found[:12]}...",
                f"{entry.sha256[:12]}..., as it says",
                "Fetch the journal, or its base, again",
            )
    return marks


def _write(new: str | Path, journal: Journal, records: Sequence[bytes]) -> Journal:
    """A new journal that begins as another one."""
    path = Path(new)
    check_free(path)
    data = journal_header(journal.header) + b"".join(records)
    made = parse_journal(data, str(path))  # refused before it is written: too many steps of two
    write_whole(path, data, f".{os.getpid()}")
    return made
