"""`ternarize recode`: the same tensors in fewer bits and back, used wherever packed ones are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_steps import EXAMPLE
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert import entropy
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.convert.workplace import CODING
from ternarize.errors import DigestError, FormatError, OutputError, UsageError
from ternarize.files.checkpoint import open_files
from ternarize.files.headers import read_header
from ternarize.files.metadata import records_of
from ternarize.files.recoded import recode_file
from ternarize.files.unmapped import open_file
from ternarize.measure.report import inspect
from ternarize.plans.recipe import Recipe
from ternarize.publish.card import make_card
from ternarize.publish.patches import diff_packed
from ternarize.publish.recode import recode
from ternarize.sources.packed import open_packed
from ternarize.steps.appender import Appender
from ternarize.steps.base import base_digest
from ternarize.steps.checkpoint import replay
from ternarize.steps.journal import JournalHeader

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
}  # large enough that tables pay
MADE = {
    "dense": ("llama", Recipe("itf", 32)),
    "rows": ("llama", Recipe("itf", -1)),
    "tensors": ("llama", Recipe("itf", 0)),
    "scales in 8 bits": ("llama", Recipe("itf", 32, scale_bits=8)),
    "planes": ("llama", Recipe("itf", 32, planes=("*down_proj*", "*.v_proj*"))),
    "experts": ("mixtral", Recipe("itf", 32)),
    "head": ("llama_tied", Recipe("twn", 64, head="int8")),
}


def logits(model: Path) -> torch.Tensor:
    tokens = torch.arange(1, 17)[None]
    with torch.no_grad():
        found: torch.Tensor = ternarize.load(model)(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("name", MADE)
def test_all_that_was_packed_is_there_in_fewer_bytes_and_comes_back(
    name: str, tmp_path: Path
) -> None:
    kind, recipe = MADE[name]
    tiny_models.save(kind, tmp_path / "source", **WIDE)
    before, coded, back = (tmp_path / each for each in ("before", "coded", "back"))
    convert(tmp_path / "source", before, recipe)
    told = recode(before, coded)
    again = recode(coded, back, "base3")
    _, records = open_packed(coded)
    assert any(record.coded for record in records.values())
    assert told["bytes"] < told["bytes_before"] and again["bytes_before"] == told["bytes"]
    verify(coded, tmp_path / "source")
    same = json.loads((before / "ternarize.json").read_text())
    assert json.loads((back / "ternarize.json").read_text()) == same
    one, other, between = (
        {name: record.sha256 for name, record in open_packed(each)[1].items()}
        for each in (before, back, coded)
    )
    assert one == other == between
    assert torch.equal(logits(coded), logits(before))
    theirs, ours = reference.decode(coded), reference.decode(before)
    assert {n: reference.describe(n, t) for n, t in theirs.items()} == {
        n: reference.describe(n, t) for n, t in ours.items()
    }


# --- at once -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("sharded") / "source"
    tiny_models.save("llama", source, max_shard_size=1 << 20, **WIDE)
    assert len(list(source.glob("*.safetensors"))) > 2
    return source


@pytest.mark.parametrize("name", ["dense", "scales in 8 bits", "experts"])
def test_a_conversion_that_codes_gives_what_recoding_gives(name: str, tmp_path: Path) -> None:
    kind, recipe = MADE[name]
    tiny_models.save(kind, tmp_path / "source", max_shard_size=1 << 20, **WIDE)
    before, recoded, coded = (tmp_path / each for each in ("before", "recoded", "coded"))
    convert(tmp_path / "source", before, recipe)
    told = recode(before, recoded)
    seen: list[tuple[int, int, str, str]] = []
    record = convert(
        tmp_path / "source",
        coded,
        replace(recipe, codec="rans"),
        progress=lambda *call: seen.append(call),
    )
    assert contents(coded) == contents(recoded)
    assert record["recipe"]["codec"] == "rans"
    assert told["bytes"] < told["bytes_before"]
    steps = [(done, total) for done, total, _, stage in seen if stage == "coding"]
    count = len(open_packed(coded)[1])
    assert steps == [(i + 1, count) for i in range(count)]
    assert verify(coded, tmp_path / "source")["source_compared"]


def test_scales_of_6_bits_take_less_than_those_of_8(tmp_path: Path) -> None:
    """Where they are coded: they are every other of the 8-bit codes."""
    tiny_models.save("llama", tmp_path / "source", **WIDE)
    stored = []
    for bits in (8, 6):
        recipe = Recipe("itf", 32, scale_bits=bits, codec="rans", planes=("*down_proj*",))
        record = convert(tmp_path / "source", tmp_path / f"of {bits}", recipe)
        stored.append(sum(row["stored_bytes"] for row in record["tensors"].values()))
        checkpoint, records = open_packed(tmp_path / f"of {bits}")
        for name in (n for n, r in records.items() if r.kind == "ternary"):
            codes = checkpoint.read(f"{name}_scale")
            assert codes.dtype == torch.uint8 and bool((codes % 2 == 1).any()) == (bits == 8)
        assert verify(tmp_path / f"of {bits}", tmp_path / "source")["source_compared"]
    assert stored[1] < stored[0]
    recode(tmp_path / "of 6", tmp_path / "back", "base3")  # which no recipe asks for
    assert verify(tmp_path / "back", tmp_path / "source")["source_compared"]


def test_a_budget_is_spent_otherwise_in_a_conversion_that_codes(
    packed: Path, tmp_path: Path
) -> None:
    """So that the recipe stays, and the card says what was done after it."""
    calibrated = Path(shutil.copytree(packed, tmp_path / "calibrated"))
    (calibrated / "SHA256SUMS").unlink()
    record = json.loads((calibrated / "ternarize.json").read_text())
    record["recipe"] |= {"method": "gptq", "calibrate": {"target_bpw": 2.0}}
    (calibrated / "ternarize.json").write_text(json.dumps(record))
    recode(calibrated, tmp_path / "coded")
    made = json.loads((tmp_path / "coded" / "ternarize.json").read_text())
    assert made["recipe"] == record["recipe"]
    said = make_card(tmp_path / "coded", "user/tiny")
    assert "ternarize recode packed smaller" in said
    assert "packed five to a byte, and entropy-coded (rANS). (" in said
    said = make_card(calibrated, "user/tiny")
    assert "ternarize recode" not in said and "packed five to a byte. (" in said


def is_coded(file: Path) -> bool:
    records = records_of(open_files(file.parent, [file.name]), whole=False)
    return any(record.coded for record in records.values())


def test_a_conversion_that_was_broken_off_while_it_coded_goes_on(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("itf", 32, codec="rans")
    convert(sharded, tmp_path / "whole", recipe)
    calls: list[tuple[str, str]] = []

    def stop(done: int, total: int, name: str, stage: str) -> None:
        calls.append((stage, name))
        if stage == "coding" and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sharded, tmp_path / "broken", recipe, progress=stop)
    partial = tmp_path / "broken.partial"
    assert (partial / CODING).is_dir()
    files = sorted(partial.glob("*.safetensors"))
    assert 0 < sum(map(is_coded, files)) < len(files)
    done = {name for stage, name in calls if stage == "coding"}
    calls.clear()
    again = list[str]()

    def noted(checkpoint: Any, file: str, *more: Any) -> Any:
        again.append(file)
        return recode_file(checkpoint, file, *more)

    monkeypatch.setattr(entropy, "recode_file", noted)
    convert(
        sharded,
        tmp_path / "broken",
        recipe,
        progress=lambda *call: calls.append((call[3], call[2])),
    )
    assert "packing" not in {stage for stage, _ in calls}
    assert done and 0 < len(again) < len(files)  # what was coded stays so
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob("*.streams"))


def test_files_in_which_coding_gained_nothing_are_not_packed_again(tmp_path: Path) -> None:
    """They are written anew all the same, in another order."""
    source, recipe = tmp_path / "source", Recipe("itf", 32, codec="rans")
    tiny_models.save("llama", source, max_shard_size="60KB")
    stages = list[str]()

    def stop(done: int, total: int, name: str, stage: str) -> None:
        if stage == "coding" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "packed", recipe, progress=stop)
    files = sorted((tmp_path / "packed.partial").glob("*.safetensors"))
    assert len(files) > 2 and not any(map(is_coded, files))
    convert(source, tmp_path / "packed", recipe, progress=lambda *call: stages.append(call[3]))
    assert stages and "packing" not in stages
    verify(tmp_path / "packed", source)


def test_a_coded_file_that_a_break_has_damaged_is_made_again(sharded: Path, tmp_path: Path) -> None:
    recipe = Recipe("itf", 32, codec="rans")
    convert(sharded, tmp_path / "whole", recipe)

    def stop(done: int, total: int, name: str, stage: str) -> None:
        if stage == "coding" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sharded, tmp_path / "broken", recipe, progress=stop)
    coded = [p for p in (tmp_path / "broken.partial").glob("*.safetensors")]
    coded = [p for p in coded if is_coded(p)]
    data = bytearray(coded[0].read_bytes())
    data[-40] ^= 1
    coded[0].write_bytes(data)
    packed: list[str] = []
    convert(
        sharded,
        tmp_path / "broken",
        recipe,
        progress=lambda *call: packed.append(call[2]) if call[3] == "packing" else None,
    )
    assert packed and set(packed) < set(open_packed(tmp_path / "broken")[1])
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_parts_are_coded_when_they_are_put_together(sharded: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    words = ["--method", "itf", "--group-size", "32", "--codec", "rans", "-q"]
    for more in (["--part", "1/2"], ["--part", "2/2"], ["--finish"]):
        line = ["convert", str(sharded), str(tmp_path / "parted"), *words, *more]
        result = runner.invoke(app, line)
        assert result.exit_code == 0, result.stderr
    convert(sharded, tmp_path / "whole", Recipe("itf", 32, codec="rans"))
    assert contents(tmp_path / "parted") == contents(tmp_path / "whole")
    line = ["convert", str(sharded), str(tmp_path / "none"), *words, "--dry-run"]
    assert "sizes are those in base 3" in runner.invoke(app, line).stdout


def test_many_zeros_make_small_files(tmp_path: Path) -> None:
    runner = CliRunner()
    words = ["--method", "itf", "--zeros", "0.9", "--scale-bits", "8", "-q"]
    for line in (
        ["convert", str(EXAMPLE), str(tmp_path / "packed"), *words],
        ["recode", str(tmp_path / "packed"), str(tmp_path / "coded"), "-q"],
        ["verify", str(tmp_path / "coded"), "--source", str(EXAMPLE), "-q"],
    ):
        result = runner.invoke(app, line)
        assert result.exit_code == 0, result.stderr
    totals = inspect(tmp_path / "coded")["totals"]
    assert 0.895 < totals["sparsity"] < 0.905
    assert totals["ternary_bpw"] < 0.75


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zeros", "0.5"], "beside absmean"),
        (["--zeros", "1.5", "--method", "itf"], "0 to 0.999"),
        (["--scale-bits", "6"], "6 in codec base3"),
        (["--scale-bits", "4"], "one of 16, 8, 6"),
    ],
)
def test_a_share_of_zeros_or_a_scale_that_cannot_be_is_refused(
    words: list[str], said: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["convert", str(EXAMPLE), str(tmp_path / "out"), *words])
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_report_counts_the_bytes_of_the_file(packed: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    told = recode(packed, tmp_path / "coded", progress=lambda done, *_: seen.append(done))
    assert seen == list(range(1, len(open_packed(packed)[1]) + 1))
    report = inspect(tmp_path / "coded")
    assert report["totals"]["ternary_bpw"] == told["ternary_bpw"] < 1.75
    rows = {row["name"]: row for row in report["tensors"]}
    record = json.loads((tmp_path / "coded" / "ternarize.json").read_text())["tensors"]
    for name, row in rows.items():
        assert row["stored_bytes"] == record[name]["stored_bytes"]
    assert {row["dtype"] for row in rows.values()} >= {"rans+F16"}
    assert report["totals"]["file_bytes"] == told["bytes"]


def test_transformers_reads_rows_of_a_stream_alone(packed: Path, tmp_path: Path) -> None:
    recode(packed, tmp_path / "coded")
    file, plain = (open_file(each / "model.safetensors") for each in (tmp_path / "coded", packed))
    for name in plain.keys():
        one, other = file.get_slice(name), plain.get_slice(name)
        assert one.get_shape() == other.get_shape() and one.get_dtype() == other.get_dtype()
        for index in (
            ...,
            slice(1, 3),
            (slice(None), slice(2, 5)),
            slice(0, 0),
            slice(-2, None),
            slice(3, 1),
        ):
            if len(one.get_shape()) < 2 and isinstance(index, tuple):
                continue
            assert torch.equal(one[index], other[index]), (name, index)


def test_damage_is_found_by_the_stream_or_the_digest(packed: Path, tmp_path: Path) -> None:
    recode(packed, tmp_path / "coded")
    path = tmp_path / "coded" / "model.safetensors"
    data, found = path.read_bytes(), list[FormatError]()
    (tmp_path / "coded" / "SHA256SUMS").unlink()
    for place in range(len(data) // 2, len(data), len(data) // 40):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(FormatError) as error:
            verify(tmp_path / "coded")
        found.append(error.value)
    assert any(not isinstance(each, DigestError) for each in found)  # streams come first


def test_scales_in_another_shard_stay_there(packed: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    shutil.copytree(packed, apart)
    (apart / "SHA256SUMS").unlink()
    (apart / "model.safetensors").unlink()
    header = read_header(packed / "model.safetensors")
    tensors = load_file(packed / "model.safetensors")
    files = {"a.safetensors": {n: t for n, t in tensors.items() if not n.endswith("_scale")}}
    files["b.safetensors"] = {n: t for n, t in tensors.items() if n.endswith("_scale")}
    for file, part in files.items():
        save_file(part, apart / file, header.metadata)
    places = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (apart / "model.safetensors.index.json").write_text(json.dumps(index))
    recode(apart, tmp_path / "coded")
    assert any(record.coded for record in open_packed(tmp_path / "coded")[1].values())
    recode(tmp_path / "coded", tmp_path / "back", "base3")
    for made in ("coded", "back"):
        index = json.loads((tmp_path / made / "model.safetensors.index.json").read_text())
        infos = open_packed(tmp_path / made)[0].tensors
        assert index["weight_map"] == places == {n: info.file for n, info in infos.items()}
        total = sum(info.stored_bytes for info in infos.values())
        assert index["metadata"]["total_size"] == total
        assert torch.equal(logits(tmp_path / made), logits(packed))


def test_what_works_on_files_as_they_lie_asks_for_base3(packed: Path, tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    recode(packed, coded)
    with pytest.raises(UsageError, match=r"is coded .* `ternarize recode .*--codec base3`"):
        diff_packed(packed, coded, tmp_path / "a.patch")
    header = JournalHeader(1, base=base_digest(open_packed(coded)[1]))
    with Appender(tmp_path / "a.steps", header):
        pass
    with pytest.raises(UsageError, match=r"is coded"):
        replay(tmp_path / "a.steps", coded, tmp_path / "replayed")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.steps", "coded"]


def test_mistakes_are_one_line_and_leave_nothing(packed: Path, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["recode", *words])
        assert result.exit_code != 0
        return result.stderr

    (tmp_path / "there").mkdir()
    assert "exists already" in said(str(packed), str(tmp_path / "there"))
    assert "is inside the model" in said(str(packed), str(packed / "within"))
    assert "a packed checkpoint" in said(str(EXAMPLE), str(tmp_path / "out"))
    assert "zstd" in said(str(packed), str(tmp_path / "out"), "--codec", "zstd")
    with pytest.raises(OutputError):
        recode(packed, tmp_path / "there")
    assert [each.name for each in tmp_path.iterdir()] == ["there"]
