"""What several test files share."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import calibrating
import packing
import pytest
import tiny_models
import torch

from ternarize.calibrate import gptq
from ternarize.convert.run import convert
from ternarize.plans.recipe import Recipe


def pytest_configure() -> None:
    """Ctrl-C ends what tests start, also where a shell has started them in the background.

    It does that with SIGINT ignored, which programs inherit, and which the command respects.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/tiny-llama, packed once: no test changes it."""
    folder = tmp_path_factory.mktemp("example") / "packed"
    convert(Path(__file__).parents[1] / "examples" / "tiny-llama", folder, Recipe("itf"))
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch's: for matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates for each matrix, too: how good they are is tested with the solver."""
    for name, value in calibrating.FEW.items():
        monkeypatch.setattr(gptq, name, value)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings compute in float32, also where a processor is faster in bfloat16."""
    for module in ("students", "run"):
        monkeypatch.setattr(f"ternarize.train.{module}.fast_dtype", lambda device: torch.float32)
