"""What a model reads: its kind, and the lengths and tokens of its texts; no weight is looked at.

A kind is told by the arguments of `forward`, not from a list of architectures. It says what one
input of the model looks like; what a model gives (words, a vector, classes) is another question.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError
from ternarize.models.configuration import usable

CAUSAL, ENCODER = "causal language model", "encoder"  # a text, read forwards or in both directions
ENCODER_DECODER = "encoder-decoder"  # a text, and what is to be written after it
TENSORS = "model of other inputs than text"
SPEECH = "speech recogniser"  # of those: one that writes what it hears
HEARD = ("input_features", "input_values")  # what transformers calls sound, before a model hears it

# What transformers calls a model's memory of a text: now, and before (that of state-space models)
CACHES = ("cache", "past_key_values", "cache_params")
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)


# --- kinds --------------------------------------------------------------------------------------


def kind_of(model_class: Any, config: Any) -> str:
    """CAUSAL, ENCODER, ENCODER_DECODER or TENSORS, whatever head the model has."""
    takes = arguments(model_class)
    if "input_ids" not in takes:
        return TENSORS
    if "decoder_input_ids" in takes:
        return ENCODER_DECODER
    cached = {*CACHES, "use_cache"} & set(takes)
    # GPT-NeoX says is_decoder=False and is a decoder: that a model generates tells more
    if model_class.can_generate() or (cached and looks_back(config)):
        return CAUSAL
    # CLIP and its kin compare two inputs and run on nothing less than both
    return TENSORS if hasattr(model_class, "get_text_features") else ENCODER


def hears(model_class: Any) -> bool:
    """Whether a model writes what it hears: its kind is TENSORS, and what it is a SPEECH."""
    takes = arguments(model_class)
    sound = model_class.main_input_name in HEARD and model_class.main_input_name in takes
    return bool(sound and "decoder_input_ids" in takes and model_class.can_generate())


def looks_back(config: Any) -> bool:
    """Whether a configuration leaves it open that a word sees only those before it."""
    return getattr(config.get_text_config(), "is_decoder", True) is not False


def arguments(model_class: Any) -> list[str]:
    """Names of the arguments of a model's forward."""
    return [name for name in inspect.signature(model_class.forward).parameters if name != "self"]


# --- lengths ------------------------------------------------------------------------------------


def max_positions(config: Any) -> int:
    """Positions that a model was made for; 2**30 where its configuration says no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit or 1 << 30


def longest_text(config: Any, tokenizer: Any) -> int:
    """Tokens of the longest text; RoBERTa has two positions more than that, the tokenizer knows."""
    return min(max_positions(config), int(tokenizer.model_max_length))


def check_seq_len(seq_len: int, limit: int) -> None:
    """Raise UsageError for samples of more tokens than a model has positions."""
    if seq_len > limit:
        expected = f"at most the model's {limit} positions"
        raise UsageError("sequence length", f"{seq_len}", expected, f"Use --seq-len {limit}")


def check_room(seq_len: int, prefix: Sequence[int]) -> None:
    """Raise UsageError for windows that have no room for more than what they begin with."""
    if seq_len <= len(prefix):
        raise UsageError(
            "sequence length",
            f"{seq_len}",
            f"more than the {len(prefix)} tokens that the tokenizer puts in front of a text",
            "Use a larger number (--seq-len)",
        )


# --- tokens -------------------------------------------------------------------------------------


def vocabulary_size(config: Any) -> int | None:
    """Words that a model knows; None where its configuration does not say."""
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size


def check_ids(rows: Sequence[Tensor], config: Any, where: object) -> None:
    """Raise CheckpointError for token ids (not empty, int64) that a model does not know."""
    size = vocabulary_size(config)
    if size is None or not rows:
        return
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if low < 0 or high >= size:
        raise CheckpointError(
            where,
            f"has tokens {low} to {high}",
            f"0 to {size - 1}, the model's vocabulary",
            "Use the tokenizer that belongs to the model",
        )


def has_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint has files of a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def no_tokenizer(where: object, found: str = "no tokenizer") -> CheckpointError:
    """The error of a checkpoint without one."""
    remedy = "Copy it from the source of the model"
    return CheckpointError(where, found, "tokenizer.json or the like", remedy)


def open_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a checkpoint; raises CheckpointError when it has none that can be used."""
    directory = Path(directory)
    with usable(directory / "tokenizer.json"):
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def encode_line(line: str, tokenizer: Any, length: int) -> list[int]:
    """Token ids of a text with the tokenizer's special tokens, cut to `length` of them in all."""
    ids: list[int] = tokenizer(line, truncation=True, max_length=length)["input_ids"]
    return ids


class Frame(NamedTuple):
    """The ids that a tokenizer itself puts before and behind a text."""

    prefix: list[int]
    suffix: list[int]


PROBES = ("a", "the", "1", ".")  # texts that hardly a tokenizer has no token for


def frame(tokenizer: Any) -> Frame:
    """What a tokenizer puts around a text: BERT's [CLS] and [SEP], Gemma's <bos> and nothing.

    It is told from what one gives for a short text with and without special tokens; where the text
    itself comes out in other tokens with them, from the mask that says which tokens are special.

    Raises CheckpointError where neither tells.
    """
    for probe in PROBES:
        bare = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        whole = tokenizer(probe, return_special_tokens_mask=True, verbose=False)
        full, mask = whole["input_ids"], whole["special_tokens_mask"]
        if bare == full:
            return Frame([], [])
        length = len(bare)
        places = [at for at in range(len(full)) if bare and full[at : at + length] == bare]
        if len(places) == 1:
            return Frame(full[: places[0]], full[places[0] + length :])
        text = [at for at, special in enumerate(mask) if not special]
        if bare and text and len(full) > len(text) == text[-1] - text[0] + 1:
            return Frame(full[: text[0]], full[text[-1] + 1 :])
    raise CheckpointError(
        type(tokenizer).__name__,
        f"gives {full} for {probe!r}, and {bare} without special tokens",
        "to see which of them it puts before a text and which behind",
        "Repair the tokenizer",
    )


def beginning(tokenizer: Any) -> list[int]:
    """What a document begins with: the tokenizer's prefix, or else bos, or eos without that."""
    prefix = frame(tokenizer).prefix
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return prefix or [token for token in (bos, eos) if token is not None][:1]


def names_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The tokens of some ids as the vocabulary writes them."""
    names: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    return names
