"""What is shown of a packed checkpoint: its tensors, sizes, calibration and measures."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ternarize.cli.terminal import in_bytes, in_figures, shown, stdout

SHOWN_BLOCKS = 8  # rows of a table that fits a terminal beside the rest


def show_tensors(report: dict[str, Any]) -> None:
    """A row for each tensor of a report of `ternarize.measure.report.inspect`."""
    grid = Table("tensor", "shape", "method", "group", "bpw", "sparsity", "rel. error", box=None)
    for row in report["tensors"]:
        shape = " x ".join(str(n) for n in row["shape"])
        if row["kind"] == "kept":
            why = f"kept: {row['reason']}" if row["reason"] else "kept"
            bits = row["stored_bytes"] * 8 / max(1, row["parameters"])
            grid.add_row(shown(row["name"]), shape, shown(why), "", f"{bits:g}", "", "")
            continue
        error = row["relative_error"]
        grid.add_row(
            shown(row["name"]),
            shape,
            shown(row["method"] or "?")
            + (f", {row['planes']} planes" if row["planes"] > 1 else "")
            + (f", rotated by {row['rotation']}" if row["rotation"] else ""),
            str(row["group_size"]),
            f"{row['bpw']:.3f}",
            f"{row['sparsity']:.3f}",
            "?" if error is None else f"{error:.4f}",
        )
    stdout().print(grid)


def show_totals(report: dict[str, Any]) -> None:
    """A line of what has become of all weights, and one of sizes."""
    t = report["totals"]
    parts = [
        f"{t['ternary_parameters']:,} of {t['parameters']:,} parameters ternary",
        f"{t['ternary_bpw']:.3f} bits per weight" if t["ternary_bpw"] else "",
        f"{t['sparsity']:.1%} zeros" if t["sparsity"] is not None else "",
        f"relative error {t['relative_error']:.4f}" if t["relative_error"] is not None else "",
    ]
    print(", ".join(part for part in parts if part))
    size = in_bytes(t["file_bytes"])
    if t["source_bytes"]:
        size = f"{in_bytes(t['source_bytes'])} -> {size}, {t['ratio']:.2f} times smaller"
    print(size)


def show_calibration(report: dict[str, Any]) -> None:
    """What a calibrated conversion measured, if the report is of one."""
    found = report["calibration"]
    if found is None:
        return
    out, data, blocks = stdout(), found["data"], found["blocks"]
    out.print("\n" + shown(_what_was_read(data)), highlight=False, soft_wrap=True)
    for note in data.get("notes") or ():
        out.print(f"note: {shown(note)}", soft_wrap=True)
    if len(found["forms"]) > 1:
        forms = ", ".join(f"{count} in {shown(form)}" for form, count in found["forms"].items())
        out.print(f"ternary tensors: {forms}", soft_wrap=True)
    few = {name: n for block in blocks for name, n in block["uncalibrated"].items()}
    if few:
        some = ", ".join(f"{shown(n)} ({tokens} tokens)" for n, tokens in list(few.items())[:3])
        out.print(
            f"{len(few)} matrices saw too few tokens and were ternarized without data: {some}"
            + (", ..." if len(few) > 3 else ""),
            soft_wrap=True,
        )
    else:
        out.print("no matrix was left uncalibrated: all saw enough tokens")
    grid = Table("relative error of outputs", "before", "after", box=None)
    for label, block in chosen_blocks(blocks):
        grid.add_row(shown(label), f"{block['before']:.4f}", f"{block['after']:.4f}")
    out.print(grid)
    if found["quality"]:
        show_measures(found["quality"])


def _what_was_read(data: dict[str, Any]) -> str:
    begin = data.get("windows_begin_with")
    read = f"{data.get('samples')} samples"
    if isinstance(begin, list) and begin:
        read += f" that begin with {' '.join(map(str, begin))}"
    if data.get("tokens"):
        read += f", {data['tokens']} tokens"
    return (
        f"calibrated on {data.get('dataset')}: {read}; {data.get('heldout_samples')} more to "
        f"choose by, {data.get('report_samples')} to report on"
    )


def chosen_blocks(blocks: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, block) of all blocks, or of the first, the worst and the last of many."""
    if len(blocks) <= SHOWN_BLOCKS:
        return [(block["block"], block) for block in blocks]
    worst = max(range(len(blocks)), key=lambda at: blocks[at]["after"])
    roles: dict[int, list[str]] = {}
    for role, at in (("first", 0), ("worst", worst), ("last", len(blocks) - 1)):
        roles.setdefault(at, []).append(role)
    return [
        (f"{blocks[at]['block']} ({' and '.join(words)} of {len(blocks)})", blocks[at])
        for at, words in sorted(roles.items())
    ]


def is_measure(value: Any) -> bool:
    """Whether a part of an evaluation is a figure with its standard error."""
    return isinstance(value, dict) and "value" in value


def show_measures(measures: Mapping[str, dict[str, Any]], spaced: bool = True) -> None:
    """A table of measures: {name: {"value", "standard_error"}}; `spaced`: without underscores."""
    grid = Table("measure", "value", "standard error", box=None)
    for name, measure in measures.items():
        value, error = measure["value"], measure["standard_error"]
        grid.add_row(
            shown(name.replace("_", " ") if spaced else name),
            "?" if value is None else _in_table(value),
            "" if error is None else _in_table(error),
        )
    stdout().print(grid)


def _in_table(value: float) -> str:
    return f"{value:.4f}" if value < 1e5 else in_figures(value)


def windows_in_words(found: dict[str, Any]) -> str:
    """What was read to measure: "8 windows that begin with <bos>", "80 lines"."""
    number = f"{found['windows']} windows" if "windows" in found else f"{found['lines']} lines"
    begin = " ".join(found.get("windows_begin_with", ()))
    return number + (f" that begin with {begin}" if begin else "")
