"""The samples of a training: where they come from, for each kind of model and text."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.calibrate.pipeline import samples_of
from ternarize.calibrate.samples import Cut, Finish, Sample, cutter
from ternarize.calibrate.texts import SELF, Document
from ternarize.errors import UsageError
from ternarize.measure.documents import cut as cut_ids
from ternarize.models.reads import (
    CAUSAL,
    TENSORS,
    beginning,
    check_seq_len,
    frame,
    has_tokenizer,
    kind_of,
    longest_text,
    max_positions,
    no_tokenizer,
    open_tokenizer,
)
from ternarize.plans.layout import Plan
from ternarize.plans.recipe import Train
from ternarize.train.texts import (
    IGNORED,
    documents_of,
    kept_apart,
    mixed,
    read_mixture,
    training_samples,
)

LENGTH = 256  # tokens of a sample, when none is asked for
HELD, REPORT = 32, 32  # samples that choose, and that give the figures
COMMON = 8192  # words that every step looks at: the most frequent of the first samples
LOOKED_AT = 2048  # samples that they are counted in


@dataclass
class Data:
    """What a model is trained on.

    stream  samples without end
    held    that choose; report: that give the figures
    common  word ids that are frequent, int64
    first   position of a window whose token is the first to be predicted
    pad     token id that short samples are filled up with
    about   plain data for the record
    """

    stream: Iterator[Sample]
    held: list[Sample]
    report: list[Sample]
    common: Tensor
    first: int
    pad: int
    about: dict[str, Any]


def data_of(plan: Plan, training: Train, config: Any, model_class: Any) -> Data:
    """The samples of a training.

    Raises UsageError where the texts cannot be read or do not fit the model, CheckpointError where
    it has no tokenizer.
    """
    calibration = plan.recipe.calibrate
    given = list(training.texts) or ([calibration.dataset] if calibration else [])
    if not given:
        raise UsageError("training", "no text", "some to train on", "Name one with --texts")
    kind, directory = kind_of(model_class, config), plan.source.directory
    alone = given == [SELF] or Path(given[0]).suffix == ".safetensors" or kind == TENSORS
    if alone:
        return _of_samples(plan, given)
    if not has_tokenizer(directory):
        raise no_tokenizer(directory, "no tokenizer, without which text cannot be read")
    tokenizer = open_tokenizer(directory)
    limit = max_positions(config) if kind == CAUSAL else longest_text(config, tokenizer)
    length = training.train_len or min(LENGTH, limit)
    check_seq_len(length, limit)
    seed = calibration.seed if calibration else 0
    column = calibration.text_column if calibration else None
    rng = random.Random(f"ternarize {seed} texts")
    cut, finish = cutter(kind, length, config, tokenizer, rng)
    if training.objective == "text":
        if kind != CAUSAL:
            raise UsageError(
                "--objective text",
                f"a model that is {kind}",
                "a causal language model",
                "Use --objective distill",
            )
        cut, finish = _with_answers(tokenizer, length)
    streams, held, report = [], list[Sample](), list[Sample]()
    mixture = read_mixture(given)
    for name, weight in mixture:
        documents = documents_of(name, column, seed, tokenizer)
        samples = (documents, cut, finish)
        streams.append((training_samples(*samples, seed, name), weight))
        held += kept_apart(documents, "held", cut, finish, -(-HELD // len(mixture)), name)
        report += kept_apart(documents, "report", cut, finish, -(-REPORT // len(mixture)), name)
    common = _common(streams, config, kind)
    about = {"texts": [Path(n).name if Path(n).exists() else n for n in given], "length": length}
    about |= {"held_samples": len(held), "report_samples": len(report)}
    first = max(1, len(frame(tokenizer).prefix)) if kind == CAUSAL else 1
    pad = tokenizer.pad_token_id or 0
    return Data(mixed(streams, seed), held, report, common, first, pad, about)


def _common(streams: list[tuple[Iterator[Sample], float]], config: Any, kind: str) -> Tensor:
    """The most frequent words of the first samples of each text, which are put back."""
    size = getattr(config.get_text_config(), "vocab_size", 0) or 0
    counts = torch.zeros(size, dtype=torch.int64)
    for at, (stream, weight) in enumerate(streams):
        first = list(itertools.islice(stream, LOOKED_AT if kind == CAUSAL else 0))
        for sample in first:
            counts += torch.bincount(sample["input_ids"], minlength=size)
        streams[at] = (itertools.chain(first, stream), weight)
    return counts.topk(min(COMMON, size)).indices


def _of_samples(plan: Plan, given: Sequence[str]) -> Data:
    """The samples of a calibration, over and over: tensors, and what the model itself writes."""
    calibration = plan.recipe.calibrate
    if calibration is None or list(given) != [calibration.dataset]:
        raise UsageError(
            given[0],
            "to train on, with nothing calibrated on it",
            "the data set of the calibration",
            "Name it with --dataset alone",
        )
    samples = samples_of(plan, calibration)
    rows = {
        part: [
            {name: value[row] for name, value in batch.items()}
            for batch in batches
            for row in range(len(next(iter(batch.values()))))
        ]
        for part, batches in (
            ("train", samples.batches),
            ("held", samples.heldout),
            ("report", samples.report),
        )
    }

    def stream() -> Iterator[Sample]:
        for number in itertools.count():
            order = list(rows["train"])
            random.Random(f"ternarize {calibration.seed} {number}").shuffle(order)
            yield from order

    about = {"texts": [samples.description["dataset"]], "samples": len(rows["train"])}
    ids = [row["input_ids"].flatten() for row in rows["train"] if "input_ids" in row]
    common = torch.cat(ids).unique() if ids else torch.zeros(0, dtype=torch.int64)
    return Data(stream(), rows["held"], rows["report"], common, samples.first, 0, about)


def _with_answers(tokenizer: Any, length: int) -> tuple[Cut, Finish]:
    """Windows of joined documents, with labels: of a chat the answers alone are to be learnt.

    A token and whether it is learnt are cut as one number, id * 2 + learnt.
    """
    prefix = [2 * token for token in frame(tokenizer).prefix]

    def cut(documents: Sequence[Document]) -> list[list[int]]:
        row: list[int] = []
        for document in documents:
            row += [2 * token for token in beginning(tokenizer)] if document.begin else []
            row += _learnt(document, tokenizer)
        return cut_ids(row, prefix, length)

    def finish(row: list[int]) -> Sample:
        both = torch.tensor(row)
        return {"input_ids": both >> 1, "labels": torch.where(both & 1 == 1, both >> 1, IGNORED)}

    return cut, finish


def _learnt(document: Document, tokenizer: Any) -> list[int]:
    """Tokens of a document, each * 2 + whether it is to be learnt."""
    if document.answers is None:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        return [2 * token + 1 for token in ids]
    if not document.answers:
        raise UsageError(
            "a chat of the texts",
            f"no answer can be told apart in it ({document.text[:40]!r} ...)",
            "turns of an assistant, and a chat template that only adds to a chat when it goes on",
            "Repair the data, or train with --objective distill",
        )
    found: list[int] = []
    at = 0
    for start, stop in [*document.answers, (len(document.text), len(document.text))]:
        for text, learnt in ((document.text[at:start], 0), (document.text[start:stop], 1)):
            ids = (
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if text
                else []
            )
            found += [2 * token + learnt for token in ids]
        at = stop
    return found
