"""Small models of every type that transformers has, by rules on the names of configuration entries.

A type's own default configuration is walked with all that is nested in it. What counts layers
becomes 2, or as many as it takes to have each kind of layer once; widths, heads, vocabularies,
experts, images and positions become small; special tokens come to lie inside the vocabulary. What a
rule on names cannot know, two numbers that have to fit together, shows as a model that cannot be
built or run. So there are several `STYLES`, from small to hardly reduced, tried in turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

VOCABULARY = 160
LARGEST = 50_000_000  # parameters; what has more is not built


@dataclass(frozen=True)
class Style:
    """How a configuration is reduced.

    divisor  of all widths, which keeps what they are to each other; 0: all widths the same
    image    also the sizes of images, frames and positions
    tokens   also vocabularies, and the numbers of special tokens
    layers   also the number of layers
    filled   entries that are None get a number, where their names say which
    """

    divisor: int
    image: bool = True
    tokens: bool = True
    layers: bool = True
    filled: bool = False

    def __str__(self) -> str:
        words = ["equal widths" if not self.divisor else f"widths / {self.divisor}"]
        words += [
            f"{what} as they are"
            for what, cut in (
                ("images", self.image),
                ("vocabularies", self.tokens),
                ("layers", self.layers),
            )
            if not cut
        ]
        return ", ".join([*words, *(["None filled in"] if self.filled else [])])


STYLES = (
    Style(0),
    Style(16),
    Style(0, filled=True),
    Style(16, image=False),
    Style(0, layers=False),
    Style(32),
    Style(8),
    Style(0, image=False),
    *(Style(divisor) for divisor in (4, 2, 1)),
    *(Style(divisor, image=False) for divisor in (8, 4, 1)),
    *(Style(8, layers=False), Style(8, filled=True)),
    *(Style(divisor, tokens=False) for divisor in (0, 8, 32)),
    *(Style(divisor, image=False, tokens=False, layers=False) for divisor in (0, 8, 32, 1)),
)

# ------------------------------------------------------------------------------- the rules on names

_LAYERS = re.compile(
    r"(^|_)(layers|blocks|block_repeats|depths?|n_layer|stage_num_blocks|numb_of_layers"
    r"|blocks_per_stage|num_block_repeats|block_sizes)$"
)
_NO_LAYERS = re.compile(r"max_window_layers|max_depth|^stage_light|num_adapter|feat_extract|lstm")
_INDICES = re.compile(
    r"(index|indexes|indices|idxs?|layer_ids?|hook_ids|_layers|attention_blocks|feature_layer)$"
)
_HEADS = re.compile(r"(^|_)n?_?(heads?|num_heads|attention_heads)$|heads_per_(stage|layer)$")
_NO_HEADS = re.compile(r"per_head|dim_head|d_head")
_HEAD_WIDTH = re.compile(r"head_dim$|d_kv$|kv_channels|dim_head$|d_head$|attention_head_size$")
_INNER = re.compile(r"intermediate|ffn|mlp_dim|d_ff|n_inner|inner_dim|feed_forward|hidden_dim_ffn")
_WIDTH = re.compile(
    r"hidden_size|hidden_dim|d_model|n_embd|embed|_dim$|^dim$|_dims?($|_)|width|channels?$|units$"
    r"|filters$|rank$|^upsample_groups$|hidden_sizes|proj_size|_size$|pos_feats|channels"
)
_NO_WIDTH = re.compile(
    r"(image|img|patch|kernel|vocab|window|codebook|batch|chunk|group|stride|tubelet|block|context"
    r"|grid|merge|beam|crop|prediction|feature|cache|^input|pool|buffer|memory_bank|subsample)s?_"
    r"(size|shape)|num_channels|^in_channels$|^out_channels$|audio_channels|patch_embed|embeddings|conv_.*dim$"
    r"|^channels$|kernel_dim|type_vocab|max_|temporal|query_dim|^scale|state_size|d_state"
)
_VOCABULARY = re.compile(
    r"(^|_)vocab_size(_|$)|^n_vocab|unpadded_vocab|_vocab$|^head_out_channels$"
)
_TOKEN = re.compile(r"token_(id|ids|index)$|^(bos|eos|pad|sep|cls|mask|unk)_(index|id)$")
_PLACEHOLDER = re.compile(r"^(image|audio|video)_token_(id|index)$")
_EXPERTS = re.compile(r"experts?(_num)?$")
_POSITIONS = re.compile(r"max_.*positions?(_embeddings)?$|n_positions|n_ctx|max_seq|max_sequence")
_WINDOW = re.compile(r"^(sliding_window|sliding_window_size|local_attention|window_length)$")

# (entries, at most): small counts
_COUNTS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"^index_topk$"), 16),
    (re.compile(r"experts_per_tok(en)?$|topk$|top_k$|^moe_k$|num_selected_experts|k_experts"), 2),
    (re.compile(r"^n_group$|^num_expert_group$|^(mamba_)?n_groups$"), 2),
    (re.compile(r"^topk_group$"), 1),
    (re.compile(r"shared_experts$"), 1),
    (re.compile(r"num_queries$|num_query_tokens$"), 16),
    (re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start"), 1),
    (re.compile(r"(_period|_interval|_frequency|_step|_every_n_layers|_sparse_step)$"), 2),
    (re.compile(r"_layer_offset$"), 1),
    (re.compile(r"num_kv_shared_layers"), 0),
)


def small(config: PretrainedConfig, style: Style) -> PretrainedConfig:
    """A reduced copy of a configuration, with all that is nested in it."""
    tokens = _Tokens()
    return _small(config, style, tokens)


class _Tokens:
    """The numbers of special tokens: inside the vocabulary, and different where they were."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}

    def __call__(self, value: int) -> int:
        if value < VOCABULARY // 2:
            return value
        return self.found.setdefault(value, VOCABULARY - 1 - len(self.found))


def _small(config: PretrainedConfig, style: Style, tokens: _Tokens) -> PretrainedConfig:
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    layers = _Layers(values if style.layers else {})
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, PretrainedConfig):
            changed[key] = _small(value, style, tokens)
        elif type(cut := layers.changed.get(key, value)) is int and key in layers.changed:
            changed[key] = cut
        elif (found := _reduced(key, cut, values, style, tokens)) != value:
            changed[key] = found
    _cut_sections(config, values, style, changed)
    return type(config)(**_as_arguments(config, changed))


def _as_arguments(config: PretrainedConfig, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Entries under the names that the class takes; what it works out itself is left to it."""
    known = getattr(type(config), "__dataclass_fields__", {})
    if not known:
        return dict(changed)
    stored_as = {stored: name for name, stored in type(config).attribute_map.items()}
    named = {key if key in known else stored_as.get(key, key): v for key, v in changed.items()}
    return {key: value for key, value in named.items() if key in known}


class _Layers:
    """Which layers stay: the first of each kind, and at least two."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.changed: dict[str, Any] = {}
        counts = {
            key: value
            for key, value in values.items()
            if type(value) is int
            and value > 2
            and _LAYERS.search(key)
            and not _NO_LAYERS.search(key)
        }
        for number in set(counts.values()):
            lists = {
                key: value
                for key, value in values.items()
                if isinstance(value, (list, tuple)) and len(value) == number
            }
            stay = _first_of_each([*zip(*map(_hashable, lists.values()), strict=True)], number)
            for key, value in lists.items():
                if not _is_indices(key, value):
                    self.changed[key] = type(value)(value[i] for i in stay)
            self.changed |= {key: len(stay) for key, n in counts.items() if n == number}


def _counts_layers(key: str) -> bool:
    return _LAYERS.search(key) is not None and not _NO_LAYERS.search(key)


def _hashable(values: Any) -> list[str]:
    return [repr(value) for value in values]


def _first_of_each(kinds: list[tuple[str, ...]], number: int) -> list[int]:
    """Places of the first of each kind in a list, at most six; of one kind the first two."""
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:6]
    return first if len(first) > 1 else list(range(min(2, number)))


def _is_indices(key: str, value: Any) -> bool:
    return _INDICES.search(key) is not None and all(type(each) is int for each in value)


def _reduced(key: str, value: Any, values: Mapping[str, Any], style: Style, tokens: _Tokens) -> Any:
    """An entry of a configuration, reduced by what it is called."""
    if value is None and _PLACEHOLDER.search(key):
        return tokens(VOCABULARY + len(key))
    if value is None and style.filled:
        return _filled(key)
    if isinstance(value, bool) or value is None or isinstance(value, (float, str)):
        return value
    if isinstance(value, (list, tuple)):
        if key == "cross_attention_layers" and style.layers:
            return [1]
        if _is_indices(key, value) and not _TOKEN.search(key) and style.layers:
            return type(value)(max(-2, min(each, i)) for i, each in enumerate(value))
        return type(value)(_reduced(key, each, values, style, tokens) for each in value)
    if not isinstance(value, int):
        return value
    for rule in (_reduced_token, _reduced_count, _reduced_image, _reduced_width):
        found = rule(key, value, values, style, tokens)
        if found is not None:
            return found
    return value


def _filled(key: str) -> Any:
    """Something for an entry that has nothing, by what it is called."""
    if key == "mlp_layer_types":
        return ["dense", "sparse"]
    if key == "layer_types":
        return ["full_attention", "full_attention"]
    if key == "prediction_length":
        return 8
    if key == "attn_layer_indices":
        return [1]
    known = ((_HEADS, 4), (_EXPERTS, 4), (_HEAD_WIDTH, 16), (_INNER, 96))
    text = ((_VOCABULARY, VOCABULARY), (re.compile("^(pad|mask)_token_id$"), 1))
    for pattern, number in (*_COUNTS, *known, *text):
        if pattern.search(key) and not key.startswith("output_"):
            return number
    return None


def _cut_sections(
    config: PretrainedConfig, values: Mapping[str, Any], style: Style, changed: dict[str, Any]
) -> None:
    """Rotary embeddings in time, height and width: each gets its share of a smaller head."""
    rope = values.get("rope_parameters")
    if rope is not None and "rope_type" not in rope:
        return
    if "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()):
        return
    parts = list((rope or {}).get("mrope_section") or (22, 22, 20))
    turned = float((rope or {}).get("partial_rotary_factor") or 1)
    total = int(8 * turned) if not style.divisor else sum(parts) // style.divisor
    changed["rope_parameters"] = {**(rope or {}), "mrope_section": _shares(parts, total)}


def _shares(parts: list[int], total: int) -> list[int]:
    """Whole numbers in about these proportions with this sum."""
    shares = [max(1, part * total // max(1, sum(parts))) for part in parts]
    shares[-1 if parts[0] == parts[1] else 0] += total - sum(shares)  # equal ones stay equal
    return shares


def _reduced_token(
    key: str, value: int, values: Mapping[str, Any], style: Style, tokens: _Tokens
) -> int | None:
    if _TOKEN.search(key):
        return tokens(value) if style.tokens else value
    if _VOCABULARY.search(key):
        return min(value, VOCABULARY) if style.tokens else value
    return None


def _reduced_count(
    key: str, value: int, values: Mapping[str, Any], style: Style, tokens: _Tokens
) -> int | None:
    for pattern, most in _COUNTS:
        if pattern.search(key):
            return min(value, most)
    if _EXPERTS.search(key):
        return min(value, 4)
    if _counts_layers(key):
        return min(value, 2) if style.layers else value
    if _INDICES.search(key) and style.layers:
        return max(-2, min(value, 1))
    if _HEADS.search(key) and not _NO_HEADS.search(key):
        return _heads(value, values) if not style.divisor else value
    return None


def _heads(value: int, values: Mapping[str, Any]) -> int:
    """4 heads, and 2 of what had fewer than another kind."""
    counts = [
        other
        for key, other in values.items()
        if type(other) is int and _HEADS.search(key) and not _NO_HEADS.search(key)
    ]
    return min(value, 4 if value == max(counts, default=value) else 2)


def _reduced_image(
    key: str, value: int, values: Mapping[str, Any], style: Style, tokens: _Tokens
) -> int | None:
    if _POSITIONS.search(key):
        return min(value, 256) if style.image else value
    if _WINDOW.search(key):
        return min(value, 16)
    if not style.image:
        return None
    if re.search(r"^(image|img|pretrain_image|input_image)_?size$", key):
        return min(value, _image(values))
    if re.search(r"^(mm_tokens_per_image|image_seq_length|num_image_tokens)$", key):
        return min(value, 16)
    if re.search(r"^max_source_positions$", key):
        return min(value, 32)
    return None


def _image(values: Mapping[str, Any]) -> int:
    """The side of an image: a multiple of four patches, at least 64."""
    patch = values.get("patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    patch = patch if type(patch) is int and patch > 0 else 16
    return patch * 4 * math.ceil(64 / (4 * patch))


def _reduced_width(
    key: str, value: int, values: Mapping[str, Any], style: Style, tokens: _Tokens
) -> int | None:
    head = _HEAD_WIDTH.search(key)
    inner = _INNER.search(key)
    if not (head or inner or _WIDTH.search(key)) or (_NO_WIDTH.search(key) and not head):
        return None
    if style.divisor:
        return value // style.divisor if value % style.divisor == 0 else value
    if head:
        return min(value, 8 if "rope" in key else 16 * _expansion(key, values))
    if "rank" in key:
        return min(value, 24)
    return min(value, 96 if inner else 64)


def _expansion(key: str, values: Mapping[str, Any]) -> int:
    """How much wider than the model a state space is, whose heads share that width."""
    expand = values.get("mamba_expand" if key.startswith("mamba") else "expand")
    return expand if type(expand) is int else 1


# ------------------------------------------------------------------------------------- the model


def default_config(model_type: str) -> PretrainedConfig:
    """The configuration that a type has when nothing is said."""
    config: PretrainedConfig = CONFIG_MAPPING[model_type]()
    return config


def build(cls: type[PreTrainedModel], config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model in float32 with random weights; ValueError where it is too large."""
    with torch.device("meta"), no_init_weights():
        skeleton = cls(config)
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters; at most {LARGEST} are built")
    torch.manual_seed(seed)
    built: Any = cls(config)  # whose `float` is not annotated
    model: PreTrainedModel = built.float()
    model.train(False)
    _randomise(model, seed)
    return model


def _randomise(model: nn.Module, seed: int) -> None:
    """Random everywhere, so that a tensor that is lost, or in a wrong place, shows.

    Some classes start from zeros and ones; statistics of norms are buffers that are saved. Matrices
    are scaled so that a signal comes through many layers.
    """
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    with torch.no_grad():
        for module in model.modules():
            convolution = isinstance(module, nn.modules.conv._ConvNd)
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator)
                    if parameter.ndim > 1:
                        inputs = parameter[0].numel() if convolution else parameter.shape[-1]
                        parameter.copy_(0.7 * noise / max(1, inputs) ** 0.5)
                    else:
                        parameter.add_(0.02 * noise)
        for name, buffer in model.named_buffers():
            if name in saved and buffer.dtype == torch.float32 and bool(buffer.isfinite().all()):
                noise = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(buffer * (1 + 0.01 * noise) + 0.001 * noise)
