"""A small sample of the campaign of tests/campaigns/arguments.py, which says what is required."""

from pathlib import Path

from test_campaign_kill import campaign, needs_linux

COUNT = 60


@needs_linux
def test_random_command_lines_end_in_order(tmp_path: Path) -> None:
    rows = campaign("arguments", tmp_path / "out.json", "--count", str(COUNT))
    assert sum(row["0"] + row["1"] + row["2"] for row in rows) == COUNT
    done = {row["command"]: row["0"] for row in rows}  # not all of them are nonsense
    assert all(done[command] > 0 for command in ("convert", "export", "inspect", "verify"))
