"""Packed layers held in lanes: the kernels' numbers, the stored form for everyone outside."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from packing import pack_checkpoint
from test_experts import HIT, Looping, Transposed, X, packed_and_dense
from test_linear import filled, random
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.errors import FormatError, UsageError
from ternarize.files import container
from ternarize.measure import bench
from ternarize.native import lib
from ternarize.runtime import forms, products
from ternarize.runtime.forms import Layout
from ternarize.runtime.modules.embedding import packed_embedding
from ternarize.runtime.modules.experts import dense_experts
from ternarize.runtime.modules.linear import TernaryLinear, prepared_linears
from ternarize.runtime.packed import use_lanes
from ternarize.trits import int8
from ternarize.trits.methods.absmean import absmean
from ternarize.trits.scales import scale_codes

pytestmark = pytest.mark.skipif(lib is None, reason="lanes need the compiled core")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
X32 = random(3, 200, seed=9)
COLS, ROWS = 200, 90  # tails of groups, and of blocks of 64 and of 80 rows


def layer_of(
    group_size: int, planes: int = 1, bias: bool = True, scale8: bool = False, **options: Any
) -> TernaryLinear:
    """A random packed layer, in its stored form."""
    dtype = torch.uint8 if scale8 else torch.float16
    layer = TernaryLinear(
        COLS, ROWS, bias, group_size=group_size, planes=planes, scale_dtype=dtype, **options
    )
    ternary = [absmean(random(ROWS, COLS, seed=n) * 0.1, group_size) for n in range(planes)]
    packed, scale = container.encode(*ternary)
    layer.weight.data = packed
    layer.weight_scale.data = scale_codes(scale) if scale8 else scale
    if bias:
        layer.bias.data = random(ROWS, seed=5)
    return layer


def in_lanes(layer: TernaryLinear) -> TernaryLinear:
    """A copy that the kernels multiply."""
    other = copy.deepcopy(layer)
    other.use_lanes()
    assert other.layouts["weight"].lanes is not None and other.weight.ndim == 1
    return other


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group_size", [32, 128, -1, 0])
def test_the_error_is_about_that_of_a_dense_product(
    group_size: int, planes: int, dtype: torch.dtype
) -> None:
    """In 16 bits no larger. In float32 sums as short as these hardly round, but inputs do, to a
    fixed point: 1.7 times.
    """
    layer = layer_of(group_size, planes).to(dtype)
    weight, bias = layer.dequantized(torch.float32).double(), layer.bias.double()
    for tokens in (1, 37):
        x = random(tokens, COLS, seed=2).to(dtype)
        exact = F.linear(x.double(), weight, bias)
        ours, theirs = in_lanes(layer)(x), layer(x)
        assert ours.dtype == dtype and ours.shape == theirs.shape
        errors = [float((y.double() - exact).detach().norm()) for y in (ours, theirs)]
        assert errors[0] <= (2 if dtype == torch.float32 else 1.05) * errors[1], tokens


@pytest.mark.parametrize("scale8", [False, True])
@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_rounded_activations_equal_their_definition(group_size: int, scale8: bool) -> None:
    layer = layer_of(group_size, bias=False, scale8=scale8, activations="int8")
    x = random(2, 5, COLS, seed=2)
    ours, twin = in_lanes(layer)(x), layer(x)
    assert float((ours - twin).abs().max()) <= 2e-6 * float(twin.abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_lanes(layer)(x), ours)


def test_a_rotated_layer_meets_its_rotated_input() -> None:
    layer = layer_of(8, rotation=(8, 3))
    x = random(3, COLS)
    assert torch.allclose(in_lanes(layer)(x), layer(x), atol=1e-5)
    assert torch.equal(in_lanes(layer).dequantized(torch.float32), layer.dequantized(torch.float32))


def test_autocast_chooses_the_dtype() -> None:
    layer, x = layer_of(32), random(3, COLS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, dense = in_lanes(layer)(x), layer(x)  # and made there, out of scales in float16
    assert ours.dtype == dense.dtype == torch.bfloat16
    assert torch.allclose(ours, dense, rtol=2e-2, atol=2e-2)


def test_layers_that_share_an_input_give_what_each_gives_alone() -> None:
    plain = [in_lanes(layer_of(32, bias=False)) for _ in range(3)]
    outs = [torch.empty(3, ROWS) for _ in plain]
    call = prepared_linears(plain, X32, outs)
    assert call is not None
    call()
    assert all(torch.equal(y, m(X32)) for y, m in zip(outs, plain, strict=True))
    turned = in_lanes(layer_of(32, bias=False, rotation=(4, 7)))
    other = [nn.Linear(COLS, ROWS), layer_of(32), in_lanes(layer_of(32)), turned]
    other += [in_lanes(layer_of(32, 2, bias=False))]
    for module in other:
        assert prepared_linears([module], X32, outs[:1]) is None
    other_groups = in_lanes(layer_of(-1, bias=False))
    assert prepared_linears([*plain, other_groups], X32, outs) is None


def test_threads_change_nothing() -> None:
    layer, before = in_lanes(layer_of(32)), torch.get_num_threads()
    x, found = random(9, COLS), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_tokens_do_not_depend_on_their_batch() -> None:
    layer, x = in_lanes(layer_of(32)), random(5, 7, COLS)
    assert torch.equal(torch.stack([layer(row) for row in x]), layer(x))
    assert layer(x[:0]).shape == (0, 7, ROWS)


def test_inputs_that_kernels_do_not_take_go_the_dense_way() -> None:
    layer = layer_of(32, bias=False)
    x = random(3, COLS).double()
    assert torch.equal(in_lanes(layer)(x), layer(x))


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_gradients_are_those_of_the_stored_form(activations: str) -> None:
    layer = layer_of(32, activations=activations)
    x, factor = random(5, COLS).requires_grad_(), random(5, ROWS, seed=3)
    grads = []
    for each in (in_lanes(layer), layer):
        grads.append(torch.autograd.grad((each(x) * factor).sum(), (x, each.bias)))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


# --- int8 weights ----------------------------------------------------------------------------


def int8_layer(group_size: int = 32, bias: bool = True) -> TernaryLinear:
    layer = TernaryLinear(COLS, ROWS, bias, group_size=group_size, codec="int8")
    q, scale = int8.encode_int8(random(ROWS, COLS) * 0.1, group_size, torch.float16)
    layer.weight.data, layer.weight_scale.data = q, scale
    if bias:
        layer.bias.data = random(ROWS, seed=5)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_int8_weights_are_multiplied_as_they_are(
    group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = int8_layer(group_size).to(dtype)
    weight, bias = layer.dequantized(torch.float32).double(), layer.bias.detach().double()
    monkeypatch.setattr(products, "dense_matrix", None)
    for tokens in (1, 37):
        x = random(tokens, COLS, seed=2).to(dtype)
        y = layer(x).detach()
        error = y.double() - F.linear(x.double(), weight, bias)
        assert y.dtype == dtype
        assert float(error.abs().max()) <= 8 * torch.finfo(dtype).eps * float(y.abs().max())


def test_what_int8_kernels_do_not_take_goes_the_dense_way() -> None:
    layer, x = int8_layer(bias=False), random(3, COLS)
    dense = layer.dequantized(torch.float64)
    assert torch.equal(layer(x.double()), F.linear(x.double(), dense))
    strided = copy.deepcopy(layer)
    strided.weight.data = layer.weight.data.T.contiguous().T
    assert torch.allclose(strided(x), layer(x), atol=1e-5)


def test_int8_weights_and_autocast() -> None:
    layer, x = int8_layer(), random(3, COLS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), layer(x), rtol=2e-2, atol=2e-2)


def test_gradients_through_int8_weights() -> None:
    layer, x = int8_layer(), random(3, COLS).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    assert torch.allclose(x.grad, layer.dequantized(torch.float32).sum(0).expand(3, -1), atol=1e-5)


def test_int8_weights_compile_into_one_graph() -> None:
    layer, x = int8_layer(), random(3, COLS)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    weight, scale = layer.weight.detach(), layer.weight_scale.detach()
    operator = torch.ops.ternarize.int8_product.default
    for one in (random(2, 3, COLS), random(1, COLS).bfloat16()):
        torch.library.opcheck(operator, (one, weight, scale, 32, False))


# --- the compiler --------------------------------------------------------------------------------


def test_the_operator_keeps_its_schema() -> None:
    layer = in_lanes(layer_of(32, bias=False))
    lanes = layer.layouts["weight"].lanes
    assert lanes is not None
    weight, scale = layer.weight.detach(), layer.weight_scale.detach()
    for x in (random(2, 3, COLS), random(1, COLS).bfloat16()):
        torch.library.opcheck(
            torch.ops.ternarize.product.default, (x, weight, scale, ROWS, 32, lanes.form, False)
        )


def test_it_compiles_into_one_graph() -> None:
    layer, x = in_lanes(layer_of(32, planes=2)), random(3, COLS)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


# --- what leaves a module ------------------------------------------------------------------------


@pytest.mark.parametrize("scale8", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group_size", [32, -1, 0])
def test_the_stored_bytes_come_back(group_size: int, planes: int, scale8: bool) -> None:
    layer = layer_of(group_size, planes, scale8=scale8)
    lanes = in_lanes(layer)
    assert same_bytes(lanes, layer)
    assert lanes.layouts["weight"].lanes is not None  # still
    assert torch.equal(lanes.dequantized(torch.float32), layer.dequantized(torch.float32))
    assert lanes.use_stored() and not lanes.use_stored()
    assert lanes.layouts == layer.layouts
    x = random(3, COLS)
    assert torch.equal(lanes(x), layer(x))


def test_copies_and_pickles_are_stored_and_fast_again() -> None:
    layer = in_lanes(layer_of(32))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert layer.__getstate__()["_parameters"]["weight"].shape == (ROWS, 44)
    x = random(3, COLS)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert other.layouts == layer.layouts
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded(assign: bool) -> None:
    layer, other = layer_of(32), in_lanes(layer_of(32))
    layer.weight.data = layer.weight.data.flip(0).contiguous()
    state = layer.state_dict()
    other.load_state_dict(state, assign=assign)
    assert other.layouts["weight"].lanes is not None
    assert state["weight"].shape == (ROWS, 44)  # not changed under its owner
    x = random(3, COLS)
    assert torch.equal(other(x), in_lanes(layer)(x))


def test_a_state_dict_of_others_leaves_lanes_where_they_are() -> None:
    layer = in_lanes(layer_of(32))
    at = layer.weight.data_ptr()
    layer.load_state_dict({"bias": torch.zeros(ROWS)}, strict=False)
    assert layer.weight.data_ptr() == at and not layer.bias.any()


def test_a_damaged_layer_can_be_loaded_again() -> None:
    layer = in_lanes(layer_of(32))
    good = layer.state_dict()
    layer.weight.data.fill_(255)
    layer.load_state_dict(good)
    assert same_bytes(layer, in_lanes(layer_of(32)))
    assert layer.layouts["weight"].lanes is not None


def test_a_state_dict_of_another_size_is_refused_and_changes_nothing() -> None:
    layer = in_lanes(layer_of(32))
    other = {name: tensor[1:] for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        layer.load_state_dict(other)
    assert layer.layouts["weight"].lanes is not None
    assert same_bytes(layer, in_lanes(layer_of(32)))


def test_an_input_of_another_width_is_refused() -> None:
    layer = in_lanes(layer_of(32))
    with pytest.raises(UsageError, match="input: 199 columns; the layer has 200"):
        layer(X32[:, :199])


def test_another_device_gets_the_stored_form() -> None:
    layer = in_lanes(layer_of(32)).to("meta")
    assert layer.layouts["weight"].lanes is None and layer.weight.shape == (ROWS, 44)


def test_a_cast_leaves_lanes_and_scales_alone() -> None:
    layer = in_lanes(layer_of(32)).to(torch.bfloat16)
    assert layer.layouts["weight"].lanes is not None
    assert layer.weight_scale.dtype == torch.float16 and layer.bias.dtype == torch.bfloat16


# --- what stays stored ---------------------------------------------------------------------------


def test_shared_and_looked_up_parameters_stay_stored() -> None:
    model: Any = nn.ModuleDict({"alone": filled(24, 136, 32), "head": filled(24, 136, 32)})
    embedding = nn.Embedding(24, 136)
    packed_embedding(embedding, Layout(136, 32), 24, torch.float16)
    model["embedding"] = embedding
    embedding.weight, embedding.weight_scale = model["head"].weight, model["head"].weight_scale
    model["int8"] = TernaryLinear(136, 24, codec="int8")
    use_lanes(model)
    held = {name: module.layouts["weight"].lanes is not None for name, module in model.items()}
    assert held == {"alone": True, "head": False, "embedding": False, "int8": False}


def test_a_byte_that_is_no_code_is_refused_with_its_place() -> None:
    layer = layer_of(32)
    layer.weight.data[3, 5] = 255
    with pytest.raises(FormatError, match="up: byte 137: 255 is not a base-3 code"):
        use_lanes(nn.ModuleDict({"up": layer}))


def test_without_the_core_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "lib", None)
    layer = layer_of(32)
    layer.use_lanes()
    assert layer.layouts["weight"].lanes is None


# --- fused experts ---------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("cls", [Looping, Transposed])
def test_experts_in_lanes(
    cls: type[Looping], activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, _ = packed_and_dense(cls, activations)
    expected, before = experts(X, HIT), experts.state_dict()
    experts.use_lanes()
    assert all(layout.lanes is not None for layout in experts.layouts.values())
    read: list[int] = []
    multiply = products._multiply

    def counted(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        read.append(packed.data_ptr())
        return multiply(x, packed, *rest)

    monkeypatch.setattr(products, "_multiply", counted)
    assert torch.allclose(experts(X, HIT), expected, atol=1e-5)
    assert len(read) == len(set(read)) == 4  # two matrices of experts 0 and 2
    after: dict[str, Tensor] = experts.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = copy.deepcopy(experts)
    assert torch.equal(again(X, HIT), experts(X, HIT))
    dense_experts(experts, torch.float32)
    assert experts.up_proj.shape == (4, 24, 40)


# --- whole models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    tiny_models.save("llama", folder / "source")
    pack_checkpoint(folder / "source", folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_texts_of_a_padded_batch_are_those_of_each_alone(
    packed: Path, activations: str, cache: str
) -> None:
    model: Any = ternarize.load(packed, dtype=torch.float32, activations=activations)
    held = [module.layouts for module in model.modules() if isinstance(module, TernaryLinear)]
    assert held and all(layouts["weight"].lanes is not None for layouts in held)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    options["cache_implementation"] = cache if cache == "static" else None
    prompts = [torch.arange(5, 14), torch.arange(20, 24)]
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    both = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
        assert torch.equal(both[row], alone[0, len(prompt) :])


# --- measuring ---------------------------------------------------------------------------


def small_model() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_bench_counts_what_a_token_reads() -> None:
    model = small_model()
    parameters = sum(p.nbytes for p in model.parameters())
    embedding = model.model.embed_tokens.weight.nbytes
    assert bench.bytes_per_step(model) == parameters - embedding + embedding // 50
    assert bench.bytes_per_step(model, 50) == parameters
    model.lm_head.weight = model.model.embed_tokens.weight  # the head reads all of it
    assert bench.bytes_per_step(model) == sum(p.nbytes for p in model.parameters())


def test_bench_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)
    result = bench.bench(small_model(), prompt=5, decode=3, batch=2, repeats=2)
    for key in ("prompt_tokens_per_second", "decode_tokens_per_second", "bandwidth"):
        assert result[key] > 0
    assert result["share_of_bandwidth"] == result["bytes_per_second"] / result["bandwidth"]
    rate = result["bytes_per_step"] * result["decode_tokens_per_second"] / 2
    assert result["bytes_per_second"] == pytest.approx(rate)
    with pytest.raises(UsageError, match="decode: 0; expected 1 to"):
        bench.bench(small_model(), decode=0)
    with pytest.raises(UsageError, match="the model's context of 64 together"):
        bench.bench(small_model(), prompt=60, decode=5)


def test_bench_measures_a_model_with_another_memory_than_keys_and_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=32, state_size=4, num_hidden_layers=1
    )
    model: Any = transformers.MambaForCausalLM(config)
    model.eval()
    result = bench.bench(model, prompt=5, decode=3, repeats=1)
    assert result["decode_tokens_per_second"] > 0


def test_bench_on_the_command_line(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)
    arguments = ["bench", str(packed), "--prompt", "4", "--decode", "2", "--repeats", "1"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tokens/s" in shown.output and "share of memory" in shown.output
    result = CliRunner().invoke(app, [*arguments, "--batch", "3", "--json"])
    table = json.loads(result.stdout)
    assert (table["batch"], table["prompt"], table["decode"]) == (3, 4, 2)
    assert table["bytes_per_step"] > 0 and table["decode_tokens_per_second"] > 0
    refused = CliRunner().invoke(app, [*arguments, "--threads", "0"])
    assert refused.exit_code == 2
