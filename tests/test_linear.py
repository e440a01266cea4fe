"""TernaryLinear computes what a dense layer with the same weights computes."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ternarize.errors import UsageError
from ternarize.files import container
from ternarize.native import lib
from ternarize.runtime import kernels
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.modules.matrix import PackedMatrix
from ternarize.runtime.products import rounded_linear
from ternarize.trits import base3, int8
from ternarize.trits.methods.absmean import absmean
from ternarize.trits.rotation import rotate, unrotate

GROUP_SIZES = [32, 128, -1, 0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(
    rows: int, cols: int, group_size: int = 32, bias: bool = True, **kw: Any
) -> TernaryLinear:
    """A TernaryLinear that holds a random ternarized matrix."""
    packed, scale = container.encode(absmean(random(rows, cols), group_size))
    layer = TernaryLinear(cols, rows, bias, group_size=group_size, **kw)
    layer.weight.data, layer.weight_scale.data = packed, scale
    if bias:
        layer.bias.data = random(rows, seed=1)
    return layer


# --- linear layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_forward_equals_a_dense_layer_bit_for_bit(group_size: int, dtype: torch.dtype) -> None:
    layer, x = filled(24, 136, group_size).to(dtype), random(2, 5, 136, seed=2).to(dtype)
    dense = F.linear(x, layer.dequantized(dtype), layer.bias)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, dense)


def test_the_dense_weight_is_scale_times_trit() -> None:
    ternary = absmean(random(24, 136), 32)
    layer = filled(24, 136, 32)
    scales = layer.weight_scale.double().repeat_interleave(32, dim=1)[:, :136]
    assert torch.equal(layer.dequantized(torch.float32), (scales * ternary.trits).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_sum_of_two_planes_is_computed_in_float32(group_size: int, dtype: torch.dtype) -> None:
    planes = [absmean(random(24, 136, seed=seed), group_size) for seed in (0, 1)]
    layer = TernaryLinear(136, 24, bias=False, group_size=group_size, planes=2)
    shapes = layer.weight.shape, layer.weight_scale.shape
    layer.weight.data, layer.weight_scale.data = container.encode(*planes)
    assert (layer.weight.shape, layer.weight_scale.shape) == shapes
    single = TernaryLinear(136, 24, bias=False, group_size=group_size)
    dense = torch.zeros(24, 136)
    for plane in planes:
        single.weight.data, single.weight_scale.data = container.encode(plane)
        dense = dense + single.dequantized(torch.float32)
    assert torch.equal(layer.dequantized(dtype), dense.to(dtype))
    x = random(3, 136, seed=2).to(dtype).requires_grad_()
    assert torch.equal(layer(x), F.linear(x, dense.to(dtype)))
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(grad, dense.sum(0).to(dtype).expand(3, -1), rtol=2e-2, atol=0.1)


def test_fused_matrices_of_two_planes_keep_a_scale_each() -> None:
    parts = [
        container.encode(absmean(random(8, 20, seed=n), 0), absmean(random(8, 20, seed=n + 3), 0))
        for n in range(3)
    ]
    layer = TernaryLinear(20, 24, bias=False, group_size=0, scale_rows=3, planes=2)
    layer.weight.data = torch.cat([packed for packed, _ in parts])
    layer.weight_scale.data = torch.cat([scale for _, scale in parts])
    single = TernaryLinear(20, 8, bias=False, group_size=0, planes=2)
    rows = []
    for single.weight.data, single.weight_scale.data in parts:
        rows.append(single.dequantized(torch.float32))
    assert torch.equal(layer.dequantized(torch.float32), torch.cat(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_an_int8_layer_multiplies_by_scale_times_integer(
    group_size: int, dtype: torch.dtype
) -> None:
    weight = random(24, 136)
    layer = TernaryLinear(136, 24, bias=False, group_size=group_size, codec="int8")
    q, scale = int8.encode_int8(weight, group_size, torch.float16)
    assert (layer.weight.dtype, layer.weight.shape) == (q.dtype, q.shape)
    assert layer.weight_scale.shape == scale.shape
    layer.weight.data, layer.weight_scale.data = q, scale
    length = 136 if group_size <= 0 else group_size
    wide = scale.double().repeat_interleave(length, 1)[:, :136]
    dense = (wide * q).float()
    assert torch.equal(layer.dequantized(dtype), dense.to(dtype))
    assert float((dense - weight).abs().max()) < 0.6 * float(wide.max())
    x = random(3, 136, seed=2).to(dtype)
    if lib is None:
        assert torch.equal(layer(x), F.linear(x, dense.to(dtype)))
    else:
        definition = kernels.product_of_trits(x, q, scale, group_size, "none")
        assert torch.equal(layer(x), definition)
    exact, norm = F.linear(x.double(), dense.double()), torch.linalg.vector_norm
    error = layer(x).double() - exact
    assert float(norm(error)) <= 4 * torch.finfo(dtype).eps * float(norm(exact))


def test_fused_matrices_keep_a_scale_each() -> None:
    parts = [absmean(random(8, 20, seed=seed) * (seed + 1), 0) for seed in range(3)]
    stored = [container.encode(part) for part in parts]
    layer = TernaryLinear(20, 24, bias=False, group_size=0, scale_rows=3)
    layer.weight.data = torch.cat([packed for packed, _ in stored])
    layer.weight_scale.data = torch.cat([scale for _, scale in stored])
    single = TernaryLinear(20, 8, bias=False, group_size=0)
    rows = []
    for single.weight.data, single.weight_scale.data in stored:
        rows.append(single.dequantized(torch.float32))
    assert torch.equal(layer.dequantized(torch.float32), torch.cat(rows))


def test_nothing_dense_is_kept_between_calls() -> None:
    layer = filled(24, 136)
    layer(random(1, 136))
    tensors = [*layer.parameters(), *layer.buffers()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held == 24 * base3.packed_width(136, 32) + 24 * 5 * 2 + 24 * 4
    assert not any(isinstance(value, Tensor) for value in vars(layer).values())


def test_it_is_a_linear_layer_to_other_software() -> None:
    layer = filled(24, 136)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (136, 24)
    assert repr(layer) == (
        "TernaryLinear(in_features=136, out_features=24, bias=True, group_size=32, "
        "activations=none)"
    )


def test_casting_a_model_leaves_the_scales_alone() -> None:
    layer = filled(24, 136)
    before = layer.weight_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float16
    assert torch.equal(layer.weight_scale, before)
    assert layer.bias.dtype == torch.bfloat16


def test_copies_and_pickles_compute_the_same() -> None:
    layer, x = filled(24, 136), random(3, 136)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))


def test_it_compiles_into_one_graph() -> None:
    layer, x = filled(24, 136, bias=False), random(3, 136)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(UsageError, match="activations: 'int4'; expected one of none, int8"):
        filled(8, 20, activations="int4")


# --- rotated matrices --------------------------------------------------------------------------


def rotated(block: int, seed: int = 7, planes: int = 1, bias: bool = True, **kw: Any) -> Any:
    """A TernaryLinear whose stored matrix stands for W R, and the stored matrix."""
    layer = TernaryLinear(256, 24, bias, group_size=32, planes=planes, rotation=(block, seed), **kw)
    matrices = [absmean(random(24, 256, seed=n), 32) for n in range(planes)]
    layer.weight.data, layer.weight_scale.data = container.encode(*matrices)
    if bias:
        layer.bias.data = random(24, seed=1)
    flat = TernaryLinear(256, 24, bias=False, group_size=32, planes=planes)
    flat.weight.data, flat.weight_scale.data = layer.weight.data, layer.weight_scale.data
    return layer, flat.dequantized(torch.float32)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("block", [4, 16, 64, 256])
def test_a_rotated_layer_is_a_dense_layer_with_the_matrix_turned_back(
    block: int, planes: int
) -> None:
    layer, stored = rotated(block, planes=planes)
    weight = layer.dequantized(torch.float32)
    assert torch.equal(weight, unrotate(stored, block, 7))
    assert not torch.allclose(weight, stored, atol=0.1)
    for shape in ((256,), (1, 256), (2, 5, 256)):
        x = random(*shape, seed=2)
        y, dense = (t.detach() for t in (layer(x), F.linear(x, weight, layer.bias)))
        assert y.shape == dense.shape
        # of sums of 256 products
        assert float((y - dense).abs().max()) <= 1e-5 * float(dense.abs().max())


def test_gradients_flow_through_a_rotation() -> None:
    layer, _ = rotated(64)
    x, factor = random(5, 256, seed=2).requires_grad_(), random(5, 24, seed=3)
    ours = torch.autograd.grad((layer(x) * factor).sum(), (x, layer.bias))
    dense = F.linear(x, layer.dequantized(torch.float32), layer.bias)
    theirs = torch.autograd.grad((dense * factor).sum(), (x, layer.bias))
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_a_layer_that_ran_in_inference_mode_can_be_trained_through() -> None:
    layer, _ = rotated(64, seed=101)  # of no other test: the first call makes its signs
    with torch.inference_mode():
        expected = layer(random(2, 256))
    x = random(2, 256).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(layer(x), expected) and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_meet_a_rotated_matrix(dtype: torch.dtype) -> None:
    """The rotation of x is one rounding more than a dense product in that dtype has."""
    layer, _ = rotated(256)
    layer.to(dtype)
    x = random(16, 256, seed=2).to(dtype)
    weight, bias = layer.dequantized(torch.float32), layer.bias.float()
    exact = F.linear(x.float(), weight, bias)
    y, dense = layer(x), F.linear(x, layer.dequantized(dtype), layer.bias)
    assert y.dtype == dtype
    ours, theirs = (float((t.float() - exact).detach().norm()) for t in (y, dense))
    assert 0 < theirs and ours < 2 * theirs
    # the weight itself is rounded once, after it is turned back
    assert torch.equal(layer.dequantized(dtype), weight.to(dtype))


def test_rounded_activations_are_those_of_the_rotated_input() -> None:
    layer, stored = rotated(64, activations="int8", bias=False)
    x = random(5, 256, seed=2)
    expected = rounded_linear(rotate(x, 64, 7), stored)
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_rotated_layers_compile_into_one_graph() -> None:
    layers = [rotated(block, seed)[0] for block, seed in ((64, 102), (16, 103), (4, 2**32 - 1))]
    x = random(3, 256)
    with torch.no_grad():
        for layer in layers:  # a width, a block or a seed that changes is no variable
            compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
            assert torch.equal(compiled(x), layer(x))
            assert torch.equal(compiled(x[:2]), layer(x[:2]))


def test_a_rotation_is_shown_copied_and_pickled() -> None:
    layer, _ = rotated(64)
    assert "rotation=(64, 7)" in repr(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = random(3, 256)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))


def test_rows_of_a_rotated_embedding_are_turned_back() -> None:
    layer, _ = rotated(16, bias=False)
    matrix = PackedMatrix(layer.weight, layer.weight_scale, layer.layouts["weight"], torch.float32)
    ids = torch.tensor([[3, 0], [23, 3]])
    rows = layer.dequantized(torch.float32)[ids]
    assert torch.allclose(F.embedding(ids, matrix), rows, atol=1e-6)  # type: ignore[arg-type]


# --- gradients, for adapters trained on top ----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_those_of_a_dense_layer(dtype: torch.dtype) -> None:
    layer = filled(24, 136).to(dtype)
    x = random(5, 136, seed=2).to(dtype).requires_grad_()
    inputs, factor = (x, layer.bias), random(5, 24, seed=3)
    ours = torch.autograd.grad((layer(x) * factor).sum(), inputs)
    dense = F.linear(x, layer.dequantized(dtype), layer.bias)
    theirs = torch.autograd.grad((dense * factor).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and torch.allclose(a, b, rtol=1e-2, atol=1e-6)  # order of sums


def test_training_does_not_keep_the_dense_weight() -> None:
    layer, x = filled(24, 136), random(5, 136).requires_grad_()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert kept and max(kept) <= layer.weight.numel()


def test_rounded_activations_pass_gradients_straight_through() -> None:
    layer, x = filled(24, 136, activations="int8"), random(5, 136).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    expected = torch.ones(5, 24) @ layer.dequantized(torch.float32)
    assert torch.allclose(grad, expected, atol=1e-6)


# --- int8 activations --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_follow_their_definition(dtype: torch.dtype) -> None:
    layer = filled(24, 136, activations="int8").to(dtype)
    x = random(2, 5, 136, seed=2).to(dtype)
    expected = []
    for token in x.reshape(-1, 136).tolist():
        largest = max(abs(value) for value in token)
        q = [round(value * 127 / largest) for value in token]  # python rounds halves to even
        assert max(map(abs, q)) == 127
        sums = layer.dequantized(torch.float32).double() @ torch.tensor(q, dtype=torch.float64)
        expected.append((sums * largest / 127).to(dtype) + layer.bias)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.allclose(y.reshape(-1, 24), torch.stack(expected), rtol=1e-2, atol=1e-4)
    assert not torch.equal(y, F.linear(x, layer.dequantized(dtype), layer.bias))


def test_halves_round_to_even_and_the_range_is_symmetric() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    assert rounded_linear(x, torch.eye(7)).tolist() == [[127, 0, 2, 2, 0, -2, -127]]


def test_a_token_of_zeros_gives_the_bias() -> None:
    layer = filled(24, 136, activations="int8")
    x = random(2, 136)
    x[0] = 0
    assert torch.equal(layer(x)[0], layer.bias)
    assert layer(x).isfinite().all()


def test_an_infinite_input_is_not_hidden() -> None:
    x = random(2, 136)
    x[0, 3] = float("inf")
    y = filled(24, 136, activations="int8")(x)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_autocast_does_not_round_the_int8_product() -> None:
    layer, x = filled(24, 136, activations="int8", bias=False), random(2, 136)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)
