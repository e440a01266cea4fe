"""Models that were trained with `ternarize.qat`, packed: their trits and scales as they are.

The model is saved beside the output with the values that its forward multiplies by, s t, in the
place of its latent weights, and that is converted: matrices that are ternary already lose nothing.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.convert.run import convert
from ternarize.errors import UsageError
from ternarize.plans.recipe import Recipe
from ternarize.qat.modules import LOG_SCALE, latent_modules
from ternarize.qat.rounding import Form
from ternarize.threads import THREADS
from ternarize.trits.ternary import scaled


def pack_trained(
    model: nn.Module,
    output: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str | None = None,
    threads: int = THREADS,
) -> dict[str, Any]:
    """Write a prepared and trained model as a packed checkpoint, and return its record.

    The trits and scales are those of the model's last forward, bit for bit: nothing is rounded a
    second time. (The scales of groups of zeros alone become 0.)

    model      of transformers, prepared by `ternarize.qat.prepare`, in eval mode or not
    output     directory that must not exist yet
    tokenizer  saved with it, if given
    dtype      of what stays dense: float32, float16, bfloat16; None: as the model has it

    Raises UsageError for a model that is not prepared, or in the midst of a `Schedule`; and what
    `convert` raises.
    """
    forms = {
        f"{path}.{leaf}": form
        for path, module in latent_modules(model)
        for leaf, form in module.forms.items()
    }
    if not forms or not isinstance(model, PreTrainedModel):
        raise UsageError(
            type(model).__name__,
            "has no weights that are trained to be ternary"
            if not forms
            else "is no PreTrainedModel",
            "a model of transformers, prepared",
            "Call ternarize.qat.prepare(model), and train it",
        )
    if any(module.blend is not None for _, module in latent_modules(model)):
        raise UsageError(
            type(model).__name__,
            "is still partly dense: its Schedule has not come to its end",
            "ternary weights",
            "Call schedule.at(1), or train to the end",
        )
    output = Path(output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(model, forms, dtype)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        model.save_pretrained(folder, state_dict=_dense_state(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return convert(folder, output, recipe, threads=threads, forms=forms)


def _recipe(model: Any, forms: dict[str, Form], dtype: str | None) -> Recipe:
    """What makes a conversion take the same matrices as `prepare` did."""
    prepared: Recipe = model.ternarize_recipe
    eight = {form.scale_dtype == "U8" for form in forms.values()} == {True}
    activations = {module.activations for _, module in latent_modules(model)}
    return replace(
        prepared,
        dtype=dtype,
        scale_bits=8 if eight else 16,
        activations="int8" if "int8" in activations else "none",
    )


@torch.no_grad()
def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with s t, float32, for latent weights; without their learned scales."""
    state = {n: v for n, v in model.state_dict().items() if not n.endswith(LOG_SCALE)}
    for path, module in latent_modules(model):
        for leaf, form in module.forms.items():
            trits, scales = module.trits_and_scales(leaf)
            state[f"{path}.{leaf}"] = form.turn(scaled(trits, scales, form.group_size)).contiguous()
    return state
