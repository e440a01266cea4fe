"""A trained solution written as steps: the shortest way to it that random directions offer.

Exponents, or trits, are trained by gradients first, as real numbers; where they have come to is
what steps then go towards, by the largest fall for each bit of the journal of

    D = sum over values of h (wanted - value)^2 / 2,        h = sqrt(mean of squared gradients),

which needs no model. To first order the loss falls with D. Of k random directions the best takes
log2 k bits and is as good as a code of that many bits can be: what is written is a rate-distortion
code of a random codebook, found as in matching pursuit (Mallat and Zhang 1993,
https://doi.org/10.1109/78.258082).

Trits, and very many exponents, are moved one by one, by directions with one non-zero each: M of n
values take about M (log2(n / M) + 3.5) bits, of which a list of them would take M (... + 2.4).
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError
from ternarize.qat.rounding import EDGE
from ternarize.steps.generator import MOST_BITS, SCALES, perturbations
from ternarize.steps.journal import Step, bits_in_block
from ternarize.steps.replay import LIMITS, Moves, Values
from ternarize.train.moved import MovedModule, target_of
from ternarize.train.probes import ModuleLoss, aligned, gradient
from ternarize.train.votes import Heard, bits_of

_BETAS, _EPSILON = (0.9, 0.95), 1e-12
TRIED = 20  # numbers without a gain, after which nothing more is to be had
_TAKEN = (1, 2, 4, 8, 16, 32)  # directions of a step, each tried
_DENSITIES = (5, 9)  # bits of a cell, from the least to the most
_AMOUNTS = (1, 2, 4)
# values that are moved one by one
_PASSES = 4  # in which all but 2 of 100 of them are met
_EACH = 3.5  # bits of one beside log2 of how rare they are, the later passes among them
_ALONE = (1, 2, 4, 8, 16)  # amounts of exponents, each tried
_ROUND = 64  # bits; a round of passes is not begun with fewer


@dataclass(frozen=True)
class Wanted:
    """Where values are to go, and what it counts for: flat, float32, by name of the tensor."""

    values: dict[str, Tensor]
    weight: dict[str, Tensor]

    def distance(self, state: Values, step: Step | None = None) -> float:
        """D of the module's docstring, of exponents; with a step: as it would be with that."""
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

    @contextmanager
    def shown(self, moved: MovedModule, target: str) -> Iterator[None]:
        """Inside, the module has what is wanted: real exponents, or rounded trits."""
        state, of_trits = moved.state, target == "trits"
        before = {name: trits.clone() for name, trits in state.trits.items()}
        if of_trits:
            _round(self.values, state)
        moved.write(None if of_trits else self.values)
        try:
            yield
        finally:
            state.trits.update(before)
            moved.write()


def _round(real: Mapping[str, Tensor], state: Values) -> None:
    """Real trits become those of a state."""
    for name, values in real.items():
        state.trits[name].view(-1).copy_(values.round().clamp(-1, 1))


def trained_values(
    moved: MovedModule,
    loss: ModuleLoss,
    batches: Callable[[int], Any],
    target: str,
    steps: int,
    rate: float,
    *,
    begin: Mapping[str, Tensor] | None = None,
    heard: Heard | None = None,
) -> Wanted:
    """Train values as real numbers, by Adam with a cosine; those of the state stay as they are.

    batches  step -> batch
    target   "scales": exponents; "trits": latent ones, rounded in the forward pass, whose gradient
             is that of the rounded ones (Bengio et al. 2013, https://arxiv.org/abs/1308.3432)
    rate     at the beginning, in 1/32 of an octave, or in trits
    begin    latent trits, flat, float32, by name (`latent`); None: the values themselves
    """
    state, kind, of_trits = moved.state, target_of(target), target == "trits"
    limit = EDGE if of_trits else LIMITS[kind]
    begin = begin or {p.name: state.values(p, kind).flatten() for p in state.parts}
    real = {name: values.to(torch.float32, copy=True) for name, values in begin.items()}
    begun = {name: trits.clone() for name, trits in state.trits.items()}
    optimizer = torch.optim.Adam(list(real.values()), betas=_BETAS, eps=_EPSILON)
    squares = {name: torch.zeros_like(each) for name, each in real.items()}
    for number in range(steps):
        if of_trits:
            _round(real, state)
        exponents = None if of_trits else real
        moved.write(exponents)
        value, grads = gradient(moved, loss, batches(number))
        if not math.isfinite(value):
            raise CheckpointError(
                f"step {number}",
                f"the loss is {value}",
                "a finite one",
                "Train with a lower rate, or look after the data",
            )
        for name, slope in moved.slopes(kind, grads, exponents).items():
            real[name].grad = slope
            squares[name] += slope.square() / steps
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / steps))
        optimizer.step()
        for each in real.values():
            each.clamp_(-limit, limit)
        if heard is not None:
            heard(number, value)
    state.trits.update(begun)
    moved.write()
    return Wanted(real, {name: each.sqrt() for name, each in squares.items()})


def dense_steps(
    state: Values, wanted: Wanted, before: Step, number: int, k: int, bits: float
) -> Generator[Step, None, bool]:
    """Steps that bring exponents towards what is wanted, until so many bits are used up.

    Returns whether it ended for want of bits: True; or of a step that goes there: False.

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
        large = False
        for each in sorted(tried):
            for step in _candidates(state, wanted, number, k, each):
                after = wanted.distance(state, step)
                gain = (distance - after) / bits_of(step)
                if gain > 0 and (best is None or gain > best[0]):
                    if bits_in_block(step, before) > bits:
                        large = True
                    else:
                        best = gain, step, after
        number += 1
        if best is None and large:
            return True
        if best is None:
            misses += 1
            continue
        _, step, distance = best
        bits -= bits_in_block(step, before)
        before, density, misses, made = step, step.bits, 0, made + 1
        state.apply([step])
        yield step
    return False


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


def single_cell(state: Values, target: str) -> int:
    """Bits of a cell that has all values, trits or exponents; UsageError where there is none."""
    count = sum(state.values(part, target_of(target)).numel() for part in state.parts)
    if (count - 1).bit_length() > MOST_BITS:
        raise UsageError(
            f"the {target} of the base",
            f"are {count}",
            f"at most {1 << MOST_BITS} of a journal by gradient",
            "Use --by votes, or `ternarize train`",
        )
    return (count - 1).bit_length()


def placed_steps(
    state: Values, wanted: Wanted, target: str, before: Step, number: int, k: int, bits: float
) -> Generator[Step, None, bool]:
    """The same by directions with one non-zero each: the values with the largest fall of D move.

    target  "trits" or "scales"

    The other arguments and what it returns are those of `dense_steps`, the errors those of
    `single_cell`.
    """
    kind, cell = target_of(target), single_cell(state, target)
    while bits >= _ROUND:
        amount, moves = _worthwhile(state, wanted, target, bits, cell)
        if not bool(moves.any()):
            return False
        end = number + _PASSES * -(-(1 << cell) // k)
        while number < end:
            step = _met(state, moves, Step(number, kind, cell, amount, k, (), ()))
            number += 1
            if step is None:
                continue
            cut = _cut_down(step, before, bits)
            if cut is not None:
                bits -= bits_in_block(cut, before)
                before = cut
                state.apply([cut])
                yield cut
            if cut != step:
                return True
    return True


def _cut_down(step: Step, before: Step, bits: float) -> Step | None:
    """A step with as many of its directions as so many bits hold; None: not even one."""
    while bits_in_block(step, before) > bits:
        if len(step.chosen) == 1:
            return None
        step = replace(step, chosen=step.chosen[:-1], signs=step.signs[:-1])
    return step


def _worthwhile(
    state: Values, wanted: Wanted, target: str, bits: float, cell: int
) -> tuple[int, Tensor]:
    """By how much, and which way those values move that so many bits are enough for.

    Returns the amount and (n,) int8, -1, 0 or 1 for each place of the flat index.
    """
    kind, best = target_of(target), (0.0, 1, Tensor())
    rest = torch.cat([wanted.values[p.name] - state.values(p, kind).view(-1) for p in state.parts])
    weight = torch.cat([wanted.weight[p.name] for p in state.parts])
    moved = bits / _EACH
    for _ in range(8):  # a fixed point
        moved = bits / (_EACH + max(0.0, cell - math.log2(max(1.0, moved))))
    for amount in _ALONE if kind == SCALES else (1,):
        falls = weight * (amount * rest.abs() - amount * amount / 2)
        largest, places = falls.topk(min(len(falls), max(1, round(moved))))
        total = float(largest.clamp(min=0).sum(dtype=torch.float64))
        if total > best[0]:
            best = total, amount, places[largest > 0]
    _, amount, places = best
    moves = torch.zeros(len(rest), dtype=torch.int8)
    if len(places):
        moves[places] = rest[places].sign().to(torch.int8)
    return amount, moves


def _met(state: Values, moves: Tensor, drawn: Step) -> Step | None:
    """The step of those directions that meet a place which is to move; these are taken out."""
    cells = state.seed, drawn.number, range(drawn.k), drawn.target, drawn.bits, 0, len(moves)
    ((positions, signs),) = perturbations(*cells)
    ways = moves[positions[:, 0]] * signs[:, 0]
    first = dict[int, int]()  # of several that meet one place
    for each in ways.nonzero()[:, 0].tolist():
        first.setdefault(int(positions[each, 0]), each)
    if not first:
        return None
    moves[list(first)] = 0
    chosen = sorted(first.values())
    return replace(drawn, chosen=tuple(chosen), signs=tuple(ways[chosen].tolist()))
