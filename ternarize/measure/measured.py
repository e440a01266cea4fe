"""A checkpoint that is to be measured: packed, ordinary, or in a format of others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.json_files import read_config
from ternarize.files.metadata import KEY
from ternarize.models.configuration import class_of, config_from, open_config, usable
from ternarize.models.places import locate_tensors
from ternarize.models.reads import (
    CAUSAL,
    ENCODER,
    ENCODER_DECODER,
    SPEECH,
    TENSORS,
    arguments,
    has_tokenizer,
    hears,
    kind_of,
    looks_back,
    no_tokenizer,
    open_tokenizer,
    vocabulary_size,
)
from ternarize.runtime.load import load
from ternarize.sources.checkpoint import locate
from ternarize.sources.imports import find_gguf, open_source
from ternarize.sources.imports.common import Imported

SUPPORTED = "causal language models and text encoders can be evaluated, and speech recognisers"


@dataclass(frozen=True)
class Measured:
    """A checkpoint before its weights are loaded."""

    directory: Path
    config: Any
    model_class: Any
    kind: str
    packed: bool
    reader: Checkpoint | None = None  # of its tensors, where transformers cannot by itself

    @staticmethod
    def at(model: str | Path) -> "Measured":
        """Find a checkpoint and what can be measured of it; raises CheckpointError."""
        directory, table, reader = look(model)
        if table is None:
            raise CheckpointError(
                directory,
                "no config.json",
                "a Hugging Face checkpoint",
                "Copy config.json from the source of the model",
            )
        if reader is None:
            config = open_config(directory)
        else:  # without the quantization that it is stored in
            with usable(directory / "config.json"):
                config = config_from(table)
        model_class = class_of(config)
        if model_class is None:
            raise CheckpointError(
                directory / "config.json",
                f"architectures {config.architectures}",
                f"a model class of transformers {transformers.__version__}",
                "Code that comes with a checkpoint is not run here; install the version that has "
                "the class",
            )
        kind = measured_kind(model_class, config)
        return Measured(directory, config, model_class, kind, _is_packed(table), reader)

    def load(
        self,
        device: str,
        dtype: torch.dtype | None,
        activations: str | None = None,
        head: str | None = None,
    ) -> Any:
        """The model in eval mode; an ordinary checkpoint must have every weight."""
        if self.packed:
            return load(
                self.directory, device=device, dtype=dtype, activations=activations, head=head
            )
        if head is not None:
            raise UsageError(
                "head",
                f"{head!r}, but {self.directory} is not packed",
                "a packed checkpoint",
                "Leave head out",
            )
        options: dict[str, Any] = {"device_map": device} if device == "auto" else {}
        source = self.reader
        if source is not None:  # as what it decodes to: not all such formats run everywhere
            options["config"] = self.config
            options["state_dict"] = {
                name: source.read(name).view(info.shape) for name, info in source.tensors.items()
            }
        with usable(self.directory):
            model, info = self.model_class.from_pretrained(
                self.directory if source is None else None,
                dtype=dtype or "auto",
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
        # transformers fills what is missing with random numbers; only a pooler is not used here
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name.split("."))
        if missing:
            raise CheckpointError(
                self.directory,
                f"{len(missing)} weights are missing, first {missing[0]}",
                f"all of {self.model_class.__name__}",
                "Complete the checkpoint",
            )
        if isinstance(source, Imported) and source.activations == "int8":
            for place in locate_tensors(model, source.group_sizes).values():
                for parameter in place.parameters:
                    module = model.get_submodule(parameter.rpartition(".")[0])
                    module.register_forward_pre_hook(_round_input)
        return model if device == "auto" else model.to(device)


def kinds_of(packed: str | Path) -> tuple[str | None, str | None]:
    """What is measured of a packed model (CAUSAL, ENCODER, SPEECH), and what it reads (`kind_of`).

    None for what is not measured, as a text model without a tokenizer; twice where transformers has
    no class of the model.
    """
    try:
        config = open_config(Path(packed))
    except CheckpointError:
        return None, None
    model_class = class_of(config)
    if model_class is None:
        return None, None
    reads = kind_of(model_class, config)
    try:
        measured = measured_kind(model_class, config)
    except CheckpointError:
        return None, reads
    return measured if measured == SPEECH or has_tokenizer(Path(packed)) else None, reads


def open_pair(packed: str | Path, source: str | Path | None) -> list[Measured]:
    """A model, and its source if there is one; UsageError where that is of another kind."""
    checkpoints = [Measured.at(path) for path in (packed, source) if path is not None]
    ours = checkpoints[0]
    for theirs in checkpoints[1:]:
        for of in (_kind_of, _vocabulary_of):
            if of(ours) != of(theirs):
                raise UsageError(
                    theirs.directory,
                    f"is {of(theirs)} and {ours.directory} {of(ours)}",
                    "the model and its source",
                    "Name the source that was converted",
                )
    return checkpoints


def _kind_of(checkpoint: Measured) -> str:
    return f"an {checkpoint.kind}" if checkpoint.kind == ENCODER else f"a {checkpoint.kind}"


def _vocabulary_of(checkpoint: Measured) -> str:
    return f"of a vocabulary of {vocabulary_size(checkpoint.config)} tokens"


def look(model: str | Path) -> tuple[Path, dict[str, Any] | None, Checkpoint | None]:
    """Directory and config.json of a checkpoint, and what reads it if transformers cannot."""
    if find_gguf(model) is None:
        directory = locate(model)
        table = read_config(directory)
        if table is None or _is_packed(table):
            return directory, table, None
    # without weights it is found out later, and by whom it concerns
    source = open_source(model, config_only=True)
    foreign = isinstance(source, Imported) or source.names_changed
    return source.directory, source.config, source if foreign else None


def _is_packed(table: dict[str, Any]) -> bool:
    found = table.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == KEY


def _round_input(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round the input of a layer to int8 per token: BitNet b1.58, equation 4 of BitNet's paper.

    https://arxiv.org/abs/2310.11453
    """
    x = inputs[0].float()
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return ((x * scale).round().clamp(-128, 127).div(scale).to(inputs[0].dtype), *inputs[1:])


def measured_kind(model_class: Any, config: Any) -> str:
    """CAUSAL, ENCODER or SPEECH: what is measured of a model; raises CheckpointError for any other.

    A model that reads a text and generates is a language model, one that has no task head (no
    labels) an encoder.
    """
    if hears(model_class):
        return SPEECH
    kind, takes = kind_of(model_class, config), arguments(model_class)
    if "decoder_input_ids" in takes:
        what = f"an {ENCODER_DECODER} model, not yet supported"
    elif "input_ids" not in takes:
        what = "a model of images or audio"
    elif kind == CAUSAL and model_class.can_generate():
        if looks_back(config):
            return CAUSAL
        # BERT's language-model head on an encoder that also looks ahead
        what = "a language-model head on an encoder that sees the words it predicts"
    elif kind != TENSORS and "labels" not in takes and "pixel_values" not in takes:
        return ENCODER
    else:
        what = "a model with another head, or of several modalities"
    raise CheckpointError(
        model_class.__name__,
        f"is {what}; {SUPPORTED}",
        remedy="Measure it with the tools of its own task",
    )


def shared_tokenizer(checkpoints: Sequence[Measured]) -> Any:
    """The tokenizer of the first checkpoint that has one, usually the packed model's own copy."""
    for checkpoint in checkpoints:
        if has_tokenizer(checkpoint.directory):
            return open_tokenizer(checkpoint.directory)
    raise no_tokenizer(checkpoints[0].directory)


def fast_dtype(device: str) -> torch.dtype:
    """In which products are fast: bfloat16 on GPUs and on CPUs with AMX or AVX-512 BF16."""
    if device != "cpu":
        return torch.bfloat16
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def compute_dtype(dtype: str | torch.dtype | None, device: str | None) -> torch.dtype | None:
    """The dtype to compute in; None: as in the checkpoint. Raises UsageError."""
    if dtype is None:
        return torch.float32 if device in (None, "cpu") else None
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError("dtype", f"{dtype!r}", "one of float32, float16, bfloat16")
    return found
