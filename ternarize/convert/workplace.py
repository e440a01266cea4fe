"""The place of work: OUTPUT.partial, which one conversion at a time has, and can be told by.

OUTPUT.partial.lock    held by the conversion that is at work
OUTPUT.partial/        the result as it grows; it gets its final name when all is verified
  .journal.jsonl       its first line says of which conversion it is (`identity`); the last file
                       to go, so that what a break leaves can be told from others' folders
  .calibration/        blocks that are calibrated, and how far a training is
  .source/             the shard of a source that is streamed
  .coding/             the file that is coded
  .parts/I-of-N/       what one of several processes has converted (`convert --part`): a place of
                       work like this one, with a journal and a lock of its own
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError, OutputError, some
from ternarize.files.headers import stamp
from ternarize.files.names import RECORD
from ternarize.files.outputs import cannot_make, locked, name_beside, partial_of, sync_names
from ternarize.plans.layout import Plan
from ternarize.plans.parts import PartNumber
from ternarize.sources.imports.common import Imported
from ternarize.sources.origin import hub_commit
from ternarize.version import __version__

CALIBRATION = ".calibration"
STREAMED = ".source"
CODING = ".coding"
PARTS = ".parts"
MOST_PARTS = 99_999
JOURNAL = ".journal.jsonl"  # a dot: nothing copied from the source has such a name
WAIT = 10.0  # seconds that a part waits for others that begin


@contextmanager
def exclusive(partial: Path, wait: float = 0) -> Iterator[None]:
    """Keep other conversions from the same output; raises OutputError if one is at work.

    wait  seconds that it may be at work yet
    """
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_names(folder.parent)
    except OSError as error:
        raise cannot_make(partial, error) from None
    busy = "another conversion is writing here"
    with locked(name_beside(partial, ".lock"), partial, busy, wait=wait):
        yield


def part_folder(partial: Path, part: PartNumber) -> Path:
    """The place of work of a part."""
    return partial / PARTS / f"{part[0]}-of-{part[1]}"


def part_folders(partial: Path) -> dict[PartNumber, Path]:
    """The places of work of all parts that have begun, of whatever number."""
    found = {}
    for folder in (partial / PARTS).glob("*-of-*"):
        numbers = re.fullmatch(r"(\d{1,5})-of-(\d{1,5})", folder.name)
        if numbers and folder.is_dir():
            found[int(numbers[1]), int(numbers[2])] = folder
    return dict(sorted(found.items(), key=lambda item: item[0][::-1]))


@contextmanager
def part_at_work(partial: Path, part: PartNumber) -> Iterator[None]:
    """Keep others from a part; raises OutputError where it, or what needs all parts, is at work.

    A part begins under the lock of the whole: who has that, and finds no part at work, is alone.
    """
    place = part_folder(partial, part)
    try:
        with ExitStack() as stack:
            with exclusive(partial, WAIT):
                claim(partial)
                stack.enter_context(exclusive(place))
            yield
    finally:
        if not place.exists():  # nothing came of it, and nothing is left
            with suppress(OutputError, OSError), exclusive(partial):
                place.parent.rmdir()  # unless there are others
                _remove_unused(partial)


def check_parts_ended(partial: Path) -> None:
    """Raise OutputError where a part is at work; to be asked by who has the lock of the whole."""
    for folder in part_folders(partial).values():
        with exclusive(folder):
            pass


def claim(partial: Path) -> None:
    """Make `partial` with a journal, the mark of what is ours; OutputError if it is another's."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        remedy = "Move it away, or name another output"
        raise OutputError(partial, "exists and is no directory", "a free name", remedy)
    try:
        partial.mkdir(exist_ok=True)
        if not (partial / JOURNAL).is_file():
            found = sorted(os.listdir(partial))
            if found:
                raise not_ours(partial, found[0])
            (partial / JOURNAL).touch()
    except OSError as error:
        raise cannot_make(partial, error) from None


def not_ours(partial: Path, file: str) -> OutputError:
    """What to raise where `partial` holds a file that no conversion has put there."""
    found = f"exists and is no unfinished conversion ({file})"
    return OutputError(partial, found, "a free name", "Move it away, or name another output")


@contextmanager
def streamed_source(partial: Path) -> Iterator[Path]:
    """The folder of a streamed source, removed in the end; `partial` too, if still empty."""
    claim(partial)
    try:
        yield partial / STREAMED
    finally:
        shutil.rmtree(partial / STREAMED, ignore_errors=True)
        _remove_unused(partial)


def _remove_unused(partial: Path) -> None:
    """Remove a place of work where nothing has been done."""
    if partial.is_dir() and os.listdir(partial) == [JOURNAL]:
        if (partial / JOURNAL).stat().st_size == 0:
            shutil.rmtree(partial)


def check_place(plan: Plan, output: Path, part: PartNumber | None = None) -> None:
    """Raise OutputError for an output in the source, or one that is there, unless of this plan."""
    source, target = plan.folder.resolve(), output.resolve()
    partial = partial_of(output).resolve()
    # the conversion of a file may lie beside it
    alone = isinstance(plan.source, Imported) and plan.source.alone
    inside = not alone and source in (target, *target.parents)
    inside = inside or partial in (source, *source.parents)
    if plan.source.stream is None and inside:
        raise OutputError(
            output,
            f"is the source {plan.source.directory} or inside it",
            "another place, since the source is never changed",
            "Name another output",
        )
    if (output.exists() or output.is_symlink()) and not _is_of(plan, output):
        remedy = "Remove it or name another"
        if part is not None:
            remedy = "If its parts have been put together, nothing is left to do; else name another"
        raise OutputError(output, "exists already", "a new directory", remedy)


def _is_of(plan: Plan, folder: Path) -> bool:
    """Whether the journal in a folder is one of this conversion."""
    if not (folder / JOURNAL).is_file():
        return False
    line = (folder / JOURNAL).read_bytes().split(b"\n")[0]
    return line == json.dumps(identity(plan)).encode()


def identity(plan: Plan) -> dict[str, Any]:
    """What tells a conversion from others, in the first line of its journal.

    Of a source on the Hub its commit is among it, not when its files came here: they are the same
    on every machine.
    """
    alone = isinstance(plan.source, Imported) and plan.source.alone
    hub = None if alone or plan.source.stream else hub_commit(plan.model, plan.source)
    source = stamps(plan)
    if hub is not None:
        source = [[*each[:2], hub["commit"]] for each in source]
    table = {"ternarize": __version__, "recipe": asdict(plan.recipe), "source": source}
    found: dict[str, Any] = json.loads(json.dumps(table))  # tuples are lists there
    return found


def stamps(plan: Plan, *, now: bool = False) -> list[list[Any]]:
    """What tells whether a source file has changed since it was opened, or up to now.

    Its size and the time of its last change: a copy of the source that keeps these is the same.
    """
    source = plan.source
    if source.stream is not None:
        return source.stream.stamps()
    names = [*(["config.json"] if source.config is not None else []), *plan.copied]
    names += [file for file in source.files if now or file not in source.stamps]
    found = {**source.stamps, **{name: stamp(source.directory / name) for name in names}}
    return [[name, *each[1:3]] for name, each in sorted(found.items())]


def changed(now: list[list[Any]], before: list[list[Any]]) -> str:
    """The names of files whose stamps differ, or that are in one list alone; "" if none."""
    differ = [each for each in [*now, *before] if not (each in now and each in before)]
    return some(sorted({str(each[0]) for each in differ}))


def check_unchanged(plan: Plan, before: list[list[Any]]) -> None:
    """Raise CheckpointError where the source is no longer what was opened."""
    now = stamps(plan, now=True)
    files = changed(now, before)
    if files:
        # what is away may come back, and what has been done is then worth keeping
        away = FileNotFoundError() if any(len(each) == 1 for each in now) else None
        raise CheckpointError(
            plan.source.directory,
            f"{files} changed during the conversion",
            "a source at rest",
            "Convert it again",
        ) from away


def tidy(output: Path) -> None:
    """Bring the final name to the disk, and only then remove what a resumed run would need."""
    sync_names(output.parent)
    if (output / CALIBRATION).exists():
        shutil.rmtree(output / CALIBRATION)
    (output / JOURNAL).unlink()  # last: it tells that this has not been done
    sync_names(output)


def finished(output: Path) -> dict[str, Any] | None:
    """The record of a conversion that ended right after the rename; nothing else is left to do."""
    if not (output / JOURNAL).is_file():
        return None
    try:
        tidy(output)
        record: dict[str, Any] = json.loads((output / RECORD).read_text("utf-8"))
    except OSError as error:
        raise OutputError(
            output,
            f"is complete, but cannot be tidied up ({error.strerror or error})",
            remedy="Get the permission to write, then run the same command again",
        ) from error
    return record


def remove(partial: Path) -> None:
    """Remove an unfinished conversion, its journal last; those of its parts likewise."""
    remove_parts(partial)
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
    shutil.rmtree(partial)


def remove_parts(partial: Path) -> None:
    """Remove what all parts have done, and the locks of those that were killed."""
    for folder in part_folders(partial).values():
        remove(folder)
    if (partial / PARTS).is_dir():
        shutil.rmtree(partial / PARTS)


def has_blocks(partial: Path) -> bool:
    """Whether it holds what took long: calibrated blocks, or a training."""
    return any((partial / CALIBRATION).rglob("*.safetensors"))
