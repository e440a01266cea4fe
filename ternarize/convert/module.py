"""A module of torch's that is none of transformers', packed: its state dict, and a rule.

The state dict lies beside the output while it is converted, like any checkpoint. What it is packed
into is loaded by `ternarize.runtime.load_module`.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ternarize.convert.run import convert
from ternarize.convert.trained import check_ended, dense_state, inner_model
from ternarize.errors import OutputError, SelectionError, UsageError
from ternarize.files.headers import DTYPE_NAMES
from ternarize.files.names import MODULE, SAFETENSORS
from ternarize.plans.choose import select
from ternarize.plans.judge import Verdict
from ternarize.plans.judge_module import SMALLEST, judge_module
from ternarize.plans.recipe import Recipe
from ternarize.plans.rules import rules_of
from ternarize.qat.modules import latent_modules
from ternarize.qat.rounding import Form
from ternarize.runtime.forms import dense_weight
from ternarize.runtime.modules.convolution import TernaryConv2d
from ternarize.runtime.modules.embedding import PackedEmbedding
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import packed_modules
from ternarize.threads import THREADS
from ternarize.trits.base3 import BASE3


def pack_module(
    module: nn.Module,
    output: str | Path,
    *,
    method: str = "itf",
    group_size: int | None = None,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    embeddings: str | None = None,
    smallest: int = SMALLEST,
    scale_bits: int = 16,
    activations: str | None = None,
    dtype: str | None = None,
    codec: str = "base3",
    threads: int = THREADS,
) -> dict[str, Any]:
    """Write the state dict of any module as a packed checkpoint, and return its record.

    module       of torch's, also compiled or in DDP; as `ternarize.qat.prepare` has made it, its
                 trits and scales are those of its forward; as `load_module` has, those of the file
    output       directory that must not exist yet; its parents are made
    method       "itf", "twn" or "absmean"
    group_size   weights per scale; -1: one group per row; 0: one scale per tensor; None: 128, of
                 weights that are ternary already their own
    keep         globs on names of the state dict (with .weight): linear weights that stay
    include      likewise: those of fewer weights than `smallest`, which become ternary all the
                 same, and tables (nn.Embedding, nn.EmbeddingBag)
    embeddings   what becomes of tables that no glob names: "ternary", "int8", "int4"; None: kept
    smallest     weights of a linear layer that becomes ternary by default, and of such a table
    scale_bits   of a scale: 16 or 8
    activations  recorded for the loader: "int8" or "none"; None: as the module was trained, or none
    dtype        of what is kept: float32, float16, bfloat16; None: as the module has it
    codec        how ternary tensors are stored: "base3" or, by their frequencies, "rans"

    Of a module with latent or packed weights it is these that are packed, and nothing else but
    tables, by `embeddings`. Convolutions are packed where they are most of the weights
    (`plans.judge_module` has the reasons). A tensor with several names is stored once. Raises
    UsageError, SelectionError, WeightError and OutputError as `convert` does, the first also for a
    state dict that holds more than tensors.
    """
    module = inner_model(module)
    name = type(module).__name__
    check_ended(module)
    forms = _forms(module)
    if activations is None:
        trained = {latent.activations for _, latent in latent_modules(module)}
        activations = "int8" if "int8" in trained else "none"
    verdicts = judge_module(module, smallest)
    if forms:
        verdicts = {each: _as_it_is(each, verdict, forms) for each, verdict in verdicts.items()}
    recipe = Recipe(
        method,
        group_size,
        keep=tuple(keep),
        include=tuple(include),
        embeddings=embeddings,
        scale_bits=scale_bits,
        activations=activations,
        dtype=dtype,
        codec=codec,
    )
    state = _state(module, verdicts)
    shapes = {each: tuple(tensor.shape) for each, tensor in state.items()}
    choices = select(shapes, None, rules_of(recipe), verdicts=verdicts)
    if not any(choice.codec for choice in choices):
        raise SelectionError(
            name,
            f"none of its {len(choices)} tensors becomes ternary",
            f"linear layers or convolutions of {smallest} weights or more",
            "Name others with include, or keep less; tables are packed by embeddings",
        )
    output = Path(output).expanduser()
    if output.exists():
        raise OutputError(output, "exists already", "a new directory", "Name another, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        save_file(state, Path(folder) / SAFETENSORS, {"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps({MODULE: name}), "utf-8")
        return convert(folder, output, recipe, threads=threads, forms=forms, verdicts=verdicts)


def _forms(module: nn.Module) -> dict[str, Form]:
    """How weights lie that are latent, or packed already, by name; raises UsageError."""
    forms = {
        f"{path}.{leaf}": form
        for path, each in latent_modules(module)
        for leaf, form in each.forms.items()
    }
    for path, packed in packed_modules(module).items():
        for leaf, layout in packed.layouts.items():
            plain = isinstance(packed, (TernaryLinear, TernaryConv2d, PackedEmbedding))
            if not plain or layout.codec != BASE3 or layout.planes > 1 or layout.rotation[0]:
                raise UsageError(
                    f"{path}.{leaf}",
                    "is packed in a form that `pack_module` does not take again",
                    "one ternary matrix that is not rotated",
                    "Copy the directory that it was loaded from",
                )
            scale = packed.state_dict()[f"{leaf}_scale"]
            name = DTYPE_NAMES[scale.dtype]
            form = Form(layout.group_size, scale_dtype=name, kernel=layout.kernel)
            forms[f"{path}.{leaf}"] = form
    return forms


def _as_it_is(name: str, verdict: Verdict, forms: dict[str, Form]) -> Verdict:
    """The verdict where the module itself says what is ternary."""
    if name in forms:
        why = "ternary in the module"
        kernels = forms[name].kernel != ()
        return Verdict(True, why, possible=True, parameters=(name,), convolution=kernels)
    return replace(verdict, ternary=False, possible=False)


@torch.no_grad()
def _state(module: nn.Module, verdicts: dict[str, Verdict]) -> dict[str, Tensor]:
    """What is stored, by name, dense, on the CPU, and no memory twice."""
    given = dense_state(module)
    packed: Any  # linear layers, convolutions and tables: `_forms` has seen to that
    for path, packed in packed_modules(module).items():
        del given[f"{path}.weight_scale"]
        weight, scale = packed.pair("weight")
        layout = packed.layouts["weight"]
        dense = dense_weight(weight, scale, layout, torch.float32)
        if layout.kernel:
            dense = torch.unflatten(dense, 1, layout.kernel)
        given[f"{path}.weight"] = dense
    state, seen = {}, set[int]()
    for name in (each for each in verdicts if each in given):
        if given[name].is_meta:
            raise UsageError(name, "is on meta", "a tensor in memory", "Load the weights first")
        tensor = given[name].detach().to("cpu").contiguous()
        memory = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return state
