"""The shipped reader against every vector of formats/, on the compiled core and on torch.

A valid file must give what its .json says; an invalid one must be refused with FormatError, never
with another exception. The folders decide what is tested: a new vector needs no change here.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from engines import ENGINES, engine
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError
from ternarize.files import container, metadata
from ternarize.files.checkpoint import Checkpoint, open_files
from ternarize.files.headers import byte_view
from ternarize.files.metadata import Record
from ternarize.runtime.forms import Layout
from ternarize.runtime.modules.matrix import PackedMatrix
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.trits.base3 import dequantize_base3
from ternarize.trits.int4 import dequantize_int4, pack_int4, unpack_int4
from ternarize.trits.int8 import dequantize_int8, encode_int8
from ternarize.trits.planes import join_planes
from ternarize.trits.rotation import BLOCKS, rotate, signs, unrotate
from ternarize.trits.scales import scale_codes, scale_values

VECTORS = Path(reference.__file__).parent / "vectors"


def vectors(folder: str) -> list[Path]:
    return sorted(p for p in (VECTORS / folder).iterdir() if p.suffix != ".json")


def by_name(path: Path) -> str:
    return path.stem


@dataclass
class Stored:
    """A tensor as it lies in the file, and what its record says; scales None where it is kept."""

    data: Tensor
    scales: Tensor | None
    record: Record


def read_all(path: Path) -> tuple[Checkpoint, dict[str, Stored]]:
    """Read a file or a directory in full, as loading and `verify` do: {name: content}."""
    if path.is_dir():
        checkpoint = open_checkpoint(path)
    else:
        checkpoint = open_files(path.parent, [path.name])
    records = metadata.records_of(checkpoint, whole=path.is_dir())
    container.check_data(checkpoint, records, threads=1)
    content = {}
    for name, record in records.items():
        data, scales = checkpoint.read(name), None
        if record.shape is None:
            data = data.reshape(checkpoint.tensors[name].shape)
        else:
            shape, scale_shape = record.stored_shapes()
            data = data.reshape(shape)
            scales = checkpoint.read(name + metadata.SCALE_SUFFIX).reshape(scale_shape)
            container.dequantize(data, scales, record)  # refuses by itself what `check` does
        content[name] = Stored(data, scales, record)
    return checkpoint, content


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(byte_view(tensor).numpy().tobytes()).hexdigest()


def assert_is(expected: dict[str, Any], found: Stored, checkpoint: Checkpoint, name: str) -> None:
    data, scales, record = found.data, found.scales, found.record
    assert expected["kind"] == record.kind
    if scales is None:
        assert checkpoint.tensors[name].dtype == expected["dtype"]
        assert list(data.shape) == expected["shape"]
        assert byte_view(data).numpy().tobytes().hex() == expected["data"]
        return
    assert list(record.shape or ()) == expected["shape"]
    assert record.group_size == expected["group_size"]
    assert record.planes == expected.get("planes", 1)
    assert record.transposed == expected["transposed"]
    assert list(record.kernel) == expected.get("kernel", [])
    if record.kind == "int8":
        assert data.tolist() == expected["weights"]
    elif record.kind == "int4":
        integers = unpack_int4(data, expected["shape"][-1], record.group_size)
        assert integers.tolist() == expected["weights"]
    else:
        planes = container.decode_planes(data, scales, record)
        trits = torch.cat([plane.trits for plane in planes], -1)
        if "trits" in expected:
            assert trits.tolist() == expected["trits"]
        assert sha256(trits) == expected["trits_sha256"]
        values = join_planes([plane.scales for plane in planes])
        assert torch.equal(values, scale_values(scales, torch.float64))
    assert checkpoint.tensors[name + metadata.SCALE_SUFFIX].dtype == expected["scale_dtype"]
    assert list(scales.shape) == expected["scale_shape"]
    bits = scale_values(scales).flatten().view(torch.int32).tolist()
    assert [f"{value & 0xFFFFFFFF:08x}" for value in bits] == expected["scales"]
    if "rotation" not in expected:
        assert record.rotation == (0, 0)
        assert sha256(container.dequantize(data, scales, record)) == expected["dequantized_sha256"]
        assert sha256(at_run_time(found)) == expected["dequantized_sha256"]
        return
    block, seed = record.rotation
    assert expected["rotation"] == {"block": block, "seed": seed}
    rotated = container.dequantize(data, scales, replace(record, rotation=(0, 0)))
    assert sha256(rotated) == expected["rotated_sha256"]
    assert sha256(at_run_time(found)) == expected["rotated_sha256"]
    exact = np.array([int(bits, 16) for bits in expected["dequantized"]], np.uint32)
    weight = torch.from_numpy(exact.view(np.float32)).view(rotated.shape)
    blocks = torch.unflatten(rotated.double(), -1, (-1, block)).norm(dim=-1)
    allowed = 2.0**-20 * blocks.repeat_interleave(block, -1)
    for turned in (container.dequantize(data, scales, record), in_a_layer(found)):
        assert turned.dtype == torch.float32
        assert bool(((turned.double() - weight).abs() <= allowed).all())


def in_a_layer(found: Stored) -> Tensor:
    """The dense weight of a packed parameter, turned back if it is stored rotated."""
    record, scales = found.record, found.scales
    assert record.shape is not None and scales is not None
    layout = Layout(
        record.shape[-1], record.group_size, planes=record.planes, rotation=record.rotation
    )
    return PackedMatrix(found.data, scales, layout, torch.float32).dense()


def at_run_time(found: Stored) -> Tensor:
    """The dense matrix that layers multiply with, one expert at a time."""
    record, scales = found.record, found.scales
    assert record.shape is not None and scales is not None
    *stack, rows, cols = record.shape
    count = math.prod(stack)
    dense = torch.empty(count, rows, cols)
    stacks = [t.reshape(count, *t.shape[-2:]) for t in (found.data, scales)]
    for at, (data, scale) in enumerate(zip(*stacks, strict=True)):
        if record.kind == "int8":
            dense[at] = dequantize_int8(data, scale, record.group_size, torch.float32)
        elif record.kind == "int4":
            dense[at] = dequantize_int4(data, scale, cols, record.group_size, torch.float32)
        else:
            planes = {"planes": record.planes}
            dense[at] = dequantize_base3(
                data, scale, cols, record.group_size, torch.float32, **planes
            )
    return dense.view(record.shape)


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
        record = metadata.records_of(checkpoint, whole=path.is_dir())[tensor]
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
    for found in content.values():
        data, scales, record = found.data, found.scales, found.record
        if scales is None:
            assert container.digest(data) == record.sha256
        elif record.kind == "int8":
            weight = container.dequantize(data, scales, record)
            assert container.digest(data, scales) == record.sha256
            if int(data.abs().max() if data.numel() else 0) == 127 and scales.numel() == 1:
                assert torch.equal(encode_int8(weight, record.group_size, scales.dtype)[0], data)
        elif record.kind == "int4":
            assert record.shape is not None
            integers = unpack_int4(data, record.shape[-1], record.group_size)
            assert torch.equal(pack_int4(integers, record.group_size), data)
            assert container.digest(data, scales) == record.sha256
        else:
            planes = container.decode_planes(data, scales, record)
            bits = 8 if record.scale8 else 16
            packed, again = container.encode(*planes, exact=bits == 16, bits=bits)
            assert torch.equal(packed, data)
            assert torch.equal(scale_values(again), scale_values(scales))
            assert container.digest(packed, scales) == record.sha256
    stored = metadata.dump_metadata({name: found.record for name, found in content.items()})
    features = json.loads(stored[metadata.KEY])["features"]
    listed = json.loads(checkpoint.metadata[path.name][metadata.KEY])["features"]
    assert features == listed or path.stem.startswith("features-unused")


def test_every_code_of_a_scale_stands_for_the_number_of_the_vectors() -> None:
    table = json.loads((VECTORS / "scale8.json").read_text("utf-8"))
    codes = torch.tensor([row["code"] for row in table], dtype=torch.uint8)
    values = scale_values(codes)
    bits = values.view(torch.int32).tolist()
    assert [f"{value:08x}" for value in bits] == [row["value"] for row in table]
    assert torch.equal(scale_codes(values), codes)


def test_the_signs_of_a_rotation_are_those_of_the_reference() -> None:
    for seed in (0, 1, 12345, 2**32 - 1):
        for cols in (4, 300, 1024):
            assert signs(cols, seed).tolist() == reference.signs_of(cols, seed).tolist()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_rotation_is_that_of_the_reference(block: int) -> None:
    generator = torch.Generator().manual_seed(block)
    rows = torch.randn(3, 2 * block, generator=generator, dtype=torch.float64)
    for shape in ((3, 2 * block), (3, 1, 2 * block), (0, 2 * block)):
        stored = rows[: shape[0]].view(shape)
        expected = torch.from_numpy(reference.unrotate(stored.numpy(), block, 9))
        assert torch.allclose(unrotate(stored, block, 9), expected, rtol=0, atol=1e-13)
        assert torch.allclose(rotate(expected, block, 9), stored, rtol=0, atol=1e-13)
    norms = torch.unflatten(rows, -1, (-1, block)).norm(dim=-1).repeat_interleave(block, -1)
    exact = torch.from_numpy(reference.unrotate(rows.float().double().numpy(), block, 9))
    error = (unrotate(rows.float(), block, 9).double() - exact).abs()
    assert bool((error <= 2.0**-20 * norms).all())  # as the specification asks of float32
