"""Checkpoints on the Hub: fetched into the shared cache, or shard by shard, checked on arrival.

The client of the Hub checks sizes only. The Hub names every file by a digest, the SHA-256 of what
is in LFS and git's SHA-1 of the rest, and the cache calls its files by them: so each file is
compared with its own name the first time it is used (`fetch`). A list beside the repository's
blobs remembers which were found good, with their size and time of change.

`HubStream` is for a source that does not fit the disk: every weight file stands there as a hole of
its true size behind its true header, which is all that a plan needs. It is filled when it is first
read and becomes a hole again when it is released.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError, FormatError, TernarizeError
from ternarize.files.names import (
    COPIED,
    INDEX,
    PICKLE,
    RECORD,
    SAFETENSORS,
    WEIGHTS,
    is_within,
    module_folders,
    with_variant,
)
from ternarize.files.sums import SUMS, hash_file, read_sums
from ternarize.threads import in_threads

SMALL_FILES = (*(f"*{suffix}" for suffix in COPIED), "README.md", "LICENSE*", "NOTICE*", SUMS)
CHECKED = ".ternarize-checked.json"
LOGIN = "Check the name, or log in with `hf auth login`"


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
    snapshot = _fetch(repo, revision, [prefix + pattern for pattern in SMALL_FILES])
    directory = snapshot / subfolder
    # from here on by commit: somebody may push in between
    revision = snapshot.name
    if folders := module_folders(directory):
        _fetch(repo, revision, [f"{prefix}{glob.escape(folder)}/*" for folder in folders])
    if config_only:
        return directory
    if others := _listed(directory):
        _fetch(repo, revision, [prefix + other for other in others])
    for main in (SAFETENSORS, PICKLE):
        files = [with_variant(main, variant)]
        files += _indexed(directory / with_variant(main + INDEX, variant))
        _fetch(repo, revision, [prefix + file for file in files])
        if any((directory / file).is_file() for file in files):
            break
    return directory


def _indexed(index: Path) -> list[str]:
    """The files that an index names, as far as it can be read: who opens it says what is wrong."""
    if not index.is_file():
        return []
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return sorted({file for file in weight_map.values() if re.fullmatch(r"[\w.-]+", file)})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _listed(directory: Path) -> list[str]:
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


def _fetch(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    found = _snapshot(repo, revision, patterns)
    bad = _find_bad(found, patterns)
    if not bad:
        return found
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _edited(repo, bad[0])
    aside = {path: _set_aside(path) for path in bad}
    try:
        found = _snapshot(repo, found.name, patterns)
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
        _remove(path)
    if bad:
        raise _damaged(repo, bad[0].name)
    return found


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
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


def _remove(path: Path) -> None:
    """Remove a file of a snapshot with all that its links lead to: it would be given out again."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _damaged(repo: str, file: str) -> CheckpointError:
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
        # as in _snapshot: what lies in a folder is ours only by a pattern that names folders
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
    _write(store / CHECKED, json.dumps(checked))
    return bad


def _write(path: Path, text: str) -> None:
    """Replace a file at once; a cache that cannot be written is checked again the next time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file has this digest: hex, SHA-256 (64 digits) or git's SHA-1 of a blob (40)."""
    sha = hashlib.sha256()
    if len(digest) == 40:
        sha = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return hash_file(path, sha) == digest


@contextmanager
def hub_errors(
    repo: str, revision: str | None, kind: type[TernarizeError], goes_on: str = "Try again."
) -> Iterator[None]:
    """Turn what the client of the Hub raises into one line of `kind`.

    goes_on  what to do where the fault may pass

    What may pass (network, server, disk) has an OSError as its cause.
    """
    from huggingface_hub import errors

    # base of all errors of its HTTP library, of which there have been two
    http_error: type[Any] = errors.HfHubHTTPError.__mro__[1]
    try:
        yield
    except errors.HFValidationError as error:
        raise kind(f"{repo}: {_line(error)}; expected user/name. Check the name.") from None
    except (http_error, OSError, RuntimeError, errors.EntryNotFoundError) as error:
        message, passing = _explain(repo, revision, error, goes_on)
        raise kind(message) from (OSError(_line(error)) if passing else None)


def _explain(repo: str, revision: str | None, error: Any, goes_on: str) -> tuple[str, bool]:
    """One line about an error, and whether it may pass by itself."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading"
        error = error.__cause__
    at = f"{repo}@{revision}" if revision else repo
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{at}: the Hub has no such branch, tag or commit. Check the name.", False
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo}: is gated; expected the token of a user who was let in. Ask for access on its "
            "page, then log in with `hf auth login`.",
            False,
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: the Hub has no such model, or it is private and the token, if there is one, "
            f"may not see it. {LOGIN}.",
            False,
        )
    if status == 401:
        return f"{repo}: the Hub does not know the token (401). {LOGIN}.", False
    if status == 403:
        return (
            f"{repo}: the token may not do that (403: {_line(error)}); expected one with the "
            "permission. Make one at huggingface.co/settings/tokens.",
            False,
        )
    if status in (409, 412):
        return (
            f"{at}: was changed by somebody else in the meantime ({status}); expected it at rest. "
            f"{goes_on}",
            True,
        )
    if status == 429:
        return f"{repo}: the Hub asks for fewer requests (429). Wait a while. {goes_on}", True
    if status is not None and status >= 500:
        return f"{repo}: the Hub is out of order ({status}). {goes_on}", True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{repo}: the disk is full. Make room, or move the cache (HF_HOME). {goes_on}", True
    if isinstance(error, errors.LocalEntryNotFoundError):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return (
                f"{at}: is not in the cache as a whole, and the Hub is not asked "
                "(HF_HUB_OFFLINE=1); expected a model that has been fetched. Fetch it with a "
                "network first.",
                True,
            )
        return (
            f"{at}: no such directory, it is not in the cache, and the Hub cannot be reached "
            f"({_line(error)}). Check the network. {goes_on}",
            True,
        )
    return f"{at}: the Hub did not answer ({type(error).__name__}: {_line(error)}). {goes_on}", True


def _line(error: Any) -> str:
    """The beginning of an error's text, in one line, without tokens and signed queries."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r"(?i)\b(bearer) ([^'\"]*(?=['\"])|\S+)", r"\1 ***", text)
    text = re.sub(r"\bhf_\w+", "hf_***", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", text)
    return text[:160].rstrip(". ")


class HubStream:
    """The weight files of a model on the Hub, on disk only while they are needed.

    repo, revision  user/name, and branch, tag or commit (None: main)
    folder          made here, whatever was there is removed, so the caller must know that it is its
                    own; the caller removes it at the end

    Raises CheckpointError where the Hub does not give it, or has no safetensors.
    """

    def __init__(self, repo: str, revision: str | None, folder: Path) -> None:
        from huggingface_hub import HfApi

        self.repo, self.folder = repo, folder
        self._lock = threading.Lock()
        self._here: set[str] = set()
        small = fetch(repo, revision, config_only=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        modules = module_folders(small)
        for path in small.rglob("*"):  # where weights may lie too, of an earlier fetch
            name = path.relative_to(small).as_posix()
            ours = "/" not in name and any(fnmatchcase(name, each) for each in SMALL_FILES)
            if path.is_file() and (ours or is_within(name, modules)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
        self.commit = small.name
        with hub_errors(repo, revision, CheckpointError):
            info = HfApi().model_info(repo, revision=self.commit, files_metadata=True)
        names = [SAFETENSORS]
        if not any(each.rfilename == SAFETENSORS for each in info.siblings or []):
            names = _indexed(folder / (SAFETENSORS + INDEX))
        # name -> (bytes, digest)
        self.files: dict[str, tuple[int, str]] = {}
        for each in info.siblings or []:
            if each.rfilename in names:
                digest = each.lfs.sha256 if each.lfs else each.blob_id
                self.files[each.rfilename] = (each.size or 0, digest or "")
        if not self.files:
            raise CheckpointError(
                repo,
                f"no {SAFETENSORS} and no index of several",
                "safetensors, which alone can be read in parts",
                "Convert it without --stream",
            )
        for name in self.files:
            self._make_hole(name)

    def stamps(self) -> list[list[Any]]:
        """What tells whether the source is still the same: names, sizes and digests."""
        stamps: list[list[Any]] = [[name, *self.files[name]] for name in sorted(self.files)]
        config = self.folder / "config.json"
        if config.is_file():
            data = config.read_bytes()
            stamps.append(["config.json", len(data), hashlib.sha256(data).hexdigest()])
        return stamps

    def room(self) -> int:
        """Bytes that will yet be taken beside what is here: those of the largest file."""
        with self._lock:
            return max(
                (n for name, (n, _) in self.files.items() if name not in self._here), default=0
            )

    def fetch(self, name: str) -> None:
        """Have a file on the disk, with the bytes that its digest promises."""
        with self._lock:
            if name not in self._here:
                self._fetch(name)
                self._here.add(name)

    def release(self, name: str) -> None:
        """Give the room of a file back; a later `fetch` gets it again."""
        with self._lock:
            if name in self._here:
                self._here.remove(name)
                self._make_hole(name)

    def _fetch(self, name: str) -> None:
        import huggingface_hub

        arriving = self.folder / ".arriving"
        for attempt in range(2):
            try:
                with hub_errors(
                    self.repo, self.commit, CheckpointError, "The same command goes on from here."
                ):
                    huggingface_hub.hf_hub_download(
                        self.repo,
                        name,
                        revision=self.commit,
                        local_dir=arriving,
                        force_download=attempt > 0,
                    )
            except CheckpointError as error:
                # what is done is kept, even if a person has to do something first (a new token)
                raise error from (error.__cause__ or OSError("the Hub refuses"))
            path = arriving / name
            good = has_digest(path, self.files[name][1])
            if good:
                path.replace(self.folder / name)
            shutil.rmtree(arriving)
            if good:
                return
        raise _damaged(self.repo, name) from OSError("wrong bytes")  # what is done is kept

    def _make_hole(self, name: str) -> None:
        """A file of the true size with the header alone: its other pages are not on the disk."""
        path = self.folder / name
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(8)
                head += file.read(min(int.from_bytes(head, "little"), 100_000_000))
        else:
            head = self._read_head(name)
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.write(head)
            file.truncate(self.files[name][0])

    def _read_head(self, name: str) -> bytes:
        """Length and header of a safetensors file on the Hub, by range requests."""
        from huggingface_hub import HfFileSystem

        size, path = self.files[name][0], f"{self.repo}@{self.commit}/{name}"
        with hub_errors(self.repo, self.commit, CheckpointError):
            files = HfFileSystem()
            prefix: bytes = files.cat_file(path, start=0, end=8)
            length = 8 + int.from_bytes(prefix, "little")
            if length > min(size, 8 + 100_000_000):
                return prefix  # whoever reads the header says what is wrong
            return prefix + bytes(files.cat_file(path, start=8, end=length))
