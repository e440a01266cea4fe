"""A packed model trained by a journal of steps, on texts."""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ternarize.calibrate.samples import Sample
from ternarize.errors import UsageError
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.measure.measured import fast_dtype
from ternarize.models.places import locate_tensors
from ternarize.plans.recipe import Train
from ternarize.ranks import World, ranks_launched
from ternarize.runtime.load import load
from ternarize.sources.packed import open_packed
from ternarize.steps.appender import Appender
from ternarize.steps.base import base_digest, opened_state, parts_of_base
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
)
from ternarize.steps.operations import bits_left
from ternarize.train.loop import Objective
from ternarize.train.moved import MovedModule, Placement, target_of
from ternarize.train.objectives import held_loss, labels_of, objective
from ternarize.train.pursuit import dense_steps, placed_steps, single_cell, trained_values
from ternarize.train.sources import Data, data_of
from ternarize.train.students import Pair, open_model, teacher_folder, widen
from ternarize.train.texts import IGNORED, batch_of, next_samples
from ternarize.train.votes import Heard, Votes, first_attempt, train_votes

SEED = 0  # of the perturbations, when none is asked for
GRADIENT_BYTES = 2500  # bytes of a journal by gradients, when none are asked for
DIRECTIONS = 4096  # that a step draws towards what gradients want
# of what is trained by gradients, at its highest: in 1/32 of an octave, and in trits
RATES = {"scales": 1.0, "trits": 0.006}
FASTEST = {"scales": 32.0, "trits": 1.0}  # such a rate
DENSE_EXPONENTS = 1 << 18  # for more, a step that moves many at once takes seconds to find
_REMEMBERED = 16  # outputs of the teacher
_STEP_BITS = 64  # room for one step, which takes some 12 bits beside its choice
# how far trits and rounded weights agree beyond chance (0: as chance has it, 1: all): the source
# comes to 0.5 and more, other weights to about 0. A wrong teacher that passes does no harm: latent
# trits begin within MARGIN of the stored ones, and steps that do not help are not written.
_AKIN = 0.2


@dataclass
class _Remembering(Pair):
    """A pair whose teacher's last outputs are kept: what is tried asks for them again."""

    known: dict[bytes, Tensor] = field(default_factory=dict)

    def hidden(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if model is not self.teacher:
            return super().hidden(model, batch)
        inputs = (batch[name] for name in ("input_ids", "attention_mask") if name in batch)
        key = b"".join(repr(v.shape).encode() + v.cpu().numpy().tobytes() for v in inputs)
        if key not in self.known:
            if len(self.known) >= _REMEMBERED:
                self.known.pop(next(iter(self.known)))
            self.known[key] = super().hidden(model, batch)
        return self.known[key]


def train_by_votes(
    base: str | Path,
    journal: str | Path,
    training: Train,
    votes: Votes,
    *,
    seed: int = SEED,
    device: str = "cpu",
    heard: Heard | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Train a packed model by steps, which are appended to a journal; an old one goes on.

    base      packed checkpoint
    journal   file to write
    training  texts, objective, teacher, length and tokens of a batch, steps to try: `Train`
    votes     how steps are found
    seed      of the perturbations
    heard     told of each attempt
    world     processes that train together, each of which calls this, and the first of which writes

    Returns plain data: the attempts that were made and the steps that there are ("written": by this
    run), why there are not more ("not_written": "bytes", the next one does not fit; else None), and
    the loss on held-out documents before and after. Raises UsageError where texts, teacher, base or
    bytes cannot be used, OutputError where the journal is another's.
    """
    assert training.steps is not None
    at = _session(base, training, seed, device, plain=votes.probe == "jvp")
    world = world or World()
    with ExitStack() as stack:
        # one process writes; the others get what is there from it
        appender = stack.enter_context(Appender(journal, at.header)) if not world.rank else None
        there = Path(journal).read_bytes() if appender else b""
        begun = parse_journal(world.firsts(there), str(journal))
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
        **({"bytes": Path(journal).stat().st_size} if appender else {}),
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
        rate = RATES[target] if training.lr is None else training.lr
    if not 0 < rate <= FASTEST[target]:
        raise UsageError("--lr", f"{rate:g}", f"above 0, and {FASTEST[target]:g} at most")
    at = _session(base, training, seed, device, plain=False)
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
            begin=at.latent() if target == "trits" else None,
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
        "bytes": Path(journal).stat().st_size,
    }


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
    at: "_Session", target: str, offered: Generator[Step, None, bool]
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


@dataclass
class _Session:
    """A packed model that is trained by steps.

    moved    the model and its values
    loss     of samples
    held     the loss of held-out documents
    choose   that of others, by which is chosen
    teacher  None where the texts are learnt
    """

    header: JournalHeader
    data: Data
    moved: MovedModule
    loss: Callable[[nn.Module, list[Sample]], Tensor]
    held: Callable[[], float]
    choose: Callable[[], float]
    teacher: Any

    def latent(self) -> dict[str, Tensor]:
        """Trits as real numbers, by the weights that they were made of; UsageError without them.

        Weights of another model are known by what they have in common with the trits, beyond
        chance (Cohen's kappa).
        """
        weights = dict[str, Tensor]()
        if self.teacher is not None:
            weights |= self.teacher.named_parameters(remove_duplicate=False)
        found, counts = {}, torch.zeros(9, dtype=torch.int64)
        for place in self.moved.places:
            weight, own = weights.get(place.parameter), self.moved.parameters[place.part.name]
            if weight is None or weight.shape != own.shape:
                raise UsageError(
                    "--target trits, by gradient",
                    f"without the weights that {place.part.name} was made of",
                    "the source as the teacher: how near a trit is to another follows from it",
                    "Name it with --teacher, or use --by votes",
                )
            real, trits = self.moved.real(place, weight), self.moved.state.trits[place.part.name]
            rounded = real.nan_to_num().round().clamp(-1, 1)
            counts += (3 * trits + rounded + 4).flatten().to(torch.int64).bincount(minlength=9)
            found[place.part.name] = self.moved.latent(place, real)
        shares = counts.view(3, 3) / counts.sum()  # trits, rounded weights
        same, chance = float(shares.trace()), float(shares.sum(0) @ shares.sum(1))
        if same < chance + _AKIN * (1 - chance):
            raise UsageError(
                "--teacher",
                f"its weights, rounded, are {same:.2f} of the trits (chance: {chance:.2f})",
                "the weights that the trits were made of, as they were rounded (not folded)",
                "Name the source, or use --by votes",
            )
        return found

    def brought_to(self, steps: Sequence[Step]) -> float:
        """The held-out loss after steps, which are applied to the start."""
        self.moved.state.apply(steps)
        self.moved.write()
        return self.held()


def _session(base: str | Path, training: Train, seed: int, device: str, *, plain: bool) -> _Session:
    packed, records = open_packed(base)
    header = JournalHeader(seed, base=base_digest(records))
    data = data_of(packed.directory, training)
    pair = _pair(packed.directory, training, device, plain=plain)
    state = opened_state(header, packed, records)
    moved = MovedModule(pair.student, _places(packed, records, pair.student), state)
    if plain:
        once = again = _plain(pair, data)
    else:
        how = data.common, data.first, training.seed, data.pad, 1.0
        # batches with gradients come once: kept, they would push out those that are asked for again
        once, again = objective(pair, *how), objective(_Remembering(**vars(pair)), *how)
    return _Session(
        header,
        data,
        moved,
        lambda _, samples: (once if torch.is_grad_enabled() else again)(samples)[0],
        lambda: held_loss(again, data.report),
        lambda: held_loss(again, data.held),
        pair.teacher,
    )


def _pair(directory: Path, training: Train, device: str, *, plain: bool) -> Pair:
    """The packed model, dense, and what it learns from.

    plain  in operations that know tangents, which fast attention does not
    """
    dtype = fast_dtype(device)
    how: dict[str, Any] = {"attn_implementation": "eager"} if plain else {}
    student = load(directory, device=device, dtype=torch.float32, dequantize=True, **how)
    teacher = None
    if training.objective == "distill":
        if training.teacher is None:
            raise UsageError(
                "--teacher",
                "none, and a packed checkpoint does not hold its source",
                "the model to learn from",
                "Name the source with --teacher, or learn the text itself: --objective text",
            )
        teacher = open_model(teacher_folder(directory, training), device)
        widen(teacher, dtype)
    return Pair.of(student, teacher, dtype)


def _plain(pair: Pair, data: Data) -> Objective:
    """The loss of samples in operations that know tangents, over all words."""

    def loss(samples: Sequence[Sample]) -> tuple[Tensor, dict[str, float]]:
        device = next(pair.student.parameters()).device
        batch = {n: v.to(device) for n, v in batch_of(samples, data.pad).items()}
        labels = labels_of(batch, data.first)
        inputs = {n: v for n, v in batch.items() if n != "labels"}
        used = labels != IGNORED
        log_q = pair.student(**inputs).logits[:, :-1][used].log_softmax(-1)
        if pair.teacher is None:
            return F.nll_loss(log_q, labels[used]), {}
        with torch.no_grad():
            log_p = pair.teacher(**inputs).logits[:, :-1][used].float().log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True), {}

    return loss


def _places(packed: Any, records: Mapping[str, Any], model: Any) -> list[Placement]:
    """Where the tensors that steps move stand in the model; UsageError for one that is fused."""
    parts = parts_of_base(records)
    where = locate_tensors(model, [part.name for part in parts])
    found = []
    for part in parts:
        place, record = where[part.name], records[part.name]
        if place.converter is not None or len(place.parameters) != 1:
            raise UsageError(
                part.name,
                "is fused with others when it is loaded",
                "a tensor that is a parameter by itself",
                "Train it with `ternarize train`",
            )
        if record.kernel:
            raise UsageError(
                part.name,
                "is a convolution",
                "linear layers and embeddings alone",
                "Train it with `ternarize train`",
            )
        stored = packed.read(part.name + SCALE_SUFFIX).view(part.scales_shape)
        found.append(
            Placement(part, place.parameters[0], stored, record.rotation, record.transposed)
        )
    return found


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
