"""The keys by which a GGUF file says what a model's configuration does."""

from typing import Any

from ternarize.errors import CheckpointError
from ternarize.files.llama_cpp import EXPORTED, PHI3, Architecture, departures, rope_of
from ternarize.publish.export.common import PackedCheckpoint
from ternarize.trits import ggml

CONVERTER = "Export it to dense, and use llama.cpp's own converter"


def architecture_of(packed: PackedCheckpoint, config: Any) -> Architecture:
    where = packed.directory / "config.json"
    names = config.architectures or ["none"]
    if names[0] not in EXPORTED:
        known = f"one of {', '.join(EXPORTED)}"
        raise CheckpointError(where, f"architecture {names[0]}", known, CONVERTER)
    architecture = EXPORTED[names[0]]
    unknown = departures(config)
    if unknown:
        raise CheckpointError(where, ", ".join(unknown), "the plain architecture", CONVERTER)
    return architecture


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
