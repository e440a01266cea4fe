"""What other libraries say while a command runs does not come between its results.

Each command runs in a process of its own, in which libraries have been made to warn, by every way
that there is, whenever the model runs and whenever a JSON file is read.
"""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ternarize.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-llama"

NOISY = """
import json, logging, sys, warnings

def noise():
    warnings.simplefilter("always")  # as some libraries do when they are imported
    warnings.warn("noise of a user warning")
    warnings.warn("noise of what will go", FutureWarning)
    warnings.warn("noise of what is going", DeprecationWarning)
    for library in ("transformers.models.llama", "huggingface_hub.file_download", "torch", "other"):
        logging.getLogger(library).warning("noise of the logger %s", library)
    logging.getLogger("other").info("noise of little weight")

def loads(*args, **kwargs):
    noise()
    return real(*args, **kwargs)

real, json.loads = json.loads, loads

import ternarize.runtime.load

def load(*args, **kwargs):
    model = loaded(*args, **kwargs)
    forward = model.forward
    def run(*args, **kwargs):
        noise()
        from transformers.utils.logging import tqdm
        for _ in tqdm(range(2), desc="noise of a bar"):
            pass
        logging.getLogger("other").error("an error of theirs")
        return forward(*args, **kwargs)
    model.forward = run
    return model

module = sys.modules["ternarize.runtime.load"]
loaded, module.load = module.load, load

from ternarize.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("terminal") / "packed"
    app(["convert", str(EXAMPLE), str(output), "-q"], standalone_mode=False)
    return output


def run(program: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", program, *map(str, arguments)]
    # bars in a pipe, too
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    environment.pop("TORCH_CPP_LOG_LEVEL", None)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


OPTIONS: dict[str, tuple[str | Path, ...]] = {
    "generate": ("--prompt", "The function returns", "--max-new-tokens", "8"),
    "eval": ("--source", EXAMPLE, "--text", ROOT / "examples" / "eval.txt", "--seq-len", "64"),
    "verify": ("--source", EXAMPLE),
}
RUN_A_MODEL = ["generate", "eval"]


# those that run a model are alike
@pytest.mark.parametrize(
    "command", [c if c == "eval" else pytest.param(c, marks=pytest.mark.slow) for c in OPTIONS]
)
def test_warnings_of_other_libraries_reach_neither_stdout_nor_stderr_and_errors_do(
    packed: Path, command: str
) -> None:
    arguments = command, packed, *OPTIONS[command]
    quiet = CliRunner().invoke(app, [str(argument) for argument in arguments])
    noisy = run(NOISY, *arguments)
    assert noisy.stdout == quiet.stdout != ""
    error = "an error of theirs"
    said = [line for line in noisy.stderr.splitlines() if "per second" not in line]
    assert set(said) == ({error} if command in RUN_A_MODEL else set())


def test_debug_shows_all_that_they_say(packed: Path) -> None:
    said = run(NOISY, "generate", packed, *OPTIONS["generate"], "--debug").stderr
    for noise in (
        "a user warning",
        "what will go",
        "what is going",
        "the logger transformers.models.llama",
        "the logger huggingface_hub.file_download",
        "the logger torch",
        "the logger other",
        "a bar",
    ):
        assert f"noise of {noise}" in said, noise


def test_a_warning_of_torchs_own_core_is_silent_and_its_error_is_not(packed: Path) -> None:
    program = """
import datetime
from ternarize.cli import app as cli
from ternarize.cli.options import Debug

def connect(*, debug: Debug = False) -> None:
    import torch
    with __import__("contextlib").suppress(torch.distributed.DistNetworkError):
        wait = datetime.timedelta(milliseconds=50)
        torch.distributed.TCPStore("127.0.0.1", 1, is_master=False, timeout=wait)

cli.register("connect", connect)
cli.app()
"""
    level = re.compile(r"^\[(W|E)\d{4} ", re.MULTILINE)
    assert set(level.findall(run(program, "connect", "--debug").stderr)) == {"W", "E"}
    assert set(level.findall(run(program, "connect").stderr)) == {"E"}


def test_a_program_that_imports_ternarize_hears_what_it_would_hear_without(packed: Path) -> None:
    said = run(
        f"""
import logging, os, warnings
show = warnings.showwarning
import ternarize
model = ternarize.load({str(packed)!r})
assert warnings.showwarning is show and "TORCH_CPP_LOG_LEVEL" not in os.environ
assert logging.root.manager.disable == logging.NOTSET
warnings.warn("hear, hear")
logging.getLogger("transformers").warning("and this")
"""
    ).stderr
    assert "hear, hear" in said and "and this" in said


def test_a_command_leaves_a_program_that_calls_it_as_it_found_it(packed: Path) -> None:
    before = warnings.showwarning, warnings.filters[:], logging.root.manager.disable
    app(["inspect", str(packed)], standalone_mode=False)
    assert before == (warnings.showwarning, warnings.filters[:], logging.root.manager.disable)


def test_in_these_tests_a_warning_is_an_error_where_it_is_ours_and_only_there() -> None:
    def warn(module: str) -> None:
        warnings.warn_explicit("is going", DeprecationWarning, "x.py", 1, module=module)

    with pytest.raises(DeprecationWarning):
        warnings.warn("is going", DeprecationWarning, stacklevel=1)
    for ours in ("ternarize", "ternarize.cli", "tests.campaigns.kill", "packing", "reference"):
        with pytest.raises(DeprecationWarning):
            warn(ours)
    for theirs in ("transformers.models.llama", "huggingface_hub", "torch.nn.modules.module"):
        warn(theirs)
