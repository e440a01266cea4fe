"""How far a training is, on the disk: what it goes on from, and the best of what it has had.

    state.safetensors  parameters, the optimizer's state, in the metadata the rest (`Progressed`)
    best.safetensors   what is stored of the state with the least loss on held-out text: trits,
                       scales and vectors, as a packed file

Each is written whole, under another name first.
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

from ternarize.files.outputs import sync_files

STATE, BEST = "state.safetensors", "best.safetensors"


@dataclass
class Progressed:
    """How far a training is.

    samples  taken from the texts; tokens: in them; seconds: of training, evaluations left out
    held     (step, held-out loss), the start first
    best     the least of those, whose state is in BEST
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    held: list[tuple[int, float]] = field(default_factory=list)
    best: float = float("inf")


def save_state(
    folder: Path,
    progressed: Progressed,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    known: Mapping[str, Any],
) -> None:
    """Write all that a training goes on from.

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


def load_state(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Progressed, dict[str, Any]] | None:
    """Take a training up where `save_state` left it, None where it did not.

    Returns how far it is, and what was `known` there.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
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
    return progressed, facts["known"]
