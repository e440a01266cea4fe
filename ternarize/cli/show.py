"""What is shown: a plan, a packed checkpoint, what came of a conversion, what to do next."""

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from ternarize.cli.terminal import advise, err, in_bytes, in_figures, shown, stdout
from ternarize.errors import printable

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
    """A line of what has become of all weights, one of sizes, and one of the whole model."""
    t = report["totals"]
    parts = [
        f"{t['ternary_parameters']:,} of {t['parameters']:,} parameters ternary",
        *(f"{t[f'{c}_parameters']:,} {c}" for c in ("int8", "int4") if t[f"{c}_parameters"]),
        f"{t['ternary_bpw']:.3f} bits per weight" if t["ternary_bpw"] else "",
        f"{t['sparsity']:.1%} zeros" if t["sparsity"] is not None else "",
        f"relative error {t['relative_error']:.4f}" if t["relative_error"] is not None else "",
    ]
    print(", ".join(part for part in parts if part))
    size = in_bytes(t["file_bytes"])
    if t["source_bytes"]:
        size = f"{in_bytes(t['source_bytes'])} -> {size}, {t['ratio']:.2f} times smaller"
    print(size)
    if t["bits_per_parameter"] is not None:
        bits = f"{t['bits_per_parameter']:.3f} bits per parameter"
        print(f"whole model: {t['file_bytes']:,} bytes, {bits}")


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


def show_training(report: dict[str, Any]) -> None:
    """How a model was trained, and what was measured then, if the report is of one."""
    found = report["training"]
    if found is None:
        return
    texts, looks = shown(", ".join(found["texts"])), dict(map(tuple, found["held_out"]))
    said = (
        f"\ntrained on {texts}: {found['steps']} steps, {found['tokens']} tokens, "
        f"{found['minutes']:.1f} minutes; held-out loss {found['held_out'][0][1]:.4f} before, "
        f"{looks[found['kept_step']]:.4f} as kept, of step {found['kept_step']}"
    )
    stdout().print(said, highlight=False, soft_wrap=True)
    if found.get("windows_left_out"):
        windows = f"{found['windows_left_out']} windows of speech are left out"
        print(f"note: {windows}: in them the source repeats itself")
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


def show_plan(table: dict[str, Any], with_recipe: bool) -> None:
    """What becomes of each tensor and why, what it takes, and, on demand, by which options."""
    out = stdout()
    out.print(_rows(table["tensors"]))
    coverage = table["coverage"]
    ends = "".join(f"{coverage[c]:,} {c} + " for c in ("int8", "int4") if coverage.get(c))
    out.print(
        f"\n{coverage['total']:,} parameters = {coverage['ternary']:,} ternary + "
        f"{ends}{coverage['kept']:,} kept + {coverage['tied']:,} tied copies"
    )
    ratio = table["source_bytes"] / max(1, table["packed_bytes"])
    calibrate = table["recipe"]["calibrate"]
    besides = " (calibration takes more)" if calibrate else ""
    training = ""
    if table["train_memory_bytes"]:
        training = f"{in_bytes(table['train_memory_bytes'])} beside activations to train, "
    source, packed, converting, loading = (
        in_bytes(table[f"{name}_bytes"])
        for name in ("source", "packed", "convert_memory", "load_memory")
    )
    out.print(
        f"{source} -> {packed} ({ratio:.2f} times smaller); memory: about {converting} to "
        f"convert{besides}, {training}{loading} to load"
    )
    if with_recipe:
        out.print(f"recipe: {shown(_options(table['recipe']))}", soft_wrap=True)
    if calibrate:
        out.print(_calibration_in_words(calibrate), soft_wrap=True)
    for name in table["left_out"]:
        out.print(f"left out: {shown(name)}")
    for note in table["notes"]:
        out.print(f"note: {shown(note)}")
    if "part" in table:
        show_part(table["part"])
        files = Table("file", "tensors", "of", "read", "written", box=None)
        for row in table["part"]["files"]:
            sizes = in_bytes(row["source_bytes"]), in_bytes(row["packed_bytes"])
            files.add_row(shown(row["file"]), str(row["tensors"]), str(row["of"]), *sizes)
        out.print(files)
    if "forecast" in table:
        _show_forecast(table["forecast"])


def _show_forecast(found: dict[str, Any]) -> None:
    """What each of several processes would do; those that would do the same in one row."""
    grid = Table("processes", "read", "written", "memory", "sent", box=None)
    grid.add_column("processors")
    timed = found["bandwidth"] is not None
    if timed:
        grid.add_column(f"at {found['bandwidth'] / 1e9:g} GB/s")
    rank = 0
    for row, alike in groupby(found["ranks"]):
        first, rank = rank + 1, rank + len(list(alike))
        who = str(rank) if first == rank else f"{first} to {rank}"
        sizes = [in_bytes(row[f"{kind}_bytes"]) for kind in ("read", "written", "memory", "sent")]
        times = [_in_time(row["processor_seconds"])]
        times += [_in_time(row["transfer_seconds"])] if timed else []
        grid.add_row(who, *sizes, *times)
    stdout().print(grid)
    text = "of sizes what is read and written without data is exact, the rest about; times are"
    print(f"{text} of {found['threads']} threads a process like one here")
    sums = max(row["sums_bytes"] for row in found["ranks"])
    if sums:
        print(f"of the memory {in_bytes(sums)} are sums over the samples")


def _in_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_part(found: dict[str, Any]) -> None:
    """A line of what one of several processes reads and writes."""
    (index, count), files = found["part"], found["files"]
    read, written = in_bytes(found["source_bytes"]), in_bytes(found["packed_bytes"])
    print(f"part {index}/{count}: {read} of {len(files)} files -> {written}")


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
        if name == "calibrate" or value is None or value is False:
            continue
        option = "--for" if name == "engine" else f"--{name.replace('_', '-')}"
        each = value if isinstance(value, list | tuple) else [value]
        words += [option] if value is True else [f"{option} {shlex.quote(str(e))}" for e in each]
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
            f"groups, planes and zeros are decided when it is run, for {calibrate['target_bpw']:g} "
            "bits per ternary weight; the sizes above are those of equal groups"
        )
    return "; ".join(parts)


FAR = 2.0  # times the source's perplexity


def show_check(found: dict[str, Any] | None) -> None:
    """The figures of `convert.check`, and what both models write, a line each."""
    if found is None or not found["measured"]:
        return
    lines = [
        f"on {found['tokens']:,} tokens of the text that comes with ternarize, "
        f"{windows_in_words(found)}, in {found['seconds']:.0f} s:"
    ]
    value = {name: each["value"] for name, each in found.items() if is_measure(each)}
    if "cosine" in value:
        least = found["cosine"]["minimum"]
        lines.append(
            f"cosine {value['cosine']:.4f} to the embeddings of the source, at least {least:.4f}"
        )
    else:
        source, packed, ratio, divergence = (
            in_figures(value[name])
            for name in ("source_perplexity", "perplexity", "perplexity_ratio", "kl_divergence")
        )
        lines.append(
            f"perplexity {source} -> {packed} ({ratio} times), KL divergence {divergence} nats per "
            f"token, top-1 agreement {value['top1_agreement']:.1%}"
        )
        writes = found["writes"]
        lines.append(f'"{writes["prompt"]}" goes on')
        lines += [f"  {name}: {writes[name].lstrip()}" for name in ("source", "packed")]
    show_lines(lines)


def show_lines(lines: Iterable[str]) -> None:
    """Lines apart from what stands before, with what models have written: each remains one.

    A model may write what this terminal has no letters for.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print()
    for line in lines:
        print(printable(line).encode(encoding, "backslashreplace").decode(encoding))


def show_hints(
    model: str, output: Path, report: dict[str, Any], found: dict[str, Any] | None
) -> None:
    """What to expect of the result, and what to do next; `found`: what was checked, if it was."""
    error = report["totals"]["relative_error"]
    methods = {row["method"] for row in report["tensors"] if row["kind"] == "ternary"}
    if methods == {"lossless"}:
        err.print("The source was ternary already: packed without loss.")
        return
    from ternarize.measure.measured import kinds_of
    from ternarize.models.reads import SPEECH, TENSORS, has_tokenizer

    measured, reads = kinds_of(output)
    what, alike, data = "--text FILE", "text like that", "--dataset default (or your own texts)"
    if measured == SPEECH:
        what, alike, data = "--audio FOLDER", "speech like that", "--dataset FOLDER with recordings"
    elif reads == TENSORS or not has_tokenizer(output):
        alike, data = "inputs like those", "--dataset FILE.safetensors with inputs of the model"
    own = f":\n  ternarize eval {shlex.quote(str(output))} --source {shlex.quote(model)} {what}"
    if measured is None:  # `eval` would refuse it
        own = " by what the model is for: `ternarize eval` does not measure it."
    if report["calibration"] is not None or report["training"] is not None:
        advise(f"\nThese figures are on {alike} of the calibration. Measure on your own{own}")
    elif error is not None:
        _say_what_is_lost(error, own, found)
        absmean = report["recipe"]["method"] == "absmean"
        better = ["--method itf gives a smaller error at the same size"] if absmean else []
        if reads is not None:  # calibration runs the model
            better.append(f"{data} calibrates, for clearly better answers")
        if better:
            advise(f"{'; '.join(better)}.")


def _say_what_is_lost(error: float, own: str, found: dict[str, Any] | None) -> None:
    lost = (
        f"\nWeights rounded without data lose {error:.0%} of their energy here: an ordinary model "
        "(not trained in\nternary) answers clearly worse than its source. "
    )
    ratio = found["perplexity_ratio"]["value"] if found and "perplexity_ratio" in found else 1.0
    if found is None:
        advise(f"{lost}Measure how much{own}")
    elif not found["measured"]:
        advise(f"{lost}\nNot measured: {printable(found['why'])}")
        if found["command"] is not None:
            advise(f"Measure how much:\n  {found['command']}")
    elif ratio > FAR:
        advise(
            f"\nThis is far from its source: {in_figures(ratio)} times the perplexity. Do not use "
            "it before it has been calibrated."
        )
    else:
        advise(f"\nMeasure on your own text{own}")
