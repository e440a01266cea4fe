"""What several test files share."""

from collections.abc import Callable
from pathlib import Path

import packing
import pytest
import tiny_models


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with `source`, `packed` and `dense` (its twin) of a tiny model, made once."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            tiny_models.save(name, folder / "source")
            packing.pack_checkpoint(folder / "source", folder / "packed")
            packing.dense_twin(folder / "packed", folder / "source", folder / "dense")
        return folder

    return make
