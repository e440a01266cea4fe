"""Several processes at one conversion, each at a part of its tensors, and all of it put together.

A part works in OUTPUT.partial/.parts/I-of-N as a conversion does in OUTPUT.partial, and never
writes elsewhere: on a disk that all share, or on its own until the folders are copied together.
What is done is known by its journal and the digests of its bytes, whoever did it, and under
whatever N.

Who puts the parts together moves whole files, and copies the tensors of those that were cut to
their places. What a tensor needs other than planned moves others in its file, and can change how
one in another file is stored that loads into the same parameter: such a one is converted again.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ternarize.convert.journal import State, note, read_state, stored_pieces
from ternarize.convert.tensor import Change
from ternarize.convert.workplace import JOURNAL, MOST_PARTS, part_folders
from ternarize.errors import OutputError, UsageError, some
from ternarize.files.outputs import reserve, write_at
from ternarize.plans.layout import Plan, Shard, TensorPlan
from ternarize.plans.parts import PartNumber, names_of_parts, shards_of
from ternarize.plans.recipe import Recipe

LAUNCHER = "torchrun"  # of processes that talk to each other


def check_parts(recipe: Recipe, part: PartNumber | None, *, finish: bool) -> None:
    """Raise UsageError for a part that there is not, or of what cannot be divided."""
    option = "--finish" if part is None else "--part"
    if part is not None and finish:
        raise UsageError("--part", "with --finish", "one of the two", "Finish after all parts")
    if part is not None and not 1 <= part[0] <= part[1] <= MOST_PARTS:
        found, expected = f"{part[0]}/{part[1]}", f"I/N with 1 <= I <= N <= {MOST_PARTS}"
        raise UsageError("--part", found, expected, "Count the parts from 1")
    if (finish or part is not None) and recipe.fits:
        raise UsageError(
            option,
            "with calibration or training, which runs the whole model",
            "a conversion without data",
            f"Leave out {option}, or --dataset and --method gptq",
        )


def check_ranks(recipe: Recipe, count: int, by: str = LAUNCHER) -> None:
    """Raise UsageError for what several processes that talk to each other cannot do together.

    by  what asks for several
    """
    if count == 1:
        return
    found = f"{count} processes, "
    fits = recipe.calibrate
    if not recipe.fits:
        remedy = f"Add --part auto, and run it once more with --finish, without {by}"
        raise UsageError(by, f"{found}and a conversion without data", "parts", remedy)
    if fits is not None and fits.distill:  # a step of which is one micro-batch
        remedy = f"Use ternarize train, or leave out {by}"
        raise UsageError(by, f"{found}and --distill", "another training", remedy)
    if recipe.train and by != LAUNCHER:
        remedy = f"Leave out {by}"
        raise UsageError(by, f"{found}and a training", "a calibration alone", remedy)
    if fits is not None and fits.reconstruct:
        remedy = f"Leave out --reconstruct, or {by}"
        raise UsageError(by, f"{found}and --reconstruct", "a calibration without it", remedy)


def may_cut(plan: Plan) -> bool:
    """Whether files are cut: not those that each part would have to fetch whole."""
    return plan.source.stream is None


def shards_of_part(plan: Plan, part: PartNumber) -> list[Shard]:
    """What a part writes: the files of the plan with its own tensors alone, some without any."""
    return shards_of(plan, names_of_parts(plan, part[1], cut=may_cut(plan))[part[0] - 1])


def count_others(plan: Plan, partial: Path, place: Path, own: dict[str, Any], state: State) -> None:
    """Count as done what another part has, or an earlier run without parts.

    partial  OUTPUT.partial
    place    of this part
    own      the `identity` of this conversion
    state    of this part; its journal does not come to hold them

    Raises OutputError where another part is one of another conversion.
    """
    for folder, shards in [(partial, plan.shards), *_places(plan, partial)]:
        if folder != place:
            names = {t.name for index in state.unsealed for t in state.undone(index)}
            found, _ = read_state(shards, folder, own, names)
            state.results.update(found.results)


def _places(plan: Plan, partial: Path) -> Iterator[tuple[Path, list[Shard]]]:
    """The place of each part that has begun, and what it writes there."""
    held: dict[int, list[set[str]]] = {}  # by the number of parts
    for (index, count), folder in part_folders(partial).items():
        if count not in held:
            held[count] = names_of_parts(plan, count, cut=may_cut(plan))
        yield folder, shards_of(plan, held[count][index - 1])


def put_together(
    plan: Plan, partial: Path, own: dict[str, Any], state: State, *, all_done: bool
) -> None:
    """Bring what the parts have done into OUTPUT.partial and its journal.

    state     of the whole
    all_done  raise OutputError, and leave all as it is, where a tensor has not been converted yet

    The other arguments as of `count_others`. It can be broken off anywhere, and done again: a part
    keeps what is copied until the whole is on the disk (`remove_parts`).
    """
    found: list[tuple[Path, State]] = []
    changes: list[Change] = []
    for folder, shards in _places(plan, partial):
        theirs, asked = read_state(shards, folder, own)
        found.append((folder, theirs))
        changes += asked
    if all_done:
        done = state.results.keys() | {name for _, each in found for name in each.results}
        _refuse_missing(plan, partial, {t.name for t in plan.tensors if not t.tied_to} - done)
    with (partial / JOURNAL).open("a", encoding="utf-8") as journal:
        for change in changes:
            note(state, journal, change)
        for folder, theirs in found:
            for index in range(len(plan.shards)):
                _take_file(state, partial, theirs, folder, index, journal)


def refuse_nothing(plan: Plan, partial: Path) -> None:
    """Raise OutputError where there is nothing to be put together, before anything is written."""
    journal = partial / JOURNAL
    if not part_folders(partial) and not (journal.is_file() and journal.stat().st_size):
        _refuse_missing(plan, partial, {t.name for t in plan.tensors if not t.tied_to})


def _refuse_missing(plan: Plan, partial: Path, missing: set[str]) -> None:
    """Raise OutputError, with the parts to be run again, where tensors are not converted yet."""
    if not missing:
        return
    lacking: list[list[str]] = []
    for count in {count for _, count in part_folders(partial)}:
        parts = enumerate(names_of_parts(plan, count, cut=may_cut(plan)), 1)
        lacking.append([f"{index}/{count}" for index, names in parts if names & missing])
    some_of = min(lacking, key=len, default=[])
    first = next(t for t in plan.tensors if t.name in missing)
    raise OutputError(
        partial,
        f"{len(missing)} of {len(plan.tensors)} tensors are not converted yet, first {first.name}",
        "all of them",
        f"Run --part {some(some_of) or 'I/N, each of N'} with the same options, then --finish",
    )


def _take_file(
    state: State, partial: Path, theirs: State, folder: Path, index: int, journal: TextIO
) -> None:
    """Take what a part has of a file into the whole: the file itself, if all of it is there."""
    shard, their = state.shards[index], theirs.shards[index]
    planned = {t.name: t for t in shard.tensors}
    ready = [t for t in their.tensors if t.name in theirs.results and t == planned[t.name]]
    taken = [t for t in ready if t.name not in state.results]
    if not taken:
        return
    source, target = folder / shard.file, partial / shard.file
    is_whole = ready == [t for t in shard.tensors if not t.tied_to]
    if not is_whole:
        _copy(source, their, target, shard, taken)
    for tensor in taken:
        note(state, journal, theirs.results[tensor.name])
    if is_whole:  # the part will not know of it any more: if this is not reached, digests say so
        os.fsync(journal.fileno())
        source.replace(target)


def _copy(
    source: Path, their: Shard, target: Path, shard: Shard, tensors: Sequence[TensorPlan]
) -> None:
    """Copy tensors from a file of a part to their places in the whole one."""
    reserve(target, shard.nbytes())
    layout, base = shard.layout(), shard.data_start()
    with target.open("r+b", buffering=0) as file:
        for _, pieces in stored_pieces(source, their, tensors):
            for name, at, piece in pieces:
                write_at(file, base + layout[name].start + at, piece.numpy().data)
