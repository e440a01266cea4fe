"""`ternarize serve`: OpenAI's own client gets from it, on loopback, what `generate` writes."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_cli import run
from transformers.utils.import_utils import is_serve_available

import ternarize
from ternarize.cli import serve
from ternarize.cli.serve import serve_command
from ternarize.convert.run import convert
from ternarize.errors import TernarizeError, UsageError
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.runtime.generate import generate

openai: Any = importlib.import_module("openai")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
PROMPT, LENGTH = "The function returns", 24


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("serve") / "packed"
    convert(EXAMPLE, output, Recipe("itf"))
    template = "{% for each in messages %}{{ each.content }}{% endfor %}"
    (output / "chat_template.jinja").write_text(template)
    return output


VLLM = find_spec("vllm") is not None
HERE = {"transformers": is_serve_available() and find_spec("accelerate"), "vllm": VLLM}
SERVERS = [
    pytest.param(name, marks=pytest.mark.skipif(not here, reason=f"{name} cannot serve here"))
    for name, here in HERE.items()
]


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a server in a process of its own, started where other code has its names."""
    place = tmp_path_factory.mktemp("place")
    for name in ("uvicorn", "ternarize"):
        (place / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = ["serve", str(packed), "--port", str(port), "--dtype", "float32"]
    given += ["--engine", "transformers"] if VLLM and request.param != "vllm" else []
    said = (place / "said").open("w")
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ternarize")), *given],
        stdout=subprocess.DEVNULL,
        stderr=said,
        cwd=place,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(1200 if request.param == "vllm" else 240):  # vLLM compiles the model first
            assert process.poll() is None, (place / "said").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail((place / "said").read_text()[-2000:])
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        said.close()


def written(packed: Path, prompt: Any) -> str:
    model = ternarize.load(packed, dtype="float32")
    return generate(model, open_tokenizer(packed), prompt, max_new_tokens=LENGTH).text


def client(server: str) -> Any:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_gets_what_generate_writes(server: str, packed: Path, streamed: bool) -> None:
    found = client(server).completions.create(
        model=str(packed), prompt=PROMPT, max_tokens=LENGTH, temperature=0, stream=streamed
    )
    parts = found if streamed else [found]
    assert "".join(part.choices[0].text for part in parts if part.choices) == written(
        packed, PROMPT
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_goes_through_the_template(server: str, packed: Path, streamed: bool) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    found = client(server).chat.completions.create(
        model=str(packed), messages=messages, max_tokens=LENGTH, temperature=0, stream=streamed
    )
    expected = written(packed, messages)
    if streamed:
        pieces = [part.choices[0].delta.content or "" for part in found if part.choices]
        assert len(pieces) > 3 and "".join(pieces) == expected
    else:
        assert found.choices[0].message.content == expected


def test_what_cannot_be_served_is_one_line(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("serve", EXAMPLE)
    assert found.exit_code == 1 and found.stderr.count("\n") == 1
    with pytest.raises(UsageError, match="--port: 0; expected 1 to 65535"):
        serve_command(str(packed), port=0)
    with pytest.raises(UsageError, match="--device: cpu; expected none with vLLM"):
        serve_command(str(packed), engine="vllm", device="cpu")
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(TernarizeError, match="vLLM is not installed. Run: pip install vllm"):
        serve_command(str(packed), engine="vllm")
    with pytest.raises(TernarizeError, match=r"pip install \"ternarize\[serve\]\""):
        serve_command(str(packed))  # accelerate is not there, either
    monkeypatch.setattr(serve, "find_spec", lambda name: name != "vllm")
    used: Any = importlib.import_module("transformers.utils.import_utils")
    monkeypatch.setattr(used, "is_serve_available", lambda: False)
    with pytest.raises(TernarizeError, match=r"pip install \"ternarize\[serve\]\""):
        serve_command(str(packed))
