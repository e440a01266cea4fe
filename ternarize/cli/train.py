"""`ternarize train`."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ternarize.cli.convert import fastest_device, with_options
from ternarize.cli.options import AsJson, Debug, Device, ModelArgument, Quiet, RecipeName
from ternarize.cli.show import show_calibration, show_totals, show_training
from ternarize.cli.terminal import advise, print_json, progress_bar
from ternarize.errors import UsageError, printable
from ternarize.plans.recipe import GPTQ, WITHOUT_DATA, Recipe, Train, open_recipe


def train_command(
    model: ModelArgument,
    output: Annotated[Path, "Directory to make; must not exist."],
    *,
    recipe: RecipeName = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Log loss, held-out loss and speed to tensorboard, wandb or whatever accelerate "
            "knows, below OUTPUT's folder.",
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a model to be a ternary one, and pack it.

    Weights are calibrated first, as by `ternarize convert --dataset` (with --method itf they are
    not), then the whole model learns from its source what that says of texts. What is kept
    is the state with the least loss on documents put aside. Interrupted, the same command goes on.

    Example: ternarize train examples/tiny-llama trained --dataset default --num-samples 8 --steps 9
    """
    given = {name: value for name, value in options.items() if value is not None and value != []}
    own = {each.name: given.pop(each.name) for each in fields(Train) if each.name in given}
    start = Recipe() if recipe is None else open_recipe(recipe)
    from_scratch = bool(own.get("from_scratch"))
    if from_scratch:
        given = {"method": "absmean", "group_size": 0, "activations": "int8"} | given
        own = {"objective": "text", "all_weights": True} | own
    elif "method" not in given and recipe is None:
        given["method"] = WITHOUT_DATA if own.get("start") else GPTQ
    chosen = with_options(start, given, bounded=False)
    if chosen.train is None or own:
        before = vars(chosen.train) if chosen.train is not None else {}
        chosen = replace(chosen, train=Train(**{**before, **own}))
    if from_scratch and chosen.calibrate is not None:
        raise UsageError(
            "--from-scratch",
            "with calibration, for which there is nothing yet",
            "texts to train on alone",
            "Use --texts in the place of --dataset",
        )
    from ternarize.train.logs import logging_to

    with progress_bar(quiet) as update, logging_to(report_to or [], output) as log:
        if from_scratch:
            from ternarize.convert.scratch import train_from_scratch as run
        else:
            from ternarize.convert.run import convert as run
        where = device or fastest_device(quiet)
        record = run(model, output, chosen, device=where, progress=update, log=log)
    if as_json:
        print_json({"output": str(output), **record})
        return
    from ternarize.measure.report import inspect as describe

    report = describe(output)
    show_totals(report)
    show_calibration(report)
    show_training(report)
    if not quiet:
        for note in record["notes"]:
            advise(f"note: {printable(note)}")
