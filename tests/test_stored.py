"""What the core reads, hashes and lays out in one pass is what hashlib and torch make of it."""

import gc
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaigns.hostile_files import golden
from engines import engine
from safetensors.torch import save_file
from torch import Tensor

import ternarize
from ternarize.errors import DigestError, FormatError
from ternarize.files import container, metadata, stored
from ternarize.files.checkpoint import open_files
from ternarize.files.metadata import Record, dump_metadata
from ternarize.files.stored import Reading, ToRead, core_reads
from ternarize.native import lib
from ternarize.runtime import kernels, straight
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.trits.base3 import pack, packed_width
from ternarize.trits.ternary import group_count

if lib is None:
    pytest.skip("without the compiled core", allow_module_level=True)
if not lib.can_read_stored():
    reason = "the core reads no files here: the processor has no SHA-256, or this is Windows"
    pytest.skip(reason, allow_module_level=True)

WEIGHTS = "model.safetensors"
SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)


def put(folder: Path, name: str) -> Path:
    folder.mkdir()
    for file, data in golden(name).items():
        assert isinstance(data, bytes)
        (folder / file).write_bytes(data)
    return folder


def write(folder: Path, tensors: dict[str, Tensor], records: dict[str, Record]) -> Any:
    """A packed file with these tensors, opened."""
    save_file(tensors, folder / WEIGHTS, dump_metadata(records))
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)


def matrix(rows: int, cols: int, group_size: int, dtype: torch.dtype, seed: int) -> Any:
    """Trits, their stored bytes, and scales that are 0 where a group is."""
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (rows, cols), generator=generator, dtype=torch.int8)
    trits[0, : min(cols, 128)] = 0
    packed = pack(trits, group_size)
    used = container._nonzero_groups(packed, Record("", (rows, cols), group_size))
    scale_rows = 1 if group_size == 0 else rows
    scales = torch.rand(scale_rows, group_count(cols, group_size), generator=generator) + 0.5
    used = used.any(0, keepdim=True) if group_size == 0 else used
    codes = (8 + (scales * 100).to(torch.int64) % 240).to(torch.uint8)
    scales = (codes if dtype == torch.uint8 else scales.to(dtype)) * used
    return trits, packed, scales.to(dtype)


def test_digests_are_those_of_hashlib(tmp_path: Path) -> None:
    sizes = [1, 2, *range(54, 67), 119, 120, 127, 128, 129, 4096, (1 << 18) - 1, (1 << 18) + 65]
    rest = random.Random(0)
    tensors = {
        str(n): torch.frombuffer(bytearray(rest.randbytes(n)), dtype=torch.uint8) for n in sizes
    }
    records = {
        n: Record(hashlib.sha256(t.numpy().tobytes()).hexdigest()) for n, t in tensors.items()
    }
    checkpoint = write(tmp_path, tensors, records)
    outs = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    with Reading(
        checkpoint, [ToRead(n, records[n], outs[n]) for n in records], threads=3
    ) as reading:
        assert all(reading.is_good(at) for at in range(len(records)))
    for name, tensor in tensors.items():
        assert torch.equal(outs[name], tensor), name


@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("form", ["lanes2", "lanes3"])
def test_lanes_and_their_scales_are_those_of_torch(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    for number, (rows, cols, group_size) in enumerate(
        [(1, 1, -1), (3, 130, 128), (64, 256, 128), (81, 391, 64), (700, 640, 0), (17, 23, 5)]
    ):
        trits, packed, scales = matrix(rows, cols, group_size, dtype, number)
        record = Record(container.digest(packed, scales), (rows, cols), group_size)
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint = write(folder, {"w": packed, "w_scale": scales}, {"w": record})
        size, blocks, block = kernels.lanes_shape(form, rows, cols, group_size)
        wide = dtype in (torch.bfloat16, torch.float32)
        out = torch.full((size,), 255, dtype=torch.uint8)
        kind = torch.float32 if wide else torch.float16
        beside = torch.full((blocks * block * scales.shape[1],), 7, dtype=kind)
        with Reading(checkpoint, [ToRead("w", record, out, form, beside)]) as reading:
            assert reading.is_good(0)
        assert torch.equal(kernels.trits_of_lanes(out, rows, cols, group_size, form), trits)
        assert torch.equal(out, kernels.to_lanes(packed, cols, group_size, form))
        assert torch.equal(beside, kernels.scale_lanes(scales, rows, form))


@pytest.mark.parametrize(
    "name", ["rows", "groups", "planes-scale8", "scale-types", "experts", "coded"]
)
def test_a_model_is_the_same_by_either_way(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "model", name)
    near = ternarize.load(folder)
    monkeypatch.setattr(straight, "can_go_straight", lambda device_map: False)
    far = ternarize.load(folder)
    mine, others = dict(near.named_parameters()), dict(far.named_parameters())
    assert mine.keys() == others.keys()
    for key, parameter in mine.items():
        other = others[key]
        assert (parameter.dtype, parameter.shape) == (other.dtype, other.shape), key
        assert torch.equal(parameter, other), key
        assert parameter.requires_grad == other.requires_grad and type(parameter) is type(other)
    tokens = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(near(input_ids=tokens).logits, far(input_ids=tokens).logits)
    saved = near.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in far.state_dict().items())


@pytest.mark.parametrize("name", ["rows", "experts", "coded", "int4", "planes-scale8"])
def test_what_is_read_whole_is_what_the_file_holds(tmp_path: Path, name: str) -> None:
    packed = open_checkpoint(put(tmp_path / "model", name))
    records = metadata.records_of(packed)
    values = container.read_whole(packed, records)
    assert values.keys() == packed.tensors.keys()
    for key, info in packed.tensors.items():
        assert values[key].shape == info.shape
        assert torch.equal(values[key].flatten(), packed.read(key)), key


def test_linear_layers_and_what_is_kept_go_straight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = put(tmp_path / "model", "groups"), list[Any]()

    def refused(*args: Any) -> None:
        read.append(args)
        pytest.fail()

    monkeypatch.setattr("ternarize.files.unmapped.read_bytes", refused)
    model = ternarize.load(folder)
    assert not read
    layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
    assert layers and all(m.layouts["weight"].lanes is not None for m in layers)


def damages() -> dict[str, Callable[[bytearray, int, int], None]]:
    """Changes of the bytes of a matrix (from, size) and of the float16 scales right behind it."""

    def byte(value: int, data: bytearray, start: int, size: int) -> None:
        data[start + size // 2] = value

    def scale(value: bytes, data: bytearray, start: int, size: int) -> None:
        data[start : start + 2] = value

    return {
        "code": partial(byte, 250),
        "digest": lambda data, start, size: byte(data[start + size // 2] ^ 1, data, start, size),
        "infinite": partial(scale, b"\x00\x7c"),
        "negative": partial(scale, b"\x00\xbc"),
        "zero": partial(scale, b"\x00\x00"),
    }


@pytest.mark.parametrize("how", damages())
@pytest.mark.parametrize("checked", [True, False])
def test_what_is_damaged_is_refused_in_the_same_words(
    tmp_path: Path, how: str, checked: bool
) -> None:
    folder = put(tmp_path / "model", "rows")
    packed = metadata.records_of(open_checkpoint(folder))
    name = next(name for name, record in packed.items() if record.shape is not None)
    scaled = how in ("infinite", "negative", "zero")
    info = open_checkpoint(folder).tensors[name + "_scale" if scaled else name]
    data = bytearray((folder / WEIGHTS).read_bytes())
    damages()[how](data, info.start, info.nbytes)
    (folder / WEIGHTS).write_bytes(bytes(data))
    if not checked and how != "code":
        ternarize.load(folder, verify=False)
        return
    with pytest.raises(FormatError) as raised:
        ternarize.load(folder, verify=checked)
    checkpoint = open_checkpoint(folder)
    with engine("torch"), pytest.raises(FormatError) as expected:
        container.check_data(checkpoint, metadata.records_of(checkpoint))
    assert str(raised.value) == str(expected.value)
    assert isinstance(raised.value, DigestError) == (how == "digest")
    with pytest.raises(FormatError) as native:
        container.check_data(checkpoint, metadata.records_of(checkpoint))
    assert str(native.value) == str(expected.value)


def test_a_file_that_ends_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "model", "rows")
    checkpoint = open_checkpoint(folder)
    records = metadata.records_of(checkpoint)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="it ends at byte"):
        container.check_data(checkpoint, records)
    shutil.rmtree(folder)
    with pytest.raises(ternarize.TernarizeError):
        container.check_data(checkpoint, records)


def test_what_has_not_begun_can_be_left_out(tmp_path: Path) -> None:
    rows, cols = 64, 640
    packed = torch.full((rows, packed_width(cols, 128)), 121, dtype=torch.uint8)
    scales = torch.zeros(rows, group_count(cols, 128), dtype=torch.float16)
    record = Record(container.digest(packed, scales), (rows, cols), 128)
    names = [f"w{i}" for i in range(8)]
    tensors = {name: packed.clone() for name in names} | {
        f"{n}_scale": scales.clone() for n in names
    }
    checkpoint = write(tmp_path, tensors, dict.fromkeys(names, record))
    reading = Reading(checkpoint, [ToRead(name, record) for name in names], threads=1)
    reading.stop()
    reading.start()
    assert not any(reading.is_good(at) for at in range(len(names)))


def test_what_the_core_does_not_read_is_left_to_python(tmp_path: Path) -> None:
    assert lib is not None
    folder = put(tmp_path / "model", "int4")
    checkpoint = open_checkpoint(folder)
    records = metadata.records_of(checkpoint)
    kinds = {
        record.codec for name, record in records.items() if not core_reads(checkpoint, name, record)
    }
    assert kinds == {"int4"}
    with engine("torch"):
        assert not any(core_reads(checkpoint, name, record) for name, record in records.items())
    assert vars(stored)["lib"] is lib


def test_wrong_tables_are_refused() -> None:
    assert lib is not None
    states, digests, stop = (
        np.zeros(1, np.uint8),
        np.zeros((1, 32), np.uint8),
        np.zeros(1, np.uint8),
    )
    files = [os.fsencode(os.devnull)]
    good = [0, 8, 26, 1, 1, 128, 128, 0, 0, 0, 0, 40, 2, 0, 0, 0, 0]
    wrong = [
        (0, -1),
        (0, 1),
        (10, -1),
        (10, 1),
        (1, -1),
        (2, 27),
        (3, 4),
        (4, 2),
        (5, 0),
        (6, -2),
        (12, 3),
        (13, 4),
    ]
    for column, value in wrong:
        table = np.array([good[:column] + [value] + good[column + 1 :]], np.int64)
        with pytest.raises(ValueError, match=r"tensors|cols|group_size"):
            lib.read_stored(files, table, True, states, digests, stop, 1)
    table = np.array([[*good[:3], 2, *good[4:]]], np.int64)  # lanes without memory
    with pytest.raises(ValueError, match="out: 0 elements"):
        lib.read_stored(files, table, True, states, digests, stop, 1)


def hollow(folder: Path, sizes: dict[str, int]) -> None:
    """A packed file of zeros, in megabytes, that takes no room; all digests are wrong."""
    records = dict.fromkeys(sizes, Record("1" * 64))
    header: dict[str, Any] = {"__metadata__": dump_metadata(records)}
    at = 0
    for name, size in sizes.items():
        end = at + (size << 20)
        header[name] = {"dtype": "U8", "shape": [end - at], "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    quantization = {"quant_method": "ternarize", "format_version": 1}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def test_a_program_that_refuses_a_file_ends_in_order(tmp_path: Path) -> None:
    hollow(tmp_path, {"a0": 1} | {f"b{i:02}": 64 for i in range(40)})
    command = [sys.executable, "-m", "ternarize", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "a0: its bytes have changed" in done.stderr and "terminate" not in done.stderr


def test_a_program_that_forgets_a_reading_ends_in_order(tmp_path: Path) -> None:
    hollow(tmp_path, {f"b{i}": 2048 for i in range(4)})
    program = """
import sys
from pathlib import Path
from ternarize.files.checkpoint import open_files
from ternarize.files.metadata import records_of
from ternarize.files.stored import Reading, ToRead
packed = open_files(Path(sys.argv[1]), ["model.safetensors"])
records = records_of(packed)
reading = Reading(packed, [ToRead(name, record) for name, record in records.items()])
reading.start()
assert reading._thread.is_alive()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_end_of_a_reading_does_not_wait_for_large_tensors(tmp_path: Path) -> None:
    hollow(tmp_path, {"a": 1 << 15})
    packed = open_files(tmp_path, [WEIGHTS])
    wanted = [ToRead("a", metadata.records_of(packed)["a"])]
    with pytest.raises(KeyError), Reading(packed, wanted) as reading:
        time.sleep(0.05)
        raise KeyError
    assert reading._thread is not None and not reading._thread.is_alive()
    assert reading._states[0] == 5 and not reading.is_good(0)
    dropped = Reading(packed, wanted)
    dropped.start()
    thread = dropped._thread
    del dropped
    gc.collect()
    assert thread is not None and not thread.is_alive()


@pytest.mark.parametrize("by", ["load", "transformers"])
def test_a_load_that_fails_leaves_nothing_behind(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from transformers import modeling_utils

    folder = put(tmp_path / "model", "rows")
    readings: list[weakref.ref[Reading]] = []
    threads, start = list[threading.Thread | None](), Reading.start

    def begin(self: Reading) -> None:
        start(self)
        readings.append(weakref.ref(self))
        threads.append(self._thread)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reading, "start", begin)
    monkeypatch.setattr(modeling_utils, "convert_and_load_state_dict_in_model", interrupted)
    load = ternarize.load if by == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(KeyboardInterrupt) as raised:
        load(folder)
    held = readings[-1]()  # by what was raised
    if by == "load":
        assert held is None or held._stop[0] == 1
    del held, raised
    gc.collect()
    assert readings[-1]() is None
    assert threads[-1] is not None and not threads[-1].is_alive()


def test_a_file_that_changes_while_the_core_reads_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "model", "rows")
    packed = open_files(folder, [WEIGHTS])
    records = metadata.records_of(packed)
    info = packed.tensors[next(name for name, record in records.items() if record.shape)]
    changed, run, good = threading.Event(), lib_read(), Reading.is_good

    def slow(*args: Any) -> bool:
        changed.wait(60)
        return bool(run(*args))

    def change(self: Reading, at: int) -> bool:
        if not changed.is_set():
            data = bytearray((folder / WEIGHTS).read_bytes())
            data[info.start : info.start + info.nbytes] = bytes([121]) * info.nbytes
            (folder / WEIGHTS).write_bytes(bytes(data))
            changed.set()
        return good(self, at)

    monkeypatch.setattr(stored, "lib", Core(slow))
    monkeypatch.setattr(Reading, "is_good", change)
    monkeypatch.setattr(  # what transformers is given of it does not matter here
        Reading, "take", lambda self, at, which="out": self._memory[at, which]
    )
    with pytest.raises(FormatError, match="changed while it was loaded"):
        ternarize.load(folder, verify=False)
    assert changed.is_set()


def lib_read() -> Any:
    assert lib is not None
    return lib.read_stored


class Core:
    """The compiled core, which reads by another function."""

    def __init__(self, read_stored: Callable[..., bool]) -> None:
        self.read_stored = read_stored

    def can_read_stored(self) -> bool:
        return True


def test_what_ends_the_core_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "model", "rows")
    packed = open_checkpoint(folder)
    records = metadata.records_of(packed)

    def read(*args: Any) -> bool:
        raise ValueError("no such form")

    monkeypatch.setattr(stored, "lib", Core(read))
    with pytest.raises(ValueError, match="no such form"):
        container.check_data(packed, records)


def test_what_is_too_large_for_the_core_is_left_to_python(tmp_path: Path) -> None:
    packed = open_checkpoint(put(tmp_path / "model", "rows"))
    name, record = next((n, r) for n, r in metadata.records_of(packed).items() if r.shape is None)
    info = packed.tensors[name]
    assert core_reads(packed, name, record)
    packed.tensors[name] = replace(info, shape=(1 << 50, *info.shape))
    assert not core_reads(packed, name, record)


def test_more_files_than_may_be_open_are_read(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    value = torch.zeros(4)
    record = Record(container.digest(value))
    files = [f"model-{i:05}-of-00080.safetensors" for i in range(80)]
    for i, file in enumerate(files):
        save_file({f"t{i}": value}, tmp_path / file, dump_metadata({f"t{i}": record}))
    packed = open_files(tmp_path, files)
    records = metadata.records_of(packed)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:  # the first number that is free
        few = lowest.fileno() + 20
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        container.check_data(packed, records)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
