"""The loop: samples, loss, gradient, step; now and then a look at held-out text.

A step is of some thousand tokens, taken through the model a part at a time, so that activations
need little memory. Rates go up over the first steps and down as a cosine over the budget, be it of
steps, tokens or minutes. The state with the least held-out loss is kept; the start is one of them.

Several processes take the micro-batches of a step in turn (parallel.py). The first has the samples
and the budget, looks at the clock, and writes; the others do as it tells.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.calibrate.samples import Sample
from ternarize.errors import CheckpointError, RankError, UsageError
from ternarize.plans.recipe import BUDGETS, Train
from ternarize.ranks import World
from ternarize.threads import let_through, signals_came, signals_held
from ternarize.train.divided import clip, watched
from ternarize.train.parallel import Exchange, Gradients
from ternarize.train.state import Progressed, best_file, load_state, save_state
from ternarize.train.texts import ahead, learnt_in, next_samples, tokens_in

WARM = 0.02  # share of the budget in which rates go up
CLIP = 1.0  # largest norm of the gradient
LOOKS = 10  # at held-out text, spread evenly over the budget
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
    keep        write what is stored of the state now into a file, with its held-out loss
    known       what must be the same when a training goes on
    told        what to show after each step
    part        tokens that go through the model at a time
    at          what changes with the share that is done, before each step and at the end; and
                whether a look at held-out text follows, after which the state may be kept
    counts      share of the budget from which on states can be kept: what is asked of them is
                reached there
    world       the processes that share it; of those beside the first folder, known and told are
                not used, and keep is where blocks are divided, when all have to take part in it
    exchange    of several processes
    """

    training: Train
    folder: Path
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    loss: Objective
    held: Callable[[], float]
    keep: Callable[[Path, float], None]
    known: Mapping[str, Any]
    told: Told
    part: int
    at: Callable[[float, bool], None]
    counts: float = 0.0
    world: World = field(default_factory=World)
    exchange: Exchange | None = None


def train(job: Job, samples: Iterator[Sample]) -> Progressed:
    """Train until the budget is used up; returns how it went. The best state is in the folder.

    What is interrupted between two steps, or within one, goes on after the last whole one.
    """
    gradients = Gradients(job.world, job.parameters, job.exchange)
    own = job.parameters, job.optimizer, job.known
    try:
        with ExitStack() as stack:
            # put back as it was: a signal at the end of a no_grad of torch's leaves gradients off
            stack.enter_context(torch.enable_grad())
            if gradients.divided:  # all processes end together
                stack.enter_context(signals_held())
                stack.enter_context(watched(job.world))
            progressed = load_state(job.folder, *own, world=job.world)
            _note_budget(job.training, progressed)
            for _ in range(0 if job.world.rank else progressed.samples):
                next(samples)
            found = stack.enter_context(ahead(samples))
            return _go_on(job, progressed, found, gradients)
    except KeyboardInterrupt as stop:
        if isinstance(stop.__context__, RankError):
            raise stop.__context__ from None  # and not the signal that a launcher sends then
        raise


def _go_on(
    job: Job, progressed: Progressed, samples: Iterator[Sample], gradients: Gradients
) -> Progressed:
    rates = [group["lr"] for group in job.optimizer.param_groups]
    together, first = gradients.divided, job.world.rank == 0

    def save() -> None:
        with signals_held():
            own = job.parameters, job.optimizer, job.known
            save_state(job.folder, progressed, *own, writes=first)

    def save_alone() -> None:
        if first and progressed.held and not together:
            save()

    saved, shown = time.monotonic(), 0.0
    try:
        while True:
            due = time.monotonic() - saved > SAVE_EVERY
            done, due = job.world.firsts((min(1.0, share_done(job.training, progressed)), due))
            if together and progressed.held and any(job.world.all(signals_came())):
                save()
                let_through()
                raise KeyboardInterrupt  # that another process has been sent
            looks = not progressed.held or math.floor(done * LOOKS) > progressed.looked
            job.at(done, looks)
            if looks:
                gradients.check_same(progressed.step)
                _look(job, progressed, math.floor(done * LOOKS), done >= job.counts, together)
                if done < 1:  # a step has what it would have if it went on from a state of now
                    job.at(done, False)
            if done == 1 or due:
                if first or together:
                    save()
                saved = time.monotonic()
            if done == 1:
                return progressed
            for group, rate in zip(job.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _rate(done)
            loss, figures = _step(job, progressed, samples, gradients)
            shown = loss if not shown else (1 - SMOOTH) * shown + SMOOTH * loss
            _tell(job, progressed, shown, figures)
    except (KeyboardInterrupt, RankError):
        save_alone()
        raise


def _note_budget(training: Train, progressed: Progressed) -> None:
    """Follow this budget from now on, if an earlier run had another."""
    budget = {name: getattr(training, name) for name in BUDGETS}
    if not progressed.budgets or progressed.budgets[-1][1] != budget:
        progressed.budgets.append((progressed.step, budget))
        # looks are spread over the new budget, of which fewer may have come due
        due = math.floor(min(1.0, share_done(training, progressed)) * LOOKS)
        progressed.looked = min(progressed.looked, due)


def _tell(job: Job, progressed: Progressed, loss: float, figures: Mapping[str, float]) -> None:
    """Say how far a training is."""
    done = max(1e-9, share_done(job.training, progressed))
    told = {
        "loss": loss,
        "held": progressed.held[-1][1],
        "speed": progressed.tokens / max(progressed.seconds, 1e-9),
        "left": max(0.0, progressed.seconds * (1 - done) / done),
    }
    job.told(progressed.step, min(done, 1.0), {**figures, **told})


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


def _look(job: Job, progressed: Progressed, number: int, counts: bool, together: bool) -> None:
    """Measure the held-out loss; keep the state if none that counts was better.

    together  whether all processes take part in keeping it
    """
    loss = job.held()
    counted = (each for step, each in progressed.held if step >= progressed.since)
    better = not counts or progressed.best is None or loss < min(counted, default=math.inf)
    if better and (together or job.world.rank == 0):
        job.keep(best_file(job.folder, progressed.step), loss)
    with signals_held():
        progressed.held.append((progressed.step, loss))
        progressed.looked = number
        progressed.best = progressed.step if better else progressed.best
        progressed.since = progressed.since if counts else progressed.step + 1


def _step(
    job: Job, progressed: Progressed, samples: Iterator[Sample], gradients: Gradients
) -> tuple[float, dict[str, float]]:
    """One step of the optimizer; returns its loss and figures beside it."""
    begun, world = time.monotonic(), job.world
    parts = world.firsts(_micro_batches(job, samples) if world.rank == 0 else [])
    learnt = [sum(map(learnt_in, part)) for part in parts]
    shares = [each / max(1, sum(learnt)) for each in learnt]
    job.optimizer.zero_grad()
    total, figures = 0.0, dict[str, float]()
    for first in range(0, len(parts), world.size):
        at = first + world.rank
        own: tuple[float, dict[str, float]] | None = None
        if at < len(parts):
            loss, beside = job.loss(parts[at])
            (loss * shares[at]).backward()  # type: ignore[no-untyped-call]
            own = float(loss.detach()), beside
        elif gradients.divided:  # blocks come together in all processes, or not at all
            (job.loss(parts[0])[0] * 0).backward()  # type: ignore[no-untyped-call]
        for share, told in zip(shares[first:], gradients.add(own), strict=False):
            if told is not None:
                total += share * told[0]
                for name, value in told[1].items():
                    figures[name] = figures.get(name, 0.0) + share * value
    if not math.isfinite(total):
        raise CheckpointError(
            job.folder,
            f"the loss of step {progressed.step + 1} is {total}",
            "a finite one",
            "Train anew with a lower --lr",
        )
    gradients.take()
    if gradients.divided:
        clip(job.parameters.values(), CLIP, world)
    else:
        torch.nn.utils.clip_grad_norm_(list(job.parameters.values()), CLIP)
    with signals_held():  # a step is done whole or not at all
        job.optimizer.step()
        progressed.step += 1
        progressed.samples += sum(map(len, parts))
        progressed.tokens += sum(tokens_in(sample) for part in parts for sample in part)
        progressed.seconds += time.monotonic() - begun
    return total, figures


def _micro_batches(job: Job, samples: Iterator[Sample]) -> list[list[Sample]]:
    """The next samples, as they go through the model."""
    taken = next_samples(samples, job.training.batch)
    if job.world.size > 1:  # a row of a table is told with all of it
        taken = [{name: value.clone() for name, value in each.items()} for each in taken]
    return list(in_parts(taken, job.part))


def tokens_at_once(device: str) -> int:
    """How many tokens go through a model at a time where nobody says it."""
    return 2048 if device == "cpu" else 16384


def check_rounds(training: Train, usual: int, count: int, samples: Sequence[Sample]) -> None:
    """Raise UsageError where a step has no micro-batch for each of several processes.

    usual    tokens of a micro-batch where nobody says it
    samples  like those of a step
    """
    if count == 1:
        return
    part = training.micro_batch or usual
    steps = itertools.accumulate(map(tokens_in, itertools.cycle(samples)))
    taken = 1 + next(at for at, tokens in enumerate(steps) if tokens >= training.batch)
    step = list(itertools.islice(itertools.cycle(samples), taken))
    found = len(list(in_parts(step, part)))
    if found < count:
        longest = max(map(tokens_in, step))
        raise UsageError(
            "torchrun",
            f"{count} processes, and a step of {training.batch} tokens, which is {found} "
            f"micro-batches of {part} in samples of {longest}",
            "a micro-batch for each process",
            f"Use --batch {count * max(part, longest)}, or a smaller --micro-batch or --train-len",
        )


def in_parts(samples: Sequence[Sample], most: int) -> Iterator[list[Sample]]:
    """Samples in lists of at most so many tokens, or of one; those of alike lengths together.

    What short ones are filled up with counts as well: the model works on it.
    """
    part: list[Sample] = []
    for sample in sorted(samples, key=tokens_in):  # the longest comes last
        if part and (len(part) + 1) * tokens_in(sample) > most:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part
