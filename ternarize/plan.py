"""The plan of a conversion: what becomes of each tensor, and where each byte of it will lie.

Made from headers (or from config.json alone) before any weight is read, so that a plan for a model
of any size takes seconds, the sizes it prints are exact, and the conversion can work on tensors in
any order with the same bytes as result.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ternarize import container
from ternarize.checkpoint import (
    DTYPES,
    INDEX,
    SAFETENSORS,
    Checkpoint,
    Entry,
    TensorInfo,
    byte_view,
    locate,
    open_checkpoint,
)
from ternarize.codecs import THREADS
from ternarize.container import SCALE_SUFFIX, Record
from ternarize.errors import CheckpointError, SelectionError, UsageError
from ternarize.methods import METHODS
from ternarize.native import lib
from ternarize.select import Choice, select, skeleton_shapes, tied, why_no_skeleton
from ternarize.tensor import check_group_size

PIECE = 1 << 21  # weights read, ternarized and written at a time by one thread
RECORD = "ternarize.json"
ACTIVATIONS = ("none", "int8")
KEPT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_TERNARIZABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Recipe:
    """What is done to a checkpoint; with the source it determines every byte of the result.

    method       a name of ternarize.methods.METHODS
    group_size   weights per scale; -1 one group per row; 0 one scale per tensor
    keep         globs of tensors to leave in floating point
    include      globs of tensors to ternarize although they are kept by default
    dtype        float32, float16 or bfloat16 for kept floating-point tensors; None: as they are
    activations  none, or int8 per token; recorded for the loader
    """

    method: str = "absmean"
    group_size: int = 128
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    dtype: str | None = None
    activations: str = "none"

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        for what, value, known in (
            ("method", self.method, tuple(METHODS)),
            ("dtype", self.dtype, (None, *KEPT_DTYPES)),
            ("activations", self.activations, ACTIVATIONS),
        ):
            if value not in known:
                names = ", ".join(str(k) for k in known if k is not None)
                raise UsageError(f"{what}: {value!r}; expected one of {names}.")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the source and what it becomes.

    shape        logical shape: (rows, cols) or (experts, rows, cols) if ternary, else as stored
    tied_to      the tensor of which this one is a copy; then nothing is stored
    scale_dtype  planned; the tensor itself may call for another (see Relayout in convert.py)
    """

    info: TensorInfo
    choice: Choice
    shape: tuple[int, ...]
    group_size: int
    dtype: str
    scale_dtype: str = "F16"
    tied_to: str | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def ternary(self) -> bool:
        return self.choice.ternary

    def stored(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what is written for this tensor."""
        if self.tied_to:
            return []
        if not self.ternary:
            return [(self.name, self.dtype, self.shape)]
        packed, scales = self.record("0" * 64).stored_shapes()
        return [
            (self.name, "U8", packed),
            (self.name + SCALE_SUFFIX, self.scale_dtype, scales),
        ]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Cut the tensor into (start, stop) of elements; the cuts depend on its shape alone."""
        step = self.piece_numel()
        for start in range(0, self.info.numel, step):
            yield start, min(start + step, self.info.numel)

    def piece_numel(self) -> int:
        """Whole rows where rows are independent, whole matrices where they are not."""
        if not self.ternary:
            return PIECE
        if self.group_size == 0 or self.choice.transposed:
            return max(1, math.prod(self.shape[-2:]))
        cols = max(1, self.shape[-1])
        return max(1, PIECE // cols) * cols

    def record(self, sha256: str) -> Record:
        if not self.ternary:
            return Record(sha256)
        return Record(sha256, self.shape, self.group_size, transposed=self.choice.transposed)


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
        """Size of the header, the same whatever the digests and the 2-byte dtypes will be."""
        longest = replace(
            self, tensors=tuple(replace(t, scale_dtype=_longest(t)) for t in self.tensors)
        )
        records = {t.name: t.record("0" * 64) for t in self.tensors if not t.tied_to}
        size = len(header_bytes(longest.layout(), records))
        return 8 + size + -size % 8

    def nbytes(self) -> int:
        """Size of the file."""
        return self.data_start() + sum(entry.nbytes for entry in self.layout().values())


def _longest(tensor: TensorPlan) -> str:
    return "BF16" if tensor.scale_dtype == "F16" else tensor.scale_dtype


def header_bytes(entries: Mapping[str, Entry], records: Mapping[str, Record]) -> bytes:
    table: dict[str, Any] = {"__metadata__": container.dump_metadata(records)}
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

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    def packed_bytes(self) -> int:
        """Bytes of all weight files of the result."""
        return sum(shard.nbytes() for shard in self.shards)

    def coverage(self) -> dict[str, int]:
        """Parameters that become ternary, are kept, or are tied; the sum is the source's."""
        parts: Counter[str] = Counter(ternary=0, kept=0, tied=0)
        for t in self.tensors:
            parts["tied" if t.tied_to else "ternary" if t.ternary else "kept"] += t.info.numel
        total = sum(info.numel for info in self.source.tensors.values())
        assert sum(parts.values()) == total, "a tensor of the source is unaccounted for"
        return {**parts, "total": total}

    def convert_memory(self) -> int:
        """Predicted peak of the conversion, bytes above the interpreter with torch loaded."""
        per_weight = 12 if lib is not None else 80  # copies in flight: see convert._ternarize
        largest = max((min(t.info.numel, t.piece_numel()) for t in self.tensors), default=0)
        return (64 << 20) + THREADS * largest * per_weight

    def load_memory(self) -> int:
        """Predicted peak of loading and one forward pass on CPU, weights and one dense matrix."""
        dense = max((math.prod(t.shape[-2:]) * 4 for t in self.tensors if t.ternary), default=0)
        return self.packed_bytes() + dense

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for --json."""
        return {
            "model": self.model,
            "recipe": asdict(self.recipe),
            "coverage": self.coverage(),
            "source_bytes": sum(i.nbytes for i in self.source.tensors.values()),
            "packed_bytes": self.packed_bytes(),
            "convert_memory_bytes": self.convert_memory(),
            "load_memory_bytes": self.load_memory(),
            "notes": self.notes,
            "copied": self.copied,
            "left_out": self.left_out,
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.info.dtype,
                    "shape": list(t.info.shape),
                    "becomes": "tied" if t.tied_to else "ternary" if t.ternary else "kept",
                    "reason": f"tied to {t.tied_to}" if t.tied_to else t.choice.reason,
                    "stored_bytes": sum(
                        math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in t.stored()
                    ),
                }
                for t in self.tensors
            ],
        }


# --- planning --------------------------------------------------------------------------------


def plan(model: str | Path, recipe: Recipe = Recipe(), *, config_only: bool = False) -> Plan:  # noqa: B008
    """Lay out a conversion from headers, without reading weights (except to compare tied copies).

    model        directory, or Hub id user/name[@revision]
    config_only  a config.json without weights is enough: names and shapes come from the skeleton

    Raises CheckpointError, FormatError, SelectionError.
    """
    directory = locate(model, config_only=config_only)
    source = open_checkpoint(directory, need_weights=not config_only)
    _refuse_quantized(source)
    notes = []
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
    shapes = {name: info.shape for name, info in source.tensors.items()}
    choices = select(shapes, source.config, keep=recipe.keep, include=recipe.include)
    why = why_no_skeleton(source.config)
    if why:
        notes.append(f"no skeleton of the model ({why}): chosen by names and shapes")
    copies = _tied_copies(source)
    by_file: dict[str, list[TensorPlan]] = {file: [] for file in source.files}
    for choice in choices:
        info = source.tensors[choice.name]
        by_file[info.file].append(_plan_tensor(info, choice, recipe, copies.get(info.name)))
    if not any(t.ternary for tensors in by_file.values() for t in tensors):
        raise SelectionError(
            f"{model}: none of its {len(choices)} tensors is a linear weight to ternarize; "
            "expected some. Look at the reasons with --dry-run --json, or name some with --include."
            if not recipe.keep
            else f"{model}: --keep leaves no tensor to ternarize; expected some. Keep less."
        )
    count = len(by_file)
    shards = [
        Shard(
            SAFETENSORS if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors",
            tuple(tensors),
        )
        for i, tensors in enumerate(by_file.values(), 1)
    ]
    copied, left_out = _small_files(directory)
    return Plan(source, str(model), recipe, shards, copied, left_out, notes)


def _plan_tensor(
    info: TensorInfo, choice: Choice, recipe: Recipe, tied_to: str | None
) -> TensorPlan:
    shape = info.shape
    if choice.ternary and choice.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if choice.ternary and info.dtype not in _TERNARIZABLE:
        raise CheckpointError(
            f"{info.file}: {info.name} is {info.dtype}; weights to ternarize are "
            f"{', '.join(_TERNARIZABLE)}. Convert a checkpoint in floating point, or name it "
            "with --keep."
        )
    dtype = info.dtype
    if recipe.dtype and dtype in _FLOATS:
        dtype = KEPT_DTYPES[recipe.dtype]
    return TensorPlan(info, choice, shape, recipe.group_size, dtype, tied_to=tied_to)


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


def _tied_copies(source: Checkpoint) -> dict[str, str]:
    """Tensors that the source stores twice: name of the copy -> name of the one to store."""
    if source.config is None:
        return {}
    copies = {}
    for name, original in tied(source.config).items():
        a, b = source.tensors.get(name), source.tensors.get(original)
        if a and b and (a.dtype, a.shape) == (b.dtype, b.shape):
            equal = all(
                torch.equal(
                    byte_view(source.read(name, at, min(at + PIECE, a.numel))),
                    byte_view(source.read(original, at, min(at + PIECE, a.numel))),
                )
                for at in range(0, a.numel, PIECE)
            )
            if equal:
                copies[name] = original
    return copies


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_COPIED = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".vocab", ".bpe")


def _small_files(directory: Path) -> tuple[list[str], list[str]]:
    """Files to copy byte for byte (tokenizer, generation config, ...), and what is left out."""
    copied: list[str] = []
    left_out: list[str] = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        top = "/" not in name
        if any(part.startswith(".") for part in path.relative_to(directory).parts):
            continue
        weights_beside = any(p.suffix in _WEIGHTS for p in path.parent.iterdir())
        if not path.is_file() or (top and (path.suffix in _WEIGHTS or name.endswith(INDEX))):
            continue
        if top and name in ("config.json", RECORD):
            continue
        wanted = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
        (copied if wanted and (top or not weights_beside) else left_out).append(name)
    main = {"model.safetensors", "pytorch_model.bin"}
    for path in sorted(directory.iterdir()):
        if path.suffix in _WEIGHTS and path.name not in main and "-of-" not in path.name:
            left_out.append(path.name)
    return copied, left_out
