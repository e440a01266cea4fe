"""Layouts with 2 bits for a weight that some models fill with three values.

    mlx      <x>.weight U32 [rows, cols bits / 32], fields q from the low bits; <x>.scales and
             <x>.biases [rows, cols / group]; w = q scale + bias. config.json: "quantization", with
             group_size, bits and, by path, what differs. (`metal` of transformers: <x>.qbiases.)
    gemma    <x>.weight U8 [rows, ceil(cols / 4)], fields t + 2 from the low bits;
             <x>.weight_scale F32 [rows, 1] = s; w = s t

Both hold weights that are not ternary as well (MLX with any bias, Gemma with t = -2): what is read
is what is stored, and the conversion refuses a tensor that it cannot pack without loss. Of MLX
other numbers of bits are read too, for the tensors that are kept (--keep).

Arithmetic. q scale + bias is computed in float64, which is exact for 16-bit scales, and rounded
once to their dtype; s t in float32 is exact. A runtime that computes gemma in bfloat16 rounds s to
that.

https://ml-explore.github.io/mlx (quantize, mode affine); transformers/integrations/gemma_quant.py
and metal_quantization.py
"""

import re
from typing import Any

import torch
from torch import Tensor

from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.files.headers import DTYPES
from ternarize.sources.imports.common import (
    FETCH_AGAIN,
    FLOAT_NAMES,
    REPAIR_CONFIG,
    USE_ORIGINAL,
    Decode,
    Imported,
    check_patterns,
    expect,
    imported,
    quantized_layers,
    read_rows,
    refuse,
)
from ternarize.trits.ternary import split_groups

BITS = (2, 4, 8)  # fields that do not cross words


def mlx(raw: Checkpoint) -> Imported | None:
    """The checkpoint as float weights if it is in MLX's affine layout, else None."""
    config = raw.config or {}
    settings = config.get("quantization")
    biases, name = ".biases", "mlx"
    if settings is None:
        settings = config.get("quantization_config")
        biases, name = ".qbiases", "metal"
        if not isinstance(settings, dict) or settings.get("quant_method") != "metal":
            return None
    if not isinstance(settings, dict) or settings.get("mode", "affine") != "affine":
        raise refuse(
            raw,
            f"quantization of config.json is {str(settings)[:80]!r}",
            "MLX's, in mode affine",
            USE_ORIGINAL,
        )
    if raw.tensors and settings.get("bits") != 2 and not _mixed(settings):
        raise refuse(
            raw,
            f"quantized to {settings.get('bits')!r} bits by {name}",
            "2, which three values need",
            USE_ORIGINAL,
        )
    tensors, decode = dict(raw.tensors), dict[str, Decode]()
    groups: dict[str, int] = {}
    two = set()
    for base in [n.removesuffix(".scales") for n in raw.tensors if n.endswith(".scales")]:
        bits, group = _bits_and_group(raw, settings, base)
        info = expect(raw, base + ".scales", FLOAT_NAMES, None)
        *stack, cols = info.shape
        shape = (*stack, cols * group)
        expect(raw, base + biases, (info.dtype,), info.shape)
        weight = expect(raw, base + ".weight", ("U32",), (*stack, cols * group * bits // 32))
        decode[weight.name] = _affine(raw, base, biases, bits, group)
        tensors[weight.name] = TensorInfo(weight.name, info.dtype, shape, weight.file)
        del tensors[base + ".scales"], tensors[base + biases]
        groups[weight.name] = group
        if bits == 2:
            two.add(weight.name)
    if raw.tensors and not groups:
        raise refuse(raw, "config.json says that it is quantized", "scales", FETCH_AGAIN)
    return imported(
        raw,
        tensors,
        decode,
        groups,
        format=f"{name}, affine",
        scale="q scale + bias, a scale for each group",
        ternary_ends=two,
    )


def _bits_and_group(raw: Checkpoint, settings: dict[str, Any], base: str) -> tuple[int, int]:
    """Bits of a layer's weights and how many share a scale, by its own entry or the common one."""
    own = settings.get(base)
    both = {**settings, **(own if isinstance(own, dict) else {})}
    bits, group = both.get("bits"), both.get("group_size")
    if bits not in BITS or type(group) is not int or group < 1:
        found = f"{base} has {bits!r} bits in groups of {group!r}"
        raise refuse(raw, found, "2, 4 or 8 bits", USE_ORIGINAL)
    return bits, group


def _mixed(settings: dict[str, Any]) -> bool:
    """Whether some tensors are in 2 bits although most are not."""
    return any(isinstance(each, dict) and each.get("bits") == 2 for each in settings.values())


def _affine(raw: Checkpoint, base: str, biases: str, bits: int, group: int) -> Decode:
    dtype = DTYPES[raw.tensors[base + ".scales"].dtype]

    def rows(first: int, last: int) -> Tensor:
        words = read_rows(raw, base + ".weight", first, last)
        q = split_groups(_fields(words, bits).to(torch.float64), group)
        scale, bias = (
            read_rows(raw, base + each, first, last).to(torch.float64).unsqueeze(-1)
            for each in (".scales", biases)
        )
        return (q * scale + bias).to(dtype).flatten(-2)

    return rows


def gemma(raw: Checkpoint) -> Imported | None:
    """The checkpoint as float weights if it is in transformers' `gemma` layout, else None."""
    config = raw.config or {}
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "gemma":
        return None
    patterns = settings.get("module_quant_configs") or {}
    if not isinstance(patterns, dict) or not all(isinstance(p, dict) for p in patterns.values()):
        found = f"module_quant_configs of config.json is {str(patterns)[:80]!r}"
        raise refuse(raw, found, "a table of tables", REPAIR_CONFIG)
    check_patterns(raw, "module_quant_configs", list(patterns))

    def bits(path: str) -> Any:
        found = [each for pattern, each in patterns.items() if re.search(pattern, path)]
        return {"num_bits": settings.get("num_bits", 4), **(found[0] if found else {})}["num_bits"]

    layers = quantized_layers(raw, "gemma", settings.get("modules_to_not_convert"))
    if settings.get("quantize_embeddings"):
        raise refuse(
            raw,
            "gemma with quantize_embeddings, which packs the token embedding",
            "it in floating point",
            USE_ORIGINAL,
        )
    tensors, decode = dict(raw.tensors), dict[str, Decode]()
    for name, (count, cols) in layers.items():
        path = name.removesuffix(".weight")
        if bits(path) != 2:
            found = f"{path} is in {bits(path)!r} bits"
            raise refuse(raw, found, "2, which three values need", USE_ORIGINAL)
        if not raw.tensors:
            continue
        weight = expect(raw, name, ("U8", "I8"), (count, -(-cols // 4)))
        expect(raw, path + ".weight_scale", ("F32",), (count, 1))
        for activation in ("input", "output"):
            scale = f"{path}.{activation}_activation_scale"
            if tensors.pop(scale, None) and bool(raw.read(scale).any()):
                raise refuse(
                    raw,
                    f"{scale} is {float(raw.read(scale))}: activations are rounded in a fixed "
                    "range, which cannot be carried",
                    "0",
                    USE_ORIGINAL,
                )
        del tensors[path + ".weight_scale"]
        tensors[name] = TensorInfo(name, "F32", (count, cols), weight.file)
        decode[name] = _gemma_rows(raw, name, cols)
    return imported(
        raw,
        tensors,
        decode,
        dict.fromkeys(layers, -1),
        format="gemma, 2 bits",
        scale="t weight_scale, one for each row",
    )


def _gemma_rows(raw: Checkpoint, name: str, cols: int) -> Decode:
    def rows(first: int, last: int) -> Tensor:
        stored = read_rows(raw, name, first, last).view(torch.uint8)
        trits = _fields(stored, 2)[:, :cols].to(torch.float32) - 2
        return trits * read_rows(raw, name + "_scale", first, last)

    return rows


def _fields(words: Tensor, bits: int) -> Tensor:
    """The fields of `bits` bits in unsigned words, from the low bits: (..., n) -> (..., n * k).

    uint8 or uint32; returns uint8.
    """
    step = torch.arange(0, words.dtype.itemsize * 8, bits)
    wide = words.to(torch.int64).unsqueeze(-1)
    return ((wide >> step) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
