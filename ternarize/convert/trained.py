"""Models that were trained with `ternarize.qat`, packed: their trits and scales as they are.

The model is saved beside the output with the values that its forward multiplies by, s t, in the
place of its latent weights, and that is converted: matrices that are ternary already lose nothing.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.convert.run import convert
from ternarize.errors import OutputError, UsageError
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

    The trits and scales are those of the model's last forward in eval mode, bit for bit: nothing is
    rounded a second time. (The scales of groups of zeros alone become 0.)

    model      of transformers, prepared by `ternarize.qat.prepare`; as it is, compiled, or in DDP.
               Cut by FSDP2, every process has to call. Of several the first one writes, and the
               others return {}
    output     directory that must not exist yet
    tokenizer  saved with it, if given
    dtype      of what stays dense: float32, float16, bfloat16; None: as the model has it

    Raises UsageError for a model that is not prepared, or in the midst of a `Schedule`; OutputError
    where `output` exists; and what `convert` raises.
    """
    model = inner_model(model)
    forms = {
        f"{path}.{leaf}": form
        for path, module in latent_modules(model)
        for leaf, form in module.forms.items()
    }
    _check(model, forms)
    state = dense_state(model)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return {}
    output = Path(output).expanduser()
    if output.exists():
        raise OutputError(output, "exists already", "a new directory", "Name another, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(model, forms, dtype)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        _set_dtype(Path(folder) / "config.json", model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return convert(folder, output, recipe, threads=threads, forms=forms)


def inner_model(model: Any) -> nn.Module:
    """The model that torch.compile or DDP has wrapped."""
    wrappers = (torch._dynamo.OptimizedModule, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers):
        model = model._orig_mod if isinstance(model, wrappers[0]) else model.module
    inner: nn.Module = model
    return inner


def _check(model: nn.Module, forms: dict[str, Form]) -> None:
    """Raise UsageError for a model that cannot be packed, or not yet."""
    name = type(model).__name__
    if not forms:
        raise UsageError(
            name,
            "has no weights that are trained to be ternary",
            "a prepared model",
            "Call ternarize.qat.prepare(model), and train it",
        )
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            name,
            "has adapters" if hasattr(model, "peft_config") else "is no PreTrainedModel",
            "a model of transformers",
            "Call model.unload() for the model beneath them"
            if hasattr(model, "peft_config")
            else "Use ternarize.pack_module, which takes any module",
        )
    check_ended(model)


def check_ended(model: nn.Module) -> None:
    """Raise UsageError for a model in the midst of a `Schedule`, which is not ternary yet."""
    if any(module.blend is not None for _, module in latent_modules(model)):
        raise UsageError(
            type(model).__name__,
            "is still partly dense: its Schedule has not come to its end",
            "ternary weights",
            "Call schedule.at(1), or train to the end",
        )


def _set_dtype(config: Path, model: nn.Module) -> None:
    """Say the dtype in which the model computes, not the one of its latent weights."""
    dtypes = {module.compute_dtype for _, module in latent_modules(model)}
    table = json.loads(config.read_text("utf-8"))
    if len(dtypes) == 1:
        table["dtype"] = str(dtypes.pop())[6:]
    config.write_text(json.dumps(table, indent=2) + "\n", "utf-8")


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
def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with s t, float32, for latent weights; without their learned scales."""
    state: dict[str, Tensor] = {}
    latents = {
        f"{path}.{leaf}": (module, leaf)
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in getattr(module, "forms", {})
    }
    for name, value in model.state_dict().items():
        if name in latents:
            module, leaf = latents[name]
            form = module.forms[leaf]
            trits, scales = module.trits_and_scales(leaf)
            ternary = scaled(trits, scales, form.group_size)
            state[name] = form.turn(ternary).contiguous()
        elif not name.endswith(LOG_SCALE):
            state[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return state
