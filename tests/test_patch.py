"""Patches: what differs between two packed checkpoints, as a file, and the second one again.

Specification, vectors, reference reader and package agree with each other; and what is made of real
conversions comes out byte for byte, or is refused in one line, with nothing left behind.
"""

import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_golden
import make_patch_vectors
import numpy as np
import pytest
import reference
import reference_patch as theirs
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, FormatError, OutputError, TernarizeError
from ternarize.files import patch as patches
from ternarize.files.sections import BLOCK, apply_changes, tell_changes
from ternarize.plans.recipe import Recipe
from ternarize.publish.patches import apply_patch, diff_packed

FORMATS = Path(reference.__file__).resolve().parent
VECTORS = FORMATS / "vectors" / "patches"
VALID = sorted((VECTORS / "valid").glob("*.patch"))
INVALID = sorted((VECTORS / "invalid").glob("*.patch"))
SPECIFICATION = (FORMATS / "patch.md").read_text("utf-8")
GOLDEN = FORMATS / "golden"
GOLDEN_PATCHES: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text("utf-8"))["patches"]


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------------------------
# The format


def rules_of_specification() -> dict[str, str]:
    """Vector -> rule, from the table of the document."""
    found: dict[str, str] = {}
    for rule, names in re.findall(
        r"^\| `([a-z0-9-]+)` \| .* \| (`[^|]*`) \|$", SPECIFICATION, re.M
    ):
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", names), rule)
    return found


RULES = rules_of_specification()


def test_every_rule_has_its_vectors_and_every_vector_its_rule() -> None:
    assert {path.stem for path in INVALID} == RULES.keys()
    for vector, rule in RULES.items():
        assert vector == rule or vector.startswith(f"{rule}-")
    assert sum(path.stat().st_size for path in VECTORS.rglob("*.*")) < 250_000


def test_every_rule_of_the_reader_is_in_the_specification() -> None:
    source = (FORMATS / "reference_patch.py").read_text("utf-8")
    quoted = set(re.findall(r'"([a-z]+(?:-[a-z]+)+)[" ]', source)) - {"utf-8"}
    of_the_container = {"code-invalid", "tensor-without-record"}
    assert quoted - of_the_container == set(RULES.values()) - {"duplicate-key"}


def test_the_independent_parts_share_no_code() -> None:
    for name, others in (
        ("reference_patch", "make_\\w+"),
        ("make_patch_vectors", "reference|numpy"),
    ):
        source = (FORMATS / f"{name}.py").read_text("utf-8")
        pattern = rf"^\s*(?:from|import) (?:ternarize|torch|safetensors|{others})"
        assert re.findall(pattern, source, re.M) == []


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_both_readers_make_the_files_of_a_valid_patch(path: Path, tmp_path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text("utf-8"))["files"]
    apply_patch(path.parent / "base", path, tmp_path / "out", threads=1)
    for found in (
        theirs.apply(path.parent / "base", path.read_bytes()),
        files_of(tmp_path / "out"),
    ):
        assert {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in found.items()
        } == expected
    reference.decode(tmp_path / "out")


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_both_readers_refuse_an_invalid_patch(path: Path, tmp_path: Path) -> None:
    with pytest.raises(reference.Invalid) as refusal:
        theirs.apply(path.parent / "base", path.read_bytes())
    assert str(refusal.value).split()[0] == RULES[path.stem]
    with pytest.raises((FormatError, CheckpointError)) as ours:
        apply_patch(path.parent / "base", path, tmp_path / "out", threads=1)
    assert path.name in str(ours.value) and "\n" not in str(ours.value)
    assert list(tmp_path.iterdir()) == []


def test_the_program_of_the_reference_reader(tmp_path: Path) -> None:
    command = [sys.executable, str(FORMATS / "reference_patch.py")]
    base, patch = VECTORS / "valid" / "base", VECTORS / "valid" / "all.patch"

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)

    done = run(base, patch, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(files_of(tmp_path / "out"))
    bad = VECTORS / "invalid" / "part-digest-trits.patch"
    done = run(bad.parent / "base", bad)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{bad}: part-digest w.trits" in done.stderr and done.stderr.count("\n") == 1
    assert run().returncode == 2


def test_the_worked_example() -> None:
    example = SPECIFICATION.split("## 7. Worked example")[1].split("## 8.")[0]
    rows = re.findall(r" ((?:[0-9A-F]{2} ?)+(?:  +[0-9A-F]{2}(?: [0-9A-F]{2})*)*)$", example, re.M)
    told = make_patch_vectors.tell_trits(b"\xdd\x79", b"\x4c\x79")
    assert bytes.fromhex("".join(row for row in rows if row.count(" ") > 9)) == told
    old, new = (np.frombuffer(data, np.uint8) for data in (b"\xdd\x79", b"\x4c\x79"))
    assert tell_changes(old, new, "trits", 1) == told
    assert theirs.change_trits(b"\xdd\x79", told, "w") == b"\x4c\x79"
    assert len(told) == 20 and "`4C 79`" in example


@pytest.mark.parametrize("name", GOLDEN_PATCHES)
def test_both_readers_apply_a_golden_patch(name: str, tmp_path: Path) -> None:
    """These bytes are read for ever."""
    base, expected = GOLDEN_PATCHES[name]
    apply_patch(GOLDEN / base, GOLDEN / name, tmp_path / "out", threads=1)
    for found in (
        theirs.apply(GOLDEN / base, (GOLDEN / name).read_bytes()),
        files_of(tmp_path / "out"),
    ):
        assert {n: hashlib.sha256(data).hexdigest() for n, data in found.items()} == expected


# ------------------------------------------------------------------------------------------------
# Codings


def taking(data: bytes) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)

    def take(count: int) -> bytes:
        found = stream.read(count)
        assert len(found) == count
        return found

    return take


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(0, 12),
    rate=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_changes_of_trits_are_those_of_both_others(seed: int, size: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    old, other = rng.integers(0, 243, (2, size), dtype=np.uint8)
    new = np.where(rng.random(size) < rate, other, old).astype(np.uint8)
    told = tell_changes(old, new, "trits", 1)
    assert told == make_patch_vectors.tell_trits(old.tobytes(), new.tobytes())
    assert theirs.change_trits(old.tobytes(), told, "w") == new.tobytes()
    assert apply_changes(old, "trits", 1, taking(told)).tobytes() == new.tobytes()


@settings(deadline=None, max_examples=40)
@given(
    old=st.binary(min_size=16, max_size=16),
    new=st.binary(min_size=16, max_size=16),
    width=st.sampled_from([1, 2, 4, 8]),
)
def test_folded_differences_are_those_of_both_others(old: bytes, new: bytes, width: int) -> None:
    a, b = (np.frombuffer(data, np.uint8) for data in (old, new))
    for coding in ("words", "halves"):
        told = tell_changes(a, b, coding, width)
        if coding == "words":
            assert told == make_patch_vectors.tell_words(old, new, width)
            assert theirs.change_words(old, told, width) == new
        else:
            assert told == make_patch_vectors.tell_halves(old, new)
            assert theirs.change_halves(old, told) == new
        assert apply_changes(a, coding, width, taking(told)).tobytes() == new


def test_blocks_of_a_large_matrix_begin_anew() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 243, BLOCK + 1000, dtype=np.uint8)
    new = old.copy()
    for at in (0, BLOCK - 1, BLOCK, BLOCK + 999):
        new[at] = 242 - old[at] if old[at] != 121 else 0
    told = tell_changes(old, new, "trits", 1)
    assert theirs.change_trits(old.tobytes(), told, "w") == new.tobytes()
    assert np.array_equal(apply_changes(old, "trits", 1, taking(told)), new)


def test_rare_changes_take_about_their_entropy() -> None:
    """At 1 % of the trits, to a neighbour: 0.0853 bits a trit; LZMA of the digits takes more."""
    rng = np.random.default_rng(0)
    digits = rng.choice(3, (2**17, 5), p=[0.275, 0.45, 0.275])
    moved = rng.random(digits.shape) < 0.01
    there = np.where(digits == 1, 2 * rng.integers(0, 2, digits.shape), 1)
    old, new = (
        (table * 3 ** np.arange(5)).sum(1).astype(np.uint8)
        for table in (digits, np.where(moved, there, digits))
    )
    told = tell_changes(old, new, "trits", 1)
    assert 8 * len(told) / digits.size < 0.0853 * 1.03
    by_lzma = lzma.compress(((new + 243 - old) % 243).astype(np.uint8).tobytes(), lzma.FORMAT_XZ)
    assert len(told) < 0.9 * len(by_lzma)


# ------------------------------------------------------------------------------------------------
# Conversions

# streams are not patched: tests/test_recode.py
MODELS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name != "coded")
CARRIED = "vocabulary.txt"  # of both, and large enough to be taken from the base


def make_two(folder: Path, recipe: Recipe) -> tuple[Path, Path]:
    """The packed forms of a model and of the same after a little training."""
    tiny_models.save("llama", folder / "source")
    (folder / "source" / CARRIED).write_text("word\n" * 1000)
    shutil.copytree(folder / "source", folder / "tuned")
    generator = torch.Generator().manual_seed(1)
    path = folder / "tuned" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        mask = torch.rand(tensor.shape, generator=generator) < 0.02
        if "layers.0.self_attn.q_proj" not in name:
            tensors[name] = (tensor.float() + noise * mask).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    for name, packed in (("source", "a"), ("tuned", "b")):
        convert(folder / name, folder / packed, recipe, threads=1)
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_two(tmp_path_factory.mktemp("two"), Recipe("itf", 16, head="int8"))


@pytest.mark.parametrize("name", MODELS)
def test_the_second_checkpoint_comes_out_byte_for_byte(name: str, tmp_path: Path) -> None:
    """Groups in shards, tied, a scale for all, every type of scale, planes, rotation, experts."""
    a, b = GOLDEN / name, make_golden.nudged(GOLDEN / name, tmp_path / "b")
    found = diff_packed(a, b, tmp_path / "p", threads=1)
    assert found["tensors"] > 0 and found["bytes"] == (tmp_path / "p").stat().st_size
    codings = {part.coding for part in patches.open_patch(tmp_path / "p").parts.values()}
    assert codings >= {"trits", "words"}
    assert ("halves" in codings) == (name == "int4")
    result = apply_patch(a, tmp_path / "p", tmp_path / "c", threads=1)
    assert files_of(tmp_path / "c") == files_of(b)
    assert result["changed"] == found["tensors"]
    assert theirs.apply(a, (tmp_path / "p").read_bytes()) == files_of(b)


def test_a_conversion_of_a_trained_model_comes_out_with_its_sums(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two
    found = diff_packed(a, b, tmp_path / "p", threads=1)
    result = apply_patch(a, tmp_path / "p", tmp_path / "c", threads=1)
    assert files_of(tmp_path / "c") == files_of(b)
    assert result["listed"] and found["bytes"] < found["result_bytes"] / 2


def test_the_result_loads_like_the_second_checkpoint(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two
    ternarize.diff_packed(a, b, tmp_path / "p")
    ternarize.apply_patch(a, tmp_path / "p", tmp_path / "c")
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.inference_mode():
        logits = [
            ternarize.load(each, dtype="float32")(input_ids=ids).logits
            for each in (b, tmp_path / "c")
        ]
    assert torch.equal(*logits)


def test_only_what_differs_is_in_the_patch(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    found = diff_packed(a, b, tmp_path / "p", threads=1)
    told = patches.open_patch(tmp_path / "p")
    assert "model.layers.0.self_attn.q_proj.weight" not in told.base
    assert set(told.base) == {name.removesuffix("_scale") for name in told.parts}
    assert found["tensors"] == len(told.base) and found["unchanged"] > 0
    assert [file.name for file in told.files if file.source == "base"] == [CARRIED]


def test_where_nothing_differs_the_patch_is_small_and_valid(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, _ = two
    found = diff_packed(a, a, tmp_path / "p", threads=1)
    assert found["tensors"] == 0 and found["bytes"] < 4000
    apply_patch(a, tmp_path / "p", tmp_path / "c", threads=1)
    assert files_of(tmp_path / "c") == files_of(a)


def test_scales_of_another_type_travel_whole(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = two
    shutil.copytree(a.parent / "tuned", tmp_path / "wide")
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] * 2.0**30  # beyond F16
    save_file(tensors, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "wide", tmp_path / "b", Recipe("itf", 16, head="int8"), threads=1)
    diff_packed(a, tmp_path / "b", tmp_path / "p", threads=1)
    assert patches.open_patch(tmp_path / "p").parts[f"{name}_scale"].coding == "bytes"
    apply_patch(a, tmp_path / "p", tmp_path / "c", threads=1)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "b")


def test_a_base_in_other_shards_with_another_card_is_the_same_base(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two
    diff_packed(a, b, tmp_path / "p", threads=1)
    model: Any = ternarize.load(a)
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    again = tmp_path / "again"
    shutil.copy(a / CARRIED, again)
    (again / "README.md").write_text("mine")
    assert len(list(again.glob("*.safetensors"))) > 1
    apply_patch(again, tmp_path / "p", tmp_path / "c", threads=1)
    assert files_of(tmp_path / "c") == files_of(b)


def test_other_layouts_are_refused_by_the_name_of_a_tensor(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two
    for recipe, words in (
        (Recipe("itf", 32, head="int8"), "group size 16.* and .*group size 32"),
        (Recipe("itf", 16, head="int4"), "lm_head.weight: is int8 .* and int4"),
        (Recipe("itf", 16), "lm_head.weight: is int8 .* and kept as"),
    ):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        convert(b.parent / "tuned", tmp_path / "other", recipe, threads=1)
        with pytest.raises(CheckpointError, match=words) as refusal:
            diff_packed(a, tmp_path / "other", tmp_path / "p", threads=1)
        assert "--recipe" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_another_base_is_refused_by_the_name_of_a_tensor(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two
    diff_packed(a, b, tmp_path / "p", threads=1)
    with pytest.raises(CheckpointError, match=r"b: \S+: has SHA-256 .*that of the base of p"):
        apply_patch(b, tmp_path / "p", tmp_path / "c", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_damaged_base_is_found_and_its_tensor_named(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two
    diff_packed(a, b, tmp_path / "p", threads=1)
    shutil.copytree(a, tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.safetensors: \S+: its bytes have changed"):
        apply_patch(tmp_path / "a", tmp_path / "p", tmp_path / "c", threads=1)
    assert not (tmp_path / "c").exists()


def test_truncated_and_flipped_patches_are_refused_in_one_line(tmp_path: Path) -> None:
    """By both readers, before any part is used."""
    base, path = VECTORS / "valid" / "base", tmp_path / "p"
    good = (VECTORS / "valid" / "few.patch").read_bytes()
    for at in range(0, len(good), 29):
        for data in (good[:at], good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :]):
            with pytest.raises(reference.Invalid):
                theirs.apply(base, data)
            path.write_bytes(data)
            with pytest.raises(FormatError) as refusal:
                told = patches.open_patch(path)
                for part in (told.small, *told.parts.values()):
                    with patches.open_part(path, part, "part") as take:
                        take(part.length)
            assert "\n" not in str(refusal.value)


def test_the_output_is_never_half_there(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ternarize.publish.patches.write_patch", interrupt)
        diff_packed(a, b, tmp_path / "p", threads=1)
    assert list(tmp_path.iterdir()) == []
    diff_packed(a, b, tmp_path / "p", threads=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ternarize.publish.patches._check_files", interrupt)
        apply_patch(a, tmp_path / "p", tmp_path / "c", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    makes: list[Callable[[], Any]] = [
        lambda: diff_packed(a, b, tmp_path / "p"),
        lambda: apply_patch(a, tmp_path / "p", tmp_path),
        lambda: apply_patch(a, tmp_path / "p", a / "inside"),
        lambda: diff_packed(a, b, a / "inside"),
        lambda: diff_packed(a, b, b / "inside"),
    ]
    for make in makes:
        with pytest.raises(OutputError):
            make()


def test_a_file_of_another_kind_is_no_patch(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = two
    with pytest.raises(FormatError, match="is no patch"):
        apply_patch(a, a / "model.safetensors", tmp_path / "c")
    with pytest.raises(TernarizeError, match="cannot be read"):
        apply_patch(a, tmp_path / "absent", tmp_path / "c")


def test_a_large_file_that_is_no_weight_does_not_travel(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two
    shutil.copytree(b, tmp_path / "b")
    (tmp_path / "b" / "optimizer.pt").write_bytes(bytes(20_000))
    monkeypatch.setattr("ternarize.publish.patches.LARGEST_FILE", 19_999)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: .* 20000 bytes.*Move it away"):
        diff_packed(a, tmp_path / "b", tmp_path / "p")


def test_the_commands(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = map(str, two)
    patch, out = str(tmp_path / "p"), str(tmp_path / "c")
    done = CliRunner().invoke(app, ["diff", a, b, patch])
    assert done.exit_code == 0 and re.search(r"p: \d+ of \d+ tensors differ, .* bits", done.stdout)
    done = CliRunner().invoke(app, ["apply", a, patch, out, "--json"])
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["output"] == out and result["changed"] > 0
    assert verify(out)["bytes"] == result["bytes"]
    done = CliRunner().invoke(app, ["apply", b, patch, str(tmp_path / "d")])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
