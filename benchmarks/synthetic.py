"""Synthetic LLaMA-shaped checkpoints in BF16: real sizes, random weights, a shard at a time."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, FFN, KV, VOCAB = 2048, 8192, 512, 32000  # about 61 M weights a layer


def write_llama(
    directory: Path, layers: int, layers_per_shard: int = 16, hidden: int = HIDDEN
) -> int:
    """Write a checkpoint of `layers` layers (16: 2.1 GB); returns its bytes.

    hidden  width of the model, a multiple of 512; its other sizes in proportion
    """
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * FFN // HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64 // 4,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shards = math.ceil(layers / layers_per_shard)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(shards):
        tensors: dict[str, torch.Tensor] = {}
        if shard == 0:
            tensors["model.embed_tokens.weight"] = _normal((VOCAB, hidden), generator)
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        first = shard * layers_per_shard
        for layer in range(first, min(first + layers_per_shard, layers)):
            prefix = f"model.layers.{layer}."
            for name, shape in _layer_shapes(hidden).items():
                tensors[prefix + name] = _normal(shape, generator)
        single = shards == 1
        file = (
            "model.safetensors" if single else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        )
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _layer_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    ffn, kv = hidden * FFN // HIDDEN, hidden * KV // HIDDEN
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
