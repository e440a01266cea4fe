"""The report on a packed checkpoint, as data and as a drawing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from ternarize.convert.run import convert
from ternarize.errors import OutputError, UsageError
from ternarize.files.names import RECORD
from ternarize.measure.report import inspect, plot
from ternarize.plans.recipe import Recipe

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    tiny_models.save("llama", directory / "source")
    convert(directory / "source", directory / "packed", Recipe("itf", 32), threads=1)
    return directory / "packed"


def calibrated(report: dict[str, Any], blocks: int = 2) -> dict[str, Any]:
    """The report with a calibration, as convert records it."""
    found = {
        "data": {},
        "quality": {
            "perplexity": {"value": 41.5, "standard_error": None},
            "source_perplexity": {"value": 34.6, "standard_error": None},
            "top1_agreement": {"value": 0.731, "standard_error": None},
        },
        "forms": {},
        "uncalibrated": 0,
        "blocks": [
            {"block": f"layers.{i}", "before": 0.2 + i, "after": 0.1} for i in range(blocks)
        ],
    }
    return {**report, "calibration": found}


def test_a_plot_is_an_image_and_may_be_drawn_again(packed: Path, tmp_path: Path) -> None:
    report = inspect(packed)
    for each in (report, calibrated(report)):
        plot(each, tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes().startswith(PNG)


def test_a_plot_says_bits_quality_and_which_matrices(packed: Path, tmp_path: Path) -> None:
    report = inspect(packed)
    plot({**calibrated(report), "model": "user/costs $5 or $6"}, tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    bits = f"{report['totals']['ternary_bpw']:.3f} bits per ternary weight"
    for words in (
        bits,
        "costs $5 or $6",
        "perplexity 41.5, source 34.6, top-1 agreement 73.1%",
        "before calibration",
        "after calibration",
        "self_attn.q_proj",
        "mlp.down_proj",
    ):
        assert words in text, words
    plot(report, tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert bits in text and "calibration" not in text


def test_a_plot_of_tensors_of_unknown_error_is_drawn(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    (tmp_path / "packed" / RECORD).unlink()
    plot(inspect(tmp_path / "packed"), tmp_path / "out.pdf")
    assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")


def test_a_plot_needs_a_directory_and_a_kind_of_image(packed: Path, tmp_path: Path) -> None:
    report = inspect(packed)
    with pytest.raises(OutputError, match="there is no directory"):
        plot(report, tmp_path / "no" / "out.png")
    for name in ("out.doc", "out"):
        with pytest.raises(UsageError, match="no kind of image"):
            plot(report, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_plot_says_how_to_get_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'ternarize\[plot\]'") as caught:
        plot(inspect(packed), tmp_path / "out.png")
    assert len(str(caught.value).splitlines()) == 1


def test_figures_that_are_no_numbers_are_left_out(packed: Path, tmp_path: Path) -> None:
    """A record may come from anywhere, and say anything."""
    shutil.copytree(packed, tmp_path / "packed")
    record = json.loads((packed / RECORD).read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    record["tensors"][name] |= {"relative_error": "small", "method": {"a": 1}, "sparsity": None}
    record["tensors"]["model.norm.weight"]["reason"] = ["norm"]
    record["source"] = {"bytes": "few"}
    (tmp_path / "packed" / RECORD).write_text(json.dumps(record))
    report = inspect(tmp_path / "packed")
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows[name]["relative_error"] is None and rows[name]["method"] is None
    assert 0 < rows[name]["sparsity"] < 1
    assert rows["model.norm.weight"]["reason"] is None
    assert report["totals"]["source_bytes"] is None
    plot(report, tmp_path / "out.png")
