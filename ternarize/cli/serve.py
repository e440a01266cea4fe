"""`ternarize serve`."""

import os
import sys
from typing import Annotated

from ternarize.cli.options import Debug, Device, PackedArgument, RunDtype
from ternarize.errors import TernarizeError, UsageError

# The server is transformers' own program, in which a packed checkpoint loads once we are imported.
_PROGRAM = "import ternarize; from transformers.cli.transformers import main; main()"


def serve_command(
    model: PackedArgument,
    *,
    host: Annotated[str, "Address to listen on."] = "localhost",
    port: Annotated[int, "Port to listen on."] = 8000,
    device: Device = None,
    dtype: RunDtype = None,
    debug: Debug = False,
) -> None:
    """Serve a packed model by the OpenAI API, with the server of transformers.

    It takes the place of this process: `transformers serve`, with packed checkpoints. Needs the
    extra serve of ternarize. For many users at once, export the model to compressed-tensors and let
    vLLM serve it.

    Example: ternarize serve packed --port 8000
    """
    from transformers.utils.import_utils import is_serve_available

    from ternarize.sources.checkpoint import locate
    from ternarize.sources.packed import open_packed

    directory = locate(model)
    open_packed(directory)
    if not 0 < port < 1 << 16:
        raise UsageError("--port", f"{port}", "1 to 65535")
    if not is_serve_available():
        raise TernarizeError(
            "serve",
            "what transformers serves with is not installed",
            remedy='Run: pip install "ternarize[serve]"',
        )
    arguments = ["serve", str(directory), "--host", host, "--port", str(port)]
    arguments += ["--device", device or "cpu", *(["--dtype", dtype] if dtype else [])]
    # -P: nothing is imported from where it is started
    os.execv(sys.executable, [sys.executable, "-P", "-c", _PROGRAM, *arguments])
