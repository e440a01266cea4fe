"""What reading and writing GGUF share beside ggml.py: llama.cpp's names and numbers.

In the architecture `llama` the rows of q_proj and k_proj are in another order: transformers rotates
the first half of a head's features against the second, llama.cpp each even one against its odd
neighbour. Where transformers has a head's rows as (2, dim / 2), llama.cpp has them as (dim / 2, 2).
"""

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
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
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


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


# what a block's tensors are called: llama.cpp's name -> that of transformers
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SUB_NORM = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}


# {} is the number of an expert
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp and as transformers call it.

    name      llama.cpp's
    names     of the tensors of a block, beyond those that all have
    config    what its config.json says and its file does not
    permuted  rows of q_proj and k_proj are reordered in files
    int8      was trained with activations rounded to int8
    """

    name: str
    model_type: str
    model_class: str
    names: Mapping[str, str]
    config: Mapping[str, Any]
    permuted: bool = False
    int8: bool = False

    def to_transformers(self, name: str) -> tuple[str, str] | None:
        """The name of a tensor of a file in transformers, and what it is called in a block here.

        Of a stack of experts the name has {} for the number. None where it is not known.
        """
        match = re.fullmatch(r"(?:blk\.(\d{1,5})\.)?([a-z_]+)\.(weight|bias)", name)
        table = _TOP if match and match[1] is None else {**_IN_BLOCK, **self.names}
        if match is None or match[2] not in table:
            return None
        prefix = "" if match[1] is None else f"model.layers.{int(match[1])}."
        return f"{prefix}{table[match[2]]}.{match[3]}", match[2]

    def to_llama_cpp(self, name: str) -> str | None:
        """The inverse, of a name with {} for the number of an expert.

        Checkpoints of the model without its head leave "model." out.
        """
        match = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match is None:
            return None
        # Mixtral's experts have the names of all others, too
        tables = [_TOP] if match[1] is None else [_EXPERTS, _IN_BLOCK, self.names]
        found = {v.removeprefix("model."): k for table in tables for k, v in table.items()}
        prefix = "" if match[1] is None else f"blk.{match[1]}."
        ours = found.get(match[2])
        return None if ours is None else f"{prefix}{ours}.{match[3]}"


LLAMA = Architecture("llama", "llama", "LlamaForCausalLM", {}, {}, permuted=True)
MIXTRAL = Architecture("llama", "mixtral", "MixtralForCausalLM", _MIXTRAL, {}, permuted=True)
QWEN2 = Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", {}, {})
QWEN3 = Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", _QK_NORM, {})
QWEN2_MOE = Architecture(
    "qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", _EXPERTS | _SHARED, {"norm_topk_prob": False}
)
QWEN3_MOE = Architecture(
    "qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", _EXPERTS | _QK_NORM, {"norm_topk_prob": True}
)
# BitNet b1.58 2B4T; bitnet.cpp's converters call it bitnet-25, too
BITNET = Architecture(
    "bitnet-b1.58", "bitnet", "BitNetForCausalLM", _SUB_NORM, {"hidden_act": "relu2"}, int8=True
)


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
