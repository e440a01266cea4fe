"""`ternarize steps`: journals of steps, trained, replayed, looked at and edited."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ternarize.cli.options import AsJson, Debug, Device, OneOf, PackedArgument, Quiet
from ternarize.cli.terminal import in_bytes, print_json, progress_bar, shown, stdout
from ternarize.errors import UsageError

JournalArgument = Annotated[Path, "Journal of steps: file."]
ReadJournal = Annotated[str, "Journal of steps: file, or Hub id user/name@revision."]
NewJournal = Annotated[Path, "Journal to write; must not exist."]
Base = Annotated[
    str | None, "Packed checkpoint that it begins from; none for a start from its seed."
]
Upto = Annotated[int | None, typer.Option(min=0, help="Leave out this step and those behind it.")]
# by what a training says of it
_NOT_WRITTEN = {
    "before": "what was trained had been written before it was broken off",
    "bytes": "the next step does not fit into what is left of the bytes. Name more --bytes",
    "moves": "no value has moved by half of what a step moves. Use more --attempts, or a higher "
    "--lr",
    "gain": "what fits into the bytes does not help held-out documents; all that was trained "
    "takes it to {wanted:.4f}. Use more --attempts, more --bytes, or another --lr",
}


def steps_train(
    base: PackedArgument,
    journal: Annotated[Path, "File to write; one of the same base and seed goes on."],
    *,
    texts: Annotated[
        list[str], typer.Option(help="Train on texts, each FILE or FILE=WEIGHT for a mixture.")
    ],
    by: Annotated[
        str,
        "gradient: what is moved is trained by gradients, and steps go where it came to; votes: "
        "each step is probed and tried.",
        OneOf(("gradient", "votes")),
    ] = "gradient",
    attempts: Annotated[
        int, "Steps of the gradient; or of votes that are tried, those of earlier runs included."
    ] = 100,
    nbytes: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            min=1,
            help="Of a compact journal; default: 2500 by gradient, any number by votes.",
        ),
    ] = None,
    target: Annotated[
        str,
        "What steps move; of trits by gradient the teacher is the source.",
        OneOf(("scales", "trits")),
    ] = "scales",
    objective: Annotated[
        str,
        "distill: towards what the teacher says of every next word; text: towards the texts.",
        OneOf(("distill", "text")),
    ] = "distill",
    teacher: Annotated[str | None, "Model to learn from, with the same words."] = None,
    perturbations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Random directions that a step draws; default: 4096 by gradient, 256 by votes.",
        ),
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="One non-zero in 2^BITS values, each tried; default: by the target."),
    ] = None,
    lr: Annotated[
        float | None,
        "Of gradients, at the beginning, above 0: in 1/32 of an octave of scales (at most 32, "
        "default: 1), or in trits (at most 1, default: 0.006).",
    ] = None,
    thrift: Annotated[
        float | None,
        "Of votes; 0: steps of the largest gain; 1: of the largest for each bit; default: 0.5.",
    ] = None,
    probe: Annotated[
        str | None,
        "Of votes: how the loss along a direction is found; default: backward; the others need "
        "none.",
        OneOf(("backward", "jvp", "forwards")),
    ] = None,
    exchange: Annotated[
        str | None,
        "Of votes: what several processes (torchrun) tell each other; default: alignments.",
        OneOf(("alignments", "votes")),
    ] = None,
    train_len: Annotated[int | None, "Tokens of a sample."] = None,
    batch: Annotated[int, "Tokens of a batch; a step needs two."] = 4096,
    seed: Annotated[int, "Of the directions, and of the order of samples."] = 0,
    text_column: Annotated[str | None, "Column of the texts, if they are tables."] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a packed model by random directions, keeping the steps instead of the weights.

    By gradient, real scales or trits are trained first, and each step takes the directions that
    bring the stored ones nearest to them for its bits. By votes, a step follows directions along
    which the loss falls, and is kept if it lowers the loss of another batch. Interrupted, the same
    command goes on (by gradient it trains again, since steps are written at the end); with more
    attempts or bytes it goes on, too.

    Example: ternarize steps train packed my.steps --texts default --teacher examples/tiny-llama
    --attempts 2 --batch 512 --bytes 300
    """
    from ternarize.plans.recipe import Train
    from ternarize.ranks import TRAINING_WAIT, check_gpus, ranks_of_launcher
    from ternarize.train.journals import (
        DIRECTIONS,
        GRADIENT_BYTES,
        check_alone,
        train_by_gradient,
        train_by_votes,
    )
    from ternarize.train.votes import DENSITIES, VOTED, Votes
    from ternarize.trits.ternary import check_device

    training = Train(
        texts=tuple(texts),
        objective=objective,
        teacher=teacher,
        steps=attempts,
        train_len=train_len,
        batch=batch,
        seed=seed,
        text_column=text_column,
    )
    given = {"thrift": thrift, "probe": probe, "exchange": exchange, "bits": tuple(bits or ())}
    of_votes: dict[str, Any] = {n: v for n, v in given.items() if v not in (None, ())}
    if by == "gradient":
        if of_votes:
            name = f"--{next(iter(of_votes))}"
            raise UsageError(name, "by gradient", "--by votes beside it", "Leave it out")
        check_alone()
    elif lr is not None:
        raise UsageError("--lr", "by votes, which have no rate", "--by gradient", "Leave it out")
    of_votes.setdefault("bits", DENSITIES[target])
    votes = Votes(target, perturbations or VOTED, nbytes=nbytes or 0, **of_votes)
    with ranks_of_launcher(TRAINING_WAIT) as world, progress_bar(quiet or world.rank > 0) as update:
        how: dict[str, Any] = {"seed": seed, "device": check_device(device)}
        check_gpus(world, how["device"])
        how["heard"] = _heard(update, attempts)
        if by == "gradient":
            how |= {"target": target, "k": perturbations or DIRECTIONS, "rate": lr}
            result = train_by_gradient(base, journal, training, nbytes or GRADIENT_BYTES, **how)
        else:
            result = train_by_votes(base, journal, training, votes, world=world, **how)
    if world.rank:
        return
    if as_json:
        print_json({"journal": str(journal), **result})
    else:
        _tell_trained(result)


def _heard(update: Any, attempts: int) -> Callable[[int, float], None]:
    """What shows how far a training is."""

    def heard(number: int, loss: float) -> None:
        if update is not None:
            update(number + 1, attempts, f"loss {loss:.4f}", "training")

    return heard


def _tell_trained(result: dict[str, Any]) -> None:
    print(
        f"{result['steps']} steps in {in_bytes(result['bytes'])}; loss on held-out documents "
        f"{result['loss_before']:.4f} -> {result['loss']:.4f}"
    )
    why = _NOT_WRITTEN.get(result["not_written"], "")
    if why:
        more = f"more was written after {result['attempts']} attempts"
        what = more if result["written"] else "was written"
        print(f"nothing {what}: {why.format(wanted=result.get('loss_wanted'))}")


def steps_replay(
    journal: ReadJournal,
    output: Annotated[Path, "Directory to make; of a journal without a base a .safetensors file."],
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
    from ternarize.sources.packed import open_packed
    from ternarize.steps.base import check_base
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
        check_base(journal, read_journal(journal).header, open_packed(base)[1])
    done: dict[str, Any] = {}
    for each, numbers in zip(edits, edit(journal, *edits), strict=True):
        done.setdefault(each.operation, []).extend(numbers)
    if repair:
        assert base is not None and texts
        done["repair"] = _repaired(journal, base, texts, teacher, repair, place, quiet)
    if as_json:
        print_json({"journal": str(journal), **done})
        return
    for operation, found in done.items():
        if operation == "repair":
            _tell_trained(found)
        else:
            print(f"{operation}: {len(found)} steps")


def _repaired(
    journal: Path,
    base: str,
    texts: list[str],
    teacher: str | None,
    attempts: int,
    device: str,
    quiet: bool,
) -> dict[str, Any]:
    """Steps behind an edit, which move what the last one moved."""
    from ternarize.plans.recipe import Train
    from ternarize.steps.journal import MOVED, read_journal
    from ternarize.train.journals import train_by_votes
    from ternarize.train.votes import DENSITIES, Votes, first_attempt

    found = read_journal(journal)
    last = found.steps[-1]
    target = MOVED[last.target]
    objective = "text" if teacher is None else "distill"
    end = first_attempt(found) + attempts
    training = Train(texts=tuple(texts), objective=objective, teacher=teacher, steps=end)
    votes = Votes(target, last.k, DENSITIES[target])
    with progress_bar(quiet) as update:
        heard = _heard(update, end)
        how: dict[str, Any] = {"seed": found.header.seed, "device": device}
        return train_by_votes(base, journal, training, votes, heard=heard, **how)


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
    from ternarize.sources.packed import open_packed
    from ternarize.steps.checkpoint import open_journal
    from ternarize.steps.operations import check_digests

    found = open_journal(journal)
    packed, records = (None, {}) if base is None else open_packed(base)
    marks = check_digests(found, packed, records)
    if as_json:
        print_json({"journal": journal, "steps": len(found.steps), "digests": marks})
    else:
        checked = f"{marks} digests match" if marks else "no digest to compare"
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
