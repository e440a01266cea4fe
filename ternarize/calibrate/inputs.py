"""Samples that are not cut from documents: rows of tensors, and what the model itself writes.

A model that writes its own text ("self") is calibrated on the distribution that it will produce
when it is used, and needs no data: Data-Free QAT in LLM-QAT, section 2.1,
https://arxiv.org/abs/2305.17888. Half of these samples begin with what the tokenizer puts in front
of a text alone (with bos, where that is nothing), half with a random token behind it, without which
an instruction model opens all texts alike.

Models that read no text get rows of tensors from a .safetensors file, named as forward names them.
"""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ternarize.calibrate.samples import Sample, portion, wanted_sizes
from ternarize.calibrate.texts import SELF
from ternarize.errors import CheckpointError, UsageError, first_line
from ternarize.files.headers import byte_view
from ternarize.measure.documents import DEFAULT
from ternarize.models.reads import CAUSAL, arguments, check_room, frame, kind_of, vocabulary_size
from ternarize.plans.recipe import Calibrate

# generate(prompt (n, p) int64, length, generator) -> (n, length) int64, the prompt included
Generate = Callable[[Tensor, int, torch.Generator], Tensor]


# --- the model's own text -----------------------------------------------------------------------


def let_write(
    calibration: Calibrate,
    seq_len: int,
    config: Any,
    model_class: Any,
    tokenizer: Any | None,
    generate: Generate | None,
    batch_size: int,
) -> list[list[Sample]]:
    """Three sets of samples that the source model writes itself, each a document of its own.

    Raises UsageError for a model that writes none, or always the same; CheckpointError where its
    vocabulary has no word to begin with.
    """
    kind = kind_of(model_class, config)
    if kind != CAUSAL or not model_class.can_generate() or generate is None:
        raise UsageError(
            SELF,
            f"{model_class.__name__} ({kind}) writes no text of its own",
            "a causal language model with its output head",
            f"Name a text (--dataset), or use {DEFAULT}",
        )
    head = own_beginning(config, tokenizer)
    check_room(seq_len, head)
    ordinary = _ordinary_words(config, tokenizer, head)
    rng = random.Random(f"ternarize self {calibration.seed}")
    generator = torch.Generator().manual_seed(calibration.seed)
    rows: dict[tuple[int, ...], None] = {}  # equal ones once, so that the sets are apart
    total = sum(wanted_sizes(calibration.num_samples))
    for index, start in enumerate(range(0, total, batch_size)):
        count = min(batch_size, total - start)
        drawn = index % 2 == 0 or not head
        prompt = [head + ([rng.choice(ordinary)] if drawn else []) for _ in range(count)]
        ids = generate(torch.tensor(prompt), seq_len, generator).cpu()
        assert ids.shape == (count, seq_len) and ids.dtype == torch.int64, (ids.shape, ids.dtype)
        rows |= dict.fromkeys(map(tuple, ids.tolist()))
    written = list(rows)
    rng.shuffle(written)
    samples = iter([{"input_ids": torch.tensor(row)} for row in written])
    sizes = portion(len(written), calibration, "different texts were written by the model")
    return [[next(samples) for _ in range(size)] for size in sizes]


def own_beginning(config: Any, tokenizer: Any | None) -> list[int]:
    """What the model's own texts begin with: as windows do, or else bos, if there is one."""
    prefix = [] if tokenizer is None else frame(tokenizer).prefix
    known = tokenizer, config.get_text_config()
    bos = [getattr(each, "bos_token_id", None) for each in known]
    return prefix or [token for token in bos if token is not None][:1]


def _ordinary_words(config: Any, tokenizer: Any | None, head: list[int]) -> list[int]:
    """Token ids that a text may begin with, behind its head."""
    size = vocabulary_size(config) or 0
    special = set(head)
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        size = min(size, len(tokenizer)) if size else len(tokenizer)
    ordinary = [index for index in range(size) if index not in special]
    if not ordinary:
        raise CheckpointError(
            SELF,
            f"the model's vocabulary has {size} tokens, none of them ordinary",
            "words to begin with",
            "Name a text (--dataset)",
        )
    return ordinary


# --- tensors ------------------------------------------------------------------------------------


def read_tensors(calibration: Calibrate, model_class: Any) -> list[list[Sample]]:
    """Rows of the tensors of a safetensors file, drawn in the order of SHA-256(seed, row).

    Equal rows count once. Raises UsageError when the file cannot be read, or the model does not
    take its tensors, or a number in it is not finite.
    """
    path = Path(calibration.dataset).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            places: dict[bytes, int] = {}
            for index in range(_check_tensors(path, shapes, model_class)):
                sha = hashlib.sha256(f"{calibration.seed}\n".encode())
                for name, row in _row_of(slices, index).items():
                    if row.is_floating_point() and not row.isfinite().all():
                        raise UsageError(
                            path,
                            f"row {index} of {name} has NaN or infinite numbers, or such as "
                            "float32 does not hold",
                            "finite ones",
                            "Repair the data",
                        )
                    sha.update(byte_view(row[None]).numpy().tobytes())
                places.setdefault(sha.digest(), index)
            sizes = portion(len(places), calibration, "different rows")
            chosen = iter([places[key] for key in sorted(places)])
            return [[_row_of(slices, next(chosen)) for _ in range(size)] for size in sizes]
    except (SafetensorError, OSError) as error:
        raise UsageError(
            path,
            f"cannot be read as safetensors ({first_line(error)})",
            f"tensors named as {model_class.__name__}.forward names them",
            "Check the file",
        ) from None


def _row_of(slices: dict[str, Any], index: int) -> Sample:
    """A row of each tensor; floating-point ones in float32, in which models are calibrated."""
    rows = {name: part[index : index + 1][0] for name, part in slices.items()}
    return {n: row.float() if row.is_floating_point() else row for n, row in rows.items()}


def _check_tensors(path: Path, shapes: dict[str, tuple[int, ...]], model_class: Any) -> int:
    """The number of rows, the same in all tensors, which forward takes."""
    takes, model = arguments(model_class), model_class.__name__
    unknown = [name for name in shapes if name not in takes]
    if unknown or not shapes:
        raise UsageError(
            path,
            f"tensor {unknown[0]!r}" if unknown else "no tensors",
            f"arguments of {model}.forward ({', '.join(takes[:6])}, ...)",
            "Name the tensors so",
        )
    rows = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    few, many = min(rows, key=rows.__getitem__), max(rows, key=rows.__getitem__)
    if rows[few] != rows[many]:
        found = f"{rows[few]} rows in {few} and {rows[many]} in {many}"
        raise UsageError(path, found, "the same number, a row per sample", "Repair the data")
    decoder = ("decoder_input_ids", "decoder_inputs_embeds")
    if decoder[0] in takes and not any(name in shapes for name in decoder):
        raise UsageError(
            path,
            f"has {', '.join(shapes)}",
            f"decoder_input_ids too, which {model} needs for its decoder",
            "Add what it should write, behind its start token",
        )
    return rows[few]
