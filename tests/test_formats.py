"""The specifications, the vectors and the reference decoder agree with each other.

Nothing of the package is imported here: these tests hold the three parts of formats/ together. The
package is compared with the vectors in test_conformance.py.
"""

import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_vectors
import numpy as np
import pytest
import reference
from numpy.typing import NDArray

FORMATS = Path(reference.__file__).resolve().parent
VECTORS = FORMATS / "vectors"
VALID = sorted((VECTORS / "valid").glob("*.safetensors"))
INVALID = sorted((VECTORS / "invalid").glob("*.safetensors"))
VALID_DIRECTORIES = sorted(p for p in (VECTORS / "valid-directories").iterdir() if p.is_dir())
INVALID_DIRECTORIES = sorted((VECTORS / "invalid-directories").iterdir())
WORKED_EXAMPLE = VECTORS / "valid" / "worked-example.safetensors"
PARTED = VECTORS / "valid-directories" / "scale-in-other-shard"
MIXED = VECTORS / "valid" / "mixed.safetensors"  # a ternary and a kept tensor


def rules_of_specifications() -> dict[str, str]:
    """Vector -> rule, from the tables of the documents; a directory's name ends with `/`."""
    found: dict[str, str] = {}
    for document in ("base3.md", "int8.md", "int4.md", "rans.md", "container.md"):
        text = (FORMATS / document).read_text("utf-8")
        for rule, vectors in re.findall(r"^\| `([a-z0-9-]+)` \| .* \| (`[^|]*`) \|$", text, re.M):
            for vector in re.findall(r"`([^`]+)`", vectors):
                assert vector not in found, f"{vector} is named twice"
                found[vector] = rule
    return found


RULES = rules_of_specifications()


def expected_of(path: Path) -> dict[str, Any]:
    """What the .json beside a vector says about its tensors."""
    tensors = json.loads(path.with_suffix(".json").read_text("utf-8"))["tensors"]
    return dict(tensors)


def sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def assert_content(
    found: dict[str, reference.Ternary | reference.Integers | reference.Kept],
    expected: dict[str, Any],
) -> None:
    """Every tensor is there with the shape, the trits, the scales and the weights expected."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        want = expected[name]
        if isinstance(tensor, reference.Kept):
            assert want["kind"] == "kept"
            assert tensor.dtype == want["dtype"]
            assert list(tensor.shape) == want["shape"]
            assert tensor.data.hex() == want["data"]
            continue
        kernel = want.get("kernel", want["shape"][-1:])
        assert list(tensor.dequantize().shape) == [*want["shape"][:-1], *kernel]
        assert tensor.group_size == want["group_size"]
        assert tensor.transposed == want["transposed"]
        if isinstance(tensor, reference.Integers):
            assert want["kind"] == tensor.codec
            assert tensor.weights.tolist() == want["weights"]
        else:
            assert want["kind"] == "ternary"
            assert tensor.planes == want.get("planes", 1)
            if "trits" in want:
                assert tensor.trits.tolist() == want["trits"]
            assert sha256(tensor.trits) == want["trits_sha256"]
        assert tensor.scale_dtype == want["scale_dtype"]
        assert list(tensor.scales.shape) == want["scale_shape"]
        bits = tensor.scales.astype(">f4").tobytes().hex()
        assert [bits[at : at + 8] for at in range(0, len(bits), 8)] == want["scales"]
        weights = tensor.dequantize()
        assert weights.dtype == np.float32
        if "rotation" not in want:
            assert sha256(weights.astype("<f4")) == want["dequantized_sha256"]
            continue
        assert isinstance(tensor, reference.Ternary) and tensor.rotation is not None
        block, seed = tensor.rotation
        assert want["rotation"] == {"block": block, "seed": seed}
        rotated = tensor.stored()
        assert sha256(rotated.astype("<f4")) == want["rotated_sha256"]
        bits = "".join(want["dequantized"])
        exact = np.frombuffer(bytes.fromhex(bits), ">f4").reshape(weights.shape)
        blocks = rotated.astype(np.float64).reshape(-1, block)
        norms = np.repeat(np.sqrt((blocks**2).sum(-1)), block).reshape(weights.shape)
        # float64 leaves one rounding to float32; the tolerance of the document is 16 of these
        assert (np.abs(weights - exact.astype(np.float64)) <= norms * 2.0**-24).all()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the reference decoder as a program."""
    command = [sys.executable, str(FORMATS / "reference.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Vectors


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_valid_file_is_decoded_as_expected(path: Path) -> None:
    assert_content(reference.decode(path), expected_of(path))


@pytest.mark.parametrize("path", VALID_DIRECTORIES, ids=lambda path: path.name)
def test_valid_directory_is_decoded_as_expected(path: Path) -> None:
    assert_content(reference.decode(path), expected_of(path))


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_invalid_file_is_refused_by_its_rule(path: Path) -> None:
    with pytest.raises(reference.Invalid) as refusal:
        reference.decode(path)
    assert str(refusal.value).split()[0] == RULES[path.stem]


@pytest.mark.parametrize("path", INVALID_DIRECTORIES, ids=lambda path: path.name)
def test_invalid_directory_is_refused_by_its_rule(path: Path) -> None:
    with pytest.raises(reference.Invalid) as refusal:
        reference.decode(path)
    assert str(refusal.value).split()[0] == RULES[f"{path.name}/"]


def test_a_shard_without_its_scales_is_refused_when_read_alone() -> None:
    with pytest.raises(reference.Invalid, match="^scale-missing w.weight:"):
        reference.decode(PARTED / "model-00001-of-00002.safetensors")


def test_scales_of_another_shard_are_accepted_alone_with_a_ternary_record() -> None:
    found = reference.decode(PARTED / "model-00002-of-00002.safetensors")
    assert found.keys() == {"v.weight", "bias"}
    earlier = VECTORS / "valid-directories" / "scale-in-earlier-shard"  # has its own records only
    with pytest.raises(reference.Invalid, match="^tensor-without-record w.weight_scale:"):
        reference.decode(earlier / "model-00001-of-00002.safetensors")


def test_wider_types_first_aligns_all_tensors() -> None:
    path = VECTORS / "valid" / "sorted-by-dtype.safetensors"
    entries, _, _ = reference.read_head(path)
    for entry in entries.values():
        assert entry.start % reference.DTYPE_SIZES[entry.dtype] == 0
    sizes = [reference.DTYPE_SIZES[entry.dtype] for entry in entries.values()]
    assert sizes == [4, 2, 2, 1, 1]


def test_every_rule_has_its_vectors_and_every_vector_its_rule() -> None:
    files = {path.stem for path in INVALID} | {f"{path.name}/" for path in INVALID_DIRECTORIES}
    assert files == RULES.keys()


def test_a_vector_is_named_after_its_rule() -> None:
    for vector, rule in RULES.items():
        stem = vector.removesuffix("/")
        assert stem == rule or stem.startswith(f"{rule}-")


def test_every_rule_of_the_decoder_is_in_the_specifications() -> None:
    source = (FORMATS / "reference.py").read_text("utf-8")
    quoted = set(re.findall(r'"([a-z0-9]+(?:-[a-z0-9]+)+)"', source)) - {"utf-8"}
    assert quoted == set(RULES.values())


def test_the_invalid_matrix_files_have_correct_digests() -> None:
    """A decoder must find the rule itself: the digest does not give the file away."""
    checked = 0
    for path in INVALID:
        if RULES[path.stem] not in ("code-invalid", "padding-nonzero", "scale-nan", "scale-inf"):
            continue
        data = path.read_bytes()
        first = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:first])
        record = json.loads(header["__metadata__"]["ternarize"])["tensors"]["w.weight"]
        end = header["w.weight_scale"]["data_offsets"][1]
        assert hashlib.sha256(data[first : first + end]).hexdigest() == record["sha256"]
        checked += 1
    assert checked > 15


def test_codec_vectors_decode_to_their_trits() -> None:
    cases = json.loads((VECTORS / "base3.json").read_text("utf-8"))
    for case in cases:
        cols, group_size = case["cols"], case["group_size"]
        width = reference.packed_width(cols, group_size)
        packed = np.frombuffer(bytes.fromhex("".join(case["packed"])), np.uint8)
        trits = reference.unpack(packed.reshape(-1, width), cols, group_size, "case")
        assert trits.tolist() == case["trits"]
    assert {byte for case in cases for row in case["packed"] for byte in bytes.fromhex(row)} == set(
        range(243)
    )


def test_vectors_cover_every_tail_and_every_kind_of_group() -> None:
    cases = json.loads((VECTORS / "base3.json").read_text("utf-8"))
    tails = {len(row) % 5 for case in cases if case["group_size"] == -1 for row in case["trits"]}
    assert tails == {0, 1, 2, 3, 4}
    assert {-1, 0, 1, 5, 7, 64, 128} <= {case["group_size"] for case in cases}


# Golden bytes


def test_the_script_makes_the_same_bytes_again(tmp_path: Path) -> None:
    assert make_vectors.main(["--output", str(tmp_path)]) == 0
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    there = {p.relative_to(VECTORS): p.read_bytes() for p in VECTORS.rglob("*") if p.is_file()}
    assert made.keys() == there.keys()
    assert [name for name in made if made[name] != there[name]] == []


def test_the_vectors_are_small() -> None:
    # journals and patches have their own limits, in test_steps_format.py and test_patch.py
    apart = {VECTORS / "steps", VECTORS / "patches"}
    files = [p for p in VECTORS.rglob("*") if p.is_file() and apart.isdisjoint(p.parents)]
    assert sum(p.stat().st_size for p in files) < 360_000


def test_the_script_replaces_a_vector_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path)]
    assert make_vectors.main(output) == 0
    assert make_vectors.main(output) == 0  # the same bytes are no change
    changed = tmp_path / "valid" / "row.safetensors"
    golden = changed.read_bytes()
    changed.write_bytes(b"changed")
    capsys.readouterr()
    assert make_vectors.main(output) == 1
    assert "valid/row.safetensors: exists with other bytes" in capsys.readouterr().err
    assert changed.read_bytes() == b"changed"
    assert make_vectors.main([*output, "--force"]) == 0
    assert changed.read_bytes() == golden


def test_the_script_never_removes_a_file(tmp_path: Path) -> None:
    foreign = tmp_path / "mine.txt"
    foreign.write_text("mine")
    assert make_vectors.main(["--output", str(tmp_path), "--force"]) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.txt"]


def test_the_worked_example_of_base3() -> None:
    """+ 0 - + + 0 in one group is DD 79, and in groups of 3 it is 71 7D."""
    for group_size, data in ((-1, "dd79"), (6, "dd79"), (3, "717d")):
        packed = np.frombuffer(bytes.fromhex(data), np.uint8).reshape(1, 2)
        assert reference.unpack(packed, 6, group_size, "w").tolist() == [[1, 0, -1, 1, 1, 0]]
        assert make_vectors.pack_row([1, 0, -1, 1, 1, 0], group_size).hex() == data
    text = (FORMATS / "base3.md").read_text("utf-8")
    assert "`DD 79`" in text and "`71 7D`" in text


def test_the_table_of_codes_in_base3() -> None:
    text = (FORMATS / "base3.md").read_text("utf-8")
    rows = re.findall(r"^\| ([0-9A-F]{2}) \| (\d+) \| `([-0+ ]+)` \|$", text, re.M)
    assert len(rows) == 9
    for code, decimal, trits in rows:
        assert int(code, 16) == int(decimal)
        signs = make_vectors.trits_of(trits)
        assert reference.TRITS_OF_BYTE[int(decimal)].tolist() == signs


def test_the_bits_per_weight_in_base3() -> None:
    text = (FORMATS / "base3.md").read_text("utf-8")
    rows = re.findall(r"^\| (?:a row of )?(\d+) \| (\d+)((?: \| [\d.]+){3}) \|$", text, re.M)
    assert [int(row[0]) for row in rows] == [64, 128, 256, 4096]
    for group, size, bits in rows:
        trits, total, with_8_bits = bits.split(" | ")[1:]
        count = int(group)
        assert int(size) == reference.packed_width(count, -1)
        assert float(trits) == round(8 * int(size) / count, 4)
        assert float(total) == round((8 * int(size) + 16) / count, 4)
        assert float(with_8_bits) == pytest.approx((8 * int(size) + 8) / count, abs=5.1e-5)


def test_the_worked_example_of_int8() -> None:
    text = (FORMATS / "int8.md").read_text("utf-8")
    weights = [1.0, -0.5, 0.0, 0.25]
    scale = float(np.float16(1 / 127))
    integers = [round(weight / scale) for weight in weights]
    assert f"F16 {np.float16(scale).view(np.uint16):04X}" in text
    assert f"bytes      {bytes(n % 256 for n in integers).hex(' ').upper()}\n" in text
    back = [round(scale * n, 5) for n in integers]
    assert back == [0.99994, -0.50391, 0.0, 0.25195]
    assert all(str(abs(value)) in text for value in back if value)


def test_the_worked_example_of_int4() -> None:
    text = (FORMATS / "int4.md").read_text("utf-8")
    weights = [0.875, -0.5, 0.0, 0.25, -0.125]
    scale = -0.875 / 7
    integers = [round(weight / scale) for weight in weights]
    assert f"F16 {np.float16(scale).view(np.uint16):04X}" in text
    assert "   ".join(map(str, integers)) in text
    packed = make_vectors.pack_halves(integers, -1)
    assert f"bytes      {packed.hex(' ').upper()}\n" in text
    found = reference.unpack_int4(np.frombuffer(packed, np.uint8).reshape(1, 3), 5, -1, "w")
    assert found.tolist() == [integers]
    assert [scale * n for n in integers] == weights


def test_the_worked_example_of_rans() -> None:
    text = (FORMATS / "rans.md").read_text("utf-8")
    path = VECTORS / "valid" / "rans-worked-example.safetensors"
    entry = reference.read_head(path)[0]["w.weight"]
    stream = path.read_bytes()[entry.start : entry.end]
    shown = b""
    for offset, told in re.findall(r"^\| (\d+) \| (.*?[0-9A-F]`.*?) \|", text, re.M):
        assert int(offset) == len(shown)
        for count, bytes_ in re.findall(r"(?:(\d+) × )?`([0-9A-F ]+)`", told):
            shown += bytes.fromhex(bytes_) * int(count or 1)
    assert shown == stream
    rows = reference.read_stream(stream, 2, [0, 1, 0, 1], "w")
    for at in (0, 4):
        assert f"   {rows[at : at + 4].hex(' ').upper()}\n" in text


def test_the_signs_of_a_rotation_are_those_of_the_document() -> None:
    text = (FORMATS / "container.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (\d+) \| `([0-9A-F]{16})`, `([0-9A-F]{16})` \| `([-+ ]+)` \|$", text, re.M
    )
    assert [int(row[0]) for row in rows] == [0, 1, 2**32 - 1]
    for seed, first, second, signs in rows:
        expected = [1 if sign == "+" else -1 for sign in signs.split()]
        assert len(expected) == 16
        assert [-1 if int(z, 16) >= 2**63 else 1 for z in (first, second)] == expected[:2]
        assert reference.signs_of(16, int(seed)).tolist() == expected
        assert make_vectors.signs_of(16, int(seed)) == expected
    assert text.count("`E220A8397B1DCDAF`") == 1  # the first output that SplitMix64 is known by


@pytest.mark.parametrize("block", sorted(reference.BLOCKS))
def test_a_rotation_is_the_matrix_of_the_document(block: int) -> None:
    """R = D B, element by element; it is orthogonal, and turns W back from W R."""
    cols, seed = 2 * block, 3
    places = np.arange(block)
    common = places[:, None] & places
    hadamard = np.array([[(-1) ** bin(n).count("1") for n in row] for row in common.tolist()])
    if block == 4:
        shown = [" ".join("+" if n > 0 else "-" for n in row) for row in hadamard.tolist()]
        text = (FORMATS / "container.md").read_text("utf-8")
        assert "\n".join(f"    {row}" for row in shown) in text
    r = np.diag(reference.signs_of(cols, seed)) @ np.kron(np.eye(2), hadamard / math.sqrt(block))
    assert np.array_equal(r @ r.T, np.eye(cols))  # exact: every element is a power of two
    rng = np.random.default_rng(block)
    weight, x = rng.standard_normal((3, cols)), rng.standard_normal(cols)
    assert np.allclose(reference.unrotate(weight @ r, block, seed), weight, rtol=0, atol=1e-13)
    assert np.allclose((weight @ r) @ (r.T @ x), weight @ x, rtol=0, atol=1e-11)
    again = make_vectors.unrotated([1.0, 0.5] * block, block, seed)
    assert np.array_equal(np.array([1.0, 0.5] * block) @ r.T, again)


def test_the_vectors_have_every_block_and_every_other_feature_rotated() -> None:
    blocks, others = set(), set()
    for path in VALID:
        for want in expected_of(path).values():
            if "rotation" in want:
                blocks.add(want["rotation"]["block"])
                others.add((want["scale_dtype"] == "U8", "planes" in want, len(want["shape"])))
    assert blocks == reference.BLOCKS
    assert {(True, False, 2), (False, True, 2), (False, False, 3), (True, True, 3)} <= others


def test_the_codes_of_8_bit_scales_are_those_of_the_document() -> None:
    for row in json.loads((VECTORS / "scale8.json").read_text("utf-8")):
        code = row["code"]
        value = (1 + code % 8 / 8) * 2.0 ** (code // 8 - 15) if code else 0.0
        assert make_vectors.float_bits(value) == row["value"]
        assert reference.float32(bytes([code]), "U8", "w").tolist() == [value]


def test_the_worked_example_of_the_container() -> None:
    data = WORKED_EXAMPLE.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = (FORMATS / "container.md").read_text("utf-8")
    example = text[text.index("## 7.") : text.index("## 8.")]
    shown = "".join(re.findall(r"^    (.*)$", example, re.M))
    assert shown == data[8 : 8 + length].decode()
    assert f"`{data[:8].hex(' ').upper()}` | N = {length}" in example
    assert f"| {8 + length} | `{data[8 + length : -2].hex(' ').upper()}`" in example
    assert f"| {10 + length} | `{data[-2:].hex(' ').upper()}`" in example
    assert f"The file has {len(data)} bytes" in example
    (tensor,) = reference.decode(WORKED_EXAMPLE).values()
    assert isinstance(tensor, reference.Ternary)
    assert tensor.dequantize().tolist() == [[0.5, 0.0, -0.5, 0.5, 0.5, 0.0]]


def test_pseudo_code_is_short() -> None:
    for document in ("base3.md", "container.md"):
        text = (FORMATS / document).read_text("utf-8")
        section = text[text.index("## 5. Decoding") : text.index("## 6.")]
        assert 5 <= len(re.findall(r"^    \S?.*$", section, re.M)) <= 15


def test_the_folder_says_first_where_the_shipped_code_is() -> None:
    first = (FORMATS / "README.md").read_text("utf-8").splitlines()[0]
    named = re.findall(r"`(ternarize/[^`]+)`", first)
    assert {"base3.py", "container.py"} <= {Path(each).name for each in named}
    assert all((FORMATS.parent / each).is_file() for each in named)


def test_the_independent_parts_share_no_code() -> None:
    for name, others in (("reference.py", "make_vectors"), ("make_vectors.py", "reference|numpy")):
        source = (FORMATS / name).read_text("utf-8")
        pattern = rf"^\s*(?:from|import) (?:ternarize|torch|safetensors|{others})\b"
        assert re.findall(pattern, source, re.M) == []


# Hostile bytes


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = MIXED.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(reference.Invalid):
            reference.decode(path)


def test_every_changed_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """No byte changes what is decoded, and none gives another exception than Invalid."""
    data = MIXED.read_bytes()
    length = int.from_bytes(data[:8], "little")
    expected = expected_of(MIXED)
    path = tmp_path / "changed.safetensors"
    accepted = []
    for at in range(len(data)):
        for flip in (0x01, 0x20, 0x80):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            try:
                found = reference.decode(path)
            except reference.Invalid:
                continue
            assert_content(found, expected)
            accepted.append(at)
    # only names and values that mean nothing to a decoder can change, and they are in the header
    ignored = data.index(b'"format":"pt"')
    assert accepted
    assert all(ignored <= at < ignored + len(b'"format":"pt"') for at in accepted)
    assert max(accepted) < 8 + length


def test_every_changed_bit_of_a_data_section_in_a_directory_is_refused(tmp_path: Path) -> None:
    """Digests hold over files: those of packed bytes in one and scales in the other too."""
    folder = tmp_path / "model"
    shutil.copytree(PARTED, folder)
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        for at in range(8 + int.from_bytes(data[:8], "little"), len(data)):
            for bit in range(8):
                path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
                with pytest.raises(reference.Invalid):
                    reference.decode(folder)
        path.write_bytes(data)
    assert_content(reference.decode(folder), expected_of(PARTED))


def test_one_byte_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "longer.safetensors"
    path.write_bytes(MIXED.read_bytes() + b"\0")
    with pytest.raises(reference.Invalid, match="^trailing-bytes"):
        reference.decode(path)


def test_only_the_243_codes_are_accepted() -> None:
    for code in range(256):
        packed = np.full((1, 1), code, np.uint8)
        if code < 243:
            digits = [code // 3**i % 3 - 1 for i in range(5)]
            assert reference.unpack(packed, 5, -1, "w").tolist() == [digits]
        else:
            with pytest.raises(reference.Invalid, match="^code-invalid"):
                reference.unpack(packed, 5, -1, "w")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    header = b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(reference.Invalid, match="^(header-not-json|entry-bad)"):
        reference.decode(path)


def test_a_file_that_only_claims_to_be_huge_takes_no_memory(tmp_path: Path) -> None:
    """A matrix without rows has no bytes, however wide it says that it is."""
    cols = 2**50
    shape, width, groups = [0, cols], cols // 5 * 1 + 1, cols // 5 + 1
    records = {
        name: {"shape": shape, "group_size": size, "codec": "base3", "sha256": digest}
        for name, size, digest in (
            ("group", 5, hashlib.sha256(b"").hexdigest()),
            ("tensor", 0, hashlib.sha256(b"\0\0").hexdigest()),
        )
    }
    document = {"format_version": 1, "features": [], "tensors": records}
    header = {
        "__metadata__": {"ternarize": json.dumps(document)},
        "group": {"dtype": "U8", "shape": [0, width], "data_offsets": [0, 0]},
        "group_scale": {"dtype": "F16", "shape": [0, groups], "data_offsets": [0, 0]},
        "tensor": {"dtype": "U8", "shape": [0, width], "data_offsets": [0, 0]},
        "tensor_scale": {"dtype": "F16", "shape": [1, 1], "data_offsets": [0, 2]},
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "wide.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0\0")
    found = reference.decode(path)
    for tensor in found.values():
        assert isinstance(tensor, reference.Ternary)
        assert tensor.dequantize().shape == (0, cols)


# The program


def test_program_prints_one_line_per_tensor() -> None:
    done = run(MIXED)
    assert (done.returncode, done.stderr) == (0, "")
    expected = expected_of(MIXED)
    weight, norm = expected["w.weight"], expected["norm.weight"]
    trits = [trit for row in weight["trits"] for trit in row]
    sparsity = trits.count(0) / len(trits)
    digest = hashlib.sha256(bytes.fromhex(norm["data"])).hexdigest()
    assert done.stdout.splitlines() == [
        f"w.weight ternary [2, 12] 6 {sparsity:.4f} {weight['trits_sha256']} ok",
        f"norm.weight kept [2] - - {digest} ok",
    ]


@pytest.mark.parametrize("path", VALID_DIRECTORIES, ids=lambda path: path.name)
def test_program_reads_a_directory(path: Path) -> None:
    done = run(path)
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert sorted(names) == sorted(expected_of(path))
    assert all(line.endswith(" ok") for line in done.stdout.splitlines())


def test_program_refuses_an_invalid_file_in_one_line() -> None:
    path = VECTORS / "invalid" / "code-invalid-first.safetensors"
    done = run(path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert f"{path}: code-invalid w.weight" in line.replace("\\\\", "\\")


def test_program_refuses_an_invalid_directory_and_goes_on() -> None:
    done = run(VECTORS / "invalid-directories" / "index-path-bad-parent", WORKED_EXAMPLE)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "index-path-bad" in done.stderr
    assert done.stdout.startswith("w.weight ternary [1, 6] -1 0.3333 ")


def test_program_says_when_a_file_is_missing_or_none_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "absent.safetensors")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert run().returncode == 2


def test_program_does_not_print_control_characters(tmp_path: Path) -> None:
    header = json.loads(
        MIXED.read_bytes()[8 : 8 + int.from_bytes(MIXED.read_bytes()[:8], "little")]
    )
    document = json.loads(header["__metadata__"]["ternarize"])
    name = "norm\x1b[2J\nweight"
    header[name] = header.pop("norm.weight")
    document["tensors"][name] = document["tensors"].pop("norm.weight")
    header["__metadata__"]["ternarize"] = json.dumps(document)
    raw = json.dumps(header).encode()
    data = MIXED.read_bytes()[8 + int.from_bytes(MIXED.read_bytes()[:8], "little") :]
    path = tmp_path / "escape.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    done = run(path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 2


def test_a_single_file_is_the_whole_model_even_beside_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(VECTORS / "valid-directories" / "single", folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert reference.files_of(folder) == [folder / "model.safetensors"]


def test_a_file_of_several_megabytes_is_decoded(tmp_path: Path) -> None:
    """Groups of 128 with a tail, against digits taken one by one."""
    rows, cols, group_size = 2048, 10_000, 128
    width, groups = reference.packed_width(cols, group_size), math.ceil(cols / group_size)
    packed = np.random.default_rng(1).integers(0, 243, (rows, width), dtype=np.uint8)
    starts = [*range(0, width - 4, 26)]
    for start in starts:
        packed[:, start + 25] = packed[:, start + 25] % 27 + 81 + 27  # 3 trits and two zero trits
    packed[:, -1] = packed[:, -1] % 3 + 3 + 9 + 27 + 81  # 16 columns: 3 bytes and 1 trit
    scales = np.ones((rows, groups), np.float16)
    data = packed.tobytes() + scales.tobytes()
    digest = hashlib.sha256(data).hexdigest()
    record = {"shape": [rows, cols], "group_size": group_size, "codec": "base3", "sha256": digest}
    document = {"format_version": 1, "features": [], "tensors": {"w": record}}
    header = {
        "__metadata__": {"ternarize": json.dumps(document)},
        "w": {"dtype": "U8", "shape": [rows, width], "data_offsets": [0, packed.nbytes]},
        "w_scale": {
            "dtype": "F16",
            "shape": [rows, groups],
            "data_offsets": [packed.nbytes, len(data)],
        },
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    tensor = reference.decode(path)["w"]
    assert isinstance(tensor, reference.Ternary)
    for row, col in ((0, 0), (0, 127), (0, 128), (7, 9983), (9, 9984), (2047, 9999)):
        group, inside = divmod(col, group_size)
        code = int(packed[row, group * 26 + inside // 5])
        assert tensor.trits[row, col] == code // 3 ** (inside % 5) % 3 - 1
    assert tensor.dequantize().shape == (rows, cols)
