"""How far a training is, on the disk: what it goes on from, and the best of what it has had.

    state.safetensors    parameters, the optimizer's state of each, in the metadata the rest
                         (`Progressed`)
    best-12.safetensors  what is stored of the state after step 12, which had the least loss on
                         held-out text: trits, scales and vectors, as a packed file

Each is written whole, under another name first. A best stays until a state that names a later one
is on the disk, so that at any moment a state and its best are there.

Of several processes the first writes and reads, a tensor at a time, whatever part of it each has:
any number of them goes on from it.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ternarize.errors import OutputError
from ternarize.files.headers import DTYPE_NAMES, DTYPES, byte_view, file_head, lay_out, read_header
from ternarize.files.outputs import sync_files
from ternarize.ranks import World
from ternarize.train.divided import is_divided, put, whole

STATE = "state.safetensors"


@dataclass
class Progressed:
    """How far a training is.

    samples  taken from the texts; tokens: in them; seconds: of steps, looks at held-out text left
             out
    held     (step, held-out loss), the start first
    best     the step that had the least of those, None before the first
    looked   how many of the looks at held-out text are due no more
    since    the step from which on states count; an earlier one is kept until there is one
    budgets  (step, the budget of the steps after it), a line for each change
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    held: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None
    looked: int = 0
    since: int = 0
    budgets: list[tuple[int, dict[str, float | None]]] = field(default_factory=list)

    def best_file(self, folder: Path) -> Path:
        """The file of the best state."""
        return best_file(folder, self.best or 0)


def best_file(folder: Path, step: int) -> Path:
    """The file of what is stored of the state after a step."""
    return folder / f"best-{step}.safetensors"


def save_state(
    folder: Path,
    progressed: Progressed,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    known: Mapping[str, Any],
    *,
    writes: bool = True,
) -> None:
    """Write all that a training goes on from, and forget what was the best before.

    known   what must be the same when it does
    writes  whether it is the first process: of divided tensors all have to take part
    """
    tensors: dict[str, Tensor] = {f"parameter {name}": value for name, value in parameters.items()}
    rest: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer {name} {key}"] = value
            else:
                rest[f"{name} {key}"] = value
    entries = lay_out((n, DTYPE_NAMES[v.dtype], tuple(v.shape)) for n, v in tensors.items())
    facts = {"progressed": asdict(progressed), "known": dict(known), "optimizer": rest}
    part = folder / f"{STATE}.part"
    place: Any = part.open("wb") if writes else nullcontext()
    with place as file:
        if file is not None:
            file.write(file_head(entries, {"facts": json.dumps(facts)}))
        for name in entries:
            value = whole(tensors[name])
            if file is not None:
                file.write(byte_view(value).numpy().data)
    if not writes:
        return
    sync_files(part)
    part.replace(folder / STATE)
    for other in folder.glob("best-*.safetensors"):
        if other != progressed.best_file(folder):
            other.unlink()


def load_state(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    known: Mapping[str, Any],
    *,
    world: World | None = None,
) -> Progressed:
    """Take a training up where `save_state` left it, or begin.

    world  the processes that go on, each of which calls this; the folder is the first one's

    Raises OutputError where something of `known`, or what is trained, was another then.
    """
    path, world = folder / STATE, world or World()
    begun: tuple[dict[str, Any], dict[str, tuple[Any, torch.dtype]]] | None = None
    with world.agreed():
        if world.rank == 0 and path.is_file():
            header = read_header(path)
            facts = json.loads(header.metadata["facts"])
            _check_known(folder, facts["known"], json.loads(json.dumps(dict(known))))
            begun = facts, {n: (e.shape, DTYPES[e.dtype]) for n, e in header.entries.items()}
            named = {key.split(" ")[1] for key in begun[1]}
            named |= {key.split(" ")[0] for key in facts["optimizer"]}
            if not named <= parameters.keys():
                raise OutputError(
                    folder,
                    "holds a training of another version of ternarize, or of another model",
                    "one that this version began",
                    "Remove it to begin anew",
                )
    begun = world.firsts(begun)
    if begun is None:
        return Progressed()
    facts, tensors = begun
    states: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for key, value in facts["optimizer"].items():
        name, what = key.split(" ")
        states[name][what] = value
    opened: Any = safe_open(path, framework="pt") if world.rank == 0 else nullcontext()
    with opened as file:
        for key, about in tensors.items():
            kind, name, *rest = key.split(" ")
            like = parameters[name]
            own = None if file is None else file.get_tensor(key)
            place = like.detach() if kind == "parameter" else None
            if is_divided(like) and about[0] == tuple(like.shape):  # moments are, as their weights
                place = torch.zeros_like(like) if place is None else place
                put(place, own)
            else:
                own = _everywhere(world, own, *about)
                place = own if place is None else place.copy_(own)
            if kind == "optimizer":
                states[name][rest[0]] = place
    names = {id(parameter): name for name, parameter in parameters.items()}
    counted = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {at: states[names[id(parameter)]] for at, parameter in enumerate(counted)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    progressed = Progressed(**facts["progressed"])
    progressed.held = [(int(step), float(loss)) for step, loss in progressed.held]
    progressed.budgets = [(int(step), budget) for step, budget in progressed.budgets]
    return progressed


def _everywhere(world: World, value: Tensor | None, shape: Any, dtype: torch.dtype) -> Tensor:
    """A tensor that the first process has, in all of them."""
    if value is None:
        return world.receive(shape, dtype, 0)
    for other in range(1, world.size):
        world.send(value, other, "state")
    return value


def _check_known(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differ:
        said = (f"{name} was {before.get(name)} and is {now.get(name)}" for name in differ)
        raise OutputError(
            folder.parents[1],
            f"holds a training that began otherwise: {'; '.join(said)}",
            "the same",
            "Undo the change, or remove it to begin anew",
        )
