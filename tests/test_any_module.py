"""A module of torch's that is none of transformers': packed, and loaded into one that is built."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ternarize
from ternarize import qat
from ternarize.convert.verify import verify
from ternarize.errors import FormatError, OutputError, SelectionError, UsageError, WeightError
from ternarize.measure.report import inspect
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.sources.packed import open_packed
from ternarize.trits.methods import itf
from ternarize.trits.scales import scale_values, store_scales
from ternarize.trits.ternary import scaled

NAMES = ["blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.up.weight", "blocks.1.down.weight"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Net(nn.Module):
    """A small image model: a convolution, blocks, a head, buffers; its embedding is tied."""

    mask: Tensor

    def __init__(self, width: int = 96, *, persistent: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.words = nn.Embedding(8, width)
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("mask", torch.full((2,), -torch.inf), persistent=persistent)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x.mean(1))
        return y


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def packed(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net") / "packed"
    ternarize.pack_module(net, folder, group_size=32)
    return folder


def dense_twin(net: Net, group_size: int) -> Net:
    """The module with the weights that a packed one stands for, by the definition of `itf`."""
    twin = Net().eval()
    twin.load_state_dict(net.state_dict())
    for name in NAMES:
        fit = itf(net.state_dict()[name], group_size)
        values = scale_values(store_scales(fit.scales), torch.float64)
        twin.get_parameter(name).data = scaled(fit.trits, values, group_size).float()
    return twin


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_is_packed_and_loaded_into_one_that_is_built(
    device: str, net: Net, packed: Path
) -> None:
    with torch.device(device):
        empty = Net().eval()
    loaded = ternarize.load_module(packed, empty)
    assert loaded is empty
    x = torch.randn(2, 3, 16, 16)
    expected = dense_twin(net, 32)(x)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, net(x), rtol=1e-2)  # which the packed one is not
    assert [n for n, m in loaded.named_modules() if isinstance(m, TernaryLinear)] == [
        name.removesuffix(".weight") for name in NAMES
    ]
    kept = {n for n in net.state_dict() if n not in NAMES}
    assert all(torch.equal(loaded.state_dict()[n], net.state_dict()[n]) for n in kept)
    assert loaded.head.weight is loaded.words.weight and loaded.head.weight.requires_grad


def test_a_module_can_be_packed_by_frequencies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide, x = nn.Sequential(nn.Linear(512, 512)).eval(), torch.randn(3, 512)
    found = []
    for codec in ("base3", "rans"):
        record = ternarize.pack_module(wide, tmp_path / codec, codec=codec)
        empty = nn.Sequential(nn.Linear(512, 512)).eval()
        with torch.no_grad():
            loaded = ternarize.load_module(tmp_path / codec, empty)
            found.append((loaded(x), record["tensors"]["0.weight"]["stored_bytes"]))
    assert torch.equal(found[0][0], found[1][0]) and found[1][1] < found[0][1]


def test_a_packed_module_is_inspected_and_verified(net: Net, packed: Path, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in inspect(packed)["tensors"]}
    assert [name for name, row in rows.items() if row["kind"] == "ternary"] == sorted(NAMES)
    reasons = {name: row["reason"] for name, row in rows.items() if row["kind"] == "kept"}
    assert reasons["stem.0.weight"] == "weight of a Conv2d"
    assert reasons["words.weight"] == "shared by modules"
    assert "head.weight" not in rows  # stored once
    found = verify(packed)
    assert found["ternary"] == 4 and found["listed"] == 3
    (tmp_path / "source").mkdir()
    state = {name: value for name, value in net.state_dict().items() if name != "head.weight"}
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    assert verify(packed, tmp_path / "source")["compared"]["converted_again"] == len(state)
    state["blocks.0.up.weight"] = state["blocks.0.up.weight"] + 0.1
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"blocks\.0\.up\.weight: is not what .* gives"):
        verify(packed, tmp_path / "source")


def ternary(folder: Path) -> list[str]:
    return [name for name, record in open_packed(folder)[1].items() if record.kind == "ternary"]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, NAMES),
        ({"keep": ["*.down.weight"]}, [NAMES[0], NAMES[2]]),
        ({"smallest": 20_000, "include": ["blocks.1.down.*"]}, [NAMES[3]]),
    ],
)
def test_globs_and_sizes_say_which_layers_are_packed(
    options: dict[str, Any], chosen: list[str], net: Net, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"method": "twn", "group_size": -1, "scale_bits": 8, "dtype": "bfloat16"}
    record = ternarize.pack_module(net, tmp_path / "packed", **how, **options)
    assert sorted(ternary(tmp_path / "packed")) == sorted(chosen)
    assert record["recipe"]["method"] == "twn" and record["recipe"]["scale_bits"] == 8
    tensors = open_packed(tmp_path / "packed")[0].tensors
    assert tensors["words.weight"].dtype == "BF16"
    assert tensors[f"{chosen[0]}_scale"].dtype == "U8"


class Reader(nn.Module):
    """Code that takes a weight as it lies; and layers of torch's that do."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(160, 160), nn.Linear(160, 160)
        self.encoder = nn.TransformerEncoderLayer(160, 2, 160)
        self.attention = nn.MultiheadAttention(160, 2)
        self.twice = nn.ModuleList([self.called])  # one module in two places

    def forward(self, x: Tensor) -> Tensor:
        return self.twice[0](F.linear(x, self.read.weight))  # type: ignore[no-any-return]


@torch.no_grad()
def test_weights_that_other_code_reads_are_kept(tmp_path: Path) -> None:
    record = ternarize.pack_module(Reader(), tmp_path / "packed")
    reasons = {name: row["reason"] for name, row in record["tensors"].items()}
    assert ternary(tmp_path / "packed") == ["called.weight"]
    assert reasons["read.weight"] == "read directly by Reader"
    assert reasons["encoder.linear1.weight"] == "read directly by TransformerEncoderLayer"
    assert reasons["attention.out_proj.weight"] == "read directly by MultiheadAttention"
    loaded = ternarize.load_module(tmp_path / "packed", Reader())
    assert isinstance(loaded.called, TernaryLinear) and loaded.twice[0] is loaded.called


@torch.no_grad()
def test_a_loaded_module_is_saved_again(net: Net, packed: Path, tmp_path: Path) -> None:
    loaded = ternarize.load_module(packed, Net())
    torch.save(loaded.state_dict(), tmp_path / "state.pt")
    with torch.device("meta"):
        other = Net()
    ternarize.load_module(packed, other, verify=False)
    for parameter in (*other.stem.parameters(), *other.head.parameters()):
        parameter.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(other.eval()(x), loaded.eval()(x))
    ternarize.pack_module(other, tmp_path / "again")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (packed / file).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("scale_bits", [16, 8])
def test_a_trained_module_is_packed_as_its_forward_is(scale_bits: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = Net().eval()
    qat.prepare(net, group_size=32, activations="int8", scale_bits=scale_bits, keep=["*.down.*"])
    x = torch.randn(2, 3, 16, 16)
    expected = net(x)
    ternarize.pack_module(net, tmp_path / "packed", scale_bits=scale_bits)
    assert ternary(tmp_path / "packed") == [NAMES[0], NAMES[2]]
    loaded = ternarize.load_module(tmp_path / "packed", Net().eval())
    assert loaded.get_submodule("blocks.0.up").activations == "int8"
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    plain = ternarize.load_module(tmp_path / "packed", Net().eval(), activations="none")
    assert plain.get_submodule("blocks.0.up").activations == "none"
    assert not torch.allclose(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(net: Net, tmp_path: Path) -> None:
    output = tmp_path / "packed"

    def refused(error: type[Exception], match: str, module: nn.Module, **options: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            ternarize.pack_module(module, output, **options)
        assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []

    refused(SelectionError, "Net: none of its 19 tensors becomes ternary", net, keep=["blocks.*"])
    refused(SelectionError, r"--keep 'block\.\*': matches no tensor", net, keep=["block.*"])
    refused(
        SelectionError, "cannot be one: weight of a BatchNorm2d", net, include=["stem.1.weight"]
    )
    refused(SelectionError, "none of its 2 tensors", nn.Linear(200, 200))
    with torch.device("meta"):
        refused(UsageError, "is on meta", Net())
    bad = Net()
    bad.get_parameter("blocks.1.up.weight").data[3, 5] = torch.nan
    refused(WeightError, r"blocks\.1\.up\.weight: 1 of 18432 .* first NaN at \[3, 5\]", bad)

    class Remembering(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 1}

    refused(UsageError, "is a dict in the state dict", nn.Sequential(Remembering(200, 200)))
    output.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        ternarize.pack_module(net, output)


def test_a_module_that_does_not_fit_is_refused_and_stays_as_it_was(
    packed: Path, tmp_path: Path
) -> None:
    def refused(match: str, module: nn.Module) -> None:
        before = dict(module.named_modules())
        with pytest.raises((FormatError, UsageError), match=match) as caught:
            ternarize.load_module(packed, module)
        assert "\n" not in str(caught.value) and dict(module.named_modules()) == before

    refused(r"is \[96, 3, 4, 4\]; in Net it is \[64, 3, 4, 4\]", Net(64))
    shorter = Net()
    del shorter.blocks[1]
    refused(r"holds blocks\.1\.\S+, .* which Net does not have", shorter)
    longer = Net()
    longer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    refused("lacks scale, which Net needs", longer)
    untied = Net()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    refused(r"lacks head\.weight", untied)
    other = Net()
    other.set_submodule("blocks.0.up", nn.Conv1d(192, 192, 1))
    other.get_submodule("blocks.0.up").weight = nn.Parameter(torch.empty(192, 96))
    refused(r"blocks\.0\.up\.weight: is packed, and in Net it is of a Conv1d", other)


def test_a_buffer_that_is_stored_nowhere_has_to_be_there(net: Net, tmp_path: Path) -> None:
    ternarize.pack_module(Net(persistent=False), tmp_path / "packed")
    with torch.device("meta"):
        empty = Net(persistent=False)
    with pytest.raises(UsageError, match="mask: is a buffer of Net on meta"):
        ternarize.load_module(tmp_path / "packed", empty)
    empty.mask = torch.zeros(2)
    assert not ternarize.load_module(tmp_path / "packed", empty).head.weight.is_meta


def test_damage_and_the_wrong_loader_are_told(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds a module 'Net'.*ternarize\.load_module"):
        ternarize.load(packed)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in packed.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.safetensors: "):
        ternarize.load_module(copy, Net())
    assert json.loads((packed / "config.json").read_text())["module"] == "Net"
