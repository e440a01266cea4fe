"""`ternarize export`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ternarize.cli.options import DTYPE_CHOICES, AsJson, Debug, OneOf, PackedArgument, Quiet
from ternarize.cli.terminal import in_bytes, print_json, progress_bar, shown, stdout
from ternarize.errors import UsageError

TARGET_NAMES = OneOf(["gguf", "dense", "bitnet", "gemma-int2", "mlx", "compressed-tensors"])
_TYPES = {
    "gguf": ("tq2_0", "tq1_0", "q2_0", "q2_k", "q4_0"),
    "compressed-tensors": ("int2", "int4"),
}
# option: the targets that have it
ONLY_FOR = {
    "type": ("gguf", "compressed-tensors"),
    "kept_type": ("gguf",),
    "no_tokenizer": ("gguf",),
    "modelfile": ("gguf",),
    "dtype": ("dense", "mlx", "compressed-tensors"),
}


def export_command(
    model: PackedArgument,
    output: Annotated[Path, "File (gguf) or directory to make."],
    *,
    to: Annotated[str, "Engine or format to export for.", TARGET_NAMES],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="gguf: blocks of ternary weights: tq2_0, tq1_0 and q2_k of 256, q2_0 of 64, q4_0 "
            "of 32; default: tq2_0, or q2_0 where that alone holds what is packed, and q2_k or "
            "q4_0 with --modelfile, since Ollama reads no others. compressed-tensors: int2, which "
            "vLLM runs on CUDA, or int4, on some CPUs too; default: int2.",
        ),
        OneOf([*_TYPES["gguf"], *_TYPES["compressed-tensors"]]),
    ] = None,
    kept_type: Annotated[
        str | None,
        "gguf: type of kept matrices; default: as they are.",
        OneOf(["f16", "bf16", "f32", "q8_0"]),
    ] = None,
    no_tokenizer: Annotated[bool, "gguf: no vocabulary, token numbers alone."] = False,
    modelfile: Annotated[
        bool, "gguf: an Ollama Modelfile beside it, NAME.Modelfile for NAME.gguf."
    ] = False,
    dtype: Annotated[
        str | None,
        "dense, mlx, compressed-tensors: dtype of floats; default: as in the model.",
        DTYPE_CHOICES,
    ] = None,
    allow_requantize: Annotated[
        bool, "Where the target cannot hold what is packed, take the nearest and measure it."
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint for another engine.

    gguf is for llama.cpp; dense, bitnet and gemma-int2 load in transformers without ternarize; mlx
    is the affine layout of MLX, compressed-tensors that of vLLM. What the target cannot carry
    exactly is refused by name.

    Example: ternarize export packed model.gguf --to gguf --type q2_0
    """
    from ternarize.publish.export import export

    given = {
        "type": type_,
        "kept_type": kept_type,
        "no_tokenizer": no_tokenizer or None,
        "modelfile": modelfile or None,
        "dtype": dtype,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if to not in ONLY_FOR[name]:
            raise UsageError(
                f"--{name.replace('_', '-')}",
                f"is for --to {' or '.join(ONLY_FOR[name])}, and this is --to {to}",
                remedy="Leave it out",
            )
    if type_ is not None and type_ not in _TYPES[to]:
        raise UsageError("--type", type_, f"one of {', '.join(_TYPES[to])} with --to {to}")
    if options.pop("no_tokenizer", False):
        options["tokenizer"] = False
    if "type" in options:
        options["kind"] = options.pop("type")
    with progress_bar(quiet) as update:
        result = export(
            model, output, to, allow_requantize=allow_requantize, progress=update, **options
        )
    if as_json:
        print_json({"model": model, **result})
    else:
        _show_export(result)


def _show_export(result: dict[str, Any]) -> None:
    out = stdout()
    exact = "every weight as packed" if result["exact"] else "not exact"
    out.print(
        f"{shown(result['output'])}: {result['tensors']} tensors, {in_bytes(result['bytes'])}, "
        f"{exact}",
        soft_wrap=True,
    )
    for what in result["lost"]:
        out.print(f"lost: {shown(what)}", soft_wrap=True)
    for note in result.get("notes", ()):
        out.print(f"note: {shown(note)}", soft_wrap=True)
    if result["errors"]:
        grid = Table("tensors", "count", "relative error", "worst", box=None)
        for row in result["errors"]:
            worst = f"{row['worst_relative_error']:.3g} {row['worst']}"
            error = f"{row['relative_error']:.3g}"
            grid.add_row(shown(row["tensors"]), str(row["count"]), error, shown(worst))
        out.print(grid)
