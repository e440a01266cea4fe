"""Recipes that are written down: under a name, in a file, or in the record of a conversion.

Nothing here needs torch: `ternarize --help` imports it.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ternarize.errors import FormatError, UsageError
from ternarize.files.names import RECORD
from ternarize.plans.recipe import GPTQ, Calibrate, Recipe, Train

Made = TypeVar("Made", Recipe, Calibrate, Train)
# name: (its options, what it costs); the figures are those of benchmarks/results/calibration.md
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "fast": ({"method": "itf"}, "no data"),
    "good": ({"method": GPTQ, "calibrate": {}}, "calibrated, block by block"),
    "best": (
        {"method": GPTQ, "calibrate": {"num_samples": 512}, "train": {"tokens": 1 << 20}},
        "trained after that on a million tokens: the whole model in memory, and much text, which "
        "--dataset names",
    ),
}


def open_recipe(name: str) -> Recipe:
    """A recipe by its name in NAMED, or from a file.

    The file is TOML or JSON, with options under their names and those of calibration in a table
    `calibrate`; or the record of a conversion, ternarize.json.

    Raises UsageError, naming the file and the key, where it cannot be read or used.
    """
    if name in NAMED:
        return _made(Recipe, NAMED[name][0])
    table = _read(name)
    try:
        return _of_table(table)
    except UsageError as error:
        remedy = error.remedy or "Mend the file"
        raise UsageError(f"{name}: {error.where}", error.found, error.expected, remedy) from None


def _read(name: str) -> dict[str, Any]:
    """What a file with a recipe holds: JSON where it begins with a brace, else TOML."""
    import tomllib  # only here, for `ternarize --help`

    from ternarize.files.json_files import MAX_JSON, strict_json

    path = Path(name)
    try:
        if not path.is_file():
            found = "is a directory" if path.is_dir() else "there is no such file"
            known = f"one of {', '.join(NAMED)}, or a file in TOML or JSON, such as {RECORD}"
            raise UsageError(name or "--recipe", found, known, "Check the path")
        if path.stat().st_size > MAX_JSON:
            raise UsageError(name, f"{path.stat().st_size} bytes", f"at most {MAX_JSON}")
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        found = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise UsageError(name, found, "a file in TOML or JSON", "Check the file") from None
    form, parse = ("JSON", strict_json) if text.lstrip()[:1] == "{" else ("TOML", tomllib.loads)
    try:
        table: dict[str, Any] = parse(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(name, f"not valid {form} ({error})", remedy="Mend the file") from None
    return table


def read_recipe(record: dict[str, Any]) -> Recipe:
    """The recipe on record; raises FormatError where it is none."""
    try:
        return _of_table({"recipe": record.get("recipe")})
    except UsageError as error:
        where, found = f"{RECORD}: {error.where}", f"{error.found}: the recipe cannot be used"
        raise FormatError(where, found, error.expected, "Fetch it again") from None


def _of_table(table: dict[str, Any]) -> Recipe:
    """The recipe that a record has, or else a table is."""
    return _made(Recipe, table["recipe"], "recipe") if "recipe" in table else _made(Recipe, table)


def _made(kind: type[Made], table: Any, at: str = "") -> Made:
    """Plain data as a recipe or a part of one; raises UsageError, naming the key.

    at  the key under which the table stands, "" at the top
    """
    if not isinstance(table, dict):
        raise UsageError(at, f"{table!r:.60}", "a table of options")
    known = [each.name for each in fields(kind)]
    inside = f"{at}." * bool(at)
    for name in table:
        if name not in known:
            raise UsageError(f"{inside}{name!r:.60}", "is no option", f"one of {', '.join(known)}")
    parts: dict[str, Any] = {"calibrate": Calibrate, "train": Train}
    for name, part in parts.items():
        if isinstance(table.get(name), dict):
            table = {**table, name: _made(part, table[name], f"{inside}{name}")}
    try:
        return kind(**table)
    except UsageError as error:
        where = inside + error.where.replace(" ", "_")
        raise UsageError(where, error.found, error.expected, error.remedy) from None
