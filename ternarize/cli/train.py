"""`ternarize train`."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ternarize.cli.convert import fastest_device, ranks_of, read_bounds, with_options
from ternarize.cli.options import AsJson, Debug, Device, ModelArgument, Quiet, RecipeName
from ternarize.cli.show import show_calibration, show_totals, show_training
from ternarize.cli.terminal import advise, print_json, progress_bar
from ternarize.errors import UsageError, printable
from ternarize.plans.recipe import BUDGETS, GPTQ, WITHOUT_DATA, Recipe, Train
from ternarize.plans.recipe_files import open_recipe

SHARED = ("seed", "text_column")  # options of a training that a calibration has, too


def train_command(
    model: ModelArgument,
    output: Annotated[Path, "Directory to make; must not exist."],
    *,
    recipe: RecipeName = None,
    min_quality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Fail unless held-out documents give at most this perplexity, perplexity_ratio "
            "or kl_divergence, or at least this top1_agreement or cosine.",
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Log loss, held-out loss and speed to tensorboard, wandb or whatever accelerate "
            "knows; files go into OUTPUT.logs.",
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
    not), then the whole model learns from its source what that says of texts. It ends with the
    first of --tokens, --minutes and --steps that is used up. What is kept is the state with the
    least loss on held-out documents; others give the figures. Interrupted, the same command goes
    on. Those that torchrun starts train together; the first of them writes and prints.

    Example: ternarize train examples/tiny-llama trained --num-samples 8 --steps 3 --train-len 64
    """
    given = {name: value for name, value in options.items() if value is not None and value != []}
    start = Recipe() if recipe is None else open_recipe(recipe)
    chosen = training_recipe(start, given, named=recipe is not None)
    bounds = read_bounds(min_quality or [])
    from ternarize.convert.parts import check_ranks
    from ternarize.convert.run import convert
    from ternarize.convert.scratch import train_from_scratch
    from ternarize.measure.figures import check_bounds
    from ternarize.ranks import ranks_launched
    from ternarize.train.logs import logging_to

    check_bounds(chosen, bounds)
    check_ranks(chosen, ranks_launched())
    scratch = chosen.train is not None and chosen.train.from_scratch
    with ranks_of(chosen) as world:
        if world.rank:
            as_json, quiet, report_to = False, True, None
        where = device or fastest_device(quiet)
        with progress_bar(quiet) as update, logging_to(report_to or [], output) as log:
            record = (train_from_scratch if scratch else convert)(
                model,
                output,
                chosen,
                device=where,
                progress=update,
                log=log,
                min_quality=bounds,
                world=world,
            )
    if world.rank:
        return
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


def training_recipe(start: Recipe, given: dict[str, Any], *, named: bool) -> Recipe:
    """The recipe with the options that are given beside it, those of the training in `train`.

    A budget takes the place of all that the recipe has; a text column is that of --texts, if there
    are any.

    named  the recipe was asked for; else a model is calibrated, if there is anything to calibrate
    """
    own = {each.name: given[each.name] for each in fields(Train) if each.name in given}
    rest = {name: value for name, value in given.items() if name not in own}
    before = {} if start.train is None else dict(vars(start.train))
    if own.keys() & set(BUDGETS):
        before |= dict.fromkeys(BUDGETS)
    if own.get("from_scratch"):
        if "dataset" in rest:
            raise UsageError(
                "--from-scratch",
                "with calibration, which begins with the weights of a source",
                "texts to train on alone",
                "Use --texts in the place of --dataset",
            )
        rest = {"method": "absmean", "group_size": 0, "activations": "int8"} | rest
        own = {"objective": "text", "all_weights": True} | own
    elif "method" not in rest and not named:
        rest["method"] = WITHOUT_DATA if own.get("start") else GPTQ
    if "dataset" in rest or rest.get("method", start.method) == GPTQ:
        rest |= {name: own[name] for name in SHARED if name in own}
        if own.get("texts"):
            rest.pop("text_column", None)
    train = Train(**{**before, **own})
    return replace(with_options(replace(start, train=None), rest, bounded=False), train=train)
