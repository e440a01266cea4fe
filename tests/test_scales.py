"""Scales in 8 and 6 bits: which numbers they are, and where other ones go."""

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ternarize.trits.scales import scale_codes, scale_values, store_scales

NUMBERS = {
    code: Fraction(8 + code % 8, 8) * Fraction(2) ** (code // 8 - 15) for code in range(8, 248)
}


def test_a_code_stands_for_its_float16() -> None:
    codes = torch.tensor([0, *NUMBERS], dtype=torch.uint8)
    values = scale_values(codes, torch.float64).tolist()
    assert values == [0.0, *(float(number) for number in NUMBERS.values())]
    assert scale_codes(scale_values(codes)).tolist() == codes.tolist()


@settings(deadline=None, max_examples=300)
@given(
    scale=st.one_of(
        st.floats(2.0**-14, 61440.0),
        st.builds(
            lambda code, off: float(
                np.nextafter(float(NUMBERS[code] + NUMBERS[code + 1]) / 2, off)
            ),
            st.integers(8, 246),
            st.sampled_from([0.0, np.inf]),
        ),
        st.builds(lambda code: float(NUMBERS[code] + NUMBERS[code + 1]) / 2, st.integers(8, 246)),
    )
)
def test_a_scale_goes_to_the_nearest_number_and_at_the_middle_to_the_even_code(
    scale: float,
) -> None:
    exact = Fraction(scale)
    best = min(NUMBERS, key=lambda code: (abs(NUMBERS[code] - exact), code % 2))
    assert int(scale_codes(torch.tensor(scale, dtype=torch.float64))) == best


def test_scales_out_of_range_go_to_its_ends_and_only_0_to_0() -> None:
    scales = torch.tensor([0.0, 1e-300, 2.0**-15, 61440.0, 65504.0, 1e300], dtype=torch.float64)
    assert scale_codes(scales).tolist() == [0, 8, 8, 247, 247, 247]
    assert scale_codes(scales, 6).tolist() == [0, 8, 8, 246, 246, 246]


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.floats(2.0**-14, 57344.0),
        st.builds(lambda code: float(NUMBERS[code + 1]), st.integers(4, 122).map(lambda n: 2 * n)),
    )
)
def test_a_scale_of_6_bits_goes_to_the_nearest_even_code(scale: float) -> None:
    exact = Fraction(scale)
    even = [code for code in NUMBERS if code % 2 == 0]
    best = min(even, key=lambda code: (abs(NUMBERS[code] - exact), code // 2 % 2))
    found = store_scales(torch.tensor([scale], dtype=torch.float64), bits=6)
    assert found.dtype == torch.uint8 and found.tolist() == [best]


def test_scales_beyond_the_codes_are_stored_in_16_bits_and_exact_ones_as_they_are() -> None:
    wide = torch.tensor([2.0**-15, 1.0], dtype=torch.float64)
    odd = torch.tensor([1.125, 0.0], dtype=torch.float64)
    assert store_scales(wide, bits=6).dtype == torch.float32
    assert store_scales(odd, bits=6).tolist() == [120, 0]
    assert store_scales(odd, bits=6, exact=True).tolist() == [121, 0]
