"""The blocks of a window, trained as each one is solved."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ternarize.calibrate.blocks import Call, patched
from ternarize.calibrate.lanes import PACKED, Lane, hidden_of, takes, with_hidden
from ternarize.calibrate.reconstruct import TernaryWeight, huber, parameters, reconstruct
from ternarize.calibrate.solved import Parts, SolvedBlocks, sum_planes

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

    def __init__(self, solved: SolvedBlocks, lanes: Sequence[Lane], size: int) -> None:
        self.solved, self.blocks, self.lanes = solved, solved.blocks, lanes
        self.size = size
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
            zeros = {name: plan.zeros for name, plan in self.solved.plans.items()}
            weights, vectors, fixed = _trainable(modules, state, zeros)

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


def _of_kinds(kinds: Sequence[str]) -> tuple[list[int], list[int]]:
    """Which samples are to be trained on, and which choose."""
    train, held = ([i for i, kind in enumerate(kinds) if kind == k] for k in ("train", "held"))
    return train, held


def _trainable(
    modules: Mapping[str, nn.Module], state: Mapping[str, Parts], zeros: Mapping[str, float | None]
) -> tuple[dict[str, TernaryWeight], dict[str, Tensor], dict[str, Tensor]]:
    """Of loaded blocks, by full name: ternary weights, vectors, and weights that stay.

    zeros  the share of zeros that each ternary weight has at least, by full name
    """
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
                whole = f"{path}.{name}"
                weights[whole] = TernaryWeight(source, planes[0], form, zeros[whole])
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
