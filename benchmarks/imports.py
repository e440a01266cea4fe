"""Ternary checkpoints of others, brought in: time, memory and size on a synthetic LLaMA.

    python benchmarks/imports.py WORK_DIRECTORY [--repeats 3] [--layers 8] [--json F]

WORK_DIRECTORY needs about 3 GB free. The same random weights are stored as master weights of BitNet
(BF16, quantized online), in its packed layout, as ternary floats with a scale for each quarter of
the rows or of the columns (as TriLM's), and in MLX's 2 bits; each is converted in a new process,
the page cache warm. Seconds are those of `convert()`, memory is as in benchmarks/conversion.py. The
first row is the same weights as an ordinary source, for comparison.
"""

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import parser, write_figures
from conversion import convert_once
from safetensors.torch import load_file, save_file
from synthetic import write_llama
from torch import Tensor

GROUP = 128
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
PACKED = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
MLX = {"group_size": GROUP, "bits": 2, "mode": "affine"}
Tensors = dict[str, Tensor]


def _trits(weight: Tensor) -> tuple[Tensor, Tensor]:
    mean = weight.float().abs().mean()
    return (weight.float() / mean).round().clamp(-1, 1), mean


def packed(weight: Tensor, name: str) -> Tensors:
    trits, mean = _trits(weight)
    codes = (trits + 1).to(torch.uint8).view(4, -1, weight.shape[1])
    words = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    return {name: words, f"{name}_scale": (1 / mean).to(torch.bfloat16).view(1)}


def shards(weight: Tensor, name: str) -> Tensors:
    along = 1 if "o_proj" in name or "down_proj" in name else 0
    parts = [_trits(part) for part in weight.chunk(4, along)]
    return {name: torch.cat([(t * m.half()).half() for t, m in parts], along)}


def mlx(weight: Tensor, name: str) -> Tensors:
    trits, mean = _trits(weight)
    codes = (trits + 1).to(torch.int64).view(weight.shape[0], -1, 16)
    words = (codes << torch.arange(0, 32, 2)).sum(-1).to(torch.uint32)
    # a scale for each group, so that nothing larger will do
    scales = (mean * (1 + torch.rand(weight.shape[0], weight.shape[1] // GROUP))).bfloat16()
    base = name.removesuffix("weight")
    return {name: words, f"{base}scales": scales, f"{base}biases": -scales}


def write(
    at: Path, source: Path, keys: dict[str, Any], change: Callable[[Tensor, str], Tensors] | None
) -> None:
    at.mkdir()
    config = json.loads((source / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**config, **keys}))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name and change]:
        assert change is not None
        tensors |= change(tensors.pop(name), name)
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})


FORMS: dict[str, tuple[dict[str, Any], Callable[[Tensor, str], Tensors] | None]] = {
    "ordinary weights, absmean": ({}, None),
    "bitnet, master weights": ({"quantization_config": ONLINE}, None),
    "bitnet, packed": ({"quantization_config": PACKED}, packed),
    "ternary floats in shards": ({}, shards),
    "MLX, 2 bits, groups of 128": ({"quantization": MLX}, mlx),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--layers", type=int, default=8)
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    first = options.work / f"llama-{options.layers}"
    if not first.exists():
        write_llama(first, options.layers)
    figures: dict[str, Any] = {}
    print("| source | MB | packed, MB | seconds | peak memory above torch, MB |")
    print("|---|---|---|---|---|")
    for form, (keys, change) in FORMS.items():
        source, target = options.work / "source", options.work / "target"
        for path in (source, target):
            shutil.rmtree(path, ignore_errors=True)
        write(source, first, keys, change)
        size = (source / "model.safetensors").stat().st_size
        rounds = [convert_once(source, target, "absmean") for _ in range(options.repeats + 1)][1:]
        figures[form] = {"source_bytes": size, "rounds": rounds}
        print(
            f"| {form} | {size / 1e6:.0f} | {rounds[0]['packed_bytes'] / 1e6:.0f} | "
            f"{statistics.median(row['seconds'] for row in rounds):.1f} | "
            f"{max(row['peak_above_torch'] for row in rounds) / 1e6:.0f} |"
        )
    write_figures(options.json, __file__, figures)


if __name__ == "__main__":
    main()
