"""Packed checkpoints and their dense twins for the tests of loading, made without convert.py.

`pack_checkpoint` ternarizes what a simple rule finds in a checkpoint of tiny_models.py and writes
it in the packed format; `dense_twin` writes the same model as an ordinary float32 checkpoint that
holds the dequantized weights. A model loaded from one must equal a model loaded from the other.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ternarize.files import container, metadata
from ternarize.files.metadata import Record
from ternarize.models.places import bars_rows, locate_tensors, turns_if_needed
from ternarize.native import lib
from ternarize.runtime import products
from ternarize.runtime.forms import dense_matrix
from ternarize.runtime.modules.embedding import PackedEmbedding
from ternarize.runtime.packed import Packed
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.trits.base3 import BASE3
from ternarize.trits.methods.absmean import absmean

# weights that the modules around them read raw, or cast their input to the dtype of
RAW = re.compile(r"\.wo\.|mixer\.|router|\.gate\.")


def packable(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """The linear weights and experts inside the model's blocks: {name in the file: transposed}."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, place in locate_tensors(model, tensors).items():
        target = place.targets[0]
        parameter = parameters.get(target)
        if parameter is None or not re.search(r"\.\d+\.", target) or RAW.search(target):
            continue
        path, _, leaf = target.rpartition(".")
        module = model.get_submodule(path)
        experts = parameter.ndim == 3 and leaf.endswith("_proj")
        linear = leaf == "weight" and (type(module) is nn.Linear or isinstance(module, Conv1D))
        if bars_rows(place.operations, parameter.ndim, False):
            continue
        if experts or linear:
            in_first = getattr(module, "is_transposed", "Llama4" in type(module).__name__)
            if any(map(turns_if_needed, place.operations)):
                in_first = tensors[name].shape != parameter.shape
            found[name] = isinstance(module, Conv1D) or (experts and in_first)
    return found


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors.update({name: handle.get_tensor(name) for name in handle.keys()})
    return tensors


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The table of tensors in the metadata of each file."""
    tables = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tables.append(json.loads(handle.metadata()["ternarize"])["tensors"])
    return tables


def skeleton(directory: Path) -> PreTrainedModel:
    """The model of a checkpoint without its weights, on meta."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, config.architectures[0])(config)
    return model


def pack_checkpoint(
    source: Path,
    directory: Path,
    group_size: int = 32,
    activations: str = "none",
    scale_dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, bool]:
    """Write `source` packed to `directory`; returns what was packed, as `packable` does.

    scale_dtypes  scales of tensors whose name ends with the key are stored as the given dtype
    """
    tensors = read_checkpoint(source)
    chosen = packable(skeleton(source), tensors)
    stored: dict[str, Tensor] = {}
    records: dict[str, Record] = {}
    for name, tensor in tensors.items():
        if name not in chosen:
            stored[name], records[name] = tensor, Record(container.digest(tensor))
            continue
        weight = tensor.transpose(-1, -2).contiguous() if chosen[name] else tensor
        packed, scale = container.encode(absmean(weight, group_size))
        for ending, dtype in (scale_dtypes or {}).items():
            scale = scale.to(dtype) if name.endswith(ending) else scale
        stored[name], stored[f"{name}_scale"] = packed, scale
        digest = container.digest(packed, scale)
        shape = tuple(weight.shape)
        records[name] = Record(digest, shape, group_size, transposed=chosen[name])
    write(directory, stored, records, source, activations, group_size)
    return chosen


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    records: Mapping[str, Record],
    source: Path,
    activations: str = "none",
    group_size: int = 32,
) -> None:
    """Write one file of tensors and records, and the source's config.json beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        dict(tensors), directory / "model.safetensors", metadata=metadata.dump_metadata(records)
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "ternarize",
        "format_version": 1,
        "group_size": group_size,
        "method": "absmean",
        "activations": activations,
        "note": "a key that this version does not know",
    }
    (directory / "config.json").write_text(json.dumps(config))


def dense_twin(packed: Path, source: Path, directory: Path) -> None:
    """Write the ordinary float32 checkpoint with the weights that `packed` stands for."""
    directory.mkdir(parents=True)
    stored, records = read_checkpoint(packed), metadata.records_of(open_checkpoint(packed))
    dense = {}
    for name, record in records.items():
        if record.shape is None:
            dense[name] = stored[name].float() if stored[name].is_floating_point() else stored[name]
            continue
        weight = container.dequantize(stored[name], stored[f"{name}_scale"], record)
        dense[name] = weight.mT.contiguous() if record.transposed else weight
    save_file(dense, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (directory / "config.json").write_text(json.dumps(config))


def load_dense(directory: Path, **kwargs: Any) -> PreTrainedModel:
    """An ordinary model, with experts run one after the other."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model: PreTrainedModel = getattr(transformers, config.architectures[0]).from_pretrained(
        directory, experts_implementation="eager", **kwargs
    )
    for module in model.modules():
        if isinstance(module, Conv1D):  # rows one behind the other, as ours: sums in that order
            module.weight.data = module.weight.data.t().contiguous().t()
    return model


def output(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """The model's main output (logits or last hidden state) for a fixed input."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 140, (2, 12), generator=generator)
    dtype = model.dtype
    inputs: dict[str, Tensor] = {"input_ids": ids}
    config: Any = model.config
    name = type(model).__name__
    if name.startswith(("ViT", "CLIP")):
        vision = getattr(config, "vision_config", config)
        pixels = (2, vision.num_channels, vision.image_size, vision.image_size)
        inputs = {"pixel_values": torch.randn(pixels, generator=generator).to(dtype)}
        if name.startswith("CLIP"):
            inputs["input_ids"] = ids
    elif name.startswith("Whisper"):
        sound = (2, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {
            "input_features": torch.randn(sound, generator=generator).to(dtype),
            "decoder_input_ids": ids,
        }
    elif name.startswith("T5"):
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        result = model(**inputs)
    first: Tensor = next(
        result[key]
        for key in ("logits", "last_hidden_state", "logits_per_image")
        if result.get(key) is not None
    )
    return first


def stored(model: Any) -> Any:
    """The model with its packed weights as in the file: ternary ones are multiplied dequantized."""
    for module in model.modules():
        if isinstance(module, Packed):
            module.use_stored()
    return model


def dequantized_output(model: Any) -> Tensor:
    """`output` with every weight dequantized from the stored form, which the model is left in."""
    # int8 and int4 weights have a kernel in their stored form too
    with mock.patch.object(products, "is_stored_for_core", return_value=False):
        return output(stored(model))


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """float32 outputs of a model by the kernels, and of its dense twin.

    Each product rounds its inputs, by 2.4e-7 of the largest (`assert_products_near`), and float32
    sums are off by as much: with the 14 products and more of a tiny model, 3e-6 and more.
    """
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def assert_products_near(model: nn.Module) -> None:
    """What the kernels multiply in this model is, product by product, x W^T.

    By the definition (kernels.quantize) each x is off by at most absmax(x) / 2^22, so y by

        absmax(x) / 2^22 * sum of |W| over the row

    and by three times as much if all 12 float32 roundings (2^-24 each) on the way of the first of 8
    groups add. A trit that is not the right one makes hundreds of times the sum of both.
    """
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        for leaf, layout in module.layouts.items() if isinstance(module, Packed) else ():
            if layout.lanes is None:
                continue
            packed, scale = getattr(module, leaf), getattr(module, f"{leaf}_scale")
            layout = replace(layout, activations="none", rotation=(0, 0))
            x = torch.randn(3, layout.cols, generator=generator)
            limit = x.abs().amax(-1, keepdim=True).double() * 2.0**-20
            experts = zip(packed, scale, strict=True) if packed.ndim == 2 else [(packed, scale)]
            for lanes, scales in experts:
                w = dense_matrix(lanes, scales, layout, torch.float64)
                error = (products.product(x, lanes, scales, None, layout) - x.double() @ w.T).abs()
                assert bool((error <= limit * w.abs().sum(-1)).all()), f"{name}.{leaf}"


def assert_like_dense(model: Any, dense: PreTrainedModel, exact: bool = True) -> None:
    """A model as it was loaded, in float32, is near its dense twin, and in the stored form equal.

    exact  the stored form is equal bit by bit; False where the twin computes x @ W, which sums in
           another order

    Leaves the model in the stored form.
    """
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    linears = [m for m in packed if not isinstance(m, PackedEmbedding)]
    layouts = [layout for module in linears for layout in module.layouts.values()]
    ternary = [layout for layout in layouts if layout.codec == BASE3]
    assert not ternary or any(layout.lanes for layout in ternary) == (lib is not None)
    theirs = output(dense)
    assert_near(output(model), theirs)
    assert_products_near(model)
    ours = dequantized_output(model)
    if exact:
        assert torch.equal(ours, theirs)
    else:
        assert_near(ours, theirs, 2e-6)
