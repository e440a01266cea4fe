"""Hugging Face checkpoints on disk: which files of a directory hold the weights, by its index."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError, FormatError, UsageError
from ternarize.files.checkpoint import Checkpoint, open_files
from ternarize.files.json_files import read_config, read_json
from ternarize.files.names import INDEX, PICKLE, SAFETENSORS, WEIGHTS, module_folders
from ternarize.sources.fetch import fetch, split_id


def open_checkpoint(
    directory: Path, *, need_weights: bool = True, strict: bool = True
) -> Checkpoint:
    """List the tensors of a checkpoint directory from its index and headers.

    strict  whether an index has to agree with the files, as that of a packed checkpoint has;
            transformers reads the files that it names whole, and `notes` say what disagrees

    Takes safetensors, single or sharded, and else pytorch_model.bin (weights_only: no pickled
    code is run). Raises CheckpointError when there is nothing to read, FormatError when a file
    or the index is broken.
    """
    if not directory.is_dir():
        raise CheckpointError(
            directory,
            "no such directory",
            "a Hugging Face checkpoint",
            "Check the path or the Hub id",
        )
    config = read_config(directory)
    for main in (SAFETENSORS, PICKLE):
        if not need_weights and not any(directory.glob(f"*{Path(main).suffix}")):
            continue  # an index may be there without its shards
        if (directory / main).is_file():  # the whole model: an index beside it is not read
            return open_files(directory, [main], config)
        if (directory / (main + INDEX)).is_file():
            return _open_sharded(directory, config, main + INDEX, strict)
    if need_weights:
        raise _no_weights(directory)
    return Checkpoint(directory, config, [], {})


def _no_weights(directory: Path) -> CheckpointError:
    found = sorted(p.name for p in directory.iterdir() if p.suffix in WEIGHTS)
    below = sorted(
        config.parent
        for config in directory.glob("*/config.json")
        if any((config.parent / main).is_file() for main in _MAIN)
    )
    advice = "Save the model with save_pretrained"
    if below:
        others = f" (or {', '.join(each.name for each in below[1:4])})" if below[1:] else ""
        advice = f"{below[0].name}{others} in it has some: name {below[0]}"
    others = f" but {', '.join(found[:5])}" if found else ""
    return CheckpointError(
        directory, f"no weights{others}", f"{', '.join(_MAIN[:-1])} or {_MAIN[-1]}", advice
    )


_MAIN = (SAFETENSORS, SAFETENSORS + INDEX, PICKLE, PICKLE + INDEX)


def _open_sharded(
    directory: Path, config: dict[str, Any] | None, index: str, strict: bool
) -> Checkpoint:
    weight_map = (read_json(directory / index, strict=True) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(index, "no weight_map", "a table of tensor name: file", "Fetch it again")
    files = sorted(set(map(str, weight_map.values())))
    for file in files:
        if file not in weight_map.values() or re.search(r"[/\\:]", file) or file in ("", ".", ".."):
            raise FormatError(
                index,
                f"names the file {file!r}",
                "a name in the same directory",
                "Do not trust this checkpoint",
            )
        if not os.path.isfile(directory / file):  # unlike Path's, never raises on a strange name
            raise CheckpointError(index, f"{file!r} is missing beside it", remedy="Fetch it again")
    checkpoint = open_files(directory, files, config)
    for disagreement in _disagreements(checkpoint, weight_map):
        if strict:
            raise FormatError(index, f"{disagreement}", remedy="Fetch the checkpoint again")
        checkpoint.notes.append(f"{index} {disagreement}; the files themselves decide")
    return checkpoint


def _disagreements(checkpoint: Checkpoint, weight_map: Mapping[str, str]) -> Iterator[str]:
    """What an index says of its files that is not so, a line for each kind."""
    tensors = checkpoint.tensors
    absent = [name for name in weight_map if name not in tensors]
    moved = [n for n, file in weight_map.items() if n in tensors and tensors[n].file != file]
    unlisted = [name for name in tensors if name not in weight_map]
    if absent:
        where = weight_map[absent[0]]
        yield f"says that {absent[0]}{_more(absent)} is in {where}, but no file has it"
    if moved:
        where, found = weight_map[moved[0]], tensors[moved[0]].file
        yield f"says that {moved[0]}{_more(moved)} is in {where}, but it is in {found}"
    if unlisted:
        where = tensors[unlisted[0]].file
        yield f"does not list {unlisted[0]}{_more(unlisted)}, which {where} holds"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def locate(
    model: str | Path,
    revision: str | None = None,
    *,
    config_only: bool = False,
    subfolder: str = "",
    variant: str | None = None,
) -> Path:
    """The directory of a checkpoint: a path as it is, a Hub id (user/name[@revision]) fetched.

    In a folder of sentence-transformers that is where its transformer is: 0_Transformer, if there
    is nothing at the top.

    subfolder, variant  as from_pretrained of transformers has them

    Only weights, JSON, tokenizer and code files are fetched, safetensors rather than pickles, and
    what arrives is compared with the Hub's digests.
    Raises CheckpointError when neither is there.
    """
    path = os.path.expanduser(model)  # these three, unlike Path's, never raise
    if os.path.isdir(path):
        if not os.path.isdir(os.path.join(path, subfolder)):
            raise CheckpointError(
                model, f"has no folder {subfolder!r}", "one with a checkpoint", "Check the name"
            )
        return _transformer(Path(path, subfolder))
    if os.path.exists(path):
        raise CheckpointError(
            model,
            "is a file",
            "a checkpoint directory or a Hub id",
            "Name the directory that holds it",
        )
    named = split_id(str(model))
    if named is None:
        raise CheckpointError(
            model,
            "no such directory",
            "a checkpoint directory or a Hub id (user/name)",
            "Check the path",
        )
    repo, at = named
    if revision and at:
        raise UsageError(
            model, f"names a revision, and so does revision={revision!r}", remedy="Name one"
        )
    found = fetch(
        repo, revision or at, config_only=config_only, subfolder=subfolder, variant=variant
    )
    return _transformer(found)


def _transformer(directory: Path) -> Path:
    """The folder of the transformer, where sentence-transformers has it in one of its own.

    Its modules.json names it first (0_Transformer), and there are no weights around it.
    """
    if any((directory / main).is_file() for main in _MAIN):
        return directory
    first = directory.joinpath(*module_folders(directory)[:1])
    whole = (first / "config.json").is_file()
    return first if whole and any((first / main).is_file() for main in _MAIN) else directory
