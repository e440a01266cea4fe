"""Calibrated conversions: what is measured is what is saved, whatever breaks off in between."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibrating
import pytest
import torch
from calibrating import digests
from safetensors.torch import load_file, save_file
from test_evaluate import word_tokenizer
from torch import Tensor

import ternarize
from ternarize.calibrate import pipeline, reconstruct, run, solve_block, training
from ternarize.calibrate.gptq import solve
from ternarize.calibrate.solved import SolvedBlocks
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, SelectionError, UsageError, WeightError
from ternarize.measure.language_models import compare_logits, summarize
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe
from ternarize.plans.rules import check_fused
from ternarize.progress import Progress
from ternarize.trits.methods import absmean

Seen = list[tuple[dict[str, Tensor], Any, Any]]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and data to calibrate it on."""
    folder = tmp_path_factory.mktemp("llama")
    return calibrating.save("llama", folder / "source"), calibrating.data("llama", folder)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(batch, float output, packed output) of every report batch of the conversions of a test."""
    found: Seen = []

    class Recorded(run.Calibration):
        def __init__(self, source: Any, tensors: Any, sets: Any, *args: Any, **more: Any) -> None:
            super().__init__(source, tensors, sets, *args, **more)
            self.sets = sets

        def run(self) -> Iterator[tuple[int, Any, Any]]:
            for index, theirs, ours in super().run():
                found.append((self.sets["report"][index], theirs, ours))
                yield index, theirs, ours

    monkeypatch.setattr(pipeline, "Calibration", Recorded)
    return found


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What training left of the loss, each time. It chooses by its own samples, so it gains."""
    found: list[float] = []

    def train(weights: Any, vectors: Any, loss: Any, samples: Any, _: Any, *more: Any) -> Any:
        result = reconstruct.reconstruct(weights, vectors, loss, samples, samples, *more)
        found.append(result[3] / result[2])
        return result

    monkeypatch.setattr(training, "reconstruct", train)
    monkeypatch.setattr(reconstruct, "CHECK_EVERY", 1)
    return found


def assert_measured(directory: Path, seen: Seen) -> None:
    """The model that is loaded is the one whose outputs have been measured."""
    model = ternarize.load(directory, dtype=torch.float32, experts_implementation="eager")
    assert seen
    for batch, _, packed in seen:
        with torch.no_grad():
            output = model(**batch)
        pairs = zip(calibrating.tensors_of(output), calibrating.tensors_of(packed), strict=False)
        for ours, measured in pairs:
            assert float((ours - measured).abs().max() / measured.abs().max()) < 1e-4


def test_the_last_samples_go_through_the_head_one_batch_after_the_other(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are large: those of one batch, of both streams, are there at a time."""
    heads = list[int]()

    class Counted(run.Calibration):
        def run(self) -> Iterator[tuple[int, Any, Any]]:
            model: Any = self.blocks.model
            runs = list[int]()
            model.lm_head.register_forward_hook(lambda *_: runs.append(1))
            for result in super().run():
                heads.append(len(runs))
                yield result

    monkeypatch.setattr(pipeline, "Calibration", Counted)
    monkeypatch.setattr(pipeline, "TOKENS_IN_BATCH", 1)
    source, data = llama
    convert(source, tmp_path / "packed", calibrating.recipe(data))
    assert heads == [2 * (batch + 1) for batch in range(len(heads))] and len(heads) > 1


def ternary_rows(record: dict[str, Any]) -> dict[str, Any]:
    return {n: row for n, row in record["tensors"].items() if row["becomes"] == "ternary"}


# decoders, encoders, both; parallel, shared and stacked blocks, transposed and joined weights
KINDS = (
    *("llama_tied", "gemma3_text", "phi3", "gpt2", "gptj", "mamba"),
    *("mixtral", "deepseek_v3", "gpt_oss", "llama4"),
    *("bert_classifier", "albert", "vit", "clip", "t5", "whisper"),
)


@pytest.mark.parametrize("name", KINDS)
def test_every_architecture_is_calibrated(name: str, tmp_path: Path, seen: Seen) -> None:
    source = calibrating.save(name, tmp_path / "source", torch.bfloat16)
    data = calibrating.data(name, tmp_path)
    record = convert(source, tmp_path / "packed", calibrating.recipe(data, num_samples=8))
    found = record["calibration"]
    few = {tensor for block in found["blocks"] for tensor in block["uncalibrated"]}
    for tensor, row in ternary_rows(record).items():
        assert row["method"] == ("itf" if tensor in few else "gptq"), tensor
        assert tensor not in few or "experts" in tensor
    stored = json.loads((tmp_path / "packed" / "ternarize.json").read_text())
    assert stored["calibration"] == json.loads(json.dumps(found))
    blocks = found["blocks"]
    errors = [pair for block in blocks for pair in block["matrices"].values()]
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    assert all(after <= before for before, after in errors)
    assert_measured(tmp_path / "packed", seen)
    assert not (tmp_path / "packed" / ".calibration").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_calibration_brings_blocks_nearer_to_the_source(name: str, tmp_path: Path) -> None:
    source = calibrating.save(name, tmp_path / "source", torch.bfloat16)
    recipe = calibrating.recipe(calibrating.data(name, tmp_path, 40), num_samples=32)
    record = convert(source, tmp_path / "packed", recipe)
    blocks = record["calibration"]["blocks"]
    assert sum(b["after"] for b in blocks) < 0.95 * sum(b["before"] for b in blocks)


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": -1},
        {"group_size": 0},
        {"rotation": 0},
        {"rotation": 4, "scale_bits": 8},
        {"planes": ("*down_proj*",), "dtype": "float32"},
        {"reconstruct": 3, "window": 2, "group_size": 48},
        {"zeros": 0.7, "scale_bits": 6, "codec": "rans"},
        {"zeros": 0.7, "reconstruct": 3, "window": 2},
        {"scale_bits": 6, "codec": "rans", "reconstruct": 3},
    ],
    ids=str,
)
def test_every_form_is_saved_as_it_was_measured(
    options: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path, seen: Seen
) -> None:
    source, data = llama
    recipe = calibrating.recipe(data, num_samples=8, **options)
    record = convert(source, tmp_path / "packed", recipe)
    assert_measured(tmp_path / "packed", seen)
    for row in ternary_rows(record).values():
        assert recipe.zeros is None or abs(row["sparsity"] - recipe.zeros - 0.02) < 0.025


def test_experts_are_trained_and_saved_in_every_orientation(tmp_path: Path, seen: Seen) -> None:
    source = calibrating.save("gpt_oss", tmp_path / "source")
    data = calibrating.data("gpt_oss", tmp_path)
    recipe = calibrating.recipe(data, num_samples=8, reconstruct=3, window=2, scale_bits=8)
    convert(source, tmp_path / "packed", recipe)
    assert_measured(tmp_path / "packed", seen)


@pytest.mark.parametrize("end", ["head", "embeddings"])
def test_head_and_embeddings_are_packed_beside(
    end: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, data = llama
    record = convert(source, tmp_path / "packed", calibrating.recipe(data, **{end: "int8"}))
    name = {"head": "lm_head.weight", "embeddings": "model.embed_tokens.weight"}[end]
    assert record["tensors"][name]["becomes"] == "int8"
    assert {row["method"] for row in ternary_rows(record).values()} == {"gptq"}
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        assert bool(model(**calibrating.inputs("llama", 1)).logits.isfinite().all())


# --- a run that is broken off -------------------------------------------------------------------


def count_solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return solve(*args, **options)

    monkeypatch.setattr(solve_block, "solve", counted)
    return calls


def break_at(text: str) -> Progress:
    def progress(done: int, total: int, what: str, stage: str) -> None:
        if text in what:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    "options", [{}, {"reconstruct": 3, "window": 2}, {"target_bpw": 2.2}], ids=["", "train", "bpw"]
)
def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = calibrating.save("t5", tmp_path / "t5"), calibrating.data("t5", tmp_path)
    recipe = calibrating.recipe(data, num_samples=8, **options)
    solved = count_solved(monkeypatch)
    convert(source, tmp_path / "whole", recipe)
    whole = len(solved)
    solved.clear()
    for place in ("block 2 of 4", "block 4 of 4"):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "broken", recipe, progress=break_at(place))
        assert not (tmp_path / "broken").exists()
    convert(source, tmp_path / "broken", recipe)
    assert len(solved) == whole, "a block has been solved twice"
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_every_environment_that_took_part_is_recorded(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, data = llama
    recipe, threads = calibrating.recipe(data, num_samples=8), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "packed", recipe, progress=break_at("block 2 of 2"))
    torch.set_num_threads(threads + 1)
    try:
        record = convert(source, tmp_path / "packed", recipe)
    finally:
        torch.set_num_threads(threads)
    found = [(each["threads"], each["torch"]) for each in record["calibration"]["environments"]]
    assert found == [(threads, torch.__version__), (threads + 1, torch.__version__)]


def test_a_break_while_what_was_trained_is_written_does_no_harm(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: list[float]
) -> None:
    source, data = llama
    recipe = calibrating.recipe(data, num_samples=8, reconstruct=3, window=2)
    convert(source, tmp_path / "whole", recipe)
    assert min(gains) < 1, "the files of the stages are alike"
    write = SolvedBlocks.write

    def broken(self: Any, file: Path, *args: Any) -> None:
        if file.name == "00001-00001.safetensors":  # block 0 of the stage has been written
            raise KeyboardInterrupt
        write(self, file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SolvedBlocks, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "broken", recipe)
    assert (tmp_path / "broken.partial/.calibration/00000-00001.safetensors").is_file()
    convert(source, tmp_path / "broken", recipe)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


# --- experts that see too few tokens ------------------------------------------------------------


def test_experts_that_see_too_few_tokens_are_counted(tmp_path: Path) -> None:
    source = calibrating.save("mixtral", tmp_path / "source")
    # a router that sends every token to experts 1 and 2
    router = "model.layers.0.mlp.gate.weight"
    names = load_file(source / "model.safetensors")
    router = next(n for n in names if n.startswith("model.layers.0.") and "gate.weight" in n)
    calibrating.change(source, router, lambda w: torch.zeros_like(w))
    bias = torch.zeros(64)
    bias[0] = 1
    embedding = next(n for n in names if "embed_tokens" in n)
    calibrating.change(source, embedding, lambda w: w + 5 * bias)
    calibrating.change(
        source, router, lambda w: torch.tensor([0.0, 9, 8, 0])[:, None] * bias.to(w.dtype)
    )
    data = calibrating.data("mixtral", tmp_path)
    record = convert(source, tmp_path / "packed", calibrating.recipe(data, num_samples=8))
    first = record["calibration"]["blocks"][0]
    unseen = {n: 0 for n in names if ".layers.0." in n and ("experts.0." in n or "experts.3." in n)}
    assert len(unseen) == 6
    assert first["uncalibrated"] == unseen
    assert record["calibration"]["uncalibrated"] == sum(
        len(b["uncalibrated"]) for b in record["calibration"]["blocks"]
    )
    rows = {n: r["method"] for n, r in ternary_rows(record).items() if ".layers.0." in n}
    for name, method in rows.items():
        if "experts" in name:
            expert = int(name.split("experts.")[1].split(".")[0])
            assert method == ("gptq" if expert in (1, 2) else "itf"), name
        else:
            assert method == "gptq"


# --- sources that were trained ternary ----------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 32])
def test_what_was_trained_ternary_stays_lossless(group_size: int, tmp_path: Path) -> None:
    source = calibrating.save("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    ternary = [n for n in tensors if "layers.0" in n and tensors[n].ndim == 2]
    for name in ternary:
        grouped = absmean(tensors[name], 0)
        tensors[name] = grouped.dequantize(torch.float32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    data = calibrating.data("llama", tmp_path)
    recipe = calibrating.recipe(data, num_samples=8, group_size=group_size)
    record = convert(source, tmp_path / "packed", recipe)
    for name, row in ternary_rows(record).items():
        assert row["method"] == ("lossless" if name in ternary else "gptq")
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32, dequantize=True)
    for name in ternary:
        assert torch.equal(model.get_parameter(name).data, tensors[name])


def test_what_is_lossless_only_in_finer_groups_stays_so(tmp_path: Path) -> None:
    source = calibrating.save("llama", tmp_path / "source")
    name = "model.layers.0.self_attn.q_proj.weight"
    calibrating.change(source, name, lambda w: absmean(w, 128).dequantize(torch.float32))
    recipe = calibrating.recipe(calibrating.data("llama", tmp_path), num_samples=8, group_size=0)
    record = convert(source, tmp_path / "packed", recipe)
    assert record["tensors"][name]["method"] == "lossless"
    ternarize.load(tmp_path / "packed")


def test_an_expert_of_zeros_is_calibrated_with_the_others(tmp_path: Path, seen: Seen) -> None:
    source = calibrating.save("mixtral", tmp_path / "source")
    names = load_file(source / "model.safetensors")
    name = next(n for n in names if "layers.0" in n and "experts.2.w1" in n)
    calibrating.change(source, name, torch.zeros_like)
    data = calibrating.data("mixtral", tmp_path)
    convert(source, tmp_path / "packed", calibrating.recipe(data, num_samples=8))
    assert_measured(tmp_path / "packed", seen)


# --- errors -------------------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_is_told_as_ever(tmp_path: Path) -> None:
    source = calibrating.save("llama", tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight"
    calibrating.change(source, name, lambda w: w.index_fill(1, torch.tensor(5), torch.inf))
    data = calibrating.data("llama", tmp_path)
    with pytest.raises(WeightError, match=rf"{name}: 136 of 8704 .*first infinite at \[0, 5\]"):
        convert(source, tmp_path / "packed", calibrating.recipe(data, num_samples=8))
    assert not (tmp_path / "packed.partial").exists()


def test_activations_that_overflow_are_told_in_one_line(tmp_path: Path) -> None:
    source = calibrating.save("llama", tmp_path / "source")
    for name in ("gate", "up"):
        calibrating.change(source, f"model.layers.0.mlp.{name}_proj.weight", lambda w: w * 1e25)
    data = calibrating.data("llama", tmp_path)
    with pytest.raises(CheckpointError, match=r"model.layers.0 gives numbers that are not finite"):
        convert(source, tmp_path / "packed", calibrating.recipe(data, num_samples=8))


def test_too_little_data_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    few = calibrating.data("llama", tmp_path, samples=3)
    with pytest.raises(UsageError):
        convert(llama[0], tmp_path / "packed", calibrating.recipe(few))
    assert not (tmp_path / "packed.partial").exists()


def test_data_that_the_model_cannot_take_are_told_in_one_line(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "data.safetensors"
    save_file({"inputs_embeds": torch.randn(20, 8, 63)}, path)
    with pytest.raises(CheckpointError, match="its forward fails on the calibration data"):
        convert(llama[0], tmp_path / "packed", calibrating.recipe(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_inputs_in_another_dtype_calibrate_as_in_that_of_the_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = calibrating.save("vit", tmp_path / "source")
    rounded = {n: t.half() for n, t in calibrating.inputs("vit", 20).items()}
    for name, own in (("own", dtype), ("float32", torch.float32)):
        save_file({n: t.to(own) for n, t in rounded.items()}, tmp_path / f"{name}.safetensors")
        recipe = calibrating.recipe(tmp_path / f"{name}.safetensors", num_samples=8)
        convert(source, tmp_path / name, recipe)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("own", "float32"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_windows_begin_with_is_on_record(tmp_path: Path, seen: Seen) -> None:
    source = calibrating.save("llama", tmp_path / "source")
    word_tokenizer(around="<s> w9 $A </s>").save_pretrained(source)
    (tmp_path / "text.txt").write_text("\n<|doc|>\n".join(f"w{at} " * 30 for at in range(10, 60)))
    recipe = calibrating.recipe(tmp_path / "text.txt", num_samples=8, seq_len=16)
    record = convert(source, tmp_path / "packed", recipe)
    found = record["calibration"]
    assert found["data"]["windows_begin_with"] == ["<s>", "w9"]
    # the figures are of what is predicted behind that
    columns = [
        compare_logits([o.logits[row, :-1] for o in (packed, theirs)], ids, 2)
        for batch, theirs, packed in seen
        for row, ids in enumerate(batch["input_ids"])
    ]
    assert all(ids[:2].tolist() == [1, 9] for batch, _, _ in seen for ids in batch["input_ids"])
    assert found["quality"] == summarize(torch.tensor(columns, dtype=torch.float64).T)


def test_tensors_of_one_parameter_must_have_one_form(tmp_path: Path) -> None:
    plan = make_plan(calibrating.save("mixtral", tmp_path / "source"), Recipe())
    tensors = [t for t in plan.tensors if t.ternary]

    def check(at: int, **change: Any) -> None:
        mixed = [*tensors[:at], replace(tensors[at], **change), *tensors[at + 1 :]]
        check_fused((t.choice, t.form) for t in mixed)

    at = next(i for i, t in enumerate(tensors) if "experts.1.w1" in t.name)
    check(at)
    for change in ({"group_size": 64}, {"planes": 2}, {"rotation": (16, 0)}):
        with pytest.raises(SelectionError, match="both load into"):
            check(at, **change)
    check(next(i for i, t in enumerate(tensors) if t.name.endswith("q_proj.weight")), planes=2)


def test_nothing_of_a_conversion_that_ended_is_left(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, data = llama
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    convert(copy, tmp_path / "packed", calibrating.recipe(data, num_samples=8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "packed"]
    assert not any(p.name.startswith(".") for p in (tmp_path / "packed").iterdir())
