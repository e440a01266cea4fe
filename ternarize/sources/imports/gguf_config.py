"""config.json of a GGUF file, from its keys and from what its tensors are.

Every key of the architecture has to be known: what is not asked for here is refused, since a model
that leaves a rule out computes something else without a word.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ternarize.errors import CheckpointError
from ternarize.files.gguf import GgufTensor
from ternarize.files.llama_cpp import (
    BERT,
    BITNET,
    FULL,
    GEMMA3,
    GPT2,
    LLAMA,
    LOCAL_BASE,
    MIXTRAL,
    MROPE_SECTIONS,
    PHI3,
    POOLING,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    QWEN35,
    WINDOWS,
    Architecture,
    gemma_scalar,
    import_gguf,
    layer_types,
    rope_factors,
    sections_take_turns,
)

_KNOWN = (LLAMA, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, GEMMA3, PHI3, GPT2, QWEN35, BERT, BITNET)
ARCHITECTURES = {**{each.name: each for each in _KNOWN}, "bitnet-25": BITNET}
# keys of an architecture that say nothing about what the model computes, or what is known from the
# tensors
_IDLE = {
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "pooling_type",
    # transformers applies none of these windows unless a config.json asks for it
    "attention.sliding_window",
}
_WHOLE = ("attention.value_length", "rope.dimension_count")  # which are a head's features
# what GPT-2 and BERT call their sizes, the error of their norms and their activation
_LEARNED = {
    GPT2.name: (
        *("n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
        *("layer_norm_epsilon", "activation_function"),
    ),
    BERT.name: (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "layer_norm_eps", "hidden_act"),
    ),
}
Tensors = Mapping[str, GgufTensor]


def not_known(where: object, found: str, expected: str) -> CheckpointError:
    """The error for a file that says or has what this import does not know."""
    return CheckpointError(where, found, expected, "Take the model from its maker's checkpoint")


class _Keys:
    """Keys of the architecture, which remembers those that were asked for."""

    def __init__(self, where: str, architecture: str, keys: Mapping[str, Any]) -> None:
        self.where = where
        prefix = architecture + "."
        self.keys = {
            key[len(prefix) :]: value for key, value in keys.items() if key.startswith(prefix)
        }
        self.asked = set(_IDLE)

    def wrong(self, found: str, expected: str) -> CheckpointError:
        return not_known(self.where, found, expected)

    def get(self, key: str, default: Any, kind: type = int) -> Any:
        """A number, or the default where the file does not say."""
        self.asked.add(key)
        value = self.keys.get(key, default)
        if value is default:
            return value
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or (kind is not str and not 0 <= value < 2**31):
            raise self.wrong(f"{key} {str(value)!r:.40}", "one number of a usual size")
        return kind(value)

    def need(self, key: str, kind: type = int) -> Any:
        value = self.get(key, None, kind)
        if value is None:
            raise self.wrong(f"no {key}", "a file that says it")
        return value

    def take(self, key: str) -> Any:
        """A list of whole numbers, or None where the file has none."""
        self.asked.add(key)
        value = self.keys.get(key)
        whole = isinstance(value, np.ndarray) and value.dtype.kind in "iub"
        if value is not None and not whole:
            raise self.wrong(f"{key} {str(value)!r:.40}", "a list of whole numbers")
        return value

    def agreed(self, key: str, found: int) -> int:
        """A size that the tensors have; refused where the file says another."""
        said = self.get(key, None)
        if said and said != found:
            raise self.wrong(f"{found} features in its tensors", f"{said}, as its {key} says")
        return found

    def close(self) -> None:
        unknown = sorted(set(self.keys) - self.asked)
        if unknown:
            shown = str(self.keys[unknown[0]])
            raise self.wrong(f"{unknown[0]} {shown:.40}", "no such key for this architecture")


def gguf_config(
    where: str, keys: Mapping[str, Any], tensors: Tensors
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a file, and its config.json.

    where    the file, for errors
    keys     of the file
    tensors  of the file, by name

    Raises CheckpointError for an architecture, a key or a value that is not known here.
    """
    named = keys.get("general.architecture")
    if not isinstance(named, str) or named not in ARCHITECTURES:
        known = f"one of {', '.join(ARCHITECTURES)}"
        raise not_known(where, f"architecture {str(named)!r:.60}", known)
    lookup = _Keys(where, named, keys)
    arch = ARCHITECTURES[named]
    if arch is LLAMA and lookup.get("expert_count", 0):
        arch = MIXTRAL
    config = (_learned if arch.learned else _config)(lookup, arch, tensors, keys)
    if lookup.get("attention.causal", True, bool) == arch.encoder:
        raise lookup.wrong(
            f"attention.causal {str(arch.encoder).lower()}",
            "false, as of an encoder" if arch.encoder else "true, as of a model that writes text",
        )
    lookup.close()
    return arch, config


def _config(
    keys: _Keys, arch: Architecture, tensors: Tensors, common: Mapping[str, Any]
) -> dict[str, Any]:
    hidden, (layers, heads) = keys.need("embedding_length"), _blocks(keys, tensors)
    head_dim = keys.get("attention.key_length", hidden // heads)
    if not head_dim:
        raise keys.wrong(f"{heads} heads of no features", "heads of one feature or more")
    whole = ("attention.value_length",) if arch.linear else _WHOLE
    for key in whole:
        if keys.get(key, head_dim) != head_dim:
            raise keys.wrong(f"{key} {keys.keys[key]}", f"{head_dim}, as that of the keys")
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "vocab_size": _shape(keys, tensors, "token_embd.weight")[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": _short(keys.need("attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": arch.activation,
        **arch.config,
    }
    if arch in (QWEN2_MOE, PHI3):
        del config["head_dim"]
    config |= _feed_forward(keys, arch, tensors)
    if arch is LLAMA:
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    config["rope_parameters"] = _rope(keys, head_dim, tensors)
    if arch is GEMMA3:
        config |= _gemma(keys, config)
    if arch.linear:
        _add_delta_net(keys, config, tensors)
    config |= _special(common, config["vocab_size"])
    if arch is PHI3:
        config["sliding_window"] = keys.get("attention.sliding_window", 0) or None
        config.setdefault("pad_token_id", None)  # by default one of its own vocabulary
    dtype = tensors["token_embd.weight"].dtype or torch.float32
    if arch is GEMMA3 and dtype == torch.float16:
        dtype = torch.float32  # its activations go beyond float16; llama.cpp's are float32
    config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _special(common: Mapping[str, Any], vocabulary: int) -> dict[str, int]:
    """The numbers of the tokens that begin, end and fill texts."""
    found = {}
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = common.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(number) is int and number < vocabulary:
            found[f"{name}_token_id"] = number
    return found


def _blocks(keys: _Keys, tensors: Tensors) -> tuple[int, int]:
    """How many blocks there are, and heads in each."""
    layers, heads = keys.need("block_count"), keys.need("attention.head_count")
    if not 0 < layers <= len(tensors) or not heads:
        raise keys.wrong(f"{layers} blocks of {heads} heads", "as many as there are tensors")
    return layers, heads


def _learned(
    keys: _Keys, arch: Architecture, tensors: Tensors, common: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of GPT-2 or BERT, whose positions are a table, under its own names."""
    vocabulary, hidden = _shape(keys, tensors, "token_embd.weight")
    features = _shape(keys, tensors, "blk.0.ffn_up.weight")[0]
    positions = _shape(keys, tensors, "position_embd.weight")[0]
    values = (
        keys.agreed("embedding_length", hidden),
        *_blocks(keys, tensors),
        keys.agreed("feed_forward_length", features),
        keys.agreed("context_length", positions),
        _short(keys.need("attention.layer_norm_epsilon", float)),
        arch.activation,
    )
    special = _special(common, vocabulary)
    if arch.encoder:
        more = {"type_vocab_size": _shape(keys, tensors, "token_types.weight")[0]}
        special = {key: number for key, number in special.items() if key == "pad_token_id"}
    else:
        more = {"tie_word_embeddings": "output.weight" not in tensors}
    dtype = tensors["token_embd.weight"].dtype or torch.float32
    return {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "vocab_size": vocabulary,
        **dict(zip(_LEARNED[arch.name], values, strict=True)),
        **more,
        "dtype": str(dtype).removeprefix("torch."),
        **special,
    }


def pooling(keys: Mapping[str, Any]) -> str | None:
    """How the states of a text become one embedding, one of POOLING.

    None where a file does not say, or says what is not known here.
    """
    names = {int(import_gguf().PoolingType[name]): name for name in POOLING}
    found = keys.get(f"{BERT.name}.pooling_type", 0)
    return names.get(found) if type(found) is int else None


def pooling_note(keys: Mapping[str, Any], made: bool) -> list[str]:
    """What becomes of how a file makes embeddings, in words, if it says that.

    made  files of sentence-transformers say it
    """
    found = keys.get(f"{keys['general.architecture']}.pooling_type", 0)
    if made:
        return ["a file does not say whether embeddings have length 1: Normalize is not written"]
    if type(found) is int and found == 0:
        return []
    return [f"how the file makes embeddings (pooling_type {str(found):.20}) is not taken over"]


def _gemma(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3's config.json has beyond others: two kinds of layers, each with its rope."""
    window = keys.get("attention.sliding_window", 0)
    if keys.get("attention.sliding_window_pattern", WINDOWS) != WINDOWS:
        raise keys.wrong("another pattern of windows", f"each layer that {WINDOWS} divides without")
    layers = config["num_hidden_layers"]
    local = _short(keys.get("rope.freq_base_swa", LOCAL_BASE, float))
    return {
        "hidden_activation": config.pop("hidden_act"),
        "query_pre_attn_scalar": gemma_scalar(config),
        "layer_types": layer_types(layers, False) if window else ["full_attention"] * layers,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        **({"sliding_window": window} if window else {}),
    }


def _add_delta_net(keys: _Keys, config: dict[str, Any], tensors: Tensors) -> None:
    """Add to a config.json what Qwen 3.5's has beyond others."""
    dim, values = keys.need("ssm.state_size"), keys.need("ssm.time_step_rank")
    groups = keys.need("ssm.group_count")
    layers = config["num_hidden_layers"]
    inner = _shape(keys, tensors, "blk.0.attn_gate.weight")[0]
    have = _shape(keys, tensors, "blk.0.ssm_beta.weight")[0]
    if not groups or values % groups or have != values or not inner == values * dim:
        found = f"{values} heads of {dim} values for {groups} of keys"
        raise keys.wrong(found, f"{have} heads and {inner} features, as its tensors have them")
    keys.agreed("ssm.inner_size", inner)
    types = layer_types(layers, True)
    listed = keys.take("attention.recurrent_layers")
    said = None if listed is None else [bool(each) for each in listed]
    if keys.get("full_attention_interval", FULL) != FULL or said not in (
        None,
        [kind == "linear_attention" for kind in types],
    ):
        raise keys.wrong("another order of its layers", f"full attention in each {FULL}th")
    sections = keys.take("rope.dimension_sections")
    rope = config["rope_parameters"]
    if sections is not None:
        rope["mrope_section"] = [int(each) for each in sections[:3]]
    if not sections_take_turns(rope.get("mrope_section", MROPE_SECTIONS)):
        raise keys.wrong("sections of frequencies that take no turns", "as many in each of three")
    turned = keys.get("rope.dimension_count", config["head_dim"])
    if not 0 < turned <= config["head_dim"] or turned % 2:
        found = f"rope.dimension_count {turned} of heads of {config['head_dim']}"
        raise keys.wrong(found, "an even number of a head's features")
    config["rope_parameters"] = rope | {"partial_rotary_factor": turned / config["head_dim"]}
    config |= {
        "layer_types": types,
        "linear_conv_kernel_dim": keys.need("ssm.conv_kernel"),
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
        "linear_num_key_heads": groups,
        "linear_num_value_heads": values,
    }


def _short(value: float) -> float:
    """The shortest number that is this one in float32, in which files have it."""
    return float(np.format_float_positional(np.float32(value)))


def _shape(keys: _Keys, tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) < 2:
        raise keys.wrong(f"no matrix {name}", "a file that has it")
    return tensors[name].shape


def _feed_forward(keys: _Keys, arch: Architecture, tensors: Tensors) -> dict[str, Any]:
    """Sizes of the feed-forward layers, and of their experts where they are mixtures."""
    dense, experts = keys.get("feed_forward_length", None), keys.get("expert_count", 0)
    if not experts:
        return {"intermediate_size": dense or _shape(keys, tensors, "blk.0.ffn_gate.weight")[0]}
    used = keys.need("expert_used_count")
    features = _shape(keys, tensors, "blk.0.ffn_gate_exps.weight")[-2]
    each = keys.agreed("expert_feed_forward_length", features)
    shared = "expert_shared_feed_forward_length"
    keys.asked.add(shared)
    if arch is MIXTRAL:
        return {
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "intermediate_size": each,
        }
    config = {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": each,
        "intermediate_size": dense or each,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if arch is QWEN2_MOE:
        features = _shape(keys, tensors, "blk.0.ffn_gate_shexp.weight")[0]
        config["shared_expert_intermediate_size"] = keys.agreed(shared, features)
    return config


def _rope(keys: _Keys, head_dim: int, tensors: Tensors) -> dict[str, Any]:
    """rope_parameters: the base, and how positions are scaled."""
    base = _short(keys.get("rope.freq_base", 10000.0, float))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    kind = keys.get("rope.scaling.type", "none", str)
    factor = keys.get("rope.scaling.factor", None, float)
    factor = keys.get("rope.scale_linear", None, float) if factor is None else factor
    original = keys.get("rope.scaling.original_context_length", None)
    if "rope_freqs.weight" in tensors:
        if kind != "none":
            raise keys.wrong(f"factors of frequencies and scaling {kind}", "one of both")
        return _llama3(keys, head_dim, rope, tensors["rope_freqs.weight"])
    if kind in ("none", "linear") and factor in (None, 1.0):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        more = {"rope_type": "yarn", "factor": factor}
        return rope | more | {"original_max_position_embeddings": original}
    raise keys.wrong(f"scaling of positions {kind!r:.40} by {factor}", "none, linear, yarn, llama3")


def _llama3(keys: _Keys, head_dim: int, rope: dict[str, Any], stored: GgufTensor) -> dict[str, Any]:
    """The rope of Llama 3.1 whose factors the file has: the original context is tried out.

    The factors do not change where both frequency factors and the context are multiplied alike, so
    those of all published models are taken: 1 and 4.
    """
    half = head_dim // 2
    if stored.dtype != torch.float32 or stored.shape != (half,):
        raise keys.wrong(f"rope_freqs of shape {list(stored.shape)}", f"{half} numbers of F32")
    found = stored.read(0, 1).view(torch.float32)
    rope = rope | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["factor"] = float(found.max())
    for power in range(4, 24):
        rope["original_max_position_embeddings"] = 1 << power
        made = rope_factors(rope, 2 * half)
        if made is not None and torch.allclose(made, found, rtol=1e-5, atol=0):
            return rope
    raise keys.wrong("factors of frequencies", "those of Llama 3.1's rule")
