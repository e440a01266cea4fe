"""Calibration of a whole model: block after block, group after group.

Two streams run side by side on the same tokens: the float stream is the source model, the packed
stream is the model as it will be, with every block so far ternarized. For each sequential group of
a block (statistics.py) the moments of the packed stream's inputs against the float stream's outputs
are collected, each matrix is solved (gptq.py), and the packed stream goes on with the result.
With `steps`, the last `window` blocks are then trained together (reconstruct.py). After all blocks,
`distill` trains the whole model.

What is found for a block is written to a file, a packed checkpoint of its own, before the next
block begins: 00007-00008.safetensors is block 7 as it was after block 8 had been done. A run that
was broken off reads those files and repeats only the forwards.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from ternarize.calibrate.blocks import (
    Batch,
    Blocks,
    Call,
    Forward,
    code_of_the_model,
    map_tensors,
)
from ternarize.calibrate.gptq import Rounding, probe_rows, solve
from ternarize.calibrate.reconstruct import (
    Form,
    TernaryWeight,
    divergence,
    huber,
    parameters,
    reconstruct,
)
from ternarize.calibrate.statistics import Group, Inputs, Moments, Trace, sequential_groups
from ternarize.errors import CheckpointError
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint, open_files
from ternarize.files.container import SCALE_SUFFIX, Record
from ternarize.files.headers import DTYPES
from ternarize.files.outputs import write_whole
from ternarize.models.skeleton import model_end
from ternarize.plans.layout import TensorPlan
from ternarize.progress import Progress
from ternarize.trits.methods import itf, levels
from ternarize.trits.rotation import rotate
from ternarize.trits.ternary import Ternary

FLOAT, PACKED = 0, 1  # the streams
TICKS = 1000  # of progress, for each block
STEP_TOKENS = 1024  # in each step of training the whole model
OTHER_TOKENS = 256  # that a sample without token ids counts for


@dataclass(frozen=True)
class BlockReport:
    """What came of one block, on held-out tokens.

    before, after  squared error of the packed stream behind the block, relative to the float
                   stream: with this block ternarized by `itf`, and as it was when it was done (not
                   after the training of later windows and of the whole model)
    matrices       the same of each matrix's products: {tensor: (before, after)}
    uncalibrated   matrices that saw too few tokens, ternarized by `itf`: {tensor on disk, with
                   [expert] if it holds several: how many}
    """

    block: str
    before: float
    after: float
    matrices: dict[str, tuple[float, float]]
    uncalibrated: dict[str, int]


@dataclass
class _Lane:
    """The two forwards of one batch, and what they wait with (a Call, or the final output)."""

    kind: str
    batch: Batch
    mask: Tensor | None
    forwards: tuple[Forward, Forward]
    waiting: list[Any] = field(default_factory=list)


@dataclass
class _Kept:
    """A block of the window: what it is called with in the packed stream, for each lane."""

    path: str
    calls: list[Call]
    outputs: list[Tensor]  # the hidden states that it gave, by which the next call is known


class Calibration:
    """The state of one run; `run` does it.

    source   checkpoint with float weights
    tensors  the plan: which become ternary, in what groups and rotations
    sets     "train", "held", "report": batches of arguments of the model's forward
    folder   where the blocks' files are; files of an earlier run are used
    steps    of training for each block; 0: none
    window   blocks trained together
    """

    def __init__(
        self,
        source: Checkpoint,
        tensors: Sequence[TensorPlan],
        sets: Mapping[str, Sequence[Batch]],
        folder: Path,
        *,
        rounding: Rounding,
        steps: int = 0,
        window: int = 1,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.source, self.folder, self.rounding = source, folder, rounding
        self.steps, self.window_size, self.seed = steps, window, seed
        self.progress = progress
        self.plans = {t.name: t for t in tensors}
        self.blocks = Blocks(source, [t.name for t in tensors if t.ternary], device)
        self.by_parameter: dict[str, TensorPlan] = {}
        for t in tensors:
            for parameter in self.blocks.places[t.name].parameters if t.ternary else ():
                self.by_parameter[parameter] = t
        self.lanes = [
            _Lane(kind, batch, _mask(batch), (self.blocks.start(batch), self.blocks.start(batch)))
            for kind in ("train", "held", "report")
            for batch in sets.get(kind, ())
        ]
        self.window: list[_Kept] = []
        self.reports: list[BlockReport] = []
        self.done: list[str] = []

    def run(self) -> Iterator[tuple[int, Any, Any]]:
        """Calibrate every block; yields (index, float output, packed output) of report batches."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for lane in self.lanes:
                lane.waiting = [forward.resume() for forward in lane.forwards]
            while len(self.done) < len(self.blocks.paths):
                self._step()
            for lane in self.lanes:
                if lane.kind != "report":
                    for forward in lane.forwards:
                        forward.stop()
                    lane.waiting.clear()
            for index, lane in enumerate(self._lanes("report")):
                yield index, *(self._finish(lane, stream) for stream in (FLOAT, PACKED))
        finally:
            for lane in self.lanes:
                for forward in lane.forwards:
                    forward.stop()

    def files(self) -> dict[str, Path]:
        """Block -> its file, for the blocks that are done."""
        complete = self._stages()
        found = {}
        for index, path in enumerate(self.blocks.paths):
            own = [s for s in complete if self._file(index, s).is_file()]
            if own:
                found[path] = self._file(index, max(own))
        return found

    def _stages(self) -> set[int]:
        """Blocks that are done, and their number if the whole model has been trained after them.

        The file that is written last tells it.
        """
        stages = {int(p.stem[6:]) for p in self.folder.glob("*.safetensors")}
        last = len(self.blocks.paths) - 1
        return {s for s in stages if self._file(min(s, last), s).is_file()}

    def _file(self, block: int, stage: int) -> Path:
        return self.folder / f"{block:05d}-{stage:05d}.safetensors"

    def _lanes(self, *kinds: str) -> list[_Lane]:
        return [lane for lane in self.lanes if lane.kind in kinds]

    # --- one block ---------------------------------------------------------------------------

    def _step(self) -> None:
        """Do the block at which all forwards wait, and let them run on to the next."""
        paths = {c.block if isinstance(c, Call) else None for x in self.lanes for c in x.waiting}
        if len(paths) != 1 or None in paths:
            raise CheckpointError(
                self.source.directory,
                "its forward does not come to the same blocks for every batch, or not to all of "
                "them",
                "that it does",
                "Convert it without --dataset",
            )
        (path,) = paths
        assert path is not None
        again = path in self.done
        self._tick(0.0, path)
        with self.blocks.loaded(path) as block:
            targets = [self.blocks.run(lane.waiting[FLOAT]) for lane in self.lanes]
            self._check_finite(path, targets)
            if not torch.equal(
                _hidden(self.blocks.run(self.lanes[0].waiting[FLOAT])), _hidden(targets[0])
            ):
                raise CheckpointError(
                    self.source.directory,
                    f"{path} gives another output when it is run again",
                    "a function of its input",
                    "Convert it without --dataset",
                )
            if not again:
                known = self.files()
                if path not in known:
                    self._make(path, block, targets)
                self._load_report(self.files()[path])
            patch = self._patch(path)
            with _patched(block, patch):
                outputs = [self.blocks.run(lane.waiting[PACKED]) for lane in self.lanes]
            self._check_finite(path, outputs)
        if not again:
            self._remember(path, outputs)
            self.done.append(path)
        over = len(self.done) == len(self.blocks.paths)
        for lane, target, output in zip(self.lanes, targets, outputs, strict=True):
            if over and lane.kind != "report":
                continue
            reply = (target, output)
            lane.waiting = [f.resume(r) for f, r in zip(lane.forwards, reply, strict=True)]

    def _check_finite(self, path: str, outputs: Sequence[Any]) -> None:
        for lane, output in zip(self.lanes, outputs, strict=True):
            if not bool(_tokens(_hidden(output), lane.mask).isfinite().all()):
                raise CheckpointError(
                    self.source.directory,
                    f"{path} gives numbers that are not finite",
                    "finite ones on the calibration data",
                    "Use other data, or convert it without --dataset",
                )

    def _finish(self, lane: _Lane, stream: int) -> Any:
        """Run a forward of which all blocks are done to its end; shared blocks may come again."""
        while isinstance(lane.waiting[stream], Call):
            path = lane.waiting[stream].block
            with self.blocks.loaded(path) as block:
                with _patched(block, self._patch(path) if stream == PACKED else {}):
                    output = self.blocks.run(lane.waiting[stream])
            lane.waiting[stream] = lane.forwards[stream].resume(output)
        result, lane.waiting[stream] = lane.waiting[stream], None
        return result

    def _patch(self, path: str) -> dict[str, Tensor]:
        """What differs in the packed stream: parameters of the loaded block -> their values."""
        return self._parts(path).patch()

    def _make(self, path: str, block: nn.Module, targets: Sequence[Any]) -> None:
        """Ternarize a block, train its window, write the files."""
        index = self.blocks.paths.index(path)
        before = self._held_error(block, self._plain(path, block), targets)
        parts, matrices, uncalibrated = self._solve(path, block)
        state = {path: parts}
        if self.steps:
            state = self._train(path, block, parts, targets)
        after = self._held_error(block, state[path].patch(), targets)
        for name, each in state.items():
            if name != path:
                known = self._read(self.files()[name])[1]
                self._write(self._file(self.blocks.paths.index(name), index), name, each, known)
        report = asdict(BlockReport(path, before, after, matrices, uncalibrated))
        self._write(self._file(index, index), path, state[path], report)

    def _held_error(
        self, block: nn.Module, patch: Mapping[str, Tensor], targets: Sequence[Any]
    ) -> float:
        error = energy = 0.0
        with _patched(block, patch):
            for lane, target in zip(self.lanes, targets, strict=True):
                if lane.kind == "held":
                    output = _tokens(_hidden(self.blocks.run(lane.waiting[PACKED])), lane.mask)
                    wanted = _tokens(_hidden(target), lane.mask)
                    error += float((output - wanted).double().square().sum())
                    energy += float(wanted.double().square().sum())
        return error / max(energy, 1e-30)

    def _plain(self, path: str, block: nn.Module) -> dict[str, Tensor]:
        """The block as `itf` without data would have it."""
        patch = {}
        for name in self._names(path, block):
            plan = self.by_parameter[f"{path}.{name}"]
            weight = block.get_parameter(name).data
            turned = plan.choice.transposed
            logical = weight.transpose(-1, -2).contiguous() if turned else weight
            dense = itf(logical, plan.group_size).dequantize(torch.float32)
            patch[name] = dense.transpose(-1, -2) if turned else dense
        return patch

    def _names(self, path: str, block: nn.Module) -> list[str]:
        """The block's parameters that become ternary."""
        return [n for n, _ in block.named_parameters() if f"{path}.{n}" in self.by_parameter]

    def _solve(
        self, path: str, block: nn.Module
    ) -> tuple["Parts", dict[str, tuple[float, float]], dict[str, int]]:
        """Ternarize a block group by group; returns it, errors, and tokens of what saw too few."""
        names = self._names(path, block)
        parts = Parts()
        matrices: dict[str, tuple[float, float]] = {}
        unseen: dict[str, dict[int, int]] = {name: {} for name in names}
        trace = Trace({n: block.get_parameter(n).data for n in names})
        first = self._lanes("train")[0].waiting[FLOAT]
        trace.run(lambda: self.blocks.run(first))
        groups = sequential_groups(trace, {n: block.get_parameter(n) for n in names})
        biases = _biases(trace, block)
        del trace  # the inputs and outputs of every product of the block
        reached = {n for group in groups for n in group.names}
        left = [n for n in names if n not in reached]
        groups += [Group((n,), 0, 0) for n in left]
        for at, group in enumerate(groups):
            share = (0.5 if self.steps else 1.0) / len(groups)
            moments = self._moments(path, block, names, group, parts.patch(), at * share, share)
            for name in group.names:
                plan = self.by_parameter[f"{path}.{name}"]
                weight = block.get_parameter(name).data
                form = _form(plan)
                # experts keep theirs: without targets there is no mean to fit it to
                bias = None if group.stack else biases.get(name)
                stack = weight if weight.ndim == 3 else weight[None]
                stored = [torch.empty_like(stack) for _ in range(plan.planes)]
                errors = []
                for expert, matrix in enumerate(stack):
                    matrix = form.turn(matrix).contiguous()
                    if form.block:
                        matrix = rotate(matrix, form.block, form.seed)
                    cols = matrix.shape[1]
                    # each is large, and used once
                    empty = Inputs.empty(cols, keep=True, device=matrix.device)
                    train, held = (
                        moments.pop((name, expert, k), Moments.empty(empty, 0, target=False))
                        for k in ("train", "held")
                    )
                    solution = solve(
                        matrix,
                        train,
                        held,
                        form.group_size,
                        self.rounding,
                        planes=plan.planes,
                        bias=bias is not None,
                    )
                    for plane, ternary in zip(stored, solution.planes, strict=True):
                        plane[expert] = form.turn(ternary.dequantize(torch.float32))
                    errors.append((solution.plain, solution.error))
                    if not solution.calibrated:
                        unseen[name][expert] = train.inputs.tokens
                    if bias is not None and solution.bias is not None:
                        parts.vectors[bias] = solution.bias
                    del train, held, solution
                parts.stored[name] = tuple(p if weight.ndim == 3 else p[0] for p in stored)
                parts.forms[name] = form
                before, after = (sum(e) / len(e) for e in zip(*errors, strict=True))
                matrices[name] = (before, after)
        return parts, matrices, self._uncalibrated(path, block, unseen)

    def _uncalibrated(
        self, path: str, block: nn.Module, unseen: Mapping[str, Mapping[int, int]]
    ) -> dict[str, int]:
        """How many tokens the matrices {parameter: {expert: tokens}} saw, on the source's names."""
        if not any(unseen.values()):
            return {}
        counts = {}
        for name, experts in unseen.items():
            # a tensor of numbers goes the way of the weights, to find where each matrix comes from
            weight = block.get_parameter(name)
            count = torch.full((len(weight) if weight.ndim == 3 else 1, 1, 1), -1.0)
            for expert, tokens in experts.items():
                count[expert] = tokens
            counts[f"{path}.{name}"] = count.expand(-1, *weight.shape[-2:]).reshape(weight.shape)
        found = {}
        for name, value in self.blocks.on_disk(counts).items():
            for expert, one in enumerate(value if value.ndim == 3 else value[None]):
                if float(one[0, 0]) >= 0:
                    found[name if value.ndim < 3 else f"{name}[{expert}]"] = int(one[0, 0])
        return found

    def _moments(
        self,
        path: str,
        block: nn.Module,
        names: Sequence[str],
        group: Group,
        patch: Mapping[str, Tensor],
        begin: float,
        share: float,
    ) -> dict[tuple[str, int, str], Moments]:
        """Moments of each matrix of a group, on calibration and on held-out tokens.

        Of inputs as the matrix is stored, rotated or not. Matrices with the same input share what
        is known of it. Held-out targets are those of `probe_rows`.
        """
        found: dict[tuple[str, int, str], Moments] = {}
        lanes = self._lanes("train", "held")
        for done, lane in enumerate(lanes):
            self._tick(begin + share * done / len(lanes), ", ".join(group.names))
            packed = self._products(block, names, group, lane.waiting[PACKED], patch)
            floats = None
            if not group.stack:
                floats = self._products(block, names, group, lane.waiting[FLOAT], {})
            sources: dict[str, list[tuple[int, ...]]] = {}
            for p in packed:
                sources.setdefault(p.name, []).append(p.source)
            inputs: dict[tuple[int, ...], Tensor] = {}
            for at, p in enumerate(packed):
                if group.stack or p.source not in inputs:
                    x = _tokens(p.x, lane.mask)
                    if group.stack:  # tokens that do not reach an expert may come to it as zeros
                        x = x[x.any(-1)]
                    form = _form(self.by_parameter[f"{path}.{p.name}"])
                    inputs[p.source] = rotate(x, form.block, form.seed) if form.block else x
                x, rows, held = inputs[p.source], p.y.shape[-1], lane.kind == "held"
                probe = probe_rows(rows).to(x.device)
                # the first matrix with the same inputs; each expert has its own
                alike = [n for n, own in sources.items() if own == sources[p.name]]
                key = p.name, p.expert, lane.kind
                first = (p.name if group.stack else alike[0]), p.expert, lane.kind
                if key not in found:
                    known = found[first].inputs if first in found else None
                    known = known or Inputs.empty(x.shape[-1], keep=held, device=x.device)
                    count = len(probe) if held else rows
                    found[key] = Moments.empty(known, count, target=not group.stack)
                assert found[key].inputs is found[first].inputs
                if key == first:
                    found[key].inputs.add(x)
                if floats is not None:
                    f = floats[at]
                    y = f.y
                    if p.terms is not None and f.terms is not None:
                        y = y + (f.terms - p.terms) / p.scale
                    y = _tokens(y, lane.mask)
                    found[key].add(x, y[:, probe] if held else y)
        return found

    def _products(
        self,
        block: nn.Module,
        names: Sequence[str],
        group: Group,
        call: Call,
        patch: Mapping[str, Tensor],
    ) -> list[Any]:
        with _patched(block, patch):
            trace = Trace({n: block.get_parameter(n).data for n in names}, group.seen)
            trace.run(lambda: self.blocks.run(call))
        return [p for p in trace.products if p.name in group.names]

    def _tick(self, fraction: float, what: str) -> None:
        if self.progress is not None:
            done = len(self.done) + min(fraction, 1.0)
            number = f"block {len(self.done) + 1} of {len(self.blocks.paths)}: {what}"
            self.progress(int(TICKS * done), TICKS * len(self.blocks.paths), number, "calibrating")

    # --- training ----------------------------------------------------------------------------

    def _remember(self, path: str, outputs: Sequence[Any]) -> None:
        """Keep what the window needs of a block."""
        if self.steps and self.window_size > 1:
            calls = [lane.waiting[PACKED] for lane in self.lanes]
            self.window.append(_Kept(path, calls, [_hidden(o) for o in outputs]))
            del self.window[: -self.window_size + 1]

    def _train(
        self, path: str, block: nn.Module, parts: "Parts", targets: Sequence[Any]
    ) -> dict[str, "Parts"]:
        """Train the blocks up to this one, and bring the waiting calls up to date."""
        calls = [lane.waiting[PACKED] for lane in self.lanes]
        chain = [*self._linked(calls), _Kept(path, calls, [])]
        state: dict[str, Parts] = {path: parts}
        with ExitStack() as stack:
            modules = {path: block}
            for kept in chain[:-1]:
                modules[kept.path] = stack.enter_context(self.blocks.loaded(kept.path))
                state[kept.path] = self._parts(kept.path)
            weights, vectors, fixed = self._trainable(modules, state)

            def forward(lane: int, values: Mapping[str, Tensor]) -> Any:
                hidden: Tensor | None = None
                output: Any = None
                for at, kept in enumerate(chain):
                    call = kept.calls[lane]
                    if hidden is not None:
                        call = _with_hidden(call, chain[at - 1].outputs[lane], hidden)
                    prefix = kept.path + "."
                    every = {**fixed, **values}
                    own = {n[len(prefix) :]: v for n, v in every.items() if n.startswith(prefix)}
                    args, kwargs = self.blocks.on_device((call.args, call.kwargs))
                    output = functional_call(modules[kept.path], own, args, kwargs)
                    hidden = _hidden(output)
                return output

            def run(lane: int, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
                output = _tokens(_hidden(forward(lane, values)), self.lanes[lane].mask)
                target = _tokens(_hidden(targets[lane]), self.lanes[lane].mask)
                return output, target.to(output.device)

            def progress(step: int, what: str) -> None:
                self._tick(0.5 + 0.5 * step / self.steps, what)

            indices = {
                k: [i for i, x in enumerate(self.lanes) if x.kind == k] for k in ("train", "held")
            }
            seed = self.seed + self.blocks.paths.index(path)
            train, held = indices["train"], indices["held"]
            loss = huber(run, parameters(weights, vectors), held)
            stored, trained, _, _ = reconstruct(
                weights, vectors, loss, train, held, self.steps, seed, progress
            )
            _take(state, stored, trained)
            self._relink(chain, modules, state)
        return state

    def _trainable(
        self, modules: Mapping[str, nn.Module], state: Mapping[str, "Parts"]
    ) -> tuple[dict[str, TernaryWeight], dict[str, Tensor], dict[str, Tensor]]:
        """Of loaded blocks, by full name: ternary weights, vectors, and weights that stay."""
        weights: dict[str, TernaryWeight] = {}
        vectors: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        for path, module in modules.items():
            own = state[path]
            for name, form in own.forms.items():
                planes, source = own.stored[name], module.get_parameter(name).data
                if len(planes) > 1:  # two planes leave little to gain
                    fixed[f"{path}.{name}"] = form.parameter(sum_planes(planes))
                else:
                    trained = TernaryWeight(source, planes[0], form, self.rounding)
                    weights[f"{path}.{name}"] = trained
            for name, value in module.named_parameters():
                if value.ndim == 1:
                    vectors[f"{path}.{name}"] = own.vectors.get(name, value.data)
        return weights, vectors, fixed

    def distill(self, steps: int) -> None:
        """Calibrate every block, then train all of them together, with their vectors.

        The loss is the divergence of the logits, where the model gives logits for words, else the
        error of its first output. The model is in memory as a whole: its weights, the trained ones,
        their gradients and the optimizer's state, about 48 bytes for each weight.

        steps  of training, on STEP_TOKENS tokens each
        """
        stage = len(self.blocks.paths)
        if stage in self._stages():
            return
        for _ in self.run():
            pass
        self.window.clear()
        with self.blocks.whole() as model:
            modules = {path: model.get_submodule(path) for path in self.blocks.paths}
            state = {path: self._parts(path) for path in self.blocks.paths}
            weights, vectors, fixed = self._trainable(modules, state)
            samples = [(x.kind, part) for x in self.lanes for part in _pieces(x.batch)]

            def forward(index: int, values: Mapping[str, Tensor]) -> Any:
                batch = self.blocks.on_device(samples[index][1])
                with code_of_the_model(self.source.directory):
                    return functional_call(model, dict(values), (), batch)

            with torch.no_grad():
                logits = getattr(forward(0, {}), "logits", None)
            words = logits is not None and model_end(model, "head") is not None

            def outputs(index: int, values: Mapping[str, Tensor]) -> Tensor:
                output = forward(index, values)
                chosen = output.logits if words else _hidden(output)
                return _tokens(chosen, _mask(samples[index][1]))

            def run(index: int, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    target = outputs(index, {})
                return outputs(index, {**fixed, **values}), target

            def progress(step: int, what: str) -> None:
                if self.progress is not None:
                    self.progress(step, steps, f"step {step} of {steps}: {what}", "distilling")

            train, held = (
                [i for i, (kind, _) in enumerate(samples) if kind == k] for k in ("train", "held")
            )
            loss = divergence(run) if words else huber(run, parameters(weights, vectors), held)
            stored, trained, _, _ = reconstruct(
                weights, vectors, loss, train, held, steps, self.seed, progress
            )
            _take(state, stored, trained)
        for index, path in enumerate(self.blocks.paths):
            report = self._read(self.files()[path])[1]
            self._write(self._file(index, stage), path, state[path], report)

    def _linked(self, calls: Sequence[Call]) -> list[_Kept]:
        """The blocks of the window whose output is, unchanged, the next one's input."""
        linked: list[_Kept] = []
        following = calls
        for kept in reversed(self.window):
            pairs = zip(kept.outputs, following, strict=True)
            if not all(_takes(call, hidden) for hidden, call in pairs):
                break
            linked.insert(0, kept)
            following = kept.calls
        return linked

    def _relink(
        self, chain: Sequence[_Kept], modules: Mapping[str, nn.Module], state: Mapping[str, "Parts"]
    ) -> None:
        """Run the window's earlier blocks again, as trained, so that the calls after them fit."""
        for at, kept in enumerate(chain[:-1]):
            following = chain[at + 1]
            with _patched(modules[kept.path], state[kept.path].patch()):
                for i, call in enumerate(kept.calls):
                    hidden = _hidden(self.blocks.run(call))
                    following.calls[i] = _with_hidden(following.calls[i], kept.outputs[i], hidden)
                    kept.outputs[i] = hidden
        for lane, call in zip(self.lanes, chain[-1].calls, strict=True):
            lane.waiting[PACKED] = call

    def _parts(self, path: str) -> "Parts":
        """A loaded block as its file has it."""
        tensors = self._read(self.files()[path])[0]
        parts = Parts()
        for plane in range(max(len(planes) for planes in tensors.values())):
            own = {name: planes[plane] for name, planes in tensors.items() if plane < len(planes)}
            for name, value in self.blocks.replaced(path, own).items():
                plan = self.by_parameter.get(f"{path}.{name}")
                if plan is None:
                    parts.vectors[name] = value
                else:
                    parts.stored[name] = (*parts.stored.get(name, ()), value)
                    parts.forms[name] = _form(plan)
        return parts

    # --- files -------------------------------------------------------------------------------

    def _write(self, file: Path, path: str, parts: "Parts", report: Mapping[str, Any]) -> None:
        """Write a block's file: its tensors as they will be stored, under the source's names."""
        disk: dict[str, list[Tensor]] = {}
        for plane in range(2):
            values = {n: p[plane] for n, p in parts.stored.items() if plane < len(p)}
            values |= parts.vectors if plane == 0 else {}
            on_disk = self.blocks.on_disk({f"{path}.{n}": v.cpu() for n, v in values.items()})
            for name, value in on_disk.items():
                disk.setdefault(name, []).append(value)
        stored: dict[str, Tensor] = {}
        records: dict[str, Record] = {}
        for name, planes in disk.items():
            plan = self.plans[name]
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
        metadata = container.dump_metadata(records) | {"report": json.dumps(report)}
        write_whole(file, save(stored, metadata))

    def _read(self, file: Path) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Any]]:
        """A block's file: the planes of its tensors, float32, as the source has them; its report.

        Rotated matrices are left as they are stored.
        """
        packed = open_solved(file)
        tensors: dict[str, tuple[Tensor, ...]] = {}
        for name, record in container.records_of(packed).items():
            if record.shape is None:
                value = packed.read(name).reshape(packed.tensors[name].shape)
                tensors[name] = (value.to(torch.float32),)
                continue
            dense = [t.dequantize(torch.float32) for t in read_solved(packed, name, record)]
            tensors[name] = tuple(
                t.transpose(-1, -2).contiguous() if record.transposed else t for t in dense
            )
        return tensors, json.loads(packed.metadata[file.name]["report"])

    def _load_report(self, file: Path) -> None:
        self.reports.append(BlockReport(**self._read(file)[1]))


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


def open_solved(file: Path) -> Checkpoint:
    """A block's file, its bytes checked."""
    packed = open_files(file.parent, [file.name])
    container.check(packed, container.records_of(packed))
    return packed


def read_solved(packed: Checkpoint, name: str, record: Record) -> tuple[Ternary, ...]:
    """The planes of one ternary tensor of a block's file."""
    trits, scales = (
        packed.read(n).reshape(packed.tensors[n].shape) for n in (name, name + SCALE_SUFFIX)
    )
    return container.decode_planes(trits, scales, record)


def sum_planes(planes: Sequence[Tensor]) -> Tensor:
    """The weight that planes stand for, as `container.dequantize` adds them."""
    total = planes[0]
    for plane in planes[1:]:
        total = total + plane
    return total


def _take(
    state: Mapping[str, Parts], stored: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
) -> None:
    """Put what was trained, by full name, into the blocks that it belongs to."""
    for path, own in state.items():
        for name in own.forms:
            if f"{path}.{name}" in stored:
                own.stored[name] = (stored[f"{path}.{name}"],)
        prefix = path + "."
        for name in [n[len(prefix) :] for n in vectors if n.startswith(prefix)]:
            own.vectors[name] = vectors[prefix + name]


def _pieces(batch: Batch) -> list[Batch]:
    """A batch cut into some of about STEP_TOKENS tokens."""
    ids = [value.shape[1:].numel() for value in batch.values() if not value.is_floating_point()]
    rows = max(1, STEP_TOKENS // max(1, *ids, OTHER_TOKENS if not ids else 1))
    return [
        {name: value[start : start + rows] for name, value in batch.items()}
        for start in range(0, len(next(iter(batch.values()))), rows)
    ]


def _exact(name: str, plan: TensorPlan, value: Tensor) -> Ternary:
    """A tensor of the source's shape whose values are ternary already, as trits and scales."""
    logical = value.transpose(-1, -2) if plan.choice.transposed else value
    ternary = levels(logical.contiguous(), plan.group_size)
    assert ternary is not None, f"{name} is not ternary"
    return ternary


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
            if name is not None and block.get_parameter(name).shape == product.bias.shape:
                found[product.name] = name
    return found


def _form(plan: TensorPlan) -> Form:
    return Form(plan.group_size, plan.choice.transposed, *plan.rotation)


def _mask(batch: Batch) -> Tensor | None:
    """Which tokens count; of an encoder-decoder, whose two sides differ, all."""
    return None if "decoder_input_ids" in batch else batch.get("attention_mask")


def _tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length, n) -> (tokens, n) without padding."""
    if mask is not None and values.shape[:-1] in (mask.shape, (mask.numel(),)):
        return values[mask.reshape(values.shape[:-1]).bool().to(values.device)]
    return values.reshape(-1, values.shape[-1])


def _hidden(output: Any) -> Tensor:
    """The hidden states that a block gives, alone or first of several."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _takes(call: Call, hidden: Tensor) -> bool:
    """Whether a block is called with just these hidden states."""
    found = []
    map_tensors((call.args, call.kwargs), lambda t: found.append(t is hidden) or t)  # type: ignore[func-returns-value]
    return any(found)


def _with_hidden(call: Call, old: Tensor, new: Tensor) -> Call:
    """The call with other hidden states."""
    args, kwargs = map_tensors((call.args, call.kwargs), lambda t: new if t is old else t)
    return Call(call.block, args, kwargs)
