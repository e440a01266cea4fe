"""The small files of a checkpoint: which of them a conversion copies, byte for byte."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ternarize.errors import some
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.names import CARD, COPIED, RECORD, WEIGHTS, is_within, module_folders

BESIDE = "../"  # of a file around the transformer of sentence-transformers
_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_OWN_INDEX = re.compile(r"[^/]+\.index(\.\w+)?\.json")  # the result has one of its own, if any

# what training leaves in a folder, and no model reads: names and folders, globs
_OF_TRAINING = (
    "trainer_state.json",
    "trainer_log.jsonl",
    "training_args.*",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "*_results.json",
    "zero_to_fp32.py",
    "checkpoint-*/*",
    "global_step*/*",
    "runs/*",
    "wandb/*",
)


def small_files(directory: Path, read: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is copied byte for byte (tokenizer, generation config, ...), and what is left out.

    read  the weight files that are read

    Weights beside the model are copied where modules.json names their folder, as part of the model;
    others, and what training has left, are not.
    """
    copied: list[str] = []
    left_out: list[str] = []
    modules = module_folders(directory)
    links = [directory / folder for folder in modules if (directory / folder).is_symlink()]
    found = {path for top in (directory, *links) for path in top.rglob("*") if path.is_file()}
    paths = sorted(found)
    with_weights = {path.parent for path in paths if path.suffix in WEIGHTS}
    for path in paths:
        name = path.relative_to(directory).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if name in ("config.json", RECORD, *read) or _OWN_INDEX.fullmatch(name):
            continue
        if any(fnmatchcase(name, glob) for glob in _OF_TRAINING):
            left_out.append(name)
        elif is_within(name, modules):
            copied.append(name)
        elif path.suffix in WEIGHTS or ("/" in name and path.parent in with_weights):
            left_out.append(name)
        else:
            ours = path.suffix in COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
            (copied if ours else left_out).append(name)
    return copied, left_out


def files_beside(directory: Path, own: Iterable[str]) -> tuple[list[str], list[str]]:
    """What belongs to a transformer in a folder of sentence-transformers (0_Transformer).

    directory  of the transformer, below the folder whose modules.json names it first
    own        names of the transformer's own files, which come before others

    Returns what is copied and what is left out, as `small_files`, with names that begin with
    BESIDE; nothing where there is no such folder around it.
    """
    top = directory.parent
    if module_folders(top)[:1] != [directory.name]:
        return [], []
    taken = {*own, "config.json"}
    copied, left_out = (
        [BESIDE + name for name in names if name != CARD and not is_within(name, [directory.name])]
        for names in small_files(top, [])
    )
    return [name for name in copied if name.removeprefix(BESIDE) not in taken], left_out


def not_read(source: Checkpoint, left_out: Iterable[str]) -> list[str]:
    """What to say where transformers' choice among the weight files has left some of the model."""
    others = [name for name in left_out if _MODEL.fullmatch(name)]
    if not others or not source.files:
        return []
    return [f"{source.files[0]} is read, as transformers does, and not {some(others)}"]
