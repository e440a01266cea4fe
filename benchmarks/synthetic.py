"""Synthetic LLaMA-shaped checkpoints in BF16: real sizes, random weights, a shard at a time."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, FFN, KV, VOCAB = 2048, 8192, 512, 32000  # about 61 M weights a layer


def write_llama(directory: Path, layers: int, layers_per_shard: int = 16) -> int:
    """Write a checkpoint of `layers` layers (16: 2.1 GB); returns its bytes."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
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
            tensors["model.embed_tokens.weight"] = _normal((VOCAB, HIDDEN), generator)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        first = shard * layers_per_shard
        for layer in range(first, min(first + layers_per_shard, layers)):
            prefix = f"model.layers.{layer}."
            for name, shape in _layer_shapes().items():
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


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (KV, HIDDEN),
        "self_attn.v_proj.weight": (KV, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
