"""A small sample of the campaign of tests/campaigns/arguments.py, which says what is required."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_random_command_lines_end_in_order(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.campaigns.arguments", "--count", "250"]
    done = subprocess.run(
        [*command, "--json", str(report)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ends = json.loads(report.read_text())["ends"]
    assert sum(ends[code] for code in "012") == 250
    for command_name in ("convert", "export", "inspect", "verify"):
        assert ends[f"{command_name} 0"] > 0  # not all of them are nonsense
