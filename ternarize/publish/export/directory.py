"""A checkpoint in the layout of the Hub, written: what the targets that make one have in common.

A tensor keeps its name, its companions stand beside it, config.json says how to read it, and the
small files (tokenizer and so on) are copied. In the modules of the targets t are the trits and s
their scales.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ternarize.errors import CheckpointError, UsageError, WeightError
from ternarize.files.container import as_source
from ternarize.files.headers import DTYPE_NAMES, DTYPES, byte_view, file_head, lay_out
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.files.outputs import fresh_output
from ternarize.models.configuration import config_dtype
from ternarize.models.places import locate_tensors
from ternarize.plans.copied import small_files
from ternarize.progress import Progress
from ternarize.publish.export.common import Losses, PackedCheckpoint, model_config, unheld
from ternarize.publish.hub import SHIM

SHARD = 5 * 10**9  # bytes of a file, as save_pretrained has it


@dataclass(frozen=True)
class DirectoryItem:
    """A tensor of the output, and how to make it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


# the tensors, and what config.json says otherwise than the packed one
Contents = tuple[list[DirectoryItem], dict[str, Any]]


def export_directory(
    contents: Callable[..., Contents],
    to: str,
    packed: PackedCheckpoint,
    output: Path,
    *,
    allow_requantize: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write what a target's function says; its `options` are handed on.

    contents  raises CheckpointError where something would be lost and the user has not allowed it

    Returns {"to", "tensors": how many were written} and `Losses.report`.
    """
    losses = Losses(to, allow_requantize)
    items, config = contents(packed, losses, **options)
    with fresh_output(packed.directory, output, folder=True) as partial:
        _write_weights(partial, items, progress)
        table = {**_plain_config(packed), **config}
        (partial / "config.json").write_text(json.dumps(table, indent=2) + "\n")
        for name in small_files(packed.directory, packed.checkpoint.files)[0]:
            if name not in (RECORD, SHIM):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(packed.directory / name, partial / name)
    return {"to": to, "tensors": len(items), **losses.report()}


def activations_of(packed: PackedCheckpoint) -> str:
    quantization = packed.config["quantization_config"]
    return str(quantization.get("activations") or "none")


def refuse_activations(packed: PackedCheckpoint, losses: Losses) -> None:
    if activations_of(packed) != "none":
        losses.general.append(f"activations in {activations_of(packed)}")


def advice(losses: Losses, target: torch.dtype, otherwise: str) -> str:
    """What to do where the dtype of the scales alone is in the way, or else."""
    if losses.general or set(losses.reasons) != {unheld(target)}:
        return otherwise
    return "Choose a --dtype that does, or convert the source with --scale-bits 8."


def target_dtype(packed: PackedCheckpoint, asked: str | None) -> torch.dtype:
    if asked is None:
        return config_dtype(packed.config)
    dtype = getattr(torch, asked, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError("dtype", f"{asked!r}", "float32, float16 or bfloat16")
    assert isinstance(dtype, torch.dtype)
    return dtype


def plain_model(packed: PackedCheckpoint) -> Any:
    """The floating-point model of a checkpoint, empty, as transformers has it.

    Raises CheckpointError where transformers does not know its architecture.
    """
    import transformers

    config = model_config(packed)
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise CheckpointError(
            packed.directory / "config.json",
            f"architecture {architecture}",
            f"one that transformers {transformers.__version__} has",
            "Export it to dense",
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return model_class(config)


def split_modules(packed: PackedCheckpoint, losses: Losses) -> tuple[list[str], list[str]]:
    """Packed tensors that are a linear layer's weight, and the linear layers that are not packed.

    What is packed and is no linear layer's weight (embeddings, experts, heads in int8 or int4) goes
    into the output in floating point; of ternary ones this is noted as a loss.
    """
    model = plain_model(packed)
    places = locate_tensors(model, packed.records)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    linear, modules = [], set()
    for name, record in packed.records.items():
        if record.kind != "ternary":
            continue
        place = places[name]
        module, _, leaf = (place.parameters or ("",))[0].rpartition(".")
        whole = len(place.parameters) == 1 and not place.operations and not record.transposed
        free = f"{module}.weight" not in tied and name.endswith(".weight")
        if whole and free and leaf == "weight" and module in plain:
            linear.append(name)
            modules.add(module)
        else:
            losses.add("ternary weights outside linear layers", name)
    untouched = sorted(layers - modules)
    for module in sorted(layers):  # transformers matches these names loosely
        if should_convert_module(module, untouched) != (module in modules):
            raise CheckpointError(
                packed.directory,
                f"{module} cannot be told from the layers that stay dense by the rules of "
                "transformers",
                "all or none of its kind packed",
                "Export it to dense",
            )
    return linear, untouched


def directory_items(
    packed: PackedCheckpoint,
    packed_names: Sequence[str],
    parts: Callable[[str], list[DirectoryItem]],
    losses: Losses,
    dtype: torch.dtype | None = None,
) -> list[DirectoryItem]:
    """The tensors of the output: those of the layout by `parts`, all others in floating point.

    dtype  of those others; None: kept ones as they are, packed ones in the model's own
    """
    own = dtype or target_dtype(packed, None)
    chosen = set(packed_names)
    items: list[DirectoryItem] = []
    for name, record in packed.records.items():
        if name in chosen:
            items += parts(name)
        else:
            items.append(dense_item(packed, name, own if record.shape else dtype, losses))
    return items


def dense_item(
    packed: PackedCheckpoint, name: str, dtype: torch.dtype | None, losses: Losses
) -> DirectoryItem:
    """A tensor in floating point (None, or what is no float: as it is stored), as in the source."""
    record = packed.records[name]
    stored, shape = packed.info(name)
    if record.shape is None and (dtype is None or not DTYPES[stored].is_floating_point):
        return DirectoryItem(name, stored, shape, lambda: packed.kept(name))
    assert dtype is not None
    if record.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if record.shape is not None and record.kernel:
        shape = record.dense_shape

    def read() -> Tensor:
        dense = packed.kept(name) if record.shape is None else packed.dense(name)
        cast = dense.to(dtype)
        if bool((cast.isinf() & dense.isfinite()).any()):
            raise WeightError(
                packed.checkpoint.tensors[name].file,
                f"{name} has weights up to {float(dense.abs().max()):.3g}; {str(dtype)[6:]} "
                "cannot hold them",
                remedy="Use --dtype bfloat16 or float32",
            )
        losses.measure(name, dense, cast)
        return as_source(cast, record)

    return DirectoryItem(name, DTYPE_NAMES[dtype], shape, read)


def words_of_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, cols) as words of 32 bits, (rows, cols bits / 32) int64, from the low bits."""
    groups = codes.to(torch.int64).view(len(codes), -1, 32 // bits)
    return (groups << torch.arange(0, 32, bits)).sum(-1)


def _write_weights(folder: Path, items: list[DirectoryItem], progress: Progress | None) -> None:
    """The tensors in one file, or in several and an index."""
    shards = _cut_into_shards(items)
    files = [SAFETENSORS]
    if len(shards) > 1:
        files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    total, done = sum(item.nbytes for item in items), 0
    for file, shard in zip(files, shards, strict=True):
        entries = lay_out((item.name, item.dtype, item.shape) for item in shard)
        head = file_head(entries, {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(head)
            for item in shard:
                tensor = item.read()
                assert tuple(tensor.shape) == item.shape, item.name
                assert DTYPE_NAMES[tensor.dtype] == item.dtype, item.name
                out.seek(len(head) + entries[item.name].start)
                out.write(byte_view(tensor).numpy().data)
                done += item.nbytes
                if progress:
                    progress(done, total, item.name, "writing")
    if len(shards) > 1:
        names = {i.name: file for file, s in zip(files, shards, strict=True) for i in s}
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / (SAFETENSORS + INDEX)).write_text(json.dumps(index, indent=1) + "\n")


def _plain_config(packed: PackedCheckpoint) -> dict[str, Any]:
    """config.json without what only a packed checkpoint says."""
    table = {
        k: v for k, v in packed.config.items() if k not in ("quantization_config", "torch_dtype")
    }
    remote = table.get("auto_map")
    if isinstance(remote, dict):
        shim = SHIM.removesuffix("py")  # code that would import ternarize
        remote = {k: v for k, v in remote.items() if not str(v).startswith(shim)}
        table.pop("auto_map")
        table |= {"auto_map": remote} if remote else {}
    return table


def _cut_into_shards(items: Sequence[DirectoryItem]) -> list[list[DirectoryItem]]:
    """The tensors of each file, in their order."""
    shards: list[list[DirectoryItem]] = [[]]
    size = 0  # of the last one
    for item in items:
        if shards[-1] and size + item.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards
