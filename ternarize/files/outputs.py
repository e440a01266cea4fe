"""The place of a result: it has a name of its own, and what is in it reaches the disk."""

import os
from collections.abc import Collection
from pathlib import Path

from ternarize.errors import OutputError


def check_name(output: Path) -> None:
    """OutputError for "", ".", ".." and "/": beside them nothing can be put."""
    if output.name in ("", ".."):
        raise OutputError(output, "exists already", "a new name", "Name another")


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file that is complete on the disk before it has its name.

    Until then it has the ending .new; the list of names has to be synced where that matters.
    """
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
