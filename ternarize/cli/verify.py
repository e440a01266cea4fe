"""`ternarize verify`."""

from typing import Annotated

from ternarize.cli.options import AsJson, Debug, PackedArgument, Quiet
from ternarize.cli.terminal import in_bytes, print_json, progress_bar


def verify_command(
    model: PackedArgument,
    *,
    source: Annotated[str | None, "Compare every tensor with what this source gives."] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every byte of a packed checkpoint; with --source, that it is what the source gives.

    The source is converted again. Weights that were calibrated are compared by their error on
    record, since the data is not needed for that.

    Example: ternarize verify packed --source examples/tiny-llama
    """
    from ternarize.convert.verify import verify

    with progress_bar(quiet) as update:
        result = verify(model, source, progress=update)
    if as_json:
        print_json({"model": model, **result})
        return
    same = _comparison(source, result["compared"]) if source else ""
    ends = "".join(f", {result[codec]} {codec}" for codec in ("int8", "int4") if result[codec])
    listed = f", SHA256SUMS too ({result['listed']} files)" if result["listed"] is not None else ""
    print(
        f"ok: {result['ternary']} ternary{ends} and {result['kept']} kept tensors "
        f"in {result['files']} files, {in_bytes(result['bytes'])}, digests match{listed}{same}"
    )


def _comparison(source: str, compared: dict[str, int]) -> str:
    """How tensors were compared with the source, in words."""
    if not compared["by_error"] and not compared["in_shape"]:
        return f", all equal to what {source} gives"
    words = (
        f"\nagainst {source}: {compared['converted_again']} equal to what it gives; "
        f"{compared['by_error']} calibrated, with the error on record"
    )
    if compared["in_shape"]:
        words += f"; {compared['in_shape']} fitted by calibration, of which only shapes compare"
    return words
