"""Random command lines: `python -m tests.campaigns.arguments --count 100000`.

Options are those of CLI.md, values are right, at an edge, or nonsense; the models are tiny. All end
with exit code 0, or with 1 or 2 and one line (or typer's usage): no traceback, no warning, nothing
but the output changed, and no output where it failed. Sets have numbers: --first goes on from one.
A set that takes longer than it may is stopped and counted; if no large amount was asked for, it is
a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import tiny_models  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from ternarize.cli import _in_one_line, app  # noqa: E402
from ternarize.convert import convert  # noqa: E402
from ternarize.export import export  # noqa: E402
from ternarize.plan import Recipe  # noqa: E402

from .child import Child  # noqa: E402

LONGEST = 60  # seconds for one set
MEMORY = 8 << 30  # address space that a child may take beyond what it has

NUMBERS = "0 1 2 3 4 16 64 65 128 256 -1 -2 007 1e2 0.5 nan inf -0 x ٣ 1_0".split() + ["", " 5 "]
HUGE = ["999999999", "9223372036854775808", "1" + "0" * 400, "-" + "9" * 30, "1e999"]
# what is worked on in proportion to: a large one is right, and takes its time
AMOUNTS = {
    "--reconstruct",
    "--distill",
    "--num-samples",
    "--max-new-tokens",
    "--repeats",
    "--decode",
}
AMOUNTS |= {
    "--batch",
    "--prompt",
    "--batch-size",
    "--seq-len",
    "--max-tokens",
    "--limit",
    "--threads",
}
PLACES = [
    "model",
    "packed",
    "model.gguf",
    "text.txt",
    "empty.txt",
    "bytes.txt",
    "folder",
    "missing",
]
PLACES += [
    "model/config.json",
    "/dev/null",
    "user/name",
    "a/b/c",
    ".",
    "..",
    "",
    "~",
    "user/name@x",
]
PLACES += [
    "out",
    "out/deeper",
    "text.txt/below",
    "model/inside",
    "x" * 300,
    "nul\ud800",
    "line\nbreak",
]
TEXTS = [
    "*",
    "*.weight",
    "lm_head*",
    "*up_proj*",
    "[",
    "",
    "nothing*",
    "\udcff",
    "a\nb",
    "-",
    "--",
    "é" * 99,
]
TEXTS += [
    "{0}",
    "[red]x[/]",
    "%s",
    "model.layers.0.mlp.up_proj.weight",
    "default",
    "self",
    "Hello there",
]
QUALITY = [
    "perplexity=9",
    "kl_divergence=0.5",
    "top1_agreement=0.2",
    "perplexity",
    "x=1",
    "=",
    "perplexity=nan",
]
RIGHT = {  # by the name of an argument or option: what it mostly is
    "model": ["packed", "packed", "packed64"],
    "output": ["out", "out", "folder/out"],
    "repo": ["user/name"],
    "--source": ["model"],
    "--text": ["text.txt"],
    "--dataset": ["default", "text.txt", "self"],
    "--device": ["cpu"],
    "--plot": ["plot.png", "plot.svg"],
    "--min-quality": QUALITY,
    "--head": ["int8", "keep", "ternary"],
}
COMMANDS = "convert export inspect verify eval generate bench push".split()
WEIGHTS = [40, 16, 10, 10, 8, 8, 3, 5]


def options_of(document: str) -> dict[str, dict[str, str]]:
    """What CLI.md lists: {command: {argument or option: type, or "" for a switch}}."""
    found: dict[str, dict[str, str]] = {}
    for part in document.split("\n## `ternarize ")[1:]:
        rows = re.findall(r"^\* `(?:-\w, )?(--)?([\w-]+)(?: (<[^`]*>|[A-Z=]+))?`:", part, re.M)
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


def random_set(number: int, known: dict[str, dict[str, str]]) -> list[str]:
    """The command line of this number."""
    chance = random.Random(number)
    command = chance.choices(COMMANDS, WEIGHTS)[0]
    options = dict(known[command])
    line = []
    for name in ("model", "output", "repo"):
        if name in options:
            value = random_value(name, options.pop(name), chance)
            if command == "convert" and name == "model" and value.startswith("packed"):
                value = "model"
            line += [value] * (chance.random() < 0.95)
    needed = {"eval": ["--text"], "export": ["--to"], "generate": ["--prompt"]}.get(command, [])
    chosen = [name for name in needed if chance.random() < 0.95]
    chosen += chance.choices(sorted(options), k=chance.choice([0, 1, 1, 2, 2, 3, 5]))
    if "--dataset" in chosen:  # few and short, or a set takes minutes
        line += ["--num-samples", chance.choice("3 4 5".split()), "--seq-len", "16"]
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
    return [command, *line]


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
    (place / "text.txt").write_text("The function returns the first of them.\n" * 60)
    (place / "empty.txt").write_text("")
    (place / "bytes.txt").write_bytes(bytes(range(256)))
    (place / "folder").mkdir()


def stamp(place: Path) -> dict[str, tuple[int, int]]:
    """What there is: {path: (size, time of the last change)}."""
    found = {}
    for folder, _, files in os.walk(place):
        for name in files:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            found[os.path.relpath(path, place)] = stat.st_size, stat.st_mtime_ns
    return found


def wrong(line: Sequence[str], result: Any) -> str:
    """What is not as it must be about an ended command; "" if all is."""
    error, code = result.exception, result.exit_code
    if error is not None and not isinstance(error, SystemExit):
        if "--debug" in line and _in_one_line(error) is not None:
            return ""
        return f"{type(error).__name__}: {error}"
    said = result.stderr.strip()
    if code not in (0, 1, 2):
        return f"ends with {code}: {said}"
    if "Warning" in said or "Traceback" in said:
        return f"says {said!r}"
    if code and "Usage: " not in said:
        if not said.startswith("error: ") or not said.isprintable():
            return f"ends with {code} and says {said!r}"
    return ""


def run_set(line: Sequence[str], before: dict[str, tuple[int, int]]) -> tuple[str, str]:
    """(exit code, what is wrong) of one command line, in the folder that `furnish` made."""
    result = CliRunner().invoke(app, list(line))
    torch.set_num_threads(1)  # bench sets it
    found = wrong(line, result)
    after = stamp(Path.cwd())
    changed = sorted(path for path in before if after.get(path) != before[path])
    new = sorted({path.split(os.sep)[0] for path in after.keys() - before.keys()})
    if changed:
        found = found or f"changed {changed[:3]}"
    if result.exit_code and any(not name.endswith(".partial") for name in new if name != "folder"):
        found = found or f"failed, and left {new}"
    for path in sorted(after.keys() - before.keys()):
        os.unlink(path)
    for folder, _, _ in sorted(os.walk("."), reverse=True):
        if folder not in (".", "./folder") and not os.listdir(folder):
            os.rmdir(folder)
    return str(result.exit_code), found


def work(pipe: Connection, place: Path) -> None:
    """Run the command lines that come, in a copy of the furnished folder."""
    own = Path(tempfile.mkdtemp(dir=place.parent)) / "place"
    shutil.copytree(place, own)
    os.chdir(own)
    torch.set_num_threads(1)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = stamp(own)
    while (asked := pipe.recv()) is not None:
        pipe.send(run_set(asked[0], before))
    shutil.rmtree(own.parent)


def is_large(line: Sequence[str]) -> bool:
    """Whether an amount is asked for that takes long."""
    pairs = zip(line, line[1:], strict=False)
    return any(a in AMOUNTS and re.fullmatch(r"\d{4,}", b) is not None for a, b in pairs)


def campaign(count: int, first: int, where: Path | None) -> dict[str, Any]:
    """Run the sets [first, first + count)."""
    known = options_of((ROOT / "CLI.md").read_text("utf-8"))
    ends, failures, slowest = Counter[str](), [], 0.0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=where) as folder:
        place = Path(folder) / "place"
        place.mkdir()
        furnish(place)
        child = Child(work, place, LONGEST)
        for number in range(first, first + count):
            line = random_set(number, known)
            began = time.monotonic()
            answer, died = child.ask(line)
            stopped = died.startswith("did not end") and is_large(line)
            code, found = answer or ("died", "" if stopped else died)
            slowest = max(slowest, time.monotonic() - began)
            ends[code] += 1
            ends[f"{line[0]} {code}"] += 1
            if found:
                failures.append(f"set {number}: {' '.join(map(ascii, line))}: {found}"[:600])
                print(failures[-1], file=sys.stderr, flush=True)
        child.close()
    return {
        "sets": count,
        "first": first,
        "ends": dict(sorted(ends.items())),
        "slowest_s": round(slowest, 1),
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--where", type=Path, help="a fast disk, such as /dev/shm")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    report = campaign(options.count, options.first, options.where)
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
