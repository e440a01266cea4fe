"""Reading checkpoints: what is found, and what is refused before it can do harm."""

import io
import json
import os
import pickle
import socket
import struct
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError, TernarizeError, UsageError
from ternarize.files.checkpoint import open_files
from ternarize.files.headers import DTYPES, MAX_HEADER, byte_view, read_bytes, read_header
from ternarize.files.json_files import read_json, strict_json
from ternarize.sources.checkpoint import locate, open_checkpoint

INDEX = "model.safetensors.index.json"


def some_tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        "a.weight": torch.randn((5, 7), generator=random).to(torch.bfloat16),
        "b.weight": torch.randn((3, 4), generator=random),
        "steps": torch.tensor(12),
        "empty": torch.zeros((0, 4)),
    }


def file_of(header: object, data: bytes = b"", *, raw: bytes | None = None) -> bytes:
    """A safetensors file with this header, or with these bytes as header."""
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ------------------------------------------------------------------------------------------------
# Headers


def test_a_header_gives_the_tensors_in_the_order_of_their_data(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "second": entry("F16", [2, 1], 3, 7),
        "first": entry("U8", [3], 0, 3),
        "none": entry("F32", [0, 9], 3, 3),
    }
    found = read_header(write(tmp_path / "x.safetensors", file_of(header, b"1234567")))
    assert list(found.entries) == ["first", "none", "second"]
    assert found.entries["second"].dtype == "F16"
    assert found.entries["second"].shape == (2, 1)
    assert (found.entries["second"].start, found.entries["second"].nbytes) == (3, 4)
    assert found.metadata == {"format": "pt"}
    assert found.data_start == 8 + len(json.dumps(header))


def test_every_dtype_that_safetensors_writes_is_read(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        if name == "F8_E8M0":  # newer than the oldest safetensors that is supported
            continue
        data = torch.arange(2 * dtype.itemsize).remainder(2).to(torch.uint8).view(dtype)
        save_file({"x": data}, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.tensors["x"].dtype == name
        assert checkpoint.read("x").dtype == dtype
        assert torch.equal(byte_view(checkpoint.read("x")), byte_view(data))


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors", {"format": "pt"})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        write(tmp_path / "model.safetensors", whole[:length])
        with pytest.raises(FormatError, match=r"^model\.safetensors: "):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("extra", [b"\0", b" ", b"}", b"\0" * 4096])
def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path, extra: bytes) -> None:
    save_file(some_tensors(), tmp_path / "x.safetensors")
    path = write(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").read_bytes() + extra)
    promised = path.stat().st_size - len(extra)
    with pytest.raises(FormatError, match=f"expected the {promised} that the header promises"):
        read_header(path)


@pytest.mark.parametrize(
    "length", [0, 1, 13, MAX_HEADER, MAX_HEADER + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_a_header_length_that_does_not_fit_is_refused_with_its_value(
    tmp_path: Path, length: int
) -> None:
    path = write(tmp_path / "x.safetensors", struct.pack("<Q", length) + b"{}          ")
    with pytest.raises(FormatError, match=f"header's length is {length} in a file of 20 bytes"):
        read_header(path)


def test_a_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "x.safetensors", file_of({}))).entries == {}
    assert read_header(write(tmp_path / "x.safetensors", file_of(0, raw=b"{}   "))).entries == {}


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"null",
        b"  {}",
        b"{}\n",
        b"{}\0",
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b'{"\xff": 1}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"__metadata__": {"a": "\\ud800"}}',
        b'{"__metadata__": {"\\udc00": "a"}}',
        b'{"__metadata__": {"a": "1", "\\u0061": "2"}}',
        b'{"__metadata__": {}, "__metadata__": {}}',
        b'{"__metadata__": 1}',
        b'{"__metadata__": {"a": 1}}',
        b'{"__metadata__": null}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_a_header_that_is_not_one_plain_json_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(FormatError):
        read_header(write(tmp_path / "x.safetensors", file_of(0, raw=raw)))


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        "F32",
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        entry("F128", [1], 0, 4),
        entry(["F32"], [1], 0, 4),  # type: ignore[arg-type]
        entry("F32", [1.0], 0, 4),
        entry("F32", [True], 0, 4),
        entry("F32", [-1], 0, 4),
        entry("F32", [-1, -1], 0, 4),
        entry("F32", "1", 0, 4),  # type: ignore[arg-type]
        entry("F32", [1], 0, 4.0),
        entry("F32", [1], 0, None),
        entry("F32", [1], 4, 0),
        entry("F32", [1], -4, 0),
        entry("F32", [2], 0, 4),
        entry("F32", [1], 4, 8),
        entry("F32", [2**62], 0, 4),
        entry("F32", [2**32, 2**32], 0, 0),  # 2^66 bytes: 0 in 64 bits
        entry("F32", [2**32, 2**32, 0], 0, 0),
        entry("F32", [10**4000], 0, 4),
        entry("F32", [1], 0, 10**4000),
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_a_tensor_that_is_described_badly_is_refused(tmp_path: Path, fields: object) -> None:
    path = write(tmp_path / "x.safetensors", file_of({"x": fields}, bytes(4)))
    with pytest.raises(FormatError, match=r"^x\.safetensors: "):
        read_header(path)


def test_a_shape_of_a_million_large_numbers_is_refused_at_once(tmp_path: Path) -> None:
    shape = [10**9] * 300_000
    path = write(tmp_path / "x.safetensors", file_of({"x": entry("F32", shape, 0, 4)}, bytes(4)))
    with pytest.raises(FormatError, match=r"expected less than 2\^63 bytes") as caught:
        read_header(path)
    assert len(str(caught.value)) < 300


def test_a_repeated_key_among_very_many_is_named_at_once() -> None:
    keys = ",".join(f'"k{i}":1' for i in range(100_000))
    with pytest.raises(ValueError, match="repeated key 'twice'"):
        strict_json(f'{{{keys},"twice":1,"twice":2}}')


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 4), (0, 4)),  # the same bytes
        ((0, 4), (3, 7)),  # an overlap
        ((0, 4), (5, 9)),  # a hole
        ((1, 5), (5, 9)),  # a hole at the start
    ],
)
def test_tensors_that_do_not_follow_each_other_are_refused(
    tmp_path: Path, first: tuple[int, int], second: tuple[int, int]
) -> None:
    header = {"a": entry("U8", [4], *first), "b": entry("U8", [4], *second)}
    path = write(tmp_path / "x.safetensors", file_of(header, bytes(second[1])))
    with pytest.raises(FormatError, match="starts at byte"):
        read_header(path)


def test_no_single_flipped_bit_of_a_header_escapes_as_another_exception(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "x.safetensors", {"format": "pt"})
    whole = bytearray((tmp_path / "x.safetensors").read_bytes())
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for bit in range(0, 8 * head, 7):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path = write(tmp_path / "x.safetensors", bytes(flipped))
        try:
            read_header(path)
        except FormatError:
            refused += 1
    assert refused > 8 * head / 14  # the others change a name or a text


# ------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_pieces_of_a_tensor_are_its_elements_in_row_major_order(
    tmp_path: Path, suffix: str
) -> None:
    tensors = some_tensors()
    if suffix == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.nbytes) == (tensor.shape, tensor.nbytes)
        assert torch.equal(checkpoint.read(name).reshape(info.shape), tensor)
    flat = tensors["a.weight"].flatten()
    for start, stop in ((0, 35), (0, 1), (34, 35), (7, 21), (12, 12)):
        assert torch.equal(checkpoint.read("a.weight", start, stop), flat[start:stop])
    assert torch.equal(checkpoint.read("a.weight", 30), flat[30:])


def test_a_file_that_shrinks_after_it_was_opened_is_refused_and_kills_nothing(
    tmp_path: Path,
) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 300)
    with pytest.raises(FormatError, match="it ends at byte 300; expected data up to"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


def test_bytes_are_read_from_the_place_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x", bytes(range(100)))
    assert read_bytes(path, 10, 5).tolist() == [10, 11, 12, 13, 14]
    assert read_bytes(path, 100, 0).tolist() == []
    with pytest.raises(FormatError, match="^x: it ends at byte 100; expected data up to 101"):
        read_bytes(path, 99, 2)


def test_byte_view_is_row_major_whatever_the_strides() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    assert byte_view(tensor.t()).tolist() == [1, 0, 3, 0, 2, 0, 4, 0]
    assert byte_view(torch.tensor(258, dtype=torch.int16)).tolist() == [2, 1]
    assert byte_view(torch.zeros((0, 3))).tolist() == []


# ------------------------------------------------------------------------------------------------
# Directories


def sharded(directory: Path) -> dict[str, str]:
    """Two shards and a good index; returns its weight_map."""
    tensors = some_tensors()
    shards = {"one.safetensors": ["a.weight", "steps"], "two.safetensors": ["b.weight", "empty"]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    write_index(directory, weight_map)
    return weight_map


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ["one.safetensors", "two.safetensors"]
    assert {name: info.file for name, info in checkpoint.tensors.items()} == weight_map
    for name, tensor in some_tensors().items():
        assert torch.equal(checkpoint.read(name).reshape(tensor.shape), tensor)


def test_a_single_file_is_the_whole_model_and_the_index_beside_it_is_not_read(
    tmp_path: Path,
) -> None:
    sharded(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text("{")
    assert list(open_checkpoint(tmp_path).tensors) == ["x"]


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert len(open_checkpoint(tmp_path).tensors) == 4


@pytest.mark.parametrize(
    "file",
    [
        "../two.safetensors",
        "/etc/passwd",
        "sub/two.safetensors",
        "..",
        ".",
        "",
        "..\\two.safetensors",
        "C:two.safetensors",
        5,
        None,
        ["two.safetensors"],
    ],
)
def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path, file: object) -> None:
    (tmp_path / "model").mkdir()
    weight_map: dict[str, Any] = sharded(tmp_path / "model")
    save_file({"b.weight": torch.ones(1)}, tmp_path / "two.safetensors")
    weight_map["b.weight"] = file
    write_index(tmp_path / "model", weight_map)
    with pytest.raises(FormatError, match="expected a name in the same directory"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("file", ["absent.safetensors", "a" * 300, "nul\0.safetensors"])
def test_a_shard_that_is_not_there_is_named(tmp_path: Path, file: str) -> None:
    weight_map = sharded(tmp_path)
    weight_map["b.weight"] = file
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="is missing beside it") as caught:
        open_checkpoint(tmp_path)
    assert repr(file) in str(caught.value)


def test_a_tensor_that_the_index_puts_into_the_wrong_file_is_named(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    write_index(tmp_path, {**weight_map, "steps": "two.safetensors"})
    with pytest.raises(FormatError, match="steps is in two.safetensors, but it is in one.safeten"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {**weight_map, "ghost": "two.safetensors"})
    with pytest.raises(FormatError, match="ghost is in two.safetensors, but no file has it"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    del weight_map["steps"]
    write_index(tmp_path, weight_map)
    with pytest.raises(FormatError, match="does not list steps, which one.safetensors holds"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    for file in ("one.safetensors", "two.safetensors"):
        save_file({"x": torch.ones(2)}, tmp_path / file)
    with pytest.raises(FormatError, match=r"^two\.safetensors: x is also in one\.safetensors"):
        open_files(tmp_path, ["one.safetensors", "two.safetensors"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "{}",
        '{"weight_map": 1}',
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
    ],
)
def test_an_index_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError, match=rf"^{INDEX}: "):
        open_checkpoint(tmp_path)


def test_a_directory_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights; expected model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no weights but model.gguf; expected"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path, need_weights=False)
    assert checkpoint.tensors == {}
    assert checkpoint.config == {"model_type": "llama"}


def test_a_directory_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", write(tmp_path / "file", b"")):
        with pytest.raises(CheckpointError, match="no such directory"):
            open_checkpoint(path)


def test_config_json_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Mamba-2 checkpoints have Infinity in it, which is no JSON."""
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "twice": 1, "twice": 2}')
    assert read_json(path) == {"time_step_limit": [0.0, float("inf")], "twice": 2}
    with pytest.raises(FormatError):
        read_json(path, strict=True)
    for text in ("{", "[1]", "", "\ufeff{}"):
        path.write_text(text, "utf-8")
        with pytest.raises(FormatError, match=r"^config\.json: "):
            read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FormatError, match=r"^config\.json: not valid JSON"):
        read_json(path)
    assert read_json(tmp_path / "absent.json") is None


# ------------------------------------------------------------------------------------------------
# Pickles


class Exploit:
    """Unpickled by pickle.load, this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_the_code_is_not_run(
    tmp_path: Path, zipped: bool
) -> None:
    proof = tmp_path / "proof"
    torch.save(
        {"a": torch.ones(2), "b": Exploit(proof)},
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(FormatError, match="torch cannot load it as weights only") as caught:
        open_checkpoint(tmp_path)
    assert not proof.exists()
    assert "\n" not in str(caught.value)
    # the same file does run code where a program asks for that: the test would see it
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert proof.exists()


def test_files_from_before_torch_1_6_are_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name).reshape(tensor.shape), tensor)


def test_tensors_that_share_storage_or_have_strides_are_read_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "tail": base[12:],
        "same": base,
        "turned": base.reshape(4, 6).t(),
        "every_other": base[::2],
        "row": base.reshape(4, 6)[1],
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tensor.shape
        assert checkpoint.read(name).tolist() == tensor.flatten().tolist()
    assert checkpoint.read("turned", 3, 6).tolist() == [18.0, 1.0, 7.0]


def test_parameters_are_read_as_plain_values(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(keep_vars=True), tmp_path / "pytorch_model.bin")
    piece = open_checkpoint(tmp_path).read("weight")
    assert not piece.requires_grad
    assert piece.shape == (6,)


def test_sharded_pickles_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "two.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 1]
    assert checkpoint.read("b").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "table",
    [
        {"state_dict": {"a": torch.ones(2)}, "epoch": 3},
        {"a": torch.ones(2), "step": 5},
        [torch.ones(2)],
        torch.ones(2),
        {1: torch.ones(2)},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex128)},
        {"a": torch.empty(2, device="meta")},
    ],
    ids=["training state", "number", "list", "tensor", "name", "sparse", "complex", "meta"],
)
def test_a_pickle_that_is_no_table_of_tensors_is_refused(tmp_path: Path, table: object) -> None:
    torch.save(table, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"^pytorch_model\.bin: .*expected a table of tensors"):
        open_checkpoint(tmp_path)


def test_a_pickle_that_is_cut_or_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(some_tensors(), path)
    whole = path.read_bytes()
    lengths = [0, 1, 30, len(whole) // 2, len(whole) - 1]
    stream = io.BytesIO()
    pickle.dump({"a": 1}, stream)
    for data in [*(whole[:n] for n in lengths), b"hello", stream.getvalue(), bytes(5000)]:
        write(path, data)
        with pytest.raises(FormatError, match=r"^pytorch_model\.bin: "):
            open_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------
# Where a checkpoint is


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with HF_HUB_OFFLINE=1, an empty cache, and no way to open a connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)


@pytest.mark.usefixtures("offline")
def test_a_directory_is_its_own_place_and_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "name").mkdir()
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path / "user")) == tmp_path / "user"
    monkeypatch.chdir(tmp_path)
    assert locate("user/name") == Path("user/name")  # before the Hub is asked
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/user") == tmp_path / "user"


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", b"")
    with pytest.raises(CheckpointError, match="is a file; expected a checkpoint directory"):
        locate(path)


@pytest.mark.parametrize(
    "model",
    [
        "./absent",
        "../absent",
        "/absent/model",
        "~nobody-here/model",
        "a/b/c",
        "https://huggingface.co/a/b",
        "a b",
        "",
        "a" * 300 + "/",
        "nul\0",
    ],
)
@pytest.mark.usefixtures("offline")
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TernarizeError):
        locate(model)


@pytest.mark.parametrize("model", ["user/absent", "absent", "user/absent@main", "a" * 300, "-/-"])
@pytest.mark.usefixtures("offline")
def test_a_hub_id_that_is_not_in_the_cache_fails_offline_in_one_line(model: str) -> None:
    with pytest.raises(CheckpointError, match="not in the cache|expected user/name") as caught:
        locate(model)
    assert "\n" not in str(caught.value)


def test_a_revision_is_named_once() -> None:
    with pytest.raises(UsageError, match="Name one"):
        locate("user/name@v1", revision="v2")


@pytest.mark.usefixtures("offline")
def test_a_hub_id_in_the_cache_is_found_offline(tmp_path: Path) -> None:
    repo = tmp_path / "cache" / "models--user--name"
    commit = "0123456789" * 4
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    save_file({"x": torch.ones(2)}, snapshot / "model.safetensors")
    found = locate("user/name")
    assert found == snapshot
    assert load_file(found / "model.safetensors")["x"].tolist() == [1, 1]
    assert list(open_checkpoint(found).tensors) == ["x"]
