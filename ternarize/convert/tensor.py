"""One tensor, from the source to the output: read a piece, fit it, write it.

What a tensor becomes is written piece by piece while it is read, so that memory does not depend on
its size. Its scales are known at the end; where they, or the weights, turn out to need another
layout than planned, that is returned, and the tensor is to be converted again.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ternarize.calibrate.solved import Solved, read_numbers, read_solved
from ternarize.errors import UsageError, WeightError
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.files.headers import DTYPE_NAMES, DTYPES, byte_view
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.plans.layout import PIECE, TensorPlan, logical
from ternarize.plans.lossless import exact_groups, not_lossless
from ternarize.plans.recipe import GPTQ, WITHOUT_DATA, Recipe
from ternarize.sources.imports.common import Imported
from ternarize.trits.methods import METHODS, levels, with_scale_bits, with_zeros
from ternarize.trits.planes import fit_packed, fit_planes, measured, squared_error
from ternarize.trits.rotation import rotate
from ternarize.trits.scales import store_scales
from ternarize.trits.ternary import Ternary, scaled

# where a piece of an entry goes: (entry, byte offset in it, bytes)
Write = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Result:
    """What came of one tensor; everything the journal must hold to go on after a break.

    nonzero  trits other than zero, in all planes
    """

    name: str
    sha256: str
    scale_dtype: str = ""
    group_size: int = 0
    lossless: bool = False
    nonzero: int = 0
    squared_error: float = 0.0
    energy: float = 0.0
    calibrated: bool = False


@dataclass(frozen=True)
class Change:
    """What a tensor needs other than planned: wider scales, or groups that lose nothing."""

    name: str
    group_size: int
    scale_dtype: str


def convert_tensor(
    source: Checkpoint,
    tensor: TensorPlan,
    recipe: Recipe,
    write: Write,
    device: str = "cpu",
    solved: Solved | None = None,
) -> Result | Change:
    """Read one tensor of the source piece by piece, and write what it becomes.

    device  where weights are ternarized; the result does not depend on it
    solved  where calibration has put the tensor, if it has

    Returns a Change where the planned layout cannot hold it; what was written then means nothing.
    Raises WeightError naming the file, the tensor and the first bad index.
    """
    entries = _Entries(write)
    try:
        if not tensor.packed:
            return _keep(source, tensor, entries, solved)
        if not tensor.ternary:
            return _round(source, tensor, entries, device, solved)
        return _ternarize(source, tensor, recipe, entries, device, solved)
    except WeightError:
        raise not_finite(source, tensor.info) from None


class _Entries:
    """The entries that a tensor becomes, and the digest of all that was written to them."""

    def __init__(self, write: Write) -> None:
        self.write, self.sha, self.ends = write, hashlib.sha256(), Counter[str]()

    def add(self, name: str, data: Tensor) -> None:
        """Write data behind what the entry has."""
        data = byte_view(data)
        self.sha.update(data.numpy().data)
        self.write(name, self.ends[name], data)
        self.ends[name] += data.numel()

    def digest(self) -> str:
        return self.sha.hexdigest()


# --- kept ---


def _keep(
    source: Checkpoint, tensor: TensorPlan, entries: _Entries, solved: Solved | None
) -> Result:
    if solved is not None:  # a bias or norm that calibration has changed
        entries.add(tensor.name, solved[0].read(tensor.name))
        return Result(tensor.name, entries.digest(), calibrated=True)
    dtype, buffer = DTYPES[tensor.dtype], _buffer()
    for start, stop in tensor.pieces():
        piece = source.read(tensor.name, start, stop, buffer)
        _check_finite(piece, but_for_infinity=tensor.choice.bound)
        entries.add(tensor.name, piece if piece.dtype == dtype else _cast(piece, dtype, tensor))
    return Result(tensor.name, entries.digest())


def _cast(piece: Tensor, dtype: torch.dtype, tensor: TensorPlan) -> Tensor:
    data = piece.to(dtype)
    if bool((data.isinf() & piece.isfinite()).any()):
        raise UsageError(
            tensor.name,
            f"{float(piece.abs().max())} does not fit {tensor.dtype}",
            "a dtype that holds every kept weight",
            "Use --dtype bfloat16 or float32",
        )
    return data


# --- int8 and int4 ---


def _round(
    source: Checkpoint, tensor: TensorPlan, entries: _Entries, device: str, solved: Solved | None
) -> Result | Change:
    group_size, dtype, codec = tensor.group_size, DTYPES[tensor.scale_dtype], tensor.choice.codec
    needed, encode = container.ROUNDED[codec]
    cols = max(1, tensor.shape[-1])
    trained = None if solved is None else read_numbers(solved[0], tensor.name, solved[1])
    if trained is not None and trained[1].dtype != dtype:
        return Change(tensor.name, group_size, DTYPE_NAMES[trained[1].dtype])
    all_scales, error, energy = [], 0.0, 0.0
    for weight, start, stop in _weights(source, tensor, device if trained is None else "cpu"):
        if trained is not None:
            q, scales = (each[start // cols : stop // cols] for each in trained)
        # a piece that float16 cannot serve: all scales of the tensor become float32
        elif needed(weight, group_size).itemsize > dtype.itemsize:
            return Change(tensor.name, group_size, "F32")
        else:
            q, scales = encode(weight, group_size, dtype)
        parts = squared_error(weight, scaled(q, scales.double(), group_size), group_size)
        error, energy = error + parts[0], energy + parts[1]
        entries.add(tensor.name, container.encode_numbers(q, codec, group_size))
        all_scales.append(scales.reshape(-1).cpu())
    stored = torch.cat(all_scales) if all_scales else torch.empty(0, dtype=dtype)
    entries.add(tensor.name + SCALE_SUFFIX, stored)
    return Result(
        tensor.name,
        entries.digest(),
        tensor.scale_dtype,
        group_size,
        squared_error=error,
        energy=energy,
        calibrated=trained is not None,
    )


# --- ternary ---


def _ternarize(
    source: Checkpoint,
    tensor: TensorPlan,
    recipe: Recipe,
    entries: _Entries,
    device: str,
    solved: Solved | None,
) -> Result | Change:
    imported = isinstance(source, Imported) and tensor.name in source.group_sizes
    exact = None  # the groups in which nothing is lost
    if solved is None:
        exact = tensor.group_size if imported else exact_groups(source, tensor)
    if exact is not None and exact != tensor.group_size:
        return Change(tensor.name, exact, tensor.scale_dtype)
    group_size, dtype = tensor.group_size, DTYPES[tensor.scale_dtype]
    bits = tensor.stored_scale_bits
    name = WITHOUT_DATA if recipe.method == GPTQ else recipe.method
    method = METHODS[name]
    if recipe.zeros is not None:
        method = with_zeros(recipe.zeros)
    elif name == "itf":
        method = with_scale_bits(bits)
    plain = solved is None and exact is None and method is METHODS[name] and tensor.planes == 1
    whole = None if solved is None else read_solved(solved[0], tensor.name, solved[1])
    all_scales, nonzero, error, energy = [], 0, 0.0, 0.0
    # what calibration has found is only measured here, where `verify` will do it again
    for weight, start, stop in _weights(source, tensor, device if whole is None else "cpu"):
        if plain:
            fit = fit_packed(weight, group_size, name)
        elif whole is not None:
            block, seed = tensor.rotation
            weight = rotate(weight.to(torch.float32), block, seed) if block else weight
            fit = measured(weight, _part_of(whole, tensor, start, stop))
        else:
            itself = _exactly(weight, source, tensor, exact)
            fit = fit_planes(weight, group_size, method, tensor.planes, dtype, itself, bits)
        entries.add(tensor.name, fit.packed)
        all_scales.append(fit.scales.reshape(-1))
        error, energy = error + fit.squared_error, energy + fit.energy
        nonzero += fit.nonzero
    flat = torch.cat(all_scales) if all_scales else torch.empty(0, dtype=torch.float64)
    scales = store_scales(flat, exact=exact is not None, bits=bits)
    scale_dtype = DTYPE_NAMES[scales.dtype]
    if scales.dtype.itemsize != dtype.itemsize:
        return Change(tensor.name, group_size, scale_dtype)
    entries.add(tensor.name + SCALE_SUFFIX, scales)
    return Result(
        tensor.name,
        entries.digest(),
        scale_dtype,
        group_size,
        exact is not None,
        nonzero,
        error,
        energy,
        solved is not None,
    )


def _exactly(
    weight: Tensor, source: Checkpoint, tensor: TensorPlan, group_size: int | None
) -> Ternary | None:
    """A piece without loss; None where nobody expects that (group_size is None)."""
    if group_size is None:
        return None
    exact = levels(weight, group_size)
    if exact is None:  # what exact_groups has looked through is
        assert isinstance(source, Imported)
        raise not_lossless(source, tensor, group_size, source.group_sizes[tensor.name])
    return exact


def _part_of(whole: Sequence[Ternary], tensor: TensorPlan, start: int, stop: int) -> list[Ternary]:
    """The part of planes that a piece of the tensor holds."""
    rows, cols = tensor.shape[-2:]
    first, last = start // cols, stop // cols
    per = max(1, rows) if tensor.group_size == 0 else 1  # rows that share their scales
    parts = []
    for plane in whole:
        trits = plane.trits.reshape(-1, cols)[first:last]
        scales = plane.scales.reshape(-1, plane.scales.shape[-1])[first // per : -(-last // per)]
        parts.append(Ternary(trits.contiguous(), scales.contiguous(), tensor.group_size))
    return parts


# --- reading ---


def _weights(
    source: Checkpoint, tensor: TensorPlan, device: str
) -> Iterator[tuple[Tensor, int, int]]:
    """The pieces of a tensor as matrices on the device, and where each starts and stops."""
    buffer = _buffer()
    for start, stop in tensor.pieces():
        piece = source.read(tensor.name, start, stop, buffer).to(device)
        yield logical(piece, tensor), start, stop


_buffers = threading.local()


def _buffer() -> Tensor:
    """This thread's memory for reading a piece of any dtype."""
    if not hasattr(_buffers, "piece"):
        _buffers.piece = torch.empty(PIECE * 8, dtype=torch.uint8)
    piece: Tensor = _buffers.piece
    return piece


def _check_finite(piece: Tensor, but_for_infinity: bool) -> None:
    """Raise WeightError if a floating-point piece has NaN or infinity, or NaN alone."""
    if not piece.dtype.is_floating_point or not piece.numel():
        return
    # NaN makes both of them NaN; of float8 torch does not find them
    least, most = torch.aminmax(piece.double() if piece.dtype.itemsize == 1 else piece)
    finite = ~least.isnan() if but_for_infinity else least.isfinite() & most.isfinite()
    if not bool(finite):
        raise WeightError("a piece", "is not finite")


def not_finite(source: Checkpoint, info: TensorInfo) -> WeightError:
    """The whole story about a tensor that is not finite, for which it is read once more."""
    count, first, kind = 0, -1, ""
    for start in range(0, info.numel, PIECE):
        piece = source.read(info.name, start, min(start + PIECE, info.numel)).double()
        bad = ~piece.isfinite()
        if first < 0 and bool(bad.any()):
            at = int(bad.nonzero()[0])
            first, kind = start + at, "NaN" if bool(piece[at].isnan()) else "infinite"
        count += int(bad.sum())
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), info.shape)]
    return WeightError(
        f"{info.file}: {info.name}",
        f"{count} of {info.numel} weights are NaN or infinite, first {kind} at {index}",
        "finite ones",
        "Repair the source",
    )
