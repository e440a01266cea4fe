"""Groups, and the dense matrix behind trits and scales."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ternarize.errors import UsageError
from ternarize.trits.ternary import (
    Ternary,
    check_group_size,
    group_count,
    group_length,
    group_sums,
    split_groups,
    spread_scales,
)

GROUP_SIZES = (-1, 0, 1, 2, 5, 7, 128, 1000)


@pytest.mark.parametrize(
    ("cols", "group_size", "length", "count"),
    [
        (256, 128, 128, 2),
        (257, 128, 128, 3),  # the last group has one weight
        (100, 128, 100, 1),  # a group is never longer than its row
        (100, -1, 100, 1),
        (100, 0, 100, 1),
        (1, 128, 1, 1),
        (7, 1, 1, 7),
        (0, 128, 1, 0),  # a row without weights has no groups
        (0, -1, 1, 0),
    ],
)
def test_a_row_is_cut_into_groups(cols: int, group_size: int, length: int, count: int) -> None:
    assert group_length(cols, group_size) == length
    assert group_count(cols, group_size) == count


@given(cols=st.integers(1, 5000), group_size=st.integers(-1, 6000))
def test_groups_are_those_of_the_format(cols: int, group_size: int) -> None:
    length = reference.group_length(cols, group_size)
    assert group_length(cols, group_size) == length
    assert group_count(cols, group_size) == len(range(0, cols, length))


@pytest.mark.parametrize("group_size", [-1, 0, 1, 128, 2**40])
def test_group_sizes_that_have_a_meaning_are_accepted(group_size: int) -> None:
    assert check_group_size(group_size) == group_size


@pytest.mark.parametrize("group_size", [-2, -128])
def test_other_group_sizes_are_refused_with_their_value(group_size: int) -> None:
    with pytest.raises(UsageError, match=f"group size: {group_size};"):
        check_group_size(group_size)


def test_the_last_group_is_padded_with_zeros() -> None:
    values = torch.arange(1, 8).reshape(1, 7)
    assert split_groups(values, 3).tolist() == [[[1, 2, 3], [4, 5, 6], [7, 0, 0]]]
    assert split_groups(values, -1).tolist() == [[[1, 2, 3, 4, 5, 6, 7]]]


def test_groups_are_summed_and_scales_spread_over_them() -> None:
    values = torch.arange(1, 8).reshape(1, 7)
    assert group_sums(values, 3).tolist() == [[6, 15, 7]]
    assert group_sums(values, 0).tolist() == [[28]]
    assert spread_scales(torch.tensor([[1, 2, 3]]), 7, 3).tolist() == [[1, 1, 1, 2, 2, 2, 3]]
    assert spread_scales(torch.tensor([[5], [6]]), 2, -1).tolist() == [[5, 5], [6, 6]]
    stack = torch.arange(12).reshape(2, 3, 2)
    assert spread_scales(stack, 5, 3).shape == (2, 3, 5)


def random_ternary(seed: int, shape: tuple[int, ...], group_size: int) -> Ternary:
    random = torch.Generator().manual_seed(seed)
    *stack, rows, cols = shape
    grid = (1, 1) if group_size == 0 else (rows, group_count(cols, group_size))
    trits = torch.randint(-1, 2, shape, generator=random, dtype=torch.int8)
    scales = torch.rand((*stack, *grid), generator=random, dtype=torch.float64) + 0.5
    return Ternary(trits, scales, group_size)


@settings(deadline=None, max_examples=80)
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 40)),
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 40)),
    ),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 2**32),
)
def test_a_weight_is_its_trit_times_the_scale_of_its_group(
    shape: tuple[int, ...], group_size: int, seed: int
) -> None:
    ternary = random_ternary(seed, shape, group_size)
    trits, scales = ternary.trits.numpy(), ternary.scales.numpy()
    expected = np.zeros(shape)
    length = shape[-1] if group_size <= 0 else min(group_size, shape[-1])
    for *stack, row, col in np.ndindex(shape):
        scale = scales[(*stack, 0, 0) if group_size == 0 else (*stack, row, col // length)]
        expected[(*stack, row, col)] = scale * trits[(*stack, row, col)]
    assert np.array_equal(ternary.dequantize(torch.float64).numpy(), expected)
    found = ternary.dequantize()
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_dtype_asked_for_and_zeros_have_no_sign(dtype: torch.dtype) -> None:
    trits = torch.tensor([[1, 0, -1]], dtype=torch.int8)
    ternary = Ternary(trits, torch.tensor([[1.5]], dtype=torch.float64), -1)
    found = ternary.dequantize(dtype)
    assert found.dtype == dtype
    assert found.tolist() == [[1.5, 0.0, -1.5]]
    assert not bool(found[0, 1].signbit())


def test_sparsity_is_the_share_of_zero_trits() -> None:
    trits = torch.tensor([[1, 0, -1, 0], [0, 0, 0, 1]], dtype=torch.int8)
    assert Ternary(trits, torch.ones(2, 1), -1).sparsity == 5 / 8
    assert Ternary(torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 1), -1).sparsity == 1.0
