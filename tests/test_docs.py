"""The documents: links lead somewhere, examples run and print what they show, the site builds."""

import contextlib
import importlib.util
import io
import itertools
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from ternarize.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "formats/*.md", "examples/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
WITH_EXAMPLES = [name for name in DOCUMENTS if name.startswith(("README", "CLI", "docs/"))]
FOR_WHO_CHANGES_IT = ("CONTRIBUTING.md", "AGENTS.md")
# What an example names that is not here: a model of somebody's, tasks from the Hub, a model made
# for chat, somebody who asks a server.
NOT_HERE = ("user/source", "user/name", "--tasks", "ternarize chat", "ternarize serve")
NUMBER = r"\d[\d,]*(?:\.\d+)?"


class Block(NamedTuple):
    """What stands between two fences."""

    language: str
    text: str


def read(document: str) -> str:
    return (ROOT / document).read_text("utf-8")


def blocks(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """What a link may name behind `#`, as forges and the site make it of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_relative_link_leads_to_a_file_and_its_anchor_to_a_heading(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(read(document))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{link}: no such file"
        assert target.resolve().is_relative_to(ROOT), f"{link}: outside the repository"
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{link}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_tells_to_run_exists(document: str) -> None:
    text = read(document)
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    told = re.findall(r"^make ((?:[a-z-]+ ?)+)", text, re.M) + re.findall(r"`make ([a-z-]+)`", text)
    assert {target for line in told for target in line.split()} <= targets
    for script in re.findall(r"python ((?:\w+/)+\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python (?:-W ignore )?-m (tests(?:\.\w+)+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


@pytest.mark.parametrize("document", FOR_WHO_CHANGES_IT)
def test_a_path_in_backticks_exists(document: str) -> None:
    quoted = re.findall(r"`([\w./*-]+)`", prose(read(document)))
    paths = [
        each for each in quoted if re.search(r"\w/|\.(?:py|md|toml|txt|json|inc|cpp|h)$", each)
    ]
    assert len(paths) > 5
    for path in paths:
        assert any(ROOT.glob(path.rstrip("/"))), f"{path} does not exist"


def test_the_readme_is_short() -> None:
    """What is longer has a page in docs/."""
    assert read("README.md").count("\n") <= 150


def examples(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """The language, the text and the shown output of each example, in the order of the document."""
    for command in re.findall(r"^Example: (ternarize .*(?:\n\S.*)*)$", text, re.M):
        if not command.startswith("ternarize serve"):  # it would not end; test_serve.py has it
            yield "console", command.replace("&quot;", '"'), []
    for block, following in itertools.pairwise([*blocks(text), Block("", "")]):
        if block.language == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
                command, _, shown = part.partition("\n")
                if "[OPTIONS]" not in command:
                    yield "console", command, shown.splitlines()
        elif block.language == "python" and not any(name in block.text for name in NOT_HERE):
            shown = following.text if following.language == "text" else ""
            yield "python", block.text, shown.splitlines()


def is_same(shown: str, said: str) -> bool:
    """Whether two lines have the same words, and numbers that another CPU might have rounded so.

    Numbers may differ by 1 %, times by anything, and columns in their width.
    """
    shown, said = (re.sub(r"\bin [\d.]+ s\b", "in - s", " ".join(x.split())) for x in (shown, said))
    if re.split(NUMBER, shown) != re.split(NUMBER, said):
        return False
    numbers = zip(re.findall(NUMBER, shown), re.findall(NUMBER, said), strict=True)
    return all(
        math.isclose(float(a.replace(",", "")), float(b.replace(",", "")), rel_tol=0.01)
        for a, b in numbers
    )


def assert_says(said: str, shown: list[str]) -> None:
    lines = said.splitlines()
    starts = range(len(lines) - len(shown) + 1)
    assert any(all(map(is_same, shown, lines[start:])) for start in starts), (
        f"is shown:\n{chr(10).join(shown)}\nis printed:\n{said}"
    )


def run_command(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.stderr
    return result.output


def run_example(language: str, text: str, names: dict[str, Any]) -> str:
    """What an example prints: a command of ternarize or python, or Python with the names so far."""
    if language == "python":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, "example", "exec"), names)
        return printed.getvalue()
    program, *arguments = shlex.split(text, comments=True)
    if program == "ternarize":
        fails = re.search(r"# exit code (\d)$", text)
        return run_command(*arguments, code=int(fails[1]) if fails else 0)
    assert program == "python", f"{text}: not an example that can be run"
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("document", [d for d in WITH_EXAMPLES if any(examples(read(d)))])
def test_the_examples_run_and_print_what_is_shown(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In order, in a folder that has examples/ and formats/, and what README.md's first makes."""
    given = list(examples(read(document)))
    if not any(shown for _, _, shown in given):  # no figure that a calibration would change
        request.getfixturevalue("quick")
    monkeypatch.chdir(tmp_path)
    for folder in ("examples", "formats"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    if document not in ("README.md", "CLI.md"):
        run_command("convert", "examples/tiny-llama", "packed", "--method", "itf", "--no-check")
    names: dict[str, Any] = {}
    for language, text, shown in given:
        assert_says(run_example(language, text, names), shown)


def test_examples_that_can_run_are_marked_to_be_run() -> None:
    count = {"console": 0, "python": 0}
    for document in WITH_EXAMPLES:
        for language, *_ in examples(read(document)):
            count[language] += 1
        for block in blocks(read(document)):
            if block.language == "console":
                for line in re.findall(r"^ternarize .*", block.text, re.M):
                    if line.startswith("ternarize convert examples/tiny-llama build/"):
                        continue  # of README.md, in the environment that the lines before it make
                    assert any(name in line for name in NOT_HERE), f"{document}: {line}"
            else:
                assert block.language in ("python", "text"), f"{document}: {block.language}"
    assert count["console"] >= 25 and count["python"] >= 4


def test_another_output_than_is_shown_is_noticed() -> None:
    assert_says("a\n14 tensors,  0.1902, in 3 s\nb\n", ["14 tensors, 0.1903, in 12 s", "b"])
    for said in ("15 tensors, 0.1902, in 3 s\nb", "14 tensors, 0.1902, in 3 s\nc", "14 tensors"):
        with pytest.raises(AssertionError):
            assert_says(said, ["14 tensors, 0.1903, in 12 s", "b"])


@pytest.mark.skipif(
    importlib.util.find_spec("myst_parser") is None, reason="needs sphinx and myst-parser"
)
def test_the_site_builds_without_a_warning_and_takes_nothing_from_the_network(
    tmp_path: Path,
) -> None:
    command = re.search(
        r"sphinx-build (.*) -d build/doctrees -c docs \. build/site", read("Makefile")
    )
    assert command
    options = [*command[1].split(), "-d", str(tmp_path / "doctrees"), "-c", "docs"]
    site = tmp_path / "site"
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ".", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (site / "README.html").exists() and "README.html" in (site / "index.html").read_text()
    for page in site.rglob("*.html"):
        assert not re.search(r"(?:src|@import|url\()[=\"'( ]*https?:", page.read_text("utf-8")), (
            page
        )
    for document in DOCUMENTS:
        assert (site / document).with_suffix(".html").exists()
