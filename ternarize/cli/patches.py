"""`ternarize diff` and `ternarize apply`."""

from pathlib import Path
from typing import Annotated

from ternarize.cli.options import AsJson, Debug, PackedArgument, Quiet
from ternarize.cli.terminal import in_bytes, print_json, progress_bar, shown, stdout


def diff_command(
    base: PackedArgument,
    model: Annotated[str, "The packed checkpoint to be made of it: directory or Hub id."],
    patch: Annotated[Path, "File to make."],
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what differs between two packed checkpoints of one layout to a small file.

    `ternarize apply` makes of the base and the file the second checkpoint again, byte for byte.
    Both are verified first, and never changed.

    Example: ternarize diff fitted trained trained.patch
    """
    from ternarize.publish.patches import diff_packed

    with progress_bar(quiet) as update:
        result = diff_packed(base, model, patch, progress=update)
    if as_json:
        print_json({"base": base, "model": model, **result})
        return
    total = result["tensors"] + result["unchanged"]
    differ = f"{result['tensors']} of {total} tensors differ"
    stdout().print(
        f"{shown(result['patch'])}: {differ}, {in_bytes(result['bytes'])} for "
        f"{in_bytes(result['result_bytes'])}, {result['bits_per_weight']:.4f} bits per weight",
        soft_wrap=True,
    )


def apply_command(
    base: PackedArgument,
    patch: Annotated[Path, "File that `ternarize diff` has made."],
    output: Annotated[Path, "Directory to make."],
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make of a packed checkpoint and a patch the checkpoint that the patch was made of.

    Every file comes out with the bytes that it had, and the result is verified. Another base is
    refused by the name of a tensor that it has otherwise.

    Example: ternarize apply fitted trained.patch trained-again
    """
    from ternarize.publish.patches import apply_patch

    with progress_bar(quiet) as update:
        result = apply_patch(base, patch, output, progress=update)
    if as_json:
        print_json({"base": base, "patch": str(patch), **result})
        return
    count = sum(result[kind] for kind in ("ternary", "int8", "int4", "kept"))
    stdout().print(
        f"{shown(result['output'])}: {result['changed']} of {count} tensors changed, "
        f"{in_bytes(result['bytes'])}, verified",
        soft_wrap=True,
    )
