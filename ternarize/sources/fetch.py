"""Checkpoints on the Hub, fetched into the shared cache and checked on arrival.

The client of the Hub checks sizes only. The Hub names every file by a digest, the SHA-256 of what
is in LFS and git's SHA-1 of the rest, and the cache calls its files by them: so each file is
compared with its own name the first time it is used (`fetch`). A list beside the repository's
blobs remembers which were found good, with their size and time of change.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ternarize.errors import CheckpointError, FormatError
from ternarize.files.names import (
    CARD,
    COPIED,
    INDEX,
    PICKLE,
    RECORD,
    SAFETENSORS,
    WEIGHTS,
    module_folders,
    with_variant,
)
from ternarize.files.outputs import write_whole
from ternarize.files.sums import SUMS, hash_file, read_sums
from ternarize.sources.hub_errors import hub_errors
from ternarize.threads import in_threads

SMALL_FILES = (*(f"*{suffix}" for suffix in COPIED), CARD, "LICENSE*", "NOTICE*", SUMS)
CHECKED = ".ternarize-checked.json"


def split_id(model: str) -> tuple[str, str | None] | None:
    """user/name[@revision] -> (user/name, revision); None for what cannot be a Hub id."""
    repo, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith("."):
        return None
    return repo, revision or None


def fetch(
    repo: str,
    revision: str | None = None,
    *,
    config_only: bool = False,
    subfolder: str = "",
    variant: str | None = None,
) -> Path:
    """The folder of a model in the shared cache, fetched where it is not there, and checked.

    repo         user/name
    revision     branch, tag, pull request (refs/pr/1) or commit; None: main
    config_only  without weights
    subfolder    where in the repository the model is; it is the folder that is returned
    variant      of the weights: "fp16" for model.fp16.safetensors

    Safetensors are fetched rather than pickles, and only the weight files that are read (an index
    names them); of folders below the model's only those that modules.json names, and what a
    SHA256SUMS names. A file with the right size and wrong bytes is fetched once more. Without
    network (or with HF_HUB_OFFLINE=1) the cache is what there is.

    Raises CheckpointError, in one line, for all that the Hub or the network answers.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    snapshot = _fetch_checked(repo, revision, [prefix + pattern for pattern in SMALL_FILES])
    directory = snapshot / subfolder
    # from here on by commit: somebody may push in between
    revision = snapshot.name
    if folders := module_folders(directory):
        _fetch_checked(repo, revision, [f"{prefix}{glob.escape(folder)}/*" for folder in folders])
    if config_only:
        return directory
    if others := _missing_of_sums(directory):
        _fetch_checked(repo, revision, [prefix + other for other in others])
    for main in (SAFETENSORS, PICKLE):
        files = [with_variant(main, variant)]
        files += files_of_index(directory / with_variant(main + INDEX, variant))
        _fetch_checked(repo, revision, [prefix + file for file in files])
        if any((directory / file).is_file() for file in files):
            break
    return directory


def fetch_file(repo: str, revision: str | None, suffix: str) -> Path:
    """The one file of a repository whose name ends so, as `fetch` gives a model."""
    snapshot = _fetch_checked(repo, revision, [f"*{suffix}"])
    found = sorted(path for path in snapshot.glob(f"*{suffix}") if path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:3]) or "none"
        raise CheckpointError(
            f"{repo}@{revision}" if revision else repo,
            f"holds {len(found)} files *{suffix} ({names})",
            "one",
            "Name another repository, or fetch the file and name it by its path",
        )
    return found[0]


def files_of_index(index: Path) -> list[str]:
    """The files that an index names, as far as it can be read: who opens it says what is wrong."""
    if not index.is_file():
        return []
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return sorted({file for file in weight_map.values() if re.fullmatch(r"[\w.-]+", file)})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _missing_of_sums(directory: Path) -> list[str]:
    """What SHA256SUMS of a packed checkpoint names and is not there, but for weights; patterns."""
    if not (directory / RECORD).is_file():  # the list of another tool, of who knows what
        return []
    try:
        names = read_sums(directory) or {}
    except FormatError:  # who needs it says what is wrong
        return []
    missing = (name for name in names if not (directory / name).exists())
    # weights at the top come by their own names
    return [glob.escape(name) for name in missing if "/" in name or not name.endswith(WEIGHTS)]


def _fetch_checked(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    found = _download(repo, revision, patterns)
    bad = _find_bad(found, patterns)
    if not bad:
        return found
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _edited(repo, bad[0])
    aside = {path: _set_aside(path) for path in bad}
    try:
        found = _download(repo, found.name, patterns)
    finally:  # what has not arrived is put back
        missing = [path for path in bad if not path.exists()]
        for path, moved in aside.items():
            for name, kept in moved:
                if path in missing:
                    kept.replace(name)
                else:
                    kept.unlink()
    if missing:  # the Hub was not reached, and the client took what there is
        raise _edited(repo, missing[0])
    bad = _find_bad(found, patterns)
    for path in bad:
        _remove_linked(path)
    if bad:
        raise wrong_bytes(repo, bad[0].name)
    return found


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub  # slow to import, and needed for Hub ids only

    with hub_errors(repo, revision, CheckpointError):
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                # only who names a folder wants it
                ignore_patterns=None if any("/" in each for each in patterns) else ["*/*"],
            )
        )


def _set_aside(path: Path) -> list[tuple[Path, Path]]:
    """Rename a file of a snapshot and all that its links lead to; returns (old, new) names."""
    moved = []
    while os.path.lexists(path):
        target = path.parent / os.readlink(path) if path.is_symlink() else None
        aside = path.with_name(path.name + ".aside")
        path.replace(aside)
        moved.append((path, aside))
        if target is None:
            break
        path = target
    return moved


def _edited(repo: str, path: Path) -> CheckpointError:
    return CheckpointError(
        path,
        f"has other bytes than the Hub's digest of it promises, and {repo} cannot be asked for "
        "the right ones",
        "the file that was uploaded",
        "It was left as it is: fetch it with a network, or copy the folder elsewhere and use it "
        "by its path",
    )


def _remove_linked(path: Path) -> None:
    """Remove a file of a snapshot with all that its links lead to: it would be given out again."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def wrong_bytes(repo: str, file: str) -> CheckpointError:
    """The error for a file that has been fetched twice, and is not what the Hub says it is."""
    return CheckpointError(
        repo,
        f"{file} came twice with other bytes than the Hub's digest promises",
        "the file that was uploaded",
        "It was not kept: try again later, or over another network",
    )


def _find_bad(snapshot: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a snapshot whose bytes are not those that the names of their blobs promise.

    Where the cache is kept without links (Windows without the permission), there is no such name.
    """
    store = snapshot.parent.parent
    try:
        checked = json.loads((store / CHECKED).read_text("utf-8"))
    except (OSError, ValueError):  # not there yet, or cut off: everything is checked again
        checked = {}
    todo: dict[Path, tuple[str, list[int]]] = {}
    for path in sorted(snapshot.rglob("*")):
        name = path.relative_to(snapshot).as_posix()
        # as in _download: what lies in a folder is ours only by a pattern that names folders
        ours = any(
            fnmatchcase(name, pattern) and ("/" in pattern or "/" not in name)
            for pattern in patterns
        )
        if not (ours and path.is_symlink() and path.is_file()):
            continue
        # the first link leads to the blob of the repository; that may be a link too, to a store
        # of all repositories where files have other names
        digest = os.path.basename(os.readlink(path))
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest) and checked.get(digest) != stamp:
            todo[path] = digest, stamp
    if not todo:
        return []
    good = in_threads(lambda path: has_digest(path, todo[path][0]), todo, 4)
    bad = [path for path, fine in zip(todo, good, strict=True) if not fine]
    checked |= {digest: stamp for path, (digest, stamp) in todo.items() if path not in bad}
    with suppress(OSError):  # a cache that cannot be written is checked again the next time
        write_whole(store / CHECKED, json.dumps(checked).encode(), f".{os.getpid()}")
    return bad


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file has this digest: hex, SHA-256 (64 digits) or git's SHA-1 of a blob (40)."""
    sha = hashlib.sha256()
    if len(digest) == 40:
        sha = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return hash_file(path, sha) == digest
