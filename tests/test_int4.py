"""int4: how near a weight comes, its bytes, and what is refused."""

import math

import pytest
import torch

from ternarize.errors import FormatError, WeightError
from ternarize.trits.int4 import (
    dequantize_int4,
    encode_int4,
    int4_dtype,
    int4_scales,
    int4_used,
    int4_width,
    pack_int4,
    unpack_int4,
)
from ternarize.trits.ternary import group_count, group_length

GROUPS = [-1, 0, 1, 7, 32, 128]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("group_size", GROUPS)
def test_packed_rows_are_the_codes_two_to_a_byte(group_size: int) -> None:
    q = (random(3, 45) * 4).round().clamp(-8, 7).to(torch.int8)
    packed = pack_int4(q, group_size)
    assert packed.shape == (3, int4_width(45, group_size)) and packed.dtype == torch.uint8
    length = group_length(45, group_size)
    for row, found in zip(q.tolist(), packed.tolist(), strict=True):
        expected = []
        for start in range(0, 45, length):
            codes = [n + 8 for n in row[start : start + length]]
            codes += [8] * (len(codes) % 2)
            expected += [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
        assert found == expected
    assert torch.equal(unpack_int4(packed, 45, group_size), q)
    used = [[any(r[s : s + length]) for s in range(0, 45, length)] for r in q.tolist()]
    assert int4_used(packed, 45, group_size).tolist() == used


def test_a_row_of_32s_takes_four_and_a_half_bits() -> None:
    assert int4_width(640, 32) == 320


@pytest.mark.parametrize("group_size", GROUPS)
def test_each_weight_becomes_the_nearest_multiple_of_its_scale(group_size: int) -> None:
    weight = random(5, 200).to(torch.float16)
    weight[2] = 0
    q, scales = encode_int4(weight, group_size, torch.float32)
    assert (int(q.min()), int(q.max())) == (-8, 7) if group_size != 1 else int(q.max()) == 0
    length = group_length(200, group_size)
    step = scales.repeat_interleave(length, 1)[:, :200].expand(5, 200)
    levels = torch.arange(-8, 8) * step.unsqueeze(-1)
    least = (levels - weight.unsqueeze(-1)).abs().amin(-1)
    dense = dequantize_int4(pack_int4(q, group_size), scales, 200, group_size, torch.float32)
    assert torch.allclose((dense - weight).abs(), least, rtol=0, atol=1e-6)
    assert torch.equal(dense[2], torch.zeros(200))
    used = int4_used(pack_int4(q, group_size), 200, group_size)
    assert torch.equal(used if group_size else used.any(-2, keepdim=True), scales != 0)


def test_a_scale_is_the_best_of_its_candidates() -> None:
    """The largest weight of a group lies on the side of -8, whatever its sign."""
    weight = random(40, 32)
    found = int4_scales(weight, -1)
    for row, scale in zip(weight.double(), found.flatten().tolist(), strict=True):
        largest = float(row[row.abs().argmax()])

        def error(step: float, row: torch.Tensor = row) -> float:
            return float(((row / step).round().clamp(-8, 7) * step - row).square().sum())

        candidates = [-largest / (6 + n / 4) for n in range(13)]
        assert any(math.isclose(scale, each, rel_tol=1e-6) for each in candidates)
        assert error(scale) <= min(map(error, candidates)) * (1 + 1e-5)
        assert scale * largest < 0
    assert {-1, 1} == set(found.sign().flatten().tolist())


def test_scales_go_with_the_size_of_the_weights() -> None:
    """No square of a weight is made, which float32 might not hold."""
    weight = random(4, 64)
    for power in (-120, -40, 60, 120):
        scales = int4_scales(weight * 2.0**power, 32)
        assert torch.equal(scales, int4_scales(weight, 32) * 2.0**power)
        held = int4_dtype(weight * 2.0**power, 32)
        assert held == torch.float32
    assert int4_dtype(weight, 32) == torch.float16
    q, scales = encode_int4(torch.full((1, 4), 2.0**-149), -1, torch.float32)
    assert not q.any() and not scales.any()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(number: float) -> None:
    weight = random(4, 64)
    weight[2, 40] = number
    for refused in (int4_scales, int4_dtype):
        with pytest.raises(WeightError, match="has weights that are not finite"):
            refused(weight, 32)


@pytest.mark.parametrize(
    ("cols", "group_size", "at"), [(5, -1, 2), (10, 5, 2), (10, 5, 5), (7, 4, 3), (33, 32, 16)]
)
def test_what_fills_up_a_group_is_the_code_of_0(cols: int, group_size: int, at: int) -> None:
    packed = torch.full((2, int4_width(cols, group_size)), 0x88, dtype=torch.uint8)
    assert not int4_used(packed, cols, group_size).any()
    packed[1, at] = 0x98
    with pytest.raises(FormatError, match=rf"^byte at \[1, {at}\]: a group is filled up"):
        int4_used(packed, cols, group_size)


def test_a_matrix_without_rows_has_no_int4_weights() -> None:
    for group_size in (-1, 0, 4):
        q, scales = encode_int4(torch.empty(0, 6), group_size, torch.float16)
        assert q.shape == (0, 6)
        assert pack_int4(q, group_size).shape == (0, int4_width(6, group_size))
        assert scales.shape == ((1, 1) if group_size == 0 else (0, group_count(6, group_size)))


def test_stacks_are_matrices_one_by_one() -> None:
    weight = random(3, 4, 10)
    for group_size in (-1, 0, 4):
        q, scales = encode_int4(weight, group_size, torch.float16)
        for each, numbers, steps in zip(weight, q, scales, strict=True):
            alone = encode_int4(each, group_size, torch.float16)
            assert torch.equal(alone[0], numbers) and torch.equal(alone[1], steps)
