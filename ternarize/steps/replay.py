"""Steps applied: integers alone, so that all machines get the same.

    z_j = sum over the perturbations that a step takes of (+-1) sign, at position j
    v_j = clamp(v_j + amount sign(z_j), -limit, limit)      limit 1 of trits, 127 of exponents

Positions do not meet each other: a row, or any other range of the flat index, is replayed by itself
for what it costs. The compiled core does what the torch code here does, with the same result.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ternarize.native import lib
from ternarize.steps.generator import SCALES, TRITS, perturbations, start_trits
from ternarize.steps.journal import JournalHeader, Step
from ternarize.threads import THREADS
from ternarize.trits.base3 import pack
from ternarize.trits.ternary import group_count

LIMITS = {TRITS: 1, SCALES: 127}


@dataclass(frozen=True)
class Part:
    """A tensor that steps move, and where its values lie in the flat indices.

    name         of the tensor
    shape        (..., rows, cols) of its trits
    group_size   as in trits/ternary.py
    trits, scales   first index of its trits, and of its exponents
    exponent        of a start from the seed: its scales begin at 2^(exponent / 32)
    """

    name: str
    shape: tuple[int, ...]
    group_size: int
    trits: int
    scales: int
    exponent: int = 0

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Of its exponents, (..., rows or 1, groups)."""
        *stack, rows, cols = self.shape
        rows = 1 if self.group_size == 0 else rows
        return (*stack, rows, group_count(cols, self.group_size))

    def first(self, target: int) -> int:
        return self.trits if target == TRITS else self.scales


def parts_in_order(
    tensors: Sequence[tuple[str, tuple[int, ...], int]], exponents: Sequence[int] | None = None
) -> list[Part]:
    """The tensors of a journal, (name, shape, group size) each, one behind the other.

    exponents  of their scales at the start; None: 0
    """
    found: list[Part] = []
    trits = scales = 0
    begun = exponents or [0] * len(tensors)
    for (name, shape, group_size), exponent in zip(tensors, begun, strict=True):
        part = Part(name, tuple(shape), group_size, trits, scales, exponent)
        found.append(part)
        trits += torch.Size(part.shape).numel()
        scales += torch.Size(part.scales_shape).numel()
    return found


class Moves:
    """Steps of one target, in their order, ready to be applied to any range."""

    def __init__(self, steps: Sequence[Step], target: int, seed: int) -> None:
        self.target, self.seed = target, seed
        self.steps = [step for step in steps if step.target == target]
        drawn = [_drawn(seed, step) for step in self.steps]
        self.seeds = torch.tensor([own - (1 << 63) for own, _ in drawn], dtype=torch.int64)
        fields = [(n, s.bits, s.amount) for (_, n), s in zip(drawn, self.steps, strict=True)]
        self.fields = torch.tensor(fields, dtype=torch.int64).view(-1, 3)
        taken = torch.tensor([0, *(len(step.chosen) for step in self.steps)])
        self.bounds = taken.cumsum(0)
        chosen = [c for step in self.steps for c in step.chosen]
        self.chosen = torch.tensor(chosen, dtype=torch.int32)
        self.signs = torch.tensor([s for step in self.steps for s in step.signs], dtype=torch.int8)

    def apply(self, values: Tensor, first: int, threads: int = THREADS) -> None:
        """Apply them to a range of the flat index, (n,) int8 from `first` on, in place."""
        assert values.dtype == torch.int8 and values.ndim == 1 and values.is_contiguous()
        limit = LIMITS[self.target]
        if lib is None or values.device.type != "cpu":
            for step in self.steps:
                _apply_one(values, first, self.seed, step)
        elif self.steps and len(values):
            arrays = self.seeds, self.fields, self.bounds, self.chosen, self.signs
            lib.apply_steps(values, first, limit, self.target, *arrays, threads)


def _apply_one(values: Tensor, first: int, seed: int, step: Step) -> None:
    """The twin of the compiled core, on any device."""
    limit, (own, number) = LIMITS[step.target], _drawn(seed, step)
    ways = torch.tensor(step.signs, device=values.device)[:, None]
    sums = torch.zeros(len(values), dtype=torch.int32, device=values.device)
    stop = first + len(values)
    cells = (own, number, step.chosen, step.target, step.bits, first, stop, values.device)
    for positions, signs in perturbations(*cells):
        moves = (signs * ways).to(torch.int32)
        sums.index_put_((positions.flatten(),), moves.flatten(), accumulate=True)
    moved = values.to(torch.int32) + step.amount * sums.sign()
    values.copy_(moved.clamp(-limit, limit))


def _drawn(seed: int, step: Step) -> tuple[int, int]:
    """Seed and number that a step's perturbations are drawn with."""
    own = seed if step.seed is None else step.seed
    return own, step.number if step.drawn is None else step.drawn


def parts_of_seed(header: JournalHeader) -> list[Part]:
    """The tensors of a journal that begins from its seed."""
    return parts_in_order(header.tensors, None if header.model is None else header.model.exponents)


def start_of(part: Part, header: JournalHeader, rows: tuple[int, int] | None = None) -> Tensor:
    """The trits of a start from the seed, (..., rows, cols) int8; of some rows: (rows, cols).

    rows  first and last + 1, counted through the whole stack of matrices
    """
    assert header.zeros is not None
    cols = part.shape[-1]
    first, stop = rows or (0, torch.Size(part.shape[:-1]).numel())
    flat = start_trits(header.seed, header.zeros, part.trits + first * cols, (stop - first) * cols)
    return flat.view((stop - first, cols) if rows else part.shape)


def state_digest(parts: Iterable[tuple[Tensor, Tensor, int]]) -> str:
    """The SHA-256, in hex, that a digest record holds.

    parts  in the order of the journal: trits (..., rows, cols) int8, exponents int8, group size

    Of the bytes that base3.md gives the trits of all tensors, then of the exponents of all.
    """
    sha, exponents = hashlib.sha256(), hashlib.sha256()
    for trits, moved, group_size in parts:
        sha.update(pack(trits.cpu(), group_size).numpy().data)
        exponents.update(moved.cpu().contiguous().numpy().data)
    sha.update(exponents.digest())
    return sha.hexdigest()


class Values:
    """The values of all tensors of a journal: what steps have made of the start.

    trits, exponents  by name, int8
    frozen            by name, where trits stay 0, for those tensors that have such places
    """

    def __init__(
        self,
        seed: int,
        parts: Sequence[Part],
        start: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.seed, self.parts, self.frozen = seed, list(parts), dict(frozen or {})
        self.trits = {p.name: start[p.name].contiguous().clone() for p in parts}
        self.exponents = {
            p.name: torch.zeros(p.scales_shape, dtype=torch.int8, device=self.trits[p.name].device)
            for p in parts
        }

    def values(self, part: Part, target: int) -> Tensor:
        """What a target moves of a tensor."""
        return (self.trits if target == TRITS else self.exponents)[part.name]

    def apply(self, steps: Sequence[Step], threads: int = THREADS) -> None:
        for target in sorted({step.target for step in steps}):
            moves = Moves(steps, target, self.seed)
            for part in self.parts:
                moves.apply(self.values(part, target).view(-1), part.first(target), threads)
                if target == TRITS and part.name in self.frozen:
                    self.trits[part.name].masked_fill_(self.frozen[part.name], 0)

    def digest(self) -> str:
        """See `state_digest`."""
        return state_digest(
            (self.trits[p.name], self.exponents[p.name], p.group_size) for p in self.parts
        )
