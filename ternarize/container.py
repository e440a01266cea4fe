"""The container, version 1: a ternary matrix as entries of a safetensors file.

A ternary weight keeps its name, as U8 [rows, width] (codec base3), beside `<name>_scale`
[rows or 1, groups]. A reader that knows nothing of this fails loudly on the shape; a new name would
be ignored and the weight would be random. The file's `__metadata__` holds, under "ternarize", the
format version, the features a reader must know, and a record for each tensor: logical shape, group
size, codec, and a SHA-256 of the stored bytes, so that a file proves its own decode.

formats/container.md is the definition; here are its shipped writer and reader. Whatever comes from
a file is checked before it is used: `records_of` checks what the headers say, `check` the bytes
behind them.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternarize.checkpoint import Checkpoint, TensorInfo, byte_view, read_bytes, strict_json
from ternarize.codecs import THREADS, pack, packed_width, unpack, used_groups
from ternarize.errors import DigestError, FormatError, WeightError
from ternarize.tensor import Ternary, group_count

FORMAT_VERSION = 1
FEATURES: frozenset[str] = frozenset()  # required features that this version can read
KEY = "ternarize"  # in __metadata__, and the quant_method in config.json
CODEC = "base3"
SCALE_SUFFIX = "_scale"
SCALE_DTYPES = ("F16", "BF16", "F32")  # tried in this order
CHUNK = 1 << 22  # bytes read and hashed at a time

_TERNARY_MEMBERS = {"shape", "group_size", "codec", "transposed"}
_F16_NORMAL = (2.0**-14, 65504.0)  # below, float16 loses digits; above, it is infinite


@dataclass(frozen=True)
class Record:
    """What the metadata says of one tensor.

    shape        logical shape of a ternary tensor, (rows, cols) or (experts, rows, cols);
                 None for a tensor that is kept as it is
    group_size   as in ternarize.tensor
    codec        byte layout of the trits
    transposed   the source stores the matrix as (cols, rows)
    sha256       of the base-3 bytes followed by the scale bytes; of a kept tensor's bytes
    """

    sha256: str
    shape: tuple[int, ...] | None = None
    group_size: int = 0
    codec: str = CODEC
    transposed: bool = False

    def stored_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the packed tensor and of its scales."""
        assert self.shape is not None
        *stack, rows, cols = self.shape
        groups = group_count(cols, self.group_size)
        scale_rows = 1 if self.group_size == 0 else rows
        packed = (*stack, rows, packed_width(cols, self.group_size))
        return packed, (*stack, scale_rows, groups)


# --- writing ---------------------------------------------------------------------------------


def store_scales(scales: Tensor, *, exact: bool = False) -> Tensor:
    """Round float64 scales once, to nearest even, to the dtype in which they are stored.

    float16 if it holds all of them as normal numbers (or 0), else float32. With `exact`, the first
    of float16, bfloat16, float32 that holds every scale without rounding.

    Raises WeightError on a scale beyond float32, which only weights in float64 can have.
    """
    single = scales.to(torch.float32)
    if bool(single.isinf().any()):
        raise WeightError(
            f"scales: the largest is {float(scales.max()):.3g}; expected at most 3.4e38, the "
            "largest float32. Repair the source."
        )
    with np.errstate(over="ignore"):  # an infinite one is not chosen
        half = torch.from_numpy(scales.cpu().numpy().astype(np.float16))  # torch rounds twice here
    candidates = (half, scales.to(torch.bfloat16), single)
    if exact:
        return next(
            (c for c in candidates if torch.equal(c.to(torch.float64), scales.cpu())),
            candidates[-1],
        )
    positive = scales[scales > 0]
    if positive.numel() == 0:
        return half
    low, high = float(positive.min()), float(positive.max())
    return half if _F16_NORMAL[0] <= low and high <= _F16_NORMAL[1] else single


def encode(ternary: Ternary, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """A ternary tensor as it is stored: (packed uint8, scales float16, bfloat16 or float32)."""
    return pack(ternary.trits, ternary.group_size), store_scales(ternary.scales, exact=exact)


def digest(*tensors: Tensor) -> str:
    """SHA-256, in hex, of the tensors' bytes one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(byte_view(tensor).numpy().data)
    return sha.hexdigest()


def dump_metadata(records: Mapping[str, Record]) -> dict[str, str]:
    """The `__metadata__` of a file with these tensors; equal records give equal bytes."""
    tensors: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        entry: dict[str, Any] = {}
        if record.shape is not None:
            entry = {
                "shape": list(record.shape),
                "group_size": record.group_size,
                "codec": record.codec,
            }
            if record.transposed:
                entry["transposed"] = True
        tensors[name] = {**entry, "sha256": record.sha256}
    table = {"format_version": FORMAT_VERSION, "features": [], "tensors": tensors}
    return {"format": "pt", KEY: json.dumps(table, separators=(",", ":"))}


# --- reading ---------------------------------------------------------------------------------


def records_of(checkpoint: Checkpoint, *, whole: bool = True) -> dict[str, Record]:
    """The records in a packed checkpoint's metadata, checked against each other and the headers.

    whole  False for one shard read by itself: the tensors of other shards are missing

    Raises FormatError: a file without metadata, a version or feature that is not known, a record
    that is malformed or without its tensor, a tensor without a record, or one whose dtype or shape
    disagrees with it.
    """
    records: dict[str, Record] = {}
    scales = set()
    for file in checkpoint.files:
        for name, value in _table(file, checkpoint.metadata.get(file, {})).items():
            info = checkpoint.tensors.get(name)
            if info is None and whole:
                raise _damaged(file, f"{name} has a record, but no file has the tensor")
            if info is None and _is_ternary(value):
                scales.add(name + SCALE_SUFFIX)  # they may be here, away from their tensor
            if info is not None and info.file == file:  # a copy in another file does not count
                records[name] = _record(f"{file}: {name}", value)
    for name, record in records.items():
        if record.shape is not None:
            _check_stored(name, record, checkpoint.tensors)
            scales.add(name + SCALE_SUFFIX)
    for name, info in checkpoint.tensors.items():
        if (name in scales) == (name in records):
            what = "is a scale and has a record" if name in scales else "has no record"
            raise _damaged(info.file, f"{name} {what}; expected one record for each tensor")
    return records


def _table(file: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The table of records of one file, as parsed; version and features checked."""
    if KEY not in metadata:
        raise FormatError(
            f"{file}: no {KEY!r} in its metadata; expected a packed checkpoint. "
            "Pack the model with `ternarize convert`."
        )
    try:
        table = strict_json(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its ternarize metadata is not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise _damaged(file, "its ternarize metadata is not an object")
    check_version(file, table.get("format_version"), table.get("features"))
    tensors = table.get("tensors")
    if not isinstance(tensors, dict):
        raise _damaged(file, "its ternarize metadata has no table of tensors")
    return tensors


def check_version(where: str, version: Any, features: Any) -> None:
    """Refuse what only a newer reader understands; raises FormatError."""
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{where}: format version {version!r}; this reader knows version {FORMAT_VERSION}. "
            "Install a newer ternarize."
        )
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise _damaged(where, f"features is {features!r}; expected a list of names")
    unknown = sorted(set(features) - FEATURES)
    if unknown:
        raise FormatError(
            f"{where}: needs the feature {', '.join(unknown)}, which this reader does not know. "
            "Install a newer ternarize."
        )


def decode(packed: Tensor, scales: Tensor, record: Record) -> Ternary:
    """The ternary tensor behind stored bytes; the inverse of `encode`.

    packed, scales  as stored, in the shapes of `record.stored_shapes()`

    Raises FormatError on an invalid code, padding or scale. Does not check the digest.
    """
    assert record.shape is not None
    trits = unpack(packed, record.shape[-1], record.group_size)
    used = used_groups(packed, record.shape[-1], record.group_size)
    _check_scales(scales, used, record.group_size)
    return Ternary(trits, scales.to(torch.float64), record.group_size)


def check(
    checkpoint: Checkpoint,
    records: Mapping[str, Record],
    *,
    threads: int = THREADS,
    done: Callable[[str], None] | None = None,
) -> None:
    """Verify the data of a packed checkpoint: every code, padding, scale and digest.

    records  from `records_of`
    done     called with the name of each tensor that has been checked

    Tensors are read, hashed and checked in parallel, a piece at a time. Raises FormatError or its
    child DigestError, naming the file and the tensor.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:
            for name in pool.map(lambda n: _check_tensor(checkpoint, n, records[n]), records):
                if done:
                    done(name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_tensor(checkpoint: Checkpoint, name: str, record: Record) -> str:
    sha = hashlib.sha256()
    info = checkpoint.tensors[name]
    path = checkpoint.directory / info.file
    used = []
    try:
        for offset, size in _pieces(info.nbytes, info.shape[-1] if record.shape else None):
            piece = read_bytes(path, info.start + offset, size)
            sha.update(piece.numpy().data)
            if record.shape is not None:
                rows = piece.view(-1, info.shape[-1])
                used.append(used_groups(rows, record.shape[-1], record.group_size, threads=1))
        if record.shape is not None:
            scales = checkpoint.read(name + SCALE_SUFFIX)
            sha.update(byte_view(scales).numpy().data)
            groups = (*record.shape[:-1], group_count(record.shape[-1], record.group_size))
            _check_scales(
                scales.reshape(checkpoint.tensors[name + SCALE_SUFFIX].shape),
                torch.cat(used).view(groups) if used else torch.zeros(groups, dtype=torch.bool),
                record.group_size,
            )
    except FormatError as error:
        raise type(error)(f"{info.file}: {name}: {error}") from None
    if sha.hexdigest() != record.sha256:
        raise DigestError(
            f"{info.file}: {name}: its SHA-256 is {sha.hexdigest()[:12]}..., the record says "
            f"{record.sha256[:12]}...; the bytes have changed since they were written. "
            "Fetch the file again."
        )
    return name


def _pieces(nbytes: int, row: int | None) -> Iterable[tuple[int, int]]:
    """Cut `nbytes` into (offset, size) of about CHUNK bytes, in whole rows of `row` bytes."""
    step = CHUNK if not row else max(1, CHUNK // row) * row
    return ((at, min(step, nbytes - at)) for at in range(0, nbytes, step))


def _check_scales(scales: Tensor, used: Tensor, group_size: int) -> None:
    """scales: as stored; used (..., rows, groups): which groups have non-zero trits."""
    if group_size == 0:
        used = used.flatten(-2).any(-1)[..., None, None]
    # non-negative floats are ordered like their bits, and infinity is the first that is not finite
    integer = torch.int32 if scales.dtype == torch.float32 else torch.int16
    bits = scales.contiguous().view(integer)
    infinity = torch.tensor(torch.inf, dtype=scales.dtype).view(integer)
    if bool(((bits >= 0) & (bits < infinity) & ((bits != 0) == used)).all()):
        return
    values = scales.to(torch.float64)
    rules = (
        (~values.isfinite(), "is not finite"),
        (values.signbit(), "is negative"),
        ((values == 0) & used, "is 0, but its group has trits other than zero"),
        ((values != 0) & ~used, "is not 0, but all trits of its group are zero"),
    )
    for bad, what in rules:
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise FormatError(
                f"scale at {at}: {float(values[tuple(at)])} {what}. "
                "The file is damaged: fetch it again."
            )


def _check_stored(name: str, record: Record, tensors: Mapping[str, TensorInfo]) -> None:
    packed, scale = tensors[name], tensors.get(name + SCALE_SUFFIX)
    packed_shape, scale_shape = record.stored_shapes()
    if packed.dtype != "U8" or packed.shape != packed_shape:
        raise _damaged(
            packed.file,
            f"{name} is {packed.dtype} {list(packed.shape)}; its record asks for "
            f"U8 {list(packed_shape)}",
        )
    if scale is None:
        raise _damaged(packed.file, f"{name} has no {name}{SCALE_SUFFIX} beside it")
    if scale.dtype not in SCALE_DTYPES or scale.shape != scale_shape:
        raise _damaged(
            scale.file,
            f"{name}{SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}; expected "
            f"{', '.join(SCALE_DTYPES)} {list(scale_shape)}",
        )


def _is_ternary(value: Any) -> bool:
    """Whether a record is that of a ternary tensor, well-formed or not."""
    return isinstance(value, dict) and not _TERNARY_MEMBERS.isdisjoint(value)


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise _damaged(where, f"its record is {value!r:.60}; expected an object")
    sha256 = value.get("sha256")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise _damaged(where, f"its sha256 is {sha256!r:.80}; expected 64 hex digits")
    if not _is_ternary(value):
        return Record(sha256)
    shape: Any = value.get("shape")
    group_size = value.get("group_size")
    codec, transposed = value.get("codec"), value.get("transposed", False)
    if not _is_matrix(shape):
        raise _damaged(where, f"its shape is {shape!r:.80}; expected two or three sizes")
    if type(group_size) is not int or not -1 <= group_size < 2**63:
        raise _damaged(where, f"its group_size is {group_size!r:.80}; expected -1, 0 or more")
    if codec != CODEC:
        raise FormatError(
            f"{where}: codec {codec!r}; this reader knows {CODEC!r}. Install a newer ternarize."
        )
    if "transposed" in value and transposed is not True:
        raise _damaged(where, f"its transposed is {transposed!r}; expected true, or nothing")
    return Record(sha256, tuple(shape), group_size, codec, transposed)


def _is_matrix(shape: Any) -> bool:
    """Whether a record's shape is [rows, cols] or [experts, rows, cols], with cols >= 1."""
    if not isinstance(shape, list) or len(shape) not in (2, 3):
        return False
    sizes = all(type(n) is int and n >= 0 for n in shape)
    return sizes and shape[-1] >= 1 and math.prod(max(1, n) for n in shape) <= 2**60


def _damaged(where: str, what: str) -> FormatError:
    return FormatError(f"{where}: {what}. The file is damaged: fetch it again.")
