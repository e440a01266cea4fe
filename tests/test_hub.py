"""Models go to the Hub and come back: the real clients against a Hub on loopback (hub.py)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hub import READ, WRITE, Fault, Hub
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ternarize
from ternarize import card, evaluate, fetch
from ternarize import hub as publishing
from ternarize.checkpoint import locate, open_checkpoint
from ternarize.cli import app
from ternarize.convert import convert
from ternarize.errors import (
    CheckpointError,
    DigestError,
    OutputError,
    TernarizeError,
    UsageError,
)
from ternarize.hub import push
from ternarize.plan import Calibrate, Recipe
from ternarize.verify import verify

# of the client's HTTP library, against the client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

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


TERNARIZE = [sys.executable, "-m", "ternarize.cli"]
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
    hub: Hub, packed: Path, tmp_path: Path
) -> None:
    here, there = environment(hub, tmp_path / "here"), environment(hub, tmp_path / "there")
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    words = ["push", str(packed), "user/tiny", "--base-model", "user/source", "--shim", "-q"]
    url = run([*TERNARIZE, *words], here).strip()
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
    ternarize.load("user/by-hf").push_to_hub("user/by-transformers")
    assert verify("user/by-transformers")["ternary"] == 14


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


def test_weights_that_are_not_the_models_are_not_sent(client: Hub, packed: Path) -> None:
    (packed / "pytorch_model.bin").write_bytes(b"old")
    with pytest.raises(OutputError, match="is no part of the packed checkpoint"):
        push(packed, "user/tiny")
    assert client.log == []
    (packed / "pytorch_model.bin").rename(packed / ".pytorch_model.bin")
    assert ".pytorch_model.bin" not in push(packed, "user/tiny", dry_run=True)["files"]


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
        },
    )
    result = push(packed, "user/tiny")
    files = client.repos["user/tiny"].files()
    assert len(result["removed"]) == 4 and files.keys().isdisjoint(result["removed"])
    assert {"adapter_model.safetensors", "notes.txt", "model.safetensors"} <= files.keys()


def test_a_branch_and_a_pull_request(client: Hub, packed: Path) -> None:
    client.create("user/tiny")
    result = push(packed, "user/tiny", create_pr=True)
    repo = client.repos["user/tiny"]
    assert result["pull_request"].endswith("/discussions/1")
    assert "model.safetensors" in repo.files("refs/pr/1")
    assert "model.safetensors" not in repo.files()
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


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_push(client: Hub, packed: Path) -> None:
    client.faults = [Fault("POST", "/commit/", "cut after")]
    with pytest.raises(OutputError, match="The same command goes on"):
        push(packed, "user/tiny")
    repo = client.repos["user/tiny"]
    assert len(repo.commits) == 2
    assert push(packed, "user/tiny")["commit"] == repo.refs["main"]
    assert len(repo.commits) == 2
