"""Random command lines: `python -m tests.campaigns.arguments --count 100000`.

Options are those of CLI.md, values are right, at an edge, or nonsense; the models are tiny. All end
with exit code 0, or with 1 or 2 and one line (or typer's usage): no traceback, no warning, nothing
but the output changed, and no output where it failed. Lines have numbers: --first goes on from one.
A line that takes longer than it may is stopped and counted; if no large amount was asked for, it is
a failure.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a team of threads does not survive a fork
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
import torch
import transformers
from typer.testing import CliRunner

from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.plans.recipe import Recipe
from ternarize.publish.export import export
from ternarize.publish.patches import diff_packed
from ternarize.sources.packed import open_packed
from ternarize.steps.appender import Appender
from ternarize.steps.base import base_digest
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import JournalHeader, Step

from .child import LATE, Child, limit_memory
from .runs import report, workshop

ROOT = Path(__file__).parents[2]
HANG = 60  # seconds for one line
MEMORY = 8 << 30  # address space that a child may take beyond what it has

NUMBERS = "0 1 2 3 4 16 64 65 128 256 -1 -2 007 1e2 0.5 nan inf -0 x \u0663 1_0".split() + [
    "",
    " 5 ",
]
HUGE = ["999999999", "9223372036854775808", "1" + "0" * 400, "-" + "9" * 30, "1e999"]
PLACES = "model packed model.gguf model.patch my.steps text.txt empty.txt bytes.txt".split()
PLACES += "folder missing".split()
PLACES += "/dev/null user/name user/name@x a/b/c . .. ~ out out/deeper text.txt/below".split()
PLACES += ["model/config.json", "model/inside", "", "x" * 300, "nul\ud800", "line\nbreak"]
TEXTS = "* *.weight lm_head* *up_proj* [ nothing* - -- {0} [red]x[/] %s default self".split()
TEXTS += ["model.layers.0.mlp.up_proj.weight", "", "\udcff", "a\nb", "\u00e9" * 99, "Hello there"]
QUALITY = (
    "perplexity=9 kl_divergence=0.5 top1_agreement=0.2 perplexity x=1 = perplexity=nan".split()
)
RIGHT = {  # by the name of an argument or option: what it mostly is
    "model": ["packed", "packed", "packed64", "tuned"],
    "base": ["packed64"],
    "patch": ["out", "out.patch", "model.patch", "model.patch"],
    "journal": ["my.steps"],
    "other": ["my.steps", "seed.steps"],
    "new": ["out.steps"],
    "output": ["out", "out", "folder/out"],
    "repo": ["user/name"],
    "--source": ["model"],
    "--text": ["text.txt"],
    "--dataset": ["default", "text.txt", "self"],
    "--device": ["cpu"],
    "--texts": ["text.txt", "text.txt=2", "self"],
    "--teacher": ["model"],
    "--start": ["packed"],
    "--base": ["packed64"],
    "--mask": ["0", "0:9"],
    "--tensor": ["model.layers.0.mlp.up_proj.weight"],
    "--plot": ["plot.png", "plot.svg"],
    "--min-quality": QUALITY,
    "--head": ["int8", "int4", "keep", "ternary"],
    "--recipe": ["fast", "recipe.toml", "packed64/ternarize.json", "packed/config.json"],
}
# of these a large one is right, and takes its time
AMOUNTS = (
    "--reconstruct --distill --num-samples --max-new-tokens --repeats --decode --batch --prompt"
)
AMOUNTS += (
    " --tokens --minutes --steps --train-len --batch-size --seq-len --max-tokens --limit --threads"
)
COMMANDS = {"convert": 40, "export": 16, "inspect": 10, "verify": 10, "eval": 8, "generate": 8}
COMMANDS |= {"bench": 3, "push": 5, "train": 6, "diff": 4, "apply": 6, "recode": 4}
COMMANDS |= {"steps train": 2, "steps replay": 3, "steps edit": 3}
COMMANDS |= {f"steps {name}": 2 for name in ("log", "fork", "merge", "diff", "compact", "verify")}
JOURNAL = "place/my.steps"  # written on in its place
WRITTEN_ON = ("steps train", "steps edit")

NEEDED = {"eval": ["--text"], "export": ["--to"], "generate": ["--prompt"]}
NEEDED |= {"steps train": ["--texts", "--teacher"], "steps edit": ["--mask"]}
# where a line has what it writes
OUTPUT = {"convert": 2, "export": 2, "train": 2, "recode": 2, "diff": 3, "apply": 3}
OUTPUT |= {"steps train": 3}
OUTPUT |= {"steps replay": 3, "steps fork": 3, "steps compact": 3, "steps merge": 4}


def options_of(document: str) -> dict[str, dict[str, str]]:
    """What CLI.md lists: {command: {argument or option: type, or "" for a switch}}."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"\n###? `ternarize ", document)[1:]:
        rows = re.findall(r"^\* `(?:-\w, )?(--)?([\w-]+)(?: (<[^`]*>|[A-Z:=|]+))?`:", part, re.M)
        found[part.partition("`")[0]] = {dash + name: kind for dash, name, kind in rows}
    return found


def random_value(name: str, kind: str, chance: random.Random) -> str:
    """Mostly what fits, else anything."""
    if name in RIGHT and chance.random() < 0.8:
        return chance.choice(RIGHT[name])
    choices = kind.strip("<>").split("|")
    if len(choices) > 1 and chance.random() < 0.85:
        return chance.choice(choices)
    number = "int" in kind or "float" in kind or kind == "STEPS"
    pools = [NUMBERS, PLACES, TEXTS]
    pool = NUMBERS if number and chance.random() < 0.9 else chance.choice(pools)
    if number and chance.random() < 0.1:
        pool = HUGE
    return chance.choice(pool)


def random_line(number: int, known: dict[str, dict[str, str]]) -> list[str]:
    """The command line of this number."""
    chance = random.Random(number)
    command = chance.choices(list(COMMANDS), list(COMMANDS.values()))[0]
    options = dict(known[command])
    options.pop("--debug", None)  # a traceback is what it is for
    line = []
    for name in [name for name in options if not name.startswith("-")]:
        value = random_value(name, options.pop(name), chance)
        if command in ("convert", "train") and name == "model" and value.startswith("packed"):
            value = "model"
        if command == "steps train" and name == "model":
            value = "packed64"
        line += [value] * (chance.random() < 0.95)
    needed = NEEDED.get(command, [])
    chosen = [name for name in needed if chance.random() < 0.95]
    chosen += chance.choices(sorted(options), k=chance.choice([0, 1, 1, 2, 2, 3, 5]))
    if "--dataset" in chosen:  # few and short, or it takes minutes
        line += ["--num-samples", chance.choice("3 4 5".split()), "--seq-len", "16"]
    if command == "steps train":
        line += ["--attempts", "2", "--perturbations", "16", "--batch", "64", "--train-len", "16"]
    if command == "train":
        line += ["--steps", "2", "--num-samples", "4", "--seq-len", "16"]
    if command == "bench":
        line += ["--prompt", "8", "--decode", "2", "--repeats", "1"]
    if command == "generate":
        line += ["--max-new-tokens", "4"]
    if command == "convert" and chance.random() < 0.5:
        line.append("--dry-run")
    for name in chosen:
        line.append(name)
        if options[name]:
            line.append(random_value(name, options[name], chance))
    if chance.random() < 0.03:
        line.insert(chance.randrange(len(line) + 1), chance.choice([*TEXTS, "--nonsense", "-x"]))
    return [*command.split(), *line]


def command_of(line: Sequence[str]) -> str:
    """The command of a line, of two words for journals."""
    return " ".join(line[:2]) if line[0] == "steps" else line[0]


def furnish(place: Path) -> None:
    """The files that command lines name."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = place / "model"
    tiny_models.save("llama", model, hidden_size=64, intermediate_size=192, vocab_size=2048)
    for path in (ROOT / "examples" / "tiny-llama").glob("*tok*"):
        shutil.copy(path, model)
    convert(model, place / "packed")
    convert(model, place / "packed64", Recipe(method="itf", group_size=64))
    export(place / "packed64", place / "model.gguf", "gguf", kind="q2_0")
    convert(model, place / "tuned", Recipe(method="twn", group_size=64))
    diff_packed(place / "packed64", place / "tuned", place / "model.patch")
    base = base_digest(open_packed(place / "packed64")[1])
    for name, header in (
        ("my.steps", JournalHeader(1, base=base)),
        ("seed.steps", JournalHeader(1, 1 << 30, (("w", (8, 16), -1),))),
    ):
        with Appender(place / name, header) as appender:
            appender.append(Step(0, SCALES, 4, 1, 16, (3, 7), (1, -1)))
            appender.append(Step(2, TRITS, 6, 1, 9, (4,), (1,)))
    shutil.copy2(place / "my.steps", place / "kept.steps")
    (place / "text.txt").write_text("The function returns the first of them.\n" * 60)
    (place / "empty.txt").write_text("")
    (place / "recipe.toml").write_text('method = "twn"\ngroup_size = 32\nkeep = ["*up_proj*"]\n')
    (place / "bytes.txt").write_bytes(bytes(range(256)))
    (place / "folder").mkdir()


def listing(place: Path) -> dict[str, tuple[int, int]]:
    """What there is: {path: (size, time of the last change)}, zeros for a folder."""
    found = {}
    for folder, folders, files in os.walk(place):
        for name in folders + files:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            state = (0, 0) if name in folders else (stat.st_size, stat.st_mtime_ns)
            found[os.path.relpath(path, place)] = state
    return found


def wrong(result: Any) -> str:
    """What is not as it must be about an ended command; "" if all is."""
    error, code, said = result.exception, result.exit_code, result.stderr.strip()
    if error is not None and not isinstance(error, SystemExit):
        return f"{type(error).__name__}: {error}"
    if code not in (0, 1, 2):
        return f"ends with {code}: {said}"
    if "Warning" in said or "Traceback" in said + result.stdout:
        return f"says {said!r}"
    in_order = said.startswith("error: ") and said.isprintable()
    return "" if code == 0 or in_order or "Usage: " in said else f"{code}, and says {said!r}"


def allowed(line: Sequence[str], code: int) -> str:
    """A pattern of the paths that a command line may leave behind."""
    at, words = OUTPUT.get(command_of(line), 0), [word for word in line if word[:1] != "-"]
    if at and "--dry-run" not in line and len(words) > at:
        place = os.path.join("place", words[at])
        output = re.escape(os.path.normpath(place))
        unfinished = rf"{output}\.partial(/.*)?"
        parents = [re.escape(str(parent)) for parent in Path(place).parents]
        return "|".join([unfinished, *parents, *([] if code else [output, f"{output}/.*"])])
    pictures = [v for o, v in zip(line, line[1:], strict=False) if o == "--plot"]
    return "|".join(re.escape(f"place/{picture}") for picture in pictures[-1:])


def run_line(
    line: Sequence[str], before: dict[str, tuple[int, int]], noise: TextIO
) -> tuple[str, str]:
    """Exit code, and what is wrong, of one command line in the folder that `furnish` made.

    noise  what comes to the process's own stderr, past the command line
    """
    result = CliRunner().invoke(app, list(line))
    torch.set_num_threads(1)  # bench sets it
    found, after = wrong(result), listing(Path.cwd().parent)
    noise.seek(0)
    said = noise.read()
    noise.seek(0)
    noise.truncate()
    if command_of(line) in WRITTEN_ON and after.get(JOURNAL) != before[JOURNAL]:
        shutil.copy2("kept.steps", "my.steps")
        after = listing(Path.cwd().parent)
    changed = [path for path in before if after.get(path) != before[path]]
    new = sorted(after.keys() - before.keys(), reverse=True)  # what is inside comes first
    may = re.compile(allowed(line, result.exit_code), re.DOTALL)
    left = [path for path in new if not may.fullmatch(path)]
    for wrongs, what in ((said.strip(), "says besides"), (changed, "changed"), (left, "left")):
        if wrongs and not found:
            found = f"{what} {wrongs[:300]!r}, exit code {result.exit_code}"
    for path in new:
        path = os.path.join("..", path)
        os.unlink(path) if os.path.islink(path) or not os.path.isdir(path) else os.rmdir(path)
    return str(result.exit_code), found


def work(pipe: Connection, place: Path) -> None:
    """Run the command lines that come, in a copy of the furnished folder."""
    own = place.parent / str(os.getpid()) / "place"  # for `..`: nothing else is beside it
    shutil.copytree(place, own)
    os.chdir(own)
    limit_memory(MEMORY)
    before = listing(own.parent)
    with tempfile.TemporaryFile("w+", errors="replace") as noise:
        os.dup2(noise.fileno(), 2)
        while (asked := pipe.recv()) is not None:
            pipe.send(run_line(asked[0], before, noise))


def is_large(line: Sequence[str]) -> bool:
    """Whether an amount is asked for that takes long."""
    pairs = zip(line, line[1:], strict=False)
    return any(a in AMOUNTS.split() and re.fullmatch(r"\d{4,}", b) is not None for a, b in pairs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--where", type=Path, help="a fast disk, such as /dev/shm")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    known = options_of((ROOT / "CLI.md").read_text("utf-8"))
    ends = {command: Counter[str]() for command in COMMANDS}
    failures, slowest = [], 0.0
    with workshop(args.where) as folder:
        (folder / "place").mkdir()
        furnish(folder / "place")
        child = Child(work, folder / "place", HANG)
        for number in range(args.first, args.first + args.count):
            line = random_line(number, known)
            began = time.monotonic()
            answer, died = child.ask(line)
            slowest = max(slowest, time.monotonic() - began)
            code, found = answer or ("stopped", "" if died == LATE and is_large(line) else died)
            ends[command_of(line)][code] += 1
            if found:
                failures.append(f"line {number}: {' '.join(map(ascii, line))}: {found}"[:600])
                print(failures[-1], file=sys.stderr, flush=True)
        failures += child.close()
    codes = ("0", "1", "2", "stopped")
    rows = [{"command": name, **{code: ends[name][code] for code in codes}} for name in ends]
    more = {"first": args.first, "count": args.count, "slowest_s": round(slowest, 1)}
    return report("arguments", rows, failures, args.json, **more)


if __name__ == "__main__":
    sys.exit(main())
