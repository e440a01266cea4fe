"""Models on a GPU: converted, calibrated, trained and by steps, to what a processor makes of them.

Skipped where there is none; `python -m pytest tests/test_cuda_models.py tests/test_cuda.py`.
"""

from pathlib import Path
from typing import Any

import calibrating
import pytest
import torch
from test_train_run import recipe_of, source_of, text_of

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.plans.recipe import Recipe, Train
from ternarize.runtime.load import load
from ternarize.sources.packed import open_packed
from ternarize.steps.checkpoint import replay
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import Step
from ternarize.steps.replay import Moves
from ternarize.train import loop
from ternarize.train.journals import train_by_votes
from ternarize.train.votes import Votes

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and a text to train it on."""
    folder = tmp_path_factory.mktemp("llama")
    return source_of("llama", folder / "source"), text_of(folder / "text.txt")


def trits_of(directory: Path) -> dict[str, torch.Tensor]:
    packed, records = open_packed(directory)
    return {
        name: packed.read(name)
        for name, record in records.items()
        if record.shape is not None and record.codec == "base3"
    }


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 35)[None].to(model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits.float().cpu()


@pytest.mark.parametrize("method", ["absmean", "twn", "itf"])
def test_a_gpu_finds_the_trits_of_a_processor(
    method: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, device in (("cpu", "cpu"), ("gpu", GPU)):
        convert(llama[0], tmp_path / name, Recipe(method, 32), device=device)
        verify(tmp_path / name)
    ours, theirs = trits_of(tmp_path / "cpu"), trits_of(tmp_path / "gpu")
    assert ours.keys() == theirs.keys() and ours
    for name, packed in ours.items():  # sums have another order: a weight at the edge may turn
        assert float((packed != theirs[name]).float().mean()) < 0.005, name


def test_a_model_is_calibrated_on_a_gpu(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = llama
    quality = {}
    for name, device in (("cpu", "cpu"), ("gpu", GPU)):
        recipe = calibrating.recipe(text, num_samples=8)
        record = convert(source, tmp_path / name, recipe, device=device)
        verify(tmp_path / name)
        quality[name] = record["calibration"]["quality"]["kl_divergence"]["value"]
    assert quality["gpu"] == pytest.approx(quality["cpu"], rel=0.15)


def test_a_model_is_trained_on_a_gpu_and_goes_on_after_a_break(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = llama
    monkeypatch.setattr(loop, "LOOKS", 4)
    recipe = recipe_of(text, steps=24, batch=256)

    def stop(_: int, __: int, what: str, stage: str) -> None:
        if what.startswith("step 9:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "packed", recipe, device=GPU, progress=stop)
    steps: list[int] = []
    record = convert(
        source, tmp_path / "packed", recipe, device=GPU, log=lambda at, _: steps.append(at)
    )
    assert steps == list(range(10, 25))
    looks = dict(map(tuple, record["training"]["held_out"]))
    assert min(looks.values()) < looks[0]
    assert record["training"]["computed_in"] == "bfloat16"
    verify(tmp_path / "packed")


@pytest.mark.parametrize("options", [{}, {"activations": "int8"}, {"group_size": 0}])
def test_a_gpu_computes_what_a_processor_computes(
    options: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path
) -> None:
    convert(llama[0], tmp_path / "packed", Recipe("itf", **{"group_size": 32, **options}))
    ours = load(tmp_path / "packed", dtype=torch.float32)
    theirs = load(tmp_path / "packed", dtype=torch.float32, device=GPU)
    moved: Any = load(tmp_path / "packed", dtype=torch.float32)
    moved = moved.to(GPU)
    expected = logits_of(ours)
    for model in (theirs, moved):
        assert torch.allclose(logits_of(model), expected, rtol=1e-3, atol=1e-3)
    theirs.save_pretrained(tmp_path / "saved")
    again = ternarize.load(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits_of(again), expected)
    ids = torch.arange(3, 9)[None]
    models: list[Any] = [ours, theirs, moved]
    written = [
        model.generate(ids.to(model.device), max_new_tokens=12, do_sample=False).cpu()
        for model in models
    ]
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])


@pytest.mark.parametrize("target", [TRITS, SCALES])
def test_steps_move_the_same_values_on_a_gpu(target: int) -> None:
    chosen = tuple(range(0, 120, 6))
    signs = tuple(1 if each % 4 else -1 for each in chosen)
    steps = [Step(n, target, bits, 1, 128, chosen, signs) for n, bits in enumerate((0, 3, 10, 17))]
    here = torch.zeros(140_000, dtype=torch.int8)
    moves, first, there = Moves(steps, target, 77), 2**36 - 70_001, here.to(GPU)
    moves.apply(here, first)
    moves.apply(there, first)
    assert torch.equal(here, there.cpu()) and bool(here.any())


@pytest.mark.parametrize("target", ["scales", "trits"])
@pytest.mark.parametrize("probe", ["backward", "forwards"])
def test_a_journal_of_a_gpu_is_replayed_by_a_processor(
    probe: str, target: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    convert(source, tmp_path / "packed", Recipe("itf", 32))
    votes = Votes(target, 64, (4, 8), (0.5, 0.1, 0.02), (4,), probe=probe)
    training = Train(texts=(str(text),), teacher=str(source), steps=6, batch=256, train_len=16)
    journal = tmp_path / "a.steps"
    told = train_by_votes(tmp_path / "packed", journal, training, votes, device=GPU)
    assert told["attempts"] == 6
    replay(journal, tmp_path / "packed", tmp_path / "replayed")  # digests of its marks are checked
    directly = load(tmp_path / "packed", steps=journal, dtype=torch.float32, device=GPU)
    replayed = load(tmp_path / "replayed", dtype=torch.float32)
    assert torch.allclose(logits_of(directly), logits_of(replayed), rtol=1e-3, atol=1e-3)
