"""Packed checkpoint -> files that other engines load.

A module for each target, beside what they have in common:

    common.py      reading the packed checkpoint, what is lost
    directory.py   a checkpoint in the layout of the Hub, written
    dense.py       floating point
    bitnet.py      transformers' BitLinear
    gemma.py       transformers' QuantizedLinear
    mlx.py         MLX
    compressed.py  compressed-tensors, for vLLM
    vocabulary.py  the vocabulary of a GGUF file
    modelfile.py   an Ollama Modelfile beside it
    gguf_keys.py   what a GGUF file says of its model
    gguf.py        llama.cpp
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ternarize.errors import UsageError
from ternarize.progress import Progress
from ternarize.publish.export.bitnet import bitnet_contents
from ternarize.publish.export.common import open_verified
from ternarize.publish.export.compressed import compressed_contents
from ternarize.publish.export.dense import dense_contents
from ternarize.publish.export.directory import export_directory
from ternarize.publish.export.gemma import gemma_int2_contents
from ternarize.publish.export.gguf import export_gguf
from ternarize.publish.export.mlx import mlx_contents

TARGETS: dict[str, Callable[..., dict[str, Any]]] = {
    "gguf": export_gguf,
    "dense": partial(export_directory, dense_contents, "dense"),
    "bitnet": partial(export_directory, bitnet_contents, "bitnet"),
    "gemma-int2": partial(export_directory, gemma_int2_contents, "gemma-int2"),
    "mlx": partial(export_directory, mlx_contents, "mlx"),
    "compressed-tensors": partial(export_directory, compressed_contents, "compressed-tensors"),
}


def export(
    model: str | Path,
    output: str | Path,
    to: str,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a packed checkpoint for another engine.

    model    packed directory or Hub id; every digest is checked
    output   file (gguf) or directory that must not exist yet
    to       a name of TARGETS
    options  of the target's function: allow_requantize (all), dtype (dense, mlx and
             compressed-tensors), kind (gguf, compressed-tensors), kept_type, tokenizer and
             modelfile (gguf)

    Returns {"output", "bytes"} and what the target's function returns: what was written and what
    was lost.

    Raises UsageError for a target or an option's value that is none; FormatError (DigestError) for
    what `verify` refuses; CheckpointError for what the target cannot carry; WeightError where a
    dtype cannot hold a weight; OutputError where the output cannot be put.
    """
    if to not in TARGETS:
        raise UsageError("to", f"{to!r}", f"one of {', '.join(TARGETS)}")
    output = Path(output).expanduser()
    packed = open_verified(model)
    report = TARGETS[to](packed, output, progress=progress, **options)
    files = [output] if output.is_file() else list(output.iterdir())
    return {"output": str(output), "bytes": sum(f.stat().st_size for f in files), **report}
