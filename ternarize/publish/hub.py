"""Publish a packed checkpoint or a journal on the Hub: all of it in one commit, or nothing.

Files are uploaded first, where nobody sees them, and what has arrived is not sent again; then one
commit makes them public together. (`upload_folder` of the client is not used: it commits a folder
in several parts if that takes long, so that for a while the config of one model would stand beside
the weights of another.)
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, OutputError, UsageError
from ternarize.files.json_files import read_json
from ternarize.files.names import (
    CARD,
    INDEX,
    PICKLE,
    RECORD,
    SAFETENSORS,
    STEPS_FILE,
    WEIGHTS,
    is_within,
    module_folders,
)
from ternarize.files.sums import SUMS, format_sums, read_sums
from ternarize.progress import Progress
from ternarize.publish.card import is_generated, make_card
from ternarize.publish.journal_card import make_journal_card
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.sources.fetch import split_id
from ternarize.sources.hub_errors import hub_errors
from ternarize.steps.journal import SUFFIX, read_journal
from ternarize.version import __version__

SHIM = "configuration_ternarize.py"
_SHIM_CLASS = "TernarizeConfigShim"
_SHIM_CODE = '''\
"""Lets transformers read this checkpoint with trust_remote_code=True: it imports ternarize, which
must be installed, and gives back the ordinary configuration."""

import ternarize  # noqa: F401
from transformers import CONFIG_MAPPING, PretrainedConfig


class TernarizeConfigShim:
    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        pass

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        wanted = {key: value for key, value in kwargs.items() if key != "return_unused_kwargs"}
        table, _ = PretrainedConfig.get_config_dict(path, **wanted)
        return CONFIG_MAPPING[table["model_type"]].from_pretrained(path, **kwargs)
'''


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    shim: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload a packed checkpoint, or a journal of steps, with its model card, in one commit.

    directory       packed checkpoint; it is verified first, and never changed. Or a journal: file,
                    which is sent as `STEPS_FILE`, up to its last whole record
    repo            user/name; made if it does not exist
    private         make it private, and go on only if it is
    revision        branch to commit to, made if it does not exist
    create_pr       open a pull request instead
    commit_message  title of the commit
    token           None: the one that is logged in (HF_TOKEN, `hf auth login`)
    base_model      Hub id of the source, for the card; None: as on record. Of a journal the packed
                    checkpoint that it begins from, which it does not know
    shim            add a file of code with which transformers, called with trust_remote_code=True,
                    finds ternarize without an import
    dry_run         upload nothing and ask nobody; say what would be sent
    progress        as in `verify`

    A card (README.md) is written from the record. One that a person has edited is never replaced:
    that of the directory is sent as it is, and that on the Hub stays. Weight files on the Hub that
    belong to another model of the same repository are removed in the same commit; a journal is not
    sent to a repository that holds weights, or another journal.

    Returns {"repo", "commit" (None if dry), "url", "pull_request", "files": {path: bytes},
    "removed": paths, "card": "written", "own" or "kept", "card_text"}.

    Raises FormatError (DigestError) for a directory that `verify` refuses, before the network is
    asked; UsageError for options that do not go together and a token that cannot be one;
    OutputError for all that the Hub answers.
    """
    directory = Path(os.path.expanduser(directory))
    _check_names(repo, revision, create_pr, base_model)
    token = None if dry_run else _check_token(token)
    where = repo if revision is None else f"{repo}@{revision}"
    files: dict[str, Path] = {}
    contents: dict[str, bytes] = {}  # what is not sent as it is on the disk
    if os.path.isfile(directory):
        contents = _journal(directory, where, base_model, shim)
    else:
        _check_directory(directory)
        verify(directory, progress=progress)
        files = _files(directory)
        if CARD not in files or _is_replaceable(directory / CARD):
            contents[CARD] = make_card(directory, where, base_model=base_model, shim=shim).encode()
        if shim:
            contents |= _with_sums(directory, _shim(directory))
    sent: dict[str, Path | bytes] = {**files, **contents}
    sizes = {
        path: len(data) if isinstance(data, bytes) else data.stat().st_size
        for path, data in sorted(sent.items())
    }
    result: dict[str, Any] = {
        "repo": repo,
        "revision": revision or "main",
        "commit": None,
        "url": None,
        "pull_request": None,
        "files": sizes,
        "removed": [],
        "card": "written" if CARD in contents else "own",
        "card_text": contents[CARD].decode() if CARD in contents else None,
    }
    if dry_run:
        return result
    what = "weights packed" if files else "steps made"
    message = commit_message or f"Upload {what} by ternarize {__version__}"
    with hub_errors(repo, revision, OutputError, "The same command goes on from there"):
        return result | _upload(repo, sent, private, revision, create_pr, message, token)


def _check_names(repo: str, revision: str | None, create_pr: bool, base_model: str | None) -> None:
    if create_pr and revision is not None:
        raise UsageError(
            "--create-pr",
            f"with --revision {revision}; a pull request goes to the main branch",
            remedy="Leave one out",
        )
    if split_id(repo) != (repo, None):
        raise UsageError(
            repo, "is no name of a repository", "user/name", "A branch goes into --revision"
        )
    if base_model is not None and split_id(base_model) != (base_model, None):
        raise UsageError("--base-model", f"{base_model!r:.80}", "user/name, a Hub id")


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(
            directory,
            "no such directory",
            "a packed checkpoint, or a journal of steps",
            "Check the path",
        )


def _journal(path: Path, where: str, base_model: str | None, shim: bool) -> dict[str, bytes]:
    """A journal and its card, by their paths in the repository."""
    if shim:
        raise UsageError("--shim", "for a journal of steps", "a packed checkpoint", "Leave it out")
    journal = read_journal(path)
    card = make_journal_card(journal, where, base_model)
    return {STEPS_FILE: path.read_bytes()[: journal.size], CARD: card.encode()}


def _check_free(repo: str, there: set[str]) -> None:
    """Raise OutputError where a repository holds something else than a journal."""
    for path in sorted(there - {STEPS_FILE}):
        if _is_model(path) or path.endswith(SUFFIX):
            raise OutputError(
                repo,
                f"holds {path}",
                "a repository for this journal alone",
                "Nothing was sent: name another",
            )


def _check_token(token: str | None) -> str | None:
    """The token that will be sent, without spaces around it; UsageError, which does not show it."""
    from huggingface_hub import get_token

    found = get_token() if token is None else token.strip()
    if found is not None and not re.fullmatch(r"[!-~]+", found):
        raise UsageError(
            "token",
            "is empty, or has a space or another character that no token has",
            "visible ASCII",
            "Copy it again from huggingface.co/settings/tokens",
        )
    return found


def _files(directory: Path) -> dict[str, Path]:
    """The files of a checkpoint, by their path in the repository; OutputError for strange weights.

    What begins with a dot is left out, and so is Python's cache.
    """
    ours = {*open_checkpoint(directory).files, SAFETENSORS + INDEX}
    if (directory / SAFETENSORS).is_file():
        ours.remove(SAFETENSORS + INDEX)  # which would not be read
    modules = module_folders(directory)  # weights there belong to the model
    files = {}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if hidden or not path.is_file():
            continue
        name = relative.as_posix()
        ours_too = name in ours or is_within(name, modules)
        if name.endswith((*WEIGHTS, INDEX)) and not ours_too:
            raise OutputError(
                path,
                "is no part of the packed checkpoint",
                "no other weights beside it",
                "Move it away",
            )
        files[name] = path
    return files


def _shim(directory: Path) -> dict[str, bytes]:
    """The file of code, and a config.json that names it."""
    config = read_json(directory / "config.json") or {}
    named = config.get("auto_map") or {}
    code = f"{SHIM.removesuffix('.py')}.{_SHIM_CLASS}"
    if not isinstance(named, dict) or named.get("AutoConfig", code) != code:
        raise UsageError(
            directory / "config.json",
            "has code of its own for AutoConfig",
            "a model that transformers has",
            "Leave out --shim",
        )
    config["auto_map"] = {**named, "AutoConfig": code}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {"config.json": text.encode(), SHIM: _SHIM_CODE.encode()}


def _with_sums(directory: Path, contents: dict[str, bytes]) -> dict[str, bytes]:
    """Contents of files, and a SHA256SUMS that speaks of them, if the directory has one."""
    digests = read_sums(directory)
    if digests is None:
        return contents
    digests |= {path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}
    return {**contents, SUMS: os.fsencode(format_sums(digests))}


def _upload(
    repo: str,
    sent: dict[str, Path | bytes],
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str,
    token: str | None,
) -> dict[str, Any]:
    """Send the files and commit them together; what `push` returns of it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="ternarize", library_version=__version__)
    info = _open_repository(api, repo, private, revision, create_pr)
    there = {each.rfilename for each in info.siblings or []}
    if sent.keys() <= {STEPS_FILE, CARD}:
        _check_free(repo, there)
    kept = CARD in there and not _is_replaceable(api.hf_hub_download(repo, CARD, revision=info.sha))
    if kept:
        sent = {path: data for path, data in sent.items() if path != CARD}
    # what another conversion has left there does not speak of this one
    stale = {RECORD, SUMS}
    removed = sorted(path for path in there - sent.keys() if _is_model(path) or path in stale)
    additions = [CommitOperationAdd(path, data) for path, data in sent.items()]
    api.preupload_lfs_files(
        repo, additions, revision=revision, create_pr=create_pr, free_memory=False
    )
    # what a .gitignore on the Hub names would silently be left out of the commit
    ignored = [each.path_in_repo for each in additions if each._should_ignore]
    if ignored:
        raise OutputError(
            repo,
            f"its .gitignore on the Hub leaves out {', '.join(ignored)}",
            "all files to be taken",
            "Nothing was published: change that file, then push again",
        )
    commit = api.create_commit(
        repo,
        [*(CommitOperationDelete(path) for path in removed), *additions],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=None if create_pr else info.sha,  # what was looked at is what is changed
    )
    result = {"commit": commit.oid, "url": str(commit.commit_url), "pull_request": commit.pr_url}
    return {**result, "removed": removed, **({"card": "kept"} if kept else {})}


def _open_repository(
    api: Any, repo: str, private: bool, revision: str | None, create_pr: bool
) -> Any:
    """What the Hub says of the repository, which is made, with its branch, if it is not there."""
    if not create_pr:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
    info = api.model_info(repo, revision=revision)
    if private and not info.private:
        raise OutputError(
            repo,
            "exists and is public",
            "a private repository",
            "Nothing was sent: make it private on its page, or name another",
        )
    return info


def _is_replaceable(card: str | Path) -> bool:
    return is_generated(Path(card).read_text("utf-8", "replace"))


def _is_model(path: str) -> bool:
    """Whether transformers may take this file for the weights of the repository's model."""
    return path.removesuffix(INDEX) in (SAFETENSORS, PICKLE) or bool(
        re.fullmatch(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)", path)
    )
