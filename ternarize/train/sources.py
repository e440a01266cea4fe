"""The samples of a training: where they come from, for each kind of model and text."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.calibrate.apart import divide_text
from ternarize.calibrate.data import IDS, digest_of
from ternarize.calibrate.pipeline import samples_of
from ternarize.calibrate.samples import Cut, Finish, Sample, cutter
from ternarize.calibrate.speech import LEFT_OUT
from ternarize.calibrate.texts import SELF, Document
from ternarize.errors import UsageError
from ternarize.measure.documents import cut as cut_ids
from ternarize.models.configuration import class_of, open_config
from ternarize.models.reads import (
    CAUSAL,
    TENSORS,
    beginning,
    check_ids,
    frame,
    has_tokenizer,
    kind_of,
    longest_text,
    max_positions,
    no_tokenizer,
    open_tokenizer,
    vocabulary_size,
)
from ternarize.plans.recipe import MAX_COUNT, Calibrate, Train
from ternarize.train.losses import ALL_WORDS
from ternarize.train.texts import (
    IGNORED,
    kept_apart,
    mixed,
    read_mixture,
    repeated,
    training_samples,
)

LENGTH = 256  # tokens of a sample, when none is asked for
HELD, REPORT = 32, 32  # samples that choose, and that give the figures
COMMON = 8192  # words that every step looks at: the most frequent of the first samples
COUNTED = 1 << 19  # tokens that they are counted in
FIRST = 64  # samples of each text by which a text that has changed is told


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


@dataclass
class _Reader:
    """How texts become samples of a model.

    tokenizer  None where it reads no text, or none is given
    length     tokens of a sample
    """

    directory: Path
    calibration: Calibrate | None
    training: Train
    config: Any
    kind: str
    tokenizer: Any
    length: int
    cut: Cut
    finish: Finish


def data_of(directory: Path, training: Train, calibration: Calibrate | None = None) -> Data:
    """The samples of a training.

    directory    of the model, with its configuration and tokenizer
    calibration  that comes before, whose data and windows are the default

    Raises UsageError where the texts cannot be read or do not fit the model, CheckpointError where
    it has no tokenizer, or one of other words.
    """
    given = list(training.texts) or ([calibration.dataset] if calibration else [])
    mixture = read_mixture(given)
    names_given = [each.name for each in mixture]
    reader = _reader_of(directory, training, calibration, names_given)
    streams, held, report, names, left_out = [], list[Sample](), list[Sample](), [], 0
    for name, weight in mixture:
        stream, choose, figures, called, without = _samples_of_text(reader, name, len(mixture))
        streams.append((stream, weight))
        held += choose
        report += figures
        left_out += without
        names.append(called if weight == 1 else f"{called}={weight:g}")
    looked_at = _put_back(streams, FIRST)
    about = {
        "texts": names,
        "length": reader.length or None,
        "held_samples": len(held),
        "report_samples": len(report),
        "digest": digest_of([held, report, looked_at]),
        **({LEFT_OUT: left_out} if left_out else {}),
    }
    prefix = frame(reader.tokenizer).prefix if reader.tokenizer is not None else []
    first = max(1, len(prefix)) if reader.kind == CAUSAL else 1
    pad = getattr(reader.tokenizer, "pad_token_id", None) or 0
    common = _common(streams, reader)
    return Data(mixed(streams, training.seed), held, report, common, first, pad, about)


def _reader_of(
    directory: Path, training: Train, calibration: Calibrate | None, names: Sequence[str]
) -> _Reader:
    config = open_config(directory)
    model_class = class_of(config)
    assert model_class is not None, "the plan has run its skeleton"
    kind = kind_of(model_class, config)
    if training.objective == "text" and kind != CAUSAL:
        raise UsageError(
            "--objective text", f"a {kind}", "a causal language model", "Use --objective distill"
        )
    if all(_in_rows(name, kind) for name in names):
        found = open_tokenizer(directory) if has_tokenizer(directory) else None
        length = training.train_len or 0
        given = directory, calibration, training
        return _Reader(*given, config, kind, found, length, lambda _: [], lambda _: {})
    if not has_tokenizer(directory):
        raise no_tokenizer(directory, "no tokenizer, without which text cannot be read")
    tokenizer = open_tokenizer(directory)
    limit = max_positions(config) if kind == CAUSAL else longest_text(config, tokenizer)
    length = training.train_len or (calibration and calibration.seq_len) or min(LENGTH, limit)
    if length > limit:
        raise UsageError(
            "--train-len",
            f"{length}",
            f"at most the model's {limit} positions",
            f"Use --train-len {limit}",
        )
    rng = random.Random(f"ternarize {training.seed} texts")
    cut, finish = cutter(kind, length, config, tokenizer, rng)
    if training.objective == "text":
        cut, finish = _with_answers(tokenizer, length)
    return _Reader(directory, calibration, training, config, kind, tokenizer, length, cut, finish)


def _in_rows(name: str, kind: str) -> bool:
    """Whether a data set is no text to be cut, but has samples as they are."""
    return name == SELF or Path(name).suffix == ".safetensors" or kind == TENSORS


def _samples_of_text(
    reader: _Reader, name: str, texts: int
) -> tuple[Iterator[Sample], list[Sample], list[Sample], str, int]:
    """Samples without end, those that choose, those that give the figures; the text's name.

    And how many windows of speech are left out.
    """
    training = reader.training
    if _in_rows(name, reader.kind):
        (train, held, report), left_out = _rows(reader, name)
        return repeated(train, training.seed), held, report, Path(name).name, left_out

    def finish(piece: Any) -> Sample:
        sample = reader.finish(piece)
        check_ids([sample[n] for n in IDS if n in sample], reader.config, name)
        return sample

    text = divide_text(name, training.text_column, training.seed, reader.tokenizer)
    held, report = (
        kept_apart(text, part, reader.cut, finish, -(-count // texts), reader.length)
        for part, count in (("held", HELD), ("report", REPORT))
    )
    return training_samples(text, reader.cut, finish, training.seed), held, report, text.name, 0


def _rows(reader: _Reader, name: str) -> tuple[list[list[Sample]], int]:
    """Three sets of samples as they are: tensors of a file, or what the model itself writes.

    And how many windows of speech are left out.

    All rows of a file train but those few that choose, and that give the figures: the last of their
    order, of which a calibration, which takes fewer, has the first.
    """
    calibration = reader.calibration or Calibrate(seed=reader.training.seed)
    length = reader.length or calibration.seq_len
    own = replace(calibration, dataset=name, text_column=None, seq_len=length)
    if name != SELF:
        own = replace(own, num_samples=MAX_COUNT)
    samples = samples_of(reader.directory, own, trained=True)
    train, held, report = (
        [
            {name: value[row] for name, value in batch.items()}
            for batch in batches
            for row in range(len(next(iter(batch.values()))))
        ]
        for batches in (samples.batches, samples.heldout, samples.report)
    )
    sets = [[*train, *held[:-HELD], *report[:-REPORT]], held[-HELD:], report[-REPORT:]]
    return sets, samples.description.get(LEFT_OUT, 0)


def _put_back(streams: list[tuple[Iterator[Sample], float]], count: int) -> list[Sample]:
    """The first samples of each stream, which are put back."""
    found: list[Sample] = []
    for at, (stream, weight) in enumerate(streams):
        first = list(itertools.islice(stream, count))
        streams[at] = (itertools.chain(first, stream), weight)
        found += first
    return found


def _common(streams: list[tuple[Iterator[Sample], float]], reader: _Reader) -> Tensor:
    """The most frequent words of the first samples of each text; none of a small vocabulary."""
    size = vocabulary_size(reader.config) or 0
    if reader.kind != CAUSAL or size <= ALL_WORDS:
        return torch.zeros(0, dtype=torch.int64)
    counts = torch.zeros(size, dtype=torch.int64)
    for sample in _put_back(streams, max(1, COUNTED // max(1, reader.length or LENGTH))):
        counts += torch.bincount(sample["input_ids"].flatten(), minlength=size)
    return counts.topk(min(COMMON, size)).indices


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
