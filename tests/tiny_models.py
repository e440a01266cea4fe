"""Tiny random models of many architectures, shared by the tests of select, load and convert.

`CONFIGS` names functions that return a configuration: hidden size 64, two layers, vocabulary 160,
and inner sizes such as 136 that no group size divides, so that the last group of a row is short.
`save` writes such a model as a checkpoint with `save_pretrained`, in the tensor names of the Hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LABELS: dict[str, Any] = {"num_labels": 3}
TEXT: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16, **_TOKENS}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
# GPT-2 and its kin have names of their own
_GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "n_embd": 64,
    "n_inner": 136,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama() -> PretrainedConfig:
    return transformers.LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"])


def _llama_tied() -> PretrainedConfig:
    return transformers.LlamaConfig(
        **TEXT, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]
    )


def _qwen3() -> PretrainedConfig:
    return transformers.Qwen3Config(**TEXT, architectures=["Qwen3ForCausalLM"])


def _gemma3_text() -> PretrainedConfig:
    return transformers.Gemma3TextConfig(
        **TEXT, sliding_window=16, query_pre_attn_scalar=16, architectures=["Gemma3ForCausalLM"]
    )


def _gemma3() -> PretrainedConfig:
    return transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 16},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=150,
        boi_token_index=151,
        eoi_token_index=152,
        architectures=["Gemma3ForConditionalGeneration"],
    )


def _mixtral() -> PretrainedConfig:
    return transformers.MixtralConfig(
        **TEXT, num_local_experts=4, num_experts_per_tok=2, architectures=["MixtralForCausalLM"]
    )


def _qwen3_moe() -> PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        **TEXT,
        moe_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        architectures=["Qwen3MoeForCausalLM"],
    )


def _deepseek_v3() -> PretrainedConfig:
    sizes = {**TEXT, "num_key_value_heads": 4}
    del sizes["head_dim"]
    return transformers.DeepseekV3Config(
        **sizes,
        moe_intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        architectures=["DeepseekV3ForCausalLM"],
    )


def _phi3() -> PretrainedConfig:
    sizes = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return transformers.Phi3Config(**sizes, architectures=["Phi3ForCausalLM"])


def _gpt2() -> PretrainedConfig:
    return transformers.GPT2Config(**_GPT2_SIZES, architectures=["GPT2LMHeadModel"])


def _gptj() -> PretrainedConfig:
    """Attention and feed-forward beside each other."""
    return transformers.GPTJConfig(**_GPT2_SIZES, rotary_dim=8, architectures=["GPTJForCausalLM"])


def _neox() -> PretrainedConfig:
    """The same, each behind a norm of its own."""
    return transformers.GPTNeoXConfig(**_SIZES, architectures=["GPTNeoXForCausalLM"])


def _albert() -> PretrainedConfig:
    """One block, run as often as there are layers."""
    return transformers.AlbertConfig(
        **_SIZES, embedding_size=32, num_hidden_groups=1, architectures=["AlbertModel"]
    )


def _bert(architecture: str) -> PretrainedConfig:
    return transformers.BertConfig(**_SIZES, **_LABELS, architectures=[architecture])


def _vit() -> PretrainedConfig:
    return transformers.ViTConfig(
        **{**VISION, "hidden_size": 64, "intermediate_size": 136},
        architectures=["ViTForImageClassification"],
        **_LABELS,
    )


def _whisper() -> PretrainedConfig:
    return transformers.WhisperConfig(
        vocab_size=160,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=136,
        decoder_ffn_dim=136,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        architectures=["WhisperForConditionalGeneration"],
        **_TOKENS,
    )


def _t5() -> PretrainedConfig:
    return transformers.T5Config(
        vocab_size=160,
        d_model=64,
        d_kv=16,
        d_ff=136,
        num_layers=2,
        num_heads=4,
        architectures=["T5ForConditionalGeneration"],
        **{**_TOKENS, "decoder_start_token_id": 0},
    )


def _switch() -> PretrainedConfig:
    """Every second layer has experts, each a module of its own, that some samples do not meet."""
    return transformers.SwitchTransformersConfig(
        vocab_size=160,
        d_model=64,
        d_kv=16,
        d_ff=136,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        architectures=["SwitchTransformersForConditionalGeneration"],
        **{**_TOKENS, "decoder_start_token_id": 0},
    )


def _zamba2() -> PretrainedConfig:
    """The first and the third block have one attention between them."""
    sizes: dict[str, Any] = dict(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        layers_block_type=["hybrid", "mamba", "hybrid", "mamba"],
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=32,
        mamba_d_state=16,
        mamba_headdim=16,
        n_mamba_heads=8,
        num_mem_blocks=1,
        chunk_size=8,
        use_mem_rope=False,
    )
    return transformers.Zamba2Config(**sizes, **_TOKENS, architectures=["Zamba2ForCausalLM"])


def _gpt_oss() -> PretrainedConfig:
    return transformers.GptOssConfig(
        **{**TEXT, "intermediate_size": 72},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        architectures=["GptOssForCausalLM"],
    )


def _llama4() -> PretrainedConfig:
    return transformers.Llama4TextConfig(
        **{**TEXT, "intermediate_size": 72},
        intermediate_size_mlp=136,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=16,
        architectures=["Llama4ForCausalLM"],
    )


def _mamba() -> PretrainedConfig:
    return transformers.MambaConfig(
        vocab_size=160,
        hidden_size=64,
        state_size=8,
        num_hidden_layers=2,
        expand=2,
        architectures=["MambaForCausalLM"],
        **_TOKENS,
    )


def _clip() -> PretrainedConfig:
    text = {key: value for key, value in TEXT.items() if key[:4] not in ("num_", "head")}
    return transformers.CLIPConfig(
        text_config={**text, "num_hidden_layers": 2, "num_attention_heads": 4},
        vision_config=VISION,
        projection_dim=32,
        architectures=["CLIPModel"],
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    "llama_tied": _llama_tied,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "bert": lambda: _bert("BertModel"),
    "bert_classifier": lambda: _bert("BertForSequenceClassification"),
    "vit": _vit,
    "whisper": _whisper,
    "t5": _t5,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "mamba": _mamba,
    "clip": _clip,
}
# those whose blocks run in other ways, for calibration
MORE: dict[str, Callable[[], PretrainedConfig]] = {"albert": _albert, "gptj": _gptj, "neox": _neox}
# those that single tests ask for
RARE: dict[str, Callable[[], PretrainedConfig]] = {"switch": _switch, "zamba2": _zamba2}


def build(
    name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **sizes: int
) -> PreTrainedModel:
    """The model `name` with random weights that depend on the seed alone; `sizes`: other ones."""
    config = (CONFIGS | MORE | RARE)[name]()
    config.update(sizes)
    architecture = getattr(transformers, (config.architectures or [""])[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = architecture._from_config(config, dtype=dtype)
    model.train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Some classes start from zeros; random everywhere shows a tensor in a wrong place.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.05 * noise if parameter.ndim > 1 else parameter + 0.02 * noise)
    return model


def save(
    name: str,
    directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str | int | None = None,
    **sizes: int,
) -> PreTrainedModel:
    """Build the model `name` and save it as a checkpoint in `directory`; return the model."""
    model = build(name, dtype, seed, **sizes)
    shards: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, **shards)
    return model
