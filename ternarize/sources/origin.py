"""Where a checkpoint came from, and what of its model card goes on to its offspring."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ternarize.files.checkpoint import Checkpoint
from ternarize.files.names import CARD
from ternarize.sources.fetch import split_id

SNAPSHOTS = "snapshots"  # what the Hub's client calls the folder of a repository's commits
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def read_card(directory: Path) -> dict[str, Any]:
    """What the metadata of a checkpoint's model card (README.md) says that its offspring inherits.

    Empty where there is no card, or no metadata that can be read.
    """
    from huggingface_hub import metadata_load  # slow to import, and needed for conversions only

    path = directory / CARD
    if not path.is_file():
        return {}
    try:
        table = metadata_load(path)
    except Exception:  # whatever is wrong in a text for people: nothing is inherited, and that said
        return {}
    return inherit(table or {})


def inherit(table: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a card's metadata that go on to its offspring, if they can stand in any card.

    They are plain text of one line, or lists of it: YAML makes dates and more of what looks so,
    and other signs could be read as markup.
    """
    said = {key: table.get(key) for key in INHERITED}
    return {key: value for key, value in said.items() if _is_text(key, value)}


def _is_text(key: str, value: Any) -> bool:
    texts = value if isinstance(value, list) and value else [value]
    pattern = r"[\w.:/ -]+"
    if key == "license_link":  # an address, or a file of the repository
        pattern = r"https?://[\w.:/?=&%#~+-]+|[\w./-]+"
    return all(isinstance(text, str) and re.fullmatch(pattern, text) for text in texts)


def hub_commit(model: str | Path, source: Checkpoint) -> dict[str, str] | None:
    """Where on the Hub a checkpoint came from: {"id": user/name, "commit": ...}; None for a path.

    model  what it was opened by
    """
    if source.stream is not None:
        return {"id": source.stream.repo, "commit": source.stream.commit}
    named = split_id(str(model))
    if named is None or source.directory == Path(os.path.expanduser(model)):
        return None
    top = source.directory  # or above it: the transformer of sentence-transformers has a folder
    return {"id": named[0], "commit": (top if top.parent.name == SNAPSHOTS else top.parent).name}
