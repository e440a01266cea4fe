"""Models drawn at random from a configuration: dense, or in the trits that a seed gives.

Of the second kind a journal says all: each matrix of a linear layer and each embedding is drawn in
trits from the seed, with one scale by which products keep the variance of their inputs,

    s = 1 / sqrt(cols share),    share of the trits that are not 0

(LeCun's initialization); rows of an embedding have the variance 1 where nothing multiplies them
afterwards. Of all other tensors the architecture says what they begin with: zeros or ones.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ternarize.errors import CheckpointError, SelectionError
from ternarize.files.json_files import read_config
from ternarize.files.sums import sha256
from ternarize.models.configuration import class_of, open_config, pruned, usable
from ternarize.models.places import locate_tensors
from ternarize.models.reads import TOKENIZER_FILES, has_tokenizer, no_tokenizer
from ternarize.models.skeleton import Skeleton
from ternarize.sources.checkpoint import locate
from ternarize.steps.journal import JournalHeader
from ternarize.steps.start import CODE, StartModel

START_ZEROS = 1 << 30  # of 2^31: half of the trits of a start
_OCTAVE = 32  # exponents that double a scale
# what belongs beside the weights; a folder can hold anything else, texts to train on for one
_FILES = (
    *TOKENIZER_FILES,
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)


def drawn_model(folder: Path, seed: int) -> Any:
    """A dense model of a configuration, with the weights that its architecture draws.

    Raises CheckpointError for a folder without a tokenizer, or a class of transformers.
    """
    config = open_config(folder)
    if not has_tokenizer(folder):
        raise no_tokenizer(folder)
    model_class: Any = class_of(config)
    if model_class is None:
        raise CheckpointError(
            folder / "config.json",
            f"architectures {config.architectures}",
            "a model class of transformers",
            'Name one, for instance ["LlamaForCausalLM"]',
        )
    with usable(folder / "config.json"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def drawn_header(folder: str | Path, seed: int, group_size: int) -> JournalHeader:
    """The header of a journal that is a whole model, from its seed on.

    folder      with config.json, which names the architecture, and the files of a tokenizer
    group_size  of all its matrices, as in trits/ternary.py

    Raises CheckpointError as `drawn_model` and for a configuration that JSON cannot say,
    SelectionError for a tensor that can be neither drawn nor said.
    """
    folder = locate(folder, config_only=True)
    model = drawn_model(folder, 0)
    skeleton = Skeleton(model)
    unsaved = {*(model._keys_to_ignore_on_save or ()), *skeleton.tied}
    stored = {name: value for name, value in model.state_dict().items() if name not in unsaved}
    on_disk: dict[str, Tensor] = revert_weight_conversion(model, stored)
    places = locate_tensors(model, on_disk)
    multiplied = _multiplied(skeleton)
    tensors, exponents, constants = [], [], []
    for name, value in on_disk.items():
        place = places[name]
        alone = place.converter is None and len(place.parameters) == 1
        module = _module_of(skeleton, place.parameters[0]) if alone else None
        numbers = [n for n in (0, 1) if value.numel() and bool((value == n).all())]
        if module is not None and value.ndim == 2:
            looked_up = isinstance(module, nn.Embedding) and not multiplied
            tensors.append((name, (value.shape[0], value.shape[1]), group_size))
            exponents.append(_exponent(1 if looked_up else value.shape[1]))
        elif value.is_floating_point() and numbers:
            constants.append((name, tuple(value.shape), numbers[0]))
        else:
            where = place.targets[0].rpartition(".")[0]
            raise _unsaid(name, value, skeleton.modules.get(where))
    if not tensors:
        raise SelectionError(folder, "a model without matrices", "some", "Name another")
    files = {n: sha256(folder / n) for n in _FILES if (folder / n).is_file()}
    told = StartModel(tuple(exponents), tuple(constants), _config_of(folder), files)
    return JournalHeader(seed, START_ZEROS, tuple(tensors), model=told)


def _unsaid(name: str, value: Tensor, module: object) -> SelectionError:
    return SelectionError(
        name,
        f"{list(value.shape)} of a {type(module).__name__} begins as neither zeros nor ones, and "
        "is no matrix of a linear layer or an embedding by itself",
        "nothing else in a model from a seed",
        "Use `ternarize train --from-scratch`",
    )


def _config_of(folder: Path) -> dict[str, Any]:
    """What a journal says of config.json; CheckpointError where JSON cannot say it."""
    config: dict[str, Any] = pruned(
        read_config(folder) or {}, lambda key, _: key in ("_name_or_path", CODE)
    )
    config.pop("quantization_config", None)
    try:
        json.dumps(config, allow_nan=False)
    except ValueError:
        raise CheckpointError(
            folder / "config.json",
            "has a number that is not finite",
            "finite numbers, which JSON can say",
            "Repair it",
        ) from None
    return config


def _module_of(skeleton: Skeleton, parameter: str) -> nn.Module | None:
    """The linear layer or embedding whose weight a parameter is, if it can be packed."""
    if skeleton.unpackable(skeleton.family(parameter)):
        return None
    return skeleton.modules[parameter.rpartition(".")[0]]


def _multiplied(skeleton: Skeleton) -> bool:
    """Whether rows of embeddings are multiplied by: by the head, or by a number when looked up."""
    tables = [m for m in skeleton.modules.values() if isinstance(m, nn.Embedding)]
    heads = {name for path in skeleton.heads for name in skeleton.family(f"{path}.weight")}
    tied = any(skeleton.modules.get(name.rpartition(".")[0]) in tables for name in heads)
    return tied or any(hasattr(module, "embed_scale") for module in tables)


def _exponent(inputs: int) -> int:
    """That of the scale 1 / sqrt(inputs share)."""
    return round(-_OCTAVE / 2 * math.log2(inputs * (1 - START_ZEROS / 2**31)))
