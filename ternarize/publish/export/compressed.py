"""Export to compressed-tensors, format pack-quantized: integers of 2 or 4 bits, scales of groups.

With t the trits and s their scales, b bits:

    <x>.weight_packed I32 [rows, cols b / 32]: word c has columns 32 c / b + {0, 1, ...} from the
    low bits, as t + 2^(b - 1);  <x>.weight_scale [rows, cols / group] = s;
    <x>.weight_shape I64 [2]

vLLM reads it without a plug-in: by its source 2 bits on CUDA, without experts; 4 bits on CUDA and,
without experts, on CPUs with AVX-512. It holds scales in the dtype that it runs the model in.
https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.errors import UsageError
from ternarize.files.headers import DTYPE_NAMES
from ternarize.models.places import Place, locate_tensors
from ternarize.models.skeleton import model_end
from ternarize.publish.export.common import Losses, PackedCheckpoint, carry_or_refit, largest_group
from ternarize.publish.export.directory import (
    Contents,
    DirectoryItem,
    advice,
    directory_items,
    plain_model,
    refuse_activations,
    target_dtype,
    words_of_codes,
)

_BITS = {"int2": 2, "int4": 4}
_GROUPS = (128, 64, 32)
_WEIGHT = ".weight"
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def compressed_contents(
    packed: PackedCheckpoint, losses: Losses, *, kind: str = "int2", dtype: str | None = None
) -> Contents:
    """A checkpoint for vLLM, and for transformers with the package compressed-tensors.

    kind   of integers: "int2" or "int4"
    dtype  of scales and of kept floating-point tensors; None: the model's own

    The groups are the largest of 128, 64, 32 that hold every tensor exactly; larger ones are cut,
    each piece with the same scale. Raises CheckpointError for other groups, rotated inputs, planes,
    packed ends, experts packed in one piece, for scales that `dtype` cannot hold, and where
    activations in int8 are on record.
    """
    if kind not in _BITS:
        raise UsageError("type", f"{kind!r}", " or ".join(_BITS))
    refuse_activations(packed, losses)
    target, bits = target_dtype(packed, dtype), _BITS[kind]
    model = plain_model(packed)
    places = locate_tensors(model, packed.records)
    matrices = _matrices(packed, model, places, losses)
    group = largest_group(packed, matrices, _GROUPS, target, losses)
    otherwise = (
        "Convert the source with --group-size 128 --rotation 0 --head keep --embeddings keep, "
        "and --keep what it has no room for."
    )
    losses.stop_unless_allowed(packed, advice(losses, target, otherwise))

    # the entries of a tensor are made one after the other
    ternary = lru_cache(maxsize=1)(lambda name: carry_or_refit(packed, name, group, target))

    def parts(name: str) -> list[DirectoryItem]:
        rows, cols = packed.info(name)[1]

        def words() -> Tensor:
            codes = ternary(name).trits + (1 << bits - 1)
            return words_of_codes(codes, bits).to(torch.int32)  # the low 32 bits, as they are

        def scales() -> Tensor:
            losses.measure(name, packed.dense(name), ternary(name).dequantize())
            return ternary(name).scales.to(target)

        return [
            DirectoryItem(name + "_packed", "I32", (rows, cols * bits // 32), words),
            DirectoryItem(name + "_scale", DTYPE_NAMES[target], (rows, cols // group), scales),
            DirectoryItem(name + "_shape", "I64", (2,), lambda: torch.tensor([rows, cols])),
        ]

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    all_linear = {"targets": ["Linear"], "format": "pack-quantized", "weights": weights}
    config = {
        "dtype": str(target)[6:],
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": all_linear},
            "ignore": _left_alone(packed, matrices, places),
        },
    }
    return directory_items(packed, matrices, parts, losses, target), config


def _matrices(
    packed: PackedCheckpoint, model: Any, places: Mapping[str, Place], losses: Losses
) -> list[str]:
    """The ternary weights of linear layers, experts by themselves among them; others are noted."""
    modules = dict(model.named_modules())
    matrices = []
    for name, record in packed.records.items():
        if record.shape is None:
            continue
        at = places[name].targets[0].rpartition(".")[0]
        module = modules.get(at)
        if isinstance(module, nn.Embedding) or (module and module is model_end(model, "head")):
            losses.add("packed embeddings or output heads", name)
        elif record.kernel:
            losses.add("convolutions", name)
        elif len(record.shape) != 2 or record.transposed or not name.endswith(_WEIGHT):
            losses.add("stacks of experts or transposed matrices", name)
        elif record.shape[-1] % min(_GROUPS):
            losses.add(f"columns that are no multiple of {min(_GROUPS)}", name)
        else:
            matrices.append(name)
    for name in matrices:
        if any(other in packed.records and other not in matrices for other in _joined(name)):
            losses.add("parts of what vLLM joins, of which others are kept,", name)
    return matrices


def _joined(name: str) -> list[str]:
    """The weights that vLLM makes one matrix with this one, which have to be stored alike."""
    *before, leaf, weight = name.split(".")
    parts = next((parts for parts in _JOINED if leaf in parts), ())
    return [".".join([*before, part, weight]) for part in parts]


def _left_alone(
    packed: PackedCheckpoint, matrices: list[str], places: Mapping[str, Place]
) -> list[str]:
    """The modules that stay in floating point: what may be a linear layer, and the head.

    By their names on disk, which vLLM renames, and by those in the model, as transformers asks.
    """
    names = {"lm_head"}
    for name in packed.records:
        if name not in matrices and len(packed.info(name)[1]) == 2:
            known = [each for each in (name, *places[name].targets) if each.endswith(_WEIGHT)]
            names.update(each.removesuffix(_WEIGHT) for each in known)
    return sorted(names)
