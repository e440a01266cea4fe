"""What of a model's configuration llama.cpp can compute, and the keys by which a file says it."""

from typing import Any

from ternarize.errors import CheckpointError
from ternarize.files.llama_cpp import (
    EXPORTED,
    LOCAL_BASE,
    PHI3,
    Architecture,
    gemma_layer_types,
    gemma_scalar,
)
from ternarize.publish.export.common import PackedCheckpoint
from ternarize.trits import ggml

Asked = list[tuple[str, Any, tuple[Any, ...]]]  # (name, what it is, what it may be)
CONVERTER = "Export it to dense, and use llama.cpp's own converter"


def architecture_of(packed: PackedCheckpoint, config: Any) -> Architecture:
    where = packed.directory / "config.json"
    names = config.architectures or ["none"]
    if names[0] not in EXPORTED:
        known = f"one of {', '.join(EXPORTED)}"
        raise CheckpointError(where, f"architecture {names[0]}", known, CONVERTER)
    architecture = EXPORTED[names[0]]
    if architecture.learned:
        asked = _of_gpt2(config, architecture)
    else:
        asked = _of_llama(config, architecture, names[0])
    unknown = [f"{key} {value!r}" for key, value, known in asked if value not in known]
    if unknown:
        raise CheckpointError(where, ", ".join(unknown), "the plain architecture", CONVERTER)
    return architecture


def _of_gpt2(config: Any, architecture: Architecture) -> Asked:
    """What llama.cpp takes for granted of GPT-2."""
    return [
        ("activation_function", config.activation_function, (architecture.activation,)),
        ("scale_attn_weights", config.scale_attn_weights, (True,)),
        ("scale_attn_by_inverse_layer_idx", config.scale_attn_by_inverse_layer_idx, (False,)),
        ("add_cross_attention", config.add_cross_attention, (False,)),
    ]


def _of_llama(config: Any, architecture: Architecture, name: str) -> Asked:
    """What llama.cpp takes for granted of a decoder of LLaMA's kind."""
    # llama.cpp refuses a file of qwen3 that has these biases
    biased = name.startswith("Qwen3") and getattr(config, "attention_bias", False)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope = rope_of(config)
    return [
        ("hidden_act", activation, (architecture.activation,)),
        ("rope_type", rope.get("rope_type", "default"), ("default", "linear", "llama3")),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ("use_sliding_window", getattr(config, "use_sliding_window", False), (False, None)),
        ("attention_bias", biased, (False, None)),
        # of mixtures of experts: in every layer, with weights that sum to one
        ("norm_topk_prob", getattr(config, "norm_topk_prob", True), (True,)),
        ("decoder_sparse_step", getattr(config, "decoder_sparse_step", 1), (1,)),
        ("mlp_only_layers", getattr(config, "mlp_only_layers", None) or [], ([],)),
        *(_of_gemma(config) if architecture.windows else ()),
    ]


def _of_gemma(config: Any) -> Asked:
    """What llama.cpp takes for granted of Gemma 3."""
    local = config.rope_parameters["sliding_attention"]
    scalar = gemma_scalar(config.to_dict())
    pattern = gemma_layer_types(config.num_hidden_layers)
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


def head_dim_of(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def write_keys(
    gguf: Any,
    writer: Any,
    packed: PackedCheckpoint,
    config: Any,
    architecture: Architecture,
    kind: str,
) -> None:
    """The keys that llama.cpp reads for the architecture, and those about the model."""
    counts = writer.get_total_parameter_count()
    about = gguf.Metadata.load(None, packed.directory, None, counts[0])
    about.size_label = gguf.size_label(*counts)
    writer.add_type(gguf.GGUFType.MODEL)
    about.set_gguf_meta_model(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(ggml.TYPES[kind].file_type)
    length, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    # where llama.cpp has no windows: within one, nothing is missing
    cut = window and not architecture.windows
    writer.add_context_length(min(length, window) if cut else length)
    if architecture.windows or architecture is PHI3:
        writer.add_sliding_window(window or 0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if architecture.learned:
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    experts = getattr(config, "num_local_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = rope_of(config)
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
