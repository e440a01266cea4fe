"""What a part of a packed tensor, as tensor parallelism cuts it, can still be read as."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.runtime.forms import Layout, check_part


class Part:
    """A tensor of which this process holds a part, as tensor parallelism cuts it."""

    def __init__(self, part: Tensor) -> None:
        self.part, self.device_mesh = part, SimpleNamespace(size=lambda: 2)

    def to_local(self) -> Tensor:
        return self.part


@pytest.mark.parametrize(
    ("group_size", "packed", "scale", "fits"),
    [
        (32, (24, 14), (24, 2), True),  # two of four groups
        (32, (12, 28), (12, 4), True),  # half of the rows
        (64, (24, 13), (24, 1), True),
        (128, (24, 13), (24, 1), False),  # half of the only group
        (-1, (24, 13), (24, 1), False),
        (-1, (24, 13), (24, 0), False),  # the other half, which has no scale
        (-1, (12, 26), (12, 1), True),
        (0, (12, 26), (1, 1), False),
    ],
)
def test_parts_of_whole_groups_alone_can_be_read(
    group_size: int, packed: tuple[int, int], scale: tuple[int, int], fits: bool
) -> None:
    part, scales = Part(torch.zeros(packed, dtype=torch.uint8)), Part(torch.zeros(scale))
    if fits:
        check_part("mlp.weight", part, scales, Layout(128, group_size))
        return
    with pytest.raises(UsageError, match="mlp.weight: 128 columns .* needs whole groups in each"):
        check_part("mlp.weight", part, scales, Layout(128, group_size))


def test_a_cut_through_the_columns_of_two_planes_is_refused() -> None:
    layout = Layout(128, 32, planes=2)
    check_part("w", Part(torch.zeros(12, 56)), Part(torch.zeros(12, 8)), layout)  # half the rows
    with pytest.raises(UsageError, match="cannot be cut"):
        check_part("w", Part(torch.zeros(24, 28)), Part(torch.zeros(24, 4)), layout)


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (Layout(128, 32, rotation=(64, 0)), "rotation 64"),
        (Layout(128, 32, activations="int8"), "int8 activations"),
    ],
)
def test_a_cut_through_columns_that_belong_together_is_refused(layout: Layout, what: str) -> None:
    check_part("w", Part(torch.zeros(12, 28)), Part(torch.zeros(12, 4)), layout)  # half the rows
    with pytest.raises(UsageError, match=f"w: 128 columns with {what} cannot be cut for 2"):
        check_part("w", Part(torch.zeros(24, 14)), Part(torch.zeros(24, 2)), layout)
