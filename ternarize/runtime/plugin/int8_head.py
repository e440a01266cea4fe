"""An output head that is rounded to 8 bits as the model is loaded: `head="int8"`."""

from typing import Any

import torch
from torch import nn

from ternarize.errors import FormatError, UsageError, WeightError
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.models.skeleton import end_family
from ternarize.runtime.forms import Layout
from ternarize.runtime.modules.embedding import packed_embedding
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.trits.int8 import INT8, INT8_GROUP_SIZE, rows_to_int8


def head_to_round(model: Any) -> set[str]:
    """The output head of a model that is still empty, and what is tied to it.

    Raises UsageError where `convert --head int8` could not pack it.
    """
    family, why = end_family(model, "head")
    if not family or why:
        raise UsageError(
            f"head int8: {type(model).__name__}",
            f"{min(family)} cannot be packed ({why})" if family else "there is none to be packed",
            "an output head that only multiplies",
            "Leave head out",
        )
    return family


def round_head(model: Any, family: set[str]) -> None:
    """Hold an output head, and what is tied to it, as `convert --head int8` would store it."""
    first = min(family)
    weight = model.get_parameter(first)
    if weight.is_meta or hasattr(weight, "to_local"):
        where = "offloaded" if weight.is_meta else "spread over processes"
        raise UsageError(
            first,
            f"is {where}; it has to be in memory to become int8",
            remedy="Leave head out, or convert with --head int8",
        )
    try:
        q, scale = rows_to_int8(weight.detach())
    except WeightError as error:
        raise FormatError(first, *error.args[1:]) from None
    layout = Layout(weight.shape[1], INT8_GROUP_SIZE, codec=INT8)
    shared = [nn.Parameter(tensor, requires_grad=False) for tensor in (q, scale)]
    tied = model.all_tied_weights_keys
    for name in sorted(family):
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        hook = _taken_hook(module)
        with torch.device("meta"):
            if isinstance(module, nn.Embedding):
                packed_embedding(module, layout, len(scale), scale.dtype)
            else:
                linear = TernaryLinear(
                    layout.cols, len(q), scale_dtype=scale.dtype, **layout.options
                )
                linear.bias = module.bias
                model.set_submodule(path, linear.train(module.training))
                module = linear
        module.weight, module.weight_scale = shared
        for parameter in shared:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if hook is not None:
            from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

            add_hook_to_module(module, hook)
        if name in tied:
            tied[name + SCALE_SUFFIX] = tied[name] + SCALE_SUFFIX


def _taken_hook(module: nn.Module) -> Any:
    """The hook of accelerate on a module (of a model that is spread over devices), taken off.

    It holds the forward of the class that the module had when the hook was put there.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)  # else it stays there, bound to the class
    return hook
