"""Decode: the next token of a LLaMA-shaped model with little else than its products.

One token needs each weight once, and a small model's products are done in a few milliseconds. What
a general implementation does between them (modules that call modules, a cache that is put together
anew, a mask, eight operators for a rotary embedding) takes as long again. So for models whose layer
is the one below this file walks through the layers itself, with the model's own modules for what
has weights, and functions of the compiled core for the rest:

    h = norm(x)     x = x + o(attend(q(h), k(h), v(h)))
    h = norm(x)     x = x + down(act(gate(h)) * up(h))

Projections that share an input are one call, which rounds it once. The prompt is read by the
model's own forward. Numbers are rounded where the model rounds them; only sums have another order.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.files.headers import DTYPE_NAMES
from ternarize.models.reads import CACHES
from ternarize.native import lib
from ternarize.runtime.kernels import CORE_DTYPES
from ternarize.runtime.modules.linear import prepared_linears

# Models of transformers whose layers are the one above. Where they differ: BitNet has a norm before
# o and one before down, Qwen3 norms of the queries' and keys' heads, Qwen2 biases (in modules).
CLASSES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "BitNetForCausalLM",
)
FEW = 4  # texts, for which the core multiplies dense weights: more are faster in torch
HIDDEN_ACTS = ("silu", "relu2")
ROPES = ("default", "linear", "llama3", "yarn")  # the same for any length of text


def cache_of(output: Any) -> dict[str, Any]:
    """The memory that a model's output gives back, as the argument with which the next call has it.

    Empty where it gives none back: the model keeps none, or under a name of its own.
    """
    return {name: output[name] for name in output if name in CACHES}


def can_decode(model: Any, capacity: int) -> bool:
    """Whether `Decoder` computes what the model does, for texts of `capacity` tokens.

    So the modules must be those of transformers, and nobody may have changed what they do.
    """
    name, module = type(model).__name__, sys.modules[type(model).__module__]
    if lib is None or name not in CLASSES or not module.__name__.startswith("transformers."):
        return False
    config, body, of = model.config, model.model, name.removesuffix("ForCausalLM")
    window = getattr(config, "sliding_window", None)
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    known = {f"{of}{part}" for part in ("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")}
    parts = [body, *norms]
    parts += [part for layer in body.layers for part in (layer, layer.self_attn, layer.mlp)]
    return (
        all(type(m).__name__ in known and type(m).__module__ == module.__name__ for m in parts)
        and len(body.layers) == config.num_hidden_layers
        and not model.training
        and model.device.type == "cpu"
        and model.dtype in CORE_DTYPES
        and not torch.is_autocast_enabled("cpu")
        and config._attn_implementation in ("eager", "sdpa")
        and config.hidden_act in HIDDEN_ACTS
        and config.rope_parameters.get("rope_type", "default") in ROPES
        and (window is None or window >= capacity)
        and all(_is_bare(norm.weight, model.dtype) for norm in norms)
        # nobody else wants to see, to bring or to compute what goes through a module
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and not any("forward" in vars(m) or hasattr(m, "_hf_hook") for m in model.modules())
    )


def _is_bare(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is what its address alone says: no subclass, and dense."""
    data = weight.data
    return (
        type(data) is Tensor
        and data.layout == torch.strided
        and data.device.type == "cpu"
        and data.dtype == dtype
        and data.is_contiguous()
    )


class Decoder:
    """The state of texts that are being continued.

    model     one that `can_decode`
    ids       (batch, prompt) integers: prompts of one length
    capacity  tokens of each text that there is to be room for, the prompt's among them

    logits    (batch, vocabulary) of the model's dtype, of the token that comes next

    What a step does is written down once, as calls with the memory that they work in: there is
    nothing to look up from token to token. The model's parameters are held as they are now.
    Memory: 2 * layers * batch * key heads * capacity * head size numbers of the model's dtype.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, ids: Tensor, capacity: int) -> None:
        out = model(ids, use_cache=True, logits_to_keep=1)
        self.logits: Tensor = out.logits[:, -1]
        self.model, self.batch, self.dtype = model, len(ids), model.dtype
        self.capacity, self.threads = capacity, torch.get_num_threads()
        self.position = torch.tensor(ids.shape[1])
        self.calls: list[Callable[[], object]] = []
        self.held: list[Tensor] = []  # what calls know by its address alone

        body, (_, prompt) = model.model, ids.shape
        cosine, sine = body.rotary_emb(self.logits, position_ids=torch.arange(capacity)[None])
        self.rotary = cosine[0].contiguous(), sine[0].contiguous()
        self.x = self._new(model.config.hidden_size)
        (cache,) = cache_of(out).values()
        for layer, filled in zip(body.layers, cache.layers, strict=True):
            _, kv_heads, _, dim = filled.keys.shape
            keys = filled.keys.new_empty(self.batch, kv_heads, dim, capacity)
            values = filled.values.new_empty(self.batch, kv_heads, capacity, dim)
            keys[..., :prompt] = filled.keys.mT
            values[:, :, :prompt] = filled.values
            h = self._norm(layer.input_layernorm, self.x)
            self._add(self._attention(layer.self_attn, h, keys, values))
            h = self._norm(layer.post_attention_layernorm, self.x)
            self._add(self._mlp(layer.mlp, h))
        self.head = self._linears([model.lm_head], self._norm(body.norm, self.x))[0]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Take one more token of each text, (batch,) integers, and return `logits` after it.

        Raises ValueError when there is no room for it, or there are not as many tokens as texts.
        """
        if tokens.shape != (self.batch,):
            raise ValueError(f"tokens: {tuple(tokens.shape)}; expected ({self.batch},).")
        self.x.copy_(self.model.model.embed_tokens(tokens))
        for call in self.calls:
            call()
        self.position += 1
        self.logits = self.head.clone()  # the next step writes there again
        return self.logits

    # --- each writes down some calls and returns where their result will be --------------------

    def _new(self, n: int) -> Tensor:
        return torch.empty(self.batch, n, dtype=self.dtype)

    def _attention(self, module: Any, h: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = self._linears([module.q_proj, module.k_proj, module.v_proj], h)
        if hasattr(module, "q_norm"):
            q, k = self._norm(module.q_norm, q), self._norm(module.k_norm, k)
        y = torch.empty_like(q)
        given = (q, k, v, *self.rotary, keys, values, y, self.position)
        self.held += given
        attend = prepared_attention(*given, module.scaling, self.threads)
        self.calls.append(attend)
        if hasattr(module, "attn_sub_norm"):
            y = self._norm(module.attn_sub_norm, y)
        return self._linears([module.o_proj], y)[0]

    def _mlp(self, module: Any, h: Tensor) -> Tensor:
        gate, up = self._linears([module.gate_proj, module.up_proj], h)
        y = torch.empty_like(gate)
        self.held += (gate, up, y)
        kind = self.model.config.hidden_act
        self.calls.append(prepared_gate(gate, up, kind, y, self.threads))
        if hasattr(module, "ffn_sub_norm"):
            y = self._norm(module.ffn_sub_norm, y)
        return self._linears([module.down_proj], y)[0]

    def _add(self, y: Tensor) -> None:
        self.calls.append(partial(self.x.add_, y))

    def _norm(self, module: Any, x: Tensor) -> Tensor:
        out, weight = torch.empty_like(x), module.weight.data
        self.held += (x, weight, out)
        norm = prepared_norm(x, weight, module.variance_epsilon, out, self.threads)
        self.calls.append(norm)
        return out

    def _linears(self, modules: list[nn.Linear], x: Tensor) -> list[Tensor]:
        outs = [self._new(module.out_features) for module in modules]
        call = prepared_linears(modules, x, outs)
        if call is not None:
            self.held += (x, *outs, *(p.data for m in modules for p in m.parameters()))
            self.calls.append(call)
            return outs
        for module, out in zip(modules, outs, strict=True):
            bare = type(module) is nn.Linear and _is_bare(module.weight, self.dtype)
            if bare and module.bias is None and self.batch <= FEW:
                weight = module.weight.data
                self.held += (x, weight, out)
                self.calls.append(prepared_dense(x, weight, out, self.threads))
            else:
                self.calls.append(partial(_copy_output, module, x, out))
        return outs


def _copy_output(module: nn.Module, x: Tensor, out: Tensor) -> None:
    out.copy_(module(x))


def _expect(right: bool) -> None:
    """The core is given memory by its address: what it is taken for it must be."""
    if not right:
        raise ValueError("decode: tensors of shapes or dtypes that do not fit one another.")


def _expect_bare(*tensors: Tensor) -> None:
    _expect(all(_is_bare(tensor, tensors[0].dtype) for tensor in tensors))


def prepared_norm(
    x: Tensor, weight: Tensor, epsilon: float, out: Tensor, threads: int
) -> Callable[[], None]:
    """A call that sets out to weight * (x / sqrt(mean(x^2) + epsilon)), the bracket rounded first.

    x, out  (..., k n): k vectors of n behind one another
    weight  (n,) of the same dtype

    It knows the memory only: the caller keeps it.
    RMSNorm, https://arxiv.org/abs/1910.07467, equation 4.
    """
    assert lib is not None
    n = len(weight)
    _expect_bare(x, weight, out)
    _expect(x.shape == out.shape and x.shape[-1] % n == 0)
    at = x.data_ptr(), weight.data_ptr(), epsilon, out.data_ptr()
    return partial(lib.rms_norm, DTYPE_NAMES[x.dtype], x.numel() // n, n, *at, threads)


def prepared_gate(
    gate: Tensor, up: Tensor, activation: str, out: Tensor, threads: int
) -> Callable[[], None]:
    """A call that sets out to activation(gate) * up, both factors in gate's dtype.

    activation  "silu", x / (1 + e^-x) (https://arxiv.org/abs/2002.05202, section 2), or "relu2",
                max(x, 0)^2

    It knows the memory only: the caller keeps it.
    """
    assert lib is not None
    _expect_bare(gate, up, out)
    _expect(gate.shape == up.shape == out.shape)
    at = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    return partial(lib.gate, DTYPE_NAMES[gate.dtype], activation, gate.numel(), *at, threads)


def prepared_dense(x: Tensor, weight: Tensor, out: Tensor, threads: int) -> Callable[[], None]:
    """A call that sets out to x W^T, with W (rows, cols) and x (tokens, cols) of one dtype.

    For a few tokens, at the speed at which memory gives W. It knows the memory only.
    """
    assert lib is not None
    (tokens, cols), rows = x.shape, len(weight)
    _expect_bare(x, weight, out)
    _expect(weight.shape == (rows, cols) and out.shape == (tokens, rows))
    at = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    return partial(lib.dense, DTYPE_NAMES[x.dtype], tokens, rows, cols, *at, threads)


def prepared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    position: Tensor,
    scaling: float,
    threads: int,
) -> Callable[[], None]:
    """A call that sets out to the attention of one new token of each text to it and all before.

        softmax(scaling * rope(q) [K, rope(k)]^T) [V, v]

    q, out        (batch, heads * dim); a key's head serves heads / kv_heads of them
    k, v          (batch, kv_heads * dim)
    cosine, sine  (capacity, dim) of the rotary embedding
    keys          (batch, kv_heads, dim, capacity), after rope, and
    values        (batch, kv_heads, capacity, dim): caches of the tokens before `position`; what
                  belongs there is written
    position      () int64, read at each call

    All others of one dtype. It knows the memory only: the caller keeps it.
    RoPE: https://arxiv.org/abs/2104.09864, in transformers' order of the dimensions.
    """
    assert lib is not None
    given = (q, k, v, cosine, sine, keys, values, out)
    batch, kv_heads, dim, capacity = keys.shape
    _expect_bare(*given)
    _expect(k.shape == v.shape == (batch, kv_heads * dim) and q.shape == out.shape)
    _expect(len(q) == batch and q.shape[1] % (kv_heads * dim) == 0)
    _expect(cosine.shape == sine.shape == (capacity, dim))
    _expect(values.shape == keys.mT.shape and position.dtype == torch.int64)
    shape = batch, q.shape[1] // dim, kv_heads, dim, capacity
    addresses = [t.data_ptr() for t in (*given, position)]
    return partial(lib.attend, DTYPE_NAMES[q.dtype], *shape, scaling, addresses, threads)
