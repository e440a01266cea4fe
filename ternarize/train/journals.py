"""A packed model trained by a journal of steps, on texts."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternarize.calibrate.samples import Sample
from ternarize.errors import UsageError
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.models.places import locate_tensors
from ternarize.models.reads import CAUSAL, kind_of, vocabulary_size
from ternarize.plans.recipe import Train
from ternarize.runtime.load import load
from ternarize.sources.packed import open_packed
from ternarize.steps.base import base_digest, opened_state, parts_of_base
from ternarize.steps.journal import Appender, Header, parse_journal
from ternarize.train.loop import Objective
from ternarize.train.moved import Moved, Place
from ternarize.train.objectives import held_loss, labels_of, objective
from ternarize.train.ranks import Ranks
from ternarize.train.sources import Data, data_of
from ternarize.train.students import Pair, fast_dtype, heads_of, open_model, teacher_folder, widen
from ternarize.train.texts import IGNORED, batch_of, tokens_in
from ternarize.train.votes import Heard, Votes, first_attempt, train_votes

SEED = 0  # of the perturbations, when none is asked for
_REMEMBERED = 64  # outputs of the teacher


@dataclass
class _Remembering(Pair):
    """A pair whose teacher's last outputs are kept: each candidate asks for them again."""

    known: dict[int, Tensor] = field(default_factory=dict)

    def hidden(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if model is not self.teacher:
            return super().hidden(model, batch)
        key = zlib.crc32(batch["input_ids"].cpu().numpy().tobytes())
        if key not in self.known:
            if len(self.known) >= _REMEMBERED:
                self.known.pop(next(iter(self.known)))
            self.known[key] = super().hidden(model, batch)
        return self.known[key]


def train_journal(
    base: str | Path,
    journal: str | Path,
    training: Train,
    votes: Votes,
    *,
    seed: int = SEED,
    device: str = "cpu",
    heard: Heard | None = None,
) -> dict[str, Any]:
    """Train a packed model by steps, which are appended to a journal; an old one goes on.

    base      packed checkpoint
    journal   file to write
    training  texts, objective, teacher, length and tokens of a batch, steps to try: `Train`
    votes     how steps are found
    seed      of the perturbations
    heard     told of each attempt

    Returns plain data: attempts, steps taken, the loss on held-out documents before and after.
    Raises UsageError where texts, teacher or base cannot be used, OutputError where the journal is
    another's.
    """
    ranks = Ranks(votes.exchange)
    packed, records = open_packed(base)
    header = Header(seed, base=base_digest(records))
    data = data_of(packed.directory, training)
    pair = _pair(packed.directory, training, device, plain=votes.probe == "jvp")
    state = opened_state(header, packed, records)
    moved = Moved(pair.student, _places(packed, records, pair.student), state)
    of_samples = objective(pair, data.common, data.first, training.seed, data.pad, 1.0)
    if votes.probe == "jvp":
        of_samples = _plain(pair, data)

    def loss(module: nn.Module, samples: list[Sample]) -> Tensor:
        return of_samples(samples)[0]

    def held() -> float:
        return held_loss(of_samples, data.report)

    assert training.steps is not None
    with ExitStack() as stack:
        # one process writes; the others get what is there from it
        appender = stack.enter_context(Appender(journal, header)) if not ranks.rank else None
        there = Path(journal).read_bytes() if appender else b""
        begun = parse_journal(ranks.firsts(there), str(journal))
        state.apply(begun.effective())
        moved.write()
        before = held()
        taken = train_votes(
            moved,
            loss,
            _sequence(_batches(data, training, first_attempt(begun), ranks)),
            begun,
            appender.append if appender else lambda *_: None,
            votes,
            training.steps,
            ranks=ranks,
            heard=heard,
        )
    return {
        "texts": data.about["texts"],
        "attempts": max(training.steps, first_attempt(begun)),
        "steps": len(begun.steps) + taken,
        "loss_before": before,
        "loss": held(),
        "sent_bytes": ranks.sent,
        **({"bytes": Path(journal).stat().st_size} if appender else {}),
    }


def _sequence(pairs: Iterator[Any]) -> Callable[[int], Any]:
    return lambda _: next(pairs)


def _pair(directory: Path, training: Train, device: str, *, plain: bool) -> _Remembering:
    """The packed model, dense, and what it learns from.

    plain  in operations that know tangents, which fast attention does not
    """
    dtype = fast_dtype(device)
    how = {"attn_implementation": "eager"} if plain else {}
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
    kind = kind_of(type(student), student.config)
    pair = _Remembering(student, teacher, kind, None, dtype, vocabulary_size(student.config) or 0)
    if kind == CAUSAL:
        pair.heads = heads_of(pair)
    return pair


def _plain(pair: Pair, data: Data) -> Objective:
    """The loss of samples in operations that know tangents, over all words."""

    def loss(samples: Sequence[Sample]) -> tuple[Tensor, dict[str, float]]:
        batch = batch_of(samples, data.pad)
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


def _places(packed: Any, records: Mapping[str, Any], model: Any) -> list[Place]:
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
        stored = packed.read(part.name + SCALE_SUFFIX).view(part.scales_shape)
        found.append(Place(part, place.parameters[0], stored, record.rotation, record.transposed))
    return found


def _batches(
    data: Data, training: Train, first: int, ranks: Ranks
) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """Batches of a process to probe and to decide, from the attempt on that comes first."""
    for number in itertools.count():
        for rank in range(ranks.count):
            pair = _taken(data.stream, training.batch), _taken(data.stream, training.batch)
            if number >= first and rank == ranks.rank:
                yield pair


def _taken(stream: Iterator[Sample], tokens: int) -> list[Sample]:
    taken: list[Sample] = []
    while sum(map(tokens_in, taken)) < tokens:
        taken.append(next(stream))
    return taken
