"""What SECURITY.md promises: the tests that it names, and those that had no other place."""

import ast
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from campaigns.hostile_files import Parts, alone, golden, join, split
from typer.testing import CliRunner

import ternarize
from ternarize import errors
from ternarize.cli.app import app
from ternarize.convert.verify import verify
from ternarize.errors import DigestError, FormatError, TernarizeError, UsageError
from ternarize.files import unmapped
from ternarize.files.headers import read_bytes
from ternarize.files.json_files import read_config
from ternarize.measure import report
from ternarize.models.reads import open_tokenizer
from ternarize.runtime.generate import generate
from ternarize.sources.packed import open_packed

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"


def put(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_every_test_that_security_md_names_exists() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text("utf-8"))
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}, (file, name)


def classes() -> dict[str, type[TernarizeError]]:
    found = {name: each for name, each in vars(errors).items() if isinstance(each, type)}
    return {name: each for name, each in found.items() if issubclass(each, TernarizeError)}


def test_every_class_of_errors_is_listed_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    listed = {n: int(c) for n, c in re.findall(r"^\| `(\w+Error)` \| (\d) \|", text, re.M)}
    assert listed.keys() == classes().keys()
    for name, code in listed.items():
        assert name in (errors.__doc__ or "")

        def fail(model: str, name: str = name) -> None:
            raise classes()[name]("where: what. What to do.")

        monkeypatch.setattr(report, "inspect", fail)
        result = CliRunner().invoke(app, ["inspect", "x"])
        assert result.exit_code == code
        assert result.stderr == "error: where: what. What to do.\n"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\u202eabc", "nul\0", "x" * 100_000, "\ud800"])
def test_an_error_is_one_line_whatever_a_name_holds(name: str) -> None:
    for each in classes().values():
        text = str(each(f"model.safetensors: {name}: is wrong. Repair it."))
        assert text.isprintable() and len(text) < 2 * errors.LONGEST_MESSAGE
        assert text.startswith("model.safetensors: ") and text.endswith(": is wrong. Repair it.")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["user/kernel", "flash|user/kernel:name", {"": "user/kernel"}])
def test_code_of_the_hub_in_a_configuration_is_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    files = golden("rows")
    table = json.loads(bytes(files["config.json"]))  # type: ignore[arg-type]
    raw = json.dumps(table | {key: value}).encode()
    folder = put(tmp_path / "model", files | {"config.json": raw})
    for act in (ternarize.load, verify):
        with pytest.raises(FormatError, match="names code of the Hub"):
            act(folder)
    (folder / "config.json").write_text(json.dumps(table | {key: "sdpa"}))
    assert read_config(folder) is not None


def test_a_configuration_with_too_many_layers_is_refused_at_once(tmp_path: Path) -> None:
    files = golden("rows")
    table = json.loads(bytes(files["config.json"]))  # type: ignore[arg-type]
    for change in ({"num_hidden_layers": 10**9}, {"text_config": {"n_layers": 5000}}):
        (tmp_path / "config.json").write_text(json.dumps(table | change))
        started = time.monotonic()
        with pytest.raises(FormatError, match="expected at most 4096"):
            ternarize.load(tmp_path)
        assert time.monotonic() - started < 10


def test_a_flipped_bit_of_the_metadata_is_found(tmp_path: Path) -> None:
    """A seed of a rotation, a size, the name of a member: what the digests of tensors leave out."""
    files = golden("rotation")
    folder = put(tmp_path / "model", files)
    whole = files[WEIGHTS]
    assert isinstance(whole, bytes)
    start = 8 + int.from_bytes(whole[:8], "little")
    where = [m.start() for m in re.finditer(rb"rotation|seed|sealed|sha256|format", whole[:start])]
    seeds = [m.end() for m in re.finditer(rb'seed\\":', whole[:start])]
    assert len(seeds) > 3
    bits = [8 * (at + i) + bit for at in where[:4] + where[-4:] for i in range(6) for bit in (0, 4)]
    for bit in bits + [8 * at for at in seeds]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(FormatError):
            open_packed(folder)
    # without a seal, as others may write it, the file is as good
    header, body = split(whole)
    table = json.loads(header["__metadata__"]["ternarize"])
    del table["sealed"], table["sha256"]
    header["__metadata__"]["ternarize"] = json.dumps(table)
    (folder / WEIGHTS).write_bytes(join(header, body))
    assert verify(folder)["ternary"] > 0


def test_a_shard_of_another_conversion_is_refused(tmp_path: Path) -> None:
    files = golden("groups")
    shard = "model-00001-of-00002.safetensors"
    parts = Parts.of(bytes(files[shard]))  # type: ignore[arg-type]
    table = parts.table["tensors"]
    tensor = next(n for n in parts.tensors if n in table and "codec" not in table[n])
    parts.tensors[tensor][2] = parts.tensors[tensor][2][::-1]
    files[shard] = parts.bytes()
    folder = put(tmp_path / "model", files)
    for act in (ternarize.load, verify):
        with pytest.raises(DigestError, match="is not the tensor that ternarize.json lists"):
            act(folder)
    shutil.rmtree(folder)
    put(folder, alone(files))  # nothing says that it is of another
    assert verify(folder)["ternary"] > 0


def test_the_files_of_a_loaded_model_may_go_away(tmp_path: Path) -> None:
    """Parameters that are a mapping of a file die with it, by a signal."""
    folder = put(tmp_path / "model", golden("rows"))
    model = ternarize.load(folder, dtype="float32")
    tokens = torch.arange(1, 9).unsqueeze(0)
    before = model(input_ids=tokens).logits
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(folder) not in maps.read_text()
    os.truncate(folder / WEIGHTS, 0)
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_a_file_that_changes_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "model", golden("rows"))
    from ternarize.runtime.plugin.quantizer import TernarizeQuantizer

    prepare = TernarizeQuantizer.prepare

    def changed(self: TernarizeQuantizer, *args: Any) -> Any:
        with (folder / WEIGHTS).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        return prepare(self, *args)

    monkeypatch.setattr(TernarizeQuantizer, "prepare", changed)
    with pytest.raises(FormatError, match="changed while it was loaded"):
        ternarize.load(folder, verify=False)


def test_of_a_slice_of_rows_no_other_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sizes = put(tmp_path / "model", golden("rows")), []

    def read(path: Path, start: int, nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return read_bytes(path, start, nbytes)

    monkeypatch.setattr(unmapped, "read_bytes", read)
    file = unmapped.open_file(folder / WEIGHTS)
    name = next(name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2)
    rows = file.get_slice(name)[1:3]
    assert rows.shape[0] == 2 and sizes == [rows.nbytes]


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ raise_exception('no such role') }}",
        "{% for %}",
        "{{ messages[5].content }}{{ 1 / 0 }}",
    ],
)
def test_a_template_of_a_chat_that_fails_is_one_line(template: str) -> None:
    example = ROOT / "examples" / "tiny-llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(example)
    tokenizer = open_tokenizer(example)

    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="chat template fails") as raised:
        generate(model, tokenizer, "Hello", chat=True)
    assert str(raised.value).isprintable()


def test_what_transformers_reads_of_a_packed_file_is_what_safetensors_maps(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = put(tmp_path / "model", golden("planes-scale8"))
    with safe_open(folder / WEIGHTS, "pt") as mapped, unmapped.open_file(folder / WEIGHTS) as read:
        assert sorted(read.keys()) == sorted(mapped.keys()) and read.metadata() == mapped.metadata()
        for name in read.keys():
            one, two = read.get_slice(name), mapped.get_slice(name)
            assert (one.get_shape(), one.get_dtype()) == (two.get_shape(), two.get_dtype())
            assert torch.equal(read.get_tensor(name), mapped.get_tensor(name))
            if one.get_shape():
                for rows in (slice(1, 3), slice(0, None), slice(-2, None), slice(2, 2)):
                    assert torch.equal(one[rows], two[rows])
            if len(one.get_shape()) > 1:
                part = (slice(0, 5), slice(2, 4))
                assert torch.equal(one[part], two[part]) and one[part].is_contiguous()
