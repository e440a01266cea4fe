"""Tiny models of every architecture, with inputs to calibrate them on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ternarize.calibrate.blocks import Blocks, Call
from ternarize.plans.layout import Plan
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe

NAMES = (*tiny_models.CONFIGS, *tiny_models.MORE)
# candidates for a matrix, names and values of gptq.py
FEW: dict[str, Any] = {"ROUNDS": 1, "SWEEPS": 1, "DAMPINGS": (0.1,), "PULLS": (0.3,)}


def save(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the tiny model `name` with random weights."""
    tiny_models.save(name, directory, dtype)
    return directory


def change(directory: Path, tensor: str, function: Callable[[Tensor], Tensor]) -> None:
    """Change a tensor of a saved checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor] = function(tensors[tensor]).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def inputs(name: str, samples: int, length: int = 24, seed: int = 1) -> dict[str, Tensor]:
    """Arguments of the forward of the model `name`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 140, (samples, length), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(samples, 3, 32, 32, generator=generator)}
    if name == "clip":
        pixels = torch.randn(samples, 3, 32, 32, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels}
    if name == "whisper":
        features = torch.randn(samples, 16, 64, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :10].clone()}
    return {"input_ids": ids}


def data(name: str, directory: Path, samples: int = 20, length: int = 24) -> Path:
    """A file of inputs for `convert`."""
    path = directory / f"{name}-data.safetensors"
    save_file(inputs(name, samples, length), path)
    return path


def recipe(dataset: Path, **options: Any) -> Recipe:
    """Groups of 32, rotations by 16, 16 samples."""
    own = {k: options.pop(k) for k in list(options) if k in Calibrate.__dataclass_fields__}
    own = {"num_samples": 16, "rotation": 16, **own}
    return Recipe("gptq", **{"group_size": 32, **options}, calibrate=Calibrate(str(dataset), **own))


def blocks_of(directory: Path) -> tuple[Plan, Blocks]:
    """The blocks that hold what becomes ternary."""
    work = make_plan(directory, Recipe())
    return work, Blocks(work.source, [t.name for t in work.tensors if t.ternary])


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def load_source(directory: Path) -> nn.Module:
    """The source as transformers runs it, one expert after the other."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model_class = getattr(transformers, (config.architectures or [""])[0])
    model: nn.Module = model_class.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def first_call(blocks: Blocks, batch: dict[str, Tensor]) -> Call:
    """The call of the first block."""
    call = blocks.start(batch).resume()
    assert isinstance(call, Call)
    return call


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model gives."""
    return [t for t in output.to_tuple() if isinstance(t, Tensor) and t.is_floating_point()]
