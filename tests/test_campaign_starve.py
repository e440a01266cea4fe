"""A small sample of the campaign of tests/campaigns/starve.py, which says what is required."""

from pathlib import Path

import pytest
from test_campaign_kill import campaign, needs_linux

OFTEN = ("room", "permission")


@needs_linux
def test_starved_conversions_say_why_and_are_completed_to_the_same_bytes(tmp_path: Path) -> None:
    rows = campaign("starve", tmp_path / "out.json", "--count", "1", "--kinds", *OFTEN)
    assert len(rows) == len(OFTEN)
    assert all(row["passed"] == row["tried"] > 0 for row in rows)


@needs_linux
@pytest.mark.slow
def test_whatever_conversions_lack_they_say_so(tmp_path: Path) -> None:
    rows = campaign("starve", tmp_path / "out.json", "--count", "1")
    assert len(rows) >= 16
    assert all(row["passed"] == row["tried"] > 0 for row in rows)
