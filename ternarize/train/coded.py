"""A trained solution written as steps: the shortest way to it that random directions offer.

Exponents are trained by gradients first, as real numbers; where they have come to is what steps
then go towards, greedily, by the largest fall for each bit of the journal of

    D = sum over values of h (wanted - value)^2 / 2,        h = sqrt(mean of squared gradients),

which needs no model. To first order the loss falls with D. Of k random directions the best takes
log2 k bits and is as good as a code of that many bits can be: what is written is a rate-distortion
code of a random codebook, found as in matching pursuit (Mallat and Zhang 1993,
https://doi.org/10.1109/78.258082).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import CheckpointError
from ternarize.steps.generator import SCALES
from ternarize.steps.journal import Step, bits_in_block
from ternarize.steps.replay import LIMITS, Moves, Values
from ternarize.train.moved import Moved
from ternarize.train.probes import ModuleLoss, aligned, gradient
from ternarize.train.votes import bits_of

_BETAS, _EPSILON = (0.9, 0.95), 1e-12
TRIED = 20  # numbers without a gain, after which nothing more is to be had
_TAKEN = (1, 2, 4, 8, 16, 32)  # directions of a step, each tried
_DENSITIES = (5, 9)  # bits of a cell, from the least to the most
_AMOUNTS = (1, 2, 4)


@dataclass(frozen=True)
class Wanted:
    """Where exponents are to go, and what it counts for: flat, float32, by name of the tensor."""

    values: dict[str, Tensor]
    weight: dict[str, Tensor]

    def distance(self, state: Values, step: Step | None = None) -> float:
        """D of the module's docstring; with a step: as it would be with that, not taken."""
        moves = None if step is None else Moves([step], SCALES, state.seed)
        found = 0.0
        for part in state.parts:
            values = state.values(part, SCALES).flatten()
            if moves is not None:
                values = values.clone()
                moves.apply(values, part.first(SCALES))
            rest = self.values[part.name] - values
            found += float((self.weight[part.name] * rest.square()).sum(dtype=torch.float64)) / 2
        return found


def trained_exponents(
    moved: Moved,
    loss: ModuleLoss,
    batches: Callable[[int], Any],
    steps: int,
    rate: float,
    *,
    heard: Callable[[int, float], None] | None = None,
) -> Wanted:
    """Train exponents as real numbers, by Adam with a cosine; the values stay as they are.

    batches  step -> batch
    rate     at the beginning, in 1/32 of an octave
    """
    state = moved.state
    real = {p.name: state.values(p, SCALES).flatten().float() for p in state.parts}
    optimizer = torch.optim.Adam(list(real.values()), betas=_BETAS, eps=_EPSILON)
    squares = {name: torch.zeros_like(each) for name, each in real.items()}
    for number in range(steps):
        moved.write(real)
        value, grads = gradient(moved, loss, batches(number))
        if not math.isfinite(value):
            raise CheckpointError(
                f"step {number}",
                f"the loss is {value}",
                "a finite one",
                "Train with a lower rate, or look after the data",
            )
        for name, slope in moved.slopes(SCALES, grads, real).items():
            real[name].grad = slope
            squares[name] += slope.square() / steps
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / steps))
        optimizer.step()
        for each in real.values():
            each.clamp_(-LIMITS[SCALES], LIMITS[SCALES])
        if heard is not None:
            heard(number, value)
    moved.write()
    return Wanted(real, {name: each.sqrt() for name, each in squares.items()})


def coded_steps(
    state: Values, wanted: Wanted, before: Step, number: int, k: int, bits: float
) -> Iterator[Step]:
    """Steps that bring exponents towards what is wanted, until so many bits are used up.

    state   is moved by each step that is yielded
    before  the step behind which they come; NO_STEP of a journal without one
    number  that the first of them can have
    k       directions that a step draws
    bits    of a block
    """
    density, misses, made = _DENSITIES[0] + 2, 0, 0
    distance = wanted.distance(state)
    while misses < TRIED:
        tried = {density}
        if made % 3 == 0:  # now and then the densities beside the last one
            tried |= {max(_DENSITIES[0], density - 1), min(_DENSITIES[1], density + 1)}
        best: tuple[float, Step, float] | None = None
        for each in sorted(tried):
            for step in _candidates(state, wanted, number, k, each):
                after = wanted.distance(state, step)
                gain = (distance - after) / bits_of(step)
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, step, after
        number += 1
        if best is None:
            misses += 1
            continue
        _, step, distance = best
        bits -= bits_in_block(step, before)
        if bits < 0:
            return
        before, density, misses, made = step, step.bits, 0, made + 1
        state.apply([step])
        yield step


def _candidates(state: Values, wanted: Wanted, number: int, k: int, bits: int) -> Iterator[Step]:
    """For each amount and count the directions of which D falls most to second order."""
    slopes, weights = dict[str, Tensor](), dict[str, Tensor]()
    drawn = Step(number, SCALES, bits, 1, k, (), ())
    for part in state.parts:
        weight = wanted.weight[part.name]
        rest = wanted.values[part.name] - state.values(part, SCALES).view(-1)
        slopes[part.name], weights[part.name] = weight * rest, weight
    sums = aligned(state, slopes, slopes, drawn)[:, 0]
    curve = aligned(state, weights, {n: -w for n, w in weights.items()}, drawn)
    for amount in _AMOUNTS:
        falls = amount * sums.abs() - amount * amount / 2 * curve[:, 0]
        order = falls.argsort(descending=True, stable=True)
        for count in _TAKEN:
            if count > k or falls[order[count - 1]] <= 0:
                break
            chosen = order[:count].sort().values
            signs = tuple(sums[chosen].sign().int().tolist())
            yield replace(drawn, amount=amount, chosen=tuple(chosen.tolist()), signs=signs)
