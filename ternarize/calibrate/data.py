"""The samples on which a model is calibrated, from a file, the Hub, or the model itself.

They are in three sets, kept apart from the start (samples.py): `batches` make the statistics,
`heldout` choose between results, `report` give the figures that are printed. The same file, seed
and tokenizer give the same samples in any process.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ternarize.calibrate.apart import open_training_part
from ternarize.calibrate.inputs import Generate, let_write, own_beginning, read_tensors
from ternarize.calibrate.samples import Sample, cutter, divide
from ternarize.calibrate.speech import Ear, read_speech
from ternarize.calibrate.texts import SELF, check_no_column, open_texts, read_texts
from ternarize.errors import UsageError
from ternarize.files.headers import byte_view
from ternarize.measure.documents import DEFAULT
from ternarize.measure.encoders import pad
from ternarize.models.reads import (
    CAUSAL,
    ENCODER,
    TENSORS,
    arguments,
    check_ids,
    check_seq_len,
    frame,
    hears,
    kind_of,
    longest_text,
    max_positions,
    names_of,
    no_tokenizer,
)
from ternarize.plans.recipe import Calibrate

MAX_SEQ_LEN = 512  # when none is asked for
IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Samples:
    """Three sets of batches, each batch the keyword arguments of one call of `forward`.

    batches      samples that calibrate
    heldout      samples of other documents, a tenth as many, to choose by
    report       samples of again other documents, for the final figures
    first        position of a window, from 0, whose token is the first that counts as predicted
    tokens       token ids in `batches`, padding not counted; 0 where the model reads no tokens
    digest       SHA-256 over the samples of all three sets, hex; not over their batching
    description  plain data for ternarize.json
    """

    batches: list[dict[str, Tensor]]
    heldout: list[dict[str, Tensor]]
    report: list[dict[str, Tensor]]
    first: int
    tokens: int
    digest: str
    description: dict[str, Any]


class _Found(NamedTuple):
    """Samples that have been chosen, and what is to be said of them.

    prefix  tokens that windows begin with
    padded  samples are of different lengths, and filled up in a batch
    more    of the description
    """

    sets: list[list[Sample]]
    name: str
    seq_len: int | None
    prefix: list[int]
    padded: bool
    notes: list[str]
    more: dict[str, Any]


def read(
    calibration: Calibrate,
    *,
    config: Any,
    model_class: Any,
    tokenizer: Any | None,
    generate: Generate | None,
    ear: Ear | None = None,
    batch_size: int,
    trained: bool = False,
) -> Samples:
    """Read, choose, cut and batch the samples to calibrate on.

    calibration  dataset, num_samples, seq_len, seed and text_column count here
    config       of the model, a PretrainedConfig
    model_class  whose `forward` will be called
    tokenizer    of the model; None where it has none
    generate     samples from the source model at temperature 1, for "self":
                 (prompt (n, p) int64, length, generator) -> (n, length) int64, prompt included
    ear          the source that hears a folder of audio files; None of any other data set
    batch_size   samples of a batch
    trained      a training follows: documents that it keeps apart are left out

    Returns Samples, on CPU. With too little text for `num_samples` they are fewer, which
    description["notes"] says.

    Raises UsageError when the data cannot be read, do not fit the model, make fewer than 4 samples
    beside one held out and one reported on, or none with words in one of the sets; CheckpointError
    when the tokenizer is missing or is not the model's.
    """
    assert batch_size > 0
    rng = random.Random(f"ternarize {calibration.seed}")
    if Path(calibration.dataset).suffix == ".safetensors":
        found = _from_tensors(calibration, model_class)
    elif ear is not None:
        found = _from_speech(calibration, ear, rng)
    elif kind_of(model_class, config) == TENSORS:
        raise _reads_no_text(calibration.dataset, model_class)
    elif calibration.dataset == SELF:
        found = _from_model(calibration, config, model_class, tokenizer, generate, batch_size)
    else:
        found = _from_text(calibration, config, model_class, tokenizer, rng, trained)
    ids = [[t for n, t in sample.items() if n in IDS] for each in found.sets for sample in each]
    check_ids([t for row in ids for t in row if t.numel()], config, calibration.dataset)
    begun = kind_of(model_class, config) == CAUSAL or ear is not None
    first = max(1, len(found.prefix)) if begun else 1
    if model_class.can_generate():
        _check_words(found.sets, first, calibration.dataset)
    padder = tokenizer if found.padded else None
    batches, heldout, report = (_batch(each, batch_size, padder, rng) for each in found.sets)
    tokens = sum(map(_tokens_of, found.sets[0]))
    digest = digest_of(found.sets)
    description = _describe(calibration, found, tokens, digest, tokenizer)
    return Samples(batches, heldout, report, first, tokens, digest, description)


def _from_tensors(calibration: Calibrate, model_class: Any) -> _Found:
    check_no_column(calibration.text_column, calibration.dataset)
    sets = read_tensors(calibration, model_class)
    return _Found(sets, Path(calibration.dataset).name, None, [], False, [], {})


def _from_speech(calibration: Calibrate, ear: Ear, rng: random.Random) -> _Found:
    check_no_column(calibration.text_column, calibration.dataset)
    if calibration.seq_len is not None:
        raise UsageError(
            "length of samples",
            f"{calibration.seq_len} tokens, and {calibration.dataset} is a folder of speech",
            "none: of speech it is what the model hears at a time",
            "Leave out --seq-len and --train-len",
        )
    heard = read_speech(calibration, ear, rng)
    name = Path(calibration.dataset).expanduser().resolve().name
    return _Found(heard.sets, name, heard.length, heard.starts, False, heard.notes, heard.more)


def _check_words(sets: Sequence[Sequence[Sample]], first: int, dataset: str) -> None:
    """Raise UsageError where in a set nothing follows what all samples begin with."""

    def empty(sample: Sample) -> bool:
        ids = sample.get("decoder_input_ids", sample.get("input_ids"))
        mask = sample.get("decoder_attention_mask")
        return ids is not None and (ids.numel() if mask is None else int(mask.sum())) <= first

    for samples, use in zip(sets, ("to calibrate on", "held out", "to report on"), strict=True):
        if all(map(empty, samples)):
            count = f"{len(samples)} sample{'s' if len(samples) > 1 else ''}"
            raise UsageError(
                dataset,
                f"the {count} {use} have no words",
                "words in at least one of them",
                "Take more samples (--num-samples), or leave out what is silent",
            )


def _tokens_of(sample: Sample) -> int:
    """Token ids of a sample, without those that only fill it up."""
    if "decoder_attention_mask" in sample:
        return int(sample["decoder_attention_mask"].sum())
    return sum(sample[name].numel() for name in IDS if name in sample)


def _reads_no_text(dataset: str, model_class: Any) -> UsageError:
    names = ", ".join(arguments(model_class)[:4])
    reads_none = f"{model_class.__name__} does not read text alone"
    there = dataset in (DEFAULT, SELF) or Path(dataset).expanduser().exists()
    return UsageError(
        dataset,
        reads_none if there else f"no file or folder has this name, and {reads_none}",
        f"a .safetensors file with tensors named as its forward names them ({names}, ...), a "
        f"sample per row{', or a folder of audio files' if hears(model_class) else ''}",
        "Make one",
    )


def _from_model(
    calibration: Calibrate,
    config: Any,
    model_class: Any,
    tokenizer: Any | None,
    generate: Generate | None,
    batch_size: int,
) -> _Found:
    check_no_column(calibration.text_column, SELF)
    seq_len = _seq_len(calibration, kind_of(model_class, config), config, tokenizer)
    sets = let_write(calibration, seq_len, config, model_class, tokenizer, generate, batch_size)
    return _Found(sets, SELF, seq_len, own_beginning(config, tokenizer), False, [], {})


def _from_text(
    calibration: Calibrate,
    config: Any,
    model_class: Any,
    tokenizer: Any,
    rng: random.Random,
    trained: bool,
) -> _Found:
    if tokenizer is None:
        found = f"{model_class.__name__} has no tokenizer, without which text cannot be read"
        raise no_tokenizer(calibration.dataset, found)
    kind = kind_of(model_class, config)
    seq_len = _seq_len(calibration, kind, config, tokenizer)
    open_them = open_training_part if trained else open_texts
    texts = read_texts(calibration, seq_len, tokenizer, open_them)
    cut, finish = cutter(kind, seq_len, config, tokenizer, rng)
    sets, notes = divide(calibration, texts.documents, seq_len, cut, finish, rng)
    files = {"files": texts.files} if texts.files else {}
    more = {**files, "documents": len(texts.documents)}
    prefix, padded = frame(tokenizer).prefix, kind == ENCODER
    return _Found(sets, texts.name, seq_len, prefix, padded, texts.notes + notes, more)


def _seq_len(calibration: Calibrate, kind: str, config: Any, tokenizer: Any | None) -> int:
    """Tokens of a sample; raises UsageError when more are asked for than the model can take."""
    limit = max_positions(config)
    if kind != CAUSAL and tokenizer is not None:
        limit = longest_text(config, tokenizer)
    if calibration.seq_len is None:
        return min(MAX_SEQ_LEN, limit)
    check_seq_len(calibration.seq_len, limit)
    return calibration.seq_len


def _describe(
    calibration: Calibrate, found: _Found, tokens: int, digest: str, tokenizer: Any | None
) -> dict[str, Any]:
    """The samples in plain data, for ternarize.json."""
    made, chosen, reported = map(len, found.sets)
    notes, prefix = found.notes, found.prefix
    if made < calibration.num_samples:
        notes = [
            *notes,
            f"{calibration.num_samples} samples were asked for; the data make {made} to calibrate "
            f"on, {chosen} to choose by and {reported} to report on",
        ]
    return {
        "dataset": found.name,
        **found.more,
        "samples": made,
        "heldout_samples": chosen,
        "report_samples": reported,
        "tokens": tokens,
        "seq_len": found.seq_len,
        "windows_begin_with": prefix if tokenizer is None else names_of(prefix, tokenizer),
        "seed": calibration.seed,
        "text_column": calibration.text_column,
        "digest": digest,
        "notes": notes,
    }


def _batch(
    samples: Sequence[Sample], batch_size: int, tokenizer: Any | None, rng: random.Random
) -> list[dict[str, Tensor]]:
    """Samples in batches: as they are, or sorted by length and padded, with an attention mask.

    tokenizer  of samples of different lengths, else None
    """
    if tokenizer is not None:  # alike lengths together; then batches in random order
        samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    parts = [samples[at : at + batch_size] for at in range(0, len(samples), batch_size)]
    if tokenizer is None:
        return [{name: torch.stack([s[name] for s in part]) for name in part[0]} for part in parts]
    rng.shuffle(parts)
    padded = (pad([s["input_ids"].tolist() for s in part], tokenizer) for part in parts)
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in padded]


def digest_of(sets: Sequence[Sequence[Sample]]) -> str:
    """SHA-256 over samples and the sizes of their sets, hex."""
    sha = hashlib.sha256()
    for samples in sets:
        sha.update(f"{len(samples)} samples\n".encode())
        for sample in samples:
            for name, tensor in sorted(sample.items()):
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(byte_view(tensor).numpy().tobytes())
    return sha.hexdigest()
