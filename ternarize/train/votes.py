"""Training by votes on random perturbations: what a journal of steps is written of.

A step draws k perturbations, asks of each how the loss changes along it (probes.py), and follows
those of the largest alignments, each downhill. How many of them, and with how many non-zeros, is
tried: the candidate with the least loss on another batch is taken, if that is less than without it.

Source: noise_step, https://github.com/wbrickner/noise_step, whose rule (all alignments above the
median, unseen) is the candidate of a half; that a step is accepted by its result on another batch
is ours, and what makes it work (benchmarks/results/steps.md).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.steps.coding import set_width
from ternarize.steps.generator import MOST_BITS, TRITS
from ternarize.steps.journal import Appender, Mark, Note, Step
from ternarize.train.moved import Moved, target_of
from ternarize.train.probes import PROBES, Loss, Tried, by_forwards, by_jvp, gradient, sums_along

MARK_EVERY = 100  # attempts between digests

# attempt -> the batch that is probed, and the one that decides
Batches = Callable[[int], tuple[Any, Any]]
# (attempt, loss on the batch that decides, the step that was taken or None)
Heard = Callable[[int, float, Step | None], None]


@dataclass(frozen=True)
class Votes:
    """How steps are found.

    target   "trits" or "scales"
    k        perturbations of a step
    bits     of a cell, each tried: a perturbation has one non-zero in 2^bits values
    shares   of the perturbations that are followed, each tried
    amounts  by which exponents move, each tried; 1 of trits
    penalty  loss that a bit of the journal has to gain
    probe    "backward", "jvp" or "forwards"
    """

    target: str = "trits"
    k: int = 128
    bits: tuple[int, ...] = (8, 10, 12)
    shares: tuple[float, ...] = (1.0, 0.5, 0.2, 0.05, 0.01)
    amounts: tuple[int, ...] = (1,)
    penalty: float = 0.0
    probe: str = "backward"

    def __post_init__(self) -> None:
        for what, value, good, expected in (
            ("target", self.target, self.target in ("trits", "scales"), "trits or scales"),
            ("k", self.k, 1 <= self.k < 1 << 16, "1 to 65535"),
            ("bits", self.bits, _within(self.bits, 0, MOST_BITS), f"0 to {MOST_BITS} each"),
            ("shares", self.shares, _within(self.shares, 0, 1), "above 0, to 1 each"),
            ("amounts", self.amounts, _within(self.amounts, 1, 127), "1 to 127 each"),
            ("probe", self.probe, self.probe in PROBES, f"one of {', '.join(PROBES)}"),
            ("penalty", self.penalty, math.isfinite(self.penalty), "a number"),
        ):
            if not good:
                raise UsageError(what, f"{value!r}", expected)


def _within(values: tuple[float, ...], low: float, high: float) -> bool:
    return bool(values) and all(low <= value <= high for value in values)


def train_votes(
    moved: Moved,
    loss: Loss,
    batches: Batches,
    appender: Appender,
    votes: Votes,
    attempts: int,
    *,
    heard: Heard | None = None,
) -> int:
    """Try steps until so many have been tried, and append those that are taken; returns how many.

    moved     module, places and values, which begin as the journal says
    attempts  in all, those of earlier runs included

    Under torch.distributed each process has batches of its own: alignments and losses are means
    over all, and what is appended is the first process's, who alone has an `appender` that writes.
    """
    taken = 0
    for number in range(first_attempt(appender), attempts):
        probed, deciding = batches(number)
        step, value = best_step(moved, loss, probed, deciding, votes, number)
        if step is not None:
            moved.state.apply([step])
            moved.write()
            appender.append(step)
            taken += 1
        appender.append(Note({"attempt": number, "loss": round(value, 6)}))
        if (number + 1) % MARK_EVERY == 0 or number + 1 == attempts:
            appender.append(Mark(number + 1, moved.state.digest()))
        if heard is not None:
            heard(number, value, step)
    return taken


def first_attempt(appender: Appender) -> int:
    """The number of the attempt that a journal goes on with."""
    entries = appender.journal.entries
    tried = [e.content.get("attempt", -1) for e in entries if isinstance(e, Note)]
    return max([appender.journal.next_number, *(n + 1 for n in tried if type(n) is int)])


def best_step(
    moved: Moved, loss: Loss, probed: Any, deciding: Any, votes: Votes, number: int
) -> tuple[Step | None, float]:
    """The candidate with the least loss, None where none is better; and the loss with it."""
    with torch.no_grad():
        least = _mean(float(loss(moved.module, deciding)))
    chosen, best = None, least
    for step in candidates(moved, loss, probed, votes, number):
        with torch.no_grad(), Tried(moved, step):
            value = _mean(float(loss(moved.module, deciding)))
        bits = set_width(step.k, len(step.chosen)) + len(step.chosen)
        if value + votes.penalty * bits < best:
            chosen, best, least = step, value + votes.penalty * bits, value
    return chosen, least


def candidates(moved: Moved, loss: Loss, batch: Any, votes: Votes, number: int) -> Iterator[Step]:
    """The steps that are tried: for each density and amount those of the largest alignments."""
    target = target_of(votes.target)
    amounts = (1,) if target == TRITS else votes.amounts
    for bits, aligned in _alignments(moved, loss, batch, votes, number):
        order = aligned.abs().argsort(descending=True, stable=True)
        order = order[aligned[order] != 0]
        seen = set[int]()
        for share in votes.shares:
            count = min(len(order), max(1, round(share * votes.k)))
            if not count or count in seen:
                continue
            seen.add(count)
            chosen = order[:count].sort().values
            signs = tuple((-aligned[chosen].sign()).int().tolist())
            for amount in amounts:
                yield Step(number, target, bits, amount, votes.k, tuple(chosen.tolist()), signs)


def _alignments(
    moved: Moved, loss: Loss, batch: Any, votes: Votes, number: int
) -> Iterator[tuple[int, Tensor]]:
    """Alignments (k,) for each density; without backward for one of them, in turn."""
    target = target_of(votes.target)
    if votes.probe == "backward":
        slopes = moved.slopes(target, gradient(moved, loss, batch)[1])
        for bits in votes.bits:
            yield bits, _mean_of(sums_along(moved, slopes, target, number, bits, votes.k))
        return
    bits = votes.bits[number % len(votes.bits)]
    if votes.probe == "jvp":
        yield bits, _mean_of(by_jvp(moved, loss, batch, target, number, bits, votes.k))
    else:
        amount = votes.amounts[0] if target != TRITS else 1
        found = by_forwards(moved, loss, batch, target, number, bits, amount, votes.k)
        yield bits, _mean_of(found)


def _mean(value: float) -> float:
    return float(_mean_of(torch.tensor([value], dtype=torch.float64)))


def _mean_of(values: Tensor) -> Tensor:
    """The mean over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()
