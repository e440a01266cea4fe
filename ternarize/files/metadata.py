"""The container, version 1: what a packed file says of its tensors.

A ternary weight keeps its name, as U8 [rows, width] (codec base3), beside `<name>_scale`
[rows or 1, groups]. A reader that knows nothing of this fails loudly on the shape; a new name would
be ignored and the weight would be random. The file's `__metadata__` holds, under "ternarize", the
format version, the features a reader must know, and a record for each tensor: logical shape, group
size, codec, and a SHA-256 of the stored bytes, so that a file proves its own decode.

Seven features are written only where they are used: `scale8` (scales in 8 bits), `planes` (a weight
as the sum of two ternary matrices, whose rows lie one behind the other), `rotation` (a matrix that
meets rotated inputs), `int8` and `int4` (the codecs of these names), `rans` (bytes and scales that
are coded by their frequencies), `kernel` (a matrix whose rows are the kernels of a convolution).

formats/container.md is the definition; here are its shipped writer and reader. Whatever comes from
a file is checked before it is used: against the headers here, its bytes in container.py.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ternarize.errors import DigestError, FormatError, damaged
from ternarize.files.checkpoint import Checkpoint, TensorInfo, uncollected
from ternarize.files.entropy import Coded
from ternarize.files.headers import Header
from ternarize.files.json_files import strict_json
from ternarize.trits.base3 import BASE3, packed_width
from ternarize.trits.int4 import INT4, int4_width
from ternarize.trits.int8 import INT8
from ternarize.trits.rans import CHUNK
from ternarize.trits.rotation import BLOCKS
from ternarize.trits.ternary import group_count

FORMAT_VERSION = 1
SCALE8, PLANES, ROTATION, RANS, KERNEL = "scale8", "planes", "rotation", "rans", "kernel"
FEATURES = frozenset(
    {SCALE8, PLANES, INT8, INT4, ROTATION, RANS, KERNEL}
)  # those that this version can read
KEY = "ternarize"  # in __metadata__, and the quant_method in config.json
CODECS = {BASE3: "U8", INT8: "I8", INT4: "U8"}  # and the dtype in which each is stored
SCALE_SUFFIX = "_scale"
SCALE_DTYPES = {  # of scales that are floating-point numbers; a ternary tensor's can be U8, too
    BASE3: ("F16", "BF16", "F32"),
    INT8: ("F16", "F32"),
    INT4: ("F16", "F32"),
}
LONGEST_GROUP = 2**63 - 1  # one that is longer than this, and so than any row, is the row as well
_PACKED_MEMBERS = {"shape", "group_size", "codec", "transposed", "planes", "rotation", "coding"}
_PACKED_MEMBERS |= {"kernel"}


@dataclass(frozen=True)
class Record:
    """What the metadata says of one tensor.

    shape        logical shape of a packed tensor, (rows, cols) or (experts, rows, cols);
                 None for a tensor that is kept as it is
    group_size   as in trits/ternary.py
    codec        byte layout of the weights: base3 (ternary), int8 or int4
    transposed   the source stores the matrix as (cols, rows)
    sha256       of the packed bytes followed by the scale bytes; of a kept tensor's bytes
    planes       ternary matrices whose sum is the weight
    rotation     (block, seed) of the rotation of its input (trits/rotation.py); block 0: none
    scale8       its scales are in 8 bits, which their dtype says and no member of the record
    coded        it is stored as a stream (rans.md)
    coded_scales the dtype of its scales where they are a stream, too, which does not say it; or ""
    kernel       of a convolution: (in, height, width), of which cols is the product: the source
                 stores the matrix as (rows, *kernel); () of other matrices
    """

    sha256: str
    shape: tuple[int, ...] | None = None
    group_size: int = 0
    codec: str = BASE3
    transposed: bool = False
    planes: int = 1
    scale8: bool = False
    rotation: tuple[int, int] = (0, 0)
    coded: bool = False
    coded_scales: str = ""
    kernel: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """What a person is told: "ternary", "int8", "int4" or "kept"."""
        if self.shape is None:
            return "kept"
        return "ternary" if self.codec == BASE3 else self.codec

    @property
    def features(self) -> set[str]:
        """What a reader must know beyond version 1 to read this tensor."""
        if self.shape is None:
            return set()
        uses = {SCALE8: self.scale8, PLANES: self.planes > 1, ROTATION: self.rotation[0] > 0}
        uses |= {RANS: self.coded, KERNEL: self.kernel != ()}
        uses |= {codec: self.codec == codec for codec in (INT8, INT4)}
        return {feature for feature, used in uses.items() if used}

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the weight that a packed tensor stands for, not transposed."""
        assert self.shape is not None
        return (*self.shape[:-1], *self.kernel) if self.kernel else self.shape

    def stored_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the packed tensor and of its scales."""
        assert self.shape is not None
        *stack, rows, cols = self.shape
        groups = group_count(cols, self.group_size)
        scale_rows = 1 if self.group_size == 0 else rows
        width = self.planes * packed_width(cols, self.group_size)
        if self.codec != BASE3:
            width = cols if self.codec == INT8 else int4_width(cols, self.group_size)
        return (*stack, rows, width), (*stack, scale_rows, self.planes * groups)

    def uncoded(self) -> "Record":
        """The record of the same tensor without streams."""
        return replace(self, coded=False, coded_scales="")

    @property
    def can_be_coded(self) -> bool:
        """Whether its rows are short enough to be stored in streams, with scales of any type."""
        packed, scales = self.stored_shapes()
        return max(packed[-1], 4 * scales[-1]) <= CHUNK

    def streams(self, name: str) -> dict[str, Coded]:
        """How streams are read, by name: of a tensor that is stored as one, and of its scales."""
        if not self.coded or self.shape is None:
            return {}
        packed, scales = self.stored_shapes()
        trits = self.shape[-1], self.group_size, self.planes
        found = {name: Coded(CODECS[self.codec], packed, trits)}
        if self.coded_scales:
            found[name + SCALE_SUFFIX] = Coded(self.coded_scales, scales)
        return found


def dump_metadata(records: Mapping[str, Record], *, recorded: bool = False) -> dict[str, str]:
    """The `__metadata__` of a file with these tensors; equal records give equal bytes.

    recorded  the record of the conversion lists the digests of this file, until it is saved again
    """
    features = {feature for record in records.values() for feature in record.features}
    table = {
        "format_version": FORMAT_VERSION,
        "sealed": True,  # that there is a digest at the end
        **({"recorded": True} if recorded else {}),
        "features": sorted(features),
        "tensors": {name: _members(record) for name, record in records.items()},
    }
    text = json.dumps(table, separators=(",", ":")).removesuffix("}")
    return {"format": "pt", KEY: text + _seal(hashlib.sha256(text.encode()).hexdigest())}


def _members(record: Record) -> dict[str, Any]:
    """A record as it is written; what is as usual is left out."""
    if record.shape is None:
        return {"sha256": record.sha256}
    block, seed = record.rotation
    return {
        "shape": list(record.shape),
        "group_size": record.group_size,
        "codec": record.codec,
        **({"planes": record.planes} if record.planes > 1 else {}),
        **({"rotation": {"block": block, "seed": seed}} if block else {}),
        **({"transposed": True} if record.transposed else {}),
        **({"kernel": list(record.kernel)} if record.kernel else {}),
        **({"coding": RANS} if record.coded else {}),
        **({"scale_dtype": record.coded_scales} if record.coded_scales else {}),
        "sha256": record.sha256,
    }


def _seal(digest: str) -> str:
    """The end of the metadata, with the digest of all before it."""
    return f',"sha256":"{digest}"}}'


@uncollected()
def records_of(checkpoint: Checkpoint, *, whole: bool = True) -> dict[str, Record]:
    """The records in a packed checkpoint's metadata, checked; its streams are read from then on.

    They are checked against each other and the headers.

    whole  False for one shard read by itself: the tensors of other shards are missing

    From here on `checkpoint.tensors` has what streams hold in their place, and `read` gives that.

    Raises FormatError: a file without metadata, a version or feature that is not known, a record
    that is malformed or without its tensor, a tensor without a record, or one whose dtype or shape
    disagrees with it.
    """
    records: dict[str, Record] = {}
    scales = set()
    for file in checkpoint.files:
        features, table = _parse_metadata(file, checkpoint.metadata.get(file, {}))
        for name, value in table.items():
            info = checkpoint.tensors.get(name)
            if info is None and whole:
                raise damaged(file, f"{name} has a record, but no file has the tensor")
            if info is None and _says_packed(value):
                scales.add(name + SCALE_SUFFIX)  # they may be here, away from their tensor
            if info is not None and info.file == file:  # a copy in another file does not count
                record = _parse_record(f"{file}: {name}", value)
                _take_streams(name, record, checkpoint)
                scale = checkpoint.tensors.get(name + SCALE_SUFFIX)
                if record.shape is not None and scale is not None and scale.dtype == "U8":
                    record = replace(record, scale8=True)
                records[name] = record
                for feature in sorted(record.features - features):
                    raise damaged(file, f"{name} uses {feature!r}, which is not in the features")
    for name, record in records.items():
        if record.shape is not None:
            _check_stored(name, record, checkpoint.tensors)
            scales.add(name + SCALE_SUFFIX)
    for name, info in checkpoint.tensors.items():
        if (name in scales) == (name in records):
            what = "is a scale and has a record" if name in scales else "has no record"
            raise damaged(info.file, f"{name} {what}", "one record for each tensor")
    return records


def coded_tensors(file: str, header: Header) -> dict[str, Coded]:
    """The tensors of a packed file that are stored as streams, by name, scales included."""
    found: dict[str, Coded] = {}
    features, table = _parse_metadata(file, header.metadata)
    for name in header.entries.keys() & table.keys() if RANS in features else ():
        found |= _parse_record(f"{file}: {name}", table[name]).streams(name)
    return found


def _take_streams(name: str, record: Record, checkpoint: Checkpoint) -> None:
    """Put what the streams of a tensor hold in their place; FormatError where they are none."""
    file = checkpoint.tensors[name].file
    for each, stream in record.streams(name).items():
        info = checkpoint.tensors.get(each)
        if info is None or info.file != file:
            raise damaged(file, f"{name} is coded and has no {each} beside it")
        if info.coded == stream:  # taken before
            continue
        if not math.prod(stream.shape[:-1]) and info.nbytes:
            raise damaged(file, f"{each} has {info.nbytes} bytes of no rows")
        if info.dtype != "U8" or len(info.shape) != 1:
            found = f"{each} is {info.dtype} {list(info.shape)}"
            raise damaged(file, found, "U8 [bytes], as its record says")
        if info.nbytes < stream.least:  # before there is memory for what the record promises
            found = f"{each} has {info.nbytes} bytes for a stream of {list(stream.shape)}"
            raise damaged(file, found, f"at least {stream.least}, as formats/rans.md has it")
        checkpoint.tensors[each] = replace(
            info, dtype=stream.dtype, shape=stream.shape, coded=stream, stored=info.nbytes
        )


def _parse_metadata(file: str, metadata: Mapping[str, str]) -> tuple[set[str], dict[str, Any]]:
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
        raise damaged(file, f"its ternarize metadata is not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise damaged(file, "its ternarize metadata is not an object")
    check_version(file, table.get("format_version"), table.get("features"))
    if not table.keys().isdisjoint({"sealed", "sha256"}):  # without them it is not sealed
        text, said = metadata[KEY], table.get("sha256")
        end = _seal(str(said))
        digest = hashlib.sha256(text.removesuffix(end).encode()).hexdigest()
        if not text.endswith(end) or digest != said:
            raise DigestError(
                file,
                "its ternarize metadata has changed since it was written",
                f"SHA-256 {str(said)[:12]!r}...",
                "Fetch the file again",
            )
    tensors = table.get("tensors")
    if not isinstance(tensors, dict):
        raise damaged(file, "its ternarize metadata has no table of tensors")
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


def check_version(
    where: str, version: Any, features: Any, known: frozenset[str] = FEATURES
) -> None:
    """Refuse what only a newer reader understands; raises FormatError."""
    if type(version) is not int or version != FORMAT_VERSION:
        raise _newer(where, f"format version {version!r}", f"version {FORMAT_VERSION}")
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise damaged(where, f"features is {features!r}", "a list of names")
    unknown = sorted(set(features) - known)
    if unknown:
        names = ", ".join(sorted(known)) or "none"
        expected = f"features that this reader knows: {names}"
        raise _newer(where, f"needs the feature {', '.join(unknown)}", expected)


def _newer(where: object, found: str, expected: str) -> FormatError:
    return FormatError(where, found, expected, "Install a newer ternarize")


def _check_stored(name: str, record: Record, tensors: Mapping[str, TensorInfo]) -> None:
    packed, scale = tensors[name], tensors.get(name + SCALE_SUFFIX)
    packed_shape, scale_shape = record.stored_shapes()
    dtype, scale_dtypes = CODECS[record.codec], SCALE_DTYPES[record.codec]
    if record.scale8 and record.codec == BASE3:
        scale_dtypes = ("U8",)
    if packed.dtype != dtype or packed.shape != packed_shape:
        raise damaged(
            packed.file,
            f"{name} is {packed.dtype} {list(packed.shape)}",
            f"{dtype} {list(packed_shape)}, as its record says",
        )
    if scale is None:
        raise damaged(packed.file, f"{name} has no {name}{SCALE_SUFFIX} beside it")
    if scale.dtype not in scale_dtypes or scale.shape != scale_shape:
        raise damaged(
            scale.file,
            f"{name}{SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}",
            f"{', '.join(scale_dtypes)} {list(scale_shape)}",
        )


def _says_packed(value: Any) -> bool:
    """Whether a record is that of a packed tensor, well-formed or not."""
    return isinstance(value, dict) and not _PACKED_MEMBERS.isdisjoint(value)


def _parse_record(where: str, value: Any) -> Record:
    """A record, each of whose members is checked by itself and against the others."""
    if not isinstance(value, dict):
        raise damaged(where, f"its record is {value!r:.60}", "an object")

    def need(key: str, good: bool, expected: str) -> None:
        if not good:
            raise damaged(where, f"its {key} is {value.get(key)!r:.80}", expected)

    sha256: Any = value.get("sha256")
    digits = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
    need("sha256", bool(digits), "64 hex digits")
    if not _says_packed(value):
        return Record(sha256)
    shape: Any = value.get("shape")
    need("shape", _is_matrix(shape), "two or three sizes")
    group_size: Any = value.get("group_size")
    need("group_size", type(group_size) is int and group_size >= -1, "-1, 0 or more")
    codec: Any = value.get("codec")
    if not isinstance(codec, str) or codec not in CODECS:
        raise _newer(where, f"codec {codec!r}", f"one of {', '.join(CODECS)}")
    transposed = "transposed" in value
    need("transposed", not transposed or value["transposed"] is True, "true, or nothing")
    planes: Any = value.get("planes", 1)
    two = type(planes) is int and planes == 2 and codec == BASE3
    need("planes", "planes" not in value or two, "2, in codec base3 alone")
    rotation = (0, 0)
    if "rotation" in value:
        blocks = f"a block of {', '.join(map(str, BLOCKS))} that divides {shape[-1]}"
        found = _parse_rotation(value["rotation"], shape[-1])
        good = found is not None and codec == BASE3
        need("rotation", good, f"{blocks}, and a seed below 2^32, in codec base3 alone")
        rotation = found or rotation
    kernel: Any = value.get("kernel", [])
    fits = _is_kernel(kernel, shape) and not transposed and codec == BASE3
    told = f"sizes of {shape[-1]} weights in all, of a matrix in codec base3"
    need("kernel", "kernel" not in value or fits, told)
    coded = "coding" in value
    known = value.get("coding") == RANS and codec == BASE3
    need("coding", not coded or known, "rans, in codec base3 alone")
    scales: Any = ""
    if coded and "scale_dtype" in value:
        scales = value["scale_dtype"]
        of_scales = isinstance(scales, str) and scales in (*SCALE_DTYPES[BASE3], "U8")
        need("scale_dtype", of_scales, "the type of the scales that are coded")
    group_size = min(group_size, LONGEST_GROUP)
    record = Record(
        sha256,
        tuple(shape),
        group_size,
        codec,
        transposed,
        planes,
        rotation=rotation,
        coded=coded,
        coded_scales=scales,
        kernel=tuple(kernel),
    )
    if coded and not record.can_be_coded:
        raise damaged(where, "is coded, with rows that are longer than those can be")
    return record


def _parse_rotation(value: Any, cols: int) -> tuple[int, int] | None:
    if isinstance(value, dict) and set(value) >= {"block", "seed"}:
        block, seed = value["block"], value["seed"]
        known = type(block) is int and block in BLOCKS and cols % block == 0
        if known and type(seed) is int and 0 <= seed < 2**32:
            return block, seed
    return None


def _is_kernel(kernel: Any, shape: list[int]) -> bool:
    """Whether the rows of a matrix can be kernels of (in, width) or (in, height, width)."""
    if not isinstance(kernel, list) or len(kernel) not in (2, 3) or len(shape) != 2:
        return False
    return all(type(n) is int and n >= 1 for n in kernel) and math.prod(kernel) == shape[-1]


def _is_matrix(shape: Any) -> bool:
    """Whether a record's shape is [rows, cols] or [experts, rows, cols], with cols >= 1."""
    if not isinstance(shape, list) or len(shape) not in (2, 3):
        return False
    sizes = all(type(n) is int and n >= 0 for n in shape)
    return sizes and shape[-1] >= 1 and math.prod(max(1, n) for n in shape) <= 2**60
