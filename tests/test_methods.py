"""What the methods compute, against their definitions, on the compiled core and on torch.

The definitions are restated plainly: loops over groups, exact fractions where rounding could hide
something. Sums are restated in numpy, in the order that `fixed_sum` promises.
"""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engines import ENGINES, engine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize.errors import UsageError, WeightError
from ternarize.trits.methods import METHODS, absmean, itf, levels, twn, with_scale_bits, with_zeros
from ternarize.trits.methods.grouped import distance, fixed_sum, group_sum
from ternarize.trits.scales import scale_codes, scale_values, store_scales
from ternarize.trits.ternary import Ternary, scaled

Floats = npt.NDArray[np.float64]
Trits = npt.NDArray[np.int8]

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,  # has no compiled kernel: torch on both engines
}
GROUP_SIZES = (-1, 0, 1, 2, 5, 7, 64, 127, 128, 129, 1000)
FLAVOURS = ("normal", "ties", "subnormal", "outliers", "sparse")

every_engine = pytest.mark.parametrize("name", ENGINES)
every_dtype = pytest.mark.parametrize("kind", DTYPES)
every_method = pytest.mark.parametrize("method", METHODS)
every_grouping = pytest.mark.parametrize("group_size", [-1, 0, 1, 5, 128])


# ------------------------------------------------------------------------------------------------
# Weights, and the groups of a matrix


def make_weight(flavour: str, seed: int, shape: tuple[int, ...], kind: str) -> Tensor:
    """Weights that are hard in one way; always finite."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random, dtype=torch.float64) * 0.02
    if flavour == "ties":  # few magnitudes, so that means fall on halves of weights
        weight = torch.randint(-3, 4, shape, generator=random).double()
    if flavour == "subnormal":
        weight = weight * torch.finfo(DTYPES[kind]).smallest_normal
    if flavour == "outliers":  # weights from next to nothing up to the largest of float16
        weight = weight * 10 ** torch.randint(-3, 7, shape, generator=random).double()
        weight = weight.clamp(-65504, 65504)
    if flavour == "sparse":  # whole groups of zeros, of both signs
        weight = weight * (torch.rand(shape, generator=random) < 0.02)
    return weight.to(DTYPES[kind])


def groups_of(shape: tuple[int, ...], group_size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Index of the scale and index of the weights, of every group of a matrix."""
    rows, cols = shape
    if group_size == 0:
        yield (0, 0), (slice(None), slice(None))  # type: ignore[misc]
        return
    length = cols if group_size < 0 else group_size
    for row, (g, start) in itertools.product(range(rows), enumerate(range(0, cols, length))):
        yield (row, g), (row, slice(start, start + length))  # type: ignore[misc]


def plain_sum(values: Floats) -> float:
    """Blocks of 128, halves added to halves; then the same over the sums of the blocks."""
    while True:
        padded = np.zeros(max(1, -(-len(values) // 128)) * 128)
        padded[: len(values)] = values
        sums = []
        for start in range(0, len(padded), 128):
            block = padded[start : start + 128]
            while len(block) > 1:
                block = block[: len(block) // 2] + block[len(block) // 2 :]
            sums.append(block[0])
        if len(sums) == 1:
            return float(sums[0])
        values = np.array(sums)


def plain_total(group: Floats) -> float:
    """Sum of a group: of a piece of a row, or of a matrix by its rows."""
    return plain_sum(np.array([plain_sum(row) for row in group]) if group.ndim == 2 else group)


def plain_mean(magnitude: Floats, mask: npt.NDArray[np.bool_]) -> float:
    """Mean of the |w| that are chosen; 0 if none is."""
    return plain_total(np.where(mask, magnitude, 0.0)) / int(mask.sum()) if mask.any() else 0.0


def arrays(weight: Tensor, ternary: Ternary) -> tuple[Floats, Trits, Floats]:
    return weight.double().numpy(), ternary.trits.numpy(), ternary.scales.numpy()


weights_of_any_kind = given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 300)),
    kind=st.sampled_from(list(DTYPES)),
    flavour=st.sampled_from(FLAVOURS),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 2**32),
)
few = settings(deadline=None, max_examples=40)


# ------------------------------------------------------------------------------------------------
# absmean


@every_engine
@few
@weights_of_any_kind
def test_absmean_is_the_rule_of_bitnet_b158_on_each_group(
    name: str, shape: tuple[int, int], kind: str, flavour: str, group_size: int, seed: int
) -> None:
    """eq. 1-3: scale = mean |w|, trit = RoundClip(w / scale, -1, 1), in exact fractions."""
    weight = make_weight(flavour, seed, shape, kind)
    with engine(name):
        exact, trits, scales = arrays(weight, absmean(weight, group_size))
    for at, where in groups_of(shape, group_size):
        group = exact[where]
        scale = plain_mean(np.abs(group), np.ones(group.shape, np.bool_))
        assert scales[at] == scale
        for w, trit in zip(group.flat, trits[where].flat, strict=True):
            rounded = round(Fraction(w) / Fraction(scale)) if scale else 0  # halves to even
            assert trit == max(-1, min(1, rounded))


@every_engine
@every_dtype
def test_absmean_with_one_scale_is_the_paper_s_own_rule(name: str, kind: str) -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -1.0]], dtype=DTYPES[kind])
    with engine(name):
        ternary = absmean(weight, 0)
    assert ternary.scales.tolist() == [[2.0]]
    # 1 / 2 and -1 / 2 are ties: they round to the even 0
    assert ternary.trits.tolist() == [[0, -1, 1], [0, 1, 0]]
    assert ternary.scales.dtype == torch.float64
    assert ternary.trits.dtype == torch.int8


@every_engine
def test_absmean_rounds_ties_to_zero_and_the_next_weight_up(name: str) -> None:
    one, unit = 1.0, 2.0**-23
    weight = torch.tensor([one, one + unit, -one, -(one + unit), 7.0, 1 - 2 * unit])  # mean 2
    with engine(name):
        ternary = absmean(weight.unsqueeze(0), -1)
    assert ternary.scales.tolist() == [[2.0]]
    assert ternary.trits[0, :4].tolist() == [0, 1, 0, -1]


# ------------------------------------------------------------------------------------------------
# twn


@every_engine
@few
@weights_of_any_kind
def test_twn_cuts_at_seven_tenths_of_the_mean_and_fits_the_scale(
    name: str, shape: tuple[int, int], kind: str, flavour: str, group_size: int, seed: int
) -> None:
    """eq. 3-6: trit = sign(w) where |w| > 0.7 mean |w|, scale = mean of these |w|."""
    weight = make_weight(flavour, seed, shape, kind)
    with engine(name):
        exact, trits, scales = arrays(weight, twn(weight, group_size))
    for at, where in groups_of(shape, group_size):
        group = exact[where]
        mean = plain_mean(np.abs(group), np.ones(group.shape, np.bool_))
        mask = np.abs(group) > 0.7 * mean
        assert np.array_equal(trits[where], np.sign(group) * mask)
        assert scales[at] == plain_mean(np.abs(group), mask)


@every_engine
def test_twn_drops_a_weight_at_the_threshold_and_takes_the_next_one_up(name: str) -> None:
    unit = 2.0**-20
    weight = torch.tensor([[7.0, 7 + unit, -13.0, 13 - unit]])  # mean 10, threshold 7
    with engine(name):
        assert twn(weight, -1).trits.tolist() == [[0, 1, -1, 1]]


@every_engine
@every_dtype
def test_twn_on_a_group_that_can_be_done_by_hand(name: str, kind: str) -> None:
    weight = torch.tensor([[1.0, 0.5, -0.25, -2.0]], dtype=DTYPES[kind])  # 0.7 mean = 0.65625
    with engine(name):
        ternary = twn(weight, 128)
    assert ternary.trits.tolist() == [[1, 0, 0, -1]]
    assert ternary.scales.tolist() == [[1.5]]


# ------------------------------------------------------------------------------------------------
# itf


@every_engine
@few
@weights_of_any_kind
def test_itf_ends_where_neither_trits_nor_scale_can_improve(
    name: str, shape: tuple[int, int], kind: str, flavour: str, group_size: int, seed: int
) -> None:
    weight = make_weight(flavour, seed, shape, kind)
    with engine(name):
        exact, trits, scales = arrays(weight, itf(weight, group_size))
    for at, where in groups_of(shape, group_size):
        group, mask = exact[where], trits[where] != 0
        assert scales[at] == plain_mean(np.abs(group), mask)  # best scale of these trits
        nearest = np.sign(group) * (np.abs(group) > scales[at] / 2)
        assert np.array_equal(trits[where], nearest)  # best trits of this scale


@every_engine
@few
@weights_of_any_kind
def test_itf_has_no_larger_squared_error_than_twn(
    name: str, shape: tuple[int, int], kind: str, flavour: str, group_size: int, seed: int
) -> None:
    weight = make_weight(flavour, seed, shape, kind)
    with engine(name):
        start, end = twn(weight, group_size), itf(weight, group_size)
    exact = weight.double().numpy()
    before = (exact - start.dequantize(torch.float64).numpy()) ** 2
    after = (exact - end.dequantize(torch.float64).numpy()) ** 2
    for _, where in groups_of(shape, group_size):
        # the last digits are those of the sums, not of the methods
        slack = 1e-12 * math.fsum((exact[where] ** 2).flat)
        assert math.fsum(after[where].flat) <= math.fsum(before[where].flat) + slack


@every_engine
def test_itf_is_all_but_optimal_on_gaussian_weights(name: str) -> None:
    weight = make_weight("normal", 7, (200, 128), "F32")
    with engine(name):
        error, _, _ = distance(weight, itf(weight, 128))
        error_of_twn, _, _ = distance(weight, twn(weight, 128))
    # the best k trits of a group are its k largest weights, and leave sum w^2 - (sum |w|)^2 / k
    magnitude = np.sort(np.abs(weight.double().numpy()))[:, ::-1]
    gain = np.cumsum(magnitude, 1) ** 2 / np.arange(1, 129)
    optimum = float(((magnitude**2).sum(1) - gain.max(1)).sum())
    assert optimum <= error <= 1.0002 * optimum
    assert error_of_twn > 1.0002 * optimum  # so that the line above says something


@pytest.mark.parametrize("group_size", [-1, 0, 7, 128])
@pytest.mark.parametrize("bits", [8, 6])
@every_dtype
def test_itf_for_scales_of_few_bits_takes_the_trits_that_are_nearest_to_those(
    bits: int, group_size: int, kind: str
) -> None:
    weight = make_weight("normal", 5, (6, 300), kind)
    plain, found = itf(weight, group_size), with_scale_bits(bits)(weight, group_size)
    stored = scale_codes(plain.scales, bits)
    assert torch.equal(found.scales, scale_values(stored, torch.float64))
    assert torch.equal(store_scales(found.scales, bits=bits), stored)
    assert bool((found.trits * weight.sign() >= 0).all())
    own = weight.double()
    missed = {t: (own - scaled(torch.full_like(own, t), found.scales, group_size)).abs()
              for t in (-1, 0, 1)}  # fmt: skip
    least = torch.stack([*missed.values()]).amin(0)
    for trit, miss in missed.items():
        at = found.trits == trit
        assert torch.equal(miss[at], least[at])
    before = distance(weight, Ternary(plain.trits, found.scales, group_size))[0]
    assert distance(weight, found)[0] <= before * (1 + 1e-6)


def test_itf_for_scales_of_few_bits_leaves_those_that_these_cannot_hold() -> None:
    weight = torch.tensor([[1e-6, -2e-6, 1e5, 1e5, 1.0, -1.1]])
    found, plain = with_scale_bits(8)(weight, 2), itf(weight, 2)
    assert torch.equal(found.trits, plain.trits)
    assert torch.equal(found.scales[:, :2], plain.scales[:, :2])
    assert found.scales[0, 2] == 1.0  # of 1.05


# ------------------------------------------------------------------------------------------------
# All methods


@every_dtype
@pytest.mark.parametrize("group_size", [-1, 0, 1, 7, 128])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 0.999])
def test_of_a_share_of_zeros_each_group_has_its_smallest_weights(
    share: float, group_size: int, kind: str
) -> None:
    weight = make_weight("normal", 3, (6, 300), kind)
    found = with_zeros(share)(weight, group_size)
    length = 6 * 300 if group_size == 0 else 300 if group_size == -1 else group_size
    rows = weight.reshape(1, -1) if group_size == 0 else weight
    trits, scales = found.trits.reshape(rows.shape), found.scales.reshape(len(rows), -1)
    for row in range(len(rows)):
        for group, at in enumerate(range(0, rows.shape[1], length)):
            part = rows[row, at : at + length].double()
            own = trits[row, at : at + length]
            zeros = min(round(share * len(part)), len(part) - 1)
            kept = part.abs().sort().values[zeros:]
            assert int((own == 0).sum()) >= zeros  # more where magnitudes are equal
            used = part[own != 0].abs()
            assert bool((own == part.sign() * (own != 0)).all())
            assert used.numel() == 0 or used.min() >= kept.min()
            mean = used.mean() if used.numel() else torch.zeros(())
            assert math.isclose(scales[row, group], mean, rel_tol=1e-12)


def test_a_group_keeps_one_weight_and_of_equal_ones_none() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [1.0, 1.0, -1.0]])
    found = with_zeros(0.999)(weight, -1)
    assert found.trits.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert found.scales.tolist() == [[3.0], [0.0]]


@every_engine
@every_method
@every_grouping
@every_dtype
def test_a_group_of_zeros_has_scale_0_and_does_not_touch_its_neighbours(
    name: str, method: str, group_size: int, kind: str
) -> None:
    zeros = torch.zeros((3, 257), dtype=DTYPES[kind])
    zeros[1] = -0.0
    with engine(name):
        ternary = METHODS[method](zeros, group_size)
        assert not bool(ternary.trits.any())
        assert not bool(ternary.scales.any())
        assert not bool(ternary.scales.signbit().any())
        mixed = zeros.clone()
        mixed[1, 128] = -0.75
        ternary = METHODS[method](mixed, group_size)
    assert ternary.trits.nonzero().tolist() == [[1, 128]]
    assert int(ternary.scales.count_nonzero()) == 1


@every_engine
@every_method
@every_dtype
def test_the_smallest_weight_is_not_lost(name: str, method: str, kind: str) -> None:
    weight = torch.zeros((1, 128), dtype=DTYPES[kind])
    smallest = torch.nextafter(weight[0, 0], torch.ones((), dtype=DTYPES[kind]))
    if kind == "F64":  # a mean of anything smaller is no longer a float64
        smallest = torch.tensor(2.0**-1022 * 128, dtype=torch.float64)
    weight[0, 5] = -smallest
    with engine(name):
        ternary = METHODS[method](weight, 128)
    assert ternary.trits[0, 5] == -1
    assert int(ternary.trits.count_nonzero()) == 1
    share = 128 if method == "absmean" else 1
    assert ternary.scales.tolist() == [[float(smallest) / share]]


@every_engine
@every_method
@every_dtype
def test_the_largest_weights_do_not_overflow(name: str, method: str, kind: str) -> None:
    largest = torch.finfo(DTYPES[kind]).max if kind != "F64" else 1e300
    weight = torch.full((2, 300), largest, dtype=DTYPES[kind])
    weight[:, ::2] *= -1
    with engine(name):
        ternary = METHODS[method](weight, 0)
    assert ternary.scales.tolist() == [[pytest.approx(float(weight[0, 1]), rel=1e-14)]]
    assert torch.equal(ternary.trits.double(), weight.double().sign())


@every_engine
@every_method
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_with_number_and_place(
    name: str, method: str, kind: str, value: float
) -> None:
    weight = make_weight("normal", 1, (4, 300), kind)
    weight[2, 299] = value
    weight[3, :2] = value
    what = "NaN" if math.isnan(value) else "infinite"
    with engine(name):
        for group_size in (-1, 0, 1, 128):
            with pytest.raises(
                WeightError, match=rf"^weights: 3 of 1200 .*\({what}\) at \[2, 299\];"
            ):
                METHODS[method](weight, group_size)
            with pytest.raises(
                WeightError, match=rf"^weights: 3 of 1200 .*\({what}\) at \[1, 0, 299\];"
            ):
                METHODS[method](weight.reshape(2, 2, 300), group_size)


@every_engine
@every_method
@every_dtype
@every_grouping
def test_experts_are_ternarized_one_by_one(
    name: str, method: str, kind: str, group_size: int
) -> None:
    experts = make_weight("normal", 3, (3, 4, 150), kind)
    experts[1] *= 16
    with engine(name):
        stack = METHODS[method](experts, group_size)
        alone = [METHODS[method](expert, group_size) for expert in experts]
    assert torch.equal(stack.trits, torch.stack([one.trits for one in alone]))
    assert torch.equal(stack.scales, torch.stack([one.scales for one in alone]))
    assert stack.group_size == group_size


@every_method
@settings(deadline=None, max_examples=80)
@weights_of_any_kind
def test_the_compiled_core_and_torch_give_the_same_bits(
    method: str, shape: tuple[int, int], kind: str, flavour: str, group_size: int, seed: int
) -> None:
    weight = make_weight(flavour, seed, shape, kind)
    results = []
    for name in ENGINES:
        with engine(name):
            ternary = METHODS[method](weight, group_size)
            results.append((ternary.trits.numpy().tobytes(), ternary.scales.numpy().tobytes()))
    assert results[0] == results[1]


@every_method
@pytest.mark.parametrize("group_size", [0, -1, 128, 1000])
def test_the_engines_agree_on_a_large_matrix(method: str, group_size: int) -> None:
    weight = make_weight("normal", 11, (17, 16500), "BF16")
    with engine("native"):
        native = METHODS[method](weight, group_size)
    with engine("torch"):
        twin = METHODS[method](weight, group_size)
    assert torch.equal(native.trits, twin.trits)
    assert torch.equal(native.scales, twin.scales)


@every_method
@every_engine
def test_the_number_of_threads_changes_nothing(name: str, method: str) -> None:
    weight = make_weight("normal", 5, (40, 2000), "F32")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with engine(name):
                ternary = METHODS[method](weight, 0)
            results.append((ternary.trits.numpy().tobytes(), float(ternary.scales)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


@every_engine
@every_method
def test_a_transposed_view_is_read_as_the_matrix_that_it_is(name: str, method: str) -> None:
    weight = make_weight("normal", 6, (37, 90), "BF16")
    with engine(name):
        view = METHODS[method](weight.t(), 16)
        copy = METHODS[method](weight.t().contiguous(), 16)
    assert torch.equal(view.trits, copy.trits)
    assert torch.equal(view.scales, copy.scales)


@every_engine
@every_method
def test_a_parameter_is_taken_as_its_values_and_stays_as_it_is(name: str, method: str) -> None:
    values = make_weight("normal", 8, (3, 200), "F32")
    weight = torch.nn.Parameter(values.clone())
    with engine(name):
        ternary = METHODS[method](weight, 128)
        expected = METHODS[method](values, 128)
    assert torch.equal(ternary.trits, expected.trits)
    assert torch.equal(ternary.scales, expected.scales)
    assert not ternary.scales.requires_grad
    assert torch.equal(weight.detach(), values)


@every_engine
@every_method
@every_grouping
@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (0, 3, 12)])
def test_a_matrix_without_rows_has_no_trits(
    name: str, method: str, group_size: int, shape: tuple[int, ...]
) -> None:
    with engine(name):
        ternary = METHODS[method](torch.zeros(shape), group_size)
    assert ternary.trits.shape == shape
    grid = (1, 1) if group_size == 0 else (shape[-2], len(range(0, 12, max(group_size, 1))))
    if group_size == -1:
        grid = (shape[-2], 1)
    assert ternary.scales.shape == (*shape[:-2], *grid)
    assert not bool(ternary.scales.any())


@every_engine
@every_method
def test_a_group_size_without_meaning_is_refused(name: str, method: str) -> None:
    with engine(name), pytest.raises(UsageError, match="group size: -3;"):
        METHODS[method](torch.ones(2, 2), -3)


# ------------------------------------------------------------------------------------------------
# levels: weights that are ternary already


def ternary_weight(seed: int, kind: str, group_size: int, shape: tuple[int, int]) -> Tensor:
    """scale * trit with a scale per group, exact in every dtype; all zeros in some groups."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-1, 2, shape, generator=random).double()
    for at, where in groups_of(shape, group_size):
        weight[where] *= (7 * at[0] + 3 * at[1]) % 100 / 64  # 0 in the first group
    return weight.to(DTYPES[kind])


@every_engine
@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)),
    kind=st.sampled_from(list(DTYPES)),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 2**32),
)
def test_levels_gives_back_exactly_what_was_ternary(
    name: str, shape: tuple[int, int], kind: str, group_size: int, seed: int
) -> None:
    weight = ternary_weight(seed, kind, group_size, shape)
    with engine(name):
        ternary = levels(weight, group_size)
    assert ternary is not None
    assert torch.equal(ternary.dequantize(torch.float64), weight.double())
    for at, where in groups_of(shape, group_size):
        assert float(ternary.scales[at]) == float(weight[where].double().abs().max())


@every_engine
@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(2, 300)),
    kind=st.sampled_from(list(DTYPES)),
    group_size=st.sampled_from([g for g in GROUP_SIZES if g != 1]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_levels_sees_one_weight_that_is_off_by_one_unit(
    name: str, shape: tuple[int, int], kind: str, group_size: int, seed: int, data: st.DataObject
) -> None:
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=random) * 2 - 1
    weight = (0.75 * signs).to(DTYPES[kind])
    row, col = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    length = shape[1] if group_size <= 0 else group_size
    alone = col % length == 0 and col == shape[1] - 1 and (group_size != 0)
    weight[row, col] = torch.nextafter(weight[row, col], torch.zeros((), dtype=weight.dtype))
    with engine(name):
        # a group of one weight is ternary whatever it is
        assert (levels(weight, group_size) is not None) == alone


@every_engine
@every_dtype
def test_levels_tells_tensors_rows_and_groups_apart(name: str, kind: str) -> None:
    by_tensor = torch.tensor([[0.5, -0.5, 0.0, 0.5]] * 2, dtype=DTYPES[kind])
    by_row = by_tensor * torch.tensor([[1.0], [2.0]], dtype=DTYPES[kind])
    by_group = by_tensor * torch.tensor([[1.0, 1.0, 2.0, 2.0]], dtype=DTYPES[kind])
    dense = torch.tensor([[0.5, -0.25, 0.0, 1.0]] * 2, dtype=DTYPES[kind])
    with engine(name):
        found = {
            what: [group_size for group_size in (0, -1, 2) if levels(weight, group_size)]
            for what, weight in {
                "tensor": by_tensor,
                "row": by_row,
                "group": by_group,
                "dense": dense,
            }.items()
        }
    assert found == {"tensor": [0, -1, 2], "row": [-1, 2], "group": [2], "dense": []}


@every_engine
@every_dtype
@every_grouping
def test_levels_counts_negative_zero_as_zero(name: str, kind: str, group_size: int) -> None:
    weight = torch.tensor([[-0.0, 0.5, -0.0, -0.5, 0.0, -0.0]], dtype=DTYPES[kind])
    with engine(name):
        ternary = levels(weight, group_size)
        zeros = levels(torch.full((2, 6), -0.0, dtype=DTYPES[kind]), group_size)
    assert ternary is not None and zeros is not None
    assert ternary.trits.tolist() == [[0, 1, 0, -1, 0, 0]]
    assert not bool(ternary.dequantize().signbit()[0, [0, 2, 4, 5]].any())
    assert not bool(ternary.scales.signbit().any())
    assert not bool(zeros.trits.any() or zeros.scales.any() or zeros.scales.signbit().any())


@every_engine
@every_dtype
@every_grouping
def test_levels_does_not_take_what_is_not_finite(name: str, kind: str, group_size: int) -> None:
    for value, at in itertools.product((math.nan, math.inf, -math.inf), (0, 130, 299)):
        weight = torch.zeros((2, 300), dtype=DTYPES[kind])
        weight[1, at] = value
        with engine(name):
            assert levels(weight, group_size) is None
            weight[1] = value
            assert levels(weight, group_size) is None


@every_engine
@every_dtype
def test_levels_takes_experts_with_a_scale_each(name: str, kind: str) -> None:
    experts = torch.stack([ternary_weight(2, kind, -1, (1, 40)) + i for i in (1, 2)])
    experts = (experts.sign() * torch.tensor([0.5, 2.0]).reshape(2, 1, 1)).to(DTYPES[kind])
    spoiled = experts.clone()
    spoiled[1, 0, -1] = 3.0
    with engine(name):
        ternary = levels(experts, 0)
        assert levels(spoiled, 0) is None
    assert ternary is not None
    assert ternary.scales.flatten().tolist() == [0.5, 2.0]
    assert torch.equal(ternary.dequantize(DTYPES[kind]), experts)


@every_engine
@weights_of_any_kind
@settings(deadline=None, max_examples=60)
def test_levels_says_the_same_on_both_engines_and_is_never_wrong(
    name: str, shape: tuple[int, int], kind: str, flavour: str, group_size: int, seed: int
) -> None:
    weight = make_weight(flavour, seed, shape, kind)
    exact = weight.double().numpy()
    expected = all(
        len(set(np.abs(exact[where][exact[where] != 0]).flat)) <= 1
        for _, where in groups_of(shape, group_size)
    )
    with engine(name):
        ternary = levels(weight, group_size)
    assert (ternary is not None) == expected
    if ternary is not None:
        assert np.array_equal(ternary.dequantize(torch.float64).numpy(), exact)


# ------------------------------------------------------------------------------------------------
# Sums in a fixed order

HARMONIC = [1 / k for k in range(1, 301)]


def test_fixed_sum_has_a_golden_value_that_other_orders_miss() -> None:
    found = float(fixed_sum(torch.tensor(HARMONIC, dtype=torch.float64)))
    assert found.hex() == "0x1.92172a3e69659p+2"
    assert found == plain_sum(np.array(HARMONIC))
    assert found != sum(HARMONIC)


def test_group_sum_of_a_matrix_has_a_golden_value_rows_first() -> None:
    matrix = torch.tensor(HARMONIC, dtype=torch.float64).reshape(1, 3, 100)
    assert float(group_sum(matrix)).hex() == "0x1.92172a3e69658p+2"
    assert float(group_sum(matrix)) != float(fixed_sum(matrix.flatten()))


@pytest.mark.parametrize("size", [0, 1, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1, 40000])
def test_fixed_sum_is_the_restated_sum_at_every_depth(size: int) -> None:
    values = make_weight("normal", size, (2, size), "F64")
    assert fixed_sum(values).tolist() == [plain_sum(row) for row in values.numpy()]


def test_fixed_sum_does_not_depend_on_neighbours_or_threads() -> None:
    values = make_weight("normal", 1, (64, 3000), "F64")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.stack([fixed_sum(row) for row in values])
        torch.set_num_threads(3)
        assert torch.equal(fixed_sum(values), alone)
        assert torch.equal(fixed_sum(values.t().contiguous().t()), alone)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------
# How far the result is from the source


@every_engine
def test_the_distance_is_what_the_trits_leave(name: str) -> None:
    weight = torch.tensor([[1.0, -3.0, 0.5]])
    ternary = Ternary(
        torch.tensor([[1, -1, 0]], dtype=torch.int8), torch.tensor([[2.0]], dtype=torch.float64), -1
    )
    with engine(name):
        assert distance(weight, ternary) == (1 + 1 + 0.25, 1 + 9 + 0.25, 2)


@settings(deadline=None, max_examples=60)
@weights_of_any_kind
def test_the_distance_is_the_same_number_on_both_engines(
    shape: tuple[int, int], kind: str, flavour: str, group_size: int, seed: int
) -> None:
    weight = make_weight(flavour, seed, shape, kind)
    found = []
    for name in ENGINES:
        with engine(name):
            ternary = absmean(weight, group_size)
            found.append(distance(weight, ternary))
    assert found[0] == found[1]
    error, energy, nonzero = found[0]
    exact, dense = weight.double().numpy(), ternary.dequantize(torch.float64).numpy()
    # squares are float32: close in all, and below its range they are 0
    total = math.fsum((exact**2).flat)
    assert energy == pytest.approx(total, rel=1e-5, abs=1e-36)
    assert error == pytest.approx(math.fsum(((exact - dense) ** 2).flat), abs=1e-5 * total + 1e-36)
    assert nonzero == np.count_nonzero(dense)


@every_engine
def test_the_distance_of_nothing_is_nothing(name: str) -> None:
    for shape in ((0, 5), (2, 0, 5)):
        with engine(name):
            ternary = absmean(torch.zeros(shape), 2)
            assert distance(torch.zeros(shape), ternary) == (0.0, 0.0, 0)
