"""What a journal of steps holds, as `ternarize steps log` tells and draws it."""

import itertools
from pathlib import Path
from typing import Any

from ternarize.measure.report import figure_for
from ternarize.steps.checkpoint import open_journal
from ternarize.steps.journal import MOVED, Note, entry_bytes, is_step_number

# of steps that gradients have found: the first of them, and losses on documents put aside
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
    written = [
        {name: _as_number(each.content.get(name)) for name in WRITTEN}
        for each in journal.entries
        if isinstance(each, Note) and is_step_number(each.content.get("written_from"))
    ]
    header = journal.header
    return {
        "journal": str(path),
        "seed": f"{header.seed:016x}",
        "start": "its seed" if header.base is None else f"the base {header.base[:12]}...",
        "attempts": max([journal.next_number, *(n + 1 for n in losses)]),
        "steps": rows,
        "losses": sorted(losses.items()),
        "written": written,
        "bytes": journal.size,
        "torn_bytes": journal.torn,
    }


def _as_number(value: Any) -> float | None:
    return value if type(value) in (int, float) else None


def plot_log(log: dict[str, Any], path: str | Path) -> None:
    """Draw the loss of a journal over its attempts and over its bytes; see `figure_for`."""
    with figure_for(path, (8, 7)) as figure:
        over_attempts, over_bytes = figure.subplots(2, 1)
        points = [(n, loss) for n, loss in log["losses"] if loss is not None]
        over_attempts.plot([n for n, _ in points], [loss for _, loss in points])
        over_attempts.set(xlabel="attempt", ylabel="loss")
        sizes = itertools.accumulate(row["bytes"] for row in log["steps"])
        told = [(n, row["loss"]) for n, row in zip(sizes, log["steps"], strict=True)]
        told = [(n, loss) for n, loss in told if loss is not None]
        over_bytes.plot([n for n, _ in told], [loss for _, loss in told])
        over_bytes.set(xlabel="bytes of steps", ylabel="loss")
