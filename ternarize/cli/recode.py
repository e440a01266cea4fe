"""`ternarize recode`."""

from pathlib import Path
from typing import Annotated

from ternarize.cli.options import AsJson, Debug, OneOf, PackedArgument, Quiet
from ternarize.cli.terminal import in_bytes, print_json, progress_bar, shown, stdout


def recode_command(
    model: PackedArgument,
    output: Annotated[Path, "Directory to make; must not exist."],
    *,
    codec: Annotated[
        str,
        "rans: ternary tensors by the frequencies of their bytes; base3: five trits in a byte.",
        OneOf(("rans", "base3")),
    ] = "rans",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Store the tensors of a packed checkpoint in fewer bits, or as they were before.

    Trits, scales and digests stay; the source is not needed. Both checkpoints are verified.

    Example: ternarize recode packed smaller
    """
    from ternarize.publish.recode import recode

    with progress_bar(quiet) as update:
        result = recode(model, output, codec, progress=update)
    if as_json:
        print_json({"model": model, **result})
        return
    stdout().print(
        f"{shown(result['output'])}: {in_bytes(result['bytes_before'])} -> "
        f"{in_bytes(result['bytes'])}, {result['bpw_before']:.3f} -> {result['ternary_bpw']:.3f} "
        "bits per ternary weight, verified",
        soft_wrap=True,
    )
