"""`ternarize train` as a command: options, what it prints and logs, signals."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from test_cli import ok, run
from test_train_run import assert_same, source_of, text_of

from ternarize.cli.train import training_recipe
from ternarize.convert.run import convert
from ternarize.errors import UsageError
from ternarize.plans.recipe import Recipe
from ternarize.plans.recipe_files import open_recipe
from ternarize.train import state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return source_of("llama", folder / "source"), text_of(folder / "text.txt")


def options(text: Path, *more: str) -> list[str]:
    given = f"--method itf --group-size 32 --texts {text} --train-len 16 --batch 64 --lr 0.05"
    return [*given.split(), *more]


# --- options -------------------------------------------------------------------------------------


def recipe(*, named: str | None = None, **given: Any) -> Recipe:
    start = Recipe() if named is None else open_recipe(named)
    return training_recipe(start, given, named=named is not None)


def test_a_model_is_calibrated_first_where_nothing_else_is_said() -> None:
    found = recipe(steps=5, seed=3)
    assert found.method == "gptq" and found.calibrate is not None and found.train is not None
    assert found.calibrate.dataset == "default"
    assert found.train.steps == 5 and found.train.seed == found.calibrate.seed == 3


def test_a_column_is_that_of_the_texts_to_train_on() -> None:
    apart = recipe(steps=5, texts=["a.jsonl"], text_column="body")
    assert apart.calibrate is not None and apart.train is not None
    assert (apart.calibrate.text_column, apart.train.text_column) == (None, "body")
    same = recipe(steps=5, dataset="a.jsonl", text_column="body")
    assert same.calibrate is not None and same.train is not None
    assert (same.calibrate.text_column, same.train.text_column) == ("body", "body")
    alone = recipe(steps=5, method="itf", texts=["a.jsonl"], text_column="body", seed=4)
    assert alone.train is not None and alone.calibrate is None
    assert (alone.train.text_column, alone.train.seed) == ("body", 4)


def test_scales_of_a_start_are_learned_and_not_means() -> None:
    with pytest.raises(UsageError, match="'absmean' beside --start"):
        recipe(start="packed", method="absmean", steps=5, texts=["a.txt"])


def test_a_model_from_nothing_is_a_bitnet_of_the_texts() -> None:
    found = recipe(from_scratch=True, steps=5, texts=["a.txt"])
    assert (found.method, found.group_size, found.activations) == ("absmean", 0, "int8")
    assert found.train is not None and found.calibrate is None
    assert found.train.objective == "text" and found.train.all_weights
    other = recipe(from_scratch=True, steps=5, texts=["a.txt"], group_size=64, activations="none")
    assert (other.group_size, other.activations) == (64, "none")


def test_a_budget_takes_the_place_of_that_of_a_recipe() -> None:
    best, other = recipe(named="best"), recipe(named="best", steps=7)
    assert best.train is not None and other.train is not None
    assert (best.train.tokens, best.train.steps) == (1 << 20, None)
    assert (other.train.tokens, other.train.steps) == (None, 7)
    assert other.calibrate == best.calibrate


def test_a_recipe_of_a_training_alone_can_be_taken_without_calibration() -> None:
    found = recipe(named="best", method="itf", texts=["a.txt"])
    assert found.calibrate is None and found.train is not None and found.train.texts == ("a.txt",)


def test_a_recipe_that_was_written_down_is_followed_again(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    ok("train", source, tmp_path / "first", *options(text, "--steps", "3"), "-q")
    record = json.loads((tmp_path / "first" / "ternarize.json").read_text())["recipe"]
    record["train"]["texts"] = [str(text)]
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    ok("train", source, tmp_path / "again", "--recipe", tmp_path / "recipe.json", "-q")
    assert_same(tmp_path / "again", tmp_path / "first")
    ok("convert", source, tmp_path / "convert", "--recipe", tmp_path / "recipe.json", "-q")
    assert_same(tmp_path / "convert", tmp_path / "first")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "without an end"),
        ("--steps 2 --method itf", "without a text"),
        ("--steps 2 --dataset default --from-scratch", "with calibration"),
        ("--steps 0", "0"),
        ("--minutes 0", "0"),
        ("--steps 2 --objective guess", "guess"),
        ("--steps 2 --min-quality kl=1", "kl=1"),
        ("--steps 2 --report-to nothing", "'nothing'"),
        ("--steps 2 --texts a.txt=0", "weight 0"),
    ],
)
def test_mistakes_are_one_line(given: str, said: str, llama: tuple[Path, Path]) -> None:
    source, _ = llama
    output = source.parent / "mistake"
    result = run("train", source, output, *given.split(), "-q")
    assert result.exit_code != 0 and said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not output.exists() and not output.with_name("mistake.partial").exists()
    assert not output.with_name("mistake.logs").exists()


def test_an_output_that_exists_is_left_alone(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = llama
    result = run("train", source, tmp_path, *options(text, "--steps", "2"), "-q")
    assert result.exit_code == 1 and "exists already" in result.stderr
    assert not list(tmp_path.iterdir())


# --- what it prints and logs ---------------------------------------------------------------------


def test_what_was_learnt_is_printed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = llama
    result = ok("train", source, tmp_path / "packed", *options(text, "--steps", "3"))
    said = (
        r"trained on text\.txt: 3 steps, 192 tokens, \d+\.\d minutes; held-out loss \d\.\d+ "
        r"before, \d\.\d+ as kept, of step \d"
    )
    assert re.search(said, result.stdout) and "kl divergence" in result.stdout
    again = ok("inspect", tmp_path / "packed")
    assert re.search(said, again.stdout)


def test_json_is_the_record(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, text = llama
    given = options(text, "--tokens", "128", "--min-quality", "kl_divergence=9")
    result = ok("train", source, tmp_path / "packed", *given, "--json", "-q")
    found = json.loads(result.stdout)
    assert found["output"] == str(tmp_path / "packed")
    assert found["training"]["tokens"] == 128
    assert (
        json.loads((tmp_path / "packed" / "ternarize.json").read_text())["training"]
        == (found["training"])
    )


tracking: Any = import_module("accelerate.tracking")


class Fake(tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker that remembers."""

    name = "tensorboard"
    requires_logging_directory = True
    logged: list[tuple[int, dict[str, float]]] = []
    opened: list[tuple[str, str]] = []

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__()
        self.opened.append((run_name, str(logging_dir)))

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: Any) -> None: ...

    def log(self, values: Any, step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.logged.append((step, values))


def test_a_training_is_logged_to_trackers(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = llama
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    available = [tracking.LoggerType.TENSORBOARD]
    monkeypatch.setattr(tracking, "_available_trackers", available)
    given = options(text, "--steps", "4", "--report-to", "tensorboard")
    ok("train", source, tmp_path / "packed", *given, "-q")
    assert Fake.opened == [("packed", str(tmp_path / "packed.logs"))]
    assert [step for step, _ in Fake.logged] == [1, 2, 3, 4]
    assert all({"loss", "held", "speed"} <= values.keys() for _, values in Fake.logged)


def test_a_tracker_that_is_not_installed_is_named(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    source, text = llama
    given = options(text, "--steps", "4", "--report-to", "wandb")
    result = run("train", source, tmp_path / "packed", *given, "-q")
    assert result.exit_code == 2 and "pip install wandb" in result.stderr.replace("\n", " ")


# --- signals -------------------------------------------------------------------------------------

STEPS = 12

# The command, which is sent a signal in its third step.
SENT = """
import os, signal, threading
from ternarize.__main__ import main
from ternarize.train import loop

step, count = loop._step, 0

def counted(*given):
    global count
    count += 1
    if count == 3:
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
    return step(*given)

loop._step = counted
main()
"""


def test_a_signal_stops_a_training_that_then_goes_on(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    output = tmp_path / "packed"
    command = [sys.executable, "-c", SENT, "train", str(source), str(output)]
    command += [*options(text, "--steps", str(STEPS)), "-q"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted; the same command goes on from here"
    assert not output.exists()
    found = training_recipe(Recipe(), given_of(text), named=False)
    steps: list[int] = []
    convert(source, output, found, log=lambda step, _: steps.append(step))
    assert 3 <= steps[0] <= steps[-1] == STEPS, "no whole step was lost"
    convert(source, tmp_path / "whole", found)
    assert_same(output, tmp_path / "whole")


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_a_training_whose_state_is_kept(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    source, text = llama
    command = [sys.executable, "-m", "ternarize", "train", str(source), str(tmp_path / "packed")]
    command += options(text, "--steps", "4000")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    said = b""
    while b"step 3" not in said:  # in the bar
        said += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    with safe_open(
        tmp_path / "packed.partial" / ".calibration" / "training" / state.STATE, framework="pt"
    ) as file:
        assert 3 <= json.loads(file.metadata()["facts"])["progressed"]["step"] < 4000
    assert not list(tmp_path.glob("*.lock"))


def given_of(text: Path) -> dict[str, Any]:
    own = {"texts": [str(text)], "train_len": 16, "batch": 64, "lr": 0.05, "steps": STEPS}
    return {"method": "itf", "group_size": 32, **own}
