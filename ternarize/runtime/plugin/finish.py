"""After the fill: a model to be used, packed or made dense again."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ternarize.errors import UsageError
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.runtime.forms import check_part
from ternarize.runtime.modules.convolution import TernaryConv2d, dense_convolution
from ternarize.runtime.modules.embedding import PackedEmbedding, dense_embedding
from ternarize.runtime.modules.experts import TernaryExperts, dense_experts
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import Scale, packed_modules


def dtypes_of_kept(model: Any) -> dict[str, torch.dtype]:
    """By name, the dtype that each floating-point parameter of a model that is empty is to have."""
    scales = {
        f"{path}.{n}{SCALE_SUFFIX}" for path, m in packed_modules(model).items() for n in m.layouts
    }
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in scales:
            plan = model._get_dtype_plan(parameter.dtype)
            planned = (plan[key] for key in plan if re.search(key.replace("*", ".*"), name))
            found[name] = next(planned, parameter.dtype)
    return found


def cast_kept(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters the dtypes that they are to have: what transformers < 5.21 leaves undone.

    It leaves a tensor whose name on disk is another in the dtype of the file.
    """
    for name, dtype in dtypes.items():
        parameter = model.get_parameter(name)
        if parameter.dtype != dtype and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)


def zero_missing_biases(model: Any, missing: Iterable[str]) -> None:
    """Zero biases that the source lacked in packed modules.

    transformers fills those of its own classes; to it ours are filled, and the memory is new.
    """
    modules = packed_modules(model)
    for name in missing:
        path, _, leaf = name.rpartition(".")
        value = getattr(modules.get(path), leaf, None)
        if value is not None and not value.is_meta:
            value.data.zero_()


def check_filled(model: Any) -> None:
    """Refuse parameters that were cut where they cannot be (UsageError); mark scales as such."""
    for path, module in packed_modules(model).items():
        for name, layout in module.layouts.items():
            packed, scale = getattr(module, name), getattr(module, name + SCALE_SUFFIX)
            check_part(f"{path}.{name}", packed, scale, layout)
            scale.requires_grad_(False)
            if type(scale) is nn.Parameter:
                scale.__class__ = Scale


def keep_sizes(model: Any) -> None:
    """Make `resize_token_embeddings` refuse where an embedding is packed."""
    if any(isinstance(module, PackedEmbedding) for module in model.modules()):
        for module in model.modules():
            if hasattr(module, "resize_token_embeddings"):
                module.resize_token_embeddings = functools.partial(_keep_size, module)


def _keep_size(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """What `resize_token_embeddings` does where the embedding is packed."""
    embedding = model.get_input_embeddings()
    multiple = kwargs.get("pad_to_multiple_of") or (args[0] if args else None)
    if multiple or new_num_tokens not in (None, embedding.num_embeddings):
        raise UsageError(
            type(model).__name__,
            f"its token embedding is packed and keeps its {embedding.num_embeddings} rows",
            "no resize_token_embeddings",
            "Load the model with dequantize=True, or convert it with --embeddings keep",
        )
    return embedding


def make_dense(model: Any, dtype: torch.dtype | None = None) -> None:
    """Replace ternary modules by what the architecture has in their place.

    dtype  of the dense weights; None: the model's
    """
    for name, module in packed_modules(model).items():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            raise UsageError(
                name,
                "is offloaded; a dense copy needs it in memory",
                remedy="Load the model without offloading to dequantize it",
            )
        if isinstance(module, TernaryExperts):
            dense_experts(module, dtype or model.dtype)
        elif isinstance(module, PackedEmbedding):
            dense_embedding(module, dtype or model.dtype)
        elif isinstance(module, TernaryConv2d):
            model.set_submodule(name, dense_convolution(module, dtype or model.dtype))
        elif isinstance(module, TernaryLinear):
            model.set_submodule(name, _dense_linear(module, dtype or model.dtype))
    tied = model.all_tied_weights_keys
    scales = {name + SCALE_SUFFIX for name in tied}
    model.all_tied_weights_keys = {name: to for name, to in tied.items() if name not in scales}
    model.tie_weights(recompute_mapping=False)
    for module in model.modules():
        module.__dict__.pop("resize_token_embeddings", None)


def _dense_linear(module: TernaryLinear, dtype: torch.dtype) -> nn.Module:
    weight = module.dequantized(dtype)
    with torch.device("meta"):
        dense: Any
        if module.transposed:
            conv1d: Any = Conv1D
            dense, weight = conv1d(module.out_features, module.in_features), weight.T.contiguous()
        else:
            bias = module.bias is not None
            dense = nn.Linear(module.in_features, module.out_features, bias)
    dense.weight = nn.Parameter(weight)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    result: nn.Module = dense.train(module.training)
    return result
