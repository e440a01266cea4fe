"""Weights brought straight from a file into the form in which they are multiplied.

transformers fills a model tensor by tensor, in Python. A packed matrix that fills a linear layer on
the CPU, alone and as it is, needs nothing of that: the core reads it, hashes and checks it, and
writes its lanes, all in one pass over its bytes and beside transformers, which is given a tensor
without memory in its place. Whatever else the core can check is read by it, too, and given as it
is.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.files.checkpoint import Checkpoint
from ternarize.files.container import check_read
from ternarize.files.headers import DTYPES
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.files.stored import Reading, ToRead, as_kept, core_reads
from ternarize.models.places import Place
from ternarize.runtime import kernels
from ternarize.runtime.forms import Lanes, Layout, in_lanes
from ternarize.runtime.modules.linear import TernaryLinear


def can_go_straight(device_map: Any) -> bool:
    """Whether a model that is spread so can be loaded so: on the CPU alone, by one process.

    device_map  that transformers was given: None, or by module
    """
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    here = all(each is None or str(each) == "cpu" for each in devices)
    return here and not (torch.distributed.is_available() and torch.distributed.is_initialized())


@dataclass(frozen=True)
class _Linear:
    """A layer that is filled straight: its path in the model, and what it will hold."""

    path: str
    lanes: Tensor
    scales: Tensor
    layout: Layout


class Straight:
    """The tensors of a packed checkpoint that go straight into a model.

    given   of each file: what transformers is to be given in their places
    others  the records of the other tensors, which are to be checked and read as ever

    places  of all tensors of the checkpoint, in the model that has its empty packed modules
    """

    def __init__(
        self,
        model: Any,
        packed: Checkpoint,
        records: Mapping[str, Record],
        places: Mapping[str, Place],
        *,
        checked: bool,
    ) -> None:
        fit = {n: each for n, each in records.items() if core_reads(packed, n, each)}
        paths = _linear_layers(model, fit, places)
        # those that transformers waits for come first, and what is kept and large before all
        asked = [name for name in fit if name not in paths]
        asked.sort(key=lambda name: 0 if fit[name].shape else -packed.tensors[name].nbytes)
        self._linears, lanes = _in_memory(model, packed, records, paths)
        wanted = [as_kept(packed, name, records[name]) for name in asked]
        self.reading = Reading(packed, [*wanted, *lanes], checked=checked)
        self.others = {name: each for name, each in records.items() if name not in fit}
        self.given: dict[Path, dict[str, Callable[[], Tensor]]] = {}
        for at, each in enumerate(wanted):
            # what is given does not keep the reading: of a load that has failed nothing stays
            take = partial(_taken, weakref.ref(self.reading), at)
            self._give(packed, each.name, take)
            if each.scales is not None:
                self._give(packed, each.name + SCALE_SUFFIX, partial(take, "scales"))
        for name in paths:
            for part in (name, name + SCALE_SUFFIX):
                self._give(packed, part, partial(_stand_in, packed, part))

    def _give(self, packed: Checkpoint, name: str, tensor: Callable[[], Tensor]) -> None:
        file = packed.directory / packed.tensors[name].file
        self.given.setdefault(file, {})[name] = tensor

    def wait(self) -> None:
        """Until the core is through: from then on it looks at no file."""
        for at in range(len(self.reading.wanted)):
            self.reading.is_good(at)

    def finish(self, model: Any) -> None:
        """Put everything in its place, after `wait`.

        Raises FormatError or its child DigestError where a tensor is not what its record says.
        """
        for at in range(len(self.reading.wanted)):
            check_read(self.reading, at)
        for linear in self._linears:
            module = model.get_submodule(linear.path)
            module.hold("weight", linear.lanes, linear.scales, linear.layout)


def _taken(reading: "weakref.ref[Reading]", at: int, which: str = "out") -> Tensor:
    """`Reading.take` of one that the load in which this is called keeps."""
    there = reading()
    assert there is not None
    return there.take(at, which)


def _linear_layers(
    model: Any, records: Mapping[str, Record], places: Mapping[str, Place]
) -> dict[str, str]:
    """Packed tensors that fill a linear layer alone and as they are -> the path of the layer."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*tied, *tied.values()}
    filled = Counter(target for place in places.values() for target in place.parameters)
    found = {}
    for name, record in records.items():
        if record.shape is None:
            continue
        weight, scale = places[name], places[name + SCALE_SUFFIX]
        if weight.converter is not None or scale.converter is not None or not weight.parameters:
            continue
        target = weight.parameters[0]
        path, _, leaf = target.rpartition(".")
        if scale.parameters != (target + SCALE_SUFFIX,) or filled[target] != 1 or target in shared:
            continue
        module = model.get_submodule(path)
        if type(module) is TernaryLinear and leaf == "weight" and in_lanes(module.layouts[leaf]):
            found[name] = path
    return found


def _in_memory(
    model: Any, packed: Checkpoint, records: Mapping[str, Record], paths: Mapping[str, str]
) -> tuple[list[_Linear], list[ToRead]]:
    """Memory for the lanes of these tensors, in one piece, and how it is filled."""
    form, linears, wanted = kernels.best_form(), [], []
    sizes = {}
    for name, path in paths.items():
        module = model.get_submodule(path)
        rows, layout = module.out_features, module.layouts["weight"]
        shape = kernels.lanes_shape(form, rows, layout.cols, layout.group_size)
        sizes[name] = (rows, layout, *shape)
    memory = kernels.memory(sum(size for _, _, size, _, _ in sizes.values()))
    for name, (rows, layout, size, blocks, block) in sizes.items():
        lanes, memory = memory[:size], memory[size:]
        stored = packed.tensors[name + SCALE_SUFFIX]
        scale_rows, groups = stored.shape
        dtype = DTYPES[stored.dtype]
        kind = torch.float16 if dtype in (torch.uint8, torch.float16) else torch.float32
        scales = torch.empty(blocks * groups * block, dtype=kind, device="cpu")
        held = replace(layout, lanes=Lanes(form, rows, scale_rows, dtype))
        linears.append(_Linear(paths[name], lanes, scales, held))
        wanted.append(ToRead(name, records[name], lanes, form, scales))
    return linears, wanted


def _stand_in(packed: Checkpoint, name: str) -> Tensor:
    """A tensor of the same shape and dtype that takes no memory."""
    info = packed.tensors[name]
    return torch.zeros((), dtype=DTYPES[info.dtype], device="cpu").expand(info.shape)
