"""What is shown before a conversion: its plan."""

import re
import shlex
from typing import Any

from rich.table import Table

from ternarize.cli.terminal import in_bytes, shown, stdout


def show_plan(table: dict[str, Any], with_recipe: bool) -> None:
    """What becomes of each tensor and why, what it takes, and, on demand, by which options."""
    out = stdout()
    out.print(_rows(table["tensors"]))
    coverage = table["coverage"]
    int8 = f"{coverage['int8']:,} int8 + " if coverage["int8"] else ""
    out.print(
        f"\n{coverage['total']:,} parameters = {coverage['ternary']:,} ternary + "
        f"{int8}{coverage['kept']:,} kept + {coverage['tied']:,} tied copies"
    )
    ratio = table["source_bytes"] / max(1, table["packed_bytes"])
    calibrate = table["recipe"]["calibrate"]
    besides = " (calibration takes more)" if calibrate else ""
    source, packed, converting, loading = (
        in_bytes(table[f"{name}_bytes"])
        for name in ("source", "packed", "convert_memory", "load_memory")
    )
    out.print(
        f"{source} -> {packed} ({ratio:.2f} times smaller); memory: about {converting} to "
        f"convert{besides}, {loading} to load"
    )
    if with_recipe:
        out.print(f"recipe: {shown(_options(table['recipe']))}", soft_wrap=True)
    if calibrate:
        out.print(_calibration_in_words(calibrate), soft_wrap=True)
    for name in table["left_out"]:
        out.print(f"left out: {shown(name)}")
    for note in table["notes"]:
        out.print(f"note: {shown(note)}")


def _rows(tensors: list[dict[str, Any]]) -> Table:
    """Tensors in a table, those of a name in all layers in one row."""
    grid = Table("tensors", "count", "shape", "becomes", "why", "stored", box=None)
    rows: dict[tuple[str, ...], list[int]] = {}
    for tensor in tensors:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", tensor["name"])
        shape = " x ".join(str(n) for n in tensor["shape"])
        key = (name, shape, tensor["becomes"], tensor["reason"])
        count = rows.setdefault(key, [0, 0])
        count[0] += 1
        count[1] += tensor["stored_bytes"]
    for (name, shape, becomes, reason), (number, stored) in rows.items():
        grid.add_row(shown(name), str(number), shape, becomes, shown(reason), in_bytes(stored))
    return grid


def _options(recipe: dict[str, Any]) -> str:
    """The options of a recipe as a command line gives them."""
    words = []
    for name, value in (recipe | (recipe["calibrate"] or {})).items():
        if name != "calibrate" and value is not None:
            each = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')} {shlex.quote(str(item))}" for item in each]
    return " ".join(words)


def _calibration_in_words(calibrate: dict[str, Any]) -> str:
    """What the plan of a calibrated conversion has to say beyond sizes."""
    length = f"of {calibrate['seq_len']} tokens"
    if calibrate["seq_len"] is None:
        length = "as long as the model takes, at most 512 tokens"
    parts = [
        f"calibrated on {shown(calibrate['dataset'])}: {calibrate['num_samples']} samples {length}",
        f"inputs rotated in blocks of up to {calibrate['rotation']}"
        if calibrate["rotation"]
        else "inputs not rotated",
    ]
    if calibrate["reconstruct"]:
        parts.append(
            f"{calibrate['reconstruct']} steps of training for each block, "
            f"{calibrate['window']} trained together"
        )
    if calibrate["distill"]:
        parts.append(f"{calibrate['distill']} steps of training for the whole model")
    if calibrate["target_bpw"] is not None:
        parts.append(
            f"group sizes and planes are decided when it is run, for {calibrate['target_bpw']:g} "
            "bits per ternary weight; the sizes above are those of equal groups"
        )
    return "; ".join(parts)
