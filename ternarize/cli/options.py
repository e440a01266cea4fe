"""The options of commands: those that several have, and those that are made from the recipe."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import StrEnum
from types import NoneType
from typing import Annotated, Any, get_args

import typer

from ternarize.plans.recipe import ACTIVATIONS, KEPT_DTYPES, Calibrate, Recipe, Train
from ternarize.plans.recipe_files import NAMED


class OneOf(tuple[str, ...]):
    """In an annotation: what a text may be."""


DTYPE_CHOICES = OneOf(KEPT_DTYPES)
ModelArgument = Annotated[str, "Checkpoint directory, or Hub id user/name@revision."]
PackedArgument = Annotated[str, "Packed checkpoint: directory, or Hub id user/name@revision."]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no hints.")]
Debug = Annotated[bool, "Show the traceback of an error, and what other libraries warn of."]
Device = Annotated[str | None, "Where to run, e.g. cpu or cuda."]
RunDtype = Annotated[str | None, "Dtype to compute in.", DTYPE_CHOICES]
RunActivations = Annotated[
    str | None, "Activations; default: as recorded in the checkpoint.", OneOf(ACTIVATIONS)
]
RunHead = Annotated[
    str | None,
    "Round an output head that was kept; default: as in the checkpoint.",
    OneOf(["int8"]),
]
RunSteps = Annotated[
    str | None, "Journal of steps of this checkpoint, to be applied: file or Hub id."
]
Temperature = Annotated[float, "0: always the likeliest token."]
TopK = Annotated[int | None, "Sample from the k likeliest."]
TopP = Annotated[float | None, "Sample from probability p."]
SamplingSeed = Annotated[int | None, "Of the sampling."]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Options from a file (TOML, JSON or a ternarize.json), or by name: "
        + ", ".join(f"{name} ({cost})" for name, (_, cost) in NAMED.items())
        + ". Those given beside it win.",
    ),
]


def recipe_parameters(*, training: bool) -> Iterator[inspect.Parameter]:
    """The options of a recipe and of its parts, as a command has them; None: not given.

    training  those of a training, too, which come first; what --distill does, it does itself, and
              what it shares with a calibration is one option

    What is not about ternary weights comes last of a recipe's own.
    """
    own = sorted(fields(Recipe), key=lambda each: each.name in ("dtype", "activations"))
    first = fields(Train) if training else ()
    names = {"distill", "fold"} if training else set[str]()
    for each in [*first, *own, *fields(Calibrate)]:
        if each.name in names or not each.metadata:
            continue  # seen, or a part itself
        names.add(each.name)
        kinds, allowed = get_args(each.type) or (each.type,), each.metadata["allowed"]
        kind: Any = list[str] if ... in kinds else kinds[0]
        names_given = [each.metadata["name"]] if each.metadata["name"] else []
        about = typer.Option(
            *names_given, help=each.metadata["help"], metavar=each.metadata["metavar"]
        )
        marks = [OneOf(allowed)] if kind is str and allowed else []
        annotation = Annotated[kind | None, about, *marks]
        yield inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )


def for_typer(function: Callable[..., None], run: Callable[..., None]) -> Callable[..., None]:
    """`run`, which calls a command's function, with the parameters that typer is to read.

    They are the function's own, and in the place of **options those of a recipe, before all others
    that are given by name. Annotated[type, "help"] is enough for each: what is given by place is an
    argument, by name an option, which is a switch if it is of type bool; and OneOf says what a text
    may be.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        by_place = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        by_name = parameters[len(by_place) - 1 : -1]
        training = "report_to" in [each.name for each in by_name]
        parameters = [*by_place[:-1], *recipe_parameters(training=training), *by_name]
    parameters = [each.replace(annotation=_annotation(each)) for each in parameters]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _annotation(parameter: inspect.Parameter) -> Any:
    """What typer is to read of a parameter, for which it has no words of its own."""
    kind, about, *marks = get_args(parameter.annotation)
    if isinstance(about, str):
        name = parameter.name.replace("_", "-")
        names = [f"--{name}"] if kind is bool else []  # without a --no- of it
        by_name = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        about = typer.Option(*names, help=about) if by_name else typer.Argument(help=about)
    for values in marks:
        members = {each: each for each in values}
        choice: Any = StrEnum(parameter.name, members)  # type: ignore[misc]
        kind = choice | None if NoneType in get_args(kind) else choice
    return Annotated[kind, about]


def as_given(value: Any) -> Any:
    """A value that typer read, as a command gets it: a text for a member of an Enum."""
    return value.value if isinstance(value, StrEnum) else value
