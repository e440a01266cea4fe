"""The keys by which a GGUF file says what a model's configuration does."""

import json
from typing import Any

from ternarize.errors import CheckpointError, FormatError
from ternarize.files.json_files import read_json
from ternarize.files.llama_cpp import (
    EXPORTED,
    FULL,
    MROPE_SECTIONS,
    PHI3,
    POOLING,
    Architecture,
    DeltaNet,
    departures,
    rope_of,
)
from ternarize.files.names import module_folders
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


def pooling_of(packed: PackedCheckpoint) -> str | None:
    """How the states of a text become one embedding, a name of gguf.PoolingType.

    As modules.json of sentence-transformers says it; None without one. Raises CheckpointError where
    llama.cpp does something else than these modules, FormatError for files that say nothing.
    """
    modules = _modules(packed)
    if not modules:
        return None
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            packed.directory / "modules.json",
            f"modules {', '.join(kinds)}",
            "Transformer, Pooling and at most Normalize, which is all that llama.cpp computes",
            "Export it to dense, which keeps all modules",
        )
    at = modules[1][1]
    table = read_json(packed.directory / at / "config.json") or {}
    asked = [key for key, value in table.items() if key.startswith("pooling_mode_") and value]
    asked += [table["pooling_mode"]] if isinstance(table.get("pooling_mode"), str) else []
    found = [name for name, ways in POOLING.items() if len(asked) == 1 and asked[0] in ways]
    if not found:
        raise CheckpointError(
            packed.directory / at / "config.json",
            f"pooling by {', '.join(asked) or 'nothing that is said'}",
            "the mean, the first token or the last one, and one of these",
            "Export it to dense, which keeps all modules",
        )
    return found[0]


def _modules(packed: PackedCheckpoint) -> list[tuple[str, str]]:
    """The kinds of the modules in modules.json, and their folders; none without that file."""
    path = packed.directory / "modules.json"
    if not path.is_file():
        return []
    try:
        table = json.loads(path.read_bytes())
        found = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in table]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = []
    if not found:
        raise FormatError(path, "is no list of modules", "each with type and path", "Repair it")
    module_folders(packed.directory)  # raises where one is outside
    return found


def embedding_notes(packed: PackedCheckpoint) -> list[str]:
    """What sentence-transformers does for embeddings, and a file does not say, in words."""
    modules, notes = _modules(packed), []
    if any(kind == "Normalize" for kind, _ in modules):
        notes.append(
            "that embeddings have length 1 (Normalize) the file does not say: ask for it where "
            "llama.cpp is run"
        )
    first = packed.directory / (modules[0][1] if modules else "")
    if (read_json(first / "sentence_bert_config.json") or {}).get("do_lower_case"):
        notes.append(
            "sentence-transformers lower-cases all text (do_lower_case of "
            "sentence_bert_config.json), llama.cpp does what its tokenizer does"
        )
    prompts = read_json(packed.directory / "config_sentence_transformers.json") or {}
    if name := prompts.get("default_prompt_name"):
        notes.append(
            f"sentence-transformers puts its prompt {str(name)!r:.40} before a text, llama.cpp "
            "none: put it there"
        )
    return notes


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
    if architecture.encoder:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        writer.add_token_type_count(config.type_vocab_size)
        pooling = pooling_of(packed)
        if pooling is not None:
            writer.add_pooling_type(gguf.PoolingType[pooling])
        return
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
    turned = int(head_dim_of(config) * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(turned)
    if architecture.linear:
        _write_delta_net(writer, config, rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _write_delta_net(writer: Any, config: Any, rope: dict[str, Any]) -> None:
    """What Qwen 3.5 has beyond others: layers with a state, and positions of three kinds."""
    heads = DeltaNet.of(config.to_dict())
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(heads.dim)
    writer.add_ssm_group_count(heads.keys)
    writer.add_ssm_time_step_rank(heads.values)
    writer.add_ssm_inner_size(heads.values * heads.dim)
    writer.add_full_attention_interval(FULL)
    # of a text all three are the same, so that nothing depends on how features are shared out
    writer.add_rope_dimension_sections([*rope.get("mrope_section", MROPE_SECTIONS), 0])
