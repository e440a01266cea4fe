"""Journals of steps on the digits of scikit-learn: accuracy for bytes, edits, cost, several ranks.

    pip install scikit-learn
    python benchmarks/steps_digits.py [--only NAME ...] [--rules NAME ...] [--seeds N] [--jobs N]
        [--plot OUT.png] [--json OUT.json]

1,797 images of 8 x 8; 360 of them, drawn once, are the test, and nothing is chosen by them. The net
is 64-128-128-10 in trits alone, 25,856 of them, each layer behind a layer norm without parameters,
and begins from the seed of its journal. Bytes are those of the compact file. Baselines: the same
net in float32, and in trits trained straight-through by the package's own `ternarize.qat`.
"""

import importlib
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import parser, write_figures
from torch import Tensor, nn

from ternarize import qat
from ternarize.measure.report import figure_for
from ternarize.ranks import ranks_of_launcher
from ternarize.steps.appender import Appender
from ternarize.steps.base import opened_state
from ternarize.steps.journal import (
    NO_STEP,
    Journal,
    JournalHeader,
    Step,
    bits_in_block,
    journal_header,
    parse_journal,
    read_journal,
)
from ternarize.steps.operations import compact
from ternarize.train.moved import MovedModule, Placement
from ternarize.train.votes import Votes, train_votes

WIDTH = 128
TEST = 360
ZEROS = 1 << 30  # half of the trits begin as zeros
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.004)
FEW = (0.001, 0.003)  # 2 or 6 of 2,048
ONE = (1 / 16384, 2 / 16384, 5 / 16384)
BYTES = 1500
# how steps are found, attempts at most, drawn images that decide
Rule = tuple[Votes, int, int]
RULES: dict[str, Rule] = {
    "half of 128, one density": (
        Votes(k=128, bits=(8,), shares=(0.5,), thrift=0.0, nbytes=BYTES),
        600,
        500,
    ),
    "any share of 256, between": (
        Votes(k=256, bits=(8, 10, 12), shares=SHARES, thrift=0.5, nbytes=BYTES),
        600,
        500,
    ),
    "2 or 6 of 2,048, gain for each bit": (
        Votes(k=2048, bits=(8, 10, 12, 13), shares=FEW, thrift=1.0, nbytes=BYTES),
        600,
        500,
    ),
    "1, 2 or 5 of 16,384, gain for each bit": (
        Votes(k=16384, bits=(8, 10, 12, 13), shares=ONE, thrift=1.0, nbytes=BYTES),
        600,
        1000,
    ),
    "2 or 6 of 2,048, 5,000 bytes": (
        Votes(k=2048, bits=(8, 10, 12, 13), shares=FEW, thrift=1.0, nbytes=5000),
        1200,
        500,
    ),
}
_WITHOUT = Votes(k=64, bits=(8, 10, 12), shares=(0.2, 0.06, 0.02), thrift=0.0)
NO_BACKWARD: dict[str, Rule] = {
    "tangents (jvp)": (replace(_WITHOUT, probe="jvp"), 350, 500),
    "forwards alone": (replace(_WITHOUT, probe="forwards"), 600, 1000),
    "backward, for comparison": (_WITHOUT, 150, 500),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(x)
            x = F.layer_norm(x, x.shape[-1:]).relu()
        logits: Tensor = 3 * self.last(x) / math.sqrt(WIDTH)
        return logits


SHAPES = (
    ("first.weight", (WIDTH, 64), -1),
    ("second.weight", (WIDTH, WIDTH), -1),
    ("last.weight", (10, WIDTH), -1),
)


class Digits:
    """Images and labels, to train on and of the test."""

    def __init__(self) -> None:
        load_digits = importlib.import_module("sklearn.datasets").load_digits
        found = load_digits()
        x = torch.tensor((found.data - 8) / 5, dtype=torch.float32)
        y = torch.tensor(found.target).long()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        self.test = x[order[:TEST]], y[order[:TEST]]
        self.train = x[order[TEST:]], y[order[TEST:]]

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        x, y = self.train
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(len(y), (size,), generator=generator)
        return x[rows], y[rows]


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@torch.no_grad()
def accuracy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    return float((module(batch[0]).argmax(-1) == batch[1]).float().mean())


def started(seed: int, steps: list[Step] | None = None) -> MovedModule:
    state = opened_state(header_of(seed), None, {})
    state.apply(steps or [])
    places = [Placement(part, part.name, torch.ones(part.scales_shape)) for part in state.parts]
    return MovedModule(Net(), places, state)


def header_of(seed: int) -> JournalHeader:
    return JournalHeader(0x7E57 * (seed + 1), ZEROS, SHAPES)


def halves(digits: Digits, count: int) -> Callable[[int], tuple[Any, Any]]:
    """All images are probed; so many that are drawn for each attempt decide."""
    return lambda number: (digits.train, digits.batch(number, count))


def few(digits: Digits, count: int) -> Callable[[int], tuple[Any, Any]]:
    """256 are probed, where each perturbation takes two forwards; so many others decide."""
    return lambda number: (digits.batch(2 * number, 256), digits.batch(2 * number + 1, count))


def run(
    folder: Path, digits: Digits, seed: int, rule: Rule, batches: Any = None
) -> tuple[Journal, MovedModule, float, int]:
    """Train one journal: it, the values, processor seconds, bytes of the compact file."""
    votes, attempts, deciding = rule
    path = folder / f"{seed}-{time.monotonic_ns()}.steps"
    moved, begun = started(seed), time.process_time()
    with Appender(path, header_of(seed)) as appender:
        of = batches or (halves if votes.probe == "backward" else few)(digits, deciding)
        train_votes(moved, loss, of, appender.journal, appender.append, votes, attempts)
    seconds = time.process_time() - begun
    small = compact(path, path.with_suffix(".small"))
    return read_journal(path), moved, seconds, small.size


# test accuracy, training loss, bytes, processor seconds; the curve
Told = tuple[tuple[float, float, int, float], list[tuple[int, int, float]]]


def measured(folder: Path, seed: int, rule: Rule) -> Told:
    """What comes of one seed, in a process of its own."""
    torch.set_num_threads(1)
    digits = Digits()
    journal, moved, seconds, size = run(folder, digits, seed, rule)
    with torch.no_grad():
        value = float(loss(moved.module, digits.train))
    found = accuracy(moved.module, digits.test), value, size, seconds
    return found, curve(digits, seed, journal)


def show_rules(folder: Path, rules: dict[str, Rule], seeds: int, jobs: int) -> list[dict[str, Any]]:
    print(
        "| rule | attempts | test accuracy, mean (least to most) | training loss | bytes | CPU s |"
    )
    print("|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as processes:
        for name, rule in rules.items():
            each = [processes.submit(measured, folder, s, rule) for s in range(1, seeds + 1)]
            told = [one.result() for one in each]
            found, curves = [one[0] for one in told], [one[1] for one in told]
            tests, losses, sizes, seconds_ = zip(*found, strict=True)
            mean = statistics.mean
            print(
                f"| {name} | {rule[1]} | {mean(tests):.4f} ({min(tests):.3f} to "
                f"{max(tests):.3f}) | {mean(losses):.3f} | {mean(sizes):,.0f} | "
                f"{mean(seconds_):.1f} |",
                flush=True,
            )
            rows.append({"rule": name, "attempts": rule[1], "runs": found, "curves": curves})
    return rows


def curve(digits: Digits, seed: int, journal: Journal) -> list[tuple[int, int, float]]:
    """(steps, bytes of header and steps, accuracy) of 25 of its beginnings; a file has 58 more."""
    header = len(journal_header(journal.header))
    sizes = [header, *(bits_in_block(b, a) / 8 for a, b in pairwise([NO_STEP, *journal.steps]))]
    bytes_ = list(accumulate(sizes))
    count = len(journal.steps)
    moved, points, last = started(seed), [], 0
    for each in sorted({round(count * i / 24) for i in range(25)}):
        moved.state.apply(journal.steps[last:each])
        moved.write()
        points.append((each, round(bytes_[each]), accuracy(moved.module, digits.test)))
        last = each
    return points


def show_baselines(digits: Digits, seeds: int) -> list[dict[str, Any]]:
    """The net in float32, and in trits trained straight-through."""
    rows: list[dict[str, Any]] = []
    for name, ternary in (("float32", False), ("trits, straight-through", True)):
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            module, begun = Net(), time.process_time()
            if ternary:
                qat.prepare(module, group_size=0, scale="absmean", include=["*"], estimator="ste")
            optimizer = torch.optim.Adam(module.parameters(), 2e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
            for number in range(600):
                optimizer.zero_grad()
                torch.autograd.backward(loss(module, digits.batch(number, 256)))
                optimizer.step()
                schedule.step()
            module.eval()
            found.append((accuracy(module, digits.test), time.process_time() - begun))
        tests, seconds = zip(*found, strict=True)
        print(
            f"| {name}, 600 steps of 256 | | {statistics.mean(tests):.4f} ({min(tests):.3f} to "
            f"{max(tests):.3f}) | | | {statistics.mean(seconds):.1f} |"
        )
        rows.append({"baseline": name, "runs": found})
    return rows


def show_edits(digits: Digits, folder: Path) -> dict[str, Any]:
    """What undoing, leaving out and turning round do, and a cure of poisoned steps."""
    journal, moved, _, _ = run(folder, digits, 1, RULES["any share of 256, between"])
    steps = journal.steps
    print(f"\n{len(steps)} steps; test accuracy {accuracy(moved.module, digits.test):.3f}\n")
    print("| edit | accuracy |")
    print("|---|---|")

    def told(name: str, kept: list[Step]) -> float:
        value = accuracy(started(1, kept).module, digits.test)
        print(f"| {name} | {value:.3f} |")
        return value

    def turned(step: Step) -> Step:
        return replace(step, signs=tuple(-sign for sign in step.signs))

    rows = dict[str, float]()
    for count in (1, 5, 20, len(steps) // 2):
        rows[f"undo {count}"] = told(f"the last {count} left out", steps[:-count])
        rows[f"early {count}"] = told(f"the first {count} left out", steps[count:])
    generator = torch.Generator().manual_seed(0)
    for share in (0.05, 0.2, 0.5):
        gone = torch.rand(len(steps), generator=generator) < share
        kept = [step for step, out in zip(steps, gone.tolist(), strict=True) if not out]
        rows[f"mask {share}"] = told(f"{share:.0%} at random left out", kept)
        other = [turned(s) if out else s for s, out in zip(steps, gone.tolist(), strict=True)]
        rows[f"negate {share}"] = told(f"{share:.0%} at random negated", other)
    rows |= _poison(digits, folder, told)
    return {"steps": len(steps), "edits": rows}


def _poison(
    digits: Digits, folder: Path, told: Callable[[str, list[Step]], float]
) -> dict[str, float]:
    """40 attempts on images whose threes are called eights, in the middle of a training."""
    votes, _, deciding = RULES["any share of 256, between"]
    x, y = digits.train
    wrong = x, torch.where(y == 3, 8, y)

    def batches(number: int) -> tuple[Any, Any]:
        chosen = wrong if 80 <= number < 120 else (x, y)
        return chosen, chosen

    journal, moved, _, _ = run(folder, digits, 1, (votes, 120, deciding), batches)
    rows = {"poisoned": told("40 poisoned attempts at the end", journal.steps)}
    clean = [step for step in journal.steps if step.number < 80]
    rows["cured at the end"] = told("... masked: what it was before", clean)
    journal, moved, _, _ = run(folder, digits, 1, (votes, 200, deciding), batches)
    rows["middle"] = told("80 attempts, 40 poisoned ones, 80 attempts", journal.steps)
    masked = [step for step in journal.steps if not 80 <= step.number < 120]
    rows["masked"] = told("... the poisoned ones masked", masked)
    repaired = started(1, masked)
    path = folder / "repair.steps"
    with Appender(path, header_of(1)) as appender:
        for step in masked:
            appender.append(step)
    for attempts in (5, 20):
        journal = read_journal(path)
        repaired = started(1, journal.steps)
        with Appender(path, header_of(1)) as appender:
            train_votes(
                repaired,
                loss,
                lambda _: (digits.train, digits.train),
                appender.journal,
                appender.append,
                votes,
                200 + attempts,
            )
        name = f"... and {attempts} attempts of repair"
        rows[name] = told(name, read_journal(path).steps)
    return rows


def show_ranks(folder: Path) -> list[dict[str, Any]]:
    """One, two and four processes with a share of the data each."""
    print("\n| processes | exchange | test accuracy | bytes of each an attempt | of a gradient |")
    print("|---|---|---|---|---|")
    gradient = 4 * sum(math.prod(shape) for _, shape, _ in SHAPES)
    rows: list[dict[str, Any]] = []
    for count, exchange in ((1, "alignments"), *product((2, 4), ("alignments", "votes"))):
        path = folder / f"{count}-{exchange}.steps"
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environment |= {"WORLD_SIZE": str(count), "MASTER_PORT": str(29_500 + len(rows))}
        command = [sys.executable, __file__, "--worker", exchange, "--folder", str(path)]
        each = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        told = [process.communicate()[0].split() for process in each]
        assert len({row[0] for row in told}) == 1, "digests differ"
        sent, steps = int(told[0][1]), int(told[0][2])
        per_step = sent / steps
        print(
            f"| {count} | {exchange} | {float(told[0][3]):.4f} | {per_step:,.0f} | "
            f"{per_step / gradient:.2%} |",
            flush=True,
        )
        rows.append({"processes": count, "exchange": exchange, "told": told})
    return rows


def work(exchange: str, path: Path) -> None:
    """One process of `show_ranks`."""
    digits, attempts = Digits(), 150
    # few candidates: of each, the loss is exchanged
    votes = Votes(k=128, bits=(8, 10), shares=(0.2, 0.05), thrift=0.5, exchange=exchange)
    with ranks_of_launcher() as world:
        x, y = digits.train
        own = x[world.rank :: world.size], y[world.rank :: world.size]
        appender = None if world.rank else Appender(path, header_of(1))
        begun = parse_journal(world.firsts(path.read_bytes() if appender else b""))
        moved = started(1)
        world.sent.clear()
        train_votes(
            moved,
            loss,
            lambda _: (own, own),
            begun,
            appender.append if appender else lambda *_: None,
            votes,
            attempts,
            world=world,
        )
        if appender:
            appender.__exit__()
        sent = sum(world.sent.values())
        print(moved.state.digest(), sent, attempts, accuracy(moved.module, digits.test))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over steps and over bytes, of the first seed of each rule."""
    with figure_for(path, (8, 8)) as figure:
        for axes, what, label in zip(
            figure.subplots(2, 1), (0, 1), ("steps", "bytes of the journal"), strict=True
        ):
            for row in rows:
                points = row["curves"][0]
                numbers, right = [p[what] for p in points], [p[2] for p in points]
                axes.plot(numbers, right, ".-", label=row["rule"])
            axes.set(xlabel=label, ylabel="test accuracy", ylim=(0, 1))
            axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    parts = ("rules", "no-backward", "baselines", "edits", "ranks")
    arguments.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments.add_argument("--rules", nargs="+", choices=[*RULES, *NO_BACKWARD])
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--jobs", type=int, default=1)
    arguments.add_argument("--plot", type=Path)
    arguments.add_argument("--worker")
    arguments.add_argument("--folder", type=Path)
    options = arguments.parse_args(argv)
    torch.set_num_threads(1)
    if options.worker:
        work(options.worker, options.folder)
        return 0
    digits, figures = Digits(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part, rules in (("rules", RULES), ("no-backward", NO_BACKWARD)):
            chosen = {n: r for n, r in rules.items() if not options.rules or n in options.rules}
            if part in options.only and chosen:
                figures[part] = show_rules(folder, chosen, options.seeds, options.jobs)
        if "baselines" in options.only:
            figures["baselines"] = show_baselines(digits, options.seeds)
        if "edits" in options.only:
            figures["edits"] = show_edits(digits, folder)
        if "ranks" in options.only:
            figures["ranks"] = show_ranks(folder)
    if options.plot:
        draw(figures.get("rules", []) + figures.get("no-backward", []), options.plot)
    write_figures(options.json, __file__, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
