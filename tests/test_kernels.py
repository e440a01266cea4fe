"""Products with packed weights: every variant of the core equals their definition in torch.

The definition, `product_of_trits`, is compared with float64 and with `products.rounded_linear`.
"""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import core_sources
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.native import lib
from ternarize.runtime import kernels
from ternarize.runtime.kernels import (
    LANES2,
    LANES3,
    from_lanes,
    product_of_lanes,
    product_of_trits,
    to_lanes,
)
from ternarize.runtime.products import rounded_linear
from ternarize.trits import base3, int4, int8
from ternarize.trits.scales import scale_codes
from ternarize.trits.ternary import group_count

HERE = Path(__file__).parent
GROUP_SIZES = (-1, 0, 1, 3, 4, 5, 64, 127, 128)
ACTIVATIONS = ("int8", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPUS: list[str] = lib.product_cpus() if lib is not None else []

native = pytest.mark.skipif(lib is None, reason="without the compiled core")
every_cpu = pytest.mark.parametrize("cpu", CPUS)
every_form = pytest.mark.parametrize("form", [LANES2, LANES3])
every_activations = pytest.mark.parametrize("activations", ACTIVATIONS)


@pytest.fixture(autouse=True)
def restore_cpu() -> Iterator[None]:
    yield
    if lib is not None:
        lib.use_cpu(CPUS[-1])


@pytest.fixture
def without_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "lib", None)


def use(cpu: str) -> list[str]:
    """Choose a variant; returns the forms that it multiplies."""
    assert lib is not None
    lib.use_cpu(cpu)
    return [LANES2, LANES3] if lib.has_lanes3() else [LANES2]


def random_trits(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, cols), dtype=torch.int8, generator=generator)


def random_scales(rows: int, cols: int, group_size: int) -> Tensor:
    """float16, as most files have them."""
    scale_rows = 1 if group_size == 0 else rows
    generator = torch.Generator().manual_seed(1)
    return torch.rand(scale_rows, group_count(cols, group_size), generator=generator).half()


def inputs(tokens: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(tokens, cols, generator=generator) * 3).to(dtype)


def run(
    x: Tensor,
    trits: Tensor,
    scales: Tensor,
    group_size: int,
    form: str,
    activations: str,
    threads: int = 2,
) -> Tensor:
    rows, cols = trits.shape
    lanes = to_lanes(base3.pack(trits, group_size), cols, group_size, form)
    in_order = kernels.scale_lanes(scales, rows, form)
    return product_of_lanes(x, lanes, in_order, rows, group_size, form, activations, threads)


_expected: dict[tuple[Any, ...], Tensor] = {}


def expected(
    x: Tensor, numbers: Tensor, scales: Tensor, group_size: int, activations: str
) -> Tensor:
    """What the definition gives, computed once for all variants of the core."""
    key: tuple[Any, ...] = group_size, activations
    for each in (x, numbers, scales):
        data = each.contiguous().view(torch.uint8).numpy().tobytes()
        key += each.dtype, each.shape, hashlib.sha256(data).digest()
    if key not in _expected:
        _expected[key] = product_of_trits(x, numbers, scales, group_size, activations)
    return _expected[key]


def assert_same(
    x: Tensor, trits: Tensor, scales: Tensor, group_size: int, form: str, activations: str
) -> None:
    got = run(x, trits, scales, group_size, form, activations)
    want = expected(x, trits, scales, group_size, activations)
    assert got.dtype == want.dtype == x.dtype
    assert torch.equal(got, want), f"{tuple(x.shape)} {tuple(trits.shape)} {group_size} {form}"


# ------------------------------------------------------------------------------------------------
# Layouts


@native
@every_form
@given(rows=st.integers(0, 170), cols=st.integers(1, 300), group_size=st.sampled_from(GROUP_SIZES))
@settings(max_examples=60, deadline=None)
def test_layouts_hold_the_trits(form: str, rows: int, cols: int, group_size: int) -> None:
    trits = random_trits(rows, cols, seed=cols)
    packed = base3.pack(trits, group_size)
    lanes = to_lanes(packed, cols, group_size, form, threads=2)
    assert len(lanes) == kernels.lanes_shape(form, rows, cols, group_size)[0]
    assert torch.equal(kernels.trits_of_lanes(lanes, rows, cols, group_size, form), trits)
    assert torch.equal(from_lanes(lanes, rows, cols, group_size, form, threads=2), packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "lib", None)
        assert torch.equal(to_lanes(packed, cols, group_size, form), lanes)
        assert torch.equal(from_lanes(lanes, rows, cols, group_size, form), packed)


@native
def test_the_core_and_python_agree_on_sizes() -> None:
    assert lib is not None
    for form, rows, cols, group_size in itertools.product(
        (LANES2, LANES3), (0, 1, 64, 80, 161), (1, 4, 127, 130), GROUP_SIZES
    ):
        shape = kernels.lanes_shape(form, rows, cols, group_size)
        assert lib.lanes_shape(form, rows, cols, group_size) == shape


@every_form
def test_bytes_that_are_not_codes_are_refused(form: str) -> None:
    packed = base3.pack(random_trits(100, 60), -1)
    packed[97, 3], packed[99, 0] = 250, 251
    with pytest.raises(FormatError, match=f"byte {97 * 12 + 3}: 250"):
        to_lanes(packed, 60, -1, form)


@native
@every_form
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_overwritten_layouts_are_refused(
    form: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = to_lanes(base3.pack(random_trits(100, 60), -1), 60, -1, form)
    lanes[5] = 255
    if engine == "torch":
        monkeypatch.setattr(kernels, "lib", None)
    with pytest.raises(FormatError, match=f"not one of {form}"):
        from_lanes(lanes, 100, 60, -1, form)


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_rows", [1, 3, 150])
def test_scales_in_the_order_of_a_layout(form: str, dtype: torch.dtype, scale_rows: int) -> None:
    scales = torch.rand(scale_rows, 4).to(dtype)
    lanes = kernels.scale_lanes(scales, 150, form)
    back = kernels.lane_scales(lanes, 150, scale_rows, 4, form)
    assert lanes.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)
    assert torch.equal(back.to(dtype), scales)
    _, blocks, block = kernels.lanes_shape(form, 150, 4, 1)
    row = 149
    found = lanes.view(blocks, 4, block)[row // block, :, row % block]
    assert torch.equal(found.to(dtype), scales[row * scale_rows // 150])


@every_form
def test_scale_codes_in_the_order_of_a_layout(form: str) -> None:
    codes = scale_codes(torch.rand(90, 2))
    lanes = kernels.scale_lanes(codes, 90, form)
    back = kernels.lane_scales(lanes, 90, 90, 2, form)
    assert lanes.dtype == torch.float16
    assert torch.equal(scale_codes(back), codes)


# ------------------------------------------------------------------------------------------------
# Products: every variant is its definition


@every_cpu
@every_activations
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_group_size_and_tail(cpu: str, activations: str, group_size: int) -> None:
    for form in use(cpu):
        for rows, cols in ((1, 1), (16, 3), (65, 130), (81, 257)):
            trits, scales = random_trits(rows, cols), random_scales(rows, cols, group_size)
            for tokens in (1, 2, 6):
                assert_same(inputs(tokens, cols), trits, scales, group_size, form, activations)


@every_cpu
@every_activations
def test_batches(cpu: str, activations: str) -> None:
    rows, cols, group_size = 83, 200, 128
    trits, scales = random_trits(rows, cols), random_scales(rows, cols, group_size)
    most = inputs(513, cols)
    want = expected(most, trits, scales, group_size, activations)
    for form in use(cpu):
        for tokens in (*range(1, 10), 15, 16, 17, 31, 32, 33, 64, 65, 257, 511, 512, 513):
            got = run(most[:tokens], trits, scales, group_size, form, activations)
            assert torch.equal(got, want[:tokens]), (form, tokens)


@every_cpu
@every_activations
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(cpu: str, activations: str, dtype: torch.dtype) -> None:
    rows, cols = 100, 96
    trits = random_trits(rows, cols)
    for form, wide in itertools.product(use(cpu), (False, True)):
        scales = random_scales(rows, cols, 32)
        scales = scales.float() / 3 if wide else scales
        for factor in (1.0, 1e-4, 2e4):  # subnormal and infinite results in float16
            x = (inputs(5, cols) * factor).clamp(-6e4, 6e4).to(dtype)
            assert_same(x, trits, scales, 32, form, activations)


@every_cpu
@every_activations
@pytest.mark.parametrize("group_size", [-1, 128])
def test_saturated_inputs(cpu: str, activations: str, group_size: int) -> None:
    # where sums are as large as they can be: kernels that add up in 16 bits go wrong from 2176 on
    rows, cols = 81, 8192
    scales = random_scales(rows, cols, group_size)
    for trits in (torch.ones(rows, cols, dtype=torch.int8), random_trits(rows, cols)):
        for x in (torch.ones(2, cols), -torch.ones(2, cols), torch.where(trits[:2] < 0, -1.0, 1.0)):
            for form in use(cpu):
                assert_same(x, trits, scales, group_size, form, activations)


@every_cpu
@every_activations
def test_the_longest_group(cpu: str, activations: str) -> None:
    cols = kernels.LONGEST_SUM
    scales = torch.ones(3, 1)
    for sign in (1, -1):
        trits = torch.full((3, cols), sign, dtype=torch.int8)
        for form in use(cpu):
            for tokens in (1, 5):
                # -128 is the largest digit: 127.5 units of 65536
                x = torch.full((tokens, cols), -1.0)
                assert_same(x, trits, scales, -1, form, activations)


@every_cpu
@every_activations
def test_zeros_and_numbers_that_are_none(cpu: str, activations: str) -> None:
    rows, cols, group_size = 70, 64, 32
    trits, scales = random_trits(rows, cols), random_scales(rows, cols, group_size)
    trits[:, 32:], scales[:, 1] = 0, 0
    x = inputs(6, cols)
    x[1] = 0
    x[2, 5] = torch.nan
    x[3, 7] = torch.inf
    x[4] = 1e38  # 127 times that is not finite
    x[5] *= 1e-42  # subnormal
    for form in use(cpu):
        got = run(x, trits, scales, group_size, form, activations)
        want = expected(x, trits, scales, group_size, activations)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert got[1].eq(0).all()
        assert got[2:5].isnan().all()
        assert got[[0, 5]].isfinite().all()


@every_cpu
@every_activations
def test_threads_change_nothing(cpu: str, activations: str) -> None:
    rows, cols = 1100, 512
    trits, scales = random_trits(rows, cols), random_scales(rows, cols, 128)
    for form, tokens in itertools.product(use(cpu), (1, 3, 70)):
        x = inputs(tokens, cols)
        one = run(x, trits, scales, 128, form, activations, threads=1)
        for threads in (2, 3, 7):
            got = run(x, trits, scales, 128, form, activations, threads)
            assert torch.equal(got, one), (form, tokens, threads)


@native
def test_callers_at_the_same_time() -> None:
    rows, cols = 1000, 640
    trits, scales = random_trits(rows, cols), random_scales(rows, cols, -1)
    form = kernels.best_form()
    x = [inputs(n, cols) for n in (1, 2, 5, 40)]
    want = [product_of_trits(each, trits, scales, -1, "int8") for each in x]
    lanes = to_lanes(base3.pack(trits, -1), cols, -1, form)
    in_order = kernels.scale_lanes(scales, rows, form)

    def work(i: int) -> bool:
        y = product_of_lanes(x[i % 4], lanes, in_order, rows, -1, form, "int8", 3)
        return torch.equal(y, want[i % 4])

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(work, range(200)))


@native
def test_without_torchs_threads_there_are_others() -> None:
    assert lib is not None
    trits, scales = random_trits(1000, 512), random_scales(1000, 512, -1)
    x = inputs(3, 512)
    by_torch = run(x, trits, scales, -1, LANES2, "int8", threads=3)
    lib.use_openmp(0)
    try:
        assert torch.equal(run(x, trits, scales, -1, LANES2, "int8", threads=3), by_torch)
    finally:
        lib.use_openmp(kernels._openmp())


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork")
def test_a_forked_process_has_its_own_threads() -> None:
    # in a process of its own: pytest's has threads that must not be forked
    code = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_kernels import inputs, kernels, random_scales, random_trits, run
trits, scales, x = random_trits(2000, 512), random_scales(2000, 512, -1), inputs(2, 512)
one = lambda: run(x, trits, scales, -1, kernels.best_form(), "int8", threads=3)
before = one()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(one(), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(one(), before)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(HERE)]
    subprocess.run(command, check=True, timeout=120)


@pytest.mark.usefixtures("without_core")
@every_form
@every_activations
def test_torch_alone(form: str, activations: str) -> None:
    for group_size in (-1, 0, 48):
        trits, scales = random_trits(90, 100), random_scales(90, 100, group_size)
        assert_same(inputs(3, 100), trits, scales, group_size, form, activations)


@native
def test_leading_dimensions() -> None:
    trits, scales = random_trits(33, 40), random_scales(33, 40, -1)
    x = inputs(6, 40)
    flat = run(x, trits, scales, -1, LANES2, "int8")
    assert torch.equal(run(x.view(2, 3, 40), trits, scales, -1, LANES2, "int8").view(6, 33), flat)
    assert torch.equal(run(x[0], trits, scales, -1, LANES2, "int8"), flat[0])
    assert run(x[:0], trits, scales, -1, LANES2, "int8").shape == (0, 33)


# ------------------------------------------------------------------------------------------------
# int8 weights


def random_int8(rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-128, 128, (rows, cols), dtype=torch.int8, generator=generator)


def assert_int8(
    x: Tensor, weight: Tensor, scales: Tensor, group_size: int, activations: str, threads: int = 2
) -> None:
    got = kernels.product_of_int8(x, weight, scales, group_size, activations, threads)
    want = expected(x, weight, scales, group_size, activations)
    assert got.dtype == want.dtype == x.dtype
    assert torch.equal(got, want), f"{tuple(x.shape)} {tuple(weight.shape)} {group_size}"


@every_cpu
@every_activations
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, 32, 100])
def test_int8_groups_and_tails(cpu: str, activations: str, group_size: int) -> None:
    use(cpu)
    for rows, cols in ((1, 1), (16, 3), (33, 64), (65, 130), (81, 257)):
        weight, scales = random_int8(rows, cols), random_scales(rows, cols, group_size)
        for tokens in (1, 2, 6, 20):
            assert_int8(inputs(tokens, cols), weight, scales, group_size, activations)


@every_cpu
@every_activations
@pytest.mark.parametrize("group_size", [-1, 64])
def test_int8_batches(cpu: str, activations: str, group_size: int) -> None:
    use(cpu)
    rows, cols = 83, 200
    weight, scales = random_int8(rows, cols), random_scales(rows, cols, group_size)
    most = inputs(300, cols)
    want = expected(most, weight, scales, group_size, activations)
    for tokens in (*range(1, 18), 31, 32, 33, 48, 49, 64, 65, 127, 128, 129, 300):
        got = kernels.product_of_int8(most[:tokens], weight, scales, group_size, activations, 2)
        assert torch.equal(got, want[:tokens]), tokens


@every_cpu
@every_activations
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_dtypes(cpu: str, activations: str, dtype: torch.dtype) -> None:
    use(cpu)
    rows, cols = 100, 96
    weight = random_int8(rows, cols)
    for scale_dtype, tokens in itertools.product(DTYPES, (5, 17)):
        scales = (random_scales(rows, cols, 32).float() / 3).to(scale_dtype)
        for factor in (1.0, 1e-6, 1e4):  # subnormal and infinite results in float16
            x = (inputs(tokens, cols) * factor).clamp(-6e4, 6e4).to(dtype)
            assert_int8(x, weight, scales, 32, activations)


@every_cpu
@every_activations
@pytest.mark.parametrize("scale_rows", [1, 2, 30])
def test_int8_scales_that_rows_share(cpu: str, activations: str, scale_rows: int) -> None:
    use(cpu)
    weight, scales = random_int8(60, 70), random_scales(scale_rows, 70, 32)
    for tokens in (1, 20):
        assert_int8(inputs(tokens, 70), weight, scales, 32, activations)


@every_cpu
@every_activations
def test_the_longest_group_of_int8(cpu: str, activations: str) -> None:
    use(cpu)
    cols = kernels.LONGEST_SUM
    for number in (127, -128):
        weight = torch.full((33, cols), number, dtype=torch.int8)
        for x in (torch.full((1, cols), -1.0), torch.full((20, cols), 1.0)):
            assert_int8(x, weight, torch.ones(33, 1), -1, activations)


@every_cpu
@every_activations
def test_int8_threads_change_nothing(cpu: str, activations: str) -> None:
    use(cpu)
    weight, scales = random_int8(1100, 512), random_scales(1100, 512, 128)
    for tokens, threads in itertools.product((1, 3, 70), (1, 2, 3, 7)):
        assert_int8(inputs(tokens, 512), weight, scales, 128, activations, threads)


@every_cpu
@every_activations
def test_int8_and_numbers_that_are_none(cpu: str, activations: str) -> None:
    use(cpu)
    weight, scales = random_int8(70, 64), random_scales(70, 64, 32)
    for tokens in (6, 20):
        x = inputs(tokens, 64)
        x[1] = 0
        x[2, 5] = torch.nan
        x[3, 7] = torch.inf
        got = kernels.product_of_int8(x, weight, scales, 32, activations)
        want = expected(x, weight, scales, 32, activations)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert got[1].eq(0).all() and got[2:4].isnan().all()


@pytest.mark.usefixtures("without_core")
@every_activations
def test_int8_on_torch_alone(activations: str) -> None:
    assert_int8(inputs(3, 100), random_int8(90, 100), random_scales(90, 100, 48), 48, activations)


@native
def test_int8_of_any_shape_and_stride() -> None:
    weight, scales = random_int8(33, 40), random_scales(33, 40, -1)
    x = inputs(6, 40)
    flat = kernels.product_of_int8(x, weight, scales, -1, "none")
    by_three = kernels.product_of_int8(x.view(2, 3, 40), weight, scales, -1, "none")
    assert torch.equal(by_three.view(6, 33), flat)
    turned = kernels.product_of_int8(x.T.contiguous().T, weight, scales, -1, "none")
    assert torch.equal(turned, flat)
    assert kernels.product_of_int8(x[:0], weight, scales, -1, "none").shape == (0, 33)
    assert kernels.product_of_int8(x, weight[:0], scales[:0], -1, "none").shape == (6, 0)


@pytest.mark.parametrize("group_size", [-1, 0, 100])
def test_the_definition_is_a_product_with_int8(group_size: int) -> None:
    weight, scales = random_int8(50, 700), random_scales(50, 700, group_size)
    x = inputs(4, 700)
    dense = int8.dequantize_int8(weight, scales, group_size, torch.float32).double()
    got = kernels.product_of_int8(x, weight, scales, group_size, "none").double()
    exact = x.double() @ dense.T
    bound = x.double().abs().amax(-1, keepdim=True) * 2.0**-20 * dense.abs().sum(-1) + 1e-5
    assert bool(((got - exact).abs() <= bound).all())


@native
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 65)}, "weights: 4480 elements; expected 4550"),
        ({"scales": torch.zeros(70, 3)}, "scales: 210 elements; expected 140"),
        ({"scales": torch.zeros(4, 2)}, "scales: 4 rows do not divide the 70 rows"),
        ({"scales": torch.zeros(0, 2)}, "scales: 0 rows do not divide the 70 rows"),
        ({"group_size": -2}, "group_size is -2"),
    ],
)
def test_wrong_int8_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 64),
        "weight": torch.zeros(70, 64, dtype=torch.int8),
        "scales": torch.zeros(70, 2),
        "group_size": 32,
        "activations": "none",
    }
    assert kernels.product_of_int8(**given).shape == (2, 70)
    with pytest.raises(ValueError, match=message):
        kernels.product_of_int8(**(given | changed))


# ------------------------------------------------------------------------------------------------
# int4 weights


def random_int4(rows: int, cols: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Numbers of all codes, and the same packed."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randint(-8, 8, (rows, cols), dtype=torch.int8, generator=generator)
    return q, int4.pack_int4(q, group_size)


def assert_int4(
    x: Tensor, rows: int, scales: Tensor, group_size: int, activations: str, threads: int = 2
) -> None:
    q, packed = random_int4(rows, x.shape[-1], group_size)
    got = kernels.product_of_int4(x, packed, scales, group_size, activations, threads)
    want = expected(x, q, scales, group_size, activations)
    assert got.dtype == want.dtype == x.dtype
    assert torch.equal(got, want), f"{tuple(x.shape)} {rows} {group_size}"


@every_cpu
@every_activations
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, 32, 33, 7])
def test_int4_groups_and_tails(cpu: str, activations: str, group_size: int) -> None:
    use(cpu)
    for rows, cols in ((1, 1), (16, 3), (33, 64), (65, 130), (81, 257)):
        scales = random_scales(rows, cols, group_size) * -1
        for tokens in (1, 2, 6, 20):
            assert_int4(inputs(tokens, cols), rows, scales, group_size, activations)


@every_cpu
@every_activations
def test_int4_batches_and_threads_change_nothing(cpu: str, activations: str) -> None:
    use(cpu)
    rows, cols = 1100, 96
    q, packed = random_int4(rows, cols, 32)
    scales, most = random_scales(rows, cols, 32), inputs(150, cols)
    want = expected(most, q, scales, 32, activations)
    for tokens, threads in itertools.product((1, 3, 17, 33, 128, 150), (1, 2, 7)):
        got = kernels.product_of_int4(most[:tokens], packed, scales, 32, activations, threads)
        assert torch.equal(got, want[:tokens]), (tokens, threads)


@every_cpu
@pytest.mark.parametrize("scale_rows", [1, 2, 30])
def test_int4_dtypes_and_scales_that_rows_share(cpu: str, scale_rows: int) -> None:
    use(cpu)
    for dtype, scale_dtype, tokens in itertools.product(DTYPES, DTYPES, (1, 20)):
        scales = random_scales(scale_rows, 70, 32).to(scale_dtype)
        assert_int4(inputs(tokens, 70).to(dtype), 60, scales, 32, "none")


@pytest.mark.usefixtures("without_core")
@every_activations
def test_int4_on_torch_alone(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PART", 4000)  # forty rows at a time
    scales = random_scales(90, 100, 32)
    assert_int4(inputs(3, 100), 90, scales, 32, activations)
    assert_int4(inputs(3, 100), 90, scales[:2], 32, activations)


@native
def test_int4_of_any_shape_and_stride() -> None:
    _, packed = random_int4(33, 40, 32)
    scales, x = random_scales(33, 40, 32), inputs(6, 40)
    flat = kernels.product_of_int4(x, packed, scales, 32, "none")
    by_three = kernels.product_of_int4(x.view(2, 3, 40), packed, scales, 32, "none")
    assert torch.equal(by_three.view(6, 33), flat)
    turned = kernels.product_of_int4(x.T.contiguous().T, packed, scales, 32, "none")
    assert torch.equal(turned, flat)
    assert kernels.product_of_int4(x[:0], packed, scales, 32, "none").shape == (0, 33)
    assert kernels.product_of_int4(x, packed[:0], scales[:0], 32, "none").shape == (6, 0)


@native
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 67)}, "weights: 2240 elements; expected 2380"),
        ({"scales": torch.zeros(70, 3)}, "scales: 210 elements; expected 140"),
        ({"scales": torch.zeros(4, 2)}, "scales: 4 rows do not divide the 70 rows"),
        ({"group_size": -2}, "group_size is -2"),
    ],
)
def test_wrong_int4_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 64),
        "packed": torch.zeros(70, 32, dtype=torch.uint8),
        "scales": torch.zeros(70, 2),
        "group_size": 32,
        "activations": "none",
    }
    assert kernels.product_of_int4(**given).shape == (2, 70)
    with pytest.raises(ValueError, match=message):
        kernels.product_of_int4(**(given | changed))


# ------------------------------------------------------------------------------------------------
# The definition


def test_an_example_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 1.0, 0.25]])  # int8: 127, -64, 1, 0
    trits = torch.tensor([[1, -1, 1, 1]], dtype=torch.int8)
    scales = torch.tensor([[0.5, 2.0]])
    y = product_of_trits(x, trits, scales, 2, "int8")
    assert y.tolist() == [[0.5 * (127 + 64) + 2.0 * (1 + 0)]]
    y = product_of_trits(x, trits, scales, 2, "none")
    assert y.tolist() == [[0.5 * (127 + 63.5) + 2.0 * (1 + 0.25)]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 0, 100])
def test_the_definition_is_a_product(dtype: torch.dtype, group_size: int) -> None:
    trits, scales = random_trits(50, 700), random_scales(50, 700, group_size)
    x = inputs(4, 700, dtype)
    x[1, 3] = 3000  # an outlier: all else of this token is rounded to its unit
    wide = base3.dequantize_base3(
        base3.pack(trits, group_size), scales, 700, group_size, torch.float32
    ).double()
    got = product_of_trits(x, trits, scales, group_size, "none").double()
    exact = x.double() @ wide.T
    # the rounding of inputs, of sums in float32, and of the result
    bound = x.double().abs().amax(-1, keepdim=True) * 2.0**-22 * wide.abs().sum(-1)
    bound = bound + exact.abs() * torch.finfo(dtype).eps + 1e-5
    assert bool(((got - exact).abs() <= bound).all())


@pytest.mark.parametrize("group_size", [-1, 0, 100])
def test_8_bits_as_linear_layers_have_them(group_size: int) -> None:
    trits, scales = random_trits(50, 700), random_scales(50, 700, group_size)
    x = inputs(4, 700)
    packed = base3.pack(trits, group_size)
    dense = base3.dequantize_base3(packed, scales, 700, group_size, torch.float32)
    got = product_of_trits(x, trits, scales, group_size, "int8")
    torch.testing.assert_close(got, rounded_linear(x, dense), rtol=1e-5, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_inputs_as_integers(values: list[float]) -> None:
    x = torch.tensor([values])
    absmax = x.abs().max().double()
    q, factor = kernels.quantize(x, "none")
    if not bool((x.abs().max() * 127).isfinite()):
        assert bool(factor.isnan().all()) and bool(q.eq(0).all())
        return
    powers = torch.tensor([1.0, 256.0, 65536.0], dtype=torch.float64).view(3, 1, 1)
    back = (q.double() * powers).sum(0) * factor.double()
    assert bool(((back - x.double()).abs() <= max(float(absmax) * 2.0**-22, 2.0**-127)).all())
    q, factor = kernels.quantize(x, "int8")
    if float(absmax) > 1e-30:
        assert bool((q[0].double() * factor.double() - x.double()).abs().max() <= absmax / 253)


# ------------------------------------------------------------------------------------------------
# The binding


def arguments(**changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 64),
        "lanes": torch.zeros(64 * 16 * 2, dtype=torch.uint8),
        "scales": torch.zeros(2 * 2 * 64),
        "rows": 70,
        "group_size": 32,
        "form": LANES2,
        "activations": "int8",
        "threads": 1,
    }
    return given | changed


@native
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 68)}, "lanes: 2048 elements; expected 2176"),
        ({"rows": 130}, "lanes: 2048 elements; expected 3072"),
        ({"lanes": torch.zeros(2047, dtype=torch.uint8)}, "lanes: 2047 elements; expected 2048"),
        ({"scales": torch.zeros(255)}, "scales: 255 elements; expected 256"),
        ({"form": "lanes4"}, "form is 'lanes4'"),
        ({"group_size": -2}, "group_size is -2"),
        ({"x": torch.zeros(1, 65537), "group_size": -1}, "groups of at most 65536"),
    ],
)
def test_wrong_sizes_are_refused(changed: dict[str, Any], message: str) -> None:
    assert product_of_lanes(**arguments()).shape == (2, 70)
    with pytest.raises(ValueError, match=message):
        product_of_lanes(**arguments(**changed))


@native
@pytest.mark.parametrize(
    "changed",
    [
        {"lanes": torch.zeros(64 * 16 * 2, dtype=torch.int8)},
        {"lanes": torch.zeros(64 * 16 * 4, dtype=torch.uint8)[::2]},
        {"scales": torch.zeros(256, dtype=torch.bfloat16)},
        {"scales": torch.zeros(512)[::2]},
        {"activations": "int4"},
    ],
)
def test_wrong_tensors_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected dense x"):
        product_of_lanes(**arguments(**changed))


@native
@pytest.mark.parametrize("tokens", [1, 3, 130, 513])
@pytest.mark.parametrize("activations", ["int8", "none"])
def test_several_matrices_that_share_their_inputs(tokens: int, activations: str) -> None:
    form, x = kernels.best_form(), inputs(tokens, 200)
    matrices, want = [], []
    for rows in (300, 1, 700):
        trits, scales = random_trits(rows, 200), random_scales(rows, 200, 64)
        lanes = to_lanes(base3.pack(trits, 64), 200, 64, form)
        matrices.append((lanes, kernels.scale_lanes(scales, rows, form), rows))
        want.append(product_of_trits(x, trits, scales, 64, activations))
    for threads in (1, 2, 7):
        got = kernels.products_of_lanes(x, matrices, 64, form, activations, threads)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert kernels.products_of_lanes(x, [], 64, form, activations) == []


@native
def test_inputs_with_strides() -> None:
    trits, scales = random_trits(33, 40), random_scales(33, 40, -1)
    x = inputs(40, 6).T
    want = product_of_trits(x.contiguous(), trits, scales, -1, "int8")
    assert torch.equal(run(x, trits, scales, -1, LANES2, "int8"), want)


@native
def test_a_cpu_without_tables_refuses_lanes3() -> None:
    assert lib is not None
    lib.use_cpu("portable")
    assert kernels.best_form() == LANES2
    size, blocks, block = kernels.lanes_shape(LANES3, 70, 64, 32)
    lanes, scales = torch.zeros(size, dtype=torch.uint8), torch.zeros(blocks * 2 * block)
    with pytest.raises(ValueError, match="'lanes3', which 'portable' cannot multiply"):
        product_of_lanes(**arguments(lanes=lanes, scales=scales, form=LANES3))


@native
def test_yardsticks() -> None:
    assert lib is not None
    words = torch.arange(64 * 100, dtype=torch.int64)
    want = 0
    for word in words.tolist():
        want ^= word
    for cpu in CPUS:
        lib.use_cpu(cpu)
        assert lib.read_all(words.view(torch.uint8), 1) == want
        assert lib.read_all(words.view(torch.uint8), 3) == want
        one = lib.dot_peak(100, 1)
        assert lib.dot_peak(100, 2) == 2 * one
        assert (one > 0) == (cpu != "portable")


# ------------------------------------------------------------------------------------------------
# Sanitizers


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a C++ compiler")
def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    machine = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True, check=True)
    options = core_sources.sources(machine.stdout.split("-")[0])
    # the functions for weights are not what this is about: one build of them, as it is, will do
    options["cpus/portable.cpp"] = ["-fno-sanitize=all"]
    for name in ("avx2", "avx512"):
        if options.pop(f"cpus/{name}.cpp", None) is not None:
            options["cpus/cpus.cpp"].append(f"-Dk{name.capitalize()}=kPortable")
    build = ["g++", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    main = str(HERE / "sanitized_kernels.cpp")
    objects = core_sources.compile_all(tmp_path, build, options | {main: []})
    program = str(tmp_path / "sanitized")
    subprocess.run([*build, *core_sources.FLAGS, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.split() == (CPUS or ["portable", *done.stdout.split()[1:]])
