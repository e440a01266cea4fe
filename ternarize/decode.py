"""Decode: the next token of a LLaMA-shaped model with little else than its products.

One token needs each weight once, and a small model's products are done in a few milliseconds. What
a general implementation does between them (modules that call modules, a cache that is put together
anew, a mask, eight operators for a rotary embedding) takes as long again. So for models whose layer
is the one below this file walks through the layers itself, with the model's own modules for what
has weights, and two functions of the compiled core for the rest:

    h = norm(x)     x = x + o(attend(q(h), k(h), v(h)))
    h = norm(x)     x = x + down(act(gate(h)) * up(h))

Projections that share an input are one call, which rounds it once. The prompt is read by the
model's own forward. Numbers are rounded where the model rounds them; only sums have another order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize import kernels
from ternarize.linear import products
from ternarize.native import lib

# Models of transformers whose layers are the one above. Where they differ: BitNet has a norm before
# o and one before down, Qwen3 norms of the heads of queries and keys, Qwen2 biases (in the modules).
CLASSES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "BitNetForCausalLM",
)
ROPES = ("default", "linear", "llama3", "yarn")  # the same for any length of text
Model = Any


def can_decode(model: Model, capacity: int) -> bool:
    """Whether `Decoder` computes what the model does, for texts of `capacity` tokens."""
    if type(model).__name__ not in CLASSES or not type(model).__module__.startswith("transformers"):
        return False
    config = model.config
    window = getattr(config, "sliding_window", None)
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    return (
        model.device.type == "cpu"
        and model.dtype in kernels.KINDS
        and config.rope_parameters.get("rope_type", "default") in ROPES
        and (window is None or window >= capacity)
        and all(norm.weight.dtype == model.dtype for norm in norms)
        # nobody else wants to see, or to bring, what goes through a module
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and not any(hasattr(m, "_hf_hook") for m in model.modules())
    )


class Decoder:
    """The state of texts that are being continued.

    model     one that `can_decode`
    ids       (batch, prompt) integers: prompts of one length
    capacity  tokens of each text that there is to be room for, the prompt's among them

    logits    (batch, vocabulary), of the token that comes next

    Memory: 2 * layers * batch * key heads * capacity * head size numbers of the model's dtype.
    """

    def __init__(self, model: Model, ids: Tensor, capacity: int) -> None:
        out = model(ids, use_cache=True, logits_to_keep=1)
        self.logits: Tensor = out.logits[:, -1]
        self.model = model
        self.position = ids.shape[1]
        batch, config = len(ids), model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.cache: list[tuple[Tensor, Tensor]] = []
        for layer in out.past_key_values.layers:
            *_, dim = layer.keys.shape
            keys = layer.keys.new_empty(batch, self.kv_heads, dim, capacity)
            values = layer.values.new_empty(batch, self.kv_heads, capacity, dim)
            keys[..., : self.position] = layer.keys.mT
            values[:, :, : self.position] = layer.values
            self.cache.append((keys, values))
        positions = torch.arange(capacity).unsqueeze(0)
        cosine, sine = model.model.rotary_emb(self.cache[0][0], position_ids=positions)
        self.cosine, self.sine = cosine[0].contiguous(), sine[0].contiguous()

    def step(self, tokens: Tensor) -> Tensor:
        """Take one more token of each text, (batch,) integers, and return `logits` after it."""
        x: Tensor = self.model.model.embed_tokens(tokens)
        for layer, cache in zip(self.model.model.layers, self.cache, strict=True):
            x = x + self._attention(layer.self_attn, _norm(layer.input_layernorm, x), cache)
            x = x + _mlp(layer.mlp, _norm(layer.post_attention_layernorm, x))
        self.position += 1
        self.logits = self.model.lm_head(_norm(self.model.model.norm, x))
        return self.logits

    def _attention(self, module: Any, h: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = products((module.q_proj, module.k_proj, module.v_proj), h)
        if hasattr(module, "q_norm"):
            q = _norm(module.q_norm, q.view(-1, module.head_dim)).view(q.shape)
            k = _norm(module.k_norm, k.view(-1, module.head_dim)).view(k.shape)
        rotary = self.cosine[self.position], self.sine[self.position]
        y = attend(q, k, v, *rotary, *cache, self.position, self.heads, module.scaling)
        if hasattr(module, "attn_sub_norm"):
            y = _norm(module.attn_sub_norm, y)
        out: Tensor = module.o_proj(y)
        return out


def _mlp(module: Any, h: Tensor) -> Tensor:
    gate, up = products((module.gate_proj, module.up_proj), h)
    y = module.act_fn(gate) * up
    if hasattr(module, "ffn_sub_norm"):
        y = _norm(module.ffn_sub_norm, y)
    out: Tensor = module.down_proj(y)
    return out


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)), the bracket rounded to x's dtype first.

    x (..., n) and weight (n,) of one dtype.  RMSNorm, https://arxiv.org/abs/1910.07467, equation 4
    """
    if lib is None:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return weight * wide.to(x.dtype)
    n = x.shape[-1]
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    assert weight.dtype == x.dtype and weight.shape == (n,) and weight.is_contiguous()
    lib.rms_norm(
        kernels.KINDS[x.dtype],
        x.numel() // n,
        n,
        x.data_ptr(),
        weight.data_ptr(),
        epsilon,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int,
    heads: int,
    scaling: float,
) -> Tensor:
    """Attention of one new token of each text to it and to all before.

        softmax(scaling * rope(q) [K, rope(k)]^T) [V, v]

    q             (batch, heads * dim); a key's head serves heads / kv_heads of them
    k, v          (batch, kv_heads * dim)
    cosine, sine  (dim,): of the rotary embedding at `position`
    keys          (batch, kv_heads, dim, capacity), after rope, and
    values        (batch, kv_heads, capacity, dim): caches of the tokens before `position`; what
                  belongs there is written

    All of one dtype.  Returns (batch, heads * dim).
    """
    batch, kv_heads, dim, capacity = keys.shape
    if lib is None:
        cos, sin = cosine, sine
        new_q, new_k = (_rotated(each.view(batch, -1, dim), cos, sin) for each in (q, k))
        keys[..., position], values[:, :, position] = new_k, v.view(batch, -1, dim)
        y = torch.nn.functional.scaled_dot_product_attention(
            new_q.unsqueeze(2),
            keys[..., : position + 1].mT,
            values[:, :, : position + 1],
            scale=scaling,
            enable_gqa=True,
        )
        return y.reshape(batch, -1)
    given: Sequence[Tensor] = (q, k, v, cosine, sine, keys, values)
    assert all(each.dtype == q.dtype and each.is_contiguous() for each in given)
    assert q.shape == (batch, heads * dim) and k.shape == v.shape == (batch, kv_heads * dim)
    assert cosine.shape == sine.shape == (dim,) and values.shape == keys.mT.shape
    out = torch.empty_like(q)
    lib.attend(
        kernels.KINDS[q.dtype],
        batch,
        heads,
        kv_heads,
        dim,
        capacity,
        position,
        scaling,
        [each.data_ptr() for each in (*given, out)],
        torch.get_num_threads(),
    )
    return out


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine
