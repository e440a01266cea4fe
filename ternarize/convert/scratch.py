"""A model trained from nothing: drawn at random, saved, and then trained like any other.

OUTPUT.start holds the model as it was drawn, from which a run that was broken off goes on. It is
removed when the output is complete: its weights are the seed's, and nobody needs them again. Of
several processes the first draws it, and gives it to the others.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ternarize.convert.run import convert
from ternarize.errors import OutputError
from ternarize.files.outputs import partial_of
from ternarize.models.reads import TOKENIZER_FILES, open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.progress import Progress
from ternarize.ranks import World
from ternarize.train.drawn import drawn_model
from ternarize.train.run import Log

DRAWN = ".drawn.json"  # in OUTPUT.start: of what it was drawn
_PIECE = 1 << 26  # bytes of a file that are told at a time


def train_from_scratch(
    folder: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    device: str | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
    min_quality: Mapping[str, float] | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Draw the weights of a model at random, train it as the recipe says, and pack it.

    folder  with config.json, which names the architecture, and the files of a tokenizer

    The other arguments, the errors and what is returned are those of `convert`. Raises
    CheckpointError for a folder without one of the two.
    """
    folder, output = Path(folder).expanduser(), Path(output).expanduser()
    start = output.with_name(output.name + ".start")
    assert recipe.train is not None
    if world is not None and world.rank:
        with TemporaryDirectory(prefix="ternarize-") as own:
            _give(Path(own), world)
            return convert(own, output, recipe, device=device, world=world)
    if (output.exists() or output.is_symlink()) and not start.is_dir():
        raise OutputError(output, "exists already", "a new directory", "Remove it or name another")
    _draw(folder, start, recipe.train.seed)
    try:
        _give(start, world or World())
        return convert(
            start,
            output,
            recipe,
            device=device,
            progress=progress,
            log=log,
            min_quality=min_quality,
            world=world,
        )
    finally:
        if output.is_dir() or not partial_of(output).exists():  # complete, or of no use
            shutil.rmtree(start)


def _draw(folder: Path, start: Path, seed: int) -> None:
    """Save a random model of a configuration, whole; one that is there must be of the same."""
    drawn = {"seed": seed} | {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("config.json", *TOKENIZER_FILES)
        if (folder / name).is_file()
    }
    if (start / DRAWN).is_file():
        before = json.loads((start / DRAWN).read_text("utf-8"))
        differ = [name for name in {**before, **drawn} if before.get(name) != drawn.get(name)]
        if differ:
            raise OutputError(
                start,
                f"was drawn of another {differ[0]}",
                "the same",
                "Undo the change, or remove it and OUTPUT.partial to begin anew",
            )
        return
    model = drawn_model(folder, seed)
    part = start.with_name(start.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    open_tokenizer(folder).save_pretrained(part)
    (part / DRAWN).write_text(json.dumps(drawn), "utf-8")
    part.rename(start)


def _give(folder: Path, world: World) -> None:
    """Have the files of the first process's folder in those of all others."""
    if world.size == 1:
        return
    sizes = world.firsts({path.name: path.stat().st_size for path in sorted(folder.iterdir())})
    for name, size in sizes.items():
        path = folder / name
        pieces = [(at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]
        if world.rank == 0:
            flat = torch.from_file(str(path), size=size, dtype=torch.uint8)
            for at, count in pieces:
                for other in range(1, world.size):
                    world.send(flat[at : at + count], other, "files")
            continue
        with path.open("wb") as file:
            for _, count in pieces:
                file.write(world.receive((count,), torch.uint8, 0).numpy().data)
