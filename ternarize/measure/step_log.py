"""What a journal of steps holds, as `ternarize steps log` tells and draws it."""

import itertools
from pathlib import Path
from typing import Any

from ternarize.measure.report import figure_for
from ternarize.steps.checkpoint import open_journal
from ternarize.steps.journal import MOVED, JournalHeader, Note, Step, entry_bytes, is_step_number
from ternarize.steps.start import values_in

# of steps that gradients have found: the first of them, and losses on held-out documents
WRITTEN = ("written_from", "loss_before", "loss")
EDITED = {"": "", "mask": "masked", "negate": "negated"}


def log_of(path: str | Path) -> dict[str, Any]:
    """The steps of a journal with their losses and bytes, as plain data."""
    journal = open_journal(path)
    losses = {
        each.content["attempt"]: _as_number(each.content.get("loss"))
        for each in journal.entries
        if isinstance(each, Note) and is_step_number(each.content.get("attempt"))
    }
    rows = [
        {
            "step": step.number,
            "target": MOVED[step.target],
            "bits": step.bits,
            "amount": step.amount,
            "perturbations": step.k,
            "followed": len(step.chosen),
            "bytes": len(entry_bytes(step)),
            "loss": losses.get(step.number),
            "edited": EDITED[edit],
        }
        for step, edit in zip(journal.steps, journal.edited, strict=True)
    ]
    written, last = list[dict[str, Any]](), 0
    for each in journal.entries:
        if isinstance(each, Step):
            last = each.number + 1
        elif isinstance(each, Note) and is_step_number(each.content.get("written_from")):
            told = {name: _as_number(each.content.get(name)) for name in WRITTEN}
            written.append({**told, "upto": last})
    header = journal.header
    return {
        "journal": str(path),
        "seed": f"{header.seed:016x}",
        "start": _start_of(header),
        "attempts": max([journal.next_number, *(n + 1 for n in losses)]),
        "steps": rows,
        "losses": sorted(losses.items()),
        "written": written,
        "bytes": journal.size,
        "torn_bytes": journal.torn,
    }


def _start_of(header: JournalHeader) -> str:
    """What a journal begins from, in words."""
    if header.base is not None:
        return f"the base {header.base[:12]}..."
    if header.model is None:
        return "its seed"
    named = header.model.config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    name = first[:80] if isinstance(first, str) else "model"
    weights = values_in(header.tensors)
    return f"its seed, a whole {name} of {weights:,} weights"


def _as_number(value: Any) -> float | None:
    return value if type(value) in (int, float) else None


def curves_of(log: dict[str, Any]) -> dict[str, list[list[tuple[int, float]]]]:
    """Losses over "attempts" and over "bytes" of steps, a list of lines each.

    Votes have a loss for each attempt; a training by gradient has one before its steps, and one
    behind them.
    """
    steps = log["steps"]
    sizes = [0, *itertools.accumulate(row["bytes"] for row in steps)]
    told = [(size, row["loss"]) for size, row in zip(sizes[1:], steps, strict=True)]
    curves = {"attempts": [log["losses"]], "bytes": [told]}
    for each in log["written"]:
        ends = each["written_from"], each["upto"]
        losses = each["loss_before"], each["loss"]
        counts = [sum(row["step"] < number for row in steps) for number in ends]
        curves["attempts"].append(list(zip(ends, losses, strict=True)))
        curves["bytes"].append([(sizes[n], loss) for n, loss in zip(counts, losses, strict=True)])
    return {
        what: [known for line in lines if (known := [p for p in line if p[1] is not None])]
        for what, lines in curves.items()
    }


def plot_log(log: dict[str, Any], path: str | Path) -> None:
    """Draw the curves of a journal; see `figure_for`."""
    with figure_for(path, (8, 7)) as figure:
        labels = {"attempts": "attempt", "bytes": "bytes of steps"}
        curves = curves_of(log)
        for axes, (what, label) in zip(figure.subplots(2, 1), labels.items(), strict=True):
            for line in curves[what]:
                axes.plot([x for x, _ in line], [loss for _, loss in line], ".-")
            axes.set(xlabel=label, ylabel="loss")
