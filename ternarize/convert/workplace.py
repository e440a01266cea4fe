"""The place of work: OUTPUT.partial, which one conversion at a time has, and can be told by.

OUTPUT.partial.lock    held by the conversion that is at work
OUTPUT.partial/        the result as it grows; it gets its final name when all is verified
  .journal.jsonl       its first line says of which conversion it is (`identity`); the last file
                       to go, so that what a break leaves can be told from others' folders
  .calibration/        blocks that are calibrated, and how far a training is
  .source/             the shard of a source that is streamed
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ternarize.errors import OutputError, some
from ternarize.files.headers import stamp
from ternarize.files.names import RECORD
from ternarize.files.outputs import cannot_make, partial_of, sync_names
from ternarize.plans.layout import Plan
from ternarize.sources.imports.common import Imported
from ternarize.version import __version__

CALIBRATION = ".calibration"
STREAMED = ".source"
JOURNAL = ".journal.jsonl"  # a dot: nothing copied from the source has such a name


@contextmanager
def exclusive(partial: Path) -> Iterator[None]:
    """Keep other conversions from the same output; raises OutputError if one is at work."""
    lock = FileLock(partial.with_name(partial.name + ".lock"), timeout=0)
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_names(folder.parent)
        lock.acquire()
    except Timeout:
        found = "another conversion is writing here"
        raise OutputError(partial, found, "to be alone", "Wait for it") from None
    except OSError as error:
        raise cannot_make(partial, error) from None
    try:
        yield
    finally:
        with suppress(OSError):  # a lock that nobody holds may stay: the next one takes it
            Path(lock.lock_file).unlink()
        lock.release()


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
        if partial.is_dir() and os.listdir(partial) == [JOURNAL]:
            if (partial / JOURNAL).stat().st_size == 0:
                shutil.rmtree(partial)


def check_place(plan: Plan, output: Path) -> None:
    """Raise OutputError for an output in the source, or one that is there, unless of this plan."""
    source, target = plan.source.directory.resolve(), output.resolve()
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
        raise OutputError(output, "exists already", "a new directory", "Remove it or name another")


def _is_of(plan: Plan, folder: Path) -> bool:
    """Whether the journal in a folder is one of this conversion."""
    if not (folder / JOURNAL).is_file():
        return False
    line = (folder / JOURNAL).read_bytes().split(b"\n")[0]
    return line == json.dumps(identity(plan)).encode()


def identity(plan: Plan) -> dict[str, Any]:
    """What tells a conversion from others, in the first line of its journal."""
    table = {"ternarize": __version__, "recipe": asdict(plan.recipe), "source": stamps(plan)}
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
    """Remove an unfinished conversion, its journal last."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
    shutil.rmtree(partial)


def has_blocks(partial: Path) -> bool:
    """Whether it holds what took long: calibrated blocks, or a training."""
    return any((partial / CALIBRATION).rglob("*.safetensors"))
