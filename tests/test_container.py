"""Writing and checking packed files: scales, metadata, digests, and every way to damage a file."""

import hashlib
import json
import struct
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from engines import ENGINES, engine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ternarize.errors import DigestError, FormatError, WeightError
from ternarize.files import container, metadata
from ternarize.files.checkpoint import open_files
from ternarize.files.container import decode, digest, encode
from ternarize.files.metadata import Record, dump_metadata
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.trits.methods import absmean, levels
from ternarize.trits.rotation import rotate
from ternarize.trits.scales import store_scales
from ternarize.trits.ternary import Ternary

every_engine = pytest.mark.parametrize("name", ENGINES)


def scales_of(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------
# Scales


def test_scales_are_rounded_once_from_float64() -> None:
    # just above the middle of two float16: through float32 it falls on the middle, and to even
    value = 1 + 2.0**-11 + 2.0**-30
    assert float(torch.tensor(value, dtype=torch.float64).to(torch.float32).half()) == 1.0
    assert store_scales(scales_of(value)).tolist() == [[1 + 2.0**-10]]


@settings(deadline=None, max_examples=300)
@given(step=st.integers(1024, 2047), exponent=st.integers(-24, 5), off=st.sampled_from([-1, 0, 1]))
def test_a_scale_between_two_float16_goes_to_the_nearer_and_at_the_middle_to_the_even(
    step: int, exponent: int, off: int
) -> None:
    middle = (2 * step + 1) * 2.0 ** (exponent - 1)
    value = [np.nextafter(middle, 0), middle, np.nextafter(middle, np.inf)][off + 1]
    assume(value <= 65504)  # beyond, it goes to float32
    below, above = step * 2.0**exponent, (step + 1) * 2.0**exponent
    even = below if step % 2 == 0 else above
    found = store_scales(scales_of(value))
    assert found.dtype == torch.float16
    assert float(found) == [below, even, above][off + 1]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, 0.0], torch.float16),
        ([65504.0], torch.float16),
        ([65504.1], torch.float32),  # would round to the largest float16, but it is not in range
        ([1e6, 0.5], torch.float32),  # infinite in float16
        ([2.0**-14, 1.0], torch.float16),
        ([2.0**-14 * (1 - 2.0**-40), 1.0], torch.float32),  # below, float16 loses digits
        ([1e-30], torch.float32),
        ([0.0, 0.0], torch.float16),
        ([], torch.float16),
    ],
)
def test_scales_are_float16_where_it_holds_them_as_normal_numbers(
    values: list[float], dtype: torch.dtype
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store_scales(scales_of(*values))
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    assert torch.equal(found == 0, scales_of(*values) == 0)
    assert found.double().flatten().tolist() == pytest.approx(values, rel=2.0**-11)


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-37, 1e38))
def test_float32_scales_are_the_nearest_float32(value: float) -> None:
    if 2.0**-14 <= value <= 65504:
        value *= 2.0**40
    found = store_scales(scales_of(value))
    assert found.dtype == torch.float32
    nearest = np.float32(float(found))
    error = abs(Fraction(float(nearest)) - Fraction(value))
    for other in (np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))):
        assert error <= abs(Fraction(float(other)) - Fraction(value))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, 0.75], torch.float16),
        ([2.0**-24, 0.0], torch.float16),  # subnormal there, and exact
        ([2.0**-25], torch.bfloat16),
        ([2.0**100, 1.5], torch.bfloat16),
        ([1 + 2.0**-10, 2.0**-25], torch.float32),  # one for float16, one for bfloat16
        ([1 + 2.0**-23], torch.float32),
        ([], torch.float16),
    ],
)
def test_exact_scales_take_the_first_dtype_that_changes_none(
    values: list[float], dtype: torch.dtype
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store_scales(scales_of(*values), exact=True)
    assert found.dtype == dtype
    assert found.double().flatten().tolist() == values


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, 0.0], torch.uint8),
        ([0.0, 0.0], torch.uint8),
        ([2.0**-14, 61440.0], torch.uint8),
        ([2.0**-14 * (1 - 2.0**-40), 1.0], torch.float32),  # too small for float16, too
        ([61441.0, 1.0], torch.float16),
        ([65504.1], torch.float32),
    ],
)
def test_scales_have_8_bits_where_those_span_them(values: list[float], dtype: torch.dtype) -> None:
    assert store_scales(scales_of(*values), bits=8).dtype == dtype
    exact = store_scales(scales_of(*values), bits=8, exact=True)  # these are numbers of the codes
    assert (exact.dtype == torch.uint8) == (dtype == torch.uint8)


def test_exact_scales_have_8_bits_only_where_nothing_is_lost() -> None:
    assert store_scales(scales_of(0.3, 0.5), bits=8).dtype == torch.uint8
    between = scales_of(1.0625, 0.5)  # float16 holds it, and no code does
    assert store_scales(between, bits=8, exact=True).dtype == torch.float16


@pytest.mark.parametrize("exact", [False, True])
def test_a_scale_beyond_float32_is_refused_with_its_value(exact: bool) -> None:
    with pytest.raises(WeightError, match=r"1e\+39"):
        store_scales(scales_of(0.5, 1e39), exact=exact)


# ------------------------------------------------------------------------------------------------
# Records and metadata


def test_metadata_is_canonical_to_the_byte() -> None:
    records = {
        "b.weight": Record("0" * 64, (2, 12), 6),
        "a.weight": Record("1" * 64, (3, 2, 12), -1, transposed=True),
        "näme": Record("2" * 64),
    }
    text = (
        '{"format_version":1,"sealed":true,"features":[],"tensors":{'
        '"b.weight":{"shape":[2,12],"group_size":6,"codec":"base3","sha256":"' + "0" * 64 + '"},'
        '"a.weight":{"shape":[3,2,12],"group_size":-1,"codec":"base3","transposed":true,'
        '"sha256":"' + "1" * 64 + '"},'
        '"n\\u00e4me":{"sha256":"' + "2" * 64 + '"}}'
    )
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert dump_metadata(records) == {"format": "pt", "ternarize": f'{text},"sha256":"{sha256}"}}'}


def test_the_features_are_those_that_the_records_need() -> None:
    plain, sha = Record("0" * 64, (2, 12), 6), "1" * 64
    records = {
        "a": Record(sha, (2, 12), 6, planes=2),
        "b": Record(sha, (2, 12), 6, "int8"),
        "c": Record(sha, (2, 12), 6, scale8=True),
        "d": Record(sha, (2, 12), 6, rotation=(4, 7)),
        "e": Record(sha, (2, 12), 6, "int4"),
    }
    expected = {"a": "planes", "b": "int8", "c": "scale8", "d": "rotation", "e": "int4"}
    for name, feature in expected.items():
        text = dump_metadata({"x": plain, name: records[name]})["ternarize"]
        assert json.loads(text)["features"] == [feature]
    text = dump_metadata(records)["ternarize"]
    assert json.loads(text)["features"] == sorted(expected.values())
    assert '"a":{"shape":[2,12],"group_size":6,"codec":"base3","planes":2,"sha256"' in text
    rotation = '"rotation":{"block":4,"seed":7},"sha256"'
    assert '"d":{"shape":[2,12],"group_size":6,"codec":"base3",' + rotation in text


def test_metadata_of_nothing_is_still_that_of_a_packed_file() -> None:
    text = '{"format_version":1,"sealed":true,"features":[],"tensors":{},"sha256":'
    assert dump_metadata({})["ternarize"].startswith(text)


@pytest.mark.parametrize(
    ("shape", "group_size", "packed", "scales"),
    [
        ((2, 300), 128, (2, 61), (2, 3)),
        ((2, 300), -1, (2, 60), (2, 1)),
        ((2, 300), 0, (2, 60), (1, 1)),
        ((4, 2, 300), 128, (4, 2, 61), (4, 2, 3)),
        ((4, 2, 300), 0, (4, 2, 60), (4, 1, 1)),
        ((0, 6), 4, (0, 2), (0, 2)),
    ],
)
def test_a_record_says_how_its_tensor_is_stored(
    shape: tuple[int, ...], group_size: int, packed: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    assert Record("", shape, group_size).stored_shapes() == (packed, scales)


def test_the_digest_is_that_of_the_stored_bytes() -> None:
    # the worked example of the specification: DD 79 and 0.5 in float16
    trits = torch.tensor([[1, 0, -1, 1, 1, 0]], dtype=torch.int8)
    packed, scale = encode(Ternary(trits, scales_of(0.5), -1))
    assert packed.tolist() == [[0xDD, 0x79]]
    assert scale.dtype == torch.float16
    expected = "60bcbd5d3e097d531c9c660a919cb888bf452e445b1d4a3e4185c86c422007ab"
    assert digest(packed, scale) == expected
    assert digest(packed, scale) == hashlib.sha256(bytes.fromhex("dd790038")).hexdigest()
    assert digest(torch.empty(0)) == hashlib.sha256(b"").hexdigest()


@every_engine
@pytest.mark.parametrize("group_size", [-1, 0, 5, 128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (2, 3, 20), (0, 6)])
def test_encode_and_decode_are_inverse(name: str, shape: tuple[int, ...], group_size: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with engine(name):
        ternary = absmean(weight, group_size)
        packed, scales = encode(ternary)
        back = decode(packed, scales, Record("", shape, group_size))
    assert torch.equal(back.trits, ternary.trits)
    assert torch.equal(back.scales, scales.double())
    assert back.group_size == group_size


@every_engine
def test_a_weight_that_was_ternary_comes_back_to_the_bit(name: str) -> None:
    trits = torch.randint(-1, 2, (4, 300), generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = (trits * torch.tensor([[0.1], [0.007], [3.3], [1.0]])).to(dtype)
        with engine(name):
            ternary = levels(weight, -1)
            assert ternary is not None
            packed, scales = encode(ternary, exact=True)
            back = decode(packed, scales, Record("", (4, 300), -1))
        assert torch.equal(back.dequantize(dtype), weight)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (0, 64)])
def test_a_rotated_tensor_is_written_and_found_again(
    tmp_path: Path, shape: tuple[int, ...], planes: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    rotated = rotate(weight, 16, 2**32 - 1)
    parts = [absmean(rotated, 24)]
    if planes == 2:
        parts.append(absmean(rotated - parts[0].dequantize(), 24))
    packed, scales = encode(*parts)
    record = Record(digest(packed, scales), shape, 24, planes=planes, rotation=(16, 2**32 - 1))
    save_file(
        {"w": packed, "w_scale": scales},
        tmp_path / "model.safetensors",
        dump_metadata({"w": record}),
    )
    check_all(tmp_path)
    assert metadata.records_of(open_checkpoint(tmp_path)) == {"w": record}
    dense = container.dequantize(packed, scales, record)
    (found,) = reference.decode(tmp_path).values()
    assert isinstance(found, reference.Ternary)
    assert dense.shape == shape and dense.dtype == torch.float32
    assert torch.allclose(dense, torch.from_numpy(found.dequantize()), rtol=0, atol=1e-6)
    stored = container.dequantize(packed, scales, replace(record, rotation=(0, 0)))
    # turning back loses nothing: the error is that of the ternarized matrix
    error, left = (torch.linalg.vector_norm(t) for t in (dense - weight, stored - rotated))
    assert torch.allclose(error, left, rtol=1e-5)


@pytest.mark.parametrize("block", [0, 8, 12, 4096, 4.0, "4", True])
def test_a_block_that_is_not_listed_is_refused_by_name(tmp_path: Path, block: Any) -> None:
    small_file(tmp_path)
    rotation = {"block": block, "seed": 0}
    change_document(tmp_path, lambda d: d["tensors"]["w.weight"].update(rotation=rotation))
    with pytest.raises(
        FormatError, match="w.weight: its rotation is .*; expected a block of 4, 16"
    ):
        check_all(tmp_path)


def test_a_rotation_that_is_not_among_the_features_is_refused(tmp_path: Path) -> None:
    small_file(tmp_path)
    rotation = {"block": 4, "seed": 0}
    change_document(tmp_path, lambda d: d["tensors"]["experts.up_proj"].update(rotation=rotation))
    with pytest.raises(FormatError, match="experts.up_proj uses 'rotation', which is not in the"):
        check_all(tmp_path)
    change_document(tmp_path, lambda d: d.update(features=["rotation"]))
    check_all(tmp_path)
    records = metadata.records_of(open_checkpoint(tmp_path))
    assert records["experts.up_proj"].rotation == (4, 0)


# ------------------------------------------------------------------------------------------------
# Files


def small_file(directory: Path) -> dict[str, Record]:
    """A packed checkpoint with a ternary matrix, experts with a scale each, and kept tensors."""
    random = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {
        "bias": torch.randn(3, generator=random).half(),
        "steps": torch.tensor([7], dtype=torch.int64),
    }
    records = {name: Record(digest(tensor)) for name, tensor in tensors.items()}
    for name, shape, group_size in (("w.weight", (2, 13), 6), ("experts.up_proj", (2, 2, 4), 0)):
        ternary = absmean(torch.randn(shape, generator=random), group_size)
        packed, scales = encode(ternary)
        tensors[name], tensors[f"{name}_scale"] = packed, scales
        records[name] = Record(digest(packed, scales), shape, group_size)
    save_file(tensors, directory / "model.safetensors", dump_metadata(records))
    return records


def check_all(directory: Path, threads: int = 1) -> None:
    checkpoint = open_checkpoint(directory)
    container.check_data(checkpoint, metadata.records_of(checkpoint), threads=threads)


@every_engine
@pytest.mark.parametrize("threads", [1, 4])
def test_what_was_written_is_found_again_and_is_whole(
    tmp_path: Path, name: str, threads: int
) -> None:
    with engine(name):
        written = small_file(tmp_path)
        checkpoint = open_checkpoint(tmp_path)
        records = metadata.records_of(checkpoint)
        assert records == written
        done: list[str] = []
        container.check_data(checkpoint, records, threads=threads, done=done.append)
        assert done == list(records)
    assert reference.main([str(tmp_path)]) == 0


@every_engine
def test_every_flipped_bit_of_the_data_is_found_and_its_tensor_named(
    tmp_path: Path, name: str
) -> None:
    small_file(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    data_start = 8 + struct.unpack("<Q", whole[:8])[0]
    checkpoint = open_checkpoint(tmp_path)
    records = metadata.records_of(checkpoint)
    owners = {
        at: info.name.removesuffix("_scale")
        for info in checkpoint.tensors.values()
        for at in range(info.start, info.start + info.nbytes)
    }
    assert sorted(owners) == list(range(data_start, len(whole)))
    with engine(name):
        for bit in range(8 * data_start, 8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(FormatError) as caught:
                container.check_data(checkpoint, records, threads=1)
            assert str(caught.value).startswith(f"model.safetensors: {owners[bit // 8]}: ")


def test_a_flipped_bit_of_the_header_is_found_unless_it_changes_only_words(tmp_path: Path) -> None:
    """A name can become another name; shapes, sizes, types, places and digests cannot."""
    small_file(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    data_start = 8 + struct.unpack("<Q", whole[:8])[0]
    before = open_checkpoint(tmp_path)
    for bit in range(0, 8 * data_start, 5):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            checkpoint = open_checkpoint(tmp_path)
            records = metadata.records_of(checkpoint)
            container.check_data(checkpoint, records, threads=1)
        except FormatError:
            continue
        # accepted: then every tensor is where it was, as it was, under a name in the same place
        found, expected = (
            [(info.dtype, info.shape, info.start) for info in one.tensors.values()]
            for one in (checkpoint, before)
        )
        assert found == expected


def test_damage_in_a_tensor_of_many_pieces_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_CHECKED", 64)
    weight = torch.randn((40, 130), generator=torch.Generator().manual_seed(5))
    packed, scales = encode(absmean(weight, 128))
    record = Record(digest(packed, scales), (40, 130), 128)
    tensors = {"w": packed, "w_scale": scales, "k": weight}
    records = {"w": record, "k": Record(digest(weight))}
    save_file(tensors, tmp_path / "model.safetensors", dump_metadata(records))
    check_all(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    info = open_checkpoint(tmp_path).tensors["w"]
    for at, value, error in (
        (0, 255, "255 is not a base-3 code"),
        (info.nbytes - 1, 0, "0 has padding"),
        (info.nbytes // 2 // 27 * 27, None, "SHA-256"),
    ):
        spoiled = bytearray(whole)
        old = spoiled[info.start + at]
        spoiled[info.start + at] = (old + 1) % 243 if value is None else value
        (tmp_path / "model.safetensors").write_bytes(spoiled)
        with pytest.raises(FormatError, match=f"^model.safetensors: w: .*{error}"):
            check_all(tmp_path)


def test_damage_that_leaves_valid_bytes_is_a_digest_error(tmp_path: Path) -> None:
    small_file(tmp_path)
    path = tmp_path / "model.safetensors"
    info = open_checkpoint(tmp_path).tensors["bias"]
    spoiled = bytearray(path.read_bytes())
    spoiled[info.start] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(DigestError, match="bytes have changed since they were written"):
        check_all(tmp_path)


@pytest.mark.parametrize(
    ("scale", "what"),
    [
        (float("nan"), "is not finite"),
        (float("inf"), "is not finite"),
        (-0.5, "is negative"),
        (-0.0, "is negative"),
        (0.0, "is 0, but its group has weights other than zero"),
    ],
)
def test_a_scale_that_no_writer_makes_is_refused_with_its_place(scale: float, what: str) -> None:
    trits = torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=torch.int8)
    packed, _ = encode(Ternary(trits, torch.zeros((2, 1), dtype=torch.float64), -1))
    record = Record("", (2, 3), -1)
    with pytest.raises(FormatError, match=rf"^scale at \[1, 0\]: .*{what}"):
        decode(packed, torch.tensor([[0.0], [scale]]).half(), record)
    with pytest.raises(FormatError, match=r"^scale at \[0, 0\]: 0.5 is not 0, but all weights"):
        decode(packed, torch.tensor([[0.5], [0.5]]).half(), record)


# ------------------------------------------------------------------------------------------------
# Metadata that is wrong (formats/vectors has more; test_conformance.py reads those)


def rewritten(directory: Path, **changes: Any) -> None:
    """Change members of the record of w.weight in a small file."""
    small_file(directory)
    change_document(directory, lambda d: d["tensors"]["w.weight"].update(changes))


def change_document(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    data_start = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:data_start])
    document = json.loads(header["__metadata__"]["ternarize"])
    for key in ("sealed", "sha256"):  # that the metadata was changed is not what is tested
        document.pop(key, None)
    change(document)
    header["__metadata__"]["ternarize"] = json.dumps(document)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[data_start:])


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 2**63},
        {"group_size": 10**4000},
        {"group_size": -(2**63)},
        {"group_size": 5},
        {"shape": [2, 14, 1]},
        {"shape": [2, 12]},
        {"shape": [1, 13]},
        {"shape": [2, 10**30]},
        {"shape": [10**4000, 13]},
        {"shape": []},
        {"shape": None},
        {"shape": {"0": 2}},
        {"codec": ["base3"]},
        {"codec": None},
        {"transposed": None},
        {"transposed": 1},
        {"rotation": None},
        {"rotation": {}},
        {"rotation": {"block": 16, "seed": 0}},  # 13 columns
        {"rotation": {"block": [4], "seed": 0}},
        {"rotation": {"block": 10**4000, "seed": 0}},
        {"rotation": [4, 0]},
        {"sha256": "A" * 64},
        {"sha256": "0" * 64 + "\n"},
        {"sha256": None},
    ],
    ids=lambda changes: repr(changes)[:50],
)
def test_a_record_that_is_wrong_is_refused_in_one_short_line(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    rewritten(tmp_path, **changes)
    with pytest.raises(FormatError, match="w.weight") as caught:
        check_all(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@every_engine
def test_a_group_size_far_beyond_the_row_is_one_group_per_row(tmp_path: Path, name: str) -> None:
    packed, scales = encode(absmean(torch.ones((2, 13)), -1))
    for group_size in (13, 2**63 - 1, 2**63):
        metadata = dump_metadata({"w": Record(digest(packed, scales), (2, 13), group_size)})
        save_file({"w": packed, "w_scale": scales}, tmp_path / "model.safetensors", metadata)
        with engine(name):
            check_all(tmp_path)


@pytest.mark.parametrize("shape", [(2**31, 1280), (2**33, 5), (2**51, 5)], ids=str)
def test_a_stream_that_is_too_short_for_its_rows_is_refused_before_there_is_memory(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    hollow = torch.zeros(200, dtype=torch.uint8)
    record = Record("0" * 64, shape, -1, coded=True, coded_scales="F16")
    tensors = {"w": hollow, "w_scale": hollow.clone()}
    save_file(tensors, tmp_path / "model.safetensors", dump_metadata({"w": record}))
    with pytest.raises(FormatError, match=r"w has 200 bytes for a stream of \["):
        metadata.records_of(open_files(tmp_path, ["model.safetensors"]))


def test_members_that_are_not_known_are_for_people(tmp_path: Path) -> None:
    rewritten(tmp_path, note="hello")
    change_document(tmp_path, lambda d: d.update(made_by="someone"))
    check_all(tmp_path)


def test_a_newer_version_or_feature_is_named(tmp_path: Path) -> None:
    small_file(tmp_path)
    change_document(tmp_path, lambda d: d.update(format_version=2))
    with pytest.raises(FormatError, match="format version 2; .* Install a newer ternarize"):
        check_all(tmp_path)
    change_document(tmp_path, lambda d: d.update(format_version=1, features=["rotated", "zip"]))
    with pytest.raises(FormatError, match="needs the feature rotated, zip; expected features that"):
        check_all(tmp_path)


def test_an_ordinary_checkpoint_is_told_apart(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="no 'ternarize' in its metadata; expected a packed"):
        check_all(tmp_path)


# ------------------------------------------------------------------------------------------------
# Shards


def two_shards(directory: Path, one: dict[str, Record], two: dict[str, Record]) -> None:
    """`w` in the first file with these records, its scales and `k` in the second with those."""
    packed, scales = encode(absmean(torch.ones((2, 13)), -1))
    shards = {"one": ({"w": packed}, one), "two": ({"w_scale": scales, "k": torch.ones(3)}, two)}
    weight_map = {}
    for file, (tensors, records) in shards.items():
        save_file(tensors, directory / f"{file}.safetensors", dump_metadata(records))
        weight_map.update(dict.fromkeys(tensors, f"{file}.safetensors"))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard_records() -> dict[str, Record]:
    packed, scales = encode(absmean(torch.ones((2, 13)), -1))
    return {"w": Record(digest(packed, scales), (2, 13), -1), "k": Record(digest(torch.ones(3)))}


def test_scales_may_be_in_another_shard_and_all_records_in_every_shard(tmp_path: Path) -> None:
    records = shard_records()
    two_shards(tmp_path, records, records)
    check_all(tmp_path)
    two_shards(tmp_path, {"w": records["w"]}, {"k": records["k"]})
    check_all(tmp_path)
    assert reference.main([str(tmp_path)]) == 0


def test_the_record_in_the_file_of_the_tensor_counts(tmp_path: Path) -> None:
    records = shard_records()
    other = Record("0" * 64, (2, 13), -1)
    two_shards(tmp_path, records, {**records, "w": other})
    check_all(tmp_path)
    assert reference.main([str(tmp_path)]) == 0
    two_shards(tmp_path, {**records, "w": other}, records)
    with pytest.raises(DigestError, match="^one.safetensors: w: "):
        check_all(tmp_path)
    assert reference.main([str(tmp_path)]) == 1


def test_a_record_in_another_file_does_not_describe_a_tensor(tmp_path: Path) -> None:
    records = shard_records()
    two_shards(tmp_path, {}, records)
    with pytest.raises(FormatError, match="w has no record"):
        check_all(tmp_path)
    assert reference.main([str(tmp_path)]) == 1


def test_a_shard_by_itself_may_lack_what_the_others_have(tmp_path: Path) -> None:
    records = shard_records()
    two_shards(tmp_path, records, records)
    alone = open_files(tmp_path, ["two.safetensors"])
    found = metadata.records_of(alone, whole=False)
    assert list(found) == ["k"]
    container.check_data(alone, found)
    with pytest.raises(FormatError, match="w has a record, but no file has the tensor"):
        metadata.records_of(alone)
    with pytest.raises(FormatError, match="w has no w_scale"):
        metadata.records_of(open_files(tmp_path, ["one.safetensors"]), whole=False)
