"""The loop: samples, loss, gradient, step; now and then a look at held-out text.

A step is of some thousand tokens, taken through the model a part at a time, so that activations
need little memory. Rates go up over the first steps and down as a cosine over the budget, be it of
steps, tokens or minutes. The state with the least held-out loss is kept; the start is one of them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.calibrate.samples import Sample
from ternarize.errors import OutputError
from ternarize.plans.recipe import Train
from ternarize.train.state import Progressed, load_state, save_state
from ternarize.train.texts import tokens_in

_PART = 2048  # tokens that go through the model at a time
WARM = 0.02  # share of the budget in which rates go up
CLIP = 1.0  # largest norm of the gradient
LOOKS = 20  # at held-out text, spread evenly over the budget
SAVE_EVERY = 600.0  # seconds between states on the disk
SMOOTH = 0.1  # weight of the newest loss in the one that is shown

# the loss of some samples (mean over their tokens), and figures to show beside it
Objective = Callable[[Sequence[Sample]], tuple[Tensor, dict[str, float]]]
# (step, what to show or to log: loss, held, tokens, tokens a second, seconds left)
Told = Callable[[int, float, Mapping[str, float]], None]


@dataclass(frozen=True)
class Job:
    """What a training is made of.

    parameters  by name, what the optimizer moves
    optimizer   with the rates at their highest
    loss        of samples, to train
    held        the held-out loss
    keep        write what is stored of the state now, as the best
    known       what must be the same when a training goes on
    at          what changes with the share that is done, before each step
    """

    training: Train
    folder: Path
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    loss: Objective
    held: Callable[[], float]
    keep: Callable[[Progressed], None]
    known: Mapping[str, Any]
    told: Told
    at: Callable[[float], None]


def train(job: Job, samples: Iterator[Sample]) -> Progressed:
    """Train until the budget is used up; returns how it went. The best state is in the folder."""
    found = load_state(job.folder, job.parameters, job.optimizer)
    progressed = Progressed() if found is None else found[0]
    if found is not None and found[1] != dict(job.known):
        raise OutputError(
            job.folder.parent,
            f"holds a training of other settings ({found[1]} there, {dict(job.known)} now)",
            "the same",
            "Remove it to begin anew",
        )
    if not progressed.held:
        _look(job, progressed)
    for _ in range(progressed.samples):
        next(samples)
    rates = [group["lr"] for group in job.optimizer.param_groups]
    looks = math.floor(share_done(job.training, progressed) * LOOKS)
    saved, shown = time.monotonic(), 0.0
    while (done := share_done(job.training, progressed)) < 1:
        job.at(done)
        for group, rate in zip(job.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _rate(done)
        begun = time.monotonic()
        loss, figures, taken = _step(job, samples)
        took = time.monotonic() - begun
        progressed.step += 1
        progressed.seconds += took
        progressed.samples += len(taken)
        tokens = sum(map(tokens_in, taken))
        progressed.tokens += tokens
        shown = loss if not shown else (1 - SMOOTH) * shown + SMOOTH * loss
        now = share_done(job.training, progressed)
        if math.floor(now * LOOKS) > looks and now < 1:
            looks = math.floor(now * LOOKS)
            _look(job, progressed)
        if time.monotonic() - saved > SAVE_EVERY:
            save_state(job.folder, progressed, job.parameters, job.optimizer, job.known)
            saved = time.monotonic()
        left = progressed.seconds * (1 - now) / max(now, 1e-9)
        speed = progressed.tokens / max(progressed.seconds, 1e-9)
        facts = {"loss": shown, "held": progressed.held[-1][1], "left": max(0.0, left)}
        job.told(progressed.step, min(now, 1.0), {**figures, **facts, "speed": speed})
    for group, rate in zip(job.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    job.at(1.0)
    if progressed.held[-1][0] != progressed.step:
        _look(job, progressed)
    save_state(job.folder, progressed, job.parameters, job.optimizer, job.known)
    return progressed


def share_done(training: Train, progressed: Progressed) -> float:
    """How much of the budget is used up: of the one that is nearest to its end."""
    budgets = (
        progressed.step / training.steps if training.steps else 0.0,
        progressed.tokens / training.tokens if training.tokens else 0.0,
        progressed.seconds / 60 / training.minutes if training.minutes else 0.0,
    )
    return max(budgets)


def _rate(done: float) -> float:
    """Of the highest rate: up in the first steps, then down as a cosine."""
    return min(1.0, (done + 1e-3) / WARM) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _look(job: Job, progressed: Progressed) -> None:
    """Measure the held-out loss; keep the state if none was better."""
    loss = job.held()
    progressed.held.append((progressed.step, loss))
    if loss < progressed.best:
        progressed.best = loss
        job.keep(progressed)


def _step(job: Job, samples: Iterator[Sample]) -> tuple[float, dict[str, float], list[Sample]]:
    """One step of the optimizer; returns its loss, figures beside it, and the samples taken."""
    taken: list[Sample] = []
    while sum(map(tokens_in, taken)) < job.training.batch:
        taken.append(next(samples))
    whole = sum(map(tokens_in, taken))
    job.optimizer.zero_grad()
    total, figures = 0.0, dict[str, float]()
    for part in in_parts(taken):
        loss, beside = job.loss(part)
        share = sum(map(tokens_in, part)) / whole
        (loss * share).backward()  # type: ignore[no-untyped-call]
        total += share * float(loss.detach())
        for name, value in beside.items():
            figures[name] = figures.get(name, 0.0) + share * value
    torch.nn.utils.clip_grad_norm_(list(job.parameters.values()), CLIP)
    job.optimizer.step()
    return total, figures, taken


def in_parts(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples in lists of about _PART tokens, those of alike lengths together."""
    part: list[Sample] = []
    for sample in sorted(samples, key=tokens_in):
        if part and sum(map(tokens_in, part)) + tokens_in(sample) > _PART:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part
