"""The plan of a conversion: what becomes of each tensor, and where each byte of it will lie.

Made from headers (or from config.json alone) before any weight is read, so that a plan for a model
of any size takes seconds, the sizes it prints are exact, and the conversion can work on tensors in
any order with the same bytes as result.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ternarize import container
from ternarize.checkpoint import (
    DTYPES,
    MAX_HEADER,
    SAFETENSORS,
    Checkpoint,
    Entry,
    TensorInfo,
)
from ternarize.codecs import INT8, THREADS
from ternarize.container import SCALE_SUFFIX, Record
from ternarize.errors import CheckpointError, SelectionError, UsageError, some
from ternarize.fetch import COPIED, WEIGHTS, is_within, module_folders
from ternarize.fetch import RECORD as RECORD
from ternarize.imports import Imported, open_source
from ternarize.linear import ACTIVATIONS
from ternarize.methods import METHODS, levels
from ternarize.native import lib
from ternarize.rotation import BLOCKS, block_size
from ternarize.select import (
    KEEP,
    TERNARY,
    Choice,
    Equal,
    check_fused_choices,
    end_tensors,
    select,
    skeleton_shapes,
    why_no_skeleton,
)
from ternarize.tensor import check_group_size

PIECE = 1 << 21  # weights read, ternarized and written at a time by one thread
GROUP_SIZE = 128  # of weights that are not ternary yet
GPTQ = "gptq"  # the calibrated method
WITHOUT_DATA = "itf"  # the method of what a calibrated conversion cannot calibrate
ENDS = (KEEP, INT8, TERNARY)  # what the output head and the token embedding may become
INT8_GROUP_SIZE = -1  # finer groups take more room, and gain nothing that perplexity shows
MAX_COUNT = 2**31 - 1  # samples, steps, tokens: what is made of them fits in 64 bits
SHOWN_FILES = 8  # in a note; the plan lists all
KEPT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_TERNARIZABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Calibrate:
    """How weights are fitted to what a model does on text (or other input).

    dataset      .txt, .jsonl, .json or .parquet file, or a directory of them; .safetensors file of
                 inputs; Hub dataset user/name[/folder][@revision]; "self": what the model writes;
                 "default": the text that comes with ternarize
    num_samples  samples to calibrate on; a tenth as many choose, another tenth give the figures
    seq_len      tokens of a sample; None: what the model can take, at most 512
    seed         of the choice of samples, of rotations and of training
    text_column  of .jsonl, .json and .parquet; None: `text` or `messages`
    rotation     largest block of the rotation of inputs, a power of four; 0: none
    reconstruct  steps of training for each block; 0: none
    window       blocks trained together, 1 to 4
    distill      steps of training for the whole model, which has to be in memory; 0: none
    target_bpw   bits per ternary weight to be spent where they matter; None: all alike
    """

    dataset: str = "default"
    num_samples: int = 256
    seq_len: int | None = None
    seed: int = 0
    text_column: str | None = None
    rotation: int = 256
    reconstruct: int = 0
    window: int = 1
    distill: int = 0
    target_bpw: float | None = None

    def __post_init__(self) -> None:
        counts, steps = range(MAX_COUNT + 1), f"0 to {MAX_COUNT} steps"
        for what, value, good, expected in (
            ("num samples", self.num_samples, self.num_samples in counts[1:], f"1 to {MAX_COUNT}"),
            (
                "seq len",
                self.seq_len,
                self.seq_len is None or self.seq_len in counts[2:],
                f"2 to {MAX_COUNT}",
            ),
            ("seed", self.seed, 0 <= self.seed < 2**32, "0 to 4294967295"),
            (
                "rotation",
                self.rotation,
                self.rotation in (0, *BLOCKS),
                f"0 or one of {', '.join(map(str, BLOCKS))}",
            ),
            ("reconstruct", self.reconstruct, self.reconstruct in counts, steps),
            ("distill", self.distill, self.distill in counts, steps),
            ("window", self.window, 1 <= self.window <= 4, "1 to 4 blocks"),
            (
                "target bpw",
                self.target_bpw,
                self.target_bpw is None or 1.6 <= self.target_bpw <= 16,
                "1.6 to 16 bits",
            ),
        ):
            if not good:
                raise UsageError(f"{what}: {value}; expected {expected}.")


@dataclass(frozen=True)
class Recipe:
    """What is done to a checkpoint; with the source it determines every byte of the result.

    method       a name of ternarize.methods.METHODS, or "gptq" with `calibrate`
    group_size   weights per scale; -1 one group per row; 0 one scale per tensor; None: 128, and of
                 weights that are ternary already the largest groups in which they are
    keep         globs of tensors to leave in floating point
    include      globs of tensors to ternarize although they are kept by default
    dtype        float32, float16 or bfloat16 for kept floating-point tensors; None: as they are
    activations  none, or int8 per token; recorded for the loader; None: what the model was trained
                 with, as far as its format says that, else none
    scale_bits   16 or 8, of the scales of ternary weights
    planes       globs of ternary tensors that become the sum of two ternary matrices
    head         keep, int8 or ternary: the output head; None: ternary if the source has it in a
                 ternary format, else keep
    embeddings   likewise the token embedding; tied to the head, both become what either says
    calibrate    None: weights are ternarized without data
    """

    method: str = "absmean"
    group_size: int | None = None
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    dtype: str | None = None
    activations: str | None = None
    scale_bits: int = 16
    planes: tuple[str, ...] = ()
    head: str | None = None
    embeddings: str | None = None
    calibrate: Calibrate | None = None

    def __post_init__(self) -> None:
        if (self.method == GPTQ) != (self.calibrate is not None):
            raise UsageError(
                f"method: {self.method!r} {'without' if self.method == GPTQ else 'with'} data to "
                f"calibrate on; expected {GPTQ!r} with, and any other without. Use --method gptq, "
                "or leave out the options of calibration."
            )
        if self.group_size is not None:
            check_group_size(self.group_size)
        for what, value, known in (
            ("method", self.method, (*METHODS, GPTQ)),
            ("dtype", self.dtype, (None, *KEPT_DTYPES)),
            ("activations", self.activations, (None, *ACTIVATIONS)),
            ("scale bits", self.scale_bits, (16, 8)),
            ("head", self.head, (None, *ENDS)),
            ("embeddings", self.embeddings, (None, *ENDS)),
        ):
            if value not in known:
                names = ", ".join(str(k) for k in known if k is not None)
                raise UsageError(f"{what}: {value!r}; expected one of {names}.")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the source and what it becomes.

    shape        logical shape: (rows, cols) or (experts, rows, cols) if packed, else as stored
    group_size   as in ternarize.tensor
    dtype        of a kept tensor
    tied_to      the tensor of which this one is a copy; then nothing is stored
    scale_dtype  planned ("U8": 8 bits); the tensor itself may call for another (see Relayout in
                 convert.py)
    planes       ternary matrices whose sum it becomes
    rotation     (block, seed) of its input; block 0: none

    What the choice says of a ternary tensor (group size, planes) may differ from tensor to tensor,
    but not between those that load into one parameter (`check_fused`).
    """

    info: TensorInfo
    choice: Choice
    shape: tuple[int, ...]
    group_size: int
    dtype: str
    scale_dtype: str = "F16"
    tied_to: str | None = None
    planes: int = 1
    rotation: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def ternary(self) -> bool:
        return self.choice.ternary

    @property
    def packed(self) -> bool:
        return self.choice.codec != ""

    @property
    def becomes(self) -> str:
        """What a person is told: "tied", "ternary", "int8" or "kept"."""
        return "tied" if self.tied_to else self.record("").kind

    def stored(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what is written for this tensor."""
        if self.tied_to:
            return []
        if not self.packed:
            return [(self.name, self.dtype, self.shape)]
        packed, scales = self.record("0" * 64).stored_shapes()
        return [
            (self.name, container.CODECS[self.choice.codec], packed),
            (self.name + SCALE_SUFFIX, self.scale_dtype, scales),
        ]

    def stored_bytes(self) -> int:
        """Bytes of what is written for this tensor, without the header."""
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in self.stored())

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Cut the tensor into (start, stop) of elements; the cuts depend on its shape alone."""
        step = self.piece_numel()
        for start in range(0, self.info.numel, step):
            yield start, min(start + step, self.info.numel)

    def piece_numel(self) -> int:
        """Whole rows where rows are independent, whole matrices where they are not."""
        if not self.packed:
            return PIECE
        if self.group_size == 0 or self.choice.transposed:
            return max(1, math.prod(self.shape[-2:]))
        cols = max(1, self.shape[-1])
        return max(1, PIECE // cols) * cols

    def record(self, sha256: str) -> Record:
        """What the file's metadata says of the tensor with this digest (hex)."""
        if not self.packed:
            return Record(sha256)
        return Record(
            sha256,
            self.shape,
            self.group_size,
            self.choice.codec,
            self.choice.transposed,
            self.planes,
            scale8=self.scale_dtype == "U8",
            rotation=self.rotation,
        )


@dataclass(frozen=True)
class Shard:
    """One file of the output: where each entry lies, known before any weight is read."""

    file: str
    tensors: tuple[TensorPlan, ...]

    def layout(self) -> dict[str, Entry]:
        """Entries in the order of the file: widest dtype first, so that all are aligned."""
        stored = [item for tensor in self.tensors for item in tensor.stored()]
        stored.sort(key=lambda item: -DTYPES[item[1]].itemsize)
        entries, start = {}, 0
        for name, dtype, shape in stored:
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize
            entries[name] = Entry(dtype, shape, start, nbytes)
            start += nbytes
        return entries

    def data_start(self) -> int:
        """Where the data begins, the same whatever the digests and the 2-byte dtypes will be.

        Raises CheckpointError if the header is longer than readers take; a calibration, which lays
        tensors out again, can make it so.
        """
        longest = replace(
            self, tensors=tuple(replace(t, scale_dtype=_longest(t)) for t in self.tensors)
        )
        records = {t.name: t.record("0" * 64) for t in self.tensors if not t.tied_to}
        size = len(header_bytes(longest.layout(), records))
        size += -size % 8
        if size > MAX_HEADER:
            raise CheckpointError(
                f"{self.file} of the result: its {len(self.tensors)} tensors take a header of "
                f"{size} bytes; expected at most {MAX_HEADER}. Spread the source over more files."
            )
        return 8 + size

    def nbytes(self) -> int:
        """Size of the file."""
        return self.data_start() + sum(entry.nbytes for entry in self.layout().values())


def _longest(tensor: TensorPlan) -> str:
    return "BF16" if tensor.scale_dtype == "F16" else tensor.scale_dtype


def header_bytes(entries: Mapping[str, Entry], records: Mapping[str, Record]) -> bytes:
    """The JSON header of a safetensors file, without the 8 bytes of its length and without padding.

    entries  name -> where it lies, in the order of the file
    records  name -> what the metadata says of it
    """
    table: dict[str, Any] = {"__metadata__": container.dump_metadata(records, recorded=True)}
    for name, entry in entries.items():
        table[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.start + entry.nbytes],
        }
    return json.dumps(table, separators=(",", ":")).encode()


@dataclass
class Plan:
    """A conversion, laid out: what becomes of each tensor, and the exact size of each file."""

    source: Checkpoint
    model: str
    recipe: Recipe
    shards: list[Shard]
    copied: list[str]
    left_out: list[str]
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # parameters that the source lacks

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    def packed_bytes(self) -> int:
        """Bytes of all weight files of the result."""
        return sum(shard.nbytes() for shard in self.shards)

    def coverage(self) -> dict[str, int]:
        """Parameters that become ternary or int8, are kept or tied; the sum is the source's."""
        parts: Counter[str] = Counter(ternary=0, int8=0, kept=0, tied=0)
        for t in self.tensors:
            parts[t.becomes] += t.info.numel
        total = sum(info.numel for info in self.source.tensors.values())
        assert sum(parts.values()) == total, "a tensor of the source is unaccounted for"
        return {**parts, "total": total}

    def convert_memory(self, threads: int = THREADS) -> int:
        """Predicted peak of the conversion, bytes above the interpreter with torch loaded."""
        per_weight = 12 if lib is not None else 80  # copies in flight: see convert._ternarize
        if any(t.planes > 1 or (t.packed and not t.ternary) for t in self.tensors):
            per_weight += 32  # remainders, and int8 weights, are worked out in float64
        largest = max((min(t.info.numel, t.piece_numel()) for t in self.tensors), default=0)
        return (64 << 20) + threads * largest * per_weight

    def load_memory(self) -> int:
        """Predicted peak of loading and one forward pass on CPU, weights and one dense matrix."""
        dense = max((math.prod(t.shape[-2:]) * 4 for t in self.tensors if t.packed), default=0)
        return self.packed_bytes() + dense

    def remarks(self) -> list[str]:
        """The notes, and in a last one what is left out of the source's folder."""
        left = [name for name in self.left_out if name != "README.md"]  # cards are written anew
        return [*self.notes, *([f"left out: {some(left, SHOWN_FILES)}"] if left else [])]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for --json."""
        return {
            "model": self.model,
            "recipe": asdict(replace(self.recipe, group_size=said_group_size(self))),
            "coverage": self.coverage(),
            "source_bytes": self.source.stored_bytes,
            "packed_bytes": self.packed_bytes(),
            "convert_memory_bytes": self.convert_memory(),
            "load_memory_bytes": self.load_memory(),
            "notes": self.notes,
            "missing": self.missing,
            "copied": self.copied,
            "left_out": self.left_out,
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.info.dtype,
                    "shape": list(t.info.shape),
                    "becomes": t.becomes,
                    "reason": f"tied to {t.tied_to}" if t.tied_to else t.choice.reason,
                    "stored_bytes": t.stored_bytes(),
                }
                for t in self.tensors
            ],
        }


# --- planning --------------------------------------------------------------------------------


def plan(
    model: str | Path,
    recipe: Recipe = Recipe(),  # noqa: B008
    *,
    config_only: bool = False,
    stream: Path | None = None,
    again: bool = False,
) -> Plan:
    """Lay out a conversion from headers, without reading weights (except to compare tied copies).

    model        directory, or Hub id user/name[@revision]
    config_only  a config.json without weights is enough: names and shapes come from the skeleton
    stream       folder to fetch weight files to, one by one, when they are read; see `Stream`
    again        the conversion is on record, which says the groups: no weight is looked at for them

    Raises CheckpointError, FormatError, SelectionError.
    """
    source = open_source(model, config_only=config_only, stream=stream)
    directory = source.directory
    _refuse_quantized(source)
    notes = []
    # weights can be looked at without a download, and have to be
    here = bool(source.tensors) and stream is None and not again
    if not source.tensors:
        if source.config is None:
            raise CheckpointError(
                f"{model}: no weights and no config.json; expected a Hugging Face checkpoint. "
                "Check the path."
            )
        source.files = [SAFETENSORS]
        source.tensors = {
            name: TensorInfo(name, dtype, shape, SAFETENSORS)
            for name, (dtype, shape) in skeleton_shapes(source.config).items()
        }
        notes.append("no weights here: names and shapes are those of the architecture")
    notes += source.notes
    shapes = {name: info.shape for name, info in source.tensors.items()}
    equal = cache(source.equal)
    ends = _ends(source, recipe, shapes, equal)
    recipe = replace(recipe, head=ends["head"], embeddings=ends["embeddings"])
    choices = select(
        shapes,
        source.config,
        keep=recipe.keep,
        include=recipe.include,
        head=ends["head"],
        embeddings=ends["embeddings"],
        equal=equal,
        shared=recipe.calibrate is None,
    )
    if isinstance(source, Imported):
        choices = _keep_dense(source, choices, recipe.include)
        notes.append(f"ternary already ({source.format}): packed without loss")
        if recipe.calibrate is not None:
            raise UsageError(
                f"{model}: is ternary already ({source.format}); expected weights that "
                "calibration can fit. Leave out --dataset and --method gptq."
            )
    if recipe.calibrate is not None and recipe.group_size is None:
        recipe = replace(recipe, group_size=GROUP_SIZE)
    if recipe.activations is None:
        trained = source.activations if isinstance(source, Imported) else "none"
        recipe = replace(recipe, activations=trained)
    _check_planes(recipe, choices)
    why = why_no_skeleton(source.config)
    if why and recipe.calibrate is not None:
        raise CheckpointError(
            f"{directory}: {why}; calibration runs the model, so an architecture that "
            "transformers has is expected. Convert it without --dataset."
        )
    if why:
        notes.append(
            f"no skeleton of the model ({why}): chosen by names and shapes, and not tried whether "
            "the result loads"
        )
    notes += sorted({f"{c.name}: {c.reason}" for c in choices if "are tied" in c.reason})
    by_file: dict[str, list[TensorPlan]] = {file: [] for file in source.files}
    for choice in choices:
        info = source.tensors[choice.name]
        by_file[info.file].append(_plan_tensor(info, choice, recipe))
    if recipe.group_size is None:
        everything = [t for tensors in by_file.values() for t in tensors]
        by_file = {
            file: own_groups(source, tensors, everything, read=here)
            for file, tensors in by_file.items()
        }
    elif here and recipe.calibrate is None:
        for tensors in by_file.values():
            check_lossless(source, tensors, recipe.group_size)
    check_fused([t for tensors in by_file.values() for t in tensors])
    count = len(by_file)
    shards = [
        Shard(
            SAFETENSORS if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors",
            tuple(tensors),
        )
        for i, tensors in enumerate(by_file.values(), 1)
    ]
    alone = isinstance(source, Imported) and source.alone  # what lies around it can be anything
    copied, left_out = ([], []) if alone else small_files(directory, source.files)
    notes += _not_read(source, left_out)
    return Plan(source, str(model), recipe, shards, copied, left_out, notes)


def _plan_tensor(info: TensorInfo, choice: Choice, recipe: Recipe) -> TensorPlan:
    tied_to = choice.copy_of or None
    shape = info.shape
    if choice.codec and choice.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if choice.codec and info.dtype not in _TERNARIZABLE:
        raise CheckpointError(
            f"{info.file}: {info.name} is {info.dtype}; weights to pack are "
            f"{', '.join(_TERNARIZABLE)}. Convert a checkpoint in floating point, or name it "
            "with --keep."
        )
    dtype = info.dtype
    if recipe.dtype and dtype in _FLOATS:
        dtype = KEPT_DTYPES[recipe.dtype]
    if not choice.ternary:
        return TensorPlan(info, choice, shape, INT8_GROUP_SIZE, dtype, tied_to=tied_to)
    return TensorPlan(
        info,
        choice,
        shape,
        GROUP_SIZE if recipe.group_size is None else recipe.group_size,
        dtype,
        "U8" if recipe.scale_bits == 8 else "F16",
        tied_to,
        2 if any(fnmatchcase(info.name, glob) for glob in recipe.planes) else 1,
    )


# --- weights that are ternary already ------------------------------------------------------------


def logical(raw: Tensor, tensor: TensorPlan) -> Tensor:
    """Flat elements as read -> (rows, cols), the input dimension last."""
    rows, cols = tensor.shape[-2:]
    if tensor.choice.transposed:
        return raw.reshape(cols, rows).t().contiguous()
    return raw.reshape(-1, cols)


def is_lossless(source: Checkpoint, tensor: TensorPlan, group_size: int) -> bool:
    """Whether a tensor is ternary in these groups, exactly; reads it up to where it is not."""
    trial = replace(tensor, group_size=group_size)
    return all(
        levels(logical(source.read(tensor.name, start, stop), trial), group_size) is not None
        for start, stop in trial.pieces()
    )


def own_groups(
    source: Checkpoint, tensors: Iterable[TensorPlan], everything: Iterable[TensorPlan], read: bool
) -> list[TensorPlan]:
    """Give tensors that are ternary at the source the largest groups in which they are.

    everything  all tensors of the checkpoint: those that share a parameter must have equal groups,
                and keep what they have
    read        look at weights (the first row of each tensor, and all of those that are ternary);
                else what the source's format says decides
    """
    filled = Counter(p for t in everything if t.ternary for p in t.choice.parameters)
    found = []
    for tensor in tensors:
        group_size = None
        if tensor.ternary and not tensor.tied_to:
            alone = all(filled[p] == 1 for p in tensor.choice.parameters)
            if isinstance(source, Imported):
                group_size = source.group_sizes.get(tensor.name)
            if read and alone and (group_size is None or group_size > 0):
                coarsest = _coarsest(source, tensor)
                group_size = group_size if coarsest is None else coarsest
        found.append(tensor if group_size is None else replace(tensor, group_size=group_size))
    return found


def _coarsest(source: Checkpoint, tensor: TensorPlan) -> int | None:
    """The largest groups in which a tensor is ternary; None if it is in none that is tried, and if
    it is all 0, which says nothing of groups.

    Tensors, rows, equal parts of rows (models trained with their matrices split over devices have a
    scale for each part), powers of two down to 32. An ordinary weight is told from its first 32
    elements, which are of one group in all of these.
    """
    cols = tensor.shape[-1]
    if tensor.choice.transposed or tensor.info.numel == 0:
        return None
    row = source.read(tensor.name, 0, cols).reshape(1, cols)
    if levels(row[:, :32], -1) is None:
        return None
    parts = {cols // n for n in range(2, 17) if cols % n == 0} | {256, 128, 64, 32}
    sizes = (0, -1, *sorted((n for n in parts if 32 <= n < cols), reverse=True))
    likely = (n for n in sizes if levels(row, n) is not None)
    found = next((n for n in likely if is_lossless(source, tensor, n)), None)
    if found != 0 or any(bool(source.read(tensor.name, *at).any()) for at in tensor.pieces()):
        return found
    return None


def _ends(
    source: Checkpoint, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], equal: Equal
) -> dict[str, str]:
    """What becomes of the "head" and the "embeddings", KEEP where nothing says it.

    TERNARY where an import has them in a ternary format, unless --keep speaks of them.
    """
    said = {"head": recipe.head, "embeddings": recipe.embeddings}
    found = {end: what or KEEP for end, what in said.items()}
    unsaid = [end for end, what in said.items() if what is None]
    if not isinstance(source, Imported) or not unsaid:
        return found
    names = end_tensors(shapes, source.config, equal)
    if names["--head"] == names["--embeddings"] and len(unsaid) == 1:
        return found  # one tensor, of which the other option speaks
    for end in unsaid:
        tensors = names[f"--{end}"]
        kept = any(fnmatchcase(name, glob) for name in tensors for glob in recipe.keep)
        if tensors and not kept and tensors <= source.ternary_ends:
            found[end] = TERNARY
    return found


def _keep_dense(source: Imported, choices: list[Choice], include: Iterable[str]) -> list[Choice]:
    """Linear weights that the source itself has in floating point stay so, unless asked for."""
    reason = f"not ternary at the source ({source.format})"
    kept = []
    for choice in choices:
        asked = choice.reason.startswith("--") or any(fnmatchcase(choice.name, g) for g in include)
        if choice.ternary and choice.name not in source.group_sizes and not asked:
            choice = replace(choice, codec="", reason=reason)
        kept.append(choice)
    check_fused_choices(kept)
    return kept


def finer(group_size: int) -> tuple[int, ...]:
    """Groups to try, in turn, for an ordinary source that is ternary; the first is as asked for."""
    return {0: (0, -1, GROUP_SIZE), -1: (-1, GROUP_SIZE)}.get(group_size, (group_size,))


def check_lossless(source: Checkpoint, tensors: Iterable[TensorPlan], group_size: int) -> None:
    """Raise CheckpointError where ternary weights would lose something in these groups."""
    tried = (group_size,) if isinstance(source, Imported) else finer(group_size)
    for tensor in tensors:
        if not tensor.ternary or tensor.tied_to:
            continue
        if isinstance(source, Imported):
            own = source.group_sizes.get(tensor.name)
        else:
            own = _coarsest(source, tensor)
        if own is None or own == 0 or (own == -1 and tried != (0,)):
            continue
        if own > 0 and group_size > 0 and own % group_size == 0:
            continue
        if not any(is_lossless(source, tensor, each) for each in tried):
            raise not_lossless(source, tensor, group_size, own)


def not_lossless(
    source: Checkpoint, tensor: TensorPlan, group_size: int, own: int
) -> CheckpointError:
    """The error for a weight that is ternary in the groups `own`, and not in these."""
    what = source.format if isinstance(source, Imported) else "ternary in floating point"
    advice = (
        "Leave out --group-size."
        if group_size != own
        else "Convert the checkpoint it was made from, or leave it in floating point with --keep."
    )
    return CheckpointError(
        f"{tensor.info.file}: {tensor.name}: has other values ({what}) than -s, 0 and s "
        f"with one s {_GROUPS.get(group_size, f'for {group_size} weights')}; expected these alone, "
        f"so that nothing is lost. {advice}"
    )


_GROUPS = {0: "for the tensor", -1: "for each row"}


def said_group_size(work: Plan, tensors: Iterable[TensorPlan] | None = None) -> int | None:
    """The group size for the record of a conversion: None where tensors have their own.

    tensors  as laid out in the end; None: as planned
    """
    if work.recipe.group_size is not None:
        return work.recipe.group_size
    found = work.tensors if tensors is None else tensors
    usual = all(t.group_size == GROUP_SIZE for t in found if t.ternary)
    return GROUP_SIZE if usual else None


# --- the rest of a plan ---------------------------------------------------------------------------


def calibrated_plan(tensor: TensorPlan, recipe: Recipe) -> TensorPlan:
    """The plan of a tensor that calibration finds: its inputs are rotated."""
    assert recipe.calibrate is not None
    block = block_size(tensor.shape[-1], recipe.calibrate.rotation)
    return replace(tensor, rotation=(block, recipe.calibrate.seed if block else 0))


def check_fused(tensors: Iterable[TensorPlan]) -> None:
    """Raise SelectionError where tensors load into one parameter but would be packed unlike."""
    by_parameter: dict[str, TensorPlan] = {}
    for tensor in tensors:
        for parameter in tensor.choice.parameters if tensor.ternary else ():
            other = by_parameter.setdefault(parameter, tensor)
            mine, theirs = (
                f"group size {t.group_size}, planes {t.planes}, rotation {t.rotation}"
                for t in (tensor, other)
            )
            if mine != theirs:
                raise SelectionError(
                    f"{tensor.name}: {mine}, but {other.name} has {theirs}, and both load into "
                    f"{parameter}; expected the same. Widen --planes to all of them."
                )


def _check_planes(recipe: Recipe, choices: Iterable[Choice]) -> None:
    """A glob that gives no ternary tensor two planes is an error."""
    names = [choice.name for choice in choices if choice.ternary]
    for glob in recipe.planes:
        if not any(fnmatchcase(name, glob) for name in names):
            raise SelectionError(
                f"--planes {glob!r}: matches no tensor that becomes ternary; a glob on tensor "
                "names (with .weight) is expected. The plan (--dry-run) lists the names."
            )


def _refuse_quantized(source: Checkpoint) -> None:
    config = (source.config or {}).get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
    if method == container.KEY:
        raise CheckpointError(
            f"{source.directory}: is a packed checkpoint already (quant_method {method}); "
            "expected one in floating point. Use it as it is, or convert its source."
        )
    raise CheckpointError(
        f"{source.directory}: is quantized already (quant_method {method} in config.json); "
        "expected weights in floating point. Convert the checkpoint it was made from."
    )


def refuse_empty(work: Plan) -> None:
    """Raise SelectionError where nothing becomes ternary, with the reasons."""
    if any(t.ternary for t in work.tensors):
        return
    if work.recipe.keep:
        raise SelectionError(
            f"{work.model}: --keep leaves no tensor to ternarize; expected some. Keep less."
        )
    reasons = Counter(t.choice.reason for t in work.tensors).most_common(5)
    said = ", ".join(f"{reason} ({count})" for reason, count in reasons)
    raise SelectionError(
        f"{work.model}: none of its {len(work.tensors)} tensors, first "
        f"{work.tensors[0].name if work.tensors else 'none'}, is a linear weight to ternarize: "
        f"{said}; expected some. --dry-run lists them all, and --include can name some."
    )


def _not_read(source: Checkpoint, left_out: Iterable[str]) -> list[str]:
    """What to say where transformers' choice among the weight files has left some of the model."""
    others = [name for name in left_out if _MODEL.fullmatch(name)]
    if not others or not source.files:
        return []
    return [f"{source.files[0]} is read, as transformers does, and not {some(others)}"]


_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")

_OWN_INDEX = re.compile(r"[^/]+\.index(\.\w+)?\.json")  # the result has one of its own, if any
# what training leaves in a folder, and no model reads: names and folders, globs
_OF_TRAINING = (
    "trainer_state.json",
    "trainer_log.jsonl",
    "training_args.*",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "*_results.json",
    "zero_to_fp32.py",
    "checkpoint-*/*",
    "global_step*/*",
    "runs/*",
    "wandb/*",
)


def small_files(directory: Path, read: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is copied byte for byte (tokenizer, generation config, ...), and what is left out.

    read  the weight files that are read

    Weights beside the model are copied where modules.json names their folder, as part of the model;
    others, and what training has left, are not.
    """
    copied: list[str] = []
    left_out: list[str] = []
    modules = module_folders(directory)
    links = [directory / folder for folder in modules if (directory / folder).is_symlink()]
    found = {path for top in (directory, *links) for path in top.rglob("*") if path.is_file()}
    paths = sorted(found)
    with_weights = {path.parent for path in paths if path.suffix in WEIGHTS}
    for path in paths:
        name = path.relative_to(directory).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if name in ("config.json", RECORD, *read) or _OWN_INDEX.fullmatch(name):
            continue
        if any(fnmatchcase(name, glob) for glob in _OF_TRAINING):
            left_out.append(name)
        elif is_within(name, modules):
            copied.append(name)
        elif path.suffix in WEIGHTS or ("/" in name and path.parent in with_weights):
            left_out.append(name)
        else:
            ours = path.suffix in COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
            (copied if ours else left_out).append(name)
    return copied, left_out
