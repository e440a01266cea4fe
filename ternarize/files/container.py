"""The container, version 1: a packed matrix as entries of a safetensors file.

A ternary weight keeps its name, as U8 [rows, width] (codec base3), beside `<name>_scale`
[rows or 1, groups]. A reader that knows nothing of this fails loudly on the shape; a new name would
be ignored and the weight would be random. The file's `__metadata__` holds, under "ternarize", the
format version, the features a reader must know, and a record for each tensor: logical shape, group
size, codec, and a SHA-256 of the stored bytes, so that a file proves its own decode.

Four features are written only where they are used: `scale8` (scales in 8 bits), `planes` (a weight
as the sum of two ternary matrices, whose rows lie one behind the other), `rotation` (a matrix that
meets rotated inputs) and `int8` (the codec of that name). Whatever the codec, rows stay
independent: what is done to rows of weights can be done to stored rows.

formats/container.md is the definition; here are its shipped writer and reader. Whatever comes from
a file is checked before it is used: `records_of` checks what the headers say, `check` the bytes
behind them.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import DigestError, FormatError
from ternarize.files.checkpoint import Checkpoint, TensorInfo, uncollected
from ternarize.files.headers import byte_view, read_bytes
from ternarize.files.json_files import strict_json
from ternarize.threads import THREADS, in_threads
from ternarize.trits.base3 import BASE3, pack, packed_width, unpack, used_groups
from ternarize.trits.int8 import INT8, dequantize_int8, int8_used
from ternarize.trits.rotation import BLOCKS, unrotate
from ternarize.trits.scales import scale_values, store_scales
from ternarize.trits.ternary import Ternary, group_count

FORMAT_VERSION = 1
SCALE8, PLANES, ROTATION = "scale8", "planes", "rotation"
FEATURES = frozenset(
    {SCALE8, PLANES, INT8, ROTATION}
)  # required features that this version can read
KEY = "ternarize"  # in __metadata__, and the quant_method in config.json
CODECS = {BASE3: "U8", INT8: "I8"}  # and the dtype in which each is stored
SCALE_SUFFIX = "_scale"
SCALE_DTYPES = {  # of scales that are floating-point numbers; a ternary tensor's can be U8, too
    BASE3: ("F16", "BF16", "F32"),
    INT8: ("F16", "F32"),
}
CHUNK = 1 << 22  # bytes read and hashed at a time
LONGEST = 2**63 - 1  # a group that is longer than this, and so than any row, is the row as well
_PACKED_MEMBERS = {"shape", "group_size", "codec", "transposed", "planes", "rotation"}


@dataclass(frozen=True)
class Record:
    """What the metadata says of one tensor.

    shape        logical shape of a packed tensor, (rows, cols) or (experts, rows, cols);
                 None for a tensor that is kept as it is
    group_size   as in ternarize.trits.ternary
    codec        byte layout of the weights: base3 (ternary) or int8
    transposed   the source stores the matrix as (cols, rows)
    sha256       of the packed bytes followed by the scale bytes; of a kept tensor's bytes
    planes       ternary matrices whose sum is the weight
    rotation     (block, seed) of the rotation of its input (ternarize.rotation); block 0: none
    scale8       its scales are in 8 bits, which their dtype says and no member of the record
    """

    sha256: str
    shape: tuple[int, ...] | None = None
    group_size: int = 0
    codec: str = BASE3
    transposed: bool = False
    planes: int = 1
    scale8: bool = False
    rotation: tuple[int, int] = (0, 0)

    @property
    def kind(self) -> str:
        """What a person is told: "ternary", "int8" or "kept"."""
        if self.shape is None:
            return "kept"
        return "ternary" if self.codec == BASE3 else self.codec

    @property
    def features(self) -> set[str]:
        """What a reader must know beyond version 1 to read this tensor."""
        if self.shape is None:
            return set()
        uses = {SCALE8: self.scale8, PLANES: self.planes > 1, INT8: self.codec == INT8}
        uses[ROTATION] = self.rotation[0] > 0
        return {feature for feature, used in uses.items() if used}

    def stored_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the packed tensor and of its scales."""
        assert self.shape is not None
        *stack, rows, cols = self.shape
        groups = group_count(cols, self.group_size)
        scale_rows = 1 if self.group_size == 0 else rows
        width = cols if self.codec == INT8 else self.planes * packed_width(cols, self.group_size)
        return (*stack, rows, width), (*stack, scale_rows, self.planes * groups)


def encode(*planes: Ternary, exact: bool = False, bits: int = 16) -> tuple[Tensor, Tensor]:
    """A ternary tensor as it is stored: packed uint8, and scales as `store_scales` gives them.

    planes  matrices of the same shape and group size whose sum is the weight; usually one
    """
    scales = join_planes([plane.scales for plane in planes])
    return pack_planes(*planes), store_scales(scales, exact=exact, bits=bits)


def pack_planes(*planes: Ternary, threads: int = THREADS) -> Tensor:
    """The stored bytes of the trits alone."""
    group_size = planes[0].group_size
    return join_planes([pack(plane.trits, group_size, threads) for plane in planes])


def join_planes(parts: Sequence[Tensor]) -> Tensor:
    """Rows of packed bytes or of scales, those of the planes one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def digest(*tensors: Tensor) -> str:
    """SHA-256, in hex, of the tensors' bytes one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(byte_view(tensor).numpy().data)
    return sha.hexdigest()


def dump_metadata(records: Mapping[str, Record], *, recorded: bool = False) -> dict[str, str]:
    """The `__metadata__` of a file with these tensors; equal records give equal bytes.

    recorded  the record of the conversion lists the digests of this file, until it is saved again
    """
    tensors: dict[str, dict[str, Any]] = {}
    features: set[str] = set()
    for name, record in records.items():
        features |= record.features
        entry: dict[str, Any] = {}
        if record.shape is not None:
            entry = {
                "shape": list(record.shape),
                "group_size": record.group_size,
                "codec": record.codec,
            }
            if record.planes > 1:
                entry["planes"] = record.planes
            if record.rotation[0]:
                block, seed = record.rotation
                entry["rotation"] = {"block": block, "seed": seed}
            if record.transposed:
                entry["transposed"] = True
        tensors[name] = {**entry, "sha256": record.sha256}
    table = {
        "format_version": FORMAT_VERSION,
        "sealed": True,  # that there is a digest at the end
        **({"recorded": True} if recorded else {}),
        "features": sorted(features),
        "tensors": tensors,
    }
    text = json.dumps(table, separators=(",", ":")).removesuffix("}")
    return {"format": "pt", KEY: text + _seal(hashlib.sha256(text.encode()).hexdigest())}


def _seal(digest: str) -> str:
    """The end of the metadata, with the digest of all before it."""
    return f',"sha256":"{digest}"}}'


@uncollected()
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
        features, table = _table(file, checkpoint.metadata.get(file, {}))
        for name, value in table.items():
            info = checkpoint.tensors.get(name)
            if info is None and whole:
                raise _damaged(file, f"{name} has a record, but no file has the tensor")
            if info is None and _is_packed(value):
                scales.add(name + SCALE_SUFFIX)  # they may be here, away from their tensor
            if info is not None and info.file == file:  # a copy in another file does not count
                scale = checkpoint.tensors.get(name + SCALE_SUFFIX)
                record = _record(f"{file}: {name}", value)
                if record.shape is not None and scale is not None and scale.dtype == "U8":
                    record = replace(record, scale8=True)
                records[name] = record
                for feature in sorted(record.features - features):
                    raise _damaged(file, f"{name} uses {feature!r}, which is not in the features")
    for name, record in records.items():
        if record.shape is not None:
            _check_stored(name, record, checkpoint.tensors)
            scales.add(name + SCALE_SUFFIX)
    for name, info in checkpoint.tensors.items():
        if (name in scales) == (name in records):
            what = "is a scale and has a record" if name in scales else "has no record"
            raise _damaged(info.file, f"{name} {what}; expected one record for each tensor")
    return records


def _table(file: str, metadata: Mapping[str, str]) -> tuple[set[str], dict[str, Any]]:
    """The features and the table of records of one file, as parsed; version, features checked."""
    if KEY not in metadata:
        raise FormatError(
            file,
            f"no {KEY!r} in its metadata",
            "a packed checkpoint",
            "Pack the model with `ternarize convert`",
        )
    try:
        table = strict_json(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its ternarize metadata is not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise _damaged(file, "its ternarize metadata is not an object")
    check_version(file, table.get("format_version"), table.get("features"))
    if not table.keys().isdisjoint({"sealed", "sha256"}):  # without them it is not sealed
        text, said = metadata[KEY], table.get("sha256")
        end = _seal(str(said))
        digest = hashlib.sha256(text.removesuffix(end).encode()).hexdigest()
        if not text.endswith(end) or digest != said:
            raise DigestError(
                file,
                f"its ternarize metadata has another SHA-256 than it says ({str(said)[:12]!r}); "
                "it has changed since it was written",
                remedy="Fetch the file again",
            )
    tensors = table.get("tensors")
    if not isinstance(tensors, dict):
        raise _damaged(file, "its ternarize metadata has no table of tensors")
    return set(table["features"]), tensors


def check_listed(where: str, table: Any, records: Mapping[str, Record], packed: Checkpoint) -> None:
    """Raise DigestError where a tensor is not the one that the record of the conversion lists.

    where  name of the record, for messages
    table  its table of tensors; what it does not list is not compared

    Every file proves itself; that all of them are of one conversion is known by this alone. A model
    that has been saved again says in no file that the record speaks of it.
    """
    said = {file: strict_json(packed.metadata[file][KEY]).get("recorded") for file in packed.files}
    if not isinstance(table, dict) or True not in said.values():
        return
    for name, row in table.items():
        digest = row.get("sha256") if isinstance(row, dict) else None
        if digest is None or name not in records:
            continue
        file = packed.tensors[name].file
        if said[file] is not True or digest != records[name].sha256:
            raise DigestError(
                f"{file}: {name}",
                f"is not the tensor that {where} lists",
                "files of one conversion",
                "Fetch the checkpoint again",
            )


def check_format(checkpoint: Checkpoint) -> None:
    """Raise FormatError where a file of a model does not say for whom it is, as all writers do."""
    for file in checkpoint.files:
        said = checkpoint.metadata[file].get("format")
        if said != "pt":
            raise FormatError(
                file,
                f"its metadata has the format {said!r:.80}",
                "'pt', by which other programs know it",
                "Fetch the file again",
            )


def check_version(where: str, version: Any, features: Any) -> None:
    """Refuse what only a newer reader understands; raises FormatError."""
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            where,
            f"format version {version!r}; this reader knows version {FORMAT_VERSION}",
            remedy="Install a newer ternarize",
        )
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise _damaged(where, f"features is {features!r}; expected a list of names")
    unknown = sorted(set(features) - FEATURES)
    if unknown:
        raise FormatError(
            where,
            f"needs the feature {', '.join(unknown)}, which this reader does not know",
            remedy="Install a newer ternarize",
        )


def decode(packed: Tensor, scales: Tensor, record: Record) -> Ternary:
    """The ternary tensor behind stored bytes; the inverse of `encode`, for one plane.

    packed, scales  as stored, in the shapes of `record.stored_shapes()`

    Raises FormatError on an invalid code, padding or scale. Does not check the digest.
    """
    (plane,) = decode_planes(packed, scales, record)
    return plane


def decode_planes(packed: Tensor, scales: Tensor, record: Record) -> tuple[Ternary, ...]:
    """The ternary matrices behind stored bytes, whose sum is the weight; see `decode`."""
    assert record.shape is not None and record.codec == BASE3
    _check_scales(scales, _used(packed, record), record)
    matrices = split_planes(packed, record.planes)
    values = split_planes(scale_values(scales, torch.float64), record.planes)
    return tuple(
        Ternary(unpack(trits, record.shape[-1], record.group_size), scale, record.group_size)
        for trits, scale in zip(matrices, values, strict=True)
    )


def split_planes(stored: Tensor, planes: int) -> tuple[Tensor, ...]:
    """The inverse of `join_planes`."""
    return stored.chunk(planes, -1) if planes > 1 else (stored,)


def dequantize(packed: Tensor, scales: Tensor, record: Record) -> Tensor:
    """The dense float32 weight behind stored bytes of any codec; see `decode`.

    base3   sum over planes of scale * trit, the sum rounded to float32; of a rotated matrix,
            that times the inverse of the rotation
    int8    scale * q, rounded to float32
    """
    assert record.shape is not None
    if record.codec == BASE3:
        planes = decode_planes(packed, scales, record)
        dense = planes[0].dequantize()
        for plane in planes[1:]:
            dense = dense + plane.dequantize()
        turned = record.rotation[0] and dense.numel()  # of no rows, cols can be any number
        return unrotate(dense, *record.rotation) if turned else dense
    _check_scales(scales, _used(packed, record), record)
    count = math.prod(record.shape[:-2])
    matrices = zip(
        packed.reshape(count, *record.shape[-2:]),
        scales.reshape(count, *scales.shape[-2:]),
        strict=True,
    )
    parts = [dequantize_int8(q, scale, record.group_size, torch.float32) for q, scale in matrices]
    return (torch.stack(parts) if parts else torch.empty(0)).view(record.shape)


def _used(packed: Tensor, record: Record, threads: int = THREADS) -> Tensor:
    """Check stored rows (..., width); returns (..., planes * groups): which groups are not zero."""
    assert record.shape is not None
    if record.codec == INT8:
        return int8_used(packed.view(torch.int8), record.group_size)
    planes = torch.unflatten(packed, -1, (record.planes, -1))
    return used_groups(planes, record.shape[-1], record.group_size, threads).flatten(-2)


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
    in_threads(lambda name: _check_tensor(checkpoint, name, records[name]), records, threads, done)


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
                used.append(_used(piece.view(-1, info.shape[-1]), record, threads=1))
        if record.shape is not None:
            scales = checkpoint.read(name + SCALE_SUFFIX)
            sha.update(byte_view(scales).numpy().data)
            shape = checkpoint.tensors[name + SCALE_SUFFIX].shape
            groups = (*record.shape[:-1], shape[-1])
            _check_scales(
                scales.reshape(shape),
                torch.cat(used).view(groups) if used else torch.zeros(groups, dtype=torch.bool),
                record,
            )
    except FormatError as error:
        raise type(error)(f"{info.file}: {name}: {error}") from None
    if sha.hexdigest() != record.sha256:
        raise DigestError(
            f"{info.file}: {name}",
            f"its SHA-256 is {sha.hexdigest()[:12]}..., the record says {record.sha256[:12]}...; "
            "the bytes have changed since they were written",
            remedy="Fetch the file again",
        )
    return name


def _pieces(nbytes: int, row: int | None) -> Iterable[tuple[int, int]]:
    """Cut `nbytes` into (offset, size) of about CHUNK bytes, in whole rows of `row` bytes."""
    step = CHUNK if not row else max(1, CHUNK // row) * row
    return ((at, min(step, nbytes - at)) for at in range(0, nbytes, step))


def _check_scales(scales: Tensor, used: Tensor, record: Record) -> None:
    """scales: as stored; used (..., rows, planes * groups): which groups have non-zero weights."""
    if record.group_size == 0:
        used = used.any(-2, keepdim=True)
    if scales.dtype == torch.uint8:
        no_number = (scales != 0) & ((scales < 8) | (scales > 247))
        if bool(no_number.any()):
            at = no_number.nonzero()[0].tolist()
            raise FormatError(
                f"scale at {at}",
                f"{int(scales[tuple(at)])} is no code of a scale",
                "0 or 8..247",
                "The file is damaged: fetch it again",
            )
        scales = scale_values(scales)
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
        ((values == 0) & used, "is 0, but its group has weights other than zero"),
        ((values != 0) & ~used, "is not 0, but all weights of its group are zero"),
    )
    for bad, what in rules:
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise FormatError(
                f"scale at {at}",
                f"{float(values[tuple(at)])} {what}",
                remedy="The file is damaged: fetch it again",
            )


def _check_stored(name: str, record: Record, tensors: Mapping[str, TensorInfo]) -> None:
    packed, scale = tensors[name], tensors.get(name + SCALE_SUFFIX)
    packed_shape, scale_shape = record.stored_shapes()
    dtype, scale_dtypes = CODECS[record.codec], SCALE_DTYPES[record.codec]
    if record.scale8 and record.codec == BASE3:
        scale_dtypes = ("U8",)
    if packed.dtype != dtype or packed.shape != packed_shape:
        raise _damaged(
            packed.file,
            f"{name} is {packed.dtype} {list(packed.shape)}; its record asks for "
            f"{dtype} {list(packed_shape)}",
        )
    if scale is None:
        raise _damaged(packed.file, f"{name} has no {name}{SCALE_SUFFIX} beside it")
    if scale.dtype not in scale_dtypes or scale.shape != scale_shape:
        raise _damaged(
            scale.file,
            f"{name}{SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}; expected "
            f"{', '.join(scale_dtypes)} {list(scale_shape)}",
        )


def _is_packed(value: Any) -> bool:
    """Whether a record is that of a packed tensor, well-formed or not."""
    return isinstance(value, dict) and not _PACKED_MEMBERS.isdisjoint(value)


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise _damaged(where, f"its record is {value!r:.60}; expected an object")
    sha256 = value.get("sha256")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise _damaged(where, f"its sha256 is {sha256!r:.80}; expected 64 hex digits")
    if not _is_packed(value):
        return Record(sha256)
    shape: Any = value.get("shape")
    group_size = value.get("group_size")
    codec, transposed = value.get("codec"), value.get("transposed", False)
    if not _is_matrix(shape):
        raise _damaged(where, f"its shape is {shape!r:.80}; expected two or three sizes")
    if type(group_size) is not int or group_size < -1:
        raise _damaged(where, f"its group_size is {group_size!r:.80}; expected -1, 0 or more")
    group_size = min(group_size, LONGEST)
    if not isinstance(codec, str) or codec not in CODECS:
        raise FormatError(
            where,
            f"codec {codec!r}; this reader knows {', '.join(CODECS)}",
            remedy="Install a newer ternarize",
        )
    if "transposed" in value and transposed is not True:
        raise _damaged(where, f"its transposed is {transposed!r}; expected true, or nothing")
    planes = value.get("planes", 2)
    if type(planes) is not int or planes != 2 or ("planes" in value and codec != BASE3):
        raise _damaged(where, f"its planes is {planes!r} in codec {codec}; expected 2 in base3")
    planes = planes if "planes" in value else 1
    rotation = (0, 0) if "rotation" not in value else _rotation(where, value["rotation"], shape[-1])
    if rotation[0] and codec != BASE3:
        raise _damaged(where, f"its rotation is {rotation} in codec {codec}; expected base3")
    return Record(sha256, tuple(shape), group_size, codec, transposed, planes, rotation=rotation)


def _rotation(where: str, value: Any, cols: int) -> tuple[int, int]:
    if isinstance(value, dict) and set(value) >= {"block", "seed"}:
        block, seed = value["block"], value["seed"]
        known = type(block) is int and block in BLOCKS and cols % block == 0
        if known and type(seed) is int and 0 <= seed < 2**32:
            return block, seed
    raise _damaged(
        where,
        f"its rotation is {value!r:.80}; expected a block of {', '.join(map(str, BLOCKS))} that "
        f"divides {cols}, and a seed below 2^32",
    )


def _is_matrix(shape: Any) -> bool:
    """Whether a record's shape is [rows, cols] or [experts, rows, cols], with cols >= 1."""
    if not isinstance(shape, list) or len(shape) not in (2, 3):
        return False
    sizes = all(type(n) is int and n >= 0 for n in shape)
    return sizes and shape[-1] >= 1 and math.prod(max(1, n) for n in shape) <= 2**60


def _damaged(where: str, what: str) -> FormatError:
    return FormatError(where, f"{what}", remedy="The file is damaged: fetch it again")
