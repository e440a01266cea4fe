"""What a training is for: the loss of some samples, by kind of model and objective."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ternarize.calibrate.lanes import hidden_of, mask_of, tokens_of
from ternarize.calibrate.samples import Sample
from ternarize.models.skeleton import model_end
from ternarize.ranks import World
from ternarize.train.loop import Objective, in_parts
from ternarize.train.losses import Head, Words, choose_words, divergence, text_loss
from ternarize.train.students import Pair
from ternarize.train.texts import IGNORED, batch_of, learnt_in

# tokens at a time without gradients; looks of all micro-batches are over the same words so
_LOOKED_AT = 2048


def objective(
    pair: Pair, common: Tensor, first: int, seed: int, pad: int, sigma: float
) -> Objective:
    """The loss of samples, a mean over their tokens, to be trained with.

    common  word ids that every step looks at, beside its own
    first   position of a window whose token is the first to be predicted
    seed    of the words that are sampled: with the samples it decides them
    pad     token id that short samples are filled up with
    sigma   what `first_error` gives
    """
    if pair.heads is None:
        return lambda samples: (_whole(pair, batch_of(samples, pad), sigma), {})
    device = next(pair.student.parameters()).device

    def loss(samples: Sequence[Sample]) -> tuple[Tensor, dict[str, float]]:
        ids = torch.cat([sample["input_ids"] for sample in samples])
        own = zlib.crc32(ids.numpy().tobytes()) ^ seed  # a run that goes on samples the same
        generator = torch.Generator().manual_seed(own)
        named = torch.cat([ids, common]).to(device)
        words = choose_words(named, pair.vocabulary, generator)
        return _by_words(pair, samples, words, first, pad)

    return loss


def first_error(pair: Pair, samples: Sequence[Sample], pad: int) -> float:
    """The size of the error of outputs that are no words, at the start; 1 of all others."""
    if pair.heads is not None:
        return 1.0
    with torch.no_grad():
        errors = []
        for some in in_parts(samples, _LOOKED_AT):
            found, target = _outputs(pair, batch_of(some, pad))
            if found.shape[-1] == pair.vocabulary:
                return 1.0
            errors.append(float(F.mse_loss(found, target)))
    return max(1e-12, math.sqrt(sum(errors) / len(errors)))


def held_loss(loss: Objective, samples: Sequence[Sample], world: World | None = None) -> float:
    """The loss on held-out samples, without gradients; over the same words at every look.

    world  the processes that take their parts in turn, each of which calls this, and runs the
           models as often as the others: divided blocks come together in all of them
    """
    world = world or World()
    parts = list(in_parts(samples, _LOOKED_AT))
    counts = [sum(map(learnt_in, some)) for some in parts]
    turns = range(world.rank, -(-len(parts) // world.size) * world.size, world.size)
    with torch.no_grad():
        own = [float(loss(parts[at] if at < len(parts) else parts[0])[0]) for at in turns]
    each = world.all(own)
    total = 0.0
    for at, count in enumerate(counts):
        total += each[at % world.size][at // world.size] * count
    return total / max(1, sum(counts))


def _by_words(
    pair: Pair, samples: Sequence[Sample], words: Words, first: int, pad: int
) -> tuple[Tensor, dict[str, float]]:
    """The loss from hidden states, piece by piece."""
    assert pair.heads is not None
    batch = _moved(batch_of(samples, pad), pair)
    labels = labels_of(batch, first)
    used = labels != IGNORED
    hidden = pair.hidden(pair.student, batch)[:, :-1][used]
    heads: tuple[Head, Head] = (pair.heads[0].of(words), pair.heads[1].of(words))
    if pair.teacher is None:
        loss, same = text_loss(hidden, labels[used], heads[0], words, pair.dtype)
        return loss, {"right": float(same)}
    with torch.no_grad():
        target = pair.hidden(pair.teacher, batch)[:, :-1][used]
    loss, same = divergence(hidden, target, heads, words, pair.dtype, compiled=pair.compiled)
    return loss, {"top-1": float(same)}


def labels_of(batch: dict[str, Tensor], first: int) -> Tensor:
    """The next token of every position but the last, (batch, length - 1); IGNORED: not to learn."""
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    labels = labels[:, 1:].clone()
    labels[:, : first - 1] = IGNORED
    return labels


def _moved(batch: dict[str, Tensor], pair: Pair) -> dict[str, Tensor]:
    device = next(pair.student.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _outputs(pair: Pair, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of words, or else the first output, of student and teacher, (tokens, n) float32."""
    batch = _moved(batch, pair)

    def outputs(model: Any) -> Tensor:
        with pair.autocast():
            output = model(**batch)
        logits: Tensor | None = getattr(output, "logits", None)
        words = logits is not None and model_end(model, "head") is not None
        chosen = logits if words and logits is not None else hidden_of(output)
        return tokens_of(chosen, mask_of(batch)).float()

    with torch.no_grad():
        target = outputs(pair.teacher)
    return outputs(pair.student), target


def _whole(pair: Pair, batch: dict[str, Tensor], sigma: float) -> Tensor:
    """Of any other model: the divergence of its logits, or the error of its first output.

    sigma  by which the error is divided
    """
    found, target = _outputs(pair, batch)
    if found.shape[-1] == pair.vocabulary:
        log_q, log_p = found.log_softmax(-1), target.log_softmax(-1)
        each = log_p.exp() * (log_p - log_q)
        return each.where(log_p > -math.inf, 0).sum(-1).mean()
    return F.huber_loss(found / sigma, target / sigma, delta=1.0)
