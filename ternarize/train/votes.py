"""Training by votes on random perturbations: what a journal of steps is written of.

A step draws k perturbations, asks of each how the loss changes along it and against (probes.py),
and follows those along which it falls most. How many of them, and with how many non-zeros, is
tried: the candidate with the largest gain on another batch, as

    (loss without it - loss with it) / bits of the journal ^ thrift,

is taken, if there is a gain.

Of several processes each has a share of the data and all values. They exchange how the loss changes
along perturbations, or their votes on them in trits, and the losses of candidates; the first one's
record is what all apply, so that no rounding can drive them apart, and digests are compared.

Source: noise_step, https://github.com/wbrickner/noise_step, whose rule (all alignments above the
median, unseen) is the candidate of a half; that a step is accepted by its result on another batch
is ours, and what makes it work (benchmarks/results/steps.md).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError
from ternarize.ranks import World
from ternarize.steps.coding import set_width
from ternarize.steps.generator import MOST_BITS, TRITS
from ternarize.steps.journal import (
    NO_STEP,
    Journal,
    Mark,
    Note,
    Step,
    bits_in_block,
    entry_bytes,
    is_step_number,
    journal_header,
    parse_journal,
)
from ternarize.steps.operations import bits_left
from ternarize.train.moved import MovedModule, target_of
from ternarize.train.probes import (
    WAYS,
    ModuleLoss,
    by_forwards,
    by_jvp,
    gradient,
    sums_along,
    tried,
)
from ternarize.trits.base3 import pack, unpack
from ternarize.trits.int4 import pack_int4, unpack_int4

VOTED = 256  # perturbations of a step, when none are asked for
EXCHANGES = ("alignments", "votes")
# bits of a cell that are tried when none are asked for
DENSITIES = {"trits": (8, 10, 12), "scales": (4, 6, 8)}
_LEVELS = 7  # of alignments that are told
_OVERHEAD = 12  # bits of a step beside its choice, in a block
MARK_EVERY = 100  # attempts between digests

# attempt -> the batch that is probed, and the one that decides
Batches = Callable[[int], tuple[Any, Any]]
# (attempt, loss on the batch that decides); or by gradients (step, loss)
Heard = Callable[[int, float], None]


@dataclass(frozen=True)
class Votes:
    """How steps are found.

    target   "trits" or "scales"
    k        perturbations of a step
    bits     of a cell, each tried: a perturbation has one non-zero in 2^bits values
    shares   of the perturbations that are followed, each tried
    amounts  by which exponents move, each tried; 1 of trits
    thrift   0: the largest gain, whatever it takes; 1: the largest gain for each bit
    probe    "backward", "jvp" or "forwards"
    nbytes   of the journal, once it is compact, behind which no step is taken; 0: any number
    exchange of several processes: "alignments", means of numbers in 4 bits, or "votes", sums of
             trits
    """

    target: str = "trits"
    k: int = 128
    bits: tuple[int, ...] = (8, 10, 12)
    shares: tuple[float, ...] = (1.0, 0.5, 0.2, 0.05, 0.01)
    amounts: tuple[int, ...] = (1,)
    thrift: float = 0.5
    probe: str = "backward"
    nbytes: int = 0
    exchange: str = "alignments"

    def __post_init__(self) -> None:
        for what, value, good, expected in (
            ("target", self.target, self.target in ("trits", "scales"), "trits or scales"),
            ("k", self.k, 1 <= self.k < 1 << 16, "1 to 65535"),
            ("bits", self.bits, _within(self.bits, 0, MOST_BITS), f"0 to {MOST_BITS} each"),
            ("shares", self.shares, all(0 < s <= 1 for s in self.shares or [0]), "above 0, to 1"),
            ("amounts", self.amounts, _within(self.amounts, 1, 127), "1 to 127 each"),
            ("probe", self.probe, self.probe in WAYS, f"one of {', '.join(WAYS)}"),
            ("exchange", self.exchange, self.exchange in EXCHANGES, " or ".join(EXCHANGES)),
            ("thrift", self.thrift, 0 <= self.thrift <= 1, "0 to 1"),
        ):
            if not good:
                raise UsageError(what, f"{value!r}", expected)


def _within(values: tuple[float, ...], low: float, high: float) -> bool:
    return bool(values) and all(low <= value <= high for value in values)


def train_votes(
    moved: MovedModule,
    loss: ModuleLoss,
    batches: Batches,
    journal: Journal,
    append: Callable[..., None],
    votes: Votes,
    attempts: int,
    *,
    world: World | None = None,
    heard: Heard | None = None,
) -> tuple[int, int]:
    """Try steps until so many have been tried, and append those that are taken.

    moved     module, places and values, which are what the journal says
    journal   what has been done; append: writes on it (`Appender`)
    attempts  in all, those of earlier runs included
    world     the processes, each with batches of its own

    Returns how many were taken, and the number of the attempt that comes next: below `attempts`
    where a step does not fit into the bytes. With more of them that one is made again, so that
    the journal is the one that they would have had at once.
    """
    world = world or World()
    taken, last = 0, journal.steps[-1] if journal.steps else NO_STEP
    left = bits_left(journal, votes.nbytes) if votes.nbytes else math.inf
    number = begun = first_attempt(journal)
    vain = number - len(journal.steps)
    while number < attempts and left > 0:
        probed, deciding = batches(number)
        found, value = best_step(moved, loss, probed, deciding, votes, number, world, vain)
        if not math.isfinite(value):
            raise CheckpointError(
                journal.path,
                f"the loss of attempt {number} is {value}",
                "a finite one",
                "Look after the data, or the base",
            )
        told = world.firsts(b"" if found is None else entry_bytes(found))
        step = next(iter(parse_journal(journal_header(journal.header) + told).steps), None)
        if step is not None:
            left -= bits_in_block(step, last)
            if left < 0:
                break
            moved.state.apply([step])
            moved.write()
            taken, last = taken + 1, step
        else:
            vain += 1
        note = Note({"attempt": number, "loss": round(value, 6)})
        append(*([step] if step else []), note)
        if heard is not None:
            heard(number, value)
        number += 1
        if number % MARK_EVERY == 0 and number < attempts:
            _mark(moved, append, world, number)
    if number > begun:
        _mark(moved, append, world, number)
    return taken, number


def _mark(moved: MovedModule, append: Callable[..., None], world: World, number: int) -> None:
    """A digest of the steps below a number, which all processes have to have."""
    digest = moved.state.digest()
    world.check_same(
        digest,
        f"has other values after attempt {number}",
        "Start again: the journal is as the first process has it",
    )
    append(Mark(number, digest))


def _agreed(changes: Tensor, exchange: str, world: World) -> Tensor:
    """What all say of perturbations: (k, 2), how the loss changes along them and against."""
    if world.size == 1:
        return changes
    if exchange == "alignments":
        each = [
            _unpack_alignments(own, len(changes))
            for own in world.gather(_pack_alignments(changes), exchange)
        ]
        return (sum(each[1:], each[0]) / world.size).to(changes)
    falls, side = changes.min(1)
    strong = falls <= falls.median()
    trits = torch.where(strong & (falls < 0), 1 - 2 * side, 0).to("cpu", torch.int8)
    said = [unpack(own, len(trits), -1)[0] for own in world.gather(pack(trits[None], -1), exchange)]
    votes = torch.stack(said).sum(0).to(changes)
    return torch.stack([-votes, votes], 1)


def _pack_alignments(changes: Tensor) -> Tensor:
    """Alignments (k, 2) as a process tells them: (4 + k,) uint8, a float32 scale, then 4 bits each.

    -7 to 7 times the scale, of which the largest is 7; all 0 where one is not finite.
    """
    wide = changes.to("cpu", torch.float32)
    scale = wide.abs().max() / _LEVELS
    if not 0 < float(scale) < math.inf:
        return torch.zeros(4 + len(changes), dtype=torch.uint8)
    numbers = (wide / scale).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return torch.cat([scale.view(1).view(torch.uint8), pack_int4(numbers.view(1, -1), -1)[0]])


def _unpack_alignments(told: Tensor, k: int) -> Tensor:
    """What `_pack_alignments` tells: (k, 2) float64, the same at all processes."""
    scale = told[:4].clone().view(torch.float32).double()
    return unpack_int4(told[None, 4:], 2 * k, -1).view(k, 2) * scale


def _mean(value: float, world: World) -> float:
    """The mean of a loss over all processes."""
    each = world.gather(torch.tensor(value, dtype=torch.float64), "losses")
    return sum(map(float, each)) / world.size


def first_attempt(journal: Journal) -> int:
    """The number of the attempt that a journal goes on with."""
    notes = [each.content for each in journal.entries if isinstance(each, Note)]
    tried: list[int] = [n["attempt"] for n in notes if is_step_number(n.get("attempt"))]
    return max([journal.next_number, *(number + 1 for number in tried)])


def best_step(
    moved: MovedModule,
    loss: ModuleLoss,
    probed: Any,
    deciding: Any,
    votes: Votes,
    number: int,
    world: World,
    vain: int = 0,
) -> tuple[Step | None, float]:
    """The candidate with the largest gain, None where none has any; and the loss then.

    vain  attempts before it that found none: without backward, one density is tried until it does
          not help, then the next
    """
    with torch.no_grad():
        before = _mean(float(loss(moved.module, deciding)), world)
    chosen, most, after = None, 0.0, before
    for step in candidates(moved, loss, probed, votes, number, world, vain):
        with torch.no_grad(), tried(moved, step):
            value = _mean(float(loss(moved.module, deciding)), world)
        gain = (before - value) / bits_of(step) ** votes.thrift
        if gain > most:
            chosen, most, after = step, gain, value
    return chosen, after


def bits_of(step: Step) -> int:
    """About what a step takes in a compact journal."""
    return _OVERHEAD + set_width(step.k, len(step.chosen)) + len(step.chosen)


def candidates(
    moved: MovedModule,
    loss: ModuleLoss,
    batch: Any,
    votes: Votes,
    number: int,
    world: World,
    vain: int = 0,
) -> Iterator[Step]:
    """The steps that are tried: for each density and amount those of the largest alignments."""
    for drawn, changes in _alignments(moved, loss, batch, votes, number, vain):
        amounts = (1,) if drawn.target == TRITS else votes.amounts
        falls, side = _agreed(changes, votes.exchange, world).min(1)
        order = falls.argsort(stable=True)
        order = order[falls[order] < 0]
        seen = set[int]()
        for share in votes.shares:
            count = min(len(order), max(1, round(share * votes.k)))
            if not count or count in seen:
                continue
            seen.add(count)
            chosen = order[:count].sort().values
            signs = tuple((1 - 2 * side[chosen]).tolist())
            step = replace(drawn, chosen=tuple(chosen.tolist()), signs=signs)
            yield from (replace(step, amount=amount) for amount in amounts)


def _alignments(
    moved: MovedModule, loss: ModuleLoss, batch: Any, votes: Votes, number: int, vain: int
) -> Iterator[tuple[Step, Tensor]]:
    """A step without a choice and its alignments (k, 2), for each density.

    Without backward, where each takes two forwards for a perturbation, for one of them: the first
    until a step of it is taken no more, then the next, and so around.
    """
    target = target_of(votes.target)
    amount = 1 if target == TRITS else votes.amounts[0]
    each = [Step(number, target, bits, amount, votes.k, (), ()) for bits in votes.bits]
    if votes.probe == "backward":
        slopes = moved.slopes(target, gradient(moved, loss, batch)[1])
        yield from ((step, sums_along(moved, slopes, step)) for step in each)
        return
    step = each[vain % len(each)]
    yield step, (by_jvp if votes.probe == "jvp" else by_forwards)(moved, loss, batch, step)
