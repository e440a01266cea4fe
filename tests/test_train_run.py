"""Training of whole models: what is measured is what is saved, whatever breaks off in between."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import calibrating
import pytest
import tiny_models
import torch
import transformers
from calibrating import digests
from test_evaluate import word_tokenizer
from torch import Tensor

import ternarize
from ternarize.calibrate import pipeline
from ternarize.convert.run import convert
from ternarize.convert.scratch import train_from_scratch
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, OutputError, QualityError, UsageError
from ternarize.measure.report import inspect
from ternarize.plans.recipe import Calibrate, Recipe, Train
from ternarize.plans.recipe_files import open_recipe
from ternarize.publish.card import make_card
from ternarize.sources.packed import open_packed
from ternarize.train import loop, losses, sources, state
from ternarize.train import run as train_run
from ternarize.train.objectives import objective

pytestmark = pytest.mark.slow

Seen = list[tuple[dict[str, Tensor], Any, Any]]
FRAMES = {"bert": "<s> $A </s>", "t5": "$A </s>"}


@pytest.fixture(autouse=True)
def _few_looks(quick: None, in_float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOOKS", 4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(batch, teacher's output, student's output) for the figures of the trainings of a test."""
    found: Seen = []

    def quality(model_class: Any, config: Any, outputs: Any, first: int) -> Any:
        found.extend(outputs)
        return pipeline.quality_of(model_class, config, iter(found), first)

    monkeypatch.setattr(train_run, "quality_of", quality)
    return found


def text_of(path: Path, documents: int = 300, seed: int = 0, words: int = 24) -> Path:
    """A file of documents of words that the word tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 140, (documents, words), generator=generator).tolist()
    lines = [" ".join(f"w{index}" for index in row) for row in ids]
    path.write_text("\n<|doc|>\n".join(lines))
    return path


def source_of(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model with a tokenizer."""
    calibrating.save(name, folder, dtype)
    word_tokenizer(around=FRAMES.get(name, "$A")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and a text to train it on."""
    folder = tmp_path_factory.mktemp("llama")
    return source_of("llama", folder / "source"), text_of(folder / "text.txt")


def recipe_of(text: Path | str, **options: Any) -> Recipe:
    """Groups of 32, begun with `itf`, 8 steps of 64 tokens."""
    own = {n: options.pop(n) for n in list(options) if n in Train.__dataclass_fields__}
    budget = {} if {"tokens", "minutes", "steps"} & own.keys() else {"steps": 8}
    own = {"texts": (str(text),), "train_len": 16, "batch": 64, "lr": 0.05, **budget, **own}
    return Recipe("itf", **{"group_size": 32, **options}, train=Train(**own))


def calibrated(dataset: Path | str, options: dict[str, Any] | None = None, **own: Any) -> Recipe:
    """The same, calibrated first, and trained on the same data if nothing else is said."""
    base = calibrating.recipe(Path(dataset), **{"num_samples": 8, **(options or {})})
    trained = {"steps": 8, "batch": 64, "train_len": 16, "lr": 0.05, **own}
    return Recipe("gptq", 32, calibrate=base.calibrate, train=Train(**trained))


def assert_same(directory: Path, other: Path) -> None:
    """The same bytes, but for the time that the training took."""
    one, two = digests(directory), digests(other)
    names = [name for name in one if one[name] != two.get(name)]
    assert one.keys() == two.keys() and set(names) <= {"ternarize.json", "SHA256SUMS"}
    records = [json.loads((each / "ternarize.json").read_text()) for each in (directory, other)]
    for record in records:
        del record["training"]["minutes"]
    assert records[0] == records[1]


def assert_measured(directory: Path, seen: Seen, tolerance: float = 1e-4) -> None:
    """The model that is loaded is the one whose outputs have been measured."""
    model = ternarize.load(directory, dtype=torch.float32, experts_implementation="eager")
    assert seen
    for batch, _, trained in seen:
        with torch.no_grad():
            output = model(**batch)
        pairs = zip(calibrating.tensors_of(output), calibrating.tensors_of(trained), strict=False)
        for ours, measured in pairs:
            assert float((ours - measured).abs().max() / measured.abs().max()) < tolerance


def assert_learnt(record: dict[str, Any]) -> None:
    """The state that was kept is a later one than the start, and better."""
    training = record["training"]
    looks = dict(map(tuple, training["held_out"]))
    assert training["kept_step"] > 0
    assert looks[training["kept_step"]] == min(looks.values()) < looks[0]


# --- every kind of model -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "gemma3_text", "gpt2", "mamba", "bert", "t5"])
def test_models_of_text_are_trained_and_saved(name: str, tmp_path: Path, seen: Seen) -> None:
    source = source_of(name, tmp_path / "source", torch.bfloat16)
    text = text_of(tmp_path / "text.txt")
    record = convert(source, tmp_path / "packed", recipe_of(text, steps=24))
    assert_learnt(record)
    assert_measured(tmp_path / "packed", seen)
    training = record["training"]
    assert training["texts"] == ["text.txt"] and training["length"] == 16
    assert training["steps"] == 24 and training["computed_in"] == "float32"
    assert training["environments"][0]["threads"] == 1
    verify(tmp_path / "packed", None)
    verify(tmp_path / "packed", source)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "albert", "vit", "clip", "whisper"])
def test_models_of_tensors_are_trained_and_saved(name: str, tmp_path: Path, seen: Seen) -> None:
    source = calibrating.save(name, tmp_path / "source", torch.bfloat16)
    data = calibrating.data(name, tmp_path, 40)
    recipe = calibrated(data, {"num_samples": 32}, steps=20, lr=0.004, batch=1024)
    record = convert(source, tmp_path / "packed", recipe)
    assert record["calibration"]["data"]["samples"] == 32
    assert record["training"]["texts"] == [data.name]
    assert_measured(tmp_path / "packed", seen)
    held = [loss for _, loss in record["training"]["held_out"]]
    assert min(held) < held[0]


def test_all_rows_of_a_file_are_trained_on_but_those_that_choose_and_report(tmp_path: Path) -> None:
    source = calibrating.save("vit", tmp_path / "source")
    data = calibrating.data("vit", tmp_path, 400)
    found = sources.data_of(source, Train(texts=(str(data),), steps=1), Calibrate(num_samples=8))
    assert len(found.held) == len(found.report) == 32
    some = [next(found.stream)["pixel_values"].numpy().tobytes() for _ in range(2 * 336)]
    apart = {each["pixel_values"].numpy().tobytes() for each in (*found.held, *found.report)}
    assert len(set(some)) == 336 and len(apart) == 64 and apart.isdisjoint(some)
    before = pipeline.samples_of(source, Calibrate(str(data), num_samples=333), trained=True)
    fitted = {
        row.numpy().tobytes()
        for batch in (*before.batches, *before.heldout)
        for row in batch["pixel_values"]
    }
    assert len(fitted) == 366
    assert fitted.isdisjoint(each["pixel_values"].numpy().tobytes() for each in found.report)


def test_a_head_without_words_is_trained_on_what_it_gives(tmp_path: Path, seen: Seen) -> None:
    config: Any = tiny_models.CONFIGS["bert_classifier"]()
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "source")
    data = calibrating.data("bert", tmp_path)
    convert(tmp_path / "source", tmp_path / "packed", calibrated(data, steps=3))
    assert_measured(tmp_path / "packed", seen)


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": -1},
        {"group_size": 0},
        {"scale_bits": 8},
        {"dtype": "float32", "keep": ("*down_proj*",)},
        {"activations": "int8"},
        {"head": "int8"},
        {"head": "ternary"},
        {"all_weights": True},
    ],
    ids=str,
)
def test_every_form_is_saved_as_it_was_measured(
    options: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path, seen: Seen
) -> None:
    source, text = llama
    record = convert(source, tmp_path / "packed", recipe_of(text, **options))
    assert_learnt(record)
    # an input between two of 255 numbers may be rounded up here and down there
    assert_measured(tmp_path / "packed", seen, 0.02 if "activations" in options else 1e-4)
    verify(tmp_path / "packed", source)


def test_what_calibration_has_put_into_two_planes_stays(
    llama: tuple[Path, Path], tmp_path: Path, seen: Seen
) -> None:
    source, text = llama
    recipe = calibrated(text, {"rotation": 16, "seq_len": 16})
    recipe = dataclasses.replace(recipe, planes=("*down_proj*",), scale_bits=8)
    record = convert(source, tmp_path / "packed", recipe)
    rows = record["tensors"].items()
    assert {row["planes"] for name, row in rows if "down_proj" in name} == {2}
    assert_measured(tmp_path / "packed", seen)
    verify(tmp_path / "packed", source)


def test_trained_experts_that_calibration_did_not_see_pass_verify(tmp_path: Path) -> None:
    source = calibrating.save("mixtral", tmp_path / "source")
    data = calibrating.data("mixtral", tmp_path, length=8)
    recipe = calibrated(data, {"rotation": 0}, steps=12)
    record = convert(source, tmp_path / "packed", recipe)
    assert record["calibration"]["uncalibrated"]
    verify(tmp_path / "packed", source)


def test_two_models_that_differ_only_in_how_they_are_computed_learn_alike(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss from hidden states, piece by piece, is the one of whole logits."""
    source, text = llama
    pieces = convert(source, tmp_path / "a", recipe_of(text))["training"]["held_out"]
    monkeypatch.setattr("ternarize.train.students._heads", lambda pair: None)
    whole = convert(source, tmp_path / "b", recipe_of(text))["training"]["held_out"]
    for (step, one), (other_step, other) in zip(pieces, whole, strict=True):
        assert step == other_step
        assert one == pytest.approx(other, rel=0.15)  # of windows, the last token is left out


# --- a share of zeros ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["itf", "gptq", "head"])
def test_a_share_of_zeros_is_trained_and_saved(
    form: str, llama: tuple[Path, Path], tmp_path: Path, seen: Seen
) -> None:
    source, text = llama
    recipe = recipe_of(text, head="int8" if form == "head" else None, steps=12)
    if form == "gptq":
        recipe = calibrated(text, {"rotation": 16, "seq_len": 16})
    recipe = dataclasses.replace(recipe, zeros=0.8, scale_bits=6, codec="rans")
    record = convert(source, tmp_path / "packed", recipe)
    checkpoint, records = open_packed(tmp_path / "packed")
    for name in (n for n, each in records.items() if each.kind == "ternary"):
        assert not bool((checkpoint.read(f"{name}_scale") % 2).any())
    rows = [row for row in record["tensors"].values() if row["becomes"] == "ternary"]
    for row in rows:
        assert 0.798 <= row["sparsity"] <= 0.81, row  # at least; a calibration leaves some more
    assert_measured(tmp_path / "packed", seen, 0.02)  # where it computes in bfloat16
    training = record["training"]
    counts = [
        (s, loss)
        for s, loss in training["held_out"]
        if form == "gptq" or s >= 0.3 * training["steps"]
    ]
    assert (training["kept_step"], min(loss for _, loss in counts)) in map(tuple, counts)
    verify(tmp_path / "packed", source)


@pytest.mark.parametrize("form", ["itf", "gptq"])
def test_a_share_that_is_there_already_changes_nothing(
    form: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    recipe = recipe_of(text, steps=4)
    if form == "gptq":
        recipe = calibrated(text, {"rotation": 16, "seq_len": 16}, steps=4)
    convert(source, tmp_path / "plain", recipe)
    convert(source, tmp_path / "least", dataclasses.replace(recipe, zeros=0.1))
    plain, least = (digests(tmp_path / name) for name in ("plain", "least"))
    assert plain["model.safetensors"] == least["model.safetensors"]


def test_two_planes_with_zeros_stay_through_a_training(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    recipe = calibrated(text, {"rotation": 0, "seq_len": 16}, steps=2)
    recipe = dataclasses.replace(recipe, planes=("*",), zeros=0.6)
    record = convert(source, tmp_path / "packed", recipe)
    rows = [row for row in record["tensors"].values() if row["becomes"] == "ternary"]
    assert rows and {row["planes"] for row in rows} == {2}
    assert all(row["sparsity"] >= 0.6 for row in rows)


def test_a_training_with_zeros_goes_on_to_the_same_bytes(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    recipe = dataclasses.replace(recipe_of(text, steps=8), zeros=0.7)
    convert(source, tmp_path / "whole", recipe)
    for step in (1, 3, 6):  # within the ramp, and behind it

        def stop(done: int, total: int, what: str, stage: str, step: int = step) -> None:
            if stage == "training" and f"step {step}:" in what:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "broken", recipe, progress=stop)
    convert(source, tmp_path / "broken", recipe)
    assert_same(tmp_path / "whole", tmp_path / "broken")


# --- what is learnt from -------------------------------------------------------------------------


def test_another_model_can_be_the_teacher(tmp_path: Path, seen: Seen) -> None:
    source, teacher = source_of("llama", tmp_path / "a"), source_of("gpt2", tmp_path / "b")
    text = text_of(tmp_path / "text.txt")
    record = convert(source, tmp_path / "packed", recipe_of(text, teacher=str(teacher)))
    assert_learnt(record)
    assert record["recipe"]["train"]["teacher"] == "b"
    model = calibrating.load_source(teacher)
    for batch, theirs, _ in seen:
        with torch.no_grad():
            assert torch.allclose(model(**batch).logits, theirs.logits, atol=1e-5)


def test_a_text_itself_is_learnt_without_a_teacher(tmp_path: Path, seen: Seen) -> None:
    source, text = source_of("llama", tmp_path / "a"), tmp_path / "text.txt"
    text.write_text("\n<|doc|>\n".join(f"w{at % 100 + 9} " + "w5 w6 w7 " * 8 for at in range(300)))
    recipe = recipe_of(text, objective="text", steps=40)
    record = convert(source, tmp_path / "packed", recipe)
    assert_learnt(record)
    assert record["training"]["quality"].keys() == {"perplexity"}
    assert record["training"]["quality"]["perplexity"]["value"] < 60
    assert all(theirs is None for _, theirs, _ in seen)
    assert_measured(tmp_path / "packed", seen)


def test_of_chats_the_answers_are_learnt(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "a")
    words = word_tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    words.save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    chats = []
    for asked in torch.randint(20, 140, (300, 6), generator=generator).tolist():
        question, answer = " ".join(f"w{index}" for index in asked), "w5 w6 w7 w8 w9"
        turns = {"user": question, "assistant": answer}
        chats.append({"messages": [{"role": r, "content": c} for r, c in turns.items()]})
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(each) for each in chats))
    recipe = recipe_of(tmp_path / "chats.jsonl", objective="text", steps=40)
    record = convert(source, tmp_path / "packed", recipe)
    first, *_, last = (loss for _, loss in record["training"]["held_out"])
    assert last < first / 2  # the questions, of random words, could not be learnt so far


def test_what_the_model_itself_writes_is_a_text_of_a_mixture(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    base = recipe_of(text, texts=("self=2", str(text)))
    calibrate = Calibrate("self", num_samples=8, seq_len=16, rotation=0)
    recipe = Recipe("gptq", 32, calibrate=calibrate, train=base.train)
    record = convert(source, tmp_path / "packed", recipe)
    assert record["training"]["texts"] == ["self=2", "text.txt"]
    assert_learnt(record)


def test_a_calibration_reads_nothing_that_its_training_keeps_apart(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = llama
    kept: list[Tensor] = []
    read: list[Tensor] = []
    original, samples_of = sources.data_of, pipeline.samples_of

    def data_of(*given: Any) -> Any:
        data = original(*given)
        kept.extend(each["input_ids"] for each in data.held + data.report)
        return data

    def samples(*args: Any, **named: Any) -> Any:
        found = samples_of(*args, **named)
        for batch in found.batches + found.heldout + found.report:
            read.extend(batch["input_ids"])
        return found

    monkeypatch.setattr(train_run, "data_of", data_of)
    monkeypatch.setattr(pipeline, "samples_of", samples)
    recipe = calibrated(text, {"rotation": 0, "seq_len": 16})
    convert(source, tmp_path / "packed", recipe)

    def pairs(rows: list[Tensor]) -> set[tuple[int, ...]]:
        return {tuple(row[at : at + 3].tolist()) for row in rows for at in range(1, len(row) - 2)}

    assert read and kept and len(pairs(read) & pairs(kept)) <= 2  # of random words, by chance


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 3}, 3),
        ({"tokens": 64 * 3}, 3),
        ({"tokens": 64 * 3 + 1}, 4),
        ({"tokens": 64 * 9, "steps": 2}, 2),
        ({"minutes": 0.5}, 5),
        ({"minutes": 0.5, "tokens": 64}, 1),
    ],
    ids=str,
)
def test_the_budget_that_is_used_up_first_ends_it(
    budget: dict[str, Any],
    steps: int,
    llama: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, text = llama
    clock = iter(range(0, 10**6, 6))
    monkeypatch.setattr(
        "ternarize.train.loop.time.monotonic", lambda: next(clock) if "minutes" in budget else 0
    )
    if "minutes" in budget:  # a step looks at the clock twice, six seconds apart
        monkeypatch.setattr(loop, "SAVE_EVERY", 1e9)
    record = convert(source, tmp_path / "packed", recipe_of(text, **budget))
    assert record["training"]["steps"] == steps
    assert record["training"]["tokens"] == 64 * steps
    assert record["training"]["held_out"][-1][0] == steps
    if "minutes" in budget:
        assert record["training"]["minutes"] == pytest.approx(0.1 * steps)


def test_a_training_without_a_finite_loss_ends(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = llama

    def broken(*given: Any) -> Any:
        right = objective(*given)
        return lambda samples: (right(samples)[0] * math.nan, {})

    monkeypatch.setattr(train_run, "objective", broken)
    with pytest.raises(CheckpointError, match="loss of step 1 is nan.*lower --lr"):
        convert(source, tmp_path / "packed", recipe_of(text))
    assert not (tmp_path / "packed").exists()


def test_progress_and_a_log_tell_of_every_step(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = llama
    told: list[tuple[int, int, str]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def progress(done: int, total: int, what: str, stage: str) -> None:
        if stage == "training":
            told.append((done, total, what))

    convert(
        source,
        tmp_path / "packed",
        recipe_of(text),
        progress=progress,
        log=lambda step, figures: logged.append((step, dict(figures))),
    )
    assert [step for step, _ in logged] == list(range(1, 9))
    assert all({"loss", "held", "speed", "left", "top-1"} <= each.keys() for _, each in logged)
    assert [done for done, _, _ in told] == [125 * step for step in range(1, 9)]
    form = r"step \d: loss \d+\.\d{3}, held-out \d+\.\d{3}, \d+ tokens/s, 0 min left"
    assert all(re.fullmatch(form, what) for _, _, what in told)


# --- a training that is broken off ---------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches SIGKILL."""


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is written after every step."""
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)


def killed_at(count: int, function: Callable[..., Any], after: bool = False) -> Any:
    """A function that is killed when it is called for the count-th time."""
    calls = iter(range(1, 10**6))

    def run(*args: Any, **options: Any) -> Any:
        dies = next(calls) == count
        if dies and not after:
            raise Killed
        result = function(*args, **options)
        if dies:
            raise Killed
        return result

    return run


PLACES = {
    "in a step": (torch.nn.utils, "clip_grad_norm_", 3, False),
    "in another step": (torch.nn.utils, "clip_grad_norm_", 6, False),
    "before a state": (loop, "save_state", 4, False),
    "after a state": (loop, "save_state", 4, True),
    "before it has its name": (state, "sync_files", 3, False),
    "before what was the best is removed": (state, "best_file", 6, False),
    "before a best": (train_run, "write_solved", 2, False),
    "after a best": (train_run, "write_solved", 2, True),
    "at a look": (train_run, "held_loss", 3, False),
    "after the training": (train_run, "open_solved", 1, False),
    "at the figures": (train_run, "quality_of", 1, True),
}


@pytest.mark.usefixtures("saving")
@pytest.mark.parametrize(
    ("place", "budget"),
    [*((place, {"steps": 8}) for place in PLACES), ("after a state", {"tokens": 64 * 8})],
    ids=str,
)
def test_a_training_that_is_killed_goes_on_to_the_same_bytes(
    place: str,
    budget: dict[str, int],
    llama: tuple[Path, Path],
    whole: Callable[[dict[str, int]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, text = llama
    recipe = recipe_of(text, **budget)
    where, name, count, after = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed_at(count, getattr(where, name), after))
        with pytest.raises(Killed):
            convert(source, tmp_path / "packed", recipe)
    assert not (tmp_path / "packed").exists()
    convert(source, tmp_path / "packed", recipe)
    assert_same(tmp_path / "packed", whole(budget))


@pytest.fixture(scope="module")
def whole(
    llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, int]], Path]:
    """The result of a training that nothing broke off, by its budget."""
    folder = tmp_path_factory.mktemp("whole")
    source, text = llama

    def made(budget: dict[str, int]) -> Path:
        path = folder / next(iter(budget))
        if not path.exists():
            convert(source, path, recipe_of(text, **budget))
        return path

    return made


def assert_goes_on(
    source: Path, folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that is killed in its fifth step ends like the one that is there."""
    with monkeypatch.context() as patch:
        clip = torch.nn.utils.clip_grad_norm_
        patch.setattr(torch.nn.utils, "clip_grad_norm_", killed_at(5, clip))
        with pytest.raises(Killed):
            convert(source, folder / "broken", recipe)
    convert(source, folder / "broken", recipe)
    assert_same(folder / "broken", folder / "whole")


@pytest.mark.usefixtures("saving")
def test_words_that_were_sampled_are_the_same_after_a_break(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (losses, sources):
        monkeypatch.setattr(module, "ALL_WORDS", 50)
    monkeypatch.setattr(losses, "OTHERS", 20)
    monkeypatch.setattr(losses, "MULTIPLE", 1)
    monkeypatch.setattr(sources, "COMMON", 16)
    source, text = llama
    recipe = recipe_of(text)
    record = convert(source, tmp_path / "whole", recipe)
    assert_learnt(record)
    assert_goes_on(source, tmp_path, recipe, monkeypatch)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
@pytest.mark.usefixtures("saving")
def test_other_models_go_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "vit":
        source = calibrating.save(name, tmp_path / "source")
        recipe = calibrated(calibrating.data(name, tmp_path))
    else:
        source = source_of(name, tmp_path / "source")
        recipe = recipe_of(text_of(tmp_path / "text.txt"))
    convert(source, tmp_path / "whole", recipe)
    assert_goes_on(source, tmp_path, recipe, monkeypatch)


@pytest.mark.usefixtures("saving")
def test_a_factored_optimizer_goes_on_to_the_same_bytes(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = llama
    recipe = recipe_of(text, optimizer="adafactor")
    assert_learnt(convert(source, tmp_path / "whole", recipe))
    assert_goes_on(source, tmp_path, recipe, monkeypatch)


@pytest.mark.parametrize("step", [1, 5])
def test_what_is_interrupted_loses_no_step(
    step: int, llama: tuple[Path, Path], whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike what is killed, of which all since the last state is done again."""
    source, text = llama
    recipe = recipe_of(text)

    def stop(_: int, __: int, what: str, stage: str) -> None:
        if stage == "training" and what.startswith(f"step {step}:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "packed", recipe, progress=stop)
    steps: list[int] = []
    convert(source, tmp_path / "packed", recipe, log=lambda at, _: steps.append(at))
    assert steps == list(range(step + 1, 9))
    assert_same(tmp_path / "packed", whole({"steps": 8}))


def test_decay_that_has_ended_stays_so_after_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = source_of("llama", tmp_path / "config"), text_of(tmp_path / "text.txt")
    (folder / "model.safetensors").unlink()
    recipe = scratch_recipe(text)
    train_from_scratch(folder, tmp_path / "whole", recipe)
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    clip = torch.nn.utils.clip_grad_norm_
    for count in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", killed_at(count, clip))
            with pytest.raises(Killed):
                train_from_scratch(folder, tmp_path / "broken", recipe)
    train_from_scratch(folder, tmp_path / "broken", recipe)
    assert_same(tmp_path / "broken", tmp_path / "whole")


def broken_off(source: Path, output: Path, recipe: Recipe) -> None:
    """Leave a training after three steps."""

    def stop(_: int, __: int, what: str, stage: str) -> None:
        if what.startswith("step 3:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, output, recipe, progress=stop)


def test_another_seed_is_refused_and_what_is_done_stays(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    broken_off(source, tmp_path / "packed", recipe_of(text))
    with pytest.raises(OutputError, match="holds an unfinished conversion with other options"):
        convert(source, tmp_path / "packed", recipe_of(text, seed=1))
    steps: list[int] = []
    convert(source, tmp_path / "packed", recipe_of(text), log=lambda at, _: steps.append(at))
    assert steps[0] == 4


@pytest.mark.parametrize(("steps", "then"), [(6, [4, 5, 6]), (12, list(range(4, 13))), (2, [])])
def test_a_training_goes_on_with_another_budget(
    steps: int, then: list[int], llama: tuple[Path, Path], tmp_path: Path
) -> None:
    """A smaller one than it has had packs what is best so far."""
    source, text = llama
    broken_off(source, tmp_path / "packed", recipe_of(text))
    taken: list[int] = []
    packed = tmp_path / "packed"
    record = convert(
        source, packed, recipe_of(text, steps=steps), log=lambda at, _: taken.append(at)
    )
    assert taken == then
    told = record["training"]
    assert [(at, budget["steps"]) for at, budget in told["budgets"]] == [(0, 8), (3, steps)]
    assert told["held_out"][-1][0] == max(3, steps)
    verify(packed)


def test_more_steps_after_a_training_that_was_packed_count(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    """Tensors that were packed before a break are of the state that was the best then."""
    source, text = llama

    for output, last in ((tmp_path / "trained", "step 8:"), (tmp_path / "packed", "model.")):

        def stop(_: int, __: int, what: str, stage: str, last: str = last) -> None:
            if what.startswith(last) and stage == ("packing" if last == "model." else "training"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, output, recipe_of(text), threads=1, progress=stop)
        record = convert(source, output, recipe_of(text, steps=16))
        assert record["training"]["kept_step"] > 8
    weights = "model.safetensors"
    assert digests(tmp_path / "packed")[weights] == digests(tmp_path / "trained")[weights]


def test_a_text_that_has_changed_is_refused_and_what_is_done_stays(tmp_path: Path) -> None:
    source, text = source_of("llama", tmp_path / "a"), text_of(tmp_path / "text.txt")
    broken_off(source, tmp_path / "packed", recipe_of(text))
    text_of(text, seed=1)
    with pytest.raises(OutputError, match="began otherwise: .*digest was [0-9a-f]{64}") as caught:
        convert(source, tmp_path / "packed", recipe_of(text))
    assert "\n" not in str(caught.value)
    text.unlink()
    with pytest.raises(UsageError, match="no such file"):
        convert(source, tmp_path / "packed", recipe_of(text))
    text_of(text)
    steps: list[int] = []
    convert(source, tmp_path / "packed", recipe_of(text), log=lambda at, _: steps.append(at))
    assert steps[0] == 4


def test_a_teacher_that_has_changed_is_refused(tmp_path: Path) -> None:
    source, teacher = source_of("llama", tmp_path / "a"), source_of("llama", tmp_path / "b")
    text = text_of(tmp_path / "text.txt")
    recipe = recipe_of(text, teacher=str(teacher))
    broken_off(source, tmp_path / "packed", recipe)
    calibrating.change(teacher, "lm_head.weight", lambda w: torch.cat([w, w]))
    calibrating.change(teacher, "lm_head.weight", lambda w: 2 * w[: len(w) // 2])
    with pytest.raises(OutputError, match="began otherwise: teacher was"):
        convert(source, tmp_path / "packed", recipe)


# --- calibrated first, by --distill, by name -----------------------------------------------------


def test_distill_trains_what_calibration_has_left(
    llama: tuple[Path, Path], tmp_path: Path, seen: Seen
) -> None:
    source, text = llama
    calibrate = Calibrate(
        str(text), num_samples=8, seq_len=16, rotation=16, distill=12, seed=3, reconstruct=2
    )
    record = convert(source, tmp_path / "packed", Recipe("gptq", 32, calibrate=calibrate))
    assert record["recipe"]["train"] is None and record["recipe"]["calibrate"]["distill"] == 12
    assert record["calibration"]["quality"] == {}
    training = record["training"]
    assert training["steps"] == 12 and training["length"] == 16
    assert training["tokens"] == 12 * 1024
    assert set(training["quality"]) >= {"perplexity", "kl_divergence", "top1_agreement"}
    assert_measured(tmp_path / "packed", seen)
    report = inspect(tmp_path / "packed")
    assert report["training"]["quality"] == training["quality"]


def test_the_best_recipe_calibrates_then_trains() -> None:
    best = open_recipe("best")
    assert best.method == "gptq" and best.calibrate is not None and best.train is not None
    assert best.training == best.train and best.calibrate.distill == 0


def test_bounds_are_on_the_figures_of_the_trained_model(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    recipe = recipe_of(text)
    with pytest.raises(QualityError, match="kl_divergence") as caught:
        convert(source, tmp_path / "packed", recipe, min_quality={"kl_divergence": 0.0})
    measured = float(re.findall(r"\d+\.\d+", str(caught.value))[0])
    assert not (tmp_path / "packed").exists()
    steps: list[int] = []
    record = convert(
        source,
        tmp_path / "packed",
        recipe,
        min_quality={"kl_divergence": 10.0},
        log=lambda at, _: steps.append(at),
    )
    assert not steps, "what was trained is not trained again"
    value = record["training"]["quality"]["kl_divergence"]["value"]
    assert value == pytest.approx(measured, abs=1e-4)


def test_a_training_can_begin_with_a_packed_checkpoint(
    llama: tuple[Path, Path], tmp_path: Path, seen: Seen
) -> None:
    source, text = llama
    first = convert(source, tmp_path / "first", recipe_of(text, steps=16))
    again = convert(source, tmp_path / "again", recipe_of(text, start=str(tmp_path / "first")))
    assert again["recipe"]["train"]["start"] == "first"
    kept = dict(map(tuple, first["training"]["held_out"]))[first["training"]["kept_step"]]
    assert again["training"]["held_out"][0][1] == pytest.approx(kept, rel=1e-4)
    seen.clear()


def test_a_training_from_a_trained_start_goes_on_behind_the_samples_that_it_had(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = llama
    found: list[list[int]] = []

    def noted(job: Any, samples: Iterator[Any]) -> Any:
        def each() -> Iterator[Any]:
            for sample in samples:
                found[-1] += sample["input_ids"].flatten().tolist()
                yield sample

        found.append([])
        return loop.train(job, each())

    monkeypatch.setattr(train_run, "train", noted)
    monkeypatch.setattr(loop, "ahead", contextlib.nullcontext)

    def trained(name: str, **more: Any) -> dict[str, Any]:
        record = convert(source, tmp_path / name, recipe_of(text, **more))
        return dict(record["training"])

    whole = trained("whole", steps=8)
    first = trained("first", steps=5)
    start = str(tmp_path / "first")
    second = trained("second", steps=3, start=start)
    assert found[1] + found[2] == found[0]
    assert second["samples"] == whole["samples"] > first["samples"]
    other = trained("other", steps=5, start=start, seed=1)
    assert other["samples"] == first["samples"], "another order begins at its beginning"


def test_a_trained_model_has_a_card_that_says_how(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = llama
    convert(source, tmp_path / "packed", recipe_of(text, seed=3))
    card = make_card(tmp_path / "packed", "user/name")
    (command,) = re.findall(r"^ternarize train .*$", card, re.M)
    for said in ("--texts text.txt", "--steps 8", "--seed 3", "--method itf"):
        assert command.count(said) == 1, command
    assert "(`--texts` names what was on the disk of whoever made it; " in card
    path = tmp_path / "packed" / "ternarize.json"
    record = json.loads(path.read_text())
    record["training"]["texts"] = [f"user/texts@{'0' * 40}=0.5", "default"]
    path.write_text(json.dumps(record))
    card = make_card(tmp_path / "packed", "user/name")
    assert (
        f"--texts user/texts@{'0' * 40}=0.5 --texts default" in card and "on the disk" not in card
    )
    recipe = calibrated(text, {"seed": 3, "seq_len": 16}, seed=3)
    convert(source, tmp_path / "other", recipe)
    (command,) = re.findall(
        r"^ternarize train .*$", make_card(tmp_path / "other", "user/name"), re.M
    )
    assert command.count("--seed 3") == 1 and "--dataset text.txt" in command


# --- from scratch --------------------------------------------------------------------------------


def scratch_recipe(text: Path, **more: Any) -> Recipe:
    train = Train(
        texts=(str(text),),
        objective="text",
        all_weights=True,
        from_scratch=True,
        **{"steps": 6, "batch": 64, "train_len": 16, "lr": 0.01, **more},
    )
    return Recipe("absmean", 0, activations="int8", train=train)


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration with a tokenizer and no weights, and a text that can be learnt."""
    folder = source_of("llama", tmp_path / "config")
    (folder / "model.safetensors").unlink()
    text = tmp_path / "text.txt"
    text.write_text("\n<|doc|>\n".join(f"w{at % 100 + 9} " + "w5 w6 w7 " * 8 for at in range(300)))
    return folder, text


def test_a_model_is_trained_from_nothing(
    drawn: tuple[Path, Path], tmp_path: Path, seen: Seen
) -> None:
    folder, text = drawn
    recipe = scratch_recipe(text, steps=60)
    record = train_from_scratch(folder, tmp_path / "packed", recipe)
    first, *_, last = (loss for _, loss in record["training"]["held_out"])
    assert first > 4.5 and last < 1.5  # log 160 = 5.1; three words in turn can be learnt
    assert_measured(tmp_path / "packed", seen, 0.02)  # inputs in 8 bits, as above
    there = {each.name for each in (tmp_path / "packed").iterdir()}
    assert "tokenizer.json" in there and ".drawn.json" not in there
    assert not (tmp_path / "packed.start").exists()
    verify(tmp_path / "packed", None)
    # head, embeddings and all else have learnt, too
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    torch.manual_seed(0)
    config: Any = tiny_models.CONFIGS["llama"]()
    start = transformers.LlamaForCausalLM(config).state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert not torch.allclose(model.get_parameter(name), start[name], atol=1e-3), name


def test_the_seed_draws_the_weights(drawn: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = drawn
    state_before = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_from_scratch(folder, tmp_path / name, scratch_recipe(text, steps=1, seed=seed))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.random.get_rng_state(), state_before)


def test_what_is_drawn_of_another_configuration_is_refused(
    drawn: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, text = drawn
    recipe = scratch_recipe(text)

    def stop(_: int, __: int, what: str, stage: str) -> None:
        if what.startswith("step 3:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_from_scratch(folder, tmp_path / "packed", recipe, progress=stop)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    with pytest.raises(OutputError, match=r"was drawn of another config\.json"):
        train_from_scratch(folder, tmp_path / "packed", recipe)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with pytest.raises(OutputError, match=r"was drawn of another config\.json"):
        train_from_scratch(folder, tmp_path / "packed", recipe)
    assert (tmp_path / "packed.start").is_dir()


def test_nothing_is_left_of_a_model_that_cannot_be_trained(
    drawn: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, _ = drawn
    with pytest.raises(UsageError, match="no such file"):
        train_from_scratch(folder, tmp_path / "packed", scratch_recipe(tmp_path / "absent.txt"))
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        train_from_scratch(folder, tmp_path / "there", scratch_recipe(tmp_path / "absent.txt"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config", "text.txt", "there"]


def test_a_configuration_needs_a_tokenizer_beside_it(
    drawn: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, text = drawn
    for each in folder.glob("*token*"):
        each.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        train_from_scratch(folder, tmp_path / "packed", scratch_recipe(text))


# --- mistakes, each in one line ------------------------------------------------------------------


def refused(source: Path, recipe: Recipe, output: Path) -> str:
    with pytest.raises((UsageError, CheckpointError, OutputError)) as caught:
        convert(source, output, recipe)
    assert "\n" not in str(caught.value)
    assert not output.exists() and not output.with_name(output.name + ".partial").exists()
    return str(caught.value)


def test_mistakes_are_told_before_anything_is_loaded(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = llama

    def loads(*_: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(train_run, "make_pair", loads)
    monkeypatch.setattr("ternarize.convert.fitting.calibrate", loads)
    small = text_of(tmp_path / "small.txt", 1, words=8)
    bert, none = source_of("bert", tmp_path / "bert"), calibrating.save("llama", tmp_path / "none")
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "w5"}]}))
    config: Any = tiny_models.CONFIGS["llama"]()
    config.vocab_size = 200
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    output = tmp_path / "packed"
    for folder, recipe, said in (
        (source, recipe_of("/absent.txt"), "no such file"),
        (source, recipe_of(small), "makes no sample of documents that are kept apart"),
        (source, recipe_of(text, train_len=65), "at most the model's 64 positions"),
        (source, recipe_of(text, teacher=str(tmp_path / "other")), "knows 200 words"),
        (source, recipe_of(text, teacher="/absent"), "/absent"),
        (source, recipe_of(chat), "no chat template"),
        (source, recipe_of(text, text_column="body"), "text without columns"),
        (bert, recipe_of(text, objective="text"), "expected a causal language model"),
        (none, recipe_of(text), "no tokenizer"),
    ):
        assert said in refused(folder, recipe, output)
        if recipe.train is not None and recipe.train.objective == "distill" and folder == source:
            both = Recipe("gptq", 32, calibrate=Calibrate(str(text)), train=recipe.train)
            assert said in refused(folder, both, output)


def test_words_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "a")
    word_tokenizer(size=300).save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("\n<|doc|>\n".join("w250 " * 24 for _ in range(300)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 299, (300, 24), generator=generator).tolist()
    text.write_text("\n<|doc|>\n".join(" ".join(f"w{at}" for at in row) for row in ids))
    assert "0 to 159, the model's vocabulary" in refused(source, recipe_of(text), tmp_path / "b")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Train(texts=("a",)), "without an end"),
        (lambda: Train(texts=("a",), minutes=0), "minutes"),
        (lambda: Recipe("itf", train=Train(steps=1)), "without a text"),
        (
            lambda: Recipe("gptq", calibrate=Calibrate(distill=1), train=Train(steps=1)),
            "beside a training",
        ),
        (
            lambda: Recipe("gptq", calibrate=Calibrate(), train=Train(steps=1, from_scratch=True)),
            "with calibration",
        ),
        (
            lambda: Recipe("itf", planes=("*",), train=Train(texts=("a",), steps=1)),
            "begins without data",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(made: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        made()
