"""A sample of the campaign of hostile files (tests/campaigns/hostile.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = 25  # rows of the table that the sample has to reach


def test_hostile_files_are_refused_in_one_line_and_crash_nothing(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = ["--count", "30", "--sample", "6", "--seed", "0", "--json", str(table)]
    found = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.hostile", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    rows = json.loads(table.read_text())
    assert len(rows) >= GROUPS, sorted(rows)
    for name, row in rows.items():
        assert row["executions"] > 0 and not row["faults"], name
    assert rows["flipped bits"]["refused"] > 0 and rows["numbers"]["accepted"] > 0
