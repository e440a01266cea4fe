"""What was trained with `ternarize.qat` is packed as it is: trits and scales, bit for bit."""

from pathlib import Path
from typing import Any

import calibrating
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor

import ternarize
import ternarize.qat as qat
from ternarize.convert.run import convert
from ternarize.errors import OutputError, UsageError
from ternarize.plans.recipe import Recipe
from ternarize.qat.modules import LOG_SCALE, latent_modules
from ternarize.sources.packed import open_packed

IDS = torch.arange(3, 35).view(2, 16)


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny_models.build(name, dtype)


def train(model: Any, steps: int = 3, lr: float = 2e-3) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def rounded(model: Any) -> dict[str, Tensor]:
    """The weights of a forward in eval mode, by parameter."""
    with torch.no_grad():
        return {f"{p}.{n}": m.rounded(n) for p, m in latent_modules(model.eval()) for n in m.forms}


def assert_packed(model: Any, folder: Path, logits_off: float = 1e-5) -> None:
    """A packed checkpoint holds the very weights of the model, and gives its logits."""
    dense = ternarize.load(folder, dequantize=True)
    own = dict(dense.named_parameters(remove_duplicate=False))
    weights = rounded(model)
    assert weights
    for name, weight in weights.items():
        assert own[name].dtype == weight.dtype
        assert torch.equal(own[name], weight), name
    with torch.no_grad():
        ours, theirs = (m(input_ids=IDS).logits.float() for m in (model, ternarize.load(folder)))
    assert float((ours - theirs).abs().max()) <= logits_off * float(ours.abs().max())


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("llama", {}),
    "bitnet": ("llama", {"group_size": 0, "scale": "absmean", "activations": "int8"}),
    "absmean": ("llama", {"group_size": 32, "scale": "absmean", "estimator": "ste"}),
    "least-squares": ("llama", {"group_size": -1, "scale": "least-squares"}),
    "8 bits": ("llama", {"group_size": 32, "scale_bits": 8}),
    "8 bits of absmean": ("llama", {"group_size": 24, "scale_bits": 8, "scale": "absmean"}),
    "tanh": ("llama", {"estimator": "tanh"}),
    "some kept": ("llama", {"keep": ["*.q_proj.*"], "include": ["lm_head.weight"]}),
    "head": ("llama", {"head": "ternary", "activations": "int8"}),
    "tied ends": ("llama_tied", {"embeddings": "ternary"}),
    "tied ends, one scale": ("llama_tied", {"head": "ternary", "group_size": 0}),
    "scaled embedding": ("gemma3_text", {"embeddings": "ternary", "group_size": 16}),
    "transposed": ("gpt2", {}),
    "transposed, one scale": ("gpt2", {"group_size": 0, "activations": "int8"}),
    "experts": ("mixtral", {}),
    "experts, one scale": ("mixtral", {"group_size": 0}),
    "experts, absmean": ("qwen3_moe", {"group_size": -1, "scale": "absmean"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_is_packed_bit_for_bit(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    model = qat.prepare(build(name), **options)
    train(model)
    record = qat.pack(model, tmp_path / "packed")
    # an ulp before a rounding of inputs to 8 bits can be a step behind it
    assert_packed(model, tmp_path / "packed", 0.01 if "activations" in options else 1e-5)
    ternary = {n for n, t in record["tensors"].items() if t["becomes"] == "ternary"}
    assert all(record["tensors"][n]["method"] == "lossless" for n in ternary)
    assert ("activations", options.get("activations", "none")) in record["recipe"].items()


def test_a_model_in_16_bits_stays_one(tmp_path: Path) -> None:
    model = qat.prepare(build("llama_tied", torch.bfloat16), embeddings="ternary")
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    train(model)
    qat.pack(model, tmp_path / "packed")
    assert_packed(model, tmp_path / "packed", 0.02)
    assert ternarize.load(tmp_path / "packed").dtype == torch.bfloat16


def test_groups_of_zeros_and_scales_beyond_float16_are_packed(tmp_path: Path) -> None:
    model = build("llama")
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight[3, :32] = 0
        layer.self_attn.k_proj.weight.zero_()
        layer.mlp.down_proj.weight.mul_(1e-5)  # scales that only float32 holds
    qat.prepare(model, group_size=32)
    assert layer.mlp.down_proj.forms["weight"].scale_dtype == "F32"
    weights = rounded(model)
    assert not weights["model.layers.0.self_attn.q_proj.weight"][3, :32].any()
    assert float(weights["model.layers.0.mlp.down_proj.weight"].abs().max()) < 1e-5
    train(model)
    qat.pack(model, tmp_path / "packed")
    assert_packed(model, tmp_path / "packed")


def test_a_share_of_zeros_is_packed(tmp_path: Path) -> None:
    model = qat.prepare(build("llama"), group_size=32)
    qat.Schedule(model, zeros=0.8).at(1)
    record = qat.pack(model, tmp_path / "packed")
    assert_packed(model, tmp_path / "packed")
    zeros = [t["sparsity"] for t in record["tensors"].values() if t["becomes"] == "ternary"]
    assert all(abs(share - 0.8) < 1e-3 for share in zeros)


# --- from a packed checkpoint ---


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_models.save("llama", folder, torch.float32)
    return folder


def test_a_calibrated_and_rotated_start_is_packed_again(tmp_path: Path, source: Path) -> None:
    start, texts = tmp_path / "start", calibrating.data("llama", tmp_path)
    convert(source, start, calibrating.recipe(texts, scale_bits=8))
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    qat.prepare(model, start=start)
    forms = [form for _, module in latent_modules(model) for form in module.forms.values()]
    assert all(f.block for f in forms) and {f.scale_dtype for f in forms} == {"U8"}
    qat.pack(model, tmp_path / "same")  # nothing was trained: the very trits and scales again
    (before, records), (after, again) = (open_packed(p) for p in (start, tmp_path / "same"))
    for name, record in records.items():
        assert again[name].sha256 == record.sha256, name
    assert before.tensors.keys() == after.tensors.keys()
    before_training = rounded(model)
    train(model)
    assert any(not torch.equal(w, before_training[n]) for n, w in rounded(model).items())
    qat.pack(model, tmp_path / "trained")
    assert_packed(model, tmp_path / "trained")


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("llama_tied", Recipe("itf", 32, embeddings="ternary")),
        ("llama", Recipe("itf", -1, head="int8", keep=("*.q_proj.*",))),
        ("gpt2", Recipe("absmean", 0)),
        ("mixtral", Recipe("itf", 0)),
        ("qwen3_moe", Recipe("itf", 16, scale_bits=8)),
    ],
)
def test_a_start_is_the_packed_model_whatever_its_form(
    name: str, recipe: Recipe, tmp_path: Path
) -> None:
    model: Any = tiny_models.save(name, tmp_path / "source", torch.float32)
    model.eval()
    convert(tmp_path / "source", tmp_path / "start", recipe)
    qat.prepare(model, start=tmp_path / "start")
    assert_packed(model, tmp_path / "start")
    train(model)
    qat.pack(model, tmp_path / "packed")
    assert_packed(model, tmp_path / "packed")


def test_latents_of_a_start_are_the_float_weights_within_a_margin(
    tmp_path: Path, source: Path
) -> None:
    convert(source, tmp_path / "start", Recipe("itf", 32))
    dense: Any = transformers.LlamaForCausalLM.from_pretrained(source)
    model = qat.prepare(
        transformers.LlamaForCausalLM.from_pretrained(source), start=tmp_path / "start"
    )
    weights = rounded(model)
    for path, module in latent_modules(model):
        weight, stored = dense.get_submodule(path).weight, weights[f"{path}.weight"]
        scales = module.scales("weight").repeat_interleave(32, 1)[:, : weight.shape[1]]
        off = (module.latent("weight") - stored) / scales
        assert float(off.detach().abs().max()) <= 0.3 + 1e-3
        near = ((weight - stored) / scales).abs() < 0.29
        torch.testing.assert_close(module.latent("weight")[near], weight[near])


# --- mistakes ---


def test_mistakes_are_told_in_a_line(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM: has no weights that are trained"):
        qat.pack(build("llama"), tmp_path / "packed")
    with pytest.raises(UsageError, match="Sequential: has no weights"):
        qat.pack(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "packed")
    model = qat.prepare(build("llama"))
    with pytest.raises(UsageError, match="model: is prepared already"):
        qat.prepare(model)
    schedule = qat.Schedule(model, warmup=0.5)
    schedule.at(0.25)
    with pytest.raises(UsageError, match="still partly dense.*schedule.at"):
        qat.pack(model, tmp_path / "packed")
    schedule.at(1)
    (tmp_path / "packed").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        qat.pack(model, tmp_path / "packed")
    assert [each.name for each in tmp_path.iterdir()] == ["packed"]
    convert(source, tmp_path / "start", Recipe("itf", 32))
    with pytest.raises(UsageError, match="start: has no .*expected a packed checkpoint of this"):
        qat.prepare(build("gpt2"), start=tmp_path / "start")
    with pytest.raises(UsageError, match="'absmean'; expected one of learned for a start"):
        qat.prepare(build("llama"), start=tmp_path / "start", scale="absmean")
    with pytest.raises(UsageError, match="has packed weights"):
        qat.prepare(ternarize.load(tmp_path / "start"))


def test_a_state_dict_is_that_of_the_dense_model_and_log_scales() -> None:
    dense, model = build("llama"), qat.prepare(build("llama"))
    names = model.state_dict().keys()
    extra = names - dense.state_dict().keys()
    assert names > dense.state_dict().keys() and all(n.endswith(LOG_SCALE) for n in extra)
    assert len(extra) == 14
    result = dense.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and set(result.unexpected_keys) == extra
    plain = qat.prepare(build("llama"), scale="absmean")
    assert plain.state_dict().keys() == dense.state_dict().keys()
