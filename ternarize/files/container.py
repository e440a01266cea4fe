"""The container, version 1: the stored bytes of a packed tensor, written, read and checked.

metadata.py says what else is in a file. Whatever the codec, rows stay independent: what is done to
rows of weights can be done to stored rows. formats/container.md is the definition.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ternarize.errors import DigestError, FormatError, damaged
from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.files.headers import byte_view, read_bytes
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.files.stored import Reading, ToRead, as_kept, core_reads
from ternarize.threads import THREADS, in_threads
from ternarize.trits.base3 import BASE3, unpack, used_groups
from ternarize.trits.int4 import (
    INT4,
    dequantize_int4,
    encode_int4,
    int4_dtype,
    int4_used,
    pack_int4,
    unpack_int4,
)
from ternarize.trits.int8 import INT8, dequantize_int8, encode_int8, int8_dtype, int8_used
from ternarize.trits.planes import join_planes, pack_planes, split_planes
from ternarize.trits.rotation import unrotate
from ternarize.trits.scales import scale_values, store_scales
from ternarize.trits.ternary import Ternary

# codec -> the dtype that the scales of a weight need; numbers and scales of it, without data
ROUNDED = {INT8: (int8_dtype, encode_int8), INT4: (int4_dtype, encode_int4)}
_CHECKED = 1 << 22  # bytes read and hashed at a time


def encode(*planes: Ternary, exact: bool = False, bits: int = 16) -> tuple[Tensor, Tensor]:
    """A ternary tensor as it is stored: packed uint8, and scales as `store_scales` gives them.

    planes  matrices of the same shape and group size whose sum is the weight; usually one
    """
    scales = join_planes([plane.scales for plane in planes])
    return pack_planes(*planes), store_scales(scales, exact=exact, bits=bits)


def digest(*tensors: Tensor) -> str:
    """SHA-256, in hex, of the tensors' bytes one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(byte_view(tensor).numpy().data)
    return sha.hexdigest()


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
    _check_scales(scales, _nonzero_groups(packed, record), record)
    matrices = split_planes(packed, record.planes)
    values = split_planes(scale_values(scales, torch.float64), record.planes)
    return tuple(
        Ternary(unpack(trits, record.shape[-1], record.group_size), scale, record.group_size)
        for trits, scale in zip(matrices, values, strict=True)
    )


def decode_numbers(packed: Tensor, scales: Tensor, record: Record) -> tuple[Tensor, Tensor]:
    """The numbers behind stored bytes of int8 or int4, int8 (..., rows, cols), and the scales.

    packed, scales, and what is raised: as of `decode`. `encode_numbers` is the inverse.
    """
    assert record.shape is not None and record.codec != BASE3
    _check_scales(scales, _nonzero_groups(packed, record), record)
    if record.codec == INT8:
        return packed, scales
    return unpack_int4(packed, record.shape[-1], record.group_size), scales


def encode_numbers(numbers: Tensor, codec: str, group_size: int) -> Tensor:
    """Numbers, int8 (..., rows, cols), as the codec int8 or int4 stores them."""
    return numbers if codec == INT8 else pack_int4(numbers, group_size)


def dequantize(packed: Tensor, scales: Tensor, record: Record) -> Tensor:
    """The dense float32 weight behind stored bytes of any codec; see `decode`.

    base3   sum over planes of scale * trit, the sum rounded to float32; of a rotated matrix,
            that times the inverse of the rotation
    int8    scale * q, rounded to float32
    int4    likewise
    """
    assert record.shape is not None
    if record.codec == BASE3:
        planes = decode_planes(packed, scales, record)
        dense = planes[0].dequantize()
        for plane in planes[1:]:
            dense = dense + plane.dequantize()
        turned = record.rotation[0] and dense.numel()  # of no rows, cols can be any number
        return unrotate(dense, *record.rotation) if turned else dense
    _check_scales(scales, _nonzero_groups(packed, record), record)
    count = math.prod(record.shape[:-2])
    matrices = zip(
        packed.reshape(count, *packed.shape[-2:]),
        scales.reshape(count, *scales.shape[-2:]),
        strict=True,
    )
    cols, group_size, dtype = record.shape[-1], record.group_size, torch.float32
    if record.codec == INT8:
        parts = [dequantize_int8(q, scale, group_size, dtype) for q, scale in matrices]
    else:
        parts = [dequantize_int4(q, scale, cols, group_size, dtype) for q, scale in matrices]
    return (torch.stack(parts) if parts else torch.empty(0)).view(record.shape)


def as_source(weight: Tensor, record: Record) -> Tensor:
    """A packed tensor's weight, dense, as its source has it: turned, or as kernels."""
    if record.shape is None:
        return weight
    if record.transposed:
        return weight.transpose(-1, -2).contiguous()
    return weight.reshape(record.dense_shape)


def _nonzero_groups(packed: Tensor, record: Record, threads: int = THREADS) -> Tensor:
    """Check stored rows (..., width); returns (..., planes * groups): which groups are not zero."""
    assert record.shape is not None
    if record.codec == INT8:
        return int8_used(packed.view(torch.int8), record.group_size)
    if record.codec == INT4:
        return int4_used(packed, record.shape[-1], record.group_size)
    planes = torch.unflatten(packed, -1, (record.planes, -1))
    return used_groups(planes, record.shape[-1], record.group_size, threads).flatten(-2)


def check_data(
    checkpoint: Checkpoint,
    records: Mapping[str, Record],
    *,
    threads: int = THREADS,
    done: Callable[[str], None] | None = None,
) -> None:
    """Verify the data of a packed checkpoint: every code, padding, scale and digest.

    records  from `records_of`
    done     called with the name of each tensor that has been checked

    Tensors are read, hashed and checked in parallel, a piece at a time: by the compiled core where
    it can (`stored.core_reads`). Raises FormatError or its child DigestError, naming the file and
    the tensor.
    """
    core = [name for name, record in records.items() if core_reads(checkpoint, name, record)]
    place = {name: at for at, name in enumerate(core)}
    wanted = [ToRead(name, records[name]) for name in core]

    def check(name: str) -> str:
        if name not in place:
            return _check_tensor(checkpoint, name, records[name])
        check_read(reading, place[name])
        return name

    with Reading(checkpoint, wanted, threads=threads) as reading:
        in_threads(check, records, threads, done)


def read_whole(
    checkpoint: Checkpoint, records: Mapping[str, Record], *, checked: bool = True
) -> dict[str, Tensor]:
    """All tensors of a packed checkpoint by name, as stored and decoded, in memory on the CPU.

    checked  verify them as `check_data` does, where the core can in the same pass
    """
    core = [name for name, record in records.items() if core_reads(checkpoint, name, record)]
    place = {name: at for at, name in enumerate(core)}
    wanted = [as_kept(checkpoint, name, records[name]) for name in core]
    others = {name: record for name, record in records.items() if name not in place}
    with Reading(checkpoint, wanted, checked=checked) as reading:
        if checked:
            check_data(checkpoint, others)
        values = {}
        for name, info in checkpoint.tensors.items():
            owner = name if name in records else name.removesuffix(SCALE_SUFFIX)
            if owner in place:
                check_read(reading, place[owner])
                values[name] = reading.take(place[owner], "out" if owner == name else "scales")
            else:
                values[name] = checkpoint.read(name).reshape(info.shape)
    return values


def check_read(reading: Reading, at: int) -> None:
    """Wait for a tensor that the core reads, and raise where it is not what its record says.

    Raises FormatError or its child DigestError as `check_data` does.
    """
    if reading.is_good(at):
        return
    name, record = reading.wanted[at].name, reading.wanted[at].record
    # it says what is wrong; in a thread, where no device is set but the CPU
    in_threads(lambda each: _check_tensor(reading.checkpoint, each, record), [name], 1)
    file = reading.checkpoint.tensors[name].file
    raise FormatError(
        f"{file}: {name}", "changed while it was read", "a file at rest", "Read it again"
    )


def _check_tensor(checkpoint: Checkpoint, name: str, record: Record) -> str:
    sha = hashlib.sha256()
    info = checkpoint.tensors[name]
    path = checkpoint.directory / info.file
    used = []
    try:
        for offset, size in _whole_rows(info, info.shape[-1] if record.shape else None):
            if info.coded is None:
                piece = read_bytes(path, info.start + offset, size)
            else:  # packed rows, whose numbers are bytes
                width = info.shape[-1]
                rows = offset // width, (offset + size) // width
                piece = info.coded.read(path, info.start, info.stored, *rows, threads=1).flatten()
            sha.update(piece.numpy().data)
            if record.shape is not None:
                used.append(_nonzero_groups(piece.view(-1, info.shape[-1]), record, threads=1))
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
        raise error.within(f"{info.file}: {name}") from None
    if sha.hexdigest() != record.sha256:
        raise DigestError(
            f"{info.file}: {name}",
            f"its bytes have changed since they were written: SHA-256 {sha.hexdigest()[:12]}...",
            f"{record.sha256[:12]}..., as its record says",
            "Fetch the file again",
        )
    return name


def _whole_rows(info: TensorInfo, row: int | None) -> Iterable[tuple[int, int]]:
    """Cut a tensor's bytes into (offset, size) of about _CHECKED, in whole rows of `row` bytes."""
    # of a stream each piece asks for its tables again
    piece = _CHECKED if info.coded is None else 16 * _CHECKED
    step = piece if not row else max(1, piece // row) * row
    return ((at, min(step, info.nbytes - at)) for at in range(0, info.nbytes, step))


def _check_scales(scales: Tensor, used: Tensor, record: Record) -> None:
    """scales: as stored; used (..., rows, planes * groups): which groups have non-zero weights."""
    if record.group_size == 0:
        used = used.any(-2, keepdim=True)
    if scales.dtype == torch.uint8:
        no_number = (scales != 0) & ((scales < 8) | (scales > 247))
        if bool(no_number.any()):
            at = no_number.nonzero()[0].tolist()
            found = f"{int(scales[tuple(at)])} is no code of a scale"
            raise damaged(f"scale at {at}", found, "0 or 8..247")
        scales = scale_values(scales)
    # non-negative floats are ordered like their bits, and infinity is the first that is not finite
    integer = torch.int32 if scales.dtype == torch.float32 else torch.int16
    bits = scales.contiguous().view(integer)
    infinity = torch.tensor(torch.inf, dtype=scales.dtype).view(integer)
    signed = (scales < 0) & (record.codec == INT4)  # which may be: its size is what counts
    bits = torch.where(signed, bits & torch.iinfo(integer).max, bits)
    if bool(((bits >= 0) & (bits < infinity) & ((bits != 0) == used)).all()):
        return
    values = scales.to(torch.float64)
    rules = (
        (~values.isfinite(), "is not finite"),
        (values.signbit() & ~signed, "is negative"),
        ((values == 0) & used, "is 0, but its group has weights other than zero"),
        ((values != 0) & ~used, "is not 0, but all weights of its group are zero"),
    )
    for bad, what in rules:
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise damaged(f"scale at {at}", f"{float(values[tuple(at)])} {what}")
