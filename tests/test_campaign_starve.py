"""A small sample of the campaign of tests/campaigns/starve.py, which says what is required."""

from pathlib import Path

from test_campaign_kill import campaign, needs_linux

KINDS = ["room", "errors", "permission", "files", "races", "places", "workers", "changes", "umask"]


@needs_linux
def test_starved_conversions_say_why_and_are_completed_to_the_same_bytes(tmp_path: Path) -> None:
    rows = campaign("starve", tmp_path / "out.json", "--count", "1", "--kinds", *KINDS)
    assert len(rows) >= len(KINDS) + 6
    assert all(row["passed"] == row["tried"] > 0 for row in rows)


@needs_linux
def test_less_memory_than_predicted_takes_fewer_threads_or_is_refused(tmp_path: Path) -> None:
    (row,) = campaign("starve", tmp_path / "out.json", "--count", "1", "--kinds", "memory")
    assert row["passed"] == row["tried"] == 6 and row["refused"] == 2
