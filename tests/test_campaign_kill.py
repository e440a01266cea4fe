"""A small sample of the campaigns of tests/campaigns/kill.py, which say what is required."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="loads a library before libc, which a C compiler has to build",
)


def campaign(name: str, out: Path, *options: str) -> list[dict[str, Any]]:
    """Run a campaign in a process of its own; its rows, or its failures as an error."""
    command = [sys.executable, "-m", f"tests.campaigns.{name}", "--json", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


@needs_linux
def test_killed_conversions_are_completed_to_the_same_bytes(tmp_path: Path) -> None:
    options = ("--sources", "tied", "--count", "1", "--every", "61", "--no-calibrated")
    rows = campaign("kill", tmp_path / "out.json", *options)
    assert [row["kind"] for row in rows] == ["random", "boundary", "power", "signal", "early"]
    assert all(row["passed"] == row["tried"] > 0 for row in rows)
    boundary = rows[1]
    assert boundary["killed"] == boundary["tried"] >= 3
