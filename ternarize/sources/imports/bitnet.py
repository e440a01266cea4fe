"""BitNet b1.58 in the layouts of transformers (`quant_method: bitnet`), Falcon-E among them.

    bitlinear       <x>.weight U8 [ceil(rows / 4), cols], q = its first dimension: logical row r is
                    in bits 2 (r // q) of stored row r % q, as t + 1;  <x>.weight_scale [1] = 1 / s:
                    the layer divides by it
    autobitlinear,  <x>.weight packed like that, or t in floating point;
    offline         <x>.weight_scale [1] = s: the layer multiplies by it, and <x>.bias as well
    autobitlinear,  <x>.weight, the master weights w;  the layer multiplies by
    online          (round(w / m) clipped to -1 .. 1) m,  m = max(mean |w|, 1e-5)

and the weight is s t. The layers round their inputs to int8 per token in all of them.

Arithmetic. What bitlinear divides by is not always the inverse of a short number: s is 1 / scale in
float32, or the float16 or bfloat16 number whose inverse in float32 the scale is. Online, all is in
float32, in transformers' order (1 / m, then w times and t divided by that), and rounded to the
dtype of w; only the sum of |w| is done in float64 here, since transformers' own depends on the
machine. Both can differ from it in the last bit of float32, which no bfloat16 weight shows unless
it lies within that bit of a boundary.

transformers/integrations/bitnet.py; BitNet b1.58, equations 1 to 3:
https://arxiv.org/abs/2402.17764
"""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ternarize.files.checkpoint import Checkpoint, TensorInfo
from ternarize.sources.imports.common import (
    FETCH_AGAIN,
    FLOAT_NAMES,
    REPAIR_CONFIG,
    Decode,
    Imported,
    expect,
    imported,
    quantized_layers,
    read_rows,
    refuse,
)
from ternarize.trits.methods.grouped import fixed_sum

_LAYOUTS = ("bitlinear offline", "autobitlinear offline", "autobitlinear online")
_SUM = 1 << 20  # weights whose magnitudes are added at a time; the sum depends on it
_SCALE = ".weight_scale"


def bitnet(raw: Checkpoint) -> Imported | None:
    """The checkpoint as float weights if it is quantized by `bitnet`, else None.

    Raises CheckpointError where it has what cannot be carried, or breaks the layout.
    """
    config = raw.config or {}
    settings = config.get("quantization_config")
    if not settings and {"weight_bits", "input_bits"} <= config.keys():
        raise refuse(
            raw,
            f"trained with weights in {config['weight_bits']} and inputs in "
            f"{config['input_bits']} bits by code of its own, which no class of transformers "
            "stands for",
            "a config.json with a quantization_config of bitnet",
            "Use a variant of the model that transformers runs",
        )
    if not isinstance(settings, dict) or settings.get("quant_method") != "bitnet":
        return None
    kind, mode = _kind_and_mode(raw, settings)
    layers = quantized_layers(raw, "bitnet", settings.get("modules_to_not_convert"))
    tensors, decode = dict(raw.tensors), dict[str, Decode]()
    if mode == "online":
        for name in layers if raw.tensors else ():
            expect(raw, name, FLOAT_NAMES, layers[name])
            decode[name] = _online(raw, name)
        meaning = "(round(w / m) clipped to -1 .. 1) m of master weights w, m = mean |w| per tensor"
    else:
        for name, shape in layers.items() if raw.tensors else ():
            _offline(raw, name, shape, kind, tensors, decode)
        meaning = "t / weight_scale" if kind == "bitlinear" else "t weight_scale"
        meaning += ", one for each tensor"
        for name in tensors:
            if name.endswith(_SCALE):
                raise refuse(
                    raw,
                    f"{name} belongs to no layer that bitnet means",
                    "scales of its linear layers alone",
                    "Repair modules_to_not_convert in config.json",
                )
    return imported(
        raw,
        tensors,
        decode,
        dict.fromkeys(layers, 0),
        format=f"bitnet, {kind}, {mode}",
        scale=meaning,
        activations="int8",
    )


def _kind_and_mode(raw: Checkpoint, settings: dict[str, Any]) -> tuple[str, str]:
    kind, mode = (
        settings.get("linear_class", "bitlinear"),
        settings.get("quantization_mode", "offline"),
    )
    if f"{kind} {mode}" not in _LAYOUTS:
        raise refuse(
            raw,
            f"bitnet with linear_class {kind!r} and quantization_mode {mode!r}",
            "bitlinear, or autobitlinear that is offline or online",
            REPAIR_CONFIG,
        )
    if settings.get("use_rms_norm"):
        raise refuse(
            raw,
            "bitnet with use_rms_norm, which has a norm in front of each linear layer that the "
            "architecture alone has not",
            "none",
            "It cannot be carried: use another variant of the model",
        )
    return kind, mode


def _online(raw: Checkpoint, name: str) -> Decode:
    info = raw.tensors[name]

    @lru_cache(maxsize=1)
    def scale() -> Tensor:
        sums = [
            fixed_sum(raw.read(name, at, min(at + _SUM, info.numel)).to(torch.float64).abs())
            for at in range(0, info.numel, _SUM)
        ]
        mean = fixed_sum(torch.stack(sums)) / info.numel
        # a weight that is not finite is reported by whoever reads it
        return 1 / mean.to(torch.float32).clamp(min=1e-5)

    def rows(first: int, last: int) -> Tensor:
        weight = read_rows(raw, name, first, last)
        if not bool(weight.isfinite().all()):
            return weight
        trits = (weight.to(torch.float32) * scale()).round().clamp(-1, 1)
        return (trits / scale()).to(weight.dtype)

    return rows


def _offline(
    raw: Checkpoint,
    name: str,
    shape: tuple[int, int],
    kind: str,
    tensors: dict[str, TensorInfo],
    decode: dict[str, Decode],
) -> None:
    """Replace a weight and its scale by the logical weight."""
    count, cols = shape
    scale_name = name.removesuffix(".weight") + _SCALE
    scale_info = expect(raw, scale_name, FLOAT_NAMES, None)
    if scale_info.numel != 1:
        expect(raw, scale_name, FLOAT_NAMES, (1,))
    packed = name in raw.tensors and raw.tensors[name].dtype in ("U8", "I8")
    if packed:
        expect(raw, name, ("U8", "I8"), (-(-count // 4), cols))
    elif kind == "bitlinear":
        expect(raw, name, ("U8",), (-(-count // 4), cols))
    else:
        expect(raw, name, FLOAT_NAMES, shape)

    @lru_cache(maxsize=1)
    def scale() -> Tensor:
        stored = raw.read(scale_name)
        found = inverse(stored) if kind == "bitlinear" else stored
        if not bool(found.isfinite().all()):
            number = "a finite number" + (" other than 0" if kind == "bitlinear" else "")
            raise refuse(raw, f"{scale_name} is {float(stored)}", number, FETCH_AGAIN)
        return found

    trits = _quarters(raw, name) if packed else partial(read_rows, raw, name)

    def rows(first: int, last: int) -> Tensor:
        return trits(first, last).to(scale().dtype) * scale()

    dtype = "F32" if kind == "bitlinear" else scale_info.dtype
    file = raw.tensors[name].file
    tensors[name] = TensorInfo(name, dtype, shape, file)
    del tensors[scale_name]
    decode[name] = rows
    bias = name.removesuffix(".weight") + ".bias"
    if kind == "bitlinear" or bias not in tensors:  # which adds its bias after the scale
        return
    expect(raw, bias, FLOAT_NAMES, (count,))

    def scaled(first: int, last: int) -> Tensor:  # a bias is one row
        return read_rows(raw, bias, first, last).to(torch.float32) * scale().to(torch.float32)

    tensors[bias] = TensorInfo(bias, "F32", (count,), raw.tensors[bias].file)
    decode[bias] = scaled


def _quarters(raw: Checkpoint, name: str) -> Decode:
    """Rows of trits (and 2, for the code that is none) packed by quarters of the rows, int8."""
    quarter = raw.tensors[name].shape[0]

    def rows(first: int, last: int) -> Tensor:
        parts = []
        while first < last:
            part, row = divmod(first, quarter)
            count = min(last - first, quarter - row)
            stored = read_rows(raw, name, row, row + count).view(torch.uint8)
            parts.append((stored >> (2 * part) & 3).to(torch.int8) - 1)
            first += count
        return torch.cat(parts) if parts else torch.empty(0, raw.tensors[name].shape[1])

    return rows


def inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32, as the shortest float whose inverse in float32 is the scale."""
    exact = 1 / scale.to(torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        short = exact.to(torch.float32).to(dtype).to(torch.float64)
        if bool(((1 / short).to(torch.float32) == scale.to(torch.float32)).all()):
            return short.to(torch.float32)
    return exact.to(torch.float32)
