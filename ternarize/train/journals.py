"""A packed model trained by a journal of steps, on texts."""

import itertools
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ternarize.calibrate.samples import Sample
from ternarize.calibrate.speech import LEFT_OUT
from ternarize.errors import UsageError
from ternarize.plans.recipe import Train
from ternarize.ranks import World, ranks_launched
from ternarize.steps.appender import Appender
from ternarize.steps.journal import (
    NO_STEP,
    Edit,
    Journal,
    JournalHeader,
    Mark,
    Note,
    Step,
    is_step_number,
    parse_journal,
    read_journal,
)
from ternarize.steps.operations import bits_left, compact_size
from ternarize.train.moved import target_of
from ternarize.train.pursuit import dense_steps, placed_steps, single_cell, trained_values
from ternarize.train.session import Session, open_session
from ternarize.train.sources import Data
from ternarize.train.texts import next_samples
from ternarize.train.votes import Heard, Votes, first_attempt, train_votes

SEED = 0  # of the perturbations, when none is asked for
GRADIENT_BYTES = 2500  # bytes of a journal by gradients, when none are asked for
SCRATCH_BYTES = 50_000  # the same of a model from its seed
DIRECTIONS = 4096  # that a step draws towards what gradients want
# of what is trained by gradients, at its highest: in 1/32 of an octave, and in trits
RATES = {"scales": 1.0, "trits": 0.006}
SCRATCH_TRITS = 0.03  # the same of trits of a start from the seed, which are anywhere
FASTEST = {"scales": 32.0, "trits": 1.0}  # such a rate
DENSE_EXPONENTS = 1 << 18  # for more, a step that moves many at once takes seconds to find
_STEP_BITS = 64  # room for one step, which takes some 12 bits beside its choice


def train_by_votes(
    base: str | Path,
    journal: str | Path,
    training: Train,
    votes: Votes,
    *,
    seed: int = SEED,
    start: JournalHeader | None = None,
    device: str = "cpu",
    heard: Heard | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Train a packed model by steps, which are appended to a journal; an old one goes on.

    base      packed checkpoint; of a model from its seed the folder with its tokenizer
    journal   file to write
    training  texts, objective, teacher, length and tokens of a batch, steps to try: `Train`
    votes     how steps are found
    seed      of the perturbations
    start     of a model from its seed: its header, with the same seed (`drawn_header`)
    heard     told of each attempt
    world     processes that train together, each of which calls this, and the first of which writes

    Returns plain data: the attempts that were made and the steps that there are ("written": by this
    run), why there are not more ("not_written": "bytes", the next one does not fit; else None), the
    loss on held-out documents before and after, and the "bytes" of the file, and once compact
    ("compact_bytes"). Raises UsageError where texts, teacher, base or bytes cannot be used,
    OutputError where the journal is another's.
    """
    assert training.steps is not None
    at = open_session(base, training, seed, device, plain=votes.probe == "jvp", start=start)
    world = world or World()
    with ExitStack() as stack:
        # one process writes; the others get what is there from it
        appender = stack.enter_context(Appender(journal, at.header)) if not world.rank else None
        there = Path(journal).read_bytes() if appender else b""
        begun = parse_journal(world.firsts(there), str(journal))
        if begun.header != at.header:  # the first has compared: another process has other files
            raise UsageError(base, "begins otherwise here", "the same folder in every process")
        if votes.nbytes:
            _room(begun, votes.nbytes, goes_on=bool(begun.steps))
        before = at.brought_to(begun.effective())
        pairs = _batches(at.data, training, first_attempt(begun), world)
        taken, attempts = train_votes(
            at.moved,
            at.loss,
            lambda _: next(pairs),
            begun,
            appender.append if appender else lambda *_: None,
            votes,
            training.steps,
            world=world,
            heard=heard,
        )
    return {
        "texts": at.data.about["texts"],
        "attempts": attempts,
        "steps": len(begun.steps) + taken,
        "written": taken,
        "not_written": "bytes" if attempts < training.steps else None,
        "loss_before": before,
        "loss": at.held(),
        "sent_bytes": sum(world.sent.values()),
        **_left_out(at.data),
        **(_sizes(journal) if appender else {}),
    }


def train_by_gradient(
    base: str | Path,
    journal: str | Path,
    training: Train,
    nbytes: int,
    *,
    target: str = "scales",
    k: int = DIRECTIONS,
    rate: float | None = None,
    seed: int = SEED,
    start: JournalHeader | None = None,
    device: str = "cpu",
    heard: Heard | None = None,
) -> dict[str, Any]:
    """Train a packed model by gradients, and write what became of it as steps.

    nbytes  of the journal that is to be written, once it is compact
    target  "scales" or "trits": what is trained; of trits the teacher has to be the source
    k       directions that a step draws
    rate    at the beginning: in 1/32 of an octave, or in trits, above 0 and up to `FASTEST`; None:
            `training.lr`, and without that `RATES`

    The other arguments and errors are those of `train_by_votes`; `training.steps` are those of the
    gradient. It runs in one process. Steps are written together, at the end; a run that was broken
    off trains again from where it began, and writes what is left to be written. Of the steps that
    the bytes hold all, a half, a quarter or none are written, whatever other held-out documents
    gain most by. Returns the same, with the number of new steps ("written"), why there are none
    ("not_written": "before", written before a break; "bytes", none fits; "moves", nothing has moved
    far enough; "gain", none helps; else None), and the loss of what was wanted ("loss_wanted"):
    real exponents, or all trits.
    """
    assert training.steps is not None
    check_alone()
    Votes(target, k)  # refuses what cannot be written
    if rate is None:
        usual = SCRATCH_TRITS if start is not None and target == "trits" else RATES[target]
        rate = usual if training.lr is None else training.lr
    if not 0 < rate <= FASTEST[target]:
        raise UsageError("--lr", f"{rate:g}", f"above 0, and {FASTEST[target]:g} at most")
    at = open_session(base, training, seed, device, plain=False, start=start)
    with Appender(journal, at.header) as appender:
        begun = appender.journal
        first = _began(begun, target)
        there = [step for step in begun.effective() if step.number >= first]
        left = _room(begun, nbytes, goes_on=bool(there))
        before = at.brought_to([step for step in begun.effective() if step.number < first])
        state = at.moved.state
        count = sum(each.numel() for each in state.exponents.values())
        dense = target == "scales" and count <= DENSE_EXPONENTS
        if not dense:
            single_cell(state, target)
        wanted = trained_values(
            at.moved,
            at.loss,
            lambda _: next_samples(at.data.stream, training.batch),
            target,
            training.steps,
            rate,
            begin=at.latent() if target == "trits" and start is None else None,
            heard=heard,
        )
        with wanted.shown(at.moved, target):
            best = at.held()
        state.apply(there)
        behind = (begun.steps or [NO_STEP])[-1], begun.next_number, k, left
        if dense:
            offered = dense_steps(state, wanted, *behind)
        else:
            offered = placed_steps(state, wanted, target, *behind)
        steps, why = _helping(at, target, offered)
        loss = at.held()
        last = steps[-1].number + 1 if steps else begun.next_number
        notes = [Note({"coded": first})]
        if there or steps:
            losses = {"loss_before": round(before, 6), "loss": round(loss, 6)}
            notes.append(Note({"written_from": first, **losses}))
        beginning = Note({"coded_from": first, "target": target})
        appender.append(beginning, *steps, Mark(last, state.digest()), *notes)
    return {
        "texts": at.data.about["texts"],
        "attempts": training.steps,
        "steps": len(begun.steps) + len(steps),
        "written": len(steps),
        "not_written": "before" if why and there else why,
        "loss_before": before,
        "loss_wanted": best,
        "loss": loss,
        **_left_out(at.data),
        **_sizes(journal),
    }


def _sizes(journal: str | Path) -> dict[str, int]:
    """Bytes of a journal, and what they will be once it is compact."""
    found = read_journal(journal)
    return {"bytes": found.size, "compact_bytes": compact_size(found)}


def _left_out(data: Data) -> dict[str, int]:
    """How many windows of the data train nothing, if any, by the name that records have for it."""
    return {LEFT_OUT: data.about[LEFT_OUT]} if LEFT_OUT in data.about else {}


def check_alone() -> None:
    """UsageError where several processes would train by gradient, each of them the same."""
    joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if joined or ranks_launched() > 1:
        raise UsageError("torchrun", "by gradient", "--by votes", "Start one process, or use votes")


def _room(journal: Journal, nbytes: int, *, goes_on: bool) -> int:
    """Bits that are left for steps; UsageError where none fits, and nothing is there to go on."""
    left = bits_left(journal, nbytes)
    if left < _STEP_BITS and not goes_on:
        taken = nbytes - left // 8
        raise UsageError(
            "--bytes",
            f"{nbytes}, of which header, digest and {len(journal.steps)} steps take {taken}",
            f"at least {taken + _STEP_BITS // 8}",
            "Name more",
        )
    return left


def _helping(
    at: Session, target: str, offered: Generator[Step, None, bool]
) -> tuple[list[Step], str | None]:
    """Of steps the beginning that held-out documents gain most by, which the model then has.

    Returns them, and why there are none, if so.
    """
    state, steps = at.moved.state, list[Step]()
    values = [state.values(part, target_of(target)) for part in state.parts]
    before = [each.clone() for each in values]
    full: bool | None = None
    while full is None:
        try:
            steps.append(next(offered))
        except StopIteration as end:
            full = bool(end.value)

    def bring(count: int) -> None:
        for each, kept in zip(values, before, strict=True):
            each.copy_(kept)
        state.apply(steps[:count])
        at.moved.write()

    if not steps:
        bring(0)
        return [], "bytes" if full else "moves"
    losses = dict[int, float]()
    for count in sorted({0, len(steps) // 4, len(steps) // 2, len(steps)}):
        bring(count)
        losses[count] = at.choose()
    count = min(losses, key=lambda each: losses[each])
    bring(count)
    return steps[:count], None if count else "gain"


def _began(journal: Journal, target: str) -> int:
    """The number that a coding's steps begin with: of one that was broken off, or of a new one.

    One of another target that was broken off stays as it is, and a new one goes on from there.
    """
    found: int | None = None
    for each in journal.entries:
        content = each.content if isinstance(each, Note) else {}
        if is_step_number(content.get("coded_from")):
            found = content["coded_from"]
            if content.get("target", target) != target:
                found = None
        elif content.keys() & {"coded", "attempt"} or isinstance(each, Edit):
            found = None  # done, or something else came of it
    if found is not None:  # notes of older versions do not name the target
        others = [s for s in journal.steps if s.number >= found and s.target != target_of(target)]
        found = None if others else found
    return journal.next_number if found is None else found


def _batches(
    data: Data, training: Train, first: int, world: World
) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """Batches of a process to probe and to decide, from the attempt on that comes first."""
    for number in itertools.count():
        for rank in range(world.size):
            probed = next_samples(data.stream, training.batch)
            deciding = next_samples(data.stream, training.batch)
            if number >= first and rank == world.rank:
                yield probed, deciding
