"""What is trained by steps: data, a model whose parameters follow values, and its losses."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternarize.calibrate.samples import Sample
from ternarize.errors import UsageError
from ternarize.files.metadata import Record
from ternarize.measure.measured import fast_dtype
from ternarize.models.places import locate_tensors
from ternarize.plans.recipe import Train
from ternarize.runtime.load import load
from ternarize.sources.packed import open_packed
from ternarize.steps.base import base_digest, opened_state, read_scales
from ternarize.steps.checkpoint import replay
from ternarize.steps.journal import JournalHeader, Step, journal_header
from ternarize.steps.replay import Part
from ternarize.train.loop import Objective
from ternarize.train.moved import MovedModule, Placement
from ternarize.train.objectives import held_loss, labels_of, objective
from ternarize.train.sources import Data, data_of
from ternarize.train.students import Pair, open_model, teacher_folder, widen
from ternarize.train.texts import IGNORED, batch_of

_REMEMBERED = 16  # outputs of the teacher
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


@dataclass
class Session:
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


def open_session(
    base: str | Path,
    training: Train,
    seed: int,
    device: str,
    *,
    plain: bool,
    start: JournalHeader | None = None,
) -> Session:
    """Data, model and values of a training by steps.

    base   packed checkpoint; of a model from its seed the folder with its tokenizer
    plain  in operations that know tangents
    start  header of a journal that is a model from its seed (`drawn_header`)

    Raises UsageError where texts, teacher or base cannot be used.
    """
    with ExitStack() as stack:
        if start is not None:  # as a packed checkpoint, for as long as it takes to load it
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="ternarize-start-")))
            (folder / "none.steps").write_bytes(journal_header(start))
            replay(folder / "none.steps", base, folder / "start")
            base = folder / "start"
        packed, records = open_packed(base)
        data = data_of(packed.directory, training)
        pair = _pair(packed.directory, training, device, plain=plain)
        header = start or JournalHeader(seed, base=base_digest(records))
        state = opened_state(header, packed, records)
        stored = {part.name: read_scales(header, packed, part) for part in state.parts}
    moved = MovedModule(pair.student, _places(state.parts, records, stored, pair.student), state)
    if plain:
        once = again = _plain(pair, data)
    else:
        how = data.common, data.first, training.seed, data.pad, 1.0
        # batches with gradients come once: kept, they would push out those that are asked for again
        once, again = objective(pair, *how), objective(_Remembering(**vars(pair)), *how)
    return Session(
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
    if training.objective == "text" and training.teacher is not None:
        found = f"{training.teacher}, which --objective text does not ask"
        raise UsageError("--teacher", found, "one of the two", "Leave one of them out")
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


def _places(
    parts: Sequence[Part], records: Mapping[str, Record], stored: Mapping[str, Tensor], model: Any
) -> list[Placement]:
    """Where the tensors that steps move stand in the model; UsageError for one that is fused."""
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
        turned = record.rotation, record.transposed
        found.append(Placement(part, place.parameters[0], stored[part.name], *turned))
    return found
