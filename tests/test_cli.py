"""The command line: what goes where, exit codes, CLI.md itself."""

import dataclasses
import errno
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from typer.testing import CliRunner, Result

import ternarize
from ternarize import errors
from ternarize.cli import show, terminal
from ternarize.cli.app import app
from ternarize.cli.export import TARGET_NAMES
from ternarize.plans import recipe as recipes
from ternarize.plans.recipe import GPTQ, Calibrate, Recipe
from ternarize.plans.recipe_files import NAMED, open_recipe, read_recipe
from ternarize.publish.export import TARGETS
from ternarize.threads import ENDING
from ternarize.trits.int4 import INT4
from ternarize.trits.int8 import INT8
from ternarize.trits.methods import METHODS
from ternarize.trits.rotation import BLOCKS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-llama"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    tiny_models.save("llama", directory)
    return directory


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("out") / "packed"
    ok("convert", source, directory)
    return directory


def test_a_conversion_prints_the_result_on_stdout_and_advice_on_stderr(tmp_path: Path) -> None:
    result = ok("convert", EXAMPLE, tmp_path / "packed", "--no-check")
    assert re.search(r"parameters ternary, \d\.\d+ bits per weight", result.stdout)
    assert "times smaller" in result.stdout
    assert "without data" not in result.stdout
    assert "Weights rounded without data lose" in result.stderr
    assert f"ternarize eval {tmp_path / 'packed'}" in result.stderr


def test_paths_with_brackets_and_spaces_are_printed_as_they_are(tmp_path: Path) -> None:
    result = ok("convert", EXAMPLE, tmp_path / "out[v1] [q]", "--no-check")
    assert f"ternarize eval '{tmp_path / 'out[v1] [q]'}'" in result.stderr


def test_quiet_leaves_the_result_alone(source: Path, tmp_path: Path) -> None:
    assert ok("convert", source, tmp_path / "packed", "-q").stderr == ""


def test_json_is_one_object_on_stdout(source: Path, packed: Path, tmp_path: Path) -> None:
    record = json.loads(ok("convert", source, tmp_path / "p", "--json", "-q").stdout)
    assert record["coverage"]["total"] == sum(
        record["coverage"][k] for k in ("ternary", "kept", "tied")
    )
    report = json.loads(ok("inspect", packed, "--json").stdout)
    assert {row["name"] for row in report["tensors"]} == set(record["tensors"])
    result = json.loads(ok("verify", packed, "--source", source, "--json").stdout)
    assert result["source_compared"] is True
    plan = json.loads(ok("convert", source, tmp_path / "q", "--dry-run", "--json").stdout)
    assert plan["packed_bytes"] == report["totals"]["file_bytes"]


def test_a_dry_run_writes_nothing_and_says_why_tensors_are_kept(
    source: Path, tmp_path: Path
) -> None:
    result = ok("convert", source, tmp_path / "packed", "--dry-run")
    assert not list(tmp_path.iterdir())
    for word in ("embedding", "norm", "output head", "linear in a repeated block", "to convert"):
        assert word in re.sub(r"\s+", " ", result.stdout)


def test_inspect_shows_each_tensor_with_its_bits_and_error(packed: Path) -> None:
    lines = ok("inspect", packed).stdout.splitlines()
    report = json.loads(ok("inspect", packed, "--json").stdout)
    assert len([line for line in lines if "absmean" in line]) == sum(
        row["kind"] == "ternary" for row in report["tensors"]
    )


def test_a_model_without_a_record_is_still_described(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        if path.name != "ternarize.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with_record = json.loads(ok("inspect", packed, "--json").stdout)["totals"]
    without = json.loads(ok("inspect", tmp_path, "--json").stdout)["totals"]
    assert without["sparsity"] == pytest.approx(with_record["sparsity"], abs=1e-5)
    assert without["relative_error"] is None
    assert run("verify", tmp_path, "--source", packed).exit_code == 1


FIT = ["convert", "SOURCE", "OUT", "--method", "gptq"]
MISTAKES: list[tuple[list[str], int, str]] = [
    (["convert", "no/such/model", "OUT"], 1, "no such directory"),
    (["convert", "SOURCE", "SOURCE"], 1, "is the source"),
    (["convert", "SOURCE", "OUT", "--keep", "*.nothing"], 1, "matches no tensor"),
    (["convert", "SOURCE", "OUT", "--group-size", "-5"], 2, "group size: -5"),
    (["convert", "SOURCE", "OUT", "--device", "abacus"], 2, "abacus"),
    (["convert", "SOURCE", "OUT", "--method", "magic"], 2, "magic"),
    (["convert", "SOURCE", "OUT", "--dtype", "int4"], 2, "int4"),
    (["convert", "SOURCE", "OUT", "--threads", "0"], 2, "threads"),
    (["convert", "SOURCE"], 2, "output"),
    (["convert", "PACKED", "OUT"], 1, "packed checkpoint already"),
    (["inspect", "SOURCE"], 1, "does not say quant_method ternarize"),
    (["verify", "SOURCE"], 1, "ternarize convert"),
    (["verify", "no-such-thing/at all"], 1, "no such directory"),
    (["eval", "PACKED", "--text", "no/such/file"], 1, "no tokenizer"),
    (["generate", "SOURCE", "--prompt", "x"], 1, ""),
    (["generate", "PACKED", "--prompt", "x", "--device", "abacus"], 1, "tokenizer"),
    (["convert", "SOURCE", "FILE/out"], 1, "cannot be made"),
    (["transmogrify"], 2, "transmogrify"),
    (["convert", "SOURCE", "OUT", "--method", "itf", "--dataset", "x"], 2, "--method gptq"),
    (["convert", "SOURCE", "OUT", "--num-samples", "9"], 2, "Add --dataset"),
    (["convert", "SOURCE", "OUT", "--min-quality", "cosine=0.9"], 2, "Add --dataset"),
    ([*FIT, "--min-quality", "kl=0.1"], 2, "kl_divergence"),
    ([*FIT, "--min-quality", "kl=0.1", "--dry-run"], 2, "kl_divergence"),
    ([*FIT, "--min-quality", "cosine=nan"], 2, "cosine=nan; expected a number"),
    ([*FIT, "--min-quality", "kl_divergence=low"], 2, "NAME=VALUE"),
    ([*FIT, "--min-quality", "cosine=1", "--min-quality", "cosine=2"], 2, "given twice"),
    ([*FIT, "--window", "2"], 2, "--reconstruct"),
    ([*FIT, "--rotation", "100"], 2, "one of 0, 4, 16"),
    ([*FIT, "--target-bpw", "0"], 2, "0.1 to 16 bits"),
    ([*FIT, "--target-bpw", "1"], 2, "add --codec rans"),
    ([*FIT, "--target-bpw", "1", "--codec", "rans", "--distill", "1"], 2, "without a training"),
    ([*FIT, "--target-bpw", "2", "--zeros", "0.5"], 2, "Leave out one of the two"),
    (["convert", "EXAMPLE", "OUT", "--dataset", "no/such.txt"], 2, "no/such.txt"),
    (["inspect", "PACKED", "--plot", "no/such/out.png"], 1, "there is no directory"),
    (["inspect", "PACKED", "--plot", "out.doc"], 2, "no kind of image"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES, ids=lambda v: str(v)[:60])
def test_mistakes_get_one_clear_line(
    arguments: list[str], code: int, words: str, source: Path, packed: Path, tmp_path: Path
) -> None:
    places = {"EXAMPLE": EXAMPLE, "SOURCE": source, "PACKED": packed, "OUT": tmp_path / "out"}
    (tmp_path / "file").write_text("")
    places["FILE/out"] = tmp_path / "file" / "out"
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == code, result.output
    assert words.lower() in result.stderr.lower()
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = run("convert", "no/such/model", tmp_path / "out", "--debug")
    assert result.exit_code == 1 and type(result.exception).__name__ == "CheckpointError"


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals that end a program do so, also where the tests themselves run under nohup."""
    ignored = [number for number in ENDING if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_before_a_command_runs_ends_the_program_in_one_word(number: int) -> None:
    code = (
        "import os, sys; from ternarize.__main__ import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'ternarize.cli.app': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder()); main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "interrupted\n")


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_exits_with_128_and_its_number_and_says_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = [signal.getsignal(each) for each in ENDING]

    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)  # handled by the main thread, meanwhile

    monkeypatch.setattr("ternarize.convert.run.convert_tensor", interrupt)
    result = run("convert", source, tmp_path / "packed")
    assert result.exit_code == 128 + number
    assert before == [signal.getsignal(each) for each in ENDING]
    assert "same command goes on" in result.stderr
    assert not (tmp_path / "packed").exists()


def test_under_nohup_a_terminal_may_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    def close(*_: Any, **__: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        return {"measured": False, "why": "", "command": None}

    monkeypatch.setattr("ternarize.convert.check.check_conversion", close)
    try:
        ok("convert", EXAMPLE, tmp_path / "packed")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_names_that_the_recipe_writes_down_without_torch_are_those_of_what_it_names() -> None:
    allowed = {
        each.name: each.metadata["allowed"]
        for kind in (Recipe, Calibrate)
        for each in dataclasses.fields(kind)
        if each.metadata
    }
    assert allowed["method"] == (*METHODS, GPTQ)
    assert allowed["rotation"] == (0, *BLOCKS)
    assert recipes.ENDS == ("keep", INT8, INT4, "ternary")
    assert set(TARGET_NAMES) == set(TARGETS)


def test_the_help_says_what_the_defaults_of_calibration_are() -> None:
    text = re.sub(r"\s+", " ", (ROOT / "CLI.md").read_text())
    defaults = Calibrate(rotation=recipes.LARGEST_ROTATION)  # unless the recipe says otherwise
    for option in ("num_samples", "seed", "rotation", "reconstruct", "window"):
        flag, value = "--" + option.replace("_", "-"), getattr(defaults, option)
        assert re.search(rf"`{flag} [^`]*`: [^`]*default: {value}\.", text), flag


def test_brackets_in_the_help_are_not_taken_for_markup() -> None:
    commands: Any = typer.main.get_command(app)
    for command in commands.commands.values():
        for text in (command.help, *(getattr(option, "help", None) for option in command.params)):
            shown = Text.from_markup(text or "").plain
            assert shown == (text or "").replace("\\[", "["), command.name
    assert "needs ternarize[lm-eval]" in (ROOT / "CLI.md").read_text()


# --- what came out, at once ---------------------------------------------------------------------

MEASURED: dict[str, Any] = {
    "measured": True,
    "kind": "causal language model",
    "seq_len": 256,
    "tokens": 2048,
    "windows": 8,
    "windows_begin_with": ["<bos>"],
    "perplexity": {"value": 67e6, "standard_error": None},
    "source_perplexity": {"value": 31.0, "standard_error": 2.0},
    "perplexity_ratio": {"value": 67e6 / 31, "standard_error": None},
    "kl_divergence": {"value": 14.25, "standard_error": 0.5},
    "top1_agreement": {"value": 0.004, "standard_error": 0.001},
    "writes": {"prompt": "Words", "source": " of\nsense", "packed": "深 \x1b[31m"},
    "seconds": 41.2,
}


def found_out(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[dict[str, Any]]:
    """Let the check find this; returns the calls that are made of it."""
    calls: list[dict[str, Any]] = []

    def check(output: Path, source: str, **options: Any) -> dict[str, Any]:
        calls.append({"output": output, "source": source, **options})
        return {**MEASURED, **changes}

    monkeypatch.setattr("ternarize.convert.check.check_conversion", check)
    return calls


def value(number: float) -> dict[str, float | None]:
    return {"value": number, "standard_error": None}


def test_a_conversion_shows_what_came_out(tmp_path: Path) -> None:
    result = ok("convert", EXAMPLE, tmp_path / "p", "--method", "itf")
    text, advice = result.stdout, result.stderr
    read = r"on 2,048 tokens of the text that comes with ternarize, 8 windows that begin with "
    assert re.search(read + r"<\|endoftext\|>, in \d+ s:\n", text)
    figures = re.search(
        r"\nperplexity (\d+\.?\d*) -> (\d+\.?\d*) \((1\.\d+) times\), KL divergence 0\.\d+ nats "
        r"per token, top-1 agreement \d\d\.\d%\n",
        text,
    )
    assert figures
    assert float(figures[2]) / float(figures[1]) == pytest.approx(float(figures[3]), rel=1e-3)
    assert re.search(r'\n"The best way [^"]*" goes on\n  source: \S.*\n  packed: \S.*\n$', text)
    assert "Measure on your own text:" in advice
    assert "--dataset default (or your own texts) calibrates, for" in advice
    assert "lose" not in advice  # what is measured says more than the error of weights


UNMEASURED = " by what the model is for: `ternarize eval` does not measure it."


@pytest.mark.parametrize(
    ("model", "how", "data"),
    [
        ("whisper", r":\n  ternarize eval .* --audio FOLDER\n", "FOLDER with recordings"),
        ("vit", UNMEASURED, "FILE.safetensors with inputs"),
        ("t5", UNMEASURED, "FILE.safetensors with inputs"),  # without a tokenizer
        ("llama", UNMEASURED, "FILE.safetensors with inputs"),
    ],
)
def test_what_is_advised_fits_the_model(tmp_path: Path, model: str, how: str, data: str) -> None:
    tiny_models.save(model, tmp_path / "source")
    advice = ok("convert", tmp_path / "source", tmp_path / "packed").stderr
    assert re.search(f"Measure how much{how}", advice), advice
    assert f"; --dataset {data}" in advice  # behind what the default method is told
    assert "--text FILE" not in advice


@pytest.mark.parametrize("option", ["--no-check", "-q"])
def test_nothing_is_measured_where_nobody_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    calls = found_out(monkeypatch)
    result = ok("convert", EXAMPLE, tmp_path / "p", option)
    assert len(result.stdout.splitlines()) == 3
    assert ("Measure how much" in result.stderr) == (option != "-q")
    printed = json.loads(ok("convert", EXAMPLE, tmp_path / "q", option, "--json").stdout)
    assert "check" not in printed and not calls


def test_the_json_of_a_conversion_has_the_check_and_the_record_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = found_out(monkeypatch, perplexity=value(math.inf))
    printed = json.loads(ok("convert", EXAMPLE, tmp_path / "p", "--json").stdout)
    assert printed["check"]["writes"] == MEASURED["writes"]
    assert printed["check"]["perplexity"]["value"] is None  # what JSON has no word for
    assert "check" not in json.loads((tmp_path / "p" / "ternarize.json").read_text())
    (call,) = calls
    assert (call["output"], call["source"], call["streamed"]) == (
        tmp_path / "p",
        str(EXAMPLE),
        False,
    )


def test_a_model_far_from_its_source_is_told_so_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_out(monkeypatch)
    result = ok("convert", EXAMPLE, tmp_path / "p")
    assert (
        "perplexity 31 -> 67,000,000 (2,161,290 times), KL divergence 14.25 nats per token, "
        "top-1 agreement 0.4%\n" in result.stdout
    )
    # a line each, whatever a model writes
    assert '"Words" goes on\n  source: of\\nsense\n  packed: 深 \\x1b[31m\n' in result.stdout
    assert "far from its source: 2,161,290 times the perplexity" in result.stderr
    assert "--dataset default" in result.stderr


@pytest.mark.parametrize(
    ("number", "said"),
    [(1.5, "1.5"), (math.inf, "inf"), (1.25e40, "1.25e+40"), (123456.7, "123,457")],
)
def test_perplexities_of_any_size_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: float, said: str
) -> None:
    found_out(monkeypatch, perplexity=value(number), perplexity_ratio=value(number / 31))
    result = ok("convert", EXAMPLE, tmp_path / "p")
    assert f"perplexity 31 -> {said} (" in result.stdout
    assert ("far from its source" in result.stderr) == (number > 62)


def test_words_that_the_terminal_has_no_letters_for_fail_no_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_out(monkeypatch)
    runner = CliRunner(charset="ascii")
    result = runner.invoke(app, ["convert", str(EXAMPLE), str(tmp_path / "p")])
    assert result.exit_code == 0, result.output
    assert "  packed: \\u6df1 \\x1b[31m\n" in result.stdout


def test_of_an_encoder_the_cosine_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"measured": True, "tokens": 2048, "lines": 80, "seconds": 3.0}
    cosine = {**value(0.47), "minimum": 0.12, "minimum_line": "x"}
    monkeypatch.setattr(
        "ternarize.convert.check.check_conversion", lambda *_, **__: {**found, "cosine": cosine}
    )
    result = ok("convert", EXAMPLE, tmp_path / "p")
    assert (
        "80 lines, in 3 s:\ncosine 0.4700 to the embeddings of the source, at least 0.1200\n"
        in (result.stdout)
    )


@pytest.mark.parametrize("command", ["ternarize eval p --text default", None])
def test_why_nothing_is_measured_is_said_with_the_command_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str | None
) -> None:
    found = {"measured": False, "why": "memory: [too] little", "command": command}
    monkeypatch.setattr("ternarize.convert.check.check_conversion", lambda *_, **__: found)
    result = ok("convert", EXAMPLE, tmp_path / "p")
    assert len(result.stdout.splitlines()) == 3
    assert "\nNot measured: memory: [too] little\n" in result.stderr
    assert (f"\n  {command}\n" in result.stderr) == (command is not None)
    assert "ternarize eval" in result.stderr if command else "eval" not in result.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, terminal.Terminated])
def test_an_interrupted_check_leaves_a_complete_conversion_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def check(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("ternarize.convert.check.check_conversion", check)
    result = run("convert", EXAMPLE, tmp_path / "p")
    assert result.exit_code == (143 if error is terminal.Terminated else 130)
    assert f"interrupted while measuring; {tmp_path / 'p'} is complete\n" in result.stderr
    assert "goes on" not in result.stderr
    ok("verify", tmp_path / "p", "--source", EXAMPLE)


def test_what_loses_nothing_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = found_out(monkeypatch)
    ok("convert", EXAMPLE, tmp_path / "p", "-q")
    ok("export", tmp_path / "p", tmp_path / "dense", "--to", "dense")
    result = ok("convert", tmp_path / "dense", tmp_path / "again")
    assert "packed without loss" in result.stderr and not calls
    printed = json.loads(ok("convert", tmp_path / "dense", tmp_path / "more", "--json").stdout)
    assert printed["check"] is None


def test_an_evaluation_says_what_windows_begin_with(tmp_path: Path) -> None:
    ok("convert", EXAMPLE, tmp_path / "p", "-q")
    words = ("--text", "default", "--max-tokens", "512")
    shown = ok("eval", tmp_path / "p", *words).stdout
    assert "2 windows that begin with <|endoftext|>, 512 tokens, float32 on cpu" in shown
    found = json.loads(ok("eval", tmp_path / "p", *words, "--json").stdout)
    assert found["windows_begin_with"] == ["<|endoftext|>"]
    assert found["text"] == "default"


# --- calibration -------------------------------------------------------------------------------

TEXT = str(ROOT / "examples" / "eval.txt")
CALIBRATE = ["--dataset", TEXT, "--num-samples", "8", "--seq-len", "32"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Result]:
    """A calibrated checkpoint; what was said when its quality was refused, and when it was not."""
    directory = tmp_path_factory.mktemp("calibrated") / "packed"
    refused = run("convert", EXAMPLE, directory, *CALIBRATE, "--min-quality", "kl_divergence=1e-9")
    assert not directory.exists()
    blocks = directory.with_name("packed.partial") / ".calibration"
    assert len(list(blocks.glob("*.safetensors"))) == 2
    with pytest.MonkeyPatch.context() as patch:

        def solve(*_: Any, **__: Any) -> None:
            raise AssertionError("it calibrates again")

        patch.setattr("ternarize.calibrate.solve_block.solve", solve)
        done = run("convert", EXAMPLE, directory, *CALIBRATE, "--min-quality", "kl_divergence=9")
    return directory, refused, done


def test_a_result_worse_than_asked_for_is_refused_in_one_line(
    calibrated: tuple[Path, Result, Result],
) -> None:
    _, refused, _ = calibrated
    assert refused.exit_code == 1, refused.output
    assert refused.stdout == ""
    (line,) = refused.stderr.strip().splitlines()
    assert re.match(r"error: kl_divergence: \d\.\d+ .*; expected at most 1e-09\.", line)


def test_with_another_bound_the_same_command_goes_on_without_calibrating_again(
    calibrated: tuple[Path, Result, Result],
) -> None:
    directory, _, done = calibrated
    assert done.exit_code == 0, done.output
    assert not directory.with_name("packed.partial").exists()
    assert not list(directory.glob(".*"))
    record = json.loads((directory / "ternarize.json").read_text())
    assert record["recipe"]["calibrate"]["dataset"] == "eval.txt"
    for path in directory.glob("*.json"):  # what may be published names no folder of this disk
        assert str(ROOT) not in path.read_text("utf-8")


def test_a_calibrated_conversion_prints_what_it_measured(
    calibrated: tuple[Path, Result, Result],
) -> None:
    directory, _, done = calibrated
    text = re.sub(r" +", " ", done.stdout)
    assert (
        "calibrated on eval.txt: 8 samples that begin with <|endoftext|>, 256 tokens; 1 more to "
        "choose by, 1 to report on" in text
    )
    assert "no matrix was left uncalibrated" in text
    for block in (0, 1):
        found = re.search(rf"model\.layers\.{block} (0\.\d+) (0\.\d+)", text)
        assert found and float(found[2]) < float(found[1])
    for measure in ("perplexity", "source perplexity", "perplexity ratio", "kl divergence"):
        assert re.search(rf" {measure} \d+\.\d+", text)
    assert "without data lose" not in done.stderr
    assert f"ternarize eval {directory}" in done.stderr
    shown = re.sub(r" +", " ", ok("inspect", directory).stdout)
    assert text.strip() in shown  # all of it can be had again
    assert shown.count("gptq, rotated by 256") == 14


def test_the_json_of_a_calibrated_conversion_has_the_record_of_it(
    calibrated: tuple[Path, Result, Result], tmp_path: Path
) -> None:
    printed = json.loads(
        ok("convert", EXAMPLE, tmp_path / "p", *CALIBRATE, "--json", "--target-bpw", "2").stdout
    )
    report = json.loads(ok("inspect", tmp_path / "p", "--json").stdout)
    assert report["calibration"] == printed["calibration"]
    assert printed["recipe"]["method"] == "gptq"
    assert printed["recipe"]["calibrate"]["num_samples"] == 8
    assert len(printed["calibration"]["forms"]) > 1
    assert report["totals"]["ternary_bpw"] <= 2
    shown = re.sub(r"\s+", " ", ok("inspect", tmp_path / "p").stdout)
    assert re.search(r"ternary tensors: \d+ in \w+.*, \d+ in \w+", shown)
    assert json.loads(ok("inspect", calibrated[0], "--json").stdout)["calibration"]["data"]


def test_a_calibrated_checkpoint_is_verified_against_its_source(
    calibrated: tuple[Path, Result, Result], tmp_path: Path
) -> None:
    directory = calibrated[0]
    words = ok("verify", directory, "--source", EXAMPLE).stdout
    assert "14 calibrated, with the error on record" in words
    found = json.loads(ok("verify", directory, "--source", EXAMPLE, "--json").stdout)["compared"]
    assert found == {"converted_again": 6, "by_error": 14, "in_shape": 0}


def test_a_plot_of_it_can_be_drawn(calibrated: tuple[Path, Result, Result], tmp_path: Path) -> None:
    result = ok("inspect", calibrated[0], "--plot", tmp_path / "out.svg", "--json")
    assert json.loads(result.stdout)["calibration"]
    text = (tmp_path / "out.svg").read_text()
    assert "bits per ternary weight" in text and "after calibration" in text


def test_a_dry_run_says_how_it_will_be_calibrated_and_writes_nothing(tmp_path: Path) -> None:
    result = ok("convert", EXAMPLE, tmp_path / "p", *CALIBRATE, "--dry-run", "--target-bpw", "2")
    assert not list(tmp_path.iterdir())
    text = re.sub(r"\s+", " ", result.stdout)
    for words in (
        "8 samples of 32 tokens",
        "rotated in blocks of up to 256",
        "decided when it is run, for 2 bits",
    ):
        assert words in text


def test_gptq_alone_calibrates_on_the_text_that_comes_with_the_program(tmp_path: Path) -> None:
    result = ok("convert", EXAMPLE, tmp_path / "p", "--method", "gptq", "--dry-run", "--json")
    recipe = json.loads(result.stdout)["recipe"]
    assert recipe["calibrate"] == {**vars(Calibrate()), "dataset": "default", "rotation": 256}


def test_a_gpu_is_used_to_calibrate_where_there_is_one_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def convert(*_: Any, device: str | None, **__: Any) -> dict[str, Any]:
        devices.append(device)
        return {}

    monkeypatch.setattr("ternarize.convert.run.convert", convert)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Abacus 9000")
    said = ok("convert", EXAMPLE, tmp_path / "p", *CALIBRATE, "--json").stderr
    assert "calibrating on cuda (Abacus 9000)" in said
    ok("convert", EXAMPLE, tmp_path / "p", *CALIBRATE, "--json", "--device", "cpu")
    ok("convert", EXAMPLE, tmp_path / "p", "--json")
    assert devices == ["cuda", "cpu", None]


def test_the_bar_and_its_clock_start_afresh_with_each_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the time left would be worked out from the speed of another stage."""
    bars: list[Progress] = []

    class Watched(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options)
            bars.append(self)

    monkeypatch.setattr("rich.progress.Progress", Watched)
    monkeypatch.setattr(
        terminal, "err", Console(file=io.StringIO(), force_terminal=True, width=100)
    )
    with terminal.progress_bar(quiet=False) as update:
        assert update is not None
        (bar,) = bars
        (task,) = bar.tasks
        stages = [
            ("measuring sensitivity", (1, 2), (2, 2)),
            ("calibrating", (5, 2000), (900, 2000)),
            ("packing", (10, 2000), (2000, 2000)),
        ]
        begun: list[float] = []
        for stage, (first, total), (second, _) in stages:
            update(first, total, "a.weight", stage)
            assert (task.fields["stage"], task.total, task.completed) == (stage, total, first)
            assert not task._progress  # no speed is left of the stage before
            begun.append(task.start_time or 0.0)
            update(second, total, "b.weight", stage)
            assert task.completed == second and task.start_time == begun[-1]
            assert task._progress
        assert begun == sorted(set(begun))


def test_without_a_terminal_long_work_tells_of_itself_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "err", Console(file=io.StringIO(), force_terminal=False))
    clock = iter([0.0, 59.0, 61.0, 120.0, 122.0])
    watch = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("ternarize.cli.terminal.time", watch)
    with terminal.progress_bar(quiet=False) as update:
        assert update is not None
        for done in range(1, 5):
            update(done, 8, f"step {done}\x1b[2J", "training")
    assert capsys.readouterr().err == (
        "training 25 % step 2\\x1b[2J\ntraining 50 % step 4\\x1b[2J\n"
    )
    with terminal.progress_bar(quiet=True) as update:
        assert update is None


def test_of_many_blocks_the_first_the_worst_and_the_last_are_shown() -> None:
    blocks = [{"block": f"h.{i}", "before": 0.5, "after": 0.1 + (i == 7) * 0.2} for i in range(30)]
    labels = [label for label, _ in show.chosen_blocks(blocks)]
    assert labels == ["h.0 (first of 30)", "h.7 (worst of 30)", "h.29 (last of 30)"]
    blocks[29]["after"] = 0.9
    labels = [label for label, _ in show.chosen_blocks(blocks)]
    assert labels == ["h.0 (first of 30)", "h.29 (worst and last of 30)"]
    assert [b for _, b in show.chosen_blocks(blocks[:8])] == blocks[:8]


def test_matrices_that_saw_too_few_tokens_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    block = {"block": "layers.3", "before": 0.2, "after": 0.1, "matrices": {}}
    few = {f"layers.3.mlp.experts.up[{i}]": i for i in range(5)}
    found = {
        "data": {"dataset": "x.txt", "notes": ["[too short]"]},
        "quality": {"cosine": {"value": 0.98, "standard_error": 0.01}},
        "forms": {"groups of 128": 4},
        "uncalibrated": 5,
        "blocks": [{**block, "uncalibrated": few}],
    }
    show.show_calibration({"calibration": found})
    text = re.sub(r" +", " ", capsys.readouterr().out)
    assert "5 matrices saw too few tokens" in text
    assert " layers.3.mlp.experts.up[1] (1 tokens)" in text and "up[4]" not in text
    assert "note: [too short]" in text
    assert " cosine 0.9800 0.0100 " in text
    assert "ternary tensors:" not in text


# --- recipes -----------------------------------------------------------------------------------


def recipe_of(*arguments: str | Path) -> dict[str, Any]:
    """The recipe that a conversion of the example would follow."""
    line = ("convert", EXAMPLE, "nowhere", *arguments, "--dry-run", "--json")
    found: dict[str, Any] = json.loads(ok(*line).stdout)["recipe"]
    return found


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


OWN = ["--method", "twn", "--group-size", "32", "--keep", "*.1.*down_proj*", "--scale-bits", "8"]
OWN += ["--planes", "*.0.*up_proj*", "--embeddings", "int8", "--activations", "int8"]


@pytest.mark.parametrize(
    ("options", "beside"),
    [(OWN, []), (["--dtype", "float32"], []), ([*CALIBRATE, "--rotation", "64"], CALIBRATE[:2])],
    ids=["own", "defaults", "calibrated"],
)
def test_a_record_repeats_its_conversion_byte_by_byte(
    options: list[str], beside: list[str], tmp_path: Path
) -> None:
    """A text of one's own is named again: its folder is not on record."""
    ok("convert", EXAMPLE, tmp_path / "p", *options, "-q")
    record = tmp_path / "p" / "ternarize.json"
    ok("convert", EXAMPLE, tmp_path / "again", "--recipe", record, *beside, "-q")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "p")


def test_the_record_of_what_was_ternary_repeats_its_conversion(tmp_path: Path) -> None:
    ok("convert", EXAMPLE, tmp_path / "p", "--method", "itf", "--group-size", "64", "-q")
    ok("export", tmp_path / "p", tmp_path / "dense", "--to", "dense")
    ok("convert", tmp_path / "dense", tmp_path / "first", "-q")
    record = tmp_path / "first" / "ternarize.json"
    ok("convert", tmp_path / "dense", tmp_path / "again", "--recipe", record, "-q")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "first")


@pytest.mark.parametrize("record", sorted((ROOT / "formats").rglob("ternarize.json")), ids=str)
def test_the_recipe_on_record_is_read_as_it_was(record: Path) -> None:
    table = json.loads(record.read_text("utf-8"))
    recipe = read_recipe(table)
    assert recipe == open_recipe(str(record))
    found = json.loads(json.dumps(dataclasses.asdict(recipe)))
    # of older ones nothing is said of these
    assert found == {
        "train": None,
        "zeros": None,
        "engine": None,
        "fold": False,
        "codec": "base3",
        **table["recipe"],
    }


TABLE = {
    "method": "gptq",
    "group_size": 64,
    "keep": ["*.1.*", "x [y]"],
    "calibrate": {"dataset": "self", "num_samples": 8, "rotation": 16, "target_bpw": 2},
}
TOML = """
method = "gptq"
group_size = 64
keep = ["*.1.*", "x [y]"]

[calibrate]
dataset = "self"
num_samples = 8
rotation = 16
target_bpw = 2
"""


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a recipe").write_text(TOML)  # what is in it decides, not its name
    (tmp_path / "recipe.json").write_text(" \n" + json.dumps(TABLE))
    first, second = (open_recipe(str(tmp_path / name)) for name in ("a recipe", "recipe.json"))
    assert first == second
    given = Calibrate(dataset="self", num_samples=8, rotation=16, target_bpw=2)
    assert first == Recipe("gptq", 64, keep=("*.1.*", "x [y]"), calibrate=given)


def test_options_beside_a_recipe_win(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML.replace('"x [y]"', '"*o_proj*"'))
    as_it_is = recipe_of("--recipe", path)
    assert (as_it_is["group_size"], as_it_is["calibrate"]["dataset"]) == (64, "self")
    changed = recipe_of(
        "--recipe", path, "--group-size", "32", "--keep", "*up_proj*", "--num-samples", "9"
    )
    calibrate = as_it_is["calibrate"] | {"num_samples": 9}
    assert changed == {**as_it_is, "group_size": 32, "keep": ["*up_proj*"], "calibrate": calibrate}
    without_data = recipe_of("--recipe", path, "--method", "itf")
    assert without_data == {**as_it_is, "method": "itf", "calibrate": None}
    with_data = recipe_of("--recipe", "fast", "--dataset", "default", "--group-size", "64")
    assert with_data["method"] == "gptq" and with_data["calibrate"]["dataset"] == "default"


def test_named_recipes_are_what_options_can_ask_for(tmp_path: Path) -> None:
    assert recipe_of("--recipe", "fast") == recipe_of("--method", "itf")
    assert recipe_of("--recipe", "good") == recipe_of("--dataset", "default")
    best = recipe_of("--recipe", "best")
    assert best["train"].pop("tokens") == 1 << 20
    assert not [name for name in ("steps", "minutes", "texts") if best["train"].pop(name)]
    calibrated = recipe_of("--method", "gptq", "--num-samples", "512")
    assert {**best, "train": None} == calibrated
    assert recipe_of("--recipe", "best", "--distill", "5")["train"] is None
    help_of_it = re.sub(r"\s+", " ", (ROOT / "CLI.md").read_text())
    for name, (_, cost) in NAMED.items():
        assert f"{name} ({cost})" in help_of_it


def test_a_file_with_the_name_of_a_recipe_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fast").write_text('method = "twn"')
    assert recipe_of("--recipe", "fast")["method"] == "itf"
    assert recipe_of("--recipe", "./fast")["method"] == "twn"


def test_a_dry_run_says_what_a_recipe_comes_to(tmp_path: Path) -> None:
    line = ("convert", EXAMPLE, tmp_path / "p", "--dry-run")
    assert "recipe:" not in ok(*line).stdout
    found = ok(*line, "--recipe", "good", "--keep", "*.1.*", "--seed", "3").stdout
    said = re.search(r"^recipe: (.*)$", found, re.M)
    assert said
    words = shlex.split(said[1])
    for option in ("--method gptq", "--keep *.1.*", "--seed 3", "--num-samples 256"):
        assert option in " ".join(words)
    assert recipe_of(*words) == recipe_of("--recipe", "good", "--keep", "*.1.*", "--seed", "3")


UNUSABLE: list[tuple[str | bytes, list[str]]] = [
    ("methd = 'itf'", ["'methd': is no option", "one of method, group_size", "Mend the file"]),
    ("method = 'magic'", ["method: 'magic'", "one of absmean, twn, itf, gptq"]),
    ("method = 3", ["method: 3", "one of absmean"]),
    ("group_size = '64'", ["group_size: '64'", "a positive number of weights"]),
    ("group_size = true", ["group_size: True", "a positive number of weights"]),
    ("keep = '*.weight'", ["keep: '*.weight'", "a list of texts"]),
    ("keep = [1]", ["keep: (1,)", "a list of texts"]),
    ("scale_bits = 12", ["scale_bits: 12", "one of 16, 8"]),
    ("calibrate = 'default'", ["calibrate: 'default'", "a table"]),
    ("method = 'gptq'", ["method: 'gptq' without data", "Add `calibrate`"]),
    ("method = 'itf'\n[calibrate]", ["method: 'itf' with data", "or no `calibrate`"]),
    ("method = 'gptq'\n[calibrate]\nseed = -1", ["calibrate.seed: -1", "0 to 4294967295"]),
    ("method = 'gptq'\n[calibrate]\nnum_samples = 2.5", ["calibrate.num_samples: 2.5"]),
    ("method = 'gptq'\n[calibrate]\ntext_column = 5", ["calibrate.text_column: 5", "a text"]),
    ("method = 'gptq'\n[calibrate]\ntarget_bpw = nan", ["calibrate.target_bpw: nan"]),
    ("method = 'gptq'\n[calibrate]\nsteps = 5", ["calibrate.'steps': is no option"]),
    ("method = ", ["not valid TOML (Invalid value", "Mend the file"]),
    ('{"method": "itf"', ["not valid JSON", "Mend the file"]),
    ('{"method": "itf", "method": "twn"}', ["not valid JSON (repeated key 'method')"]),
    ('{"recipe": ["itf"]}', ["recipe: ['itf']", "a table of options"]),
    ('{"recipe": {"method": 1}}', ["recipe.method: 1", "one of absmean"]),
    ('{"a": ' * 10**5, ["not valid JSON"]),
    (b"method = '\xff'", ["cannot be read", "Check the file"]),
]


@pytest.mark.parametrize(("text", "words"), UNUSABLE, ids=lambda value: str(value)[:40])
def test_a_recipe_that_cannot_be_used_is_told_in_one_line_with_file_and_key(
    text: str | bytes, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "recipe"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("convert", EXAMPLE, tmp_path / "p", "--recipe", path)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {path}: ") and result.stderr.count("\n") == 1
    for each in words:
        assert each in result.stderr
    assert not (tmp_path / "p").exists()


def test_a_recipe_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    for name, words in (
        ("turbo", "there is no such file; expected one of fast, good, best, or a file in TOML"),
        (str(tmp_path), "is a directory; expected one of fast, good, best, or a file"),
        ("", "--recipe: is a directory"),
        ("/dev/null", "there is no such file"),
        ("x" * 300, "cannot be read (File name too long)"),
        ("nul\udcff", "there is no such file"),
    ):
        result = run("convert", EXAMPLE, tmp_path / "p", "--recipe", name)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1


# --- errors for programs -----------------------------------------------------------------------

PARTS = ("weights", "3 of 64 are NaN", "finite ones", "Repair the source")
OURS: list[Exception] = [
    each(*PARTS)
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, errors.TernarizeError)
]
OF_THE_SYSTEM: list[tuple[Exception, dict[str, str]]] = [
    (
        OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"),
        {"where": "out/model.safetensors", "remedy": "Make room, then try again"},
    ),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), {"where": "x", "found": "No such file"}),
    (OSError("the other side has gone"), {"found": "the other side has gone"}),
    (MemoryError(), {"where": "memory"}),
    (RuntimeError("can't allocate memory: 9 bytes"), {"where": "memory"}),
    (UnicodeEncodeError("ascii", "\u6df1", 0, 1, "no"), {"expected": "a terminal that can"}),
]


@pytest.mark.parametrize(
    ("error", "parts"),
    [(each, dict(zip(("where", "found", "expected", "remedy"), PARTS, strict=True)))
     for each in OURS] + OF_THE_SYSTEM,
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_with_json_an_error_is_one_object_beside_the_same_line(
    packed: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, parts: dict[str, str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("ternarize.measure.report.inspect", fail)
    plain, result = run("inspect", packed), run("inspect", packed, "--json")
    code = 2 if isinstance(error, errors.UsageError) else 1
    assert plain.exit_code == result.exit_code == code
    assert plain.stdout == "" and plain.stderr == result.stderr != ""
    (found,) = json.loads(result.stdout).values()
    assert result.stdout.startswith('{"error": ') and result.stdout.count("\n") == 1
    assert {"class": type(error).__name__, **parts}.items() <= found.items()
    assert list(found) == ["class", "where", "found", "expected", "remedy", "message"]
    assert result.stderr == f"error: {found['message']}\n"


def test_with_json_what_we_refuse_on_the_command_line_is_an_object_too(
    source: Path, tmp_path: Path
) -> None:
    result = run("convert", source, tmp_path / "p", "--num-samples", "9", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["where"] == "--num-samples"
    assert json.loads(result.stdout)["error"]["class"] == "UsageError"


def test_a_plan_that_would_be_refused_is_one_object_with_the_error_in_it(
    source: Path, tmp_path: Path
) -> None:
    line = ("convert", source, tmp_path / "p", "--keep", "*", "--dry-run")
    plain, result = run(*line), run(*line, "--json")
    assert plain.exit_code == result.exit_code == 1 and plain.stderr == result.stderr
    found = json.loads(result.stdout)
    assert found["coverage"]["ternary"] == 0
    assert found["error"]["class"] == "SelectionError"
    assert run(*line, "--json", "--debug").exception is not None


def test_a_fault_of_ours_is_no_object_but_a_traceback(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("ternarize.measure.report.inspect", fail)
    result = run("inspect", packed, "--json")
    assert result.stdout == "" and isinstance(result.exception, KeyError)


def test_the_program_can_be_run_from_its_file() -> None:
    """Python puts the folder of the file before its own library: no module may be hidden."""
    path = ROOT / "ternarize" / "cli" / "app.py"
    done = subprocess.run(
        [sys.executable, str(path), "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ternarize.__version__}\n", "")


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from ternarize.cli.app import app; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cli_md_is_what_the_program_says(tmp_path: Path) -> None:
    """To renew it: make docs."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "typer",
            "ternarize.cli.app",
            "utils",
            "docs",
            "--name",
            "ternarize",
            "--title",
            "The command line",
            "--output",
            str(tmp_path / "CLI.md"),
        ],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert (tmp_path / "CLI.md").read_text() == (ROOT / "CLI.md").read_text()


@pytest.mark.parametrize("output", ["", ".", "/"])
def test_a_place_without_a_name_is_no_output(source: Path, output: str) -> None:
    result = run("convert", source, output)
    assert result.exit_code == 1 and "exists already" in result.stderr


def test_what_is_no_text_is_told_in_one_line(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    ok("convert", EXAMPLE, packed)
    for line in (
        ("push", packed, "user/name", "--dry-run", "--base-model", "\udcff"),
        ("generate", packed, "--prompt", "\udcff"),
        ("generate", packed, "--prompt", "\udcff", "--json"),
    ):
        result = run(*line)
        assert result.exit_code == 2, result.exception
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--threads", "99999999999999999999"), 2, "expected 1 to 1024"),
        (("--batch", "99999999999999999999"), 2, "expected 1 to 2147483647"),
        (("--batch", "2000000000"), 1, "memory: not enough is left"),
    ],
    ids=str,
)
def test_more_than_the_machine_has_is_told_in_one_line(
    packed: Path, options: tuple[str, str], code: int, said: str
) -> None:
    result = run("bench", packed, "--prompt", "4", "--decode", "2", "--repeats", "1", *options)
    assert result.exit_code == code and said in result.stderr
    assert result.stderr.count("\n") == 1
