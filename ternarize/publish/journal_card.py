"""The model card of a journal of steps: what it begins from, what it holds, how to use it."""

import json
import shlex
from typing import Any

from ternarize.errors import UsageError
from ternarize.files.names import STEPS_FILE
from ternarize.publish.card import marked
from ternarize.steps.journal import MOVED, Journal
from ternarize.steps.start import StartModel, values_in
from ternarize.version import __version__


def make_journal_card(journal: Journal, where: str, base_model: str | None) -> str:
    """The model card of a journal, as text.

    where       what people will load it by: user/name, or user/name@revision
    base_model  Hub id of the packed checkpoint that it begins from; of a start from the seed None,
                of a whole model from the seed a repository with the files beside the weights, or
                None

    Raises UsageError for a base that is missing, or that there is not.
    """
    from huggingface_hub import ModelCardData  # slow to import

    base = journal.header.base
    if base is not None and base_model is None:
        raise UsageError(
            "--base-model",
            f"none, and a journal knows of its base the digest alone ({base[:12]}...)",
            "the packed checkpoint that it begins from, on the Hub",
            "Push that first, then name it: --base-model user/name",
        )
    if base is None and base_model is not None and journal.header.model is None:
        raise UsageError(
            "--base-model", "of a journal that begins from its seed", "none", "Leave it out"
        )
    model = journal.header.model
    if model is None:
        said, use = _introduction(base_model), _use(where, base_model)
    else:
        said, use = _introduction_of_model(model), _use_of_model(where, model, base_model)
    adapts = base_model is not None and model is None
    relation = {"base_model": base_model, "base_model_relation": "adapter"} if adapts else {}
    tags = ["ternarize", "ternary", "steps"]
    data: dict[str, Any] = {**relation, "library_name": "ternarize", "tags": tags}
    parts = [
        "---\n" + ModelCardData(**data).to_yaml() + "\n---",
        f"# {where.partition('@')[0].rpartition('/')[2]}",
        said,
        _figures(journal),
        "## How to use it",
        *use,
        "## Licence",
        "Whatever the licence of its base asks for holds for what the journal makes of it."
        if adapts
        else "It is not on record.",
    ]
    return marked("\n\n".join(parts) + "\n\n")


def _introduction(base_model: str | None) -> str:
    made = "A journal of steps, made with ternarize: the few trits that say"
    if base_model is None:
        return (
            f"{made} how the weights of a network came to be, from a seed on. `{STEPS_FILE}` is it."
        )
    of = f"[{base_model}](https://huggingface.co/{base_model})"
    return (
        f"{made} how {of} was trained on. `{STEPS_FILE}` is it; it holds no weights, and is of no "
        "use without that very checkpoint, which is recognised by its digest."
    )


def _introduction_of_model(model: StartModel) -> str:
    files = [f"- `{name}`, SHA-256 {digest}" for name, digest in model.files.items()]
    beside = "It needs these files beside it, as they were:" if files else "It needs nothing else."
    said = (
        "A whole model as a journal of steps, made with ternarize: its weights follow from a seed, "
        f"and the few trits that say how it was trained. `{STEPS_FILE}` is it. {beside}"
    )
    return "\n\n".join([said, "\n".join(files)] if files else [said])


def _use_of_model(where: str, model: StartModel, base_model: str | None) -> list[str]:
    """base_model  a repository with the files beside the weights"""
    steps, folder = shlex.quote(where), "FOLDER" if base_model is None else shlex.quote(base_model)
    named = f"; {folder} is the one with the files above" if model.files else ""
    base = f" --base {folder}" if model.files else ""
    replay = f"ternarize steps replay {steps} replayed{base}\nternarize steps verify {steps}"
    return [
        f"With ternarize {__version__} or newer installed, make a packed checkpoint of it{named}:",
        _code("console", f'{replay}\nternarize generate replayed --prompt "The"'),
    ]


def _figures(journal: Journal) -> str:
    steps = journal.steps
    counted = journal.effective()
    rows = [("seed", f"{journal.header.seed:016x}")]
    if journal.header.base is not None:
        rows.append(("SHA-256 of the base's trits and scales", journal.header.base))
    else:
        names = [name for name, _, _ in journal.header.tensors]
        rows.append(("tensors", f"{len(names):,}"))
        weights = values_in(journal.header.tensors)
        rows.append(("weights", f"{weights:,}"))
    targets = [name for target, name in MOVED.items() if any(s.target == target for s in steps)]
    rows += [
        ("steps", f"{len(steps):,}"),
        ("of them left out or negated", f"{sum(map(bool, journal.edited)):,}"),
        ("perturbations that are followed", f"{sum(len(s.chosen) for s in counted):,}"),
        ("what they move", " and ".join(targets) or "nothing"),
        ("size", f"{journal.size:,} bytes"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def _use(where: str, base_model: str | None) -> list[str]:
    steps, installed = shlex.quote(where), f"With ternarize {__version__} or newer installed,"
    if base_model is None:
        replay = f"ternarize steps replay {steps} weights.safetensors"
        return [f"{installed} write its weights:", _code("console", replay)]
    base = shlex.quote(base_model)
    python = f"ternarize.load({json.dumps(base_model)}, steps={json.dumps(where)})"
    return [
        f"{installed} load it in Python:",
        _code("python", f"import ternarize\n\nmodel = {python}"),
        "or make a packed checkpoint of both, and compare the digests of the journal:",
        _code(
            "console",
            f"ternarize steps replay {steps} replayed --base {base}\n"
            f"ternarize steps verify {steps} --base {base}",
        ),
    ]


def _code(kind: str, text: str) -> str:
    return f"```{kind}\n{text}\n```"
