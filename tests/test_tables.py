"""Embedding tables of any module: packed, looked up row by row, trained to be ternary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ternarize
from ternarize import qat
from ternarize.convert.verify import verify
from ternarize.errors import SelectionError, UsageError
from ternarize.files.sums import renew_sums
from ternarize.runtime.modules.embedding import PackedEmbedding
from ternarize.sources.packed import open_packed
from ternarize.trits.methods import with_scale_bits
from ternarize.trits.scales import scale_values, store_scales
from ternarize.trits.ternary import scaled

USERS, ITEMS, TAGS = 300, 700, 20
TABLES = ["users.weight", "items.weight"]


class Towers(nn.Module):
    """A small recommender: a user and what he had before, against what is on offer."""

    def __init__(self, width: int = 64, mode: str = "mean", **options: Any) -> None:
        super().__init__()
        self.users = nn.Embedding(USERS, width)
        self.items = nn.EmbeddingBag(ITEMS, width, mode=mode, **options)
        self.tags = nn.Embedding(TAGS, width)
        self.out = nn.Linear(2 * width, 8)

    def forward(self, user: Tensor, had: Tensor) -> Tensor:
        y: Tensor = self.out(torch.cat([self.users(user), self.items(had)], -1))
        return y


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(0)
    return Towers(padding_idx=0).eval()


def asked() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    had = torch.randint(0, ITEMS, (4, 6), generator=generator)
    had[:, 4:] = 0  # which is no item
    return torch.randint(0, USERS, (4,), generator=generator), had


def kinds(folder: Path) -> dict[str, str]:
    return {name: record.kind for name, record in open_packed(folder)[1].items()}


# --- packed and loaded ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(("device", "group_size"), [("cpu", None), ("meta", 32), ("meta", 0)])
def test_ternary_tables_are_those_of_the_method(
    device: str, group_size: int | None, scale_bits: int, towers: Towers, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"group_size": group_size, "scale_bits": scale_bits}
    ternarize.pack_module(towers, tmp_path / "packed", embeddings="ternary", **how)
    with torch.device(device):
        empty = Towers(padding_idx=0).eval()
    loaded = ternarize.load_module(tmp_path / "packed", empty)
    twin = Towers(padding_idx=0).eval()
    twin.load_state_dict(towers.state_dict())
    method = with_scale_bits(scale_bits)
    for name in TABLES:
        fit = method(towers.get_parameter(name), 128 if group_size is None else group_size)
        values = scale_values(store_scales(fit.scales, bits=scale_bits), torch.float64)
        twin.get_parameter(name).data = scaled(fit.trits, values, fit.group_size).float()
    torch.testing.assert_close(loaded(*asked()), twin(*asked()), rtol=1e-5, atol=1e-6)
    assert isinstance(loaded.users, PackedEmbedding) and not loaded.users.weight.requires_grad
    assert isinstance(loaded.items, nn.EmbeddingBag) and "padding_idx=0" in str(loaded.items)
    assert torch.equal(loaded.tags.weight, towers.tags.weight)  # small: kept


@torch.no_grad()
@pytest.mark.parametrize(("form", "error"), [("int8", 0.008), ("int4", 0.1)])
def test_tables_in_8_and_4_bits_are_near_the_dense_ones(
    form: str, error: float, towers: Towers, tmp_path: Path
) -> None:
    ternarize.pack_module(towers, tmp_path / "packed", embeddings=form, dtype="bfloat16")
    loaded = ternarize.load_module(tmp_path / "packed", Towers(padding_idx=0).eval())
    assert kinds(tmp_path / "packed")["users.weight"] == form
    assert loaded(*asked()).dtype == torch.bfloat16  # as what is kept: rows meet it
    rows, dense = loaded.users(torch.arange(USERS)).float(), towers.users.weight
    assert error / 2 < float((rows - dense).norm() / dense.norm()) < error


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_those_of_the_dense_table(mode: str, padding: int | None, tmp_path: Path) -> None:
    module = Towers(mode=mode, padding_idx=padding)
    ternarize.pack_module(module, tmp_path / "packed", embeddings="ternary")
    packed: Any = ternarize.load_module(tmp_path / "packed", module).items
    matrix = packed.matrix("weight", torch.float32)
    dense = nn.EmbeddingBag.from_pretrained(matrix.dense(), mode=mode, padding_idx=padding)
    pad = ITEMS - 1 if padding == -1 else padding or 5
    ids = torch.tensor([4, 4, pad, 9, ITEMS - 1, pad, 2])
    offsets = torch.tensor([0, 3, 3, 5])  # one of the bags is empty, one may hold nothing else
    torch.testing.assert_close(packed(ids, offsets), dense(ids, offsets))
    both = torch.stack([ids, ids.flip(0)]).to(torch.int32)
    torch.testing.assert_close(packed(both), dense(both))
    packed.include_last_offset = dense.include_last_offset = True
    offsets = torch.tensor([0, 3, len(ids)])
    torch.testing.assert_close(packed(ids, offsets), dense(ids, offsets))
    if mode == "sum":
        weights = torch.rand(7)
        found = packed(ids, offsets, per_sample_weights=weights)
        torch.testing.assert_close(found, dense(ids, offsets, per_sample_weights=weights))
    wrapped = nn.functional.embedding_bag(ids, matrix, offsets[:2], mode=mode, padding_idx=-2)
    plain = nn.functional.embedding_bag(ids, dense.weight, offsets[:2], mode=mode, padding_idx=-2)
    torch.testing.assert_close(wrapped, plain)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements that a tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            self.numel = max(self.numel, each.numel() if isinstance(each, Tensor) else 0)
        return made


@torch.no_grad()
@pytest.mark.parametrize("form", ["ternary", "int8", "int4"])
def test_a_look_up_makes_no_dense_table_and_memory_is_the_files(
    form: str, towers: Towers, tmp_path: Path
) -> None:
    ternarize.pack_module(towers, tmp_path / "packed", embeddings=form)
    loaded = ternarize.load_module(tmp_path / "packed", Towers(padding_idx=0))
    with Largest() as made:
        loaded(*asked())
    assert 0 < made.numel < USERS * 64 // 8
    held = sum(p.nbytes for p in loaded.parameters())
    assert held == sum(info.nbytes for info in open_packed(tmp_path / "packed")[0].tensors.values())


# --- which ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"embeddings": "int8"}, ("int8", "int8", "kept")),
        ({"embeddings": "int8", "include": ["items.*"]}, ("int8", "ternary", "kept")),
        ({"embeddings": "ternary", "keep": ["users.*"]}, ("kept", "ternary", "kept")),
        ({"embeddings": "int4", "smallest": 1}, ("int4", "int4", "int4")),
        ({"include": ["tags.weight"]}, ("kept", "kept", "ternary")),
        ({"embeddings": "keep", "include": ["tags.weight"]}, ("kept", "kept", "ternary")),
    ],
)
def test_the_option_speaks_of_large_tables_that_no_glob_names(
    options: dict[str, Any], expected: tuple[str, ...], towers: Towers, tmp_path: Path
) -> None:
    record = ternarize.pack_module(towers, tmp_path / "packed", **options)
    found = kinds(tmp_path / "packed")
    assert tuple(found[f"{name}.weight"] for name in ("users", "items", "tags")) == expected
    assert record["recipe"]["embeddings"] == options.get("embeddings", "keep")
    path = tmp_path / "packed" / "ternarize.json"
    for row in record["tensors"].values():  # what is read back is no sentence for people
        row["reason"] = "other words"
    path.write_text(json.dumps(record))
    renew_sums(tmp_path / "packed")
    (tmp_path / "source").mkdir()
    torch.save(towers.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    assert verify(tmp_path / "packed", tmp_path / "source")["compared"]["converted_again"] == 5


class Scores(nn.Module):
    """Reads one table as it lies, ties another, and clips rows of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.tied = nn.Embedding(300, 64), nn.Embedding(300, 64)
        self.clipped = nn.Embedding(300, 64, max_norm=1.0)
        self.plain = nn.Embedding(300, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.plain(ids) @ self.read.weight.T
        return y


def test_tables_that_cannot_be_packed_are_kept_with_the_reason(tmp_path: Path) -> None:
    record = ternarize.pack_module(Scores(), tmp_path / "packed", embeddings="ternary")
    reasons = {name: row["reason"] for name, row in record["tensors"].items()}
    assert reasons == {
        "read.weight": "read directly by Scores",
        "tied.weight": "shared by modules",
        "clipped.weight": "rows changed by max_norm",
        "plain.weight": "--embeddings ternary",
    }
    for include in (["read.weight"], ["clipped.weight"], ["tied.weight"]):
        with pytest.raises(SelectionError, match="asks for a ternary tensor, but it cannot be one"):
            ternarize.pack_module(Scores(), tmp_path / "other", include=include)


def test_an_option_without_a_table_is_refused(towers: Towers, tmp_path: Path) -> None:
    for options in ({"keep": ["*"]}, {"smallest": 1 << 20}):
        with pytest.raises(
            SelectionError, match="--embeddings int8: the module has no large table"
        ):
            ternarize.pack_module(towers, tmp_path / "packed", embeddings="int8", **options)
    with pytest.raises(UsageError, match="embeddings: 'int2'; expected one of keep, int8, int4"):
        ternarize.pack_module(towers, tmp_path / "packed", embeddings="int2")
    with pytest.raises(SelectionError, match="tables are packed by embeddings"):
        ternarize.pack_module(towers, tmp_path / "packed")


# --- trained -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_trained_tables_are_packed_as_the_forward_reads_them(
    scale_bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    module = Towers(padding_idx=0)
    before = module(*asked()).detach()
    qat.prepare(module, embeddings="ternary", include=["tags.weight"], scale_bits=scale_bits)
    optimizer = torch.optim.AdamW(qat.parameter_groups(module, 0.05, relative=True))
    for _ in range(3):
        module(*asked()).square().sum().backward()
        assert not bool(module.items.weight.grad[0].any())  # type: ignore[index]  # padding
        optimizer.step()
        optimizer.zero_grad()
    expected = module.eval()(*asked()).detach()
    assert float((expected - before).abs().max()) > 0.05
    ternarize.pack_module(module, tmp_path / "packed", scale_bits=scale_bits)
    loaded = ternarize.load_module(tmp_path / "packed", Towers(padding_idx=0))
    assert set(kinds(tmp_path / "packed").values()) == {"ternary", "kept"}
    torch.testing.assert_close(loaded(*asked()), expected)
    ternarize.pack_module(loaded, tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_latent_tables_of_every_kind_have_the_gradients_of_a_dense_one() -> None:
    for table in (
        nn.Embedding(300, 64, padding_idx=2),
        nn.Embedding(300, 64, scale_grad_by_freq=True),
        nn.EmbeddingBag(300, 64, mode="sum"),
        nn.EmbeddingBag(300, 64, mode="max"),
        nn.EmbeddingBag(300, 64, mode="sum", scale_grad_by_freq=True),
    ):
        kind, module = type(table), nn.ModuleDict({"table": table})
        qat.prepare(module, embeddings="ternary", estimator="ste", scale="absmean")
        ids = torch.tensor([[1, 1, 2, 299]])
        latent: Any = module["table"]
        rounded = latent.rounded("weight").detach()
        weights = torch.arange(64.0)
        (latent(ids) * weights).sum().backward()
        dense = kind.from_pretrained(rounded, freeze=False)
        options = ("mode", "padding_idx", "scale_grad_by_freq")
        dense.__dict__ |= {n: getattr(table, n) for n in options if hasattr(table, n)}
        y = dense(ids)
        torch.testing.assert_close(latent(ids), y)
        (y * weights).sum().backward()
        torch.testing.assert_close(latent.weight.grad, dense.weight.grad)
