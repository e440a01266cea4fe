"""The notebook in examples/: it is stored without outputs, and all of it runs.

It is JSON, of which this reads as much as is there: cells with Python, and cells with commands,
whose lines begin with ! and name variables in braces. So no Jupyter is needed to test it.
"""

import contextlib
import io
import json
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from typer.testing import CliRunner

from ternarize.cli.app import app

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "notebook.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def run(text: str, names: dict[str, Any]) -> str:
    """What a cell prints."""
    if not text.startswith("!"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, NOTEBOOK.name, "exec"), names)
        return printed.getvalue()
    said = ""
    for line in text.splitlines():
        command = re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), line)
        program, *arguments = shlex.split(command.removeprefix("!"))
        assert line.startswith("!") and program == "ternarize", line
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.stderr
        said += result.output
    return said


def test_it_is_stored_without_outputs_and_its_links_lead_somewhere() -> None:
    written = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in written)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    prose = "".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", prose)
    assert len(links) > 5 and all((EXAMPLES / link).exists() for link in links)


def test_it_runs_from_the_first_cell_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny-llama", "eval.txt"):
        (tmp_path / name).symlink_to(EXAMPLES / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    matplotlib.use("agg")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: None)
    names: dict[str, Any] = {}
    said = {c["id"]: run("".join(c["source"]), names) for c in CELLS if c["cell_type"] == "code"}
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")
    assert "45.9% zeros" in said["rounded"] and said["plots"].count("1.75 bits a weight") == 2
    assert said["load"].count("fitted") == 2 and "To read a file," in said["generate"]
    # what its words promise
    errors = [names["reports"][name]["totals"]["relative_error"] for name in ("rounded", "fitted")]
    far = [re.search(r"kl divergence +([\d.]+)", said[f"eval-{name}"]) for name in names["reports"]]
    lost = [float(found[1]) for found in far if found is not None]
    assert errors[1] > errors[0] and lost[1] < 0.6 * lost[0]
