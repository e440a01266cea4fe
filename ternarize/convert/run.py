"""The conversion: checkpoint in, packed checkpoint out, a piece of a tensor at a time.

    headers -> select -> plan (every byte of the output is laid out) -> calibrate, if asked to ->
    for each tensor:
    read a piece, ternarize, pack, write it at its place -> record -> verify -> rename

The layout is known before the first weight is read, so tensors can be worked on in any order and
by any number of threads with the same bytes as result, the plan's sizes are exact, and the disk is
asked for its space at the start. Work happens in OUTPUT.partial, beside a journal of the tensors
that are done; a second run of the same command checks those against their digests and goes on.
The final name appears by one rename, when everything has been verified.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ternarize.calibrate.data import SELF
from ternarize.calibrate.pipeline import calibrate
from ternarize.calibrate.run import read_solved
from ternarize.errors import (
    REMEDY,
    CheckpointError,
    FormatError,
    OutputError,
    UsageError,
    WeightError,
    is_no_memory,
)
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint, TensorInfo, open_files
from ternarize.files.container import FORMAT_VERSION, SCALE_SUFFIX, Record
from ternarize.files.headers import DTYPE_NAMES, DTYPES, Entry, byte_view, read_bytes, stamp
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.files.outputs import check_name, sync_files, sync_names
from ternarize.files.sums import SUMS, format_sums, listed, sha256
from ternarize.measure.documents import DEFAULT
from ternarize.measure.figures import FIGURES, check_quality
from ternarize.plans.layout import (
    PIECE,
    Plan,
    Shard,
    TensorPlan,
    header_bytes,
    logical,
    said_group_size,
)
from ternarize.plans.lossless import check_lossless, finer, is_lossless, not_lossless, own_groups
from ternarize.plans.plan import calibrated_plan, make_plan, refuse_empty
from ternarize.plans.recipe import GPTQ, WITHOUT_DATA, Recipe
from ternarize.progress import Progress
from ternarize.runtime.rehearsal import rehearse
from ternarize.sources.fetch import split_id
from ternarize.sources.imports.common import Imported
from ternarize.sources.origin import hub_commit, read_card
from ternarize.threads import THREADS, TICK, let_through, result_of, thread_pool
from ternarize.trits.int8 import INT8, encode_int8, int8_dtype
from ternarize.trits.methods import METHODS, levels
from ternarize.trits.methods.grouped import distance, fixed_sum
from ternarize.trits.rotation import rotate
from ternarize.trits.scales import scale_codes, scale_values, store_scales, to_float
from ternarize.trits.ternary import Ternary, check_device, split_groups
from ternarize.version import __version__

CALIBRATION = ".calibration"  # folder of what calibration found
SOURCE = ".source"  # folder of the shards of a source that is streamed
JOURNAL = ".journal.jsonl"  # a dot: nothing copied from the source has such a name


# the checkpoint of a block that holds a calibrated tensor, and its record there
Solved = tuple[Checkpoint, Record]


# where a piece of an entry goes: (entry, byte offset in it, bytes); None only computes
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


class Relayout(Exception):
    """A tensor needs more room than planned: wider scales, or smaller groups to be lossless."""

    def __init__(self, name: str, group_size: int, scale_dtype: str) -> None:
        super().__init__(name)
        self.change = {"name": name, "group_size": group_size, "scale_dtype": scale_dtype}


def convert_tensor(
    source: Checkpoint,
    tensor: TensorPlan,
    recipe: Recipe,
    write: Write,
    device: str = "cpu",
    solved: Solved | None = None,
) -> Result:
    """Read one tensor of the source piece by piece, and write what it becomes.

    device  where weights are ternarized; the result does not depend on it
    solved  where calibration has put the tensor, if it has

    Raises WeightError naming the file, the tensor and the first bad index.
    """
    try:
        if not tensor.packed:
            return _keep(source, tensor, write, solved)
        if tensor.choice.codec == INT8:
            return _to_int8(source, tensor, write, device)
        return _ternarize(source, tensor, recipe, write, device, solved)
    except WeightError:
        raise _not_finite(source, tensor.info) from None


def _keep(source: Checkpoint, tensor: TensorPlan, write: Write, solved: Solved | None) -> Result:
    if solved is not None:  # a bias or norm that calibration has changed
        data = byte_view(solved[0].read(tensor.name))
        write(tensor.name, 0, data)
        return Result(tensor.name, container.digest(data), calibrated=True)
    sha, dtype, done, buffer = hashlib.sha256(), DTYPES[tensor.dtype], 0, _buffer()
    for start, stop in tensor.pieces():
        piece = source.read(tensor.name, start, stop, buffer)
        _check_finite(piece, but_for_infinity=tensor.choice.bound)
        data = byte_view(piece if piece.dtype == dtype else _cast(piece, dtype, tensor))
        sha.update(data.numpy().data)
        write(tensor.name, done, data)
        done += data.numel()
    return Result(tensor.name, sha.hexdigest())


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


def _ternarize(
    source: Checkpoint,
    tensor: TensorPlan,
    recipe: Recipe,
    write: Write,
    device: str,
    solved: Solved | None,
) -> Result:
    foreign = isinstance(source, Imported) and tensor.name in source.group_sizes
    lossless = foreign or (solved is None and is_ternary(source, tensor))
    method = METHODS[WITHOUT_DATA if recipe.method == GPTQ else recipe.method]
    whole = None if solved is None else read_solved(solved[0], tensor.name, solved[1])
    sha, buffer = hashlib.sha256(), _buffer()
    all_scales, done, nonzero, error, energy = [], 0, 0, 0.0, 0.0
    for start, stop in tensor.pieces():
        weight = logical(source.read(tensor.name, start, stop, buffer).to(device), tensor)
        if whole is None:
            exact = levels(weight, tensor.group_size) if lossless else None
            if lossless and exact is None:  # what is_ternary has looked through is
                assert isinstance(source, Imported)
                own = source.group_sizes[tensor.name]
                raise not_lossless(source, tensor, tensor.group_size, own)
            planes, rest = _fit(weight, tensor, method, exact)
        else:
            planes = [_rows(plane, tensor, start, stop) for plane in whole]
            weight = _rotated(weight, tensor)
        packed = container.pack_planes(*planes, threads=1).cpu()
        sha.update(packed.numpy().data)
        write(tensor.name, done, packed)
        done += packed.numel()
        all_scales.append(container.join_planes([p.scales.cpu() for p in planes]).reshape(-1))
        if whole is None:
            piece_error, piece_energy, piece_nonzero = distance(weight, planes[0])
            if len(planes) > 1:
                piece_error = distance(rest, planes[-1])[0]
        else:
            piece_error, piece_energy = _missed(weight, planes)
        if len(planes) > 1 or whole is not None:
            piece_nonzero = sum(int(plane.trits.count_nonzero()) for plane in planes)
        error += piece_error
        energy += piece_energy
        nonzero += piece_nonzero
    _, shape = tensor.record("").stored_shapes()
    flat = torch.cat(all_scales) if all_scales else torch.empty(0, dtype=torch.float64)
    bits = 8 if tensor.scale_dtype == "U8" else 16
    scales = store_scales(flat.reshape(shape), exact=lossless, bits=bits)
    scale_dtype = DTYPE_NAMES[scales.dtype]
    if scales.dtype.itemsize != DTYPES[tensor.scale_dtype].itemsize:
        raise Relayout(tensor.name, tensor.group_size, scale_dtype)
    sha.update(byte_view(scales).numpy().data)
    write(tensor.name + SCALE_SUFFIX, 0, byte_view(scales))
    return Result(
        tensor.name,
        sha.hexdigest(),
        scale_dtype,
        tensor.group_size,
        lossless,
        nonzero,
        error,
        energy,
        solved is not None,
    )


def _missed(weight: Tensor, planes: Sequence[Ternary]) -> tuple[float, float]:
    """sum (w - w')^2 and sum w^2 of calibrated planes, which `distance` cannot measure.

    Calibration lets some trits have the other sign than their weight.
    """
    exact = weight.to(torch.float64)
    missed = exact - sum(plane.dequantize(torch.float64) for plane in planes)
    group_size = planes[0].group_size
    error, energy = (_total(split_groups(x * x, group_size)) for x in (missed, exact))
    return error, energy


def _rows(plane: Ternary, tensor: TensorPlan, start: int, stop: int) -> Ternary:
    """The rows of a plane that a piece of the tensor holds."""
    rows, cols = tensor.shape[-2:]
    first, last = start // cols, stop // cols
    trits = plane.trits.reshape(-1, cols)[first:last]
    per = max(1, rows) if tensor.group_size == 0 else 1  # rows that share their scales
    scales = plane.scales.reshape(-1, plane.scales.shape[-1])[first // per : -(-last // per)]
    return Ternary(trits.contiguous(), scales.contiguous(), tensor.group_size)


def _rotated(weight: Tensor, tensor: TensorPlan) -> Tensor:
    block, seed = tensor.rotation
    return rotate(weight.to(torch.float32), block, seed) if block else weight


def is_ternary(source: Checkpoint, tensor: TensorPlan) -> bool:
    """Whether the source was trained ternary: it is then packed without loss.

    An ordinary weight is told from its first row. If only smaller groups than asked for make it
    exact (several matrices with a scale each, fused), the layout changes to those: raises Relayout.
    """
    cols = tensor.shape[-1]
    if not tensor.choice.transposed and cols:
        first_row = source.read(tensor.name, 0, min(cols, tensor.info.numel)).reshape(-1, cols)
        if levels(first_row, 128 if tensor.group_size <= 0 else tensor.group_size) is None:
            return False
    for group_size in finer(tensor.group_size):
        exact = is_lossless(source, tensor, group_size)
        if exact and group_size != tensor.group_size:
            raise Relayout(tensor.name, group_size, tensor.scale_dtype)
        if exact:
            return True
    return False


def _trained_ternary(source: Checkpoint, tensor: TensorPlan) -> bool:
    """`is_ternary`, in whatever groups."""
    try:
        return is_ternary(source, tensor)
    except Relayout:
        return True


def _fit(
    weight: Tensor,
    tensor: TensorPlan,
    method: Callable[[Tensor, int], Ternary],
    exact: Ternary | None,
) -> tuple[list[Ternary], Tensor]:
    """The planes of a piece, each by the method on what those before it leave of the weight.

    exact  the weight itself, if it is ternary: the first plane is then all of it

    Returns also what the last plane was made of.
    """
    planes, rest = [_representable(exact or method(weight, tensor.group_size))], weight
    while len(planes) < tensor.planes:
        left = None if exact else _remainder(rest, planes[-1], tensor.scale_dtype)
        rest = torch.zeros_like(weight) if left is None else left
        planes.append(_representable(method(rest, tensor.group_size)))
    return planes, rest


def _remainder(weight: Tensor, plane: Ternary, scale_dtype: str) -> Tensor:
    """weight - scale * trit in float32, with the scale as it is planned to be stored."""
    if scale_dtype == "U8":
        scales = scale_values(scale_codes(plane.scales), torch.float64)
    else:  # a scale that does not fit is found when all are stored, and everything is done again
        scales = to_float(plane.scales, DTYPES[scale_dtype]).to(torch.float64)
        scales = torch.where(scales.isfinite(), scales, plane.scales)
    return weight.to(torch.float32) - replace(plane, scales=scales).dequantize()


def _to_int8(source: Checkpoint, tensor: TensorPlan, write: Write, device: str) -> Result:
    sha, buffer = hashlib.sha256(), _buffer()
    all_scales, done, error, energy = [], 0, 0.0, 0.0
    dtype = DTYPES[tensor.scale_dtype]
    for start, stop in tensor.pieces():
        weight = logical(source.read(tensor.name, start, stop, buffer).to(device), tensor)
        # a piece that float16 cannot serve: all scales of the tensor become float32
        if int8_dtype(weight, tensor.group_size).itemsize > dtype.itemsize:
            raise Relayout(tensor.name, tensor.group_size, "F32")
        q, scales = encode_int8(weight, tensor.group_size, dtype)
        missed = split_groups(weight.to(torch.float64), tensor.group_size)
        energy += _total(missed * missed)
        missed = missed - split_groups(q, tensor.group_size) * scales.double().unsqueeze(-1)
        error += _total(missed * missed)
        data = byte_view(q.cpu())
        sha.update(data.numpy().data)
        write(tensor.name, done, data)
        done += data.numel()
        all_scales.append(scales.reshape(-1).cpu())
    stored = byte_view(torch.cat(all_scales) if all_scales else torch.empty(0, dtype=dtype))
    sha.update(stored.numpy().data)
    write(tensor.name + SCALE_SUFFIX, 0, stored)
    return Result(
        tensor.name,
        sha.hexdigest(),
        tensor.scale_dtype,
        tensor.group_size,
        squared_error=error,
        energy=energy,
    )


def _total(squares: Tensor) -> float:
    """Sum over (rows, groups, length), in the same order on every machine."""
    return float(fixed_sum(fixed_sum(squares.flatten(-2))))


_buffers = threading.local()


def _buffer() -> Tensor:
    """This thread's memory for reading a piece of any dtype."""
    if not hasattr(_buffers, "piece"):
        _buffers.piece = torch.empty(PIECE * 8, dtype=torch.uint8)
    piece: Tensor = _buffers.piece
    return piece


def _representable(ternary: Ternary) -> Ternary:
    """Zero the trits of groups whose scale is too small for float32, the widest stored dtype."""
    lost = (ternary.scales.to(torch.float32) == 0) & (ternary.scales != 0)
    if not bool(lost.any()):
        return ternary
    scales = ternary.scales.masked_fill(lost, 0)
    trits = Ternary(ternary.trits, scales, ternary.group_size).dequantize(torch.float64).sign()
    return Ternary(trits.to(torch.int8), scales, ternary.group_size)


# exponent bits of the 16- and 32-bit floats: all set means NaN or infinity
_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


def _check_finite(piece: Tensor, but_for_infinity: bool = False) -> None:
    """Raise WeightError if a floating-point piece has NaN or infinity, or NaN alone."""
    if but_for_infinity:
        finite = not bool(piece.isnan().any())
    elif piece.dtype in _EXPONENT and piece.numel():
        integer, mask = _EXPONENT[piece.dtype]
        # largest magnitude as an integer: floats of one sign are ordered like their bits
        finite = int((piece.view(integer) & torch.iinfo(integer).max).max()) < mask
    else:
        finite = not piece.dtype.is_floating_point or bool(piece.double().isfinite().all())
    if not finite:
        raise WeightError("not finite")


def _not_finite(source: Checkpoint, info: TensorInfo) -> WeightError:
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
        f"{info.file}: {info.name}: {count} of {info.numel} weights are NaN or infinite, first "
        f"{kind} at {index}; a checkpoint must be finite. Repair the source."
    )


def convert(
    model: str | Path,
    output: str | Path,
    recipe: Recipe = Recipe(),  # noqa: B008
    *,
    threads: int = THREADS,
    device: str | None = None,
    progress: Progress | None = None,
    min_quality: Mapping[str, float] | None = None,
    stream: bool = False,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint into a packed one, and return its record.

    That is what ternarize.json holds, and "notes": what there is to say about the source and about
    files of its folder that were left out, which is no part of the result.

    model     directory, or Hub id user/name[@revision]
    output    directory that must not exist yet; its parents are made
    threads   tensors worked on at once; the result does not depend on it
    device    where weights are ternarized, "cpu" (native code) or e.g. "cuda"; likewise, but for
              calibration, whose sums are those of the machine
    progress  called after each tensor with (bytes of the source done, in all, tensor, "packing");
              before that, with calibration, for each block and part of it, in stages of their own
    min_quality  bounds on the figures that calibration measures: {"kl_divergence": 0.2}; see
                 `ternarize.measure.figures.check_quality`
    stream    have one weight file of a Hub model at a time on the disk, beside the output, and
              delete it once it is packed; not with calibration, which reads them again and again
    allow_missing  convert a source that lacks parameters of its model: the record names them, and
              transformers makes them up when the result is loaded

    Raises UsageError for options that cannot be used, CheckpointError (WeightError) or FormatError
    for a source that cannot be read or converted, SelectionError where no rule says what becomes of
    a tensor, OutputError where the result cannot be put, QualityError where it is worse than
    `min_quality` allows.
    After an error in the source nothing is left; after an interruption or a QualityError
    OUTPUT.partial is, and the same call goes on from there.
    """
    check_bounds(recipe, min_quality or {})
    if stream and recipe.calibrate is not None:
        raise UsageError(
            "--stream",
            "with calibration, which reads the weights more than once",
            "one of the two",
            "Leave out --stream, or --dataset and --method gptq",
        )
    output = Path(os.path.expanduser(output))
    check_name(output)
    device = check_device(device)
    partial = output.with_name(output.name + ".partial")
    if stream:  # one at a time, already when the headers are fetched
        with _alone(partial):
            _claim(partial)
            try:
                work = checked(make_plan(model, recipe, stream=partial / SOURCE), allow_missing)
                _check_output(work, output)
                record = _finished(work, output)
                record = record or _run(work, output, partial, threads, device, progress, {})
                return {**record, "notes": work.remarks()}
            finally:
                shutil.rmtree(partial / SOURCE, ignore_errors=True)
                if partial.is_dir() and _is_empty(partial):
                    shutil.rmtree(partial)
    work = checked(make_plan(model, recipe), allow_missing)
    _check_output(work, output)
    with _alone(partial):
        _check_output(work, output)  # again: another conversion may just have ended
        record = _finished(work, output)
        bounds = min_quality or {}
        record = record or _run(work, output, partial, threads, device, progress, bounds)
        return {**record, "notes": work.remarks()}


def checked(work: Plan, allow_missing: bool) -> Plan:
    """A plan that is worth carrying out: the result will load, and something becomes ternary.

    Raises CheckpointError, SelectionError, UsageError where it is not.
    """
    work = rehearse(work, allow_missing=allow_missing)
    refuse_empty(work)
    if work.missing and work.recipe.calibrate is not None:
        raise UsageError(
            "--allow-missing",
            f"{work.model} lacks {work.missing[0]}, and calibration runs the model",
            "every weight",
            "Complete the checkpoint, or leave out --dataset and --method gptq",
        )
    return work


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Keep other conversions from the same output; raises OutputError if one is at work."""
    lock = FileLock(partial.with_name(partial.name + ".lock"), timeout=0)
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_names(folder.parent)
        lock.acquire()
    except Timeout:
        raise OutputError(
            partial, "another conversion is writing here", "to be alone", "Wait for it"
        ) from None
    except OSError as error:
        raise OutputError(
            partial,
            f"cannot be made ({error.strerror or error})",
            "a place to write",
            "Name another output",
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # a lock that nobody holds may stay: the next one takes it
            Path(lock.lock_file).unlink()
        lock.release()


def _claim(partial: Path) -> None:
    """Make `partial` with a journal, the mark of what is ours; OutputError if it is another's."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise OutputError(
            partial,
            "exists and is no directory",
            "a free name",
            "Move it away, or name another output",
        )
    try:
        partial.mkdir(exist_ok=True)
        if not (partial / JOURNAL).is_file():
            found = sorted(os.listdir(partial))
            if found:
                raise _foreign(partial, found[0])
            (partial / JOURNAL).touch()
    except OSError as error:
        raise OutputError(
            partial,
            f"cannot be made ({error.strerror or error})",
            "a place to write",
            "Name another output",
        ) from None


def _is_empty(partial: Path) -> bool:
    """Whether nothing has been done in `partial` since it was claimed."""
    return os.listdir(partial) == [JOURNAL] and (partial / JOURNAL).stat().st_size == 0


def _foreign(partial: Path, file: str) -> OutputError:
    return OutputError(
        partial,
        f"exists and is no unfinished conversion ({file})",
        "a free name",
        "Move it away, or name another output",
    )


def check_bounds(recipe: Recipe, bounds: Mapping[str, float]) -> None:
    """Raise UsageError for a bound that no figure of the conversion would be compared with."""
    if bounds and recipe.calibrate is None:
        raise UsageError(
            "min quality",
            f"{', '.join(bounds)}, and method {recipe.method!r} measures nothing",
            f"{GPTQ!r}, which calibrates",
            "Use it, or leave the bound out",
        )
    for name, bound in bounds.items():
        if name not in FIGURES or not math.isfinite(bound):
            raise UsageError(
                "min quality",
                f"{name}={bound}",
                f"a number for one of {', '.join(FIGURES)}",
                "Use for instance kl_divergence=0.2",
            )


def _run(
    work: Plan,
    output: Path,
    partial: Path,
    threads: int,
    device: str,
    progress: Progress | None,
    min_quality: Mapping[str, float],
) -> dict[str, Any]:
    """Convert into `partial` and rename it to `output`."""
    if work.recipe.calibrate is None:  # of what calibration needs there is no prediction
        threads = threads_that_fit(work, threads)
    _claim(partial)
    try:
        conversion = _Conversion(work, partial, threads, device, progress)
        conversion.resume()
        if work.recipe.calibrate is not None:
            conversion.calibrate(min_quality)
        record = conversion.run()
        if (partial / SOURCE).exists():  # of this stream, or of an earlier one that was killed
            shutil.rmtree(partial / SOURCE)
        sync_files(partial, but=[shard.file for shard in conversion.shards])
        partial.rename(output)
        _tidy(output)
    except (CheckpointError, FormatError, UsageError) as error:
        # a disk or the Hub may come back, bad weights do not; calibrated blocks are worth keeping
        useless = isinstance(error, WeightError) or not _any_block(partial)
        if useless and not isinstance(error.__cause__, OSError):
            _remove(partial)
        raise
    except OSError as error:
        where, verb = Path(error.filename or partial), "written"
        if work.source.directory in where.parents and work.source.stream is None:
            verb = "read"
        raise OutputError(
            where,
            f"cannot be {verb} ({error.strerror or error}); what is done is kept",
            remedy=f"{REMEDY.get(error.errno or 0, 'Look after the disk')}, then run the same command "
            "again",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_no_memory(error):
            raise
        need = work.convert_memory(threads)
        raise OutputError(
            f"{partial}: out of memory; {threads} threads were expected to need "
            f"{need / 1e9:.3f} GB beside the program itself; what is done is kept. Make room or "
            "use fewer --threads, then run the same command again."
        ) from error
    return record


def threads_that_fit(work: Plan, threads: int) -> int:
    """How many threads the memory that is left to this process is enough for, up to `threads`.

    Raises OutputError if it is not enough for one.
    """
    memory, addresses = memory_left()
    for n in range(threads, 0, -1):
        need = work.convert_memory(n)
        if need <= memory and need + (n + 2) * _ADDRESSES <= addresses:
            return n
    need = work.convert_memory(1)
    if need <= memory:  # then it is a limit of addresses
        memory, need = addresses, need + 3 * _ADDRESSES
    raise OutputError(
        "memory",
        f"{memory / 1000000000.0:.3f} GB are left to this process; the conversion needs "
        f"{need / 1000000000.0:.3f} GB",
        remedy="Allow it more (ulimit, or the container's limit)",
    )


# of each thread, for its stack and its arena of malloc: they take addresses, hardly memory
_ADDRESSES = 72 << 20


def memory_left() -> tuple[float, float]:
    """Bytes of memory, and of addresses, that limits leave to this process; inf: any number."""
    memory, addresses = [math.inf], math.inf
    try:
        import resource

        total, _, _, _, _, data, _ = map(int, Path("/proc/self/statm").read_text().split())
    except (ImportError, FileNotFoundError):  # Windows, macOS
        return math.inf, math.inf
    if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        addresses = most - total * resource.getpagesize()
    if (most := resource.getrlimit(resource.RLIMIT_DATA)[0]) != resource.RLIM_INFINITY:
        memory.append(most - data * resource.getpagesize())
    for limit, stat, name in (  # the container's own, version 2 and 1
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ):
        with suppress(OSError, ValueError, KeyError):  # none; "max"; a system that has no such file
            most = int((_CGROUP / limit).read_text())
            lines = (_CGROUP / stat).read_text().splitlines()
            memory.append(most - int(dict(line.split() for line in lines)[name]))
    return min(memory), addresses


_CGROUP = Path("/sys/fs/cgroup")


def _tidy(output: Path) -> None:
    """Bring the final name to the disk, and only then remove what a resumed run would need."""
    sync_names(output.parent)
    if (output / CALIBRATION).exists():
        shutil.rmtree(output / CALIBRATION)
    (output / JOURNAL).unlink()  # last: it tells that this has not been done
    sync_names(output)


def _finished(work: Plan, output: Path) -> dict[str, Any] | None:
    """The record of this conversion if it ended right after the rename; nothing is left to do."""
    if not (output / JOURNAL).is_file():
        return None
    try:
        _tidy(output)
        record: dict[str, Any] = json.loads((output / RECORD).read_text("utf-8"))
    except OSError as error:
        raise OutputError(
            output,
            f"is complete, but cannot be tidied up ({error.strerror or error})",
            remedy="Get the permission to write, then run the same command again",
        ) from error
    return record


def _remove(partial: Path) -> None:
    """Remove an unfinished conversion; what a break leaves of it can still be told from others'."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
    shutil.rmtree(partial)


def _any_block(partial: Path) -> bool:
    return any((partial / CALIBRATION).glob("*.safetensors"))


def _check_output(work: Plan, output: Path) -> None:
    source, target = work.source.directory.resolve(), output.resolve()
    partial = output.with_name(output.name + ".partial").resolve()
    # the conversion of a file may lie beside it
    alone = isinstance(work.source, Imported) and work.source.alone
    inside = not alone and source in (target, *target.parents)
    inside = inside or partial in (source, *source.parents)
    if work.source.stream is None and inside:
        raise OutputError(
            output,
            f"is the source {work.source.directory} or inside it",
            "another place, since the source is never changed",
            "Name another output",
        )
    if (output.exists() or output.is_symlink()) and not _is_of(work, output):
        raise OutputError(output, "exists already", "a new directory", "Remove it or name another")
    parent = next(p for p in target.parents if p.exists())
    have = shutil.disk_usage(parent).free
    if partial.is_dir():
        ours = [f for f in partial.rglob("*") if f.is_file() and SOURCE not in f.parts]
        have += sum(f.stat().st_size for f in ours)
    small = sum((work.source.directory / f).stat().st_size for f in work.copied)
    need = work.packed_bytes() + small + (1 << 20)
    if work.source.stream is not None:
        need += work.source.stream.room()
    how = work.recipe.calibrate
    if how is not None:  # the blocks, as each stage leaves them, until the result is complete
        stages = (how.window if how.reconstruct else 1) + bool(how.distill)
        need += stages * sum(t.stored_bytes() for t in work.tensors if t.ternary)
    if have < need:
        raise OutputError(
            parent,
            f"{have / 1000000000.0:.3f} GB free; the result needs {need / 1000000000.0:.3f} GB",
            remedy="Make room",
        )


def _identity(work: Plan) -> dict[str, Any]:
    """What tells a conversion from others, in the first line of its journal."""
    recipe = asdict(work.recipe)
    table = {"ternarize": __version__, "recipe": recipe, "source": _stamps(work)}
    identity: dict[str, Any] = json.loads(json.dumps(table))  # tuples are lists there
    return identity


def _is_of(work: Plan, folder: Path) -> bool:
    """Whether the journal in a folder is one of this conversion."""
    if not (folder / JOURNAL).is_file():
        return False
    line = (folder / JOURNAL).read_bytes().split(b"\n")[0]
    return line == json.dumps(_identity(work)).encode()


class _Conversion:
    """The state of one run: the shards as laid out, what is done, and the journal of it."""

    def __init__(
        self, work: Plan, partial: Path, threads: int, device: str, progress: Progress | None
    ) -> None:
        self.work, self.partial = work, partial
        self.threads, self.device = max(1, threads), device
        self.progress = progress
        self.shards = list(work.shards)
        self.unsealed = set(range(len(self.shards)))
        self.results: dict[str, Result] = {}
        self.solved: Mapping[str, Solved] = {}
        self.calibration: dict[str, Any] | None = None
        self.total = sum(t.info.nbytes for t in work.tensors)
        self.done = 0
        self.identity = _identity(work)

    def calibrate(self, min_quality: Mapping[str, float]) -> None:
        """Calibrate what is not ternary already; the layout changes to what comes of it."""
        recipe = self.work.recipe
        tensors = [t for shard in self.shards for t in shard.tensors]
        todo = [t for t in tensors if t.ternary and not t.tied_to]
        ordinary = [t for t in todo if not _trained_ternary(self.work.source, t)]
        # what loads into one parameter is calibrated together, or not at all
        touched = {p for t in ordinary for p in t.choice.parameters}
        fitted = {t.name for t in ordinary}
        fitted |= {t.name for t in todo if not touched.isdisjoint(t.choice.parameters)}
        for at, tensor in enumerate(tensors):
            if tensor.name in fitted:
                tensors[at] = calibrated_plan(tensor, recipe)
            elif tensor.ternary and not tensor.tied_to:
                tensors[at] = replace(tensor, choice=replace(tensor.choice, codec=""))
        folder = self.partial / CALIBRATION
        try:
            found = calibrate(
                self.work, tensors, folder, device=self.device, progress=self.progress
            )
        except WeightError as error:
            raise _not_finite(self.work.source, self.work.source.tensors[str(error)]) from None
        check_quality(found.record["quality"], min_quality)
        self.solved, self.calibration = found.solved, found.record
        plans = {t.name: t for t in found.tensors if t.name in found.solved}
        for index, shard in enumerate(self.shards):
            relaid = tuple(plans.get(t.name, t) for t in shard.tensors)
            self.shards[index] = replace(shard, tensors=relaid)
        for shard in self.shards:  # what was packed before a break, in this layout, counts
            self._drop_unwritten(shard)

    def run(self) -> dict[str, Any]:
        with (self.partial / JOURNAL).open("a", encoding="utf-8") as self.journal:
            while self.unsealed:
                index = min(self.unsealed)
                self._convert_shard(index)
                self._seal(self.shards[index])
                self.unsealed.remove(index)
                if self.work.source.stream is not None:
                    self.work.source.stream.release(self.work.source.files[index])
        record = self._write_small_files()
        stamps = _stamps(self.work, now=True)
        changed = _changed(stamps, self.identity["source"])
        if changed:
            # what is away may come back, and what has been done is then worth keeping
            away = FileNotFoundError() if any(len(each) == 1 for each in stamps) else None
            raise CheckpointError(
                self.work.source.directory,
                f"{changed} changed during the conversion",
                "a source at rest",
                "Convert it again",
            ) from away
        # the disk works while the processors check
        with thread_pool(1 + self.threads) as beside:
            synced = beside.submit(self._sync_shards)
            names = listed(self.partial)
            sums = {name: beside.submit(sha256, self.partial / name) for name in names}
            packed = open_files(self.partial, [shard.file for shard in self.shards])
            container.check(packed, container.records_of(packed), threads=self.threads)
            result_of(synced)
            text = format_sums({name: result_of(each) for name, each in sums.items()})
            (self.partial / SUMS).write_bytes(os.fsencode(text))
        return record

    def _sync_shards(self) -> None:
        for shard in self.shards:
            with (self.partial / shard.file).open("r+b") as file:
                os.fsync(file.fileno())

    # journal: one line of identity, then a line for each tensor that is done and for each change
    # of layout. A line counts only if the bytes in the shard have the digest that it says.

    def resume(self) -> None:
        """Take up what an earlier run has left, or begin; raises OutputError if it is another's."""
        path = self.partial / JOURNAL
        lines = []
        if path.is_file():
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    lines.append(json.loads(line))
                except ValueError:  # cut off in the middle of writing: nothing after it counts
                    break
        if lines and lines[0] != self.identity:
            before, now = ({**line, "source": 0} for line in (lines[0], self.identity))
            changed = _changed(self.identity["source"], lines[0].get("source", []))
            why = f"of another source ({changed} differs)" if changed else "with other options"
            if changed and before != now:
                why += " and with other options"
            raise OutputError(
                self.partial,
                f"holds an unfinished conversion {why}",
                "none",
                "Finish it with its own command, or remove it",
            )
        for line in lines[1:]:
            if "sha256" not in line:
                self._change_layout(line)
            else:
                self.results[line["name"]] = Result(**line)
        kept = [line for line in lines[1:] if "sha256" not in line]
        if not lines:
            ours = (path.name, path.with_suffix(".new").name, SOURCE)
            found = [p.name for p in self.partial.iterdir() if p.name not in ours]
            if found:  # the journal is written before anything else, so this is not ours
                raise _foreign(self.partial, found[0])
        for shard in self.shards:
            self._drop_unwritten(shard)
        done = [asdict(result) for result in self.results.values()]
        text = "".join(json.dumps(line) + "\n" for line in [self.identity, *kept, *done])
        temporary = path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _drop_unwritten(self, shard: Shard) -> None:
        """Forget results whose bytes did not reach the disk."""
        path, layout, base = self.partial / shard.file, shard.layout(), shard.data_start()
        complete = path.is_file() and path.stat().st_size == shard.nbytes()
        for tensor in shard.tensors:
            result = self.results.get(tensor.name)
            if result is None:
                continue
            if complete:
                sha = hashlib.sha256()
                for name, _, _ in tensor.stored():
                    entry = layout[name]
                    for at in range(0, entry.nbytes, PIECE):
                        size = min(PIECE, entry.nbytes - at)
                        piece = read_bytes(path, base + entry.start + at, size)
                        sha.update(piece.numpy().data)
            if not complete or sha.hexdigest() != result.sha256:
                del self.results[tensor.name]

    def _note(self, line: Mapping[str, Any]) -> None:
        self.journal.write(json.dumps(line) + "\n")
        self.journal.flush()

    def _change_layout(self, change: Mapping[str, Any]) -> None:
        asking = next(t for s in self.shards for t in s.tensors if t.name == change["name"])
        for index, shard in enumerate(self.shards):
            tensors = tuple(_relaid(t, asking, change) for t in shard.tensors)
            if tensors != shard.tensors:
                self.shards[index] = replace(shard, tensors=tensors)
                self.unsealed.add(index)
                for tensor in tensors:
                    self.results.pop(tensor.name, None)

    def _convert_shard(self, index: int) -> None:
        """Convert the tensors of a shard that are not done; again if one changes the layout."""
        while True:
            stream = self.work.source.stream
            todo = self._undone(index)
            if stream is not None and todo:
                stream.fetch(self.work.source.files[index])  # here, where it can be interrupted
                self._own_groups(index)
                todo = self._undone(index)
            shard = self.shards[index]
            path, size = self.partial / shard.file, shard.nbytes()
            self.done = self._bytes_done()
            _reserve(path, size)
            layout, base = shard.layout(), shard.data_start()
            with thread_pool(self.threads) as pool:
                futures = {pool.submit(self._one, path, layout, base, t): t for t in todo}
                changes = self._collect(futures)
            if not changes:
                return
            for change in changes:
                self._change_layout(change)
                self._note(change)

    def _undone(self, index: int) -> list[TensorPlan]:
        tensors = self.shards[index].tensors
        return [t for t in tensors if not t.tied_to and t.name not in self.results]

    def _own_groups(self, index: int) -> None:
        """As `make_plan` with weights that it can look at: `own_groups` or `check_lossless`."""
        shard, group_size = self.shards[index], self.work.recipe.group_size
        if group_size is not None:
            check_lossless(self.work.source, self._undone(index), group_size)
        else:
            found = own_groups(self.work.source, shard.tensors, self.work.tensors, read=True)
            for tensor, own in zip(shard.tensors, found, strict=True):
                if own.group_size != tensor.group_size and tensor.name not in self.results:
                    change = Relayout(tensor.name, own.group_size, tensor.scale_dtype).change
                    self._change_layout(change)
                    self._note(change)

    def _one(
        self, path: Path, layout: Mapping[str, Entry], base: int, tensor: TensorPlan
    ) -> Result:
        with path.open("r+b", buffering=0) as file:

            def write(name: str, offset: int, data: Tensor) -> None:
                file.seek(base + layout[name].start + offset)
                _write_all(file, data)

            solved = self.solved.get(tensor.name)
            source, recipe = self.work.source, self.work.recipe
            try:
                return convert_tensor(source, tensor, recipe, write, self.device, solved)
            except Relayout as found:  # without its frames, which hold the tensor until all end
                raise found.with_traceback(None) from None

    def _collect(self, futures: dict[Future[Result], TensorPlan]) -> list[dict[str, Any]]:
        """Note the results as they come; returns the changes of layout that tensors ask for."""
        changes = []
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, TICK, FIRST_COMPLETED)
            let_through()
            for future in sorted(finished, key=lambda f: futures[f].name):
                try:
                    result = future.result()
                except Relayout as found:
                    changes.append(found.change)
                    continue
                self.results[result.name] = result
                self._note(asdict(result))
                self.done += futures[future].info.nbytes
                if self.progress:
                    self.progress(self.done, self.total, result.name, "packing")
        return changes

    def _bytes_done(self) -> int:
        return sum(
            t.info.nbytes
            for s in self.shards
            for t in s.tensors
            if t.tied_to or t.name in self.results
        )

    def _records(self, shard: Shard) -> dict[str, Record]:
        return {
            t.name: t.record(self.results[t.name].sha256) for t in shard.tensors if not t.tied_to
        }

    def _seal(self, shard: Shard) -> None:
        """Write the header of a shard whose data is complete."""
        tensors = tuple(
            replace(t, scale_dtype=self.results[t.name].scale_dtype or t.scale_dtype)
            if not t.tied_to
            else t
            for t in shard.tensors
        )
        header = header_bytes(replace(shard, tensors=tensors).layout(), self._records(shard))
        length = shard.data_start() - 8
        assert len(header) <= length
        with (self.partial / shard.file).open("r+b") as file:
            file.write(length.to_bytes(8, "little") + header.ljust(length))

    def _write_small_files(self) -> dict[str, Any]:
        directory = self.work.source.directory
        for name in self.work.copied:
            target = self.partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / name, target)
        for name, content in self._made().items():
            (self.partial / name).write_bytes(content)
        if len(self.shards) > 1:
            self._write_json(SAFETENSORS + INDEX, self._index())
        # also where the source has none: it is what says that the weights are packed
        self._write_json("config.json", self._config(self.work.source.config or {}))
        record = make_record(self.work, self.shards, self.results, self.calibration)
        self._write_json(RECORD, record)
        return record

    def _made(self) -> dict[str, bytes]:
        """Tokenizer files that an import makes; those of the source itself come first."""
        source = self.work.source
        its_own = {"tokenizer.json", "tokenizer.model"} & set(self.work.copied)
        return source.made if isinstance(source, Imported) and not its_own else {}

    def _index(self) -> dict[str, Any]:
        weight_map = {name: shard.file for shard in self.shards for name in sorted(shard.layout())}
        layouts = [shard.layout().values() for shard in self.shards]
        return {
            "metadata": {
                "total_parameters": self.work.coverage()["ternary"] + self.work.coverage()["kept"],
                "total_size": sum(entry.nbytes for layout in layouts for entry in layout),
            },
            "weight_map": weight_map,
        }

    def _config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = _without_paths(source)
        recipe = self.work.recipe
        if recipe.dtype:
            config["dtype" if "torch_dtype" not in config else "torch_dtype"] = recipe.dtype
        tensors = [t for shard in self.shards for t in shard.tensors]
        config["quantization_config"] = {
            "quant_method": container.KEY,
            "format_version": FORMAT_VERSION,
            "method": recipe.method,
            "group_size": said_group_size(self.work, tensors),
            "activations": recipe.activations,
            **({"missing": self.work.missing} if self.work.missing else {}),
        }
        return config

    def _write_json(self, name: str, table: Mapping[str, Any]) -> None:
        text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
        (self.partial / name).write_text(text, "utf-8")


def _without_paths(table: Any) -> Any:
    """A configuration without the folders that the source was once loaded from."""
    if isinstance(table, list):
        return [_without_paths(each) for each in table]
    if not isinstance(table, Mapping):
        return table
    return {
        key: _without_paths(value)
        for key, value in table.items()
        if key != "_name_or_path" or _is_hub_id(value)
    }


def _is_hub_id(value: Any) -> bool:
    return isinstance(value, str) and split_id(value) is not None and not os.path.exists(value)


def _recorded(recipe: Recipe) -> dict[str, Any]:
    """A recipe for the public record: of a data set on this disk, the last part of its path."""
    how = recipe.calibrate
    if how is not None and how.dataset not in (DEFAULT, SELF):
        path = Path(os.path.expanduser(how.dataset))
        if path.exists():
            name = (path.resolve() if path.is_dir() else path).name
            recipe = replace(recipe, calibrate=replace(how, dataset=name))
    return asdict(recipe)


def _relaid(tensor: TensorPlan, asking: TensorPlan, change: Mapping[str, Any]) -> TensorPlan:
    """A tensor's plan after `asking` has got its change of layout.

    8-bit scales do not mix with others in the parameter that several tensors load into.
    """
    if tensor.name == asking.name:
        scale_dtype = change["scale_dtype"]
        return replace(tensor, group_size=change["group_size"], scale_dtype=scale_dtype)
    fused = not set(tensor.choice.parameters).isdisjoint(asking.choice.parameters)
    if fused and tensor.scale_dtype == "U8" and change["scale_dtype"] != "U8":
        return replace(tensor, scale_dtype="F16")
    return tensor


def make_record(
    work: Plan,
    shards: Sequence[Shard],
    results: Mapping[str, Result],
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a conversion: what was done to what, tensor by tensor, and what came out."""
    source = work.source
    alone = isinstance(source, Imported) and source.alone
    hub = None if alone else hub_commit(work.model, source)
    card = {} if alone else read_card(source.directory)
    tensors: dict[str, dict[str, Any]] = {}
    blocks = (calibration or {}).get("blocks", ())
    how = work.recipe.calibrate
    if how is not None and (how.reconstruct or how.distill):
        blocks = ()  # what calibration has not seen has been trained since
    unseen = {name for block in blocks for name in block["uncalibrated"]}
    group_size = said_group_size(work, [t for shard in shards for t in shard.tensors])
    for shard in shards:
        for t in shard.tensors:
            row: dict[str, Any] = {
                "becomes": t.becomes,
                "reason": f"tied to {t.tied_to}" if t.tied_to else t.choice.reason,
                "source_dtype": t.info.dtype,
                "source_shape": list(t.info.shape),
            }
            if not t.tied_to:
                result = results[t.name]
                if result.calibrated and not t.packed:
                    row["reason"] += ", fitted by calibration"
                    row["fitted"] = True
                row["stored_bytes"] = t.stored_bytes()
                row["sha256"] = result.sha256
                if t.packed:
                    size = max(1, t.info.numel)
                    row["method"] = t.choice.codec
                    if t.ternary:
                        result = replace(
                            result, calibrated=result.calibrated and t.name not in unseen
                        )
                        row["method"] = _method(work.recipe, result)
                    row["group_size"] = result.group_size
                    if t.planes > 1:
                        row["planes"] = t.planes
                    if t.rotation[0]:
                        row["rotation"] = t.rotation[0]
                    row["bpw"] = round(row["stored_bytes"] * 8 / size, 4)
                    if t.ternary:
                        row["sparsity"] = round(1 - result.nonzero / (size * t.planes), 6)
                    row["relative_error"] = relative_error(result)
            tensors[t.name] = row
    return {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "ternarize", "version": __version__},
        "source": {
            "files": {file: (source.directory / file).stat().st_size for file in source.files},
            "parameters": sum(i.numel for i in source.tensors.values()),
            "bytes": source.stored_bytes,
            **({"imported": source.about()} if isinstance(source, Imported) else {}),
            **({"hub": hub} if hub else {}),
            **({"card": card} if card else {}),
            **({"missing": work.missing} if work.missing else {}),
        },
        "recipe": _recorded(replace(work.recipe, group_size=group_size)),
        "coverage": work.coverage(),
        **({"calibration": calibration} if calibration is not None else {}),
        "tensors": tensors,
    }


def _method(recipe: Recipe, result: Result) -> str:
    if result.lossless:
        return "lossless"
    if recipe.method == GPTQ and not result.calibrated:
        return WITHOUT_DATA
    return recipe.method


def relative_error(result: Result) -> float | None:
    """sum (w - w')^2 / sum w^2 of a packed tensor, to six digits.

    None where the squares leave the range of float32.
    """
    if not (math.isfinite(result.squared_error) and math.isfinite(result.energy)):
        return None
    if result.energy == 0:
        return None if result.nonzero else 0.0
    return round(result.squared_error / result.energy, 6)


def _stamps(work: Plan, *, now: bool = False) -> list[list[Any]]:
    """What tells whether a source file has changed since it was opened, or up to now.

    Its size and the time of its last change: a copy of the source that keeps these is the same.
    """
    source = work.source
    if source.stream is not None:
        return source.stream.stamps()
    names = [*(["config.json"] if source.config is not None else []), *work.copied]
    names += [file for file in source.files if now or file not in source.stamps]
    stamps = {**source.stamps, **{name: stamp(source.directory / name) for name in names}}
    return [[name, *found[1:3]] for name, found in sorted(stamps.items())]


def _changed(stamps: list[list[Any]], before: list[list[Any]]) -> str:
    """The names of files whose stamps differ, or that are in one list alone; at most three."""
    names = sorted(
        {str(stamp[0]) for stamp in [*stamps, *before] if not (stamp in stamps and stamp in before)}
    )
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _reserve(path: Path, size: int) -> None:
    """Make the file exactly `size` bytes long, with room on the disk where that can be asked."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate") and size:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # file systems that cannot reserve say so in many ways
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise


def _write_all(file: FileIO, data: Tensor) -> None:
    view, done = data.numpy().data, 0
    while done < len(view):
        done += file.write(view[done:])
