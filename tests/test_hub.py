"""Models go to the Hub and come back: the real clients against a Hub on loopback (hub.py)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny_models
import torch
from hub import READ, WRITE, Fault, Hub
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors.torch import load_file, save_file
from test_imports import BITNETS, WIDE, finer_groups, make, trilm
from typer.testing import CliRunner

import ternarize
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import (
    CheckpointError,
    DigestError,
    FormatError,
    OutputError,
    TernarizeError,
    UsageError,
)
from ternarize.files.names import INDEX, RECORD, SAFETENSORS
from ternarize.files.sums import SUMS, format_sums, listed, sha256
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.publish import card
from ternarize.publish import hub as publishing
from ternarize.publish.hub import push
from ternarize.sources import fetch
from ternarize.sources.checkpoint import locate, open_checkpoint
from ternarize.sources.hub_errors import bare_line
from ternarize.sources.origin import read_card
from ternarize.sources.packed import open_packed
from ternarize.sources.stream import HubStream
from ternarize.steps.appender import Appender
from ternarize.steps.base import base_digest
from ternarize.steps.checkpoint import replay
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import Edit, JournalHeader, Step
from ternarize.steps.operations import edit

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-llama"
SOURCE_CARD = b"---\nlicense: mit\nlanguage: en\n---\n# Source\n"


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "packed"
    convert(EXAMPLE, path, Recipe("itf"))
    return path


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A packed checkpoint that a test may change."""
    return Path(shutil.copytree(packed_once, tmp_path / "packed"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The client in this process, with an empty cache; it waits for nothing between retries."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    disable_progress_bars()
    return hub


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Of a fresh process, on another machine as it were."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    return keep | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": WRITE,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run(words: list[str], env: dict[str, str]) -> str:
    """What a command prints; fails with what it said if it fails."""
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TERNARIZE = [sys.executable, "-m", "ternarize"]
HF = [sys.executable, "-m", "huggingface_hub.cli.hf"]

# --- fresh processes ----------------------------------------------------------------------------

# Each piece of code runs in a child of its own, of a process that has imported transformers alone.
RUN_PIECES = """
import json, os, sys
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
assert not any(name.startswith("ternarize") for name in sys.modules)
transformers.utils.logging.disable_progress_bar()
for piece in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        scope = {}
        try:
            exec(piece, scope)
            with torch.no_grad():
                logits = scope["model"](torch.arange(1, 9)[None]).logits
            kind = type(scope["model"].model.layers[0].mlp.up_proj).__name__
            print(kind, float(logits.double().abs().sum()), flush=True)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs each piece of code in a forked child")
def test_what_is_pushed_is_loaded_elsewhere_in_every_way_of_its_card(
    client: Hub, packed: Path, tmp_path: Path
) -> None:
    hub, there = client, environment(client, tmp_path / "there")
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    words = ["push", str(packed), "user/tiny", "--base-model", "user/source", "--shim", "-q"]
    url = CliRunner().invoke(app, words).stdout.strip()
    repo = hub.repos["user/tiny"]
    assert url == f"{hub.url}/user/tiny/commit/{repo.refs['main']}"
    assert len(repo.commits) == 2  # the one that made it, and the push
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before

    run([*HF, "download", "user/tiny", "--local-dir", str(tmp_path / "fetched")], there)
    fetched = tmp_path / "fetched"
    assert verify(fetched, EXAMPLE)["compared"]["converted_again"] == 20
    text = (fetched / "README.md").read_text()
    consoles = re.findall(r"```console\n(.*?)\n```", text, re.S)
    pythons = re.findall(r"```python\n(.*?)\n```", text, re.S)
    (generate,) = [line for line in consoles if "generate" in line]
    assert len(pythons) == 3 and "trust_remote_code" in pythons[-1]

    # the first fetches into an empty cache, the rest is offline
    printed = run(["bash", "-c", generate.replace("ternarize", " ".join(TERNARIZE), 1)], there)
    assert printed.startswith("Once upon a time") and len(printed) > 40
    asked = len(hub.log)
    offline = there | {"HF_HUB_OFFLINE": "1"}
    lines = run([sys.executable, "-c", RUN_PIECES, json.dumps(pythons)], offline).splitlines()
    kinds, sums = zip(*(line.split() for line in lines), strict=True)
    assert set(kinds) == {"TernaryLinear"}
    model = ternarize.load(packed)
    with torch.no_grad():
        expected = float(model(torch.arange(1, 9)[None]).logits.double().abs().sum())
    assert [float(each) for each in sums] == [pytest.approx(expected, rel=1e-6)] * 3
    assert len(hub.log) == asked


def test_the_hf_command_and_transformers_push_what_ternarize_accepts(
    client: Hub, packed: Path, tmp_path: Path
) -> None:
    env = environment(client, tmp_path / "home")
    run([*HF, "upload", "user/by-hf", str(packed), "."], env)
    assert verify("user/by-hf")["ternary"] == 14
    model: Any = ternarize.load("user/by-hf")
    model.push_to_hub("user/by-transformers")
    assert verify("user/by-transformers")["ternary"] == 14


def test_a_list_of_digests_holds_on_the_hub_with_a_shim_and_folders(
    client: Hub, packed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    (copy / "templates").mkdir()
    for name in ("templates/[a].jinja", "terms"):  # neither is fetched unless it is listed
        (copy / name).write_text("text")
    (copy / SUMS).write_text(format_sums({name: sha256(copy / name) for name in listed(copy)}))
    sent = push(copy, "user/tiny", shim=True)["files"]
    count = verify("user/tiny")["listed"]
    assert count == len(sent.keys() - {SUMS, "README.md"}) > verify(packed)["listed"]


# --- push ---------------------------------------------------------------------------------------


def test_a_push_sends_one_commit_and_sends_nothing_twice(client: Hub, packed: Path) -> None:
    result = push(packed, "user/tiny", commit_message="My title")
    repo = client.repos["user/tiny"]
    assert result["commit"] == repo.refs["main"] and result["card"] == "written"
    assert repo.titles[result["commit"]] == "My title"
    sent = {path: file.data for path, file in repo.files().items() if path[0] != "."}
    assert {path: len(data) for path, data in sent.items()} == result["files"]
    assert {p.name: p.read_bytes() for p in packed.iterdir()} == {
        path: data for path, data in sent.items() if path != "README.md"
    }
    assert push(packed, "user/tiny")["commit"] == result["commit"]  # nothing has changed
    assert len(repo.commits) == 2 and client.requests("PUT", "/lfs/") == 1


@pytest.mark.parametrize("name", ["a/b/c", "user/name@main", "", "../name", "user/na me"])
def test_a_name_that_is_none_of_a_repository_is_refused(name: str, packed: Path) -> None:
    with pytest.raises(UsageError, match="is no name of a repository; expected user/name"):
        push(packed, name, dry_run=True)


def test_a_dry_run_and_a_damaged_directory_ask_nobody(client: Hub, packed: Path) -> None:
    dry = push(packed, "user/tiny", dry_run=True)
    assert dry["commit"] is None and dry["card_text"].startswith("---\nlibrary_name: transf")
    assert set(dry["files"]) == {path.name for path in packed.iterdir()} | {"README.md"}
    weights = packed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DigestError):
        push(packed, "user/tiny")
    with pytest.raises(CheckpointError, match="no such directory"):
        push(packed / "absent", "user/tiny")
    assert client.log == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "flax_model.msgpack", "model.onnx"])
def test_weights_that_are_not_the_models_are_not_sent(client: Hub, packed: Path, name: str) -> None:
    (packed / name).write_bytes(b"old")
    with pytest.raises(OutputError, match="is no part of the packed checkpoint"):
        push(packed, "user/tiny")
    assert client.log == []
    (packed / name).rename(packed / f".{name}")
    assert f".{name}" not in push(packed, "user/tiny", dry_run=True)["files"]


def test_weights_that_would_be_taken_for_the_models_are_removed(client: Hub, packed: Path) -> None:
    client.put(
        "user/tiny",
        {
            "model-00001-of-00002.safetensors": b"1",
            "model-00002-of-00002.safetensors": b"2",
            "model.safetensors.index.json": b"{}",
            "pytorch_model.bin": b"3",
            "adapter_model.safetensors": b"4",
            "notes.txt": b"5",
            "model-00001-of-00002.gguf": b"6",
            "model-of-the-year-of-2026.md": b"7",
            "pytorch_model-out-of-date.txt": b"8",
        },
    )
    result = push(packed, "user/tiny")
    files = client.repos["user/tiny"].files()
    assert len(result["removed"]) == 4 and files.keys().isdisjoint(result["removed"])
    assert {"adapter_model.safetensors", "notes.txt", "model.safetensors"} <= files.keys()
    assert {"model-00001-of-00002.gguf", "pytorch_model-out-of-date.txt"} <= files.keys()
    assert "model-of-the-year-of-2026.md" in files


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_push_that_the_hub_would_take_in_part_is_refused(
    client: Hub, packed: Path, path: str
) -> None:
    repo = client.put("user/tiny", {"pytorch_model.bin": b"old"})
    client.ignored = {path}
    with pytest.raises(OutputError, match=rf"\.gitignore on the Hub leaves out {path};"):
        push(packed, "user/tiny")
    assert client.requests("POST", "/commit/") == 0 and "pytorch_model.bin" in repo.files()
    client.ignored = set()
    push(packed, "user/tiny")
    assert path in repo.files() and "pytorch_model.bin" not in repo.files()


@pytest.mark.parametrize("token", ["hf_secret x", "hf_secret\nx", "hf_secr\u00e9t", " "])
def test_a_token_that_cannot_be_one_is_not_shown(
    client: Hub, packed: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        push(packed, "user/tiny", token=token)
    assert "secr" not in str(caught.value) and client.log == []
    monkeypatch.setenv("HF_TOKEN", f" {WRITE}\n")
    assert push(packed, "user/tiny", token=f"{WRITE} \n")["commit"]


def test_errors_show_neither_tokens_nor_queries() -> None:
    text = "Illegal header b'Bearer hf_abc def' from https://x.y/z?sig=s3cret&a=b, hf_0123\nagain"
    assert bare_line(text) == "Illegal header b'Bearer ***' from https://x.y/z hf_*** again"
    assert bare_line("no snapshot " * 20) == "no snapshot " * 13 + "no ..."


def test_a_branch_and_a_pull_request(client: Hub, packed: Path) -> None:
    client.create("user/tiny")
    result = push(packed, "user/tiny", create_pr=True)
    repo = client.repos["user/tiny"]
    assert result["pull_request"].endswith("/discussions/1")
    assert "model.safetensors" in repo.files("refs/pr/1")
    assert "model.safetensors" not in repo.files()
    assert "auto_map" not in json.loads(repo.files("refs/pr/1")["config.json"].data)
    push(packed, "user/tiny", revision="refs/pr/1", shim=True)
    assert "auto_map" in json.loads(repo.files("refs/pr/1")["config.json"].data)
    push(packed, "user/tiny", revision="v1")
    assert "model.safetensors" in repo.files("v1") and "model.safetensors" not in repo.files()
    assert "user/tiny@v1" in repo.files("v1")["README.md"].data.decode()
    for revision in ("v1", "refs/pr/1"):
        assert verify(f"user/tiny@{revision}")["ternary"] == 14
    with pytest.raises(UsageError, match="Leave one out"):
        push(packed, "user/tiny", create_pr=True, revision="v1")


def test_private_stays_private(
    client: Hub, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(packed, "user/secret", private=True)
    assert client.repos["user/secret"].private
    client.create("user/open")
    with pytest.raises(OutputError, match="is public") as caught:
        push(packed, "user/open", private=True)
    assert "\n" not in str(caught.value)
    assert len(client.repos["user/open"].commits) == 1
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    monkeypatch.setenv("HF_TOKEN", READ)
    assert verify("user/secret")["ternary"] == 14
    with pytest.raises(OutputError, match="403"):
        push(packed, "user/mine")
    assert "user/mine" not in client.repos
    assert push(packed, "user/mine", token=WRITE)["commit"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "third"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="or it is private"):
        verify("user/secret")


# each is over at its first retry, or ends the push, which another push then completes
PUSH_FAULTS = [
    ("POST", "/repos/create", 401, {}),
    ("POST", "/repos/create", 403, {}),
    ("POST", "/repos/create", 429, {"Retry-After": "1"}),
    ("POST", "/repos/create", 503, {}),
    ("GET", "/api/models/", "drop", {}),
    ("GET", "/api/models/", 404, {"X-Error-Code": "RepoNotFound"}),
    ("POST", "/preupload/", 503, {}),
    ("POST", "/preupload/", "drop", {}),
    ("POST", "/objects/batch", 429, {"Retry-After": "1"}),
    ("POST", "/objects/batch", 403, {}),
    ("PUT", "/lfs/", "drop", {}),
    ("PUT", "/lfs/", 503, {}),
    ("PUT", "/lfs/", 401, {}),
    ("POST", "/commit/", 409, {}),
    ("POST", "/commit/", 412, {}),
    ("POST", "/commit/", 500, {}),
    ("POST", "/commit/", "drop", {}),
]


@pytest.mark.parametrize(("method", "path", "what", "headers"), PUSH_FAULTS)
@pytest.mark.parametrize("times", [1, 100])
def test_a_push_that_meets_a_fault_is_whole_or_nothing(
    client: Hub,
    packed_once: Path,
    method: str,
    path: str,
    what: int | str,
    headers: dict[str, str],
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "verify", lambda directory, progress: None)  # it is good
    client.faults = [Fault(method, path, what, times, headers)]
    try:
        push(packed_once, "user/tiny")
        failed = False
    except OutputError as error:
        failed = True
        assert "\n" not in str(error) and str(error).startswith("user/tiny")
    assert failed or times == 1
    repo = client.repos.get("user/tiny")
    if failed and repo is not None:
        assert len(repo.commits) == 1 and "model.safetensors" not in repo.files()
    client.faults.clear()
    push(packed_once, "user/tiny")
    files = client.repos["user/tiny"].files()
    weights = (packed_once / "model.safetensors").read_bytes()
    assert files["model.safetensors"].data == weights
    assert len(client.repos["user/tiny"].commits) == 2
    if path == "/commit/":  # the weights had arrived
        assert client.requests("PUT", "/lfs/") == 1


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_push(client: Hub, packed: Path) -> None:
    client.faults = [Fault("POST", "/commit/", "cut after")]
    with pytest.raises(OutputError, match="The same command goes on"):
        push(packed, "user/tiny")
    repo = client.repos["user/tiny"]
    assert len(repo.commits) == 2
    assert push(packed, "user/tiny")["commit"] == repo.refs["main"]
    assert len(repo.commits) == 2


def test_push_on_the_command_line(client: Hub, packed: Path) -> None:
    def ternarize(*words: str) -> Any:
        return CliRunner().invoke(app, ["push", str(packed), "user/tiny", *words])

    dry = ternarize("--dry-run")
    assert dry.exit_code == 0 and client.log == []
    assert "model.safetensors" in dry.stdout and "9 files" not in dry.stdout
    assert "8 files, 1.41 MB, to user/tiny\n\nREADME.md:\n\n---\n" in dry.stdout
    pushed = ternarize("--private", "--commit-message", "First", "--json")
    assert pushed.exit_code == 0 and json.loads(pushed.stdout)["card"] == "written"
    repo = client.repos["user/tiny"]
    assert repo.private and repo.titles[repo.refs["main"]] == "First"
    client.put("user/tiny", {"README.md": b"# Mine\n"})
    again = ternarize("--token", WRITE)
    assert again.stdout == f"{client.url}/user/tiny/commit/{repo.refs['main']}\n"
    assert "README.md on the Hub has been edited: left as it is" in again.stderr
    client.faults = [Fault("POST", "/repos/create", 429, 100)]
    refused = ternarize()
    assert refused.exit_code == 1 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "user/tiny: the Hub asks for fewer requests (429)" in refused.stderr


# --- the card -----------------------------------------------------------------------------------


def test_a_card_that_was_edited_is_never_replaced(client: Hub, packed: Path) -> None:
    push(packed, "user/tiny")
    repo = client.repos["user/tiny"]
    ours = repo.files()["README.md"].data.decode()
    assert card.is_generated(ours) and card.is_generated(ours.replace("\n", "\r\n"))
    assert not card.is_generated(ours.replace("# tiny", "# Tiny")) and not card.is_generated("")
    edited = ours.replace("# tiny", "# My tiny model").encode()
    client.put("user/tiny", {"README.md": edited})
    result = push(packed, "user/tiny", shim=True)
    assert result["card"] == "kept" and repo.files()["README.md"].data == edited
    assert "auto_map" in json.loads(repo.files()["config.json"].data)

    client.put("user/tiny", {"README.md": ours.encode()})
    (packed / "README.md").write_text("# My own\n")
    assert push(packed, "user/tiny")["card"] == "own"
    assert repo.files()["README.md"].data == b"# My own\n"
    (packed / "README.md").write_text(ours)  # fetched from the Hub and not touched: written anew
    assert push(packed, "user/other", dry_run=True)["card"] == "written"
    assert "# other" in push(packed, "user/other", dry_run=True)["card_text"]


def test_the_card_says_what_the_record_says(client: Hub, tmp_path: Path) -> None:
    source = {path.name: path.read_bytes() for path in EXAMPLE.iterdir()}
    client.put("user/source", source | {"README.md": SOURCE_CARD})
    recipe = Recipe("itf", 64, keep=("*.1.*down_proj*",), scale_bits=8, activations="int8")
    record = convert("user/source@main", tmp_path / "packed", recipe)
    commit = client.repos["user/source"].refs["main"]
    assert record["source"]["hub"] == {"id": "user/source", "commit": commit}
    assert record["source"]["card"] == {"license": "mit", "language": "en"}
    text = card.make_card(tmp_path / "packed", "user/tiny")
    path = tmp_path / "README.md"
    path.write_text(text)
    data = huggingface_hub.metadata_load(path)
    assert data == {
        "base_model": "user/source",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "language": "en",
        "tags": ["ternarize", "ternary", "1.58-bit"],
    }
    assert "| parameters | 1,836,288 |" in text and "| of them ternary | 1,179,648 |" in text
    assert "not on record" in text and "That of the source: mit." in text

    # the commands that it gives are those that made it, and prove it
    given = r"```console\n(ternarize (?:convert|verify .* --source).*)\n```"
    make, prove = re.findall(given, text)
    again = tmp_path / "again"
    again.mkdir()
    words = make.split()[1:]
    words[words.index("packed")] = str(again / "packed")
    result = CliRunner().invoke(app, [word.strip("'") for word in words])
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "ternarize.json", "config.json"):
        assert (again / "packed" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    words = prove.replace(" user/tiny ", f" {again / 'packed'} ").split()[1:]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "all equal" in result.output, result.output


def test_every_option_of_a_recipe_is_in_its_command() -> None:
    calibrate = Calibrate("texts.jsonl", 8, 32, seed=3, rotation=0, distill=5, target_bpw=1.7)
    recipe = Recipe(
        "gptq",
        -1,
        keep=("a*",),
        include=("b*", "c d"),
        dtype="bfloat16",
        activations="int8",
        scale_bits=8,
        codec="rans",
        planes=("p*",),
        head="int8",
        embeddings="ternary",
        calibrate=calibrate,
    )
    assert card.command_of(recipe, "user/source") == (
        "ternarize convert user/source packed --method gptq --group-size -1 --scale-bits 8 "
        "--dtype bfloat16 --activations int8 --head int8 --embeddings ternary --codec rans "
        "--keep 'a*' --include 'b*' --include 'c d' --planes 'p*' --dataset texts.jsonl "
        "--num-samples 8 --seq-len 32 --seed 3 --rotation 0 --distill 5 --target-bpw 1.7"
    )
    folded = Recipe("itf", 128, zeros=0.6, engine="llama.cpp", fold=True)
    assert card.command_of(folded, "user/source") == (  # whose groups --for would choose
        "ternarize convert user/source packed --method itf --group-size 128 --zeros 0.6 "
        "--for llama.cpp --fold"
    )


@pytest.mark.parametrize("form", ["trilm", "packed"])
def test_the_command_of_what_was_ternary_has_every_option(form: str, tmp_path: Path) -> None:
    """Left out, groups and activations would be those of the source."""
    kind, quantization, change = {**BITNETS, "trilm": ("Llama", None, trilm)}[form]
    source = make(tmp_path / "source", kind, quantization, change, torch.float16, **WIDE)
    group_size = 64 if form == "trilm" else 128
    convert(source, tmp_path / "packed", Recipe(group_size=group_size, activations="none"))
    text = card.make_card(tmp_path / "packed", "user/tiny")
    assert f"--group-size {group_size} --scale-bits 16 --activations none --head keep" in text


def test_the_quality_of_a_calibrated_model_is_in_its_card(packed: Path) -> None:
    path = packed / "ternarize.json"
    record = json.loads(path.read_text())
    record["calibration"] = {
        "data": {"dataset": "default", "report_samples": 9},
        "quality": {"kl_divergence": {"value": 0.25, "standard_error": 0.01}},
        "forms": {},
        "uncalibrated": 0,
        "blocks": [],
    }
    path.write_text(json.dumps(record))
    text = card.make_card(packed, "user/tiny")
    assert "| KL divergence from the source, nats per token | 0.2500 ± 0.0100 |" in text
    assert "Measured on 9 held-out samples" in text
    assert "is not on record" not in text.split("## How")[0]


@pytest.mark.parametrize(
    ("text", "inherited"),
    [
        (
            "---\nlicense: [mit, apache-2.0]\nlanguage: no\n---\n",
            {"license": ["mit", "apache-2.0"]},
        ),
        ("---\nlicense: 2024-01-01\npipeline_tag: x\n---\n", {"pipeline_tag": "x"}),
        ("---\nlicense: [mit, 1]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ('---\nlicense: "mit\\n# Mine"\nlanguage: en\n---\n', {"language": "en"}),
        ("---\nlicense: <b>\nlicense_link: 'javascript:x'\n---\n", {}),
        (
            "---\nlicense_link: https://x.y/L?a=b#c\nlibrary_name: z\nbase_model: z\n---\n",
            {"license_link": "https://x.y/L?a=b#c"},
        ),
        ("---\n- a\n---\n", {}),
        ("no metadata", {}),
    ],
)
def test_what_is_inherited_of_a_card(text: str, inherited: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == inherited


def test_folders_that_a_source_was_loaded_from_are_not_published(tmp_path: Path) -> None:
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    named = {"_name_or_path": "user/text", "more": [{"_name_or_path": "/home/me/part"}]}
    config |= {"_name_or_path": str(tmp_path / "mine"), "other_config": named}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "packed")
    packed = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "_name_or_path" not in packed
    assert packed["other_config"] == {"_name_or_path": "user/text", "more": [{}]}


def test_what_is_wrong_in_a_record_is_not_in_its_card(packed: Path) -> None:
    path = packed / "ternarize.json"
    record = json.loads(path.read_text())
    record["source"]["hub"] = {"id": "user/x", "commit": "main; rm -rf x"}
    record["source"]["card"] = {"license": "mit\n# Bad", "library_name": "bad", "language": "en"}
    record["tool"]["version"] = "`bad`"
    record["recipe"]["keep"] = ["*\n```\n# Bad"]
    path.write_text(json.dumps(record))
    text = card.make_card(packed, "user/tiny")
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?\n\1$", "", text)
    assert "bad" not in outside.lower() and "rm -rf" not in text and "user/x" not in text
    assert "library_name: transformers" in text and "language: en" in text


def test_a_card_without_a_record(packed: Path) -> None:
    (packed / "ternarize.json").unlink()
    text = card.make_card(packed, "user/tiny")
    assert "has no record of its conversion" in text and "base_model" not in text
    assert "| of them ternary | 1,310,720 |" in text


# --- pull ---------------------------------------------------------------------------------------


def test_every_command_takes_a_hub_id_with_its_revision(client: Hub, packed: Path) -> None:
    push(packed, "user/tiny", revision="v1")
    commit = client.repos["user/tiny"].refs["v1"]
    where, text = f"user/tiny@{commit}", str(ROOT / "examples" / "eval.txt")
    for words in (
        ["inspect", where],
        ["verify", "user/tiny@v1"],
        ["eval", where, "--text", text, "--seq-len", "32", "--max-tokens", "64"],
        ["generate", where, "--max-new-tokens", "2", "--prompt", "The"],
        ["bench", where, "--prompt", "4", "--decode", "2", "--repeats", "1"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    assert isinstance(ternarize.load("user/tiny", revision="v1"), torch.nn.Module)
    assert client.requests("GET", r"resolve/.*\.safetensors") == 1
    with pytest.raises(CheckpointError, match="has no such branch, tag or commit"):
        ternarize.load("user/tiny@v2")


PULL_FAULTS: list[tuple[str, str, int | str, dict[str, str]]] = [
    ("GET", "/api/models/user/tiny/revision", "drop", {}),
    ("GET", "/api/models/user/tiny/revision", 401, {}),
    ("GET", "/api/models/user/tiny/revision", 403, {"X-Error-Code": "GatedRepo"}),
    ("GET", "/api/models/user/tiny/revision", 404, {"X-Error-Code": "RepoNotFound"}),
    ("GET", "/tree/", 503, {}),
    ("GET", "/tree/", "cut", {}),
    ("HEAD", r"config\.json", "drop", {}),
    ("GET", r"config\.json", "flip", {}),
    ("GET", r"model\.safetensors", "cut", {}),
    ("GET", r"model\.safetensors", "drop", {}),
    ("GET", r"model\.safetensors", "flip", {}),
    ("GET", r"model\.safetensors", 403, {}),
    ("GET", r"model\.safetensors", 404, {"X-Error-Code": "EntryNotFound"}),
    ("GET", r"model\.safetensors", 429, {"Retry-After": "1"}),
    ("GET", r"model\.safetensors", 503, {}),
]


@pytest.mark.parametrize(("method", "path", "what", "headers"), PULL_FAULTS)
@pytest.mark.parametrize("times", [1, 100])
def test_what_is_fetched_is_right_or_refused(
    client: Hub,
    packed_once: Path,
    method: str,
    path: str,
    what: int | str,
    headers: dict[str, str],
    times: int,
) -> None:
    files = {each.name: each.read_bytes() for each in packed_once.iterdir()}
    client.put("user/tiny", files)
    client.faults = [Fault(method, path, what, times, headers)]
    try:
        found = locate("user/tiny")
        failed = False
    except CheckpointError as error:
        failed = True
        assert "\n" not in str(error) and str(error).startswith("user/tiny")
    assert failed or times == 1 or method == "HEAD"  # the client can do without HEAD
    client.faults.clear()
    if failed:
        found = locate("user/tiny")
    assert {each.name: each.read_bytes() for each in found.iterdir()} == files


def test_wrong_bytes_of_the_right_size_are_not_kept(
    client: Hub, packed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {each.name: each.read_bytes() for each in packed_once.iterdir()}
    client.put("user/tiny", files)
    client.faults = [Fault("GET", r"tokenizer\.json", "flip", 2)]
    with pytest.raises(CheckpointError, match="tokenizer.json came twice with other bytes"):
        locate("user/tiny")
    cache = Path(constants.HF_HUB_CACHE)
    assert not [path for path in cache.rglob("tokenizer.json") if path.exists()]
    # a cache that another program has filled with wrong bytes
    client.faults = [Fault("GET", r"model\.safetensors", "flip")]
    arrived = huggingface_hub.hf_hub_download("user/tiny", "model.safetensors")
    assert Path(arrived).read_bytes() != files["model.safetensors"]
    found = locate("user/tiny")
    assert (found / "model.safetensors").read_bytes() == files["model.safetensors"]
    # where the cache keeps files of all repositories together, and this is the second link to one
    link = found / "model.safetensors"
    blob, shared = link.resolve(), tmp_path / "cache" / "blobs" / ("0" * 64)
    shared.parent.mkdir(exist_ok=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert locate("user/tiny") == found and blob.is_symlink()
    shared.write_bytes(b"\0" * shared.stat().st_size)
    assert locate("user/tiny") == found
    assert link.read_bytes() == files["model.safetensors"] and not shared.exists()
    # what is of no use here is nobody's business
    client.put("user/tiny", {"other.safetensors": b"other"})
    client.faults = [Fault("GET", r"other\.safetensors", "flip")]
    other = Path(huggingface_hub.hf_hub_download("user/tiny", "other.safetensors"))
    assert locate("user/tiny") == other.parent and other.read_bytes() != b"other"
    # what was checked is not read again
    monkeypatch.setattr(fetch, "has_digest", lambda path, digest: pytest.fail(f"reads {path}"))
    locate("user/tiny")


def test_without_a_network_the_cache_is_what_there_is(
    client: Hub, packed_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put("user/tiny", {each.name: each.read_bytes() for each in packed_once.iterdir()})
    locate("user/tiny", config_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache as a whole|no weights"):
        open_checkpoint(locate("user/tiny"))
    with pytest.raises(CheckpointError, match="not in the cache as a whole"):
        locate("user/absent")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    locate("user/tiny")
    asked = len(client.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert verify("user/tiny")["ternary"] == 14
    assert len(client.log) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # where nobody listens
    assert verify("user/tiny")["ternary"] == 14
    with pytest.raises(CheckpointError, match="cannot be reached"):
        locate("user/absent")


def test_an_edited_file_is_not_lost_without_a_network(
    client: Hub, packed_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {each.name: each.read_bytes() for each in packed_once.iterdir()}
    client.put("user/tiny", files)
    path = locate("user/tiny") / "config.json"
    edited = files["config.json"] + b" \n"
    path.resolve().write_bytes(edited)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="It was left as it is"):
        locate("user/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with monkeypatch.context() as patch:
        nobody = "http://127.0.0.1:1"
        template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", nobody)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(CheckpointError):
            locate("user/tiny")
        assert path.read_bytes() == edited
    client.faults = [Fault("GET", r"resolve/.*config\.json", 403, 100)]
    with pytest.raises(CheckpointError):
        locate("user/tiny")
    assert path.read_bytes() == edited
    client.faults.clear()
    assert (locate("user/tiny") / "config.json").read_bytes() == files["config.json"]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.aside"))


def test_a_full_disk_is_said(
    client: Hub, packed_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put("user/tiny", {each.name: each.read_bytes() for each in packed_once.iterdir()})

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match="the disk is full. Make room"):
        locate("user/tiny")


# --- shard by shard -----------------------------------------------------------------------------

SHARDS = 5


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in shards, with a copy of the embedding as the head in the last of them."""
    path = tmp_path_factory.mktemp("sharded") / "source"
    shutil.copytree(EXAMPLE, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for at in range(SHARDS):
        part = {name: tensors[name] for name in names[at::SHARDS]}
        if at == SHARDS - 1:
            part["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        file = f"model-{at + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def on_disk(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk, without their holes."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(os.name != "posix", reason="asks how much room files take")
def test_a_stream_has_few_shards_on_the_disk_and_gives_the_same_bytes(
    client: Hub, sharded: Path, tmp_path: Path
) -> None:
    client.put("user/source", {path.name: path.read_bytes() for path in sharded.iterdir()})
    expected, output = tmp_path / "expected", tmp_path / "packed"
    convert(sharded, expected)
    most = 0

    def watch(done: int, total: int, name: str, stage: str) -> None:
        nonlocal most
        most = max(most, on_disk(tmp_path / "packed.partial" / ".source"))

    convert("user/source", output, progress=watch, stream=True)
    assert sorted(os.listdir(output)) == sorted(os.listdir(expected))
    for path in expected.iterdir():
        if path.name not in ("ternarize.json", SUMS):  # the record names the Hub
            assert (output / path.name).read_bytes() == path.read_bytes()
    sizes = sorted(path.stat().st_size for path in sharded.glob("*.safetensors"))
    # a shard, those two that hold copies of one tensor and had to be compared, small files
    assert 0 < most < sum(sizes[-3:]) + (1 << 18) < sum(sizes)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    for at in range(SHARDS):  # each once, besides its header
        assert client.requests("GET", f"resolve/.*model-{at + 1:05d}-of") <= 3


@pytest.mark.parametrize("form", ["trilm", "inverse"])
def test_a_stream_of_what_is_ternary_gives_the_same_bytes(
    form: str, client: Hub, tmp_path: Path
) -> None:
    kind, quantization, change = {**BITNETS, "trilm": ("Llama", None, trilm)}[form]
    sizes = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48}
    source = make(tmp_path / "source", kind, quantization, change, torch.float16, **sizes)
    split(source, 3)  # which parts a weight from its scale
    client.put("user/source", {path.name: path.read_bytes() for path in source.iterdir()})
    convert(source, tmp_path / "expected")
    convert("user/source", tmp_path / "packed", stream=True)
    for path in (tmp_path / "expected").iterdir():
        if path.name not in (RECORD, SUMS):  # the record names the source
            assert (tmp_path / "packed" / path.name).read_bytes() == path.read_bytes()
    assert verify(tmp_path / "packed", source)["compared"]["converted_again"] > 14


def test_a_stream_refuses_groups_that_lose_something(client: Hub, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "Llama", None, finer_groups, **WIDE)
    client.put("user/source", {path.name: path.read_bytes() for path in source.iterdir()})
    with pytest.raises(CheckpointError, match="Leave out --group-size"):
        convert("user/source", tmp_path / "packed", Recipe(group_size=128), stream=True)


def split(directory: Path, count: int) -> None:
    """Cut model.safetensors into shards, tensor by tensor in turn."""
    tensors = load_file(directory / SAFETENSORS)
    (directory / SAFETENSORS).unlink()
    names = [f"model-{at + 1:05d}-of-{count:05d}.safetensors" for at in range(count)]
    for at, name in enumerate(names):
        part = {key: tensors[key] for key in sorted(tensors)[at::count]}
        save_file(part, directory / name, metadata={"format": "pt"})
    weight_map = {key: names[at % count] for at, key in enumerate(sorted(tensors))}
    table = {"metadata": {}, "weight_map": weight_map}
    (directory / (SAFETENSORS + INDEX)).write_text(json.dumps(table))


def test_a_stream_that_breaks_goes_on_where_it_was(
    client: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put("user/source", {path.name: path.read_bytes() for path in sharded.iterdir()})
    output, fourth = tmp_path / "packed", f"model-00004-of-{SHARDS:05d}"
    client.faults = [Fault("GET", f"resolve/.*{fourth}", 503, 100, skip=2)]  # the header comes
    with pytest.raises(CheckpointError, match="The same command goes on from here") as caught:
        convert("user/source", output, stream=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "packed.partial").is_dir()
    assert not (tmp_path / "packed.partial" / ".source").exists()
    client.faults = [Fault("GET", f"resolve/.*{fourth}", "flip", 100, skip=2)]
    with pytest.raises(CheckpointError, match="came twice with other bytes"):
        convert("user/source", output, stream=True)
    for status in (401, 403):  # a person must do something first; what is done is kept
        client.faults = [Fault("GET", f"resolve/.*{fourth}", status, 100, skip=2)]
        with pytest.raises(CheckpointError, match=str(status)):
            convert("user/source", output, stream=True)
        assert (tmp_path / "packed.partial" / f"model-00003-of-{SHARDS:05d}.safetensors").is_file()
    client.faults.clear()
    before = client.requests("GET", "resolve/.*model-00002-of")
    words = ["convert", "user/source", str(output), "--stream", "-q"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert client.requests("GET", "resolve/.*model-00002-of") - before == 2  # its header again
    assert verify(output, sharded)["compared"]["converted_again"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "packed"]


def test_what_cannot_be_streamed_is_said(client: Hub, sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="local files are .* never deleted"):
        convert(sharded, tmp_path / "packed", stream=True)
    with pytest.raises(UsageError, match="reads the weights more than once"):
        convert(
            "user/source", tmp_path / "packed", Recipe("gptq", calibrate=Calibrate()), stream=True
        )
    client.put("user/source", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(CheckpointError, match="expected safetensors"):
        convert("user/source", tmp_path / "packed", stream=True)
    client.put("user/source", {"model.safetensors": b"\xff" * 100})
    with pytest.raises(TernarizeError, match="the header's length"):
        convert("user/source", tmp_path / "packed", stream=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_a_stream_asks_for_the_room_that_it_takes(
    client: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put("user/source", {path.name: path.read_bytes() for path in sharded.iterdir()})
    convert(sharded, tmp_path / "expected")
    packed = sum(path.stat().st_size for path in (tmp_path / "expected").iterdir())
    usage = type("Usage", (), {"free": packed + (1 << 20) + 10_000})
    monkeypatch.setattr("ternarize.convert.limits.shutil.disk_usage", lambda path: usage)
    convert(sharded, tmp_path / "enough")
    with pytest.raises(OutputError, match="GB free; the result needs"):
        convert("user/source", tmp_path / "packed", stream=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "enough", "expected"]


def test_a_directory_in_the_way_of_a_stream_is_left_alone(
    client: Hub, sharded: Path, tmp_path: Path
) -> None:
    client.put("user/source", {path.name: path.read_bytes() for path in sharded.iterdir()})
    mine = tmp_path / "packed.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(OutputError, match="is no unfinished conversion"):
        convert("user/source", tmp_path / "packed", stream=True)
    assert mine.read_text() == "mine" and os.listdir(mine.parent) == ["mine.txt"]
    mine.unlink()
    theirs = mine.parent / ".source" / "mine.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    for stream in (True, False):
        with pytest.raises(OutputError, match="is no unfinished conversion"):
            convert("user/source", tmp_path / "packed", stream=stream)
    assert theirs.read_text() == "mine"
    shutil.rmtree(mine.parent)
    mine.parent.write_text("mine")
    for stream in (True, False):
        with pytest.raises(OutputError, match="is no directory") as caught:
            convert("user/source", tmp_path / "packed", stream=stream)
        assert "\n" not in str(caught.value)
    assert mine.parent.read_text() == "mine"


def test_what_a_killed_stream_leaves_is_not_in_the_result(
    client: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put("user/source", {path.name: path.read_bytes() for path in sharded.iterdir()})
    left = tmp_path / "packed.partial" / ".source"
    left.mkdir(parents=True)
    (left.parent / ".journal.jsonl").touch()  # with which a stream begins
    (left / "model.safetensors").write_bytes(b"left")
    convert("user/source", tmp_path / "packed")
    assert not (tmp_path / "packed" / ".source").exists() and not left.parent.exists()
    # the weights are in the cache now: a stream does not copy them
    copied: list[str] = []
    monkeypatch.setattr("shutil.copyfile", lambda a, b: copied.append(Path(a).name))
    with pytest.raises(CheckpointError):  # nothing was copied in truth
        HubStream("user/source", None, left)
    assert "config.json" in copied and not [name for name in copied if "safetensors" in name[-11:]]


# --- the lm-evaluation-harness ------------------------------------------------------------------

TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
metadata: {version: 1.0}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A directory with a task of lm_eval whose data is here."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = (ROOT / "examples" / "eval.txt").read_text()
    lines = [line for line in text.split("\n\n") if len(line) > 40][:3]
    assert len(lines) == 3
    data = "".join(json.dumps({"text": line.strip()[:200]}) + "\n" for line in lines)
    (tmp_path / "data.jsonl").write_text(data)
    (folder / "task.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    return folder


def test_the_harness_runs_on_a_packed_model_with_and_without_ternarize(
    client: Hub, packed: Path, task: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs ternarize[lm-eval]")
    push(packed, "user/tiny", shim=True)
    env = environment(client, tmp_path / "home", HF_DATASETS_OFFLINE="1")
    common = ["--tasks", "local_text", "--include_path", str(task)]
    arguments = "pretrained=user/tiny,trust_remote_code=True,dtype=float32,max_length=256"
    words = ["run", "--model", "hf", "--model_args", arguments, *common, "--device", "cpu"]
    run([sys.executable, "-m", "lm_eval", *words, "--output_path", str(tmp_path / "out")], env)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["local_text"]["bits_per_byte,none"]
    words = ["eval", "user/tiny", "--tasks", "local_text", "--include-path", str(task), "--json"]
    ours = json.loads(run([*TERNARIZE, *words], env))
    assert ours["tasks"]["local_text"]["bits_per_byte"]["value"] == pytest.approx(theirs, rel=1e-6)
    assert 0.5 < theirs < 4
    done = CliRunner().invoke(app, ["eval", str(packed), "--tasks", "no_such_task"])
    assert done.exit_code == 2 and "'no_such_task' is no task of lm_eval" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "piqa"], "Run pip install 'ternarize[lm-eval]'"),
        (["--tasks", "piqa", "--limit", "0"], "limit: 0; expected at least 1"),
        (["--tasks", "piqa", "--seq-len", "32"], "--seq-len: is for --text"),
        (["--text", "x", "--limit", "3"], "--limit: is for --tasks"),
        ([], "neither of --text and --tasks"),
        (["--tasks", "piqa", "--text", "x"], "both of --text and --tasks"),
        (["--tasks", "piqa", "--include-path", "absent"], "absent: no such directory"),
    ],
)
def test_tasks_that_cannot_be_run_are_said(
    packed_once: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    result = CliRunner().invoke(app, ["eval", str(packed_once), *words])
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_whatever_a_task_raises_is_told_in_one_line(
    packed_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> Any:
        def evaluate(**options: Any) -> None:
            raise error

        return SimpleNamespace(simple_evaluate=evaluate)

    models: Any = SimpleNamespace(HFLM=lambda **options: None)
    unclear = KeyError("gold")  # of a template
    unclear.__cause__ = ValueError("no column\nof that name")
    for error, message in (
        (ConnectionError("Couldn't reach 'baber/piqa'"), "(ConnectionError: Couldn't reach 'baber"),
        (
            FileNotFoundError(2, "No such file", "x.jsonl"),
            "tasks of your own on data that lie here",
        ),
        (unclear, "(KeyError: 'gold'; ValueError: no column); expected a task that runs"),
    ):
        harness = fails(error), models, None
        monkeypatch.setattr("ternarize.measure.tasks._harness", lambda *_, h=harness: h)
        result = CliRunner().invoke(app, ["eval", str(packed_once), "--tasks", "piqa"])
        assert result.exit_code == 1 and message in result.stderr, result.output
        assert result.stderr.count("\n") == 1


def test_memory_that_runs_out_in_a_task_is_told_as_such(
    packed_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(**options: Any) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 99 bytes")

    harness = SimpleNamespace(simple_evaluate=evaluate)
    models = SimpleNamespace(HFLM=lambda **options: None)
    monkeypatch.setattr("ternarize.measure.tasks._harness", lambda *_: (harness, models, None))
    result = CliRunner().invoke(app, ["eval", str(packed_once), "--tasks", "piqa"])
    assert result.exit_code == 1 and "error: memory: not enough is left" in result.stderr


# --- modules, folders, variants -------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A backbone with a module behind it, as sentence-transformers stores it."""
    tiny_models.save("bert", tmp_path / "sentences", torch.float32)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]
    (tmp_path / "sentences" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentences" / "2_Dense").mkdir()
    save_file(
        {"linear.weight": torch.ones(32, 64)},
        tmp_path / "sentences" / "2_Dense" / "model.safetensors",
    )
    return tmp_path / "sentences"


@pytest.mark.parametrize("stream", [False, True])
def test_modules_beside_a_model_come_from_the_hub_and_go_there(
    stream: bool, client: Hub, sentences: Path, tmp_path: Path
) -> None:
    others = {"onnx/model.onnx": b"not asked for"}
    client.put("user/sentences", {**files_of(sentences), **others})
    convert("user/sentences", tmp_path / "packed", Recipe("itf", 32), stream=stream)
    dense = "2_Dense/model.safetensors"
    assert (tmp_path / "packed" / dense).read_bytes() == (sentences / dense).read_bytes()
    assert not client.requests("GET", "onnx/model.onnx")
    push(tmp_path / "packed", "user/packed")
    assert dense in client.repos["user/packed"].files()
    fetched = locate("user/packed")
    verify(fetched)
    assert (fetched / dense).read_bytes() == (sentences / dense).read_bytes()


def test_a_transformer_in_a_folder_of_its_own_comes_from_the_hub(
    client: Hub, sentences: Path, tmp_path: Path
) -> None:
    files = files_of(sentences)
    backbone = {name: files.pop(name) for name in ("config.json", "model.safetensors")}
    files |= {f"0_Transformer/{name}": data for name, data in backbone.items()}
    modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "2_Dense"}]
    client.put("user/sentences", {**files, "modules.json": json.dumps(modules).encode()})
    record = convert("user/sentences", tmp_path / "packed", Recipe("itf", 32))
    commit = client.repos["user/sentences"].refs["main"]
    assert record["source"]["hub"] == {"id": "user/sentences", "commit": commit}
    assert (tmp_path / "packed" / "2_Dense" / "model.safetensors").is_file()


def test_a_folder_and_a_variant_of_a_repository_are_loaded(
    client: Hub, packed: Path, tmp_path: Path
) -> None:
    model = ternarize.load(packed)
    model.save_pretrained(tmp_path / "small", variant="small")
    files = {f"ternary/{name}": data for name, data in files_of(packed).items()}
    files |= {f"small/{name}": data for name, data in files_of(tmp_path / "small").items()}
    client.put("user/many", files)
    ids = torch.arange(8)[None]
    ways: list[dict[str, Any]] = [{"subfolder": "ternary"}]
    ways.append({"subfolder": "small", "variant": "small"})
    for options in ways:
        found = ternarize.load("user/many", **options)
        with torch.no_grad():
            assert torch.equal(found(ids).logits, model(ids).logits), options


# --- journals of steps --------------------------------------------------------------------------


@pytest.fixture
def journal(packed: Path, tmp_path: Path) -> Path:
    """A journal of the packed checkpoint, with a step of scales, a step of trits, and an edit."""
    _, records = open_packed(packed)
    path = tmp_path / "my.steps"
    with Appender(path, JournalHeader(7, base=base_digest(records))) as appender:
        appender.append(Step(0, SCALES, 4, 1, 8, (1, 5), (1, -1)))
        appender.append(Step(1, TRITS, 8, 1, 8, (0,), (1,)))
        appender.append(Step(2, TRITS, 8, 1, 8, (3,), (-1,)))
        appender.append(Edit("mask", 2, 2))
    return path


def test_a_journal_is_pushed_and_loaded_as_its_card_says(
    client: Hub, packed: Path, journal: Path, tmp_path: Path
) -> None:
    push(packed, "user/base")
    whole = journal.read_bytes()
    journal.write_bytes(whole + b"\x0c\x00")  # of a record that was torn off
    sent = push(journal, "user/steps", base_model="user/base", private=True)
    repo = client.repos["user/steps"]
    assert repo.private and len(repo.commits) == 2 and sent["card"] == "written"
    assert repo.titles[sent["commit"]].startswith("Upload steps made by ternarize")
    files = {path: file.data for path, file in repo.files().items() if path[0] != "."}
    assert files == {"journal.steps": whole, "README.md": sent["card_text"].encode()}

    card = sent["card_text"]
    data: Any = huggingface_hub.ModelCard(card).data
    assert (data.base_model, data.library_name) == ("user/base", "ternarize")
    _, records = open_packed(packed)
    for row in (
        f"| SHA-256 of the base's trits and scales | {base_digest(records)} |",
        "| steps | 3 |",
        "| of them left out or negated | 1 |",
        "| perturbations that are followed | 3 |",
        "| what they move | trits and scales |",
        f"| size | {len(whole):,} bytes |",
    ):
        assert row in card

    (python,) = re.findall(r"```python\n(.*?)\n```", card, re.S)
    scope: dict[str, Any] = {}
    exec(python, scope)
    (consoles,) = re.findall(r"```console\n(.*?)\n```", card, re.S)
    for line in consoles.splitlines():
        words = line.replace("replayed", str(tmp_path / "replayed")).split()[1:]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.stderr
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = ternarize.load(tmp_path / "replayed")(tokens).logits
        found = scope["model"](tokens).logits
        assert torch.equal(found, expected)
        assert not torch.equal(found, ternarize.load(packed)(tokens).logits)
    assert push(journal, "user/steps", base_model="user/base")["commit"] == sent["commit"]


def test_a_revision_of_a_journal_is_the_one_of_then(
    client: Hub, packed: Path, journal: Path, tmp_path: Path
) -> None:
    first = push(journal, "user/steps", base_model="user/base")
    edit(journal, Edit("mask", 0, 1))
    push(journal, "user/steps", base_model="user/base")
    for where, count in ((f"user/steps@{first['commit']}", 2), ("user/steps", 0)):
        assert replay(where, packed, tmp_path / str(count))["steps"] == count


def test_a_journal_of_a_seed_is_pushed_without_a_base(
    client: Hub, tmp_path: Path, journal: Path
) -> None:
    path = tmp_path / "seed.steps"
    with Appender(path, JournalHeader(1, 1 << 30, (("w", (8, 16), -1),))) as appender:
        appender.append(Step(0, TRITS, 2, 1, 4, (1,), (1,)))
    card = push(path, "user/seed")["card_text"]
    assert "base_model" not in card and "ternarize steps replay user/seed weights" in card
    assert replay("user/seed", None, tmp_path / "w.safetensors")["steps"] == 1
    with pytest.raises(UsageError, match="begins from its seed; expected none"):
        push(path, "user/seed", base_model="user/base")


def test_what_is_wrong_about_a_pushed_journal_is_one_line(
    client: Hub, packed: Path, journal: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--base-model: none, and a journal knows of its base"):
        push(journal, "user/steps", dry_run=True)
    with pytest.raises(UsageError, match="--shim: for a journal of steps"):
        push(journal, "user/steps", base_model="user/base", shim=True, dry_run=True)
    (tmp_path / "other").write_text("text")
    with pytest.raises(FormatError, match="begins with b'text'"):
        push(tmp_path / "other", "user/steps", base_model="user/base")
    assert not client.log
    assert push(journal, "user/steps", base_model="user/base", dry_run=True)["commit"] is None
    assert not client.log
    push(packed, "user/base")
    with pytest.raises(OutputError, match=r"user/base: holds model.safetensors"):
        push(journal, "user/base", base_model="user/base")
    assert "journal.steps" not in client.repos["user/base"].files()
    client.put("user/two", {"a.steps": b"1", "b.steps": b"2"})
    with pytest.raises(OutputError, match=r"user/two: holds a.steps"):
        push(journal, "user/two", base_model="user/base")
    with pytest.raises(CheckpointError, match=r"user/two: holds 2 files \*.steps \(a.steps, b"):
        ternarize.load(packed, steps="user/two")
    with pytest.raises(CheckpointError, match=r"user/base: holds 0 files \*.steps \(none\)"):
        ternarize.load(packed, steps="user/base")
    with pytest.raises(CheckpointError, match="user/absent: the Hub has no such model"):
        ternarize.load(packed, steps="user/absent")


def test_a_card_of_a_journal_that_was_edited_stays(client: Hub, journal: Path) -> None:
    client.put("user/steps", {"README.md": b"# Mine\n"})
    assert push(journal, "user/steps", base_model="user/base")["card"] == "kept"
    files = client.repos["user/steps"].files()
    assert files["README.md"].data == b"# Mine\n" and "journal.steps" in files
