"""Every architecture of transformers: `python -m tests.campaigns.architectures [--types GLOB ...]`.

For each model type of transformers' Auto classes a tiny random model is made from the type's own
default configuration (architectures_small.py), saved, loaded by transformers, and converted. What
is asked, in this order (architectures_checks.py):

    source             what transformers itself does not load as it has saved it is named
    plan               it adds up, and gives a reason for every tensor
    convert            or it is refused, in one line that says where, what, and what to do
    verify             with the source
    decode             formats/reference.py decodes it; kept tensors are the source's
    load               ternarize.load
    outputs            in float32, of the packed model and of a dense twin that transformers loads
    weights            all parameters and buffers, against the twin's
    save again         save_pretrained, verify, load: the same state
    head, embeddings   converted to int8, int4 and ternary: all of the above; and a head that is
                       rounded at load is the one that a conversion rounds
    own names          a model saved with the names of its own parameters, where transformers
                       writes other ones by default (those of older versions)

A type that converts and then does not load or differs, and an exception that is no TernarizeError,
is a failure. Each type has a process of its own, with limits of time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ternarize.plans.recipe import Recipe

from .architectures_checks import (
    FAILED,
    OK,
    OPEN,
    REFUSED,
    Case,
    Step,
    ask_all,
    load_source,
    read,
    state,
    where,
)
from .architectures_inputs import candidates, tensors
from .architectures_small import STYLES, build, default_config, small
from .child import limit_memory

SECONDS = 120  # of a processor, for one type
HANG = 900  # seconds by the clock, on a machine that others use, too
BUILDING = 40  # of a processor, at most, until a model is built that runs
MEMORY = 10 << 30  # address space that a type may take
CLASSES = 4  # of a type that are tried until one can be built
UNRUNNABLE = 8  # models of a class that are built and take no inputs, until the next is tried

# Classes that make most of a model come first; the others in the order of their names.
PREFERRED = (
    *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM"),
    *("MASKED_LM", "CAUSAL_LM", "CTC", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
    *("VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "OBJECT_DETECTION"),
    *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION"),
)
LAST = ("PRETRAINING", "MULTIPLE_CHOICE", "BACKBONE", "TEXT_ENCODING")


@dataclass
class Row:
    """What came of one type."""

    type: str
    cls: str = ""
    style: str = ""
    parameters: int = 0
    inputs: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    not_built: str = ""
    seconds: float = 0.0

    @property
    def failures(self) -> list[Step]:
        return [step for step in self.steps if step.outcome == FAILED]

    @property
    def outcome(self) -> str:
        """In a word: "not built", FAILED, REFUSED, or OK."""
        if self.not_built:
            return "not built"
        if self.failures:
            return FAILED
        refused = [s for s in self.steps if s.outcome == REFUSED and s.name in ("plan", "convert")]
        return REFUSED if refused else OK


# ---------------------------------------------------------------------------------- types, classes


def types() -> dict[str, list[str]]:
    """Model type -> the names of its classes in the Auto classes, the preferred one first."""
    mappings = {
        name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): getattr(modeling_auto, name)
        for name in dir(modeling_auto)
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES")
    }
    order = [*PREFERRED, *sorted(mappings.keys() - {*PREFERRED, *LAST}), *LAST]
    found: dict[str, list[str]] = {}
    for mapping in [*(mappings.get(name, {}) for name in order), modeling_auto.MODEL_MAPPING_NAMES]:
        for model_type, classes in mapping.items():
            for cls in (classes,) if isinstance(classes, str) else classes:
                if cls not in found.setdefault(model_type, []):
                    found[model_type].append(cls)
    return found


def chosen(globs: Sequence[str], count: int | None, seed: int) -> list[str]:
    """The types to go through: all that a glob matches, or so many of them at random."""
    names = [n for n in types() if not globs or any(fnmatchcase(n, glob) for glob in globs)]
    if count is not None and count < len(names):
        names = random.Random(seed).sample(names, count)
    return sorted(names)


# ---------------------------------------------------------------------------------------- one type


# a model, its style, and inputs that it takes; or None and why it takes none
Built = tuple[PreTrainedModel, str, "dict[str, Any] | None", str]


def make(row: Row, folder: Path, seed: int) -> Case | None:
    """The first model of a type that can be built and runs, saved; None if none can be built.

    A class that transformers cannot load as it saves it counts as one that cannot be built.
    """
    config, ends = default_config(row.type), time.process_time() + BUILDING
    unrunnable: list[Built] = []
    for name in types()[row.type][:CLASSES]:
        built = _built(row, name, config, seed, ends)
        if built is None:
            continue
        if built[2] is None:
            unrunnable.append(built)
        elif (case := _saved(row, built, folder)) is not None:
            return case
    cases = (_saved(row, built, folder) for built in unrunnable)
    return next((case for case in cases if case is not None), None)


def _built(row: Row, name: str, config: PretrainedConfig, seed: int, ends: float) -> Built | None:
    """The first model of a class that runs, else the first that can be built, if any."""
    first: Built | None = None
    unrunnable = 0
    for model, style, line in _models(name, config, seed):
        if model is None:
            row.not_built = row.not_built or line
            continue
        inputs, why = _inputs(model, ends)
        if inputs is not None:
            return model, style, inputs, ""
        first = first or (model, style, None, why)
        unrunnable += 1
        if unrunnable == UNRUNNABLE or time.process_time() > ends:
            break
    return first


def _models(
    name: str, config: PretrainedConfig, seed: int
) -> Iterator[tuple[PreTrainedModel | None, str, str]]:
    """(model, style, "") for what can be built of a class, (None, "", why not) for what cannot."""
    try:
        cls = getattr(transformers, name)
    except (AttributeError, ImportError, RuntimeError) as error:
        yield None, "", _line(error)
        return
    for style in STYLES:
        try:
            yield build(cls, small(config, style), seed), str(style), ""
        except ImportError as error:  # a package that is missing, whatever the sizes are
            yield None, "", _line(error)
            return
        except Exception as error:
            yield None, "", _line(error)


def _line(error: Exception) -> str:
    said = " ".join(str(error).split()) or where(error)
    return f"{type(error).__name__}: {said}"[:300]


def _inputs(model: PreTrainedModel, ends: float) -> tuple[dict[str, Any] | None, str]:
    """Inputs that a model takes and answers with numbers; or None and what it says of the first.

    ends  when no more are tried, in seconds of this process
    """
    why = ""
    for made in candidates(model):
        if time.process_time() > ends:
            break
        try:
            torch.manual_seed(0)
            copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
            with torch.no_grad():
                found = tensors(model(**copies))
        except Exception as error:
            why = why or _line(error)
            continue
        if found and all(bool(tensor.isfinite().any()) for tensor in found if tensor.numel()):
            return made, ""
    return None, why or "no rule makes its inputs"


def _saved(row: Row, built: Built, folder: Path) -> Case | None:
    """A model on the disk, ready to be asked; None if transformers does not load it as it was."""
    model, style, inputs, why = built
    source, own = folder / "source", folder / "own names"
    for each in (source, own):
        shutil.rmtree(each, ignore_errors=True)
    model.save_pretrained(source)
    model.save_pretrained(own, save_original_format=False)
    if read(own).keys() == read(source).keys():
        shutil.rmtree(own)
    row.steps.clear()
    case = Case(type(model), folder, inputs, why, row.steps, state(model))
    unloaded = "transformers does not load what it has saved"
    try:
        load_source(case)
    except Exception as error:
        row.not_built = f"{unloaded}: {_line(error)}"
        return None
    if lost := case.missing & {name for name, _ in model.named_parameters()}:
        row.not_built = f"{unloaded}: {min(lost)} is another then ({len(lost)} such)"
        return None
    row.cls, row.style, row.not_built = type(model).__name__, style, ""
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    row.inputs = [*inputs] if inputs else []
    return case


def examine(model_type: str, seed: int, folder: Path) -> Row:
    """Build a model of a type, and ask everything about it."""
    started = time.process_time()
    row = Row(model_type)
    methods = ("itf", "absmean")
    recipe = Recipe(methods[(zlib.crc32(model_type.encode()) + seed) % 2], group_size=32)
    try:
        case = make(row, folder, seed)
    except Exception as error:  # of transformers: its default configuration, or save_pretrained
        row.not_built, case = row.not_built or _line(error), None
    if case is not None:
        ask_all(case, recipe)
    row.seconds = round(time.process_time() - started, 1)
    return row


# ------------------------------------------------------------------------------- a process for each


def _work(model_type: str, seed: int, folder: Path) -> None:
    """What the process of a type does: its row comes out as JSON, what it prints in a file."""
    with open(folder / "said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        torch.set_num_threads(1)
        limit_memory(MEMORY)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        row = examine(model_type, seed, folder)
        (folder / "row.json").write_text(json.dumps(asdict(row)))


def collect(model_type: str, folder: Path, exit_code: int | None) -> Row:
    """The row that a process has left; one that died failed at what it had not answered."""
    path = folder / "row.json"
    if path.exists():
        table = json.loads(path.read_text())
        table["steps"] = [Step(**step) for step in table["steps"]]
        return Row(**table)
    said = (folder / "said").read_text(errors="replace").strip().split("\n")[-1]
    how = f"ended with {exit_code}" if exit_code is not None else f"took more than {HANG} s"
    if exit_code == -signal.SIGKILL:
        how = f"took more than {SECONDS} s of a processor, or was killed"
    return Row(model_type, steps=[Step("process", FAILED, f"{how}: {said[:300]}")])


def run(names: Sequence[str], seed: int, jobs: int) -> Iterator[Row]:
    """The rows of the types, as they come."""
    context = get_context("fork")
    waiting = list(names)
    running: dict[Any, tuple[str, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, folder = waiting.pop(0), Path(tempfile.mkdtemp(prefix="architecture-"))
            (folder / "said").touch()
            process = context.Process(target=_work, args=(name, seed, folder))
            process.start()
            running[process] = name, folder, time.monotonic() + HANG
        wait([process.sentinel for process in running], timeout=1)
        for process, (name, folder, ends) in list(running.items()):
            late = time.monotonic() > ends
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[process]
            yield collect(name, folder, None if late else process.exitcode)
            shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------- the tables


def said(row: Row) -> list[str]:
    """A line for a row, and one for each thing that did not come out well."""
    about = f"{row.cls}, {row.style}, {row.parameters:,} parameters" if row.cls else ""
    lines = [f"{row.type}: {row.outcome} ({about}) {row.seconds} s"]
    if row.not_built:
        lines.append(f"  not built: {row.not_built}")
    for step in row.steps:
        if step.outcome != OK:
            lines.append(f"  {step.outcome} {step.name}: {step.line}")
    return lines


def counts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How often each question had each answer."""
    table: dict[str, Counter[str]] = {"type": Counter(row.outcome for row in rows)}
    for row in rows:
        for step in row.steps:
            table.setdefault(step.name, Counter())[step.outcome] += 1
    columns = (OK, REFUSED, OPEN, FAILED, "not built")
    return [{"question": name, **{c: found[c] for c in columns}} for name, found in table.items()]


_DETAILS = re.compile(r"/\S+|\[[^\]]*\]|\b\w*[A-Z]\w*[A-Z]\w*\b|\b[\w.]+\.[\w.]+\w|'[^']*'|\d+")


def reasons(lines: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Lines without their names and numbers -> the types that they are about."""
    found: dict[str, list[str]] = {}
    for name, line in lines:
        found.setdefault(_DETAILS.sub("*", line)[:200], []).append(name)
    return found


def show(rows: Sequence[Row]) -> None:
    """The tables at the end."""
    from .runs import table

    print(table(counts(rows)))
    for title, lines in (
        ("not built", [(r.type, r.not_built) for r in rows if r.not_built]),
        (REFUSED, [(r.type, s.line) for r in rows for s in r.steps if s.outcome == REFUSED]),
        (OPEN, [(r.type, s.line) for r in rows for s in r.steps if s.outcome == OPEN]),
        (FAILED, [(r.type, f"{s.name}: {s.line}") for r in rows for s in r.failures]),
    ):
        for reason, names in sorted(reasons(lines).items(), key=lambda item: -len(item[1])):
            print(f"{title}, {len(names)}: {reason}: {', '.join(sorted({*names})[:6])}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="*", default=[], help="globs; default: all")
    parser.add_argument("--count", type=int, help="only so many of them, at random")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write a line for each type here, as they come")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    rows = []
    with (args.json or Path(os.devnull)).open("w") as out:
        for row in run(chosen(args.types, args.count, args.seed), args.seed, args.jobs):
            rows.append(row)
            print("\n".join(said(row)), flush=True)
            out.write(json.dumps({"outcome": row.outcome, **asdict(row)}) + "\n")
            out.flush()
    show(rows)
    failed = sum(row.outcome == FAILED for row in rows)
    print(f"architectures: {len(rows)} types, {failed} with failures")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
