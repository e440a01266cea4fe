"""What is trained: the blocks of a window as each one is solved, or the whole model at the end."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ternarize.calibrate.blocks import Batch, Call, code_of_the_model, patched
from ternarize.calibrate.gptq import Rounding
from ternarize.calibrate.lanes import (
    PACKED,
    Lane,
    hidden_of,
    mask_of,
    takes,
    tokens_of,
    with_hidden,
)
from ternarize.calibrate.reconstruct import (
    TernaryWeight,
    divergence,
    huber,
    parameters,
    reconstruct,
)
from ternarize.calibrate.solved import Parts, SolvedBlocks, sum_planes
from ternarize.models.skeleton import model_end

STEP_TOKENS = 1024  # in each step of training the whole model
OTHER_TOKENS = 256  # that a sample without token ids counts for
Steps = Callable[[int, str], None]  # (steps done, what is known)


@dataclass
class _Kept:
    """A block of the window: what it is called with in the packed stream, for each lane."""

    path: str
    calls: list[Call]
    outputs: list[Tensor]  # the hidden states that it gave, by which the next call is known


class Window:
    """The last blocks of a run, which are trained with the next one.

    size  blocks trained together
    """

    def __init__(
        self, solved: SolvedBlocks, lanes: Sequence[Lane], size: int, rounding: Rounding
    ) -> None:
        self.solved, self.blocks, self.lanes = solved, solved.blocks, lanes
        self.size, self.rounding = size, rounding
        self.kept: list[_Kept] = []

    def remember(self, path: str, outputs: Sequence[Any]) -> None:
        """Keep what later blocks need of one that is done."""
        if self.size > 1:
            calls = [lane.waiting[PACKED] for lane in self.lanes]
            self.kept.append(_Kept(path, calls, [hidden_of(o) for o in outputs]))
            del self.kept[: -self.size + 1]

    def train(
        self,
        path: str,
        block: nn.Module,
        parts: Parts,
        targets: Sequence[Any],
        steps: int,
        seed: int,
        progress: Steps,
    ) -> dict[str, Parts]:
        """Train the blocks up to this one, and bring the waiting calls up to date.

        targets  what the float stream gives behind the block, for each lane
        """
        calls = [lane.waiting[PACKED] for lane in self.lanes]
        chain = [*self._linked(calls), _Kept(path, calls, [])]
        state: dict[str, Parts] = {path: parts}
        with ExitStack() as stack:
            modules = {path: block}
            for kept in chain[:-1]:
                modules[kept.path] = stack.enter_context(self.blocks.loaded(kept.path))
                state[kept.path] = self.solved.parts(kept.path)
            weights, vectors, fixed = _trainable(modules, state, self.rounding)

            def forward(lane: int, values: Mapping[str, Tensor]) -> Any:
                hidden: Tensor | None = None
                output: Any = None
                every = {**fixed, **values}
                for at, kept in enumerate(chain):
                    call = kept.calls[lane]
                    if hidden is not None:
                        call = with_hidden(call, chain[at - 1].outputs[lane], hidden)
                    args, kwargs = self.blocks.on_device((call.args, call.kwargs))
                    own = _inside(every, kept.path)
                    output = functional_call(modules[kept.path], own, args, kwargs)
                    hidden = hidden_of(output)
                return output

            def run(lane: int, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
                output = self.lanes[lane].tokens(forward(lane, values))
                return output, self.lanes[lane].tokens(targets[lane]).to(output.device)

            train, held = _of_kinds([lane.kind for lane in self.lanes])
            loss = huber(run, parameters(weights, vectors), held)
            stored, trained, _, _ = reconstruct(
                weights, vectors, loss, train, held, steps, seed, progress
            )
            _take(state, stored, trained)
            self._relink(chain, modules, state)
        return state

    def _linked(self, calls: Sequence[Call]) -> list[_Kept]:
        """The blocks of the window whose output is, unchanged, the next one's input."""
        linked: list[_Kept] = []
        following = calls
        for kept in reversed(self.kept):
            pairs = zip(kept.outputs, following, strict=True)
            if not all(takes(call, hidden) for hidden, call in pairs):
                break
            linked.insert(0, kept)
            following = kept.calls
        return linked

    def _relink(
        self, chain: Sequence[_Kept], modules: Mapping[str, nn.Module], state: Mapping[str, Parts]
    ) -> None:
        """Run the window's earlier blocks again, as trained, so that the calls after them fit."""
        for at, kept in enumerate(chain[:-1]):
            following = chain[at + 1]
            with patched(modules[kept.path], state[kept.path].patch()):
                for i, call in enumerate(kept.calls):
                    hidden = hidden_of(self.blocks.run(call))
                    following.calls[i] = with_hidden(following.calls[i], kept.outputs[i], hidden)
                    kept.outputs[i] = hidden
        for lane, call in zip(self.lanes, chain[-1].calls, strict=True):
            lane.waiting[PACKED] = call


def train_model(
    solved: SolvedBlocks,
    lanes: Sequence[Lane],
    rounding: Rounding,
    steps: int,
    seed: int,
    progress: Steps,
) -> dict[str, Parts]:
    """Train all blocks together, with their vectors, after each has been solved.

    The loss is the divergence of the logits, where the model gives logits for words, else the
    error of its first output. The model is in memory as a whole: its weights, the trained ones,
    their gradients and the optimizer's state, about 48 bytes for each weight.

    steps  of training, on STEP_TOKENS tokens each
    """
    blocks = solved.blocks
    with blocks.whole() as model:
        modules = {path: model.get_submodule(path) for path in blocks.paths}
        state = {path: solved.parts(path) for path in blocks.paths}
        weights, vectors, fixed = _trainable(modules, state, rounding)
        samples = [(lane.kind, part) for lane in lanes for part in _in_steps(lane.batch)]

        def forward(index: int, values: Mapping[str, Tensor]) -> Any:
            batch = blocks.on_device(samples[index][1])
            with code_of_the_model(blocks.source.directory):
                return functional_call(model, dict(values), (), batch)

        with torch.no_grad():
            logits = getattr(forward(0, {}), "logits", None)
        words = logits is not None and model_end(model, "head") is not None

        def outputs(index: int, values: Mapping[str, Tensor]) -> Tensor:
            output = forward(index, values)
            chosen = output.logits if words else hidden_of(output)
            return tokens_of(chosen, mask_of(samples[index][1]))

        def run(index: int, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                target = outputs(index, {})
            return outputs(index, {**fixed, **values}), target

        train, held = _of_kinds([kind for kind, _ in samples])
        loss = divergence(run) if words else huber(run, parameters(weights, vectors), held)
        stored, trained, _, _ = reconstruct(
            weights, vectors, loss, train, held, steps, seed, progress
        )
        _take(state, stored, trained)
    return state


def _of_kinds(kinds: Sequence[str]) -> tuple[list[int], list[int]]:
    """Which samples are to be trained on, and which choose."""
    train, held = ([i for i, kind in enumerate(kinds) if kind == k] for k in ("train", "held"))
    return train, held


def _trainable(
    modules: Mapping[str, nn.Module], state: Mapping[str, Parts], rounding: Rounding
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
                weights[f"{path}.{name}"] = TernaryWeight(source, planes[0], form, rounding)
        for name, value in module.named_parameters():
            if value.ndim == 1:
                vectors[f"{path}.{name}"] = own.vectors.get(name, value.data)
    return weights, vectors, fixed


def _take(
    state: Mapping[str, Parts], stored: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
) -> None:
    """Put what was trained, by full name, into the blocks that it belongs to."""
    for path, own in state.items():
        own.stored |= {n: (v,) for n, v in _inside(stored, path).items()}
        own.vectors |= _inside(vectors, path)


def _inside(values: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Those values, by full name, that are a block's own, by their names in it."""
    prefix = path + "."
    return {n[len(prefix) :]: v for n, v in values.items() if n.startswith(prefix)}


def _in_steps(batch: Batch) -> list[Batch]:
    """A batch cut into some of about STEP_TOKENS tokens."""
    ids = [value.shape[1:].numel() for value in batch.values() if not value.is_floating_point()]
    rows = max(1, STEP_TOKENS // max(1, *ids, OTHER_TOKENS if not ids else 1))
    return [
        {name: value[start : start + rows] for name, value in batch.items()}
        for start in range(0, len(next(iter(batch.values()))), rows)
    ]
