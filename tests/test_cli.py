"""The command line: what goes where, exit codes, the examples of the documents, CLI.md itself."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from typer.testing import CliRunner, Result

from ternarize.cli import Method, app
from ternarize.methods import METHODS

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


def test_a_conversion_prints_the_result_on_stdout_and_advice_on_stderr(
    source: Path, tmp_path: Path
) -> None:
    result = ok("convert", source, tmp_path / "packed")
    assert re.search(r"parameters ternary, \d\.\d+ bits per weight", result.stdout)
    assert "times smaller" in result.stdout
    assert "without data" not in result.stdout
    assert "Weights rounded without data lose" in result.stderr
    assert f"ternarize eval {tmp_path / 'packed'}" in result.stderr


def test_paths_with_brackets_and_spaces_are_printed_as_they_are(
    source: Path, tmp_path: Path
) -> None:
    result = ok("convert", source, tmp_path / "out[v1] [/q]".replace("/", ""))
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
]


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES, ids=lambda v: str(v)[:60])
def test_mistakes_get_one_clear_line(
    arguments: list[str], code: int, words: str, source: Path, packed: Path, tmp_path: Path
) -> None:
    places = {"SOURCE": source, "PACKED": packed, "OUT": tmp_path / "out"}
    (tmp_path / "file").write_text("")
    places["FILE/out"] = tmp_path / "file" / "out"
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = run("convert", "no/such/model", tmp_path / "out", "--debug")
    assert result.exit_code == 1 and type(result.exception).__name__ == "CheckpointError"


def test_an_interruption_exits_with_130_and_says_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ternarize.convert.convert_tensor", interrupt)
    result = run("convert", source, tmp_path / "packed")
    assert result.exit_code == 130
    assert "same command goes on" in result.stderr
    assert not (tmp_path / "packed").exists()


def test_the_command_line_offers_every_method() -> None:
    assert {method.value for method in Method} == set(METHODS)


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from ternarize.cli import app; "
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
            "ternarize.cli",
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


def examples(document: str) -> list[str]:
    """The commands that a document shows: `Example: ternarize ...` and `$ ternarize ...` lines."""
    text = (ROOT / document).read_text().replace("&quot;", '"')
    found = re.findall(r"^(?:Example: |\$ )(ternarize (?!\[).*)$", text, re.MULTILINE)
    return [command for command in found if "[OPTIONS]" not in command]


@pytest.mark.parametrize("document", ["CLI.md", "README.md"])
def test_the_examples_of_the_documents_run(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = examples(document)
    assert len(commands) >= 5
    for command in commands:
        ok(*shlex.split(command, comments=True)[1:])
