"""What the files of an engine hold, for a conversion that is made for it (`convert --for`).

llama.cpp gives each block of 256 weights of a row (TQ1_0, TQ2_0) or of 64 (Q2_0) one scale. A
matrix fits into blocks that divide its columns and that its groups are multiples of; the blocks of
256 take fewer bits and are multiplied faster, so that they are taken where all matrices allow it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError, SelectionError, UsageError, some
from ternarize.files.llama_cpp import EXPORTED, DeltaNet, departures
from ternarize.models.configuration import config_from, usable
from ternarize.plans.layout import TensorPlan
from ternarize.plans.recipe import Recipe
from ternarize.plans.rules import Choice

NARROW, WIDE = 64, 256  # weights of a block


def check_engine(where: str | Path, config: Mapping[str, Any] | None, recipe: Recipe) -> None:
    """Raise UsageError for an option whose result no file of the engine can hold, CheckpointError
    for an architecture, or a configuration of one, of which none can be written."""
    engine, calibrate = recipe.engine, recipe.calibrate
    group, planes = recipe.group_size or 0, ", ".join(recipe.planes)
    bad: dict[str, tuple[Any, str]] = {}
    if planes:
        bad["--planes"] = planes, "one plane"
    if group > 0 and group % NARROW:
        bad["--group-size"] = group, f"a multiple of {NARROW}, -1 or 0"
    if calibrate is not None and calibrate.rotation:
        bad["--rotation"] = calibrate.rotation, "0, or --fold, which leaves nothing for run time"
    if calibrate is not None and calibrate.target_bpw is not None:
        bad["--target-bpw"] = calibrate.target_bpw, "groups of one size, and one plane"
    for option, (said, expected) in bad.items():
        found = f"{said}, and files of {engine} cannot hold what it makes (--for)"
        raise UsageError(option, found, expected, f"Leave out --for or {option}")
    table = config or {}
    names = table.get("architectures") or ["none"]
    remedy = "Leave out --for, export to dense, and use the engine's own converter"
    if names[0] not in EXPORTED:
        found = f"architecture {names[0]}, of which no file of {engine} is written (--for)"
        raise CheckpointError(where, found, f"one of {', '.join(EXPORTED)}", remedy)
    with usable(Path(where) / "config.json"):
        parsed = config_from(table)
        unknown = departures(parsed)
    if unknown:
        found = f"{', '.join(unknown)}, which no file of {engine} says (--for)"
        raise CheckpointError(where, found, f"a plain {names[0]}", remedy)
    if EXPORTED[names[0]].linear:
        heads = DeltaNet.of(parsed.get_text_config().to_dict())
        if heads.keys != heads.values and heads.dim % NARROW:
            found = f"heads of {heads.dim} values, which no block of {engine} leaves whole (--for)"
            raise CheckpointError(where, found, f"a multiple of {NARROW}", remedy)


def group_for(choices: Iterable[Choice], config: Mapping[str, Any] | None) -> int:
    """The group size of ordinary weights: the largest block that the columns of all allow, and
    that leaves heads whole which files have in another order."""
    table = config or {}
    architecture = EXPORTED[table["architectures"][0]]
    ternary = [each for each in choices if each.ternary and not architecture.leaves_out(each.name)]
    widths = [each.shape[-2 if each.transposed else -1] for each in ternary]
    if architecture.linear:
        heads = DeltaNet.of(config_from(table).get_text_config().to_dict())
        widths += [heads.dim] if heads.keys != heads.values else []
    return WIDE if all(width % WIDE == 0 for width in widths) else NARROW


def check_held(
    tensors: Iterable[TensorPlan], config: Mapping[str, Any] | None, recipe: Recipe
) -> None:
    """Raise SelectionError where the engine's blocks do not hold what tensors are to become."""
    absent = EXPORTED[(config or {})["architectures"][0]].leaves_out
    ternary = [t for t in tensors if t.ternary and not t.tied_to and not absent(t.name)]
    narrow = [t.name for t in ternary if t.shape[-1] % NARROW]
    if narrow:
        cols = next(t.shape[-1] for t in ternary if t.name == narrow[0])
        raise SelectionError(
            some(narrow),
            f"{cols} columns, which blocks of {recipe.engine} do not divide (--for)",
            f"a multiple of {NARROW}",
            "Leave them in floating point with --keep",
        )
    for tensor in ternary:
        if tensor.planes > 1 or tensor.rotation[0] or max(0, tensor.group_size) % NARROW:
            raise SelectionError(
                tensor.name,
                f"would be {tensor.form}, which blocks of {recipe.engine} cannot hold (--for)",
                f"one plane in groups of a multiple of {NARROW}, not rotated",
                "Leave it in floating point with --keep, or leave out --for",
            )
