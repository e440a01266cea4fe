"""`ternarize steps train`: a packed model, or one from its seed, trained by a journal of steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ternarize.cli.options import AsJson, Debug, Device, OneOf, Quiet
from ternarize.cli.terminal import in_bytes, print_json, progress_bar
from ternarize.errors import UsageError

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
    base: Annotated[
        str,
        "Packed checkpoint: directory or Hub id; with --from-scratch folder with config.json and a "
        "tokenizer.",
    ],
    journal: Annotated[Path, "File to write; one of the same base and seed goes on."],
    *,
    texts: Annotated[
        list[str], typer.Option(help="Train on texts, each FILE or FILE=WEIGHT for a mixture.")
    ],
    from_scratch: Annotated[
        bool, "Begin from the seed alone, in random trits: the journal is the whole model."
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=-1,
            help="From scratch: weights that share a scale (-1: a row, 0: all); default: 128.",
        ),
    ] = None,
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
            help="Of a compact journal; default: 2500 by gradient (from scratch 50000), any number "
            "by votes.",
        ),
    ] = None,
    target: Annotated[
        str,
        "What steps move; of trits by gradient the teacher is the source.",
        OneOf(("scales", "trits")),
    ] = "scales",
    objective: Annotated[
        str | None,
        "distill: towards what the teacher says of every next word; text: towards the texts; "
        "default: distill, from scratch without a teacher text.",
        OneOf(("distill", "text")),
    ] = None,
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
        "default: 1), or in trits (at most 1, default: 0.006, from scratch 0.03).",
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
    """Train a model by random directions, keeping the steps instead of the weights.

    It is a packed one, or (--from-scratch) one that begins from the seed alone.

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
        SCRATCH_BYTES,
        check_alone,
        train_by_gradient,
        train_by_votes,
    )
    from ternarize.train.votes import DENSITIES, VOTED, Votes
    from ternarize.trits.ternary import check_device

    usual = "text" if from_scratch and teacher is None else "distill"
    training = Train(
        texts=tuple(texts),
        objective=objective or usual,
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
    if group_size is not None and not from_scratch:
        raise UsageError("--group-size", "of a packed checkpoint", "its own", "Leave it out")
    of_votes.setdefault("bits", DENSITIES[target])
    votes = Votes(target, perturbations or VOTED, nbytes=nbytes or 0, **of_votes)
    with ranks_of_launcher(TRAINING_WAIT) as world, progress_bar(quiet or world.rank > 0) as update:
        how: dict[str, Any] = {"seed": seed, "device": check_device(device)}
        check_gpus(world, how["device"])
        how["heard"] = _heard(update, attempts)
        if from_scratch:
            from ternarize.plans.recipe import GROUP_SIZE
            from ternarize.train.drawn import drawn_header

            size = GROUP_SIZE if group_size is None else group_size
            how["start"] = drawn_header(base, seed, size)
        if by == "gradient":
            how |= {"target": target, "k": perturbations or DIRECTIONS, "rate": lr}
            room = nbytes or (SCRATCH_BYTES if from_scratch else GRADIENT_BYTES)
            result = train_by_gradient(base, journal, training, room, **how)
        else:
            result = train_by_votes(base, journal, training, votes, world=world, **how)
    if world.rank:
        return
    if as_json:
        print_json({"journal": str(journal), **result})
    else:
        tell_trained(result)


def _heard(update: Any, attempts: int) -> Callable[[int, float], None]:
    """What shows how far a training is."""

    def heard(number: int, loss: float) -> None:
        if update is not None:
            update(number + 1, attempts, f"loss {loss:.4f}", "training")

    return heard


def tell_trained(result: dict[str, Any]) -> None:
    print(
        f"{result['steps']} steps in {in_bytes(result['bytes'])}, "
        f"{in_bytes(result['compact_bytes'])} once compact; loss on held-out documents "
        f"{result['loss_before']:.4f} -> {result['loss']:.4f}"
    )
    if result.get("windows_left_out"):
        windows = f"{result['windows_left_out']} windows of speech are left out"
        print(f"note: {windows}: in them the source repeats itself")
    why = _NOT_WRITTEN.get(result["not_written"], "")
    if why:
        more = f"more was written after {result['attempts']} attempts"
        what = more if result["written"] else "was written"
        print(f"nothing {what}: {why.format(wanted=result.get('loss_wanted'))}")


def repaired(
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
        how["start"] = found.header if found.header.model is not None else None
        return train_by_votes(base, journal, training, votes, heard=heard, **how)
