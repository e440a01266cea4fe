"""Ternary models that others trained, brought in without loss.

    what is stored -> recognised -> logical tensors in floating point (`Imported`) -> the same plan
    and conversion as of any checkpoint

A reader is a function that takes an opened checkpoint and returns an `Imported`, None if it is not
of its format, or raises CheckpointError where it is, but cannot be brought in exactly. READERS are
asked in turn for directories; GGUF files are found by their suffix.

    common.py       an imported checkpoint, and what readers share
    bitnet.py       BitNet b1.58 as transformers stores it
    two_bit.py      two bits a weight: MLX, Gemma
    vocabulary.py   a tokenizer from the vocabulary of a GGUF file
    gguf_config.py  config.json of a GGUF file
    gguf.py         GGUF files
    wrapped.py      names that training has wrapped
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from ternarize.errors import CheckpointError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.gguf import PART
from ternarize.sources.checkpoint import locate, open_checkpoint
from ternarize.sources.imports.bitnet import bitnet
from ternarize.sources.imports.common import Imported as Imported
from ternarize.sources.imports.gguf import open_gguf
from ternarize.sources.imports.two_bit import gemma, mlx
from ternarize.sources.imports.wrapped import unwrapped
from ternarize.sources.stream import open_stream

READERS: tuple[Callable[[Checkpoint], Imported | None], ...] = (bitnet, gemma, mlx)


def open_source(
    model: str | Path, *, config_only: bool = False, stream: Path | None = None
) -> Checkpoint:
    """Open a checkpoint to convert: as it is, or as an `Imported` if a reader knows its format.

    model        directory, GGUF file (or a directory that has no other weights), or Hub id
                 user/name[@revision]
    config_only  a config.json without weights is enough
    stream       folder to fetch weight files to when they are read; see `HubStream`

    Raises CheckpointError, FormatError.
    """
    gguf = find_gguf(model)
    if stream is None and gguf is not None:
        return open_gguf(*gguf)
    if stream is not None:
        return unwrapped(recognize(open_stream(model, stream)))
    directory = locate(model, config_only=config_only)
    raw = open_checkpoint(directory, need_weights=not config_only, strict=False)
    return unwrapped(recognize(raw))


def recognize(raw: Checkpoint) -> Checkpoint:
    """A checkpoint behind its decoded weights if its format is known, else itself."""
    for reader in READERS:
        found = reader(raw)
        if found is not None:
            return found
    return raw


_LAYOUT = re.compile(r"(.+)@(x86|arm|rows)")


def find_gguf(model: str | Path) -> tuple[Path, str | None, bool] | None:
    """The file that a model names, the layout behind its @, and whether it is named itself."""
    path, layout = os.path.expanduser(model), None
    named = None if os.path.exists(path) else _LAYOUT.fullmatch(path)
    if named:
        path, layout = named[1], named[2]
    if os.path.isfile(path) and path.endswith(".gguf"):
        return Path(path), layout, True
    if not os.path.isdir(path):
        return None
    names = sorted(os.listdir(path))
    found = [name for name in names if name.endswith(".gguf")]
    others = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if not found or others:
        return None
    models = {part[1] if (part := PART.fullmatch(name)) else name for name in found}
    if len(models) > 1:
        found_models = f"has {len(models)} GGUF models, {', '.join(sorted(models)[:3])}"
        raise CheckpointError(path, found_models, "one", "Name a file")
    return Path(path, found[0]), layout, False
