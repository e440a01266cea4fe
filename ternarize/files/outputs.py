"""The place of a result: it has a name of its own, and what is in it reaches the disk."""

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout

from ternarize.errors import OutputError

_LOCK, _WHOLE = ".lock", "whole"  # in the folder of a result that is not complete


def name_beside(output: Path, ending: str) -> Path:
    """The name of a file beside a result, which begins as the result's.

    Raises OutputError for "", ".", ".." and "/": beside them nothing can be put.
    """
    if output.name in ("", ".."):
        raise OutputError(output, "exists already", "a new name", "Name another")
    return output.with_name(output.name + ending)


def partial_of(output: Path) -> Path:
    """Where a result is written until it is complete; OutputError as `name_beside`."""
    return name_beside(output, ".partial")


def check_free(output: Path) -> None:
    """Raise OutputError where something has that name."""
    if output.exists() or output.is_symlink():
        raise OutputError(output, "exists already", "a new name", "Remove it, or name another")


def cannot_make(path: Path, error: OSError, remedy: str = "Name another output") -> OutputError:
    """What to raise where the place of a result cannot be made."""
    found = f"cannot be made ({error.strerror or error})"
    return OutputError(path, found, "a place to write", remedy)


@contextmanager
def locked(
    lock: Path, where: Path, busy: str, remedy: str = "Name another output", wait: float = 0
) -> Iterator[None]:
    """Hold a lock file, which goes away in the end.

    where, busy  what cannot be written, and what is said if another process holds the lock
    remedy       where there can be no lock
    wait         seconds that another process may hold it yet

    Raises OutputError in both cases.
    """
    held = FileLock(lock, timeout=wait)
    try:
        held.acquire()
    except Timeout:
        raise OutputError(where, busy, "to be alone", "Wait for it") from None
    except NotImplementedError:  # how filelock says that the system has no flock there
        found = "is on a file system that has no locks"
        raise OutputError(where, found, "one that has", remedy) from None
    except OSError as error:
        raise cannot_make(where, error, remedy) from None
    try:
        yield
    finally:
        with suppress(OSError):  # a lock that nobody holds may stay: the next one takes it
            lock.unlink()
        held.release()


def write_whole(path: Path, data: bytes, mark: str = "") -> None:
    """Write a small file that is complete on the disk before it has its name.

    mark  in the name that it has until then, which ends in .new: what tells processes apart that
          may write it at once

    The list of names has to be synced where that matters.
    """
    temporary = path.with_suffix(f"{mark}.new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def reserve(path: Path, size: int) -> None:
    """Make a file exactly `size` bytes long, with room on the disk where that can be asked."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate") and size:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # file systems that cannot reserve say so in many ways
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise


def write_at(file: FileIO, offset: int, data: memoryview) -> None:
    """Write all of some bytes at their place in a file that is not buffered."""
    file.seek(offset)
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def sync_files(path: Path, but: Collection[str] = ()) -> None:
    """Bring a file, or the files of a directory and their names, to the disk.

    but  names in the directory of files that are there already
    """
    there = {path / name for name in but}
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if each.is_dir():
            sync_names(each)
        elif each.is_file() and each not in there:
            with each.open("rb+") as file:
                os.fsync(file.fileno())


def sync_names(directory: Path) -> None:
    """Bring a directory's list of names to the disk."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def fresh_output(source: Path, output: Path, *, folder: bool) -> Iterator[Path]:
    """A place beside `output` to write to, which gets its name when all is written, or goes away.

    source  directory of what it is made of, which is never changed
    folder  whether a directory is made, or a file

    What one that was killed has left there goes away, too. Raises OutputError where something has
    the name already, another process is writing it, or nothing can be written.
    """
    source = source.resolve()
    partial = partial_of(output)
    check_free(output)
    if source in output.resolve().parents:
        raise OutputError(
            output,
            f"is inside the model {source}",
            "another place: the source is never changed",
            "Name another",
        )
    with _alone_in(partial) as place:
        try:
            place.mkdir() if folder else place.touch(exist_ok=False)
            yield place
            sync_files(place)
            check_free(output)  # again: a rename would replace what has come in the meantime
            place.rename(output)
            sync_names(output.parent)
        except OSError as error:
            raise OutputError(
                partial,
                f"cannot be written ({error.strerror or error})",
                remedy="Make room or permission",
            ) from error


@contextmanager
def _alone_in(partial: Path) -> Iterator[Path]:
    """A name in a folder that this process alone has; nothing is left of either in the end.

    A lock is the first thing in it, and the last: what another one, which was killed, has left
    there is known by it, and goes away; what anything else has put there stays.
    """
    place, remedy = partial / _WHOLE, "Remove what is there, or name another output"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        there = set(os.listdir(partial))
    except OSError as error:
        raise cannot_make(partial, error, remedy) from None
    there -= {_LOCK, _WHOLE} if _LOCK in there else set()
    if there or partial.is_symlink():
        found = f"exists and is no unfinished result ({min(there, default='a link')})"
        raise OutputError(partial, found, "a free name", "Move it away, or name another output")
    try:
        with locked(partial / _LOCK, partial, "another process is writing here", remedy):
            try:
                _remove(place)
            except OSError as error:
                raise cannot_make(partial, error, remedy) from None
            try:
                yield place
            finally:
                _remove(place)
    finally:
        with suppress(OSError):  # the next one has come, and takes what is there
            partial.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
