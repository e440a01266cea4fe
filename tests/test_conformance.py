"""The shipped reader against every vector of formats/, on the compiled core and on torch.

A valid file must give what its .json says; an invalid one must be refused with FormatError, never
with another exception. The folders decide what is tested: a new vector needs no change here.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from engines import ENGINES, engine

from ternarize import container
from ternarize.checkpoint import Checkpoint, byte_view, open_checkpoint, open_files
from ternarize.errors import CheckpointError, FormatError
from ternarize.tensor import Ternary

VECTORS = Path(reference.__file__).parent / "vectors"


def vectors(folder: str) -> list[Path]:
    return sorted(p for p in (VECTORS / folder).iterdir() if p.suffix != ".json")


def by_name(path: Path) -> str:
    return path.stem


def read_all(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Read a file or a directory in full, as loading and `verify` do: {name: content}."""
    if path.is_dir():
        checkpoint = open_checkpoint(path)
    else:
        checkpoint = open_files(path.parent, [path.name])
    records = container.records_of(checkpoint, whole=path.is_dir())
    container.check(checkpoint, records, threads=1)
    content: dict[str, Any] = {}
    for name, record in records.items():
        stored = checkpoint.read(name)
        if record.shape is None:
            content[name] = stored.reshape(checkpoint.tensors[name].shape)
            continue
        packed_shape, scale_shape = record.stored_shapes()
        scales = checkpoint.read(name + container.SCALE_SUFFIX).reshape(scale_shape)
        content[name] = container.decode(stored.reshape(packed_shape), scales, record)
    return checkpoint, content


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(byte_view(tensor).numpy().tobytes()).hexdigest()


def assert_is(expected: dict[str, Any], found: Any, checkpoint: Checkpoint, name: str) -> None:
    if expected["kind"] == "kept":
        assert checkpoint.tensors[name].dtype == expected["dtype"]
        assert list(found.shape) == expected["shape"]
        assert byte_view(found).numpy().tobytes().hex() == expected["data"]
        return
    assert isinstance(found, Ternary)
    assert list(found.trits.shape) == expected["shape"]
    assert found.group_size == expected["group_size"]
    if "trits" in expected:
        assert found.trits.tolist() == expected["trits"]
    assert sha256(found.trits) == expected["trits_sha256"]
    assert checkpoint.tensors[name + container.SCALE_SUFFIX].dtype == expected["scale_dtype"]
    assert list(found.scales.shape) == expected["scale_shape"]
    bits = found.scales.to(torch.float32).flatten().view(torch.int32).tolist()
    assert [f"{value & 0xFFFFFFFF:08x}" for value in bits] == expected["scales"]
    assert sha256(found.dequantize()) == expected["dequantized_sha256"]


def test_there_are_vectors_of_all_four_kinds() -> None:
    for folder in ("valid", "invalid", "valid-directories", "invalid-directories"):
        assert vectors(folder)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("path", vectors("valid") + vectors("valid-directories"), ids=by_name)
def test_a_valid_vector_gives_what_its_description_says(path: Path, name: str) -> None:
    expected = json.loads(path.with_suffix(".json").read_text("utf-8"))["tensors"]
    with engine(name):
        checkpoint, content = read_all(path)
    assert content.keys() == expected.keys()
    for tensor, what in expected.items():
        assert_is(what, content[tensor], checkpoint, tensor)
        record = container.records_of(checkpoint, whole=path.is_dir())[tensor]
        assert record.transposed == what.get("transposed", False)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("path", vectors("invalid"), ids=by_name)
def test_an_invalid_file_is_refused(path: Path, name: str) -> None:
    with engine(name), pytest.raises(FormatError) as caught:
        read_all(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("path", vectors("invalid-directories"), ids=by_name)
def test_an_invalid_directory_is_refused(path: Path, name: str) -> None:
    # where files are missing there is no format that could be broken: that is CheckpointError
    missing = path.name in ("no-model", "index-file-missing")
    with engine(name), pytest.raises(CheckpointError if missing else FormatError):
        read_all(path)


@pytest.mark.parametrize("path", vectors("valid"), ids=by_name)
def test_the_writer_gives_the_bytes_of_the_valid_vectors(path: Path) -> None:
    """Packed bytes, scales and digest are made again from the decoded content."""
    checkpoint, content = read_all(path)
    records = container.records_of(checkpoint, whole=False)
    for name, found in content.items():
        if isinstance(found, Ternary):
            scale = checkpoint.read(name + container.SCALE_SUFFIX)
            packed, exact = container.encode(found, exact=True)
            assert torch.equal(byte_view(packed), checkpoint.read(name))
            assert torch.equal(exact.flatten().double(), scale.double())
            assert container.digest(packed, scale) == records[name].sha256
        else:
            assert container.digest(found) == records[name].sha256
