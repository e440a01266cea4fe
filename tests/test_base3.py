"""Trits <-> bytes: golden bytes, the format's own decoder and vectors, and what is refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from engines import ENGINES, engine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.trits.base3 import dequantize_base3, pack, packed_width, unpack, used_groups
from ternarize.trits.ternary import Ternary, group_count

VECTORS = json.loads((Path(reference.__file__).parent / "vectors/base3.json").read_text("utf-8"))
GROUP_SIZES = (-1, 0, 1, 2, 3, 4, 5, 6, 7, 64, 127, 128, 129, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

every_engine = pytest.mark.parametrize("name", ENGINES)
shapes = st.one_of(
    st.tuples(st.integers(1, 400)),
    st.tuples(st.integers(0, 4), st.integers(1, 400)),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 150)),
)
group_sizes = st.sampled_from(GROUP_SIZES)
seeds = st.integers(0, 2**32)


def random_trits(seed: int, shape: tuple[int, ...]) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=random, dtype=torch.int8)


def trits_of(text: str) -> Tensor:
    """A row of trits written as + 0 -."""
    return torch.tensor([["-0+".index(sign) - 1 for sign in text]], dtype=torch.int8)


# ------------------------------------------------------------------------------------------------
# The bytes


@every_engine
@pytest.mark.parametrize(
    ("trits", "group_size", "packed"),
    [
        ("+0-++0", -1, "dd 79"),
        ("+0-++0", 0, "dd 79"),
        ("+0-++0", 6, "dd 79"),
        ("+0-++0", 3, "71 7d"),
        ("+0-++0", 5, "dd 79"),
        ("-0+0-+", 1, "78 79 7a 79 78 7a"),
        ("-----", -1, "00"),
        ("00000", -1, "79"),
        ("+++++", -1, "f2"),
        ("0000+", -1, "ca"),
        ("+", 128, "7a"),
    ],
)
def test_the_bytes_are_those_of_the_specification(
    name: str, trits: str, group_size: int, packed: str
) -> None:
    with engine(name):
        assert pack(trits_of(trits), group_size).numpy().tobytes() == bytes.fromhex(packed)
        found = unpack(
            torch.tensor([list(bytes.fromhex(packed))], dtype=torch.uint8), len(trits), group_size
        )
    assert torch.equal(found, trits_of(trits))


@every_engine
def test_a_byte_is_its_five_digits_first_trit_least_significant(name: str) -> None:
    every_five = list(itertools.product((-1, 0, 1), repeat=5))
    trits = torch.tensor(every_five, dtype=torch.int8)
    codes = [[sum((t + 1) * 3**k for k, t in enumerate(five))] for five in every_five]
    with engine(name):
        assert pack(trits, -1).tolist() == codes
        assert torch.equal(unpack(torch.tensor(codes, dtype=torch.uint8), 5, -1), trits)


@every_engine
@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['cols']}-by-{v['group_size']}")
def test_the_vectors_of_the_format_pack_and_unpack(name: str, vector: dict) -> None:  # type: ignore[type-arg]
    trits = torch.tensor(vector["trits"], dtype=torch.int8).reshape(-1, vector["cols"])
    rows = [list(bytes.fromhex(row)) for row in vector["packed"]]
    packed = torch.tensor(rows, dtype=torch.uint8)
    with engine(name):
        assert torch.equal(pack(trits, vector["group_size"]), packed)
        assert torch.equal(unpack(packed, vector["cols"], vector["group_size"]), trits)


@given(cols=st.integers(1, 10**6), group_size=st.integers(-1, 10**6))
def test_a_row_has_the_width_that_the_format_gives(cols: int, group_size: int) -> None:
    assert packed_width(cols, group_size) == reference.packed_width(cols, group_size)


def test_a_row_without_weights_has_no_bytes() -> None:
    assert [packed_width(0, group_size) for group_size in GROUP_SIZES] == [0] * len(GROUP_SIZES)


@settings(deadline=None, max_examples=150)
@given(shape=shapes, group_size=group_sizes, seed=seeds)
def test_packing_comes_back_on_every_engine_with_the_same_bytes(
    shape: tuple[int, ...], group_size: int, seed: int
) -> None:
    trits = random_trits(seed, shape)
    found = []
    for name in ENGINES:
        with engine(name):
            packed = pack(trits, group_size)
            assert packed.dtype == torch.uint8
            assert packed.shape == (*shape[:-1], packed_width(shape[-1], group_size))
            back = unpack(packed, shape[-1], group_size)
        assert back.dtype == torch.int8
        assert torch.equal(back, trits)
        found.append(packed)
    assert torch.equal(found[0], found[1])
    if trits.numel():
        decoded = reference.unpack(found[0].numpy(), shape[-1], group_size, "w")
        assert np.array_equal(decoded, trits.numpy())


@every_engine
def test_views_that_are_not_contiguous_are_packed_as_what_they_show(name: str) -> None:
    trits = random_trits(4, (30, 20))
    with engine(name):
        packed = pack(trits.t(), 7)
        assert torch.equal(packed, pack(trits.t().contiguous(), 7))
        wide = torch.zeros((20, 2 * packed.shape[1]), dtype=torch.uint8)
        wide[:, ::2] = packed
        assert torch.equal(unpack(wide[:, ::2], 30, 7), trits.t())


@pytest.mark.parametrize("group_size", [-1, 7, 128])
def test_the_number_of_threads_changes_no_byte(group_size: int) -> None:
    trits = random_trits(5, (700, 1003))  # enough that the compiled core starts threads
    one = pack(trits, group_size, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(pack(trits, group_size, threads=threads), one)
        assert torch.equal(unpack(one, 1003, group_size, threads=threads), trits)
        used = used_groups(one, 1003, group_size, threads=threads)
        assert torch.equal(used, used_groups(one, 1003, group_size, threads=1))


def test_a_number_that_is_no_trit_is_our_own_mistake_and_stops_the_program() -> None:
    with engine("native"), pytest.raises(AssertionError, match="element 3 is no trit"):
        pack(torch.tensor([[1, 0, -1, 2]], dtype=torch.int8), -1)


# ------------------------------------------------------------------------------------------------
# What is refused


@every_engine
@pytest.mark.parametrize("code", range(243, 256))
def test_a_byte_above_242_is_refused_wherever_it_is(name: str, code: int) -> None:
    packed = pack(random_trits(6, (2, 2, 40)), 20)
    for at in (0, 5, 15, 31):
        spoiled = packed.clone()
        spoiled.view(-1)[at] = code
        with engine(name):
            for read in (unpack, used_groups):
                with pytest.raises(FormatError, match=f"^byte {at}: {code} is not a base-3 code;"):
                    read(spoiled, 40, 20)


@every_engine
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_only_zero_trits_pad_a_byte(name: str, length: int) -> None:
    """Every value of the last byte of an inner and of the last group."""
    for value, at in itertools.product(range(243), (0, 1)):
        digits = [value // 3**k % 3 for k in range(5)]
        packed = pack(torch.zeros((1, 2 * length), dtype=torch.int8), length)
        packed[0, at] = value
        with engine(name):
            if all(digit == 1 for digit in digits[length:]):
                trits = unpack(packed, 2 * length, length)
                expected = [digit - 1 for digit in digits[:length]]
                assert trits[0, at * length : (at + 1) * length].tolist() == expected
                continue
            for read in (unpack, used_groups):
                with pytest.raises(FormatError, match=f"^byte {at}: {value} has padding"):
                    read(packed, 2 * length, length)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 200)),
    group_size=group_sizes,
    seed=seeds,
    data=st.data(),
)
def test_the_engines_and_the_reference_agree_on_any_bytes(
    shape: tuple[int, int], group_size: int, seed: int, data: st.DataObject
) -> None:
    packed = pack(random_trits(seed, shape), group_size)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, packed.numel() - 1))
        packed.view(-1)[at] = data.draw(st.integers(0, 255))
    answers: list[bytes | str] = []
    for name, read in itertools.product(ENGINES, (unpack, used_groups)):
        with engine(name):
            try:
                answers.append(read(packed, shape[1], group_size).numpy().tobytes())
            except FormatError as error:
                answers.append(str(error))
    assert answers[:2] == answers[2:]
    try:
        expected = reference.unpack(packed.numpy(), shape[1], group_size, "w").tobytes()
    except reference.Invalid:
        assert isinstance(answers[0], str)
        assert answers[0] == answers[1]
    else:
        assert answers[0] == expected


@every_engine
def test_rows_of_another_width_or_type_are_refused(name: str) -> None:
    with engine(name):
        for read in (unpack, used_groups):
            for width in (0, 1, 3):
                with pytest.raises(FormatError, match=f"{width} elements of torch.uint8; expec"):
                    read(torch.zeros((2, width), dtype=torch.uint8), 6, -1)
            with pytest.raises(FormatError, match="torch.int8"):
                read(torch.zeros((2, 2), dtype=torch.int8), 6, -1)


# ------------------------------------------------------------------------------------------------
# Groups that are used


@every_engine
@settings(deadline=None, max_examples=60)
@given(shape=shapes, group_size=group_sizes, seed=seeds)
def test_a_group_is_used_if_any_of_its_trits_is_not_zero(
    name: str, shape: tuple[int, ...], group_size: int, seed: int
) -> None:
    trits = random_trits(seed, shape)
    trits *= random_trits(seed + 1, shape) * random_trits(seed + 2, shape)  # many zeros
    trits *= (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1).to(torch.int8)
    cols = shape[-1]
    length = cols if group_size <= 0 else min(group_size, cols)
    expected = np.zeros((*shape[:-1], -(-cols // length)), dtype=bool)
    for *row, g in np.ndindex(expected.shape):
        group = trits.numpy()[(*row, slice(g * length, (g + 1) * length))]
        expected[(*row, g)] = any(trit != 0 for trit in group)
    with engine(name):
        used = used_groups(pack(trits, group_size), cols, group_size)
    assert used.dtype == torch.bool
    assert used.shape == expected.shape
    assert np.array_equal(used.numpy(), expected)


@every_engine
@pytest.mark.parametrize("group_size", [-1, 0, 4])
@pytest.mark.parametrize("stack", [(0,), (3, 0), (0, 3)])
def test_a_matrix_without_rows_has_no_groups_and_no_bytes(
    name: str, stack: tuple[int, ...], group_size: int
) -> None:
    groups = 2 if group_size == 4 else 1
    with engine(name):
        packed = pack(torch.zeros((*stack, 6), dtype=torch.int8), group_size)
        assert packed.shape == (*stack, packed_width(6, group_size))
        assert used_groups(packed, 6, group_size).shape == (*stack, groups)
        assert unpack(packed, 6, group_size).shape == (*stack, 6)


# ------------------------------------------------------------------------------------------------
# Dense weights


@settings(deadline=None, max_examples=120)
@given(
    rows=st.integers(1, 8),
    cols=st.integers(1, 300),
    group_size=group_sizes,
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    seed=seeds,
    data=st.data(),
)
def test_weights_are_scale_times_trit_rounded_once_on_every_engine(
    rows: int,
    cols: int,
    group_size: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    """Also where a scale serves several rows, and where it is subnormal or too large for dtype."""
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    scale_rows = 1 if group_size == 0 else data.draw(st.sampled_from(divisors))
    trits = random_trits(seed, (rows, cols))
    random = torch.Generator().manual_seed(seed)
    shape = (scale_rows, group_count(cols, group_size))
    exponents = torch.randint(-150, 128, shape, generator=random).double()
    scales = (torch.rand(shape, generator=random).double() + 0.5) * 2**exponents
    scales = scales.to(scale_dtype)
    scales = torch.where(scales.isfinite(), scales, torch.ones((), dtype=scale_dtype))

    length = cols if group_size <= 0 else min(group_size, cols)
    expected = torch.zeros((rows, cols), dtype=torch.float32)
    for row, col in np.ndindex(rows, cols):
        scale = float(scales[row // (rows // scale_rows), col // length])
        expected[row, col] = scale * int(trits[row, col])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for name in ENGINES:
        with engine(name):
            found = dequantize_base3(pack(trits, group_size), scales, cols, group_size, dtype)
        assert found.dtype == dtype
        # a zero has no sign: bits are compared
        assert torch.equal(found.view(bits), expected.to(dtype).view(bits))


@every_engine
@pytest.mark.parametrize("group_size", [-1, 0, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_packed_weight_is_that_of_the_ternary_tensor(
    name: str, group_size: int, dtype: torch.dtype
) -> None:
    trits = random_trits(8, (6, 300))
    shape = (1, 1) if group_size == 0 else (6, group_count(300, group_size))
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)).half()
    ternary = Ternary(trits, scales.double(), group_size)
    with engine(name):
        found = dequantize_base3(pack(trits, group_size), scales, 300, group_size, dtype)
    assert torch.equal(found, ternary.dequantize(dtype))


@every_engine
def test_the_threads_of_dequantize_change_no_bit(name: str) -> None:
    packed = pack(random_trits(9, (600, 1000)), 128)
    scales = torch.rand((600, 8), generator=torch.Generator().manual_seed(2))
    with engine(name):
        one = dequantize_base3(packed, scales, 1000, 128, torch.bfloat16, threads=1)
        assert torch.equal(
            dequantize_base3(packed, scales, 1000, 128, torch.bfloat16, threads=5), one
        )


@every_engine
def test_a_matrix_without_rows_becomes_one_without_rows(name: str) -> None:
    with engine(name):
        for group_size, shape in ((-1, (0, 1)), (4, (0, 2)), (0, (1, 1))):
            packed = torch.zeros((0, packed_width(6, group_size)), dtype=torch.uint8)
            dense = dequantize_base3(packed, torch.zeros(shape), 6, group_size, torch.float32)
            assert dense.shape == (0, 6)


@every_engine
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 0, 7, 128])
def test_planes_are_added_in_float32(name: str, group_size: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(7)
    parts = []
    for seed in (1, 2):
        trits = random_trits(seed, (6, 200))
        rows, groups = (1 if group_size == 0 else 6), group_count(200, group_size)
        scales = torch.rand((rows, groups), generator=random) / seed**9
        parts.append((pack(trits, group_size), scales))
    packed, scales = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    with engine(name):
        single = [dequantize_base3(*part, 200, group_size, torch.float32) for part in parts]
        both = dequantize_base3(packed, scales, 200, group_size, dtype, planes=2)
    assert torch.equal(both, (single[0] + single[1]).to(dtype))
