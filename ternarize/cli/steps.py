"""`ternarize steps`: journals of steps, replayed, looked at and edited."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ternarize.cli.options import AsJson, Debug, Device, Quiet
from ternarize.cli.steps_train import repaired, steps_train, tell_trained
from ternarize.cli.terminal import in_bytes, print_json, shown, stdout
from ternarize.errors import UsageError

JournalArgument = Annotated[Path, "Journal of steps: file."]
ReadJournal = Annotated[str, "Journal of steps: file, or Hub id user/name@revision."]
NewJournal = Annotated[Path, "Journal to write; must not exist."]
Base = Annotated[
    str | None,
    "What it begins from: packed checkpoint; of a model from its seed the folder with its "
    "tokenizer.",
]
Upto = Annotated[int | None, typer.Option(min=0, help="Leave out this step and those behind it.")]


def steps_replay(
    journal: ReadJournal,
    output: Annotated[
        Path, "Directory to make; of tensors from a seed that are no model a .safetensors file."
    ],
    *,
    base: Base = None,
    upto: Upto = None,
    tensor: Annotated[str | None, "Write this tensor alone, into a .safetensors file."] = None,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="Of it these rows.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a packed checkpoint of a base and a journal, or rows of one tensor.

    Example: ternarize steps replay my.steps replayed --base packed
    """
    from ternarize.steps.checkpoint import replay, write_rows

    if tensor is not None:
        result = write_rows(
            journal, base, tensor, None if rows is None else _range(rows), output, upto=upto
        )
    elif rows is not None:
        raise UsageError("--rows", "without --tensor", "both", "Name the tensor")
    else:
        result = replay(journal, base, output, upto=upto)
    if as_json:
        print_json({"output": str(output), **result})
    else:
        print(f"{output}: {result['steps']} steps, {result['perturbations']} perturbations")
        if result.get("missing"):
            names = ", ".join(map(shown, result["missing"]))
            print(f"without {names}: name the folder that has them with --base")


def _range(text: str) -> tuple[int, int]:
    """A:B as two numbers, A alone as A:A+1."""
    match = re.fullmatch(r"([0-9]{1,10})(?::([0-9]{1,10}))?", text)
    first, stop = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
    if first >= stop:
        raise UsageError("range", f"{text!r:.60}", "two rising numbers, such as 0:16, or one")
    return first, stop


def steps_log(
    journal: ReadJournal,
    *,
    plot: Annotated[Path | None, "Draw loss and bytes to this image; needs matplotlib."] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the steps of a journal: loss, density, perturbations, bytes, and edits.

    Example: ternarize steps log my.steps
    """
    from ternarize.measure.step_log import WRITTEN, log_of, plot_log

    found = log_of(journal)
    if plot is not None:
        plot_log(found, plot)
    if as_json:
        print_json(found)
        return
    grid = Table("step", "moves", "one in", "followed", "bytes", "loss", "edited", box=None)
    for row in found["steps"]:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        moves = row["target"] + (f" by {row['amount']}" if row["amount"] > 1 else "")
        followed = f"{row['followed']} of {row['perturbations']}"
        grid.add_row(
            str(row["step"]),
            moves,
            str(1 << row["bits"]),
            followed,
            str(row["bytes"]),
            loss,
            row["edited"],
        )
    stdout().print(grid)
    print(
        f"\n{len(found['steps'])} steps of {found['attempts']} attempts, "
        f"{in_bytes(found['bytes'])}, seed {found['seed']}, from {shown(found['start'])}"
    )
    for each in found["written"]:
        first, *losses = (each[name] for name in WRITTEN)
        if None not in losses:
            fall = " -> ".join(f"{loss:.4f}" for loss in losses)
            print(f"from step {first} on by gradient: loss on held-out documents {fall}")
    if found["torn_bytes"]:
        print(f"{found['torn_bytes']} bytes at the end are of a record that was not written whole")


def steps_edit(
    journal: JournalArgument,
    *,
    mask: Annotated[
        list[str] | None, typer.Option(metavar="A:B", help="Leave out steps A to B, or one.")
    ] = None,
    negate: Annotated[
        list[str] | None, typer.Option(metavar="A:B", help="Negate steps A to B, or one.")
    ] = None,
    restore: Annotated[
        list[str] | None, typer.Option(metavar="A:B", help="Undo the edits of steps A to B.")
    ] = None,
    repair: Annotated[int, "Try so many steps afterwards, as `steps train` does."] = 0,
    base: Base = None,
    texts: Annotated[list[str] | None, typer.Option(help="Of the repair.")] = None,
    teacher: Annotated[str | None, "Of the repair; without one it learns the texts."] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Leave out steps, negate them, or restore them; B itself is not among A:B.

    An edit is appended: nothing is lost. Steps behind an edited one were chosen in its presence, so
    that what comes out is another model, which more steps have to repair; of the last steps alone
    it is exactly the model before them.

    Example: ternarize steps edit my.steps --mask 1
    """
    from ternarize.steps.checkpoint import open_base
    from ternarize.steps.journal import Edit, read_journal
    from ternarize.steps.operations import edit
    from ternarize.trits.ternary import check_device

    edits = [
        Edit(operation, first, stop - 1)
        for operation, given in (("mask", mask), ("negate", negate), ("restore", restore))
        for first, stop in map(_range, given or ())
    ]
    if not edits:
        raise UsageError("edit", "nothing", "--mask, --negate or --restore", "Name some steps")
    if repair and (base is None or not texts):
        raise UsageError("--repair", "without --base and --texts", "both", "Name them")
    place = check_device(device)
    if repair and base is not None:  # before the journal is changed
        open_base(read_journal(journal), base)
    done: dict[str, Any] = {}
    for each, numbers in zip(edits, edit(journal, *edits), strict=True):
        done.setdefault(each.operation, []).extend(numbers)
    if repair:
        assert base is not None and texts
        done["repair"] = repaired(journal, base, texts, teacher, repair, place, quiet)
    if as_json:
        print_json({"journal": str(journal), **done})
        return
    for operation, found in done.items():
        if operation == "repair":
            tell_trained(found)
        else:
            print(f"{operation}: {len(found)} steps")


def steps_fork(
    journal: JournalArgument,
    new: NewJournal,
    *,
    upto: Upto = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Begin another journal with the first steps of one.

    Example: ternarize steps fork my.steps other.steps --upto 1
    """
    from ternarize.steps.operations import fork

    _tell_new(fork(journal, new, upto), as_json)


def steps_merge(
    journal: JournalArgument,
    other: Annotated[Path, "Another journal of the same start."],
    new: NewJournal,
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Join two journals: the steps of the first, then what the second has besides.

    What comes out is a starting point, not a result: train it on.

    Example: ternarize steps merge my.steps other.steps both.steps
    """
    from ternarize.steps.operations import merge

    _tell_new(merge(journal, other, new), as_json)


def steps_compact(
    journal: JournalArgument,
    new: NewJournal,
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the same steps in fewer bytes, without notes of the training.

    Example: ternarize steps compact my.steps small.steps
    """
    from ternarize.steps.operations import compact

    _tell_new(compact(journal, new), as_json)


def _tell_new(journal: Any, as_json: bool) -> None:
    if as_json:
        print_json({"output": journal.path, "steps": len(journal.steps), "bytes": journal.size})
    else:
        print(f"{journal.path}: {len(journal.steps)} steps, {in_bytes(journal.size)}")


def steps_diff(
    journal: JournalArgument,
    other: Annotated[Path, "Another journal of the same start."],
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say how many steps two journals have in common, and how many each has besides.

    Example: ternarize steps diff my.steps other.steps
    """
    from ternarize.steps.operations import difference

    found = difference(journal, other)
    if as_json:
        print_json(found)
    else:
        print(f"{found['common']} steps in common, then {found['first']} and {found['second']}")


def steps_verify(
    journal: ReadJournal,
    *,
    base: Base = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Replay a journal and compare all its digests.

    Example: ternarize steps verify my.steps --base packed
    """
    from ternarize.steps.checkpoint import open_base, open_journal
    from ternarize.steps.journal import Mark
    from ternarize.steps.operations import check_digests

    found = open_journal(journal)
    packed, records, _ = open_base(found, base)
    marks = check_digests(found, packed, records)
    if as_json:
        print_json({"journal": journal, "steps": len(found.steps), "digests": marks})
    else:
        last = max((e.number for e in found.entries if isinstance(e, Mark)), default=0)
        behind = sum(step.number >= last for step in found.steps)
        checked = f"{marks} digests match" if marks else "no digest to compare"
        if marks and behind:
            checked += f", none is of the last {behind} steps"
        print(f"{'ok: ' if marks else ''}{len(found.steps)} steps, {checked}")
        if found.torn:
            print(f"{found.torn} bytes at the end are of a record that was not written whole")


STEP_COMMANDS: dict[str, Callable[..., None]] = {
    "train": steps_train,
    "replay": steps_replay,
    "log": steps_log,
    "edit": steps_edit,
    "fork": steps_fork,
    "merge": steps_merge,
    "diff": steps_diff,
    "compact": steps_compact,
    "verify": steps_verify,
}
