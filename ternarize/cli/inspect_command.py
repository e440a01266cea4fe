"""`ternarize inspect`."""

from pathlib import Path
from typing import Annotated

from ternarize.cli.options import AsJson, Debug, PackedArgument
from ternarize.cli.show import show_calibration, show_tensors, show_totals, show_training
from ternarize.cli.terminal import print_json


def inspect_command(
    model: PackedArgument,
    *,
    plot: Annotated[
        Path | None, "Draw the errors to this image (.png, .svg, .pdf); needs matplotlib."
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a packed checkpoint holds: shape, method, bits, sparsity, error of each tensor.

    Of a calibrated one also the errors of its blocks before and after, and its quality.

    Example: ternarize inspect packed
    """
    from ternarize.measure import report as reports

    report = reports.inspect(model)
    if plot is not None:
        reports.plot(report, plot)
    if as_json:
        print_json(report)
        return
    show_tensors(report)
    show_totals(report)
    show_calibration(report)
    show_training(report)
