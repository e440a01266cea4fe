"""A source on the Hub that does not fit the disk: its weight files come when they are read.

Every weight file stands on the disk as a hole of its true size behind its true header, which is all
that a plan needs. It is filled when it is first read and becomes a hole again when it is released.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError, UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import MAX_HEADER
from ternarize.files.names import INDEX, SAFETENSORS, is_within, module_folders
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.sources.fetch import (
    SMALL_FILES,
    fetch,
    files_of_index,
    has_digest,
    split_id,
    wrong_bytes,
)
from ternarize.sources.hub_errors import hub_errors


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
            names = files_of_index(folder / (SAFETENSORS + INDEX))
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

    def room(self, names: Collection[str]) -> int:
        """Bytes that these files will yet take beside what is here: those of the largest."""
        with self._lock:
            return max((self.files[n][0] for n in names if n not in self._here), default=0)

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
                    self.repo, self.commit, CheckpointError, "The same command goes on from here"
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
        raise wrong_bytes(self.repo, name) from OSError("wrong bytes")  # what is done is kept

    def _make_hole(self, name: str) -> None:
        """A file of the true size with the header alone: its other pages are not on the disk."""
        path = self.folder / name
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(8)
                head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER))
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
            if length > min(size, 8 + MAX_HEADER):
                return prefix  # whoever reads the header says what is wrong
            return prefix + bytes(files.cat_file(path, start=8, end=length))


def open_stream(model: str | Path, folder: Path) -> Checkpoint:
    """Open a checkpoint of the Hub whose weight files come when they are read; see `HubStream`.

    Raises UsageError for a directory, whose files are nobody's to delete, else as `locate`.
    """
    named = split_id(str(model))
    if named is None or os.path.exists(os.path.expanduser(model)):
        raise UsageError(
            model,
            "is on this disk",
            "a Hub id (user/name[@revision]) to stream",
            "Leave out --stream: local files are read where they are, and never deleted",
        )
    stream = HubStream(*named, folder)
    checkpoint = open_checkpoint(folder, strict=False)
    checkpoint.stream = stream
    return checkpoint
