"""Decoding a token at a time: what the model's own forward gives, with rounding apart."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from test_evaluate import word_tokenizer
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

import ternarize
from ternarize.convert.run import convert
from ternarize.native import lib
from ternarize.plans.recipe import Recipe
from ternarize.runtime import generate
from ternarize.runtime.decode import (
    Decoder,
    cache_of,
    can_decode,
    prepared_attention,
    prepared_dense,
    prepared_gate,
    prepared_norm,
)

pytestmark = pytest.mark.skipif(lib is None, reason="it needs the compiled core")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "bitnet": transformers.BitNetConfig,
}


def dense(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = CONFIGS[kind](**tiny_models.TEXT, **options)
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # biases and norms that are not all 0 and 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def packed(model: Any, path: Path, recipe: Recipe, **options: Any) -> Any:
    model.save_pretrained(path / "source")
    convert(path / "source", path / "packed", recipe)
    return ternarize.load(path / "packed", **options)


def tokens(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 160, (batch, n), generator=torch.Generator().manual_seed(seed))


def both(model: Any, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The logits after each of `steps` tokens, by the decoder and by the model's forward."""
    ours, theirs = [], []
    more = tokens(len(ids), steps, seed=1)
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)
        decoder = Decoder(model, ids, ids.shape[1] + steps)
        assert torch.equal(decoder.logits, out.logits[:, -1])
        for i in range(steps):
            ours.append(decoder.step(more[:, i]))
            out = model(more[:, i : i + 1], use_cache=True, **cache_of(out))
            theirs.append(out.logits[:, -1])
    return torch.stack(ours), torch.stack(theirs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_model_gives_the_logits_of_its_forward(
    kind: str, batch: int, tmp_path: Path
) -> None:
    model = packed(dense(kind), tmp_path, Recipe(method="twn", group_size=32))
    assert can_decode(model, 40)
    ours, theirs = both(model, tokens(batch, 9), 20)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dense_model_does_as_well(kind: str) -> None:
    model = dense(kind)
    assert can_decode(model, 40)
    ours, theirs = both(model, tokens(2, 5), 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="absmean", group_size=-1, keep=("*.1.*q_proj*",)),
        Recipe(method="twn", group_size=0, planes=("*up_proj*", "*.k_proj*")),
        Recipe(method="twn", group_size=64, head="int8", embeddings="int8"),
    ],
)
def test_whatever_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    model = packed(dense("llama"), tmp_path, recipe)
    ours, theirs = both(model, tokens(1, 5), 8)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "bitnet"])
def test_numbers_are_rounded_where_the_model_rounds_them(kind: str, dtype: torch.dtype) -> None:
    model = dense(kind, dtype)
    ours, theirs = both(model, tokens(1, 5), 8)
    exact, _ = both(dense(kind, dtype).to(torch.float32), tokens(1, 5), 8)
    # as near to each other as either is to the model in float32
    error = (theirs - exact).abs().mean()
    assert (ours - theirs).abs().mean() < 1.5 * error
    assert (ours - exact).abs().mean() < 1.5 * error


def test_scaled_positions() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = dense("llama", rope_parameters=rope)
    assert can_decode(model, 40)
    ours, theirs = both(model, tokens(1, 5), 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class OtherMLP(LlamaMLP):
    pass


def test_weights_that_are_not_dense_go_through_their_module() -> None:
    model = dense("llama")
    weight = model.lm_head.weight.data
    model.lm_head.weight = torch.nn.Parameter(weight.t().contiguous().t())
    ours, theirs = both(model, tokens(1, 5), 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_step_takes_a_token_of_each_text() -> None:
    decoder = Decoder(dense("llama"), tokens(3, 4), 8)
    with pytest.raises(ValueError, match=r"tokens: \(1,\); expected \(3,\)"):
        decoder.step(torch.tensor([4]))


def test_parameters_are_held_as_they_were(tmp_path: Path) -> None:
    model = packed(dense("llama"), tmp_path, Recipe(method="twn", group_size=32))
    ids, more = tokens(1, 5), tokens(1, 1)[0]
    want = Decoder(model, ids, 8).step(more)
    decoder = Decoder(model, ids, 8)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            parameter.data = torch.zeros_like(parameter.data)
    assert torch.equal(decoder.step(more), want)


def test_what_it_does_not_compute_is_left_to_the_model() -> None:
    assert can_decode(dense("mistral", sliding_window=40), 40)
    assert not can_decode(dense("mistral", sliding_window=40), 41)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not can_decode(dense("llama", rope_parameters=dynamic), 8)
    gemma = tiny_models.build("gemma3_text", torch.float32)
    assert not can_decode(gemma, 8)
    for change in (
        lambda m: m.train(),
        lambda m: setattr(m.config, "num_hidden_layers", 1),
        lambda m: setattr(m.model.layers[0].mlp, "forward", lambda x: x),
        lambda m: setattr(m.model.layers[0].mlp, "__class__", OtherMLP),
        lambda m: setattr(m.config, "_attn_implementation", "mine"),
    ):
        changed = dense("llama")
        change(changed)
        assert not can_decode(changed, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_decode(dense("llama"), 8)
    watched = dense("llama")
    watched.model.layers[1].register_forward_hook(lambda *_: None)
    assert not can_decode(watched, 8)
    mixed = dense("llama")
    mixed.model.norm.to(torch.bfloat16)
    assert not can_decode(mixed, 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.0, "top_k": 5, "seed": 4},
        {"temperature": 1.5, "top_p": 0.8, "seed": 5},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "seed": 6},
    ],
)
def test_generate_gives_the_tokens_of_transformers(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense("llama")
    model.generation_config.eos_token_id = [2, 7, 9]

    def text() -> str:
        return generate.generate(
            model, word_tokenizer(), "w5 w6 w7", max_new_tokens=30, **options
        ).text

    calls = []
    by_decoder = generate._by_decoder

    def counted(*given: Any) -> None:
        calls.append(given)
        by_decoder(*given)

    monkeypatch.setattr(generate, "_by_decoder", counted)
    fast = text()
    assert len(calls) == 1
    monkeypatch.setattr(generate, "can_decode", lambda *_: False)
    assert text() == fast != ""
    assert len(calls) == 1


def test_settings_that_it_does_not_know_are_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = dense("llama")
    monkeypatch.setattr(generate, "_by_decoder", lambda *_: pytest.fail("not asked for"))
    model.generation_config.repetition_penalty = 1.5
    assert generate.generate(model, word_tokenizer(), "w5 w6", max_new_tokens=4).new_tokens > 0


# --- the functions of the compiled core, and what they are to compute ----------------------------


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm, https://arxiv.org/abs/1910.07467, equation 4; x has k vectors of n in a row."""
    wide = x.view(*x.shape[:-1], -1, len(weight)).to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * wide.to(x.dtype)).view(x.shape)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    act = torch.nn.functional.silu if activation == "silu" else lambda x: x.relu().square()
    return act(gate) * up


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int,
    scaling: float,
) -> Tensor:
    """RoPE (https://arxiv.org/abs/2104.09864) in transformers' order, and attention."""
    batch, _, dim, _ = keys.shape
    cos, sin = cosine[position], sine[position]

    def rope(x: Tensor) -> Tensor:
        x = x.view(batch, -1, dim)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    keys[..., position], values[:, :, position] = rope(k), v.view(batch, -1, dim)
    y = torch.nn.functional.scaled_dot_product_attention(
        rope(q).unsqueeze(2),
        keys[..., : position + 1].mT,
        values[:, :, : position + 1],
        scale=scaling,
        enable_gqa=True,
    )
    out: Tensor = y.reshape(batch, -1)
    return out


Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(batch: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Operands:
    """q, k, v, cosine, sine and caches with room for 300 tokens."""
    shapes: list[tuple[int, ...]] = [(batch, n * dim) for n in (heads, kv_heads, kv_heads)]
    shapes += [(300, dim), (300, dim), (batch, kv_heads, dim, 300), (batch, kv_heads, 300, dim)]
    g = torch.Generator().manual_seed(dim)
    q, k, v, *rest = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    cosine, sine, keys, values = rest
    return q, k, v, cosine, sine, keys, values


def attend(given: Operands, position: int, scaling: float, threads: int = 2) -> Tensor:
    out, at = torch.empty_like(given[0]), torch.tensor(position)
    prepared_attention(*given, out, at, scaling, threads)()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 299])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 64), (8, 1, 80), (3, 3, 130)]
)
def test_attention_is_its_definition(
    heads: int, kv_heads: int, dim: int, position: int, dtype: torch.dtype
) -> None:
    given, ours = (operands(2, heads, kv_heads, dim, dtype) for _ in range(2))
    got, want = attend(ours, position, dim**-0.5), attention(*given, position, dim**-0.5)
    epsilon = torch.finfo(dtype).eps * (32 if dtype == torch.float32 else 4)  # sums, or rounding
    torch.testing.assert_close(got, want, rtol=epsilon, atol=epsilon)
    for mine, theirs in zip(ours, given, strict=True):  # the caches, and nothing else, are written
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_the_same_on_every_cpu_and_any_threads(dtype: torch.dtype) -> None:
    assert lib is not None
    best, found = lib.cpu(), []
    try:
        for cpu in lib.cpus():
            lib.use_cpu(cpu)
            for threads in (1, 2, 7):
                found.append(attend(operands(3, 8, 2, 72, dtype), 299, 0.1, threads))
    finally:
        lib.use_cpu(best)
    assert all(torch.equal(each, found[0]) for each in found)


def test_attention_to_one_token_that_stands_out() -> None:
    given = operands(1, 1, 1, 64, torch.float32)
    q, _, _, cosine, sine, keys, values = given
    cosine.fill_(1), sine.fill_(0), keys.zero_()
    keys[..., 17] = 1000 * q[0]
    got = attend(given, 200, 1.0)
    assert torch.equal(got[0], values[0, 0, 17])  # e^-87 of the others is lost in rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n"),
    [((1, 1), 1), ((3, 15), 15), ((2, 5, 64), 16), ((1, 2048), 2048), ((70, 1000), 1000)],
)
def test_the_norm_is_its_definition(shape: tuple[int, ...], n: int, dtype: torch.dtype) -> None:
    assert lib is not None
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(shape, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    best, found = lib.cpu(), []
    try:
        for cpu in lib.cpus():
            lib.use_cpu(cpu)
            for threads in (1, 3):
                out = torch.empty_like(x)
                prepared_norm(x, weight, 1e-5, out, threads)()
                found.append(out)
    finally:
        lib.use_cpu(best)
    assert all(torch.equal(each, found[0]) for each in found)
    epsilon = 2 * torch.finfo(dtype).eps
    want = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found[0], want, rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_the_gate_is_its_definition(activation: str, dtype: torch.dtype) -> None:
    assert lib is not None
    x = torch.cat([torch.linspace(-120, 120, 20001), torch.randn(5), torch.tensor([0.0, -0.0])])
    gate, up = x.to(dtype).view(1, -1), torch.randn(1, len(x)).to(dtype)
    best, found = lib.cpu(), []
    try:
        for cpu in lib.cpus():
            lib.use_cpu(cpu)
            out = torch.empty_like(gate)
            prepared_gate(gate, up, activation, out, 2)()
            found.append(out)
    finally:
        lib.use_cpu(best)
    assert all(torch.equal(each, found[0]) for each in found)
    epsilon = 4 * torch.finfo(dtype).eps
    want = gated(gate, up, activation)
    torch.testing.assert_close(found[0], want, rtol=epsilon, atol=1e-35)
    nothing = torch.tensor([[float("nan")]], dtype=dtype)
    prepared_gate(nothing, nothing, activation, nothing, 1)()
    assert nothing.isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 500, 64), (3, 70, 200), (4, 33, 1000)])
def test_dense_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert lib is not None
    count, rows, cols = shape
    x, weight = torch.randn(count, cols).to(dtype), torch.randn(rows, cols).to(dtype)
    best, found = lib.cpu(), []
    try:
        for cpu in lib.cpus():
            lib.use_cpu(cpu)
            for threads in (1, 2, 7):
                out = torch.empty(count, rows, dtype=dtype)
                prepared_dense(x, weight, out, threads)()
                found.append(out)
    finally:
        lib.use_cpu(best)
    assert all(torch.equal(each, found[0]) for each in found)
    want = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(found[0], want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_wrong_sizes_are_refused() -> None:
    assert lib is not None
    given = operands(1, 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="position is 300; expected less than the capacity 300"):
        attend(given, 300, 1.0)
    with pytest.raises(ValueError, match="heads of queries"):
        lib.attend("F32", 1, 3, 2, 8, 3, 1.0, [0] * 9, 1)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        lib.gate("F32", "gelu", 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="tokens, rows and cols are 1, 1 and 0"):
        lib.dense("F32", 1, 1, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="rows and n are 1 and 0"):
        lib.rms_norm("F32", 1, 0, 0, 0, 1e-5, 0, 1)
    q, k, v, cosine, sine, keys, values = given
    with pytest.raises(ValueError, match="do not fit"):
        attend((q.to(torch.bfloat16), k, v, cosine, sine, keys, values), 0, 1.0)


def test_a_full_cache_is_said() -> None:
    model = dense("llama")
    with torch.inference_mode():
        decoder = Decoder(model, tokens(1, 3), 4)
        decoder.step(tokens(1, 1)[0])
        with pytest.raises(ValueError, match="position is 4; expected less than the capacity 4"):
            decoder.step(tokens(1, 1)[0])
