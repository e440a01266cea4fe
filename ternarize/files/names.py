"""What the files of a checkpoint are called, and where it may have others."""

import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from ternarize.errors import FormatError

RECORD = "ternarize.json"
CARD = "README.md"
MODULE = "module"  # in config.json: the class of a module that is none of transformers'
STEPS_FILE = "journal.steps"  # of a repository that holds one
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"
# how names of files end that hold weights, and of those that belong to a model besides
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
COPIED = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".vocab", ".bpe")


def with_variant(name: str, variant: str | None) -> str:
    """The name of a weight file or index of a variant: model.fp16.safetensors."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def module_folders(directory: Path) -> list[str]:
    """Folders of the modules that modules.json (of sentence-transformers) puts behind a model.

    Empty where the file is another. Raises FormatError where it names a place outside.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return []
    try:
        folders = [module["path"] for module in json.loads(path.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError):
        return []
    found = []
    for folder in folders:
        name = posixpath.normpath(folder) if isinstance(folder, str) else None
        if name is None or name.startswith(("/", "..", "~")) or re.search(r"[\\:\0]", name):
            raise FormatError(
                path.name,
                f"names the folder {folder!r:.80}",
                "one below it",
                "Do not trust this checkpoint",
            )
        found += [name] if name != "." else []
    return found


def is_within(name: str, folders: Sequence[str]) -> bool:
    """Whether a path, with / between its steps, lies in one of these folders."""
    return any(name.startswith(f"{folder}/") for folder in folders)
