"""A foreign ternary checkpoint behind the face of an ordinary one.

`Imported` lists logical tensors in floating point, under the names of Hugging Face, and decodes
rows of them as they are read: what plans, converts and verifies a checkpoint reads it like any
other. No reader of a format holds more than the rows that it is asked for.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import CheckpointError
from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.files.headers import DTYPES
from ternarize.models.skeleton import linear_layers

FLOAT_NAMES = ("F32", "F16", "BF16")  # dtypes of scales and master weights
ROWS = 1 << 18  # weights decoded at a time, in whole rows


# rows [first, last) of a logical tensor -> (last - first, cols) in its dtype
Decode = Callable[[int, int], Tensor]


@dataclass
class Imported(Checkpoint):
    """A checkpoint whose ternary weights are stored in a format of others.

    format       what it is, for people and for the record
    scale        what its scale means and how a weight is computed, likewise
    raw          the checkpoint as it is stored; None where a reader needs none
    decode       logical name -> how its rows are read; other tensors are read from `raw`
    group_sizes  logical name -> the groups in which it is ternary at the source, as in `Ternary`;
                 a weight that is not here is dense at the source, and stays so; with none at all it
                 is an ordinary checkpoint in a format of others
    activations  what the model was trained with: "none", or "int8" per token
    alone        whether the small files beside the weights are not the model's
    made         small files that the reader makes, unless they are there: name -> content
    ternary_ends tensors that become ternary by themselves if they are the output head or the token
                 embedding, which are kept otherwise
    """

    format: str = ""
    scale: str = ""
    raw: Checkpoint | None = None
    decode: dict[str, Decode] = field(default_factory=dict, repr=False)
    group_sizes: dict[str, int] = field(default_factory=dict, repr=False)
    activations: str = "none"
    alone: bool = False
    made: dict[str, bytes] = field(default_factory=dict, repr=False)
    ternary_ends: set[str] = field(default_factory=set, repr=False)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None
    ) -> Tensor:
        """As `Checkpoint.read`: elements of the logical tensor."""
        info = self.tensors[name]
        if name not in self.decode:
            assert self.raw is not None
            return self.raw.read(name, start, stop, buffer)
        stop, cols = info.numel if stop is None else stop, max(1, info.shape[-1])
        first, last = start // cols, -(-stop // cols)
        found = torch.empty(last - first, cols, dtype=DTYPES[info.dtype])
        step = max(1, ROWS // cols)  # a few rows at a time: decoding takes more than its result
        for at in range(first, last, step):
            end = min(at + step, last)
            found[at - first : end - first] = self.decode[name](at, end)
        return found.view(-1)[start - first * cols : stop - first * cols]

    def renamed(self, names: Mapping[str, str]) -> "Imported":
        """As `Checkpoint.renamed`: the logical tensors under other names."""
        found = super().renamed(names)
        assert isinstance(found, Imported)
        found.decode = {names[old]: how for old, how in self.decode.items()}
        found.group_sizes = {names[old]: size for old, size in self.group_sizes.items()}
        found.ternary_ends = {names[old] for old in self.ternary_ends}
        if self.raw is not None:
            found.raw = self.raw.renamed({old: names.get(old, old) for old in self.raw.tensors})
        return found

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        if self.raw is None:
            return sum((self.directory / file).stat().st_size for file in self.files)
        return self.raw.stored_bytes

    def about(self) -> dict[str, Any]:
        """What the record of a conversion says of the import."""
        return {
            "format": self.format,
            "scale": self.scale,
            "activations": self.activations,
            "tensors": len(self.group_sizes),
            **({"notes": self.notes} if self.notes else {}),
        }


def imported(
    raw: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    decode: dict[str, Decode],
    group_sizes: dict[str, int],
    *,
    format: str,
    scale: str,
    activations: str = "none",
    ternary_ends: set[str] | None = None,
) -> Imported:
    """An import of the tensors of a directory, with a config.json that speaks of none."""
    config = {
        key: value
        for key, value in (raw.config or {}).items()
        if key not in ("quantization_config", "quantization")
    }
    return Imported(
        raw.directory,
        config,
        raw.files,
        dict(tensors),
        raw.metadata,
        raw.stream,
        stamps=raw.stamps,
        notes=raw.notes,
        format=format,
        scale=scale,
        raw=raw,
        decode=decode,
        group_sizes=group_sizes,
        activations=activations,
        ternary_ends=ternary_ends or set(),
    )


(
    REPAIR_CONFIG,
    USE_ORIGINAL,
    FETCH_AGAIN,
) = (  # what to do about a checkpoint that cannot be brought in
    "Repair config.json",
    "Convert the checkpoint it was made from",
    "Fetch it again, or from its maker",
)


def refuse(raw: Checkpoint, found: str, expected: str, remedy: str) -> CheckpointError:
    """The error for a foreign checkpoint that cannot be brought in exactly."""
    return CheckpointError(raw.directory, found, expected, remedy)


def quantized_layers(raw: Checkpoint, method: str, listed: Any) -> dict[str, tuple[int, int]]:
    """The weights of the layers that a method of transformers stands for, and their shapes.

    listed  modules_to_not_convert of its config

    Raises CheckpointError where nothing says which they are.
    """
    check_patterns(raw, "modules_to_not_convert", listed)
    layers = linear_layers(raw.config or {}, raw.tensors, listed)
    if isinstance(layers, str):
        found = f"{method}, but {layers}, so nothing says which layers it means"
        raise refuse(raw, found, "a model that transformers has", "Name the class")
    return layers


def expect(
    raw: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None
) -> TensorInfo:
    """A tensor that a format must have, with one of these dtypes and (unless None) this shape."""
    info = raw.tensors.get(name)
    wanted = f"{' or '.join(dtypes)}{'' if shape is None else f' {list(shape)}'}"
    if info is None:
        found = "is not there"
    elif info.dtype not in dtypes or (shape is not None and info.shape != shape):
        found = f"is {info.dtype} {list(info.shape)}"
    else:
        return info
    raise refuse(raw, f"{name} {found}", wanted, FETCH_AGAIN)


def check_patterns(raw: Checkpoint, key: str, patterns: Any) -> None:
    """Refuse what is no list of regular expressions under a key of config.json, which is not None.

    A string alone is none: transformers would take each letter for a pattern.
    """
    if patterns is None:
        return
    good = isinstance(patterns, list) and all(isinstance(each, str) for each in patterns)
    try:
        for pattern in patterns if good else ():
            re.compile(f"(?:{pattern})")
    except (re.error, OverflowError, RecursionError):
        good = False
    if not good:
        found = f"{key} of config.json is {str(patterns)[:80]!r}"
        raise refuse(raw, found, "a list of names or regular expressions", REPAIR_CONFIG)


def read_rows(raw: Checkpoint, name: str, first: int, last: int) -> Tensor:
    """Rows [first, last) of a stored matrix, as it is stored."""
    cols = raw.tensors[name].shape[-1]
    return raw.read(name, first * cols, last * cols).reshape(last - first, cols)
