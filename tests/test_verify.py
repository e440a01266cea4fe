"""Verification of calibrated checkpoints: what can be compared without the data, and what fails.

Of checkpoints that were made without data it is tested with the conversion (test_convert.py).
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrating
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import DigestError, FormatError
from ternarize.files import container, metadata
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.files.names import RECORD
from ternarize.files.sums import SUMS
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.plans.recipe_files import read_recipe
from ternarize.sources.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of token ids, for models that have no tokenizer."""
    path = tmp_path_factory.mktemp("samples") / "ids.safetensors"
    ids = torch.randint(3, 160, (12, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, path)
    return path


def calibrated(
    model: str, directory: Path, samples: Path, recipe: dict[str, Any], **options: Any
) -> tuple[Path, Path]:
    """A source and its calibrated conversion."""
    source, packed = directory / "source", directory / "packed"
    tiny_models.save(model, source)
    calibrate = Calibrate(str(samples), num_samples=8, **options)
    convert(source, packed, Recipe(method="gptq", calibrate=calibrate, **recipe), threads=1)
    return source, packed


@pytest.fixture(scope="module")
def llama(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return calibrated("llama", tmp_path_factory.mktemp("llama"), samples, {"head": "int8"})


def test_calibrated_trits_are_compared_by_their_error_and_the_rest_is_derived_again(
    llama: tuple[Path, Path],
) -> None:
    source, packed = llama
    result = verify(packed, source)
    assert (result["ternary"], result["int8"], result["kept"]) == (14, 1, 6)
    assert result["compared"] == {"converted_again": 7, "by_error": 14, "in_shape": 0}
    assert verify(packed)["compared"] is None


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "planes, 8-bit scales": ({"planes": ("*.q_proj.weight",), "scale_bits": 8}, {}),
    "not rotated, rows": ({"group_size": -1}, {"rotation": 0}),
    "budget": ({}, {"target_bpw": 3.0}),
    "trained": ({}, {"reconstruct": 4}),
    "zeros": ({"zeros": 0.6, "scale_bits": 6, "codec": "rans"}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_calibrated_tensor_can_be_compared(
    form: str, samples: Path, tmp_path: Path
) -> None:
    recipe, options = FORMS[form]
    source, packed = calibrated("llama", tmp_path, samples, recipe, **options)
    compared = verify(packed, source)["compared"]
    assert compared["by_error"] == 14
    # training fits the norms of the blocks as well, if that helps
    assert compared["in_shape"] in ((0,) if form != "trained" else range(5))


def test_experts_that_saw_too_little_have_their_share_of_zeros_too(tmp_path: Path) -> None:
    data = calibrating.data("mixtral", tmp_path, length=8)
    options = {"zeros": 0.6, "num_samples": 8, "rotation": 0}
    source = calibrating.save("mixtral", tmp_path / "source")
    record = convert(source, tmp_path / "packed", calibrating.recipe(data, **options))
    few = {name for each in record["calibration"]["blocks"] for name in each["uncalibrated"]}
    assert few
    for name in few:
        row = record["tensors"][name]
        assert row["method"] == "itf" and 0.6 <= row["sparsity"] < 0.65
    compared = verify(tmp_path / "packed", source)["compared"]
    assert compared["by_error"] >= len(few)


def test_experts_that_saw_too_little_are_what_a_conversion_without_data_gives(
    tmp_path: Path,
) -> None:
    data = calibrating.data("mixtral", tmp_path, length=8)
    options = {"scale_bits": 8, "num_samples": 8, "rotation": 0}
    source = calibrating.save("mixtral", tmp_path / "source")
    record = convert(source, tmp_path / "packed", calibrating.recipe(data, **options))
    few = {name for each in record["calibration"]["blocks"] for name in each["uncalibrated"]}
    again = {name for name in few if record["tensors"][name]["method"] == "itf"}
    assert again
    assert verify(tmp_path / "packed", source)["compared"]["converted_again"] >= len(again)


def test_the_error_on_record_is_that_of_the_weights_that_are_loaded(
    samples: Path, tmp_path: Path
) -> None:
    """Also where calibration has given a trit the other sign than its weight."""
    source, packed = calibrated("llama", tmp_path, samples, {"planes": ("*.q_proj.weight",)})
    rows = json.loads((packed / RECORD).read_text())["tensors"]
    weights, stored = load_file(source / "model.safetensors"), open_checkpoint(packed)
    for name, record in metadata.records_of(stored).items():
        if record.kind == "ternary":
            trits, scales = (
                stored.read(n).reshape(stored.tensors[n].shape) for n in (name, name + SCALE_SUFFIX)
            )
            missed = weights[name].double() - container.dequantize(trits, scales, record).double()
            error = float(missed.square().sum() / weights[name].double().square().sum())
            assert rows[name]["relative_error"] == pytest.approx(error, rel=1e-5)


def test_biases_that_calibration_fitted_are_told_apart(samples: Path, tmp_path: Path) -> None:
    source, packed = calibrated("bert", tmp_path, samples, {})
    rows = json.loads((packed / RECORD).read_text())["tensors"]
    fitted = [name for name, row in rows.items() if row.get("fitted")]
    assert fitted and all(name.endswith(".bias") for name in fitted)
    assert all(rows[name]["reason"] == "bias, fitted by calibration" for name in fitted)
    assert verify(packed, source)["compared"]["in_shape"] == len(fitted)


def change(source: Path, target: Path, how: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    how(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_another_source_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, packed = llama
    down = "model.layers.1.mlp.down_proj.weight"

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[down][0] *= 1.25

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[down].neg_()

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        key, value = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "kv")
        tensors[key], tensors[value] = tensors[value].clone(), tensors[key].clone()

    def norm(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] += 0.5

    def head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 3] = 2

    for how, words in (
        (nudge, "on record it is"),
        (flip, "on record it is"),
        (swap, "on record it is"),
        (norm, "is not what"),
        (head, "is not what"),
    ):
        other = change(source, tmp_path / how.__name__, how)
        with pytest.raises(DigestError, match=words):
            verify(packed, other)


def edit(packed: Path, target: Path, how: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a packed checkpoint with another record, and no list of digests to betray it."""
    shutil.copytree(packed, target)
    (target / SUMS).unlink()
    record = json.loads((packed / RECORD).read_text())
    how(record)
    (target / RECORD).write_text(json.dumps(record))
    return target


def test_an_error_that_was_not_measured_is_refused(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, packed = llama

    for at, said in enumerate((0.1, None, "0.3")):

        def lie(record: dict[str, Any], said: Any = said) -> None:
            record["tensors"]["model.layers.0.mlp.up_proj.weight"]["relative_error"] = said

        with pytest.raises(DigestError, match="on record it is"):
            verify(edit(packed, tmp_path / str(at), lie), source)


def test_trits_without_data_cannot_pass_as_calibrated(
    llama: tuple[Path, Path], samples: Path, tmp_path: Path
) -> None:
    """Nothing is compared by its error alone where the recipe has no calibration."""
    source, packed = llama

    def without_data(record: dict[str, Any]) -> None:
        record["recipe"] |= {"method": "itf", "calibrate": None}

    with pytest.raises(DigestError, match="is not what"):
        verify(edit(packed, tmp_path / "packed", without_data), source)


HOSTILE: list[tuple[str, Any]] = [
    ("calibrate", []),
    ("calibrate", "default"),
    ("calibrate", None),
    ("calibrate", {"dataset": 5}),
    ("calibrate", {"num_samples": "many"}),
    ("calibrate", {"num_samples": 1.5}),
    ("calibrate", {"num_samples": True}),
    ("calibrate", {"num_samples": 0}),
    ("calibrate", {"target_bpw": float("nan")}),
    ("calibrate", {"rotation": 7}),
    ("calibrate", {"unheard_of": 1}),
    ("method", ["gptq"]),
    ("method", "itf"),
    ("method", "magic"),
    ("group_size", "128"),
    ("group_size", -5),
    ("keep", "*.weight"),
    ("keep", [1]),
    ("head", "int2"),
    ("unheard_of", 1),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_recipe_that_no_conversion_wrote_is_refused(
    key: str, value: Any, llama: tuple[Path, Path]
) -> None:
    record = json.loads((llama[1] / RECORD).read_text())
    assert read_recipe(record).calibrate is not None
    record["recipe"][key] = value
    with pytest.raises(FormatError, match="recipe cannot be used"):
        read_recipe(record)


@pytest.mark.parametrize("recipe", [None, [], "gptq"])
def test_a_record_without_a_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(FormatError, match="recipe cannot be used"):
        read_recipe({"recipe": recipe})


BROKEN: list[tuple[tuple[str | int, ...], Any]] = [
    (("calibration",), 5),
    (("calibration", "blocks"), None),
    (("calibration", "blocks", 0), "first"),
    (("calibration", "blocks", 0, "before"), "0.1"),
    (("calibration", "blocks", 0, "matrices"), []),
    (("calibration", "blocks", 0, "uncalibrated"), {"x": "few"}),
    (("calibration", "quality"), {"perplexity": 5.0}),
    (("calibration", "quality"), {"perplexity": {"value": 5.0}}),
    (("calibration", "quality"), {"perplexity": {"value": [], "standard_error": None}}),
    (("calibration", "forms"), {"rows": "all"}),
    (("calibration", "data"), "default"),
    (("calibration", "data", "notes"), 3),
]


@pytest.mark.parametrize(("path", "value"), BROKEN, ids=lambda v: str(v)[:40])
def test_a_calibration_that_no_conversion_wrote_is_refused(
    path: tuple[str | int, ...], value: Any, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    def put(record: dict[str, Any]) -> None:
        place: Any = record
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = copy.deepcopy(value)

    with pytest.raises(FormatError, match="calibration cannot be read"):
        verify(edit(llama[1], tmp_path / "packed", put))
