"""Ternary models that others trained, brought in without loss.

    what is stored -> recognised -> logical tensors in floating point (`Imported`) -> the same plan
    and conversion as of any checkpoint

A reader is a function that takes an opened checkpoint and returns an `Imported`, None if it is not
of its format, or raises CheckpointError where it is, but cannot be brought in exactly. READERS are
asked in turn for directories, FILES by suffix for files.
"""

import os
from collections.abc import Callable
from pathlib import Path

from ternarize.checkpoint import Checkpoint, locate, open_checkpoint, open_stream
from ternarize.imports.bitnet import bitnet
from ternarize.imports.common import Imported as Imported
from ternarize.imports.two_bit import gemma, mlx

READERS: tuple[Callable[[Checkpoint], Imported | None], ...] = (bitnet, gemma, mlx)
FILES: dict[str, Callable[[Path], Imported]] = {}


def open_source(
    model: str | Path, *, config_only: bool = False, stream: Path | None = None
) -> Checkpoint:
    """Open a checkpoint to convert: as it is, or as an `Imported` if a reader knows its format.

    model        directory, file of a format in FILES, or Hub id user/name[@revision]
    config_only  a config.json without weights is enough
    stream       folder to fetch weight files to when they are read; see `Stream`

    Raises CheckpointError, FormatError.
    """
    path = Path(os.path.expanduser(model))
    if stream is None and path.suffix in FILES and os.path.isfile(path):
        return FILES[path.suffix](path)
    if stream is not None:
        return recognize(open_stream(model, stream))
    directory = locate(model, config_only=config_only)
    return recognize(open_checkpoint(directory, need_weights=not config_only))


def recognize(raw: Checkpoint) -> Checkpoint:
    """A checkpoint behind its decoded weights if its format is known, else itself."""
    for reader in READERS:
        found = reader(raw)
        if found is not None:
            return found
    return raw
