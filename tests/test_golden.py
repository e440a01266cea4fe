"""Golden checkpoints of version 1: every later version reads them, and finds the same in them.

They are files (formats/make_golden.py), made once. Nothing here makes them again: that a newer
writer gives other bytes is no fault, that a newer reader refuses these is one.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from engines import ENGINES, engine
from make_golden import first_outputs

from ternarize.convert.verify import verify
from ternarize.files import container, metadata
from ternarize.files.checkpoint import Checkpoint, open_files
from ternarize.files.headers import DTYPES, byte_view
from ternarize.measure.report import inspect
from ternarize.sources.packed import open_packed
from ternarize.trits.int4 import unpack_int4
from ternarize.trits.planes import join_planes
from ternarize.trits.scales import scale_values

GOLDEN = Path(reference.__file__).parent / "golden"
# A golden checkpoint is a promise: this digest changes when one is added, and never otherwise.
SHA256 = "d67b23e118d05c745fa89821214b1f62a3109fb8b1796c12ec1ec3339fad398d"
TABLE: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text("utf-8"))
MODELS = sorted(TABLE["logits"])


def sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def test_no_golden_file_has_changed() -> None:
    assert sha256((GOLDEN / "golden.json").read_bytes()) == SHA256
    found = {
        path.relative_to(GOLDEN).as_posix(): sha256(path.read_bytes())
        for path in GOLDEN.rglob("*")
        if path.is_file() and path.name != "golden.json"
    }
    assert found == TABLE["files"]
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < 360_000


def test_golden_checkpoints_have_every_feature_of_the_format() -> None:
    """What is added to version 1 needs a golden checkpoint, too."""
    features: set[str] = set()
    scales: dict[str, set[str]] = defaultdict(set)
    seen: dict[str, set[Any]] = defaultdict(set)
    for name in MODELS:
        packed, records = open_packed(GOLDEN / name)
        seen["files"].add(len(packed.files) > 1)
        for tensor, record in records.items():
            if record.shape is not None:
                features |= record.features
                scales[record.codec].add(packed.tensors[tensor + metadata.SCALE_SUFFIX].dtype)
                seen["groups"].add(min(record.group_size, 1))
                seen["dims"].add(len(record.shape))
                seen["transposed"].add(record.transposed)
                ends = record.group_size > 0 and record.shape[-1] % record.group_size > 0
                seen["short groups"].add(ends)
            else:
                seen["kept"].add(packed.tensors[tensor].dtype)
    assert features == metadata.FEATURES
    assert scales["base3"] == {*metadata.SCALE_DTYPES["base3"], "U8"}
    for codec in ("int8", "int4"):
        assert scales[codec] <= set(metadata.SCALE_DTYPES[codec]) and scales[codec]
    assert seen["groups"] == {-1, 0, 1} and seen["dims"] == {2, 3}
    assert seen["files"] == seen["transposed"] == seen["short groups"] == {True, False}
    types = {info.dtype for info in open_files(GOLDEN, ["kept-types.safetensors"]).tensors.values()}
    assert types == set(reference.DTYPE_SIZES)


def digests(checkpoint: Checkpoint, *, whole: bool) -> dict[str, list[Any]]:
    """What the shipped reader finds, in the words of golden.json."""
    records = metadata.records_of(checkpoint, whole=whole)
    container.check_data(checkpoint, records, threads=1)
    found: dict[str, list[Any]] = {}
    for name, record in records.items():
        info = checkpoint.tensors[name]
        data = checkpoint.read(name).reshape(info.shape)
        kind, shape = record.kind, list(record.shape or info.shape)
        if record.kind == "ternary":
            stored = checkpoint.tensors[name + metadata.SCALE_SUFFIX].shape
            scales = checkpoint.read(name + metadata.SCALE_SUFFIX).reshape(stored)
            planes = container.decode_planes(data, scales, record)
            joined = join_planes([plane.scales for plane in planes])
            assert torch.equal(joined, scale_values(scales, torch.float64))
            data = torch.cat([plane.trits for plane in planes], -1)
            kind = "+".join(["ternary"] * record.planes)
        elif record.kind == "int4":
            data = unpack_int4(data, shape[-1], record.group_size)
        found[name] = [kind, shape, sha256(byte_view(data).numpy().data)]
    return found


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("golden", TABLE["tensors"])
def test_both_decoders_read_a_golden_checkpoint(golden: str, name: str) -> None:
    path = GOLDEN / golden
    expected = TABLE["tensors"][golden]
    with engine(name):
        if path.is_dir():
            assert digests(open_packed(path)[0], whole=True) == expected
        else:
            assert digests(open_files(GOLDEN, [golden]), whole=False) == expected
    numbers = reference.decode(path)
    assert numbers.keys() == expected.keys()
    for tensor, (kind, shape, digest) in expected.items():
        words = reference.describe("-", numbers[tensor])
        assert words.startswith(f"- {kind} {shape} ") and f" {digest} ok" in words


@pytest.mark.parametrize("golden", MODELS)
def test_a_golden_checkpoint_is_verified_described_and_run(golden: str) -> None:
    path = GOLDEN / golden
    record = json.loads((path / "ternarize.json").read_text("utf-8"))
    counts = verify(path)
    rows = inspect(path)["tensors"]
    assert len(rows) == sum(counts[kind] for kind in ("ternary", "int8", "int4", "kept"))
    assert {row["name"] for row in rows} == {
        name for name, said in record["tensors"].items() if said["becomes"] != "tied"
    }
    # sums in another order, on another machine
    assert first_outputs(path) == pytest.approx(TABLE["logits"][golden], abs=1e-4, rel=1e-4)


def test_every_type_of_a_kept_tensor_is_in_the_table() -> None:
    assert set(DTYPES) <= set(reference.DTYPE_SIZES)
