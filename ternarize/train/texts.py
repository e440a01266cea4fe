"""Texts to train on, of any size: documents stream by and become samples.

A pass over a text is read in stretches of some megabytes, whose samples are shuffled; then the next
pass begins, with another shuffle. Several texts are mixed sample by sample, by their weights. All of
it depends on the seed alone, so a run that goes on skips the samples that it has had.

Documents are kept apart from the start: by SHA-256(document) one in 64 chooses between states
("held"), one in 64 gives the figures ("report"), the others train. A text of few documents is cut
at blank lines into sections first.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ternarize.calibrate.samples import Cut, Finish, Sample, sections
from ternarize.calibrate.texts import Document, open_texts
from ternarize.errors import UsageError

STRETCH = 1 << 22  # characters whose samples are shuffled together
_FEW = 256  # documents, below which a text is cut into sections
ONE_IN = 64  # documents that choose, and as many that give the figures
NO_END = 1 << 62  # characters of a Hub data set that may be read
IGNORED = -100  # a label that counts for nothing, as transformers has it

Documents = Callable[[], Iterator[Document]]  # one pass over a text


class Ingredient(NamedTuple):
    """A text to train on, and its weight in the mixture."""

    name: str
    weight: float


def read_mixture(given: Sequence[str]) -> list[Ingredient]:
    """`FILE` or `FILE=WEIGHT`, each; weights are shares of the samples, without one 1."""
    found = []
    for each in given:
        name, _, weight = each.rpartition("=")
        try:
            share = float(weight) if name else 1.0
        except ValueError:
            name, share = "", 1.0  # an = in the name of a file
        if not 0 < share < float("inf"):
            raise UsageError(each, f"weight {weight}", "a number above 0", "Use FILE=0.5")
        found.append(Ingredient(name or each, share))
    return found


def part_of(document: Document) -> str:
    """Which part of a text a document belongs to: "train", "held" or "report"."""
    digest = hashlib.sha256(document.text.encode()).digest()
    at = int.from_bytes(digest[:8], "big") % ONE_IN
    return {0: "held", 1: "report"}.get(at, "train")


def documents_of(name: str, column: str | None, seed: int, tokenizer: Any) -> Documents:
    """Passes over the documents of a text that are not empty, or of its sections if they are few."""

    def one_pass() -> Iterator[Document]:
        stream = open_texts(name, column, seed, tokenizer, NO_END).stream
        full = (document for document in stream if document.text.strip())
        first = list(itertools.islice(full, _FEW))
        if not first:
            raise UsageError(name, "has no text", "documents to train on", "Check the file")
        return itertools.chain(first, full) if len(first) == _FEW else iter(sections(first))

    return one_pass


def training_samples(
    documents: Documents, cut: Cut, finish: Finish, seed: int, name: str
) -> Iterator[Sample]:
    """Samples without end, pass after pass, from the documents that train."""
    for number in itertools.count():
        rng = random.Random(f"ternarize {seed} {number}")
        any_sample = False
        for stretch in _stretches(d for d in documents() if part_of(d) == "train"):
            pieces = list(cut(stretch))
            rng.shuffle(pieces)
            for piece in pieces:
                any_sample = True
                yield finish(piece)
        if not any_sample:
            raise UsageError(
                name, "makes no sample", "text for at least one", "Give more, or use --seq-len"
            )


def kept_apart(
    documents: Documents, part: str, cut: Cut, finish: Finish, count: int, name: str
) -> list[Sample]:
    """The first samples of the documents that choose, or that give the figures."""
    found: list[Sample] = []
    for stretch in _stretches(d for d in documents() if part_of(d) == part):
        found += [finish(piece) for piece in cut(stretch)]
        if len(found) >= count:
            break
    if not found:
        raise UsageError(
            name,
            f"makes no sample of documents that are kept apart, one in {ONE_IN}",
            "some, to choose the best state by and for the figures",
            "Give more text, or use shorter samples (--seq-len)",
        )
    return found[:count]


def _stretches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about STRETCH characters."""
    stretch: list[Document] = []
    size = 0
    for document in documents:
        stretch.append(document)
        size += len(document.text)
        if size >= STRETCH:
            yield stretch
            stretch, size = [], 0
    if stretch:
        yield stretch


def mixed(streams: Sequence[tuple[Iterator[Sample], float]], seed: int) -> Iterator[Sample]:
    """Samples of several streams, each as often as its weight says."""
    rng = random.Random(f"ternarize mixture {seed}")
    each = [stream for stream, _ in streams]
    weights = [weight for _, weight in streams]
    while True:
        yield next(rng.choices(each, weights)[0])


def tokens_in(sample: Sample) -> int:
    """Tokens that a sample counts for."""
    ids: Tensor | None = sample.get("input_ids")
    return 1 if ids is None else int(ids.numel())


def batch_of(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Samples stacked; those of different lengths filled up at the end, with an attention mask.

    pad  token id to fill up with
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    if all(len(sample["input_ids"]) == longest for sample in samples):
        return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    fill = {"input_ids": pad, "labels": IGNORED}
    batch = {}
    for name in samples[0]:
        rows = [s[name] for s in samples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, True, fill.get(name, 0))
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch
