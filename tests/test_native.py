"""The compiled core gives the numbers of its definitions, whatever the CPU and thread count.

The definitions are restated here in numpy, slowly and plainly. The package's own torch twins are
compared in test_base3.py and test_methods.py.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize.errors import FormatError, WeightError
from ternarize.native import lib
from ternarize.trits.base3 import pack, packed_width
from ternarize.trits.methods import METHODS
from ternarize.trits.planes import fit_packed, fit_planes
from ternarize.trits.rans import CHUNK, classes_of_trits, decode_rows, encode_rows

if lib is None:
    # Absent for a reason, or a failure: never a silent gap.
    if os.environ.get("TERNARIZE_NATIVE") == "0":
        pytest.skip("TERNARIZE_NATIVE=0", allow_module_level=True)
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        pytest.skip("built without a C++ compiler", allow_module_level=True)
    raise AssertionError("there is a C++ compiler, but ternarize._native was not built")

native: Any = lib
CPUS: list[str] = native.cpus()
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
GROUP_SIZES = (-1, 0, 1, 2, 3, 5, 7, 64, 127, 128, 129, 256)
Floats = npt.NDArray[np.float64]
Trits = npt.NDArray[np.int8]

every_cpu = pytest.mark.parametrize("cpu", CPUS)
every_kind = pytest.mark.parametrize("kind", DTYPES)
every_method = pytest.mark.parametrize("method", ["absmean", "twn", "itf"])


@pytest.fixture(autouse=True)
def restore_cpu() -> Iterator[None]:
    yield
    native.use_cpu(CPUS[-1])


# ------------------------------------------------------------------------------------------------
# The definitions


def cuts(cols: int, group_size: int) -> list[slice]:
    """The groups of a row."""
    length = group_size if group_size > 0 else max(cols, 1)
    return [slice(at, min(at + length, cols)) for at in range(0, cols, length)]


def width(cols: int, group_size: int) -> int:
    return sum(-(-(cut.stop - cut.start) // 5) for cut in cuts(cols, group_size))


def pack_plainly(trits: Trits, group_size: int) -> npt.NDArray[np.uint8]:
    rows = []
    for row in trits.tolist():
        codes = []
        for cut in cuts(trits.shape[1], group_size):
            group = row[cut] + [0] * (-len(row[cut]) % 5)
            for five in range(0, len(group), 5):
                codes.append(sum((group[five + k] + 1) * 3**k for k in range(5)))
        rows.append(codes)
    return np.array(rows, np.uint8).reshape(len(trits), width(trits.shape[1], group_size))


def fixed_sum(values: Floats) -> float:
    """Blocks of 128, halves added to halves; then the same over the blocks' sums."""
    while True:
        blocks = np.pad(values, (0, -len(values) % 128 or 128 * (len(values) == 0)))
        blocks = blocks.reshape(-1, 128)
        while blocks.shape[1] > 1:
            half = blocks.shape[1] // 2
            blocks = blocks[:, :half] + blocks[:, half:]
        values = blocks[:, 0]
        if len(values) == 1:
            return float(values[0])


def total(group: Floats) -> float:
    """Of a row's group; or of a matrix: its rows first."""
    if group.ndim == 2:
        group = np.array([fixed_sum(row) for row in group])
    return fixed_sum(group)


def ternarize_plainly(method: str, group: Floats) -> tuple[Trits, float]:
    magnitude = np.abs(group)

    def mean_above(mask: npt.NDArray[np.bool_]) -> float:
        count = int(mask.sum())
        return total(np.where(mask, magnitude, 0.0)) / count if count else 0.0

    scale = mean_above(np.ones(group.shape, np.bool_))
    if method == "absmean":
        mask = magnitude > scale / 2
    else:
        mask = magnitude > 0.7 * scale
        scale = mean_above(mask)
        for _ in range(100 if method == "itf" else 0):
            better = magnitude > scale / 2
            if np.array_equal(better, mask):
                break
            mask, scale = better, mean_above(better)
    return (np.sign(group) * mask).astype(np.int8), scale


def ternarize_all_plainly(method: str, weights: Floats, group_size: int) -> tuple[Trits, Floats]:
    if group_size == 0:
        trits, scale = ternarize_plainly(method, weights)
        return trits, np.array([[scale]])
    groups = cuts(weights.shape[1], group_size)
    trits = np.zeros(weights.shape, np.int8)
    scales = np.zeros((len(weights), len(groups)))
    for row, (g, cut) in itertools.product(range(len(weights)), enumerate(groups)):
        trits[row, cut], scales[row, g] = ternarize_plainly(method, weights[row, cut])
    return trits, scales


# ------------------------------------------------------------------------------------------------
# Weights and trits of many kinds, and the calls


def make_weights(flavour: str, seed: int, rows: int, cols: int, kind: str) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    shape, dtype = (rows, cols), DTYPES[kind]
    if flavour == "bits":  # every exponent, subnormals, both zeros; nothing that is not finite
        bits = torch.int32 if kind == "F32" else torch.int16
        top = torch.iinfo(bits).max
        raw = torch.randint(-top - 1, top, shape, generator=random, dtype=torch.int64)
        weights = raw.to(bits).view(dtype)
        return torch.where(weights.isfinite(), weights, torch.zeros((), dtype=dtype))
    if flavour == "subnormal":
        unit = torch.finfo(dtype).smallest_normal / 16
        return (torch.randn(shape, generator=random, dtype=torch.float64) * unit).to(dtype)
    if flavour == "levels":  # ties at the thresholds
        return torch.randint(-3, 4, shape, generator=random).to(dtype)
    if flavour == "sparse":
        keep = torch.rand(shape, generator=random) < 0.02
        return (torch.randn(shape, generator=random) * keep).to(dtype)
    return (torch.randn(shape, generator=random) * 0.02).to(dtype)


FLAVOURS = ("normal", "bits", "subnormal", "levels", "sparse")
shapes = st.tuples(st.integers(0, 4), st.integers(1, 400))
seeds = st.integers(0, 2**32)


def run_method(
    method: str, weights: Tensor, kind: str, group_size: int, threads: int = 1
) -> tuple[int, Tensor, Tensor]:
    rows, cols = weights.shape
    trits = torch.full((rows, cols), 99, dtype=torch.int8)
    grid = (rows, len(cuts(cols, group_size))) if group_size else (1, 1)
    scales = torch.full(grid, -7.0, dtype=torch.float64)
    answer = getattr(native, method)(weights, kind, group_size, trits, scales, threads)
    return answer, trits, scales


def random_trits(seed: int, rows: int, cols: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, cols), generator=random, dtype=torch.int8)


def packed_of(trits: Tensor, group_size: int, threads: int = 1) -> Tensor:
    packed = torch.full((len(trits), width(trits.shape[1], group_size)), 77, dtype=torch.uint8)
    assert native.pack(trits, group_size, packed, threads) == -1
    return packed


def unpacked(packed: Tensor, cols: int, group_size: int, threads: int = 1) -> tuple[int, Tensor]:
    trits = torch.full((len(packed), cols), 99, dtype=torch.int8)
    return native.unpack(packed, cols, group_size, trits, threads), trits


def checked(packed: Tensor, cols: int, group_size: int, threads: int = 1) -> tuple[int, Tensor]:
    nonzero = torch.full((len(packed), len(cuts(cols, group_size))), 99, dtype=torch.uint8)
    return native.check(packed, cols, group_size, nonzero, threads), nonzero


# ------------------------------------------------------------------------------------------------
# pack, unpack, check


@every_cpu
@settings(deadline=None, max_examples=60)
@given(shape=shapes, group_size=st.sampled_from(GROUP_SIZES), seed=seeds)
def test_packing_follows_the_format_and_comes_back(
    cpu: str, shape: tuple[int, int], group_size: int, seed: int
) -> None:
    native.use_cpu(cpu)
    trits = random_trits(seed, *shape)
    packed = packed_of(trits, group_size)
    assert np.array_equal(packed.numpy(), pack_plainly(trits.numpy(), group_size))
    answer, back = unpacked(packed, shape[1], group_size)
    assert answer == -1
    assert torch.equal(back, trits)
    answer, nonzero = checked(packed, shape[1], group_size)
    assert answer == -1
    used = [[int(row[cut].any()) for cut in cuts(shape[1], group_size)] for row in trits.numpy()]
    assert nonzero.tolist() == used


@every_cpu
def test_golden_bytes(cpu: str) -> None:
    native.use_cpu(cpu)
    trits = torch.tensor([[1, 0, -1, 1, 1, 0]], dtype=torch.int8)
    assert packed_of(trits, -1).tolist() == [[0xDD, 0x79]]


@every_cpu
@pytest.mark.parametrize("threads", [1, 7])
def test_the_first_value_that_is_no_trit_is_reported(cpu: str, threads: int) -> None:
    native.use_cpu(cpu)
    for value in (2, -2, 127, -128):
        trits = random_trits(0, 2100, 1000)
        trits[1999, 5:] = value
        trits[1200, 999] = value
        out = torch.empty((2100, width(1000, 128)), dtype=torch.uint8)
        assert native.pack(trits, 128, out, threads) == 1200 * 1000 + 999


@every_cpu
@pytest.mark.parametrize("group_size", [-1, 7, 128])
def test_bytes_are_codes_up_to_242(cpu: str, group_size: int) -> None:
    native.use_cpu(cpu)
    cols = 1280
    good = packed_of(random_trits(1, 1, cols), group_size)
    for value, at in itertools.product(range(256), (0, 9, good.shape[1] // 2)):
        packed = good.clone()
        packed[0, at] = value
        # 7 trits need two bytes: the second one of each pair holds two trits
        padded = group_size == 7 and at % 2 == 1
        valid = value <= 242 and not (padded and value // 9 != 13)
        expected = -1 if valid else at
        answer, trits = unpacked(packed, cols, group_size)
        assert answer == expected == checked(packed, cols, group_size)[0]
        if valid:
            assert torch.equal(packed_of(trits, group_size), packed)


@every_cpu
@pytest.mark.parametrize("cols", [1, 2, 3, 4, 6, 39, 128, 257])
def test_padding_is_zero_trits(cpu: str, cols: int) -> None:
    native.use_cpu(cpu)
    good = packed_of(random_trits(2, 3, cols), -1)
    in_last = cols % 5 or 5
    for value in range(256):
        packed = good.clone()
        packed[1, -1] = value
        digits = [value // 3**k % 3 for k in range(5)]
        valid = value <= 242 and all(digit == 1 for digit in digits[in_last:])
        expected = -1 if valid else 2 * packed.shape[1] - 1
        assert unpacked(packed, cols, -1)[0] == expected == checked(packed, cols, -1)[0]


@every_cpu
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_the_first_bad_byte_is_reported(cpu: str, threads: int, group_size: int) -> None:
    native.use_cpu(cpu)
    packed = packed_of(random_trits(3, 2000, 1003), group_size)
    random = torch.Generator().manual_seed(4)
    packed.view(-1)[torch.randint(0, packed.numel(), (5,), generator=random)] = 255
    packed[1100, 17:30] = 243
    first = int((packed.flatten() > 242).nonzero()[0])
    assert unpacked(packed, 1003, group_size, threads)[0] == first
    assert checked(packed, 1003, group_size, threads)[0] == first


@every_cpu
@pytest.mark.parametrize("at", [0, 1, 63, 64, 120, 127])
def test_one_trit_makes_a_group_nonzero(cpu: str, at: int) -> None:
    native.use_cpu(cpu)
    trits = torch.zeros((2, 256), dtype=torch.int8)
    trits[1, 128 + at] = -1
    assert checked(packed_of(trits, 128), 256, 128)[1].tolist() == [[0, 0], [0, 1]]


# ------------------------------------------------------------------------------------------------
# dequantize


@every_cpu
@every_kind
@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    group_size=st.sampled_from(GROUP_SIZES),
    seed=seeds,
    share=st.booleans(),
    flavour=st.sampled_from(FLAVOURS),
)
def test_dequantize_has_the_bits_of_torch(
    cpu: str,
    kind: str,
    shape: tuple[int, int],
    group_size: int,
    seed: int,
    share: bool,
    flavour: str,
) -> None:
    native.use_cpu(cpu)
    rows, cols = shape[0] * 2, shape[1]
    trits = random_trits(seed, rows, cols)
    groups = cuts(cols, group_size)
    scales = make_weights(flavour, seed, rows // 2 if share else rows, len(groups), "F32")
    out = torch.full((rows, cols), 5, dtype=DTYPES[kind])
    native.dequantize(packed_of(trits, group_size), scales, cols, group_size, out, kind, 1)
    lengths = torch.tensor([cut.stop - cut.start for cut in groups])
    wide = scales.repeat_interleave(2 if share else 1, 0).repeat_interleave(lengths, 1)
    expected = (trits.float() * wide).to(DTYPES[kind])
    bits = torch.int32 if kind == "F32" else torch.int16
    assert torch.equal(out.view(bits), expected.view(bits))  # +0 and -0 are told apart


@every_cpu
@every_kind
def test_dequantize_rounds_every_scale_as_torch_does(cpu: str, kind: str) -> None:
    """Every 16-bit pattern, with the low bits around the ties."""
    native.use_cpu(cpu)
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    patterns = (torch.arange(1 << 16).unsqueeze(1) << 16 | low).flatten().to(torch.int32)
    scales = patterns.view(torch.float32)
    scales = scales[~scales.isnan()].unsqueeze(1)
    packed = torch.tensor([[2 + 3 * 0 + 9 * 1 + 27 + 81]], dtype=torch.uint8)  # + - 0
    packed = packed.repeat(len(scales), 1)
    out = torch.empty((len(scales), 3), dtype=DTYPES[kind])
    native.dequantize(packed, scales, 3, -1, out, kind, 1)
    expected = (torch.tensor([1.0, -1.0, 0.0]) * scales).to(DTYPES[kind])
    same = out.isnan() & expected.isnan()  # 0 * infinity: any NaN
    bits = torch.int32 if kind == "F32" else torch.int16
    assert bool((same | (out.view(bits) == expected.view(bits))).all())


@every_cpu
@pytest.mark.parametrize("group_size", [-1, 3, 128])
def test_dequantize_is_safe_for_any_byte(cpu: str, group_size: int) -> None:
    native.use_cpu(cpu)
    cols = 900
    random = torch.Generator().manual_seed(13)
    shape = (3, width(cols, group_size))
    packed = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    scales = torch.ones((3, len(cuts(cols, group_size))))
    guarded = torch.full((5, cols), 5.0)
    native.dequantize(packed, scales, cols, group_size, guarded[1:4], "F32", 1)
    assert bool((guarded[[0, 4]] == 5).all())
    assert set(guarded[1:4].flatten().tolist()) <= {-1.0, 0.0, 1.0}


# ------------------------------------------------------------------------------------------------
# Methods


@every_cpu
@every_kind
@every_method
@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    group_size=st.sampled_from(GROUP_SIZES),
    seed=seeds,
    flavour=st.sampled_from(FLAVOURS),
)
def test_methods_follow_their_definitions(
    cpu: str,
    kind: str,
    method: str,
    shape: tuple[int, int],
    group_size: int,
    seed: int,
    flavour: str,
) -> None:
    native.use_cpu(cpu)
    weights = make_weights(flavour, seed, *shape, kind)
    answer, trits, scales = run_method(method, weights, kind, group_size)
    expected = ternarize_all_plainly(method, weights.double().numpy(), group_size)
    assert answer == -1
    assert np.array_equal(trits.numpy(), expected[0])
    assert scales.numpy().tobytes() == expected[1].tobytes()


@every_cpu
@every_kind
@every_method
@pytest.mark.parametrize("cols", [128 * 128 - 1, 128 * 128, 128 * 129, 128 * 257 + 3])
def test_long_rows_are_summed_in_the_fixed_order(
    cpu: str, kind: str, method: str, cols: int
) -> None:
    native.use_cpu(cpu)
    weights = make_weights("bits", cols, 2, cols, kind)
    answer, trits, scales = run_method(method, weights, kind, -1)
    expected = ternarize_all_plainly(method, weights.double().numpy(), -1)
    assert answer == -1
    assert np.array_equal(trits.numpy(), expected[0])
    assert scales.numpy().tobytes() == expected[1].tobytes()


@every_method
def test_the_rows_of_a_tensor_are_summed_in_the_fixed_order(method: str) -> None:
    weights = make_weights("bits", 5, 300, 131, "BF16")
    _, trits, scales = run_method(method, weights, "BF16", 0)
    expected = ternarize_all_plainly(method, weights.double().numpy(), 0)
    assert np.array_equal(trits.numpy(), expected[0])
    assert scales.item() == expected[1].item()


@every_cpu
@every_method
@pytest.mark.parametrize("group_size", [0, -1, 128])
def test_threads_change_nothing(cpu: str, method: str, group_size: int) -> None:
    native.use_cpu(cpu)
    weights = make_weights("normal", 6, 2003, 1000, "BF16")
    results = []
    for threads in (1, 2, 7):
        _, trits, scales = run_method(method, weights, "BF16", group_size, threads)
        packed = packed_of(trits, group_size, threads)
        _, back = unpacked(packed, 1000, group_size, threads)
        _, nonzero = checked(packed, 1000, group_size, threads)
        dense = torch.empty((2003, 1000))
        per_row = scales.float()
        native.dequantize(packed, per_row, 1000, group_size, dense, "F32", threads)
        results.append((trits, scales, packed, back, nonzero, dense))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cpus_agree() -> None:
    weights = make_weights("bits", 7, 64, 1000, "F32")
    results = []
    for cpu in CPUS:
        native.use_cpu(cpu)
        assert native.cpu() == cpu
        results.append(run_method("itf", weights, "F32", 128))
    assert all(torch.equal(result[2], results[0][2]) for result in results)


@every_cpu
@every_kind
@every_method
@pytest.mark.parametrize("group_size", [0, -1, 100, 128])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_weight_that_is_not_finite_is_reported(
    cpu: str, kind: str, method: str, group_size: int, value: float
) -> None:
    native.use_cpu(cpu)
    weights = make_weights("normal", 8, 5, 500, kind)
    for at in (2499, 1977, 1640, 512, 0):  # each before the last
        weights.view(-1)[at] = value
        assert run_method(method, weights, kind, group_size)[0] == at


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize("group_size", [0, 128])
def test_threads_report_the_first_weight_that_is_not_finite(threads: int, group_size: int) -> None:
    weights = make_weights("normal", 9, 2000, 1000, "BF16")
    weights[1100:, 7] = float("nan")
    weights[1100, 5] = float("inf")
    assert run_method("absmean", weights, "BF16", group_size, threads)[0] == 1100 * 1000 + 5


@every_cpu
@every_kind
@every_method
@pytest.mark.parametrize("group_size", [0, -1, 128])
def test_zeros_have_scale_zero(cpu: str, kind: str, method: str, group_size: int) -> None:
    native.use_cpu(cpu)
    weights = torch.zeros((3, 300), dtype=DTYPES[kind])
    weights[1] = -0.0
    answer, trits, scales = run_method(method, weights, kind, group_size)
    assert answer == -1
    assert not trits.any()
    assert scales.numpy().tobytes() == bytes(8 * scales.numel())  # +0


@every_cpu
@every_kind
@every_method
def test_one_pass_over_groups_gives_what_three_do(cpu: str, kind: str, method: str) -> None:
    native.use_cpu(cpu)
    for seed, (rows, cols) in enumerate([(1, 1), (3, 127), (5, 128), (7, 391), (2, 16500)]):
        for group_size in (-1, 1, 7, 64, 128, 200):
            generator = torch.Generator().manual_seed(seed)
            weights = torch.randn(rows, cols, generator=generator).mul(0.02).to(DTYPES[kind])
            weights[0, : cols // 2] = 0
            if kind == "F32" and rows > 1:  # a mean that no float32 holds
                weights[1] = 0
                weights[1, ::3] = 1e-45
            fit = fit_planes(weights, group_size, METHODS[method])
            packed = fit_packed(weights, group_size, method)
            assert torch.equal(packed.packed, fit.packed)
            assert torch.equal(packed.scales, fit.scales)
            figures = packed.squared_error, packed.energy, packed.nonzero
            assert figures == (fit.squared_error, fit.energy, fit.nonzero)


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_one_pass_over_groups_refuses_what_is_not_finite(kind: str, value: float) -> None:
    weights = torch.ones(3, 300, dtype=DTYPES[kind])
    weights[2, 299] = value
    with pytest.raises(WeightError, match=r"1 of 900 are NaN or infinite, first .* at \[2, 299\]"):
        fit_packed(weights, 128, "itf")
    with pytest.raises(ValueError, match="group_size is 0"):
        out, scales = torch.empty(3, 60, dtype=torch.uint8), torch.empty(1, 1, dtype=torch.float64)
        native.itf_packed(torch.ones(3, 300), "F32", 0, out, scales, 1)


@every_cpu
@every_kind
def test_a_weight_at_half_the_scale_is_zero(cpu: str, kind: str) -> None:
    native.use_cpu(cpu)
    weights = torch.tensor([[1.0, 3.0, -1.0, -3.0]]).to(DTYPES[kind])  # mean 2
    _, trits, scales = run_method("absmean", weights, kind, -1)
    assert trits.tolist() == [[0, 1, 0, -1]]
    assert scales.tolist() == [[2.0]]
    up = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    if kind == "F32":
        weights[0, 0] = up  # one unit more: the mean grows by a quarter of it, half the scale less
        assert run_method("absmean", weights, kind, -1)[1].tolist() == [[1, 1, 0, -1]]


@every_cpu
@every_kind
@every_method
def test_subnormals_count(cpu: str, kind: str, method: str) -> None:
    native.use_cpu(cpu)
    tiny = torch.finfo(DTYPES[kind]).smallest_normal * torch.finfo(DTYPES[kind]).eps
    weights = torch.tensor([[tiny, -tiny, 0.0, tiny]], dtype=torch.float64).to(DTYPES[kind])
    assert float(weights[0, 0]) == tiny > 0
    _, trits, scales = run_method(method, weights, kind, -1)
    assert trits.tolist() == [[1, -1, 0, 1]]
    assert scales.item() == (0.75 * tiny if method == "absmean" else tiny)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_16_bit_weights_may_come_as_their_bits(kind: str) -> None:
    weights = make_weights("normal", 10, 3, 300, kind)
    expected = run_method("twn", weights, kind, 128)
    for dtype in (torch.int16, torch.uint16):
        result = run_method("twn", weights.view(dtype), kind, 128)
        assert torch.equal(result[1], expected[1])
        assert torch.equal(result[2], expected[2])


# ------------------------------------------------------------------------------------------------
# levels


@every_cpu
@every_kind
@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 400)),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=seeds,
)
def test_levels_recognises_what_is_ternary(
    cpu: str, kind: str, shape: tuple[int, int], group_size: int, seed: int
) -> None:
    native.use_cpu(cpu)
    rows, cols = shape
    trits = random_trits(seed, rows, cols)
    groups = cuts(cols, group_size)
    trits[0, groups[-1]] = 0  # an all-zero group
    lengths = torch.tensor([cut.stop - cut.start for cut in groups])
    scales = make_weights("bits", seed, rows, len(groups), kind).abs()
    scales[scales == 0] = 1
    if group_size == 0:
        scales[:] = scales[0, 0].clone()
    weights = trits.to(DTYPES[kind]) * scales.repeat_interleave(lengths, 1)
    weights[weights == 0] *= -1
    answer, found, magnitudes = run_method("levels", weights, kind, group_size)
    assert answer == 1
    assert torch.equal(found, trits)
    if group_size == 0:
        assert magnitudes.item() == (scales[0, 0].item() if trits.any() else 0)
        return
    used = torch.tensor([[bool(row[cut].any()) for cut in groups] for row in trits])
    assert torch.equal(magnitudes, scales.double() * used)


@every_cpu
@every_kind
@pytest.mark.parametrize("group_size", [0, -1, 128])
@pytest.mark.parametrize("at", [0, 128, 1000, 1999])
@pytest.mark.parametrize("value", [0.25, 0.500244140625, float("inf"), float("nan")])
def test_levels_refuses_a_second_magnitude(
    cpu: str, kind: str, group_size: int, at: int, value: float
) -> None:
    native.use_cpu(cpu)
    weights = (random_trits(11, 5, 400) * 0.5).to(DTYPES[kind])
    assert run_method("levels", weights, kind, group_size)[0] == 1
    weights.view(-1)[at] = value
    if float(weights.view(-1)[at]) != 0.5:  # BF16 does not have the third value
        assert run_method("levels", weights, kind, group_size)[0] == 0


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize("group_size", [0, -1])
def test_levels_of_many_rows(threads: int, group_size: int) -> None:
    weights = random_trits(12, 2000, 1000).to(torch.bfloat16)
    answer, trits, _ = run_method("levels", weights, "BF16", group_size, threads)
    assert answer == 1
    assert torch.equal(trits, weights.to(torch.int8))
    weights[1500, 999] = 2
    assert run_method("levels", weights, "BF16", group_size, threads)[0] == 0


@every_kind
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_levels_of_one_value_that_is_not_finite(kind: str, value: float) -> None:
    weights = torch.full((2, 130), value, dtype=DTYPES[kind])
    for group_size in (0, -1, 128):
        assert run_method("levels", weights, kind, group_size)[0] == 0


# ------------------------------------------------------------------------------------------------
# The binding


def test_sizes_that_do_not_fit_raise() -> None:
    trits, scales = torch.zeros((2, 10), dtype=torch.int8), torch.zeros((2, 1))
    packed, nonzero = torch.zeros((2, 2), dtype=torch.uint8), torch.zeros((2, 1), dtype=torch.uint8)
    weights, wide = torch.zeros((2, 10)), scales.double()

    def refuse(name: str, *args: Any) -> None:
        with pytest.raises(ValueError, match="expected|divide|dtype"):
            getattr(native, name)(*args)

    refuse("pack", trits, -1, packed[:1], 1)
    refuse("pack", trits, 3, packed, 1)
    refuse("pack", trits, -2, packed, 1)
    refuse("unpack", packed, 11, -1, trits, 1)
    refuse("unpack", packed, 10, -1, trits[:1], 1)
    refuse("unpack", packed, -1, -1, trits, 1)
    refuse("unpack", packed, 2**63 - 1, 1, trits, 1)
    refuse("check", packed, 10, -1, nonzero[:1], 1)
    refuse("check", packed, 10, 5, nonzero, 1)
    refuse("dequantize", packed, scales, 10, -1, weights[:1], "F32", 1)
    refuse("dequantize", packed, scales[:0], 10, -1, weights, "F32", 1)
    refuse("dequantize", packed, torch.zeros((3, 1)), 10, -1, weights, "F32", 1)
    refuse("dequantize", packed, scales, 10, -1, weights, "F64", 1)
    refuse("dequantize", packed, scales, 10, -1, weights, "F16", 1)
    refuse("dequantize", packed, scales, 10, -1, weights.bfloat16(), "F16", 1)
    for name in ("absmean", "twn", "itf", "levels"):
        refuse(name, weights, "F32", -1, trits[:1], wide, 1)
        refuse(name, weights, "F32", -1, trits, wide[:1], 1)
        refuse(name, weights, "F32", 0, trits, wide, 1)
        refuse(name, weights, "BF16", -1, trits, wide, 1)
        refuse(name, weights.half(), "BF16", -1, trits, wide, 1)
        refuse(name, weights, "int8", -1, trits, wide, 1)


def test_arrays_are_never_converted() -> None:
    """A converted output would be a copy that nobody reads."""
    trits, packed = torch.zeros((2, 10), dtype=torch.int8), torch.zeros((2, 2), dtype=torch.uint8)
    for out in (packed.int(), torch.zeros((2, 4), dtype=torch.uint8)[:, ::2], packed.flatten()):
        with pytest.raises(TypeError):
            native.pack(trits, -1, out, 1)
    read_only = packed.numpy()
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        native.pack(trits, -1, read_only, 1)


def test_numpy_arrays_may_be_read_only_inputs() -> None:
    trits = np.array([[1, 0, -1, 1, 1, 0]], np.int8)
    trits.flags.writeable = False
    packed = np.zeros((1, 2), np.uint8)
    assert native.pack(trits, -1, packed, 1) == -1
    assert packed.tobytes() == b"\xdd\x79"


@pytest.mark.parametrize("group_size", [-1, 0, 128])
def test_nothing_gives_nothing(group_size: int) -> None:
    empty = torch.zeros((0, 10), dtype=torch.int8)
    packed = packed_of(empty, group_size)
    assert unpacked(packed, 10, group_size)[0] == -1
    assert checked(packed, 10, group_size)[0] == -1
    answer, _, scales = run_method("itf", torch.zeros((0, 10)), "F32", group_size)
    assert answer == -1
    assert scales.tolist() == ([[0.0]] if group_size == 0 else [])


def test_the_environment_chooses_the_cpu() -> None:
    code = "from ternarize import _native; print(_native.cpu())"

    def imported(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TERNARIZE_CPU": name},
            capture_output=True,
            text=True,
        )

    assert imported(CPUS[0]).stdout.strip() == CPUS[0] == "portable"
    assert imported(CPUS[-1]).stdout.strip() == CPUS[-1]
    wrong = imported("abacus")
    assert wrong.returncode != 0
    assert "TERNARIZE_CPU is 'abacus'" in wrong.stderr


OUT_OF_MEMORY = """
import resource
import numpy as np
from ternarize import _native

width = 1 << 24  # of a row and so of a chunk: two parts, each of which wants 48 MB
out, sizes = np.empty((2, 32 + 2 * width), np.uint8), np.empty(2, np.int32)
given = np.zeros((2, width), np.uint8), np.zeros(width, np.uint8)
often = np.array([[4096] + [0] * 255], np.uint16)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)  # room for the stack of a thread
try:
    _native.rans_encode(*given, often, 1, out, sizes, 2)
except MemoryError:
    print("no memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit does not hold")
def test_memory_that_runs_out_in_threads_is_an_error_and_no_abort() -> None:
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("no memory\n", 0), done.stderr


def test_an_unknown_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="abacus"):
        native.use_cpu("abacus")


# ------------------------------------------------------------------------------------------------
# Streams


@every_cpu
@pytest.mark.parametrize("cols", [100, 128, 391, 1280])
def test_streams_of_many_chunks_come_out_whatever_the_cpu(cpu: str, cols: int) -> None:
    generator = torch.Generator().manual_seed(cols)
    width = packed_width(cols, 128)
    for chunks, more in [(1, 0), (2, 1), (3, 0), (4, 0), (4, 5), (5, 0), (9, 3)]:
        rows = chunks * (CHUNK // width) + more
        trits = torch.randint(-1, 2, (rows, cols), generator=generator, dtype=torch.int8)
        packed, classes = pack(trits, 128), classes_of_trits(cols, 128)
        stream = encode_rows(packed, classes)
        native.use_cpu(cpu)

        def read(at: int, size: int, stream: Tensor = stream) -> Tensor:
            return stream[at : at + size].clone()

        for threads in (1, 3):
            found = decode_rows(read, len(stream), (rows, width), classes, threads=threads)
            assert torch.equal(found, packed)


@every_cpu
def test_the_first_damaged_chunk_of_a_stream_is_named(cpu: str) -> None:
    cols, width = 1280, packed_width(1280, 128)
    rows = 11 * (CHUNK // width)
    generator = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (rows, cols), generator=generator, dtype=torch.int8)
    packed, classes = pack(trits, 128), classes_of_trits(cols, 128)
    whole = encode_rows(packed, classes)
    native.use_cpu(cpu)
    size = len(whole) // 11  # about that of a chunk
    for chunk in range(11):
        stream = whole.clone()
        stream[len(whole) - (11 - chunk) * size + size // 2 :] ^= 0x55  # and all behind it

        def read(at: int, count: int, stream: Tensor = stream) -> Tensor:
            return stream[at : at + count].clone()

        with pytest.raises(FormatError, match=rf"chunk {chunk} is damaged"):
            decode_rows(read, len(stream), (rows, width), classes)
