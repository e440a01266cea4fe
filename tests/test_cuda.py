"""The kernels for GPUs, on one: `python -m pytest tests/test_cuda.py`. Elsewhere they are skipped.

tests/test_triton.py has what can be tested without one.
"""

import io
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import ternarize
from ternarize.convert.run import convert
from ternarize.plans.recipe import Recipe
from ternarize.runtime.kernels import product_of_trits, quantize
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.tiles import TILES, has_triton, product_of_tiles, to_tiles
from ternarize.trits import base3
from ternarize.trits.scales import scale_codes, scale_values
from ternarize.trits.ternary import group_count

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_triton()), reason="no GPU with Triton"
)

SHAPES = [(300, 640, 128), (512, 2048, 64), (70, 300, 32), (96, 1024, 256), (33, 352, 96)]
SHAPES += [(130, 1000, -1), (256, 4096, 0), (64, 2048, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# a product rounded to the dtype, beside sums in float32
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def matrix(rows: int, cols: int, group_size: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random trits, scales as they are stored, and the dense matrix in float64."""
    torch.manual_seed(rows + cols)
    trits = torch.randint(-1, 2, (rows, cols), dtype=torch.int8)
    scale_rows = 1 if group_size == 0 else rows
    scales = torch.rand(scale_rows, group_count(cols, group_size)) + 0.1
    scales = scale_codes(scales) if kind == "codes" else scales.to(getattr(torch, kind))
    length = cols if group_size <= 0 else group_size
    wide = scale_values(scales, torch.float64).repeat_interleave(length, 1)[:, :cols]
    return trits, scales, wide * trits


def by_kernel(x: Tensor, trits: Tensor, scales: Tensor, group_size: int, rounded: bool) -> Tensor:
    (rows, cols), device = trits.shape, x.device
    tiles = to_tiles(base3.pack(trits, group_size).to(device), cols, group_size)
    by_group = scales.T.flatten().to(device)
    return product_of_tiles(
        x, tiles, by_group, rows, scales.shape[0], group_size, rounded, x.dtype == torch.float32
    )


# Each kernel takes a second to compile: every number of tokens and dtype with one shape, few with
# the others
Case = tuple[int, int, int, torch.dtype, tuple[int, ...]]
CASES: list[Case] = [(*shape, torch.bfloat16, (1, 2, 40)) for shape in SHAPES[1:]]
CASES += [(*SHAPES[0], torch.bfloat16, (1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 64, 65, 300))]
CASES += [(*SHAPES[0], torch.float16, (1, 17, 300)), (*SHAPES[0], torch.float32, (1, 16, 40))]
ROUNDED: list[Case] = [(*case[:4], (1, 16, 33)) for case in CASES if case[2] not in (96, 1024)]
ROUNDED += [(*SHAPES[0], torch.bfloat16, (100, 300))]


@pytest.mark.parametrize(("rows", "cols", "group_size", "dtype", "batches"), CASES)
def test_products_of_floats(
    rows: int, cols: int, group_size: int, dtype: torch.dtype, batches: tuple[int, ...]
) -> None:
    kinds = ["float16", "codes", "float32", "bfloat16"]
    trits, scales, dense = matrix(rows, cols, group_size, kinds[(rows + cols) // 2 % 4])
    for tokens in batches:
        x = torch.randn(tokens, cols).to(dtype)
        y = by_kernel(x.cuda(), trits, scales, group_size, False)
        right = x.double() @ dense.T
        error = (y.cpu() - right).norm() / right.norm()
        assert y.dtype == dtype and float(error) < ERRORS[dtype], (tokens, float(error))


@pytest.mark.parametrize(("rows", "cols", "group_size", "dtype", "batches"), ROUNDED)
def test_products_of_8_bits_are_the_definition_bit_for_bit(
    rows: int, cols: int, group_size: int, dtype: torch.dtype, batches: tuple[int, ...]
) -> None:
    trits, scales, _ = matrix(rows, cols, group_size, "float16")
    for tokens in batches:
        x = torch.randn(tokens, cols).to(dtype)
        y = by_kernel(x.cuda(), trits, scales, group_size, True)
        right = product_of_trits(x, trits, scales, group_size, "int8")
        assert torch.equal(y.cpu(), right), tokens


def test_tokens_are_rounded_as_the_definition_says() -> None:
    from ternarize.runtime.triton_kernels import round_tokens

    x = torch.randn(64, 5000) * 10
    x[1], x[2, 3], x[3, 5] = 0, torch.nan, 3e38
    for dtype in DTYPES:
        given = x.to(dtype)
        q, factor = round_tokens(given.cuda())
        right, by = quantize(given, "int8")
        assert torch.equal(q.cpu(), right[0])
        assert torch.equal(factor.cpu().nan_to_num(7), by.flatten().nan_to_num(7))


def form(module: TernaryLinear) -> str | None:
    lanes = module.layouts["weight"].lanes
    return None if lanes is None else lanes.form


def layer(planes: int = 1, bias: bool = False, activations: str = "none") -> TernaryLinear:
    made = TernaryLinear(
        640, 300, bias, group_size=128, activations=activations, planes=planes, dtype=torch.bfloat16
    )
    packed, scales = [], []
    for plane in range(planes):
        trits, scale, _ = matrix(300, 640, 128, "float16")
        packed.append(base3.pack(trits.roll(plane), 128))
        scales.append(scale)
    made.weight.data, made.weight_scale.data = torch.cat(packed, 1), torch.cat(scales, 1)
    if bias:
        made.bias.data = torch.randn(300, dtype=torch.bfloat16)
    return made.requires_grad_(False)


@pytest.mark.parametrize(("planes", "bias"), [(1, False), (1, True), (2, False), (2, True)])
def test_a_layer_computes_what_a_dense_one_does(planes: int, bias: bool) -> None:
    module = layer(planes, bias).cuda()
    stored = {name: t.clone() for name, t in module.state_dict().items()}
    dense, x = module.dequantized(torch.float64), torch.randn(2, 3, 640).bfloat16().cuda()
    right = x.double() @ dense.T + (module.bias.double() if bias else 0)
    module.use_lanes()
    assert form(module) == TILES
    assert float((module(x) - right).norm() / right.norm()) < 2.0**-8
    assert torch.equal(module.dequantized(torch.float64), dense)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    module.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert form(module) == TILES
    assert torch.equal(module.cpu().state_dict()["weight"], stored["weight"].cpu())


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_a_layer_compiles_into_one_graph_and_into_one_of_cuda(activations: str) -> None:
    module = layer(2, True, activations).cuda()
    module.use_lanes()
    x = torch.randn(3, 640).bfloat16().cuda()
    with torch.inference_mode():
        right = module(x)
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(module, fullgraph=True, mode=mode)
            for _ in range(3):
                assert torch.equal(compiled(x).clone(), right)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        y.zero_()
        graph.replay()
        assert torch.equal(y, right)


def test_gradients_flow_through_tiles() -> None:
    module = layer().cuda()
    dense = module.dequantized(torch.float32)
    module.use_lanes()
    x = torch.randn(4, 640, device="cuda", requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, dense.sum(0).expand(4, -1), atol=1e-4)


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_a_model_does_what_it_does_on_the_cpu(tmp_path: Path, activations: str) -> None:
    convert(TINY, tmp_path / "packed", Recipe(group_size=64))
    ids, found, texts = torch.tensor([[1, 5, 9, 20, 3]]), [], []
    for device in ("cpu", "cuda"):
        model = ternarize.load(
            tmp_path / "packed", device=device, dtype=torch.float32, activations=activations
        )
        forms = {form(each) for each in model.modules() if isinstance(each, TernaryLinear)}
        assert device == "cpu" or forms == {TILES}
        given, generate = ids.to(device), cast(Any, model.generate)
        with torch.inference_mode():
            found.append(model(given).logits.cpu())
        mask = torch.ones_like(given)
        texts.append(generate(given, attention_mask=mask, max_new_tokens=24, do_sample=False).cpu())
    error = (found[1] - found[0]).norm() / found[0].norm()
    if activations == "none":
        assert float(error) < 1e-5 and torch.equal(*texts)
    else:  # a difference of 1e-7 in an input can be one of 1 % in what it is rounded to
        assert float(error) < 0.02
