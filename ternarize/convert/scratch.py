"""A model trained from nothing: drawn at random, saved, and then trained like any other.

OUTPUT.start holds the model as it was drawn, from which a run that was broken off goes on.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from ternarize.convert.run import convert
from ternarize.errors import CheckpointError
from ternarize.models.configuration import open_config, usable
from ternarize.models.reads import has_tokenizer, no_tokenizer, open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.progress import Progress
from ternarize.train.run import Log


def train_from_scratch(
    folder: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    device: str | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Draw the weights of a model at random, train it as the recipe says, and pack it.

    folder  with config.json, which names the architecture, and the files of a tokenizer

    The other arguments, the errors and what is returned are those of `convert`. Raises
    CheckpointError for a folder without one of the two.
    """
    folder, output = Path(folder).expanduser(), Path(output).expanduser()
    start = output.with_name(output.name + ".start")
    if not start.is_dir():
        _draw(folder, start)
    record = convert(start, output, recipe, device=device, progress=progress, log=log)
    shutil.rmtree(start)
    return record


def _draw(folder: Path, start: Path) -> None:
    """Save a random model of a configuration, whole."""
    config = open_config(folder)
    if not has_tokenizer(folder):
        raise no_tokenizer(folder)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        raise CheckpointError(
            folder / "config.json",
            f"architectures {config.architectures}",
            f"a model class of transformers {transformers.__version__}",
            'Name one, for instance ["LlamaForCausalLM"]',
        )
    torch.manual_seed(0)
    with usable(folder / "config.json"):
        model = model_class(config)
    part = start.with_name(start.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    open_tokenizer(folder).save_pretrained(part)
    part.rename(start)
