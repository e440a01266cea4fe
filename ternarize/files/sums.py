"""SHA256SUMS: the digest of every file of a packed checkpoint, for `sha256sum -c` and for `verify`.

The lines are those of coreutils' sha256sum: digest, two spaces, path; where a path has a backslash
or a line break, these are escaped and the line begins with a backslash. README.md is left out,
since people edit their model cards, and so is what begins with a dot.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ternarize.errors import DigestError, FormatError
from ternarize.files.json_files import readable
from ternarize.files.names import CARD
from ternarize.threads import in_threads

SUMS = "SHA256SUMS"
_CHUNK = 1 << 20  # bytes hashed at a time
MAX_BYTES = 1 << 26  # of the file; a million lines
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](?:\./)?(.+?)\r?")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_UNESCAPED = {escaped: char for char, escaped in _ESCAPES.items()}


def listed(directory: Path) -> list[str]:
    """Paths below `directory` that its SHA256SUMS has to name, sorted."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
        and path.as_posix() not in (SUMS, CARD)
    )


def format_sums(digests: Mapping[str, str]) -> str:
    """The text of SHA256SUMS for these paths and their digests."""
    lines = []
    for name, digest in sorted(digests.items()):
        escaped = "".join(_ESCAPES.get(char, char) for char in name)
        mark = "\\" if escaped != name else ""
        lines.append(f"{mark}{digest}  {escaped}\n")
    return "".join(lines)


def read_sums(directory: Path) -> dict[str, str] | None:
    """Path -> SHA-256 of the SHA256SUMS of a directory; None where there is none.

    Raises FormatError for lines that sha256sum does not write, names that appear twice, and paths
    that leave the directory; CheckpointError where the file cannot be read.
    """
    path = directory / SUMS
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise _bad_list("is no file")
    with readable(path), path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise _bad_list("is too large", f"at most {MAX_BYTES} bytes")
    lines = os.fsdecode(raw).split("\n")  # names may be any bytes
    if lines.pop():
        raise _bad_list("its last line does not end")
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise _bad_list(f"line {number} is {line[:80]!r}", "a SHA-256 and a path")
        name = match[3]
        if match[1]:
            name = re.sub(r"\\.", lambda found: _UNESCAPED.get(found[0], found[0]), name)
        if ".." in Path(name).parts or Path(name).anchor:
            raise _bad_list(f"line {number} names {name[:80]!r}", "a path in the directory")
        if digests.setdefault(name, match[2]) != match[2]:
            raise _bad_list(f"line {number} names {name[:80]!r} again, with another digest")
    return digests


def check_sums(directory: Path, needed: Sequence[str], threads: int) -> int | None:
    """Compare every file with SHA256SUMS; how many were, None where there is no such list.

    needed  paths that it has to name

    Raises FormatError for a list that is broken or names too little, DigestError for a file that
    is missing or is another than the one listed.
    """
    digests = read_sums(directory)
    if digests is None:
        return None
    for name in needed:
        if name not in digests:
            raise _bad_list(f"does not name {name}")
    for name in digests:
        if not (directory / name).is_file():
            raise DigestError(name, "is missing", f"it, as {SUMS} says", _WAY_OUT)
    found = in_threads(sha256, map(directory.joinpath, digests), threads)
    for (name, expected), digest in zip(digests.items(), found, strict=True):
        if digest != expected:
            said = f"{expected}, as {SUMS} says"
            raise DigestError(name, f"has SHA-256 {digest}", said, _WAY_OUT)
    return len(digests)


_WAY_OUT = f"Fetch it again; or, if it was changed on purpose, renew or remove {SUMS}"


def renew_sums(directory: Path) -> None:
    """Write SHA256SUMS anew, of the files that are there now."""
    digests = {name: sha256(directory / name) for name in listed(directory)}
    (directory / SUMS).write_text(format_sums(digests), "utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; CheckpointError where it cannot be read."""
    with readable(path):
        return hash_file(path, hashlib.sha256())


def hash_file(path: Path, sha: Any) -> str:
    """The hex digest of what `sha` (of hashlib) has taken so far, and then of a file."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    digest: str = sha.hexdigest()
    return digest


def _bad_list(found: str, expected: str = "") -> FormatError:
    return FormatError(SUMS, found, expected, "Fetch it again, or remove it")
