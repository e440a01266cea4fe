"""A small sample of the campaign of tests/campaigns/determinism.py, which says what is required."""

from pathlib import Path

import pytest
from test_campaign_kill import campaign, needs_linux


@needs_linux
@pytest.mark.slow
def test_conversions_give_the_same_bytes(tmp_path: Path) -> None:
    options = ("--repeat", "1", "--sources", "tied", "--recipes", "1", "--calibrated", "0")
    rows = campaign("determinism", tmp_path / "out.json", *options)
    assert rows and all(row["results"] == 1 for row in rows)
    assert any("alone" in row["kind"] for row in rows)  # without the compiled core


@needs_linux
@pytest.mark.slow
def test_calibrations_give_the_same_bytes(tmp_path: Path) -> None:
    options = ("--repeat", "1", "--sources", "tied", "--recipes", "1", "--calibrated", "2")
    rows = campaign("determinism", tmp_path / "out.json", *options)
    assert all(row["results"] == 1 for row in rows)
    assert any("calibrated" in row["kind"] for row in rows)
