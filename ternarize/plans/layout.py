"""A plan as data: what each tensor becomes, and where each byte of the files lies."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ternarize.errors import CheckpointError, some
from ternarize.files import metadata
from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.files.headers import DTYPES, MAX_HEADER, Entry, header_json, lay_out
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.native import lib
from ternarize.plans.copied import BESIDE
from ternarize.plans.recipe import GROUP_SIZE, Recipe
from ternarize.plans.rules import Choice
from ternarize.sources.folded import Folded
from ternarize.threads import THREADS
from ternarize.trits.int4 import INT4

PIECE = 1 << 21  # weights read, ternarized and written at a time by one thread
SHOWN_FILES = 8  # in a note; the plan lists all


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the source and what it becomes.

    shape        logical shape: (rows, cols) or (experts, rows, cols) if packed, else as stored; of
                 a convolution (out, in * height * width)
    group_size   as in ternarize.trits.ternary
    dtype        of a kept tensor
    tied_to      the tensor of which this one is a copy; then nothing is stored
    scale_dtype  planned ("U8": `scale_bits`, 8 or 6); the tensor itself may call for another (a
                 Change, in convert/tensor.py)
    planes       ternary matrices whose sum it becomes
    rotation     (block, seed) of its input; block 0: none
    zeros        the least share of zeros that data may leave it; None: what comes of them

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
    zeros: float | None = None
    scale_bits: int = 8

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
    def stored_scale_bits(self) -> int:
        """`scale_bits` where scales are stored as codes; 16 where they are floats all the same."""
        return self.scale_bits if self.scale_dtype == "U8" else 16

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernels that are the rows of a packed matrix; () of others."""
        return self.info.shape[1:] if self.packed and self.choice.convolution else ()

    @property
    def form(self) -> str:
        """What tensors of one parameter must have in common, in words."""
        if not self.ternary:
            return self.choice.form
        details = f"group size {self.group_size}, planes {self.planes}, rotation {self.rotation}"
        return f"ternary with {details}"

    @property
    def becomes(self) -> str:
        """What a person is told: "tied", "ternary", "int8", "int4" or "kept"."""
        return "tied" if self.tied_to else self.record("").kind

    def stored(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what is written for this tensor."""
        if self.tied_to:
            return []
        if not self.packed:
            return [(self.name, self.dtype, self.shape)]
        packed, scales = self.record("0" * 64).stored_shapes()
        return [
            (self.name, metadata.CODECS[self.choice.codec], packed),
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
            kernel=self.kernel,
        )


@dataclass(frozen=True)
class Shard:
    """One file of the output: where each entry lies, known before any weight is read."""

    file: str
    tensors: tuple[TensorPlan, ...]

    def layout(self) -> dict[str, Entry]:
        """Entries in the order of the file."""
        return lay_out(item for tensor in self.tensors for item in tensor.stored())

    def data_start(self) -> int:
        """Where the data begins, the same whatever the digests and the 2-byte dtypes will be.

        Raises CheckpointError if the header is longer than readers take; a calibration, which lays
        tensors out again, can make it so.
        """
        longer = {"F16": "BF16"}
        tensors = [
            replace(t, scale_dtype=longer.get(t.scale_dtype, t.scale_dtype)) for t in self.tensors
        ]
        longest = replace(self, tensors=tuple(tensors))
        records = {t.name: t.record("0" * 64) for t in self.tensors if not t.tied_to}
        size = len(header_bytes(longest.layout(), records))
        size += -size % 8
        if size > MAX_HEADER:
            raise CheckpointError(
                f"{self.file} of the result",
                f"its {len(self.tensors)} tensors take a header of {size} bytes",
                f"at most {MAX_HEADER}",
                "Spread the source over more files",
            )
        return 8 + size

    def nbytes(self) -> int:
        """Size of the file."""
        return self.data_start() + sum(entry.nbytes for entry in self.layout().values())


def header_bytes(entries: Mapping[str, Entry], records: Mapping[str, Record]) -> bytes:
    """The JSON header of a safetensors file, without the 8 bytes of its length and without padding.

    entries  name -> where it lies, in the order of the file
    records  name -> what the metadata says of it
    """
    return header_json(entries, metadata.dump_metadata(records, recorded=True))


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

    @property
    def folder(self) -> Path:
        """All of the source: the folder around a transformer whose modules lie beside it."""
        beside = any(name.startswith(BESIDE) for name in self.copied)
        return self.source.directory.parent if beside else self.source.directory

    def packed_bytes(self) -> int:
        """Bytes of all weight files of the result."""
        return sum(shard.nbytes() for shard in self.shards)

    def coverage(self) -> dict[str, int]:
        """Parameters that become ternary, int8 or int4, are kept or tied; the sum is the source's.

        int4 is there where some do.
        """
        parts: Counter[str] = Counter(ternary=0, int8=0, kept=0, tied=0)
        for t in self.tensors:
            parts[t.becomes] += t.info.numel
        total = sum(info.numel for info in self.source.tensors.values())
        assert sum(parts.values()) == total, "a tensor of the source is unaccounted for"
        return {**parts, "total": total}

    def convert_memory(self, threads: int = THREADS) -> int:
        """Predicted peak of the conversion, bytes above the interpreter with torch loaded."""
        per_weight = 12 if lib is not None else 80  # copies in flight: convert/tensor.py
        if any(t.planes > 1 or (t.packed and not t.ternary) for t in self.tensors):
            per_weight += 32  # remainders, int8 and int4 weights: in float64 or in copies
        largest = max((min(t.info.numel, t.piece_numel()) for t in self.tensors), default=0)
        turning = self.source.memory() if isinstance(self.source, Folded) else 0
        return (64 << 20) + threads * (largest * per_weight + turning)

    def load_memory(self) -> int:
        """Predicted peak of loading and one forward pass on CPU, weights and one dense matrix.

        Of int4 no matrix is made, only parts.
        """
        whole = [t for t in self.tensors if t.packed and t.choice.codec != INT4]
        dense = max((math.prod(t.shape[-2:]) * 4 for t in whole), default=0)
        return self.packed_bytes() + dense

    def train_memory(self) -> int:
        """What a training of the whole model holds beside activations, bytes by count; 0: none.

        Of all that is trained a weight in float32, its gradient, and with adamw two moments; of the
        source what is stored of the rest, and of all of it where it is the teacher. (Scales, and
        a teacher of its own, are not counted.)
        """
        training = self.recipe.training
        if training is None:
            return 0
        trained = [
            t.info
            for t in self.tensors
            if (t.ternary and t.planes == 1) or len(t.shape) == 1 or training.all_weights
            if not t.tied_to
        ]
        each = 16 if training.optimizer == "adamw" else 8
        shared = 0 if training.objective == "distill" else sum(info.nbytes for info in trained)
        return each * sum(info.numel for info in trained) + self.source.stored_bytes - shared

    def remarks(self) -> list[str]:
        """The notes, and in a last one what is left out of the source's folder."""
        left = [name for name in self.left_out if name != "README.md"]  # cards are written anew
        return [*self.notes, *([f"left out: {some(left, SHOWN_FILES)}"] if left else [])]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for --json."""
        return {
            "model": self.model,
            "recipe": asdict(replace(self.recipe, group_size=recorded_group_size(self))),
            "coverage": self.coverage(),
            "source_bytes": self.source.stored_bytes,
            "packed_bytes": self.packed_bytes(),
            "convert_memory_bytes": self.convert_memory(),
            "load_memory_bytes": self.load_memory(),
            "train_memory_bytes": self.train_memory(),
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


def logical(raw: Tensor, tensor: TensorPlan) -> Tensor:
    """Flat elements as read -> (rows, cols), the input dimension last."""
    rows, cols = tensor.shape[-2:]
    if tensor.choice.transposed:
        return raw.reshape(cols, rows).t().contiguous()
    return raw.reshape(-1, cols)


def recorded_group_size(plan: Plan, tensors: Iterable[TensorPlan] | None = None) -> int | None:
    """The group size for the record of a conversion: None where tensors have their own.

    tensors  as laid out in the end; None: as planned
    """
    if plan.recipe.group_size is not None:
        return plan.recipe.group_size
    found = plan.tensors if tensors is None else tensors
    usual = all(t.group_size == GROUP_SIZE for t in found if t.ternary)
    return GROUP_SIZE if usual else None
