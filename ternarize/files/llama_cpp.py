"""What reading and writing GGUF share beside ggml.py: llama.cpp's names and numbers.

In the architecture `llama` the rows of q_proj and k_proj are in another order: transformers rotates
the first half of a head's features against the second, llama.cpp each even one against its odd
neighbour. Where transformers has a head's rows as (2, dim / 2), llama.cpp has them as (dim / 2, 2).
"""

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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
# the same where a letter keeps its marks
_WORDS_WITH_MARKS = (
    _WORDS.format(digits="")
    .replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
    .replace(r"\s\p{L}", r"\s\p{L}\p{M}")
)


# llama.cpp's name -> the steps of the split, as tokenizers defines them
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES_SPLIT],
    "llama-bpe": [_regex_split(_WORDS.format(digits="{1,3}")), _BYTES],
    "qwen2": [_regex_split(_WORDS.format(digits="")), _BYTES],
    "qwen35": [_regex_split(_WORDS_WITH_MARKS), _BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES_SPLIT],
}


# those by which a word that is a token is not merged up from its letters
WHOLE_WORDS = ("llama-bpe",)
SPACE = "\u2581"
GOES_ON = "##"  # before pieces of WordPiece that begin no word; files have SPACE before the others
WORDS = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
WORDS_SPLIT = {"type": "BertPreTokenizer"}
PREPEND = [{"type": "Prepend", "prepend": SPACE}]
REPLACE = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
NO_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


# special tokens by kind of vocabulary: their keys in files, and what transformers calls them
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
SPECIALS = {
    "gpt2": _NAMES,
    "llama": _NAMES,
    "bert": {"bos": "cls", "seperator": "sep", "unknown": "unk", "padding": "pad", "mask": "mask"},
}
# and the numbers that llama.cpp takes where a file does not name them, in llama-vocab.cpp
USUAL = {
    "gpt2": {"bos": 11, "eos": 11},
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"bos": 101, "seperator": 102, "unknown": 100, "padding": 0, "mask": 103},
}
# names of gguf.PoolingType -> how sentence-transformers says it, in either of its ways
POOLING = {
    "MEAN": ("mean", "pooling_mode_mean_tokens"),
    "CLS": ("cls", "pooling_mode_cls_token"),
    "LAST": ("lasttoken", "pooling_mode_lasttoken"),
}


# what gguf's tables do not have of BitNet: our name -> llama.cpp's
_BITNET = {
    "lm_head": "output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}


_Asked = list[tuple[str, Any, tuple[Any, ...]]]  # (name, what it is, what it may be)


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp and as transformers call it.

    name        llama.cpp's
    config      what its config.json says and its file does not
    table       whose names of tensors it has in the package `gguf`; "": its own
    names       of tensors beyond those
    activation  of its feed-forward layers, as transformers calls it
    permuted    rows of q_proj and k_proj are reordered in files
    int8        was trained with activations rounded to int8
    shifted     files have the weights of norms with 1 added, as they are multiplied
    windows     every sixth layer sees all, others a window: of all others llama.cpp has no windows
    body        where transformers has its parts, and where in that its blocks
    learned     positions are a table and not rotated, norms subtract the mean (LayerNorm)
    turned      matrices of blocks are [in, out] in transformers (Conv1D), [out, in] in files
    encoder     a text is read in both directions, and comes out as embeddings: there is no head
    absent      pattern of the names of a checkpoint that files do not have
    bare        names of tensors that are no weight and no bias of a module
    linear      some layers have linear attention, a gated delta net
    """

    name: str
    model_type: str
    model_class: str
    config: Mapping[str, Any]
    table: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    activation: str = "silu"
    permuted: bool = False
    int8: bool = False
    shifted: bool = False
    windows: bool = False
    body: tuple[str, str] = ("model", "layers")
    learned: bool = False
    turned: bool = False
    encoder: bool = False
    absent: str = ""
    bare: Mapping[str, str] = field(default_factory=dict)
    linear: bool = False

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of a checkpoint has no place in a file, and is not missed there."""
        return re.fullmatch(self.absent, name) is not None

    def is_shifted(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is a norm's w where files have 1 + w."""
        gated = name.endswith(".linear_attn.norm.weight")  # which multiplies by w itself
        return self.shifted and name.endswith("norm.weight") and not gated

    def to_llama_cpp(self, name: str) -> str | None:
        """What a file calls a tensor of transformers, whose name has {} for the number of an
        expert; None where it has no such tensor.

        Checkpoints of the model without its head leave "model." out.
        """
        body, blocks = self.body
        place = rf"(?:(?:{_IN_COMPOSITE}|{body})\.)?(?:{blocks}\.(\d{{1,5}})\.)?"
        match = re.fullmatch(rf"{place}({'|'.join(map(re.escape, self.bare))})", name)
        if match is not None and match[1] and self.bare:
            return f"blk.{int(match[1])}.{self.bare[match[2]]}"
        match = re.fullmatch(rf"{place}(.+)\.(weight|bias)", name)
        if match is None:
            return None
        inner = match[2].replace(".{}.", ".")  # of all experts it is one tensor
        before = "" if match[1] is None else f"{blocks}.0."
        top = "" if self.encoder else f"{body}."  # encoders stand in the tables as they are saved
        ours = self.names.get(inner) or _in_table(self.table or self.name, top, before + inner)
        prefix = "" if match[1] is None else f"blk.{int(match[1])}."
        return None if ours is None else f"{prefix}{ours}.{match[3]}"

    def to_transformers(self, names: Iterable[str]) -> dict[str, str]:
        """What a file has of a checkpoint's tensors -> what transformers calls it.

        names  of all tensors of the checkpoint; of stacks of experts the name has {} for the number
        """
        whole = dict.fromkeys(re.sub(r"(\.experts\.)\d+\.", r"\1{}.", name) for name in names)
        found = {self.to_llama_cpp(name): name for name in whole}
        return {theirs: name for theirs, name in found.items() if theirs is not None}


# where a model of several modalities has its text model, as it was and is saved
_IN_COMPOSITE = r"model\.language_model|language_model\.model|language_model"
_TOWERS = r"(?:model\.)?(?:visual|vision_tower|multi_modal_projector)\..+"


@cache
def _in_table(architecture: str, top: str, name: str) -> str | None:
    """The name in llama.cpp of a module of transformers, by the table of the package `gguf`."""
    names = _table(architecture)
    found = names.get_name(top + name)
    if found is None and ".0." not in name:  # what stands in no block may stand beside the body
        found = names.get_name(name)
    return None if found is None else str(found).removeprefix("blk.0.")


@cache
def _table(architecture: str) -> Any:
    gguf = import_gguf()
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    return gguf.get_tensor_name_map(number, 1)


LLAMA = Architecture("llama", "llama", "LlamaForCausalLM", {}, permuted=True)
MIXTRAL = Architecture("llama", "mixtral", "MixtralForCausalLM", {}, permuted=True)
QWEN2 = Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", {})
QWEN3 = Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", {})
QWEN2_MOE = Architecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", {"norm_topk_prob": False})
QWEN3_MOE = Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", {"norm_topk_prob": True})
PHI3 = Architecture("phi3", "phi3", "Phi3ForCausalLM", {})
GEMMA3 = Architecture(
    "gemma3",
    "gemma3_text",
    "Gemma3ForCausalLM",
    {},
    activation="gelu_pytorch_tanh",
    shifted=True,
    windows=True,
    absent=_TOWERS,
)
GPT2 = Architecture(
    "gpt2",
    "gpt2",
    "GPT2LMHeadModel",
    {},
    activation="gelu_new",
    body=("transformer", "h"),
    learned=True,
    turned=True,
)
QWEN35 = Architecture(
    "qwen35",
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    {},
    shifted=True,
    absent=rf"mtp\..+|{_TOWERS}",
    bare={"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
    linear=True,
)
# encoders; the pooler behind the first token is no part of what llama.cpp computes
BERT = Architecture(
    "bert",
    "bert",
    "BertModel",
    {},
    activation="gelu",
    body=("bert", "encoder.layer"),
    learned=True,
    encoder=True,
    absent=r"(?:bert\.)?(?:pooler\..+|cls\..+|embeddings\.(?:position|token_type)_ids)",
)
# BitNet b1.58 2B4T; bitnet.cpp's converters call it bitnet-25, too
BITNET = Architecture(
    "bitnet-b1.58",
    "bitnet",
    "BitNetForCausalLM",
    {},
    table="bitnet",
    names=_BITNET,
    activation="relu2",
    int8=True,
)
# class of transformers -> its architecture, of which files are written
EXPORTED = {
    **{each.model_class: each for each in (LLAMA, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, PHI3, GEMMA3)},
    "MistralForCausalLM": LLAMA,
    QWEN35.model_class: QWEN35,
    # with other modalities, of which files have the text model
    "Gemma3ForConditionalGeneration": GEMMA3,
    "Qwen3_5ForConditionalGeneration": QWEN35,
    GPT2.model_class: GPT2,
    BERT.model_class: BERT,
}
FULL = 4  # of Qwen 3.5's layers, each fourth has full attention
MROPE_SECTIONS = (
    11,
    11,
    10,
)  # frequencies for time, height and width, where config.json does not say
WINDOWS = 6  # of Gemma 3's layers, each sixth sees all
LOCAL_BASE = 10000.0  # of the rope of its other layers, which files do not say
_SCALED_BY_WIDTH = 62  # layers of Gemma 3 27B, by which llama.cpp knows it


def gemma_scalar(config: Mapping[str, Any]) -> int:
    """query_pre_attn_scalar, whose root llama.cpp divides queries by: files do not say it."""
    if config["num_hidden_layers"] == _SCALED_BY_WIDTH:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def layer_types(layers: int, linear: bool) -> list[str]:
    """What of the text each layer of Gemma 3 sees, or of Qwen 3.5 (linear), in config.json."""
    every, others = (FULL, "linear_attention") if linear else (WINDOWS, "sliding_attention")
    return [others if (layer + 1) % every else "full_attention" for layer in range(layers)]


@dataclass(frozen=True)
class DeltaNet:
    """The heads of a gated delta net, and where files have them.

    keys    heads of keys, and of queries
    values  heads of values, so many for each of keys
    dim     features of a head, of either kind

    transformers has the heads of values that share a head of keys behind each other; files have the
    first of each head of keys, then the second of each (ggml repeats keys so).
    """

    keys: int
    values: int
    dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "DeltaNet":
        """From a config.json."""
        names = ("linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim")
        return cls(*(int(config[name]) for name in names))

    def order(self, part: str) -> tuple[Tensor | None, Tensor | None]:
        """Where the rows and the columns of a file's tensor blk.N.PART are in transformers.

        None: they are the same. A vector has rows.
        """
        if self.keys == self.values:
            return None, None
        heads = torch.arange(self.values).view(self.keys, -1).t().flatten()
        features = (heads[:, None] * self.dim + torch.arange(self.dim)).flatten()
        before = 2 * self.keys * self.dim  # queries and keys, which stay
        if part in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta"):
            return heads, None
        if part in ("attn_qkv", "ssm_conv1d"):
            return torch.cat([torch.arange(before), before + features]), None
        return (features if part == "attn_gate" else None), features if part == "ssm_out" else None


def gguf_part(name: str) -> str:
    """blk.3.attn_q.weight -> attn_q, and blk.3.ssm_a, which has no more to its name -> ssm_a."""
    return name.split(".")[2 if name.startswith("blk.") else 0]


def sections_take_turns(sections: Sequence[int]) -> bool:
    """Whether time, height and width have each third frequency, to the last: llama.cpp gives what
    is left over no position."""
    total = sum(sections)
    if len(sections) != 3 or min(sections) < 0:
        return False
    # the last frequency of each of the three
    return all(total - 1 - (total - 1 - k) % 3 < 3 * sections[k] for k in range(min(3, total)))


def departures(config: Any) -> list[str]:
    """What of a configuration llama.cpp does not compute, in words; none of a plain architecture.

    config  as transformers reads it, of a class that EXPORTED has
    """
    name = config.architectures[0]
    architecture, config = EXPORTED[name], config.get_text_config()
    if architecture.encoder:
        asked = _of_bert(config, architecture)
    elif architecture.learned:
        asked = _of_gpt2(config, architecture)
    else:
        asked = _of_llama(config, architecture, name)
    return [f"{key} {value!r}" for key, value, known in asked if value not in known]


def _of_gpt2(config: Any, architecture: Architecture) -> _Asked:
    """What llama.cpp takes for granted of GPT-2."""
    return [
        ("activation_function", config.activation_function, (architecture.activation,)),
        ("scale_attn_weights", config.scale_attn_weights, (True,)),
        ("scale_attn_by_inverse_layer_idx", config.scale_attn_by_inverse_layer_idx, (False,)),
        ("add_cross_attention", config.add_cross_attention, (False,)),
    ]


def _of_bert(config: Any, architecture: Architecture) -> _Asked:
    """What llama.cpp takes for granted of BERT."""
    positions = getattr(config, "position_embedding_type", "absolute")
    return [
        ("hidden_act", config.hidden_act, (architecture.activation,)),
        ("position_embedding_type", positions, ("absolute",)),
        ("is_decoder", config.is_decoder, (False,)),
        ("add_cross_attention", config.add_cross_attention, (False,)),
    ]


def _of_llama(config: Any, architecture: Architecture, name: str) -> _Asked:
    """What llama.cpp takes for granted of a decoder of LLaMA's kind."""
    # llama.cpp refuses a file of qwen3 that has these biases
    biased = name.startswith("Qwen3") and getattr(config, "attention_bias", False)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope = rope_of(config)
    return [
        ("hidden_act", activation, (architecture.activation,)),
        ("rope_type", rope.get("rope_type", "default"), ("default", "linear", "llama3")),
        *(_of_delta_net(config) if architecture.linear else _of_whole_heads(rope)),
        ("use_sliding_window", getattr(config, "use_sliding_window", False), (False, None)),
        ("attention_bias", biased, (False, None)),
        # of mixtures of experts: in every layer, with weights that sum to one
        ("norm_topk_prob", getattr(config, "norm_topk_prob", True), (True,)),
        ("decoder_sparse_step", getattr(config, "decoder_sparse_step", 1), (1,)),
        ("mlp_only_layers", getattr(config, "mlp_only_layers", None) or [], ([],)),
        *(_of_gemma(config) if architecture.windows else ()),
    ]


def _of_whole_heads(rope: Mapping[str, Any]) -> _Asked:
    return [("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))]


def _of_delta_net(config: Any) -> _Asked:
    """What llama.cpp takes for granted of Qwen 3.5."""
    values, keys = config.linear_value_head_dim, config.linear_key_head_dim
    sections = rope_of(config).get("mrope_section", MROPE_SECTIONS)
    return [
        ("layer_types", config.layer_types, (layer_types(config.num_hidden_layers, True),)),
        ("attention_bias", config.attention_bias, (False,)),
        ("linear_value_head_dim", values, (keys,)),
        ("mrope_section", sections, (sections,) if sections_take_turns(sections) else ()),
    ]


def _of_gemma(config: Any) -> _Asked:
    """What llama.cpp takes for granted of Gemma 3."""
    local = config.rope_parameters["sliding_attention"]
    scalar = gemma_scalar(config.to_dict())
    pattern = layer_types(config.num_hidden_layers, False)
    return [
        ("attention_bias", config.attention_bias, (False,)),
        ("layer_types", config.layer_types, (pattern,)),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, (scalar,)),
        ("rope_type of windows", local.get("rope_type", "default"), ("default",)),
        ("rope_theta of windows", local["rope_theta"], (LOCAL_BASE,)),
        ("attn_logit_softcapping", config.attn_logit_softcapping, (None,)),
        ("final_logit_softcapping", config.final_logit_softcapping, (None,)),
        ("use_bidirectional_attention", config.use_bidirectional_attention, (False,)),
    ]


def rope_of(config: Any) -> dict[str, Any]:
    """rope_parameters, of those layers that see all where layers differ."""
    rope: dict[str, Any] = config.rope_parameters
    rope = rope.get("full_attention", rope)
    return rope


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
