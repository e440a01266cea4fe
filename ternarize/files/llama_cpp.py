"""What reading and writing GGUF share beside ggml.py: llama.cpp's names and numbers."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UsageError

# types of tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_BYTES_SPLIT = {**_BYTES, "use_regex": True}


def _regex_split(pattern: str) -> dict[str, Any]:
    """The step that cuts text at a regular expression, as tokenizers defines it."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


# one pattern, but for the number of digits that stay together
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# llama.cpp's name -> the steps of the split, as tokenizers defines them
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES_SPLIT],
    "llama-bpe": [_regex_split(_WORDS.format(digits="{1,3}")), _BYTES],
    "qwen2": [_regex_split(_WORDS.format(digits="")), _BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES_SPLIT],
}


# those by which a word that is a token is not merged up from its letters
WHOLE_WORDS = ("llama-bpe",)
SPACE = "\u2581"
PREPEND = [{"type": "Prepend", "prepend": SPACE}]
REPLACE = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def import_gguf() -> Any:
    """The package `gguf`; UsageError where it is not installed."""
    try:
        module = importlib.import_module("gguf")
    except ImportError:
        raise UsageError(
            "gguf",
            "the package is not installed",
            "it for GGUF files",
            "Run pip install 'ternarize[gguf]'",
        ) from None
    return module


def rope_factors(rope: Mapping[str, Any], dim: int) -> Tensor | None:
    """What rope_type llama3 divides each frequency by, (dim / 2) float32; None for other types.

    With the wavelength w = 2 pi / frequency and the original context c: 1 where w < c / high,
    `factor` where w > c / low, and between them 1 / ((1 - s) / factor + s), s = (c / w - low) /
    (high - low).  Llama 3.1; transformers, modeling_rope_utils.py.
    """
    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.to(torch.float32)
