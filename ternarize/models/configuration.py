"""A model's configuration and class, as transformers reads them from a config.json."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from ternarize.errors import CheckpointError, TernarizeError, first_line, is_no_memory


@contextmanager
def in_one_line(
    where: object, failed: str, expected: str, remedy: str, *but: type[Exception]
) -> Iterator[None]:
    """Turns whatever code of others raises inside into a CheckpointError of one line.

    failed  what it could not do, in words
    but     what goes on as it is, as do our own errors, and what the machine lacks
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (TernarizeError, *but)) or is_no_memory(error):
            raise
        what = f"{failed} ({type(error).__name__}: {first_line(error)})"
        raise CheckpointError(where, what, expected, remedy) from error


def usable(where: Path) -> AbstractContextManager[None]:
    """Inside, transformers reads a checkpoint, and raises whatever a wrong value leads to."""
    return in_one_line(
        where,
        f"transformers {transformers.__version__} cannot use it",
        "a complete checkpoint",
        "Repair it, or install what it needs",
    )


def open_config(directory: Path) -> PretrainedConfig:
    """The configuration of a checkpoint, without code of its own; raises CheckpointError."""
    with usable(directory / "config.json"):
        found: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=False
        )
        return found


def class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The first of a configuration's architectures that is a model of transformers."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, PreTrainedModel):
            return found
    return None


def config_from(table: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that a config.json describes, as transformers reads that file.

    A number that JSON does not have stands there as {"__float__": "Infinity"}.
    Raises whatever the class of configuration makes of a wrong value.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            number = value.get("__float__") if len(value) == 1 else None
            if number in ("Infinity", "-Infinity", "NaN"):
                return float(number)
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    found: PretrainedConfig = CONFIG_MAPPING[table["model_type"]].from_dict(plain(dict(table)))
    return found


_TEXT_CONFIGS = ("text_config", "text_encoder", "decoder", "generator")


def modalities(config: PretrainedConfig, model: nn.Module) -> tuple[set[type], set[type]]:
    """Classes of configurations: of the text models, of the encoders of other modalities.

    The others are the sub-configurations beside the text one. A model without a text configuration
    (ViT, Whisper, a detector with a backbone) has one modality, its own.
    """
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    text = {type(parts[name]) for name in _TEXT_CONFIGS if parts.get(name) is not None}
    if type(found := text_config(config)) is not type(config):
        text.add(type(found))
    others: set[type] = set()
    for name, part in parts.items() if text else ():
        if not isinstance(part, PretrainedConfig) or type(part) in text:
            continue
        deeper_text, deeper_others = modalities(part, model)
        if deeper_text:
            text, others = text | deeper_text, others | deeper_others
        elif name.startswith("encoder") and _reads_text(part, model):
            text.add(type(part))
        else:
            others.add(type(part))
    return text, others - text - {type(config)}


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text model in a composite one, else the configuration's own kind."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several: none is the one
        return config


def _reads_text(config: PretrainedConfig, model: nn.Module) -> bool:
    """Whether the sub-model of this configuration takes token ids (a text encoder-decoder)."""
    return hasattr(config, "vocab_size") and any(
        isinstance(m, PreTrainedModel)
        and type(m.config) is type(config)
        and m.main_input_name == "input_ids"
        for m in model.modules()
    )


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The floating-point dtype that config.json states, for the model or for its text model."""
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                found: torch.dtype = dtype
                return found
    return torch.float32


def pruned(table: Any, drop: Callable[[str, Any], bool]) -> Any:
    """A configuration without the members, at any depth, of whose key and value `drop` is true."""
    if isinstance(table, list):
        return [pruned(each, drop) for each in table]
    if not isinstance(table, Mapping):
        return table
    return {key: pruned(value, drop) for key, value in table.items() if not drop(key, value)}
