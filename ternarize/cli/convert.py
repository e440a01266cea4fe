"""`ternarize convert`."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ternarize.cli.options import AsJson, Debug, Device, ModelArgument, Quiet, RecipeName
from ternarize.cli.show import (
    show_calibration,
    show_check,
    show_hints,
    show_part,
    show_plan,
    show_totals,
    show_training,
)
from ternarize.cli.terminal import advise, err, failed, interrupted, print_json, progress_bar, shown
from ternarize.errors import TernarizeError, UsageError, printable
from ternarize.plans.recipe import GPTQ, Calibrate, Recipe
from ternarize.plans.recipe_files import open_recipe


def convert_command(
    model: ModelArgument,
    output: Annotated[Path, "Directory to make; must not exist."],
    *,
    recipe: RecipeName = None,
    min_quality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Fail unless held-out samples give at most this perplexity, perplexity_ratio or "
            "kl_divergence, or at least this top1_agreement or cosine.",
        ),
    ] = None,
    stream: Annotated[
        bool, "Fetch a Hub model shard by shard, and delete each shard once it is packed."
    ] = False,
    allow_missing: Annotated[
        bool, "Convert a source that lacks weights of its model; loading makes them up."
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|auto",
            help="Convert the I-th of N parts, beside other processes or machines; auto: by the "
            "variables of torchrun or SLURM.",
        ),
    ] = None,
    finish: Annotated[bool, "Put together what all parts have converted."] = False,
    parts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=99_999,
            help="With --dry-run: what each of N processes reads, writes, holds and sends.",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="GB/s",
            help="With --parts: of disks and between machines; says how long it takes.",
        ),
    ] = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors worked on at once.")] = None,
    no_check: Annotated[
        bool, "Do not measure what came of a conversion without data, nor run it."
    ] = False,
    dry_run: Annotated[bool, "Print the plan; write nothing."] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Convert a checkpoint into a packed ternary one.

    Linear weights in the repeated blocks of the model become ternary; the rest is kept, and
    --dry-run says why. With --dataset they are fitted, block by block, to what the model does on
    those texts, and the result is measured on held-out text. Interrupted, the same command goes
    on; OUTPUT appears when all of it is verified.

    Without data, several processes or machines can share the work: each runs the same command with
    its --part, in any order, and then one runs it with --finish. With --dataset, those that
    torchrun starts calibrate together; the first of them writes and prints.

    Without data, a language model or text encoder that fits into memory beside its source is then
    measured against it on a little text, where that takes about a minute; of larger ones the
    command that does it is printed. The figures are printed alone (with --json as "check"), and
    not taken with --no-check or -q.

    Example: ternarize convert examples/tiny-llama packed --method itf

    Example: ternarize convert examples/tiny-llama fitted --dataset default --num-samples 8
    """
    given = {name: value for name, value in options.items() if value is not None and value != []}
    start = Recipe() if recipe is None else open_recipe(recipe)
    chosen = with_options(start, given, bool(min_quality))
    bounds = read_bounds(min_quality or [])
    from ternarize.convert.parts import check_parts, check_ranks
    from ternarize.convert.run import convert as run
    from ternarize.measure.figures import check_bounds
    from ternarize.ranks import ranks_launched
    from ternarize.threads import THREADS

    check_bounds(chosen, bounds)
    chosen_part = None if part is None else part_of_text(part, os.environ)
    check_parts(chosen, chosen_part, finish=finish)
    several = _several(parts, bandwidth, threads or THREADS, dry_run=dry_run, stream=stream)
    if several is not None and chosen.fits:
        check_ranks(chosen, several["count"], "--parts")
    if dry_run:
        named, parted = recipe is not None, chosen_part and (*chosen_part, stream)
        how: dict[str, Any] = {"as_json": as_json, "debug": debug, "named": named}
        _dry_run(model, chosen, allow_missing, parted, several, **how)
        return
    if part is None and not finish:
        check_ranks(chosen, ranks_launched())
    with ranks_of(chosen) as world:
        if world.rank:
            as_json, quiet = False, True
        if chosen.fits:
            device = device or fastest_device(quiet)
        with progress_bar(quiet) as update:
            record = run(
                model,
                output,
                chosen,
                threads=threads or THREADS,
                device=device,
                progress=update,
                min_quality=bounds,
                stream=stream,
                allow_missing=allow_missing,
                part=chosen_part,
                finish=finish,
                world=world,
            )
    if world.rank:
        return
    if chosen_part is not None:
        if as_json:
            print_json({"output": str(output), **record})
        else:
            show_part(record)
        if not (as_json or quiet):
            advise("when all parts have ended, once: the same with --finish in the place of --part")
        return
    wanted = not (quiet or no_check)
    if as_json:
        measured = {"check": _measured(record, model, output, stream)} if wanted else {}
        print_json({"output": str(output), **record, **measured})
        return
    from ternarize.measure.report import inspect as describe

    report = describe(output)
    show_totals(report)
    show_calibration(report)
    show_training(report)
    if not quiet:
        for note in record["notes"]:
            advise(f"note: {printable(note)}")
        found = _measured(record, model, output, stream) if wanted else None
        show_check(found)
        show_hints(model, output, report, found)


@contextmanager
def ranks_of(recipe: Recipe) -> Iterator[Any]:
    """The processes that calibrate or train together; those beside the first end without a word."""
    from ternarize.ranks import World, ranks_of_launcher

    if not recipe.fits:
        yield World()
        return
    rank = 0
    try:
        with ranks_of_launcher() as world:
            rank = world.rank
            yield world
    except (TernarizeError, KeyboardInterrupt) as error:
        if rank:
            raise typer.Exit(1) from error
        raise


def with_options(recipe: Recipe, given: dict[str, Any], bounded: bool) -> Recipe:
    """The recipe with the options that are given beside it.

    Those of calibration go into its calibration; a method without data drops that. `bounded` says
    that figures of a calibration are asked for.
    """
    own = {each.name: given[each.name] for each in fields(Calibrate) if each.name in given}
    method = given.get("method") or (GPTQ if "dataset" in own else recipe.method)
    calibrate = None
    if method == GPTQ:
        calibrate = replace(recipe.calibrate or Calibrate(), **own)
        if own.get("window", 1) > 1 and not calibrate.reconstruct:
            raise UsageError(
                "--window",
                f"{calibrate.window} blocks to train together, without training",
                "--reconstruct STEPS with it",
                "Add it, or leave out --window",
            )
    elif own or bounded:
        _refuse_calibration([*own, "min_quality"][0], given.get("method"))
    others = {name: value for name, value in given.items() if name not in own}
    train = None if "distill" in own else recipe.train  # in the place of a recipe's training
    return replace(recipe, **others | {"method": method, "calibrate": calibrate, "train": train})


def _refuse_calibration(name: str, method: str | None) -> None:
    """Raise UsageError for an option of calibration beside a method that has none."""
    option = "--" + name.replace("_", "-")
    if method is None:
        raise UsageError(
            option,
            "is for calibration, which nothing asks for",
            "--dataset with it",
            "Add --dataset with data that the model reads (texts: default)",
        )
    raise UsageError(
        option,
        f"is for calibration, and --method {method} uses no data",
        "--method gptq with it",
        f"Change the method, or leave out {option}",
    )


def read_bounds(asked: list[str]) -> dict[str, float]:
    """The values of --min-quality: ["kl_divergence=0.2"] -> {"kl_divergence": 0.2}."""
    bounds: dict[str, float] = {}
    for each in asked:
        name, _, text = each.partition("=")
        if name in bounds:
            raise UsageError(
                "--min-quality", f"{name} is given twice", "one bound for it", "Leave one out"
            )
        try:
            bounds[name] = float(text)
        except ValueError:
            raise UsageError(
                "--min-quality",
                f"{each!r}",
                "NAME=VALUE with a number",
                "Write for instance kl_divergence=0.2",
            ) from None
    return bounds


def part_of_text(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """The value of --part: "2/3" -> (2, 3); of "auto", what a launcher has set for this process."""
    if text == "auto":
        return _launched(environment)
    numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if numbers is None:
        raise UsageError(
            "--part", f"{text!r}", "I/N, or auto under torchrun or SLURM", "Write for instance 2/8"
        )
    return int(numbers[1]), int(numbers[2])


def _launched(environment: Mapping[str, str]) -> tuple[int, int]:
    """The part of a process that torchrun or SLURM has started.

    torchrun's word is taken first, since SLURM may have started torchrun; of SLURM that of a step's
    tasks or of an array's jobs, whichever there are several of.
    """

    def number(name: str) -> int | None:
        text = environment.get(name, "")
        return int(text) if re.fullmatch(r"\d{1,9}", text) else None

    rank, count = number("RANK"), number("WORLD_SIZE")
    if rank is not None and count is not None:
        return rank + 1, count
    found = []
    task, tasks = number("SLURM_PROCID"), number("SLURM_NTASKS")
    if task is not None and tasks is not None:
        found.append((task + 1, tasks))
    job, jobs, first, last = (
        number(f"SLURM_ARRAY_TASK_{each}") for each in ("ID", "COUNT", "MIN", "MAX")
    )
    if job is not None and jobs is not None and first is not None and last is not None:
        step = (last - first) // max(1, jobs - 1) or 1
        if last - first != (jobs - 1) * step or (job - first) % step:
            raise UsageError(
                "--part", f"auto, and SLURM_ARRAY_TASK_ID={job}", "even steps", "Say --part I/N"
            )
        found.append(((job - first) // step + 1, jobs))
    several = [each for each in found if each[1] > 1]
    if len(several) > 1:
        said = f"auto, and SLURM has an array of {jobs} jobs with {tasks} tasks each"
        raise UsageError("--part", said, "one of the two", "Say --part I/N")
    if not found:
        raise UsageError(
            "--part",
            "auto, and neither RANK and WORLD_SIZE nor those of SLURM are set",
            "a process that torchrun or SLURM has started",
            "Say --part I/N",
        )
    return (several or found)[0]


def _several(
    parts: int | None, bandwidth: float | None, threads: int, *, dry_run: bool, stream: bool
) -> dict[str, Any] | None:
    """What `forecast` is asked for by --parts and --bandwidth."""
    if parts is None and bandwidth is None:
        return None
    option = "--bandwidth" if parts is None else "--parts"
    if parts is None:
        raise UsageError(option, f"{bandwidth}, alone", "--parts N with it", "Add --parts")
    if not dry_run:
        remedy = "Add --dry-run; to convert, use --part I/N"
        raise UsageError(option, f"{parts}, to be carried out", "--dry-run with it", remedy)
    if bandwidth is not None and not 0 < bandwidth < 1e6:
        found = f"{bandwidth}"
        raise UsageError("--bandwidth", found, "GB/s, above 0 and below 1000000", "Change it")
    speed = None if bandwidth is None else 1e9 * bandwidth
    return {"count": parts, "bandwidth": speed, "threads": threads, "cut": not stream}


def _dry_run(
    model: str,
    recipe: Recipe,
    allow_missing: bool,
    parted: tuple[int, int, bool] | None,
    several: dict[str, Any] | None,
    *,
    as_json: bool,
    debug: bool,
    named: bool,
) -> None:
    """Print the plan, with the options of a `named` recipe; then, if it would be refused, why.

    parted   of a part: I, N, and whether its source is streamed
    several  of a forecast: what it is asked for
    """
    from ternarize.convert.forecast import forecast
    from ternarize.convert.run import checked
    from ternarize.plans.parts import part_table
    from ternarize.plans.plan import make_plan

    plan = make_plan(model, recipe, config_only=True)
    refused: TernarizeError | None = None
    try:
        plan = checked(plan, allow_missing)
    except TernarizeError as error:  # of which the plan tells the reasons
        refused = error
    table = plan.to_dict()
    if recipe.codec != "base3":
        table["notes"] = [
            *table["notes"],
            "sizes are those in base 3; --codec rans makes them less",
        ]
    if parted is not None:
        index, count, streamed = parted
        table["part"] = part_table(plan, (index, count), cut=not streamed)
    if several is not None and refused is None:
        table["forecast"] = forecast(plan, **several)
    if refused and as_json and not debug:
        raise failed(refused, as_json, **table)
    if as_json:
        print_json(table)
    else:
        show_plan(table, with_recipe=named)
    if refused:
        raise refused


def _measured(
    record: dict[str, Any], model: str, output: Path, streamed: bool
) -> dict[str, Any] | None:
    """What `convert.check` finds where weights were rounded without data; else None."""
    rows = record.get("tensors", {}).values()
    methods = {row["method"] for row in rows if row["becomes"] == "ternary"}
    if {"calibration", "training"} & record.keys() or not methods - {"lossless"}:
        return None
    from ternarize.convert.check import check_conversion

    try:
        with progress_bar(quiet=False) as update:
            return check_conversion(output, model, streamed=streamed, progress=update)
    except KeyboardInterrupt as stop:  # of what is no part of the conversion
        raise interrupted(stop, f" while measuring; {shown(output)} is complete") from None


def fastest_device(quiet: bool) -> str:
    """Where to calibrate when nothing is asked for: on a GPU if there is one."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if not quiet:
        name = torch.cuda.get_device_name()
        err.print(f"calibrating on cuda ({name}); --device cpu for the processor", highlight=False)
    return "cuda"
