"""Export to directories in the layout of the Hub, for transformers without ternarize and for MLX.

    dense        the weights in floating point; loads everywhere
    bitnet       transformers' own 2-bit BitLinear: one scale per tensor, activations in int8
    gemma-int2   transformers' own QuantizedLinear (from 5.11 on): 2 bits, one scale per row
    mlx          MLX's affine quantization in 2 bits, groups of 32, 64 or 128

In all of them a tensor keeps its name, its companions stand beside it, config.json says how to read
it, and the small files (tokenizer and so on) are copied. With t the trits and s their scales:

    bitnet       <x>.weight U8 [rows / 4, cols]: byte r has rows r + {0, 1, 2, 3} rows / 4 in bits
                 0-1, 2-3, 4-5, 6-7, as t + 1;  <x>.weight_scale [1] = 1 / s
    gemma-int2   <x>.weight U8 [rows, ceil(cols / 4)]: byte c has columns 4 c + {0, 1, 2, 3} from
                 the low bits, as t + 2;  <x>.weight_scale F32 [rows, 1] = s;
                 <x>.input_activation_scale, <x>.output_activation_scale F32 [] = 0, which is off
    mlx          <x>.weight U32 [rows, cols / 16]: word c has columns 16 c + {0 .. 15} from the low
                 bits, as q = t + 1;  <x>.scales [rows, cols / group] = s;  <x>.biases = -s;
                 weight = q * scale + bias
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ternarize.errors import CheckpointError, UsageError, WeightError
from ternarize.files.headers import DTYPE_NAMES, DTYPES, byte_view
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.models.configuration import config_dtype
from ternarize.models.places import locate_tensors
from ternarize.plans.copied import small_files
from ternarize.progress import Progress
from ternarize.publish.export.common import (
    Losses,
    PackedCheckpoint,
    carry,
    carry_or_refit,
    fresh_output,
    model_config,
)
from ternarize.publish.hub import SHIM
from ternarize.trits.ggml import two_bits
from ternarize.trits.ternary import Ternary

SHARD = 5 * 10**9  # bytes of a file, as save_pretrained has it
MLX_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Item:
    """A tensor of the output, and how to make it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def export_dense(
    packed: PackedCheckpoint,
    output: Path,
    *,
    dtype: str | None = None,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an ordinary checkpoint in floating point.

    dtype  "float32", "float16" or "bfloat16", of all floating-point tensors; None: packed tensors
           in the model's own dtype (in which they run), kept ones as they are

    Weights are rounded once, from float32. Raises CheckpointError where activations in int8 are on
    record, which such a checkpoint cannot say, WeightError where `dtype` cannot hold a weight.

    Returns {"to", "tensors": how many were written} and `Losses.report`.
    """
    losses = Losses("a dense checkpoint", allow_requantize)
    _check_activations(packed, losses)
    losses.stop_unless_allowed(packed, "Convert the source with --activations none.")
    target = _dtype(packed, dtype)
    items = [
        _dense_item(packed, name, target if record.shape or dtype else None, losses)
        for name, record in packed.records.items()
    ]
    config = {"dtype": str(target)[6:]}
    return _write(packed, output, "dense", items, config, losses, progress)


def export_bitnet(
    packed: PackedCheckpoint,
    output: Path,
    *,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint for transformers' `bitnet` quantization with linear_class "bitlinear".

    The layer sums integers in the model's dtype, which overflows float16: such a model is set to
    float32, any other keeps its dtype. Raises CheckpointError where a tensor has more than one
    scale, and where activations are not in int8, which bitnet makes them.

    Returns as `export_dense`.
    """
    losses = Losses("bitnet", allow_requantize)
    if _activations(packed) != "int8":
        losses.general.append("activations in floating point, which bitnet rounds to int8")
    linear, untouched = _split_modules(packed, losses)
    for name in linear:
        rows = packed.info(name)[1][0]
        losses.add(f"{rows} rows, no multiple of 4," if rows % 4 else "", name)
        losses.add(carry(packed, name, 0, torch.float32)[1], name)
    losses.stop_unless_allowed(
        packed, "Convert the source with --group-size 0 --activations int8 (and --rotation 0)."
    )

    @lru_cache(maxsize=1)  # the entries of a tensor are made one after the other
    def ternary(name: str) -> Ternary:
        return carry_or_refit(packed, name, 0, torch.float32)

    def parts(name: str) -> list[Item]:
        rows, cols = packed.info(name)[1]

        def weight() -> Tensor:
            codes = (ternary(name).trits + 1).to(torch.uint8)
            return two_bits(codes.view(4, rows // 4, cols), 0)

        def scale() -> Tensor:
            found = ternary(name)
            inverse = (1 / found.scales.clamp(min=2.0**-100)).to(torch.float32).view(1)
            scales = (1 / inverse.to(torch.float64)).view(1, 1)
            used = Ternary(found.trits, scales, 0).dequantize(torch.float64)
            losses.measure(name, packed.dense(name), used)
            return inverse

        return [
            Item(name, "U8", (rows // 4, cols), weight),
            Item(name + "_scale", "F32", (1,), scale),
        ]

    stay = [name for name in linear if packed.info(name)[1][0] % 4]
    linear = [name for name in linear if name not in stay]
    untouched += [name.removesuffix(".weight") for name in stay]
    dtype = _dtype(packed, None)
    config = {
        "dtype": "float32" if dtype == torch.float16 else str(dtype)[6:],
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": untouched,
        },
    }
    items = _items(packed, linear, parts, losses)
    return _write(packed, output, "bitnet", items, config, losses, progress)


def export_gemma_int2(
    packed: PackedCheckpoint,
    output: Path,
    *,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint for transformers' `gemma` quantization in 2 bits, of any architecture.

    Exact for rows or tensors that share a scale. Raises CheckpointError for smaller groups, and
    where activations in int8 are on record.

    Returns as `export_dense`.
    """
    losses = Losses("gemma-int2", allow_requantize)
    _check_activations(packed, losses)
    linear, untouched = _split_modules(packed, losses)
    for name in linear:
        losses.add(carry(packed, name, -1, torch.float32)[1], name)
    losses.stop_unless_allowed(
        packed, "Convert the source with --group-size -1 (and --rotation 0, --activations none)."
    )

    @lru_cache(maxsize=1)  # the entries of a tensor are made one after the other
    def ternary(name: str) -> Ternary:
        return carry_or_refit(packed, name, -1, torch.float32)

    def parts(name: str) -> list[Item]:
        rows, cols = packed.info(name)[1]

        def weight() -> Tensor:
            codes = nn.functional.pad((ternary(name).trits + 2).to(torch.uint8), (0, -cols % 4))
            return two_bits(codes.view(rows, -1, 4), -1)

        def scale() -> Tensor:
            losses.measure(name, packed.dense(name), ternary(name).dequantize())
            return ternary(name).scales.to(torch.float32)

        base = name.removesuffix("weight")
        return [
            Item(name, "U8", (rows, -(-cols // 4)), weight),
            Item(name + "_scale", "F32", (rows, 1), scale),
            Item(base + "input_activation_scale", "F32", (), lambda: torch.zeros(())),
            Item(base + "output_activation_scale", "F32", (), lambda: torch.zeros(())),
        ]

    config = {
        "quantization_config": {
            "quant_method": "gemma",
            "num_bits": 2,
            "quantize_embeddings": False,
            "modules_to_not_convert": untouched,
        }
    }
    items = _items(packed, linear, parts, losses)
    return _write(packed, output, "gemma-int2", items, config, losses, progress)


def export_mlx(
    packed: PackedCheckpoint,
    output: Path,
    *,
    dtype: str | None = None,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint for MLX (mlx-lm), in 2 bits with affine groups.

    dtype  of scales and of kept floating-point tensors, which MLX wants to be the same; None: the
           model's own

    The groups are the largest of 128, 64, 32 that hold every tensor exactly; larger ones are cut,
    each piece with the same scale. Raises CheckpointError for other groups, for scales that `dtype`
    cannot hold, and where activations in int8 are on record.

    Returns as `export_dense`.
    """
    losses = Losses("mlx", allow_requantize)
    _check_activations(packed, losses)
    target = _dtype(packed, dtype)
    matrices = []
    for name, record in packed.records.items():
        if record.kind == "ternary":
            stack = len(record.shape or ()) != 2 or record.transposed
            losses.add("stacks of experts or transposed matrices" if stack else "", name)
            if not stack and (record.shape or (0,))[-1] % 32 == 0:
                matrices.append(name)
            elif not stack:
                losses.add("columns that are no multiple of 32", name)
    found = {
        group: [(carry(packed, name, group, target)[1], name) for name in matrices]
        for group in MLX_GROUPS
        if all(packed.info(name)[1][-1] % group == 0 for name in matrices)
    }
    group = next((g for g in found if not any(reason for reason, _ in found[g])), min(found))
    for reason, name in found[group]:
        losses.add(reason, name)
    losses.stop_unless_allowed(
        packed, "Convert the source with --group-size 128 --rotation 0, or choose a --dtype."
    )

    @lru_cache(maxsize=1)  # the entries of a tensor are made one after the other
    def ternary(name: str) -> Ternary:
        return carry_or_refit(packed, name, group, target)

    def parts(name: str) -> list[Item]:
        rows, cols = packed.info(name)[1]
        kind = DTYPE_NAMES[target]
        base = name.removesuffix("weight")

        def weight() -> Tensor:
            codes = (ternary(name).trits + 1).to(torch.int64).view(rows, -1, 16)
            words = (codes << torch.arange(0, 32, 2)).sum(-1)
            return words.to(torch.uint32)

        def scales() -> Tensor:
            losses.measure(name, packed.dense(name), ternary(name).dequantize())
            return ternary(name).scales.to(target)

        return [
            Item(name, "U32", (rows, cols // 16), weight),
            Item(base + "scales", kind, (rows, cols // group), scales),
            Item(
                base + "biases",
                kind,
                (rows, cols // group),
                lambda: -ternary(name).scales.to(target),
            ),
        ]

    quantization = {"group_size": group, "bits": 2, "mode": "affine"}
    config = {
        "dtype": str(target)[6:],
        "quantization": quantization,
        "quantization_config": quantization,
    }
    items = _items(packed, matrices, parts, losses, target)
    return _write(packed, output, "mlx", items, config, losses, progress)


def _activations(packed: PackedCheckpoint) -> str:
    quantization = packed.config["quantization_config"]
    return str(quantization.get("activations") or "none")


def _check_activations(packed: PackedCheckpoint, losses: Losses) -> None:
    if _activations(packed) != "none":
        losses.general.append(f"activations in {_activations(packed)}")


def _dtype(packed: PackedCheckpoint, asked: str | None) -> torch.dtype:
    if asked is None:
        return config_dtype(packed.config)
    dtype = getattr(torch, asked, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError("dtype", f"{asked!r}", "float32, float16 or bfloat16")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _split_modules(packed: PackedCheckpoint, losses: Losses) -> tuple[list[str], list[str]]:
    """Packed tensors that are a linear layer's weight, and the linear layers that are not packed.

    What is packed and is no linear layer's weight (embeddings, experts, heads in int8) goes into
    the output in floating point; of ternary ones this is noted as a loss.
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
        model = model_class(config)
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


def _items(
    packed: PackedCheckpoint,
    packed_names: Sequence[str],
    parts: Callable[[str], list[Item]],
    losses: Losses,
    dtype: torch.dtype | None = None,
) -> list[Item]:
    """The tensors of the output: those of the layout by `parts`, all others in floating point.

    dtype  of those others; None: kept ones as they are, packed ones in the model's own
    """
    own = dtype or _dtype(packed, None)
    chosen = set(packed_names)
    items: list[Item] = []
    for name, record in packed.records.items():
        if name in chosen:
            items += parts(name)
        else:
            items.append(_dense_item(packed, name, own if record.shape else dtype, losses))
    return items


def _dense_item(
    packed: PackedCheckpoint, name: str, dtype: torch.dtype | None, losses: Losses
) -> Item:
    """A tensor in floating point (None, or what is no float: as it is stored), as in the source."""
    record = packed.records[name]
    stored, shape = packed.info(name)
    if record.shape is None and (dtype is None or not DTYPES[stored].is_floating_point):
        return Item(name, stored, shape, lambda: packed.kept(name))
    assert dtype is not None
    if record.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])

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
        return cast.transpose(-1, -2).contiguous() if record.transposed else cast

    return Item(name, DTYPE_NAMES[dtype], shape, read)


def _write(
    packed: PackedCheckpoint,
    output: Path,
    to: str,
    items: list[Item],
    config: dict[str, Any],
    losses: Losses,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the directory: weights in shards, config.json, the small files."""
    table = {
        k: v for k, v in packed.config.items() if k not in ("quantization_config", "torch_dtype")
    }
    remote = table.get("auto_map")
    if isinstance(remote, dict):
        shim = SHIM.removesuffix("py")  # code that would import ternarize
        remote = {k: v for k, v in remote.items() if not str(v).startswith(shim)}
        table.pop("auto_map")
        table |= {"auto_map": remote} if remote else {}
    table |= config
    shards: list[list[Item]] = [[]]
    size = 0  # of the last one
    for item in items:
        if shards[-1] and size + item.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    files = [SAFETENSORS]
    if len(shards) > 1:
        files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    total, done = sum(item.nbytes for item in items), 0
    with fresh_output(packed, output, folder=True) as partial:
        for file, shard in zip(files, shards, strict=True):
            header, places = _layout(shard)
            with (partial / file).open("wb") as out:
                out.write(header)
                for item in shard:
                    tensor = item.read()
                    assert tuple(tensor.shape) == item.shape, item.name
                    assert DTYPE_NAMES[tensor.dtype] == item.dtype, item.name
                    out.seek(len(header) + places[item.name])
                    out.write(byte_view(tensor).numpy().data)
                    done += item.nbytes
                    if progress:
                        progress(done, total, item.name, "writing")
        if len(shards) > 1:
            names = {i.name: file for file, s in zip(files, shards, strict=True) for i in s}
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (partial / (SAFETENSORS + INDEX)).write_text(json.dumps(index, indent=1) + "\n")
        (partial / "config.json").write_text(json.dumps(table, indent=2) + "\n")
        for name in small_files(packed.directory, packed.checkpoint.files)[0]:
            if name not in (RECORD, SHIM):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(packed.directory / name, partial / name)
    return {"to": to, "tensors": len(items), **losses.report()}


def _layout(items: Sequence[Item]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file with these tensors, and where the data of each begins.

    The widest dtypes come first, and the head fills whole 8 bytes, so that all are aligned.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    start = 0
    for item in sorted(items, key=lambda item: -DTYPES[item.dtype].itemsize):
        places[item.name] = start
        start += item.nbytes
        offsets = [places[item.name], start]
        table[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": offsets}
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, places
