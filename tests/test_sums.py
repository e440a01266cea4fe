"""SHA256SUMS: what coreutils and `verify` say of a directory that has changed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import DigestError, FormatError
from ternarize.files.sums import SUMS, format_sums, listed, read_sums, sha256

ODD = "folder/a\\b\nc.json"  # what sha256sum escapes


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint with a file in a folder, whose name has to be escaped."""
    directory = tmp_path_factory.mktemp("sums")
    source = directory / "source"
    tiny_models.save("llama", source, max_shard_size="60KB")
    (source / ODD).parent.mkdir()
    (source / ODD).write_text("{}")
    convert(source, directory / "packed")
    return directory / "packed"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_coreutils_check_every_file_of_a_conversion(packed: Path, copy: Path) -> None:
    words = ["sha256sum", "--check", "--strict", "--quiet", SUMS]
    assert subprocess.run(words, cwd=packed, check=False).returncode == 0
    there = {p.relative_to(packed).as_posix() for p in packed.rglob("*") if p.is_file()}
    assert (read_sums(packed) or {}).keys() == there - {SUMS}
    (copy / "config.json").write_text("{}")
    assert subprocess.run(words, cwd=copy, check=False, capture_output=True).returncode == 1


def test_verify_finds_a_changed_bit_in_every_file(copy: Path) -> None:
    names = read_sums(copy) or {}
    assert verify(copy)["listed"] == len(names) > 5 and ODD in names
    for name in names:
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(FormatError):  # the readers of a file may find it first
            verify(copy)
        (copy / name).write_bytes(data)
    verify(copy)


def test_a_file_that_no_reader_needs_is_named(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"temperature": 2.0}')
    with pytest.raises(
        DigestError, match=r"generation_config.json: has SHA-256 .*; expected .*, as SHA"
    ):
        verify(copy)
    (copy / "generation_config.json").unlink()
    with pytest.raises(DigestError, match="generation_config.json: is missing"):
        verify(copy)


def test_cards_and_what_is_added_are_nobodys_business(copy: Path) -> None:
    for name in ("README.md", "notes.txt", ".gitattributes"):
        (copy / name).write_text("mine")
    assert verify(copy)["listed"] == len(read_sums(copy) or {})


def test_without_the_list_the_rest_is_checked(copy: Path) -> None:
    (copy / SUMS).unlink()
    assert verify(copy)["listed"] is None


@pytest.mark.parametrize(
    "pattern", ["config.json", "ternarize.json", "model-00001-of-*.safetensors"]
)
def test_a_list_that_leaves_out_what_is_read_is_refused(pattern: str, copy: Path) -> None:
    (name,) = (path.name for path in copy.glob(pattern))
    digests = read_sums(copy) or {}
    del digests[name]
    (copy / SUMS).write_text(format_sums(digests))
    with pytest.raises(FormatError, match=f"does not name {name}"):
        verify(copy)


GOOD = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        f"{GOOD}  a",  # cut off
        f"{GOOD} a\n",
        f"{GOOD.upper()}  a\n",
        f"{GOOD[:-1]}  a\n",
        f"{GOOD}  \n",
        f"{GOOD}  /etc/passwd\n",
        f"{GOOD}  ../a\n",
        f"{GOOD}  b/../../a\n",
        f"{GOOD}  a\n{'0' * 64}  a\n",
        "a\udcff\n",
        "MD5 (a) = d41d8cd98f00b204e9800998ecf8427e\n",
    ],
)
def test_lists_that_sha256sum_does_not_write_are_refused(text: str, copy: Path) -> None:
    (copy / SUMS).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=r"SHA256SUMS: .*\. Fetch it again, or remove it\."):
        verify(copy)


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    names = ["a b", " ", "\\", "\\n", "\n", "a\r", "-", "*a", "ä"]
    for name in names:
        (tmp_path / name).write_text(json.dumps(name))
    text = format_sums({name: sha256(tmp_path / name) for name in listed(tmp_path)})
    (tmp_path / SUMS).write_text(text, "utf-8", newline="\n")
    assert (read_sums(tmp_path) or {}).keys() == set(names)


def test_other_forms_that_sha256sum_takes_are_read(copy: Path) -> None:
    digests = read_sums(copy) or {}
    del digests[ODD]
    forms = ["{} *{}\n", "{}  ./{}\n", "{}  {}\r\n"]
    lines = [forms[i % 3].format(d, name) for i, (name, d) in enumerate(digests.items())]
    (copy / SUMS).write_bytes("".join(lines).encode())
    assert verify(copy)["listed"] == len(digests)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_the_place_of_the_list_is_refused(copy: Path) -> None:
    (copy / SUMS).unlink()
    os.mkfifo(copy / SUMS)
    with pytest.raises(FormatError, match="SHA256SUMS: is no file"):
        verify(copy)


@pytest.mark.skipif(sys.platform != "linux", reason="where names of files are any bytes")
def test_names_of_any_bytes_are_listed(packed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_models.save("llama", source)
    Path(os.fsdecode(os.fsencode(source) + b"/note\xe9.txt")).write_text("text")
    convert(source, tmp_path / "packed")
    assert verify(tmp_path / "packed")["listed"] == len(list((tmp_path / "packed").iterdir())) - 1


def test_a_model_that_is_saved_again_in_its_place_is_loaded(packed: Path, tmp_path: Path) -> None:
    """The record does not speak of it any more, and the list has to be renewed."""
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    ternarize.load(copy, dtype=torch.float32).save_pretrained(copy)
    assert ternarize.load(copy).dtype == torch.float32
    with pytest.raises(FormatError, match="SHA256SUMS"):
        verify(copy)
    (copy / SUMS).unlink()
    verify(copy)
