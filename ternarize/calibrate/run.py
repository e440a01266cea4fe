"""Calibration of a whole model: block after block, group after group.

Two streams run side by side on the same tokens: the float stream is the source model, the packed
stream is the model as it will be, with every block so far ternarized. For each sequential group of
a block (statistics.py) the moments of the packed stream's inputs against the float stream's outputs
are collected, each matrix is solved (gptq.py), and the packed stream goes on with the result.

What is found for a block is written to a file, a packed checkpoint of its own, before the next
block begins. A run that was broken off reads those files and repeats only the forwards.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ternarize import container
from ternarize.calibrate.blocks import Batch, Blocks, Call, Forward, block_paths
from ternarize.calibrate.gptq import Rounding, Solution, solve
from ternarize.calibrate.statistics import Group, Moments, Trace, sequential_groups
from ternarize.checkpoint import Checkpoint, open_files
from ternarize.container import SCALE_SUFFIX, Record
from ternarize.errors import CheckpointError
from ternarize.methods import levels
from ternarize.plan import TensorPlan
from ternarize.rotation import block_size, rotate, unrotate

Progress = Callable[[int, int, str], None]
ROTATE = 0
SETS = ("train", "held", "report")


@dataclass
class _Lane:
    """The two forwards of one batch, float and packed, and what they wait with."""

    kind: str
    mask: Tensor | None
    forwards: tuple[Forward, Forward]
    calls: list[Any] = field(default_factory=list)


@dataclass
class BlockReport:
    """Errors of one block on held-out tokens, relative to the output of the float stream."""

    block: str
    before: float
    after: float
    matrices: dict[str, dict[str, float]]
    uncalibrated: list[str]


class Calibration:
    """The state of one run.

    source   checkpoint with float weights
    tensors  plan of the tensors that become ternary
    folder   where the blocks' files are
    """

    def __init__(
        self,
        source: Checkpoint,
        tensors: Sequence[TensorPlan],
        sets: Mapping[str, Sequence[Batch]],
        folder: Path,
        rounding: Rounding,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.source, self.folder, self.rounding = source, folder, rounding
        self.progress = progress
        self.plans = {t.name: t for t in tensors if t.ternary}
        self.blocks = Blocks(source, (), device)
        self.group_sizes: dict[str, int] = {}
        for t in self.plans.values():
            for parameter in self.blocks.places[t.name].parameters:
                self.group_sizes[parameter] = t.group_size
        paths = block_paths(self.blocks.model, list(self.group_sizes))
        self.blocks = Blocks(source, paths, device)
        self.lanes = [
            _Lane(kind, batch.get("attention_mask"), tuple(self.blocks.start([batch, batch])))
            for kind in SETS
            for batch in sets.get(kind, ())
        ]
        self.reports: list[BlockReport] = []
        self.done: set[str] = set()

    def run(self) -> None:
        """Calibrate every block."""
        try:
            for lane in self.lanes:
                lane.calls = [f.resume() for f in lane.forwards]
            while len(self.done) < len(self.blocks.paths):
                self._step()
        finally:
            for lane in self.lanes:
                for forward in lane.forwards:
                    forward.stop()

    def outputs(self) -> Iterator[tuple[Any, Any]]:
        raise NotImplementedError

    def _step(self) -> None:
        """Do the block at which all forwards wait, and let them run on to the next."""
        paths = {c.block if isinstance(c, Call) else None for x in self.lanes for c in x.calls}
        if len(paths) != 1 or None in paths:
            raise CheckpointError(
                f"{self.source.directory}: its forward does not run the same blocks for every "
                "batch; expected that it does. Convert it without --dataset."
            )
        (path,) = paths
        assert path is not None
        with self.blocks.loaded(path) as block:
            file = self.folder / f"{self.blocks.paths.index(path):05d}.safetensors"
            if not file.is_file():
                self._solve(path, block, file)
            patch = self.blocks.replaced(path, self._read(file))
            for lane in self.lanes:
                for stream in (0, 1):
                    with _patched(block, patch if stream else {}):
                        lane.calls[stream] = self.blocks.run(lane.calls[stream])
        before = [0.0, 0.0]
        for lane in self.lanes:
            if lane.kind == "held":
                f, q = (_hidden(c) for c in lane.calls)
                before[0] += float((q - f).square().sum())
                before[1] += float(f.square().sum())
        print(path, "block error", before[0] / before[1], flush=True)
        self.done.add(path)
        for lane in self.lanes:
            if lane.kind != "report" and len(self.done) == len(self.blocks.paths):
                continue
            lane.calls = [
                f.resume(output) for f, output in zip(lane.forwards, lane.calls, strict=True)
            ]

    def _solve(self, path: str, block: nn.Module, file: Path) -> None:
        names = [
            name for name, _ in block.named_parameters() if f"{path}.{name}" in self.group_sizes
        ]
        train = [lane for lane in self.lanes if lane.kind == "train"]
        trace = Trace({n: block.get_parameter(n).data for n in names})
        trace.run(lambda: self.blocks.run(train[0].calls[0]))
        groups = sequential_groups(trace, {n: block.get_parameter(n) for n in names})
        biases = _biases(trace, block)
        turned = {p.name: p.transposed for p in trace.products}
        patch: dict[str, Tensor] = {}
        rotated: dict[str, Tensor] = {}
        for group in groups:
            moments = self._moments(path, block, names, group, patch, turned)
            for name in group.names:
                self._solve_parameter(
                    path, block, name, turned[name], biases.get(name), moments, patch, rotated
                )
        tensors = self.blocks.on_disk({f"{path}.{n}": v.cpu() for n, v in (patch|rotated).items()})
        self._write(file, tensors)

    def _moments(
        self,
        path: str,
        block: nn.Module,
        names: Sequence[str],
        group: Group,
        patch: Mapping[str, Tensor],
        turned: Mapping[str, bool],
    ) -> dict[tuple[str, int, str], Moments]:
        """Moments of each matrix of a group, on calibration and on held-out tokens."""
        found: dict[tuple[str, int, str], Moments] = {}
        stack = group.products == 0
        for lane in self.lanes:
            if lane.kind == "report":
                continue
            traces = []
            for stream in (0, 1):
                if stack and stream == 0:
                    continue
                with _patched(block, patch if stream else {}):
                    trace = Trace({n: block.get_parameter(n).data for n in names}, group.seen)
                    call = lane.calls[stream]
                    trace.run(lambda call=call: self.blocks.run(call))
                traces.append([p for p in trace.products if p.name in group.names])
            seen: set[int] = set()
            for at, p in enumerate(traces[-1]):
                x = _tokens(p.x, lane.mask)
                y = None
                if not stack:
                    f = traces[0][at]
                    y = f.y
                    if p.name in group.residual and f.terms is not None and p.terms is not None:
                        y = y + (f.terms - p.terms).reshape(y.shape) / p.scale
                    y = _tokens(y, lane.mask)
                key = (p.name, p.expert, lane.kind)
                if key not in found:
                    rows, cols = _sizes(block.get_parameter(p.name), turned[p.name])
                    found[key] = Moments.empty(rows, cols, target=not stack, device=x.device)
                found[key].add(x, y)
        return found

    def _solve_parameter(
        self,
        path: str,
        block: nn.Module,
        name: str,
        turned: bool,
        bias: str | None,
        moments: Mapping[tuple[str, int, str], Moments],
        patch: dict[str, Tensor],
        rotated: dict[str, Tensor],
    ) -> None:
        weight = block.get_parameter(name).data
        stack = weight if weight.ndim == 3 else weight[None]
        solved, turned_in = torch.empty_like(stack), torch.empty_like(stack)
        for expert, matrix in enumerate(stack):
            matrix = matrix.T.contiguous() if turned else matrix
            empty = Moments.empty(*matrix.shape, target=False, device=matrix.device)
            b = block_size(matrix.shape[1], ROTATE) if ROTATE else 0
            mo = [moments.get((name, expert, k), empty) for k in ("train", "held")]
            if b:
                matrix = rotate(matrix, b, 0)
                mo = [m.rotated(b, 0) for m in mo]
            solution = solve(
                matrix,
                *mo,
                self.group_sizes[f"{path}.{name}"],
                self.rounding,
                bias=bias is not None,
            )
            dense = solution.ternary.dequantize(torch.float32)
            turned_in[expert] = dense.T if turned else dense
            dense = unrotate(dense, b, 0) if b else dense
            solved[expert] = dense.T if turned else dense
            print(f"{path}.{name} {solution.plain:.4f} -> {solution.error:.4f}")
            if bias is not None and solution.bias is not None:
                patch[bias] = solution.bias
        patch[name] = solved if weight.ndim == 3 else solved[0]
        rotated[name] = turned_in if weight.ndim == 3 else turned_in[0]

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        stored: dict[str, Tensor] = {}
        records: dict[str, Record] = {}
        for name, value in tensors.items():
            plan = self.plans.get(name)
            if plan is None:
                stored[name] = value.contiguous()
                records[name] = Record(container.digest(stored[name]))
                continue
            logical = value.transpose(-1, -2) if plan.choice.transposed else value
            ternary = levels(logical.contiguous(), plan.group_size)
            assert ternary is not None, f"{name} is not ternary"
            packed, scales = container.encode(ternary, exact=True)
            stored[name], stored[name + SCALE_SUFFIX] = packed, scales
            records[name] = plan.record(container.digest(packed, scales))
        temporary = file.with_suffix(".new")
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, metadata=container.dump_metadata(records))
        temporary.replace(file)

    def _read(self, file: Path) -> dict[str, Tensor]:
        """A block's file as float32 tensors under the source's names, as the source has them."""
        packed = open_files(file.parent, [file.name])
        records = container.records_of(packed)
        container.check(packed, records)
        tensors = {}
        for name, record in records.items():
            value = packed.read(name).reshape(packed.tensors[name].shape)
            if record.shape is not None:
                info = packed.tensors[name + SCALE_SUFFIX]
                scales = packed.read(name + SCALE_SUFFIX).reshape(info.shape)
                value = container.decode(value, scales, record).dequantize(torch.float32)
                b = block_size(value.shape[-1], ROTATE) if ROTATE else 0
                value = unrotate(value, b, 0) if b else value
                if record.transposed:
                    value = value.transpose(-1, -2).contiguous()
            tensors[name] = value
        return tensors


@contextmanager
def _patched(block: nn.Module, patch: Mapping[str, Tensor]) -> Iterator[None]:
    """The block with some of its parameters replaced."""
    kept = {name: block.get_parameter(name).data for name in patch}
    for name, value in patch.items():
        block.get_parameter(name).data = value
    try:
        yield
    finally:
        for name, value in kept.items():
            block.get_parameter(name).data = value


def _biases(trace: Trace, block: nn.Module) -> dict[str, str]:
    """Weight -> the parameter that is its product's bias."""
    parameters = {p.untyped_storage().data_ptr(): n for n, p in block.named_parameters()}
    found = {}
    for product in trace.products:
        if product.bias is not None:
            name = parameters.get(product.bias.untyped_storage().data_ptr())
            if name is not None:
                found[product.name] = name
    return found


def _sizes(weight: Tensor, turned: bool) -> tuple[int, int]:
    rows, cols = weight.shape[-2:]
    return (cols, rows) if turned else (rows, cols)


def _tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length, n) -> (tokens, n) without padding."""
    if mask is not None and values.shape[:2] == mask.shape:
        return values[mask.bool()]
    return values.reshape(-1, values.shape[-1])


def _hidden(output: Any) -> Tensor:
    """The hidden states that a block gives, alone or first of several."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
