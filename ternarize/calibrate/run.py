"""Calibration of a whole model: block after block, group after group.

Two streams run side by side on the same tokens: the float stream is the source model, the packed
stream is the model as it will be, with every block so far ternarized. For each sequential group of
a block (tracing.py) the moments of the packed stream's inputs against the float stream's outputs
are collected, each matrix is solved (gptq.py), and the packed stream goes on with the result.
With `steps`, the last `window` blocks are then trained together (training.py). Each block that is
done is written to a file (solved.py), from which a run that was broken off goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternarize.calibrate.blocks import Batch, Blocks, Call, patched
from ternarize.calibrate.collect import LoadedBlock
from ternarize.calibrate.gptq import Rounding
from ternarize.calibrate.lanes import FLOAT, KINDS_OF_SAMPLES, PACKED, Lane, hidden_of
from ternarize.calibrate.ranks import rank_of
from ternarize.calibrate.solve_block import held_error, solve_block, without_data
from ternarize.calibrate.solved import SolvedBlocks
from ternarize.calibrate.training import Window
from ternarize.errors import CheckpointError
from ternarize.files.checkpoint import Checkpoint
from ternarize.plans.layout import TensorPlan
from ternarize.progress import Progress
from ternarize.ranks import World

TICKS = 1000  # of progress, for each block


@dataclass(frozen=True)
class BlockReport:
    """What came of one block, on held-out tokens.

    before, after  squared error of the packed stream behind the block, relative to the float
                   stream: with this block ternarized by `itf`, and as it was when it was done (not
                   after the training of later windows)
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
class _Reply:
    """What the last block has given, with which a forward has yet to go on."""

    output: Any


class Calibration:
    """The state of one run; `run` does it.

    source   checkpoint with float weights
    tensors  the plan: which become ternary, in what groups and rotations
    sets     "train", "held", "report": batches of arguments of the model's forward
    folder   where the blocks' files are; files of an earlier run are used
    steps    of training for each block; 0: none
    window   blocks trained together
    world    the processes that share the work; each but the first has a folder of its own, in which
             it keeps what the first tells it
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
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        assert self.world.size == 1 or not steps
        self.source, self.folder, self.rounding = source, folder, rounding
        self.steps, self.seed, self.progress = steps, seed, progress
        self.blocks = Blocks(source, [t.name for t in tensors if t.ternary], device)
        self.solved = SolvedBlocks(folder, self.blocks, tensors)
        self.counts = {kind: len(sets.get(kind, ())) for kind in KINDS_OF_SAMPLES}
        self.lanes = [
            Lane(kind, index, batch, (self.blocks.start(batch), self.blocks.start(batch)))
            for kind in KINDS_OF_SAMPLES
            for index, batch in enumerate(sets.get(kind, ()))
            if rank_of(self.world, kind, index) == self.world.rank
        ]
        self.window = Window(self.solved, self.lanes, window if steps else 1)
        self.reports: list[BlockReport] = []
        self.done: list[str] = []

    def run(self) -> Iterator[tuple[int, Any, Any]]:
        """Calibrate every block; yields (index, float output, packed output) of report batches.

        Of those that this process has.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        report = [lane for lane in self.lanes if lane.kind == "report"]
        try:
            with self.world.agreed():
                for lane in self.lanes:
                    lane.waiting = [forward.resume() for forward in lane.forwards]
            while len(self.done) < len(self.blocks.paths):
                self._step()
            for lane in self.lanes:
                if lane.kind != "report":
                    _stop(lane)
                    lane.waiting.clear()
            for lane in report:
                yield lane.index, *(self._finish(lane, stream) for stream in (FLOAT, PACKED))
        finally:
            for lane in self.lanes:
                _stop(lane)

    def _step(self) -> None:
        """Do the block at which all forwards wait, and let them run on to the next."""
        path = self._waiting_at()
        again = path in self.done
        self._tick(0.0, path)
        with ExitStack() as stack:
            with self.world.agreed():
                block = stack.enter_context(self.blocks.loaded(path))
                targets = [self.blocks.run(lane.waiting[FLOAT]) for lane in self.lanes]
                self._check_finite(path, targets)
                if targets:
                    self._check_repeats(path, targets[0])
            if not again:
                if self.world.firsts(path not in self.solved.files()):
                    self._make(path, block, targets)
                self._give_round(path)
                self.reports.append(BlockReport(**self.solved.report(path)))
            with self.world.agreed():
                with patched(block, self.solved.parts(path).patch()):
                    outputs = [self.blocks.run(lane.waiting[PACKED]) for lane in self.lanes]
                self._check_finite(path, outputs)
        if not again:
            self.window.remember(path, outputs)
            self.done.append(path)
        over = len(self.done) == len(self.blocks.paths)
        with self.world.agreed():
            for lane, target, output in zip(self.lanes, targets, outputs, strict=True):
                reply = (target, output)
                if over:  # what is left of a forward may give large logits: later, one by one
                    lane.waiting = [_Reply(each) for each in reply]
                    continue
                lane.waiting = [f.resume(r) for f, r in zip(lane.forwards, reply, strict=True)]

    def _give_round(self, path: str) -> None:
        """Have the first process's file of a block in all of them."""
        if self.world.size == 1:
            return
        own = None if self.world.rank else self.solved.files()[path]
        given = ("", b"") if own is None else (own.name, own.read_bytes())
        name, data = self.world.firsts(given, "files")
        if own is None:
            (self.folder / name).write_bytes(data)

    def _make(self, path: str, block: nn.Module, targets: Sequence[Any]) -> None:
        """Ternarize a block, train its window, write the files."""
        index, share = self.blocks.paths.index(path), 0.5 if self.steps else 1.0
        loaded = LoadedBlock(
            path, block, self.blocks, self.solved.plans, self.lanes, self.counts, self.world
        )
        held = any(lane.kind == "held" for lane in self.lanes)
        before = held_error(loaded, without_data(loaded) if held else {}, targets)
        parts, matrices, unseen = solve_block(
            loaded, self.rounding, lambda f, what: self._tick(share * f, what)
        )
        state = {path: parts}
        if self.steps:

            def progress(step: int, what: str) -> None:
                self._tick(0.5 + 0.5 * step / self.steps, what)

            state = self.window.train(
                path, block, parts, targets, self.steps, self.seed + index, progress
            )
        after = held_error(loaded, state[path].patch(), targets)
        if self.world.rank:
            return
        for name, other in state.items():
            if name != path:
                file = self.solved.file(self.blocks.paths.index(name), index)
                self.solved.write(file, name, other, self.solved.report(name))
        report = asdict(BlockReport(path, before, after, matrices, unseen))
        self.solved.write(self.solved.file(index, index), path, state[path], report)

    def _finish(self, lane: Lane, stream: int) -> Any:
        """Run a forward of which all blocks are done to its end; shared blocks may come again."""
        if isinstance(lane.waiting[stream], _Reply):
            lane.waiting[stream] = lane.forwards[stream].resume(lane.waiting[stream].output)
        while isinstance(lane.waiting[stream], Call):
            path = lane.waiting[stream].block
            with self.blocks.loaded(path) as block:
                patch = self.solved.parts(path).patch() if stream == PACKED else {}
                with patched(block, patch):
                    output = self.blocks.run(lane.waiting[stream])
            lane.waiting[stream] = lane.forwards[stream].resume(output)
        result, lane.waiting[stream] = lane.waiting[stream], None
        return result

    def _waiting_at(self) -> str:
        """The block at which all forwards wait."""
        own = {c.block if isinstance(c, Call) else None for x in self.lanes for c in x.waiting}
        paths = set[str | None]().union(*self.world.all(own))
        path = paths.pop() if len(paths) == 1 else None
        if path is None:
            raise self._unfit(
                "its forward does not come to the same blocks for every batch, or not to all of "
                "them",
                "that it does",
            )
        return path

    def _check_finite(self, path: str, outputs: Sequence[Any]) -> None:
        for lane, output in zip(self.lanes, outputs, strict=True):
            if not bool(lane.tokens(output).isfinite().all()):
                raise self._unfit(
                    f"{path} gives numbers that are not finite",
                    "finite ones on the calibration data",
                    "Use other data, or convert it",
                )

    def _check_repeats(self, path: str, output: Any) -> None:
        """A block that is no function of its input cannot be calibrated."""
        again = self.blocks.run(self.lanes[0].waiting[FLOAT])
        if not torch.equal(hidden_of(again), hidden_of(output)):
            found = f"{path} gives another output when it is run again"
            raise self._unfit(found, "a function of its input")

    def _unfit(self, found: str, expected: str, instead: str = "Convert it") -> CheckpointError:
        directory = self.source.directory
        return CheckpointError(directory, found, expected, f"{instead} without --dataset")

    def _tick(self, fraction: float, what: str) -> None:
        if self.progress is not None:
            done = len(self.done) + min(fraction, 1.0)
            number = f"block {len(self.done) + 1} of {len(self.blocks.paths)}: {what}"
            self.progress(int(TICKS * done), TICKS * len(self.blocks.paths), number, "calibrating")


def _stop(lane: Lane) -> None:
    for forward in lane.forwards:
        forward.stop()
