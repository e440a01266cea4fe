"""int8: how near a weight comes, and what is refused."""

import pytest
import torch

from ternarize.errors import FormatError
from ternarize.trits.int8 import dequantize_int8, encode_int8, int8_used
from ternarize.trits.ternary import group_count


@pytest.mark.parametrize("group_size", [-1, 0, 7, 128])
def test_int8_is_within_half_a_step_of_the_weight(group_size: int) -> None:
    weight = torch.randn((5, 200), generator=torch.Generator().manual_seed(8)).to(torch.float16)
    weight[2] = 0
    q, scales = encode_int8(weight, group_size, torch.float32)
    length = 200 if group_size <= 0 else group_size
    step = scales.repeat_interleave(length, 1)[:, :200].expand(5, 200)
    dense = dequantize_int8(q, scales, group_size, torch.float32)
    assert int(q.abs().max()) == 127
    assert bool(((dense - weight.float()).abs() <= step * 0.50001).all())
    assert torch.equal(dense[2], torch.zeros(200))
    used = int8_used(q, group_size)
    assert torch.equal(used if group_size else used.any(-2, keepdim=True), scales != 0)


def test_minus_128_is_no_weight_of_int8() -> None:
    q = torch.zeros((2, 3), dtype=torch.int8)
    q[1, 1] = -128
    with pytest.raises(FormatError, match="^byte 4: -128 is no weight"):
        int8_used(q, -1)


def test_a_matrix_without_rows_has_no_int8_weights() -> None:
    for group_size in (-1, 0, 4):
        q, scales = encode_int8(torch.empty(0, 6), group_size, torch.float16)
        assert q.shape == (0, 6)
        assert scales.shape == ((1, 1) if group_size == 0 else (0, group_count(6, group_size)))
