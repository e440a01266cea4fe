"""Texts to train on, of any size: documents stream by and become samples.

A pass over a text is read in stretches of some megabytes, whose samples are shuffled; then the next
pass begins, with another shuffle. Several texts are mixed sample by sample, by their weights. All
of it depends on the seed alone, so a run that goes on skips the samples that it has had.
"""

import contextlib
import itertools
import os
import queue
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ternarize.calibrate.apart import Divided
from ternarize.calibrate.data import IDS
from ternarize.calibrate.samples import Cut, Finish, Sample
from ternarize.calibrate.texts import Document
from ternarize.errors import UsageError
from ternarize.threads import TICK

STRETCH = 1 << 22  # characters whose samples are shuffled together
APART = 1 << 16  # characters of documents kept apart that are cut together
AHEAD = 1024  # samples that are made before they are asked for
OTHER_TOKENS = 256  # that an image, or sound, counts for
IGNORED = -100  # a label that counts for nothing, as transformers has it


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
        if os.path.exists(os.path.expanduser(each)):
            name, share = each, 1.0
        if not 0 < share < float("inf"):
            raise UsageError(each, f"weight {weight}", "a number above 0", "Use FILE=0.5")
        found.append(Ingredient(name or each, share))
    return found


def training_samples(text: Divided, cut: Cut, finish: Finish, seed: int) -> Iterator[Sample]:
    """Samples without end, pass after pass, from the documents that train.

    Raises UsageError for a pass that makes none.
    """
    for number in itertools.count():
        rng = random.Random(f"ternarize {seed} {number}")
        any_sample = False
        for stretch in _stretches(text.part("train"), STRETCH):
            pieces = list(cut(stretch))
            rng.shuffle(pieces)
            for piece in pieces:
                any_sample = True
                yield finish(piece)
        if not any_sample:
            raise _too_little(text, "makes no sample to train on")


def kept_apart(
    text: Divided, part: str, cut: Cut, finish: Finish, count: int, length: int
) -> list[Sample]:
    """The first samples, of `length` tokens, of the documents that choose, or give the figures."""
    found: list[Sample] = []
    for stretch in _stretches(text.part(part), max(APART, 16 * length)):
        found += [finish(piece) for piece in cut(stretch)]
        if len(found) >= count:
            break
    if not found:
        raise _too_little(
            text, f"makes no sample of documents that are kept apart, one in {text.one_in}"
        )
    return found[:count]


def _too_little(text: Divided, found: str) -> UsageError:
    return UsageError(
        text.name,
        found,
        "samples to train on, others to choose the best state by, others for the figures",
        "Give more text, or use shorter samples (--train-len)",
    )


def _stretches(documents: Iterable[Document], most: int) -> Iterator[list[Document]]:
    """Documents in lists of about so many characters."""
    stretch: list[Document] = []
    size = 0
    for document in documents:
        stretch.append(document)
        size += len(document.text)
        if size >= most:
            yield stretch
            stretch, size = [], 0
    if stretch:
        yield stretch


def repeated(samples: Sequence[Sample], seed: int) -> Iterator[Sample]:
    """Samples over and over, in another order each time."""
    for number in itertools.count():
        order = list(samples)
        random.Random(f"ternarize {seed} {number}").shuffle(order)
        yield from order


def mixed(streams: Sequence[tuple[Iterator[Sample], float]], seed: int) -> Iterator[Sample]:
    """Samples of several streams, each as often as its weight says."""
    rng = random.Random(f"ternarize mixture {seed}")
    each = [stream for stream, _ in streams]
    weights = [weight for _, weight in streams]
    while True:
        yield next(rng.choices(each, weights)[0])


def next_samples(samples: Iterator[Sample], tokens: int) -> list[Sample]:
    """The next samples, as many as come to so many tokens."""
    taken: list[Sample] = []
    while sum(map(tokens_in, taken)) < tokens:
        taken.append(next(samples))
    return taken


@contextmanager
def ahead(samples: Iterator[Sample]) -> Iterator[Iterator[Sample]]:
    """Let a thread make the next samples while others are used: a GPU need not wait for words.

    What it raises is raised where the sample is asked for.
    """
    made: queue.Queue[Sample | BaseException] = queue.Queue(AHEAD)
    ended = threading.Event()

    def put(one: Sample | BaseException) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                return made.put(one, timeout=TICK)

    def make() -> None:
        try:
            for sample in samples:
                put(sample)
                if ended.is_set():
                    return
        except BaseException as error:  # of the user's text: for who asks for the sample
            put(error)

    def take() -> Iterator[Sample]:
        while True:
            one = made.get()
            if isinstance(one, BaseException):
                raise one
            yield one

    thread = threading.Thread(target=make, name="samples", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        ended.set()
        # one that is within torch when the interpreter ends aborts the process. A stretch of text
        # may take seconds: who interrupts does not wait for that
        thread.join(2 * TICK)


def tokens_in(sample: Sample) -> int:
    """Tokens that a sample counts for."""
    ids = sum(sample[name].numel() for name in IDS if name in sample)
    others = any(t.is_floating_point() for name, t in sample.items() if name not in IDS)
    return ids + OTHER_TOKENS * (others or not ids)


def learnt_in(sample: Sample) -> int:
    """Tokens that its loss is a mean over; without labels about those that it has."""
    if "labels" not in sample:
        return tokens_in(sample)
    return int((sample["labels"][1:] != IGNORED).sum())


def batch_of(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Samples stacked; those of different lengths filled up at the end, with an attention mask.

    pad  token id to fill up with
    """
    lengths = [len(sample.get("input_ids", ())) for sample in samples]
    if min(lengths) == max(lengths):
        return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    fill = {"input_ids": pad, "labels": IGNORED}
    batch = {}
    for name in samples[0]:
        rows = [s[name] for s in samples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, True, fill.get(name, 0))
    batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch
