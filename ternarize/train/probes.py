"""Alignments: how the loss changes along each perturbation of a step and against it.

    backward   one gradient, and sums of it over each perturbation's non-zeros: exact, and cheap
    jvp        two forwards for each, with tangents beside them: exact, with no backward anywhere
    forwards   two forwards for each, moved one way and the other: what really happens

Values that are at their limit stay, so that along and against are not each other's negative. A
journal does not tell how it was found. Source of gradients without backward: Baydin et al. 2022,
https://arxiv.org/abs/2202.08587; of those by forwards alone: Spall 1992,
https://doi.org/10.1109/9.119632.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.native import lib
from ternarize.steps.generator import perturbations
from ternarize.steps.journal import Step
from ternarize.steps.replay import Values
from ternarize.threads import THREADS
from ternarize.train.moved import MovedModule, Placement

WAYS = ("backward", "jvp", "forwards")
_TOGETHER = 16  # tangents of one forward

# the loss of a module on a batch
ModuleLoss = Callable[[nn.Module, Any], Tensor]


class _WithLoss(nn.Module):
    """A module whose output is its loss, so that its parameters can be given to a call."""

    def __init__(self, module: nn.Module, loss: ModuleLoss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


def gradient(moved: MovedModule, loss: ModuleLoss, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradient by the parameters of all tensors, by name."""
    for parameter in moved.parameters.values():
        parameter.grad = None
    value = loss(moved.module, batch)
    value.backward()  # type: ignore[no-untyped-call]
    grads = {}
    for name, parameter in moved.parameters.items():
        grads[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return float(value.detach()), grads


def sums_along(moved: MovedModule, slopes: Mapping[str, Tensor], step: Step) -> Tensor:
    """Sums of slopes over the non-zeros of perturbations: (k, 2) float64, along and against.

    step  says which: its own choice counts for nothing, here and below
    """
    up, down = dict[str, Tensor](), dict[str, Tensor]()
    for place in moved.places:
        can_rise, can_fall = moved.room(place, step.target)
        name = place.part.name
        up[name], down[name] = slopes[name] * can_rise, slopes[name] * can_fall
    return aligned(moved.state, up, down, step)


def aligned(
    state: Values, up: Mapping[str, Tensor], down: Mapping[str, Tensor], step: Step
) -> Tensor:
    """What values gain along each perturbation of a step and against it: (k, 2) float64.

    up, down  by name of the tensor, flat, float32: what is gained by one more, and lost by one less
    """
    found = torch.zeros(step.k, 2, dtype=torch.float64)
    own = state.seed, step.number
    for part in state.parts:
        more, less, first = up[part.name], down[part.name], part.first(step.target)
        if lib is not None and more.device.type == "cpu":
            out = torch.empty_like(found)
            lib.align(more, less, first, *own, step.bits, step.target, out, THREADS)
            found += out
            continue
        cells = *own, range(step.k), step.target, step.bits, first, first + len(more)
        for positions, signs in perturbations(*cells, more.device):
            gained, lost = more[positions].double(), -less[positions].double()
            for side, way in enumerate((signs, -signs)):
                each = torch.where(way > 0, gained, torch.where(way < 0, lost, 0.0))
                found[:, side] += each.sum(1).cpu()
    return found


def by_jvp(moved: MovedModule, loss: ModuleLoss, batch: Any, step: Step) -> Tensor:
    """Alignments by forward-mode products: (k, 2) float64, along and against."""
    model = _WithLoss(moved.module, loss)
    names = {place.part.name: f"module.{place.parameter}" for place in moved.places}
    now = {names[n]: p.detach() for n, p in moved.parameters.items()}

    def of(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, parameters, (batch,))
        return result

    def along(tangents: dict[str, Tensor]) -> Tensor:
        slope: Tensor = torch.func.jvp(of, (now,), (tangents,))[1]
        return slope

    found = []
    for first in range(0, step.k, _TOGETHER):
        which = range(first, min(step.k, first + _TOGETHER))
        tangents = {}
        for place in moved.places:
            moves = _dense_moves(moved, place, step, which)
            each = [moved.tangent(place, step.target, row) for row in moves.flatten(0, 1)]
            parameter = moved.parameters[place.part.name]
            tangents[names[place.part.name]] = (
                torch.stack(each).view(-1, *parameter.shape).to(parameter)
            )
        found.append(torch.func.vmap(along)(tangents).double().view(-1, 2))
    return torch.cat(found)


def _dense_moves(moved: MovedModule, place: Placement, step: Step, which: Sequence[int]) -> Tensor:
    """What perturbations do to a tensor's values: (perturbations, 2, n) float32."""
    part, state, target = place.part, moved.state, step.target
    first, count = part.first(target), state.values(part, target).numel()
    rows = torch.zeros(len(which), count)
    cells = state.seed, step.number, which, target, step.bits, first, first + count
    for positions, signs in perturbations(*cells):
        rows.scatter_add_(1, positions, signs.to(rows.dtype))
    up, down = moved.room(place, target)
    sides = [side.clamp(min=0) * up + side.clamp(max=0) * down for side in (rows, -rows)]
    return torch.stack(sides, 1)


@torch.no_grad()
def by_forwards(moved: MovedModule, loss: ModuleLoss, batch: Any, step: Step) -> Tensor:
    """Alignments by moving there: (k, 2) float64, how the loss changes along and against."""
    before = float(loss(moved.module, batch))
    found = torch.zeros(step.k, 2, dtype=torch.float64)
    for i in range(step.k):
        for side, sign in enumerate((1, -1)):
            with tried(moved, replace(step, chosen=(i,), signs=(sign,))):
                found[i, side] = float(loss(moved.module, batch)) - before
    return found


@contextmanager
def tried(moved: MovedModule, step: Step) -> Iterator[None]:
    """Inside, a step has been taken; afterwards the values are as they were."""
    state, target = moved.state, step.target
    changed = [state.values(part, target) for part in state.parts]
    changed += [parameter.data for parameter in moved.parameters.values()]
    before = [each.clone() for each in changed]
    state.apply([step])
    moved.write()
    try:
        yield
    finally:
        for each, kept in zip(changed, before, strict=True):
            each.copy_(kept)
