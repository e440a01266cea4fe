"""The blocks that are done: what becomes of one, and its file.

What is found for a block is written to a file, a packed checkpoint of its own, before the next
block begins: 00007-00008.safetensors is block 7 as it was after block 8 had been done. A run that
was broken off reads those files and repeats only the forwards.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ternarize.calibrate.blocks import Blocks
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint, open_files
from ternarize.files.headers import DTYPES
from ternarize.files.metadata import SCALE_SUFFIX, Record, dump_metadata, records_of
from ternarize.files.outputs import write_whole
from ternarize.plans.layout import TensorPlan
from ternarize.qat.rounding import Form
from ternarize.trits.base3 import BASE3
from ternarize.trits.methods import levels
from ternarize.trits.ternary import Ternary

# the file of a calibrated block that holds a tensor, and the tensor's record there
Solved = tuple[Checkpoint, Record]


@dataclass
class Parts:
    """What becomes of a block, by parameter.

    stored   planes of ternary weights in the parameter's orientation, rotated if stored so
    forms    how each weight is stored
    vectors  biases and norms that have changed
    """

    stored: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def patch(self) -> dict[str, Tensor]:
        """The parameters that the block runs with."""
        weights = {n: self.forms[n].parameter(sum_planes(p)) for n, p in self.stored.items()}
        return weights | self.vectors


class SolvedBlocks:
    """The files of a run's blocks, in a folder that may hold those of an earlier run.

    plans  parameter of the model -> the plan of the tensor that it is stored in, if that is ternary
    """

    def __init__(self, folder: Path, blocks: Blocks, tensors: Sequence[TensorPlan]) -> None:
        self.folder, self.blocks = folder, blocks
        self._tensors = {t.name: t for t in tensors}
        self.plans: dict[str, TensorPlan] = {
            parameter: t
            for t in tensors
            if t.ternary
            for parameter in blocks.places[t.name].parameters
        }

    def files(self) -> dict[str, Path]:
        """Block -> its file, for the blocks that are done."""
        complete = self.stages()
        found = {}
        for index, path in enumerate(self.blocks.paths):
            own = [s for s in complete if self.file(index, s).is_file()]
            if own:
                found[path] = self.file(index, max(own))
        return found

    def stages(self) -> set[int]:
        """Blocks that are done: the file that is written last tells it."""
        stages = {int(p.stem[6:]) for p in self.folder.glob("*.safetensors")}
        return {s for s in stages if self.file(s, s).is_file()}

    def file(self, block: int, stage: int) -> Path:
        """Where a block is as it was after a stage."""
        return self.folder / f"{block:05d}-{stage:05d}.safetensors"

    def write(self, file: Path, path: str, parts: Parts, report: Mapping[str, Any]) -> None:
        """Write a block's file: its tensors as they will be stored, under the source's names."""
        values = {f"{path}.{n}": planes for n, planes in parts.stored.items()}
        values |= {f"{path}.{n}": (value,) for n, value in parts.vectors.items()}
        write_solved(file, self.blocks, self._tensors, values, {"report": json.dumps(report)})

    def report(self, path: str) -> dict[str, Any]:
        """What a block's file says of how it came out."""
        file = self.files()[path]
        report: dict[str, Any] = json.loads(open_solved(file).metadata[file.name]["report"])
        return report

    def parts(self, path: str) -> Parts:
        """A loaded block as its file has it."""
        tensors = read_planes(self.files()[path])
        parts = Parts()
        for plane in range(max(len(planes) for planes in tensors.values())):
            own = {name: planes[plane] for name, planes in tensors.items() if plane < len(planes)}
            for name, value in self.blocks.replaced(path, own).items():
                plan = self.plans.get(f"{path}.{name}")
                if plan is None:
                    parts.vectors[name] = value
                else:
                    parts.stored[name] = (*parts.stored.get(name, ()), value)
                    parts.forms[name] = form_of(plan)
        return parts


def write_solved(
    file: Path,
    blocks: Blocks,
    tensors: Mapping[str, TensorPlan],
    values: Mapping[str, tuple[Tensor, ...]],
    about: Mapping[str, str],
    ends: Mapping[str, tuple[Tensor, Tensor]] = {},  # noqa: B006
) -> None:
    """Write tensors as they will be stored, under the source's names, as a packed file.

    tensors  the plan's, by name
    values   parameter of the model -> its planes: ternary already where the plan says so, else one
             dense tensor
    about    what is to stand in the metadata
    ends     heads and embeddings in 8 or 4 bits, by tensor of the source: numbers int8 (rows, cols)
             and scales in their dtype
    """
    disk: dict[str, list[Tensor]] = {}
    for plane in range(2):
        own = {name: each[plane].cpu() for name, each in values.items() if plane < len(each)}
        for name, value in blocks.on_disk(own).items():
            disk.setdefault(name, []).append(value)
    stored: dict[str, Tensor] = {}
    records: dict[str, Record] = {}
    for name, planes in disk.items():
        plan = tensors[name]
        if plan.ternary:
            ternary = [_exact(name, plan, plane) for plane in planes]
            packed, scales = container.encode(*ternary, exact=True)
            stored[name], stored[name + SCALE_SUFFIX] = packed, scales
            # scales are in 16 bits or more here, whatever the result will have
            record = replace(plan, scale_dtype="F16").record
            records[name] = record(container.digest(packed, scales))
        else:
            stored[name] = planes[0].to(DTYPES[plan.dtype]).contiguous()
            records[name] = Record(container.digest(stored[name]))
    for name, (numbers, scales) in ends.items():
        codec, group_size = tensors[name].choice.codec, tensors[name].group_size
        stored[name] = container.encode_numbers(numbers.cpu(), codec, group_size)
        stored[name + SCALE_SUFFIX] = scales.cpu()
        digest = container.digest(stored[name], stored[name + SCALE_SUFFIX])
        records[name] = tensors[name].record(digest)
    write_whole(file, save(stored, dump_metadata(records) | dict(about)))


def open_solved(file: Path) -> Checkpoint:
    """A block's file, its bytes checked."""
    packed = open_files(file.parent, [file.name])
    container.check_data(packed, records_of(packed))
    return packed


def read_solved(packed: Checkpoint, name: str, record: Record) -> tuple[Ternary, ...]:
    """The planes of one ternary tensor of a block's file."""
    return container.decode_planes(*_read_pair(packed, name), record)


def read_numbers(packed: Checkpoint, name: str, record: Record) -> tuple[Tensor, Tensor]:
    """The numbers, int8, of one tensor in 8 or 4 bits, and its scales in their dtype."""
    return container.decode_numbers(*_read_pair(packed, name), record)


def _read_pair(packed: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """A packed tensor and its scales, as they are stored."""
    pair = (name, name + SCALE_SUFFIX)
    stored, scales = (packed.read(n).reshape(packed.tensors[n].shape) for n in pair)
    return stored, scales


def read_planes(file: Path) -> dict[str, tuple[Tensor, ...]]:
    """A block's file: the planes of its tensors, float32, as the source has them.

    Rotated matrices are left as they are stored; those in 8 or 4 bits are left out.
    """
    packed = open_solved(file)
    tensors: dict[str, tuple[Tensor, ...]] = {}
    for name, record in records_of(packed).items():
        if record.shape is None:
            value = packed.read(name).reshape(packed.tensors[name].shape)
            tensors[name] = (value.to(torch.float32),)
            continue
        if record.codec != BASE3:
            continue
        dense = [t.dequantize(torch.float32) for t in read_solved(packed, name, record)]
        tensors[name] = tuple(container.as_source(t, record) for t in dense)
    return tensors


def sum_planes(planes: Sequence[Tensor]) -> Tensor:
    """The weight that planes stand for, as `container.dequantize` adds them."""
    total = planes[0]
    for plane in planes[1:]:
        total = total + plane
    return total


def form_of(plan: TensorPlan) -> Form:
    """How a tensor that is planned so is stored."""
    layout = plan.group_size, plan.choice.transposed, *plan.rotation
    return Form(
        *layout,
        scale_dtype=plan.scale_dtype,
        codec=plan.choice.codec,
        kernel=plan.kernel,
        scale_bits=plan.scale_bits,
    )


def _exact(name: str, plan: TensorPlan, value: Tensor) -> Ternary:
    """A tensor of the source's shape whose values are ternary already, as trits and scales."""
    ternary = levels(form_of(plan).turn(value).contiguous(), plan.group_size)
    assert ternary is not None, f"{name} is not ternary"
    return ternary
