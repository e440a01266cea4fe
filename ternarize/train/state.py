"""How far a training is, on the disk: what it goes on from, and the best of what it has had.

    state.safetensors    parameters, the optimizer's state, in the metadata the rest (`Progressed`)
    best-12.safetensors  what is stored of the state after step 12, which had the least loss on
                         held-out text: trits, scales and vectors, as a packed file

Each is written whole, under another name first. A best stays until a state that names a later one
is on the disk, so that at any moment a state and its best are there.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ternarize.errors import OutputError
from ternarize.files.outputs import sync_files

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
) -> None:
    """Write all that a training goes on from, and forget what was the best before.

    known  what must be the same when it does
    """
    tensors = {f"parameter {name}": value.detach().cpu() for name, value in parameters.items()}
    rest: dict[str, Any] = {}
    for at, own in optimizer.state_dict()["state"].items():
        for key, value in own.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer {at} {key}"] = value.cpu()
            else:
                rest[f"{at} {key}"] = value
    facts = {"progressed": asdict(progressed), "known": dict(known), "optimizer": rest}
    part = folder / f"{STATE}.part"
    save_file({n: t.contiguous() for n, t in tensors.items()}, part, {"facts": json.dumps(facts)})
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
) -> Progressed:
    """Take a training up where `save_state` left it, or begin.

    Raises OutputError where something of `known` was another then.
    """
    path = folder / STATE
    if not path.is_file():
        return Progressed()
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        _check_known(folder, facts["known"], json.loads(json.dumps(dict(known))))
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(file.get_tensor(f"parameter {name}"))
        states: dict[int, dict[str, Any]] = {}
        for key in file.keys():
            kind, at, *name = key.split(" ")
            if kind == "optimizer":
                states.setdefault(int(at), {})[name[0]] = file.get_tensor(key)
    for key, value in facts["optimizer"].items():
        at, name = key.split(" ")
        states.setdefault(int(at), {})[name] = value
    table = optimizer.state_dict()
    optimizer.load_state_dict({**table, "state": states})
    progressed = Progressed(**facts["progressed"])
    progressed.held = [(int(step), float(loss)) for step, loss in progressed.held]
    progressed.budgets = [(int(step), budget) for step, budget in progressed.budgets]
    return progressed


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
